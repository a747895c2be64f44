"""What sizes are made of: the options of an engine that are read here, as `EngineOptions` has and describes them.

None stands for what nobody asked for.
"""

from typing import Protocol

from ..protocol.service import SLO
from ..topology import Topology


class Asked(Protocol):
    """Options, as far as sizes hang on them."""

    @property
    def parsed_topology(self) -> Topology:
        """Return the meshes."""
        ...

    @property
    def roles(self) -> str | None:
        """Return the roles that a pool's meshes begin with."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Return the longest prompt and completion together, in tokens."""
        ...

    @property
    def page_size(self) -> int:
        """Return tokens of a page."""
        ...

    @property
    def max_num_seqs(self) -> int | None:
        """Return the requests that a mesh holds at once."""
        ...

    @property
    def prefill_buckets(self) -> tuple[int, ...] | None:
        """Return token counts that prefill steps are padded to."""
        ...

    @property
    def decode_buckets(self) -> tuple[int, ...] | None:
        """Return row counts that decode steps are padded to."""
        ...

    @property
    def kv_cache_dtype(self) -> str:
        """Return what keys and values are stored as, as `kv_dtypes.py` reads it."""
        ...

    @property
    def decode_steps(self) -> int:
        """Return the most decode steps of one dispatch."""
        ...

    @property
    def enable_prefix_caching(self) -> bool:
        """Return whether prompts reuse the pages of earlier ones."""
        ...

    @property
    def deterministic(self) -> bool:
        """Return whether tokens are the same, whatever else runs."""
        ...

    @property
    def max_retries(self) -> int:
        """Return how often a request that lost its mesh starts again."""
        ...

    @property
    def slo(self) -> SLO | None:
        """Return what answers are to keep to."""
        ...

    @property
    def age_seconds(self) -> float:
        """Return what a level of priority is worth, in seconds."""
        ...

    @property
    def max_waiting(self) -> int | None:
        """Return the most requests that wait."""
        ...

    @property
    def max_waiting_tokens(self) -> int | None:
        """Return the most prompt tokens that wait."""
        ...

    @property
    def logprobs_mode(self) -> str:
        """Return what log-probabilities are of."""
        ...

    @property
    def max_logprobs(self) -> int:
        """Return how many most likely tokens requests may ask for, -1: all."""
        ...

    @property
    def kv_cache_bytes(self) -> int | None:
        """Return the most bytes per mesh for KV pages and hand-offs."""
        ...

    @property
    def quantization(self) -> str | None:
        """Return what becomes of weights that the files hold quantised: one of `QUANTIZATIONS`, a method, or None."""
        ...

    @property
    def memory_fraction(self) -> float | None:
        """Return the part of each GPU's memory."""
        ...
