"""Weights as Hugging Face's quantised checkpoints hold them, packed by plain numpy from each format's description.

`PACKED` has a tiny model whose projections are whole numbers of -4 to 4 times a power of two for each output, so that
every format here holds them without loss: a directory in any format is the model in floats, bit for bit. `packed` makes
the tensors of a matrix, and `write_packed` a directory. Also run by Python 3.11: no import of twinmesh or torch here.
"""

import numpy as np
from helpers.mxfp4 import hugging_face
from helpers.tiny_families import TinyFamily, described

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, from the lowest bits up


def scales_of(weight):
    """The power of two of each output, [n, 1]."""
    return np.exp2(np.ceil(np.log2(np.abs(weight).max(1, keepdims=True) / 4)))


class PackedFamily(TinyFamily):
    """A tiny model whose projections every format holds."""

    def weights(self):
        rounded = {
            name: np.rint(weight / scales_of(weight)) * scales_of(weight) if is_packed(name) else weight
            for name, weight in super().weights().items()
        }
        return {name: weight.astype(np.float32) for name, weight in rounded.items()}


def is_packed(name):
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


PACKED = {
    "packed": PackedFamily(
        "packed",
        "LlamaConfig",
        "LlamaForCausalLM",
        3,
        described(2, 256, 512, 8, 4, tied=False, rope={"rope_theta": 1e4}, rms_norm_eps=1e-5),
        None,
    ),
}
# Of this one transformers was not asked: its settings take the place of Mixtral's.
PACKED_EXPERTS = PackedFamily(
    "packed_experts", "MixtralConfig", "MixtralForCausalLM", 3,
    described(
        1, 128, 256, 4, 2, tied=False, rope={"rope_theta": 1e4}, rms_norm_eps=1e-5, num_local_experts=3,
        num_experts_per_tok=2, sliding_window=None,
    ), None,
)  # fmt: skip


def words(values, bits, order=None):
    """Pack values [..., m] into words of 32 bits, the first in the lowest bits; or as `order` says."""
    each = 32 // bits
    by_word = np.asarray(values).astype(np.uint64).reshape(*values.shape[:-1], -1, each)
    out = np.zeros(by_word.shape[:-1], np.uint64)
    for place in range(each):
        out |= by_word[..., place if order is None else order[place]] << np.uint64(bits * place)
    return np.ascontiguousarray(out.astype(np.uint32).view(np.int32))


