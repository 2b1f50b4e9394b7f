"""Phases: how epochs are divided over them, what callbacks keep between them, a training that breaks off."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from scvi.train import SaveCheckpoint

import pertvae as pv
from pertvae.models.base._phases import Phase, divide_epochs, number_epochs
from pertvae.models.base._plan import MONITOR
from pertvae.models.samsvae._sparsify import SHARES


def phases(*shares: float) -> list[Phase]:
    return [Phase(str(i), share) for i, share in enumerate(shares)]


@pytest.mark.parametrize("shares", [(1.0,), tuple(SHARES.values()), (1, 1, 1), (0.99, 0.01), (3, 0, 1), (1, 1, 0)])
def test_epochs_add_up(shares: tuple[float, ...]) -> None:
    for max_epochs in (*range(1, 30), 100, 999, 1000):
        epochs = divide_epochs(phases(*shares), max_epochs)
        assert sum(epochs) == max_epochs
        assert all(n >= 0 for n in epochs)
        assert epochs[-1] >= 1
        exact = [share / sum(shares) * max_epochs for share in shares]
        assert all(abs(n - e) < 1.001 for n, e in zip(epochs, exact, strict=True))


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [(1, [0, 0, 0, 1]), (2, [0, 1, 0, 1]), (3, [1, 0, 1, 1]), (10, [4, 1, 2, 3]), (100, [40, 15, 15, 30])],
)
def test_epochs_of_samsvae(max_epochs: int, expected: list[int]) -> None:
    assert divide_epochs(phases(*SHARES.values()), max_epochs) == expected


def test_shares_need_no_unit_sum() -> None:
    assert divide_epochs(phases(2, 1, 1), 8) == [4, 2, 2]


def test_sums_of_shares_are_not_rounded_down() -> None:
    assert divide_epochs(phases(*[0.1] * 10), 10) == [1] * 10


def test_epochs_after_the_best() -> None:
    free, bound = Phase("a"), Phase("b", of_best=0.5)
    assert [free.limit(9, best) for best in (None, 1, 100)] == [9, 9, 9]
    assert [bound.limit(9, best) for best in (None, 1, 2, 10, 18, 100)] == [9, 1, 1, 5, 9, 9]
    assert bound.limit(0, 10) == 0


# ---------------------------------------------------------------------- callbacks


class TwoPhases(pv.SAMSVAE):
    """Before the second phase the decoder is ruined: its objective starts far above the best of the first."""

    def _training_phases(self, early_stopping: bool) -> list[Phase]:
        return [Phase("first"), Phase("second", begin=self._ruin, may_stop=False)]

    @torch.no_grad()
    def _ruin(self) -> None:
        self.module.decoder.out.bias[::2] -= 4


@pytest.fixture(scope="module")
def screen() -> AnnData:
    adata = pv.datasets.simulate_screen(
        n_genes=25, n_perturbations=4, n_doubles=1, cells_per_perturbation=20, cells_per_double=20, n_controls=40,
        n_latent=2, n_oracle=10,
    )  # fmt: skip
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "valid", "train")
    adata.obs["other_split"] = np.where(np.arange(adata.n_obs) % 4 == 1, "valid", "train")
    return adata


def model_of(screen: AnnData, cls: type[pv.SAMSVAE] = TwoPhases) -> pv.SAMSVAE:
    adata = screen.copy()
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
    return cls(adata, n_latent=2, n_hidden=8)


def train(model: pv.SAMSVAE, max_epochs: int = 12, split_key: str = "split", **kwargs: Any) -> np.ndarray:
    """Train; return the monitored objective of all validations."""
    model.train(
        max_epochs=max_epochs,
        split_key=split_key,
        batch_size=32,
        check_val_every_n_epoch=1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        **kwargs,
    )
    return model.history[MONITOR].to_numpy(dtype=float).ravel()


class Records(pl.Callback):
    """Keeps what it saw; no state for Lightning to save."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.fits = 0

    def on_fit_start(self, *args: Any) -> None:
        self.fits += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.epochs.append(trainer.current_epoch)


