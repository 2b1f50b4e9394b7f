"""The registry of metrics: each one a function with its direction, range, requirements and source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import pandas as pd

from pertvae._labels import hint

if TYPE_CHECKING:
    from pertvae.metrics._comparison import Comparison

Direction = Literal["higher", "lower", "one"]
Level = Literal["condition", "pooled"]
Need = Literal["deltas", "reference_profile", "cells", "observed_cells", "controls", "additive"]

NEEDS: Final[dict[str, str]] = {
    "deltas": "shifts against controls on both sides",
    "reference_profile": "the mean of the training perturbed conditions",
    "cells": "single cells on both sides",
    "observed_cells": "observed single cells",
    "controls": "control cells on both sides",
    "additive": "sums of the training shifts of single perturbations",
}


@dataclass(frozen=True)
class Metric:
    """One metric.

    Parameters
    ----------
    name
        Its name in ``evaluate(metrics=[...])``.
    function
        Takes a :class:`pertvae.metrics.Comparison` and returns one value a condition (array), or one value for all
        conditions together when ``level`` is ``"pooled"``.
    direction
        ``"higher"`` or ``"lower"`` is better, or ``"one"``: 1 is right and both sides are wrong.
    range
        Smallest and largest possible value.
    level
        ``"condition"``: one value a condition, pooled as their mean. ``"pooled"``: conditions together only.
    needs
        What it uses beside the mean profiles: ``"deltas"``, ``"reference_profile"``, ``"cells"``,
        ``"observed_cells"``, ``"controls"``, ``"additive"``.
    min_genes
        Fewest genes with which it says anything.
    source
        Where it was defined.
    description
        One line.
    resampled
        Whether it is computed again for resampled observed cells; ``False`` for one that is too slow for that.
    """

    name: str
    function: Callable[[Comparison], Any]
    direction: Direction
    range: tuple[float, float]
    level: Level
    needs: frozenset[str]
    min_genes: int
    source: str
    description: str
    resampled: bool = True


_METRICS: dict[str, Metric] = {}
_GROUPS: dict[str, tuple[str, ...]] = {"jaccard_top_k": ("jaccard_top_20", "jaccard_top_50")}

registry: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""Every metric that :func:`pertvae.metrics.evaluate` can compute, by name. Read-only: add with :func:`register`."""


def register(
    name: str,
    *,
    direction: Direction,
    range: tuple[float, float],
    source: str,
    level: Level = "condition",
    needs: Iterable[Need] = (),
    min_genes: int = 1,
    resampled: bool = True,
) -> Callable[[Callable[[Comparison], Any]], Callable[[Comparison], Any]]:
    """Return a decorator that adds a function to the registry of metrics.

    Parameters
    ----------
    name
        Name of the metric.
    direction
        ``"higher"``, ``"lower"`` or ``"one"`` (1 is right).
    range
        Smallest and largest possible value.
    source
        Paper or equation that defines it.
    level
        ``"condition"`` for one value a condition, ``"pooled"`` for one value in all.
    needs
        What it uses beside mean profiles: ``"deltas"``, ``"reference_profile"``, ``"cells"`` (on both sides),
        ``"observed_cells"`` (also the observed controls where there are some), ``"controls"`` (control cells on both
        sides), ``"additive"`` (see :class:`pertvae.metrics.TrainingProfiles`).
    min_genes
        Fewest genes with which it says anything.
    resampled
        ``False`` for a metric that is too slow to be computed again for hundreds of resamplings of the observed cells:
        :func:`pertvae.metrics.evaluate` gives it no interval, :func:`pertvae.metrics.resample` leaves it out.

    Returns
    -------
    Callable
        A decorator. The function's first docstring line becomes the description.

    Raises
    ------
    ValueError
        If the name is taken, or a direction, level or requirement is unknown.

    Examples
    --------
    >>> import numpy as np, pertvae as pv
    >>> @pv.metrics.register("max_error", direction="lower", range=(0, np.inf), source="this example")
    ... def max_error(comparison):
    ...     "Largest error of the mean profile."
    ...     return np.abs(comparison.predicted_profiles - comparison.observed_profiles).max(axis=1)
    """
    if name in _METRICS or name in _GROUPS:
        raise ValueError(f"The metric {name!r} is registered already: choose another name.")
    for value, accepted, what in (
        (direction, ("higher", "lower", "one"), "direction"),
        (level, ("condition", "pooled"), "level"),
        *((need, tuple(NEEDS), "needs") for need in needs),
    ):
        if value not in accepted:
            raise ValueError(f"{what}={value!r} of the metric {name!r} is not one of {list(accepted)}.")

    def add(function: Callable[[Comparison], Any]) -> Callable[[Comparison], Any]:
        description = (function.__doc__ or "").strip().split("\n")[0]
        _METRICS[name] = Metric(
            name, function, direction, range, level, frozenset(needs), min_genes, source, description, resampled
        )
        return function

    return add


def resolve(metrics: str | Iterable[str] | None) -> list[Metric]:
    """Return the metrics of the names given (groups such as ``jaccard_top_k`` expanded); all for ``None``."""
    if metrics is None:
        return list(_METRICS.values())
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise ValueError(f"metrics is empty: pass None for all, or names of {list(_METRICS)}.")
    found: dict[str, Metric] = {}
    for name in names:
        for single in _GROUPS.get(name, (name,)):
            if single not in _METRICS:
                known = [*_METRICS, *_GROUPS]
                raise ValueError(f"metrics: {name!r} is not a metric.{hint(name, known)} All: {known}.")
            found[single] = _METRICS[single]
    return list(found.values())


def list_metrics() -> pd.DataFrame:
    """List the registered metrics.

    Returns
    -------
    DataFrame
        One row a metric, indexed by name: ``direction`` (better when higher, lower or at one), ``lowest`` and
        ``highest`` possible value, ``level``, ``needs``, ``min_genes``, ``resampled`` (whether it gets an interval
        from resampled observed cells), ``source``, ``description``.
    """
    rows = []
    for metric in _METRICS.values():
        row = {f.name: getattr(metric, f.name) for f in fields(metric) if f.name not in ("function", "range", "needs")}
        rows.append({**row, "lowest": metric.range[0], "highest": metric.range[1], "needs": sorted(metric.needs)})
    columns = ["direction", "lowest", "highest", "level", "needs", "min_genes", "resampled", "source", "description"]
    return pd.DataFrame(rows).set_index("name")[columns]
