"""Section 10: events in, the client's bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    ChatStreamReply,
    ChatWholeReply,
    Event,
    Finished,
    Opened,
    ProxyError,
    SearchHit,
    SSEParser,
    Text,
    make_chat_reply,
    parse_chat_request,
)

HIT = SearchHit("T", "https://ab.cd")


def stream(*events: Event, include_usage: bool | None = None) -> list[Any]:
    reply = ChatStreamReply("m", 7, include_usage)
    data = b"".join(reply.feed(event) for event in (Opened("c1"), *events)) + reply.finish()
    frames = [frame.data for frame in SSEParser().feed(data)]
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def whole(*events: Event) -> Any:
    reply = ChatWholeReply("m", 7)
    assert [reply.feed(event) for event in (Opened("c1"), *events)] == [b""] * (len(events) + 1)
    return json.loads(reply.finish())


def contents(chunks: list[Any]) -> list[str]:
    return [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["delta"]]


def test_a_stream_has_one_head_one_role_and_one_end() -> None:
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert stream(Text("a"), Text("b"), Finished("stop")) == [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage},
    ]


def test_usage_as_openai_has_it_when_asked_for() -> None:
    chunks = stream(Text("a"), Finished("stop"), include_usage=True)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 0
    assert chunks[-1]["id"] == "c1"


def test_no_usage_when_it_is_refused() -> None:
    assert all("usage" not in chunk for chunk in stream(Text("a"), Finished("stop"), include_usage=False))


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
    reply = ChatStreamReply("m", 7, None)
    reply.feed(Opened("c1"))
    data = reply.feed(Text(text))
    assert max(map(len, data.split(b"\n"))) < 64_000
    assert "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in data.split(b"\n\n")[:-1]) == text


@pytest.mark.parametrize("model", ['q"uote', "新模型", "a\nb", "", '"usage":null,'])
def test_any_model_name_is_repeated_safely(model: str) -> None:
    reply = ChatStreamReply(model, 7, True)
    events: list[Event] = [Opened("c1"), Text("a"), Finished("stop")]
    data = b"".join(map(reply.feed, events))
    assert {json.loads(frame.data)["model"] for frame in SSEParser().feed(data)} == {model}


def test_a_failure_has_an_error_object_and_no_end() -> None:
    error = ProxyError("answer_broken", "x")
    (frame,) = SSEParser().feed(ChatStreamReply("m", 7, None).fail(error))
    value = json.loads(frame.data)
    assert value["choices"] == [] and value["error"]["code"] == "answer_broken" and value["code"] == -2001
    assert json.loads(ChatWholeReply("m", 7).fail(error))["error"]["message"] == error.message


def test_silence_is_filled_with_a_comment_in_a_stream_alone() -> None:
    alive = ChatStreamReply("m", 7, None).alive()
    assert alive.startswith(b":") and SSEParser().feed(alive) == []
    assert ChatWholeReply("m", 7).alive() == b""


def test_the_request_chooses_the_form() -> None:
    body = '{"messages":[{"content":"x"}],"stream":%s}'
    assert isinstance(make_chat_reply(parse_chat_request((body % "true").encode()), 7), ChatStreamReply)
    assert isinstance(make_chat_reply(parse_chat_request((body % "false").encode()), 7), ChatWholeReply)
