import logging
import os
import random

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae import datasets, metrics, reference
from pertvae._expression import log1p_cp10k, mean_profile
from pertvae._predictions import predicted_shifts
from pertvae.reference._vae import Expected

KEYS = ("perturbation", "ctrl")


def quick(n_latent=4, epochs=2, **kwargs):
    return reference.SCVIArithmetic(n_latent, max_epochs=epochs, **kwargs)


def block(pred, label):
    return pred.X[((pred.obs["perturbation"] == label) & pred.obs["generated"]).to_numpy()]


@pytest.fixture(scope="module")
def example():
    adata = datasets.example()
    adata.obs["split"] = np.where(adata.obs["perturbation"].str.contains("+", regex=False), "test", "train")
    return adata


@pytest.fixture(scope="module")
def fitted(example):
    """Some 500 large steps instead of 3,000 small ones."""
    hasty = {"batch_size": 64, "plan_kwargs": {"lr": 1e-2}}
    made = quick(10, 30, model_kwargs={"gene_likelihood": "nb"}, train_kwargs=hasty)
    return made.fit(example, "perturbation", "control", "split", batch_key="batch")


@pytest.fixture
def small(screen):
    return quick().fit(screen, *KEYS, batch_key="batch")


def test_held_out_doubles_are_closer_than_without_a_change_or_with_the_mean(example, fitted):
    test = example[example.obs["split"] == "test"].copy()
    doubles = sorted(test.obs["perturbation"].unique())
    assert len(doubles) == 6
    pred = fitted.predict_perturbation(doubles, n_cells=600)
    table = metrics.evaluate(pred, test, "perturbation", "control", metrics=["l2_profile", "energy_distance"])
    ours = table[table["level"] == "condition"].pivot(index="condition", columns="metric", values="value")
    direct = [np.linalg.norm(mean_profile(block(pred, d)) - mean_profile(_cells(test, d))) for d in doubles]
    np.testing.assert_allclose(ours.loc[doubles, "l2_profile"], direct, rtol=1e-6)  # scored by its cells
    for other in (reference.NoChange(), reference.Mean()):
        other.fit(example, "perturbation", "control", "split")
        profiles = other.control_profile_ + other.predict_shift(doubles).to_numpy()
        theirs = [np.linalg.norm(p - mean_profile(_cells(test, d))) for p, d in zip(profiles, doubles, strict=True)]
        assert np.mean(direct) < 0.6 * np.mean(theirs)


def _cells(adata, label):
    return adata.X[(adata.obs["perturbation"] == label).to_numpy()]


def test_cells_without_a_shift_look_like_controls(example, fitted):
    pred = fitted.predict_perturbation("control", n_cells=300)
    made, real = block(pred, "control"), _cells(example, "control")
    assert not predicted_shifts(pred).to_numpy().any()
    noise = np.sqrt(log1p_cp10k(real).toarray().var(axis=0).sum() / real.shape[0])
    assert np.linalg.norm(mean_profile(made) - mean_profile(real)) < 4 * noise
    spread = log1p_cp10k(made).toarray().var(axis=0) / log1p_cp10k(real).toarray().var(axis=0)
    assert np.quantile(spread, [0.1, 0.5, 0.9]) == pytest.approx([1, 1, 1], abs=0.25)
    # the library of the source cell is kept: exactly on average, up to the noise of counts
    source = example[pred.obs["source_cell"].iloc[:300].to_numpy()].X.sum(axis=1)
    assert np.corrcoef(made.sum(axis=1).A1, source.A1)[0, 1] > 0.9
    assert made.sum() / source.sum() == pytest.approx(1, abs=0.02)


def test_the_shift_is_that_of_the_generated_cells(small):
    pred = small.predict_perturbation(["A", "ctrl", "B+A"], n_cells=80)
    zero = mean_profile(block(pred, "ctrl"))
    shifts = predicted_shifts(pred)
    for label in ("A", "B+A"):
        np.testing.assert_allclose(shifts.loc[label], mean_profile(block(pred, label)) - zero, atol=1e-10)
    default = predicted_shifts(small.predict_perturbation(["A", "B+A"]))
    pd.testing.assert_frame_equal(default, small.predict_shift(["A", "B+A"]), check_column_type=False)


