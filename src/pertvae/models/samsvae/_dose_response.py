"""The getter of learned dose responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pandas as pd

if TYPE_CHECKING:
    from pertvae.models.samsvae._model import SAMSVAE


class DoseResponseMixin:
    """For models with the argument ``dose_response``."""

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
