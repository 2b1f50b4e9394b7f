"""Metrics summed over an epoch: by hand, and against scvi-tools' logging in every step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan

import pertvae as pv
from pertvae.models import SAMSVAE
from pertvae.models.base import PerturbationTrainingPlan
from pertvae.models.base._epoch_sums import EpochSums


class LoggedEveryStep(PerturbationTrainingPlan):
    """The steps of scvi-tools: each logs all metrics."""

    training_step = TrainingPlan.training_step
    validation_step = TrainingPlan.validation_step


class Seen(pl.Callback):
    """What callbacks and the progress bar can read, and how often the plan logged."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, dict[str, float], dict[str, float]]] = []
        self.calls = self.steps = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        inner = pl_module.log

        def log(*args: Any, **kwargs: Any) -> None:
            self.calls += 1
            inner(*args, **kwargs)

        pl_module.log = log

    def note(self, hook: str, trainer: pl.Trainer) -> None:
        read = ({k: float(v) for k, v in m.items()} for m in (trainer.callback_metrics, trainer.progress_bar_metrics))
        self.seen.append((hook, trainer.current_epoch, *read))  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps += 1
        self.note("train_batch_end", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note("train_epoch_end", trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note("validation_epoch_end", trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note("validation_end", trainer)


@pytest.fixture(scope="module")
def screen() -> AnnData:
    adata = pv.datasets.simulate_screen(
        n_genes=25, n_perturbations=4, n_doubles=1, cells_per_perturbation=20, cells_per_double=20, n_controls=40,
        n_latent=2, n_oracle=10,
    )  # fmt: skip
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "valid", "train")
    return adata


def trained(screen: AnnData, plan: type, model: dict[str, Any], **kwargs: Any) -> tuple[SAMSVAE, Seen]:
    scvi.settings.seed = 0
    adata, seen = screen.copy(), Seen()
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    fitted = SAMSVAE(adata, n_latent=2, n_hidden=8, **model)
    fitted._training_plan_cls = plan
    arguments = {"split_key": "split", "batch_size": 16, "check_val_every_n_epoch": 1} | kwargs
    fitted.train(accelerator="cpu", devices=1, enable_progress_bar=False, callbacks=[seen], **arguments)
    return fitted, seen


PUBLISHED = {"sparsify": "published"}
# 105 training cells: six minibatches of 16, one of 9; the validation has two of 16, one of 3
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PUBLISHED, {"max_epochs": 4}),
    "phases": ({}, {"max_epochs": 12, "check_val_every_n_epoch": 2}),
    "particles": (PUBLISHED | {"n_particles": 3, "global_kl": "plate"}, {"max_epochs": 2}),
    "warm-up in epochs": (PUBLISHED, {"max_epochs": 6, "plan_kwargs": {"n_epochs_kl_warmup": 4}}),
    "warm-up in steps": (PUBLISHED, {"max_epochs": 4, "plan_kwargs": {"n_steps_kl_warmup": 17}}),
    "ends in an epoch": (PUBLISHED, {"max_epochs": 4, "max_steps": 17}),
    "few batches": (PUBLISHED, {"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 2}),
    "validates in an epoch": (PUBLISHED, {"max_epochs": 3, "val_check_interval": 2, "log_every_n_steps": 1}),
    "no validation": (
        PUBLISHED,
        {
            "max_epochs": 3,
            "split_key": None,
            "train_size": 1.0,
            "early_stopping": False,
            "check_val_every_n_epoch": None,
        },
    ),
    "on_step": (PUBLISHED, {"max_epochs": 2, "early_stopping": False, "plan_kwargs": {"on_step": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_logging_every_step(screen: AnnData, case: str) -> None:
    """In the history and for whoever reads them at any time."""
    model, arguments = CASES[case]
    (one, reads), (other, expected) = (
        trained(screen, plan, model, **arguments) for plan in (PerturbationTrainingPlan, LoggedEveryStep)
    )
    assert list(one.history) == list(other.history)
    for name, column in other.history.items():
        pd.testing.assert_frame_equal(one.history[name].astype(float), column.astype(float), rtol=2e-6)
    assert [row[:2] for row in reads.seen] == [row[:2] for row in expected.seen]
    for mine, theirs in zip(reads.seen, expected.seen, strict=True):
        for a, b in zip(mine[2:], theirs[2:], strict=True):
            assert a == pytest.approx(b, rel=2e-6), mine[:2]
    for name, value in other.module.state_dict().items():
        assert torch.equal(value, one.module.state_dict()[name]), name


def test_steps_do_not_log(screen: AnnData) -> None:
    _, seen = trained(screen, PerturbationTrainingPlan, PUBLISHED, max_epochs=3)
    assert seen.steps == 21
    # in each epoch the weight of the KL, and seven metrics of training and of validation
    assert seen.calls == 3 * (1 + 7 + 7)


def test_processes_add_up_once_an_epoch(screen: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, int]] = []

    def reduce(self: Any, tensor: torch.Tensor, group: Any = None, reduce_op: Any = "mean") -> torch.Tensor:
        if tensor.numel() > 1:  # else a decision of Lightning
            calls.append((reduce_op, tensor.numel()))
        return tensor

    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "reduce", reduce)
    trained(screen, PerturbationTrainingPlan, PUBLISHED, max_epochs=3, early_stopping=False)
    # cells, steps; reconstruction and two KL; loss, objective and mask density
    assert calls == [("sum", 2 + 3 + 3)] * 6


def test_steps_do_not_wait_for_the_device() -> None:
    """Values on the meta device cannot be read."""
    sums = EpochSums()
    for n in (4, 3):
        loss = torch.zeros((), device="meta", requires_grad=True)
        cells = torch.zeros(n, device="meta")
        output = LossOutput(
            loss=loss, reconstruction_loss=cells, kl_local=cells, kl_global=loss, extra_metrics={"a": loss, "b": 1.0}
        )
        sums.add(output)
    assert (sums.n_cells, sums.n_steps) == (7, 2)


def test_sums_by_hand() -> None:
    rng = np.random.default_rng(0)
    sums, rows = EpochSums(), []
    assert sums.metrics(10, lambda total: total) == {}
    for n in (4, 4, 1):
        reconstruction, local = (torch.tensor(rng.normal(size=n), dtype=torch.float32) for _ in range(2))
        shared, loss, extra = rng.normal(size=3)
        rows.append((n, float(reconstruction.sum()), float(local.sum()), shared, loss, extra))
        sums.add(
            LossOutput(
                loss=torch.tensor(loss, dtype=torch.float32, requires_grad=True),
                reconstruction_loss=reconstruction.requires_grad_(),
                kl_local=local,
                kl_global=torch.tensor(shared, dtype=torch.float32),
                extra_metrics={"extra": extra},  # not a tensor
            )
        )
    n, reconstruction, local, shared, loss, extra = np.array(rows).T
    expected = {
        "loss": (loss * n).sum() / 9,
        "elbo": (reconstruction.sum() + local.sum()) / 9 + shared.mean() / 10,
        "reconstruction_loss": reconstruction.sum() / 9,
        "kl_local": local.sum() / 9,
        "kl_global": shared.mean(),
        "extra": (extra * n).sum() / 9,
    }
    found = sums.metrics(10, lambda total: total)
    assert list(found) == list(expected)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-5)
    assert not any(v.requires_grad for v in found.values())
    # two processes: the first with cells of metric 1 in one step, the second with those above
    other = EpochSums()
    ones = torch.ones(3)
    other.add(
        LossOutput(
            loss=torch.tensor(1.0),
            reconstruction_loss=ones,
            kl_local=ones,
            kl_global=torch.tensor(1.0),
            extra_metrics={"extra": 1.0},
        )
    )
    totals: list[torch.Tensor] = []
    sums.metrics(10, lambda total: totals.append(total) or total)
    both = other.metrics(10, lambda total: total + totals[0])
    pooled = {name: (3 + 9 * expected[name]) / 12 for name in ("loss", "reconstruction_loss", "kl_local", "extra")}
    pooled["kl_global"] = (1 + 3 * expected["kl_global"]) / 4
    pooled["elbo"] = pooled["reconstruction_loss"] + pooled["kl_local"] + pooled["kl_global"] / 10
    assert {k: float(v) for k, v in both.items()} == pytest.approx(pooled, rel=1e-5)
    # no cells known to divide the global KL by
    for none in (None, 0):
        elbo = sums.metrics(none, lambda total: total)["elbo"]
        assert float(elbo) == pytest.approx((reconstruction.sum() + local.sum()) / 9 + shared.mean(), rel=1e-5)
