"""What holds for every kind of screen: shared parts, seeds, storage, settings."""

from __future__ import annotations

import inspect
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import read_truth, simulate_screen
from pertvae.datasets._kinds import KINDS

SMALL = {
    "n_genes": 60,
    "n_perturbations": 6,
    "n_doubles": 4,
    "cells_per_perturbation": 20,
    "cells_per_double": 15,
    "n_controls": 60,
    "n_oracle": 30,
}
COUNTS = [k for k, f in KINDS.items() if "n_latent" in inspect.signature(f).parameters and k != "samsvae_authors"]
SETTINGS: dict[str, dict[str, Any]] = {
    "samsvae_authors": {"n_genes": 60, "n_perturbations": 6, "cells_per_split": (10, 5, 5), "n_controls": 60},
}


def make(kind: str, seed: int = 0, **settings: Any) -> ad.AnnData:
    return simulate_screen(kind, seed=seed, **{**SETTINGS.get(kind, SMALL), **settings})


@pytest.fixture(scope="module")
def screens() -> dict[str, ad.AnnData]:
    return {kind: make(kind) for kind in KINDS}


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_index_type=False, check_column_type=False)
    elif isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b, check_index_type=False)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    else:
        assert type(a) is type(b)
        assert a == b


@pytest.mark.parametrize("kind", list(KINDS))
def test_storage(kind: str, screens: dict[str, ad.AnnData], tmp_path) -> None:
    adata = screens[kind]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    assert_equal(vars(read_truth(adata)), vars(read_truth(back)))
    pd.testing.assert_frame_equal(adata.obs, back.obs, check_index_type=False)
    assert_equal(dict(adata.obsm), dict(back.obsm))
    difference = adata.X != back.X
    assert (difference.nnz if sp.issparse(difference) else difference.sum()) == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_seeds(kind: str, screens: dict[str, ad.AnnData]) -> None:
    np.random.seed(11)  # noqa: NPY002 (the global state is what is tested)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    again, other = make(kind), make(kind, seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert_equal(vars(read_truth(again)), vars(read_truth(screens[kind])))
    pd.testing.assert_frame_equal(again.obs, screens[kind].obs)
    x, same, different = (a.X.toarray() if sp.issparse(a.X) else a.X for a in (screens[kind], again, other))
    np.testing.assert_array_equal(x, same)
    assert (x != different).any()
    assert (read_truth(other).effects.to_numpy() != read_truth(again).effects.to_numpy()).any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_layout(kind: str, screens: dict[str, ad.AnnData]) -> None:
    adata, truth = screens[kind], read_truth(screens[kind])
    assert truth.kind == kind
    labels = [c for c in adata.obs["perturbation"].cat.categories if c != "control"]
    assert list(truth.shifts.index) == labels
    assert set(adata.obs["perturbation"]) == {"control", *labels}
    assert list(truth.mask.index) == [c for c in labels if "+" not in c]
    assert truth.effects.shape == truth.mask.shape
    assert not truth.effects.to_numpy()[truth.mask.to_numpy() == 0].any()
    given = inspect.signature(KINDS[kind]).parameters
    assert set(given) <= set(truth.settings)
    assert all(p.kind is p.KEYWORD_ONLY for p in given.values())
    assert f'``"{kind}"``' in simulate_screen.__doc__
    assert not [name for name in given if name != "seed" and f"``{name}``" not in simulate_screen.__doc__]


@pytest.mark.parametrize("kind", COUNTS)
def test_count_kinds_share_their_parts(kind: str, screens: dict[str, ad.AnnData]) -> None:
    adata, plain = screens[kind], screens["sparse_additive"]
    truth, base = read_truth(adata), read_truth(plain)
    common = inspect.signature(KINDS["sparse_additive"]).parameters
    own = inspect.signature(KINDS[kind]).parameters
    assert {name: own[name].default for name in common} == {name: p.default for name, p in common.items()}
    for name in ("perturbation", "batch"):
        pd.testing.assert_series_equal(adata.obs[name], plain.obs[name])
    assert_equal(truth.decoder, base.decoder)
    assert_equal(truth.genes[list(base.genes)], base.genes)
    moving = truth.effects.any(axis=1)
    pd.testing.assert_frame_equal(truth.effects[moving], base.effects[moving])
    assert sp.issparse(adata.X)
    assert adata.X.dtype == np.float32
    assert "split" not in adata.obs
    assert np.array_equal(adata.X.toarray(), plain.X.toarray()) == (kind == "sparse_additive")


@pytest.mark.parametrize("kind", list(KINDS))
def test_unknown_setting(kind: str) -> None:
    with pytest.raises(TypeError, match=f"kind='{kind}' has no setting 'n_gene'.*n_genes.*Did you mean"):
        simulate_screen(kind, n_gene=5)


@pytest.mark.parametrize("kind", COUNTS)
def test_without_doubles(kind: str, tmp_path) -> None:
    adata = make(kind, n_doubles=0, n_controls=0)
    assert not any("+" in c for c in read_truth(adata).shifts.index)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    assert_equal(vars(read_truth(adata)), vars(read_truth(ad.read_h5ad(tmp_path / "screen.h5ad"))))
