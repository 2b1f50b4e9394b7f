"""The training losses of SVAE+ and the conditional VAE against the formulas, term by term."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scvi.module.base import LossOutput
from torch.distributions import Beta, Normal, kl_divergence

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape, PerturbationModule, TrainingStatistics
from pertvae.models.samsvae import ConditionalVAEModule, SVAEPlusModule
from pertvae.nn import EffectSample

GENES, LATENT = 12, 3
# rows: controls, singles, doubles, a triple dose; the last component has no cell
DOSES = torch.tensor(
    [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 2.5, 0, 0],
    ]
).float()
N = len(DOSES)
CELLS_PER_COMPONENT = np.array([4, 3, 2, 0])
CONDITIONS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
CONDITION_OF_CELL = [-1, -1, 0, 0, 1, 2, 3, 4, 1]
CELLS_PER_CONDITION = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 0.0])


def started(made: Any) -> Any:
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    made.set_training_statistics(
        TrainingStatistics(
            input_mean=np.linspace(0.5, 1.5, GENES),
            input_sd=np.linspace(0.8, 1.9, GENES),
            output_bias=np.zeros(GENES),
            output_log_scale=np.zeros(GENES),
            cells_per_component=CELLS_PER_COMPONENT,
            n_cells=N,
        )
    )
    return made.eval()


SHAPE = ModuleShape(GENES, DOSES.shape[1], n_batch=2, n_continuous_cov=1)
SMALL: dict[str, Any] = {"n_latent": LATENT, "n_hidden": 8, "n_layers": 2, "gene_likelihood": "nb"}


def svaeplus(n_particles: int = 1, **settings: Any) -> SVAEPlusModule:
    torch.manual_seed(0)
    arguments = SMALL | {
        "mask_prior": 1 / 6,
        "mask_gradient": "gumbel",
        "mask_draws": "component",
        "mask_start": 0.0,
        "effect_start": 1.0,
        "global_kl": "full",
    }
    made = started(SVAEPlusModule(SHAPE, n_particles=n_particles, **(arguments | settings)))
    if made.unique:
        made.cells_per_condition.copy_(CELLS_PER_CONDITION)
    return made


def conditional(n_particles: int = 1, **settings: Any) -> ConditionalVAEModule:
    torch.manual_seed(0)
    return started(ConditionalVAEModule(SHAPE, n_particles=n_particles, **(SMALL | settings)))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "X": torch.poisson(torch.rand(N, GENES, generator=g) * 9, generator=g),
        PERTURBATION_REGISTRY_KEY: DOSES,
        "batch": (torch.arange(N) % 2)[:, None].float(),
        "labels": torch.zeros(N, 1),
        "extra_continuous_covs": torch.randn(N, 1, generator=g),
    }


def loss_of(
    model: PerturbationModule,
    tensors: dict[str, torch.Tensor],
    cells: Any,
    sample: EffectSample,
    noise: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    **loss: Any,
) -> LossOutput:
    """Loss of some cells with the global draw and each cell's noise given."""
    part = {k: v[cells] for k, v in tensors.items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise[:, cells])
        _, _, out = model(part, inference_kwargs={"globals_": sample}, loss_kwargs={"n_obs": N, **loss})
    return out


VARIANTS = [
    (svaeplus, {"global_kl": "full"}),
    (svaeplus, {"global_kl": "plate"}),
    (svaeplus, {"global_kl": "plate", "gene_likelihood": "normal"}),
    (svaeplus, {"global_kl": "full", "conditions": CONDITIONS}),
    (svaeplus, {"global_kl": "plate", "conditions": CONDITIONS}),
    (conditional, {}),
    (conditional, {"gene_likelihood": "poisson"}),
]


