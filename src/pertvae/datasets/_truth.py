"""The truth of a simulated screen: written to ``uns["truth"]`` and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae._storage import read_table, read_tables, write_table, write_tables

TRUTH_KEY = "truth"
_TABLES = ("mask", "effects", "shifts")
_OPTIONAL = ("interactions", "additive_shifts")


@dataclass
class Truth:
    """What a simulated screen was made from.

    Parameters
    ----------
    kind
        Kind of screen.
    mask
        Which latents a perturbation moves, perturbations x latents (0 or 1).
    effects
        By how much, perturbations x latents; zero where the mask is.
    shifts
        The oracle: expected shift of every condition but the control, conditions x genes, in ``shift_space``.
    control_profile
        Expected profile of control cells, one value a gene, in ``shift_space``.
    genes
        What belongs to genes (baseline, dispersion, batch shifts, as the kind has them), genes as rows.
    decoder
        Weights of the decoder by layer (in x out), and ``center`` and ``scale`` of its output.
    settings
        Arguments of the simulation, the seed among them.
    shift_space
        ``"log1p_cp10k"`` for counts, ``"identity"`` for real values.
    interactions
        By how much the log rate of each gene deviates from additivity in each double, doubles x genes, 0 where it does
        not; ``None`` where the screen has no such deviations.
    additive_shifts
        The oracle without the interaction: expected shift of each double if the effects of its single perturbations
        added up, doubles x genes, from the same draws as ``shifts`` (their difference is the interaction, not noise);
        ``None`` where a screen has no interactions.
    tables
        What only one kind of screen has, by name; see :func:`pertvae.datasets.simulate_screen`.
    """

    kind: str
    mask: pd.DataFrame
    effects: pd.DataFrame
    shifts: pd.DataFrame
    control_profile: pd.Series
    genes: pd.DataFrame
    decoder: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    shift_space: str = "log1p_cp10k"
    interactions: pd.DataFrame | None = None
    additive_shifts: pd.DataFrame | None = None
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def write_truth(adata: ad.AnnData, truth: Truth) -> None:
    """Write the truth to ``adata.uns["truth"]``, in a form that survives ``write_h5ad``."""
    group: dict[str, Any] = {"kind": truth.kind, "shift_space": truth.shift_space}
    for name in _TABLES:
        write_table(group, name, getattr(truth, name))
    for name in _OPTIONAL:
        table = getattr(truth, name)
        if table is not None:
            write_table(group, name, table)
    if truth.tables:
        write_tables(group, "tables", truth.tables)
    group["genes"] = truth.genes.assign(control_profile=truth.control_profile)
    group["decoder"] = dict(truth.decoder)
    group["settings"] = dict(truth.settings)
    adata.uns[TRUTH_KEY] = group


def is_simulated(adata: ad.AnnData) -> bool:
    """Return whether ``adata`` carries the truth of a simulation of this package, not something else of that name."""
    group = adata.uns.get(TRUTH_KEY)
    return isinstance(group, Mapping) and {"kind", "shift_space", *_TABLES} <= set(group)


def read_truth(adata: ad.AnnData) -> Truth:
    """Return the truth of a simulated screen.

    Parameters
    ----------
    adata
        A screen from :func:`pertvae.datasets.simulate_screen`, also after ``write_h5ad`` and back. Not changed.

    Returns
    -------
    Truth
        Masks, effects, the oracle's shifts and control profile, gene parameters, decoder and settings, and what the
        kind has beside them. It speaks of all simulated genes and conditions, whatever subset of them ``adata`` still
        has.

    Raises
    ------
    KeyError
        If ``adata.uns["truth"]`` is missing.
    """
    if TRUTH_KEY not in adata.uns:
        raise KeyError(
            f"uns[{TRUTH_KEY!r}] is missing: the truth is known for screens from pertvae.datasets.simulate_screen only."
        )
    group: Mapping[str, Any] = adata.uns[TRUTH_KEY]
    genes = group["genes"]
    return Truth(
        kind=str(group["kind"]),
        mask=read_table(group, "mask"),
        effects=read_table(group, "effects"),
        shifts=read_table(group, "shifts"),
        control_profile=genes["control_profile"],
        genes=genes.drop(columns="control_profile"),
        decoder={k: np.asarray(v) for k, v in group["decoder"].items()},
        settings={k: v.item() if isinstance(v, np.generic) else v for k, v in group["settings"].items()},
        shift_space=str(group["shift_space"]),
        **{name: read_table(group, name) if name in group else None for name in _OPTIONAL},
        tables=read_tables(group, "tables") if "tables" in group else {},
    )
