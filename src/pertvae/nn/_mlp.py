"""Multilayer perceptrons shared by the methods: LeakyReLU, no normalisation layers, residual beyond the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.01
VARIANCE_FLOOR = 1e-4


class PartsLinear(nn.Linear):
    """Linear layer that takes its input in parts.

    The parts are multiplied by their own columns of one weight matrix and summed, which equals concatenation but
    lets parts with fewer leading dimensions (expression, once a cell) meet parts with more (offsets, once a
    particle) without copies.

    Parameters
    ----------
    n_in
        Width of each part; a width of 0 stands for an absent part.
    n_out
        Width of the output.
    """

    def __init__(self, n_in: Sequence[int], n_out: int) -> None:
        super().__init__(sum(n_in), n_out)
        self.n_in = tuple(n_in)

    def forward(self, *parts: Tensor | None, standardize: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the output.

        Parameters
        ----------
        *parts
            One tensor a part, last dimension as ``n_in`` says; ``None`` for absent parts.
        standardize
            Mean and standard deviation of the first part's features. They are folded into the weights, so that the
            cells x genes matrix is read once.
        """
        h: Tensor | None = None
        for i, (part, weight) in enumerate(zip(parts, self.weight.split(self.n_in, dim=1), strict=True)):
            if part is None or weight.shape[1] == 0:
                continue
            if i == 0 and standardize is not None:
                mean, sd = standardize
                weight = weight / sd
                term = F.linear(part, weight, -(weight @ mean))
            else:
                term = F.linear(part, weight)
            h = term if h is None else h + term
        assert h is not None
        return h + self.bias

    @torch.no_grad()
    def rotate_input(self, part: int, rotation: Tensor) -> None:
        """Turn the weights of one part, so that the output for ``part @ rotation`` is that for ``part`` before.

        Parameters
        ----------
        part
            Its position; an absent part (width 0) is left alone.
        rotation
            Orthogonal, as wide as the part.
        """
        weight = self.weight.split(self.n_in, dim=1)[part]
        if weight.shape[1]:
            weight.copy_(weight @ rotation)


class MLP(nn.Module):
    """Perceptron whose first layer takes its input in parts.

    Parameters
    ----------
    n_in
        Width of each part, see :class:`PartsLinear`.
    n_hidden
        Width of every hidden layer.
    n_layers
        Hidden layers, at least 1; those beyond the first are residual: ``h + LeakyReLU(W h + b)``.
    """

    def __init__(self, n_in: Sequence[int], n_hidden: int, n_layers: int = 1) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers}: at least one hidden layer is needed.")
        self.first = PartsLinear(n_in, n_hidden)
        self.rest = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))

    def forward(self, *parts: Tensor | None, standardize: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the last hidden layer; arguments as of :meth:`PartsLinear.forward`."""
        return self._deeper(F.leaky_relu(self.first(*parts, standardize=standardize), SLOPE))

    def _deeper(self, h: Tensor) -> Tensor:
        for layer in self.rest:
            h = h + F.leaky_relu(layer(h), SLOPE)
        return h

    def at_zero(self) -> Tensor:
        """Return the last hidden layer for an input of zeros, ``(n_hidden,)``."""
        return self._deeper(F.leaky_relu(self.first.bias, SLOPE))


class GaussianHead(nn.Module):
    """Mean and standard deviation of a diagonal Gaussian: variance = exp(Linear) + 1e-4."""

    def __init__(self, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.mean = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation."""
        return self.mean(h), (self.log_variance(h).exp() + VARIANCE_FLOOR).sqrt()

    @torch.no_grad()
    def rotate(self, rotation: Tensor, at: Tensor) -> None:
        """Turn the Gaussian: means exactly, variances as well as a diagonal can.

        The rotated covariance has the variances ``v @ rotation^2`` and covariances that a diagonal drops. The linear
        head of their logs is exact to first order around ``at``.

        Parameters
        ----------
        rotation
            Orthogonal, ``(n_out, n_out)``; values are turned as ``value @ rotation``.
        at
            A typical hidden layer, ``(n_hidden,)``.
        """
        self.mean.weight.copy_(rotation.T @ self.mean.weight)
        self.mean.bias.copy_(self.mean.bias @ rotation)
        before = self.log_variance(at).exp()
        after = before @ rotation.square()
        jacobian = rotation.square() * before[:, None] / after
        self.log_variance.weight.copy_(jacobian.T @ self.log_variance.weight)
        self.log_variance.bias.copy_(after.log() - self.log_variance.weight @ at)


def gaussian_kl(mean: Tensor, sd: Tensor, prior_sd: float = 1.0) -> Tensor:
    """Return KL(N(mean, sd^2) || N(0, prior_sd^2)) of every entry, nats."""
    ratio = sd / prior_sd
    return 0.5 * (ratio.square() + (mean / prior_sd).square() - 1.0) - torch.log(ratio)
