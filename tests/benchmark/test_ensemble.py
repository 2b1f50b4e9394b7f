"""The fits of all seeds of a model, scored as one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import pertvae as pv

ARGUMENTS = ("unseen_combination", "perturbation", "control")
SMALL = {"n_latent": 4, "n_hidden": 16}
FAST = {"max_epochs": 30, "batch_size": 64, "accelerator": "cpu"}


class Counted(pv.CPAVAE):
    """Counts its trainings; fails on demand."""

    n_trained = 0
    fails = False

    def train(self, *args, **kwargs):
        type(self).n_trained += 1
        if self.fails and type(self).n_trained == 2:
            raise RuntimeError("no memory")
        super().train(*args, **kwargs)


@pytest.fixture(autouse=True)
def _fresh():
    Counted.n_trained, Counted.fails = 0, False


@pytest.fixture(scope="module")
def run(screen):
    def run(**kwargs):
        arguments = {"seeds": (0, 1, 2), "n_folds": 1, "n_cells": 90, "progress": False, "ensemble": True}
        arguments |= {"references": ["Additive"], "model_kwargs": SMALL, "train_kwargs": FAST}
        return pv.benchmark.run(screen, {"net": Counted}, *ARGUMENTS, **{**arguments, **kwargs})

    return run


@pytest.fixture(scope="module")
def result(run):
    Counted.n_trained = 0
    made = run(n_folds=2, metrics=["l2_profile", "l2_delta", "energy_distance"])
    assert Counted.n_trained == 6  # nothing is trained for the ensemble
    return made


def test_row(result):
    table = result.table
    rows = table[table["model"] == "net ensemble"]
    assert set(rows["kind"]) == {"model"}
    assert set(rows["seed"]) == {-1}
    assert (rows["status"] == "ok").all()
    single = table[(table["model"] == "net") & (table["seed"] == 0)]
    keys = ["fold", "metric", "unit"]
    assert sorted(rows[keys].itertuples(index=False)) == sorted(single[keys].itertuples(index=False))
    assert rows.loc[rows["metric"] != "ate_r2", "value"].notna().all()
    summary = result.summary().set_index(["model", "metric"])
    assert summary.loc[("net ensemble", "l2_delta"), "n_seeds"] == 1
    assert summary.loc[("net ensemble", "l2_delta"), "n_conditions"] == 6
    assert set(result.compare("l2_delta")["model"]) == {"net", "net ensemble"}
    assert result.settings["ensemble"] is True


def test_shift_is_the_mean_of_the_fits(result):
    """Up to the noise of sampling: each fit gives a third of the cells."""
    of = {seed: result.predictions["unseen_combination", 0, "net", seed].shift for seed in range(3)}
    mixed = result.predictions["unseen_combination", 0, "net ensemble", -1].shift
    mean = sum(of.values()) / 3
    assert list(mixed.index) == list(mean.index)
    far = [np.linalg.norm(of[a] - of[b], axis=1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert np.linalg.norm(mixed - mean, axis=1).mean() < 0.5 * min(far)


def test_distance_is_at_most_the_mean_of_the_fits(result):
    truth = result.truths["unseen_combination", 0]
    distance = {
        key: np.linalg.norm(result.predictions["unseen_combination", 0, *key].shift - truth, axis=1).mean()
        for key in [("net", 0), ("net", 1), ("net", 2), ("net ensemble", -1)]
    }
    mixed = distance.pop(("net ensemble", -1))
    assert mixed < np.mean(list(distance.values()))


def test_seconds_are_those_of_all_fits(result):
    fits = result.fits[result.fits["fold"] == 0].set_index(["model", "seed"])["fit_seconds"]
    assert fits["net ensemble", -1] == pytest.approx(fits["net"].sum())


def test_report(result, tmp_path):
    page = result.save(tmp_path / "r").read_text()
    assert "In an &#x27;ensemble&#x27; the fits of all seeds" in page
    assert "3 seeds" in page
    assert "net ensemble" in result.text()
    assert (tmp_path / "r" / "figures" / "shifts_unseen_combination_net ensemble.png").is_file()


def test_cache(run, tmp_path):
    arguments = {"cache_dir": tmp_path, "metrics": ["l2_delta"], "train_kwargs": {**FAST, "max_epochs": 2}}
    alone = run(**arguments, ensemble=False)
    assert Counted.n_trained == 3
    assert set(alone.table["model"]) == {"Additive", "duplicate", "interpolated duplicate", "oracle", "net"}
    first = run(**arguments)  # the single fits are kept, their scores and themselves
    assert Counted.n_trained == 3
    cached = first.fits.set_index(["model", "seed"])["cached"]
    assert cached["net"].all()
    assert not cached["net ensemble", -1]
    second = run(**arguments)
    assert Counted.n_trained == 3
    assert second.fits["cached"].all()
    pd.testing.assert_frame_equal(first.table, second.table)
    fresh = run(**{**arguments, "cache_dir": None})
    pd.testing.assert_frame_equal(first.table, fresh.table)  # models read from disk predict the same
    run(**arguments, seeds=(0, 1))  # another ensemble of the same fits
    assert Counted.n_trained == 3 + 3


def test_a_fit_that_failed_fails_the_ensemble(run):
    Counted.fails = True
    result = run(metrics=["l2_delta"], train_kwargs={**FAST, "max_epochs": 1})
    failed = result.fits[result.fits["status"] == "failed"].set_index(["model", "seed"])["error"]
    assert failed["net", 1] == "RuntimeError: no memory"
    assert failed["net ensemble", -1] == "RuntimeError: seed 1 failed: RuntimeError: no memory"
    assert len(failed) == 2
    assert Counted.n_trained == 3


def test_contexts(screen):
    adata = screen.copy()
    adata.obs["line"] = np.resize(["x", "y"], adata.n_obs)
    result = pv.benchmark.run(
        adata, {"net": Counted}, "random", "perturbation", "control", labels_key="line", seeds=(0, 1), ensemble=True,
        split_kwargs={"test_fraction": 0.5}, n_cells=20, progress=False, references=["NoChange"],
        metrics=["l2_delta"], model_kwargs=SMALL, train_kwargs={**FAST, "max_epochs": 1},
    )  # fmt: skip
    rows = result.table[result.table["model"] == "net ensemble"]
    assert set(rows["context"]) == {"x", "y"}
    assert (rows["status"] == "ok").all()


def test_errors_come_before_anything_is_trained(run, screen, stand_in):
    with pytest.raises(ValueError, match=r"seeds=\(0,\): pass two or more"):
        run(seeds=[0])
    with pytest.raises(ValueError, match="n_cells=2 is too few for an ensemble of 3 seeds"):
        run(n_cells=2)
    arguments = {"seeds": (0, 1), "ensemble": True, "progress": False}
    with pytest.raises(ValueError, match="models of this package, but 'net' is .*StandIn"):
        pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments)
    with pytest.raises(ValueError, match="'net ensemble' is what the ensemble of 'net' is called"):
        pv.benchmark.run(screen, {"net": Counted, "net ensemble": Counted}, *ARGUMENTS, **arguments)
    assert Counted.n_trained == 0


def test_references_alone_have_none(screen, options):
    result = pv.benchmark.run(screen, [], *ARGUMENTS, n_folds=1, ensemble=True, **options)
    assert set(result.table["kind"]) == {"reference", "duplicate", "oracle"}
