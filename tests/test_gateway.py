"""Section 16: several accounts, the queue of one that answers one at a time, and files that belong to an account."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from conftest import (
    LogRecorder,
    StartProxy,
    bearer,
    chat_body,
    list_descriptors,
    openai_clients,
    wait_until_nothing_is_spooled,
)
from kimi_simulator import (
    HELLO,
    SCRIPTS,
    Conversation,
    Simulator,
    digest_content,
    make_content,
    render_connect,
    render_stream,
)

from kimi_proxy import KeptTable, Metrics, StateFiles

CHAT = "/v1/chat/completions"


@pytest.fixture(params=["classic", "connect"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def ask(url: str, token: str, **fields: Any) -> tuple[int, Any, Any]:
    """A whole answer: status, JSON, headers."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + CHAT, json=chat_body(**fields), headers=bearer(token)) as response,
    ):
        return response.status, await response.json(), response.headers


def asks(simulator: Simulator, *tokens: str) -> list[int]:
    """How often each account was asked."""
    return [len(simulator.account(token).asked) for token in tokens]


async def test_several_tokens_take_turns(simulator: Simulator, proxy: str) -> None:
    tokens = [simulator.token("hello") for _ in range(3)]
    for _ in range(6):
        assert (await ask(proxy, ", ".join(tokens)))[0] == 200
    assert asks(simulator, *tokens) == [2, 2, 2]


async def test_the_least_busy_account_is_asked(simulator: Simulator, proxy: str) -> None:
    tokens = [simulator.token("quiet"), simulator.token("quiet")]
    answers = await asyncio.gather(*(ask(proxy, ",".join(tokens)) for _ in range(4)))
    assert [status for status, _, _ in answers] == [200] * 4
    assert asks(simulator, *tokens) == [2, 2]


@pytest.mark.parametrize(
    "faults", [("unauthorized-always=refresh",), ("status=ask:429", "retry-after=30"), ("unauthorized-always=ask",)]
)
async def test_a_refused_account_is_set_aside_and_the_next_one_asked(
    simulator: Simulator, proxy: str, faults: tuple[str, ...]
) -> None:
    bad, good = simulator.token("hello", *faults), simulator.token("hello")
    for _ in range(3):
        status, answer, _ = await ask(proxy, f"{bad},{good}")
        assert (status, answer["choices"][0]["message"]["content"]) == (200, HELLO)
    assert asks(simulator, good) == [3]
    assert simulator.account(bad).count("refresh") <= 2


@pytest.mark.parametrize(
    ("faults", "seconds"),
    [
        (("unauthorized-always=refresh",), 600),
        (("status=ask:429", "retry-after=300"), 300),
        (("status=ask:429",), 60),
    ],
)
async def test_a_refused_account_is_asked_again_when_its_time_is_over(
    simulator: Simulator, proxy: str, advance: Callable[[float], None], faults: tuple[str, ...], seconds: int
) -> None:
    bad, good = simulator.token("hello", *faults), simulator.token("hello")
    account = simulator.account(bad)
    for ahead, is_asked in ((0, True), (seconds - 10, False), (20, True)):
        before = len(account.calls)
        advance(ahead)
        for _ in range(2):  # the second time it would be the turn of the other one
            assert (await ask(proxy, f"{bad},{good}"))[0] == 200
        assert (len(account.calls) > before) is is_asked


@pytest.mark.parametrize(("fault", "code"), [("limit-late", "429"), ("dead-late", "401")])
async def test_a_refusal_behind_visible_text_does_not_move_on(
    simulator: Simulator, proxy: str, fault: str, code: str
) -> None:
    tokens = [simulator.token("hello", fault), simulator.token("hello", fault)]
    async with (
        aiohttp.ClientSession() as http,
        http.post(proxy + CHAT, json=chat_body(stream=True), headers=bearer(",".join(tokens))) as response,
    ):
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line.startswith("data: ")]
    *chunks, last = map(json.loads, lines)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert (response.status, text) == (200, HELLO)
    expected = {"429": ("answer_running", "rate_limited"), "401": ("token_dead",)}[code]
    assert last["error"]["code"] in expected
    assert sorted(asks(simulator, *tokens)) == [0, 1]


async def test_where_all_are_refused_a_limit_is_told_before_a_dead_token(simulator: Simulator, proxy: str) -> None:
    dead = simulator.token("hello", "unauthorized-always=refresh")
    limited = simulator.token("hello", "status=ask:429", "retry-after=30")
    status, answer, headers = await ask(proxy, f"{limited},{dead}")
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "rate_limited", "30")
    before = len(simulator.account(limited).calls)
    status, answer, _ = await ask(proxy, f"{limited},{dead}")  # all are aside: the one due first is asked all the same
    assert status == 429 and len(simulator.account(limited).calls) > before


async def test_a_limit_is_told_though_its_account_was_set_aside_before(simulator: Simulator, proxy: str) -> None:
    dead = simulator.token("hello", "unauthorized-always=refresh")
    limited = simulator.token("hello", "status=ask:429", "retry-after=30")
    assert (await ask(proxy, limited))[0] == 429
    for _ in range(3):
        assert (await ask(proxy, f"{limited},{dead}"))[0] == 429


async def test_a_models_quota_says_nothing_of_its_account(
    simulator: Simulator, start_proxy: StartProxy, protocol: str
) -> None:
    if protocol == "connect":
        return
    proxy = await start_proxy()
    spent, other = simulator.token("hello", "no-quota"), simulator.token("hello", "no-quota")
    assert (await ask(proxy, f"{spent},{other}", model="kimi-research"))[1]["error"]["code"] == "quota_used_up"
    for _ in range(4):
        assert (await ask(proxy, f"{spent},{other}"))[0] == 200
    assert asks(simulator, spent, other) == [2, 2]


async def test_many_tokens_in_one_request_are_refused(simulator: Simulator, proxy: str) -> None:
    status, answer, _ = await ask(proxy, ",".join(f"t{number}" for number in range(33)))
    assert (status, answer["error"]["code"]) == (400, "invalid_request") and "32" in answer["error"]["message"]


