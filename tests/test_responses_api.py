"""Sections 10 and 11 for the Responses API and the older completions: what comes in, and what goes out."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any, cast

import httpx2
import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.completion import Completion
from openai.types.responses import Response, ResponseStreamEvent

from kimi_proxy import (
    APIS,
    FAILURES,
    MODERATED_SENTENCE,
    Attachment,
    Citation,
    Encoder,
    Event,
    Finished,
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
    add_messages,
    answer_message,
    parse_completion_request,
    parse_responses_request,
    render_prompt,
    render_tool_call,
    render_tool_response,
)

EVENTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


def parse(**fields: Any) -> Any:
    return parse_responses_request(json.dumps({"input": "hi", **fields}).encode())


def messages(*items: Any, **fields: Any) -> tuple[Message, ...]:
    return tuple(parse(input=list(items), **fields).messages)


# Requests


def test_defaults() -> None:
    request = parse()
    assert (request.model, request.stream, request.include_usage, request.use_search) == ("kimi", False, None, None)
    assert request.messages == (Message("user", "hi"),)
    assert (request.tools, request.tool_choice, request.parallel_tool_calls, request.left_out) == (
        (),
        ToolChoice(),
        True,
        (),
    )
    assert (request.response_format, request.max_tokens, request.stop, request.conversation_id) == (None, None, (), "")
    assert (request.previous_response_id, request.store) == ("", True)


def test_every_field_with_an_effect() -> None:
    request = parse(
        model="kimi-search",
        stream=True,
        store=False,
        previous_response_id="resp_1",
        parallel_tool_calls=False,
        max_output_tokens=7,
    )
    assert (request.model, request.stream, request.use_search) == ("kimi-search", True, True)
    assert (request.parallel_tool_calls, request.max_tokens) == (False, 7)
    assert (request.previous_response_id, request.store) == ("resp_1", False)


def test_fields_that_cannot_be_honoured_are_accepted() -> None:
    names = ("reasoning", "include", "metadata", "temperature", "top_p", "user", "whatever")
    assert parse(**{name: [{}] for name in names}) == parse()


def test_instructions_are_the_first_message_and_no_own_one() -> None:
    request = parse(instructions="Be brief.")
    assert render_prompt(request) == "system:Be brief.\nuser:hi\n"
    assert request.messages == (Message("user", "hi"),)


CONTENTS: dict[str, tuple[Any, str]] = {
    "string": ("a b", "a b"),
    "null": (None, ""),
    "input_text": ([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
    "output_text": ([{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}], "a"),
    "text": ([{"type": "text", "text": "a"}], "a"),
    "refusal": ([{"type": "refusal", "refusal": "No."}], "No."),
    "bare strings": (["a", "b"], "a\nb"),
    "no parts": ([], ""),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("role", ["developer", "system", "user", "assistant"])
def test_messages_with_and_without_a_type(role: str, name: str) -> None:
    content, text = CONTENTS[name]
    item = {"role": role, "content": content}
    assert messages(item) == messages({"type": "message", "id": "msg_1", **item}) == (Message(role, text),)


PARTS: dict[str, tuple[dict[str, Any], Attachment]] = {
    "image": (
        {"type": "input_image", "image_url": "https://h/x", "detail": "auto", "file_id": None},
        Attachment("image", "input[0].content[0].image_url", url="https://h/x"),
    ),
    "inline image": (
        {"type": "input_image", "image_url": "data:image/png;base64,QUJD"},
        Attachment(
            "image",
            "input[0].content[0].image_url",
            data="data:image/png;base64,QUJD",
            start=22,
            content_type="image/png",
        ),
    ),
    "file by url": (
        {"type": "input_file", "file_url": "https://h/x", "filename": "a.pdf"},
        Attachment("file", "input[0].content[0].file_url", url="https://h/x", name="a.pdf"),
    ),
    "inline file": (
        {"type": "input_file", "file_data": "data:text/plain;base64,QUJD", "filename": "a.txt"},
        Attachment(
            "file",
            "input[0].content[0].file_data",
            data="data:text/plain;base64,QUJD",
            start=23,
            name="a.txt",
            content_type="text/plain",
        ),
    ),
    "bare base64": (
        {"type": "input_file", "file_data": "QUJD", "filename": "a.txt"},
        Attachment("file", "input[0].content[0].file_data", data="QUJD", name="a.txt"),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_files_and_pictures(name: str) -> None:
    part, attachment = PARTS[name]
    text = {"type": "input_text", "text": "see"}
    assert messages({"role": "user", "content": [part, text]}) == (Message("user", "see", (attachment,)),)


CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "read", "arguments": '{"path":"a"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "text of a"}
CALL_MADE = ToolCall("call_1", "read", '{"path":"a"}')


def test_calls_are_told_with_the_words_before_them_and_results_by_their_names() -> None:
    say = {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    second = {**CALL, "call_id": "call_2", "name": "list", "arguments": ""}
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert messages(say, reasoning, CALL, second, RESULT, {**RESULT, "call_id": "call_2", "output": None}, CALL) == (
        Message("assistant", "Let me see."),
        Message("assistant", "", calls=(CALL_MADE,)),
        Message("assistant", "", calls=(ToolCall("call_2", "list", "{}"),)),
        Message("tool", "text of a", tool_call_id="call_1"),
        Message("tool", "", tool_call_id="call_2"),
        Message("assistant", "", calls=(CALL_MADE,)),
    )


def test_a_picture_in_a_result_is_attached() -> None:
    output = [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": "data:image/png;base64,QQ"}]
    _, result = messages(CALL, {**RESULT, "output": output})
    assert result.text == "seen"
    assert [one.path for one in result.attachments] == ["input[1].output[1].image_url"]


def test_items_of_other_kinds_are_told_as_calls_or_by_their_text() -> None:
    items = [{"type": kind, "id": "x_1"} for kind in ("reasoning", "web_search_call", "compaction")]
    told = {"type": "new_thing", "content": [{"type": "input_text", "text": "b"}]}
    request = parse(input=[*items, told, {"role": "user", "content": "a"}])
    call = render_tool_call("web_search", "")
    assert render_prompt(request) == f"assistant:{call}\nassistant:[compaction left out]\nassistant:b\nuser:a\n"


HISTORY: list[tuple[dict[str, Any], Message]] = [
    (
        {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "*** Begin"},
        Message("assistant", "", calls=(ToolCall("1", "apply_patch", "*** Begin"),)),
    ),
    (
        {"type": "custom_tool_call_output", "call_id": "1", "output": "done"},
        Message("tool", "done", tool_call_id="1"),
    ),
    (
        {"type": "local_shell_call", "call_id": "1", "action": {"type": "exec", "command": ["ls"]}},
        Message("assistant", "", calls=(ToolCall("1", "local_shell", '{"type":"exec","command":["ls"]}'),)),
    ),
    ({"type": "local_shell_call_output", "id": "1", "output": "a"}, Message("tool", "a", tool_call_id="1")),
    (
        {"type": "shell_call", "call_id": "1", "action": {"commands": ["ls"]}},
        Message("assistant", "", calls=(ToolCall("1", "shell", '{"commands":["ls"]}'),)),
    ),
    (
        {"type": "shell_call_output", "call_id": "1", "output": [{"stdout": "a", "stderr": ""}]},
        Message("tool", '{"stdout":"a","stderr":""}', tool_call_id="1"),
    ),
    (
        {"type": "function_call_output", "call_id": "1", "output": {"a": 1}},
        Message("tool", '{"a":1}', tool_call_id="1"),
    ),
    (
        {"type": "function_call", "call_id": "1", "namespace": "agents", "name": "spawn", "arguments": {"a": 1}},
        Message("assistant", "", calls=(ToolCall("1", "agents.spawn", '{"a":1}'),)),
    ),
]


@pytest.mark.parametrize("number", range(len(HISTORY)))
def test_calls_and_results_of_every_kind_are_told_even_one_alone(number: int) -> None:
    item, message = HISTORY[number]
    assert messages(item) == (message,)


def test_a_call_of_a_server_is_told_with_its_result() -> None:
    call = {"type": "mcp_call", "id": "m", "server_label": "docs", "name": "find", "arguments": "{}", "output": "x"}
    said = Message("assistant", "", calls=(ToolCall("m", "find", "{}"),))
    assert messages(call) == (said, Message("tool", "x", tool_call_id="m"))
    assert messages({**call, "output": None}) == (said,)
    assert messages({**call, "output": None, "error": "gone"})[1].text == "Error: gone"


def test_a_conversation_of_openai_is_refused_by_its_name() -> None:
    with pytest.raises(ProxyError) as caught:
        parse(conversation="conv_1")
    assert caught.value.param == "conversation"


def test_many_calls_are_read_in_linear_time() -> None:
    calls = [{**CALL, "call_id": f"call_{number}"} for number in range(10_000)]
    assert render_prompt(parse(input=calls)).count("<tool_call>") == 10_000


FUNCTION = {
    "type": "function",
    "name": "read",
    "description": "Reads",
    "parameters": {"type": "object"},
    "strict": True,
}
NAMESPACE = {"type": "namespace", "name": "agents", "description": "", "tools": [{"type": "function", "name": "spawn"}]}


def test_functions_are_taken_and_other_kinds_named() -> None:
    others = [
        {"type": "computer_use_preview", "display_width": 1},
        {"type": "custom", "name": "apply_patch"},
        {"type": "mcp", "server_label": "docs"},
        {"type": "local_shell"},
        {"type": "local_shell"},
        {"type": "custom", "name": "a b\n"},
    ]
    request = parse(tools=[FUNCTION, NAMESPACE, *others, {"name": "bare"}, FUNCTION])
    empty = {"type": "object", "properties": {}}
    assert request.tools == (
        Tool("read", "Reads", {"type": "object"}),
        Tool("agents.spawn", "", empty, "agents"),
        Tool("bare", "", empty),
    )
    names = ("computer_use_preview", "apply_patch", "docs", "local_shell", "custom")
    assert request.left_out == names
    assert request.use_search is None


@pytest.mark.parametrize("tool", [{"type": "web_search", "external_web_access": False}, {"type": "web_search_preview"}])
def test_a_web_search_tool_asks_for_search(tool: dict[str, Any]) -> None:
    request = parse(tools=[tool, FUNCTION])
    assert (request.use_search, request.left_out, len(request.tools)) == (True, (), 1)
    assert parse(tools=[tool], use_search=False).use_search is False


ALLOWED = {"type": "allowed_tools", "tools": [{"type": "function", "name": "read"}]}
CHOICES: list[tuple[Any, ToolChoice]] = [
    (None, ToolChoice()),
    ("auto", ToolChoice()),
    ("none", ToolChoice("none")),
    ("required", ToolChoice("required")),
    ({"type": "function", "name": "read"}, ToolChoice("named", "read")),
    ({"type": "function", "name": "spawn"}, ToolChoice("named", "agents.spawn")),
    ({"type": "web_search_preview"}, ToolChoice()),
    ({"type": "custom", "name": "read"}, ToolChoice()),
    ({"type": "allowed_tools", "mode": "required", "tools": [FUNCTION]}, ToolChoice("required")),
    ({"type": "allowed_tools", "mode": "auto", "tools": [NAMESPACE, FUNCTION]}, ToolChoice()),
    ({"type": "allowed_tools", "mode": "required", "tools": [NAMESPACE]}, ToolChoice("required")),
    ({"type": "allowed_tools", "mode": "auto", "tools": []}, ToolChoice("none")),
]


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_tool_choice(number: int) -> None:
    value, choice = CHOICES[number]
    assert parse(tools=[FUNCTION, NAMESPACE], tool_choice=value).tool_choice == choice


def test_only_allowed_tools_are_offered() -> None:
    second = {**FUNCTION, "name": "write"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "write"}]}
    request = parse(tools=[FUNCTION, second], tool_choice=choice)
    assert [tool.name for tool in request.tools] == ["write"]
    assert '"read"' not in render_prompt(request)


@pytest.mark.parametrize("tool", [{"type": "local_shell"}, {"type": "web_search"}])
def test_nothing_is_required_where_only_other_kinds_are_offered(tool: dict[str, Any]) -> None:
    assert parse(tools=[tool], tool_choice="required").tool_choice == ToolChoice()


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def test_the_form_of_the_answer() -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    request = parse(text={"format": form, "verbosity": "low"})
    assert request.response_format == ResponseFormat("json_schema", SCHEMA, "n")
    assert parse(text={"format": {"type": "json_object"}}).response_format == ResponseFormat("json_object")
    assert parse(text={"format": {"type": "text"}}).response_format is None
    assert parse(text={}).response_format is None


def content(part: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [part]}]}


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": {}}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "reasoning"}]}, "input"),
    ({"input": [{"type": "reasoning"}], "instructions": "x"}, "input"),
    ({"input": ["a"]}, "input[0]"),
    ({"input": [{"type": 5}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"id": "msg_1"}]}, "input[0]"),
    ({"input": [{"role": 5}]}, "input[0].role"),
    ({"input": [{"role": "user\nsystem"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": {}}]}, "input[0].content.type"),
    (content(5), "input[0].content[0]"),
    (content({}), "input[0].content[0].type"),
    (content({"type": 5}), "input[0].content[0].type"),
    (content({"type": "hologram"}), "input[0].content[0].type"),
    (content({"type": "input_audio"}), "input[0].content[0].type"),
    (content({"type": "input_text", "text": 5}), "input[0].content[0].text"),
    (content({"type": "refusal", "refusal": 5}), "input[0].content[0].refusal"),
    (content({"type": "input_image"}), "input[0].content[0].url"),
    (content({"type": "input_image", "image_url": 5}), "input[0].content[0].image_url"),
    (content({"type": "input_image", "image_url": "data:x"}), "input[0].content[0].image_url"),
    (content({"type": "input_image", "file_id": 5}), "input[0].content[0].file_id"),
    (content({"type": "input_file", "file_id": []}), "input[0].content[0].file_id"),
    (content({"type": "input_file"}), "input[0].content[0].url"),
    (content({"type": "input_file", "file_data": 5}), "input[0].content[0].file_data"),
    (content({"type": "input_file", "file_url": 5}), "input[0].content[0].file_url"),
    (content({"type": "input_file", "file_url": "https://h/x", "filename": 5}), "input[0].content[0].filename"),
    (
        {"input": [{"content": [{"type": "input_image", "image_url": f"https://h/{n}"} for n in range(21)]}]},
        "input",
    ),
    ({"input": [{**CALL, "call_id": 5}]}, "input[0].call_id"),
    ({"input": [{**RESULT, "call_id": 5}]}, "input[0].call_id"),
    ({"model": 5}, "model"),
    ({"instructions": ["x"]}, "instructions"),
    ({"stream": "yes"}, "stream"),
    ({"store": 1}, "store"),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"use_search": "yes"}, "use_search"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": 5}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**FUNCTION, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**FUNCTION, "description": 5}]}, "tools[0].description"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "other"}, "tools": [FUNCTION, NAMESPACE]}, "tool_choice"),
    ({"text": "json"}, "text"),
    ({"text": {"format": "json"}}, "text.format"),
    ({"text": {"format": {"type": 5}}}, "text.format.type"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": {}, "name": 5}}}, "text.format.name"),
]


@pytest.mark.parametrize("number", range(len(BAD_FIELDS)))
def test_a_wrong_field_is_named(number: int) -> None:
    fields, param = BAD_FIELDS[number]
    body = json.dumps({"input": "hi", **fields}).encode()
    with pytest.raises(ProxyError) as caught:
        parse_responses_request(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", param)
    assert caught.value.detail.startswith(param)


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_told_so(body: bytes) -> None:
    for read in (parse_responses_request, parse_completion_request):
        with pytest.raises(ProxyError) as caught:
            cast(Any, read)(body)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


WORDS = [
    "input",
    "type",
    "role",
    "content",
    "text",
    "tools",
    "name",
    "call_id",
    "output",
    "format",
    "tool_choice",
    "id",
]
KINDS = [
    "message",
    "function_call",
    "function_call_output",
    "input_image",
    "function",
    "namespace",
    "user",
    "data:",
    "",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(KINDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=20,
)


@given(JSON, JSON, JSON)
def test_any_json_is_a_request_or_a_clear_refusal(value: object, tools: object, choice: object) -> None:
    body = {"input": value, "tools": tools, "tool_choice": choice}
    try:
        request = parse_responses_request(json.dumps(body).encode())
    except ProxyError as error:
        assert error.status == 400
    else:
        assert render_prompt(request)


def test_reprs_show_no_content() -> None:
    request = parse(input="secret words", instructions="secret rules", metadata={"a": "secret"})
    assert "secret" not in repr(request)


# As Codex CLI 0.169.0 was seen to ask: no instructions, no previous_response_id, the history with our own item ids.
CODEX: dict[str, Any] = {
    "model": "kimi",
    "stream": True,
    "store": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "client_metadata": {"x-codex-installation-id": "0"},
    "tools": [
        {**FUNCTION, "name": "exec_command", "strict": False},
        {**FUNCTION, "name": "view_image", "strict": False},
        NAMESPACE,
        {"type": "web_search", "external_web_access": False},
    ],
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You are Codex."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read a."}]},
        {"type": "reasoning", "id": "rs_1_0", "summary": [], "encrypted_content": None},
        {
            "type": "message",
            "id": "msg_1_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
        },
        {**CALL, "id": "fc_1_2", "name": "exec_command"},
        RESULT,
        {**CALL, "call_id": "call_2", "name": "view_image", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_image", "image_url": "data:image/png;base64,QUJD"}],
        },
    ],
}


def test_a_request_of_codex() -> None:
    request = parse(**CODEX)
    assert [message.role for message in request.messages] == [
        "developer",
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert [tool.name for tool in request.tools] == ["exec_command", "view_image", "agents.spawn"]
    assert (request.use_search, request.left_out, request.stream) == (True, (), True)
    assert (request.store, request.previous_response_id) == (False, "")
    assert len(request.attachments) == 1
    prompt = render_prompt(request)
    call = render_tool_call("exec_command", '{"path":"a"}')
    assert f"assistant:I look.\nassistant:{call}\ntool:{render_tool_response('exec_command', 'text of a')}\n" in prompt


# A next turn


def test_a_next_turn_stands_behind_the_turns_before_it_and_its_own_instructions() -> None:
    first = parse(instructions="old rules")
    second = parse(instructions="new rules", input="more", previous_response_id="resp_1")
    request = add_messages(second, [*first.messages, Message("assistant", "hello")], "input")
    assert render_prompt(request) == "system:new rules\nuser:hi\nassistant:hello\nuser:more\n"
    assert len(request.messages) == 3 and request.model == second.model
    assert add_messages(second, [], "input") == second


def test_a_result_gets_the_name_of_a_call_in_the_turn_before() -> None:
    events: list[Event] = [Text("Wait."), ToolCall("call_1", "read", '{"path":"a"}'), Finished("tool_calls")]
    response = final(*events)
    request = parse(input=[RESULT], previous_response_id=response["id"])
    answer = answer_message(response)
    assert answer == Message("assistant", "Wait.", calls=(CALL_MADE,))
    prompt = render_prompt(add_messages(request, [Message("user", "hi"), answer], "input"))
    assert prompt.endswith(f"tool:{render_tool_response('read', 'text of a')}\n")
    nameless = render_prompt(add_messages(request, [Message("user", "hi")], "input"))
    assert nameless.endswith(f"tool:{render_tool_response('', 'text of a')}\n")


def test_an_answer_is_remembered_without_its_thinking() -> None:
    events: list[Event] = [Thinking("hm"), Text("a"), Thinking("so"), Text("b"), Finished("stop")]
    assert answer_message(final(*events)) == Message("assistant", "a\nb")


def test_a_previous_answer_can_be_gone_on_from_without_a_word() -> None:
    request = parse(input=[], previous_response_id="resp_1")
    assert request.messages == () and add_messages(request, [Message("user", "a")], "input").messages


def test_attachments_of_all_turns_are_counted_and_the_newest_kept() -> None:
    images = tuple(Attachment("image", "input", url=f"https://h/{number}") for number in range(20))
    request = parse(input=[{"content": [{"type": "input_image", "image_url": "https://h/new"}]}])
    before, last = add_messages(request, [Message("user", "see", images)], "input").messages
    assert (before.text, before.attachments, len(last.attachments)) == ("see\n[image left out]", images[1:], 1)


# Answers

HIT = SearchHit("T", "https://ab.cd")
OPENED = Opened("c1", hits_inline=False)
INLINE = Opened("c1", hits_inline=True)


API = APIS["/v1/responses"]


def make(stream: bool = True, sources: str = "text", **fields: Any) -> Encoder:
    request = parse(stream=stream, **fields)
    return API.make_encoder(request, created=7, sources=sources, prompt="你好", response_id="resp_ab")


def read_stream(data: bytes) -> list[Any]:
    """The events in `data`, each as a real client's model takes it; their numbers and names are checked."""
    values = [json.loads(frame) for frame in SSEParser().feed(data)]
    assert re.findall("^event: (.*)$", data.decode(), re.MULTILINE) == [value["type"] for value in values]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    for value in values:
        assert EVENTS.validate_python(value).type == value["type"]
    return values


