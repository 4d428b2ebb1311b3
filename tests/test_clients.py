"""The programs in front: the official SDK, sync and async, and an SSE reader that is not ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from aiohttp_sse_client.client import EventSource
from conftest import StartProxy, bearer, chat_body
from kimi_simulator import HELLO, Simulator

QUESTION: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(params=["classic", "connect"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client_for(proxy: str) -> AsyncIterator[Any]:
    """Makes an async SDK client for a token."""
    clients: list[openai.AsyncOpenAI] = []

    def make(token: str) -> openai.AsyncOpenAI:
        clients.append(openai.AsyncOpenAI(api_key=token, base_url=f"{proxy}/v1", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


async def test_the_async_sdk_gets_a_whole_answer(simulator: Simulator, client_for: Any) -> None:
    answer = await client_for(simulator.token("hello")).chat.completions.create(model="kimi", messages=QUESTION)
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None


async def test_the_async_sdk_streams(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("hello"))
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="kimi", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == HELLO
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None


async def test_the_async_sdks_stream_helper_puts_the_answer_together(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("moderated"))
    async with client.chat.completions.stream(model="kimi", messages=QUESTION) as stream:
        async for _ in stream:
            pass
        # The helper raises its own error for a moderated answer when parsing; the snapshot has the text.
        answer = stream.current_completion_snapshot
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].message.content.startswith("从前有座山")


async def test_the_async_sdk_lists_models(client_for: Any) -> None:
    assert "kimi" in [model.id async for model in client_for("any").models.list()]


FAILURES: list[tuple[str, tuple[str, ...], type[openai.APIStatusError], str]] = [
    ("hello", ("unauthorized-always=refresh",), openai.AuthenticationError, "token_dead"),
    ("hello", ("status=ask:429",), openai.RateLimitError, "rate_limited"),
    ("hello", ("status=ask:500",), openai.InternalServerError, "service_failed"),
    ("empty", (), openai.InternalServerError, "answer_empty"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "faults", "kind", "code"), FAILURES)
async def test_failures_are_the_sdks_typed_exceptions(
    simulator: Simulator,
    client_for: Any,
    script: str,
    faults: tuple[str, ...],
    kind: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    client = client_for(simulator.token(script, *faults))
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model="kimi", messages=QUESTION, stream=stream)
    assert caught.value.code == code
    assert caught.value.type


async def test_a_bad_request_names_its_field_to_the_sdk(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("hello"))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="kimi", messages=[])
    assert caught.value.param == "messages"


async def test_a_failure_in_the_middle_is_the_sdks_error(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("hello", "cut=5"))
    text = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in await client.chat.completions.create(model="kimi", messages=QUESTION, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert caught.value.code == "answer_broken"
    assert text and HELLO.startswith(text)


async def test_the_sync_sdk_works_streamed_and_whole(simulator: Simulator, proxy: str) -> None:
    def use(token: str) -> tuple[str | None, str]:
        with openai.OpenAI(api_key=token, base_url=f"{proxy}/v1") as client:
            whole = client.chat.completions.create(model="kimi", messages=QUESTION)
            stream = client.chat.completions.create(model="kimi", messages=QUESTION, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return whole.choices[0].message.content, text

    assert await asyncio.to_thread(use, simulator.token("hello")) == (HELLO, HELLO)


async def test_an_sse_reader_that_is_not_ours_reads_our_stream(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(first_comment_seconds=0.1, comment_seconds=0.1)
    source = EventSource(
        f"{proxy}/v1/chat/completions",
        option={"method": "POST"},
        json=chat_body(stream=True),
        headers=bearer(simulator.token("quiet")),
    )
    text, ended = "", False
    async with source:
        async for event in source:
            assert event.type is None
            if event.data == "[DONE]":
                ended = True
                break
            text += json.loads(event.data)["choices"][0]["delta"].get("content", "")
    assert (text, ended) == ("late", True)
