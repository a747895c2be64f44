"""A mixture of experts: the router, and the experts that take the MLP's place.

Each token passes the `per_token` experts that the router scores highest. The largest scores are found one after the
other, each as the least index among the maxima: `jax.lax.top_k` is a full sort on GPUs and slow on CPUs. Experts'
weights are one array per projection with a leading axis of experts; the products of a step read those experts only
that some token has chosen (`grouped_matmul` of `kernels_pallas/grouped.py`, which is where kernels come in). Rows that
are padding of a step choose none.

On several devices each has its columns of every expert, and the sum over devices is taken once, of the weighted sum; or
experts are divided too, and rows go to them (`expert_parallel.py`).
Derivatives are those of `every_expert`, which computes all of them for all rows: the oracle as well. Shapes: T packed
tokens, E hidden, F columns of an expert, X experts, K of them per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from ..kernels_pallas.grouped import group, grouped_matmul, grouped_unit
from ..kernels_pallas.matmul import PLAIN, Products, matmul_part
from ..kernels_pallas.quantized import QuantizedArray
from .config import Activation, ClampedGate, Experts, ModelConfig
from .expert_parallel import Parts, exchanged
from .layers import activate, multiply, param, value
from .quantized import Weight


class ExpertWeights(NamedTuple):
    """The experts' parameters, as products take them."""

    gate: Weight  # [X, E, F]
    up: Weight  # [X, E, F]
    down: Weight  # [X, F, E]
    gate_bias: jax.Array | None = None  # [X, F]; None exactly where `up_bias` is
    up_bias: jax.Array | None = None  # [X, F]

    @property
    def number(self) -> int:
        """Return how many experts there are on this device; a quantised parameter's own shape is that of all."""
        return int(jax.tree.leaves(self.gate)[0].shape[0])


# Logical axes of the projections into an expert, of the one out of it, and of the biases of the former.
_IN, _OUT, _BIAS = ("experts", "embed", "mlp"), ("experts", "mlp", "embed"), ("experts", "mlp")


class Choice(NamedTuple):
    """The experts that each token passes."""

    experts: jax.Array  # [T, K] int32, by falling score; as many as there are experts: none
    shares: jax.Array  # [T, K] float32, the weights of their outputs


