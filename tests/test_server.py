"""Section 18: chats through the front door: a real proxy on a real socket, the simulator behind it."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import hashlib
import io
import json
import platform
import re
import time
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import HELLO, Simulator
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

import kimi_proxy
from kimi_proxy import ChatRequest, Question, ResponseWriter

CHAT = "/v1/chat/completions"
SENTENCE = "[内容由于不合规被停止生成，我们换个话题吧]"
SEARCH_TEXT = "据搜索，Kimi 是月之暗面的助手。"


@pytest.fixture(params=["classic", "connect"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def ask(http: aiohttp.ClientSession, url: str, token: str, **fields: Any) -> tuple[int, Any, Any]:
    """A whole answer: status, JSON, headers."""
    async with http.post(url + CHAT, json=chat_body(**fields), headers=bearer(token)) as response:
        return response.status, await response.json(), response.headers


async def stream(http: aiohttp.ClientSession, url: str, token: str, **fields: Any) -> tuple[list[Any], str]:
    """A streamed answer: its JSON chunks, and the raw text."""
    body = chat_body(stream=True, **fields)
    async with http.post(url + CHAT, json=body, headers=bearer(token)) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"], text


def content_of(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_a_whole_answer_has_all_that_clients_read(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str
) -> None:
    token = simulator.token("hello")
    before = int(time.time())
    status, answer, _ = await ask(http, proxy, token)
    account = await simulator.settle(token)
    assert status == 200
    assert answer["id"] in account.conversations
    assert (answer["object"], answer["model"]) == ("chat.completion", "kimi")
    assert before <= answer["created"] <= time.time()
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": HELLO}, "finish_reason": "stop"}
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    steps = ["refresh", "open", "ask", "remove"] if protocol == "classic" else ["refresh", "models", "ask", "remove"]
    assert [call.step for call in account.calls] == steps


async def test_a_streamed_answer_has_all_that_clients_read(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello")
    body = chat_body(stream=True, model="gpt-4o")
    async with http.post(proxy + "/chat/completions", json=body, headers=bearer(token)) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        text = await response.text()
    account = await simulator.settle(token)
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    assert content_of(chunks) == HELLO
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks} == {
        (next(iter(account.conversations)), chunks[0]["created"], "gpt-4o", "chat.completion.chunk")
    }
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(choice["index"] == 0 for chunk in chunks for choice in chunk["choices"])
    assert "usage" in chunks[-1] and "usage" not in chunks[0]


@pytest.mark.parametrize("include_usage", [True, False])
async def test_stream_options_decide_where_usage_stands(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, include_usage: bool
) -> None:
    chunks, _ = await stream(http, proxy, simulator.token("hello"), stream_options={"include_usage": include_usage})
    if include_usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] >= 0
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    else:
        assert all("usage" not in chunk for chunk in chunks)


async def test_the_merged_text_reaches_the_service(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("echo")
    messages = [
        {"role": "system", "content": "see https://ab.cd"},
        {"role": "developer", "content": [{"type": "text", "text": "short"}]},
        {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": "https://ab.cd/d"}]},
        {"role": "assistant", "content": None},
        {"role": "critic", "content": "42"},
    ]
    _, answer, _ = await ask(http, proxy, token, messages=messages)
    expected = "system:see https://ab.cd\ndeveloper:short\nuser:你好\nhttps://ab.cd/d\nassistant:\ncritic:42\n"
    assert answer["choices"][0]["message"]["content"] == expected  # the model repeats the mark; the client gets the URL
    asked = json.dumps((await simulator.settle(token)).asked[0], ensure_ascii=False)
    assert r"<url id=\"\" type=\"url\" status=\"\" title=\"\" wc=\"\">https://ab.cd/d</url>" in asked


@pytest.mark.parametrize(
    ("setting", "fields", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"model": "kimi-search"}, True),
        (True, {"use_search": False, "model": "kimi-search"}, False),
        (False, {"use_search": True}, True),
    ],
)
async def test_use_search_has_its_order(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    setting: bool,
    fields: dict[str, Any],
    expected: bool,
) -> None:
    proxy = await start_proxy(use_search=setting)
    token = simulator.token("hello")
    _, answer, _ = await ask(http, proxy, token, **fields)
    asked = simulator.account(token).asked[0]
    assert asked.get("use_search", bool(asked.get("tools"))) is expected
    assert answer["model"] == fields.get("model", "kimi")


HIT_LINES = "检索 Kimi 首页(https://www.kimi.com/) ...\n检索 月之暗面(https://www.moonshot.cn/about?a=1&b=2) ...\n"
SOURCES = "\n\n搜索结果来自：\nKimi 首页(https://www.kimi.com/)\n月之暗面(https://www.moonshot.cn/about?a=1&b=2)\n"
SHOWN: dict[str, tuple[str, str, str]] = {
    "search": (HIT_LINES + "\n" + SEARCH_TEXT, SEARCH_TEXT + SOURCES, "stop"),
    "moderated": (f"从前有座山，山里有\n{SENTENCE}",) * 2 + ("content_filter",),
    "moderated-search": (f"{HIT_LINES}\n从前\n{SENTENCE}", f"从前\n{SENTENCE}{SOURCES}", "content_filter"),
    "moderated-empty": (SENTENCE, SENTENCE, "content_filter"),
    "length": ("第一第二第三",) * 2 + ("stop",),
    "length-again": ("又又又又",) * 2 + ("length",),
    "surrogate": ("好👍了",) * 2 + ("stop",),
    "unicode": ('e\u0301 \u200f\u05e2\u05d1 \u2028\u2029 👩\u200d👧 𠮷 \x00\x7f "\\</script>',) * 2 + ("stop",),
    "broad": ("x" * 200_000,) * 2 + ("stop",),
}


LIST = "\n\n搜索结果来自：\n1. [Kimi 首页](https://www.kimi.com/)\n2. [月之暗面](https://www.moonshot.cn/about?a=1&b=2)"
CITED = "甲[1]乙[2][1]丙[2]。"
CITED_LIST = (
    "\n\n搜索结果来自：\n1. [月之暗面](https://www.moonshot.cn/about?a=1&b=2)\n2. [Kimi 首页](https://www.kimi.com/)"
)
IN_CONNECT: dict[str, tuple[str, str, str]] = {
    "length": ("第一",) * 2 + ("length",),
    "length-again": ("又",) * 2 + ("length",),
    "search": (SEARCH_TEXT + LIST,) * 2 + ("stop",),
    "moderated-search": (f"从前\n{SENTENCE}{LIST}",) * 2 + ("content_filter",),
    "cite": (CITED + CITED_LIST,) * 2 + ("stop",),
}


def expected_of(protocol: str, script: str) -> tuple[str, str, str]:
    """What is shown streamed, what whole, and the finish reason."""
    return (SHOWN | (IN_CONNECT if protocol == "connect" else {}))[script]


@pytest.mark.parametrize(
    ("protocol", "script"),
    [("classic", script) for script in SHOWN] + [("connect", script) for script in SHOWN | IN_CONNECT],
)
async def test_answers_are_shown_as_promised(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str, script: str
) -> None:
    streamed, whole, reason = expected_of(protocol, script)
    chunks, text = await stream(http, proxy, simulator.token(script))
    assert content_of(chunks) == streamed
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert max(map(len, text.encode().split(b"\n"))) < 64_000
    status, answer, _ = await ask(http, proxy, simulator.token(script))
    assert (status, answer["choices"][0]["message"]["content"]) == (200, whole)
    assert answer["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("protocol", "shape"),
    [("classic", shape) for shape in ("cut-characters", "one-piece", "crlf", "cr", "comments", "bom")]
    + [("connect", shape) for shape in ("cut-characters", "one-piece", "end-flag-80", "set-twice")],
)
@pytest.mark.parametrize("script", ["hello", "search", "surrogate"])
async def test_the_cut_of_the_bytes_changes_nothing(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str, script: str, shape: str
) -> None:
    expected = HELLO if script == "hello" else expected_of(protocol, script)[0]
    chunks, _ = await stream(http, proxy, simulator.token(script, shape))
    assert content_of(chunks) == expected


async def test_the_first_text_reaches_the_client_while_the_answer_runs(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("long", "stall=5")
    async with http.post(proxy + CHAT, json=chat_body(stream=True), headers=bearer(token)) as response:
        first = await asyncio.wait_for(response.content.readuntil(b"\n\n"), 5)
        assert json.loads(first[6:])["choices"][0]["delta"]["content"]
        assert simulator.account(token).streams_open == 1
    await simulator.settle(token)


async def test_comments_keep_a_silent_stream_alive_and_then_it_goes_on(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.2)
    chunks, text = await stream(http, proxy, simulator.token("quiet"))
    assert content_of(chunks) == "late"
    comments = [line for line in text.split("\n\n") if line.startswith(":")]
    assert 2 <= len(comments) <= 9
    assert text.index(":") == 0


async def test_a_failure_after_the_first_comment_is_an_event_of_the_stream(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.1)
    chunks, text = await stream(http, proxy, simulator.token("hello", "slow=ask:0.6", "status=ask:500"))
    assert text.startswith(":")
    assert chunks == [chunks[0]] and chunks[0]["choices"] == []
    assert chunks[0]["error"]["code"] == "service_failed"
    assert "[DONE]" not in text


async def test_pages_for_people_and_programs(proxy: str, http: aiohttp.ClientSession) -> None:
    async with http.get(proxy + "/ping") as response:
        assert (response.status, await response.text()) == (200, "pong")
    async with http.get(proxy + "/") as response:
        page = await response.text()
        assert response.content_type == "text/html" and "/v1" in page and "kimi_proxy" in page
    async with http.head(proxy + "/") as response:
        assert response.status == 200
    async with http.get(proxy + "/v1/models") as response:
        models = await response.json()
    assert models["object"] == "list"
    assert "kimi" in [entry["id"] for entry in models["data"]]
    for entry in models["data"]:
        assert entry["object"] == "model" and entry["owned_by"] and isinstance(entry["created"], int)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/v1/nothing", 404, "/v1/chat/completions"),
        ("POST", "/v1/chat/v1/completions", 404, "/v1/chat/completions"),
        ("GET", "/v1/chat/completions", 405, "POST /v1/chat/completions"),
        ("DELETE", "/ping", 405, "GET /ping"),
        ("POST", "/%00%ff", 404, "/v1/chat/completions"),
    ],
)
async def test_wrong_paths_and_methods_name_the_right_ones(
    proxy: str, http: aiohttp.ClientSession, method: str, path: str, status: int, says: str
) -> None:
    async with http.request(method, proxy + path) as response:
        body = await response.json()
        assert response.status == status
        assert says in body["error"]["message"]
        assert (body["code"], body["message"]) == (-2000, f"[请求参数非法]: {body['error']['message']}")
        if status == 405:
            assert response.headers["Allow"]


async def test_browsers_may_call_from_any_page(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    async with http.options(proxy + CHAT, headers=asked) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "authorization" in response.headers["Access-Control-Allow-Headers"]
        assert "x-stainless-os" in response.headers["Access-Control-Allow-Headers"]
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
    for script, stream_it in (("hello", True), ("hello", False), ("empty", False)):
        headers = bearer(simulator.token(script)) | {"Origin": "https://page.example"}
        async with http.post(proxy + CHAT, json=chat_body(stream=stream_it), headers=headers) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_cors_can_be_kept_to_named_origins(start_proxy: StartProxy, http: aiohttp.ClientSession) -> None:
    proxy = await start_proxy(cors_origins=("https://mine.example",))
    for origin, allowed in (("https://mine.example", "https://mine.example"), ("https://other.example", None)):
        async with http.get(proxy + "/ping", headers={"Origin": origin}) as response:
            assert response.headers.get("Access-Control-Allow-Origin") == allowed


@pytest.mark.parametrize(
    ("header", "code"),
    [
        *((header, "token_missing") for header in (None, "Basic abc", "Bearer", "Bearer   ")),
        ("Bearer nobody", "token_dead"),
        ("Bearer a b", "token_malformed"),
    ],
)
async def test_no_or_a_dead_token_is_a_401_that_says_what_to_do(
    proxy: str, http: aiohttp.ClientSession, header: str | None, code: str
) -> None:
    headers = {"Authorization": header} if header is not None else {}
    async with http.post(proxy + CHAT, json=chat_body(), headers=headers) as response:
        body = await response.json()
    assert (response.status, body["error"]["code"], body["code"]) == (401, code, -2002)
    assert "refresh" in body["error"]["message"]
    assert body["error"]["type"] == "authentication_error"


async def send_raw(proxy: str, data: bytes) -> bytes:
    """What the proxy answers to these bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_token_that_is_not_ascii_is_a_401(proxy: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n".encode()
    answer = await send_raw(proxy, head + b"Authorization: Bearer a\xffb\r\n\r\n{}")
    assert b" 401 " in answer.split(b"\r\n")[0] and b"token_malformed" in answer


BODIES: dict[str, tuple[bytes, dict[str, str], int]] = {
    "empty": (b"", {}, 400),
    "no JSON": (b"{", {}, 400),
    "deep": (b"[" * 100_000, {}, 400),
    "long number": (b'{"n":' + b"1" * 5000 + b"}", {}, 400),
    "not UTF-8": (b'{"messages":"\xff"}', {}, 400),
    "NaN": (b'{"messages":NaN}', {}, 400),
    "unknown charset": (b"{", {"Content-Type": "application/json; charset=no-such"}, 400),
    "two gzip members": (gzip.compress(json.dumps(chat_body()).encode()) * 2, {"Content-Encoding": "gzip"}, 400),
    "bad gzip": (b"no gzip", {"Content-Encoding": "gzip"}, 400),
    "too large": (b" " * (3 << 20), {}, 413),
    "gzip bomb": (gzip.compress(b" " * (40 << 20)), {"Content-Encoding": "gzip"}, 413),
}


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("name", BODIES)
async def test_a_hostile_body_is_the_clients_fault_and_the_next_request_works(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, name: str
) -> None:
    proxy = await start_proxy(max_inline_mb=1)
    body, headers, status = BODIES[name]
    token = simulator.token("hello")
    async with aiohttp.ClientSession() as http:
        try:
            async with http.post(proxy + CHAT, data=io.BytesIO(body), headers=bearer(token) | headers) as response:
                assert response.status == status, await response.text()
                answer = await response.json()
                assert answer["code"] == -2000 and answer["error"]["type"] == "invalid_request_error"
        except aiohttp.ClientConnectionError:
            assert status == 413  # the proxy closed while the body was still on its way
        assert (await ask(http, proxy, token))[0] == 200
    assert "Traceback" not in log_lines.text and " at " not in log_lines.text.replace("at most", "")


async def test_a_malformed_head_is_refused_and_not_logged(proxy: str, log_lines: LogRecorder) -> None:
    answer = await send_raw(proxy, b"GET /ping HTTP/1.1\r\nHost: x\r\nAuthorization\x01: Bearer sesame-open\r\n\r\n")
    assert b" 400 " in answer and answer.count(b"HTTP/1.") == 1
    assert "info [-] aiohttp.server: Error handling request" in log_lines.text and "sesame" not in log_lines.text


async def test_each_request_is_one_line_and_no_secret_is_in_the_log(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    token = simulator.token("hello", "unauthorized-once=ask")
    async with http.post(proxy + CHAT + "?key=in-query", json=chat_body("whisper"), headers=bearer(token)) as response:
        assert response.status == 200
        request_id = response.headers["X-Request-Id"]
    await ask(http, proxy, simulator.token("hello", "status=ask:500"), text="whisper")
    await ask(http, proxy, "dead-" + token)
    account = await simulator.settle(token)
    (line,) = [line for line in log_lines.lines if "POST" in line and request_id in line and " status=200 " in line]
    assert CHAT in line and "chunks=" in line and "upstream_status=200" in line and " seconds=" in line
    assert any(
        ("< cmpl, " in line or "< block.text, " in line) and " characters" in line and request_id in line
        for line in log_lines.lines
    )
    assert any("upstream_status=500" in line and "service_failed" in line for line in log_lines.lines)
    for secret in (token, *account.access_tokens, "whisper", "in-query", HELLO, HELLO[:8]):
        assert secret not in log_lines.text


async def test_many_clients_at_once_get_each_their_own_answer(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("echo")
    answers = await asyncio.gather(*(stream(http, proxy, token, text=f"question {number}") for number in range(40)))
    assert [content_of(chunks) for chunks, _ in answers] == [f"user:question {number}\n" for number in range(40)]
    account = await simulator.settle(token)
    assert account.count("refresh") == 1
    assert len(account.conversations) == 40


async def test_a_conversation_can_be_kept_and_gone_on_with(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, protocol: str, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    token = simulator.token("echo")
    _, first, _ = await ask(http, proxy, token, conversation_id="new")
    again = await start_proxy(state_dir=str(tmp_path))
    for url in (proxy, again):
        messages = [{"role": "user", "content": "before"}, {"role": "user", "content": "and now?"}]
        status, second, _ = await ask(http, url, token, conversation_id=first["id"], messages=messages)
        assert (status, second["id"]) == (200, first["id"])
        assert second["choices"][0]["message"]["content"] == "and now?"
    chunks, _ = await stream(http, proxy, token, conversation_id=first["id"])
    assert {chunk["id"] for chunk in chunks} == {first["id"]} and content_of(chunks) == "hi"
    account = simulator.account(token)
    assert account.count("remove") == 0
    assert account.count("open") == (protocol == "classic")
    assert len(account.conversations) == 1 and len(account.asked) == 4


async def test_a_conversation_that_is_not_the_accounts_is_a_404_that_says_so(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    mine, others = simulator.token("echo"), simulator.token("echo")
    _, kept, _ = await ask(http, proxy, others, conversation_id="new")
    for conversation_id in ("c0ffeec0ffeec0ffee00", kept["id"]):
        status, body, _ = await ask(http, proxy, mine, conversation_id=conversation_id)
        assert (status, body["error"]["code"]) == (404, "conversation_not_found")
        assert body["error"]["param"] == "conversation_id" and "new" in body["error"]["message"]
    assert not simulator.account(mine).calls or simulator.account(mine).count("ask") == 0


async def test_a_kept_conversation_that_the_service_forgot_is_a_404(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("echo")
    _, kept, _ = await ask(http, proxy, token, conversation_id="new")
    simulator.account(token).conversations.clear()
    status, body, _ = await ask(http, proxy, token, conversation_id=kept["id"])
    assert (status, body["error"]["code"]) == (404, "conversation_not_found")
    simulator.violations.clear()


async def test_a_new_conversation_whose_answer_fails_is_removed(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("empty")
    assert (await ask(http, proxy, token, conversation_id="new"))[0] == 502
    await simulator.settle(token)
    assert simulator.account(token).count("remove") == 1


# What programs ask for: functions, forms, ends, and what it counted.

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def searched(asked: Any) -> bool:
    """Whether a question let the service search."""
    return bool(asked["use_search"] if "refs" in asked else asked["tools"])


async def test_usage_is_an_estimate_of_both_sides(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    _, answer, _ = await ask(http, proxy, simulator.token("hello"), text="你好" * 50)
    usage = answer["usage"]
    assert 50 < usage["prompt_tokens"] < 80 and 8 < usage["completion_tokens"] < 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    chunks, _ = await stream(http, proxy, simulator.token("hello"), text="你好" * 50)
    assert chunks[-1]["usage"] == usage
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    content = [picture, {"type": "text", "text": "你好" * 50}]
    _, answer, _ = await ask(http, proxy, simulator.token("hello"), messages=[{"role": "user", "content": content}])
    assert answer["usage"] == usage


async def test_a_call_of_a_function_whole_and_streamed(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("tool")
    _, answer, _ = await ask(http, proxy, token, tools=[WEATHER])
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city":"Paris","days":7}'}
    chunks, _ = await stream(http, proxy, token, tools=[WEATHER])
    assert content_of(chunks) == "Let me see."
    (streamed,) = [delta for chunk in chunks for delta in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert streamed == {"index": 0, "id": streamed["id"], "type": "function", "function": call["function"]}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not searched((await simulator.settle(token)).asked[0])


SCHEMA: dict[str, Any] = WEATHER["function"]["parameters"] | {"additionalProperties": False}  # type: ignore[index]
CALLING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    },
    "/v1/responses": {"tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]},
    "/v1/messages": {"tools": [{"name": "get_weather", "input_schema": SCHEMA}], "max_tokens": 999},
}


@pytest.mark.parametrize("stream_it", [True, False])
@pytest.mark.parametrize("script", ["tool-native", "tool-loose", "tool-bare"])
@pytest.mark.parametrize("path", CALLING)
async def test_an_imperfect_call_is_a_call_in_every_api(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, path: str, script: str, stream_it: bool
) -> None:
    choice: Any = {"type": "any"} if path.endswith("messages") else "required"
    demand = {"tool_choice": choice} if script == "tool-bare" else {}
    body = {"model": "kimi", "stream": stream_it, **CALLING[path], **demand}
    body["input" if path.endswith("responses") else "messages"] = [{"role": "user", "content": "Weather?"}]
    token = simulator.token(script)
    async with http.post(proxy + path, json=body, headers=bearer(token)) as response:
        text = await response.text()
    assert response.status == 200, text
    assert "get_weather" in text and re.search(r'city[\\": ]+Paris', text) and re.search(r'days[\\": ]+7', text)
    assert "tool_call>" not in text and "<|tool" not in text and "```" not in text and "好的" not in text
    assert len((await simulator.settle(token)).asked) == 1


async def test_json_amid_words_needs_no_second_question(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("json-words")
    _, answer, _ = await ask(http, proxy, token, response_format=FORM)
    assert json.loads(answer["choices"][0]["message"]["content"])
    assert len((await simulator.settle(token)).asked) == 1


async def test_a_bad_call_is_asked_for_once_more(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    token = simulator.token("tool-bad")
    chunks, text = await stream(http, proxy, token, tools=[WEATHER])
    assert content_of(chunks) == "Let me see." and text.endswith("data: [DONE]\n\n")
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [len(chunk["choices"][0]["delta"].get("tool_calls", [])) for chunk in chunks].count(1) == 1
    account = await simulator.settle(token)
    assert len(account.asked) == len(account.conversations) == 2


async def test_a_call_that_is_bad_twice_is_handed_on(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("tool-worse")
    _, answer, _ = await ask(http, proxy, token, tools=[WEATHER])
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "no_such_function", "arguments": "{}"}
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    assert len((await simulator.settle(token)).asked) == 2


async def test_a_second_try_that_fails_leaves_the_first_answer(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("tool-worse", "again-status=500")
    status, answer, _ = await ask(http, proxy, token, tools=[WEATHER])
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert (status, call["function"]["name"]) == (200, "no_such_function")
    token = simulator.token("json-worse", "again-status=500")
    status, answer, _ = await ask(http, proxy, token, response_format=FORM)
    assert (status, answer["error"]["code"]) == (502, "service_failed")
    await simulator.settle(token)


@pytest.mark.parametrize("stream_it", [True, False])
@pytest.mark.parametrize(
    ("script", "fields", "code"),
    [
        ("tool-worse", {"tools": [WEATHER], "tool_choice": "required"}, "tool_call_failed"),
        ("hello", {"tools": [WEATHER], "tool_choice": {"function": {"name": "get_weather"}}}, "tool_call_failed"),
        ("json-worse", {"response_format": FORM}, "structured_output_failed"),
        ("hello", {"response_format": {"type": "json_object"}}, "structured_output_failed"),
    ],
)
async def test_what_must_come_and_fails_twice_is_a_422(
    simulator: Simulator,
    proxy: str,
    http: aiohttp.ClientSession,
    script: str,
    fields: dict[str, Any],
    code: str,
    stream_it: bool,
) -> None:
    token = simulator.token(script)
    status, answer, _ = await ask(http, proxy, token, stream=stream_it, **fields)
    assert (status, answer["error"]["code"]) == (422, code)
    assert len((await simulator.settle(token)).asked) == 2


@pytest.mark.parametrize("script", ["json", "json-bad"])
async def test_an_answer_in_the_form_that_was_asked_for(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, script: str
) -> None:
    token = simulator.token(script)
    _, answer, _ = await ask(http, proxy, token, response_format=FORM)
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"city": "Paris"}
    chunks, _ = await stream(http, proxy, token, response_format=FORM)
    assert json.loads(content_of(chunks)) == {"city": "Paris"}
    account = await simulator.settle(token)
    assert not searched(account.asked[0]) and len(account.asked) == (2 if script == "json" else 4)


async def test_a_second_try_in_a_kept_conversation_goes_on_with_it(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("json-bad")
    fields: dict[str, Any] = {"response_format": {"type": "json_object"}, "conversation_id": "new"}
    _, answer, _ = await ask(http, proxy, token, **fields)
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"ok": True}
    account = simulator.account(token)
    assert list(account.conversations) == [answer["id"]] and len(account.asked) == 2


@pytest.mark.parametrize(
    ("fields", "content", "reason"),
    [({"stop": ["20 ", "7"]}, "0 1 2 3 4 5 6 ", "stop"), ({"max_tokens": 5}, None, "length")],
)
async def test_an_end_of_our_own_stops_the_answer_at_the_service(
    simulator: Simulator,
    proxy: str,
    http: aiohttp.ClientSession,
    fields: dict[str, Any],
    content: str | None,
    reason: str,
) -> None:
    token = simulator.token("long", "pace=0.01", "chunks=5000")
    chunks, text = await stream(http, proxy, token, **fields)
    assert chunks[-1]["choices"][0]["finish_reason"] == reason and text.endswith("data: [DONE]\n\n")
    assert content is None or content_of(chunks) == content
    assert chunks[-1]["usage"]["completion_tokens"] <= (5 if content is None else 99)
    account = await simulator.settle(token)
    assert account.streams_cut == 1 and len(account.asked) == 1
    _, answer, _ = await ask(http, proxy, simulator.token("long", "chunks=300"), **fields)
    assert answer["choices"][0]["message"]["content"] == content_of(chunks)


async def test_an_answer_that_our_own_end_emptied_is_no_error(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    status, answer, _ = await ask(http, proxy, simulator.token("hello"), stop=HELLO[:2])
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "")
    chunks, text = await stream(http, proxy, simulator.token("hello"), stop=HELLO[:2])
    assert content_of(chunks) == "" and text.endswith("data: [DONE]\n\n")
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_stop_sequences_are_not_looked_for_in_what_the_proxy_adds(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    _, answer, _ = await ask(http, proxy, simulator.token("search"), stop=["moonshot", "搜索结果", "检索"])
    assert answer["choices"][0]["message"]["content"].startswith(SEARCH_TEXT)
    assert "moonshot" in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [WEATHER]}, False),
        ({"tools": [WEATHER], "use_search": True}, True),
        ({"tools": [WEATHER], "model": "kimi-search"}, True),
        ({"tools": [WEATHER, {"type": "web_search"}]}, True),
        ({"tools": [WEATHER], "tool_choice": "none"}, False),
        ({"tools": [{"type": "custom", "custom": {"name": "apply_patch"}}]}, False),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, True),
        ({"response_format": {"type": "text"}}, True),
    ],
)
async def test_search_is_off_for_programs_unless_it_is_asked_for(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, fields: dict[str, Any], expected: bool
) -> None:
    token = simulator.token("hello")
    assert (await ask(http, proxy, token, **fields))[0] == 200
    assert searched(simulator.account(token).asked[0]) is expected


async def test_a_moderated_answer_in_a_form_is_passed_on_without_the_sentence(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    _, answer, _ = await ask(http, proxy, simulator.token("moderated"), response_format=FORM)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] == "从前有座山，山里有"


async def test_a_second_form_that_breaks_off_is_not_mended(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("json-bad", "again-cut=4")
    status, answer, _ = await ask(http, proxy, token, response_format=FORM)
    assert (status, answer["error"]["code"]) == (502, "answer_broken")
    await simulator.settle(token)


@pytest.mark.parametrize("fields", [{"response_format": FORM}, {"tools": [WEATHER], "tool_choice": "required"}])
@pytest.mark.parametrize("faults", [(), ("again-status=500",)])
async def test_a_conversation_that_was_to_be_kept_is_removed_when_the_second_try_fails(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, fields: dict[str, Any], faults: tuple[str, ...]
) -> None:
    token = simulator.token("json-worse", *faults)
    status, _, _ = await ask(http, proxy, token, conversation_id="new", **fields)
    assert status in (422, 502)
    account = await simulator.settle(token)
    assert [one.removed for one in account.conversations.values()] == [1]


async def test_an_end_of_our_own_is_good_whatever_comes_behind_it(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str
) -> None:
    fault = "error-after-done" if protocol == "connect" else "garbage"
    for shape in ("one-piece", "cut-characters"):
        token = simulator.token("hello", fault, shape)
        chunks, text = await stream(http, proxy, token, stop="世")
        assert content_of(chunks) == "你好，" and text.endswith("data: [DONE]\n\n")


async def test_an_end_of_our_own_still_lists_the_sources(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str
) -> None:
    _, answer, _ = await ask(http, proxy, simulator.token("cite"), stop="乙", use_search=True)
    content = answer["choices"][0]["message"]["content"]
    assert "moonshot" in content and "www.kimi.com" in content
    assert len(answer["choices"][0]["message"]["annotations"]) == 2


# What there is to see, and what is bounded.


def read_metrics(text: str) -> dict[str, float]:
    """The samples of a page of metrics, by name and labels, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(text)
    return {
        sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


async def test_metrics_tell_what_happened(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    async with http.get(proxy + "/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        before = read_metrics(await response.text())
    assert before["kimi_proxy_requests_running"] == 1 and before.get("kimi_proxy_upstream_seconds_count", 0) == 0
    await ask(http, proxy, simulator.token("hello"))
    chunks, _ = await stream(http, proxy, simulator.token("hello"))
    await ask(http, proxy, simulator.token("hello", "status=ask:500"))
    async with http.get(proxy + "/metrics") as response:
        after = read_metrics(await response.text())
    route = "route=/v1/chat/completions"
    assert after[f"kimi_proxy_requests_total,{route},status=200"] == 2
    assert after[f"kimi_proxy_requests_total,{route},status=502"] == 1
    assert after["kimi_proxy_failures_total,code=service_failed"] == 1
    assert after["kimi_proxy_chunks_total"] >= len(chunks)
    assert after["kimi_proxy_tokens_refreshed_total"] == after["kimi_proxy_accounts"] == 3
    assert after["kimi_proxy_first_text_seconds_count"] == 2
    assert after["kimi_proxy_upstream_seconds_bucket,le=+Inf"] == after["kimi_proxy_upstream_seconds_count"] > 6
    assert after["kimi_proxy_answers_running"] == 0


async def test_metrics_tell_of_the_process_and_of_who_waits_in_line(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    async def read() -> dict[str, float]:
        async with http.get(proxy + "/metrics") as response:
            return read_metrics(await response.text())

    token = simulator.token("quiet", "one-at-a-time")
    first = asyncio.create_task(ask(http, proxy, token))
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
    second = asyncio.create_task(ask(http, proxy, token))
    await log_lines.wait_for("has to wait in line for its account")
    metrics = await read()
    assert metrics["kimi_proxy_requests_waiting"] == 1 and metrics["process_resident_memory_bytes"] > 1e7
    assert abs(metrics["process_start_time_seconds"] - time.time()) < 60
    build = f"kimi_proxy_build_info,python={platform.python_version()},version={kimi_proxy.__version__}"
    assert metrics[build] == 1
    assert (await first)[0] == (await second)[0] == 200
    metrics = await read()
    assert metrics["kimi_proxy_requests_waiting"] == 0 < metrics["kimi_proxy_queue_seconds_sum"]
    waited = [float(found[1]) for found in re.finditer(r" wait_seconds=([\d.]+)", log_lines.text)]
    assert len(waited) == 2 and min(waited) < 0.05 < max(waited)


async def test_errors_are_in_the_language_that_is_asked_for(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    dead, broken = simulator.token("hello", "status=refresh:401"), simulator.token("hello", "cut=5")
    for setting, header, is_chinese in (
        ("en", "", False),
        ("en", "en-US,zh;q=0.5", False),
        ("en", "zh-CN,zh;q=0.9", True),
        ("zh", "*", True),
    ):
        proxy, said = await start_proxy(language=setting), list[str]()
        for method, path, token, body in (
            ("POST", CHAT, dead, {"n": 2}),
            ("GET", "/health?accounts", dead, {}),
            ("POST", CHAT, broken, {"stream": True}),
        ):
            headers = {**bearer(token), "Accept-Language": header}
            async with http.request(method, proxy + path, json=chat_body(**body), headers=headers) as response:
                value = json.loads((await response.text()).rpartition("data: ")[2])
            said.append(value.get("error", value.get("accounts", [{}])[0])["message"])
        assert [bool(re.search("[一-鿿]", one)) for one in said] == [is_chinese] * 3
        assert "n: only 1" in said[0] and "refreshing" in said[1] and "broke" in said[2]


async def test_a_good_look_at_health_is_no_line_of_the_usual_log(
    proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    async with http.get(proxy + "/ping") as response:
        assert response.status == 200
    async with http.get(proxy + "/health") as response:
        assert (response.status, await response.json()) == (200, {"live": True, "ready": True})
    usual = [line for line in log_lines.lines if " debug " not in line]
    told = [path for path in ("/health", "/ping") if any(f"GET {path} status=200" in line for line in usual)]
    assert told == ["/ping"]
    assert "GET /health status=200" in log_lines.text


async def test_a_good_request_id_is_taken_and_a_bad_one_is_not(
    proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    for given in ("my-id_1.2:3/4+5=", "x" * 128):
        async with http.get(proxy + "/ping", headers={"X-Request-Id": given}) as response:
            assert response.headers["X-Request-Id"] == given
        assert f"[{given}] GET /ping status=200" in log_lines.text
    for given in ("two words", "x" * 129, "a;b", "é"):
        async with http.get(proxy + "/ping", headers={"X-Request-Id": given}) as response:
            assert response.headers["X-Request-Id"] != given


ANSWERS: dict[str, tuple[bytes, int]] = {
    "good": (b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    "not found": (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "another method": (b"PUT /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    "without a token": (b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 401),
    "a body too large": (
        b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nx-api-key: a\r\nContent-Length: 99999999\r\n\r\n",
        413,
    ),
    "a body that is no gzip": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-api-key: a\r\nConnection: close\r\n"
        b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\noops",
        400,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_has_an_id_that_one_line_of_the_log_has(
    proxy: str, log_lines: LogRecorder, name: str
) -> None:
    data, status = ANSWERS[name]
    first = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-Request-Id: the-first\r\n\r\n"
    for before in (b"", first):  # on a connection of its own, and on a kept one
        answer = await send_raw(proxy, before + data)
        head = answer[answer.rindex(b"HTTP/1.") :].partition(b"\r\n\r\n")[0].decode().split("\r\n")
        assert f" {status} " in head[0]
        headers = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in head[1:]}
        assert headers["x-request-id"] != "the-first" and headers["server"] == "kimi_proxy"
        told = [line for line in log_lines.lines if f"[{headers['x-request-id']}]" in line and " debug " not in line]
        level = "warning" if status == 401 else "info"
        assert len(told) == 1 and f" {level} " in told[0] and "\n" not in told[0]


async def test_a_failure_of_the_service_is_an_error_in_the_log_with_its_reason(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    for is_stream in (False, True):
        body = chat_body("sesame", stream=is_stream)
        async with http.post(proxy + CHAT, json=body, headers=bearer(simulator.token("empty"))) as response:
            await response.read()
    lines = [line for line in log_lines.lines if " error " in line]
    assert len(lines) == 2 and all("answer_empty" in line for line in lines) and "sesame" not in log_lines.text


async def test_more_requests_than_there_may_be_are_a_503(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(max_requests=2)
    token = simulator.token("quiet")
    running = [asyncio.create_task(ask(http, proxy, token)) for _ in range(2)]
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 2)
    status, answer, headers = await ask(http, proxy, token)
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "too_busy", "5")
    async with http.get(proxy + "/health") as response:
        assert response.status == 200
    assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]
    assert (await ask(http, proxy, token))[0] == 200


async def test_bodies_have_a_limit_together(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(max_inline_mb=1, MAX_BODIES_MB=1)  # a single body may have 4/3 MB and 1 MB more
    body = json.dumps(chat_body(user="x" * 1_500_000)).encode()

    async def ask_at_length(token: str) -> tuple[int, Any, str]:
        async with http.post(proxy + CHAT, data=io.BytesIO(body), headers=bearer(token)) as response:
            return response.status, await response.json(), response.headers.get("Retry-After", "")

    token = simulator.token("hello", "slow=ask:1.5")
    running = asyncio.create_task(ask_at_length(token))
    await simulator.wait_until(lambda: simulator.account(token).count("ask") == 1)
    status, answer, retry_after = await ask_at_length(simulator.token("hello"))
    assert (status, answer["error"]["code"], retry_after) == (503, "too_busy", "5")
    assert "no room" in answer["message"]
    assert (await ask(http, proxy, simulator.token("hello")))[0] == 200
    assert (await running)[0] == 200
    assert (await ask_at_length(simulator.token("hello")))[0] == 200


async def test_more_answers_of_one_account_than_there_may_be_are_a_429(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(MAX_ACCOUNT_REQUESTS=1)
    token = simulator.token("quiet")
    running = asyncio.create_task(ask(http, proxy, token))
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
    status, answer, headers = await ask(http, proxy, token)
    assert (status, answer["error"]["code"]) == (429, "queue_full") and "Retry-After" in headers
    assert (await ask(http, proxy, simulator.token("hello")))[0] == 200
    assert (await running)[0] == 200


async def test_the_page_runs_its_own_script_and_nothing_else(
    start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    async with http.get(await start_proxy()) as response:
        page, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert (response.status, response.content_type) == (200, "text/html")
    for name in ("script", "style"):
        (inline,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; connect-src 'self'; ") and "unsafe" not in policy
    assert not re.search(r"""(?:src|href)=["']|innerHTML|\son[a-z]+=["']""", page)
    assert page.count("\n") <= 200


PATHS = {
    CHAT: chat_body(),
    "/v1/messages": chat_body(),
    "/v1/messages/count_tokens": chat_body(),
    "/v1/responses": {"input": "hi"},
    "/v1/completions": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/v1/models/kimi", "/v1/files"])
async def test_any_spelling_of_the_base_url_works(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, path: str
) -> None:
    headers = bearer(simulator.token("hello"))
    rest = path.removeprefix("/v1/")
    for spelling in (rest, f"v1/v1/{rest}", f"/{rest}", f"v1//{rest}", f"/v1/{rest}/", f"{rest}//"):
        url = URL(f"{proxy}/{spelling}", encoded=True)
        method = "POST" if path in PATHS else "GET"
        async with http.request(method, url, json=PATHS.get(path), headers=headers) as response:
            assert response.status == 200, spelling
    async with http.post(f"{proxy}/messages", data=b"{", headers=headers) as response:
        assert (response.status, (await response.json())["type"]) == (400, "error")
    async with http.get(f"{proxy}/v1") as response:
        assert response.status == 200
    async with http.get(f"{proxy}/metrics", headers=headers) as response:
        assert f'route="{path.replace("/kimi", "/{id}")}"' in await response.text()


async def test_a_stream_over_the_older_http_ends_with_its_connection(simulator: Simulator, proxy: str) -> None:
    host, _, port = proxy.removeprefix("http://").partition(":")
    for path, body in PATHS.items():
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(data)}\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}Authorization: Bearer {simulator.token('hello')}\r\n\r\n".encode() + data)
        async with asyncio.timeout(10):
            if path.endswith("count_tokens"):
                assert b"Content-Length" in await reader.readuntil(b"\r\n\r\n")
            else:
                assert b"keep-alive" not in (await reader.read()).partition(b"\r\n\r\n")[0]
        writer.close()


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_in_an_unknown_encoding_is_a_415_that_names_it(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, path: str
) -> None:
    headers = {**bearer(simulator.token("hello")), "Content-Encoding": "zstd"}
    async with http.post(proxy + path, data=b"(\xb5/\xfd", headers=headers) as response:
        assert response.status == 415 and "zstd" in await response.text()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("path", "token", "encoding", "status"),
    [(CHAT, "hello", "zstd", 415), (CHAT, "-", "gzip", 401), ("/v1/none", "hello", "gzip", 404)],
)
async def test_who_is_refused_need_not_send_the_rest_of_the_body(
    proxy: str, path: str, token: str, encoding: str, status: int, is_whole: bool
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Encoding: {encoding}\r\n"
    size = 5 if is_whole else 5_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(f"{head}Content-Length: {size}\r\n\r\n12345".encode())
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert f" {status} " in answer and ("Connection: close" in answer) is not is_whole
    writer.close()


@pytest.mark.parametrize(
    ("faults", "headers", "status", "is_final"),
    [
        (("dead",), {}, 401, True),
        ((), {}, 200, False),
        (("status=ask:429", "retry-after=61"), {}, 429, True),
        (("status=ask:429", "retry-after=60"), {}, 429, False),
    ],
)
async def test_who_cannot_be_helped_soon_is_told_not_to_ask_again(
    simulator: Simulator,
    proxy: str,
    http: aiohttp.ClientSession,
    faults: tuple[str, ...],
    headers: dict[str, str],
    status: int,
    is_final: bool,
) -> None:
    got, _, head = await ask(http, proxy, simulator.token("hello", *faults))
    assert (got, head.get("x-should-retry")) == (status, "false" if is_final else None)


async def test_a_refused_token_lists_no_models(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    for faults, status in ((("dead",), 401), ((), 200)):
        async with http.get(f"{proxy}/v1/models", headers=bearer(simulator.token("hello", *faults))) as response:
            assert response.status == status
            if status == 401:
                assert (await response.json())["error"]["code"] == "token_dead"


async def test_models_are_listed_while_one_of_the_accounts_lives(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    tokens = simulator.token("hello", "status=refresh:401"), simulator.token("hello")
    for header in map(",".join, (tokens, reversed(tokens))):
        async with http.get(f"{proxy}/v1/models", headers=bearer(header)) as response:
            assert response.status == 200


async def test_a_key_may_stand_in_any_header(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    for name in ("api-key", "x-api-key"):
        async with http.post(proxy + CHAT, json=chat_body(), headers={name: simulator.token("hello")}) as response:
            assert response.status == 200


async def test_a_page_may_call_a_private_network(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"), cors_origins=("https://good.example",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    for origin, allowed in (("https://good.example", "true"), ("https://evil.example", None)):
        async with http.options(proxy + CHAT, headers={**asked, "Origin": origin}) as response:
            assert response.headers.get("Access-Control-Allow-Private-Network") == allowed


async def test_the_first_request_whose_tools_switch_search_off_is_told_in_the_log(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    for fields in ({}, {"tools": [WEATHER], "model": "kimi-search"}, {"tools": [WEATHER], "use_search": False}):
        await ask(http, proxy, simulator.token("hello"), **fields)
    assert "no web search" not in log_lines.text
    for _ in range(2):
        await ask(http, proxy, simulator.token("hello"), tools=[WEATHER])
    assert log_lines.text.count("no web search: the request has tools") == 1


@pytest.mark.parametrize("path", PATHS)
async def test_a_compressed_body_counts_by_what_it_becomes(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, path: str
) -> None:
    proxy = await start_proxy()
    text = json.dumps({**PATHS[path], "user": "x" * 200_000}).encode()
    bomb = text[:-1] + b" " * 30_000_000 + text[-1:]
    bodies = [
        (gzip.compress(text), "gzip", 200),
        (zlib.compress(text), "deflate", 200),
        (gzip.compress(text)[:-20], "gzip", 400),
        (b"no gzip", "gzip", 400),
        (gzip.compress(bomb), "gzip", 413),
    ]
    for body, encoding, status in bodies:
        headers = {**bearer(simulator.token("hello")), "Content-Encoding": encoding}
        async with http.post(proxy + path, data=body, headers=headers) as response:
            assert response.status == status, await response.text()


@pytest.mark.parametrize(
    ("order", "is_read"),
    [("hello", True), ("hello+status=ask:500", True), ("hello+garbage", True), ("long+pace=0.05", False)],
)
async def test_what_a_request_held_is_free_when_it_ends_however_it_ends(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, order: str, is_read: bool
) -> None:
    """Prompts are large, and the garbage collector comes late."""
    token = simulator.token(*order.split("+"))
    gc.collect()
    gc.disable()
    gc.freeze()  # the module's own questions are not looked at
    try:
        async with http.post(proxy + CHAT, json=chat_body(stream=True), headers=bearer(token)) as response:
            await (response.read() if is_read else response.content.readuntil(b"\n\n"))
        await simulator.settle(token)
        deadline = time.monotonic() + 5
        while held := [one for one in gc.get_objects() if isinstance(one, ChatRequest | Question | ResponseWriter)]:
            assert time.monotonic() < deadline, {type(one).__name__ for one in held}
            await asyncio.sleep(0.02)
    finally:
        gc.enable()
        gc.unfreeze()
