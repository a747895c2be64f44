"""Whether a model fits into a memory before anything of it is read, and the nearest remedy where it does not.

A memory is that of one GPU, with the meshes that share it, or that of a host whose CPU devices all meshes run on. What
each mesh needs of it are its weights, the state of its requests, temporaries, and at least the KV of one request with
the staging of its hand-off. Invariant: what fits here is what start-up finds room for (`pools.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..topology import MeshSpec, TopologyError
from .heads import check_tp, model_on
from .memory_needs import page_bytes, request_bytes, transit_bytes
from .pools import least_budget, longest_that_fits
from .temporaries import temporary_bytes
from .weight_sizes import WeightPart, kept_on, weight_parts

_MOST_TP = 64
_SMALL_CHUNK, _SMALL_ROWS = 512, 32  # sizes of steps that are proposed where temporaries are too large

_NO_REMEDY = {
    False: f"no tp up to {_MOST_TP} leaves each device little enough: take a smaller model or larger devices",
    True: "take a smaller or a quantised model, or free memory",
}


class Memory(NamedTuple):
    """A memory that meshes share."""

    usable: int  # bytes that an engine may take
    share: str  # what part of what it is, as in "0.9 of h100's 79.11 GiB"
    is_host: bool = False  # of CPU devices


class Need(NamedTuple):
    """Bytes that one mesh needs on each of its devices; of a host, on all of them together."""

    weights: tuple[WeightPart, ...]
    state: int  # of requests, those on their way included
    temporaries: int
    kv: int  # of one request, with the staging of its hand-off

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights."""
        return sum(part.bytes for part in self.weights)

    @property
    def total(self) -> int:
        """Return the bytes of everything."""
        return self.weight_bytes + self.state + self.temporaries + self.kv


