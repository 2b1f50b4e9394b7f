"""The phases of SAMS-VAE's training: dense effects, rotation, costly masks, masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData
from scipy.optimize import minimize

import pertvae as pv
from pertvae.models.base import PerturbationTrainingPlan
from pertvae.models.base._plan import MONITOR, KeepBest
from pertvae.models.samsvae._arguments import CHOICES
from pertvae.models.samsvae._sparsify import COST, LIMIT, MaskCost, Sparsifier, loss_of_shift
from pertvae.nn._rotation import SMOOTHING

INFERENCE = pytest.mark.parametrize("inference", ["mean_field", "correlated"])


@pytest.fixture
def adata(small_screen: AnnData) -> AnnData:
    """Every fifth cell validates."""
    adata = small_screen.copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 5 == 0, "valid", "train")
    return adata


class Watch(pl.Callback):
    """What each step and each fit looked like."""

    def __init__(self) -> None:
        self.steps: list[SimpleNamespace] = []
        self.fits: list[SimpleNamespace] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        kinds = {type(c) for c in trainer.callbacks}  # type: ignore[attr-defined]
        self.fits.append(
            SimpleNamespace(
                epochs=trainer.max_epochs,
                keeps_best=KeepBest in kinds,
                may_stop=any("EarlyStopping" in k.__name__ for k in kinds),
                learns=pl_module.module.training,
                logits=pl_module.module.effects.mask_logits.detach().clone(),
            )
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        effects = pl_module.module.effects
        self.steps.append(
            SimpleNamespace(fit=len(self.fits) - 1, open=effects.open, prior=effects.prior_logit.clone().double())
        )

    def of(self, fit: int) -> list[SimpleNamespace]:
        return [s for s in self.steps if s.fit == fit]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The rotations that a training makes."""
    made: list[SimpleNamespace] = []
    inner = pv.models.samsvae.SAMSVAEModule.rotate

    def rotate(self: Any, rotation: torch.Tensor) -> None:
        before = self.effects.expected().detach().clone()
        was_open = self.effects.open
        inner(self, rotation)
        after = self.effects.expected().detach().clone()
        made.append(SimpleNamespace(rotation=rotation, before=before, after=after, open=was_open))

    monkeypatch.setattr(pv.models.samsvae.SAMSVAEModule, "rotate", rotate)
    return made


def usable(model: pv.SAMSVAE) -> None:
    """Masks are on, the prior is the model's own, getters answer."""
    effects = model.module.effects
    assert model.is_trained
    assert not effects.open
    assert (effects.prior_logit - effects.base_logit).abs().max() == 0
    masks = model.get_masks()
    assert np.isfinite(masks).all(axis=None)
    assert (masks < 1).all(axis=None)
    assert torch.isfinite(effects.expected()).all()
    assert np.isfinite(model.get_marginal_ll(n_mc_samples=3))


# ------------------------------------------------------------------------ phases


