"""Kinds of simulated screens: one function each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._expression import log1p_cp10k
from pertvae.datasets._generator import (
    CountModel,
    Decoder,
    Design,
    check_sizes,
    gene_names,
    make_design,
    make_effects,
    oracle,
    stream,
)
from pertvae.datasets._truth import Truth, write_truth

KINDS: dict[str, Callable[..., ad.AnnData]] = {}
"""Every kind of screen by name: a function of keyword arguments, ``seed`` among them."""


def kind(name: str) -> Callable[[Callable[..., ad.AnnData]], Callable[..., ad.AnnData]]:
    """Register a function as a kind of screen."""

    def add(function: Callable[..., ad.AnnData]) -> Callable[..., ad.AnnData]:
        KINDS[name] = function
        return function

    return add


def _assemble(
    x: Any, design: Design, *, batch: np.ndarray | None, basal: np.ndarray, latent: np.ndarray, columns: dict[str, Any]
) -> ad.AnnData:
    """Return the AnnData of a screen, without its truth."""
    labels = design.labels
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical.from_codes(design.codes, categories=pd.Index(labels, dtype=object))},
        index=pd.Index([f"cell{i:06d}" for i in range(len(design.codes))], dtype=object),
    )
    if batch is None:
        batch = np.zeros(len(obs), dtype=int)
    names = pd.Index([f"batch{b + 1}" for b in range(int(batch.max()) + 1)], dtype=object)
    obs["batch"] = pd.Categorical.from_codes(batch, categories=names)
    for name, values in columns.items():
        obs[name] = values
    adata = ad.AnnData(X=x, obs=obs, var=pd.DataFrame(index=gene_names(x.shape[1])))
    adata.obsm["X_truth_basal"] = basal.astype(np.float32)
    adata.obsm["X_truth_latent"] = latent.astype(np.float32)
    return adata


def _tables(
    design: Design, mask: np.ndarray, effects: np.ndarray, shifts: np.ndarray, genes: pd.Index
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return mask, effects and shifts as tables with names."""
    latents = pd.Index([f"Z{i + 1}" for i in range(mask.shape[1])], dtype=object)
    rows = pd.Index(design.perturbations, dtype=object)
    return (
        pd.DataFrame(mask.astype(np.int8), index=rows, columns=latents),
        pd.DataFrame(effects, index=rows, columns=latents),
        pd.DataFrame(shifts, index=pd.Index(design.labels[1:], dtype=object), columns=genes),
    )


def _decoder_arrays(decoder: Decoder) -> dict[str, np.ndarray]:
    weights = {f"layer{i + 1}": w for i, w in enumerate(decoder.weights)}
    return {**weights, "center": decoder.center, "scale": decoder.scale}


