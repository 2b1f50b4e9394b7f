"""Metrics of predictions: a registry, one call that computes them, intervals, and scores against a known truth."""

from __future__ import annotations

from pertvae.metrics import _profiles  # the headline metrics stand first in the list

# isort: split
from pertvae.metrics import (  # what the others register
    _clouds,
    _interactions,
    _moments,
    _ranks,
    _recovery,
    _shift_errors,
    _treatment_effects,
)
from pertvae.metrics._cell_eval import CellEvalResult, cell_eval
from pertvae.metrics._comparison import Comparison
from pertvae.metrics._distribution import energy_distance
from pertvae.metrics._evaluate import evaluate, resample
from pertvae.metrics._intervals import Interval, bootstrap_interval
from pertvae.metrics._known_truth import MaskScore, mask_f1
from pertvae.metrics._latents import LeakageScore, MCCScore, block_r2, leakage, mcc
from pertvae.metrics._pathways import PathwayScore, pathway_accuracy
from pertvae.metrics._registry import Metric, list_metrics, register, registry
from pertvae.metrics._training import TrainingProfiles, training_profiles

__all__ = [
    "CellEvalResult",
    "Comparison",
    "Interval",
    "LeakageScore",
    "MCCScore",
    "MaskScore",
    "Metric",
    "PathwayScore",
    "TrainingProfiles",
    "block_r2",
    "bootstrap_interval",
    "cell_eval",
    "energy_distance",
    "evaluate",
    "leakage",
    "list_metrics",
    "mask_f1",
    "mcc",
    "pathway_accuracy",
    "register",
    "registry",
    "resample",
    "training_profiles",
]
