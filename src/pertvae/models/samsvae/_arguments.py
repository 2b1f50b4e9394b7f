"""Constructor arguments that SAMS-VAE and its siblings share, and their checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pertvae._labels import hint

if TYPE_CHECKING:
    from pertvae.models.base import PerturbationModel

CHOICES: dict[str, tuple[Any, ...]] = {
    "embedding_inference": ("mean_field", "correlated", "gated", "low_rank"),
    "basal_inference": ("mean_field", "correlated"),
    "mask_gradient": ("gumbel", "identity"),
    "mask_draws": ("component", "cell"),
    "global_kl": ("full", "plate"),
    "combinations": ("sum", "unique"),
    "sparsify": ("rotate", "published", "auto"),
    "mask_hyperprior": (None, "perturbation", "latent"),
    "dose_response": ("linear", "hill", "categories"),
    "basal_posterior": ("gaussian", "flow"),
    "objective": ("elbo", "iwae"),
}
"""What each argument accepts."""
SMALLEST = {"n_latent": 1, "n_hidden": 1, "n_layers": 1, "n_layers_decoder": 0, "n_particles": 1, "embedding_rank": 1}
POSITIVE = ("effect_prior_scale", "dose_deviation_scale")
NOT_NEGATIVE = ("effect_threshold", "effect_start")


def own_arguments(local_variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, of its ``locals()`` on the first line, without data and registry."""
    return {k: v for k, v in local_variables.items() if k not in ("self", "__class__", "adata", "registry")}


def check_arguments(arguments: Mapping[str, Any], **accepted: tuple[Any, ...]) -> None:
    """Raise a ValueError for the first argument that is not accepted.

    Parameters
    ----------
    arguments
        By name; those that nothing is known about pass.
    **accepted
        What an argument accepts here, if not what :data:`CHOICES` says.
    """
    for name, value in arguments.items():
        choices: Sequence[Any] | None = accepted.get(name, CHOICES.get(name))
        if choices is not None and value not in choices:
            close = hint(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            raise ValueError(f"{name}={value!r} is not one of {list(choices)}.{close}")
        if value is None:
            continue
        if name in SMALLEST and value < SMALLEST[name]:
            raise ValueError(f"{name}={value}: at least {SMALLEST[name]} is needed.")
        if name in POSITIVE and value <= 0:
            raise ValueError(f"{name}={value} is not positive.")
        if name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{name}={value} is negative.")
        if name == "mask_prior" and not 0 < value < 1:
            raise ValueError(f"mask_prior={value} is not a probability strictly between 0 and 1.")
    if arguments.get("objective") == "iwae" and arguments["n_particles"] < 2:
        raise ValueError(
            f"objective='iwae' weighs several draws of a cell, but n_particles={arguments['n_particles']}: pass "
            "n_particles=5, say, or objective='elbo'."
        )


def without(arguments: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the arguments that are not named."""
    return {k: v for k, v in arguments.items() if k not in names}


def summary(model: PerturbationModel, *more: str) -> str:
    """Return one line about a model: its sizes, and what else is said."""
    shape = model.module.shape
    parts = [
        f"{model.module.n_latent} latents",
        f"{shape.n_components} perturbations",
        f"{shape.n_genes} genes",
        f"{model.module.gene_likelihood} likelihood",
        *more,
    ]
    return f"{type(model).__name__}: {', '.join(parts)}."
