"""Preprocessing: labels of other tools, and splits."""

from pertvae.pp._harmonize import harmonize_perturbations
from pertvae.pp._split import perturbation_folds, split_perturbations

__all__ = ["harmonize_perturbations", "perturbation_folds", "split_perturbations"]
