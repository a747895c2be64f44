"""Checks correctness on this machine's GPU, for `gpu_suite.py`: kernels, the append, hand-off, pytest's GPU tests.

Attention is compared with plain XLA in float32 on the same rounded inputs, which the tests compare with the oracle. An
error is the largest of |ours - wanted| / |wanted| over rows and heads, so that a long request's error is not averaged
with those of short ones. Rounding weights and output costs about half the dtype's epsilon, the GPU's tanh up to 2**-11
of a logit, and LIMITS allow for a little more than that. Unused slots and pages hold NaN, tables end in ids that are
out of range, a second call, in memory poisoned with NaN, has to give the same bits, and rows without visible tokens
have to be zero.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.kernels_pallas import xla
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import append_kv, paged_decode_attention, paged_prefill_attention
from twinmesh.kernels_pallas.work import ceil_div
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import Heads, attempt, pool, queries

LIMITS = {"bfloat16": 1e-2, "float16": 4e-3}
THREADS = 4  # cases at a time: most of their time is compiling, which releases the GIL
CHUNK = 600  # rows of prefill for one request, at most
TIGHT = 11  # pages for four requests of up to six each, so that some are preempted


@dataclass(frozen=True)
class Case:
    """The settings of one comparison of both kernels."""

    heads: Heads
    dtype: str
    options: Facts = field(default_factory=dict)  # of the attentions, with `sink` as a flag
    longest: int = 4097  # tokens of the longest request

    def __str__(self) -> str:
        """Return the case's name in the report."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.heads} {self.dtype} {self.longest} {options}".strip()


_ALL = {"window": 100, "softcap": 20.0, "sink": True}
CASES = (
    Case(Heads(32, 8, 128), "bfloat16"),
    Case(Heads(64, 8, 64), "bfloat16", {"window": 128, "sink": True}),  # GPT-OSS
    Case(Heads(8, 4, 256), "bfloat16", {"window": 1024, "softcap": 50.0}),
    Case(Heads(16, 1, 128, 16), "float16", _ALL),
    Case(Heads(32, 8, 128), "bfloat16", longest=131072),
    Case(Heads(64, 8, 64, 16), "float16"),
    Case(Heads(16, 8, 256, 128), "float16", {"sink": True}),
    Case(Heads(32, 2, 64, 128), "bfloat16", {"softcap": 30.0}),
    Case(Heads(32, 8, 128, 32), "float16", {"window": 1}),
    Case(Heads(8, 8, 128, 128), "bfloat16", _ALL),
    Case(Heads(16, 1, 256, 32), "bfloat16", {"window": 100, "sink": True}),
    Case(Heads(9, 3, 64, 32), "bfloat16", _ALL),
    Case(Heads(16, 1, 256, 16), "float16", _ALL),
    Case(Heads(64, 8, 64), "float16", {"window": 128, "softcap": 20.0}, 131072),
)


class Inputs(NamedTuple):
    """The arguments of both attentions."""

    q_decode: Array  # [R, Hq, D]
    q_prefill: Array  # [T, Hq, D]
    k_pages: Array  # [N, P, Hk, D]
    v_pages: Array  # [N, P, Hk, D]
    page_table: Array  # [R, max_pages]
    kv_len: Array  # [R]
    q_start: Array  # [R + 1]


def checks(scale: float) -> Iterator[Facts]:
    """Run all checks, and yield `failed` if something is wrong."""
    wrong: list[str] = []
    cases = CASES[: max(2, round(len(CASES) * scale))]
    with ThreadPoolExecutor(THREADS) as threads:
        runs = threads.map(lambda case: attempt(lambda: attention_errors(case, scale)), cases)
        for case, errors in zip(cases, runs, strict=True):
            if "failed" in errors:
                errors = {str(case): errors["failed"]}
            yield {"errors": errors}
            wrong += [f"{name}: {error}" for name, error in errors.items() if not is_right(error, case.dtype)]
    for name, found in (("append", append_facts), ("handoff", handoff_facts), ("pytest", pytest_facts)):
        facts = attempt(partial(found, scale))
        yield {name: facts}
        if "failed" in facts:
            wrong.append(f"{name}: {facts['failed']}")
    if wrong:
        yield {"failed": "; ".join(wrong)}


def is_right(error: float | str, dtype: str) -> bool:
    """Return whether an error is within the dtype's limit; NaN and an error in words are not."""
    return not isinstance(error, str) and error <= LIMITS[dtype]


