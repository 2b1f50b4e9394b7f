"""Cells for a predicted mean profile: counts that carry a shift, made from observed control cells.

A reference predicts a mean of log1p CP10k, which no single cell has. Three steps lead to counts.

1. Target. The mean profile of the source controls plus the shift, not below zero.
2. Rates. Counts of gene g in a cell with library l are taken as negative binomial with mean l q_g and overdispersion
   a_g (by moments, from the training controls, shrunken). The proportion q_g solves
   mean over libraries of E[log1p(1e4 X / l)] = target. That is not expm1 of the target: a mean of logs lies below
   the log of a mean, far below it for genes with few counts. The proportions are then scaled to sum to one.
3. Cells. A source cell with counts x has, under the same model with the controls' proportions p, the factor
   u_g | x ~ Gamma(1/a_g + x_g, 1/a_g + l p_g), with mean one over cells. Its new counts are multinomial with l trials
   and probabilities proportional to q_g u_g. Cells thus keep their library and part of their own state, counts have
   the variance of real cells, and a gene that is silent in controls is switched on where its target is above zero.
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
        self.library = np.asarray(self.x.sum(axis=1), dtype=np.float64).ravel().round()
        total = np.asarray(self.x.sum(axis=0), dtype=np.float64).ravel()
        self.p = total / max(total.sum(), 1.0)
        filled = self.library[self.library > 0]
        places = (np.arange(_N_LIBRARIES) + 0.5) / _N_LIBRARIES
        nodes = np.quantile(filled, places) if len(filled) else np.array([CP10K])
        # Empty cells count in the mean profile as zeros.
        share = len(filled) / max(len(self.library), 1)
        self._nearest = np.abs(np.log(_ALPHAS)[None, :] - np.log(self.alpha)[:, None]).argmin(axis=1)
        self._curves = {int(k): share * _mean_log1p(_ALPHAS[k], nodes) for k in np.unique(self._nearest)}

    def proportions(self, shift: np.ndarray) -> np.ndarray:
        """Return the proportions q of step 2: not negative, sum one."""
        target = np.clip(self.profile + shift, 0.0, None)
        q = np.zeros_like(target)
        for k, curve in self._curves.items():
            genes = (self._nearest == k) & (target > 0)
            # Both axes on the log scale: the curve is a straight line where counts are rare.
            q[genes] = np.exp(np.interp(np.log(target[genes]), np.log(curve), np.log(_RATES)))
            below = genes & (target < curve[0])
            q[below] = _RATES[0] * target[below] / curve[0]
        total = q.sum()
        return q / total if total > 0 else self.p

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
        key = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")
        shape = 1.0 / self.alpha
        blocks = []
        for number, start in enumerate(range(0, len(chosen), BLOCK)):
            rows = chosen[start : start + BLOCK]
            factors, draws = np.random.default_rng([seed, key, number]).spawn(2)
            library = self.library[rows]
            scale = 1.0 / (shape + library[:, None] * self.p)
            weight = q * factors.standard_gamma(shape + self.x[rows].toarray()) * scale
            total = weight.sum(axis=1, keepdims=True)
            weight = np.divide(weight, total, out=np.tile(q, (len(rows), 1)), where=total > 0)
            counts = draws.multinomial(library.astype(np.int64), weight)
            blocks.append(sp.csr_matrix(counts.astype(np.float32)))
        return sp.vstack(blocks, format="csr")


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
