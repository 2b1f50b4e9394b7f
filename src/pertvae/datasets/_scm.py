"""A linear Gaussian causal model of latents, whose mechanisms the perturbations change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular


@dataclass(frozen=True)
class CausalModel:
    """Latents z = (z_i, z_n) under every condition u.

    z_i = L_ii z_i + n_i with n_i ~ N(0, I), the same under every condition, and
    z_n = L_ni(u) z_i + L_nn(u) z_n + mu(u) + n_n with n_n ~ N(0, diag(sd(u)^2)), so that with A(u) = I - L_nn(u)

        z_n = A(u)^-1 (L_ni(u) z_i + mu(u) + n_n)

    (arXiv 2605.19343, equations 6 to 9 and 59). L_ii and L_nn are strictly lower triangular: child in row, parent in
    column. What a condition changes is the sum of what its components change, in L_ni, L_nn, mu and log sd.

    Parameters
    ----------
    invariant
        L_ii, invariant x invariant.
    incoming
        L_ni and L_nn side by side, conditions (control first) x responsive x (invariant + responsive).
    means, noise_sd
        mu and sd, conditions x responsive.
    targets
        Whose mechanism a perturbation changes, perturbations x responsive.
    cut
        Whose parents a perturbation cuts off, perturbations x responsive.
    """

    invariant: np.ndarray
    incoming: np.ndarray
    means: np.ndarray
    noise_sd: np.ndarray
    targets: np.ndarray
    cut: np.ndarray

    @classmethod
    def create(
        cls,
        rng: np.random.Generator,
        components: np.ndarray,
        n_invariant: int,
        n_responsive: int,
        *,
        edge_probability: float,
        background_probability: float,
        target_probability: float,
        weight_range: tuple[float, float],
        mean_range: tuple[float, float],
        noise_range: tuple[float, float],
    ) -> CausalModel:
        """Draw the graph, the mechanisms of controls, and what each perturbation makes of them.

        ``components`` is the matrix of conditions x perturbations. A mechanism (weights, mean, noise) of a target is
        drawn anew from the law of the controls' one, on the same edges; the first perturbations cut off all parents
        of one variable each.
        """
        n_perturbations, n_all = components.shape[1], n_invariant + n_responsive

        def weights(*shape: int) -> np.ndarray:
            return rng.uniform(*weight_range, shape) * rng.choice([-1.0, 1.0], shape)

        within = rng.random((n_invariant, n_invariant)) < background_probability
        invariant = np.tril(weights(n_invariant, n_invariant) * within, k=-1)
        edges = rng.random((n_responsive, n_all)) < np.repeat(
            [background_probability, edge_probability], [n_invariant, n_responsive]
        )
        edges[:, n_invariant:] = np.tril(edges[:, n_invariant:], k=-1)
        # without any parent in z_i there might be nothing to cut off, and the background would not reach the variable
        bare, spare = ~edges[:, :n_invariant].any(axis=1), rng.integers(n_invariant, size=(n_responsive,))
        edges[bare, spare[bare]] = True
        size = (n_perturbations, n_responsive)
        control = weights(n_responsive, n_all) * edges
        mean, sd = rng.uniform(*mean_range, n_responsive), rng.uniform(*noise_range, n_responsive)
        targets = rng.random(size) < target_probability
        empty, spare = ~targets.any(axis=1), rng.integers(n_responsive, size=(n_perturbations,))
        targets[empty, spare[empty]] = True
        cut = np.eye(*size, dtype=bool)
        targets |= cut
        new = np.where(cut[..., None], 0.0, weights(*size, n_all) * edges)
        new_mean, new_sd = rng.uniform(*mean_range, size), rng.uniform(*noise_range, size)
        changes = np.where(targets[..., None], new - control, 0.0)
        return cls(
            invariant,
            control + np.einsum("cp,pkj->ckj", components, changes),
            mean + components @ np.where(targets, new_mean - mean, 0.0),
            sd * np.exp(components @ np.where(targets, np.log(new_sd / sd), 0.0)),
            targets,
            cut,
        )

    @property
    def n_invariant(self) -> int:
        """Return the number of variables that no condition changes."""
        return len(self.invariant)

    @property
    def n_responsive(self) -> int:
        """Return the number of variables that conditions change."""
        return self.means.shape[1]

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return the standardised noise of ``n`` cells, n_i and n_n side by side."""
        return rng.standard_normal((n, self.n_invariant + self.n_responsive))

    def latent(self, cells: np.ndarray, condition: int) -> np.ndarray:
        """Return z_i and z_n side by side, of cells with that noise under a condition."""
        z_i = _solve(self.invariant, cells[:, : self.n_invariant])
        incoming = self.incoming[condition]
        noise = cells[:, self.n_invariant :] * self.noise_sd[condition]
        source = z_i @ incoming[:, : self.n_invariant].T + self.means[condition] + noise
        return np.hstack([z_i, _solve(incoming[:, self.n_invariant :], source)])

    def latents(self, cells: np.ndarray, conditions: np.ndarray) -> np.ndarray:
        """Return the latents of cells with that noise, each under its own condition."""
        result = np.empty_like(cells)
        for condition in np.unique(conditions):
            rows = conditions == condition
            result[rows] = self.latent(cells[rows], int(condition))
        return result

    def total_effects(self) -> np.ndarray:
        """Return E[z_n | u] - E[z_n | control], conditions x responsive: what reaches a variable along all paths."""
        a = np.eye(self.n_responsive) - self.incoming[:, :, self.n_invariant :]
        expected = np.linalg.solve(a, self.means[..., None])[..., 0]
        return expected - expected[0]

    def tables(self, conditions: list[str], perturbations: tuple[str, ...]) -> dict[str, pd.DataFrame]:
        """Return graphs (parent in row), mechanisms and effects with names."""
        invariant = pd.Index([f"I{i + 1}" for i in range(self.n_invariant)], dtype=object)
        responsive = pd.Index([f"N{i + 1}" for i in range(self.n_responsive)], dtype=object)
        rows, singles = pd.Index(conditions, dtype=object), pd.Index(perturbations, dtype=object)
        parents = [*invariant, *responsive]
        possible = np.tri(self.n_responsive, len(parents), k=self.n_invariant - 1, dtype=bool)
        names = [f"{parents[j]}>{responsive[k]}" for k, j in np.argwhere(possible)]
        graph = self.incoming[0, :, self.n_invariant :].T
        return {
            "graph": pd.DataFrame(graph, index=responsive, columns=responsive),
            "invariant_graph": pd.DataFrame(self.invariant.T, index=invariant, columns=invariant),
            "edges": pd.DataFrame(self.incoming[:, possible], index=rows, columns=pd.Index(names, dtype=object)),
            "means": pd.DataFrame(self.means, index=rows, columns=responsive),
            "noise_sd": pd.DataFrame(self.noise_sd, index=rows, columns=responsive),
            "total_effects": pd.DataFrame(self.total_effects(), index=rows, columns=responsive),
            "cut": pd.DataFrame(self.cut.astype(np.int8), index=singles, columns=responsive),
        }


def _solve(weights: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return z with z = weights z + source in every row, for strictly lower triangular weights."""
    return solve_triangular(np.eye(len(weights)) - weights, source.T, lower=True, unit_diagonal=True).T


def match_controls(rng: np.random.Generator, conditions: np.ndarray) -> np.ndarray:
    """Return the control cell of each cell (itself for a control); condition 0 is the control.

    Cells are dealt out in the order of their conditions to the controls in random order, again and again: every
    control serves as often as any other, and cells of one condition share none unless they outnumber the controls.
    """
    controls = rng.permutation(np.flatnonzero(conditions == 0))
    order = np.argsort(conditions, kind="stable")
    perturbed = order[len(controls) :]
    result = np.arange(len(conditions))
    result[perturbed] = controls[np.arange(len(perturbed)) % len(controls)]
    return result
