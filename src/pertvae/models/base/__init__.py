"""What all methods share."""

from pertvae.models.base._model import PerturbationModel
from pertvae.models.base._module import ModuleShape, PerturbationModule, TrainingStatistics
from pertvae.models.base._plan import PerturbationTrainingPlan
from pertvae.models.base._results import Capabilities, PerturbationPrograms, TreatmentEffects

__all__ = [
    "Capabilities",
    "ModuleShape",
    "PerturbationModel",
    "PerturbationModule",
    "PerturbationPrograms",
    "PerturbationTrainingPlan",
    "TrainingStatistics",
    "TreatmentEffects",
]
