"""Training speed of a model against `scvi.model.SCVI` of equal width, in one process.

All train on the same simulated CSR counts on the CPU, whole epochs in turn, so that a busy machine slows all alike.
What is timed is the span of full training epochs (loading, step, optimiser) without validation, set-up and the first
epoch, on the wall clock and in CPU seconds.

    python benchmarks/speed.py                         SAMSVAE against SCVI
    python benchmarks/speed.py --n-particles 1 5       and with 5 posterior draws a step
    python benchmarks/speed.py --preset published      the published sizes: 100 perturbations, 100 latents, 400 hidden
    python benchmarks/speed.py --model SCVI            the harness against itself: the ratio should be 1
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
    """Cells, seconds and CPU seconds of every training epoch."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float, float]] = []
        self._begun, self._cpu, self._cells = 0.0, 0.0, 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begun, self._cpu, self._cells = time.perf_counter(), time.process_time(), 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._cells += len(batch["X"])

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append((self._cells, time.perf_counter() - self._begun, time.process_time() - self._cpu))


def make_model(name: str, n_particles: int, adata: Any, args: argparse.Namespace) -> Any:
    """Return an untrained model: one hidden layer, the same width and latent dimensions for all."""
    size = {"n_hidden": args.n_hidden, "n_layers": 1, "n_latent": args.n_latent, "gene_likelihood": "nb"}
    if name == "SCVI":
        scvi.model.SCVI.setup_anndata(adata)
        return scvi.model.SCVI(adata, **size)
    cls = getattr(pertvae, name)
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
    return cls(adata, **size, n_particles=n_particles)


def cells_per_second(name: str, n_particles: int, adata: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Train a fresh model; return the cells a second and a CPU second over all epochs but the first."""
    scvi.settings.seed = 0
    model = make_model(name, n_particles, adata, args)
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
    cells, seconds, cpu_seconds = (sum(column) for column in zip(*epochs, strict=True))
    if cells < args.cells * len(epochs):
        raise SystemExit(f"{name}: an epoch saw {epochs[0][0]} of {args.cells} cells: not a whole epoch.")
    return cells / seconds, cells / cpu_seconds


PRESETS = {
    "small": {"perturbations": 20, "n_hidden": 128, "n_latent": 20},
    "published": {"perturbations": 100, "n_hidden": 400, "n_latent": 100},
}


def arguments() -> argparse.Namespace:
    """Read the command line; a preset's sizes can be overridden one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SAMSVAE", help="class of pertvae, or SCVI")
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--n-particles", type=int, nargs="+", default=[1], help="posterior draws a step; one or more")
    parser.add_argument("--cells", type=int, default=15_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--perturbations", type=int)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--n-hidden", type=int)
    parser.add_argument("--n-latent", type=int)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs a repeat, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV (default: benchmarks/results/speed_<model>[_<preset>].csv)"
    )
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    return parser.parse_args()


def main() -> None:
    """Time the models in turn and print cells a second and their ratio."""
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for logger in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "pertvae"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    adata = simulated_screen(args.cells, args.genes, args.perturbations, args.density)
    density = adata.X.nnz / (adata.n_obs * adata.n_vars)
    print(
        f"{adata.n_obs} x {adata.n_vars} CSR, {density:.0%} non-zero, batch {args.batch_size}, {args.threads} threads"
    )

    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        # The order changes with each repeat: no model always runs on the warmer processor.
        order = [0, *args.n_particles][:: -1 if repeat % 2 else 1]
        speeds = {n: cells_per_second(args.model if n else "SCVI", n, adata.copy(), args) for n in order}
        for n in args.n_particles:
            row = {"repeat": repeat, "model": args.model, "n_particles": n}
            row |= dict(zip(("cells_per_s", "cells_per_cpu_s"), speeds[n], strict=True))
            row |= dict(zip(("scvi_cells_per_s", "scvi_cells_per_cpu_s"), speeds[0], strict=True))
            row["ratio"], row["cpu_ratio"] = (ours / theirs for ours, theirs in zip(speeds[n], speeds[0], strict=True))
            row["slowdown"] = speeds[args.n_particles[0]][1] / speeds[n][1]
            rows.append(row)
            print(
                f"repeat {repeat}: {args.model} K={n} {row['cells_per_s']:,.0f}  SCVI {row['scvi_cells_per_s']:,.0f} "
                f"cells/s  ratio {row['ratio']:.3f}  a CPU second {row['cells_per_cpu_s']:,.0f} and "
                f"{row['scvi_cells_per_cpu_s']:,.0f}"
            )

    for n in args.n_particles:
        print(f"K={n} (slowdown: CPU time against K={args.n_particles[0]})")
        for column in list(rows[0])[3:]:
            values = [row[column] for row in rows if row["n_particles"] == n]
            digits = ",.0f" if "cells" in column else ".3f"
            low, mid, high = min(values), statistics.median(values), max(values)
            print(f"{column:>21}: min {low:{digits}}  median {mid:{digits}}  max {high:{digits}}")
    names = ("cells", "genes", "perturbations", "density", "n_hidden", "n_latent", "batch_size", "epochs", "threads")
    setting = {name: getattr(args, name) for name in names}
    default = RESULTS / f"speed_{args.model.lower()}{'' if args.preset == 'small' else '_' + args.preset}.csv"
    write_results(args.out or default, [{**row, **setting} for row in rows])


if __name__ == "__main__":
    main()
