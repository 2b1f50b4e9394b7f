"""Metrics of predictions: a registry, one call that computes them, intervals, and scores against a known truth."""

from __future__ import annotations

from pertvae.metrics import _profiles, _treatment_effects  # register their metrics, in the order of the list
from pertvae.metrics._comparison import Comparison
from pertvae.metrics._distribution import energy_distance
from pertvae.metrics._evaluate import evaluate, resample
from pertvae.metrics._intervals import Interval, bootstrap_interval
from pertvae.metrics._known_truth import MaskScore, mask_f1
from pertvae.metrics._pathways import PathwayScore, pathway_accuracy
from pertvae.metrics._registry import Metric, list_metrics, register, registry

__all__ = [
    "Comparison",
    "Interval",
    "MaskScore",
    "Metric",
    "PathwayScore",
    "bootstrap_interval",
    "energy_distance",
    "evaluate",
    "list_metrics",
    "mask_f1",
    "pathway_accuracy",
    "register",
    "registry",
    "resample",
]
