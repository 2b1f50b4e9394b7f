"""SAMS-VAE: a basal state plus sparse additive shifts (Bereket & Karaletsos 2023, arXiv 2311.02794)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor
from torch.distributions import Normal

from pertvae.models.base import ModuleShape, PerturbationModule
from pertvae.nn import MLP, EffectSample, GaussianHead, SparseEffects, gaussian_kl

BasalInference = Literal["mean_field", "correlated"]
GlobalKL = Literal["full", "plate"]


class SAMSVAEModule(PerturbationModule):
    """Module of SAMS-VAE.

    Generative process: ``m ~ Bernoulli(mask_prior)``, ``e ~ N(0, effect_prior_scale^2)``, ``z_basal ~ N(0, I)``,
    ``z = z_basal + sum_t d_t e_t m_t``, ``x ~ NB(l softmax(f(z)), theta)``.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    n_latent, n_hidden, n_layers, n_particles, gene_likelihood
        See :class:`~pertvae.models.base.PerturbationModule`; encoder and decoder have the same depth and width.
    mask_prior, effect_prior_scale, embedding_inference, mask_gradient
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

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        doses: Tensor,
        size_factor: Tensor | None = None,
        batch_index: Tensor | None = None,
        labels: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        n_samples: int | None = None,
        globals_: EffectSample | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Draw the latents.

        Parameters
        ----------
        x, doses, size_factor, batch_index, labels, cat_covs, cont_covs
            A minibatch.
        n_samples
            Draws; ``n_particles`` by default. One draw has no leading dimension in the outputs.
        globals_
            Draws of masks and effects to use instead of new ones.
        generator
            Source of randomness; the global one by default.
        """
        if globals_ is None:
            globals_ = self.effects.sample(n_samples or self.n_particles, generator)
        offset = doses @ globals_.effect
        mean, sd = self.encode(x, offset, self.covariates(batch_index, labels, cat_covs, cont_covs))
        if mean.dim() < offset.dim():
            mean, sd = mean.expand_as(offset), sd.expand_as(offset)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z_basal = mean + sd * noise
        z = z_basal + offset
        if len(z) == 1:
            z, z_basal, offset, mean, sd = z[0], z_basal[0], offset[0], mean[0], sd[0]
        return {
            MODULE_KEYS.Z_KEY: z,
            MODULE_KEYS.QZ_KEY: Normal(mean + offset, sd, validate_args=False),
            MODULE_KEYS.LIBRARY_KEY: self.library_size(x, size_factor),
            "z_basal": z_basal,
            "basal_mean": mean,
            "basal_sd": sd,
            "globals": globals_,
        }

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float | Tensor = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Return the negative ELBO a cell: reconstruction + local KL + global KL / training cells."""
        inputs = self._get_inference_input(tensors)
        x, doses = inputs["x"], inputs["doses"]
        reconstruction = -self.decoder.log_prob(generative_outputs[MODULE_KEYS.PX_KEY], x)
        kl_local = gaussian_kl(inference_outputs["basal_mean"], inference_outputs["basal_sd"]).sum(-1)
        if reconstruction.dim() > 1:
            reconstruction, kl_local = reconstruction.mean(0), kl_local.mean(0)
        kl_component = inference_outputs["globals"].kl.mean(0)
        if self.global_kl == "full":
            kl_global = kl_component.sum()
            per_cell = kl_global / n_obs
        else:
            weight = (doses != 0).to(x.dtype).mean(0) / self.cells_per_component
            weight = torch.where(self.cells_per_component > 0, weight, torch.zeros_like(weight))
            per_cell = weight @ kl_component
            kl_global = per_cell * n_obs
        objective = (reconstruction + kl_local).mean() + per_cell
        loss = reconstruction.mean() + kl_weight * (kl_local.mean() + per_cell)
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction,
            kl_local=kl_local,
            kl_global=kl_global,
            extra_metrics={
                "objective": objective.detach(),
                "mask_density": self.effects.inclusion.detach().mean(),
            },
        )

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

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation, without the masks."""
        named = dict(self.effects.named_parameters())
        return [*super().global_parameters(), *(named[n] for n in ("loc", "log_sd", "identity.weight") if n in named)]

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return the log-odds of the masks."""
        return [self.effects.mask_logits]

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return ``E[m e]`` and the inclusion probability."""
        return self.effects.expected(), self.effects.inclusion

    def draw_globals(self, n_samples: int, generator: torch.Generator) -> EffectSample:
        """Draw masks and effects."""
        return self.effects.sample(n_samples, generator)

    @auto_move_data
    def log_weights(self, tensors: dict[str, Tensor], globals_: EffectSample, generator: torch.Generator) -> Tensor:
        """Return log p(x | z) + log p(z_basal) - log q(z_basal) for each global draw, ``(samples, cells)``."""
        inputs = self._get_inference_input(tensors)
        outputs = self.inference(**inputs, globals_=globals_, generator=generator)
        px = self.generative(**self._get_generative_input(tensors, outputs))[MODULE_KEYS.PX_KEY]
        z, mean, sd = outputs["z_basal"], outputs["basal_mean"], outputs["basal_sd"]
        log_q = Normal(mean, sd, validate_args=False).log_prob(z).sum(-1)
        log_p = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
        weights = self.decoder.log_prob(px, tensors["X"]) + log_p - log_q
        return weights[None] if weights.dim() == 1 else weights
