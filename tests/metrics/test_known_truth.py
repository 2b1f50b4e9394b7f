"""Mask recovery: closed cases."""

import numpy as np
import pandas as pd
import pytest

from pertvae.datasets import example, read_truth
from pertvae.metrics import mask_f1


def test_order_of_latents_does_not_matter() -> None:
    truth = read_truth(example()).mask
    shuffled = truth.iloc[::-1, [3, 1, 0, 7, 5, 2, 6, 4]]
    score = mask_f1(shuffled, truth)
    assert (score.precision, score.recall, score.f1) == (1.0, 1.0, 1.0)
    used = truth.to_numpy().any(axis=0)
    matched = shuffled.columns[list(score.matching)]
    assert (np.array(matched)[used] == truth.columns[used]).all()


def test_counts() -> None:
    truth = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    mask = np.array([[0.1, 0.9, 0.6], [0.2, 0.9, 0.0], [0.9, 0.1, 0.0], [0.4, 0.0, 0.0]])
    score = mask_f1(mask, truth)
    # three hits; the third latent is unmatched, its entry a false positive; one true entry is missed
    assert score.precision == 3 / 4
    assert score.recall == 3 / 4
    assert score.f1 == pytest.approx(3 / 4)
    assert score.matching == (1, 0)
    assert mask_f1(mask, truth, threshold=0.3).recall == 1.0
    few = mask_f1(mask[:, [1]], truth)
    assert few.matching == (0, -1)
    assert (few.precision, few.recall) == (1.0, 0.5)
    assert mask_f1(-3 * mask, truth, threshold=1.5) == score


def test_all_on_scores_twice_the_density() -> None:
    truth = np.random.default_rng(0).random((100, 15)) < 2 / 15
    density = truth.mean()
    assert mask_f1(np.ones((100, 15)), truth).f1 == pytest.approx(2 * density / (1 + density))


def test_empty() -> None:
    truth = np.eye(3)
    nothing = mask_f1(np.zeros((3, 3)), truth)
    assert np.isnan(nothing.precision)
    assert (nothing.recall, nothing.f1) == (0.0, 0.0)
    assert np.isnan(mask_f1(np.zeros((3, 3)), np.zeros((3, 3))).f1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="one row a perturbation"):
        mask_f1(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="NaN"):
        mask_f1(np.full((3, 2), np.nan), np.ones((3, 2)))
    with pytest.raises(KeyError, match=r"no row 'B' \(1 missing\)"):
        mask_f1(pd.DataFrame({"Z": [1]}, index=["A"]), pd.DataFrame({"Z": [1, 0]}, index=["A", "B"]))
