"""The fault matrix: one row one test. What the client sees, what is cleaned up, and that the next request works.

Each row runs streamed and whole. After each, no task and no conversation is left, no secret is in log or answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import HELLO, Simulator

CHAT = "/v1/chat/completions"


@pytest.fixture(params=["classic", "connect"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request."""

    status: int
    headers: Any
    text: str
    complete: bool

    @property
    def error(self) -> Any:
        """The error object, of the answer or of the stream's last event."""
        return json.loads(self.text.split("data: ")[-1])

    @property
    def content(self) -> str:
        """The text of a good part."""
        if not self.text.startswith(("data:", ":")):
            return str(json.loads(self.text)["choices"][0]["message"]["content"])
        chunks = [json.loads(line[6:]) for line in self.text.split("\n\n") if line.startswith("data: {")]
        return "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])


async def send(url: str, token: str, stream: bool) -> Seen:
    async with aiohttp.ClientSession() as http:
        body = chat_body("whisper", stream=stream)
        async with http.post(url + CHAT, json=body, headers=bearer(token)) as response:
            try:
                text, complete = (await response.read()).decode(), True
            except aiohttp.ClientError:
                text, complete = "", False
            return Seen(response.status, response.headers, text, complete)


@pytest.fixture(params=[True, False], ids=["streamed", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def quick_proxy(start_proxy: StartProxy) -> str:
    """A proxy with short limits, none shorter than a slow machine's own delays."""
    return await start_proxy(call_seconds=0.8, silence_seconds=0.6, answer_seconds=20.0)


@pytest.fixture(autouse=True)
async def nothing_is_left(simulator: Simulator, log_lines: LogRecorder) -> AsyncIterator[None]:
    """After each row: conversations removed once, no secret in the log, and no failure of the proxy itself."""
    yield
    for token, account in simulator._accounts.items():
        if not account.order.at("status", "remove") and account.order.at("silent", "remove") is None:
            await simulator.settle(token)
        for secret in (token, *account.access_tokens, "whisper", HELLO[:8]):
            assert secret not in log_lines.text
    assert "the proxy itself failed" not in log_lines.text


async def works_again(simulator: Simulator, url: str) -> None:
    seen = await send(url, simulator.token("hello"), False)
    assert (seen.status, seen.content) == (200, HELLO)


# Faults before the first visible chunk: order → status, code, reference's number, words that the message holds.
Row = tuple[tuple[str, ...], int, str, int, str]
BEFORE: dict[str, Row] = {
    "refresh refused": (("unauthorized-always=refresh",), 401, "token_dead", -2002, "refresh"),
    "refresh fails": (("status=refresh:500",), 502, "service_failed", -2001, "refreshing"),
    "refresh hangs": (("silent=refresh",), 504, "service_silent", -2001, "refreshing"),
    "refresh limited": (("status=refresh:429", "retry-after=9"), 429, "rate_limited", -2001, "refreshing"),
    "refresh gives HTML": (("wrong-type=refresh",), 502, "service_failed", -2001, "text/html"),
    "asking refused": (("status=ask:400",), 502, "service_refused", -2000, "ordered status 400"),
    "asking fails": (("status=ask:500",), 502, "service_failed", -2001, "[请求kimi失败]: asking"),
    "asking hangs": (("silent=ask",), 504, "service_silent", -2001, "asking"),
    "asking resets": (("close=ask",), 502, "service_failed", -2001, "asking"),
    "asking redirects": (("redirect=ask",), 502, "service_failed", -2001, "HTTP 302"),
    "asking gives HTML": (("wrong-type=ask",), 502, "service_failed", -2001, "text/html"),
    "asking gives 10 MB of HTML": (("html=ask:500",), 502, "service_failed", -2001, "text/html"),
    "asking gives JSON without end": (("bomb=ask",), 502, "service_failed", -2001, "more than"),
    "asking dead token each time": (("unauthorized-always=ask",), 401, "token_dead", -2002, "asking"),
    "another answer under way": (("error-type=ask:chat.user_stream_pushing",), 429, "answer_running", -2001, "asking"),
    "limited": (("status=ask:429", "retry-after=7"), 429, "rate_limited", -2001, "ordered status 429"),
    "error under 200": (("error-type=ask:odd.thing",), 502, "service_failed", -2001, "odd.thing"),
    "dead token under 200": (("error-type=ask:auth.token.invalid",), 401, "token_dead", -2002, "asking"),
    "silence before the first event": (("stall=0",), 504, "service_silent", -2001, "asking"),
    "reset before the first event": (("cut=0",), 502, "answer_broken", -2001, "broke"),
    "reset before the first text": (("cut=2",), 502, "answer_broken", -2001, "broke"),
}
# Connect has no opening call.
OPENING: dict[str, Row] = {
    "opening refused": (("status=open:400",), 502, "service_refused", -2000, "ordered status 400"),
    "opening forbidden": (("status=open:403",), 502, "service_refused", -2000, "ordered status 403"),
    "opening not found": (("status=open:404",), 502, "service_refused", -2000, "opening"),
    "opening fails": (("status=open:500",), 502, "service_failed", -2001, "ordered status 500"),
    "opening hangs": (("silent=open",), 504, "service_silent", -2001, "opening"),
    "opening resets": (("close=open",), 502, "service_failed", -2001, "opening"),
    "opening redirects": (("redirect=open",), 502, "service_failed", -2001, "HTTP 302"),
    "opening gives HTML": (("wrong-type=open",), 502, "service_failed", -2001, "text/html"),
    "opening gives 10 MB of HTML": (("html=open:502",), 502, "service_failed", -2001, "text/html"),
    "opening gives JSON without end": (("bomb=open",), 502, "service_failed", -2001, "more than"),
    "opening gives no id": (("no-id",), 502, "service_failed", -2001, "no id"),
    "opening dead token each time": (("unauthorized-always=open",), 401, "token_dead", -2002, "opening"),
    "opening error under 200": (("error-type=open:odd.thing",), 502, "service_failed", -2001, "odd.thing"),
}
# What connect says differently: one code for each limit.
CONNECT: dict[str, Row] = {
    "another answer under way": (("error-type=ask:chat.user_stream_pushing",), 429, "rate_limited", -2001, "asking"),
}


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("classic", name) for name in BEFORE | OPENING] + [("connect", name) for name in BEFORE],
)
async def test_a_failure_before_the_first_chunk_has_its_status(
    simulator: Simulator, quick_proxy: str, stream: bool, dialect: str, name: str
) -> None:
    rows = BEFORE | OPENING | (CONNECT if dialect == "connect" else {})
    faults, status, code, number, words = rows[name]
    token = simulator.token("hello", *faults)
    seen = await send(quick_proxy, token, stream)
    assert (seen.status, seen.error["error"]["code"], seen.error["code"]) == (status, code, number), seen.text
    assert words in seen.error["error"]["message"]
    assert seen.headers["Content-Type"].startswith("application/json")
    assert token not in seen.text
    await works_again(simulator, quick_proxy)


