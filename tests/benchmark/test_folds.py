"""What is held out, and what is asked."""

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


def test_train_fraction_thins_training_cells_of_every_condition_only():
    adata = screen(["control", "A", "B", "A+B"], n=40)
    whole = make_folds(adata, "unseen_combination", **KEYS)[0]
    half = make_folds(adata, "unseen_combination", train_fraction=0.5, **KEYS)[0]
    for label in ("control", "A", "B"):
        rows = (adata.obs["perturbation"] == label).to_numpy()
        assert (half.rows("train") & rows).sum() == round(0.5 * (whole.rows("train") & rows).sum())
    np.testing.assert_array_equal(half.rows("test"), whole.rows("test"))


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


def test_errors_name_the_fix():
    adata = screen(["control", "A", "B", "A+B"])
    with pytest.raises(ValueError, match=r"train_fraction=0.*above 0"):
        make_folds(adata, "random", train_fraction=0, **KEYS)
    with pytest.raises(ValueError, match=r"n_folds=0"):
        make_folds(adata, "random", n_folds=0, **KEYS)
    with pytest.raises(ValueError, match=r"'sen' is not an option.*'seen'"):
        make_folds(adata, "random", split_kwargs={"sen": "2/2"}, **KEYS)
    with pytest.raises(ValueError, match="exclude each other"):
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
