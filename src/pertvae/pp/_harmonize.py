"""Labels of other tools, rewritten in the spelling of this package."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from pertvae._labels import LabelFormat, check_labels, hint, require_column

Source = Literal["gears", "scperturb", "cpa", "cell-eval", "state", "tahoe", "perturbench", "pertpy"]


@dataclass(frozen=True)
class _Convention:
    columns: tuple[str, ...]
    control: tuple[str, ...]
    sep: str | None
    dosage: tuple[str, ...] = ()


_CONVENTIONS: dict[str, _Convention] = {
    "gears": _Convention(("condition",), ("ctrl",), "+"),
    "scperturb": _Convention(("perturbation",), ("control",), "_"),
    "cpa": _Convention(
        ("condition", "perturbation"), ("ctrl", "control"), "+", ("dose_value", "dose_val", "dosage", "dose")
    ),
    "cell-eval": _Convention(("target", "target_gene"), ("non-targeting",), None),
    "state": _Convention(("gene", "target_gene", "target"), ("non-targeting",), None),
    "tahoe": _Convention(("drugname_drugconc",), ("DMSO_TF",), None),
    "perturbench": _Convention(("condition",), ("control",), "+"),
    "pertpy": _Convention(("perturbation_name", "perturbation"), ("control", "NT"), "+"),
}


def harmonize_perturbations(
    adata: AnnData,
    source: Source,
    *,
    perturbation_key: str | None = None,
    source_control: str | Sequence[str] | None = None,
    source_sep: str | None = None,
    nperts_key: str = "nperts",
    dosage_key: str | None = None,
    control: str = "control",
    sep: str = "+",
    key_added: str = "perturbation",
    dosage_key_added: str = "dosage",
    overwrite: bool = False,
) -> None:
    """Write a label column in the spelling of this package, from that of another tool.

    Only names change: components are joined by ``sep`` in alphabetical order and the control becomes ``control``.
    Cells, counts and every other column stay as they are.

    Parameters
    ----------
    adata
        Screen with the label column of ``source``.
    source
        Where the labels come from:

        ================ ============================== ======================= =======================================
        source           column                         control                 combination
        ================ ============================== ======================= =======================================
        ``gears``        ``condition``                  ``ctrl``                ``A+B``; singles are ``A+ctrl``
        ``scperturb``    ``perturbation``               ``control``             ``A_B`` or ``A+B``, read with ``nperts``
        ``cpa``          ``condition``                  ``ctrl``, ``control``   ``A+B``, doses ``1.0+0.5``
        ``cell-eval``    ``target``                     ``non-targeting``       none
        ``state``        ``gene``                       ``non-targeting``       none
        ``tahoe``        ``drugname_drugconc``          ``DMSO_TF``             a list of (drug, dose, unit)
        ``perturbench``  ``condition``                  ``control``             ``A+B``
        ``pertpy``       ``perturbation_name``          ``control``, ``NT``     ``A+B``
        ================ ============================== ======================= =======================================
    perturbation_key
        obs column to read; default: the column of the source.
    source_control
        Control label or labels as written in that column; default: those of the source.
    source_sep
        Separator as written in that column; default: that of the source. For ``scperturb`` a separator given here is
        applied to every label, and ``nperts_key`` is not read.
    nperts_key
        ``scperturb``: obs column with the number of perturbations, so that a name with ``_`` is not split.
    dosage_key
        obs column of doses (a number, or ``"1.0+0.5"`` aligned with the components as written). Default: the dose
        column of CPA when there is one, the doses inside Tahoe's labels, none for other sources.
    control
        The control label to write.
    sep
        The separator to write. Pass another one when names contain ``+``.
    key_added
        obs column of labels to write.
    dosage_key_added
        obs column of doses to write when there are any: numbers, or text aligned with the components of the label
        when there are combinations. Controls have dose 0.
    overwrite
        Replace existing columns; without it an existing column is an error.

    Returns
    -------
    Nothing. Written: ``obs[key_added]`` (categorical) and, with doses, ``obs[dosage_key_added]``.

    Raises
    ------
    KeyError
        If a column is missing; the nearest names are given.
    ValueError
        If the source is unknown, a column exists already, no cell is a control, labels are missing or can not be
        read, or a name contains ``sep``.

    Examples
    --------
    >>> pv.pp.harmonize_perturbations(adata, "gears")
    >>> pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    """
    if source not in _CONVENTIONS:
        raise ValueError(f"source={source!r} is not known.{hint(source, get_args(Source))}")
    convention = _CONVENTIONS[source]
    LabelFormat.create(control, sep)  # the output spelling must be a valid one
    column = _column(adata.obs, perturbation_key, convention.columns, source)
    labels = check_labels(adata.obs[column], column).remove_unused_categories()
    tokens = convention.control if source_control is None else source_control
    written_sep = convention.sep if source_sep is None else source_sep
    if dosage_key is None:
        dosage_key = next((c for c in convention.dosage if c in adata.obs.columns), None)
    else:
        require_column(adata.obs, dosage_key, "adata.obs", "dosage_key")

    doses: dict[str, dict[str, float]] | None = None
    if source == "tahoe":
        doses = {label: _tahoe(label, column) for label in labels.categories}
        fmt = LabelFormat.create(tokens, None)
        parts = {label: [c for c in named if c not in fmt.control] for label, named in doses.items()}
    elif source == "scperturb" and source_sep is None:
        fmt = LabelFormat.create(tokens, None)
        parts = _scperturb(adata.obs, labels, nperts_key, fmt.control)
    else:
        fmt = LabelFormat.create(tokens, written_sep)
        parts = {label: list(fmt.components(label)) for label in labels.categories}

    if all(parts.values()):
        common = ", ".join(repr(str(c)) for c in adata.obs[column].value_counts().index[:5])
        raise ValueError(
            f"No cell of obs[{column!r}] is a control ({' or '.join(map(repr, fmt.control))}). Pass source_control. "
            f"Commonest labels: {common}."
        )
    components = {label: sorted(set(p)) for label, p in parts.items()}
    for name in sorted({c for names in components.values() for c in names}):
        if sep in name or name == control:
            what = f"contains the separator {sep!r}: pass another sep" if sep in name else "is the name of the control"
            raise ValueError(f"The component {name!r} of obs[{column!r}] {what}.")
    written = {label: sep.join(names) or control for label, names in components.items()}
    columns: dict[str, pd.Series] = {key_added: _map(labels, written, adata.obs.index)}
    if doses is not None:
        columns[dosage_key_added] = _dose_column(
            labels, pd.Categorical(labels), components, doses, sep, adata.obs.index
        )
    elif dosage_key is not None:
        values = pd.Categorical(adata.obs[dosage_key].astype(str))
        columns[dosage_key_added] = _dose_column(labels, values, components, fmt, sep, adata.obs.index)
    for key in columns:
        if key in adata.obs.columns and not overwrite:
            argument = "key_added" if key == key_added else "dosage_key_added"
            raise ValueError(f"obs[{key!r}] exists already. Pass another {argument}, or overwrite=True to replace it.")
    for key, series in columns.items():
        adata.obs[key] = series


def _column(obs: pd.DataFrame, asked: str | None, defaults: Sequence[str], source: str) -> str:
    if asked is not None:
        require_column(obs, asked, "adata.obs", "perturbation_key")
        return asked
    for name in defaults:
        if name in obs.columns:
            return name
    raise KeyError(
        f"adata.obs has no column {' or '.join(map(repr, defaults))}, where source={source!r} keeps its labels. Pass "
        f"perturbation_key.{hint(defaults[0], obs.columns)}"
    )


def _map(labels: pd.Categorical, written: dict[str, str], index: pd.Index) -> pd.Series:
    names = np.array([written[label] for label in labels.categories], dtype=object)
    categories, positions = np.unique(names.astype(str), return_inverse=True)
    return pd.Series(
        pd.Categorical.from_codes(positions[labels.codes], categories=pd.Index(categories, dtype=object)), index=index
    )


def _dose_column(
    labels: pd.Categorical,
    values: pd.Categorical,
    components: dict[str, list[str]],
    doses: LabelFormat | dict[str, dict[str, float]],
    sep: str,
    index: pd.Index,
) -> pd.Series:
    """Return doses in the order of the written components, parsed once a pair of label and dose."""
    n = len(values.categories)
    pairs, positions = np.unique(np.asarray(labels.codes, dtype=np.int64) * n + values.codes, return_inverse=True)
    written: list[list[float]] = []
    for pair in pairs:
        label, value = labels.categories[pair // n], values.categories[pair % n]
        named = doses.doses(label, value) if isinstance(doses, LabelFormat) else doses[label]
        written.append([float(named.get(c, 0.0)) for c in components[label]])
    if max(map(len, written)) <= 1:
        return pd.Series(np.array([w[0] if w else 0.0 for w in written])[positions], index=index)
    text = np.array([sep.join(map(repr, w)) or "0.0" for w in written], dtype=object)
    return pd.Series(pd.Categorical(text[positions]), index=index)


def _tahoe(label: str, column: str) -> dict[str, float]:
    """Return the dose of each drug of a label such as ``"[('DMSO_TF', 0.0, 'uM')]"``."""
    try:
        treatments = {str(drug).strip(): (float(dose), unit) for drug, dose, unit in ast.literal_eval(label)}
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(
            f"The label {label!r} of obs[{column!r}] is not a list of (drug, dose, unit) as Tahoe writes it, for "
            "example \"[('DMSO_TF', 0.0, 'uM')]\"."
        ) from None
    for drug, (_, unit) in treatments.items():
        if unit != "uM":
            raise ValueError(
                f"The dose of {drug!r} in {label!r} is in {unit!r}: convert the doses of all drugs to uM first."
            )
    return {drug: dose for drug, (dose, _) in treatments.items()}


def _scperturb(
    obs: pd.DataFrame, labels: pd.Categorical, nperts_key: str, control: Sequence[str]
) -> dict[str, list[str]]:
    """Cut labels where the number of perturbations says so; ``_`` also stands inside names."""
    if nperts_key not in obs.columns:
        raise KeyError(
            f"nperts_key={nperts_key!r} is not a column of adata.obs, and without it 'A_B' may be one name or two. "
            f"Pass nperts_key, or source_sep ('_' or '+') to split every label.{hint(nperts_key, obs.columns)}"
        )
    counts = pd.to_numeric(obs[nperts_key], errors="coerce").groupby(np.asarray(labels.codes)).agg(["min", "max"])
    n_parts: dict[str, int] = {}
    for code, (low, high) in zip(counts.index, counts.to_numpy(), strict=True):
        label = str(labels.categories[code])
        if label in control:
            n_parts[label] = 0
        elif not low == high or low < 1:  # also true for NaN
            raise ValueError(
                f"obs[{nperts_key!r}] is {low:g} to {high:g} for the label {label!r}; it should be one whole number of "
                "perturbations, 1 or more. Pass source_sep to split every label instead."
            )
        else:
            n_parts[label] = int(low)
    singles = {label for label, n in n_parts.items() if n == 1}
    return {label: _cut(label, n, singles, control) for label, n in n_parts.items()}


def _cut(label: str, n: int, singles: set[str], control: Sequence[str]) -> list[str]:
    if n <= 1:
        return [label] * n
    for sep in ("_", "+"):
        pieces = label.split(sep)
        if len(pieces) == n and all(pieces):
            return [p for p in pieces if p not in control]
    pieces = label.split("_")
    cuts = [
        ["_".join(pieces[a:b]) for a, b in itertools.pairwise([0, *places, len(pieces)])]
        for places in itertools.combinations(range(1, len(pieces)), n - 1)
    ]
    known = [cut for cut in cuts if all(c in singles or c in control for c in cut)]
    if len(known) != 1:
        found = "no cut" if not known else f"{len(known)} cuts"
        raise ValueError(
            f"The label {label!r} has {n} perturbations, and {found} at '_' gives names that also stand alone. Rename "
            "it, or pass source_sep."
        )
    return [c for c in known[0] if c not in control]
