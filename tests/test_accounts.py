"""Section 13: one token an account: single flight, no waiter can cancel it, refusals are remembered."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import resource
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import LogRecorder, assert_linear, list_descriptors

import kimi_proxy
from kimi_proxy import (
    Account,
    Accounts,
    AnswerSlots,
    BackgroundTasks,
    Metrics,
    OpenConversations,
    ProxyError,
    StateFiles,
    TokenPair,
    find_state_dir,
    is_access_token,
    read_claims,
    read_pasted_token,
    read_pasted_tokens,
    region_of,
)


class Service:
    """Hands out tokens when it is let, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.failure: ProxyError | None = None

    async def refresh(self, account: Account) -> TokenPair:
        self.asked.append(account.refresh_token)
        number = len(self.asked)
        self.begun.set()
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return TokenPair(f"access-{number}", f"refresh-{number}")


@pytest.fixture
def service() -> Service:
    return Service()


def make_accounts(service: Service, *, directory: Path | None = None) -> Accounts:
    return Accounts(service.refresh, BackgroundTasks(), StateFiles(directory, Metrics()))


async def test_many_at_once_cause_one_refresh(service: Service) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    waiters = [asyncio.create_task(accounts.access_token(account)) for _ in range(50)]
    await asyncio.sleep(0)
    service.open.set()
    assert set(await asyncio.gather(*waiters)) == {"access-1"}
    assert await accounts.access_token(account) == "access-1"
    assert service.asked == ["r"]


async def test_a_token_is_used_for_its_life_and_the_newest_refresh_token_next(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi_proxy, "TOKEN_SECONDS", 0.05)
    accounts = make_accounts(service)
    account = accounts.get("r")
    service.open.set()
    assert await accounts.access_token(account) == "access-1"
    await asyncio.sleep(0.06)
    assert await accounts.access_token(account) == "access-2"
    assert service.asked == ["r", "refresh-1"]


async def test_no_waiter_can_cancel_the_refresh(service: Service) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    waiters = [asyncio.create_task(accounts.access_token(account)) for _ in range(3)]
    await service.begun.wait()
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert all(waiter.cancelled() for waiter in waiters)
    service.open.set()
    assert await accounts.access_token(account) == "access-1"
    assert account.tokens.refresh_token == "refresh-1"
    assert len(service.asked) == 1


async def test_all_that_wait_share_a_failure_and_the_next_starts_anew(service: Service) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    service.failure = ProxyError("service_failed", "x")
    waiters = [asyncio.create_task(accounts.access_token(account)) for _ in range(5)]
    await asyncio.sleep(0)
    service.open.set()
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [isinstance(outcome, ProxyError) and outcome.code for outcome in outcomes] == ["service_failed"] * 5
    service.failure = None
    assert await accounts.access_token(account) == "access-2"


