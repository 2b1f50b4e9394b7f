"""What is held out, and what is asked."""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae.benchmark._folds import make_folds

KEYS = {"perturbation_key": "perturbation", "control": "control"}


def screen(labels, n=20, context=None):
    names = np.repeat(labels, n)
    obs = pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(len(names))])
    if context is not None:
        obs["line"] = np.resize(context, len(names))
    return ad.AnnData(np.ones((len(names), 3)), obs=obs)


def asked(folds):
    return [[u.label for u in f.units] for f in folds]


def test_combinations_with_both_singles_are_left_out_in_turn():
    """As in the Norman subset: two of three doubles have both singles, each is left out once."""
    adata = screen(["control", "A", "B", "C", "D", "A+B", "C+D", "A+X"])
    folds = make_folds(adata, "unseen_combination", **KEYS)
    assert sorted(asked(folds)) == [["A+B"], ["C+D"]]
    for fold in folds:
        gone = adata.obs["perturbation"] == fold.units[0].label
        assert (fold.split[gone] == "test").all()
        assert fold.units[0].seen == "2/2"
        held = set(adata.obs["perturbation"][fold.rows("test")])
        assert held == {fold.units[0].label, "control"}


def test_many_combinations_make_four_folds_that_hold_out_each_once():
    singles = [f"G{i}" for i in range(16)]
    adata = screen(["control", "T", *singles, *(f"{s}+T" for s in singles)], n=10)
    folds = make_folds(adata, "unseen_combination", **KEYS)
    assert [len(f.units) for f in folds] == [4, 4, 4, 4]
    assert len({u.label for f in folds for u in f.units}) == 16


def test_one_fold_holds_out_all_combinations():
    adata = screen(["control", "A", "B", "C", "A+B", "B+C", "A+C"])
    (fold,) = make_folds(adata, "unseen_combination", n_folds=1, **KEYS)
    assert sorted(u.label for u in fold.units) == ["A+B", "A+C", "B+C"]


def test_no_cell_is_set_aside_for_validation_and_controls_are_divided():
    (fold,) = make_folds(screen(["control", "A", "B"], n=50), "random", **KEYS)
    assert not fold.rows("valid").any()
    controls = fold.split[:50]
    assert (controls == "test").sum() == 10
    assert (controls == "train").sum() == 40


def test_contexts_make_units():
    adata = screen(["control", "A", "B"], n=60, context=["x", "y"])
    (fold,) = make_folds(adata, "random", labels_key="line", **KEYS)
    assert sorted(u.name for u in fold.units) == ["A | x", "A | y", "B | x", "B | y"]
    assert fold.contexts == ["x", "y"]


@pytest.fixture
def pairs():
    """Eight singles and 14 pairs, unequal numbers of cells."""
    names = [f"G{i}" for i in range(8)]
    doubles = [f"{a}+{b}" for a, b in itertools.combinations(names, 2)][::2]
    sizes = {"control": 50, **dict.fromkeys(names, 20), **{d: 8 + i for i, d in enumerate(doubles)}}
    obs = pd.DataFrame({"perturbation": np.repeat(list(sizes), list(sizes.values()))})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return ad.AnnData(np.ones((len(obs), 3)), obs=obs)


FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUARTER = {"n_folds": 1, "split_kwargs": {"test_fraction": 0.25}}


def test_train_fraction_takes_whole_combinations_out_of_training(pairs):
    folds = make_folds(pairs, "unseen_combination", train_fractions=FRACTIONS, **QUARTER, **KEYS)
    assert [f.train_fraction for f in folds] == list(FRACTIONS)
    labels = pairs.obs["perturbation"]
    held = {u.label for u in folds[0].units}
    assert len(held) == 4  # round(0.25 * 14)
    before: set[str] = set()
    for fold, expected in zip(folds, (0, 2, 5, 7, 10), strict=True):  # int(f * 10)
        kept = {c for c in labels[fold.rows("train")] if "+" in c}
        assert len(kept) == expected
        assert before <= kept  # smaller fractions lie within larger ones
        before = kept
        for label in {c for c in labels if "+" in c} - held:  # all cells of a combination, or none
            rows = fold.split[(labels == label).to_numpy()]
            assert (rows == "train").all() if label in kept else rows.isna().all()
        for other in folds:  # what is held out does not change, nor do singles and controls
            np.testing.assert_array_equal(fold.rows("test"), other.rows("test"))
            single = (~labels.str.contains("+", regex=False)).to_numpy()
            assert fold.split[single].equals(other.split[single].astype(fold.split.dtype))
        np.testing.assert_array_equal(fold.common_rows(), folds[0].rows("train"))
        assert [u.name for u in fold.units] == [u.name for u in folds[0].units]
    assert (folds[-1].split == make_folds(pairs, "unseen_combination", **QUARTER, **KEYS)[0].split).all()


