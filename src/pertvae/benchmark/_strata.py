"""What a held-out condition is like: how large its effect is, and how far from additive."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from pertvae._expression import mean_profile
from pertvae.benchmark._duplicate import DUPLICATE, INTERPOLATED, N_HALVES, halves
from pertvae.benchmark._intervals import mean_interval
from pertvae.benchmark._metrics import best_value, loss
from pertvae.benchmark._score import Scorer

EFFECT_SIZE, NON_ADDITIVITY = "effect_size", "non_additivity"
STRATA = {2: ("small", "large"), 3: ("small", "medium", "large")}
MIN_PER_STRATUM = 3


def unit_table(scorer: Scorer) -> pd.DataFrame:
    """Return one row a unit: label, context, class, observed cells, effect size, non-additivity.

    Both sizes are free of sampling noise on average: lengths come from the inner product of two estimates that share
    no cell. ``effect_size`` is that of the observed shift (log1p CP10k, Euclidean over the scored genes) and
    ``non_additivity`` that of the observed shift minus the sum of the shifts of its components as singles in training;
    NaN where a component has no singles there. A negative inner product, all noise, counts as 0.
    """
    sizes: dict[str, list[tuple[float, float]]] = {u.name: [] for u in scorer.fold.units}
    for i in range(N_HALVES):
        for context in scorer.fold.contexts:
            both = [_shifts(half, scorer, context, j) for j, half in enumerate(_halves(scorer, context, i))]
            additive = scorer.training[context].additive
            for unit in scorer.units(context):
                first, second = (shifts[unit.label] for shifts in both)
                apart = np.nan
                if additive is not None and unit.label in additive[0].index:
                    a, b = (t[scorer.gene_names].loc[unit.label].to_numpy(dtype=float) for t in additive)
                    apart = float((first - a) @ (second - b))
                sizes[unit.name].append((float(first @ second), apart))
    rows = []
    for unit in scorer.fold.units:
        effect, apart = np.mean(sizes[unit.name], axis=0)
        rows.append(
            {
                "unit": unit.name,
                "condition": unit.label,
                "context": unit.context,
                "seen": unit.seen,
                "n_observed": scorer.n_observed(unit),
                EFFECT_SIZE: float(np.sqrt(max(effect, 0.0))),
                NON_ADDITIVITY: float(np.sqrt(np.maximum(apart, 0.0))),
            }
        )
    return pd.DataFrame(rows)


def _halves(scorer: Scorer, context: str, seed: int) -> tuple[AnnData, AnnData]:
    return halves(scorer.observed[context], scorer, seed)


def _shifts(half: AnnData, scorer: Scorer, context: str, number: int) -> dict[str, np.ndarray]:
    """Return observed shifts of one half: against its own controls, or without held-out ones half of the training's."""
    labels = scorer.canonical(half.obs[scorer.perturbation_key])
    controls = np.flatnonzero(labels == scorer.control[0])
    if len(controls):
        base = mean_profile(half.X, controls)
    else:
        rows = scorer.control_rows(context, "train")
        base = mean_profile(scorer.adata.X, rows[number::2] if len(rows) > 1 else rows)
    found = {}
    for unit in scorer.units(context):
        found[unit.label] = (mean_profile(half.X, np.flatnonzero(labels == unit.label)) - base)[scorer.genes]
    return found


def stratified(values: pd.DataFrame, sizes: pd.Series) -> pd.DataFrame:
    """Return the mean of each method over conditions that are alike in size.

    Parameters
    ----------
    values
        Conditions x methods.
    sizes
        Effect size or non-additivity of each condition; conditions without one are left out.

    Returns
    -------
    DataFrame
        Columns stratum, model, value, lower, upper, n_conditions, smallest, largest (of the sizes). Thirds of the
        conditions, halves when there are fewer than nine, nothing below six.
    """
    sizes = sizes.dropna()
    sizes = sizes[sizes.index.isin(values.index)].sort_values(kind="stable")
    n_strata = min(3, len(sizes) // MIN_PER_STRATUM)
    columns = ["stratum", "model", "value", "lower", "upper", "n_conditions", "smallest", "largest"]
    if n_strata < 2:
        return pd.DataFrame(columns=columns)
    rows = []
    for name, part in zip(STRATA[n_strata], np.array_split(np.arange(len(sizes)), n_strata), strict=True):
        inside = sizes.iloc[part]
        alike = values.loc[inside.index]
        for model in alike:
            i = mean_interval(alike[model])
            rows.append([name, model, i.value, i.lower, i.upper, i.n, inside.iloc[0], inside.iloc[-1]])
    return pd.DataFrame(rows, columns=columns)


def between_controls(wide: pd.DataFrame, scheme: str) -> pd.DataFrame:
    """Return scores of a scheme between a negative and a positive control, and the room there is between these.

    Parameters
    ----------
    wide
        Mean of each method, metrics x methods; distances from 1 where 1 is best.
    scheme
        Name of the scheme.

    Returns
    -------
    DataFrame
        See :meth:`pertvae.benchmark.BenchmarkResult.dynamic_range`, which this is for one scheme.
    """
    columns = ["scheme", "model", "metric", "value", "negative", "positive", "normalised", "dynamic_range"]
    worst = "NoChange" if scheme == "unseen_context" else "Mean"
    if worst not in wide or DUPLICATE not in wide:
        return pd.DataFrame(columns=columns)
    positive = wide[DUPLICATE]
    if INTERPOLATED in wide:
        positive = wide[INTERPOLATED].fillna(positive)
    negative, best = wide[worst], pd.Series({m: best_value(str(m)) for m in wide.index})
    # a positive control that is no better than the negative one measures nothing
    gains = pd.Series({m: -loss(str(m), positive[m] - negative[m], difference=True) for m in wide.index})
    span, room = (positive - negative).where(gains > 0), best - negative
    room = (span / room).where(np.isfinite(room) & (room != 0))
    long = wide.rename_axis(index="metric", columns="model").stack()
    table = pd.DataFrame({"value": long}).reset_index()
    for name, values in (("negative", negative), ("positive", positive), ("dynamic_range", room)):
        table[name] = table["metric"].map(values)
    table["normalised"] = ((table["value"] - table["negative"]) / table["metric"].map(span)).astype(float)
    return table.assign(scheme=scheme)[columns]
