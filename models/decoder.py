"""One decoder for every family, and the description of its parameters that an engine runs it with.

The decoder maps packed tokens to hidden states and hidden states to logits. Attention is a callback (`Attend`): the
engine's writes the paged KV cache and attends over pages, `dense_causal` below attends over one sequence and can be
differentiated. A cache is threaded through the layers as a value: nothing here keeps state while it is traced. Layers
are unrolled: 30 of them compile in 1.4 s on a CPU and run twice as fast as a scan.

Parameters are kept outside: `abstract_params` describes them in a fixed order without allocating any, a step takes them
as a plain tuple of arrays in that order (an `nnx.State` costs 0.8 ms per call, a tuple 0.14), and `bind` rebuilds a
`Decoder` at trace time. No KV cache, no sampling, no sharding decisions here.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..kernels_pallas.matmul import PLAIN, Products
from ..kernels_pallas.quantized import QuantizedArray, abstract
from ..kernels_pallas.rotary import Rotation
from .config import ModelConfig
from .layers import MLP, Attention, Embedding, RMSNorm, rotary_tables
from .moe import MixtureOfExperts
from .quantized import Described, Weight


class Attend[KV, Rows](Protocol):
    """Attention of one layer, supplied by the caller: a pure function of arrays, so that it can be traced."""

    def __call__(
        self,
        kv: KV,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotation: Rotation,
        sink: jax.Array | None,
        rows: Rows,
    ) -> tuple[jax.Array, KV]:
        """Norm and rotate q and k, add k and v to the cache, and attend from q over it.

        Args:
            kv: the caller's cache, as the layer before returned it.
            layer: the layer's index.
            q: [T, Hq, D] of the packed tokens, as projected.
            k: [T, Hk, D], as projected.
            v: [T, Hk, D].
            rotation: what q and k pass first.
            sink: [Hq] float32, a logit per head that joins the softmax's denominator only; None: no sinks.
            rows: what the caller knows about the tokens, the same for all layers.

        Returns:
            [T, Hq, D], and the new cache.
        """
        ...


class Block(nnx.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With sandwich norms (Gemma 2 and 3) the outputs of attention and MLP pass a norm of their own before they are added.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.is_sandwich = config.sandwich_norms
        self.attention_norm, self.attention = RMSNorm(hidden, eps), Attention(config, dtype=dtype, products=products)
        make = MLP if config.experts is None else MixtureOfExperts
        self.mlp_norm, self.mlp = RMSNorm(hidden, eps), make(config, dtype=dtype, products=products)
        if config.sandwich_norms:
            self.attention_output_norm, self.mlp_output_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def __call__[KV, Rows](
        self,
        kv: KV,
        layer: int,
        x: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        attend: Attend[KV, Rows],
        rows: Rows,
        is_token: jax.Array | None,
    ) -> tuple[jax.Array, KV]:
        """Run the layer on x [T, E]; `tables` are the rotary cosine and sine, [T, D / 2] each; else as `hidden`."""
        with jax.named_scope("attention"):
            q, k, v = self.attention.qkv(self.attention_norm(x))
            attended, kv = attend(kv, layer, q, k, v, self.attention.rotation(*tables), self.attention.sink, rows)
            out = self.attention.output(attended)
            x = x + (self.attention_output_norm(out) if self.is_sandwich else out)
        with jax.named_scope("mlp"):
            normed = self.mlp_norm(x)
            out = self.mlp(normed, is_token) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed)
            return x + (self.mlp_output_norm(out) if self.is_sandwich else out), kv


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters are zero until they are bound: see `bind`.

    `dtype` is that of the weights, those of norms and quantised ones excepted, and of the activations between norms.
    `products` says how quantised weights are multiplied by, and over which devices they are divided.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, products: Products = PLAIN) -> None:
        self.config = config
        self.embedding = Embedding(config, dtype=dtype, products=products)
        self.layers = nnx.List([Block(config, dtype=dtype, products=products) for _ in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.head = Embedding(config, dtype=dtype, products=products)

    def hidden[KV, Rows](
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend[KV, Rows],
        kv: KV,
        rows: Rows,
        is_token: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """Compute the hidden states after the final norm.

        Args:
            tokens: [T] int32 ids, any number of sequences packed one after the other. Padding is id 0.
            positions: [T] int32, each token's position in its own sequence.
            attend: attention of each layer; it alone decides which tokens a token attends to.
            kv: the cache that the first layer's attention takes.
            rows: passed on to every layer's attention.
            is_token: [T] bool, False for padding, which then costs a mixture of experts nothing; None: all are tokens.

        Returns:
            [T, E] in `dtype`, and the cache after the last layer.
        """
        (hidden,), kv = self.states((len(self.config.layers),), tokens, positions, attend, kv, rows, is_token)
        return hidden, kv

    def states[KV, Rows](
        self,
        after: Sequence[int],
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend[KV, Rows],
        kv: KV,
        rows: Rows,
        is_token: jax.Array | None = None,
    ) -> tuple[list[jax.Array], KV]:
        """Compute the hidden states after some layers, numbered as transformers' `hidden_states` are.

        `after`: 0 for the embeddings, l for what the l-th layer gives, and the number of layers for what the final norm
        makes of the last one's. Else as `hidden`. Returns [T, E] for each, in the order of `after`.
        """
        with jax.named_scope("embedding"):
            x = self.embedding.lookup(tokens)  # [T, E]
        kept = {0: x}
        ropes = dict.fromkeys(spec.rope for spec in self.config.layers)
        tables = {rope: rotary_tables(positions, self.config.head_dim, rope) for rope in ropes}
        for index, (block, spec) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            with jax.named_scope(f"layer{index}"):
                x, kv = block(kv, index, x, tables[spec.rope], attend, rows, is_token)
            kept[index + 1] = x
        with jax.named_scope("final_norm"):
            kept[len(self.layers)] = self.norm(x)
        return [kept[index] for index in after], kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Score the vocabulary after hidden states [R, E]: [R, V] float32."""
        with jax.named_scope("head"):
            return (self.embedding if self.config.tie_embeddings else self.head).score(hidden)


