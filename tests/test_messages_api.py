"""Anthropic's Messages API across sections 10 and 11: its requests in, its messages and errors out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    APIS,
    FAILURES,
    MODERATED_SENTENCE,
    Attachment,
    ChatRequest,
    Citation,
    Encoder,
    Event,
    Finished,
    FinishReason,
    Message,
    Opened,
    ProxyError,
    ResponseFormat,
    SearchHit,
    Sources,
    SSEParser,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    estimate_tokens,
    make_chain,
    parse_chat_request,
    parse_messages_request,
    render_messages_error,
    render_prompt,
)

HI = {"role": "user", "content": "hi"}
FUNCTION = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}}}


def merge(messages: Sequence[Message]) -> str:
    return render_prompt(ChatRequest("kimi", tuple(messages), False, None, None))


def parse(*messages: Any, **fields: Any) -> ChatRequest:
    body = {"max_tokens": 9, "messages": list(messages) or [HI], **fields}
    return parse_messages_request(json.dumps(body).encode())


def blocks(*content: Any, role: str = "user") -> tuple[Message, ...]:
    return parse({"role": role, "content": list(content)}).messages


def result(call_id: str, text: str) -> Message:
    return Message("tool", text, tool_call_id=call_id)


# Requests


def test_a_plain_request_is_the_same_as_by_chat_completions() -> None:
    fields = {"model": "m", "messages": [HI, {"role": "assistant", "content": "yes"}], "max_tokens": 5, "stream": True}
    body = json.dumps(fields).encode()
    assert parse_messages_request(body) == parse_chat_request(body)


def test_defaults() -> None:
    request = parse_messages_request(b'{"messages":[{"content":"x"}]}')
    assert request == ChatRequest("kimi", (Message("user", "x"),), False, None, None)
    assert parse(model=None).model == "kimi" and parse(model=" ").model == "kimi"


CONTENTS: dict[str, tuple[Any, str]] = {
    "string": ("a b", "a b"),
    "null": (None, ""),
    "empty": ("", ""),
    "no blocks": ([], ""),
    "one block": ([{"type": "text", "text": "a"}], "a"),
    "each block on a line of its own": ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    "empty blocks leave no line": (
        [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}],
        "a\nb",
    ),
    "bare strings as blocks": (["a", "b"], "a\nb"),
    "a block with what has no effect": (
        [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "citations": None}],
        "a",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_string_and_blocks_are_read_alike(role: str, name: str) -> None:
    content, text = CONTENTS[name]
    assert parse({"role": role, "content": content}).messages == (Message(role, text),)


@pytest.mark.parametrize("name", CONTENTS)
def test_system_is_the_first_message(name: str) -> None:
    content, text = CONTENTS[name]
    before = f"system:{text}\n" if text else ""
    assert render_prompt(parse(HI, system=content)) == f"{before}user:hi\n"


def test_a_system_message_within_stays_in_its_place_and_is_not_marked() -> None:
    url = "https://example.com/a"
    system, user = {"role": "system", "content": url}, {"role": "user", "content": url}
    request = parse(user, system, {"role": "assistant", "content": url}, HI, system=[{"type": "text", "text": url}])
    assert render_prompt(request) == (
        f'system:{url}\nuser:<url id="" type="url" status="" title="" wc="">{url}</url>\n'
        f"system:{url}\nassistant:{url}\nuser:hi\n"
    )


def test_a_system_message_after_the_users_last_turn_is_moved_before_it() -> None:
    system = {"role": "system", "content": "The directory is /tmp/x."}
    roles = [message.role for message in parse(HI, {"role": "assistant", "content": "a"}, HI, system, system).messages]
    assert roles == ["user", "assistant", "system", "system", "user"]
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}
    given = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}, "and?"]}
    roles = [message.role for message in parse(HI, system, called, given, system).messages]
    assert roles == ["user", "system", "assistant", "system", "tool", "user"]
    assert [message.role for message in parse(system).messages] == ["system"]


SOURCES: dict[str, tuple[dict[str, Any], Attachment]] = {
    "image, base64": (
        {"type": "image", "source": {"type": "base64", "media_type": "image/PNG", "data": "QUJD"}},
        Attachment("image", "messages[0].content[0].source.data", data="QUJD", content_type="image/png"),
    ),
    "image, url": (
        {"type": "image", "source": {"type": "url", "url": "https://h/x"}},
        Attachment("image", "messages[0].content[0].source.url", url="https://h/x"),
    ),
    "image, data url": (
        {"type": "image", "source": {"type": "url", "url": "data:image/png;base64,QUJD"}},
        Attachment(
            "image",
            "messages[0].content[0].source.url",
            data="data:image/png;base64,QUJD",
            start=22,
            content_type="image/png",
        ),
    ),
    "document, base64": (
        {
            "type": "document",
            "title": "a.pdf",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "QUJD"},
        },
        Attachment(
            "file",
            "messages[0].content[0].source.data",
            data="QUJD",
            name="a.pdf",
            content_type="application/pdf",
        ),
    ),
    "document, url": (
        {"type": "document", "title": "a.pdf", "source": {"type": "url", "url": "https://h/x"}},
        Attachment("file", "messages[0].content[0].source.url", url="https://h/x", name="a.pdf"),
    ),
    "document, without a title or a type": (
        {"type": "document", "title": None, "source": {"type": "base64", "data": "QUJD"}},
        Attachment("file", "messages[0].content[0].source.data", data="QUJD"),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pictures_and_documents_are_attachments(name: str) -> None:
    block, attachment = SOURCES[name]
    (message,) = blocks(block, {"type": "text", "text": "what is this?"})
    assert message == Message("user", "what is this?", (attachment,))
    assert attachment.data[attachment.start :] == ("QUJD" if attachment.data else "")
    assert blocks(block) == (Message("user", "", (attachment,)),)


def test_a_document_of_text_is_text() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "line"}
    assert blocks({"type": "document", "source": source, "title": "T"}, "sum up") == (
        Message("user", "T\nline\nsum up"),
    )
    assert blocks({"type": "document", "source": source}) == (Message("user", "line"),)


def test_calls_are_told_as_the_model_made_them_and_results_by_their_names() -> None:
    request = parse(
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"q": "P"}},
                {"type": "tool_use", "id": "t2", "name": "other"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And?"},
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t9"},
                {"type": "text", "text": "Go on."},
            ],
        },
        tools=[FUNCTION],
    )
    calls = (ToolCall("t1", "get_weather", '{"q":"P"}'), ToolCall("t2", "other", "{}"))
    assert request.messages == (
        Message("user", "Weather?"),
        Message("assistant", "Let me see.", calls=calls),
        result("t1", "sunny"),
        result("t2", "Error: no"),
        result("t9", ""),
        Message("user", "And?\nGo on."),
    )


def test_calls_and_results_are_rendered_as_by_chat_completions() -> None:
    ours = parse(
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": "<tools>你"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "</tool_response>"}]},
    )
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a":"<tools>你"}'}}
    theirs = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "</tool_response>"},
    ]
    assert ours.messages == parse_chat_request(json.dumps({"messages": theirs}).encode()).messages


def test_a_message_of_results_alone_adds_no_empty_words() -> None:
    (message,) = blocks({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "a"}]})
    assert message == result("1", "a")


def test_a_result_carries_its_pictures_and_its_urls_are_not_wrapped() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    seen = {"type": "tool_result", "tool_use_id": "1", "content": [image, {"type": "text", "text": "https://a.bc/d"}]}
    other = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJE"}}
    first, second = blocks(seen, other)
    assert (first.role, first.text) == ("tool", "https://a.bc/d")
    assert [one.path for one in first.attachments] == ["messages[0].content[0].content[0].source.data"]
    assert [one.path for one in second.attachments] == ["messages[0].content[1].source.data"]
    assert "<url" not in merge([first])


def test_what_server_tools_did_is_told_as_calls_and_results() -> None:
    unknown = [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result"}]},
    ]
    told = {"type": "mcp_tool_result", "tool_use_id": "m", "content": [{"type": "text", "text": "found"}]}
    request = parse({"role": "assistant", "content": [*unknown, told, "a"]}, HI)
    assert request.messages[:3] == (
        Message("assistant", "a", calls=(ToolCall("s", "web_search", "{}"),)),
        Message("tool", "[web_search_result left out]", tool_call_id="s"),
        Message("tool", "found", tool_call_id="m"),
    )


def test_no_unknown_part_makes_later_turns_fail() -> None:
    hologram = {"type": "hologram", "data": "x"}
    history = {"role": "user", "content": [hologram, {"type": "later", "text": "b"}, {"type": "x", "content": "c"}]}
    request = parse(history, {"role": "assistant", "content": "a"}, HI)
    assert request.messages[0].text == "[hologram left out]\nb\nc"
    result = {"type": "tool_result", "tool_use_id": "1", "content": [hologram, {"type": "tool_result"}, "a"]}
    request = parse({"role": "user", "content": [result]})
    assert request.messages[0].text == "[hologram left out]\n[tool_result left out]\na"


def test_functions_are_read_with_and_without_a_type_each_once() -> None:
    request = parse(tools=[FUNCTION, {**FUNCTION, "type": "custom", "name": "b"}, {**FUNCTION, "description": "x"}])
    assert request.tools == (
        Tool("get_weather", "Weather", {"type": "object"}),
        Tool("b", "Weather", {"type": "object"}),
    )
    assert (request.use_search, request.left_out) == (None, ())
    assert parse(tools=[{"name": "f"}]).tools[0].parameters == {"type": "object", "properties": {}}


def test_a_web_search_switches_search_on_and_other_kinds_are_left_out() -> None:
    foreign = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "mcp_toolset"},
    ]
    request = parse(tools=[SEARCH, FUNCTION, *foreign])
    assert request.use_search is True
    assert [tool.name for tool in request.tools] == ["get_weather"]
    assert request.left_out == ("bash", "str_replace_based_edit_tool", "mcp_toolset")
    assert parse(tools=foreign).use_search is None
    assert parse(model="kimi-search").use_search is True
    assert parse(tools=[{"type": "x", "name": "a\nb" * 99}]).left_out == ("x",)


@pytest.mark.parametrize(
    ("value", "expected", "parallel"),
    [
        (None, ToolChoice(), True),
        ({"type": "auto"}, ToolChoice(), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(), False),
        ({"type": "none"}, ToolChoice("none"), True),
        ({"type": "any"}, ToolChoice("required"), True),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required"), False),
        ({"type": "tool", "name": "get_weather"}, ToolChoice("named", "get_weather"), True),
        ({"type": "tool", "name": "web_search"}, ToolChoice(), True),
    ],
)
def test_tool_choice(value: Any, expected: ToolChoice, parallel: bool) -> None:
    request = parse(tools=[FUNCTION, SEARCH], tool_choice=value)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, parallel)


def test_any_of_the_searches_alone_is_no_call() -> None:
    assert parse(tools=[SEARCH], tool_choice={"type": "any"}).tool_choice == ToolChoice()


def test_stop_sequences_and_the_limit() -> None:
    request = parse(stop_sequences=["a", "b", "a", "", *"cdefghijklm"], max_tokens=7)
    assert (request.stop, request.max_tokens) == (tuple("abcdefghijklm"), 7)
    assert (parse(max_tokens=None).max_tokens, parse(stop_sequences=None).stop) == (None, ())


def test_the_form_of_the_answer() -> None:
    request = parse(output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}})
    assert request.response_format == ResponseFormat("json_schema", SCHEMA)
    assert render_prompt(request).rstrip().endswith(json.dumps(SCHEMA, separators=(",", ":")))
    assert parse(output_config={"effort": "low"}).response_format is None
    assert parse(output_config={"format": None}).response_format is None


def test_what_has_no_effect() -> None:
    plain = parse()
    assert plain == parse(
        temperature=2,
        top_k=1,
        top_p="x",
        metadata={"user_id": "u"},
        effort="high",
        context_management={"edits": []},
        cache_control={"type": "ephemeral"},
        betas=["x"],
        service_tier="auto",
        conversation_id="c",
        whatever=[1],
    )


def deep(depth: int) -> Any:
    return {"a": deep(depth - 1)} if depth else {}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"content": list(parts)}]}


BLOCK = "messages[0].content[0]"
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": 5}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": 1}]}, "messages[0].role"),
    ({"messages": [{"role": "user\nsystem"}]}, "messages[0].role"),
    ({"messages": [HI, {"content": {}}]}, "messages[1].content.type"),
    (content(1), BLOCK),
    (content({}), f"{BLOCK}.type"),
    (content({"type": 1}), f"{BLOCK}.type"),
    (content({"type": "hologram"}), f"{BLOCK}.type"),
    (content({"type": "image_url", "image_url": {}}), f"{BLOCK}.image_url.url"),
    (content({"type": "text", "text": 1}), f"{BLOCK}.text"),
    (content({"type": "image"}), f"{BLOCK}.url"),
    (content({"type": "image", "source": "x"}), f"{BLOCK}.source"),
    (content({"type": "image", "source": {"type": "base64"}}), f"{BLOCK}.source.url"),
    (content({"type": "image", "source": {"type": "base64", "data": 1}}), f"{BLOCK}.source.data"),
    (
        content({"type": "image", "source": {"type": "base64", "data": "x", "media_type": 1}}),
        f"{BLOCK}.source.media_type",
    ),
    (content({"type": "image", "source": {"type": "url"}}), f"{BLOCK}.source.url"),
    (content({"type": "image", "source": {"type": "url", "url": "data:x"}}), f"{BLOCK}.source.url"),
    (content({"type": "document", "title": 1, "source": {}}), f"{BLOCK}.title"),
    (content({"type": "document", "source": {"type": "text", "data": 1}}), f"{BLOCK}.source.data"),
    (content({"type": "tool_use", "id": 1}), f"{BLOCK}.id"),
    (content({"type": "tool_result", "tool_use_id": 1}), f"{BLOCK}.tool_use_id"),
    (content({"type": "tool_result", "is_error": 1}), f"{BLOCK}.is_error"),
    (content({"type": "tool_result", "content": [{"type": "text", "text": 1}]}), f"{BLOCK}.content[0].text"),
    (content(*[{"type": "image", "source": {"type": "url", "url": f"https://h/{n}"}} for n in range(21)]), "messages"),
    ({"system": 1}, "system"),
    ({"system": [1]}, "system[0]"),
    ({"model": 1}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"stop_sequences": ["a", 5]}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"tools": {}}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{}]}, "tools[0].name"),
    ({"tools": [{"name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"name": "<tool_call>"}]}, "tools[0].name"),
    ({"tools": [{"name": "a", "type": 1}]}, "tools[0].type"),
    ({"tools": [{"name": "a", "description": 1}]}, "tools[0].description"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": 1}}, "tool_choice"),
    ({"output_config": "x"}, "output_config"),
    ({"output_config": {"format": "json"}}, "output_config.format"),
]


@pytest.mark.parametrize("number", range(len(BAD_FIELDS)))
def test_a_wrong_field_is_named(number: int) -> None:
    fields, param = BAD_FIELDS[number]
    with pytest.raises(ProxyError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", param)
    assert caught.value.detail.startswith(param)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":NaN}'])
def test_a_body_that_is_no_json_object_is_told_so(body: bytes) -> None:
    with pytest.raises(ProxyError) as caught:
        parse_messages_request(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("depth", [50, 200, 400, 600, 800, 900, 940, 960, 980, 990, 2000])
def test_no_depth_of_what_a_program_sends_is_more_than_an_error(depth: int) -> None:
    nested = '{"a":' * depth + "{}" + "}" * depth
    results = '{"type":"tool_result","content":[' * (depth // 2) + "]}" * (depth // 2)
    for head, middle, tail in (
        ('{"messages":[{"content":[{"type":"tool_use","name":"f","input":', nested, "}]}]}"),
        ('{"messages":[{"content":"x"}],"tools":[{"name":"f","input_schema":', nested, "}]}"),
        ('{"messages":[{"content":[', results, "]}]}"),
    ):
        body = head + middle + tail
        try:
            assert render_prompt(parse_messages_request(body.encode()))
        except ProxyError as error:
            assert error.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["text", "user", "tool_use", "base64", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "model",
                    "system",
                    "tools",
                    "tool_choice",
                    "name",
                    "source",
                    "input",
                ]
            ),
            inner,
        )
    ),
    max_leaves=20,
)


@given(JSON, JSON, JSON)
def test_any_json_is_a_request_or_a_clear_refusal(message: object, fields: object, block: object) -> None:
    value = {**(fields if isinstance(fields, dict) else {}), "messages": [message, {"content": [block]}]}
    try:
        request = parse_messages_request(json.dumps(value).encode())
    except ProxyError as error:
        assert error.status == 400 and error.param
    else:
        assert merge(request.messages)


def make_agents_body() -> dict[str, Any]:
    """A body in the shape that Claude Code 2.1.197 sends for a task."""
    tools = [
        {
            "name": f"Tool{number}",
            "description": "Reads a file.\n" * 20,
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"file_path": {"description": "The absolute path", "type": "string"}},
                "required": ["file_path"],
                "additionalProperties": False,
            },
        }
        for number in range(25)
    ]
    ephemeral = {"type": "ephemeral"}
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    return {
        "model": "claude-opus-4-8",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nToday is …\n</system-reminder>"},
                    {"type": "text", "text": "Read a.txt", "cache_control": ephemeral},
                ],
            },
            {"role": "system", "content": "The directory is /tmp/x."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I read it.", "signature": "a2ltaV9wcm94eQ=="},
                    {"type": "text", "text": "I read the file."},
                    {"type": "tool_use", "id": "toolu_1", "name": "Tool3", "input": {"file_path": "/tmp/x/a.txt"}},
                    {"type": "tool_use", "id": "toolu_2", "name": "Tool4", "input": {"file_path": "/tmp/x/a.png"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "tool_use_id": "toolu_1",
                        "type": "tool_result",
                        "content": "<error>none</error>",
                        "is_error": True,
                    },
                    {
                        "tool_use_id": "toolu_2",
                        "type": "tool_result",
                        "content": [picture],
                        "cache_control": ephemeral,
                    },
                ],
            },
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197"},
            {"type": "text", "text": "You are Claude Code.", "cache_control": ephemeral},
            {"type": "text", "text": "Be short. See https://docs.example.com/a", "cache_control": ephemeral},
        ],
        "tools": tools,
        "metadata": {"user_id": "user_1"},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }


def test_claude_codes_task_is_understood() -> None:
    request = parse_messages_request(json.dumps(make_agents_body()).encode())
    assert (len(request.tools), request.max_tokens, request.stream, request.use_search) == (25, 32000, True, None)
    assert (request.left_out, request.tool_choice, request.response_format) == ((), ToolChoice(), None)
    assert [message.role for message in request.messages] == ["user", "system", "assistant", "tool", "tool"]
    assert request.messages[0].text == "<system-reminder>\nToday is …\n</system-reminder>\nRead a.txt"
    assert request.messages[3].text == "Error: <error>none</error>"
    assert [one.kind for one in request.attachments] == ["image"]
    prompt = render_prompt(request)
    assert "<url" not in prompt and "I read it." not in prompt and "ephemeral" not in prompt
    assert prompt.count('"name":"Tool') == 29


def test_claude_codes_search_and_its_title_are_understood() -> None:
    search = parse(tools=[SEARCH], tool_choice={"type": "tool", "name": "web_search"}, stream=True)
    assert (search.use_search, search.tools, search.tool_choice) == (True, (), ToolChoice())
    title = parse(tools=[], output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}})
    assert (title.tools, title.response_format) == ((), ResponseFormat("json_schema", SCHEMA))


# Replies


def make_encoder(*, stream: bool, sources: str = "text", **fields: Any) -> Encoder:
    request = parse(**{"stream": stream, "model": "m", **fields})
    return APIS["/v1/messages"].make_encoder(request, created=7, sources=sources, prompt=render_prompt(request))


def read_stream(encoder: Encoder, events: list[Event]) -> list[Any]:
    """The events of a streamed answer; each says its type twice."""
    data = encoder.feed(events) + encoder.finish()
    values = [json.loads(frame) for frame in SSEParser().feed(data)]
    assert re.findall("^event: (.*)$", data.decode(), re.MULTILINE) == [value["type"] for value in values]
    return values


def assemble(values: list[Any]) -> Any:
    """The message that a client builds from its events; every rule of their order is checked."""
    start, *inner, delta, stop = values
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 1
    opened: dict[str, Any] | None = None
    arguments = ""
    for value in inner:
        if value["type"] == "content_block_start":
            assert opened is None and value["index"] == len(message["content"])
            opened, arguments = value["content_block"], ""
            message["content"].append(opened)
            continue
        assert opened is not None and value["index"] == len(message["content"]) - 1
        if value["type"] == "content_block_stop":
            if opened["type"] == "tool_use":
                opened["input"] = json.loads(arguments)
            opened = None
            continue
        match value["delta"]:
            case {"type": "text_delta", "text": text}:
                opened["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                assert opened["signature"] == ""
                opened["thinking"] += text
            case {"type": "signature_delta", "signature": text}:
                opened["signature"] += text
            case {"type": "input_json_delta", "partial_json": text}:
                assert opened["input"] == {}
                arguments += text
            case other:
                raise AssertionError(other)
    assert opened is None
    message.update(delta["delta"])
    message["usage"].update(delta["usage"])
    return message


def both(*events: Event, opened: Event | None = None, **fields: Any) -> Any:
    """The message of an answer, streamed and whole, which are the same."""
    shown = [opened or Opened("c1", hits_inline=False), *events]
    streamed = assemble(read_stream(make_encoder(stream=True, **fields), shown))
    encoder = make_encoder(stream=False, **fields)
    assert encoder.feed(shown) == b""
    whole = json.loads(encoder.finish())
    assert whole == streamed
    return whole


def test_a_streams_events_to_the_letter() -> None:
    events: list[Event] = [Opened("c1", hits_inline=True), Text("a"), Text("b\n"), Finished("stop")]
    usage = {
        "input_tokens": 3,
        "output_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    assert read_stream(make_encoder(stream=True), events) == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_c1",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "b\n"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 1},
        },
        {"type": "message_stop"},
    ]


def test_a_whole_message_to_the_letter() -> None:
    assert both(Text("a"), Text("b\n"), Finished("stop")) == {
        "id": "msg_c1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "ab\n"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 3,
            "output_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }


HIT = SearchHit("T", "https://ab.cd")
OTHER = SearchHit("A [x]", "https://aa.cd/(1)")
CALL = ToolCall("call_1", "f", '{"a":"你\\n"}')
TEXT = ["content_block_start", "content_block_delta", "content_block_stop"]
ORDERS: dict[str, tuple[list[Event], list[str], list[str]]] = {
    "text": ([Text("a")], TEXT, ["text"]),
    "thinking": (
        [Thinking("a"), Thinking("b"), Text("c")],
        ["content_block_start", *["content_block_delta"] * 3, "content_block_stop", *TEXT],
        ["thinking", "text"],
    ),
    "call": ([CALL], TEXT, ["tool_use"]),
    "calls after text": ([Text("a"), CALL, CALL], [*TEXT, *TEXT, *TEXT], ["text", "tool_use", "tool_use"]),
    "text after a call": ([CALL, Text("a")], [*TEXT, *TEXT], ["tool_use", "text"]),
    "thinking and a call": (
        [Thinking("a"), CALL],
        ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop", *TEXT],
        ["thinking", "tool_use"],
    ),
    "a citation": (
        [Text("a"), Citation(1, HIT), Text("b"), Sources((HIT,))],
        ["content_block_start", *["content_block_delta"] * 3, "content_block_stop", *TEXT],
        ["text", "text"],
    ),
    "nothing": ([], ["content_block_start", "content_block_stop"], ["text"]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_blocks_follow_each_other(name: str) -> None:
    events, types, kinds = ORDERS[name]
    shown = [Opened("c1", hits_inline=False), *events, Finished("stop")]
    values = read_stream(make_encoder(stream=True), shown)
    assert [value["type"] for value in values] == ["message_start", *types, "message_delta", "message_stop"]
    assert [block["type"] for block in both(*events, Finished("stop"))["content"]] == kinds


def test_thinking_has_a_signature() -> None:
    thinking, text = both(Thinking("hm "), Thinking("so"), Text("a"), Finished("stop"))["content"]
    assert (thinking["thinking"], text["text"]) == ("hm so", "a")
    assert thinking["signature"]
    assert blocks(thinking, text, role="assistant") == (Message("assistant", "a"),)


def test_a_call_has_its_arguments_in_one_delta() -> None:
    (block,) = both(CALL, Finished("tool_calls"))["content"]
    assert block == {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": "你\n"}}
    values = read_stream(make_encoder(stream=True), [Opened("c1", hits_inline=False), CALL, Finished("tool_calls")])
    assert values[1]["content_block"]["input"] == {}
    assert values[2]["delta"] == {"type": "input_json_delta", "partial_json": CALL.arguments}


@pytest.mark.parametrize(
    ("event", "reason", "sequence"),
    [
        (Finished("stop"), "end_turn", None),
        (Finished("length"), "max_tokens", None),
        (Finished("stop", "END"), "stop_sequence", "END"),
        (Finished("tool_calls"), "tool_use", None),
        (Finished("content_filter"), "refusal", None),
    ],
)
def test_every_end_has_its_reason(event: Finished, reason: str, sequence: str | None) -> None:
    message = both(Text("a"), event)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


LIST = "\n\n搜索结果来自：\n"


def texts(message: Any) -> list[str]:
    return [block["text"] for block in message["content"]]


def test_sources_are_one_last_block() -> None:
    message = both(Text("甲"), Citation(1, OTHER), Text("乙"), Sources((OTHER, HIT)), Finished("stop"))
    lines = "1. [A \\[x\\]](https://aa.cd/%281%29)\n2. [T](https://ab.cd)"
    assert texts(message) == ["甲[1]乙", LIST + lines]


def test_inline_hits_are_collected_there_too() -> None:
    message = both(HIT, Text("a"), HIT, Text("b"), Finished("stop"), opened=Opened("c1", hits_inline=True))
    assert texts(message) == ["ab", f"{LIST}T(https://ab.cd)\nT(https://ab.cd)\n"]


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": "none"},
        {"sources": "annotations"},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        {"tools": [FUNCTION]},
    ],
)
@pytest.mark.parametrize("inline", [True, False])
def test_no_mark_refers_to_sources_that_are_not_shown(inline: bool, fields: dict[str, Any]) -> None:
    events: list[Event] = [HIT, Text("a"), Finished("stop")]
    if not inline:
        events = [Text("a"), Citation(1, HIT), Sources((HIT,)), Finished("stop")]
    assert texts(both(*events, opened=Opened("c1", hits_inline=inline), **fields)) == ["a"]


def test_a_silent_model_lists_no_sources() -> None:
    assert texts(both(Text("a"), Sources((HIT,)), Finished("stop"), model="kimi-search-silent")) == ["a"]


def test_a_moderated_answer_says_so_before_its_sources() -> None:
    assert texts(both(Text("a"), Sources((HIT,)), Finished("content_filter"))) == [
        "a" + MODERATED_SENTENCE,
        f"{LIST}1. [T](https://ab.cd)",
    ]
    assert texts(both(Finished("content_filter"))) == [MODERATED_SENTENCE.lstrip()]
    form = {"format": {"type": "json_schema", "schema": {}}}
    assert texts(both(Text("{"), Finished("content_filter"), output_config=form)) == ["{"]


def test_an_answer_without_any_block_has_an_empty_text() -> None:
    message = both(Finished("length"))
    assert (texts(message), message["stop_reason"]) == ([""], "max_tokens")


def test_nothing_is_sent_before_the_service_answers_and_the_start_only_once() -> None:
    for first in (Text("a"), Thinking("a"), CALL, Finished("stop")):
        encoder = make_encoder(stream=True)
        assert encoder.feed([Opened("c1", hits_inline=False)]) == b""
        assert encoder.feed([SearchHit("T", "https://ab.cd")]) == b""
        data = encoder.feed([first])
        assert data.startswith(b"event: message_start\ndata: {") and data.count(b"message_start") == 2
        assert b"message_start" not in encoder.feed([Text("b")])


def test_silence_is_filled_with_a_ping_in_a_stream_alone() -> None:
    assert make_encoder(stream=True).keep_alive == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert make_encoder(stream=False).keep_alive == b""


def test_a_failure_is_an_error_event_and_no_end() -> None:
    error = ProxyError("answer_broken", "x")
    data = make_encoder(stream=True).fail(error)
    (frame,) = SSEParser().feed(data)
    assert data.startswith(b"event: error\n")
    assert json.loads(frame) == render_messages_error(error)


STATUSES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


@pytest.mark.parametrize("code", FAILURES)
def test_errors_have_anthropics_form(code: str) -> None:
    error = ProxyError(code, "why")
    kind = STATUSES.get(FAILURES[code].status, "api_error")
    assert render_messages_error(error) == {"type": "error", "error": {"type": kind, "message": error.message}}


def test_the_request_chooses_the_form() -> None:
    assert (make_encoder(stream=True).content_type, make_encoder(stream=False).content_type) == (
        "text/event-stream",
        "application/json",
    )


@pytest.mark.parametrize("model", ['q"uote', "新模型", "a\nb"])
def test_any_model_name_is_repeated_safely(model: str) -> None:
    message = both(Text("a"), Finished("stop", 'x"\ny'), opened=Opened('c"1', hits_inline=True), model=model)
    assert (message["model"], message["id"], message["stop_sequence"]) == (model, 'msg_c"1', 'x"\ny')


def test_a_very_long_text_is_several_lines_that_every_client_takes() -> None:
    text = "你" * 100_000
    data = make_encoder(stream=True).feed([Opened("c1", hits_inline=True), Text(text)])
    assert max(map(len, data.split(b"\n"))) < 64_000
    assert texts(both(Text(text), Finished("stop"))) == [text]


def test_the_count_is_the_starts() -> None:
    body = json.dumps(make_agents_body()).encode()
    request = parse_messages_request(body)
    encoder = APIS["/v1/messages"].make_encoder(request, created=7, sources="text", prompt=render_prompt(request))
    values = read_stream(encoder, [Opened("c1", hits_inline=True), Text("a"), Finished("stop")])
    assert values[0]["message"]["usage"]["input_tokens"] == estimate_tokens(render_prompt(request))
    without = parse_messages_request(json.dumps({**make_agents_body(), "tools": []}).encode())
    assert estimate_tokens(render_prompt(request)) > estimate_tokens(render_prompt(without)) + 25 * 50


def test_usage_counts_thinking_and_calls() -> None:
    plain = both(Text("答案"), Finished("stop"))["usage"]["output_tokens"]
    assert both(Thinking("想想"), Text("答案"), Finished("stop"))["usage"]["output_tokens"] == plain + 2
    assert both(CALL, Finished("tool_calls"))["usage"]["output_tokens"] > 5
    assert both(Text("答案"), Sources((HIT,)), Finished("content_filter"))["usage"]["output_tokens"] == plain


def test_chunks_are_what_the_client_was_shown() -> None:
    for stream in (True, False):
        encoder = make_encoder(stream=stream)
        encoder.feed([Opened("c1", hits_inline=False), Thinking("a"), Text("b"), CALL, Finished("stop")])
        assert encoder.chunks == 3


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
HITS = st.builds(SearchHit, WORDS, WORDS)
PIECES = (
    st.builds(Text, WORDS)
    | st.builds(Thinking, WORDS)
    | HITS
    | st.builds(Citation, st.integers(1, 9), HITS)
    | st.builds(ToolCall, WORDS, WORDS, st.dictionaries(WORDS, WORDS, max_size=2).map(json.dumps))
)
REASONS: list[FinishReason] = ["stop", "length", "content_filter", "tool_calls"]


@given(
    st.booleans(),
    st.lists(PIECES, max_size=12),
    st.lists(HITS, max_size=3),
    st.builds(Finished, st.sampled_from(REASONS), st.just("") | WORDS),
    st.sampled_from(["text", "annotations", "none"]),
)
def test_streamed_and_whole_are_the_same_message(
    inline: bool, pieces: list[Event], hits: list[SearchHit], end: Finished, sources: str
) -> None:
    listed = [Sources(tuple(hits))] if hits and not inline else []
    message = both(*pieces, *listed, end, opened=Opened("c1", hits_inline=inline), sources=sources)
    written = [event.text for event in pieces if type(event) is Text]
    assert "".join(written) in "".join(block.get("text", "") for block in message["content"]) or any(
        isinstance(event, Citation) for event in pieces
    )
    thought = "".join(event.text for event in pieces if isinstance(event, Thinking))
    assert "".join(block.get("thinking", "") for block in message["content"]) == thought
    calls = [json.loads(event.arguments) for event in pieces if isinstance(event, ToolCall)]
    assert [block["input"] for block in message["content"] if block["type"] == "tool_use"] == calls
    kinds = [block["type"] for block in message["content"]]
    last = message["content"][-1]
    both_texts = pairwise(kinds if not last.get("text", "").startswith(LIST) else kinds[:-1])
    assert all(one == "tool_use" or one != other for one, other in both_texts)


def test_an_answer_through_the_filters_of_its_request() -> None:
    fields: dict[str, Any] = {"tools": [FUNCTION], "stop_sequences": ["END"], "max_tokens": 99}
    chain = make_chain(parse(**fields), lambda: "call_1")
    events: list[Event] = [Opened("c1", hits_inline=True), Text("See. <tool_"), Text('call>{"name": "get_weather", ')]
    events += [Text('"arguments": {"q": 1}}</tool_call>'), Finished("stop")]
    message = assemble(read_stream(make_encoder(stream=True, **fields), chain.feed(events)))
    assert message["stop_reason"] == "tool_use"
    assert message["content"] == [
        {"type": "text", "text": "See."},
        {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"q": 1}},
    ]
    again = parse({"role": "assistant", "content": message["content"]})
    assert merge(again.messages).startswith("assistant:See.\n<tool_call>\n")


def test_stop_sequences_are_bounded_and_foreign_tools_are_named_by_words_alone() -> None:
    body: dict[str, Any] = {"messages": [{"content": "x"}], "stop_sequences": ["a" * 1001]}
    with pytest.raises(ProxyError) as caught:
        parse_messages_request(json.dumps(body).encode())
    assert caught.value.param == "stop_sequences"
    tools = [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "custom2", "name": "a secret of a person\nin two lines"},
        {"type": "of two words", "name": "a secret"},
    ]
    request = parse_messages_request(json.dumps({"messages": [{"content": "x"}], "tools": tools}).encode())
    assert request.use_search is True and request.left_out == ("custom2", "(other)")
