"""One trained model a class, shared by the tests that only read it."""

from __future__ import annotations

import pytest

from ._models import CASES
from ._screens import fit, screen

COVARIATES = {"batch_key": "batch", "labels_key": "cell_type"}


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def case(request):
    """Every model class in turn."""
    return request.param


@pytest.fixture(scope="session")
def trained(case):
    """A model with batches and contexts, trained for two epochs. Tests must not change its data's labels."""
    return fit(case, screen(), COVARIATES)


@pytest.fixture(autouse=True)
def _clean(request):
    """Forget what an earlier test wrote to the shared data."""
    yield
    if "trained" in request.fixturenames:
        adata = request.getfixturevalue("trained").adata
        for key in [k for k in adata.obsm if not k.startswith("_scvi")]:
            del adata.obsm[key]
        for key in [k for k in adata.uns if not k.startswith("_scvi")]:
            del adata.uns[key]
