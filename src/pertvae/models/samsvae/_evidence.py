"""What validation cells say about the masks that training has opened.

A perturbation can take a latent for itself, whose decoder weights then learn the mean noise of its training cells: one
number a gene, for the price of one mask. New cells of it are described worse with such a mask than without.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pertvae.models.base._access import dose_table, minibatches

if TYPE_CHECKING:
    from pertvae.models.samsvae._model import SAMSVAE

logger = logging.getLogger(__name__)

DRAWS = 8
MAX_CELLS = 200
"""Validation cells asked of each perturbation: evidence that decides comes from far fewer."""


def heed_validation_cells(model: SAMSVAE) -> None:
    """Take the evidence of the validation cells against open masks into account.

    Training found the log-odds of a mask from the training cells. By Bayes' rule those given the validation cells too
    are larger by what these lose, in nats, when the mask is closed. The networks have seen the training cells and the
    choice of the best weights the others, so gains are not added, but losses are, and a mask whose log-odds fall below
    zero is closed. That is enough where many perturbations share a latent. One that has it for itself can have learned
    the latent from noise, and then its log-odds say nothing: of a latent whose users' validation cells lose nothing
    together without it, masks are closed until those that are left gain.

    A closed mask and its effect go back to their prior. One mask of a perturbation at a time, the worst first, because
    what another is worth may change. Perturbations without validation cells keep their masks.

    Parameters
    ----------
    model
        With weights and split of a training.
    """
    module, effects = model.module, model.module.effects
    if effects.open or not len(model.validation_indices):
        return
    module.eval()
    found = effects.mask_logits.detach().clone()
    asked = found > 0
    n_open = int(asked.sum())
    evidence = torch.zeros_like(found)
    while True:
        if asked.any():
            evidence = torch.where(asked, evidence_for(model, asked), evidence)
        kept = found > 0
        support = torch.where(kept, evidence, 0.0).sum(0)
        leaves = (support < 0) & (evidence == torch.where(kept, evidence, torch.inf).amin(0))
        against = kept & (evidence < 0) & ((found + evidence < 0) | leaves)
        worst, latent = torch.where(against, evidence, torch.inf).min(dim=1)
        rows = torch.nonzero(worst < 0)[:, 0]
        if not len(rows):
            break
        effects.close_masks(rows, latent[rows])
        found[rows, latent[rows]] = -torch.inf
        asked = torch.zeros_like(asked)
        asked[rows] = found[rows] > 0
    with torch.no_grad():
        kept = found > 0
        effects.mask_logits.copy_(torch.where(kept, found + evidence.clamp(max=0.0), effects.mask_logits))
    logger.info("Validation cells closed %d of %d open masks.", n_open - int(kept.sum()), n_open)


@torch.inference_mode()
def evidence_for(model: SAMSVAE, asked: Tensor) -> Tensor:
    """Return what the validation cells lose when single masks are closed, nats.

    Parameters
    ----------
    model
        With weights and split of a training.
    asked
        Which masks, ``(components, latents)``.

    Returns
    -------
    ``(components, latents)``: objective (reconstruction + KL of the basal state) without the mask minus that with it,
    summed over the validation cells of its component, at most 200; 0 for masks that were not asked for, or have no
    cells.
    """
    module, adata = model.module, model._validate_anndata()
    rows = cells_of(model, asked.any(1).cpu().numpy())
    total = torch.zeros(asked.shape, dtype=torch.float64, device=asked.device)
    if not len(rows):
        return total.to(torch.float32)
    generator = torch.Generator(module.device).manual_seed(0)
    globals_ = module.draw_globals(DRAWS, generator)
    for block, (positions, tensors) in enumerate(minibatches(model, adata, rows)):
        n = len(positions)
        inputs = module._get_inference_input(tensors)
        response = module.respond(module.treatments(inputs["doses"]))

        def objectives(change: Tensor | None, tensors=tensors, inputs=inputs, n=n, block=block) -> Tensor:  # type: ignore[no-untyped-def]
            noise = torch.Generator(module.device).manual_seed(block + 1)  # the same with and without a mask
            outputs = module.inference(**inputs, globals_=globals_, shift_change=change, generator=noise)
            px = module.generative(**module._get_generative_input(tensors, outputs))
            loss = module.loss(tensors, outputs, px)
            return (loss.reconstruction_loss["reconstruction_loss"] + loss.kl_local["kl_local"])[:n]

        # each cell has a list of masks, those of its components, and closes one after the other
        cell, component, latent = torch.nonzero((inputs["doses"][:n, :, None] != 0) & asked, as_tuple=True)
        if not len(cell):
            continue
        before = objectives(None)
        turn = torch.arange(len(cell), device=cell.device) - torch.searchsorted(cell, cell)
        for k in range(int(turn.max()) + 1):
            c, t, z = (index[turn == k] for index in (cell, component, latent))
            own = response[c] * (module.component_of_treatment == t[:, None])
            change = torch.zeros(DRAWS, len(response), asked.shape[1], device=asked.device)
            change[:, c, z] = -(own * globals_.effect[:, :, z].transpose(1, 2)).sum(-1)
            total.index_put_((t, z), (objectives(change)[c] - before[c]).double(), accumulate=True)
    return total.to(torch.float32)


def cells_of(model: SAMSVAE, components: np.ndarray) -> np.ndarray:
    """Return the validation cells of the components given by a boolean mask, at most 200 of each (seeded), sorted."""
    rows = np.random.default_rng(0).permutation(np.asarray(model.validation_indices, dtype=np.int64))
    doses = dose_table(model, model._validate_anndata())[rows].tocsc()
    chosen = [doses.indices[doses.indptr[t] : doses.indptr[t + 1]] for t in np.flatnonzero(components)]
    return np.unique(rows[np.concatenate([np.sort(c)[:MAX_CELLS] for c in chosen])]) if chosen else rows[:0]
