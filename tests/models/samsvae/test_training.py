"""Training of SAMS-VAE: what moves, what is monitored, what is kept."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats
from torch.distributions import Normal, kl_divergence

import pertvae as pv
from pertvae.models.base._plan import MONITOR


def split_column(adata: AnnData, *, test: str | None = None) -> AnnData:
    """Every fifth cell validates; cells with a component are test cells."""
    adata = adata.copy()
    split = np.where(np.arange(adata.n_obs) % 5 == 0, "valid", "train")
    if test is not None:
        split[adata.obs["perturbation"].str.contains(test).to_numpy()] = "test"
    adata.obs["split"] = split
    return adata


# ------------------------------------------------------------------------- masks


@pytest.fixture(scope="module")
def wide_screen() -> AnnData:
    """Many perturbations of few cells, where the gradient of a mask entry is small."""
    return pv.datasets.simulate_screen(
        n_genes=60,
        n_perturbations=100,
        n_doubles=0,
        cells_per_perturbation=20,
        n_controls=100,
        n_latent=5,
        n_oracle=10,
    )


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.detach().square().mean().sqrt())


@pytest.mark.parametrize("embedding", ["mean_field", "correlated"])
def test_masks_move_and_would_not_with_the_usual_eps(
    wide_screen: AnnData, embedding: str, model_of: Callable, quiet: dict
) -> None:
    moved, gradient = {}, {}
    for eps in (None, 0.01):
        model = model_of(
            wide_screen, sparsify="published", embedding_inference=embedding, n_latent=10, n_hidden=32, mask_prior=0.01
        )
        logits = model.module.effects.mask_logits
        sizes: list[float] = []
        logits.register_hook(lambda g, sizes=sizes: sizes.append(root_mean_square(g)))
        plan_kwargs = {"mask_lr": 1e-2} | ({} if eps is None else {"eps": eps})
        model.train(max_epochs=100, max_steps=200, early_stopping=False, plan_kwargs=plan_kwargs, **quiet)
        moved[eps], gradient[eps] = root_mean_square(logits), float(np.mean(sizes))
    assert gradient[None] < 0.01  # the trap: gradients below scvi-tools' eps
    assert moved[None] > 0.25
    assert moved[0.01] < 0.12
    assert moved[None] > 2.5 * moved[0.01]


def test_components_without_training_cells_go_to_the_prior(
    small_screen: AnnData, model_of: Callable, quiet: dict
) -> None:
    adata = split_column(small_screen, test="P003")
    prior_logit = float(np.log(0.05 / 0.95))
    found = {}
    for global_kl in ("full", "plate"):
        model = model_of(
            adata, sparsify="published", global_kl=global_kl, embedding_inference="mean_field", mask_prior=0.05,
            effect_prior_scale=2.0,
        )  # fmt: skip
        model.train(
            max_epochs=450, max_steps=450, split_key="split", batch_size=256, early_stopping=False,
            plan_kwargs={"lr": 0.04, "global_lr": 0.04}, **quiet,
        )  # fmt: skip
        unseen = model.perturbation_names.index("P003")
        assert model.module.cells_per_component[unseen] == 0
        effects = model.module.effects
        found[global_kl] = tuple(t[unseen].detach() for t in (effects.mask_logits, effects.loc, effects.log_sd))
    logits, loc, log_sd = found["full"]
    assert (logits - prior_logit).abs().max() < 0.7
    assert loc.abs().max() < 0.2
    assert (log_sd.exp() - 2.0).abs().max() < 0.2
    # the published term leaves them where they started: as likely in as out
    for value in found["plate"]:
        assert value.abs().max() < 1e-3


def test_get_masks(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(small_screen)
    with pytest.raises(RuntimeError, match="train"):
        model.get_masks()
    model.train(max_epochs=2, **quiet)
    with torch.no_grad():
        model.module.effects.mask_logits.copy_(torch.arange(8 * 5).reshape(8, 5) / 10 - 2)
    masks = model.get_masks()
    assert isinstance(masks, pd.DataFrame)
    assert list(masks.index) == model.perturbation_names == [f"P{i:03d}" for i in range(1, 9)]
    assert list(masks.columns) == [f"program_{k}" for k in range(5)]
    np.testing.assert_allclose(masks, 1 / (1 + np.exp(2 - np.arange(40).reshape(8, 5) / 10)), rtol=1e-5)
    pd.testing.assert_frame_equal(masks, model.get_perturbation_programs(key_added=None).inclusion)


# -------------------------------------------------------------------- statistics


def test_statistics_come_from_the_training_cells_alone(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    adata = split_column(small_screen, test="P003")
    train = (adata.obs["split"] == "train").to_numpy()
    spoiled = adata.copy()
    spoiled.X[np.flatnonzero(~train)[:150]] *= 50
    buffers = []
    for data in (adata, spoiled):
        model = model_of(data)
        model.train(max_epochs=1, split_key="split", **quiet)
        buffers.append({k: v.clone() for k, v in model.module.named_buffers()})
    x = np.log1p(adata.X.toarray()[train].astype(float))
    np.testing.assert_allclose(buffers[0]["input_mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(buffers[0]["input_sd"], np.maximum(x.std(0, ddof=1), 1.0), rtol=1e-4)
    labels = adata.obs["perturbation"].str.split("+")[train]
    expected = [sum(name in label for label in labels) for name in model.perturbation_names]
    assert buffers[0]["cells_per_component"].tolist() == expected
    for name, value in buffers[0].items():
        if not name.startswith("leak"):  # made from the trained weights, which differ
            assert torch.equal(value, buffers[1][name]), name


# -------------------------------------------------------------- monitor and best


def test_monitor_is_the_objective_by_hand(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    """mean(reconstruction + local KL) + global KL / training cells, over ragged validation batches."""
    adata = split_column(small_screen)
    model = model_of(adata, n_particles=2, sparsify="published", setup={"batch_key": "batch"})
    n_train = int((adata.obs["split"] == "train").sum())
    inner = model.module.loss
    by_hand: list[np.ndarray] = []

    @functools.wraps(inner)
    def recorded(tensors: dict, inference_outputs: dict, generative_outputs: dict, **kwargs: Any) -> Any:
        if not model.module.training:
            px = generative_outputs["px"]
            mean, theta = px.mean.double().numpy(), model.module.decoder.scale.detach().double().numpy()
            log_p = stats.nbinom.logpmf(tensors["X"].numpy(), theta, theta / (theta + mean)).sum(-1).mean(0)
            q = Normal(inference_outputs["basal_mean"], inference_outputs["basal_sd"])
            local = kl_divergence(q, Normal(torch.tensor(0.0), 1.0)).sum(-1).mean(0).numpy()
            shared = float(inference_outputs["globals"].kl.mean(0).sum()) / n_train
            by_hand.append(-log_p + local + shared)
        return inner(tensors, inference_outputs, generative_outputs, **kwargs)

    model.module.loss = recorded
    plan_kwargs = {"n_epochs_kl_warmup": 50}  # the monitor counts the whole KL even while training does not
    model.train(max_epochs=1, split_key="split", batch_size=32, plan_kwargs=plan_kwargs, **quiet)
    n_valid = adata.n_obs - n_train
    assert [len(b) for b in by_hand] == [32] * (n_valid // 32) + [n_valid % 32]
    assert n_valid % 32 > 0
    monitored = float(model.history[MONITOR].iloc[-1].item())
    assert monitored == pytest.approx(np.concatenate(by_hand).mean(), rel=1e-5)


class Spoil(pl.Callback):
    """Ruin the decoder after some epochs, and remember the weights after each."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.module.decoder.out.bias.add_(5 * torch.randn_like(pl_module.module.decoder.out.bias))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen.append(copy.deepcopy(pl_module.module.state_dict()))


