"""The programs in front: the official SDK, sync and async, and an SSE reader that is not ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
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


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class City(pydantic.BaseModel):
    """What is asked for in a form."""

    name: str
    tags: list[str]
    people: int


async def test_the_sdks_tool_loop_comes_to_its_end(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("tool"))
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    while True:
        answer = await client.chat.completions.create(model="kimi", messages=messages, tools=[TOOL])
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if answer.choices[0].finish_reason != "tool_calls":
            break
        for call in message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"})
    assert message.content == "The results are: sunny in Paris"
    assert [one["role"] for one in messages] == ["user", "assistant", "tool", "assistant"]


async def test_the_sdks_stream_helper_gathers_calls(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("tools"))
    second = json.loads(json.dumps(TOOL).replace("get_weather", "get_time"))
    async with client.chat.completions.stream(model="kimi", messages=QUESTION, tools=[TOOL, second]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "get_time"]
    assert calls[0].function.parsed_arguments == {"city": "Paris"}
    assert kinds.count("tool_calls.function.arguments.done") == 2 and "content.delta" in kinds


@pytest.mark.parametrize("script", ["json", "json-bad"])
async def test_the_sdk_parses_an_answer_in_a_form(simulator: Simulator, client_for: Any, script: str) -> None:
    client = client_for(simulator.token(script))
    answer = await client.chat.completions.parse(model="kimi", messages=QUESTION, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris", tags=["Paris"], people=7)
    async with client.chat.completions.stream(model="kimi", messages=QUESTION, response_format=City) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == City(name="Paris", tags=["Paris"], people=7)


async def test_the_sdk_is_told_of_a_form_that_failed_and_does_not_repeat_it(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("json-worse")
    async with openai.AsyncOpenAI(api_key=token, base_url=f"{proxy}/v1") as client:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await client.chat.completions.parse(model="kimi", messages=QUESTION, response_format=City)
    assert caught.value.code == "structured_output_failed"
    assert len(simulator.account(token).asked) == 2


async def test_the_sdk_raises_its_own_errors_for_an_answer_that_was_cut(simulator: Simulator, client_for: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        await client_for(simulator.token("json")).chat.completions.parse(
            model="kimi", messages=QUESTION, response_format=City, max_tokens=3
        )
    with pytest.raises(openai.ContentFilterFinishReasonError):
        await client_for(simulator.token("moderated")).chat.completions.parse(
            model="kimi", messages=QUESTION, response_format=City
        )


async def test_the_sdk_sends_a_file(simulator: Simulator, client_for: Any) -> None:
    data = "data:text/plain;base64,SGVsbG8K"
    content: Any = [
        {"type": "text", "text": "?"},
        {"type": "file", "file": {"filename": "a.txt", "file_data": data}},
        {"type": "image_url", "image_url": {"url": data.replace("text/plain", "image/png"), "detail": "low"}},
    ]
    client = client_for(simulator.token("read"))
    answer = await client.chat.completions.create(model="kimi", messages=[{"role": "user", "content": content}])
    assert "a.txt (text/plain, 6 bytes): Hello" in answer.choices[0].message.content


@pytest.fixture
async def langchain_for(proxy: str) -> AsyncIterator[Any]:
    """Makes a LangChain model for a token."""
    from langchain_openai import ChatOpenAI  # noqa: PLC0415  # slow to load

    models: list[Any] = []

    def make(token: str) -> Any:
        models.append(
            ChatOpenAI(model="kimi", base_url=f"{proxy}/v1", api_key=pydantic.SecretStr(token), max_retries=0)
        )
        return models[-1]

    yield make
    for model in models:
        await model.root_async_client.close()
        model.root_client.close()


async def test_langchain_binds_tools(simulator: Simulator, langchain_for: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage  # noqa: PLC0415
    from langchain_core.tools import tool  # noqa: PLC0415

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    model = langchain_for(simulator.token("tool")).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("What is the weather in Paris?")]
    answer = await model.ainvoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages += [answer, ToolMessage(await get_weather.ainvoke(call["args"]), tool_call_id=call["id"])]
    assert (await model.ainvoke(messages)).content == "The results are: sunny in Paris"
    assert answer.usage_metadata["total_tokens"] > 20
    chunks = [chunk async for chunk in model.astream("What is the weather in Paris?")]
    assert "".join(chunk.content for chunk in chunks) == "Let me see."
    assert [one["name"] for chunk in chunks for one in chunk.tool_call_chunks] == ["get_weather"]


@pytest.mark.parametrize(("method", "script"), [("json_schema", "json"), ("function_calling", "tool")])
async def test_langchains_structured_output(simulator: Simulator, langchain_for: Any, method: str, script: str) -> None:
    model = langchain_for(simulator.token(script)).with_structured_output(City, method=method)
    assert await model.ainvoke("A city") == City(name="Paris", tags=["Paris"], people=7)