def stream(*events: Event, sources: str = "text", opened: Opened = OPENED, **fields: Any) -> list[Any]:
    encoder = make(sources=sources, **fields)
    assert encoder.response is None
    values = read_stream(encoder.feed([opened, *events]) + encoder.finish())
    assert values[-1]["response"] == encoder.response
    return values


def whole(*events: Event, sources: str = "text", opened: Opened = OPENED, **fields: Any) -> Any:
    encoder = make(False, sources, **fields)
    assert encoder.feed([opened, *events]) == b""
    value = json.loads(encoder.finish())
    assert value == encoder.response
    Response.model_validate(value)
    return value


def final(*events: Event, **fields: Any) -> Any:
    return stream(*events, **fields)[-1]["response"]


def types(values: list[Any]) -> list[str]:
    """The events' types in short; of several deltas of one item, one."""
    names = [value["type"].removeprefix("response.") for value in values]
    return [name for name, _ in groupby(names)]


BEGIN = ["created", "in_progress"]
THOUGHT = [
    "output_item.added",
    "reasoning_summary_part.added",
    "reasoning_summary_text.delta",
    "reasoning_summary_text.done",
    "reasoning_summary_part.done",
    "output_item.done",
]
MESSAGE = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
EMPTY = [name for name in MESSAGE if name != "output_text.delta"]
ANNOTATED = [*MESSAGE[:3], "output_text.annotation.added", *MESSAGE[3:]]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
CALLS = [ToolCall("call_1", "f", '{"a":1}'), ToolCall("call_2", "g", "{}")]

