"""Every method on every fold, each result kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pertvae.benchmark._arguments import ensemble_name
from pertvae.benchmark._fingerprint import fingerprint, fingerprint_code, versions
from pertvae.benchmark._fit import Data, fit_model, run_duplicate, run_ensemble, run_model, run_oracle, run_reference
from pertvae.benchmark._folds import Fold
from pertvae.benchmark._prediction import Prediction, records
from pertvae.benchmark._result import BenchmarkResult, Key
from pertvae.benchmark._score import POOLED, Scorer
from pertvae.datasets import Truth
from pertvae.metrics import Metric

DUPLICATE, ORACLE = "duplicate", "oracle"
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
        Folder of finished fits.
    fingerprint
        Of the data.
    ensemble
        Also score, for each model, its fits of all seeds as one.
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

    def __post_init__(self) -> None:
        self.predictions: dict[Key, Prediction] = {}
        self.kinds: dict[str, str] = {}
        self.scorers: dict[tuple[str, int], Scorer] = {}

    @property
    def n_methods(self) -> int:
        of_model = len(self.seeds) + self.ensemble
        return len(self.references) + 1 + (self.truth is not None) + len(self.models) * of_model

    def run_fold(self, fold: Fold, keep_draws: bool, bar: Any) -> None:
        """Run every method on one fold."""
        data = self.data
        adata, fold = data.of_fold(fold)
        scorer = Scorer(
            adata, fold, data.perturbation_key, data.control, data.sep, data.context_key, self.metrics, keep_draws
        )
        self.scorers[fold.scheme, fold.index] = scorer
        if not bar.disable:
            n_units, n_genes = len(fold.units), int(scorer.genes.sum())
            bar.write(f"{fold.scheme}, fold {fold.index}: {n_units} held-out conditions, {n_genes} genes scored.")
        for name, cls in self.references.items():
            self._step(fold, name, "reference", NO_SEED, partial(run_reference, cls, data, scorer), bar)
        self._step(fold, DUPLICATE, "duplicate", NO_SEED, partial(run_duplicate, scorer), bar)
        if self.truth is not None:
            self._step(fold, ORACLE, "oracle", NO_SEED, partial(run_oracle, self.truth, scorer), bar)
        for name in self.models:
            fitted: dict[int, Any] = {}
            for seed in self.seeds:
                self._step(fold, name, "model", seed, partial(self._single, name, seed, scorer, fitted, bar), bar)
            if self.ensemble:
                compute = partial(self._ensemble, name, scorer, fitted, bar)
                self._step(fold, ensemble_name(name), "model", NO_SEED, compute, bar)
        scorer.release()

    def _single(self, name: str, seed: int, scorer: Scorer, fitted: dict[int, Any], bar: Any) -> Prediction:
        """Train a model from one seed and score it; for an ensemble it is kept in ``fitted``."""
        start = time.perf_counter()
        model = self._fit(name, seed, scorer, bar)
        seconds = time.perf_counter() - start
        keep_programs = scorer.fold.index == 0 and seed == self.seeds[0]
        prediction = run_model(model, self.data, scorer, seed=seed, keep_programs=keep_programs)
        prediction.seconds["fit"] = seconds
        if self.ensemble:
            fitted[seed] = model
        return prediction

    def _ensemble(self, name: str, scorer: Scorer, fitted: dict[int, Any], bar: Any) -> Prediction:
        """Score the fits of all seeds as one; those whose scores came from the cache are trained again."""
        singles = {seed: self.predictions[scorer.fold.scheme, scorer.fold.index, name, seed] for seed in self.seeds}
        for seed, single in singles.items():
            if single.status != "ok":
                raise RuntimeError(f"seed {seed} failed: {single.error}")
        models = [fitted[s] if s in fitted else self._fit(name, s, scorer, bar) for s in self.seeds]
        prediction = run_ensemble(models, self.data, scorer, seed=self.seeds[0])
        prediction.seconds["fit"] = sum(single.seconds["fit"] for single in singles.values())
        return prediction

    def _fit(self, name: str, seed: int, scorer: Scorer, bar: Any) -> Any:
        def report(epoch: int, of: int) -> None:
            bar.set_postfix_str(f"epoch {epoch}/{of}")

        return fit_model(
            self.models[name],
            self.data,
            scorer,
            seed=seed,
            model_kwargs=self._own(self.model_kwargs, name),
            train_kwargs=self._own(self.train_kwargs, name),
            on_epoch=report,
        )

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

    def _path(self, fold: Fold, name: str, kind: str, seed: int) -> Path | None:
        if self.cache is None:
            return None
        data = self.data
        single = {ensemble_name(n): n for n in self.models}.get(name, name) if self.ensemble else name
        cls = self.models.get(single) if kind == "model" else self.references.get(name)
        settings = {
            "data": self.fingerprint,
            "code": fingerprint_code(),
            "versions": versions(),
            "class": f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', name)}",
            "model_kwargs": self._own(self.model_kwargs, single) if kind == "model" else {},
            "train_kwargs": self._own(self.train_kwargs, single) if kind == "model" else {},
            "setup": [data.perturbation_key, data.control, data.sep, data.labels_key, data.batch_key],
            "setup_kwargs": dict(data.setup_kwargs),
            "n_cells": data.n_cells,
            "metrics": [m.name for m in self.metrics],
            "units": [u.name for u in fold.units],
            # by cell: splits of other cells often have the same sizes
            "split": int(pd.util.hash_pandas_object(fold.split.astype(str)).sum()),
            "common": int(pd.util.hash_pandas_object(pd.Series(fold.common_rows(), fold.split.index)).sum()),
            "draws": self.scorers[fold.scheme, fold.index].keep_draws,
            "programs": fold.index == 0 and seed == self.seeds[0] if self.seeds else False,
            "seed": seed if single == name else list(self.seeds),
        }
        seeded = f"-seed{seed}" if seed >= 0 else ""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return self.cache / f"{fold.scheme}-fold{fold.index}-{safe}{seeded}-{fingerprint(settings)}.npz"

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
        truths = {key: scorer.truth for key, scorer in self.scorers.items()}
        return BenchmarkResult(table, pd.DataFrame(fits), settings, dict(self.predictions), truths, draws)
