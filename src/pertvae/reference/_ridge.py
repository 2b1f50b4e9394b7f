"""One ridge fit of all training conditions on their components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pertvae.reference._base import Reference
from pertvae.reference._training import Training

PENALTIES = tuple(float(p) for p in np.geomspace(1e-3, 1e2, 26))


class RidgeAdditive(Reference):
    """Additive effects from one ridge regression on all training conditions.

    The shifts Y (conditions x genes) are fitted by X B, X the multi-hot design (conditions x components), minimising
    ``sum_c w_c |Y_c - X_c B|^2 + penalty |B|^2`` with weights w_c proportional to the training cells of a condition
    (mean one). There is no intercept: no component, no shift. Unlike :class:`Additive` it uses combinations too, learns
    components that occur only inside combinations, and shrinks.

    Parameters
    ----------
    penalty
        Penalty, in units of an average condition; ``None`` (default) chooses it among ``penalties`` by exact
        leave-one-condition-out cross-validation (weighted squared error over all genes).
    penalties
        Candidates.

    Notes
    -----
    With hat matrix H of the weighted problem, the leave-one-out residual is the residual divided by 1 - H_cc.
    Conditions that share no component with another one do not inform the choice: left out, they are predicted as zero
    at every penalty. When no condition shares a component the smallest candidate is used.

    ``params_``: ``penalty``, ``penalty_by`` (``"leave-one-out"``, ``"given"`` or ``"no shared components"``),
    ``loo_error``.
    """

    def __init__(self, penalty: float | None = None, *, penalties: Sequence[float] = PENALTIES) -> None:
        if penalty is not None and not (np.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"penalty={penalty!r}: pass a finite number, 0 or above, or None.")
        if penalty is None and (not len(penalties) or min(penalties) <= 0):
            raise ValueError(f"penalties={penalties!r}: pass candidates above 0.")
        self.penalty = penalty
        self.penalties = tuple(sorted(float(p) for p in penalties))

    def _fit(self, training: Training) -> None:
        row = {c: i for i, c in enumerate(training.known)}
        weights = training.n_cells / training.n_cells.mean()
        uses = np.zeros(len(row))
        for parts in training.components:
            uses[[row[c] for c in parts]] += 1
        # A condition whose components occur nowhere else is solved by itself; the dense problem holds the others.
        alone = np.array([all(uses[row[c]] == 1 for c in parts) for parts in training.components])
        tied = np.flatnonzero(~alone)
        columns = sorted({row[c] for i in tied for c in training.components[i]})
        place = {c: j for j, c in enumerate(columns)}
        x = np.zeros((len(tied), len(columns)))
        for i, condition in enumerate(tied.tolist()):
            x[i, [place[row[c]] for c in training.components[condition]]] = 1.0
        root = np.sqrt(weights[tied])[:, None]
        u, s, vt = np.linalg.svd(root * x, full_matrices=False)
        y = root * training.shifts[tied]
        self._choose(u, s, y)
        penalty = self.params_["penalty"]
        self._effects = np.zeros((len(row), training.shifts.shape[1]))
        # s / (s^2 + penalty), and the minimum-norm solution at penalty 0
        gain = np.divide(s, s**2 + penalty, out=np.zeros_like(s), where=s > 1e-10)
        self._effects[columns] = vt.T @ (gain[:, None] * (u.T @ y))
        for i in np.flatnonzero(alone).tolist():
            parts = training.components[i]
            w = weights[i]
            self._effects[[row[c] for c in parts]] = w * training.shifts[i] / (w * len(parts) + penalty)
        self._row = row

    def _choose(self, u: np.ndarray, s: np.ndarray, y: np.ndarray) -> None:
        if self.penalty is not None:
            self.params_.update(penalty=float(self.penalty), penalty_by="given")
            return
        if not len(y):
            self.params_.update(penalty=self.penalties[0], penalty_by="no shared components")
            return
        projected = u.T @ y
        errors = []
        for penalty in self.penalties:
            shrink = s**2 / (s**2 + penalty)
            left = 1.0 - (u**2 @ shrink)
            residual = y - u @ (shrink[:, None] * projected)
            errors.append(float(((residual / left[:, None]) ** 2).sum()))
        best = int(np.argmin(errors))
        self.params_.update(penalty=self.penalties[best], penalty_by="leave-one-out", loo_error=errors[best])

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        return self._effects[[self._row[c] for c in components]].sum(axis=0)
