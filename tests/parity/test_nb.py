"""Likelihoods against scvi-tools, torch and scipy: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from scvi.distributions import NegativeBinomial
from scvi.distributions._negative_binomial import log_nb_positive
from torch import Tensor
from torch.distributions import Gamma, Normal, Poisson
from torch.utils._python_dispatch import TorchDispatchMode

from pertvae.nn import ExpressionDecoder, _negative_binomial, nb_log_prob, poisson_log_prob
from pertvae.nn._negative_binomial import TABLE, log_rising, rising_slope, softmax_nb_log_prob

CELLS, GENES = 24, 60


def draw(dtype: torch.dtype, log_theta: float = 0.0, spread: float = 1.0, particles: int = 0) -> tuple[Tensor, ...]:
    """Counts from 0 to 10,000, means from 0.01 to 10,000, dispersions around ``exp(log_theta)``."""
    g = torch.Generator().manual_seed(1)
    shape = (particles, CELLS, GENES) if particles else (CELLS, GENES)
    mu = torch.exp(torch.empty(shape).uniform_(np.log(0.01), np.log(1e4), generator=g))
    theta = torch.exp(log_theta + spread * torch.randn(GENES, generator=g))
    x = torch.poisson(mu[0] if particles else mu, generator=g)
    x[:, :20] = 0.0
    x[0, 20:24] = 1e4
    return x.to(dtype), mu.to(dtype), theta.to(dtype)


def scvi_nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    return NegativeBinomial(mu=mu, theta=theta).log_prob(x).sum(-1)


def value_and_gradients(f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    leaves = [p.clone().requires_grad_() for p in parameters]
    value = f(x, *leaves)
    # unequal weights of particles and cells, so that a permutation or a plain sum would show
    weight = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weight).sum().backward()
    return (value.detach(), *(p.grad for p in leaves))  # type: ignore[misc]


# the CPU looks at the counts, an accelerator does not: both run here
both_ways = pytest.mark.parametrize("look", [True, False])


@both_ways
@pytest.mark.parametrize("particles", [0, 1, 4])
def test_negative_binomial_is_scvis(particles: int, look: bool) -> None:
    x, mu, theta = draw(torch.float64, particles=particles)
    ours = value_and_gradients(partial(nb_log_prob, look=look), x, mu, theta)
    theirs = value_and_gradients(scvi_nb, x, mu, theta)
    assert ours[0].shape == ((particles, CELLS) if particles else (CELLS,))
    for a, b in zip(ours, theirs, strict=True):
        # the absolute part is for entries at which a gradient crosses zero
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().median()))


@both_ways
@pytest.mark.parametrize("particles", [0, 4])
def test_negative_binomial_is_scvis_in_single_precision(particles: int, look: bool) -> None:
    x, mu, theta = draw(torch.float32, particles=particles)
    x, mu = x.clamp(max=100.0), mu.clamp(max=100.0)
    ours = value_and_gradients(partial(nb_log_prob, look=look), x, mu, theta)
    theirs = value_and_gradients(scvi_nb, x, mu, theta)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0.0)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@both_ways
def test_large_counts_in_single_precision_are_as_good_as_scvis(look: bool) -> None:
    # lgamma(10,000) has no more than 1e-2 nats in float32, in either implementation
    x, mu, theta = draw(torch.float32)
    exact = nb_log_prob(x.double(), mu.double(), theta.double())
    ours, theirs = nb_log_prob(x, mu, theta, look=look) - exact, scvi_nb(x, mu, theta) - exact
    assert ours.abs().max() < 1.5 * theirs.abs().max() < 0.1


def without_eps(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """scvi-tools' formula without the 1e-8 that it adds inside logarithms."""
    return log_nb_positive(x, mu, theta, eps=0.0).sum(-1)


