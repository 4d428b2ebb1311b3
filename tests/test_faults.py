"""The fault matrix: what the client sees of each fault, what is cleaned up, and that the next request works.

Rows run over both protocols, streamed and whole, where that matters. After each, while the proxy still runs, no
conversation, task, descriptor, temporary file or connection in use is left, no secret is in the log, and the next
request works. `MATRIX` names the tests of each fault, some of which stand in other files, with the same check behind
them. What needs a full disk, or no descriptors, limits a process of its own.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import HELLO, Simulator
from test_service import PROGRAM, Running, receive, start

import kimi_proxy

CHAT = "/v1/chat/completions"

# Each fault, and the tests of it.
MATRIX: dict[str, tuple[str, ...]] = {
    "the service's name cannot be resolved": ("test_a_name_that_cannot_be_resolved_is_a_502",),
    "the service refuses connections": ("test_a_refused_connection_is_a_502",),
    "the service does not answer a connection": ("test_a_service_that_answers_no_connection_is_a_504",),
    "the service's certificate is bad": ("test_a_certificate_that_is_not_valid_is_a_502_and_gets_no_token",),
    "401": ("test_a_dead_access_token_is_refreshed_and_the_call_made_once_more", "BEFORE"),
    "a refresh hangs": ("test_all_that_wait_for_a_refresh_that_hangs_share_its_failure", "BEFORE"),
    "429": ("test_a_429_says_when_to_come_back", "BEFORE"),
    "5xx, 10 MB of HTML": ("BEFORE", "OPENING", "test_memory_does_not_grow"),
    "another content type": ("BEFORE", "OPENING"),
    "silence before the head": ("BEFORE", "OPENING"),
    "silence within the answer": ("DURING", "test_a_silent_stream_has_comments_before_its_failure"),
    "a reset within the answer": ("DURING",),
    "a broken chunk": ("DURING",),
    "an end without the last event": (
        "test_a_stream_without_its_end_keeps_its_text_and_says_length",
        "test_an_answer_without_text_is_no_success",
    ),
    "characters and lines cut in two": ("test_server.py: test_the_cut_of_the_bytes_changes_nothing",),
    "an event that is no JSON": ("DURING",),
    "a line of 4 MB": ("DURING", "test_memory_does_not_grow"),
    "an endless answer": ("test_an_endless_answer_ends_at_its_deadline",),
    "a reply without end": ("BEFORE", "OPENING", "test_memory_does_not_grow"),
    "a redirect to another host": ("BEFORE", "OPENING"),
    "the client closes, resets or half-closes, which is no failure of the service": (
        "test_a_client_that_goes_away_stops_the_answer_and_leaves_no_conversation",
        "test_a_client_that_resets_amid_many_writes_is_no_failure_of_the_service",
    ),
    "the client never reads": ("test_a_client_that_never_reads_is_dropped", "test_memory_does_not_grow"),
    "the client reads slowly": (
        "test_a_slow_client_is_served_until_it_takes_nothing",
        "test_memory_does_not_grow",
    ),
    "a body stalls": ("test_a_body_that_stalls_is_a_408_and_frees_its_place",),
    "a head stalls": ("test_a_head_that_stalls_is_closed",),
    "a body is too large, or becomes so": (
        "test_server.py: test_a_hostile_body_is_the_clients_fault_and_the_next_request_works",
        "test_memory_does_not_grow",
    ),
    "a body is hostile JSON": (
        "test_server.py: test_a_hostile_body_is_the_clients_fault_and_the_next_request_works",
        "test_fuzz.py: test_any_body_is_refused_in_form",
    ),
    "request smuggling": ("test_a_smuggled_request_is_never_answered",),
    "a file's URL leads inside": (
        "test_files.py: test_no_hostile_address_gets_a_socket",
        "test_files.py: test_each_redirect_is_judged",
    ),
    "a file's origin breaks off, lies or never ends": (
        "test_files.py: test_what_an_origin_does_wrong_is_told_and_leaves_nothing",
    ),
    "the disk is full": ("test_a_full_disk_is_a_507",),
    "the storage refuses or stalls": (
        "test_files.py: test_what_the_service_does_wrong_with_a_file_is_told_and_leaves_nothing",
    ),
    "a removal fails or hangs": ("test_a_removal_that_fails_is_logged_and_never_seen",),
    "SIGTERM": ("test_at_a_signal_50_answers_end_in_good_order",),
    "SIGKILL": ("test_service.py: test_what_a_killed_process_left_open_is_removed_by_the_next_one",),
    "a second signal": (
        "test_service.py: test_a_second_signal_ends_it_at_once_and_its_conversations_are_the_next_ones_to_remove",
    ),
    "no descriptors": ("test_without_descriptors_clients_wait_and_the_loop_does_not_spin",),
    "the loop is blocked": ("test_a_blocked_loop_beats_no_more",),
    "the state directory is of no use": (
        "test_a_state_directory_of_no_use_is_told_and_the_proxy_works",
        "test_a_state_directory_full_of_garbage_is_told_and_the_proxy_works",
    ),
    "a second process on the state directory": ("test_two_proxies_on_one_state_directory_share_rotated_tokens",),
    "a restart with kept connections": ("test_a_restart_breaks_no_kept_connection",),
    "nobody takes what systemd is told": ("test_service.py: test_a_full_queue_and_a_missing_one_stop_nothing",),
}


# For rows that end before any protocol is spoken, or in which both would do the same.
one_protocol = pytest.mark.parametrize("protocol", ["connect"])


@one_protocol
def test_the_matrix_names_tests_that_exist() -> None:
    place = Path(__file__).parent
    for names in MATRIX.values():
        for name in names:
            file, _, test = name.rpartition(": ")
            text = (place / (file or "test_faults.py")).read_text("utf-8")
            assert f"def {test}(" in text or f"\n{test}: " in text, name


@pytest.fixture(params=["classic", "connect"])
def protocol(request: pytest.FixtureRequest) -> str:
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
    return await start_proxy(call_seconds=2.0, silence_seconds=2.0, answer_seconds=20.0)


@pytest.fixture(autouse=True)
async def row(
    simulator: Simulator, start_proxy: StartProxy, nothing_is_left: None, log_lines: LogRecorder
) -> AsyncIterator[None]:
    """After each row: the next request works, conversations are removed once, no secret is in the log, no failure of
    the proxy itself, and nothing is left.
    """
    yield
    for url in start_proxy.urls:
        await works_again(simulator, url)
        counts = await read_metrics(url)  # which is a request itself
        assert "kimi_proxy_requests_running 1\n" in counts and "kimi_proxy_answers_running 0\n" in counts
    for token, account in simulator._accounts.items():
        if not account.order.at("status", "remove") and account.order.at("silent", "remove") is None:
            await simulator.settle(token)
        for secret in (token, *account.access_tokens, "whisper", HELLO[:8]):
            assert secret not in log_lines.text
    assert "the proxy itself failed" not in log_lines.text


async def works_again(simulator: Simulator, url: str) -> None:
    seen = await send(url, simulator.token("hello"), False)
    assert (seen.status, seen.content) == (200, HELLO)


async def read_metrics(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        return await response.text()


# Faults before the first visible chunk: order → status, code, reference's number, words that the message holds.
Row = tuple[tuple[str, ...], int, str, int, str]
BEFORE: dict[str, Row] = {
    "refresh refused": (("unauthorized-always=refresh",), 401, "token_dead", -2002, "refresh"),
    "refresh fails": (("status=refresh:500",), 502, "service_failed", -2001, "refreshing"),
    "refresh hangs": (("silent=refresh",), 504, "service_silent", -2001, "refreshing"),
    "refresh limited": (("status=refresh:429", "retry-after=9"), 429, "rate_limited", -2001, "refreshing"),
    "refresh gives HTML": (("wrong-type=refresh",), 502, "service_failed", -2001, "text/html"),
    "asking refused": (("status=ask:400",), 502, "service_refused", -2000, "ordered status 400"),
    "asking fails": (("status=ask:500",), 502, "service_failed", -2001, "Kimi failed (asking: "),
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
    ("protocol", "name"),
    [("classic", name) for name in BEFORE | OPENING] + [("connect", name) for name in BEFORE],
)
async def test_a_failure_before_the_first_chunk_has_its_status(
    simulator: Simulator, quick_proxy: str, stream: bool, protocol: str, name: str
) -> None:
    rows = BEFORE | OPENING | (CONNECT if protocol == "connect" else {})
    faults, status, code, number, words = rows[name]
    token = simulator.token("hello", *faults)
    seen = await send(quick_proxy, token, stream)
    assert (seen.status, seen.error["error"]["code"], seen.error["code"]) == (status, code, number), seen.text
    assert words in seen.error["error"]["message"]
    assert seen.headers["Content-Type"].startswith("application/json")
    assert token not in seen.text


@pytest.mark.parametrize(
    ("protocol", "fault", "may_be_left"),
    [
        ("classic", "close=open", True),
        ("classic", "silent=open", True),
        ("classic", "no-id", True),
        ("classic", "status=open:500", False),
        ("classic", "close=ask", False),
        ("connect", "close=ask", True),
        ("connect", "silent=ask", True),
        ("connect", "wrong-type=ask", False),
        ("connect", "status=ask:429", False),
        ("connect", "cut=0", True),
        ("connect", "cut=2", False),
    ],
)
async def test_a_conversation_whose_id_is_lost_with_the_connection_is_counted_and_logged(
    simulator: Simulator, quick_proxy: str, log_lines: LogRecorder, fault: str, may_be_left: bool
) -> None:
    await send(quick_proxy, simulator.token("hello", fault), False)
    await works_again(simulator, quick_proxy)
    assert ("may be left: its id was not read" in log_lines.text) is may_be_left
    assert f"kimi_proxy_removals_failed_total {may_be_left:d}\n" in await read_metrics(quick_proxy)


@pytest.mark.parametrize("script", ["empty", "hits-only", "length-empty"])
async def test_an_answer_without_text_is_no_success(
    simulator: Simulator, quick_proxy: str, stream: bool, protocol: str, script: str
) -> None:
    seen = await send(quick_proxy, simulator.token(script), stream)
    assert seen.error["error"]["code"] == "answer_empty"
    # A streamed hit is visible: from then on the failure is an event of the stream.
    assert seen.status == (200 if stream and script == "hits-only" and protocol == "classic" else 502)
    assert "[DONE]" not in seen.text and '"finish_reason":"stop"' not in seen.text


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
    simulator: Simulator, proxy: str, protocol: str, faults: tuple[str, ...], expected: str
) -> None:
    expected = "60" if expected == "5" and protocol == "connect" else expected
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
    "broken chunk": (("cut-chunk=5",), "service_silent"),  # aiohttp's reader is not told (3.14.5)
    "silence": (("stall=5",), "service_silent"),
    "an event that is no JSON": (("garbage",), "answer_broken"),
    "an event of 4 MB": (("huge-line",), "answer_broken"),
}


@pytest.mark.parametrize("name", DURING)
async def test_a_failure_in_the_middle_ends_the_stream_with_an_error(
    simulator: Simulator, quick_proxy: str, log_lines: LogRecorder, stream: bool, name: str
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
        assert seen.status in (502, 504) and HELLO[:4] not in seen.text
    assert "never" not in log_lines.text and "oops" not in log_lines.text  # what the broken events say


async def test_a_silent_stream_has_comments_before_its_failure(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.1, silence_seconds=2.0)
    seen = await send(proxy, simulator.token("hello", "stall=5"), True)
    text, _, rest = seen.text.partition("\n\n:")
    assert text.startswith("data: {") and rest.count("\n\n:") >= 1
    assert seen.error["error"]["code"] == "service_silent" and "[DONE]" not in seen.text


async def test_an_endless_answer_ends_at_its_deadline(
    simulator: Simulator, start_proxy: StartProxy, stream: bool
) -> None:
    proxy = await start_proxy(answer_seconds=2.0)
    seen = await send(proxy, simulator.token("hello", "endless"), stream)
    assert seen.error["error"]["code"] == "answer_too_long"
    assert seen.status == (200 if stream else 504)


@pytest.mark.parametrize(
    ("protocol", "fault"), [("classic", "no-end"), ("classic", "half-an-event"), ("connect", "no-end")]
)
async def test_a_stream_without_its_end_keeps_its_text_and_says_length(
    simulator: Simulator, quick_proxy: str, stream: bool, protocol: str, fault: str
) -> None:
    seen = await send(quick_proxy, simulator.token("hello", fault), stream)
    assert (seen.status, seen.content) == (200, HELLO)
    assert '"finish_reason":"length"' in seen.text
    assert ("[DONE]" in seen.text) is stream


@pytest.mark.parametrize(("protocol", "step"), [("classic", "open"), ("classic", "ask"), ("connect", "ask")])
async def test_a_dead_access_token_is_refreshed_and_the_call_made_once_more(
    simulator: Simulator, proxy: str, stream: bool, protocol: str, step: str
) -> None:
    token = simulator.token("hello", f"unauthorized-once={step}")
    seen = await send(proxy, token, stream)
    assert (seen.status, seen.content) == (200, HELLO)
    account = await simulator.settle(token)
    assert (account.count("refresh"), account.count(step)) == (2, 2)


@pytest.mark.parametrize(("protocol", "step"), [("classic", "open"), ("classic", "ask"), ("connect", "ask")])
async def test_a_kept_connection_that_is_closed_costs_nothing(
    simulator: Simulator, proxy: str, stream: bool, protocol: str, step: str
) -> None:
    token = simulator.token("hello", f"close-kept={step}")
    seen = await send(proxy, token, stream)
    assert (seen.status, seen.content) == (200, HELLO)
    assert simulator.account(token).count(step) == 2


@pytest.mark.parametrize("protocol", ["classic"])
async def test_a_refresh_bears_a_kept_connection_that_is_closed(
    simulator: Simulator, proxy: str, protocol: str
) -> None:
    assert (await send(proxy, simulator.token("hello"), False)).status == 200
    token = simulator.token("hello", "close-kept=refresh")
    assert (await send(proxy, token, False)).status == 200
    assert simulator.account(token).count("refresh") == 2


async def test_the_answering_call_is_not_repeated_on_a_new_connection(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "close=ask")
    assert (await send(proxy, token, False)).status == 502
    # Once on the kept connection that the opening left, once more on a new one, and no third time.
    assert simulator.account(token).count("ask") == 2


async def test_the_end_of_the_answer_is_not_held_back_by_an_open_upstream(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "linger")
    seen = await send(proxy, token, True)
    assert seen.text.endswith("data: [DONE]\n\n") and simulator.account(token).streams_open == 1
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
    async with asyncio.timeout(1.5):  # less than the removal may take
        assert (await send(quick_proxy, token, stream)).content == HELLO
    await works_again(simulator, quick_proxy)
    (conversation_id,) = simulator.account(token).conversations
    await log_lines.wait_for(f"conversation {conversation_id}")
    assert simulator.account(token).count("remove") == 1


def split_address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def chat_bytes(token: str, stream: bool, **fields: Any) -> bytes:
    """A chat request as it goes over the wire."""
    body = json.dumps(chat_body("whisper", stream=stream, **fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def leave(url: str, token: str, when: Any, how: str, stream: bool) -> None:
    """Send a request, and go away as soon as `when` is done: the connection closed, reset, or closed on our side."""
    reader, writer = await asyncio.open_connection(*split_address(url))
    writer.write(chat_bytes(token, stream))
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
    "long before the answer comes": (("slow=ask:1.5",), "ask"),
    "before the first byte": (("silent=ask",), "ask"),
    "before the first event": (("stall=0",), "stream"),
    "before the first text": (("stall=1",), "stream"),
    "in the middle": (("stall=6",), "stream"),
    "while text flows": (("pace=0.01",), "stream"),
}


@pytest.mark.parametrize(
    ("how", "stream"), [("closed", True), ("reset", True), ("half-closed", True), ("closed", False)]
)
@pytest.mark.parametrize(
    ("protocol", "name"),
    [("classic", name) for name in LEAVING]
    + [("connect", name) for name in LEAVING if name != "while the conversation is opened"],
)
async def test_a_client_that_goes_away_stops_the_answer_and_leaves_no_conversation(
    simulator: Simulator, proxy: str, log_lines: LogRecorder, protocol: str, name: str, how: str, stream: bool
) -> None:
    faults, step = LEAVING[name]
    token = simulator.token("long", *faults)
    account = simulator.account(token)

    def reached() -> bool:
        return account.streams_open == 1 if step == "stream" else account.count(step) == 1

    await leave(proxy, token, simulator.wait_until(reached), how, stream)
    if step in ("ask", "stream"):
        # In connect the stream is read on for the id, some seconds at most; silence is borne for minutes.
        await simulator.wait_until(lambda: account.streams_open == 0, 10.0)
    if step == "open":
        await simulator.wait_until(lambda: len(account.conversations) == 1)
    if step == "refresh":
        await simulator.wait_until(lambda: len(account.access_tokens) == 1)
        assert not account.conversations
        assert (await send(proxy, token, False)).status == 200
        assert account.count("refresh") == 1
        assert len(account.conversations) == 1
    elif protocol == "connect" and ("silent=ask" in faults or "stall=0" in faults):
        await log_lines.wait_for("may be left", 10.0)
    else:
        await simulator.wait_until(lambda: account.count("remove") == 1)
        await simulator.settle(token)
        assert account.count("remove") == 1
    # The client's own end is never told as a failure of the service's, though aiohttp raises the same for both.
    assert "POST /v1/chat/completions status=499 " in log_lines.text
    assert " answer_broken" not in log_lines.text and " service_failed" not in log_lines.text
    assert "failures_total{" not in await read_metrics(proxy)


async def test_a_client_that_resets_amid_many_writes_is_no_failure_of_the_service(
    simulator: Simulator, proxy: str, log_lines: LogRecorder
) -> None:
    """Its end shows in a write, then, before the loop tells of it."""
    for _ in range(12):
        account = simulator.account(token := simulator.token("long", "chunks=4000", "steady"))
        with socket.create_connection(split_address(proxy)) as raw:
            raw.setblocking(False)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.get_running_loop().sock_sendall(raw, chat_bytes(token, True))
            await asyncio.get_running_loop().sock_recv(raw, 65_536)
        await simulator.wait_until(lambda one=account: one.streams_open == 0)  # type: ignore[misc]
    assert " answer_broken" not in log_lines.text and " service_failed" not in log_lines.text
    assert "failures_total{" not in await read_metrics(proxy)


@contextmanager
def small_window(url: str, size_bytes: int) -> Iterator[socket.socket]:
    """A connection whose client takes little in advance."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)
        raw.connect(split_address(url))
        raw.setblocking(False)
        yield raw


