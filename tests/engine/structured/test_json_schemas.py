"""Answers drawn with random logits under a JSON schema validate by `jsonschema`: random schemas, and the official test
suite of draft 2020-12, which the long test takes out of jsonschema's own source distribution."""

import json
import subprocess
import sys
import tarfile
import warnings
from collections import Counter

import jsonschema
import pytest
from helpers.byte_words import ByteWords, drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twinmesh import StructuredOutputsParams
from twinmesh.engine.structured.grammar import Grammars

VALIDATOR = jsonschema.Draft202012Validator
NAMES = st.sampled_from(["a", "b", "name", "é", 'q"', "a/b", ""])
# The suite's groups whose patterns Python's `re`, with which jsonschema reads them, takes otherwise than ECMA 262:
# there \W is ASCII, and \p{digit} is known.
READ_OTHERWISE = {"ECMA 262 \\W matches everything but ascii letters", "patternProperties with non-ASCII digits"}
# What the guide says of the suite: groups that are kept to, refused, and failing.
COUNTED = {"kept": 203, "refused": 233, "failing": 2}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(ByteWords())


def error_of(schema, text):
    """Why an answer is not valid; None: it is."""
    try:
        found = list(VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER).iter_errors(json.loads(text)))
    except Exception as error:
        return f"{text}: {error!r}"
    return f"{text}: {found[0].message}" if found else None


def compiled(grammars, schema):
    """A schema's grammar, or None and the sentence with which it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # keywords that are named
        try:
            return grammars.compile(StructuredOutputsParams(json=schema)), ""
        except ValueError as error:
            return None, str(error)


# ---- random schemas


def bounded(low, high, least, most):
    """Two bounds in order, either of which may be missing."""
    numbers = st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted)
    return st.tuples(numbers, st.booleans(), st.booleans()).map(
        lambda x: ({least: x[0][0]} if x[1] else {}) | ({most: x[0][1]} if x[2] else {})
    )


def merged(*parts):
    return st.tuples(*parts).map(lambda found: {name: value for part in found for name, value in part.items()})


LEAVES = st.one_of(
    st.sampled_from([{}, {"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"const": {"a": [1]}}]),
    merged(st.just({"type": "string"}), bounded(0, 6, "minLength", "maxLength")),
    st.sampled_from(["^[a-c]{1,4}$", "x+y?", "^\\d{3}-\\d{2}$"]).map(lambda x: {"type": "string", "pattern": x}),
    st.sampled_from(["date", "uuid", "ipv4", "time"]).map(lambda x: {"type": "string", "format": x}),
    merged(st.just({"type": "integer"}), bounded(-50, 50, "minimum", "maximum")),
    st.integers(1, 9).map(lambda x: {"type": "integer", "multipleOf": x, "minimum": 0}),
    merged(st.just({"type": "number"}), bounded(-9, 9, "exclusiveMinimum", "maximum")),
    st.lists(st.sampled_from([None, True, 1, "x", 'a"\\', {"b": 1}, [2]]), min_size=1, max_size=4).map(
        lambda x: {"enum": x}
    ),
)  # fmt: skip


def nested(inner):
    properties = st.dictionaries(NAMES, inner, max_size=3)
    objects = st.tuples(properties, st.lists(NAMES, max_size=2, unique=True), st.none() | st.just(False) | inner).map(
        lambda x: (
            {"type": "object", "properties": x[0], "required": [name for name in x[1] if name in x[0]]}
            | ({} if x[2] is None else {"additionalProperties": x[2]})
        )
    )
    arrays = merged(
        st.just({"type": "array"}), bounded(0, 3, "minItems", "maxItems"),
        st.lists(inner, max_size=2).map(lambda x: {"prefixItems": x} if x else {}), inner.map(lambda x: {"items": x}),
    )  # fmt: skip
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x}))


SCHEMAS = st.recursive(LEAVES, nested, max_leaves=6)
IN_TREES = st.fixed_dictionaries({"$defs": st.fixed_dictionaries({"node": SCHEMAS}), "inner": SCHEMAS}).map(
    lambda x: {
        "$defs": {"node": x["$defs"]["node"], "tree": {"type": "object", "required": ["node"], "properties": {
            "node": {"$ref": "#/$defs/node"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}},
        "anyOf": [{"$ref": "#/$defs/tree"}, x["inner"]],
    }
)  # fmt: skip


def check_random(grammars, schema):
    grammar, refusal = compiled(grammars, schema)
    if grammar is None:
        assert refusal.startswith("structured_outputs.json")
        return
    for seed in range(2):
        text = drawn(grammar, seed, most=250)
        assert text is None or error_of(schema, text) is None, error_of(schema, text)


def random_schemas(count):
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


def test_answers_to_random_schemas_are_valid(grammars):
    random_schemas(15)(given(SCHEMAS | IN_TREES)(lambda schema: check_random(grammars, schema)))()


@pytest.mark.long
def test_answers_to_500_random_schemas_are_valid(grammars):
    random_schemas(500)(given(SCHEMAS | IN_TREES)(lambda schema: check_random(grammars, schema)))()


# ---- the official suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Groups of draft 2020-12, with their files."""
    folder = tmp_path_factory.mktemp("jsonschema")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    done = subprocess.run([*download, "jsonschema==4.26.0"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"jsonschema's source distribution cannot be had here: {done.stderr[-300:]}")
    with tarfile.open(folder / "jsonschema-4.26.0.tar.gz") as archive:
        names = [name for name in archive.getnames() if "/json/tests/draft2020-12/" in name and name.endswith(".json")]
        return [(name, group) for name in sorted(names) for group in json.load(archive.extractfile(name))]


@pytest.mark.long
def test_answers_to_the_official_schemas_are_valid_or_the_schema_is_refused(grammars, suite):
    counted, failing = Counter(), {}
    for name, group in suite:
        grammar, refusal = compiled(grammars, group["schema"])
        if grammar is None:
            assert refusal.startswith("structured_outputs.json"), refusal
            counted["refused"] += 1
            continue
        texts = [drawn(grammar, seed) for seed in range(20)]
        errors = [error_of(group["schema"], text) for text in texts if text is not None]
        wrong = next(filter(None, errors), None)
        counted["failing" if wrong else "kept"] += 1
        if wrong:
            failing[group["description"]] = name, wrong
    assert failing.keys() == READ_OTHERWISE, failing
    assert counted == COUNTED
