"""Time of the negative binomial's value and gradient against scvi-tools' on the same means and counts.

Both run in one process in turn: the log-probability of a minibatch summed over genes, its mean over cells, and the
gradients of means and gene-wise dispersions. `softmax` starts from logits instead of means, as a training step does;
`csr` reads sparse counts; `accelerator` is the way that never looks at counts, run here on the CPU for its number of
operations only.

    python benchmarks/nb.py                      512 x 2,000, 20% non-zero, 1 and 5 particles
    python benchmarks/nb.py --genes 5000 --density 0.07
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import RESULTS, simulated_screen, write_results
from scvi.distributions import NegativeBinomial
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pertvae.nn import nb_log_prob
from pertvae.nn._negative_binomial import softmax_nb_log_prob

FLOOR = 1e-4


class OperationCounter(TorchDispatchMode):
    """Counts operations that do work: on an accelerator each is a kernel launch or more."""

    VIEWS = ("view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "detach", "alias", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


def scvi_nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return scvi-tools' log-probability summed over genes."""
    return NegativeBinomial(mu=mu, theta=theta).log_prob(x).sum(-1)


def run(function: Callable[[Tensor, Tensor], Tensor], means: Tensor, theta: Tensor) -> tuple[float, list[Tensor]]:
    """Return the seconds of value and gradients, and the numbers."""
    means, theta = means.clone().requires_grad_(), theta.clone().requires_grad_()
    begun = time.perf_counter()
    value = function(means, theta)
    value.mean().backward()
    seconds = time.perf_counter() - begun
    return seconds, [value.detach(), means.grad, theta.grad]  # type: ignore[list-item]


def main() -> None:
    """Time, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=512)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--n-particles", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="CSV (default: benchmarks/results/nb[_<sizes>].csv)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse CSR")

    torch.manual_seed(0)
    x = torch.from_numpy(simulated_screen(args.cells, args.genes, density=args.density).X.toarray())
    csr, library = x.to_sparse_csr(), x.sum(1, keepdim=True)
    theta = torch.exp(torch.randn(args.genes))
    rows = []
    for n in args.n_particles:
        logits = torch.randn(n, args.cells, args.genes).squeeze(0)
        mu = library * torch.softmax(logits, -1) + FLOOR

        def from_logits(o: Tensor, t: Tensor) -> Tensor:
            return scvi_nb(x, library * torch.softmax(o, -1) + FLOOR, t)

        # name: (ours, scvi-tools', what both start from)
        pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
            "dense": (lambda m, t: nb_log_prob(x, m, t), lambda m, t: scvi_nb(x, m, t), mu),
            "csr": (lambda m, t: nb_log_prob(csr, m, t), lambda m, t: scvi_nb(x, m, t), mu),
            "softmax": (lambda o, t: softmax_nb_log_prob(x, o, library, t, floor=FLOOR), from_logits, logits),
            "accelerator": (
                lambda o, t: softmax_nb_log_prob(x, o, library, t, floor=FLOOR, look=False),
                from_logits,
                logits,
            ),
        }
        for name, (ours, theirs, means) in pairs.items():
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for repeat in range(args.repeats + 2):
                for key in ("ours", "theirs")[:: -1 if repeat % 2 else 1]:
                    seconds = run(ours if key == "ours" else theirs, means, theta)[0]
                    if repeat > 1:
                        times[key].append(1e3 * seconds)
            values = [run(f, means, theta)[1] for f in (ours, theirs)]
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*values, strict=True))
            operations = []
            for function in (ours, theirs):
                with OperationCounter() as counter:
                    run(function, means, theta)
                operations.append(counter.n)
            mine, scvis = (statistics.median(times[key]) for key in ("ours", "theirs"))
            print(
                f"K={n} {name:>11}: {mine:6.1f} ms  scvi-tools {scvis:6.1f} ms  ratio {scvis / mine:5.2f}  "
                f"largest relative difference {worst:.0e}  operations {operations[0]} and {operations[1]}"
            )
            rows.append(
                {"n_particles": n, "input": name, "ms": mine, "scvi_ms": scvis, "ratio": scvis / mine}
                | {"relative_difference": f"{worst:.1e}", "operations": operations[0], "scvi_operations": operations[1]}
                | {k: getattr(args, k) for k in ("cells", "genes", "density", "repeats", "threads")}
            )
    standard = all(getattr(args, k) == parser.get_default(k) for k in ("cells", "genes", "density"))
    name = "nb.csv" if standard else f"nb_{args.cells}x{args.genes}_{args.density:g}.csv"
    write_results(args.out or RESULTS / name, rows)


if __name__ == "__main__":
    main()