@both_ways
@pytest.mark.parametrize("sparse", [False, True])
def test_every_size_of_count_and_dispersion(look: bool, sparse: bool) -> None:
    """Counts of 0, in the table, around its end, beyond it, and in the millions; dispersions from 1e-3 to 1e6."""
    counts = torch.tensor([0, 1, 2, TABLE - 1, TABLE, TABLE + 1, 500, 20_000, 3_000_000]).double()
    theta = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e2, 1e4, 1e6]).double().repeat_interleave(len(counts))
    x = torch.stack([counts.repeat(7), counts.flip(0).repeat(7), torch.zeros(63).double()])
    mu = torch.stack([x[0].clamp(min=0.01) * 1.7, torch.full((63,), 1e-4), torch.full((63,), 30.0)]).double()
    # one gene at a time, so that a large term cannot hide the error of a small one
    for gene in range(63):
        ours = value_and_gradients(
            lambda x, *p: nb_log_prob(x.to_sparse_csr() if sparse else x, *p, look=look),
            *(v[..., gene : gene + 1] for v in (x, mu, theta)),
        )
        theirs = value_and_gradients(without_eps, *(v[..., gene : gene + 1] for v in (x, mu, theta)))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-7)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-7, atol=1e-9)
        # where theta is large its gradient is the difference of terms near x / theta, of which autograd loses digits
        scale = float((x[:, gene] / theta[gene]).max())
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-7, atol=1e-9 + 1e-8 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rising_factorial_at_any_real_count(dtype: torch.dtype) -> None:
    x = torch.cat([torch.zeros(1), torch.arange(50), torch.logspace(-2, 6, 60)]).to(dtype)
    rtol = 1e-6 if dtype == torch.float32 else 1e-8
    for value in (1e-3, 0.3, 30.0, 1e3, 1e6):
        theta = torch.tensor([value], dtype=dtype)
        t, wide = float(theta), x.double().numpy()
        exact = special.gammaln(wide + t) - special.gammaln(t) - wide * np.log(t)
        np.testing.assert_allclose(log_rising(x, theta).numpy(), exact, rtol=rtol, atol=2e-8)
        # the tables hold the same numbers as sums
        steps = torch.log1p(torch.arange(49) / theta.double()).cumsum(0)
        torch.testing.assert_close(log_rising(x[2:51], theta).double(), steps, rtol=rtol, atol=2e-8)
        exact = special.digamma(wide + t) - special.digamma(t)
        np.testing.assert_allclose(rising_slope(x, theta).numpy(), exact, rtol=rtol, atol=1e-14)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_csr_equals_dense(look: bool, dtype: torch.dtype) -> None:
    x, mu, theta = draw(dtype, particles=2)
    x[3] = 0.0  # an empty cell
    x[5, 7] += 0.25
    dense = value_and_gradients(partial(nb_log_prob, look=look), x, mu, theta)
    for index in (torch.int32, torch.int64):
        s = x.to_sparse_csr()
        csr = torch.sparse_csr_tensor(s.crow_indices().to(index), s.col_indices().to(index), s.values(), s.shape)
        sparse = value_and_gradients(lambda _, *p, csr=csr: nb_log_prob(csr, *p, look=look), x, mu, theta)
        for a, b in zip(sparse, dense, strict=True):
            assert torch.equal(a, b)


@both_ways
def test_particles_equal_a_loop(look: bool) -> None:
    x, mu, theta = draw(torch.float64, particles=6)
    mu = mu.view(2, 3, CELLS, GENES)
    together = value_and_gradients(partial(nb_log_prob, look=look), x, mu, theta)

    def loop(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        return torch.stack([torch.stack([nb_log_prob(x, m, theta, look=look) for m in row]) for row in mu])

    for a, b in zip(together, value_and_gradients(loop, x, mu, theta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mu, theta = draw(torch.float64, particles=2)
    library = x.sum(-1, keepdim=True)

    def fused(x: Tensor, logits: Tensor, theta: Tensor) -> Tensor:
        return softmax_nb_log_prob(x, logits, library, theta, floor=1e-4)

    whole = value_and_gradients(nb_log_prob, x, mu, theta)
    whole_fused = value_and_gradients(fused, x, mu.log(), theta)
    for block in (1, 5 * GENES):
        monkeypatch.setattr(_negative_binomial, "BLOCK", block)
        pieces = value_and_gradients(nb_log_prob, x, mu, theta)
        pieces_fused = value_and_gradients(fused, x, mu.log(), theta)
        for a, b in zip((*pieces, *pieces_fused), (*whole, *whole_fused), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_many_cells_in_single_precision() -> None:
    # the sums of the cells must not be differences of a running total
    g = torch.Generator().manual_seed(5)
    mu = torch.exp(torch.randn(500, 500, generator=g))
    x, theta = torch.poisson(mu, generator=g), torch.ones(500)
    error = nb_log_prob(x, mu, theta) - nb_log_prob(x.double(), mu.double(), theta.double())
    assert error.abs().max() < 5e-4


@both_ways
def test_gradients_are_the_values_differences(look: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.tensor(
        [[0.0, 1.0, 3.0, 40.0], [2.0, 0.0, 0.0, 700.0], [0.5, 0.0, 33.3, 2.0], [0.0, 0.0, 0.0, 0.0]]
    ).double()
    mu = torch.rand(2, 4, 4, dtype=torch.float64, generator=g).mul_(9).add_(0.1).requires_grad_()
    logits = torch.randn(2, 4, 4, dtype=torch.float64, generator=g).requires_grad_()
    theta = torch.tensor([0.05, 1.0, 31.0, 33.0], dtype=torch.float64, requires_grad=True)
    library = torch.tensor([[10.0], [300.0], [20.0], [5.0]]).double()
    assert torch.autograd.gradcheck(lambda m, t: nb_log_prob(x, m, t, look=look), (mu, theta))
    assert torch.autograd.gradcheck(
        lambda o, t: softmax_nb_log_prob(x, o, library, t, floor=1e-4, look=look), (logits, theta)
    )


@both_ways
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_fused_with_the_softmax(look: bool, shape: tuple[int, ...]) -> None:
    """Equals the likelihood of the means, which equals scvi-tools'; leaves its inputs as they were."""
    x, _, theta = draw(torch.float64)
    g = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(*shape, CELLS, GENES, dtype=torch.float64, generator=g)
    library = x.sum(-1, keepdim=True)
    before = [v.clone() for v in (x, logits, theta, library)]

    def fused(x: Tensor, logits: Tensor, theta: Tensor) -> Tensor:
        return softmax_nb_log_prob(x, logits, library, theta, floor=1e-4, look=look)

    def plain(x: Tensor, logits: Tensor, theta: Tensor) -> Tensor:
        return without_eps(x, library * torch.softmax(logits, -1) + 1e-4, theta)

    ours, theirs = value_and_gradients(fused, x, logits, theta), value_and_gradients(plain, x, logits, theta)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().median()))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, logits, theta, library), strict=True))


