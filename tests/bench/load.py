"""The clients of `make bench`, and the simulator behind what they measure: one process, on one core.

A client is a bare protocol that counts chunks and notes when they came; the simulator notes when it wrote them. What is
measured is a process of its own on the other core, of which the kernel tells the CPU time in nanoseconds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import kimi_simulator
from kimi_simulator import Account, Conversation, Simulator, Step, Wait

FOLDER = Path(__file__).parent
PROGRAM = FOLDER.parents[1] / "kimi_proxy.py"
PACES = (0.02, 0.05)  # seconds between two chunks of a stream
CHUNK = b"data: "
END = b"0\r\n\r\n"  # of a chunked body (RFC 9112, section 7.1)


class NotingSimulator(Simulator):
    """The simulator, steady, with the moments at which it wrote the pieces of each account's last answer."""

    def __init__(self) -> None:
        super().__init__(seed=1, unsteady=False)
        self.written: dict[int, list[float]] = {}

    def _pieces(self, account: Account, steps: tuple[Step, ...], chat_id: str) -> Iterator[bytes | Wait]:
        written = self.written[id(account)] = []
        for piece in super()._pieces(account, steps, chat_id):
            written.append(time.perf_counter())
            yield piece

    def forget(self) -> None:
        """Forget calls and conversations that are over, so that long runs do not slow down, and collect them."""
        for account in self._accounts.values():
            account.calls.clear()
            account.conversations.clear()
        self._used_connections.clear()
        gc.collect()

    async def rest(self) -> None:
        """Return once nothing runs, and every conversation that was opened is removed."""
        accounts = self._accounts.values()
        await self.wait_until(lambda: all(account.settled for account in accounts), 30)


@dataclass
class Target:
    """A process that is measured. `skipped`: the events of the service before the first that its clients see."""

    name: str
    port: int
    process_id: int
    protocol: str = ""
    skipped: int = 0
    tokens: dict[str, list[str]] = field(default_factory=dict)

    def cpu_ns(self) -> int:
        """The CPU time of all its threads so far."""
        folder = Path(f"/proc/{self.process_id}/task")
        return sum(int((task / "schedstat").read_bytes().split()[0]) for task in folder.iterdir())

    def memory_bytes(self, what: str = "VmRSS") -> int:
        """Its resident memory; `VmHWM` is the highest so far."""
        found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{self.process_id}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


def make_environment() -> dict[str, str]:
    """This process's environment, for servers that may keep what they compile of the packages they import."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def proxy_environment(simulator: Simulator, protocol: str, state_dir: str) -> dict[str, str]:
    """The environment of a proxy before the simulator: the defaults, but for what the measuring needs."""
    return {
        **{name: value for name, value in make_environment().items() if not name.startswith(("KIMI_", "PROXY_"))},
        "KIMI_BASE_URL": simulator.url,
        "KIMI_AUTH_URL": simulator.url,
        "KIMI_PROTOCOL": protocol,
        "PROXY_PORT": "0",
        "PROXY_STATE_DIR": state_dir,
        "PROXY_MAX_REQUESTS": "1000",
        "PROXY_ALLOW_PRIVATE_URLS": "1",
    }


def proxy_command(*options: str) -> list[str]:
    """The command that starts a proxy as its users do: it compiles the module each time, and starts anew."""
    return [sys.executable, str(PROGRAM), "--env-file", os.devnull, *options]


@asynccontextmanager
async def start(command: Sequence[str], environment: dict[str, str], core: int) -> AsyncIterator[tuple[int, int]]:
    """A server in a process of its own, on `core` where there are several: its port and process id."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        cwd=PROGRAM.parent,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        assert process.stdout is not None
        found = re.search(rb"http://[^:]+:(\d+)", await process.stdout.readline())
        assert found is not None
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        await process.wait()


