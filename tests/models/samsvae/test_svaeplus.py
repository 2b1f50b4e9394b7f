"""SVAE+: the prior that perturbations move, its masks, the published variants, combinations as treatments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch.distributions import Beta

import pertvae as pv
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import SVAEPlusModule
from pertvae.nn import EffectSample

GENES, LATENT = 10, 4
DOSES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0], [0, 0.5, 3]]).float()
N = len(DOSES)
CONDITIONS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
OF_CELLS = [-1, 0, 1, 2, 0, 3]


def module(**settings: Any) -> SVAEPlusModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
        "mask_prior": 1 / 6,
        "mask_gradient": "gumbel",
        "mask_draws": "component",
        "mask_start": 0.0,
        "effect_start": 1.0,
        "global_kl": "full",
    }
    return SVAEPlusModule(ModuleShape(GENES, 3, n_batch=3), **(arguments | settings))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((N, GENES), 5.0), generator=g)
    return {"x": x, "doses": DOSES, "batch_index": torch.arange(N)[:, None].float() % 3}


def build(adata: AnnData, setup: dict[str, Any] | None = None, **arguments: Any) -> pv.SVAEPlus:
    adata = adata.copy()
    pv.SVAEPlus.setup_anndata(adata, perturbation_key="perturbation", control="control", **(setup or {}))
    return pv.SVAEPlus(adata, **({"n_latent": 5, "n_hidden": 16} | arguments))


# ------------------------------------------------------------------------- prior


@pytest.mark.parametrize("n_samples", [1, 4])
def test_prior_means_add_up_and_scale_with_the_dose(batch: dict, n_samples: int) -> None:
    model = module()
    sample = EffectSample(torch.randn(n_samples, 3, LATENT), torch.zeros(n_samples, 3))
    out = model.inference(**batch, globals_=sample)
    shift = (out["z"] - out["z_basal"]).reshape(n_samples, N, LATENT)
    torch.testing.assert_close(shift, torch.einsum("it,ktl->kil", DOSES, sample.effect), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift[:, 4], 2 * shift[:, 1], rtol=1e-5, atol=1e-5)
    assert shift[:, 0].abs().max() < 1e-6


def test_the_encoder_does_not_read_the_label(batch: dict) -> None:
    model = module(n_particles=3)
    with torch.no_grad():
        full = [model.inference(**(batch | {"doses": d}))["qz"] for d in (DOSES, torch.zeros_like(DOSES))]
    torch.testing.assert_close(full[0].loc, full[1].loc, rtol=1e-5, atol=1e-5)
    assert torch.equal(full[0].scale, full[1].scale)


def test_masks_of_components_are_shared_and_those_of_cells_are_not() -> None:
    doses = torch.zeros(400, 3)
    doses[:, 0], doses[200:, 1] = 1.0, 2.0
    with torch.no_grad():
        _, shared = module().draw_shift(doses, 2, None)
        model = module(mask_draws="cell")
        model.mask_logits.copy_(torch.randn(3, LATENT))
        _, own = model.draw_shift(doses, 200, None)
        expected = doses @ (model.inclusion * model.mu)
        p = model.inclusion
        variance = doses**2 @ (p * (1 - p) * model.mu**2)
    assert len(shared[0, :200].unique(dim=0)) == 1
    assert len(own[0, :200].unique(dim=0)) > 4
    torch.testing.assert_close(own.mean((0, 1)), expected.mean(0), rtol=0.0, atol=0.03)
    torch.testing.assert_close(own.var(0).mean(0), variance.mean(0), rtol=0.03, atol=0.0)


@pytest.mark.parametrize("conditions", [None, CONDITIONS])
def test_masks_of_cells_do_not_wait_for_the_device_in_training(conditions: torch.Tensor | None) -> None:
    model = module(mask_draws="cell", **({} if conditions is None else {"conditions": conditions}))
    doses, drawn = (DOSES if conditions is None else DOSES[:4]), []
    for max_active in (0, 2):  # counted in the minibatch, known from the training cells
        model.max_active = max_active
        drawn.append(model.draw_shift(doses, 3, torch.Generator().manual_seed(0))[1])
    torch.testing.assert_close(*drawn)
    # values on the meta device cannot be read
    _, shift = model.to("meta").draw_shift(doses.to("meta"), 3, None)
    assert shift.shape == (3, len(doses), LATENT)


def test_drawn_offsets_have_the_masks_probabilities() -> None:
    model = module()
    with torch.no_grad():
        model.mask_logits.copy_(torch.randn(3, LATENT))
        uniform, normal = torch.rand(40_000, 2, LATENT), torch.randn(40_000, 2, LATENT)
        drawn = model.draw_offset(torch.tensor([2, 1]), torch.tensor([3.0, 0.5]), uniform, normal)
        torch.testing.assert_close(drawn.mean(0), model.offset(DOSES)[5], rtol=0.0, atol=0.05)


@pytest.mark.parametrize("mask_draws", ["component", "cell"])
@pytest.mark.parametrize("mask_gradient", ["gumbel", "identity"])
def test_gradients_reach_every_parameter(batch: dict, mask_draws: str, mask_gradient: str) -> None:
    model = module(mask_draws=mask_draws, mask_gradient=mask_gradient, n_particles=2)
    tensors = {"X": batch["x"], "perturbation": DOSES, "batch": batch["batch_index"]}
    _, _, out = model(tensors, loss_kwargs={"n_obs": N})
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    assert (model.mask_logits.grad != 0).all()


# ----------------------------------------------------------------------- penalty


@pytest.mark.parametrize("mask_prior", [0.5, 1 / 3, 1 / 11])
def test_penalty_is_the_beta_density(mask_prior: float) -> None:
    model = module(mask_prior=mask_prior)
    with torch.no_grad():
        model.mask_logits.copy_(torch.linspace(-6, 6, 12).reshape(3, 4))
    k = 1 / mask_prior - 1
    expected = -Beta(1.0, k).log_prob(model.inclusion).sum(-1)
    torch.testing.assert_close(model.penalty(), expected, rtol=1e-4, atol=1e-4)
    # slope with respect to the log-odds is (K - 1) pi
    model.penalty().sum().backward()
    torch.testing.assert_close(model.mask_logits.grad, (k - 1) * model.inclusion, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("mask_draws", ["component", "cell"])
def test_saturated_masks_are_safe(batch: dict, value: float, mask_draws: str) -> None:
    """A sigmoid rounds to 1 at log-odds of 17, where the logarithm of the Beta density is minus infinity."""
    model = module(mask_draws=mask_draws)
    with torch.no_grad():
        model.mask_logits.fill_(value)
    tensors = {"X": batch["x"], "perturbation": DOSES, "batch": batch["batch_index"]}
    _, _, out = model(tensors, loss_kwargs={"n_obs": N})
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.mask_logits.grad > 0).all() == (value > 0)  # and it is still pulled back


def test_a_component_without_cells_goes_to_no_effect(small_screen: AnnData, quiet: dict) -> None:
    adata = small_screen.copy()
    adata.obs["split"] = np.where(adata.obs["perturbation"].str.contains("P003"), "test", "train")
    kept = {}
    for global_kl in ("full", "plate"):
        model = build(adata, global_kl=global_kl)
        model.train(max_epochs=300, max_steps=300, split_key="split", batch_size=256, early_stopping=False, **quiet)
        unseen = model.perturbation_names.index("P003")
        kept[global_kl] = model.module.inclusion[unseen].detach().numpy()
    assert kept["full"].max() < 0.1
    np.testing.assert_array_equal(kept["plate"], 0.5)


# ---------------------------------------------------------------------- variants


def test_variants(small_screen: AnnData) -> None:
    ours, insitro, genentech = (build(small_screen, variant=v) for v in (None, "insitro", "genentech"))
    assert [m.module.mask_gradient for m in (ours, insitro, genentech)] == ["identity", "gumbel", "gumbel"]
    assert [m.module.mask_draws for m in (ours, insitro, genentech)] == ["component", "component", "cell"]
    assert [m.module.global_kl for m in (ours, insitro, genentech)] == ["full", "plate", "full"]
    assert [float(m.module.mask_logits.detach().min()) for m in (ours, insitro, genentech)] == [0.0, 0.0, 5.0]
    np.testing.assert_allclose([m.module.concentration for m in (ours, insitro, genentech)], [2.0, 2.0, 1.0])
    assert float(insitro.module.mu.detach().std()) == pytest.approx(0.1, rel=0.4)
    assert float(genentech.module.mu.detach().std()) == pytest.approx(1.0, rel=0.4)
    # an argument of one's own goes before the variant's
    assert build(small_screen, variant="genentech", mask_prior=0.2).module.concentration == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("variant", "plan", "expected"),
    [
        ("insitro", {}, [1.0, 1.0, 1.0]),
        ("genentech", {}, [0.0, 0.1, 0.2]),
        ("genentech", {"n_epochs_kl_warmup": 2}, [0.0, 0.5, 1.0]),
    ],
)
def test_warm_up(
    small_screen: AnnData, quiet: dict, variant: str, plan: dict, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(small_screen, variant=variant)
    inner, weights = model.module.loss, []

    @functools.wraps(inner)
    def recorded(*args: Any, kl_weight: float = 1.0, **kwargs: Any) -> Any:
        if model.module.training:
            weights.append(float(kl_weight))
        return inner(*args, kl_weight=kl_weight, **kwargs)

    monkeypatch.setattr(model.module, "loss", recorded)
    model.train(max_epochs=3, plan_kwargs=plan, **quiet)
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "lopez"}, "variant='lopez'.*insitro"),
        ({"combinations": "add"}, "combinations='add'.*unique"),
        ({"mask_prior": 0.7}, "mask_prior=0.7.*0.5"),
        ({"mask_prior": 0.0}, "mask_prior=0.0"),
        ({"mask_draws": "batch"}, "mask_draws='batch'.*cell"),
        ({"mask_gradient": "exact"}, "mask_gradient='exact'.*identity"),
        ({"effect_start": -1.0}, "effect_start=-1.0"),
        ({"global_kl": "none"}, "global_kl='none'.*plate"),
        ({"n_latent": 0}, "n_latent=0"),
        ({"conditions": ["P001"]}, "combinations='unique'"),
        ({"combinations": "unique", "conditions": ["P001+P0O2"]}, r"'P0O2' \(in 'P001\+P0O2'\).*'P002'"),
    ],
)
def test_arguments_not_accepted(small_screen: AnnData, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small_screen, **arguments)


# ------------------------------------------------ combinations as their own treatments


def test_conditions_are_told_apart(batch: dict) -> None:
    model = module(conditions=CONDITIONS)
    assert model.mu.shape == (4, LATENT)
    assert model.condition_index(DOSES).tolist() == OF_CELLS
    treatments = model.treatments(DOSES)
    assert treatments[0].sum() == 0
    assert treatments[1:].argmax(1).tolist() == OF_CELLS[1:]
    assert treatments.sum(1).tolist() == [0] + [1] * 5  # doses are ignored
    model.eval()
    with pytest.raises(ValueError, match="1 cells carry a combination.*combinations='sum'"):
        model.treatments(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    with torch.no_grad():
        uniform, normal = torch.rand(9, 2, LATENT), torch.randn(9, 2, LATENT)
        drawn = model.draw_offset(torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), uniform, normal)
        torch.testing.assert_close(drawn, (uniform[:, 0] < 0.5) * model.mu[2])


def test_many_conditions_have_their_own_codes() -> None:
    g = torch.Generator().manual_seed(1)
    patterns = (torch.rand(3000, 400, generator=g) < 0.01).unique(dim=0)
    patterns = patterns[patterns.any(1)]
    model = module(conditions=CONDITIONS)
    big = SVAEPlusModule(
        ModuleShape(GENES, 400), n_latent=2, n_hidden=4, n_layers=1, n_particles=1, gene_likelihood="nb",
        mask_prior=0.5, mask_gradient="gumbel", mask_draws="component", mask_start=0.0, effect_start=1.0,
        global_kl="full", conditions=patterns,
    )  # fmt: skip
    assert len(big.condition_codes.unique()) == len(patterns)
    assert torch.equal(big.condition_index(patterns.float()), torch.arange(len(patterns)))
    assert torch.equal(model.condition_codes, module(conditions=CONDITIONS).condition_codes)


def test_unique_combinations(small_screen: AnnData, quiet: dict, tmp_path: Path) -> None:
    adata = small_screen.copy()
    doubles = sorted(p for p in adata.obs["perturbation"].unique() if "+" in p)
    held_out, kept = doubles[0], doubles[1:]
    adata.obs["split"] = np.where(adata.obs["perturbation"] == held_out, "test", "train")
    model = build(adata, combinations="unique", variant="insitro")
    model.train(max_epochs=3, split_key="split", **quiet)
    programs = model.get_perturbation_programs()
    singles = [f"P{i:03d}" for i in range(1, 9)]
    assert sorted(programs.effects.index) == sorted(singles + doubles)
    counts = dict(zip(programs.effects.index, model.module.cells_per_condition.tolist(), strict=True))
    split = adata.obs["split"].to_numpy()
    train = np.zeros(adata.n_obs, bool)
    train[model.train_indices] = True
    assert counts == {
        p: float((train & (adata.obs["perturbation"] == p).to_numpy()).sum()) for p in programs.effects.index
    }
    assert counts[held_out] == 0
    assert (split[model.train_indices] == "train").all()

    # a combination is predicted from its own effects
    model.module.mask_logits.data.fill_(-30.0)
    row = list(programs.effects.index).index(kept[0])
    model.module.mask_logits.data[row] = 30.0
    shifts = {p: model.predict_perturbation([p, "control"], n_cells=20, output="mean") for p in (*kept, "P001")}
    for label, predicted in shifts.items():
        x = predicted[predicted.obs["generated"].to_numpy()].X
        assert (np.abs(x[:20] - x[20:]).max() > 1e-3) == (label == kept[0]), label
    missing = "P001+P002" if "P001+P002" not in doubles else "P001+P003"
    for label in (missing, held_out, f"{held_out}+P008"):
        with pytest.raises(ValueError, match=rf"{label.replace('+', '.')}.*no training cells.*combinations='sum'"):
            model.predict_perturbation(["P001", label])
    reverse = "+".join(reversed(kept[0].split("+")))
    assert model.predict_perturbation(reverse, n_cells=3).obs["perturbation"].iloc[0] == reverse

    # loaded with other data, the treatments are still those of the training
    model.save(str(tmp_path / "model"))
    few = adata[adata.obs["perturbation"].isin(["control", "P001"])].copy()
    loaded = pv.SVAEPlus.load(str(tmp_path / "model"), few)
    assert list(loaded.get_perturbation_programs().effects.index) == list(programs.effects.index)
    pd.testing.assert_frame_equal(
        loaded.get_perturbation_programs(key_added=None).effects.T,
        model.get_perturbation_programs(key_added=None).effects.T,
    )
    # latents of cells with an unknown combination: their state is found, their label's shift is not
    query = adata[:5].copy()
    query.obs["perturbation"] = missing
    assert np.isfinite(loaded.get_latent_representation(query)).all()
    with pytest.raises(ValueError, match="5 cells|combination"):
        loaded.get_latent_representation(query, kind="perturbation")


def test_conditions_given_by_name(small_screen: AnnData, quiet: dict) -> None:
    labels = small_screen.obs["perturbation"].astype(str).unique()
    swapped = ["+".join(reversed(p.split("+"))) for p in labels]
    model = build(small_screen, combinations="unique", conditions=[*swapped, "P001", "control"])
    model.train(max_epochs=2, **quiet)
    assert set(model.get_perturbation_programs(key_added=None).effects.index) == set(labels) - {"control"}
    assert len(model.module.mu) == len(labels) - 1
    assert (model.module.cells_per_condition > 0).all()
    model.predict_perturbation([p for p in swapped if "+" in p], n_cells=3)


def test_latent_kinds(small_screen: AnnData, quiet: dict) -> None:
    model = build(small_screen)
    model.train(max_epochs=3, **quiet)
    full, basal, shift = (
        model.get_latent_representation(kind=k, key_added=None) for k in ("full", "basal", "perturbation")
    )
    np.testing.assert_allclose(basal + shift, full, atol=1e-6)
    relabelled = small_screen.copy()
    relabelled.obs["perturbation"] = "P001"
    np.testing.assert_allclose(model.get_latent_representation(relabelled), full, atol=1e-6)
