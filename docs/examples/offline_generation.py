"""Complete a list of prompts and print the answers with the time that each took."""

from twinmesh import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "The first person on the moon was"]


def main() -> None:
    """Generate with prefill on one device and decode on another."""
    with LLM(
        "smollm2",
        topology="prefill=1,decode=1",
        max_model_len=128,
        max_num_seqs=8,
        prefill_buckets=(64,),  # one size of a step of either kind: little is compiled
        decode_buckets=(8,),
    ) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text}")
        print(f"  first token after {output.timeline.ttft:.3f} s, {output.outputs[0].finish_reason}")


if __name__ == "__main__":
    main()
