"""Average treatment effects as the authors of SAMS-VAE measure them (Bereket & Karaletsos 2023, arXiv 2311.02794).

``n_samples`` particles, each with one draw of masks and effects shared by all labels, a basal state from the prior
drawn anew for the control and for each label, and counts *sampled* at a library of 10,000. The effect of a label is
the mean of its particles minus that of the control's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import norm

from pertvae._constants import CP10K
from pertvae.models.base._requests import Request, dose_tensors
from pertvae.models.base._streams import purpose_seed

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

PAPER_SPACES = ("log2_cp10k", "log1p_cp10k", "mean")
PAPER_LIBRARY = CP10K
PAPER_SAMPLES = 2_500
_BLOCK = 256  # particles decoded at a time: a bound on memory, and on what the draws depend on


def paper_effects(
    model: PerturbationModel, requests: Sequence[Request], n_samples: int, space: str, credible: float, seed: int
) -> np.ndarray:
    """Return mean, lower and upper of the effects, ``(3, requests, genes)``.

    The interval is the estimate's Monte-Carlo error, ``mean +- q sqrt(v_label / P + v_control / P)`` with the
    variances over P particles: the particles hold cells and sampled counts, so that their spread says nothing of the
    uncertainty of an average.

    Parameters
    ----------
    model
        A trained model.
    requests
        What is asked for.
    n_samples
        Particles.
    space
        One of ``PAPER_SPACES``.
    credible
        Mass of the interval.
    seed
        Of the draws.
    """
    covariates = _particle_covariates(model, n_samples, seed)
    name = model.label_format.control[0]
    control = Request(name, name, {})
    base, base_variance = _moments(model, control, covariates, n_samples, space, seed)
    tables = np.zeros((3, len(requests), len(base)), np.float32)
    quantile = norm.ppf((1 + credible) / 2)
    for i, request in enumerate(requests):
        if not request.doses:
            continue  # the control against itself
        mean, variance = _moments(model, request, covariates, n_samples, space, seed)
        margin = quantile * np.sqrt((variance + base_variance) / n_samples)
        tables[:, i] = mean - base, mean - base - margin, mean - base + margin
    return tables


def paper_samples(
    model: PerturbationModel, request: Request, covariates: torch.Tensor | None, n_samples: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield blocks of sampled expression of one label, particles x genes, float64.

    Parameters
    ----------
    model, request, n_samples, seed
        See :func:`paper_effects`.
    covariates
        Covariate vector of each particle, or ``None``.
    """
    module = model.module
    row = dose_tensors(model, request)[2]
    shift = _offsets(model, request, n_samples, seed)
    # a stream for each label: the other labels asked for do not matter
    basal, counts = (_stream(seed, f"{purpose} of paper", request.key) for purpose in ("basal", "counts"))
    for start in range(0, n_samples, _BLOCK):
        n = min(_BLOCK, n_samples - start)
        z = torch.as_tensor(basal.standard_normal((n, module.n_latent), dtype=np.float32), device=model.device)
        if shift is not None:
            z = z + shift[start : start + n]
        size = torch.full((n, 1), PAPER_LIBRARY, device=model.device)
        px = module.decode(z, row, None if covariates is None else covariates[start : start + n], size)
        mean = px.mean.cpu().numpy().astype(np.float64)
        scale = module.decoder.scale.cpu().numpy() if module.gene_likelihood != "poisson" else None
        if module.gene_likelihood == "normal":
            yield mean + scale * counts.standard_normal(mean.shape)
            continue
        rate = mean if scale is None else counts.standard_gamma(scale, mean.shape) * (mean / scale)
        yield counts.poisson(rate).astype(np.float64)


def paper_transform(x: np.ndarray, space: str) -> np.ndarray:
    """Return sampled counts in a space: ``log2(1 + 1e4 x / sum x)``, its natural logarithm, or as they are."""
    if space == "mean":
        return x
    total = x.sum(axis=1, keepdims=True)
    y = np.log1p(CP10K * x / np.maximum(total, 1.0))  # an empty cell gives zeros
    return y / np.log(2) if space == "log2_cp10k" else y


def _moments(
    model: PerturbationModel,
    request: Request,
    covariates: torch.Tensor | None,
    n_samples: int,
    space: str,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over particles of every gene."""
    genes = model.module.shape.n_genes
    total, squares = np.zeros(genes), np.zeros(genes)
    for x in paper_samples(model, request, covariates, n_samples, seed):
        y = x if model.module.gene_likelihood == "normal" else paper_transform(x, space)
        total += y.sum(axis=0)
        squares += (y**2).sum(axis=0)
    mean = total / n_samples
    return mean, np.maximum(squares / n_samples - mean**2, 0.0) * n_samples / (n_samples - 1)


def _offsets(model: PerturbationModel, request: Request, n_samples: int, seed: int) -> torch.Tensor | None:
    """Return the latent shift of each particle; a component has the same draws in every label that contains it."""
    if not request.doses:
        return None
    module = model.module
    shape = (n_samples, module.n_latent)
    uniform, normal = [], []
    for component in request.doses:
        stream = _stream(seed, "effects of paper", component)
        uniform.append(stream.random(shape, dtype=np.float32))
        normal.append(stream.standard_normal(shape, dtype=np.float32))
    components, doses, _ = dose_tensors(model, request)
    noise = (torch.as_tensor(np.stack(parts, axis=1), device=model.device) for parts in (uniform, normal))
    # the paper draws masks and effects and corrects nothing
    return module.draw_offset(components, doses, *noise) - module.leak_shift(components, doses)


def _particle_covariates(model: PerturbationModel, n_samples: int, seed: int) -> torch.Tensor | None:
    """Return covariates of a drawn control cell for each particle, the same for all labels; ``None`` without any."""
    if not model.module.shape.n_covariates:
        return None
    adata = model._validate_anndata(None)
    _, covariates = model._control_states(adata, n_samples)
    assert covariates is not None
    drawn = _stream(seed, "covariates of paper", "").integers(len(covariates), size=n_samples)
    return covariates[torch.as_tensor(drawn, device=covariates.device)]


def _stream(seed: int, purpose: str, key: str) -> np.random.Generator:
    return np.random.default_rng(purpose_seed(seed, f"{purpose}\x00{key}"))
