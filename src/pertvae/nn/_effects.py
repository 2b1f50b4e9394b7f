"""Sparse additive effects of perturbations in latent space, with their posterior.

For component t and latent l: mask ``m ~ Bernoulli(mask_prior)``, effect ``e ~ Normal(0, effect_prior_scale)``; a
cell with doses d is shifted by ``sum_t d_t m_t e_t`` (Bereket & Karaletsos 2023, arXiv 2311.02794).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pertvae.nn._low_rank import low_rank_kl, low_rank_noise
from pertvae.nn._mask_priors import BetaPrior, MaskHyperprior
from pertvae.nn._masks import MaskGradient, mask_kl, sample_mask
from pertvae.nn._mlp import SLOPE, VARIANCE_FLOOR, GaussianHead, gaussian_kl

START_LOGIT = 5.0
"""Log-odds of a mask that starts open: sure, and within reach."""

FACTOR_START = 0.1
"""Standard deviation of the factors' first entries: from zero they would have no gradient."""

EmbeddingInference = Literal["mean_field", "correlated", "gated", "low_rank"]


@dataclass
class EffectSample:
    """Draws of the global latents.

    Parameters
    ----------
    effect
        ``m * e``, ``(samples, components, latents)``.
    kl
        KL of mask and effect against their priors summed over latents, ``(samples, components)``, nats.
    mask
        ``m``, ``(samples, components, latents)``; ``None`` if nobody needs it.
    """

    effect: Tensor
    kl: Tensor
    mask: Tensor | None = None


