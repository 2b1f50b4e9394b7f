"""Trained models on disk: nothing is trained twice, and what is read predicts the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import pertvae as pv

ARGUMENTS = ("unseen_combination", "perturbation", "control")


class Counted(pv.CPAVAE):
    """Counts its trainings."""

    n_trained = 0

    def train(self, *args, **kwargs):
        type(self).n_trained += 1
        super().train(*args, **kwargs)


@pytest.fixture
def run(screen, tmp_path):
    Counted.n_trained = 0

    def run(adata=screen, **kwargs):
        arguments = {"seeds": (0,), "n_folds": 1, "n_cells": 60, "progress": False, "cache_dir": tmp_path}
        arguments |= {"references": ["Additive"], "metrics": ["l2_profile"], "model_kwargs": {"n_latent": 4}}
        arguments |= {"train_kwargs": {"max_epochs": 2, "accelerator": "cpu"}}
        return pv.benchmark.run(adata, {"net": Counted}, *ARGUMENTS, **{**arguments, **kwargs})

    return run


def of_net(result):
    rows = result.table[(result.table["model"] == "net") & (result.table["metric"] == "l2_profile")]
    return rows.set_index("unit")["value"]


def test_other_scores_train_nothing(run):
    first = run()
    other = run(metrics=["l2_profile", "slope"], n_cells=61)
    assert Counted.n_trained == 1
    assert not other.fits.set_index("model").loc["net", "cached"]  # scored again
    assert set(other.metrics) == {"l2_profile", "slope"}
    seconds = [r.fits.set_index("model").loc["net", "fit_seconds"] for r in (first, other)]
    assert seconds[0] == seconds[1]


def test_a_model_that_is_read_predicts_the_same(run, tmp_path):
    first = run()
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    second = run()
    assert Counted.n_trained == 1
    pd.testing.assert_frame_equal(first.table, second.table)
    key = ("unseen_combination", 0, "net", 0)
    first, second = first.predictions[key], second.predictions[key]
    pd.testing.assert_frame_equal(first.shift, second.shift)
    assert first.history.keys() == second.history.keys()


@pytest.mark.parametrize("change", ["seed", "train_kwargs", "model_kwargs", "counts", "split", "covariate"])
def test_what_a_model_depends_on_trains_again(run, screen, change):
    run()
    other = {
        "seed": {"seeds": (1,)},
        "train_kwargs": {"train_kwargs": {"max_epochs": 3, "accelerator": "cpu"}},
        "model_kwargs": {"model_kwargs": {"n_latent": 3}},
        "split": {"split_kwargs": {"seed": 5}},
    }
    adata = screen.copy()
    if change == "counts":
        adata.X.data[0] += 1
    if change == "covariate":  # the same column name with other values
        options = {"setup_kwargs": {"categorical_covariate_keys": ["lane"]}}
        for values in (["a", "b"], ["b", "a"]):
            adata.obs["lane"] = (values * adata.n_obs)[: adata.n_obs]
            run(adata, **options)
        assert Counted.n_trained == 3
        return
    run(adata, **other.get(change, {}))
    assert Counted.n_trained == 2


def test_a_damaged_model_is_trained_again(run, tmp_path):
    first = run()
    (folder,) = (tmp_path / "models").iterdir()
    assert json.loads((folder / "fit.json").read_text())["seconds"] > 0
    (folder / "model.pt").write_bytes(b"no model")
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    second = run()
    assert Counted.n_trained == 2
    pd.testing.assert_frame_equal(first.table, second.table)
    (folder / "fit.json").unlink()  # killed while it was written
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    run()
    assert Counted.n_trained == 3


def test_scvi_is_trained_once_a_split(run, monkeypatch, tmp_path):
    from pertvae.reference import _scvi

    trained = []
    honest = _scvi.train_vae

    def counted(*args, **kwargs):
        trained.append(1)
        return honest(*args, **{**kwargs, "max_epochs": 2})

    monkeypatch.setattr(_scvi, "train_vae", counted)
    options = {"references": ["SCVIArithmetic", "Additive"]}
    first = run(**options)
    second = run(**options, metrics=["l2_profile", "slope"])
    assert len(trained) == 1
    values = [
        r.table[(r.table["model"] == "SCVIArithmetic") & (r.table["metric"] == "l2_profile")]["value"].to_numpy()
        for r in (first, second)
    ]
    np.testing.assert_array_equal(*values)
    (file,) = (tmp_path / "models").glob("*.pickle")  # references that fit in no time are fitted again
    file.write_bytes(file.read_bytes()[:100])
    run(**options, metrics=["slope"])
    run(**options, split_kwargs={"seed": 3})
    assert len(trained) == 3


@pytest.mark.slow
def test_kill_minus_nine_and_run_again(tmp_path):
    """A run that is killed and run again gives the table of one that was not, and repeats nothing."""
    sizes = {"genes": 80, "perturbations": 6, "doubles": 4, "cells-per-perturbation": 40, "controls": 100, "latent": 4}
    command = [sys.executable, "-m", "pertvae.cli", "benchmark", "--simulate"]
    command += [
        "--models",
        "conditionalvae",
        "cpavae",
        "--seeds",
        "0",
        "1",
        "2",
        "--max-epochs",
        "3",
        "--n-cells",
        "200",
    ]
    command += ["--references", "NoChange", "Mean", "Additive"]
    command += [f"--n-{k}={v}" if not k.startswith("cells") else f"--{k}={v}" for k, v in sizes.items()]

    def finished(out):
        return sorted(p.name for p in (out / "cache").glob("*.npz"))

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    limit = time.monotonic() + 300
    while sum("seed" in name for name in finished(killed)) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {name: (killed / "cache" / name).stat().st_mtime_ns for name in finished(killed)}
    assert not (killed / "report.html").exists()
    for out in (killed, whole):
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tables = [pd.read_csv(out / "table.csv") for out in (killed, whole)]
    pd.testing.assert_frame_equal(*tables)
    fits = pd.read_csv(killed / "fits.csv")
    assert fits["cached"].sum() == len(kept) < len(fits)
    assert {name: (killed / "cache" / name).stat().st_mtime_ns for name in kept} == kept  # none was written again
    assert len(finished(killed)) == len(finished(whole)) == len(fits)
    shutil.rmtree(killed)
