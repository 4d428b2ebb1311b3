"""The programs in front: the official SDKs, LangChain, agents, and an SSE reader that is not ours."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import openai
import pydantic
import pytest
from aiohttp_sse_client.client import EventSource
from conftest import LogRecorder, StartProxy, bearer, chat_body, openai_clients
from kimi_simulator import HELLO, Simulator
from yarl import URL

QUESTION: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(params=["classic", "connect"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client_for(proxy: str) -> AsyncIterator[Any]:
    """Makes an async SDK client for a token."""
    async with openai_clients(proxy) as make:
        yield make


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


async def test_the_async_sdk_lists_models(simulator: Simulator, client_for: Any) -> None:
    assert "kimi" in [model.id async for model in client_for(simulator.token("hello")).models.list()]


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
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.1)
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


async def test_the_sdks_old_function_loop_comes_to_its_end(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("tool"))
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    functions: Any = [{"name": "get_weather", "parameters": TOOL["function"]["parameters"]}]
    answer = await client.chat.completions.create(model="kimi", messages=messages, functions=functions)
    assert answer.choices[0].finish_reason == "function_call" and not answer.choices[0].message.tool_calls
    message = answer.choices[0].message
    city = json.loads(message.function_call.arguments)["city"]
    messages += [message.model_dump(exclude_none=True)]
    messages += [{"role": "function", "name": message.function_call.name, "content": f"sunny in {city}"}]
    answer = await client.chat.completions.create(model="kimi", messages=messages, functions=functions)
    assert answer.choices[0].message.content == "The results are: sunny in Paris"


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
        # LangChain shares its HTTP clients between models; one that is closed here must be this model's own.
        models.append(
            ChatOpenAI(
                model="kimi",
                base_url=f"{proxy}/v1",
                api_key=pydantic.SecretStr(token),
                max_retries=0,
                http_client=openai.DefaultHttpxClient(),
                http_async_client=openai.DefaultAsyncHttpxClient(),
            )
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


# Anthropic's Messages.


@pytest.fixture
async def claude_for(start_proxy: StartProxy) -> AsyncIterator[Any]:
    """Makes a client of Anthropic's SDK for a token, in front of one proxy."""
    proxy = await start_proxy(allow_private_urls=True)
    clients: list[anthropic.AsyncAnthropic] = []

    def make(token: str, **options: Any) -> anthropic.AsyncAnthropic:
        clients.append(anthropic.AsyncAnthropic(api_key=token, base_url=proxy, max_retries=0, **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


CLAUDE: Any = {"model": "kimi", "max_tokens": 1000, "messages": QUESTION}


async def test_anthropics_sdk_gets_the_same_message_whole_and_streamed(simulator: Simulator, claude_for: Any) -> None:
    client = claude_for(simulator.token("hello"))
    message = await client.messages.create(**CLAUDE)
    assert (message.content[0].text, message.stop_reason, message.role) == (HELLO, "end_turn", "assistant")
    async with client.messages.stream(**CLAUDE) as stream:
        assert "".join([text async for text in stream.text_stream]) == HELLO
        streamed = await stream.get_final_message()
    assert streamed.usage.output_tokens == message.usage.output_tokens > 5
    counted = await client.messages.count_tokens(model="kimi", messages=QUESTION)
    assert counted.input_tokens == message.usage.input_tokens == streamed.usage.input_tokens


async def test_anthropics_tool_loop_comes_to_its_end(simulator: Simulator, claude_for: Any) -> None:
    client = claude_for(simulator.token("tool"))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools: Any = [{"name": "get_weather", "description": "Weather", "input_schema": schema}]
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    while True:
        async with client.messages.stream(model="kimi", max_tokens=999, messages=messages, tools=tools) as stream:
            message = await stream.get_final_message()
        messages.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
        if message.stop_reason != "tool_use":
            break
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": f"sunny in {block.input['city']}"}
            for block in message.content
            if block.type == "tool_use"
        ]
        assert [block.id[:6] for block in message.content if block.type == "tool_use"] == ["toolu_"]
        messages.append({"role": "user", "content": results})
    assert message.content[0].text == "The results are: sunny in Paris"


async def test_anthropics_documents_and_images_reach_kimi(simulator: Simulator, claude_for: Any) -> None:
    content: Any = [
        {
            "type": "document",
            "title": "年报.txt",
            "source": {"type": "base64", "media_type": "text/plain", "data": "SGkK"},
        },
        {"type": "document", "source": {"type": "url", "url": f"{simulator.origin_url}/70/b.pdf"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "SGkK"}},
        {"type": "text", "text": "?"},
    ]
    message = await claude_for(simulator.token("read")).messages.create(
        model="kimi", max_tokens=99, messages=[{"role": "user", "content": content}]
    )
    for told in ("年报.txt (text/plain, 3 bytes): Hi", "b.pdf (application/pdf, 70 bytes)", "image.png"):
        assert told in message.content[0].text


async def test_anthropics_thinking_is_a_block_of_its_own(simulator: Simulator, claude_for: Any, protocol: str) -> None:
    client = claude_for(simulator.token("think"))
    async with client.messages.stream(**CLAUDE, thinking={"type": "adaptive"}) as stream:
        message = await stream.get_final_message()
    kinds = [block.type for block in message.content]
    assert kinds == (["thinking", "text"] if protocol == "connect" else ["text"])
    again = [*QUESTION, {"role": "assistant", "content": [block.model_dump() for block in message.content]}, *QUESTION]
    assert (await client.messages.create(model="kimi", max_tokens=99, messages=again)).content


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        (("unauthorized-always=refresh",), anthropic.AuthenticationError),
        (("status=ask:429", "retry-after=7"), anthropic.RateLimitError),
        (("status=ask:500",), anthropic.InternalServerError),
    ],
)
async def test_anthropics_errors_are_its_typed_exceptions(
    simulator: Simulator, claude_for: Any, faults: tuple[str, ...], kind: type[anthropic.APIStatusError]
) -> None:
    client = claude_for(simulator.token("hello", *faults))
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.messages.create(**CLAUDE, stream=stream)
        body: Any = caught.value.body
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
    with pytest.raises(anthropic.BadRequestError, match="role"):
        await client.messages.create(model="kimi", max_tokens=9, messages=[{"role": "a b", "content": "x"}])
    with pytest.raises(anthropic.NotFoundError):
        await client.get("/v1/messages/nowhere", cast_to=object)


