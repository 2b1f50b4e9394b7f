"""No held-out cell reaches a statistic, and a leak that is planted is seen."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pertvae as pv
from pertvae.benchmark import _score
from pertvae.benchmark._data import Data
from pertvae.benchmark._fit import fit_reference, run_model, run_reference
from pertvae.benchmark._folds import make_folds
from pertvae.benchmark._train import fit_model
from pertvae.data import _splitter
from pertvae.metrics._registry import resolve
from pertvae.models.base import _model


@pytest.fixture(scope="module")
def pair(screen):
    """The screen, and the screen with counts of another law and depth in the place of all held-out cells."""
    (fold,) = make_folds(screen, "unseen_combination", perturbation_key="perturbation", control="control", n_folds=1)
    held = fold.rows("test")
    x = screen.X.toarray()
    x[held] = np.random.default_rng(0).poisson(30, size=x[held].shape)
    x[:, 5] = 0
    x[held, 5] = 40  # a gene of held-out cells alone
    other = screen.copy()
    other.X = sp.csr_matrix(x)
    x[held] = screen.X.toarray()[held]
    x[held, 5] = 0
    same = screen.copy()
    same.X = sp.csr_matrix(x)
    return same, other


def what_was_learned(adata):
    """Everything that is chosen, fitted or predicted before held-out cells may be looked at."""
    keys = {"perturbation_key": "perturbation", "control": "control"}
    data = Data(adata, "perturbation", ("control",), "+", None, "batch", None, 50)
    work, fold = data.of_fold(make_folds(adata, "unseen_combination", n_folds=1, **keys)[0])
    scorer = _score.Scorer(work, fold, "perturbation", ("control",), "+", None, resolve(["l2_profile"]), False)
    train = {"max_epochs": 5, "early_stopping": True, "batch_size": 64, "plan_kwargs": {"lr": 1e-2}}
    model = fit_model(
        pv.CPAVAE, data, scorer.adata, seed=0, model_kwargs={"n_latent": 4, "n_hidden": 8}, train_kwargs=train
    )
    prediction = run_model(model, data, scorer, seed=0, keep_programs=False)
    ridge = run_reference(fit_reference(pv.reference.RidgeAdditive, data, scorer), data, scorer)
    losses = {name: table for name, table in prediction.tables.items() if name.startswith("history:")}
    assert any("validation" in name for name in losses)
    return {
        "scored genes": pd.DataFrame({"gene": scorer.gene_names}),
        "center": scorer.training[""].center.to_frame(),
        "shift": prediction.shift,
        "library": pd.DataFrame({"effect": model.library_effects_.effects}),
        "reference": ridge.shift,
        **losses,
    }


def leaks(pair):
    """Names of what depends on held-out cells."""
    first, second = (what_was_learned(adata) for adata in pair)
    assert first.keys() == second.keys()
    return [name for name in first if not first[name].equals(second[name])]


def test_nothing_learned_depends_on_held_out_cells(pair):
    assert leaks(pair) == []


def test_a_leak_in_the_choice_of_genes_is_seen(pair, monkeypatch):
    honest = _score.scoring_genes
    monkeypatch.setattr(_score, "scoring_genes", lambda x, rows: honest(x, np.arange(x.shape[0])))
    assert "scored genes" in leaks(pair)


def test_a_leak_in_library_statistics_is_seen(pair, monkeypatch):
    honest = _model.fit_library_effects

    def leaking(totals, doses, groups, train, valid, *args, **kwargs):
        return honest(totals, doses, groups, np.arange(len(totals)), valid, *args, **kwargs)

    monkeypatch.setattr(_model, "fit_library_effects", leaking)
    assert "library" in leaks(pair)


def test_a_leak_in_early_stopping_is_seen(pair, monkeypatch):
    """Held-out cells take the place of the validation cells."""
    honest = _splitter._indices

    def leaking(manager, split_key):
        train, valid, test = honest(manager, split_key)
        return [train, test, valid]

    monkeypatch.setattr(_splitter, "_indices", leaking)
    assert any("validation" in name for name in leaks(pair))


def test_a_leak_into_training_is_seen(pair, monkeypatch):
    honest = _splitter._indices

    def leaking(manager, split_key):
        train, valid, test = honest(manager, split_key)
        return [np.concatenate([train, test]), valid, test[:0]]

    monkeypatch.setattr(_splitter, "_indices", leaking)
    assert "shift" in leaks(pair)
