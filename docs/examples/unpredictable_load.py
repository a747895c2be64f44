"""Answer a burst of questions beside a job, with a bound on what waits and meshes that change their roles."""

import asyncio

from twinmesh import SLO, AsyncLLM, Overloaded, SamplingParams

QUESTIONS = [f"What is {number} plus {number}?" for number in range(12)]
JOB = [(f"Once upon a time there were {number}", SamplingParams(temperature=0, max_tokens=24)) for number in range(8)]


async def answer(llm: AsyncLLM, question: str, priority: int) -> str:
    """Ask until the engine takes the question, and return its answer."""
    prompt = llm.chat_prompt([{"role": "user", "content": question}])
    while True:
        try:
            text = ""
            async for output in llm.generate(
                prompt, SamplingParams(temperature=0, max_tokens=12), priority=priority, deadline=60
            ):
                text = output.outputs[0].text
            return text
        except Overloaded as refused:
            await asyncio.sleep(refused.retry_after)


async def main() -> None:
    """Start the job, ask all questions at once, and give decoding both meshes meanwhile."""
    llm = await asyncio.to_thread(
        AsyncLLM, "smollm2", topology="pool=2", roles="prefill=1,decode=1", max_waiting=4,
        slo=SLO(ttft_ms=2000, tpot_ms=200), max_model_len=128, max_num_seqs=8, prefill_buckets=(64,),
        decode_buckets=(8,),
    )  # fmt: skip
    async with llm:
        print("roles at first:", llm.roles())
        job = asyncio.create_task(asyncio.to_thread(list, llm.as_completed(JOB)))
        asked = asyncio.gather(*(answer(llm, question, priority=i % 2) for i, question in enumerate(QUESTIONS)))
        print("set_roles:", await llm.set_roles("both=1,decode=1"))
        print("roles then:", llm.roles())
        print("answers:", len(await asked), "lines of the job:", len(await job))
        print("goodput:", llm.metrics().requests)


if __name__ == "__main__":
    asyncio.run(main())
