"""What one mesh's programs depend on, and the meshes that it exchanges KV with."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from ...models.config import ModelConfig
from ...models.decoder import AbstractParams
from ..config import EngineConfig
from ..kv_dtypes import KVDtype
from ..sampling.request_state import DenseRows
from ..topology import MeshSpec
from .kv_cache import DeviceState, abstract_dense


@dataclass(frozen=True)
class MeshPlan:
    """Everything that the shapes and shardings of one mesh's programs depend on."""

    mesh: Mesh
    spec: MeshSpec
    model: ModelConfig  # the checkpoint's
    params: AbstractParams  # of the model as the mesh runs it (`tensor_parallel.model_on`)
    config: EngineConfig
    state: DeviceState  # abstract, of the model as the mesh runs it

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of activations and weights that are not quantised."""
        return jnp.dtype(self.config.dtype)

    @property
    def dense(self) -> DenseRows:
        """The dense rows of the mesh's slots, abstract."""
        return abstract_dense(self.model, self.config, self.mesh)

    @property
    def destinations(self) -> set[int]:
        """Return the tensor-parallel degrees of the meshes that this one may send KV to."""
        return {spec.tp for spec in self._others if spec.decodes}

    @property
    def sources(self) -> set[int]:
        """Return the tensor-parallel degrees of the meshes that this one may receive KV from."""
        return {spec.tp for spec in self._others} if self.spec.decodes else set()

    @property
    def kv(self) -> KVDtype:
        """Return what keys and values are stored as."""
        return self.config.kv_on(self.spec)

    @property
    def converted_to(self) -> KVDtype | None:
        """Return what it converts keys and values to before it sends them; None: it sends them as they are."""
        stored = self.config.kv_dtypes.decode
        return stored if self.destinations and self.kv != stored else None

    @property
    def has_scales(self) -> bool:
        """Return whether it stores or sends 8-bit pages, whose channels have scales."""
        return any(kv is not None and kv.is_quantized for kv in (self.kv, self.converted_to))

    @property
    def _others(self) -> list[MeshSpec]:
        others = list(self.config.topology.meshes)
        others.remove(self.spec)
        return others
