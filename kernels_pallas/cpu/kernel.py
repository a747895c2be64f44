"""A kernel's three functions, and the two that XLA and its threads call made of them.

A call is cut into pieces. The calling thread works on them, and so does each thread of XLA's pool that has time: a
task is put there for every thread but one of the mesh's share (`threads.py`), and takes pieces until none is left. A
call never waits for a task that has not begun, because the pool may be busy with another mesh for long; a task that
comes too late finds the job closed and leaves. So the job, in which both look, outlives the call: jobs stand in a ring
of the process, and one is used again when the last task that knows it has left.

Invariants: which thread does a piece changes no bit, because pieces write to places of their own; nothing is allocated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .frame import (
    API,
    API_VERSION,
    CONTEXT,
    DESTROY_ERROR,
    EXTENSION_TYPE,
    EXTENSIONS,
    METADATA,
    METADATA_TYPE,
    NUMBA,
    SCHEDULE,
    VERSION,
    add_at,
    argument,
    call,
    load,
    room,
    set_word,
    size,
    store,
    swap_at,
    word,
)
from .jobs import JOB_BYTES, JOBS, MOST_ROWS, PROCESS, PROCESS_WORDS, RING, TASK, THREADS, TURN

# A job's words, of `JOB_BYTES`. What is written often stands in cache lines of its own.
PAYLOAD = 24  # words at its start that a kernel's `setup` may use
_REQUEST = 24  # XLA_FFI_ThreadPool_Schedule_Args: size, extensions, context, task, its argument
_PIECES = 31
_NEXT = 32  # the next piece that nobody has taken
_ENTERED = 40  # tasks at work; and _CLOSED once nobody may enter any more
_KNOWN = 41  # the call, and tasks that have not left: 0 is a job that is free
_CLOSED = 1 << 32


class Kernel(NamedTuple):
    """What a kernel computes, as numba's functions of addresses."""

    setup: Any  # (frame, job) -> pieces of the call; may leave PAYLOAD words in the job
    work: Any  # (job, piece) -> None; computes one piece
    finish: Any  # (job) -> None; on the calling thread, after all pieces


@intrinsic
def process(typing: Any) -> Any:
    """Return the address of the words that belong to the process."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = ir.ArrayType(ir.IntType(64), PROCESS_WORDS)
        known = builder.module.globals.get(PROCESS)
        if known is None:
            known = ir.GlobalVariable(builder.module, words, PROCESS)
            known.linkage, known.initializer = "common", ir.Constant(words, None)
        return builder.ptrtoint(known, ir.IntType(64))

    return types.int64(), code


_job_on_stack = room(JOB_BYTES)


@njit(**NUMBA)
def threads(frame: int) -> int:
    """Return how many threads a call may use now; another number may be there the next time.

    A call over few rows, decode's, keeps to the share of its mesh. One over many may use all cores: it only takes the
    time that is left of them, as the threads of XLA's pool let others go first.
    """
    words = word(process(), THREADS)
    return load(words + 8 if size(argument(frame, 0), 0) > MOST_ROWS else words, types.int64)


@njit(**NUMBA)
def _claim() -> int:
    """Find a job of the ring that is free and make it the caller's; 0 if there is none."""
    ring, jobs = word(process(), RING), word(process(), JOBS)
    for _ in range(jobs):
        turn = add_at(word(process(), TURN), 1)
        job = ring + (turn % jobs) * JOB_BYTES
        if swap_at(job + _KNOWN * 8, 0, 1):
            return job
    return types.int64(0)


@njit(**NUMBA)
def _answer_version(frame: int) -> int:
    """Answer if XLA asks for the API's version, as it does once when the kernel is registered; 1 if so."""
    extension = load(frame + EXTENSIONS, types.int64)
    if extension == 0 or load(extension + EXTENSION_TYPE, types.int64) & 0xFFFFFFFF != METADATA_TYPE:
        return 0
    store(load(extension + METADATA, types.int64) + VERSION, types.int64(API_VERSION))
    return 1


@njit(**NUMBA)
def _ask_for_help(frame: int, job: int, tasks: int) -> None:
    """Put tasks for the job into XLA's pool."""
    api = load(frame + API, types.int64)
    if api == 0:
        return
    for _ in range(tasks):
        add_at(job + _KNOWN * 8, 1)
        set_word(job, _REQUEST, 40)
        set_word(job, _REQUEST + 1, 0)
        set_word(job, _REQUEST + 2, load(frame + CONTEXT, types.int64))
        set_word(job, _REQUEST + 3, word(process(), TASK))
        set_word(job, _REQUEST + 4, job)
        error = call(load(api + SCHEDULE, types.int64), job + _REQUEST * 8)
        if error != 0:  # there is no pool, and the error is ours to free
            set_word(job, _REQUEST, 24)
            set_word(job, _REQUEST + 2, error)
            call(load(api + DESTROY_ERROR, types.int64), job + _REQUEST * 8)
            add_at(job + _KNOWN * 8, -1)
            return


def entries(kernel: Kernel) -> dict[str, Callable[[int], int]]:
    """Make the C functions of a kernel: `handler`, which XLA calls with a frame, and `task`, with a job."""
    setup, work, finish = kernel

    @njit(**NUMBA)
    def run(job: int) -> None:
        pieces = word(job, _PIECES)
        while True:
            piece = add_at(job + _NEXT * 8, 1)
            if piece >= pieces:
                return
            work(job, piece)

    @njit(**NUMBA)
    def task(job: int) -> int:
        if add_at(job + _ENTERED * 8, 1) < _CLOSED:
            run(job)
        add_at(job + _ENTERED * 8, -1)
        add_at(job + _KNOWN * 8, -1)
        return types.int64(0)

    @njit(**NUMBA)
    def handler(frame: int) -> int:
        if _answer_version(frame):
            return types.int64(0)
        job = _claim()
        is_shared = job != 0
        if not is_shared:  # tasks of earlier calls still wait for a thread: this call works alone
            job = _job_on_stack()
        pieces = setup(frame, job)
        set_word(job, _PIECES, pieces)
        set_word(job, _NEXT, 0)
        set_word(job, _ENTERED, 0)
        if is_shared:
            _ask_for_help(frame, job, min(threads(frame), pieces) - 1)
        run(job)
        if is_shared:
            add_at(job + _ENTERED * 8, _CLOSED)
            while add_at(job + _ENTERED * 8, 0) != _CLOSED:  # a task that has begun: it is at its last piece
                pass
        finish(job)
        if is_shared:
            add_at(job + _KNOWN * 8, -1)
        return types.int64(0)

    return {"handler": handler, "task": task}
