"""log1p CP10k against scanpy, means against loops, sparse against dense against backed."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

from pertvae._expression import group_profiles, log1p_cp10k, mean_profile, row_blocks, row_sums

KINDS = {"dense": np.asarray, "csr": sp.csr_matrix, "csr_array": sp.csr_array, "csc": sp.csc_matrix}


@pytest.fixture
def counts():
    x = np.random.default_rng(0).poisson(0.7, (50, 12)).astype(np.float32)
    x[7] = 0
    return x


@pytest.fixture
def reference(counts):
    adata = ad.AnnData(counts.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return np.asarray(adata.X)


@pytest.fixture(params=["csr", "dense"])
def backed(request, counts, tmp_path):
    ad.AnnData(KINDS[request.param](counts)).write_h5ad(tmp_path / "x.h5ad")
    return ad.read_h5ad(tmp_path / "x.h5ad", backed="r").X


@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_scanpy(kind, counts, reference):
    x = KINDS[kind](counts)
    y = log1p_cp10k(x)
    assert sp.issparse(y) == sp.issparse(x)
    dense = y.toarray() if sp.issparse(y) else y
    np.testing.assert_allclose(dense, reference, rtol=1e-6, atol=1e-6)
    assert (dense[7] == 0).all()  # an empty cell
    np.testing.assert_array_equal(x.toarray() if sp.issparse(x) else x, counts)  # not changed in place


def test_whole_numbers(counts, reference):
    for dtype in (np.int32, np.uint16, np.int64):
        np.testing.assert_allclose(log1p_cp10k(counts.astype(dtype)), reference, rtol=1e-6, atol=1e-6)
        sparse = log1p_cp10k(sp.csr_matrix(counts.astype(dtype))).toarray()
        np.testing.assert_allclose(sparse, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_sums(kind, counts, reference):
    x = KINDS[kind](counts)
    rows = np.array([9, 3, 40, 3])
    np.testing.assert_allclose(mean_profile(x), reference.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean_profile(x, rows), reference[rows].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(row_sums(x), counts.sum(1))
    np.testing.assert_array_equal(row_sums(x, rows), counts[rows].sum(1))


def test_backed(backed, counts, reference):
    rows = np.array([9, 3, 40, 3])
    np.testing.assert_allclose(mean_profile(backed), reference.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean_profile(backed, rows), reference[rows].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(row_sums(backed, rows), counts[rows].sum(1))


@pytest.mark.parametrize("size", [1, 7, 50, 1000])
def test_blocks_are_all_rows_in_order(size, counts):
    for rows in (None, np.random.default_rng(0).permutation(50)):
        parts = list(row_blocks(sp.csr_matrix(counts), rows, size))
        assert max(len(p) for p, _ in parts) <= size
        np.testing.assert_array_equal(np.concatenate([p for p, _ in parts]), np.arange(50) if rows is None else rows)
        together = np.concatenate([b.toarray() for _, b in parts])
        np.testing.assert_array_equal(together, counts if rows is None else counts[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_group_profiles(kind, counts, reference):
    codes = np.random.default_rng(1).integers(-1, 3, 50)
    means, cells = group_profiles(KINDS[kind](counts), codes, 4)
    assert cells.tolist() == [(codes == k).sum() for k in range(4)]
    for k in range(3):
        np.testing.assert_allclose(means[k], reference[codes == k].mean(0), rtol=1e-5)
    assert np.isnan(means[3]).all()


def test_no_cells_is_an_error(counts):
    with pytest.raises(ValueError, match="no cells"):
        mean_profile(counts, np.array([], dtype=int))