async def test_a_client_that_never_reads_is_dropped(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, stream: bool
) -> None:
    proxy = await start_proxy(SEND_SECONDS=0.4)
    token = simulator.token("broad", "endless")
    account = simulator.account(token)
    with small_window(proxy, 4096) as raw:
        # A whole answer has to end, and be larger than what the system holds for the client.
        limits = {} if stream else {"max_tokens": 300_000}
        await asyncio.get_running_loop().sock_sendall(raw, chat_bytes(token, stream, **limits))
        await simulator.wait_until(lambda: account.streams_open == 1)
        await simulator.wait_until(lambda: account.streams_open == 0, 20)
        await log_lines.wait_for("read nothing", 20)


@one_protocol
async def test_a_slow_client_is_served_until_it_takes_nothing(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(SEND_SECONDS=1.5)
    account = simulator.account(token := simulator.token("broad", "endless"))
    loop = asyncio.get_running_loop()
    with small_window(proxy, 65_536) as raw:
        await loop.sock_sendall(raw, chat_bytes(token, True))
        until = loop.time() + 3.0  # much longer than a client may take nothing, too short to take all there is
        while loop.time() < until:
            assert await loop.sock_recv(raw, 16_384)
            await asyncio.sleep(0.04)
        assert account.streams_open == 1 and "read nothing" not in log_lines.text
        await log_lines.wait_for("read nothing", 20)
        await simulator.wait_until(lambda: account.streams_open == 0)


@one_protocol
async def test_nothing_follows_the_end_of_an_answer_that_shutdown_finds_unread(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, finish = web.StreamResponse.prepare, kimi_proxy.ChatEncoder.finish
    transports: list[asyncio.Transport] = []

    async def take_all(self: web.StreamResponse, request: web.BaseRequest) -> Any:
        if request.path == CHAT:
            transports.append(cast(asyncio.Transport, request.transport))
            transports[0].set_write_buffer_limits(high=1 << 24)
        return await prepare(self, request)

    def wait_for_the_client(self: kimi_proxy.ChatEncoder) -> bytes:
        transports[0].set_write_buffer_limits(high=0)
        return finish(self)

    monkeypatch.setattr(web.StreamResponse, "prepare", take_all)
    monkeypatch.setattr(kimi_proxy.ChatEncoder, "finish", wait_for_the_client)
    proxy, loop = await start_proxy(), asyncio.get_running_loop()
    account = simulator.account(token := simulator.token("long", "chunks=2000"))
    with small_window(proxy, 4096) as raw:
        await loop.sock_sendall(raw, chat_bytes(token, True, model="k" * 256))  # each chunk repeats it
        await simulator.wait_until(lambda: account.count("remove") == 1)
        assert f"POST {CHAT} " not in log_lines.text
        stopping = asyncio.create_task(start_proxy.close())
        await log_lines.wait_for(f"POST {CHAT} ")
        answer = b""
        while data := await loop.sock_recv(raw, 65_536):
            answer += data
        await stopping
    assert answer.count(b"HTTP/1.1") == 1 and b"shutting_down" not in answer
    assert answer.partition(b"data: [DONE]\n\n")[2] == b"\r\n0\r\n\r\n"


async def test_what_was_begun_is_sent_whole_though_the_shutdown_ends_it(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, stream: bool
) -> None:
    proxy, loop = await start_proxy(drain_seconds=0.2), asyncio.get_running_loop()
    account = simulator.account(token := simulator.token("broad", "endless"))
    with small_window(proxy, 4096) as raw:
        await loop.sock_sendall(raw, chat_bytes(token, stream, max_tokens=300_000))
        await simulator.wait_until(lambda: account.count("ask") == 1 and (stream or account.streams_open == 0), 20)
        if stream:
            await loop.sock_recv(raw, 100)
        stopping = asyncio.create_task(start_proxy.close())
        await log_lines.wait_for(f"POST {CHAT} ", 10)
        answer = b""
        while data := await loop.sock_recv(raw, 65_536):
            answer += data
        await stopping
    head, _, body = answer.partition(b"\r\n\r\n")
    if stream:
        text = re.sub(rb"(?:\r\n|\A)[0-9a-f]+\r\n", b"", body)  # without the lines of the transfer coding
        events = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: ")]
        assert events[-1]["error"]["code"] == "shutting_down"
    else:
        assert f"Content-Length: {len(body)}".encode() in head and len(body) > 1_000_000


async def read_to_the_end(url: str, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes after `data`, until the proxy closes the connection."""
    reader, writer = await asyncio.open_connection(*split_address(url))
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.close()


@one_protocol
async def test_a_body_that_stalls_is_a_408_and_frees_its_place(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(BODY_SECONDS=1.0, max_requests=1)
    answer = await read_to_the_end(proxy, chat_bytes("hello", True)[:-1])
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer


@one_protocol
@pytest.mark.parametrize("head", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost:", b"GET /ping HTTP/1.1\r\nA: b\r\n"])
async def test_a_head_that_stalls_is_closed(start_proxy: StartProxy, head: bytes) -> None:
    proxy = await start_proxy(IDLE_SECONDS=1.0)
    assert b" 200 " not in await read_to_the_end(proxy, head)
    served = await read_to_the_end(proxy, b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" + head)  # on a kept connection too
    assert served.count(b"HTTP/1.1") == 1


# What a server in front of the proxy may take for one request, and the proxy for two (RFC 9112, section 11.2).
INNER = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Inner: sesame-open\r\n\r\n"
SMUGGLED: dict[str, tuple[bytes, bytes]] = {
    "a length, then chunks": (b"Content-Length: %d\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + INNER),
    "chunks, then a length": (
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"%x\r\n" % len(INNER) + INNER + b"\r\n0\r\n\r\n",
    ),
    "two codings, one of them odd": (
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: sesame-open",
        b"0\r\n\r\n" + INNER,
    ),
    "two lengths": (b"Content-Length: 2\r\nContent-Length: %d", b"{}" + INNER),
    "a blank before the colon": (b"Content-Length: %d\r\nTransfer-Encoding : chunked", b"0\r\n\r\n" + INNER),
}


@one_protocol
@pytest.mark.parametrize("name", SMUGGLED)
async def test_a_smuggled_request_is_never_answered(proxy: str, log_lines: LogRecorder, name: str) -> None:
    framing, body = SMUGGLED[name]
    framing = framing % len(body) if b"%d" in framing else framing
    head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame-open\r\n" + framing
    answer = await read_to_the_end(proxy, head + b"\r\n\r\n" + body)
    assert answer.count(b"HTTP/1.") == (answer[8:13] == b" 400 ") and b"pong" not in answer
    assert "sesame" not in log_lines.text


@pytest.fixture
def free_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def works_once_the_service_does(start_proxy: StartProxy, proxy: str, service: Simulator, url: str) -> None:
    """The service comes up at the address where it was missed, and the proxy finds it."""
    async with service:
        service.url = url
        await works_again(service, proxy)
        await start_proxy.close()


async def test_a_refused_connection_is_a_502(start_proxy: StartProxy, stream: bool, free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"
    proxy = await start_proxy(base_url=url, auth_url=url)
    seen = await send(proxy, "hello", stream)
    assert (seen.status, seen.error["error"]["code"]) == (502, "service_unreachable")
    assert "KIMI_BASE_URL" in seen.error["error"]["message"]
    await works_once_the_service_does(start_proxy, proxy, Simulator(port=free_port), url)


async def test_a_name_that_cannot_be_resolved_is_a_502(
    start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, stream: bool, free_port: int
) -> None:
    known: list[str] = []

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://kimi.test:{free_port}"
    proxy = await start_proxy(base_url=url, auth_url=url)
    seen = await send(proxy, "hello", stream)
    assert (seen.status, seen.error["error"]["code"]) == (502, "service_unreachable")
    assert "kimi.test cannot be resolved" in seen.error["error"]["message"]
    known.append("kimi.test")
    await works_once_the_service_does(start_proxy, proxy, Simulator(port=free_port), url)


@contextmanager
def black_hole(port: int) -> Iterator[None]:
    """Whoever connects to `port` gets no answer at all: its queue is full, and nobody accepts."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        with suppress(TimeoutError):
            while True:
                waiting = stack.enter_context(socket.socket())
                waiting.settimeout(0.1)
                waiting.connect(("127.0.0.1", port))
        yield


async def test_a_service_that_answers_no_connection_is_a_504(
    start_proxy: StartProxy, stream: bool, free_port: int
) -> None:
    url = f"http://127.0.0.1:{free_port}"
    proxy = await start_proxy(base_url=url, auth_url=url, call_seconds=2.0)
    with black_hole(free_port):
        seen = await send(proxy, "hello", stream)
    assert (seen.status, seen.error["error"]["code"]) == (504, "service_silent")
    await works_once_the_service_does(start_proxy, proxy, Simulator(port=free_port), url)


@pytest.fixture
def bad_certificate(tmp_path: Path) -> ssl.SSLContext:
    """What a server has that nobody vouches for."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    try:
        subprocess.run(
            [*command, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
            + ["-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.fail("this needs the program openssl, to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def test_a_certificate_that_is_not_valid_is_a_502_and_gets_no_token(
    start_proxy: StartProxy, bad_certificate: ssl.SSLContext, stream: bool
) -> None:
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0, ssl=bad_certificate) as server:
        url = "https://{}:{}".format(*server.sockets[0].getsockname())
        proxy = await start_proxy(base_url=url, auth_url=url)
        seen = await send(proxy, "hello", stream)
        assert (seen.status, seen.error["error"]["code"]) == (502, "service_unreachable")
        assert "certificate is not valid" in seen.error["error"]["message"]
        assert b"".join(heard) == b""
        await start_proxy.close()


async def test_all_that_wait_for_a_refresh_that_hangs_share_its_failure(
    simulator: Simulator, quick_proxy: str, protocol: str
) -> None:
    token = simulator.token("hello", "silent=refresh")
    account = simulator.account(token)
    answers = await asyncio.gather(*(send(quick_proxy, token, number % 2 == 0) for number in range(30)))
    assert {(seen.status, seen.error["error"]["code"]) for seen in answers} == {(504, "service_silent")}
    assert account.count("refresh") == (1 if protocol == "classic" else 2)  # by the new call, then by the old one
    account.order.faults.pop("silent")
    seen = await send(quick_proxy, token, False)
    assert (seen.status, seen.content) == (200, HELLO)


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


# A proxy as a process of its own, whose limits and memory can be seen and set.


class StartAlone:
    """Starts proxies as processes."""

    def __init__(self, simulator: Simulator, protocol: str) -> None:
        self._simulator = simulator
        self._protocol = protocol
        self.started: list[Running] = []

    async def __call__(
        self, *, listener: socket.socket | None = None, program: Sequence[str] = PROGRAM[1:], **environment: str
    ) -> Running:
        """A proxy on a port of its own, or on the one that it is handed."""
        service = {"KIMI_AUTH_URL": self._simulator.url, "KIMI_PROTOCOL": self._protocol}
        started = await start(self._simulator, listener=listener, program=program, **service, **environment)
        self.started.append(started)
        return self.started[-1]


@pytest.fixture
async def start_alone(simulator: Simulator, protocol: str) -> AsyncIterator[StartAlone]:
    """Starts proxies as processes, which the tests end; one that a failed test leaves is killed."""
    starting = StartAlone(simulator, protocol)
    yield starting
    for running in starting.started:
        if running.process.returncode is None:
            await running.stop(signal.SIGKILL)


def count_descriptors(running: Running) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def read_busy_seconds(running: Running) -> float:
    """For how long its main thread ran, or could have run and waited for a core: the same on a machine that is busy."""
    ran, waited, _ = Path(f"/proc/{running.process.pid}/schedstat").read_text().split()
    return (int(ran) + int(waited)) / 1e9


def read_peak_bytes(running: Running) -> int:
    """The process's peak memory since `forget_peak`."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak(running: Running) -> None:
    Path(f"/proc/{running.process.pid}/clear_refs").write_text("5")


async def wait_for_descriptors(running: Running, most: int) -> None:
    """Return once the process has no more descriptors than `most`. Raises `TimeoutError`."""
    async with asyncio.timeout(5):
        while count_descriptors(running) > most:
            await asyncio.sleep(0.02)


async def send_body(url: str, pieces: AsyncIterator[bytes], **headers: str) -> None:
    """Send a body that is too large; the proxy may close before it has all of it."""
    with suppress(aiohttp.ClientConnectionError):
        async with (
            aiohttp.ClientSession() as http,
            http.post(url + CHAT, data=pieces, headers=bearer("hello") | headers) as response,
        ):
            assert response.status == 413


async def repeat(piece: bytes, times: int) -> AsyncIterator[bytes]:
    for _ in range(times):
        yield piece


async def test_memory_does_not_grow(simulator: Simulator, start_alone: StartAlone) -> None:
    impatient = "import sys, kimi_proxy; kimi_proxy.SEND_SECONDS = 1; sys.exit(kimi_proxy.main([]))"
    running = await start_alone(program=["-c", impatient], PROXY_MAX_INLINE_MB="1")
    await works_again(simulator, running.url)

    async def ask(*faults: str) -> None:
        assert "error" in (await send(running.url, simulator.token("hello", *faults), True)).text

    async def never_read(script: str, read_bytes: int) -> None:
        account = simulator.account(token := simulator.token(script, "endless"))
        with small_window(running.url, 4096) as raw:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(raw, chat_bytes(token, True))
            await simulator.wait_until(lambda: account.streams_open == 1)
            while account.streams_open:
                if read_bytes:
                    with suppress(ConnectionError):
                        await loop.sock_recv(raw, read_bytes)
                await asyncio.sleep(0.05)

    zeros = gzip.compress(bytes(100 << 20), 1)
    rows: dict[str, Awaitable[None]] = {
        "65 MB of JSON": ask("bomb=ask"),
        "10 MB of HTML": ask("html=ask:500"),
        "4 MB in a line": ask("huge-line"),
        "65 MB as body": send_body(running.url, repeat(bytes(65_536), 1000)),
        "100 MB of zeros in gzip": send_body(running.url, repeat(zeros, 1), **{"Content-Encoding": "gzip"}),
        "never reads": never_read("broad", 0),
        "reads 20 bytes in a second": never_read("broad", 1),
    }
    grown = {}
    for name, row in rows.items():
        forget_peak(running)
        before = read_peak_bytes(running)
        await row
        grown[name] = (read_peak_bytes(running) - before) >> 20
    await works_again(simulator, running.url)
    assert (await running.stop())[0] == 0
    assert all(megabytes < 12 for megabytes in grown.values()), grown


@one_protocol
async def test_a_full_disk_is_a_507(simulator: Simulator, start_alone: StartAlone, tmp_path: Path) -> None:
    """The process may write no file of more than 100 kB, as its limit RLIMIT_FSIZE says."""
    running = await start_alone(PROXY_SPOOL_DIR=str(tmp_path), PROXY_ALLOW_PRIVATE_URLS="1")
    await works_again(simulator, running.url)
    before = count_descriptors(running)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    token = simulator.token("read")
    part = {"type": "file", "file_url": {"url": f"{simulator.origin_url}/300000+no-length/a.pdf"}}
    form = aiohttp.FormData({"purpose": "assistants"})
    form.add_field("file", bytes(300_000), filename="a.pdf")
    requests: dict[str, dict[str, Any]] = {
        CHAT: {"json": {"messages": [{"role": "user", "content": [part]}]}},
        "/v1/files": {"data": form},
    }
    async with aiohttp.ClientSession(headers=bearer(token)) as http:
        for path, request in requests.items():
            async with http.post(running.url + path, **request) as response:
                answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (507, "spool_full")
            assert "File too large" in answer["error"]["message"]
    await wait_for_descriptors(running, before)
    assert os.listdir(tmp_path) == []
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    async with (
        aiohttp.ClientSession(headers=bearer(token)) as http,
        http.post(running.url + CHAT, **requests[CHAT]) as response,
    ):
        assert response.status == 200
    assert simulator.account(token).count("ask") == 1
    await simulator.settle(token)
    await wait_for_descriptors(running, before)
    assert (await running.stop())[0] == 0


async def test_at_a_signal_50_answers_end_in_good_order(simulator: Simulator, start_alone: StartAlone) -> None:
    running = await start_alone(PROXY_DRAIN_SECONDS="4")
    finishing = [simulator.token("long", "pace=0.05", "chunks=30") for _ in range(20)]
    stalling = [simulator.token("long", "stall=6") for _ in range(30)]
    tokens = [*finishing, *stalling]
    clients = [asyncio.create_task(send(running.url, token, at % 2 == 0)) for at, token in enumerate(tokens)]
    await simulator.wait_until(lambda: all(simulator.account(token).streams_open for token in tokens), 20)
    status, log = await running.stop(signal.SIGTERM)
    answers = await asyncio.gather(*clients)
    assert status == 0, log
    for seen in answers[: len(finishing)]:
        assert seen.status == 200 and seen.content.split()[-1] == "29"
    for at, seen in enumerate(answers[len(finishing) :]):
        is_stream = at % 2 == 0
        assert (seen.status, seen.error["error"]["code"]) == (200 if is_stream else 503, "shutting_down")
        assert "[DONE]" not in seen.text and (is_stream or "Retry-After" in seen.headers)
    assert all(simulator.account(token).settled for token in tokens)
    assert "Traceback" not in log and "\n    at " not in log


@one_protocol
async def test_without_descriptors_clients_wait_and_the_loop_does_not_spin(
    simulator: Simulator, start_alone: StartAlone
) -> None:
    """The process may open few descriptors more than it has, as its limit RLIMIT_NOFILE says."""
    running = await start_alone(PYTHONASYNCIODEBUG="")  # else each try to accept stores a stack
    await works_again(simulator, running.url)
    limit = count_descriptors(running) + 5
    resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    with ExitStack() as stack:
        waiting = [stack.enter_context(socket.create_connection(split_address(running.url))) for _ in range(14)]
        async with asyncio.timeout(5):
            while count_descriptors(running) < limit:
                await asyncio.sleep(0.02)
        waiting[-1].setblocking(False)
        waiting[-1].send(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        before = read_busy_seconds(running)
        with pytest.raises(TimeoutError):  # it is not served, and the loop sleeps while it cannot be
            async with asyncio.timeout(3):
                await asyncio.get_running_loop().sock_recv(waiting[-1], 100)
        assert read_busy_seconds(running) - before < 1.5  # a loop that spins is busy all the time
        for one in waiting[:-1]:
            one.close()
        async with asyncio.timeout(10):
            assert (await asyncio.get_running_loop().sock_recv(waiting[-1], 100)).startswith(b"HTTP/1.1 200 ")
    await works_again(simulator, running.url)
    status, log = await running.stop()
    assert status == 0 and "socket.accept() out of system resource" in log, log
    assert len(log.splitlines()) < 20


@one_protocol
async def test_a_blocked_loop_beats_no_more(simulator: Simulator, start_alone: StartAlone, tmp_path: Path) -> None:
    """Nobody reads the log any more, and so its next line blocks the loop."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as queue:
        queue.bind(str(tmp_path / "notify"))
        queue.setblocking(False)
        place = str(tmp_path / "notify")
        running = await start_alone(NOTIFY_SOCKET=place, WATCHDOG_USEC="100000", PROXY_LOG_LEVEL="debug")
        await receive(queue, "WATCHDOG=1")
        assert running.process.stderr is not None
        token = simulator.token("long", "chunks=8000")
        client = asyncio.create_task(send(running.url, token, True))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                while True:
                    await receive(queue, "WATCHDOG=1", 1.0)  # twenty times what it takes
        assert not client.done()
        reading = asyncio.create_task(running.process.stderr.read())
        assert await receive(queue, "WATCHDOG=1")
        assert "[DONE]" in (await client).text
        await works_again(simulator, running.url)
        running.process.send_signal(signal.SIGTERM)
        assert b"shutting down" in await asyncio.wait_for(reading, 20)
        assert await running.process.wait() == 0
    await simulator.settle(token)


@one_protocol
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/self/task"])  # in the last not even root may write
async def test_a_state_directory_of_no_use_is_told_and_the_proxy_works(
    simulator: Simulator, start_alone: StartAlone, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    running = await start_alone(PROXY_STATE_DIR=str(tmp_path / place))
    token = simulator.token("hello", "rotate")
    for _ in range(2):
        assert (await send(running.url, token, False)).content == HELLO
    await simulator.settle(token)
    assert simulator.account(token).count("refresh") == 1
    status, log = await running.stop()
    assert status == 0 and log.count("state cannot be kept in") == 1, log
    assert log.index("state cannot be kept in") < log.index(" POST "), log
    assert "Traceback" not in log and "\n    at " not in log and token not in log, log


@one_protocol
async def test_words_from_outside_are_harmless_and_short_in_the_log(
    simulator: Simulator, start_alone: StartAlone
) -> None:
    evil = "a\x1b[2J\x07\x9b1m\u202eb\u2066\u2028c\x7f"
    cut = "eyJhbGciOiJIUzI1NiJ9"
    for form in ("text", "json"):
        running = await start_alone(PROXY_LOG_FORMAT=form)
        token = simulator.token("hello")
        async with aiohttp.ClientSession(headers=bearer(token)) as http:
            for name in (evil, cut, f"{cut}.e30.c2ln", "sk-" + "k" * 20, "long " * 20):
                async with http.get(f"{running.url}/{quote(name)}") as response:
                    assert response.status == 404
                body = chat_body(model=name, tools=[{"type": name}])
                async with http.post(running.url + CHAT, json=body) as response:
                    assert response.status == 200
        await simulator.settle(token)
        status, log = await running.stop()
        assert status == 0 and log.count("is not known, ") == 5, log
        assert all(one.isprintable() or one == "\n" for one in log)
        assert not any(word in log for word in (cut, "kkkk", "long " * 5)) and "long " * 4 in log


def spoil_files(directory: Path, garbage: bytes) -> int:
    """Write `garbage` into each file below `directory`, and return their number."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(garbage)
    return len(files)


@one_protocol
async def test_a_state_directory_full_of_garbage_is_told_and_the_proxy_works(
    simulator: Simulator, start_alone: StartAlone, tmp_path: Path
) -> None:
    token = simulator.token("hello")
    for garbage in (b"\xff{", b"[" * 100_000, b"{}"):
        running = await start_alone(PROXY_STATE_DIR=str(tmp_path))
        for fields in ({}, {"conversation_id": "new"}):
            async with (
                aiohttp.ClientSession(headers=bearer(token)) as http,
                http.post(running.url + CHAT, json=chat_body("whisper", **fields)) as response,
            ):
                assert response.status == 200
        status, log = await running.stop()
        assert status == 0 and "Traceback" not in log and " at " not in log and token not in log, log
        (tmp_path / "conversations-127.0.0.1" / "1-x").touch()  # of a process that died
        assert spoil_files(tmp_path, garbage) >= 2
    assert "cannot be read (" in log
    for conversation in simulator.account(token).conversations.values():
        conversation.removed = 1  # those that were to be kept, too


async def test_two_proxies_on_one_state_directory_share_rotated_tokens(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    proxies = [await start_proxy(state_dir=str(state)) for _ in range(2)]
    token = simulator.token("hello", "rotate")
    for proxy in (*proxies, *proxies):
        assert (await send(proxy, token, False)).content == HELLO
    assert simulator.account(token).count("refresh") == 1
    await simulator.settle(token)
    await start_proxy.close()  # while they run, each holds its list of open conversations


@one_protocol
async def test_a_restart_breaks_no_kept_connection(simulator: Simulator, start_alone: StartAlone) -> None:
    """With a socket of systemd's: clients that keep their connections, and repeat no POST, notice nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        first = await start_alone(listener=listener)
        counts = [0] * 4
        done = asyncio.Event()

        async def keep_asking(at: int) -> None:
            token = simulator.token("hello")
            async with aiohttp.ClientSession(headers=bearer(token)) as http:
                while not done.is_set():
                    async with http.post(first.url + CHAT, json=chat_body("whisper", stream=at % 2 == 0)) as response:
                        assert response.status == 200 and '"finish_reason":"stop"' in await response.text()
                    counts[at] += 1

        async def wait_for_more(number: int) -> None:
            until = [count + number for count in counts]
            async with asyncio.timeout(20):
                while any(count < least for count, least in zip(counts, until, strict=True)):
                    assert not any(task.done() for task in asking)
                    await asyncio.sleep(0.01)

        asking = [asyncio.create_task(keep_asking(at)) for at in range(4)]
        await wait_for_more(3)
        assert (await first.stop())[0] == 0
        second = await start_alone(listener=listener)
        await wait_for_more(3)
        done.set()
        await asyncio.gather(*asking)
        assert (await second.stop())[0] == 0
