"""Denoised singles, added and scaled."""

from __future__ import annotations

import numpy as np

from pertvae.reference._means import SumOfSingles
from pertvae.reference._training import Training

MIN_COMBINATIONS = 3


class CalibratedAdditive(SumOfSingles):
    """The sum of rank-denoised single shifts, times one learned scale.

    The single shifts S (singles x genes) are projected on the first r right singular vectors of diag(sqrt(n)) S, with
    n the training cells of each single: noise that perturbations do not share is removed. The sum over the components
    of a combination is then multiplied by one scale, because combinations tend to stay below the sum of their
    singles. A single itself is predicted by its denoised shift, without the scale.

    Parameters
    ----------
    max_rank
        Largest rank tried; ``None`` for the number of singles.

    Notes
    -----
    With at least 3 training combinations whose components all have singles, rank and scale are chosen on those: at
    each rank the scale is the least-squares one, the error of a combination is taken with the scale fitted on the
    others, and the rank with the smallest summed error wins. With fewer, the rank is the one at which singles denoised
    in one random half of the cells (perturbed and control) come closest to the other half, and the scale is 1.

    ``params_``: ``rank``, ``scale``, ``chosen_by`` (``"combinations"`` or ``"split halves"``), ``n_combinations``.
    """

    _needs_halves = True

    def __init__(self, max_rank: int | None = None) -> None:
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank={max_rank!r}: pass 1 or more, or None.")
        self.max_rank = max_rank

    def _fit(self, training: Training) -> None:
        names = sorted(training.singles)
        rows = [training.singles[c] for c in names]
        if not rows:
            raise ValueError("CalibratedAdditive needs single perturbations in training, and there are none.")
        singles = training.shifts[rows]
        root = np.sqrt(training.n_cells[rows])
        axes = np.linalg.svd(root[:, None] * singles, full_matrices=False)[2]
        ranks = range(1, min(len(axes), self.max_rank or len(axes)) + 1)
        place = {c: i for i, c in enumerate(names)}
        combinations = [
            i for i, parts in enumerate(training.components) if len(parts) > 1 and place.keys() >= set(parts)
        ]
        if len(combinations) >= MIN_COMBINATIONS:
            sums = np.stack([singles[[place[c] for c in training.components[i]]].sum(axis=0) for i in combinations])
            rank, scale = _by_combinations(sums, training.shifts[combinations], axes, ranks)
            chosen_by = "combinations"
        else:
            assert training.halves is not None  # asked for by _needs_halves
            rank, scale = _by_halves(training.halves[0][rows], training.halves[1][rows], root, ranks), 1.0
            chosen_by = "split halves"
        denoised = singles @ axes[:rank].T @ axes[:rank]
        self._singles = dict(zip(names, denoised, strict=True))
        self.params_.update(rank=rank, scale=scale, chosen_by=chosen_by, n_combinations=len(combinations))

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        total = super()._shift(components)
        return total * self.params_["scale"] if len(components) > 1 else total


def _by_combinations(sums: np.ndarray, observed: np.ndarray, axes: np.ndarray, ranks: range) -> tuple[int, float]:
    """Return the rank with the smallest leave-one-out error, and its scale on all combinations.

    Everything is done in the coordinates of the axes: with k coordinates kept, the sum of squares and of products
    of each combination are cumulative sums.
    """
    a, b = sums @ axes.T, observed @ axes.T
    squares, products = np.cumsum(a**2, axis=1), np.cumsum(a * b, axis=1)  # combinations x rank
    total_squares, total_products = squares.sum(axis=0), products.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        left_out = np.nan_to_num((total_products - products) / (total_squares - squares))
        scales = np.nan_to_num(total_products / total_squares)
    # |Y - s P|^2 = |Y|^2 - 2 s <P, Y> + s^2 |P|^2, and |Y|^2 is the same at every rank
    errors = (left_out**2 * squares - 2 * left_out * products).sum(axis=0)
    rank = min(ranks, key=lambda r: errors[r - 1])
    return rank, float(scales[rank - 1])


def _by_halves(first: np.ndarray, second: np.ndarray, root: np.ndarray, ranks: range) -> int:
    """Return the rank at which each half, denoised, is closest to the other."""
    both = ~(np.isnan(first).any(axis=1) | np.isnan(second).any(axis=1))
    if not both.any():
        return ranks[-1]
    errors = np.zeros(len(ranks))
    weight = root[both, None]
    for source, target in ((first[both], second[both]), (second[both], first[both])):
        axes = np.linalg.svd(weight * source, full_matrices=False)[2]
        a, b = weight * source @ axes.T, weight * target @ axes.T
        gains = np.cumsum((a**2 - 2 * a * b).sum(axis=0))
        errors += gains[np.minimum(np.arange(len(ranks)), len(gains) - 1)]
    return ranks[int(np.argmin(errors))]
