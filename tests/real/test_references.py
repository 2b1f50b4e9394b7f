"""References on the 2,140-cell, 250-gene subset of Norman 2019 and the 5,378-cell subset of Datlinger 2021."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae import pp, reference
from pertvae._expression import mean_profile
from pertvae._labels import canonical_labels

# SCVIArithmetic trains scVI for minutes a fold, and has no exact shift
CLASSES = [getattr(reference, n) for n in reference.__all__ if n not in ("Reference", "SCVIArithmetic")]
KEYS = {"perturbation_key": "perturbation", "control": "control"}
pytestmark = pytest.mark.real


@pytest.fixture
def load(data_dir):
    """Read a real subset; ``data_dir`` skips when the folder is absent."""

    def read(name):
        if not (data_dir / name).exists():
            pytest.skip(f"{name} is not in {data_dir}")
        return ad.read_h5ad(data_dir / name)

    return read


def held_out_errors(adata, n_folds):
    """Return the l2 between predicted and observed mean profiles: held-out doubles with both singles x references."""
    genes = np.asarray((adata.X > 0).mean(axis=0)).ravel() > 0.02
    labels = canonical_labels(adata.obs["perturbation"], "control")
    rows = {}
    for split, summary in pp.perturbation_folds(adata, "unseen_combination", n_folds=n_folds, seen="2/2", **KEYS):
        fold = adata.copy()
        fold.obs["split"] = split
        for cls in CLASSES:
            fitted = cls().fit(fold, "perturbation", "control", "split")
            for label in summary.loc[summary["target"], "condition"]:
                observed = mean_profile(adata.X, np.flatnonzero((labels == label).to_numpy()))
                predicted = fitted.control_profile_ + fitted.predict_shift(label).to_numpy()[0]
                rows.setdefault(label, {})[cls.__name__] = np.linalg.norm((predicted - observed)[genes])
    return pd.DataFrame(rows).T


def test_ridge_is_the_bar_on_norman_doubles(load):
    errors = held_out_errors(load("norman2019_subset.h5ad"), n_folds=2)
    print(errors.round(3).to_string(), errors.mean().round(3).to_string(), sep="\n")
    assert len(errors) == 2
    mean = errors.mean()
    assert mean["RidgeAdditive"] <= mean["Additive"]
    assert mean["RidgeAdditive"] <= mean["NoChange"]
    assert mean["RidgeAdditive"] <= mean["CalibratedAdditive"]


def test_additive_overshoots_on_datlinger_and_ridge_does_not(load):
    adata = load("datlinger2021_scifi_subset.h5ad")
    errors = held_out_errors(adata, n_folds=4)
    print(errors.mean().round(3).to_string())
    assert len(errors) == 16
    mean = errors.mean()
    assert mean["RidgeAdditive"] < mean["CalibratedAdditive"] < mean["Additive"] < mean["NoChange"]
    fitted = reference.CalibratedAdditive().fit(adata, "perturbation", "control")
    assert fitted.params_["chosen_by"] == "combinations"
    assert fitted.params_["scale"] < 0.8


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("papalexi2021_eccite_subset.h5ad", "STAT1"),
        ("norman2019_subset.h5ad", "CEBPE+RUNX1T1"),
        ("zhao2021_gbm_panobinostat.h5ad", "panobinostat"),
    ],
)
def test_generated_cells_carry_the_shift(load, name, label):
    adata = load(name)
    fitted = reference.RidgeAdditive(penalty=1e-3).fit(adata, "perturbation", "control")
    pred = fitted.predict_perturbation(label, n_cells=2000)
    block = pred.X[((pred.obs["perturbation"] == label) & pred.obs["generated"]).to_numpy()]
    shift = fitted.predict_shift(label).to_numpy()[0]
    got = mean_profile(block) - fitted.control_profile_
    slope = (got @ shift) / (shift @ shift)
    print(f"{name} {label}: {slope:.3f} of the shift, correlation {np.corrcoef(got, shift)[0, 1]:.4f}")
    assert slope == pytest.approx(1, abs=0.12)
    assert np.corrcoef(got, shift)[0, 1] > 0.97
