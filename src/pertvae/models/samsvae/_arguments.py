"""Checks of constructor arguments that SAMS-VAE and its siblings share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pertvae._labels import hint


def check_choices(choices: Mapping[str, tuple[Any, Sequence[Any]]]) -> None:
    """Raise a ValueError for the first argument whose value is not one of those accepted."""
    for name, (value, accepted) in choices.items():
        if value not in accepted:
            close = hint(value, [a for a in accepted if isinstance(a, str)]) if isinstance(value, str) else ""
            raise ValueError(f"{name}={value!r} is not one of {list(accepted)}.{close}")


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError for the first size below 1."""
    for name, number in sizes.items():
        if number < 1:
            raise ValueError(f"{name}={number}: at least 1 is needed.")


def check_objective(objective: str, n_particles: int) -> None:
    """Raise a ValueError if an importance-weighted objective has a single draw to weigh."""
    if objective == "iwae" and n_particles < 2:
        raise ValueError(
            f"objective='iwae' weighs several draws of a cell, but n_particles={n_particles}: pass n_particles=5, "
            "say, or objective='elbo'."
        )
