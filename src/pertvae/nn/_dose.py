"""How the size of a perturbation's effect depends on its dose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
