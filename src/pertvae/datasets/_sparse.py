"""Screens of sparse effects on a continuous latent state: additive, saturating, and with random deviations."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from pertvae.datasets._count_screens import CountParts, CountSettings, count_kind, count_screen
from pertvae.datasets._generator import check_positive, check_range, gene_names, stream
from pertvae.datasets._oracle import Moved, count_oracle


@count_kind
def sparse_additive(common: CountSettings) -> ad.AnnData:
    """Simulate sparse additive effects on a latent basal state, with negative binomial counts.

    The screen ``sparse_additive`` with its fixed sizes as defaults. z = z_basal + sum of the effects of the
    components, z_basal ~ N(0, I); a decoder of two leaky-ReLU(0.2) layers of 64, no bias, orthogonal weights; its
    output per gene centred and scaled to ``decoder_sd`` over basal states (so that the decoder does not depend on the
    perturbations); baseline log rate N(0, ``baseline_sd``); softmax; negative binomial counts.

    Parameters
    ----------
    common
        See :class:`CountSettings`.

    Returns
    -------
    AnnData
        See :func:`pertvae.datasets.simulate_screen`. ``obs["truth_library"]`` is the true library size.
    """
    parts = CountParts.create(common)
    offsets = parts.offsets
    expected = count_oracle(parts.model, Moved(offsets), len(offsets), stream(common.seed, "oracle"), common.n_oracle)
    latent = parts.basal + offsets[parts.design.codes]
    return count_screen("sparse_additive", parts, expected, latent=latent, own={})


@count_kind
def interacting_structured(common: CountSettings, *, saturation: float = 4.0) -> ad.AnnData:
    """Simulate effects that saturate, so that strong shared effects add up to less than their sum.

    As ``sparse_additive``, but the total offset o of each latent, the sum over the components of a condition, becomes
    s tanh(o / s). An offset of one perturbation alone saturates too: 2.5 becomes 2.2 at s = 4. What is lost in a
    double depends on what its components do to the same latents, so other doubles teach it: half of the doubles are
    meant for training.

    Parameters
    ----------
    common
        See :class:`CountSettings`.
    saturation
        s, the largest possible offset of a latent. With 4, two effects of the default size make an offset of 3.4 on a
        shared latent, where those of the single perturbations, 2.2 each, sum to 4.4.

    Returns
    -------
    AnnData
        The truth has the effects e before saturation, the saturated oracle, and ``additive_shifts``: for every
        double, the oracle if the offsets of its two single perturbations (as they are, s tanh(e / s)) added up.

    Raises
    ------
    ValueError
        If the saturation is not above 0.
    """
    check_positive(saturation=saturation)
    parts = CountParts.create(common)
    design = parts.design
    offsets = saturation * np.tanh(parts.offsets / saturation)
    sums = design.matrix @ (saturation * np.tanh(parts.effects / saturation))
    expected = count_oracle(
        parts.model,
        Moved(offsets),
        len(offsets),
        stream(common.seed, "oracle"),
        common.n_oracle,
        additive=(Moved(sums), design.doubles),
    )
    return count_screen(
        "interacting_structured",
        parts,
        expected,
        latent=parts.basal + offsets[design.codes],
        own={"saturation": saturation},
        additive_shifts=_doubles_table(parts, expected.additive),
    )


@count_kind
def interacting_random(
    common: CountSettings, *, deviating_fraction: float = 0.06, deviation_sd: float = 0.5
) -> ad.AnnData:
    """Simulate doubles that deviate from additivity on random genes, by amounts that nothing else in the screen tells.

    As ``sparse_additive``, but every double has its own random genes whose log rate (before the softmax) deviates by
    N(0, ``deviation_sd``). Singles and other doubles say nothing about it: no gain over additive is expected of any
    model, and one that claims a gain is overfitting.

    Parameters
    ----------
    common
        See :class:`CountSettings`.
    deviating_fraction
        Fraction of the genes that deviate, in every double the same number (rounded).
    deviation_sd
        Standard deviation of the deviation of a log rate. For comparison: of the real doubles of Norman et al. 4.5% of
        the combinations of gene and pair deviate from additivity at a local false discovery rate of 5%.

    Returns
    -------
    AnnData
        The truth has ``interactions``, the deviation of every gene in every double (0 where there is none), the
        oracle with them and, for the doubles, ``additive_shifts`` without.

    Raises
    ------
    ValueError
        If the fraction is not from 0 to 1, or the standard deviation not above 0.
    """
    check_range(0, 1, deviating_fraction=deviating_fraction)
    check_positive(deviation_sd=deviation_sd)
    parts = CountParts.create(common)
    design, offsets, rng = parts.design, parts.offsets, stream(common.seed, "interactions")
    deviations = np.zeros((len(design.conditions), common.n_genes))
    n_deviating = round(deviating_fraction * common.n_genes)
    for row in design.doubles:
        genes = rng.choice(common.n_genes, size=n_deviating, replace=False)
        deviations[row, genes] = rng.normal(0.0, deviation_sd, n_deviating)
    expected = count_oracle(
        parts.model,
        Moved(offsets),
        len(offsets),
        stream(common.seed, "oracle"),
        common.n_oracle,
        deviations=deviations,
        additive=(Moved(offsets), design.doubles),
    )
    return count_screen(
        "interacting_random",
        parts,
        expected,
        latent=parts.basal + offsets[design.codes],
        own={"deviating_fraction": deviating_fraction, "deviation_sd": deviation_sd},
        deviations=(deviations, design.codes),
        interactions=_doubles_table(parts, deviations[design.doubles]),
        additive_shifts=_doubles_table(parts, expected.additive),
    )


def _doubles_table(parts: CountParts, values: np.ndarray) -> pd.DataFrame:
    """Return values of the doubles with names, doubles x genes."""
    labels = np.array(parts.design.labels, dtype=object)[parts.design.doubles]
    return pd.DataFrame(values, index=pd.Index(labels, dtype=object), columns=gene_names(parts.settings.n_genes))
