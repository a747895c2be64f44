"""Prompts that a real decode mesh prefills: the same tokens as on one mesh, with no hand-off, and nothing compiles."""

from helpers.core_engine import assert_at_rest, greedy, make_engine, model_with_windows, prompts_of, token_ids
from twinmesh import SLO

LENGTHS = (3, 17, 30, 9, 22, 5, 13, 28)


def test_deterministic_tokens_are_the_same_where_decode_meshes_prefill():
    model, prompts = model_with_windows(None, 6), prompts_of(*LENGTHS)
    with make_engine(model, "both=1", room=4, deterministic=True) as llm:
        expected = token_ids(llm.generate(prompts, greedy(20)))
    options = {"roles": "prefill=1,decode=1", "slo": SLO(ttft_ms=60_000)}
    with make_engine(model, "pool=2", room=4, deterministic=True, **options) as llm:
        alone = [token_ids(llm.generate(prompt, greedy(20)))[0] for prompt in prompts]
        together = token_ids(llm.generate(prompts, greedy(20)))
        metrics = llm.metrics()
        assert alone == together == expected
        assert 0 < metrics.conditional_prefills < 2 * len(prompts)
        assert metrics.handoffs > 0
        assert metrics.compiles == 0
        assert metrics.with_slo == metrics.met_slo == 2 * len(prompts)
        assert metrics.slo_goodput == 1.0
        assert_at_rest(llm)
