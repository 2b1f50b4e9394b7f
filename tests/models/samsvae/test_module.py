"""How the latents of SAMS-VAE are put together, and what each inference family reads."""

from __future__ import annotations

from typing import Any

import pytest
import scvi
import torch

import pertvae as pv
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import SAMSVAEModule, _common
from pertvae.nn import EffectSample

GENES, LATENT = 10, 4
DOSES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0], [0, 0.5, 3]]).float()
N = len(DOSES)


def module(**settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
        "mask_prior": 0.1,
        "effect_prior_scale": 1.0,
        "embedding_inference": "correlated",
        "basal_inference": "correlated",
    }
    return SAMSVAEModule(ModuleShape(GENES, 3, n_batch=3), **(arguments | settings))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((N, GENES), 5.0), generator=g)
    return {"x": x, "doses": DOSES, "batch_index": torch.arange(N)[:, None].float() % 3}


@pytest.mark.parametrize("n_samples", [1, 4])
def test_shifts_add_up_and_scale_with_the_dose(batch: dict, n_samples: int) -> None:
    sample = module().effects.sample(n_samples)
    sample = EffectSample(torch.randn_like(sample.effect), sample.kl)
    out = module().inference(**batch, globals_=sample)
    shift = (out["z"] - out["z_basal"]).reshape(n_samples, N, LATENT)
    e = sample.effect
    naive = torch.stack([sum(DOSES[i, t] * e[:, t] for t in range(3)) for i in range(N)], 1)  # type: ignore[misc]
    torch.testing.assert_close(shift, naive, rtol=1e-5, atol=1e-5)
    assert torch.equal(out["z"].reshape(n_samples, N, -1)[:, 0], out["z_basal"].reshape(n_samples, N, -1)[:, 0])
    torch.testing.assert_close(shift[:, 3], shift[:, 1] + shift[:, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift[:, 4], 2 * shift[:, 1], rtol=1e-5, atol=1e-5)


def test_expected_and_drawn_offsets_are_naive_products(batch: dict) -> None:
    model = module()
    with torch.no_grad():
        model.effects.mask_logits.normal_()
        expected = model.effects.expected()
        torch.testing.assert_close(model.offset(DOSES), DOSES @ expected)
        assert model.offset(DOSES)[0].abs().max() == 0
        components, doses = torch.tensor([2, 1]), torch.tensor([3.0, 0.5])
        uniform, normal = torch.rand(50, 2, LATENT), torch.randn(50, 2, LATENT)
        drawn = model.draw_offset(components, doses, uniform, normal)
        each = model.effects.draw(components, uniform, normal)
    torch.testing.assert_close(drawn, 3.0 * each[:, 0] + 0.5 * each[:, 1])


@pytest.mark.parametrize("basal", ["mean_field", "correlated"])
@pytest.mark.parametrize("embedding", ["mean_field", "correlated"])
def test_inference_families(batch: dict, basal: str, embedding: str) -> None:
    model = module(basal_inference=basal, embedding_inference=embedding)
    reads_offset = basal == "correlated"
    assert model.encoder.first.in_features == GENES + 3 + (LATENT if reads_offset else 0)
    assert hasattr(model.effects, "identity") is (embedding == "correlated")
    assert hasattr(model.effects, "loc") is (embedding == "mean_field")

    sample = model.effects.sample(1)
    bumped = EffectSample(sample.effect + 1.0, sample.kl)
    before, after = (model.inference(**batch, globals_=s)["basal_mean"] for s in (sample, bumped))
    changed = ((before - after).abs() > 1e-6).any(1)
    # a control has no shift to read
    assert changed.tolist() == [False] + [reads_offset] * (N - 1)

    tensors = {"X": batch["x"], "perturbation": DOSES, "batch": batch["batch_index"]}
    _, _, out = model(tensors, loss_kwargs={"n_obs": N})
    out.loss.backward()
    assert torch.isfinite(out.loss)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


def test_mean_field_and_correlated_basal_agree_when_the_offset_has_no_weight(batch: dict) -> None:
    correlated, mean_field = module(), module(basal_inference="mean_field")
    with torch.no_grad():
        for name, p in mean_field.named_parameters():
            other = dict(correlated.named_parameters())[name]
            if name == "encoder.first.weight":
                other[:, GENES : GENES + LATENT] = 0
                p.copy_(torch.cat([other[:, :GENES], other[:, GENES + LATENT :]], 1))
            else:
                p.copy_(other)
    sample = correlated.effects.sample(1)
    for key in ("basal_mean", "basal_sd"):
        a, b = (m.inference(**batch, globals_=sample)[key] for m in (correlated, mean_field))
        torch.testing.assert_close(a, b)


def test_particles_share_the_expression_term_but_not_the_noise(batch: dict) -> None:
    for basal in ("mean_field", "correlated"):
        model = module(basal_inference=basal, n_particles=5)
        with torch.no_grad():
            model.effects.mask_logits.fill_(3.0)
        out = model.inference(**batch)
        assert out["z"].shape == (5, N, LATENT)
        assert len(out["z_basal"][:, 0, 0].unique()) == 5
        for k in range(5):
            one = EffectSample(out["globals"].effect[k : k + 1], out["globals"].kl[k : k + 1])
            single = model.inference(**batch, globals_=one)
            torch.testing.assert_close(single["basal_mean"], out["basal_mean"][k], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(single["basal_sd"], out["basal_sd"][k], rtol=1e-5, atol=1e-5)


def test_posterior_distribution_is_centred_on_the_full_latent(batch: dict) -> None:
    out = module().inference(**batch)
    torch.testing.assert_close(out["qz"].loc, out["basal_mean"] + (out["z"] - out["z_basal"]))
    assert torch.equal(out["qz"].scale, out["basal_sd"])


def test_basal_draws_follow_their_posterior(batch: dict) -> None:
    model = module(basal_inference="mean_field")
    with torch.no_grad():
        out = model.inference(**batch, n_samples=20_000)
    torch.testing.assert_close(out["z_basal"].mean(0), out["basal_mean"][0], rtol=0.0, atol=0.05)
    torch.testing.assert_close(out["z_basal"].std(0), out["basal_sd"][0], rtol=0.05, atol=0.0)


def test_library_is_the_total_or_the_size_factor(batch: dict) -> None:
    model = module()
    out = model.inference(**batch)
    torch.testing.assert_close(out["library"], batch["x"].sum(1, keepdim=True))
    size = torch.full((N, 1), 77.0)
    assert torch.equal(model.inference(**batch, size_factor=size)["library"], size)


def test_generator_decides_every_draw(batch: dict) -> None:
    model = module(n_particles=2)
    a, b = (model.inference(**batch, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a["z"], b["z"])
    assert not torch.equal(a["z"], model.inference(**batch)["z"])


def test_many_perturbations_are_gathered_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = pv.datasets.example()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    weights, calls = [], []
    original = _common.gathered_shift

    def spy(doses: torch.Tensor, effect: torch.Tensor, max_active: int) -> torch.Tensor:
        calls.append(max_active)
        return original(doses, effect, max_active)

    monkeypatch.setattr(_common, "gathered_shift", spy)
    for factor in (64, 6):  # 12 perturbations, at most 2 a cell
        monkeypatch.setattr(_common, "GATHER_FROM", factor)
        scvi.settings.seed = 0
        model = pv.SAMSVAE(adata, n_latent=3, n_hidden=8, sparsify="published")
        model.train(max_epochs=1, early_stopping=False, enable_progress_bar=False)
        weights.append(model.module.effects.loc.detach().clone())
        seen = len(calls)
        model.get_elbo()
        assert len(calls) == seen
    assert calls == [2] * 3  # three steps of the second model
    torch.testing.assert_close(weights[0], weights[1])
