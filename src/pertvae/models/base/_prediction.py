"""``predict_perturbation``: cells under perturbations they were not given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

import pertvae
from pertvae._expression import mean_profile
from pertvae._labels import hint
from pertvae._predictions import Block, prediction_anndata, write_prediction
from pertvae._storage import write_table
from pertvae.models.base._access import (
    INNER_BLOCK,
    control_indices,
    counts_table,
    covariate_columns,
    minibatches,
    padded,
)
from pertvae.models.base._requests import Request, choose_cells, dose_tensors, parse_requests
from pertvae.models.base._streams import CellStreams, cell_keys

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

DEFAULT_CELLS = 500
LIBRARY_CHOICES = ("observed", "predicted", "control_median")


@dataclass
class Sources:
    """Source cells of a prediction, encoded once.

    Parameters
    ----------
    rows
        Cells of the data, repeats allowed.
    keys
        Random key of each.
    tensors
        Padded blocks: basal draws, library, covariates.
    library
        Library of each cell, counts.
    """

    rows: np.ndarray
    keys: np.ndarray
    z_basal: np.ndarray
    covariates: np.ndarray | None
    library: np.ndarray


class PredictionMixin:
    """``predict_perturbation`` of every model."""

    @torch.inference_mode()
    def predict_perturbation(
        self,
        perturbations: str | Sequence[str] | pd.DataFrame,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_cells: int | None = None,
        basal: str | None = None,
        output: Literal["counts", "mean"] = "counts",
        library_size: str | float | np.ndarray | None = None,
        labels: str | Sequence[str] | None = None,
        batch: str | Sequence[str] | None = None,
        unseen: Literal["raise", "ignore"] = "raise",
        seed: int = 0,
        batch_size: int | None = None,
        out: str | None = None,
        key_added: str | None = "auto",
    ) -> AnnData:
        """Predict cells under perturbations, combinations never seen together included.

        Source cells are encoded under their own labels; only the dose is swapped. Each predicted cell has its own
        draw of basal state, effects and counts, which depends on (seed, canonical label, cell) and nothing else.

        Parameters
        ----------
        perturbations
            A label, several, or a DataFrame of doses (rows are named predictions, columns components).
        adata
            Data with the source cells; the registered data by default.
        indices
            Source cells; the controls by default.
        n_cells
            Cells a perturbation; ``min(source cells, 500)`` by default. Above the number of source cells each is
            used once, then at random with replacement.
        basal
            ``"control"``: basal states of the source cells. ``"prior"``: draws from the prior, as in the papers.
            The method's first capability by default.
        output
            ``X``: sampled counts (CSR) or expected counts (``"mean"``, dense).
        library_size
            Total counts of predicted cells: ``"observed"`` (of the source cell), ``"predicted"`` (that times the
            perturbation's learned effect on total counts), ``"control_median"``, a number, or one number a source
            cell. By default ``"predicted"`` if validation cells were better described with those effects, else
            ``"observed"``.
        labels, batch
            Take source cells with these values of ``labels_key`` or ``batch_key`` only.
        unseen
            What to do with unknown components: raise, or let them contribute nothing (with a warning).
        seed
            Of all draws; the global random state is left alone.
        batch_size
            Cells read at a time; results do not depend on it.
        out
            Path of an h5ad file that is written block by block; it is returned opened in backed mode, without
            ``layers["mean"]``.
        key_added
            Where shifts are stored in ``adata.uns``; ``"auto"`` is ``"<model>_predictions"``, ``None`` stores nothing.

        Returns
        -------
        AnnData: a block of cells for each perturbation in the order asked, then the source cells once with observed
        counts. ``obs``: the perturbation column, ``source_cell``, ``generated``, covariates. ``layers["mean"]``:
        expected counts (observed ones for the source cells). ``uns["pertvae"]``: model, version, seed, settings.

        Raises
        ------
        ValueError
            If a component is unknown, there are no source cells, or an argument is not accepted.
        RuntimeError
            If the model is not trained.

        Notes
        -----
        Writes ``adata.uns["<model>_predictions"]``, merged by label: genes x perturbations, mean over a block of
        log1p CP10k of sampled counts minus the same for zero dose with equal basal draws and libraries (for real
        values: mean difference). ``uns["<model>_predictions_names"]`` maps its columns to the labels.
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        basal = model._check_basal(basal)
        if output not in ("counts", "mean"):
            raise ValueError(f"output={output!r} is not one of ['counts', 'mean'].")
        requests, unknown = parse_requests(model, perturbations, unseen)
        model._check_requests(requests)
        adata = model._validate_anndata(adata)
        pool = control_indices(model, adata, indices, labels, batch)
        chosen = choose_cells(pool, min(len(pool), DEFAULT_CELLS) if n_cells is None else n_cells, seed)
        rows = pool[chosen]
        sources = model._encode_sources(adata, rows, basal, seed, batch_size)
        library, mode = model._resolve_library(library_size, sources, chosen, len(pool))

        table = counts_table(model, adata)
        covariates = covariate_columns(model, adata)
        once = np.array(list(dict.fromkeys(rows.tolist())))
        controls = Block(
            model.label_format.control[0],
            sp.csr_matrix(_observed(model, adata, once)),
            covariates.iloc[once],
        )
        perturbation_key = model._perturbation_state["perturbation_key"] or "perturbation"
        shift_key = f"{type(model).__name__.lower()}_predictions" if key_added in ("auto", None) else str(key_added)
        shifts: dict[str, np.ndarray] = {}

        def blocks() -> Iterator[Block]:
            reference: dict[bool, np.ndarray] = {}
            for request in requests:
                scale = model._library_scale(request) if mode == "predicted" else 1.0
                x, mean = model._generate(request, sources, library * scale, seed)
                zero = Request(model.label_format.control[0], model.label_format.control[0], {})
                if scale == 1.0 and True in reference:
                    base = reference[True]
                else:
                    base = model._profile(model._generate(zero, sources, library * scale, seed)[0])
                    reference[scale == 1.0] = base
                shifts[request.label] = model._profile(x) - base
                yield Block(
                    request.label,
                    mean if output == "mean" else x,
                    covariates.iloc[rows],
                    mean if out is None else None,
                )

        provenance = {
            "model": type(model).__name__,
            "version": pertvae.__version__,
            "scvi_version": scvi.__version__,
            "seed": seed,
            "value_kind": output if model.module.gene_likelihood != "normal" else f"{output} (real values)",
            "unknown": np.array(unknown, dtype=object).astype(str),
            "settings": {
                "basal": basal,
                "library_size": mode,
                "n_cells": len(rows),
                "n_source_cells": len(pool),
                "library_value": f"{library[0]:.6g}" if mode == "number" else "",
                "labels": "" if labels is None else str(labels),
                "batch": "" if batch is None else str(batch),
                "unseen": unseen,
                "output": output,
                "gene_likelihood": str(model.module.gene_likelihood),
            },
        }
        arguments = (controls, table.var, perturbation_key)

        def shift_table() -> pd.DataFrame:
            return pd.DataFrame(
                np.stack([shifts[r.label] for r in requests]),
                index=[r.label for r in requests],
                columns=table.var_names,
            )

        if out is None:
            made = list(blocks())
            result = prediction_anndata(made, *arguments, shift_table(), shift_key, provenance)
        else:
            result = write_prediction(out, blocks(), *arguments, shift_table, shift_key, provenance)
        if key_added is not None:
            write_table(adata.uns, shift_key, shift_table(), merge=True)
        return result

    # ---------------------------------------------------------------- steps

    def _check_basal(self, basal: str | None) -> str:
        accepted = self.capabilities.basal  # type: ignore[attr-defined]
        if basal is None:
            return accepted[0]
        if basal not in accepted:
            raise ValueError(f"basal={basal!r} is not offered by {type(self).__name__}: one of {list(accepted)}.")
        return basal

    def _check_requests(self, requests: Sequence[Request]) -> None:
        """Raise for what the method cannot predict although its components are known."""

    def _encode_sources(
        self, adata: AnnData | MuData, rows: np.ndarray, basal: str, seed: int, batch_size: int | None
    ) -> Sources:
        """Encode each source cell once and draw its basal state."""
        model = cast("PerturbationModel", self)
        unique, inverse = np.unique(rows, return_inverse=True)
        library = np.empty(len(unique), np.float32)
        covariates = np.empty((len(unique), model.module.shape.n_covariates), np.float32)
        keys = cell_keys(adata.obs_names, rows)
        z = CellStreams(seed, "basal", keys).normal(model.module.n_latent)
        # noise of each cell's copies, copies x cells x latents: a cell is encoded once
        copy = pd.Series(rows).groupby(rows, sort=False).cumcount().to_numpy()
        noise = np.zeros((copy.max() + 1, len(unique), model.module.n_latent), np.float32)
        noise[copy, inverse] = z
        for positions, tensors in minibatches(model, adata, unique, batch_size):
            n = len(positions)
            inputs = model.module._get_inference_input(tensors)
            if basal != "prior":
                draw = model.module.basal_sampler(inputs)
                drawn = draw(padded(noise[:, positions], model.device, axis=1))
                noise[:, positions] = drawn[:, :n].cpu().numpy()
            library[positions] = model.module.library_size(inputs["x"], inputs["size_factor"])[:n, 0].cpu().numpy()
            encoded = model.module.covariates_of(inputs)
            if encoded is not None:
                covariates[positions] = encoded[:n].cpu().numpy()
        z = noise[copy, inverse]
        return Sources(rows, keys, z, covariates[inverse] if covariates.shape[1] else None, library[inverse])

    def _resolve_library(
        self, library_size: str | float | np.ndarray | None, sources: Sources, chosen: np.ndarray, n_pool: int
    ) -> tuple[np.ndarray, str]:
        """Return the library of each predicted cell before effects, and the name of the choice."""
        model = cast("PerturbationModel", self)
        fitted = model.library_effects_
        if library_size is None:
            library_size = "predicted" if fitted is not None and fitted.use else "observed"
        if isinstance(library_size, str):
            if library_size not in LIBRARY_CHOICES:
                raise ValueError(
                    f"library_size={library_size!r} is not one of {list(LIBRARY_CHOICES)}, a number or an array."
                    f"{hint(library_size, LIBRARY_CHOICES)}"
                )
            if library_size == "control_median":
                assert fitted is not None
                return np.full(len(sources.rows), fitted.control_median, np.float32), library_size
            return sources.library, library_size
        values = np.asarray(library_size, dtype=np.float32)
        if not np.isfinite(values).all() or (values <= 0).any():
            raise ValueError(f"library_size must be positive and finite; got {values.ravel()[:3].tolist()}.")
        if values.ndim == 0:
            return np.full(len(sources.rows), float(values), np.float32), "number"
        if values.shape != (n_pool,):
            raise ValueError(f"library_size has shape {values.shape}, but there are {n_pool} source cells.")
        return values[chosen], "array"

    def _library_scale(self, request: Request) -> float:
        """Return the factor a perturbation puts on total counts."""
        model = cast("PerturbationModel", self)
        assert model.library_effects_ is not None
        effects = dict(zip(model.perturbation_names, model.library_effects_.effects, strict=True))
        return float(np.exp(sum(d * effects[c] for c, d in request.doses.items())))

    def _generate(
        self, request: Request, sources: Sources, library: np.ndarray, seed: int
    ) -> tuple[sp.csr_matrix | np.ndarray, np.ndarray]:
        """Return sampled and expected expression of one label, cells x genes."""
        model = cast("PerturbationModel", self)
        module = model.module
        components, doses, row = dose_tensors(model, request)
        means, parts = [], []
        for start in range(0, len(sources.rows), INNER_BLOCK):
            n = min(INNER_BLOCK, len(sources.rows) - start)
            streams = CellStreams(seed, request.key, sources.keys[start : start + n])
            z, size = (padded(a[start : start + n], model.device) for a in (sources.z_basal, library[:, None]))
            if len(components):
                shape = (len(components), module.n_latent)
                uniform, normal = (padded(draw(*shape), model.device) for draw in (streams.uniform, streams.normal))
                z = z + module.draw_offset(components, doses, uniform, normal)
            covariates = None
            if sources.covariates is not None:
                covariates = padded(sources.covariates[start : start + n], model.device)
            px = module.decode(z, row, covariates, size)
            mean = px.mean[:n].cpu().numpy()
            means.append(mean)
            if module.gene_likelihood == "normal":
                noise = streams.normal(mean.shape[1])
                parts.append(mean + noise * module.decoder.scale.detach().cpu().numpy())
            else:
                theta = module.decoder.scale.detach().cpu().numpy() if module.gene_likelihood == "nb" else None
                parts.append(sp.csr_matrix(streams.counts(mean, theta)))
        if module.gene_likelihood == "normal":
            return np.concatenate(parts), np.concatenate(means)
        return sp.vstack(parts, format="csr"), np.concatenate(means)

    def _profile(self, x: Any) -> np.ndarray:
        """Return the mean log1p CP10k of generated cells (of real values: their mean)."""
        model = cast("PerturbationModel", self)
        if model.module.gene_likelihood == "normal":
            return np.asarray(x).mean(axis=0)
        return mean_profile(x)


def _observed(model: PerturbationModel, adata: AnnData | MuData, rows: np.ndarray) -> Any:
    """Return the registered expression of some cells, in this order."""
    x = model.get_anndata_manager(adata, required=True).get_from_registry(REGISTRY_KEYS.X_KEY)
    order = np.argsort(rows)
    block = x[rows[order]]
    return block[np.argsort(order)]
