"""interaction_auroc: 0.5 without knowledge of interactions, whatever noise is shared; above it with."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.metrics import Comparison, registry
from pertvae.metrics._interactions import noise_share, rowwise_auroc

SINGLES, DOUBLES, GENES = 20, 20, 800
CELLS = {"single": 150, "double": 100, "control": 1000}


class Screen:
    """Mean profiles of a screen whose cell noise differs between genes, with stronger effects in noisy genes.

    That is the trap: such genes deviate most from any sum, in predictions and in the truth, without any interaction.
    """

    def __init__(self, seed: int, interaction: float = 0.0, controls: int = CELLS["control"]) -> None:
        rng = np.random.default_rng(seed)
        self.sd = 0.6 * np.exp(rng.normal(0, 0.8, GENES))
        effects = rng.normal(0, 1, (SINGLES, GENES)) * (rng.random((SINGLES, GENES)) < 0.1) * self.sd

        def noise(cells: float, *shape: int) -> np.ndarray:
            return rng.normal(size=(*shape, GENES)) * self.sd / np.sqrt(cells)

        halves = [effects + noise(CELLS["single"] / 2, SINGLES) - noise(controls / 2) for _ in range(2)]
        pairs = np.array([rng.choice(SINGLES, 2, replace=False) for _ in range(DOUBLES)])
        self.truth = effects[pairs].sum(axis=1)
        self.additive = halves[0][pairs].sum(axis=1), halves[1][pairs].sum(axis=1)
        self.all = (self.additive[0] + self.additive[1]) / 2
        self.mean = np.tile((halves[0] + halves[1]).mean(axis=0) / 2, (DOUBLES, 1))
        deviates = rng.random(self.truth.shape) < 0.06
        self.interaction = deviates * rng.normal(0, 1, self.truth.shape) * interaction
        self.observed = self.truth + self.interaction + noise(CELLS["double"], DOUBLES) - noise(controls)
        self.cells = [sp.csr_matrix(rng.normal(2, self.sd, (15, GENES))) for _ in range(DOUBLES)]

    def score(self, predicted: np.ndarray, **changes) -> np.ndarray:
        fields = {
            "conditions": tuple(f"P{i}" for i in range(DOUBLES)),
            "genes": pd.RangeIndex(GENES),
            "predicted_profiles": predicted,
            "observed_profiles": self.observed,
            "predicted_deltas": predicted,
            "observed_deltas": self.observed,
            "reference_profile": None,
            "predicted_cells": [],
            "observed_cells": self.cells,
            "additive": self.additive,
        }
        return registry["interaction_auroc"].function(Comparison(**(fields | changes)))


def pooled(screens: list[Screen], predict) -> float:
    return float(np.mean([s.score(predict(s)).mean() for s in screens]))


@pytest.fixture(scope="module")
def additive() -> list[Screen]:
    return [Screen(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def interacting() -> list[Screen]:
    return [Screen(seed, interaction=0.5) for seed in range(4)]


# what knows nothing of interactions
IGNORANT = {
    "no change": lambda s: 0 * s.truth,
    "sum of one half": lambda s: s.additive[0],
    "sum of the other half": lambda s: s.additive[1],
    "sum of all cells": lambda s: s.all,
    "sum without noise": lambda s: s.truth,
    "shrunken sum": lambda s: 0.7 * s.all,
    "mean of the singles": lambda s: s.mean,
    "half denoised": lambda s: 0.5 * s.truth + 0.5 * s.all,
}


@pytest.mark.parametrize("name", IGNORANT)
def test_chance_without_interactions(additive: list[Screen], name: str) -> None:
    assert pooled(additive, IGNORANT[name]) == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize("name", IGNORANT)
def test_chance_with_interactions_that_are_not_predicted(interacting: list[Screen], name: str) -> None:
    assert pooled(interacting, IGNORANT[name]) == pytest.approx(0.5, abs=0.025)


def test_true_interactions_score(interacting: list[Screen], additive: list[Screen]) -> None:
    denoised = pooled(interacting, lambda s: s.truth + s.interaction)
    trained = pooled(interacting, lambda s: s.all + s.interaction)
    weak = pooled(interacting, lambda s: s.all + 0.3 * s.interaction)
    wrong = pooled(interacting, lambda s: s.all - s.interaction)
    assert min(denoised, trained) > 0.7
    assert wrong < 0.4
    assert 0.55 < weak < trained
    # interactions that are not there
    invented = np.random.default_rng(9).normal(0, 0.5, (DOUBLES, GENES))
    assert pooled(additive, lambda s: s.all + invented) == pytest.approx(0.5, abs=0.025)


def test_few_controls(additive: list[Screen]) -> None:
    # the noise of few control cells stands in every sum of one screen
    screens = [Screen(seed, controls=60) for seed in range(4)]
    for name, predict in IGNORANT.items():
        assert pooled(screens, predict) == pytest.approx(0.5, abs=0.04), name


def test_plain_definitions_would_not_do(additive: list[Screen]) -> None:
    # why it is defined as it is: the simpler definitions reward what knows nothing, where nothing is to be known
    def area(s: Screen, predicted: np.ndarray, observed: np.ndarray, signed: bool) -> float:
        order = np.argsort(-np.abs(observed), axis=1)[:, : GENES // 20]
        positive = np.zeros(observed.shape, dtype=bool)
        np.put_along_axis(positive, order, True, axis=1)
        return float(rowwise_auroc(positive, predicted * np.sign(observed) if signed else np.abs(predicted)).mean())

    first, second = additive[0].additive
    s = additive[0]
    assert area(s, 0 * s.truth - s.all, s.observed - s.all, signed=True) > 0.6  # one sum on both sides
    for predicted in (0 * s.truth, s.all, s.truth):
        assert area(s, predicted - first, s.observed - second, signed=False) > 0.65  # absolute deviations
    assert area(s, s.all - first, s.observed - second, signed=True) < 0.35  # signs, noise of training in the truth


def test_noise_share(additive: list[Screen]) -> None:
    s = additive[0]
    first, second = s.additive
    for factor in (0.0, 0.5, 1.0):
        predicted = factor * s.all + (1 - factor) * s.truth
        found = noise_share(predicted - first, s.observed - second, first - second)
        assert found == pytest.approx(factor, abs=0.1)
    assert noise_share(2 * s.all - first, s.observed - second, first - second) == pytest.approx(1, abs=0.02)
    assert noise_share(0 * s.all, s.observed, first) == 0


def test_the_plain_sum_is_chance_to_the_digit(additive: list[Screen]) -> None:
    # its deviations from both halves are each other's negative
    np.testing.assert_allclose(additive[0].score(additive[0].all).mean(), 0.5, atol=1e-3)


def test_where_there_is_no_sum(additive: list[Screen]) -> None:
    s = additive[0]
    first, second = (a.copy() for a in s.additive)
    first[3], second[3], second[5], first[7] = np.nan, np.nan, np.nan, np.nan
    predicted = s.all + s.interaction
    found = s.score(predicted, additive=(first, second))
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 5, 7]
    # the others are scored as without these
    left = np.delete(np.arange(DOUBLES), [3, 5, 7])
    halves = (first[left], second[left])
    alone = s.score(predicted[left], observed_deltas=s.observed[left], additive=halves)
    np.testing.assert_array_equal(found[left], alone)
    assert np.isnan(s.score(s.all, additive=(0 * first + np.nan, second))).all()
    with pytest.raises(ValueError, match="additive"):
        s.score(s.all, additive=None)


def test_conditions_of_one_and_genes_without_noise(interacting: list[Screen]) -> None:
    s = interacting[0]
    still = [sp.csr_matrix(np.ones((5, GENES)))] * DOUBLES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert s.score(s.truth + s.interaction, observed_cells=still).mean() > 0.55
        assert np.isfinite(s.score(s.truth, observed_cells=[c[:1] for c in s.cells])).all()


def test_noisy_genes_do_not_crowd_out_interactions(interacting: list[Screen]) -> None:
    # in units of each gene's noise more of the positive genes are true ones than in plain units
    plain = [sp.csr_matrix(np.random.default_rng(0).normal(2, 1, (30, GENES)))] * DOUBLES
    scaled = pooled(interacting, lambda s: s.truth + s.interaction)
    flat = np.mean([s.score(s.truth + s.interaction, observed_cells=plain).mean() for s in interacting])
    assert scaled > flat + 0.04
