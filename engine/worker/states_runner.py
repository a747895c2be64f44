"""Runs prompts through `states_step`: packs them into steps, and gives each prompt's hidden states, or logits, to the
host.

Prompts go in waves that fill the pool; a wave's chunks are packed into steps as the engine packs its own, and one step
is under way while the one before is read. What is compiled stays for the next call. It runs on a caller's thread;
whatever it dispatches passes through `dispatch`, which the thread that owns the devices calls.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from ..config import bucket_for
from ..errors import EngineError
from ..sharding.weights import Params
from .compile_program import compile_program
from .mesh_plan import MeshPlan
from .states_step import KV_LEN, LENGTH, TABLE

# Calls a function, which dispatches a program and returns (what is to be read, anything else), where the mesh's other
# programs are dispatched, and returns what it does.
type Dispatch = Callable[[Callable[[], tuple[Any, Any]]], tuple[Any, Any]]


class _Chunk(NamedTuple):
    """Tokens of one prompt in one step."""

    prompt: int
    start: int
    length: int


@dataclass(frozen=True)
class StatesRunner:
    """The programs of one mesh."""

    plan: MeshPlan
    programs: dict[tuple[Any, ...], Compiled]  # that were compiled so far

    def states(
        self, prompts: Sequence[np.ndarray], after: tuple[int, ...], params: Params, dispatch: Dispatch
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield each prompt's index and hidden states, in order: [n, E] for each of `after`, in the model's dtype.

        `prompts` are ids [n] int32.

        Raises:
            EngineError: the device has no memory for it, or the engine is closed.
        """
        if not prompts:
            return
        pages = self._pool_pages(max(map(len, prompts)))
        kv = self._run(dispatch, "states_pool", (pages,), ())[1]
        for first, last in self._waves([self._pages_of(len(prompt)) for prompt in prompts], pages):
            kv = yield from self._wave(prompts, range(first, last), after, params, dispatch, kv, pages)

    def logits(self, hidden: np.ndarray, params: Params, dispatch: Dispatch) -> np.ndarray:
        """Compute the logits [n, V] float32 of hidden states [n, E] after the final norm, a block at a time.

        Raises:
            EngineError: as `states` does.
        """
        blocks, rows = [], self.plan.config.scored_rows
        for start in range(0, len(hidden), rows):
            block = hidden[start : start + rows]
            padded = np.zeros((rows, hidden.shape[1]), hidden.dtype)
            padded[: len(block)] = block
            found, _ = self._run(dispatch, "logits", (rows,), (params, padded))
            blocks.append(_read(found)[: len(block)])
        return np.concatenate(blocks)

    def _wave(
        self,
        prompts: Sequence[np.ndarray],
        wave: range,
        after: tuple[int, ...],
        params: Params,
        dispatch: Dispatch,
        kv: Any,
        pages: int,
    ) -> Any:
        """Run prompts that the pool holds together; return the pool."""
        tables, free = dict[int, range](), 0
        for prompt in wave:
            count = self._pages_of(len(prompts[prompt]))
            tables[prompt] = range(free, free + count)
            free += count
        parts: dict[int, list[list[np.ndarray]]] = {prompt: [] for prompt in wave}
        under_way: tuple[list[_Chunk], Any] | None = None
        for chunks in (*self._steps(prompts, wave), None):
            before, under_way = under_way, None
            if chunks is not None:
                tokens, rows = self._inputs(prompts, chunks, tables, pages)
                states, kv = self._run(
                    dispatch, "states", (len(tokens), pages, after), (params, kv, tokens, rows), is_step=True
                )
                under_way = chunks, states
            if before is not None:
                yield from _finished(*before, parts, prompts)
        return kv

    def _steps(self, prompts: Sequence[np.ndarray], wave: range) -> Iterator[list[_Chunk]]:
        """Pack the prompts of a wave into steps, in order."""
        most, rows = self.plan.config.prefill_buckets[-1], self.plan.config.prefill_rows
        chunks, room = list[_Chunk](), most
        for prompt in wave:
            start, length = 0, len(prompts[prompt])
            while start < length:
                size = min(room, length - start)
                chunks.append(_Chunk(prompt, start, size))
                start, room = start + size, room - size
                if not room or len(chunks) == rows:
                    yield chunks
                    chunks, room = [], most
        if chunks:
            yield chunks

    def _inputs(
        self, prompts: Sequence[np.ndarray], chunks: list[_Chunk], tables: dict[int, range], pages: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lay a step out as `states_step` takes it."""
        config = self.plan.config
        tokens = np.zeros(bucket_for(sum(chunk.length for chunk in chunks), config.prefill_buckets), np.int32)
        rows = np.zeros((config.prefill_rows, TABLE + pages), np.int32)
        rows[:, TABLE:] = pages  # no page
        end = 0
        for row, (prompt, start, length) in zip(rows, chunks, strict=False):
            tokens[end : end + length] = prompts[prompt][start : start + length]
            row[LENGTH], row[KV_LEN] = length, start + length
            row[TABLE : TABLE + len(tables[prompt])] = tables[prompt]
            end += length
        return tokens, rows

    def _waves(self, counts: Sequence[int], pages: int) -> Iterator[tuple[int, int]]:
        """Cut prompts, which need so many pages each, into runs that the pool holds: the first, and past the last."""
        first, used = 0, 0
        for index, count in enumerate(counts):
            if used + count > pages:
                yield first, index
                first, used = index, 0
            used += count
        yield first, len(counts)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.plan.config.page_size)

    def _pool_pages(self, longest: int) -> int:
        """Choose the pool's size: a power of two that holds the longest prompt, and a step's tokens."""
        config = self.plan.config
        step = self._pages_of(config.prefill_buckets[-1]) + config.prefill_rows
        return 1 << (max(self._pages_of(longest), min(step, config.max_pages)) - 1).bit_length()

    def _run(
        self, dispatch: Dispatch, kind: str, size: tuple[Any, ...], arguments: tuple[Any, ...], is_step: bool = False
    ) -> tuple[Any, Any]:
        """Dispatch a program, which is compiled now if it was not before: what is to be read of it, and the rest."""
        if (kind, size) not in self.programs:
            self.programs[kind, size] = compile_program(self.plan, kind, *size)
        program: Any = self.programs[kind, size]

        def call() -> tuple[Any, Any]:
            made = program(*arguments)
            if is_step:
                kv, states = made
                for array in states:
                    array.copy_to_host_async()
                return states, kv
            return (made, None) if kind == "logits" else ((), made)

        with _as_sentence():
            return dispatch(call)


@contextmanager
def _as_sentence() -> Iterator[None]:
    """Say in a sentence that the device's memory did not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise EngineError(
            "The device has no memory left for a step beside the engine's own: give fewer layers or shorter prompts, "
            "or start the engine with a smaller memory_fraction or kv_cache_bytes."
        ) from error


def _read(array: Any) -> np.ndarray:
    with _as_sentence():
        return np.asarray(array)


def _finished(
    chunks: list[_Chunk], states: Any, parts: dict[int, list[list[np.ndarray]]], prompts: Sequence[np.ndarray]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Read a step; yield the prompts that it ends."""
    arrays, end = [_read(array) for array in states], 0
    for prompt, start, length in chunks:
        parts[prompt].append([array[end : end + length] for array in arrays])
        end += length
        if start + length == len(prompts[prompt]):
            pieces = parts.pop(prompt)
            yield prompt, [np.concatenate(of_layer) for of_layer in zip(*pieces, strict=True)]
