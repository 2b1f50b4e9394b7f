"""pertvae: generative models of single-cell perturbation response for scvi-tools."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

__version__ = version("pertvae")

# Loaded on first use: `import pertvae` alone stays quick, and the references work without importing torch.
_CLASSES = dict.fromkeys(("SAMSVAE", "CPAVAE", "SVAEPlus", "ConditionalVAE"), "pertvae.models")
_FUNCTIONS = {"predict_ensemble": "pertvae.models"}
_MODULES = ("benchmark", "datasets", "metrics", "pl", "pp", "reference")

__all__ = [*_CLASSES, *_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _CLASSES | _FUNCTIONS:
        return getattr(importlib.import_module((_CLASSES | _FUNCTIONS)[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"pertvae.{name}")
    raise AttributeError(f"module 'pertvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