@kind("sparse_additive")
def sparse_additive(
    *,
    n_genes: int = 1000,
    n_perturbations: int = 100,
    n_doubles: int = 62,
    cells_per_perturbation: int = 150,
    cells_per_double: int = 100,
    n_controls: int = 2000,
    n_latent: int = 20,
    n_batches: int = 2,
    mask_density: float = 0.1,
    effect_size: float = 2.5,
    effect_sd: float = 0.5,
    decoder_sd: float = 0.6,
    baseline_sd: float = 1.2,
    library_size: float = 3000.0,
    library_sd: float = 0.35,
    theta: float = 2.0,
    theta_sd: float = 0.7,
    batch_sd: float = 0.1,
    n_oracle: int = 1000,
    seed: int = 0,
) -> ad.AnnData:
    """Simulate sparse additive effects on a latent basal state, with negative binomial counts.

    The screen ``sparse_additive`` with its fixed sizes as defaults. z = z_basal + sum of the effects of the
    components, z_basal ~ N(0, I); a decoder of two leaky-ReLU(0.2) layers of 64, no bias, orthogonal weights; its
    output per gene centred and scaled to ``decoder_sd`` over basal states (so that the decoder does not depend on the
    perturbations); baseline log rate N(0, ``baseline_sd``); softmax; negative binomial counts.

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

    Returns
    -------
    AnnData
        See :func:`pertvae.datasets.simulate_screen`. ``obs["truth_library"]`` is the true library size.
    """
    settings = dict(locals())
    check_sizes(
        **{k: settings[k] for k in ("n_genes", "n_perturbations", "n_doubles", "cells_per_perturbation")},
        **{k: settings[k] for k in ("cells_per_double", "n_controls", "n_latent", "n_batches", "n_oracle")},
    )
    design = make_design(
        stream(seed, "design"),
        n_perturbations,
        n_doubles,
        cells=cells_per_perturbation,
        cells_double=cells_per_double,
        n_controls=n_controls,
    )
    mask, effects = make_effects(
        stream(seed, "effects"),
        (n_perturbations, n_latent),
        density=mask_density,
        size=effect_size,
        sd=effect_sd,
        at_least_one=True,
    )
    rng = stream(seed, "decoder")
    decoder = Decoder.create(rng, n_latent, (64, 64), n_genes)
    decoder.standardise(rng.standard_normal((4096, n_latent)), decoder_sd, center=True)
    rng = stream(seed, "genes")
    model = CountModel(
        decoder,
        baseline=rng.normal(0.0, baseline_sd, n_genes),
        theta=rng.lognormal(np.log(theta), theta_sd, n_genes),
        batch_shift=rng.normal(0.0, batch_sd, (n_batches, n_genes)),
        library=library_size,
        library_sd=library_sd,
    )
    offsets = design.matrix @ effects
    rng = stream(seed, "cells")
    basal = rng.standard_normal((len(design.codes), n_latent))
    library = model.draw_library(rng, len(basal))
    batch = rng.integers(n_batches, size=len(basal))
    latent = basal + offsets[design.codes]
    x = model.sample(stream(seed, "counts"), latent, library, batch)
    adata = _assemble(x, design, batch=batch, basal=basal, latent=latent, columns={"truth_library": library})
    base, shifts = oracle(model, offsets[1:], stream(seed, "oracle"), n_oracle)
    genes = pd.DataFrame({"baseline": model.baseline, "theta": model.theta}, index=adata.var_names)
    for b in range(n_batches):
        genes[f"batch{b + 1}"] = model.batch_shift[b]
    truth = Truth(
        "sparse_additive",
        *_tables(design, mask, effects, shifts, adata.var_names),
        control_profile=pd.Series(base, index=adata.var_names),
        genes=genes,
        decoder=_decoder_arrays(decoder),
        settings=settings,
    )
    write_truth(adata, truth)
    return adata


