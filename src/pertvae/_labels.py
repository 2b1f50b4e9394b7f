"""Perturbation labels: from the text in ``adata.obs`` to components and canonical labels.

A label is text: components joined by a separator. Control tokens are dropped wherever they stand,
components are sorted and de-duplicated, so ``"B+A"``, ``"A+ctrl+B"`` and ``"A+B"`` are one condition.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd


def nearest_names(name: object, valid: Iterable[object], n: int = 3) -> list[str]:
    """Return at most ``n`` valid names that look like ``name``, the most alike first."""
    names = [str(v) for v in valid]
    by_lower = {v.lower(): v for v in reversed(names)}
    found = difflib.get_close_matches(str(name).lower(), list(by_lower), n=n, cutoff=0.4)
    return [by_lower[f] for f in found]


def hint(name: object, valid: Iterable[object]) -> str:
    """Return ``" Did you mean 'X'?"`` with the nearest valid names, or the first valid names."""
    names = [str(v) for v in valid]
    near = nearest_names(name, names)
    if near:
        return " Did you mean " + " or ".join(repr(v) for v in near) + "?"
    if not names:
        return " There is nothing to choose from."
    more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return " Available: " + ", ".join(repr(v) for v in names[:10]) + more + "."


def require_column(frame: pd.DataFrame, key: str, what: str, argument: str) -> None:
    """Raise a KeyError that names the nearest columns when ``key`` is not a column of ``frame``."""
    if key not in frame.columns:
        raise KeyError(f"{argument}={key!r} is not a column of {what}.{hint(key, frame.columns)}")


@dataclass(frozen=True)
class LabelFormat:
    """How labels are written: control tokens and separator.

    Parameters
    ----------
    control
        Control tokens; the first is the canonical name of the control condition.
    sep
        Separator between components; ``None`` means that every label is one perturbation.
    """

    control: tuple[str, ...]
    sep: str | None = "+"

    def __post_init__(self) -> None:
        if not self.control:
            raise ValueError("control is empty: name at least one control label, for example control='control'.")
        if self.sep is not None and not self.sep:
            raise ValueError("sep is the empty string: pass a separator such as '+', or None for no combinations.")
        for token in self.control:
            if self.sep is not None and self.sep in token:
                raise ValueError(
                    f"The control label {token!r} contains the separator {self.sep!r}. Pass another sep, or "
                    "sep=None when every label is one perturbation."
                )

    @classmethod
    def create(cls, control: str | Sequence[str], sep: str | None = "+") -> LabelFormat:
        """Build a format from one control label or several."""
        tokens = (control,) if isinstance(control, str) else tuple(control)
        return cls(tuple(str(t).strip() for t in tokens), sep)

    def split(self, label: object) -> list[str]:
        """Return the parts of a label as written, control tokens included, stripped of white space."""
        text = str(label).strip()
        if self.sep is None or text in self.control:
            return [text]
        parts = [p.strip() for p in text.split(self.sep)]
        if not all(parts):
            raise ValueError(
                f"The label {text!r} has an empty component: a component must not contain the separator "
                f"{self.sep!r}. If {self.sep!r} belongs to a name, pass another sep, or sep=None when every label "
                "is one perturbation."
            )
        return parts

    def components(self, label: object) -> tuple[str, ...]:
        """Return the sorted, de-duplicated components of a label; empty for the control."""
        return tuple(sorted({p for p in self.split(label) if p not in self.control}))

    def canonical(self, label: object) -> str:
        """Return the canonical label: sorted components joined by ``sep``, or the first control token."""
        return self.join(self.components(label))

    def join(self, components: Iterable[str]) -> str:
        """Return the canonical label of a set of components."""
        parts = sorted(components)
        return (self.sep or "+").join(parts) if parts else self.control[0]

    def doses(self, label: object, dose: object = 1.0) -> dict[str, float]:
        """Return the dose of each component of a label.

        Parameters
        ----------
        label
            The label as written.
        dose
            A number, which holds for every component, or text such as ``"1.0+0.5"`` aligned with the components
            as written (control tokens included). A component with dose 0 was not applied and is left out.

        Raises
        ------
        ValueError
            If the number of doses is not the number of components, a dose is negative or not finite, or one
            component is written twice with two doses.
        """
        parts = self.split(label)
        values = _parse_doses(label, dose, len(parts), self.sep)
        result: dict[str, float] = {}
        for part, value in zip(parts, values, strict=True):
            if part in self.control:
                continue
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"The dose {value!r} of {part!r} (label {str(label)!r}) is negative or not finite.")
            if part in result and result[part] != value:
                raise ValueError(f"The label {str(label)!r} gives {part!r} two doses: {result[part]!r} and {value!r}.")
            result[part] = value
        return {k: v for k, v in result.items() if v > 0}


def _parse_doses(label: object, dose: object, n: int, sep: str | None) -> list[float]:
    if isinstance(dose, (int, float, np.integer, np.floating)):
        return [float(dose)] * n
    text = str(dose).strip()
    pieces = [text] if sep is None else [p.strip() for p in text.split(sep)]
    try:
        values = [float(p) for p in pieces]
    except ValueError:
        raise ValueError(
            f"The dose {text!r} of label {str(label)!r} is not a number, nor numbers joined by {sep!r}."
        ) from None
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise ValueError(
            f"The label {str(label)!r} has {n} components but its dose {text!r} has {len(values)} values: write one "
            "number, or one for each component as written."
        )
    return values


def check_labels(values: pd.Series, key: str) -> pd.Categorical:
    """Return labels as a categorical of text, or raise when some are missing.

    Parameters
    ----------
    values
        The label column, one entry a cell.
    key
        Its name, for the message.

    Raises
    ------
    ValueError
        If labels are missing (NaN, None or empty text): how many, and the first cells.
    """
    categorical = pd.Categorical(values)
    names = pd.Index([str(c).strip() for c in categorical.categories])
    codes = np.asarray(categorical.codes)
    blank = np.flatnonzero(names == "")
    missing = (codes < 0) | np.isin(codes, blank)
    if missing.any():
        rows = ", ".join(repr(str(r)) for r in values.index[missing][:5])
        raise ValueError(
            f"obs[{key!r}] has {int(missing.sum())} missing labels, first in cells {rows}. Remove these cells "
            f"(adata[~adata.obs[{key!r}].isna()].copy()) or label them."
        )
    merged, positions = np.unique(names.to_numpy(dtype=str), return_inverse=True) if len(names) else (names, codes)
    return pd.Categorical.from_codes(positions[codes], categories=pd.Index(merged, dtype=object))


def canonical_labels(values: pd.Series, control: str | Sequence[str], sep: str | None = "+") -> pd.Series:
    """Return the canonical label of every cell, parsed once a category.

    Parameters
    ----------
    values
        Label column (one entry a cell).
    control
        Control label or labels.
    sep
        Separator between components; ``None`` when every label is one perturbation.

    Returns
    -------
    Categorical series with the index of ``values``.
    """
    fmt = LabelFormat.create(control, sep)
    labels = check_labels(values, str(values.name))
    mapped = np.array([fmt.canonical(c) for c in labels.categories], dtype=object)
    names, positions = np.unique(mapped.astype(str), return_inverse=True)
    return pd.Series(
        pd.Categorical.from_codes(positions[labels.codes], categories=pd.Index(names, dtype=object)),
        index=values.index,
        name=values.name,
    )


def is_control(values: pd.Series, control: str | Sequence[str], sep: str | None = "+") -> np.ndarray:
    """Return a boolean array: which cells are controls."""
    fmt = LabelFormat.create(control, sep)
    return (canonical_labels(values, control, sep) == fmt.control[0]).to_numpy()


def unknown_components(requested: Mapping[str, Iterable[str]], known: Sequence[str]) -> str:
    """Return a message that names unknown components, the labels they stand in, and the nearest known names."""
    known_set = set(known)
    lines = []
    for label, components in requested.items():
        for component in components:
            if component not in known_set:
                where = f" (in {label!r})" if label != component else ""
                lines.append(f"{component!r}{where}.{hint(component, known)}")
    return "Unknown perturbation " + "; ".join(lines)
