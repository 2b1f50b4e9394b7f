"""Which cells a model may learn from: splits that hold out cells, combinations, perturbations or contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from anndata import AnnData

from pertvae.pp._schemes import Scheme, Splitter


def split_perturbations(
    adata: AnnData,
    scheme: Scheme = "random",
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    sep: str | None = "+",
    labels_key: str | None = None,
    test_fraction: float = 0.2,
    valid_fraction: float = 0.1,
    control_test_fraction: float = 0.2,
    held_out: str | Sequence[str] | None = None,
    seen: str | None = None,
    n_folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    key_added: str = "split",
    overwrite: bool = False,
) -> pd.DataFrame:
    """Divide cells into train, valid and test.

    Parameters
    ----------
    adata
        Screen with one label a cell. Only ``obs[key_added]`` is written.
    scheme
        ``"random"``: cells of every condition. ``"unseen_combination"``: all cells of some combinations.
        ``"unseen_perturbation"``: all cells of every condition that contains one of some components.
        ``"unseen_context"``: all perturbed cells of some values of ``labels_key``; their controls stay, because
        predictions for that context start from them.
    perturbation_key
        obs column of the labels.
    control
        Control label or labels.
    sep
        Separator between components; ``None`` when every label is one perturbation.
    labels_key
        obs column of the context (cell type, cell line). Needed by ``"unseen_context"``; the other schemes then
        also stratify by it.
    test_fraction
        Fraction held out of what the scheme holds out: cells of every condition, eligible combinations,
        components or contexts (at least one). Not used with ``held_out`` or ``n_folds``.
    valid_fraction
        Fraction of the cells left for training that become validation cells, stratified by condition and context.
    control_test_fraction
        Fraction of the control cells that become test cells, so that observed and predicted shifts can be measured
        against disjoint controls. 0 keeps all controls for training.
    held_out
        What to hold out instead of a random choice: combinations, components or values of ``labels_key``,
        depending on the scheme. Not for ``"random"``.
    seen
        For ``"unseen_combination"``: the class of the held-out combinations, ``"2/2"``, ``"1/2"``, ``"0/2"`` or
        any ``"j/k"``: how many of k components have training cells as singles. Singles that stand in the way leave
        training too (they become test cells); other combinations with the same component stay. ``None`` (default)
        takes every combination as it is.
    n_folds, fold
        Leave out fold ``fold`` (from 0) of ``n_folds`` instead of ``test_fraction``; folds are a seeded shuffle, so
        everything eligible is held out once over all folds. See :func:`perturbation_folds`.
    seed
        Seed of every random choice. The global random state is not touched.
    key_added
        obs column to write.
    overwrite
        Replace an existing ``obs[key_added]``; without it an existing column is an error.

    Returns
    -------
    Summary, one row a condition (and context, when ``labels_key`` is given) and split that has cells:
    ``condition`` (canonical label), ``n_components``, ``seen`` (the class obtained, ``"2/2"``: components that have
    training cells as singles / components; empty for the control), ``split``, ``n_cells``, and ``target``: whether
    these are test cells of what the scheme set out to test (not controls, and not singles held out on the way).

    Written: ``obs[key_added]``, a categorical of ``train``, ``valid``, ``test``.

    Raises
    ------
    KeyError
        If a column is missing, or ``held_out`` names something that is not there.
    ValueError
        If an argument is out of range, nothing is eligible, a class can not be reached, or no control or perturbed
        cell would be left for training.

    Notes
    -----
    Every condition that stays in training keeps at least one training cell. Classes as in GEARS [1]_.

    .. [1] Roohani, Huang, Leskovec. Predicting transcriptional outcomes of novel multigene perturbations with GEARS.
       Nature Biotechnology, 2024.

    Examples
    --------
    >>> summary = pv.pp.split_perturbations(
    ...     adata, "unseen_combination", perturbation_key="perturbation", control="control", seen="2/2"
    ... )
    >>> summary[summary["target"]]
    """
    if key_added in adata.obs.columns and not overwrite:
        raise ValueError(f"obs[{key_added!r}] exists already. Pass overwrite=True to replace it, or another key_added.")
    splitter = Splitter(adata.obs, perturbation_key, control, sep, labels_key)
    split, summary = splitter.run(
        scheme,
        fractions=(test_fraction, valid_fraction, control_test_fraction),
        held_out=held_out,
        seen=seen,
        folds=None if n_folds is None else (fold, n_folds),
        seed=seed,
    )
    adata.obs[key_added] = split
    return summary


def perturbation_folds(
    adata: AnnData,
    scheme: Scheme = "random",
    *,
    n_folds: int = 5,
    perturbation_key: str,
    control: str | Sequence[str],
    sep: str | None = "+",
    labels_key: str | None = None,
    valid_fraction: float = 0.1,
    control_test_fraction: float = 0.2,
    seen: str | None = None,
    seed: int = 0,
) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """Leave out cells, combinations, perturbations or contexts in turn.

    Parameters
    ----------
    adata
        Screen with one label a cell. Nothing is written.
    scheme
        As in :func:`split_perturbations`.
    n_folds
        Number of folds; at most the number of things that the scheme holds out.
    perturbation_key, control, sep, labels_key, valid_fraction, control_test_fraction, seen, seed
        As in :func:`split_perturbations`.

    Yields
    ------
    The split of fold 0, 1, ... (categorical, index of ``adata.obs``) and its summary; the same as
    ``split_perturbations(..., n_folds=n_folds, fold=i)``.

    Raises
    ------
    KeyError, ValueError
        As in :func:`split_perturbations`.
    """
    splitter = Splitter(adata.obs, perturbation_key, control, sep, labels_key)
    for fold in range(n_folds):
        yield splitter.run(
            scheme,
            fractions=(0.2, valid_fraction, control_test_fraction),
            held_out=None,
            seen=seen,
            folds=(fold, n_folds),
            seed=seed,
        )
