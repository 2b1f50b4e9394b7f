"""Latents against true ones, and the leak of basal latents: recovery of what was put in."""

import numpy as np
import pandas as pd
import pytest

from pertvae.datasets import example
from pertvae.metrics import _latents as module
from pertvae.metrics._latents import block_r2, leakage, mcc


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).gamma(1, 1, (400, 5))


def test_mcc_up_to_order_sign_scale_and_offset(truth: np.ndarray) -> None:
    order = [3, 0, 4, 2, 1]
    latents = truth[:, order] * np.array([-2.0, 0.01, 5.0, -1.0, 100.0]) + np.array([3.0, 0, -1, 9, 1e4])
    score = mcc(latents, truth)
    assert score.mcc == pytest.approx(1.0)
    assert score.matching == tuple(order.index(i) for i in range(5))
    assert len(score.correlations) == 5


def test_mcc_against_numpy(truth: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    latents = truth[:, [1, 0, 2, 3, 4]] + rng.normal(0, 1.5, truth.shape)
    score = mcc(latents, truth)
    assert score.matching == (1, 0, 2, 3, 4)
    for t, z in enumerate(score.matching):
        assert score.correlations[t] == pytest.approx(abs(np.corrcoef(truth[:, t], latents[:, z])[0, 1]))
    assert score.mcc == pytest.approx(np.mean(score.correlations))


def test_mcc_matches_one_to_one(truth: np.ndarray) -> None:
    # one latent is the best of both true ones, but can stand for one of them only
    a, b = truth[:, 0] / truth[:, 0].std(), truth[:, 1] / truth[:, 1].std()
    score = mcc(np.column_stack([a + 0.9 * b, a + 0.1 * b]), np.column_stack([a, b]))
    assert score.matching == (1, 0)


def test_mcc_of_other_numbers_of_latents(truth: np.ndarray) -> None:
    noise = np.random.default_rng(2).normal(size=(400, 20))
    assert mcc(np.hstack([noise, truth]), truth).matching == (20, 21, 22, 23, 24)
    few = mcc(truth[:, [4, 2]], truth)
    assert few.matching == (-1, -1, 1, -1, 0)
    assert few.mcc == pytest.approx(2 / 5)
    assert mcc(noise[:, :5], truth).mcc < 0.15
    # constant but for the last digit
    flat = np.where(truth[:, 4] > 1, 123.456, np.nextafter(123.456, 0))
    assert mcc(np.column_stack([truth[:, :4], flat]), truth).mcc == pytest.approx(4 / 5, abs=1e-9)


def test_block_r2_of_an_invertible_linear_map(truth: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(5, 5)) @ np.diag([1e-4, 1, 10, 1, 1e3])
    assert block_r2(truth @ mixing + 7.0, truth) == pytest.approx(1.0, abs=1e-8)
    # part of it: each column counts the same, whatever its scale
    scaled = truth * np.array([1.0, 10, 100, 0.1, 1])
    assert block_r2(truth[:, [0, 2]], scaled) == pytest.approx(2 / 5, abs=0.03)


def test_block_r2_is_that_of_cells_left_out(truth: np.ndarray) -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(400, 100))
    # least squares on its own cells would give about 100 / 400
    assert -0.6 < block_r2(noise, truth) < 0.0
    signal, error = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1))
    assert block_r2(signal + error, signal) == pytest.approx(0.5, abs=0.03)
    # what is not linear is not found
    assert abs(block_r2(signal**2, signal)) < 0.02


def test_block_r2_orders_no_cells(truth: np.ndarray) -> None:
    # cells come sorted by condition: folds of neighbours would have to extrapolate
    z = np.sort(truth, axis=0)
    curved = np.sqrt(z)
    assert block_r2(curved, z) > 0.8
    assert block_r2(curved, z) == block_r2(curved, z)
    assert block_r2(curved, z, seed=1) != block_r2(curved, z)


def test_rows_are_matched_by_name(truth: np.ndarray) -> None:
    names = [f"cell{i}" for i in range(400)]
    table = pd.DataFrame(truth, index=names)
    shuffled = table.sample(frac=1, random_state=0)
    assert mcc(shuffled, table).mcc == pytest.approx(1.0)
    assert block_r2(shuffled, table.iloc[50:]) == pytest.approx(1.0)
    assert mcc(shuffled.to_numpy(), truth).mcc < 0.3
    labels = pd.Series(np.where(truth[:, 0] > 1, "A", "B"), index=names)
    assert leakage(shuffled, labels).score > 0.9
    assert leakage(shuffled.to_numpy(), labels).score < 0.3
    with pytest.raises(KeyError, match="latents has no row 'cell0'"):
        mcc(table.iloc[1:], table)
    with pytest.raises(ValueError, match="same name: 'cell0'"):
        mcc(pd.concat([table, table.iloc[:1]]), table)


