"""Stream two answers at the same time with AsyncLLM."""

import asyncio

from twinmesh import AsyncLLM, SamplingParams

QUESTIONS = ["What is a glacier?", "What is a volcano?"]


async def answer(llm: AsyncLLM, question: str) -> None:
    """Print each piece of an answer as it arrives."""
    prompt = llm.chat_prompt([{"role": "user", "content": question}])
    seen = 0
    async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12)):
        text = output.outputs[0].text
        if text[seen:]:
            print(f"{question} {text[seen:]!r}", flush=True)
        seen = len(text)


async def main() -> None:
    """Ask all questions at once; their requests share the engine's batches."""
    llm = await asyncio.to_thread(
        AsyncLLM, "smollm2", max_model_len=128, max_num_seqs=8, prefill_buckets=(64,), decode_buckets=(8,),
    )  # fmt: skip
    async with llm:
        await asyncio.gather(*(answer(llm, question) for question in QUESTIONS))


if __name__ == "__main__":
    asyncio.run(main())
