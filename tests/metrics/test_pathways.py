"""Pathways from masks: planted ones are found, permuted ones are not, and nothing depends on order."""

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold

from pertvae.metrics import _pathways as module
from pertvae.metrics import pathway_accuracy

SIZES = {"ribosome": 40, "proteasome": 24, "splicing": 16}
SMALL = {"n_trees": 30, "n_repeats": 3}


@pytest.fixture(scope="module")
def planted():
    """Masks in which each pathway has programs of its own; 12 perturbations are not annotated."""
    rng = np.random.default_rng(0)
    pathway = np.repeat([*SIZES, None], [*SIZES.values(), 12])
    masks = rng.beta(1, 20, (len(pathway), 12))
    for k, name in enumerate(SIZES):
        rows = np.flatnonzero(pathway == name)
        masks[rows[:, None], [3 * k, 3 * k + 1]] = rng.beta(10, 1, (len(rows), 2))
    names = rng.permutation([f"G{i}" for i in range(len(pathway))])
    features = pd.DataFrame(masks, index=names, columns=[f"program_{k}" for k in range(12)])
    return features, pd.Series(pathway, index=names)


def test_separable_pathways_are_found(planted) -> None:
    score = pathway_accuracy(*planted, **SMALL)
    assert score.accuracy > 0.97
    assert score.balanced_accuracy > 0.97
    assert score.majority_accuracy == 40 / 80
    assert score.majority_balanced_accuracy == pytest.approx(1 / 3)
    assert (score.n_perturbations, score.n_pathways, score.n_splits) == (80, 3, 5)


def test_permuted_pathways_score_about_the_majority(planted) -> None:
    features, annotation = planted
    found = []
    for seed in range(4):
        shuffled = annotation.sample(frac=1, random_state=seed).set_axis(annotation.index)
        found.append(pathway_accuracy(features, shuffled, n_trees=30, n_repeats=2))
    assert np.mean([s.accuracy for s in found]) == pytest.approx(0.47, abs=0.1)
    assert np.mean([s.balanced_accuracy for s in found]) == pytest.approx(1 / 3, abs=0.09)


def test_every_fold_has_every_pathway_and_no_perturbation_is_predicted_from_itself(planted, monkeypatch) -> None:
    folds = []

    class Recording(StratifiedKFold):
        def split(self, x, y=None, groups=None):
            for train, test in super().split(x, y, groups):
                folds.append((train, test, y))
                yield train, test

    monkeypatch.setattr(module, "StratifiedKFold", Recording)
    pathway_accuracy(*planted, n_trees=2, n_repeats=2)
    assert len(folds) == 10
    for train, test, y in folds:
        assert not set(train) & set(test)
        counts = pd.Series(y[test]).value_counts()
        for name, size in SIZES.items():
            assert abs(counts[name] - size / 5) <= 1
    assert sorted(np.concatenate([t for _, t, _ in folds[:5]])) == list(range(80))
    assert sorted(folds[0][1]) != sorted(folds[5][1])  # another division


def test_order_of_rows_does_not_matter(planted) -> None:
    features, annotation = planted
    noisy = features + np.random.default_rng(1).normal(0, 0.6, features.shape)
    first = pathway_accuracy(noisy, annotation, **SMALL)
    again = pathway_accuracy(noisy.iloc[::-1], annotation.sample(frac=1, random_state=3), **SMALL)
    assert first.accuracy < 0.97  # so that there is something to be unstable about
    pd.testing.assert_frame_equal(first.repeats, again.repeats)
    of_dictionary = pathway_accuracy(noisy, dict(annotation.dropna()), **SMALL)
    pd.testing.assert_frame_equal(first.repeats, of_dictionary.repeats)


def test_seeds(planted) -> None:
    features, annotation = planted
    noisy = features + np.random.default_rng(1).normal(0, 0.6, features.shape)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = pathway_accuracy(noisy, annotation, **SMALL)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    other = pathway_accuracy(noisy, annotation, seed=1, **SMALL)
    assert not first.repeats.equals(other.repeats)
    # the first repeats are the same however many follow
    few = pathway_accuracy(noisy, annotation, n_trees=30, n_repeats=2)
    pd.testing.assert_frame_equal(few.repeats, first.repeats.iloc[:2])
    assert first.accuracy == pytest.approx(first.repeats["accuracy"].mean())
    assert first.accuracy_sd == pytest.approx(first.repeats["accuracy"].std())
    assert first.accuracy_sd > 0


def test_defaults_are_those_of_the_specification(planted, monkeypatch) -> None:
    made = []

    class Recording(RandomForestClassifier):
        def __init__(self, n_estimators=100, random_state=None):
            super().__init__(n_estimators=n_estimators, random_state=random_state)
            made.append((n_estimators, random_state))
            self.n_estimators = 2

    monkeypatch.setattr(module, "RandomForestClassifier", Recording)
    score = pathway_accuracy(*planted)
    assert {n for n, _ in made} == {500, 2}  # 2: clones made for the folds
    assert all(state is not None for _, state in made)
    assert len(score.repeats) == 5


def test_what_is_printed_has_the_baseline(planted) -> None:
    score = pathway_accuracy(*planted, **SMALL)
    assert "majority 0.500" in repr(score)
    assert "majority 0.333" in repr(score)
    table = score.to_frame()
    assert table.loc["majority", "accuracy"] == 0.5
    assert table.loc["random forest", "accuracy"] == score.accuracy


def test_small_pathways(planted) -> None:
    features, annotation = planted
    some = annotation.copy()
    some[some.index[some == "splicing"][3:]] = None
    with pytest.warns(UserWarning, match=r"3 folds instead of 5.*'splicing' has 3"):
        assert pathway_accuracy(features, some, **SMALL).n_splits == 3
    some[some.index[some == "splicing"][1:]] = None
    with pytest.raises(ValueError, match=r"single perturbation.*\['splicing'\]"):
        pathway_accuracy(features, some)


def test_errors_name_the_fix(planted) -> None:
    features, annotation = planted
    with pytest.raises(ValueError, match=r"0 of 92 perturbations are annotated.*annotated: \['Z0'\]"):
        pathway_accuracy(features, {"Z0": "a"})
    with pytest.raises(ValueError, match="in 1 pathway"):
        pathway_accuracy(features, dict.fromkeys(features.index, "a"))
    with pytest.raises(ValueError, match="features names 'G.*more than once"):
        pathway_accuracy(pd.concat([features, features.iloc[:1]]), annotation)
    with pytest.raises(ValueError, match="annotation names 'G.*more than once"):
        pathway_accuracy(features, pd.concat([annotation, annotation.iloc[:1]]))
    broken = features.copy()
    broken.loc[annotation.index[0], "program_3"] = np.nan
    with pytest.raises(ValueError, match=f"'{annotation.index[0]}' are missing"):
        pathway_accuracy(broken, annotation)
    for name in ("n_splits", "n_repeats", "n_trees"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            pathway_accuracy(features, annotation, **{name: 0})
