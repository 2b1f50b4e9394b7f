"""Registration fields, the splitter and design matrices."""

from pertvae.data._design import Design, design_from_labels, design_from_obsm, distinct_doses, dose_matrix
from pertvae.data._fields import (
    CountField,
    MuDataCountField,
    MuDataPerturbationField,
    PerturbationField,
    PerturbationManager,
)
from pertvae.data._splitter import PerturbationDataSplitter, hold_out, split_labels

__all__ = [
    "CountField",
    "Design",
    "MuDataCountField",
    "MuDataPerturbationField",
    "PerturbationDataSplitter",
    "PerturbationField",
    "PerturbationManager",
    "design_from_labels",
    "design_from_obsm",
    "distinct_doses",
    "dose_matrix",
    "hold_out",
    "split_labels",
]
