"""Three hosts on one machine, as network namespaces with Ray over them: what happens to streams when links are cut.

    sudo .venv/bin/python scripts/ray_network.py --model smollm2 --json network.json

It makes a bridge and three namespaces, starts a Ray node in each (all with one token), and runs an engine of
`prefill=1,decode=1xtp1` meshes from the first: the driver with the prefill mesh, a decode mesh on each of the others.
Then, with streams running, case by case:

- `handoff`       nothing happens; KV crosses between hosts by the transfer server
- `cut_short`     the second host's link is down for `--short` seconds: nothing may be declared lost
- `cut_long`      down for `--long` seconds: its streams go on elsewhere meanwhile, and it rejoins afterwards
- `cut_one_way`   what the second host sends is lost for `--long` seconds, what is sent to it arrives
- `cut_driver`    the driver's own link is down for `--long` seconds
- `stopped`       the second host's worker is stopped (SIGSTOP) for `--long` seconds

Every stream is compared with what the same engine answered before. A row says whether tokens were the same, the longest
gap between two tokens, and how many workers were lost. It fails, with code 1, where tokens differ, a worker does not
come back, or one is lost by `handoff` or `cut_short`. Linux, iproute2 and root; it ends the processes that it started,
and nothing else.
"""

import argparse
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

_NAMES = ("twm-a", "twm-b", "twm-c")
_BRIDGE, _NET, _PORT = "twm-br", "10.231.7", 6399
_NOBODY = "02:00:00:00:00:99"
_CASES = ("handoff", "cut_short", "cut_long", "cut_one_way", "cut_driver", "stopped")
_TOPOLOGY = "prefill=1,decode=2"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the network, run the cases in it and print a line for each; returns the exit code."""
    args = _arguments(argv)
    if args.inside:
        return inside(args)
    why = _why_not()
    if why is not None:
        print(f"error: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has made is taken away
    with ExitStack() as opened:
        network(opened)
        environment = ray_nodes(opened)
        command = ["ip", "netns", "exec", _NAMES[0], sys.executable, os.path.abspath(__file__), "--inside"]
        driver = subprocess.Popen([*command, *(sys.argv[1:] if argv is None else argv)], env=environment)
        opened.callback(_end, driver)
        return driver.wait()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--short", type=float, default=2.0, help="seconds of a cut that nothing may notice")
    parser.add_argument("--long", type=float, default=30.0, help="seconds of a cut that costs a worker")
    parser.add_argument("--worker-timeout", type=float, default=5.0)
    parser.add_argument("--cases", default=",".join(_CASES), help="with commas")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _why_not() -> str | None:
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2's `ip`: install iproute2."
    if os.geteuid() != 0:
        return "only root makes network namespaces: run this with sudo."
    if shutil.which("ray", path=os.path.dirname(sys.executable)) is None:
        return "Ray is not installed beside this Python: pip install 'twinmesh[ray]'."
    return None


# ---- the network


def network(opened: ExitStack) -> None:
    """Make the bridge and the namespaces, each with an interface `eth0` and an address."""
    _ip("link", "add", _BRIDGE, "type", "bridge")
    opened.callback(_gone, "link", "del", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    for index, name in enumerate(_NAMES):
        _ip("netns", "add", name)
        opened.callback(_gone, "netns", "del", name)
        outside = f"{name}-v"
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        opened.callback(_gone, "link", "del", outside)  # at once: the namespace goes when its last process has
        _ip("link", "set", outside, "master", _BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{_NET}.{index + 1}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _gone(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=False)


def ray_nodes(opened: ExitStack) -> dict[str, str]:
    """Start Ray in every namespace; return the environment that its clients need."""
    folder = Path(tempfile.mkdtemp(prefix="twm-ray-"))
    opened.callback(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    ray = shutil.which("ray", path=os.path.dirname(sys.executable)) or "ray"
    of_all = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
    environment = os.environ | of_all
    for index, name in enumerate(_NAMES):
        address = f"{_NET}.{index + 1}"
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={folder / name}"]
        where = head if index == 0 else [f"--address={_NET}.1:{_PORT}"]
        more = [f"--node-ip-address={address}", "--num-cpus=2", "--disable-usage-stats", "--block"]
        start = [ray, "start", *where, *more]
        opened.callback(Node(["ip", "netns", "exec", name, *start], environment).close)
        # One after the other: they share a disk and so the folder of sockets, and of two that start at once one falls.
        sockets = folder / _NAMES[0] / "session_latest" / "sockets"
        _wait_for(lambda: len(list(sockets.glob("raylet*"))) > index, f"Ray's node {index}")  # noqa: B023
    return environment


class Node:
    """A Ray node that is started again when it ends, as the supervisor of a cluster does: Ray ends one that it has
    called dead as soon as it hears of it again."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment, self._is_closed = command, environment, threading.Event()
        self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """End it for good."""
        self._is_closed.set()
        _end(self._process)
        self._keeper.join()

    def _start(self) -> None:
        quiet, environment = subprocess.DEVNULL, self._environment
        self._process = subprocess.Popen(self._command, env=environment, stdout=quiet, stderr=quiet, process_group=0)

    def _keep(self) -> None:
        while not self._is_closed.is_set():
            self._process.wait()
            if not self._is_closed.wait(1.0):
                self._start()


def _wait_for(is_there: Any, what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} is not there after {seconds:g} s.")
        time.sleep(0.2)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process and what it has started: its own group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            (os.killpg if os.getpgid(process.pid) == process.pid else os.kill)(process.pid, number)
            process.wait(20)
    process.wait()