def per_group(scales, weight, group):
    """Repeat the scale of each output for its groups, [n, G]."""
    return np.repeat(scales, weight.shape[1] // group, axis=1)


def zero_points(shape):
    """Zero points of 4 to 11, so that -4 to 4 more are four bits."""
    return np.random.RandomState(5).randint(4, 12, shape)


def _float8(weight, scales, name="weight_scale", dtype=np.float32):
    """Pack by scales that broadcast over the weight."""
    import ml_dtypes

    return {"weight": (weight / _spread(scales, weight)).astype(ml_dtypes.float8_e4m3fn), name: scales.astype(dtype)}


def _spread(scales, weight, block=128):
    """Repeat scales of blocks, or one of all, for each number."""
    for axis in (0, 1):
        if scales.shape[axis] not in (1, weight.shape[axis]):
            scales = np.repeat(scales, block, axis=axis).take(range(weight.shape[axis]), axis=axis)
    return scales


def _least(weight, rows, columns):
    """The least power of two of the outputs of each block of rows, for each block of columns."""
    scales = scales_of(weight)
    by_rows = [scales[first : first + rows].min() for first in range(0, len(scales), rows)]
    return np.repeat(np.array(by_rows)[:, None], -(-weight.shape[1] // columns), axis=1)


def _float8_tensor(weight):
    one = _float8(weight, _least(weight, *weight.shape))
    return one | {"weight_scale": one["weight_scale"].reshape(()), "input_scale": np.ones((), np.float32)}


def _float8_block(weight):
    return _float8(weight, _least(weight, 128, 128), "weight_scale_inv")


def _float8_channel(weight):
    import ml_dtypes

    return _float8(weight, scales_of(weight), dtype=ml_dtypes.bfloat16)


def _int8(weight):
    scales = scales_of(weight)
    return {"weight": (weight / scales).astype(np.int8), "weight_scale": scales.astype(np.float32)}


def _int8_zeros(weight):
    out, zeros = _int8(weight), np.random.RandomState(4).randint(-99, 99, (len(weight), 1)).astype(np.int8)
    return out | {"weight": out["weight"] + zeros, "weight_zero_point": zeros}


def _rows(weight, bits, group, dtype="float16", has_zeros=False):
    """compressed-tensors' pack-quantized: two's complement plus 2 ** (bits - 1)."""
    import ml_dtypes

    scales = per_group(scales_of(weight), weight, group)
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    middle, whole = 2 ** (bits - 1), weight / scales_of(weight)
    out = {"weight_scale": scales.astype(dtype), "weight_shape": np.array(weight.shape, np.int64)}
    if not has_zeros:
        return out | {"weight_packed": words(whole + middle, bits)}
    zeros = zero_points(scales.shape)
    packed = np.ascontiguousarray(words(zeros.T, bits).T)  # along the outputs
    shifted = whole + np.repeat(zeros, group, axis=1)
    return out | {"weight_packed": words(shifted, bits), "weight_zero_point": packed}


def _gptq(weight, bits=4, group=128, is_first=True, order=None):
    """GPTQ: packed along inputs, zero points along outputs; the first format has those less by one."""
    k = weight.shape[1]
    index = np.arange(k) // group if order is None else order // group
    scales = per_group(scales_of(weight), weight, group).T  # [G, n]
    zeros = zero_points(scales.shape)
    shifted = weight.T / scales[index] + zeros[index]  # [k, n]
    return {
        "qweight": np.ascontiguousarray(words(shifted.T, bits).T),
        "qzeros": words(zeros - is_first, bits),
        "scales": scales.astype(np.float16),
        "g_idx": index.astype(np.int32),
    }


def _gptq_act_order(weight):
    return _gptq(weight, order=np.random.RandomState(6).permutation(weight.shape[1]))


def _awq(weight, group=128):
    scales = np.ascontiguousarray(per_group(scales_of(weight), weight, group).T)
    zeros = zero_points(scales.shape)
    shifted = weight.T / np.repeat(scales, group, axis=0) + np.repeat(zeros, group, axis=0)
    return {
        "qweight": words(shifted, 4, AWQ_ORDER), "qzeros": words(zeros, 4, AWQ_ORDER),
        "scales": scales.astype(np.float16),
    }  # fmt: skip


def _mxfp4(weight):
    blocks, scales = hugging_face(weight)
    return {"weight_packed": blocks.reshape(len(weight), -1), "weight_scale": scales}


def compressed(format_, activations=None, **weights):
    """A `quantization_config` of one group, as compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    packing = {"quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head"]}
    return packing | {"config_groups": {"group_0": group}}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_FP8_CHANNEL = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
_MXFP4 = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)


def _pack(bits, group, **more):
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return compressed("pack-quantized", num_bits=bits, type="int", **strategy, **more)


def _int8_of(**more):
    activations = {"num_bits": 8, "dynamic": True}
    return compressed("int-quantized", activations, num_bits=8, type="int", strategy="channel", **more)


# Name -> what packs a matrix, the `quantization_config`, and a pattern of the layouts that keep it.
FORMATS = {
    "fp8 per tensor": (_float8_tensor, _FP8, "FP8-.*-float32"),
    "fp8 per channel": (_float8_channel, _FP8_CHANNEL, "FP8-.*-bfloat16"),
    "fp8 in blocks": (_float8_block, _FP8 | {"weight_block_size": [128, 128]}, "FP8-128-float32"),
    "fbgemm": (lambda w: _float8(w, scales_of(w)), {"quant_method": "fbgemm_fp8"}, "FP8-.*-float32"),
    "int8": (_int8, _int8_of(), "INT8-.*-float32"),
    "int8 with zeros": (_int8_zeros, _int8_of(symmetric=False), "UINT8-.*-float32"),
    "int8 in groups": (lambda w: _rows(w, 8, 128), _pack(8, 128), "INT8-128-float16"),
    "int4 of 32": (lambda w: _rows(w, 4, 32), _pack(4, 32), "INT4-32-float16"),
    "int4 of 64": (lambda w: _rows(w, 4, 64, "float32"), _pack(4, 64), "INT4-64-float32"),
    "int4 of 128": (lambda w: _rows(w, 4, 128, "bfloat16"), _pack(4, 128), "INT4-128-bfloat16"),
    "int4 per channel": (lambda w: _rows(w, 4, w.shape[1]), _pack(4, None), "INT4-.*-float16"),
    "int4 with zeros": (
        lambda w: _rows(w, 4, 128, has_zeros=True), _pack(4, 128, symmetric=False), "UINT4-128-float16",
    ),
    "awq": (_awq, _AWQ, "UINT4-128-float16"),
    "gptq": (_gptq, _GPTQ, "UINT4-128-float16"),
    "gptq v2": (lambda w: _gptq(w, is_first=False), _GPTQ | {"checkpoint_format": "gptq_v2"}, "UINT4-128-float16"),
    "gptq of 8 bits": (lambda w: _gptq(w, 8, 64), _GPTQ | {"bits": 8, "group_size": 64}, "UINT8-64-float16"),
    "gptq out of order": (_gptq_act_order, _GPTQ | {"desc_act": True}, ""),
    "mxfp4": (_mxfp4, _MXFP4, "MXFP4"),
}  # fmt: skip


def packed(name, weights, is_packed=is_packed):
    """Make the tensors of weights by name in a format."""
    pack, out = FORMATS[name][0], {}
    for full, weight in weights.items():
        if not is_packed(full):
            out[full] = weight
            continue
        for part, array in pack(weight.astype(np.float64)).items():
            out[f"{full.removesuffix('.weight')}.{part}"] = np.ascontiguousarray(array)
    return out
