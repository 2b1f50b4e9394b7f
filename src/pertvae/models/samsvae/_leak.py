"""What the training cells' posterior of the basal state says about their perturbations.

The basal state should be free of the perturbation. A sparse effect leaves small parts of a shift unexplained, and the
encoder puts them into the basal state of these cells, so that predictions for control cells lack them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch

from pertvae.models.base._access import covariate_groups, minibatches
from pertvae.models.base._posterior_shifts import shrunken_shifts

if TYPE_CHECKING:
    from pertvae.models.base import PerturbationModel


@torch.inference_mode()
def training_posteriors(model: PerturbationModel) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """Return posterior means of the basal state, responses to the doses and covariate groups of the training cells."""
    adata = model._validate_anndata()
    rows = np.sort(np.asarray(model.train_indices, dtype=np.int64))
    means = np.empty((len(rows), model.module.n_latent), np.float32)
    responses = []
    for positions, tensors in minibatches(model, adata, rows):
        n = len(positions)
        inputs = model.module._get_inference_input(tensors)
        means[positions] = model.module.basal_posterior(inputs)[0][:n].cpu().numpy()
        responses.append(sp.csr_matrix(model.module.respond(inputs["doses"])[:n].cpu().numpy()))
    return means, sp.vstack(responses, format="csr"), covariate_groups(model.adata_manager)[rows]


def correct_leak(model: PerturbationModel) -> None:
    """Move the perturbations' part of the basal states to the shifts of :class:`SAMSVAEModule`."""
    module = model.module
    with torch.no_grad():
        module.leak.zero_()
        tables = shrunken_shifts(*training_posteriors(model))
        for buffer, table in zip((module.leak, module.leak_sd), tables, strict=True):
            buffer.copy_(torch.as_tensor(table, dtype=torch.float32))
