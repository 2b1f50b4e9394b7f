"""What the models with additive effects share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from scvi import settings

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._labels import hint
from pertvae.data import distinct_doses
from pertvae.models.base._requests import Request
from pertvae.models.samsvae._leak import correct_leak

if TYPE_CHECKING:
    from pertvae.models.samsvae._model import SAMSVAE


ADDITIVE: dict[str, Any] = {
    "basal": ("control", "prior"),
    "latent_kinds": ("full", "basal", "perturbation"),
    "credible_effects": True,
    "marginal_ll": True,
}
"""What they offer."""
MANY_LEVELS = 20
"""Doses of one perturbation that are hardly meant as categories."""
NEAREST = 3


class AdditiveMixin:
    """For models with the arguments ``dose_response``, ``dose_levels`` and ``leak_correction``."""

    leak_correction: bool

    def _after_training(self) -> None:
        if self.leak_correction:
            correct_leak(cast("SAMSVAE", self))

    def get_dose_response(self) -> pd.DataFrame:
        """Return the learned dose response of each perturbation.

        Returns
        -------
        With ``dose_response="hill"`` a DataFrame with one row a perturbation: ``slope`` (k), ``midpoint`` (the dose at
        which the curve reaches half of its plateau, in the units of the registered doses) and ``largest_dose`` (the
        dose whose shift is the effect in the programs). Point estimates.

        With ``dose_response="categories"`` one row a perturbation and training dose (a MultiIndex): ``n_cells``
        (training cells), ``size`` (Euclidean length of the expected latent shift that predictions make, in prior
        standard deviations of the basal state), ``deviation`` (length of the part of it that belongs to this dose
        alone) and ``along_mean`` (size of the shift along the direction of the perturbation's mean shift over its
        training cells: its sign tells doses that act the other way).

        Raises
        ------
        ValueError
            If the model was made with ``dose_response="linear"``.
        RuntimeError
            If the model is not trained.
        """
        model = cast("SAMSVAE", self)
        model._check_if_trained(warn=False)
        if model.module.levels is not None:
            return self._level_table()
        if model.module.hill is None:
            raise ValueError(
                "The dose acts linearly: make the model with dose_response='hill' or 'categories' to learn its "
                "response."
            )
        return pd.DataFrame(
            {k: v.detach().cpu().numpy() for k, v in model.module.hill.curves().items()}, index=model.perturbation_names
        )

    # ---------------------------------------------------------------- doses as categories

    def _dose_levels(
        self, dose_response: str, given: Sequence[tuple[str, float]] | None
    ) -> list[tuple[str, float]] | None:
        """Return perturbation and dose of each category: as given, or those of the registered data."""
        model = cast("SAMSVAE", self)
        if dose_response != "categories":
            if given is not None:
                raise ValueError(
                    f"dose_levels=... needs dose_response='categories': with {dose_response!r} no dose has effects of "
                    "its own."
                )
            return None
        names = model.perturbation_names
        if given is not None:
            if not len(given):
                raise ValueError("dose_levels=[] has no dose: leave it out to take those of the registered data.")
            for name, dose in given:
                if name not in names:
                    raise ValueError(f"dose_levels: {name!r} is not a registered perturbation.{hint(name, names)}")
                if not 0 < dose < np.inf:
                    raise ValueError(f"dose_levels: the dose {dose} of {name!r} is not positive and finite.")
            return list(dict.fromkeys((str(name), _short(dose)) for name, dose in given))
        if model.adata is None:
            raise ValueError(
                "dose_response='categories' without data needs dose_levels=[(perturbation, dose), ...]: the doses that "
                "have an effect of their own."
            )
        doses = distinct_doses(model.adata_manager.get_from_registry(PERTURBATION_REGISTRY_KEY))
        levels = [(names[component], _short(dose)) for component, dose in doses]
        counts = pd.Series([name for name, _ in levels]).value_counts()
        if counts.iloc[0] > MANY_LEVELS:
            warnings.warn(
                f"{counts.index[0]!r} has {counts.iloc[0]} doses, and dose_response='categories' learns an effect of "
                "each: round them, or use dose_response='hill' or 'linear'.",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )
        return levels

    def _indexed_levels(self, levels: Sequence[tuple[str, float]] | None) -> list[tuple[int, float]] | None:
        """Return levels with the index of their perturbation."""
        if levels is None:
            return None
        position = {name: j for j, name in enumerate(cast("SAMSVAE", self).perturbation_names)}
        return [(position[name], dose) for name, dose in levels]

    def _known_doses(self) -> dict[str, list[float]] | None:
        """Return the training doses of each perturbation that has any; ``None`` if doses are no categories."""
        model = cast("SAMSVAE", self)
        levels = model.module.levels
        if levels is None:
            return None
        known: dict[str, list[float]] = {}
        for (component, dose), seen in zip(levels.levels(), levels.known.tolist(), strict=True):
            if seen:
                known.setdefault(model.perturbation_names[component], []).append(_short(dose))
        return {name: sorted(doses) for name, doses in known.items()}

    def _check_requests(self, requests: Sequence[Request]) -> None:
        known = self._known_doses()
        if known is None:
            return
        for request in requests:
            for name, dose in request.doses.items():
                doses = known.get(name)
                if doses is None:
                    raise ValueError(
                        f"No training cell was given {name!r} (in {request.label!r}), and with "
                        "dose_response='categories' only doses of training cells can be predicted."
                    )
                if _short(dose) not in doses:
                    nearest = sorted(sorted(doses, key=lambda d: abs(d - dose))[:NEAREST])
                    raise ValueError(
                        f"No training cell was given {name!r} at dose {_text(dose)} (in {request.label!r}), and with "
                        "dose_response='categories' only doses of training cells can be predicted. The nearest: "
                        f"{', '.join(map(_text, nearest))}. Ask for doses by a DataFrame (a label alone is dose 1), or "
                        "use dose_response='linear' or 'hill' to interpolate."
                    )

    def _default_perturbations(self) -> list[str] | pd.DataFrame:
        known = self._known_doses()
        if known is None:
            return super()._default_perturbations()  # type: ignore[misc]
        rows = {
            name if len(doses) == 1 else f"{name} ({_text(dose)})": {name: dose}
            for name, doses in known.items()
            for dose in doses
        }
        return pd.DataFrame.from_dict(rows, orient="index", dtype=float)

    @torch.inference_mode()
    def _level_table(self) -> pd.DataFrame:
        model = cast("SAMSVAE", self)
        levels, effects = model.module.levels, model.module.effects
        assert levels is not None
        own = effects.inclusion[levels.component] * levels.posterior()[0]
        shift = (effects.expected() + model.module.leak)[levels.component] + own
        cells = levels.cells[:, None]
        mean = torch.zeros_like(model.module.leak).index_add(0, levels.component, cells * shift)
        direction = torch.nn.functional.normalize(mean, dim=-1)[levels.component]
        table = pd.DataFrame(
            {
                "perturbation": [model.perturbation_names[c] for c in levels.component.tolist()],
                "dose": [_short(d) for d in levels.dose.tolist()],
                "n_cells": levels.cells.cpu().numpy().astype(np.int64),
                "size": shift.norm(dim=-1).cpu().numpy(),
                "deviation": own.norm(dim=-1).cpu().numpy(),
                "along_mean": (shift * direction).sum(-1).cpu().numpy(),
            }
        )
        return table[levels.known.cpu().numpy()].set_index(["perturbation", "dose"]).sort_index()


def _short(dose: float) -> float:
    """Return a dose as float32 has it, with as few digits as tell it from others: 0.1, and not 0.10000000149."""
    return float(str(np.float32(dose)))


def _text(dose: float) -> str:
    """Return a dose as text, without an exponent."""
    return np.format_float_positional(_short(dose), trim="-")
