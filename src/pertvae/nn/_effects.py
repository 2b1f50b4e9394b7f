"""Sparse additive effects of perturbations in latent space, with their posterior.

For component t and latent l: mask ``m ~ Bernoulli(mask_prior)``, effect ``e ~ Normal(0, effect_prior_scale)``; a
cell with doses d is shifted by ``sum_t d_t m_t e_t`` (Bereket & Karaletsos 2023, arXiv 2311.02794).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pertvae.nn._masks import MaskGradient, mask_kl, sample_mask
from pertvae.nn._mlp import SLOPE, VARIANCE_FLOOR, GaussianHead, gaussian_kl

EmbeddingInference = Literal["mean_field", "correlated"]


@dataclass
class EffectSample:
    """Draws of the global latents.

    Parameters
    ----------
    effect
        ``m * e``, ``(samples, components, latents)``.
    kl
        KL of mask and effect against their priors summed over latents, ``(samples, components)``, nats.
    """

    effect: Tensor
    kl: Tensor


class SparseEffects(nn.Module):
    """Posterior of masks M and effects E.

    Parameters
    ----------
    n_components, n_latent
        Rows and columns of M and E.
    mask_prior
        Prior inclusion probability of each entry.
    effect_prior_scale
        Standard deviation of the effect prior.
    embedding_inference
        ``"mean_field"``: q(E) a free diagonal Gaussian. ``"correlated"``: q(E | M) from a perceptron that reads the
        component's mask row and its identity.
    mask_gradient
        See :mod:`pertvae.nn._masks`.
    n_hidden
        Width of the perceptron of ``"correlated"`` (two hidden layers).
    """

    def __init__(
        self,
        n_components: int,
        n_latent: int,
        *,
        mask_prior: float,
        effect_prior_scale: float,
        embedding_inference: EmbeddingInference,
        mask_gradient: MaskGradient = "gumbel",
        n_hidden: int = 128,
    ) -> None:
        super().__init__()
        self.mask_prior, self.effect_prior_scale = mask_prior, effect_prior_scale
        self.embedding_inference, self.mask_gradient = embedding_inference, mask_gradient
        self.mask_logits = nn.Parameter(torch.zeros(n_components, n_latent))
        self._kept: tuple[Any, Tensor] | None = None
        if embedding_inference == "correlated":
            # first layer of a perceptron on [mask row, one-hot identity], the identity's columns as a table
            first = nn.Linear(n_latent + n_components, n_hidden)
            self.from_mask = nn.Linear(n_latent, n_hidden)
            self.identity = nn.Embedding(n_components, n_hidden)
            with torch.no_grad():
                self.from_mask.weight.copy_(first.weight[:, :n_latent])
                self.from_mask.bias.copy_(first.bias)
                self.identity.weight.copy_(first.weight[:, n_latent:].T)
            self.second = nn.Linear(n_hidden, n_hidden)
            self.head = GaussianHead(n_hidden, n_latent)
        else:
            self.loc = nn.Parameter(torch.zeros(n_components, n_latent))
            self.log_sd = nn.Parameter(torch.zeros(n_components, n_latent))

    @property
    def inclusion(self) -> Tensor:
        """Posterior inclusion probability, components x latents."""
        return torch.sigmoid(self.mask_logits)

    def posterior(self, mask: Tensor, components: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(e | m).

        Parameters
        ----------
        mask
            ``(..., components, latents)``.
        components
            Indices of the components in ``mask``; all by default.
        """
        index = slice(None) if components is None else components
        if self.embedding_inference == "mean_field":
            return self.loc[index].expand_as(mask), (self.log_sd[index].exp() + VARIANCE_FLOOR).expand_as(mask)
        h = F.leaky_relu(self.from_mask(mask) + self.identity.weight[index], SLOPE)
        h = h + F.leaky_relu(self.second(h), SLOPE)
        return self.head(h)

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Draw M and E for all components, with gradients."""
        mask = sample_mask(self.mask_logits, n_samples, self.mask_gradient, generator)
        mean, sd = self.posterior(mask)
        effect = mean + sd * torch.randn(sd.shape, generator=generator, device=sd.device)
        kl = gaussian_kl(mean, sd, self.effect_prior_scale)
        kl = kl + mask_kl(self.mask_logits, mask, self.mask_prior, self.mask_gradient)
        return EffectSample(mask * effect, kl.sum(-1))

    def draw(self, components: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Return ``m * e`` of some components from given noise, ``(cells, components, latents)``.

        Parameters
        ----------
        components
            Indices, ``(components,)``.
        uniform, normal
            Noise, ``(cells, components, latents)``: one posterior draw a cell.
        """
        mask = (uniform < self.inclusion[components]).to(normal.dtype)
        mean, sd = self.posterior(mask, components)
        return mask * (mean + sd * normal)

    def expected(self, n_samples: int = 256) -> Tensor:
        """Return E[m e], components x latents; Monte Carlo over masks for ``"correlated"`` (seeded).

        Outside training the value is kept until a parameter changes, because getters ask for it once a minibatch.
        """
        if self.embedding_inference == "mean_field":
            return self.inclusion * self.loc
        version = (self.mask_logits.device, n_samples, *(p._version for p in self.parameters()))
        if torch.is_grad_enabled() or self._kept is None or self._kept[0] != version:
            generator = torch.Generator(self.mask_logits.device).manual_seed(0)
            total = torch.zeros_like(self.mask_logits)
            for start in range(0, n_samples, 32):
                n = min(32, n_samples - start)
                mask = sample_mask(self.mask_logits.detach(), n, "identity", generator)
                total = total + (mask * self.posterior(mask)[0]).sum(0)
            self._kept = (version, total / n_samples)
        return self._kept[1]
