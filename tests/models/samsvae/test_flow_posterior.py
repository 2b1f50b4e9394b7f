"""The flow posterior of the basal state: its bound, its getters, its rotation, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData
from torch.distributions import Normal

import pertvae as pv
from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import SAMSVAEModule
from pertvae.nn import EffectSample, gaussian_kl

DOSES = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0]]).float()
N, GENES = len(DOSES), 8


def module(posterior: str, n_latent: int = 2, trained: bool = True, **settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_hidden": 8,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
        "mask_prior": 0.1,
        "effect_prior_scale": 1.0,
        "embedding_inference": "mean_field",
        "basal_inference": "correlated",
        "basal_posterior": posterior,
    }
    made = SAMSVAEModule(ModuleShape(GENES, 2, n_batch=2), n_latent=n_latent, **(arguments | settings))
    if trained and made.flow is not None:
        with torch.no_grad():
            for head in made.flow.heads:
                head.weight.normal_(std=0.05)
                head.bias.normal_(std=0.05)
    return made.eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    x = torch.poisson(torch.full((N, GENES), 4.0), generator=torch.Generator().manual_seed(0))
    batch = torch.arange(N)[:, None].float() % 2
    return {"X": x, PERTURBATION_REGISTRY_KEY: DOSES, "batch": batch, "labels": torch.zeros(N, 1)}


def given(seed: int, n_samples: int, n_latent: int = 2) -> EffectSample:
    g = torch.Generator().manual_seed(seed)
    return EffectSample(torch.randn(n_samples, 2, n_latent, generator=g), torch.rand(n_samples, 2, generator=g))


def run(model: SAMSVAEModule, tensors: dict, sample: EffectSample, seed: int = 1) -> tuple[dict, Any]:
    outputs = model.inference(
        **model._get_inference_input(tensors), globals_=sample, generator=torch.Generator().manual_seed(seed)
    )
    px = model.generative(**model._get_generative_input(tensors, outputs))
    return outputs, model.loss(tensors, outputs, px, n_obs=40)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_untrained_flow_is_the_gaussian(tensors: dict, n_samples: int) -> None:
    plain, flow = module("gaussian"), module("flow", trained=False)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, flow.state_dict()[name])
    sample = given(0, n_samples)
    (a, loss_a), (b, loss_b) = (run(m, tensors, sample) for m in (plain, flow))
    assert torch.equal(a["z"], b["z"])
    assert torch.equal(loss_a.reconstruction_loss_sum, loss_b.reconstruction_loss_sum)
    torch.testing.assert_close(plain.local_ratio(a), flow.local_ratio(b))
    inputs = plain._get_inference_input(tensors)
    moments = [m.basal_posterior(inputs) for m in (plain, flow)]
    torch.testing.assert_close(moments[1][0], moments[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[1][1], moments[0][1], rtol=0.3, atol=0.0)


def test_sampled_divergence_is_unbiased_at_the_start(tensors: dict) -> None:
    """The untrained flow's divergence is known: that of the Gaussian."""
    model = module("flow", n_latent=3, trained=False)
    with torch.no_grad():
        effect = given(0, 1, 3).effect.expand(20_000, -1, -1)
        outputs, _ = run(model, tensors, EffectSample(effect, torch.zeros(20_000, 2)))
        exact = gaussian_kl(outputs["basal_mean"][0], outputs["basal_sd"][0]).sum(-1)
        ratio = model.local_ratio(outputs)
    error = ratio.std(0) / np.sqrt(len(ratio))
    assert (((ratio.mean(0) - exact) / error).abs() < 4).all()


def test_sampled_divergence_is_the_integral(tensors: dict) -> None:
    """KL(q || p) by quadrature, with the density from the flow's inverse."""
    model = module("flow")
    assert model.flow is not None
    model.flow.rotate(torch.linalg.qr(torch.randn(2, 2))[0])
    with torch.no_grad():
        effect = given(0, 1).effect.expand(20_000, -1, -1)
        outputs, _ = run(model, tensors, EffectSample(effect, torch.zeros(20_000, 2)))
        ratio = model.local_ratio(outputs)
        inputs = model._get_inference_input(tensors)
        h = model.hidden(tensors["X"], DOSES @ effect[0], model.covariates_of(inputs))
        mean, sd = model.basal(h)
        axis = torch.linspace(-14, 14, 701)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
        log_q = model.flow.log_prob(grid, mean, sd, h)
        log_p = Normal(0.0, 1.0).log_prob(grid).sum(-1)
        cell = (axis[1] - axis[0]) ** 2
        torch.testing.assert_close((log_q.exp() * cell).sum(0), torch.ones(N), rtol=0.0, atol=5e-3)
        exact = (log_q.exp() * (log_q - log_p) * cell).sum(0)
    error = ratio.std(0) / np.sqrt(len(ratio))
    assert ((ratio.mean(0) - exact).abs() < 4 * error + 0.01).all()


