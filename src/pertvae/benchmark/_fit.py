"""One method on one fold: fit, predict, and what is kept of it."""

from __future__ import annotations

import contextlib
import inspect
import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._predictions import predicted_shifts
from pertvae._storage import write_table
from pertvae.benchmark._folds import SPLIT_KEY, Fold
from pertvae.benchmark._prediction import Prediction
from pertvae.benchmark._score import Scorer

CELLS_AT_ONCE = 20_000
"""Cells predicted in one call: expected counts are dense, and all conditions together would not fit into memory."""
REFERENCE_CELLS = 500
"""Cells of a reference: their mean is not scored, its shift is, and distances between cells use at most as many."""
_PROGRAMS = ("effects", "inclusion", "loadings")


@dataclass(frozen=True)
class Data:
    """The screen as every method sees it.

    Parameters
    ----------
    adata
        Counts in ``X``; the benchmark's own object.
    perturbation_key, control, sep, labels_key, batch_key
        As in :func:`pertvae.benchmark.run`.
    context_key
        ``labels_key`` where it has more than one value, else ``None``.
    n_cells
        Cells predicted a condition.
    setup_kwargs
        Further arguments of ``setup_anndata``.
    """

    adata: AnnData
    perturbation_key: str
    control: tuple[str, ...]
    sep: str | None
    labels_key: str | None
    batch_key: str | None
    context_key: str | None
    n_cells: int
    setup_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def of_fold(self, fold: Fold) -> tuple[AnnData, Fold]:
        """Return the cells that a fold uses, with its split column, and the fold on them; X is shared if it can be."""
        obs = self.adata.obs.assign(**{SPLIT_KEY: fold.split})
        kept = fold.split.notna().to_numpy()
        x = self.adata.X if kept.all() else self.adata.X[kept]
        work = AnnData(X=x, obs=obs[kept].copy(), var=pd.DataFrame(index=self.adata.var_names))
        work.obs[SPLIT_KEY] = work.obs[SPLIT_KEY].astype(str)
        return work, replace(fold, split=fold.split[kept], common=fold.common_rows()[kept])


def fit_model(
    cls: Any,
    data: Data,
    scorer: Scorer,
    *,
    seed: int,
    model_kwargs: Mapping[str, Any],
    train_kwargs: Mapping[str, Any],
    on_epoch: Callable[[int, int], None] | None = None,
) -> Any:
    """Train one model on the training cells of a fold and return it."""
    setup = {"perturbation_key": data.perturbation_key, "control": list(data.control), "sep": data.sep}
    setup |= {k: v for k, v in (("batch_key", data.batch_key), ("labels_key", data.labels_key)) if v is not None}
    cls.setup_anndata(scorer.adata, **setup, **data.setup_kwargs)
    with _seeded(seed):
        model = cls(scorer.adata, **model_kwargs)
        with contextlib.redirect_stdout(io.StringIO()):  # scvi-tools prints why training stopped, across the bar
            model.train(**_train_arguments(model, train_kwargs, on_epoch))
    return model


def run_model(model: Any, data: Data, scorer: Scorer, *, seed: int, keep_programs: bool) -> Prediction:
    """Predict the units of a fold with a trained model, and score them."""
    start = time.perf_counter()
    with _seeded(seed):
        predicted = _predicted(model.predict_perturbation, data, scorer, seed)
    seconds = time.perf_counter() - start
    prediction = _scored(scorer, predicted)
    prediction.seconds = {"predict": seconds}
    for name, table in (getattr(model, "history", None) or {}).items():
        if str(name).endswith(("_train", "_validation")):
            prediction.tables[f"history:{name}"] = pd.DataFrame(table).astype(float)
    if keep_programs and hasattr(model, "get_perturbation_programs"):
        found = model.get_perturbation_programs(key_added=None)
        prediction.tables |= {f"programs:{name}": getattr(found, name) for name in _PROGRAMS}
    return prediction


def run_ensemble(models: Sequence[Any], data: Data, scorer: Scorer, *, seed: int) -> Prediction:
    """Predict the units of a fold with several trained models at once, and score them."""
    from pertvae.models import predict_ensemble

    start = time.perf_counter()
    predicted = _predicted(partial(predict_ensemble, models), data, scorer, seed)
    seconds = time.perf_counter() - start
    prediction = _scored(scorer, predicted)
    prediction.seconds = {"predict": seconds}
    return prediction


