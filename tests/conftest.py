"""Settings of every test: threads, seeds, quiet loggers, and the folder of real data."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch or numpy start their thread pools: one thread a worker unless the environment says otherwise.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    # numba fails when its variable changes after the import, and a pytest plugin may have imported it
    if not (_name == "NUMBA_NUM_THREADS" and "numba" in sys.modules):
        os.environ.setdefault(_name, os.environ.get("OMP_NUM_THREADS", "1"))
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> Iterator[None]:
    """Seed every generator a test may use, and silence Lightning and scvi-tools.

    torch and scvi-tools are touched only when something imported them, so tests that need neither stay quick.
    """
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global state
    if "torch" in sys.modules:
        threads = int(os.environ["OMP_NUM_THREADS"])
        if sys.modules["torch"].get_num_threads() != threads:
            sys.modules["torch"].set_num_threads(threads)
    if "scvi" in sys.modules:
        sys.modules["scvi"].settings.seed = 0
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real subsets: PERTVAE_DATA, or ``../shared/data`` beside the checkout; skips without it."""
    named = os.environ.get("PERTVAE_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set PERTVAE_DATA)")
    return folder
