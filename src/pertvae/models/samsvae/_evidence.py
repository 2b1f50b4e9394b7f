"""What validation cells say about the masks that training has opened.

A perturbation can take a latent for itself, whose decoder weights then learn the mean noise of its training cells: one
number a gene, for the price of one mask. New cells of it are described worse with such a mask than without.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pertvae.models.base._access import dose_table, minibatches

if TYPE_CHECKING:
    from pertvae.models.samsvae._model import SAMSVAE

logger = logging.getLogger(__name__)

DRAWS = 8
MAX_CELLS = 200
"""Validation cells chosen of each perturbation: evidence that decides comes from far fewer."""
MARGIN = 3.0
"""Nats that the validation cells of a latent's users must have against it, 20 to 1: chance says less about true effects
in few cells. Chosen with splits of the McFaline and Papalexi subsets in sight (benchmarks/programs_on_real_screens.py),
where it is no test of itself."""
SURE = 20.0
"""Log-odds of masks that are open in every draw."""


def heed_validation_cells(model: SAMSVAE) -> None:
    """Close the masks that the validation cells of their perturbation speak against.

    The evidence of the validation cells for a mask is by how many nats they are described worse when it is closed.
    Where they are described better, it is negative, and

    - a mask is closed if the negative evidence outweighs its log-odds by the training cells;
    - a latent that a perturbation has for itself can have been learned from noise, and then its log-odds say nothing:
      where the evidence of all masks of a latent together is below -3, the mask with the worst is closed, until it is
      not.

    A closed mask and its effect go back to their prior; other masks are left as they are, and other effects too unless
    ``embedding_inference="correlated"`` lets them read the mask row. One mask of a perturbation at a time, because what
    another is worth may change. Perturbations without validation cells keep their masks.

    Parameters
    ----------
    model
        With weights and split of a training.
    """
    module = model.module
    if module.effects.open or not len(model.validation_indices):
        return
    module.eval()
    with torch.no_grad():
        is_open = (module.effects.mask_logits > 0).cpu()
        odds = torch.maximum(module.effects.mask_logits, module.mask_odds()).cpu()
    n_open = int(is_open.sum())
    cells, doses = chosen_cells(model, is_open.any(1).numpy())
    partners = (doses != 0).astype(np.int32)
    partners = partners.T @ partners  # perturbations that are in the same cells
    evidence, asked = torch.zeros_like(odds), is_open.clone()
    while True:
        if asked.any():
            evidence = torch.where(asked, evidence_for(model, asked, cells, doses), evidence)
        support = torch.where(is_open, evidence, 0.0).sum(0)
        worst_of_latent = evidence == torch.where(is_open, evidence, torch.inf).amin(0)
        outweighed = odds + evidence < 0
        against = is_open & (evidence < 0) & (outweighed | ((support < -MARGIN) & worst_of_latent))
        worst, latent = torch.where(against, evidence, torch.inf).min(dim=1)
        rows = torch.nonzero(worst < 0)[:, 0]
        if not len(rows):
            break
        device = module.effects.mask_logits.device
        module.close_masks(rows.to(device), latent[rows].to(device))
        is_open[rows, latent[rows]] = False
        affected = np.unique(partners[rows.numpy()].nonzero()[1])
        asked = torch.zeros_like(is_open)
        asked[affected] = is_open[affected]
    logger.info("Validation cells closed %d of %d open masks.", n_open - int(is_open.sum()), n_open)


@torch.inference_mode()
def evidence_for(model: SAMSVAE, asked: Tensor, cells: np.ndarray, doses: sp.csr_matrix) -> Tensor:
    """Return the evidence of cells for single masks, nats.

    Parameters
    ----------
    model
        Trained.
    asked
        Which masks, ``(components, latents)``, on the CPU.
    cells
        Indices of the cells.
    doses
        Their doses, cells x components.

    Returns
    -------
    On the CPU, ``(components, latents)``: reconstruction + KL of the basal state without the mask minus that with it,
    mean over eight draws of all open masks' effects and the basal state, summed over the cells of its component; 0 for
    masks that were not asked for or have no cells, and where it is not a number.
    """
    module, adata = model.module, model._validate_anndata()
    total = torch.zeros(asked.shape, dtype=torch.float64)
    has = np.asarray((doses[:, asked.any(1).numpy()] != 0).sum(axis=1)).ravel() > 0
    cells, doses = cells[has], doses[has]
    if not len(cells):
        return total.to(torch.float32)
    logits = module.effects.mask_logits
    kept = logits.clone()
    try:
        logits[kept > 0] = SURE
        globals_ = module.draw_globals(DRAWS, torch.Generator(module.device).manual_seed(0))
    finally:
        logits.copy_(kept)
    for block, (positions, tensors) in enumerate(minibatches(model, adata, cells)):
        inputs = module._get_inference_input(tensors)
        change = torch.zeros(DRAWS, len(inputs["x"]), asked.shape[1], device=module.device)
        before = objectives(module, tensors, globals_, block, None)
        for of_cell, component, latent in turns(doses[positions], asked):
            c, t, z = (index.to(module.device) for index in (of_cell, component, latent))
            change.zero_()[:, c] = module.closing(globals_, inputs["doses"], c, (t, z))
            lost = objectives(module, tensors, globals_, block, change)[c] - before[c]
            total.index_put_((component, latent), lost.cpu().double(), accumulate=True)
    return total.to(torch.float32).nan_to_num(0.0, 0.0, 0.0)


def objectives(module: Any, tensors: dict[str, Tensor], globals_: Any, seed: int, change: Tensor | None) -> Tensor:
    """Return reconstruction + KL of the basal state of each cell, mean over draws, for changed shifts; seeded."""
    inputs = module._get_inference_input(tensors)
    noise = torch.Generator(module.device).manual_seed(seed + 1)  # the same with and without a mask
    outputs = module.inference(**inputs, globals_=globals_, shift_change=change, generator=noise)
    px = module.generative(**module._get_generative_input(tensors, outputs))
    reconstruction, kl = module.local_terms(inputs["x"], outputs, px)
    return (reconstruction + kl).mean(0)


def turns(doses: sp.csr_matrix, asked: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices of cells, components and latents: each cell has a list of masks, and closes one a turn."""
    found = doses.tocoo()
    order = np.argsort(found.row, kind="stable")
    pair, latent = torch.nonzero(asked[torch.as_tensor(found.col[order]).long()], as_tuple=True)
    cell = torch.as_tensor(found.row[order]).long()[pair]
    component = torch.as_tensor(found.col[order]).long()[pair]
    turn = torch.arange(len(cell)) - torch.searchsorted(cell, cell)
    for k in range(int(turn.max()) + 1 if len(turn) else 0):
        yield cell[turn == k], component[turn == k], latent[turn == k]


def chosen_cells(model: SAMSVAE, components: np.ndarray) -> tuple[np.ndarray, sp.csr_matrix]:
    """Return validation cells of the components given by a boolean mask, sorted, and their doses.

    At most 200 of each are chosen (seeded); one that was chosen for one component counts for all that it has.
    """
    rows = np.random.default_rng(0).permutation(np.asarray(model.validation_indices, dtype=np.int64))
    table = dose_table(model, model._validate_anndata())
    doses = table[rows].tocsc()
    chosen = [np.sort(doses.indices[doses.indptr[t] : doses.indptr[t + 1]]) for t in np.flatnonzero(components)]
    cells = np.unique(rows[np.concatenate([c[:MAX_CELLS] for c in chosen])]) if chosen else rows[:0]
    return cells, table[cells].tocsr()
