"""Phases of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Phase:
    """A part of a training run with an optimiser of its own.

    Parameters
    ----------
    name
        For messages.
    share
        Share of the epochs.
    begin
        Called before the phase; also when a short run leaves it no epoch.
    may_stop
        Whether early stopping may end it and the best weights are put back.
    callbacks
        Called with the phase's epochs; returns further callbacks of the trainer.
    of_best
        At most so many times the epochs after which the phase before it was best. A phase that may not stop would
        otherwise go on learning cells by heart where early stopping had ended that one.
    """

    name: str
    share: float = 1.0
    begin: Callable[[], None] | None = None
    may_stop: bool = True
    callbacks: Callable[[int], list[Any]] = field(default=lambda epochs: [])
    of_best: float | None = None

    def limit(self, planned: int, best: int | None) -> int:
        """Return the epochs to run of those planned, given those after which an earlier phase was best."""
        if self.of_best is None or best is None or not planned:
            return planned
        return min(planned, max(1, round(self.of_best * best)))


def divide_epochs(phases: list[Phase], max_epochs: int) -> list[int]:
    """Return the epochs of each phase; the last one gets the rest, and at least one."""
    ends = np.floor(np.cumsum([p.share for p in phases]) / sum(p.share for p in phases) * max_epochs + 1e-9)
    ends[-1] = max_epochs
    ends[:-1] = np.minimum(ends[:-1], max_epochs - 1)
    return [int(n) for n in np.diff(ends, prepend=0)]
