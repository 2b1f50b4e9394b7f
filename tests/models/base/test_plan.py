"""Training statistics against numpy, the weights that are kept, the epochs of a default run."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import scvi
import torch

import pertvae as pv
from pertvae.models import SAMSVAE
from pertvae.models.base._plan import KeepBest, training_statistics


@pytest.fixture
def screen():
    return pv.datasets.simulate_screen(
        n_genes=25, n_perturbations=4, n_doubles=1, cells_per_perturbation=20, cells_per_double=20, n_controls=40,
        n_latent=2, n_oracle=10,
    )  # fmt: skip


def model_of(adata, **kwargs):
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", **kwargs)
    return SAMSVAE(adata, n_latent=2, n_hidden=8)


@pytest.mark.parametrize("kind", ["csr", "dense", "backed"])
@pytest.mark.parametrize("log1p", [True, False])
def test_training_statistics(screen, kind, log1p, tmp_path):
    x = screen.X.toarray().astype(np.float64)
    if kind == "dense":
        screen.X = screen.X.toarray()
    elif kind == "backed":
        screen.write_h5ad(tmp_path / "a.h5ad")
        screen = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    cells = np.random.default_rng(0).permutation(screen.n_obs)[:70]
    statistics = training_statistics(model_of(screen).adata_manager, cells, log1p)
    y = np.log1p(x[cells]) if log1p else x[cells]
    np.testing.assert_allclose(statistics.input_mean, y.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(statistics.input_sd, y.std(0, ddof=1), rtol=1e-5, atol=1e-9)
    assert statistics.n_cells == 70
    doses = screen.obsm["_scvi_perturbation"].toarray()
    np.testing.assert_array_equal(statistics.cells_per_component, (doses[cells] > 0).sum(0))


def test_statistics_reach_the_module(screen):
    screen.obs["split"] = np.resize(["train", "train", "valid", "test"], screen.n_obs)
    model = model_of(screen)
    model.train(max_epochs=1, split_key="split", accelerator="cpu", enable_progress_bar=False)
    y = np.log1p(screen.X.toarray()[(screen.obs["split"] == "train").to_numpy()])
    np.testing.assert_allclose(model.module.input_mean.cpu(), y.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.module.input_sd.cpu(), np.where(y.std(0) > 0, np.maximum(y.std(0, ddof=1), 1.0), 1.0), rtol=1e-4
    )


def test_a_gene_without_variance_is_not_divided_by(screen):
    x = screen.X.toarray()
    x[:, 3] = 2
    screen.X = sp.csr_matrix(x)
    model = model_of(screen)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    assert model.module.input_sd[3] == 1.0


class Recorder(KeepBest):
    """Keeps every validated state beside the best."""

    states: dict

    def __init__(self):
        super().__init__()
        self.states = {}

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self.states[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.module.state_dict().items()}


def test_the_best_weights_are_kept(screen):
    recorder = Recorder()
    model = model_of(screen)
    model.train(
        max_epochs=8,
        accelerator="cpu",
        enable_progress_bar=False,
        check_val_every_n_epoch=1,
        callbacks=[recorder],
        plan_kwargs={"lr": 0.5},  # so high that the last epoch is not the best
    )
    objective = model.history["objective_validation"]["objective_validation"].astype(float)
    assert recorder.best_epoch != max(recorder.states)
    assert recorder.best == pytest.approx(objective.min(), rel=1e-5)
    kept = model.module.state_dict()
    best = recorder.states[recorder.best_epoch]
    assert all(torch.equal(value, best[name]) for name, value in kept.items() if not name.startswith("leak"))


def test_the_objective_is_the_sum_of_its_parts(screen):
    model = model_of(screen)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=1)
    row = {k: float(v.iloc[-1, 0]) for k, v in model.history.items()}
    n = len(model.train_indices)
    total = row["reconstruction_loss_validation"] + row["kl_local_validation"] + row["kl_global_validation"] / n
    assert row["objective_validation"] == pytest.approx(total, rel=1e-3)


def test_default_epochs(screen, monkeypatch):
    """About 4,000 steps, within 20 and 1,000 epochs."""
    asked = []

    class Runner:
        def __init__(self, model, training_plan, data_splitter, max_epochs, **kwargs):
            asked.append(max_epochs)

        def __call__(self):
            raise KeyboardInterrupt

    model = model_of(screen)
    monkeypatch.setattr(SAMSVAE, "_train_runner_cls", Runner)
    for batch_size in (512, 10, 1):
        with pytest.raises(KeyboardInterrupt):
            model.train(batch_size=batch_size)
    n = 140 - 14
    assert asked == [1000, int(np.ceil(4000 / np.ceil(n / 10))), int(np.ceil(4000 / n))]


def optimizer_of(model):
    return model.trainer.optimizers[0]


def weights_after(screen, max_epochs=15, **plan_kwargs):
    scvi.settings.seed = 0
    model = model_of(screen)
    model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False, plan_kwargs=plan_kwargs)
    return model, torch.cat([p.detach().ravel() for p in model.module.parameters()])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_optimizer(screen, name):
    """The same numbers up to rounding, in the same groups."""
    fused, found = weights_after(screen, optimizer=name, eps=1e-6)
    plain, expected = weights_after(screen, optimizer=name, eps=1e-6, fused_optimizer=False)
    assert type(optimizer_of(fused)) is type(optimizer_of(plain)) is getattr(torch.optim, name)
    assert optimizer_of(fused).defaults["fused"]
    assert not optimizer_of(plain).defaults["fused"]
    groups = [
        [(len(g["params"]), g["lr"], g["weight_decay"], g["eps"]) for g in optimizer_of(m).param_groups]
        for m in (fused, plain)
    ]
    assert groups[0] == groups[1]
    assert {group[1:] for group in groups[0]} == {(1e-3, 1e-6, 1e-6), (1e-2, 0.0, 1e-6), (1e-1, 0.0, 1e-6)}
    start = torch.cat([p.detach().ravel() for p in model_of(screen).module.parameters()])
    assert (expected - start).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_device_without_fused_optimizers(screen, monkeypatch):
    inner = torch.optim.Adam.__init__

    def init(self, params, *args, fused=None, **kwargs):
        inner(self, params, *args, fused=fused, **kwargs)
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")

    monkeypatch.setattr(torch.optim.Adam, "__init__", init)
    model, found = weights_after(screen, max_epochs=3)
    assert not any(group["fused"] for group in (optimizer_of(model).defaults, *optimizer_of(model).param_groups))
    _, expected = weights_after(screen, max_epochs=3, fused_optimizer=False)
    assert torch.equal(found, expected)


def test_your_own_optimizer(screen):
    made = []

    def create(groups):
        made.append(torch.optim.SGD(groups, lr=1e-4, momentum=0.5))
        return made[-1]

    model, _ = weights_after(screen, max_epochs=4, optimizer="Custom", optimizer_creator=create)
    assert getattr(optimizer_of(model), "optimizer", optimizer_of(model)) is made[-1]
    assert {g["momentum"] for g in made[-1].param_groups} == {0.5}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_clipped_gradients_in_mixed_precision(screen, clip):
    """Lightning refuses to clip the gradients of an optimiser that is fused."""
    model = model_of(screen)
    model.train(
        max_epochs=4, accelerator="cpu", enable_progress_bar=False, precision="bf16-mixed", gradient_clip_val=clip
    )
    assert bool(optimizer_of(model).defaults["fused"]) is (clip is None)
    assert np.isfinite(model.history["train_loss"].astype(float)).all().all()