ORDERS: dict[str, tuple[list[Event], list[str]]] = {
    "text": ([Text("a"), Text("b"), Finished("stop")], [*MESSAGE, "completed"]),
    "thinking and text": (
        [Thinking("a"), Thinking("b"), Text("c"), Finished("stop")],
        [*THOUGHT, *MESSAGE, "completed"],
    ),
    "thinking again": (
        [Thinking("a"), Text("b"), Thinking("c"), Text("d"), Finished("stop")],
        [*THOUGHT, *MESSAGE, *THOUGHT, *MESSAGE, "completed"],
    ),
    "thinking alone": ([Thinking("a"), Finished("stop")], [*THOUGHT, *EMPTY, "completed"]),
    "a call": ([CALLS[0], Finished("tool_calls")], [*CALLED, "completed"]),
    "text and calls": ([Text("a"), *CALLS, Finished("tool_calls")], [*MESSAGE, *CALLED, *CALLED, "completed"]),
    "thinking and a call": ([Thinking("a"), CALLS[0], Finished("tool_calls")], [*THOUGHT, *CALLED, "completed"]),
    "thinking after a call": (
        [Text("a"), CALLS[0], Thinking("b"), Finished("tool_calls")],
        [*MESSAGE, *THOUGHT, *CALLED, "completed"],
    ),
    "nothing": ([Finished("stop")], [*EMPTY, "completed"]),
    "cut short": ([Text("a"), Finished("length")], [*MESSAGE, "incomplete"]),
    "moderated": ([Text("a"), Finished("content_filter")], [*MESSAGE, "incomplete"]),
    "moderated at once": ([Finished("content_filter")], [*MESSAGE, "incomplete"]),
    "moderated after a call": ([CALLS[0], Finished("content_filter")], [*MESSAGE, *CALLED, "incomplete"]),
    "a citation": (
        [Text("a"), Citation(1, HIT), Sources((HIT,)), Finished("stop")],
        [*ANNOTATED[:4], *ANNOTATED[2:3], *ANNOTATED[4:], "completed"],
    ),
    "a hit": ([HIT, Text("a"), Sources((HIT,)), Finished("stop")], [*ANNOTATED, "completed"]),
    "a hit and a call": ([CALLS[0], Sources((HIT,)), Finished("tool_calls")], [*CALLED, "completed"]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_events_come_in_their_order(name: str) -> None:
    events, order = ORDERS[name]
    fields: dict[str, Any] = {"tools": [FUNCTION]} if any(isinstance(event, ToolCall) for event in events) else {}
    values = stream(*events, **fields)
    assert types(values) == [*BEGIN, *order]
    assert values[-1]["response"] == whole(*events, **fields)


@pytest.mark.parametrize("name", ORDERS)
def test_each_item_is_put_together_from_its_events(name: str) -> None:
    values = stream(*ORDERS[name][0])
    items: list[Any] = []
    deltas: dict[str, str] = {}
    for value in values:
        kind = value["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert value["output_index"] == len(items) and value["item"].get("status", "in_progress") == "in_progress"
            items.append(value["item"])
        elif kind.endswith(".delta"):
            assert value["item_id"] == items[-1]["id"] and value["output_index"] == len(items) - 1
            deltas[value["item_id"]] = deltas.get(value["item_id"], "") + value["delta"]
        elif kind.endswith((".text.done", "_text.done")):
            assert value["text"] == deltas.get(value["item_id"], "")
        elif kind == "function_call_arguments.done":
            assert value["arguments"] == deltas[value["item_id"]] and value["name"] == items[-1]["name"]
        elif kind == "output_item.done":
            assert value["item"]["id"] == items[-1]["id"]
            items[-1] = value["item"]
    assert values[-1]["response"]["output"] == items
    assert len({item["id"] for item in items}) == len(items)
    assert {item["id"].split("_")[0] for item in items} <= {"msg", "rs", "fc"}


def test_the_first_events_carry_the_response_as_it_is_then() -> None:
    encoder = make(instructions="Be brief.", tools=[FUNCTION, NAMESPACE], metadata={"a": "b"}, max_output_tokens=5)
    assert encoder.feed([OPENED]) == b""
    created, in_progress, *_ = read_stream(encoder.feed([Text("a")]))
    assert created["response"] == in_progress["response"]
    response = created["response"]
    known = {"id": "resp_ab", "object": "response", "created_at": 7, "model": "kimi", "status": "in_progress"}
    assert known.items() <= response.items()
    assert (response["output"], response["usage"], response["error"], response["incomplete_details"]) == (
        [],
        *[None] * 3,
    )
    assert response["tools"] == []
    echoed = {"instructions": "Be brief.", "max_output_tokens": 5, "tool_choice": "auto", "parallel_tool_calls": True}
    assert echoed.items() <= response.items()
    assert response["previous_response_id"] is None


def test_an_event_that_comes_first_waits_for_them() -> None:
    assert types(read_stream(make().feed([Text("a")])))[:3] == [*BEGIN, "output_item.added"]
    assert make().feed([HIT]) == b""


def test_an_answer_of_the_service_to_the_letter() -> None:
    response = whole(Thinking("hm"), Text("a"), Text("b"), Finished("stop"))
    part = {"type": "output_text", "text": "ab", "annotations": [], "logprobs": []}
    assert response["output"] == [
        {"id": "rs_ab_0", "type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"id": "msg_ab_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]},
    ]
    assert response["status"] == "completed" and response["incomplete_details"] is None
    assert response["usage"] == {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 4,
    }


def test_calls_carry_the_ids_by_which_they_are_answered() -> None:
    calls = final(*CALLS, Finished("tool_calls"), tools=[FUNCTION])["output"]
    assert calls == [
        {
            "id": f"fc_ab_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        for index, call in enumerate(CALLS)
    ]


def test_a_call_of_a_tool_in_a_namespace_has_both_names() -> None:
    values = stream(ToolCall("call_1", "agents.spawn", "{}"), Finished("tool_calls"), tools=[NAMESPACE])
    (item,) = values[-1]["response"]["output"]
    assert (item["namespace"], item["name"]) == ("agents", "spawn")
    names = [value.get("name") or value.get("item", {}).get("name") for value in values[2:-1]]
    assert names == ["spawn", None, "spawn", "spawn"]
    (again,) = (
        parse(input=[item, {"type": "function_call_output", "call_id": "call_1", "output": "x"}]).messages[0].calls
    )
    assert again.name == "agents.spawn"


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_incomplete_answer_says_why(finish: Any, reason: str) -> None:
    response = whole(Text("a"), Finished(finish))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    (message,) = response["output"]
    assert message["status"] == "incomplete"
    assert message["content"][0]["text"] == "a" + (MODERATED_SENTENCE if finish == "content_filter" else "")


def shown(response: Any) -> tuple[str, list[tuple[str, str]]]:
    """The last message's text, and of each annotation its title and the text that its span covers."""
    message = [item for item in response["output"] if item["type"] == "message"][-1]
    text, annotations = message["content"][0]["text"], message["content"][0]["annotations"]
    assert all(set(one) == {"type", "url", "title", "start_index", "end_index"} for one in annotations)
    return text, [(one["title"], text[one["start_index"] : one["end_index"]]) for one in annotations]


LISTED = (SearchHit("A", "https://aa.cd"), SearchHit("B", "https://bb.cd"))
CITED: list[Event] = [Text("甲"), Citation(1, LISTED[0]), Text("乙"), Sources(LISTED), Finished("stop")]


def test_sources_are_shown_as_the_setting_has_it_and_are_annotations() -> None:
    line = "2. [B](https://bb.cd)"
    listed = f"甲[1]乙\n\n搜索结果来自：\n1. [A](https://aa.cd)\n{line}"
    assert shown(final(*CITED)) == (listed, [("A", "[1]"), ("B", line)])
    assert shown(final(*CITED, sources="annotations")) == ("甲[1]乙", [("A", "[1]"), ("B", "")])
    assert shown(final(*CITED, sources="none")) == ("甲乙", [])
    assert shown(final(*CITED, model="kimi-silent"))[0] == "甲[1]乙"
    assert shown(final(*CITED, tools=[FUNCTION]))[0] == "甲[1]乙"
    assert final(*CITED, sources="annotations")["output"][0]["content"][0]["annotations"][1]["start_index"] == 5


def test_inline_hits_are_a_list_at_the_end_streamed_as_whole() -> None:
    events: list[Event] = [HIT, Text("a"), Finished("stop")]
    expected = ("a\n\n搜索结果来自：\nT(https://ab.cd)\n", [("T", "T(https://ab.cd)")])
    assert shown(final(*events, opened=INLINE)) == shown(whole(*events, opened=INLINE)) == expected


def test_annotations_count_from_the_start_of_their_own_message() -> None:
    events = [Text("before"), Thinking("hm"), *CITED]
    text, annotations = shown(final(*events, sources="annotations"))
    assert (text, annotations) == ("甲[1]乙", [("A", "[1]"), ("B", "")])


def test_sources_known_after_a_call_belong_to_the_text_before_it() -> None:
    events: list[Event] = [Text("a"), CALLS[0], Sources((HIT,)), Finished("tool_calls")]
    response = final(*events, tools=[FUNCTION])
    assert shown(response) == ("a", [("T", "")])
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]


def test_annotations_are_told_as_they_become_known() -> None:
    values = [value for value in stream(*CITED, sources="annotations") if "annotation" in value]
    assert [value["annotation_index"] for value in values] == [0, 1]
    assert [value["annotation"]["title"] for value in values] == ["A", "B"]


def test_a_form_has_no_sentence_of_moderation() -> None:
    fields = {"text": {"format": {"type": "json_object"}}}
    assert shown(final(Text("{}"), Finished("content_filter"), **fields))[0] == "{}"


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_is_the_last_event_and_keeps_its_code(code: str) -> None:
    encoder = make()
    error = ProxyError(code, "x")
    values = read_stream(encoder.feed([Text("a")]) + encoder.fail(error))
    failed = values[-1]
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == ("rate_limit_exceeded" if error.status == 429 else "server_error")
    assert failed["response"]["error"]["message"].startswith(f"{code}: {error.message}")
    assert ("try again in" in failed["response"]["error"]["message"].removeprefix(f"{code}: {error.message}")) == (
        error.status == 429
    )
    assert encoder.response is None


def test_a_failure_before_all_events_and_one_after_the_end() -> None:
    assert types(read_stream(make().fail(ProxyError("answer_broken")))) == [*BEGIN, "failed"]
    encoder = make()
    encoder.feed([Finished("stop")])
    assert encoder.fail(ProxyError("answer_broken")) == b"" and encoder.response is not None


def test_a_failure_keeps_the_items_that_were_whole() -> None:
    encoder = make()
    data = encoder.feed([Thinking("a"), Text("b")]) + encoder.fail(ProxyError("answer_broken"))
    assert [item["type"] for item in read_stream(data)[-1]["response"]["output"]] == ["reasoning"]


def test_silence_is_filled_with_a_comment_in_a_stream_alone() -> None:
    data = make().keep_alive
    assert data.startswith(b":") and list(SSEParser().feed(data)) == []
    assert make(False).keep_alive == b""


def test_the_request_chooses_the_form_and_chunks_are_counted() -> None:
    streamed, complete = make(), make(False)
    assert (streamed.content_type, complete.content_type) == ("text/event-stream", "application/json")
    for encoder in (streamed, complete):
        encoder.feed([OPENED, Text("a"), Thinking("b"), CALLS[0], Finished("tool_calls")])
        assert encoder.chunks == 3


def test_a_very_long_text_is_many_deltas() -> None:
    text = "你" * 100_000
    data = make().feed([Text(text)])
    assert max(map(len, data.split(b"\n"))) < 64_000
    deltas = [value["delta"] for value in read_stream(data) if "delta" in value]
    assert "".join(deltas) == text


def test_many_long_pieces_take_linear_time() -> None:
    encoder = make()
    for _ in range(20_000):
        encoder.feed([Text("word ")])
    encoder.feed([Finished("stop")])
    assert len(shown(encoder.response)[0]) == 100_000


@pytest.mark.parametrize("model", ['q"uote', "新模型", "a\nb", "\u2028"])
def test_any_model_name_is_repeated_safely(model: str) -> None:
    assert final(Text("a"), Finished("stop"), model=model)["model"] == (model.strip() or "kimi")


WORD = st.text(min_size=1, max_size=9).map(lambda text: text.encode("utf-8", "replace").decode())
EVENT = st.one_of(
    WORD.map(Text),
    WORD.map(Thinking),
    st.just(HIT),
    st.builds(Citation, st.integers(1, 9), st.sampled_from(LISTED)),
    st.builds(ToolCall, WORD, WORD, WORD),
)
END = st.tuples(
    st.sampled_from([(), (Sources(LISTED),)]),
    st.sampled_from(["stop", "length", "content_filter", "tool_calls"]).map(lambda reason: Finished(cast(Any, reason))),
).map(lambda pair: [*pair[0], pair[1]])


@settings(deadline=None)
@given(
    st.lists(EVENT, max_size=12),
    END,
    st.sampled_from([OPENED, INLINE]),
    st.sampled_from(["text", "annotations", "none"]),
)
def test_a_stream_ends_with_the_same_object_as_a_whole_answer(
    events: list[Event], end: list[Event], opened: Opened, sources: str
) -> None:
    streamed = final(*events, *end, opened=opened, sources=sources)
    assert streamed == whole(*events, *end, opened=opened, sources=sources)
    thoughts = [part["text"] for item in streamed["output"] if "summary" in item for part in item["summary"]]
    assert "".join(thoughts) == "".join(event.text for event in events if isinstance(event, Thinking))
    if sources == "none":
        said = "".join(event.text for event in events if type(event) is Text)
        parts = [part["text"] for item in streamed["output"] if "content" in item for part in item["content"]]
        sentence = end[-1] == Finished("content_filter")
        assert "".join(parts) == said + (MODERATED_SENTENCE if said else MODERATED_SENTENCE.lstrip()) * sentence


class Form(pydantic.BaseModel):
    """What the answer is to be, in the SDK's words."""

    a: str


@pytest.mark.parametrize("streamed", [True, False])
def test_the_sdk_puts_the_answer_together(streamed: bool) -> None:
    events: list[Event] = [OPENED, Thinking("hm"), Text('{"a":'), Text('"b"}'), CALLS[0], Finished("tool_calls")]

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked = API.parse(request.content, lambda item_id: None)
        encoder = API.make_encoder(asked, created=7, sources="text", prompt="", response_id="resp_ab")
        data = encoder.feed(events) + encoder.finish()
        return httpx2.Response(200, content=data, headers={"Content-Type": encoder.content_type})

    tools: Any = [{**FUNCTION, "name": "f"}]
    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as http,
        openai.OpenAI(api_key="x", base_url="http://proxy/v1", http_client=http) as client,
    ):
        if streamed:
            with client.responses.stream(model="kimi", input="hi", tools=tools, text_format=Form) as running:
                response = running.get_final_response()
        else:
            response = client.responses.parse(model="kimi", input="hi", tools=tools, text_format=Form)
    assert response.output_parsed == Form(a="b")
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.id == "resp_ab"


# The older completions


def parse_completion(**fields: Any) -> Any:
    return parse_completion_request(json.dumps({"prompt": "once", **fields}).encode())


def test_a_prompt_is_one_message_of_the_user() -> None:
    request = parse_completion()
    assert request.messages == (Message("user", "once"),)
    assert (request.model, request.stream, request.include_usage) == ("kimi", False, None)
    assert (request.use_search, request.max_tokens, request.stop) == (None, None, ())
    assert parse_completion(prompt=["once"]) == request
    assert parse_completion(echo=True, suffix="x", best_of=3, logprobs=5, user="u", whatever={}) == request
    full = parse_completion(
        model="kimi-search", stop=["a"], max_tokens=5, stream=True, stream_options={"include_usage": True}, n=1
    )
    assert (full.use_search, full.stop, full.max_tokens, full.stream, full.include_usage) == (
        True,
        ("a",),
        5,
        True,
        True,
    )


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": [1]}, "prompt"),
    ({"prompt": [[1, 2]]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"n": 2}, "n"),
    ({"model": 5}, "model"),
    ({"stop": 5}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": 1}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
]


@pytest.mark.parametrize("number", range(len(BAD_COMPLETIONS)))
def test_a_wrong_field_of_a_completion_is_named(number: int) -> None:
    fields, param = BAD_COMPLETIONS[number]
    with pytest.raises(ProxyError) as caught:
        parse_completion(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", param)


def make_completion(**fields: Any) -> Encoder:
    request = parse_completion(**fields)
    return APIS["/v1/completions"].make_encoder(request, created=7, sources="text", prompt="你好")


def complete(*events: Event, **fields: Any) -> Any:
    encoder = make_completion(**fields)
    assert encoder.feed([OPENED, *events]) == b"" and encoder.keep_alive == b""
    value = json.loads(encoder.finish())
    Completion.model_validate(value)
    return value


def complete_stream(*events: Event, **fields: Any) -> list[Any]:
    encoder = make_completion(stream=True, **fields)
    frames = list(SSEParser().feed(encoder.feed([OPENED, *events]) + encoder.finish()))
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


KNOWN = {"id": "c1", "object": "text_completion", "created": 7, "model": "kimi"}
USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "text": text, "finish_reason": reason}


def test_a_whole_completion() -> None:
    value = complete(Text("a"), Text("b"), Finished("length"))
    assert value == {**KNOWN, "choices": [choice("ab", "length")], "usage": USAGE}


def test_a_streamed_completion() -> None:
    events: list[Event] = [Text("a"), Text("b"), Finished("stop")]
    texts = [{**KNOWN, "choices": [choice("a", None)]}, {**KNOWN, "choices": [choice("b", None)]}]
    last = {**KNOWN, "choices": [choice("", "stop")]}
    assert complete_stream(*events) == [*texts, {**last, "usage": USAGE}]
    assert complete_stream(*events, stream_options={}) == [*texts, last]
    assert complete_stream(*events, stream_options={"include_usage": True}) == [
        *({**chunk, "usage": None} for chunk in (*texts, last)),
        {**KNOWN, "choices": [], "usage": USAGE},
    ]


def test_thinking_is_no_part_of_a_completion_and_sources_are_listed() -> None:
    events: list[Event] = [Thinking("hm"), Text("a"), Sources((HIT,)), Finished("stop")]
    text = "a\n\n搜索结果来自：\n1. [T](https://ab.cd)"
    assert complete(*events)["choices"][0]["text"] == text
    assert "".join(chunk["choices"][0]["text"] for chunk in complete_stream(*events)) == text


@given(st.lists(WORD, min_size=1), st.sampled_from([None, {}, {"include_usage": True}]))
def test_a_streamed_completion_says_what_a_whole_one_says(texts: list[str], options: Any) -> None:
    events: list[Event] = [*map(Text, texts), Finished("stop")]
    chunks = complete_stream(*events, stream_options=options)
    for chunk in chunks:
        for one in chunk["choices"]:
            Completion.model_validate({**chunk, "choices": [{**one, "finish_reason": "stop"}]})
    said = "".join(one["text"] for chunk in chunks for one in chunk["choices"])
    assert said == complete(*events)["choices"][0]["text"] == "".join(texts)


def test_a_failed_completion() -> None:
    encoder = make_completion(stream=True)
    (frame,) = SSEParser().feed(encoder.fail(ProxyError("answer_broken")))
    assert json.loads(frame)["error"]["code"] == "answer_broken"
    assert encoder.keep_alive.startswith(b":")
