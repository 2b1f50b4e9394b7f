"""Doses as categories in SAMS-VAE's module: shifts, bound, draws and turns, against sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape, TrainingStatistics
from pertvae.models.samsvae import SAMSVAEModule
from pertvae.models.samsvae._cpavae import CPAVAEModule
from pertvae.models.samsvae._sparsify import COST, Sparsifier
from pertvae.nn import gathered_shift

DOSES = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0.1, 3, 0], [0, 0, 5], [1, 3, 5], [0, 0, 7], [4, 0, 0]]).float()
# perturbation 1 has one dose, dose 7 of perturbation 2 and dose 4 of perturbation 0 have no training cells
LEVELS = [(0, 0.1), (0, 1.0), (0, 2.0), (1, 3.0), (2, 5.0), (2, 6.0), (2, 7.0)]
CELLS = {(0, float(np.float32(0.1))): 10, (0, 1.0): 20, (0, 2.0): 30, (1, 3.0): 40, (2, 5.0): 5, (2, 6.0): 15}
OF_CELL = [[], [(0, 1)], [(0, 2)], [(0, 0), (1, None)], [(2, 4)], [(0, 1), (1, None), (2, 4)], [(2, None)], [(0, None)]]
"""Perturbations and levels of the cells; ``None`` where nothing deviates."""
N, GENES, LATENT, SCALE = len(DOSES), 10, 4, 0.8
FREE = torch.tensor([True, True, True, False, True, True, False])
KINDS = ("mean_field", "correlated", "gated", "low_rank")


def module(cls: type[SAMSVAEModule] = SAMSVAEModule, **settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
        "effect_prior_scale": 2.0,
        "embedding_inference": "mean_field",
        "basal_inference": "correlated",
        "dose_response": "categories",
        "dose_levels": LEVELS,
        "dose_deviation_scale": SCALE / 2.0,
        **({"effect_threshold": 0.5} if cls is CPAVAEModule else {"mask_prior": 0.1}),
    }
    made = cls(ModuleShape(GENES, 3), **(arguments | settings))
    made.set_training_statistics(
        TrainingStatistics(
            input_mean=np.ones(GENES),
            input_sd=np.ones(GENES),
            output_bias=np.zeros(GENES),
            output_log_scale=np.zeros(GENES),
            cells_per_component=np.array([60.0, 40.0, 20.0]),
            n_cells=100,
            max_active=3,
            cells_per_dose=CELLS,
        )
    )
    with torch.no_grad():
        for name, parameter in made.effects.named_parameters():
            if name in ("loc", "log_sd", "mask_logits", "factor"):
                parameter.normal_()
        made.levels.loc.normal_()
        made.levels.log_sd.normal_(-1.0, 0.5)
        made.leak.normal_()
        made.leak_sd.uniform_()
    return made


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    x = torch.poisson(torch.full((N, GENES), 5.0), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(N, 1)
    return {"X": x, PERTURBATION_REGISTRY_KEY: DOSES, "batch": zeros, "labels": zeros}


def by_hand(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Shifts of the cells from the effects of perturbations and what levels add to them."""
    shifts = torch.zeros(N, LATENT)
    for i, given in enumerate(OF_CELL):
        for component, level in given:
            shifts[i] += shared[component] + (0.0 if level is None else own[level])
    return shifts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("particles", [1, 3])
def test_shifts_of_training(tensors: dict, kind: str, particles: int) -> None:
    """One mask for effect and deviation; the number of the dose is not multiplied by."""
    model = module(embedding_inference=kind, n_particles=particles)
    torch.manual_seed(3)
    sample = model.draw_globals(particles)
    torch.manual_seed(3)
    shared = model.effects.sample(particles)
    noise = torch.randn(particles, len(LEVELS), LATENT)
    deviation = model.levels.loc + model.levels.log_sd.exp() * noise
    out = model.inference(**model._get_inference_input(tensors), globals_=sample)
    shift = (out["z"] - out["z_basal"]).reshape(particles, N, LATENT)
    for k in range(particles):
        mask = shared.mask[k]
        expected = by_hand(shared.effect[k], mask[model.levels.component] * deviation[k])
        torch.testing.assert_close(shift[k], expected, rtol=1e-4, atol=1e-5)


