"""A conditional normalising flow for posteriors that are not Gaussian.

Affine couplings (Dinh et al. 2017, arXiv 1605.08803) whose shifts and scales also read a context, here the encoder's
last hidden layer. Own code because the densities of own draws are all that training needs, and because an odd or single
latent, a start at the identity, and draws from given noise are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pertvae.nn._mlp import MLP

MAX_LOG_SCALE = 2.0
"""Bound on the log scale of one coupling: keeps a step in the wrong direction from ending in infinities."""


class ConditionalFlow(nn.Module):
    """Distribution of ``z = (mean + sd * T(noise; context)) @ rotation`` with standard normal noise.

    T are affine couplings that start as the identity: the distribution then is the Gaussian. They act on the noise,
    not on ``mean + sd * noise``, so that the shape of the distribution is learned in its own units. The rotation is no
    parameter; it follows the model's latent space when that is turned.

    Parameters
    ----------
    n_latent
        Width of z.
    n_context
        Width of the context.
    n_layers
        Couplings; each transforms the latents that the one before it kept.
    n_hidden
        Width of the one hidden layer that gives a coupling's shift and scale.
    """

    def __init__(self, n_latent: int, n_context: int, *, n_layers: int = 4, n_hidden: int = 64) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.kept: Tensor
        self.rotation: Tensor
        parity = (torch.arange(n_latent) + torch.arange(n_layers)[:, None]) % 2
        self.register_buffer("kept", parity.float(), persistent=False)
        self.register_buffer("rotation", torch.eye(n_latent))
        self.hidden = nn.ModuleList(MLP((n_latent, n_context), n_hidden) for _ in range(n_layers))
        heads = [nn.Linear(n_hidden, 2 * n_latent) for _ in range(n_layers)]
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, mean: Tensor, sd: Tensor, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and their log density.

        Parameters
        ----------
        mean, sd
            Of the Gaussian, ``(..., cells, latents)``.
        noise
            Standard normal, ``(..., cells, latents)``.
        context
            ``(..., cells, n_context)``; leading dimensions may be fewer than those of the noise.
        """
        z, log_det = noise, sd.log().sum(-1)
        for i in range(len(self.heads)):
            shift, log_scale = self._coupling(i, z, context)
            z = z * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(-1)
        return (mean + sd * z) @ self.rotation, _standard_normal(noise) - log_det

    def log_prob(self, z: Tensor, mean: Tensor, sd: Tensor, context: Tensor) -> Tensor:
        """Return the log density of any z, through the inverse, ``(..., cells)``."""
        noise, log_det = self.inverse(z, mean, sd, context)
        return _standard_normal(noise) - log_det

    def inverse(self, z: Tensor, mean: Tensor, sd: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise that gives z, and ``log |det dz / dnoise|`` there."""
        noise, log_det = (z @ self.rotation.T - mean) / sd, sd.log().sum(-1)
        for i in reversed(range(len(self.heads))):
            shift, log_scale = self._coupling(i, noise, context)
            noise = (noise - shift) * (-log_scale).exp()
            log_det = log_det + log_scale.sum(-1)
        return noise, log_det

    def rotate(self, rotation: Tensor) -> None:
        """Turn the distribution: ``z @ rotation`` takes the place of z."""
        self.rotation.copy_(self.rotation @ rotation)

    def _coupling(self, i: int, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and log scale of a coupling, zero for the latents it keeps and reads."""
        kept = self.kept[i]
        shift, log_scale = self.heads[i](self.hidden[i](z * kept, context)).chunk(2, -1)
        return (1 - kept) * shift, (1 - kept) * MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


def _standard_normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))
