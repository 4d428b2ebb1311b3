"""Section 15: what the service gets to see of us."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast
from unittest.mock import AsyncMock

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import HELLO, NEW_LIST, OLD_LIST, Account, Simulator, connect_error, make_envelope

import kimi_proxy
from kimi_proxy import (
    KIMI,
    Accounts,
    AnswerStream,
    BackgroundTasks,
    ClassicAnswer,
    Connect,
    ConnectAnswer,
    EnvelopeParser,
    Metrics,
    Model,
    Opened,
    ProxyError,
    Question,
    Settings,
    SSEParser,
    StateFiles,
    Text,
    choose_effort,
    choose_model,
    encode_envelope,
    open_service_session,
    parse_models,
)

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
    proxy = await start_proxy(TOKEN_SECONDS=1e-6)
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
    return [call.step for call in account.calls if call.step not in ("remove", "models")]


@pytest.mark.parametrize("refresh_too", [False, True])
@pytest.mark.parametrize("retired", ["redirect", "html", "404", "405", "410"])
@pytest.mark.parametrize("stream", [False, True])
async def test_auto_moves_to_connect_where_classic_is_retired_and_stays(
    start_proxy: StartProxy,
    simulator: Simulator,
    http: aiohttp.ClientSession,
    log_lines: LogRecorder,
    retired: str,
    stream: bool,
    refresh_too: bool,
) -> None:
    simulator.retired = retired
    simulator.refresh_retired = refresh_too
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
    assert [call.step for call in account.calls[before:] if call.step not in ("remove", "models")] == ["ask"]


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


@pytest.mark.parametrize("old_call", ["404", "410", "redirect", "html", "500", "429"])
async def test_a_token_that_the_new_refresh_refuses_is_dead_whatever_the_old_one_says(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, old_call: str
) -> None:
    faults = [f"status=refresh:{old_call}"] if old_call in ("500", "429") else []
    if not faults:
        simulator.retired, simulator.refresh_retired = old_call, True
    proxy = await start_proxy(protocol="connect")
    dead = simulator.token("hello", "old-refresh", *faults)
    status, body = await answer(http, proxy, dead)
    assert (status, body["error"]["code"]) == (401, "token_dead")
    assert (await answer(http, proxy, f"{dead},{simulator.token('hello')}"))[0] == 200


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


async def test_a_dead_token_told_within_a_connect_answer_is_refreshed_and_asked_once_more(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "stale-once")
    assert (await answer(http, proxy, token))[0] == 200
    account = await simulator.settle(token)
    assert (account.count("refresh"), account.count("ask")) == (2, 2)


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
    for script in ("think-only", "think-tags-only"):
        status, body = await answer(http, proxy, simulator.token(script))
        assert (status, body["error"]["code"]) == (502, "answer_empty")


ENDS = {
    "done-without-end": (200, "stop"),
    "no-end": (200, "length"),
    "half-an-event": (502, "answer_broken"),
    "error-after-done": (502, "service_failed"),
    "overloaded": (429, "service_busy"),
}


@pytest.mark.parametrize("fault", ENDS)
async def test_a_connect_answer_is_read_to_its_end_before_it_is_called_good(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, fault: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    status, body = await answer(http, proxy, simulator.token("hello", fault))
    outcome = body["choices"][0]["finish_reason"] if status == 200 else body["error"]["code"]
    assert (status, outcome) == ENDS[fault]


@pytest.mark.parametrize("faults", [("done-without-end", "linger"), (f"heartbeats={5 + -(-len(HELLO) // 4)}",)])
async def test_a_second_after_done_the_answer_is_over(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, faults: tuple[str, ...]
) -> None:
    proxy = await start_proxy(protocol="connect")
    async with asyncio.timeout(2.5):
        status, body = await answer(http, proxy, simulator.token("hello", *faults))
    assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")


async def test_what_is_not_known_is_passed_over_and_told_once(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    for _ in range(8):
        assert (await answer(http, proxy, simulator.token("long")))[0] == 200
    assert log_lines.text.count("unknown block from Kimi, ignored: tomorrow") == 1


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


K26 = Model("kimi-k2.6", "SCENARIO_K2D6", key="k2d6")
K26_THINKING = Model("kimi-k2.6-thinking", "SCENARIO_K2D6", thinking=True, key="k2d6-t")
COMPUTER = Model("kimi-ok-computer", "SCENARIO_OK_COMPUTER", agent_id="ok-computer", agent_mode="TYPE_NORMAL")
DEFAULT = Model("kimi", "SCENARIO_K2D6", key="k2d6")
ALL = (DEFAULT, K26, K26_THINKING, COMPUTER)
AGENT = "abcdefghij0123456789"
K1 = "crm40ee9e5jvhsn7ptcg"


def test_models_are_named_by_their_display_names_with_the_default_first() -> None:
    assert parse_models(OLD_LIST) == ALL
    assert [model.id for model in parse_models({**OLD_LIST, "defaultScenario": None})] == [model.id for model in ALL]
    thinking = {"scenario": "SCENARIO_K2D6", "thinking": True}
    assert parse_models({**OLD_LIST, "defaultScenario": thinking})[0].thinking


@pytest.mark.parametrize("value", [{}, {"availableModels": None}, {"availableModels": [None, {}]}])
def test_odd_lists_of_models_are_empty(value: dict[str, Any]) -> None:
    assert parse_models(value) == ()


def test_of_a_hostile_list_of_models_only_names_are_taken_and_not_too_many() -> None:
    bad = {"key": 'a"\x1b[31m', "id": "a\u202eb", "kimiPlusId": "../ x", "defaultReasoningEffort": "E" * 65}
    entry = {"scenario": "S", "displayName": "\x1b]0;K3\x07/'" + "x" * 9999, **bad}
    entries = [{"scenario": "\x07"}, entry, *({"scenario": "S", "displayName": f"m{at}"} for at in range(9999))]
    (first, second, *_) = models = parse_models({"availableModels": entries})
    assert len(models) == 200 and (first.id, second) == ("kimi", Model("kimi-0-k3-" + "x" * 55, "S"))


CHOICES: dict[str, tuple[Model, bool]] = {
    "kimi": (DEFAULT, True),
    "kimi-search": (DEFAULT, True),
    "kimi-k2.6": (K26, True),
    "kimi-k2.6-search-silent": (K26, True),
    "kimi-k2.6-thinking": (K26_THINKING, True),
    "kimi-k2.6-thinking-search": (K26_THINKING, True),
    "kimi-thinking": (replace(DEFAULT, thinking=True), True),
    "kimi-ok-computer": (COMPUTER, True),
    "kimi-math": (replace(DEFAULT, use_math=True), True),
    "kimi-research-search": (replace(DEFAULT, use_research=True), True),
    "kimi-k1-math": (replace(DEFAULT, thinking=True, use_math=True), True),
    AGENT: (replace(DEFAULT, agent_id=AGENT), True),
    f"{AGENT}-search": (replace(DEFAULT, agent_id=AGENT), True),
    "kimi-k9": (DEFAULT, False),
    "gpt-4o": (DEFAULT, False),
    "claude-search-3": (DEFAULT, False),
    "": (DEFAULT, False),
}


NEW = {model.id: model for model in parse_models(NEW_LIST)}


def test_the_newer_list_has_models_by_all_their_names_and_no_agent_as_default() -> None:
    assert list(NEW) == ["kimi", "kimi-instant", "kimi-k2.8", "kimi-k3", "kimi-k3-swarm"]
    assert [NEW[name].is_agent for name in NEW] == [False, False, True, True, True]
    models = tuple(NEW.values())
    for name in ("kimi-k3", "k3-agent", "k3", "k3-agent-search"):
        assert choose_model(name, models) == (NEW["kimi-k3"], True)
    for default in ({}, {"model": "k3-agent"}, {"scenario": "SCENARIO_OK_COMPUTER"}, {"model": "k9"}):
        assert parse_models({**NEW_LIST, "defaultScenario": default})[0].service_id == "k2d6-chat"
    assert parse_models({"availableModels": NEW_LIST["availableModels"][1:]})[0] == KIMI


def test_a_models_own_names_reach_it_where_it_shares_the_one_that_is_shown() -> None:
    names = {"a": "Kimi", "b": "K3", "c": "K3"}
    entries = [
        {"id": one, "key": f"key-{one}", "displayName": name, "scenario": "SCENARIO_CHAT"}
        for one, name in names.items()
    ]
    models = parse_models({"availableModels": entries, "defaultScenario": {"model": "b"}})
    assert [model.id for model in models] == ["kimi", "a", "kimi-k3", "c"]
    for one in names:
        assert [choose_model(name, models)[0].service_id for name in (one, f"key-{one}")] == [one, one]


def test_without_a_default_model_the_default_scenario_counts_whether_it_thinks_or_not() -> None:
    for thinking in (True, False):
        default = {"scenario": "SCENARIO_K2D6", "thinking": thinking}
        entries = [{"scenario": "SCENARIO_K2D5"}, {"scenario": "SCENARIO_K2D6", "thinking": not thinking}]
        assert parse_models({"availableModels": entries, "defaultScenario": default})[0].scenario == "SCENARIO_K2D6"


EFFORTS = {
    "kimi-instant": {"": "LOW", "none": "NONE", "minimal": "NONE", "low": "LOW", "medium": "LOW", "max": "LOW"},
    "kimi-k3": {
        "": "HIGH",
        "none": "LOW",
        "minimal": "LOW",
        "low": "LOW",
        "medium": "LOW",
        "high": "HIGH",
        "max": "MAX",
    },
}


@pytest.mark.parametrize("name", EFFORTS)
def test_the_nearest_effort_that_the_model_has_is_asked_for(name: str) -> None:
    chosen = {wanted: choose_effort(NEW[name], wanted) for wanted in EFFORTS[name]}
    assert chosen == {wanted: f"REASONING_EFFORT_{effort}" for wanted, effort in EFFORTS[name].items()}
    assert choose_effort(KIMI, "high") == ""
    quiet = replace(NEW[name], default_effort="REASONING_EFFORT_NONE", thinking=True)
    assert not choose_effort(quiet, "").endswith("NONE")


@pytest.mark.parametrize("name", CHOICES)
def test_a_name_means_a_model_and_what_is_not_known_the_default(name: str) -> None:
    assert choose_model(name, ALL) == CHOICES[name]


def test_without_a_list_the_names_still_mean_something() -> None:
    assert choose_model("kimi", ()) == (KIMI, True)
    assert choose_model("kimi-thinking", (KIMI,))[0].thinking


@pytest.mark.parametrize(
    ("name", "asked", "opened"),
    [
        ("kimi", {}, {}),
        ("kimi-math", {"use_math": True}, {}),
        ("kimi-research", {"use_research": True}, {}),
        ("kimi-k1-search", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-k1", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-thinking", {"kimiplus_id": K1}, {"kimiplus_id": K1}),
        ("kimi-search-math-silent", {"use_math": True}, {}),
        (AGENT, {"kimiplus_id": AGENT}, {"kimiplus_id": AGENT}),
    ],
)
async def test_classics_models_are_asked_as_it_wants_them(
    simulator: Simulator,
    proxy: str,
    http: aiohttp.ClientSession,
    name: str,
    asked: dict[str, Any],
    opened: dict[str, Any],
) -> None:
    token = simulator.token("hello")
    status, body = await answer(http, proxy, token, model=name)
    assert (status, body["model"]) == (200, name)
    account = await simulator.settle(token)
    names = ("kimiplus_id", "use_math", "use_research")
    assert {key: value for key, value in account.asked[0].items() if key in names} == asked
    (opening,) = [call.body for call in account.calls if call.step == "open"]
    assert {key: value for key, value in opening.items() if key in names} == opened
    assert account.count("research-usage") == (name == "kimi-research")


async def test_a_used_up_quota_is_a_429_and_opens_nothing(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello", "no-quota")
    status, body = await answer(http, proxy, token, model="kimi-research")
    assert (status, body["error"]["code"]) == (429, "quota_used_up")
    assert simulator.account(token).count("open") == 0


async def test_connects_models_are_listed_asked_and_kept_for_a_while(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello")
    for _ in range(2):
        async with http.get(f"{proxy}/v1/models", headers=bearer(token)) as response:
            listed = [entry["id"] for entry in (await response.json())["data"]]
    assert listed[:4] == ["kimi", "kimi-search", "kimi-k2.6", "kimi-k2.6-search"]
    assert "kimi-k2.6-thinking" in listed and "kimi-ok-computer" in listed
    for name, status in (("kimi-k2.6-search", 200), ("kimi-k9", 404)):
        async with http.get(f"{proxy}/v1/models/{name}", headers=bearer(token)) as response:
            assert response.status == status
            assert (await response.json()).get("id") == (name if status == 200 else None)
    for name in ("kimi-k2.6-thinking", "kimi-ok-computer", "gpt-4o"):
        assert (await answer(http, proxy, token, model=name))[0] == 200
    account = await simulator.settle(token)
    assert account.count("models") == 1
    asked = [(body["scenario"], body["options"]["thinking"], body.get("kimiplusId")) for body in account.asked]
    assert asked == [
        ("SCENARIO_K2D6", True, None),
        ("SCENARIO_OK_COMPUTER", False, "ok-computer"),
        ("SCENARIO_K2D6", False, None),
    ]
    assert "model gpt-4o is not known" in log_lines.text


async def test_where_the_service_lists_no_models_a_built_in_list_does(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "status=models:500")
    async with http.get(f"{proxy}/v1/models", headers=bearer(token)) as response:
        assert "kimi" in [entry["id"] for entry in (await response.json())["data"]]
    assert (await answer(http, proxy, token))[0] == 200
    assert simulator.account(token).asked[0]["scenario"].startswith("SCENARIO_")


async def test_a_continuation_that_fails_ends_the_answer_as_cut(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("length", "status=continue:500")
    status, body = await answer(http, proxy, token)
    assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
    assert body["choices"][0]["message"]["content"] == "第一"
    await simulator.settle(token)


# Calls by a protocol of its own, without a proxy in front.


@asynccontextmanager
async def speak_connect(simulator: Simulator, **settings: Any) -> AsyncIterator[tuple[Connect, Accounts]]:
    """The connect protocol, and the accounts that it refreshes."""
    chosen = Settings(**{"base_url": simulator.url, "auth_url": simulator.url, **settings})
    tasks = BackgroundTasks()
    async with open_service_session() as session, open_service_session(reuse=False) as transfers:

        async def refresh(account: Any) -> Any:
            return await protocol.refresh(account)

        accounts = Accounts(refresh, tasks, StateFiles(None, Metrics()))
        protocol = Connect(session, transfers, accounts, Metrics(), chosen)
        yield protocol, accounts
        await tasks.drain(1)


async def read_all(protocol: Connect, accounts: Accounts, token: str, question: Question) -> AnswerStream:
    """Ask, read the whole answer, and remove its conversation."""
    account = accounts.get(token)
    stream = await protocol.ask(account, "", question, asyncio.get_running_loop().time() + 5)
    try:
        while await stream.read() is not None:
            pass
    finally:
        await stream.drain(1.0)
    await protocol.remove(account, stream.answer.conversation_id)
    return stream


@pytest.mark.parametrize(
    ("name", "effort", "options"),
    [
        ("kimi", "", {"thinking": True, "reasoning_effort": "REASONING_EFFORT_LOW", "model": "k2d6-chat"}),
        ("kimi", "none", {"thinking": False, "reasoning_effort": "REASONING_EFFORT_NONE", "model": "k2d6-chat"}),
        ("k3", "max", {"thinking": True, "reasoning_effort": "REASONING_EFFORT_MAX", "model": "k3-agent"}),
        (
            "kimi-k3-swarm",
            "",
            {"thinking": True, "reasoning_effort": "REASONING_EFFORT_HIGH", "model": "k3-agent-swarm"},
        ),
    ],
)
async def test_a_listed_model_is_asked_with_all_that_tells_it_apart(
    simulator: Simulator, name: str, effort: str, options: dict[str, Any]
) -> None:
    token = simulator.token("hello", "new-models")
    async with speak_connect(simulator) as (protocol, accounts):
        models = await protocol.models(accounts.get(token))
        question = Question("hi", True, model=choose_model(name, models)[0], effort=effort)
        await read_all(protocol, accounts, token, question)
    (asked,) = (await simulator.settle(token)).asked  # the simulator compares it with its list
    assert asked["options"] == options and asked["tools"]


# Each API's own switches for thinking: path, model, what is sent, and the constant that Kimi is asked with.
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "max_tokens": 99}
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SWITCHES: list[tuple[str, str, dict[str, Any], str]] = [
    (CHAT, "k3-agent", {"reasoning_effort": "xhigh"}, "HIGH"),
    (CHAT, "kimi-instant", {"reasoning_effort": "none"}, "NONE"),
    (CHAT, "kimi-instant", {"thinking": {"type": "disabled"}}, "NONE"),
    (CHAT, "kimi-instant", {"thinking": {"type": "enabled"}}, "LOW"),
    (CHAT, "kimi-instant-thinking", {}, "LOW"),
    (CHAT, "kimi", {}, "LOW"),
    (MESSAGES, "k3-agent", {"output_config": {"effort": "max"}}, "MAX"),
    (MESSAGES, "k3-agent", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "LOW"),
    (MESSAGES, "k3-agent", {"thinking": {"type": "disabled"}}, "LOW"),
    (MESSAGES, "kimi-instant", {"thinking": {"type": "disabled"}}, "NONE"),
    (MESSAGES, "kimi-instant", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "LOW"),
    (RESPONSES, "k3-agent", {"reasoning": {"effort": "high"}}, "HIGH"),
    (RESPONSES, "kimi-instant", {"reasoning": {"effort": "minimal"}}, "NONE"),
]


@pytest.mark.parametrize(("path", "model", "fields", "effort"), SWITCHES)
async def test_each_apis_switch_for_thinking_reaches_kimi(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    path: str,
    model: str,
    fields: dict[str, Any],
    effort: str,
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "new-models")
    for stream in (False, True):
        request = {**HI, "model": model, "stream": stream, **fields}
        async with http.post(proxy + path, json=request, headers=bearer(token)) as response:
            assert response.status == 200, await response.text()
            await response.read()
    account = await simulator.settle(token)
    assert {body["options"]["reasoning_effort"] for body in account.asked} == {f"REASONING_EFFORT_{effort}"}


async def test_the_list_of_models_says_what_it_costs_a_user_to_know(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    async with http.get(f"{proxy}/v1/models", headers=bearer(simulator.token("hello", "new-models"))) as response:
        listed = {entry["id"]: entry for entry in (await response.json())["data"]}
    assert "description" not in listed["kimi"] and "credits" in listed["kimi-k3"]["description"]
    assert listed["kimi"]["reasoning_efforts"] == ["none", "low"]
    assert listed["kimi-k3-search"]["reasoning_efforts"] == ["low", "high", "max"]


async def test_with_tools_of_the_client_those_of_the_service_stay_away(simulator: Simulator) -> None:
    token = simulator.token("hello")
    async with speak_connect(simulator) as (protocol, accounts):
        await read_all(protocol, accounts, token, Question("hi", False, has_tools=True))
    (asked,) = simulator.account(token).asked
    assert (asked["tools"], asked["options"]["enable_plugin"]) == ([], False)


async def test_the_version_of_the_web_page_is_a_setting(simulator: Simulator) -> None:
    simulator.web_version = "2.3.0"
    token = simulator.token("hello")
    async with speak_connect(simulator, web_version="2.3.0") as (protocol, accounts):
        await read_all(protocol, accounts, token, Question("hi", False))


async def test_older_models_think_when_the_client_wants_it(simulator: Simulator) -> None:
    token = simulator.token("hello")
    async with speak_connect(simulator) as (protocol, accounts):
        for effort, model in (("high", K26), ("none", K26_THINKING), ("", K26_THINKING), ("enabled", K26)):
            await read_all(protocol, accounts, token, Question("hi", True, model=model, effort=effort))
    assert [body["options"] for body in simulator.account(token).asked] == [
        {"thinking": thinking} for thinking in (True, False, True, True)
    ]


async def test_without_a_list_the_newest_scenario_is_asked_and_then_the_older_one(simulator: Simulator) -> None:
    known, unknown = simulator.token("hello"), simulator.token("hello", "scenario=SCENARIO_K2D5")
    async with speak_connect(simulator) as (protocol, accounts):
        await read_all(protocol, accounts, known, Question("hi", True))
        await asyncio.gather(*(read_all(protocol, accounts, unknown, Question("hi", True)) for _ in range(2)))
        await read_all(protocol, accounts, unknown, Question("hi", True))
    (asked,) = simulator.account(known).asked
    assert (asked["scenario"], asked["options"]) == ("SCENARIO_CHAT", {"thinking": False, "model": "k2d6-chat"})
    account = await simulator.settle(unknown)
    assert [(body["scenario"], body["options"]) for body in account.asked] == [
        ("SCENARIO_K2D5", {"thinking": False})
    ] * 3
    assert account.count("ask") == 5  # what works is asked at once the next time


async def test_a_question_that_is_refused_for_its_own_sake_turns_nobody_to_the_older_scenario(
    simulator: Simulator,
) -> None:
    bad, good = simulator.token("hello", "status=ask:400"), simulator.token("hello", "scenario=SCENARIO_CHAT")
    async with speak_connect(simulator) as (protocol, accounts):
        with pytest.raises(ProxyError):
            await read_all(protocol, accounts, bad, Question("hi", True))
        await read_all(protocol, accounts, good, Question("hi", True))


async def test_another_refusal_is_no_reason_to_ask_as_an_older_model(simulator: Simulator) -> None:
    token = simulator.token("hello", "error-type=ask:unheard.of")
    async with speak_connect(simulator) as (protocol, accounts):
        with pytest.raises(ProxyError) as caught:
            await read_all(protocol, accounts, token, Question("hi", True))
    assert caught.value.code == "service_failed" and simulator.account(token).count("ask") == 1


async def test_calls_have_another_name_when_the_first_is_not_known(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("hello", "other-names")
    assert (await answer(http, proxy, token))[0] == 200
    account = await simulator.settle(token)
    assert (account.count("ask"), account.count("remove")) == (2, 2)


@pytest.mark.parametrize("status", [404, 501, 500])
async def test_the_first_failure_is_told_where_neither_name_is_known(simulator: Simulator, status: int) -> None:
    token = simulator.token("hello", f"status=ask:{status}")
    async with speak_connect(simulator) as (protocol, accounts):
        with pytest.raises(ProxyError) as caught:
            await read_all(protocol, accounts, token, Question("hi", True))
    assert caught.value.upstream_status == status
    assert simulator.account(token).count("ask") == (1 if status == 500 else 2)


async def test_an_answer_is_stopped_by_the_ids_of_chat_and_message(simulator: Simulator) -> None:
    for faults in ((), ("no-stop",)):
        token = simulator.token("long", "pace=0.01", *faults)
        async with speak_connect(simulator) as (protocol, accounts):
            account = accounts.get(token)
            stream = await protocol.ask(account, "", Question("hi", True), asyncio.get_running_loop().time() + 5)
            while not stream.answer.message_id:
                await stream.read()
            known = stream.answer.conversation_id
            try:
                await protocol.stop(account, known, stream.answer.message_id)
                assert not faults
            except ProxyError:
                assert faults
            stream.close()
            await protocol.remove(account, known)
        record = await simulator.settle(token)
        assert [call.step for call in record.calls][-3:] == ["ask", "stop", "remove"]


@pytest.mark.parametrize("faults", [(), ("no-stop",)])
@pytest.mark.parametrize("leaves", [True, False])
async def test_an_answer_that_is_not_wanted_any_more_is_stopped_and_then_removed(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    log_lines: LogRecorder,
    faults: tuple[str, ...],
    leaves: bool,
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("long", "pace=0.02", *faults)
    body = chat_body(stream=True, stop=[] if leaves else ["5"])
    async with http.post(proxy + CHAT, json=body, headers=bearer(token)) as response:
        await response.content.readany()
        await (response.content.readany() if leaves else response.read())
    account = await simulator.settle(token)
    assert steps(account) == ["refresh", "ask", "stop"] and account.calls[-1].step == "remove"
    assert ("may go on" in log_lines.text) is bool(faults)


@pytest.mark.parametrize("conversation_id", ["", "new"])
async def test_an_answer_left_before_its_id_is_told_is_stopped_all_the_same(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, conversation_id: str
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("long", "pace=0.1")
    account = simulator.account(token)
    asking = asyncio.create_task(answer(http, proxy, token, stream=True, conversation_id=conversation_id))
    await simulator.wait_until(lambda: any(one.told for one in account.conversations.values()))
    asking.cancel()
    await simulator.wait_until(lambda: account.count("remove") == 1)
    assert steps(account) == ["refresh", "ask", "stop"]


async def test_an_answer_that_asks_back_is_stopped_before_its_removal(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("ask-user")
    assert (await answer(http, proxy, token))[0] == 200
    assert [call.step for call in (await simulator.settle(token)).calls][-3:] == ["ask", "stop", "remove"]


# The twins of the service.


@pytest.fixture
async def overseas(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Simulator]:
    """The service at kimi.ai, beside the other one."""
    async with Simulator(overseas=True) as other:
        twins = {"cn": (simulator.url, simulator.url), "global": (other.url, other.url)}
        monkeypatch.setattr(kimi_proxy, "TWINS", twins)
        yield other


OPEN = {"base_url": "", "auth_url": "https://auth.kimi.com"}  # as without settings


@pytest.mark.parametrize("faults", [(), ("opaque",), ("old-refresh",), ("rotate",)])
async def test_a_token_that_does_not_tell_its_region_is_tried_at_both_twins(
    simulator: Simulator,
    overseas: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    faults: tuple[str, ...],
) -> None:
    proxy = await start_proxy(protocol="connect", **OPEN)
    token = overseas.token("hello", "overseas", *faults)
    for _ in range(2):
        assert (await answer(http, proxy, token))[0] == 200
    account = await overseas.settle(token)
    assert (account.count("refresh"), account.count("ask"), account.count("remove")) == (1, 2, 2)
    at_home = simulator.token("hello")
    assert (await answer(http, proxy, at_home))[0] == 200
    await simulator.settle(at_home)


async def test_auto_finds_a_token_that_connect_alone_takes(
    simulator: Simulator,
    overseas: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kimi_proxy, "CLASSIC_URL", simulator.url)
    proxy = await start_proxy(protocol="auto", **OPEN)
    for service, faults, expected in (
        (overseas, ("overseas",), ["refresh", "ask"]),
        (simulator, ("new-refresh",), ["refresh", "refresh", "ask"]),  # classic refuses it
        (simulator, (), ["refresh", "open", "ask"]),
    ):
        token = service.token("hello", *faults)
        assert (await answer(http, proxy, token))[0] == 200
        assert steps(await service.settle(token)) == expected


def test_a_token_tells_its_region_in_its_claims() -> None:
    accounts = Accounts(cast(Any, None), BackgroundTasks(), StateFiles(None, Metrics()))
    nothing = cast(Any, None)
    connect, mine = (
        Connect(nothing, nothing, accounts, Metrics(), Settings(base_url=url)) for url in ("", "http://mine")
    )
    for claims, url in (
        ({"aud": ["kimi.ai"], "region": "overseas"}, "https://www.kimi.ai"),
        ({"aud": "kimi.com"}, "https://www.kimi.com"),
        ({}, "https://www.kimi.com"),
    ):
        part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        account = accounts.get(f"e30.{part}.x")
        for access_token in ("", "e30.e30.x"):  # which need not tell what the refresh token does
            account.tokens = replace(account.tokens, access_token=access_token)
            assert (connect.base_url_for(account), mine.base_url_for(account)) == (url, "http://mine")


async def test_an_access_token_goes_to_the_twin_that_it_tells(
    simulator: Simulator, overseas: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="auto", **OPEN)
    token = overseas.token("hello", "overseas")
    assert (await answer(http, proxy, overseas.make_access_token(token)))[0] == 200
    await overseas.settle(token)
    assert simulator.connections == 0


@pytest.mark.parametrize("named", [True, False])
async def test_a_token_that_both_refuse_is_dead_and_a_url_of_the_user_is_no_twin(
    simulator: Simulator, overseas: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, named: bool
) -> None:
    proxy = await start_proxy(protocol="connect", **({} if named else OPEN))
    token = simulator.token("no-such-script")
    status, body = await answer(http, proxy, token)
    assert (status, body["error"]["code"]) == (401, "token_dead")
    assert bool(overseas.connections) is not named


async def test_a_continuation_that_falls_silent_is_told_as_any_other_answer(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(silence_seconds=0.3)
    token = simulator.token("length", "again-stall=1")
    async with asyncio.timeout(3):
        status, body = await answer(http, proxy, token)
    assert (status, body["error"]["code"]) == (504, "service_silent")
    account = await simulator.settle(token)
    assert account.count("continue") + account.count("ask") == 2


# The stream of an answer.


class Body:
    """A response with the body that `pieces` are, and then its end, or silence."""

    def __init__(self, pieces: list[bytes], *, silent: bool = False) -> None:
        self.content = self
        self.closed = asyncio.Event()
        self._pieces = pieces
        self._silent = silent

    async def read(self, _most: int) -> bytes:
        if not self._pieces and self._silent:
            await self.closed.wait()
            raise aiohttp.ClientConnectionError("Connection closed")
        return self._pieces.pop(0) if self._pieces else b""

    def close(self) -> None:
        self.closed.set()


def make_stream(body: Body, protocol: str = "connect", silence: float = 5.0, seconds: float = 9.0) -> AnswerStream:
    parser, answer = (SSEParser(), ClassicAnswer()) if protocol == "classic" else (EnvelopeParser(), ConnectAnswer())
    deadline = asyncio.get_running_loop().time() + seconds
    return AnswerStream(cast(aiohttp.ClientResponse, body), parser, answer, "a-token", silence, deadline)


@pytest.mark.parametrize(
    ("protocol", "frame", "wrong"),
    [
        ("classic", b'data: {"event":"cmpl","text":"a"}\n\n', b"data: " + bytes(2_000_000) + b"\n\n"),
        ("connect", make_envelope({"block": {"text": {"content": "a"}}}), encode_envelope(b"no gzip", flags=1)),
        ("connect", make_envelope({"block": {"text": {"content": "a"}}}), b"\0\xff\xff\xff\xff"),
    ],
)
async def test_what_is_wrong_behind_a_frame_is_told_by_the_next_read(protocol: str, frame: bytes, wrong: bytes) -> None:
    stream = make_stream(Body([frame + wrong]), protocol)
    assert await stream.read() == [Text("a")]
    for _ in range(2):
        with pytest.raises(ProxyError) as caught:
            await stream.read()
        assert caught.value.code == "answer_broken"
    stream.close()


async def test_a_token_that_dies_within_an_answer_is_told_with_the_token_that_was_used() -> None:
    stream = make_stream(Body([make_envelope(connect_error("unauthenticated", "dead"), 2)]))
    with pytest.raises(ProxyError) as caught:
        await stream.read()
    assert (caught.value.code, caught.value.access_token) == ("token_dead", "a-token")
    stream.close()


@pytest.mark.parametrize(("limits", "code"), [((0.05, 9.0), "service_silent"), ((9.0, 0.05), "answer_too_long")])
async def test_silence_and_the_deadline_end_a_read_that_waits(limits: tuple[float, float], code: str) -> None:
    body = Body([make_envelope({"chat": {"id": "a-chat"}})], silent=True)
    stream = make_stream(body, "connect", *limits)
    assert await stream.read() == [Opened("a-chat", hits_inline=False)]
    with pytest.raises(ProxyError) as caught:
        await stream.read()
    assert caught.value.code == code and body.closed.is_set()


async def test_a_client_that_reads_slowly_is_no_silence_of_the_service() -> None:
    pieces = [make_envelope({"block": {"text": {"content": "a"}}})] * 2
    stream = make_stream(Body(pieces), silence=0.05)
    assert await stream.read() == [Text("a")]
    await asyncio.sleep(0.15)
    assert await stream.read() == []  # a second `set` of the same text
    stream.close()


async def test_nothing_that_happens_while_draining_is_raised() -> None:
    for error in (aiohttp.ClientPayloadError("cut"), RuntimeError("Connection closed."), ConnectionResetError()):
        body = Body([])
        body.read = AsyncMock(side_effect=error)  # type: ignore[method-assign]
        await make_stream(body).drain(1.0)
        assert body.closed.is_set()
    body = Body([b"x"], silent=True)
    await make_stream(body).drain(0.01)
    assert body.closed.is_set()


async def test_heartbeats_alone_are_silence(
    start_proxy: StartProxy, simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect", silence_seconds=0.3)
    async with asyncio.timeout(3):
        status, body = await answer(http, proxy, simulator.token("hello", "heartbeats=5"))
    assert (status, body["error"]["code"]) == (504, "service_silent")


async def test_lines_for_each_frame_are_written_at_debug_level_alone(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    assert await ask(http, proxy, simulator.token("hello")) == 200
    assert log_lines.text.count("< cmpl") >= 7


async def test_ids_in_a_token_that_no_header_can_have_are_replaced(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(protocol="connect")
    ids = {"sub": "a\r\nX-Evil: 1", "ssid": "é", "device_id": ["x"]}
    claims = {"app_id": "kimi", "typ": "access", "exp": 4e9, **ids}
    access_token = ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({}, claims, "s")
    )
    token = simulator.token("hello")
    account = simulator.account(token)
    account.access_tokens.append(access_token)
    assert (await answer(http, proxy, access_token))[0] == 200
    await simulator.settle(token)
    (call,) = [call for call in account.calls if call.step == "ask"]
    sent = [call.headers[name] for name in ("x-traffic-id", "x-msh-session-id", "x-msh-device-id")]
    assert all(map(re.compile("[a-z0-9]+").fullmatch, sent)) and "X-Evil" not in call.headers
    simulator.violations.clear()  # it wants the ids that the token tells


@pytest.mark.parametrize("is_on", [False, True])
async def test_tools_can_be_told_in_connects_system_prompt(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, is_on: bool
) -> None:
    proxy = await start_proxy(protocol="connect", system_prompt=is_on)
    token = simulator.token("tool")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = chat_body("hi", tools=[tool])
    async with http.post(f"{proxy}/v1/chat/completions", json=body, headers=bearer(token)) as response:
        answer = await response.json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    (asked,) = simulator.account(token).asked
    text = asked["message"]["blocks"][0]["text"]["content"]
    assert ("<tools>" in text, "<tools>" in asked["options"].get("system_prompt", "")) == (not is_on, is_on)
    assert text.endswith("user:hi\n")


@pytest.mark.parametrize("conversation_id", ["", "new"])
@pytest.mark.parametrize("fields", [{"stop": ["3 "]}, {"max_tokens": 5}])
async def test_an_answer_that_is_wanted_no_more_is_stopped_kept_or_not(
    simulator: Simulator,
    start_proxy: StartProxy,
    http: aiohttp.ClientSession,
    fields: dict[str, Any],
    conversation_id: str,
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("long", "pace=0.01", "chunks=5000")
    body = chat_body("hi", conversation_id=conversation_id, **fields)
    async with http.post(f"{proxy}/v1/chat/completions", json=body, headers=bearer(token)) as response:
        assert response.status == 200
    account = simulator.account(token)
    await simulator.wait_until(lambda: account.count("stop") == 1 and account.count("remove") == (not conversation_id))
    steps = [call.step for call in account.calls]
    assert conversation_id or steps.index("stop") < steps.index("remove")


async def test_a_weaker_model_is_logged_and_counted(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="connect")
    token = simulator.token("degraded")
    async with http.post(f"{proxy}/v1/chat/completions", json=chat_body("hi"), headers=bearer(token)) as response:
        assert response.status == 200
    await log_lines.wait_for("weaker model: K2.6 answers instead of K3")
    await log_lines.wait_for("degraded=")
    async with http.get(f"{proxy}/metrics") as response:
        assert "kimi_proxy_degraded_answers_total 1" in await response.text()


@pytest.mark.parametrize(
    ("reason", "seconds"), [("QUOTA_EXCEEDED_WINDOW_5H", 1800), ("REASON_SERVER_OVERLOADED_FOR_FREE_USER", 30)]
)
async def test_while_kimi_is_full_or_a_quota_is_used_up_the_next_account_is_asked(
    simulator: Simulator,
    start_proxy: StartProxy,
    advance: Callable[[float], None],
    reason: str,
    seconds: int,
) -> None:
    proxy = await start_proxy(protocol="connect")
    bad, good = simulator.token("hello", f"reason=ask:{reason}"), simulator.token("hello")
    for ahead, is_asked in ((0, True), (seconds - 10, False), (20, True)):
        before = simulator.account(bad).count("ask")
        advance(ahead)
        for _ in range(2):
            url, headers = f"{proxy}/v1/chat/completions", bearer(f"{bad},{good}")
            async with (  # a session each time, as the clock's leap ends kept connections
                aiohttp.ClientSession() as http,
                http.post(url, json=chat_body("hi"), headers=headers) as response,
            ):
                assert response.status == 200
        assert (simulator.account(bad).count("ask") > before) is is_asked
