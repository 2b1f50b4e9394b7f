"""Predictions of outside tools beside models."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pertvae as pv
from pertvae.cli import main

ARGUMENTS = ("unseen_combination", "perturbation", "control")


@pytest.fixture(scope="module")
def outside(screen):
    """What another tool might write: the additive reference's cells, without our keys, genes in another order."""
    train = screen[~screen.obs["perturbation"].str.contains("+", regex=False)]
    doubles = sorted(c for c in screen.obs["perturbation"].unique() if "+" in c)
    made = pv.reference.Additive().fit(train, "perturbation", "control").predict_perturbation(doubles, n_cells=70)
    made = made[made.obs["generated"]]
    labels = ["+".join(reversed(label.split("+"))) for label in made.obs["perturbation"].astype(str)]
    obs = pd.DataFrame({"perturbation": labels}, index=made.obs_names)
    return AnnData(X=made.X, obs=obs, var=pd.DataFrame(index=made.var_names))[:, ::-1].copy()


def run(screen, external, **kwargs):
    options = {"n_cells": 40, "progress": False, "references": ["NoChange", "Additive"], "n_folds": 1}
    return pv.benchmark.run(screen, [], *ARGUMENTS, external=external, **{**options, **kwargs})


def test_it_is_scored_by_its_cells(screen, outside):
    result = run(screen, {"tool": outside})
    rows = result.table[result.table["model"] == "tool"]
    assert set(rows["kind"]) == {"model"}
    assert (rows["status"] == "ok").all()
    held = result.splits["unseen_combination_fold0"] == "test"
    label = sorted(rows["condition"].unique())[0]
    mine = outside[outside.obs["perturbation"] == "+".join(reversed(label.split("+"))), screen.var_names]
    real = screen[held.to_numpy() & (screen.obs["perturbation"] == label).to_numpy()]
    log = [np.log1p(a.X.toarray() / a.X.sum(axis=1) * 1e4) for a in (mine, real)]
    expected = np.linalg.norm(np.asarray(log[0].mean(axis=0) - log[1].mean(axis=0)))
    found = rows[(rows["metric"] == "l2_profile") & (rows["condition"] == label)]["value"].item()
    assert found == pytest.approx(expected, rel=1e-5)  # every gene of this screen is scored
    assert "tool" in set(result.compare("l2_profile")["model"])
    assert result.settings["external"] == {"tool": f"AnnData of {outside.n_obs} cells"}


def test_its_own_controls_are_what_its_shifts_are_against(screen, outside):
    shifted = outside.copy()
    controls = outside[:50].copy()
    controls.obs["perturbation"] = "control"
    controls.obs_names = [f"made{i}" for i in range(50)]
    shifted = ad.concat([shifted, controls])
    shifted.var_names = outside.var_names
    values = [
        run(screen, {"tool": a}, metrics=["l2_delta"]).summary().set_index("model").loc["tool", "value"]
        for a in (outside, shifted)
    ]
    assert values[1] > 1.2 * values[0]


def test_files_and_folds(screen, outside, tmp_path):
    for fold in range(2):
        outside.write_h5ad(tmp_path / f"tool_{fold}.h5ad")
    result = run(screen, {"tool": str(tmp_path / "tool_{fold}.h5ad")}, n_folds=2, cache_dir=tmp_path / "cache")
    assert set(result.table.loc[result.table["model"] == "tool", "fold"]) == {0, 1}
    (tmp_path / "tool_1.h5ad").unlink()
    with pytest.raises(ValueError, match=r"no file .*tool_1\.h5ad"):
        run(screen, {"tool": str(tmp_path / "tool_{fold}.h5ad")}, n_folds=2)


