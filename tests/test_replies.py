"""Section 11: events in, the client's bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    APIS,
    MODERATED_SENTENCE,
    Citation,
    ContentRenderer,
    Encoder,
    Event,
    Finished,
    Opened,
    ProxyError,
    SearchHit,
    Sources,
    SSEParser,
    Text,
    Thinking,
    ToolCall,
)

HIT = SearchHit("T", "https://ab.cd")


OPENED = Opened("c1", hits_inline=True)


def make(sources: str = "text", **fields: Any) -> Encoder:
    api = APIS["/v1/chat/completions"]
    body = json.dumps({"model": "m", "messages": [{"content": "x"}], **fields}).encode()
    request = api.parse(body, lambda item_id: None)
    return api.make_encoder(request, created=7, sources=sources, prompt="你好")


def stream(*events: Event, **fields: Any) -> list[Any]:
    encoder = make(stream=True, **fields)
    frames = list(SSEParser().feed(encoder.feed([OPENED, *events]) + encoder.finish()))
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def whole(*events: Event, **fields: Any) -> Any:
    encoder = make(**fields)
    assert encoder.feed([OPENED, *events]) == b""
    return json.loads(encoder.finish())


def contents(chunks: list[Any]) -> list[str]:
    return [
        choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"] if "content" in choice["delta"]
    ]


def test_a_stream_has_one_head_one_role_and_one_end() -> None:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert stream(Text("a"), Text("b"), Finished("stop")) == [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage},
    ]


def test_usage_as_openai_has_it_when_asked_for() -> None:
    chunks = stream(Text("a"), Finished("stop"), stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 3
    assert chunks[-1]["id"] == "c1"


def test_no_usage_when_it_is_refused() -> None:
    assert all(
        "usage" not in chunk for chunk in stream(Text("a"), Finished("stop"), stream_options={"include_usage": False})
    )


SHOWN: dict[str, tuple[list[Event], str, str]] = {
    "hits": (
        [HIT, HIT, Text("a"), Text("b"), HIT, Text("c"), Finished("stop")],
        "检索 T(https://ab.cd) ...\n检索 T(https://ab.cd) ...\n\nab检索 T(https://ab.cd) ...\n\nc",
        "abc\n\n搜索结果来自：\nT(https://ab.cd)\nT(https://ab.cd)\nT(https://ab.cd)\n",
    ),
    "moderated": (
        [Text("a"), Finished("content_filter")],
        "a\n[内容由于不合规被停止生成，我们换个话题吧]",
        "a\n[内容由于不合规被停止生成，我们换个话题吧]",
    ),
    "moderated without text": (
        [Finished("content_filter")],
        "[内容由于不合规被停止生成，我们换个话题吧]",
        "[内容由于不合规被停止生成，我们换个话题吧]",
    ),
    "moderated after hits": (
        [HIT, Text("a"), Finished("content_filter")],
        "检索 T(https://ab.cd) ...\n\na\n[内容由于不合规被停止生成，我们换个话题吧]",
        "a\n[内容由于不合规被停止生成，我们换个话题吧]\n\n搜索结果来自：\nT(https://ab.cd)\n",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_hits_and_moderation_are_worded_as_the_reference_words_them(name: str) -> None:
    events, streamed, content = SHOWN[name]
    assert "".join(contents(stream(*events))) == streamed
    assert whole(*events)["choices"][0]["message"]["content"] == content


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_text_comes_back_to_the_letter_streamed_and_whole(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    events: list[Event] = [*map(Text, texts), Finished("stop")]
    assert contents(stream(*events)) == texts
    assert whole(*events)["choices"][0]["message"]["content"] == "".join(texts)


def test_a_very_long_text_is_several_lines_that_every_client_takes() -> None:
    text = "你" * 100_000
    data = make(stream=True).feed([OPENED, Text(text)])
    assert max(map(len, data.split(b"\n"))) < 64_000
    assert "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in data.split(b"\n\n")[:-1]) == text


@pytest.mark.parametrize("model", ['q"uote', "新模型", "a\nb", "", '"usage":null,'])
def test_any_model_name_is_repeated_safely(model: str) -> None:
    chunks = stream(Text("a"), Text("b"), Finished("stop"), model=model, stream_options={"include_usage": True})
    assert {chunk["model"] for chunk in chunks} == {model.strip() or "kimi"}


def test_a_failure_has_an_error_object_and_no_end() -> None:
    error = ProxyError("answer_broken", "x")
    (frame,) = SSEParser().feed(make(stream=True).fail(error))
    value = json.loads(frame)
    assert value["choices"] == [] and value["error"]["code"] == "answer_broken" and value["code"] == -2001


def test_silence_is_filled_with_a_comment_in_a_stream_alone() -> None:
    data = make(stream=True).keep_alive
    assert data.startswith(b":") and list(SSEParser().feed(data)) == []
    assert make().keep_alive == b""


def test_the_request_chooses_the_form_and_chunks_are_counted() -> None:
    streamed, complete = make(stream=True), make()
    assert (streamed.content_type, complete.content_type) == ("text/event-stream", "application/json")
    for encoder in (streamed, complete):
        encoder.feed([OPENED, Text("a"), Thinking("b"), CALLS[0], Finished("tool_calls")])
        assert encoder.chunks == 3 and encoder.response is None


LISTED = (SearchHit("A [x]", "https://aa.cd/(1)"), SearchHit("B", "https://bb.cd"))
ANSWER: list[Event] = [
    Opened("c1", hits_inline=False),
    Text("甲"),
    Citation(1, LISTED[0]),
    Text("乙"),
    Sources(LISTED),
    Finished("stop"),
]


def annotated(sources: str, events: list[Event], *, streamed: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The content, and of each annotation its title and the text that its span covers."""
    renderer = ContentRenderer(sources, streamed=streamed)
    content = "".join(map(renderer.feed, events)) + renderer.list_sources()
    places = [annotation["url_citation"] for annotation in renderer.annotations]
    return content, [(place["title"], content[place["start_index"] : place["end_index"]]) for place in places]


