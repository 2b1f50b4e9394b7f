"""What one method predicted for one fold, and how it is kept on disk."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

FORMAT = 1


@dataclass
class Prediction:
    """What one method predicted for one fold.

    Parameters
    ----------
    scores
        Columns ``unit``, ``metric``, ``value``, ``lower``, ``upper``; the unit ``pooled`` stands for all together.
    shift
        Predicted shift from control (log1p CP10k), units (conditions, in a context where there is one) x scoring
        genes; empty for the technical duplicate.
    seconds
        Wall time by step, seconds.
    tables
        Optional tables by name: ``history:<loss>``, ``programs:effects``, ``draws:<metric>`` (units x resamplings of
        the held-out cells) and so on.
    status
        ``"ok"`` or ``"failed"``.
    error
        What went wrong, one line; empty when nothing did.
    cached
        Whether it was read from disk.
    """

    scores: pd.DataFrame
    shift: pd.DataFrame = field(default_factory=pd.DataFrame)
    seconds: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    status: str = "ok"
    error: str = ""
    cached: bool = False

    @classmethod
    def failed(cls, error: str) -> Prediction:
        """Return the record of a method that failed."""
        scores = pd.DataFrame(columns=["unit", "metric", "value", "lower", "upper"])
        return cls(scores, status="failed", error=" ".join(error.split()))

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """Losses by name, each a table indexed by epoch; empty for references."""
        return self._group("history:")

    @property
    def programs(self) -> dict[str, pd.DataFrame]:
        """``effects``, ``inclusion`` and ``loadings``; empty when the method has none."""
        return self._group("programs:")

    @property
    def draws(self) -> dict[str, pd.DataFrame]:
        """Scores with the held-out cells resampled, by metric: units x resamplings."""
        return self._group("draws:")

    def _group(self, prefix: str) -> dict[str, pd.DataFrame]:
        return {name.removeprefix(prefix): t for name, t in self.tables.items() if name.startswith(prefix)}

    def write(self, path: Path) -> None:
        """Write to one ``.npz`` file at once: a killed run leaves either the whole file or none."""
        arrays: dict[str, Any] = {}
        frames: dict[str, Any] = {}
        for name, table in {"shift": self.shift, **self.tables}.items():
            arrays[f"array{len(frames)}"] = table.to_numpy(dtype=np.float64)
            frames[name] = {"index": _listed(table.index), "columns": _listed(table.columns)}
        meta = {
            "format": FORMAT,
            "frames": frames,
            "scores": self.scores.to_dict("list"),
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with open(partial, "wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Prediction | None:
        """Return what :meth:`write` wrote, or ``None`` when the file is absent, damaged or of another format."""
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                if meta["format"] != FORMAT:
                    return None
                tables = {
                    name: pd.DataFrame(file[f"array{i}"], index=frame["index"], columns=frame["columns"])
                    for i, (name, frame) in enumerate(meta["frames"].items())
                }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        shift = tables.pop("shift")
        return cls(pd.DataFrame(meta["scores"]), shift, meta["seconds"], tables, cached=True)


def _listed(index: pd.Index) -> list[Any]:
    return [v.item() if isinstance(v, np.generic) else v for v in index]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
