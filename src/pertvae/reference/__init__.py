"""References: predictions without a perturbation model of ours, which every benchmark prints beside the models.

Importing this does not import torch; :class:`SCVIArithmetic` does when it is fitted.
"""

from pertvae.reference._base import Reference
from pertvae.reference._calibrated import CalibratedAdditive
from pertvae.reference._linear import Linear
from pertvae.reference._means import Additive, MatchingMean, Mean, NoChange
from pertvae.reference._ridge import RidgeAdditive
from pertvae.reference._scvi import SCVIArithmetic

__all__ = [
    "Additive",
    "CalibratedAdditive",
    "Linear",
    "MatchingMean",
    "Mean",
    "NoChange",
    "Reference",
    "RidgeAdditive",
    "SCVIArithmetic",
]
