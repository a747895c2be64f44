"""What a JSON schema says that llguidance takes without keeping to it, where a keyword stands, and whether an instance
can end. llguidance itself is in `grammar.py`; here schemas are read as plain values.

Draft 2020-12 and what it kept of earlier drafts. llguidance refuses keywords that it knows and cannot keep to; one that
it does not know it passes over in silence, which `unknown_keywords` is for.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


def _names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# What llguidance 1.9 keeps to.
KEPT = _names(
    "$ref additionalItems additionalProperties allOf anyOf const enum exclusiveMaximum exclusiveMinimum format items "
    "maxItems maxLength maxProperties maximum minItems minLength minProperties minimum multipleOf oneOf pattern "
    "patternProperties prefixItems properties required type"
)
# What it refuses by name.
REFUSED = _names(
    "$dynamicAnchor $dynamicRef $recursiveAnchor $recursiveRef contains dependencies dependentRequired "
    "dependentSchemas else if maxContains minContains not propertyNames then unevaluatedItems unevaluatedProperties "
    "uniqueItems"
)
# What asks for nothing: annotations, names for references, and what API descriptions add for readers.
ANNOTATIONS = _names(
    "$anchor $comment $defs $id $schema $vocabulary contentEncoding contentMediaType contentSchema default definitions "
    "deprecated description example examples externalDocs id readOnly title writeOnly xml"
)
_ONE = _names(
    "additionalItems additionalProperties contains else if items not propertyNames then unevaluatedItems "
    "unevaluatedProperties"
)
_LISTS = _names("allOf anyOf items oneOf prefixItems")
_BY_NAME = _names("$defs definitions dependentSchemas patternProperties properties")


class Place(NamedTuple):
    """A subschema and where it stands, as a JSON pointer, "" for the whole."""

    pointer: str
    schema: Mapping[str, Any]


def subschemas(schema: object, pointer: str = "") -> Iterator[Place]:
    """Yield every subschema that is an object, outer ones first."""
    if not isinstance(schema, Mapping):
        return
    yield Place(pointer, schema)
    for name, value in schema.items():
        at = f"{pointer}/{name}"
        if name in _ONE and isinstance(value, Mapping):
            yield from subschemas(value, at)
        elif name in _LISTS and isinstance(value, Sequence) and not isinstance(value, str):
            for index, one in enumerate(value):
                yield from subschemas(one, f"{at}/{index}")
        elif name in _BY_NAME and isinstance(value, Mapping):
            for key, one in value.items():
                yield from subschemas(one, f"{at}/{key.replace('~', '~0').replace('/', '~1')}")


def unknown_keywords(schema: object) -> dict[str, str]:
    """Find keywords that mean nothing here, such as one that is misspelled: name -> where it stands first."""
    found: dict[str, str] = {}
    known = KEPT | REFUSED | ANNOTATIONS
    for place in subschemas(schema):
        for name in place.schema:
            if name not in known:
                found.setdefault(name, place.pointer)
    return found


def where(schema: object, keyword: str) -> str:
    """Say where a keyword stands first, as "at the top" or as a JSON pointer."""
    pointer = next((place.pointer for place in subschemas(schema) if keyword in place.schema), "")
    return f"at {pointer}" if pointer else "at the top"


def can_end(schema: object) -> bool:
    """Return whether some instance is finite: False where every one would hold another of its own kind without end.

    llguidance takes such a schema, and an answer to it could never end. What cannot be told counts as finite.
    """
    targets = {place.schema["$ref"] for place in subschemas(schema) if isinstance(place.schema.get("$ref"), str)}
    local = {ref: _resolve(schema, ref) for ref in targets if ref.startswith("#")}
    finite: set[str] = set()
    before = -1
    while before != len(finite):
        before = len(finite)
        finite |= {ref for ref, target in local.items() if ref not in finite and _is_finite(target, local, finite)}
    return _is_finite(schema, local, finite)


def _is_finite(schema: object, local: Mapping[str, object], finite: set[str]) -> bool:
    """Return whether an instance can end, if those of the references in `finite` can."""
    if not isinstance(schema, Mapping):
        return schema is not False
    ref = schema.get("$ref")
    if ref in local and ref not in finite:
        return False

    def each(values: object) -> list[bool]:
        return [_is_finite(one, local, finite) for one in values] if isinstance(values, list) else []

    if not all(each(schema.get("allOf"))) or not all(any(each(schema.get(name)) or [True]) for name in _CHOICES):
        return False
    if schema.get("type") == "object" and isinstance(schema.get("properties"), Mapping):
        required = schema.get("required") if isinstance(schema.get("required"), list) else []
        return all(_is_finite(schema["properties"].get(name, True), local, finite) for name in required or ())
    if schema.get("type") == "array" and isinstance(least := schema.get("minItems"), int):
        first = schema.get("prefixItems") if isinstance(schema.get("prefixItems"), list) else []
        items = [*(first or ()), *[schema.get("items", True)] * max(0, min(least, 1 << 10) - len(first or ()))]
        return all(_is_finite(one, local, finite) for one in items[:least])
    return True


_CHOICES = ("anyOf", "oneOf")


def _resolve(schema: object, ref: str) -> object:
    """Find what "#/..." refers to; True, which admits anything, for what cannot be found so."""
    target: Any = schema
    for part in ref[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            return True
    return target if ref == "#" or ref.startswith("#/") else True


def closed(schema: object) -> object:
    """Return the schema with `additionalProperties: false` in every object that says nothing of them, as vLLM's
    `disable_additional_properties` does."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {name: closed(value) if name not in ("enum", "const") else value for name, value in schema.items()}
    has_keys = "properties" in schema or "patternProperties" in schema
    if has_keys and "additionalProperties" not in schema and isinstance(schema.get("properties", {}), Mapping):
        made["additionalProperties"] = False
    return made
