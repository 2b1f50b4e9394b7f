"""Phases of a training run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import ModelCheckpoint, Timer


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
    restarts
        Whether it begins with untrained weights: a warm-up of the KL then belongs to it too.
    """

    name: str
    share: float = 1.0
    begin: Callable[[], None] | None = None
    may_stop: bool = True
    callbacks: Callable[[int], list[Any]] = field(default=lambda epochs: [])
    of_best: float | None = None
    restarts: bool = False

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


def number_epochs(history: Mapping[str, pd.DataFrame], earlier: Mapping[str, int], every: int | None) -> None:
    """Number the rows that a phase added by the epochs of all: scvi-tools counts the rows of each metric.

    Metrics of single steps (``kl_weight``) are left as they are.

    Parameters
    ----------
    history
        Tables by metric, changed in place.
    earlier
        Rows of each before the phase.
    every
        Epochs between validations.
    """
    begun = earlier.get("train_loss", 0)
    for name, table in history.items():
        validated = name == "validation_loss" or name.endswith("_validation")
        if not validated and name != "train_loss" and not name.endswith("_train"):
            continue
        old, step = earlier.get(name, 0), (every or 1) if validated else 1
        added = begun + step * np.arange(1, len(table) - old + 1) - 1
        table.index = pd.Index(np.concatenate([table.index[:old], added]).astype(int), name=table.index.name)


class FreshPhase(pl.Callback):
    """Keep the end of one phase from acting on the next, whose objective is on another scale.

    The user's callbacks are the same objects in all phases. Those with a state that Lightning saves (early stopping,
    checkpoints) get the one back that they had when the first phase began: its best value is not to be compared with.
    Others, and what a callback keeps beside its state, are left alone: a recorder sees all phases. A ``Timer`` counts
    on.

    Parameters
    ----------
    model
        The model that trains.
    callbacks
        The user's.
    """

    def __init__(self, model: Any, callbacks: list[pl.Callback]) -> None:
        super().__init__()
        self.model = model
        self.stateful = [c for c in callbacks if type(c).load_state_dict is not pl.Callback.load_state_dict]
        self._states: list[dict[str, Any]] | None = None
        self._was_trained = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the states after the first set-up, which completes them, and later put them back."""
        self._was_trained = self.model.is_trained_
        if self._states is None:
            self._states = [copy.deepcopy(c.state_dict()) for c in self.stateful]
            return
        for callback, state in zip(self.stateful, self._states, strict=True):
            if isinstance(callback, Timer):
                elapsed = callback.state_dict()
                for times in (callback._start_time, callback._end_time):  # it would add up those of two phases
                    times.update(dict.fromkeys(times))
                callback.load_state_dict(elapsed)
                continue
            callback.load_state_dict(copy.deepcopy(state))
            if isinstance(callback, ModelCheckpoint):
                # steps count from zero again, and it saves no step twice
                callback._last_global_step_saved = 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Undo what scvi-tools' checkpoints do to ``is_trained_``: the history would start anew with each phase."""
        self.model.is_trained_ = self._was_trained


@contextmanager
def all_or_nothing(model: Any) -> Iterator[None]:
    """Leave a trained model as it was when what is done with it here breaks off, and an untrained one untrained.

    Weights, buffers and attributes of the module and attributes of the model (history, split) are put back. An
    interrupt from the keyboard arrives as such: Lightning makes a ``SystemExit`` of it.

    Parameters
    ----------
    model
        The model.
    """
    put_back = _snapshot(model) if model.is_trained_ else None
    try:
        yield
    except BaseException as error:
        if put_back is None:
            model.is_trained_ = False
        else:
            put_back()
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _snapshot(model: Any) -> Callable[[], None]:
    """Return what puts the model back as it is now."""
    module = model.module
    device = module.device
    values: list[tuple[Any, dict[str, Any]]] = [(model, vars(model) | {"history_": copy.copy(model.history_)})]
    for part in module.modules():
        registered = {k: copy.copy(v) for k, v in vars(part).items() if k in ("_parameters", "_buffers", "_modules")}
        values.append((part, vars(part) | registered))
    weights = {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}

    def put_back() -> None:
        for owner, attributes in values:
            vars(owner).clear()
            vars(owner).update(attributes)
        module.load_state_dict(weights)
        module.to(device)

    return put_back
