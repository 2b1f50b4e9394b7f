"""Training speed of a model against `scvi.model.SCVI` of equal width, in one process.

Both train on the same simulated CSR counts on the CPU, whole epochs in turn, so that a busy machine slows both. What is
timed is the span of full training epochs (loading, step, optimiser) without validation, set-up and the first epoch.

    python benchmarks/speed.py                     SAMSVAE against SCVI
    python benchmarks/speed.py --model SCVI        the harness against itself: the ratio should be 1
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scvi
import torch
from _common import RESULTS, simulated_screen, write_results
from lightning.pytorch.callbacks import Callback

import pertvae


class EpochTimer(Callback):
    """Cells and seconds of every training epoch."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float]] = []
        self._begun, self._cells = 0.0, 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begun, self._cells = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._cells += len(batch["X"])

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append((self._cells, time.perf_counter() - self._begun))


def make_model(name: str, adata: Any, args: argparse.Namespace) -> Any:
    """Return an untrained model: one hidden layer, the same width and latent dimensions for all."""
    size = {"n_hidden": args.n_hidden, "n_layers": 1, "n_latent": args.n_latent, "gene_likelihood": "nb"}
    if name == "SCVI":
        scvi.model.SCVI.setup_anndata(adata)
        return scvi.model.SCVI(adata, **size)
    cls = getattr(pertvae, name)
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
    return cls(adata, **size, n_particles=1)


def cells_per_second(name: str, adata: Any, args: argparse.Namespace) -> float:
    """Train a fresh model; return the cells a second over all epochs but the first."""
    scvi.settings.seed = 0
    model = make_model(name, adata, args)
    timer = EpochTimer()
    model.train(
        max_epochs=args.epochs + 1,
        batch_size=args.batch_size,
        train_size=1.0,
        accelerator="cpu",
        early_stopping=False,
        enable_progress_bar=False,
        callbacks=[timer],
    )
    epochs = timer.epochs[1:]
    if any(cells < args.cells for cells, _ in epochs):
        raise SystemExit(f"{name}: an epoch saw {epochs[0][0]} of {args.cells} cells: not a whole epoch.")
    return sum(cells for cells, _ in epochs) / sum(seconds for _, seconds in epochs)


def main() -> None:
    """Time the models in turn and print cells a second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SAMSVAE", help="class of pertvae, or SCVI")
    parser.add_argument("--cells", type=int, default=15_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--perturbations", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--n-hidden", type=int, default=128)
    parser.add_argument("--n-latent", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs a repeat, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="CSV (default: benchmarks/results/speed_<model>.csv)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for logger in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "pertvae"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    adata = simulated_screen(args.cells, args.genes, args.perturbations, args.density)
    density = adata.X.nnz / (adata.n_obs * adata.n_vars)
    print(
        f"{adata.n_obs} x {adata.n_vars} CSR, {density:.0%} non-zero, batch {args.batch_size}, {args.threads} threads"
    )

    rows = []
    for repeat in range(args.repeats):
        # The order changes with each repeat: neither model always runs on the warmer processor.
        order = [args.model, "reference"] if repeat % 2 else ["reference", args.model]
        speeds = {name: cells_per_second("SCVI" if name == "reference" else name, adata.copy(), args) for name in order}
        ours, theirs = speeds[args.model], speeds["reference"]
        rows.append({"repeat": repeat, "model": args.model, "cells_per_s": ours, "scvi_cells_per_s": theirs})
        rows[-1]["ratio"] = ours / theirs
        print(f"repeat {repeat}: {args.model} {ours:,.0f}  SCVI {theirs:,.0f} cells/s  ratio {ours / theirs:.3f}")

    for column in ("cells_per_s", "scvi_cells_per_s", "ratio"):
        values = [row[column] for row in rows]
        digits = ".3f" if column == "ratio" else ",.0f"
        low, mid, high = min(values), statistics.median(values), max(values)
        print(f"{column:>17}: min {low:{digits}}  median {mid:{digits}}  max {high:{digits}}")
    setting = {
        k: getattr(args, k)
        for k in ("cells", "genes", "density", "n_hidden", "n_latent", "batch_size", "epochs", "threads")
    }
    write_results(args.out or RESULTS / f"speed_{args.model.lower()}.csv", [{**row, **setting} for row in rows])


if __name__ == "__main__":
    main()
