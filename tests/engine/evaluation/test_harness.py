"""lm-evaluation-harness on an engine: needs the extra `eval`."""

import json

import numpy as np
import pytest
from twinmesh import LLM
from twinmesh.scripts import cli
from twinmesh.scripts.bench.evaluation_tasks import ANSWER, CHOICE, write_tasks

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
OPTIONS = dict(
    max_model_len=512, page_size=16, max_num_seqs=4, prefill_buckets=(64, 256), decode_buckets=(4,),
    kv_cache_bytes=8 << 20, dtype="float32",
)  # fmt: skip


class Instance:
    """A request as tasks make it."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def lm(tiny_path):
    from twinmesh.eval import TwinmeshLM

    with LLM(tiny_path, **OPTIONS) as llm:
        yield TwinmeshLM(llm, max_length=200)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), 3, shots=1)


def test_log_likelihoods_are_the_engines_scores_in_the_order_of_the_requests(lm):
    pairs = [("the sea", " and"), ("the sea", " or a land"), ("", "the land"), ("the land ", "is")]
    found = lm.loglikelihood([Instance(*pair) for pair in pairs])
    bos = lm.prefix_token_id
    ids = [
        (lm.tok_encode("the sea"), lm.tok_encode("the sea and")),
        (lm.tok_encode("the sea"), lm.tok_encode("the sea or a land")),
        ([bos], [bos, *lm.tok_encode("the land")]),
        (lm.tok_encode("the land"), lm.tok_encode("the land is")),
    ]
    for (context, whole), (total, is_greedy) in zip(ids, found, strict=True):
        (score,) = lm.llm.score([context], [whole[len(context) :]])
        assert total == pytest.approx(score.total, abs=1e-4)
        assert is_greedy == score.is_greedy


def test_a_whole_text_is_scored_in_windows(lm):
    text = "the sea and the land, " * 40
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * lm.max_length
    (found,) = lm.loglikelihood_rolling([Instance(text)])
    total, whole = 0.0, [lm.prefix_token_id, *ids]
    for start in range(0, len(ids), lm.max_length):
        end = min(start + lm.max_length, len(ids))
        first = max(0, end - lm.max_length)
        context, continuation = whole[first : start + 1], whole[start + 1 : end + 1]
        total += lm.llm.score([context], [continuation])[0].total
    assert found == pytest.approx(total, abs=1e-2)


def test_answers_end_where_the_task_says(lm):
    given = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    found = lm.generate_until([Instance("the sea", given), Instance("a land", {"max_gen_toks": 4})])
    from twinmesh import SamplingParams

    (first,) = lm.llm.generate(lm.tok_encode("the sea"), SamplingParams(temperature=0, max_tokens=12, stop=["e"]))
    (second,) = lm.llm.generate(lm.tok_encode("a land"), SamplingParams(temperature=0, max_tokens=4))
    assert found == [first.outputs[0].text, second.outputs[0].text]
    with pytest.raises(ValueError, match="answers of 500 tokens, and the model sees 200"):
        lm.generate_until([Instance("a", {"max_gen_toks": 500})])


def test_conversations_are_rendered_by_the_models_template(lm):
    text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert "hello" in text
    assert lm.tok_encode(text) == lm.llm.chat_prompt([{"role": "user", "content": "hello"}])
    assert lm.chat_template(True) == lm.llm.engine.chat_template.templates["default"]
    assert lm.chat_template(False) is None


def test_both_local_tasks_run_without_network_and_the_harness_keeps_answers(lm, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    def run():
        return lm_eval.simple_evaluate(
            lm, tasks=[CHOICE, ANSWER], task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0,
            use_cache=str(tmp_path / "cache"),
        )  # fmt: skip

    first = run()
    monkeypatch.setattr(lm.llm, "score", None)  # nothing is computed any more
    monkeypatch.setattr(lm.llm, "as_completed", None)
    again = run()
    assert first["results"] == again["results"]
    assert first["results"][CHOICE]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    assert [len(first["samples"][name]) for name in (CHOICE, ANSWER)] == [3, 3]


def test_the_command_hands_over_with_the_harness_own_options(tiny_path, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    engine = ["--max-model-len", "512", "--max-num-seqs", "4", "--kv-cache-bytes", str(8 << 20), "--dtype", "float32"]
    engine += ["--page-size", "16", "--prefill-buckets", "64,256", "--decode-buckets", "4"]
    harness = ["--include_path", str(tasks), "--tasks", f"{CHOICE},{ANSWER}", "--limit", "2", "--log_samples"]
    words = ["eval", "--tasks", CHOICE, "--model", str(tiny_path), *engine, *harness, "--output_path", str(tmp_path)]
    assert cli.main(words) == 0
    assert CHOICE in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["model"] == "twinmesh"
    assert set(found["results"]) == {CHOICE, ANSWER}
    assert np.isfinite(found["results"][CHOICE]["acc,none"])


def test_what_cannot_be_evaluated_is_refused(lm, tiny_path, capsys):
    from twinmesh.eval import TwinmeshLM

    with pytest.raises(ValueError, match="names no model: give model=smollm2"):
        TwinmeshLM.create_from_arg_string("dtype=float32")
    with pytest.raises(ValueError, match="comes too late for an engine that runs"):
        TwinmeshLM(lm.llm, {"dtype": "float32"})
    with pytest.raises(ValueError, match="max_length=5000 must be from 1 to 510"):
        TwinmeshLM(lm.llm, max_length=5000)
    assert cli.main(["eval", "--model", str(tiny_path), "--tasks", "x", "--device", "cuda"]) == 2
    assert "--device is not usable here" in capsys.readouterr().err
