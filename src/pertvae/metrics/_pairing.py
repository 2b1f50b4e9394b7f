"""From two AnnData to one comparison: labels, genes, controls, and the shifts that predictions carry."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._labels import LabelFormat, hint
from pertvae._predictions import predicted_shifts
from pertvae.metrics._comparison import Comparison, Pair, Side, stream
from pertvae.metrics._distribution import spread, subsample
from pertvae.metrics._labelled import Labelled, same_genes
from pertvae.metrics._registry import NEEDS, Metric
from pertvae.metrics._training import Training

ALL_GENES = "pass the prediction with all its genes and choose with genes=..."


def choose_conditions(predicted: Labelled, observed: Labelled, asked: Sequence[str] | None) -> list[str]:
    """Return the conditions to score: those asked for, or all predicted ones that were observed."""
    have, seen = predicted.condition_labels, observed.condition_labels
    if asked is not None:
        conditions = list(dict.fromkeys(predicted.format.canonical(c) for c in asked))
        for side, known in ((predicted, have), (observed, seen)):
            missing = [c for c in conditions if c not in known]
            if missing:
                raise KeyError(f"conditions: {missing[0]!r} has no cells in {side.name}.{hint(missing[0], known)}")
        return conditions
    both = [c for c in have if c in set(seen)]
    if not both:
        raise ValueError(
            f"No condition stands in both: predicted has {have[:5]}, observed has {seen[:5]}. Check perturbation_key, "
            f"control={predicted.format.control!r} and sep={predicted.format.sep!r}."
        )
    if len(both) < len(have):
        lost = [c for c in have if c not in set(seen)]
        warnings.warn(
            f"{len(lost)} of {len(have)} predicted conditions have no observed cells and are not scored: {lost[:5]}.",
            stacklevel=5,
        )
    return both


def choose_genes(names: pd.Index, genes: Any) -> np.ndarray | None:
    """Return the columns to score, in the order of ``names``; ``None`` for all."""
    if genes is None:
        return None
    asked = np.asarray(genes)
    if asked.dtype == bool:
        if asked.shape != (len(names),):
            raise ValueError(f"genes is a mask of shape {asked.shape}, predicted has {len(names)} genes.")
        selected = np.flatnonzero(asked)
    else:
        position = names.get_indexer(pd.Index(asked.astype(str)))
        if (position < 0).any():
            first = asked[np.flatnonzero(position < 0)[0]]
            raise KeyError(f"genes: {(position < 0).sum()} are not in predicted.var_names.{hint(first, names)}")
        selected = np.unique(position)
    if not len(selected):
        raise ValueError("genes selects no gene: pass None for all of them.")
    return selected


def stored_prediction(predicted: Labelled, conditions: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the shifts that a prediction carries, and for references the control profile; ``None`` without."""
    provenance: Mapping[str, Any] = predicted.adata.uns.get(UNS_PROVENANCE_KEY, {})
    if "shifts" not in provenance:
        return None, None
    names = predicted.adata.var_names
    table = predicted_shifts(predicted.adata)
    table.index = pd.Index([predicted.format.canonical(label) for label in table.index], dtype=object)
    table = table.loc[~table.index.duplicated()]
    missing = [c for c in conditions if c not in table.index]
    if missing:
        raise KeyError(f"The shifts in predicted.uns lack {missing[0]!r}: pass the AnnData as it was predicted.")
    if len(table.columns) != len(names) or not table.columns.isin(names).all():
        raise ValueError(f"The shifts in predicted.uns have {len(table.columns)} genes, X {len(names)}: {ALL_GENES}")
    shifts = table.loc[list(conditions), names].to_numpy(dtype=np.float64)
    if "control_profile" not in provenance:
        return shifts, None
    profile = np.asarray(provenance["control_profile"], dtype=np.float64).ravel()
    if profile.shape != (len(names),):
        raise ValueError(f"The control profile in predicted.uns has {len(profile)} genes, X {len(names)}: {ALL_GENES}")
    return shifts, profile


def check_shared_controls(predicted: Labelled, observed: Labelled, train: Any, needing: Sequence[str]) -> None:
    """Raise when control cells stand behind the shifts of both sides."""
    used = predicted.control_names()
    if isinstance(train, Labelled):
        used |= train.control_names()
    shared = used & observed.control_names()
    if shared:
        raise ValueError(
            f"{len(shared)} control cells stand in both predicted and observed (such as {min(shared)!r}): their noise "
            f"would stand in both shifts and make {', '.join(needing)} look better. Pass disjoint control cells, for "
            "example predict from one half of the controls and observe the other, or ask for metrics that subtract no "
            "control: metrics=['l2_profile', 'pearson_delta_perturbed', 'energy_distance']."
        )


