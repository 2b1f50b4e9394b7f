"""What the models with additive effects share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pandas as pd

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


class AdditiveMixin:
    """For models with the arguments ``dose_response`` and ``leak_correction``."""

    leak_correction: bool

    def _after_training(self) -> None:
        if self.leak_correction:
            correct_leak(cast("SAMSVAE", self))

    def get_dose_response(self) -> pd.DataFrame:
        """Return the learned dose response of each perturbation.

        Returns
        -------
        DataFrame, one row a perturbation: ``slope`` (k), ``midpoint`` (the dose at which the curve reaches half of its
        plateau, in the units of the registered doses) and ``largest_dose`` (the dose whose shift is the effect in
        the programs). Point estimates.

        Raises
        ------
        ValueError
            If the model was not made with ``dose_response="hill"``.
        RuntimeError
            If the model is not trained.
        """
        model = cast("SAMSVAE", self)
        model._check_if_trained(warn=False)
        if model.module.hill is None:
            raise ValueError("The dose acts linearly: make the model with dose_response='hill' to learn its response.")
        return pd.DataFrame(
            {k: v.detach().cpu().numpy() for k, v in model.module.hill.curves().items()}, index=model.perturbation_names
        )
