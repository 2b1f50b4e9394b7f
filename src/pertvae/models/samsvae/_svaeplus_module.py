"""SVAE+: perturbations move the prior of the latents sparsely (Lopez et al. 2023, arXiv 2211.03553)."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pertvae.models.base import ModuleShape
from pertvae.models.samsvae._common import GlobalKL, ShiftedLatentModule
from pertvae.nn import MLP, EffectSample, GaussianHead, active_components, sample_mask

MaskDraws = Literal["component", "cell"]


class SVAEPlusModule(ShiftedLatentModule):
    """Module of SVAE+.

    Generative process: ``pi ~ Beta(1, K)``, ``m ~ Bernoulli(pi)``, ``z ~ N(sum_t d_t m_t mu_t, I)``,
    ``x ~ NB(l softmax(f(z)), theta)``. ``mu`` is a parameter, ``pi`` has a point posterior (its log prior density
    enters the bound), ``q(m) = Bernoulli(pi)`` so that masks cost nothing more, and ``q(z | x)`` does not read the
    label.

    Parameters
    ----------
    shape
        Sizes of the registered data.
    n_latent, n_hidden, n_layers
        See :class:`~pertvae.models.base.PerturbationModule`.
    mask_prior
        Mean ``1 / (1 + K)`` of the prior of pi, at most 0.5.
    mask_gradient
        See :mod:`pertvae.nn._masks`.
    mask_draws
        ``"component"``: one mask a component and particle, shared by the cells of a minibatch. ``"cell"``: one a cell.
    mask_start
        Log-odds at which the masks start.
    effect_start
        Standard deviation of the normal draws at which mu starts.
    global_kl
        See :class:`~pertvae.models.samsvae._common.ShiftedLatentModule`; here of the penalty ``-log Beta(pi; 1, K)``.
    n_epochs_kl_warmup
        Epochs over which the training plan raises the weight of all KL terms, unless told otherwise.
    conditions
        Boolean patterns (conditions x components) of the labels that are treatments of their own, for
        ``combinations="unique"``; ``None``: effects of components add up.
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
        mask_gradient: Any,
        mask_draws: MaskDraws,
        mask_start: float,
        effect_start: float,
        global_kl: GlobalKL,
        n_epochs_kl_warmup: int | None = None,
        conditions: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(shape, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, **kwargs)
        self.global_kl, self.mask_gradient, self.mask_draws = global_kl, mask_gradient, mask_draws
        self.n_epochs_kl_warmup = n_epochs_kl_warmup
        self.concentration = 1 / mask_prior - 1
        self.encoder = MLP((shape.n_genes, shape.n_covariates), n_hidden, n_layers)
        self.head = GaussianHead(n_hidden, n_latent)
        n_rows = shape.n_components if conditions is None else len(conditions)
        self.mask_logits = torch.nn.Parameter(torch.full((n_rows, n_latent), float(mask_start)))
        self.mu = torch.nn.Parameter(effect_start * torch.randn(n_rows, n_latent))
        self.unique = conditions is not None
        if conditions is not None:
            self.condition_codes: Tensor
            self.component_codes: Tensor
            self.cells_per_condition: Tensor
            # a set of components is known by the sum of their random 64-bit codes
            generator = torch.Generator().manual_seed(0)
            codes = torch.randint(-(2**62), 2**62, (shape.n_components,), generator=generator)
            self.register_buffer("component_codes", codes)
            self.register_buffer("condition_codes", (conditions.bool() * codes).sum(-1))
            self.register_buffer("cells_per_condition", torch.ones(n_rows))

    # ---------------------------------------------------------------- treatments

    def condition_index(self, doses: Tensor) -> Tensor:
        """Return the row of each cell's condition, -1 for controls and -2 for conditions that are not known."""
        present = doses != 0
        code = (present * self.component_codes).sum(-1)
        match = code[:, None] == self.condition_codes
        index = torch.where(match.any(1), match.to(torch.int8).argmax(1), -2)
        return torch.where(present.any(1), index, -1)

    def treatments(self, doses: Tensor) -> Tensor:
        """Return the doses, or (``combinations="unique"``) the one-hot condition of each cell, zeros for controls.

        Raises
        ------
        ValueError
            If a condition is not known.
        """
        if not self.unique:
            return doses
        index = self.condition_index(doses)
        if not self.training and (index == -2).any():  # training cells are known, and asking waits for the device
            raise ValueError(
                f"{int((index == -2).sum())} cells carry a combination that the model was not trained on, and with "
                "combinations='unique' each combination has its own effects: use combinations='sum'."
            )
        return F.one_hot(index + 1, len(self.mu) + 1)[:, 1:].to(doses.dtype)

    def set_condition_counts(self, doses: Any) -> None:
        """Count the training cells of each condition.

        Parameters
        ----------
        doses
            Of the training cells, CSR, cells x components.
        """
        codes = self.component_codes.cpu().numpy()
        of_cells = np.asarray((doses != 0).astype(np.int64) @ codes)
        counts = [(of_cells == code).sum() for code in self.condition_codes.cpu().numpy()]
        self.cells_per_condition.copy_(torch.as_tensor(np.array(counts), dtype=torch.float32))

    @property
    def cells_per_treatment(self) -> Tensor:
        """Training cells of each component, or of each condition."""
        return self.cells_per_condition if self.unique else self.cells_per_component

    # ---------------------------------------------------------------- latents

    @property
    def inclusion(self) -> Tensor:
        """Inclusion probability pi, rows x latents."""
        return torch.sigmoid(self.mask_logits)

    def penalty(self) -> Tensor:
        """Return ``-log Beta(pi; 1, K)`` summed over latents, one a row, nats.

        ``log(1 - sigmoid(l)) = -softplus(l)`` keeps value and gradient exact where pi rounds to 1.
        """
        return ((self.concentration - 1) * F.softplus(self.mask_logits) - math.log(self.concentration)).sum(-1)

    def draw_globals(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Draw masks; effects are parameters."""
        mask = sample_mask(self.mask_logits, n_samples, self.mask_gradient, generator)
        return EffectSample(mask * self.mu, self.penalty().expand(n_samples, -1))

    def draw_shift(
        self, doses: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> tuple[EffectSample, Tensor]:
        """Draw masks for a minibatch, one a component or one a cell."""
        if self.mask_draws == "component":
            return super().draw_shift(doses, n_samples, generator)
        treatments = self.treatments(doses)
        # of training cells it is known how many they have at most, without a wait for the device
        known = self.training and self.max_active > 0
        active = self.max_active if known else int((treatments != 0).sum(1).max())
        weight, row = active_components(treatments, min(active, 1) if self.unique else active)
        mask = sample_mask(self.mask_logits[row], n_samples, self.mask_gradient, generator)
        shift = (weight[..., None] * mask * self.mu[row]).sum(-2)
        penalty = self.penalty().expand(n_samples, -1)
        return EffectSample((self.inclusion * self.mu).expand(n_samples, -1, -1), penalty), shift

    def encode(self, x: Tensor, covariates: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z | x, covariates)."""
        h = self.encoder(self.encoder_input(x), covariates, standardize=(self.input_mean, self.input_sd))
        return self.head(h)

    def local_posterior(
        self, x: Tensor, doses: Tensor, covariates: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z) around the prior's mean."""
        mean, sd = self.encode(x, covariates)
        return mean - shift, sd

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean inclusion probability."""
        return {"mask_density": self.inclusion.detach().mean()}

    # ---------------------------------------------------------------- what the getters ask for

    def basal_posterior(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z) less the expected shift of the cell's label."""
        mean, sd = self.encode(inputs["x"], self.covariates_of(inputs))
        return mean - self.offset(inputs["doses"]), sd

    def latent(self, inputs: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
        """Return q(z) itself for ``"full"``, which does not read the label."""
        if kind == "full":
            return self.encode(inputs["x"], self.covariates_of(inputs))
        return super().latent(inputs, kind)

    def offset(self, doses: Tensor) -> Tensor:
        """Return the expected shift of the prior, ``sum_t d_t pi_t mu_t``, ``(cells, latents)``."""
        return self.treatments(doses) @ (self.inclusion * self.mu)

    def draw_offset(self, components: Tensor, doses: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return one draw a cell of the shift, masks from ``uniform``, ``(cells, latents)``."""
        rows, weights = components, doses
        if self.unique:
            present = torch.zeros(1, self.shape.n_components, device=doses.device)
            present[0, components] = 1.0
            rows = self.treatments(present)[0].nonzero()[:, 0]
            uniform, weights = uniform[:, :1], torch.ones(1, device=doses.device)
        mask = (uniform < self.inclusion[rows]).to(normal.dtype)
        return (weights[:, None] * mask * self.mu[rows]).sum(1)

    def program_tables(self) -> tuple[Tensor, Tensor]:
        """Return the expected shift by one dose and the inclusion probability."""
        return self.inclusion * self.mu, self.inclusion

    def global_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that belong to one gene or one perturbation, without the masks."""
        return [*super().global_parameters(), self.mu]

    def mask_parameters(self) -> list[torch.nn.Parameter]:
        """Return the log-odds of the masks."""
        return [self.mask_logits]
