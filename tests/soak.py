"""`make soak`: mixed traffic with faults, after which the proxy stands where it began. Linux only, as it reads /proc.

A proxy for each protocol, in a process of its own, has 25 clients for `MINUTES`. One request in five goes wrong: the
client goes away, or Kimi, its storage or a file's origin fails. Afterwards memory is compared with what it was after a
warming up, file descriptors with what they were at the start, and nothing may run or be left at the simulator. The exit
status is 1 where something grew, or where a good request failed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import aiohttp
from kimi_simulator import Simulator

ROOT: Final = Path(__file__).parent.parent
PROTOCOLS: Final = ("classic", "connect")
CLIENTS: Final = 25  # of each proxy
FAULTY: Final = 0.2
WARM_SECONDS: Final = 25.0
STORED: Final = 1100  # answers of the Responses API that the warming up has kept: the proxy keeps the newest 1,000
ACCOUNTS: Final = 4  # of each order
HANGS_SECONDS: Final = 30.0  # no request may take so long

# What may be left over: allocators and caches breathe. (Ten minutes took 3 MB, of which less than 1 MB was in use.)
MOST_GROWTH_MB: Final = 6.0
MOST_DESCRIPTORS: Final = 2
CLOSING_SECONDS: Final = 75.0  # idle pooled connections are closed after 30 to 60 s
TRIMMING_SECONDS: Final = 12.0  # an idle proxy gives back what is free every 10 s

SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LIMITS: Final = {"KIMI_CALL_SECONDS": "3", "KIMI_SILENCE_SECONDS": "3"}
PROGRAM: Final = """
import os, sys, kimi_proxy
kimi_proxy.FILE_SECONDS, kimi_proxy.TRANSFER_SECONDS, kimi_proxy.BODY_SECONDS = 3.0, 6.0, 1.0
sys.exit(kimi_proxy.main(["--env-file", os.devnull]))
"""


@dataclass(frozen=True)
class Figures:
    """What /proc tells of a process."""

    memory_mb: float
    descriptors: int


def read_figures(process_id: int) -> Figures:
    """The figures of a process now."""
    status = Path(f"/proc/{process_id}/status").read_text("utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return Figures(int(found[1]) / 1024, len(os.listdir(f"/proc/{process_id}/fd")))


@dataclass
class Target:
    """A proxy, and what came of the requests to it."""

    protocol: str
    url: str
    process_id: int
    stderr: IO[bytes]
    good: Counter[str] = field(default_factory=Counter)
    faulty: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    at_once: int = 0
    at_most: int = 0


@asynccontextmanager
async def run_proxy(simulator: Simulator, protocol: str) -> AsyncIterator[Target]:
    """A proxy in a process of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KIMI_", "PROXY_"))},
        **LIMITS,
        "PYTHONPATH": str(ROOT),
        "KIMI_BASE_URL": simulator.url,
        "KIMI_AUTH_URL": simulator.url,
        "KIMI_PROTOCOL": protocol,
        "PROXY_PORT": "0",
        "PROXY_STATE_DIR": "",
        "PROXY_LOG_LEVEL": "warning",
        "PROXY_ALLOW_PRIVATE_URLS": "1",
    }
    with tempfile.TemporaryFile() as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM), stdout=asyncio.subprocess.PIPE, stderr=stderr, env=environment
        )
        try:
            assert process.stdout is not None
            address = re.search(rb"http://\S+(?=/v1)", await process.stdout.readline())
            assert address is not None
            yield Target(protocol, address[0].decode(), process.pid, stderr)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


# What is asked.


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"messages": [{"role": "user", "content": "What is the weather in Paris? " * 20}], **fields}


def chat_about(*parts: dict[str, Any]) -> dict[str, Any]:
    """A chat about files."""
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], "stream": True}


def make_inline(number: int, kilobytes: int) -> str:
    """A file as a `data:` URL: as many as there are numbers."""
    content = random.Random(number).randbytes(1024) * kilobytes
    return "data:application/pdf;base64," + base64.b64encode(content).decode()


