"""A small AnnData to register, and a comparison of all that is in it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp


@pytest.fixture
def adata():
    """Sixty cells, ten genes, four conditions."""
    rng = np.random.default_rng(0)
    label = np.repeat(["ctrl", "GATA1", "KLF1", "GATA1+KLF1"], 15)
    obs = pd.DataFrame(
        {
            "perturbation": label,
            "batch": rng.choice(["b0", "b1"], 60),
            "cell_type": pd.Categorical(rng.choice(["t0", "t1"], 60)),
            "dose": rng.choice([0.5, 1.0], 60),
            "dose_text": ["1.0+0.5" if "+" in v else "2" for v in label],
            "age": rng.normal(size=60),
            "total": rng.uniform(1, 2, 60),
        },
        index=[f"cell{i}" for i in range(60)],
    )
    x = sp.csr_matrix(rng.poisson(2.0, (60, 10)).astype(np.float32))
    result = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(10)]))
    result.layers["counts"] = x.copy()
    result.obsm["design"] = pd.DataFrame(
        {"GATA1": [float("GATA1" in v) for v in label], "KLF1": [float("KLF1" in v) for v in label]}, index=obs.index
    )
    result.uns["note"] = {"a": 1}
    return result


def _array(x):
    return x.toarray() if sp.issparse(x) else np.asarray(x)


@pytest.fixture
def unchanged():
    """Take a deep copy of an AnnData; the returned function asserts that it is still the same."""

    def remember(adata):
        before = adata.copy()

        def check():
            pd.testing.assert_frame_equal(adata.obs, before.obs)
            pd.testing.assert_frame_equal(adata.var, before.var)
            assert list(adata.obsm) == list(before.obsm)
            assert list(adata.layers) == list(before.layers)
            assert dict(adata.uns) == dict(before.uns)
            assert type(adata.X) is type(before.X)
            if before.X is not None:
                np.testing.assert_array_equal(_array(adata.X), _array(before.X))
            for name in before.layers:
                np.testing.assert_array_equal(_array(adata.layers[name]), _array(before.layers[name]))
            for name in before.obsm:
                np.testing.assert_array_equal(_array(adata.obsm[name]), _array(before.obsm[name]))

        return check

    return remember