async def test_an_anthropic_stream_that_breaks_is_told(simulator: Simulator, claude_for: Any) -> None:
    client = claude_for(simulator.token("long", "cut=20"))
    with pytest.raises(anthropic.APIStatusError, match="broke"):
        async with client.messages.stream(**CLAUDE) as stream:
            await stream.get_final_message()


async def test_anthropics_models_and_keys(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"), api_keys="me:open-sesame")
    async with anthropic.AsyncAnthropic(api_key="open-sesame", base_url=proxy, max_retries=0) as client:
        assert "kimi" in [model.id async for model in client.models.list()]
        assert (await client.messages.create(**CLAUDE)).content
    async with anthropic.AsyncAnthropic(auth_token="open-sesame", base_url=proxy, max_retries=0) as client:
        assert (await client.messages.create(**CLAUDE)).content
    headers = {"x-api-key": "wrong", "Authorization": "Bearer open-sesame"}
    async with anthropic.AsyncAnthropic(api_key="wrong", base_url=proxy, max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**CLAUDE, extra_headers=headers)


async def test_a_silent_stream_of_anthropics_is_pinged_whatever_its_version_and_betas(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.1)
    headers = {"x-api-key": simulator.token("quiet"), "anthropic-version": "9", "anthropic-beta": "a-1,b-2"}
    url = f"{proxy}/v1/messages?beta=true&other=1"
    async with http.post(url, json={**CLAUDE, "stream": True}, headers=headers) as response:
        text = await response.text()
    assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n') and "\n:" not in text
    client = anthropic.AsyncAnthropic(api_key=simulator.token("quiet"), base_url=proxy)
    async with client, client.messages.stream(**CLAUDE) as stream:
        assert "".join([text async for text in stream.text_stream]) == "late"


FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (
        chat_body(),
        {"type": "custom", "custom": {"name": "apply_patch"}},
        {"type": "web_search"},
    ),
    "/v1/messages": (
        CLAUDE,
        {"type": "bash_20250124", "name": "apply_patch"},
        {"type": "web_search_20250305", "name": "web_search"},
    ),
    "/v1/responses": (
        {"input": "hi"},
        {"type": "custom", "name": "apply_patch"},
        {"type": "web_search", "external_web_access": False},
    ),
}


@pytest.mark.parametrize("path", FOREIGN)
async def test_tools_of_other_kinds_are_left_out_with_a_log_line_and_a_web_search_searches(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder, path: str
) -> None:
    body, foreign, search = FOREIGN[path]
    token = simulator.token("hello")
    for tools in ([foreign], [foreign, search]):
        async with http.post(proxy + path, json={**body, "tools": tools}, headers=bearer(token)) as response:
            assert response.status == 200
    asked = (await simulator.settle(token)).asked
    assert [bool(one["use_search"] if "refs" in one else one["tools"]) for one in asked] == [False, True]
    assert not any("apply_patch" in json.dumps(one) for one in asked)
    assert log_lines.text.count("tools that are not known here are left out: apply_patch") == 2


