"""Randomness that belongs to a cell: one counter-based stream for each (seed, label, cell).

A prediction for a cell then does not depend on which other cells or labels were asked for, nor on their order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

_REPLICATE_STEP = np.uint64(0x9E3779B97F4A7C15)


def cell_keys(names: pd.Index, rows: np.ndarray) -> np.ndarray:
    """Return a 64-bit key of each row: the hash of the cell's name, and of how often it came before.

    Parameters
    ----------
    names
        Names of all cells.
    rows
        Chosen cells; a repeated cell gets another key each time.
    """
    hashes = pd.util.hash_array(names.to_numpy(dtype=object), categorize=False)
    repeat = pd.Series(rows).groupby(rows, sort=False).cumcount().to_numpy()
    return hashes[rows] + repeat.astype(np.uint64) * _REPLICATE_STEP


def purpose_seed(seed: int, purpose: str) -> int:
    """Return a seed below 2^56 that belongs to the caller's seed and a purpose (a label, say)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x00{purpose}".encode(), digest_size=7).digest(), "little")


class CellStreams:
    """Streams of some cells for one purpose.

    Parameters
    ----------
    seed
        The caller's seed.
    purpose
        What the draws are for: a canonical label with its doses, or ``"basal"``.
    keys
        From :func:`cell_keys`.
    """

    def __init__(self, seed: int, purpose: str, keys: np.ndarray) -> None:
        first = purpose_seed(seed, purpose)
        self._streams = [
            np.random.Generator(np.random.Philox(key=np.array([first, key], dtype=np.uint64))) for key in keys
        ]

    def normal(self, *shape: int) -> np.ndarray:
        """Return standard normal draws, ``(cells, *shape)``, float32."""
        return self._stack(shape, lambda stream: stream.standard_normal(shape, dtype=np.float32))

    def uniform(self, *shape: int) -> np.ndarray:
        """Return uniform draws on [0, 1), ``(cells, *shape)``, float32."""
        return self._stack(shape, lambda stream: stream.random(shape, dtype=np.float32))

    def _stack(self, shape: tuple[int, ...], draw) -> np.ndarray:  # type: ignore[no-untyped-def]
        # one call a cell is the price of streams that belong to cells; the draws inside are vectorised over genes
        out = np.empty((len(self._streams), *shape), dtype=np.float32)
        for row, stream in zip(out, self._streams, strict=True):
            row[...] = draw(stream)
        return out

    def counts(self, mean: np.ndarray, inverse_dispersion: np.ndarray | None) -> np.ndarray:
        """Return negative binomial (or, without dispersion, Poisson) counts, ``(cells, genes)``, float32.

        Parameters
        ----------
        mean
            Expected counts, ``(cells, genes)``.
        inverse_dispersion
            Of each gene; variance is mean + mean^2 / inverse_dispersion.
        """
        out = np.empty(mean.shape, dtype=np.float32)
        for row, mu, stream in zip(out, mean.astype(np.float64), self._streams, strict=True):
            if inverse_dispersion is None:
                rate = mu
            else:
                rate = stream.standard_gamma(inverse_dispersion) * (mu / inverse_dispersion)
            row[...] = stream.poisson(rate)
        return out
