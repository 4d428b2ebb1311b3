"""Section 12: what outlives a request, and what waits for time."""

from __future__ import annotations

import asyncio

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