def test_expected_shift_and_encoder_input(tensors: dict) -> None:
    model = module()
    inclusion = model.effects.inclusion
    own = inclusion[model.levels.component] * model.levels.loc
    expected = by_hand(model.effects.expected(), own)
    leak = by_hand(model.leak, torch.zeros(len(LEVELS), LATENT))
    torch.testing.assert_close(model.offset(DOSES), expected + leak, rtol=1e-4, atol=1e-5)
    inputs = model._get_inference_input(tensors)
    mean, sd = model.encode(inputs["x"], expected, None)
    found = model.basal_posterior(inputs)
    torch.testing.assert_close(found[0], mean - leak, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], sd, rtol=1e-4, atol=1e-5)


def normal_kl(mean: torch.Tensor, sd: torch.Tensor, prior: float) -> torch.Tensor:
    normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(normal(mean, sd), normal(0.0, prior)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_bound_holds_the_divergence_of_the_deviations_that_act(tensors: dict, kind: str) -> None:
    model = module(embedding_inference=kind)
    torch.manual_seed(3)
    _, _, out = model(tensors, loss_kwargs={"n_obs": 100})
    torch.manual_seed(3)
    shared = model.effects.sample(1).kl.sum()
    own = normal_kl(model.levels.loc, model.levels.log_sd.exp(), SCALE)[FREE].sum()
    torch.testing.assert_close(out.kl_global_sum, shared + own, rtol=1e-4, atol=1e-4)
    parts = (out.reconstruction_loss_sum + out.kl_local_sum) / N + out.kl_global_sum / 100
    torch.testing.assert_close(out.loss, parts)
    out.loss.backward()
    moved = model.levels.loc.grad.abs().sum(1) > 0
    assert torch.equal(moved, FREE)


def test_plate_pays_for_each_level_once_an_epoch() -> None:
    """Over the cells of the training data, each pays its share of its perturbation and of its level."""
    model = module(global_kl="plate")
    rows = torch.cat([torch.eye(3)[c].expand(n, 3) * d for (c, d), n in CELLS.items()])
    n = len(rows)
    tensors = {"X": torch.ones(n, GENES), PERTURBATION_REGISTRY_KEY: rows, "batch": torch.zeros(n, 1)}
    tensors["labels"] = tensors["batch"]
    torch.manual_seed(3)
    _, _, out = model(tensors, loss_kwargs={"n_obs": n})
    torch.manual_seed(3)
    own = normal_kl(model.levels.loc, model.levels.log_sd.exp(), SCALE)[FREE].sum()
    torch.testing.assert_close(out.kl_global_sum, model.effects.sample(1).kl.sum() + own, rtol=1e-4, atol=1e-4)
    # cells of one level pay a share of that level alone
    one = {k: v[:5] for k, v in tensors.items()}
    torch.manual_seed(3)
    _, _, out = model(one, loss_kwargs={"n_obs": 1})
    torch.manual_seed(3)
    first = normal_kl(model.levels.loc, model.levels.log_sd.exp(), SCALE)[0]
    torch.testing.assert_close(
        out.kl_global_sum, model.effects.sample(1).kl[0, 0] / 60 + first / 10, rtol=1e-4, atol=1e-5
    )


def test_gathered_shifts_are_those_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module()
    sample = model.draw_globals(2)
    product = model.eval().shift_of(sample, DOSES)
    monkeypatch.setattr("pertvae.models.samsvae._common.GATHER_FROM", 1)
    used: list[int] = []
    monkeypatch.setattr(
        "pertvae.models.samsvae._common.gathered_shift", lambda *a: used.append(a[-1]) or gathered_shift(*a)
    )
    torch.testing.assert_close(model.train().shift_of(sample, DOSES), product)
    assert used == [6]  # three perturbations, each with its level


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_spread_of_effect_and_deviation(kind: str) -> None:
    """Mean and covariance of many draws are those of the sum of independent draws, under one mask."""
    model = module(embedding_inference=kind)
    n, components, doses = 40_000, torch.tensor([2, 0, 1]), torch.tensor([5.0, 2.0, 3.0])
    g = torch.Generator().manual_seed(0)
    uniform, normal = (f(n, 3, LATENT, generator=g) for f in (torch.rand, torch.randn))
    with torch.no_grad():
        found = model.draw_offset(components, doses, uniform, normal)
        torch.manual_seed(1)
        sample = model.eval().draw_globals(n)
        row = torch.zeros(1, 3)
        row[0, components] = doses
        expected = model.shift_of(sample, row)[:, 0] + model.leak[components].sum(0)
    assert torch.equal(model.leak_shift(components, doses), model.leak[components].sum(0))
    torch.testing.assert_close(
        model.leak_spread(components, doses), model.leak_sd[components].square().sum(0).sqrt(), rtol=1e-5, atol=0
    )
    scale = float(expected.std())
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=0.03 * scale)
    torch.testing.assert_close(found.T.cov(), expected.T.cov(), rtol=0, atol=0.06 * scale**2)
    # a dose without training cells has the spread of the shared effect alone
    with torch.no_grad():
        plain = model.draw_offset(components[:1], torch.tensor([7.0]), uniform[:, :1], normal[:, :1])
        shared = model.effects.draw(components[:1], uniform[:, :1], normal[:, :1])[:, 0]
    torch.testing.assert_close(plain, shared + model.leak[2])