class Client(asyncio.Protocol):
    """A connection of a client; `ask` sends a request and waits for its answer's end."""

    def __init__(self) -> None:
        self.events = 0
        self.first_at = 0.0
        self.written: list[float] | None = None  # when the service wrote, while latencies are measured
        self.skipped = 0
        self.latencies: list[float] = []
        self.status = b""
        self._tail = b""
        self._left: int | None = None
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Count chunks, and note the end."""
        now = time.perf_counter()
        if not self.status:
            self._read_head(data)
        number = data.count(CHUNK)
        if number and not self.events:
            self.first_at = now
        if self.written is not None:
            start = self.events + self.skipped
            self.latencies += [now - moment for moment in self.written[start : start + number]]
        self.events += number
        if self._left is not None:
            self._left -= len(data)
            ended = self._left <= 0
        else:
            self._tail = (self._tail + data)[-5:]
            ended = self._tail == END
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_head(self, data: bytes) -> None:
        """Heads are short: one comes in one piece."""
        head = data.partition(b"\r\n\r\n")[0]
        self.status = head[9:12]
        found = re.search(rb"(?i)content-length: (\d+)", head)
        self._left = int(found[1]) + len(head) + 4 if found else None

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("closed before the end"))

    async def ask(self, request: bytes) -> None:
        """Send `request`, and wait for the end of the answer, which must be good."""
        assert self._transport is not None
        self.events, self.status, self._tail = 0, b"", b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        assert self.status == b"200", self.status

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


async def connect(target: Target) -> Client:
    """A new connection to a target."""
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", target.port)
    return client


def _render(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


QUESTION = "What is the weather like in Paris in November? " * 4


class Bench:
    """What asks the targets: the same question, in the form that each of them takes."""

    def __init__(self, simulator: NotingSimulator) -> None:
        self.simulator = simulator
        self.dice = random.Random(1)

    def token(self, target: Target, order: str, number: int) -> str:
        """The `number`-th account of this order at a target."""
        tokens = target.tokens.setdefault(order, [])
        while len(tokens) <= number:
            pace = self.dice.uniform(*PACES)
            script, *faults = order.replace("PACED", f"pace={pace:.4f}").split("+")
            tokens.append(self.simulator.token(script, *faults))
        return tokens[number]

    def request(self, target: Target, token: str, *, stream: bool = True) -> bytes:
        """The request for one answer of the account."""
        if target.protocol:
            body = {"model": "kimi", "stream": stream, "messages": [{"role": "user", "content": QUESTION}]}
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            return _render("POST", "/v1/chat/completions", headers, json.dumps(body).encode())
        return _render("POST", *self.call(token))

    def call(self, token: str) -> tuple[str, dict[str, str], bytes]:
        """Path, headers and body of the classic call of the service that answers the account."""
        account = self.simulator.account(token)
        if not account.access_tokens:
            account.access_tokens.append(kimi_simulator.make_access_token(account.dice, opaque=False))
        conversation_id = f"c{len(account.conversations):019}"
        account.conversations[conversation_id] = Conversation(told=False)
        url = self.simulator.url
        headers = {
            "User-Agent": "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
            "Chrome/122.0.0.0 Safari/537.36",
            "Sec-Ch-Ua": '"Google Chrome";v="122"',
            "Sec-Ch-Ua-Platform": '"Windows"',
            "Authorization": f"Bearer {account.access_tokens[0]}",
            "Origin": url,
            "Referer": f"{url}/chat/{conversation_id}",
            "Content-Type": "application/json",
        }
        body = {"messages": [{"role": "user", "content": QUESTION}], "refs": [], "use_search": False}
        return f"/api/chat/{conversation_id}/completion/stream", headers, json.dumps(body).encode()

    async def warm(self, target: Target, order: str, number: int) -> None:
        """Have the target know the access tokens of so many accounts."""
        if not target.protocol:
            return
        client = await connect(target)
        for at in range(number):
            body = json.dumps({"token": self.token(target, order, at)}).encode()
            await client.ask(_render("POST", "/token/check", {"Content-Type": "application/json"}, body))
        client.close()

    async def stream_paced(self, target: Target, streams: int, chunks: int) -> dict[str, float]:
        """Paced streams, all at once. Nanoseconds of CPU a chunk, steady and whole; latencies in seconds."""
        order = f"long+steady+chunks={chunks}+PACED"
        await self.warm(target, order, streams)
        tokens = [self.token(target, order, number) for number in range(streams)]
        accounts = [self.simulator.account(token) for token in tokens]
        for account in accounts:
            self.simulator.written.pop(id(account), None)
        before = target.cpu_ns()
        clients = [await connect(target) for _ in tokens]
        requests = [self.request(target, token) for token in tokens]

        async def ask(client: Client, request: bytes, delay: float) -> None:
            await asyncio.sleep(delay)
            await client.ask(request)

        work = [
            asyncio.create_task(ask(client, request, number * 0.001))
            for number, (client, request) in enumerate(zip(clients, requests, strict=True))
        ]
        await _until(lambda: all(client.events >= 10 for client in clients))
        for client, account in zip(clients, accounts, strict=True):
            client.skipped = target.skipped
            client.written = self.simulator.written[id(account)]
        steady, seen = target.cpu_ns(), sum(client.events for client in clients)
        await _until(lambda: any(client.events >= chunks - 5 for client in clients))
        steady, seen = target.cpu_ns() - steady, sum(client.events for client in clients) - seen
        latencies = sorted(latency for client in clients for latency in client.latencies)
        for client in clients:
            client.written = None
        await asyncio.gather(*work)
        for client in clients:
            client.close()
        if target.protocol:
            await self.simulator.rest()
        whole = target.cpu_ns() - before
        self.simulator.forget()
        return {
            "steady": steady / seen,
            "whole": whole / (streams * chunks),
            "p50": latencies[len(latencies) // 2],
            "p99": latencies[len(latencies) * 99 // 100],
        }

    async def flood(self, target: Target, streams: int = 4, chunks: int = 5000) -> float:
        """Nanoseconds of CPU a chunk, where the service writes as fast as it can."""
        order = f"long+steady+chunks={chunks}"
        await self.warm(target, order, streams)
        clients = [await connect(target) for _ in range(streams)]
        requests = [self.request(target, self.token(target, order, number)) for number in range(streams)]
        before = target.cpu_ns()
        await asyncio.gather(*(client.ask(request) for client, request in zip(clients, requests, strict=True)))
        spent = target.cpu_ns() - before
        for client in clients:
            client.close()
        if target.protocol:
            await self.simulator.rest()
        self.simulator.forget()
        return spent / (streams * chunks)

    async def ask_short(self, target: Target, requests: int = 300, at_once: int = 4) -> float:
        """Nanoseconds of CPU a request, of short whole answers with warm tokens; the calls that remove included."""
        order = "hello+one-piece"
        await self.warm(target, order, at_once)
        clients = [await connect(target) for _ in range(at_once)]

        async def ask(number: int, times: int) -> None:
            token = self.token(target, order, number)
            for _ in range(times):
                await clients[number].ask(self.request(target, token, stream=False))

        await asyncio.gather(*(ask(number, 5) for number in range(at_once)))
        before = target.cpu_ns()
        await asyncio.gather(*(ask(number, requests // at_once) for number in range(at_once)))
        if target.protocol:
            await self.simulator.rest()
        spent = target.cpu_ns() - before
        for client in clients:
            client.close()
        self.simulator.forget()
        return spent / requests

    async def hold_streams(self, target: Target, streams: int) -> int:
        """The target's memory while so many streams are open and say nothing."""
        order = "long+steady+stall=6"
        await self.warm(target, order, streams)
        clients = [await connect(target) for _ in range(streams)]
        work = [
            asyncio.create_task(client.ask(self.request(target, self.token(target, order, number))))
            for number, client in enumerate(clients)
        ]
        await _until(lambda: all(client.events for client in clients))
        held = target.memory_bytes()
        for client in clients:
            client.close()
        await asyncio.gather(*work, return_exceptions=True)
        if target.protocol:
            await self.simulator.rest()
        self.simulator.forget()
        return held

    async def time_first_chunk(self, target: Target, times: int = 40) -> float:
        """Seconds from a request to its first chunk, the median, with a warm token and nothing else to do."""
        order = "hello+steady"
        await self.warm(target, order, 1)
        token, seconds = self.token(target, order, 0), []
        client = await connect(target)
        for _ in range(times):
            request = self.request(target, token)
            started = time.perf_counter()
            await client.ask(request)
            seconds.append(client.first_at - started)
            if target.protocol:
                await self.simulator.rest()
        client.close()
        self.simulator.forget()
        return sorted(seconds)[times // 2]


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def read_machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpus = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.+)", cpus) or re.search(r"CPU part\s*:\s*(.+)", cpus)
    return {
        "cpu": found[1].strip() if found else "unknown",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "kernel": os.uname().release.split("-")[0],
        "machine": os.uname().machine,
    }
