"""Validation cells speak for and against the masks that training opened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.models.base._access import dose_table, minibatches
from pertvae.models.samsvae import _evidence
from pertvae.models.samsvae._evidence import DRAWS, MARGIN, chosen_cells, evidence_for, heed_validation_cells


@pytest.fixture
def model(adata: AnnData, model_of: Callable, quiet: dict) -> pv.SAMSVAE:
    """A model with masks open and closed, all with effects."""
    model = model_of(adata, sparsify="published")
    model.train(max_epochs=20, batch_size=128, split_key="split", **quiet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.module.effects.loc.normal_(std=3.0, generator=generator)
        model.module.effects.mask_logits.fill_(-4.0)[:, ::2] = 4.0
    return model


def ask(model: pv.SAMSVAE, asked: torch.Tensor) -> torch.Tensor:
    """Evidence of the chosen validation cells."""
    return evidence_for(model, asked, *chosen_cells(model, asked.any(1).numpy()))


@torch.inference_mode()
def naive_evidence(model: pv.SAMSVAE, component: int, latent: int) -> float:
    """Evidence for one mask from its component's validation cells alone, with and without it by the same noise."""
    module, adata = model.module, model.adata
    module.eval()
    rows = np.sort(np.asarray(model.validation_indices))
    rows = rows[dose_table(model, adata)[rows][:, [component]].toarray()[:, 0] > 0]
    kept = module.effects.mask_logits.clone()
    module.effects.mask_logits[kept > 0] = 20.0  # with the masks, whatever their probability
    with_mask = module.draw_globals(DRAWS, torch.Generator().manual_seed(0))
    module.effects.mask_logits[component, latent] = -20.0
    without = module.draw_globals(DRAWS, torch.Generator().manual_seed(0))
    module.effects.mask_logits.copy_(kept)
    total = 0.0
    for block, (positions, tensors) in enumerate(minibatches(model, adata, rows)):
        for sign, globals_ in ((1, without), (-1, with_mask)):
            outputs = module.inference(
                **module._get_inference_input(tensors),
                globals_=globals_,
                generator=torch.Generator().manual_seed(block + 1),
            )
            px = module.generative(**module._get_generative_input(tensors, outputs))
            reconstruction = -px["px"].log_prob(tensors["X"]).sum(-1)
            mean, sd = outputs["basal_mean"], outputs["basal_sd"]
            kl = 0.5 * (mean.square() + sd.square() - 1 - 2 * sd.log()).sum(-1)
            if "basal_log_q" in outputs:
                kl = outputs["basal_log_q"] - torch.distributions.Normal(0, 1).log_prob(outputs["z_basal"]).sum(-1)
            total += sign * float((reconstruction + kl).mean(0)[: len(positions)].double().sum())
    return total


