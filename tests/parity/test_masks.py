"""Learned masks reach the exact posterior when gradient and KL belong together, and only then.

A mask entry that adds r nats to the log-likelihood when it is on, with prior probability alpha, has the posterior
log-odds logit(alpha) + r.
"""

from __future__ import annotations

import math

import pytest
import torch

from pertvae.nn import mask_kl, sample_mask

ALPHA = 1e-3
GAINS = torch.tensor([2.0, 5.0, 7.0, 9.0])
EXACT = math.log(ALPHA / (1 - ALPHA)) + GAINS


def learn(gradient: str, kl: str, steps: int = 1500, draws: int = 1000) -> torch.Tensor:
    """Return the log-odds at the optimum of gain - KL by stochastic gradient, starting from probability one half."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(len(GAINS), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    tail = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.2 * (1 - step / steps) + 0.002
        mask = sample_mask(logits, draws, gradient, generator)  # type: ignore[arg-type]
        loss = (mask_kl(logits, mask, math.log(ALPHA / (1 - ALPHA)), kl) - GAINS * mask).mean(0).sum()  # type: ignore[arg-type]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step > 0.8 * steps:
            tail.append(logits.detach().clone())
    return torch.stack(tail).mean(0)


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_consistent_pairs_reach_the_posterior(gradient: str) -> None:
    learned = learn(gradient, gradient)
    assert (learned - EXACT).abs().max() < 0.2, learned


def test_exact_kl_with_the_relaxed_gradient_is_off() -> None:
    # the reason why the pairs are not mixed; if this ever passes, the test above has lost its power
    error = (learn("gumbel", "identity") - EXACT).abs()
    assert (error[[0, 2, 3]] > 0.5).all(), error
