"""Both ways of finding masks are trained, and validation cells choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.models.samsvae._auto import STANDARD_ERRORS, Chooser, cell_objectives, copy_state


@pytest.fixture
def trained(adata: AnnData, model_of: Callable, quiet: dict) -> pv.SAMSVAE:
    model = model_of(adata, sparsify="published")
    model.train(max_epochs=30, batch_size=128, split_key="split", **quiet)
    return model


class Fits(pl.Callback):
    """What each phase began with."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.open: list[bool] = []
        self.weights: list[torch.Tensor] = []
        self.warm: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epochs.append(int(trainer.max_epochs or 0))
        self.open.append(pl_module.module.effects.open)
        self.weights.append(pl_module.module.encoder.first.weight.detach().clone())
        self.warm.append(pl_module.n_epochs_kl_warmup)


def test_published_phase_then_the_rotation_from_the_same_start(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    fits = Fits()
    model = model_of(adata, sparsify="auto")
    model.train(
        max_epochs=28,
        batch_size=128,
        split_key="split",
        callbacks=[fits],
        plan_kwargs={"n_epochs_kl_warmup": 3},
        **quiet,
    )
    assert fits.epochs[:2] == [8, 8]
    assert sum(fits.epochs) <= 28
    assert fits.open == [False, True, False, False, False]
    torch.testing.assert_close(fits.weights[0], fits.weights[1], rtol=0, atol=0)
    assert not torch.equal(fits.weights[1], fits.weights[2])
    assert fits.warm == [3, 3, None, None, None]
    assert model.sparsify_ in ("rotate", "published")
    assert not model.module.effects.open
    assert len(model.history["train_loss"]) == sum(fits.epochs)


def test_only_the_rotation_without_early_stopping(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    fits = Fits()
    model = model_of(adata, sparsify="auto")
    model.train(max_epochs=20, split_key="split", early_stopping=False, callbacks=[fits], **quiet)
    assert fits.epochs == [8, 3, 3, 6]
    assert model.sparsify_ == "rotate"


@pytest.mark.parametrize(("better", "kept"), [("published", "published"), ("rotated", "rotate"), ("neither", "rotate")])
def test_the_better_one_is_kept_and_the_rotation_where_none_is(trained: pv.SAMSVAE, better: str, kept: str) -> None:
    good = copy_state(trained.module)
    worse = {k: 3 * v if k == "decoder.out.weight" else v for k, v in good.items()}
    chooser = Chooser(trained)
    # equal but for a weight that nothing reads: the one that is kept can be told
    marked = good | {"leak": torch.full_like(good["leak"], 7.0)}
    chooser.published = marked if better != "rotated" else worse
    trained.module.load_state_dict(worse if better == "published" else good)
    assert chooser.choose() == kept
    found = trained.module.state_dict()
    expected = marked if kept == "published" else good
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("kept", ["published", "rotate"])
def test_masks_of_both_are_checked(trained: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    from pertvae.models.samsvae import _auto

    good = copy_state(trained.module)
    with torch.no_grad():
        trained.module.effects.mask_logits[2, 1] = trained.module.effects.mask_logits[5, 0] = 5.0
        trained.module.effects.loc[2, 1], trained.module.effects.loc[5, 0] = 6.0, -6.0
    chooser = Chooser(trained)
    chooser.published = copy_state(trained.module)
    found = iter([np.zeros(9) + (kept == "published"), np.zeros(9)])
    monkeypatch.setattr(_auto, "cell_objectives", lambda model: next(found))
    assert chooser.choose() == kept
    closed = trained.module.effects.mask_logits < 0
    assert closed[2, 1]
    assert closed[5, 0]
    assert (closed | (good["effects.mask_logits"] > 0)).all()


def test_a_difference_within_the_noise_keeps_the_rotation(trained: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    from pertvae.models.samsvae import _auto

    cells = np.random.default_rng(0).normal(size=100)
    cells = (cells - cells.mean()) / cells.std(ddof=1)
    for excess, kept in ((0.9, "rotate"), (1.1, "published")):
        chooser = Chooser(trained)
        chooser.published = copy_state(trained.module)
        found = iter([cells + excess * STANDARD_ERRORS / 10, np.zeros(100)])
        monkeypatch.setattr(_auto, "cell_objectives", lambda model, found=found: next(found))
        assert chooser.choose() == kept


def test_objective_of_cells_is_that_of_training(trained: pv.SAMSVAE) -> None:
    each = cell_objectives(trained)
    assert len(each) == len(trained.validation_indices)
    rows = np.sort(trained.validation_indices)
    local = np.mean([-np.asarray(trained.get_elbo(indices=rows, return_mean=False)) for _ in range(12)], axis=0)
    kl = trained.module.draw_globals(500).kl.sum(-1).mean().item() / len(trained.train_indices)
    # both are means over draws: a cell differs by its own, their mean by little
    assert np.corrcoef(each, local)[0, 1] > 0.99
    assert abs(each.mean() - (local.mean() + kl)) < 0.15
    assert kl > 0.05
    np.testing.assert_array_equal(each, cell_objectives(trained))


def test_a_broken_training_leaves_no_trace_in_the_next(adata: AnnData, model_of: Callable) -> None:
    model = model_of(adata, sparsify="auto")
    model.module.effects.open = True
    model.module.set_mask_cost(3.0)
    Chooser(model)
    assert not model.module.effects.open
    assert (model.module.effects.prior_logit - model.module.effects.base_logit).abs().max() == 0


def test_a_rotation_that_diverged_is_not_kept(trained: pv.SAMSVAE) -> None:
    chooser = Chooser(trained)
    chooser.published = copy_state(trained.module)
    with torch.no_grad():
        trained.module.decoder.out.weight.fill_(float("nan"))
    assert chooser.choose() == "published"
    assert np.isfinite(cell_objectives(trained)).all()


def test_what_was_kept_is_saved(adata: AnnData, model_of: Callable, quiet: dict, tmp_path: Path) -> None:
    model = model_of(adata, sparsify="auto")
    model.train(max_epochs=14, split_key="split", **quiet)
    model.sparsify_ = "published"
    model.save(str(tmp_path / "model"))
    loaded = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata)
    assert (loaded.sparsify, loaded.sparsify_) == ("auto", "published")
    before = loaded.get_masks()
    loaded.train(max_epochs=1, split_key="split", **quiet)
    assert len(loaded.history["train_loss"]) > 1
    assert ((loaded.get_masks() > 0.5) == (before > 0.5)).mean(axis=None) > 0.9