def test_train_fraction_is_seeded_and_does_not_depend_on_the_order_of_cells(pairs):
    def kept(adata, seed):
        options = {"test_fraction": 0.25, "seed": seed, "held_out": ["G0+G1", "G0+G3"]}
        (fold,) = make_folds(adata, "unseen_combination", train_fractions=(0.5,), split_kwargs=options, **KEYS)
        return {c for c in adata.obs["perturbation"][fold.rows("train")] if "+" in c}

    assert kept(pairs, 0) == kept(pairs[::-1].copy(), 0)
    assert len({frozenset(kept(pairs, seed)) for seed in range(5)}) > 1


def test_train_fraction_also_leaves_validation_cells_out(pairs):
    options = {"test_fraction": 0.25, "valid_fraction": 0.3}
    (fold,) = make_folds(pairs, "unseen_combination", n_folds=1, train_fractions=(0.0,), split_kwargs=options, **KEYS)
    assert fold.rows("valid").any()
    assert not pairs.obs["perturbation"][fold.rows("valid")].str.contains("+", regex=False).any()


def test_train_fraction_in_other_schemes(pairs):
    whole, half = (
        make_folds(pairs, "random", train_fractions=(f,), split_kwargs={"test_fraction": 0.3}, **KEYS)[0]
        for f in (1.0, 0.5)
    )
    np.testing.assert_array_equal(half.rows("test"), whole.rows("test"))
    trained = {c for c in pairs.obs["perturbation"][half.rows("train")] if "+" in c}
    assert len(trained) == 7


def test_conditions_with_few_held_out_cells_are_named_not_scored():
    labels = ["control"] * 50 + ["A"] * 50 + ["B"] * 8
    adata = ad.AnnData(np.ones((108, 2)), obs=pd.DataFrame({"perturbation": labels}, index=map(str, range(108))))
    (fold,) = make_folds(adata, "random", **KEYS)
    assert [u.label for u in fold.units] == ["A"]
    assert fold.left_out == ["B"]


def test_options_reach_the_splitter():
    adata = screen(["control", "A", "B", "C", "A+B", "B+C"])
    (fold,) = make_folds(adata, "unseen_combination", split_kwargs={"held_out": ["B+A"]}, **KEYS)
    assert asked([fold]) == [["A+B"]]
    (fold,) = make_folds(adata, "unseen_combination", split_kwargs={"seen": "1/2"}, n_folds=1, **KEYS)
    assert {u.seen for u in fold.units} == {"1/2"}


def test_what_is_named_is_held_out_in_turn():
    adata = screen(["control", "A", "B", "C", "A+B", "B+C", "A+C"])
    options = {"held_out": ["A+C", "B+A"]}
    folds = make_folds(adata, "unseen_combination", n_folds=2, split_kwargs=options, **KEYS)
    assert asked(folds) == [["A+C"], ["A+B"]]
    for fold, unit in zip(folds, ["A+C", "A+B"], strict=True):
        inside = (adata.obs["perturbation"] == unit).to_numpy()
        assert (fold.split[inside] == "test").all()
        others = adata.obs["perturbation"].isin(["A", "B", "C", "B+C"]).to_numpy()
        assert (fold.split[others] == "train").all()
    (together,) = make_folds(adata, "unseen_combination", n_folds=1, split_kwargs=options, **KEYS)
    assert asked([together]) == [["A+B", "A+C"]]


def test_errors_name_the_fix():
    adata = screen(["control", "A", "B", "A+B"])
    with pytest.raises(ValueError, match=r"train_fraction=0.5.*no combination.*n_folds of 2"):
        make_folds(adata, "unseen_combination", train_fractions=(0.5, 1.0), **KEYS)
    with pytest.raises(ValueError, match=r"train_fraction=0.5.*no combination"):
        make_folds(screen(["control", "A", "A+B"], 50), "random", train_fractions=(0.5,), sep=None, **KEYS)
    with pytest.raises(ValueError, match=r"n_folds=0"):
        make_folds(adata, "random", n_folds=0, **KEYS)
    with pytest.raises(ValueError, match=r"'sen' is not an option.*'seen'"):
        make_folds(adata, "random", split_kwargs={"sen": "2/2"}, **KEYS)
    with pytest.raises(ValueError, match=r"n_folds=2 is more than what held_out names: 'A\+B'"):
        make_folds(adata, "unseen_combination", n_folds=2, split_kwargs={"held_out": ["A+B"]}, **KEYS)
    with pytest.raises(ValueError, match="no held-out condition has 5 cells"):
        make_folds(screen(["control", "A"], n=6), "random", **KEYS)


@pytest.mark.real
def test_folds_of_the_real_subsets(data_dir):
    norman = ad.read_h5ad(data_dir / "norman2019_subset.h5ad", backed="r")
    assert sorted(asked(make_folds(norman, "unseen_combination", **KEYS))) == [["KLF1+MAP2K6"], ["MAP2K3+SLC38A2"]]
    datlinger = ad.read_h5ad(data_dir / "datlinger2021_scifi_subset.h5ad", backed="r")
    folds = make_folds(datlinger, "unseen_combination", **KEYS)
    assert [len(f.units) for f in folds] == [4, 4, 4, 4]
    assert all(u.label.endswith("+TCRstim") and u.seen == "2/2" for f in folds for u in f.units)
