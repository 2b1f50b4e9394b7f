import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae import pp


def screen(**columns):
    n = len(next(iter(columns.values())))
    obs = pd.DataFrame(columns, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(np.ones((n, 2), dtype=np.float32), obs=obs)


def harmonized(adata, source, **kwargs):
    before = adata.copy()
    pp.harmonize_perturbations(adata, source, **kwargs)
    new = [c for c in adata.obs.columns if c not in before.obs.columns]
    pd.testing.assert_frame_equal(adata.obs.drop(columns=new), before.obs)
    assert (adata.X == before.X).all()
    return adata.obs[kwargs.get("key_added", "perturbation")].astype(str).tolist()


def test_gears():
    adata = screen(condition=["ctrl", "B+A", "A+ctrl", "ctrl+B"], dose_val=["1", "1+1", "1+1", "1+1"])
    assert harmonized(adata, "gears") == ["control", "A+B", "A", "B"]
    assert "dosage" not in adata.obs


def test_scperturb_splits_as_nperts_says():
    labels = ["control", "A_B", "chr3.5275_top_two", "A", "B", "X_1_Y", "X_1", "Y", "A+B"]
    adata = screen(perturbation=labels, nperts=[0, 2, 1, 1, 1, 2, 1, 1, 2])
    found = harmonized(adata, "scperturb", key_added="label")
    assert found == ["control", "A+B", "chr3.5275_top_two", "A", "B", "X_1+Y", "X_1", "Y", "A+B"]
    assert list(adata.obs["perturbation"]) == labels


def test_scperturb_ambiguous_or_without_nperts():
    with pytest.raises(KeyError, match="nperts_key"):
        harmonized(screen(perturbation=["control", "A_B"]), "scperturb", key_added="label")
    assert (
        harmonized(screen(perturbation=["control", "A_B"]), "scperturb", key_added="label", source_sep="_")[1] == "A+B"
    )
    adata = screen(perturbation=["control", "X_1_Y"], nperts=[0, 2])
    with pytest.raises(ValueError, match="no cut"):
        harmonized(adata, "scperturb", key_added="label")
    adata = screen(perturbation=["control", "A_B", "A_B"], nperts=[0, 1, 2])
    with pytest.raises(ValueError, match="1 to 2"):
        harmonized(adata, "scperturb", key_added="label")


def test_cpa_carries_doses_with_their_components():
    adata = screen(condition=["ctrl", "B+A", "A", "B+ctrl"], dose_val=["1.0", "1.0+0.5", "0.1", "0.3+1.0"])
    assert harmonized(adata, "cpa") == ["control", "A+B", "A", "B"]
    assert adata.obs["dosage"].tolist() == ["0.0", "0.5+1.0", "0.1", "0.3"]


def test_numeric_doses_stay_numbers_without_combinations():
    adata = screen(target=["non-targeting", "A", "B"], conc=[0.0, 0.5, 2.0])
    assert harmonized(adata, "cell-eval", dosage_key="conc") == ["control", "A", "B"]
    assert adata.obs["dosage"].tolist() == [0.0, 0.5, 2.0]
    assert adata.obs["dosage"].dtype == float


def test_cell_eval_and_state_never_split():
    assert harmonized(screen(target=["non-targeting", "HLA+1", "A_B"]), "cell-eval", sep="|") == [
        "control",
        "HLA+1",
        "A_B",
    ]
    assert harmonized(screen(gene=["non-targeting", "A"]), "state") == ["control", "A"]
    assert harmonized(screen(target_gene=["non-targeting", "A"]), "state") == ["control", "A"]


def test_tahoe():
    labels = [
        "[('DMSO_TF', 0.0, 'uM')]",
        "[('Nilotinib', 0.5, 'uM')]",
        "[('Trametinib', 5.0, 'uM'), ('Afatinib', 0.05, 'uM')]",
    ]
    adata = screen(drugname_drugconc=labels)
    assert harmonized(adata, "tahoe") == ["control", "Nilotinib", "Afatinib+Trametinib"]
    assert adata.obs["dosage"].tolist() == ["0.0", "0.5", "0.05+5.0"]
    adata = screen(drugname_drugconc=labels[:2])
    harmonized(adata, "tahoe")
    assert adata.obs["dosage"].tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="'nM'"):
        harmonized(screen(drugname_drugconc=["[('DMSO_TF', 0.0, 'nM')]"]), "tahoe")
    with pytest.raises(ValueError, match="not a list"):
        harmonized(screen(drugname_drugconc=["DMSO"]), "tahoe")


def test_several_controls_and_another_spelling():
    adata = screen(guide=["NT1", "NT2", "B,A", "A,NT1"])
    found = harmonized(
        adata,
        "perturbench",
        perturbation_key="guide",
        source_control=["NT1", "NT2"],
        source_sep=",",
        control="NT",
        sep="|",
    )
    assert found == ["NT", "NT", "A|B", "A"]


def test_survives_h5ad_and_unused_categories(tmp_path):
    adata = screen(condition=pd.Categorical(["ctrl", "B+A"], categories=["ctrl", "B+A", "Q"]))
    pp.harmonize_perturbations(adata, "gears")
    assert list(adata.obs["perturbation"].cat.categories) == ["A+B", "control"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert ad.read_h5ad(tmp_path / "x.h5ad").obs["perturbation"].tolist() == ["control", "A+B"]


@pytest.mark.parametrize(
    ("columns", "source", "kwargs", "error", "match"),
    [
        ({"condition": ["ctrl"]}, "gear", {}, ValueError, "Did you mean 'gears'"),
        ({"conditions": ["ctrl"]}, "gears", {}, KeyError, "Did you mean 'conditions'"),
        ({"condition": ["ctrl"]}, "gears", {"perturbation_key": "conditio"}, KeyError, "Did you mean 'condition'"),
        ({"condition": ["ctrl"]}, "gears", {"dosage_key": "dose"}, KeyError, "dosage_key='dose'"),
        ({"condition": ["control", "A"]}, "gears", {}, ValueError, "Pass source_control"),
        ({"condition": ["ctrl", None]}, "gears", {}, ValueError, "1 missing"),
        ({"target": ["non-targeting", "A+B"]}, "cell-eval", {}, ValueError, "contains the separator"),
        ({"condition": ["ctrl", "control+B"]}, "gears", {}, ValueError, "name of the control"),
        ({"condition": ["ctrl"], "perturbation": ["x"]}, "gears", {}, ValueError, "overwrite=True"),
        (
            {"condition": ["ctrl"], "dosage": [1.0], "d": [1.0]},
            "gears",
            {"dosage_key": "d"},
            ValueError,
            "dosage_key_added",
        ),
    ],
)
def test_errors_write_nothing(columns, source, kwargs, error, match):
    adata = screen(**columns)
    with pytest.raises(error, match=match):
        pp.harmonize_perturbations(adata, source, **kwargs)
    assert list(adata.obs.columns) == list(columns)


def test_overwrite():
    adata = screen(perturbation=["control", "A_B"], nperts=[0, 2])
    pp.harmonize_perturbations(adata, "scperturb", overwrite=True)
    assert adata.obs["perturbation"].tolist() == ["control", "A+B"]
