"""CPA-VAE: SAMS-VAE without masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from anndata import AnnData
from mudata import MuData
from torch import Tensor

from pertvae.models.base import Capabilities, ModuleShape, PerturbationModel
from pertvae.models.samsvae._additive import ADDITIVE, AdditiveMixin
from pertvae.models.samsvae._arguments import check_arguments, own_arguments, summary, without
from pertvae.models.samsvae._module import SAMSVAEModule


class CPAVAEModule(SAMSVAEModule):
    """Module of CPA-VAE: that of SAMS-VAE with all masks held open.

    ``e ~ N(0, effect_prior_scale^2)``, ``z_basal ~ N(0, I)``, ``z = z_basal + sum_t d_t e_t``.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    effect_threshold
        Size of a shift, by a typical dose, that counts in the inclusion probability.
    **kwargs
        See :class:`~pertvae.models.samsvae._module.SAMSVAEModule`.
    """

    def __init__(self, shape: ModuleShape, *, effect_threshold: float, **kwargs: Any) -> None:
        super().__init__(shape, mask_prior=0.5, **kwargs)
        self.effect_threshold = effect_threshold
        self.effects.open = True
        self.effects.mask_logits.requires_grad_(False)

    def metrics(self) -> dict[str, Tensor]:
        """Return nothing: there are no masks."""
        return {}

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return nothing: there are no masks."""
        return []

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return ``E[e]`` and the posterior probability that its shift, by a typical dose, is above the threshold.

        Where doses are categories it is that of the dose for which it is largest.
        """
        mean, sd = self.effects.posterior(torch.ones_like(self.effects.mask_logits))
        inclusion = self._above(mean * self.effects.typical_dose, sd * self.effects.typical_dose)
        if self.levels is not None:
            deviation, spread = self.levels.posterior()
            of = self.levels.component
            by_level = self._above(mean[of] + deviation, (sd[of].square() + spread.square()).sqrt())
            inclusion = self.levels.largest(inclusion, by_level)
        return mean, inclusion

    def _above(self, mean: Tensor, sd: Tensor) -> Tensor:
        """Return the probability that a normal number is larger than the threshold, of either sign."""
        normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
        return normal.cdf((mean - self.effect_threshold) / sd) + normal.cdf((-mean - self.effect_threshold) / sd)


class CPAVAE(AdditiveMixin, PerturbationModel):
    """SAMS-VAE without masks, the "CPA-VAE" of :cite:t:`Bereket23`.

    A cell's latent state is a basal state plus, for each perturbation it received, a dense shift. Of the compositional
    perturbation autoencoder (CPA) it shares the addition in latent space, and neither the adversary nor the networks
    of doses and covariates.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    registry
        A registration without data (for datamodules and loading).
    n_latent, n_hidden, n_layers, n_layers_decoder, n_particles, gene_likelihood
        As in :class:`~pertvae.SAMSVAE`.
    effect_prior_scale
        Prior standard deviation of the effects of a dose of 1, in units of the basal state's prior standard deviation.
    embedding_inference
        Posterior of the effects: ``"mean_field"`` (published) or ``"low_rank"``.
    basal_inference
        ``"correlated"``: the posterior of the basal state also reads the cell's shift. ``"mean_field"``: expression
        only.
    global_kl
        ``"full"`` or ``"plate"`` (published); see :class:`~pertvae.models.samsvae._module.SAMSVAEModule`.
    embedding_rank
        Rank of the covariance of ``embedding_inference="low_rank"``.
    effect_threshold
        An effect counts in ``inclusion`` with the posterior probability that its shift by a typical dose (the root mean
        square of the perturbation's training doses; of categories the one that moves it most) is larger than this, in
        units of the basal state's prior standard deviation.
    dose_response, dose_deviation_scale, dose_levels, basal_posterior, objective, leak_correction
        As in :class:`~pertvae.SAMSVAE`.

    Raises
    ------
    ValueError
        If an argument is not accepted, or the data were registered as real values and the likelihood needs counts.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> pv.CPAVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    >>> model = pv.CPAVAE(adata)
    >>> model.train()
    >>> predicted = model.predict_perturbation(["P001+P002"])
    """

    _module_cls = CPAVAEModule
    capabilities = Capabilities(
        **ADDITIVE,
        program="latent dimension; effect = posterior mean",
        inclusion="posterior probability that the effect is larger than effect_threshold",
    )

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        n_latent: int = 32,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_layers_decoder: int | None = None,
        n_particles: int = 1,
        gene_likelihood: Literal["nb", "poisson", "normal"] = "nb",
        effect_prior_scale: float = 1.0,
        embedding_inference: Literal["mean_field", "low_rank"] = "mean_field",
        basal_inference: Literal["mean_field", "correlated"] = "correlated",
        global_kl: Literal["full", "plate"] = "full",
        embedding_rank: int = 4,
        effect_threshold: float = 0.5,
        dose_response: Literal["linear", "hill", "categories"] = "linear",
        dose_deviation_scale: float = 0.5,
        dose_levels: Sequence[tuple[str, float]] | None = None,
        basal_posterior: Literal["gaussian", "flow"] = "gaussian",
        objective: Literal["elbo", "iwae"] = "elbo",
        leak_correction: bool = True,
    ) -> None:
        arguments = own_arguments(locals())
        super().__init__(adata, registry)
        check_arguments(arguments, embedding_inference=("mean_field", "low_rank"))
        dose_levels = self._dose_levels(dose_response, dose_levels)
        arguments["dose_levels"] = self._indexed_levels(dose_levels)
        self.module = CPAVAEModule(self._module_shape(gene_likelihood), **without(arguments, ("leak_correction",)))
        self.leak_correction = leak_correction
        self._model_summary_string = summary(self)
        self.init_params_ = self._get_init_params(locals())
