"""A screen of cells in discrete states: perturbations change how many cells are in a state, and some the state."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd

from pertvae._expression import log1p_cp10k
from pertvae.datasets._count_screens import CountParts, CountSettings, count_kind, count_screen
from pertvae.datasets._counts import CountModel, couple
from pertvae.datasets._generator import check_positive, check_range, check_sizes, stream
from pertvae.datasets._oracle import Expected


@count_kind
def codes(
    common: CountSettings,
    *,
    n_states: int = 12,
    state_sd: float = 2.0,
    within_sd: float = 0.5,
    weight_concentration: float = 5.0,
    states_moved: int = 3,
    weight_sd: float = 1.2,
    mean_fraction: float = 0.5,
) -> ad.AnnData:
    """Simulate cells in discrete states, whose frequencies every perturbation changes.

    z = centre of the cell's state + within-state noise + the sum of the effects of the components. Controls are in
    state k with probability w_k; a condition with the components C in state k with a probability proportional to w_k
    exp(sum over C of the log-weight changes). Only some perturbations have latent effects as well. A mean profile
    says little here: it mixes states that no cell is between.

    The decoder is that of ``sparse_additive`` (scaled to ``decoder_sd`` over standard normal latents), so that over
    cells, whose centres spread twice as wide, the log rate of a gene has a standard deviation of about 1.2.

    Parameters
    ----------
    common
        See :class:`CountSettings`; ``mask_density``, ``effect_size`` and ``effect_sd`` speak of perturbations that
        have latent effects.
    n_states
        States.
    state_sd
        Centres ~ N(0, state_sd^2 I). With 20 latents and 2, two centres are about 13 apart.
    within_sd
        Standard deviation of each latent within a state.
    weight_concentration
        State weights of controls ~ Dirichlet, all parameters equal to this. With 5 and 12 states a weight is 0.08 on
        average, with a standard deviation of 0.035: no state is nearly empty.
    states_moved
        States, drawn from all, whose log-weights a perturbation changes; the others change with the normalisation.
    weight_sd
        Standard deviation of those changes: with 1.2 a weight is multiplied or divided by 3.3.
    mean_fraction
        Fraction of the perturbations (rounded, drawn from all) that have latent effects. The others have rows of
        zeros in ``mask`` and ``effects``.

    Returns
    -------
    AnnData
        ``obs["truth_state"]`` is the state of each cell, ``obs["truth_control_state"]`` the one it would be in
        without the perturbation (states change as seldom as the frequencies allow), and
        ``obsm["X_truth_basal"]`` its latent there. The truth has ``tables`` ``state_weights`` (conditions, control
        first, x states), ``log_weights`` (changes, perturbations x states) and ``state_centers`` (states x latents).

    Raises
    ------
    ValueError
        If more states move than there are, or a number is out of its range.
    """
    own = {k: v for k, v in locals().items() if k != "common"}
    check_sizes(n_states=n_states, states_moved=states_moved)
    if states_moved > n_states:
        raise ValueError(f"states_moved={states_moved} is more than n_states={n_states}.")
    check_positive(state_sd=state_sd, within_sd=within_sd, weight_concentration=weight_concentration)
    check_positive(weight_sd=weight_sd)
    check_range(0, 1, mean_fraction=mean_fraction)
    parts = CountParts.create(common)
    design, n = parts.design, common.n_perturbations
    rng = stream(common.seed, "states")
    centers = rng.normal(0.0, state_sd, (n_states, common.n_latent))
    control = rng.dirichlet(np.full(n_states, weight_concentration))
    moved = rng.permuted(np.tile(np.arange(n_states) < states_moved, (n, 1)), axis=1)
    changes = np.where(moved, rng.normal(0.0, weight_sd, moved.shape), 0.0)
    moving = np.zeros(n, dtype=bool)
    moving[rng.choice(n, size=round(mean_fraction * n), replace=False)] = True
    mask, effects = parts.mask & moving[:, None], parts.effects * moving[:, None]
    weights = control * np.exp(design.matrix @ changes)
    mixture = Mixture(centers, within_sd, weights / weights.sum(axis=1, keepdims=True), design.matrix @ effects)
    before, after = mixture.assign(stream(common.seed, "assignment"), design.codes)
    within = within_sd * parts.basal
    names = [f"S{k + 1:0{len(str(n_states))}d}" for k in range(n_states)]
    states, latents = pd.Index(names, dtype=object), [f"Z{i + 1}" for i in range(common.n_latent)]
    return count_screen(
        "codes",
        parts,
        mixture.oracle(parts.model, stream(common.seed, "oracle"), common.n_oracle),
        latent=centers[after] + within + mixture.offsets[design.codes],
        basal=centers[before] + within,
        own=own,
        columns={
            "truth_state": pd.Categorical.from_codes(after, categories=states),
            "truth_control_state": pd.Categorical.from_codes(before, categories=states),
        },
        mask=mask,
        effects=effects,
        tables={
            "state_weights": pd.DataFrame(mixture.weights, index=pd.Index(design.labels, dtype=object), columns=states),
            "log_weights": pd.DataFrame(changes, index=pd.Index(design.perturbations, dtype=object), columns=states),
            "state_centers": pd.DataFrame(centers, index=states, columns=pd.Index(latents, dtype=object)),
        },
    )


@dataclass(frozen=True)
class Mixture:
    """A mixture of states, whose weights and latent offset depend on the condition.

    Parameters
    ----------
    centers
        States x latents.
    within_sd
        Standard deviation within a state.
    weights
        Conditions x states, the control first.
    offsets
        Conditions x latents.
    """

    centers: np.ndarray
    within_sd: float
    weights: np.ndarray
    offsets: np.ndarray

    def assign(self, rng: np.random.Generator, conditions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the state of each cell without and with its condition (``conditions``: one index a cell).

        Both have exactly the weights of their condition, and differ as seldom as two such draws can: a cell stays
        with probability min(1, w'_k / w_k), and one that leaves goes where the weights have risen.
        """
        n, control = len(conditions), self.weights[0]
        before = _pick(rng.random(n), np.broadcast_to(control, (n, len(control))))
        stay = rng.random(n) * control[before] < self.weights[conditions, before]
        risen = np.maximum(self.weights - control, 0.0)
        # a row without a rise loses no cell, but for rounding: then every state is as good
        risen = np.where(risen.sum(axis=1, keepdims=True) > 0, risen, 1.0)
        return before, np.where(stay, before, _pick(rng.random(n), risen[conditions]))

    def oracle(self, model: CountModel, rng: np.random.Generator, n_draws: int) -> Expected:
        """Return the expected log1p CP10k of controls, and the shift of every other condition.

        Averages over states are exact: with m_k and m'_k the mean profile of state k without and with the offset,

            shift = sum_k (w'_k - w_k) m_k + sum_k w'_k (m'_k - m_k),

        where m_k rests on ``n_draws`` cells a state (the same latent noise, library and dispersion in all states)
        and m'_k - m_k on ``n_draws`` cells in all, whose counts with and without the offset are coupled.
        """
        n_states = len(self.centers)
        within = self.within_sd * rng.standard_normal((n_draws, self.centers.shape[1]))
        noise = model.draw_noise(rng, n_draws)
        means = np.array([log1p_cp10k(rng.poisson(model.rates(c + within, noise))).mean(axis=0) for c in self.centers])
        each = -(-n_draws // n_states)
        state = np.repeat(np.arange(n_states), each)
        basal = self.centers[state] + self.within_sd * rng.standard_normal((len(state), self.centers.shape[1]))
        noise = model.draw_noise(rng, len(state))
        rates = model.rates(basal, noise)
        counts = rng.poisson(rates)
        before = log1p_cp10k(counts)
        shifts = (self.weights[1:] - self.weights[0]) @ means
        for row in range(1, len(self.weights)):
            if self.offsets[row].any():
                after = log1p_cp10k(couple(rng, counts, rates, model.rates(basal + self.offsets[row], noise)))
                shifts[row - 1] += (self.weights[row, state] / each) @ (after - before)
        return Expected(self.weights[0] @ means, shifts, means[:0])


def _pick(uniform: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return one state a row, drawn with the weights of the row (which need not sum to 1)."""
    steps = np.cumsum(weights, axis=1)
    return (uniform[:, None] * steps[:, -1:] >= steps).sum(axis=1)
