"""Kernels for CPUs, which XLA calls inside its programs: written in typed Python, compiled by numba and LLVM.

No compiler is needed on the user's machine, and none of it changes what a program means: where a kernel cannot be had
(`loader.py`), the caller falls back to plain XLA. Callers ask `loader.target` for a kernel by name while they trace.

A kernel is three functions (`kernel.py`) over XLA's call frame (`frame.py`), with inner loops written vector by vector
(`vectors.py`): `products.py`, `scores.py`, and `blocks_kernel.py` for quantised weights. It is compiled for a level of
CPU (`levels.py`) in a child process (`build.py`), kept on disk (`objects.py`), tried before its first use
(`checks.py`), and shares its work with the threads of XLA's own pool.
"""
