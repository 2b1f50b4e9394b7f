"""References that add up or average observed mean shifts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pertvae.reference._base import Reference
from pertvae.reference._training import Training


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

    The additive baseline of Ahlmann-Eltze, Huber and Anders (Nature Methods, 2025). A component without training
    cells as a single is unknown.
    """

    def _fit(self, training: Training) -> None:
        self._singles = {name: training.shifts[row] for name, row in training.singles.items()}
        self.params_["n_singles"] = len(self._singles)
