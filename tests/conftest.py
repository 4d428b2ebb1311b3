"""What the tests share: a simulator of the service, and proxies in front of it on real sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from kimi_simulator import Simulator

from kimi_proxy import RedactingFormatter, Settings, logger, run_server


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """The service; it fails the test when the proxy broke its rules."""
    async with Simulator() as running:
        yield running


class StartProxy:
    """Starts proxies with settings by field; `close` ends them, as a signal would."""

    def __init__(self, simulator: Simulator, dialect: str) -> None:
        self._simulator = simulator
        self._dialect = dialect
        self._stack = AsyncExitStack()

    async def __call__(self, **settings: Any) -> str:
        url = self._simulator.url
        defaults = {
            "base_url": url,
            "auth_url": url,
            "protocol": self._dialect,
            "port": 0,
            "drain_seconds": 0.2,
            "state_dir": "",
        }
        settings = {**defaults, **settings}
        return await self._stack.enter_async_context(run_server(Settings(**settings)))

    async def close(self) -> None:
        """End all proxies; may be called twice."""
        await self._stack.aclose()


@pytest.fixture
def dialect() -> str:
    """The protocol that the proxy speaks; a test file that runs over both has a fixture of its own."""
    return "classic"


@pytest.fixture
async def start_proxy(simulator: Simulator, dialect: str) -> AsyncIterator[StartProxy]:
    """Starts proxies, which end with the test and leave no task behind."""
    start = StartProxy(simulator, dialect)
    yield start
    await start.close()
    left = [task for task in asyncio.all_tasks() if task.get_name() in ("open", "ask", "refresh", "remove", "comment")]
    assert not left


@pytest.fixture
async def proxy(start_proxy: StartProxy) -> str:
    """The address of a proxy with all defaults."""
    return await start_proxy()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A plain HTTP client."""
    async with aiohttp.ClientSession() as session:
        yield session


class LogRecorder(logging.Handler):
    """Keeps the log lines as the proxy's own formatter writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(RedactingFormatter())
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
