"""Section 7: what Kimi streams, as events; and what its replies mean as failures."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from conftest import StartProxy, bearer
from golden import WIRE_FOLDER, read_index, render_stream
from hypothesis import given
from hypothesis import strategies as st
from kimi_simulator import Simulator

from kimi_proxy import (
    ClassicAnswer,
    ConnectAnswer,
    Event,
    Finished,
    Opened,
    ProxyError,
    SearchHit,
    SSEParser,
    Text,
    Thinking,
    error_of_reply,
    join_surrogates,
)


def answer(*values: Any, end: bool = True) -> list[Event]:
    classic = ClassicAnswer()
    events = [event for value in values for event in classic.feed(json.dumps(value))]
    return events + (classic.finish() if end else [])


def text(piece: Any) -> dict[str, Any]:
    return {"event": "cmpl", "text": piece}


DONE = {"event": "all_done"}
MODERATED = {"event": "error"}
HIT = {"event": "search_plus", "msg": {"type": "get_res", "title": "T", "url": "https://a.bc"}}

ANSWERS: dict[str, tuple[list[Any], list[Event]]] = {
    "text": ([text("a"), text("b"), DONE], [Text("a"), Text("b"), Finished("stop")]),
    "missing, null and empty text": (
        [{"event": "cmpl"}, text(None), text(""), text(1), text("a"), DONE],
        [Text("a"), Finished("stop")],
    ),
    "a hit told twice": ([HIT, HIT, text("a"), DONE], [SearchHit("T", "https://a.bc"), Text("a"), Finished("stop")]),
    "hits": ([HIT, text("a"), DONE], [SearchHit("T", "https://a.bc"), Text("a"), Finished("stop")]),
    "hits that are none": (
        [
            {"event": "search_plus"},
            {"event": "search_plus", "msg": {"type": "start"}},
            {"event": "search_plus", "msg": {"type": "get_res", "title": "T"}},
            {"event": "search_plus", "msg": [1]},
            text("a"),
            DONE,
        ],
        [Text("a"), Finished("stop")],
    ),
    "a hit without a title": (
        [{"event": "search_plus", "msg": {"type": "get_res", "url": "https://a.bc"}}, text("a"), DONE],
        [SearchHit("https://a.bc", "https://a.bc"), Text("a"), Finished("stop")],
    ),
    "ignorable kinds": (
        [{"event": kind} for kind in ("resp", "ping", "loading", "rename", "k1", "req", "new", None)]
        + [{}, text("a"), DONE],
        [Text("a"), Finished("stop")],
    ),
    "moderated": ([text("a"), MODERATED], [Text("a"), Finished("content_filter")]),
    "moderated at once": ([MODERATED], [Finished("content_filter")]),
    "no all_done": ([text("a")], [Text("a"), Finished("length")]),
    "length": ([text("a"), {"event": "length"}, DONE], [Text("a"), Finished("length")]),
    "nothing after the end": ([text("a"), DONE, text("b"), DONE], [Text("a"), Finished("stop")]),
    "a pair cut in two": ([text("a\ud83d"), text("\udc4db"), DONE], [Text("a"), Text("👍b"), Finished("stop")]),
    "half a pair alone": ([text("\ud83d"), text("b"), DONE], [Text("\ufffdb"), Finished("stop")]),
    "half a pair at the end": ([text("a\ud83d"), DONE], [Text("a"), Text("\ufffd"), Finished("stop")]),
    "a low half alone": ([text("a\udc4d"), DONE], [Text("a\ufffd"), Finished("stop")]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_frames_become_events(name: str) -> None:
    frames, events = ANSWERS[name]
    assert answer(*frames) == events


@pytest.mark.parametrize("frames", [[DONE], [], [HIT, DONE], [HIT], [text(""), DONE], [{"event": "length"}, DONE]])
def test_an_answer_without_text_is_a_failure(frames: list[Any]) -> None:
    with pytest.raises(ProxyError) as caught:
        answer(*frames)
    assert (caught.value.code, caught.value.status) == ("answer_empty", 502)


@pytest.mark.parametrize("data", ["", "{", "[1]", "null", "NaN", "[" * 100_000, '{"event":' + "1" * 5000 + "}"])
def test_an_event_that_is_no_json_object_breaks_the_answer_without_quoting_it(data: str) -> None:
    with pytest.raises(ProxyError) as caught:
        ClassicAnswer().feed(data)
    assert caught.value.code == "answer_broken"


def test_an_error_type_in_the_stream_is_that_failure() -> None:
    with pytest.raises(ProxyError) as caught:
        answer({"error_type": "chat.user_stream_pushing", "message": "busy"})
    assert caught.value.code == "answer_running"


@given(st.text(max_size=20), st.data())
def test_text_cut_between_the_halves_of_pairs_comes_out_whole(whole: str, draw: st.DataObject) -> None:
    units = json.loads(json.dumps([*whole.encode("utf-16-le", "surrogatepass")]))
    halves = [chr(low | high << 8) for low, high in zip(units[::2], units[1::2], strict=True)]
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(halves)), max_size=6)))
    pieces = ["".join(halves[start:end]) for start, end in pairwise([0, *cuts, len(halves)])]
    events = answer(*map(text, pieces), text("."), DONE)
    shown = "".join(event.text for event in events if isinstance(event, Text))
    assert shown == whole.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") + "."


def test_a_continuation_needs_no_text_of_its_own_and_an_answer_tells_where_to_go_on() -> None:
    continuation = ClassicAnswer(continues=True)
    assert continuation.feed(json.dumps(DONE)) == [Finished("stop")]
    for frames, segment_id in (([{"event": "length"}, DONE], "s1"), ([DONE], "")):
        cut = ClassicAnswer()
        for value in ({"event": "req", "id": "s1"}, text("a"), *frames):
            assert cut.segment_id == ""
            cut.feed(json.dumps(value))
        assert (cut.segment_id, cut.ended) == (segment_id, True)


def test_joining_leaves_whole_text_alone() -> None:
    assert join_surrogates("a 你 👍") == "a 你 👍"
    assert join_surrogates("\ud83d\udc4d\ud83d") == "👍\ufffd"


REPLIES: list[tuple[int, Any, str, int]] = [
    (401, {"error_type": "auth.token.invalid", "message": "m"}, "token_dead", 401),
    (401, None, "token_dead", 401),
    (200, {"error_type": "auth.token.invalid"}, "token_dead", 401),
    (200, {"error_type": "chat.user_stream_pushing", "message": "m"}, "answer_running", 429),
    (429, {"error_type": "too.many", "message": "m"}, "rate_limited", 429),
    (429, None, "rate_limited", 429),
    (400, {"error_type": "bad", "message": "m"}, "service_refused", 502),
    (403, None, "service_refused", 502),
    (404, {}, "service_refused", 502),
    (200, {"error_type": "odd", "message": "m"}, "service_failed", 502),
    (302, None, "service_failed", 502),
    (500, {"error_type": "x", "message": "m"}, "service_failed", 502),
    (503, None, "service_failed", 502),
]


@pytest.mark.parametrize(("status", "value", "code", "ours"), REPLIES)
def test_replies_are_failures_with_a_right_status(status: int, value: Any, code: str, ours: int) -> None:
    error = error_of_reply(status, value, "asking", words="words of the page")
    assert (error.code, error.status, error.upstream_status) == (code, ours, status)
    assert "asking" in error.message
    said = value.get("message") if isinstance(value, dict) else None
    assert (said or "words of the page") in error.message


def test_the_services_words_are_quoted_short_and_redacted() -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
    error = error_of_reply(500, {"error_type": "x", "message": f"bad {token}\n" + "long " * 500}, "asking")
    assert token not in error.message
    assert "\n" not in error.message
    assert len(error.message) < 600


@pytest.mark.parametrize(("code_status", "wait", "expected"), [(429, 7, 7), (429, 0, 60), (500, 7, 0)])
def test_retry_after_is_the_services_own(code_status: int, wait: int, expected: int) -> None:
    assert error_of_reply(code_status, None, "asking", retry_after_seconds=wait).retry_after_seconds == expected


@pytest.mark.parametrize("name", read_index())
def test_golden_streams_give_their_events(name: str) -> None:
    expected = json.loads((WIRE_FOLDER / name).with_suffix(".json").read_text("utf-8"))
    assert render_stream(WIRE_FOLDER / name) == expected


def test_every_recorded_stream_is_in_the_index() -> None:
    streams = {path.relative_to(WIRE_FOLDER).as_posix() for path in WIRE_FOLDER.glob("*/*") if path.suffix != ".json"}
    assert streams == set(read_index())


OPENING = {"op": "set", "mask": "chat", "chat": {"id": "c1"}}
OPENED = Opened("c1", hits_inline=False)


def connect(*values: Any, end: bool = True) -> list[Event]:
    answering = ConnectAnswer()
    events = [event for value in values for event in answering.feed((0, json.dumps(value).encode()))]
    if end:
        events += answering.feed((2, b"{}"))
    return events + answering.finish()


def block(kind: str, content: Any, op: str = "append", identifier: str = "1") -> dict[str, Any]:
    return {"op": op, "mask": f"block.{kind}", "block": {"id": identifier, kind: content}}


def stage(status: str) -> dict[str, Any]:
    return {"op": "set", "block": {"multiStage": {"stages": [{"name": "STAGE_NAME_THINKING", "status": status}]}}}


def message(role: str, identifier: str, **more: Any) -> dict[str, Any]:
    return {"op": "set", "mask": "message", "message": {"id": identifier, "role": role, **more}}


def tool(contents: list[Any], op: str = "set", name: str = "web_search", call: str = "web_search:3") -> dict[str, Any]:
    part = {"name": name, "toolCallId": call, "status": "STATUS_DONE", "contents": contents}
    return {"op": op, "mask": "block.tool", "block": {"id": "t", "tool": part}}


def page(number: Any, url: str = "https://ab.cd", **more: Any) -> dict[str, Any]:
    return {"searchResult": {"id": number, "base": {"title": "T", "url": url}, **more}}


def hit(key: str, url: str = "https://ab.cd", title: str = "T") -> SearchHit:
    return SearchHit(title, url, key)


RAW = {"base": {"title": "T", "url": "https://ab.cd"}, "refIndex": "web_search:1#1"}
HIT_1 = SearchHit("T", "https://ab.cd", "web_search:1#1")
DONE_1: dict[str, Any] = {"done": {}}

CONNECT_ANSWERS: dict[str, tuple[list[Any], list[Event]]] = {
    "set, then append": (
        [OPENING, block("text", {"content": "a"}, "set"), block("text", {"content": "b"}), DONE_1],
        [OPENED, Text("a"), Text("b"), Finished("stop")],
    ),
    "text as a bare string": ([OPENING, block("text", "a"), DONE_1], [OPENED, Text("a"), Finished("stop")]),
    "thinking": (
        [OPENING, block("think", {"content": "hm"}, "set"), block("text", {"content": "a"}, "set", "2"), DONE_1],
        [OPENED, Thinking("hm"), Text("a"), Finished("stop")],
    ),
    "thinking as a phase": (
        [OPENING, stage("STAGE_STATUS_RUNNING"), block("text", "hm"), stage("stage_status_done"), block("text", "a")],
        [OPENED, Thinking("hm"), Text("a"), Finished("stop")],
    ),
    "set again, extending": (
        [OPENING, block("text", "ab", "set"), block("text", "abc", "set"), DONE_1],
        [OPENED, Text("ab"), Text("c"), Finished("stop")],
    ),
    "set again, the same": (
        [OPENING, block("text", "ab", "set"), block("text", "ab", "set"), DONE_1],
        [OPENED, Text("ab"), Finished("stop")],
    ),
    "set again, contradicting": (
        [OPENING, block("text", "ab", "set"), block("text", "xy", "set"), block("text", "c"), DONE_1],
        [OPENED, Text("ab"), Text("c"), Finished("stop")],
    ),
    "set again, contradicting, then extended": (
        [
            OPENING,
            block("text", "ab", "set"),
            block("text", "xy", "set"),
            block("text", "c"),
            block("text", "xycd", "SET"),
            block("text", "xycde", "set"),
            DONE_1,
        ],
        [OPENED, Text("ab"), Text("c"), Text("d"), Text("e"), Finished("stop")],
    ),
    "set again after appends": (
        [
            OPENING,
            block("text", "a", "set"),
            block("text", "b"),
            block("text", "abc", "set"),
            block("text", "d"),
            DONE_1,
        ],
        [OPENED, Text("a"), Text("b"), Text("c"), Text("d"), Finished("stop")],
    ),
    "set again, shorter, then back": (
        [OPENING, block("text", "abc", "set"), block("text", "a", "set"), block("text", "abcd", "set"), DONE_1],
        [OPENED, Text("abc"), Text("d"), Finished("stop")],
    ),
    "two blocks": (
        [OPENING, block("text", "a", "set", "1"), block("text", "b", "set", "2"), DONE_1],
        [OPENED, Text("a"), Text("b"), Finished("stop")],
    ),
    "hits, each once": (
        [
            OPENING,
            {
                "block": {
                    "tool": {"name": "web_search", "status": "STATUS_DONE", "contents": [RAW, {"searchResult": RAW}]}
                }
            },
            {"message": {"refs": {"searchChunks": [RAW], "usedSearchChunks": [{"searchResult": RAW}]}}},
            {"message": {"refs": {"searchChunks": [{"searchResult": {"base": RAW["base"]}, "refIndex": "k"}]}}},
            {"block": {"search": {"webPages": [{"title": "Old", "url": "https://old.cd"}]}}},
            block("text", "a"),
        ],
        [OPENED, HIT_1, hit("k"), SearchHit("Old", "https://old.cd"), Text("a"), Finished("stop")],
    ),
    "odd shapes": (
        [
            OPENING,
            {"heartbeat": {}},
            {"op": "set", "mask": "message", "message": {"id": "m", "role": "assistant", "status": "x"}},
            {"op": "merge", "what": 1},
            {"block": {"new": {}}},
            {"block": None, "message": 3, "chat": []},
            {"block": {"text": None, "think": {"content": 4}, "tool": [], "multiStage": {"stages": [1]}}},
            {"block": {"tool": {"contents": [None, {}, {"searchResult": 1}, {"base": {"title": "no url"}}]}}},
            {},
            block("text", "a"),
            DONE_1,
        ],
        [OPENED, Text("a"), Finished("stop")],
    ),
    "a pair cut in two": (
        [OPENING, block("text", "a\ud83d"), block("text", "\udc4d"), DONE_1],
        [OPENED, Text("a"), Text("👍"), Finished("stop")],
    ),
    "moderated": (
        [OPENING, block("text", "a"), {"block": {"exception": {"error": {"reason": "REASON_CONTENT_MODERATED"}}}}],
        [OPENED, Text("a"), Finished("content_filter")],
    ),
    "moderated, in a list": (
        [OPENING, block("text", "a"), {"block": {"exception": [None, {"reason": "reason_content_moderated"}]}}],
        [OPENED, Text("a"), Finished("content_filter")],
    ),
    "exceptions that say nothing": (
        [
            OPENING,
            {"block": {"exception": None, "error": {}}},
            {"block": {"exception": []}},
            block("text", "a"),
            DONE_1,
        ],
        [OPENED, Text("a"), Finished("stop")],
    ),
    "hits of a search, by the call's id and refIndex": (
        [OPENING, tool([page(1), page("2", "https://2.cd", refIndex="web_search:1#1")]), block("text", "a"), DONE_1],
        [
            OPENED,
            hit("tools://web_search:3#0"),
            hit("tools://web_search:3#1", "https://2.cd"),
            hit("web_search:1#1", "https://2.cd"),
            Text("a"),
            Finished("stop"),
        ],
    ),
    "hits of a search by append": (
        [OPENING, tool([page(None)]), block("tool", {"status": "STATUS_RUNNING"}, "set", "t")]
        + [tool([page(None, "https://2.cd")], "append"), block("text", "a"), DONE_1],
        [
            OPENED,
            hit("tools://web_search:3#0"),
            hit("tools://web_search:3#1", "https://2.cd"),
            Text("a"),
            Finished("stop"),
        ],
    ),
    "hits whose id is no number": (
        [OPENING, tool([page("9" * 5000), page("x", "https://2.cd")]), block("text", "a"), DONE_1],
        [
            OPENED,
            hit("tools://web_search:3#0"),
            hit("tools://web_search:3#1", "https://2.cd"),
            Text("a"),
            Finished("stop"),
        ],
    ),
    "opened pages, by their position": (
        [
            OPENING,
            tool(
                [{"text": "x"}, {"webOpenUrl": {"url": "https://ab.cd", "id": 9}}, {"webOpenUrl": 1}],
                name="fetch_urls",
                call="fetch_urls:0",
            ),
            block("text", "a"),
            DONE_1,
        ],
        [OPENED, hit("tools://fetch_urls:0#1", title="https://ab.cd"), Text("a"), Finished("stop")],
    ),
    "hits of a ref": (
        [
            OPENING,
            {"op": "append", "mask": "ref", "ref": {"message_id": "m", "search": {"id": "1", **RAW}}},
            {"ref": {"message_id": "m", "search": {"searchResult": {"base": {"title": "B", "url": "https://b.cd"}}}}},
            {"ref": {"search": None}},
            {"message": {"refs": {"searchChunks": [RAW]}}},
            block("text", "a"),
            DONE_1,
        ],
        [OPENED, HIT_1, SearchHit("B", "https://b.cd"), Text("a"), Finished("stop")],
    ),
    "a hit once more without a key": (
        [OPENING, tool([page(1)]), {"block": {"search": {"webPages": [{"title": "T", "url": "https://ab.cd"}]}}}]
        + [block("text", "a"), DONE_1],
        [OPENED, hit("tools://web_search:3#0"), Text("a"), Finished("stop")],
    ),
    "masks in a list": (
        [OPENING, {"op": "append", "mask": ["block.text.content", "block.status"], "block": {"id": "1", "text": "a"}}]
        + [{"op": "append", "mask": {"paths": ["block.text"]}, "block": {"id": "1", "text": "b"}}, DONE_1],
        [OPENED, Text("a"), Text("b"), Finished("stop")],
    ),
    "the model's own sandbox": (
        [
            OPENING,
            {"block": {"id": "5", "tool": {"name": "ipython", "toolCallId": "ipython:0", "contents": [page(1)]}}},
            block("text", "Out[1]: 42", "set", "5"),
            block("tool", {"contents": [page(1)]}, "append", "5"),
            block("text", "a"),
            DONE_1,
        ],
        [OPENED, Text("a"), Finished("stop")],
    ),
    "the user's own words": (
        [
            OPENING,
            message("user", "u1", blocks=[{"text": {"content": "my words"}}]),
            {"op": "set", "block": {"id": "0", "messageId": "u1", "text": {"content": "my words"}}},
            {"op": "set", "messageId": "u1", "block": {"id": "0", "text": {"content": "my words"}}},
            message("assistant", "m1"),
            {"op": "set", "block": {"id": "1", "messageId": "m1", "text": {"content": "a"}}},
            DONE_1,
        ],
        [OPENED, Text("a"), Finished("stop")],
    ),
    "thinking in blocks within its stage, and text before the stage ends": (
        [OPENING, stage("STAGE_STATUS_START"), block("think", "hm", identifier="2"), block("text", "a"), DONE_1],
        [OPENED, Thinking("hm"), Text("a"), Finished("stop")],
    ),
}

QUESTIONS_BACK: list[dict[str, Any]] = [
    {"op": "set", "mask": "message.status", "message": {"id": "m", "status": "MESSAGE_STATUS_ASK_USER_QUESTION"}},
    {"op": "set", "block": {"id": "3", "status": "ask_user_question", "tool": {}}},
    {"op": "set", "block": {"id": "3", "tool": {"name": "ask", "status": "STATUS_ASK_USER_QUESTION"}}},
    {"op": "set", "status": "STATUS_ASK_USER_QUESTION"},
]


@pytest.mark.parametrize("question", QUESTIONS_BACK)
def test_a_question_back_ends_the_answer_with_what_is_there(question: dict[str, Any]) -> None:
    events = connect(OPENING, block("text", "Which one?"), question, block("text", "late"), end=False)
    assert events == [OPENED, Text("Which one?"), Finished("stop")]
    with pytest.raises(ProxyError) as caught:
        connect(OPENING, question, end=False)
    assert caught.value.code == "answer_empty"


def test_heartbeats_are_no_progress_and_a_weaker_model_is_told() -> None:
    answering = ConnectAnswer("c1")
    values: list[tuple[dict[str, Any], int]] = [
        ({"heartbeat": {}}, 0),
        ({}, 0),
        (OPENING, 1),
        ({"heartbeat": {}, "eventOffset": 3}, 1),
        ({"notification": {"type": "TYPE_OTHER", "message": "x"}}, 2),
    ]
    for value, progress in values:
        assert answering.feed((0, json.dumps(value).encode())) == []
        assert (answering.progress, answering.degraded) == (progress, "")
    notice = {"type": "TYPE_MODEL_DEGRADE", "message": "K2.6 answers instead of K3"}
    answering.feed((0, json.dumps({"notification": notice}).encode()))
    assert answering.degraded == "K2.6 answers instead of K3" and not answering.unknown_fields


@pytest.mark.parametrize("name", CONNECT_ANSWERS)
def test_connect_envelopes_become_events(name: str) -> None:
    values, events = CONNECT_ANSWERS[name]
    assert connect(*values) == events


@pytest.mark.parametrize("done", [True, False])
def test_a_connect_answer_without_its_end_envelope_is_an_end_after_done_and_a_cut_before(done: bool) -> None:
    events = connect(OPENING, block("text", "a"), *([DONE_1] if done else []), end=False)
    assert events[-1] == Finished("stop" if done else "length")


@pytest.mark.parametrize(
    "values",
    [
        [OPENING, DONE_1],
        [],
        [OPENING, block("think", "hm"), DONE_1],
        [OPENING, {"message": {"refs": {"searchChunks": [RAW]}}}],
    ],
)
def test_a_connect_answer_without_text_is_a_failure(values: list[Any]) -> None:
    with pytest.raises(ProxyError) as caught:
        connect(*values)
    assert caught.value.code == "answer_empty"


def test_an_error_can_follow_done() -> None:
    answering = ConnectAnswer()
    for value in (OPENING, block("text", "a"), DONE_1):
        answering.feed((0, json.dumps(value).encode()))
    assert answering.done and not answering.ended
    with pytest.raises(ProxyError) as caught:
        answering.feed((2, b'{"error":{"code":"resource_exhausted","message":"slow down"}}'))
    assert (caught.value.code, caught.value.status) == ("rate_limited", 429) and "slow down" in caught.value.message


REASONS = {
    "REASON_COMPLETION_OVERLOADED": ("service_busy", 30),
    "REASON_SERVER_OVERLOADED_FOR_FREE_USER": ("service_busy", 30),
    "QUOTA_EXCEEDED_WINDOW_5H": ("quota_used_up", 1800),
    "quota_exceeded_window_7d": ("quota_used_up", 1800),
    "REASON_INVALID_AUTH_TOKEN": ("token_dead", 0),
    "REASON_KIMI_FILE_PARSE_JOB_FAIL": ("file_unreadable", 0),
    "REASON_KIMI_FILE_MODERATION_FAIL": ("file_unreadable", 0),
    "REASON_CAPTCHA_REQUIRED": ("service_refused", 0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_tells_the_failure_wherever_it_stands(reason: str) -> None:
    debug = {"reason": reason, "localizedMessage": {"message": "请稍后"}}
    for error in (
        error_of_reply(429, {"code": "resource_exhausted", "details": [{"debug": debug}]}, "asking"),
        error_of_reply(200, {"code": "resource_exhausted", "debug": debug}, "asking"),
    ):
        assert (error.code, error.retry_after_seconds) == REASONS[reason]
        assert "请稍后" in error.message and ("captcha" in error.message) is ("CAPTCHA" in reason)


@pytest.mark.parametrize(
    "part",
    [
        {"exception": {"error": {"reason": "REASON_COMPLETION_OVERLOADED"}}},
        {"exception": [{"reason": "REASON_COMPLETION_OVERLOADED"}]},
        {"exception": {"error": [{"reason": "REASON_COMPLETION_OVERLOADED"}]}},
        {"error": {"reason": "REASON_COMPLETION_OVERLOADED"}},
        {"error": {"code": "resource_exhausted", "debug": {"reason": "REASON_COMPLETION_OVERLOADED"}}},
    ],
)
def test_exceptions_and_errors_of_blocks_are_failures(part: dict[str, Any]) -> None:
    with pytest.raises(ProxyError) as caught:
        connect(OPENING, {"block": {"id": "9", **part}})
    assert caught.value.code == "service_busy" and "OVERLOADED" in caught.value.message
    assert "HTTP 500" not in caught.value.message  # nobody said so


def test_a_quota_waits_as_long_as_the_service_says_and_half_an_hour_at_least() -> None:
    error = {"code": "resource_exhausted", "reason": "QUOTA_EXCEEDED_WINDOW_5H"}
    for said, wait in ((0, 1800), (60, 1800), (7200, 7200)):
        assert error_of_reply(429, error, "asking", retry_after_seconds=said).retry_after_seconds == wait


@pytest.mark.parametrize("error", [{"code": "unknown", "message": "m"}, {"message": "m"}, {"code": "tomorrow"}])
@pytest.mark.parametrize(
    ("status", "code", "wait"),
    [(401, "token_dead", 0), (429, "rate_limited", 7), (503, "service_failed", 7), (500, "service_failed", 0)],
)
def test_where_the_code_says_nothing_the_status_does(error: dict[str, Any], status: int, code: str, wait: int) -> None:
    for failure in (
        error_of_reply(status, {"error": error}, "asking", retry_after_seconds=7),
        error_of_reply(status, error, "asking", retry_after_seconds=7),
    ):
        assert (failure.code, failure.retry_after_seconds) == (code, wait)


def test_what_is_not_known_is_named() -> None:
    answering = ConnectAnswer()
    values: list[Any] = [{"op": "set", "tomorrow": 1}, {"block": {"new": {}}}]
    for value in values * 2:
        answering.feed((0, json.dumps(value).encode()))
    assert answering.unknown_fields == {("message", "tomorrow"), ("block", "new")}


CODES = {
    "unauthenticated": "token_dead",
    "resource_exhausted": "rate_limited",
    "permission_denied": "service_refused",
    "invalid_argument": "service_refused",
    "not_found": "service_refused",
    "unavailable": "service_failed",
    "internal": "service_failed",
    "tomorrow": "service_refused",
}


@pytest.mark.parametrize("code", CODES)
def test_every_connect_code_is_a_failure_with_the_services_words(code: str) -> None:
    debug = {"reason": "REASON_X", "localizedMessage": {"message": "出错了"}}
    value = {"code": code, "message": "said", "details": [{"debug": debug}, None, {"debug": 1}]}
    for error in (error_of_reply(400, value, "asking"), error_of_reply(400, {"error": value}, "asking")):
        assert error.code == CODES[code]
        assert all(word in error.message for word in ("asking", "said", "REASON_X", "出错了", code))
    assert error_of_reply(403, value, "asking").code == CODES[code]


KEYS = ["op", "chat", "id", "message", "refs", "searchChunks", "block", "text", "think", "content", "tool", "base"]
KEYS += ["contents", "multiStage", "stages", "name", "exception", "error", "code", "done", "url", "searchResult"]
KEYS += ["webOpenUrl", "ref", "search", "status", "toolCallId", "messageId", "role", "notification", "type"]
WORDS = ["set", "append", "a", "web_search:1#1", "STAGE_NAME_THINKING"]
JSON = st.recursive(
    st.none() | st.integers(-2, 2) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=25,
)


@given(st.lists(JSON, max_size=4))
def test_any_json_in_connect_is_events_or_a_clear_failure(values: list[Any]) -> None:
    try:
        events = connect(*values)
    except ProxyError as error:
        assert error.status in (400, 401, 429, 502)
    else:
        assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("field", ["id", "messageId", "status", "tool"])
def test_a_deeply_nested_value_is_ignored_or_a_clear_failure(field: str) -> None:
    for depth in (200, 900, 960, 980, 100_000):
        value = '{"block":{"text":"a","' + field + '":' + '{"name":' * depth + "1" + "}" * depth + '},"mask":[]}'
        answering = ConnectAnswer("c1")
        with suppress(ProxyError):
            assert answering.feed((0, value.encode())) == [Text("a")]


CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "use_search": True}


async def ask(http: aiohttp.ClientSession, proxy: str, token: str) -> tuple[int, Any, str]:
    """A whole answer through real sockets: status, JSON, `Retry-After`."""
    async with http.post(proxy + CHAT, json=QUESTION, headers=bearer(token)) as response:
        return response.status, await response.json(), response.headers.get("Retry-After", "")


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("set-again", "一二三四五"),
        ("cite-ref", "甲[1]乙[2][3]丙[1]。"),
        ("cite-none", "Use [^1^] or [^0^], a < b, <REF>x</REF> to match."),
        ("ask-user", "Which one?"),
        ("think-tags", "答案是 42。"),
        ("degraded", "答案"),
        ("sandbox", "答案"),
        ("user-echo", "答案"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_what_the_newer_streams_show(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    path: str,
    stream: bool,
    script: str,
    text: str,
) -> None:
    proxy = await start_proxy(protocol="connect")
    question = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "stream": stream, "max_tokens": 999}
    async with http.post(proxy + path, json=question, headers=bearer(simulator.token(script))) as response:
        body = await response.read()
    frames = [*SSEParser().feed(body)] if stream else [body.decode()]
    values = [json.loads(frame) for frame in frames if frame != "[DONE]"]
    shown = "".join(text_of(value) for value in values)
    assert (response.status, shown.partition("\n\n搜索结果来自")[0]) == (200, text)


def text_of(value: Any) -> str:
    """The text in a whole answer, or in one event of a stream, of any API."""
    for choice in value.get("choices", ()):
        return str(choice.get("message", choice.get("delta", {})).get("content") or "")
    match value.get("type", value.get("object")):
        case "content_block_delta":
            return str(value["delta"].get("text", ""))
        case "response.output_text.delta":
            return str(value["delta"])
        case "message":
            return "".join(block.get("text", "") for block in value["content"])
        case "response":
            return "".join(part["text"] for item in value["output"] for part in item.get("content", ()))
        case _:
            return ""


REFUSALS = [
    (("reason=ask:REASON_SERVER_OVERLOADED_FOR_FREE_USER",), 429, "service_busy", "30"),
    (("exception-list",), 429, "service_busy", "30"),
    (("reason=ask:QUOTA_EXCEEDED_WINDOW_5H",), 429, "quota_used_up", "1800"),
    (("unknown=ask:401",), 401, "token_dead", ""),
    (("unknown=ask:429", "retry-after=7"), 429, "rate_limited", "7"),
    (("unknown=ask:503", "retry-after=7"), 502, "service_failed", "7"),
    (("block-error",), 502, "service_failed", ""),
]


@pytest.mark.parametrize(("faults", "status", "code", "wait"), REFUSALS)
async def test_what_the_newer_refusals_mean(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    faults: tuple[str, ...],
    status: int,
    code: str,
    wait: str,
) -> None:
    proxy = await start_proxy(protocol="connect")
    answered, body, retry_after = await ask(http, proxy, simulator.token("hello", *faults))
    assert (answered, body["error"]["code"], retry_after) == (status, code, wait)
