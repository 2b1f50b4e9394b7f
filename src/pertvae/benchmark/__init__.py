"""Benchmark: models and references on the same held-out cells, with intervals, tables and one page to read."""

from pertvae.benchmark._arguments import REFERENCES, model_names
from pertvae.benchmark._result import BenchmarkResult
from pertvae.benchmark._run import run

__all__ = ["REFERENCES", "BenchmarkResult", "model_names", "run"]
