"""Section 14: what the service gets to see of us."""

from __future__ import annotations

import aiohttp
import pytest
from conftest import StartProxy, bearer, chat_body
from kimi_simulator import Simulator

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


@pytest.mark.parametrize("fault", ["opaque", "rotate"])
async def test_any_access_token_and_rotated_refresh_tokens_will_do(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(token_seconds=1e-6)
    token = simulator.token("hello", fault)
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
