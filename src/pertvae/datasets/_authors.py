"""The simulation of the authors of SAMS-VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._expression import log1p_cp10k
from pertvae.datasets._assemble import assemble, decoder_arrays, tables
from pertvae.datasets._generator import Decoder, check_sizes, make_design, make_effects, stream
from pertvae.datasets._oracle import Moved, value_oracle
from pertvae.datasets._truth import Truth, write_truth


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
    adata = assemble(x, design, batch=None, basal=basal, latent=latent, columns=columns)

    def measured(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        out = decoder(z)
        return log1p_cp10k(rng.poisson(np.exp(out))) if counts else out

    expected = value_oracle(measured, Moved(offsets), len(offsets), stream(seed, "oracle"), n_oracle)
    truth = Truth(
        "samsvae_authors",
        *tables(design, mask, effects, expected.shifts, adata.var_names),
        control_profile=pd.Series(expected.control, index=adata.var_names),
        genes=pd.DataFrame({"noise_sd": 0.0 if counts else np.sqrt(noise_fraction)}, index=adata.var_names),
        decoder=decoder_arrays(decoder),
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
