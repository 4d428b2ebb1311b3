"""Section 12: what outlives a request, and what waits for time."""

from __future__ import annotations

import asyncio
import gc

import pytest
from conftest import LogRecorder

from kimi_proxy import BackgroundTasks, Errand, ProxyError, Silence, Ticker


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


class Work:
    """Work that ends when it is told to, and how."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end = asyncio.Event()
        self._error = error

    async def __call__(self) -> str:
        await self.may_end.wait()
        if self._error is not None:
            raise self._error
        return "done"


async def wait_for(errand: Errand[str]) -> str:
    return await errand


@pytest.mark.parametrize("error", [None, ProxyError("token_dead"), ValueError("sesame")])
async def test_an_errands_outcome_is_its_waiters(error: Exception | None, log_lines: LogRecorder) -> None:
    tasks, work = BackgroundTasks(), Work(error)
    work.may_end.set()
    waiter = asyncio.create_task(wait_for(Errand(tasks, work(), "errand")))
    outcome = (await asyncio.gather(waiter, return_exceptions=True))[0]
    assert outcome == ("done" if error is None else error)
    assert await tasks.drain(5) == 0 and "errand" not in log_lines.text


@pytest.mark.parametrize("error", [None, ProxyError("token_dead"), ValueError("sesame")])
@pytest.mark.parametrize("is_late", [False, True], ids=["before its end", "at its end"])
async def test_an_errand_goes_on_without_its_waiter(
    error: Exception | None, is_late: bool, log_lines: LogRecorder
) -> None:
    tasks, work, unseen = BackgroundTasks(), Work(error), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    errand = Errand(tasks, work(), "errand")
    waiter = asyncio.create_task(wait_for(errand))
    await asyncio.sleep(0)
    if not is_late:
        waiter.cancel()
        await asyncio.wait({waiter})
    work.may_end.set()
    if is_late:
        asyncio.get_running_loop().call_soon(waiter.cancel)  # behind the errand's last step, before the waiter's next
    await asyncio.wait({errand.task, waiter})
    await tasks.drain(5)
    is_logged = isinstance(error, ValueError) and not is_late
    assert ("ValueError" in log_lines.text) == is_logged and "sesame" not in log_lines.text
    if not is_logged:
        assert errand.task.result() == ("done" if error is None else None)
    assert waiter.cancelled()
    del errand, waiter
    if error is not None:
        error.with_traceback(None)  # whose frames know the errand
    gc.collect()
    assert not unseen


async def test_an_errand_that_is_cancelled_cancels_its_waiter() -> None:
    tasks = BackgroundTasks()
    errand = Errand(tasks, Work()(), "errand")
    waiter = asyncio.create_task(wait_for(errand))
    await asyncio.sleep(0)
    assert await tasks.drain(0.05) == 1
    with pytest.raises(asyncio.CancelledError):
        await waiter


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
