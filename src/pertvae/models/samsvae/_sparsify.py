"""Training that finds the masks: dense effects, rotation to simple structure, masks on.

With all masks learning from the start, which basis of the latent space is used is fixed early and by chance, and
switching single masks cannot turn it later. So the effects are first learned without masks; the latent space is turned
to the basis in which they are sparse; masks are switched on there.

Small entries off the true axes are what the decoder gets wrong so far, and with hundreds of cells they are significant.
They must not return before the decoder has learned to do without them: at first an open mask costs some nats for every
cell, and this cost goes to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from pertvae.models.base._phases import Phase
from pertvae.nn import simple_structure

if TYPE_CHECKING:
    from pertvae.models.samsvae._module import SAMSVAEModule

SHARES = {"dense": 0.4, "costly masks": 0.15, "cheaper masks": 0.15, "masks": 0.3}
ENERGY = 0.85
"""Share of the squared shifts by typical doses that masks start with. Chosen with COST by mask F1 on
the authors' simulation (seeds 0 to 2) and the ``sparse_additive`` screen (seed 0): these seeds are no test of it."""
COST = 0.2
"""First cost of an open mask, nats a cell, over the squared size of the smallest shift of that share. Giving up a
shift e costs about e^2 / 2 nats a cell, so entries below 0.63 of that size do not pay."""


class MaskCost(pl.Callback):
    """Cost of an open mask for every cell of its perturbation.

    Parameters
    ----------
    module
        The module.
    start, end
        Nats a cell at the beginning and the end of the phase, linear in between.
    n_epochs
        Epochs of the phase.
    """

    def __init__(self, module: SAMSVAEModule, start: float, end: float, n_epochs: int) -> None:
        super().__init__()
        self.module, self.start, self.end, self.n_epochs = module, start, end, n_epochs

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Set the cost of this step."""
        done = (trainer.current_epoch + index / max(1, int(trainer.num_training_batches))) / self.n_epochs
        self.module.set_mask_cost(self.start + (self.end - self.start) * done)


class Sparsifier:
    """The phases of one training run.

    Parameters
    ----------
    module
        The module to train.
    """

    def __init__(self, module: SAMSVAEModule) -> None:
        self.module, self.cost, self.was_dense = module, 0.0, False

    def phases(self) -> list[Phase]:
        """Return the phases in order."""
        begin = {
            "dense": self.open_masks,
            "costly masks": self.rotate_and_start,
            "cheaper masks": lambda: None,
            "masks": lambda: self.module.set_mask_cost(0.0),
        }
        cost = {"costly masks": (1.0, 1.0), "cheaper masks": (1.0, 0.0)}

        def callbacks(name: str, epochs: int) -> list[Any]:
            self.was_dense |= name == "dense"  # a short run may have no epoch for it
            if name not in cost:
                return []
            start, end = cost[name]
            return [MaskCost(self.module, self.cost * start, self.cost * end, epochs)]

        return [
            Phase(
                name,
                share,
                begin[name],
                may_stop=name not in cost,
                of_best=share / SHARES["dense"] if name in cost else None,
                callbacks=lambda epochs, name=name: callbacks(name, epochs),  # type: ignore[misc]
            )
            for name, share in SHARES.items()
        ]

    def open_masks(self) -> None:
        """Hold all masks open."""
        self.module.effects.open = True

    @torch.no_grad()
    def rotate_and_start(self) -> None:
        """Turn the latent space to simple structure and start the masks from the dense effects."""
        effects = self.module.effects
        dense = self.module.dense_shifts().cpu().numpy()
        if not self.was_dense:  # nothing was learned yet: masks start undecided
            effects.open = False
            return
        rotation = torch.as_tensor(simple_structure(dense), dtype=torch.float32, device=effects.mask_logits.device)
        self.module.rotate(rotation)
        self.cost = COST * self.module.start_masks(ENERGY) ** 2
