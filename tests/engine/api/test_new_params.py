"""Parameters as callers give them: arrays of other libraries, and what cannot be used."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import write_quantized
from twinmesh.engine.api.new_params import as_array, named_params
from twinmesh.models.checkpoints.open import open_checkpoint


class Tensor:
    """As torch's: strides and gradients have to go before DLPack takes it, and __array__ refuses bfloat16."""

    def __init__(self, array, *, is_plain=False):
        self.array, self.is_plain = array, is_plain

    def detach(self):
        return Tensor(self.array)

    def contiguous(self):
        return Tensor(self.array, is_plain=True)

    def __array__(self, *args, **kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **options):
        if not self.is_plain:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnlyArray:
    """What has nothing but __array__."""

    def __array__(self, dtype=None, copy=None):
        return np.arange(3, dtype=np.float32)


class Stranger(OnlyArray):
    """What cannot be handed over."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("it is on the moon")


def test_arrays_of_other_libraries_are_taken_as_they_are():
    array = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    taken = as_array("x", Tensor(array))
    assert taken.dtype == jnp.bfloat16
    np.testing.assert_array_equal(taken, array)
    np.testing.assert_array_equal(as_array("x", OnlyArray()), np.arange(3, dtype=np.float32))
    for own in (array, np.ones(2), np.float32(1)):
        assert as_array("x", own) is own


def test_a_mapping_of_the_models_own_names_needs_no_engine():
    given = {"norm.weight": np.ones(3)}
    assert named_params(given, core=None) == given


def test_what_is_no_array_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"params\['x'\] of type Stranger cannot be handed over \(it is on the moon\)"):
        named_params({"x": Stranger()}, core=None)
    with pytest.raises(ValueError, match="params is of type list: give a dict"):
        named_params([1], core=None)


def test_quantised_parameters_have_the_models_own_names(tmp_path):
    checkpoint = open_checkpoint(write_quantized(tmp_path / "q.gguf"))
    from twinmesh.models.decoder import abstract_params

    spec = abstract_params(checkpoint.config, "float32", checkpoint.formats).specs["embedding.weight"]
    with pytest.raises(ValueError, match=r"is quantised: give it under the name that parameters\(\) lists"):
        named_params({"model.embed_tokens.weight": spec.value}, core=None)