class Counts(Records):
    """The same, with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


def test_early_stopping_of_yours_starts_each_phase_anew(screen: AnnData) -> None:
    stop, model = EarlyStopping(MONITOR, patience=2), model_of(screen)
    monitored = train(model, callbacks=[stop], early_stopping=False)
    assert len(monitored) == 12
    assert monitored[6:].min() > monitored[:6].min() + 5  # the best of the first phase would have stopped the second
    assert float(stop.best_score) == pytest.approx(monitored[6:].min(), rel=1e-6)
    assert stop.stopped_epoch == 0


def test_checkpoints_of_yours_are_of_the_last_phase(screen: AnnData, tmp_path: Path) -> None:
    keep, model = SaveCheckpoint(monitor=MONITOR, dirpath=str(tmp_path)), model_of(screen)
    monitored = train(model, callbacks=[keep], early_stopping=False)
    assert len(monitored) == len(model.history["train_loss"]) == 12  # saving does not start the history anew
    assert float(keep.best_model_score) == pytest.approx(monitored[6:].min(), rel=1e-6)
    saved = TwoPhases.load(keep.best_model_path, model.adata)
    best = int(monitored[6:].argmin())
    assert f"epoch={best}" in keep.best_model_path
    assert best == 5  # the last epoch: what was saved is what the model has
    for name, value in saved.module.state_dict().items():
        if not name.startswith("leak"):  # computed after the fit
            assert torch.equal(value, model.module.state_dict()[name]), name
    train(model, 3, callbacks=[SaveCheckpoint(monitor=MONITOR, dirpath=str(tmp_path / "b"))], early_stopping=False)
    assert len(model.history["train_loss"]) == 15


def test_phases_of_equal_length_are_both_saved(
    screen: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning saves no step twice, and the steps of each phase count from zero."""
    monkeypatch.setattr(scvi.settings, "logging_dir", str(tmp_path / "log"))  # scvi-tools adds a checkpoint there
    keep = ModelCheckpoint(dirpath=str(tmp_path), every_n_epochs=3, save_top_k=-1, filename="{step}")
    train(model_of(screen), 6, callbacks=[keep], enable_checkpointing=True, checkpointing_monitor=MONITOR)
    assert len(list(tmp_path.glob("step*.ckpt"))) == 2


def test_recorders_see_all_phases(screen: AnnData) -> None:
    plain, stateful = Records(), Counts()
    train(model_of(screen), callbacks=[plain, stateful], early_stopping=False)
    assert plain.epochs == [*range(6), *range(6)]
    assert stateful.epochs == [*range(6)]
    assert plain.fits == stateful.fits == 2


def test_a_state_from_before_the_training_is_kept(screen: AnnData) -> None:
    stop = EarlyStopping(MONITOR, patience=2)
    stop.best_score = torch.tensor(-1e6)  # as after an earlier run
    monitored = train(model_of(screen), callbacks=[stop], early_stopping=False)
    assert len(monitored) == 2 + 2
    assert float(stop.best_score) == -1e6


