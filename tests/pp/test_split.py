import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae import pp

KEYS = {"perturbation_key": "perturbation", "control": "control"}


def screen(cells=None, contexts=None, seed=0):
    """Cells a label: controls, singles A to F (no single of G), doubles."""
    if cells is None:
        cells = {"control": 60, "A+B": 20, "C+B": 20, "C+D": 20, "E+F": 20, "A+F": 20, "D+E": 20, "A+G": 20}
        cells |= dict.fromkeys("ABCDEF", 30)
    labels = np.repeat(list(cells), list(cells.values()))
    labels = np.random.default_rng(seed).permutation(labels)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(len(labels))])
    if contexts is not None:
        obs["cell_type"] = pd.Categorical(np.random.default_rng(seed + 1).choice(contexts, len(labels)))
    return ad.AnnData(np.ones((len(labels), 2), dtype=np.float32), obs=obs)


def in_training(adata):
    """Canonical labels with at least one training cell."""
    labels = adata.obs["perturbation"].map(lambda v: "+".join(sorted(v.split("+"))))
    return set(labels[adata.obs["split"] == "train"]) - {"control"}


def test_random_takes_the_fraction_of_every_condition():
    adata = screen()
    pp.split_perturbations(adata, "random", test_fraction=0.25, **KEYS)
    table = pd.crosstab(adata.obs["perturbation"], adata.obs["split"])
    share = table["test"] / table.sum(axis=1)
    assert share.drop("control").between(0.19, 0.31).all()
    assert (table["valid"] >= 1).all()
    perturbed = adata.obs["perturbation"] != "control"
    assert abs((adata.obs["split"][perturbed] == "test").sum() - 0.25 * perturbed.sum()) <= 1
    valid = (adata.obs["split"] == "valid").sum() / (adata.obs["split"] != "test").sum()
    assert valid == pytest.approx(0.1, abs=0.01)


def test_small_conditions_keep_a_training_cell_and_still_give_valid_cells():
    adata = screen({"control": 40} | {f"g{i}": 1 + i % 3 for i in range(60)})
    pp.split_perturbations(adata, "random", test_fraction=0.5, valid_fraction=0.5, **KEYS)
    assert in_training(adata) == {f"g{i}" for i in range(60)}
    assert (adata.obs["split"] == "valid").sum() > 10


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_controls_are_divided(fraction):
    adata = screen()
    pp.split_perturbations(adata, "unseen_combination", control_test_fraction=fraction, **KEYS)
    controls = adata.obs["split"][adata.obs["perturbation"] == "control"]
    assert (controls == "test").sum() == pytest.approx(fraction * 60, abs=1)
    assert (controls == "train").any()


def test_no_choice_holds_out_whole_combinations():
    adata = screen()
    summary = pp.split_perturbations(adata, "unseen_combination", test_fraction=0.4, **KEYS)
    target = summary[summary["target"]]
    assert len(target) == 3
    assert (target["split"] == "test").all()
    assert (target["n_components"] == 2).all()
    assert (target["n_cells"] == 20).all()
    assert not set(target["condition"]) & in_training(adata)
    assert set("ABCDEF") <= in_training(adata)


@pytest.mark.parametrize("seen", ["2/2", "1/2", "0/2"])
@pytest.mark.parametrize("seed", range(5))
def test_the_class_is_the_one_asked_for(seen, seed):
    adata = screen()
    summary = pp.split_perturbations(adata, "unseen_combination", seen=seen, test_fraction=0.3, seed=seed, **KEYS)
    target = summary[summary["target"]]
    assert len(target) >= 1
    assert (target["seen"] == seen).all()
    trained = in_training(adata)
    for label in target["condition"]:
        assert label not in trained
        assert sum(c in trained for c in label.split("+")) == int(seen[0])


def test_classes_of_explicit_labels_are_solved_together():
    # a path A-B-C-D: exactly one of each pair must go, which only two colourings of the path do
    adata = screen()
    for seed in range(6):
        summary = pp.split_perturbations(
            adata, "unseen_combination", seen="1/2", held_out=["B+A", "C+D", "B+C"], seed=seed, overwrite=True, **KEYS
        )
        target = summary[summary["target"]]
        assert list(target["condition"]) == ["A+B", "B+C", "C+D"]
        assert (target["seen"] == "1/2").all()


def test_an_odd_cycle_can_not_have_one_of_two():
    adata = screen({"control": 20, "A": 9, "B": 9, "C": 9, "A+B": 9, "B+C": 9, "A+C": 9, "D": 9})
    ask = {"scheme": "unseen_combination", "seen": "1/2", **KEYS}
    with pytest.raises(ValueError, match="can not have seen='1/2'"):
        pp.split_perturbations(adata, held_out=["A+B", "B+C", "A+C"], **ask)
    assert "split" not in adata.obs
    with pytest.warns(UserWarning, match="held out instead of 3"):
        summary = pp.split_perturbations(adata, test_fraction=0.99, **ask)
    assert list(summary.loc[summary["target"], "seen"]) == ["1/2", "1/2"]


