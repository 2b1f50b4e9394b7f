"""Beta hyperpriors of the inclusion probabilities of masks.

``pi ~ Beta(a, b)`` and ``m ~ Bernoulli(pi)`` for all entries that share the pi: those of one perturbation, or those of
one latent. A pi of each entry's own would be vacuous: with one draw from it the marginal of m is
Bernoulli(a / (a + b)), which is the model without a hyperprior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Beta, kl_divergence

MaskHyperprior = Literal["perturbation", "latent"]


@dataclass(frozen=True)
class PriorTerms:
    """What the mask's KL needs of the posterior of pi.

    Parameters
    ----------
    log_odds
        ``E[log pi] - E[log(1 - pi)]``, broadcasts with the masks.
    log_closed
        ``E[log(1 - pi)]``, of the same shape.
    kl
        KL of the posterior of pi against its prior as a share of each component, ``(components,)``, nats.
    """

    log_odds: Tensor
    log_closed: Tensor
    kl: Tensor


@dataclass(frozen=True)
class BetaPrior:
    """A Beta prior of inclusion probabilities, with the conjugate posterior given those of the masks.

    Parameters
    ----------
    shared_by
        ``"perturbation"``: ``pi_t`` for all entries of a perturbation. ``"latent"``: ``pi_l`` for all of a latent.
    a, b
        Of ``Beta(a, b)``.
    """

    shared_by: MaskHyperprior
    a: float
    b: float

    @classmethod
    def with_mean(cls, shared_by: MaskHyperprior, mean: float) -> BetaPrior:
        """Return the prior with a mean inclusion probability.

        ``"perturbation"``: ``Beta(1, 1 / mean - 1)`` (for a mean above one half its mirror image). The concentration
        1 / mean is the smallest with a bounded density; with a < 1 a perturbation that has no open mask could hardly
        get its first one, whose price is ``-E[log pi]``, about 1 / a nats.

        ``"latent"``: ``Beta(a / L, 1)`` with ``a / L = mean / (1 - mean)``, the finite Indian buffet process. Here
        that price is meant: latents that no perturbation uses are pruned.

        Parameters
        ----------
        shared_by
            See the class.
        mean
            ``a / (a + b)``.
        """
        if shared_by == "latent":
            return cls(shared_by, mean / (1 - mean), 1.0)
        concentration = 1 / min(mean, 1 - mean)
        return cls(shared_by, concentration * mean, concentration * (1 - mean))

    def posterior(self, inclusion: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of the best q(pi) given the masks' probabilities, ``(components, 1)`` or ``(1, latents)``."""
        dim = 1 if self.shared_by == "perturbation" else 0
        on = inclusion.sum(dim, keepdim=True)
        return self.a + on, self.b + (1 - inclusion).sum(dim, keepdim=True)

    @torch.no_grad()
    def terms(self, inclusion: Tensor) -> PriorTerms:
        """Return what the masks' KL needs, at the best q(pi).

        There the bound's gradient through q(pi) is zero, so nothing here carries a gradient.

        Parameters
        ----------
        inclusion
            Probabilities of the masks, ``(components, latents)``.
        """
        a, b = self.posterior(inclusion)
        log_closed = torch.digamma(b) - torch.digamma(a + b)
        prior = Beta(torch.full_like(a, self.a), torch.full_like(b, self.b), validate_args=False)
        kl = kl_divergence(Beta(a, b, validate_args=False), prior)
        n = len(inclusion)
        # a latent's belongs to no component: each takes an equal share
        of_components = kl[:, 0] if self.shared_by == "perturbation" else (kl.sum() / n).expand(n)
        return PriorTerms(torch.digamma(a) - torch.digamma(b), log_closed, of_components)
