"""What every simulated screen is made of: random streams, design, effects, decoder, and checks of settings.

A kind of screen is one function in :mod:`pertvae.datasets._kinds` that puts these parts together. Each part draws
from its own random stream, so that kinds with the same seed and sizes share design, effects, decoder and genes, and
differ only where they say so.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

CONTROL = "control"


def stream(seed: int, name: str) -> np.random.Generator:
    """Return the random generator of one part of a screen; the global random state is untouched."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


@dataclass(frozen=True)
class Design:
    """Which cells get which perturbations.

    Parameters
    ----------
    perturbations
        Names of the components.
    conditions
        Indices of the components of each condition; the control, ``()``, is the first.
    codes
        Condition of each cell.
    """

    perturbations: tuple[str, ...]
    conditions: tuple[tuple[int, ...], ...]
    codes: np.ndarray

    @property
    def labels(self) -> list[str]:
        """Return the canonical label of each condition."""
        return ["+".join(self.perturbations[i] for i in c) if c else CONTROL for c in self.conditions]

    @property
    def matrix(self) -> np.ndarray:
        """Return the conditions x components matrix of zeros and ones."""
        matrix = np.zeros((len(self.conditions), len(self.perturbations)))
        for row, condition in enumerate(self.conditions):
            matrix[row, list(condition)] = 1.0
        return matrix

    @property
    def doubles(self) -> np.ndarray:
        """Return which conditions have two components, as indices."""
        return np.flatnonzero([len(c) == 2 for c in self.conditions])


def make_design(
    rng: np.random.Generator, n_perturbations: int, n_doubles: int, *, cells: int, cells_double: int, n_controls: int
) -> Design:
    """Return a design of all singles, random distinct doubles and controls, cells in random order."""
    pairs = np.stack(np.triu_indices(n_perturbations, k=1), axis=1)
    if n_doubles > len(pairs):
        raise ValueError(
            f"n_doubles={n_doubles} is more than the {len(pairs)} pairs of n_perturbations={n_perturbations}: ask for "
            "fewer doubles or more perturbations."
        )
    chosen = pairs[np.sort(rng.choice(len(pairs), size=n_doubles, replace=False))]
    singles = [(i,) for i in range(n_perturbations)]
    conditions = [(), *singles, *[(int(a), int(b)) for a, b in chosen]]
    sizes = [n_controls] + [cells] * n_perturbations + [cells_double] * n_doubles
    width = max(3, len(str(n_perturbations)))
    names = tuple(f"P{i + 1:0{width}d}" for i in range(n_perturbations))
    return Design(names, tuple(conditions), rng.permutation(np.repeat(np.arange(len(conditions)), sizes)))


def make_effects(
    rng: np.random.Generator, shape: tuple[int, int], *, density: float, size: float, sd: float, at_least_one: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask and the masked effects, both perturbations x latents.

    Mask entries are Bernoulli(``density``); magnitudes are Normal(``size``, ``sd``) with a random sign. With
    ``at_least_one`` a row that came out empty gets one latent, chosen at random.
    """
    mask = rng.random(shape) < density
    spare = rng.integers(shape[1], size=shape[0])
    if at_least_one:
        empty = ~mask.any(axis=1)
        mask[empty, spare[empty]] = True
    effects = rng.normal(size, sd, size=shape) * rng.choice([-1.0, 1.0], size=shape)
    return mask, effects * mask


def orthogonal(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    """Return a random matrix (in x out) with orthonormal columns or rows, whichever are fewer."""
    q, r = np.linalg.qr(rng.standard_normal((max(n_in, n_out), min(n_in, n_out))))
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)  # without this the law of q depends on the QR routine
    return q if n_in >= n_out else q.T


@dataclass
class Decoder:
    """Leaky-ReLU network without bias, its outputs centred and scaled per gene.

    Parameters
    ----------
    weights
        Matrices (in x out), the last without non-linearity.
    center, scale
        The output of gene g is (raw - center_g) * scale_g.
    slope
        Of the leaky ReLU.
    """

    weights: list[np.ndarray]
    center: np.ndarray
    scale: np.ndarray
    slope: float = 0.2

    @classmethod
    def create(cls, rng: np.random.Generator, n_latent: int, hidden: Sequence[int], n_genes: int) -> Decoder:
        """Return a decoder with orthogonal weights and outputs as they come."""
        widths = [n_latent, *hidden, n_genes]
        weights = [orthogonal(rng, a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        return cls(weights, np.zeros(n_genes), np.ones(n_genes))

    def standardise(self, z: np.ndarray, sd: float, center: bool) -> None:
        """Scale every gene to standard deviation ``sd`` over the latents ``z``, and centre it on request."""
        raw = self(z)
        self.center = raw.mean(axis=0) if center else np.zeros(raw.shape[1])
        spread = raw.std(axis=0)
        self.scale = np.divide(sd, spread, out=np.zeros_like(spread), where=spread > 0)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return the output for latents ``z`` (rows), float64."""
        h = z
        for w in self.weights[:-1]:
            h = h @ w
            h = np.where(h > 0, h, self.slope * h)
        return (h @ self.weights[-1] - self.center) * self.scale


def gene_names(n_genes: int) -> pd.Index:
    """Return gene names ``G0001`` and so on."""
    width = max(4, len(str(n_genes)))
    return pd.Index([f"G{i + 1:0{width}d}" for i in range(n_genes)], dtype=object)


def check_sizes(**sizes: int) -> None:
    """Raise when a size is not a whole number of at least 0, or of at least 1 where it must be."""
    may_be_zero = {"n_doubles", "cells_per_double", "n_controls"}
    for name, value in sizes.items():
        least = 0 if name in may_be_zero else 1
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def check_range(low: float, high: float, **values: float) -> None:
    """Raise when a number is not between ``low`` and ``high``, both allowed."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be a number from {low:g} to {high:g}.")


def check_positive(**values: float) -> None:
    """Raise when a number is not above 0 and finite."""
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name}={value!r} must be a number above 0.")