def usable(metrics: Sequence[Metric], lacking: Mapping[str, str], n_genes: int, explicit: bool) -> list[Metric]:
    """Return the metrics that can be computed; raise for one that was asked for by name, warn for others."""
    kept, reasons = [], []
    for metric in metrics:
        why = [f"{NEEDS[need]} ({lacking[need]})" for need in sorted(metric.needs) if need in lacking]
        if n_genes < metric.min_genes:
            why.append(f"at least {metric.min_genes} genes (there are {n_genes})")
        if not why:
            kept.append(metric)
            continue
        reasons.append(f"{metric.name} needs {' and '.join(why)}")
        if explicit:
            raise ValueError(f"The metric {reasons[-1]}.")
    if reasons:
        warnings.warn("Left out: " + "; ".join(reasons) + ".", stacklevel=5)
    return kept


def build(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    metrics: Sequence[Metric],
    explicit: bool,
    conditions: Sequence[str] | None,
    genes: Any,
    sep: str | None,
    layer: str | None,
    train: Any,
    max_cells: int,
    seed: int,
) -> tuple[Pair, list[Metric]]:
    """Return the pair of both sides and the metrics that can be computed on it."""
    format = LabelFormat.create(control, sep)
    left = Labelled.create(predicted, "predicted", perturbation_key, format)
    right = Labelled.create(observed, "observed", perturbation_key, format, layer)
    names = predicted.var_names
    columns, selected = same_genes(right, names), choose_genes(names, genes)
    scored = choose_conditions(left, right, conditions)
    shifts, control_profile = stored_prediction(left, scored)

    training = Training.create(train, perturbation_key, format, layer)
    lacking = training.lacking(scored, format)
    for side in (left, right):  # what observed lacks is named first
        if not len(side.control_rows):
            lacking["controls"] = f"{side.name} has no cells labelled {format.control[0]!r}"
            if side is right or shifts is None:  # shifts that a prediction carries need no control cells
                lacking["deltas"] = lacking["controls"]
    kept = usable(metrics, lacking, len(names) if selected is None else len(selected), explicit)
    needs = frozenset().union(*(m.needs for m in kept))
    subtracting = [m.name for m in kept if m.needs & {"deltas", "controls"}]
    if subtracting:
        behind = training.source if control_profile is not None else None
        check_shared_controls(left, right, behind, subtracting)

    def pick(values: np.ndarray) -> np.ndarray:
        return values if selected is None else values[..., selected]

    def cells(side: Labelled, rows: np.ndarray, wanted: bool) -> sp.csr_matrix:
        used = rows if wanted else rows[:0]
        return side.values(used, columns if side is right else None, selected)

    def draw(name: str, label: str, x: sp.csr_matrix) -> np.ndarray:
        return subsample(stream(seed, name, label), x.shape[0], max_cells)

    def few_controls(name: str, x: sp.csr_matrix, wanted: bool) -> sp.csr_matrix | None:
        return x[draw(f"{name} control", "", x)] if wanted and x.shape[0] else None

    of_left = [cells(left, left.rows(c), control_profile is None or "cells" in needs) for c in scored]
    of_right = [cells(right, right.rows(c), True) for c in scored]
    for_base, for_rest = "deltas" in needs, "observed_cells" in needs
    left_controls = cells(left, left.control_rows, "controls" in needs or (for_base and shifts is None))
    right_controls = cells(right, right.control_rows, bool(subtracting) or for_rest)
    ours, theirs = Side(of_left, left_controls), Side(of_right, right_controls)

    predicted_deltas = observed_deltas = None
    observed_profiles = theirs.profiles()
    if control_profile is not None and shifts is not None:
        predicted_profiles = pick(control_profile + shifts)
    else:
        predicted_profiles = ours.profiles()
    if for_base:
        base = ours.control_profile()
        predicted_deltas = pick(shifts) if shifts is not None else predicted_profiles - base
        observed_deltas = observed_profiles - theirs.control_profile()
    center, additive = training.read(names, scored, format, "additive" in needs, seed)
    sources = [left.sources(left.rows(c)[: x.shape[0]]) for c, x in zip(scored, of_left, strict=True)]
    draws = [spread(stream(seed, "predicted", c), codes, max_cells) for c, codes in zip(scored, sources, strict=True)]
    picks = [draw("observed", c, x) for c, x in zip(scored, of_right, strict=True)]
    comparison = Comparison(
        conditions=tuple(scored),
        genes=names if selected is None else names[selected],
        predicted_profiles=predicted_profiles,
        observed_profiles=observed_profiles,
        predicted_deltas=predicted_deltas,
        observed_deltas=observed_deltas,
        reference_profile=None if center is None else pick(center),
        predicted_cells=[m[p] for m, p in zip(of_left, draws, strict=True)],
        observed_cells=[m[p] for m, p in zip(of_right, picks, strict=True)],
        predicted_sources=[codes[p] for codes, p in zip(sources, draws, strict=True)],
        predicted_controls=few_controls("predicted", left_controls, "controls" in needs),
        observed_controls=few_controls("observed", right_controls, "controls" in needs or for_rest),
        additive=None if additive is None else (pick(additive[0]), pick(additive[1])),
    )
    n_predicted = np.array([len(left.rows(c)) for c in scored])
    return Pair(comparison, theirs, picks, n_predicted, np.array([m.shape[0] for m in of_right])), kept
