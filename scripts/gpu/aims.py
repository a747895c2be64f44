"""Compares the results of `gpu_suite.py` with the aims for an H100: a pure function of its report. No JAX.

Each aim is {"aim": the least value, "found": the worst of the rows it concerns, "row": that row's name, "met": bool},
with None for values that were not measured.
"""

from collections.abc import Callable, Iterator

from twinmesh.scripts.gpu.facts import Facts

DECODE_OF_COPY, PREFILL_TFLOP = 0.85, {"x128p": 550.0, "x64p": 420.0}
OF_FLOOR, PREFILL_OF_MATMUL, OF_DENSE_RATE = 0.75, 0.55, 0.9


def aims(report: Facts) -> dict[str, Facts]:
    """Compute every aim, by name."""
    decode, prefill = (report.get(name, {}).get("rows", {}) for name in ("decode", "prefill"))
    steps, transformers = report.get("steps", {}), report.get("transformers", {})
    experts = {name: row for name, row in report.get("experts", {}).get("rows", {}).items() if name.startswith("MXFP4")}
    dense = {name: row for name, row in prefill.items() if name.endswith((" 8k", " 16k"))}
    chunks = {name: row for name, row in prefill.items() if " of " in name}
    prompt = {"prefill": steps["prefill"]} if "prefill" in steps else {}
    found = {
        "decode of copy bandwidth": _aim(DECODE_OF_COPY, decode, lambda row: row["of_copy"]),
        "decode over the best peer": _aim(1.0, decode, _best_ratio),
        "prefill over the best dense peer": _aim(1.0, dense, _best_ratio),
        "chunk of the dense rate": _aim(OF_DENSE_RATE, chunks, lambda row: row.get("of_dense_rate")),
        "decode step of its floor": _aim(OF_FLOOR, steps.get("decode", {}), lambda row: row["of_floor"]),
        "prefill step of matmul rate": _aim(PREFILL_OF_MATMUL, prompt, lambda row: row["of_matmul"]),
        "decode step of gpt-oss of its floor": _aim(
            OF_FLOOR, report.get("steps_gpt_oss", {}).get("decode", {}), lambda row: row["of_floor"]
        ),
        "experts in MXFP4 over the floor in 16 bits": _aim(
            1.0, experts, lambda row: row["bfloat16_floor_us"] / row["us"]
        ),
        "decode step over transformers": _aim(1.0, dict(_over(steps, transformers)), lambda row: row["ratio"]),
    }
    for heads, rate in PREFILL_TFLOP.items():
        rows = {name: row for name, row in dense.items() if heads in name}
        found[f"prefill TFLOP/s of {heads[1:-1]}"] = _aim(rate, rows, lambda row: row["tflop_s"])
    return found


def graphs(report: Facts) -> Facts:
    """Compare a decode step's milliseconds with and without XLA's command buffers, by number of rows."""
    with_, without = (report.get(name, {}).get("decode", {}) for name in ("steps", "steps_without_graphs"))
    return {
        rows: {"ms": with_[rows]["ms"], "ms_without": row["ms"], "saved_ms": row["ms"] - with_[rows]["ms"]}
        for rows, row in without.items()
        if rows in with_
    }


def _aim(least: float, rows: dict[str, Facts], value: Callable[[Facts], float | None]) -> Facts:
    done = {name: row for name, row in rows.items() if "failed" not in row}
    values = {name: found for name, row in done.items() if (found := value(row)) is not None}
    if not values:
        return {"aim": least, "found": None, "row": None, "met": None}
    worst = min(values, key=lambda name: values[name])
    return {"aim": least, "found": round(values[worst], 3), "row": worst, "met": values[worst] >= least}


def _best_ratio(row: Facts) -> float | None:
    ratio: float | None = row["peers"]["best_ratio"]
    return ratio


def _over(steps: Facts, transformers: Facts) -> Iterator[tuple[str, Facts]]:
    """Yield the batches that both ran, with transformers' time of a step over ours."""
    for rows, peer in (transformers.get("decode") or {}).items():
        ours = steps.get("decode", {}).get(rows)
        if ours is not None and peer.get("ms"):
            yield rows, {"ratio": peer["ms"] / ours["ms"]}
