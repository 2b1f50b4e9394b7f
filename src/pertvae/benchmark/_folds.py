"""What each fold of a benchmark holds out, and what is asked of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pertvae._labels import LabelFormat, canonical_labels, hint
from pertvae.pp import perturbation_folds, split_perturbations

SPLIT_KEY = "_pertvae_benchmark_split"
COMBINATION = "unseen_combination"
DEFAULT_FOLDS = 4
DEFAULT_SEEN = "2/2"
MIN_CELLS = 5
_ALL = 1.0 - 1e-9
_OPTIONS = ("seen", "held_out", "test_fraction", "valid_fraction", "control_test_fraction", "seed")
CONTEXT_MARK = " | "


@dataclass(frozen=True)
class Unit:
    """One question to every method: a condition, in one context where contexts are registered.

    Parameters
    ----------
    label
        Canonical label of the condition.
    context
        Value of ``labels_key``; empty when there is none.
    seen
        Components that stand alone in training / components.
    """

    label: str
    context: str
    seen: str

    @property
    def name(self) -> str:
        """Label, with the context behind it where there is one."""
        return f"{self.label}{CONTEXT_MARK}{self.context}" if self.context else self.label


@dataclass
class Fold:
    """One division of the cells.

    Parameters
    ----------
    scheme
        Name of the scheme in results.
    index
        Number of the fold, from 0.
    split
        ``train``, ``valid`` or ``test`` for every cell.
    units
        What is predicted and scored.
    left_out
        Units with too few held-out cells to be scored.
    train_fraction
        Fraction of the training combinations that stand in training.
    common
        Mask of the cells that train at every fraction compared: what is scored is chosen by them alone, so that the
        scores of one fraction can be set beside those of another. ``None``: all training cells.
    """

    scheme: str
    index: int
    split: pd.Series
    units: list[Unit]
    left_out: list[str]
    train_fraction: float = 1.0
    common: np.ndarray | None = None

    @property
    def contexts(self) -> list[str]:
        """Contexts of the units in order; one empty text when there are none."""
        return list(dict.fromkeys(u.context for u in self.units))

    def rows(self, split: str) -> np.ndarray:
        """Return a mask of the cells of a split."""
        return (self.split == split).to_numpy()

    def common_rows(self) -> np.ndarray:
        """Return a mask of the training cells that choose what is scored."""
        return self.rows("train") if self.common is None else self.common


def schemes_of(
    scheme: str | Sequence[str], split_kwargs: Mapping[str, Any] | None
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the scheme and the options of the split behind each name that a result is to have.

    Several classes of combinations make several names, such as ``"unseen_combination 1/2"``; the class is for that
    scheme alone, where there are others.
    """
    schemes = [scheme] if isinstance(scheme, str) else list(dict.fromkeys(scheme))
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for one in schemes:
        options = dict(split_kwargs or {})
        if one != COMBINATION and COMBINATION in schemes:
            options.pop("seen", None)
        seen = options.get("seen")
        if one == COMBINATION and not isinstance(seen, str) and isinstance(seen, Sequence):
            found |= {f"{one} {value}": (one, {**options, "seen": value}) for value in dict.fromkeys(seen)}
        else:
            found[one] = one, options
    return found


