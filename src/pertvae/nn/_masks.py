"""Bernoulli masks with a gradient, and the KL that goes with each gradient.

Two pairs keep likelihood and KL on one scale, so that the optimum is the posterior's:

``"gumbel"``
    Relaxed Bernoulli, straight through, temperature 1 (Maddison et al. 2017; Jang et al. 2017): hard in the
    forward pass, gradient of the soft sample. The KL is Monte Carlo through the same sample, so the bias of the
    gradient is the same on both sides. The published choice.
``"identity"``
    A Bernoulli draw with dm/dp taken as 1, and the exact KL.

Mixing them (exact KL with the relaxed gradient) moves the optimum by nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

MaskGradient = Literal["gumbel", "identity"]


def sample_mask(
    logits: Tensor,
    n_samples: int,
    gradient: MaskGradient = "gumbel",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw hard masks that carry a gradient to their logits.

    Parameters
    ----------
    logits
        Log-odds of inclusion, any shape.
    n_samples
        Draws.
    gradient
        ``"gumbel"`` or ``"identity"``, see the module.
    generator
        Source of randomness; the global one by default.

    Returns
    -------
    ``(n_samples, *logits.shape)``, values 0 and 1.
    """
    uniform = torch.rand((n_samples, *logits.shape), generator=generator, device=logits.device)
    uniform = uniform.clamp(1e-7, 1 - 1e-7)
    if gradient == "gumbel":
        soft = torch.sigmoid(logits + torch.log(uniform) - torch.log1p(-uniform))
        hard = (soft > 0.5).to(soft.dtype)
    else:
        soft = torch.sigmoid(logits).expand(uniform.shape)
        hard = (uniform < soft).to(soft.dtype)
    # in this order the added term is exactly zero, so that masks are exactly 0 or 1
    return hard + (soft - soft.detach())


def mask_kl(
    logits: Tensor,
    mask: Tensor,
    prior_logit: Tensor | float,
    gradient: MaskGradient = "gumbel",
    log_closed: Tensor | None = None,
) -> Tensor:
    """Return KL(q(m) || p(m)) of every entry in nats: a sample of it, or exact.

    Parameters
    ----------
    logits
        Log-odds of q(m).
    mask
        The draw from :func:`sample_mask`; the estimate and its gradient run through it for ``"gumbel"``, its
        leading dimension is kept for both.
    prior_logit
        Log-odds of the prior, a number or of a shape that broadcasts with ``logits``.
    gradient
        The gradient the mask was drawn with.
    log_closed
        Log prior probability of a closed mask, where it does not follow from the log-odds: expectations of log
        probabilities that are not known (see :mod:`pertvae.nn._mask_priors`).
    """
    prior = torch.as_tensor(prior_logit, dtype=logits.dtype, device=logits.device)
    log_closed = -F.softplus(prior) if log_closed is None else log_closed
    weight = mask if gradient == "gumbel" else torch.sigmoid(logits).expand(mask.shape)
    return weight * (logits - prior) - F.softplus(logits) - log_closed
