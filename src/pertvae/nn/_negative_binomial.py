"""Log-probability of counts under a negative binomial with gene-wise dispersion, and its gradient.

With mean mu and inverse dispersion theta,

    log p(x) = x log mu - (x + theta) log(1 + mu / theta) + r(x, theta) - log x!

where ``r(x, theta) = lgamma(x + theta) - lgamma(theta) - x log theta`` is the log of a rising factorial: for an integer
x it is ``sum_{i < x} log(1 + i / theta)``. All counts of a gene share theta, so a table of a few dozen entries a gene
gives the term of nearly every count without a gamma function. ``x log theta`` and ``theta log theta`` are kept out of
it: for near-Poisson genes the sum would be a small difference of large numbers, which float32 cannot hold.

Two ways to the same numbers. On the CPU only non-zero counts are visited and the tables are used. Elsewhere a look at
the counts would make the host wait for the device at every step: there all entries are treated alike, with the gamma
functions that the CPU needs only for counts that no table holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TABLE = 32
"""Counts up to this have an entry in the tables."""
BLOCK = 2**18
"""Elements of a piece that is worked on at a time on the CPU."""


def _wide(theta: Tensor) -> Tensor:
    """Return theta in double precision, where there is one: gamma functions of large arguments are subtracted."""
    return theta if theta.device.type == "mps" else theta.double()


def log_rising(x: Tensor, theta: Tensor) -> Tensor:
    """Return ``lgamma(x + theta) - lgamma(theta) - x log theta`` for any real ``x >= 0``."""
    wide = _wide(theta)
    value = torch.lgamma(x + wide).sub_(torch.lgamma(wide)).addcmul_(x.to(wide.dtype), wide.log(), value=-1)
    return value.to(x.dtype)


def rising_slope(x: Tensor, theta: Tensor) -> Tensor:
    """Return ``digamma(x + theta) - digamma(theta)`` for any real ``x >= 0``."""
    wide = _wide(theta)
    return torch.digamma(x + wide).sub_(torch.digamma(wide)).to(x.dtype)


def _log_weight(x: Tensor, theta: Tensor) -> Tensor:
    """Return ``r(x, theta) - log x!``."""
    return log_rising(x, theta).sub_(torch.lgamma(x + 1))


def _tables(terms: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... rows."""
    return F.pad(torch.cumsum(terms, 0), (0, 0, 1, 0))


