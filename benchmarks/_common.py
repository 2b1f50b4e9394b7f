"""What the benchmark scripts share: a simulated screen of counts, and where results go."""

from __future__ import annotations

import csv
import logging
import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

RESULTS = Path(__file__).parent / "results"


def simulated_screen(
    n_cells: int, n_genes: int, n_perturbations: int = 20, density: float = 0.2, seed: int = 0
) -> ad.AnnData:
    """Return counts of the given density (CSR float32), a fifth of the cells controls; for timing, not for science.

    Genes have gamma rates, cells have log-normal sizes, counts are Poisson: many ones, few large values, as in data.
    """
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 1.0, n_genes)
    sizes = rng.lognormal(0.0, 0.4, n_cells)
    probe = rng.choice(sizes, min(n_cells, 500))
    low, high = 1e-4, 1e3
    for _ in range(60):  # scale at which the expected share of non-zeros is the density asked for
        scale = np.sqrt(low * high)
        share = 1 - np.exp(-scale * np.outer(probe, rates)).mean()
        low, high = (scale, high) if share < density else (low, scale)
    blocks = []
    for start in range(0, n_cells, 2_000):
        mean = np.outer(sizes[start : start + 2_000], rates * scale)
        blocks.append(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    names = np.array(["control", *(f"P{i}" for i in range(n_perturbations))])
    probability = np.r_[0.2, np.full(n_perturbations, 0.8 / n_perturbations)]
    labels = pd.Categorical.from_codes(rng.choice(len(names), n_cells, p=probability), categories=names)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n_cells)])
    return ad.AnnData(
        X=sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    )


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, each with the versions and the processor they were measured with."""
    where = {
        "torch": version("torch"),
        "scvi_tools": version("scvi-tools"),
        "pertvae": version("pertvae"),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in {**row, **where}.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


class ResumableTable:
    """A CSV that a study appends to fit by fit, and goes on from after a stop.

    Parameters
    ----------
    path
        The file; made with its header if absent. An unfinished last row is removed.
    columns
        All columns, ``settings`` among them.
    fit
        Columns that name a fit.
    settings
        What all fits have in common; a file with other settings is refused.
    rows_per_fit
        Rows of a finished fit of each ``kind``, a column then; fits with fewer are removed. ``None``: one row.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        fit: Sequence[str],
        settings: str,
        rows_per_fit: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self.columns, self.fit, self.settings = path, list(columns), list(fit), settings
        self.done: set[tuple] = set()
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(columns) + "\n")
            return
        text = path.read_text()
        if not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1])
        table = pd.read_csv(path)
        other = set(table["settings"]) - {settings}
        if other:
            raise SystemExit(
                f"{path} holds fits of other settings ({other.pop()}; now {settings}): pass another --out."
            )
        if rows_per_fit is not None:
            whole = table.groupby(self.fit)[self.fit[0]].transform("size") >= table["kind"].map(rows_per_fit)
            if not whole.all():
                table = table[whole]
                table.to_csv(path, index=False, lineterminator="\n")
        self.done = set(table[self.fit].itertuples(index=False, name=None))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of a fit in one write."""
        versions = " ".join(f"{p}={version(p)}" for p in ("pertvae", "scvi-tools", "torch"))
        whole = [
            {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
            | {"settings": self.settings, "versions": versions}
            for row in rows
        ]
        with self.path.open("a", newline="") as file:
            file.write(pd.DataFrame(whole)[self.columns].to_csv(header=False, index=False, lineterminator="\n"))


def quiet(threads: int) -> None:
    """Use so many threads, and keep training silent."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    for logger in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
