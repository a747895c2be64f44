"""What vLLM has and Twinmesh lacks is named, with what to use instead."""

import inspect
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import twinmesh
from helpers.fake_core import FakeCore, make_fake
from twinmesh import LLM, AsyncLLM, SamplingParams
from twinmesh.engine.api.vllm_names import as_table
from twinmesh.engine.api.vllm_options import IGNORED, TAKEN
from twinmesh.engine.api.vllm_tables import ENGINE, GENERATE, SAMPLING
from twinmesh.engine.api.vllm_tables import METHODS as MISSING
from twinmesh.engine.options import documentation
from twinmesh.scripts.cli import main

# What vLLM takes, by what takes it (make_vllm_names.py); what takes it here, and the names that it lacks.
NAMES = json.loads((Path(__file__).parents[2] / "fixtures" / "vllm_names.json").read_text(encoding="utf-8"))
TAKEN_BY = {
    "EngineArgs": (LLM, ENGINE),
    "LLM": (AsyncLLM, ENGINE),
    "SamplingParams": (SamplingParams, SAMPLING),
    "LLM.generate": (LLM.generate, GENERATE),
    "LLM.chat": (LLM.chat, GENERATE),
    "AsyncLLM.generate": (AsyncLLM.generate, GENERATE),
    "LLM.add_request": (LLM.add_request, GENERATE),
}
PRIVATE = re.compile(r"__\w+__|EngineOptions|BaseLLM")


@pytest.mark.parametrize("who", TAKEN_BY)
def test_every_name_that_vllm_takes_is_taken_or_in_a_table(who):
    taken, instead = TAKEN_BY[who]
    own = inspect.signature(taken).parameters
    assert [name for name in NAMES[who] if (name in own) is (name in instead)] == []


@pytest.mark.parametrize("engine", [LLM, AsyncLLM])
@pytest.mark.parametrize("name", sorted(ENGINE.keys() - TAKEN))
def test_an_option_of_vllm_is_named_with_what_to_use_instead(engine, name):
    with pytest.raises(TypeError) as refused:
        engine("m", **{name: "x"})
    said = str(refused.value)
    assert said == f"{engine.__name__} has no option {name}, which vLLM has: {ENGINE[name]}."
    assert not PRIVATE.search(said)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampling_parameter_of_vllm_is_named_with_what_to_use_instead(name):
    with pytest.raises(TypeError) as refused:
        SamplingParams(**{name: 1})
    assert str(refused.value) == f"SamplingParams has no argument {name}, which vLLM has: {SAMPLING[name]}."


METHODS = [(LLM, "generate"), (LLM, "chat"), (AsyncLLM, "generate"), (LLM, "stream"), (LLM, "add_request")]


@pytest.mark.parametrize("call", METHODS, ids=lambda call: f"{call[0].__name__}.{call[1]}")
@pytest.mark.parametrize(
    "name", ["lora_request", "data_parallel_rank", "tokenization_kwargs", "prompt_token_ids", "trace_headers", "params"]
)
def test_an_argument_of_vllm_is_named_with_what_to_use_instead(call, name):
    engine, method = call
    with pytest.raises(TypeError) as refused:
        getattr(make_fake(engine, FakeCore()), method)("a", **{name: 1})
    said = str(refused.value)
    assert said == f"{engine.__name__}.{method} has no argument {name}, which vLLM has: {GENERATE[name]}."


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: SamplingParams(temprature=1),
            "SamplingParams has no argument temprature: the nearest is temperature.",
        ),
        (lambda: SamplingParams(zzz=1), "SamplingParams has no argument zzz: help(SamplingParams) lists them."),
        (lambda: replace(SamplingParams(), max_token=1), "has no argument max_token: the nearest is max_tokens."),
        (lambda: LLM("m", max_num_seq=1), "LLM has no option max_num_seq: the nearest is max_num_seqs."),
        (
            lambda: make_fake(LLM, FakeCore()).generate("a", sampling_param=None),
            "LLM.generate has no argument sampling_param: the nearest is sampling_params.",
        ),
    ],
)
def test_a_name_that_is_nearly_right_is_refused_with_the_right_one(make, says):
    with pytest.raises(TypeError) as refused:
        make()
    assert says in str(refused.value)