@pytest.mark.parametrize(("build", "settings"), VARIANTS)
@pytest.mark.parametrize("n_particles", [1, 3])
def test_single_cell_batches_average_to_the_full_batch(
    tensors: dict, build: Any, settings: dict, n_particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(n_particles, **settings)
    with torch.no_grad():
        sample, noise = model.draw_globals(n_particles), torch.randn(n_particles, N, LATENT)
        whole = loss_of(model, tensors, slice(None), sample, noise, monkeypatch)
        single = [loss_of(model, tensors, [i], sample, noise, monkeypatch) for i in range(N)]
    torch.testing.assert_close(torch.stack([s.loss for s in single]).mean(), whole.loss, rtol=1e-5, atol=1e-5)
    component = sample.kl.mean(0)
    counted = component if settings.get("global_kl", "full") == "full" else component[:-1]  # the last has no cell
    torch.testing.assert_close(whole.kl_global_sum, counted.sum(), rtol=1e-5, atol=1e-5)
    assert len(component) == (0 if build is conditional else 6 if "conditions" in settings else 4)


class Formula:
    """The networks in numpy, double precision, one cell at a time."""

    def __init__(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        self.w = {k: v.double().numpy() for k, v in model.state_dict().items()}
        self.x = tensors["X"].double().numpy()
        one_hot = np.eye(2)[tensors["batch"][:, 0].long().numpy()]
        self.covariates = np.concatenate([one_hot, tensors["extra_continuous_covs"].double().numpy()], 1)

    def perceptron(self, name: str, v: np.ndarray) -> np.ndarray:
        def leaky(h: np.ndarray) -> np.ndarray:
            return np.where(h > 0, h, 0.01 * h)

        h = leaky(self.w[f"{name}.first.weight"] @ v + self.w[f"{name}.first.bias"])
        return h + leaky(self.w[f"{name}.rest.0.weight"] @ h + self.w[f"{name}.rest.0.bias"])

    def encode(self, i: int, *extra: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        genes = (np.log1p(self.x[i]) - self.w["input_mean"]) / self.w["input_sd"]
        h = self.perceptron("encoder", np.concatenate([genes, *extra, self.covariates[i]]))
        mean = self.w["head.mean.weight"] @ h + self.w["head.mean.bias"]
        return mean, np.sqrt(np.exp(self.w["head.log_variance.weight"] @ h + self.w["head.log_variance.bias"]) + 1e-4)

    def log_likelihood(self, i: int, z: np.ndarray, *extra: np.ndarray) -> float:
        h = self.perceptron("decoder.mlp", np.concatenate([z, *extra, self.covariates[i]]))
        scores = self.w["decoder.out.weight"] @ h + self.w["decoder.out.bias"]
        rho = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        mu, theta = self.x[i].sum() * rho + 1e-4, np.exp(self.w["decoder.log_scale"])
        return float(stats.nbinom.logpmf(self.x[i], theta, theta / (theta + mu)).sum())


def gaussian_kl(mean: np.ndarray, sd: np.ndarray, prior_mean: np.ndarray) -> float:
    q = Normal(torch.as_tensor(mean), torch.as_tensor(sd))
    return float(kl_divergence(q, Normal(torch.as_tensor(prior_mean), 1.0)).sum())


@pytest.mark.parametrize("global_kl", ["full", "plate"])
@pytest.mark.parametrize("unique", [False, True])
def test_svaeplus_loss_is_the_formula(
    tensors: dict, global_kl: str, unique: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = svaeplus(2, global_kl=global_kl, **({"conditions": CONDITIONS} if unique else {}))
    with torch.no_grad():
        torch.manual_seed(9)
        mask = (torch.rand(2, len(model.mu), LATENT) < model.inclusion).float()
        sample = EffectSample(mask * model.mu, model.draw_globals(2).kl)
        noise = torch.randn(2, N, LATENT)
        out = loss_of(model, tensors, slice(None), sample, noise, monkeypatch, kl_weight=0.3)
    formula = Formula(model, tensors)
    mu, doses = formula.w["mu"], DOSES.double().numpy()
    reconstruction, local = np.zeros(N), np.zeros(N)
    for k in range(2):
        m = mask[k].double().numpy()
        for i in range(N):
            prior_mean = np.zeros(LATENT)
            if not unique:
                for t in range(4):
                    prior_mean += doses[i, t] * m[t] * mu[t]
            elif CONDITION_OF_CELL[i] >= 0:
                prior_mean = m[CONDITION_OF_CELL[i]] * mu[CONDITION_OF_CELL[i]]
            mean, sd = formula.encode(i)
            reconstruction[i] -= formula.log_likelihood(i, mean + sd * noise[k, i].double().numpy()) / 2
            local[i] += gaussian_kl(mean, sd, prior_mean) / 2
    pi = torch.sigmoid(model.mask_logits.detach().double())
    penalty = -Beta(1.0, 5.0).log_prob(pi).sum(1).numpy()
    counted = penalty if global_kl == "full" else penalty[:-1]
    np.testing.assert_allclose(out.reconstruction_loss_sum, reconstruction.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.kl_local_sum, local.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.kl_global_sum, counted.sum(), rtol=1e-5)
    kl = local.mean() + counted.sum() / N
    np.testing.assert_allclose(out.loss, reconstruction.mean() + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(out.extra_metrics["objective"], reconstruction.mean() + kl, rtol=1e-5)


def test_conditional_loss_is_the_formula(tensors: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = conditional(2)
    with torch.no_grad():
        torch.manual_seed(9)
        noise = torch.randn(2, N, LATENT)
        out = loss_of(model, tensors, slice(None), model.draw_globals(2), noise, monkeypatch, kl_weight=0.3)
    formula = Formula(model, tensors)
    doses = DOSES.double().numpy()
    reconstruction, local = np.zeros(N), np.zeros(N)
    for i in range(N):
        mean, sd = formula.encode(i, doses[i] @ formula.w["encoder_doses"])
        local[i] = gaussian_kl(mean, sd, np.zeros(LATENT))
        for k in range(2):
            z = mean + sd * noise[k, i].double().numpy()
            reconstruction[i] -= formula.log_likelihood(i, z, doses[i] @ formula.w["decoder_doses"]) / 2
    np.testing.assert_allclose(out.reconstruction_loss_sum, reconstruction.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.kl_local_sum, local.sum(), rtol=1e-5)
    assert out.kl_global_sum == 0
    np.testing.assert_allclose(out.loss, reconstruction.mean() + 0.3 * local.mean(), rtol=1e-5)
    np.testing.assert_allclose(out.extra_metrics["objective"], reconstruction.mean() + local.mean(), rtol=1e-5)


@pytest.mark.parametrize("build", [svaeplus, conditional])
def test_particles_equal_separate_draws(tensors: dict, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(4)
    torch.manual_seed(2)
    sample, noise = model.draw_globals(4), torch.randn(4, N, LATENT)
    learned = [p for p in model.parameters() if p.requires_grad]

    def gradient(out: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(out, learned, retain_graph=True))

    joint = loss_of(model, tensors, slice(None), sample, noise, monkeypatch).loss
    separate = torch.stack(
        [
            loss_of(
                model,
                tensors,
                slice(None),
                EffectSample(sample.effect[k : k + 1], sample.kl[k : k + 1]),
                noise[k : k + 1],
                monkeypatch,
            ).loss
            for k in range(4)
        ]
    ).mean()
    torch.testing.assert_close(joint, separate, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradient(joint), gradient(separate), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unique", [False, True])
def test_masks_of_cells_have_the_loss_of_masks_of_components(tensors: dict, unique: bool) -> None:
    """In expectation over the masks; the published variants differ in nothing else here."""
    means = {}
    for mask_draws in ("component", "cell"):
        model = svaeplus(3000, mask_draws=mask_draws, **({"conditions": CONDITIONS} if unique else {}))
        torch.manual_seed(4)
        with torch.no_grad():
            _, _, out = model(tensors, loss_kwargs={"n_obs": N})
        means[mask_draws] = torch.stack([out.kl_local["kl_local"].sum(), out.loss])
        assert len(out.kl_local["kl_local"]) == N
    torch.testing.assert_close(means["component"], means["cell"], rtol=0.02, atol=0.0)


def test_the_mask_learns_its_optimum() -> None:
    """With a likelihood linear in the mask the optimum is known: r p(1 - p) = (K - 1) p, so p = 1 - (K - 1) / r."""
    rewards = torch.tensor([[3.0, 6.0, 12.0, 24.0]])
    model = SVAEPlusModule(
        ModuleShape(GENES, 1), n_particles=1, **(SMALL | {"n_latent": 4}), mask_prior=1 / 3, mask_gradient="identity",
        mask_draws="component", mask_start=0.0, effect_start=0.0, global_kl="full",
    )  # fmt: skip
    model.mu.requires_grad_(False).fill_(1.0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([model.mask_logits], lr=0.02)
    trace = []
    for step in range(4000):
        sample = model.draw_globals(8)
        loss = sample.kl.mean() - (sample.effect * rewards).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 2000:
            trace.append(model.inclusion.detach()[0].clone())
    expected = 1 - (model.concentration - 1) / rewards[0]
    torch.testing.assert_close(torch.stack(trace).mean(0), expected, rtol=0.0, atol=0.02)
