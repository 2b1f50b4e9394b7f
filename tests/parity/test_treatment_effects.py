"""Average treatment effects of the paper's protocol against a computation in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import pertvae as pv
from pertvae._predictions import predicted_shifts
from pertvae.models.base._effects_protocol import paper_transform

LABELS = ["control"] * 6 + ["A"] * 4 + ["B"] * 4 + ["A+B"] * 4
GENES, LATENT = 9, 3


def frozen(likelihood: str = "nb", embedding: str = "mean_field", batches: bool = False) -> pv.SAMSVAE:
    """A model that was not trained: weights as initialised but larger, strong effects, rare genes, much dispersion."""
    rng = np.random.default_rng(1)
    x = rng.poisson(4.0, (len(LABELS), GENES)).astype(np.float32)
    adata = AnnData(x if likelihood == "normal" else sp.csr_matrix(x))
    adata.obs["perturbation"] = LABELS
    adata.obs["batch"] = pd.Categorical(["x", "y", "y", "y", "y", "x"] + ["x"] * 12)
    setup: dict[str, Any] = {"batch_key": "batch"} if batches else {}
    pv.SAMSVAE.setup_anndata(
        adata, perturbation_key="perturbation", control="control", is_count_data=likelihood != "normal", **setup
    )
    torch.manual_seed(0)
    model = pv.SAMSVAE(
        adata, n_latent=LATENT, n_hidden=6, n_layers=2, gene_likelihood=likelihood, embedding_inference=embedding
    )
    m = model.module
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.5 * torch.randn(p.shape))
        m.effects.mask_logits.copy_(torch.tensor([[2.0, -1.0, 0.0], [-0.5, 1.0, -3.0]]))
        # from some in a thousand counts to nearly all of them: sampling moves the mean of the logarithm of the rare
        m.decoder.out.bias.copy_(torch.linspace(-7.0, 3.0, GENES))
        if m.decoder.log_scale is not None:
            m.decoder.log_scale.copy_(torch.linspace(1.0, -1.5, GENES))
    model.is_trained_ = True
    return model


def effects_by_hand(
    model: pv.SAMSVAE, labels: dict[str, list[int]], particles: int, transform: Any, batch: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.2 in numpy: effects and their standard errors, labels x genes."""
    m, rng = model.module, np.random.default_rng(77)
    weights = {k: v.numpy().astype(float) for k, v in m.state_dict().items()}

    def expression(z: np.ndarray) -> np.ndarray:
        inputs = z if batch is None else np.concatenate([z, np.eye(2)[rng.choice(batch, len(z))]], 1)
        h = inputs @ weights["decoder.mlp.first.weight"].T + weights["decoder.mlp.first.bias"]
        h = np.where(h > 0, h, 0.01 * h)
        step = h @ weights["decoder.mlp.rest.0.weight"].T + weights["decoder.mlp.rest.0.bias"]
        h = h + np.where(step > 0, step, 0.01 * step)
        out = h @ weights["decoder.out.weight"].T + weights["decoder.out.bias"]
        if m.gene_likelihood == "normal":
            return out + np.exp(weights["decoder.log_scale"]) * rng.standard_normal(out.shape)
        share = np.exp(out - out.max(1, keepdims=True))
        mean = 10_000 * share / share.sum(1, keepdims=True) + 1e-4
        if m.gene_likelihood == "poisson":
            return rng.poisson(mean).astype(float)
        theta = np.exp(weights["decoder.log_scale"])
        return rng.negative_binomial(theta, theta / (theta + mean)).astype(float)

    if m.effects.embedding_inference == "mean_field":
        probability = 1 / (1 + np.exp(-weights["effects.mask_logits"]))
        shape = (particles, *probability.shape)
        effect = weights["effects.loc"] + (np.exp(weights["effects.log_sd"]) + 1e-4) * rng.standard_normal(shape)
        effect = effect * (rng.random(shape) < probability)
    else:
        effect = m.draw_globals(particles, torch.Generator().manual_seed(5)).effect.numpy()
    y = [transform(expression(rng.standard_normal((particles, LATENT))))]
    for components in labels.values():
        y.append(transform(expression(rng.standard_normal((particles, LATENT)) + effect[:, components].sum(1))))
    mean = np.stack([v.mean(0) for v in y])
    error = np.stack([v.var(0) / particles for v in y])
    return mean[1:] - mean[0], np.sqrt(error[1:] + error[0])


