"""What `LLM.embed` makes of hidden states, with vLLM's names. No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import check_whole_number
from .vllm_names import names_missing_fields


@names_missing_fields({})
@dataclass(frozen=True)
class PoolingParams:
    """How one prompt's embedding is made, as vLLM's parameters of this name say.

    Raises:
        ValueError: a value is out of range or of the wrong type.
    """

    use_activation: bool | None = None  # divide it by its length; None: as `embed`'s `normalize` says
    # Keep so many of its first numbers, before the division; None: all. For models that were trained so (Matryoshka):
    # of others it is an embedding as well, and a worse one.
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.use_activation not in (None, True, False):
            raise ValueError(f"use_activation={self.use_activation!r} is not usable: it must be True or False.")
        if self.dimensions is not None:
            check_whole_number("dimensions", self.dimensions, 1)


def one_each(given: PoolingParams | Sequence[PoolingParams] | None, count: int) -> list[PoolingParams]:
    """Return the parameters of each of `count` prompts.

    Raises:
        ValueError: a number that does not match, or something else.
    """
    many = [given or PoolingParams()] * count if given is None or isinstance(given, PoolingParams) else given
    for one in many if isinstance(many, list | tuple) else [many]:
        if not isinstance(one, PoolingParams):
            raise ValueError(f"pooling_params of type {type(one).__name__} are not usable: give PoolingParams.")
    if len(many) != count:
        raise ValueError(f"There are {count} prompts and {len(many)} pooling_params: give one, or one for each.")
    return list(many)