def test_latent_shifts_are_means_of_posterior_means_by_context(screen):
    """Each cell against the mean of the controls of its context, averaged over cells; combinations add."""
    screen.obs["cell"] = np.random.default_rng(0).choice(["x", "y"], screen.n_obs, p=[0.3, 0.7])
    fitted = quick().fit(screen, *KEYS, labels_key="cell", batch_key="batch")
    codes = fitted._vae.codes(screen.obs["batch"].to_numpy(dtype=object), screen.n_obs)
    latents = pd.DataFrame(fitted._vae.encode(screen.X, codes)[0].astype(float), index=screen.obs_names)
    control = latents[(screen.obs["perturbation"] == "ctrl").to_numpy()].groupby(screen.obs["cell"]).mean()
    moved = latents - control.loc[screen.obs["cell"]].to_numpy()
    expected = moved.groupby(screen.obs["perturbation"]).mean()
    for label, raw in (("A", "A+ctrl"), ("B", "B"), ("D", "D")):
        np.testing.assert_allclose(fitted._shift((label,)), expected.loc[raw], atol=1e-6)
    np.testing.assert_allclose(fitted._shift(("A", "B")), expected.loc[["A+ctrl", "B"]].sum(), atol=1e-6)
    pred = fitted.predict_perturbation("A", labels="y", n_cells=9)
    assert (screen.obs.loc[pred.obs["source_cell"], "cell"] == "y").all()


def test_training_is_what_a_user_of_scvi_tools_gets(screen, small):
    """The same seed and arguments in scvi-tools alone: the same latents, and the decoder's expectation."""
    import torch
    from scvi import settings
    from scvi.model import SCVI

    plain = ad.AnnData(screen.X.copy(), obs=screen.obs[["batch"]].copy())
    settings.seed = 0
    SCVI.setup_anndata(plain, batch_key="batch")
    model = SCVI(plain, n_latent=4)
    model.train(max_epochs=2, early_stopping=True, enable_progress_bar=False)
    codes = small._vae.codes(screen.obs["batch"].to_numpy(dtype=object), screen.n_obs)
    mean, sd = small._vae.encode(screen.X, codes)
    np.testing.assert_allclose(mean, model.get_latent_representation(), atol=1e-5)
    _, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(sd**2, variance, rtol=1e-4)
    libraries = screen.X.sum(axis=1).A1
    expected = small._vae.decode(mean, libraries, codes)
    np.testing.assert_allclose(expected.mean.sum(axis=1), libraries, rtol=1e-4)
    with torch.inference_mode():
        inner, outer = model.module.decoder.px_decoder, model.module.decoder.px_scale_decoder
        scale = outer(inner(torch.from_numpy(mean), torch.from_numpy(codes[:, None])))
    np.testing.assert_allclose(expected.mean / libraries[:, None], scale.numpy(), rtol=1e-3, atol=1e-6)


def test_counts_have_the_moments_of_their_likelihood():
    mean, zeros = np.full((200_000, 2), [3.0, 40.0]), np.full((200_000, 2), [0.3, 0.1])
    theta = np.array([0.8, 5.0])
    rng = np.random.default_rng
    for inverse, share in ((None, None), (theta, None), (np.broadcast_to(theta, mean.shape), zeros), (None, zeros)):
        x = Expected(mean, inverse, share).sample(rng(0))
        pi = 0 if share is None else share[0]
        spread = 0 if inverse is None else mean[0] ** 2 / theta
        np.testing.assert_allclose(x.mean(axis=0), (1 - pi) * mean[0], rtol=0.02)
        variance = (1 - pi) * (mean[0] + spread + pi * mean[0] ** 2)
        np.testing.assert_allclose(x.var(axis=0), variance, rtol=0.04)
    # fewer cells are the first of more
    few = Expected(mean[:9], theta, zeros[:9]).sample(rng(1))
    np.testing.assert_array_equal(few, Expected(mean[:99], theta, zeros[:99]).sample(rng(1))[:9])


