"""One self-contained HTML page that says what a benchmark found, in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pertvae.benchmark import _page
from pertvae.benchmark._figures import HEADLINES, figures, headline
from pertvae.benchmark._intervals import CONFIDENCE, MIN_CONDITIONS
from pertvae.benchmark._metrics import explain, plain_name, rising
from pertvae.benchmark._prediction import records
from pertvae.benchmark._strata import EFFECT_SIZE, NON_ADDITIVITY
from pertvae.benchmark._tables import (
    comparison_table,
    fits_table,
    main_metrics,
    range_table,
    scores_table,
    settings_table,
    strata_table,
    verdict_table,
)

if TYPE_CHECKING:
    from pertvae.benchmark._result import BenchmarkResult

SCHEME_WORDS = {
    "random": "held-out cells of conditions that were seen",
    "unseen_combination": "combinations of perturbations that were never seen together",
    "unseen_perturbation": "perturbations that were never seen",
    "unseen_context": "perturbations in a cell type or context where they were never seen",
}
_CAPTIONS = {
    "scores": "Mean over held-out conditions, with its interval. Models stand beside the references, which use no "
    "model of ours.",
    "efficiency": "The headline score against the fraction of the training combinations that was used; singles and "
    "controls are always whole, and the held-out cells are the same. Bars reach from the lowest to the highest seed.",
    "conditions": "The model against the best reference, condition by condition, on the headline score.",
    "shifts": "Predicted against observed change of each gene (one dot a gene) for the conditions predicted with the "
    "smallest and the largest error. On the line: predicted as observed.",
    "training": "Losses during training of the first fit. Validation cells are not trained on; both curves should "
    "fall and level off.",
    "cells": "Held-out cells and predicted cells of the conditions with the largest effects, in one UMAP of principal "
    "components that were fitted on training cells; grey: training controls. A method is right when its cells lie "
    "where the observed ones do, and as widely.",
    "programs": "Programs of the first fit: which perturbation moves which program, and which genes a program moves.",
}


def scheme_words(scheme: str) -> str:
    """Return what a scheme holds out, in words."""
    base, _, seen = scheme.partition(" ")
    return SCHEME_WORDS.get(base, base) + (f" ({seen} components alone in training)" if seen else "")


def write_report(result: BenchmarkResult, path: Path, drawn: Mapping[str, Figure] | None = None) -> Path:
    """Write the page and return its path; figures are drawn unless they are given."""
    if path.is_dir() or not path.suffix:
        path = path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    models = ", ".join(result.names("model")) or "references"
    title = f"Benchmark of {models}"
    body = [_page.heading(title, 1), _page.paragraph(_subtitle(result), "soft")]
    body.append(_page.verdict(verdicts(result)))
    failed = result.fits[result.fits["status"] == "failed"]
    if len(failed):
        body.append(_page.heading("What failed"))
        rows = [
            ("", [r["model"], str(r["fold"]), "" if r["seed"] < 0 else str(r["seed"]), r["error"]])
            for r in records(failed)
        ]
        body.append(_page.table(["Method", "Fold", "Seed", "Error"], rows, texts=4))
    drawn = figures(result) if drawn is None else drawn
    summary = result.largest.summary()
    if result.by_fraction:
        body.append(_page.paragraph(_fraction_words(result)))
    for scheme in result.schemes:
        body.append(_page.heading(f"Predicting {scheme_words(scheme)}"))
        here = summary[summary["scheme"] == scheme] if len(summary) else summary
        if here.empty:
            body.append(_page.paragraph("Nothing could be scored."))
            continue
        body.append(_page.paragraph(_interval_words(here)))
        run = list(dict.fromkeys(here["metric"]))
        body.append(verdict_table(result, scheme))
        body.append(_page.heading("Scores", 3) + scores_table(here, main_metrics(run)))
        body += [_figure(n, f) for n, f in drawn.items() if n.startswith(f"scores_{scheme}")]
        if set(run) - set(main_metrics(run)):
            body.append(_page.details("All scores", [scores_table(here, run)]))
        body += [comparison_table(result, scheme), strata_table(result, scheme), range_table(result, scheme)]
        rest = [n for n in drawn if f"_{scheme}" in n and not n.startswith("scores_")]
        body += [_figure(n, drawn[n]) for n in rest if not n.startswith("training_")]
        curves = [_figure(n, drawn[n]) for n in rest if n.startswith("training_")]
        if curves:
            body.append(_page.details("Losses during training", curves))
    body.append(_page.heading("What the scores mean"))
    body.append(_page.definitions({plain_name(m): explain(m) for m in result.metrics}))
    body.append(_page.paragraph(_DUPLICATE_NOTE, "note"))
    if result.settings.get("ensemble"):
        body.append(_page.paragraph(_ENSEMBLE_NOTE, "note"))
    body.append(_page.heading("How it was run"))
    body.append(settings_table(result.settings))
    body.append(_page.details("Time of each fit", [fits_table(result.fits)]))
    path.write_text(_page.page(title, body), encoding="utf-8")
    return path


def write_files(result: BenchmarkResult, folder: Path) -> Path:
    """Write tables, settings, figures and the page; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    per_condition = [m for m in result.metrics if result.has_conditions(m)]
    sizes = [result.largest.strata(m, by) for by in (EFFECT_SIZE, NON_ADDITIVITY) for m in per_condition[:1]]
    tables = {
        "table": result.table,
        "summary": result.summary(),
        "comparison": result.compare(per_condition),
        "strata": pd.concat([s for s in sizes if len(s)]) if any(map(len, sizes)) else pd.DataFrame(),
        "dynamic_range": result.dynamic_range(),
        "units": result.units,
        "fits": result.fits,
    }
    for name, table in tables.items():
        if len(table.columns):
            table.to_csv(folder / f"{name}.csv", index=False)
    result.splits.to_csv(folder / "splits.csv")
    (folder / "settings.json").write_text(json.dumps(result.settings, indent=1, default=str) + "\n")
    drawn = figures(result)
    for name, figure in drawn.items():
        target = folder / "figures"
        target.mkdir(exist_ok=True)
        file = name.replace("/", "_")  # a name of a model may hold one
        figure.savefig(target / f"{file}.png", dpi=150, bbox_inches="tight")
        figure.savefig(target / f"{file}.svg", bbox_inches="tight")
    return write_report(result, folder / "report.html", drawn)


