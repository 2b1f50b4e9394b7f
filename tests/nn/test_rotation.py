"""Rotation to simple structure: planted supports come back, and the loss never rises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ortho_group

from pertvae.metrics import mask_f1
from pertvae.nn import simple_structure

SIZE = 5.0


def planted(
    n_perturbations: int, n_latent: int, n_more: int = 0, seed: int = 0, noise: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Sparse effects in a random basis with sampling noise; ``n_more`` latents without effects. And the support."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n_perturbations, n_latent)) < 2 / n_latent
    effects = mask * rng.normal(SIZE, 0.5, mask.shape) * rng.choice([-1, 1], mask.shape)
    effects = np.pad(effects, ((0, 0), (0, n_more)))
    basis = ortho_group.rvs(n_latent + n_more, random_state=seed)
    return effects @ basis + rng.normal(0, noise, effects.shape), mask


def f1(effects: np.ndarray, support: np.ndarray) -> float:
    return mask_f1(effects, support, threshold=SIZE / 2).f1


def loss(effects: np.ndarray, smoothing: float = 0.3) -> float:
    return float(np.sqrt(effects**2 + smoothing**2).sum())


def varimax(a: np.ndarray, n_steps: int = 500) -> np.ndarray:
    """Kaiser's criterion, the usual rotation of factor analysis."""
    rotation = np.eye(a.shape[1])
    for _ in range(n_steps):
        b = a @ rotation
        left, _, right = np.linalg.svd(a.T @ (b**3 - b * (b * b).mean(0)))
        rotation = left @ right
    return rotation


@pytest.mark.parametrize(
    ("n_perturbations", "n_latent", "n_more", "at_least"),
    [(100, 15, 0, 0.99), (40, 12, 0, 0.87), (100, 15, 5, 0.99), (100, 50, 0, 0.9)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_support_comes_back(
    n_perturbations: int, n_latent: int, n_more: int, at_least: float, seed: int
) -> None:
    effects, support = planted(n_perturbations, n_latent, n_more, seed)
    assert f1(effects, support) < 0.65
    assert f1(effects @ varimax(effects), support) < 0.7
    turned = effects @ simple_structure(effects)
    assert f1(turned, support) >= at_least
    if n_more:  # latents without effects stay empty
        assert (np.sort(np.abs(turned).max(0))[:n_more] < SIZE / 2).all()


def test_signs_and_sizes_come_back_without_noise() -> None:
    effects, support = planted(60, 8, noise=0.0)
    turned = effects @ simple_structure(effects)
    assert f1(turned, support) == 1.0
    sizes = np.abs(turned)
    # the loss is smooth at zero, so entries off the support are small and not zero
    assert (np.minimum(sizes, np.abs(sizes - SIZE)) < 2.0).all()
    assert np.sort(sizes.ravel())[: (sizes < SIZE / 2).sum()].max() < 0.1


def test_orthogonal_and_deterministic() -> None:
    effects, _ = planted(30, 6)
    kept = effects.copy()
    rotation = simple_structure(effects)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-10)
    np.testing.assert_array_equal(rotation, simple_structure(effects))
    np.testing.assert_array_equal(effects, kept)


def test_the_loss_never_rises() -> None:
    effects = np.random.default_rng(3).normal(size=(40, 8)) ** 3
    losses = [loss(effects @ simple_structure(effects, n_starts=1, n_steps=n)) for n in range(40)]
    assert losses[0] == loss(effects)  # no step: the identity
    assert (np.diff(losses) <= 1e-9 * losses[0]).all()
    assert losses[-1] < losses[0] - 1
    # and more starts never end higher
    starts = [loss(effects @ simple_structure(effects, n_starts=n)) for n in (1, 3, 10, 20)]
    assert (np.diff(starts) <= 1e-9 * starts[0]).all()


def test_no_rotation_nearby_is_better() -> None:
    effects, _ = planted(50, 6)
    rotation = simple_structure(effects)
    best = loss(effects @ rotation)
    for i in range(6):
        for j in range(i):
            for angle in (-0.02, 0.02):
                plane = np.eye(6)
                plane[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
                assert loss(effects @ rotation @ plane) > best


def test_smoothing_is_the_size_below_which_entries_are_noise() -> None:
    effects, support = planted(100, 15)
    wide = simple_structure(effects, smoothing=20.0)
    assert loss(effects @ wide, 20.0) <= loss(effects @ simple_structure(effects), 20.0)
    assert f1(effects @ wide, support) < 0.8
    # units: effects and smoothing scaled together give the same rotation
    np.testing.assert_allclose(simple_structure(7 * effects, smoothing=7 * 0.3), simple_structure(effects), atol=1e-6)


def test_the_basis_of_the_input_does_not_matter() -> None:
    effects, _ = planted(60, 6)
    turned = effects @ simple_structure(effects)
    other = effects @ ortho_group.rvs(6, random_state=7)
    again = other @ simple_structure(other)
    # up to order and sign of the latents
    alike = np.corrcoef(turned.T, again.T)[:6, 6:]
    order = np.abs(alike).argmax(1)
    assert sorted(order) == list(range(6))
    np.testing.assert_allclose(again[:, order] * np.sign(alike[range(6), order]), turned, atol=0.05)


def test_sparse_effects_are_left_alone() -> None:
    effects = np.zeros((9, 3))
    effects[range(9), [0, 1, 2] * 3] = np.linspace(2, 4, 9)
    np.testing.assert_allclose(np.abs(simple_structure(effects)).round(6).sum(1), 1)


def test_one_latent_and_no_effects() -> None:
    assert simple_structure(np.ones((4, 1))) in (1.0, -1.0)
    rotation = simple_structure(np.zeros((4, 3)))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-10)
    fewer = simple_structure(np.array([[3.0, 4.0, 0.0]]))  # fewer perturbations than latents
    np.testing.assert_allclose(np.sort(np.abs([3.0, 4.0, 0.0] @ fewer)), [0, 0, 5], atol=0.05)


@pytest.mark.parametrize("effects", [np.ones(4), np.ones((2, 2, 2)), np.array([[1.0, np.nan]]), np.array([[np.inf]])])
def test_not_a_table(effects: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite table"):
        simple_structure(effects)
