"""The base class of all references: fit on training cells, predict shifts, generate cells."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from anndata import AnnData

from pertvae._expression import mean_profile
from pertvae._labels import LabelFormat, hint, is_control, require_column, unknown_components
from pertvae._predictions import Block, prediction_anndata
from pertvae.reference._render import Renderer, overdispersion
from pertvae.reference._training import Training, collect, counts_of, read_rows, training_rows

Unseen = Literal["raise", "ignore"]
DEFAULT_N_CELLS = 500


class Reference(ABC):
    """A prediction without a generative model, for comparison.

    A reference is fitted on mean log1p CP10k profiles of training conditions and predicts a shift (difference from
    the mean profile of controls). It returns the same AnnData as a model does. Fitted attributes end with ``_``;
    ``params_`` holds what was learned or chosen.
    """

    _needs_perturbed = True
    _needs_halves = False

    params_: dict[str, Any]

    def fit(
        self,
        adata: AnnData,
        perturbation_key: str,
        control: str | Sequence[str],
        split_key: str | None = None,
        *,
        layer: str | None = None,
        sep: str | None = "+",
        labels_key: str | None = None,
        covariates: Sequence[str] = (),
        seed: int = 0,
    ) -> Self:
        """Learn from training cells; nothing is written to ``adata``.

        Parameters
        ----------
        adata
            Raw counts, cells x genes; in memory or backed. Rows are read in blocks.
        perturbation_key
            obs column of the labels.
        control
            Control label or labels; the first names the control cells of predictions.
        split_key
            obs column with ``train``, ``valid`` (``val``, ``validation``) and ``test`` (``ood``). Only ``train`` cells
            are used; the others enter no number. ``None``: all cells are training cells.
        layer
            Layer with the counts; ``None`` for ``X``.
        sep
            Separator between components; ``None`` when every label is one perturbation.
        labels_key
            obs column of the context (cell type). Shifts are then measured against the controls of the same context
            and averaged over contexts by cell numbers. ``None`` (default): against all controls.
        covariates
            obs columns that generated cells take over from their source cell.
        seed
            Seed of random halves and, above 20,000 training controls, of the choice of those kept as source.

        Returns
        -------
        The fitted reference itself.

        Raises
        ------
        KeyError
            If a column or layer is missing.
        ValueError
            If there are no training controls or no perturbed training cells, split values are unknown or missing, or
            counts are negative or not finite.
        """
        fmt = LabelFormat.create(control, sep)
        for column in covariates:
            require_column(adata.obs, column, "adata.obs", "covariates")
        rows = training_rows(adata.obs, split_key)
        training, controls = collect(
            adata,
            perturbation_key,
            fmt,
            rows,
            layer=layer,
            labels_key=labels_key,
            covariates=[c for c in covariates if c != perturbation_key],
            seed=seed,
            needs_perturbed=self._needs_perturbed,
            halves=self._needs_halves,
        )
        self._fmt, self._key, self._layer, self._labels_key = fmt, perturbation_key, layer, labels_key
        self._covariates = [c for c in covariates if c != perturbation_key]
        self._var = adata.var.copy()
        self._controls = controls
        self._alpha = overdispersion(controls.x)
        self._known = training.known
        self.params_ = {}
        self._fit(training)
        return self

    @property
    def control_profile_(self) -> np.ndarray:
        """Mean log1p CP10k of the training controls, one value a gene."""
        self._require_fit()
        return self._controls.profiles[""].copy()

    @abstractmethod
    def _fit(self, training: Training) -> None:
        """Learn from the training profiles; fill ``params_``."""

    @abstractmethod
    def _shift(self, components: tuple[str, ...]) -> np.ndarray:
        """Return the shift of a set of components that are all predictable, genes."""

    def _predictable(self) -> list[str] | None:
        """Return the components that can be predicted; ``None`` when any can."""
        return self._known

    def predict_shift(self, perturbations: str | Sequence[str], *, unseen: Unseen = "raise") -> pd.DataFrame:
        """Return predicted shifts, log1p CP10k.

        Parameters
        ----------
        perturbations
            Labels, such as ``"A+B"``.
        unseen
            Components that can not be predicted: ``"raise"`` an error that names the nearest known ones, or
            ``"ignore"``: they contribute nothing, with one warning.

        Returns
        -------
        DataFrame, perturbations as written x genes.

        Raises
        ------
        KeyError
            If a component can not be predicted and ``unseen="raise"``.
        """
        shifts, _ = self._shifts(perturbations, unseen)
        return shifts

    def predict_perturbation(
        self,
        perturbations: str | Sequence[str],
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        n_cells: int | None = None,
        labels: str | None = None,
        unseen: Unseen = "raise",
        seed: int = 0,
    ) -> AnnData:
        """Generate cells that carry the predicted shifts.

        Parameters
        ----------
        perturbations
            Labels, such as ``"A+B"``.
        adata
            Where to take source cells from; ``None`` for the training controls (at most 20,000 are kept). Counts are
            read from the layer used in :meth:`fit`; all genes of the fit must be there.
        indices
            Source cells in ``adata``, numbers or a mask; ``None`` for its control cells.
        n_cells
            Cells a perturbation, default the smaller of 500 and the number of source cells. Up to the number of
            source cells none is used twice, above it every one is used once before any is repeated.
        labels
            Take only training controls of this context; needs ``labels_key`` in :meth:`fit`, and no ``adata``.
        unseen
            As in :meth:`predict_shift`.
        seed
            Seed. Draws depend on the seed, the canonical label and the source cells alone.

        Returns
        -------
        AnnData as models return it: one block of generated cells a label in the order asked, then their source
        controls once with observed counts. ``X`` holds integer counts (CSR), ``obs`` the label as written,
        ``source_cell``, ``generated`` and covariates. ``uns["<class name>_predictions"]`` has the exact shifts
        (genes x labels); score those, because the mean of the cells follows them only up to sampling noise and to
        what counts that sum to a library can show. ``uns["pertvae"]`` holds model, version, seed, settings,
        value_kind, ``ignored`` components and ``control_profile``, the mean log1p CP10k of all source cells (training
        controls by default): ``control_profile`` plus shift is the predicted profile. Nothing is written to ``adata``.

        Raises
        ------
        KeyError
            If a component can not be predicted, or a column, gene or context is missing.
        ValueError
            If there are no source cells or ``n_cells`` is below 1.

        Notes
        -----
        A generated cell starts as its source cell. Genes that go down are thinned, genes that go up gain counts at the
        cell's own rate, such that each gene is negative binomial over cells with the overdispersion of the controls,
        the mean of log1p CP10k over cells is control profile plus shift, and libraries stay the same on average.
        Genes that are silent in controls are switched on where the shift says so. Without a shift cells are copies of
        their source.
        """
        shifts, ignored = self._shifts(perturbations, unseen)
        x, obs, profile = self._source(adata, indices, labels)
        n_source = x.shape[0]
        if n_source == 0:
            raise ValueError("There are no source cells: indices is empty.")
        n = min(n_source, DEFAULT_N_CELLS) if n_cells is None else int(n_cells)
        if n < 1:
            raise ValueError(f"n_cells={n_cells!r}: pass 1 or more.")
        rng = np.random.default_rng([seed, 2])
        chosen = rng.permutation(n_source)
        if n > n_source:
            chosen = np.concatenate([chosen, rng.integers(n_source, size=n - n_source)])
        chosen = chosen[:n]
        renderer = Renderer(x, profile, self._alpha)
        taken = obs.iloc[chosen]
        blocks = [
            Block(name, renderer.cells(shift, chosen, self._fmt.canonical(name), seed), taken)
            for name, shift in zip(shifts.index, shifts.to_numpy(), strict=True)
        ]
        used = np.unique(chosen)
        provenance = {
            "model": type(self).__name__,
            "version": version("pertvae"),
            "seed": seed,
            "settings": {"n_cells": n, "library_size": "observed", "unseen": unseen, **self.params_},
            "value_kind": "counts",
            "control_profile": profile,
            "ignored": np.array(ignored, dtype=object) if ignored else np.array([], dtype=str),
        }
        key = f"{type(self).__name__.lower()}_predictions"
        controls = Block(self._fmt.control[0], x[used], obs.iloc[used])
        return prediction_anndata(blocks, controls, self._var, self._key, shifts, key, provenance)

    def _require_fit(self) -> None:
        if not hasattr(self, "params_"):
            raise RuntimeError(
                f"{type(self).__name__} is not fitted: call fit(adata, perturbation_key, control) first."
            )

    def _shifts(self, perturbations: str | Sequence[str], unseen: str) -> tuple[pd.DataFrame, list[str]]:
        self._require_fit()
        if unseen not in ("raise", "ignore"):
            raise ValueError(f"unseen={unseen!r}: pass 'raise' or 'ignore'.")
        if isinstance(perturbations, pd.DataFrame):
            raise TypeError("References know no doses: pass labels, such as ['A', 'A+B'], not a DataFrame of doses.")
        names = [perturbations] if isinstance(perturbations, str) else [str(p) for p in perturbations]
        names = list(dict.fromkeys(names))
        if not names:
            raise ValueError("perturbations is empty: pass one label or more.")
        parts = {name: self._fmt.components(name) for name in names}
        predictable = self._predictable()
        ignored: list[str] = []
        if predictable is not None:
            known = set(predictable)
            ignored = sorted({c for p in parts.values() for c in p} - known)
            if ignored:
                message = unknown_components(parts, predictable)
                if unseen == "raise":
                    raise KeyError(f"{message} {self._why(ignored)}".rstrip())
                warnings.warn(
                    f"{', '.join(map(repr, ignored))} contribute nothing. {message}", UserWarning, stacklevel=4
                )
                parts = {name: tuple(c for c in p if c in known) for name, p in parts.items()}
        zero = np.zeros(len(self._var))
        table = np.stack([self._shift(p) if p else zero for p in parts.values()])
        return pd.DataFrame(table, index=pd.Index(names, dtype=object), columns=self._var.index), ignored

    def _why(self, components: Sequence[str]) -> str:
        """Say more about components that can not be predicted."""
        return ""

    def _source(
        self, adata: AnnData | None, indices: Sequence[int] | np.ndarray | None, labels: str | None
    ) -> tuple[Any, pd.DataFrame, np.ndarray]:
        """Return counts, covariates and mean profile of the source cells."""
        if adata is None:
            if indices is not None:
                raise ValueError("indices need adata: pass the AnnData whose cells they number.")
            own = self._controls
            if labels is None:
                return own.x, own.obs, own.profiles[""]
            if own.contexts is None:
                raise ValueError(f"labels={labels!r} needs fit(..., labels_key=...), the obs column of the context.")
            if labels not in own.profiles:
                raise KeyError(
                    f"labels={labels!r} has no training controls.{hint(labels, [c for c in own.profiles if c])}"
                )
            inside = np.flatnonzero(own.contexts == labels)
            return own.x[inside], own.obs.iloc[inside], own.profiles[labels]
        if labels is not None:
            raise ValueError("Pass labels or adata, not both: with adata choose the cells by indices.")
        genes = adata.var_names.get_indexer(self._var.index)
        if (genes < 0).any():
            lost = list(self._var.index[genes < 0])
            raise KeyError(
                f"adata lacks {len(lost)} genes of the fit, first {lost[0]!r}.{hint(lost[0], adata.var_names)}"
            )
        if indices is None:
            require_column(adata.obs, self._key, "adata.obs", "perturbation_key")
            rows = np.flatnonzero(is_control(adata.obs[self._key], self._fmt.control, self._fmt.sep))
            if not len(rows):
                raise ValueError(
                    f"adata has no control cells ({' or '.join(map(repr, self._fmt.control))}) in obs[{self._key!r}]. "
                    "Pass indices, or leave adata out to start from the training controls."
                )
        else:
            rows = np.asarray(indices)
            rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
            if len(rows) and not (-adata.n_obs <= rows.min() and rows.max() < adata.n_obs):
                raise ValueError(f"indices run from {rows.min()} to {rows.max()}, but adata has {adata.n_obs} cells.")
            rows = rows % adata.n_obs
        for column in self._covariates:
            require_column(adata.obs, column, "adata.obs", "covariates")
        x = read_rows(counts_of(adata, self._layer), rows)[:, genes]
        profile = mean_profile(x) if len(rows) else np.zeros(x.shape[1])
        return x, adata.obs.iloc[rows][self._covariates].copy(), profile
