"""Which cells a prediction starts from."""

import numpy as np
import pytest

from pertvae.models.base._requests import Request
from pertvae.models.base._requests import choose_cells as choose_positions

POOL = np.array([3, 5, 8, 13, 21, 34])


def choose_cells(pool: np.ndarray, n_cells: int, seed: int) -> np.ndarray:
    return pool[choose_positions(pool, n_cells, seed)]


def test_repeated_cells_are_cells_of_their_own():
    assert len(choose_positions(np.array([0, 0, 1, 2]), 2, 0)) == 2
    assert choose_positions(np.array([5, 5, 7]), 3, 0).tolist() == [0, 1, 2]


def test_choose_cells():
    assert choose_cells(POOL, 6, 0).tolist() == POOL.tolist()
    few = choose_cells(POOL, 3, 0)
    assert len(set(few.tolist())) == 3
    assert set(few) <= set(POOL)
    more = choose_cells(POOL, 20, 0)
    assert more[:6].tolist() == POOL.tolist()
    assert set(more) == set(POOL)
    np.testing.assert_array_equal(choose_cells(POOL, 20, 0), more)


def test_fewer_cells_are_among_more_cells():
    for seed in range(5):
        chosen = [set(choose_cells(POOL, n, seed).tolist()) for n in range(1, 7)]
        assert all(a < b for a, b in zip(chosen[:-1], chosen[1:], strict=True))
        long = choose_cells(POOL, 30, seed)
        np.testing.assert_array_equal(choose_cells(POOL, 12, seed), long[:12])


def test_every_cell_is_as_likely():
    counts = np.bincount([choose_cells(POOL, 1, s)[0] for s in range(600)], minlength=35)[POOL]
    assert counts.sum() == 600
    assert counts.min() > 60


def test_at_least_one_cell():
    with pytest.raises(ValueError, match="n_cells=0"):
        choose_cells(POOL, 0, 0)


def test_request_keys():
    """Draws depend on the canonical label and its doses, not on spelling or the order of components."""
    assert Request("B+A", "A+B", {"B": 1.0, "A": 1.0}).key == Request("x", "A+B", {"A": 1.0, "B": 1.0}).key == "A+B"
    doses = [Request("x", "A+B", {"A": 2.0, "B": 1.0}), Request("x", "A+B", {"B": 1.0, "A": 2.0})]
    assert doses[0].key == doses[1].key
    assert list(doses[0].doses.items()) == list(doses[1].doses.items())  # noise is drawn in this order
    assert doses[0].key != Request("x", "A+B", {"A": 1.0, "B": 2.0}).key
