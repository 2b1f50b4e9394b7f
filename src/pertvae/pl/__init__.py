"""Plots: perturbation programs, treatment effects, training curves, data efficiency.

Every function returns a matplotlib figure that pyplot does not know (a notebook shows it when it is the last line
of a cell), takes ``ax`` to draw into a figure of yours and ``save`` to write a file.
"""

from pertvae.pl._data_efficiency import data_efficiency
from pertvae.pl._effects import treatment_effects
from pertvae.pl._programs import programs
from pertvae.pl._training import training_curves

__all__ = ["data_efficiency", "programs", "training_curves", "treatment_effects"]
