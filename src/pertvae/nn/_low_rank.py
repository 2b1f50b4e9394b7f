"""Gaussians with covariance ``diag(sd^2) + factor factor'``."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_kl(mean: Tensor, sd: Tensor, factor: Tensor, prior_sd: float = 1.0) -> Tensor:
    """Return KL(N(mean, diag(sd^2) + F F') || N(0, prior_sd^2 I)), nats, one a Gaussian.

    The determinant is ``det(D) det(I + F' D^-1 F)`` (matrix determinant lemma), so that the cost is linear in the
    dimension.

    Parameters
    ----------
    mean, sd
        ``(..., dimensions)``.
    factor
        F, ``(..., dimensions, rank)``.
    prior_sd
        Standard deviation of the prior.
    """
    scaled = factor / sd[..., None]
    inner = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device) + scaled.mT @ scaled
    # the identity is in it: no failure to wait for
    log_det = 2 * torch.linalg.cholesky_ex(inner)[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)
    ratio = sd / prior_sd
    single = 0.5 * (ratio.square() + (mean / prior_sd).square() - 1.0) - torch.log(ratio)
    return single.sum(-1) + 0.5 * ((factor / prior_sd).square().sum((-2, -1)) - log_det)


def low_rank_noise(sd: Tensor, factor: Tensor, normal: Tensor) -> Tensor:
    """Turn standard normal noise into noise of the covariance ``diag(sd^2) + F F'``, as many numbers as dimensions.

    With ``G = F / sd`` the square root ``diag(sd) (I + G G')^(1/2)`` is applied, and ``(I + G G')^(1/2) = I + G h(G'
    G) G'`` with ``h(x) = 1 / (1 + sqrt(1 + x))``: only a rank x rank matrix is decomposed, and the result does not
    depend on the choice of its eigenvectors.

    Parameters
    ----------
    sd
        ``(..., dimensions)``.
    factor
        F, ``(..., dimensions, rank)``.
    normal
        Independent standard normals, ``(..., dimensions)``; leading dimensions broadcast.
    """
    scaled = factor / sd[..., None]
    values, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    turned = scaled @ vectors
    weight = 1 / (1 + (1 + values.clamp(min=0)).sqrt())
    part = torch.einsum("...lr,...l->...r", turned, normal) * weight
    return sd * (normal + torch.einsum("...lr,...r->...l", turned, part))
