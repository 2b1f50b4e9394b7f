"""What every plot shares: figures without pyplot's global state, colours, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for the common colour-vision deficiencies; the yellow is left out (too pale for lines).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK = "#222222"
MUTED = "#8a8a8a"
DIVERGING = "RdBu_r"


def new_figure(figsize: tuple[float, float]) -> Figure:
    """Return a figure that pyplot does not know, so nothing piles up and no window opens."""
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_of(ax: Axes) -> Figure:
    """Return the figure that ``ax`` stands in."""
    figure: Any = ax.get_figure()
    while not isinstance(figure, Figure):  # a SubFigure
        figure = figure.figure
    return figure


def finish(figure: Figure, save: str | Path | None, dpi: int = 150) -> Figure:
    """Save the figure when asked (the suffix names the format) and return it."""
    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save, dpi=dpi, bbox_inches="tight")
    return figure


def tidy(ax: Axes) -> None:
    """Remove the upper and right frame lines."""
    ax.spines[["top", "right"]].set_visible(False)


def literal(text: object) -> str:
    """Return text that matplotlib prints as it is (a dollar sign would start mathematics)."""
    return str(text).replace("$", r"\$")


def shorten(text: object, n: int = 28) -> str:
    """Return text of at most ``n`` characters, cut with an ellipsis."""
    string = str(text)
    return literal(string if len(string) <= n else string[: n - 1] + "\N{HORIZONTAL ELLIPSIS}")
