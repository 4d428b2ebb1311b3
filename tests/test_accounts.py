"""Section 13: one token an account: single flight, no waiter can cancel it, refusals are remembered."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LogRecorder

import kimi_proxy
from kimi_proxy import (
    Account,
    Accounts,
    BackgroundTasks,
    KeptConversations,
    Metrics,
    OpenConversations,
    ProxyError,
    StoredTokens,
    TokenPair,
    TokenStore,
    find_state_dir,
    is_access_token,
    parse_open_conversations,
    read_claims,
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
    store = TokenStore(directory, Metrics(), lock_seconds=5.0)
    return Accounts(service.refresh, BackgroundTasks(), store)


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
    assert account.refresh_token == "refresh-1"
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
    assert len({id(outcome) for outcome in outcomes}) == 5
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
    await accounts.drop(account, old)
    new = await accounts.access_token(account)
    await accounts.drop(account, old)
    assert await accounts.access_token(account) == new != old


async def test_the_cache_forgets_the_idle_first_and_none_that_is_being_refreshed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kimi_proxy, "MAX_ACCOUNTS", 3)
    accounts = make_accounts(service)
    busy = accounts.get("busy")
    waiter = asyncio.create_task(accounts.access_token(busy))
    await service.begun.wait()
    second = accounts.get("second")
    for number in range(20):
        accounts.get(f"other-{number}")
        assert accounts.get("busy") is busy
    assert len(accounts) == 3
    assert accounts.get("second") is not second
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


async def test_no_token_is_in_a_repr_or_a_label(service: Service) -> None:
    account = make_accounts(service).get("sesame")
    assert "sesame" not in repr(account) + repr(TokenPair("sesame", "sesame"))
    assert len(account.label) == 8
    assert make_accounts(service).get("sesame").label != account.label


def make_jwt(**claims: Any) -> str:
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{part}.c2ln"


class Rotating(Service):
    """A service whose refresh tokens work once."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = "r"

    async def refresh(self, account: Account) -> TokenPair:
        self.asked.append(account.refresh_token)
        if account.refresh_token != self.valid:
            raise ProxyError("token_dead", "rotated")
        self.valid = f"r{len(self.asked)}"
        return TokenPair(f"access-{len(self.asked)}", self.valid)


async def test_a_rotated_token_survives_a_restart_under_the_clients_own(tmp_path: Path) -> None:
    service = Rotating()
    for expected in ("access-1", "access-1", "access-1"):
        accounts = make_accounts(service, directory=tmp_path)
        assert await accounts.access_token(accounts.get("r")) == expected
    accounts = make_accounts(service, directory=tmp_path)
    account = accounts.get("r")
    await accounts.drop(account, await accounts.access_token(account))
    assert await accounts.access_token(account) == "access-2"
    assert service.asked == ["r", "r1"]


async def test_what_another_process_fetched_is_used(tmp_path: Path) -> None:
    service = Rotating()
    first, second = (make_accounts(service, directory=tmp_path) for _ in range(2))
    old = await first.access_token(first.get("r"))
    assert await second.access_token(second.get("r")) == old
    await second.drop(second.get("r"), old)
    new = await second.access_token(second.get("r"))
    await first.drop(first.get("r"), old)
    assert await first.access_token(first.get("r")) == new
    assert len(service.asked) == 2


async def test_where_the_kept_token_is_refused_the_clients_own_is_tried(tmp_path: Path) -> None:
    service = Rotating()
    accounts = make_accounts(service, directory=tmp_path)
    account = accounts.get("r")
    await accounts.drop(account, await accounts.access_token(account))
    service.valid = "r"
    assert await accounts.access_token(account) == "access-3"
    assert service.asked == ["r", "r1", "r"]


