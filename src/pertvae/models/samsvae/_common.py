"""What SAMS-VAE and its siblings share: draws of the latents, the bound, importance weights.

Each of them has ``z = shift + z_basal`` with ``z_basal ~ N(0, I)`` and a Gaussian ``q(z_basal)``; they differ in where
the shift comes from and in what the encoder and the decoder read.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor
from torch.distributions import Normal

from pertvae.models.base import PerturbationModule, TrainingStatistics
from pertvae.nn import EffectSample, gathered_shift, gaussian_kl

GlobalKL = Literal["full", "plate"]
Objective = Literal["elbo", "iwae"]
GATHER_FROM = 64
"""Perturbations for each one that a cell received, from which gathering effects is quicker than the whole product."""


class ShiftedLatentModule(PerturbationModule):
    """Base of the modules whose latent is a shift plus a standard normal basal state.

    A method defines :meth:`draw_globals`, :meth:`local_posterior` and what :class:`PerturbationModule` asks for.
    """

    global_kl: GlobalKL = "full"
    """``"full"``: every step takes the KL of all perturbations over the number of training cells. ``"plate"``: that of
    a cell's perturbations over their numbers of training cells."""
    objective: Objective = "elbo"
    """``"elbo"``: each particle has its own global draw. ``"iwae"``: all particles share one, and the basal states of a
    cell are weighed by importance."""

    max_active: int = 0
    """Treatments a training cell has at most; 0 before the fit."""

    def set_training_statistics(self, statistics: TrainingStatistics) -> None:
        """Fill the buffers, and note how many treatments a training cell has at most: its components."""
        self.max_active = statistics.max_active
        super().set_training_statistics(statistics)

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

    def respond(self, doses: Tensor, components: Tensor | None = None) -> Tensor:
        """Return what effects are multiplied by: the doses, or a function of them; every shift goes through here.

        Parameters
        ----------
        doses
            ``(..., components)``.
        components
            Indices of the components; all by default.
        """
        return doses

    def shift_of(self, globals_: EffectSample, doses: Tensor) -> Tensor:
        """Return the latent shift of each cell for each global draw, ``(samples, cells or 1, latents or 1)``."""
        response = self.respond(self.treatments(doses))
        # only of training cells is it known how many components they have at most
        if self.training and 0 < GATHER_FROM * self.max_active <= response.shape[-1]:
            return gathered_shift(response, globals_.effect, self.max_active)
        return response @ globals_.effect

    def draw_shift(
        self, doses: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> tuple[EffectSample, Tensor]:
        """Draw the global latents for a minibatch; return them and the cells' shifts."""
        globals_ = self.draw_globals(n_samples, generator)  # type: ignore[arg-type]
        return globals_, self.shift_of(globals_, doses)

    def metrics(self) -> dict[str, Tensor]:
        """Return further scalars to log."""
        return {}

    def draw_basal(
        self,
        x: Tensor,
        doses: Tensor,
        covariates: Tensor | None,
        shift: Tensor,
        *,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Draw the basal states.

        Parameters
        ----------
        x, doses, covariates, shift
            See :meth:`local_posterior`.
        n_samples
            Draws; there are as many shifts, or one.
        generator
            Source of randomness; the global one by default.

        Returns
        -------
        Draws ``z_basal``, mean and standard deviation of the Gaussian they come from, all ``(samples, cells,
        latents)``; and, where their density is not that Gaussian's, ``basal_log_q``, ``(samples, cells)``.
        """
        mean, sd = self.local_posterior(x, doses, covariates, shift)
        shape = (n_samples, *mean.shape[-2:])
        mean, sd = mean.expand(shape), sd.expand(shape)
        z = mean + sd * torch.randn(shape, generator=generator, device=mean.device)
        return {"z_basal": z, "basal_mean": mean, "basal_sd": sd}

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
        shift_change: Tensor | None = None,
    ) -> dict[str, Any]:
        """Draw the latents.

        Parameters
        ----------
        x, doses, size_factor, batch_index, labels, cat_covs, cont_covs
            A minibatch.
        n_samples
            Draws of globals and basal states together. By default those of a training step: ``n_particles``, and with
            ``objective="iwae"`` as many basal states for one draw of the globals. One draw has no leading dimension in
            the outputs.
        globals_
            Draws of the global latents to use instead of new ones; then ``n_samples`` must be their number or ``None``.
        generator
            Source of randomness; the global one by default.
        shift_change
            What is added to the cells' shifts, ``(samples, cells, latents)``.
        """
        particles = self.n_particles if n_samples is None else n_samples
        shared = self.objective == "iwae" and n_samples is None
        if globals_ is None:
            globals_, shift = self.draw_shift(doses, 1 if shared else particles, generator)
        else:
            shift = self.shift_of(globals_, doses)
        if shift_change is not None:
            shift = shift + shift_change
        covariates = self.covariates(batch_index, labels, cat_covs, cont_covs)
        n = particles if shared and len(shift) == 1 else len(shift)
        drawn = self.draw_basal(x, doses, covariates, shift, n_samples=n, generator=generator)
        shift = shift.expand(drawn["z_basal"].shape)
        if n == 1:
            shift, drawn = shift[0], {k: v[0] for k, v in drawn.items()}
        outputs = {
            MODULE_KEYS.Z_KEY: drawn["z_basal"] + shift,
            MODULE_KEYS.LIBRARY_KEY: self.library_size(x, size_factor),
            "globals": globals_,
            **drawn,
        }
        if "basal_log_q" not in drawn:
            mean, sd = drawn["basal_mean"], drawn["basal_sd"]
            outputs[MODULE_KEYS.QZ_KEY] = Normal(mean + shift, sd, validate_args=False)
        return outputs

    def local_ratio(self, outputs: dict[str, Any]) -> Tensor:
        """Return ``log q(z_basal) - log p(z_basal)`` at the draws, ``([samples,] cells)``."""
        log_q = outputs.get("basal_log_q")
        if log_q is None:
            q = Normal(outputs["basal_mean"], outputs["basal_sd"], validate_args=False)
            log_q = q.log_prob(outputs["z_basal"]).sum(-1)
        return log_q - Normal(0.0, 1.0, validate_args=False).log_prob(outputs["z_basal"]).sum(-1)

    def local_terms(
        self, x: Tensor, outputs: dict[str, Any], generative_outputs: dict[str, Any], exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return reconstruction and local KL of each draw and cell, both ``([samples,] cells)``, nats.

        Parameters
        ----------
        x
            Expression of the cells.
        outputs, generative_outputs
            Of :meth:`inference` and ``generative``.
        exact
            Whether the KL is in closed form where there is one, else ``log q - log p`` at the draws.
        """
        reconstruction = -self.decoder.log_prob(generative_outputs[MODULE_KEYS.PX_KEY], x)
        if exact and "basal_log_q" not in outputs:
            return reconstruction, gaussian_kl(outputs["basal_mean"], outputs["basal_sd"]).sum(-1)
        return reconstruction, self.local_ratio(outputs)

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float | Tensor = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Return the negative bound a cell: reconstruction + local KL + global KL / training cells.

        ``objective="elbo"``: the local KL is exact for a Gaussian, else ``log q - log p`` at the draws.
        ``objective="iwae"``: reconstruction + local KL is ``-log mean_k p(x | z_k) p(z_k) / q(z_k)`` over the basal
        states of one global draw (Burda et al. 2016, arXiv 1509.00519), the globals' KL stays outside; reconstruction
        is reported as the particles' mean, local KL as the rest.
        """
        inputs = self._get_inference_input(tensors)
        x = inputs["x"]
        iwae = self.objective == "iwae"
        reconstruction, kl_local = self.local_terms(x, inference_outputs, generative_outputs, exact=not iwae)
        local_loss: Tensor | None = None
        if iwae:
            log_weights = torch.atleast_2d(-reconstruction - kl_local)
            tempered = torch.atleast_2d(-reconstruction - kl_weight * kl_local)
            local_loss = -(torch.logsumexp(tempered, 0) - math.log(len(tempered))).mean()
            bound = torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
            reconstruction = torch.atleast_2d(reconstruction).mean(0)
            kl_local = -bound - reconstruction
        elif reconstruction.dim() > 1:
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
        if local_loss is None:
            loss = reconstruction.mean() + kl_weight * (kl_local.mean() + per_cell)
        else:
            loss = local_loss + kl_weight * per_cell
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
        outputs = self.inference(**inputs, n_samples=len(globals_.kl), globals_=globals_, generator=generator)
        px = self.generative(**self._get_generative_input(tensors, outputs))[MODULE_KEYS.PX_KEY]
        weights = self.decoder.log_prob(px, inputs["x"]) - self.local_ratio(outputs)
        return weights[None] if weights.dim() == 1 else weights
