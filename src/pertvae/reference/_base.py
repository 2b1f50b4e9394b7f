"""The base class of all references: fit on training cells, predict shifts, generate cells."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._labels import LabelFormat, require_column, unknown_components
from pertvae._predictions import Block, prediction_anndata
from pertvae.reference._render import Renderer, overdispersion
from pertvae.reference._source import Source, source_of, training_source
from pertvae.reference._training import Training, collect, training_rows

Unseen = Literal["raise", "ignore"]
DEFAULT_N_CELLS = 500


class Reference(ABC):
    """A prediction without a perturbation model of ours, for comparison.

    A reference is fitted on mean log1p CP10k profiles of training conditions (:class:`SCVIArithmetic` on the cells)
    and predicts a shift (difference from the mean profile of controls). It returns the same AnnData as a model does.
    Fitted attributes end with ``_``; ``params_`` holds what was learned or chosen.
    """

    _needs_perturbed = True
    _needs_halves = False
    _needs_cells = False
    _needs_batches = False

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
        batch_key: str | None = None,
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
        batch_key
            obs column of the technical batch. Only :class:`SCVIArithmetic` uses it; no other reference looks at it.
        covariates
            obs columns that generated cells take over from their source cell.
        seed
            Seed of random halves, of training where there is any, and, above 20,000 training controls, of the choice
            of those kept as source.

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
        if batch_key is not None:
            require_column(adata.obs, batch_key, "adata.obs", "batch_key")
        batch_key = batch_key if self._needs_batches else None
        rows = training_rows(adata.obs, split_key)
        training, controls = collect(
            adata,
            perturbation_key,
            fmt,
            rows,
            layer=layer,
            labels_key=labels_key,
            batch_key=batch_key,
            covariates=[c for c in covariates if c != perturbation_key],
            seed=seed,
            needs_perturbed=self._needs_perturbed,
            halves=self._needs_halves,
            cells=self._needs_cells,
        )
        self._fmt, self._key, self._layer, self._batch_key = fmt, perturbation_key, layer, batch_key
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
        """Return the shift of a set of components that are all predictable, genes; not called without components."""

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
        parts, _ = self._parts(perturbations, unseen)
        return self._table(parts, self._shifts(parts))

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
        controls by default): ``control_profile`` plus shift is the predicted profile. (:class:`SCVIArithmetic` samples
        its cells; it has no ``control_profile`` and is scored by them.) Nothing is written to ``adata``.

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
        their source. Cells of :class:`SCVIArithmetic` are decoded instead, as it says.
        """
        parts, ignored = self._parts(perturbations, unseen)
        source = self._source(adata, indices, labels)
        n_source = source.x.shape[0]
        if n_source == 0:
            raise ValueError("There are no source cells: indices is empty.")
        n = min(n_source, DEFAULT_N_CELLS) if n_cells is None else int(n_cells)
        if n < 1:
            raise ValueError(f"n_cells={n_cells!r}: pass 1 or more.")
        chosen = choose(n_source, n, seed)
        cells, shifts = self._generate(parts, source, chosen, seed)
        taken = source.obs.iloc[chosen]
        blocks = [Block(name, x, taken) for name, x in zip(parts, cells, strict=True)]
        used = np.unique(chosen)
        provenance = {
            "model": type(self).__name__,
            "version": version("pertvae"),
            "seed": seed,
            "settings": {"n_cells": n, "library_size": "observed", "unseen": unseen, **self.params_},
            "value_kind": "counts",
            **self._scored_with(source),
            "ignored": np.array(ignored, dtype=object) if ignored else np.array([], dtype=str),
        }
        key = f"{type(self).__name__.lower()}_predictions"
        controls = Block(self._fmt.control[0], source.x[used], source.obs.iloc[used])
        table = self._table(parts, shifts)
        return prediction_anndata(blocks, controls, self._var, self._key, table, key, provenance)

    def _require_fit(self) -> None:
        if not hasattr(self, "params_"):
            raise RuntimeError(
                f"{type(self).__name__} is not fitted: call fit(adata, perturbation_key, control) first."
            )

    def _parts(self, perturbations: str | Sequence[str], unseen: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """Return the predictable components of each label as written, and the components that are ignored."""
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
        if predictable is None:
            return parts, []
        known = set(predictable)
        ignored = sorted({c for p in parts.values() for c in p} - known)
        if ignored:
            message = unknown_components(parts, predictable)
            if unseen == "raise":
                raise KeyError(f"{message} {self._why(ignored)}".rstrip())
            warnings.warn(f"{', '.join(map(repr, ignored))} contribute nothing. {message}", UserWarning, stacklevel=3)
        return {name: tuple(c for c in p if c in known) for name, p in parts.items()}, ignored

    def _why(self, components: Sequence[str]) -> str:
        """Say more about components that can not be predicted."""
        return ""

    def _shifts(self, parts: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        """Return the shift of each label, labels x genes; without a component there is none."""
        zero = np.zeros(len(self._var))
        return np.stack([self._shift(p) if p else zero for p in parts.values()])

    def _table(self, parts: Mapping[str, tuple[str, ...]], shifts: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(shifts, index=pd.Index(list(parts), dtype=object), columns=self._var.index)

    def _source(self, adata: AnnData | None, indices: Sequence[int] | np.ndarray | None, labels: str | None) -> Source:
        """Return the cells to start from."""
        if adata is None:
            if indices is not None:
                raise ValueError("indices need adata: pass the AnnData whose cells they number.")
            return training_source(self._controls, labels)
        if labels is not None:
            raise ValueError("Pass labels or adata, not both: with adata choose the cells by indices.")
        return source_of(
            adata,
            indices,
            genes=self._var.index,
            perturbation_key=self._key,
            fmt=self._fmt,
            layer=self._layer,
            covariates=self._covariates,
            batch_key=self._batch_key,
        )

    def _generate(
        self, parts: Mapping[str, tuple[str, ...]], source: Source, chosen: np.ndarray, seed: int
    ) -> tuple[list[sp.csr_matrix], np.ndarray]:
        """Return counts of one generated cell for each chosen source cell, label by label, and labels x genes shifts.

        Parameters
        ----------
        parts
            Components of each label.
        source
            Cells to start from.
        chosen
            Rows of ``source``, repeats allowed.
        seed
            Seed; draws depend on it, the canonical label and the chosen cells alone.
        """
        shifts = self._shifts(parts)
        renderer = Renderer(source.x, source.profile, self._alpha)
        labels = [self._fmt.canonical(name) for name in parts]
        return [renderer.cells(s, chosen, name, seed) for s, name in zip(shifts, labels, strict=True)], shifts

    def _scored_with(self, source: Source) -> dict[str, np.ndarray]:
        """Return what the provenance tells metrics: a control profile, so that the exact shift is what they score."""
        return {"control_profile": source.profile}


def choose(n_source: int, n: int, seed: int) -> np.ndarray:
    """Return ``n`` rows of the source: none twice until every one was taken once."""
    rng = np.random.default_rng([seed, 2])
    chosen = rng.permutation(n_source)
    if n > n_source:
        chosen = np.concatenate([chosen, rng.integers(n_source, size=n - n_source)])
    return chosen[:n]
