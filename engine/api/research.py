"""What a running engine's model computes inside: hidden states, logits of a prompt's tokens, embeddings; parameters.

They come from a step of their own (`worker/states_step.py`), with the engine's parameters as they are when a call
begins. An engine compiles it when it is asked for the first time, and otherwise neither compiles nor allocates anything
for it. One call runs at a time; its steps and the engine's take turns on the first mesh that prefills.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ...kernels_pallas.quantized import QuantizedArray
from ...models.loaded import check_layers
from ...models.text.tokenizer import Tokenizer
from ..core.engine_core import EngineCore
from ..host.progress import Progress
from ..sharding.weights import Params
from ..worker.local_executor import LocalExecutor
from ..worker.states_runner import Dispatch, StatesRunner
from .pooling_params import PoolingParams, one_each
from .prompts import Prompt, PromptLike, as_list, check_ids_or_text, check_texts

Pooling = Literal["mean", "last", "cls"]
_POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Hidden states of one prompt."""

    prompt_token_ids: list[int]
    layers: tuple[int, ...]  # counted from 0, the embeddings; the highest: after the final norm
    positions: list[int]  # which of the prompt's tokens, counted from 0
    states: np.ndarray  # [len(layers), len(positions), E] float32


@dataclass(frozen=True, eq=False)
class PromptLogits:
    """Logits after tokens of one prompt, raw: before temperature, penalties and the like."""

    prompt_token_ids: list[int]
    positions: list[int]  # which of the prompt's tokens, counted from 0
    logits: np.ndarray  # [len(positions), V] float32: a row scores the token after that position


