"""The command line: ``pertvae simulate | train | predict | benchmark``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from pertvae import __version__
from pertvae._labels import hint

DEMO_SCREEN = {
    "n_genes": 300,
    "n_perturbations": 24,
    "n_doubles": 16,
    "cells_per_perturbation": 120,
    "cells_per_double": 80,
    "n_controls": 800,
    "n_latent": 10,
}
"""Sizes of the screen of ``pertvae benchmark --simulate``: a few minutes on two cores."""
_SIZES = {
    "n_genes": "genes",
    "n_perturbations": "single perturbations",
    "n_doubles": "combinations of two",
    "cells_per_perturbation": "cells of each single perturbation",
    "cells_per_double": "cells of each combination",
    "n_controls": "control cells",
    "n_latent": "latents of the truth",
}
_QUIET = ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")
_ERROR = 2
_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        Arguments; by default those of the process.

    Returns
    -------
    Exit code: 0, 1 when a model of a benchmark failed, 2 for an error of the user (one line on stderr).
    """
    arguments = _parser().parse_args(argv)
    try:
        _set_threads()
        return int(arguments.run(arguments) or 0)
    except (ValueError, KeyError, OSError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"pertvae: error: {' '.join(message.split())}", file=sys.stderr)
        return _ERROR
    except KeyboardInterrupt:
        print("pertvae: stopped.", file=sys.stderr)
        return 130


def _simulate(arguments: argparse.Namespace) -> None:
    out = _file(arguments.out)
    adata = _simulated(arguments.kind, arguments, {})
    adata.write_h5ad(out)
    print(f"Wrote {out}: {adata.n_obs:,} cells x {adata.n_vars:,} genes, simulated ({arguments.kind}).")


def _train(arguments: argparse.Namespace) -> None:
    import scvi

    from pertvae.pl import programs, training_curves

    cls = _model_class(arguments.model)
    adata = _read(arguments.screen)
    if arguments.epochs is not None and arguments.epochs < 1:
        raise ValueError(f"--max-epochs {arguments.epochs} is out of range: pass 1 or more.")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file: name a folder.")
    scvi.settings.seed = arguments.seed
    cls.setup_anndata(adata, **_registration(arguments))
    model = cls(adata)
    print(f"Training {cls.__name__} on {adata.n_obs:,} cells x {adata.n_vars:,} genes, seed {arguments.seed}.")
    with _quiet():
        model.train(max_epochs=arguments.epochs, split_key=arguments.split_key)
    model.save(str(out), overwrite=True)
    found = model.get_perturbation_programs(key_added=None)
    for name in ("effects", "inclusion", "loadings"):
        getattr(found, name).to_csv(out / f"programs_{name}.csv")
    programs(found, save=out / "programs.png")
    training_curves(model, save=out / "training.png")
    print(f"Wrote {out}: the model, programs_effects.csv, programs_inclusion.csv, programs_loadings.csv, two figures.")


def _predict(arguments: argparse.Namespace) -> None:
    out = _file(arguments.out)
    folder = Path(arguments.model_dir)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder: pass the folder that 'pertvae train --out' wrote.")
    cls = _class_of_saved(folder)
    adata = _read(arguments.screen)
    with _quiet():
        model = cls.load(str(folder), adata=adata)
        predicted = model.predict_perturbation(
            arguments.perturbations,
            n_cells=arguments.n_cells,
            output=arguments.output,
            seed=arguments.seed,
            key_added=None,
        )
    predicted.write_h5ad(out)
    print(f"Wrote {out}: {predicted.n_obs:,} cells x {predicted.n_vars:,} genes.")


def _benchmark(arguments: argparse.Namespace) -> int:
    from pertvae import benchmark

    if (arguments.screen is None) == (arguments.simulate is None):
        raise ValueError("Pass a screen (an .h5ad file) or --simulate, one of the two.")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file: name a folder.")
    models = {name: _model_class(name) for name in arguments.models}
    if arguments.simulate is not None:
        kind = arguments.simulate
        adata = _simulated(kind, arguments, DEMO_SCREEN if kind == "sparse_additive" else {})
        title = f"simulated screen ({kind})"
        arguments.perturbation_key = arguments.perturbation_key or "perturbation"
        arguments.control = arguments.control or ["control"]
        if arguments.folds is None and min(arguments.train_fraction) == 1:
            arguments.folds = 1  # of combinations all are held out at once, unless some must stay to train on
        arguments.batch_key = arguments.batch_key or ("batch" if "batch" in adata.obs else None)
    else:
        adata = _read(arguments.screen)
        title = Path(arguments.screen).name
    setup = _registration(arguments)
    for needed in ("perturbation_key", "control"):
        if setup[needed] is None:
            raise ValueError(f"--{needed.replace('_', '-')} is needed with a screen of your own.")
    with _quiet():
        result = benchmark.run(
            adata,
            models,
            arguments.scheme,
            setup.pop("perturbation_key"),
            setup.pop("control"),
            seeds=tuple(arguments.seeds),
            ensemble=arguments.ensemble,
            n_folds=arguments.folds,
            train_fraction=arguments.train_fraction,
            n_cells=arguments.n_cells,
            layer=setup.pop("layer", None),
            batch_key=setup.pop("batch_key", None),
            labels_key=setup.pop("labels_key", None),
            sep=setup.pop("sep", "+"),
            setup_kwargs=setup,
            train_kwargs={} if arguments.epochs is None else {"max_epochs": arguments.epochs},
            split_kwargs={} if arguments.seen is None else {"seen": arguments.seen},
            cache_dir=out / "cache",
            title=title,
        )
    page = result.save(out)
    print(result.text())
    print(f"\nWrote {page}, table.csv, summary.csv, comparison.csv and figures.")
    failed = result.fits[result.fits["status"] == "failed"]
    for row in failed.itertuples(index=False):
        seed = f", seed {row.seed}" if str(row.seed) != "-1" else ""
        print(f"pertvae: {row.model} (fold {row.fold}{seed}) failed: {row.error}", file=sys.stderr)
    return _FAILED if len(failed) else 0


