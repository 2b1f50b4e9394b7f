"""SAMS-VAE: a basal state plus sparse additive shifts (Bereket & Karaletsos 2023, arXiv 2311.02794)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pertvae.models.base import ModuleShape, TrainingStatistics
from pertvae.models.samsvae._common import GlobalKL, Objective, ShiftedLatentModule
from pertvae.nn import MLP, ConditionalFlow, DoseDeviations, EffectSample, GaussianHead, HillResponse, SparseEffects

BasalInference = Literal["mean_field", "correlated"]
BasalPosterior = Literal["gaussian", "flow"]
DoseResponse = Literal["linear", "hill", "categories"]
MEAN_DRAWS = 64
"""Draws that mean and standard deviation of a flow are taken over: 32 and their mirror images."""


class SAMSVAEModule(ShiftedLatentModule):
    """Module of SAMS-VAE.

    Generative process: ``m ~ Bernoulli(mask_prior)``, ``e ~ N(0, effect_prior_scale^2)``, ``z_basal ~ N(0, I)``,
    ``z = z_basal + sum_t d_t e_t m_t``, ``x ~ NB(l softmax(f(z)), theta)``.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    n_latent, n_hidden, n_layers
        See :class:`~pertvae.models.base.PerturbationModule`.
    mask_prior, effect_prior_scale, embedding_inference, mask_gradient, embedding_rank, mask_hyperprior
        See :class:`~pertvae.nn.SparseEffects`.
    basal_inference
        ``"correlated"``: the basal encoder also reads the cell's sampled latent shift. ``"mean_field"``: expression
        and covariates only.
    global_kl
        ``"full"``: every step takes the KL of all components over the number of training cells.  ``"plate"``: that
        of a cell's components over their numbers of training cells (published). Both have the same expectation;
        ``"full"`` has the lower variance and draws components without training cells to the prior.
    dose_response
        ``"linear"``: effects are multiplied by doses. ``"hill"``: by :class:`~pertvae.nn.HillResponse` of them.
        ``"categories"``: doses are not multiplied by, each of them adds its :class:`~pertvae.nn.DoseDeviations`.
    dose_levels
        Component (its index) and dose of each level, for ``"categories"``.
    dose_deviation_scale
        Prior standard deviation of the deviations, as a share of ``effect_prior_scale``.
    basal_posterior
        ``"gaussian"``, or ``"flow"``: :class:`~pertvae.nn.ConditionalFlow` that reads the encoder's last hidden layer.
    objective
        See :meth:`~pertvae.models.samsvae._common.ShiftedLatentModule.loss`.
    **kwargs
        See :class:`~pertvae.models.base.PerturbationModule`.
    """

    def __init__(
        self,
        shape: ModuleShape,
        *,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        mask_prior: float,
        effect_prior_scale: float,
        embedding_inference: Any,
        basal_inference: BasalInference,
        mask_gradient: Any = "gumbel",
        global_kl: GlobalKL = "full",
        embedding_rank: int = 4,
        mask_hyperprior: Any = None,
        dose_response: DoseResponse = "linear",
        dose_levels: Sequence[tuple[int, float]] | None = None,
        dose_deviation_scale: float = 0.5,
        basal_posterior: BasalPosterior = "gaussian",
        objective: Objective = "elbo",
        **kwargs: Any,
    ) -> None:
        super().__init__(shape, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, **kwargs)
        self.basal_inference, self.global_kl, self.objective = basal_inference, global_kl, objective
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
        # what effects left in the basal states of the training cells; computed when training ends, no part of the bound
        self.leak: Tensor
        self.leak_sd: Tensor
        self.register_buffer("leak", torch.zeros(shape.n_components, n_latent))
        self.register_buffer("leak_sd", torch.zeros(shape.n_components, n_latent))
        # made last, so that the others start from the same random numbers with and without them
        self.hill = HillResponse(shape.n_components) if dose_response == "hill" else None
        self.flow = ConditionalFlow(n_latent, n_hidden) if basal_posterior == "flow" else None
        self.levels: DoseDeviations | None = None
        if dose_response == "categories":
            self.levels = DoseDeviations(dose_levels or (), n_latent, dose_deviation_scale * effect_prior_scale)

    def set_training_statistics(self, statistics: TrainingStatistics) -> None:
        """Fill the buffers; the first fit also sets the doses that effects belong to, for good."""
        sizes = statistics.dose_sizes()
        if self.levels is not None and statistics.cells_per_dose is not None:
            self.levels.set_cells(statistics.cells_per_dose)
        elif sizes is not None and not bool(self.started):
            largest, typical = (torch.as_tensor(d, dtype=torch.float32) for d in sizes)
            if self.hill is not None:
                self.hill.set_largest_dose(largest)
            else:
                self.effects.set_typical_dose(typical)
        super().set_training_statistics(statistics)
        if self.levels is not None:
            self.max_active *= 2

    def respond(self, doses: Tensor, components: Tensor | None = None) -> Tensor:
        """Return the doses, the Hill response to them, or whether there is one."""
        if self.levels is not None:
            return (doses > 0).to(doses.dtype)
        return doses if self.hill is None else self.hill(doses, components)

    def treatments(self, doses: Tensor) -> Tensor:
        """Return the doses; after them, where doses are categories, which of the levels a cell has."""
        return doses if self.levels is None else torch.cat([doses, self.levels(doses)], dim=-1)

    @property
    def cells_per_treatment(self) -> Tensor:
        """Training cells of each component, and of each level."""
        cells = self.cells_per_component
        return cells if self.levels is None else torch.cat([cells, self.levels.cells])

    def expected_effects(self) -> Tensor:
        """Return what moves the latents by each of the treatments, in the mean, ``(treatments, latents)``."""
        expected = self.effects.expected()
        if self.levels is None:
            return expected
        inclusion = self.effects.inclusion[self.levels.component]
        return torch.cat([expected, inclusion * self.levels.posterior()[0]])

    def hidden(self, x: Tensor, offset: Tensor, covariates: Tensor | None) -> Tensor:
        """Return the encoder's last hidden layer."""
        return self.encoder(
            self.encoder_input(x),
            offset if self.basal_inference == "correlated" else None,
            covariates,
            standardize=(self.input_mean, self.input_sd),
        )

    def encode(self, x: Tensor, offset: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal | x, offset, covariates); of the Gaussian under a flow."""
        return self.basal(self.hidden(x, offset, covariates))

    def local_posterior(
        self, x: Tensor, doses: Tensor, covariates: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal | x, shift, covariates)."""
        return self.encode(x, shift, covariates)

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean inclusion probability."""
        return {"mask_density": self.effects.inclusion.detach().mean()}

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
        """Draw the basal states from the Gaussian or the flow."""
        if self.flow is None:
            return super().draw_basal(x, doses, covariates, shift, n_samples=n_samples, generator=generator)
        h = self.hidden(x, shift, covariates)
        mean, sd = self.basal(h)
        shape = (n_samples, *mean.shape[-2:])
        noise = torch.randn(shape, generator=generator, device=mean.device)
        z, log_q = self.flow(mean, sd, noise, h)
        return {"z_basal": z, "basal_mean": mean.expand(shape), "basal_sd": sd.expand(shape), "basal_log_q": log_q}

    def _basal(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden layer, mean and sd of the encoder at the effects' expected shift, and each cell's leak."""
        response = self.respond(self.treatments(inputs["doses"]))
        h = self.hidden(inputs["x"], response @ self.expected_effects(), self.covariates_of(inputs))
        return h, *self.basal(h), response[..., : len(self.leak)] @ self.leak

    def basal_posterior(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_basal) at the expected shift of the cell's label, less the leak.

        Those of a flow are over draws from the same 64 vectors of noise for every cell, 32 and their mirror images.
        """
        h, mean, sd, leak = self._basal(inputs)
        if self.flow is None:
            return mean - leak, sd
        noise = torch.randn(MEAN_DRAWS // 2, 1, self.n_latent, generator=torch.Generator().manual_seed(0))
        draws, _ = self.flow(mean, sd, torch.cat([noise, -noise]).to(h.device).expand(-1, len(h), -1), h)
        return draws.mean(0) - leak, draws.std(0, correction=0)

    def basal_sampler(self, inputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Encode cells once; return what turns noise into draws of their basal latent under their own labels."""
        flow = self.flow
        if flow is None:
            return super().basal_sampler(inputs)
        h, mean, sd, leak = self._basal(inputs)

        def draw(noise: Tensor) -> Tensor:
            # one draw a cell at a time: matrix products of another shape may differ in the last digits
            draws = [flow(mean, sd, one, h)[0] - leak for one in noise.reshape(-1, *mean.shape)]
            return torch.stack(draws).view(noise.shape)

        return draw

    def draw_latent(self, inputs: dict[str, Any], kind: str, noise: Tensor) -> Tensor:
        """Return one draw of a kind of latent of each cell, with the expected shift, from given noise."""
        if self.flow is None or kind == "perturbation":
            return super().draw_latent(inputs, kind, noise)
        basal = self.basal_sampler(inputs)(noise)
        return basal if kind == "basal" else basal + self.offset(inputs["doses"])

    def leak_shift(self, components: Tensor, doses: Tensor) -> Tensor:
        """Return the shift by what effects left in the basal states of the training cells, ``(latents,)``."""
        return self.respond(doses, components) @ self.leak[components]

    def leak_spread(self, components: Tensor, doses: Tensor) -> Tensor:
        """Return the posterior standard deviation of :meth:`leak_shift`, ``(latents,)``."""
        return (self.respond(doses, components).square() @ self.leak_sd[components].square()).sqrt()

    def offset(self, doses: Tensor) -> Tensor:
        """Return the expected latent shift ``sum_t h_t(d_t) (E[m_t e_t] + leak_t)``, ``(cells, latents)``."""
        response = self.respond(self.treatments(doses))
        return response @ self.expected_effects() + response[..., : len(self.leak)] @ self.leak

    def draw_offset(self, components: Tensor, doses: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return one posterior draw a cell of ``sum_t h_t(d_t) (m_t e_t + leak_t)``, ``(cells, latents)``."""
        deviation = None if self.levels is None else self.levels.posterior_at(components, doses)
        effect = self.effects.draw(components, uniform, normal, deviation)
        return (self.respond(doses, components)[:, None] * effect).sum(1) + self.leak_shift(components, doses)

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
        if self.levels is not None:
            self.levels.rotate(rotation)
        self.leak.copy_(self.leak @ rotation)
        self.leak_sd.copy_((self.leak_sd.square() @ rotation.square()).sqrt())
        self.decoder.rotate_latent(rotation)
        if self.flow is None:
            self.basal.rotate(rotation, self.encoder.at_zero())
        else:
            self.flow.rotate(rotation)
        self.encoder.first.rotate_input(1, rotation)

    def dense_shifts(self) -> Tensor:
        """Return the shifts by components at typical doses, or by the levels of doses, ``(shifts, latents)``.

        At those doses, because effects are those of a dose of 1: sizes that phases of training compare would be in the
        unit of the doses.
        """
        shared = self.effects.expected() * self.effects.typical_dose
        return shared if self.levels is None else self.levels.shifts(shared)

    def start_masks(self, energy: float) -> float:
        """Switch masks on, see :meth:`~pertvae.nn.SparseEffects.start_masks`: one mask for all doses."""
        if self.levels is None:
            return self.effects.start_masks(energy)
        shared = self.effects.expected()
        return self.effects.start_masks(energy, self.levels.size(shared), self.levels.evidence(len(shared)))

    def mask_odds(self) -> Tensor:
        """Return the log-odds of open masks given the effects, see :meth:`~pertvae.nn.SparseEffects.log_odds`."""
        return self.effects.log_odds(0.0 if self.levels is None else self.levels.evidence(len(self.leak)))

    def close_masks(self, components: Tensor, latents: Tensor) -> None:
        """Put masks and effects back to their prior, see :meth:`~pertvae.nn.SparseEffects.close_masks`."""
        self.effects.close_masks(components, latents)
        if self.levels is not None:
            self.levels.close(components, latents)

    def closing(self, globals_: EffectSample, doses: Tensor, cells: Tensor, entries: tuple[Tensor, Tensor]) -> Tensor:
        """Return how the shifts of cells change when a mask of each closes, ``(samples, pairs, latents)``.

        Parameters
        ----------
        globals_
            Draws.
        doses
            Of a minibatch.
        cells, entries
            The cell of each pair, and component and latent of its mask.
        """
        response = self.respond(self.treatments(doses))
        component, latent = entries
        change = response[cells, component][:, None] * self.effects.closing(globals_, component, latent)
        if self.levels is not None:
            n = len(self.leak)
            own = response[cells, n:] * (self.levels.component == component[:, None])
            lost = (own * globals_.effect[:, n:][:, :, latent].transpose(1, 2)).sum(-1)
            change[:, torch.arange(len(latent), device=latent.device), latent] -= lost
        return change

    def set_mask_cost(self, cost: float | Tensor) -> None:
        """Make an open mask cost so many nats for every training cell of its perturbation, on top of its prior.

        One number, or one of each component.
        """
        self.effects.set_prior(self.effects.base_logit - (cost * self.cells_per_component)[:, None])

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation, without the masks."""
        named, names = dict(self.effects.named_parameters()), ("loc", "log_sd", "factor", "identity.weight")
        responses = [p for part in (self.hill, self.levels) if part is not None for p in part.parameters()]
        return [*super().global_parameters(), *(named[n] for n in names if n in named), *responses]

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return the log-odds of the masks."""
        return [self.effects.mask_logits]

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return ``E[m e]`` and the inclusion probability."""
        return self.effects.expected(), self.effects.inclusion

    def draw_globals(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Draw masks and effects; the Hill response, a point estimate, adds its penalty to their KL.

        Deviations of levels follow the effects, as in :meth:`treatments`, under the masks of their components.
        """
        sample = self.effects.sample(n_samples, generator)
        if self.hill is not None:
            return replace(sample, kl=sample.kl + self.hill.penalty())
        if self.levels is None:
            return sample
        deviation, kl = self.levels.sample(n_samples, generator)
        assert sample.mask is not None
        effect = torch.cat([sample.effect, sample.mask[:, self.levels.component] * deviation], dim=1)
        return EffectSample(effect, torch.cat([sample.kl, kl.expand(n_samples, -1)], dim=1), sample.mask)