@pytest.mark.parametrize("streamed", [True, False])
def test_listed_hits_are_a_numbered_list_and_annotations(streamed: bool) -> None:
    lines = "1. [A \\[x\\]](https://aa.cd/%281%29)\n2. [B](https://bb.cd)"
    content, annotations = annotated("text", ANSWER, streamed=streamed)
    assert content == f"甲[1]乙\n\n搜索结果来自：\n{lines}"
    assert annotations == [("A [x]", "[1]"), ("B", "2. [B](https://bb.cd)")]


def test_annotations_alone_stand_at_the_texts_end() -> None:
    renderer = ContentRenderer("annotations", streamed=True)
    assert "".join(map(renderer.feed, ANSWER)) + renderer.list_sources() == "甲[1]乙"
    last = renderer.annotations[-1]["url_citation"]
    assert (last["start_index"], last["end_index"], last["url"]) == (5, 5, "https://bb.cd")


def test_none_shows_no_trace_of_sources() -> None:
    assert annotated("none", ANSWER) == ("甲乙", [])


@pytest.mark.parametrize("sources", ["annotations", "none"])
def test_inline_hits_can_be_left_out_of_the_text(sources: str) -> None:
    events: list[Event] = [Opened("c1", hits_inline=True), HIT, Text("a"), Finished("stop")]
    content, annotations = annotated(sources, events)
    assert content == "a"
    assert annotations == ([("T", "")] if sources == "annotations" else [])


@pytest.mark.parametrize("streamed", [True, False])
def test_inline_hits_are_annotated_where_they_stand(streamed: bool) -> None:
    events: list[Event] = [Opened("c1", hits_inline=True), HIT, Text("a"), Finished("stop")]
    _, annotations = annotated("text", events, streamed=streamed)
    assert annotations == [("T", "检索 T(https://ab.cd) ..." if streamed else "T(https://ab.cd)")]


def test_annotations_are_on_the_message_and_on_the_last_delta() -> None:
    last = stream(*ANSWER)[-1]["choices"][0]
    assert [place["url_citation"]["url"] for place in last["delta"]["annotations"]] == [hit.url for hit in LISTED]
    assert last["finish_reason"] == "stop"
    message = whole(*ANSWER)["choices"][0]["message"]
    assert message["annotations"] == last["delta"]["annotations"]


