"""Training, validation and test cells: from a column of ``adata.obs`` or held out by condition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scvi import settings
from scvi.data import AnnDataManager
from scvi.dataloaders import DataSplitter

from pertvae._constants import CONDITION_OBS_KEY, PERTURBATION_REGISTRY_KEY, SPLIT_ALIASES
from pertvae._labels import require_column

VALIDATION_FRACTION = 0.1


def split_labels(column: pd.Series) -> np.ndarray:
    """Return ``train``, ``valid`` or ``test`` for every cell of a split column.

    Parameters
    ----------
    column
        Values ``train``, ``valid``, ``test`` or the aliases ``val``, ``validation``, ``ood``.

    Raises
    ------
    ValueError
        If a value is missing or is none of these, or no cell is ``train``.
    """
    if column.isna().any():
        first = str(column.index[column.isna()][0])
        raise ValueError(f"obs[{column.name!r}] is missing for {int(column.isna().sum())} cells, first {first!r}.")
    text = column.astype(str)
    unknown = sorted(set(text.unique()) - set(SPLIT_ALIASES))
    if unknown:
        raise ValueError(
            f"obs[{column.name!r}] has the value {unknown[0]!r}. Accepted: "
            + ", ".join(repr(v) for v in SPLIT_ALIASES)
            + "."
        )
    result = text.map(SPLIT_ALIASES).to_numpy(dtype=str)
    if not (result == "train").any():
        raise ValueError(f"obs[{column.name!r}] has no 'train' cell; its values: {sorted(set(text))}.")
    return result


def hold_out(
    cells: np.ndarray, condition: np.ndarray, fraction: float = VALIDATION_FRACTION, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split cells in two, the same fraction of every condition.

    Parameters
    ----------
    cells
        Row indices.
    condition
        Condition code of each of these cells.
    fraction
        Fraction to hold out; a condition with fewer than ``1 / fraction`` cells keeps all of them.
    seed
        Of the random choice.

    Returns
    -------
    Kept and held-out row indices, each sorted.
    """
    shuffled = np.random.default_rng(seed).permutation(len(cells))
    order = shuffled[np.argsort(condition[shuffled], kind="stable")]
    _, start, size = np.unique(condition[order], return_index=True, return_counts=True)
    rank = np.arange(len(cells)) - np.repeat(start, size)
    held = rank < np.repeat(np.floor(size * fraction), size)
    return np.sort(cells[order[~held]]), np.sort(cells[order[held]])


class PerturbationDataSplitter(DataSplitter):
    """scvi-tools' splitter with a split column and validation cells stratified by condition.

    Parameters
    ----------
    adata_manager
        Manager of the registered data.
    split_key
        Column of ``obs`` with ``train``, ``valid`` and ``test`` cells. Without ``valid`` cells 10% of the training
        cells of each condition are held out, seeded by ``scvi.settings.seed``.
    train_size, validation_size, shuffle_set_split
        As in scvi-tools; they go without ``split_key``. When none is given all cells are treated as a column of
        ``train``.
    external_indexing
        As in scvi-tools; excludes ``split_key``.
    **kwargs
        Passed to :class:`scvi.dataloaders.DataSplitter`.

    Raises
    ------
    KeyError
        If ``split_key`` is not a column.
    ValueError
        If ``split_key`` comes with a size or indices, or its values are not accepted.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        split_key: str | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        external_indexing: list[np.ndarray] | None = None,
        **kwargs: Any,
    ) -> None:
        sizes_given = train_size is not None or validation_size is not None or not shuffle_set_split
        if split_key is not None and (sizes_given or external_indexing is not None):
            raise ValueError(
                f"split_key={split_key!r} already says which cells train: leave out train_size, validation_size, "
                "shuffle_set_split and external_indexing."
            )
        if external_indexing is None and not sizes_given:
            external_indexing = _indices(adata_manager, split_key)
        super().__init__(
            adata_manager,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            external_indexing=external_indexing,
            **kwargs,
        )


def _indices(manager: AnnDataManager, split_key: str | None) -> list[np.ndarray]:
    location = manager.data_registry[PERTURBATION_REGISTRY_KEY]
    adata = manager.adata if location.get("mod_key") is None else manager.adata.mod[location["mod_key"]]
    if split_key is None:
        split = np.full(adata.n_obs, "train")
    else:
        obs = adata.obs if split_key in adata.obs.columns else manager.adata.obs
        require_column(obs, split_key, "adata.obs", "split_key")
        split = split_labels(obs[split_key])
    train, valid, test = (np.flatnonzero(split == name) for name in ("train", "valid", "test"))
    if not len(valid):
        seed = 0 if settings.seed is None else settings.seed
        condition = np.asarray(adata.obs[CONDITION_OBS_KEY].cat.codes)
        train, valid = hold_out(train, condition[train], seed=seed)
    return [train, valid, test]
