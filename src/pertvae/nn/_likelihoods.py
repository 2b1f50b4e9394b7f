"""Likelihoods of counts and real values, and the decoder that all methods share."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson
from torch import Tensor, nn
from torch.nn import functional as F

from pertvae.nn._mlp import MLP, PartsLinear
from pertvae.nn._negative_binomial import softmax_nb_log_prob

GeneLikelihood = Literal["nb", "poisson", "normal"]
GENE_LIKELIHOODS: tuple[str, ...] = ("nb", "poisson", "normal")
MEAN_FLOOR = 1e-4
"""Added to every expected count: keeps the likelihood of a count at an unexpressed gene finite (published value)."""


def poisson_log_prob(x: Tensor, mu: Tensor) -> Tensor:
    """Return the summed log-probability of counts under a Poisson with mean ``mu``, ``(..., cells)``, nats."""
    return (x * torch.log(mu) - mu).sum(-1) - torch.lgamma(x + 1).sum(-1)


class SoftmaxNegativeBinomial(NegativeBinomial):
    """Negative binomial with means ``library * softmax(logits) + MEAN_FLOOR``, which are computed when asked for.

    Training asks for the likelihood alone, :meth:`total_log_prob`; everything else behaves as scvi-tools' class.

    Parameters
    ----------
    logits
        ``(..., cells, genes)``.
    library
        Counts of each cell, ``(cells, 1)``.
    inverse_dispersion
        Of each gene, ``(genes,)``.
    """

    def __init__(self, logits: Tensor, library: Tensor, inverse_dispersion: Tensor) -> None:
        self._inputs = (logits, library, inverse_dispersion)
        self._validate_args = False

    def __getattr__(self, name: str) -> Any:
        # reached while the parent class is not set up, and for what does not exist at all
        if name.startswith("__") or "mu" in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        logits, library, inverse_dispersion = self._inputs
        # sample() runs in inference mode, and would otherwise leave means behind that cannot be differentiated
        with torch.inference_mode(False):
            share = F.softmax(logits, dim=-1)
            super().__init__(mu=library * share + MEAN_FLOOR, theta=inverse_dispersion, scale=share)
        return getattr(self, name)

    def total_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-probability of counts summed over genes, ``(..., cells)``, nats."""
        logits, library, inverse_dispersion = self._inputs
        return softmax_nb_log_prob(x, logits, library, inverse_dispersion, floor=MEAN_FLOOR)


class ExpressionDecoder(nn.Module):
    """From latents and covariates to the distribution of expression.

    Counts: ``rho = softmax(W h + b)`` over the registered genes, mean ``l rho + 1e-4`` with l the library size.
    Real values: mean ``W h + b``. Dispersion and standard deviation belong to the gene.

    Parameters
    ----------
    n_latent, n_covariates, n_genes
        Widths.
    n_hidden, n_layers
        Of the perceptron; without hidden layers (0) h are latents and covariates themselves.
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
        n_in = (n_latent, n_covariates)
        self.mlp = MLP(n_in, n_hidden, n_layers) if n_layers else None
        self.out = nn.Linear(n_hidden, n_genes) if n_layers else PartsLinear(n_in, n_genes)
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
        out = self.out(z, covariates) if self.mlp is None else self.out(self.mlp(z, covariates))
        if self.gene_likelihood == "normal":
            return Normal(out, self.scale.expand_as(out), normal_mu=out)
        if self.gene_likelihood == "nb":
            return SoftmaxNegativeBinomial(out, library, self.scale)
        rho = F.softmax(out, dim=-1)
        return Poisson(library * rho + MEAN_FLOOR, scale=rho)

    def rotate_latent(self, rotation: Tensor) -> None:
        """Turn the weights of the latents, so that ``z @ rotation`` is decoded as ``z`` was before."""
        first = self.out if self.mlp is None else self.mlp.first
        cast(PartsLinear, first).rotate_input(0, rotation)

    @property
    def scale(self) -> Tensor:
        """Inverse dispersion (nb) or standard deviation (normal) of each gene."""
        assert self.log_scale is not None
        return self.log_scale.exp()

    def log_prob(self, px: NegativeBinomial | Poisson | Normal, x: Tensor) -> Tensor:
        """Return the log-likelihood of expression summed over genes, ``(..., cells)``, nats."""
        if isinstance(px, SoftmaxNegativeBinomial):
            return px.total_log_prob(x)
        if self.gene_likelihood == "poisson":
            return poisson_log_prob(x, px.rate)
        return px.log_prob(x).sum(-1)