@dataclass(frozen=True)
class EmbeddingOutput:
    """One prompt's embedding."""

    embedding: list[float]  # E numbers

    @property
    def hidden_size(self) -> int:
        """Return how many numbers it has."""
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """One prompt's embedding and what it is of, shaped as vLLM's output."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


class ParameterInfo(NamedTuple):
    """What one parameter is."""

    shape: tuple[int, ...]
    dtype: str  # of floats; of a quantised one the format, such as "Q8_0"


class _Mesh(NamedTuple):
    """What a call has of the engine."""

    runner: StatesRunner
    params: Params
    dispatch: Dispatch


class Research:
    """The part of an `LLM` that is for research."""

    def __init__(self, core: EngineCore, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._core, self._bounds = core, (tokenizer, max_model_len)
        self._lock = threading.Lock()
        self._runner: StatesRunner | None = None  # made when it is first asked for

    def hidden_states(
        self, prompts: PromptLike | Iterable[PromptLike], layers: Sequence[int], positions: Sequence[int] | None
    ) -> list[HiddenStates]:
        """Do what `LLM.hidden_states` says."""
        checked = self._check(prompts)
        wanted = [check_positions(positions, len(prompt.ids)) for prompt in checked]
        with self._lock:
            mesh = self._mesh("hidden_states")
            after = check_layers(layers, mesh.runner.plan.model.num_layers)
            found = [
                np.stack([state[wanted[index]].astype(np.float32) for state in states])
                for index, states in self._states(mesh, checked, after)
            ]
        return [
            HiddenStates(prompt.token_ids, after, at, states)
            for prompt, at, states in zip(checked, wanted, found, strict=True)
        ]

    def logits(self, prompts: PromptLike | Iterable[PromptLike], positions: Sequence[int] | None) -> list[PromptLogits]:
        """Do what `LLM.logits` says."""
        checked = self._check(prompts)
        wanted = [check_positions(positions, len(prompt.ids)) for prompt in checked]
        with self._lock:
            mesh = self._mesh("logits")
            last = (mesh.runner.plan.model.num_layers,)
            return [
                PromptLogits(
                    checked[index].token_ids,
                    wanted[index],
                    mesh.runner.logits(hidden[wanted[index]], mesh.params, mesh.dispatch),
                )
                for index, (hidden,) in self._states(mesh, checked, last)
            ]

    def embed(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        pooling: Pooling,
        normalize: bool,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: bool,
    ) -> list[EmbeddingRequestOutput]:
        """Do what `LLM.embed` says."""
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not usable: give one of {', '.join(_POOLINGS)}.")
        checked = self._check(prompts)
        params, made = one_each(pooling_params, len(checked)), list[EmbeddingRequestOutput]()
        with self._lock, Progress("embedded", len(checked), "prompts", shown=use_tqdm) as line:
            mesh = self._mesh("embed")
            model = mesh.runner.plan.model
            _check_dimensions(params, model.hidden_size)
            for index, (hidden,) in self._states(mesh, checked, (model.num_layers,)):
                one = params[index]
                is_unit = normalize if one.use_activation is None else one.use_activation
                vector = pool(hidden, pooling, normalize=is_unit, dimensions=one.dimensions).tolist()
                made.append(
                    EmbeddingRequestOutput(f"embedding-{index}", EmbeddingOutput(vector), checked[index].token_ids)
                )
                line.advance(1)
        return made

    def parameters(self) -> dict[str, ParameterInfo]:
        """Do what `LLM.parameters` says."""
        specs = self._core.inspect(lambda _, executor: local(executor, "parameters").specs)
        described = {path: spec.value for path, spec in specs.items()}
        return {
            path: ParameterInfo(
                tuple(value.shape), value.format if isinstance(value, QuantizedArray) else value.dtype.name
            )
            for path, value in described.items()
        }

    def _check(self, prompts: PromptLike | Iterable[PromptLike]) -> list[Prompt]:
        return check_texts([check_ids_or_text(prompt, *self._bounds) for prompt in as_list(prompts)], *self._bounds)

    def _mesh(self, name: str) -> _Mesh:
        """Find the mesh that computes it, and its parameters now."""

        def find(_: object, executor: object) -> tuple[int, StatesRunner, Params]:
            meshes = local(executor, name).meshes
            index = next(index for index, mesh in enumerate(meshes) if mesh.plan.spec.prefills)
            if self._runner is None:
                self._runner = StatesRunner(meshes[index].plan, {})
            return index, self._runner, meshes[index].params

        index, runner, params = self._core.inspect(find)

        def dispatch(call: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
            return self._core.inspect(lambda _, executor: local(executor, name).run_beside(index, call))

        return _Mesh(runner, params, dispatch)

    def _states(
        self, mesh: _Mesh, prompts: Sequence[Prompt], after: tuple[int, ...]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        return mesh.runner.states([prompt.ids for prompt in prompts], after, mesh.params, mesh.dispatch)


def local(executor: object, name: str) -> LocalExecutor:
    """Return the executor if it has the parameters in this process: the one place that decides it.

    Raises:
        ValueError: its meshes are elsewhere.
    """
    if isinstance(executor, LocalExecutor):
        return executor
    raise ValueError(
        f"{name} needs the model's parameters in this process, and this engine's meshes are in others: start an engine "
        "whose meshes are all local, or load the model with twinmesh.models.load."
    )


def check_positions(positions: Sequence[int] | None, count: int) -> list[int]:
    """Count positions of a prompt of `count` tokens from its start; None: all of them.

    Raises:
        ValueError: none, or one past the prompt.
    """
    if positions is None:
        return list(range(count))
    given = list(positions) if isinstance(positions, Sequence | range | np.ndarray) else []
    if not given or isinstance(positions, str):
        raise ValueError(f"positions={positions!r} names none: give a list such as [-1], or None for all.")
    for position in given:
        whole = isinstance(position, int | np.integer) and not isinstance(position, bool)
        if not whole or not -count <= position < count:
            raise ValueError(
                f"positions holds {position!r}: a prompt of {count} tokens has 0 to {count - 1}, or -1 backwards to "
                f"{-count}."
            )
    return [int(position) % count for position in given]


def _check_dimensions(params: Sequence[PoolingParams], most: int) -> None:
    for one in params:
        if one.dimensions is not None and one.dimensions > most:
            raise ValueError(f"dimensions={one.dimensions} is not usable: this model's embeddings have {most}.")


def pool(hidden: np.ndarray, pooling: Pooling, *, normalize: bool, dimensions: int | None = None) -> np.ndarray:
    """Make one vector [E] float32 of a prompt's hidden states [n, E]: its first `dimensions`, and these of length 1, to
    `normalize`."""
    rows = hidden[:, :dimensions].astype(np.float32)
    pooled: np.ndarray = {"mean": rows.mean(0), "last": rows[-1], "cls": rows[0]}[pooling]
    length = float(np.linalg.norm(pooled))
    return pooled / length if normalize and length else pooled
