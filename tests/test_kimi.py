"""Section 15: what the service gets to see of us."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from hypothesis import given
from hypothesis import strategies as st
from kimi_simulator import MODELS, SCRIPTS, Account, Simulator, render_connect, render_stream

from kimi_proxy import (
    KIMI,
    CitationFilter,
    ClassicAnswer,
    ConnectAnswer,
    EnvelopeParser,
    Event,
    Inflow,
    Model,
    ProxyError,
    Question,
    Reader,
    ServicePool,
    SSEParser,
    Text,
    WireError,
    apply_filters,
    choose_model,
    encode_envelope,
    open_service_session,
    parse_models,
)

CHAT = "/v1/chat/completions"


async def ask(http: aiohttp.ClientSession, proxy: str, token: str) -> int:
    async with http.post(proxy + CHAT, json=chat_body(), headers=bearer(token)) as response:
        await response.read()
        return response.status


async def test_the_protocol_is_kept_to_the_letter_and_cookies_are_not(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello")
    for _ in range(3):
        assert await ask(http, proxy, token) == 200
    account = await simulator.settle(token)
    steps = [call.step for call in account.calls if call.step != "remove"]
    assert steps == ["refresh", *["open", "ask"] * 3]
    assert account.count("remove") == 3
    for call in account.calls:
        secret = token if call.step == "refresh" else account.access_tokens[0]
        assert call.headers["Authorization"] == f"Bearer {secret}"
        assert "Cookie" not in call.headers
    assert not simulator.violations


@pytest.mark.parametrize("faults", [("opaque",), ("opaque", "rotate")])
async def test_any_access_token_and_rotated_refresh_tokens_will_do(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, faults: tuple[str, ...]
) -> None:
    proxy = await start_proxy(token_seconds=1e-6)
    token = simulator.token("hello", *faults)
    for _ in range(3):
        assert await ask(http, proxy, token) == 200
        await simulator.settle(token)
    assert simulator.account(token).count("refresh") >= 3


async def test_two_accounts_never_share_a_token(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    tokens = [simulator.token("hello") for _ in range(5)]
    for token in tokens:
        assert await ask(http, proxy, token) == 200
    for token in tokens:
        account = await simulator.settle(token)
        assert (account.count("refresh"), len(account.conversations)) == (1, 1)


async def test_the_pool_keeps_no_cookies_and_has_no_limit_of_its_own() -> None:
    async with open_service_session() as session:
        assert isinstance(session.cookie_jar, aiohttp.DummyCookieJar)
        assert session.connector is not None and session.connector.limit == 0


def test_a_question_shows_no_text() -> None:
    assert "sesame" not in repr(Question("sesame", True))


async def answer(http: aiohttp.ClientSession, proxy: str, token: str, **fields: Any) -> tuple[int, Any]:
    async with http.post(proxy + CHAT, json=chat_body(**fields), headers=bearer(token)) as response:
        return response.status, await response.json()


def steps(account: Account) -> list[str]:
    return [call.step for call in account.calls if call.step not in ("remove", "models")]


@pytest.mark.parametrize("refresh_too", [False, True])
@pytest.mark.parametrize("retired", ["redirect", "html", "404", "405", "410"])
@pytest.mark.parametrize("stream", [False, True])
async def test_auto_moves_to_connect_where_classic_is_retired_and_stays(
    start_proxy: StartProxy,
    simulator: Simulator,
    http: aiohttp.ClientSession,
    log_lines: LogRecorder,
    retired: str,
    stream: bool,
    refresh_too: bool,
) -> None:
    simulator.retired = retired
    simulator.refresh_retired = refresh_too
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello")
    async with http.post(proxy + CHAT, json=chat_body(stream=stream), headers=bearer(token)) as response:
        text = await response.text()
        assert response.status == 200 and ("[DONE]" in text) is stream
    assert "classic seems to be retired" in log_lines.text
    account = await simulator.settle(token)
    assert [sorted(body) for body in account.asked] == [["message", "options", "scenario", "tools"]]
    before = len(account.calls)
    assert (await answer(http, proxy, token))[0] == 200
    assert [call.step for call in account.calls[before:] if call.step not in ("remove", "models")] == ["ask"]


async def test_auto_stays_with_classic_while_that_answers(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello", "status=ask:500")
    assert (await answer(http, proxy, token))[0] == 502
    assert steps(simulator.account(token)) == ["refresh", "open", "ask"]


@pytest.mark.parametrize("retired", ["redirect", "html", "404"])
async def test_with_a_fixed_protocol_a_sign_of_retirement_is_an_error(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, retired: str
) -> None:
    simulator.retired = retired
    proxy = await start_proxy(protocol="classic")
    status, body = await answer(http, proxy, simulator.token("hello"))
    assert status == 502 and body["error"]["code"].startswith("service_")


async def test_where_both_fail_connects_failure_is_told_and_nothing_is_settled(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    simulator.retired = "404"
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello", "status=ask:503")
    status, body = await answer(http, proxy, token)
    assert status == 502 and "ordered status 503" in body["error"]["message"]
    simulator.retired = ""
    good = simulator.token("hello")
    assert (await answer(http, proxy, good))[0] == 200
    assert steps(simulator.account(good)) == ["refresh", "open", "ask"]


@pytest.mark.parametrize("fault", ["camel", "old-refresh", "new-refresh", "opaque"])
async def test_connect_bears_every_reading_of_the_refresh(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", fault)
    assert (await answer(http, proxy, token))[0] == 200
    await simulator.settle(token)


@pytest.mark.parametrize("protocol", ["auto", "connect"])
async def test_an_access_token_is_used_as_it_is_and_goes_to_connect(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, protocol: str
) -> None:
    proxy = await start_proxy(protocol=protocol)
    token = simulator.token("hello")
    account = simulator.account(token)
    access_token = simulator.make_access_token(token)
    assert (await answer(http, proxy, access_token))[0] == 200
    await simulator.settle(token)
    assert steps(account) == ["ask"]
    expired = simulator.make_access_token(token, life_seconds=-1)
    status, body = await answer(http, proxy, expired)
    assert (status, body["error"]["code"]) == (401, "token_expired")


async def test_a_dead_token_told_within_a_connect_answer_is_refreshed_and_asked_once_more(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "stale-once")
    assert (await answer(http, proxy, token))[0] == 200
    account = await simulator.settle(token)
    assert (account.count("refresh"), account.count("ask")) == (2, 2)


async def test_an_access_token_that_the_service_refuses_is_told_as_expired(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "unauthorized-always=ask")
    status, body = await answer(http, proxy, simulator.make_access_token(token))
    assert (status, body["error"]["code"]) == (401, "token_expired")


THINKING = {"role": "assistant", "content": "答案是 42。", "reasoning_content": "让我想想。"}


@pytest.mark.parametrize("faults", [(), ("stages",), ("cut-characters",), ("stages", "one-piece")])
async def test_thinking_is_told_apart_from_the_answer(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, faults: tuple[str, ...]
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("think", *faults)
    status, body = await answer(http, proxy, token, model="kimi-thinking")
    assert (status, body["choices"][0]["message"]) == (200, THINKING)
    assert simulator.account(token).asked[0]["options"] == {"thinking": True}
    status, body = await answer(http, proxy, simulator.token("think-only"))
    assert (status, body["error"]["code"]) == (502, "answer_empty")


ENDS = {
    "done-without-end": (200, "stop"),
    "no-end": (200, "length"),
    "half-an-event": (502, "answer_broken"),
    "error-after-done": (502, "service_failed"),
    "overloaded": (429, "rate_limited"),
}


@pytest.mark.parametrize("fault", ENDS)
async def test_a_connect_answer_is_read_to_its_end_before_it_is_called_good(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    status, body = await answer(http, proxy, simulator.token("hello", fault))
    outcome = body["choices"][0]["finish_reason"] if status == 200 else body["error"]["code"]
    assert (status, outcome) == ENDS[fault]


async def test_a_second_after_done_the_answer_is_over(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    async with asyncio.timeout(2.5):
        status, body = await answer(http, proxy, simulator.token("hello", "done-without-end", "linger"))
    assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")


async def test_what_is_not_known_is_passed_over_and_told_once(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    for _ in range(8):
        assert (await answer(http, proxy, simulator.token("long")))[0] == 200
    assert log_lines.text.count("unknown block from the service, passed over: tomorrow") == 1


@pytest.mark.parametrize("sources", ["text", "annotations", "none"])
async def test_sources_are_shown_as_set(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, sources: str
) -> None:
    proxy = await start_proxy(protocol="connect", sources=sources)
    _, body = await answer(http, proxy, simulator.token("cite"))
    message = body["choices"][0]["message"]
    assert ("搜索结果来自" in message["content"]) is (sources == "text")
    assert ("[1]" in message["content"]) is (sources != "none")
    urls = [place["url_citation"]["url"] for place in message.get("annotations", [])]
    assert set(urls) == (
        set() if sources == "none" else {"https://www.kimi.com/", "https://www.moonshot.cn/about?a=1&b=2"}
    )


K26 = Model("kimi-k2.6", "SCENARIO_K2D6")
K26_THINKING = Model("kimi-k2.6-thinking", "SCENARIO_K2D6", thinking=True)
COMPUTER = Model("kimi-ok-computer", "SCENARIO_OK_COMPUTER", agent_id="ok-computer", agent_mode="TYPE_NORMAL")
DEFAULT = Model("kimi", "SCENARIO_K2D6")
ALL = (DEFAULT, K26, K26_THINKING, COMPUTER)
AGENT = "abcdefghij0123456789"
K1 = "crm40ee9e5jvhsn7ptcg"


def test_models_are_named_by_their_display_names_with_the_default_first() -> None:
    assert parse_models({"availableModels": MODELS, "defaultScenario": {"scenario": "SCENARIO_K2D6"}}) == ALL
    assert [model.id for model in parse_models({"availableModels": MODELS})] == [model.id for model in ALL]
    thinking = {"scenario": "SCENARIO_K2D6", "thinking": True}
    assert parse_models({"availableModels": MODELS, "defaultScenario": thinking})[0].thinking


@pytest.mark.parametrize("value", [{}, {"availableModels": None}, {"availableModels": [None, {}, {"scenario": 1}]}])
def test_odd_lists_of_models_are_empty(value: dict[str, Any]) -> None:
    assert parse_models(value) == ()


CHOICES: dict[str, tuple[Model, bool]] = {
    "kimi": (DEFAULT, True),
    "kimi-search": (DEFAULT, True),
    "kimi-k2.6": (K26, True),
    "kimi-k2.6-search-silent": (K26, True),
    "kimi-k2.6-thinking": (K26_THINKING, True),
    "kimi-k2.6-thinking-search": (K26_THINKING, True),
    "kimi-thinking": (Model("kimi", "SCENARIO_K2D6", thinking=True), True),
    "kimi-ok-computer": (COMPUTER, True),
    "kimi-math": (Model("kimi", "SCENARIO_K2D6", use_math=True), True),
    "kimi-research-search": (Model("kimi", "SCENARIO_K2D6", use_research=True), True),
    "kimi-k1-math": (Model("kimi", "SCENARIO_K2D6", thinking=True, use_math=True), True),
    AGENT: (Model(AGENT, "SCENARIO_K2D6", agent_id=AGENT), True),
    f"{AGENT}-search": (Model(f"{AGENT}-search", "SCENARIO_K2D6", agent_id=AGENT), True),
    "kimi-k9": (DEFAULT, False),
    "gpt-4o": (DEFAULT, False),
    "claude-search-3": (DEFAULT, False),
    "": (DEFAULT, False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_name_means_a_model_and_what_is_not_known_the_default(name: str) -> None:
    assert choose_model(name, ALL) == CHOICES[name]


def test_without_a_list_the_names_still_mean_something() -> None:
    assert choose_model("kimi", ()) == (KIMI, True)
    assert choose_model("kimi-thinking", (KIMI,))[0].thinking


@pytest.mark.parametrize(
    ("name", "asked", "opened"),
    [
        ("kimi", {}, {}),
        ("kimi-math", {"use_math": True}, {}),
        ("kimi-research", {"use_research": True}, {}),
        ("kimi-k1-search", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-k1", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-thinking", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-search-math-silent", {"use_math": True}, {}),
        (AGENT, {"kimiplus_id": AGENT}, {"kimiplus_id": AGENT}),
    ],
)
async def test_classics_models_are_asked_as_it_wants_them(
    simulator: Simulator,
    proxy: str,
    http: aiohttp.ClientSession,
    name: str,
    asked: dict[str, Any],
    opened: dict[str, Any],
) -> None:
    token = simulator.token("hello")
    status, body = await answer(http, proxy, token, model=name)
    assert (status, body["model"]) == (200, name)
    account = await simulator.settle(token)
    names = ("kimiplus_id", "use_math", "use_research")
    assert {key: value for key, value in account.asked[0].items() if key in names} == asked
    (opening,) = [call.body for call in account.calls if call.step == "open"]
    assert {key: value for key, value in opening.items() if key in names} == opened
    assert account.count("research-usage") == (name == "kimi-research")


async def test_a_used_up_quota_is_a_429_and_opens_nothing(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello", "no-quota")
    status, body = await answer(http, proxy, token, model="kimi-research")
    assert (status, body["error"]["code"]) == (429, "quota_used_up")
    assert simulator.account(token).count("open") == 0


async def test_connects_models_are_listed_asked_and_kept_for_a_while(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello")
    for _ in range(2):
        async with http.get(f"{proxy}/v1/models", headers=bearer(token)) as response:
            listed = [entry["id"] for entry in (await response.json())["data"]]
    assert listed[:4] == ["kimi", "kimi-search", "kimi-k2.6", "kimi-k2.6-search"]
    assert "kimi-k2.6-thinking" in listed and "kimi-ok-computer" in listed
    for name, status in (("kimi-k2.6-search", 200), ("kimi-k9", 404)):
        async with http.get(f"{proxy}/v1/models/{name}", headers=bearer(token)) as response:
            assert response.status == status
            assert (await response.json()).get("id") == (name if status == 200 else None)
    for name in ("kimi-k2.6-thinking", "kimi-ok-computer", "gpt-4o"):
        assert (await answer(http, proxy, token, model=name))[0] == 200
    account = await simulator.settle(token)
    assert account.count("models") == 1
    asked = [(body["scenario"], body["options"]["thinking"], body.get("kimiplusId")) for body in account.asked]
    assert asked == [
        ("SCENARIO_K2D6", True, None),
        ("SCENARIO_OK_COMPUTER", False, "ok-computer"),
        ("SCENARIO_K2D6", False, None),
    ]
    assert "model gpt-4o is not known" in log_lines.text


async def test_where_the_service_lists_no_models_a_built_in_list_does(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "status=models:500")
    async with http.get(f"{proxy}/v1/models", headers=bearer(token)) as response:
        assert "kimi" in [entry["id"] for entry in (await response.json())["data"]]
    assert (await answer(http, proxy, token))[0] == 200
    assert simulator.account(token).asked[0]["scenario"].startswith("SCENARIO_")


async def test_a_continuation_that_fails_ends_the_answer_as_cut(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("length", "status=continue:500")
    status, body = await answer(http, proxy, token)
    assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
    assert body["choices"][0]["message"]["content"] == "第一"
    await simulator.settle(token)


# The usual frames have a way of their own through the reader: it must say the same as the parser and the answer do.

TEXTS = st.text(st.characters() | st.sampled_from('"\\\\/\\n\\r\\t\\b\\x7f[]^{}\ue3a0\ue3a8\u2028好👍'), max_size=8)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | st.lists(TEXTS, max_size=2)
KEYS = st.sampled_from(["view", "idx_s", "text", "event", "error_type", "a b", "é"])
STYLES = st.sampled_from([(", ", ": "), (",", ":"), (" ,", " : ")])


@st.composite
def json_bytes(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON object in some style, now and then broken."""
    data = json.dumps(value, ensure_ascii=draw(st.booleans()), separators=draw(STYLES)).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from([b"\xff", b'"', b"\\", b"\x01", b"0", b"\\ud83d"])) + data[at:]
    return data


