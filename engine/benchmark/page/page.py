"""The page around the figures: headings, tables, colours that follow the reader's, and plotly's own script inside.

It is one file that needs no network and opens from a disk; most of its 5 MB are plotly.js. Pure functions of results.
"""

from collections.abc import Sequence
from html import escape

from ...extras import need
from ...metrics.report_text import as_text
from .figures import FIGURES, Figure, Named

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #14171a; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
pre { overflow-x: auto; } .figure { width: 100%; height: 24rem; }
"""


def page_of(compared: Sequence[Named]) -> str:
    """Return the page of one benchmark, or of several side by side.

    Raises:
        ValueError: plotly is not installed.
    """
    plotly = need("plotly.offline", "report", "An HTML page")
    title = " and ".join(name for name, _ in compared)
    drawn = [(heading, figure) for heading, draw in FIGURES.items() if (figure := draw(compared)) is not None]
    body = [f"<h1>{escape(title)}</h1>", *(_summary(one) for one in compared)]
    body += [_section(number, heading, figure) for number, (heading, figure) in enumerate(drawn)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    scripts = f"<script>{plotly.get_plotlyjs()}</script>"
    return (
        f"<!doctype html><html lang=en><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style>{scripts}"
        f"</head><body>{''.join(body)}</body></html>\n"
    )


def _summary(one: Named) -> str:
    about, points = one.benchmark
    shaped = f"<p>Shaped like {escape(about.shaped_like)}; unofficial.</p>" if about.shaped_like else ""
    texts = [f"<h3>{escape(point.name)}</h3><pre>{escape(as_text(point.measured.report))}</pre>" for point in points]
    return f"<section><h2>{escape(one.name)}</h2>{shaped}{''.join(texts)}</section>"


def _section(number: int, heading: str, figure: Figure) -> str:
    """Draw a figure when the page opens, in the colours of the page, and as wide as that is."""
    name = f"figure-{number}"
    data = figure.to_json().replace("</", "<\\/")  # it stands inside a script
    return (
        f'<section><h2>{escape(heading)}</h2><div class=figure id="{name}"></div><script>{{const f={data};'
        f'Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true}})}}</script></section>'
    )
