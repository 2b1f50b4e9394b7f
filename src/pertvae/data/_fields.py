"""AnnDataManager fields of the common registration, and the manager that checks before it writes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from rich.table import Table
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField, LayerField, MuDataWrapper

from pertvae._constants import (
    CONDITION_OBS_KEY,
    DEFAULT_CONTROL,
    MIN_CELLS_PER_COMPONENT,
    PERTURBATION_OBSM_KEY,
    PERTURBATION_REGISTRY_KEY,
)
from pertvae._expression import row_blocks
from pertvae._labels import LabelFormat, hint, require_column
from pertvae.data._design import Design, design_from_labels, design_from_obsm

LARGE_DOSE = 20.0


class PerturbationField(BaseAnnDataField):
    """The perturbation of each cell: doses in ``obsm`` and the condition in ``obs``.

    Writes ``adata.obsm["_scvi_perturbation"]`` (CSR float32, cells x components) and
    ``adata.obs["_scvi_condition"]`` (categorical canonical labels).

    Parameters
    ----------
    perturbation_key
        Label column of ``obs``; or ``None`` with ``perturbation_obsm_key``.
    control
        Control label or labels. Required with ``perturbation_key``.
    sep
        Separator between components; ``None`` when every label is one perturbation.
    dosage_key
        Dose column of ``obs``.
    perturbation_obsm_key
        A ready design matrix instead of labels.

    Raises
    ------
    ValueError
        If the arguments contradict each other.
    """

    def __init__(
        self,
        perturbation_key: str | None,
        control: str | Iterable[str] | None,
        sep: str | None = "+",
        dosage_key: str | None = None,
        perturbation_obsm_key: str | None = None,
    ) -> None:
        super().__init__()
        if (perturbation_key is None) == (perturbation_obsm_key is None):
            raise ValueError(
                f"Pass either perturbation_key (a column of adata.obs) or perturbation_obsm_key (a design matrix in "
                f"adata.obsm); got perturbation_key={perturbation_key!r} and "
                f"perturbation_obsm_key={perturbation_obsm_key!r}."
            )
        if perturbation_obsm_key is not None and dosage_key is not None:
            raise ValueError(f"dosage_key={dosage_key!r} goes with perturbation_key: a design matrix holds the doses.")
        if perturbation_key is not None and control is None:
            raise ValueError(
                f"perturbation_key={perturbation_key!r} needs control: the label of the control cells, or several, "
                "for example control='control' or control=['NT1', 'NT2']."
            )
        self.format = LabelFormat.create(
            DEFAULT_CONTROL if control is None else control if isinstance(control, str) else tuple(control), sep
        )
        self._key, self._obsm_key, self._dosage_key = perturbation_key, perturbation_obsm_key, dosage_key

    registry_key = PERTURBATION_REGISTRY_KEY  # type: ignore[assignment]
    attr_name = "obsm"  # type: ignore[assignment]
    attr_key = PERTURBATION_OBSM_KEY  # type: ignore[assignment]
    is_empty = False  # type: ignore[assignment]

    def encode(self, adata: AnnData, state: dict | None = None) -> Design:
        """Return the design of ``adata`` without writing; ``state`` is that of an earlier registration."""
        components = None if state is None else list(state["components"])
        if self._obsm_key is not None:
            design = design_from_obsm(adata, self._obsm_key, self.format, components=components)
        else:
            assert self._key is not None
            design = design_from_labels(
                adata, self._key, self.format, dosage_key=self._dosage_key, components=components
            )
        if state is None:
            self._check_first(adata, design)
        return design

    def _check_first(self, adata: AnnData, design: Design) -> None:
        source = f"obs[{self._key!r}]" if self._key is not None else f"obsm[{self._obsm_key!r}]"
        if not (np.diff(design.doses.indptr) == 0).any():
            column = adata.obs[self._key].astype(str) if self._key is not None else pd.Series(design.condition)
            common = column.value_counts().index[:5]
            names = ", ".join(repr(str(c)) for c in common)
            if self._key is None:
                fix = "Control cells are rows of zeros."
            else:
                fix = f"Pass control=... with one of its labels. The commonest: {names}."
            tokens = ", ".join(repr(t) for t in self.format.control)
            raise ValueError(f"No cell of {source} is a control (control={tokens}). {fix}")
        if not design.components:
            raise ValueError(f"Every cell of {source} is a control: there is no perturbation to model.")

    def validate_field(self, adata: AnnData) -> None:
        """Check nothing here: :class:`PerturbationManager` encodes before any field writes."""

    def register_field(self, adata: AnnData) -> dict:
        """Write doses and conditions, and warn once about rare components and large doses."""
        design = self.encode(adata)
        cells = np.bincount(design.doses.indices, minlength=len(design.components))
        rare = [(c, int(n)) for c, n in zip(design.components, cells, strict=True) if n < MIN_CELLS_PER_COMPONENT]
        if rare:
            named = ", ".join(f"{c!r} ({n})" for c, n in rare[:5]) + (", ..." if len(rare) > 5 else "")
            _warn(
                f"{len(rare)} of {len(design.components)} perturbations have fewer than {MIN_CELLS_PER_COMPONENT} "
                f"cells: {named}. Their effects will be close to the prior."
            )
        largest = float(design.doses.data.max(initial=0.0))
        if largest > LARGE_DOSE:
            _warn(
                f"Doses go up to {largest:g} and effects are linear in the dose, unless a model is told otherwise "
                "(dose_response): rescale each perturbation's doses, for example to at most 1."
            )
        return self._write(adata, design)

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Write doses and conditions of other data with the vocabulary of an earlier registration."""
        return self._write(adata_target, self.encode(adata_target, state_registry))

    def _write(self, adata: AnnData, design: Design) -> dict:
        adata.obsm[PERTURBATION_OBSM_KEY] = design.doses
        adata.obs[CONDITION_OBS_KEY] = design.condition
        return {
            "components": np.array(design.components, dtype=object),
            "control": self.format.control,
            "sep": self.format.sep,
            "perturbation_key": self._key,
        }

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return ``{"n_perturbation": number of components}``."""
        return {f"n_{self.registry_key}": len(state_registry["components"])}

    def view_state_registry(self, state_registry: dict) -> Table:
        """Return a table of the components and control tokens."""
        table = Table(title="Perturbations")
        table.add_column("components")
        table.add_column("control")
        table.add_row(", ".join(state_registry["components"]), ", ".join(state_registry["control"]))
        return table


class CountField(LayerField):
    """Counts in ``X`` or a layer: every value is scanned, nothing is copied or converted.

    scvi-tools' field looks at the first rows only and may rewrite ``X``; this one reads all of it in blocks.
    """

    def __init__(self, registry_key: str, layer: str | None, is_count_data: bool = True) -> None:
        super().__init__(registry_key, layer, is_count_data=is_count_data, correct_data_format=False)

    def matrix(self, adata: AnnData) -> Any:
        """Return the matrix, or raise a KeyError that names the layers there are."""
        if self.attr_key is None:
            if adata.X is None:
                raise KeyError(f"adata.X is empty: pass layer=... with one of {_layer_names(adata)}.")
            return adata.X
        if self.attr_key not in adata.layers:
            raise KeyError(f"layer={self.attr_key!r} is not in adata.layers.{hint(self.attr_key, _layer_names(adata))}")
        return adata.layers[self.attr_key]

    def validate_field(self, adata: AnnData) -> None:
        """Scan all values.

        Raises
        ------
        KeyError
            If the layer is missing.
        ValueError
            If a value is negative (counts only) or not finite: the first one, with its cell and gene.
        """
        x = self.matrix(adata)
        where = "adata.X" if self.attr_key is None else f"adata.layers[{self.attr_key!r}]"
        if sp.issparse(x) and x.format == "csc":
            _warn(f"{where} is stored by columns (CSC), which is slow to train on: convert it with .tocsr() first.")
        fractional = None
        for rows, block in row_blocks(x):
            values = block.data if sp.issparse(block) else block.ravel()
            bad = ~np.isfinite(values) | (values < 0 if self.is_count_data else False)
            if bad.any():
                cell, gene, value = _locate(block, int(np.flatnonzero(bad)[0]))
                raise ValueError(
                    f"{where} holds {value} (cell {str(adata.obs_names[rows[cell]])!r}, gene "
                    f"{str(adata.var_names[gene])!r}): "
                    + ("counts must be finite and not negative." if self.is_count_data else "values must be finite.")
                    + (" For real-valued data pass is_count_data=False." if self.is_count_data else "")
                )
            if self.is_count_data and fractional is None:
                not_whole = values != np.floor(values)
                if not_whole.any():
                    fractional = _locate(block, int(np.flatnonzero(not_whole)[0]))[2]
        if fractional is not None:
            likely = [n for n in _layer_names(adata) if n != self.attr_key and _whole(adata.layers[n])]
            if not likely and self.attr_key is not None and _whole(adata.X):
                likely = ["X"]
            fix = f"Counts seem to be in {likely[0]!r}: pass layer={likely[0]!r}." if likely else "Pass raw counts."
            if likely == ["X"]:
                fix = "Counts seem to be in adata.X: leave layer out."
            _warn(f"{where} does not hold counts: it has fractions, first {fractional:g}. {fix}")

    def register_field(self, adata: AnnData) -> dict:
        """Return shape and gene names; :class:`PerturbationManager` has validated already."""
        return {
            self.N_OBS_KEY: adata.n_obs,
            self.N_VARS_KEY: adata.n_vars,
            self.COLUMN_NAMES_KEY: np.asarray(adata.var_names),
        }


MuDataPerturbationField = MuDataWrapper(PerturbationField)
MuDataCountField = MuDataWrapper(CountField)


class PerturbationManager(AnnDataManager):
    """AnnDataManager that checks every field first, so that an error leaves the data as they were."""

    def register_fields(self, adata: Any, source_registry: dict | None = None, **transfer_kwargs: Any) -> None:
        """Check counts, perturbations and covariates, then register the fields as scvi-tools does."""
        registries = {} if source_registry is None else source_registry["field_registries"]
        self._validate_anndata_object(adata)
        self._check_obs(adata, registries, extend=bool(transfer_kwargs.get("extend_categories")))
        for field in self.fields:
            inner = getattr(field, "adata_field", field)
            target = field.get_modality(adata) if inner is not field else adata
            if isinstance(inner, PerturbationField):
                inner.encode(target, registries.get(inner.registry_key, {}).get("state_registry"))
            elif isinstance(inner, CountField):
                if inner.registry_key in registries:
                    _check_genes(target, registries[inner.registry_key]["state_registry"])
                inner.validate_field(target)
        super().register_fields(adata, source_registry, **transfer_kwargs)

    def _check_obs(self, adata: Any, registries: dict, extend: bool) -> None:
        arguments = self._registry["setup_args"] or {}
        modalities = arguments.get("modalities") or {}
        for argument, registry_key in (
            ("batch_key", REGISTRY_KEYS.BATCH_KEY),
            ("labels_key", REGISTRY_KEYS.LABELS_KEY),
            ("size_factor_key", None),
            ("categorical_covariate_keys", REGISTRY_KEYS.CAT_COVS_KEY),
            ("continuous_covariate_keys", None),
        ):
            keys = arguments.get(argument)
            mod = modalities.get(argument)
            obs = adata.obs if mod is None else adata.mod[mod].obs
            for key in [keys] if isinstance(keys, str) else keys or []:
                require_column(obs, key, "adata.obs" if mod is None else f"mdata[{mod!r}].obs", argument)
                if obs[key].isna().any():
                    first = str(obs.index[obs[key].isna()][0])
                    raise ValueError(
                        f"obs[{key!r}] ({argument}) is missing for {obs[key].isna().sum()} cells, first {first!r}."
                    )
                if argument in ("size_factor_key", "continuous_covariate_keys"):
                    _check_numeric(obs[key], argument)
                state = registries.get(registry_key, {}).get("state_registry", {})
                known = state.get("mappings", {}).get(key, state.get("categorical_mapping"))
                if known is not None and not extend:
                    new = sorted(set(obs[key].unique()) - set(known), key=str)
                    if new:
                        raise ValueError(
                            f"obs[{key!r}] ({argument}) has the value {str(new[0])!r}, which the model was not trained "
                            f"on.{hint(new[0], known)}"
                        )


def _check_numeric(column: pd.Series, argument: str) -> None:
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(f"obs[{column.name!r}] ({argument}) is not numeric: its first value is {column.iloc[0]!r}.")
    values = column.to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values) | ((values <= 0) if argument == "size_factor_key" else False)
    if bad.any():
        need = "positive and finite" if argument == "size_factor_key" else "finite"
        raise ValueError(f"obs[{column.name!r}] ({argument}) has the value {values[bad][0]}: values must be {need}.")


def _check_genes(adata: AnnData, state: dict) -> None:
    """Raise when other data do not have the registered genes in the registered order."""
    expected = pd.Index(np.asarray(state["column_names"]).astype(str))
    names = adata.var_names.astype(str)
    if names.equals(expected):
        return
    missing = expected.difference(names, sort=False)
    if len(missing):
        raise ValueError(
            f"{len(missing)} of the {len(expected)} genes the model was trained on are missing, first "
            f"{str(missing[0])!r}.{hint(missing[0], names)}"
        )
    raise ValueError(
        "The genes are not those the model was trained on, in that order. Use adata[:, model.get_var_names()].copy()."
    )


def _layer_names(adata: AnnData) -> list[str]:
    """Return the names of the layers; anndata 0.13 lists X among them under the name None."""
    return [str(n) for n in adata.layers if n is not None]


def _locate(block: Any, position: int) -> tuple[int, int, float]:
    """Return row, column and value of a stored entry."""
    if sp.issparse(block):
        row = int(np.searchsorted(block.indptr, position, side="right") - 1)
        return row, int(block.indices[position]), float(block.data[position])
    row, column = divmod(position, block.shape[1])
    return row, column, float(block[row, column])


def _whole(x: Any) -> bool:
    """Return whether the first rows look like counts."""
    if x is None:
        return False
    _, block = next(iter(row_blocks(x, size=256)))
    values = block.data if sp.issparse(block) else block
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all())


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=settings.warnings_stacklevel)
