"""Meshes whose devices belong to several processes, which run the same programs in the same order.

Each of these processes is a member of the mesh's group: it joins the group before JAX looks for devices, has JAX see
the devices of all, and drives its own. A process is in one group at most, and leaves it only by ending. That all
members do the same is up to whoever tells them what to do; where one has ended, collectives of the others raise or
never return.
"""

import jax

from ..protocol.worker import Member
from ..topology import TopologyError
from .mesh import find_devices, request_cpu_devices

# At its end a member waits so long for the others to end as well.
_LEAVING_SECONDS = 10


def join(member: Member, timeout: float) -> None:
    """Join a group, and wait for all members. JAX must not have looked for devices yet.

    Where the others do not come within `timeout` seconds XLA ends this process (jax 0.12.0.1).

    Raises:
        TopologyError: JAX has devices already, or somebody else listens at the coordinator's address.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            member.coordinator,
            member.count,
            member.index,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(timeout)),
            coordinator_bind_address=member.coordinator,  # JAX would listen on every address of the machine
            shutdown_timeout_seconds=_LEAVING_SECONDS,
        )
    except Exception as error:  # RuntimeError of several kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise TopologyError(
            f"process {member.index} of the {member.count} of one mesh could not join the others at "
            f"{member.coordinator} ({reason}): let it be a process of its own, and an address that is free."
        ) from error


def spanned_devices(tp: int, count: int) -> list[jax.Device]:
    """Find the `tp` devices of a mesh, of each of the group's `count` members as many; on CPUs they are created.

    Raises:
        TopologyError: the degree does not divide so, or a member has too few.
    """
    if tp % count:
        raise TopologyError(f"a mesh of tp {tp} cannot span {count} processes: use a number that divides its tp.")
    each = tp // count
    request_cpu_devices(each)
    devices = find_devices()
    found = list[jax.Device]()
    for member in range(count):
        own = [device for device in devices if device.process_index == member]
        if len(own) < each:
            raise TopologyError(
                f"a mesh of tp {tp} over {count} processes needs {each} devices in each: process {member} has "
                f"{len(own)}."
            )
        found += own[:each]
    return found
