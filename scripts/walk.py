"""How far one prompt, one KV page and one batch line walk through the package: files entered, and changes of file.

    python scripts/walk.py --json walk.json
    python scripts/walk.py --package ../another-checkout

A walk is recorded with `sys.monitoring` in a process of its own, over a checkout that need not be this one: an engine
of `prefill=1,decode=1` on CPU devices, warmed up with another prompt and another line.

- **prompt**: one seeded prompt of forty words through `LLM.generate`, until its last page is freed. For each thread,
  the functions of the package are listed in the order in which the thread enters them or, if generators, resumes them.
  A change is where the next function of the list is in another file than the last; returning from a call is none.
  Counted separately are `calls`: functions entered from one in another file, which is the nearest one of the package on
  the thread's stack.
- **page**: the first page of that prompt, on the thread that dispatches. It is in a file where a function gets it by an
  argument, and in the caller's where a function gives it back; a change is where the next such place is in another
  file. A value has the page if its number stands in it under a name with "page" or "table", at most two attributes
  deep. The page is followed under its number on the prefill mesh and, behind the hand-off, on the decode mesh.
- **batch line**: one line through `engine.batch.run`, counted as the prompt is.

Files of the protocol, which both sides of the engine read, are counted apart, as if the others did not see them. Rooms
are the folders of `engine/`, and files that lie there by themselves; files of commit efd1214, which had no folders,
count for the room that they became.

Two runs give the same counts: threads are counted each by itself, and one that waits for devices goes on when all
others have come to rest. Nothing here is timed, and of the engine only the public interface is called.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any, NamedTuple

CALLER, DISPATCHING, OTHERS = "caller's thread", "dispatching thread", "other threads"
_DISPATCHING_THREAD = "twinmesh-dispatch"
# Nobody moves for this many seconds: all have come to rest.
_REST = 0.1
_PAGE, _TOKENS, _WORDS = 16, 8, 40
_VOCABULARY = "the of and river stone light morning house under green small walks long over water tree old road"
# Of efd1214: the files of the protocol, with the beginning of a name where only some of a file belongs to it.
_PROTOCOL_THEN = {
    "engine/protocol.py": ("",), "engine/submission.py": ("",), "engine/sampling_plan.py": ("",),
    "engine/request.py": ("Timeline.", "RequestFacts."),
    "engine/executor.py": ("StepResult.", "StepFailed.", "describe"),
}  # fmt: skip
_ROOMS_THEN = {
    "api": "llm async_llm owner frontend prompts outputs sampling_params resolve collect stream text stepping",
    "batch": "batch batch_run batch_order batch_input batch_lines batch_output batch_journal batch_identity "
    "batch_paths batch_result batch_parquet files",
    "core": "core live",
    "metrics": "metrics tally",
    "paging": "pages seat mesh_cache hashing",
    "protocol": "protocol submission sampling_plan",
    "sampling": "sampling logits logprobs request_state",
    "scheduler": "scheduler admission departures router request mesh_state decision_log",
    "sharding": "mesh tensor_parallel weights",
    "startup": "loader dtypes compilation links",
    "worker": "executor mesh_executor steps programs kv_cache handoff paged_attention waiter",
}
_ROOM_OF_FILE_THEN = {name: room for room, names in _ROOMS_THEN.items() for name in names.split()}


class Entry(NamedTuple):
    """The entry into a function of the package."""

    thread: str  # a role: CALLER, DISPATCHING or OTHERS
    source: str | None  # the file that it was called from; None: from no function of the package
    target: str  # the file that it is in
    is_protocol: bool = False


class Holding(NamedTuple):
    """A moment in which a function has pages: as an argument when it is entered, or as its result when it returns."""

    files: tuple[str, ...]  # the function's file; for a result, the caller's file after it, if known
    pages: frozenset[int]  # their numbers


# ---- counting


def count(entries: Iterable[Entry]) -> dict[str, Any]:
    """Count files in order of first entry, changes and entries, for each thread and for all, the caller's first.

    In the result, `entries` counts for each file the changes that lead there and the threads that begin there; `called`
    does so for `calls`.
    """
    of_thread: dict[str, list[Entry]] = {CALLER: [], DISPATCHING: [], OTHERS: []}
    for entry in entries:
        of_thread[entry.thread].append(entry)
    counts = {thread: _count(found) for thread, found in of_thread.items() if found}
    merged: dict[str, Any] = _sum(list(counts.values()))
    return merged | {"threads": counts}


def _count(entries: Sequence[Entry]) -> dict[str, Any]:
    walked = [entry for entry in entries if not entry.is_protocol]
    files = _changes(walked, lambda file: file)
    return {
        "files": list(dict.fromkeys(entry.target for entry in walked)),
        **files,
        "rooms": _changes(walked, room_of),
        "protocol": dict(Counter(entry.target for entry in entries if entry.is_protocol)),
    }


def _changes(entries: Sequence[Entry], place: Callable[[str], str]) -> dict[str, Any]:
    """Count changes and calls from place to place, where `place` turns a file into a place: itself, or its room."""
    places = [place(entry.target) for entry in entries]
    entered = [there for here, there in zip([None, *places], places, strict=False) if here != there]
    called = [place(e.target) for e in entries if e.source is not None and place(e.source) != place(e.target)]
    return {
        "changes": max(0, len(entered) - 1),
        "entries": dict(Counter(entered)),
        "calls": len(called),
        "called": dict(Counter(called)),
    }


def _sum(parts: Sequence[Any]) -> Any:
    """Add numbers, join lists without repeated items, and combine objects field by field."""
    first = parts[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _sum([part[name] for part in parts if name in part]) for name in names}
    return list(dict.fromkeys(chain(*parts))) if isinstance(first, list) else sum(parts)


def follow(holdings: Iterable[Holding], pages: frozenset[int]) -> list[str]:
    """Return the files that a page goes through, one after the other; `pages` are its numbers."""
    walk: list[str] = []
    for holding in holdings:
        if holding.pages & pages:
            walk += [file for file in holding.files if file not in walk[-1:]]
    return walk


def count_places(walk: Sequence[str]) -> dict[str, Any]:
    """Return what `count` does, for a way through files on one thread."""
    steps = [Entry(DISPATCHING, source, target) for source, target in zip([None, *walk], walk, strict=False)]
    return count(steps) | {"walk": list(walk)}


def room_of(file: str) -> str:
    """Return the room that a file belongs to: a folder of `engine/`, or of the package."""
    folder, *rest = file.split("/")
    if folder != "engine" or not rest:
        return folder.removesuffix(".py")
    if len(rest) > 1:
        return rest[0]
    name = rest[0].removesuffix(".py")
    return _ROOM_OF_FILE_THEN.get(name, name)


def is_protocol(file: str, name: str) -> bool:
    """Return whether a function of this qualified name is part of the protocol between the engine's halves."""
    return file.startswith("engine/protocol/") or any(map(name.startswith, _PROTOCOL_THEN.get(file, ())))


