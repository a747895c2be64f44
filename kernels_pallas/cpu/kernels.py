"""The kernels there are: where each is written. Names and places only, so that nothing here imports numba."""

type Parameters = tuple[int, ...]  # what a kernel is compiled for besides the level, such as a head's length

# What attention's kernels take keys and values as, by the end of their names.
PAGES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "int8"),
    "int8_fp8": ("int8", "fp8"),
    "fp8": ("fp8", "fp8"),
}

# By name: the module, the function in it that makes a `Kernel` of a level and of parameters, and what it is told first.
KERNELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "product_float32": ("products", "product_float32", ()),
    "product_bfloat16": ("products", "product_bfloat16", ()),
    "score_float32": ("scores", "score_float32", ()),
    "score_bfloat16": ("scores", "score_bfloat16", ()),
    "blocks": ("blocks_kernel", "product", ()),
    "stack_float32": ("stacks_kernel", "stack_float32", ()),
    "stack_bfloat16": ("stacks_kernel", "stack_bfloat16", ()),
    "stack_blocks": ("stacks_kernel", "stack_blocks", ()),
    **{f"decode_{name}": ("attention", "decode", kinds) for name, kinds in PAGES.items()},
    **{f"prefill_{name}": ("prefill", "prefill", kinds) for name, kinds in PAGES.items()},
}
