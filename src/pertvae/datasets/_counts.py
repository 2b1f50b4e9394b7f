"""Negative binomial counts of cells with known latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae.datasets._generator import Decoder

_BLOCK = 2048


@dataclass(frozen=True)
class CellNoise:
    """What a cell has beside its latent: library, batch, and the gamma part of its counts (cells x genes)."""

    library: np.ndarray
    batch: np.ndarray
    gamma: np.ndarray


@dataclass
class CountModel:
    """Negative binomial counts of cells with latent z, library l and batch b.

    log rate of gene g = baseline_g + decoder(z)_g + batch_shift_bg (+ a deviation, where a kind has one), softmax over
    genes gives rho, x_g ~ NB(mean l rho_g, variance mean + mean^2 / theta_g), l ~ LogNormal(log ``library``,
    ``library_sd``).
    """

    decoder: Decoder
    baseline: np.ndarray
    theta: np.ndarray
    batch_shift: np.ndarray
    library: float
    library_sd: float

    @classmethod
    def create(
        cls,
        rng: np.random.Generator,
        decoder: Decoder,
        *,
        baseline_sd: float,
        theta: float,
        theta_sd: float,
        n_batches: int,
        batch_sd: float,
        library_size: float,
        library_sd: float,
    ) -> CountModel:
        """Draw what belongs to genes: baseline, dispersion, batch shifts."""
        n_genes = len(decoder.center)
        return cls(
            decoder,
            baseline=rng.normal(0.0, baseline_sd, n_genes),
            theta=rng.lognormal(np.log(theta), theta_sd, n_genes),
            batch_shift=rng.normal(0.0, batch_sd, (n_batches, n_genes)),
            library=library_size,
            library_sd=library_sd,
        )

    def draw_library(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return library sizes of ``n`` cells."""
        return rng.lognormal(np.log(self.library), self.library_sd, size=n)

    def draw_noise(self, rng: np.random.Generator, n: int) -> CellNoise:
        """Return everything but the latent of ``n`` cells; batches are balanced."""
        batch = np.arange(n) % len(self.batch_shift)
        gamma = rng.standard_gamma(self.theta, size=(n, len(self.theta))) / self.theta
        return CellNoise(self.draw_library(rng, n), batch, gamma)

    def means(
        self, z: np.ndarray, library: np.ndarray, batch: np.ndarray, deviation: np.ndarray | None = None
    ) -> np.ndarray:
        """Return expected counts, cells x genes.

        ``deviation`` is added to the log rate before the softmax: one value a gene, or cells x genes.
        """
        rates = self.decoder(z) + self.baseline + self.batch_shift[batch]
        if deviation is not None:
            rates += deviation
        rates = np.exp(rates - rates.max(axis=1, keepdims=True))
        return rates * (library / rates.sum(axis=1))[:, None]

    def rates(self, z: np.ndarray, noise: CellNoise, deviation: np.ndarray | None = None) -> np.ndarray:
        """Return the rates of the Poisson counts of cells whose gamma part is drawn already, cells x genes."""
        return self.means(z, noise.library, noise.batch, deviation) * noise.gamma

    def gene_table(self, names: pd.Index) -> pd.DataFrame:
        """Return baseline, dispersion and batch shifts, genes as rows."""
        genes = pd.DataFrame({"baseline": self.baseline, "theta": self.theta}, index=names)
        for b, shift in enumerate(self.batch_shift):
            genes[f"batch{b + 1}"] = shift
        return genes

    def sample(
        self,
        rng: np.random.Generator,
        z: np.ndarray,
        library: np.ndarray,
        batch: np.ndarray,
        deviations: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> sp.csr_matrix:
        """Return sampled counts as CSR float32, in blocks of cells.

        ``deviations`` is a table of deviations, groups x genes, and the group of each cell: a table of all cells
        would be dense.
        """
        blocks = []
        for start in range(0, len(z), _BLOCK):
            rows = slice(start, start + _BLOCK)
            deviation = None if deviations is None else deviations[0][deviations[1][rows]]
            gamma = rng.standard_gamma(self.theta, size=(len(z[rows]), len(self.theta))) / self.theta
            counts = rng.poisson(self.means(z[rows], library[rows], batch[rows], deviation) * gamma)
            blocks.append(sp.csr_matrix(counts.astype(np.float32)))
        return sp.vstack(blocks, format="csr")


def couple(rng: np.random.Generator, counts: np.ndarray, rates: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return Poisson counts of the rates ``moved`` that are close to the ``counts`` drawn from ``rates``.

    Extra counts where the rate rises, thinned counts where it falls: the law is exact, and the noise of a difference
    shrinks with the difference, at less variance than independent counts.
    """
    kept = np.divide(moved, rates, out=np.zeros_like(rates), where=rates > 0)
    return rng.binomial(counts, np.minimum(kept, 1.0)) + rng.poisson(np.maximum(moved - rates, 0.0))
