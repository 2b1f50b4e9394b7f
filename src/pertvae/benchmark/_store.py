"""Trained models on disk: a run that is stopped, or scored in another way, trains nothing twice.

Model files are pickles, as in scvi-tools: a cache is for whoever wrote it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anndata import AnnData

from pertvae.benchmark._train import silent

_DONE = "fit.json"


@dataclass(frozen=True)
class FitStore:
    """Folder of trained models, one folder each.

    Parameters
    ----------
    folder
        Where they are; ``None`` keeps nothing.
    """

    folder: Path | None

    def read(self, name: str, cls: Any, adata: AnnData) -> tuple[Any, float] | None:
        """Return a model that was kept and the seconds its training took; ``None`` without one that can be read."""
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            seconds = float(json.loads((path / _DONE).read_text())["seconds"])
            with silent():
                return cls.load(str(path), adata=adata), seconds
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def read_pickle(self, name: str) -> tuple[Any, float] | None:
        """Return a fitted reference that was kept and the seconds of its fit; ``None`` without one that can be read."""
        if self.folder is None:
            return None
        try:
            found = pickle.loads((self.folder / f"{name}.pickle").read_bytes())
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError):
            return None
        return found["reference"], found["seconds"]

    def write_pickle(self, name: str, reference: Any, seconds: float) -> None:
        """Keep a fitted reference."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.{os.getpid()}.part"
        partial.write_bytes(pickle.dumps({"reference": reference, "seconds": seconds}))
        os.replace(partial, self.folder / f"{name}.pickle")

    def write(self, name: str, model: Any, seconds: float) -> None:
        """Keep a model, where it can be saved. The last file says that the folder is whole."""
        if self.folder is None or not (hasattr(model, "save") and hasattr(type(model), "load")):
            return
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        with silent():
            model.save(str(path))
        partial = path / f"{_DONE}.part"
        partial.write_text(json.dumps({"seconds": seconds}))
        os.replace(partial, path / _DONE)
