"""Compiles for H100s that are not there: kernels, and whole steps of models of 8B parameters. A program, not a test.

`python compile.py JOB...` prints, for each job, a line `@@ {"job": ...}`, what the compiler says, and a line
`## {facts}`; `test_compile.py` reads the facts. Those of a kernel job name each kernel's registers, bytes spilled, and
bytes of shared memory. Jobs are Python expressions over the functions below. JAX's CUDA plugin must
be importable; in a process that is to run anything it should not be, without a GPU.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1",
}  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import KVDtype
from twinmesh.engine.sharding.mesh import build_meshes, products_on
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.sizing.temporaries import temporary_bytes
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import abstract_state, jax_dtype
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.kernels_pallas import attention, quantized
from twinmesh.kernels_pallas.grouped_matmul import grouped_matmul
from twinmesh.models.config import ClampedGate
from twinmesh.models.decoder import abstract_params
from twinmesh.models.moe import Gated
from twinmesh.models.quantized import nbytes
from twinmesh.scripts.gpu.gemm import skinny_matmul
from twinmesh.scripts.gpu.steps import GPT_OSS_20B, GPT_OSS_120B, LLAMA_3_1_8B, QWEN3_8B, mxfp4_experts

MBARRIER = 8  # bytes
BARRIERS = r"num_barriers=(\d+)[^)]*\): (\d+)"
SPILLS = re.compile(
    r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL
)
KIND = "NVIDIA H100 80GB HBM3"
TARGET = (Path(__file__).parent / "target.txtpb").read_text()
DEVICES = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x8", target_config=TARGET
).devices  # fmt: skip
# Opcodes of the top level that start nothing on the device.
NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
MODELS = {"qwen3-8b": QWEN3_8B, "llama-3.1-8b": LLAMA_3_1_8B}
EXPERTS = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}


def on_h100s(count, axis):
    """The context in which a trace is for so many H100s."""
    device = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((count,), (axis,), (AxisType.Auto,), abstract_device=device))


def shape(*dimensions, dtype=jnp.int32):
    mesh = Mesh(np.array(DEVICES[:1]), ("x",))
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def pages(heads, head_dim, page_size, dtype):
    """A pool of 256 pages; of 8-bit numbers with their scales."""
    dtype = jax_dtype(dtype)
    numbers = shape(256, page_size, heads[1], head_dim, dtype=dtype)
    if dtype.itemsize > 1:
        return numbers
    tokens, channels = shape(256, heads[1], page_size, dtype=jnp.float32), shape(heads[1], head_dim, dtype=jnp.float32)
    return attention.QuantizedPages(numbers, tokens, channels)


def cache(requests, heads, head_dim, page_size, dtype, kv=None):
    pools = [pages(heads, head_dim, page_size, name) for name in kv or (dtype, dtype)]
    return *pools, shape(requests, 8192 // page_size), shape(requests)


def compiled(function, *arguments, donated=()):
    with on_h100s(1, "x"):
        program, text = heard(lambda: jax.jit(function, donate_argnums=donated).lower(*arguments).compile())
    memory = program.memory_analysis()
    facts = {"temp": memory.temp_size_in_bytes, "alias": memory.alias_size_in_bytes}
    return {"kernels": kernels(text), "remarks": re.findall(r"\(C7\d+\).*", text), **facts}


def heard(compile_it):
    """The program, and what Mosaic and ptxas say while it is compiled."""
    with tempfile.TemporaryFile("w+") as said:
        with redirected(said.fileno()):
            program = compile_it()
        said.seek(0)
        text = said.read()
    print(text)
    return program, text


@contextlib.contextmanager
def redirected(target):
    """What this process writes, the compiler's C++ included, goes to a file."""
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        for stream in (1, 2):
            os.dup2(target, stream)
        yield
    finally:
        sys.stdout.flush()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def kernels(text):
    """What Mosaic says of the kernels that it lowers, and ptxas of the same ones that it then assembles."""
    dynamic = [
        int(scratch) + MBARRIER * sum(int(many) * int(times) for many, times in re.findall(BARRIERS, barriers))
        for scratch, barriers in re.findall(
            r"Resources\(smem_scratch_bytes=(\d+).*?barrier_counts=Counter\((.*?)\), ", text
        )
    ]
    assembled = re.findall(
        r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers.*?(?:(\d+) bytes smem)?\n",
        text, re.DOTALL,
    )  # fmt: skip
    return [
        {
            "name": name, "registers": int(registers), "spilled": int(stores) + int(loads),
            "shared": size + int(static or 0),
        }
        for (name, stores, loads, registers, static), size in zip(assembled, dynamic, strict=True)
    ]  # fmt: skip