@INFERENCE
def test_phases_of_a_run(
    adata: AnnData, inference: str, model_of: Callable, quiet: dict, turns: list[SimpleNamespace]
) -> None:
    watch = Watch()
    model = model_of(adata, embedding_inference=inference)
    model.train(
        max_epochs=20, split_key="split", batch_size=64, plan_kwargs={"lr": 3e-3}, early_stopping=False,
        callbacks=[watch], **quiet,
    )  # fmt: skip
    steps = math.ceil((adata.obs["split"] == "train").sum() / 64)
    assert [f.epochs for f in watch.fits] == [8, 3, 3, 6]
    assert all(f.learns for f in watch.fits)
    assert len(watch.steps) == 20 * steps
    assert [[s.open for s in watch.of(i)] == [i == 0] * len(watch.of(i)) for i in range(4)] == [True] * 4

    # one rotation, of the dense effects, to simple structure
    (turn,) = turns
    assert turn.open
    torch.testing.assert_close(turn.rotation @ turn.rotation.T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn.after, turn.before @ turn.rotation, atol=1e-5, rtol=1e-4)
    size = {k: float((getattr(turn, k).square() + SMOOTHING**2).sqrt().sum()) for k in ("before", "after")}
    assert size["after"] < size["before"]

    # a cost of open masks for every cell of the perturbation: constant, then falling to zero, then none
    effects, cells = model.module.effects, model.module.cells_per_component.double()[:, None]
    cost = [[((effects.base_logit - s.prior) / cells) for s in watch.of(i)] for i in range(4)]
    largest = turn.after.abs().flatten().sort(descending=True).values.double()
    share = largest.square().cumsum(0) / largest.square().sum()
    threshold = largest[int((share < 0.85).sum())]
    for c in cost[1]:
        torch.testing.assert_close(c, (COST * threshold**2).expand(8, 1), rtol=1e-3, atol=1e-4)
    falling = torch.stack([c.mean() for c in cost[2]])
    expected = COST * threshold**2 * (1 - torch.arange(len(falling)).double() / len(falling))
    torch.testing.assert_close(falling, expected, rtol=1e-3, atol=1e-3)
    assert all(c.abs().max() < 1e-6 for c in cost[3])
    # masks start away from undecided
    assert (watch.fits[0].logits == 0).all()
    assert (watch.fits[1].logits.abs() > 0).all()
    usable(model)


def test_published_training_has_one_phase(
    adata: AnnData, model_of: Callable, quiet: dict, turns: list[SimpleNamespace]
) -> None:
    watch = Watch()
    model = model_of(adata, sparsify="published")
    model.train(max_epochs=4, split_key="split", callbacks=[watch], **quiet)
    assert [f.epochs for f in watch.fits] == [4]
    assert not any(s.open for s in watch.steps)
    assert not turns
    assert (model.module.effects.prior_logit == model.module.effects.base_logit).all()


