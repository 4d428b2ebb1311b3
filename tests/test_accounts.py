"""Section 12: one token an account: single flight, no waiter can cancel it, refusals are remembered."""

from __future__ import annotations

import asyncio

import pytest
from conftest import LogRecorder

from kimi_proxy import Account, Accounts, BackgroundTasks, ProxyError, TokenPair


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


def make_accounts(service: Service, *, token_seconds: float = 300.0, max_accounts: int = 10) -> Accounts:
    return Accounts(service.refresh, BackgroundTasks(), token_seconds=token_seconds, max_accounts=max_accounts)


async def test_many_at_once_cause_one_refresh(service: Service) -> None:
    accounts = make_accounts(service)
    account = accounts.get("r")
    waiters = [asyncio.create_task(accounts.access_token(account)) for _ in range(50)]
    await asyncio.sleep(0)
    service.open.set()
    assert set(await asyncio.gather(*waiters)) == {"access-1"}
    assert await accounts.access_token(account) == "access-1"
    assert service.asked == ["r"]


async def test_a_token_is_used_for_its_life_and_the_newest_refresh_token_next(service: Service) -> None:
    accounts = make_accounts(service, token_seconds=0.05)
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


async def test_the_cache_forgets_the_idle_first_and_none_that_is_being_refreshed(service: Service) -> None:
    accounts = make_accounts(service, max_accounts=3)
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