def test_a_timer_counts_over_all_phases(screen: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            now[0] += 1  # an epoch takes a second

    timer, limit = Timer(), Timer(duration={"seconds": 8}, interval="epoch")
    train(model_of(screen), callbacks=[Clock(), timer], early_stopping=False)
    assert timer.time_elapsed() == 12
    assert len(train(model_of(screen), callbacks=[Clock(), limit], early_stopping=False)) == 8
    limited = train(model_of(screen), callbacks=[Clock()], max_time={"seconds": 8}, early_stopping=False)
    assert len(limited) == 8


# -------------------------------------------------------------------- breaking off


class Break(pl.Callback):
    """Change more than weights, and raise in an epoch."""

    def __init__(self, error: BaseException, epoch: int = 2) -> None:
        self.error, self.epoch = error, epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            effects = pl_module.module.effects
            effects.broken = effects.base_logit = 3.0
            effects.register_buffer("further", torch.zeros(1))
            raise self.error


def state_of(model: pv.SAMSVAE) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in model.module.state_dict().items()},
        "history": {k: v.copy() for k, v in model.history.items()},
        "indices": [model.train_indices.copy(), model.validation_indices.copy()],
        "trainer": model.trainer,
        "library": model.library_effects_,
        "open": model.module.effects.open,
        "attributes": {**vars(model.module.effects)}.keys(),
        "base_logit": model.module.effects.base_logit,
    }


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert torch.equal(value, found["weights"][name]), name
    assert found["history"].keys() == expected["history"].keys()
    for name, value in expected["history"].items():
        assert value.equals(found["history"][name]), name
    for a, b in zip(found["indices"], expected["indices"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(found[k] is expected[k] for k in ("trainer", "library", "open", "base_logit"))
    assert found["attributes"] == expected["attributes"]


def fail_in_the_library(model: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> list[pl.Callback]:
    def fail() -> None:
        raise OSError("no")

    monkeypatch.setattr(model, "_fit_library_effects", fail)
    return []


BROKEN: dict[str, tuple[type[BaseException], Callable[..., list[pl.Callback]]]] = {
    "error": (ArithmeticError, lambda *_: [Break(ArithmeticError("nan"))]),
    "keyboard": (KeyboardInterrupt, lambda *_: [Break(KeyboardInterrupt())]),
    "process": (SystemExit, lambda *_: [Break(SystemExit(3))]),
    "after the fit": (OSError, fail_in_the_library),
}


@pytest.mark.parametrize("how", BROKEN)
def test_further_training_that_breaks_off_changes_nothing(
    screen: AnnData, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, break_off = BROKEN[how]
    model = model_of(screen, pv.SAMSVAE)
    train(model, 8)
    before, latent = state_of(model), model.get_latent_representation(key_added=None)
    assert not model.module.training
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(error):
        train(
            model, 5, "other_split", callbacks=break_off(model, patch), early_stopping=False,
            plan_kwargs={"lr": 0.1, "global_lr": 0.1},
        )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.is_trained
    assert not model.module.training
    assert_equal_states(state_of(model), before)
    np.testing.assert_array_equal(model.get_latent_representation(key_added=None), latent)
    # and it can be trained further after all
    train(model, 3, "other_split", early_stopping=False)
    assert len(model.history["train_loss"]) == len(before["history"]["train_loss"]) + 3
    assert not torch.equal(model.module.state_dict()["decoder.out.bias"], before["weights"]["decoder.out.bias"])
    assert not np.array_equal(model.train_indices, before["indices"][0])


@pytest.mark.parametrize("how", BROKEN)
def test_first_training_that_breaks_off_leaves_the_model_untrained(
    screen: AnnData, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, break_off = BROKEN[how]
    model = model_of(screen, pv.SAMSVAE)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(error):
        train(model, 8, callbacks=break_off(model, patch), early_stopping=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not model.is_trained
    train(model, 8, early_stopping=False)
    assert len(model.history["train_loss"]) == 8
    assert model.is_trained
    assert not model.module.effects.open


def test_rows_of_the_history_are_numbered_by_the_epochs_of_all_phases() -> None:
    history = {
        "train_loss": pd.DataFrame({"x": range(12)}),
        "elbo_train": pd.DataFrame({"x": range(12)}),
        "objective_validation": pd.DataFrame({"x": range(4)}, index=[1, 3, 2, 3]),
        "kl_weight": pd.DataFrame({"x": range(3)}, index=[1, 4, 9]),
    }
    number_epochs(history, {"train_loss": 5, "elbo_train": 5, "objective_validation": 2}, 3)
    assert history["train_loss"].index.tolist() == history["elbo_train"].index.tolist() == list(range(12))
    assert history["objective_validation"].index.tolist() == [1, 3, 7, 10]
    assert history["kl_weight"].index.tolist() == [1, 4, 9]


def test_history_of_a_model_in_phases_and_after_a_broken_training() -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
    adata = pv.datasets.simulate_screen(
        n_genes=30, n_perturbations=4, n_doubles=0, cells_per_perturbation=40, n_controls=60, n_latent=3, n_oracle=10
    )
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = pv.SAMSVAE(adata, n_latent=3, n_hidden=8)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.train(max_epochs=20, callbacks=[Stop()], check_val_every_n_epoch=2, **quiet)
    model.train(max_epochs=20, check_val_every_n_epoch=2, **quiet)
    n = len(model.history["train_loss"])
    assert model.history["train_loss"].index.tolist() == list(range(n))
    validated = model.history["objective_validation"].index
    assert validated.is_monotonic_increasing
    assert validated.is_unique
    assert validated.max() < n
    assert validated[0] == 1
