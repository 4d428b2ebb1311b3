"""Section 17: who may call, and for which accounts; keys, held accounts, and web pages that are kept out."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, chat_body
from kimi_simulator import HELLO, Simulator

from kimi_proxy import Access, ProxyError, Settings, SettingsError, is_loopback

CHAT = "/v1/chat/completions"


@pytest.fixture(params=["classic", "connect"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def call(
    url: str, headers: dict[str, str] | None = None, *, path: str = CHAT, method: str = "POST", **fields: Any
) -> tuple[int, Any]:
    """One request: status, and JSON where there is some."""
    body = chat_body(**fields) if method == "POST" else None
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, url + path, json=body, headers=headers) as response,
    ):
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text()


async def test_a_held_account_needs_no_token(simulator: Simulator, start_proxy: StartProxy) -> None:
    token = simulator.token("hello")
    proxy = await start_proxy(refresh_token=token)
    for headers in ({}, bearer("anything"), {"Authorization": "Basic x"}, {"Authorization": ""}):
        status, answer = await call(proxy, headers)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, HELLO)
    assert simulator.account(token).count("ask") == 4


async def test_several_held_accounts_take_turns(simulator: Simulator, start_proxy: StartProxy) -> None:
    tokens = [simulator.token("hello") for _ in range(2)]
    proxy = await start_proxy(refresh_token=", ".join(tokens))
    for _ in range(4):
        assert (await call(proxy))[0] == 200
    assert [simulator.account(token).count("ask") for token in tokens] == [2, 2]


async def test_the_token_file_is_read_again_once_its_token_is_refused(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path, log_lines: LogRecorder
) -> None:
    first, second = simulator.token("hello"), simulator.token("hello")
    path = tmp_path / "token"
    path.write_text(f"{first}\n")
    proxy = await start_proxy(refresh_token_file=str(path))
    assert (await call(proxy))[0] == 200
    path.write_text(f"{second}\n\n")
    assert (await call(proxy))[0] == 200
    assert [simulator.account(token).count("ask") for token in (first, second)] == [2, 0]
    await simulator.settle(first)
    await start_proxy.close()
    simulator.account(first).refresh_tokens.clear()
    path.write_text(first)
    proxy = await start_proxy(refresh_token_file=str(path))
    path.write_text(second)
    assert [(await call(proxy))[0] for _ in range(2)] in ([401, 200], [200, 200])
    assert simulator.account(second).count("ask") > 0
    assert first not in log_lines.text and second not in log_lines.text


GUARDED = (
    *((path, "POST") for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/completions", "/v1/files")),
    *((path, "GET") for path in ("/v1/models", "/v1/files", "/v1/files/file-1", "/metrics", "/nowhere", "//ping")),
    ("/token/check", "POST"),
    ("/v1/files/file-1", "DELETE"),
)


async def test_with_keys_only_a_key_is_let_in_and_nothing_else_goes_to_kimi(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder
) -> None:
    token = simulator.token("hello")
    proxy = await start_proxy(refresh_token=token, api_keys="me:open-sesame, second-key\nyou:third:key")
    for key in ("open-sesame", "second-key", "third:key"):
        assert (await call(proxy, bearer(key)))[0] == 200
    asked = simulator.account(token).count("ask")
    for headers in ({}, bearer("wrong"), bearer(token), bearer("me:open-sesame"), bearer("open-sesame,second-key")):
        for path, method in GUARDED:
            status, answer = await call(proxy, headers, path=path, method=method)
            assert status == 401, path
            if not path.startswith("/v1/messages"):  # Anthropic's errors have no code
                assert answer["error"]["code"] == "key_refused"
    async with aiohttp.ClientSession(headers=bearer("wrong")) as http, http.get(proxy + "/v1/models") as response:
        assert (response.status, response.headers["x-should-retry"]) == (401, "false")
    for path in ("/", "/ping", "/health"):
        assert (await call(proxy, path=path, method="GET"))[0] == 200
    assert simulator.account(token).count("ask") == asked == 3
    assert "key=me" in log_lines.text and "key=#2" in log_lines.text and "key=you" in log_lines.text
    assert "sesame" not in log_lines.text and "second-key" not in log_lines.text


async def test_a_conversation_is_continued_by_the_key_that_opened_it_alone(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    settings = {"refresh_token": simulator.token("hello"), "state_dir": str(tmp_path)}
    proxy = await start_proxy(**settings, api_keys="me:mine,you:yours")
    _, mine = await call(proxy, bearer("mine"), conversation_id="new")
    _, yours = await call(proxy, bearer("yours"), conversation_id="new")
    await start_proxy.close()
    proxy = await start_proxy(**settings, api_keys="you:yours,me:new")
    for key, answer, status in (("new", mine, 200), ("yours", mine, 404), ("new", yours, 404), ("yours", yours, 200)):
        assert (await call(proxy, bearer(key), conversation_id=answer["id"]))[0] == status
    await start_proxy.close()
    assert (await call(await start_proxy(**settings), conversation_id=mine["id"]))[0] == 404


async def test_a_key_that_is_no_utf8_is_refused(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"), api_keys="open-sesame")
    host, _, port = proxy.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n")
    writer.write(b"Connection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 401") and b"key_refused" in answer


HOSTS = {
    "127.0.0.1:8000": True,
    "127.0.0.1": True,
    "[::1]:8000": True,
    "192.168.1.5": True,
    "localhost": True,
    "LOCALHOST:1": True,
    "localhost.": True,
    "proxy.example": True,
    "PROXY.example:443": True,
    "": False,
    "evil.example": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example": False,
    "a@localhost": False,
    "localhost:80:80": False,
    "localhost/x": False,
    "[::1": False,
    "proxy.example, evil.example": False,
    "2130706433x": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_only_known_hosts_are_let_in_while_an_account_is_held(host: str) -> None:
    access = Access(Settings(refresh_token="t", allowed_hosts=("Proxy.example:8443",)), {})
    if HOSTS[host]:
        access.check_page(host, None)
        return
    with pytest.raises(ProxyError) as caught:
        access.check_page(host, None)
    assert (caught.value.code, caught.value.status) == ("host_denied", 403)
    assert "PROXY_ALLOWED_HOSTS" in caught.value.message
    Access(Settings(), {}).check_page(host, "null")  # without a held account nothing is checked


def test_the_name_that_is_listened_on_is_let_in() -> None:
    access = Access(Settings(refresh_token="t", api_keys="k" * 16, host="proxy.lan"), {})
    access.check_page("proxy.lan:8000", None)
    with pytest.raises(ProxyError):
        access.check_page("proxy.example", None)


async def test_a_web_page_is_refused_before_its_key_is_looked_at(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"), api_keys="open-sesame")
    for key in ("open-sesame", "wrong"):
        for page in ({"Host": "rebound.example"}, {"Origin": "https://evil.example"}):
            assert (await call(proxy, {**bearer(key), **page}))[0] == 403


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://127.0.0.1:8000", "", "https://a.example:1"])
def test_only_named_origins_are_let_in_while_an_account_is_held(origin: str) -> None:
    for origins in (("*",), ("https://a.example",), ("https://a.example", "*")):
        with pytest.raises(ProxyError) as caught:
            Access(Settings(refresh_token="t", cors_origins=origins), {}).check_page("localhost", origin)
        assert caught.value.code == "origin_denied" and "PROXY_CORS_ORIGINS" in caught.value.message
    Access(Settings(refresh_token="t", cors_origins=("https://a.example",)), {}).check_page(
        "localhost", "https://a.example"
    )


async def test_a_web_page_does_not_reach_a_held_account(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello")
    proxy = await start_proxy(refresh_token=token, cors_origins=("https://good.example",))
    for headers, code in (
        ({"Host": "rebound.example"}, "host_denied"),
        ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, "origin_denied"),
        ({"Origin": "null"}, "origin_denied"),
        ({"Host": ""}, "host_denied"),
    ):
        async with http.post(proxy + CHAT, data=b"{}", headers=headers) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (403, code)
            assert "Access-Control-Allow-Origin" not in response.headers
    for path in ("/", "/ping", "/v1/models"):
        async with http.get(proxy + path, headers={"Host": "rebound.example"}) as response:
            assert response.status == 403
    assert simulator.account(token).count("ask") == 0
    good = {"Origin": "https://good.example"}
    async with http.options(proxy + CHAT, headers={**good, "Access-Control-Request-Method": "POST"}) as response:
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "https://good.example")
    async with http.post(proxy + CHAT, json=chat_body(), headers=good) as response:
        assert response.status == 200


async def test_an_absolute_target_of_another_name_is_refused(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"))
    host, _, port = proxy.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("target", ["http://localhost/ping", "http://LOCALHOST:80/ping", "http://127.0.0.1/ping"])
async def test_an_absolute_target_of_a_known_name_is_served(
    simulator: Simulator, start_proxy: StartProxy, target: str
) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"))
    host, _, port = proxy.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_picture_on_another_page_calls_nothing(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("hello")
    proxy = await start_proxy(refresh_token=token)
    for site, path, status in (
        ("cross-site", "/v1/models", 403),
        ("none", "/v1/models", 200),
        ("cross-site", "/", 200),
    ):
        async with http.get(proxy + path, headers={"Sec-Fetch-Site": site}) as response:
            assert response.status == status


async def test_a_preflight_needs_no_key(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(
        refresh_token=simulator.token("hello"), api_keys="open-sesame", cors_origins=("https://good.example",)
    )
    headers = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    async with http.options(proxy + CHAT, headers=headers) as response:
        assert response.status == 204


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.com", "")))


BAD_SECRETS: dict[str, dict[str, Any]] = {
    "keys without an account": {"api_keys": "k"},
    "an account for everyone": {"refresh_token": "t", "host": "0.0.0.0"},
    "both forms": {"refresh_token": "t", "refresh_token_file": "x"},
    "no such file": {"refresh_token_file": "/no/such/file"},
    "a directory": {"refresh_token_file": "/"},
    "no path": {"refresh_token_file": "a\0b"},
    "a key without a key": {"refresh_token": "t", "api_keys": "me:"},
    "a key without a name": {"refresh_token": "t", "api_keys": ":key"},
    "a name with blanks": {"refresh_token": "t", "api_keys": "m*e:key"},
    "a key beyond ASCII": {"refresh_token": "t", "api_keys": "schlüssel"},
    "a token beyond ASCII": {"refresh_token": "tökén"},
}


@pytest.mark.parametrize("name", BAD_SECRETS)
def test_secrets_of_no_use_are_one_line(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Access(Settings(**BAD_SECRETS[name]), {})
    assert "\n" not in str(caught.value) and "schl" not in str(caught.value) and "ök" not in str(caught.value)


def test_a_relative_file_is_looked_up_among_the_credentials_first(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\ufeffsecret")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert Access(Settings(refresh_token_file="token"), environ).tokens == ("secret",)
    (tmp_path / "own").write_text("a,b\n c a")
    for environ in ({}, {"CREDENTIALS_DIRECTORY": "/no/such/directory"}, {"CREDENTIALS_DIRECTORY": "/"}):
        assert Access(Settings(refresh_token_file=str(tmp_path / "own")), environ).tokens == ("a", "b", "c")


def test_tokens_are_reloaded_from_their_file_and_stay_where_it_is_of_no_use(
    tmp_path: Path, log_lines: LogRecorder
) -> None:
    path = tmp_path / "token"
    path.write_text("a")
    access = Access(Settings(refresh_token_file=str(path)), {})
    path.write_text("b")
    access.reload_tokens()
    assert access.tokens == ("b",)
    for content in ("b\xe4d", "\xff", " \n"):
        path.write_text(content, "latin-1")
        access.reload_tokens()
    path.unlink()
    access.reload_tokens()
    assert access.tokens == ("b",)
    assert log_lines.text.count("the held tokens stay as they are: KIMI_REFRESH_TOKEN") == 4


@pytest.mark.parametrize(
    "pasted", ["Bearer {}", '"{}"\n', "_ga=1; kimi-auth={}; b=c", '{{\n"refresh_token": "{}"\n}}\n']
)
async def test_a_held_token_is_read_from_what_a_user_pastes(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, tmp_path: Path, pasted: str
) -> None:
    token = simulator.token("hello")
    path = tmp_path / "token"
    path.write_text(pasted.format(token))
    proxy = await start_proxy(refresh_token_file=str(path))
    async with http.post(proxy + "/v1/chat/completions", json=chat_body()) as response:
        assert response.status == 200
    assert len(simulator.account(token).asked) == 1


@pytest.mark.parametrize("pasted", ["null", "_ga=1; b=c", "{}"])
def test_a_held_token_that_is_none_is_told_by_its_looks(pasted: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Access(Settings(refresh_token=pasted), {})
    assert "looks like" in str(caught.value) and "Local Storage" in str(caught.value)


async def test_the_page_may_call_the_proxy_that_served_it_and_no_other_port(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("hello"), allowed_hosts=("proxy.example",))
    for host, origin, status in (
        ("proxy.example:8000", "http://proxy.example:8000", 200),
        ("proxy.example", "https://proxy.example", 200),
        ("proxy.example:8000", "http://proxy.example:9000", 403),
        ("evil.example", "http://evil.example", 403),
    ):
        headers = {"Host": host, "Origin": origin}
        async with http.get(f"{proxy}/health?accounts", headers=headers) as response:
            assert response.status == status


async def test_health_of_the_accounts_needs_a_key_and_says_which_live(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    living, dead = simulator.token("hello"), simulator.token("hello", "status=refresh:401")
    for tokens, key, status, lives in (
        (living, "", 401, None),
        (f"{living},{dead}", "sesame", 200, [True, False]),
        (dead, "sesame", 503, [False]),
    ):
        proxy = await start_proxy(refresh_token=tokens, api_keys="me:sesame")
        async with http.get(f"{proxy}/health?accounts", headers=bearer(key) if key else {}) as response:
            health = await response.json()
        assert response.status == status
        assert lives is None or [one["live"] for one in health["accounts"]] == lives
        assert all(one["live"] or one["code"] == "token_dead" for one in health.get("accounts", ()))
        assert not any(token in json.dumps(health) for token in (living, dead))
    proxy = await start_proxy()
    for headers, lives in (({}, []), (bearer(living), [True]), (bearer(dead), [False])):
        async with http.get(f"{proxy}/health?accounts", headers=headers) as response:
            health = await response.json()
            assert (response.status, health["holds_account"]) == (200, False)
            assert [one["live"] for one in health["accounts"]] == lives


async def test_how_a_held_account_is_is_told_at_start_and_when_it_changes(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, tmp_path: Path, protocol: str
) -> None:
    tokens = simulator.token("hello", "unauthorized-once=ask"), simulator.token("hello", "status=refresh:401")
    labels = [hashlib.sha256(token.encode()).hexdigest()[:8] for token in tokens]
    key, account = "k" * 16, simulator.account(tokens[0])
    states: list[list[float]] = []

    async def note_states() -> None:
        _, text = await call(proxy, bearer(key), path="/metrics", method="GET")
        states.append([float(re.findall(rf'account_live{{account="{label}"}} (.+)', text)[0]) for label in labels])

    proxy = await start_proxy(
        refresh_token=",".join(tokens), api_keys=key, state_dir=str(tmp_path / "state"), REFUSAL_SECONDS=0.0
    )
    for line in (f"{labels[0]} of 127.0.0.1 works", f"{labels[1]} of 127.0.0.1 does not work: Kimi refused"):
        await log_lines.wait_for(f" held account {line}")
    await note_states()
    account.refresh_tokens.clear()
    assert (await call(proxy, bearer(key)))[0] == 401
    await note_states()
    account.refresh_tokens.append(tokens[0])
    for _ in range(2):
        assert (await call(proxy, bearer(key)))[0] == 200
    await note_states()
    assert states == [[1, 0], [0, 0], [1, 0]]
    told = [line.split(maxsplit=3)[1:] for line in log_lines.lines if " held account " in line and labels[0] in line]
    assert [line[0] for line in told] == ["info", "warning", "info"]
    start = f"protocol {protocol}, held accounts: 2, API keys: 1, state in {tmp_path}/state"
    assert f" info [-] {start}" in log_lines.text
    assert not any(secret in log_lines.text for secret in (*tokens, key))


async def test_until_when_a_held_token_lives_and_where_is_told(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    simulator.overseas = True
    token = simulator.make_access_token(simulator.token("hello"))
    expires = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["exp"]
    until = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    proxy = await start_proxy(refresh_token=token, protocol="connect", base_url="")
    await log_lines.wait_for(f" of kimi.ai works until {until}")
    async with http.get(f"{proxy}/health?accounts") as response:
        (account,) = (await response.json())["accounts"]
    assert (account["live"], account["until"], account["service"]) == (True, until, "www.kimi.ai")


def test_a_key_that_can_be_guessed_is_warned_about_and_refused_where_others_may_guess(log_lines: LogRecorder) -> None:
    for length, host, warned, refused in (
        (15, "127.0.0.1", True, False),
        (16, "127.0.0.1", False, False),
        (15, "0.0.0.0", False, True),
        (16, "0.0.0.0", False, False),
    ):
        log_lines.lines.clear()
        settings = Settings(refresh_token="t", api_keys=f"{'k' * 16},me:{'j' * length}", host=host)
        with pytest.raises(SettingsError, match=r"guessed: me;") if refused else nullcontext():
            Access(settings, {})
        assert ("can be guessed: me;" in log_lines.text) is warned and "jjj" not in log_lines.text
