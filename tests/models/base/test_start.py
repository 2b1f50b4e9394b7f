"""The decoder starts at the genes' means and dispersions, from training cells alone, once."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.data import PerturbationDataSplitter
from pertvae.models.base._plan import training_statistics


@pytest.fixture
def counts() -> tuple[AnnData, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    # many genes, so that no single one makes up a cell's total, which stands in for its library
    theta = np.array([0.5, 2.0, 8.0, 20.0] * 25)
    share = rng.dirichlet(np.full(100, 5.0))
    library = rng.lognormal(np.log(1000), 0.3, 6000)
    mean = library[:, None] * share
    x = rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32)
    label = np.where(np.arange(6000) % 3 == 0, "control", "A")
    adata = AnnData(sp.csr_matrix(x))
    adata.obs["perturbation"] = label
    adata.obs["split"] = np.where(np.arange(6000) % 5 == 0, "test", "train")
    return adata, share, theta


def test_start_recovers_shares_and_dispersions(counts: tuple[AnnData, np.ndarray, np.ndarray]) -> None:
    adata, share, theta = counts
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    manager = pv.SAMSVAE(adata).adata_manager
    found = training_statistics(manager, np.arange(6000), log1p=True)
    estimated = np.exp(found.output_bias) / np.exp(found.output_bias).sum()
    np.testing.assert_allclose(estimated, share, rtol=0.2)
    ratio = np.exp(found.output_log_scale) / theta
    assert (ratio > 0.65).all()
    assert (ratio < 1.6).all()
    # near-Poisson genes are where the counts' own variance has to be taken off
    assert abs(np.median(ratio[theta == 20]) - 1) < 0.15


def test_first_fit_starts_the_decoder_and_the_second_does_not(counts: tuple[AnnData, np.ndarray, np.ndarray]) -> None:
    adata, *_ = counts
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "early_stopping": False, "split_key": "split"}
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = pv.SAMSVAE(adata, n_latent=2, n_hidden=4)
    # steps of length zero: what is left is the start
    still = {"lr": 0.0, "global_lr": 0.0, "mask_lr": 0.0}
    model.train(max_epochs=1, plan_kwargs=still, **quiet)
    statistics = training_statistics(model.adata_manager, model.train_indices, log1p=True)
    expected = torch.as_tensor(statistics.output_bias, dtype=torch.float32)
    torch.testing.assert_close(model.module.decoder.out.bias.detach(), expected)
    torch.testing.assert_close(
        model.module.decoder.scale.detach(), torch.as_tensor(np.exp(statistics.output_log_scale)).float()
    )
    # test cells do not enter: the statistics of all cells are others
    everything = training_statistics(model.adata_manager, np.arange(adata.n_obs), log1p=True)
    assert not np.allclose(statistics.output_bias, everything.output_bias)
    with torch.no_grad():
        model.module.decoder.out.bias.fill_(0.5)
    model.train(max_epochs=1, plan_kwargs=still, **quiet)
    assert bool((model.module.decoder.out.bias == 0.5).all())


def test_groups_have_their_learning_rates(counts: tuple[AnnData, np.ndarray, np.ndarray]) -> None:
    adata, *_ = counts
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = pv.SAMSVAE(adata, n_latent=2, n_hidden=4)
    plan = model._training_plan_cls(model.module, lr=0.1, global_lr=0.2, mask_lr=0.3, reduce_lr_on_plateau=True)
    optimizer = plan.configure_optimizers()["optimizer"]
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.module.named_parameters())
    assert len(rate) == len(named)
    assert rate[id(named["effects.mask_logits"])] == 0.3
    for name in ("effects.loc", "effects.log_sd", "decoder.out.bias", "decoder.log_scale"):
        assert rate[id(named[name])] == 0.2, name
    assert rate[id(named["encoder.first.weight"])] == rate[id(named["decoder.out.weight"])] == 0.1


def test_a_splitter_given_is_used(counts: tuple[AnnData, np.ndarray, np.ndarray]) -> None:
    adata, *_ = counts
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}
    model = pv.SAMSVAE(adata, n_latent=2, n_hidden=4)
    splitter = PerturbationDataSplitter(model.adata_manager, split_key="split", batch_size=1000)
    model.train(datamodule=splitter, **quiet)
    np.testing.assert_array_equal(model.test_indices, np.flatnonzero(adata.obs["split"] == "test"))
    with pytest.raises(ValueError, match="split_key"):
        model.train(datamodule=splitter, split_key="split", **quiet)
    with pytest.raises(ValueError, match="resume=True.*Call train again"):
        model.train(resume=True, **quiet)