def pages_in(value: object, name: str = "", depth: int = 2) -> frozenset[int]:
    """Return the numbers of pages that a value called `name` has, at most `depth` attributes deep."""
    if isinstance(value, int) and not isinstance(value, bool):
        return frozenset({value} if name == "page" else ())
    found: set[int] = set()
    names = _fields(value)
    if names and depth:
        for field in names:
            found |= pages_in(getattr(value, field, None), field, depth - 1)
    elif not names and isinstance(value, list | tuple):
        is_named = "page" in name or "table" in name
        for item in value:
            if type(item) is int:
                found |= {item} if is_named else set()
            else:
                found |= pages_in(item, name, depth)
    return frozenset(found)


def _fields(value: object) -> Sequence[str]:
    """Return the names of an object's attributes; none for a value that is not of the package."""
    kind = type(value)
    if not kind.__module__.startswith("twinmesh"):
        return ()
    for names in ("_fields", "__struct_fields__"):
        if found := getattr(kind, names, ()):
            return tuple(found)
    return (*getattr(value, "__dict__", ()), *getattr(kind, "__slots__", ()))


# ---- recording


class Recorder:
    """A record of what the package's functions do between `start` and `stop`, on every thread."""

    def __init__(self, root: str) -> None:
        """Prepare to record functions of files in `root`, the package's folder."""
        self.entries: list[Entry] = []
        self.holdings: list[Holding] = []  # of the dispatching thread
        self.assigned: int | None = None  # the first number of the first pages that were given out
        self.scattered: int | None = None  # and of the first that were written from a transfer
        self._root, self._files = root.rstrip("/") + "/", dict[CodeType, str | None]()
        self._caller = threading.current_thread()
        self._lock, self._waiting = threading.Lock(), list[tuple[str, int]]()
        self._last = time.monotonic()

    def start(self) -> None:
        """Begin to record."""
        events, tool = sys.monitoring.events, sys.monitoring.PROFILER_ID
        sys.monitoring.use_tool_id(tool, "walk")
        sys.monitoring.register_callback(tool, events.PY_START, self._on_start)
        sys.monitoring.register_callback(tool, events.PY_RESUME, self._on_start)
        sys.monitoring.register_callback(tool, events.PY_RETURN, self._on_return)
        sys.monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.PY_RETURN)

    def stop(self) -> None:
        """Stop recording, once every thread has come to rest."""
        while self._waiting or time.monotonic() - self._last < 3 * _REST:
            time.sleep(_REST / 10)
        sys.monitoring.set_events(sys.monitoring.PROFILER_ID, sys.monitoring.events.NO_EVENTS)
        sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)

    def _file(self, code: CodeType) -> str | None:
        """Return the code's file, relative to the package; None if it is outside."""
        if code not in self._files:
            name = code.co_filename
            self._files[code] = name.removeprefix(self._root) if name.startswith(self._root) else None
        return self._files[code]

    def _on_start(self, code: CodeType, _: int) -> object:
        file = self._file(code)
        if file is None:
            return sys.monitoring.DISABLE
        thread, frame = threading.current_thread(), _frame_of(code)
        role = self._role(thread)
        if role == OTHERS:
            self._wait_for_rest(thread)
        self._last = time.monotonic()
        self.entries.append(Entry(role, self._source(frame.f_back), file, is_protocol(file, code.co_qualname)))
        if role == DISPATCHING:
            self._look_into(frame, file)
        return None

    def _on_return(self, code: CodeType, _: int, result: object) -> object:
        file = self._file(code)
        if file is None:
            return sys.monitoring.DISABLE
        self._last = time.monotonic()
        if self._role(threading.current_thread()) == DISPATCHING:
            # A list of numbers, and nothing else, may be pages; a tuple of them is most often something else.
            pages = pages_in(result, "pages" if isinstance(result, list) else "")
            source = self._source(_frame_of(code).f_back)
            if pages and not is_protocol(file, code.co_qualname):
                self.holdings.append(Holding((file,) if source is None else (file, source), pages))
        return None

    def _role(self, thread: threading.Thread) -> str:
        if thread is self._caller:
            return CALLER
        return DISPATCHING if thread.name == _DISPATCHING_THREAD else OTHERS

    def _source(self, frame: FrameType | None) -> str | None:
        """Return the file that calls: that of the nearest function of the package that is not the protocol's."""
        while frame is not None:
            file = self._file(frame.f_code)
            if file is not None and not is_protocol(file, frame.f_code.co_qualname):
                return file
            frame = frame.f_back
        return None

    def _wait_for_rest(self, thread: threading.Thread) -> None:
        """Wait until no thread has moved for a while; of several that wait, the first by name goes on."""
        me = (thread.name, threading.get_ident())
        with self._lock:
            self._waiting.append(me)
        while True:
            with self._lock:
                if min(self._waiting) == me and time.monotonic() - self._last > _REST:
                    self._waiting.remove(me)
                    self._last = time.monotonic()
                    return
            time.sleep(_REST / 10)

    def _look_into(self, frame: FrameType, file: str) -> None:
        """Record the pages that a function is given by its arguments."""
        code, values = frame.f_code, frame.f_locals
        pages: set[int] = set()
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            pages |= pages_in(values.get(name), name)
            self._note_numbers(values.get(name))
        if pages and not is_protocol(file, code.co_qualname):
            self.holdings.append(Holding((file,), frozenset(pages)))

    def _note_numbers(self, value: object) -> None:
        """Note the page's number on the prefill mesh and on the decode mesh, if this value is the first to hold it."""
        kind = type(value).__name__
        pages: Any = getattr(value, "pages", ())
        if kind == "AssignPages" and self.assigned is None:
            self.assigned = pages[0]
        elif kind == "Scatter" and self.scattered is None:
            self.scattered = pages[0][0]