# ---- the cases, in the driver's namespace


class Disturbance:
    """What is done to the network or a worker while streams run, and undone again."""

    def __init__(self, case: str, args: argparse.Namespace) -> None:
        self.case = case
        self.seconds = {"handoff": 0.0, "cut_short": args.short}.get(case, args.long)

    def begin(self) -> None:
        """Begin it."""
        self._do("down", signal.SIGSTOP)

    def end(self) -> None:
        """Undo it."""
        self._do("up", signal.SIGCONT)

    def _do(self, state: str, number: signal.Signals) -> None:
        home = ["nsenter", f"--net=/proc/{os.getppid()}/ns/net"]  # where the bridge is
        if self.case in ("cut_short", "cut_long", "cut_driver"):
            name = _NAMES[0] if self.case == "cut_driver" else _NAMES[1]
            subprocess.run([*home, "ip", "link", "set", f"{name}-v", state], check=True)
        elif self.case == "cut_one_way":
            _misdirect(home, "replace" if state == "down" else "del")
        elif self.case == "stopped":
            for pid in _workers_in(_NAMES[1]):
                os.kill(pid, number)


def _misdirect(home: list[str], verb: str) -> None:
    """Have what the second host sends go to an Ethernet address that nobody has, or no more: lost on the wire, and
    its kernel does not know. Of every kernel's own; `netem` is not in all."""
    for index in (0, 2):
        where = ["to", f"{_NET}.{index + 1}", "dev", "eth0"]
        to = ["lladdr", _NOBODY, "nud", "permanent"] if verb == "replace" else []
        subprocess.run([*home, "ip", "-n", _NAMES[1], "neigh", verb, *where, *to], check=True)


def _workers_in(name: str) -> list[int]:
    """Find the actors of a namespace."""
    told = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True)
    found = []
    for pid in map(int, told.stdout.split()):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::WorkerActor"):
                found.append(pid)
    return found


def inside(args: argparse.Namespace) -> int:
    """Run the engine and the cases."""
    import ray
    from twinmesh import LLM

    ray.init(address=f"{_NET}.1:{_PORT}", log_to_driver=False)
    _wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == len(_NAMES), "a Ray node")
    hosts = ",".join(f"{_NET}.{index + 1}" for index in range(3))
    rows = []
    with LLM(
        args.model, topology=_TOPOLOGY, workers="ray", mesh_hosts=hosts,
        deterministic=True, worker_timeout=args.worker_timeout, max_model_len=args.tokens + 100,
    ) as llm:  # fmt: skip
        expected = streams(llm, args)[0]
        for case in args.cases.split(","):
            row = run_case(llm, Disturbance(case, args), args, expected)
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "args": vars(args), "rows": rows}))
    return 0 if all(map(is_right, rows)) else 1


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a case went as it is to."""
    may_lose = row["case"] not in ("handoff", "cut_short")
    return row["same_tokens"] and row["all_back_after_s"] is not None and (may_lose or not row["lost"])


def epochs(llm: Any) -> list[int]:
    """Return the epoch of each worker, another one after each loss."""
    found: list[int] = llm.engine.core.inspect(lambda _, executor: executor.crew.epochs())
    return found


def run_case(llm: Any, case: Disturbance, args: argparse.Namespace, expected: list[list[int]]) -> dict[str, Any]:
    """Run the streams through one disturbance; return what became of them."""
    begun, before = list[float](), epochs(llm)

    def disturb() -> None:
        begun.append(time.monotonic())
        case.begin()
        threading.Timer(case.seconds, case.end).start()

    got, times = streams(llm, args, disturb)
    over = begun[0] + case.seconds
    gaps = [max((b - a for a, b in itertools.pairwise(t)), default=0.0) for t in times]
    during = sum(begun[0] + args.worker_timeout + 1 < at < over for t in times for at in t)
    time.sleep(max(0.0, over - time.monotonic()))
    waited = until_all_serve(llm)
    lost = sum(now != then for then, now in zip(before, epochs(llm), strict=True))
    return {
        "case": case.case, "seconds": case.seconds, "same_tokens": got == expected, "lost": lost,
        "longest_gap_s": round(max(gaps), 2), "tokens_while_down": during, "all_back_after_s": waited,
    }  # fmt: skip


def until_all_serve(llm: Any, seconds: float = 240.0) -> float | None:
    """Wait until no mesh is gone; return for how long, None: one still is."""
    start = time.monotonic()
    while "gone" in str(llm.roles()):
        if time.monotonic() > start + seconds:
            return None
        time.sleep(0.2)
    return round(time.monotonic() - start, 1)


def streams(llm: Any, args: argparse.Namespace, disturb: Any = None) -> tuple[list[list[int]], list[list[float]]]:
    """Run all streams at once; call `disturb` when each has some tokens. Return tokens, and their times, by stream."""
    from twinmesh import SamplingParams

    tokens: list[list[int]] = [[] for _ in range(args.streams)]
    times: list[list[float]] = [[] for _ in range(args.streams)]
    running = threading.Barrier(args.streams + 1)

    def one(index: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens, min_tokens=args.tokens, ignore_eos=True)
        for delta in llm.stream(f"Count from {index} upwards: {index}, ", sampling):
            tokens[index] += delta.token_ids
            times[index].append(time.monotonic())
            if len(times[index]) == 10:
                running.wait()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(args.streams)]
    for thread in threads:
        thread.start()
    running.wait()
    if disturb is not None:
        disturb()
    for thread in threads:
        thread.join()
    return tokens, times


if __name__ == "__main__":
    sys.exit(main())
