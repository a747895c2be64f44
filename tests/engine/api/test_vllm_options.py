"""What vLLM's engine arguments become, without an engine."""

import dataclasses
import logging

import pytest
from helpers.tiny_directory import write_tiny_llama_directory
from twinmesh import LLM, AsyncEngineArgs, EngineArgs, FlexibleArgumentParser
from twinmesh.engine.api.vllm_options import adapt
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sizing.device_memory import Share
from twinmesh.engine.startup.gpu_memory import check_share
from twinmesh.models.checkpoints.open import open_checkpoint


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (dict(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1), {}),
        (dict(tensor_parallel_size=4), dict(topology="both=1xtp4")),
        (dict(tensor_parallel_size=2, data_parallel_size=3), dict(topology="both=3xtp2")),
        (dict(tensor_parallel_size=2, enable_expert_parallel=True), dict(topology="both=1xtp2ep2")),
        (dict(tensor_parallel_size=1, enable_expert_parallel=True), {}),
        (dict(data_parallel_size=2), dict(topology="both=2")),
        (dict(gpu_memory_utilization=0.5), dict(memory_fraction=0.5)),
        (dict(max_num_batched_tokens=300), dict(prefill_buckets=(64, 256, 300))),
        (dict(max_num_batched_tokens=10**6), dict(prefill_buckets=(64, 256, 512, 2048, 8192))),
        (dict(max_num_batched_tokens=256, deterministic=True), dict(prefill_buckets=(256,), deterministic=True)),
        (dict(block_size=16), dict(page_size=16)),
        (dict(kv_cache_memory_bytes=4096), dict(kv_cache_bytes=4096)),
        (dict(kv_cache_dtype="fp8_e4m3", dtype="half"), dict(kv_cache_dtype="fp8", dtype="float16")),
        (dict(max_model_len=-1), {}),
        (dict(revision="main"), {}),
        (dict(revision="abc"), dict(model="m@abc")),
        (dict(revision="abc", model="m@abc"), dict(model="m@abc")),
        (dict(revision="main", model="./a@b/m"), dict(model="./a@b/m")),
        (dict(tokenizer="m", tokenizer_mode="auto", load_format="auto", runner="pooling"), {}),
        (dict(profiler_config={"profiler": "torch", "torch_profiler_dir": "d"}), dict(profile_dir="d")),
        (dict(enable_lora=False, quantization_config=None, logits_processors=[]), {}),
    ],
)
def test_arguments_of_vllm_become_options(given, options):
    assert adapt("LLM", {"model": "m", **given}) == {"model": "m", **options}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(tensor_parallel_size=0), "tensor_parallel_size=0 is not usable"),
        (dict(tensor_parallel_size=2, topology="both=2"), "would set topology='both=1xtp2', and topology='both=2' is"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization=1.5 is not usable"),
        (dict(max_num_batched_tokens=0), "max_num_batched_tokens=0 is not usable"),
        (dict(block_size=8, page_size=16), "block_size would set page_size=8, and page_size=16 is given"),
        (dict(tokenizer="other"), "tokenizer='other' is not the model 'm': leave it out"),
        (dict(profiler_config={"profiler": "cuda"}), "profiler_config={'profiler': 'cuda'} is not usable"),
    ],
)
def test_values_that_cannot_be_had_are_refused_in_a_sentence(given, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        LLM("m", **given)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        dict(pipeline_parallel_size=2),
        dict(kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_producer"}),
        dict(load_format="dummy"),
        dict(speculative_config={"method": "extract_hidden_states", "num_speculative_tokens": 1}),
        dict(cpu_offload_gb=4),
        dict(logits_processors=[print]),
        dict(enable_lora=True),
    ],
)
def test_what_means_something_and_is_missing_is_refused(given):
    with pytest.raises(TypeError, match=f"LLM has no option {next(iter(given))}, which vLLM has: "):
        LLM("m", **given)


def test_a_model_has_one_revision():
    with pytest.raises(ValueError, match="model names the revision 'abc', and revision='def' is given"):
        LLM("m@abc", revision="def")


def test_deployment_arguments_are_listed_once_in_a_debug_line(caplog):
    with caplog.at_level(logging.DEBUG, "twinmesh"):
        assert adapt("LLM", dict(model="m", swap_space=4, enforce_eager=True, disable_log_stats=False)) == {
            "model": "m"
        }
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "LLM: vLLM's enforce_eager, swap_space mean nothing here, and were left out")
    ]