def _frame_of(code: CodeType) -> FrameType:
    """Return the frame that runs this code, nearest first: in a callback, the one that the event is about."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    assert frame is not None
    return frame


def record(root: str, work: Callable[[], object]) -> Recorder:
    """Do the work and return a record of what the package does meanwhile."""
    recorder = Recorder(root)
    recorder.start()
    try:
        work()
    finally:
        recorder.stop()
    return recorder


def record_walks(model: str, scratch: Path) -> dict[str, Any]:
    """Record all three walks of the package that is imported as twinmesh. `scratch`: a folder for the batch's files."""
    import gc

    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    import twinmesh
    from twinmesh import LLM, SamplingParams
    from twinmesh.engine import batch

    root = twinmesh.__path__[0]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=_TOKENS, ignore_eos=True)

    def line(seed: int) -> Callable[[], object]:
        source, target = scratch / f"{seed}.in.jsonl", scratch / f"{seed}.out.jsonl"
        fields = {"messages": [{"role": "user", "content": prompt(seed)}], "max_tokens": _TOKENS, "seed": 1}
        source.write_text(json.dumps(fields) + "\n")
        return lambda: batch.run(llm, source, target, model=model)

    with LLM(
        model, topology="prefill=1,decode=1", dtype="float32", max_model_len=256, page_size=_PAGE, max_num_seqs=4,
        prefill_buckets=(64, 128), decode_buckets=(4,), kv_cache_bytes=128 << 20,
    ) as llm:  # fmt: skip
        llm.generate(prompt(1), params)
        line(2)()
        gc.disable()  # what is collected, and where, is no part of the walk
        one = record(root, lambda: llm.generate(prompt(3), params))
        two = record(root, line(4))
    numbers = frozenset(number for number in (one.assigned, one.scattered) if number is not None)
    if len(one.entries) == 0 or one.assigned is None or one.scattered is None:
        raise ValueError("the prompt's page was not seen: no function was given an AssignPages or a Scatter.")
    page = count_places(follow(one.holdings, numbers))
    return {"prompt": count(one.entries), "page": page, "batch line": count(two.entries)}


