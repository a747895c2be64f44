"""A model's files as what research starts from: configuration, parameters as a pytree, and a pure forward function.

    model = twinmesh.models.load("smollm2")
    logits = model.forward(model.params, tokens)                # [B, T] -> [B, T, V], and jax.grad of it

There is no engine here: no pages, no batching, no scheduler. Attention is dense, so that everything is differentiable;
what an engine computes for the same tokens differs by rounding alone. Weights that files hold quantised become floats.
Parameters have the names and shapes that `LLM.update_params` takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from .checkpoints.catalog import resolve_model
from .checkpoints.open import open_checkpoint
from .config import ModelConfig
from .decoder import Decoder, abstract_params, bind, dense_states
from .quantized import placed
from .text.tokenizer import Tokenizer

# A model's parameters by dotted path, such as "layers.0.attention.q_proj".
type Params = Mapping[str, jax.Array]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model without an engine. Its functions are pure: trace, differentiate and compile them as you like."""

    config: ModelConfig
    params: dict[str, jax.Array]  # by dotted path, as `LLM.update_params` takes them
    tokenizer: Tokenizer
    _graphdef: nnx.GraphDef[Decoder] = field(repr=False)

    def forward(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Compute the logits of sequences, differentiable in `params`.

        Args:
            params: a parameter for each name in `self.params`.
            tokens: [B, T] int32 ids, or [T] of one sequence. Shorter sequences are padded at their end with any id:
                no token sees what comes after it.

        Returns:
            [B, T, V] float32, or [T, V]: row t is of the token after the first t + 1.

        Raises:
            ValueError: parameters that are missing or superfluous, or tokens of another form.
        """
        decoder, many = self._decoder(params), _as_batch(tokens)
        (hidden,) = dense_states(decoder, many, (self.config.num_layers,))
        logits = decoder.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*many.shape, -1)
        return logits if tokens.ndim == 2 else logits[0]

    def hidden_states(self, params: Params, tokens: jax.Array, layers: Sequence[int] = (-1,)) -> jax.Array:
        """Compute hidden states of sequences, differentiable in `params`.

        `layers` counts as transformers' `hidden_states` does: 0 for the embeddings, l for what the l-th layer gives,
        the last, also -1, for what the final norm makes of it. Returns [len(layers), B, T, E], or [len(layers), T, E]
        of one sequence, in the parameters' dtype. Else as `forward`.
        """
        after = check_layers(layers, self.config.num_layers)
        states = jnp.stack(dense_states(self._decoder(params), _as_batch(tokens), after))
        return states if tokens.ndim == 2 else states[:, 0]

    def _decoder(self, params: Params) -> Decoder:
        if params.keys() != self.params.keys():
            name = sorted(params.keys() ^ self.params.keys())[0]
            what = "lacks" if name in self.params else "has, besides the model's own,"
            raise ValueError(f"params {what} {name!r}: give one array for each name in model.params.")
        return bind(self._graphdef, tuple(params[path] for path in self.params))


def load(model: str | Path, dtype: DTypeLike = "float32") -> LoadedModel:
    """Load a model onto JAX's first device: its configuration, parameters and forward function.

    Args:
        model: as for `LLM`: a name that was fetched, a GGUF file or a directory.
        dtype: of the parameters, those of norms excepted, which are float32 always: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: no such model, files that cannot be used, or another dtype.
    """
    name = _dtype_name(dtype)
    checkpoint = open_checkpoint(resolve_model(model))
    abstract = abstract_params(checkpoint.config, name)
    device = SingleDeviceSharding(jax.devices()[0])
    wanted = {path: (placed(spec.value, lambda _: device),) for path, spec in abstract.specs.items()}
    loaded = {path: arrays[0] for path, arrays in checkpoint.load(wanted)}
    params = {path: loaded[path] for path in abstract.specs}
    assert all(isinstance(array, jax.Array) for array in params.values())  # no formats were asked for
    return LoadedModel(checkpoint.config, params, checkpoint.tokenizer(), abstract.graphdef)  # type: ignore[arg-type]


def check_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Count layers from the front: of a model with `count` layers 0 to `count`, or -1 for the last and so on.

    Raises:
        ValueError: none, or one that there is not.
    """
    given = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else ()
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count - 1 <= layer <= count:
            raise ValueError(
                f"layers holds {layer!r}: give numbers from 0, the embeddings, to {count}, the last, or from -1 "
                f"backwards to {-count - 1}."
            )
    if not given:
        raise ValueError(f"layers={layers!r} names none: give a list such as [-1], of 0 to {count}.")
    return tuple(layer % (count + 1) for layer in given)


def _as_batch(tokens: jax.Array) -> jax.Array:
    if tokens.ndim not in (1, 2) or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give whole numbers [B, T], or [T] of one.")
    return tokens.reshape(-1, tokens.shape[-1]).astype(jnp.int32)


def _dtype_name(dtype: DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not usable: give one of {', '.join(_DTYPES)}.")
    return name