async def test_every_failure_of_a_path_has_the_form_of_its_api(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(max_inline_mb=1)
    token = bearer(simulator.token("hello"))
    calls: list[tuple[str, str, Any, int]] = [
        ("POST", "/v1/messages", b"{", 400),
        ("GET", "/v1/messages", None, 405),
        ("POST", "/v1/messages/nowhere", b"{}", 404),
        ("POST", "/v1/messages", b" " * 3_000_000, 413),
        ("POST", "/v1/messages/count_tokens", b"[]", 400),
    ]
    for method, path, data, status in calls:
        try:
            body = io.BytesIO(data) if data else None
            async with http.request(method, proxy + path, data=body, headers=token) as response:
                answer = await response.json()
                assert (response.status, answer["type"], set(answer["error"])) == (status, "error", {"type", "message"})
        except aiohttp.ClientConnectionError:
            assert status == 413  # closed while the body was on its way
        other = path.replace("/messages/count_tokens", "/responses").replace("/messages", "/responses")
        try:
            body = io.BytesIO(data) if data else None
            async with http.request(method, proxy + other, data=body, headers=token) as response:
                answer = await response.json()
                assert {"message", "type", "param", "code"} == set(answer["error"])
        except aiohttp.ClientConnectionError:
            assert status == 413
    async with http.head(proxy + "/") as response:
        assert response.status == 200
    for path in ("/v1/messages/v1/messages", "//v1/messages/x"):
        async with http.post(URL(proxy + path, encoded=True), data=b"{}", headers=token) as response:
            assert (response.status, (await response.json())["type"]) == (404, "error")
    async with http.post(proxy + "/v1/responses/resp_1", data=b"{}", headers=token) as response:
        assert (response.status, response.headers["Allow"]) == (405, "DELETE,GET,HEAD")
    async with http.post(proxy + "/v1/messages", data=b"{", headers=token, expect100=True) as response:
        assert (response.status, (await response.json())["type"]) == (400, "error")


# OpenAI's Responses.


async def test_responses_whole_and_streamed_are_the_same(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("hello"))
    whole = await client.responses.create(model="kimi", input="hi")
    assert (whole.output_text, whole.status, whole.object) == (HELLO, "completed", "response")
    kinds = []
    async with client.responses.stream(model="kimi", input="hi") as stream:
        async for event in stream:
            kinds.append(event.type)
        streamed = await stream.get_final_response()
    assert streamed.output_text == HELLO and streamed.usage.total_tokens == whole.usage.total_tokens
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"


async def test_responses_parse(simulator: Simulator, client_for: Any) -> None:
    answer = await client_for(simulator.token("json-bad")).responses.parse(model="kimi", input="x", text_format=City)
    assert answer.output_parsed == City(name="Paris", tags=["Paris"], people=7)


RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def test_a_tool_loop_with_a_namespace(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("tool"))
    tools: Any = [{"type": "namespace", "name": "weather", "description": "", "tools": [RESPONSES_TOOL]}]
    first = await client.responses.create(model="kimi", input="What is the weather in Paris?", tools=tools)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.namespace, call.name) == ("weather", "get_weather")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await client.responses.create(model="kimi", tools=tools, previous_response_id=first.id, input=[result])
    assert second.output_text == "The results are: sunny"