def log2_cp10k(x: np.ndarray) -> np.ndarray:
    total = x.sum(1, keepdims=True)
    return np.log2(1 + 1e4 * np.divide(x, total, out=np.zeros_like(x), where=total > 0))


CASES = {"A": [0], "B": [1], "A+B": [0, 1]}


@pytest.mark.parametrize(
    ("likelihood", "embedding", "batches", "space"),
    [
        ("nb", "mean_field", False, None),
        ("nb", "mean_field", True, None),
        ("nb", "correlated", False, "log2_cp10k"),
        ("nb", "mean_field", False, "mean"),
        ("poisson", "mean_field", False, "log1p_cp10k"),
        ("normal", "mean_field", False, None),
    ],
)
@torch.inference_mode()
def test_paper_protocol_against_numpy(likelihood: str, embedding: str, batches: bool, space: str | None) -> None:
    model = frozen(likelihood, embedding, batches)
    transforms = {"log1p_cp10k": lambda x: np.log(2) * log2_cp10k(x), "mean": lambda x: x, None: log2_cp10k}
    transform = (lambda x: x) if likelihood == "normal" else transforms.get(space, log2_cp10k)
    codes = np.array([0, 1, 1, 1, 1, 0]) if batches else None
    expected, error = effects_by_hand(model, CASES, 60_000, transform, codes)
    found = model.get_treatment_effects(
        list(CASES), protocol="paper", n_samples=60_000, space=space, credible=0.95, key_added=None
    )
    half = (found.upper - found.lower).to_numpy() / 2
    # the interval is that of the mean over as many particles as the computation by hand has
    np.testing.assert_allclose(half, 1.959964 * error, rtol=0.3 if space == "mean" else 0.05)  # counts: heavy tails
    distance = np.abs(found.mean.to_numpy() - expected) / np.sqrt(2 * error**2)
    assert distance.max() < 4.5
    assert np.sqrt((distance**2).mean()) < 1.6  # one normal deviate each, a common control error in each gene
    assert (np.abs(expected) > 10 * error).sum() > 5  # so that something is compared


@pytest.mark.parametrize("name", ["ConditionalVAE", "SVAEPlus", "SVAEPlus unique"])
def test_siblings_without_a_posterior_of_effects(name: str) -> None:
    """Their particles are the cells that ``predict_perturbation`` samples from the prior at a library of 10,000."""
    model = frozen()
    cls, *unique = name.split()
    arguments: dict[str, Any] = {"combinations": "unique"} if unique else {}
    adata = model.adata.copy()
    getattr(pv, cls).setup_anndata(adata, perturbation_key="perturbation", control="control")
    sibling = getattr(pv, cls)(adata, n_latent=LATENT, n_hidden=6, **arguments)
    with pytest.warns(UserWarning, match="Early stopping is off"):
        sibling.train(max_epochs=1, train_size=1.0, accelerator="cpu", enable_progress_bar=False)
    m = sibling.module
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(1.5 * torch.randn(p.shape))
        m.decoder.out.bias.copy_(torch.linspace(-7.0, 3.0, GENES))
        m.decoder.log_scale.copy_(torch.linspace(1.0, -1.5, GENES))
    options: dict[str, Any] = {"n_samples": 20_000, "space": "log1p_cp10k", "credible": 0.95, "key_added": None}
    found = sibling.get_treatment_effects(list(CASES), protocol="paper", **options)
    predicted = sibling.predict_perturbation(
        list(CASES), basal="prior", library_size=1e4, n_cells=20_000, indices=np.arange(6), key_added=None
    )
    expected = predicted_shifts(predicted).loc[list(CASES)].to_numpy()
    error = (found.upper - found.lower).to_numpy() / (2 * 1.96)
    distance = np.abs(found.mean.to_numpy() - expected) / np.sqrt(2 * error**2)
    assert distance.max() < 4.5
    assert (np.abs(expected) > 10 * error).sum() > 5
    with pytest.raises(ValueError, match=f"{cls}.*protocol='paper'"):
        sibling.get_treatment_effects("A")


def test_expected_counts_would_be_seen() -> None:
    """The test above can tell sampled counts from expected ones."""
    model = frozen()
    sampled = model.get_treatment_effects("A", protocol="paper", n_samples=20_000, key_added=None)
    expected = model.get_treatment_effects("A", n_samples=200, space="log2_cp10k", key_added=None)
    margin = (sampled.upper - sampled.lower).to_numpy()
    assert (np.abs(sampled.mean.to_numpy() - expected.mean.to_numpy()) > 3 * margin).any()


