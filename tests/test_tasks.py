"""Section 12: what outlives a request, and what waits for time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from conftest import LogRecorder

from kimi_proxy import BackgroundTasks, ProxyError, Watchdog


async def test_tasks_are_waited_for_those_they_start_included() -> None:
    tasks, done = BackgroundTasks(), []

    async def second() -> None:
        done.append("second")

    async def first() -> None:
        await asyncio.sleep(0)
        tasks.start(second(), "second")
        done.append("first")

    tasks.start(first(), "first")
    assert await tasks.drain(5) == 0
    assert done == ["first", "second"] and len(tasks) == 0


async def test_a_task_that_does_not_end_is_cancelled_at_the_deadline() -> None:
    tasks = BackgroundTasks()
    task = tasks.start(asyncio.Event().wait(), "for ever")
    assert await tasks.drain(0.05) == 1
    assert task.cancelled()


async def test_a_task_that_fails_is_logged_without_its_message(log_lines: LogRecorder) -> None:
    async def fail(error: Exception) -> None:
        raise error

    tasks = BackgroundTasks()
    tasks.start(fail(ValueError("sesame")), "the failing one")
    tasks.start(fail(ProxyError("internal_error")), "one whose client is gone")
    await tasks.drain(5)
    assert "the failing one" in log_lines.text and "ValueError" in log_lines.text
    assert "sesame" not in log_lines.text and "one whose client is gone" not in log_lines.text


async def test_a_watchdog_looks_when_it_said_it_would_until_it_is_stopped() -> None:
    loop, looks, enough = asyncio.get_running_loop(), list[float](), asyncio.Event()
    started = loop.time()

    def check(now: float) -> float:
        looks.append(now)
        if len(looks) == 3:
            enough.set()
        return now + 0.02

    watchdog = Watchdog(check, 0.05)
    await enough.wait()
    watchdog.stop()
    watchdog.stop()
    assert looks[0] - started >= 0.04 and looks[2] - looks[0] >= 0.03
    await asyncio.sleep(0.05)
    assert len(looks) == 3


class FakeLoop:
    """An event loop's clock and its one timer."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: float | None = None
        self._look: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, look: Callable[[], None]) -> FakeLoop:
        return self.call_at(self.now + seconds, look)

    def call_at(self, when: float, look: Callable[[], None]) -> FakeLoop:
        self.due, self._look = when, look
        return self

    def cancel(self) -> None:
        self.due = None

    def fire(self) -> None:
        """The timer's time has come."""
        assert self.due is not None
        self.now, self.due = max(self.now, self.due), None
        self._look()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    fake = FakeLoop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: fake)
    return fake


def test_a_watchdog_that_is_stopped_while_it_looks_looks_no_more(loop: FakeLoop) -> None:
    def check(now: float) -> float:
        watchdog.stop()
        return now + 1

    watchdog = Watchdog(check, 1)
    loop.fire()
    assert loop.due is None


@pytest.mark.parametrize("late", [0.0, 5.0])
def test_a_watchdog_that_is_to_look_in_the_past_does_not_spin(loop: FakeLoop, late: float) -> None:
    watchdog = Watchdog(lambda now: now - late, 1)
    for _ in range(100):
        loop.fire()
    assert loop.now >= 101.5, "about a hundred looks in a second at most"
    watchdog.stop()
    assert loop.due is None
