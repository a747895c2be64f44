"""The page around the figures: headings, tables, colours that follow the reader's, and plotly's own script inside.

It is one file that needs no network, and may not use any (its own policy says so), and opens from a disk; most of its
5 MB are plotly.js. Pure functions of results.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from ...host.extras import need
from .cache import cache
from .cost import cost
from .facts import glance, what_ran
from .first_token import first_token
from .goodput import goodput
from .latency import latency, latency_by_load
from .over_time import over_time
from .parts import Section
from .runs import Compared, Named
from .tradeoff import accuracy, endpoints, throughput

_MEANINGS = (
    ("TTFT", "from arrival, queueing included, to the first token"),
    ("TPOT", "(last token - first token) / (tokens - 1)"),
    ("ITL", "the gaps between tokens as they are, counted in steps of 1 %"),
    ("E2E", "from arrival to the end"),
    ("goodput", "requests/s that finished and met every target; failed, refused and expired ones are misses"),
    ("a GPU", "divided by all GPUs of the engine, those that prefill and those that decode"),
    ("utilisation", "the share of wall time in which GPUs ran steps, however little of them these used"),
)
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page_of(named: Sequence[Named]) -> str:
    """Return the page of one benchmark, or of several side by side.

    Raises:
        ValueError: plotly is not installed, or there are too many.
    """
    plotly = need("plotly.offline", "report", "An HTML page")
    compared = Compared(named)
    sections = _sections(compared)
    title = " and ".join(run.name for run in compared.runs)
    body = [f"<h1>{escape(title)}</h1>", _contents(sections), *(section.html() for section in sections), _meanings()]
    return (
        f"<!doctype html><html lang=en><head>{_head(title)}<style>{_own('page.css')}</style></head>"
        f"<body><main>{''.join(body)}</main><noscript><p>Figures are drawn by JavaScript; tables have their numbers."
        f'</p></noscript><script type="application/json" id="figures">{_figures(sections)}</script>'
        f"<script>{plotly.get_plotlyjs()}</script><script>{_own('page.js')}</script></body></html>\n"
    )


def _sections(compared: Compared) -> list[Section]:
    made = (
        what_ran(compared), glance(compared), latency(compared), latency_by_load(compared), first_token(compared),
        goodput(compared), throughput(compared), endpoints(compared), accuracy(compared), over_time(compared),
        cache(compared), cost(compared),
    )  # fmt: skip
    return [section for section in made if section is not None]


def _head(title: str) -> str:
    return (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    )


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{section.name}">{escape(section.heading)}</a></li>' for section in sections)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _meanings() -> str:
    texts = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _MEANINGS)
    return f'<section id="meanings"><h2>What the words mean</h2><dl>{texts}</dl></section>'


def _figures(sections: Sequence[Section]) -> str:
    """Return all figures by their ids, as JSON that stands inside a script."""
    figures = {name: figure.as_json() for section in sections for name, figure in section.figures().items()}
    return json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _own(name: str) -> str:
    return (files(__package__) / name).read_text("utf-8")
