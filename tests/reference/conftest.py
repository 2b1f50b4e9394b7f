import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp


def make_screen(seed=0, n_genes=60, cells=None, theta=4.0, silent=4):
    """Counts with planted log fold changes; the last genes are silent unless perturbed by "A"."""
    rng = np.random.default_rng(seed)
    if cells is None:
        cells = {"ctrl": 150, "A+ctrl": 80, "B": 60, "C": 60, "D": 40, "B+A": 50, "A+C": 40, "B+D": 40, "C+E": 40}
    base = rng.normal(0, 1, n_genes)
    base[-silent:] = -np.inf
    effect = {c: rng.normal(0, 0.6, n_genes) * (rng.random(n_genes) < 0.4) for c in "ABCDE"}
    x, labels = [], np.repeat(list(cells), list(cells.values()))
    for label in labels:
        rate = np.exp(base + sum(effect[c] for c in label.split("+") if c != "ctrl"))
        rate[-silent:] = 0.7 if "A" in label.split("+") else 0.0
        mean = rate / rate.sum() * rng.lognormal(np.log(600), 0.4)
        x.append(rng.poisson(mean * rng.gamma(theta, 1 / theta, n_genes)))
    adata = ad.AnnData(
        sp.csr_matrix(np.array(x, dtype=np.float32)),
        obs=pd.DataFrame(
            {"perturbation": labels, "batch": rng.choice(["b1", "b2"], len(labels))},
            index=[f"cell{i}" for i in range(len(labels))],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes - 1)] + ["HLA-A/B"]),
    )
    return adata[rng.permutation(adata.n_obs)].copy()


@pytest.fixture(scope="session")
def _screen():
    return make_screen()


@pytest.fixture
def screen(_screen):
    return _screen.copy()
