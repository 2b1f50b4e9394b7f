"""The training plan of all methods, and the statistics it hands to the module when the fit starts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._expression import row_blocks
from pertvae.data import distinct_doses
from pertvae.models.base._epoch_sums import EpochSums
from pertvae.models.base._module import PerturbationModule, TrainingStatistics

THETA_RANGE = (1e-3, 1e2)
MONITOR = "objective_validation"
"""Reconstruction + local KL + global KL / training cells, nats a cell, at full KL weight."""


def training_statistics(manager: AnnDataManager, cells: np.ndarray, log1p: bool) -> TrainingStatistics:
    """Compute the statistics of the training cells in one pass over sparse or backed data.

    Parameters
    ----------
    manager
        Manager of the registered data.
    cells
        Row indices of the training cells.
    log1p
        Take the statistics of log1p counts, else of the values themselves.
    """
    cells = np.sort(np.asarray(cells))
    x = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    raw, seen = _Moments(x.shape[1]), _Moments(x.shape[1])
    for _, block in row_blocks(x, cells):
        values = (sp.csr_matrix(block) if sp.issparse(block) else block).astype(np.float64)
        raw.add(values)
        if log1p:
            seen.add(values.log1p() if sp.issparse(values) else np.log1p(values))
    if not log1p:
        seen = raw
    doses = sp.csr_matrix(manager.get_from_registry(PERTURBATION_REGISTRY_KEY)[cells])
    if log1p:
        share = (raw.total + 0.5) / (raw.total + 0.5).sum()
        bias, log_scale = np.log(share * len(share)), np.log(raw.inverse_dispersion())
    else:
        bias, log_scale = raw.mean, np.log(np.maximum(raw.sd, 1e-3))
    return TrainingStatistics(
        input_mean=seen.mean,
        input_sd=seen.sd,
        output_bias=bias,
        output_log_scale=log_scale,
        cells_per_component=np.bincount(doses.indices[doses.data != 0], minlength=doses.shape[1]),
        n_cells=len(cells),
        max_active=int((doses != 0).sum(axis=1).max()),
        cells_per_dose=distinct_doses(doses),
    )


class _Moments:
    """Sums over cells for each gene, block by block."""

    def __init__(self, n_genes: int) -> None:
        self.n = 0
        self.total, self.squares, self.with_library = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
        self.library_squares = 0.0

    def add(self, block: np.ndarray | sp.csr_matrix) -> None:
        """Add some cells."""
        library = np.asarray(block.sum(axis=1)).ravel()
        self.n += len(library)
        self.total += np.asarray(block.sum(axis=0)).ravel()
        squares: Any = block.multiply(block) if isinstance(block, sp.csr_matrix) else block**2
        self.squares += np.asarray(squares.sum(axis=0)).ravel()
        self.with_library += np.asarray(block.T @ library).ravel()
        self.library_squares += float(library @ library)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def sd(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares - self.n * self.mean**2, 0.0) / max(self.n - 1, 1))

    def inverse_dispersion(self) -> np.ndarray:
        """Return theta by moments, around the mean library times share: sum mu^2 / sum ((x - mu)^2 - mu)."""
        share = self.total / max(self.total.sum(), 1.0)
        mean_squares = share**2 * self.library_squares
        excess = self.squares - 2 * share * self.with_library + mean_squares - self.total
        ratio = np.where(excess > 0, mean_squares / np.maximum(excess, 1e-12), THETA_RANGE[1])
        return np.where(self.total > 0, np.clip(ratio, *THETA_RANGE), 1.0)


class PerturbationTrainingPlan(TrainingPlan):
    """scvi-tools' plan with the settings these models need.

    Adam's eps is 1e-8: with scvi-tools' 0.01 the small gradients of masks and effects hardly move them. The KL has
    full weight from the start unless a warm-up is asked for. Training statistics come from the training cells when
    the fit starts. Metrics are those of scvi-tools, but summed on the device and logged once an epoch, when its last
    minibatch is done; with ``on_step=True`` they are logged in every step, as scvi-tools does.

    Parameters
    ----------
    module
        The module.
    manager
        Manager of the training data, or ``None`` when a datamodule brings its own statistics.
    lr, eps, weight_decay, n_epochs_kl_warmup
        As in scvi-tools, with other defaults.
    global_lr
        Learning rate of parameters that belong to one perturbation or one gene (effects, decoder bias, dispersion):
        each has few cells and far to go, so it is ten times the others'.
    mask_lr
        Learning rate of the masks' log-odds, which start at 0 and end several units away.
    fused_optimizer
        Let Adam and AdamW update all parameters in one kernel where device and torch version can. The numbers are
        those of the plain loop up to rounding.
    **kwargs
        Passed to :class:`scvi.train.TrainingPlan`.
    """

    def __init__(
        self,
        module: PerturbationModule,
        *,
        manager: AnnDataManager | None = None,
        lr: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 1e-6,
        n_epochs_kl_warmup: int | None = None,
        global_lr: float = 1e-2,
        mask_lr: float = 1e-1,
        fused_optimizer: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            module, lr=lr, eps=eps, weight_decay=weight_decay, n_epochs_kl_warmup=n_epochs_kl_warmup, **kwargs
        )
        self._manager = manager
        self.global_lr, self.mask_lr = global_lr, mask_lr
        self.fused_optimizer = fused_optimizer
        self._epoch_sums = {mode: EpochSums() for mode in ("train", "validation")}
        self._kl_weight_epoch: int | None = None

    # ---------------------------------------------------------------- optimiser

    def get_optimizer_creator(self) -> Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]:
        """Return scvi-tools' optimiser with the three learning rates, fused where that is possible."""
        trainer = self._trainer  # none when only the optimiser is asked for
        if trainer is not None and trainer.gradient_clip_val and "mixed" in str(trainer.precision):
            self.fused_optimizer = False  # Lightning clips no gradients of a fused one in mixed precision
        plain = super().get_optimizer_creator()
        rates = {id(p): self.global_lr for p in self.module.global_parameters()}
        rates |= {id(p): self.mask_lr for p in self.module.mask_parameters()}

        def with_groups(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
            groups: dict[float | None, list[torch.nn.Parameter]] = {}
            for parameter in parameters:
                groups.setdefault(rates.get(id(parameter)), []).append(parameter)
            return self._fused(plain)(
                [{"params": g} | ({} if lr is None else {"lr": lr, "weight_decay": 0.0}) for lr, g in groups.items()]
            )

        return with_groups

    def _fused(self, plain: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
        """Return what makes the optimiser fused, or by ``plain`` when torch refuses or the user brought another."""
        kinds: dict[str, type[torch.optim.Adam]] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
        kind = kinds.get(self.optimizer_name)
        if not self.fused_optimizer or kind is None:
            return plain

        def create(groups: Any) -> torch.optim.Optimizer:
            copies = [dict(group) for group in groups]  # torch fills them in before it refuses
            try:
                return kind(copies, fused=True, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
            except (RuntimeError, ValueError, TypeError, AssertionError):  # it knows its devices and types best
                self.fused_optimizer = False
                return plain(groups)

        return create

    # ---------------------------------------------------------------- steps and metrics

    def on_fit_start(self) -> None:
        """Set training counts and input statistics from the training cells."""
        super().on_fit_start()
        datamodule = getattr(self.trainer, "datamodule", None)
        cells = getattr(datamodule, "train_idx", None)
        if self._manager is not None and cells is not None:
            log1p = self.module.gene_likelihood != "normal"
            self.module.set_training_statistics(training_statistics(self._manager, cells, log1p))

    @property
    def _logs_steps(self) -> bool:
        """Whether scvi-tools' own logging was asked for."""
        return bool(self.on_step) or not self.on_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a minibatch and add its metrics to the epoch's."""
        if self._logs_steps:
            return super().training_step(batch, batch_idx)
        moves = bool(self.n_steps_kl_warmup) and not self.n_epochs_kl_warmup
        if "kl_weight" in self.loss_kwargs and (moves or self._kl_weight_epoch != self.current_epoch):
            self._kl_weight_epoch = self.current_epoch
            self.loss_kwargs["kl_weight"] = self.kl_weight
            self.log("kl_weight", self.loss_kwargs["kl_weight"], on_step=True, on_epoch=False)
        *_, output = self.forward(batch, loss_kwargs=self.loss_kwargs)
        self._epoch_sums["train"].add(output)
        return output.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the metrics of a minibatch to those of the validation."""
        if self._logs_steps:
            super().validation_step(batch, batch_idx)
            return
        *_, output = self.forward(batch, loss_kwargs=self.loss_kwargs)
        self._epoch_sums["validation"].add(output)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch after its last minibatch: callbacks read the metrics before this plan's end of the epoch."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            self._log_epoch("train")

    def on_train_epoch_end(self) -> None:
        """Log an epoch that ended early."""
        self._log_epoch("train")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the validation after its last minibatch."""
        if batch_idx + 1 == self.trainer.num_val_batches[dataloader_idx]:
            self._log_epoch("validation")

    def on_validation_epoch_end(self) -> None:
        """Log a validation that ended early."""
        self._log_epoch("validation")

    def _log_epoch(self, mode: str) -> None:
        """Log what was summed since the last time, if anything was."""
        n_total = self.n_obs_training if mode == "train" else self.n_obs_validation
        strategy = self.trainer.strategy
        sums, self._epoch_sums[mode] = self._epoch_sums[mode], EpochSums()
        for name, value in sums.metrics(n_total, lambda total: strategy.reduce(total, reduce_op="sum")).items():
            key = f"{name}_{mode}"
            self.log(
                {"loss_train": "train_loss", "loss_validation": "validation_loss"}.get(key, key),
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=key == "loss_train",
                batch_size=1,
                sync_dist=self.use_sync_dist,  # equal in all processes by now; Lightning warns without
            )

    def compute_and_log_metrics(self, loss_output: LossOutput, metrics: dict, mode: str) -> None:
        """Log as scvi-tools does, scalar extras outside inference mode, where distributed training may reduce them."""
        plain = dataclasses.replace(loss_output, extra_metrics={})
        super().compute_and_log_metrics(plain, metrics, mode)
        for key, value in (loss_output.extra_metrics or {}).items():
            self.log(
                f"{key}_{mode}",
                torch.as_tensor(value).detach().clone(),
                on_step=False,
                on_epoch=True,
                batch_size=loss_output.n_obs_minibatch,
                sync_dist=self.use_sync_dist,
            )

    def prepare_scib_autotune(self, loss_outputs: Any, stage: str) -> None:
        """Do nothing: scib tuning wants per-cell outputs, our extras are scalars."""


class KeepBest(pl.Callback):
    """Keep the weights of the best validation epoch and put them back when the fit ends.

    Parameters
    ----------
    monitor
        Logged metric; lower is better.
    """

    def __init__(self, monitor: str = MONITOR) -> None:
        super().__init__()
        self.monitor = monitor
        self.best = float("inf")
        self.best_epoch: int | None = None
        self._state: dict[str, torch.Tensor] | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights when the metric improved."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and float(value) < self.best:
            self.best, self.best_epoch = float(value), trainer.current_epoch
            self._state = copy.deepcopy(cast(torch.nn.Module, pl_module.module).state_dict())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back."""
        if self._state is not None:
            cast(torch.nn.Module, pl_module.module).load_state_dict(self._state)
            self._state = None
