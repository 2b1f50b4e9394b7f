"""Stored tables survive h5ad, whatever the names."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae._storage import from_stored, read_table, read_tables, to_stored, write_table, write_tables


def table(names, n_genes=4, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        rng.normal(size=(len(names), n_genes)).astype(np.float32),
        index=names,
        columns=[f"g{j}" for j in range(n_genes)],
    )


def through_h5ad(uns, path):
    ad.AnnData(np.ones((1, 1), np.float32), uns=uns).write_h5ad(path)
    return ad.read_h5ad(path).uns


NAMES = {
    "plain": ["A", "B+A"],
    "slash": ["A/1", "B/C/D", "/", "//"],
    "collision": ["a/b", "a|b", "a//b", "a|b_1"],
    "unicode": ["β-catenin", "IFN-γ 10 µM", "日本"],
    "spaces": [" A", "A ", "A B", "A+ B"],
    "numbers": ["1", "2", "10"],
    "one": ["A"],
    "none": [],
}


@pytest.mark.parametrize("kind", NAMES)
def test_round_trip_through_h5ad(kind, tmp_path):
    original = table(NAMES[kind])
    uns = {}
    write_table(uns, "shifts", original)
    read = read_table(through_h5ad(uns, tmp_path / "a.h5ad"), "shifts")
    assert list(read.index) == NAMES[kind]
    assert list(read.columns) == list(original.columns)
    np.testing.assert_array_equal(read.to_numpy(), original.to_numpy())


def test_stored_form():
    stored, names = to_stored(table(["a/b", "a|b"]))
    assert list(stored.index) == ["g0", "g1", "g2", "g3"]  # genes are rows
    assert stored.columns.is_unique
    assert not any("/" in c for c in stored.columns)
    assert names["name"].tolist() == ["a/b", "a|b"]
    assert list(names.index) == list(stored.columns)
    pd.testing.assert_frame_equal(
        from_stored(stored, names), table(["a/b", "a|b"]), check_index_type=False, check_column_type=False
    )


def test_the_table_given_is_not_changed():
    original = table(["a/b"])
    copy = original.copy()
    uns = {}
    write_table(uns, "k", original)
    uns["k"].iloc[0, 0] = 99.0
    pd.testing.assert_frame_equal(original, copy)


def test_merging_by_label():
    uns = {}
    write_table(uns, "k", table(["A/1", "B"], seed=1), merge=True)
    write_table(uns, "k", table(["B", "C"], seed=2), merge=True)
    read = read_table(uns, "k")
    assert list(read.index) == ["A/1", "B", "C"]
    np.testing.assert_array_equal(read.loc["A/1"], table(["A/1", "B"], seed=1).loc["A/1"])
    np.testing.assert_array_equal(read.loc["B"], table(["B", "C"], seed=2).loc["B"])
    write_table(uns, "k", table(["D"], n_genes=3), merge=True)  # other genes: nothing to keep
    assert list(read_table(uns, "k").index) == ["D"]
    write_table(uns, "k", table(["E"], n_genes=3))
    assert list(read_table(uns, "k").index) == ["E"]


def test_merging_after_h5ad(tmp_path):
    uns = {}
    write_table(uns, "k", table(["A/1"]))
    uns = through_h5ad(uns, tmp_path / "a.h5ad")
    write_table(uns, "k", table(["B"], seed=5), merge=True)
    read = read_table(through_h5ad(uns, tmp_path / "b.h5ad"), "k")
    assert list(read.index) == ["A/1", "B"]
    np.testing.assert_array_equal(read.to_numpy(), np.concatenate([table(["A/1"]), table(["B"], seed=5)]))


def test_several_tables(tmp_path):
    tables = {"mean": table(["A/1"]), "lower": table(["A/1"], seed=1)}
    uns = {}
    write_tables(uns, "effects", tables)
    read = read_tables(through_h5ad(uns, tmp_path / "a.h5ad"), "effects")
    assert set(read) == {"mean", "lower"}
    for name, value in read.items():
        assert list(value.index) == ["A/1"]
        np.testing.assert_array_equal(value.to_numpy(), tables[name].to_numpy())


def test_five_thousand_genes_and_rows(tmp_path):
    """Thousands of genes are rows of the stored table; that many columns would not fit in an h5ad attribute."""
    uns = {}
    write_table(uns, "k", table([f"P{i}/x" for i in range(20)], n_genes=5000))
    read = read_table(through_h5ad(uns, tmp_path / "a.h5ad"), "k")
    assert read.shape == (20, 5000)
    np.testing.assert_array_equal(read.to_numpy(), table([""] * 20, n_genes=5000).to_numpy())
