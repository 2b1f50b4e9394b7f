"""Average treatment effects: with credible intervals where effects have a posterior, and as the paper measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch

from pertvae._labels import hint
from pertvae._storage import write_tables
from pertvae.models.base._effects_protocol import PAPER_SAMPLES, PAPER_SPACES, paper_effects
from pertvae.models.base._requests import Request, dose_tensors, parse_requests
from pertvae.models.base._results import TreatmentEffects
from pertvae.models.base._streams import purpose_seed

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

EFFECT_CELLS = 100
MATCHED_SAMPLES = 100
# of each protocol, its default first
SPACES = {"matched": ("log1p_cp10k", "log2_cp10k", "log2_fold_change"), "paper": PAPER_SPACES}


class TreatmentEffectsMixin:
    """``get_treatment_effects`` of every model."""

    def _default_perturbations(self) -> list[str] | pd.DataFrame:
        """Return the labels or doses that are asked for when nothing is: every component."""
        return cast("PerturbationModel", self).perturbation_names

    @torch.inference_mode()
    def get_treatment_effects(
        self,
        perturbations: str | Sequence[str] | pd.DataFrame | None = None,
        n_samples: int | None = None,
        space: Literal["log1p_cp10k", "log2_cp10k", "log2_fold_change", "mean"] | None = None,
        credible: float = 0.9,
        protocol: Literal["matched", "paper"] = "matched",
        seed: int = 0,
        key_added: str | None = "auto",
    ) -> TreatmentEffects:
        """Return average treatment effects with intervals.

        With the default protocol each of ``n_samples`` posterior draws of the effects shifts the same (at most 100)
        control cells; their mean change of expected expression is one draw of the average treatment effect. Models with
        ``leak_correction`` add a draw of what effects left in the basal states.

        Parameters
        ----------
        perturbations
            Labels or doses as in :meth:`predict_perturbation`; every component by default (with
            ``dose_response="categories"`` at each of its training doses).
        n_samples
            Posterior draws (100) or, with ``protocol="paper"``, particles (2,500); more make intervals steadier.
        space
            ``"log1p_cp10k"`` (default of ``"matched"``): log1p(1e4 rho), rho the share of a gene in all counts.
            ``"log2_cp10k"`` (default of ``"paper"``): log2(1 + 1e4 rho). ``"log2_fold_change"``: change of log2 rho,
            ``"matched"`` only. ``"mean"``: counts of a cell of 10,000 counts, ``"paper"`` only. With
            ``gene_likelihood="normal"`` all give the change of the mean.
        credible
            Mass of the interval.
        protocol
            ``"matched"``: the same basal states with and without the perturbation; rho is the expected share. Free of
            count noise, so on shallow data not the shift of ``predict_perturbation``, which is measured on sampled
            counts. ``lower`` and ``upper`` are a credible interval of the average effect for the learned decoder, whose
            own uncertainty they do not hold.

            ``"paper"``: as the authors of SAMS-VAE evaluate (arXiv 2311.02794). Every particle is one draw of masks
            and effects, shared by all labels; a basal state from N(0, I), drawn anew for the control and each label;
            and counts sampled at a library of 10,000, of which rho is the observed share. The effect is the mean over
            particles minus that of the control, which is one for all labels. Single particles vary like cells, so
            ``lower`` and ``upper`` are no credible interval: they bound the Monte-Carlo error of ``mean``. The paper
            has no covariates; registered ones (batch, context, others) are those of a control cell drawn for each
            particle, the same for all labels.
        seed
            Of the draws; the global random state is left alone.
        key_added
            ``adata.uns`` key; ``"auto"`` is ``"<model>_effects"``; ``None`` writes nothing.

        Returns
        -------
        :class:`TreatmentEffects` with ``mean``, ``lower``, ``upper`` (perturbations x genes).

        Raises
        ------
        ValueError
            If the method has no posterior of effects and ``protocol`` is ``"matched"``, or an argument is not accepted.
        RuntimeError
            If the model is not trained.

        Notes
        -----
        Writes the registered AnnData's ``uns[key]`` with the tables ``mean``, ``lower``, ``upper`` (transposed).
        """
        model = cast("PerturbationModel", self)
        model._check_if_trained(warn=False)
        if protocol not in SPACES:
            raise ValueError(f"protocol={protocol!r} is not one of {list(SPACES)}.{hint(protocol, SPACES)}")
        if protocol == "matched" and not model.capabilities.credible_effects:
            raise ValueError(
                f"{type(self).__name__} has no posterior of its effects: use predict_perturbation, or "
                "protocol='paper', whose interval is the Monte-Carlo error of the mean."
            )
        accepted = SPACES[protocol]
        space_ = accepted[0] if space is None else space
        if space_ not in accepted:
            raise ValueError(
                f"space={space_!r} is not one of {list(accepted)} (protocol={protocol!r}).{hint(space_, accepted)}"
            )
        if not 0 < credible < 1:
            raise ValueError(f"credible={credible} is not between 0 and 1.")
        if n_samples is None:
            n_samples = PAPER_SAMPLES if protocol == "paper" else MATCHED_SAMPLES
        if n_samples < 2:
            raise ValueError(f"n_samples={n_samples}: an interval needs at least 2 draws.")
        requests, _ = parse_requests(
            model, model._default_perturbations() if perturbations is None else perturbations, "raise"
        )
        model._check_requests(requests)
        adata = model._validate_anndata(None)
        compute = paper_effects if protocol == "paper" else _matched_effects
        tables = compute(model, requests, n_samples, space_, credible, seed)
        genes = pd.Index(np.asarray(model.get_gene_names()))
        mean, lower, upper = (pd.DataFrame(t, index=[r.label for r in requests], columns=genes) for t in tables)
        effects = TreatmentEffects(mean, lower, upper)
        if key_added is not None:
            key = f"{type(self).__name__.lower()}_effects" if key_added == "auto" else key_added
            write_tables(adata.uns, key, vars(effects))
        return effects


def _matched_effects(
    model: PerturbationModel, requests: Sequence[Request], n_samples: int, space: str, credible: float, seed: int
) -> np.ndarray:
    """Return mean, lower and upper of the effects on the same control cells, ``(3, requests, genes)``."""
    z, covariates = model._control_states(model._validate_anndata(None), EFFECT_CELLS)
    # log2(1 + x) is log1p(x) in other units
    scale = 1 / np.log(2) if space == "log2_cp10k" and model.module.gene_likelihood != "normal" else 1.0
    space = "log1p_cp10k" if space == "log2_cp10k" else space
    before = model._expression(z, covariates, space)
    tables = np.empty((3, len(requests), model.module.shape.n_genes), np.float32)
    for i, request in enumerate(requests):
        # noise keyed by the label alone, so that the other labels asked for do not matter
        generator = torch.Generator().manual_seed(purpose_seed(seed, request.key))
        shape = (n_samples, len(request.doses), model.module.n_latent)
        uniform, normal = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
        components, doses, _ = dose_tensors(model, request)
        draws = torch.zeros(n_samples, model.module.n_latent, device=z.device)
        if request.doses:
            draws = model.module.draw_offset(components, doses, uniform.to(z.device), normal.to(z.device))
            spread = torch.randn(draws.shape, generator=generator).to(z.device)
            draws = draws + model.module.leak_spread(components, doses) * spread
        change = torch.stack([(model._expression(z + o, covariates, space) - before).mean(0) for o in draws])
        tails = torch.tensor([(1 - credible) / 2, (1 + credible) / 2], device=z.device)
        tables[0, i] = change.mean(0).cpu().numpy() * scale
        tables[1:, i] = torch.quantile(change, tails, dim=0).cpu().numpy() * scale
    return tables
