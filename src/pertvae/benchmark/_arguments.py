"""Arguments of a benchmark, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

import pertvae
from pertvae import reference as reference_module
from pertvae._labels import LabelFormat, hint, require_column
from pertvae.benchmark._data import Data

REFERENCES = (
    "NoChange",
    "Mean",
    "MatchingMean",
    "Additive",
    "RidgeAdditive",
    "CalibratedAdditive",
    "Linear",
    "SCVIArithmetic",
)


def model_names() -> dict[str, str]:
    """Return the models that can be named in a benchmark: name in lower case to class name.

    Returns
    -------
    Dictionary such as ``{"samsvae": "SAMSVAE"}``.
    """
    return {name.lower(): name for name in pertvae._CLASSES}


def read_models(models: Any) -> dict[str, Any]:
    """Return model classes by name."""
    if isinstance(models, (str, type)):
        models = [models]
    if isinstance(models, Mapping):
        return {str(name): _model(value) for name, value in models.items()}
    found: dict[str, Any] = {}
    for value in models:
        cls = _model(value)
        name = value if isinstance(value, str) else cls.__name__.lower()
        if name in found:
            raise ValueError(f"models: {name!r} is given twice. Pass a mapping with names of your choice.")
        found[name] = cls
    return found


def _model(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    known = model_names()
    if value.lower() not in known:
        raise ValueError(f"models: {value!r} is not a model.{hint(value, known)}")
    return getattr(pertvae, known[value.lower()])


def read_references(references: Any) -> dict[str, Any]:
    """Return references by name: classes, or what makes an unfitted one."""
    if isinstance(references, Mapping):
        found = {str(name): _reference(value) for name, value in references.items()}
    else:
        given = [references] if isinstance(references, (str, type)) else references
        classes = [_reference(value) for value in (REFERENCES if given is None else given)]
        found = {cls.__name__: cls for cls in classes}
    if not found:
        raise ValueError(f"references is empty: scores mean nothing without references. Pass some of {REFERENCES}.")
    return found


def _reference(value: Any) -> Any:
    known = [name for name in reference_module.__all__ if name != "Reference"]
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"references: {value!r} is not a reference.{hint(value, known)}")
        return getattr(reference_module, value)
    if not callable(value):
        raise ValueError(
            f"references: {value!r} is not a reference. Pass names ({', '.join(known)}), classes, or a mapping from "
            "names to classes or functions, such as {'AdditivePCA': functools.partial(Additive, space='pca')}."
        )
    return value


def read_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds, checked."""
    found = tuple(int(s) for s in ([seeds] if isinstance(seeds, int) else seeds))
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"seeds={seeds!r}: pass one or more different whole numbers, 0 or above.")
    return found


def ensemble_name(model: str) -> str:
    """Return what the fits of all seeds of a model are called when they predict together."""
    return f"{model} ensemble"


def check_ensemble(models: Mapping[str, Any], seeds: Sequence[int], n_cells: int) -> None:
    """Raise if the fits of several seeds can not be scored as one."""
    from pertvae.models.base import PerturbationModel

    if len(seeds) < 2:
        raise ValueError(
            f"ensemble=True puts the fits of several seeds together, but seeds={seeds!r}: pass two or more."
        )
    if n_cells < len(seeds):
        raise ValueError(f"n_cells={n_cells!r} is too few for an ensemble of {len(seeds)} seeds.")
    for name, cls in models.items():
        if not (isinstance(cls, type) and issubclass(cls, PerturbationModel)):
            raise ValueError(f"ensemble=True needs models of this package, but {name!r} is {cls!r}.")
        if ensemble_name(name) in models:
            raise ValueError(f"models: {ensemble_name(name)!r} is what the ensemble of {name!r} is called. Rename it.")


def read_fractions(train_fraction: float | Sequence[float]) -> tuple[float, ...]:
    """Return the fractions of the training combinations in rising order, checked."""
    given = train_fraction if isinstance(train_fraction, Sequence | np.ndarray) else [train_fraction]
    found = tuple(sorted(float(f) for f in given))
    if not found or not 0 <= found[0] <= found[-1] <= 1 or len(set(found)) < len(found):
        raise ValueError(f"train_fraction={train_fraction!r}: pass one or more different numbers from 0 to 1.")
    return found


def read_data(
    adata: AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None,
    batch_key: str | None,
    labels_key: str | None,
    sep: str | None,
    n_cells: int,
    setup_kwargs: Mapping[str, Any],
) -> Data:
    """Return the benchmark's own AnnData around the counts of the user's; the matrix itself is shared."""
    keys = {"perturbation_key": perturbation_key, "batch_key": batch_key, "labels_key": labels_key}
    for argument, key in keys.items():
        if key is not None:
            require_column(adata.obs, key, "adata.obs", argument)
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"layer={layer!r} is not a layer of adata.{hint(layer, [n for n in adata.layers if n is not None])}"
        )
    x = adata.X if layer is None else adata.layers[layer]
    if not isinstance(x, np.ndarray) and not sp.issparse(x):
        x = adata.to_memory().X if layer is None else adata.to_memory().layers[layer]
    values = x.data if sp.issparse(x) else x
    if values.size and (not np.isfinite(values).all() or values.min() < 0):
        raise ValueError(
            f"{'X' if layer is None else f'layers[{layer!r}]'} holds negative or non-finite values, such as "
            f"{float(np.nanmin(values)):.3g}: the benchmark scores counts. Pass the layer that holds raw counts."
        )
    if sp.issparse(x):
        x = sp.csr_matrix(x)
    work = AnnData(X=x, obs=adata.obs.copy(), var=pd.DataFrame(index=adata.var_names.astype(str)))
    context = labels_key if labels_key is not None and adata.obs[labels_key].nunique() > 1 else None
    tokens = LabelFormat.create(control, sep).control
    return Data(work, perturbation_key, tokens, sep, labels_key, batch_key, context, n_cells, setup_kwargs)


def registered_columns(setup_kwargs: Mapping[str, Any], obs: pd.DataFrame) -> list[str]:
    """Return the obs columns that further arguments of ``setup_anndata`` name."""
    named: list[Any] = []
    for value in setup_kwargs.values():
        named += [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    return [str(v) for v in dict.fromkeys(named) if v in obs.columns]
