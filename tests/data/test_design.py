"""Doses and conditions against a cell-by-cell reading of the labels, and their cost."""

import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae._labels import LabelFormat
from pertvae.data import design_from_labels, design_from_obsm, distinct_doses, dose_matrix

FORMAT = LabelFormat.create(["ctrl", "NT"], "+")


def cells(labels, **columns):
    obs = pd.DataFrame({"label": labels, **columns}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(obs=obs)


def by_cell(labels, doses=None):
    """Read every cell on its own."""
    result = []
    for i, label in enumerate(labels):
        parts = [p.strip() for p in str(label).split("+")]
        amounts = ["1"] * len(parts) if doses is None else str(doses[i]).split("+")
        amounts = amounts * len(parts) if len(amounts) == 1 else amounts
        row = {p: float(d) for p, d in zip(parts, amounts, strict=True) if p not in ("ctrl", "NT") and float(d) > 0}
        result.append(row)
    return result


@pytest.mark.parametrize("categorical", [False, True])
def test_labels_against_a_cell_by_cell_reading(categorical):
    rng = np.random.default_rng(1)
    names = ["A", "B", "C", "D", "ctrl", "NT"]
    labels = ["+".join(rng.choice(names, rng.integers(1, 4), replace=False)) for _ in range(300)]
    adata = cells(pd.Categorical(labels) if categorical else labels)
    design = design_from_labels(adata, "label", FORMAT)
    assert design.components == ("A", "B", "C", "D")
    expected = by_cell(labels)
    np.testing.assert_array_equal(design.doses.toarray(), [[r.get(c, 0.0) for c in "ABCD"] for r in expected])
    assert list(design.condition) == ["+".join(sorted(r)) or "ctrl" for r in expected]
    assert design.doses.dtype == np.float32
    assert design.doses.format == "csr"
    assert design.doses.has_sorted_indices


def test_text_doses_against_a_cell_by_cell_reading():
    rng = np.random.default_rng(2)
    labels = ["+".join(rng.choice(["B", "A", "ctrl", "C"], rng.integers(1, 4), replace=False)) for _ in range(200)]
    doses = ["+".join(str(d) for d in rng.choice([0, 0.5, 1.5, 3], v.count("+") + 1)) for v in labels]
    design = design_from_labels(cells(labels, dose=doses), "label", FORMAT, dosage_key="dose")
    expected = by_cell(labels, doses)
    np.testing.assert_allclose(design.doses.toarray(), [[r.get(c, 0.0) for c in design.components] for r in expected])
    # a component at dose 0 was not applied
    assert list(design.condition) == ["+".join(sorted(r)) or "ctrl" for r in expected]
    assert (design.doses.data > 0).all()


def test_numeric_doses():
    labels = ["A", "A+B", "ctrl", "B", "A"]
    design = design_from_labels(cells(labels, dose=[2.0, 0.5, np.nan, 0.0, 3.0]), "label", FORMAT, dosage_key="dose")
    np.testing.assert_array_equal(design.doses.toarray(), [[2, 0], [0.5, 0.5], [0, 0], [0, 0], [3, 0]])
    assert list(design.condition) == ["A", "A+B", "ctrl", "ctrl", "A"]
    whole = design_from_labels(cells(labels, dose=[1, 2, 0, 1, 1]), "label", FORMAT, dosage_key="dose")
    np.testing.assert_array_equal(whole.doses.toarray()[1], [2, 2])
    as_category = cells(labels, dose=pd.Categorical([2.0, 0.5, 1.0, 0.0, 3.0]))
    again = design_from_labels(as_category, "label", FORMAT, dosage_key="dose")
    np.testing.assert_array_equal(again.doses.toarray(), design.doses.toarray())


def test_missing_doses_of_controls_do_not_matter():
    design = design_from_labels(
        cells(["A", "ctrl"], dose=pd.Series(["1.5", None], dtype=object).to_numpy()), "label", FORMAT, dosage_key="dose"
    )
    np.testing.assert_array_equal(design.doses.toarray(), [[1.5], [0]])


def test_the_vocabulary_of_an_earlier_registration():
    design = design_from_labels(cells(["C", "B+A"]), "label", FORMAT, components=["A", "B", "C", "D"])
    np.testing.assert_array_equal(design.doses.toarray(), [[0, 0, 1, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"'GATA2' \(in 'A\+GATA2'\).*'GATA1'"):
        design_from_labels(cells(["GATA2+A"]), "label", FORMAT, components=["A", "GATA1"])


@pytest.mark.parametrize("kind", ["frame", "array", "csr", "csr_array", "sparse_frame"])
def test_design_matrices(kind):
    names = ["b", "a", "ctrl"] if "frame" in kind else ["0", "1", "2"]
    values = np.array([[0, 0, 0], [2, 0, 0], [1, 0.5, 0], [0, 1, 0]])
    adata = cells(["x"] * 4)
    frame = pd.DataFrame(values, columns=names, index=adata.obs_names)
    adata.obsm["d"] = {
        "frame": frame,
        "array": values,
        "csr": sp.csr_matrix(values),
        "csr_array": sp.csr_array(values),
        "sparse_frame": frame.astype(pd.SparseDtype(float, 0.0)) if kind == "sparse_frame" else None,
    }[kind]
    design = design_from_obsm(adata, "d", FORMAT)
    if "frame" in kind:  # columns are sorted, the control's is dropped
        assert design.components == ("a", "b")
        np.testing.assert_array_equal(design.doses.toarray(), values[:, [1, 0]])
        assert list(design.condition) == ["ctrl", "b", "a+b", "a"]
    else:
        assert design.components == ("0", "1", "2")
        np.testing.assert_array_equal(design.doses.toarray(), values)
        assert list(design.condition) == ["ctrl", "0", "0+1", "1"]


def test_design_matrix_of_query_data_is_matched_by_name():
    adata = cells(["x"] * 2)
    adata.obsm["d"] = pd.DataFrame({"c": [1.0, 0.0], "a": [0.0, 2.0]}, index=adata.obs_names)
    design = design_from_obsm(adata, "d", FORMAT, components=["a", "b", "c"])
    np.testing.assert_array_equal(design.doses.toarray(), [[0, 0, 1], [2, 0, 0]])
    with pytest.raises(ValueError, match="'c'"):
        design_from_obsm(adata, "d", FORMAT, components=["a", "b"])


def test_the_matrix_given_is_not_changed():
    adata = cells(["x"] * 2)
    matrix = sp.csr_matrix(np.array([[1.0, 0.0], [0.0, 0.0]], dtype=np.float32))
    matrix.data[0] = 0.0  # a stored zero
    adata.obsm["d"] = matrix
    design = design_from_obsm(adata, "d", FORMAT)
    assert adata.obsm["d"].nnz == 1
    assert design.doses.nnz == 0


def test_dose_matrix():
    table = dose_matrix([{"b": 2.0, "a": 1.0}, {}, {"b": 0.5}], ["a", "b"])
    np.testing.assert_array_equal(table.toarray(), [[1, 2], [0, 0], [0, 0.5]])


def test_distinct_doses_and_their_cells():
    rng = np.random.default_rng(0)
    table = rng.choice([0.0, 0.1, 1.0, 30.0], (60, 4))
    table[:, 2] = 0.0
    expected = {}
    for row in table.astype(np.float32):
        for j, dose in enumerate(row):
            if dose:
                expected[j, float(dose)] = expected.get((j, float(dose)), 0) + 1
    matrix = sp.csr_matrix(table)
    assert distinct_doses(matrix) == expected
    assert list(distinct_doses(matrix)) == sorted(expected)
    matrix.data[0] = 0.0  # a stored zero is no dose
    assert sum(distinct_doses(matrix).values()) == matrix.nnz - 1
    assert distinct_doses(sp.csr_matrix((5, 2))) == {}


@pytest.mark.parametrize("doses", [False, True])
def test_a_million_cells_encode_in_seconds(doses):
    rng = np.random.default_rng(0)
    names = [f"P{i:04d}" for i in range(2000)]
    labels = np.array(["ctrl", *names, *(f"{a}+{b}" for a, b in rng.choice(names, (500, 2)) if a != b)], dtype=object)
    columns = {"dose": rng.choice([0.5, 1.0], 1_000_000)} if doses else {}
    obs = pd.DataFrame({"label": labels[rng.integers(0, len(labels), 1_000_000)], **columns})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs)
    start = time.perf_counter()
    design = design_from_labels(adata, "label", FORMAT, dosage_key="dose" if doses else None)
    assert time.perf_counter() - start < 5
    assert design.doses.shape == (1_000_000, 2000)
    assert design.doses.data.nbytes < 20e6
