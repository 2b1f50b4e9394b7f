"""The schemes of a split: which cells are test cells, on labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from pertvae._labels import LabelFormat, canonical_labels, check_labels, hint, require_column
from pertvae.pp._hold_out import HeldOut, combinations_to_hold_out, pick, stratified

Scheme = Literal["random", "unseen_combination", "unseen_perturbation", "unseen_context"]
SPLITS = ["train", "valid", "test"]


class Splitter:
    """The labels of a screen, parsed once, and the schemes on them."""

    def __init__(
        self,
        obs: pd.DataFrame,
        perturbation_key: str,
        control: str | Sequence[str],
        sep: str | None,
        labels_key: str | None,
    ) -> None:
        require_column(obs, perturbation_key, "adata.obs", "perturbation_key")
        self.key, self.labels_key = perturbation_key, labels_key
        self.fmt = LabelFormat.create(control, sep)
        self.index = obs.index
        labels = canonical_labels(obs[perturbation_key], control, sep).cat.remove_unused_categories().cat
        self.conditions = [str(c) for c in labels.categories]
        self.codes = labels.codes.to_numpy().astype(np.int64)
        self.components = [self.fmt.components(c) for c in self.conditions]
        self.control = np.array([not c for c in self.components])[self.codes]
        if not self.control.any():
            common = ", ".join(repr(str(c)) for c in obs[perturbation_key].value_counts().index[:5])
            raise ValueError(
                f"No cell of obs[{perturbation_key!r}] is a control ({' or '.join(map(repr, self.fmt.control))}). "
                f"Commonest labels: {common}."
            )
        if self.control.all():
            raise ValueError(f"Every cell of obs[{perturbation_key!r}] is a control: there is nothing to hold out.")
        if labels_key is None:
            self.contexts, self.context_codes = pd.Index([""]), np.zeros(len(obs), dtype=np.int64)
        else:
            require_column(obs, labels_key, "adata.obs", "labels_key")
            contexts = check_labels(obs[labels_key], labels_key).remove_unused_categories()
            self.contexts, self.context_codes = contexts.categories, np.asarray(contexts.codes, dtype=np.int64)
        self.strata = self.codes * len(self.contexts) + self.context_codes

    def run(
        self,
        scheme: str,
        *,
        fractions: tuple[float, float, float],
        held_out: str | Sequence[str] | None,
        seen: str | None,
        folds: tuple[int, int] | None,
        seed: int,
    ) -> tuple[pd.Series, pd.DataFrame]:
        """Return the split of every cell and the summary."""
        test_fraction = fractions[0]
        self._check(scheme, fractions, held_out, seen, folds)
        # One stream for each decision: a change of valid_fraction must not change what is held out.
        choice, cells, controls, valid = np.random.default_rng(seed).spawn(4)
        if scheme == "random":
            held = HeldOut(np.zeros(len(self.codes), dtype=bool), [])
            test = stratified(self.strata, test_fraction, cells, self.codes, folds) & ~self.control
            target = test.copy()
        else:
            held = getattr(self, f"_{scheme}")(held_out, test_fraction, seen, folds, choice)
            test = held.cells
            target = test & np.isin(self.codes, held.targets) if held.targets else test.copy()
        training = ~test & ~self.control
        if not training.any():
            raise ValueError(
                f"scheme={scheme!r} leaves no perturbed cell for training: it holds out every perturbed condition. "
                "Hold out less (a smaller test_fraction, more n_folds, or a shorter held_out)."
            )
        at_control = np.flatnonzero(self.control)
        test[
            at_control[
                stratified(self.context_codes[at_control], fractions[2], controls, self.context_codes[at_control])
            ]
        ] = True
        rest = np.flatnonzero(~test)
        codes = np.where(test, 2, 0)
        codes[rest[stratified(self.strata[rest], fractions[1], valid, self.codes[rest])]] = 1
        split = pd.Series(pd.Categorical.from_codes(codes, categories=pd.Index(SPLITS)), index=self.index)
        return split, self._summary(codes, target)

    def _check(
        self,
        scheme: str,
        fractions: tuple[float, float, float],
        held_out: str | Sequence[str] | None,
        seen: str | None,
        folds: tuple[int, int] | None,
    ) -> None:
        if scheme not in get_args(Scheme):
            raise ValueError(f"scheme={scheme!r} is not known.{hint(scheme, get_args(Scheme))}")
        for name, value in zip(("test_fraction", "valid_fraction", "control_test_fraction"), fractions, strict=True):
            lowest = " and above 0" if name == "test_fraction" else ", or 0"
            if not 0 <= value < 1 or (name == "test_fraction" and value == 0):
                raise ValueError(f"{name}={value!r} is out of range: pass a number below 1{lowest}.")
        if scheme == "random" and held_out is not None:
            raise ValueError("held_out has no meaning with scheme='random', which holds out cells of every condition.")
        if seen is not None and scheme != "unseen_combination":
            raise ValueError(f"seen={seen!r} belongs to scheme='unseen_combination', not to {scheme!r}.")
        if scheme == "unseen_context" and self.labels_key is None:
            raise ValueError("scheme='unseen_context' needs labels_key, the obs column of the cell type or context.")
        if folds is not None:
            fold, n_folds = folds
            if held_out is not None:
                raise ValueError("Pass held_out or n_folds, not both: folds choose what is held out.")
            if n_folds < 2 or not 0 <= fold < n_folds:
                raise ValueError(
                    f"fold={fold!r} of n_folds={n_folds!r}: pass n_folds of 2 or more and 0 <= fold < n_folds."
                )

    def _unseen_combination(
        self,
        held_out: str | Sequence[str] | None,
        fraction: float,
        seen: str | None,
        folds: tuple[int, int] | None,
        rng: np.random.Generator,
    ) -> HeldOut:
        asked = None
        if held_out is not None:
            asked = [self.fmt.canonical(h) for h in _as_list(held_out)]
            self._require(asked, self.conditions, f"a condition of obs[{self.key!r}]")
        chosen, singles = combinations_to_hold_out(self.components, self.conditions, asked, seen, fraction, folds, rng)
        return HeldOut(np.isin(self.codes, [*chosen, *singles]), chosen)

    def _unseen_perturbation(
        self,
        held_out: str | Sequence[str] | None,
        fraction: float,
        _seen: str | None,
        folds: tuple[int, int] | None,
        rng: np.random.Generator,
    ) -> HeldOut:
        known = sorted({c for parts in self.components for c in parts})
        if held_out is None:
            gone = set(pick(known, fraction, folds, rng, "components"))
        else:
            gone = {h.strip() for h in _as_list(held_out)}
            self._require(sorted(gone), known, "a component")
        targets = [i for i, parts in enumerate(self.components) if gone.intersection(parts)]
        return HeldOut(np.isin(self.codes, targets), targets)

    def _unseen_context(
        self,
        held_out: str | Sequence[str] | None,
        fraction: float,
        _seen: str | None,
        folds: tuple[int, int] | None,
        rng: np.random.Generator,
    ) -> HeldOut:
        n = len(self.contexts)
        controls = np.bincount(self.context_codes[self.control], minlength=n)
        perturbed = np.bincount(self.context_codes[~self.control], minlength=n)
        eligible = [str(c) for c in self.contexts[(controls > 0) & (perturbed > 0)]]
        if held_out is None:
            gone = pick(
                eligible, fraction, folds, rng, f"values of obs[{self.labels_key!r}] with control and perturbed cells"
            )
        else:
            gone = [h.strip() for h in _as_list(held_out)]
            self._require(gone, [str(c) for c in self.contexts], f"a value of obs[{self.labels_key!r}]")
            for value in gone:
                if value not in eligible:
                    raise ValueError(
                        f"held_out={value!r} has no control cells or no perturbed cells: it can not be predicted from "
                        f"its own controls. Values that have both: {', '.join(map(repr, eligible)) or 'none'}."
                    )
        inside = np.isin(self.context_codes, self.contexts.get_indexer(pd.Index(gone)))
        return HeldOut(inside & ~self.control, [])

    def _require(self, asked: Sequence[str], known: Sequence[str], what: str) -> None:
        for name in asked:
            if name not in known:
                raise KeyError(f"held_out={name!r} is not {what}.{hint(name, known)}")

    def _summary(self, codes: np.ndarray, target: np.ndarray) -> pd.DataFrame:
        in_training = np.bincount(self.codes[codes == 0], minlength=len(self.conditions)) > 0
        singles = {c[0] for c, ok in zip(self.components, in_training, strict=True) if ok and len(c) == 1}
        n_splits = len(SPLITS)
        groups, first, n_cells = np.unique(self.strata * n_splits + codes, return_index=True, return_counts=True)
        rows: list[dict[str, Any]] = []
        for group, cell, n in zip(groups, first, n_cells, strict=True):
            parts = self.components[self.codes[cell]]
            rows.append(
                {
                    "condition": self.conditions[self.codes[cell]],
                    "context": str(self.contexts[self.context_codes[cell]]),
                    "n_components": len(parts),
                    "seen": f"{len(singles.intersection(parts))}/{len(parts)}" if parts else "",
                    "split": SPLITS[group % n_splits],
                    "n_cells": int(n),
                    "target": bool(target[cell]),
                }
            )
        summary = pd.DataFrame(rows)
        return summary if self.labels_key is not None else summary.drop(columns="context")


def _as_list(value: str | Sequence[str]) -> list[str]:
    """Return one text or several as a list."""
    return [value] if isinstance(value, str) else [str(v) for v in value]