def attention_errors(case: Case, scale: float) -> dict[str, float | str]:
    """Measure the errors of decode and prefill, in words where two runs differ, for NaN, and for missing zeros."""
    heads, settings = case.heads, {"window": None, "softcap": None, **case.options}
    settings["scale"] = heads.dim**-0.5
    settings["sink"] = jnp.linspace(-2.0, 2.0, heads.query) if settings.get("sink") else None
    inputs = make_inputs(case, scale)
    cache = inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.kv_len
    found: dict[str, float | str] = {}
    for kernel, plain, arrays in (
        (paged_decode_attention, xla.paged_decode_attention, (inputs.q_decode, *cache)),
        (paged_prefill_attention, xla.paged_prefill_attention, (inputs.q_prefill, *cache, inputs.q_start)),
    ):
        found[f"{kernel.__name__} {case}"] = _error(
            partial(kernel, **settings), partial(_bundled, plain, settings), arrays
        )
    return found


def _bundled(attention: Any, settings: dict[str, Any], q: Array, *arrays: Array) -> Array:
    """Call one of the package's implementations with the arguments of its public functions."""
    out: Array = attention(q, PagedKV(*arrays[:4]), *arrays[4:], options=AttentionOptions(**settings))
    return out


def make_inputs(case: Case, scale: float) -> Inputs:
    """Make requests around page boundaries, empty ones, a long one, and one that shares the long one's first pages."""
    heads, size, dtype = case.heads, case.heads.page_size, jnp.dtype(case.dtype)
    longest = max(2 * size + 1, int(scale * case.longest))
    lengths = [size - 1, size, size + 1, 0, 1, 2 * size - 1, 2 * size, 2 * size + 1, longest, longest - size, 0]
    chunks = [size - 1, 1, size + 1, 0, 1, 0, size, 2, min(longest, CHUNK), min(longest - size, 130), 3]
    used = [ceil_div(length, size) for length in lengths]
    random = np.random.default_rng(0)
    pages = sum(used) + 5  # some of which no request holds
    ids = iter(random.permutation(pages))
    table = np.where(random.random((len(lengths), max(used) + 2)) < 0.5, pages, 2**31 - 1).astype(np.int32)
    held = np.zeros((pages, size), bool)
    for row, (count, length) in enumerate(zip(used, lengths, strict=True)):
        table[row, :count] = [next(ids) for _ in range(count)]
        if row == 9:
            table[row, : length // size] = table[8, : length // size]
        held[table[row, :count]] |= np.arange(count * size).reshape(count, size) < length
    poison = jax.jit(lambda x: jnp.where(held[..., None, None], x, jnp.nan).astype(dtype))
    k_pages, v_pages = (poison(pool(heads, pages, seed)) for seed in range(2))
    rows = sum(chunks) + 13  # some of them padding
    q_decode, q_prefill = (queries(heads, count).astype(dtype) for count in (len(lengths), rows))
    starts = np.cumsum([0, *chunks])
    return Inputs(q_decode, q_prefill, k_pages, v_pages, *(jnp.asarray(x, jnp.int32) for x in (table, lengths, starts)))


def _error(kernel: Any, plain: Any, arrays: tuple[Array, ...]) -> float | str:
    run = jax.jit(kernel)
    first = np.asarray(run(*arrays), np.float64)  # compiles, which takes memory and gives it back
    # The next allocation may reuse this memory, so that an element that is never written shows as NaN.
    jax.block_until_ready([jnp.full_like(arrays[0], jnp.nan) for _ in range(4)])
    if not np.array_equal(first, np.asarray(run(*arrays), np.float64), equal_nan=True):
        return "a second run, in memory full of NaN, gave other bits"
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    with jax.default_matmul_precision("highest"):
        error = distance(first, np.asarray(jax.jit(plain)(*wide), np.float64))
    return error if np.isfinite(error) else "NaN, or not zero where nothing is visible"


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Compute the largest relative distance over rows and heads; infinite for NaN and for missing zeros."""
    norms = np.linalg.norm(want, axis=-1)
    if not np.isfinite(got).all() or got[norms == 0].any():
        return float("inf")
    off = np.linalg.norm(got - want, axis=-1)
    return float(np.max(off[norms > 0] / norms[norms > 0], initial=0.0))


def append_facts(scale: float) -> Facts:
    """Check that keys and values are written into their slots, padding is not, and donated pools are not copied."""
    heads = Heads(32, 8, 128)
    pages = max(16, int(4096 * scale))
    slots, tokens = pages * heads.page_size, 333
    k_pages, v_pages = (pool(heads, pages, seed) for seed in range(2))
    slot = np.random.default_rng(0).permutation(slots)[:tokens].astype(np.int32)
    slot[5], slot[100] = slots, 2**31 - 1
    kept = slot < slots
    k, v = (pool(heads, 6, seed).reshape(-1, heads.kv, heads.dim)[:tokens] for seed in (2, 3))
    # From a copy, because a pool that NumPy has a view of is not donated.
    want = [np.array(x.astype(jnp.float32)).reshape(slots, heads.kv, heads.dim) for x in (k_pages, v_pages)]
    for pool_, new in zip(want, (k, v), strict=True):
        pool_[slot[kept]] = np.asarray(new, np.float32)[kept]
    before, peak = [x.unsafe_buffer_pointer() for x in (k_pages, v_pages)], _peak()
    append = jax.jit(append_kv, donate_argnums=(0, 1)).lower(k_pages, v_pages, k, v, jnp.asarray(slot)).compile()
    made = jax.block_until_ready(append(k_pages, v_pages, k, v, jnp.asarray(slot)))
    facts: Facts = {
        "in_place": [x.unsafe_buffer_pointer() for x in made] == before,
        "right": all(map(np.array_equal, (np.asarray(x, np.float32).reshape(slots, *k.shape[1:]) for x in made), want)),
        "peak_bytes_added": None if peak is None else (_peak() or 0) - peak,
    }
    return facts if facts["in_place"] and facts["right"] else facts | {"failed": "not in place, or not right"}


def _peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def handoff_facts(scale: float) -> Facts:
    """Check that a random model in bfloat16 gives the same greedy tokens on one mesh and on two.

    The two are a prefill and a decode mesh that share the device. Prompts of several chunks, and pools so small that
    requests are preempted, must change no token either.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # run from a clone: the tests' tiny model
    from helpers.tiny_gguf import TinyLlama, write_tiny_gguf  # type: ignore[import-not-found, unused-ignore]

    with tempfile.TemporaryDirectory() as folder:
        model = TinyLlama(hidden=256, inner=256, heads=4, kv_heads=2, head_dim=64)
        path = write_tiny_gguf(Path(folder) / "tiny.gguf", model)
        one, _ = _tokens(path, "both=1", 1, 2**28)
        two, _ = _tokens(path, "prefill=1,decode=1", 2, 2**28)
        small, preemptions = _tokens(path, "both=1", 1, TIGHT * 64 * _token_bytes(model))
    facts: Facts = {"split": one == two, "preempted": one == small, "preemptions": preemptions}
    wrong = [f"tokens differ ({name})" for name in ("split", "preempted") if not facts[name]]
    wrong += [] if preemptions else ["no request was preempted"]
    return facts | ({"failed": ", ".join(wrong)} if wrong else {})


def _token_bytes(model: Any) -> int:
    return int(2 * 2 * model.layers * model.kv_heads * model.head_dim)


def _tokens(path: Path, topology: str, count: int, kv_cache_bytes: int) -> tuple[list[list[int]], int]:
    """Generate the tokens of some prompts, and count how often a request was preempted."""
    from twinmesh import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    prompts = [[7 + (i * 31 + j) % 250 for j in range(length)] for i, length in enumerate((5, 64, 65, 200, 127, 300))]
    with LLM(
        path, topology=topology, devices=jax.devices()[:1] * count, dtype="bfloat16", max_model_len=512,
        max_num_seqs=4, prefill_buckets=(128,), decode_buckets=(4,), deterministic=True, kv_cache_bytes=kv_cache_bytes,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params)
        return [list(output.outputs[0].token_ids) for output in outputs], llm.metrics().preemptions


def pytest_facts(scale: float) -> Facts:
    """Run the tests marked `gpu` in a process of their own, if pytest is installed."""
    root = Path(__file__).parents[2]
    if importlib.util.find_spec("pytest") is None:
        return {"summary": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr.strip()[-200:]]
    return {"summary": lines[-1]} | ({"failed": lines[-1]} if done.returncode else {})
