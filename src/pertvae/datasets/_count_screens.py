"""What every screen of counts shares: settings, parts, and the way from latents to an AnnData with its truth."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae.datasets._assemble import assemble, decoder_arrays, tables
from pertvae.datasets._counts import CountModel
from pertvae.datasets._generator import Decoder, Design, check_sizes, make_design, make_effects, stream
from pertvae.datasets._oracle import Expected
from pertvae.datasets._truth import Truth, write_truth

_HIDDEN = (64, 64)
_DRAWS = 4096  # basal states that the decoder is centred and scaled over


@dataclass(frozen=True, kw_only=True)
class CountSettings:
    """Settings of every screen of counts; the defaults are those of the fixed benchmark screens.

    Parameters
    ----------
    n_genes, n_perturbations, n_doubles, cells_per_perturbation, cells_per_double, n_controls, n_latent, n_batches
        Sizes. Doubles are distinct random pairs of the single perturbations.
    mask_density
        Probability that a perturbation moves a latent; a perturbation that would move none moves one at random.
    effect_size, effect_sd
        |effect| ~ N(effect_size, effect_sd), random sign.
    decoder_sd, baseline_sd
        Standard deviations over basal states, and over genes, of the log rate.
    library_size, library_sd
        Library ~ LogNormal(log library_size, library_sd), in counts.
    theta, theta_sd
        Inverse dispersion per gene ~ LogNormal(log theta, theta_sd).
    batch_sd
        Standard deviation of the log shift of each gene in each batch. Batches are random and balanced in expectation.
    n_oracle
        Basal draws behind each expected shift.
    seed
        Of all random numbers.
    """

    n_genes: int = 1000
    n_perturbations: int = 100
    n_doubles: int = 62
    cells_per_perturbation: int = 150
    cells_per_double: int = 100
    n_controls: int = 2000
    n_latent: int = 20
    n_batches: int = 2
    mask_density: float = 0.1
    effect_size: float = 2.5
    effect_sd: float = 0.5
    decoder_sd: float = 0.6
    baseline_sd: float = 1.2
    library_size: float = 3000.0
    library_sd: float = 0.35
    theta: float = 2.0
    theta_sd: float = 0.7
    batch_sd: float = 0.1
    n_oracle: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_genes", "n_perturbations", "n_doubles", "cells_per_perturbation", "cells_per_double", "n_controls")
        check_sizes(**{name: getattr(self, name) for name in (*sizes, "n_latent", "n_batches", "n_oracle")})


@dataclass(frozen=True)
class CountParts:
    """The parts of a screen of counts, each from its own random stream: equal for every kind at the same settings.

    Parameters
    ----------
    settings
        What the parts were made from.
    design
        Which cells get which perturbations.
    mask, effects
        Perturbations x latents.
    model
        How latents become counts.
    basal, library, batch
        Basal state (standard normal), library and batch of each cell.
    """

    settings: CountSettings
    design: Design
    mask: np.ndarray
    effects: np.ndarray
    model: CountModel
    basal: np.ndarray
    library: np.ndarray
    batch: np.ndarray

    @classmethod
    def create(cls, settings: CountSettings) -> CountParts:
        """Draw the parts."""
        s = settings
        design = make_design(
            stream(s.seed, "design"),
            s.n_perturbations,
            s.n_doubles,
            cells=s.cells_per_perturbation,
            cells_double=s.cells_per_double,
            n_controls=s.n_controls,
        )
        mask, effects = make_effects(
            stream(s.seed, "effects"),
            (s.n_perturbations, s.n_latent),
            density=s.mask_density,
            size=s.effect_size,
            sd=s.effect_sd,
            at_least_one=True,
        )
        rng = stream(s.seed, "decoder")
        decoder = Decoder.create(rng, s.n_latent, _HIDDEN, s.n_genes)
        decoder.standardise(rng.standard_normal((_DRAWS, s.n_latent)), s.decoder_sd, center=True)
        laws = ("baseline_sd", "theta", "theta_sd", "n_batches", "batch_sd", "library_size", "library_sd")
        model = CountModel.create(stream(s.seed, "genes"), decoder, **{name: getattr(s, name) for name in laws})
        rng = stream(s.seed, "cells")
        basal = rng.standard_normal((len(design.codes), s.n_latent))
        library = model.draw_library(rng, len(basal))
        return cls(s, design, mask, effects, model, basal, library, rng.integers(s.n_batches, size=len(basal)))

    @property
    def offsets(self) -> np.ndarray:
        """Return the sum of the effects of the components of each condition, conditions x latents."""
        return self.design.matrix @ self.effects


def count_screen(
    kind: str,
    parts: CountParts,
    expected: Expected,
    *,
    latent: np.ndarray,
    own: Mapping[str, Any],
    basal: np.ndarray | None = None,
    library: np.ndarray | None = None,
    deviations: tuple[np.ndarray, np.ndarray] | None = None,
    columns: Mapping[str, Any] | None = None,
    genes: Mapping[str, np.ndarray] | None = None,
    **truth: Any,
) -> ad.AnnData:
    """Draw the counts of a screen and return it with its truth.

    Parameters
    ----------
    kind
        Name of the kind.
    parts, expected
        Its parts, and what the true model expects.
    latent
        Latent of each cell.
    own
        Settings of the kind beside the common ones, for the record.
    basal, library
        Where they are not those of ``parts``.
    deviations
        See :meth:`CountModel.sample`.
    columns, genes
        Further columns of ``obs`` and of ``truth.genes``.
    **truth
        Further fields of the truth; ``mask`` and ``effects`` where they are not those of ``parts``.
    """
    library = parts.library if library is None else library
    x = parts.model.sample(stream(parts.settings.seed, "counts"), latent, library, parts.batch, deviations)
    adata = assemble(
        x,
        parts.design,
        batch=parts.batch,
        basal=parts.basal if basal is None else basal,
        latent=latent,
        columns={"truth_library": library, **(columns or {})},
    )
    mask, effects = truth.pop("mask", parts.mask), truth.pop("effects", parts.effects)
    stored = Truth(
        kind,
        *tables(parts.design, mask, effects, expected.shifts, adata.var_names),
        control_profile=pd.Series(expected.control, index=adata.var_names),
        genes=parts.model.gene_table(adata.var_names).assign(**(genes or {})),
        decoder=decoder_arrays(parts.model.decoder),
        settings={**dataclasses.asdict(parts.settings), **own},
        **truth,
    )
    write_truth(adata, stored)
    return adata


def count_kind(function: Callable[..., ad.AnnData]) -> Callable[..., ad.AnnData]:
    """Let a kind take the common settings beside its own, all by keyword.

    The kind itself gets the common ones as one object, :class:`CountSettings`, and its own as keywords.
    """
    common = inspect.signature(CountSettings).parameters
    own = list(inspect.signature(function).parameters.values())[1:]

    @functools.wraps(function)
    def make(**settings: Any) -> ad.AnnData:
        shared = {name: value for name, value in settings.items() if name in common}
        return function(CountSettings(**shared), **{k: v for k, v in settings.items() if k not in common})

    make.__signature__ = inspect.Signature([*common.values(), *own])  # type: ignore[attr-defined]
    return make
