"""The kernels there are: where each is written. Names and places only, so that nothing here imports numba."""

type Parameters = tuple[int, ...]  # what a kernel is compiled for besides the level, such as a head's length

# By name: the module, and the function in it that makes a `Kernel` of a level and of parameters.
KERNELS = {
    "product_float32": ("products", "product_float32"),
    "product_bfloat16": ("products", "product_bfloat16"),
    "score_float32": ("scores", "score_float32"),
    "score_bfloat16": ("scores", "score_bfloat16"),
    "decode_float32": ("attention", "decode_float32"),
    "decode_bfloat16": ("attention", "decode_bfloat16"),
    "prefill_float32": ("prefill", "prefill_float32"),
    "prefill_bfloat16": ("prefill", "prefill_bfloat16"),
    "blocks": ("blocks_kernel", "product"),
    "stack_float32": ("stacks_kernel", "stack_float32"),
    "stack_bfloat16": ("stacks_kernel", "stack_bfloat16"),
    "stack_blocks": ("stacks_kernel", "stack_blocks"),
}
