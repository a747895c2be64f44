"""The texts that the commands print when they are done: answers and figures. Pure functions of results."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.api.outputs import RequestOutput
from twinmesh.engine.batch.request_lines import BatchRequest
from twinmesh.engine.batch.summary import BatchResult
from twinmesh.engine.metrics.distribution import Distribution
from twinmesh.engine.metrics.metrics import Latencies

if TYPE_CHECKING:
    from twinmesh.engine.simulation.logs.replay import Replay

WIDTH = 100


def outcome(result: BatchResult, output: str | Path) -> str:
    """Return a sentence each for what was written, what was there before, and what failed."""
    text = f"Wrote {count(result.finished - result.resumed, 'result')} to {output}."
    if result.resumed:
        text += f" {count(result.resumed, 'result')} {'was' if result.resumed == 1 else 'were'} there already."
    if result.mended:
        were = "was" if result.mended == 1 else "were"
        text += f" {count(result.mended, 'damaged line')} {were} taken out of it first, and what was missing was run."
    if result.failed:
        text += f" {count(result.failed, 'line')} could not be run: see 'error' in the output."
    return text


def answers(result: BatchResult) -> str:
    """Return the prompts that were kept, each with its answer below."""
    return "\n".join(f"\n{_wrap(_question(request), '> ')}\n{_wrap(_text(output))}" for request, output in result.kept)


def latency_table(result: BatchResult) -> str:
    """Return a table of the latencies that callers saw, and the rate of the whole run."""
    requests, tokens = count(result.succeeded, "request"), count(result.completion_tokens, "token")
    rate = f"{requests}, {tokens} in {result.seconds:.1f} s: {result.tokens_per_second:.0f} tokens/s"
    return f"\n{percentiles(Latencies.of(result.timelines))}\n\n{rate}"


def percentiles(latencies: Latencies) -> str:
    """Return a table of median and p99 of the latencies that callers saw, as far as they were measured."""
    rows: list[tuple[str, Distribution | None, str]] = [
        ("TTFT", latencies.ttft, "arrival to first token, waiting for a free slot included"),
        ("TPOT", latencies.tpot, "each token after the first"),
        ("hand-off", latencies.handoff, "first token to KV arrived at the decode mesh"),
    ]
    lines = [f"{'':10}{'p50':>10}{'p99':>10}"]
    lines += [f"{name:10}{_ms(p.p50):>10}{_ms(p.p99):>10}   {what}" for name, p, what in rows if p is not None]
    return "\n".join(lines)


def replayed(name: str | Path, replay: "Replay") -> str:
    """Return the summary of a replayed run: what it did, and the latencies that it had."""
    counters, ended = replay.scheduler.counters, replay.ended
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(ended.reasons.items()))
    missed = ", ".join(f"{number:,} {reason}" for reason, number in counters.missed_tokens.items() if number)
    lines = [
        f"Replayed {name}: {count(replay.events, 'event')}, {count(replay.decisions, 'decision')}, all the same.",
        f"{count(ended.reasons.total(), 'request')} ended{f' ({reasons})' if reasons else ''}, "
        f"{len(replay.scheduler.requests):,} still running.",
        f"{count(counters.prompt_tokens, 'prompt token')}, {counters.cached_tokens:,} of them cached"
        f"{f' ({missed})' if missed else ''}; "
        f"{ended.generated_tokens:,} generated.",
        f"{count(counters.preemptions, 'preemption')}, {count(counters.migrations, 'migration')}, "
        f"{counters.retries:,} retried after a failure.",
    ]
    return "\n".join([*lines, *([f"\n{percentiles(Latencies.of(ended.recent))}"] if ended.recent else [])])


def one_line(output: RequestOutput) -> str:
    """Return the figures of one request in one line, which says too if the token limit cut the answer off."""
    completion, timeline = output.outputs[0], output.timeline
    parts = [count(len(completion.token_ids), "token")]
    if timeline.ttft is not None:
        parts.append(f"first after {_ms(timeline.ttft)}")
    if timeline.tpot:
        parts.append(f"then {1 / timeline.tpot:.0f} tokens/s")
    if completion.finish_reason == "length":
        parts.append("cut off by --max-tokens")
    return f"[{', '.join(parts)}]"


def _question(request: BatchRequest) -> str:
    if request.messages is not None:
        return str(request.messages[-1].get("content", ""))
    return request.prompt if isinstance(request.prompt, str) else f"{request.prompt}"


def _text(output: RequestOutput) -> str:
    return output.outputs[0].text.strip()


def _wrap(text: str, lead: str = "  ") -> str:
    lines = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, WIDTH) or [""]]
    return "\n".join((lead if i == 0 else "  ") + line for i, line in enumerate(lines))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds < 0.1 else 0}f} ms"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 token", "2,000 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
