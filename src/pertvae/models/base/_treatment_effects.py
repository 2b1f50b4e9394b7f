"""Average treatment effects of every model that has a posterior of effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch

from pertvae._labels import hint
from pertvae._storage import write_tables
from pertvae.models.base._requests import parse_requests
from pertvae.models.base._results import TreatmentEffects
from pertvae.models.base._streams import purpose_seed

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

EFFECT_CELLS = 100
SPACES = ("log1p_cp10k", "log2_fold_change")


class TreatmentEffectsMixin:
    """``get_treatment_effects`` of every model."""

    @torch.inference_mode()
    def get_treatment_effects(
        self,
        perturbations: str | Sequence[str] | pd.DataFrame | None = None,
        n_samples: int = 100,
        space: Literal["log1p_cp10k", "log2_fold_change"] = "log1p_cp10k",
        credible: float = 0.9,
        protocol: Literal["matched"] = "matched",
        seed: int = 0,
        key_added: str | None = "auto",
    ) -> TreatmentEffects:
        """Return average treatment effects on expected expression, with credible intervals.

        Each of ``n_samples`` posterior draws of the effects shifts the same (at most 100) control cells; their mean
        change is one draw of the average treatment effect.

        Parameters
        ----------
        perturbations
            Labels or doses as in :meth:`predict_perturbation`; every component by default.
        n_samples
            Posterior draws; more make the ends of the interval steadier.
        space
            ``"log1p_cp10k"``: change of log1p(1e4 rho), rho the expected share of a gene. Free of count noise, so on
            shallow data not the shift of ``predict_perturbation``, which is measured on sampled counts.
            ``"log2_fold_change"``: change of log2 rho. With ``gene_likelihood="normal"`` both give the change of the
            mean.
        credible
            Mass of the interval.
        protocol
            ``"matched"``: the same basal states with and without the perturbation.
        seed
            Of the draws.
        key_added
            ``adata.uns`` key; ``"auto"`` is ``"<model>_effects"``; ``None`` writes nothing.

        Returns
        -------
        :class:`TreatmentEffects` with ``mean``, ``lower``, ``upper`` (perturbations x genes).

        Raises
        ------
        ValueError
            If the method has no posterior of effects, or an argument is not accepted.
        RuntimeError
            If the model is not trained.

        Notes
        -----
        Writes the registered AnnData's ``uns[key]`` with the tables ``mean``, ``lower``, ``upper`` (transposed).
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        if not model.capabilities.credible_effects:
            raise ValueError(f"{type(self).__name__} has no posterior of its effects: use predict_perturbation.")
        if space not in SPACES:
            raise ValueError(f"space={space!r} is not one of {list(SPACES)}.{hint(space, SPACES)}")
        if protocol != "matched":
            raise ValueError(f"protocol={protocol!r} is not one of ['matched'].")
        if not 0 < credible < 1:
            raise ValueError(f"credible={credible} is not between 0 and 1.")
        if n_samples < 2:
            raise ValueError(f"n_samples={n_samples}: an interval needs at least 2 draws.")
        requests, _ = parse_requests(
            model, model.perturbation_names if perturbations is None else perturbations, "raise"
        )
        adata = model._validate_anndata(None)
        z, covariates = model._control_states(adata, EFFECT_CELLS)
        before = model._expression(z, covariates, space)
        position = {c: j for j, c in enumerate(model.perturbation_names)}
        tables = np.empty((3, len(requests), model.module.shape.n_genes), np.float32)
        for i, request in enumerate(requests):
            # noise keyed by the label alone, so that the other labels asked for do not matter
            generator = torch.Generator().manual_seed(purpose_seed(seed, request.key))
            shape = (n_samples, len(request.doses), model.module.n_latent)
            uniform, normal = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
            components = torch.tensor([position[c] for c in request.doses], dtype=torch.long, device=z.device)
            doses = torch.tensor(list(request.doses.values()), dtype=torch.float32, device=z.device)
            draws = torch.zeros(n_samples, model.module.n_latent, device=z.device)
            if request.doses:
                draws = model.module.draw_offset(components, doses, uniform.to(z.device), normal.to(z.device))
            change = torch.stack([(model._expression(z + o, covariates, space) - before).mean(0) for o in draws])
            tails = torch.tensor([(1 - credible) / 2, (1 + credible) / 2], device=z.device)
            tables[0, i] = change.mean(0).cpu().numpy()
            tables[1:, i] = torch.quantile(change, tails, dim=0).cpu().numpy()
        genes = pd.Index(np.asarray(model.get_gene_names()))
        mean, lower, upper = (pd.DataFrame(t, index=[r.label for r in requests], columns=genes) for t in tables)
        effects = TreatmentEffects(mean, lower, upper)
        if key_added is not None:
            key = f"{type(self).__name__.lower()}_effects" if key_added == "auto" else key_added
            write_tables(adata.uns, key, vars(effects))
        return effects
