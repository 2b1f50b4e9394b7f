"""Which genes and cells decide a score."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pertvae as pv
from pertvae._expression import mean_profile
from pertvae.benchmark._data import Data
from pertvae.benchmark._duplicate import halves
from pertvae.benchmark._fit import fit_reference, run_duplicate, run_model, run_oracle, run_reference
from pertvae.benchmark._folds import make_folds
from pertvae.benchmark._score import Scorer, scoring_genes
from pertvae.benchmark._train import fit_model
from pertvae.metrics._registry import resolve

KEYS = {"perturbation_key": "perturbation", "control": "control"}


def scorer_of(adata, scheme="unseen_combination", labels_key=None, keep_draws=False, **kwargs):
    data = Data(adata, "perturbation", ("control",), "+", labels_key, None, labels_key, 50)
    fold = make_folds(adata, scheme, labels_key=labels_key, **KEYS, **kwargs)[0]
    work, fold = data.of_fold(fold)
    return data, Scorer(work, fold, "perturbation", ("control",), "+", labels_key, resolve(None), keep_draws)


def value(prediction, metric, unit=None):
    rows = prediction.scores[prediction.scores["metric"] == metric].set_index("unit")["value"]
    return rows if unit is None else rows[unit]


def fitted_and_scored(cls, data, scorer):
    return run_reference(fit_reference(cls, data, scorer), data, scorer)


def test_genes_are_chosen_by_detection_and_mean_of_the_given_cells():
    x = np.zeros((100, 1200))
    x[:, :1100] = np.arange(1100, 0, -1) * 10.0  # the mean falls from gene 0 on
    x[:2, 1150] = 1e6  # detected in exactly 2%: not more
    x[:3, 1160] = 1e9  # detected in 3%
    mask = scoring_genes(sp.csr_matrix(x), np.arange(100))
    assert mask.sum() == 1000
    assert mask[:900].all()
    assert not mask[1150]
    rows = np.arange(3, 100)
    assert not scoring_genes(sp.csr_matrix(x), rows)[1160]
    with pytest.raises(ValueError, match="No gene is detected"):
        scoring_genes(sp.csr_matrix((100, 5)), np.arange(100))


def test_held_out_cells_choose_no_gene_and_no_center(screen):
    adata = screen.copy()
    held = scorer_of(adata)[1].fold.rows("test")
    x = adata.X.toarray()
    x[:, 5] = 0
    adata.X = sp.csr_matrix(x)
    _, before = scorer_of(adata)
    x[held] = np.random.default_rng(0).poisson(50, size=x[held].shape)  # gene 5 in held-out cells only
    adata.X = sp.csr_matrix(x)
    _, after = scorer_of(adata)
    assert not after.genes[5]
    np.testing.assert_array_equal(before.genes, after.genes)
    pd.testing.assert_series_equal(before.training[""].center, after.training[""].center)


def trained_and_scored(cls, data, scorer):
    model = fit_model(cls, data, scorer.adata, seed=0, model_kwargs={}, train_kwargs={})
    return run_model(model, data, scorer, seed=0, keep_programs=False)


def test_held_out_cells_change_no_prediction(screen, stand_in):
    """Noise put in the place of all held-out cells moves scores, never a prediction."""
    adata = screen.copy()
    data, before = scorer_of(adata)
    x = adata.X.toarray()
    held = before.fold.rows("test")
    x[held] = np.random.default_rng(0).poisson(3, size=x[held].shape)
    adata.X = sp.csr_matrix(x)
    noisy, after = scorer_of(adata)
    for cls in (pv.reference.RidgeAdditive, pv.reference.CalibratedAdditive):
        first, second = fitted_and_scored(cls, data, before), fitted_and_scored(cls, noisy, after)
        pd.testing.assert_frame_equal(first.shift, second.shift)
        assert value(first, "l2_profile").mean() != value(second, "l2_profile").mean()
    first, second = (trained_and_scored(stand_in, d, s) for d, s in ((data, before), (noisy, after)))
    pd.testing.assert_frame_equal(first.shift, second.shift)


def test_scores_equal_the_formulas(screen):
    data, scorer = scorer_of(screen)
    found = fitted_and_scored(pv.reference.NoChange, data, scorer)
    unit = scorer.fold.units[0]
    labels = screen.obs["perturbation"].to_numpy()
    observed = mean_profile(screen.X, np.flatnonzero(labels == unit.label))
    train, test = (mean_profile(screen.X, scorer.control_rows("", s)) for s in ("train", "test"))
    genes = scorer.genes
    assert value(found, "l2_profile", unit.name) == pytest.approx(np.linalg.norm((observed - train)[genes]))
    assert value(found, "l2_delta", unit.name) == pytest.approx(np.linalg.norm((observed - test)[genes]))
    np.testing.assert_allclose(scorer.truth.loc[unit.name], (observed - test)[genes])
    # the center is the mean over training conditions of their mean profiles
    trained = sorted(set(labels[scorer.fold.rows("train")]) - {"control"})
    center = np.mean([mean_profile(screen.X, np.flatnonzero(labels == c)) for c in trained], axis=0)
    np.testing.assert_allclose(scorer.training[""].center, center)
    r = np.corrcoef((train - center)[genes], (observed - center)[genes])[0, 1]
    assert value(found, "pearson_delta_perturbed", unit.name) == pytest.approx(r)


def test_predictions_start_from_training_controls_of_the_context(screen, stand_in):
    adata = screen.copy()
    adata.obs["line"] = np.resize(["x", "y"], adata.n_obs)
    data, scorer = scorer_of(adata, "random", labels_key="line", split_kwargs={"test_fraction": 0.5})
    trained_and_scored(stand_in, data, scorer)
    used = [c["indices"] for c in stand_in.calls if "indices" in c]
    assert len(used) == 2
    for rows, context in zip(used, scorer.fold.contexts, strict=True):
        obs = scorer.adata.obs.iloc[rows]
        assert set(obs["perturbation"]) == {"control"}
        assert set(obs["line"]) == {context}
        assert (scorer.fold.split.iloc[rows] == "train").all()


def test_center_of_a_context_without_training_perturbations(screen):
    """There: its controls plus the mean shift seen in the other contexts."""
    adata = screen.copy()
    adata.obs["line"] = np.resize(["x", "y"], adata.n_obs)
    x = adata.X.toarray()
    x[adata.obs["line"] == "y", :10] += 5.0
    adata.X = sp.csr_matrix(x)
    _, scorer = scorer_of(adata, "unseen_context", labels_key="line", split_kwargs={"held_out": "y"})
    obs = adata.obs
    train = scorer.fold.rows("train")

    def mean_of(label, line):
        chosen = train & (obs["perturbation"] == label).to_numpy() & (obs["line"] == line).to_numpy()
        return mean_profile(adata.X, np.flatnonzero(chosen))

    seen = sorted(set(obs["perturbation"][train & (obs["line"] == "x").to_numpy()]) - {"control"})
    shift = np.mean([mean_of(c, "x") - mean_of("control", "x") for c in seen], axis=0)
    np.testing.assert_allclose(scorer.training["y"].center, mean_of("control", "y") + shift)


def test_oracle_beats_everything_and_the_duplicate_halves_share_no_cell(screen):
    data, scorer = scorer_of(screen, n_folds=1)
    oracle = run_oracle(pv.datasets.read_truth(screen), scorer)
    additive = fitted_and_scored(pv.reference.Additive, data, scorer)
    duplicate = run_duplicate(scorer, interpolated=False)
    for metric in ("l2_profile", "l2_delta"):
        scores = [value(p, metric).mean() for p in (oracle, duplicate, additive)]
        assert scores[0] == min(scores)
    assert "energy_distance" not in set(oracle.scores["metric"])
    first, second = halves(scorer.observed[""], scorer, seed=0)
    assert set(first.obs_names).isdisjoint(second.obs_names)
    sizes = [h.obs["perturbation"].value_counts() for h in (first, second)]
    assert (sizes[0] - sizes[1]).abs().max() <= 1


def test_without_held_out_controls_metrics_of_shifts_are_left_out(screen):
    data, scorer = scorer_of(screen, split_kwargs={"control_test_fraction": 0.0})
    assert "l2_delta" not in scorer.usable
    assert any(text.startswith("l2_delta: no control cells are held out") for text in scorer.left_out)
    found = fitted_and_scored(pv.reference.Additive, data, scorer)
    assert {"l2_profile", "pearson_delta_perturbed"} <= set(found.scores["metric"])


def test_draws_are_paired(screen):
    """Two methods meet the same resampled cells: the difference varies less than either."""
    data, scorer = scorer_of(screen, keep_draws=True)
    a, b = (fitted_and_scored(c, data, scorer).draws["l2_profile"] for c in (pv.reference.NoChange, pv.reference.Mean))
    assert a.shape == (len(scorer.fold.units), 30)
    assert ((a - b).std(axis=1) < 0.8 * a.std(axis=1)).all()


def test_predictions_in_parts_are_joined(screen):
    from pertvae._predictions import predicted_shifts
    from pertvae.benchmark._fit import merge

    reference = pv.reference.Additive().fit(screen, "perturbation", "control")
    labels = ["P001", "P002", "P003"]
    whole = reference.predict_perturbation(labels, n_cells=10)
    joined = merge([reference.predict_perturbation([name], n_cells=10) for name in labels])
    assert list(joined.obs["perturbation"]) == list(whole.obs["perturbation"])
    np.testing.assert_array_equal(joined.X.toarray(), whole.X.toarray())
    pd.testing.assert_frame_equal(predicted_shifts(joined), predicted_shifts(whole))
    assert isinstance(joined, ad.AnnData)
