"""Two ways of finding the masks, and the choice between them by validation cells.

Dense effects and a rotation find the true masks where cells are many. Where they are few, dense effects are partly
noise, and what the networks learned for it does not go away when masks are switched on: masks that learn from the start
then describe new cells better.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pertvae.models.base._access import minibatches
from pertvae.models.base._phases import Phase
from pertvae.models.samsvae._evidence import DRAWS, heed_validation_cells
from pertvae.models.samsvae._sparsify import Sparsifier

if TYPE_CHECKING:
    from pertvae.models.samsvae._model import SAMSVAE

logger = logging.getLogger(__name__)

SHARE = 0.4
"""Epochs of the published way over those of the rotation's phases."""
STANDARD_ERRORS = 2.0
"""By so many the published way must be better: the rotation gives the masks that can be read."""
MAX_CELLS = 10_000


def copy_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Chooser:
    """Trains both ways, the published one first, and keeps the one that describes validation cells better.

    Parameters
    ----------
    model
        An untrained model.
    """

    def __init__(self, model: SAMSVAE) -> None:
        self.model = model
        # a training that broke off may have left masks open or their prior strict
        model.module.effects.open = False
        model.module.set_mask_cost(0.0)
        self.initial = copy_state(model.module)
        self.ran_published = False
        self.published: dict[str, Tensor] | None = None

    def phases(self) -> list[Phase]:
        """Return the phases of both ways."""
        first, *others = Sparsifier(self.model.module).phases()

        def began(epochs: int) -> list[Any]:
            self.ran_published = True
            return []

        def start_anew() -> None:
            if self.ran_published:
                self.published = copy_state(self.model.module)
                self.model.module.load_state_dict(self.initial)
            if first.begin is not None:
                first.begin()

        published = Phase("published", SHARE, callbacks=began)
        return [published, replace(first, begin=start_anew, restarts=True), *others]

    def choose(self) -> str:
        """Check the masks of both ways and keep the better one; return its name, ``"rotate"`` or ``"published"``."""
        heed_validation_cells(self.model)
        if self.published is None:
            return "rotate"
        module = self.model.module
        rotated = cell_objectives(self.model)
        kept = copy_state(module)
        module.load_state_dict(self.published)
        heed_validation_cells(self.model)
        published = cell_objectives(self.model)
        difference = rotated - published
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
        better = not np.isfinite(rotated).all() or difference.mean() > STANDARD_ERRORS * error
        name = "published" if better else "rotate"
        if name == "rotate":
            module.load_state_dict(kept)
        logger.info(
            "Masks of sparsify=%r kept: objective of the validation cells %.3f by the rotation, %.3f by the published "
            "way (difference %+.3f, standard error %.3f).",
            name, rotated.mean(), published.mean(), difference.mean(), error,
        )  # fmt: skip
        return name


@torch.inference_mode()
def cell_objectives(model: SAMSVAE) -> np.ndarray:
    """Return the objective of each validation cell (at most 10,000 of them), nats, mean over eight draws.

    Reconstruction + local KL of the cell + global KL / training cells.
    """
    module = model.module
    module.eval()
    rows = np.sort(np.asarray(model.validation_indices, dtype=np.int64))
    if len(rows) > MAX_CELLS:
        rows = np.sort(np.random.default_rng(0).choice(rows, MAX_CELLS, replace=False))
    generator = torch.Generator(module.device).manual_seed(0)
    kl = float(module.draw_globals(64, generator).kl.sum(-1).mean()) / len(model.train_indices)
    found = np.full(len(rows), kl)
    for positions, tensors in minibatches(model, model._validate_anndata(), rows):
        inputs = module._get_inference_input(tensors)
        for _ in range(DRAWS):
            outputs = module.inference(**inputs, generator=generator)
            px = module.generative(**module._get_generative_input(tensors, outputs))
            loss = module.loss(tensors, outputs, px)
            local = loss.reconstruction_loss["reconstruction_loss"] + loss.kl_local["kl_local"]
            found[positions] += local[: len(positions)].cpu().numpy() / DRAWS
    return found
