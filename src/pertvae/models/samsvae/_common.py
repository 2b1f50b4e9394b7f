"""What SAMS-VAE and its siblings share: draws of the latents, the bound, importance weights.

Each of them has ``z = shift + z_basal`` with ``z_basal ~ N(0, I)`` and a Gaussian ``q(z_basal)``; they differ in where
the shift comes from and in what the encoder and the decoder read.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor
from torch.distributions import Normal

from pertvae.models.base import PerturbationModule
from pertvae.nn import EffectSample, gaussian_kl

GlobalKL = Literal["full", "plate"]


class ShiftedLatentModule(PerturbationModule):
    """Base of the modules whose latent is a shift plus a standard normal basal state.

    A method defines :meth:`draw_globals`, :meth:`local_posterior` and what :class:`PerturbationModule` asks for.
    """

    global_kl: GlobalKL = "full"
    """``"full"``: every step takes the KL of all perturbations over the number of training cells. ``"plate"``: that of
    a cell's perturbations over their numbers of training cells."""

    @abstractmethod
    def local_posterior(
        self, x: Tensor, doses: Tensor, covariates: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal), ``(cells, latents)`` or one for each draw.

        Parameters
        ----------
        x, doses
            A minibatch.
        covariates
            ``(cells, covariates)`` or ``None``.
        shift
            The cells' latent shifts, ``(samples, cells, latents)``.
        """

    def treatments(self, doses: Tensor) -> Tensor:
        """Return the doses of what has an effect of its own, ``(cells, rows of the effects)``."""
        return doses

    @property
    def cells_per_treatment(self) -> Tensor:
        """Training cells with a non-zero dose of each treatment."""
        return self.cells_per_component

    def shift_of(self, globals_: EffectSample, doses: Tensor) -> Tensor:
        """Return the latent shift of each cell for each global draw, ``(samples, cells or 1, latents or 1)``."""
        return self.treatments(doses) @ globals_.effect

    def draw_shift(
        self, doses: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> tuple[EffectSample, Tensor]:
        """Draw the global latents for a minibatch; return them and the cells' shifts."""
        globals_ = self.draw_globals(n_samples, generator)  # type: ignore[arg-type]
        return globals_, self.shift_of(globals_, doses)

    def metrics(self) -> dict[str, Tensor]:
        """Return further scalars to log."""
        return {}

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
            Draws of the global latents to use instead of new ones.
        generator
            Source of randomness; the global one by default.
        """
        if globals_ is None:
            globals_, shift = self.draw_shift(doses, n_samples or self.n_particles, generator)
        else:
            shift = self.shift_of(globals_, doses)
        mean, sd = self.local_posterior(x, doses, self.covariates(batch_index, labels, cat_covs, cont_covs), shift)
        shape = (len(shift), *mean.shape[-2:])
        mean, sd, shift = mean.expand(shape), sd.expand(shape), shift.expand(shape)
        z_basal = mean + sd * torch.randn(shape, generator=generator, device=mean.device)
        z = z_basal + shift
        if len(z) == 1:
            z, z_basal, shift, mean, sd = z[0], z_basal[0], shift[0], mean[0], sd[0]
        return {
            MODULE_KEYS.Z_KEY: z,
            MODULE_KEYS.QZ_KEY: Normal(mean + shift, sd, validate_args=False),
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
        x = inputs["x"]
        reconstruction = -self.decoder.log_prob(generative_outputs[MODULE_KEYS.PX_KEY], x)
        kl_local = gaussian_kl(inference_outputs["basal_mean"], inference_outputs["basal_sd"]).sum(-1)
        if reconstruction.dim() > 1:
            reconstruction, kl_local = reconstruction.mean(0), kl_local.mean(0)
        kl_component = inference_outputs["globals"].kl.mean(0)
        if self.global_kl == "full":
            kl_global = kl_component.sum()
            per_cell = kl_global / n_obs
        else:
            counts = self.cells_per_treatment
            share = (self.treatments(inputs["doses"]) != 0).to(x.dtype).mean(0)
            weight = torch.where(counts > 0, share / counts.clamp(min=1.0), torch.zeros_like(share))
            per_cell = weight @ kl_component
            kl_global = per_cell * n_obs
        objective = (reconstruction + kl_local).mean() + per_cell
        loss = reconstruction.mean() + kl_weight * (kl_local.mean() + per_cell)
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction,
            kl_local=kl_local,
            kl_global=kl_global,
            extra_metrics={"objective": objective.detach(), **self.metrics()},
        )

    @auto_move_data
    def log_weights(self, tensors: dict[str, Tensor], globals_: EffectSample, generator: torch.Generator) -> Tensor:
        """Return log p(x | z) + log p(z_basal) - log q(z_basal) for each global draw, ``(samples, cells)``."""
        inputs = self._get_inference_input(tensors)
        outputs = self.inference(**inputs, globals_=globals_, generator=generator)
        px = self.generative(**self._get_generative_input(tensors, outputs))[MODULE_KEYS.PX_KEY]
        z, mean, sd = outputs["z_basal"], outputs["basal_mean"], outputs["basal_sd"]
        log_q = Normal(mean, sd, validate_args=False).log_prob(z).sum(-1)
        log_p = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
        weights = self.decoder.log_prob(px, inputs["x"]) + log_p - log_q
        return weights[None] if weights.dim() == 1 else weights