def make_folds(
    adata: AnnData,
    scheme: str,
    *,
    name: str | None = None,
    perturbation_key: str,
    control: str | Sequence[str],
    sep: str | None = "+",
    labels_key: str | None = None,
    n_folds: int | None = None,
    train_fractions: Sequence[float] = (1.0,),
    split_kwargs: Mapping[str, Any] | None = None,
) -> list[Fold]:
    """Return the folds of a scheme, at every fraction of the training combinations.

    Combinations are left out in turn, by default those whose components all stand alone in the data (``"2/2"``), in
    at most four folds, with ``n_folds=1`` all at once. The other schemes have one fold by default. No cell is set
    aside for validation here: a model takes its own from the training cells, and references may use all of them.

    Parameters
    ----------
    adata
        Screen. Nothing is written.
    scheme, perturbation_key, control, sep, labels_key
        See :func:`pertvae.pp.split_perturbations`.
    name
        What the scheme is called in results; by default as it is.
    n_folds
        Number of folds. With ``held_out`` in ``split_kwargs`` its items are held out in turn, in that many parts.
    train_fractions
        Fractions f of the training combinations. They are put in a random order (``seed`` of the split) and the first
        int(f n) stay in training, so that smaller fractions lie within larger ones; the cells of the others are in no
        split. Test cells are the same for all fractions.
    split_kwargs
        Passed to :func:`pertvae.pp.split_perturbations`: ``seen``, ``held_out``, ``test_fraction``, ``seed``, ...
    """
    if n_folds is not None and n_folds < 1:
        raise ValueError(f"n_folds={n_folds!r} is out of range: pass 1 or more.")
    for option in split_kwargs or {}:
        if option not in _OPTIONS:
            raise ValueError(f"split_kwargs: {option!r} is not an option.{hint(option, _OPTIONS)}")
    options: dict[str, Any] = {"valid_fraction": 0.0, **(split_kwargs or {})}
    in_turn = _in_turn(options, n_folds)
    if scheme == COMBINATION:
        options.setdefault("seen", DEFAULT_SEEN)
        if n_folds is None and not options.keys() & {"held_out", "test_fraction"}:
            n_eligible = _count_eligible(adata.obs[perturbation_key], control, sep)
            n_folds = min(DEFAULT_FOLDS, n_eligible) if options["seen"] == DEFAULT_SEEN else 1
        if n_folds is not None and n_folds <= 1 and "held_out" not in options:
            options.setdefault("test_fraction", _ALL)
    shared: dict[str, Any] = {
        "perturbation_key": perturbation_key,
        "control": control,
        "sep": sep,
        "labels_key": labels_key,
        **options,
    }
    bare = AnnData(obs=adata.obs[[k for k in (perturbation_key, labels_key) if k is not None]].copy())
    if in_turn:
        splits = []
        for part in in_turn:
            given: dict[str, Any] = {**shared, "held_out": part, "key_added": SPLIT_KEY, "overwrite": True}
            summary = split_perturbations(bare, scheme, **given)  # type: ignore[arg-type]
            splits.append((bare.obs[SPLIT_KEY].copy(), summary))
    elif n_folds is not None and n_folds > 1:
        shared.pop("test_fraction", None)
        splits = list(perturbation_folds(bare, scheme, n_folds=n_folds, **shared))  # type: ignore[arg-type]
    else:
        summary = split_perturbations(bare, scheme, key_added=SPLIT_KEY, **shared)  # type: ignore[arg-type]
        splits = [(bare.obs[SPLIT_KEY], summary)]
    folds = []
    conditions = canonical_labels(adata.obs[perturbation_key], control, sep)
    for i, (split, summary) in enumerate(splits):
        units, left_out = _units(summary)
        units, left_out = _with_controls(units, left_out, summary)
        if not units:
            raise ValueError(
                f"scheme={scheme!r}, fold {i}: no held-out condition has {MIN_CELLS} cells or more, so nothing can be "
                "scored. Hold out more cells (test_fraction), or conditions with more cells."
            )
        ordered: list[str] = []
        if min(train_fractions) < 1:
            ordered = _training_combinations(split, conditions, sep, [int(options.get("seed", 0)), i])
        if min(train_fractions) < 1 and not ordered:
            raise ValueError(
                f"train_fraction={min(train_fractions)!r} is the fraction of the training combinations, and "
                f"scheme={scheme!r}, fold {i}, leaves no combination for training. Hold out fewer: pass n_folds of 2 "
                "or more, or split_kwargs={'test_fraction': 0.25}."
            )
        kept = {f: _without(split, conditions, ordered[_n_kept(f, len(ordered)) :]) for f in train_fractions}
        common = (kept[min(train_fractions)] == "train").to_numpy()
        folds += [Fold(name or scheme, i, kept[f], units, left_out, f, common) for f in train_fractions]
    return folds


def _in_turn(options: Mapping[str, Any], n_folds: int | None) -> list[list[str]]:
    """Return what each fold holds out, where that is given and there are several folds; otherwise nothing."""
    given = options.get("held_out")
    if given is None or n_folds is None or n_folds < 2:
        return []
    items = list(dict.fromkeys([given] if isinstance(given, str) else [str(v) for v in given]))
    if n_folds > len(items):
        raise ValueError(f"n_folds={n_folds} is more than what held_out names: {', '.join(map(repr, items))}.")
    return [list(part) for part in np.array_split(np.array(items, dtype=object), n_folds)]


def _count_eligible(labels: pd.Series, control: str | Sequence[str], sep: str | None) -> int:
    fmt = LabelFormat.create(control, sep)
    sets = {fmt.components(label) for label in labels.astype(str).unique()}
    singles = {parts[0] for parts in sets if len(parts) == 1}
    return sum(len(parts) == 2 and singles.issuperset(parts) for parts in sets)


def _units(summary: pd.DataFrame) -> tuple[list[Unit], list[str]]:
    rows = summary[summary["target"] & (summary["split"] == "test")]
    contexts = rows["context"] if "context" in rows else pd.Series("", index=rows.index)
    units, left_out = [], []
    for label, context, seen, n in zip(rows["condition"], contexts, rows["seen"], rows["n_cells"], strict=True):
        unit = Unit(str(label), str(context), str(seen))
        if n >= MIN_CELLS:
            units.append(unit)
        else:
            left_out.append(unit.name)
    return units, left_out


def _with_controls(units: list[Unit], left_out: list[str], summary: pd.DataFrame) -> tuple[list[Unit], list[str]]:
    """Leave out units of contexts without training controls: there is nothing to predict them from."""
    if "context" not in summary:
        return units, left_out
    controls = summary[(summary["n_components"] == 0) & (summary["split"] == "train")]
    have = set(controls["context"].astype(str))
    without = [f"{u.name} (no training controls)" for u in units if u.context not in have]
    return [u for u in units if u.context in have], [*left_out, *without]


def _training_combinations(split: pd.Series, conditions: pd.Series, sep: str | None, seed: Sequence[int]) -> list[str]:
    """Return the combinations that have training cells, in a random order that depends on their names and the seed."""
    training = conditions[(split == "train").to_numpy()].astype(str).unique()
    combinations = sorted(label for label in training if sep is not None and sep in label)
    return [combinations[j] for j in np.random.default_rng(seed).permutation(len(combinations))]


def _n_kept(fraction: float, n: int) -> int:
    return int(fraction * n + 1e-9)  # 0.29 * 100 is 28.999... in floating point


def _without(split: pd.Series, conditions: pd.Series, dropped: Sequence[str]) -> pd.Series:
    """Return the split with the training and validation cells of some conditions missing; test cells stay."""
    if not dropped:
        return split
    gone = conditions.astype(str).isin(dropped).to_numpy() & (split != "test").to_numpy()
    return split.astype(object).where(~gone, np.nan)