def prompt(seed: int) -> str:
    """Return a prompt of forty words, the same for the same seed."""
    return " ".join(Random(seed).choices(_VOCABULARY.split(), k=_WORDS))


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Walk through a checkout, print where the walks went and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[1], metavar="DIR", help="the checkout")
    parser.add_argument("--model", default="smollm2", metavar="NAME|PATH", help="the model (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here as well")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # of the process that records
    args = parser.parse_args(argv)
    if args.scratch:
        (args.scratch / "walks.json").write_text(json.dumps(record_walks(args.model, args.scratch)))
        return 0
    if not (args.package / "engine").is_dir():
        print(f"walk: {args.package} has no folder engine: give the root of a checkout of Twinmesh.", file=sys.stderr)
        return 2
    walks = walk(args.package, args.model)
    if walks is None:
        return 1
    print("\n\n".join(table(name, found) for name, found in walks.items()))
    if args.json:
        args.json.write_text(json.dumps(walks, indent=1) + "\n")
    return 0


def walk(package: Path, model: str) -> dict[str, Any] | None:
    """Return a checkout's counts, recorded in a process that imports it as twinmesh; None if that failed."""
    with tempfile.TemporaryDirectory(prefix="twinmesh-walk-") as scratch:
        (Path(scratch) / "path").mkdir()
        (Path(scratch) / "path" / "twinmesh").symlink_to(package.resolve())  # its folder may have any name
        path = Path(model)
        command = [sys.executable, "-P", __file__, "--model", str(path.resolve() if path.exists() else model)]
        settings = {"PYTHONPATH": f"{scratch}/path", "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([*command, "--scratch", scratch], env=os.environ | settings, check=False)
        if done.returncode:
            return None
        found: dict[str, Any] = json.loads((Path(scratch) / "walks.json").read_text())
        return found


def table(name: str, found: dict[str, Any]) -> str:
    """Return a walk as text: files in order of first entry, how often each was entered, and how often called."""
    files, entries, called = found["files"], found["entries"], found["called"]
    title = f"{name}: {len(files)} files, {found['changes']} changes from file to file, {found['calls']} calls"
    lines = [title, "  entered  called"]
    lines += [f"  {entries.get(file, 0):7}  {called.get(file, 0):6}  {file}" for file in files]
    rooms = found["rooms"]
    lines.append(f"  rooms: {rooms['changes']} changes, {rooms['calls']} calls")
    lines += [f"  {times:7}  {rooms['called'].get(room, 0):6}  {room}" for room, times in rooms["entries"].items()]
    lines.append(
        "  protocol, apart: " + (", ".join(f"{file} {n}" for file, n in found["protocol"].items()) or "nothing")
    )
    for thread, part in found["threads"].items():
        numbers = f"{len(part['files'])} files, {part['changes']} changes, {part['calls']} calls"
        lines.append(f"  {thread}: {numbers}")
    if "walk" in found:
        lines.append("  in order: " + " -> ".join(found["walk"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
