"""Profiles: the costs of one model on one kind of mesh, on file, with what they are of and how far to trust them.

A profile is a JSON object. It is of a model, a dtype, degrees of tensor parallelism, a kind of device, a page size and
buckets, and is refused for any other, because each of them changes what a step costs. Its source says where the costs
come from: steps that were measured, published peaks of a device ("roofline": never measured at all), or the steps of a
run's decision log. Invariant: a file is replaced at once or not at all, so no reader meets half of one.
"""

import math
from collections.abc import Sequence
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Literal

import msgspec

from ...config import EngineConfig
from ...host.whole_file import write_whole
from ...scheduler.cost_model import CostModel, ProgramCost
from ...topology import Role, Topology
from .measured import Kind

VERSION = 1
_FORMAT = "twinmesh profile"

Source = Literal["measured", "roofline", "log"]


class Errors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the costs are from measured steps of one kind that they were not fitted to; shares of the measured."""

    kind: Kind
    points: int
    mape: float  # mean of the absolute errors
    worst: float  # the largest absolute error


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is in the file."""

    format: str = _FORMAT
    version: int = VERSION
    model: str
    dtype: str  # of activations and weights that are not quantised
    formats: tuple[str, ...]  # that weights are kept quantised in
    tp: tuple[int, int]  # of meshes that prefill, and of meshes that decode
    device: str  # its kind, as JAX names it, or as `devices.py` does
    page_size: int
    prefill_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    costs: CostModel
    source: Source
    date: str  # when it was made, ISO 8601
    kv: str | None = None  # what keys and values are stored as, as `kv_cache_dtype` says it; None: as `dtype`
    spread: float = 0.0  # standard deviation of the logarithm of step times around the costs
    errors: tuple[Errors, ...] = ()  # of points that were held out of the fit; none: nothing was measured


def profile_of(
    config: EngineConfig,
    costs: CostModel,
    *,
    model: str,
    device: str,
    source: Source,
    date: str,
    spread: float = 0.0,
    errors: Sequence[Errors] = (),
) -> Profile:
    """Make the profile of an engine's configuration."""
    return Profile(
        model=model,
        dtype=config.dtype,
        kv=None if config.kv is None else str(config.kv),
        formats=config.formats,
        tp=degrees(config.topology),
        device=device,
        page_size=config.page_size,
        prefill_buckets=config.prefill_buckets,
        decode_buckets=config.decode_buckets,
        costs=costs,
        source=source,
        date=date,
        spread=spread,
        errors=tuple(errors),
    )


def degrees(topology: Topology) -> tuple[int, int]:
    """Return the degrees of tensor parallelism of a topology's meshes that prefill, and of those that decode.

    Of each kind of role a topology has one degree, so these are all.
    """
    prefill = next(spec.tp for spec in topology.meshes if spec.role is not Role.DECODE)
    decode = next(spec.tp for spec in topology.meshes if spec.role is not Role.PREFILL)
    return prefill, decode


def write_profile(profile: Profile, path: str | PathLike[str]) -> None:
    """Write a profile; an earlier file is replaced as a whole, once the new one is complete.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    write_whole(path, encode(profile))


def encode(profile: Profile) -> bytes:
    """Return the file's content."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"


def read_profile(path: str | PathLike[str]) -> Profile:
    """Read a profile.

    Raises:
        ValueError: this is no profile, of another version, or damaged.
        OSError: the file cannot be read.
    """
    name, content = fspath(path), Path(expanduser(path)).read_bytes()
    try:
        value = msgspec.json.decode(content)
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        value = None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{name} is no profile: 'twinmesh profile' writes one.")
    if value.get("version") != VERSION:
        raise ValueError(
            f"{name} is a profile of version {value.get('version')!r}, and this Twinmesh reads version {VERSION}: "
            "make it anew with 'twinmesh profile'."
        )
    try:
        profile = msgspec.convert(value, Profile, strict=False)  # JSON's keys are text, those of buckets too
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}; make it anew with 'twinmesh profile'.") from None
    if (bad := _unusable(profile.costs)) is not None:
        raise ValueError(f"{name} is damaged: {bad}; make it anew with 'twinmesh profile'.")
    return profile


def check_profile(
    profile: Profile, config: EngineConfig, *, model: str, device: str, name: str = "the profile"
) -> None:
    """Refuse a profile that is of something else than this engine.

    `model` and `device` are as the profile would have them; `name` is the profile's in messages.

    Raises:
        ValueError: names what differs, or the buckets that are missing.
    """
    for what, has, wanted in (
        ("model", profile.model, model),
        ("device", profile.device, device),
        ("dtype", profile.dtype, config.dtype),
        ("dtype of KV", profile.kv or profile.dtype, str(config.kv_dtypes)),
        ("formats of quantised weights", profile.formats, config.formats),
        ("tp of prefill and decode", profile.tp, degrees(config.topology)),
        ("page size", profile.page_size, config.page_size),
    ):
        if has != wanted:
            raise ValueError(
                f"{name} is of another {what}: it has {_shown(has)}, and {_shown(wanted)} is asked for: make one with "
                "'twinmesh profile', or ask for what it has."
            )
    check_buckets(profile.costs, config, name)


def check_buckets(costs: CostModel, config: EngineConfig, name: str = "the profile") -> None:
    """Refuse costs that lack a program which this engine runs.

    Raises:
        ValueError: names the buckets that are missing.
    """
    is_fused = any(spec.fused for spec in config.topology.meshes)
    for what, has, wanted in (
        ("prefill", costs.prefill, config.prefill_buckets),
        ("decode", costs.decode, config.decode_buckets),
        ("fused", costs.fused, config.prefill_buckets if is_fused else ()),
    ):
        missing = [bucket for bucket in wanted if bucket not in has]
        if missing:
            raise ValueError(
                f"{name} has no {what} steps of {_shown(missing)}, only of {_shown(sorted(has))}: ask for those "
                "buckets, or profile the others."
            )


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if value else "none"
    return str(value)


def _unusable(costs: CostModel) -> str | None:
    """Name a number that no cost can be."""
    programs = [
        (f"{kind} of {bucket}", program)
        for kind, found in (("prefill", costs.prefill), ("decode", costs.decode), ("fused", costs.fused))
        for bucket, program in found.items()
    ]
    parts: list[tuple[str, msgspec.Struct]] = [*programs, ("link", costs.link), ("host", costs.host)]
    for where, part in parts:
        for name in part.__struct_fields__:
            if not 0 <= float(getattr(part, name)) < math.inf:
                return f"{where}: {name} is {getattr(part, name)}"
    for where, program in programs:
        if _is_free(program):
            return f"{where}: a step takes no time"
    return None


def _is_free(program: ProgramCost) -> bool:
    return not any((program.fixed, program.chunk, program.pair, program.row, program.context))