@st.composite
def classic_frames(draw: st.DrawFn) -> bytes:
    event = draw(st.sampled_from(["cmpl"] * 6 + ["ping", "all_done", "length"]))
    others = draw(st.lists(st.tuples(KEYS, VALUES), max_size=2))
    fields = [("event", event), *others, ("text", draw(TEXTS | VALUES)), ("view", "cmpl")]
    if draw(st.integers(0, 3)) == 0:
        fields = draw(st.permutations(fields))
    space = draw(st.sampled_from([b" ", b"", b"  "]))
    end = draw(st.sampled_from([b"\n\n"] * 6 + [b"\r\n\r\n", b"\r\r", b"\n", b"\nid: 1\n\n", b"\n\n\n"]))
    head = draw(st.sampled_from([b""] * 6 + [b": comment\n", b"event: x\n", b"data: \n"]))
    return head + b"data:" + space + draw(json_bytes(dict(fields))) + end


@st.composite
def connect_frames(draw: st.DrawFn) -> bytes:
    block: dict[str, Any] = {"id": draw(st.sampled_from(["2", "2", "3", "é"])), "text": {"content": draw(TEXTS)}}
    if draw(st.integers(0, 5)) == 0:
        block = draw(st.dictionaries(st.sampled_from(["id", "text", "think", "status"]), VALUES))
    value: dict[str, Any] = {"op": draw(st.sampled_from(["append"] * 5 + ["set"])), "mask": "block.text.content"}
    value |= {"eventOffset": draw(st.integers(-1, 9) | VALUES), "block": block}
    value = draw(st.sampled_from([value] * 6 + [{"heartbeat": {}}, {"done": {}}, _stage("RUNNING"), _stage("DONE")]))
    return encode_envelope(draw(json_bytes(value)), draw(st.sampled_from([0] * 9 + [2])))


