"""A report as one HTML file: tables and curves, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines by name in one pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]
    log_y: bool = False


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd }
  td, th { border-color: #444 }
  img { filter: invert(.9) hue-rotate(180deg) }
}
"""


def curves_png(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> bytes:
    """Lines by name, as a PNG. Needs matplotlib."""
    return panels_png([Panel(title, x_label, y_label, curves)])


def panels_png(panels: Sequence[Panel], columns: int = 2) -> bytes:
    """Panels row by row as one PNG; a name has the same colour in all of them. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = min(columns, len(panels))
    height = -(-len(panels) // width)
    figure = Figure(figsize=(7 * width, 3.6 * height), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for p in panels for name in p.curves))}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(height, width, i + 1)
        for name, points in panel.curves.items():
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.6, color=colours[name])
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.log_y and any(y > 0 for points in panel.curves.values() for _, y in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if panel.curves:
            axes.legend(frameon=False)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; numbers stand to the right."""

    def cell(tag: str, value: object, number: bool) -> str:
        return f"<{tag}{' class=number' if number else ''}>{html.escape(str(value))}</{tag}>"

    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = ["".join(cell("th", value, numeric[i]) for i, value in enumerate(header))]
    lines += ["".join(cell("td", value, numeric[i]) for i, value in enumerate(row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def image(png: bytes, caption: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts that are HTML already."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or str(value).replace(",", "").replace(".", "", 1).lstrip("-").isdigit()
