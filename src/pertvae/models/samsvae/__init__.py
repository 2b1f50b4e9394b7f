"""SAMS-VAE and its siblings."""

from pertvae.models.samsvae._conditionalvae import ConditionalVAE
from pertvae.models.samsvae._conditionalvae_module import ConditionalVAEModule
from pertvae.models.samsvae._cpavae import CPAVAE, CPAVAEModule
from pertvae.models.samsvae._model import SAMSVAE
from pertvae.models.samsvae._module import SAMSVAEModule
from pertvae.models.samsvae._svaeplus import SVAEPlus
from pertvae.models.samsvae._svaeplus_module import SVAEPlusModule

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "CPAVAEModule",
    "ConditionalVAE",
    "ConditionalVAEModule",
    "SAMSVAEModule",
    "SVAEPlus",
    "SVAEPlusModule",
]
