"""The command line, in process: what it writes, what it says, its exit codes."""

from __future__ import annotations

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pertvae as pv
from pertvae import cli

SIZES = [
    "--n-genes", "40", "--n-perturbations", "6", "--n-doubles", "5", "--cells-per-perturbation", "20",
    "--cells-per-double", "15", "--n-controls", "60", "--n-latent", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    assert cli.main(["simulate", "--out", str(path), "--seed", "3", *SIZES]) == 0
    return path


@pytest.fixture
def few_resamplings(monkeypatch):
    monkeypatch.setattr("pertvae.benchmark._score.N_RESAMPLES", 20)
    monkeypatch.setattr("pertvae.benchmark._cells_figure._umap", lambda x: x[:, :2])


@pytest.fixture(scope="module")
def trained(screen):
    folder = screen.parent / "model"
    arguments = ["--perturbation-key", "perturbation", "--control", "control", "--batch-key", "batch"]
    code = cli.main(["train", str(screen), *arguments, "--max-epochs", "2", "--out", str(folder)])
    assert code == 0
    return folder


def fails(capsys, *arguments):
    """Run, expect exit code 2 and one line on stderr, and return it."""
    assert cli.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pertvae: error: ")
    return lines[0]


def test_simulate_writes_the_screen_of_the_library(screen):
    written = ad.read_h5ad(screen)
    made = pv.datasets.simulate_screen(
        n_genes=40,
        n_perturbations=6,
        n_doubles=5,
        cells_per_perturbation=20,
        cells_per_double=15,
        n_controls=60,
        n_latent=4,
        seed=3,
    )
    assert (written.X != made.X).nnz == 0
    assert list(written.obs["perturbation"]) == list(made.obs["perturbation"])


def test_train_writes_model_programs_and_figures(trained, screen):
    adata = ad.read_h5ad(screen)
    effects = pd.read_csv(trained / "programs_effects.csv", index_col=0)
    loadings = pd.read_csv(trained / "programs_loadings.csv", index_col=0)
    assert list(effects.index) == [f"P{i:03d}" for i in range(1, 7)]
    assert list(loadings.columns) == list(adata.var_names)
    assert list(effects.columns) == list(loadings.index)
    assert (trained / "model.pt").is_file()
    for name in ("programs.png", "training.png"):
        assert (trained / name).stat().st_size > 1000


def test_predict_equals_the_library(trained, screen, tmp_path):
    out = tmp_path / "new" / "pred.h5ad"
    labels = ["P001+P006", "P002"]
    arguments = ["--n-cells", "30", "--seed", "5", "--out", str(out)]
    assert cli.main(["predict", str(trained), str(screen), "--perturbations", *labels, *arguments]) == 0
    written = ad.read_h5ad(out)
    model = pv.SAMSVAE.load(str(trained), adata=ad.read_h5ad(screen))
    made = model.predict_perturbation(labels, n_cells=30, seed=5, key_added=None)
    assert list(written.obs["perturbation"]) == list(made.obs["perturbation"])
    np.testing.assert_array_equal(written.X.toarray(), made.X.toarray())


def test_benchmark_on_a_file_writes_everything_and_resumes(screen, tmp_path, capsys, few_resamplings):
    out = tmp_path / "results"
    command = [
        "benchmark", str(screen), "--perturbation-key", "perturbation", "--control", "control", "--models", "samsvae",
        "--seeds", "0", "--references", "Mean", "Additive", "--folds", "1", "--n-cells", "40", "--max-epochs", "2",
        "--out", str(out),
    ]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "unseen_combination, fold 0: 5 held-out conditions, 40 genes scored."
    assert "best reference" in said.out.splitlines()[1]
    assert "Additive" in said.out
    for name in ("report.html", "table.csv", "summary.csv", "settings.json", "fits.csv", "splits.csv", "units.csv"):
        assert (out / name).is_file()
    assert list((out / "figures").glob("*.png"))
    first = pd.read_csv(out / "table.csv")
    assert set(first["kind"]) == {"model", "reference", "duplicate", "oracle"}
    assert first["condition"].nunique() == 6  # five doubles, and all together
    assert not pd.read_csv(out / "fits.csv")["cached"].any()
    assert cli.main(command) == 0
    assert pd.read_csv(out / "fits.csv")["cached"].all()
    pd.testing.assert_frame_equal(pd.read_csv(out / "table.csv"), first)


def test_benchmark_simulates(tmp_path, monkeypatch):
    seen = {}

    class Result:
        fits = pd.DataFrame({"status": []})

        def save(self, out):
            return out / "report.html"

        def text(self):
            return "verdict"

    def run(adata, models, scheme, perturbation_key, control, **kwargs):
        seen.update(kwargs, adata=adata, models=models, scheme=scheme, control=control)
        return Result()

    monkeypatch.setattr(pv.benchmark, "run", run)
    assert cli.main(["benchmark", "--simulate", "--out", str(tmp_path / "r"), "--n-genes", "50"]) == 0
    assert seen["adata"].n_vars == 50  # the rest of the demo's sizes
    assert seen["adata"].obs["perturbation"].nunique() == 1 + 24 + 16
    assert seen["models"] == {"samsvae": pv.SAMSVAE}
    assert (seen["scheme"], seen["control"], seen["batch_key"]) == ("unseen_combination", "control", "batch")
    assert (seen["n_folds"], seen["seeds"], seen["n_cells"]) == (1, (0, 1, 2), 2000)
    assert seen["train_fraction"] == [1.0]
    assert seen["ensemble"] is False
    curve = ["benchmark", "--simulate", "--out", str(tmp_path / "r"), "--n-genes", "50", "--train-fraction", "0", "1"]
    assert cli.main(curve) == 0
    assert seen["train_fraction"] == [0.0, 1.0]
    assert cli.main([*curve, "--ensemble"]) == 0
    assert seen["ensemble"] is True
    assert seen["n_folds"] is None  # some combinations must stay to train on


def test_failed_model_gives_exit_code_1(screen, tmp_path, capsys, monkeypatch, few_resamplings):
    def broken(self, *args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(pv.SAMSVAE, "train", broken)
    code = cli.main(
        ["benchmark", str(screen), "--perturbation-key", "perturbation", "--control", "control", "--folds", "1",
         "--seeds", "0", "--references", "Mean", "--n-cells", "40", "--out", str(tmp_path / "r")]
    )  # fmt: skip
    assert code == 1
    assert "samsvae (fold 0, seed 0) failed: RuntimeError: no memory" in capsys.readouterr().err
    assert (tmp_path / "r" / "report.html").is_file()


def test_benchmark_of_an_ensemble(screen, tmp_path, capsys, few_resamplings):
    out = tmp_path / "results"
    command = [
        "benchmark", str(screen), "--perturbation-key", "perturbation", "--control", "control", "--models", "cpavae",
        "--seeds", "0", "1", "--references", "Mean", "--ensemble", "--folds", "1", "--n-cells", "40",
        "--max-epochs", "2", "--out", str(out),
    ]  # fmt: skip
    assert cli.main(command) == 0
    assert "cpavae ensemble" in capsys.readouterr().out
    table = pd.read_csv(out / "table.csv")
    rows = table[table["model"] == "cpavae ensemble"]
    assert set(rows["seed"]) == {-1}
    assert rows["value"].notna().any()
    assert "pass two or more" in fails(capsys, *command[:9], "0", *command[11:])


def test_errors_are_one_line(screen, trained, tmp_path, capsys):
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--out", tmp_path / "x"]
    missing = screen.with_name("scren.h5ad")
    assert "Did you mean 'screen.h5ad'" in fails(capsys, "train", missing, *keys)
    assert "Did you mean 'samsvae'" in fails(capsys, "train", screen, "--model", "samsva", *keys)
    wrong = ["--perturbation-key", "pertubation", *keys[2:]]
    assert "'pertubation'" in fails(capsys, "train", screen, *wrong)
    assert "'perturbation'" in fails(capsys, "benchmark", screen, *wrong)
    assert "'ctrl'" in fails(capsys, "benchmark", screen, *keys[:3], "ctrl", *keys[4:])
    assert "--max-epochs 0" in fails(capsys, "train", screen, *keys, "--max-epochs", 0)
    assert "one of the two" in fails(capsys, "benchmark", *keys)
    assert "one of the two" in fails(capsys, "benchmark", screen, "--simulate", *keys)
    assert "--control is needed" in fails(
        capsys, "benchmark", screen, "--perturbation-key", "perturbation", "--out", tmp_path
    )
    assert "is a file" in fails(capsys, "benchmark", screen, *keys[:4], "--out", screen)
    assert "'sparse'" in fails(capsys, "simulate", "--kind", "sparse", "--out", tmp_path / "s.h5ad")
    assert "is a folder" in fails(capsys, "simulate", "--out", tmp_path)
    text = tmp_path / "text.h5ad"
    text.write_text("not hdf5")
    assert "is not an .h5ad file" in fails(capsys, "train", text, *keys)
    asked = ["--perturbations", "P0O1", "--out", tmp_path / "p.h5ad"]
    assert "'P001'" in fails(capsys, "predict", trained, screen, *asked)
    assert "'pertvae train --out'" in fails(capsys, "predict", tmp_path / "absent", screen, *asked)
    assert "no model that can be read" in fails(capsys, "predict", tmp_path, screen, *asked)
    assert not (tmp_path / "x").exists()


def test_threads_come_from_the_environment(monkeypatch, tmp_path, capsys):
    import torch

    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        cli._set_threads()
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("PERTVAE_NUM_THREADS", "1")
        cli._set_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("PERTVAE_NUM_THREADS", "many")
        assert "'many'" in fails(capsys, "simulate", "--out", tmp_path / "s.h5ad")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("command", ["simulate", "train", "predict", "benchmark"])
def test_help_names_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--out" in text
    assert "default" in text
    (parser,) = [
        p
        for a in cli._parser()._actions
        if hasattr(a, "choices") and a.choices
        for n, p in a.choices.items()
        if n == command
    ]
    assert [a.dest for a in parser._actions if not a.help] == []


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "pertvae.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"pertvae {pv.__version__}"
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