OPTIONS: dict[str, dict] = {
    "default": {},
    "categories": {"dose_response": "categories"},
    "hill": {"dose_response": "hill"},
    "iwae": {"objective": "iwae", "n_particles": 3},
    "gated": {"embedding_inference": "gated"},
    "low_rank": {"embedding_inference": "low_rank"},
    "correlated": {"embedding_inference": "correlated"},
    "correlated categories": {"embedding_inference": "correlated", "dose_response": "categories"},
    "flow": {"basal_posterior": "flow"},
    "mean_field": {"basal_inference": "mean_field"},
    "covariates": {},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_evidence_is_what_cells_lose_without_the_mask(
    adata: AnnData, model_of: Callable, quiet: dict, option: str
) -> None:
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 3 == 0, "0.5", "1")
    parts = adata.obs["perturbation"].astype(str).str.count(r"\+") + 1
    adata.obs["dose"] = ["+".join([d] * n) for d, n in zip(adata.obs["dose"], parts, strict=True)]
    setup = {"batch_key": "batch"} if option == "covariates" else {"dosage_key": "dose"}
    model = model_of(adata, setup, sparsify="published", **OPTIONS[option])
    model.train(max_epochs=2, split_key="split", **quiet)
    module = model.module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if OPTIONS[option].get("embedding_inference") == "correlated":
            for parameter in (module.effects.from_mask.weight, *module.effects.head.parameters()):
                parameter.normal_(generator=generator)
        else:
            module.effects.loc.normal_(std=3.0, generator=generator)
        if module.levels is not None:
            module.levels.loc.normal_(std=2.0, generator=generator)
        module.effects.mask_logits.fill_(-4.0)[:, ::2] = 0.5  # p = 0.62
    # one mask at a time: then the blocks hold the same cells, with the same noise
    for component, latent in ((0, 0), (3, 4), (5, 2)):
        asked = torch.zeros_like(module.effects.mask_logits, dtype=torch.bool)
        asked[component, latent] = True
        found = ask(model, asked)
        expected = naive_evidence(model, component, latent)
        assert abs(expected) > 0.2
        assert float(found[component, latent]) == pytest.approx(expected, rel=1e-3, abs=1e-2)
        assert (found[~asked] == 0).all()
    assert (module.effects.mask_logits[:, ::2] == 0.5).all()


def test_masks_are_asked_one_by_one_whatever_else_is_asked(model: pv.SAMSVAE) -> None:
    asked = model.module.effects.mask_logits > 0
    together = ask(model, asked)
    for component, latent in ((1, 0), (6, 2), (7, 4)):
        alone = torch.zeros_like(asked)
        alone[component, latent] = True
        # other cells stand beside them in the blocks, with other draws of the basal state
        assert float(ask(model, alone)[component, latent]) == pytest.approx(
            float(together[component, latent]), rel=0.25, abs=4
        )


def fake_evidence(monkeypatch: pytest.MonkeyPatch, *tables: torch.Tensor) -> list[torch.Tensor]:
    """Let the validation cells say this, call by call; return what was asked."""
    asked_for: list[torch.Tensor] = []

    def say(model: pv.SAMSVAE, asked: torch.Tensor, *cells: Any) -> torch.Tensor:
        asked_for.append(asked.clone())
        return torch.where(asked, tables[len(asked_for) - 1], torch.zeros_like(tables[0]))

    monkeypatch.setattr(_evidence, "evidence_for", say)
    return asked_for


@pytest.fixture
def weak(model: pv.SAMSVAE) -> pv.SAMSVAE:
    """Log-odds of 4 for open masks, and no more by their effects."""
    with torch.no_grad():
        model.module.effects.loc.fill_(0.1)
        model.module.effects.log_sd.fill_(0.0)
    assert model.module.mask_odds().max() < 0
    return model


