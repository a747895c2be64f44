"""JAX's compilation: a persistent cache on disk, and a count of what still compiles."""

import os
import threading
from pathlib import Path

import jax
import jax.monitoring

_EVENTS = frozenset({"/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"})


def use_cache(directory: Path) -> None:
    """Keep compiled programs in `directory`, unless the program has chosen a cache of its own.

    A second start then reads them back instead of compiling. The setting is the process's: programs that its user
    compiles are kept there too. Where the directory cannot be written, JAX compiles as usual.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if jax.config.jax_compilation_cache_dir is None and os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class CompileCounter:
    """A counter of traces and backend compilations in this process, whatever causes them, until `close`."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            with self._lock:
                self.count += 1

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
