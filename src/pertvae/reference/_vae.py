"""scVI as a tool: trained on counts, then an encoder and a decoder in numpy. torch is imported on first use only."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._expression import row_blocks
from pertvae._labels import hint

LIKELIHOODS = ("zinb", "nb", "poisson")
_MAX_RATE = 1e8
_LOUD = ("scvi", "lightning", "lightning.pytorch", "lightning.fabric")
_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "XLA_FLAGS")
_MIN_FOR_VALIDATION = 20
_BATCH_KEY = "batch"


@dataclass
class Expected:
    """What the decoder expects of some cells.

    Parameters
    ----------
    mean
        Expected counts before zero inflation, cells x genes, float64.
    inverse_dispersion
        Of each gene, or of each cell and gene; ``None`` for Poisson counts.
    zeros
        Probability of an excess zero, cells x genes; ``None`` without zero inflation.
    """

    mean: np.ndarray
    inverse_dispersion: np.ndarray | None
    zeros: np.ndarray | None

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Return counts, cells x genes; with the same generator fewer cells give the same first cells."""
        factors, draws, excess = rng.spawn(3)
        rate = self.mean
        if self.inverse_dispersion is not None:
            shape = np.broadcast_to(self.inverse_dispersion, rate.shape)
            rate = factors.standard_gamma(shape) * (rate / shape)
        counts = draws.poisson(np.minimum(rate, _MAX_RATE))
        if self.zeros is not None:
            counts[excess.random(counts.shape) < self.zeros] = 0
        return counts


@dataclass
class TrainedVAE:
    """A trained scVI on the CPU, without its data.

    Parameters
    ----------
    module
        The ``scvi.module.VAE``, in evaluation mode.
    batches
        Technical batches it knows, in the order of its codes; empty without batches.
    epochs
        Epochs it was trained for.
    """

    module: Any
    batches: list[str]
    epochs: int

    def codes(self, batches: np.ndarray | None, n: int) -> np.ndarray:
        """Return the batch code of each of ``n`` cells."""
        if not self.batches or batches is None:
            return np.zeros(n, dtype=np.int64)
        codes = pd.Index(self.batches).get_indexer(pd.Index(batches))
        if (codes < 0).any():
            strange = batches[int(np.flatnonzero(codes < 0)[0])]
            raise KeyError(f"batch {strange!r} of the source cells has no training cells.{hint(strange, self.batches)}")
        return codes

    def encode(self, x: Any, batches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the posterior of the latents, cells x latents, before any transform.

        Parameters
        ----------
        x
            Counts, cells x genes.
        batches
            Batch codes of the cells.
        """
        import torch

        means, sds = [], []
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):  # the encoder draws, too
            for rows, block in row_blocks(x):
                dense = (block.toarray() if sp.issparse(block) else block).astype(np.float32)
                codes = torch.from_numpy(batches[rows][:, None])
                q = self.module.inference(x=torch.from_numpy(dense), batch_index=codes)["qz"]
                means.append(q.loc.numpy())
                sds.append(q.scale.numpy())
        return np.concatenate(means), np.concatenate(sds)

    def decode(self, latents: np.ndarray, libraries: np.ndarray, batches: np.ndarray) -> Expected:
        """Return what is expected of cells.

        Parameters
        ----------
        latents
            Before any transform, cells x latents.
        libraries
            Total counts of each cell.
        batches
            Batch codes of the cells.
        """
        import torch

        with torch.inference_mode(), np.errstate(divide="ignore"):
            px = self.module.generative(
                z=self.module.z_encoder.z_transformation(torch.from_numpy(latents.astype(np.float32))),
                library=torch.from_numpy(np.log(libraries.astype(np.float32))[:, None]),
                batch_index=torch.from_numpy(batches[:, None]),
                y=torch.zeros(len(latents), 1, dtype=torch.int64),
            )["px"]
            if self.module.gene_likelihood == "poisson":
                return Expected(px.rate.double().numpy(), None, None)
            zeros = px.zi_probs.double().numpy() if self.module.gene_likelihood == "zinb" else None
            return Expected(px.mu.double().numpy(), px.theta.double().numpy(), zeros)


def train_vae(
    x: sp.csr_matrix,
    batches: np.ndarray | None,
    *,
    max_epochs: int | None,
    model_kwargs: Mapping[str, Any],
    train_kwargs: Mapping[str, Any],
    seed: int,
) -> TrainedVAE:
    """Train ``scvi.model.SCVI`` on cells that have counts as scvi-tools does by default, and keep its network alone.

    Parameters
    ----------
    x
        Counts of the training cells.
    batches
        Technical batch of each, or ``None``.
    max_epochs, model_kwargs, train_kwargs
        As in ``scvi.model.SCVI`` and its ``train``.
    seed
        Seed of scvi-tools during training.
    """
    import torch
    from scvi import REGISTRY_KEYS
    from scvi.model import SCVI

    filled = np.diff(x.indptr) > 0  # the logarithm of an empty library stops the training of some likelihoods
    x, batches = x[filled], None if batches is None else batches[filled]
    n = x.shape[0]
    cells = pd.Index(np.arange(n).astype(str))
    obs = pd.DataFrame(index=cells) if batches is None else pd.DataFrame({_BATCH_KEY: pd.Categorical(batches)}, cells)
    own = AnnData(x, obs=obs)
    # without validation cells there is nothing to stop by
    validated = n >= _MIN_FOR_VALIDATION and float(train_kwargs.get("train_size") or 0.9) < 1
    arguments = {"early_stopping": validated, "enable_progress_bar": False, "max_epochs": max_epochs, **train_kwargs}
    with session(seed):
        SCVI.setup_anndata(own, batch_key=None if batches is None else _BATCH_KEY)
        model = SCVI(own, **model_kwargs)
        try:
            model.train(**arguments)
            known = model.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
            epochs = int(model.trainer.current_epoch)
        finally:
            model.deregister_manager(own)  # the class would keep the counts in memory for good
        module = model.module.to(torch.device("cpu")).eval()
    return TrainedVAE(module, [] if batches is None else [str(b) for b in known], epochs)


@contextlib.contextmanager
def session(seed: int) -> Iterator[None]:
    """Seed and silence scvi-tools and Lightning inside, and leave everything as it was.

    That is scvi-tools' seed, the random states of Python, numpy and torch, the flags and variables that seeding sets,
    levels of loggers and warning filters.
    """
    import torch
    from scvi import settings

    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    before = settings.seed
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - Lightning seeds the global state
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),  # scvi-tools prints why training stopped
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            settings.seed = seed
            yield
        finally:
            settings.seed = before  # seeds again unless None, and what that does is undone here
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
