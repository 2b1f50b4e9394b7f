"""Rotation of a latent space to simple structure.

A standard normal latent is the same in every rotated basis, so a dense model finds the space of the effects and not
their axes. The axes are those in which the effects are sparse: the rotation that minimises a component loss (Jennrich
2006, Psychometrika 71:173).
"""

from __future__ import annotations

import numpy as np

SMOOTHING = 0.3
"""Size of an entry, in prior standard deviations of the latents, below which the loss is quadratic."""


def simple_structure(
    effects: np.ndarray, *, smoothing: float = SMOOTHING, n_starts: int = 20, n_steps: int = 500, seed: int = 0
) -> np.ndarray:
    """Return the rotation R that makes ``effects @ R`` sparse.

    Minimises ``sum sqrt(B^2 + smoothing^2)`` over ``B = effects @ R``. With the weights w = 1 / sqrt(B^2 +
    smoothing^2) the loss lies below ``sum w B^2 / 2`` plus a constant; a step minimises a bound of that,
    ``R <- polar(effects' (B (max(w) - w)))``, and never raises the loss.

    Parameters
    ----------
    effects
        Perturbations x latents, in units of the latents' prior standard deviation.
    smoothing
        See above.
    n_starts
        The identity and random rotations to start from; the best end is taken.
    n_steps
        At most so many steps a start.
    seed
        Of the random starts.

    Returns
    -------
    Orthogonal array, latents x latents.

    Raises
    ------
    ValueError
        If the effects are not a finite table.
    """
    a = np.asarray(effects, dtype=np.float64)
    if a.ndim != 2 or not np.isfinite(a).all():
        raise ValueError(f"effects of shape {a.shape} must be a finite table, perturbations x latents.")
    n_latent = a.shape[1]
    rng = np.random.default_rng(seed)
    best, best_loss = np.eye(n_latent), np.inf
    for start in range(n_starts):
        rotation = np.eye(n_latent) if start == 0 else np.linalg.qr(rng.normal(size=(n_latent, n_latent)))[0]
        last = np.inf
        for _ in range(n_steps):
            b = a @ rotation
            size = np.sqrt(b * b + smoothing**2)
            loss = float(size.sum())
            if last - loss <= 1e-7 * loss:
                break
            last = loss
            weight = 1.0 / size
            left, _, right = np.linalg.svd(a.T @ (b * (weight.max() - weight)))
            rotation = left @ right
        loss = float(np.sqrt((a @ rotation) ** 2 + smoothing**2).sum())
        if loss < best_loss:
            best, best_loss = rotation, loss
    return best
