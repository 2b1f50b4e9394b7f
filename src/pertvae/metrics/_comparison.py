"""Predicted against observed cells on one scale: what every metric is computed from."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp


def stream(seed: int, name: str, label: str) -> np.random.Generator:
    """Return the random generator of one purpose and one condition, so that conditions do not depend on each other."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(label.encode())])


@dataclass
class Side:
    """Cells of one AnnData, log1p CP10k, grouped by condition.

    Parameters
    ----------
    cells
        CSR matrix a condition, cells x genes.
    controls
        The same for control cells; no rows when there are none.
    """

    cells: list[sp.csr_matrix]
    controls: sp.csr_matrix

    def profiles(self) -> np.ndarray:
        """Return the mean profile of every condition, conditions x genes."""
        return np.stack([mean_rows(c) for c in self.cells])

    def control_profile(self) -> np.ndarray | None:
        """Return the mean profile of the controls, ``None`` without controls."""
        return mean_rows(self.controls) if self.controls.shape[0] else None


def mean_rows(x: sp.csr_matrix) -> np.ndarray:
    """Return the mean of the rows of a sparse matrix as a vector."""
    return np.asarray(x.mean(axis=0), dtype=np.float64).ravel()


@dataclass(frozen=True)
class Comparison:
    """What a metric sees. Profiles are means over cells of log1p CP10k; deltas are shifts against controls.

    Parameters
    ----------
    conditions
        Canonical labels, in the order of the rows below.
    genes
        Genes, in the order of the columns below.
    predicted_profiles, observed_profiles
        Conditions x genes.
    predicted_deltas, observed_deltas
        Conditions x genes, each against its own object's controls; ``None`` when a side has none.
    reference_profile
        Mean over the training perturbed conditions of their mean profiles, one value a gene; ``None`` when not given.
    predicted_cells, observed_cells
        Cells a condition (CSR, cells x genes), at most ``max_cells`` of each, drawn without replacement.
    observed_weights
        Weight of each of the ``observed_cells`` in a resampling; ``None`` when every cell counts once.
    predicted_sources
        Code of the source of each of the ``predicted_cells``: cells of one source are no independent draws. Cells of
        distinct sources come first, in random order. ``None`` when every cell has its own.
    cache
        For what a metric wants to keep between the resamplings of one comparison.
    predicted_controls, observed_controls
        Control cells of each side (CSR, cells x genes), at most ``max_cells`` of each, drawn without replacement; of a
        prediction its source cells. ``None`` when the side has none or no metric needs them. They are the same in
        every resampling.
    additive
        Sums of the training shifts of the components, conditions x genes, once from each of two disjoint halves of
        the training cells; NaN rows where unknown, ``None`` when no metric needs them.
    """

    conditions: tuple[str, ...]
    genes: pd.Index
    predicted_profiles: np.ndarray
    observed_profiles: np.ndarray
    predicted_deltas: np.ndarray | None
    observed_deltas: np.ndarray | None
    reference_profile: np.ndarray | None
    predicted_cells: list[sp.csr_matrix]
    observed_cells: list[sp.csr_matrix]
    observed_weights: list[np.ndarray] | None = None
    predicted_sources: list[np.ndarray] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)
    predicted_controls: sp.csr_matrix | None = None
    observed_controls: sp.csr_matrix | None = None
    additive: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def deltas(self) -> tuple[np.ndarray, np.ndarray]:
        """Return predicted and observed deltas; a metric that declares the need ``"deltas"`` may rely on them."""
        if self.predicted_deltas is None or self.observed_deltas is None:
            raise ValueError('There are no shifts against controls: register the metric with needs=("deltas",).')
        return self.predicted_deltas, self.observed_deltas


@dataclass(frozen=True)
class Pair:
    """Both sides, their comparison, and how to resample the observed cells.

    Parameters
    ----------
    comparison
        The comparison of all cells.
    observed
        The observed cells, all of them.
    picks
        Which observed cells of each condition stand in ``comparison.observed_cells``.
    n_predicted, n_observed
        Cells a condition.
    """

    comparison: Comparison
    observed: Side
    picks: Sequence[np.ndarray]
    n_predicted: np.ndarray
    n_observed: np.ndarray

    def resampled(self, n: int, seed: int, chunk: int = 50) -> Iterator[Comparison]:
        """Yield comparisons in which observed cells are drawn with replacement, within each condition and control.

        The draws depend on ``seed``, the condition and its number of cells only: two predictions of the same observed
        cells meet the same resamplings.
        """
        names = self.comparison.conditions
        streams = [stream(seed, "resample", name) for name in names]
        control_stream = stream(seed, "resample control", "")
        with_controls = self.comparison.observed_deltas is not None
        for start in range(0, n, chunk):
            size = min(chunk, n - start)
            weights = [multinomial(s, c.shape[0], size) for s, c in zip(streams, self.observed.cells, strict=True)]
            # one product a condition for the whole chunk: (genes x cells) @ (cells x resamplings)
            profiles = np.stack(
                [(c.T @ w.T).T / c.shape[0] for c, w in zip(self.observed.cells, weights, strict=True)], axis=1
            )
            controls = None
            if with_controls:
                drawn = multinomial(control_stream, self.observed.controls.shape[0], size)
                controls = (self.observed.controls.T @ drawn.T).T / drawn.shape[1]
            for i in range(size):
                yield replace(
                    self.comparison,
                    observed_profiles=profiles[i],
                    observed_deltas=None if controls is None else profiles[i] - controls[i],
                    observed_weights=[w[i][p] for w, p in zip(weights, self.picks, strict=True)],
                )


def multinomial(rng: np.random.Generator, cells: int, n: int) -> np.ndarray:
    """Return how often each of ``cells`` cells is drawn in each of ``n`` resamplings, resamplings x cells."""
    return rng.multinomial(cells, np.full(cells, 1.0 / cells), size=n).astype(np.float64)
