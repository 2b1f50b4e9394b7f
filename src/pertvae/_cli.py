"""Arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from pertvae import __version__

SIZES = {
    "n_genes": "genes",
    "n_perturbations": "single perturbations",
    "n_doubles": "combinations of two",
    "cells_per_perturbation": "cells of each single perturbation",
    "cells_per_double": "cells of each combination",
    "n_controls": "control cells",
    "n_latent": "latents of the truth",
}


def parser(commands: Mapping[str, Callable[..., Any]]) -> argparse.ArgumentParser:
    """Return the parser; each command is run by the function of its name."""
    made = argparse.ArgumentParser(
        prog="pertvae", description="Generative models of single-cell perturbation response."
    )
    made.add_argument("--version", action="version", version=f"pertvae {__version__}")
    below = made.add_subparsers(required=True, metavar="simulate | train | predict | benchmark")

    simulate = _command(below, commands, "simulate", "write a simulated screen whose truth is known")
    simulate.add_argument("--kind", default="sparse_additive", help="kind of screen (default: %(default)s)")
    simulate.add_argument("--out", required=True, metavar="FILE", help=".h5ad file to write")
    _add_sizes(simulate, "the sizes of the fixed benchmark screen")

    train = _command(below, commands, "train", "train a model and save it with its programs")
    train.add_argument("screen", help="AnnData file (.h5ad) with raw counts in X or --layer")
    train.add_argument("--model", default="samsvae", help="model to train (default: %(default)s)")
    _add_registration(train, required=True)
    train.add_argument(
        "--split-key", metavar="COLUMN", help="obs column with train, valid, test (default: train on all)"
    )
    _add_epochs(train)
    train.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    train.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for the model, program tables and figures"
    )

    predict = _command(below, commands, "predict", "predict the cells of perturbations with a saved model")
    predict.add_argument("model_dir", help="folder that 'pertvae train --out' wrote")
    predict.add_argument("screen", help="AnnData file (.h5ad) whose control cells the prediction starts from")
    predict.add_argument(
        "--perturbations", nargs="+", required=True, metavar="LABEL", help="labels, such as KLF1+MAP2K6"
    )
    predict.add_argument("--out", required=True, metavar="FILE", help=".h5ad file to write")
    predict.add_argument(
        "--n-cells", type=int, help="cells a perturbation (default: as many as control cells, at most 500)"
    )
    predict.add_argument(
        "--output",
        choices=("counts", "mean"),
        default="counts",
        help="X holds sampled counts, or expected counts (default: %(default)s)",
    )
    predict.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")

    bench = _command(below, commands, "benchmark", "score models beside the references on held-out cells")
    bench.add_argument("screen", nargs="?", help="AnnData file (.h5ad) with raw counts in X or --layer")
    bench.add_argument(
        "--simulate",
        nargs="?",
        const="sparse_additive",
        metavar="KIND",
        help="use a simulated screen instead of a file (default kind: sparse_additive, in a small size)",
    )
    _add_registration(bench, required=False)
    bench.add_argument(
        "--scheme",
        nargs="+",
        default=["unseen_combination"],
        choices=("random", "unseen_combination", "unseen_perturbation", "unseen_context"),
        help="what is held out, or several (default: unseen_combination)",
    )
    bench.add_argument(
        "--seen",
        nargs="+",
        metavar="J/K",
        help="class of held-out combinations, 2/2, 1/2 or 0/2: how many components stand alone in training; several "
        "are schemes of their own (default: 2/2)",
    )
    bench.add_argument(
        "--held-out",
        nargs="+",
        metavar="NAME",
        help="what to hold out instead of a choice by the scheme: combinations, perturbations or contexts; with "
        "--folds N in turn, in N parts",
    )
    bench.add_argument(
        "--references",
        nargs="+",
        metavar="NAME",
        help="references beside the models (default: all of pertvae.reference)",
    )
    bench.add_argument(
        "--external",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="predictions of other tools: .h5ad files with predicted counts in X, in which {fold} stands for the "
        "number of the fold; splits.csv says what they may be trained on",
    )
    bench.add_argument(
        "--models", nargs="*", default=["samsvae"], help="models to train; none: only references (default: samsvae)"
    )
    bench.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    bench.add_argument(
        "--ensemble", action="store_true", help="also score the fits of all seeds of a model as one (default: no)"
    )
    bench.add_argument(
        "--folds",
        type=int,
        help="folds; 1 holds out all combinations at once (default: combinations in turn in at most 4; 1 with "
        "--simulate and for the other schemes)",
    )
    bench.add_argument(
        "--train-fraction",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="F",
        help="fractions of the training combinations, such as 0 0.25 0.5 0.75 1 (default: 1)",
    )
    bench.add_argument("--n-cells", type=int, default=2000, help="cells predicted a condition (default: %(default)s)")
    _add_epochs(bench)
    bench.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for report.html, table.csv, figures and the cache from which a rerun resumes",
    )
    _add_sizes(bench, "a small screen, with --simulate")
    return made


def _command(below: Any, commands: Mapping[str, Callable[..., Any]], name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = below.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    made.set_defaults(run=commands[name])
    return made


def _add_registration(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("the screen")
    group.add_argument("--perturbation-key", required=required, metavar="COLUMN", help="obs column of the labels")
    group.add_argument("--control", nargs="+", required=required, metavar="LABEL", help="control label or labels")
    group.add_argument("--sep", default="+", help="between the components of a label (default: %(default)s)")
    group.add_argument("--layer", help="layer with the raw counts (default: X)")
    group.add_argument("--batch-key", metavar="COLUMN", help="obs column of the technical batch")
    group.add_argument("--labels-key", metavar="COLUMN", help="obs column of the cell type or context")
    if required:  # a benchmark compares cells of one label, whatever their dose
        group.add_argument("--dosage-key", metavar="COLUMN", help="obs column of the dose, 1.0 or 1.0+0.5 (default: 1)")


def _add_epochs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-epochs", dest="epochs", type=int, help="passes over the training cells (default: chosen by the model)"
    )


def _add_sizes(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("the simulated screen", f"Default: {default}.")
    for name, text in SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"number of {text}")
    group.add_argument(
        "--simulation-seed" if "with" in default else "--seed",
        dest="simulation_seed",
        type=int,
        default=0,
        help="seed of the simulation (default: %(default)s)",
    )
