"""What the tests share: a simulator of the service, and proxies in front of it on real sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import settings as hypothesis_settings
from kimi_simulator import Simulator

import kimi_proxy
from kimi_proxy import QuietFilter, RedactingFormatter, Settings, logger, run_server

hypothesis_settings.register_profile("unhurried", deadline=None)  # this machine may be busy
hypothesis_settings.load_profile("unhurried")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """The service; it fails the test when the proxy broke its rules."""
    async with Simulator() as running:
        yield running


_DESCRIPTORS = "/dev/fd"  # of this process, on Linux and elsewhere


def list_descriptors() -> list[str]:
    """What the open descriptors of this process are, as far as the system tells."""
    found = []
    for name in os.listdir(_DESCRIPTORS):
        try:
            found.append(os.readlink(f"{_DESCRIPTORS}/{name}"))
        except OSError:  # the listing's own, which is closed by now, or no link
            found.append("?")
    return found


async def wait_until_nothing_is_spooled(directory: Path, seconds: float = 5.0) -> None:
    """Return once no file is in `directory`, and none without a name is open there. Raises `AssertionError`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    def spooled() -> list[str]:
        return os.listdir(directory) + [one for one in list_descriptors() if one.startswith(f"{directory}/")]

    while spooled() and loop.time() < deadline:
        await asyncio.sleep(0.01)
    assert spooled() == []


class Holdings:
    """The tasks and descriptors of this process, as they were when it was made, to see what is left behind."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._tasks = asyncio.all_tasks()
        self._descriptors = list_descriptors()

    def list_leftovers(self, proxies: int) -> str:
        """What there is more than before; empty if nothing. `proxies` are running, each of which listens.

        A connection that a proxy keeps idle is none of it: two descriptors, as both its ends are in this process, and
        the simulator's task that waits for a request on it.
        """
        idle = self._simulator.connections_idle
        tasks = asyncio.all_tasks() - self._tasks - {asyncio.current_task()}
        descriptors = list_descriptors()
        wrong = {
            "calls of the service": self._simulator.requests_open,
            "tasks": len(tasks) - idle,
            "descriptors": len(descriptors) - len(self._descriptors) - proxies - 2 * idle,
        }
        if all(number <= 0 for number in wrong.values()):  # fewer, where a test before this one failed
            return ""
        return f"{wrong}, {idle} idle; of {sorted(map(str, tasks))}, {sorted(descriptors)}, {sorted(self._descriptors)}"

    async def wait_until_nothing_is_left(self, proxies: int = 0, seconds: float = 5.0) -> None:
        """Return once all is as before. Raises `AssertionError`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        self._simulator.stalled.set()
        while (left := self.list_leftovers(proxies)) and loop.time() < deadline:
            await asyncio.sleep(0.01)
        assert not left


class StartProxy:
    """Starts proxies with settings by field, and constants of the module by name; `close` ends them, as a signal would.

    A constant stays changed until the end of the test.
    """

    def __init__(self, simulator: Simulator, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._simulator = simulator
        self._monkeypatch = monkeypatch
        self._protocol = protocol
        self._stack = AsyncExitStack()
        self.holdings = Holdings(simulator)
        self.urls: list[str] = []

    async def __call__(self, **settings: Any) -> str:
        url = self._simulator.url
        defaults = {
            "base_url": url,
            "auth_url": url,
            "protocol": self._protocol,
            "port": 0,
            "drain_seconds": 0.2,
            "state_dir": "",
        }
        for name in [name for name in settings if name.isupper()]:
            self._monkeypatch.setattr(kimi_proxy, name, settings.pop(name))
        settings = {**defaults, **settings}
        self.urls.append((await self._stack.enter_async_context(run_server(Settings(**settings))))[0])
        return self.urls[-1]

    async def close(self) -> None:
        """End all proxies; may be called twice."""
        self.urls.clear()
        await self._stack.aclose()


@pytest.fixture
def protocol() -> str:
    """The protocol that the proxy speaks; a test file that runs over both has a fixture of its own."""
    return "classic"


@pytest.fixture
async def start_proxy(
    simulator: Simulator, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartProxy]:
    """Starts proxies, which end with the test and leave no task and no descriptor behind."""
    start = StartProxy(simulator, protocol, monkeypatch)
    yield start
    await start.close()
    await start.holdings.wait_until_nothing_is_left()


@pytest.fixture
async def nothing_is_left(
    start_proxy: StartProxy, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """After the test, while its proxies still run: no task, descriptor, connection in use or temporary file is left.

    It is for tests whose clients close their connections.
    """
    spool = tmp_path_factory.mktemp("spool")
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    yield
    await start_proxy.holdings.wait_until_nothing_is_left(len(start_proxy.urls))
    await wait_until_nothing_is_spooled(spool)


@pytest.fixture
async def proxy(start_proxy: StartProxy) -> str:
    """The address of a proxy with all defaults."""
    return await start_proxy()


@asynccontextmanager
async def openai_clients(proxy: str) -> AsyncIterator[Callable[[str], openai.AsyncOpenAI]]:
    """Makes OpenAI's SDK clients, each for a token, and closes them at the end."""
    clients: list[openai.AsyncOpenAI] = []

    def make(token: str) -> openai.AsyncOpenAI:
        clients.append(openai.AsyncOpenAI(api_key=token, base_url=f"{proxy}/v1", max_retries=0))
        return clients[-1]

    try:
        yield make
    finally:
        for client in clients:
            await client.close()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A plain HTTP client."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the event loop's clock forward by so many seconds: whatever is due then comes at once."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, 0.0

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    return advance


class LogRecorder(logging.Handler):
    """Keeps the log lines as the proxy's own filter and formatter write them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(RedactingFormatter())
        self.addFilter(QuietFilter())
        self._more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self._more.set()

    async def wait_for(self, text: str, seconds: float = 5.0) -> None:
        """Return once `text` stands in the log. Raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            while text not in self.text:
                self._more.clear()
                await self._more.wait()

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)


@pytest.fixture
def log_lines() -> Any:
    """Every line of the log, at debug level, of all packages."""
    recorder = LogRecorder()
    root = logging.getLogger()
    levels = (root.level, logger.level)
    root.addHandler(recorder)
    root.setLevel(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    yield recorder
    root.removeHandler(recorder)
    root.setLevel(levels[0])
    logger.setLevel(levels[1])


def bearer(token: str) -> dict[str, str]:
    """The headers that carry a token."""
    return {"Authorization": f"Bearer {token}"}


def chat_body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def assert_linear(seconds_for: Callable[[int], float], size: int = 50_000) -> None:
    """Twice the work takes about twice as long; a busy machine gets three chances."""
    ratios: list[float] = []
    gc.disable()  # its pauses do not grow step by step
    try:
        while len(ratios) < 3 and (not ratios or ratios[-1] >= 3.5):
            ratios.append(seconds_for(2 * size) / seconds_for(size))
    finally:
        gc.enable()
    assert ratios[-1] < 3.5, ratios
