"""What the getters return."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class PerturbationPrograms:
    """Programs of a model.

    Parameters
    ----------
    effects
        Perturbations x programs: expected shift of each program by one dose, in units of the basal state's prior
        standard deviation.
    inclusion
        Perturbations x programs: probability that the perturbation acts on the program.
    loadings
        Programs x genes: log2 fold change of a gene's share of expression when the program rises by one unit.
    library
        Perturbations x ``log2_fold_change``: change of the total counts of a cell by one dose, shrunken; no program
        moves them. ``None`` for real values.
    """

    effects: pd.DataFrame
    inclusion: pd.DataFrame
    loadings: pd.DataFrame
    library: pd.DataFrame | None = None


@dataclass(frozen=True)
class TreatmentEffects:
    """Average treatment effects with credible intervals.

    Parameters
    ----------
    mean, lower, upper
        Perturbations x genes; units as asked for (``space``).
    """

    mean: pd.DataFrame
    lower: pd.DataFrame
    upper: pd.DataFrame


@dataclass(frozen=True)
class Capabilities:
    """What a method offers; anything else raises and names these.

    Parameters
    ----------
    basal
        Accepted ``basal`` of ``predict_perturbation``, the default first.
    latent_kinds
        Accepted ``kind`` of ``get_latent_representation``.
    credible_effects
        Whether effects have a posterior, and treatment effects credible intervals.
    marginal_ll
        Whether ``get_marginal_ll`` is defined.
    program
        What a program is.
    inclusion
        What its inclusion is.
    """

    basal: tuple[str, ...]
    latent_kinds: tuple[str, ...]
    credible_effects: bool
    marginal_ll: bool
    program: str
    inclusion: str
