"""Perturbation models."""

from pertvae.models.samsvae import SAMSVAE, ConditionalVAE, SVAEPlus

__all__ = ["SAMSVAE", "ConditionalVAE", "SVAEPlus"]
