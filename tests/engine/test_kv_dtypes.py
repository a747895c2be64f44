"""What `kv_cache_dtype` may say, what it costs in bytes, and how it is refused."""

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import KVDtype, KVDtypes, parse_kv_dtypes, same_everywhere
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.simulation.capacity import DeviceMemory, capacity
from twinmesh.engine.simulation.costs.devices import device_named
from twinmesh.engine.simulation.costs.roofline import roofline
from twinmesh.engine.sizing.memory_needs import page_bytes
from twinmesh.engine.topology import Role, Topology
from twinmesh.scripts.gpu.steps import QWEN3_8B

PAIR = Topology.parse("prefill=1,decode=1")
INT8, MIXED, BF16 = KVDtype("int8", "int8"), KVDtype("int8", "fp8"), KVDtype("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("text", "prefill", "decode"),
    [
        ("auto", BF16, BF16),
        ("int8", INT8, INT8),
        ("int8/fp8", MIXED, MIXED),
        ("prefill=auto,decode=int8/fp8", BF16, MIXED),
        ("decode=int8, prefill=bfloat16", BF16, INT8),
    ],
)
def test_it_says_what_meshes_store(text, prefill, decode):
    found = parse_kv_dtypes(text, "bfloat16", PAIR)
    assert found == KVDtypes(prefill, decode)
    assert parse_kv_dtypes(str(found), "float32", PAIR) == found
    assert (found.on(Role.PREFILL), found.on(Role.BOTH), found.on(Role.POOL)) == (prefill, decode, decode)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4", r"kv_cache_dtype='int4' has no dtype 'int4': use auto, float32, bfloat16, float16, int8, fp8"),
        ("int8/int4", "has no dtype 'int4'"),
        ("int8/fp8/fp8", "names 3 dtypes: keys and values have one each"),
        ("", "has no dtype ''"),
        ("int8,fp8", "has no dtype 'int8,fp8'.*'int8/fp8' for keys and values apart"),
        ("decode=int8", "does not say what prefill meshes store: add 'prefill=auto'"),
        ("prefill=int8,prefill=int8", "not readable at 'prefill=int8'"),
        ("both=int8,decode=int8", "not readable at 'both=int8': name prefill and decode, once each"),
        (8, "kv_cache_dtype=8 is not usable: it must be a text"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        EngineOptions("a model", topology="prefill=1,decode=1", kv_cache_dtype=text)


def test_roles_that_the_meshes_do_not_have_are_refused():
    with pytest.raises(ValueError, match="names roles, and the meshes of topology 'both=2' prefill and decode"):
        EngineOptions("a model", topology="both=2", kv_cache_dtype="prefill=auto,decode=int8")


def test_a_page_has_a_number_for_each_channel_and_a_scale_for_each_token_and_head():
    tokens = 36 * 8 * 64  # of all layers, heads and slots of a page
    assert page_bytes(QWEN3_8B, 64, BF16) == (tokens * 2 * 128 * 2,)
    assert page_bytes(QWEN3_8B, 64, INT8) == (tokens * 2 * (128 + 4),)
    assert page_bytes(QWEN3_8B, 64, KVDtype("int8", "bfloat16")) == (tokens * (128 + 4 + 256),)


def test_a_simulated_engine_holds_more_tokens_and_reads_fewer_bytes():
    def simulated(kv):
        asked = EngineOptions("a model", topology="prefill=1,decode=1", kv_cache_dtype=kv, max_num_seqs=256)
        peaks = device_named("h100")
        config, pools = capacity(QWEN3_8B, asked, DeviceMemory("h100", peaks.memory))
        return config, pools, roofline(QWEN3_8B, config, peaks)

    (_, plain, costs), (config, mixed, others) = simulated("auto"), simulated("prefill=auto,decode=int8")
    assert config.kv_dtypes == KVDtypes(BF16, INT8)
    assert mixed[1].pages[0] > 1.9 * plain[1].pages[0] * 0.99
    assert mixed[0].page_bytes == plain[0].page_bytes
    # On both sides a hand-off has the bytes of where it goes.
    assert mixed[0].sent_pages == mixed[1].sent_pages == mixed[1].page_bytes
    assert mixed[0].transfer_bytes(8, (8,)) < 0.52 * plain[0].transfer_bytes(8, (8,))
    size = config.decode_buckets[-1]
    assert others.decode[size].context == pytest.approx(costs.decode[size].context * 132 / 256)
    assert others.prefill == costs.prefill


def test_auto_is_the_dtype_of_the_engine():
    config = EngineConfig(PAIR, max_model_len=8, dtype="bfloat16")
    assert config.kv_dtypes == same_everywhere("bfloat16")
    assert not config.kv_dtypes.is_quantized