def test_latents_are_drawn_from_the_posteriors_of_the_source_cells(screen, small, monkeypatch):
    """What reaches the decoder: the same posterior draws for every label, plus the latent shift of the label."""
    reached = []

    def decode(latents, libraries, batches):
        reached.append((latents, libraries))
        return Expected(np.ones((len(latents), screen.n_vars)), None, None)

    monkeypatch.setattr(small._vae, "decode", decode)
    pred = small.predict_perturbation(["A", "A+B"], n_cells=512)
    (zero, libraries), (a, _), (both, _) = (
        [np.concatenate(part) for part in zip(*reached[i : i + 2], strict=True)] for i in (0, 2, 4)
    )
    np.testing.assert_allclose(a - zero, np.tile(small._shift(("A",)), (512, 1)), atol=1e-6)
    np.testing.assert_allclose(both - zero, np.tile(small._shift(("A", "B")), (512, 1)), atol=1e-6)
    source = screen[pred.obs["source_cell"].iloc[:512].to_numpy()]
    np.testing.assert_allclose(libraries, source.X.sum(axis=1).A1)
    codes = small._vae.codes(source.obs["batch"].to_numpy(dtype=object), 512)
    mean, sd = small._vae.encode(source.X, codes)
    draws = (zero - mean) / sd
    assert draws.mean(axis=0) == pytest.approx(np.zeros(4), abs=0.15)
    assert draws.std(axis=0) == pytest.approx(np.ones(4), abs=0.1)
    assert len(np.unique(draws)) == draws.size  # a cell that is used twice has two latents
    # equal expectations, but other counts under another label
    assert (pred.X[:512] != pred.X[512:1024]).nnz > 0


def test_draws_depend_on_seed_label_and_cell_alone(screen, small):
    alone = small.predict_perturbation("A+B", n_cells=300)
    together = small.predict_perturbation(["C", "B+ctrl+A"], n_cells=300)
    assert (block(together, "B+ctrl+A") != block(alone, "A+B")).nnz == 0
    fewer = small.predict_perturbation("A+B", n_cells=33)
    assert (fewer.X[:33] != alone.X[:33]).nnz == 0
    assert (block(small.predict_perturbation("A+B", n_cells=300, seed=1), "A+B") != block(alone, "A+B")).nnz > 0
    again = quick().fit(screen, *KEYS, batch_key="batch").predict_perturbation("A+B", n_cells=33)
    assert (again.X != fewer.X).nnz == 0
    other = quick().fit(screen, *KEYS, batch_key="batch", seed=1).predict_perturbation("A+B", n_cells=33)
    assert (other.X != fewer.X).nnz > 0


def _global_state():
    import torch
    from scvi import settings
    from scvi.model import SCVI

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "seed": settings.seed,
        "environment": dict(os.environ),
        "flags": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "levels": {n: logging.getLogger(n).level for n in ("scvi", "lightning", "lightning.pytorch")},
        "registered": set(SCVI._setup_adata_manager_store),
    }


