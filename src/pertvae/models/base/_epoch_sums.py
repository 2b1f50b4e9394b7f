"""Metrics of an epoch, summed on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from scvi.module.base import LossOutput


class EpochSums:
    """Sums of an epoch's metrics on the device: no step waits for it, and none pays for a log entry."""

    def __init__(self) -> None:
        self.n_cells, self.n_steps = 0, 0
        self._names: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None
        self._means: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, output: LossOutput) -> None:
        """Add a step: parts of the bound are sums over its cells, the loss and extra metrics are means over them."""
        extras: dict[str, Any] = output.extra_metrics or {}
        loss, n = cast(torch.Tensor, output.loss), cast(int, output.n_obs_minibatch)
        sums = torch.stack([output.reconstruction_loss_sum, output.kl_local_sum, output.kl_global_sum])
        means = torch.stack([loss, *(torch.as_tensor(value, device=loss.device) for value in extras.values())])
        if self._sums is None or self._means is None:
            self._names = tuple(extras)
            self._sums = torch.zeros_like(sums, dtype=torch.float32)
            self._means = torch.zeros_like(means, dtype=torch.float32)
        self._sums.add_(sums)
        self._means.add_(means, alpha=n)
        self.n_cells += n
        self.n_steps += 1

    def metrics(self, n_total: int | None, reduce: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
        """Return the epoch's metrics; nothing when there was no step.

        Parameters
        ----------
        n_total
            Cells that the global KL of ``elbo`` is divided by.
        reduce
            Sums a tensor over processes.
        """
        if self._sums is None or self._means is None:
            return {}
        counts = self._sums.new_tensor([self.n_cells, self.n_steps])
        total = reduce(torch.cat([counts, self._sums, self._means]))
        n_cells, n_steps, means = total[0], total[1], total[5:] / total[0]
        reconstruction, kl_local, kl_global = total[2] / n_cells, total[3] / n_cells, total[4] / n_steps
        return {
            "loss": means[0],
            "elbo": reconstruction + kl_local + kl_global / max(n_total or 1, 1),
            "reconstruction_loss": reconstruction,
            "kl_local": kl_local,
            "kl_global": kl_global,
            **dict(zip(self._names, means[1:], strict=True)),
        }
