"""The bilinear model of embedded genes and embedded perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.linalg import solve
from scipy.sparse.linalg import spsolve

from pertvae._labels import hint
from pertvae.reference._base import Reference
from pertvae.reference._pca import principal_components
from pertvae.reference._training import Training

Embedding = Literal["own genes", "indicators"]


class Linear(Reference):
    """A linear model from an embedding of the perturbations to expression, the baseline for unseen perturbations.

    The linear model of Ahlmann-Eltze, Huber and Anders (Nature Methods, 2025): Y = G W P' + b. Y (genes x conditions)
    holds the mean log1p CP10k profiles of the perturbed training conditions, b its row means, G (genes x k) the scores
    of the genes on the k leading principal components of the centred rows of Y, P (conditions x features) an embedding
    of the perturbations, and ``W = (G'G + penalty I)^-1 G' (Y - b) P (P'P + penalty I)^-1``. A perturbation that has
    an embedding can be predicted, whether it was ever seen in training or not.

    It knows neither interactions nor cells, weights every condition alike as the paper does, and shrinks towards the
    mean of the training conditions, not towards no change: where nothing can be learned it is :class:`Mean`.

    Parameters
    ----------
    features
        Embedding of the perturbations. A DataFrame, components x features (embeddings from another screen, gene
        ontology, text): every component with a row can be predicted. Features are used as they are, as in the paper:
        their scale counts against ``penalty``, and since b is the mean of Y whatever the features are, features with a
        mean far from zero over the training conditions are better centred before. ``"own genes"``: the rows of G that
        belong to the perturbed genes, so every component that is the name of a gene of the fit can be predicted.
        ``"indicators"``: one feature for each component of training, so only those can be predicted; the model is then
        a low-rank ridge regression on the components. ``None`` (default): own genes when at least half of the training
        components are names of genes, otherwise indicators.
    n_components
        Principal components of the gene embedding, k. Default 10 as in the paper, at most the rank of the centred Y.
    penalty
        Ridge penalty on both sides, above 0. Default 0.1 as in the paper.

    Notes
    -----
    A combination has the sum of the embeddings of its components, so that their deviations from b add up. Their
    average would make the prediction of a combination of two singles the average of both, which is
    :class:`MatchingMean`.

    Controls are no column of Y: they have no embedding. The shift is the predicted profile minus the mean profile of
    the training controls; since b takes up any profile that is subtracted from all columns, it is fitted on the
    training shifts. A label without components keeps the shift zero, rather than b. Training conditions of which a
    component has no embedding are left out of Y; in predictions with ``unseen="ignore"`` such a component adds
    nothing, and a label with no other component has the shift zero.

    ``params_``: ``features`` (``"given"``, ``"own genes"`` or ``"indicators"``), ``n_components``, ``penalty``,
    ``n_conditions``, ``n_left_out``.
    """

    def __init__(
        self,
        features: pd.DataFrame | Embedding | None = None,
        *,
        n_components: int = 10,
        penalty: float = 0.1,
    ) -> None:
        if isinstance(features, pd.DataFrame):
            features = _checked(features)
        elif features is not None and not (isinstance(features, str) and features in get_args(Embedding)):
            raise ValueError(
                f"features={features!r}: pass a DataFrame (components x features), 'own genes', 'indicators' or None."
            )
        if n_components < 1:
            raise ValueError(f"n_components={n_components!r}: pass 1 or more.")
        if not (np.isfinite(penalty) and penalty > 0):
            raise ValueError(f"penalty={penalty!r}: pass a finite number above 0.")
        self.features = features
        self.n_components = int(n_components)
        self.penalty = float(penalty)

    def _fit(self, training: Training) -> None:
        kind = self._kind(training.known)
        genes = [str(g) for g in self._var.index]
        if kind == "given":
            assert isinstance(self.features, pd.DataFrame)
            names = list(self.features.index)
        else:
            names = genes if kind == "own genes" else training.known
        have = set(names)
        kept = [i for i, parts in enumerate(training.components) if have.issuperset(parts)]
        if not kept:
            raise ValueError(_nothing(kind, training.known, names))
        y = training.shifts[kept]  # conditions x genes: Y' minus the control profile
        center = y.mean(axis=0)
        axes, s = principal_components(y - center, self.n_components, 0)
        embedding = axes.T * s  # G
        place: dict[str, int] = {}
        for i, name in enumerate(names):
            place.setdefault(name, i)  # of genes of the same name, the first
        rows: Any
        if kind == "given":
            assert isinstance(self.features, pd.DataFrame)
            rows = self.features.to_numpy()
        else:
            rows = embedding if kind == "own genes" else sp.identity(len(names), format="csr")
        p = _sums(rows, [[place[c] for c in training.components[i]] for i in kept])
        # G'G is diagonal: (s^2 + penalty)^-1 s times what the axes see of Y - b
        left = (s / (s**2 + self.penalty))[:, None] * (axes @ (y - center).T)
        self._weights = _right(p, self.penalty, left)  # W, k x features
        self._embedding, self._center, self._rows, self._place = embedding, center, rows, place
        self.params_.update(
            features=kind,
            n_components=len(s),
            penalty=self.penalty,
            n_conditions=len(kept),
            n_left_out=len(training.components) - len(kept),
        )

    def _kind(self, known: Sequence[str]) -> str:
        if isinstance(self.features, pd.DataFrame):
            return "given"
        if self.features is not None:
            return self.features
        genes = {str(g) for g in self._var.index}
        return "own genes" if 2 * len(genes.intersection(known)) >= len(known) else "indicators"

    def _predictable(self) -> list[str]:
        return list(self._place)

    def _why(self, components: Sequence[str]) -> str:
        kind = self.params_["features"]
        if kind == "given":
            return "Linear needs a row of features for every component."
        if kind == "own genes":
            return "Linear embeds a component by the gene of its name: pass features for components that are no gene."
        return "Linear was fitted on indicators of the training components: pass features to predict unseen ones."

    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        p = _sums(self._rows, [[self._place[c] for c in components]])
        return self._center + self._embedding @ (p @ self._weights.T)[0]


def _sums(rows: Any, members: Sequence[Sequence[int]]) -> Any:
    """Return for each list of members the sum of their rows; sparse rows give a sparse matrix."""
    codes = np.repeat(np.arange(len(members)), [len(m) for m in members])
    columns = np.concatenate([np.asarray(m, dtype=np.int64) for m in members])
    shape = (len(members), rows.shape[0])
    return sp.csr_matrix((np.ones(len(columns)), (codes, columns)), shape=shape) @ rows


def _right(p: Any, penalty: float, left: np.ndarray) -> np.ndarray:
    """Return left P (P'P + penalty I)^-1, solved for the few rows of ``left``."""
    n = p.shape[1]
    if not len(left):
        return np.zeros((0, n))
    if sp.issparse(p):
        system = sp.csc_matrix(p.T @ p + penalty * sp.identity(n))
        return np.asarray(spsolve(system, p.T @ left.T)).reshape(n, len(left)).T
    return solve(p.T @ p + penalty * np.eye(n), p.T @ left.T, assume_a="pos").T


def _checked(features: pd.DataFrame) -> pd.DataFrame:
    """Return the features as numbers with text as index, or raise."""
    table = features.set_axis(features.index.astype(str), axis=0)
    if not table.size:
        raise ValueError(f"features has the shape {features.shape}: pass one row or more, and one column or more.")
    twice = table.index[table.index.duplicated()]
    if len(twice):
        raise ValueError(f"features has two rows or more named {twice[0]!r}: pass one for each component.")
    text = [str(c) for c, t in table.dtypes.items() if not (pd.api.types.is_numeric_dtype(t))]
    if text:
        raise ValueError(f"features[{text[0]!r}] is not a column of numbers.")
    table = table.astype(np.float64)
    bad = ~np.isfinite(table.to_numpy())
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"features holds {float(table.to_numpy()[row, column])!r} for {table.index[row]!r} in column "
            f"{str(table.columns[column])!r}: pass finite numbers, and leave out components you know nothing about."
        )
    return table


def _nothing(kind: str, known: Sequence[str], names: Sequence[str]) -> str:
    """Say that no training condition has an embedding."""
    where = "row of features" if kind == "given" else "gene of the fit"
    near = hint(known[0], names)
    return (
        f"No training condition has a {where} for each of its components, such as {known[0]!r}.{near} Pass features "
        "whose index holds the components, or features='indicators'."
    )
