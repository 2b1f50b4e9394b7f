"""Blocks that two or more methods share."""

from pertvae.nn._dose import DoseDeviations, HillResponse
from pertvae.nn._effects import EffectSample, SparseEffects
from pertvae.nn._flow import ConditionalFlow
from pertvae.nn._gather import active_components, gathered_shift
from pertvae.nn._likelihoods import GENE_LIKELIHOODS, ExpressionDecoder, poisson_log_prob
from pertvae.nn._masks import mask_kl, sample_mask
from pertvae.nn._mlp import MLP, GaussianHead, gaussian_kl
from pertvae.nn._negative_binomial import nb_log_prob
from pertvae.nn._rotation import simple_structure

__all__ = [
    "GENE_LIKELIHOODS",
    "MLP",
    "ConditionalFlow",
    "DoseDeviations",
    "EffectSample",
    "ExpressionDecoder",
    "GaussianHead",
    "HillResponse",
    "SparseEffects",
    "active_components",
    "gathered_shift",
    "gaussian_kl",
    "mask_kl",
    "nb_log_prob",
    "poisson_log_prob",
    "sample_mask",
    "simple_structure",
]
