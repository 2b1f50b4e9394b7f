"""Names shared by every floor of the package: registry keys, AnnData keys, defaults."""

from __future__ import annotations

from typing import Final

PERTURBATION_REGISTRY_KEY: Final = "perturbation"
"""Key of the dose matrix in minibatches and in the AnnDataManager registry."""

PERTURBATION_OBSM_KEY: Final = "_scvi_perturbation"
"""``adata.obsm`` key of the CSR float32 dose matrix (cells x components)."""

CONDITION_OBS_KEY: Final = "_scvi_condition"
"""``adata.obs`` key of the categorical canonical label of each cell."""

UNS_PROVENANCE_KEY: Final = "pertvae"
"""``adata.uns`` key of the provenance of a predicted AnnData."""

NAMES_SUFFIX: Final = "_names"
"""Suffix of the table beside a stored table, which maps stored names to the caller's names."""

CP10K: Final = 1e4
"""Target sum of the normalisation log1p(1e4 x / sum x)."""

MIN_CELLS_PER_COMPONENT: Final = 5
"""Components with fewer cells than this are named in one warning at registration."""

DEFAULT_CONTROL: Final = "control"
"""Canonical name of the control when a design matrix is registered without a name for it."""

SPLIT_ALIASES: Final[dict[str, str]] = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "ood": "test",
}
"""Accepted values of a split column and what they mean."""
