"""The choice of conditions to hold out, on labels alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass
class HeldOut:
    """What a scheme holds out.

    Parameters
    ----------
    cells
        Mask of the held-out perturbed cells.
    targets
        Codes of the conditions that the scheme set out to test; empty when all held-out cells are.
    """

    cells: np.ndarray
    targets: list[int]


def pick(
    items: Sequence[T], fraction: float, folds: tuple[int, int] | None, rng: np.random.Generator, what: str
) -> list[T]:
    """Return a random ``fraction`` of the items, at least one, or fold i of n of a seeded shuffle."""
    if not items:
        raise ValueError(f"There are no {what} to hold out.")
    order = rng.permutation(len(items))
    if folds is None:
        return [items[i] for i in order[: max(1, round(fraction * len(items)))]]
    fold, n_folds = folds
    if n_folds > len(items):
        raise ValueError(f"n_folds={n_folds} is more than the {len(items)} {what}: pass at most {len(items)}.")
    return [items[i] for i in np.array_split(order, n_folds)[fold]]


def combinations_to_hold_out(
    components: Sequence[tuple[str, ...]],
    conditions: Sequence[str],
    asked: Sequence[str] | None,
    seen: str | None,
    fraction: float,
    folds: tuple[int, int] | None,
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Return the codes of the combinations to hold out and of the singles that must leave training with them.

    Parameters
    ----------
    components
        Components of each condition.
    conditions
        Canonical label of each condition.
    asked
        Canonical labels to hold out; ``None`` for a random choice among those eligible.
    seen
        Class wanted, ``"j/k"``, or ``None``.
    fraction, folds
        See :func:`pick`.
    rng
        Source of every random choice.
    """
    codes = {label: i for i, label in enumerate(conditions)}
    combinations = [i for i, parts in enumerate(components) if len(parts) > 1]
    if not combinations:
        raise ValueError(
            "scheme='unseen_combination' needs labels with two or more components, and there are none. Check sep, or "
            "use scheme='unseen_perturbation'."
        )
    if asked is not None:
        for label in asked:
            if len(components[codes[label]]) < 2:
                raise ValueError(
                    f"held_out={label!r} is not a combination. scheme='unseen_perturbation' holds out a component."
                )
    if seen is None:
        chosen = (
            pick(combinations, fraction, folds, rng, "combinations") if asked is None else [codes[a] for a in asked]
        )
        return sorted(set(chosen)), []
    n_seen, size = _parse_class(seen)
    single = {parts[0]: i for i, parts in enumerate(components) if len(parts) == 1}
    eligible = [i for i in combinations if len(components[i]) == size and _singles(components[i], single) >= n_seen]
    if not eligible:
        raise ValueError(
            f"No combination can have seen={seen!r}: none with {size} components has {n_seen} of them as single "
            f"conditions in the data. Combinations by components and singles present: {_census(components, single)}."
        )
    if asked is not None:
        wanted = [codes[a] for a in dict.fromkeys(asked)]
        reached, gone = _reach(wanted, components, single, n_seen, size, rng)
        lost = [conditions[i] for i in wanted if i not in reached]
        if lost:
            raise ValueError(
                f"These held_out combinations can not have seen={seen!r}, alone or together with the others: "
                f"{', '.join(map(repr, lost))}. Hold out fewer, or pass seen=None."
            )
    else:
        wanted = pick(eligible, fraction, folds, rng, f"combinations that can have seen={seen!r}")
        n_wanted = len(wanted)
        if folds is None:  # one that conflicts with those before it is replaced by the next eligible one
            wanted += [eligible[j] for j in rng.permutation(len(eligible)) if eligible[j] not in wanted]
            reached, gone = _reach(wanted, components, single, n_seen, size, rng, limit=n_wanted)
        else:
            reached, gone = _reach(wanted, components, single, n_seen, size, rng)
        if len(reached) < n_wanted:
            lost = [conditions[i] for i in wanted if i not in reached]
            warnings.warn(
                f"{len(reached)} combinations are held out instead of {n_wanted}: the others can not have "
                f"seen={seen!r} together with them and stay in training ({', '.join(map(repr, lost[:5]))}"
                f"{', ...' if len(lost) > 5 else ''}).",
                UserWarning,
                stacklevel=5,
            )
    return sorted(reached), sorted(single[c] for c in gone)


def _parse_class(seen: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", str(seen))
    if match is None or int(match[1]) > int(match[2]) or int(match[2]) < 2:
        raise ValueError(
            f"seen={seen!r} is not a class: pass '2/2', '1/2', '0/2' or another 'j/k' with j <= k, k >= 2."
        )
    return int(match[1]), int(match[2])


def _singles(parts: Sequence[str], single: dict[str, int]) -> int:
    return sum(p in single for p in parts)


def _census(components: Sequence[tuple[str, ...]], single: dict[str, int]) -> str:
    found = sorted((_singles(p, single), len(p)) for p in components if len(p) > 1)
    return ", ".join(f"{found.count(c)} with {c[0]}/{c[1]}" for c in dict.fromkeys(found))


def _reach(
    wanted: Sequence[int],
    components: Sequence[tuple[str, ...]],
    single: dict[str, int],
    n_seen: int,
    size: int,
    rng: np.random.Generator,
    limit: int | None = None,
) -> tuple[set[int], set[str]]:
    """Return the combinations whose class can be had together, and the components that lose their singles.

    Without ``limit`` each step takes the combination with the fewest singles still undecided. For pairs this finds a
    solution whenever there is one: "exactly one of two" is a colouring with two colours, forced once one component
    is decided. With ``limit`` combinations are tried in the order given until that many are reached.
    """
    keep: set[str] = set()
    gone: set[str] = set()
    reached: set[int] = set()
    left = list(wanted)
    while left and (limit is None or len(reached) < limit):
        undecided = [sum(p in single and p not in keep and p not in gone for p in components[i]) for i in left]
        i = left.pop(int(np.argmin(undecided)) if limit is None else 0)
        parts = components[i]
        free = [p for p in parts if p in single and p not in keep and p not in gone]
        free = [free[j] for j in rng.permutation(len(free))]
        missing = n_seen - sum(p in keep for p in parts)
        if len(parts) != size or not 0 <= missing <= len(free):
            continue
        keep.update(free[:missing])
        gone.update(free[missing:])
        reached.add(i)
    return reached, gone


def stratified(
    strata: np.ndarray,
    fraction: float,
    rng: np.random.Generator,
    never_all: np.ndarray,
    folds: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return a mask of a random ``fraction`` of cells (or of fold i of n), never all cells of a group.

    Cells are put in random order within their stratum, the strata one after another, and taken at equal steps: each
    stratum gives its share to within one cell, and the total is right even when every stratum is small.

    Parameters
    ----------
    strata
        Stratum of each cell.
    fraction, rng, folds
        See :func:`pick`.
    never_all
        Group of each cell: every group keeps at least one cell.
    """
    n = len(strata)
    order = rng.permutation(n)
    order = order[np.argsort(strata[order], kind="stable")]
    place = np.arange(n)
    if folds is None:
        start = rng.random()
        taken = np.floor((place + 1) * fraction + start) > np.floor(place * fraction + start)
    else:
        taken = place % folds[1] == folds[0]
    mask = np.zeros(n, dtype=bool)
    mask[order[taken]] = True
    groups, first, member = np.unique(never_all[order], return_index=True, return_inverse=True)
    emptied = np.bincount(member[~mask[order]], minlength=len(groups)) == 0
    mask[order[first[emptied]]] = False
    return mask
