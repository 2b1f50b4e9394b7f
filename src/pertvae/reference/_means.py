"""References that add up or average observed mean shifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pertvae._expression import log1p_cp10k
from pertvae.reference._base import Reference
from pertvae.reference._pca import principal_components
from pertvae.reference._training import Training

MAX_PCA_CELLS = 20_000
"""Training cells on which principal components are found."""


class NoChange(Reference):
    """Every perturbation leaves the controls as they are: shift zero.

    The reference that absolute measures (R2 or correlation of expression) can not tell from a good model.
    """

    _needs_perturbed = False

    def _fit(self, training: Training) -> None:
        self._n_genes = training.shifts.shape[1]

    def _predictable(self) -> None:
        return None

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        return np.zeros(self._n_genes)


class Mean(Reference):
    """Every perturbation has the mean shift of all perturbed training conditions, each condition counting once.

    It captures what all perturbations share ("systematic variation") and nothing else.
    """

    def _fit(self, training: Training) -> None:
        self._mean = training.shifts.mean(axis=0)
        self.params_["n_conditions"] = len(training.components)

    def _predictable(self) -> None:
        return None

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        return self._mean


class MatchingMean(Reference):
    """The mean of the profiles of the components as singles.

    The matching mean of Systema (Nature Biotechnology, 2025). A component without training cells as a single is
    replaced by the mean of all perturbed training conditions, as :class:`Mean` has it; with no component seen the
    prediction is that mean. Nothing is ever unknown.
    """

    def _fit(self, training: Training) -> None:
        self._mean = training.shifts.mean(axis=0)
        self._singles = {name: training.shifts[row] for name, row in training.singles.items()}
        self.params_["n_singles"] = len(self._singles)

    def _predictable(self) -> None:
        return None

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        return np.mean([self._singles.get(c, self._mean) for c in components], axis=0)


class SumOfSingles(Reference):
    """Base of references that need every component as a single; what they share is the error."""

    _singles: dict[str, np.ndarray]

    def _predictable(self) -> list[str]:
        return sorted(self._singles)

    def _why(self, components: Sequence[str]) -> str:
        inside = [c for c in components if c in self._known]
        if not inside:
            return ""
        return (
            f"{', '.join(map(repr, inside))} occur in training only inside combinations; {type(self).__name__} needs "
            "them as singles. RidgeAdditive does not."
        )

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        return np.sum([self._singles[c] for c in components], axis=0)


class Additive(SumOfSingles):
    """The sum of the components' mean shifts as singles (log1p CP10k).

    The additive baseline of Ahlmann-Eltze, Huber and Anders (Nature Methods, 2025), in the space of genes or of
    principal components. A component without training cells as a single is unknown. It is no fit: nothing is shrunken
    or scaled, and combinations in training are not used.

    Parameters
    ----------
    space
        ``"genes"`` (default), or ``"pca"``: shifts are added in the space of the leading principal components of the
        training cells (log1p CP10k, controls and all perturbations, at most 20,000 cells chosen by the seed) and taken
        back to genes. What lies outside of these components, mostly noise, is lost; the noise of single genes is shared
        by the genes that vary together.
    n_components
        Principal components for ``space="pca"``. Default 50, scanpy's; at most one less than there are cells or genes.

    Notes
    -----
    With V (components x genes) the principal axes, the single shift s becomes V'V s. The map is linear, so the sum
    over components in principal component space is the sum of the projected shifts. For arithmetic in the latent space
    of scVI, which is not linear, see :class:`SCVIArithmetic`.

    ``params_``: ``n_singles``, ``space``, and for ``"pca"`` ``n_components``, ``n_cells`` that the axes were found on.
    """

    def __init__(self, space: Literal["genes", "pca"] = "genes", *, n_components: int = 50) -> None:
        if space not in ("genes", "pca"):
            raise ValueError(f"space={space!r}: pass 'genes' or 'pca'; for latent space of scVI use SCVIArithmetic.")
        if n_components < 1:
            raise ValueError(f"n_components={n_components!r}: pass 1 or more.")
        self.space = space
        self.n_components = int(n_components)
        self._needs_cells = space == "pca"

    def _fit(self, training: Training) -> None:
        names = list(training.singles)
        shifts = training.shifts[[training.singles[c] for c in names]]
        self.params_.update(n_singles=len(names), space=self.space)
        if self.space == "pca":
            assert training.cells is not None  # asked for by _needs_cells
            y = log1p_cp10k(training.cells.read(MAX_PCA_CELLS))
            axes, _ = principal_components(y, self.n_components, training.cells.seed)
            self.params_.update(n_components=len(axes), n_cells=y.shape[0])
            shifts = shifts @ axes.T @ axes
        self._singles = dict(zip(names, shifts, strict=True))
