"""A screen whose perturbations change the mechanisms of a causal graph, with matched control cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae.datasets._assemble import assemble, decoder_arrays, tables
from pertvae.datasets._counts import CountModel
from pertvae.datasets._generator import Decoder, Design, check_range, check_sizes, gene_names, make_design, stream
from pertvae.datasets._oracle import Expected, count_oracle, value_oracle
from pertvae.datasets._scm import CausalModel, match_controls
from pertvae.datasets._truth import Truth, write_truth

_DRAWS = 4096  # control cells that the decoder is centred and scaled over
_SIZES = ("n_genes", "n_perturbations", "n_doubles", "cells_per_perturbation", "cells_per_double", "n_controls")
_LATENTS = ("n_latent_responsive", "n_latent_invariant")
_COUNT_LAWS = ("baseline_sd", "theta", "theta_sd", "n_batches", "batch_sd", "library_size", "library_sd")
_PROBABILITIES = ("edge_probability", "background_probability", "target_probability")
_CAUSAL_LAWS = (*_PROBABILITIES, "weight_range", "mean_range", "noise_range")


def causal(
    *,
    n_genes: int = 500,
    n_perturbations: int = 12,
    n_doubles: int = 66,
    cells_per_perturbation: int = 125,
    cells_per_double: int = 100,
    n_controls: int = 1500,
    n_latent_responsive: int = 4,
    n_latent_invariant: int = 7,
    edge_probability: float = 0.75,
    background_probability: float = 0.5,
    target_probability: float = 0.5,
    weight_range: tuple[float, float] = (0.2, 1.0),
    mean_range: tuple[float, float] = (-2.0, 2.0),
    noise_range: tuple[float, float] = (0.5, 1.5),
    observation_sd: float = 0.1,
    counts: bool = False,
    decoder_sd: float = 0.6,
    baseline_sd: float = 1.2,
    library_size: float = 3000.0,
    library_sd: float = 0.35,
    theta: float = 2.0,
    theta_sd: float = 0.7,
    n_batches: int = 2,
    batch_sd: float = 0.1,
    n_oracle: int = 2000,
    seed: int = 0,
) -> ad.AnnData:
    """Simulate perturbations that change the mechanisms of a linear Gaussian causal model.

    After the theory of PerturbedVAE (arXiv 2605.19343), whose own generator is not described in detail: see
    :class:`pertvae.datasets._scm.CausalModel` for the latents. z_i is background, z_n responds to the perturbation
    and to the background; the first perturbations cut off all parents of one responsive variable each; doubles are
    additive in the mechanism, hence not in the latents. Every perturbed cell shares its background with one control
    cell, as the theory asks. Real values are decoder(z_i, z_n) + N(0, ``observation_sd``): orthogonal weights to 64,
    leaky-ReLU(0.2), orthogonal weights to the genes (one-to-one with at least 64 genes), each gene centred and scaled
    to a standard deviation of 1 over control cells. Dense; register with ``is_count_data=False`` and
    ``gene_likelihood="normal"``.

    Parameters
    ----------
    n_genes, n_perturbations, n_doubles, cells_per_perturbation, cells_per_double, n_controls
        Sizes: 3,000 cells of controls and singles, one control cell for every cell of a single perturbation, and all
        66 pairs as doubles to predict.
    n_latent_responsive, n_latent_invariant
        Variables in z_n and z_i.
    edge_probability, background_probability
        Probability of every edge that the order of the variables allows, within z_n, and within z_i and from z_i to
        z_n. A responsive variable without a parent in z_i gets one.
    target_probability
        Probability that a perturbation changes the mechanism of a responsive variable (at least of one, and of the one
        that it cuts): weights, mean and noise are drawn anew. 1 changes all mechanisms in every perturbation.
    weight_range
        abs(weight) is uniform in this range, with a random sign.
    mean_range
        Means mu of the responsive variables, uniform.
    noise_range
        Standard deviations of their noise, uniform; those of z_i are 1. Changes of the logarithm add in doubles, so
        the range is narrow: with 0.1 to 2 a double could reach 40.
    observation_sd
        Standard deviation of the noise of real values.
    counts
        ``True`` gives counts as the other screens have them (two layers of 64, scaled to ``decoder_sd`` over control
        cells, softmax, negative binomial, batches) instead of real values.
    decoder_sd, baseline_sd, library_size, library_sd, theta, theta_sd, n_batches, batch_sd
        As for ``sparse_additive``; without meaning for real values.
    n_oracle
        Draws behind each expected shift (real values: difference of means; counts: log1p CP10k).
    seed
        Of all random numbers.

    Returns
    -------
    AnnData
        ``obsm["X_truth_basal"]`` is z_i and ``obsm["X_truth_latent"]`` z_i and z_n side by side.
        ``obs["truth_pair"]`` names the control cell with the same z_i (a control cell: itself). ``mask`` says whose
        mechanism a perturbation changes, ``effects`` by how much its mu does. The truth has ``tables`` ``graph`` (L_nn
        of controls, parent in row), ``invariant_graph`` (L_ii), ``edges`` (conditions x weights of all edges into z_n,
        such as ``I2>N1``), ``means`` and ``noise_sd`` (conditions x z_n), ``total_effects`` (shift of E[z_n],
        conditions x z_n) and ``cut`` (perturbations x z_n).

    Raises
    ------
    ValueError
        If there are no controls to match, or a size or range makes no screen.
    """
    settings: dict[str, Any] = dict(locals())
    _check(settings)
    design = make_design(
        stream(seed, "design"),
        n_perturbations,
        n_doubles,
        cells=cells_per_perturbation,
        cells_double=cells_per_double,
        n_controls=n_controls,
    )
    model = CausalModel.create(
        stream(seed, "mechanisms"),
        design.matrix,
        n_latent_invariant,
        n_latent_responsive,
        **{name: settings[name] for name in _CAUSAL_LAWS},
    )
    cells = model.draw(stream(seed, "cells"), len(design.codes))
    pair = match_controls(stream(seed, "pairs"), design.codes)
    cells[:, :n_latent_invariant] = cells[pair, :n_latent_invariant]
    latent = model.latents(cells, design.codes)

    measured = (_measure_counts if counts else _measure_values)(settings, model, design, latent)
    adata = assemble(
        measured.x,
        design,
        batch=measured.batch,
        basal=latent[:, :n_latent_invariant],
        latent=latent,
        columns=measured.columns,
    )
    controls = np.flatnonzero(design.codes == 0)
    adata.obs["truth_pair"] = pd.Categorical.from_codes(
        np.searchsorted(controls, pair), categories=adata.obs_names[controls]
    )
    effects = np.where(model.targets, model.means[1 : 1 + n_perturbations] - model.means[0], 0.0)
    mask_table, effect_table, shifts = tables(design, model.targets, effects, measured.expected.shifts, adata.var_names)
    named = model.tables(design.labels, design.perturbations)
    responsive = named["graph"].columns
    truth = Truth(
        "causal",
        mask_table.set_axis(responsive, axis=1),
        effect_table.set_axis(responsive, axis=1),
        shifts,
        control_profile=pd.Series(measured.expected.control, index=adata.var_names),
        genes=measured.genes.set_axis(adata.var_names),
        decoder=decoder_arrays(measured.decoder),
        settings={k: np.asarray(v) if isinstance(v, (tuple, list)) else v for k, v in settings.items()},
        shift_space="log1p_cp10k" if counts else "identity",
        tables=named,
    )
    write_truth(adata, truth)
    return adata


@dataclass(frozen=True)
class _Measured:
    """Cells as measured, what is expected of them, and what belongs to genes."""

    x: Any
    decoder: Decoder
    expected: Expected
    genes: pd.DataFrame
    batch: np.ndarray | None
    columns: dict[str, Any]


def _measure_values(settings: dict[str, Any], model: CausalModel, design: Design, latent: np.ndarray) -> _Measured:
    """Return real values of cells with these latents."""
    seed, noise_sd = settings["seed"], settings["observation_sd"]
    decoder = _decoder(settings, model, (64,), 1.0)
    x = decoder(latent)
    x += stream(seed, "measurement").normal(0.0, noise_sd, x.shape)
    expected = value_oracle(
        lambda z, _: decoder(z), model, len(design.conditions), stream(seed, "oracle"), settings["n_oracle"]
    )
    genes = pd.DataFrame({"noise_sd": np.full(x.shape[1], float(noise_sd))})
    return _Measured(x.astype(np.float32), decoder, expected, genes, None, {})


def _measure_counts(settings: dict[str, Any], model: CausalModel, design: Design, latent: np.ndarray) -> _Measured:
    """Return counts of cells with these latents."""
    seed = settings["seed"]
    decoder = _decoder(settings, model, (64, 64), settings["decoder_sd"])
    laws = {name: settings[name] for name in _COUNT_LAWS}
    measure = CountModel.create(stream(seed, "genes"), decoder, **laws)
    rng = stream(seed, "measurement")
    library, batch = measure.draw_library(rng, len(latent)), rng.integers(settings["n_batches"], size=len(latent))
    x = measure.sample(stream(seed, "counts"), latent, library, batch)
    expected = count_oracle(measure, model, len(design.conditions), stream(seed, "oracle"), settings["n_oracle"])
    genes = measure.gene_table(gene_names(settings["n_genes"]))
    return _Measured(x, decoder, expected, genes, batch, {"truth_library": library})


def _decoder(settings: dict[str, Any], model: CausalModel, hidden: tuple[int, ...], sd: float) -> Decoder:
    """Return a decoder whose outputs are centred and scaled over control cells."""
    rng = stream(settings["seed"], "decoder")
    cells = model.latent(model.draw(rng, _DRAWS), 0)
    decoder = Decoder.create(rng, cells.shape[1], hidden, settings["n_genes"])
    decoder.standardise(cells, sd, center=True)
    return decoder


def _check(settings: dict[str, Any]) -> None:
    """Raise when a setting makes no screen."""
    check_sizes(**{name: settings[name] for name in (*_SIZES, *_LATENTS, "n_batches", "n_oracle")})
    if settings["n_controls"] == 0:
        raise ValueError("n_controls=0: every perturbed cell of this screen shares its background with a control cell.")
    check_range(0, 1, **{name: settings[name] for name in _PROBABILITIES})
    check_range(0, np.inf, observation_sd=settings["observation_sd"])
    least = {"weight_range": 0.0, "mean_range": -np.inf, "noise_range": np.finfo(float).tiny}
    for name, low in least.items():
        value = np.asarray(settings[name], dtype=float)
        if value.shape != (2,) or not low <= value[0] <= value[1] < np.inf:
            above = " above 0" if low > 0 else " of at least 0" if low == 0 else ""
            raise ValueError(f"{name}={settings[name]!r} must be two rising numbers{above}.")
