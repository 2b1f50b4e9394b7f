"""Likelihoods of counts and real values, and the decoder that all methods share."""

from __future__ import annotations

from typing import Any, Literal

import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson
from torch import Tensor, nn
from torch.nn import functional as F

from pertvae.nn._mlp import MLP

GeneLikelihood = Literal["nb", "poisson", "normal"]
GENE_LIKELIHOODS: tuple[str, ...] = ("nb", "poisson", "normal")
MEAN_FLOOR = 1e-4
"""Added to every expected count: keeps the likelihood of a count at an unexpressed gene finite (published value)."""


class _NegativeBinomial(torch.autograd.Function):
    """Log-probability summed over genes, with special functions at non-zero counts only.

    At a count of zero the gamma terms cancel, and most counts are zero. The gradient of theta takes
    digamma(x + theta) - digamma(theta) count by count: the difference of their sums over cells would be rounding
    error in float32 when theta is large.
    """

    @staticmethod
    def forward(ctx: Any, mu: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        cell, gene = x.nonzero(as_tuple=True)
        count, theta_at = x[cell, gene], theta[gene]
        terms = torch.lgamma(count + theta_at) - torch.lgamma(theta_at) - torch.lgamma(count + 1)
        mu_at = mu[..., cell, gene]
        log_ratio = torch.log1p(mu / theta)
        # summed as a matrix, pairwise: adding up the non-zeros one by one would lose digits
        values = -theta * log_ratio
        values[..., cell, gene] += terms - count * torch.log1p(theta_at / mu_at)
        ctx.save_for_backward(mu, theta, log_ratio, cell, gene, count, mu_at)
        return values.sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        mu, theta, log_ratio, cell, gene, count, mu_at = ctx.saved_tensors
        grad = gradients[0]
        theta_at, grad_at = theta[gene], grad[..., cell]
        share = theta / (mu + theta)
        grad_mu = -share * grad[..., None]
        at = grad_at * count * (theta_at / (mu_at * (mu_at + theta_at)))
        grad_mu[..., cell, gene] += at
        # d/dtheta: mu / (mu + theta) - log(1 + mu / theta), and at non-zero counts the gamma and count terms
        dense = (1 - share - log_ratio).flatten(0, -2)
        grad_theta = grad.flatten() @ dense
        change = torch.digamma(count + theta_at) - torch.digamma(theta_at) - count / (mu_at + theta_at)
        sparse = grad_at * change
        grad_theta.index_add_(0, gene, sparse.sum(tuple(range(sparse.dim() - 1))) if sparse.dim() > 1 else sparse)
        return grad_mu, grad_theta, None


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return the summed log-probability of counts under a negative binomial with gene-wise dispersion.

    Mean ``mu``, variance ``mu + mu^2 / theta``. Terms without the mean are computed once a cell, not once a
    particle. Exact; counts have no gradient.

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``.
    mu
        Means, ``(..., cells, genes)``, positive.
    theta
        Inverse dispersion of each gene, ``(genes,)``, positive.

    Returns
    -------
    ``(..., cells)``, nats.
    """
    return _NegativeBinomial.apply(mu, theta.to(mu.dtype), x)


def poisson_log_prob(x: Tensor, mu: Tensor) -> Tensor:
    """Return the summed log-probability of counts under a Poisson with mean ``mu``, ``(..., cells)``, nats."""
    return (x * torch.log(mu) - mu).sum(-1) - torch.lgamma(x + 1).sum(-1)


class ExpressionDecoder(nn.Module):
    """From latents and covariates to the distribution of expression.

    Counts: ``rho = softmax(W h + b)`` over the registered genes, mean ``l rho + 1e-4`` with l the library size.
    Real values: mean ``W h + b``. Dispersion and standard deviation belong to the gene.

    Parameters
    ----------
    n_latent, n_covariates, n_genes
        Widths.
    n_hidden, n_layers
        Of the perceptron.
    gene_likelihood
        ``"nb"``, ``"poisson"`` or ``"normal"``.
    """

    def __init__(
        self,
        n_latent: int,
        n_covariates: int,
        n_genes: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        gene_likelihood: GeneLikelihood = "nb",
    ) -> None:
        super().__init__()
        if gene_likelihood not in GENE_LIKELIHOODS:
            raise ValueError(f"gene_likelihood={gene_likelihood!r} is not one of {list(GENE_LIKELIHOODS)}.")
        self.gene_likelihood = gene_likelihood
        self.mlp = MLP((n_latent, n_covariates), n_hidden, n_layers)
        self.out = nn.Linear(n_hidden, n_genes)
        # log inverse dispersion (nb) or log standard deviation (normal), one a gene
        self.log_scale = nn.Parameter(torch.zeros(n_genes)) if gene_likelihood != "poisson" else None

    def forward(self, z: Tensor, covariates: Tensor | None, library: Tensor) -> NegativeBinomial | Poisson | Normal:
        """Return the distribution of expression, ``(..., cells, genes)``.

        Parameters
        ----------
        z
            ``(..., cells, latents)``.
        covariates
            ``(cells, covariates)`` or ``None``.
        library
            ``(cells, 1)``, counts.
        """
        out = self.out(self.mlp(z, covariates))
        if self.gene_likelihood == "normal":
            return Normal(out, self.scale.expand_as(out), normal_mu=out)
        rho = F.softmax(out, dim=-1)
        mu = library * rho + MEAN_FLOOR
        if self.gene_likelihood == "poisson":
            return Poisson(mu, scale=rho)
        return NegativeBinomial(mu=mu, theta=self.scale, scale=rho)

    @property
    def scale(self) -> Tensor:
        """Inverse dispersion (nb) or standard deviation (normal) of each gene."""
        assert self.log_scale is not None
        return self.log_scale.exp()

    def log_prob(self, px: NegativeBinomial | Poisson | Normal, x: Tensor) -> Tensor:
        """Return the log-likelihood of expression summed over genes, ``(..., cells)``, nats."""
        if self.gene_likelihood == "nb":
            return nb_log_prob(x, px.mu, self.scale)
        if self.gene_likelihood == "poisson":
            return poisson_log_prob(x, px.rate)
        return px.log_prob(x).sum(-1)
