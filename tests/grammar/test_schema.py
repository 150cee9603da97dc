"""What is taken for a schema validates: where llguidance takes more, the schema is said otherwise, or refused."""

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLTokenizer

from aiollm.grammar.llguidance import GrammarError, matcher_of
from aiollm.grammar.schema import SchemaError, followed
from aiollm.wire.sampling import Grammar

NUMBERS = [
    "0", "1", "-1", "2", "3", "-3", "99", "100", "0.5", "-0.5", "0.25", "0.75", "-0.25", "1.25", "1.5", "-1.25",
    "2.5",    "2.75", "-3.25", "-3.5", "99.5", "0.001", "-0.001", "1.001",
]  # fmt: skip
BOUNDS = [
    {"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, {"exclusiveMinimum": 0, "maximum": 0.5},
    {"exclusiveMinimum": 1, "maximum": 1.5}, {"exclusiveMinimum": 2, "exclusiveMaximum": 2.75},
    {"exclusiveMinimum": 99, "maximum": 99.75}, {"minimum": -1.5, "exclusiveMaximum": -1},
    {"exclusiveMinimum": -3.5, "exclusiveMaximum": -3}, {"minimum": -0.5, "exclusiveMaximum": 0},
    {"minimum": 1, "exclusiveMinimum": 0, "maximum": 1.5}, {"minimum": 0, "exclusiveMinimum": 0, "maximum": 0.5},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"exclusiveMinimum": 0.25, "maximum": 0.5}, {"exclusiveMinimum": 1},
    {"exclusiveMaximum": 0}, {"minimum": 0, "maximum": 0.5}, {"exclusiveMinimum": -1, "exclusiveMaximum": 1},
]  # fmt: skip


def takes(schema: Any, text: str, tokens: LLTokenizer) -> bool:
    """Whether a text may be written under a schema, byte by byte, and may end there."""
    matcher = matcher_of(Grammar("json", json.dumps(schema)), tokens)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and bool(matcher.is_accepting())


@pytest.mark.parametrize("bounds", BOUNDS, ids=json.dumps)
def test_numbers_within_bounds_and_no_others_are_taken(bounds: dict[str, float], tokens: LLTokenizer) -> None:
    schema = {"type": "number", **bounds}
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert [text for text in NUMBERS if takes(schema, text, tokens)] == [
        text for text in NUMBERS if valid(json.loads(text))
    ]


def test_draft_4_says_it_otherwise(tokens: LLTokenizer) -> None:
    schema = {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}
    assert followed(schema) == followed({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5})


def test_a_bound_far_from_zero_is_excluded_too() -> None:
    least = 2.0**50
    found = followed({"exclusiveMinimum": least, "maximum": least + 0.75})
    assert least < found["minimum"] < least + 0.75 and "exclusiveMinimum" not in found


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"\\u00e9":"x"}', False), ('{"é":1,"\\u00e9":2}', False), ('{"\\u0061":1}', False), ('{"é":1}', True),
        ('{"é":"x"}', False), ('{"é":1,"b":[null]}', True), ('{"b":"x"}', True), ("{}", True), ('{"\\n":1}', True),
    ],
)  # fmt: skip
def test_a_listed_name_is_not_written_otherwise(text: str, taken: bool, tokens: LLTokenizer) -> None:
    assert takes({"type": "object", "properties": {"é": {"type": "integer"}}}, text, tokens) == taken


def test_schemas_that_are_joined_stay_open(tokens: LLTokenizer) -> None:
    parts = [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}]
    schema = {"type": "object", "allOf": parts}
    texts = ['{"a":1,"b":2}', '{"b":2}', '{"b":2,"c":"x"}', '{"a":"x","b":2}', '{"a":1,"b":"x"}', '{"a":1}']
    assert [takes(schema, text, tokens) for text in texts] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "schema",
    [
        {"additionalProperties": {"type": "integer"}, "minProperties": 2},
        {"patternProperties": {"^a$": {"const": 1}}, "additionalProperties": False, "minProperties": 2},
        {"properties": {"a": True}, "required": ["a"], "minProperties": 3},
    ],
)
def test_names_that_would_have_to_be_counted_are_refused(schema: dict[str, Any], tokens: LLTokenizer) -> None:
    with pytest.raises(GrammarError, match=r"minProperties: [23] where required has"):
        matcher_of(Grammar("json", json.dumps({"items": {"type": "object", **schema}})), tokens)


@pytest.mark.parametrize(
    "schema",
    [
        {"additionalProperties": {"type": "integer"}, "minProperties": 1},
        {"required": ["a"], "minProperties": 2},
        {"properties": {"minProperties": {"type": "integer"}}, "additionalProperties": False},
    ],
)
def test_names_that_need_no_counting_are_followed(schema: dict[str, Any], tokens: LLTokenizer) -> None:
    assert matcher_of(Grammar("json", json.dumps({"type": "object", **schema})), tokens)


def test_values_and_names_are_no_schemas() -> None:
    literal = {"exclusiveMinimum": 0, "maximum": 0.5, "minProperties": 7}
    for name in ("const", "default", "enum", "examples"):
        assert followed({name: literal}) == {name: literal}
    inner = {"exclusiveMinimum": 0, "maximum": 0.5}
    assert "minimum" in followed({"properties": {"const": inner}})["properties"]["const"]
    with pytest.raises(SchemaError):
        followed({"anyOf": [{"minProperties": 2}]})


@pytest.mark.parametrize("kind", ["ebnf", "calls"])
def test_schemas_within_a_grammar_are_followed_as_others_are(kind: Any, tokens: LLTokenizer) -> None:
    lenient = '{"type": "number", "exclusiveMinimum": 0,\n "maximum": 0.5, "x-guidance": {"lenient": true}}'
    matcher = matcher_of(Grammar(kind, f'start: "x" inner "y"\ninner: %json {lenient}\n'), tokens)
    assert [matcher.deep_copy().validate_tokens(list(text)) for text in (b"x0y", b"x0.5y")] == [2, 5]
    with pytest.raises(GrammarError, match="the schema is no JSON"):
        matcher_of(Grammar(kind, "start: %json {nonsense}\n"), tokens)
