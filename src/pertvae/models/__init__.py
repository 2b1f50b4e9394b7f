"""Perturbation models."""

from pertvae.models.samsvae import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"]
