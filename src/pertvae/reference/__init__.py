"""References: predictions without a generative model, which every benchmark prints beside the models.

Nothing here imports torch.
"""

from pertvae.reference._base import Reference
from pertvae.reference._calibrated import CalibratedAdditive
from pertvae.reference._means import Additive, MatchingMean, Mean, NoChange
from pertvae.reference._ridge import RidgeAdditive

__all__ = ["Additive", "CalibratedAdditive", "MatchingMean", "Mean", "NoChange", "Reference", "RidgeAdditive"]