@dataclass
class _ValueModel:
    """Real values decoder(z) + noise, or counts Poisson(exp(decoder(z)))."""

    decoder: Decoder
    counts: bool

    def draw(self, rng: np.random.Generator, n: int) -> Any:
        return rng.standard_normal((n, len(self.decoder.weights[0])))

    def profiles(self, state: Any, offsets: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        base = self._mean(state, rng)
        shifts = np.array([self._mean(state + offset, rng) - base for offset in offsets])
        return base, shifts.reshape(len(offsets), len(base))

    def _mean(self, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        out = self.decoder(z)
        return (log1p_cp10k(rng.poisson(np.exp(out))) if self.counts else out).mean(axis=0)


@kind("samsvae_authors")
def samsvae_authors(
    *,
    n_genes: int = 100,
    n_perturbations: int = 100,
    n_latent: int = 15,
    cells_per_split: Sequence[int] = (500, 100, 100),
    n_controls: int = 500,
    mask_density: float = 2 / 15,
    effect_size: float = 5.0,
    effect_sd: float = 0.5,
    hidden: Sequence[int] = (50, 50, 50, 50),
    noise_fraction: float = 0.2,
    counts: bool = False,
    n_oracle: int = 2000,
    seed: int = 0,
) -> ad.AnnData:
    """Simulate as the authors of SAMS-VAE do (arXiv 2311.02794), from its published description.

    z = z_basal + effect * mask, z_basal ~ N(0, I); four leaky-ReLU(0.2) layers of 50, no bias, orthogonal weights; the
    output per gene divided by its standard deviation over all cells; Gaussian noise of ``noise_fraction`` of that
    variance. Real values, dense: register with ``is_count_data=False`` and ``gene_likelihood="normal"``.

    Parameters
    ----------
    n_genes, n_perturbations, n_latent
        Sizes.
    cells_per_split
        Cells of each perturbation with ``obs["split"]`` of ``train``, ``valid`` and ``test``.
    n_controls
        Unperturbed cells, split in the same proportions. The authors have none (their treatment "0" is the point of
        comparison, with effects of its own); a registration here needs controls, and with none of them the origin of
        the latent space would not be known. ``0`` gives the authors' design.
    mask_density, effect_size, effect_sd
        As for ``sparse_additive``, but a perturbation may move no latent, as in the authors' version.
    hidden
        Widths of the decoder.
    noise_fraction
        Variance of the noise, as a fraction of the variance of the noise-free value (1 per gene).
    counts
        ``True`` gives counts x ~ Poisson(exp(output)) as CSR instead of Gaussian values: the optional exp of the
        authors' version. The Poisson step is ours.
    n_oracle
        Basal draws behind each expected shift (real values: difference of means; counts: log1p CP10k).
    seed
        Of all random numbers.

    Returns
    -------
    AnnData
        See :func:`pertvae.datasets.simulate_screen`. ``obs["split"]`` is ready for ``train(split_key="split")``.
    """
    settings = dict(locals())
    settings["cells_per_split"] = np.asarray(cells_per_split)
    settings["hidden"] = np.asarray(hidden)
    sizes = {k: settings[k] for k in ("n_genes", "n_perturbations", "n_controls", "n_latent", "n_oracle")}
    check_sizes(**sizes)
    per_split = np.asarray(cells_per_split)
    if per_split.shape != (3,) or (per_split < 0).any() or per_split.sum() == 0:
        raise ValueError(f"cells_per_split={cells_per_split!r} must be three numbers of cells: train, valid, test.")
    cells = int(per_split.sum())
    design = make_design(stream(seed, "design"), n_perturbations, 0, cells=cells, cells_double=0, n_controls=n_controls)
    mask, effects = make_effects(
        stream(seed, "effects"),
        (n_perturbations, n_latent),
        density=mask_density,
        size=effect_size,
        sd=effect_sd,
        at_least_one=False,
    )
    decoder = Decoder.create(stream(seed, "decoder"), n_latent, hidden, n_genes)
    offsets = design.matrix @ effects
    basal = stream(seed, "cells").standard_normal((len(design.codes), n_latent))
    latent = basal + offsets[design.codes]
    decoder.standardise(latent, 1.0, center=False)
    values, rng = decoder(latent), stream(seed, "counts")
    if counts:
        x: Any = sp.csr_matrix(rng.poisson(np.exp(values)).astype(np.float32))
    else:
        x = (values + rng.normal(0.0, np.sqrt(noise_fraction), values.shape)).astype(np.float32)
    columns = {"split": pd.Categorical(_splits(design.codes, per_split), categories=["train", "valid", "test"])}
    adata = _assemble(x, design, batch=None, basal=basal, latent=latent, columns=columns)
    base, shifts = oracle(_ValueModel(decoder, counts), offsets[1:], stream(seed, "oracle"), n_oracle)
    truth = Truth(
        "samsvae_authors",
        *_tables(design, mask, effects, shifts, adata.var_names),
        control_profile=pd.Series(base, index=adata.var_names),
        genes=pd.DataFrame({"noise_sd": 0.0 if counts else np.sqrt(noise_fraction)}, index=adata.var_names),
        decoder=_decoder_arrays(decoder),
        settings=settings,
        shift_space="log1p_cp10k" if counts else "identity",
    )
    write_truth(adata, truth)
    return adata


def _splits(codes: np.ndarray, per_split: np.ndarray) -> np.ndarray:
    """Return the split of each cell: the same shares of every condition (cells are in random order already)."""
    names = np.repeat(np.array(["train", "valid", "test"]), per_split)
    result = np.empty(len(codes), dtype=names.dtype)
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        result[rows] = names[np.arange(len(rows)) * len(names) // len(rows)]
    return result
