"""What makes two runs the same: data, settings, code."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

import pertvae

_PACKAGES = ("pertvae", "scvi-tools", "torch", "anndata", "scanpy", "numpy", "scipy", "scikit-learn", "pandas")


def fingerprint_data(adata: AnnData, columns: Sequence[str]) -> str:
    """Return a fingerprint of counts, gene names and some obs columns."""
    digest = hashlib.blake2b(digest_size=8)
    x: Any = adata.X
    arrays = (x.indptr, x.indices, x.data) if sp.issparse(x) else (x,)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    for text in (adata.var_names, *(adata.obs[c] for c in columns)):
        digest.update(pd.util.hash_array(np.asarray(text, dtype=str).astype(object)).tobytes())
    return digest.hexdigest()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a fingerprint of settings."""
    text = json.dumps(settings, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_NOT_TRAINING = ("benchmark", "metrics", "reference", "pl", "pp", "datasets", "cli.py", "_cli.py", "_predictions.py")
_TRAINING = ("benchmark/_train.py", "benchmark/_data.py")


@cache
def fingerprint_code(training: bool = False, also: tuple[str, ...] = ()) -> str:
    """Return a fingerprint of this package's source: results of other code are not taken from a cache.

    Parameters
    ----------
    training
        Only of the code that trained models depend on, without metrics, references, figures and scoring.
    also
        Folders that count all the same.
    """
    root = Path(pertvae.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        top = name.split("/")[0]
        if training and top in _NOT_TRAINING and top not in also and name not in _TRAINING:
            continue
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
