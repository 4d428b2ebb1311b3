"""What is cheap to send keeps nobody waiting: neither a client nor the service stops the loop, whatever it sends.

The proxy is a process of its own. While a hostile request runs, a second client asks `/ping`, and what the proxy works
between question and answer is what a client would wait for on an idle machine. The service is a few canned replies, as
the simulator would take longer to make them than the proxy to read them.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from kimi_simulator import Simulator
from test_faults import read_peak_bytes, small_window
from test_service import Running, start

from kimi_proxy import (
    ChatRequest,
    ClassicAnswer,
    ConnectAnswer,
    EnvelopeParser,
    ProxyError,
    SSEParser,
    decode_base64,
    estimate_tokens,
    name_file,
    parse_chat_request,
    parse_messages_request,
    parse_models,
    parse_responses_request,
    quote_words,
    read_claims,
    read_pasted_token,
    read_pasted_tokens,
    render_prompt,
)

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(180)]

MOST_SECONDS = 1.0  # of work between a `/ping` and its answer: three times what is aimed at
CHAT, MESSAGES, FILES = "/v1/chat/completions", "/v1/messages", "/v1/files"
TOKENS = {"access_token": "a", "refresh_token": "r", "accessToken": "a", "refreshToken": "r"}


class Service:
    """Both protocols of the service at `url`; a test sets the `stream` and the list of `models`."""

    def __init__(self) -> None:
        self.url = ""
        self.stream = b""
        self.headers = ""  # of the stream
        self.models = b"{}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call, and close."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            content_type, headers, body = "application/json", "", json.dumps({"id": "x" * 20, **TOKENS}).encode()
            if "AvailableModels" in head:
                body = self.models
            elif "completion/stream" in head or "/Chat " in head:
                content_type = "application/connect+json" if "/Chat " in head else "text/event-stream"
                headers, body = self.headers, self.stream
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{headers}Connection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        writer.close()


class Pinger(threading.Thread):
    """A second client, which asks `/ping` all the time until `stop`."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self._running = running
        self._stopped = threading.Event()
        self._worst = 0.0
        self.start()

    def _worked_seconds(self) -> float:
        tasks = Path(f"/proc/{self._running.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def run(self) -> None:
        with socket.create_connection(("127.0.0.1", int(self._running.url.rpartition(":")[2]))) as raw:
            while not self._stopped.is_set():
                before = self._worked_seconds()
                raw.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while not raw.recv(4096).endswith(b"pong"):
                    pass
                self._worst = max(self._worst, self._worked_seconds() - before)
                time.sleep(0.002)

    async def stop(self) -> float:
        """The most seconds that the proxy worked between a question and its answer."""
        self._stopped.set()
        await asyncio.to_thread(self.join)
        return self._worst


@asynccontextmanager
async def run_both(protocol: str) -> AsyncIterator[tuple[Service, Running]]:
    """A service, and a proxy in front of it."""
    service = Service()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    running = await start(cast(Simulator, service), KIMI_PROTOCOL=protocol, KIMI_AUTH_URL=service.url)
    try:
        yield service, running
    finally:
        status, log = await running.stop()
        server.close()
    assert status == 0 and "Traceback" not in log, log


def request(path: str, body: bytes, *headers: str, token: str = "hello") -> bytes:
    """The bytes of a POST."""
    first = f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", "Connection: close"
    return "\r\n".join([*first, f"Content-Length: {len(body)}", *headers, "\r\n"]).encode() + body


def chat(content: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


async def send(running: Running, data: bytes) -> tuple[float, str]:
    """How long another client waited meanwhile, and what came back, as far as it is short."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    pinger, seen = Pinger(running), b""
    try:
        with suppress(ConnectionError):
            writer.write(data)
            while piece := await reader.read(65_536):
                seen += piece
                if len(seen) > 100_000:
                    seen = seen[:50_000] + seen[-5000:]
    finally:
        worst = await pinger.stop()
        writer.close()
    return worst, seen.decode("utf-8", "replace")


def values(item: bytes, number: int) -> bytes:
    """A chat with so many values."""
    return request(CHAT, b'{"messages":[' + item * number + b"0]}")


def tool(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object"}}}


PICTURE = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64," + "A" * 40_000_000}}]}
]
PARTS = {"role": "tool", "content": [[{"a": 1}] * 5000]}
FORM = "Content-Type: multipart/form-data; boundary=x"
PURPOSE = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
GZIP = "Content-Encoding: gzip"
BOMB = gzip.compress(b'{"messages":[' + b"{}," * 14_000_000)
# Requests, and what their answers have.
REQUESTS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "lists": (lambda: values(b"[],", 13_000_000), "600000 commas"),
    "objects": (lambda: values(b'{"a":1},', 5_000_000), "600000 commas"),
    "objects in 1 MB": (lambda: values(b'{"a":1},', 110_000), "10000 entries"),
    "messages": (lambda: values(b'{"role":"user","content":""},', 1_300_000), "600000 commas"),
    "numbers": (lambda: values(b"1e9,", 10_000_000), "600000 commas"),
    "brackets": (lambda: request(CHAT, b"[" * 40_000_000), "600000 commas"),
    "keys": (lambda: request(CHAT, b"{%s}" % b",".join(b'"%x":0' % at for at in range(290_000))), "10000 entries"),
    "digits": (lambda: request(CHAT, b"1" * 4_000_000), "too many digits"),
    "text": (lambda: request(CHAT, chat("a" * 40_000_000)), "4000000 characters"),
    "halves of characters": (lambda: request(CHAT, chat("\ud83d" * 6_600_000)), "halves"),
    "text that does not end": (lambda: request(CHAT, chat("a" * 40_000_000)[:-4]), "invalid_json"),
    "line ends": (lambda: request(CHAT, b"\n" * 40_000_000), "invalid_json"),
    "a picture": (lambda: request(CHAT, json.dumps({"messages": PICTURE}).encode()), "signing an upload"),
    "words to count": (lambda: request(f"{MESSAGES}/count_tokens", chat("a b " * 990_000)), '"input_tokens":'),
    "URLs": (lambda: request(CHAT, chat("http://a.bc " * 330_000)), '"content":"hi"'),
    "marks": (lambda: request(CHAT, chat("</tool_call>" * 330_000, tools=[tool(0)])), '"content":"hi"'),
    "lines": (lambda: request(CHAT, chat("://" + "\n" * 3_900_000)), '"content":"hi"'),
    "quotes in lines": (lambda: request(CHAT, chat("://" + (">" * 2000 + "\n") * 1900)), '"content":"hi"'),
    "parts in 1 MB": (lambda: request(CHAT, json.dumps({"messages": [PARTS] * 16}).encode()), '"content":"hi"'),
    "tools": (lambda: request(CHAT, chat(tools=list(map(tool, range(9_000))))), '"content":"hi"'),
    "gzip of messages": (lambda: request(CHAT, BOMB, GZIP), "100 times"),
    "gzip of a form": (lambda: request(FILES, BOMB, GZIP, FORM), "encoding_unknown"),
    "gzip to no path": (lambda: request("/v1/none", BOMB, GZIP), "not_found"),
    "gzip without a token": (lambda: request(CHAT, BOMB, GZIP, token="-"), "token_malformed"),
    "a form's preamble": (lambda: request(FILES, b"\n" * 60_000_000, FORM), "cannot be read"),
    "a form's parts": (
        lambda: request(FILES, b"--x\r\nA: b\r\n\r\n\r\n" * 1_000_000 + b"--x--", FORM),
        "cannot be read",
    ),
    "a form's heads": (lambda: request(FILES, b"--x\r\n" + b"A: b\r\n" * 1_000_000, FORM), "cannot be read"),
    "a form's field": (lambda: request(FILES, PURPOSE + bytes(60_000_000) + b"\r\n--x--", FORM), "file: is missing"),
}


def sse(*events: bytes) -> bytes:
    return b"".join(b"data: " + event + b"\n\n" for event in events)


def envelopes(*payloads: bytes) -> bytes:
    return b"".join(struct.pack(">BI", 0, len(payload)) + payload for payload in payloads)


CLASSIC_END = sse(b'{"event":"cmpl","text":"hi"}', b'{"event":"all_done"}')
HIT_EVENT = b'{"event":"search_plus","msg":{"type":"get_res","title":"t","url":"http://a.bc/%d"}}'
# The service's streams before their end, and what the answers have.
CLASSIC: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "events": (lambda: sse(b"{}") * 200_000, '"content":"hi"'),
    "line ends": (lambda: b"\n" * 4_000_000, '"content":"hi"'),
    "texts": (lambda: sse(b'{"event":"cmpl","text":"x"}') * 100_000, "x"),
    "hits": (lambda: sse(*(HIT_EVENT % at for at in range(20_000))), "http://a.bc/999"),
    "lists": (lambda: sse(b"[" + b"[]," * 340_000 + b"1]"), "answer_broken"),
}
CALL = b'<tool_call>{\\"name\\":\\"f0\\",\\"arguments\\":%s}</tool_call>'


def said(text: bytes) -> bytes:
    return sse(b'{"event":"cmpl","text":"%s"}' % text)


HELD: Mapping[str, tuple[Callable[[], bytes], str]] = {  # what is read once an answer with tools is over
    "calls": (lambda: said(CALL % b"{}" * 9000) * 3, '"tool_calls"'),
    "values in a call": (lambda: said(b"<tool_call>" + b"{}," * 150_000) * 3, '"content":"'),
    "arguments": (lambda: said(CALL % (b"[%s1]" % (b"1," * 200_000))) * 3, '"content":"'),
    "spaces": (lambda: said(b" " * 900_000) * 2, "hi"),
}
CONNECT_BEGIN = envelopes(b'{"chat":{"id":"c1"}}', b'{"message":{"id":"m1","role":"assistant"}}')
CONNECT_END = envelopes(b'{"op":"append","block":{"text":{"content":"hi"}}}', b'{"done":{}}') + b"\2\0\0\0\2{}"
HIT = b'{"id":"%d","base":{"title":"t","url":"http://a.bc/%d"}}'
FOUND = b'{"op":"append","block":{"id":"t","tool":{"toolCallId":"a","contents":[{"searchResult":%s}]}}}' % HIT
WROTE = b'{"op":"%s","block":{"text":{"content":"%s"}}}'
HITS = b'{"message":{"refs":{"searchChunks":[%s]}}}'
CONNECT: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "empty envelopes": (lambda: bytes(1_000_000), '"content":"hi"'),
    "envelopes": (lambda: envelopes(b"{}") * 200_000, '"content":"hi"'),
    "heartbeats": (lambda: envelopes(b'{"heartbeat":{}}') * 100_000, '"content":"hi"'),
    "4 GB announced": (lambda: b"\0\xff\xff\xff\xff" + bytes(50_000_000), "answer_broken"),
    "lists": (lambda: envelopes(b"[" + b"[]," * 1_390_000 + b"1]"), "answer_broken"),
    "lists within the limit": (lambda: envelopes(b"[" + b"[]," * 290_000 + b"1]"), "answer_broken"),
    "text": (lambda: envelopes(b'{"op":"append","block":{"text":{"content":"%s"}}}' % (b"x" * 1_000_000)), "x"),
    "hits": (lambda: envelopes(HITS % b",".join(HIT % (at, at) for at in range(16_000))), "http://a.bc/999"),
    "hits in a call": (lambda: envelopes(*(FOUND % (at, at) for at in range(8000))), "http://a.bc/999"),
    "text set anew": (lambda: envelopes(*[WROTE % (b"append", b"x")] * 50_000, *[WROTE % (b"set", b"")] * 9000), "x"),
    "citations": (lambda: envelopes(HITS % HIT % (1, 1), WROTE % (b"append", b"[^1^]" * 100_000)), "[1][1]"),
    "unknown fields": (lambda: envelopes(b"{%s}" % b",".join(b'"%x":0' % at for at in range(90_000))), "hi"),
    "details": (lambda: envelopes(b'{"error":{"code":"x","details":[%s1]}}' % (b"1," * 490_000)), "service_failed"),
    "ids": (lambda: envelopes(*(b'{"chat":{"id":"%s"}}' % one for one in (b"../x", b"a'b", b"y" * 999_999))), '"hi"'),
}
STREAMS: Mapping[str, tuple[str, Mapping[str, tuple[Callable[[], bytes], str]], bytes, bytes, dict[str, Any]]] = {
    "classic": ("classic", CLASSIC, b"", CLASSIC_END, {}),
    "tools": ("classic", HELD, b"", CLASSIC_END, {"tools": [tool(0)]}),
    "connect": ("connect", CONNECT, CONNECT_BEGIN, CONNECT_END, {}),
}


async def test_no_request_keeps_another_client_waiting() -> None:
    worst: dict[str, float] = {}
    async with run_both("classic") as (service, running):
        service.stream = CLASSIC_END
        for name, (make, wanted) in REQUESTS.items():
            worst[name], seen = await send(running, make())
            assert wanted in seen, (name, seen[:2000])
    assert max(worst.values()) < MOST_SECONDS, worst


@pytest.mark.parametrize("streams", STREAMS)
async def test_no_answer_of_the_service_keeps_another_client_waiting(streams: str) -> None:
    worst: dict[str, float] = {}
    protocol, table, begin, end, fields = STREAMS[streams]
    async with run_both(protocol) as (service, running):
        for name, (make, wanted) in table.items():
            service.stream = begin + make() + end
            worst[name], seen = await send(running, request(CHAT, chat(**fields)))
            assert wanted in seen, (name, seen[:2000])
    assert max(worst.values()) < MOST_SECONDS, worst


async def test_clients_that_read_nothing_take_little_memory() -> None:
    async with run_both("classic") as (service, running), AsyncExitStack() as stack:
        service.stream = sse(b'{"event":"cmpl","text":"x"}') * 40_000
        await send(running, request(CHAT, chat()))
        before = read_peak_bytes(running)
        for _ in range(20):
            raw = stack.enter_context(small_window(running.url, 4096))
            await asyncio.get_running_loop().sock_sendall(raw, request(CHAT, chat(stream=True)))
        grown = [0]
        while len(grown) < 10 or grown[-1] != grown[-9]:  # until nothing moves any more
            await asyncio.sleep(0.2)
            grown.append(read_peak_bytes(running) - before)
        assert grown[-1] < 20 * 500_000, grown[-1] / 20


# Twice the work takes twice the time, in all that reads what comes from outside.


def message(number: int) -> dict[str, Any]:
    """A message with all that one can have."""
    call = {"id": f"c{number}", "type": "function", "function": {"name": "f0", "arguments": "{}"}}
    return {"role": "assistant", "content": [{"type": "text", "text": f"http://a.bc/{number}"}], "tool_calls": [call]}


def ask(**fields: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode())


def feed(parser: Any, data: bytes, piece: int) -> None:
    for at in range(0, len(data), piece):
        list(parser.feed(data[at : at + piece]))


def read_all(answer: Any, frames: Iterable[Any]) -> list[Any]:
    return [event for frame in frames for event in answer.feed(frame)]


# What is done for a size, which is about a millisecond of work, and that size.
WORK: Mapping[str, tuple[Callable[[int], object], int]] = {
    "messages": (lambda n: render_prompt(ask(messages=[message(at) for at in range(n)])), 100),
    "results": (
        lambda n: render_prompt(ask(messages=[{"role": "tool", "tool_call_id": f"c{at}"} for at in range(n)])),
        100,
    ),
    "parts": (lambda n: ask(messages=[{"content": [{"type": "text", "text": "a"}] * n}]), 100),
    "tools": (lambda n: render_prompt(ask(tools=list(map(tool, range(n))))), 100),
    "allowed tools": (
        lambda n: ask(
            tools=list(map(tool, range(n))),
            tool_choice={"type": "allowed_tools", "mode": "auto", "tools": list(map(tool, range(n)))},
        ),
        100,
    ),
    "URLs": (lambda n: render_prompt(ask(messages=[{"content": "http://a.bc " * n}])), 1000),
    "marks": (lambda n: render_prompt(ask(messages=[{"content": "</tool_call><" * n}], tools=[tool(0)])), 1000),
    "depth": (lambda n: ask(metadata=json.loads("[" * n + "]" * n)), 10),
    "digits": (lambda n: ask(max_tokens=10**39) if n > 39 else ask(max_tokens=10**n), 10),
    "items": (lambda n: parse_responses_request(json.dumps({"input": [message(at) for at in range(n)]}).encode()), 100),
    "blocks": (
        lambda n: parse_messages_request(json.dumps({"messages": [message(at) for at in range(n)]}).encode()),
        100,
    ),
    "tokens": (lambda n: estimate_tokens("a好 😀" * n), 3000),
    "list of models": (
        lambda n: parse_models({"availableModels": [{"scenario": "s", "displayName": f"m{at}"} for at in range(n)]}),
        20,
    ),
    "pasted tokens": (lambda n: read_pasted_tokens(" , ".join(f"token{at}" for at in range(n))), 100),
    "pasted cookie": (lambda n: suppressed(read_pasted_token, "kimi-auth " * n), 1000),
    "name of a file": (lambda n: name_file(["../" * n], "a/" * n, "file"), 1000),
    "base64": (lambda n: list(decode_base64("QUFB\n" * n)), 10_000),
    "bad base64": (lambda n: suppressed(lambda: list(decode_base64(" " * n + "="))), 30_000),
    "quoted words": (lambda n: quote_words("\x1b😀a" * n), 1000),
    "claims": (lambda n: read_claims("." * n), 10_000),
    "events in bytes": (lambda n: feed(SSEParser(), b"data: {}\n\n" * n, 1), 30),
    "one event in bytes": (lambda n: feed(SSEParser(), b"data: " + b"x" * n, 1), 500),
    "envelopes": (lambda n: feed(EnvelopeParser(), envelopes(b"{}") * n, 10**9), 500),
    "one envelope in bytes": (lambda n: feed(EnvelopeParser(), envelopes(bytes(n)), 1), 500),
    "classic hits": (
        lambda n: read_all(ClassicAnswer(), SSEParser().feed(sse(*(HIT_EVENT % at for at in range(n))))),
        100,
    ),
    "connect hits": (
        lambda n: read_all(ConnectAnswer(), ((0, HITS % (HIT % (at, at))) for at in range(n))),
        100,
    ),
}


def suppressed(function: Callable[..., object], *arguments: Any) -> None:
    with suppress(ValueError, ProxyError):
        function(*arguments)


@pytest.mark.parametrize("name", WORK)
def test_eight_times_the_input_takes_about_eight_times_as_long(name: str) -> None:
    work, size = WORK[name]

    def measure(size: int) -> float:
        started = time.process_time()
        work(size)
        return time.process_time() - started

    ratios: list[float] = []
    while len(ratios) < 5 and (not ratios or min(ratios) > 24):  # where it is quadratic, it is 64
        ratios.append(min(measure(8 * size) for _ in range(3)) / min(measure(size) for _ in range(3)))
    assert min(ratios) <= 24, ratios
