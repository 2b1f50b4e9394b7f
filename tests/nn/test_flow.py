"""The conditional flow: its density against Jacobians and integrals, its inverse, its start."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from pertvae.nn import ConditionalFlow

CELLS, CONTEXT = 5, 3


def made(n_latent: int, *, trained: bool = True, rotated: bool = False, seed: int = 0) -> ConditionalFlow:
    torch.manual_seed(seed)
    flow = ConditionalFlow(n_latent, CONTEXT, n_hidden=8)
    if trained:
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.5 * torch.randn(p.shape))
    flow = flow.double()
    if rotated:
        flow.rotate(torch.linalg.qr(torch.randn(n_latent, n_latent).double())[0])
    return flow


def inputs(n_latent: int, *leading: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    mean, sd = torch.randn(CELLS, n_latent, generator=g), torch.rand(CELLS, n_latent, generator=g) + 0.2
    noise = torch.randn(*leading, CELLS, n_latent, generator=g)
    return mean.double(), sd.double(), noise.double(), torch.randn(CELLS, CONTEXT, generator=g).double()


@pytest.mark.parametrize("n_latent", [1, 2, 5])
def test_starts_as_the_gaussian(n_latent: int) -> None:
    mean, sd, noise, context = inputs(n_latent, 4)
    z, log_q = made(n_latent, trained=False)(mean, sd, noise, context)
    assert torch.equal(z, mean + sd * noise)
    torch.testing.assert_close(log_q, Normal(mean, sd).log_prob(z).sum(-1))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("n_latent", [1, 2, 5])
def test_density_is_that_of_the_jacobian(n_latent: int, rotated: bool) -> None:
    flow = made(n_latent, rotated=rotated)
    mean, sd, noise, context = inputs(n_latent)
    z, log_q = flow(mean, sd, noise, context)
    assert (z - (mean + sd * noise)).abs().max() > 0.1
    for i in range(CELLS):

        def draw(e: torch.Tensor, i: int = i) -> torch.Tensor:
            return flow(mean[i], sd[i], e, context[i])[0]

        jacobian = torch.autograd.functional.jacobian(draw, noise[i])
        expected = Normal(0.0, 1.0).log_prob(noise[i]).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_q[i], expected)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("n_latent", [1, 2, 5])
def test_inverse_and_density_of_any_point(n_latent: int, rotated: bool) -> None:
    flow = made(n_latent, rotated=rotated)
    mean, sd, noise, context = inputs(n_latent, 7)
    z, log_q = flow(mean, sd, noise, context)
    torch.testing.assert_close(flow.inverse(z, mean, sd, context)[0], noise)
    torch.testing.assert_close(flow.log_prob(z, mean, sd, context), log_q)


def test_density_integrates_to_one() -> None:
    flow = made(2, rotated=True)
    mean, sd, _, context = inputs(2)
    axis = torch.linspace(-30, 30, 801).double()
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    with torch.no_grad():
        mass = torch.cat([flow.log_prob(part, mean[:1], sd[:1], context[:1]).exp() for part in grid.split(200_000)])
    assert math.isclose(float(mass.sum() * (axis[1] - axis[0]) ** 2), 1.0, rel_tol=1e-2)


def test_reads_the_context_and_keeps_cells_apart() -> None:
    flow = made(3)
    mean, sd, noise, context = inputs(3)
    z = flow(mean, sd, noise, context)[0]
    other = context.clone()
    other[0] += 1.0
    changed = (flow(mean, sd, noise, other)[0] - z).abs().sum(-1)
    assert changed[0] > 1e-3
    assert torch.equal(changed[1:], torch.zeros(CELLS - 1).double())


def test_context_may_have_fewer_dimensions_than_noise() -> None:
    flow = made(4)
    mean, sd, noise, context = inputs(4, 3)
    joint, log_q = flow(mean, sd, noise, context)
    for k in range(3):
        z, one = flow(mean, sd, noise[k], context)
        torch.testing.assert_close(joint[k], z)
        torch.testing.assert_close(log_q[k], one)


def test_rotation_turns_draws_and_adds_up() -> None:
    flow = made(4)
    mean, sd, noise, context = inputs(4)
    before, log_q = flow(mean, sd, noise, context)
    turns = [torch.linalg.qr(torch.randn(4, 4).double())[0] for _ in range(2)]
    for turn in turns:
        flow.rotate(turn)
    after, turned = flow(mean, sd, noise, context)
    torch.testing.assert_close(after, before @ turns[0] @ turns[1])
    torch.testing.assert_close(turned, log_q)
    assert "rotation" in flow.state_dict()
