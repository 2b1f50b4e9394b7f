"""The command line: ``pertvae simulate | train | predict | benchmark``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from pertvae._cli import SIZES, parser
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


def _parser() -> argparse.ArgumentParser:
    return parser({"simulate": _simulate, "train": _train, "predict": _predict, "benchmark": _benchmark})


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
            arguments.scheme if len(arguments.scheme) > 1 else arguments.scheme[0],
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
            references=arguments.references,
            split_kwargs=_split(arguments),
            external=_external(arguments.external),
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


def _split(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return options of the split that were given; one class of combinations as text."""
    seen = arguments.seen[0] if arguments.seen and len(arguments.seen) == 1 else arguments.seen
    return {k: v for k, v in (("seen", seen), ("held_out", arguments.held_out)) if v is not None}


def _external(given: Sequence[str]) -> dict[str, str]:
    """Return files by name from ``NAME=FILE``."""
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--external {text!r} is not NAME=FILE, such as gears=gears.h5ad.")
        found[name] = path
    return found


def _simulated(kind: str, arguments: argparse.Namespace, defaults: dict[str, int]) -> Any:
    from pertvae.datasets import simulate_screen

    asked = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
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
