"""The oracle: what the true model expects of every condition, from the same draws for control and perturbed cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pertvae._expression import log1p_cp10k
from pertvae.datasets._counts import CountModel, couple

_MORE = 19
"""Further sets of draws behind the control profile: every shift leans on it, and it costs no condition."""


class Population(Protocol):
    """Cells before they are measured: what they bring with them, and their latents under a condition."""

    def draw(self, rng: np.random.Generator, n: int) -> Any:
        """Return ``n`` draws of everything that perturbed and control cells share."""

    def latent(self, cells: Any, condition: int) -> np.ndarray:
        """Return the latents of those cells under a condition; condition 0 is the control."""


@dataclass(frozen=True)
class Moved:
    """Standard normal basal states, moved by the offset of a condition.

    Parameters
    ----------
    offsets
        Conditions x latents, the control (zeros) first.
    """

    offsets: np.ndarray

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return ``n`` basal states."""
        return rng.standard_normal((n, self.offsets.shape[1]))

    def latent(self, cells: np.ndarray, condition: int) -> np.ndarray:
        """Return the basal states under a condition."""
        return cells + self.offsets[condition]


@dataclass(frozen=True)
class Expected:
    """What the true model expects.

    Parameters
    ----------
    control
        Mean profile of control cells.
    shifts
        Shift of every condition but the control, conditions x genes.
    additive
        Shift of some conditions without interaction, conditions x genes; without rows where none were asked for.
    """

    control: np.ndarray
    shifts: np.ndarray
    additive: np.ndarray


def count_oracle(
    model: CountModel,
    cells: Population,
    n_conditions: int,
    rng: np.random.Generator,
    n_draws: int,
    *,
    deviations: np.ndarray | None = None,
    additive: tuple[Population, np.ndarray] | None = None,
) -> Expected:
    """Return the expected log1p CP10k of controls, and the shift of every other condition.

    Counts are sampled, not means. Those of control and perturbed cells are coupled (:func:`couple`).

    Parameters
    ----------
    model
        How latents become counts.
    cells
        Latents.
    n_conditions
        Conditions, the control (0) among them.
    rng
        Random stream of the oracle.
    n_draws
        Basal draws behind each shift; the control profile rests on twenty times as many.
    deviations
        Deviations of the log rate, conditions x genes.
    additive
        Latents without interaction, and the conditions whose shifts without interaction (and without deviation) are
        wanted. Their counts are coupled to those with the interaction, so that it is not lost in noise.
    """
    shifts, plain = [], []
    wanted = set() if additive is None else {int(c) for c in additive[1]}
    basal = cells.draw(rng, n_draws)
    noise = model.draw_noise(rng, n_draws)
    rates = model.rates(cells.latent(basal, 0), noise)
    counts = rng.poisson(rates)
    base = log1p_cp10k(counts).mean(axis=0)
    for condition in range(1, n_conditions):
        deviation = None if deviations is None else deviations[condition]
        moved = model.rates(cells.latent(basal, condition), noise, deviation)
        perturbed = couple(rng, counts, rates, moved)
        shifts.append(log1p_cp10k(perturbed).mean(axis=0) - base)
        if additive is not None and condition in wanted:
            unmoved = model.rates(additive[0].latent(basal, condition), noise)
            plain.append(log1p_cp10k(couple(rng, perturbed, moved, unmoved)).mean(axis=0) - base)
    profiles = [base]
    for _ in range(_MORE):
        z, noise = cells.latent(cells.draw(rng, n_draws), 0), model.draw_noise(rng, n_draws)
        profiles.append(log1p_cp10k(rng.poisson(model.rates(z, noise))).mean(axis=0))
    return Expected(np.mean(profiles, axis=0), _rows(shifts, len(base)), _rows(plain, len(base)))


def value_oracle(
    values: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    cells: Population,
    n_conditions: int,
    rng: np.random.Generator,
    n_draws: int,
) -> Expected:
    """Return the expected values of controls, and the shift of every other condition.

    Parameters
    ----------
    values
        Makes values (cells x genes) of latents.
    cells, n_conditions, rng, n_draws
        As for :func:`count_oracle`.
    """
    basal = cells.draw(rng, n_draws)
    base = values(cells.latent(basal, 0), rng).mean(axis=0)
    shifts = [values(cells.latent(basal, c), rng).mean(axis=0) - base for c in range(1, n_conditions)]
    more = [values(cells.latent(cells.draw(rng, n_draws), 0), rng).mean(axis=0) for _ in range(_MORE)]
    return Expected(np.mean([base, *more], axis=0), _rows(shifts, len(base)), _rows([], len(base)))


def _rows(profiles: list[np.ndarray], n_genes: int) -> np.ndarray:
    """Return profiles as rows, also when there are none."""
    return np.array(profiles).reshape(len(profiles), n_genes)
