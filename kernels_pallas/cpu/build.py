"""Compiles kernels, in a process of their own: `python -m twinmesh.kernels_pallas.cpu.build LEVEL KERNEL ...`.

numba turns typed Python into LLVM's intermediate form, and LLVM turns that into an object file for the level; the files
go to stdout one after the other, the length of each before it in 8 bytes. What ends this process, such as an
instruction that LLVM cannot select, costs the process that asked its kernels and nothing else; and whatever that one
has set for its own use of numba does not count here.

Not here: where objects are kept (`objects.py`), and what becomes of them (`loader.py`).
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .jobs import PROCESS
from .kernels import KERNELS, Parameters
from .levels import Level, level_named

_EXPORTED = ("handler", "task")


def compile_kernel(name: str, level: Level, parameters: Parameters = ()) -> bytes:
    """Compile a kernel: an object file with the functions `handler` and `task` and the words `jobs.PROCESS`."""
    from llvmlite import binding

    from .kernel import entries

    place, maker, told = KERNELS[name]
    make = getattr(importlib.import_module(f".{place}", __package__), maker)
    machine = _target_machine(level)
    module = binding.parse_assembly("")
    for entry, function in entries(make(level, *told, *parameters)).items():
        module.link_in(binding.parse_assembly(_llvm(entry, function)))
    module.triple, module.data_layout = level.triple, str(machine.target_data)
    for defined in module.functions:
        if not defined.is_declaration and defined.name not in _EXPORTED:
            defined.linkage = "internal"  # so that what nobody calls goes, wrappers for Python above all
    module.get_global_variable(PROCESS).linkage = "external"
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _llvm(entry: str, function: Any) -> str:
    """Return a function of numba's in LLVM's form, and a C function `entry` that calls it with one word."""
    from numba import types

    kinds = (types.int64,)
    function.compile(kinds)
    name = function.overloads[kinds].fndesc.llvm_func_name
    return f"""{function.inspect_llvm(kinds)}
define i64 @{entry}(i64 %word) {{
  %result = alloca i64
  %raised = alloca ptr
  store i64 0, ptr %result
  %status = call i32 @"{name}"(ptr %result, ptr %raised, i64 %word)
  %value = load i64, ptr %result
  ret i64 %value
}}
"""


def _target_machine(level: Level) -> Any:
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    is_x86 = level.machine == "x86_64"
    return binding.Target.from_triple(level.triple).create_target_machine(
        cpu=level.cpu, features=level.features, opt=3, reloc="static" if is_x86 else "default",
        codemodel="jitdefault", jit=True,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Compile the kernels that the command line names, and write them to stdout."""
    level = level_named(arguments[0])
    # numba makes machine code too before it gives its intermediate form away. Nobody runs that: it is not optimised.
    os.environ |= {"NUMBA_CPU_NAME": level.cpu, "NUMBA_CPU_FEATURES": level.features, "NUMBA_OPT": "0"}
    for text in arguments[1:]:
        name, *parameters = text.split(":")
        code = compile_kernel(name, level, tuple(int(x) for x in parameters))
        sys.stdout.buffer.write(len(code).to_bytes(8, "little") + code)


if __name__ == "__main__":
    main(sys.argv[1:])