@pytest.mark.parametrize("by_id", [True, False])
async def test_a_tool_loop_by_previous_response_and_by_the_whole_input(
    simulator: Simulator, client_for: Any, by_id: bool
) -> None:
    client = client_for(simulator.token("tool"))
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = await client.responses.create(
        model="kimi", input=question, tools=[RESPONSES_TOOL], instructions="Be short."
    )
    (call,) = [item for item in first.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    if by_id:
        fields: Any = {"previous_response_id": first.id, "input": [result]}
    else:
        fields = {"input": [*question, *[item.model_dump(exclude_none=True) for item in first.output], result]}
    second = await client.responses.create(model="kimi", tools=[RESPONSES_TOOL], **fields)
    assert second.output_text == "The results are: sunny"
    account = next(iter(simulator._accounts.values()))
    asked = json.dumps(account.asked[-1], ensure_ascii=False)
    assert "get_weather" in asked and "What is the weather in Paris?" in asked and "Be short." not in asked


async def test_items_of_kept_answers_can_be_referred_to_by_their_account_alone(
    simulator: Simulator, client_for: Any
) -> None:
    token = simulator.token("tool")
    client = client_for(token)
    question: Any = {"role": "user", "content": "What is the weather in Paris?"}
    first = await client.responses.create(model="kimi", input=[question], tools=[RESPONSES_TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    references: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
    items: Any = [question, *references, result]
    second = await client.responses.create(model="kimi", input=items, tools=[RESPONSES_TOOL])
    assert second.output_text == "The results are: sunny"
    by_hand: Any = [question, *[item.model_dump(exclude_none=True) for item in first.output], result]
    await client.responses.create(model="kimi", input=by_hand, tools=[RESPONSES_TOOL])
    texts = [json.dumps(one, ensure_ascii=False) for one in simulator.account(token).asked[1:]]
    assert texts[0] == texts[1] and "Let me see." in texts[0]
    forgotten = await client.responses.create(model="kimi", input="x", store=False)
    unknown = [
        [{"type": "item_reference", "id": name}] for name in (forgotten.output[0].id, f"{call.id}0", "msg_1", "")
    ]
    strange = client_for(simulator.token("tool"))
    for asking, wrong in ((strange, items), *((client, reference) for reference in unknown)):
        with pytest.raises(openai.BadRequestError, match="send the item itself"):
            await asking.responses.create(model="kimi", input=wrong)
    with pytest.raises(openai.BadRequestError, match="a second time"):
        await client.responses.create(model="kimi", input=[*references, *references])


async def test_kept_responses_belong_to_their_account_and_can_be_deleted(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(allow_private_urls=True)
    owner = openai.AsyncOpenAI(api_key=simulator.token("read"), base_url=f"{proxy}/v1", max_retries=0)
    stranger = openai.AsyncOpenAI(api_key=simulator.token("read"), base_url=f"{proxy}/v1", max_retries=0)
    async with owner, stranger:
        content: Any = [{"type": "input_file", "file_data": "data:text/plain;base64,SGkK", "filename": "a.txt"}]
        kept = await owner.responses.create(model="kimi", input=[{"role": "user", "content": content}])
        assert "a.txt (text/plain, 3 bytes): Hi" in kept.output_text
        assert (await owner.responses.retrieve(kept.id)).output_text == kept.output_text
        again = await owner.responses.create(model="kimi", input="And?", previous_response_id=kept.id)
        assert "a.txt (text/plain, 3 bytes): Hi" in again.output_text  # the file goes along, uploaded once
        assert [file async for file in owner.files.list()] == []
        for client, action in ((stranger, "retrieve"), (stranger, "delete")):
            with pytest.raises(openai.NotFoundError):
                await getattr(client.responses, action)(kept.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await stranger.responses.create(model="kimi", input="x", previous_response_id=kept.id)
        assert caught.value.code == "previous_response_not_found"
        await owner.responses.delete(kept.id)
        with pytest.raises(openai.NotFoundError):
            await owner.responses.retrieve(kept.id)
        forgotten = await owner.responses.create(model="kimi", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            await owner.responses.retrieve(forgotten.id)


async def test_a_responses_failure_keeps_its_status_before_the_first_text(
    simulator: Simulator, client_for: Any
) -> None:
    for stream in (True, False):
        with pytest.raises(openai.RateLimitError) as caught:
            await client_for(simulator.token("hello", "status=ask:429")).responses.create(
                model="kimi", input="x", stream=stream
            )
        assert "Retry-After" in caught.value.response.headers
    client = client_for(simulator.token("long", "cut=20"))
    events = [event async for event in await client.responses.create(model="kimi", input="x", stream=True)]
    assert events[-1].type == "response.failed" and "broke" in events[-1].response.error.message


async def test_legacy_completions(simulator: Simulator, client_for: Any) -> None:
    client = client_for(simulator.token("hello"))
    answer = await client.completions.create(model="kimi", prompt="hi", max_tokens=99)
    assert (answer.choices[0].text, answer.object) == (HELLO, "text_completion")
    pieces = [piece async for piece in await client.completions.create(model="kimi", prompt="hi", stream=True)]
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == HELLO


async def test_the_openai_agents_package_comes_to_its_end(
    simulator: Simulator, client_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    import agents  # noqa: PLC0415  # slow to load

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    client = client_for(simulator.token("tool"))
    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        agent = agents.Agent(name="a", tools=[get_weather], model=kind(model="kimi", openai_client=client))
        result = await agents.Runner.run(agent, "What is the weather in Paris?")
        assert result.final_output == "The results are: sunny in Paris"
