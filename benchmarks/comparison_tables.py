"""Tables of ``comparison_*_summary.csv`` as Markdown, for docs/benchmark.md.

    python benchmarks/comparison_tables.py real l2_profile energy_distance       one table a metric, a column a data set
    python benchmarks/comparison_tables.py screens l2_profile de_recovery        a column a screen
    python benchmarks/comparison_tables.py lost de_recovery                      where a model loses to a reference

Real data: value and 95% interval. Screens: mean over the simulation seeds, in brackets the smallest and the largest.
"""

from __future__ import annotations

import argparse

import pandas as pd
from _common import RESULTS
from comparison import MODELS, REAL, REFERENCES, SCREENS

import pertvae as pv

LABELS = {"samsvae": "SAMSVAE", "conditionalvae": "ConditionalVAE", "cpavae": "CPAVAE", "svaeplus": "SVAEPlus"}
LABELS |= {"AdditivePCA": 'Additive("pca")', "duplicate": "duplicate (half against half)"}
ENSEMBLES = [f"{name} ensemble" for name in MODELS]
LABELS |= {f"{name} ensemble": f"{LABELS[name]}, three seeds together" for name in MODELS}
ROWS = [*MODELS, *ENSEMBLES, *reversed(REFERENCES), "duplicate", "interpolated duplicate", "oracle"]


def number(value: float) -> str:
    digits = 3 if abs(value) < 1 else 2
    return f"{value:.{digits}f}"


def real(metric: str, name: str) -> dict[str, str]:
    """Return the cells of one column: value and interval of each method."""
    table = pd.read_csv(RESULTS / f"comparison_{name}_summary.csv")
    column = {}
    for row in table[table["metric"] == metric].itertuples():
        between = "" if pd.isna(row.lower) else f" [{number(row.lower)}, {number(row.upper)}]"
        column[row.model] = number(row.value) + between
    return column


def screen(metric: str, kind: str) -> dict[str, str]:
    """Return the cells of one column: mean over simulation seeds of each method."""
    files = sorted(RESULTS.glob(f"comparison_{kind}_[0-9]_summary.csv"))
    table = pd.concat(pd.read_csv(path) for path in files)
    rows = table[table["metric"] == metric].groupby("model")["value"].agg(["mean", "min", "max", "count"])
    if len(files) == 1:
        return {str(name): number(value) for name, value in rows["mean"].items()}
    return {
        str(name): f"{number(row['mean'])} ({number(row['min'])}, {number(row['max'])})"
        + (f" of {row['count']:.0f}" if row["count"] < len(files) else "")
        for name, row in rows.iterrows()
    }


def screens(metric: str) -> dict[str, dict[str, str]]:
    """Return the columns of the screens that were run; a title says so where seeds are missing."""
    columns = {}
    for kind in SCREENS:
        seeds = [path.stem.split("_")[-2] for path in sorted(RESULTS.glob(f"comparison_{kind}_[0-9]_summary.csv"))]
        if seeds:
            columns[f"`{kind}`" + ("" if len(seeds) == 3 else f", seed {' '.join(seeds)} alone")] = screen(metric, kind)
    return columns


def markdown(columns: dict[str, dict[str, str]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in ROWS:
        cells = [column.get(name, "–") for column in columns.values()]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lost(metric: str) -> pd.DataFrame:
    """Return where a model loses to a reference beyond the interval of the difference."""
    direction = pv.metrics.list_metrics().loc[metric, "direction"]
    found = []
    for path in sorted(RESULTS.glob("comparison_*_paired.csv")):
        table = pd.read_csv(path)
        # of a metric whose best value is in between the differences are those of the distances from it
        worse = table["upper"] < 0 if direction == "higher" else table["lower"] > 0
        rows = table[worse & table["metric"].eq(metric)]
        found.append(rows.assign(data=path.stem.removeprefix("comparison_").removesuffix("_paired")))
    columns = ["data", "model", "reference", "model_value", "reference_value", "difference", "lower", "upper"]
    return pd.concat(found)[[*columns, "interval", "n_conditions"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "screens", "lost"])
    parser.add_argument("metrics", nargs="*", default=["l2_profile"])
    given = parser.parse_args()
    if given.what == "lost":
        for metric in given.metrics:
            print(f"\n{metric}\n\n{lost(metric).to_string(index=False)}")
        return
    for metric in given.metrics:
        if given.what == "real":
            columns = {n: real(metric, n) for n in REAL if (RESULTS / f"comparison_{n}_summary.csv").exists()}
        else:
            columns = screens(metric)
        print(f"\n{metric}\n\n{markdown(columns)}")


if __name__ == "__main__":
    main()