def test_what_would_only_be_faster_is_left_out_with_a_warning(caplog):
    cache = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    assert adapt(
        "LLM", dict(model="m", speculative_config={"num_speculative_tokens": 3}, kv_transfer_config=cache)
    ) == {"model": "m"}
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "WARNING",
            f"LLM: {name} would make vLLM faster and change no answer; here it does nothing: leave it out: {instead}.",
        )
        for name, instead in [
            (
                "kv_transfer_config",
                "prompts stay cached in the engine (enable_prefix_caching), so ask one engine for all; "
                "topology='prefill=1,decode=1' keeps the phases apart in it",
            ),
            (
                "speculative_config",
                "there is no speculative decoding yet; decode_steps runs several steps at a time, and "
                "`LLM.hidden_states` gives hidden states",
            ),
        ]
    ]


def test_gpu_memory_utilization_is_no_error_on_a_cpu_where_memory_fraction_is():
    share = adapt("LLM", dict(model="m", gpu_memory_utilization=0.4))["memory_fraction"]
    check_share(Share(0.9, share), "cpu")
    with pytest.raises(ValueError, match=r"memory_fraction=0\.4 is a part of a GPU"):
        check_share(Share(0.9, 0.4), "cpu")


# ---- EngineArgs


def test_engine_args_are_a_dataclass_of_all_options_and_vllms():
    args = EngineArgs(model="m", max_model_len=64, enforce_eager=True, tensor_parallel_size=2)
    assert {field.name for field in dataclasses.fields(EngineOptions)} <= dataclasses.asdict(args).keys()
    assert isinstance(AsyncEngineArgs(), EngineArgs)
    options = adapt("LLM", dataclasses.asdict(args))
    assert options == {"model": "m", "max_model_len": 64, "topology": "both=1xtp2"}
    EngineOptions(**options)


def test_a_name_that_neither_has_is_no_engine_arg():
    with pytest.raises(TypeError, match="max_model_length"):
        EngineArgs(max_model_length=1)


def test_a_command_line_gives_what_llm_takes():
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--profile-dir", default="the script's own")
    parser.set_defaults(model="m", runner="pooling", enforce_eager=True)
    args = parser.parse_args(
        ["--max_model_len", "512", "-tp", "2", "--gpu-memory-utilization=0.5", "--no-enable-prefix-caching",
         "--prefill-buckets", "16,64", "--compilation-config", '{"level": 3}', "--trust-remote-code"]
    )  # fmt: skip
    assert vars(args).pop("profile_dir") == "the script's own"
    options = adapt("LLM", vars(args))
    assert options == {
        "model": "m", "max_model_len": 512, "topology": "both=1xtp2", "memory_fraction": 0.5,
        "enable_prefix_caching": False, "prefill_buckets": (16, 64),
    }  # fmt: skip
    assert adapt("LLM", vars(EngineArgs.from_cli_args(args))) == adapt("LLM", vars(args))
    assert args.compilation_config == {"level": 3}


def test_underscores_in_values_stay():
    parser = FlexibleArgumentParser()
    parser.add_argument("--some-name")
    assert parser.parse_args(["--some_name=a_b"]).some_name == "a_b"
    assert parser.parse_args(["--some_name", "a_b"]).some_name == "a_b"


# ---- hf_overrides


def test_overrides_take_the_place_of_the_models_own_configuration(tmp_path):
    path = write_tiny_llama_directory(tmp_path / "tiny")
    own = open_checkpoint(path).config
    yarn = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": own.max_position}
    longer = open_checkpoint(path, {"rope_parameters": yarn}).config
    assert longer.max_position == 4 * own.max_position
    assert longer.layers[0].rope != own.layers[0].rope
    assert open_checkpoint(path, {}).config == own


def test_overrides_of_a_model_without_a_configuration_are_refused(tiny_path):
    with pytest.raises(ValueError, match=r"has no config\.json that hf_overrides could change"):
        LLM(tiny_path, hf_overrides={"rope_theta": 1.0})
    with pytest.raises(ValueError, match="hf_overrides='a' is not usable: it must be a dict"):
        LLM("m", hf_overrides="a")
