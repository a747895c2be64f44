"""An engine whose executor is behind bytes gives the same tokens, and survives messages that cannot be read."""

import jax
import pytest
from helpers.bytes_executor import Relay, bytes_executor
from helpers.core_engine import (
    Reference,
    assert_at_rest,
    greedy,
    make_engine,
    model_with_windows,
    prompts_of,
    token_ids,
)
from twinmesh.engine.protocol.actions import Accept, Decode, Prefill, Scatter, StartTransfer
from twinmesh.engine.protocol.events import TransferReady
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.startup import build

MODEL = model_with_windows(None, 6)
PROMPTS = prompts_of(9, 5, 20)


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL)


@pytest.fixture
def relay():
    relay = Relay()
    yield relay
    relay.close()


@pytest.fixture
def start(relay, monkeypatch):
    """An engine behind bytes, with a device for each mesh."""

    def start(topology="prefill=1,decode=1", damage=lambda message, data: data, **options):
        monkeypatch.setattr(build, "LocalExecutor", bytes_executor(relay, damage))
        return make_engine(MODEL, topology, devices=jax.devices()[: 2 if "," in topology else 1], **options)

    return start


def test_requests_are_handed_on_preempted_and_aborted_as_they_would_be_without(start, reference, relay):
    with start() as llm:
        stream = llm.stream(PROMPTS[0], greedy(30))
        deltas = iter(stream)
        next(deltas)
        llm.preempt(stream.request_id)
        aborted = llm.stream(PROMPTS[1], greedy(50))
        llm.abort(aborted.request_id)
        outputs = llm.generate(PROMPTS, greedy(10))
        assert aborted.result().outputs[0].finish_reason == "abort"
        for _ in deltas:
            pass
        outputs.append(stream.result())
        assert llm.metrics().preemptions > 0
        assert_at_rest(llm)
    for prompt, tokens in zip([*PROMPTS, PROMPTS[0]], token_ids(outputs), strict=True):
        assert reference.agrees(prompt, tokens)
    assert set(relay.passed) >= {"Accept", "StartTransfer", "TransferReady", "Scatter", "StepResult", "Finish"}


def test_log_probabilities_come_through(start):
    params = greedy(5, logprobs=2, prompt_logprobs=1)
    with start("both=1") as llm:
        (output,) = llm.generate(PROMPTS[0], params)
    assert len(output.prompt_logprobs) == len(PROMPTS[0])
    for token, at in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        assert at[token].rank == 1


def cut_short(message, data):
    return data[: len(data) // 2]


def of_another_version(message, data):
    return b"\x09" + data[1:]


def of_an_unknown_type(message, data):
    name = type(message).__name__.encode()
    return data.replace(name, b"X" * len(name), 1)


DAMAGES = {cut_short: "cut short after", of_another_version: "of version 9", of_an_unknown_type: "of unknown type 'XX"}


def damaging(kind, damage, times):
    """Damages the first `times` messages of a type."""
    left = [times]

    def some(message, data):
        if not isinstance(message, kind) or not left[0]:
            return data
        left[0] -= 1
        return damage(message, data)

    return some


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", [StepResult, TransferReady, Accept, Prefill, Decode, StartTransfer, Scatter])
def test_an_unreadable_message_costs_its_mesh_and_its_requests_start_over(start, reference, kind, damage):
    with start(damage=damaging(kind, damage, 1)) as llm:
        outputs = llm.generate(PROMPTS, greedy(8))
        assert llm.metrics().retries > 0
        assert_at_rest(llm)
    assert [output.error for output in outputs] == [None] * 3
    assert all(map(reference.agrees, PROMPTS, token_ids(outputs)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_mesh_that_is_never_understood_fails_its_request_in_one_sentence_and_the_engine_goes_on(start, damage):
    with start("both=1", damage=damaging(StepResult, damage, 3), max_retries=2) as llm:
        (output,) = llm.generate(PROMPTS[0], greedy(1))
        assert output.outputs[0].finish_reason == "error"
        assert "what mesh 0 sent could not be read: the message is" in output.error
        assert DAMAGES[damage] in output.error
        assert "\n" not in output.error
        assert not llm.generate(PROMPTS[0], greedy(4))[0].error