def dense_hidden(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Compute the hidden states [T, E] of one sequence, tokens [T], without a cache; differentiable."""
    return dense_states(decoder, tokens[None], (len(decoder.config.layers),))[0][0]


def dense_states(decoder: Decoder, tokens: jax.Array, after: Sequence[int]) -> list[jax.Array]:
    """Compute hidden states of sequences of one length, tokens [B, T], without a cache; differentiable.

    `after` is as for `Decoder.states`. Returns [B, T, E] for each of it.
    """
    count, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), count)
    attend = dense_causal(decoder.config, count)
    states, _ = decoder.states(after, tokens.reshape(-1), positions, attend, None, None)
    return [state.reshape(count, length, -1) for state in states]


def dense_causal(config: ModelConfig, count: int = 1) -> Attend[None, None]:
    """Make plain causal attention over `count` sequences of one length, differentiable: position t of the first is
    row t. For tests and gradients.

    Honours each layer's window and softcap, which `jax.nn.dot_product_attention` does not have. Materialises
    [count, Hq, T, T] scores in float32.
    """

    def attend(
        kv: None,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotation: Rotation,
        sink: jax.Array | None,
        rows: None,
    ) -> tuple[jax.Array, None]:
        q, k = rotation.apply(q, k)
        apart = [x.reshape(count, -1, *x.shape[1:]) for x in (q, k, v)]
        mixed = jax.vmap(lambda q, k, v: _attend_causally(config, layer, q, k, v, sink))(*apart)
        return mixed.reshape(q.shape), None

    return attend


def _attend_causally(
    config: ModelConfig, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array | None
) -> jax.Array:
    """Attend within one sequence: q [T, Hq, D] and k, v [T, Hk, D] to [T, Hq, D]."""
    spec, groups = config.layers[layer], config.num_heads // config.num_kv_heads
    grouped = q.reshape(q.shape[0], config.num_kv_heads, groups, config.head_dim).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k.astype(jnp.float32), precision=highest)
    scores = scores * config.attention_scale  # [Hk, G, T, T]
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    query, key = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[0])[None, :]
    seen = key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    scores = jnp.where(seen, scores, -jnp.inf)
    if sink is not None:
        sinks = sink.reshape(config.num_kv_heads, groups, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:3], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : q.shape[0]]
    mixed = jnp.einsum("kgts,skd->tkgd", weights, v.astype(jnp.float32), precision=highest)
    return mixed.reshape(q.shape).astype(q.dtype)


class ParamSpec(NamedTuple):
    """The description of one parameter."""

    value: Described  # shape and dtype; of a quantised parameter, those of its arrays
    axes: tuple[str, ...]  # one logical axis name per dimension


class AbstractParams(NamedTuple):
    """The parameters of a decoder before any is allocated."""

    graphdef: nnx.GraphDef[Decoder]  # hashable; rebuilds the module (`bind`)
    # By dotted path, such as "layers.0.attention.q_proj", in the order of the arrays at run time.
    specs: Mapping[str, ParamSpec]

    @property
    def formats(self) -> dict[str, str]:
        """Return the format of each quantised parameter, by path."""
        values = {path: spec.value for path, spec in self.specs.items()}
        return {path: value.format for path, value in values.items() if isinstance(value, QuantizedArray)}


def abstract_params(
    config: ModelConfig,
    dtype: DTypeLike,
    formats: Mapping[str, str] | None = None,
    products: Products = PLAIN,
) -> AbstractParams:
    """Describe the parameters of `Decoder(config, dtype=dtype, products=products)` without allocating them.

    Those of norms are float32. `formats` names the parameters that are quantised, by path, and each one's format.
    """
    return _abstract_params(config, jnp.dtype(dtype), tuple((formats or {}).items()), products)


@functools.lru_cache(32)
def _abstract_params(
    config: ModelConfig, dtype: jnp.dtype, formats: tuple[tuple[str, str], ...], products: Products
) -> AbstractParams:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, products=products)))
    specs, quantized = {}, dict(formats)
    for steps, variable in nnx.to_flat_state(state):
        path, described, inputs = ".".join(map(str, steps)), variable.get_value(), variable.get_metadata("inputs")
        if path in quantized and inputs is not None:
            described = abstract(quantized[path], described.shape, inputs, variable.get_metadata("stacked"))
        specs[path] = ParamSpec(described, variable.get_metadata("axes"))
    return AbstractParams(graphdef, MappingProxyType(specs))


def bind(graphdef: nnx.GraphDef[Decoder], params: Sequence[Weight]) -> Decoder:
    """Build a decoder over `params`, in the order of `AbstractParams.specs`; to be called while a step is traced."""
    return nnx.merge(graphdef, list(params))
