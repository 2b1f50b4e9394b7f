"""Mean posterior shifts against group means, and their inclusion against what is known to be there."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from pertvae.models.base._posterior_shifts import posterior_shifts


def design(labels: list[tuple[int, ...]], n_components: int) -> sp.csr_matrix:
    out = np.zeros((len(labels), n_components), np.float32)
    for row, label in zip(out, labels, strict=True):
        row[list(label)] = 1.0
    return sp.csr_matrix(out)


def test_singles_are_differences_of_means() -> None:
    rng = np.random.default_rng(0)
    labels = [()] * 50 + [(0,)] * 13 + [(1,)] * 7
    z = rng.normal(size=(70, 3)) + 2.0
    shift, _ = posterior_shifts(z, design(labels, 2), np.zeros(70))
    expected = [z[50:63].mean(0) - z[:50].mean(0), z[63:].mean(0) - z[:50].mean(0)]
    np.testing.assert_allclose(shift, expected, rtol=1e-4, atol=1e-5)


def test_combinations_count_for_their_components_and_doses_scale() -> None:
    rng = np.random.default_rng(1)
    labels = [()] * 40 + [(0,)] * 20 + [(1,)] * 20 + [(0, 1)] * 30 + [(1, 2)] * 20
    doses = design(labels, 3)
    doses.data *= rng.choice([0.5, 1.0, 2.0], doses.nnz)
    truth = rng.normal(size=(3, 4))
    groups = rng.integers(0, 2, len(labels)) * 7
    z = doses @ truth + np.where(groups, 3.0, -1.0)[:, None]
    shift, inclusion = posterior_shifts(z + 1e-3 * rng.normal(size=z.shape), doses, groups)
    np.testing.assert_allclose(shift, truth, atol=5e-3)
    assert inclusion.min() > 0.99


def test_what_the_design_leaves_open() -> None:
    """Components seen only together share their shift; one without cells has none. Neither is called."""
    rng = np.random.default_rng(2)
    labels = [()] * 60 + [(0, 1)] * 60 + [(2,)] * 60
    z = rng.normal(size=(180, 2))
    z[60:120] += [4.0, 0.0]
    z[120:] += [0.0, 4.0]
    shift, inclusion = posterior_shifts(z, design(labels, 4), np.zeros(180))
    assert shift[0] + shift[1] == pytest.approx(z[60:120].mean(0) - z[:60].mean(0), abs=1e-3)
    np.testing.assert_allclose(shift[0], shift[1], atol=1e-6)
    np.testing.assert_allclose(shift[3], 0.0, atol=1e-9)
    assert inclusion[[0, 1, 3]].max() < 0.5
    assert inclusion[2, 1] > 0.99
    assert inclusion[2, 0] < 0.5


def test_inclusion_keeps_its_false_discovery_rate() -> None:
    """A tenth of the entries moves; latents differ in spread and are not normal."""
    rng = np.random.default_rng(3)
    false, found, called, total = 0, 0, 0, 0
    for _ in range(12):
        labels = [()] * 300 + [(t,) for t in range(40) for _ in range(30)]
        moved = rng.random((40, 8)) < 0.1
        spread = np.exp(rng.normal(size=8))
        z = (rng.gamma(2.0, size=(1500, 8)) / np.sqrt(2) + design(labels, 40) @ (moved * 1.5)) * spread
        _, inclusion = posterior_shifts(z, design(labels, 40), np.zeros(1500))
        on = inclusion > 0.9
        total += moved.sum()
        false, found, called = false + (on & ~moved).sum(), found + (on & moved).sum(), called + on.sum()
    assert 0.03 < false / called < 0.16
    assert found > 0.95 * total
    # nothing there: hardly anything is called, in any table
    null = [
        posterior_shifts(rng.normal(size=(1500, 8)), design(labels, 40), np.zeros(1500))[1].max() for _ in range(12)
    ]
    assert np.mean(np.array(null) > 0.9) < 0.4


def test_few_controls_and_constant_latents() -> None:
    rng = np.random.default_rng(4)
    labels = [()] + [(0,)] * 60 + [(1,)] * 60
    z = rng.normal(size=(121, 3))
    z[:, 2] = 0.5
    z[61:, 0] += 5
    shift, inclusion = posterior_shifts(z, design(labels, 2), np.zeros(121))
    assert np.isfinite(shift).all()
    assert (inclusion[:, 2] == 0).all()
    # one control: its own noise is in every shift, and the standard error says so
    assert inclusion[1, 0] > inclusion[0, 0]
    flat = posterior_shifts(np.zeros((121, 3)), design(labels, 2), np.zeros(121))
    assert all((t == 0).all() for t in flat)


def test_seeded_and_smooth() -> None:
    rng = np.random.default_rng(5)
    labels = [()] * 100 + [(0,)] * 30 + [(1,)] * 30
    z = rng.normal(size=(160, 2))
    first, again, other = (posterior_shifts(z, design(labels, 2), np.zeros(160), s)[1] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(first, other, atol=0.05)
    close = posterior_shifts(z * (1 + 1e-7), design(labels, 2), np.zeros(160))[1]
    np.testing.assert_allclose(first, close, atol=1e-5)
