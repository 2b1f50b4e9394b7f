"""The decoder: shares of expression, library, mean floor, dispersion."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from scvi.distributions import NegativeBinomial

from pertvae.nn import ExpressionDecoder


def decoder(likelihood: str = "nb") -> ExpressionDecoder:
    torch.manual_seed(0)
    return ExpressionDecoder(3, 2, 40, n_hidden=8, n_layers=2, gene_likelihood=likelihood)  # type: ignore[arg-type]


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_means_add_up_to_the_library_and_the_floor(likelihood: str) -> None:
    library = torch.tensor([[0.0], [500.0], [20_000.0]])
    px = decoder(likelihood)(torch.randn(4, 3, 3), torch.randn(3, 2), library)
    assert px.mean.shape == (4, 3, 40)
    torch.testing.assert_close(px.mean.sum(-1), (library[:, 0] + 40 * 1e-4).expand(4, 3))
    assert px.mean.min() >= 1e-4
    torch.testing.assert_close(px.scale.sum(-1), torch.ones(4, 3))


def test_dispersion_belongs_to_the_gene_and_starts_at_one() -> None:
    module = decoder()
    assert torch.equal(module.scale, torch.ones(40))
    with torch.no_grad():
        module.log_scale.copy_(torch.linspace(-2, 2, 40))  # type: ignore[union-attr]
    px = module(torch.randn(5, 3), torch.randn(5, 2), torch.full((5, 1), 1000.0))
    torch.testing.assert_close(px.variance, px.mean + px.mean**2 / torch.linspace(-2, 2, 40).exp())


def test_distribution_is_scvis_although_it_is_made_when_asked_for() -> None:
    module = decoder()
    z, library = torch.randn(4, 6, 3), torch.full((6, 1), 1000.0)
    share = torch.softmax(module.out(module.mlp(z, None)), -1)
    theirs = NegativeBinomial(mu=1000.0 * share + 1e-4, theta=module.scale, scale=share)
    x = torch.poisson(torch.full((6, 40), 2.0))

    def fresh() -> NegativeBinomial:
        return module(z, None, library)  # type: ignore[return-value]

    assert isinstance(fresh(), NegativeBinomial)
    for name in ("mu", "theta", "scale", "mean", "variance"):  # each from a distribution that is not set up yet
        torch.testing.assert_close(getattr(fresh(), name), getattr(theirs, name))
    torch.testing.assert_close(fresh().log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(fresh().get_normalized("scale"), share)
    torch.testing.assert_close(module.log_prob(fresh(), x), theirs.log_prob(x).sum(-1))
    assert fresh().sample().shape == (4, 6, 40)
    assert fresh().batch_shape == theirs.batch_shape
    assert not hasattr(fresh(), "no_such_thing")
    with warnings.catch_warnings():  # scvi-tools checks no arguments unless asked
        warnings.simplefilter("error")
        fresh().log_prob(x + 0.5)


def test_distribution_has_a_gradient_after_sampling_and_can_be_copied() -> None:
    module = decoder()
    px = module(torch.randn(6, 3), None, torch.full((6, 1), 1000.0))
    px.sample()
    px.mu.sum().backward()
    assert module.out.weight.grad is not None
    with torch.no_grad():
        px = module(torch.randn(6, 3), None, torch.full((6, 1), 1000.0))
    for clone in (copy.copy(px), copy.deepcopy(px), pickle.loads(pickle.dumps(px))):
        assert torch.equal(clone.mu, px.mu)


def test_empty_cell_has_a_finite_likelihood_and_gradient() -> None:
    for likelihood in ("nb", "poisson"):
        module = decoder(likelihood)
        x = torch.zeros(2, 40)
        x[1, 0] = 1.0  # a count although the size factor says nothing was sequenced
        value = module.log_prob(module(torch.randn(2, 3), None, torch.zeros(2, 1)), x)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_normal_ignores_the_library() -> None:
    module = decoder("normal")
    z, covariates = torch.randn(6, 3), torch.randn(6, 2)
    a, b = (module(z, covariates, torch.full((6, 1), size)).mean for size in (1.0, 1e4))
    assert torch.equal(a, b)


def test_covariates_matter() -> None:
    module = decoder()
    z, library = torch.randn(6, 3), torch.full((6, 1), 1e3)
    assert not torch.allclose(module(z, torch.zeros(6, 2), library).mean, module(z, torch.ones(6, 2), library).mean)


def test_unknown_likelihood_is_named() -> None:
    with pytest.raises(ValueError, match=r"'zinb'.*nb.*poisson.*normal"):
        decoder("zinb")


def test_no_hidden_layer_is_linear_in_latents_and_covariates() -> None:
    torch.manual_seed(0)
    module = ExpressionDecoder(3, 2, 40, n_hidden=8, n_layers=0)
    z, covariates, library = torch.randn(4, 5, 3), torch.randn(5, 2), torch.full((5, 1), 300.0)
    weight = module.out.weight.detach()
    logits = z @ weight[:, :3].T + covariates @ weight[:, 3:].T + module.out.bias.detach()
    torch.testing.assert_close(module(z, covariates, library).mean, 300 * logits.softmax(-1) + 1e-4)
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    before = module(z, covariates, library).mean
    module.rotate_latent(rotation)
    torch.testing.assert_close(module(z @ rotation, covariates, library).mean, before)
