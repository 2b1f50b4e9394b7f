"""The models of the contract suite: a new model is one line in CASES."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pertvae.models import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus


@dataclass(frozen=True)
class Case:
    """A model class and what differs from the others.

    Parameters
    ----------
    cls
        Model class; everything it offers is read from ``cls.capabilities``.
    kwargs
        Small constructor arguments.
    setup
        More arguments of ``setup_anndata``; the screen of ``_screens.screen`` has the columns.
    train
        More arguments of ``train``.
    likelihoods
        Accepted ``gene_likelihood``, the default first.
    """

    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    likelihoods: tuple[str, ...] = ("nb", "poisson", "normal")

    @property
    def name(self) -> str:
        """Prefix of the keys the model writes."""
        return self.cls.__name__.lower()


SMALL = {"n_latent": 4, "n_hidden": 16}

CASES = [
    Case(SAMSVAE, SMALL),
    Case(CPAVAE, SMALL),
    Case(SVAEPlus, SMALL),
    Case(ConditionalVAE, SMALL),
]
