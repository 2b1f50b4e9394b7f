"""Latents, programs and likelihoods of every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from torch import Tensor

from pertvae._constants import CP10K
from pertvae._storage import write_tables
from pertvae.models.base._access import INNER_BLOCK, control_indices, minibatches, padded, row_indices
from pertvae.models.base._results import PerturbationPrograms
from pertvae.models.base._treatment_effects import TreatmentEffectsMixin

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

PROGRAM_CELLS = 500


class GettersMixin(TreatmentEffectsMixin):
    """Getters that return their result and write it to the AnnData."""

    @torch.inference_mode()
    def get_latent_representation(  # type: ignore[override]
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        kind: str = "full",
        give_mean: bool = True,
        seed: int = 0,
        batch_size: int | None = None,
        key_added: str | None = "auto",
    ) -> np.ndarray:
        """Return the latent representation of cells, encoded under their own labels.

        Parameters
        ----------
        adata
            Data to encode; the registered data by default.
        indices
            Cells; all by default.
        kind
            ``"full"``: what the decoder reads. ``"basal"``: free of the perturbation. ``"perturbation"``: the expected
            shift, zero for controls.
        give_mean
            Posterior mean; otherwise one draw of the basal state (with the expected shift).
        seed
            Of that draw.
        batch_size
            Cells read at a time.
        key_added
            ``adata.obsm`` key; ``"auto"`` is ``"X_<model>"``, ``"X_<model>_<kind>"`` for other kinds; ``None``
            writes nothing.

        Returns
        -------
        float32 array, cells x latents.

        Raises
        ------
        ValueError
            If ``kind`` is not offered.
        RuntimeError
            If the model is not trained.

        Notes
        -----
        Writes ``adata.obsm`` when all cells were asked for.
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        kinds = model.capabilities.latent_kinds
        if kind not in kinds:
            raise ValueError(f"kind={kind!r} is not offered by {type(self).__name__}: one of {list(kinds)}.")
        adata = model._validate_anndata(adata)
        rows = row_indices(adata, indices)
        unique, inverse = np.unique(rows, return_inverse=True)
        result = np.zeros((len(unique), model.module.n_latent), np.float32)
        noise = np.zeros_like(result) if give_mean else np.random.default_rng(seed).standard_normal(result.shape, "f4")
        for positions, tensors in minibatches(model, adata, unique, batch_size):
            inputs = model.module._get_inference_input(tensors)
            if give_mean:
                values = model.module.latent(inputs, kind)[0]
            else:
                values = model.module.draw_latent(inputs, kind, padded(noise[positions], model.device))
            result[positions] = values[: len(positions)].cpu().numpy()
        result = result[inverse]
        if key_added is not None and len(rows) == adata.n_obs and (rows == np.arange(adata.n_obs)).all():
            name = f"X_{type(self).__name__.lower()}" + ("" if kind == "full" else f"_{kind}")
            adata.obsm[name if key_added == "auto" else key_added] = result
        return result

    @torch.inference_mode()
    def get_perturbation_programs(
        self, adata: AnnData | MuData | None = None, key_added: str | None = "auto"
    ) -> PerturbationPrograms:
        """Return which perturbation moves which program, with what probability, and what each program does to genes.

        Parameters
        ----------
        adata
            Data whose controls (at most 500) the loadings are averaged over; the registered data by default.
        key_added
            ``adata.uns`` key; ``"auto"`` is ``"<model>_programs"``; ``None`` writes nothing.

        Returns
        -------
        :class:`PerturbationPrograms`: ``effects`` and ``inclusion`` (perturbations x programs), ``loadings``
        (programs x genes; mean over controls of log2 of a gene's share of expression after a rise by one unit over
        that before; for real values the mean difference), ``library`` (perturbations x ``log2_fold_change``: change of
        a cell's total counts by one dose, which predictions with ``library_size="predicted"`` use; ``None`` for real
        values).

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If there is no control cell.

        Notes
        -----
        Writes ``adata.uns[key]`` with the tables ``effects``, ``inclusion``, ``loadings`` and, unless it is ``None``,
        ``library`` (transposed), each with its ``<table>_names``.
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        adata = model._validate_anndata(adata)
        z, covariates = self._control_states(adata, PROGRAM_CELLS)
        effects, inclusion = (t.cpu().numpy() for t in model.module.program_tables())
        names = [f"program_{k}" for k in range(effects.shape[1])]
        before = self._expression(z, covariates)
        loadings = np.empty((len(names), model.module.shape.n_genes), np.float32)
        for k in range(len(names)):
            step = torch.zeros(model.module.n_latent, device=z.device)
            step[k] = 1.0
            loadings[k] = (self._expression(z + step, covariates) - before).mean(0).cpu().numpy()
        genes = pd.Index(np.asarray(model.get_gene_names()))
        programs = PerturbationPrograms(
            pd.DataFrame(effects, index=self._program_rows(), columns=names),
            pd.DataFrame(inclusion, index=self._program_rows(), columns=names),
            pd.DataFrame(loadings, index=names, columns=genes),
            self._library_table(),
        )
        if key_added is not None:
            key = f"{type(self).__name__.lower()}_programs" if key_added == "auto" else key_added
            write_tables(adata.uns, key, {name: t for name, t in vars(programs).items() if t is not None})
        return programs

    @torch.inference_mode()
    def get_marginal_ll(  # type: ignore[override]
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_mc_samples: int = 100,
        return_mean: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
        n_mc_samples_per_pass: int = 10,
        **kwargs: Any,
    ) -> float | Tensor:
        """Return the importance-weighted log-likelihood (IWELBO) of cells, nats a cell.

        Masks and effects are drawn once and shared by all cells; they are not scored against their prior, as in the
        paper's evaluation.

        Parameters
        ----------
        adata, indices
            Cells; all of the registered data by default.
        n_mc_samples
            Draws a cell; the bound tightens with more.
        return_mean
            The mean over cells, or one value a cell.
        batch_size
            Cells read at a time.
        seed
            Of the draws.
        n_mc_samples_per_pass
            Draws held in memory at a time.
        **kwargs
            Accepted for scvi-tools' callers and not used.

        Returns
        -------
        A float, or a tensor of one value a cell.

        Raises
        ------
        ValueError
            If the method has no such likelihood.
        RuntimeError
            If the model is not trained.
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        if not model.capabilities.marginal_ll:
            raise ValueError(f"{type(self).__name__} has no marginal likelihood.")
        if n_mc_samples < 1 or n_mc_samples_per_pass < 1:
            raise ValueError(
                f"n_mc_samples={n_mc_samples} and n_mc_samples_per_pass={n_mc_samples_per_pass}: at least 1."
            )
        adata = model._validate_anndata(adata)
        rows = row_indices(adata, indices)
        unique, inverse = np.unique(rows, return_inverse=True)
        generator = torch.Generator(model.device).manual_seed(seed)
        sizes = [n_mc_samples_per_pass] * (n_mc_samples // n_mc_samples_per_pass)
        sizes += [n_mc_samples % n_mc_samples_per_pass] if n_mc_samples % n_mc_samples_per_pass else []
        globals_ = [model.module.draw_globals(size, generator) for size in sizes]
        values = torch.empty(len(unique))
        for positions, tensors in minibatches(model, adata, unique, batch_size):
            total = torch.full((INNER_BLOCK,), -torch.inf, device=model.device)
            for sample in globals_:
                weights = model.module.log_weights(tensors, sample, generator)
                total = torch.logaddexp(total, torch.logsumexp(weights, 0))
            values[positions] = (total - np.log(n_mc_samples))[: len(positions)].cpu()
        values = values[inverse]
        return float(values.mean()) if return_mean else values

    # ---------------------------------------------------------------- steps

    def _program_rows(self) -> list[str]:
        """Return the names of the rows of the programs' effects: the perturbations."""
        return cast("PerturbationModel", self).perturbation_names

    def _library_table(self) -> pd.DataFrame | None:
        """Return the effects on total counts, perturbations x ``log2_fold_change``."""
        model = cast("PerturbationModel", self)
        if model.module.gene_likelihood == "normal" or model.library_effects_ is None:
            return None
        change = model.library_effects_.effects / np.log(2)
        return pd.DataFrame({"log2_fold_change": change}, index=model.perturbation_names)

    def get_gene_names(self) -> np.ndarray:
        """Return the names of the registered genes, in their order.

        Returns
        -------
        Array of text, one a gene.
        """
        model = cast("PerturbationModel", self)
        return np.asarray(model.registry_["field_registries"]["X"]["state_registry"]["column_names"])

    def _control_states(self, adata: AnnData | MuData, n_cells: int) -> tuple[Tensor, Tensor | None]:
        """Return posterior means of the basal state and covariates of at most ``n_cells`` controls."""
        model = cast("PerturbationModel", self)
        pool = control_indices(model, adata)
        if adata is model.adata and model.test_indices is not None:
            # test cells are no part of what a model reports; without other controls there is no choice
            kept = np.setdiff1d(pool, np.asarray(model.test_indices, dtype=np.int64))
            pool = kept if len(kept) else pool
        rows = np.sort(np.random.default_rng(0).permutation(pool)[:n_cells])
        states, covariates = [], []
        for positions, tensors in minibatches(model, adata, rows):
            inputs = model.module._get_inference_input(tensors)
            states.append(model.module.basal_posterior(inputs)[0][: len(positions)])
            encoded = model.module.covariates_of(inputs)
            if encoded is not None:
                covariates.append(encoded[: len(positions)])
        return torch.cat(states), torch.cat(covariates) if covariates else None

    def _expression(self, z: Tensor, covariates: Tensor | None, space: str = "log2_fold_change") -> Tensor:
        """Return expected expression on a log scale (real values: as it is), cells x genes.

        A decoder that reads doses is told none: the perturbation stands in the latents, or nowhere.
        """
        model = cast("PerturbationModel", self)
        doses = torch.zeros(1, model.module.shape.n_components, device=z.device)
        px = model.module.decode(z, doses, covariates, torch.ones(len(z), 1, device=z.device))
        if model.module.gene_likelihood == "normal":
            return px.loc
        rho = px.scale
        return torch.log1p(CP10K * rho) if space == "log1p_cp10k" else torch.log2(rho.clamp(min=1e-12))
