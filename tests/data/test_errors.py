"""Each error of a registration: it names the value and the fix, and leaves the AnnData as it was."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from mudata import MuData

from pertvae.models import SAMSVAE

LABELS = {"perturbation_key": "perturbation", "control": "ctrl"}


def entry(row, column, value, layer=None):
    def spoil(adata):
        x = (adata.X if layer is None else adata.layers[layer]).toarray()
        x[row, column] = value
        if layer is None:
            adata.X = sp.csr_matrix(x)
        else:
            adata.layers[layer] = sp.csr_matrix(x)

    return spoil


def column(name, row, value):
    def spoil(adata):
        values = adata.obs[name].astype(object).to_numpy().copy()
        values[row] = value
        adata.obs[name] = pd.to_numeric(values) if name in ("dose", "age", "total") and value != "x" else values

    return spoil


def everywhere(name, value):
    def spoil(adata):
        adata.obs[name] = value

    return spoil


def in_design(row, name, value):
    def spoil(adata):
        adata.obsm["design"].iloc[row, adata.obsm["design"].columns.get_loc(name)] = value

    return spoil


def rename_design(names):
    def spoil(adata):
        adata.obsm["design"].columns = names

    return spoil


DESIGN = {"perturbation_key": None, "control": None, "perturbation_obsm_key": "design"}
ERRORS = {
    "missing column": (None, {"perturbation_key": "pertubation"}, KeyError, r"'pertubation'.*mean 'perturbation'"),
    "no control given": (None, {"control": None}, ValueError, r"perturbation_key='perturbation' needs control"),
    "no key": (None, {"perturbation_key": None}, ValueError, r"perturbation_key.*perturbation_obsm_key"),
    "two keys": (None, {"perturbation_obsm_key": "design"}, ValueError, r"either.*'perturbation'.*'design'"),
    "no control cells": (None, {"control": "NT"}, ValueError, r"control='NT'.*commonest: .*'ctrl'"),
    "empty control": (None, {"control": []}, ValueError, r"control is empty.*control='control'"),
    "only controls": (everywhere("perturbation", "ctrl"), {}, ValueError, r"Every cell.*control"),
    "labels NaN": (column("perturbation", [3, 9], np.nan), {}, ValueError, r"2 missing labels.*'cell3', 'cell9'.*isna"),
    "label None": (column("perturbation", 3, None), {}, ValueError, r"1 missing labels.*'cell3'"),
    "label empty": (column("perturbation", 3, "  "), {}, ValueError, r"1 missing labels.*'cell3'"),
    "empty component": (column("perturbation", 3, "A++B"), {}, ValueError, r"'A\+\+B'.*'\+'.*sep=None"),
    "trailing separator": (column("perturbation", 3, "A+"), {}, ValueError, r"'A\+'.*sep=None"),
    "separator in control": (None, {"control": "non-targeting", "sep": "-"}, ValueError, r"'non-targeting'.*'-'.*sep"),
    "empty separator": (None, {"sep": ""}, ValueError, r"sep is the empty string"),
    "negative count": (entry(57, 4, -2), {}, ValueError, r"-2\.0.*'cell57'.*'gene4'.*is_count_data=False"),
    "NaN count": (entry(5, 4, np.nan), {}, ValueError, r"nan.*'cell5'.*'gene4'.*finite"),
    "infinite count": (entry(5, 4, np.inf), {}, ValueError, r"inf.*'cell5'"),
    "negative in layer": (entry(8, 1, -1, "counts"), {"layer": "counts"}, ValueError, r"layers\['counts'\].*'cell8'"),
    "NaN real value": (entry(5, 4, np.nan), {"is_count_data": False}, ValueError, r"nan.*'cell5'.*finite\.$"),
    "missing layer": (None, {"layer": "count"}, KeyError, r"layer='count'.*'counts'"),
    "missing dose column": (None, {"dosage_key": "doze"}, KeyError, r"dosage_key='doze'.*'dose'"),
    "negative dose": (column("dose", 20, -0.5), {"dosage_key": "dose"}, ValueError, r"-0\.5.*'cell20'.*'GATA1'"),
    "infinite dose": (column("dose", 20, np.inf), {"dosage_key": "dose"}, ValueError, r"1 doses.*inf.*'cell20'"),
    "NaN dose": (column("dose", 20, np.nan), {"dosage_key": "dose"}, ValueError, r"nan.*'cell20'"),
    "dose text": (column("dose_text", 20, "high"), {"dosage_key": "dose_text"}, ValueError, r"'high'.*'GATA1'.*number"),
    "dose not aligned": (
        column("dose_text", 20, "1+2"),
        {"dosage_key": "dose_text"},
        ValueError,
        r"'GATA1' has 1 components.*'1\+2' has 2",
    ),
    "negative in dose text": (
        column("dose_text", 50, "1+-2"),
        {"dosage_key": "dose_text"},
        ValueError,
        r"-2\.0.*'KLF1'.*'GATA1\+KLF1'",
    ),
    "missing dose text": (
        column("dose_text", 20, None),
        {"dosage_key": "dose_text"},
        ValueError,
        r"1 missing doses.*'cell20'",
    ),
    "two doses of one": (
        lambda a: (column("perturbation", 20, "KLF1+KLF1")(a), column("dose_text", 20, "1+2")(a)),
        {"dosage_key": "dose_text"},
        ValueError,
        r"'KLF1' two doses: 1\.0 and 2\.0",
    ),
    "missing design": (None, {**DESIGN, "perturbation_obsm_key": "desing"}, KeyError, r"'desing'.*'design'"),
    "design with doses": (None, {**DESIGN, "dosage_key": "dose"}, ValueError, r"dosage_key='dose'"),
    "negative in design": (in_design(20, "KLF1", -1.0), DESIGN, ValueError, r"-1\.0.*'cell20'.*'KLF1'"),
    "NaN in design": (in_design(20, "GATA1", np.nan), DESIGN, ValueError, r"nan.*'cell20'.*'GATA1'"),
    "design without controls": (in_design(slice(None), "GATA1", 1.0), DESIGN, ValueError, r"rows of zeros"),
    "separator in design": (rename_design(["A", "A+B"]), DESIGN, ValueError, r"'A\+B'.*'\+'"),
    "repeated in design": (rename_design(["A", "A"]), DESIGN, ValueError, r"'A' more than once"),
    "missing batch column": (None, {"batch_key": "bach"}, KeyError, r"batch_key='bach'.*'batch'"),
    "missing label column": (None, {"labels_key": "celltype"}, KeyError, r"labels_key='celltype'.*'cell_type'"),
    "NaN batch": (column("batch", 7, np.nan), {"batch_key": "batch"}, ValueError, r"batch.*missing for 1.*'cell7'"),
    "missing covariate": (None, {"categorical_covariate_keys": ["cell"]}, KeyError, r"'cell'.*'cell_type'"),
    "NaN covariate": (column("age", 7, np.nan), {"continuous_covariate_keys": ["age"]}, ValueError, r"age.*'cell7'"),
    "infinite covariate": (column("age", 7, np.inf), {"continuous_covariate_keys": ["age"]}, ValueError, r"age.*inf"),
    "text covariate": (None, {"continuous_covariate_keys": ["batch"]}, ValueError, r"'batch'.*not numeric"),
    "size factor of zero": (
        column("total", 7, 0.0),
        {"size_factor_key": "total"},
        ValueError,
        r"total.*0\.0.*positive",
    ),
    "missing size factor": (None, {"size_factor_key": "totals"}, KeyError, r"size_factor_key='totals'.*'total'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_value_and_fix_and_changes_nothing(name, adata, unchanged):
    spoil, arguments, error, message = ERRORS[name]
    if spoil is not None:
        spoil(adata)
    check = unchanged(adata)
    with pytest.raises(error, match=message):
        SAMSVAE.setup_anndata(adata, **{**LABELS, **arguments})
    check()


def test_an_empty_matrix_names_the_layers(unchanged):
    adata = ad.AnnData(obs=pd.DataFrame({"perturbation": ["ctrl", "A"]}, index=["c0", "c1"]))
    check = unchanged(adata)
    with pytest.raises(KeyError, match=r"adata.X is empty: pass layer=... with one of \[\]"):
        SAMSVAE.setup_anndata(adata, **LABELS)
    check()


def test_every_value_is_scanned():
    """The first bad value may stand after the first block of rows."""
    n = 10_000
    x = sp.random(n, 4, density=0.5, format="csr", dtype=np.float32, rng=np.random.default_rng(0))
    x.data[:] = 1
    x.data[-1] = -7
    row = int(np.searchsorted(x.indptr, len(x.data) - 1, side="right") - 1)
    adata = ad.AnnData(
        x, obs=pd.DataFrame({"perturbation": ["ctrl", "A"] * (n // 2)}, index=[f"c{i}" for i in range(n)])
    )
    with pytest.raises(ValueError, match=rf"-7\.0.*'c{row}'"):
        SAMSVAE.setup_anndata(adata, **LABELS)
    dense = ad.AnnData(x.toarray(), obs=adata.obs)
    with pytest.raises(ValueError, match=rf"-7\.0.*'c{row}'"):
        SAMSVAE.setup_anndata(dense, **LABELS)


def test_backed_data_are_scanned(adata, tmp_path):
    entry(41, 2, -3)(adata)
    adata.write_h5ad(tmp_path / "bad.h5ad")
    backed = ad.read_h5ad(tmp_path / "bad.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"-3\.0.*'cell41'"):
        SAMSVAE.setup_anndata(backed, **LABELS)
    assert list(backed.obs) == list(adata.obs)


def test_an_error_leaves_the_earlier_registration(adata, unchanged):
    SAMSVAE.setup_anndata(adata, batch_key="batch", **LABELS)
    check = unchanged(adata)
    with pytest.raises(KeyError):
        SAMSVAE.setup_anndata(adata, batch_key="bach", **LABELS)
    with pytest.raises(ValueError, match="NT"):
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="NT")
    check()
    assert SAMSVAE(adata, n_latent=2).summary_stats["n_batch"] == 2


def test_mudata_errors(adata):
    rna = adata.copy()
    data = MuData({"rna": rna})
    with pytest.raises(ValueError, match=r"modalities=\{'layer'.*'rna'"):
        SAMSVAE.setup_mudata(data, **LABELS)
    with pytest.raises(ValueError, match="'rn'"):
        SAMSVAE.setup_mudata(data, modalities={"layer": "rn"}, **LABELS)
    with pytest.raises(KeyError, match="perturbation_key"):
        SAMSVAE.setup_mudata(
            data, perturbation_key="pert", control="ctrl", modalities={"layer": "rna", "perturbation_key": "rna"}
        )
    with pytest.raises(KeyError, match=r"mdata\['rna'\].*batch_key|batch_key='bach'.*mdata\['rna'\]"):
        SAMSVAE.setup_mudata(
            data,
            batch_key="bach",
            modalities={"layer": "rna", "perturbation_key": "rna", "batch_key": "rna"},
            **LABELS,
        )
    entry(3, 3, -1)(rna)
    with pytest.raises(ValueError, match="'cell3'"):
        SAMSVAE.setup_mudata(data, modalities={"layer": "rna", "perturbation_key": "rna"}, **LABELS)
    assert not [k for k in rna.obs if k.startswith("_scvi")]
    assert list(rna.obsm) == ["design"]


# ---------------------------------------------------------------- what only warns


def test_fractions_name_the_likely_layer(adata):
    adata.X = adata.X * 0.5
    with pytest.warns(UserWarning, match=r"adata\.X.*fractions, first 0\.5.*layer='counts'"):
        SAMSVAE.setup_anndata(adata, **LABELS)


def test_fractions_in_a_layer_name_x(adata):
    adata.layers["norm"] = adata.X * 0.5
    del adata.layers["counts"]
    with pytest.warns(UserWarning, match=r"layers\['norm'\].*adata\.X: leave layer out"):
        SAMSVAE.setup_anndata(adata, layer="norm", **LABELS)


def test_fractions_without_counts_anywhere(adata):
    adata.X = adata.X * 0.5
    del adata.layers["counts"]
    with pytest.warns(UserWarning, match="Pass raw counts"):
        SAMSVAE.setup_anndata(adata, **LABELS)


def test_real_values_are_accepted_when_asked_for(adata, recwarn):
    adata.X = adata.X - 0.5 * (adata.X > 0)
    entry(0, 0, -4.0)(adata)
    SAMSVAE.setup_anndata(adata, is_count_data=False, **LABELS)
    assert not [w for w in recwarn if "counts" in str(w.message)]
    with pytest.raises(ValueError, match=r"'nb'.*is_count_data=False.*'normal'"):
        SAMSVAE(adata)


def test_rare_components_make_one_warning(adata):
    label = adata.obs["perturbation"].to_numpy().astype(object)
    label[16:24] = [f"rare{i}" for i in range(8)]
    adata.obs["perturbation"] = label
    with pytest.warns(UserWarning, match="fewer than 5 cells") as caught:
        SAMSVAE.setup_anndata(adata, **LABELS)
    mine = [str(w.message) for w in caught if "fewer than 5" in str(w.message)]
    assert len(mine) == 1
    assert mine[0].startswith("8 of 10 perturbations")
    assert "'rare0' (1)" in mine[0]
    assert "..." in mine[0]


def test_large_doses_and_csc_warn(adata):
    adata.obs["dose"] = 1000.0
    with pytest.warns(UserWarning, match="up to 1000"):
        SAMSVAE.setup_anndata(adata, dosage_key="dose", **LABELS)
    adata.X = adata.X.tocsc()
    with pytest.warns(UserWarning, match=r"CSC.*tocsr"):
        SAMSVAE.setup_anndata(adata, **LABELS)


def test_good_data_warn_nothing(adata, recwarn):
    SAMSVAE.setup_anndata(adata, batch_key="batch", labels_key="cell_type", **LABELS)
    assert [str(w.message) for w in recwarn if "pertvae" in str(w.filename)] == []
