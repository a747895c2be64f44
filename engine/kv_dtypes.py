"""What keys and values are stored as, apart from what a model computes in. No JAX here.

Text of the option `kv_cache_dtype`: "auto", which is the engine's dtype; one dtype, such as "int8"; keys and values
apart, "int8/fp8"; and where meshes prefill and decode apart, a text for each role: "prefill=auto,decode=int8". Numbers
of 8 bits have a scale for each token and head (`kernels_pallas/pages.py`).
"""

from dataclasses import dataclass

from .topology import Role, Topology

AUTO = "auto"
# By name: bytes of a number, and of its token's scale.
KV_DTYPES = {"float32": (4, 0), "bfloat16": (2, 0), "float16": (2, 0), "int8": (1, 4), "fp8": (1, 4)}
_EXAMPLES = "'int8', 'int8/fp8' for keys and values apart, or 'prefill=auto,decode=int8'"


@dataclass(frozen=True)
class KVDtype:
    """The dtypes of keys and of values, each one of `KV_DTYPES`."""

    k: str
    v: str

    @property
    def is_quantized(self) -> bool:
        """Return whether any of the two has 8 bits."""
        return any(KV_DTYPES[name][1] > 0 for name in (self.k, self.v))

    def bytes_of(self, head_dim: int) -> int:
        """Return bytes of one token's key and value in one head, scales included."""
        return sum(head_dim * number + scale for number, scale in (KV_DTYPES[self.k], KV_DTYPES[self.v]))

    def __str__(self) -> str:
        """Return the text that the option has for it."""
        return self.k if self.k == self.v else f"{self.k}/{self.v}"


@dataclass(frozen=True)
class KVDtypes:
    """What meshes that only prefill store, and what all others do, which decode."""

    prefill: KVDtype
    decode: KVDtype

    def on(self, role: Role) -> KVDtype:
        """Return those of a mesh of this role in its topology."""
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def is_quantized(self) -> bool:
        """Return whether any mesh stores numbers of 8 bits."""
        return self.prefill.is_quantized or self.decode.is_quantized

    def __str__(self) -> str:
        """Return the text that the option has for them."""
        same = self.prefill == self.decode
        return str(self.decode) if same else f"prefill={self.prefill},decode={self.decode}"


def same_everywhere(dtype: str) -> KVDtypes:
    """Return what "auto" is in an engine of this dtype."""
    one = KVDtype(dtype, dtype)
    return KVDtypes(one, one)


def parse_kv_dtypes(text: str, dtype: str, topology: Topology | None = None) -> KVDtypes:
    """Read the option; `dtype` is what "auto" stands for.

    Raises:
        ValueError: unreadable text, an unknown dtype, or roles that the topology's meshes do not have.
    """
    if not isinstance(text, str):
        raise ValueError(f"kv_cache_dtype={text!r} is not usable: it must be a text such as {_EXAMPLES}.")
    if "=" not in text:
        one = _one(text, text, dtype)
        return KVDtypes(one, one)
    found: dict[str, KVDtype] = {}
    for part in text.replace(" ", "").split(","):
        role, _, asked = part.partition("=")
        if role not in (Role.PREFILL, Role.DECODE) or role in found:
            raise ValueError(
                f"kv_cache_dtype={text!r} is not readable at {part!r}: name prefill and decode, once each, as in "
                f"{_EXAMPLES}."
            )
        found[role] = _one(asked, text, dtype)
    if len(found) < 2:
        missing = Role.DECODE if Role.PREFILL in found else Role.PREFILL
        raise ValueError(f"kv_cache_dtype={text!r} does not say what {missing} meshes store: add '{missing}=auto'.")
    if topology is not None and not any(spec.role is Role.PREFILL for spec in topology.meshes):
        raise ValueError(
            f"kv_cache_dtype={text!r} names roles, and the meshes of topology '{topology}' prefill and decode: give "
            "one dtype for all of them."
        )
    return KVDtypes(found[Role.PREFILL], found[Role.DECODE])


def _one(asked: str, text: str, dtype: str) -> KVDtype:
    """Read what the meshes of one role store."""
    names = [dtype if name == AUTO else name for name in asked.replace(" ", "").split("/")]
    unknown = next((name for name in names if name not in KV_DTYPES), None)
    if unknown is not None:
        raise ValueError(
            f"kv_cache_dtype={text!r} has no dtype {unknown!r}: use {AUTO}, {', '.join(KV_DTYPES)}, as in {_EXAMPLES}."
        )
    if len(names) > 2:
        raise ValueError(f"kv_cache_dtype={text!r} names {len(names)} dtypes: keys and values have one each.")
    return KVDtype(names[0], names[-1])