def decode(heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16", requests=32, kv=None, **options):
    q = shape(requests, heads[0], head_dim, dtype=jnp.dtype(dtype))
    sink = jnp.zeros(heads[0]) if options.pop("sink", False) else None
    options = dict(scale=head_dim**-0.5, sink=sink) | options
    function = lambda *arrays: attention.paged_decode_attention(*arrays, **options)  # noqa: E731
    return compiled(function, q, *cache(requests, heads, head_dim, page_size, dtype, kv))


def prefill(heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16", tokens=2048, requests=8, kv=None, **options):
    q = shape(tokens, heads[0], head_dim, dtype=jnp.dtype(dtype))
    sink = jnp.zeros(heads[0]) if options.pop("sink", False) else None
    options = dict(scale=head_dim**-0.5, sink=sink) | options
    function = lambda *arrays: attention.paged_prefill_attention(*arrays, **options)  # noqa: E731
    return compiled(function, q, *cache(requests, heads, head_dim, page_size, dtype, kv), shape(requests + 1))


def product(rows, depth, columns):
    """The suite's experimental product of a few rows."""
    x, weight = (shape(*dimensions, dtype=jnp.bfloat16) for dimensions in ((rows, depth), (depth, columns)))
    return compiled(lambda *arrays: skinny_matmul(*arrays, cores=132), x, weight)


def heads(heads=(32, 8), head_dim=128, page_size=64, dtype="bfloat16", tokens=32, norms=True):
    """Norm, rotation and append; the pools are donated, and what the program keeps beside them is reported."""
    q, k = (shape(tokens, count, head_dim, dtype=jnp.dtype(dtype)) for count in heads)
    angle, norm = shape(tokens, head_dim // 2, dtype=jnp.float32), shape(head_dim, dtype=jnp.float32)
    rotation = attention.Rotation(angle, angle, *(norm, norm) if norms else (None, None), eps=1e-6)
    pool = shape(256, page_size, heads[1], head_dim, dtype=jnp.dtype(dtype))
    function = functools.partial(attention.prepare_heads, first_page=3)
    return compiled(function, q, k, k, rotation, pool, pool, shape(tokens), donated=(4, 5))


def step(name, tp, kind, pages=2048, tokens=2048, rows=32, layers=None, split_k=True):
    """One whole `prefill_step` or `decode_step` with a pool of so many pages of 64 tokens.

    `layers` cuts the model. Without `split_k`, products are not cut into parts whose sums are kernels of their own:
    XLA cuts them by rule where it cannot try what is faster, and may not on a GPU.
    """
    model = model_on(MODELS[name], tp)
    model = replace(model, layers=model.layers[:layers])
    config = EngineConfig(
        Topology.parse(f"both=1xtp{tp}"), max_model_len=8192, prefill_buckets=(tokens,), decode_buckets=(rows,),
        max_num_seqs=rows, dtype="bfloat16",
    )  # fmt: skip
    (mesh,) = build_meshes(config.topology, DEVICES[:tp])
    state = abstract_state(model, config, (pages,), KVDtype("bfloat16", "bfloat16"), mesh)
    params = abstract_params(model, jnp.bfloat16)
    plan = MeshPlan(mesh, config.topology.meshes[0], model, params, config, state)
    with on_h100s(tp, "tp"), without_split_k(not split_k):
        program = compile_program(plan, kind, tokens if kind == "prefill" else rows)
    memory, text = program.memory_analysis(), program.as_text()
    facts = {field: getattr(memory, f"{field}_size_in_bytes") for field in ("argument", "output", "alias", "temp")}
    pool = 2 * np.prod(state.kv[0].k.shape, dtype=int) * 2 // tp
    return {
        **facts,
        "pool": int(pool),
        "set_aside": temporary_bytes(model, config, tp),
        "layers": model.num_layers,
        **launches(text),
        **branches(text),
        "all_reduce": count(text, "all-reduce"),
        "all_gather": [shape for _, shape in instructions(text, "all-gather")],
        "kernels": count(text, "custom-call", "mosaic_gpu"),
        "copies": [shape for _, shape in instructions(text, "copy") if size(shape) >= pool // 4],
    }


def stack(rows, experts=32, inputs=2880, outputs=2880, name="MXFP4", dtype="bfloat16", is_unit=True):
    """Gate and up of so many rows with their clamped unit, or the projection out of experts."""
    dtype, like = jnp.dtype(dtype), (experts, inputs, outputs)
    if name is None:
        w = shape(*like, dtype=dtype)
    else:
        w = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), quantized.abstract(name, like, 1, 1))
    x, sizes, bias = shape(rows, inputs, dtype=dtype), shape(experts), shape(experts, outputs, dtype=dtype)
    if is_unit:
        run = functools.partial(grouped_matmul, combine=Gated(ClampedGate(1.702, 7.0)), dtype=dtype, cores=132)
        return compiled(run, x, (w, w), (bias, bias), sizes)
    run = functools.partial(grouped_matmul, dtype=jnp.dtype(jnp.float32), cores=132)
    return compiled(run, x, (w,), (), sizes)


def experts_step(name, topology, kind, tokens=2048, rows=32, layers=None, pages=(512, 4096)):
    """One whole step of a model with experts in MXFP4, with a pool of so many pages for each cache group."""
    whole = EXPERTS[name]
    topology = Topology.parse(f"both={topology}")
    tp = topology.meshes[0].tp
    model = model_on(replace(whole, layers=whole.layers[:layers]), tp)
    config = EngineConfig(
        topology, max_model_len=8192, prefill_buckets=(tokens,), decode_buckets=(rows,), max_num_seqs=rows,
        dtype="bfloat16", windows=tuple(group.window for group in groups(model)),
    )  # fmt: skip
    (mesh,) = build_meshes(config.topology, DEVICES[:tp])
    state = abstract_state(model, config, pages, KVDtype("bfloat16", "bfloat16"), mesh)
    params = abstract_params(model, jnp.bfloat16, mxfp4_experts(model), products_on(mesh))
    plan = MeshPlan(mesh, config.topology.meshes[0], model, params, config, state)
    device = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    abstract = AbstractMesh(mesh.axis_sizes, mesh.axis_names, kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(abstract):
        program, said = heard(lambda: compile_program(plan, kind, tokens if kind == "prefill" else rows))
    memory, text = program.memory_analysis(), program.as_text()
    facts = {field: getattr(memory, f"{field}_size_in_bytes") for field in ("argument", "output", "alias", "temp")}
    matrix, pool = whole.hidden_size * whole.intermediate_size, [math.prod(group.k.shape) // tp for group in state.kv]
    return {
        **facts,
        "weights": sum(nbytes(spec.value) for spec in params.specs.values()),
        "experts": whole.experts.count // topology.meshes[0].ep,  # of a device
        "layer_experts": 2 * 3 * whole.experts.count * matrix // tp,  # of a device, in 16 bits
        "pool": sum(2 * 2 * size for size in pool),
        "set_aside": temporary_bytes(model, config, tp),
        "layers": model.num_layers,
        "stacks": count(text, "custom-call", "grouped_matmul"),
        "kernels": count(text, "custom-call", "mosaic_gpu"),
        "spilled": spilled(said),
        "all_reduce": count(text, "all-reduce"),
        "all_to_all": count(text, "ragged-all-to-all"),
        "whiles": count(text, "while"),
        # What is made, not given, as large as an expert's matrix, and of floats; of rows, it has a row's length.
        "large": sorted(
            {found for found in made_floats(text) if math.prod(found) >= matrix // tp and math.prod(found) not in pool}
        ),
    }


def spilled(text):
    """The most bytes that each of Mosaic's kernels spills, by name, of those that ptxas assembles."""
    most = {}
    for name, stores, loads in SPILLS.findall(text):
        most[name] = max(most.get(name, 0), int(stores) + int(loads))
    return most


def made_floats(text):
    """The shapes of the arrays of floats that a program without loops makes in memory, at its top level."""
    for line in text[text.index("\nENTRY ") :].split("\n}", 1)[0].splitlines():
        found = re.match(r"\s*(?:ROOT )?\S+ = (.*?) ([\w-]+)\(", line)
        if found and found[2] not in NAMES:
            for dims in re.findall(r"(?:bf16|f16|f32)\[([\d,]+)\]", found[1]):
                yield tuple(map(int, dims.split(",")))


@contextlib.contextmanager
def without_split_k(is_without):
    """Programs that are compiled inside have no products in parts."""
    compile_as_is = jax.stages.Lowered.compile

    def compile_whole(self, compiler_options=None):
        return compile_as_is(self, {**(compiler_options or {}), "xla_gpu_experimental_force_split_k": 1})

    with mock.patch.object(jax.stages.Lowered, "compile", compile_whole) if is_without else contextlib.nullcontext():
        yield


def launches(text):
    """What a program's top level starts on the device, and how much of it computes nothing but integers.

    Not counted: what names a buffer or a part of one, and waiting for what was started.
    """
    entry = text[text.index("\nENTRY ") :].split("\n}", 1)[0]
    found = re.findall(r"^\s*(?:ROOT )?\S+ = (.*?) ([\w-]+)\(", entry, re.MULTILINE)
    started = [shape for shape, opcode in found if opcode not in NAMES and not opcode.endswith("-done")]
    whole = [shape for shape in started if set(re.findall(r"(\w+)\[", shape)) <= {"s32", "u32", "pred"}]
    return {"operations": len(started), "integers": len(whole)}


def branches(text):
    """A program's conditionals, and of its loops how often each turns; None of one that is not known."""
    loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
    trips = [re.search(r'"known_trip_count":\s*\{"n":"(\d+)"', line) for line in loops]
    return {"conditionals": count(text, "conditional"), "trips": [trip and int(trip[1]) for trip in trips]}


def instructions(text, opcode, target=""):
    """(name, shape) of the instructions with an opcode, in its plain or its asynchronous form."""
    found = re.findall(rf"^\s*(?:ROOT )?(\S+) = (.*?) {opcode}(?:-start)?\((.*)$", text, re.MULTILINE)
    return [(name, shape) for name, shape, rest in found if target in rest]


def count(text, opcode, target=""):
    return len(instructions(text, opcode, target))


def size(shape):
    """Bytes of the largest array in an HLO shape."""
    width = {"bf16": 2, "f32": 4, "s32": 4}
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return max(
        (width.get(dtype, 1) * int(np.prod([int(x) for x in dims.split(",") if x])) for dtype, dims in arrays),
        default=0,
    )


if __name__ == "__main__":
    for job in sys.argv[1:]:
        print("@@", json.dumps({"job": job}), flush=True)
        print("##", json.dumps(eval(job)), flush=True)