def choose(scores: jax.Array, experts: Experts) -> Choice:
    """Choose the experts with the highest scores [T, X] float32; of equal ones the first, as `jax.lax.top_k` does."""
    index, left = jnp.arange(experts.count, dtype=jnp.int32), scores
    found, best = [], []
    for _ in range(experts.per_token):
        highest = jnp.max(left, axis=-1, keepdims=True)
        at = jnp.min(jnp.where(left == highest, index, experts.count - 1), axis=-1, keepdims=True)
        found.append(at)
        best.append(highest)
        left = jnp.where(index == at, -jnp.inf, left)
    chosen = jnp.concatenate(best, axis=-1)
    if experts.is_normalised:
        shares = jax.nn.softmax(chosen, axis=-1)
    else:
        shares = jnp.exp(chosen - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    return Choice(jnp.concatenate(found, axis=-1), shares)


class Unit(NamedTuple):
    """What is static of an expert's computation."""

    gate: Activation | ClampedGate
    products: Products = PLAIN


def gated(gate: jax.Array, up: jax.Array, unit: Activation | ClampedGate) -> jax.Array:
    """Compute the gated unit of an expert elementwise."""
    if not isinstance(unit, ClampedGate):
        return activate(gate, unit) * up
    gate, up = jnp.minimum(gate, unit.limit), jnp.clip(up, -unit.limit, unit.limit)
    return gate * jax.nn.sigmoid(gate * unit.alpha) * (up + 1)


@dataclass(frozen=True)
class Gated:
    """`gated` as a value: two with the same unit are equal, so that layers share a kernel."""

    unit: Activation | ClampedGate

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Compute the unit."""
        return gated(gate, up, self.unit)


def _expert(x: jax.Array, w: ExpertWeights, index: jax.Array, unit: Unit) -> jax.Array:
    """Transform rows [B, E] by one expert: [B, E] float32, without the bias of the down projection."""
    gate_proj, up_proj, down_proj = (
        a.matrix_at(index) if isinstance(a, QuantizedArray) else a[index] for a in (w.gate, w.up, w.down)
    )
    gate, up = (matmul_part(x, a, products=unit.products) for a in (gate_proj, up_proj))
    if w.gate_bias is not None and w.up_bias is not None:
        gate, up = gate + w.gate_bias[index], up + w.up_bias[index]
    return matmul_part(gated(gate, up, unit.gate), down_proj, products=unit.products, dtype=jnp.float32)


def every_expert(x: jax.Array, w: ExpertWeights, choice: Choice, unit: Unit) -> jax.Array:
    """Compute all experts for all rows [T, E], one after the other, and add them up by weight: [T, E] float32."""
    count = w.number
    weights = jnp.zeros((x.shape[0], count)).at[jnp.arange(x.shape[0])[:, None], choice.experts].add(choice.shares)

    def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return total + weights[:, index, None] * _expert(x, w, index, unit), None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), jnp.arange(count, dtype=jnp.int32))[0]


def run_experts(x: jax.Array, w: ExpertWeights, chosen: jax.Array, unit: Unit) -> jax.Array:
    """Compute the chosen experts [T, K] for each row [T, E]: [T, K, E] float32, without the bias of the down
    projection; anything where none is chosen."""
    groups, products = group(chosen, w.number), unit.products
    biases = () if w.gate_bias is None or w.up_bias is None else (w.gate_bias, w.up_bias)
    hidden = grouped_unit(x[groups.rows], (w.gate, w.up), biases, groups, Gated(unit.gate), products)
    return grouped_matmul(hidden, w.down, groups.sizes, products=products, dtype=jnp.float32)[groups.places]


def chosen_experts(x: jax.Array, w: ExpertWeights, choice: Choice, unit: Unit) -> jax.Array:
    """Compute the chosen experts for each row [T, E] and add them up by weight, in their order: [T, E] float32."""

    @jax.custom_jvp
    def mix(x: jax.Array, w: ExpertWeights, choice: Choice) -> jax.Array:
        return weighted(choice, run_experts(x, w, choice.experts, unit), w.number)

    @mix.defjvp
    def mix_jvp(
        primals: tuple[jax.Array, ExpertWeights, Choice], tangents: tuple[jax.Array, ExpertWeights, Choice]
    ) -> tuple[jax.Array, jax.Array]:
        (x, w, choice), (x_tangent, w_tangent, choice_tangent) = primals, tangents

        def reference(x: jax.Array, w: ExpertWeights, shares: jax.Array) -> jax.Array:
            return every_expert(x, w, choice._replace(shares=shares), unit)

        moved = x_tangent, w_tangent, choice_tangent.shares
        return mix(x, w, choice), jax.jvp(reference, (x, w, choice.shares), moved)[1]

    return mix(x, w, choice)


def weighted(choice: Choice, outputs: jax.Array, count: int) -> jax.Array:
    """Add up outputs [T, K, E] by their shares in order: [T, E] float32. Those of no expert, of `count`, are 0."""
    is_there = choice.experts < count
    first, *rest = (
        jnp.where(is_there[:, i, None], choice.shares[:, i, None] * outputs[:, i].astype(jnp.float32), 0)
        for i in range(choice.shares.shape[1])
    )
    return sum(rest, first)


class MixtureOfExperts(nnx.Module):
    """The experts of a layer and their router, in the place of its MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        experts, hidden, inner = config.experts, config.hidden_size, config.intermediate_size
        assert experts is not None
        count = experts.count
        self.experts, self.products = experts, products
        self.unit = Unit(config.activation if experts.clamped is None else experts.clamped, products)
        self.router = param((count, hidden), ("routes", "embed"), dtype, inputs=0)
        self.gate_proj = param((count, hidden, inner), _IN, dtype, inputs=1, stacked=1)
        self.up_proj = param((count, hidden, inner), _IN, dtype, inputs=1, stacked=1)
        self.down_proj = param((count, inner, hidden), _OUT, dtype, inputs=1, stacked=1)
        if experts.has_bias:
            self.router_bias = param((count,), ("routes",), dtype)
            self.gate_bias = param((count, inner), _BIAS, dtype)
            self.up_bias = param((count, inner), _BIAS, dtype)
            # Of a route and not of an expert: added where rows are, it is whole on every device.
            self.down_bias = param((count, hidden), ("routes", "embed"), dtype)

    def route(self, x: jax.Array) -> Choice:
        """Choose the experts of hidden states [T, E]."""
        scores = multiply(x, self.router, self.products)  # [T, X] float32
        if self.experts.has_bias:
            scores = scores + value(self.router_bias).astype(jnp.float32)
        return choose(scores, self.experts)

    def __call__(self, x: jax.Array, is_token: jax.Array | None = None) -> jax.Array:
        """Transform hidden states [T, E] -> [T, E]; `is_token` [T] says which are no padding, None: all."""
        with jax.named_scope("router"):
            choice = self.route(x)
            if is_token is not None:
                choice = choice._replace(experts=jnp.where(is_token[:, None], choice.experts, self.experts.count))
        with jax.named_scope("experts"):
            mixed = self._mix(x, self._weights(), choice)
        if self.experts.has_bias:
            biases = value(self.down_bias).at[choice.experts].get(mode="clip")
            mixed = mixed + weighted(choice, biases, self.experts.count)
        return mixed.astype(x.dtype)

    def _weights(self) -> ExpertWeights:
        gate, up, down = (weight.get_value() for weight in (self.gate_proj, self.up_proj, self.down_proj))
        if not self.experts.has_bias:
            return ExpertWeights(gate, up, down)
        return ExpertWeights(gate, up, down, value(self.gate_bias), value(self.up_bias))

    def _mix(self, x: jax.Array, w: ExpertWeights, choice: Choice) -> jax.Array:
        """Compute the chosen experts on every device, with the columns that it has."""
        products = self.products
        if products.mesh is None:
            return chosen_experts(x, w, choice, self.unit)

        def part(x: jax.Array, w: ExpertWeights, choice: Choice) -> jax.Array:
            if products.expert_axis is not None:
                return self._over_groups(x, w, choice, products.expert_axis)
            total: jax.Array = jax.lax.psum(chosen_experts(x, w, choice, self.unit), products.column_axis)
            return total

        whole, axes = PartitionSpec(), (_IN, _IN, _OUT, _BIAS, _BIAS)
        lie: Any = [whole if a is None else products.partition(names, a) for names, a in zip(axes, w, strict=True)]
        on_each = jax.shard_map(
            part, mesh=products.mesh, in_specs=(whole, ExpertWeights(*lie), whole), out_specs=whole, check_vma=False
        )
        mixed: jax.Array = on_each(x, w, choice)
        return mixed

    def _over_groups(self, x: jax.Array, w: ExpertWeights, choice: Choice, axis: str) -> jax.Array:
        """Compute a share of the rows [T, E] on every group of devices, with the experts of all: [T, E] float32."""
        count, rows = self.experts.count, x.shape[0]
        parts = Parts(axis, count // w.number, count)
        each = -(-rows // parts.groups)
        missing = each * parts.groups - rows
        x = jnp.pad(x, ((0, missing), (0, 0)))
        chosen, shares = (
            jnp.pad(a, ((0, missing), (0, 0)), constant_values=fill) for a, fill in zip(choice, (count, 0), strict=True)
        )
        start = jax.lax.axis_index(axis) * each
        x, chosen, shares = (jax.lax.dynamic_slice_in_dim(a, start, each) for a in (x, chosen, shares))
        outputs = exchanged(x, chosen, parts, lambda rows, experts: run_experts(rows, w, experts, self.unit))
        total = jax.lax.psum(weighted(Choice(chosen, shares), outputs, count), self.products.column_axis)
        everyone: jax.Array = jax.lax.all_gather(total, axis, tiled=True)
        return everyone[:rows]
