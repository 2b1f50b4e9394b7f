"""SAMS-VAE: a basal state plus sparse additive shifts (Bereket & Karaletsos 2023, arXiv 2311.02794)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pertvae.models.base import ModuleShape
from pertvae.models.samsvae._common import GlobalKL, ShiftedLatentModule
from pertvae.nn import MLP, EffectSample, GaussianHead, SparseEffects

BasalInference = Literal["mean_field", "correlated"]


class SAMSVAEModule(ShiftedLatentModule):
    """Module of SAMS-VAE.

    Generative process: ``m ~ Bernoulli(mask_prior)``, ``e ~ N(0, effect_prior_scale^2)``, ``z_basal ~ N(0, I)``,
    ``z = z_basal + sum_t d_t e_t m_t``, ``x ~ NB(l softmax(f(z)), theta)``.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    n_latent, n_hidden, n_layers, n_particles, gene_likelihood
        See :class:`~pertvae.models.base.PerturbationModule`; encoder and decoder have the same depth and width.
    mask_prior, effect_prior_scale, embedding_inference, mask_gradient, embedding_rank, mask_hyperprior
        See :class:`~pertvae.nn.SparseEffects`.
    basal_inference
        ``"correlated"``: the basal encoder also reads the cell's sampled latent shift. ``"mean_field"``: expression
        and covariates only.
    global_kl
        ``"full"``: every step takes the KL of all components over the number of training cells.  ``"plate"``: that
        of a cell's components over their numbers of training cells (published). Both have the same expectation;
        ``"full"`` has the lower variance and draws components without training cells to the prior.
    """

    def __init__(
        self,
        shape: ModuleShape,
        *,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_particles: int,
        gene_likelihood: Any,
        mask_prior: float,
        effect_prior_scale: float,
        embedding_inference: Any,
        basal_inference: BasalInference,
        mask_gradient: Any = "gumbel",
        global_kl: GlobalKL = "full",
        embedding_rank: int = 4,
        mask_hyperprior: Any = None,
    ) -> None:
        super().__init__(
            shape,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_particles=n_particles,
            gene_likelihood=gene_likelihood,
        )
        self.basal_inference, self.global_kl = basal_inference, global_kl
        n_offset = n_latent if basal_inference == "correlated" else 0
        self.encoder = MLP((shape.n_genes, n_offset, shape.n_covariates), n_hidden, n_layers)
        self.basal = GaussianHead(n_hidden, n_latent)
        self.effects = SparseEffects(
            shape.n_components,
            n_latent,
            mask_prior=mask_prior,
            effect_prior_scale=effect_prior_scale,
            embedding_inference=embedding_inference,
            mask_gradient=mask_gradient,
            n_hidden=n_hidden,
            embedding_rank=embedding_rank,
            mask_hyperprior=mask_hyperprior,
        )

    def encode(self, x: Tensor, offset: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal | x, offset, covariates)."""
        h = self.encoder(
            self.encoder_input(x),
            offset if self.basal_inference == "correlated" else None,
            covariates,
            standardize=(self.input_mean, self.input_sd),
        )
        return self.basal(h)

    def local_posterior(
        self, x: Tensor, doses: Tensor, covariates: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal | x, shift, covariates)."""
        return self.encode(x, shift, covariates)

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean inclusion probability."""
        return {"mask_density": self.effects.inclusion.detach().mean()}

    def basal_posterior(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal) at the expected shift of the cell's own label."""
        x, doses = inputs["x"], inputs["doses"]
        covariates = self.covariates(*(inputs[k] for k in ("batch_index", "labels", "cat_covs", "cont_covs")))
        return self.encode(x, self.offset(doses), covariates)

    def offset(self, doses: Tensor) -> Tensor:
        """Return the expected latent shift ``sum_t d_t E[m_t e_t]``, ``(cells, latents)``."""
        return doses @ self.effects.expected()

    def draw_offset(self, components: Tensor, doses: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return one posterior draw a cell of ``sum_t d_t m_t e_t``, ``(cells, latents)``."""
        return (doses[:, None] * self.effects.draw(components, uniform, normal)).sum(1)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the latent space: ``z @ rotation`` takes the place of z.

        The basal prior is rotation invariant, so with masks open the generative model is unchanged and the bound is
        too, up to posterior covariances that a diagonal cannot hold.

        Parameters
        ----------
        rotation
            Orthogonal, ``(n_latent, n_latent)``.
        """
        self.effects.rotate(rotation)
        self.decoder.mlp.rotate_input(0, rotation)
        self.basal.rotate(rotation, self.encoder.at_zero())
        self.encoder.rotate_input(1, rotation)

    def set_mask_cost(self, cost: float) -> None:
        """Make an open mask cost so many nats for every training cell of its perturbation, on top of its prior."""
        self.effects.set_prior(self.effects.base_logit - cost * self.cells_per_component[:, None])

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation, without the masks."""
        named, names = dict(self.effects.named_parameters()), ("loc", "log_sd", "factor", "identity.weight")
        return [*super().global_parameters(), *(named[n] for n in names if n in named)]

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return the log-odds of the masks."""
        return [self.effects.mask_logits]

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return ``E[m e]`` and the inclusion probability."""
        return self.effects.expected(), self.effects.inclusion

    def draw_globals(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Draw masks and effects."""
        return self.effects.sample(n_samples, generator)