def _predicted(predict: Callable[..., AnnData], data: Data, scorer: Scorer, seed: int) -> dict[str, AnnData]:
    """Return by context the predicted units of a fold, from the training controls of the context."""
    predicted = {}
    for context in scorer.fold.contexts:
        labels = [u.label for u in scorer.units(context)]
        source = scorer.control_rows(context, "train")
        step = max(1, CELLS_AT_ONCE // data.n_cells)
        parts = [
            predict(labels[i : i + step], indices=source, n_cells=data.n_cells, seed=seed, key_added=None)
            for i in range(0, len(labels), step)
        ]
        predicted[context] = merge(parts)
    return predicted


def run_reference(cls: Any, data: Data, scorer: Scorer) -> Prediction:
    """Fit one reference on the training cells of a fold and score its exact shifts; unknown components add nothing."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said once, in the notes of the report
        reference = cls().fit(
            scorer.adata,
            data.perturbation_key,
            list(data.control),
            split_key=SPLIT_KEY,
            sep=data.sep,
            labels_key=data.context_key,
        )
        fitted = time.perf_counter()
        predicted = {
            context: reference.predict_perturbation(
                [u.label for u in scorer.units(context)],
                n_cells=min(data.n_cells, REFERENCE_CELLS),
                labels=context or None,
                unseen="ignore",
                seed=0,
            )
            for context in scorer.fold.contexts
        }
    prediction = _scored(scorer, predicted)
    prediction.seconds = {"fit": fitted - start, "predict": time.perf_counter() - fitted}
    return prediction


def run_duplicate(scorer: Scorer) -> Prediction:
    """Score halves of the held-out cells against each other."""
    start = time.perf_counter()
    scores = scorer.duplicate()
    return Prediction(scores, seconds={"fit": 0.0, "predict": time.perf_counter() - start})


def run_oracle(truth: Any, scorer: Scorer) -> Prediction:
    """Score the expected profiles of the simulation."""
    predicted, metrics = scorer.oracle(truth)
    prediction = _scored(scorer, predicted, metrics)
    prediction.seconds = {"fit": 0.0, "predict": 0.0}
    return prediction


def merge(parts: Sequence[AnnData]) -> AnnData:
    """Join predictions of several calls: generated cells in order, source controls of the first, all shifts."""
    for part in parts:
        for layer in [name for name in part.layers if name is not None]:  # anndata 0.13 lists X as the layer None
            del part.layers[layer]
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    controls = first[~first.obs["generated"].to_numpy(dtype=bool)]
    generated = [p[p.obs["generated"].to_numpy(dtype=bool)] for p in parts]
    everything = [*generated, controls]
    if all(sp.issparse(p.X) for p in everything):
        x: Any = sp.vstack([sp.csr_matrix(p.X) for p in everything], format="csr")
    else:
        x = np.concatenate([p.X.toarray() if sp.issparse(p.X) else np.asarray(p.X) for p in everything])
    obs = pd.concat([p.obs.astype(dict.fromkeys(p.obs.select_dtypes("category"), str)) for p in everything])
    joined = AnnData(X=x, obs=obs, var=first.var.copy())
    joined.obs_names_make_unique()
    provenance = first.uns[UNS_PROVENANCE_KEY]
    write_table(joined.uns, provenance["shifts"], pd.concat([predicted_shifts(p) for p in parts]))
    joined.uns[UNS_PROVENANCE_KEY] = provenance
    return joined


def _scored(scorer: Scorer, predicted: Mapping[str, AnnData], metrics: Sequence[str] | None = None) -> Prediction:
    draws = scorer.draws(predicted, metrics)
    return Prediction(
        scores=scorer.score(predicted, metrics),
        shift=scorer.shifts(predicted),
        tables={f"draws:{name}": table for name, table in draws.items()},
    )


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


class _seeded:
    """Train from a seed of scvi-tools, and put the caller's seed back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        from scvi import settings

        self.before = settings.seed
        settings.seed = self.seed

    def __exit__(self, *_: object) -> None:
        from scvi import settings

        if self.before is not None:
            settings.seed = self.before
