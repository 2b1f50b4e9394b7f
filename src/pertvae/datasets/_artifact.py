"""Screens some of whose cells are spoilt: a gene module is up, and for half of them the depth is low."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np

from pertvae._labels import hint
from pertvae.datasets._count_screens import CountParts, CountSettings, count_kind, count_screen
from pertvae.datasets._generator import check_positive, check_range, stream
from pertvae.datasets._oracle import Moved, count_oracle


@count_kind
def artifact(
    common: CountSettings,
    *,
    artifact_fraction: float = 0.3,
    module_size: int = 50,
    module_fold: float = 3.0,
    low_depth_fraction: float = 0.5,
    depth_factor: float = 0.4,
) -> ad.AnnData:
    """Simulate artifact cells that are as frequent under every perturbation.

    As ``sparse_additive``, but every cell is an artifact with the same probability: the log rates of the genes of a
    random module rise by log ``module_fold`` before the softmax, so that proportions add up to 1 again; some artifact
    cells have a lower depth too.

    Parameters
    ----------
    common
        See :class:`CountSettings`.
    artifact_fraction
        Probability that a cell is an artifact.
    module_size
        Genes of the module, drawn from all.
    module_fold
        Factor on the rates of the module in artifact cells, relative to the other genes.
    low_depth_fraction
        Probability that an artifact cell has a low depth.
    depth_factor
        Factor on its library.

    Returns
    -------
    AnnData
        ``obs["artifact"]`` (0 or 1) is the label a user would have, ``obs["truth_low_depth"]`` says whose depth is
        low, ``obs["truth_library"]`` is the library after that. The latents do not know of artifacts. The truth has
        the column ``module`` in ``genes``; its shifts and control profile are those of cells without the artifact.

    Raises
    ------
    ValueError
        If the module is larger than the genome, a fraction is not from 0 to 1, or a factor is not above 0.
    """
    own = {k: v for k, v in locals().items() if k != "common"}
    return _screen("artifact", common, own, None)


@count_kind
def artifact_confounded(
    common: CountSettings,
    *,
    artifact_fraction: float = 0.3,
    module_size: int = 50,
    module_fold: float = 3.0,
    low_depth_fraction: float = 0.5,
    depth_factor: float = 0.4,
    confounded_fraction: float = 0.8,
    confounded_perturbation: str | None = None,
) -> ad.AnnData:
    """Simulate artifact cells that are more frequent under one perturbation.

    As ``artifact`` at the same seed, but for the label of most cells of one single perturbation. Doubles with that
    component keep the common frequency.

    Parameters
    ----------
    common
        See :class:`CountSettings`.
    artifact_fraction, module_size, module_fold, low_depth_fraction, depth_factor
        As for ``artifact``.
    confounded_fraction
        Probability that a cell of the confounded perturbation is an artifact.
    confounded_perturbation
        Its name; ``None`` for the first. The truth's settings have the name.

    Returns
    -------
    AnnData
        As for ``artifact``.

    Raises
    ------
    ValueError
        As for ``artifact``, and if there is no such perturbation.
    """
    own = {k: v for k, v in locals().items() if k not in ("common", "confounded_fraction", "confounded_perturbation")}
    check_range(0, 1, confounded_fraction=confounded_fraction)
    return _screen("artifact_confounded", common, own, (confounded_perturbation, confounded_fraction))


def _screen(
    kind: str, common: CountSettings, own: dict[str, Any], confounded: tuple[str | None, float] | None
) -> ad.AnnData:
    """Return a screen with artifacts; ``confounded`` is a single perturbation and its fraction of artifacts."""
    _check(own, common.n_genes)
    parts = CountParts.create(common)
    design, offsets = parts.design, parts.offsets
    n_cells, rng = len(design.codes), stream(common.seed, "artifact")
    module = np.zeros(common.n_genes, dtype=bool)
    module[rng.choice(common.n_genes, size=own["module_size"], replace=False)] = True
    # one pair of uniforms a cell: kinds at the same seed differ in the cells of the confounded perturbation only
    level, depth = rng.random((2, n_cells))
    fraction = np.full(len(design.conditions), float(own["artifact_fraction"]))
    if confounded is not None:
        name = design.perturbations[0] if confounded[0] is None else confounded[0]
        if name not in design.perturbations:
            raise ValueError(
                f"confounded_perturbation={name!r} is not a perturbation of the screen."
                f"{hint(name, design.perturbations)}"
            )
        fraction[design.conditions.index((design.perturbations.index(name),))] = confounded[1]
        own = {**own, "confounded_fraction": confounded[1], "confounded_perturbation": name}
    spoilt = level < fraction[design.codes]
    low = spoilt & (depth < own["low_depth_fraction"])
    deviation = np.where(module, np.log(own["module_fold"]), 0.0)
    expected = count_oracle(parts.model, Moved(offsets), len(offsets), stream(common.seed, "oracle"), common.n_oracle)
    return count_screen(
        kind,
        parts,
        expected,
        latent=parts.basal + offsets[design.codes],
        own=own,
        library=np.where(low, own["depth_factor"], 1.0) * parts.library,
        deviations=(np.stack([np.zeros_like(deviation), deviation]), spoilt.astype(int)),
        columns={"artifact": spoilt.astype(np.int8), "truth_low_depth": low},
        genes={"module": module},
    )


def _check(own: dict[str, Any], n_genes: int) -> None:
    """Raise when a setting makes no artifact."""
    size = own["module_size"]
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or not 1 <= size <= n_genes:
        raise ValueError(f"module_size={size!r} must be a whole number from 1 to n_genes={n_genes}.")
    check_range(0, 1, **{k: own[k] for k in ("artifact_fraction", "low_depth_fraction")})
    check_positive(**{k: own[k] for k in ("module_fold", "depth_factor")})
