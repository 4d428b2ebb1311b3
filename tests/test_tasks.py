"""Section 12: what outlives a request, and what waits for time."""

from __future__ import annotations

import asyncio

import pytest
from conftest import LogRecorder

from kimi_proxy import BackgroundTasks, Silence, Ticker


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
    async def fail() -> None:
        raise ValueError("sesame")

    tasks = BackgroundTasks()
    tasks.start(fail(), "the failing one")
    await tasks.drain(5)
    assert "the failing one" in log_lines.text and "ValueError" in log_lines.text
    assert "sesame" not in log_lines.text


class Bell:
    def __init__(self) -> None:
        self.rung = asyncio.Event()
        self.times = 0

    def tick(self, now: float) -> None:
        self.times += 1
        self.rung.set()


async def test_the_ticker_calls_what_it_watches_and_rests_else() -> None:
    ticker, bell = Ticker(0.01), Bell()
    ticker.add(bell)
    await asyncio.wait_for(bell.rung.wait(), 5)
    ticker.discard(bell)
    ticker.discard(bell)
    times = bell.times
    other = Bell()
    ticker.add(other)
    await asyncio.wait_for(other.rung.wait(), 5)
    assert bell.times == times


@pytest.mark.parametrize(
    ("silence_seconds", "answer_seconds", "broken", "code"),
    [
        (1.0, 50.0, False, "service_silent"),
        (50.0, 1.0, False, "answer_too_long"),
        (50.0, 50.0, True, "answer_broken"),
    ],
)
async def test_an_answer_that_failed_is_ended(
    silence_seconds: float, answer_seconds: float, broken: bool, code: str
) -> None:
    now = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            silence = Silence(timeout, silence_seconds, answer_seconds)
            silence.pieces += 1
            silence.tick(now + 0.9)
            assert timeout.when() is None and silence.code == ""
            silence.is_broken = lambda: broken
            silence.tick(now + 2.5)
            await asyncio.Event().wait()
    assert silence.code == code
