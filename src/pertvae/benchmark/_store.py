"""Trained models on disk: a run that is stopped, or scored in another way, trains nothing twice."""

from __future__ import annotations

import json
import os
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
