"""A Ray cluster as an engine finds it: joined or started, and asked for room, whole or not at all.

What it has not is refused in a sentence that says what was asked for and what there is. Knows no actor
(`ray_actors.py`).
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from ...topology import Topology

_PLACE_SECONDS = 60.0  # until a placement group is there


def parts_of(topology: Topology, mesh_hosts: Sequence[str] | None) -> dict[Any, tuple[int, ...]]:
    """Divide the meshes over workers: by host, or each its own."""
    meshes = range(len(topology.meshes))
    if mesh_hosts is None:
        return {mesh: (mesh,) for mesh in meshes}
    if len(mesh_hosts) != len(meshes):
        raise ValueError(
            f"mesh_hosts names {len(mesh_hosts)} hosts and topology {topology} has {len(meshes)} meshes: name one for "
            "each mesh, in order."
        )
    return {host: tuple(mesh for mesh in meshes if mesh_hosts[mesh] == host) for host in dict.fromkeys(mesh_hosts)}


def join(ray: Any, address: str | None, devices: int) -> bool:
    """Join a cluster, or start one with room for so many devices; return whether this process has to leave it.

    Raises:
        ValueError: it cannot be joined, or this process is in another.
    """
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise ValueError(
                f"ray_address names {address}, and this process has joined the Ray cluster at {joined}: leave it out, "
                "or call ray.shutdown before."
            )
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address is None:
        # Of a cluster of this machine alone the CPUs are only counted, and a device may share one. Ray would run its
        # workers behind whatever else the machine does.
        cpus = max(devices, os.cpu_count() or 1)
        quiet |= {"num_cpus": cpus, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    try:
        ray.init(address=address or "local", **quiet)
    except Exception as error:
        where = "on this machine" if address is None else f"at {address}"
        why = _other_versions(error) or first_line(error)
        raise ValueError(f"Ray {ray.__version__} does not start or join a cluster {where}: {why}") from None
    return True


def _other_versions(error: Exception) -> str | None:
    """Say in a sentence which versions the cluster has and which this process; None: it is another error.

    Ray says it on seven lines, of which the first says nothing.
    """
    named = re.findall(r"^ *(Ray|Python): (\S+)$", str(error), re.MULTILINE)
    if [what for what, _ in named] != ["Ray", "Python"] * 2:
        return None
    theirs, ours = (" and ".join(f"{what} {version}" for what, version in half) for half in (named[:2], named[2:]))
    return f"the cluster has {theirs}, this process {ours}: install the same everywhere."


def wants_of(ray: Any, devices: Sequence[int], hosts: Sequence[str] | None) -> list[dict[str, float]]:
    """Say what each worker needs of Ray's resources, and refuse more than the cluster has."""
    there = ray.cluster_resources()
    has_gpus = there.get("GPU", 0) > 0
    wants = [{"CPU": 1.0, "GPU": float(n)} if has_gpus else {"CPU": float(n)} for n in devices]
    for kind in ("GPU", "CPU"):
        asked = sum(want.get(kind, 0) for want in wants)
        if asked > there.get(kind, 0):
            raise ValueError(
                f"the meshes need {asked:g} {kind}s and the Ray cluster has {there.get(kind, 0):g}: use fewer or "
                "smaller meshes, or add nodes."
            )
    if hosts is not None:
        for want, host in zip(wants, hosts, strict=True):
            want[f"node:{_address_of(ray, host)}"] = 0.001
    return wants


def _address_of(ray: Any, host: str) -> str:
    """Find a host of the cluster by its address or name."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    for node in alive:
        if host in (node["NodeManagerAddress"], node["NodeManagerHostname"], node.get("NodeName")):
            return str(node["NodeManagerAddress"])
    there = ", ".join(sorted(f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in alive))
    raise ValueError(f"mesh_hosts names {host!r}, which is no node of the Ray cluster: there are {there}.")


def reserve(ray: Any, wants: Sequence[dict[str, float]]) -> Any:
    """Reserve what each worker needs, all or nothing."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(wants), strategy="PACK")
    is_there = False
    try:
        is_there = group.wait(_PLACE_SECONDS)
    finally:
        if not is_there:  # also where Ctrl-C ends the wait: the cluster may be another's
            remove_placement_group(group)
    if is_there:
        return group
    free = {kind: value for kind, value in ray.available_resources().items() if kind in ("CPU", "GPU")}
    asked = "; ".join(", ".join(f"{value:g} {kind}" for kind, value in want.items()) for want in wants)
    left = ", ".join(f"{value:g} {kind}" for kind, value in free.items()) or "none"
    raise ValueError(
        f"the Ray cluster has no room for the meshes within {_PLACE_SECONDS:g} s: they need, worker by worker, "
        f"{asked}; free are {left}: wait for others to end, or add nodes."
    )


def hosts_of(ray: Any, group: Any) -> list[str]:
    """Find the address of each worker's host."""
    from ray.util.placement_group import placement_group_table

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    placed = placement_group_table(group)["bundles_to_node_id"]
    return [addresses[placed[index]] for index in range(len(placed))]


def first_line(error: BaseException) -> str:
    """Return what an error says, its first line as a sentence."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
