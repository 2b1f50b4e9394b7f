"""Split columns, stratified validation cells, seeds."""

import numpy as np
import pandas as pd
import pytest
import scvi
from mudata import MuData

from pertvae.data import PerturbationDataSplitter, hold_out, split_labels
from pertvae.models import SAMSVAE


def registered(data, **arguments):
    if isinstance(data, MuData):
        SAMSVAE.setup_mudata(
            data,
            perturbation_key="perturbation",
            control="ctrl",
            modalities={"layer": "rna", "perturbation_key": "rna"},
        )
    else:
        SAMSVAE.setup_anndata(data, perturbation_key="perturbation", control="ctrl", **arguments)
    return SAMSVAE(data, n_latent=2).adata_manager


def indices(splitter):
    splitter.setup()
    return [np.sort(np.asarray(i)).tolist() for i in (splitter.train_idx, splitter.val_idx, splitter.test_idx)]


def test_hold_out_takes_the_same_fraction_of_every_condition():
    rng = np.random.default_rng(0)
    condition = rng.permutation(np.repeat(np.arange(5), [100, 57, 10, 9, 1]))
    cells = np.arange(len(condition)) * 3
    kept, held = hold_out(cells, condition, 0.1, seed=4)
    assert sorted([*kept, *held]) == cells.tolist()
    assert np.bincount(condition[held // 3], minlength=5).tolist() == [10, 5, 1, 0, 0]
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()


def test_hold_out_is_seeded_and_random():
    condition = np.zeros(200, int)
    cells = np.arange(200)
    same = [hold_out(cells, condition, seed=1)[1].tolist() for _ in range(2)]
    assert same[0] == same[1]
    other = hold_out(cells, condition, seed=2)[1].tolist()
    assert same[0] != other
    # every cell is as likely as any other
    counts = np.bincount(np.concatenate([hold_out(cells, condition, seed=s)[1] for s in range(300)]), minlength=200)
    assert counts.mean() == pytest.approx(30)
    assert counts.max() < 60
    assert counts.min() > 8


def test_split_labels():
    column = pd.Series(["train", "val", "valid", "validation", "test", "ood"], name="split")
    assert split_labels(column).tolist() == ["train", "valid", "valid", "valid", "test", "test"]
    assert split_labels(column.astype("category")).tolist() == split_labels(column).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["train", "Test"], "'Test'.*'train'.*'ood'"),
        (["train", None], "missing for 1 cells, first '1'"),
        (["test", "valid"], r"no 'train' cell.*\['test', 'valid'\]"),
    ],
)
def test_split_label_errors(values, message):
    with pytest.raises(ValueError, match=message):
        split_labels(pd.Series(values, name="split", index=[str(i) for i in range(len(values))]))


def test_split_column(adata):
    adata.obs["split"] = np.resize(["train", "train", "valid", "ood"], 60)
    train, valid, test = indices(PerturbationDataSplitter(registered(adata), split_key="split"))
    assert train == np.flatnonzero(adata.obs["split"] == "train").tolist()
    assert valid == np.flatnonzero(adata.obs["split"] == "valid").tolist()
    assert test == np.flatnonzero(adata.obs["split"] == "ood").tolist()


@pytest.mark.parametrize("split_key", [None, "split"])
def test_validation_cells_are_drawn_by_condition(adata, split_key):
    adata.obs["split"] = np.resize(["train"] * 14 + ["test"], 60)
    manager = registered(adata)
    scvi.settings.seed = 0
    train, valid, test = indices(PerturbationDataSplitter(manager, split_key=split_key))
    expected = [] if split_key is None else np.flatnonzero(adata.obs["split"] == "test").tolist()
    assert test == expected
    assert sorted([*train, *valid, *test]) == list(range(60))
    assert adata.obs["perturbation"].iloc[valid].value_counts().to_dict() == dict.fromkeys(
        ["ctrl", "GATA1", "KLF1", "GATA1+KLF1"], 1
    )
    again = indices(PerturbationDataSplitter(manager, split_key=split_key))
    assert again == [train, valid, test]
    scvi.settings.seed = 1
    assert indices(PerturbationDataSplitter(manager, split_key=split_key))[1] != valid


@pytest.mark.parametrize("where", ["modality", "top"])
def test_split_column_of_mudata(adata, where):
    data = MuData({"rna": adata})
    (adata if where == "modality" else data).obs["split"] = np.resize(["train", "valid", "test"], 60)
    train, valid, test = indices(PerturbationDataSplitter(registered(data), split_key="split"))
    assert train == list(range(0, 60, 3))
    assert valid == list(range(1, 60, 3))
    assert test == list(range(2, 60, 3))


def test_arguments_that_contradict_each_other(adata):
    adata.obs["split"] = "train"
    manager = registered(adata)
    for wrong in ({"train_size": 0.9}, {"validation_size": 0.1}, {"shuffle_set_split": False}):
        with pytest.raises(ValueError, match=r"split_key='split'.*leave out"):
            PerturbationDataSplitter(manager, split_key="split", **wrong)
    with pytest.raises(KeyError, match=r"split_key='fold'"):
        PerturbationDataSplitter(manager, split_key="fold")


def test_sizes_are_scvi_tools_own(adata):
    manager = registered(adata)
    splitter = PerturbationDataSplitter(manager, train_size=0.5, validation_size=0.2)
    assert [len(i) for i in indices(splitter)] == [30, 12, 18]
    ordered = PerturbationDataSplitter(manager, train_size=0.5, shuffle_set_split=False)
    assert indices(ordered)[1] == list(range(30))
