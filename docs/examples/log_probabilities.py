"""Log-probabilities of generated tokens, and scores of given continuations."""

from twinmesh import LLM, SamplingParams

PROMPT = "The capital of France is"


def main() -> None:
    """Print the alternatives to each token, then rank three continuations."""
    with LLM("smollm2", max_model_len=128, max_num_seqs=8, prefill_buckets=(64,), decode_buckets=(8,)) as llm:
        (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, logprobs=3))
        for choices in output.outputs[0].logprobs or []:
            print("  ".join(f"{choice.decoded_token!r} {choice.logprob:.2f}" for choice in choices.values()))
        continuations = [" Paris", " Rome", " a city"]
        scores = llm.score(PROMPT, continuations)
        for total, text in sorted(zip((score.total for score in scores), continuations, strict=True), reverse=True):
            print(f"{total:8.2f} {text!r}")


if __name__ == "__main__":
    main()
