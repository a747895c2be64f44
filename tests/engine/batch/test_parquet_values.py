"""What columns of every type say, as the batch line would have said it."""

import decimal
import json

import numpy as np
import pytest
from helpers.batch_files import DEFAULTS
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.parquet import read_rows, survey_rows
from twinmesh.engine.batch.request_lines import BatchLineError, parse_line, read_custom_id

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'twinmesh[parquet]'")
from pyarrow import parquet  # noqa: E402

TEXT, REAL = pa.string(), pa.float64()
NAN = float("nan")


def map_of(value, key=TEXT):
    return pa.map_(key, value)


@pytest.fixture
def read(tmp_path):
    """The request of a table's only row."""

    def write(**columns):
        path = tmp_path / "in.parquet"
        parquet.write_table(pa.table({name: pa.array(*column) for name, column in columns.items()}), path)
        return parse_line(next(read_rows(path)), 1, DEFAULTS)

    return write


PROMPT = (["a"], TEXT)
MESSAGE = pa.struct([("role", TEXT), ("content", TEXT)])
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("logit_bias", ([[("5", 1.0), ("7", -2.0)]], map_of(REAL)), {5: 1.0, 7: -2.0}),
        ("logit_bias", ([[(5, 1.0)]], map_of(REAL, pa.int32())), {5: 1.0}),
        ("logit_bias", ([[(5, decimal.Decimal("-0.25"))]], map_of(pa.decimal128(5, 2), pa.int64())), {5: -0.25}),
        ("logit_bias", ([[]], map_of(REAL)), {}),
        ("temperature", ([decimal.Decimal("0.700")], pa.decimal128(6, 3)), 0.7),
        ("top_p", ([decimal.Decimal("0.95")], pa.decimal256(40, 2)), 0.95),
        ("max_tokens", ([decimal.Decimal("12.00")], pa.decimal128(10, 2)), 12),
        ("seed", ([decimal.Decimal(4294967295)], pa.decimal128(20, 0)), 4294967295),
        ("min_p", ([NAN], pa.float32()), 0.0),
        ("min_tokens", ([2.0], pa.float32()), 2),
        ("temperature", ([np.float16(0.5)], pa.float16()), 0.5),
        ("max_tokens", ([np.float16(12)], pa.float16()), 12),
        ("top_p", ([np.float16("nan")], pa.float16()), 1.0),
        ("stop_token_ids", ([[np.float16(3)]], pa.list_(pa.float16())), (3,)),
        ("logit_bias", ([[("5", np.float16(1))]], map_of(pa.float16())), {5: 1.0}),
        ("stop", ([["x", "y"]], pa.large_list(pa.dictionary(pa.int8(), TEXT))), ("x", "y")),
        ("stop", ([[b"x"]], pa.list_(pa.binary())), ("x",)),
        ("stop_token_ids", ([[3.0, 4.0]], pa.list_(REAL)), (3, 4)),
        ("allowed_token_ids", ([[decimal.Decimal(3)]], pa.list_(pa.decimal128(9, 0), 1)), (3,)),
        ("bad_words", ([None], pa.list_(TEXT)), ()),
    ],
    ids=str,
)
def test_columns_of_any_type_are_sampling_parameters(read, name, column, value):
    got = getattr(read(prompt=PROMPT, **{name: column}).sampling_params, name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "ids"),
    [(pa.list_(REAL), [104.0, 105.0]), (pa.list_(pa.decimal128(5, 0)), [decimal.Decimal(104), decimal.Decimal(105)]),
     (pa.list_(pa.uint16()), [104, 105]), (pa.large_list(pa.float32()), [104.0, 105.0])],
    ids=str,
)  # fmt: skip
def test_token_ids_of_any_type_are_a_prompt(read, kind, ids):
    assert read(prompt=([ids], kind)).prompt == [104, 105]


def test_bodies_are_structs_maps_or_text_on_any_level(read):
    line = dict(custom_id=(["x"], TEXT), method=(["POST"], TEXT), url=(["/v1/chat/completions"], TEXT))
    body = pa.struct([("messages", pa.list_(MESSAGE)), ("max_tokens", REAL), ("seed", pa.decimal128(9, 0)),
                      ("logit_bias", map_of(REAL)), ("top_k", REAL)])  # fmt: skip
    given = {"messages": [USER], "max_tokens": 16.0, "seed": decimal.Decimal(3), "logit_bias": [("5", 1.0)],
             "top_k": NAN}  # fmt: skip
    first = read(**line, body=([given], body))
    text = {"messages": json.dumps([USER]), "logit_bias": '{"5": 1}', "max_tokens": 16, "seed": 3}
    kinds = pa.struct([("messages", TEXT), ("logit_bias", TEXT), ("max_tokens", pa.int8()), ("seed", pa.int8())])
    second = read(**line, body=([text], kinds))
    third = read(
        **line, body=([json.dumps({"messages": [USER], "max_tokens": 16, "seed": 3, "logit_bias": {"5": 1}})], TEXT)
    )
    params = SamplingParams(temperature=0.0, max_tokens=16, seed=3, logit_bias={5: 1.0})
    assert first == second == third
    assert first.sampling_params == params
    assert first.messages == [USER]


