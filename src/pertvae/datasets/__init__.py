"""Data sets: simulated screens whose truth is known, and a small example."""

from __future__ import annotations

from pertvae.datasets._simulate import example, simulate_screen
from pertvae.datasets._truth import Truth, read_truth

__all__ = ["Truth", "example", "read_truth", "simulate_screen"]
