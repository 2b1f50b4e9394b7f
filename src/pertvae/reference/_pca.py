"""Leading principal components by scikit-learn, of sparse cells or of mean profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

SMALL = 500
"""Dense matrices with at most so many rows or columns are decomposed in full: exact, and quick enough."""


def principal_components(x: Any, n_components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the leading principal axes of the rows (axes x columns, orthonormal) and their singular values.

    Parameters
    ----------
    x
        Observations x variables, dense or sparse; columns are centred, a sparse matrix without being made dense.
    n_components
        Axes wanted. Fewer come back when the matrix is too small (the iteration for sparse and large matrices finds at
        most one less than rows or columns) or of a lower rank.
    seed
        Of the start of the iteration, which does not matter beyond rounding.
    """
    from sklearn.decomposition import PCA

    full = not sp.issparse(x) and min(x.shape) <= SMALL
    n = min(n_components, min(x.shape) - (0 if full else 1))
    if n < 1:
        return np.zeros((0, x.shape[1])), np.zeros(0)
    pca = PCA(n, svd_solver="full" if full else "arpack", random_state=seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # explained shares of rows that are all alike
        pca.fit(x)
    s = np.asarray(pca.singular_values_, dtype=np.float64)
    # the iteration knows singular values to the root of the machine precision
    kept = s > 1e-7 * max(float(s[0]), 1e-300)
    return np.asarray(pca.components_, dtype=np.float64)[kept], s[kept]
