"""SAMS-VAE."""

from pertvae.models.samsvae._model import SAMSVAE
from pertvae.models.samsvae._module import SAMSVAEModule

__all__ = ["SAMSVAE", "SAMSVAEModule"]