def make_chat_tool() -> dict[str, Any]:
    """A function, as chats describe it."""
    return {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


FORM: Final = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
ASK: Final = [{"role": "user", "content": "hello"}]
ANTHROPIC_TOOL: Final = {"name": "find", "input_schema": SCHEMA}
RESPONSES_TOOL: Final = {"type": "function", "name": "find", "parameters": SCHEMA}


@dataclass(frozen=True)
class Kind:
    """A kind of request: its order at the simulator, path and body, and words that its good answer ends with or has."""

    order: str
    path: str
    make_body: Callable[[Simulator, random.Random], dict[str, Any]]
    words: str


def _say(body: dict[str, Any]) -> Callable[[Simulator, random.Random], dict[str, Any]]:
    return lambda _simulator, _dice: body


def _inline(_simulator: Simulator, dice: random.Random) -> dict[str, Any]:
    return chat_about({"type": "file", "file_url": {"url": make_inline(dice.randrange(5), 200)}})


def _by_url(simulator: Simulator, dice: random.Random) -> dict[str, Any]:
    order = dice.choice(["200000", "90000+no-length", "50000+gzip", "40000+redirect=2"])
    return chat_about({"type": "file", "file_url": {"url": f"{simulator.origin_url}/{order}/a.pdf"}})


def _two_pictures(simulator: Simulator, dice: random.Random) -> dict[str, Any]:
    url = f"{simulator.origin_url}/30000+type=image.png/{dice.randrange(3)}.png"
    data = {"type": "base64", "media_type": "image/png", "data": make_inline(dice.randrange(5), 20).partition(",")[2]}
    blocks = [{"type": "image", "source": source} for source in ({"type": "url", "url": url}, data)]
    return {"max_tokens": 999, "messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}]}


LONG: Final = "long+chunks=40+pace=0.02"
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
GOOD: Final = [
    Kind("hello", CHAT, _say(chat()), "Kimi"),
    Kind("hello", CHAT, _say(chat(stream=True)), "[DONE]"),
    Kind(LONG, CHAT, _say(chat(stream=True)), "[DONE]"),
    Kind(LONG, CHAT, _say(chat(max_tokens=20)), "length"),
    Kind("search", CHAT, _say(chat(stream=True, model="kimi-search")), "[DONE]"),
    Kind("think", CHAT, _say(chat(stream=True, model="kimi-thinking")), "[DONE]"),
    Kind("broad", CHAT, _say(chat(stream=True)), "[DONE]"),
    Kind("tool", CHAT, _say(chat(tools=[make_chat_tool()], stream=True)), "[DONE]"),
    Kind("tool-bad", CHAT, _say(chat(tools=[make_chat_tool()], tool_choice="required")), "tool_calls"),
    Kind("json-bad", CHAT, _say(chat(response_format=FORM)), "Paris"),
    Kind("moderated", CHAT, _say(chat()), "content_filter"),
    Kind("read", CHAT, _inline, "[DONE]"),
    Kind("read", CHAT, _by_url, "[DONE]"),
    Kind("hello", MESSAGES, _say({"max_tokens": 999, "messages": ASK}), "end_turn"),
    Kind(LONG, MESSAGES, _say({"max_tokens": 999, "messages": ASK, "stream": True}), "message_stop"),
    Kind("tool", MESSAGES, _say({"max_tokens": 999, "messages": ASK, "tools": [ANTHROPIC_TOOL]}), "tool_use"),
    Kind("read", MESSAGES, _two_pictures, "end_turn"),
    Kind("hello", f"{MESSAGES}/count_tokens", _say({"messages": ASK}), "input_tokens"),
    Kind("hello", RESPONSES, _say({"input": "hello"}), '"completed"'),
    Kind(LONG, RESPONSES, _say({"input": "hello", "stream": True}), "response.completed"),
    Kind("tool", RESPONSES, _say({"input": "hello", "tools": [RESPONSES_TOOL], "stream": True}), "response.completed"),
    Kind("hello", "/v1/completions", _say({"prompt": "hello", "stream": True}), "[DONE]"),
]

# What goes wrong at Kimi, at its storage, at an origin.
ORDERS: Final = (
    *("status=ask:500", "status=ask:429", "error-type=ask:odd.thing", "unauthorized-always=ask", "close=ask", "cut=0"),
    *("pace=0.02+cut=5", "pace=0.02+cut-chunk=5"),
    *("garbage", "huge-line", "stall=5", "silent=ask", "wrong-type=ask", "html=ask:500"),
    *("unauthorized-always=refresh", "status=refresh:500", "bomb=ask", "no-end", "redirect=ask"),
)
FILE_ORDERS: Final = ("storage-status=403", "status=upload:500", "storage-reset", "parse-fail")
ORIGINS: Final = (
    *("9000+status=404", "90000+cut", "90000+close", "90000+no-length+stall", "9000+hang", "90000+cut-chunk"),
    *("9000+encoding=odd", "9000+redirect=9", "9+no-http", "90000+gzip+half"),
)
LEAVING: Final = ("at once", "after the head", "after some text", "half a request", "never reads", "while a file comes")


class Traffic:
    """Sends requests to a proxy, and judges what comes."""

    def __init__(self, simulator: Simulator, target: Target, dice: random.Random) -> None:
        self._simulator = simulator
        self._target = target
        self._dice = dice
        self._tokens: dict[str, list[str]] = {}
        self._last_response = ("", "")

    def _token(self, order: str) -> str:
        """One of the few accounts that order this; each proxy has its own."""
        if order not in self._tokens:
            script, *faults = order.split("+")
            self._tokens[order] = [self._simulator.token(script, *faults) for _ in range(ACCOUNTS)]
        return self._dice.choice(self._tokens[order])

    async def fill(self) -> None:
        """Have as many answers kept as the proxy keeps."""
        left = iter(range(STORED))

        async def work(http: aiohttp.ClientSession) -> None:
            for _ in left:
                await self._ask(http, Kind("hello", RESPONSES, _say({"input": "hello"}), "completed"))

        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(work(http) for _ in range(CLIENTS)))

    async def run(self, seconds: float) -> None:
        """All clients, for so long."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._work(end) for _ in range(CLIENTS)))

    async def _work(self, end: float) -> None:
        """One client after another."""
        target = self._target
        while time.monotonic() < end:
            async with aiohttp.ClientSession() as http:
                for _ in range(self._dice.randrange(1, 8)):
                    target.at_once += 1
                    target.at_most = max(target.at_most, target.at_once)
                    try:
                        async with asyncio.timeout(HANGS_SECONDS):
                            if self._dice.random() < FAULTY:
                                await self._go_wrong(http)
                            else:
                                await self._ask(http, self._dice.choice(GOOD))
                    except TimeoutError:
                        target.wrong.append("a request hangs")
                    finally:
                        target.at_once -= 1

    async def _post(self, http: aiohttp.ClientSession, token: str, path: str, body: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"}
        async with http.post(self._target.url + path, json=body, headers=headers) as response:
            return response.status, await response.text()

    async def _ask(self, http: aiohttp.ClientSession, kind: Kind) -> None:
        """A good request, which must be answered well."""
        token, body = self._token(kind.order), kind.make_body(self._simulator, self._dice)
        name = f"{kind.path} {kind.order.partition('+')[0]}{' streamed' if body.get('stream') else ''}"
        last_id, last_token = self._last_response
        if kind.path == RESPONSES and last_id and self._dice.random() < 0.2:
            body, token = {**body, "previous_response_id": last_id, "store": False}, last_token
        status, text = await self._post(http, token, kind.path, body)
        if status != 200 or kind.words not in text or "error" in text[-400:]:
            self._target.wrong.append(f"{name}: {status} {text[-300:]}")
            return
        self._target.good[name] += 1
        if kind.path == RESPONSES and kind.order == "hello" and not body.get("previous_response_id"):
            self._last_response = (json.loads(text)["id"], token)

    async def _go_wrong(self, http: aiohttp.ClientSession) -> None:
        """A request that fails at the service, or whose client goes away."""
        if self._dice.random() < 0.5:
            how = self._dice.choice(LEAVING)
            self._target.faulty[f"the client leaves: {how}"] += 1
            await self._leave(how)
            return
        table = self._dice.choice([ORDERS, ORDERS, FILE_ORDERS, ORIGINS])
        fault = self._dice.choice(table)
        path, body = self._dice.choice(
            [
                (CHAT, chat()),
                (MESSAGES, {"max_tokens": 9, "messages": ASK}),
                (RESPONSES, {"input": "?", "store": False}),
            ]
        )
        body = {**body, "stream": self._dice.random() < 0.5}
        order = f"hello+{fault}"
        if table is not ORDERS:
            place = f"{self._simulator.origin_url}/{fault if table is ORIGINS else '60000'}/{self._dice.random()}.pdf"
            path, body = CHAT, chat_about({"type": "file", "file_url": {"url": place}})
            order = "read" if table is ORIGINS else f"read+{fault}"
        status, text = await self._post(http, self._token(order), path, body)
        self._target.faulty[f"the service fails: {fault}"] += 1
        if status == 500 or "internal_error" in text or "the proxy itself failed" in text:
            self._target.wrong.append(f"{fault}: {status} {text[-300:]}")

    async def _leave(self, how: str) -> None:
        """Send a request, or half of one, and close or reset the connection in the middle."""
        body = chat(stream=True)
        if how == "while a file comes":
            url = f"{self._simulator.origin_url}/400000+no-length+slow=0.05/{self._dice.random()}.pdf"
            body = chat_about({"type": "file", "file_url": {"url": url}})
        data = json.dumps(body).encode()
        token = self._token(
            "read" if how == "while a file comes" else "broad+endless" if how == "never reads" else LONG
        )
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self._target.url.rpartition(":")[2]))
        try:
            writer.write(request[: -len(data) // 2] if how == "half a request" else request)
            if how == "after the head":
                await reader.readline()
            elif how == "after some text":
                await reader.readuntil(b"data: ")
            if how != "at once":
                await asyncio.sleep(self._dice.random() * 0.4)
            if self._dice.random() < 0.5:
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, asyncio.IncompleteReadError) as error:
            self._target.wrong.append(f"{how}: {error!r}")
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


# What is left.


def count_left(simulator: Simulator) -> tuple[int, int]:
    """How many answers, uploads and downloads the simulator has open, and conversations that it told of."""
    accounts = simulator._accounts.values()
    streams = sum(account.streams_open for account in accounts) + simulator.transfers_open + simulator.origins_open
    conversations = [one for account in accounts for one in account.conversations.values()]
    return streams, sum(one.told and not one.removed for one in conversations)


async def wait_for_rest(simulator: Simulator, seconds: float = 20.0) -> tuple[int, int]:
    """What is still open and left once nothing changes any more, and the proxies have trimmed their memory."""
    end = time.monotonic() + seconds
    while any(left := count_left(simulator)) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    await asyncio.sleep(TRIMMING_SECONDS)
    return left


async def tidy(simulator: Simulator) -> None:
    """Have the simulator forget what is over, so that a long run does not grow here."""
    while True:
        await asyncio.sleep(5)
        for account in simulator._accounts.values():
            account.calls.clear()
            for chat_id in [name for name, one in account.conversations.items() if one.removed]:
                del account.conversations[chat_id]


async def wait_for_descriptors(target: Target, most: int) -> Figures:
    """The figures once so few are open, or once idle connections would be closed."""
    end = time.monotonic() + CLOSING_SECONDS
    while (figures := read_figures(target.process_id)).descriptors > most and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return figures


def show_traffic(target: Target, seconds: float) -> None:
    """Print what was sent."""
    good, faulty = target.good.total(), target.faulty.total()
    share = faulty / max(1, good + faulty)
    print(
        f"{target.protocol}: {good + faulty} requests in {seconds:.0f} s, {share:.0%} of them with a fault of "
        f"{len(target.faulty)} kinds, {target.at_most} at once at most; {len(target.wrong)} went wrong"
    )


async def soak(minutes: float, seed: int) -> bool:
    """Whether everything is as it was."""
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator(seed=seed))
        targets = [await stack.enter_async_context(run_proxy(simulator, protocol)) for protocol in PROTOCOLS]
        traffic = [Traffic(simulator, target, random.Random(f"{seed} {target.protocol}")) for target in targets]
        for work in (tidy(simulator), tell_progress(targets, WARM_SECONDS + minutes * 60 + 60)):
            stack.callback(asyncio.create_task(work).cancel)
        begun = [read_figures(target.process_id) for target in targets]
        await asyncio.gather(*(one.fill() for one in traffic))
        await asyncio.gather(*(one.run(WARM_SECONDS) for one in traffic))
        left = [await wait_for_rest(simulator)]
        warm = [read_figures(target.process_id) for target in targets]
        for target in targets:
            target.good.clear()
            target.faulty.clear()
        started = time.monotonic()
        await asyncio.gather(*(one.run(minutes * 60) for one in traffic))
        seconds = time.monotonic() - started
        left.append(await wait_for_rest(simulator))
        most = [figures.descriptors + MOST_DESCRIPTORS for figures in begun]
        ended = await asyncio.gather(*map(wait_for_descriptors, targets, most))
        good, told = True, 0
        for target, first, second, third, limit in zip(targets, begun, warm, ended, most, strict=True):
            show_traffic(target, seconds)
            growth = third.memory_mb - second.memory_mb
            good &= show("memory in MB", first.memory_mb, second.memory_mb, third.memory_mb, growth <= MOST_GROWTH_MB)
            numbers = (first.descriptors, second.descriptors, third.descriptors)
            good &= show("file descriptors", *numbers, third.descriptors <= limit)
            target.stderr.seek(0)
            lines = target.stderr.read().decode("utf-8", "replace").splitlines()
            told += sum("a conversation of account" in line and "may be left" in line for line in lines)
            lines = [line for line in lines if not re.match(r"\S+ (warning |error \[\w+\] [A-Z]+ /)", line)]
            good &= show("errors in the log", 0, 0, len(lines), not lines) and not target.wrong
            for line in [*target.wrong[:9], *lines[:9]]:
                print(f"    {line}")
        good &= show("answers and files under way", 0, left[0][0], left[1][0], left[1][0] == 0)
        # A break in the first bytes of connect's stream takes with it the id that they bring; then the log says so.
        print(f"  the log tells of {told} conversations whose id was not read, so that they may be left")
        good &= show("conversations left", 0, left[0][1], left[1][1], left[1][1] <= told)
        orders = Counter(
            token.partition("~")[0]
            for token, account in simulator._accounts.items()
            for one in account.conversations.values()
            if one.told and not one.removed
        )
        for order, number in orders.items():
            print(f"    {number} left of {order}")
        for violation in set(simulator.violations):
            print(f"    {violation}")
        simulator.violations.clear()
        return good


async def tell_progress(targets: Sequence[Target], seconds: float) -> None:
    """Show in a terminal how far it is."""
    started = time.monotonic()
    while sys.stderr.isatty():
        done = sum(target.good.total() + target.faulty.total() for target in targets)
        spent = time.monotonic() - started
        print(f"  {spent:.0f} of about {seconds:.0f} s, {done} requests  ", end="\r", file=sys.stderr, flush=True)
        await asyncio.sleep(1)


def show(name: str, first: float, second: float, third: float, good: bool) -> bool:
    """Print a figure at the start, after the warming up, and at the end; whether it is `good`."""
    form = "{:10.1f}" if isinstance(third, float) else "{:10d}"
    print(f"  {name:<28}" + "".join(form.format(value) for value in (first, second, third)), "" if good else "  GREW")
    return good


def main() -> int:
    """The exit status: 0 where nothing grew and nothing failed."""
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # the simulator's, whose clients go away on purpose
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    seed = int(os.environ.get("KIMI_SIMULATOR_SEED") or random.randrange(2**32))
    print(
        f"About {WARM_SECONDS + minutes * 60 + 80:.0f} s, seed {seed}. Figures: at the start, warm, at the end.",
        flush=True,
    )
    return 0 if asyncio.run(soak(minutes, seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
