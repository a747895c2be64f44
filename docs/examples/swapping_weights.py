"""Hand-offs between meshes, their figures, and a parameter replaced in a running engine."""

import numpy as np
from twinmesh import LLM, SamplingParams

PROMPT = "The capital of France is"


def main() -> None:
    """Generate, switch the first layer's MLP off, and generate again, without compiling anything."""
    params = SamplingParams(temperature=0, max_tokens=12)
    # float32 and not quantised, because a new parameter must be as the engine holds it.
    with LLM(
        "smollm2",
        topology="prefill=1,decode=1",
        dtype="float32",
        quantization="none",
        max_model_len=128,
        max_num_seqs=8,
        prefill_buckets=(64,),
        decode_buckets=(8,),
    ) as llm:
        print("as trained:", repr(llm.generate(PROMPT, params)[0].outputs[0].text))
        llm.update_params({"layers.0.mlp.down_proj": np.zeros((1536, 576), np.float32)})
        print("without an MLP:", repr(llm.generate(PROMPT, params)[0].outputs[0].text))
        figures = llm.metrics()
    print(f"{figures.handoffs} hand-offs moved {figures.handoff_bytes / 1e6:.1f} MB; {figures.compiles} compilations")


if __name__ == "__main__":
    main()