class SparseEffects(nn.Module):
    """Posterior of masks M and effects E.

    Effects and their prior are those of a dose of 1. What is learned are the shifts by a typical dose, see
    :meth:`set_typical_dose`, so that the unit of the doses does not matter to the optimiser.

    Parameters
    ----------
    n_components, n_latent
        Rows and columns of M and E.
    mask_prior
        Prior inclusion probability of each entry.
    effect_prior_scale
        Standard deviation of the prior of the effects of a dose of 1.
    embedding_inference
        ``"mean_field"``: q(E) a free diagonal Gaussian. ``"correlated"``: q(E | M) from a perceptron that reads the
        component's mask row and its identity. ``"gated"``: q(E | M) the free diagonal Gaussian where the mask is on
        and the prior where it is off, so that entries pay for what they know only as often as they are used.
        ``"low_rank"``: q(E) a free Gaussian for each component with covariance ``diag(sd^2) + F F'``.
    mask_gradient
        See :mod:`pertvae.nn._masks`.
    n_hidden
        Width of the perceptron of ``"correlated"`` (two hidden layers).
    embedding_rank
        Columns of F for ``"low_rank"``, at most ``n_latent`` are used.
    mask_hyperprior
        ``None``: every entry has the prior ``mask_prior``. ``"perturbation"``: ``pi_t ~ Beta(1, 1 / mask_prior - 1)``
        for all entries of component t, so that how many latents it touches adapts. ``"latent"``: ``pi_l ~ Beta(a / L,
        1)``, mean ``mask_prior``, for all entries of latent l, so that latents nobody uses are pruned. See
        :class:`~pertvae.nn._mask_priors.BetaPrior`; a pi of each entry's own would change nothing.
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
        embedding_rank: int = 4,
        mask_hyperprior: MaskHyperprior | None = None,
    ) -> None:
        super().__init__()
        self.effect_prior_scale = effect_prior_scale
        self.embedding_inference, self.mask_gradient = embedding_inference, mask_gradient
        self.mask_logits = nn.Parameter(torch.zeros(n_components, n_latent))
        self.base_logit = math.log(mask_prior / (1 - mask_prior))
        self.hyperprior = None if mask_hyperprior is None else BetaPrior.with_mean(mask_hyperprior, mask_prior)
        # the prior's log-odds of each component; stricter for a while when masks are switched on. With a hyperprior
        # only their difference to the base counts
        self.prior_logit: Tensor
        self.register_buffer("prior_logit", torch.full((n_components, 1), self.base_logit))
        self.typical_dose: Tensor
        self.register_buffer("typical_dose", torch.ones(n_components, 1))
        self.open_masks: Tensor
        self.register_buffer("open_masks", torch.tensor(False))
        self._open = False
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
            if embedding_inference == "low_rank":
                rank = min(embedding_rank, n_latent)
                self.factor = nn.Parameter(FACTOR_START * torch.randn(n_components, n_latent, rank))

    @property
    def inclusion(self) -> Tensor:
        """Posterior inclusion probability, components x latents."""
        return torch.ones_like(self.mask_logits) if self._open else torch.sigmoid(self.mask_logits)

    @property
    def open(self) -> bool:
        """Whether all masks are held at 1 and have no KL: effects are dense."""
        return self._open

    @open.setter
    def open(self, value: bool) -> None:
        # the buffer is what is saved; the attribute spares a wait for the device in every step
        self._open = bool(value)
        self.open_masks.fill_(bool(value))

    def set_prior(self, logit: Tensor) -> None:
        """Set the log-odds of the masks' prior, ``(components, 1)``.

        With a hyperprior the log-odds are those it gives plus the difference of these to ``base_logit``.
        """
        self.prior_logit.copy_(logit)

    def _masks_kl(self, mask: Tensor) -> Tensor:
        """Return the KL of masks, and of pi if it has a prior, of each draw and component."""
        if self.hyperprior is None:
            return mask_kl(self.mask_logits, mask, self.prior_logit, self.mask_gradient).sum(-1)
        terms = self.hyperprior.terms(self.inclusion)
        log_odds = terms.log_odds + (self.prior_logit - self.base_logit)
        kl = mask_kl(self.mask_logits, mask, log_odds, self.mask_gradient, terms.log_closed)
        return kl.sum(-1) + terms.kl

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._open = bool(self.open_masks)

    def set_typical_dose(self, doses: Tensor) -> None:
        """Set the dose of each component whose shifts are learned, ``(components,)``; zeros take the median of others.

        Without it, doses of 100 would need effects, and steps of the optimiser, of a hundredth.
        """
        given = doses > 0
        if given.any():
            self.typical_dose.copy_(torch.where(given, doses, doses[given].median())[:, None])

    def _diagonal(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the independent part of q(e)."""
        unit = self.typical_dose[index]
        return self.loc[index] / unit, (self.log_sd[index].exp() + VARIANCE_FLOOR) / unit

    def _factor(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Return the factor of the covariance of q(e), ``(components, latents, rank)``."""
        return self.factor[index] / self.typical_dose[index][..., None]

    def posterior(self, mask: Tensor, components: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of every entry in q(e | m).

        Parameters
        ----------
        mask
            ``(..., components, latents)``.
        components
            Indices of the components in ``mask``; all by default.
        """
        index = slice(None) if components is None else components
        if self.embedding_inference == "correlated":
            h = F.leaky_relu(self.from_mask(mask) + self.identity.weight[index], SLOPE)
            h = h + F.leaky_relu(self.second(h), SLOPE)
            mean, sd = self.head(h)
            return mean / self.typical_dose[index], sd / self.typical_dose[index]
        mean, sd = self._diagonal(index)
        if self.embedding_inference == "low_rank":
            sd = (sd.square() + self._factor(index).square().sum(-1)).sqrt()
        elif self.embedding_inference == "gated":
            on = mask > 0.5
            return mean.where(on, torch.zeros_like(mean)), sd.where(on, torch.full_like(sd, self.effect_prior_scale))
        return mean.expand_as(mask), sd.expand_as(mask)

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> EffectSample:
        """Draw M and E for all components, with gradients."""
        if self.open:
            mask = self.inclusion.expand(n_samples, -1, -1)
        else:
            mask = sample_mask(self.mask_logits, n_samples, self.mask_gradient, generator)
        if self.embedding_inference == "correlated":
            mean, sd = self.posterior(mask)
        else:
            mean, sd = self._diagonal()
        effect = mean + sd * torch.randn(mask.shape, generator=generator, device=mask.device)
        if self.embedding_inference == "low_rank":
            factor = self._factor()
            noise = torch.randn((n_samples, len(factor), factor.shape[-1]), generator=generator, device=mask.device)
            effect = effect + torch.einsum("tlr,str->stl", factor, noise)
            kl = low_rank_kl(mean, sd, factor, self.effect_prior_scale).expand(n_samples, -1)
        else:
            each = gaussian_kl(mean, sd, self.effect_prior_scale)
            if self.embedding_inference == "gated":
                # an effect that is off is not in z, so its value there, the prior's, needs no draw. As in mask_kl the
                # gradient to the mask's log-odds is that of the mask the likelihood saw
                each = each * (mask if self.mask_gradient == "gumbel" else self.inclusion)
            kl = each.sum(-1).expand(n_samples, -1)
        if not self.open:
            kl = kl + self._masks_kl(mask)
        return EffectSample(mask * effect, kl, mask)

    def draw(
        self,
        components: Tensor,
        uniform: Tensor,
        normal: Tensor,
        deviation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return ``m * e`` of some components from given noise, ``(cells, components, latents)``.

        Parameters
        ----------
        components
            Indices, ``(components,)``.
        uniform, normal
            Noise, ``(cells, components, latents)``: one posterior draw a cell.
        deviation
            Mean and standard deviation of independent Gaussians that are added to the effects, ``(components,
            latents)``. The sum has the covariances' sum, so it needs no noise of its own.
        """
        mask = (uniform < self.inclusion[components]).to(normal.dtype)
        low_rank = self.embedding_inference == "low_rank"
        mean, sd = self._diagonal(components) if low_rank else self.posterior(mask, components)
        if deviation is not None:
            mean, sd = mean + deviation[0], (sd.square() + deviation[1].square()).sqrt()
        if low_rank:
            return mask * (mean + low_rank_noise(sd, self._factor(components), normal))
        return mask * (mean + sd * normal)

    def expected(self, n_samples: int = 256) -> Tensor:
        """Return E[m e], components x latents; Monte Carlo over masks for ``"correlated"`` (seeded).

        Outside training the value is kept until a parameter changes, because getters ask for it once a minibatch.
        """
        if self.embedding_inference != "correlated":
            return self.inclusion * self.loc / self.typical_dose
        tensors = (*self.parameters(), self.typical_dose)
        version = (self.mask_logits.device, n_samples, self.open, *(t._version for t in tensors))
        if torch.is_grad_enabled() or self._kept is None or self._kept[0] != version:
            generator = torch.Generator(self.mask_logits.device).manual_seed(0)
            total = torch.zeros_like(self.mask_logits)
            for start in range(0, n_samples, 32):
                n = min(32, n_samples - start)
                mask = sample_mask(self.mask_logits.detach(), n, "identity", generator)
                mask = torch.ones_like(mask) if self.open else mask
                total = total + (mask * self.posterior(mask)[0]).sum(0)
            self._kept = (version, total / n_samples)
        return self._kept[1]

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the effects of open masks: ``e @ rotation``.

        Means and factors are turned exactly; of the turned diagonal covariance the variances are kept.

        Parameters
        ----------
        rotation
            Orthogonal, ``(n_latent, n_latent)``.
        """
        if self.embedding_inference != "correlated":
            self.loc.copy_(self.loc @ rotation)
            variance = (self.log_sd.exp() + VARIANCE_FLOOR).square() @ rotation.square()
            self.log_sd.copy_((variance.sqrt() - VARIANCE_FLOOR).clamp(min=VARIANCE_FLOOR).log())
            if self.embedding_inference == "low_rank":
                self.factor.copy_(rotation.T @ self.factor)
        else:
            # masks were all ones so far: their columns acted as a bias, and say nothing about single entries
            self.from_mask.bias.add_(self.from_mask.weight.sum(1))
            self.from_mask.weight.zero_()
            h = F.leaky_relu(self.from_mask.bias + self.identity.weight, SLOPE)
            h = h + F.leaky_relu(self.second(h), SLOPE)
            self.head.rotate(rotation, h.mean(0))

    def log_odds(self, evidence: Tensor | float = 0.0) -> Tensor:
        """Return the log-odds of open masks, given the effects that open masks have, ``(components, latents)``.

        Those of ``mask_prior`` plus the log Bayes factor ``log N(0; 0, scale^2) / N(0; mean, sd^2)`` (Savage-Dickey).

        Parameters
        ----------
        evidence
            What else the mask switches adds to the log Bayes factor, ``(components, latents)``.
        """
        mean, sd = self.posterior(torch.ones_like(self.mask_logits))
        return self.base_logit + 0.5 * (mean / sd).square() + torch.log(sd / self.effect_prior_scale) + evidence

    @torch.no_grad()
    def start_masks(self, energy: float, size: Tensor | None = None, evidence: Tensor | float = 0.0) -> float:
        """Switch masks on, from the dense effects: the largest that are significant are open, others at the prior.

        Parameters
        ----------
        energy
            Share of the sum of squared shifts that the largest ones carry. Relative, because the size of effects
            differs between screens. Significant is a mask whose :meth:`log_odds` are positive.
        size
            Sizes of the shifts, ``(components, latents)``; by default those by the effects at their typical doses.
        evidence
            What else the mask switches adds to the log Bayes factor, ``(components, latents)``.

        Returns
        -------
        Size of the smallest shift among the largest, in units of the latents.
        """
        mean, _ = self.posterior(torch.ones_like(self.mask_logits))
        size = mean.abs() * self.typical_dose if size is None else size
        largest = size.flatten().sort(descending=True).values
        share = largest.square().cumsum(0) / largest.square().sum().clamp(min=1e-12)
        threshold = largest[int((share < energy).sum().clamp(max=len(largest) - 1))]
        odds = self.log_odds(evidence)
        closed = torch.full_like(odds, self.base_logit)
        starts_open = (size >= threshold) & (odds > 0)
        self.mask_logits.copy_(torch.where(starts_open, odds.clamp(max=START_LOGIT), closed))
        self.open = False
        return float(threshold)

    def closing(self, sample: EffectSample, components: Tensor, latents: Tensor) -> Tensor:
        """Return how the components' ``m * e`` change when single masks close, ``(samples, entries, latents)``.

        With ``"correlated"`` the other effects of the component follow the changed mask row, by the same noise.

        Parameters
        ----------
        sample
            Draws with these masks open.
        components, latents
            Indices of the entries, of equal length.
        """
        effect, entry = sample.effect[:, components], torch.arange(len(latents), device=latents.device)
        if self.embedding_inference != "correlated":
            change = torch.zeros_like(effect)
            change[:, entry, latents] = -effect[:, entry, latents]
            return change
        assert sample.mask is not None
        mask = sample.mask[:, components]
        without = mask.clone()
        without[:, entry, latents] = 0.0
        mean, sd = self.posterior(mask, components)
        changed_mean, changed_sd = self.posterior(without, components)
        return without * (changed_mean + changed_sd * (effect - mean) / sd) - effect

    @torch.no_grad()
    def close_masks(self, components: Tensor, latents: Tensor) -> None:
        """Put single entries back to their prior, mask and effect; effects that a network gives are left.

        The mask goes to ``mask_prior``, and where that would be open to one minus it.

        Parameters
        ----------
        components, latents
            Indices of the entries, of equal length.
        """
        self.mask_logits[components, latents] = -abs(self.base_logit)
        if self.embedding_inference != "correlated":
            self.loc[components, latents] = 0.0
            sd = self.effect_prior_scale * self.typical_dose[components, 0] - VARIANCE_FLOOR
            self.log_sd[components, latents] = sd.clamp(min=VARIANCE_FLOOR).log()
            if self.embedding_inference == "low_rank":
                self.factor[components, latents] = 0.0