def test_a_missing_single_counts_as_unseen():
    adata = screen()
    summary = pp.split_perturbations(adata, "unseen_combination", held_out="G+A", **KEYS)
    assert list(summary.loc[summary["target"], "seen"]) == ["1/2"]
    summary = pp.split_perturbations(adata, "unseen_combination", held_out="A+G", seen="1/2", overwrite=True, **KEYS)
    assert "A" in in_training(adata)
    with pytest.raises(ValueError, match="A\\+G"):
        pp.split_perturbations(adata, "unseen_combination", held_out=["A+G"], seen="2/2", key_added="other", **KEYS)


def test_triples_have_their_own_classes():
    adata = screen({"control": 20, "A": 9, "B": 9, "C": 9, "A+B+C": 9, "A+B": 9, "D": 9})
    for seen in ("3/3", "2/3", "1/3", "0/3"):
        summary = pp.split_perturbations(adata, "unseen_combination", seen=seen, overwrite=True, **KEYS)
        assert summary.loc[summary["target"], ["condition", "seen"]].values.tolist() == [["A+B+C", seen]]


def test_unseen_perturbation_leaves_no_trace_of_the_component():
    adata = screen()
    summary = pp.split_perturbations(adata, "unseen_perturbation", held_out=["A"], **KEYS)
    assert not any("A" in label.split("+") for label in in_training(adata))
    assert set(summary.loc[summary["target"], "condition"]) == {"A", "A+B", "A+F", "A+G"}
    assert summary.set_index(["condition", "split"]).loc[("A+B", "test"), "seen"] == "1/2"
    adata2 = screen()
    summary = pp.split_perturbations(adata2, "unseen_perturbation", test_fraction=0.3, **KEYS)
    gone = {c for label in summary.loc[summary["target"], "condition"] for c in label.split("+")}
    kept = {c for label in in_training(adata2) for c in label.split("+")}
    assert len(gone - kept) == 2


def test_unseen_context_keeps_its_controls_for_training():
    adata = screen(contexts=["K562", "RPE1", "Jurkat"])
    summary = pp.split_perturbations(
        adata, "unseen_context", labels_key="cell_type", held_out="RPE1", control_test_fraction=0.25, **KEYS
    )
    inside = adata.obs["cell_type"] == "RPE1"
    control = adata.obs["perturbation"] == "control"
    assert (adata.obs.loc[inside & ~control, "split"] == "test").all()
    assert (adata.obs.loc[~inside & ~control, "split"] != "test").all()
    assert (adata.obs.loc[inside & control, "split"] == "train").any()
    assert (adata.obs.loc[inside & control, "split"] == "test").any()
    assert set(summary.loc[summary["target"], "context"]) == {"RPE1"}


def test_a_context_without_controls_can_not_be_held_out():
    adata = screen(contexts=["K562", "RPE1"])
    adata = adata[(adata.obs["cell_type"] == "K562") | (adata.obs["perturbation"] != "control")].copy()
    with pytest.raises(ValueError, match="no control cells"):
        pp.split_perturbations(adata, "unseen_context", labels_key="cell_type", held_out=["RPE1"], **KEYS)


@pytest.mark.parametrize("scheme", ["random", "unseen_combination", "unseen_perturbation", "unseen_context"])
def test_folds_hold_out_everything_once(scheme):
    adata = screen(contexts=["a", "b", "c", "d"])
    ask = {"labels_key": "cell_type", **KEYS}
    folds = list(pp.perturbation_folds(adata, scheme, n_folds=3, **ask))
    assert "split" not in adata.obs
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    times = sum((split == "test").to_numpy().astype(int) for split, _ in folds)[perturbed]
    labels = adata.obs["perturbation"][perturbed]
    if scheme == "unseen_combination":
        assert (times == labels.str.contains("+", regex=False)).all()
    elif scheme == "unseen_perturbation":  # a double leaves once for each fold that has one of its components
        assert (times >= 1).all()
        assert (times[~labels.str.contains("+", regex=False)] == 1).all()
    else:
        assert (times == 1).all()
    for i, (split, summary) in enumerate(folds):
        again = pp.split_perturbations(adata, scheme, n_folds=3, fold=i, overwrite=True, **ask)
        pd.testing.assert_series_equal(adata.obs["split"], split, check_names=False)
        pd.testing.assert_frame_equal(again, summary)