@pytest.mark.parametrize("seed", [None, 7])
def test_nothing_global_is_changed_and_nothing_is_said(seed, screen, tmp_path, monkeypatch, capfd):
    from scvi import settings

    settings.seed = seed
    monkeypatch.chdir(tmp_path)
    for name in ("scvi", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    before = _global_state()
    stops = {"early_stopping_patience": 1, "plan_kwargs": {"lr": 0.1}}  # and scvi-tools would say so
    fitted = quick(train_kwargs=stops, epochs=50).fit(screen, *KEYS)
    assert fitted.params_["epochs"] < 50
    fitted.predict_perturbation("A", n_cells=3)
    assert _global_state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Optimizer"):
        quick(train_kwargs={"plan_kwargs": {"optimizer": "none"}}).fit(screen, *KEYS)
    assert _global_state() == before
    settings.seed = 0


def test_unknown_components_are_named(screen, small):
    with pytest.raises(KeyError, match="'E'.*SCVIArithmetic needs them as singles. RidgeAdditive does not"):
        small.predict_perturbation("A+E")
    with pytest.warns(UserWarning, match="'E' contribute nothing"):
        pred = small.predict_perturbation("A+E", unseen="ignore", n_cells=40)
    assert list(pred.uns["pertvae"]["ignored"]) == ["E"]
    pairs = screen[screen.obs["perturbation"].isin(["ctrl", "B+A", "C+E"])].copy()
    with pytest.raises(ValueError, match="needs single perturbations"):
        quick().fit(pairs, *KEYS)


def test_the_batch_of_the_source_cell_is_decoded(screen):
    """One gene is on in one batch only; its source cells decide."""
    x = screen.X.toarray()
    second = (screen.obs["batch"] == "b2").to_numpy()
    x[:, 0] = np.where(second, 60, 0)
    screen.X = sp.csr_matrix(x)
    screen.obs["cell"] = np.random.default_rng(0).choice(["x", "y"], screen.n_obs)
    fitted = quick(epochs=40).fit(screen, *KEYS, batch_key="batch", labels_key="cell")
    pred = fitted.predict_perturbation("A+B", n_cells=100, labels="y")
    from_second = (screen.obs.loc[pred.obs["source_cell"], "batch"] == "b2").to_numpy()[:100]
    made = pred.X[:100, 0].toarray().ravel()
    assert made[from_second].mean() > 5 * made[~from_second].mean()
    assert fitted.params_["n_batches"] == 2
    new = screen[:30].copy()
    new.obs["batch"] = "b3"
    with pytest.raises(KeyError, match="batch 'b3' of the source cells has no training cells"):
        fitted.predict_perturbation("A", new, [0])
    with pytest.raises(KeyError, match="batch_key='batch'"):
        fitted.predict_perturbation("A", ad.AnnData(new.X, obs=new.obs[["perturbation"]], var=new.var), [0])
    assert fitted.predict_perturbation("A", screen, [3, 4], n_cells=5).n_obs == 7
    # other references do not look at it
    reference.Additive().fit(screen, *KEYS, batch_key="batch").predict_perturbation("A", new, n_cells=2)


@pytest.mark.parametrize(
    "model_kwargs",
    [
        {"gene_likelihood": "nb", "dispersion": "gene-cell"},
        {"gene_likelihood": "poisson", "latent_distribution": "ln"},
        {"use_observed_lib_size": False, "dispersion": "gene-batch"},
    ],
    ids=lambda k: "-".join(map(str, k.values())),
)
def test_other_models_of_scvi_tools(model_kwargs, screen):
    x = screen.X.tolil()
    x[[3, 5]] = 0  # empty cells
    screen.X = sp.csr_matrix(x)
    screen.obs.iloc[3, 0] = "ctrl"
    fitted = quick(model_kwargs=model_kwargs).fit(screen, *KEYS, batch_key="batch")
    pred = fitted.predict_perturbation("A+B", n_cells=200)
    assert np.isfinite(pred.X.data).all()
    empty = pred[(pred.obs["source_cell"] == screen.obs_names[3]).to_numpy()]
    assert empty.n_obs >= 2
    assert empty.X.sum() == 0
    assert fitted.params_["gene_likelihood"] == model_kwargs.get("gene_likelihood", "zinb")


def test_a_handful_of_cells_has_nothing_to_stop_by(screen):
    few = screen[np.concatenate([np.flatnonzero(screen.obs["perturbation"] == c)[:4] for c in ("ctrl", "B")])].copy()
    assert quick().fit(few, *KEYS).params_["epochs"] == 2
    with pytest.raises(Exception, match="validation"):
        quick(train_kwargs={"early_stopping": True, "train_size": 1.0}).fit(few, *KEYS)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_latent": 0}, "n_latent=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"model_kwargs": {"gene_likelihood": "normal"}}, "'normal' gives no counts"),
        ({"model_kwargs": {"n_latent": 3}}, "n_latent is an argument of SCVIArithmetic itself"),
        ({"train_kwargs": {"max_epochs": 3}}, "max_epochs is an argument"),
    ],
)
def test_constructor_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        reference.SCVIArithmetic(**kwargs)