_DUPLICATE_NOTE = (
    "'Other half of the same cells' splits the held-out cells of a condition at random and lets one half predict the "
    "other. Both have half of the cells, and half of the held-out controls, so it scores worse than a repeat of the "
    "whole experiment would, and a method that averages noise away can do better. 'Truth of the simulation' is the "
    "expected profile of the simulated screen: no "
    "method can be expected to do better. The interpolated duplicate takes from the half only what differs from the "
    "mean of the training perturbations for sure, and that mean elsewhere."
)

_ENSEMBLE_NOTE = (
    "In an 'ensemble' the fits of all seeds of a model predict together: the cells of a condition come from them in "
    "equal parts, and its shift is the mean of theirs. But for the noise of sampling, its distance from the truth is "
    "at most the mean of theirs; the best of them can be nearer. Its time of fitting is that of all of them."
)


def verdicts(result: BenchmarkResult) -> list[str]:
    """Return one plain sentence a scheme and model: better than, no different from, or worse than the references."""
    metric = headline(result)
    sentences = []
    compared = result.compare([] if metric is None else metric)
    for scheme in result.schemes:
        what = scheme_words(scheme)
        for model in result.names("model"):
            rows = compared[(compared["scheme"] == scheme) & (compared["model"] == model)]
            sentences.append(_sentence(model, what, rows, metric))
    return sentences or [f"Only references were run ({', '.join(result.names('reference'))}); there is no verdict."]


