"""One method on one fold: fit, predict, and what is kept of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._predictions import predicted_shifts
from pertvae._storage import write_table
from pertvae.benchmark._data import Data
from pertvae.benchmark._duplicate import duplicate
from pertvae.benchmark._external import External
from pertvae.benchmark._folds import SPLIT_KEY
from pertvae.benchmark._prediction import Prediction
from pertvae.benchmark._score import Scorer
from pertvae.benchmark._train import seeded
from pertvae.reference import SCVIArithmetic

CELLS_AT_ONCE = 20_000
"""Cells predicted in one call: expected counts are dense, and all conditions together would not fit into memory."""
REFERENCE_CELLS = 500
"""Cells of a reference whose exact shift is scored: distances between cells use at most as many."""
_PROGRAMS = ("effects", "inclusion", "loadings")


def run_model(model: Any, data: Data, scorer: Scorer, *, seed: int, keep_programs: bool) -> Prediction:
    """Predict the units of a fold with a trained model, and score them."""
    start = time.perf_counter()
    with seeded(seed):
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


def fit_reference(make: Any, data: Data, scorer: Scorer) -> Any:
    """Fit one reference on the training cells of a fold and return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said once, in the notes of the report
        return make().fit(
            scorer.adata,
            data.perturbation_key,
            list(data.control),
            split_key=SPLIT_KEY,
            sep=data.sep,
            labels_key=data.context_key,
            batch_key=data.batch_key,
        )


def run_reference(reference: Any, data: Data, scorer: Scorer) -> Prediction:
    """Predict the units of a fold with a fitted reference, and score them; unknown components add nothing."""
    start = time.perf_counter()
    # exact shifts are scored where there are some: of cells only the distribution is looked at then
    n_cells = data.n_cells if isinstance(reference, SCVIArithmetic) else min(data.n_cells, REFERENCE_CELLS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        predicted = {
            context: reference.predict_perturbation(
                [u.label for u in scorer.units(context)],
                n_cells=n_cells,
                labels=context or None,
                unseen="ignore",
                seed=0,
            )
            for context in scorer.fold.contexts
        }
    seconds = time.perf_counter() - start
    prediction = _scored(scorer, predicted)
    prediction.seconds = {"predict": seconds}
    return prediction


def run_external(external: External, scorer: Scorer) -> Prediction:
    """Score what an outside tool predicted."""
    prediction = _scored(scorer, *external.predicted(scorer))
    prediction.seconds = {"fit": np.nan, "predict": np.nan}
    return prediction


def run_duplicate(scorer: Scorer, interpolated: bool) -> Prediction:
    """Score halves of the held-out cells against each other."""
    start = time.perf_counter()
    scores = duplicate(scorer, interpolated)
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
    scores, draws = scorer.score(predicted, metrics)
    tables = {f"draws:{name}": table for name, table in draws.items()}
    if scorer.cloud is not None and metrics is None:
        tables["cloud"] = scorer.cloud.predicted(scorer, predicted)
    return Prediction(scores, shift=scorer.shifts(predicted), tables=tables)
