"""What the tests of simulated screens measure with, by other roads than the package's."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae.datasets import Truth


def _log_cells(adata: ad.AnnData) -> np.ndarray:
    x = adata.X.toarray().astype(float)
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


@pytest.fixture(scope="session")
def log_cells() -> Callable[[ad.AnnData], np.ndarray]:
    """log1p CP10k, cells x genes."""
    return _log_cells


@pytest.fixture(scope="session")
def log_profiles() -> Callable[[ad.AnnData], pd.DataFrame]:
    """Mean log1p CP10k per condition."""

    def mean(adata: ad.AnnData) -> pd.DataFrame:
        labels = adata.obs["perturbation"].to_numpy()
        return pd.DataFrame(_log_cells(adata), columns=adata.var_names).groupby(labels).mean()

    return mean


@pytest.fixture(scope="session")
def decode() -> Callable[..., np.ndarray]:
    """Output of the true decoder."""

    def output(truth: Truth, z: np.ndarray, slope: float = 0.2) -> np.ndarray:
        h = z
        layers = sorted(k for k in truth.decoder if k.startswith("layer"))
        for name in layers[:-1]:
            h = h @ truth.decoder[name]
            h = np.maximum(h, slope * h)
        return (h @ truth.decoder[layers[-1]] - truth.decoder["center"]) * truth.decoder["scale"]

    return output


@pytest.fixture(scope="session")
def rho(decode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """True proportions of cells: softmax of the log rate, with their batch shifts and further log rates."""

    def proportions(
        truth: Truth, z: np.ndarray, batch: pd.Series | None = None, more: np.ndarray | float = 0.0
    ) -> np.ndarray:
        rates = decode(truth, np.asarray(z, dtype=float)) + truth.genes["baseline"].to_numpy() + more
        if batch is not None:
            shifts = truth.genes[[c for c in truth.genes if c.startswith("batch")]].T
            rates = rates + shifts.loc[batch.astype(str)].to_numpy()
        rates = np.exp(rates)
        return rates / rates.sum(axis=1, keepdims=True)

    return proportions


@pytest.fixture(scope="session")
def misfit() -> Callable[[np.ndarray, np.ndarray | pd.Series], np.ndarray]:
    """Squared z-score of each gene's mean over cells against an expectation: 1 where only sampling separates them."""

    def squared(cells: np.ndarray, expected: np.ndarray | pd.Series) -> np.ndarray:
        error = cells.std(axis=0, ddof=1) / np.sqrt(len(cells))
        return ((cells.mean(axis=0) - np.asarray(expected)) / (error + 1e-12)) ** 2

    return squared
