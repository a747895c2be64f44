"""The options of an engine, each said once: name, type, default and what it means. No JAX here.

`LLM` and `AsyncLLM` get their signature from here (`with_options`), the commands their arguments
(`scripts/arguments.py`), and the reference its table (`as_table`). Invariant: an `EngineOptions` holds what was asked
for; what start-up makes of it, with every gap filled, is an `EngineConfig`. What only a model, its devices or their
memory can refuse is refused by `startup/build.py`.
"""

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ForwardRef, get_args

from .chat.parser_names import check_names
from .config import (
    ACTIVATIONS,
    LOGPROBS_MODES,
    METHODS,
    QUANTIZATIONS,
    check_fraction,
    check_seconds,
    check_slo,
    check_whole_number,
)
from .kv_dtypes import parse_kv_dtypes
from .protocol.service import SLO
from .roles import names_fused, starting_roles
from .scheduler.policy import Policy, policy_named
from .topology import AUTO, Topology

if TYPE_CHECKING:
    import jax
    from jax.typing import DTypeLike

    from ..kernels_pallas.cpu.blocks_records import Activations


# What `workers` may be.
WORKERS = ("processes", "ray")


@dataclass(frozen=True)
class Option:
    """What a field of `EngineOptions` carries: its documentation, and how the command line takes it."""

    doc: str
    metavar: str = ""  # of the value on the command line
    least: int = 1  # of a whole number
    flag: str | None = ""  # "": the option's name with dashes; None: the command line has no such argument
    flag_doc: str = ""  # only where the flag says the opposite of the option
    at_start: str = ""  # what else holds where an engine starts: on the devices that are there

    @property
    def full_doc(self) -> str:
        """Return the documentation for whoever starts an engine."""
        return ". ".join(filter(None, (self.doc, self.at_start)))


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is made of. A value of None is chosen when the engine starts.

    Raises:
        ValueError: a topology that cannot be read, a policy that does not exist, or a number out of range.
    """

    model: Annotated[
        str | Path,
        Option(
            "a name that `twinmesh fetch` knows, such as smollm2; a GGUF file; a directory in Hugging Face's format or "
            "written by `twinmesh convert`; or an id of the Hugging Face hub: org/name, org/name@revision, "
            "org/name:file.gguf",
            metavar="NAME|PATH|ID",
        ),
    ]
    _: KW_ONLY
    topology: Annotated[
        str | Topology,
        Option(
            "device meshes and what each is for: both=1 shares one, prefill=1,decode=1 keeps prefill and decode apart, "
            "both=1xtp2 is one mesh of two devices, pool=4 are four meshes whose roles can change while they run",
            metavar="ROLES",
            at_start="auto chooses from model, devices and slo: the fewest devices a mesh that hold the model, and of "
            "several meshes a pool",
        ),
    ] = "both=1"
    roles: Annotated[
        str | None,
        Option(
            "roles that the meshes of a pool begin with, such as prefill=1,decode=3, both=1,decode=3 or "
            "both(mode=fused)=4; by default all do both. `set_roles` changes them",
            metavar="ROLES",
        ),
    ] = None
    dtype: Annotated[
        "DTypeLike",
        Option(
            "of activations, weights that are not quantised and, unless kv_cache_dtype says otherwise, KV: float32, "
            "bfloat16 or float16. auto: on a GPU the "
            "checkpoint's own if that "
            "has 16 bits, else bfloat16; on a CPU float32, or bfloat16 where its instruction set makes that faster, "
            "max_num_seqs is at least 8 and deterministic is off"
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        str,
        Option(
            "what keys and values are stored as. auto: as dtype. float32, bfloat16, float16, or with 8 bits and a "
            "scale for each token and head int8 and fp8 (e4m3), which hold nearly twice the tokens of bfloat16 and "
            "change a few tokens in a hundred; int8 changes fewer. int8/fp8 names keys and values apart, "
            "prefill=auto,decode=int8 the meshes that prefill and those that decode: a hand-off then converts before "
            "it sends",
            metavar="DTYPE",
        ),
    ] = "auto"
    quantization: Annotated[
        str | None,
        Option(
            "what becomes of weights that the files hold quantised. auto: they stay as they are where this machine has "
            "a kernel for their format, and become dtype elsewhere; keep: they stay in any case, which takes less "
            "memory and without a kernel more time; none: they become dtype; a method such as awq, fp8 or gguf: as "
            "auto, and the checkpoint has to be quantised by it"
        ),
    ] = "auto"
    activations: Annotated[
        "Activations",
        Option(
            "what kernels round activations to, with a scale for every 32, where weights that stay quantised multiply "
            "them: int16 costs no accuracy that shows; int8 is up to 1.7 times as fast for many requests and changes a "
            "few tokens in a hundred; float rounds nothing and is slower"
        ),
    ] = "int16"
    allow_nonfinite: Annotated[
        bool,
        Option(
            "load weights that are NaN or infinite, or become so in the dtype; by default they are refused with "
            "tensor and row"
        ),
    ] = False
    mmap: Annotated[
        bool,
        Option(
            "on CPUs, use large weights that lie in their file as they are needed where they are, mapped read-only, "
            "instead of reading them. The file must then stay as it is while the engine runs; an engine whose file "
            "has changed stops",
            flag="--no-mmap",
            flag_doc="read all weights, so that the model's files may change while the engine runs",
        ),
    ] = True
    max_model_len: Annotated[
        int | None,
        Option(
            "longest prompt and completion together, in tokens; less takes less memory. By default the model's "
            "context, or what memory allows",
            metavar="N",
        ),
    ] = None
    page_size: Annotated[int, Option("tokens per KV page", metavar="N")] = 64
    max_num_seqs: Annotated[
        int | None,
        Option(
            "requests that a mesh holds at once. By default 32 on a CPU, 256 on a large GPU and 128 on others, and no "
            "more than decode_buckets hold",
            metavar="N",
        ),
    ] = None
    prefill_buckets: Annotated[
        tuple[int, ...] | None,
        Option(
            "token counts that prefill steps are padded to, ascending; the last is the chunk size. By default up to "
            "512 on a CPU, 8,192 on a large GPU and 2,048 on others; where deterministic one size alone",
            metavar="N,...",
        ),
    ] = None
    decode_buckets: Annotated[
        tuple[int, ...] | None,
        Option(
            "row counts that decode steps are padded to, ascending up to max_num_seqs. By default 1, 8, 32, 128 up to "
            "max_num_seqs on a CPU (16-bit types: from 8), 8, 32, 64, 128, 256 on a GPU, or max_num_seqs alone where "
            "deterministic",
            metavar="N,...",
        ),
    ] = None
    decode_steps: Annotated[
        int,
        Option(
            "most decode steps that run on the device before the host looks, where nothing can interfere; text then "
            "comes in larger pieces",
            metavar="N",
        ),
    ] = 1
    kv_cache_bytes: Annotated[
        int | None,
        Option(
            "most memory per mesh for KV pages and hand-offs. By default what memory_fraction leaves of a GPU, and on "
            "a CPU a quarter of what the machine has available for all meshes together, at most 2 GiB each",
            metavar="N",
        ),
    ] = None
    memory_fraction: Annotated[
        float | None,
        Option(
            "part of each GPU's memory for weights, KV and temporaries together, as vLLM's gpu_memory_utilization. By "
            "default 0.9, or what XLA_CLIENT_MEM_FRACTION says. JAX's allocator holds 0.75 where JAX was in use before "
            "the engine started. Refused on CPUs",
            metavar="X",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        Option(
            "keep the KV of finished prompts, and use it for prompts that start alike",
            flag="--no-prefix-caching",
            flag_doc="compute every prompt in full, also where it starts as an earlier one did",
        ),
    ] = True
    deterministic: Annotated[
        bool,
        Option(
            "the same tokens bit for bit, whatever else runs and however a request was scheduled; small steps are "
            "padded to full ones"
        ),
    ] = False
    max_retries: Annotated[
        int,
        Option("how often a request that lost its mesh starts again before it fails", metavar="N", least=0),
    ] = 2
    policy: Annotated[
        str | Policy,
        Option(
            "order in which requests are served, where they go and which gives way: fcfs, first come first served; or "
            "spf, shortest prompt first with ageing. In Python also an object with the methods of "
            "`engine/scheduler/policy.py`",
            metavar="NAME",
        ),
    ] = "fcfs"
    slo: Annotated[
        SLO | None,
        Option(
            "times that answers are to keep to: SLO(ttft_ms=500, tpot_ms=50), in milliseconds; either may be left out. "
            "Requests may have one of their own. A decode mesh of a pool computes short prompts itself as long as its "
            "answers keep to their tpot_ms; without an SLO, only while it has none. With a percentile, as in "
            "SLO(ttft_ms=500, tpot_ms=50, percentile=99), a pool plans its meshes' roles by itself, so that as many "
            "requests keep to it. `metrics` says how many do, and what was planned",
            flag=None,
        ),
    ] = None
    age_seconds: Annotated[
        float,
        Option(
            "how many seconds of waiting a level of priority is worth, and for how long a prompt that does not fit yet "
            "may be passed over by others that do",
            metavar="X",
        ),
    ] = 60.0
    max_waiting: Annotated[
        int | None,
        Option(
            "requests that may wait, batch work and what has begun before apart; beyond it calls that submit one "
            "request raise Overloaded, which says when to try again, and calls that submit many wait. By default any "
            "number",
            metavar="N",
        ),
    ] = None
    max_waiting_tokens: Annotated[
        int | None,
        Option("likewise the prompt tokens of those that wait, without those that are cached", metavar="N"),
    ] = None
    serve_early: Annotated[
        bool,
        Option(
            "serve as soon as the largest size of each kind of step is compiled, while the smaller ones compile: their "
            "steps are padded to a larger size until then. Deterministic engines wait for all"
        ),
    ] = False
    decision_log: Annotated[
        str | Path | None,
        Option(
            "write the scheduler's events and decisions to this file, for `twinmesh replay`; an existing file is "
            "overwritten",
            metavar="FILE",
        ),
    ] = None
    logprobs_mode: Annotated[
        str,
        Option(
            "which numbers log-probabilities are. raw_logprobs: the model's, before temperature, penalties and cuts; "
            "raw_logits: its logits; processed_logprobs: of the distribution that the token was drawn from; "
            "processed_logits: its logits, -inf where a token was cut. Those of prompts are always the model's",
            metavar="MODE",
        ),
    ] = "raw_logprobs"
    max_logprobs: Annotated[
        int,
        Option(
            "most likely tokens that logprobs and prompt_logprobs of a request may ask for: programs compute so many "
            "wherever one is asked for. -1: the whole vocabulary, sorted",
            metavar="N",
            least=-1,
        ),
    ] = 20
    # The commands have a --seed of their own, which is the requests'.
    tool_call_parser: Annotated[
        str | None,
        Option(
            "what reads the tool calls of chats out of answers, by vLLM's names: hermes, qwen3_coder, llama3_json, "
            "mistral, deepseek_v3, functiongemma, gemma4, pythonic, openai. By default what reads the calls that the "
            "chat template writes; one that does not read them is refused",
            metavar="NAME",
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(
            "what tells the reasoning of chats from the rest of their answers, by vLLM's names: qwen3, deepseek_r1 "
            "(all is reasoning up to </think>, whoever opened it), mistral, gemma4, openai_gptoss. By default what the "
            "chat template has the tags of",
            metavar="NAME",
        ),
    ] = None
    seed: Annotated[
        int,
        Option("requests without a seed of their own draw theirs from it and from their number", flag=None, least=0),
    ] = 0
    devices: Annotated[
        "Sequence[jax.Device] | None",
        Option(
            "what to run on, in the topology's order, each mesh's in turn; by default JAX's. Meshes may share a device",
            flag=None,
        ),
    ] = None
    workers: Annotated[
        str | None,
        Option(
            "where the meshes live. By default in this process; processes: each in a process of its own on this "
            "machine, which is started again if it is lost, while its requests go on from the tokens they have; ray: "
            "each an actor of a Ray cluster, likewise",
            metavar="KIND",
        ),
    ] = None
    workers_per_mesh: Annotated[
        int,
        Option(
            "over how many workers of workers='processes' each mesh is divided: a number that divides every tp. They "
            "run one mesh between them by jax.distributed, and are lost and started again together",
            metavar="N",
        ),
    ] = 1
    ray_address: Annotated[
        str | None,
        Option(
            "the Ray cluster to join, as ray.init takes it, such as 10.0.0.1:6379 or auto. By default the one that "
            "this process has joined, else a new one on this machine",
            metavar="ADDRESS",
        ),
    ] = None
    mesh_hosts: Annotated[
        str | None,
        Option(
            "the host of each mesh in a Ray cluster, by address or name, in the topology's order, with commas. The "
            "meshes of one host share a worker. By default each has its own, where Ray has room",
            metavar="HOSTS",
        ),
    ] = None
    worker_timeout: Annotated[
        float,
        Option("seconds of silence after which a worker counts as lost", metavar="X"),
    ] = 5.0
    hf_overrides: Annotated[
        dict[str, object] | None,
        Option(
            'entries in place of those of config.json, by name, as in {"rope_parameters": {"rope_type": "yarn", '
            '"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}}',
            flag=None,
        ),
    ] = None
    profile_dir: Annotated[
        str | Path,
        Option(
            "folder in which `start_profile` has JAX write traces, for XProf or Perfetto; of the process that calls "
            "it, not of workers",
            flag=None,
        ),
    ] = "twinmesh_profile"
    progress: Annotated[bool, Option("show on stderr how far loading and compiling have come", flag=None)] = False

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.is_auto:
            starting_roles(self.roles, self.parsed_topology)
        elif self.roles is not None:
            raise ValueError(f"roles={self.roles!r} are chosen with topology='auto': leave one of the two out.")
        if isinstance(self.policy, str):
            policy_named(self.policy)
        check_slo(self.slo)
        check_names(self.tool_call_parser, self.reasoning_parser)
        parse_kv_dtypes(self.kv_cache_dtype, "float32", None if self.is_auto else self.parsed_topology)
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations={self.activations!r} is not usable: use one of {', '.join(ACTIVATIONS)}.")
        if self.quantization not in (None, *QUANTIZATIONS, *METHODS):
            raise ValueError(
                f"quantization={self.quantization!r} is not usable: use one of {', '.join(QUANTIZATIONS)}; or, of a "
                f"checkpoint that is quantised by it, {', '.join(METHODS)}."
            )
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(
                f"logprobs_mode={self.logprobs_mode!r} is not usable: use one of {', '.join(LOGPROBS_MODES)}."
            )
        for name in ("seed", "max_logprobs"):
            check_whole_number(name, getattr(self, name), documentation()[name].least)
        check_seconds("age_seconds", self.age_seconds)
        for name in ("max_num_seqs", "kv_cache_bytes", "max_waiting", "max_waiting_tokens"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), documentation()[name].least)
        self._check_workers()
        if self.memory_fraction is not None:
            check_fraction("memory_fraction", self.memory_fraction)

    def _check_workers(self) -> None:
        """Refuse what does not go with workers."""
        check_seconds("worker_timeout", self.worker_timeout)
        if not self.worker_timeout:
            raise ValueError("worker_timeout=0 is not usable: it must be a number of seconds above 0.")
        check_whole_number("workers_per_mesh", self.workers_per_mesh, documentation()["workers_per_mesh"].least)
        for name in ("ray_address", "mesh_hosts"):
            if getattr(self, name) is not None and self.workers != "ray":
                raise ValueError(f"{name} is of workers='ray' alone: leave it out, or ask for them.")
        if self.workers == "ray" and self.workers_per_mesh > 1:
            raise ValueError(
                f"workers_per_mesh={self.workers_per_mesh} is of workers='processes' alone: with Ray each mesh is one "
                "actor's."
            )
        if self.workers is None:
            if self.workers_per_mesh > 1:
                raise ValueError(
                    f"workers_per_mesh={self.workers_per_mesh} divides meshes over workers: name them with workers=."
                )
            return
        if self.workers not in WORKERS:
            raise ValueError(f"workers={self.workers!r} is not usable: use one of {', '.join(WORKERS)}, or None.")
        if self.is_auto:
            raise ValueError(
                "topology='auto' looks at the devices of this process, which workers leave alone: name a topology, "
                "such as 'prefill=1,decode=1', with workers."
            )
        if self.devices is not None:
            raise ValueError("devices= are of this process, and workers have their own: leave one of the two out.")
        for spec in self.parsed_topology.meshes:
            if spec.tp % self.workers_per_mesh:
                raise ValueError(
                    f"workers_per_mesh={self.workers_per_mesh} cannot divide the {spec.role} mesh of tp {spec.tp} in "
                    f"topology '{self.parsed_topology}': use a number that divides the tp of every mesh."
                )

    def _check_kinds(self) -> None:
        """Refuse values of a type that would be taken for something else, or found to be unusable much later."""
        switches = [field.name for field in fields(self) if get_args(field.type)[0] is bool]
        for name, kind, wanted in (
            ("model", str | PathLike, "a name or a path"),
            ("topology", str | Topology, "a text such as 'both=1', or a Topology"),
            ("workers", str | None, "a kind of workers, such as 'processes', or None for none"),
            ("ray_address", str | None, "an address such as '10.0.0.1:6379', or None"),
            ("mesh_hosts", str | None, "a text such as '10.0.0.1,10.0.0.2', or None"),
            ("roles", str | None, "a text such as 'prefill=1,decode=3', or None for the default"),
            ("decision_log", str | PathLike | None, "a path, or None for no log"),
            ("profile_dir", str | PathLike, "a path"),
            ("hf_overrides", dict | None, "a dict, or None for config.json as it is"),
            ("devices", Sequence | None, "a list of devices, or None for JAX's"),
            *((name, bool, "True or False") for name in switches),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or (name == "devices" and isinstance(value, str)):
                raise ValueError(f"{name}={value!r} is not usable: it must be {wanted}.")

    @property
    def is_auto(self) -> bool:
        """Return whether the topology is to be chosen when the engine starts."""
        return self.topology == AUTO

    @property
    def parsed_topology(self) -> Topology:
        """Return the topology, read where it was given as text; `roles` says whether a pool's is fused too."""
        topology = Topology.parse(self.topology) if isinstance(self.topology, str) else self.topology
        if topology.is_pool and names_fused(self.roles):
            return Topology(tuple(replace(spec, fused=True) for spec in topology.meshes))
        return topology