@pytest.mark.parametrize("faults", [("status=ask:500",), ("cut=9",), ("cut=9", "retry-after=1")])
async def test_other_failures_and_visible_text_do_not_move_on(
    simulator: Simulator, proxy: str, faults: tuple[str, ...]
) -> None:
    tokens = [simulator.token("long", *faults) for _ in range(2)]
    status, _, _ = await ask(proxy, ",".join(tokens))
    assert status == 502
    assert sum(simulator.account(token).count("ask") for token in tokens) == 1


async def test_one_token_twice_is_one_account(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "status=ask:429")
    assert (await ask(proxy, f"{token},{token}"))[0] == 429
    assert simulator.account(token).count("ask") == 1


@pytest.mark.parametrize(
    ("header", "code"),
    [
        *((one, "token_missing") for one in ("Bearer ,", "Bearer  , ,")),
        *((one, "token_malformed") for one in ("Bearer a b", "Bearer tok\u00e9n", "Bearer {}", "Bearer a,null")),
    ],
)
async def test_a_list_without_a_token_is_refused(
    proxy: str, http: aiohttp.ClientSession, header: str, code: str
) -> None:
    async with http.post(proxy + CHAT, json=chat_body(), headers={"Authorization": header}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (401, code)


@pytest.mark.parametrize("pasted", ["Bearer {}", '"{}"', "_ga=1; kimi-auth={}; b=c", '{{"refresh_token": "{}"}}'])
async def test_what_a_user_pastes_around_a_token_does_no_harm(simulator: Simulator, proxy: str, pasted: str) -> None:
    token = simulator.token("hello")
    assert (await ask(proxy, pasted.format(token)))[0] == 200
    assert asks(simulator, token) == [1]


async def test_files_are_brought_to_the_account_that_is_asked_in_the_end(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(allow_private_urls=True)
    bad, good = simulator.token("read", "status=ask:429"), simulator.token("read")
    part = {"type": "file", "file_url": {"url": f"{simulator.origin_url}/500/a.pdf"}}
    messages = [{"role": "user", "content": [part]}]
    status, answer, _ = await ask(proxy, f"{bad},{good}", messages=messages)
    assert status == 200 and "500 bytes" in answer["choices"][0]["message"]["content"]
    assert len(simulator.account(bad).files) == len(simulator.account(good).files) == 1


# One answer at a time.


async def test_a_refused_request_waits_for_its_turn_and_is_tried_once_more(
    simulator: Simulator, proxy: str, protocol: str
) -> None:
    token = simulator.token("quiet", "one-at-a-time")
    first = asyncio.create_task(ask(proxy, token))
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
    others = await asyncio.gather(*(ask(proxy, token) for _ in range(3)))
    assert [(await first)[0], *(status for status, _, _ in others)] == [200] * 4
    account = await simulator.settle(token)
    assert account.count("ask") in (5, 6, 7)  # each is refused once at most


async def test_the_order_of_the_line_is_kept_and_who_goes_away_gives_up_its_place(
    simulator: Simulator, proxy: str
) -> None:
    token = simulator.token("quiet", "one-at-a-time")
    account = simulator.account(token)
    first = asyncio.create_task(ask(proxy, token))
    await simulator.wait_until(lambda: account.streams_open == 1)
    order: list[int] = []

    async def wait(number: int) -> None:
        await ask(proxy, token)
        order.append(number)

    waiting = []
    for number in range(4):
        waiting.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0.05)  # each is in the line before the next comes
    waiting[1].cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    assert order == [0, 2, 3]


@pytest.mark.parametrize("faults", [("pace=0.02", "chunks=10"), ("linger", "chunks=9")])
async def test_the_line_moves_on_when_the_stream_of_the_answer_before_is_closed(
    simulator: Simulator, proxy: str, faults: tuple[str, ...]
) -> None:
    token = simulator.token("long", "one-at-a-time", *faults)
    answers = await asyncio.gather(*(ask(proxy, token) for _ in range(4)))
    assert [status for status, _, _ in answers] == [200] * 4


async def test_the_line_is_known_where_auto_came_to_another_protocol(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    simulator.retired = "404"
    proxy = await start_proxy(protocol="auto")
    token = simulator.token("quiet", "one-at-a-time")
    answers = await asyncio.gather(*(ask(proxy, token) for _ in range(3)))
    assert [status for status, _, _ in answers] == [200] * 3


async def test_an_account_with_a_line_is_not_forgotten(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(MAX_ACCOUNTS=1)
    token = simulator.token("quiet", "one-at-a-time")
    running = [asyncio.create_task(ask(proxy, token)) for _ in range(2)]
    await simulator.wait_until(lambda: simulator.account(token).count("ask") == 2)
    assert (await ask(proxy, simulator.token("hello")))[0] == 200
    assert (await ask(proxy, token))[0] == 200
    assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]


async def test_a_full_line_and_a_long_wait_are_a_429(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(queue_length=1, QUEUE_SECONDS=0.3)
    token = simulator.token("long", "one-at-a-time", "pace=0.05", "chunks=40")
    first = asyncio.create_task(ask(proxy, token))
    await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
    answers = await asyncio.gather(*(ask(proxy, token) for _ in range(3)))
    assert {(status, answer["error"]["code"]) for status, answer, _ in answers} == {(429, "queue_full")}
    words = " ".join(answer["error"]["message"] for _, answer, _ in answers)
    assert "PROXY_QUEUE_LENGTH" in words and "waited 0.3 s" in words
    assert all("Retry-After" in headers for _, _, headers in answers)
    assert (await first)[0] == 200


async def test_a_refusal_with_no_answer_of_ours_is_a_429_at_once(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello", "error-type=ask:chat.user_stream_pushing")
    status, answer, headers = await ask(proxy, token)
    assert status == 429 and answer["error"]["code"] in ("answer_running", "rate_limited")
    assert "Retry-After" in headers and simulator.account(token).count("ask") == 1


async def test_a_refused_request_goes_to_a_free_account_first(simulator: Simulator, proxy: str) -> None:
    one, other = simulator.token("quiet", "one-at-a-time"), simulator.token("hello")
    first = asyncio.create_task(ask(proxy, one))
    await simulator.wait_until(lambda: simulator.account(one).streams_open == 1)
    await ask(proxy, one, messages=[{"content": "make it known"}], max_tokens=1)
    second = asyncio.create_task(ask(proxy, one))
    await simulator.wait_until(lambda: simulator.account(one).streams_open == 1)
    status, _, _ = await ask(proxy, f"{one},{other}")
    assert status == 200 and len(simulator.account(other).asked) == 1
    await asyncio.gather(first, second)


async def test_where_no_account_is_free_a_refused_request_waits(simulator: Simulator, proxy: str) -> None:
    tokens = [simulator.token("quiet", "one-at-a-time") for _ in range(2)]
    answers = await asyncio.gather(*(ask(proxy, ",".join(tokens)) for _ in range(5)))
    assert [status for status, _, _ in answers] == [200] * 5


# Files of OpenAI's API.


@pytest.fixture
async def client_for(start_proxy: StartProxy, tmp_path: Path) -> AsyncIterator[Any]:
    """Makes SDK clients; afterwards the spool directory is empty."""
    proxy = await start_proxy(spool_dir=str(tmp_path), max_file_mb=1, PARSE_SECONDS=0.5)
    async with openai_clients(proxy) as make:
        yield make
    await wait_until_nothing_is_spooled(tmp_path)


async def test_the_sdk_uploads_a_file_and_asks_about_it(simulator: Simulator, client_for: Any) -> None:
    token = simulator.token("read")
    client = client_for(token)
    content = b"".join(make_content(200_000))
    file = await client.files.create(file=("报告.pdf", content), purpose="user_data")
    assert (file.bytes, file.filename, file.purpose, file.status) == (200_000, "报告.pdf", "user_data", "processed")
    parts: Any = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": "?"}]
    answer = await client.chat.completions.create(model="kimi", messages=[{"role": "user", "content": parts}])
    assert "报告.pdf (application/pdf, 200000 bytes)" in answer.choices[0].message.content
    (stored,) = simulator.account(token).files.values()
    assert stored.sha256 == digest_content(200_000)
    assert (await client.files.retrieve(file.id)).id == file.id
    assert [one.id async for one in client.files.list()] == [file.id]
    assert (await client.files.delete(file.id)).deleted is True
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="kimi", messages=[{"role": "user", "content": parts}])


async def test_a_file_belongs_to_the_account_that_uploaded_it(simulator: Simulator, client_for: Any) -> None:
    owner, stranger = client_for(simulator.token("read")), client_for(simulator.token("read"))
    file = await owner.files.create(file=("a.txt", b"hello"), purpose="assistants")
    parts: Any = [{"type": "file", "file": {"file_id": file.id}}]
    for action in (
        stranger.files.retrieve(file.id),
        stranger.files.delete(file.id),
        stranger.chat.completions.create(model="kimi", messages=[{"role": "user", "content": parts}]),
    ):
        with pytest.raises(openai.NotFoundError, match="Upload it again"):
            await action
    assert [one async for one in stranger.files.list()] == []
    with pytest.raises(openai.BadRequestError, match="Kimi gives none back"):
        await owner.files.content(file.id)


async def test_a_request_with_a_file_goes_to_its_owner_and_two_owners_are_refused(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy()
    tokens = [simulator.token("read"), simulator.token("read")]
    ids = []
    for token in tokens:
        form = aiohttp.FormData()
        form.add_field("purpose", "assistants")
        form.add_field("file", io.BytesIO(b"hello"), filename="a.txt")
        async with http.post(f"{proxy}/v1/files", data=form, headers=bearer(token)) as response:
            ids.append((await response.json())["id"])
    both = ",".join(tokens)
    for at in (0, 1, 0, 1, 1):
        messages = [{"role": "user", "content": [{"type": "file", "file": {"file_id": ids[at]}}]}]
        before = asks(simulator, *tokens)
        assert (await ask(proxy, both, messages=messages))[0] == 200
        assert asks(simulator, *tokens)[at] == before[at] + 1
    parts = [{"type": "file", "file": {"file_id": one}} for one in ids]
    status, answer, _ = await ask(proxy, both, messages=[{"role": "user", "content": parts}])
    assert status == 400 and "two accounts" in answer["error"]["message"]
    _, opened, _ = await ask(proxy, tokens[0], conversation_id="new")
    status, _, _ = await ask(proxy, both, conversation_id=opened["id"])
    assert status == 200
    messages = [{"role": "user", "content": parts[1:]}]
    status, answer, _ = await ask(proxy, both, conversation_id=opened["id"], messages=messages)
    assert status == 400 and "two accounts" in answer["error"]["message"]
    status, answer, _ = await ask(proxy, tokens[1], conversation_id=opened["id"])
    assert (status, answer["error"]["code"]) == (404, "conversation_not_found")


async def upload(http: aiohttp.ClientSession, url: str, token: str) -> str:
    """Upload a file: its id."""
    form = aiohttp.FormData()
    form.add_field("file", io.BytesIO(b"hello"), filename="a.txt")
    async with http.post(f"{url}/v1/files", data=form, headers=bearer(token)) as response:
        return str((await response.json())["id"])


async def test_what_belongs_to_a_limited_account_does_not_move_on(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    owner, other = simulator.token("read"), simulator.token("read")
    part = {"type": "file", "file": {"file_id": await upload(http, proxy, owner)}}
    _, opened, _ = await ask(proxy, owner, conversation_id="new")
    before = asks(simulator, owner, other)
    simulator.account(owner).order.faults["status"] = "ask:429"
    for fields in ({"messages": [{"role": "user", "content": [part]}]}, {"conversation_id": opened["id"]}):
        assert (await ask(proxy, f"{owner},{other}", **fields))[0] == 429
    assert asks(simulator, other) == [0] == before[1:]


async def test_after_a_restart_an_id_is_a_404_that_says_so(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    token = simulator.token("read")
    part = {"type": "file", "file": {"file_id": await upload(http, await start_proxy(), token)}}
    await start_proxy.close()
    proxy = await start_proxy()
    status, answer, _ = await ask(proxy, token, messages=[{"role": "user", "content": [part]}])
    assert (status, answer["error"]["code"]) == (404, "file_not_found")
    assert "a restart of the proxy forgets it" in answer["error"]["message"]


async def test_of_many_uploaded_files_the_newest_are_known(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(MAX_KEPT_FILES=2)
    token = simulator.token("read")
    ids = [await upload(http, proxy, token) for _ in range(3)]
    async with http.get(f"{proxy}/v1/files", headers=bearer(token)) as response:
        listed = await response.json()
    assert [one["id"] for one in listed["data"]] == [ids[2], ids[1]]


async def test_an_upload_gets_a_new_token_once_and_moves_on_to_the_next_account(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession
) -> None:
    bad = simulator.token("read", "unauthorized-always=refresh")
    good = simulator.token("read", "unauthorized-once=sign", "unauthorized-once=upload")
    form = aiohttp.FormData()
    form.add_field("file", io.BytesIO(b"hello"), filename="a.txt")
    async with http.post(f"{proxy}/v1/files", data=form, headers=bearer(f"{bad},{good}")) as response:
        assert response.status == 200
    assert len(simulator.account(good).files) == 1


NESTED = b"".join(
    b"--%d\r\nContent-Type: multipart/mixed; boundary=%d\r\n\r\n" % (number, number + 1) for number in range(2000)
)
BAD_FORMS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no form": ({"json": {}}, 400, "invalid_request"),
    "no boundary": ({"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "body_broken"),
    "no file": ({"data": {"purpose": "x"}, "form": True}, 400, "invalid_request"),
    "broken": (
        {"data": b"--x\r\nno header\r\n\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "body_broken",
    ),
    "cut": (
        {
            "data": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        400,
        "body_broken",
    ),
    "nested": ({"data": NESTED, "headers": {"Content-Type": "multipart/form-data; boundary=0"}}, 400, "body_broken"),
    "a hostile charset": ({"data": {"_charset_": "x" * 40}, "form": True}, 400, "body_broken"),
    "empty": ({"data": {"file": io.BytesIO(b"")}, "form": True}, 400, "invalid_request"),
    "too large": ({"data": {"file": io.BytesIO(bytes(1_500_000))}, "form": True}, 413, "file_too_large"),
    "too large by its length": ({"data": {"file": io.BytesIO(bytes(3_500_000))}, "form": True}, 413, "file_too_large"),
    "a huge field": ({"data": {"purpose": "x" * 100_000}, "form": True}, 400, "invalid_request"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
async def test_a_bad_form_is_told_and_leaves_nothing(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, tmp_path: Path, name: str
) -> None:
    proxy = await start_proxy(max_file_mb=1, spool_dir=str(tmp_path))
    options, status, code = BAD_FORMS[name]
    options = {**options}
    token = simulator.token("read")
    if options.pop("form", False):
        form = aiohttp.FormData(default_to_multipart=True)
        for key, value in options.pop("data").items():
            if isinstance(value, io.BytesIO):
                value = io.BytesIO(value.getvalue())  # noqa: PLW2901
                form.add_field(key, value, filename="a.txt")
            else:
                form.add_field(key, value)
        options["data"] = form
    headers = bearer(token) | options.pop("headers", {})
    try:
        async with http.post(f"{proxy}/v1/files", headers=headers, **options) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (status, code), answer
    except aiohttp.ClientConnectionError:
        assert status == 413  # closed while the body was still on its way
    assert not simulator.account(token).files
    await wait_until_nothing_is_spooled(tmp_path)
    assert (await ask(proxy, token))[0] == 200


@pytest.mark.parametrize("leaves", [True, False])
async def test_an_upload_that_stops_in_the_middle_leaves_nothing(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path, leaves: bool
) -> None:
    proxy = await start_proxy(spool_dir=str(tmp_path), TRANSFER_SECONDS=30.0 if leaves else 0.5)
    token = simulator.token("read")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n")
    writer.write(f"Authorization: Bearer {token}\r\n".encode())
    writer.write(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n")
    writer.write(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(2_000_000))
    await writer.drain()
    if not leaves:
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")
    async with asyncio.timeout(5):
        while leaves and not any(one.startswith(f"{tmp_path}/") for one in list_descriptors()):
            await asyncio.sleep(0.01)
    writer.close()
    await wait_until_nothing_is_spooled(tmp_path)
    assert simulator.account(token).calls == []


async def test_token_check(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, log_lines: LogRecorder
) -> None:
    live, dead = simulator.token("hello"), simulator.token("hello", "unauthorized-always=refresh")
    for token, expected in ((live, True), (dead, False), ("no-such-token", False)):
        async with http.post(f"{proxy}/token/check", json={"token": token}) as response:
            assert (response.status, await response.json()) == (200, {"live": expected})
    claims = base64.urlsafe_b64encode(b'{"app_id":"kimi","typ":"access","exp":9999999999}').decode().rstrip("=")
    forged = json.dumps({"token": f"eyJhbGciOiJub25lIn0.{claims}.x"}).encode()
    failing = simulator.token("hello", "status=refresh:500")
    async with http.post(f"{proxy}/token/check", json={"token": failing}) as response:
        assert response.status == 502
    for body in (b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a b"}', b'{"token": "a,b"}', forged):
        async with http.post(f"{proxy}/token/check", data=body) as response:
            assert response.status == 400
    assert live not in log_lines.text


# The outgoing proxy.


class OutgoingProxy:
    """An HTTP proxy that passes on requests with an absolute target, and notes them."""

    def __init__(self, status: int = 0) -> None:
        self.targets: list[str] = []
        self.credentials: set[str] = set()
        self.url = ""
        self._status = status

    async def __aenter__(self) -> OutgoingProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://user:sesame@127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split("\r\n")[0].split(" ")
        self.targets.append(target)
        lines = [line for line in head.split("\r\n")[1:] if line]
        self.credentials |= {line for line in lines if line.lower().startswith("proxy-authorization")}
        if self._status:
            writer.write(f"HTTP/1.1 {self._status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            writer.close()
            return
        authority, _, path = target.removeprefix("http://").partition("/")
        host, _, port = authority.partition(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        kept = [line for line in lines if not line.lower().startswith(("proxy-", "connection"))]
        up_writer.write("\r\n".join([f"{method} /{path} HTTP/1.1", *kept, "Connection: close", "", ""]).encode())

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while piece := await source.read(65_536):
                target.write(piece)
                await target.drain()

        sending = asyncio.create_task(pump(reader, up_writer))
        await pump(up_reader, writer)
        sending.cancel()
        up_writer.close()
        writer.close()


async def test_kimi_and_its_storage_are_reached_through_the_outgoing_proxy_and_origins_are_not(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder, protocol: str
) -> None:
    async with OutgoingProxy() as outgoing:
        proxy = await start_proxy(proxy_url=outgoing.url, allow_private_urls=True)
        part = {"type": "file", "file_url": {"url": f"{simulator.origin_url}/500/a.pdf"}}
        token = simulator.token("read")
        status, answer, _ = await ask(proxy, token, messages=[{"role": "user", "content": [part]}])
        assert status == 200, answer
        await simulator.settle(token)
        places = {target.split("/")[2] for target in outgoing.targets}
        expected = {simulator.url, simulator.storage_url} if protocol == "classic" else {simulator.url}
        assert places == {place.removeprefix("http://") for place in expected}
        assert outgoing.credentials == {"Proxy-Authorization: Basic dXNlcjpzZXNhbWU="}
    assert "sesame" not in log_lines.text


@pytest.mark.parametrize("status", [407, 502])
async def test_an_outgoing_proxy_that_refuses_is_named(
    simulator: Simulator, start_proxy: StartProxy, status: int
) -> None:
    async with OutgoingProxy(status) as outgoing:
        proxy = await start_proxy(proxy_url=outgoing.url)
        seen, answer, _ = await ask(proxy, simulator.token("hello"))
    assert seen == 502 and "sesame" not in json.dumps(answer)
    proxy = await start_proxy(proxy_url="http://user:sesame@127.0.0.1:9")
    seen, answer, _ = await ask(proxy, simulator.token("hello"))
    assert (seen, answer["error"]["code"]) == (502, "service_unreachable")
    assert "KIMI_PROXY_URL" in answer["error"]["message"] and "sesame" not in json.dumps(answer)


# What is kept for the Responses API.


def test_whoever_has_kept_the_most_makes_room() -> None:
    table, loud, quiet = KeptTable[int](100), (b"loud", ""), (b"quiet", "")
    table.keep(quiet, "first", 1, 30)
    for number in range(1000):
        table.keep(loud, number, number, 10)
    assert table.find_all([quiet]) == [1] and table.find_all([loud]) == list(range(999, 992, -1))
    table.keep(quiet, "first", 2, 50)
    assert table.find_all([loud, quiet]) == [999, 998, 997, 996, 995, 2]
    table.keep(loud, "too large", 0, 101)
    table.forget([loud, quiet], "first")
    assert table.find([loud, quiet], "first") is None and table.find([quiet], 999) is None
    assert table.find([quiet, loud], 999) == 999 and table.find([loud], "too large") is None
    table.forget([loud], 999)
    assert table.find_all([loud]) == [998, 997, 996, 995]


async def test_of_long_ids_and_arguments_no_more_is_kept_than_there_is_room_for(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(MAX_KEPT_BYTES=2_000_000)
    call = {
        "type": "function_call",
        "call_id": "c" * 256,
        "name": "n" * 256,
        "arguments": json.dumps({"a": "x" * 9999}),
    }
    async with openai.AsyncOpenAI(api_key=simulator.token("hello"), base_url=f"{proxy}/v1", max_retries=0) as client:
        item: Any = [call, {"type": "function_call_output", "call_id": "c" * 256, "output": "hi"}]
        ids = [(await client.responses.create(model="kimi", input=item * 50)).id for _ in range(4)]
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[0])
        assert (await client.responses.retrieve(ids[3])).id == ids[3]


async def test_keys_that_share_an_account_do_not_share_files_and_kept_answers(
    simulator: Simulator, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(refresh_token=simulator.token("read"), api_keys="anna:key-1,ben:key-2")
    anna, ben = (openai.AsyncOpenAI(api_key=key, base_url=f"{proxy}/v1", max_retries=0) for key in ("key-1", "key-2"))
    async with anna, ben:
        file = await anna.files.create(file=("a.txt", b"hello"), purpose="user_data")
        asked: Any = [{"role": "user", "content": [{"type": "input_file", "file_id": file.id}]}]
        answer = await anna.responses.create(model="kimi", input=asked)
        assert [one.id async for one in anna.files.list()] == [file.id]
        assert [one.id async for one in ben.files.list()] == []
        again: Any = {"model": "kimi", "input": "And?", "previous_response_id": answer.id}
        item: Any = [{"type": "item_reference", "id": answer.output[0].id}]
        for refused in (
            ben.files.retrieve(file.id),
            ben.files.delete(file.id),
            ben.responses.create(model="kimi", input=asked),
            ben.responses.retrieve(answer.id),
            ben.responses.delete(answer.id),
            ben.responses.create(**again),
            ben.responses.create(model="kimi", input=item),
        ):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                await refused
        assert "hello" in (await anna.responses.create(**again)).output_text


async def test_kept_answers_push_no_ones_files_out(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy()
    owner = openai.AsyncOpenAI(api_key=simulator.token("read"), base_url=f"{proxy}/v1", max_retries=0)
    other = openai.AsyncOpenAI(api_key=simulator.token("read"), base_url=f"{proxy}/v1", max_retries=0)
    async with owner, other:
        file = await owner.files.create(file=("a.txt", b"hello"), purpose="user_data")
        part: Any = {"type": "input_file", "filename": "b.txt", "file_data": "data:text/plain;base64,SGkK"}
        for _ in range(5):
            await other.responses.create(model="kimi", input=[{"role": "user", "content": [part] * 20}])
        assert [one.id async for one in other.files.list()] == []
        asked: Any = [{"role": "user", "content": [{"type": "input_file", "file_id": file.id}]}]
        answer = await owner.responses.create(model="kimi", input=asked)
        assert "a.txt (text/plain, 5 bytes): hello" in answer.output_text
        await owner.files.delete(file.id)
        again = await owner.responses.create(model="kimi", input="And?", previous_response_id=answer.id)
        assert "a.txt (text/plain, 5 bytes): hello" in again.output_text
        with pytest.raises(openai.NotFoundError):
            await owner.responses.create(model="kimi", input=asked)


async def test_files_of_an_answer_are_not_known_in_another_protocol(
    simulator: Simulator, start_proxy: StartProxy, protocol: str
) -> None:
    if protocol == "connect":
        return
    proxy = await start_proxy(protocol="auto")
    async with openai.AsyncOpenAI(api_key=simulator.token("read"), base_url=f"{proxy}/v1", max_retries=0) as client:
        part: Any = {"type": "input_file", "filename": "b.txt", "file_data": "data:text/plain;base64,SGkK"}
        first = await client.responses.create(model="kimi", input=[{"role": "user", "content": [part]}])
        simulator.retired = "404"
        await client.responses.create(model="kimi", input="hi")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="kimi", input="And?", previous_response_id=first.id)
        assert caught.value.code == "previous_response_not_found"


# Conversations that a process which died left open.


def leave_orphans(simulator: Simulator, directory: Path, token: str, protocol: str, count: int) -> None:
    """Conversations at the service, and the file of the process that opened them."""
    ids = [f"orphan-{number}-{hashlib.sha256(token.encode()).hexdigest()[:8]}" for number in range(count)]
    simulator.account(token).conversations |= {one: Conversation() for one in ids}
    place = directory / "conversations-127.0.0.1"
    place.mkdir(exist_ok=True, parents=True)
    known = (protocol, hashlib.sha256(token.encode()).hexdigest())
    lines = [json.dumps([one, *known]) for one in ids]
    (place / f"{len(list(place.iterdir()))}-died").write_text("\n".join(lines))


def files_in(directory: Path) -> list[Path]:
    return list(directory.glob("conversations-*/*"))


def left_in(directory: Path) -> int:
    """How many conversations are noted as open."""
    lines = [json.loads(line) for path in files_in(directory) for line in path.read_text().split("\n") if line]
    return sum(map(bool, {one: known for one, *known in lines}.values()))


async def wait_until_left_in(directory: Path, count: int) -> None:
    """Return once so many conversations are noted as open."""
    async with asyncio.timeout(5):
        while left_in(directory) != count:
            await asyncio.sleep(0.01)


def orphans_left(simulator: Simulator, token: str) -> int:
    return sum(not one.removed for one in simulator.account(token).conversations.values())


async def test_what_a_dead_process_left_of_a_held_account_is_removed_at_the_start(
    simulator: Simulator, start_proxy: StartProxy, protocol: str, tmp_path: Path, log_lines: LogRecorder
) -> None:
    token = simulator.token("hello")
    leave_orphans(simulator, tmp_path, token, protocol, 3)
    leave_orphans(simulator, tmp_path, token, protocol, 2)  # of the same ids
    await start_proxy(state_dir=str(tmp_path), refresh_token=token)
    await simulator.settle(token)
    await log_lines.wait_for("removed 3 of 3 conversations")
    await start_proxy.close()
    assert files_in(tmp_path) == []
    assert token not in log_lines.text


async def test_the_tokens_on_disk_remove_what_was_left_and_stay_good_where_they_rotate(
    simulator: Simulator, start_proxy: StartProxy, protocol: str, tmp_path: Path
) -> None:
    token = simulator.token("hello", "rotate", "opaque")
    account = simulator.account(token)
    proxy = await start_proxy(state_dir=str(tmp_path), TOKEN_SECONDS=1e-6)
    assert (await ask(proxy, token))[0] == 200
    await start_proxy.close()
    leave_orphans(simulator, tmp_path, token, protocol, 2)
    refreshes = account.count("refresh")
    again = await start_proxy(state_dir=str(tmp_path), TOKEN_SECONDS=1e-6)
    await simulator.settle(token)
    assert account.count("refresh") > refreshes  # by a rotated token alone: the client's own is dead
    for _ in range(2):
        assert (await ask(again, token))[0] == 200
    await start_proxy.close()
    assert (await ask(await start_proxy(state_dir=str(tmp_path)), token))[0] == 200
    assert len(list((tmp_path / "tokens").glob("*.json"))) == 1


@pytest.mark.parametrize("fault", ["full", "unreadable"])
async def test_a_rotating_account_lives_on_while_its_state_cannot_be_written(
    simulator: Simulator,
    start_proxy: StartProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path), TOKEN_SECONDS=1e-6)
    token = simulator.token("hello", "rotate", "opaque")
    assert (await ask(proxy, token))[0] == 200
    await simulator.settle(token)  # the removal refreshes too
    (path,) = (tmp_path / "tokens").glob("*.json")
    before = path.read_bytes()
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    for _ in range(2):
        assert (await ask(proxy, token))[0] == 200
    await simulator.settle(token)
    assert path.read_bytes() == before
    if fault == "unreadable":
        path.write_bytes(b"\x00")
    monkeypatch.setattr(os, "fsync", fsync)
    await start_proxy.close()  # which writes what could not be written
    again = await start_proxy(state_dir=str(tmp_path), TOKEN_SECONDS=1e-6)
    assert (await ask(again, token))[0] == 200


@pytest.mark.parametrize("bad", ["x\r\nX-Evil: 1", "\u00e9"])
async def test_a_stored_token_that_no_header_may_hold_is_never_used(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path, log_lines: LogRecorder, bad: str
) -> None:
    token = simulator.token("hello", "opaque")
    proxy = await start_proxy(state_dir=str(tmp_path))
    assert (await ask(proxy, token))[0] == 200
    await start_proxy.close()
    (path,) = (tmp_path / "tokens").glob("*.json")
    for name in ("access_token", "refresh_token"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: bad}))
        assert (await ask(await start_proxy(state_dir=str(tmp_path)), token))[0] == 200
        await start_proxy.close()
    assert log_lines.text.count("set aside") == 2


async def test_a_token_that_kimi_never_took_leaves_no_file(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    assert (await ask(proxy, simulator.token("hello", "unauthorized-always=refresh")))[0] == 401
    assert list((tmp_path / "tokens").glob("*.json")) == []


async def test_a_token_that_is_dead_on_disk_does_not_keep_its_client_out(
    simulator: Simulator, start_proxy: StartProxy, protocol: str, tmp_path: Path, log_lines: LogRecorder
) -> None:
    token = simulator.token("hello", "opaque")
    proxy = await start_proxy(state_dir=str(tmp_path))
    assert (await ask(proxy, token))[0] == 200
    await start_proxy.close()
    (kept,) = (tmp_path / "tokens").glob("*.json")
    kept.write_text(
        json.dumps(
            json.loads(kept.read_text()) | {"refresh_token": "dead", "previous_refresh_token": "dead", "received": 0.0}
        )
    )
    leave_orphans(simulator, tmp_path, token, protocol, 9)
    again = await start_proxy(state_dir=str(tmp_path))
    await log_lines.wait_for("removed 0 of 9 conversations")
    assert log_lines.text.count("was not removed") == 3
    assert (await ask(again, token))[0] == 200  # and now that the client has brought a good one
    await simulator.settle(token)


async def test_without_a_token_they_wait_for_the_account_to_call(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, protocol: str, tmp_path: Path
) -> None:
    token, other = simulator.token("hello"), simulator.token("hello")
    leave_orphans(simulator, tmp_path, token, protocol, 3)
    proxy = await start_proxy(state_dir=str(tmp_path))
    assert (await ask(proxy, other))[0] == 200
    await wait_until_left_in(tmp_path, 3)  # not the other's own, which was answered
    assert orphans_left(simulator, token) == 3
    async with http.get(f"{proxy}/metrics") as response:
        assert "kimi_proxy_orphans 3" in await response.text()
    answers = await asyncio.gather(*(ask(proxy, f"{other},{token}") for _ in range(3)))
    assert [status for status, _, _ in answers] == [200] * 3
    await simulator.settle(token)
    await start_proxy.close()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("fault", ["status=remove:500", "close=remove", "silent=remove"])
async def test_what_cannot_be_removed_is_left_to_the_next_start_and_the_next_call(
    simulator: Simulator,
    start_proxy: StartProxy,
    protocol: str,
    tmp_path: Path,
    log_lines: LogRecorder,
    fault: str,
) -> None:
    token = simulator.token("hello", fault)
    faults = simulator.account(token).order.faults
    settings: dict[str, Any] = {"state_dir": str(tmp_path), "call_seconds": 0.5}
    leave_orphans(simulator, tmp_path, token, protocol, 1)
    proxy = await start_proxy(**settings, refresh_token=token)
    assert (await ask(proxy, token))[0] == 200
    await start_proxy.close()  # by now both removals failed
    assert (orphans_left(simulator, token), left_in(tmp_path)) == (2, 2)
    again = await start_proxy(**settings)
    await log_lines.wait_for("removed 0 of 2")
    assert (await ask(again, token))[0] == 200
    async with asyncio.timeout(5):
        while log_lines.text.count("was not removed") < 7:
            await asyncio.sleep(0.01)
    faults.clear()
    assert (await ask(again, token))[0] == 200
    await simulator.settle(token)
    await start_proxy.close()
    assert files_in(tmp_path) == []


async def test_one_that_the_service_does_not_know_any_more_counts_as_removed(
    simulator: Simulator, start_proxy: StartProxy, protocol: str, tmp_path: Path, log_lines: LogRecorder
) -> None:
    token = simulator.token("hello", "status=remove:404")
    leave_orphans(simulator, tmp_path, token, protocol, 2)
    await start_proxy(state_dir=str(tmp_path), refresh_token=token)
    await log_lines.wait_for("removed 2 of 2")
    await start_proxy.close()
    assert files_in(tmp_path) == []
    assert "was not removed" not in log_lines.text


async def test_a_conversation_is_noted_while_it_is_open_and_of_no_other_process(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, protocol: str, tmp_path: Path
) -> None:
    token = simulator.token("long", "pace=0.02", "chunks=25")
    proxy = await start_proxy(state_dir=str(tmp_path))
    body = chat_body("sesame", stream=True)
    async with http.post(proxy + CHAT, json=body, headers=bearer(token)) as response:
        await response.content.readuntil(b"\n\n")
        (path,) = files_in(tmp_path)
        text = path.read_text()
        conversation_id, *opened = json.loads(text)
        assert {conversation_id} == set(simulator.account(token).conversations)
        assert opened[:2] == [protocol, hashlib.sha256(token.encode()).hexdigest()]
        assert token not in text and "sesame" not in text
        await start_proxy(state_dir=str(tmp_path), refresh_token=token)  # another process, to the file
        assert (await response.text()).endswith("data: [DONE]\n\n")
    account = await simulator.settle(token)
    assert account.count("remove") == 1
    await start_proxy.close()
    assert files_in(tmp_path) == []


async def test_a_conversation_that_its_client_keeps_is_noted_no_longer(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    token = simulator.token("hello")
    proxy = await start_proxy(state_dir=str(tmp_path))
    status, opened, _ = await ask(proxy, token, conversation_id="new")
    assert status == 200 and left_in(tmp_path) == 0
    await start_proxy.close()
    again = await start_proxy(state_dir=str(tmp_path))
    assert (await ask(again, token, conversation_id=opened["id"]))[0] == 200
    await start_proxy.close()
    assert files_in(tmp_path) == [] and simulator.account(token).count("remove") == 0


async def test_a_client_that_leaves_early_leaves_nothing_noted(
    simulator: Simulator, start_proxy: StartProxy, protocol: str, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    for fault in ("slow=open:0.2" if protocol == "classic" else "stall=1", "slow=ask:0.2", "stall=0", "stall=6"):
        token = simulator.token("long", fault)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.15):
                await ask(proxy, token, stream=True)
        await simulator.settle(token)
    await start_proxy.close()
    assert files_in(tmp_path) == []


async def test_where_no_state_is_kept_or_none_can_be_nothing_is_noted_and_there_is_one_warning(
    simulator: Simulator,
    start_proxy: StartProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: LogRecorder,
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    proxy = await start_proxy(state_dir="")
    assert (await ask(proxy, simulator.token("hello")))[0] == 200
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
    blocked = tmp_path / "blocked"
    blocked.write_text("a file in the way")
    proxy = await start_proxy(state_dir=str(blocked))
    for _ in range(2):
        assert (await ask(proxy, simulator.token("hello")))[0] == 200
    await start_proxy.close()
    assert log_lines.text.count("cannot be kept") == 1


# Faults of earlier versions, each of a kind.


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chunk_that_breaks_behind_the_last_frame_stops_no_removal(
    simulator: Simulator, proxy: str, http: aiohttp.ClientSession, protocol: str, stream: bool
) -> None:
    steps = SCRIPTS["hello"]
    frames = render_stream(steps, None) if protocol == "classic" else render_connect(steps, "c", None)
    token = simulator.token("hello", "pace=0.01", f"cut-chunk={len(frames)}")
    async with http.post(proxy + CHAT, json=chat_body(stream=stream), headers=bearer(token)) as response:
        text = await response.text()
    assert response.status == 200 and ("[DONE]" in text) is stream
    await simulator.settle(token)
    assert (await ask(proxy, simulator.token("hello")))[0] == 200


async def test_a_client_that_leaves_when_it_knows_the_end_has_its_conversation_kept(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    token = simulator.token("echo", "linger")
    for _ in range(5):
        body = chat_body("hi", stream=True, conversation_id="new")
        async with http.post(proxy + CHAT, json=body, headers=bearer(token)) as response:
            async for line in response.content:
                if b'"finish_reason":"stop"' in line:
                    break
            response.close()
        conversation_id = json.loads(line.removeprefix(b"data: "))["id"]
        status, answer, _ = await ask(proxy, token, conversation_id=conversation_id)
        assert (status, answer["id"]) == (200, conversation_id)
    assert simulator.account(token).count("remove") == 0


@contextmanager
def locked_elsewhere(directory: Path, token: str) -> Iterator[None]:
    """Another process holds the state of the account."""
    path = directory / "tokens" / f"{hashlib.sha256(token.encode()).hexdigest()}.lock"
    with StateFiles(directory, Metrics()).take_lock(path):
        yield


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_conversation_that_cannot_be_kept_is_removed(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, tmp_path: Path, leaves: bool
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path), LOCK_SECONDS=0.5)
    token = simulator.token("long", "pace=0.01", "chunks=9")
    assert (await ask(proxy, token))[0] == 200
    await simulator.settle(token)
    body = chat_body(stream=True, conversation_id="new")
    with locked_elsewhere(tmp_path, token):
        async with http.post(proxy + CHAT, json=body, headers=bearer(token)) as response:
            await response.content.readuntil(b"\n\n")
            await wait_until_left_in(tmp_path, 0)  # the answer is over, to be kept
            if leaves:
                response.close()
            else:
                assert "state_locked" in await response.text()
        await simulator.settle(token)
    await wait_until_left_in(tmp_path, 0)


async def test_a_kept_conversation_that_was_dropped_while_its_question_waited_is_a_404(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    token = simulator.token("quiet", "one-at-a-time")
    account = simulator.account(token)
    _, opened, _ = await ask(proxy, token, conversation_id="new")
    running = [asyncio.create_task(ask(proxy, token)) for _ in range(2)]
    await simulator.wait_until(lambda: account.count("ask") == 3)  # the second is refused: they run one by one
    waiting = asyncio.create_task(ask(proxy, token, conversation_id=opened["id"]))
    await asyncio.sleep(0.1)
    (path,) = (tmp_path / "tokens").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kept": {}}))  # as another process does
    status, answer, _ = await waiting
    assert (status, answer["error"]["code"]) == (404, "conversation_not_found")
    assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]


@pytest.mark.parametrize("content", ["", '{"refresh_token": 5}', None])
async def test_an_account_whose_state_cannot_be_read_hides_no_other_ones_conversation(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path, content: str | None
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path))
    broken, keeper = simulator.token("hello"), simulator.token("hello")
    assert (await ask(proxy, broken))[0] == 200
    _, opened, _ = await ask(proxy, keeper, conversation_id="new")
    path = tmp_path / "tokens" / f"{hashlib.sha256(broken.encode()).hexdigest()}.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    status, answer, _ = await ask(proxy, f"{broken},{keeper}", conversation_id=opened["id"])
    assert (status, answer["id"]) == (200, opened["id"])


async def test_an_account_is_not_forgotten_while_the_body_of_its_request_is_on_its_way(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(MAX_ACCOUNTS=1)
    token = simulator.token("hello")
    begun = asyncio.Event()
    others_came = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(chat_body()).encode()[:-1]
        begun.set()
        await others_came.wait()
        yield b"}"

    async def ask_slowly() -> int:
        async with http.post(proxy + CHAT, data=body(), headers=bearer(token)) as response:
            return response.status

    slow = asyncio.create_task(ask_slowly())
    await begun.wait()
    assert (await ask(proxy, simulator.token("hello")))[0] == 200
    assert (await ask(proxy, token))[0] == 200
    others_came.set()
    assert await slow == 200
    assert simulator.account(token).count("refresh") == 1  # by one account, though there is room for one alone


async def test_a_full_queue_is_no_refusal_of_the_account(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(MAX_ACCOUNT_REQUESTS=1)
    full, other = simulator.token("quiet"), simulator.token("hello")
    running = asyncio.create_task(ask(proxy, full))
    await simulator.wait_until(lambda: simulator.account(full).streams_open == 1)
    assert (await ask(proxy, full))[1]["error"]["code"] == "queue_full"
    assert (await running)[0] == 200
    for _ in range(2):
        assert (await ask(proxy, f"{full},{other}"))[0] == 200
    assert asks(simulator, full, other) == [2, 1]


async def test_a_keep_alive_is_never_written_behind_the_end(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(KEEP_ALIVE_SECONDS=0.001)
    tokens = [simulator.token("hello", f"pace=0.00{number}") for number in range(1, 10)]
    answers = await asyncio.gather(*(ask_for_text(proxy, token) for token in tokens * 5))
    assert all(text.rstrip().endswith("data: [DONE]") for text in answers)
    assert "still waiting" in "".join(answers)
    await asyncio.gather(*map(simulator.settle, tokens))
    assert "failed" not in log_lines.text


async def ask_for_text(url: str, token: str) -> str:
    """The bytes of a streamed answer."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + CHAT, json=chat_body(stream=True), headers=bearer(token)) as response,
    ):
        return await response.text()


async def test_a_body_counts_no_longer_than_it_is_in_memory(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession
) -> None:
    proxy = await start_proxy(max_inline_mb=1, MAX_BODIES_MB=1)
    picture = base64.b64encode(bytes(1_000_000)).decode()
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "stream": True}).encode()
    token = simulator.token("long", "pace=0.05")
    async with http.post(proxy + CHAT, data=io.BytesIO(body), headers=bearer(token)) as response:
        assert b"data: " in await response.content.readline()
        for _ in range(2):
            headers = bearer(simulator.token("hello"))
            async with http.post(proxy + CHAT, data=io.BytesIO(body), headers=headers) as other:
                assert other.status == 200 and b"[DONE]" in await other.read()
        response.close()
    await simulator.settle(token)
