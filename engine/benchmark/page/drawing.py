"""Figures as this page has them: plotly's, as data, in colours that are set when they are drawn; legends are HTML.

They are plotly's own JSON and not its Python objects, which check every value and are 10 times as slow: a test has them
check these. Only SVG is drawn, never WebGL, of which browsers without a GPU complain. Axes upwards have no title: the
caption above a figure says what they are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .numbers import ticks
from .runs import GREY

_STOPS = ("#3d8fd1", "#9a6cc4", "#cf5f8a", "#d55e00")  # from a light load to a heavy one; each as dark as the others
_CLOSE = 4  # times: below that a linear scale reads better
_DIGITS = 6  # of a curve's values

type Trace = dict[str, Any]


class Figure:
    """A figure for plotly."""

    def __init__(self, x: str, *, height: int = 280) -> None:
        """Begin with nothing in it; `x` is the title of its axis, `height` in pixels."""
        self.height = height
        self.data: list[Trace] = []
        axis = {"automargin": True, "zeroline": False, "separatethousands": True, "exponentformat": "none"}
        self.x: dict[str, Any] = axis | {"title": {"text": x, "standoff": 8}}
        self.y: dict[str, Any] = axis | {}
        self._layout: dict[str, Any] = {
            "height": height, "showlegend": False, "hovermode": "closest", "font": {"size": 12},
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "xaxis": self.x, "yaxis": self.y,
        }  # fmt: skip

    def scatter(self, x: Sequence[float | None], y: Sequence[float | None], **more: Any) -> None:
        """Add lines, marks or both."""
        self.data.append({"type": "scatter", "x": list(x), "y": list(y), **more})

    def bars(self, x: Sequence[float], y: Sequence[float], **more: Any) -> None:
        """Add bars that lie: of lengths `x` in rows `y`."""
        self.data.append({"type": "bar", "orientation": "h", "x": list(x), "y": list(y), **more})

    def rows(self, texts: Sequence[str], *, gap: float, mode: str) -> None:
        """Name the rows of bars, from the top; `mode` is plotly's of bars that share one."""
        places = list(range(len(texts)))
        self.y |= {"autorange": "reversed", "tickvals": places, "ticktext": list(texts), "showgrid": False}
        self._layout |= {"barmode": mode, "bargap": gap}

    def line(self, **ends: float) -> None:
        """Draw a dotted line through the whole figure, upright at `x` or across at `y`."""
        ((axis, at),) = ends.items()
        other = "y" if axis == "x" else "x"
        self._layout.setdefault("shapes", []).append({
            "type": "line", f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1,
            f"{other}ref": f"{other} domain", "line": {"color": GREY, "width": 1, "dash": "dot"},
        })  # fmt: skip

    def note(self, y: float, text: str) -> None:
        """Write at the right of a figure, below a height of `y`."""
        self._layout.setdefault("annotations", []).append({
            "xref": "x domain", "x": 0.99, "xanchor": "right", "y": y, "yanchor": "top", "showarrow": False,
            "text": text,
        })  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return it as plotly reads it."""
        return {"data": self.data, "layout": self._layout}


def ramp(place: int, count: int) -> str:
    """Return the colour of one of `count` loads in their order."""
    if count < 2:
        return _STOPS[0]
    at = place / (count - 1) * (len(_STOPS) - 1)
    left = min(int(at), len(_STOPS) - 2)
    pairs = zip(_channels(_STOPS[left]), _channels(_STOPS[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - left)):02x}" for a, b in pairs)


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def logarithmic(axis: dict[str, Any], values: Iterable[float]) -> None:
    """Give an axis of a figure a logarithmic scale that fits these values, unless they are close to each other or one
    is not above 0."""
    known = np.fromiter(values, np.float64)
    known = known[np.isfinite(known)]
    if not len(known) or known.min() <= 0 or known.max() < _CLOSE * known.min():
        return
    least, most = float(known.min()) / 1.15, float(known.max()) * 1.15
    places, texts = ticks(least, most)
    span = [float(np.log10(least)), float(np.log10(most))]
    axis |= {"type": "log", "tickvals": places, "ticktext": texts, "range": span}


def shares(axis: dict[str, Any], *, most: float = 1.02) -> None:
    """Let an axis of a figure show shares in percent, from 0 to `most`."""
    axis |= {"tickformat": ".0%", "range": [0, most]}


def thinned(count: int, most: int) -> list[int]:
    """Return places of at most so many of `count` values, evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()}) if count else []


def curve(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Return values of a curve as JSON has them: six digits of each; NaN is none."""
    return [
        None if value != value else float(f"{value:.{_DIGITS}g}") for value in np.asarray(values, np.float64).tolist()
    ]