def _stage(status: str) -> dict[str, Any]:
    return {"op": "set", "block": {"multiStage": {"stages": [{"name": "STAGE_NAME_THINKING", "status": status}]}}}


def make_reader(dialect: str) -> Reader:
    if dialect == "classic":
        return Reader(SSEParser(), ClassicAnswer())
    return Reader(EnvelopeParser(), ConnectAnswer(), [CitationFilter()])


def read_plainly(dialect: str, data: bytes) -> tuple[list[Event], str]:
    """The events of a whole stream by parser, answer and filters alone, and the failure after them."""
    parser: Any = SSEParser() if dialect == "classic" else EnvelopeParser()
    answer: Any = ClassicAnswer() if dialect == "classic" else ConnectAnswer()
    events: list[Event] = []
    failure = ""
    try:
        for frame in parser.feed(data):
            events += answer.feed(frame)
        parser.finish()
        events += answer.finish()
    except WireError:
        failure = "answer_broken"
    except ProxyError as error:
        failure = error.code
    return apply_filters([] if dialect == "classic" else [CitationFilter()], events), failure


def read_pieces(dialect: str, pieces: Iterator[bytes], *, at_once: bool) -> tuple[list[Event], str]:
    """The same by a reader, piece by piece; `at_once`: each is offered to `feed_usual` first."""
    reader = make_reader(dialect)
    events: list[Event] = []
    for piece in [*pieces, b""]:
        if at_once and piece:
            usual, piece = reader.feed_usual(piece)  # noqa: PLW2901
            events += usual
            if not piece:
                continue
        more, failure = reader.feed(piece)
        events += more
        if failure is not None:
            return events, failure.code
    return events, ""