def test_rotation_turns_the_deviations() -> None:
    model = module(embedding_inference="mean_field")
    model.effects.open = True
    before, (mean, sd) = model.offset(DOSES).detach(), (t.detach().clone() for t in model.levels.posterior())
    rotation = torch.linalg.qr(torch.randn(LATENT, LATENT))[0]
    z = torch.randn(N, LATENT)
    decoded = model.decode(z + before, DOSES, None, torch.ones(N, 1)).mean
    model.rotate(rotation)
    after = model.offset(DOSES)
    torch.testing.assert_close(after, before @ rotation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.decode(z @ rotation + after, DOSES, None, torch.ones(N, 1)).mean, decoded, rtol=1e-3, atol=1e-5
    )
    turned_mean, turned_sd = model.levels.posterior()
    torch.testing.assert_close(turned_mean, mean @ rotation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_sd, (sd.square() @ rotation.square()).sqrt(), rtol=1e-4, atol=1e-5)


def test_masks_start_from_the_shifts_of_the_doses() -> None:
    """Doses that act in opposite ways leave nothing in the effect they share, and still need a mask."""
    model = module()
    model.effects.open = True
    with torch.no_grad():
        model.effects.loc.zero_()
        model.effects.log_sd.fill_(-3.0)
        model.levels.loc.zero_()
        model.levels.log_sd.fill_(-3.0)
        model.levels.loc[:3, 1] = torch.tensor([2.0, -2.0, 1.0])
        model.levels.loc[3] = 50.0  # the only dose of its perturbation: not in the model
        model.levels.loc[6] = 50.0  # without training cells
        model.effects.loc[1, 2] = 1.5
    shifts = model.dense_shifts()
    expected = torch.zeros(6, LATENT)
    expected[0, 2] = 1.5  # the perturbation without deviations, then the levels
    expected[1:4, 1] = torch.tensor([2.0, -2.0, 1.0])
    torch.testing.assert_close(shifts, expected)
    smallest = model.start_masks(0.99)
    # root mean square over the training cells, 10 + 20 + 30
    root = np.sqrt((10 * 4 + 20 * 4 + 30 * 1) / 60)
    np.testing.assert_allclose(smallest, min(root, 1.5), rtol=1e-5)
    is_open = model.effects.inclusion > 0.5
    assert is_open.nonzero().tolist() == [[0, 1], [1, 2]]
    assert not model.effects.open


