"""What makes two runs the same: data, settings, code."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
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
    """Return a fingerprint of settings: of arrays and tables by values, of classes and functions by their code."""
    text = json.dumps(content(settings), sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content(value: Any) -> Any:
    """Return plain values that tell one object from another, whatever it is called.

    Classes and functions of this package are known by name, because its code has a fingerprint of its own; others by
    their source too.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(k): content(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [content(v) for v in (sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (pd.DataFrame, pd.Series, pd.Index)):
        hashed = int(pd.util.hash_pandas_object(value).astype("uint64").sum())
        columns = [str(c) for c in value.columns] if isinstance(value, pd.DataFrame) else []
        return [type(value).__name__, list(value.shape), columns, hashed]
    if sp.issparse(value):
        return ["sparse", list(value.shape), content(sp.csr_matrix(value).toarray())]
    if isinstance(value, np.generic):
        return content(value.item())
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return content(value.tolist())
        return [str(value.dtype), list(value.shape), hashlib.blake2b(np.ascontiguousarray(value).data).hexdigest()]
    if isinstance(value, partial):
        return [content(value.func), content(value.args), content(value.keywords)]
    if isinstance(value, type) or inspect.isroutine(value):
        return _code(value)
    return [_name(type(value)), repr(value)]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"


def _code(value: Any) -> Any:
    """Return the name of a class or function, and its source or byte code when it is not of this package."""
    if str(getattr(value, "__module__", "")).split(".")[0] == "pertvae":
        return _name(value)
    if hasattr(value, "__code__"):
        captured = [content(cell.cell_contents) for cell in value.__closure__ or ()]
        return [_name(value), _byte_code(value.__code__), captured, content(value.__defaults__)]
    try:
        return [_name(value), inspect.getsource(value)]
    except (OSError, TypeError):  # typed into a session, or built in
        functions = [f for f in getattr(value, "__dict__", {}).values() if hasattr(f, "__code__")]
        return [_name(value), [_code(f) for f in functions]]


def _byte_code(code: CodeType) -> list[Any]:
    """Return what a function does; two functions on one line have the same source."""
    constants = [_byte_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


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
        Folders and files that count all the same.
    """
    root = Path(pertvae.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        top = name.split("/")[0]
        if training and top in _NOT_TRAINING and not {top, name} & {*also, *_TRAINING}:
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