async def test_files_are_for_their_owner_alone_and_name_no_token(tmp_path: Path) -> None:
    accounts = make_accounts(Rotating(), directory=tmp_path)
    await accounts.access_token(accounts.get("r"))
    (path,) = (tmp_path / "tokens").glob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stem == "454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1"
    assert json.loads(path.read_text())["refresh_token"] == "r1"
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"access_token":1}', b"\xff", b'{"received":"x"}'])
async def test_a_broken_file_is_passed_over_and_written_anew(
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
    assert "passed over" in log_lines.text
    assert json.loads(path.read_text())["access_token"] == "access-2"


async def test_a_directory_that_cannot_be_written_is_told_once(tmp_path: Path, log_lines: LogRecorder) -> None:
    (tmp_path / "tokens").write_text("a file in the way")
    accounts = make_accounts(Rotating(), directory=tmp_path)
    account = accounts.get("r")
    for expected in ("access-1", "access-2"):
        token = await accounts.access_token(account)
        assert token == expected
        await accounts.drop(account, token)
    assert log_lines.text.count("cannot be kept") == 1


async def test_the_unused_is_deleted_after_100_days(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, Metrics(), lock_seconds=1.0)
    async with store.lock(b"old"), store.lock(b"new"):
        for digest in (b"old", b"new"):
            await store.write(digest, StoredTokens("a", "r", 0.0, 1.0))
    old = store._path(b"old", ".json")
    day = 86_400
    os.utime(old, (time.time() - 101 * day,) * 2)
    assert store.delete_unused(time.time()) == 1
    assert not old.exists() and store._path(b"new", ".json").exists()
    assert await store.read(b"old") is None and await store.read(b"new") is not None


RACER = """
import asyncio, sys
from pathlib import Path
from kimi_proxy import Accounts, BackgroundTasks, Metrics, ProxyError, TokenPair, TokenStore

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
    store = TokenStore(Path(sys.argv[1]), Metrics(), 20.0)
    accounts = Accounts(refresh, BackgroundTasks(), store)
    account = accounts.get("r")
    for _ in range(8):
        await accounts.drop(account, await accounts.access_token(account))

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
        ({"iat": 1000, "exp": 1100}, 50),
        ({"exp": 1900}, 300),
        ({"iat": 1900, "exp": 1000}, 300),
        ({"iat": "x", "exp": 1}, 300),
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
    assert account.expires_at - asyncio.get_running_loop().time() == pytest.approx(life, abs=2)


async def test_a_refresh_token_that_ends_soon_is_told(log_lines: LogRecorder) -> None:
    class Ending(Service):
        async def refresh(self, account: Account) -> TokenPair:
            return TokenPair("a", make_jwt(exp=time.time() + 6 * 86_400))

    accounts = make_accounts(Ending())
    account = accounts.get("r")
    await accounts.access_token(account)
    assert f"account {account.label} ends within 7 days" in log_lines.text


async def test_an_access_token_of_kimis_is_told_from_others(service: Service) -> None:
    access = {"app_id": "kimi", "typ": "access", "exp": time.time() + 60}
    assert make_accounts(service).get(make_jwt(**access)).direct
    for other in ("r", make_jwt(app_id="kimi", typ="refresh"), "a.b.c", "..", "e30.!!.x", make_jwt()):
        assert not make_accounts(service).get(other).direct
    assert is_access_token(access) and read_claims(make_jwt(sub="x")) == {"sub": "x"}
    assert read_claims("e30.W10.x") == {}


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("", {"STATE_DIRECTORY": "/var/lib/x"}, None),
        ("/srv/state", {"STATE_DIRECTORY": "/var/lib/x"}, "/srv/state"),
        ("default", {"STATE_DIRECTORY": "/var/lib/x:/var/lib/y"}, "/var/lib/x"),
        ("default", {"XDG_STATE_HOME": "/home/a/state"}, "/home/a/state/kimi_proxy"),
        ("default", {}, str(Path.home() / ".local/state/kimi_proxy")),
    ],
)
def test_the_state_directory_is_where_it_belongs(setting: str, environ: dict[str, str], expected: str | None) -> None:
    found = find_state_dir(setting, environ)
    assert (None if found is None else str(found)) == expected


@pytest.mark.parametrize("shared", [True, False])
async def test_kept_conversations_are_bounded_and_the_oldest_go_first(tmp_path: Path, shared: bool) -> None:
    store = TokenStore(tmp_path if shared else None, Metrics(), lock_seconds=1.0)
    account = make_accounts(Service()).get("r")
    kept = KeptConversations(store, most_accounts=2)
    for number in range(105):
        await kept.keep(account, f"c{number}", "connect", f"m{number}")
    await kept.keep(account, "c5", "connect", "again")
    assert await kept.find(account, "c5") == ("connect", "again")
    with pytest.raises(ProxyError) as caught:
        await kept.find(account, "c4")
    assert caught.value.code == "conversation_not_found"
    another = KeptConversations(store, most_accounts=2)
    if shared:
        assert await another.find(account, "c104") == ("connect", "m104")


# The list of open conversations.

A, B = bytes(32), bytes(range(32))


def make_list(directory: Path | None, failures: list[OSError] | None = None) -> OpenConversations:
    def complain(error: OSError) -> None:
        if failures is None:
            raise error
        failures.append(error)

    return OpenConversations(directory, Metrics(), complain)


def leave_behind(directory: Path, *ids: str, account: bytes = A) -> None:
    """A list as a process leaves it that died."""
    died = make_list(directory)
    for one in ids:
        died.add(account, "classic", one)
    died.release()


def lists_in(directory: Path) -> list[Path]:
    return list((directory / "conversations").glob("*"))


def test_what_is_open_is_left_to_the_next_process_and_given_once(tmp_path: Path) -> None:
    leave_behind(tmp_path, "c1", "c2")
    leave_behind(tmp_path, "c3", account=B)
    died_too = make_list(tmp_path)
    assert died_too.adopt() == 3
    died_too.release()
    heir = make_list(tmp_path)
    assert (heir.adopt(), heir.left, set(heir.owners)) == (3, 3, {A, B})
    assert [(one.id, one.dialect) for one in heir.take(A)] == [("c1", "classic"), ("c2", "classic")]
    assert (heir.take(A), heir.left) == ([], 1)
    for one in ("c1", "c2", "c3"):
        heir.close(one)
    heir.release()
    assert lists_in(tmp_path) == []


def test_a_living_processs_list_is_let_be(tmp_path: Path) -> None:
    living = make_list(tmp_path)
    living.add(A, "connect", "c1")
    assert make_list(tmp_path).adopt() == 0
    living.release()
    assert make_list(tmp_path).adopt() == 1


def test_a_list_that_a_quicker_heir_took_between_two_steps_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(tmp_path, "c1")
    quicker, lock = make_list(tmp_path), kimi_proxy._try_lock

    def lock_late(descriptor: int) -> bool:
        monkeypatch.setattr(kimi_proxy, "_try_lock", lock)
        assert quicker.adopt() == 1
        return lock(descriptor)

    monkeypatch.setattr(kimi_proxy, "_try_lock", lock_late)
    assert make_list(tmp_path).adopt() == 0
    quicker.release()


def test_a_list_that_a_process_takes_for_a_dead_ones_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lock = make_list(tmp_path), kimi_proxy._try_lock

    def lock_late(descriptor: int) -> bool:
        monkeypatch.setattr(kimi_proxy, "_try_lock", lock)
        assert make_list(tmp_path).adopt() == 0  # and the file, still empty, is gone
        return lock(descriptor)

    monkeypatch.setattr(kimi_proxy, "_try_lock", lock_late)
    opened.add(A, "classic", "c1")
    opened.release()
    assert make_list(tmp_path).adopt() == 1


def test_a_list_is_for_its_owner_alone_and_names_ids_and_digests(tmp_path: Path) -> None:
    opened = make_list(tmp_path)
    opened.add(B, "connect", "c1")
    (path,) = lists_in(tmp_path)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    known = json.loads(path.read_text())
    assert abs(known.pop("since") - time.time()) < 60
    assert known == {"open": "c1", "dialect": "connect", "account": B.hex()}
    opened.release()


GOOD = b'{"open":"c1","dialect":"classic","account":"%s","since":4000000000}' % (b"00" * 32)


@pytest.mark.parametrize(
    ("content", "opened", "unread"),
    [
        (GOOD, 1, 0),
        (GOOD + b"\n" + GOOD.replace(b"c1", b"c2")[:-9], 1, 1),
        (GOOD[:40] + b"\n" + GOOD + b"\n", 1, 1),
        (GOOD + b'\n{"closed":"c1"}\n{"closed":"other"}\n', 0, 0),
        (b"\xff\x00\n[]\nnull\n1\n{}\n" + GOOD, 1, 5),
        (GOOD + b'\n{"closed":[]}\n{"closed":{}}\n', 1, 2),
        (GOOD.replace(b'"c1"', b'"../x"') + b"\n" + GOOD.replace(b'"c1"', b"7"), 0, 2),
        (GOOD.replace(b"00", b"", 1) + b"\n" + GOOD.replace(b"00", b"zz", 1), 0, 2),
        (GOOD.replace(b"4000000000", b"1e999") + b"\n" + GOOD.replace(b"4000000000", b"[]"), 0, 2),
        (b"[" * 100_000 + b"\n" + GOOD, 1, 1),
        (b"", 0, 0),
    ],
)
def test_what_cannot_be_read_of_a_list_is_passed_over(
    tmp_path: Path, log_lines: LogRecorder, content: bytes, opened: int, unread: int
) -> None:
    found = parse_open_conversations(content)
    assert (len(found[0]), found[1]) == (opened, unread)
    (tmp_path / "conversations").mkdir()
    (tmp_path / "conversations" / "1-x.list").write_bytes(content)
    heir = make_list(tmp_path)
    assert heir.adopt() == opened
    assert ("cannot be read" in log_lines.text) is bool(unread)
    heir.close("c1")
    heir.release()
    assert lists_in(tmp_path) == []


def test_after_7_days_and_beyond_10000_the_oldest_are_dropped(tmp_path: Path, log_lines: LogRecorder) -> None:
    (tmp_path / "conversations").mkdir()
    now = int(time.time())
    day = 86_400
    since = [now - 8 * day, now - 6 * day, *(now - day for _ in range(10_000))]
    lines = (GOOD.replace(b"c1", b"c%d" % at).replace(b"4000000000", b"%d" % one) for at, one in enumerate(since))
    (tmp_path / "conversations" / "1-x.list").write_bytes(b"\n".join(lines))
    metrics = Metrics()
    heir = OpenConversations(tmp_path, metrics, lambda _: None)
    assert heir.adopt() == 10_000
    assert metrics.value("kimi_proxy_orphans_dropped_total") == 2 and "2 conversations" in log_lines.text
    assert heir.take(A)[0].id == "c2"
    heir.add(A, "classic", "new")
    assert metrics.value("kimi_proxy_orphans_dropped_total") == 3
    heir.release()
    assert make_list(tmp_path).adopt() == 10_000


def test_what_could_not_be_removed_is_given_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = make_list(tmp_path)
    opened.add(A, "classic", "c1")
    opened.leave("c1")
    opened.leave("another's")
    assert (opened.take(A), opened.left) == ([], 1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert [one.id for one in opened.take(A)] == ["c1"]
    opened.release()
    assert make_list(tmp_path).adopt() == 1


def test_a_list_stays_small_and_right_however_much_comes_and_goes(tmp_path: Path) -> None:
    opened = make_list(tmp_path)
    opened.add(B, "classic", "stays")
    largest = 0
    for number in range(6000):
        opened.add(A, "classic", f"c{number}")
        opened.close(f"c{number}")
        if number % 50 == 0:
            largest = max(largest, *(path.stat().st_size for path in lists_in(tmp_path)))
            assert len(lists_in(tmp_path)) == 1
    assert 100_000 < largest < 300_000
    opened.release()
    heir = make_list(tmp_path)
    assert heir.adopt() == 1 and [one.id for one in heir.take(B)] == ["stays"]
    heir.release()


def test_a_removal_is_noted_with_the_next_line_or_later_and_what_a_client_keeps_at_once(tmp_path: Path) -> None:
    due: list[Callable[[], None]] = []
    opened = OpenConversations(tmp_path, Metrics(), lambda _: None, due.append)

    def noted() -> set[str]:
        (path,) = lists_in(tmp_path)
        return set(parse_open_conversations(path.read_bytes())[0])

    opened.add(A, "classic", "c1")
    opened.close("c1")
    assert noted() == {"c1"}
    due.pop()()
    assert noted() == set()
    for number in range(2, 5):
        opened.add(A, "classic", f"c{number}")
        opened.close(f"c{number}")
        assert noted() == {f"c{number}"}
    assert len(due) == 1
    opened.add(A, "classic", "kept")
    opened.keep("kept")
    assert noted() == set()
    opened.add(A, "classic", "left")
    opened.add(A, "classic", "c5")
    opened.close("c5")
    opened.release()
    assert noted() == {"left"}


def test_a_disk_that_is_full_in_the_middle_of_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    failures: list[OSError] = []
    opened = make_list(tmp_path, failures)
    opened.add(A, "classic", "c1")
    (path,) = lists_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))
        opened.add(A, "classic", "c2")
        opened.add(A, "classic", "c3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(failures) == 2 and lists_in(tmp_path) == [path]
    assert set(parse_open_conversations(path.read_bytes())[0]) == {"c1"}
    opened.add(A, "classic", "c4")
    opened.release()
    heir = make_list(tmp_path)
    assert heir.adopt() == 4
    heir.release()


def test_where_nothing_can_be_written_there_is_no_list_and_no_end_of_work(tmp_path: Path) -> None:
    (tmp_path / "conversations").write_text("a file in the way")
    failures: list[OSError] = []
    opened = make_list(tmp_path, failures)
    assert opened.adopt() == 0
    opened.add(A, "classic", "c1")
    opened.close("c1")
    assert len(failures) == 2
    opened.release()
    nothing = make_list(None)
    nothing.add(A, "classic", "c1")
    nothing.leave("c1")
    assert (nothing.adopt(), nothing.left) == (0, 0)
    nothing.release()


HEIR = """
import sys
from pathlib import Path
from kimi_proxy import Metrics, OpenConversations

def fail(error):
    raise error

for line in sys.stdin:
    heir = OpenConversations(Path(line.strip()), Metrics(), fail)
    heir.adopt()
    print(*(one.id for owner in heir.owners for one in heir.take(owner)), flush=True)
"""


async def test_of_processes_that_start_at_once_each_list_has_one_heir(tmp_path: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    heirs = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HEIR),
            stdin=pipe,
            stdout=pipe,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        for _ in range(3)
    ]
    try:
        for turn in range(20):
            directory = tmp_path / str(turn)
            expected = {f"c{number}-{one}" for number in range(5) for one in "ab"}
            for number in range(5):
                leave_behind(directory, f"c{number}-a", f"c{number}-b")
            for heir in heirs:
                assert heir.stdin is not None
                heir.stdin.write(f"{directory}\n".encode())
            shares: list[str] = []
            for heir in heirs:
                assert heir.stdout is not None
                shares += (await asyncio.wait_for(heir.stdout.readline(), 20)).decode().split()
            assert sorted(shares) == sorted(expected)
    finally:
        for heir in heirs:
            await asyncio.wait_for(heir.communicate(b""), 20)
