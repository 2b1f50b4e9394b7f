"""The public face of simulation: one call for every kind of screen, and a small example."""

from __future__ import annotations

import inspect
from typing import Any

import anndata as ad

from pertvae._labels import hint
from pertvae.datasets._kinds import KINDS


def simulate_screen(kind: str = "sparse_additive", *, seed: int = 0, **settings: Any) -> ad.AnnData:
    """Simulate a perturbation screen whose truth is known.

    Parameters
    ----------
    kind
        What to simulate:

        ``"sparse_additive"``
            Each perturbation moves a few latents, doubles add up; negative binomial counts in two batches. Defaults
            are the sizes of the fixed benchmark screen: 1,000 genes, 100 singles of 150 cells, 62 doubles of 100,
            2,000 controls, 20 latents (23,200 cells, about 20 s). Keyword arguments: ``n_genes``, ``n_perturbations``,
            ``n_doubles``, ``cells_per_perturbation``, ``cells_per_double``, ``n_controls``, ``n_latent``,
            ``n_batches``, ``mask_density``, ``effect_size``, ``effect_sd``, ``decoder_sd``, ``baseline_sd``,
            ``library_size``, ``library_sd``, ``theta``, ``theta_sd``, ``batch_sd``, ``n_oracle``.
        ``"interacting_structured"``
            As ``sparse_additive``, but the total offset o of each latent becomes s tanh(o / s): strong shared effects
            add up to less than their sum, and other doubles teach it (half of the doubles are meant for training).
            Keyword arguments: those of ``sparse_additive`` and ``saturation`` (s, 4). The truth has
            ``additive_shifts``.
        ``"interacting_random"``
            As ``sparse_additive``, but the log rate of random genes of every double deviates from additivity, and
            nothing else in the screen tells by how much: no gain over additive is to be expected. Keyword arguments:
            those of ``sparse_additive``, ``deviating_fraction`` (0.06 of the genes) and ``deviation_sd`` (0.5). The
            truth has ``interactions`` and ``additive_shifts``.
        ``"artifact"``
            As ``sparse_additive``, but 30% of the cells, whatever their perturbation, are artifacts: a module of 50
            genes is up threefold, and half of them have 0.4 times the depth. ``obs["artifact"]`` is the label; the
            oracle speaks of cells without the artifact; the truth has the column ``module`` in ``genes``. Keyword
            arguments: those of ``sparse_additive``, ``artifact_fraction``, ``module_size``, ``module_fold``,
            ``low_depth_fraction``, ``depth_factor``.
        ``"artifact_confounded"``
            As ``artifact``, but 80% of the cells of one single perturbation are artifacts. Keyword arguments: those of
            ``artifact``, ``confounded_fraction``, ``confounded_perturbation`` (``None``: the first).
        ``"codes"``
            Cells are in one of 12 discrete states; a perturbation changes how many are in a few of them, and half of
            the perturbations move latents too. ``obs["truth_state"]``. Keyword arguments: those of
            ``sparse_additive``, ``n_states``, ``state_sd``, ``within_sd``, ``weight_concentration``,
            ``states_moved``, ``weight_sd``, ``mean_fraction``. Tables of the truth: ``state_weights``,
            ``log_weights``, ``state_centers``.
        ``"causal"``
            Perturbations change the mechanisms of a causal graph of 4 latents, over 7 latents of background that they
            leave alone; doubles are additive in the mechanism. 500 genes of real values with little noise, 12 singles
            of 125 cells, 66 doubles of 100, 1,500 controls; each perturbed cell shares its background with the
            control cell in ``obs["truth_pair"]``. Keyword arguments: ``n_genes``, ``n_perturbations``, ``n_doubles``,
            ``cells_per_perturbation``, ``cells_per_double``, ``n_controls``, ``n_latent_responsive``,
            ``n_latent_invariant``, ``edge_probability``, ``background_probability``, ``target_probability``,
            ``weight_range``, ``mean_range``, ``noise_range``, ``observation_sd``, ``counts`` (counts instead, as the
            other screens have them), ``decoder_sd``, ``baseline_sd``, ``library_size``, ``library_sd``, ``theta``,
            ``theta_sd``, ``n_batches``, ``batch_sd``, ``n_oracle``. Tables of the truth: ``graph``,
            ``invariant_graph``, ``edges``, ``means``, ``noise_sd``, ``total_effects``, ``cut``.
        ``"samsvae_authors"``
            The simulation of the authors of SAMS-VAE (arXiv 2311.02794): 15 latents, 100 perturbations, 100 genes of
            real values with Gaussian noise, 500, 100 and 100 cells a perturbation in ``obs["split"]``. Keyword
            arguments: ``n_genes``, ``n_perturbations``, ``n_latent``, ``cells_per_split``, ``n_controls`` (500; the
            authors have no control cells, a registration here needs them), ``mask_density``, ``effect_size``,
            ``effect_sd``, ``hidden``, ``noise_fraction``, ``counts`` (Poisson counts instead), ``n_oracle``.
    seed
        Of all random numbers; the same seed and settings give the same screen. The global random state is untouched.
    **settings
        Keyword arguments of the kind.

    Returns
    -------
    AnnData
        ``X``: counts (CSR float32), or real values (dense) for ``samsvae_authors`` and ``causal``.
        ``obs["perturbation"]``: ``control``, ``P001``, ``P001+P017``. ``obs["batch"]``. ``obsm["X_truth_basal"]`` and
        ``obsm["X_truth_latent"]``: latents without and with the perturbation (``causal``: the background, and all).
        ``uns["truth"]``: masks, effects, the oracle (expected log1p CP10k shift of every condition, from counts
        sampled for many basal draws; for real values the shift of their mean), gene parameters, decoder, settings; it
        survives ``write_h5ad``, read it with :func:`pertvae.datasets.read_truth`. At the same seed and sizes the
        kinds that take the keyword arguments of ``sparse_additive`` share design, effects, decoder and genes.

    Raises
    ------
    ValueError
        If the kind is unknown or a setting makes no screen.
    TypeError
        If the kind has no such setting.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.simulate_screen(n_genes=200, n_perturbations=10, n_doubles=3, n_controls=200)
    >>> truth = pv.datasets.read_truth(adata)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a kind of screen. Kinds: {sorted(KINDS)}.{hint(kind, KINDS)}")
    accepted = [p for p in inspect.signature(KINDS[kind]).parameters if p != "seed"]
    for name in settings:
        if name not in accepted:
            raise TypeError(f"kind={kind!r} has no setting {name!r}. Settings: {accepted}.{hint(name, accepted)}")
    return KINDS[kind](seed=seed, **settings)


def example(*, seed: int = 0) -> ad.AnnData:
    """Return the small simulated screen of the tutorials.

    1,500 cells, 200 genes, 12 single perturbations (70 cells each), 6 doubles (60 cells each), 300 controls, two
    batches. Simulated, offline, under a second.

    Parameters
    ----------
    seed
        Of the simulation; the tutorials use the default.

    Returns
    -------
    AnnData
        A ``sparse_additive`` screen, see :func:`pertvae.datasets.simulate_screen`: counts in ``X``,
        ``obs["perturbation"]`` (control: ``"control"``), ``obs["batch"]``, the truth in ``uns["truth"]``.

    Raises
    ------
    ValueError
        If the seed is negative.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    """
    return simulate_screen(
        "sparse_additive",
        n_genes=200,
        n_perturbations=12,
        n_doubles=6,
        cells_per_perturbation=70,
        cells_per_double=60,
        n_controls=300,
        n_latent=8,
        n_oracle=200,
        seed=seed,
    )
