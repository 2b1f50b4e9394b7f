"""Conditional VAE: encoder and decoder are told the perturbation (in Bereket & Karaletsos 2023, arXiv 2311.02794)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pertvae.models.base import ModuleShape
from pertvae.models.samsvae._common import ShiftedLatentModule
from pertvae.nn import MLP, EffectSample, GaussianHead


class ConditionalVAEModule(ShiftedLatentModule):
    """Module of the conditional VAE.

    Generative process: ``z ~ N(0, I)``, ``x ~ NB(l softmax(f([z, d])), theta)`` with d the doses of all components.
    Posterior: ``q(z | x, d)``. Doses enter the first layers linearly, so that combinations never seen are defined.

    A component's row of weights (``doses @ table``, as wide as the first layer that reads it) starts at zero, so that
    one without training cells has no effect, and has the learning rate of what belongs to one perturbation. With that
    of the networks the latents learn to carry the perturbation before the decoder does, and predictions, which swap the
    doses only, show a fraction of the effect.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    n_latent, n_hidden, n_layers, **kwargs
        See :class:`~pertvae.models.base.PerturbationModule`.
    """

    def __init__(self, shape: ModuleShape, *, n_latent: int, n_hidden: int, n_layers: int, **kwargs: Any) -> None:
        super().__init__(
            shape, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, n_decoder_extra=n_hidden, **kwargs
        )
        self.encoder = MLP((shape.n_genes, n_hidden, shape.n_covariates), n_hidden, n_layers)
        self.head = GaussianHead(n_hidden, n_latent)
        self.encoder_doses = torch.nn.Parameter(torch.zeros(shape.n_components, n_hidden))
        self.decoder_doses = torch.nn.Parameter(torch.zeros(shape.n_components, n_hidden))
        # found after training and not trained; parameters, because they follow from the weights and are saved with them
        table = torch.zeros(shape.n_components, n_latent)
        self.posterior_shift = torch.nn.Parameter(table, requires_grad=False)
        self.posterior_inclusion = torch.nn.Parameter(table.clone(), requires_grad=False)

    def decoder_extra(self, doses: Tensor) -> Tensor:
        """Return the doses as the decoder's first layer reads them, ``(cells, hidden)``."""
        return doses @ self.decoder_doses

    def encode(self, x: Tensor, doses: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z | x, doses, covariates)."""
        parts = (self.encoder_input(x), doses @ self.encoder_doses, covariates)
        return self.head(self.encoder(*parts, standardize=(self.input_mean, self.input_sd)))

    def local_posterior(
        self, x: Tensor, doses: Tensor, covariates: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z), one for all draws: the encoder is evaluated once."""
        return self.encode(x, doses, covariates)

    def draw_globals(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Return draws of nothing: there are no global latents."""
        device = self.posterior_shift.device
        return EffectSample(
            torch.zeros(n_samples, 0, self.n_latent, device=device), torch.zeros(n_samples, 0, device=device)
        )

    def shift_of(self, globals_: EffectSample, doses: Tensor) -> Tensor:
        """Return zero: the perturbation acts in the decoder."""
        return torch.zeros(len(globals_.effect), 1, 1, device=doses.device)

    def basal_posterior(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z) under the cell's own label."""
        return self.encode(inputs["x"], inputs["doses"], self.covariates_of(inputs))

    def offset(self, doses: Tensor) -> Tensor:
        """Return the mean posterior shift of the components, ``(cells, latents)``."""
        return doses @ self.posterior_shift

    def latent(self, inputs: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
        """Return z (``"full"``), its mean shift by the label (``"perturbation"``), or the rest (``"basal"``)."""
        shift = self.offset(inputs["doses"])
        if kind == "perturbation":
            return shift, torch.zeros_like(shift)
        mean, sd = self.basal_posterior(inputs)
        return (mean - shift if kind == "basal" else mean), sd

    def draw_offset(self, components: Tensor, doses: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return zero: predictions swap the doses that the decoder reads."""
        return torch.zeros_like(normal[:, 0])

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return mean posterior shifts and their inclusion."""
        return self.posterior_shift, self.posterior_inclusion

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation."""
        return [*super().global_parameters(), self.encoder_doses, self.decoder_doses]