def _sentence(model: str, what: str, rows: pd.DataFrame, metric: str | None) -> str:
    best = rows[rows["best_reference"]] if len(rows) else rows
    if best.empty or metric is None:
        return f"{model}, {what}: no verdict, because the model or every reference failed."
    row: Any = best.iloc[0]
    name = plain_name(metric)
    numbers = f"{row.model_value:.3g} against {row.reference_value:.3g}, difference {row.difference:+.3g}"
    if np.isfinite(row.lower):
        numbers += f", {CONFIDENCE:.0%} interval {row.lower:+.3g} to {row.upper:+.3g}"
    n = int(row.n_conditions)
    over = f"{n} held-out condition{'s' if n != 1 else ''}"
    direction = {True: "higher is better", False: "lower is better", None: "distance from 1, lower is better"}[
        rising(metric)
    ]
    tail = f"{name}, {direction}: {numbers}; {over}"
    if row.verdict == "not judged":
        why = f"fewer than {MIN_CONDITIONS} conditions" if n < MIN_CONDITIONS else "no interval"
        return f"{model} beside the best reference, {row.reference}, on {what} ({tail}). No verdict: {why}."
    beaten = list(rows.loc[rows["verdict"] == "better", "reference"])
    worse = list(rows.loc[rows["verdict"] == "worse", "reference"])
    words = {"better": "is better than", "worse": "is worse than", "no difference": "shows no difference from"}
    sentence = f"{model} {words[row.verdict]} the best reference, {row.reference}, on {what} ({tail})."
    others = [r for r in beaten if r != row.reference]
    if others:
        sentence += f" It beats {_joined(others)}."
    if any(r != row.reference for r in worse):
        sentence += f" It is worse than {_joined([r for r in worse if r != row.reference])}."
    return sentence


def _fraction_words(result: BenchmarkResult) -> str:
    fractions = ", ".join(f"{f:.0%}" for f in result.by_fraction)
    return (
        f"Trained with {fractions} of the training combinations. Verdicts, tables and figures are those of the "
        "largest fraction, except the curves of data efficiency."
    )


def as_text(result: BenchmarkResult) -> str:
    """Return the verdict and the headline scores as plain text."""
    lines = [*verdicts(result)]
    if result.by_fraction:
        lines.append(_fraction_words(result))
    summary = result.largest.summary()
    for scheme in result.schemes:
        here = summary[summary["scheme"] == scheme] if len(summary) else summary
        if here.empty:
            continue
        run = list(dict.fromkeys(here["metric"]))
        metrics = [m for m in HEADLINES if m in run] or run[:3]
        cells = here[here["metric"].isin(metrics)]
        cells = cells.assign(shown=[_shown(r) for r in records(cells)])
        order = list(dict.fromkeys(here["model"]))
        wide = cells.pivot(index="model", columns="metric", values="shown").reindex(order)[metrics].fillna("-")
        lines += ["", f"{scheme}: {_interval_words(here)}", wide.rename_axis(index=None, columns=None).to_string()]
        if result.by_fraction:
            everything = result.summary()
            rows = everything[(everything["scheme"] == scheme) & (everything["metric"] == metrics[0])]
            curve = rows.pivot(index="model", columns="train_fraction", values="value").reindex(order)
            curve = curve.rename(columns=lambda f: f"{f:.0%}").rename_axis(index=None, columns=None)
            lines += ["", f"{metrics[0]} by fraction of the training combinations:", curve.round(3).to_string()]
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> str:
    interval = f" [{row['lower']:.3g}, {row['upper']:.3g}]" if np.isfinite(row["lower"]) else ""
    return f"{row['value']:.3g}{interval}"


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _subtitle(result: BenchmarkResult) -> str:
    s = result.settings
    data = s.get("data", {})
    sizes = f"{data.get('n_cells', 0):,} cells, {data.get('n_genes', 0):,} genes" if data else ""
    parts = [str(s.get("title") or ""), sizes, str(s.get("date", ""))]
    return " \N{MIDDLE DOT} ".join(p for p in parts if p)


def _interval_words(summary: pd.DataFrame) -> str:
    kinds = set(summary.loc[summary["interval"] != "none", "interval"])
    n = int(summary["n_conditions"].max())
    seeds = int(summary.loc[summary["kind"] == "model", "n_seeds"].max()) if (summary["kind"] == "model").any() else 0
    text = f"{n} held-out condition{'s' if n != 1 else ''}"
    text += f", each model trained from {seeds} seed{'s' if seeds != 1 else ''}. " if seeds else ". "
    if "conditions" in kinds:
        text += f"Intervals ({CONFIDENCE:.0%}) are bootstraps over the conditions."
    elif "cells" in kinds:
        text += (
            f"With fewer than {MIN_CONDITIONS} conditions, intervals ({CONFIDENCE:.0%}) come from resampling the "
            "held-out cells: they say how sure the observed means are, not how the method does on other conditions."
        )
    return text


def _figure(name: str, figure: Any) -> str:
    return _page.embedded(figure, _CAPTIONS[name.split("_", 1)[0]])
