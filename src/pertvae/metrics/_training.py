"""What metrics need of the training cells: the mean of their perturbed conditions, and sums of single shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae._expression import group_profiles
from pertvae._labels import LabelFormat
from pertvae.metrics._comparison import stream
from pertvae.metrics._labelled import Labelled, same_genes

MIN_CELLS = 4
"""Fewest training cells of a single perturbation, and of the control, that are split in halves of two or more."""


@dataclass(frozen=True, eq=False)
class TrainingProfiles:
    """What :func:`pertvae.metrics.evaluate` needs of the training cells, computed once for many predictions.

    Parameters
    ----------
    center
        Mean over the training perturbed conditions of their mean profiles (log1p CP10k), genes as index; each
        condition counts once.
    additive
        For combinations, the sum over their components of the shifts of the single perturbations (mean profile minus
        that of the training controls): two tables, canonical labels x genes, from two disjoint halves of the training
        cells, so that their errors are independent. ``None`` when no combination has such a sum.
    """

    center: pd.Series
    additive: tuple[pd.DataFrame, pd.DataFrame] | None = None


def training_profiles(
    train: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    combinations: Sequence[str],
    sep: str | None = "+",
    layer: str | None = None,
    seed: int = 0,
) -> TrainingProfiles:
    """Return the mean profile of the training conditions, and sums of single shifts from two halves of the cells.

    Parameters
    ----------
    train
        Training cells, counts in ``X`` or ``layer``. log1p CP10k is taken over all of its genes.
    perturbation_key
        Label column.
    control
        Control label or labels.
    combinations
        Labels whose components' shifts are summed. A sum is made only where every component has at least 4 training
        cells under its single label, and the control too: the others, and labels of one component, are left out.
    sep
        Separator of components; ``None`` when every label is one perturbation.
    layer
        Layer of the counts; ``None`` for ``X``.
    seed
        Of the random halves, drawn within each single perturbation and the control.

    Returns
    -------
    TrainingProfiles
        For ``evaluate(train=...)``, with the genes of ``train``.

    Raises
    ------
    TypeError
        If ``train`` is no AnnData.
    KeyError
        If the label column or the layer is missing.
    ValueError
        If there are no perturbed cells.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> pairs = [c for c in adata.obs["perturbation"].cat.categories if "+" in c]
    >>> profiles = pv.metrics.training_profiles(adata, "perturbation", "control", combinations=pairs)
    """
    if not isinstance(train, ad.AnnData):
        raise TypeError(f"train is a {type(train).__name__}: pass the AnnData of the training cells.")
    format = LabelFormat.create(control, sep)
    side = Labelled.create(train, "train", perturbation_key, format, layer)
    return summarise(side, train.var_names, list(dict.fromkeys(map(format.canonical, combinations))), seed)


def summable(side: Labelled, conditions: Sequence[str]) -> list[str]:
    """Return the combinations whose components, and the control, have enough training cells to be split."""
    names, counts = np.unique(side.labels, return_counts=True)
    enough = set(names[counts >= MIN_CELLS])
    if side.format.control[0] not in enough:
        return []
    parts = {c: side.format.components(c) for c in conditions}
    return [c for c, components in parts.items() if len(components) > 1 and enough.issuperset(components)]


def summarise(side: Labelled, names: pd.Index, combinations: Sequence[str], seed: int) -> TrainingProfiles:
    """Return center and additive sums on the genes given, with one visit of the cells."""
    control = side.format.control[0]
    conditions = side.condition_labels
    if not conditions:
        raise ValueError(f"train has no perturbed cells: all of its {side.adata.n_obs} cells are {control!r}.")
    summed = summable(side, combinations)
    halved = sorted({p for c in summed for p in side.format.components(c)})
    groups = [*conditions, control] if summed else conditions
    position = {name: i for i, name in enumerate(groups)}
    codes = pd.Index(groups).get_indexer(pd.Index(side.labels))
    second: dict[str, int] = {}  # the second half of a group is a group of its own
    for name in [*halved, control] if summed else []:
        rows = np.flatnonzero(side.labels == name)
        second[name] = len(groups) + len(second)
        codes[stream(seed, "training half", name).permutation(rows)[: len(rows) // 2]] = second[name]
    columns = same_genes(side, names)
    x = side.counts if columns is None else side.counts[:, columns]
    profiles, counts = group_profiles(x, codes, len(groups) + len(second))

    whole = profiles[: len(conditions)].copy()
    for name in halved:
        both = [position[name], second[name]]
        whole[position[name]] = counts[both] @ profiles[both] / counts[both].sum()
    center = pd.Series(whole.mean(axis=0), index=names)
    if not summed:
        return TrainingProfiles(center)
    first_sums, second_sums = (
        pd.DataFrame([_sum(profiles, at, side.format, c) for c in summed], index=summed, columns=names)
        for at in (position, second)
    )
    return TrainingProfiles(center, (first_sums, second_sums))


def _sum(profiles: np.ndarray, at: dict[str, int], format: LabelFormat, label: str) -> np.ndarray:
    """Return the sum of the shifts of the components of a label, from the groups of one half."""
    rows = [at[component] for component in format.components(label)]
    return (profiles[rows] - profiles[at[format.control[0]]]).sum(axis=0)


@dataclass(frozen=True)
class Training:
    """What was passed as ``train``, read when it is known what the metrics need.

    Parameters
    ----------
    source
        The cells, the profiles computed from them, or ``None``.
    """

    source: Labelled | TrainingProfiles | None

    @classmethod
    def create(cls, train: Any, perturbation_key: str, format: LabelFormat, layer: str | None) -> Training:
        """Check the type; a Series stands for profiles without sums."""
        if train is None or isinstance(train, TrainingProfiles):
            return cls(train)
        if isinstance(train, pd.Series):
            return cls(TrainingProfiles(train))
        if isinstance(train, ad.AnnData):
            return cls(Labelled.create(train, "train", perturbation_key, format, layer))
        raise TypeError(
            f"train is a {type(train).__name__}: pass the training AnnData, what training_profiles made of it, or a "
            "Series with one value a gene."
        )

    def lacking(self, conditions: Sequence[str], format: LabelFormat) -> dict[str, str]:
        """Return which needs of metrics cannot be met for these conditions, and why."""
        if self.source is None:
            why = "pass train=, the training cells"
            return {"reference_profile": why, "additive": why}
        if isinstance(self.source, Labelled):
            known = set(summable(self.source, conditions))
        elif self.source.additive is None:
            return {"additive": "train holds no such sums: pass the training cells, or what training_profiles returns"}
        else:
            known = {format.canonical(label) for label in self.source.additive[0].index}
        if known.isdisjoint(conditions):
            return {
                "additive": f"no scored condition is a combination of perturbations with {MIN_CELLS} training cells "
                "each under their single labels"
            }
        return {}

    def read(
        self, names: pd.Index, conditions: Sequence[str], format: LabelFormat, additive: bool, seed: int
    ) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
        """Return the center, and conditions x genes sums with NaN rows where they are unknown."""
        if self.source is None:
            return None, None
        profiles = self.source
        if isinstance(profiles, Labelled):
            profiles = summarise(profiles, names, list(conditions) if additive else [], seed)
        center = _on_genes(profiles.center.to_frame().T, names)[0]
        if not additive or profiles.additive is None:
            return center, None
        first, second = (
            _on_genes(t.set_axis([format.canonical(c) for c in t.index], axis=0).reindex(list(conditions)), names)
            for t in profiles.additive
        )
        return center, (first, second)


def _on_genes(table: pd.DataFrame, names: pd.Index) -> np.ndarray:
    """Return the columns of a table that are ``names``, or raise."""
    missing = names[~names.isin(table.columns)]
    if len(missing):
        raise KeyError(f"train lacks {len(missing)} of the predicted genes, first {list(missing[:5])}.")
    return table[names].to_numpy(dtype=np.float64)
