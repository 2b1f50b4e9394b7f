"""Pieces of a self-contained HTML page: escaped text, tables that scroll in their own box, embedded figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6774; --line: #dde2e7; --paper: #ffffff; --tint: #f4f6f8;
  --mark: #0b5394; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--tint); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 32px 56px; background: var(--paper); min-height: 100vh; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption, .note { color: var(--soft); font-size: .9rem; }
.verdict { border-left: 4px solid var(--mark); background: var(--tint); padding: .7rem 1rem; margin: 1rem 0; }
.verdict p { max-width: none; margin: .35rem 0; font-size: 1.05rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .7rem 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--tint); font-weight: 600; vertical-align: bottom; }
th.wrap { white-space: normal; min-width: 7.5rem; }
tr:last-child td { border-bottom: 0; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th:first-child { background: var(--tint); }
tr.model td { font-weight: 600; background: #fff6ec; }
td small { display: block; color: var(--soft); font-weight: 400; }
table.settings { width: auto; min-width: 100%; }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top;
  font-weight: 400; }
table.settings td:first-child { white-space: nowrap; color: var(--soft); }
figure { margin: 1rem 0; }
figure img { display: block; height: auto; max-width: none; }
figure .box { padding: .5rem; }
dl { margin: .5rem 0; } dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--soft); max-width: 46rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 640px) { main { padding: 18px 14px 40px; } h1 { font-size: 1.35rem; }
  th, td { padding: .34rem .5rem; } td:first-child { white-space: normal; max-width: 9rem; }
  table.settings td:first-child { white-space: normal; } }
@media print { body { background: #fff; } .box { overflow: visible; border: 0; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, css: str = "") -> str:
    """Return a paragraph of escaped text."""
    return f"<p{_css(css)}>{escape(text)}</p>"


def verdict(sentences: Sequence[str]) -> str:
    """Return the box at the top."""
    return '<div class="verdict">' + "".join(paragraph(s) for s in sentences) + "</div>"


def table(
    columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str | tuple[str, str]]]], css: str = "", texts: int = 1
) -> str:
    """Return a table in a box of its own that scrolls when it is too wide.

    Parameters
    ----------
    columns
        Head of each column.
    rows
        Class of the row, and its cells: text, or text with a smaller line under it.
    css
        Class of the table.
    texts
        How many columns, from the left, hold words.
    """
    heads = []
    for i, column in enumerate(columns):
        classes = ["text"] * (i < texts) + ["wrap"] * (len(column) > 16)
        heads.append(f'<th{_css(" ".join(classes))} scope="col">{escape(column)}</th>')
    head = "".join(heads)
    body = []
    for kind, cells in rows:
        body.append(f"<tr{_css(kind)}>" + "".join(_cell(c, i < texts) for i, c in enumerate(cells)) + "</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f'<div class="box" tabindex="0"><table{_css(css)}>{top}<tbody>{"".join(body)}</tbody></table></div>'


def definitions(items: Mapping[str, str]) -> str:
    """Return a list of terms and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items()) + "</dl>"


def details(title: str, body: Iterable[str]) -> str:
    """Return a part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>" + "".join(body) + "</details>"


def embedded(figure: Figure, caption: str) -> str:
    """Return a figure inside the page (PNG in base64), shrunk to 70% at most: below that its box scrolls."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, bbox_inches="tight")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width = int(int.from_bytes(file.getvalue()[16:20], "big") / 160 * 96)  # CSS pixels at the size it was drawn
    style = f"width: clamp({int(width * 0.7)}px, 100%, {width}px)"
    return (
        f'<figure><div class="box"><img style="{style}" alt="{escape(caption, quote=True)}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _cell(cell: str | tuple[str, str], text: bool) -> str:
    css = _css("text" if text else "")
    if isinstance(cell, tuple):
        return f"<td{css}>{escape(cell[0])}<small>{escape(cell[1])}</small></td>"
    return f"<td{css}>{escape(cell)}</td>"


def _css(name: str) -> str:
    return f' class="{escape(name, quote=True)}"' if name else ""
