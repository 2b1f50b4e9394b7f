"""What a registration writes, and what other data get from it."""

import numpy as np
import pandas as pd
import pytest
import rich.pretty  # noqa: F401
import scipy.sparse as sp

from pertvae.models import SAMSVAE

SMALL = {"n_latent": 2, "n_hidden": 4}


def test_what_is_written(adata):
    x = adata.X
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="ctrl")
    assert adata.X is x  # neither copied nor converted
    doses = adata.obsm["_scvi_perturbation"]
    assert isinstance(doses, sp.csr_matrix)
    assert doses.dtype == np.float32
    assert isinstance(adata.obs["_scvi_condition"].dtype, pd.CategoricalDtype)
    model = SAMSVAE(adata, **SMALL)
    assert model.perturbation_names == ["GATA1", "KLF1"]
    assert model.summary_stats["n_perturbation"] == 2
    assert model.label_format.control == ("ctrl",)
    model.view_anndata_setup()  # scvi-tools prints with rich.pretty, which it does not import


def test_several_controls_and_no_separator(adata):
    adata.obs["perturbation"] = adata.obs["perturbation"].replace({"KLF1": "NT2"})
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control=["ctrl", "NT2"], sep=None)
    model = SAMSVAE(adata, **SMALL)
    assert model.perturbation_names == ["GATA1", "GATA1+KLF1"]
    assert (adata.obs["_scvi_condition"] == "ctrl").sum() == 30


def test_another_separator(adata):
    adata.obs["perturbation"] = adata.obs["perturbation"].str.replace("+", "_")
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="ctrl", sep="_")
    assert SAMSVAE(adata, **SMALL).perturbation_names == ["GATA1", "KLF1"]
    assert "GATA1_KLF1" in set(adata.obs["_scvi_condition"])


def test_control_of_a_design_matrix_can_be_named(adata):
    SAMSVAE.setup_anndata(adata, perturbation_obsm_key="design", control="DMSO")
    assert "DMSO" in set(adata.obs["_scvi_condition"])


@pytest.mark.parametrize("kind", ["int", "bool"])
def test_labels_that_are_not_text(adata, kind):
    codes = pd.factorize(adata.obs["perturbation"])[0]
    adata.obs["guide"] = codes if kind == "int" else codes > 0
    SAMSVAE.setup_anndata(adata, perturbation_key="guide", control="0" if kind == "int" else "False")
    assert SAMSVAE(adata, **SMALL).perturbation_names == (["1", "2", "3"] if kind == "int" else ["True"])


def test_query_data_keep_the_vocabulary(adata):
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="ctrl", batch_key="batch")
    model = SAMSVAE(adata, **SMALL)
    query = adata[adata.obs["perturbation"] == "KLF1"].copy()
    for key in [*query.obsm.keys(), *(k for k in query.obs if k.startswith("_scvi"))]:
        (query.obsm if key in query.obsm else query.obs).pop(key)
    query.uns = {}
    model._validate_anndata(query)
    np.testing.assert_array_equal(query.obsm["_scvi_perturbation"].toarray(), [[0, 1]] * 15)


def test_real_counts_of_any_dtype(adata):
    for dtype in (np.int32, np.int64, np.uint16, np.float64):
        data = adata.copy()
        data.X = adata.X.astype(dtype)
        SAMSVAE.setup_anndata(data, perturbation_key="perturbation", control="ctrl")
        assert data.X.dtype == dtype
