"""Several trained models that predict together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from anndata import AnnData
from mudata import MuData

import pertvae
from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._predictions import Block, predicted_shifts, prediction_anndata, write_prediction
from pertvae._storage import write_table
from pertvae.models.base._access import control_indices, covariate_columns
from pertvae.models.base._model import PerturbationModel
from pertvae.models.base._prediction import DEFAULT_CELLS, _observed
from pertvae.models.base._requests import choose_cells
from pertvae.models.base._streams import purpose_seed

KEY = "ensemble_predictions"
MEMBER_COLUMN = "ensemble_member"
NO_MEMBER = -1


def predict_ensemble(
    models: Sequence[PerturbationModel],
    perturbations: str | Sequence[str] | pd.DataFrame,
    adata: AnnData | MuData | None = None,
    *,
    n_cells: int | None = None,
    seed: int = 0,
    key_added: str | None = "auto",
    **kwargs: Any,
) -> AnnData:
    """Predict cells under perturbations with several trained models at once.

    The prediction is the mixture of the models' predictions with equal weights: each cell of a block comes from one
    of them. Models trained from different seeds differ in what the data leave open; the mixture averages that out of
    the shifts and keeps it as spread between cells. The distance of the mean shift from any truth is at most the mean
    of those of the models on their cells (the norm is convex).

    Parameters
    ----------
    models
        Two or more trained models, of one class or of several: usually the same model trained from several seeds.
        They must have been registered with the same genes, perturbations, control labels, separator and layer.
    perturbations
        A label, several, or a DataFrame of doses (rows are named predictions, columns components).
    adata
        Data with the source cells; by default the registered data of the first model that has data.
    n_cells
        Cells a perturbation, all models together; ``min(source cells, 500)`` by default, but one a model at least.
    seed
        Of all draws, and of which model a source cell is given to; the global random state is left alone.
    key_added
        Where shifts are stored in ``adata.uns``; ``"auto"`` is ``"ensemble_predictions"``, ``None`` stores nothing.
    **kwargs
        The other arguments of ``predict_perturbation``: ``indices``, ``basal``, ``output``, ``library_size``,
        ``labels``, ``batch``, ``unseen``, ``batch_size``, ``out``. A default is each model's own.

    Returns
    -------
    AnnData as of ``predict_perturbation``: a block of ``n_cells`` cells for each perturbation in the order asked, then
    the source cells once with observed counts. Also ``obs["ensemble_member"]``: the position in ``models`` of the
    model that a cell comes from, -1 for the source cells. ``uns["pertvae"]``: ``model`` (``"ensemble"``), ``members``
    (class names), ``member_cells`` (cells a block of each), version, seed, settings (where the models' differ, one
    after the other).

    Raises
    ------
    ValueError
        If there are fewer than two models, they were not registered alike (what differs is named), ``n_cells`` is
        below the number of models.
    RuntimeError
        If a model is not trained.

    Notes
    -----
    Writes ``adata.uns["ensemble_predictions"]``, merged by label: genes x perturbations, the mean of the models' shifts
    weighted by their cells in the block, which is the shift of the whole block. Shares differ by one cell at most;
    where they are equal it is the plain mean. A model's shift is that of ``predict_perturbation`` from its own source
    cells: mean log1p CP10k of its cells minus the same for zero dose with equal basal draws and libraries.
    ``uns["ensemble_predictions_names"]`` maps the columns to the labels.

    The source cells are those of a single model with the same ``seed`` and ``n_cells``, dealt out at random, the same
    way for every perturbation; a cell is what its model predicts for it alone, whatever the batch size. Above the
    number of source cells the copies of a cell stay with one model, but for cells at the end of a share.

    References
    ----------
    Uniform mixtures of networks trained from several seeds: Lakshminarayanan et al. 2017, arXiv 1612.01474.

    Examples
    --------
    >>> models = []
    >>> for seed in range(3):
    ...     scvi.settings.seed = seed
    ...     models.append(pv.SAMSVAE(adata))
    ...     models[-1].train(split_key="split")
    >>> predicted = pv.predict_ensemble(models, ["KLF1+MAP2K6"])
    """
    members = _members(models)
    first = members[0]
    for model in members:
        model._check_basal(kwargs.get("basal"))
    if adata is None:
        adata = next((m.adata for m in members if m.adata is not None), None)
    adata = first._validate_anndata(adata)
    indices, labels, batch, library, out = (
        kwargs.pop(name, None) for name in ("indices", "labels", "batch", "library_size", "out")
    )
    pool = control_indices(first, adata, indices, labels, batch)
    if n_cells is None:
        n_cells = max(min(len(pool), DEFAULT_CELLS), len(members))
    if n_cells < len(members):
        raise ValueError(f"n_cells={n_cells} is too few for {len(members)} models: pass one cell a model or more.")
    by_cell = np.ndim(library) > 0
    if by_cell and np.shape(library) != (len(pool),):
        raise ValueError(f"library_size has shape {np.shape(library)}, but there are {len(pool)} source cells.")
    chosen = choose_cells(pool, n_cells, seed)
    member = _deal(pool, chosen, len(members), seed)
    shares = [chosen[member == k] for k in range(len(members))]
    rows = pool[chosen]

    covariates = pd.concat([covariate_columns(m, adata) for m in members], axis=1)
    covariates = covariates.loc[:, ~covariates.columns.duplicated()]
    once = np.array(list(dict.fromkeys(rows.tolist())))
    controls = Block(
        first.label_format.control[0],
        sp.csr_matrix(_observed(first, adata, once)),
        covariates.iloc[once].assign(**{MEMBER_COLUMN: NO_MEMBER}),
    )
    shift_key = KEY if key_added in ("auto", None) else str(key_added)
    with ExitStack() as stack:
        scratch = None
        if out is not None:
            folder = os.path.dirname(os.path.abspath(out))
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".ensemble-", dir=folder))
        predicted = []
        for k, (model, share) in enumerate(zip(members, shares, strict=True)):
            made = model.predict_perturbation(
                perturbations,
                adata,
                indices=pool[share],
                n_cells=len(share),
                library_size=np.asarray(library)[share] if by_cell else library,
                seed=seed,
                out=None if scratch is None else os.path.join(scratch, f"{k}.h5ad"),
                key_added=None,
                **kwargs,
            )
            if scratch is not None:
                stack.callback(made.file.close)
            predicted.append(made)
        shifts = sum(predicted_shifts(p) * (len(share) / n_cells) for p, share in zip(predicted, shares, strict=True))
        assert isinstance(shifts, pd.DataFrame)

        def blocks() -> Iterator[Block]:
            # cells of the models one after the other, back to the order of the source cells
            place = np.argsort(np.argsort(member, kind="stable"), kind="stable")
            obs = covariates.iloc[rows].assign(**{MEMBER_COLUMN: member})
            for i, label in enumerate(shifts.index):
                parts = [slice(i * len(share), (i + 1) * len(share)) for share in shares]
                x = _stacked([p.X[part] for p, part in zip(predicted, parts, strict=True)])[place]
                mean = None
                if out is None:
                    mean = np.concatenate([p.layers["mean"][part] for p, part in zip(predicted, parts, strict=True)])
                    mean = mean[place]
                yield Block(label, x, obs, mean)

        provenance = {
            "model": "ensemble",
            "members": np.array([type(m).__name__ for m in members], dtype=object).astype(str),
            "member_cells": np.array([len(share) for share in shares]),
            "version": pertvae.__version__,
            "scvi_version": scvi.__version__,
            "seed": seed,
            **{k: predicted[0].uns[UNS_PROVENANCE_KEY][k] for k in ("value_kind", "unknown")},
            "settings": {
                **_shared_settings([p.uns[UNS_PROVENANCE_KEY]["settings"] for p in predicted]),
                "n_cells": n_cells,
                "n_source_cells": len(pool),
                "labels": "" if labels is None else str(labels),
                "batch": "" if batch is None else str(batch),
            },
        }
        perturbation_key = first._perturbation_state["perturbation_key"] or "perturbation"
        arguments = (controls, predicted[0].var, perturbation_key)
        if out is None:
            result = prediction_anndata(list(blocks()), *arguments, shifts, shift_key, provenance)
        else:
            result = write_prediction(out, blocks(), *arguments, lambda: shifts, shift_key, provenance)
    if key_added is not None:
        write_table(adata.uns, shift_key, shifts, merge=True)
    return result


def _deal(pool: np.ndarray, chosen: np.ndarray, n_members: int, seed: int) -> np.ndarray:
    """Return which model each chosen cell is given to: even shares, at random, the copies of a cell together.

    As with :func:`choose_cells`, where a cell goes depends on the seed and the cells, not on their order in the pool.
    """
    rank = np.empty(len(pool), dtype=np.int64)
    rank[np.argsort(pool, kind="stable")] = np.random.default_rng(purpose_seed(seed, "ensemble")).permutation(len(pool))
    member = np.empty(len(chosen), dtype=np.int64)
    for k, share in enumerate(np.array_split(np.argsort(rank[chosen], kind="stable"), n_members)):
        member[share] = k
    return member


def _members(models: Sequence[PerturbationModel]) -> list[PerturbationModel]:
    """Return the models, checked: two or more, trained, registered alike."""
    members = [models] if isinstance(models, PerturbationModel) else list(models)
    for k, model in enumerate(members):
        if not isinstance(model, PerturbationModel):
            raise ValueError(
                f"models[{k}] is {model!r}, not a model of this package: pass trained ones, such as pv.SAMSVAE(adata)."
            )
    if len(members) < 2:
        raise ValueError(f"models has {len(members)} model(s): an ensemble needs two or more.")
    for model in members:
        model._check_if_trained(warn=False)
    expected = _registered(members[0])
    for k, model in enumerate(members[1:], start=1):
        names = f"models[0] ({type(members[0]).__name__})", f"models[{k}] ({type(model).__name__})"
        for what, found in _registered(model).items():
            if found != expected[what]:
                raise ValueError(
                    f"The models were not registered alike: {_difference(what, (expected[what], found), names)}. "
                    "Register them with the same setup_anndata arguments on the same genes, and train them again."
                )
    return members


def _registered(model: PerturbationModel) -> dict[str, Any]:
    """Return what the models of an ensemble must have in common."""
    state = model.registry_["field_registries"]["X"]["state_registry"]
    return {
        "genes": [str(g) for g in state["column_names"]],
        "perturbations": sorted(model.perturbation_names),
        "control": sorted(model.label_format.control),
        "sep": model.label_format.sep,
        "perturbation_key": model._perturbation_state["perturbation_key"],
        "layer": model.registry_["setup_args"].get("layer"),
        "values": "real values" if model.module.gene_likelihood == "normal" else "counts",
    }


def _difference(what: str, values: tuple[Any, Any], names: tuple[str, str]) -> str:
    """Return in words how two registrations differ."""
    if not isinstance(values[0], list):
        return f"{what} is {values[0]!r} in {names[0]} and {values[1]!r} in {names[1]}"
    texts = []
    for name, own, other in zip(names, values, values[::-1], strict=True):
        more = sorted(set(own) - set(other))
        if more:
            rest = f" and {len(more) - 3} more" if len(more) > 3 else ""
            texts.append(f"only {name} has the {what} {', '.join(map(repr, more[:3]))}{rest}")
    return "; ".join(texts) or f"the {what} of {names[1]} stand in another order than those of {names[0]}"


def _shared_settings(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return settings that agree as they are, others one after the other."""
    found = {}
    for name in settings[0]:
        values = [s[name] for s in settings]
        found[name] = values[0] if len(set(values)) == 1 else ", ".join(map(str, values))
    return found


def _stacked(parts: Sequence[Any]) -> Any:
    if all(sp.issparse(p) for p in parts):
        return sp.vstack([sp.csr_matrix(p) for p in parts], format="csr")
    return np.concatenate(parts)