@torch.inference_mode()
def test_what_particles_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and effects are shared by all labels, basal states are not, the library is 10,000."""
    model = frozen(batches=True)
    seen: list[tuple[torch.Tensor, ...]] = []
    noise: list[tuple[torch.Tensor, torch.Tensor]] = []
    draw = model.module.draw_offset

    def spy(components: Any, doses: Any, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        noise.append((uniform, normal))
        return draw(components, doses, uniform, normal) * 0.0  # so that the decoder sees basal states

    monkeypatch.setattr(model.module, "draw_offset", spy)
    model.module.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.get_treatment_effects(["A", "A+B", "control"], protocol="paper", n_samples=1_000, key_added=None)
    (first_u, first_n), (both_u, both_n) = noise
    assert first_u.shape == (1_000, 1, LATENT)
    assert torch.equal(first_u[:, 0], both_u[:, 0])
    assert torch.equal(first_n[:, 0], both_n[:, 0])
    assert not torch.equal(both_n[:, 0], both_n[:, 1])
    basal, covariates, library = (torch.cat(parts).reshape(3, 1_000, -1) for parts in zip(*seen, strict=True))
    flat = basal.reshape(3, -1).numpy()
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.08
    assert abs(flat.mean()) < 0.03
    assert abs(flat.std() - 1) < 0.03
    assert (library == 10_000).all()
    assert torch.equal(covariates[0], covariates[1])
    assert covariates[0].mean(0).numpy() == pytest.approx([1 / 3, 2 / 3], abs=0.06)  # of the control cells


def test_labels_order_and_seeds() -> None:
    model = frozen()
    options: dict[str, Any] = {"protocol": "paper", "n_samples": 300, "key_added": None}
    many = model.get_treatment_effects(["A", "B+A", "control"], **options)
    alone = model.get_treatment_effects("A+B", **options)
    np.testing.assert_array_equal(alone.mean.loc["A+B"], many.mean.loc["B+A"])
    assert (many.mean.loc["control"] == 0).all()
    assert (many.upper.loc["control"] == 0).all()
    assert not np.array_equal(model.get_treatment_effects("A+B", seed=1, **options).mean, alone.mean)
    # a dose of 2 moves twice as far, in the latent space
    doses = pd.DataFrame({"A": [1.0, 2.0], "B": [1.0, 0.0]}, index=["pair", "twice"])
    dosed = model.get_treatment_effects(doses, **options)
    np.testing.assert_array_equal(dosed.mean.loc["pair"], alone.mean.loc["A+B"])
    assert not np.array_equal(dosed.mean.loc["twice"], many.mean.loc["A"])


def test_the_number_of_particles_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen()
    sizes: list[int] = []
    model.module.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    default = model.get_treatment_effects("A", protocol="paper")
    assert sum(sizes) == 2 * 2_500
    same = model.get_treatment_effects("A", protocol="paper", space="log2_cp10k", key_added=None)
    pd.testing.assert_frame_equal(default.mean, same.mean)
    assert list(model.adata.uns["samsvae_effects"]["mean"].index) == list(model.adata.var_names)


def test_matched_effects_in_bits_are_those_in_nats() -> None:
    model = frozen()
    nats = model.get_treatment_effects(["A", "A+B"], key_added=None)
    bits = model.get_treatment_effects(["A", "A+B"], space="log2_cp10k", key_added=None)
    for name in ("mean", "lower", "upper"):
        np.testing.assert_allclose(getattr(bits, name) * np.log(2), getattr(nats, name), rtol=1e-5)


def test_transform() -> None:
    x = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(paper_transform(x, "log2_cp10k"), log2_cp10k(x))
    assert paper_transform(x, "log2_cp10k")[0, 0] == pytest.approx(np.log2(7_501))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "papers"}, r"protocol='papers'.*'paper'"),
        ({"protocol": "paper", "space": "log2_fold_change"}, r"log2_fold_change.*log2_cp10k"),
        ({"protocol": "matched", "space": "mean"}, r"mean.*log1p_cp10k"),
        ({"protocol": "paper", "n_samples": 1}, "n_samples=1"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frozen().get_treatment_effects("A", **arguments)


def test_particles_leave_the_global_random_state_alone() -> None:
    model = frozen(batches=True)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    model.get_treatment_effects(protocol="paper", n_samples=20, key_added=None)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
