"""Models, references, folds and seeds: one call that runs them all."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData
from tqdm.auto import tqdm

from pertvae.benchmark._arguments import (
    check_ensemble,
    read_data,
    read_fractions,
    read_models,
    read_references,
    read_seeds,
    registered_columns,
)
from pertvae.benchmark._duplicate import DUPLICATE, INTERPOLATED, ORACLE
from pertvae.benchmark._external import read_external
from pertvae.benchmark._fingerprint import fingerprint_data, versions
from pertvae.benchmark._folds import COMBINATION, DEFAULT_SEEN, make_folds, schemes_of
from pertvae.benchmark._intervals import MIN_CONDITIONS
from pertvae.benchmark._job import Job
from pertvae.benchmark._result import BenchmarkResult
from pertvae.datasets._truth import is_simulated, read_truth
from pertvae.metrics._registry import resolve


def run(
    adata: AnnData,
    models: str | type | Sequence[str | type] | Mapping[str, Any],
    scheme: str | Sequence[str],
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    ensemble: bool = False,
    n_folds: int | None = None,
    train_fraction: float | Sequence[float] = 1.0,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    sep: str | None = "+",
    references: Sequence[Any] | Mapping[str, Any] | None = None,
    metrics: str | Sequence[str] | None = None,
    n_cells: int = 2000,
    model_kwargs: Mapping[str, Any] | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    setup_kwargs: Mapping[str, Any] | None = None,
    split_kwargs: Mapping[str, Any] | None = None,
    external: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    title: str = "",
) -> BenchmarkResult:
    """Train models and fit references on the same cells, and score all of them on the same held-out cells.

    The held-out cells touch nothing but the scores: scored genes are those detected in more than 2% of the training
    cells, at most the 1,000 with the highest mean there; models set every statistic from training cells and hold out
    their own validation cells among them; predictions start from training controls, observed shifts are measured
    against held-out controls. Sums for log1p CP10k run over all genes of ``adata``.

    Parameters
    ----------
    adata
        Raw counts in ``X`` or ``layer``. A simulated screen carries its truth in ``uns["truth"]``, which adds a row
        ``oracle``. Nothing is written to it.
    models
        A model class or its name (``"samsvae"``), several, or a mapping from names of your choice to classes. Empty:
        only references.
    scheme
        What is held out, or several schemes: ``"random"``, ``"unseen_combination"``, ``"unseen_perturbation"``,
        ``"unseen_context"``; see :func:`pertvae.pp.split_perturbations`.
    perturbation_key
        obs column of the labels.
    control
        Control label or labels.
    seeds
        Training seeds; each model is trained once a seed and fold.
    ensemble
        Also score each model's fits of all seeds as one, as a further model ``"<name> ensemble"`` without a seed: the
        cells of a condition come from the fits in equal parts, see :func:`pertvae.predict_ensemble`. Nothing is
        trained for it.
    n_folds
        Number of folds. By default combinations are left out in turn in at most four folds (``n_folds=1``: all at
        once), and the other schemes have one. Held-out combinations are those whose components all stand alone
        in the data, unless ``split_kwargs`` has another ``seen``. With ``split_kwargs={"held_out": [...]}`` its items
        are held out in turn, in ``n_folds`` parts.
    train_fraction
        Fraction f of the training combinations that is used, or several for a curve of data efficiency (SAMS-VAE, arXiv
        2311.02794). Training combinations are shuffled by the seed of the split and the first int(f n) stay; the cells
        of the others are in no split, singles and controls stay whole. Smaller fractions lie within larger ones, and
        the held-out cells, the genes scored and the centre of ``pearson_delta_perturbed`` are the same for all (the
        last two come from the cells that train at every fraction). Summaries tell fractions apart; comparisons and
        most of the report are those of the largest.
    layer
        Layer of the counts; ``None`` for ``X``.
    batch_key, labels_key
        obs columns of the technical batch, and of the cell type or context. With more than one context every
        condition is predicted and scored in each, from controls of that context.
    sep
        Separator of components; ``None`` when every label is one perturbation.
    references
        Names or classes from :mod:`pertvae.reference`, by default all, or a mapping from names of your choice to
        classes or functions that make one: ``{"AdditivePCA": functools.partial(pv.reference.Additive, space="pca")}``.
    metrics
        Names, see :func:`pertvae.metrics.list_metrics`; by default all that the data allow.
    n_cells
        Cells predicted a condition. Fewer add sampling noise to means.
    model_kwargs, train_kwargs
        For the constructor and for ``train`` of every model; the value of a key that is a model's name holds only for
        that model.
    setup_kwargs
        Further arguments of ``setup_anndata``, such as ``categorical_covariate_keys``. Doses are not compared: held-out
        cells of one label count as one condition.
    split_kwargs
        For :func:`pertvae.pp.split_perturbations`: ``seen``, ``held_out``, ``test_fraction``, ``seed``, ... Several
        classes of combinations, ``"seen": ["2/2", "1/2"]``, are benchmarked as schemes of their own, called
        ``"unseen_combination 1/2"`` and so on.
    external
        Predictions of outside tools: name to AnnData, or to the path of an h5ad file, in which ``{fold}`` stands for
        the number of the fold. Predicted counts in ``X`` (or log1p CP10k with ``uns["log1p"]``, whose means are scored
        without metrics of cells), all genes of the screen, ``obs[perturbation_key]`` (and ``obs[labels_key]``) with
        every held-out condition. Control cells in it are what its shifts are measured against; without any the
        training controls are. They are scored like models. What they were trained on can not
        be checked: train them on the cells that ``result.splits`` calls ``train``.
    cache_dir
        Folder where every finished fit is kept, so that a run that was stopped resumes: scores, and trained models in
        ``models/``. Results of other data, settings or code are not taken from it; with other metrics trained models
        are used again. Kept models are pickles: use a folder that you wrote yourself.
    progress
        Show a progress bar.
    title
        What the report calls the data.

    Returns
    -------
    BenchmarkResult with the tidy ``table``, ``summary()``, ``compare()``, ``report(path)`` and ``save(dir)``. A method
    that failed has ``status="failed"`` and its error there; the others go on.

    Raises
    ------
    KeyError
        If a column or layer is missing.
    ValueError
        If a model, reference, metric or scheme is unknown, counts are negative, or nothing can be held out.

    Examples
    --------
    >>> adata = pv.datasets.example()
    >>> result = pv.benchmark.run(adata, "samsvae", "unseen_combination", "perturbation", "control", seeds=[0])
    >>> result.summary()
    >>> result.report("report.html")
    """
    chosen = read_models(models)
    fixed = read_references(references)
    scored = resolve(metrics)
    seeds = read_seeds(seeds)
    fractions = read_fractions(train_fraction)
    if (setup_kwargs or {}).get("dosage_key") is not None:
        raise ValueError(
            f"dosage_key={(setup_kwargs or {})['dosage_key']!r} can not be benchmarked: cells of one label would be "
            "compared at different doses. Write the dose into the label, or leave dosage_key out."
        )
    if n_cells < 2:
        raise ValueError(f"n_cells={n_cells!r} is out of range: pass 2 or more.")
    if ensemble:
        check_ensemble(chosen, seeds, n_cells)
    data = read_data(adata, perturbation_key, control, layer, batch_key, labels_key, sep, n_cells, setup_kwargs or {})
    truth = read_truth(adata) if is_simulated(adata) and data.context_key is None else None
    schemes = schemes_of(scheme, split_kwargs)
    folds = {
        name: make_folds(
            data.adata,
            one,
            name=name,
            perturbation_key=perturbation_key,
            control=data.control,
            sep=sep,
            labels_key=data.context_key,
            n_folds=n_folds,
            train_fractions=fractions,
            split_kwargs=options,
        )
        for name, (one, options) in schemes.items()
    }
    joining = read_external(external, [*chosen, *fixed, DUPLICATE, INTERPOLATED, ORACLE])
    every_fold = [f for of_scheme in folds.values() for f in of_scheme]
    for one in joining.values():
        for fold in every_fold:
            one.path(fold.index)
        if len(every_fold) > 1 and not one.of_fold:
            warnings.warn(
                f"external {one.name!r} is one prediction for {len(every_fold)} folds: it must not have been trained "
                "on a cell that any of them holds out. Otherwise pass a file for each fold, {fold} in its name.",
                UserWarning,
                stacklevel=2,
            )
    recorded: dict[str, Any] = {
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "models": list(chosen),
        "references": list(fixed),
        "schemes": list(schemes),
        "folds": {name: len(f) // len(fractions) for name, f in folds.items()},
        "held_out_class": [o.get("seen", DEFAULT_SEEN) for s, o in schemes.values() if s == COMBINATION] or None,
        "seeds": list(seeds),
        "ensemble": ensemble,
        "perturbation_key": perturbation_key,
        "control": list(data.control),
        "layer": layer,
        "batch_key": batch_key,
        "labels_key": labels_key,
        "train_fraction": fractions[0] if len(fractions) == 1 else list(fractions),
        "n_cells": n_cells,
        "model_kwargs": dict(model_kwargs or {}),
        "train_kwargs": dict(train_kwargs or {}),
        "setup_kwargs": dict(setup_kwargs or {}),
        "split_kwargs": dict(split_kwargs or {}),
        "external": {name: one.words for name, one in joining.items()},
    }
    columns = [c for c in (perturbation_key, batch_key, labels_key) if c is not None]
    columns += registered_columns(setup_kwargs or {}, adata.obs)
    recorded["data"] = {
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "fingerprint": fingerprint_data(data.adata, columns),
    }
    recorded["scoring_genes"], recorded["left_out"] = {}, {}
    recorded["versions"] = versions()
    jobs = {
        fraction: Job(
            data,
            chosen,
            fixed,
            seeds,
            scored,
            model_kwargs or {},
            train_kwargs or {},
            truth,
            Path(cache_dir) if cache_dir else None,
            recorded["data"]["fingerprint"],
            ensemble,
            joining,
        )
        for fraction in fractions
    }
    total = sum(len(f) for f in folds.values()) * jobs[fractions[0]].n_methods
    with tqdm(total=total, disable=not progress, unit="fit") as bar:
        for of_scheme in folds.values():
            few = len({str(u) for f in of_scheme for u in f.units}) < MIN_CONDITIONS
            for fold in of_scheme:
                jobs[fold.train_fraction].run_fold(fold, few, bar)
    for (name, i), scorer in jobs[fractions[-1]].scorers.items():
        recorded["scoring_genes"][f"{name}, fold {i}"] = int(scorer.genes.sum())
        left = [*scorer.left_out, *(f"{u}: too few cells" for u in scorer.fold.left_out)]
        if left:
            recorded["left_out"][f"{name}, fold {i}"] = left
    return _joined({fraction: job.result(recorded) for fraction, job in jobs.items()})


def _joined(by_fraction: dict[float, BenchmarkResult]) -> BenchmarkResult:
    """Return the result of one fraction as it is, of several as one result."""
    parts = list(by_fraction.values())
    largest = by_fraction[max(by_fraction)]
    if len(parts) == 1:
        return largest
    tables, fits = (pd.concat([getattr(p, name) for p in parts], ignore_index=True) for name in ("table", "fits"))
    return replace(largest, table=tables, fits=fits, by_fraction=by_fraction)