# ------------------------------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pertvae", description="Generative models of single-cell perturbation response."
    )
    parser.add_argument("--version", action="version", version=f"pertvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="simulate | train | predict | benchmark")

    simulate = _command(commands, "simulate", _simulate, "write a simulated screen whose truth is known")
    simulate.add_argument("--kind", default="sparse_additive", help="kind of screen (default: %(default)s)")
    simulate.add_argument("--out", required=True, metavar="FILE", help=".h5ad file to write")
    _add_sizes(simulate, "the sizes of the fixed benchmark screen")

    train = _command(commands, "train", _train, "train a model and save it with its programs")
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

    predict = _command(commands, "predict", _predict, "predict the cells of perturbations with a saved model")
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

    bench = _command(commands, "benchmark", _benchmark, "score models beside the references on held-out cells")
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
        default="unseen_combination",
        choices=("random", "unseen_combination", "unseen_perturbation", "unseen_context"),
        help="what is held out (default: %(default)s)",
    )
    bench.add_argument("--seen", metavar="J/K", help="class of held-out combinations: 2/2, 1/2 or 0/2 (default: 2/2)")
    bench.add_argument("--models", nargs="+", default=["samsvae"], help="models to train (default: samsvae)")
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
    return parser


def _command(commands: Any, name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


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
    for name, text in _SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"number of {text}")
    group.add_argument(
        "--simulation-seed" if "with" in default else "--seed",
        dest="simulation_seed",
        type=int,
        default=0,
        help="seed of the simulation (default: %(default)s)",
    )


def _registration(arguments: argparse.Namespace) -> dict[str, Any]:
    control = arguments.control
    setup = {
        "perturbation_key": arguments.perturbation_key,
        "control": control[0] if control is not None and len(control) == 1 else control,
        "sep": arguments.sep,
    }
    optional = ("layer", "batch_key", "labels_key", "dosage_key")
    given = {name: getattr(arguments, name, None) for name in optional}
    return setup | {name: value for name, value in given.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------- parts


def _simulated(kind: str, arguments: argparse.Namespace, defaults: dict[str, int]) -> Any:
    from pertvae.datasets import simulate_screen

    asked = {name: getattr(arguments, name) for name in _SIZES if getattr(arguments, name) is not None}
    try:
        return simulate_screen(kind, seed=arguments.simulation_seed, **{**defaults, **asked})
    except TypeError as error:  # a size that this kind does not have
        raise ValueError(str(error)) from None


def _read(path: str) -> Any:
    import anndata

    if not Path(path).is_file():
        near = sorted(p.name for p in Path(path).parent.glob("*.h5ad")) if Path(path).parent.is_dir() else []
        raise ValueError(f"There is no file {path!r}.{hint(Path(path).name, near) if near else ''}")
    try:
        return anndata.read_h5ad(path)
    except OSError as error:
        raise ValueError(f"{path!r} is not an .h5ad file: {error}") from None


def _file(path: str) -> Path:
    out = Path(path)
    if out.is_dir():
        raise ValueError(f"--out {path!r} is a folder: name a file, such as {str(out / 'out.h5ad')!r}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _model_class(name: str) -> Any:
    import pertvae
    from pertvae.benchmark import model_names

    known = model_names()
    if name.lower() not in known:
        raise ValueError(f"There is no model {name!r}.{hint(name, known)}")
    return getattr(pertvae, known[name.lower()])


def _class_of_saved(folder: Path) -> Any:
    from scvi.model.base import BaseModelClass

    try:
        name = str(BaseModelClass.load_registry(str(folder))["model_name"])
    except (KeyError, ValueError, OSError, EOFError, RuntimeError, UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} holds no model that can be read: {error}") from None
    return _model_class(name)


def _set_threads() -> None:
    """Use as many threads as PERTVAE_NUM_THREADS says, or OMP_NUM_THREADS; without them torch chooses."""
    given = os.environ.get("PERTVAE_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    if given is None:
        return
    if not given.isdigit() or int(given) < 1:
        raise ValueError(f"PERTVAE_NUM_THREADS or OMP_NUM_THREADS is {given!r}: pass a whole number of 1 or more.")
    import torch

    torch.set_num_threads(int(given))


class _quiet(warnings.catch_warnings):
    """Silence the notices of Lightning and scvi-tools that say nothing about the data."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|torch|scvi)\b")
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered


if __name__ == "__main__":
    sys.exit(main())
