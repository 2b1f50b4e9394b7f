"""Peak memory of a whole analysis on 100,000 x 2,000 CSR cells, against the matrix plus 1.5 GB.

A process of its own reads the file, registers, trains, encodes every cell and predicts; its peak resident memory is
what the operating system reports at the end (imports and libraries included).

    python benchmarks/memory.py
    python benchmarks/memory.py --model SCVI       scvi-tools on the same data, for comparison
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

ALLOWANCE_GB = 1.5


def peak_gb() -> float:
    """Peak resident memory of this process so far, in GB (10^9 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage of Linux also knows the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def analyse(path: str, name: str, epochs: int) -> dict[str, float]:
    """Run the analysis and return the peak after each stage, in GB."""
    import anndata
    import scvi

    import pertvae

    warnings.filterwarnings("ignore")
    peaks = {"imports_gb": peak_gb()}
    adata = anndata.read_h5ad(path)
    peaks["read_gb"] = peak_gb()
    model: Any
    if name == "SCVI":
        scvi.model.SCVI.setup_anndata(adata)
        model = scvi.model.SCVI(adata)
    else:
        cls = getattr(pertvae, name)
        cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = cls(adata)
    peaks["setup_gb"] = peak_gb()
    model.train(max_epochs=epochs, batch_size=512, accelerator="cpu", enable_progress_bar=False)
    peaks["train_gb"] = peak_gb()
    model.get_latent_representation()
    peaks["latent_gb"] = peak_gb()
    if name != "SCVI":
        model.get_perturbation_programs()
        model.predict_perturbation(["P0", "P1", "P0+P1"])
        peaks["predict_gb"] = peak_gb()
    return peaks


def main() -> None:
    """Simulate in this process, analyse in another, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SAMSVAE", help="class of pertvae, or SCVI")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=8, help="enough for all phases of SAMSVAE")
    parser.add_argument("--out", type=Path, default=None, help="CSV (default: benchmarks/results/memory_<model>.csv)")
    parser.add_argument("--analyse", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.analyse:
        print(json.dumps(analyse(args.analyse, args.model, args.epochs)))
        return

    from _common import RESULTS, simulated_screen, write_results

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "screen.h5ad"
        adata = simulated_screen(args.cells, args.genes, density=args.density)
        matrix = (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1e9
        adata.write_h5ad(path)
        del adata
        begun = time.perf_counter()
        command = [sys.executable, __file__, "--analyse", str(path), "--model", args.model]
        child = subprocess.run([*command, "--epochs", str(args.epochs)], stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - begun
    peaks = json.loads(child.stdout.splitlines()[-1])
    peak, limit = max(peaks.values()), matrix + ALLOWANCE_GB
    print(f"{args.model}: {args.cells} x {args.genes} CSR, matrix {matrix:.2f} GB, {seconds:.0f} s")
    print("peak after each stage: " + ", ".join(f"{k.removesuffix('_gb')} {v:.2f}" for k, v in peaks.items()) + " GB")
    verdict = "within" if peak <= limit else "ABOVE"
    print(f"peak {peak:.2f} GB, {verdict} matrix + {ALLOWANCE_GB} GB = {limit:.2f} GB")
    row = {"model": args.model, "cells": args.cells, "genes": args.genes, "density": args.density, "matrix_gb": matrix}
    write_results(
        args.out or RESULTS / f"memory_{args.model.lower()}.csv",
        [{**row, **peaks, "peak_gb": peak, "limit_gb": limit, "within": peak <= limit}],
    )
    if peak > limit:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
