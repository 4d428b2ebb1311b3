"""Section 14: what the service gets to see of us."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import Account, Simulator

from kimi_proxy import Question, open_service_session

CHAT = "/v1/chat/completions"


async def ask(http: aiohttp.ClientSession, proxy: str, token: str) -> int:
    async with http.post(proxy + CHAT, json=chat_body(), headers=bearer(token)) as response:
        await response.read()
        return response.status


async def test_the_protocol_is_kept_to_the_letter_and_cookies_are_not(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello")
    for _ in range(3):
        assert await ask(http, proxy, token) == 200
    account = await simulator.settle(token)
    steps = [call.step for call in account.calls if call.step != "remove"]
    assert steps == ["refresh", *["open", "ask"] * 3]
    assert account.count("remove") == 3
    for call in account.calls:
        secret = token if call.step == "refresh" else account.access_tokens[0]
        assert call.headers["Authorization"] == f"Bearer {secret}"
        assert "Cookie" not in call.headers
    assert not simulator.violations


@pytest.mark.parametrize("faults", [("opaque",), ("opaque", "rotate")])
async def test_any_access_token_and_rotated_refresh_tokens_will_do(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, faults: tuple[str, ...]
) -> None:
    proxy = await start_proxy(token_seconds=1e-6)
    token = simulator.token("hello", *faults)
    for _ in range(3):
        assert await ask(http, proxy, token) == 200
        await simulator.settle(token)
    assert simulator.account(token).count("refresh") >= 3


async def test_two_accounts_never_share_a_token(simulator: Simulator, proxy: str, http: aiohttp.ClientSession) -> None:
    tokens = [simulator.token("hello") for _ in range(5)]
    for token in tokens:
        assert await ask(http, proxy, token) == 200
    for token in tokens:
        account = await simulator.settle(token)
        assert (account.count("refresh"), len(account.conversations)) == (1, 1)


async def test_the_pool_keeps_no_cookies_and_has_no_limit_of_its_own() -> None:
    async with open_service_session() as session:
        assert isinstance(session.cookie_jar, aiohttp.DummyCookieJar)
        assert session.connector is not None and session.connector.limit == 0


def test_a_question_shows_no_text() -> None:
    assert "sesame" not in repr(Question("sesame", True))


async def answer(http: aiohttp.ClientSession, proxy: str, token: str, **fields: Any) -> tuple[int, Any]:
    async with http.post(proxy + CHAT, json=chat_body(**fields), headers=bearer(token)) as response:
        return response.status, await response.json()


def steps(account: Account) -> list[str]:
    return [call.step for call in account.calls if call.step != "remove"]


@pytest.mark.parametrize("retired", ["redirect", "html", "404", "405", "410"])
@pytest.mark.parametrize("stream", [False, True])
async def test_auto_moves_to_connect_where_classic_is_retired_and_stays(
    start_proxy: StartProxy,
    simulator: Simulator,
    http: aiohttp.ClientSession,
    log_lines: LogRecorder,
    retired: str,
    stream: bool,
) -> None:
    simulator.retired = retired
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello")
    async with http.post(proxy + CHAT, json=chat_body(stream=stream), headers=bearer(token)) as response:
        text = await response.text()
        assert response.status == 200 and ("[DONE]" in text) is stream
    assert "classic seems to be retired" in log_lines.text
    account = await simulator.settle(token)
    assert [sorted(body) for body in account.asked] == [["message", "options", "scenario", "tools"]]
    before = len(account.calls)
    assert (await answer(http, proxy, token))[0] == 200
    assert [call.step for call in account.calls[before:] if call.step != "remove"] == ["ask"]


async def test_auto_stays_with_classic_while_that_answers(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello", "status=ask:500")
    assert (await answer(http, proxy, token))[0] == 502
    assert steps(simulator.account(token)) == ["refresh", "open", "ask"]


@pytest.mark.parametrize("retired", ["redirect", "html", "404"])
async def test_with_a_fixed_protocol_a_sign_of_retirement_is_an_error(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, retired: str
) -> None:
    simulator.retired = retired
    proxy = await start_proxy(protocol="classic")
    status, body = await answer(http, proxy, simulator.token("hello"))
    assert status == 502 and body["error"]["code"].startswith("service_")


async def test_where_both_fail_connects_failure_is_told_and_nothing_is_settled(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    simulator.retired = "404"
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("hello", "status=ask:503")
    status, body = await answer(http, proxy, token)
    assert status == 502 and "ordered status 503" in body["error"]["message"]
    simulator.retired = ""
    good = simulator.token("hello")
    assert (await answer(http, proxy, good))[0] == 200
    assert steps(simulator.account(good)) == ["refresh", "open", "ask"]


@pytest.mark.parametrize("fault", ["camel", "old-refresh", "new-refresh", "opaque"])
async def test_connect_bears_every_reading_of_the_refresh(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", fault)
    assert (await answer(http, proxy, token))[0] == 200
    await simulator.settle(token)


@pytest.mark.parametrize("protocol", ["auto", "connect"])
async def test_an_access_token_is_used_as_it_is_and_goes_to_connect(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, protocol: str
) -> None:
    proxy = await start_proxy(protocol=protocol)
    token = simulator.token("hello")
    account = simulator.account(token)
    access_token = simulator.make_access_token(token)
    assert (await answer(http, proxy, access_token))[0] == 200
    await simulator.settle(token)
    assert steps(account) == ["ask"]
    expired = simulator.make_access_token(token, life_seconds=-1)
    status, body = await answer(http, proxy, expired)
    assert (status, body["error"]["code"]) == (401, "token_expired")


async def test_an_access_token_that_the_service_refuses_is_told_as_expired(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "unauthorized-always=ask")
    status, body = await answer(http, proxy, simulator.make_access_token(token))
    assert (status, body["error"]["code"]) == (401, "token_expired")


THINKING = {"role": "assistant", "content": "答案是 42。", "reasoning_content": "让我想想。"}


@pytest.mark.parametrize("faults", [(), ("stages",), ("cut-characters",), ("stages", "one-piece")])
async def test_thinking_is_told_apart_from_the_answer(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, faults: tuple[str, ...]
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("think", *faults)
    status, body = await answer(http, proxy, token, model="kimi-thinking")
    assert (status, body["choices"][0]["message"]) == (200, THINKING)
    assert simulator.account(token).asked[0]["options"] == {"thinking": True}
    status, body = await answer(http, proxy, simulator.token("think-only"))
    assert (status, body["error"]["code"]) == (502, "answer_empty")


ENDS = {
    "done-without-end": (200, "stop"),
    "no-end": (200, "length"),
    "half-an-event": (502, "answer_broken"),
    "error-after-done": (502, "service_failed"),
    "overloaded": (429, "rate_limited"),
}


@pytest.mark.parametrize("fault", ENDS)
async def test_a_connect_answer_is_read_to_its_end_before_it_is_called_good(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    status, body = await answer(http, proxy, simulator.token("hello", fault))
    outcome = body["choices"][0]["finish_reason"] if status == 200 else body["error"]["code"]
    assert (status, outcome) == ENDS[fault]


async def test_a_second_after_done_the_answer_is_over(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    async with asyncio.timeout(2.5):
        status, body = await answer(http, proxy, simulator.token("hello", "done-without-end", "linger"))
    assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")


async def test_what_is_not_known_is_passed_over_and_told_once(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    for _ in range(8):
        assert (await answer(http, proxy, simulator.token("long")))[0] == 200
    assert log_lines.text.count("unknown block from the service, passed over: tomorrow") == 1


@pytest.mark.parametrize("sources", ["text", "annotations", "none"])
async def test_sources_are_shown_as_set(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, sources: str
) -> None:
    proxy = await start_proxy(protocol="connect", sources=sources)
    _, body = await answer(http, proxy, simulator.token("cite"))
    message = body["choices"][0]["message"]
    assert ("搜索结果来自" in message["content"]) is (sources == "text")
    assert ("[1]" in message["content"]) is (sources != "none")
    urls = [place["url_citation"]["url"] for place in message.get("annotations", [])]
    assert set(urls) == (
        set() if sources == "none" else {"https://www.kimi.com/", "https://www.moonshot.cn/about?a=1&b=2"}
    )