def test_early_stopping_of_each_phase(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    """Phases that cost masks may not stop: their loss has a term of its own."""
    watch = Watch()
    model = model_of(adata)
    model.train(max_epochs=20, split_key="split", callbacks=[watch], **quiet)
    assert [f.may_stop for f in watch.fits] == [f.keeps_best for f in watch.fits] == [True, False, False, True]
    # a phase that stops ends that phase only
    watch = Watch()
    model = model_of(adata)
    model.train(
        max_epochs=40, split_key="split", callbacks=[watch], check_val_every_n_epoch=1, early_stopping_patience=1,
        early_stopping_min_delta=1e9, **quiet,
    )  # fmt: skip
    assert len(watch.fits) == 4
    ran = [len(watch.of(i)) for i in range(4)]
    assert ran[0] == ran[3] == 2
    usable(model)


def test_best_weights_of_the_dense_phase_are_turned(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    """What goes wrong after the best epoch of the dense phase does not reach the next."""

    class Spoil(pl.Callback):
        def __init__(self) -> None:
            self.starts: list[torch.Tensor] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                self.starts.append(pl_module.module.decoder.out.bias.detach().clone())
            if len(self.starts) == 1 and trainer.current_epoch == 5:
                with torch.no_grad():
                    pl_module.module.decoder.out.bias.add_(50 * torch.randn_like(pl_module.module.decoder.out.bias))

    spoil, watch = Spoil(), Watch()
    model = model_of(adata)
    model.train(max_epochs=40, split_key="split", check_val_every_n_epoch=1, callbacks=[spoil, watch], **quiet)
    # 16, 6 and 6 epochs were planned; the best was at most the fifth, and the next two take as many for each of its
    best = int(model.history[MONITOR].iloc[:16].to_numpy(dtype=float).argmin()) + 1
    assert best <= 5
    assert [f.epochs for f in watch.fits][:3] == [16, *[max(1, round(0.15 / 0.4 * best))] * 2]
    assert (spoil.starts[1] - spoil.starts[0]).abs().max() < 1


# ----------------------------------------------------------------------- history


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("max_epochs", [1, 2, 3, 7, 30])
def test_history_of_all_phases(
    adata: AnnData, max_epochs: int, early_stopping: bool, model_of: Callable, quiet: dict
) -> None:
    watch = Watch()
    model, one_phase = model_of(adata), model_of(adata, sparsify="published")
    settings = {"max_epochs": max_epochs, "split_key": "split", "early_stopping": early_stopping, **quiet}
    model.train(callbacks=[watch], **settings)
    one_phase.train(**settings)
    assert set(model.history) >= set(one_phase.history)
    steps = math.ceil((adata.obs["split"] == "train").sum() / 512)
    assert len(model.history["objective_train"]) == len(watch.steps) / steps
    assert not early_stopping or len(model.history[MONITOR]) > 0
    for name in ("objective_train", "mask_density_train", *([MONITOR] if early_stopping else [])):
        assert np.isfinite(model.history[name].to_numpy(dtype=float)).all(), name
    dense = sum(s.open for s in watch.steps) // steps
    density = model.history["mask_density_train"].to_numpy(dtype=float).ravel()
    assert (density[:dense] == 1).all()
    assert (density[dense:] < 1).all()
    usable(model)


# --------------------------------------------------- short, broken, repeated runs


@INFERENCE
@pytest.mark.parametrize("max_epochs", [1, 2, 3])
def test_short_runs_end_with_masks(
    small_screen: AnnData, inference: str, max_epochs: int, model_of: Callable, quiet: dict
) -> None:
    model = model_of(small_screen, embedding_inference=inference)
    model.train(max_epochs=max_epochs, early_stopping=False, **quiet)
    usable(model)


def test_one_epoch_learns_masks(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(small_screen, embedding_inference="mean_field")
    model.train(max_epochs=1, early_stopping=False, batch_size=64, **quiet)
    # nothing was learned without masks: they start undecided, as published, and move
    logits = model.module.effects.mask_logits
    assert logits.abs().min() > 0
    closed = logits.isclose(torch.tensor(model.module.effects.base_logit))  # by validation cells
    assert closed.sum() <= 4
    assert logits[~closed].abs().max() < 2


class Break(pl.Callback):
    """Raise in the n-th fit."""

    def __init__(self, fit: int, error: type[BaseException] = RuntimeError) -> None:
        self.left, self.error = fit, error

    def on_fit_start(self, *args: Any) -> None:
        self.left -= 1

    def on_train_epoch_end(self, *args: Any) -> None:
        if self.left == 0:
            raise self.error("stop")


@pytest.mark.parametrize("fit", [1, 2, 4])
def test_broken_run_leaves_the_model_as_trained_as_before(
    adata: AnnData, fit: int, model_of: Callable, quiet: dict
) -> None:
    settings = {"max_epochs": 10, "split_key": "split", "early_stopping": False, **quiet}
    model = model_of(adata)
    with pytest.raises(RuntimeError, match="stop"):
        model.train(callbacks=[Break(fit)], **settings)
    assert not model.is_trained
    with pytest.raises(RuntimeError, match="train"):
        model.get_masks()
    model.train(**settings)
    assert len(model.history["objective_train"]) == 10
    usable(model)


def test_interrupted_from_the_keyboard(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    model, watch = model_of(adata), Watch()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        model.train(
            max_epochs=10, split_key="split", callbacks=[watch, Break(1, KeyboardInterrupt)], **quiet
        )  # fmt: skip
    assert len(watch.fits) == 1
    assert not model.is_trained


@INFERENCE
def test_training_further(
    adata: AnnData, inference: str, model_of: Callable, quiet: dict, turns: list[SimpleNamespace]
) -> None:
    model = model_of(adata, embedding_inference=inference)
    settings = {"max_epochs": 20, "split_key": "split", "plan_kwargs": {"lr": 3e-3}, "batch_size": 64, **quiet}
    model.train(early_stopping=False, **settings)
    first = float(model.history["objective_train"].iloc[-1].item())
    assert len(turns) == 1
    model.train(early_stopping=False, **settings)
    assert len(turns) == 1  # it goes on with the masks it has
    objective = model.history["objective_train"].to_numpy(dtype=float).ravel()
    assert len(objective) == 40
    assert objective[-1] < first
    usable(model)


def test_same_seed_same_masks(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    masks = []
    for seed in (3, 3, 4):
        scvi.settings.seed = seed
        model = model_of(adata)
        model.train(max_epochs=10, split_key="split", batch_size=64, **quiet)
        masks.append(model.get_masks())
    np.testing.assert_array_equal(masks[0], masks[1])
    assert not np.allclose(masks[0], masks[2])


def test_saved_and_loaded(adata: AnnData, model_of: Callable, quiet: dict, tmp_path: Path) -> None:
    model = model_of(adata)
    model.train(max_epochs=6, split_key="split", **quiet)
    model.save(str(tmp_path / "model"))
    loaded = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata)
    assert loaded.sparsify == "rotate"
    np.testing.assert_array_equal(loaded.get_masks(), model.get_masks())
    loaded.train(max_epochs=4, split_key="split", **quiet)
    usable(loaded)


def test_saved_with_masks_open(adata: AnnData, model_of: Callable, quiet: dict, tmp_path: Path) -> None:
    """A dense model, from masks opened by hand, is dense when loaded."""
    model = model_of(adata, sparsify="published")
    model.module.effects.open = True
    model.train(max_epochs=2, split_key="split", **quiet)
    model.save(str(tmp_path / "model"))
    loaded = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata)
    assert loaded.module.effects.open
    assert (loaded.get_masks() == 1).all(axis=None)


# ----------------------------------------------------------------- what it learns


def test_components_without_training_cells_go_to_the_prior(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    adata.obs.loc[adata.obs["perturbation"].str.contains("P003"), "split"] = "test"
    model = model_of(adata, embedding_inference="mean_field", mask_prior=0.05, effect_prior_scale=2.0)
    model.train(
        max_epochs=400, split_key="split", early_stopping=False, batch_size=256, plan_kwargs={"global_lr": 0.05},
        **quiet,
    )  # fmt: skip
    unseen = model.perturbation_names.index("P003")
    effects = model.module.effects
    assert (effects.mask_logits[unseen] - math.log(0.05 / 0.95)).abs().max() < 0.7
    assert effects.loc[unseen].abs().max() < 0.2
    assert (effects.log_sd[unseen].exp() - 2.0).abs().max() < 0.25
    seen = [i for i in range(8) if i != unseen]
    assert (effects.inclusion[seen].max(1).values > 0.9).float().mean() > 0.5


# ----------------------------------------------------------------- cost, arguments


def test_mask_cost_is_linear_in_steps() -> None:
    costs: list[float] = []
    callback = MaskCost(SimpleNamespace(set_mask_cost=costs.append), 3.0, 1.0, 2)  # type: ignore[arg-type]
    for epoch in range(2):
        for index in range(4):
            trainer: Any = SimpleNamespace(current_epoch=epoch, num_training_batches=4)
            callback.on_train_batch_start(trainer, None, None, index)  # type: ignore[arg-type]
    np.testing.assert_allclose(costs, 3.0 - 2.0 * np.arange(8) / 8)


@pytest.mark.parametrize(("size", "share"), [(2.0, 0.01), (6.0, 0.38), (3.0, 0.5), (8.0, 0.9)])
def test_loss_of_a_shift_is_what_the_best_rescaling_leaves(size: float, share: float) -> None:
    # z ~ N(0, 1) in all cells, plus the shift in a share of them: what does -log N(a (z - b); 0, 1) - log a lose?
    def loss(parameters: np.ndarray) -> float:
        a, b = parameters
        return 0.5 * a**2 * (1 + share * (size - b) ** 2 + (1 - share) * b**2) - math.log(abs(a)) - 0.5

    best = minimize(loss, [1.0, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}).fun / share
    np.testing.assert_allclose(float(loss_of_shift(size, torch.tensor(share))), best, rtol=1e-5)


def test_loss_of_a_shift_in_few_cells() -> None:
    few = loss_of_shift(3.0, torch.tensor([1e-4, 0.0]))
    np.testing.assert_allclose(few, [4.5, 4.5], rtol=1e-3)  # 3^2 / 2
    assert torch.isfinite(loss_of_shift(3.0, torch.ones(1))).all()


def test_mask_cost_is_limited_where_a_perturbation_has_many_of_the_cells() -> None:
    costs: list[torch.Tensor] = []
    cells = torch.tensor([400.0, 5.0])
    module = SimpleNamespace(set_mask_cost=costs.append, cells_per_component=cells)
    callback = MaskCost(module, 7.2, 0.0, 2, size=6.0)  # type: ignore[arg-type]
    for epoch in range(2):
        trainer: Any = SimpleNamespace(current_epoch=epoch, num_training_batches=1)
        callback.on_train_batch_start(trainer, SimpleNamespace(n_obs_training=1000), None, 0)  # type: ignore[arg-type]
    limit = LIMIT * math.log(1 + 0.24 * 36) / 0.8
    assert limit < 3.6  # half of the cost: the limit holds in the second epoch, too
    np.testing.assert_allclose(costs[0], [limit, 7.2], rtol=1e-6)
    np.testing.assert_allclose(costs[1], [limit, 3.6], rtol=1e-6)


def test_costly_phases_know_the_size_of_the_smallest_shift() -> None:
    sparsifier = Sparsifier(SimpleNamespace())  # type: ignore[arg-type]
    sparsifier.size, sparsifier.cost = 6.0, 7.2
    limited = {p.name: [c.size for c in p.callbacks(2)] for p in sparsifier.phases() if p.callbacks is not None}
    assert limited == {"dense": [], "costly masks": [6.0], "cheaper masks": [6.0], "masks": []}


def test_steps_of_all_phases_are_bounded_together(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    watch = Watch()
    model_of(adata).train(
        max_epochs=50, max_steps=20, split_key="split", batch_size=64, early_stopping=False, callbacks=[watch], **quiet
    )
    assert 20 <= len(watch.steps) < 20 + math.ceil((adata.obs["split"] == "train").sum() / 64)
    assert len(watch.fits) > 1


def test_steps_of_a_default_run(adata: AnnData, model_of: Callable) -> None:
    steps = {w: [model_of(adata, sparsify=w)._default_steps(v) for v in (True, False)] for w in CHOICES["sparsify"]}
    assert steps == {"rotate": [10_000, 10_000], "published": [4_000, 4_000], "auto": [14_000, 10_000]}


def test_unknown_way(adata: AnnData, model_of: Callable) -> None:
    with pytest.raises(ValueError, match=r"sparsify='rotat' is not one of \['rotate', 'published', 'auto'\]"):
        model_of(adata, sparsify="rotat")


def test_a_warm_up_belongs_to_the_first_phase(
    adata: AnnData, model_of: Callable, quiet: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, Any]] = []
    inner = PerturbationTrainingPlan.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        made.append((self.n_epochs_kl_warmup, self.lr))

    monkeypatch.setattr(PerturbationTrainingPlan, "__init__", init)
    arguments = {"n_epochs_kl_warmup": 8, "lr": 2e-3}
    model_of(adata).train(max_epochs=20, split_key="split", early_stopping=False, plan_kwargs=arguments, **quiet)
    assert made == [(8, 2e-3), (None, 2e-3), (None, 2e-3), (None, 2e-3)]
    assert arguments == {"n_epochs_kl_warmup": 8, "lr": 2e-3}
