"""Fine-tuning without an engine, by optax, and the new parameters in an engine that runs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import twinmesh.models
from twinmesh import LLM, SamplingParams

PROMPT = "The capital of France is"
TEXT = "The capital of France is a small blue lighthouse by the sea."


def main() -> None:
    """Lower the loss of one sentence in a few steps, and let an engine say what the model makes of its beginning."""
    model = twinmesh.models.load("smollm2", dtype="float32")
    tokens = jnp.array([model.tokenizer.encode(TEXT)])  # [B, T]
    optimizer = optax.adam(5e-5)

    def loss(params: dict[str, jax.Array]) -> Any:
        logits = model.forward(params, tokens[:, :-1])  # [B, T - 1, V]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params: dict[str, jax.Array], state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = model.params, optimizer.init(model.params), []
    for _ in range(6):
        params, state, value = step(params, state)
        losses.append(float(value))
    print("loss:", " ".join(f"{value:.2f}" for value in losses), "- lower:", losses[-1] < losses[0] / 2)

    # float32 and not quantised, because the parameters are.
    with LLM("smollm2", dtype="float32", quantization="none", max_model_len=128, max_num_seqs=8) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=9)
        print("before:", repr(llm.generate(PROMPT, greedy)[0].outputs[0].text))
        llm.update_params(params)
        print("after:", repr(llm.generate(PROMPT, greedy)[0].outputs[0].text))


if __name__ == "__main__":
    main()
