"""Turning the latent space of SAMS-VAE changes neither the generative model nor, with masks open, the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

import pertvae as pv
from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape, TrainingStatistics
from pertvae.models.samsvae import SAMSVAEModule
from pertvae.nn import simple_structure

GENES, LATENT, COMPONENTS, CELLS = 12, 4, 3, 9
ALL_KINDS = [
    pytest.param(basal, embedding, n_layers, id=f"{basal}-{embedding}-{n_layers}")
    for basal in ("mean_field", "correlated")
    for embedding in ("mean_field", "correlated")
    for n_layers in (1, 3)
]


def module_of(basal: str, embedding: str, n_layers: int = 1, *, isotropic: bool = False) -> SAMSVAEModule:
    """Random weights, masks open, double precision; equal variances of all latents if isotropic."""
    torch.manual_seed(0)
    module = SAMSVAEModule(
        ModuleShape(GENES, COMPONENTS, n_batch=2, n_continuous_cov=1),
        n_latent=LATENT,
        n_hidden=16,
        n_layers=n_layers,
        n_particles=1,
        gene_likelihood="nb",
        mask_prior=0.05,
        effect_prior_scale=1.5,
        basal_inference=basal,  # type: ignore[arg-type]
        embedding_inference=embedding,
    ).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
        heads = [module.basal]
        if embedding == "mean_field":
            module.effects.loc.normal_(0, 1.5)
            module.effects.log_sd.copy_(torch.randn(COMPONENTS, LATENT) / 2 - 1)
            if isotropic:
                module.effects.log_sd.copy_(module.effects.log_sd[:, :1].clone().expand(-1, LATENT))
        else:
            module.effects.head.mean.weight.mul_(2)
            heads.append(module.effects.head)
        for head in heads:
            head.log_variance.bias.copy_(torch.linspace(-3, 0, LATENT))
            if isotropic:
                head.log_variance.weight.copy_(head.log_variance.weight[:1].clone().expand(LATENT, -1))
                head.log_variance.bias.fill_(-1.0)
    module.set_training_statistics(
        TrainingStatistics(
            input_mean=np.linspace(0.5, 1.5, GENES),
            input_sd=np.linspace(0.8, 1.9, GENES),
            output_bias=np.zeros(GENES),
            output_log_scale=np.zeros(GENES),
            cells_per_component=np.array([4, 3, 2]),
            n_cells=CELLS,
        )
    )
    module.effects.open = True
    return module.eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    doses = torch.tensor(
        [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [2.5, 0, 0]]
    )
    return {
        "X": torch.poisson(torch.rand(CELLS, GENES, generator=g) * 9, generator=g).double(),
        PERTURBATION_REGISTRY_KEY: doses.double(),
        "batch": (torch.arange(CELLS) % 2)[:, None].double(),
        "labels": torch.zeros(CELLS, 1).double(),
        "extra_continuous_covs": torch.randn(CELLS, 1, generator=g).double(),
    }  # fmt: skip


@pytest.fixture
def rotation() -> torch.Tensor:
    g = torch.Generator().manual_seed(6)
    return torch.linalg.qr(torch.randn(LATENT, LATENT, generator=g, dtype=torch.float64))[0]


def terms(
    module: SAMSVAEModule,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    turned: torch.Tensor | None = None,
    n: int = 1,
) -> dict[str, torch.Tensor]:
    """Terms of the objective for fixed noise of effects and basal states, which may be turned too."""
    g = torch.Generator().manual_seed(7)
    noise = [torch.randn(n, rows, LATENT, generator=g, dtype=torch.float64) for rows in (COMPONENTS, CELLS)]
    left = iter(noise if turned is None else [v @ turned for v in noise])
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", lambda *_, **__: next(left))
        inference, _, out = module(tensors, inference_kwargs={"n_samples": n}, loss_kwargs={"n_obs": CELLS})
    assert next(left, None) is None
    return {
        "z": inference["z"],
        "reconstruction": out.reconstruction_loss["reconstruction_loss"],
        "kl_local": out.kl_local["kl_local"],
        "kl_global": out.kl_global_sum,
        "loss": out.loss,
    }


@pytest.mark.parametrize(("basal", "embedding", "n_layers"), ALL_KINDS)
def test_generative_model_stays(
    basal: str, embedding: str, n_layers: int, tensors: dict, rotation: torch.Tensor
) -> None:
    module = module_of(basal, embedding, n_layers)
    z = 2 * torch.randn(CELLS, LATENT, dtype=torch.float64)
    doses, library = tensors[PERTURBATION_REGISTRY_KEY], torch.full((CELLS, 1), 50.0, dtype=torch.float64)
    batch, continuous = tensors["batch"], tensors["extra_continuous_covs"]

    def decoded(z: torch.Tensor) -> torch.Tensor:
        return module.generative(z, library, doses, batch_index=batch, cont_covs=continuous)["px"].mean.detach()

    before, offset = decoded(z), module.offset(doses).detach()
    module.rotate(rotation)
    torch.testing.assert_close(decoded(z @ rotation), before)
    assert (decoded(z) - before).abs().max() > 0.5
    torch.testing.assert_close(module.offset(doses), offset @ rotation)
    assert module.effects.open


@pytest.mark.parametrize(("basal", "embedding", "n_layers"), ALL_KINDS)
def test_bound_stays_where_diagonals_lose_nothing(
    basal: str, embedding: str, n_layers: int, tensors: dict, rotation: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(basal, embedding, n_layers, isotropic=True)
    before = terms(module, tensors, monkeypatch)
    module.rotate(rotation)
    after = terms(module, tensors, monkeypatch, rotation)
    torch.testing.assert_close(after.pop("z"), before.pop("z") @ rotation)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def dense_model(small_screen: AnnData) -> Callable[[str, str], pv.SAMSVAE]:
    """Models trained with masks open."""
    made: dict[tuple[str, str], pv.SAMSVAE] = {}

    def build(basal: str, embedding: str) -> pv.SAMSVAE:
        if (basal, embedding) not in made:
            adata = small_screen.copy()
            pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", batch_key="batch")
            model = pv.SAMSVAE(
                adata, n_latent=5, n_hidden=16, sparsify="published", basal_inference=basal,
                embedding_inference=embedding, effect_prior_scale=3.0,
            )  # type: ignore[arg-type]  # fmt: skip
            model.module.effects.open = True
            model.train(
                max_epochs=100, batch_size=64, plan_kwargs={"lr": 3e-3}, early_stopping=False, accelerator="cpu",
                devices=1, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            made[basal, embedding] = model
        return made[basal, embedding]

    return build


@pytest.mark.parametrize("embedding", ["mean_field", "correlated"])
@pytest.mark.parametrize("basal", ["mean_field", "correlated"])
def test_bound_of_a_trained_model_moves_little(dense_model: Callable, basal: str, embedding: str) -> None:
    """Against one part that is not turned with the others."""
    model = dense_model(basal, embedding)
    module = model.module
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(6)))[0]
    loader = model._make_data_loader(model.adata, batch_size=model.adata.n_obs)
    (tensors,) = loader

    def objective() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            *_, out = module(tensors, inference_kwargs={"n_samples": 50}, loss_kwargs={"n_obs": model.adata.n_obs})
        return float(out.loss)

    kept = {k: v.clone() for k, v in module.state_dict().items()}
    before = objective()
    module.rotate(rotation)
    change = objective() - before
    turned = {k: v.clone() for k, v in module.state_dict().items()}
    wrong = {}
    for part in ("effects.", "decoder.mlp.", "basal.", "encoder."):
        if part == "encoder." and basal == "mean_field":
            continue  # reads no shift
        module.load_state_dict({k: kept[k] if k.startswith(part) else v for k, v in turned.items()})
        wrong[part] = objective() - before
    module.load_state_dict(kept)
    assert abs(change) < 0.2 * min(wrong.values())


def test_means_stay_exact(tensors: dict, rotation: torch.Tensor) -> None:
    module = module_of("correlated", "mean_field", 3)
    inputs = module._get_inference_input(tensors)
    mean, sd = (v.detach() for v in module.basal_posterior(inputs))
    module.rotate(rotation)
    turned, turned_sd = (v.detach() for v in module.basal_posterior(inputs))
    torch.testing.assert_close(turned, mean @ rotation)
    exact = (sd.square() @ rotation.square()).sqrt()
    assert (turned_sd / exact - 1).abs().mean() < 0.3 * (sd / exact - 1).abs().mean()


def test_there_and_back(tensors: dict, rotation: torch.Tensor) -> None:
    # means come back; variances have lost what a diagonal cannot hold
    module = module_of("correlated", "mean_field")
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    module.rotate(rotation)
    module.rotate(rotation.T)
    for name, value in module.state_dict().items():
        if "log_" not in name:
            torch.testing.assert_close(value, kept[name], msg=name)


def test_rotation_to_the_planted_axes(rotation: torch.Tensor) -> None:
    module = module_of("correlated", "mean_field")
    planted = torch.diag(torch.tensor([4.0, -5.0, 6.0])).double()
    with torch.no_grad():
        module.effects.loc.copy_(torch.nn.functional.pad(planted, (0, 1)) @ rotation)
    found = simple_structure(module.effects.expected().detach().numpy())
    module.rotate(torch.as_tensor(found))
    sizes = module.effects.loc.detach().abs()
    torch.testing.assert_close(sizes.max(1).values, torch.tensor([4.0, 5.0, 6.0]).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(sizes.sum(1), sizes.max(1).values, atol=0.2, rtol=0)


def test_cost_of_a_mask() -> None:
    module: Any = module_of("correlated", "mean_field")
    module.set_mask_cost(0.5)
    base = np.log(0.05 / 0.95)
    np.testing.assert_allclose(module.effects.prior_logit, base - 0.5 * np.array([[4], [3], [2]]))
    module.set_mask_cost(0.0)
    np.testing.assert_allclose(module.effects.prior_logit, np.full((3, 1), base))
