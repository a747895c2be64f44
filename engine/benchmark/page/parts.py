"""What a page consists of: sections of sentences, figures and tables, as HTML.

A number in a table is written for people, and as it is in the JSON besides (`<data value>`), so what reads the page has
all of it. A table that is too wide scrolls by itself. All texts are escaped here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from .drawing import Figure


class Cell(NamedTuple):
    """A value of a table."""

    text: str
    value: float | None = None  # as in the JSON; None: it is a text


_MOST_ROWS = 12  # of a table that is not folded
UNKNOWN = Cell("\N{EN DASH}")

type Row = tuple[str, Sequence[Cell | str]]  # its head, and the rest


@dataclass(frozen=True)
class Table:
    """Exact figures; columns' heads have the units."""

    name: str  # for whoever reads it by a program
    head: Sequence[str]  # of all columns, that of the rows' heads first
    rows: Sequence[Row]

    def html(self) -> str:
        """Return it as HTML."""
        first = self.rows[0][1] if self.rows else ()
        kinds = ["", *(' class="text"' if isinstance(cell, str) else "" for cell in first)]
        head = "".join(
            f'<th scope="col"{kind}>{escape(text)}</th>' for kind, text in zip(kinds, self.head, strict=False)
        )
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in self.rows
        )
        table = (
            f'<div class="scroll" tabindex="0"><table data-name="{escape(self.name)}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
        if len(self.rows) <= _MOST_ROWS:
            return table
        return f"<details><summary>Exact figures, {len(self.rows)} rows</summary>{table}</details>"


class Key(NamedTuple):
    """What a colour or a kind of line means."""

    text: str
    color: str
    dash: str = "solid"
    is_block: bool = False  # of an area, not a line


@dataclass(frozen=True)
class Plot:
    """A figure with what it shows written above it."""

    name: str  # its id on the page
    title: str
    unit: str  # of the values, upwards
    figure: Figure
    keys: Sequence[Key] = ()

    def html(self) -> str:
        """Return the place that the figure is drawn in."""
        height = self.figure.height
        return (
            f"<figure><figcaption><b>{escape(self.title)}</b> <span>{escape(self.unit)}</span></figcaption>"
            f'{legend(self.keys)}<div class="plot" id="{self.name}" role="img" aria-label="{escape(self.title)}" '
            f'style="height:{height}px"></div></figure>'
        )


@dataclass(frozen=True)
class Choice:
    """One of several loads, of which the page shows one at a time."""

    text: str
    plots: Sequence[Plot]
    tables: Sequence[Table] = ()
    sentences: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One subject."""

    name: str  # its anchor
    heading: str
    sentences: Sequence[str]  # what the figures say
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    keys: Sequence[Key] = ()  # of all its figures
    choices: Sequence[Choice] = ()
    chosen: int = 0  # that is shown at first

    def html(self) -> str:
        """Return it as HTML."""
        head = f'<section id="{self.name}"><h2>{escape(self.heading)}</h2>'
        return head + _content(self.sentences, self.plots, self.tables, self.keys) + self._chooser() + "</section>"

    def figures(self) -> Mapping[str, Figure]:
        """Return all figures by their ids."""
        plots = [*self.plots, *(plot for choice in self.choices for plot in choice.plots)]
        return {plot.name: plot.figure for plot in plots}

    def _chooser(self) -> str:
        if not self.choices:
            return ""
        options = "".join(
            f"<option{' selected' if place == self.chosen else ''}>{escape(choice.text)}</option>"
            for place, choice in enumerate(self.choices)
        )
        picker = f'<label class="picker">Load <select>{options}</select></label>' if len(self.choices) > 1 else ""
        blocks = "".join(
            f'<div class="choice"{"" if place == self.chosen else " hidden"}>'
            f"{_content(choice.sentences, choice.plots, choice.tables, ())}</div>"
            for place, choice in enumerate(self.choices)
        )
        return picker + blocks


def legend(keys: Sequence[Key]) -> str:
    """Return what colours and lines mean, as HTML; nothing for nothing."""
    if not keys:
        return ""
    return f'<ul class="keys">{"".join(map(_key, keys))}</ul>'


def _key(key: Key) -> str:
    line = {"solid": "solid", "dot": "dotted"}.get(key.dash, "dashed")
    kind = "block" if key.is_block else line
    return f'<li><i class="{kind}" style="color:{key.color}"></i>{escape(key.text)}</li>'


def _content(sentences: Iterable[str], plots: Sequence[Plot], tables: Sequence[Table], keys: Sequence[Key]) -> str:
    texts = "".join(f"<p>{_unbroken(escape(sentence))}</p>" for sentence in sentences)
    figures = f'<div class="plots">{"".join(plot.html() for plot in plots)}</div>' if plots else ""
    return texts + legend(keys) + figures + "".join(table.html() for table in tables)


def _unbroken(text: str) -> str:
    """Keep "%" on the line of its number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{escape(cell)}</td>'
    if cell.value is None:
        return f"<td>{escape(cell.text)}</td>"
    return f'<td><data value="{cell.value!r}">{escape(cell.text)}</data></td>'