def test_best_weights_are_kept(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(split_column(small_screen), sparsify="published")
    spoil = Spoil(epoch=6)
    model.train(max_epochs=9, split_key="split", check_val_every_n_epoch=1, callbacks=[spoil], **quiet)
    monitored = model.history[MONITOR].iloc[:, 0].to_numpy(dtype=float)
    best = int(np.argmin(monitored))
    assert len(monitored) == len(spoil.seen) == 9
    assert best < 6
    assert monitored[-1] > monitored[best] + 1
    kept = model.module.state_dict()
    for name, value in spoil.seen[best].items():
        if not name.startswith("leak"):  # computed after the fit
            assert torch.equal(kept[name], value), name
    assert not torch.equal(kept["decoder.out.bias"], spoil.seen[-1]["decoder.out.bias"])


def test_last_weights_are_kept_without_early_stopping(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(split_column(small_screen))
    spoil = Spoil(epoch=3)
    model.train(
        max_epochs=4, split_key="split", early_stopping=False, check_val_every_n_epoch=1, callbacks=[spoil], **quiet
    )
    assert torch.equal(model.module.state_dict()["decoder.out.bias"], spoil.seen[-1]["decoder.out.bias"])


def test_early_stopping_stops(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(split_column(small_screen), sparsify="published")
    model.train(
        max_epochs=60, split_key="split", check_val_every_n_epoch=1, early_stopping_patience=4,
        callbacks=[Spoil(epoch=3)], plan_kwargs={"lr": 1e-6}, **quiet,
    )  # fmt: skip
    assert len(model.history[MONITOR]) < 12


# ---------------------------------------------------------------- many processes

SCRIPT = """
import sys, os, json, warnings, logging
warnings.simplefilter("ignore")
import numpy as np, torch, scvi
import pertvae as pv

if __name__ == "__main__":
    scvi.settings.seed = 0
    adata = pv.datasets.simulate_screen(n_genes=60, n_perturbations=6, n_doubles=2, cells_per_perturbation=30,
                                        cells_per_double=20, n_controls=60, n_latent=4, n_oracle=10)
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 5 == 0, "valid", "train")
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = pv.SAMSVAE(adata, n_latent=5, n_hidden=16)
    model.train(max_epochs=4, split_key="split", batch_size=32, accelerator="cpu", devices=2,
                strategy="ddp_find_unused_parameters_true", check_val_every_n_epoch=1, enable_progress_bar=False)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    weights = float(sum(p.double().abs().sum() for p in model.module.parameters()))
    counts = model.module.cells_per_component.tolist()
    monitored = float(model.trainer.callback_metrics["objective_validation"])
    best = [c for c in model.trainer.callbacks if type(c).__name__ == "KeepBest"][0].best
    with open(os.path.join(sys.argv[1], f"rank{rank}.json"), "w") as f:
        json.dump({"world": torch.distributed.get_world_size(), "weights": weights, "counts": counts,
                   "monitored": monitored, "best": best, "metrics": sorted(model.history)}, f)
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert [r["world"] for r in ranks] == [2, 2]
    # both processes end with the weights of the same epoch, chosen by the same monitor
    for name in ("weights", "monitored", "best", "counts"):
        assert ranks[0][name] == ranks[1][name], name
    assert {"objective_train", "objective_validation", "mask_density_train"} <= set(ranks[0]["metrics"])
