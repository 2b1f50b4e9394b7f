"""What ``predict_perturbation`` was asked for: labels and doses, and which cells to start from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import settings

from pertvae._labels import unknown_components

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel


@dataclass(frozen=True)
class Request:
    """One label to predict: as written, canonical, and the dose of each component, sorted."""

    label: str
    canonical: str
    doses: dict[str, float]

    def __post_init__(self) -> None:
        """Sort the components: noise is drawn in their order."""
        object.__setattr__(self, "doses", dict(sorted(self.doses.items())))

    @property
    def key(self) -> str:
        """What the random draws depend on: canonical label and doses."""
        if all(d == 1.0 for d in self.doses.values()):
            return self.canonical
        return self.canonical + " " + " ".join(f"{d:.9g}" for d in self.doses.values())


def parse_requests(
    model: PerturbationModel, perturbations: str | Sequence[str] | pd.DataFrame, unseen: str
) -> tuple[list[Request], list[str]]:
    """Return what is asked for, and the unknown components that were left out.

    Raises
    ------
    ValueError
        If a label or a column stands twice, a dose is negative or not finite, or a component is unknown and ``unseen``
        is ``"raise"``.
    """
    if unseen not in ("raise", "ignore"):
        raise ValueError(f"unseen={unseen!r} is not one of ['raise', 'ignore'].")
    fmt = model.label_format
    requests = []
    if isinstance(perturbations, pd.DataFrame):
        values = perturbations.fillna(0.0).to_numpy(dtype=np.float64)
        bad = ~np.isfinite(values) | (values < 0)
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise ValueError(
                f"The dose {values[i, j]} of {str(perturbations.columns[j])!r} in row "
                f"{str(perturbations.index[i])!r} is negative or not finite."
            )
        names = [str(c) for c in perturbations.columns]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"perturbations has more than one column {twice!r}.")
        for label, row in zip(perturbations.index.astype(str), values, strict=True):
            doses = {n: float(d) for n, d in zip(names, row, strict=True) if d > 0 and n not in fmt.control}
            requests.append(Request(label, fmt.join(doses), doses))
    else:
        labels = [perturbations] if isinstance(perturbations, str) else [str(p) for p in perturbations]
        requests = [Request(p, fmt.canonical(p), dict.fromkeys(fmt.components(p), 1.0)) for p in labels]
    if not requests:
        raise ValueError("perturbations is empty: name at least one label.")
    labels = [r.label for r in requests]
    if len(set(labels)) < len(labels):
        twice = next(p for p in labels if labels.count(p) > 1)
        raise ValueError(f"perturbations names {twice!r} more than once.")
    known = set(model.perturbation_names)
    unknown = sorted({c for r in requests for c in r.doses if c not in known})
    if unknown:
        message = unknown_components({r.label: r.doses for r in requests}, model.perturbation_names)
        if unseen == "raise":
            raise ValueError(f"{message} Pass unseen='ignore' to let unknown perturbations contribute nothing.")
        warnings.warn(f"{message} They contribute nothing.", UserWarning, stacklevel=settings.warnings_stacklevel)
        requests = [Request(r.label, r.canonical, {c: d for c, d in r.doses.items() if c in known}) for r in requests]
    return requests, unknown


def dose_tensors(model: PerturbationModel, request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a request's components (indices), their doses, and the row of doses of all components, ``(1, all)``."""
    position = {c: j for j, c in enumerate(model.perturbation_names)}
    components = torch.tensor([position[c] for c in request.doses], dtype=torch.long, device=model.device)
    doses = torch.tensor(list(request.doses.values()), dtype=torch.float32, device=model.device)
    row = torch.zeros(1, len(position), device=model.device)
    row[0, components] = doses
    return components, doses, row


def choose_cells(pool: np.ndarray, n_cells: int, seed: int) -> np.ndarray:
    """Return positions of ``n_cells`` of a pool: each at most once while they last, then each once and more at random.

    Which cells are taken depends on the seed and the cells, not on their order in the pool; the positions keep it.
    """
    if n_cells < 1:
        raise ValueError(f"n_cells={n_cells}: at least one cell is needed.")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.argsort(pool, kind="stable"))
    if n_cells <= len(pool):
        return np.sort(shuffled[:n_cells])
    return np.concatenate([np.arange(len(pool)), rng.choice(shuffled, n_cells - len(pool))])