def test_a_mask_closes_if_the_evidence_outweighs_its_log_odds(
    weak: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects = weak.module.effects
    before = effects.mask_logits.detach().clone()
    says = torch.zeros_like(before)
    says[0, 0], says[3, 0], says[1, 0], says[3, 1] = 50.0, -3.9, -4.1, -50.0
    asked = fake_evidence(monkeypatch, says, says)
    heed_validation_cells(weak)  # latent 0 has support by perturbation 0
    expected = before.clone()
    expected[1, 0] = effects.base_logit
    torch.testing.assert_close(effects.mask_logits.detach(), expected)
    assert effects.loc[1, 0] == 0
    assert effects.log_sd[1, 0].exp().item() == pytest.approx(1.0, abs=1e-3)
    assert effects.loc[3, 0] == effects.loc[3, 1] == 0.1
    torch.testing.assert_close(asked[0], before > 0)
    # after one was closed, other masks of its cells are asked again
    labels = weak.adata.obs["perturbation"].astype(str)[weak.validation_indices]
    name = weak.perturbation_names[1]
    partners = {p for label in labels for p in label.split("+") if name in label.split("+")}
    assert len(partners) > 1
    rows = torch.tensor([n in partners for n in weak.perturbation_names])
    again = (before > 0) & rows[:, None]
    again[1, 0] = False
    torch.testing.assert_close(asked[1], again)
    assert len(asked) == 2


def test_log_odds_count_the_effects(weak: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of masks that are open do not grow; what their effects say does."""
    effects = weak.module.effects
    with torch.no_grad():
        effects.loc[1, 0], effects.log_sd[1, 0] = 2.0, np.log(0.2)  # Bayes factor of 50 - 1.6 nats
    odds = float(weak.module.mask_odds()[1, 0].detach())
    assert odds == pytest.approx(effects.base_logit + 0.5 * 100 + np.log(0.2), abs=0.1)
    for evidence, stays in ((-odds + 1, True), (-odds - 1, False)):
        says = torch.zeros_like(effects.mask_logits)
        says[0, 0], says[1, 0] = 500.0, evidence
        fake_evidence(monkeypatch, says, says)
        heed_validation_cells(weak)
        assert bool(effects.mask_logits[1, 0] > 0) == stays


def test_a_latent_without_support_is_left_by_the_worst(model: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = model.module.effects
    with torch.no_grad():
        effects.loc.fill_(9.0)
        effects.log_sd.fill_(-3.0)  # sure by training cells
    before = effects.mask_logits.detach().clone()
    says = torch.zeros_like(before)
    says[:, 0] = torch.tensor([-1.1 - MARGIN, -4, 4, 1, 0, 0, 0, 0])
    says[:, 2] = torch.tensor([-0.9 - MARGIN, -4, 4, 1, 0, 0, 0, 0])
    says[:, 4] = torch.tensor([-7 - MARGIN, 1.0, 3.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    fake_evidence(monkeypatch, *[says] * 9)
    heed_validation_cells(model)
    closed = (before > 0) & (effects.mask_logits < 0)
    expected = torch.zeros_like(closed)
    expected[0, 0] = expected[0, 4] = True
    assert says[:, 2].sum() > -MARGIN > says[:, 0].sum()
    torch.testing.assert_close(closed, expected)


def test_the_worst_is_closed_first_and_may_save_the_other(weak: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = weak.module.effects
    first, second = torch.zeros_like(effects.mask_logits), torch.zeros_like(effects.mask_logits)
    first[3, 0] = second[3, 0] = 40.0  # another's gain supports the latent
    first[4, 0], first[4, 2] = -20.0, -30.0
    second[4, 0] = -1.0
    fake_evidence(monkeypatch, first, second)
    heed_validation_cells(weak)
    assert effects.mask_logits[4, 2].item() == pytest.approx(effects.base_logit)
    assert effects.mask_logits[4, 0].item() == pytest.approx(4.0)


def test_masks_that_stay_are_left_as_they_are(model: pv.SAMSVAE) -> None:
    before = model.module.effects.mask_logits.detach().clone()
    heed_validation_cells(model)
    after = model.module.effects.mask_logits.detach()
    closed = (before > 0) & (after < 0)
    assert 0 < closed.sum() < (before > 0).sum()
    assert (after == before)[~closed].all()


def test_weights_that_are_not_numbers_say_nothing(model: pv.SAMSVAE) -> None:
    before = model.module.effects.mask_logits.detach().clone()
    with torch.no_grad():
        model.module.decoder.out.weight.fill_(float("nan"))
    heed_validation_cells(model)
    torch.testing.assert_close(model.module.effects.mask_logits.detach(), before)


def test_closed_masks_close_the_doses_too(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    adata.obs["dose"] = ["1" if i % 3 else "0.5" for i in range(adata.n_obs)]
    adata = adata[~adata.obs["perturbation"].astype(str).str.contains("+", regex=False)].copy()
    model = model_of(adata, {"dosage_key": "dose"}, sparsify="published", dose_response="categories", mask_prior=0.3)
    model.train(max_epochs=1, split_key="split", **quiet)
    levels = model.module.levels
    with torch.no_grad():
        levels.loc.fill_(3.0)
        levels.log_sd.fill_(-2.0)
    model.module.close_masks(torch.tensor([1, 4]), torch.tensor([2, 0]))
    closed = torch.zeros_like(levels.loc, dtype=torch.bool)
    closed[levels.component == 1, 2] = closed[levels.component == 4, 0] = True
    assert closed.sum() == 4
    assert (levels.loc == torch.where(closed, 0.0, 3.0)).all()
    torch.testing.assert_close(levels.log_sd[closed].exp(), torch.full((4,), levels.prior_scale))
    assert (levels.log_sd[~closed] == -2).all()


def test_a_planted_mask_is_closed_and_true_ones_stay(adata: AnnData, model_of: Callable, quiet: dict) -> None:
    model = model_of(adata)
    model.train(max_epochs=200, batch_size=128, split_key="split", **quiet)
    effects = model.module.effects
    true = effects.mask_logits > 0
    assert true.sum() >= 3
    wrong = torch.zeros_like(true)
    for component in range(len(true)):
        wrong[component, int((~true[component]).nonzero()[0])] = True
    with torch.no_grad():
        effects.mask_logits[wrong] = 5.0
        effects.loc[wrong] = 4.0
    heed_validation_cells(model)
    assert (effects.mask_logits[wrong] < 0).all()
    assert (effects.mask_logits[true] > 0).all()


def test_perturbations_without_validation_cells_keep_their_masks(
    adata: AnnData, model: pv.SAMSVAE, model_of: Callable, quiet: dict
) -> None:
    names = model.perturbation_names
    has = adata.obs["perturbation"].astype(str).str.split("+", regex=False).map(lambda parts: names[2] in parts)
    adata.obs.loc[has, "split"] = "train"
    other = model_of(adata, sparsify="published")
    other.train(max_epochs=1, split_key="split", **quiet)
    other.module.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        other.module.effects.loc.fill_(6.0)  # wrong for all
    heed_validation_cells(other)
    open_ = other.module.effects.mask_logits > 0
    assert open_[2].sum() == 3
    assert open_.sum() <= 6  # of 24
    cells, _ = chosen_cells(other, np.ones(len(names), bool))
    assert set(cells) < set(other.validation_indices)


def test_so_many_cells_of_a_perturbation_are_chosen(model: pv.SAMSVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    only = np.zeros(len(model.perturbation_names), bool)
    only[3] = True
    all_cells, doses = chosen_cells(model, only)
    assert (doses[:, [3]].toarray() > 0).all()
    monkeypatch.setattr(_evidence, "MAX_CELLS", 4)
    few, doses = chosen_cells(model, only)
    assert len(few) == doses.shape[0] == 4 < len(all_cells)
    assert set(few) <= set(all_cells)
    np.testing.assert_array_equal(few, chosen_cells(model, only)[0])


@pytest.mark.parametrize(
    ("arguments", "split", "called"),
    [
        ({}, True, True),
        ({"sparsify": "auto"}, True, True),
        ({"sparsify": "published"}, True, False),
        ({}, False, False),
    ],
)
def test_when_they_are_asked(
    adata: AnnData,
    model_of: Callable,
    quiet: dict,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict,
    split: bool,
    called: bool,
) -> None:
    calls: list[torch.Tensor] = []

    def record(model: pv.SAMSVAE, asked: torch.Tensor, *cells: Any) -> torch.Tensor:
        calls.append(asked)
        return torch.full(asked.shape, -100.0)

    monkeypatch.setattr(_evidence, "evidence_for", record)
    model = model_of(adata, mask_prior=0.3, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that early stopping is off
        data = {"split_key": "split"} if split else {"train_size": 1.0}
        model.train(max_epochs=14, batch_size=64, **data, **quiet)
    assert bool(calls) == called
    if called and model.sparsify_ == "rotate":
        assert (model.get_masks() < 0.5).all(axis=None)
