"""Every method on every fold, each result kept at once."""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pertvae.benchmark._arguments import ensemble_name
from pertvae.benchmark._cloud import Cloud
from pertvae.benchmark._data import Data
from pertvae.benchmark._duplicate import DUPLICATE, INTERPOLATED, ORACLE
from pertvae.benchmark._external import External
from pertvae.benchmark._fingerprint import content, fingerprint, fingerprint_code, versions
from pertvae.benchmark._fit import (
    fit_reference,
    run_duplicate,
    run_ensemble,
    run_external,
    run_model,
    run_oracle,
    run_reference,
)
from pertvae.benchmark._folds import Fold
from pertvae.benchmark._prediction import Prediction, records
from pertvae.benchmark._result import BenchmarkResult, Key
from pertvae.benchmark._score import POOLED, Scorer
from pertvae.benchmark._store import FitStore
from pertvae.benchmark._strata import unit_table
from pertvae.benchmark._train import fit_model
from pertvae.datasets import Truth
from pertvae.metrics import Metric
from pertvae.reference import SCVIArithmetic

NO_SEED = -1


@dataclass
class Job:
    """All fits of a benchmark.

    Parameters
    ----------
    data
        The screen.
    models, references
        Classes by name.
    seeds
        Training seeds.
    metrics
        Metrics to score.
    model_kwargs, train_kwargs
        For models; a key that is a model's name holds its own.
    truth
        Of a simulated screen.
    cache
        Folder of finished fits: their scores, and trained models.
    fingerprint
        Of the data.
    ensemble
        Also score, for each model, its fits of all seeds as one.
    external
        Predictions of outside tools by name.
    """

    data: Data
    models: dict[str, Any]
    references: dict[str, Any]
    seeds: Sequence[int]
    metrics: Sequence[Metric]
    model_kwargs: Mapping[str, Any]
    train_kwargs: Mapping[str, Any]
    truth: Truth | None
    cache: Path | None
    fingerprint: str = ""
    ensemble: bool = False
    external: Mapping[str, External] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = FitStore(self.cache / "models" if self.cache is not None else None)
        self.predictions: dict[Key, Prediction] = {}
        self.kinds: dict[str, str] = {}
        self.scorers: dict[tuple[str, int], Scorer] = {}
        self.clouds: dict[tuple[str, int], pd.DataFrame] = {}

    @property
    def n_methods(self) -> int:
        of_model = len(self.seeds) + self.ensemble
        fixed = len(self.references) + 2 + (self.truth is not None) + len(self.external)
        return fixed + len(self.models) * of_model

    def run_fold(self, fold: Fold, keep_draws: bool, bar: Any) -> None:
        """Run every method on one fold."""
        data = self.data
        adata, fold = data.of_fold(fold)
        scorer = Scorer(
            adata, fold, data.perturbation_key, data.control, data.sep, data.context_key, self.metrics, keep_draws
        )
        scorer.table = unit_table(scorer)
        if fold.index == 0:
            scorer.cloud = Cloud.create(scorer)
            self.clouds[fold.scheme, fold.index] = scorer.cloud.observed(scorer)
        self.scorers[fold.scheme, fold.index] = scorer
        if not bar.disable:
            n_units, n_genes = len(fold.units), int(scorer.genes.sum())
            bar.write(f"{fold.scheme}, fold {fold.index}: {n_units} held-out conditions, {n_genes} genes scored.")
        for name in self.references:
            self._step(fold, name, "reference", NO_SEED, partial(self._reference, name, scorer), bar)
        for name, interpolated in ((DUPLICATE, False), (INTERPOLATED, True)):
            self._step(fold, name, "duplicate", NO_SEED, partial(run_duplicate, scorer, interpolated), bar)
        if self.truth is not None:
            self._step(fold, ORACLE, "oracle", NO_SEED, partial(run_oracle, self.truth, scorer), bar)
        for name, external in self.external.items():
            self._step(fold, name, "model", NO_SEED, partial(run_external, external, scorer), bar)
        for name in self.models:
            fitted: dict[int, Any] = {}
            for seed in self.seeds:
                self._step(fold, name, "model", seed, partial(self._single, name, seed, scorer, fitted, bar), bar)
            if self.ensemble:
                compute = partial(self._ensemble, name, scorer, fitted, bar)
                self._step(fold, ensemble_name(name), "model", NO_SEED, compute, bar)
        scorer.release()

    def _reference(self, name: str, scorer: Scorer) -> Prediction:
        """Fit a reference, or take from disk one that takes long to fit, and score it."""
        make, settings = self.references[name], self._data_settings(scorer.fold)
        settings |= {
            "code": fingerprint_code(training=True, also=("reference", "benchmark/_fit.py")),
            "reference": make,
        }
        key = f"{_safe(name)}-{fingerprint(settings)}"
        kept = self.store.read_pickle(key)
        if kept is None:
            start = time.perf_counter()
            reference = fit_reference(make, self.data, scorer)
            kept = reference, time.perf_counter() - start
            if isinstance(reference, SCVIArithmetic):
                self.store.write_pickle(key, *kept)
        prediction = run_reference(kept[0], self.data, scorer)
        prediction.seconds["fit"] = kept[1]
        return prediction

    def _single(self, name: str, seed: int, scorer: Scorer, fitted: dict[int, Any], bar: Any) -> Prediction:
        """Train a model from one seed and score it; for an ensemble it is kept in ``fitted``."""
        model, seconds = self._fit(name, seed, scorer, bar)
        keep_programs = scorer.fold.index == 0 and seed == self.seeds[0]
        prediction = run_model(model, self.data, scorer, seed=seed, keep_programs=keep_programs)
        prediction.seconds["fit"] = seconds
        if self.ensemble:
            fitted[seed] = model
        return prediction

    def _ensemble(self, name: str, scorer: Scorer, fitted: dict[int, Any], bar: Any) -> Prediction:
        """Score the fits of all seeds as one; without a cache of models those not at hand are trained again."""
        singles = {seed: self.predictions[scorer.fold.scheme, scorer.fold.index, name, seed] for seed in self.seeds}
        for seed, single in singles.items():
            if single.status != "ok":
                raise RuntimeError(f"seed {seed} failed: {single.error}")
        models = [fitted[s] if s in fitted else self._fit(name, s, scorer, bar)[0] for s in self.seeds]
        prediction = run_ensemble(models, self.data, scorer, seed=self.seeds[0])
        prediction.seconds["fit"] = sum(single.seconds["fit"] for single in singles.values())
        return prediction

    def _fit(self, name: str, seed: int, scorer: Scorer, bar: Any) -> tuple[Any, float]:
        """Return a trained model and the seconds of its training, from disk where it was kept."""

        def report(epoch: int, of: int) -> None:
            bar.set_postfix_str(f"epoch {epoch}/{of}")

        cls, fold = self.models[name], scorer.fold
        key = f"{_safe(name)}-seed{seed}-{fingerprint(self._fit_settings(fold, name, seed))}"
        kept = self.store.read(key, cls, scorer.adata)
        if kept is not None:
            return kept
        start = time.perf_counter()
        model = fit_model(
            cls,
            self.data,
            scorer.adata,
            seed=seed,
            model_kwargs=self._own(self.model_kwargs, name),
            train_kwargs=self._own(self.train_kwargs, name),
            on_epoch=report,
        )
        seconds = time.perf_counter() - start
        try:
            self.store.write(key, model, seconds)
        except (OSError, RuntimeError, TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
            warnings.warn(f"{name} can not be kept in {self.store.folder}: {error}", UserWarning, stacklevel=2)
        return model, seconds

    def _step(self, fold: Fold, name: str, kind: str, seed: int, compute: Callable[[], Prediction], bar: Any) -> None:
        """Take one method's result from the cache, or compute and keep it; a failure is recorded, not raised."""
        self.kinds[name] = kind
        where = f"{fold.scheme} fold {fold.index}" + (f" at {fold.train_fraction:g}" if fold.train_fraction < 1 else "")
        bar.set_description_str(f"{where}: {name}" + (f" seed {seed}" if seed >= 0 else ""))
        path = self._path(fold, name, kind, seed)
        prediction = Prediction.read(path) if path is not None else None
        if prediction is None:
            try:
                prediction = compute()
            except Exception as error:  # noqa: BLE001 - one method's failure is a row of the table, not the end
                message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
                prediction = Prediction.failed(f"{type(error).__name__}: {message}")
            else:
                if path is not None:
                    prediction.write(path)
        self.predictions[fold.scheme, fold.index, name, seed] = prediction
        bar.set_postfix_str("")
        bar.update()

    def _data_settings(self, fold: Fold) -> dict[str, Any]:
        """Return what every fit depends on."""
        data = self.data
        return {
            "data": self.fingerprint,
            "versions": versions(),
            "setup": [data.perturbation_key, data.control, data.sep, data.labels_key, data.batch_key],
            # by cell: splits of other cells often have the same sizes
            "split": int(pd.util.hash_pandas_object(fold.split.astype(str)).sum()),
        }

    def _fit_settings(self, fold: Fold, name: str, seed: Any) -> dict[str, Any]:
        """Return everything that a trained model depends on."""
        return self._data_settings(fold) | {
            "code": fingerprint_code(training=True),
            "class": content(self.models[name]),
            "model_kwargs": self._own(self.model_kwargs, name),
            "train_kwargs": self._own(self.train_kwargs, name),
            "setup_kwargs": dict(self.data.setup_kwargs),
            "seed": seed,
        }

    def _path(self, fold: Fold, name: str, kind: str, seed: int) -> Path | None:
        """Return the file of one method's scores."""
        if self.cache is None:
            return None
        data = self.data
        single = {ensemble_name(n): n for n in self.models}.get(name, name) if self.ensemble else name
        if name in self.external:
            of_method: dict[str, Any] = {"external": self.external[name].fingerprint(fold.index)}
        elif kind == "model":
            of_method = self._fit_settings(fold, single, seed if single == name else list(self.seeds))
        else:
            of_method = {"reference": self.references.get(name, name)}
        settings = self._data_settings(fold) | {
            "method": of_method,
            "code": fingerprint_code(),
            "n_cells": data.n_cells,
            "metrics": [[m.name, content(m.function)] for m in self.metrics],
            "units": [u.name for u in fold.units],
            "common": int(pd.util.hash_pandas_object(pd.Series(fold.common_rows(), fold.split.index)).sum()),
            "draws": self.scorers[fold.scheme, fold.index].keep_draws,
            "programs": fold.index == 0 and seed == self.seeds[0] if self.seeds else False,
        }
        seeded = f"-seed{seed}" if seed >= 0 else ""
        return self.cache / f"{_safe(fold.scheme)}-fold{fold.index}-{_safe(name)}{seeded}-{fingerprint(settings)}.npz"

    def _own(self, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return arguments for all models and those under this model's name."""
        shared = {k: v for k, v in given.items() if k not in self.models}
        return {**shared, **given.get(name, {})}

    def result(self, settings: dict[str, Any]) -> BenchmarkResult:
        """Assemble the tables."""
        rows, fits = [], []
        drawn: dict[str, list[pd.DataFrame]] = {}
        for (scheme, fold, name, seed), p in self.predictions.items():
            scorer = self.scorers[scheme, fold]
            fraction = scorer.fold.train_fraction
            base = {"scheme": scheme, "fold": fold, "train_fraction": fraction, "model": name}
            base |= {"kind": self.kinds[name], "seed": seed}
            seconds = {f"{k}_seconds": p.seconds.get(k, np.nan) for k in ("fit", "predict")}
            fits.append({**base, **seconds, "status": p.status, "error": p.error, "cached": p.cached})
            if p.status != "ok":
                rows.append({**base, "status": p.status, "error": p.error, "condition": "", "unit": ""})
                continue
            units = {u.name: u for u in scorer.fold.units}
            for score in records(p.scores):
                unit = units.get(str(score["unit"]))
                where: dict[str, Any] = {"condition": POOLED, "context": "", "seen": ""}
                if unit is not None:
                    where = {"condition": unit.label, "context": unit.context, "seen": unit.seen}
                n = scorer.n_observed(unit) if unit is not None else sum(map(scorer.n_observed, scorer.fold.units))
                rows.append({**base, **where, **score, "n_observed": n, "status": "ok", "error": ""})
            for metric, table in p.draws.items():
                index = pd.MultiIndex.from_tuples([(scheme, fold, name, seed, u) for u in table.index])
                drawn.setdefault(metric, []).append(
                    table.set_axis(index, axis=0).set_axis(range(table.shape[1]), axis=1)
                )
        columns = ["scheme", "fold", "train_fraction", "model", "kind", "seed", "condition", "context", "seen"]
        columns += ["metric", "value", "lower", "upper", "n_observed", "status", "error", "unit"]
        table = pd.DataFrame(rows).reindex(columns=columns)
        draws = {metric: pd.concat(tables) for metric, tables in drawn.items()}
        for frame in draws.values():
            frame.index.names = ["scheme", "fold", "model", "seed", "unit"]
        scorers = self.scorers
        sizes = [s.table.assign(scheme=name, fold=i) for (name, i), s in scorers.items()]
        splits = {
            f"{name}_fold{i}": s.fold.split.reindex(self.data.adata.obs_names) for (name, i), s in scorers.items()
        }
        return BenchmarkResult(
            table,
            pd.DataFrame(fits),
            settings,
            dict(self.predictions),
            {key: s.truth for key, s in scorers.items()},
            pd.concat(sizes, ignore_index=True),
            pd.DataFrame(splits).rename_axis("cell"),
            self.clouds,
            draws,
        )


def _safe(name: str) -> str:
    """Return a name that can stand in the name of a file."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