@both_ways
def test_backward_twice(look: bool) -> None:
    x, mu, theta = draw(torch.float64)
    mu.requires_grad_()
    theta.requires_grad_()
    value = nb_log_prob(x, mu, theta, look=look).sum()
    first = torch.autograd.grad(value, (mu, theta), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value, (mu, theta)), strict=True):
        assert torch.equal(a, b)


class NoLook(TorchDispatchMode):
    """Fails on operations that make the host wait for values that a device holds."""

    WAITING = ("nonzero", "_local_scalar_dense", "item", "unique", "masked_select", "is_nonzero", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        boolean = name.startswith("index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in (args[1] if name == "index" else ())
        )
        if name in self.WAITING or boolean:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def decoder_step(x: Tensor, look: bool | None) -> None:
    """Forward and backward of a decoder and its likelihood, two particles."""
    decoder = ExpressionDecoder(5, 0, GENES, n_hidden=16).to(x.device)
    logits = decoder.out(decoder.mlp(torch.randn(2, CELLS, 5, device=x.device), None))
    library = x.sum(-1, keepdim=True)
    softmax_nb_log_prob(x, logits, library, decoder.scale, floor=1e-4, look=look).mean().backward()
    mu = torch.rand(CELLS, GENES, device=x.device, requires_grad=True)
    nb_log_prob(x, mu, decoder.scale, look=look).mean().backward()


def test_an_accelerator_is_not_waited_for() -> None:
    x = draw(torch.float32)[0]
    with NoLook() as mode:
        decoder_step(x, look=False)
    assert {"lgamma", "digamma", "log1p_"} <= mode.seen  # forward and backward both ran under the mode
    with pytest.raises(RuntimeError, match="waits for the device"), NoLook():
        decoder_step(x, look=True)
    # a tensor without values cannot be looked at: what is no CPU tensor takes the other way by itself
    decoder_step(torch.empty(CELLS, GENES, device="meta"), look=None)
    decoder = ExpressionDecoder(5, 0, GENES, n_hidden=16).to("meta")
    x = torch.empty(CELLS, GENES, device="meta")
    px = decoder(torch.empty(2, CELLS, 5, device="meta"), None, torch.empty(CELLS, 1, device="meta"))
    decoder.log_prob(px, x).mean().backward()


def test_tiny_means() -> None:
    # scvi-tools adds 1e-8 inside logarithms, which is felt at the mean floor: with that off the numbers agree
    theta = torch.exp(torch.randn(GENES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mu = torch.full((CELLS, GENES), 1e-4, dtype=torch.float64)
    zeros, ones = torch.zeros_like(mu), torch.ones_like(mu)

    for x in (zeros, ones, 40 * ones):
        ours, theirs = value_and_gradients(nb_log_prob, x, mu, theta), value_and_gradients(without_eps, x, mu, theta)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
    ours, theirs = value_and_gradients(nb_log_prob, zeros, mu, theta), value_and_gradients(scvi_nb, zeros, mu, theta)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(nb_log_prob(ones, mu, theta), scvi_nb(ones, mu, theta), rtol=2e-5, atol=0.0)


def test_negative_binomial_is_a_gamma_poisson_with_the_published_rate() -> None:
    # concentration theta, rate theta / (mu + 1e-4), integrated numerically over the gamma's quantiles
    theta, mu, x = 1.7, 3.2, 5.0
    rate = Gamma(torch.tensor(theta, dtype=torch.float64), theta / (mu + 1e-4))
    grid = torch.linspace(1e-6, 60.0, 200_001, dtype=torch.float64)
    density = (rate.log_prob(grid) + Poisson(grid).log_prob(torch.tensor(x, dtype=torch.float64))).exp()
    exact = torch.trapezoid(density, grid).log()
    ours = nb_log_prob(torch.tensor([[x]]).double(), torch.tensor([[mu + 1e-4]]).double(), torch.tensor([theta]))
    torch.testing.assert_close(ours[0], exact, rtol=1e-6, atol=1e-4)


@both_ways
@pytest.mark.parametrize("log_theta", [0.0, 4.0, 8.0])
def test_single_precision_holds_for_large_dispersion(log_theta: float, look: bool) -> None:
    # near-Poisson genes: theta log theta summed over genes must not swallow the likelihood
    g = torch.Generator().manual_seed(2)
    n_genes = 2000
    theta = torch.exp(log_theta + 0.5 * torch.randn(n_genes, generator=g))
    mu = torch.exp(-2 + 1.5 * torch.randn(32, n_genes, generator=g)) + 1e-4
    x = torch.poisson(mu, generator=g)
    t, m = theta.double().numpy(), mu.double().numpy()
    exact = stats.nbinom.logpmf(x.numpy(), t, t / (t + m)).sum(-1)
    assert np.abs(nb_log_prob(x, mu, theta, look=look).numpy() - exact).max() < (1e-3 if log_theta < 8 else 0.1)

    exact_gradient = value_and_gradients(nb_log_prob, x.double(), mu.double(), theta.double())[2]
    ours = value_and_gradients(partial(nb_log_prob, look=look), x, mu, theta)[2]
    theirs = value_and_gradients(scvi_nb, x, mu, theta)[2]

    def error(gradient: Tensor) -> float:
        return float((gradient - exact_gradient).norm() / exact_gradient.norm())

    # scvi-tools pays one lgamma(theta) a cell for its precision; we must not be worse
    assert error(ours) < 1.5 * error(theirs) + 1e-6


def test_poisson() -> None:
    x, mu, _ = draw(torch.float64, particles=3)
    ours = value_and_gradients(poisson_log_prob, x, mu)
    theirs = value_and_gradients(lambda x, mu: Poisson(mu, validate_args=False).log_prob(x).sum(-1), x, mu)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
@pytest.mark.parametrize("particles", [0, 3])
def test_through_the_decoder(likelihood: str, particles: int) -> None:
    """Log-likelihood and every parameter's gradient equal those of torch's own distributions on the same outputs."""
    torch.manual_seed(0)
    decoder = ExpressionDecoder(5, 2, GENES, n_hidden=16, gene_likelihood=likelihood).double()  # type: ignore[arg-type]
    if decoder.log_scale is not None:
        decoder.log_scale.data.normal_(std=0.7)
    z = torch.randn((particles, CELLS, 5) if particles else (CELLS, 5), dtype=torch.float64)
    covariates, library = torch.randn(CELLS, 2, dtype=torch.float64), torch.full((CELLS, 1), 900.0).double()
    x = torch.poisson(torch.full((CELLS, GENES), 15.0, dtype=torch.float64))
    x[:, :5] = 0.0

    def gradients(value: Tensor) -> list[Tensor]:
        decoder.zero_grad()
        value.mean().backward()
        return [p.grad.clone() for p in decoder.parameters()]  # type: ignore[union-attr]

    ours = decoder.log_prob(decoder(z, covariates, library), x)
    ours_gradients = gradients(ours)

    h = torch.cat([z, covariates.expand(*z.shape[:-1], 2)], -1) @ decoder.mlp.first.weight.T + decoder.mlp.first.bias
    out = torch.nn.functional.leaky_relu(h, 0.01) @ decoder.out.weight.T + decoder.out.bias
    mean = 900.0 * torch.softmax(out, -1) + 1e-4
    if likelihood == "nb":
        theirs = NegativeBinomial(mu=mean, theta=decoder.log_scale.exp()).log_prob(x).sum(-1)
    elif likelihood == "poisson":
        theirs = Poisson(mean, validate_args=False).log_prob(x).sum(-1)
    else:
        theirs = Normal(out, decoder.log_scale.exp()).log_prob(x).sum(-1)
    assert ours.shape == z.shape[:-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    for a, b in zip(ours_gradients, gradients(theirs), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
