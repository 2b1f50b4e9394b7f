"""How the size of a perturbation's effect depends on its dose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pertvae.nn._mlp import gaussian_kl

SLOPE_SD, MIDPOINT_SD = 0.5, 1.5
"""Standard deviations of the log-normal priors: 95% of slopes from 0.38 to 2.7, of midpoints from 1/19 to 19 times the
largest dose. Midpoints far above it make a power of the dose, which with slope 1 is the linear response."""


class HillResponse(nn.Module):
    """Hill curve of each perturbation, scaled so that no dose gives 0 and the largest training dose gives 1.

    ``h(d) = u^k (1 + c^k) / (u^k + c^k)`` with u the dose over the largest training dose, slope k and midpoint c. All
    perturbations share the priors ``log k ~ N(0, 0.5^2)`` and ``log c ~ N(0, 1.5^2)``. Slope and midpoint have point
    posteriors (MAP): each is one number that all cells of the perturbation inform.

    Parameters
    ----------
    n_components
        Perturbations.
    """

    def __init__(self, n_components: int) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(n_components))
        self.log_midpoint = nn.Parameter(torch.zeros(n_components))
        self.largest_dose: Tensor
        self.register_buffer("largest_dose", torch.ones(n_components))

    def set_largest_dose(self, doses: Tensor) -> None:
        """Set the doses at which the response is 1; a perturbation that was never given keeps the dose 1."""
        self.largest_dose.copy_(torch.where(doses > 0, doses, torch.ones_like(doses)))

    def forward(self, doses: Tensor, components: Tensor | None = None) -> Tensor:
        """Return the response to doses, in units of that to the largest training dose.

        Parameters
        ----------
        doses
            Not negative, ``(..., components)``.
        components
            Indices of the perturbations; all by default.
        """
        index = slice(None) if components is None else components
        slope, log_midpoint = self.log_slope[index].exp(), self.log_midpoint[index]
        given = doses > 0
        # the logarithm is kept away from zero doses before and not after it is taken, or its gradient would not be
        log_dose = torch.where(given, doses / self.largest_dose[index], torch.ones_like(doses)).log()
        # u^k / (u^k + c^k) and 1 / (1 + c^k) as sigmoids: no overflow, and exactly 1 at u = 1
        log_response = F.logsigmoid(slope * (log_dose - log_midpoint)) - F.logsigmoid(slope * -log_midpoint)
        return torch.where(given, log_response.exp(), torch.zeros_like(doses))

    def curves(self) -> dict[str, Tensor]:
        """Return slope, midpoint in the units of the doses, and largest dose of each perturbation."""
        midpoint = self.log_midpoint.exp() * self.largest_dose
        return {"slope": self.log_slope.exp(), "midpoint": midpoint, "largest_dose": self.largest_dose}

    def penalty(self) -> Tensor:
        """Return minus the log prior density of slope and midpoint, less its smallest value, one a perturbation."""
        return 0.5 * ((self.log_slope / SLOPE_SD).square() + (self.log_midpoint / MIDPOINT_SD).square())


class DoseDeviations(nn.Module):
    """Effects of the single doses of a perturbation, as deviations from the effect that they share.

    Dose k of perturbation t is a level with the effect ``e_t + delta_tk``, ``delta_tk ~ N(0, prior_scale^2)`` for each
    latent, and the posterior of delta is a free diagonal Gaussian. Only levels of training cells deviate, and only
    where a perturbation has two of them: a single one cannot be told from the effect itself.

    Parameters
    ----------
    levels
        Perturbation (its index) and dose of each level; no pair twice.
    n_latent
        Latents.
    prior_scale
        Prior standard deviation of the deviations.
    """

    def __init__(self, levels: Sequence[tuple[int, float]], n_latent: int, prior_scale: float) -> None:
        super().__init__()
        self.prior_scale = prior_scale
        self.component: Tensor
        self.dose: Tensor
        self.cells: Tensor
        self.known: Tensor
        self.free: Tensor
        self.register_buffer("component", torch.tensor([c for c, _ in levels], dtype=torch.long))
        self.register_buffer("dose", torch.tensor([d for _, d in levels], dtype=torch.float32))
        self.register_buffer("cells", torch.zeros(len(levels)))
        self.register_buffer("known", torch.zeros(len(levels), dtype=torch.bool))
        self.register_buffer("free", torch.zeros(len(levels), dtype=torch.bool))
        self.loc = nn.Parameter(torch.zeros(len(levels), n_latent))
        self.log_sd = nn.Parameter(torch.full((len(levels), n_latent), math.log(prior_scale)))

    def set_cells(self, cells: Mapping[tuple[int, float], int]) -> None:
        """Set the numbers of training cells; what an earlier fit has learned stays known.

        Parameters
        ----------
        cells
            Training cells of each pair of a perturbation (its index) and a dose.
        """
        counts = torch.tensor([cells.get(level, 0) for level in self.levels()], dtype=self.cells.dtype)
        self.cells.copy_(counts)
        self.known.logical_or_(self.cells > 0)
        of_component = torch.zeros(int(self.component.max()) + 1, device=self.dose.device)
        of_component.index_add_(0, self.component, self.known.float())
        self.free.copy_(self.known & (of_component[self.component] > 1))

    def levels(self) -> list[tuple[int, float]]:
        """Return perturbation and dose of each level, doses as float32 has them."""
        return list(zip(self.component.tolist(), self.dose.tolist(), strict=True))

    def forward(self, doses: Tensor) -> Tensor:
        """Return which deviations act at doses: 0 or 1, ``(..., levels)``.

        Parameters
        ----------
        doses
            ``(..., components)``.
        """
        return ((doses[..., self.component] == self.dose) & self.free).to(doses.dtype)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the deviations, 0 where there is none, ``(levels, latents)``."""
        free = self.free[:, None]
        return self.loc * free, self.log_sd.exp() * free

    def posterior_at(self, components: Tensor, doses: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the deviations at some doses, ``(pairs, latents)``.

        Parameters
        ----------
        components, doses
            Index and dose of each pair; a dose that no training cell had does not deviate.
        """
        at = ((components[:, None] == self.component) & (doses[:, None] == self.dose)).to(self.loc.dtype)
        mean, sd = self.posterior()
        return at @ mean, at @ sd

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw the deviations; return them, ``(samples, levels, latents)``, and their KL in nats, ``(levels,)``."""
        mean, sd = self.posterior()
        noise = torch.randn((n_samples, *mean.shape), generator=generator, device=mean.device)
        kl = gaussian_kl(self.loc, self.log_sd.exp(), self.prior_scale).sum(-1)
        return mean + sd * noise, kl * self.free

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the deviations, ``delta @ rotation``; of the turned covariance the variances are kept."""
        self.loc.copy_(self.loc @ rotation)
        self.log_sd.copy_(0.5 * ((2 * self.log_sd).exp() @ rotation.square()).log())

    @torch.no_grad()
    def close(self, components: Tensor, latents: Tensor) -> None:
        """Put the deviations of all doses of some components in some latents back to their prior.

        Parameters
        ----------
        components, latents
            Indices, of equal length.
        """
        level, entry = torch.nonzero(self.component[:, None] == components, as_tuple=True)
        self.loc[level, latents[entry]] = 0.0
        self.log_sd[level, latents[entry]] = math.log(self.prior_scale)

    def shifts(self, shared: Tensor) -> Tensor:
        """Return the shifts that there are: by each level, or the shared one of a perturbation without deviations.

        Parameters
        ----------
        shared
            Shared effects, ``(components, latents)``.
        """
        return torch.cat([shared[self._without(len(shared))], (shared[self.component] + self.loc)[self.free]])

    def size(self, shared: Tensor) -> Tensor:
        """Return the root mean square of the shifts over a perturbation's training cells, ``(components, latents)``."""
        weight = (self.cells * self.free)[:, None]
        square = torch.zeros_like(shared).index_add(
            0, self.component, weight * (shared[self.component] + self.loc).square()
        )
        cells = shared.new_zeros(len(shared), 1).index_add(0, self.component, weight)
        return torch.where(cells > 0, square / cells.clamp(min=1.0), shared.square()).sqrt()

    def evidence(self, n_components: int) -> Tensor:
        """Return the log Bayes factor of a perturbation's deviations against none, ``(components, latents)``.

        ``log N(0; 0, prior_scale^2) / N(0; mean, sd^2)`` (Savage-Dickey), summed over levels.
        """
        each = 0.5 * (self.loc / self.log_sd.exp()).square() + self.log_sd - math.log(self.prior_scale)
        none = self.loc.new_zeros(n_components, self.loc.shape[1])
        return none.index_add(0, self.component, each * self.free[:, None])

    def largest(self, shared: Tensor, levels: Tensor) -> Tensor:
        """Return the largest value over the levels of each perturbation; of one without deviations the shared value.

        Parameters
        ----------
        shared
            ``(components, latents)``.
        levels
            ``(levels, latents)``.
        """
        start = torch.where(self._without(len(shared))[:, None], shared, torch.full_like(shared, -torch.inf))
        index = self.component[self.free][:, None].expand(-1, shared.shape[1])
        return start.scatter_reduce(0, index, levels[self.free], "amax")

    def _without(self, n_components: int) -> Tensor:
        """Return which perturbations have no deviations."""
        without = torch.ones(n_components, dtype=torch.bool, device=self.component.device)
        without[self.component[self.free]] = False
        return without
