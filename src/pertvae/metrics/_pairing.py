"""From two AnnData to one comparison: labels, genes, controls, and the shifts that predictions carry."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._expression import group_profiles, log1p_cp10k, row_blocks
from pertvae._labels import LabelFormat, canonical_labels, hint, require_column
from pertvae._predictions import predicted_shifts
from pertvae.metrics._comparison import Comparison, Pair, Side, stream
from pertvae.metrics._distribution import subsample
from pertvae.metrics._registry import NEEDS, Metric

ALL_GENES = "pass the prediction with all its genes and choose with genes=..."


@dataclass(frozen=True)
class Labelled:
    """An AnnData with the canonical label of each cell.

    Parameters
    ----------
    adata
        The cells.
    name
        What messages call it: ``"predicted"``, ``"observed"`` or ``"train"``.
    labels
        Canonical label of each cell.
    format
        How labels are written.
    layer
        Layer of the counts; ``None`` for X.
    """

    adata: ad.AnnData
    name: str
    labels: np.ndarray
    format: LabelFormat
    layer: str | None = None

    @classmethod
    def create(
        cls, adata: ad.AnnData, name: str, perturbation_key: str, format: LabelFormat, layer: str | None = None
    ) -> Labelled:
        """Check the label column and the layer, and parse the labels."""
        require_column(adata.obs, perturbation_key, f"{name}.obs", "perturbation_key")
        if layer is not None and layer not in adata.layers:
            raise KeyError(f"layer={layer!r} is not a layer of {name}.{hint(layer, adata.layers.keys())}")
        labels = canonical_labels(adata.obs[perturbation_key], format.control, format.sep)
        return cls(adata, name, labels.astype(str).to_numpy(), format, layer)

    @property
    def counts(self) -> Any:
        """Return the matrix of counts."""
        return self.adata.X if self.layer is None else self.adata.layers[self.layer]

    @property
    def generated(self) -> np.ndarray:
        """Return which cells may stand for a condition: all, or in a prediction the generated ones."""
        column = self.adata.obs.get("generated")
        return np.ones(self.adata.n_obs, dtype=bool) if column is None else column.to_numpy().astype(bool)

    @property
    def control_rows(self) -> np.ndarray:
        """Return the control cells: in a prediction the source cells, or generated controls where there are none."""
        control = self.labels == self.format.control[0]
        source = control & ~self.generated
        return np.flatnonzero(source if source.any() else control)

    @property
    def condition_labels(self) -> list[str]:
        """Return the conditions that have cells, in order of appearance."""
        rows = self.generated & (self.labels != self.format.control[0])
        return list(pd.unique(self.labels[rows]))

    def rows(self, condition: str) -> np.ndarray:
        """Return the cells of a condition."""
        return np.flatnonzero((self.labels == condition) & self.generated)

    def control_names(self) -> set[str]:
        """Return the names of the control cells; in a prediction those of the cells they were copied from."""
        obs = self.adata.obs.iloc[self.control_rows]
        return set((obs["source_cell"] if "source_cell" in obs else obs.index.to_series()).astype(str))

    def values(self, rows: np.ndarray, columns: np.ndarray | None, selected: np.ndarray | None) -> sp.csr_matrix:
        """Return log1p CP10k of some cells: sums over ``columns``, then only the ``selected`` of them."""
        blocks: list[sp.csr_matrix] = []
        for _, block in row_blocks(self.counts, rows):
            block = block if columns is None else block[:, columns]
            data = block.data if sp.issparse(block) else block
            if data.size and (not np.isfinite(data).all() or data.min() < 0):
                raise ValueError(
                    f"{self.name} has negative or non-finite values in {self._place}: metrics take counts. Put counts "
                    "in X" + (", or name their layer with layer=..." if self.name != "predicted" else ".")
                )
            if data.size and not blocks and (data != np.round(data)).any():
                self._not_whole()
            y = log1p_cp10k(block)
            blocks.append(sp.csr_matrix(y if selected is None else y[:, selected]))
        if blocks:
            return sp.vstack(blocks, format="csr")
        width = self.adata.n_vars if columns is None else len(columns)
        return sp.csr_matrix((0, width if selected is None else len(selected)))

    @property
    def _place(self) -> str:
        return "X" if self.layer is None else f"layers[{self.layer!r}]"

    def _not_whole(self) -> None:
        if self.layer is None and "log1p" in self.adata.uns:
            raise ValueError(
                f"{self.name}.X is log-transformed (uns['log1p'] says so): metrics take counts and do log1p CP10k "
                "themselves." + (" Name the layer of the counts with layer=..." if self.name != "predicted" else "")
            )
        warnings.warn(
            f"{self.name} holds values that are not whole numbers in {self._place}. Metrics are defined on counts: "
            "predict with output='counts', and profiles are means over sampled cells.",
            stacklevel=5,
        )


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
            stacklevel=4,
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


def same_genes(side: Labelled, names: pd.Index) -> np.ndarray | None:
    """Return the columns of ``side`` that are ``names``, or ``None`` when they are its columns already."""
    if side.adata.var_names.equals(names):
        return None
    position = side.adata.var_names.get_indexer(names)
    if (position < 0).any():
        missing = list(names[position < 0])
        raise ValueError(
            f"{len(missing)} predicted genes are missing in {side.name}, first {missing[:5]}: both need the genes "
            "that were registered, because log1p CP10k is taken over all of them."
        )
    return position


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


def training_center(
    train: Any, names: pd.Index, *, perturbation_key: str, format: LabelFormat, layer: Any
) -> np.ndarray:
    """Return the mean over training perturbed conditions of their mean profiles, or the profile given."""
    if isinstance(train, pd.Series):
        missing = names[~names.isin(train.index)]
        if len(missing):
            raise KeyError(f"train lacks {len(missing)} of the predicted genes, first {list(missing[:5])}.")
        return train.loc[names].to_numpy(dtype=np.float64)
    if not isinstance(train, ad.AnnData):
        raise TypeError(
            f"train is a {type(train).__name__}: pass the training AnnData, or a Series with one value a gene."
        )
    side = Labelled.create(train, "train", perturbation_key, format, layer)
    conditions = side.condition_labels
    if not conditions:
        raise ValueError(f"train has no perturbed cells: all of its {train.n_obs} cells are {format.control[0]!r}.")
    codes = pd.Index(conditions).get_indexer(pd.Index(side.labels))
    columns = same_genes(side, names)
    x = side.counts if columns is None else side.counts[:, columns]
    return group_profiles(x, codes, len(conditions))[0].mean(axis=0)


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
        warnings.warn("Left out: " + "; ".join(reasons) + ".", stacklevel=4)
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

    lacking = {}
    if not len(right.control_rows):
        lacking["deltas"] = f"observed has no cells labelled {format.control[0]!r}"
    elif shifts is None and not len(left.control_rows):
        lacking["deltas"] = f"predicted has no cells labelled {format.control[0]!r}"
    if train is None:
        lacking["reference_profile"] = "pass train=, the training cells"
    kept = usable(metrics, lacking, len(names) if selected is None else len(selected), explicit)
    needing = [m.name for m in kept if "deltas" in m.needs]
    if needing:
        behind = None
        if control_profile is not None and isinstance(train, ad.AnnData):
            behind = Labelled.create(train, "train", perturbation_key, format, layer)
        check_shared_controls(left, right, behind, needing)

    def pick(values: np.ndarray) -> np.ndarray:
        return values if selected is None else values[..., selected]

    no_cells = np.array([], dtype=int)
    wanted = control_profile is None or any("cells" in m.needs for m in kept)
    of_left = [left.values(left.rows(c) if wanted else no_cells, None, selected) for c in scored]
    left_controls = left.values(left.control_rows if needing and shifts is None else no_cells, None, selected)
    of_right = [right.values(right.rows(c), columns, selected) for c in scored]
    right_controls = right.values(right.control_rows if needing else no_cells, columns, selected)
    ours, theirs = Side(of_left, left_controls), Side(of_right, right_controls)

    predicted_deltas = observed_deltas = None
    observed_profiles = theirs.profiles()
    if control_profile is not None and shifts is not None:
        predicted_profiles = pick(control_profile + shifts)
    else:
        predicted_profiles = ours.profiles()
    if needing:
        base = ours.control_profile()
        predicted_deltas = pick(shifts) if shifts is not None else predicted_profiles - base
        observed_deltas = observed_profiles - theirs.control_profile()
    center = None
    if train is not None:
        center = pick(training_center(train, names, perturbation_key=perturbation_key, format=format, layer=layer))
    picks = [
        subsample(stream(seed, "observed", c), m.shape[0], max_cells) for c, m in zip(scored, of_right, strict=True)
    ]
    draws = [
        subsample(stream(seed, "predicted", c), m.shape[0], max_cells) for c, m in zip(scored, of_left, strict=True)
    ]
    comparison = Comparison(
        conditions=tuple(scored),
        genes=names if selected is None else names[selected],
        predicted_profiles=predicted_profiles,
        observed_profiles=observed_profiles,
        predicted_deltas=predicted_deltas,
        observed_deltas=observed_deltas,
        reference_profile=center,
        predicted_cells=[m[p] for m, p in zip(of_left, draws, strict=True)],
        observed_cells=[m[p] for m, p in zip(of_right, picks, strict=True)],
    )
    n_predicted = np.array([len(left.rows(c)) for c in scored])
    return Pair(comparison, theirs, picks, n_predicted, np.array([m.shape[0] for m in of_right])), kept