def test_thinking_is_reasoning_content_and_no_content() -> None:
    events: list[Event] = [Thinking("hm "), Thinking("so"), Text("a"), Finished("stop")]
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(*events)]
    assert deltas == [
        {"role": "assistant", "reasoning_content": "hm "},
        {"reasoning_content": "so"},
        {"content": "a"},
        {},
    ]
    message = whole(*events)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm so", "a")


def test_a_silent_model_shows_annotations_alone() -> None:
    message = whole(*ANSWER, model="kimi-search-silent")["choices"][0]["message"]
    assert message["content"] == "甲[1]乙" and len(message["annotations"]) == 2


CALLS = [ToolCall("call_1", "f", '{"a":1}'), ToolCall("call_2", "g", "{}")]


def test_calls_of_functions_are_one_delta_each() -> None:
    chunks = stream(*CALLS, Finished("tool_calls"), stream_options={"include_usage": False})
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {
            "tool_calls": [
                {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
            ]
        },
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_whole_answer_has_its_calls_and_no_text() -> None:
    choice = whole(*CALLS, Finished("tool_calls"))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f", "g"]
    assert whole(Text("a"), CALLS[0], Finished("tool_calls"))["choices"][0]["message"]["content"] == "a"


def test_a_call_of_the_old_functions_has_the_old_form() -> None:
    fields: dict[str, Any] = {"functions": [{"name": "f", "parameters": {"type": "object"}}]}
    body = json.dumps({"messages": [{"content": "x"}], **fields}).encode()
    assert not APIS["/v1/chat/completions"].parse(body, lambda item_id: None).parallel_tool_calls  # there is one place
    call = {"name": "f", "arguments": '{"a":1}'}
    choice = whole(CALLS[0], Finished("tool_calls"), **fields)["choices"][0]
    message = {"role": "assistant", "content": None, "function_call": call}
    assert (choice["message"], choice["finish_reason"]) == (message, "function_call")
    chunks = stream(CALLS[0], Finished("tool_calls"), **fields)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [message, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "function_call"]
    assert whole(Text("a"), Finished("stop"), **fields)["choices"][0]["finish_reason"] == "stop"


def test_usage_counts_what_the_model_wrote_and_not_what_the_proxy_adds() -> None:
    plain = whole(Text("答案"), Finished("stop"))["usage"]
    assert plain["prompt_tokens"] == 2 and plain["total_tokens"] == 2 + plain["completion_tokens"]
    with_hits = whole(HIT, Text("答案"), Finished("content_filter"))["usage"]
    assert with_hits == plain
    thought = whole(Thinking("想想"), Text("答案"), Finished("stop"))["usage"]
    assert thought["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert thought["completion_tokens"] == plain["completion_tokens"] + 2
    assert whole(CALLS[0], Finished("tool_calls"))["usage"]["completion_tokens"] > 5


@pytest.mark.parametrize(
    "fields",
    [{"tools": [{"type": "function", "function": {"name": "f"}}]}, {"response_format": {"type": "json_object"}}],
)
def test_sources_of_an_answer_for_a_program_are_annotations_only(fields: dict[str, Any]) -> None:
    message = whole(HIT, Text("{}"), Finished("content_filter"), **fields)["choices"][0]["message"]
    sentence = "" if "response_format" in fields else MODERATED_SENTENCE
    assert message["content"] == "{}" + sentence and len(message["annotations"]) == 1


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("path", APIS)
def test_no_source_is_put_into_json(path: str, is_streamed: bool) -> None:
    body = json.dumps({"messages": [{"content": "x"}], "input": "x", "prompt": "x", "stream": is_streamed}).encode()
    api = APIS[path]
    for text in ("Hello", '{"title": "T"}', '```json\n{"title": "T"}\n```', ' [{"a": 1}]', "[]"):
        request = api.parse(body, lambda item_id: None)
        encoder = api.make_encoder(request, created=7, sources="text", prompt="你好", response_id="resp_1")
        events: list[Event] = [Opened("c1", hits_inline=False), *map(Text, text), Citation(1, HIT), Sources((HIT,))]
        data = (encoder.feed([*events, Finished("stop")]) + encoder.finish()).decode()
        assert ("搜索结果来自" in data, "[1]" in data) == ((text == "Hello"),) * 2, text