def test_leakage_of_what_was_put_in() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat(["control", "A", "B", "A+B"], [900, 200, 150, 100])
    z = rng.normal(size=(len(labels), 6))
    none = leakage(z, labels)
    assert none.chance == 0.25
    assert abs(none.score) < 0.1
    assert none.score == pytest.approx((none.accuracy - 0.25) / 0.75)
    codes = np.unique(labels, return_inverse=True)[1]
    everything = z.copy()
    everything[:, :4] += 20 * np.eye(4)[codes]
    assert leakage(everything, labels).score == pytest.approx(1.0)
    # scale, offset and order of latents do not matter
    some = z.copy()
    some[:, :4] += 2 * np.eye(4)[codes]
    assert none.score + 0.3 < leakage(some, labels).score < 0.9
    rescaled = (some * np.array([1e-3, 1, 50, 1, 1e-2, 1]) - 5)[:, ::-1]
    assert leakage(rescaled, labels).score == pytest.approx(leakage(some, labels).score, abs=0.005)


def test_leakage_weighs_labels_not_cells() -> None:
    # one small label is found, two large ones are not: (1 + 1/2 + 1/2) / 3, and a share of 0.55 of the cells
    rng = np.random.default_rng(8)
    labels = np.repeat(["A", "B", "C"], [100, 450, 450])
    z = rng.normal(size=(1000, 2))
    z[:100, 0] += 30
    score = leakage(z, labels)
    assert score.accuracy == pytest.approx(2 / 3, abs=0.03)
    assert score.score == pytest.approx(0.5, abs=0.05)


def test_leakage_is_that_of_cells_left_out() -> None:
    # as many latents as cells: a classifier knows its own cells by heart
    rng = np.random.default_rng(9)
    assert abs(leakage(rng.normal(size=(120, 100)), np.repeat(["A", "B"], 60)).score) < 0.3


def test_leakage_takes_some_cells_of_each_label(monkeypatch) -> None:
    sizes = []
    original = module.cross_val_predict
    monkeypatch.setattr(
        module, "cross_val_predict", lambda m, x, y, **k: sizes.append(len(x)) or original(m, x, y, **k)
    )
    z = np.random.default_rng(10).normal(size=(700, 2))
    leakage(z, np.repeat(["A", "B"], [100, 600]), max_cells=150)
    assert sizes == [250]


def test_leakage_against_the_best_classifier() -> None:
    # two normals a distance of 2 apart: Phi(1) of the cells are on the right side, whatever their numbers
    rng = np.random.default_rng(6)
    labels = np.repeat(["A", "control"], [1000, 6000])
    z = rng.normal(size=(7000, 3))
    z[:1000, 1] += 2.0
    score = leakage(z, labels, max_cells=6000)
    assert score.accuracy == pytest.approx(0.8413, abs=0.015)
    assert score.chance == 0.5


def test_leakage_of_a_simulated_screen() -> None:
    adata = example()
    labels = adata.obs["perturbation"]
    free, full = (leakage(adata.obsm[f"X_truth_{k}"], labels).score for k in ("basal", "latent"))
    assert abs(free) < 0.05
    assert full > 0.4


def test_leakage_leaves_small_labels_out() -> None:
    rng = np.random.default_rng(7)
    labels = np.repeat(["A", "B", "C"], [50, 40, 3])
    z = rng.normal(size=(93, 2))
    with pytest.warns(UserWarning, match=r"1 of 3 labels have fewer than 5 cells and are left out: \['C'\]"):
        score = leakage(z, labels)
    assert score == leakage(z[:90], labels[:90])
    assert score.chance == 0.5
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="at least two labels"):
        leakage(z[40:60], np.repeat(["A", "B"], [17, 3]))


def test_random_state_is_untouched(truth: np.ndarray) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    labels = np.repeat(["A", "B"], 200)
    assert leakage(truth, labels, max_cells=100) == leakage(truth, labels, max_cells=100)
    assert leakage(truth, labels, max_cells=100) != leakage(truth, labels, max_cells=100, seed=1)
    block_r2(truth, truth)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_errors(truth: np.ndarray) -> None:
    with pytest.raises(ValueError, match="latents has 399 cells, truth 400"):
        mcc(truth[1:], truth)
    with pytest.raises(ValueError, match="column 1 is constant"):
        block_r2(truth, np.column_stack([truth[:, 0], np.full(400, 0.1)]))
    with pytest.raises(ValueError, match="2000 values that are missing or infinite"):
        mcc(np.full_like(truth, np.nan), truth)
    with pytest.raises(ValueError, match=r"shape \(400,\)"):
        mcc(truth[:, 0], truth)
    with pytest.raises(ValueError, match="needs at least two|at least two"):
        mcc(truth[:1], truth[:1])
    with pytest.raises(ValueError, match="5 folds need at least 10"):
        block_r2(truth[:9], truth[:9])
    with pytest.raises(ValueError, match="n_splits=1"):
        block_r2(truth, truth, n_splits=1)
    with pytest.raises(ValueError, match=r"labels the shape \(3,\)"):
        leakage(truth, ["A", "B", "A"])
    with pytest.raises(ValueError, match="1 missing"):
        leakage(truth, [None, *["A", "B"] * 199, "A"])
    with pytest.raises(ValueError, match="max_cells=2"):
        leakage(truth, ["A", "B"] * 200, max_cells=2)
