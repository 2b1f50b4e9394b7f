"""Perturbation models."""

from pertvae.models.samsvae import SAMSVAE

__all__ = ["SAMSVAE"]
