"""The result as one HTML file that opens from disk: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from . import report
from .stages import TEACHER, VARIANTS

STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1.5rem;
  font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f5f6f8; padding: .8rem; white-space: pre-wrap }
img { max-width: 100% }
"""


def write(found: dict[str, Any], plot: Path, path: Path) -> None:
    """Table, plots, notes and samples of a result.

    Args:
        found: the result as in result.json.
        plot: the PNG that `report.plot` drew; its bytes go into the page.
        path: the page.
    """
    head, *rows = report.cells(found)
    machine = found["machine"]
    image = base64.b64encode(plot.read_bytes()).decode("ascii")
    parts = [
        "<h1>A language model distilled, each way beside torch's own loss</h1>",
        f"<p>{escape(machine['device'])}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {escape(machine['torch'])}, fastkd {escape(machine['fastkd'])}.</p>",
        f"<table><tr>{_row(head, 'th')}</tr>",
        *(f"<tr>{_row(row, 'td')}</tr>" for row in rows),
        "</table><h2>The rows</h2><p>One student, trained in five ways from the same weights over "
        f"the same text; the {TEACHER} is a larger model.</p>",
        _terms({name: variant.about for name, variant in VARIANTS.items()}),
        "<h2>The columns</h2>",
        _terms(report.TERMS),
        "<h2>Plots</h2><p>Held-out text is text that no model was trained on. The curves of eager, "
        "dense and linear are one but for rounding.</p>",
        f'<img alt="held-out curves, times and memory" src="data:image/png;base64,{image}">',
        "<h2>Notes</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in report.notes(found).splitlines()),
        "</ul><h2>Samples</h2>",
        *(f"<h3>{escape(k)}</h3><pre>{escape(v)}</pre>" for k, v in found["samples"].items()),
    ]
    body = "\n".join(parts)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fastkd demo</title>'
        f"<style>{STYLE}</style>\n{body}\n</html>\n",
        encoding="utf-8",
    )


def _terms(about: dict[str, str]) -> str:
    rows = (f"<dt><b>{escape(term)}</b></dt><dd>{escape(x)}</dd>" for term, x in about.items())
    return f"<dl>{''.join(rows)}</dl>"


def _row(cells: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
