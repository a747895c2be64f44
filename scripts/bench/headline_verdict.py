"""What the headline experiment comes to: ours held against the colocated engines, rate by rate and at the best rate.

Arithmetic on the figures that `headline.py` has measured: a row for each engine, with a point for each rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OURS, PLANNED = "prefill=1,decode=1", "pool=2"
_MOST = 4  # engines on a page


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hold ours against the colocated engines, rate by rate and at the best rate of each that keeps to the SLO."""
    ours = next(row for row in rows if row["topology"] == OURS)
    rivals = [row for row in rows if row["topology"] not in (OURS, PLANNED)]
    planned = next((row for row in rows if row["topology"] == PLANNED), None)
    found = []
    for place, point in enumerate(ours["points"]):
        early = [row for row in rivals if row["points"][place]["ttft_p50"] <= point["ttft_p50"]]
        smooth = min(early, key=lambda row: float(row["points"][place]["itl_p99"]), default=None)
        better = max(rivals, key=lambda row: float(row["points"][place]["goodput"]))
        found.append(
            {
                "rate": point["rate"],
                "smoothest_as_early": None if smooth is None else smooth["engine"],
                "itl_p99_ratio": None if smooth is None else smooth["points"][place]["itl_p99"] / point["itl_p99"],
                "best_goodput": better["engine"],
                "goodput_ratio": _ratio(point["goodput"], better["points"][place]["goodput"]),
                "planner": None if planned is None else planned["points"][place]["roles"],
            }
        )
    best = {str(row["engine"]): _feasible(row) for row in rows}
    rival = max((row["engine"] for row in rivals), key=lambda name: float(best[name]["goodput"]))
    return {
        "rates": found,
        "feasible": best,
        "best_colocated": rival,
        "goodput_ratio": _ratio(best[ours["engine"]]["goodput"], best[rival]["goodput"]),
    }


def _feasible(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the highest rate at which an engine keeps to the SLO, and its goodput there; 0: at none."""
    kept = [point for point in row["points"] if point["is_attained"]]
    best = max(kept, key=lambda point: float(point["rate"]), default=None)
    return {"rate": None, "goodput": 0.0} if best is None else {"rate": best["rate"], "goodput": best["goodput"]}


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs > 0 else None


def verdict(found: Mapping[str, Any]) -> Iterator[str]:
    """Say in lines what `compare` has found."""
    for row in found["rates"]:
        gaps = (
            "no colocated engine has first tokens as early"
            if row["itl_p99_ratio"] is None
            else f"ITL p99 {row['itl_p99_ratio']:.2f} times shorter than {row['smoothest_as_early']}"
        )
        goodput = "-" if row["goodput_ratio"] is None else f"{row['goodput_ratio']:.2f}"
        wins = row["goodput_ratio"] is not None and row["goodput_ratio"] < 1
        planner = f"; the planner ends with {', '.join(row['planner'])}" if wins and row["planner"] else ""
        yield f"rate {row['rate']:g}: {gaps}; goodput {goodput} of {row['best_goodput']}{planner}"
    for name, best in found["feasible"].items():
        rate = "no rate" if best["rate"] is None else f"rate {best['rate']:g}, goodput {best['goodput']:.2f}/s"
        yield f"keeps to the SLO up to: {name}: {rate}"
    ratio = "unknown" if found["goodput_ratio"] is None else f"{found['goodput_ratio']:.2f}"
    yield f"goodput at the best such rate: {ratio} times that of {found['best_colocated']}"


def shown(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows to be laid side by side: ours, the planner's, and of the colocated engines the best by goodput
    and the smoothest."""
    own = [row["engine"] for row in rows if row["topology"] in (OURS, PLANNED)]
    rivals = [found["best_colocated"], *(one["smoothest_as_early"] for one in reversed(found["rates"]))]
    names = list(dict.fromkeys(filter(None, [*own, *rivals])))[:_MOST]
    return [next(row for row in rows if row["engine"] == name) for name in names]