def join_texts(events: list[Event]) -> list[Any]:
    """Events with neighbouring texts made one: where a citation mark may begin, the split decides what is held."""
    joined: list[Any] = []
    for event in events:
        if isinstance(event, Text) and joined and type(event) is type(joined[-1]):
            joined[-1] = type(event)(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined


@pytest.mark.parametrize("dialect", ["classic", "connect"])
@given(data=st.data(), seed=st.integers())
def test_a_reader_says_what_parser_and_answer_say_however_the_stream_is_cut(
    dialect: str, data: st.DataObject, seed: int
) -> None:
    frames = classic_frames() if dialect == "classic" else connect_frames()
    stream = data.draw(st.sampled_from([b""] * 9 + [b"\xef\xbb\xbf"])) if dialect == "classic" else b""
    stream += b"".join(data.draw(st.lists(frames, max_size=6)))
    dice = random.Random(seed)
    cuts = sorted({0, len(stream), *(dice.randint(0, len(stream)) for _ in range(dice.randint(0, 4)))})
    pieces = [stream[start:end] for start, end in pairwise(cuts)]
    expected, failure = read_plainly(dialect, stream)
    for at_once in (True, False):
        events, code = read_pieces(dialect, iter(pieces), at_once=at_once)
        assert (join_texts(events), code) == (join_texts(expected), failure)


@pytest.mark.parametrize(
    ("dialect", "frame", "wrong"),
    [
        ("classic", b'data: {"event":"ping"}\n\n', b"data: " + bytes(2_000_000) + b"\n\n"),
        ("connect", encode_envelope(b'{"heartbeat":{}}'), encode_envelope(b"no gzip", flags=1)),
        ("connect", encode_envelope(b'{"heartbeat":{}}'), b"\0\xff\xff\xff\xff"),
    ],
)
def test_what_is_wrong_behind_a_frame_is_told_at_once(dialect: str, frame: bytes, wrong: bytes) -> None:
    _, failure = make_reader(dialect).feed(frame + wrong)
    assert failure is not None and failure.code == "answer_broken"


@pytest.mark.parametrize("dialect", ["classic", "connect"])
def test_the_usual_frames_are_read_at_once(dialect: str) -> None:
    steps = SCRIPTS["hello"]
    rendered = render_stream(steps, None) if dialect == "classic" else render_connect(steps, "a-chat", None)
    pieces = [piece for piece in rendered if isinstance(piece, bytes)]
    first = 2 if dialect == "classic" else 4  # in connect the first text is `set`, not appended
    last = 1 if dialect == "classic" else 3
    reader = make_reader(dialect)
    for piece in pieces[:first]:
        reader.feed(piece)
    told = [reader.feed_usual(piece) for piece in pieces[first:-last]]
    assert len(told) > 5 and all(len(events) == 1 and rest == b"" for events, rest in told)


async def test_lines_for_each_frame_are_written_at_debug_level_alone(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    assert await ask(http, proxy, simulator.token("hello")) == 200
    assert log_lines.text.count("< cmpl, ") >= 7


# What the network brings.


class Connection:
    """What a body's reader sees of its connection."""

    connected = True

    def __init__(self) -> None:
        self._reading_paused = False

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self, resume_parser: bool = True) -> None:
        self._reading_paused = False


def make_content(limit: int = 65_536) -> tuple[aiohttp.StreamReader, Connection]:
    connection = Connection()
    content = aiohttp.StreamReader(cast(Any, connection), limit, loop=asyncio.get_running_loop())
    content.begin_http_chunk_receiving()
    return content, connection


def feed(content: aiohttp.StreamReader, *chunks: bytes) -> None:
    """What one read of the network brings."""
    for chunk in chunks:
        content.feed_data(chunk)
        content.end_http_chunk_receiving()


@given(reads=st.lists(st.lists(st.binary(min_size=1, max_size=9), max_size=3), max_size=9), limit=st.integers(1, 40))
def test_an_inflow_gives_what_comes_in_order_whatever_is_taken(reads: list[list[bytes]], limit: int) -> None:
    async def run() -> None:
        content, connection = make_content(limit)
        got: list[bytes] = []

        def take(piece: bytes) -> bytes:
            """Take up to the first byte above 200."""
            high = next((at for at, byte in enumerate(piece) if byte > 200), len(piece))
            got.append(piece[:high])
            return piece[high:]

        async def read() -> None:
            inflow = Inflow(content, take)
            while piece := await inflow.read():
                got.append(piece)

        reading = asyncio.create_task(read())
        for chunks in reads:
            await asyncio.sleep(0)
            while connection._reading_paused:
                await asyncio.sleep(0)
            feed(content, *chunks)
        content.feed_eof()
        await asyncio.wait_for(reading, 5)
        assert b"".join(got) == b"".join(chunk for chunks in reads for chunk in chunks)
        assert not connection._reading_paused and content._waiter is None

    asyncio.run(run())


async def test_what_one_read_of_the_network_brings_is_offered_as_one_and_wakes_nobody() -> None:
    content, _ = make_content()
    offered: list[bytes] = []

    def take(piece: bytes) -> bytes:
        offered.append(piece)
        return b""

    reading = asyncio.create_task(Inflow(content, take).read())
    for chunks in ((b"a", b"b", b"c"), (b"d",), (b"e", b"f")):
        await asyncio.sleep(0)
        feed(content, *chunks)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert offered == [b"abc", b"d", b"ef"] and not reading.done()
    content.feed_eof()
    assert await asyncio.wait_for(reading, 5) == b""


async def test_what_a_taker_raises_and_what_the_connection_does_is_raised_by_read() -> None:
    def refuse(piece: bytes) -> bytes:
        raise ValueError("no")

    content, _ = make_content()
    reading = asyncio.create_task(Inflow(content, refuse).read())
    await asyncio.sleep(0)
    feed(content, b"a")
    with pytest.raises(ValueError, match="no"):
        await asyncio.wait_for(reading, 5)
    content, _ = make_content()
    reading = asyncio.create_task(Inflow(content, lambda piece: b"").read())
    await asyncio.sleep(0)
    feed(content, b"a")
    content.set_exception(aiohttp.ClientPayloadError("cut"))
    with pytest.raises(aiohttp.ClientPayloadError):
        await asyncio.wait_for(reading, 5)


async def test_a_read_that_is_cancelled_takes_nothing_with_it() -> None:
    content, _ = make_content()
    taken: list[bytes] = []

    def take(piece: bytes) -> bytes:
        taken.append(piece)
        return b""

    reading = asyncio.create_task(Inflow(content, take).read())
    await asyncio.sleep(0)
    feed(content, b"a")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not taken and await content.readany() == b"a"


async def test_an_empty_body_has_nothing_to_read() -> None:
    assert await Inflow(aiohttp.streams.EMPTY_PAYLOAD).read() == b""


class Peer:
    """A server that keeps what it is sent, and gives the next of `replies` to each request; None closes instead."""

    def __init__(self, *replies: bytes | None) -> None:
        self.requests: list[bytes] = []
        self.carriers: list[int] = []  # which connection each request came by
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""
        self._replies = list(replies)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self.writers.append(writer)
        while head := (await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""):
            length = re.search(rb"(?i)content-length: (\d+)", head)
            self.carriers.append(number)
            self.requests.append(head + (await reader.readexactly(int(length[1])) if length else b""))
            reply = self._replies.pop(0) if self._replies else OK
            if reply is None:
                break
            writer.write(reply)
        writer.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=utf-8\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def serving(*replies: bytes | None) -> AsyncIterator[Peer]:
    peer = Peer(*replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    peer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield peer


def read_request(data: bytes) -> tuple[str, list[tuple[str, str]], bytes]:
    """Its first line, its headers without regard to their order, and its body."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first, sorted((name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)), body


async def send(way: Callable[..., Awaitable[Any]], method: str, url: str, *rest: Any) -> tuple[int, str, bytes]:
    async with await way(method, url, *rest) as response:
        return response.status, response.content_type, await response.content.read()


@given(
    st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    st.sampled_from(["/", "/api/chat/c1", "/a%20b?x=%2F"]),
    st.dictionaries(
        st.sampled_from(["Content-Type", "Origin", "x-traffic-id", "x-msh-platform"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
    ),
    st.binary(max_size=300),
    st.text(st.characters(min_codepoint=33, max_codepoint=126)),
)
def test_a_short_call_is_sent_as_any_other(
    method: str, path: str, headers: dict[str, str], body: bytes, token: str
) -> None:
    async def compare() -> None:
        async with serving() as peer, open_service_session() as session:
            pool = ServicePool(session)
            seen = [
                await send(way, method, peer.url + path, {"Content-Type": "a/b", **headers}, body, token)
                for way in (pool.request, pool.request_any, pool.request)
            ]
            assert seen == [(200, "text/plain", b"ok")] * 3
            short, general, again = map(read_request, peer.requests)
            assert short == general == again
            assert short[2] == body and len(dict(short[1])) == len(short[1])
            assert dict(short[1]).get("authorization", "Bearer ") == f"Bearer {token}"
            assert peer.connections == 1

    asyncio.run(compare())


async def test_a_line_break_in_a_header_is_sent_nowhere() -> None:
    async with serving() as peer, open_service_session() as session:
        for value in ("a\r\nX: b", "a\nb", "a\rb"):
            with pytest.raises(ValueError, match="line break"):
                await ServicePool(session).request("GET", f"{peer.url}/", {"Origin": value}, b"")
            with pytest.raises(ValueError, match="line break"):
                await ServicePool(session).request("GET", f"{peer.url}/", {}, b"", value)
        assert not peer.requests


@pytest.mark.parametrize("method", ["request", "request_any"])
async def test_what_announces_a_response_is_none_and_what_is_not_http_is_an_error(method: str) -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    replies = (early + OK, b"SSH-2.0-x\r\n\r\n", switch, OK, None)
    async with serving(*replies) as peer, open_service_session() as session:
        way = getattr(ServicePool(session), method)
        rest = ("POST", f"{peer.url}/", {"Origin": "x"}, b"")  # aiohttp asks again by itself where it is a GET
        assert await send(way, *rest) == (200, "text/plain", b"ok")
        with pytest.raises(aiohttp.ClientError):
            await send(way, *rest)
        assert (await send(way, *rest))[0] == 101
        assert await send(way, *rest) == (200, "text/plain", b"ok")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await send(way, *rest)
        assert peer.connections == 3
        assert session.connector is not None and not cast(Any, session.connector)._acquired


async def test_a_response_that_is_not_read_to_its_end_closes_its_connection() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    async with serving(half, OK) as peer, open_service_session() as session:
        pool = ServicePool(session)
        async with await pool.request("GET", f"{peer.url}/", {"Origin": "x"}, b"") as response:
            assert response.content_type == "application/octet-stream" and not response.is_broken()
        assert await send(pool.request, "GET", f"{peer.url}/", {"Origin": "x"}, b"") == (200, "text/plain", b"ok")
        assert peer.connections == 2


ZIPPED = gzip.compress(b"ok")
REPLIES = {
    OK: (200, b"ok"),
    b"HTTP/1.1 204 No Content\r\n\r\n": (204, b""),
    b"HTTP/1.1 304 Not Modified\r\n\r\n": (304, b""),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n": (200, b"ok"),
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(ZIPPED), ZIPPED): (200, b"ok"),
    b"HTTP/1.1 500 Failed\r\nContent-Length: 0\r\n\r\n": (500, b""),
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK: (200, b"ok"),
}


@given(st.lists(st.tuples(st.sampled_from(list(REPLIES)), st.sampled_from(["request", "request_any"])), max_size=12))
def test_a_connection_is_good_for_the_next_call_after_any_reply(calls: list[tuple[bytes, str]]) -> None:
    async def run() -> None:
        async with serving(*(reply for reply, _ in calls)) as peer, open_service_session() as session:
            pool = ServicePool(session)
            for reply, way in calls:
                status, _, body = await send(getattr(pool, way), "POST", f"{peer.url}/", {"Content-Type": "a/b"}, b"x")
                assert (status, body) == REPLIES[reply]
            assert peer.connections <= 1

    asyncio.run(run())


async def test_the_connection_used_last_is_used_next_so_that_a_rush_leaves_none_in_use() -> None:
    async with serving() as peer, open_service_session() as session:
        pool = ServicePool(session)

        async def ask(place: str) -> None:
            assert (await send(pool.request, "POST", f"{peer.url}/{place}", {}, b""))[0] == 200

        await asyncio.gather(*(ask(f"rush{at}") for at in range(3)))
        for at in range(4):
            await ask(f"later{at}")
        assert peer.connections == 3 and len(set(peer.carriers[:3])) == 3
        assert len(set(peer.carriers[3:])) == 1


async def test_what_comes_before_it_was_asked_for_is_nobodys_reply() -> None:
    async with serving() as peer, open_service_session() as session:
        pool, rest = ServicePool(session), ("POST", f"{peer.url}/", {"Origin": "x"}, b"")
        assert (await send(pool.request, *rest))[0] == 200
        ((protocol, _),) = next(iter(cast(Any, session.connector)._conns.values()))
        peer.writers[0].write(OK.replace(b"200 OK", b"408 Request Timeout"))
        async with asyncio.timeout(5):
            while not protocol.should_close:
                await asyncio.sleep(0)
        with pytest.raises(aiohttp.ClientConnectionResetError):
            await send(pool.request, *rest)
        assert await send(pool.request, *rest) == (200, "text/plain", b"ok")
        assert peer.connections == 2


async def test_a_long_body_and_an_outgoing_proxy_go_the_general_way() -> None:
    async with serving(OK, OK) as peer, open_service_session() as session, open_service_session(peer.url) as proxied:
        assert (await send(ServicePool(session).request, "POST", f"{peer.url}/", {"Origin": "x"}, bytes(65_537)))[0]
        assert read_request(peer.requests[0])[2] == bytes(65_537)
        pool = ServicePool(proxied, peer.url)
        assert (await send(pool.request, "GET", "http://kimi.invalid/a", {"Origin": "x"}, b""))[0] == 200
        assert read_request(peer.requests[1])[0] == "GET http://kimi.invalid/a HTTP/1.1"


async def test_ids_in_a_token_that_no_header_can_have_are_replaced(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    ids = {"sub": "a\r\nX-Evil: 1", "ssid": "é", "device_id": ["x"]}
    claims = {"app_id": "kimi", "typ": "access", "exp": 4e9, **ids}
    access_token = ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({}, claims, "s")
    )
    token = simulator.token("hello")
    account = simulator.account(token)
    account.access_tokens.append(access_token)
    assert (await answer(http, proxy, access_token))[0] == 200
    await simulator.settle(token)
    (call,) = [call for call in account.calls if call.step == "ask"]
    sent = [call.headers[name] for name in ("x-traffic-id", "x-msh-session-id", "x-msh-device-id")]
    assert all(map(re.compile("[a-z0-9]+").fullmatch, sent)) and "X-Evil" not in call.headers
    simulator.violations.clear()  # it wants the ids that the token tells
