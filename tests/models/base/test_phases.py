"""Phases: how epochs are divided over them."""

from __future__ import annotations

import pytest

from pertvae.models.base._phases import Phase, divide_epochs
from pertvae.models.samsvae._sparsify import SHARES


def phases(*shares: float) -> list[Phase]:
    return [Phase(str(i), share) for i, share in enumerate(shares)]


@pytest.mark.parametrize("shares", [(1.0,), tuple(SHARES.values()), (1, 1, 1), (0.99, 0.01), (3, 0, 1), (1, 1, 0)])
def test_epochs_add_up(shares: tuple[float, ...]) -> None:
    for max_epochs in (*range(1, 30), 100, 999, 1000):
        epochs = divide_epochs(phases(*shares), max_epochs)
        assert sum(epochs) == max_epochs
        assert all(n >= 0 for n in epochs)
        assert epochs[-1] >= 1
        exact = [share / sum(shares) * max_epochs for share in shares]
        assert all(abs(n - e) < 1.001 for n, e in zip(epochs, exact, strict=True))


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [(1, [0, 0, 0, 1]), (2, [0, 1, 0, 1]), (3, [1, 0, 1, 1]), (10, [4, 1, 2, 3]), (100, [40, 15, 15, 30])],
)
def test_epochs_of_samsvae(max_epochs: int, expected: list[int]) -> None:
    assert divide_epochs(phases(*SHARES.values()), max_epochs) == expected


def test_shares_need_no_unit_sum() -> None:
    assert divide_epochs(phases(2, 1, 1), 8) == [4, 2, 2]


def test_sums_of_shares_are_not_rounded_down() -> None:
    assert divide_epochs(phases(*[0.1] * 10), 10) == [1] * 10


def test_epochs_after_the_best() -> None:
    free, bound = Phase("a"), Phase("b", of_best=0.5)
    assert [free.limit(9, best) for best in (None, 1, 100)] == [9, 9, 9]
    assert [bound.limit(9, best) for best in (None, 1, 2, 10, 18, 100)] == [9, 1, 1, 5, 9, 9]
    assert bound.limit(0, 10) == 0