@dataclass(frozen=True)
class Fit:
    """A model on the meshes that share one memory."""

    name: str  # the model's
    model: ModelConfig  # the checkpoint's
    config: EngineConfig
    meshes: tuple[MeshSpec, ...]
    memory: Memory
    part: int  # hand-offs on their way get such a part of the KV memory
    asked_len: int | None  # the max_model_len that was asked for; one that was not may shrink to a page
    kept: Mapping[str, str] = field(default_factory=dict)  # path -> format, of the weights that stay quantised
    stored: Mapping[str, str] = field(default_factory=dict)  # of those that the files hold quantised

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """Return what each mesh needs. CPU meshes of one device hold weights together, which the first of them has."""
        found, seen = list[Need](), set[int]()
        for spec in self.meshes:
            need = self._need(spec)
            if self.memory.is_host and spec.tp == 1 and 1 in seen:
                need = need._replace(weights=())
            seen.add(spec.tp)
            found.append(need)
        return tuple(found)

    def _need(self, spec: MeshSpec) -> Need:
        on_mesh, config, tp = model_on(self.model, spec.tp), self.config, spec.tp
        per_page = page_bytes(on_mesh, config.page_size, config.kv_on(spec))
        state = request_bytes(on_mesh, config) + transit_bytes(config)
        kept = kept_on(self.model, spec, self.kept)
        weights = weight_parts(on_mesh, config.dtype, tp, kept)
        shortest = config if self.asked_len is not None else replace(config, max_model_len=self.shortest)
        kv = least_budget(per_page, shortest, self.part)
        if self.memory.is_host:  # which has them all; temporaries come from the memory that KV leaves
            all_weights = tuple(part._replace(bytes=part.bytes * tp) for part in weights)
            return Need(all_weights, state * tp, 0, kv)
        return Need(weights, state, temporary_bytes(on_mesh, config, tp, kept), -(-kv // tp))

    @property
    def shortest(self) -> int:
        """Return the shortest max_model_len that start-up goes down to: a page's tokens."""
        return min(self.config.max_model_len, max(2, self.config.page_size))

    @property
    def total(self) -> int:
        """Return the bytes that all meshes need."""
        return sum(need.total for need in self.needs)

    @property
    def fits(self) -> bool:
        """Return whether there is room for one request on every mesh."""
        return self.total <= self.memory.usable


def check_fits(fit: Fit) -> None:
    """Refuse a model that does not fit.

    Raises:
        ValueError: in one sentence what is needed, what there is, and the nearest remedy.
    """
    if fit.fits:
        return
    meshes = " and ".join(dict.fromkeys(f"{spec.role} mesh" for spec in fit.meshes))
    tp = "" if fit.memory.is_host else f" at tp {fit.meshes[0].tp}"
    where = f"the {meshes} need" if len(fit.meshes) > 1 else f"the {meshes} needs"
    each = "" if fit.memory.is_host or fit.meshes[0].tp == 1 else " on each device"
    raise ValueError(
        f"{fit.name} does not fit{tp}: {where} {needed_text(fit)}{each}, and there are {gib(fit.memory.usable)} "
        f"({fit.memory.share}): {_remedy(fit)}."
    )


def needed_text(fit: Fit) -> str:
    """Spell out what is needed, the weights by format."""
    formats: dict[str, int] = {}
    for part in (part for need in fit.needs for part in need.weights):
        formats[part.format] = formats.get(part.format, 0) + part.bytes
    large = {name: size for name, size in formats.items() if 1000 * size >= sum(formats.values())}
    listed = ", ".join(f"{gib(size)} {name}" for name, size in sorted(large.items(), key=lambda item: -item[1]))
    length = fit.config.max_model_len if fit.asked_len is not None else fit.shortest
    others = {
        "request state": sum(need.state for need in fit.needs),
        "temporaries": sum(need.temporaries for need in fit.needs),
        f"KV for one request of {length:,} tokens": sum(need.kv for need in fit.needs),
    }
    weights = sum(need.weight_bytes for need in fit.needs)
    parts = [
        f"{gib(weights)} of weights ({listed})",
        *(f"{gib(size)} of {what}" for what, size in others.items() if size),
    ]
    return f"{' + '.join(parts)} = {gib(fit.total)}"


def _remedy(fit: Fit) -> str:
    return next(_remedies(fit), _NO_REMEDY[fit.memory.is_host])


def _remedies(fit: Fit) -> Iterator[str]:
    """List what would make it fit, what changes least first."""
    is_short = fit.asked_len is not None and replace(fit, asked_len=None).fits
    longest = _longest(fit) if is_short else 0
    if fit.asked_len is not None and 2 * longest >= fit.asked_len:
        yield f"max_model_len={longest} fits"
    slots, chunk = min(_SMALL_ROWS, fit.config.max_num_seqs), min(_SMALL_CHUNK, fit.config.chunk_size)
    small = replace(fit.config, max_num_seqs=slots, decode_buckets=(slots,), prefill_buckets=(chunk,))
    if not fit.config.deterministic and replace(fit, config=small).fits:
        yield f"max_num_seqs={slots} and prefill_buckets={chunk} fit"
    quantised = replace(fit, kept=fit.stored)
    if len(fit.stored) > len(fit.kept) and quantised.fits:
        formats = " and ".join(dict.fromkeys(fit.stored.values()))
        yield f"with quantization='keep' its weights stay {formats} and it fits"
    if fit.config.dtype == "float32" and replace(fit, config=replace(fit.config, dtype="bfloat16")).fits:
        yield "dtype='bfloat16' halves them and fits"
    if len(fit.meshes) > 1 and replace(fit, meshes=fit.meshes[:1]).fits:
        how = "topology='both=1' has one" if fit.memory.is_host else "give each mesh devices of its own"
        yield f"one mesh alone would fit, so {how}"
    if not fit.memory.is_host:
        yield from _by_tp(fit, quantised)
    if is_short:
        yield f"max_model_len={longest} fits"


def _by_tp(fit: Fit, quantised: Fit) -> Iterator[str]:
    """List the degrees of tensor parallelism that would make it fit, without and with its weights quantised; where
    columns of experts do not help, with whole experts on each device."""
    for keeps in (fit, quantised):
        tp = 2 * fit.meshes[0].tp
        while tp <= _MOST_TP:
            for ep in (1,) if fit.model.experts is None else (1, tp):
                spec = replace(fit.meshes[0], tp=tp, ep=ep)
                if _divides(fit.model, spec) and replace(keeps, meshes=(spec,)).fits:
                    kept = " with quantization='keep'" if keeps is quantised and len(fit.stored) > len(fit.kept) else ""
                    yield f"tp {tp}{kept} fits, as in {spec.role}=1xtp{tp}{f'ep{ep}' if ep > 1 else ''}"
            tp *= 2


def _longest(fit: Fit) -> int:
    """Return the longest max_model_len of which one request fits on every mesh."""
    rest = fit.memory.usable - sum(need.total - need.kv for need in fit.needs)
    lengths = []
    for spec, need in zip(fit.meshes, fit.needs, strict=True):
        share = rest * need.kv // sum(need.kv for need in fit.needs) * (1 if fit.memory.is_host else spec.tp)
        on_mesh, stored = model_on(fit.model, spec.tp), fit.config.kv_on(spec)
        per_page = page_bytes(on_mesh, fit.config.page_size, stored)
        lengths.append(longest_that_fits(max(0, share), per_page, fit.config, fit.part))
    return min(lengths)


def _divides(model: ModelConfig, spec: MeshSpec) -> bool:
    try:
        check_tp(model, spec)
    except TopologyError:
        return False
    return True


def gib(size: int) -> str:
    """Write bytes in GiB, small ones in MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 26 else f"{size / 2**20:,.2f} MiB"