async def test_a_refusal_is_answered_from_memory_for_a_while(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    service.failure = ProxyError("token_dead", "x")
    service.open.set()
    for _ in range(5):
        with pytest.raises(ProxyError) as caught:
            await accounts.access_token(account)
        assert caught.value.code == "token_dead"
    assert len(service.asked) == 1
    monkeypatch.setattr(account, "refused_until", asyncio.get_running_loop().time())
    service.failure = None
    assert await accounts.access_token(account) == "access-2"
    assert 0 < account.refused_until - asyncio.get_running_loop().time() + 10 <= 10


async def test_a_dead_access_token_is_dropped_and_a_newer_one_stays(service: Service) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    service.open.set()
    old = await accounts.access_token(account)
    accounts.drop(account, old)
    new = await accounts.access_token(account)
    accounts.drop(account, old)
    assert await accounts.access_token(account) == new != old


async def test_an_access_token_that_was_refused_once_is_tried_again_later(
    service: Service, advance: Callable[[float], None]
) -> None:
    accounts = make_accounts(service)
    token = make_jwt(app_id="kimi", typ="access", exp=time.time() + 300)
    account = accounts.get(token)
    for _ in range(2):
        assert await accounts.access_token(account) == token
        accounts.drop(account, token)
        with pytest.raises(ProxyError) as caught:
            await accounts.access_token(account)
        assert caught.value.code == "token_expired"
        advance(11)
    ended = accounts.get(make_jwt(app_id="kimi", typ="access", exp=time.time() - 1))
    with pytest.raises(ProxyError) as caught:
        await accounts.access_token(ended)
    assert caught.value.code == "token_expired" and service.asked == []


async def test_the_cache_forgets_the_idle_first_and_none_that_is_in_use(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi_proxy, "MAX_ACCOUNTS", 3)
    accounts = make_accounts(service)
    busy = accounts.get("busy")
    waiter = asyncio.create_task(accounts.access_token(busy))
    await service.begun.wait()
    second = accounts.get("second")
    idle = weakref.ref(accounts.get("idle"))
    for number in range(20):
        accounts.get(f"other-{number}")
        assert accounts.get("busy") is busy
    assert len(accounts.known) == 3
    assert accounts.get("second") is second and idle() is None
    service.open.set()
    assert await waiter == "access-1"


async def test_an_error_of_ours_reaches_who_waits_and_does_not_stick(log_lines: LogRecorder) -> None:
    class Failing(Service):
        async def refresh(self, account: Account) -> TokenPair:
            self.asked.append("x")
            raise ZeroDivisionError("sesame")

    service = Failing()
    accounts = make_accounts(service)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await accounts.access_token(accounts.get("r"))
    assert len(service.asked) == 2
    assert "refresh" in log_lines.text and "sesame" not in log_lines.text


async def test_no_token_is_in_a_repr(service: Service) -> None:
    assert "sesame" not in repr(make_accounts(service).get("sesame")) + repr(TokenPair("sesame", "sesame"))


def make_jwt(**claims: Any) -> str:
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{part}.c2ln"


class Rotating(Service):
    """A service whose refresh tokens work once."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = "r"
        self.rotates = True

    async def refresh(self, account: Account) -> TokenPair:
        self.asked.append(account.refresh_token)
        if account.refresh_token != self.valid:
            raise ProxyError("token_dead", "rotated")
        if self.rotates:
            self.valid = f"r{len(self.asked)}"
        return TokenPair(f"access-{len(self.asked)}", self.valid)


async def test_a_rotated_token_survives_a_restart_under_the_clients_own(tmp_path: Path) -> None:
    service = Rotating()
    for expected in ("access-1", "access-1", "access-1"):
        accounts = make_accounts(service, directory=tmp_path)
        assert await accounts.access_token(accounts.get("r")) == expected
    accounts = make_accounts(service, directory=tmp_path)
    account = accounts.get("r")
    accounts.drop(account, await accounts.access_token(account))
    assert await accounts.access_token(account) == "access-2"
    assert service.asked == ["r", "r1"]


async def test_what_another_process_fetched_is_used(tmp_path: Path) -> None:
    service = Rotating()
    first, second = (make_accounts(service, directory=tmp_path) for _ in range(2))
    old = await first.access_token(first.get("r"))
    assert await second.access_token(second.get("r")) == old
    second.drop(second.get("r"), old)
    new = await second.access_token(second.get("r"))
    first.drop(first.get("r"), old)
    assert await first.access_token(first.get("r")) == new
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("good", "asked"),
    [("r2", ["r2"]), ("r1", ["r2", "r1"]), ("r", ["r2", "r1", "r"]), ("", ["r2", "r1", "r"])],
)
@pytest.mark.parametrize("restarts", [True, False])
async def test_where_the_newest_token_is_refused_each_older_one_is_tried_once(
    tmp_path: Path, good: str, asked: list[str], restarts: bool
) -> None:
    service = Rotating()
    accounts = make_accounts(service, directory=tmp_path)
    for _ in range(2):
        account = accounts.get("r")
        accounts.drop(account, await accounts.access_token(account))
    if restarts:
        accounts = make_accounts(service, directory=tmp_path)
        accounts.drop(accounts.get("r"), await accounts.access_token(accounts.get("r")))
    service.valid = good
    for _ in range(2):
        try:
            assert await accounts.access_token(accounts.get("r")) == f"access-{2 + len(asked)}" and good
        except ProxyError as error:
            assert error.code == "token_dead" and not good
    assert service.asked == ["r", "r1", *asked]


async def test_files_are_for_their_owner_alone_and_name_no_token(tmp_path: Path) -> None:
    accounts = make_accounts(Rotating(), directory=tmp_path)
    await accounts.access_token(accounts.get("r"))
    (path,) = (tmp_path / "tokens").glob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stem == "454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1"
    assert json.loads(path.read_text())["refresh_token"] == "r1"


GOOD_TOKENS: dict[str, Any] = {"access_token": "a", "refresh_token": "r1", "received": 4e9, "life_seconds": 1.0}


BROKEN = [b"{", b"[]", b"null", b"7", b"\xff", b"\x00" * 64, b"[" * 100_000]
WRONG_TOKENS: list[dict[str, Any]] = [
    *({"access_token": bad} for bad in list[Any](["a\r\nX-Evil: 1", "a b", "\u00e9", "\x7f", "a" * 8193, ["a"], None])),
    *({"refresh_token": bad} for bad in list[Any](["r\n", "\x00", {}, 1])),
    *({"previous_refresh_token": bad} for bad in list[Any](["r\r", 1, {}])),
    *({"received": bad} for bad in list[Any](["x", None, [], 10**400])),
    {"life_seconds": "x"},
]


@pytest.mark.parametrize(
    "content",
    [*BROKEN, b'{"access_token":1}', *(json.dumps(GOOD_TOKENS | wrong).encode() for wrong in WRONG_TOKENS)],
)
async def test_a_state_file_of_no_use_is_set_aside_with_one_log_line_and_never_used(
    tmp_path: Path, log_lines: LogRecorder, content: bytes
) -> None:
    service = Rotating()
    accounts = make_accounts(service, directory=tmp_path)
    await accounts.access_token(accounts.get("r"))
    (path,) = (tmp_path / "tokens").glob("*.json")
    path.write_bytes(content)
    service.valid = "r"
    again = make_accounts(service, directory=tmp_path)
    assert await again.access_token(again.get("r")) == "access-2"
    assert log_lines.text.count("set aside") == 1
    assert json.loads(path.read_text())["access_token"] == "access-2"
    assert service.asked == ["r", "r"]
    assert path.with_suffix(".bad").read_bytes() == content


async def test_no_lock_file_stays_and_a_token_that_kimi_never_took_leaves_no_file(tmp_path: Path) -> None:
    accounts = make_accounts(Rotating(), directory=tmp_path)
    for token, suffixes in (("unknown", []), ("dead", []), ("r", [".json"])):
        account = accounts.get(token)
        with suppress(ProxyError):
            await accounts.access_token(account)
        assert not await accounts.read_kept(account)
        assert [path.suffix for path in files_below(tmp_path)] == suffixes


async def test_a_directory_that_cannot_be_written_is_told_once(tmp_path: Path, log_lines: LogRecorder) -> None:
    (tmp_path / "tokens").write_text("a file in the way")
    accounts = make_accounts(Rotating(), directory=tmp_path)
    account = accounts.get("r")
    for expected in ("access-1", "access-2"):
        token = await accounts.access_token(account)
        assert token == expected
        accounts.drop(account, token)
    assert log_lines.text.count("cannot be kept") == 1


class Disk:
    """Fails to write while it is `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


@pytest.mark.parametrize("failures", [1, 3])
async def test_tokens_in_memory_that_could_not_be_written_win_over_the_files_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(kimi_proxy, "MAX_ACCOUNTS", 2)
    service = Rotating()
    accounts = make_accounts(service, directory=tmp_path)
    account = accounts.get("r")
    accounts.drop(account, await accounts.access_token(account))
    disk.full = True
    for _ in range(failures):
        accounts.drop(account, await accounts.access_token(account))
    for number in range(5):
        accounts.get(f"other-{number}")
    assert accounts.get("r") is account, "tokens that are nowhere else are not forgotten"
    (path,) = (tmp_path / "tokens").glob("*.json")
    assert json.loads(path.read_text())["refresh_token"] == "r1", "an older file stays whole"
    assert not list(path.parent.glob("*.new"))
    disk.full = False
    newest = await accounts.access_token(account)
    assert service.asked == ["r", *(f"r{number}" for number in range(1, failures + 2))]
    again = make_accounts(service, directory=tmp_path)
    assert await again.access_token(again.get("r")) == newest


async def test_of_two_processes_memories_the_newer_is_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    service = Rotating()
    service.rotates = False
    late, other = (make_accounts(service, directory=tmp_path) for _ in range(2))
    disk.full = True
    await late.access_token(late.get("r"))
    disk.full = False
    newest = await other.access_token(other.get("r"))
    await late.save()
    again = make_accounts(service, directory=tmp_path)
    assert await again.access_token(again.get("r")) == newest


async def test_tokens_of_another_service_are_not_used(tmp_path: Path) -> None:
    service = Rotating()
    service.rotates = False

    def make(base_url: str) -> Accounts:
        return Accounts(service.refresh, BackgroundTasks(), StateFiles(tmp_path, Metrics(), base_url))

    for base_url, expected in (
        ("", "access-1"),
        ("https://www.kimi.com", "access-1"),
        ("https://www.kimi.ai", "access-1"),
        ("http://localhost:8001", "access-2"),
        ("http://localhost:8002/x", "access-2"),
        ("https://kimi.example", "access-3"),
    ):
        accounts = make(base_url)
        assert await accounts.access_token(accounts.get("r")) == expected
    assert set(service.asked) == {"r"}


async def test_tokens_of_an_older_version_are_used_at_kimi_alone(tmp_path: Path) -> None:
    service = Rotating()
    service.rotates = False
    accounts = make_accounts(service, directory=tmp_path)
    await accounts.access_token(accounts.get("r"))
    (path,) = (tmp_path / "tokens").glob("*.json")
    value = json.loads(path.read_text())
    del value["service"], value["previous_refresh_token"]
    path.write_text(json.dumps(value))
    again = make_accounts(service, directory=tmp_path)
    assert await again.access_token(again.get("r")) == "access-1"
    elsewhere = Accounts(service.refresh, BackgroundTasks(), StateFiles(tmp_path, Metrics(), "https://kimi.example"))
    assert await elsewhere.access_token(elsewhere.get("r")) == "access-2"


# The lock of an account's state.


async def test_a_cancellation_at_any_moment_leaks_no_descriptor_of_a_lock(tmp_path: Path) -> None:
    state = StateFiles(tmp_path, Metrics())
    descriptors = len(list_descriptors())

    async def hold() -> None:
        async with state.lock("tokens/x"):
            await asyncio.sleep(0.02)

    for turns in range(40):
        tasks = [asyncio.create_task(hold()) for _ in range(3)]
        for _ in range(turns % 8):
            await asyncio.sleep(0)
        await asyncio.sleep(0.001 * turns)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.1)
    assert len(list_descriptors()) == descriptors
    async with asyncio.timeout(5):
        await hold()


async def test_while_another_process_holds_the_state_no_token_is_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Rotating()
    accounts = make_accounts(service, directory=tmp_path)
    account = accounts.get("r")
    async with StateFiles(tmp_path, Metrics()).lock(f"tokens/{account.digest.hex()}"):
        monkeypatch.setattr(kimi_proxy, "LOCK_SECONDS", 0.2)
        waiters = [asyncio.create_task(accounts.access_token(account)) for _ in range(3)]
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert [isinstance(one, ProxyError) and (one.status, one.code) for one in outcomes] == [
            (503, "state_locked")
        ] * 3
        monkeypatch.setattr(kimi_proxy, "LOCK_SECONDS", 5.0)
        waiter = asyncio.create_task(accounts.access_token(account))
        await asyncio.sleep(0.1)
        assert service.asked == [] and not waiter.done()
    assert await waiter == "access-1"


RACER = """
import asyncio, sys
from pathlib import Path
from kimi_proxy import Accounts, BackgroundTasks, Metrics, ProxyError, StateFiles, TokenPair

service = Path(sys.argv[2])

async def refresh(account):
    # The service: a refresh token works once, and two at once is what must not happen.
    valid, number = service.read_text().split()
    if account.refresh_token != valid:
        raise ProxyError("token_dead", "rotated away")
    await asyncio.sleep(0.02)
    service.write_text(f"r{int(number) + 1} {int(number) + 1}")
    return TokenPair(f"a{int(number) + 1}", f"r{int(number) + 1}")

async def main():
    accounts = Accounts(refresh, BackgroundTasks(), StateFiles(Path(sys.argv[1]), Metrics()))
    account = accounts.get("r")
    for _ in range(8):
        accounts.drop(account, await accounts.access_token(account))

asyncio.run(main())
"""


async def test_processes_on_one_directory_never_destroy_each_others_tokens(tmp_path: Path) -> None:
    service = tmp_path / "service"
    service.write_text("r 0")
    racers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RACER, str(tmp_path / "state"), str(service)),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        for _ in range(3)
    ]
    for racer in racers:
        _, err = await asyncio.wait_for(racer.communicate(), 40)
        assert racer.returncode == 0, err.decode()
    valid, _ = service.read_text().split()
    (path,) = (tmp_path / "state" / "tokens").glob("*.json")
    assert json.loads(path.read_text())["refresh_token"] == valid


@pytest.mark.parametrize(
    ("claims", "life"),
    [
        ({"iat": 1000, "exp": 1900}, 840),
        ({"iat": 1000, "exp": 1100}, 300),
        ({"exp": 1.8e9}, 300),
        ({"iat": 1900, "exp": 1000}, 300),
        ({"iat": "x", "exp": 1}, 300),
        ({"iat": 1.5, "exp": 10**400}, 300),
        ({"iat": 0, "exp": 10**11}, 300),
    ],
)
async def test_an_access_tokens_life_is_what_it_tells_counted_from_its_receipt(
    claims: dict[str, Any], life: float
) -> None:
    class Telling(Service):
        async def refresh(self, account: Account) -> TokenPair:
            return TokenPair(make_jwt(**claims), "")

    accounts = make_accounts(Telling())
    account = accounts.get("r")
    await accounts.access_token(account)
    assert account.tokens.life_seconds == life


@pytest.mark.parametrize("token", ["eyJhbGciOi.e30.c2ln-_", "opaque+/=", "t"])
@pytest.mark.parametrize(
    "pasted",
    [
        *("{}", "  {}\r\n", '"{}"', "'{}'", "`{}`", "Bearer {}", "bearer   Bearer {}", '"Bearer {}"', 'Bearer "{}"'),
        *("Authorization: Bearer {}", "refresh_token={}", 'refresh_token: "{}"', "access_token={}", '"{}";'),
        *("kimi-auth={}", "Cookie: kimi-auth={}", "_ga=GA1.2; kimi-auth={}; theme=dark", "a=b;kimi-auth={}"),
        *(
            '{{"refresh_token": "{}"}}',
            '{{"access_token": "x", "refresh_token":"{}"}}',
            '{{"data": {{"refreshToken": "{}"}}}}',
        ),
        '\n{{\n  "accessToken": "{}"\n}}\n',
    ],
)
def test_a_token_is_read_from_what_a_user_pastes(token: str, pasted: str) -> None:
    assert read_pasted_token(pasted.format(token)) == token
    assert read_pasted_tokens(pasted.format(token)) == (token,)


@pytest.mark.parametrize(
    "pasted",
    [
        *("https://www.kimi.com/chat/x", "sk-abcdefghijklmnopqrstuvwx", "[object Object]", "the token"),
        *("null", "undefined", "<refresh token>", "\u2026", "...", '""', "''", "_ga=GA1.2; theme=dark"),
        *("{}", '{"token": "x"}', "{", '{"data":[]}', "eyJ\r\nX-Evil: 1"),
        *("tok\u00e9n", "t\x7f", "t\x00", "t,", "a" * 8193),
    ],
)
def test_what_is_no_token_is_told(pasted: str) -> None:
    with pytest.raises(ProxyError) as caught:
        read_pasted_token(pasted)
    assert (caught.value.code, caught.value.status) == ("token_malformed", 401)
    assert "looks like" in caught.value.message and "Local Storage" in caught.value.message
    for secret in ("abcdefgh", "GA1.2", "Evil", "chat/x"):
        assert secret not in caught.value.message


@pytest.mark.parametrize(
    ("pasted", "kind"),
    [
        ("https://www.kimi.com/chat/x", "a URL"),
        ("sk-abcdefghijklmnopqrstuvwx", "a key of Kimi's API platform"),
        ('{"data":[]}', "JSON without a token"),
        ("_ga=GA1.2; theme=dark", "a cookie"),
        ("null", "a placeholder"),
    ],
)
def test_what_is_no_token_is_named(pasted: str, kind: str) -> None:
    with pytest.raises(ProxyError, match=f"looks like {kind}"):
        read_pasted_token(pasted)


def test_several_tokens_are_read_with_whatever_is_pasted_around_each() -> None:
    assert read_pasted_tokens('a, Bearer b,"c",, kimi-auth=d,a') == ("a", "b", "c", "d")
    assert read_pasted_tokens("Bearer a\nb,c  d\n", r",\s") == ("a", "b", "c", "d")
    assert read_pasted_tokens(" , ") == ()
    with pytest.raises(ProxyError):
        read_pasted_tokens("a b")


def test_a_tokens_region_is_told_by_its_claims() -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "global": [{"aud": ["kimi.ai"], "region": "overseas"}, {"aud": "kimi.ai"}, {"region": "overseas"}],
        "cn": [{"aud": ["kimi.com"]}, {"aud": "kimi.com", "region": "cn"}, {"region": "cn"}],
        "": [{}, {"aud": ["kimi"]}, {"aud": 7, "region": []}],
    }
    for region, examples in rows.items():
        assert [region_of(claims) for claims in examples] == [region] * 3


def test_what_is_pasted_is_read_in_linear_time() -> None:
    for text in (" " * 8000 + "a", "a" + " '" * 4000 + "b", "bearer " * 1200, "refresh_token " * 600, "<" * 8000):
        started = time.perf_counter()
        with suppress(ProxyError):
            read_pasted_tokens(text)
        assert time.perf_counter() - started < 0.1


async def test_an_access_token_of_kimis_is_told_from_others(service: Service) -> None:
    access = {"app_id": "kimi", "typ": "access", "exp": time.time() + 60}
    assert make_accounts(service).get(make_jwt(**access)).is_access_token
    for other in ("r", make_jwt(app_id="kimi", typ="refresh"), "a.b.c", "..", "e30.!!.x", make_jwt()):
        assert not make_accounts(service).get(other).is_access_token
    assert is_access_token(access) and read_claims(make_jwt(sub="x")) == {"sub": "x"}
    assert read_claims("e30.W10.x") == {}


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("", {"STATE_DIRECTORY": "/var/lib/x"}, None),
        ("/srv/state", {"STATE_DIRECTORY": "/var/lib/x"}, "/srv/state"),
        ("default", {"STATE_DIRECTORY": "/var/lib/x:/var/lib/y"}, "/var/lib/x"),
        ("default", {"XDG_STATE_HOME": "/home/a/state"}, "/home/a/state/kimi_proxy"),
        ("default", {"HOME": "/home/a"}, "/home/a/.local/state/kimi_proxy"),
    ],
)
def test_the_state_directory_is_where_it_belongs(setting: str, environ: dict[str, str], expected: str | None) -> None:
    found = find_state_dir(setting, environ)
    assert (None if found is None else str(found)) == expected


# The answers that run.


async def test_slots_are_given_in_order_where_answers_run_one_by_one() -> None:
    slots, order = AnswerSlots(), list[int]()

    async def run(number: int) -> None:
        await slots.acquire(10)
        order.append(number)
        assert slots.running == 1
        await asyncio.sleep(0.01)
        slots.release()

    slots.note_refused()
    tasks = [asyncio.create_task(run(number)) for number in range(6)]
    await asyncio.sleep(0)
    assert (slots.running, slots.waiting) == (1, 5)
    tasks[2].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert slots.waiting == 4
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 3, 4, 5] and (slots.running, slots.waiting) == (0, 0)


@pytest.mark.parametrize("turns", range(4))
async def test_whoever_is_cancelled_as_its_turn_comes_passes_it_on(turns: int) -> None:
    slots = AnswerSlots()
    slots.note_refused()
    await slots.acquire(10)
    first, second = (asyncio.create_task(slots.acquire(10)) for _ in range(2))
    await asyncio.sleep(0)
    if turns % 2:
        first.cancel()
        slots.release()
    else:
        slots.release()
        first.cancel()
    for _ in range(turns // 2):
        await asyncio.sleep(0)
    await asyncio.wait_for(second, 1)
    assert first.cancelled() and (slots.running, slots.waiting) == (1, 0)


async def test_too_many_answers_or_requests_that_wait_are_a_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi_proxy, "MAX_ACCOUNT_REQUESTS", 2)
    monkeypatch.setattr(kimi_proxy, "QUEUE_SECONDS", 0.05)
    slots = AnswerSlots()
    await slots.acquire(1)
    await slots.acquire(1)
    with pytest.raises(ProxyError) as caught:
        await slots.acquire(1)
    assert caught.value.code == "queue_full" and "2 answers" in caught.value.detail
    slots.note_refused()
    waiting = asyncio.create_task(slots.acquire(1))
    await asyncio.sleep(0)
    with pytest.raises(ProxyError) as caught:
        await slots.acquire(1)
    assert caught.value.code == "queue_full" and "PROXY_QUEUE_LENGTH" in caught.value.detail
    with pytest.raises(ProxyError) as caught:
        await waiting
    assert caught.value.code == "queue_full" and "0.05 s" in caught.value.detail
    assert (slots.running, slots.waiting) == (2, 0)


async def test_answers_run_one_by_one_for_ten_minutes(advance: Callable[[float], None]) -> None:
    slots = AnswerSlots()
    slots.note_refused()
    await slots.acquire(1)
    waiting = asyncio.create_task(slots.acquire(1))
    await asyncio.sleep(0)
    assert slots.serialized and slots.waiting
    advance(601)
    await slots.acquire(1)  # and lets in who came before
    assert not slots.serialized and slots.running == 3
    await waiting


# The conversations that clients keep.


@pytest.mark.parametrize("shared", [True, False])
async def test_kept_conversations_are_bounded_and_the_oldest_go_first(tmp_path: Path, shared: bool) -> None:
    directory = tmp_path if shared else None
    accounts = make_accounts(Service(), directory=directory)
    account = accounts.get("r")
    for number in range(105):
        await accounts.keep(account, f"c{number}", "connect", f"m{number}")
        await accounts.keep(account, f"{number}", "connect", "m", key="another's")
    await accounts.keep(account, "c5", "connect", "again")
    kept = await accounts.read_kept(account)
    assert (len(kept), kept["c5"], "c4" in kept) == (100, ("connect", "again"), False)
    again = make_accounts(Service(), directory=directory)
    assert (await again.read_kept(again.get("r"))).get("c104") == (("connect", "m104") if shared else None)


async def test_kept_conversations_stay_in_memory_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    first, second = (make_accounts(Rotating(), directory=tmp_path) for _ in range(2))
    account, other = first.get("r"), second.get("r")
    await first.keep(account, "c1", "connect", "m1")
    disk.full = True
    await first.keep(account, "c1", "connect", "m2")
    await first.keep(account, "c2", "connect", "m1")
    assert (await first.read_kept(account))["c1"] == ("connect", "m2")
    disk.full = False
    await second.keep(other, "c3", "connect", "m1")
    await second.access_token(other)
    await first.save()
    assert await second.read_kept(other) == {
        name: ("connect", f"m{m}") for name, m in (("c1", 2), ("c2", 1), ("c3", 1))
    }
    assert await first.access_token(account) == "access-1"


# The conversations that are open.

A, B = bytes(32), bytes(range(32))


def make_open(directory: Path | None, base_url: str = "") -> OpenConversations:
    return OpenConversations(StateFiles(directory, Metrics(), base_url))


def leave_behind(directory: Path, *ids: str, account: bytes = A) -> None:
    """A file as a process leaves it that died."""
    died = make_open(directory)
    for one in ids:
        died.add(account, "classic", one)
    died.close()


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def files_in(directory: Path) -> list[Path]:
    return list(directory.glob("conversations-*/*"))


def noted_in(directory: Path) -> set[str]:
    """The ids in the one journal that there is."""
    (path,) = files_in(directory)
    lines = [json.loads(line) for line in path.read_text().split("\n")[1:]]
    removed = {one for one, *known in lines if not known}
    return {one for one, *known in lines if known} - removed


def test_what_is_open_is_left_to_the_next_process(tmp_path: Path) -> None:
    leave_behind(tmp_path, "c1", "c2")
    leave_behind(tmp_path, "c3", account=B)
    died_too = make_open(tmp_path)
    assert died_too.recover() == 3
    died_too.close()
    heir = make_open(tmp_path)
    assert heir.recover() == 3
    assert heir.orphans == {A: {"c1": "classic", "c2": "classic"}, B: {"c3": "classic"}}
    assert heir.orphans.pop(A)
    heir.postpone("c2")
    heir.postpone("another's")
    assert heir.orphans.pop(A) == {"c2": "classic"}
    for one in ("c1", "c2", "c3"):
        heir.discard(one)
    heir.close()
    assert files_in(tmp_path) == []


def test_twice_as_many_dead_processes_take_about_twice_as_long(tmp_path: Path) -> None:
    def seconds(size: int) -> float:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        for number in range(size):
            leave_behind(directory, *(f"c{number}-{one}" for one in range(20)))
        heir = make_open(directory)
        started = time.process_time()
        assert heir.recover() == 20 * size
        taken = time.process_time() - started
        heir.close()
        return taken

    assert_linear(seconds, 100)


def test_a_living_processs_file_and_another_services_are_let_be(tmp_path: Path) -> None:
    living = make_open(tmp_path)
    living.add(A, "connect", "c1")
    first, second, third = make_open(tmp_path), make_open(tmp_path, "http://localhost:1"), make_open(tmp_path)
    assert first.recover() == 0
    living.close()
    assert (second.recover(), third.recover()) == (0, 1)
    for one in (first, second, third):
        one.close()


def test_a_file_is_for_its_owner_alone_and_names_ids_and_digests(tmp_path: Path) -> None:
    opened = make_open(tmp_path)
    opened.add(B, "connect", "c1")
    opened.add(A, "connect", "c2")
    opened.discard("c2")
    (path,) = files_in(tmp_path)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    *opened_lines, last = [json.loads(line) for line in path.read_text().split("\n")[1:]]
    assert opened_lines == [["c1", "connect", B.hex()], ["c2", "connect", A.hex()]]
    assert last == ["c2"]
    opened.close()


def test_a_journal_does_not_grow_with_what_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi_proxy, "MAX_JOURNAL_BYTES", 100_000)
    opened = make_open(tmp_path)
    opened.add(A, "classic", "stays")
    for number in range(2000):
        opened.add(A, "classic", f"c{number}")
        opened.discard(f"c{number}")
    (path,) = files_in(tmp_path)
    assert path.stat().st_size < 101_000 and noted_in(tmp_path) == {"stays"}
    opened.close()


WRONG_LINES = [
    *("1", "null", '"c1"', "[]", '["c1", "classic"]', '["c1", "classic", "zz"]'),
    *('["c1", "classic", 7]', '[["c1"], "classic", "00"]', "[{}]", '["c1", "classic", null]'),
]


@pytest.mark.parametrize("content", [*BROKEN, *(line.encode() for line in WRONG_LINES)])
def test_lines_of_no_use_are_passed_over(tmp_path: Path, content: bytes) -> None:
    leave_behind(tmp_path, "c2")
    leave_behind(tmp_path, "c3")
    with files_in(tmp_path)[0].open("ab") as file:
        file.write(b"\n" + content)
    heir = make_open(tmp_path)
    assert heir.recover() == 2 and noted_in(tmp_path) == {"c2", "c3"}
    heir.close()


def test_beyond_10000_the_oldest_are_dropped(tmp_path: Path, log_lines: LogRecorder) -> None:
    leave_behind(tmp_path, *(f"c{number}" for number in range(9_999)))
    metrics = Metrics()
    heir = OpenConversations(StateFiles(tmp_path, metrics))
    assert heir.recover() == 9_999
    for number in range(9_999, 10_002):
        heir.add(A, "classic", f"c{number}")
    assert metrics.counts["kimi_proxy_orphans_dropped_total"] == 2
    assert noted_in(tmp_path) == {f"c{number}" for number in range(2, 10_002)}
    assert log_lines.text.count("more than 10000 conversations") == 1
    heir.close()


def test_a_disk_that_is_full_loses_what_is_new_alone(tmp_path: Path) -> None:
    opened = make_open(tmp_path)
    opened.add(A, "classic", "c1")
    (path,) = files_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
        opened.add(A, "classic", "c2")
        assert noted_in(tmp_path) == {"c1"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    opened.add(A, "classic", "c3")
    assert noted_in(tmp_path) == {"c1", "c3"}
    opened.close()


def test_where_nothing_can_be_written_nothing_is_noted_and_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "conversations-kimi").write_text("a file in the way")
    for directory in (tmp_path, None):
        opened = make_open(directory)
        opened.add(A, "classic", "c1")
        opened.postpone("c1")
        opened.discard("c1")
        assert (opened.recover(), opened.orphans) == (0, {})
        opened.close()