def test_loss_takes_the_sampled_divergence(tensors: dict) -> None:
    model = module("flow")
    outputs, out = run(model, tensors, given(0, 3))
    ratio = model.local_ratio(outputs)
    assert ratio.shape == (3, N)
    torch.testing.assert_close(out.kl_local_sum, ratio.mean(0).sum())
    assert "qz" not in outputs
    out.loss.backward()
    assert model.flow is not None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.flow.parameters())


def test_likelihood_does_not_depend_on_the_posterior(tensors: dict) -> None:
    """Importance weights of a bent proposal and of the Gaussian estimate the same p(x)."""
    estimates = []
    for posterior in ("gaussian", "flow"):
        model = module(posterior)
        if model.flow is not None:
            model.flow.rotate(torch.linalg.qr(torch.randn(2, 2))[0])
        effect = given(0, 1).effect.expand(40_000, -1, -1)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            w = model.log_weights(tensors, EffectSample(effect, torch.zeros(40_000, 2)), generator)
        assert w.shape == (40_000, N)
        estimates.append(torch.logsumexp(w, 0) - np.log(len(w)))
    torch.testing.assert_close(*estimates, rtol=0.0, atol=0.05)


def test_rotation_leaves_the_model_as_it_is(tensors: dict) -> None:
    model, turned = module("flow", 4), module("flow", 4)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    sample = given(0, 3, 4)
    for m in (model, turned):
        m.effects.open = True
    turned.rotate(rotation)
    (a, loss_a), (b, loss_b) = (
        run(m, tensors, s) for m, s in ((model, sample), (turned, EffectSample(sample.effect @ rotation, sample.kl)))
    )
    torch.testing.assert_close(b["z_basal"], a["z_basal"] @ rotation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b["basal_log_q"], a["basal_log_q"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss_b.loss, loss_a.loss, rtol=1e-5, atol=1e-4)
    inputs = model._get_inference_input(tensors)
    noise = torch.randn(N, 4)
    torch.testing.assert_close(
        turned.basal_sampler(inputs)(noise), model.basal_sampler(inputs)(noise) @ rotation, rtol=1e-4, atol=1e-5
    )


def test_moments_and_draws_of_the_getters_agree(tensors: dict) -> None:
    model = module("flow")
    inputs = model._get_inference_input(tensors)
    with torch.no_grad():
        model.effects.loc.normal_()
        mean, sd = model.basal_posterior(inputs)
        again = model.basal_posterior({k: None if v is None else v[2:] for k, v in inputs.items()})
        noise = torch.randn(5000, N, 2, generator=torch.Generator().manual_seed(3))
        draws = model.basal_sampler(inputs)(noise)
        shift = model.offset(DOSES)
        torch.testing.assert_close(model.draw_latent(inputs, "basal", noise[0]), draws[0])
        torch.testing.assert_close(model.draw_latent(inputs, "full", noise[0]), draws[0] + shift)
        torch.testing.assert_close(model.draw_latent(inputs, "perturbation", noise[0]), shift)
        torch.testing.assert_close(model.latent(inputs, "full")[0], mean + shift)
    # the same noise for every cell: a cell's mean does not depend on the others
    torch.testing.assert_close(again[0], mean[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0.0, atol=0.3)
    torch.testing.assert_close(draws.std(0), sd, rtol=0.3, atol=0.0)


def curved_screen(model: SAMSVAEModule, n_cells: int) -> dict[str, torch.Tensor]:
    """Cells of ``x = z_1 + 2 |z_0| + noise`` in every gene, which the decoder is told; all controls."""
    d = model.decoder
    assert d.log_scale is not None
    with torch.no_grad():
        for p in d.parameters():
            p.zero_()
            p.requires_grad_(False)
        # |z| = (lrelu(z) + lrelu(-z)) / 0.99, z = (lrelu(z) - lrelu(-z)) / 1.01
        d.mlp.first.weight[:4, :2] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        d.out.weight[:, :4] = torch.tensor([2 / 0.99, 2 / 0.99, 1 / 1.01, -1 / 1.01])
        d.log_scale.fill_(float(np.log(0.5)))
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n_cells, 2, generator=g)
    x = (z[:, 1] + 2 * z[:, 0].abs())[:, None] + 0.5 * torch.randn(n_cells, GENES, generator=g)
    zeros = torch.zeros(n_cells, 1)
    return {"X": x, PERTURBATION_REGISTRY_KEY: torch.zeros(n_cells, 2), "batch": zeros, "labels": zeros}


def exact_log_likelihood(x: torch.Tensor) -> torch.Tensor:
    axis = torch.linspace(-6, 6, 1201).double()
    z0, z1 = torch.meshgrid(axis, axis, indexing="ij")
    mean, prior = (z1 + 2 * z0.abs()).ravel(), -0.5 * (z0**2 + z1**2).ravel() - np.log(2 * np.pi)
    total = [(-0.5 * ((v[:, None] - mean) / 0.5) ** 2 - np.log(0.5 * np.sqrt(2 * np.pi))).sum(0) for v in x.double()]
    return torch.stack([torch.logsumexp(t + prior, 0) for t in total]) + 2 * np.log(float(axis[1] - axis[0]))


@pytest.mark.slow
def test_flow_fits_a_curved_posterior_that_a_gaussian_cannot() -> None:
    bounds, tight = {}, {}
    for posterior in ("gaussian", "flow"):
        model = module(posterior, n_hidden=32, gene_likelihood="normal", basal_inference="mean_field", trained=False)
        tensors = curved_screen(model, 2000)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(1500):
            cells = torch.randint(2000, (128,), generator=torch.Generator().manual_seed(step))
            _, _, out = model({k: v[cells] for k, v in tensors.items()}, loss_kwargs={"n_obs": 2000})
            local = (out.reconstruction_loss_sum + out.kl_local_sum) / 128
            optimizer.zero_grad()
            local.backward()
            optimizer.step()
        part = {k: v[:100] for k, v in tensors.items()}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            w = model.log_weights(part, EffectSample(torch.zeros(200, 2, 2), torch.zeros(200, 2)), generator)
        bounds[posterior] = float(w.mean())
        tight[posterior] = float((torch.logsumexp(w[:20], 0) - np.log(20)).mean())
    exact = float(exact_log_likelihood(part["X"]).mean())
    assert bounds["gaussian"] < exact - 0.6
    assert bounds["gaussian"] + 0.4 < bounds["flow"] < exact + 0.05
    assert exact - bounds["flow"] < 0.3
    assert tight["gaussian"] < tight["flow"] < exact + 0.05


def test_trained_model_predicts_and_comes_back(
    model_of: Callable, quiet: dict, small_screen: AnnData, tmp_path: Path
) -> None:
    scvi.settings.seed = 0
    model = model_of(small_screen, basal_posterior="flow")
    model.train(max_epochs=20, batch_size=128, **quiet)
    m = model.module
    assert not torch.equal(
        m.flow.rotation, torch.eye(5)
    )  # turned with the latent space, and back with the best weights
    assert all((head.weight != 0).any() for head in m.flow.heads)
    model.save(tmp_path / "model")
    again = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata, accelerator="cpu")
    for kind in ("full", "basal"):
        for give_mean in (True, False):
            a, b = (x.get_latent_representation(kind=kind, give_mean=give_mean, key_added=None) for x in (model, again))
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(a).all()
    a, b = (x.predict_perturbation(["P001+P002"], n_cells=150, key_added=None) for x in (model, again))
    np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())
    # cells, and not means, are drawn: the basal states of a cell's copies differ
    with torch.inference_mode():
        sources = model._encode_sources(model.adata, np.zeros(30, dtype=int), "control", 0, None)
        alone = model._encode_sources(model.adata, np.zeros(3, dtype=int), "control", 0, None)
    assert len(np.unique(sources.z_basal, axis=0)) == 30
    np.testing.assert_array_equal(sources.z_basal[:3], alone.z_basal)


def test_draws_of_sources_are_the_samplers(model_of: Callable, small_screen: AnnData) -> None:
    """Copies of a cell, in any order, get the draws that their own noise gives."""
    model = model_of(small_screen, basal_posterior="gaussian")
    model.is_trained_ = True
    rows = np.array([7, 3, 7, 300, 3, 7])
    with torch.inference_mode():
        sources = model._encode_sources(model.adata, rows, "control", 0, None)
        noise = model._encode_sources(model.adata, rows, "prior", 0, None).z_basal
    mean = model.get_latent_representation(indices=rows, kind="basal", key_added=None)
    assert len(np.unique(noise, axis=0)) == 6
    scale = (sources.z_basal - mean) / noise
    assert (scale > 0).all()
    for same in ([0, 2, 5], [1, 4]):
        np.testing.assert_allclose(scale[same], np.broadcast_to(scale[same[0]], (len(same), 5)), rtol=2e-2)


def test_argument(model_of: Callable, small_screen: AnnData) -> None:
    with pytest.raises(ValueError, match=r"basal_posterior='flo' is not one of \['gaussian', 'flow'\]"):
        model_of(small_screen, basal_posterior="flo")