@functools.cache
def documentation() -> dict[str, Option]:
    """Return what each option means, by name."""
    return {field.name: get_args(field.type)[1] for field in fields(EngineOptions)}


def signature() -> inspect.Signature:
    """Return the options as parameters, with their types and defaults alone."""
    parameters = inspect.signature(EngineOptions).parameters.values()
    return inspect.Signature([parameter.replace(annotation=_plain(parameter.annotation)) for parameter in parameters])


def _plain(annotation: object) -> object:
    """Return the type of an annotated option; a type that only JAX has, as text."""
    kind: object = get_args(annotation)[0]
    return kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind


def with_options[Engine, **Options](
    options: Callable[Options, EngineOptions],
    unknown: Callable[[type, str], str],
    adapt: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda _, given: dict(given),
) -> Callable[[Callable[[Engine, EngineOptions], None]], Callable[Concatenate[Engine, Options], None]]:
    """Let an `__init__` that takes `EngineOptions` be called with the options themselves.

    Type checkers see the parameters of `options`, which is `EngineOptions`; `inspect.signature` sees the same.
    `adapt` gets the class's name and the keyword arguments first, and returns those to use. An unknown name is a
    TypeError, as for any function; `unknown` makes its sentence of the class and the name.
    """

    def decorate(start: Callable[[Engine, EngineOptions], None]) -> Callable[Concatenate[Engine, Options], None]:
        shape = signature()

        @functools.wraps(start)
        def init(self: Engine, /, *args: Options.args, **given: Options.kwargs) -> None:
            first = {"model": args[0]} if args and "model" not in given else {}
            kwargs: Any = adapt(type(self).__name__, {**first, **given})
            if first:
                args = (kwargs.pop("model"), *args[1:])  # type: ignore[assignment]
            for name in kwargs:
                if name not in documentation():
                    raise TypeError(unknown(type(self), name))
            try:
                shape.bind(*args, **kwargs)
            except TypeError as error:  # which would name `options`, not the class
                raise TypeError(f"{type(self).__name__}: {error}; give the model, and options by name.") from None
            start(self, options(*args, **kwargs))

        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        init.__dict__["__signature__"] = shape.replace(
            parameters=[this, *shape.parameters.values()], return_annotation=None
        )
        return init

    return decorate


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the name that was probably meant; None: nothing is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def as_text() -> str:
    """Describe the options for a docstring, one paragraph each."""
    paragraphs = (
        textwrap.fill(f"{name}: {option.full_doc}.", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, option in documentation().items()
    )
    return "Options:\n" + "\n".join(paragraphs)


def as_table() -> str:
    """Describe the options in a Markdown table, for the reference."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, parameter in signature().parameters.items():
        shown = inspect.formatannotation(parameter.annotation).replace("pathlib.", "").replace("|", "\\|")
        kind = shown.replace("twinmesh.engine.topology.", "").strip("'")
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        meaning = documentation()[name].full_doc.replace("|", "\\|")
        rows.append(f"| `{name}` | `{kind}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"
