"""Cells for a predicted mean profile: counts that carry a shift, made from observed control cells.

A reference predicts a mean of log1p CP10k, which no single cell has. Three steps lead to counts.

1. Target. The mean profile of the source controls plus the shift, not below zero.
2. Proportions. Counts of gene g in a cell with library l are taken as negative binomial with mean l q_g and
   overdispersion a_g (by moments, from the training controls, shrunken), which gives the mean of log1p(1e4 X / l) over
   cells as a curve of q_g. This is not log1p(1e4 q): a mean of logs lies below the log of a mean, far below it for
   genes with few counts. Curves are scaled such that no shift gives the controls' own proportions p. A shift need
   not be one that proportions with sum one can have: what is over or missing goes to the genes where it changes the
   mean profile least (least squares under the constraint, one linear step), which are the most expressed ones.
3. Cells. Each generated cell starts as its source cell x. A gene with q < p is thinned: Binomial(x, q / p). A gene
   with q > p gains Poisson(l (q - p) u) counts, u | x ~ Gamma(1/a + x, 1/a + l p) being the cell's own factor for the
   gene under the same model; the sum is then exactly negative binomial with mean l q and the same overdispersion. A
   gene that is silent in controls is switched on like any other. Genes that do not move keep their counts, and
   without any shift a generated cell is its source cell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy import stats

from pertvae._constants import CP10K

BLOCK = 256
_N_LIBRARIES, _N_FACTORS = 8, 24
_ALPHAS = np.geomspace(0.01, 10.0, 25)
_RATES = np.geomspace(1e-9, 1.0, 200)
_DELTA_FROM = 60.0


def overdispersion(x: sp.csr_matrix) -> np.ndarray:
    """Return the overdispersion a of each gene, var = mean + a mean^2, by moments, shrunken to the common value.

    Parameters
    ----------
    x
        Counts, cells x genes.
    """
    library = np.asarray(x.sum(axis=1), dtype=np.float64).ravel()
    first = np.asarray(x.sum(axis=0), dtype=np.float64).ravel()
    second = np.asarray(x.multiply(x).sum(axis=0), dtype=np.float64).ravel()
    p = first / max(library.sum(), 1.0)
    squares = p**2 * (library**2).sum()  # sum of squared means
    excess = second - 2 * p * (x.T @ library) + squares - first
    with np.errstate(divide="ignore", invalid="ignore"):
        raw, variance = excess / squares, 2.0 / squares  # the variance of `raw` when there is no overdispersion
    clear = variance < 0.25
    common = float(np.clip(np.median(raw[clear]), 0.05, 5.0)) if clear.any() else 0.5
    shrunken = np.where(squares > 0, (raw * common**2 + common * variance) / (common**2 + variance), common)
    return np.clip(np.where(np.isfinite(shrunken), shrunken, common), _ALPHAS[0], _ALPHAS[-1])


@dataclass
class Renderer:
    """Source controls, ready to carry shifts.

    Parameters
    ----------
    x
        Counts of the source cells, CSR, cells x genes.
    profile
        Mean log1p CP10k to which shifts are added.
    alpha
        Overdispersion of each gene.
    """

    x: sp.csr_matrix
    profile: np.ndarray
    alpha: np.ndarray

    def __post_init__(self) -> None:
        self.library = np.asarray(self.x.sum(axis=1), dtype=np.float64).ravel()
        total = np.asarray(self.x.sum(axis=0), dtype=np.float64).ravel()
        self.p = total / max(total.sum(), 1.0)
        filled = self.library[self.library > 0]
        places = (np.arange(_N_LIBRARIES) + 0.5) / _N_LIBRARIES
        nodes = np.quantile(filled, places) if len(filled) else np.array([CP10K])
        share = len(filled) / max(len(self.library), 1)  # empty cells count as zeros in the mean profile
        self._nearest = np.abs(np.log(_ALPHAS)[None, :] - np.log(self.alpha)[:, None]).argmin(axis=1)
        self._curves = {int(k): max(share, 1e-9) * _mean_log1p(_ALPHAS[k], nodes) for k in np.unique(self._nearest)}
        self._scale = np.ones_like(self.p)
        at_control = self._solve(self.profile)
        both = (at_control > 0) & (self.p > 0)
        self._scale[both] = self.p[both] / at_control[both]

    def _solve(self, target: np.ndarray) -> np.ndarray:
        """Return the proportions whose mean profile is the target, each gene by itself."""
        q = np.zeros_like(target)
        for k, curve in self._curves.items():
            genes = (self._nearest == k) & (target > 0)
            # Both axes on the log scale: the curve is a straight line where counts are rare.
            q[genes] = np.exp(np.interp(np.log(target[genes]), np.log(curve), np.log(_RATES)))
            below = genes & (target < curve[0])
            q[below] = _RATES[0] * target[below] / curve[0]
        return q * self._scale

    def proportions(self, shift: np.ndarray) -> np.ndarray:
        """Return the proportions q of step 2: not negative, sum one."""
        target = np.clip(self.profile + shift, 0.0, None)
        q = self._solve(target)
        if q.sum() <= 0:
            return self.p
        sign = 1.0 if q.sum() > 1 else -1.0
        slope = (self._solve(target * 1.01) - q) / np.maximum(target * 0.01, 1e-12)  # of q over the profile

        def moved(step: float) -> np.ndarray:
            return self._solve(np.clip(target - sign * step * slope, 0.0, None))

        low, high = 0.0, 1e-3
        while sign * (moved(high).sum() - 1) > 0 and high < 1e9:
            high *= 4
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if sign * (moved(middle).sum() - 1) > 0 else (low, middle)
        q = moved(high)
        # With nothing left to give (or every gene at its limit) plain scaling is the last resort.
        return q / q.sum() if q.sum() > 0 else self.p

    def cells(self, shift: np.ndarray, chosen: np.ndarray, label: str, seed: int) -> sp.csr_matrix:
        """Return counts of one generated cell for each chosen source cell.

        Parameters
        ----------
        shift
            Genes, log1p CP10k.
        chosen
            Rows of the source cells, repeats allowed.
        label
            Canonical label; with ``seed`` it fixes the draws.
        seed
            Seed.
        """
        q = self.proportions(shift)
        ratio = np.divide(q, self.p, out=np.where(q > 0, np.inf, 1.0), where=self.p > 0)
        more = np.flatnonzero(ratio > 1 + 1e-6)
        keep = np.where(ratio < 1 - 1e-6, ratio, 1.0)
        key = label_key(label)
        shape = 1.0 / self.alpha[more]
        blocks = []
        for number, start in enumerate(range(0, len(chosen), BLOCK)):
            rows = chosen[start : start + BLOCK]
            # Draws run along the cells, one stream for each kind: fewer cells give the same first cells.
            thin, factors, draws = np.random.default_rng([seed, key, number]).spawn(3)
            x = sp.csr_matrix(self.x[rows])
            library = self.library[rows, None]
            factor = factors.standard_gamma(shape + x[:, more].toarray()) / (shape + library * self.p[more])
            gained = sp.coo_matrix(draws.poisson(library * (q - self.p)[more] * factor))
            x.data = thin.binomial(np.rint(x.data).astype(np.int64), keep[x.indices])
            new = sp.coo_matrix((gained.data, (gained.row, more[gained.col])), shape=x.shape)
            total = sp.csr_matrix(x + new.tocsr(), dtype=np.float32)
            total.eliminate_zeros()
            blocks.append(total)
        return sp.vstack(blocks, format="csr")


def label_key(label: str) -> int:
    """Return a whole number that belongs to a label, for seeds."""
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")


def _mean_log1p(alpha: float, libraries: np.ndarray) -> np.ndarray:
    """Return E[log1p(1e4 X / l)] at each of ``_RATES``, mean over libraries, X negative binomial with mean l q."""
    shape = 1.0 / alpha
    factors = stats.gamma.ppf((np.arange(_N_FACTORS) + 0.5) / _N_FACTORS, shape) / shape
    factors = np.maximum(factors / factors.mean(), 1e-12)
    total = np.zeros(len(_RATES))
    for library in libraries:
        total += _poisson_log1p(_RATES[:, None] * library * factors, CP10K / library).mean(axis=1)
    return total / len(libraries)


def _poisson_log1p(rate: np.ndarray, a: float) -> np.ndarray:
    """Return E[log1p(a X)] for X Poisson: by summation up to a mean of 60, by the delta method above."""
    grid = np.geomspace(1e-4, _DELTA_FROM, 150)
    counts = np.arange(1, 151)
    exact = stats.poisson.pmf(counts, grid[:, None]) @ np.log1p(a * counts)
    low = np.exp(np.interp(np.log(np.clip(rate, grid[0], None)), np.log(grid), np.log(exact)))
    low = np.where(rate < grid[0], exact[0] * rate / grid[0], low)
    high = np.log1p(a * rate) - 0.5 * a**2 * rate / (1 + a * rate) ** 2
    return np.where(rate < _DELTA_FROM, low, high)