@pytest.mark.parametrize("script", ["empty", "hits-only", "length-empty"])
async def test_an_answer_without_text_is_no_success(
    simulator: Simulator, quick_proxy: str, stream: bool, dialect: str, script: str
) -> None:
    seen = await send(quick_proxy, simulator.token(script), stream)
    assert seen.error["error"]["code"] == "answer_empty"
    # A streamed hit is visible: from then on the failure is an event of the stream.
    assert seen.status == (200 if stream and script == "hits-only" and dialect == "classic" else 502)
    assert "[DONE]" not in seen.text and '"finish_reason":"stop"' not in seen.text
    await works_again(simulator, quick_proxy)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (("status=ask:429", "retry-after=7"), "7"),
        (("status=ask:429",), "60"),
        (("status=ask:429", "retry-after=soon"), "60"),
        (("error-type=ask:chat.user_stream_pushing",), "5"),
    ],
)
async def test_a_429_says_when_to_come_back(
    simulator: Simulator, proxy: str, dialect: str, faults: tuple[str, ...], expected: str
) -> None:
    expected = "60" if expected == "5" and dialect == "connect" else expected
    seen = await send(proxy, simulator.token("hello", *faults), False)
    assert (seen.status, seen.headers["Retry-After"]) == (429, expected)


async def test_a_second_answer_of_an_account_waits_while_the_first_goes_on(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("long", "one-at-a-time", "pace=0.02", "chunks=20")
    first = asyncio.create_task(send(proxy, token, True))
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
    second = await send(proxy, token, True)
    numbers = [str(number) for number in range(20)]
    assert second.content.split() == (await first).content.split() == numbers


# Faults after the first text.
DURING: dict[str, tuple[tuple[str, ...], str]] = {
    "reset": (("cut=5",), "answer_broken"),
    "broken chunk": (("cut-chunk=5",), "answer_broken"),
    "silence": (("stall=5",), "service_silent"),
    "an event that is no JSON": (("garbage",), "answer_broken"),
    "an event of 4 MB": (("huge-line",), "answer_broken"),
}


@pytest.mark.parametrize("name", DURING)
async def test_a_failure_in_the_middle_ends_the_stream_with_an_error(
    simulator: Simulator, quick_proxy: str, stream: bool, name: str
) -> None:
    faults, code = DURING[name]
    seen = await send(quick_proxy, simulator.token("hello", *faults), stream)
    assert seen.complete
    assert seen.error["error"]["code"] == code
    assert "[DONE]" not in seen.text and '"finish_reason":"stop"' not in seen.text
    if stream:
        assert seen.status == 200 and seen.error["choices"] == []
        assert HELLO.startswith(seen.content) and seen.content
    else:
        assert seen.status in (502, 504)
    await works_again(simulator, quick_proxy)


async def test_an_endless_answer_ends_at_its_deadline(
    simulator: Simulator, start_proxy: StartProxy, stream: bool
) -> None:
    proxy = await start_proxy(answer_seconds=0.5)
    seen = await send(proxy, simulator.token("hello", "endless"), stream)
    assert seen.error["error"]["code"] == "answer_too_long"
    assert seen.status == (200 if stream else 504)
    await works_again(simulator, proxy)


@pytest.mark.parametrize(
    ("dialect", "fault"), [("classic", "no-end"), ("classic", "half-an-event"), ("connect", "no-end")]
)
async def test_a_stream_without_its_end_keeps_its_text_and_says_length(
    simulator: Simulator, quick_proxy: str, stream: bool, dialect: str, fault: str
) -> None:
    seen = await send(quick_proxy, simulator.token("hello", fault), stream)
    assert (seen.status, seen.content) == (200, HELLO)
    assert '"finish_reason":"length"' in seen.text
    assert ("[DONE]" in seen.text) is stream


@pytest.mark.parametrize(("dialect", "step"), [("classic", "open"), ("classic", "ask"), ("connect", "ask")])
async def test_a_dead_access_token_is_refreshed_and_the_call_made_once_more(
    simulator: Simulator, proxy: str, stream: bool, dialect: str, step: str
) -> None:
    token = simulator.token("hello", f"unauthorized-once={step}")
    seen = await send(proxy, token, stream)
    assert (seen.status, seen.content) == (200, HELLO)
    account = await simulator.settle(token)
    assert (account.count("refresh"), account.count(step)) == (2, 2)


@pytest.mark.parametrize(("dialect", "step"), [("classic", "open"), ("classic", "ask"), ("connect", "ask")])
async def test_a_kept_connection_that_is_closed_costs_nothing(
    simulator: Simulator, proxy: str, stream: bool, dialect: str, step: str
) -> None:
    token = simulator.token("hello", f"close-kept={step}")
    seen = await send(proxy, token, stream)
    assert (seen.status, seen.content) == (200, HELLO)
    assert simulator.account(token).count(step) == 2


async def test_the_answering_call_is_not_repeated_on_a_new_connection(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "close=ask")
    assert (await send(proxy, token, False)).status == 502
    # Once on the kept connection that the opening left, once more on a new one, and no third time.
    assert simulator.account(token).count("ask") == 2


async def test_the_end_of_the_answer_is_not_held_back_by_an_open_upstream(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "linger")
    async with asyncio.timeout(0.9):
        seen = await send(proxy, token, True)
    assert seen.text.endswith("data: [DONE]\n\n")
    await simulator.settle(token, 3)


async def test_an_ended_answers_connection_is_used_again(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello")
    for _ in range(5):
        assert (await send(proxy, token, True)).content == HELLO
        await simulator.settle(token)
    assert simulator.connections == 1


@pytest.mark.parametrize("fault", ["status=remove:500", "silent=remove"])
async def test_a_removal_that_fails_is_logged_and_never_seen(
    simulator: Simulator, quick_proxy: str, log_lines: LogRecorder, fault: str, stream: bool
) -> None:
    token = simulator.token("hello", fault)
    async with asyncio.timeout(0.7):
        assert (await send(quick_proxy, token, stream)).content == HELLO
    await works_again(simulator, quick_proxy)
    (conversation_id,) = simulator.account(token).conversations
    await log_lines.wait_for(f"conversation {conversation_id}")
    assert simulator.account(token).count("remove") == 1


async def leave(url: str, token: str, when: Any, how: str) -> None:
    """Send a request, and go away as soon as `when` is done: the connection closed, reset, or closed on our side."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(chat_body("whisper", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await when
    if how == "half-closed":
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 5)
    if how == "reset":
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


LEAVING: dict[str, tuple[tuple[str, ...], str]] = {
    "while the token is refreshed": (("slow=refresh:0.4",), "refresh"),
    "while the conversation is opened": (("slow=open:0.4",), "open"),
    "while the answer is awaited": (("slow=ask:0.4",), "ask"),
    "before the first byte": (("silent=ask",), "ask"),
    "before the first event": (("stall=0",), "stream"),
    "before the first text": (("stall=1",), "stream"),
    "in the middle": (("stall=6",), "stream"),
    "while text flows": (("pace=0.01",), "stream"),
}


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize(
    ("dialect", "name"),
    [("classic", name) for name in LEAVING]
    + [("connect", name) for name in LEAVING if name != "while the conversation is opened"],
)
async def test_a_client_that_goes_away_stops_the_answer_and_leaves_no_conversation(
    simulator: Simulator, proxy: str, log_lines: LogRecorder, dialect: str, name: str, how: str
) -> None:
    faults, step = LEAVING[name]
    token = simulator.token("long", *faults)
    account = simulator.account(token)

    def reached() -> bool:
        return account.streams_open == 1 if step == "stream" else account.count(step) == 1

    await leave(proxy, token, simulator.wait_until(reached), how)
    if step in ("ask", "stream"):
        # In connect the stream is read on for the conversation's id, a second at most.
        await simulator.wait_until(lambda: account.streams_open == 0, 1.0 if dialect == "classic" else 2.0)
    if step == "open":
        await simulator.wait_until(lambda: len(account.conversations) == 1)
    if step == "refresh":
        await simulator.wait_until(lambda: len(account.access_tokens) == 1)
        assert not account.conversations
        assert (await send(proxy, token, False)).status == 200
        assert account.count("refresh") == 1
        assert len(account.conversations) == 1
    elif dialect == "connect" and ("silent=ask" in faults or "stall=0" in faults):
        await log_lines.wait_for("may be left")
    else:
        await simulator.wait_until(lambda: account.count("remove") == 1)
        await simulator.settle(token)
        assert account.count("remove") == 1
    await works_again(simulator, proxy)


async def test_a_client_that_never_reads_is_dropped(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(send_seconds=0.4)
    token = simulator.token("broad", "endless")
    account = simulator.account(token)
    host, port = proxy.removeprefix("http://").split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
    body = json.dumps(chat_body("whisper", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(raw, head.encode() + body)
    await simulator.wait_until(lambda: account.streams_open == 1)
    await simulator.wait_until(lambda: account.streams_open == 0, 20)
    raw.close()
    await works_again(simulator, proxy)


async def test_refused_and_unresolvable_services_are_a_502(start_proxy: StartProxy, stream: bool) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
            proxy = await start_proxy(base_url=url, auth_url=url)
            seen = await send(proxy, "hello", stream)
            assert (seen.status, seen.error["error"]["code"]) == (502, "service_unreachable")
            assert "KIMI_BASE_URL" in seen.error["error"]["message"]


async def test_a_tls_certificate_that_is_not_valid_is_a_502_and_gets_no_token(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    url = simulator.url.replace("http://", "https://")
    proxy = await start_proxy(base_url=url, auth_url=url)
    seen = await send(proxy, "hello", False)
    assert (seen.status, seen.error["code"]) == (502, -2001)
    assert not simulator._accounts


async def test_at_the_end_streams_are_told_and_removals_finished(
    simulator: Simulator, start_proxy: StartProxy, stream: bool
) -> None:
    proxy = await start_proxy(drain_seconds=0.1)
    tokens = [simulator.token("long", "stall=6") for _ in range(10)]
    clients = [asyncio.create_task(send(proxy, token, stream)) for token in tokens]
    await simulator.wait_until(lambda: all(simulator.account(token).streams_open for token in tokens))
    await start_proxy.close()
    for seen in await asyncio.gather(*clients):
        assert seen.error["error"]["code"] == "shutting_down", seen.text
        assert seen.status == (200 if stream and len(seen.text) > 400 else 503)
    assert all(simulator.account(token).settled for token in tokens)
