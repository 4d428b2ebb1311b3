"""Section 12: what outlives a request, and what waits for time."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiohttp
import pytest
from conftest import LogRecorder
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import BackgroundTasks, Inflow, Silence, Ticker


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


class Connection:
    """What a body's reader sees of its connection."""

    connected = True

    def __init__(self) -> None:
        self._reading_paused = False

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self, resume_parser: bool = True) -> None:
        self._reading_paused = False


def make_content(limit: int = 65_536) -> tuple[aiohttp.StreamReader, Connection]:
    connection = Connection()
    content = aiohttp.StreamReader(cast(Any, connection), limit, loop=asyncio.get_running_loop())
    content.begin_http_chunk_receiving()
    return content, connection


def feed(content: aiohttp.StreamReader, *chunks: bytes) -> None:
    """What one read of the network brings."""
    for chunk in chunks:
        content.feed_data(chunk)
        content.end_http_chunk_receiving()


@given(reads=st.lists(st.lists(st.binary(min_size=1, max_size=9), max_size=3), max_size=9), limit=st.integers(1, 40))
def test_an_inflow_gives_what_comes_in_order_whatever_is_taken(reads: list[list[bytes]], limit: int) -> None:
    async def run() -> None:
        content, connection = make_content(limit)
        got: list[bytes] = []

        def take(piece: bytes) -> bytes:
            """Take up to the first byte above 200."""
            high = next((at for at, byte in enumerate(piece) if byte > 200), len(piece))
            got.append(piece[:high])
            return piece[high:]

        async def read() -> None:
            inflow = Inflow(content, take)
            while piece := await inflow.read():
                got.append(piece)

        reading = asyncio.create_task(read())
        for chunks in reads:
            await asyncio.sleep(0)
            while connection._reading_paused:
                await asyncio.sleep(0)
            feed(content, *chunks)
        content.feed_eof()
        await asyncio.wait_for(reading, 5)
        assert b"".join(got) == b"".join(chunk for chunks in reads for chunk in chunks)
        assert not connection._reading_paused and content._waiter is None

    asyncio.run(run())


async def test_what_one_read_of_the_network_brings_is_offered_as_one_and_wakes_nobody() -> None:
    content, _ = make_content()
    offered: list[bytes] = []

    def take(piece: bytes) -> bytes:
        offered.append(piece)
        return b""

    reading = asyncio.create_task(Inflow(content, take).read())
    for chunks in ((b"a", b"b", b"c"), (b"d",), (b"e", b"f")):
        await asyncio.sleep(0)
        feed(content, *chunks)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert offered == [b"abc", b"d", b"ef"] and not reading.done()
    content.feed_eof()
    assert await asyncio.wait_for(reading, 5) == b""


async def test_what_a_taker_raises_and_what_the_connection_does_is_raised_by_read() -> None:
    def refuse(piece: bytes) -> bytes:
        raise ValueError("no")

    content, _ = make_content()
    reading = asyncio.create_task(Inflow(content, refuse).read())
    await asyncio.sleep(0)
    feed(content, b"a")
    with pytest.raises(ValueError, match="no"):
        await asyncio.wait_for(reading, 5)
    content, _ = make_content()
    reading = asyncio.create_task(Inflow(content, lambda piece: b"").read())
    await asyncio.sleep(0)
    feed(content, b"a")
    content.set_exception(aiohttp.ClientPayloadError("cut"))
    with pytest.raises(aiohttp.ClientPayloadError):
        await asyncio.wait_for(reading, 5)


async def test_a_read_that_is_cancelled_takes_nothing_with_it() -> None:
    content, _ = make_content()
    taken: list[bytes] = []

    def take(piece: bytes) -> bytes:
        taken.append(piece)
        return b""

    reading = asyncio.create_task(Inflow(content, take).read())
    await asyncio.sleep(0)
    feed(content, b"a")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not taken and await content.readany() == b"a"


async def test_an_empty_body_has_nothing_to_read() -> None:
    assert await Inflow(aiohttp.streams.EMPTY_PAYLOAD).read() == b""
