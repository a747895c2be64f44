"""What `belief.py` makes of its runs: errors, the best topology, coverage, a table, and what has grown since earlier.

A figure is a percentile of TTFT or TPOT, or tokens per second. Its error is predicted / measured - 1, where measured is
the median over the runs, and its spread is (largest - smallest) / median of the same runs: an error below the spread of
the real engine says nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

# Aims: how far from measured a prediction may be, by percentile; and how much worse the topology may be that the
# simulation chooses than the one that was best.
AIMS = {"p50": 0.10, "p90": 0.25, "p99": 0.25, "tokens/s": 0.10}
REGRET = 0.03
# An error has grown if it did by both.
GROWN_POINTS, GROWN_RATIO = 0.02, 1.10

# What a topology is chosen by: less is better.
CRITERIA = ("ttft p50", "ttft p99", "tpot p50", "tpot p99", "e2e p50", "e2e p99")
type Figures = Mapping[str, float]


def compare(predicted: Figures, runs: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Hold predicted figures against those of real runs of the same load."""
    rows = {}
    for name, value in predicted.items():
        seen = [run[name] for run in runs]
        middle = median(seen)
        rows[name] = {
            "predicted": value,
            "measured": middle,
            "error": value / middle - 1,
            "spread": (max(seen) - min(seen)) / middle,
        }
    return rows


def aim_of(name: str) -> float:
    """Return how far from measured a figure may be."""
    return AIMS[name.split()[-1]]


def coverage(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of figures of single real runs that lie within the aim of what was predicted, and within the
    range that simulations with noisy step times span, or either."""
    within_aim = within_range = either = count = 0
    for point in points:
        for name, row in point["figures"].items():
            low, high = point["range"][name]
            for run in point["runs"]:
                aim = abs(row["predicted"] / run[name] - 1) <= aim_of(name)
                inside = low <= run[name] <= high
                within_aim, within_range, either = within_aim + aim, within_range + inside, either + (aim or inside)
                count += 1
    return {"of_aim": within_aim / count, "of_range": within_range / count, "of_either": either / count}


def regrets(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose the best topology of each mix and load by what was predicted, and say how much worse it was than the best.

    Points with flips are no choice of a topology, and loads of which only one topology was measured give none.
    """
    loads = defaultdict(list)
    for point in points:
        if not point["flips"]:
            loads[point["mix"], point["load"]].append(point)
    rows = []
    for (mix, load), rivals in loads.items():
        if len(rivals) < 2:
            continue
        for criterion in CRITERIA:
            ranked = [
                sorted(rivals, key=lambda p: float(p["figures"][criterion][by])) for by in ("predicted", "measured")
            ]
            chosen, best = ranked[0][0], ranked[1][0]
            rows.append(
                {
                    "mix": mix,
                    "load": load,
                    "criterion": criterion,
                    "predicted_order": [point["engine"] for point in ranked[0]],
                    "measured_order": [point["engine"] for point in ranked[1]],
                    "regret": chosen["figures"][criterion]["measured"] / best["figures"][criterion]["measured"] - 1,
                }
            )
    return rows


def summarise(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the points up: errors by figure, how many keep to the aim, regret and coverage."""
    figures = {}
    for name in points[0]["figures"]:
        rows = [point["figures"][name] for point in points]
        errors = sorted(abs(row["error"]) for row in rows)
        figures[name] = {
            "mean_error": sum(errors) / len(errors),
            "worst_error": errors[-1],
            "mean_spread": sum(row["spread"] for row in rows) / len(rows),
            "met": sum(error <= aim_of(name) for error in errors),
        }
    chosen = regrets(points)
    return {
        "points": len(points),
        "figures": figures,
        "coverage": coverage(points),
        "regret": {"mean": _mean(row["regret"] for row in chosen), "rows": chosen} if chosen else None,
    }


def grown(points: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the points that earlier results have and these lack, and the errors that have grown since."""
    found, now = [], {point["name"]: point for point in points}
    for before in earlier:
        name = before["name"]
        if name not in now:
            found.append(f"{name}: the point has disappeared")
            continue
        for figure, row in before["figures"].items():
            after = now[name]["figures"].get(figure)
            if after is None:
                found.append(f"{name}: {figure} has disappeared")
                continue
            was, is_ = abs(row["error"]), abs(after["error"])
            if is_ - was > GROWN_POINTS and is_ > GROWN_RATIO * was:
                found.append(f"{name}: the error of {figure} has grown from {was:.1%} to {is_:.1%}")
    return found


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """Write a line for each point and figure, and one for where its time goes."""
    lines = []
    for point in points:
        lines.append(
            f"{point['name']}: {point['requests']} requests at {point['rate']:.3g}/s, {len(point['runs'])} runs"
        )
        for name, row in point["figures"].items():
            unit, scale = ("tokens/s", 1.0) if name == "tokens/s" else ("ms", 1e3)
            verdict = "" if abs(row["error"]) <= aim_of(name) else "  missed"
            lines.append(
                f"  {name:10} predicted {scale * row['predicted']:9.1f}  measured {scale * row['measured']:9.1f} "
                f"{unit:8}  "
                f"error {row['error']:+7.1%}  spread {row['spread']:6.1%}{verdict}"
            )
        parts = "  ".join(
            f"{name} {1e3 * row['predicted']:.1f}/{1e3 * row['measured']:.1f}" for name, row in point["parts"].items()
        )
        lines.append(f"  mean ms, predicted/measured: {parts}")
    return "\n".join(lines)


def summary(found: Mapping[str, Any]) -> str:
    """Write what the points come to."""
    count = found["points"]
    lines = [
        f"{name:10} mean error {row['mean_error']:6.1%}  worst {row['worst_error']:6.1%}  spread of the engine "
        f"{row['mean_spread']:6.1%}  within {aim_of(name):.0%}: {row['met']} of {count}"
        for name, row in found["figures"].items()
    ]
    covered = found["coverage"]
    lines.append(
        f"coverage: {covered['of_aim']:.0%} of measured figures within the aim of what was predicted, "
        f"{covered['of_range']:.0%} within the range of noisy simulations, {covered['of_either']:.0%} in either"
    )
    if found["regret"] is not None:
        rows = found["regret"]["rows"]
        same = sum(row["predicted_order"][0] == row["measured_order"][0] for row in rows)
        worst = max(rows, key=lambda row: float(row["regret"]))
        lines.append(
            f"regret of the chosen topology: mean {found['regret']['mean']:.1%} (aim {REGRET:.0%}), the best was "
            f"chosen in {same} of {len(rows)}; worst {worst['regret']:.1%}: {worst['mix']} {worst['load']:g} by "
            f"{worst['criterion']}, chosen {worst['predicted_order'][0]}, best {worst['measured_order'][0]}"
        )
    return "\n".join(lines)


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))
