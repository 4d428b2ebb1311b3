"""Section 8: JSON as models write it, schemas, and words for the model that strangers cannot forge."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from conftest import assert_linear
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    CallReader,
    ResponseFormat,
    SchemaCheck,
    Tool,
    ToolChoice,
    describe_failure,
    describe_format,
    describe_tools,
    escape_tags,
    find_json,
    render_tool_call,
    render_tool_response,
)


def fit_schema(value: Any, schema: Any) -> tuple[Any, str]:
    return SchemaCheck().fit(value, schema)


# JSON as models write it.

REPAIRS: dict[str, tuple[str, Any]] = {
    "code fence": ('```json\n{"a": 1}\n```', {"a": 1}),
    "code fence never closed": ('```json\n{"a": 1}', {"a": 1}),
    "trailing commas": ('{"a": [1, 2, ], "b": {"c": 3,},\n}', {"a": [1, 2], "b": {"c": 3}}),
    "raw line ends": ('{"a": "x\ny\r\n\tz\x00"}', {"a": "x\ny\r\n\tz\x00"}),
    "missing braces behind a comma": ('{"a": [1, 2, ', {"a": [1, 2]}),
    "brackets and commas in strings": ('{"a": "[,}\\",]", }', {"a": '[,}",]'}),
    "a fence after a sentence": ('Here it is:\n```json\n{"a": 1}\n```\n', {"a": 1}),
    "a fence never closed after a sentence": ('Here it is:\n```json\n{"a": [1,', {"a": [1]}),
    "a closing remark": ('{"a": 1}\n\nI hope this helps {you}!', {"a": 1}),
    "one bracket too many": ('{"a": 1}}', {"a": 1}),
    "a fence that lacks brackets": ('```json\n{"a": [1, 2\n```\nDone.', {"a": [1, 2]}),
    "half a pair": ('{"a": "\\ud83d"}', {"a": "?"}),
    "all at once": ('```json\n{"a": "x\ny", "b": [1,],\n```', {"a": "x\ny", "b": [1]}),
}
BEYOND_REPAIR = {
    "nothing": "",
    "words": "Here it is",
    "single quotes": "{'a': 1}",
    "bare keys": "{a: 1}",
    "comment": '{"a": 1 // one\n}',
    "string never closed": '{"a": "b',
    "string that ends in a backslash": '{"a": "b\\',
    "escaped line end": '{"a": "b\\\nc"}',
    "no value": '{"a":}',
    "brackets crossed": '{"a": [1}]',
    "missing in the middle": '{"a": [1, "b": 2}',
    "no number": '{"a": NaN}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", REPAIRS)
def test_json_is_repaired(name: str) -> None:
    text, value = REPAIRS[name]
    assert find_json(text)[0] == value


@pytest.mark.parametrize("name", BEYOND_REPAIR)
def test_nothing_else_is_repaired(name: str) -> None:
    assert find_json(BEYOND_REPAIR[name]) == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def write_sloppily(value: Any) -> str:
    """JSON with a comma behind each item and strings whose control characters are raw."""
    if isinstance(value, list):
        return f"[{''.join(write_sloppily(one) + ', ' for one in value)}]"
    if isinstance(value, dict):
        return f"{{{''.join(f'{write_sloppily(key)}: {write_sloppily(one)},' for key, one in value.items())} }}"
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"' if isinstance(value, str) else json.dumps(value)


@given(value=st.lists(JSON_VALUES, max_size=4) | st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_repairs_change_no_value(value: Any) -> None:
    text = write_sloppily(value)
    assert find_json(text) == [value]
    assert find_json(f"```json\n{text}\n```") == [value]
    assert find_json(re.sub(r"[\]}, ]+\Z", "", text) if text[1] not in " ]" else text) == [value]


@pytest.mark.parametrize("piece", ["{", "[,", '"', '\\"', ", ", '"\n', "```", '{"a":1,'])
def test_repairing_takes_linear_time(piece: str) -> None:
    def seconds(size: int) -> float:
        start = time.process_time()
        find_json(piece * (size // len(piece)))
        return time.process_time() - start

    assert_linear(seconds, 400_000)


# Schemas. Each row: the schema, values that fit it, values that break it.

NODE = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "true": (True, [1, None, {}], []),
    "false": (False, [], [1, None]),
    "string": ({"type": "string"}, ["", "a"], [None, ["a"]]),
    "integer": ({"type": "integer"}, [1, 1.0, -(10**30)], [1.5, True, "1.5"]),
    "number": ({"type": "number"}, [1, 1.5], [False, "a", None]),
    "boolean": ({"type": "boolean"}, [True, False], [0, 1, None]),
    "null": ({"type": "null"}, [None], [0, False, ""]),
    "array": ({"type": "array"}, [[], [1]], [{}, "a"]),
    "object": ({"type": "object"}, [{}, {"a": 1}], [[], None]),
    "types": ({"type": ["string", "null"]}, ["a", None], [[]]),
    "enum": ({"enum": ["a", 1, None, {"b": [True]}]}, ["a", 1, 1.0, None, {"b": [True]}], ["b", {"b": [2]}]),
    "const": ({"const": 0}, [0, 0.0], [None, ""]),
    "const null": ({"const": None}, [None], [0]),
    "properties": ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "b", "c": 1}, 1], [{"a": []}]),
    "required": ({"required": ["a", "b"]}, [{"a": 1, "b": None}, 1], [{}, {"a": 1}]),
    "no others": ({"properties": {"a": {}}, "additionalProperties": False}, [{}, {"a": 1}], [{"a": 1, "b": 1}]),
    "others": ({"additionalProperties": {"type": "null"}}, [{}, {"a": None}], [{"a": []}]),
    "others by a pattern": ({"patternProperties": {"^x": {}}, "additionalProperties": False}, [{"xa": 1}], []),
    "items": ({"items": {"type": "string"}}, [[], ["a"], "a"], [["a", None]]),
    "anyOf": ({"anyOf": [{"type": "string"}, {"const": 1}]}, ["a", 1], [None]),
    "oneOf": ({"oneOf": [{"type": "array"}, {"maximum": 5}]}, [[], 4], [6]),
    "allOf": ({"allOf": [{"minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    "minimum": ({"minimum": 2}, [2, 2.5, "a"], [1, 1.9]),
    "maximum": ({"maximum": 2}, [2, -1], [3, 2.1]),
    "minLength": ({"minLength": 2}, ["ab", "你好", 1], ["a"]),
    "maxLength": ({"maxLength": 2}, ["ab", [1, 2, 3]], ["abc"]),
    "minItems": ({"minItems": 1}, [[1], ""], [[]]),
    "maxItems": ({"maxItems": 1}, [[1], "abc"], [[1, 2]]),
    "$defs": ({"$defs": {"a": {"const": 1}}, "$ref": "#/$defs/a"}, [1], [2]),
    "definitions": ({"definitions": {"a": {"const": 1}}, "items": {"$ref": "#/definitions/a"}}, [[1]], [[2]]),
    "a name with a slash": ({"$defs": {"a/~b": {"const": 1}}, "$ref": "#/$defs/a~1~0b"}, [1], [2]),
    "an encoded name": ({"$defs": {"a b": {"const": 1}}, "$ref": "#/%24defs/a%20b"}, [1], [2]),
    "an entry": ({"items": {"anyOf": [{"const": 1}, {"$ref": "#/items/anyOf/0"}]}}, [[1]], [[2]]),
    "the root": (
        {"properties": {"a": {"$ref": "#"}}, "required": ["b"]},
        [{"b": 1, "a": {"b": 2}}],
        [{"b": 1, "a": {}}],
    ),
    "beside a reference": ({"$defs": {"a": {"minimum": 1}}, "$ref": "#/$defs/a", "maximum": 2}, [1, 2], [0, 3]),
    "references that lead nowhere": (
        {"allOf": [{"$ref": ref} for ref in ("#/a/b", "#a", "b.json", 5, "#/allOf/99", "#/allOf/x")]},
        [1],
        [],
    ),
    "a list": (NODE, [{"next": {"next": {"next": None}}}], [{"next": {"next": 1}}, {"next": {"next": {"next": "a"}}}]),
    "not evaluated": (
        {"pattern": "(a+)+$", "format": "date", "uniqueItems": True, "not": {}, "prefixItems": [False]},
        ["a" * 50 + "b", [1, 1]],
        [],
    ),
    "hostile": (
        {
            "type": [5, {}, "thing"],
            "enum": 5,
            "required": 5,
            "properties": [],
            "additionalProperties": "no",
            "items": 5,
            "prefixItems": {},
            "anyOf": {},
            "oneOf": [],
            "allOf": "a",
            "not": 3,
            "minimum": "a",
            "minLength": [],
            "$ref": {},
        },
        [1, "a", [1], {"a": 1}, None, 1.5],
        [],
    ),
    "hostile in a list": ({"required": [[]], "anyOf": [5, "a"], "enum": [[1], {"a": 1}, 1, {}]}, [1, {}], []),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_checked(name: str) -> None:
    schema, fitting, breaking = SCHEMAS[name]
    for value in fitting:
        assert fit_schema(value, schema) == (value, "")
    for value in breaking:
        assert fit_schema(value, schema)[1], value


SENTENCES: list[tuple[Any, Any, str]] = [
    (
        {"a": [{"b": []}]},
        {"properties": {"a": {"items": {"properties": {"b": {"type": "null"}}}}}},
        "at $.a[0].b: must",
    ),
    ({}, {"required": ["city"]}, 'at $: must fit {"required":["city"]}'),
    ({"x": 1}, {"additionalProperties": False}, "at $.x: nothing is allowed here"),
    ("c", {"enum": ["a", "b"]}, 'must fit {"enum":["a","b"]}'),
    (1, {"anyOf": [{"const": 2}, {"const": 3}]}, 'must fit {"const":2}'),
]


@pytest.mark.parametrize(("value", "schema", "words"), SENTENCES)
def test_a_violation_names_the_place_and_what_is_wrong(value: Any, schema: Any, words: str) -> None:
    assert words in fit_schema(value, schema)[1]


def test_a_violation_is_told_in_500_characters() -> None:
    long = "x" * 5000
    for value, schema in (
        (1, {"const": long}),
        ({}, {"required": [long]}),
        ({long: 1}, {"additionalProperties": False}),
    ):
        assert 0 < len(fit_schema(value, schema)[1]) <= 500


def nest(depth: int, key: str = "") -> Any:
    value: Any = None
    for _ in range(depth):
        value = {key: value} if key else [value]
    return value


def test_no_schema_hangs_the_check_or_breaks_it() -> None:
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    double: dict[str, Any] = {"$defs": {"0": {"const": 2}}, "$ref": "#/$defs/60"}
    for number in range(60):
        both = {"$ref": f"#/$defs/{number}"}
        double["$defs"][str(number + 1)] = {"anyOf": [both, both]}
    deep: Any = {"const": 2}
    for _ in range(5000):
        deep = {"allOf": [deep]}
    for schema in (loop, double, deep):
        value, wrong = fit_schema("1", schema)
        assert value == "1"
        assert wrong
    assert fit_schema(1, {"oneOf": [{"$ref": nest(5000)}, {}]}) == (1, "")
    assert fit_schema([0] * 20, {"items": {"enum": [*range(1, 2000), 0]}})[1] == ""
    assert "too large" in fit_schema([0] * 2000, {"items": {"enum": [*range(1, 2000), 0]}})[1]


# What is plainly meant. Each row: the schema, what the model wrote, what becomes of it.

CITY = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
MENDED: dict[str, tuple[Any, Any, Any]] = {
    "what fits": (CITY, {"city": "5", "days": 5, "more": None}, {"city": "5", "days": 5, "more": None}),
    "null of an optional property": (CITY, {"city": "a", "days": None}, {"city": "a"}),
    "null of a property that must be there": (CITY, {"city": None, "days": "1"}, {"city": None, "days": "1"}),
    "null that is allowed": (
        {"properties": {"a": {"type": ["string", "null"]}, "b": {"type": "integer"}}},
        {"a": None, "b": "2"},
        {"a": None, "b": 2},
    ),
    "null of a property that is not allowed": (
        {**CITY, "additionalProperties": False},
        {"city": "a", "b": None},
        {"city": "a"},
    ),
    "a number in quotes": (CITY, {"city": "a", "days": "5"}, {"city": "a", "days": 5}),
    "a number with words": (CITY, {"city": "a", "days": "5 days"}, {"city": "a", "days": "5 days"}),
    "a string without quotes": (CITY, {"city": 5}, {"city": "5"}),
    "booleans": ({"items": {"type": "boolean"}}, ["true", "False", True], [True, False, True]),
    "an array as text": (
        {"properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
        {"a": '["1"]'},
        {"a": [1]},
    ),
    "an object as text": ({"items": {"type": "object"}}, ['{"a": 1}'], [{"a": 1}]),
    "by a reference": ({"$defs": {"a": {"type": "integer"}}, "items": {"$ref": "#/$defs/a"}}, ["1"], [1]),
    "the alternative that fits": (
        {"items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        ["1", None],
        [1, None],
    ),
    "an alternative that fits already": ({"items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}, ["1"], ["1"]),
    "what does not fit even so": ({"items": {"type": "integer"}}, ["1", "[1]"], ["1", "[1]"]),
    "any": (True, ["1"], ["1"]),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_plainly_meant_is_mended(name: str) -> None:
    schema, value, expected = MENDED[name]
    fitted, wrong = fit_schema(value, schema)
    assert fitted == expected
    assert json.dumps(fitted) == json.dumps(expected)  # 1 is not true
    assert bool(wrong) is bool(fit_schema(expected, schema)[1])


@given(value=JSON_VALUES, schema=JSON_VALUES)
def test_what_was_mended_fits(value: Any, schema: Any) -> None:
    fitted, wrong = fit_schema(value, schema)
    assert wrong or fit_schema(fitted, schema) == (fitted, "")


# Calls, as models write them.


def test_json_is_found_amid_words() -> None:
    text = 'See {this}:\n{"a": 1}\nor ```json\n[2,]\n``` and {"b": 3, "c": "}{", '
    assert find_json(text) == [{"a": 1}, [2], {"b": 3, "c": "}{"}]
    assert find_json("{broken: [1]}") == []  # nothing inside of a broken value is one


NATIVE = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    '<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{"a": "<|tool_call_end|>"}<|tool_call_end|>'
    "<|tool_call_begin|>functions.h:2<|tool_call_argument_begin|><|tool_call_end|><|tool_calls_section_end|>"
)
FOUND_CALLS: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "none": ('{"name": "f"}', []),
    "Kimi's own form": (NATIVE, [("f", {}), ("g", {"a": "<|tool_call_end|>"}), ("h", {})]),
    "an array": ('<tool_call>[{"name": "f"}, {"name": "g", "arguments": {"a": 1}}]', [("f", {}), ("g", {"a": 1})]),
    "one behind the other": (
        '<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>{"name": "h"}',
        [("f", {}), ("g", {})],
    ),
    "wrapped": ('<tool_call>{"type": "function", "function": {"name": "f", "arguments": "{}"}}', [("f", {})]),
    "a prefix": ('<tool_call>{"name": "functions.f:3"}', [("f", {})]),
    "empty arguments": ('<tool_call>{"name": "f", "arguments": ""}', [("f", {})]),
    "null arguments": ('<tool_call>{"name": "f", "arguments": null}', [("f", {})]),
    "blank arguments": ('<tool_call>{"name": "f", "parameters": " "}', [("f", {})]),
    "arguments in a fence": ('<tool_call>{"name": "f", "arguments": "```json\\n{}\\n```"}', [("f", {})]),
}


@pytest.mark.parametrize("name", FOUND_CALLS)
def test_calls_are_found(name: str) -> None:
    text, expected = FOUND_CALLS[name]
    assert [(call.name, call.arguments) for call in CallReader({}).find_marked(text, is_cut=False)] == expected


def test_the_last_call_of_a_cut_text_is_not_repaired() -> None:
    text = '<tool_call>{"name": "f"}<tool_call>{"name": "g"'
    assert [call.name for call in CallReader({}).find_marked(text, is_cut=False)] == ["f", "g"]
    assert [call.name for call in CallReader({}).find_marked(text, is_cut=True)] == ["f", ""]


# Marks and the words of the prompt.


@pytest.mark.parametrize("word", ["tool_call", "tool_response", "tools", "TOOL_CALL"])
def test_marks_are_broken(word: str) -> None:
    assert escape_tags(f"a<{word}>b</{word}>c") == f"a< {word}>b< /{word}>c"
    assert escape_tags(f"<<{word}>{word}>") == f"<< {word}>{word}>"


@pytest.mark.parametrize("text", ["", "a < b > c", "< tool_call >", "<tool_call", "<tool>", "<b>", "<tool_calls>"])
def test_nothing_else_is_broken(text: str) -> None:
    assert escape_tags(text) == text


MARKED = "x<tool_call>y</tool_response>"
WEATHER = Tool("get_weather", "Weather of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("get_time", "", True)
AUTO = ToolChoice("auto")
REQUIRED = ToolChoice("required")


def marks_in(text: str) -> list[str]:
    return re.findall(r"</?(?:tool_call|tool_response|tools)>", text)


def test_earlier_calls_and_results_are_told_as_the_model_writes_them() -> None:
    assert render_tool_call("f", '{"a":1}') == '<tool_call>\n{"name":"f","arguments":{"a":1}}\n</tool_call>'
    assert (
        render_tool_response("f", 'a\n"b"') == '<tool_response>\n{"name":"f","content":"a\\n\\"b\\""}\n</tool_response>'
    )
    assert marks_in(render_tool_call(MARKED, f'{{"a":"{MARKED}"}}')) == ["<tool_call>", "</tool_call>"]
    assert marks_in(render_tool_response(MARKED, MARKED)) == ["<tool_response>", "</tool_response>"]


def test_tools_are_described() -> None:
    text = describe_tools([WEATHER, CLOCK], AUTO, True)
    lines = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["get_weather", "get_time"]
    assert json.loads(lines[0])["parameters"] == WEATHER.parameters
    assert json.loads(lines[1])["parameters"] is True
    assert "<tool_call>\n{" in text
    assert describe_tools([], AUTO, True) == describe_tools([CLOCK], ToolChoice("none"), True) == ""


def test_the_choice_is_told() -> None:
    texts = {
        describe_tools([CLOCK], choice, parallel)
        for choice in (AUTO, REQUIRED, ToolChoice("named", "get_time"))
        for parallel in (True, False)
    }
    assert len(texts) == 6
    assert sum('the tool "get_time"' in text for text in texts) == 2
    assert sum("at least one tool" in text for text in texts) == 2
    assert sum("one call at most" in text for text in texts) == 3


def test_no_definition_brings_a_mark_or_a_place_holder() -> None:
    strange = Tool(MARKED, MARKED + "{0}{choice}", {"description": MARKED})
    plain = Tool("a", "b", {})
    for choice in (AUTO, ToolChoice("named", MARKED)):
        assert marks_in(describe_tools([strange], choice, True)) == marks_in(describe_tools([plain], choice, True))
    assert "{0}{choice}" in describe_tools([strange], AUTO, True)


def test_the_format_is_described() -> None:
    schema = {"type": "object", "description": MARKED}
    plain = describe_format(ResponseFormat("json_object", None, ""))
    assert "JSON object" in plain
    assert "schema" not in plain
    told = describe_format(ResponseFormat("json_schema", schema, "a"))
    assert json.loads(told.splitlines()[-1])["type"] == "object"
    assert marks_in(told) == []
    assert "schema" not in describe_format(ResponseFormat("json_schema", None, "a"))
    assert (
        told.splitlines()[-1] != describe_format(ResponseFormat("json_schema", False, "a")).splitlines()[-1] == "false"
    )


def test_a_failure_is_described() -> None:
    text = describe_failure(f"it is {MARKED}", "my answer <tool_call>")
    assert "it is x< tool_call>y< /tool_response>" in text
    assert "my answer <tool_call>" in text
    assert "Your answer was" not in describe_failure("it is bad", "")


HARD: dict[str, tuple[Any, Any]] = {  # values and their schemas
    "an enum many times": ({}, {"$defs": {"e": {"enum": ["a"] * 9000}}, "anyOf": [{"$ref": "#/$defs/e"}] * 1500}),
    "itself many times": ({}, {"anyOf": [{"$ref": "#"}] * 100_000}),
    "many types": ({}, {"oneOf": [{"type": "string"}] * 100_000}),
    "a long reference": ({}, {"anyOf": [{"$ref": "#/" + "a/" * 400}] * 100_000}),
    "a long number": (10**4200, {"anyOf": [{"type": "string", "minLength": 5000}] * 100_000}),
    "a long text": ("[" + "1," * 500_000 + "1]", {"anyOf": [{"type": "array", "maxItems": 1}] * 10_000}),
    "a long list of what must be": ({}, {"anyOf": [{"required": [str(number) for number in range(5000)]}] * 10_000}),
}


@pytest.mark.parametrize("name", HARD)
def test_the_checks_of_one_answer_end(name: str) -> None:
    value, schema = HARD[name]
    check = SchemaCheck()
    started = time.process_time()
    for _ in range(100):
        check.fit(value, schema)
    assert time.process_time() - started < 5  # unbounded, it takes minutes


def test_tools_show_no_content() -> None:
    assert "sesame" not in repr(Tool("sesame", "sesame", {"a": "sesame"}))
    assert "sesame" not in repr(ResponseFormat("json_schema", {"a": "sesame"}, "sesame"))