def test_messages_are_maps_or_structs_and_lack_what_is_null(read):
    as_maps = [[("role", "user"), ("content", "a")], [("role", "assistant"), ("content", "b"), ("name", None)]]
    messages = [USER, {"role": "assistant", "content": "b"}]
    assert read(messages=([as_maps], pa.list_(map_of(TEXT)))).messages == messages
    kind = pa.struct([("role", TEXT), ("content", TEXT), ("name", TEXT), ("tool_calls", pa.list_(map_of(TEXT)))])
    assert read(messages=([messages], pa.large_list(kind))).messages == messages


def test_tools_reach_the_template_as_they_were(read):
    inner = pa.struct([("type", TEXT), ("default", pa.int64()), ("minimum", pa.decimal128(4, 2))])
    schema = pa.struct([("type", TEXT), ("properties", map_of(inner)), ("required", pa.list_(TEXT))])
    function = pa.struct([("name", TEXT), ("parameters", schema), ("strict", pa.bool_())])
    tool = pa.struct([("type", TEXT), ("function", function)])
    properties = [
        ("n", {"type": "integer", "default": 3}),
        ("x", {"type": "number", "minimum": decimal.Decimal("0.50")}),
    ]
    given = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties,
             "required": []}}}  # fmt: skip
    plain = {"n": {"type": "integer", "default": 3}, "x": {"type": "number", "minimum": 0.5}}
    parameters = {"type": "object", "required": [], "properties": plain}
    tools = read(messages=([[USER]], pa.list_(MESSAGE)), tools=([[given]], pa.list_(tool))).tools
    assert tools == [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def test_an_empty_map_is_an_object_and_an_empty_list_is_a_list(read):
    kind = pa.struct([("name", TEXT), ("parameters", map_of(map_of(TEXT))), ("required", pa.list_(TEXT))])
    given = {"name": "f", "parameters": [("properties", [])], "required": []}
    tool = read(messages=([[USER]], pa.list_(MESSAGE)), tools=([[given]], pa.list_(kind))).tools[0]
    assert tool == {"name": "f", "parameters": {"properties": {}}, "required": []}


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (([[("5", 1.0), ("5", 2.0)]], map_of(REAL)), "the key '5' is there twice in one map"),
        ((['{"5": 1, "5": 2}'], TEXT), "the key '5' is there twice in one object"),
        (
            ([{"5": [("a", "b"), ("a", "c")]}], pa.struct([("5", map_of(TEXT))])),
            "the key 'a' is there twice in one map",
        ),
        ((["[" * 100_000], TEXT), "nested too deeply"),
    ],
    ids=["map", "text", "nested", "deep"],
)
def test_what_cannot_be_one_value_is_an_error_of_its_line_alone(read, column, says):
    with pytest.raises(BatchLineError, match=rf"^line 1: 'logit_bias' cannot be read: .*{says}") as refused:
        read(prompt=PROMPT, custom_id=(["mine"], TEXT), logit_bias=column)
    assert refused.value.custom_id == "mine"


@pytest.mark.parametrize("kind", [TEXT, pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), TEXT)], ids=str)
def test_a_name_is_read_alike_in_the_survey_and_in_the_run(tmp_path, kind):
    path = tmp_path / "in.parquet"
    name = b"me" if kind == pa.binary() else "me"
    parquet.write_table(pa.table({"prompt": ["a"], "custom_id": pa.array([name], kind)}), path)
    surveyed = [read_custom_id(row, 1) for row in survey_rows(path)]
    assert surveyed == ["me"] == [parse_line(row, 1, DEFAULTS).custom_id for row in read_rows(path)]


@pytest.mark.parametrize(
    ("names", "twice"),
    [
        (["prompt", "prompt"], "prompt"),
        (["custom_id", "prompt", "custom_id"], "custom_id"),
        (["prompt", "temperature", "temperature"], "temperature"),
        (["whatever", "prompt", "whatever"], "whatever"),
        (["prompt", "model", "user", "model", "model"], "model"),
    ],
)
def test_columns_of_one_name_are_refused(tmp_path, names, twice):
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * len(names), names), path)
    for read in (read_rows, survey_rows):
        with pytest.raises(
            ValueError, match=rf"in\.parquet has \d columns named '{twice}', of which a row can have one"
        ):
            list(read(path))
