"""Scoring of one fold: which genes, against which cells, around which center."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._expression import group_profiles, mean_profile, row_blocks
from pertvae._labels import canonical_labels, is_control
from pertvae._predictions import Block, predicted_shifts, prediction_anndata
from pertvae.benchmark._folds import Fold, Unit
from pertvae.datasets import Truth
from pertvae.metrics import Metric, TrainingProfiles, registry, training_profiles
from pertvae.metrics._evaluate import evaluate_with_draws

if TYPE_CHECKING:
    from pertvae.benchmark._cloud import Cloud

POOLED = "pooled"
MIN_DETECTED = 0.02
MAX_GENES = 1000
N_RESAMPLES = 200
_COLUMNS = ["unit", "metric", "value", "lower", "upper"]


def scoring_genes(x: Any, rows: np.ndarray) -> np.ndarray:
    """Return a mask of genes detected in more than 2% of some cells, at most the 1,000 with the highest mean.

    Parameters
    ----------
    x
        Counts, cells x genes.
    rows
        Training cells; no other cell is looked at.
    """
    detected = np.zeros(x.shape[1])
    for _, block in row_blocks(x, rows):
        detected += np.asarray((block > 0).sum(axis=0)).ravel()
    chosen = np.flatnonzero(detected > MIN_DETECTED * len(rows))
    if not len(chosen):
        raise ValueError(
            f"No gene is detected in more than {MIN_DETECTED:.0%} of the {len(rows)} training cells: there is nothing "
            "to score. Check that the layer holds raw counts."
        )
    mean = mean_profile(x, rows)
    chosen = chosen[np.argsort(-mean[chosen], kind="stable")[:MAX_GENES]]
    mask = np.zeros(len(mean), dtype=bool)
    mask[chosen] = True
    return mask


@dataclass
class Scorer:
    """Held-out cells of one fold, and how predictions are scored against them.

    Parameters
    ----------
    adata
        All cells of the fold, counts in ``X``.
    fold
        The fold.
    perturbation_key, control, sep, labels_key
        As in :func:`pertvae.benchmark.run`.
    metrics
        Metrics asked for; those that the data do not allow are left out (``left_out`` says why).
    keep_draws
        Keep the scores of resampled held-out cells, for intervals of differences.
    """

    adata: AnnData
    fold: Fold
    perturbation_key: str
    control: Sequence[str]
    sep: str | None
    labels_key: str | None
    metrics: Sequence[Metric]
    keep_draws: bool

    def __post_init__(self) -> None:
        self.labels = canonical_labels(self.adata.obs[self.perturbation_key], self.control, self.sep).astype(str)
        self.is_control = is_control(self.adata.obs[self.perturbation_key], self.control, self.sep)
        contexts = self.adata.obs[self.labels_key].astype(str) if self.labels_key else pd.Series("", self.labels.index)
        self.contexts = contexts.str.strip().to_numpy()
        train = np.flatnonzero(self.fold.common_rows())
        self.genes = scoring_genes(self.adata.X, train)
        self.training = self._training(train)
        self.observed = {c: self._observed(c) for c in self.fold.contexts}
        lacking = {}
        if not all(self.control_rows(c, "test").size > 1 for c in self.fold.contexts):
            lacking = dict.fromkeys(("deltas", "controls"), "no control cells are held out")
        if any(t.additive is None for t in self.training.values()):
            lacking["additive"] = "no held-out combination has all its components as singles in training"
        self.usable, self.left_out = [], []
        for metric in self.metrics:
            why = [lacking[n] for n in metric.needs if n in lacking]
            if self.genes.sum() < metric.min_genes:
                why.append(f"fewer than {metric.min_genes} genes are scored")
            if why:
                self.left_out.append(f"{metric.name}: {why[0]}")
            else:
                self.usable.append(metric.name)
        self.truth = self._truth()
        self.table = pd.DataFrame()
        self.cloud: Cloud | None = None

    def release(self) -> None:
        """Forget the cells, once everything is scored: what is left says what was scored."""
        self.cloud = None
        del self.adata, self.observed

    @property
    def gene_names(self) -> pd.Index:
        """Names of the genes that are scored."""
        return self.adata.var_names[self.genes]

    def control_rows(self, context: str, split: str) -> np.ndarray:
        """Return the control cells of a split and context."""
        return np.flatnonzero(self.is_control & self.fold.rows(split) & (self.contexts == context))

    def units(self, context: str) -> list[Unit]:
        """Return what is asked in one context."""
        return [u for u in self.fold.units if u.context == context]

    def n_observed(self, unit: Unit) -> int:
        """Return the number of held-out cells of a unit."""
        return len(self.cells(unit))

    def score(
        self, predicted: Mapping[str, AnnData], metrics: Sequence[str] | None = None
    ) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        """Score one prediction a context.

        Returns
        -------
        Scores (unit, metric, value, lower, upper), and by metric those with the held-out cells resampled, units x
        draws; without any where draws are not kept.
        """
        names = [m for m in self.usable if metrics is None or m in metrics]
        tables, drawn = [], []
        for c, p in predicted.items():
            table, draws = evaluate_with_draws(
                p, self.observed[c], **self.arguments(c), metrics=names, n_resamples=N_RESAMPLES
            )
            tables.append(self.named(table, c))
            draws = draws[draws["level"] == "condition"]
            drawn.append(draws.assign(unit=[_unit_name(label, c) for label in draws["condition"]]))
        if not self.keep_draws:
            return self.joined(tables), {}
        found = pd.concat(drawn).groupby("metric")
        wide = {str(m): rows.pivot(index="unit", columns="resample", values="value") for m, rows in found}
        return self.joined(tables), wide

    def shifts(self, predicted: Mapping[str, AnnData]) -> pd.DataFrame:
        """Return predicted shifts of the scored genes, units x genes."""
        parts = []
        for context, prediction in predicted.items():
            table = predicted_shifts(prediction)
            labels = canonical_labels(pd.Series(table.index, name="label"), self.control, self.sep).astype(str)
            parts.append(table.set_axis([_unit_name(label, context) for label in labels], axis=0)[self.gene_names])
        return pd.concat(parts)

    def oracle(self, truth: Truth) -> tuple[dict[str, AnnData], list[str]]:
        """Return the expected profiles of a simulated screen as a prediction, and the metrics it can be scored on."""
        genes = self.adata.var_names
        labels = [u.label for u in self.fold.units]
        known = {str(c): c for c in truth.shifts.index}
        shifts = truth.shifts.loc[[known[label] for label in labels]].set_axis(labels, axis=0)[list(genes)]
        made = self.as_prediction(shifts, truth.control_profile.loc[genes].to_numpy(dtype=float), "oracle")
        return {"": made}, [m for m in self.usable if not registry[m].needs & {"cells", "controls"}]

    def as_prediction(self, shifts: pd.DataFrame, control_profile: np.ndarray, name: str) -> AnnData:
        """Return exact shifts (labels x all genes) and a control profile as a prediction without real cells."""
        empty = sp.csr_matrix((1, shifts.shape[1]), dtype=np.float32)
        blocks = [Block(str(label), empty, pd.DataFrame(index=[name])) for label in shifts.index]
        controls = Block(self.control[0], empty[:0], pd.DataFrame(index=pd.Index([], dtype=object)))
        provenance = {"model": name, "control_profile": control_profile}
        var = pd.DataFrame(index=shifts.columns)
        return prediction_anndata(blocks, controls, var, self.perturbation_key, shifts, "exact", provenance)

    def arguments(self, context: str) -> dict[str, Any]:
        """Return the arguments of ``evaluate`` in a context."""
        return {
            "perturbation_key": self.perturbation_key,
            "control": list(self.control),
            "sep": self.sep,
            "genes": self.genes,
            "train": self.training[context],
        }

    def named(self, table: pd.DataFrame, context: str) -> pd.DataFrame:
        """Return scores with the names of units; pooled rows only of metrics that take all conditions at once."""
        pooled = table["level"] == POOLED
        keep = ~pooled | table["metric"].map(lambda m: registry[m].level == POOLED)
        unit = [POOLED if p else _unit_name(c, context) for c, p in zip(table["condition"], pooled, strict=True)]
        return table.assign(unit=unit)[keep]

    @staticmethod
    def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """Join tables; a metric over all conditions is averaged over contexts."""
        joined = pd.concat(tables, ignore_index=True).reindex(columns=_COLUMNS)
        pooled = joined["unit"] == POOLED
        if pooled.any():
            means = (
                joined[pooled]
                .groupby(["unit", "metric"], sort=False, as_index=False)[["value", "lower", "upper"]]
                .mean()
            )
            joined = pd.concat([joined[~pooled], means], ignore_index=True)
        return joined

    def canonical(self, labels: pd.Series) -> np.ndarray:
        """Return canonical labels as text."""
        return canonical_labels(labels, self.control, self.sep).astype(str).to_numpy()

    def cells(self, unit: Unit) -> np.ndarray:
        """Return the held-out cells of a unit."""
        chosen = (self.labels == unit.label).to_numpy() & self.fold.rows("test") & (self.contexts == unit.context)
        return np.flatnonzero(chosen)

    def _observed(self, context: str) -> AnnData:
        rows = np.concatenate([*(self.cells(u) for u in self.units(context)), self.control_rows(context, "test")])
        obs = self.adata.obs[[self.perturbation_key]].iloc[rows]
        return AnnData(X=self.adata.X[rows], obs=obs.astype(str), var=pd.DataFrame(index=self.adata.var_names))

    def _training(self, train: np.ndarray) -> dict[str, TrainingProfiles]:
        """Return in each context what metrics need of the training cells.

        Sums of single shifts are for screens without contexts: in a new context there are none.
        """
        centers = self._centers(train)
        if list(centers) != [""]:
            return {c: TrainingProfiles(center) for c, center in centers.items()}
        cells = AnnData(
            X=self.adata.X[train],
            obs=self.adata.obs[[self.perturbation_key]].iloc[train],
            var=pd.DataFrame(index=self.adata.var_names),
        )
        found = training_profiles(
            cells, self.perturbation_key, self.control, combinations=[u.label for u in self.fold.units], sep=self.sep
        )
        return {"": replace(found, center=centers[""])}

    def _centers(self, train: np.ndarray) -> dict[str, pd.Series]:
        """Return in each context the mean profile of the training perturbed conditions.

        That is the training controls' profile plus the mean shift of the training conditions, each against the
        controls of its own context: with one context the same, and defined in a context without perturbed cells.
        """
        names, codes = np.unique(
            np.char.add(np.char.add(self.contexts.astype(str), "\x1f"), self.labels.to_numpy(dtype=str)),
            return_inverse=True,
        )
        codes = np.where(self.fold.common_rows(), codes, -1)
        profiles, counts = group_profiles(self.adata.X, codes, len(names))
        control_label = self.labels.to_numpy(dtype=str)[self.is_control][0]
        context_of = [n.split("\x1f")[0] for n in names]
        is_control_group = np.array([n.split("\x1f")[1] == control_label for n in names])
        controls = {c: p for c, p, k, n in zip(context_of, profiles, is_control_group, counts, strict=True) if k and n}
        pooled = mean_profile(self.adata.X, train[self.is_control[train]])
        moved = [
            profile - controls.get(context, pooled)
            for context, profile, is_c, n in zip(context_of, profiles, is_control_group, counts, strict=True)
            if n and not is_c
        ]
        shift = np.mean(moved, axis=0)
        genes = self.adata.var_names
        return {c: pd.Series(controls.get(c, pooled) + shift, index=genes) for c in self.fold.contexts}

    def _truth(self) -> pd.DataFrame:
        """Return observed shifts of the scored genes, units x genes: against held-out controls where there are some."""
        rows = []
        for unit in self.fold.units:
            controls = self.control_rows(unit.context, "test")
            if not len(controls):
                controls = self.control_rows(unit.context, "train")
            shift = mean_profile(self.adata.X, self.cells(unit)) - mean_profile(self.adata.X, controls)
            rows.append(shift[self.genes])
        return pd.DataFrame(np.stack(rows), index=[u.name for u in self.fold.units], columns=self.gene_names)


def _unit_name(label: str, context: str) -> str:
    return Unit(label, context, "").name