def test_phases_look_at_the_doses() -> None:
    """The rotation, the masks and their cost in training are those of the shifts of the doses."""
    model = module()
    phases = Sparsifier(model)
    phases.open_masks()
    phases.was_dense = True
    turn = torch.linalg.qr(torch.randn(LATENT, LATENT))[0]
    sparse = torch.zeros(len(LEVELS), LATENT)
    sparse[:3, 1] = torch.tensor([3.0, -3.0, 2.0])
    sparse[4:6, 2] = torch.tensor([2.0, -2.0])
    with torch.no_grad():
        model.effects.loc.zero_()
        model.effects.log_sd.fill_(-3.0)
        model.levels.loc.copy_(sparse @ turn)
        model.levels.log_sd.fill_(-3.0)
    phases.rotate_and_start()
    assert (model.effects.inclusion > 0.5).sum(1).tolist() == [1, 0, 1]
    largest = model.levels.posterior()[0][[4, 5]].abs().max()
    np.testing.assert_allclose(float(largest), 2.0, rtol=0.05)
    np.testing.assert_allclose(phases.cost, COST * float(largest) ** 2, rtol=1e-3)
    np.testing.assert_allclose(phases.size, float(largest), rtol=1e-3)


def test_a_dose_without_evidence_does_not_open_a_mask() -> None:
    model = module()
    with torch.no_grad():
        model.effects.loc.zero_()
        model.effects.log_sd.fill_(-3.0)
        model.levels.loc.zero_()
        model.levels.loc[0, 0] = 1.0
        model.levels.log_sd.fill_(0.0)  # as wide as it is far
    model.start_masks(1.0)
    assert not (model.effects.inclusion > 0.5).any()


def test_what_was_learned_once_stays_known() -> None:
    levels = module().levels
    assert torch.equal(levels.free, FREE)
    levels.set_cells({(2, 7.0): 3, (1, 3.0): 8})
    assert levels.cells.tolist() == [0, 0, 0, 8, 0, 0, 3]
    assert torch.equal(levels.free, FREE | torch.tensor([False] * 6 + [True]))
    assert levels.known.all()


def test_inclusion_of_cpavae_is_that_of_the_largest_dose() -> None:
    model = module(CPAVAEModule)
    with torch.no_grad():
        model.effects.loc.zero_()
        model.effects.log_sd.fill_(-6.0)
        model.levels.log_sd.fill_(-6.0)
        model.levels.loc.zero_()
        model.levels.loc[1, 2] = -3.0
        model.levels.loc[6, 0] = 9.0  # without training cells
        model.effects.loc[1, 3] = 3.0
    effects, inclusion = model.program_tables()
    expected = torch.zeros(3, LATENT)
    expected[0, 2] = expected[1, 3] = 1.0
    torch.testing.assert_close(inclusion, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(effects, model.effects.loc)


def test_start_and_sizes() -> None:
    """Deviations start at their prior, cost nothing there, and change no other weight's start."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "n_latent": LATENT, "n_hidden": 8, "n_layers": 1, "n_particles": 1, "gene_likelihood": "nb", "mask_prior": 0.1,
        "effect_prior_scale": 3.0, "embedding_inference": "mean_field", "basal_inference": "correlated",
    }  # fmt: skip
    plain = SAMSVAEModule(ModuleShape(GENES, 3), **settings)
    torch.manual_seed(0)
    model = SAMSVAEModule(ModuleShape(GENES, 3), dose_response="categories", dose_levels=LEVELS, **settings)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    more = {n.removeprefix("levels.") for n in set(model.state_dict()) - set(plain.state_dict())}
    assert more == {"component", "dose", "cells", "known", "free", "loc", "log_sd"}
    model.levels.set_cells(CELLS)
    assert (model.levels.loc == 0).all()
    torch.testing.assert_close(model.levels.log_sd.exp(), torch.full((7, LATENT), 1.5))
    assert model.levels.sample(2)[1].abs().max() < 1e-6
    ids = {id(p) for p in model.global_parameters()}
    assert all(id(p) in ids for p in model.levels.parameters())