def test_another_file_is_scored_again(screen, outside, tmp_path):
    arguments = {"cache_dir": tmp_path / "cache", "metrics": ["l2_profile"]}
    outside.write_h5ad(tmp_path / "tool.h5ad")
    first = run(screen, {"tool": tmp_path / "tool.h5ad"}, **arguments)
    other = outside.copy()
    other.X = sp.csr_matrix(np.random.default_rng(0).permutation(other.X.toarray(), axis=1))
    other.write_h5ad(tmp_path / "tool.h5ad")
    second = run(screen, {"tool": tmp_path / "tool.h5ad"}, **arguments)
    values = [r.summary().set_index("model").loc["tool", "value"] for r in (first, second)]
    assert values[0] < values[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[a.obs["perturbation"] != a.obs["perturbation"].iloc[0]].copy(), "has no cells of"),
        (lambda a: a[:, 3:].copy(), "lacks 3 genes"),
        (lambda a: AnnData(X=a.X.toarray() - 1, obs=a.obs, var=a.var), "negative or non-finite"),
        (lambda a: AnnData(X=a.X, obs=a.obs.rename(columns={"perturbation": "perturbatio"}), var=a.var), "perturbatio"),
    ],
)
def test_what_is_wrong_is_a_row_that_says_so(screen, outside, spoil, message):
    result = run(screen, {"tool": spoil(outside)}, metrics=["l2_profile"])
    failed = result.fits[result.fits["status"] == "failed"]
    assert list(failed["model"]) == ["tool"]
    assert message in failed["error"].item()


def test_log_values_are_scored_by_their_means(screen, outside):
    """A tool that predicts log1p CP10k says so as scanpy does; without a word its values are no counts."""
    logged = AnnData(np.log1p(outside.X.toarray() / outside.X.sum(axis=1) * 1e4), outside.obs, outside.var)
    logged.X = np.asarray(logged.X)
    result = run(screen, {"tool": logged}, metrics=["l2_profile", "energy_distance"])
    assert "not whole numbers" in result.fits.loc[result.fits["status"] == "failed", "error"].item()
    logged.uns["log1p"] = {}
    marked = run(screen, {"tool": logged, "cells": outside}, metrics=["l2_profile", "l2_delta", "energy_distance"])
    means = marked.summary().pivot(index="model", columns="metric", values="value")
    for metric in ("l2_profile", "l2_delta"):  # the same means, from counts or from their logarithms
        assert means.loc["tool", metric] == pytest.approx(means.loc["cells", metric], rel=1e-5)
    assert np.isnan(means.loc["tool", "energy_distance"])
    assert np.isfinite(means.loc["cells", "energy_distance"])


def test_one_prediction_for_several_folds_is_warned_of(screen, outside):
    with pytest.warns(UserWarning, match="one prediction for 2 folds"):
        run(screen, {"tool": outside}, n_folds=2, metrics=["l2_profile"])


def test_names_are_free(screen, outside):
    with pytest.raises(ValueError, match="'Additive' is the name of another row"):
        run(screen, {"Additive": outside})


def test_command_line(screen, outside, tmp_path, capsys):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    outside.write_h5ad(tmp_path / "tool.h5ad")
    arguments = [
        "benchmark",
        str(tmp_path / "screen.h5ad"),
        "--perturbation-key",
        "perturbation",
        "--control",
        "control",
    ]
    arguments += ["--models", "--references", "NoChange", "Additive", "--folds", "1", "--n-cells", "50"]
    arguments += ["--out", str(tmp_path / "out"), "--external"]
    assert main([*arguments, f"tool={tmp_path / 'tool.h5ad'}"]) == 0
    assert "tool" in capsys.readouterr().out
    splits = pd.read_csv(tmp_path / "out" / "splits.csv", index_col=0)
    assert list(splits.index) == list(screen.obs_names)
    held = splits["unseen_combination_fold0"] == "test"
    assert held[screen.obs["perturbation"].str.contains("+", regex=False).to_numpy()].all()
    assert main([*arguments, "tool.h5ad"]) == 2
    assert "is not NAME=FILE" in capsys.readouterr().err
