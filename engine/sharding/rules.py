"""Which mesh axis each logical axis of an array is divided over: sharding as data, apart from models and meshes.

Parameters, pools and logits name their dimensions by logical axes ("q_heads", "mlp"); a `ShardingRules` says which of
them a mesh divides, and over which of its own axes. Everything that places an array goes through one, so that another
way to divide a model is another value of this type. No arrays and no meshes here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from jax.sharding import PartitionSpec

# The axis that every mesh has, and the one in front of it where experts are divided too: devices lie [ep, tp / ep].
TP, EP = "tp", "ep"

type MeshAxis = str | tuple[str, ...]
"""What divides a logical axis: a mesh axis, or several, the first one's parts divided by the next."""


def axes_of(axis: MeshAxis | None) -> tuple[str, ...]:
    """Return the mesh axes of an entry of a partition."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else axis


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axis of each logical axis; None: it is whole on every device."""

    vocab: MeshAxis | None = None  # rows of embedding and head, columns of logits
    embed: MeshAxis | None = None  # the hidden state
    q_heads: MeshAxis | None = None
    kv_heads: MeshAxis | None = None  # of projections and of KV pools
    head_dim: MeshAxis | None = None
    mlp: MeshAxis | None = None  # columns of the MLP, or of each expert
    experts: str | None = None  # matrices of a mixture of experts
    routes: MeshAxis | None = None  # outputs of the router, and what belongs to them

    def axis(self, name: str | None) -> MeshAxis | None:
        """Return the mesh axis of a logical axis; None, also for a dimension without a name: it is whole.

        Raises:
            ValueError: no logical axis is called so.
        """
        if name is None:
            return None
        if name not in self.__dataclass_fields__:
            known = ", ".join(field.name for field in fields(self))
            raise ValueError(f"No logical axis is called {name!r}: known are {known}.")
        found: MeshAxis | None = getattr(self, name)
        return found

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Make the partition of an array with these logical axes, one name (or None) per dimension.

        Raises:
            ValueError: an unknown name, or two dimensions that one mesh axis would divide.
        """
        found = [self.axis(name) for name in axes]
        used = [one for axis in found for one in axes_of(axis)]
        if len(set(used)) < len(used):
            raise ValueError(f"Axes {list(axes)} would be divided over {used}: a mesh axis divides one of them only.")
        return PartitionSpec(*found)

    def over(self, mesh_axis: str) -> Iterator[str]:
        """Iterate over the logical axes that a mesh axis divides, alone or with others."""
        return (field.name for field in fields(self) if mesh_axis in axes_of(getattr(self, field.name)))


# Heads, MLP columns and the vocabulary over the devices of a mesh (Shoeybi et al. 2019, Megatron-LM).
TENSOR_PARALLEL = ShardingRules(vocab=TP, q_heads=TP, kv_heads=TP, mlp=TP)
_ALL = (EP, TP)
# The same devices, with experts over groups of them and an expert's columns over the devices of a group.
EXPERT_PARALLEL = ShardingRules(vocab=_ALL, q_heads=_ALL, kv_heads=_ALL, mlp=TP, experts=EP)