def test_choices_depend_on_the_seed_alone():
    first = screen()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    pp.split_perturbations(first, "unseen_combination", seed=3, **KEYS)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    held = []
    for seed, valid in itertools.product((3, 4, 5, 6), (0.1, 0.3)):
        second = screen()
        summary = pp.split_perturbations(second, "unseen_combination", seed=seed, valid_fraction=valid, **KEYS)
        held.append(tuple(summary.loc[summary["target"], "condition"]))
        if seed == 3 and valid == 0.1:
            assert (first.obs["split"] == second.obs["split"]).all()
    assert held[0::2] == held[1::2], "what is held out must not change with valid_fraction"
    assert len(set(held)) > 1


def test_summary_counts_every_cell():
    adata = screen(contexts=["a", "b"])
    for key in (None, "cell_type"):
        summary = pp.split_perturbations(
            adata, "unseen_combination", seen="0/2", labels_key=key, overwrite=True, **KEYS
        )
        assert summary["n_cells"].sum() == adata.n_obs
        counts = summary.groupby("split")["n_cells"].sum()
        assert counts.to_dict() == adata.obs["split"].value_counts().to_dict()
    # singles that had to leave are test cells, but not what was asked for
    assert ((summary["n_components"] == 1) & (summary["split"] == "test") & ~summary["target"]).any()


def test_the_column_survives_h5ad(tmp_path):
    adata = screen()
    pp.split_perturbations(adata, "unseen_combination", **KEYS)
    adata.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_series_equal(back.obs["split"], adata.obs["split"])
    assert list(back.obs["split"].cat.categories) == ["train", "valid", "test"]


def test_labels_are_matched_canonically_and_unused_categories_do_not_count():
    adata = screen({"ctrl": 10, "NT": 10, "A+ctrl": 10, "B": 10, "B+A": 10, "NT+C": 10})
    adata.obs["perturbation"] = adata.obs["perturbation"].astype("category").cat.add_categories(["A+Z", "Q"])
    summary = pp.split_perturbations(
        adata, "unseen_combination", perturbation_key="perturbation", control=["ctrl", "NT"], held_out="A+B"
    )
    assert set(summary["condition"]) == {"ctrl", "A", "B", "C", "A+B"}
    assert summary.set_index("condition").loc["A+B", "seen"] == "2/2"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scheme": "unseen_combo"}, ValueError, "unseen_combination"),
        ({"perturbation_key": "perturbatio"}, KeyError, "Did you mean 'perturbation'"),
        ({"scheme": "unseen_context", "labels_key": "celltype"}, KeyError, "celltype"),
        ({"scheme": "unseen_context"}, ValueError, "labels_key"),
        ({"control": "ctrl"}, ValueError, "is a control"),
        ({"scheme": "unseen_combination", "held_out": "A+Bb"}, KeyError, "Did you mean"),
        ({"scheme": "unseen_combination", "held_out": "A"}, ValueError, "not a combination"),
        ({"scheme": "unseen_perturbation", "held_out": "Z"}, KeyError, "not a component"),
        ({"scheme": "unseen_perturbation", "held_out": list("ABCDEFG")}, ValueError, "no perturbed cell for training"),
        ({"scheme": "unseen_combination", "seen": "two"}, ValueError, "not a class"),
        ({"scheme": "unseen_combination", "seen": "3/3"}, ValueError, "6 with 2/2"),
        ({"scheme": "random", "seen": "2/2"}, ValueError, "belongs to"),
        ({"scheme": "random", "held_out": "A"}, ValueError, "no meaning"),
        ({"test_fraction": 0.0}, ValueError, "test_fraction=0.0"),
        ({"valid_fraction": 1.0}, ValueError, "valid_fraction=1.0"),
        ({"n_folds": 3, "fold": 3}, ValueError, "fold=3"),
        ({"scheme": "unseen_combination", "n_folds": 30}, ValueError, "at most 7"),
        ({"scheme": "unseen_combination", "n_folds": 3, "held_out": "A+B"}, ValueError, "not both"),
    ],
)
def test_errors_name_the_value_and_write_nothing(change, error, match):
    adata = screen()
    with pytest.raises(error, match=match):
        pp.split_perturbations(adata, **{**KEYS, **change})
    assert list(adata.obs.columns) == ["perturbation"]


def test_no_combinations_is_an_error():
    with pytest.raises(ValueError, match="two or more components"):
        pp.split_perturbations(screen({"control": 9, "A": 9, "B": 9}), "unseen_combination", **KEYS)


def test_nothing_is_overwritten_silently():
    adata = screen()
    adata.obs["split"] = "mine"
    with pytest.raises(ValueError, match="overwrite=True"):
        pp.split_perturbations(adata, **KEYS)
    assert (adata.obs["split"] == "mine").all()
    pp.split_perturbations(adata, overwrite=True, **KEYS)
    assert set(adata.obs["split"]) == {"train", "valid", "test"}