class _NonZeros:
    """The non-zero counts of a minibatch on the CPU, cell by cell.

    Parameters
    ----------
    x
        Cells x genes, dense or CSR.
    theta
        Inverse dispersions.
    """

    def __init__(self, x: Tensor, theta: Tensor) -> None:
        self.shape, self.theta = x.shape, theta
        n_cells, n_genes = x.shape
        start = torch.arange(n_cells + 1) * n_genes
        if x.layout == torch.sparse_csr:
            self.value, self.bounds = x.values(), x.crow_indices().long()
            self.flat = x.col_indices() + self.spread(start[:-1])
        else:
            # numpy finds positions several times faster than torch does
            self.flat = torch.from_numpy(np.flatnonzero(x.numpy() != 0))
            self.bounds = torch.searchsorted(self.flat, start)
            self.value = x.reshape(-1).index_select(0, self.flat)
        row = self.value.clamp(max=TABLE).long()
        # position in a flattened table, (TABLE + 1) x genes; and the counts that are in no table
        self.entry = torch.add(self.flat, row - self.spread(torch.arange(n_cells)), alpha=n_genes)
        self.other = torch.from_numpy(np.flatnonzero((row != self.value).numpy()))
        self.below = torch.arange(TABLE, dtype=theta.dtype)[:, None]
        table = _tables(torch.log1p(self.below / theta) - torch.log1p(self.below))
        self.constant = table.view(-1).index_select(0, self.entry)
        if len(self.other):
            gene = self.entry[self.other] % n_genes
            self.constant[self.other] = _log_weight(self.value[self.other], theta[gene])

    def spread(self, per_cell: Tensor) -> Tensor:
        """Return a cell's number at each of its counts."""
        return torch.repeat_interleave(per_cell, self.bounds.diff(), output_size=len(self.value))

    def blocks(self, n_particles: int) -> Iterator[tuple[Any, slice, _Block]]:
        """Yield pieces of one particle, small enough for temporaries to stay in the processor's cache."""
        n_cells, n_genes = self.shape
        step = max(1, BLOCK // max(n_genes, 1))
        for start in range(0, n_cells, step):
            stop = min(start + step, n_cells)
            first, last = int(self.bounds[start]), int(self.bounds[stop])
            block = _Block(
                self.value[first:last],
                self.constant[first:last],
                self.flat[first:last] - start * n_genes,
                self.bounds[start : stop + 1] - first,
            )
            for particle in range(n_particles):
                yield particle, slice(start, stop), block

    def slope(self, weight: Tensor) -> Tensor:
        """Return ``sum_c w_c dr/dtheta`` of each gene, without the derivative of ``x log theta``."""
        # what the entries of a table weigh is gathered first, so that they need not be looked up
        table = _tables((self.theta + self.below).reciprocal_())
        weight = self.spread(weight)
        entries = torch.zeros_like(table).view(-1).scatter_add_(0, self.entry, weight).view_as(table)
        total = (entries * table).sum(0)
        if len(self.other):
            entry = self.entry[self.other]
            gene = entry % self.shape[1]
            missed = rising_slope(self.value[self.other], self.theta[gene]) - table.view(-1)[entry]
            total.index_add_(0, gene, weight[self.other] * missed)
        return total


class _Block(NamedTuple):
    """Consecutive cells of :class:`_NonZeros`."""

    value: Tensor
    constant: Tensor
    flat: Tensor
    bounds: Tensor

    def fit(self, mu: Tensor, log_ratio: Tensor) -> Tensor:
        """Return ``sum_g x (log mu - log(1 + mu / theta)) + r(x, theta) - log x!`` of each cell."""
        at = mu.view(-1).index_select(0, self.flat).log_()
        at.sub_(log_ratio.view(-1).index_select(0, self.flat)).mul_(self.value).add_(self.constant)
        # in double precision, because adding one by one in single precision loses digits
        total = F.pad(torch.cumsum(at, 0, dtype=torch.double), (1, 0))
        return total.index_select(0, self.bounds).diff()

    def excess(self, mu: Tensor) -> Tensor:
        """Return ``x - mu``."""
        excess = mu.neg()
        excess.view(-1).scatter_add_(0, self.flat, self.value)
        return excess


class _AllEntries:
    """All counts of a minibatch, of which none is looked at: for accelerators.

    Parameters
    ----------
    x
        Cells x genes, dense or CSR.
    theta
        Inverse dispersions.
    """

    def __init__(self, x: Tensor, theta: Tensor) -> None:
        self.x, self.theta = x if x.layout == torch.strided else x.to_dense(), theta
        self.constant = _log_weight(self.x, theta).sum(-1)

    def blocks(self, n_particles: int) -> Iterator[tuple[Any, slice, _AllEntries]]:
        """Yield the whole."""
        yield slice(None), slice(None), self

    def fit(self, mu: Tensor, log_ratio: Tensor) -> Tensor:
        """As :meth:`_Block.fit`."""
        return torch.log(mu).sub_(log_ratio).mul_(self.x).sum(-1).add_(self.constant)

    def excess(self, mu: Tensor) -> Tensor:
        """Return ``x - mu``."""
        return self.x - mu

    def slope(self, weight: Tensor) -> Tensor:
        """As :meth:`_NonZeros.slope`."""
        return weight @ rising_slope(self.x, self.theta)


class _LogProb(torch.autograd.Function):
    """Log-probability summed over genes, given means, or given logits and library sizes.

    Forward and backward go through the means piece by piece, and the backward pass computes anew what it needs: fresh
    memory of the size of the decoder's output costs more than the logarithms that would be stored in it.
    """

    @staticmethod
    def forward(
        ctx: Any, means: Tensor, theta: Tensor, x: Tensor, library: Tensor | None, floor: float, look: bool
    ) -> Tensor:
        counts = (_NonZeros if look else _AllEntries)(x.to(means.dtype), theta)
        particles = means.reshape(-1, *means.shape[-2:])
        value = torch.empty_like(particles[..., 0])
        for particle, cells, block in counts.blocks(len(particles)):
            mu, _, _ = _from_logits(particles[particle, cells], library, cells, floor)
            log_ratio = (mu / theta).log1p_()
            value[particle, cells] = block.fit(mu, log_ratio) - log_ratio @ theta
        ctx.counts, ctx.floor = counts, floor
        ctx.save_for_backward(means, theta, library)
        return value.view(means.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        means, theta, library = ctx.saved_tensors
        particles = means.reshape(-1, *means.shape[-2:])
        weight = gradients[0].reshape(particles.shape[:-1])
        to_means = torch.empty_like(particles)
        to_theta = ctx.counts.slope(weight.sum(0))
        for particle, cells, block in ctx.counts.blocks(len(particles)):
            mu, scaled, share = _from_logits(particles[particle, cells], library, cells, ctx.floor)
            w = weight[particle, cells]
            # with q = (x - mu) / (mu + theta): the gradient of mu is q theta / mu,
            # that of theta -q - log(1 + mu / theta) and the slope of r
            q = block.excess(mu).div_(mu + theta)
            to_theta -= w.reshape(-1) @ (mu / theta).log1p_().add_(q).flatten(0, -2)
            q.mul_(theta).div_(mu)
            if share is not None:
                q.mul_(scaled)
                q.addcmul_(share, q.sum(-1, keepdim=True), value=-1)
            torch.mul(q, w[..., None], out=to_means[particle, cells])
        return to_means.view(means.shape), to_theta, None, None, None, None


def _from_logits(
    values: Tensor, library: Tensor | None, cells: slice, floor: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ``library softmax(values) + floor``, the same without the floor, and the softmax; or means as they are."""
    if library is None:
        return values.contiguous(), None, None
    share = torch.softmax(values, -1)
    scaled = share * library[cells]
    return scaled + floor, scaled, share


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor, *, look: bool | None = None) -> Tensor:
    """Return the summed log-probability of counts under a negative binomial with gene-wise dispersion.

    Mean ``mu``, variance ``mu + mu^2 / theta``. Terms without the mean are computed once a cell, not once a
    particle. Exact, for values that are no integers too; counts have no gradient, and there is no second derivative.

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``, dense or a sparse CSR tensor.
    mu
        Means, ``(..., cells, genes)``, positive.
    theta
        Inverse dispersion of each gene, ``(genes,)``, positive.
    look
        Find the non-zero counts first, which only tensors on the CPU can; by default they do.

    Returns
    -------
    ``(..., cells)``, nats.
    """
    look = mu.device.type == "cpu" if look is None else look
    return _LogProb.apply(mu, theta.to(mu.dtype), x, None, 0.0, look)


def softmax_nb_log_prob(
    x: Tensor, logits: Tensor, library: Tensor, theta: Tensor, *, floor: float, look: bool | None = None
) -> Tensor:
    """Return :func:`nb_log_prob` at the means ``library * softmax(logits) + floor``, without storing them.

    Parameters
    ----------
    x
        Counts, ``(cells, genes)``, dense or a sparse CSR tensor.
    logits
        ``(..., cells, genes)``.
    library
        Counts of each cell, ``(cells, 1)``; without a gradient.
    theta
        Inverse dispersion of each gene, ``(genes,)``, positive.
    floor
        Added to every mean.
    look
        As in :func:`nb_log_prob`.

    Returns
    -------
    ``(..., cells)``, nats.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    look = logits.device.type == "cpu" if look is None else look
    library = library.to(dtype).expand(len(x), 1)
    return _LogProb.apply(logits.to(dtype), theta.to(dtype), x, library, floor, look)
