"""Perturbation models."""

from pertvae.models.base._ensemble import predict_ensemble
from pertvae.models.samsvae import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus", "predict_ensemble"]
