"""Training of one model on one fold; nothing here depends on what is scored afterwards."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from anndata import AnnData

from pertvae.benchmark._data import Data
from pertvae.benchmark._folds import SPLIT_KEY


def fit_model(
    cls: Any,
    data: Data,
    adata: AnnData,
    *,
    seed: int,
    model_kwargs: Mapping[str, Any],
    train_kwargs: Mapping[str, Any],
    on_epoch: Callable[[int, int], None] | None = None,
) -> Any:
    """Train one model on the training cells of a fold and return it.

    Parameters
    ----------
    cls
        Model class.
    data
        How the screen is registered.
    adata
        Cells of the fold, with its split column.
    seed
        Training seed.
    model_kwargs, train_kwargs
        For the constructor and for ``train``.
    on_epoch
        Called with the epoch and the number of epochs.
    """
    setup = {"perturbation_key": data.perturbation_key, "control": list(data.control), "sep": data.sep}
    setup |= {k: v for k, v in (("batch_key", data.batch_key), ("labels_key", data.labels_key)) if v is not None}
    cls.setup_anndata(adata, **setup, **data.setup_kwargs)
    with seeded(seed), silent():
        model = cls(adata, **model_kwargs)
        model.train(**_train_arguments(model, train_kwargs, on_epoch))
    return model


def _train_arguments(
    model: Any, train_kwargs: Mapping[str, Any], on_epoch: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Return the arguments of ``train``: the split, no bar of its own, and one call an epoch for ours."""
    arguments = {"split_key": SPLIT_KEY, **train_kwargs}
    parameters = inspect.signature(model.train).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    arguments = {"enable_progress_bar": False, "enable_model_summary": False, **arguments}
    if on_epoch is not None:
        from lightning.pytorch.callbacks import LambdaCallback

        def report(trainer: Any, _module: Any) -> None:
            on_epoch(trainer.current_epoch + 1, trainer.max_epochs)

        arguments["callbacks"] = [*arguments.get("callbacks", []), LambdaCallback(on_train_epoch_end=report)]
    return arguments


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what scvi-tools prints (why training stopped) from running across the bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Work from a seed of scvi-tools, and put the caller's seed back afterwards."""
    from scvi import settings

    before = settings.seed
    settings.seed = seed
    try:
        yield
    finally:
        if before is not None:
            settings.seed = before