@pytest.mark.parametrize("engine", [LLM, AsyncLLM])
@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((), {}, "missing a required argument: 'model'"),
        ((), {"topology": "both=1"}, "missing a required argument: 'model'"),
        (("m", "tokenizer"), {}, "too many positional arguments"),
        (("m", "both=1", "float32"), {}, "too many positional arguments"),
        (("m",), {"model": "m"}, "multiple values for argument 'model'"),
    ],
)
def test_an_engine_that_is_called_amiss_names_itself(engine, args, options, says):
    with pytest.raises(TypeError) as refused:
        engine(*args, **options)
    assert str(refused.value) == f"{engine.__name__}: {says}; give the model, and options by name."


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (METHODS[0], ("a", None, True, None)),
        (METHODS[1], ("a", None, False, None)),
        (METHODS[1], ("a", None, False, None, 0)),
        (METHODS[2], ("a", None, "x", None)),
        (METHODS[3], ("a", None, True)),
        (METHODS[4], ("x", "a", None, 0.0)),
    ],
)
def test_arguments_that_vllm_takes_by_position_are_to_be_named(call, args):
    engine, method = call
    with pytest.raises(TypeError, match=rf"^{engine.__name__}\.{method} takes \w+, .* by position: give other arg"):
        getattr(make_fake(engine, FakeCore()), method)(*args)


def test_what_there_is_is_in_no_table():
    assert not ENGINE.keys() & documentation().keys()
    assert not SAMPLING.keys() & {field.name for field in fields(SamplingParams)}
    for method in (getattr(engine, name) for engine, name in METHODS):
        assert not GENERATE.keys() & inspect.signature(method).parameters.keys()


@pytest.mark.parametrize(
    "instead", sorted({*ENGINE.values(), *SAMPLING.values(), *GENERATE.values(), *MISSING.values()})
)
def test_every_advice_is_part_of_a_sentence(instead):
    assert not instead.endswith(".")
    assert instead[0].islower()


def test_signatures_are_as_they_were():
    assert list(inspect.signature(SamplingParams).parameters) == [field.name for field in fields(SamplingParams)]
    assert list(inspect.signature(LLM.generate).parameters)[:3] == ["self", "prompts", "sampling_params"]
    assert LLM.generate.__doc__.startswith("Complete prompts")


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--gpu-memory-utilization=0.9", "--enforce-eager"])
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["batch", "--input", "i", "--output", "o"]])
def test_an_argument_of_vllms_command_is_named_as_well(command, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--model", "m", flag])
    name = flag.partition("=")[0]
    assert stop.value.code == 2
    instead = ENGINE[name[2:].replace("-", "_")]
    assert f"there is no argument {name}, which vLLM has: {instead}. " in capsys.readouterr().err


def test_the_guide_shows_the_tables():
    page = (Path(twinmesh.__file__).parent / "docs" / "guides" / "coming-from-vllm.md").read_text()
    assert "{{ vllm }}" in page
    tables = {**ENGINE, **SAMPLING, **GENERATE, **MISSING}
    assert all(f"| `{name}` | {instead} |" in as_table() for name, instead in tables.items() if name not in IGNORED)


@pytest.mark.parametrize("value", [None, False])
def test_what_asks_for_nothing_is_taken(value):
    assert SamplingParams(**dict.fromkeys(SAMPLING, value)) == SamplingParams()
    llm = make_fake(LLM, FakeCore(answers=True))
    (output,) = llm.generate("a", lora_request=value, prompt_token_ids=value)
    assert output.finished


@pytest.mark.parametrize("engine", [LLM, AsyncLLM])
@pytest.mark.parametrize("name", MISSING)
def test_a_method_of_vllm_is_named_with_what_to_use_instead(engine, name):
    with pytest.raises(AttributeError) as refused:
        getattr(make_fake(engine, FakeCore()), name)
    assert str(refused.value) == f"{engine.__name__} has no method {name}, which vLLM has: {MISSING[name]}."
