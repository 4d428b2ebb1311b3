"""Section 14, and the way of a file from the front door to the service: what arrives, what is refused, what is left."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from conftest import LogRecorder, StartProxy, bearer, wait_until_nothing_is_spooled
from kimi_simulator import Account, File, Simulator, digest_content, make_content

import kimi_proxy
from kimi_proxy import AddressGuard, Metrics, OpenFile, ProxyError, check_file_url, classify_address, name_file

CHAT = "/v1/chat/completions"
TEXT = "data:text/plain;base64,"
WEBP = "data:image/webp;base64,"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


both_protocols = pytest.mark.parametrize("protocol", ["classic", "connect"])


# Verdict → addresses: of each range its ends, and under `public` their neighbours outside.
ADDRESSES = {
    "this-network": "0.0.0.0 0.255.255.255",
    "public": """
        1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 168.63.129.15
        168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0
        192.0.1.255 192.0.3.0 192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
        198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255 ::ffff:8.8.8.8 64:ff9b::8.8.8.8
        2000:: 2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:200:: 2001:db7:ffff:ffff:ffff:ffff:ffff:ffff
        2001:db9:: 2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2003:: 2606:4700::1111
        3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff 3fff:1000:: 3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    """,
    "private": "10.0.0.0 10.255.255.255 172.16.0.0 172.31.255.255 192.168.0.0 192.168.255.255",
    "shared": "100.64.0.0 100.100.100.200 100.127.255.255",
    "loopback": "127.0.0.0 127.255.255.255 ::ffff:127.0.0.1 64:ff9b::127.0.0.1",
    "cloud-host": "168.63.129.16",
    "link-local": "169.254.0.0 169.254.169.254 169.254.255.255 64:ff9b::169.254.169.254",
    "protocol": "192.0.0.0 192.0.0.8 192.0.0.255 2001:: 2001:0:7f00:1:: 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff",
    "documentation": """
        192.0.2.0 192.0.2.255 198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255 2001:db8::
        2001:db8:ffff:ffff:ffff:ffff:ffff:ffff 3fff:: 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff
    """,
    "relay": "192.88.99.0 192.88.99.255",
    "benchmark": "198.18.0.0 198.19.255.255",
    "multicast": "224.0.0.0 239.255.255.255",
    "reserved": "240.0.0.0 255.255.255.255",
    "not-unicast": """
        :: ::1 ::7f00:1 ::fffe:ffff:ffff ::ffff:0:127.0.0.1 64:ff9b::1:0:0 64:ff9b:1::1 100::1
        1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 4000:: 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1
    """,
    "6to4": "2002:: 2002:7f00:1:: 2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "scoped": "fe80::1%lo 2606:4700::1111%1",
    "unreadable": "localhost 127.1 0177.0.0.1 2130706433 0x7f000001 8.8.8.8.",
}


def test_each_address_has_its_verdict() -> None:
    found = {address: classify_address(address) for text in ADDRESSES.values() for address in text.split()}
    assert found == {address: verdict for verdict, text in ADDRESSES.items() for address in text.split()}
    assert classify_address("") == "unreadable"


GOOD_URLS = """
http://example.com
https://example.com/a b/文.pdf?x=1#y
HTTPS://EXAMPLE.com:8443/
http://example.com:9000/bucket
https://例子.中国/文件.pdf
http://[2606:4700::1111]/
http://example.com/a@b:c
"""
BAD_URLS = """
x
http:127.0.0.1/
http://
http://?x
http://#@a
data:text/plain,hi
javascript:alert(1)
http://:x@example.com/
http://127.0.0.1\\@example.com/
http://exa\tmple.com/
http://example.com/\rx
http://example.com/\0x
http://example.com:25/
http://example.com:445/
http://example.com:6667/
http://example.com:-1/
http://[::1/
http://\ud800.com/
http://ⓛ-[][@#
"""
LONG_URLS = ["http://example.com/" + "x" * 9000, "http://" + "ﷺ" * 256 + "/", "http://" + "a." * 200 + "com/"]


def test_good_urls_pass() -> None:
    assert {check_file_url(f" {text}\n").scheme for text in GOOD_URLS.split("\n")[1:-1]} == {"http", "https"}


@pytest.mark.parametrize("text", ["", *BAD_URLS.split("\n")[1:-1], *LONG_URLS])
def test_bad_urls_are_refused_before_any_name_is_looked_up(text: str) -> None:
    with pytest.raises(ProxyError) as caught:
        check_file_url(text)
    assert caught.value.code == "file_url_invalid"


NAMES: list[tuple[list[str], str, str, tuple[str, str]]] = [
    (["test.pdf"], "application/pdf", "file", ("test.pdf", "application/pdf")),
    (["report"], "application/pdf; charset=x", "file", ("report.pdf", "application/pdf")),
    (["", "x.PNG"], "", "image", ("x.PNG", "image/png")),
    (["download", "报告.docx"], "application/octet-stream", "file", ("报告.docx", DOCX)),
    (["", ""], "image/jpeg", "image", ("image.jpg", "image/jpeg")),
    ([""], "", "file", ("file", "application/octet-stream")),
    (["../../etc/passwd"], "", "file", ("passwd", "application/octet-stream")),
    (["C:\\Users\\a\\b.txt"], "", "file", ("b.txt", "text/plain")),
    (['a"b\r\nc<.txt'], "", "file", ("abc.txt", "text/plain")),
    (["x.tar.zip"], "nonsense", "file", ("x.tar.zip", "application/zip")),
    (["x.pdf"], "text/html", "file", ("x.pdf", "text/html")),
    (["y" * 300 + ".pdf"], "", "file", ("y" * 100 + ".pdf", "application/pdf")),
    (["..."], "text/markdown", "file", ("file.md", "text/markdown")),
    (["a.unknown"], "", "file", ("a.unknown", "application/octet-stream")),
    (["x.txt"], "text/plain\r\nX: y", "file", ("x.txt", "text/plain")),
]


@pytest.mark.parametrize(("names", "content_type", "kind", "expected"), NAMES)
def test_a_file_is_named_so_that_its_type_shows(
    names: list[str], content_type: str, kind: str, expected: tuple[str, str]
) -> None:
    assert name_file(names, content_type, kind) == expected


def info(address: str, port: int = 80) -> tuple[Any, ...]:
    """What a socket factory is given."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    place: tuple[Any, ...] = (address, port, 0, 0) if ":" in address else (address, port)
    return family, socket.SOCK_STREAM, 6, "", place


def own_address() -> str:
    """The address by which this machine would reach the public network; loopback where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "::1", "fe80::1%lo", "localhost", own_address()])
def test_the_guard_makes_no_socket_for_what_is_denied(address: str, log_lines: LogRecorder) -> None:
    metrics = Metrics()
    with pytest.raises(PermissionError):
        AddressGuard(metrics, allow_private=False).make_socket(info(address))
    assert sum(metrics.counts.values()) == 1
    assert "denied" in log_lines.text and address not in log_lines.text


def test_the_guard_denies_this_machines_own_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi_proxy, "ADDRESS_RULES", [(ipaddress.ip_network("0.0.0.0/0"), "public")])
    with pytest.raises(PermissionError):
        AddressGuard(Metrics(), allow_private=False).make_socket(info("127.0.0.1"))


def test_the_guard_makes_a_socket_for_a_public_address() -> None:
    with AddressGuard(Metrics(), allow_private=False).make_socket(info("93.184.215.14")) as made:
        assert made.family == socket.AF_INET
    with AddressGuard(Metrics(), allow_private=True).make_socket(info("127.0.0.1")) as made:
        assert made.type == socket.SOCK_STREAM


# Through the front door.


def file_part(url: str) -> dict[str, Any]:
    return {"type": "file", "file_url": {"url": url}}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(content: bytes, head: str = "data:application/pdf;base64,") -> str:
    return head + base64.b64encode(content).decode()


def openai_part(data: str, name: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data, "filename": name}}


async def ask(url: str, token: str, *parts: Any, text: str = "文档里说了什么?", **fields: Any) -> tuple[int, Any]:
    """A whole answer about files: status and JSON."""
    content = [*parts, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], **fields}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url + CHAT, data=io.BytesIO(json.dumps(body).encode()), headers=bearer(token)) as response,
    ):
        return response.status, await response.json()


def refs_of(account: Account, number: int = -1) -> list[str]:
    """The ids that a question referred to, in either protocol."""
    asked = account.asked[number]
    if "refs" in asked:
        return list(asked["refs"])
    return [block["file"]["id"] for block in asked["message"]["blocks"][1:]]


def files_of(account: Account, number: int = -1) -> list[File]:
    """The files that a question referred to, in its order."""
    return [account.files[file_id] for file_id in refs_of(account, number)]


@pytest.fixture
async def open_proxy(start_proxy: StartProxy, nothing_is_left: None, tmp_path: Path) -> AsyncIterator[str]:
    """A proxy that may fetch from this machine, with short limits; its spool directory is empty in the end."""
    yield await start_proxy(
        allow_private_urls=True,
        spool_dir=str(tmp_path),
        FILE_SECONDS=1.0,
        call_seconds=2.0,
        max_file_mb=2,
        max_inline_mb=3,
    )
    await wait_until_nothing_is_spooled(tmp_path)


ORIGINS = {
    "plain": ("100000/test.pdf", "test.pdf", "application/pdf"),
    "one byte": ("1/x.txt", "x.txt", "text/plain"),
    "larger than every buffer": ("2000000/x.bin", "x.bin", "application/octet-stream"),
    "no length": ("100000+no-length/test.pdf", "test.pdf", "application/pdf"),
    "gzip": ("100000+gzip/test.pdf", "test.pdf", "application/pdf"),
    "deflate": ("100000+deflate/test.pdf", "test.pdf", "application/pdf"),
    "five redirects": ("100000+redirect=5/test.pdf", "test.pdf", "application/pdf"),
    "typed": ("100+type=image.png/x", "x.png", "image/png"),
    "query": ("100/a%20b%E6%96%87.pdf?x=1&y=.exe", "a b文.pdf", "application/pdf"),
    "disposition": ("100+disposition=%25E6%2596%2587.docx/download", "文.docx", DOCX),
    "slash at the end": ("100/dir/", "file", "application/octet-stream"),
}


@both_protocols
@pytest.mark.parametrize("name", ORIGINS)
async def test_a_file_by_url_arrives_byte_for_byte(simulator: Simulator, open_proxy: str, name: str) -> None:
    path, file_name, content_type = ORIGINS[name]
    token = simulator.token("read")
    status, answer = await ask(open_proxy, token, file_part(f"{simulator.origin_url}/{path}"), use_search=False)
    assert status == 200, answer
    (file,) = files_of(await simulator.settle(token))
    size = int(path.partition("/")[0].partition("+")[0])
    assert (file.size, file.sha256) == (size, digest_content(size))
    assert (file.name, file.content_type) == (file_name, content_type)
    assert file_name in answer["choices"][0]["message"]["content"]
    assert simulator.transfers_open == 0


CONTENT = b"".join(make_content(50_000))
ENCODED = base64.b64encode(CONTENT).decode()
INLINE: dict[str, tuple[Any, str, str]] = {
    "data url": (file_part(data_url(CONTENT)), "file.pdf", "application/pdf"),
    "image": (image_part(data_url(CONTENT, "data:image/png;base64,")), "image.png", "image/png"),
    "image as a string": ({"type": "image_url", "image_url": WEBP + ENCODED}, "image.webp", "image/webp"),
    "openai's file": (openai_part(data_url(CONTENT), "年报.pdf"), "年报.pdf", "application/pdf"),
    "bare base64": (openai_part(ENCODED, "a.csv"), "a.csv", "text/csv"),
    "named": (file_part(f"data:text/plain;name=%E6%96%87.md;charset=utf-8;base64,{ENCODED}"), "文.md", "text/plain"),
    "wrapped lines": (file_part(TEXT + base64.encodebytes(CONTENT).decode()), "file.txt", "text/plain"),
    "url alphabet": (file_part(TEXT + ENCODED.translate({43: "-", 47: "_", 61: None})), "file.txt", "text/plain"),
}


@both_protocols
@pytest.mark.parametrize("name", INLINE)
async def test_an_inline_file_arrives_byte_for_byte(simulator: Simulator, open_proxy: str, name: str) -> None:
    part, file_name, content_type = INLINE[name]
    token = simulator.token("hello")
    status, answer = await ask(open_proxy, token, part)
    assert status == 200, answer
    (file,) = files_of(await simulator.settle(token))
    assert (file.size, file.sha256) == (50_000, digest_content(50_000))
    assert (file.name, file.content_type) == (file_name, content_type)


@both_protocols
@pytest.mark.parametrize(
    ("type", "field", "name"), [("file", "file_url", "a.pdf"), ("image_url", "image_url", "a.png")]
)
async def test_the_references_bodies_work_as_they_are(
    simulator: Simulator, open_proxy: str, protocol: str, type: str, field: str, name: str
) -> None:
    token = simulator.token("read")
    part = {"type": type, field: {"url": f"{simulator.origin_url}/3000/{name}"}}
    _, answer = await ask(open_proxy, token, part, use_search=False)
    assert name in answer["choices"][0]["message"]["content"]
    account = await simulator.settle(token)
    steps = [call.step for call in account.calls if call.step not in ("refresh", "models")]
    if protocol == "classic":
        assert steps == ["sign", "store", "register", "parse", "open", "ask", "remove"]
        assert account.calls[1].body == {"action": type.removesuffix("_url"), "name": name}
    else:
        assert steps == ["upload", "progress", "ask", "remove"]


async def test_files_keep_the_order_of_the_messages_and_come_four_at_once(
    simulator: Simulator, open_proxy: str
) -> None:
    token = simulator.token("read")
    parts = [file_part(f"{simulator.origin_url}/{100 + at}+slow={0.05 * (9 - at)}/{at}.pdf") for at in range(9)]
    messages = [{"role": "user", "content": parts[:2]}, {"role": "assistant", "content": "ok"}]
    messages.append({"role": "user", "content": [*parts[2:], {"type": "text", "text": "?"}]})
    assert (await ask(open_proxy, token, messages=messages))[0] == 200
    names = [file.name for file in files_of(await simulator.settle(token))]
    assert names == [f"{at}.pdf" for at in range(9)] and simulator.origins_most == 4


@both_protocols
async def test_a_chats_files_are_uploaded_once_though_they_are_sent_each_turn(
    simulator: Simulator, open_proxy: str
) -> None:
    token = simulator.token("read")
    parts = (file_part(f"{simulator.origin_url}/100/a.pdf"), file_part(data_url(CONTENT)))
    for _ in range(3):
        assert (await ask(open_proxy, token, *parts))[0] == 200
    account = await simulator.settle(token)
    assert len(account.files) == 2 and len(simulator.fetches) == 1
    assert refs_of(account, 0) == refs_of(account, 2)
    other = simulator.token("read")
    assert (await ask(open_proxy, other, *parts))[0] == 200
    assert len(simulator.account(other).files) == 2  # another account has them on its own


async def test_a_file_is_known_again_for_an_hour(
    simulator: Simulator, open_proxy: str, advance: Callable[[float], None]
) -> None:
    token = simulator.token("read")
    part = file_part(f"{simulator.origin_url}/100/a.pdf")
    for seconds, fetches in ((0, 1), (3590, 1), (20, 2)):
        advance(seconds)
        assert (await ask(open_proxy, token, part))[0] == 200
        assert len(simulator.fetches) == fetches


async def test_the_same_file_asked_for_at_once_is_uploaded_once(simulator: Simulator, open_proxy: str) -> None:
    token = simulator.token("read")
    part = file_part(f"{simulator.origin_url}/100000+slow=0.05/a.pdf")
    answers = await asyncio.gather(*(ask(open_proxy, token, part, part) for _ in range(5)))
    assert [status for status, _ in answers] == [200] * 5
    account = await simulator.settle(token)
    assert len(account.files) == 1 and all(len(refs_of(account, number)) == 1 for number in range(5))


async def test_who_waited_for_a_failed_upload_shares_its_failure(simulator: Simulator, open_proxy: str) -> None:
    token = simulator.token("read")
    part = file_part(f"{simulator.origin_url}/100+hang/a.pdf")
    answers = await asyncio.gather(*(ask(open_proxy, token, part) for _ in range(5)))
    assert {answer["error"]["code"] for _, answer in answers} == {"file_silent"}
    assert len(simulator.fetches) == 1


@both_protocols
async def test_who_waited_for_an_upload_that_was_cancelled_does_it_over(simulator: Simulator, open_proxy: str) -> None:
    token = simulator.token("read")
    part = file_part(f"{simulator.origin_url}/100000+slow=0.1/a.pdf")
    first = asyncio.create_task(ask(open_proxy, token, part))
    await simulator.wait_until(lambda: simulator.origins_open == 1)
    second = asyncio.create_task(ask(open_proxy, token, part))
    await simulator.wait_until(lambda: simulator.storage_bytes > 0)
    first.cancel()
    assert (await second)[0] == 200


@both_protocols
async def test_search_is_off_with_files_unless_it_is_asked_for(simulator: Simulator, open_proxy: str) -> None:
    part = file_part(data_url(CONTENT))
    for fields, expected in (({}, False), ({"use_search": True}, True), ({"model": "kimi-search"}, True)):
        token = simulator.token("read")
        assert (await ask(open_proxy, token, part, **fields))[0] == 200
        asked = simulator.account(token).asked[0]
        assert (asked["use_search"] if "refs" in asked else bool(asked["tools"])) is expected


@both_protocols
async def test_a_large_file_flows_it_is_not_held(simulator: Simulator, open_proxy: str) -> None:
    """The origin gives its second half only when the storage has bytes of the first."""
    token = simulator.token("read")
    part = file_part(f"{simulator.origin_url}/2000000+after-storage/a.pdf")
    assert (await ask(open_proxy, token, part))[0] == 200
    assert files_of(simulator.account(token))[0].sha256 == digest_content(2_000_000)


# What clients are told → what an origin does.
ORIGIN_FAULTS = {
    (400, "file_url_invalid", -2003): """
        100+status=404 100+status=403 100+status=500 100+status=206 0 0+no-length 100+redirect=6 100+encoding=compress
        100+encoding=gzip,%20gzip
    """,
    (502, "file_broken", -2003): """
        100+no-http 900000+cut 900000+cut+no-length 900000+close 900000+close+no-length 900000+cut-chunk
        900000+close+gzip 900000+deflate+half+no-length 40+gzip+zeros-behind
    """,
    (504, "file_silent", -2003): "100+hang 900000+stall 900000+stall+no-length 40+gzip+members",
    (413, "file_too_large", -2004): "2097153 2097153+no-length 1+endless 5000000+zeros+gzip",
}


@both_protocols
@pytest.mark.parametrize(
    ("order", "failure"), [(order, failure) for failure, text in ORIGIN_FAULTS.items() for order in text.split()]
)
async def test_what_an_origin_does_wrong_is_told_and_leaves_nothing(
    simulator: Simulator, open_proxy: str, log_lines: LogRecorder, order: str, failure: tuple[int, str, int]
) -> None:
    token = simulator.token("read")
    seen, answer = await ask(open_proxy, token, file_part(f"{simulator.origin_url}/{order}/a.pdf"))
    assert (seen, answer["error"]["code"], answer["code"]) == failure
    assert answer["error"]["param"] == "messages[0].content[0].file_url.url"
    await nothing_was_asked(simulator, token)
    told = json.dumps(answer) + log_lines.text
    assert "a.pdf" not in told and simulator.origin_url not in told
    if "status=" in order:
        assert f"HTTP {order[11:14]}" in answer["error"]["message"]


@pytest.mark.parametrize("order", ["900000+slow=0.1", "900000+slow=0.1+no-length"])
async def test_an_origin_that_never_rests_and_never_ends_meets_the_limit_of_the_whole(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path, order: str
) -> None:
    proxy = await start_proxy(allow_private_urls=True, spool_dir=str(tmp_path), FILE_SECONDS=30.0, TRANSFER_SECONDS=0.5)
    token = simulator.token("read")
    status, answer = await ask(proxy, token, file_part(f"{simulator.origin_url}/{order}/a.pdf"))
    assert (status, answer["error"]["code"], answer["code"]) == (504, "file_silent", -2003)
    await nothing_was_asked(simulator, token)
    await wait_until_nothing_is_spooled(tmp_path)


@pytest.mark.parametrize("sent", [2, 3, 4])
async def test_a_file_keeps_the_promise_of_its_length_or_fails(sent: int) -> None:
    source = asyncio.StreamReader()
    source.feed_data(b"ab" * sent)
    source.feed_eof()
    file = OpenFile("file", "a", "text/plain", 5, partial(source.read, 2))
    with pytest.raises(ProxyError) as caught:
        async for _ in file.read():
            assert file.sent_bytes <= 5
    assert caught.value.code == "file_broken" and file.failure is caught.value


async def nothing_was_asked(simulator: Simulator, token: str) -> None:
    """No conversation was opened, and no transfer goes on."""
    simulator.stalled.set()
    await simulator.wait_until(lambda: simulator.transfers_open == 0)
    account = simulator.account(token)
    assert not account.conversations and account.count("open") == account.count("ask") == 0


# Protocols, and what clients are told → what the service does wrong.
UPLOAD_FAULTS = {
    ("classic connect", 502, "storage_failed"): "storage-early storage-reset",
    ("classic connect", 504, "storage_silent"): "storage-stall",
    ("classic", 502, "storage_failed"): "storage-status=403 storage-status=503 storage-status=307",
    ("classic", 502, "service_failed"): "status=sign:500 status=register:500 status=parse:500 parse-fail",
    ("classic", 504, "service_silent"): "silent=sign silent=parse",
    ("connect", 502, "service_failed"): "status=upload:500 wrong-type=upload status=progress:500",
    ("connect", 504, "service_silent"): "parse-slow=999",
    ("connect", 429, "rate_limited"): "status=upload:429",
    ("connect", 401, "token_dead"): "unauthorized-always=upload",
    ("connect", 400, "file_unreadable"): "parse-fail",
}
# Where the file comes from matters to its own way alone.
UPLOADS = [
    (protocol, fault, source, (status, code))
    for (protocols, status, code), faults in UPLOAD_FAULTS.items()
    for protocol in protocols.split()
    for fault in faults.split()
    for source in (("url", "spooled", "inline") if fault.startswith("storage") else ("url",))
]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(("protocol", "fault", "source", "failure"), UPLOADS)
async def test_what_the_service_does_wrong_with_a_file_is_told_and_leaves_nothing(
    simulator: Simulator,
    start_proxy: StartProxy,
    log_lines: LogRecorder,
    tmp_path: Path,
    fault: str,
    source: str,
    failure: tuple[int, str],
) -> None:
    proxy = await start_proxy(
        allow_private_urls=True,
        spool_dir=str(tmp_path),
        FILE_SECONDS=1.0,
        call_seconds=1.0,
        PARSE_SECONDS=1.0,
        TRANSFER_SECONDS=1.5 if fault == "storage-stall" else 120.0,
        max_inline_mb=9,
    )
    size = 6_000_000 if fault.startswith("storage") else 60_000  # more than the buffers of a connection hold
    content = b"".join(make_content(size))
    order = f"{size}+no-length" if source == "spooled" else f"{size}"
    part = file_part(data_url(content) if source == "inline" else f"{simulator.origin_url}/{order}/a.pdf")
    token = simulator.token("read", fault)
    status, answer = await ask(proxy, token, part)
    assert (status, answer["error"]["code"]) == failure, answer
    await nothing_was_asked(simulator, token)
    await wait_until_nothing_is_spooled(tmp_path)
    assert "sign=" not in json.dumps(answer) + log_lines.text
    assert simulator.account(token).count("store") <= 1  # what may be there by now is not sent again
    assert (await ask(proxy, simulator.token("read"), part))[0] == 200


HELPED = [
    *[("classic", fault) for fault in ("no-pictures", "register-slow=2", "parse-stream")],
    *[("classic", fault) for fault in ("unauthorized-once=sign", "unauthorized-once=register")],
    *[("connect", fault) for fault in ("unauthorized-once=upload", "unauthorized-once=progress", "parse-slow=2")],
]


@pytest.mark.parametrize(("protocol", "fault"), HELPED)
async def test_what_can_be_helped_is_not_noticed(simulator: Simulator, open_proxy: str, fault: str) -> None:
    token = simulator.token("read", fault)
    parts = image_part(f"{simulator.origin_url}/70000/a.png"), image_part(data_url(CONTENT, "data:image/png;base64,"))
    status, answer = await ask(open_proxy, token, *parts)
    assert status == 200, answer
    assert [file.size for file in files_of(simulator.account(token))] == [70_000, 50_000]


async def test_a_failed_file_cancels_the_others_of_its_request(simulator: Simulator, open_proxy: str) -> None:
    token = simulator.token("read")
    parts = [file_part(f"{simulator.origin_url}/900000+slow=0.4/{at}.pdf") for at in range(3)]
    status, answer = await ask(open_proxy, token, *parts, file_part(f"{simulator.origin_url}/9+status=404/x.pdf"))
    assert (status, answer["error"]["param"]) == (400, "messages[0].content[3].file_url.url")
    await nothing_was_asked(simulator, token)


# What an origin and the service do when the client leaves; it leaves once the step was called that is named.
LEAVING: list[tuple[str, str, list[str], str]] = [
    ("classic", "900000+hang", [], "origin"),
    ("classic", "900000+stall", [], "origin"),
    ("classic", "900000+stall+no-length", [], "origin"),
    ("classic", "1900000", ["storage-stall"], "storage"),
    ("connect", "1900000+no-length", ["storage-stall"], "storage"),
    ("classic", "100", ["silent=sign"], "sign"),
    ("classic", "100", ["silent=register"], "register"),
    ("classic", "100", ["silent=parse"], "parse"),
    ("connect", "100", ["silent=progress"], "progress"),
]


@pytest.mark.parametrize(("protocol", "order", "faults", "step"), LEAVING)
async def test_a_client_that_leaves_takes_its_transfers_with_it(
    simulator: Simulator, open_proxy: str, order: str, faults: list[str], step: str
) -> None:
    token = simulator.token("read", *faults)
    asking = asyncio.create_task(ask(open_proxy, token, file_part(f"{simulator.origin_url}/{order}/a.pdf")))

    def is_there() -> bool:
        if step == "origin":
            return bool(simulator.fetches)
        return simulator.storage_bytes > 0 if step == "storage" else simulator.account(token).count(step) > 0

    await simulator.wait_until(is_there)
    await asyncio.sleep(0.05)
    asking.cancel()
    await nothing_was_asked(simulator, token)


@both_protocols
async def test_a_client_may_leave_at_any_moment(simulator: Simulator, open_proxy: str) -> None:
    for milliseconds in range(0, 60, 2):
        token = simulator.token("read")
        parts = [file_part(f"{simulator.origin_url}/9000{order}/a.pdf") for order in ("", "+no-length", "+gzip")]
        asking = asyncio.create_task(ask(open_proxy, token, *parts))
        await asyncio.sleep(milliseconds / 1000)
        asking.cancel()
        await asyncio.wait({asking})
    await simulator.wait_until(lambda: simulator.transfers_open == 0)


async def test_in_auto_a_file_goes_the_way_that_works(
    simulator: Simulator, start_proxy: StartProxy, log_lines: LogRecorder
) -> None:
    proxy = await start_proxy(protocol="auto", allow_private_urls=True)
    simulator.retired = "404"
    token = simulator.token("read")
    assert (await ask(proxy, token, file_part(f"{simulator.origin_url}/100/a.pdf")))[0] == 200
    account = await simulator.settle(token)
    assert account.count("upload") == 1 and len(refs_of(account)) == 1


@both_protocols
async def test_a_conversation_that_goes_on_gets_the_files_of_its_last_message(
    simulator: Simulator, open_proxy: str
) -> None:
    token = simulator.token("read")
    first = file_part(f"{simulator.origin_url}/100/a.pdf")
    _, answer = await ask(open_proxy, token, first, conversation_id="new")
    messages = [
        {"role": "user", "content": [first]},
        {"role": "user", "content": [file_part(f"{simulator.origin_url}/100/b.pdf")]},
    ]
    status, _ = await ask(open_proxy, token, messages=messages, conversation_id=answer["id"])
    assert status == 200
    assert [file.name for file in files_of(simulator.account(token))] == ["b.pdf"]


BAD_PARTS: dict[str, tuple[Any, str]] = {
    "no url": ({"type": "file", "file_url": {}}, "file_url.url"),
    "no string": ({"type": "image_url", "image_url": {"url": 7}}, "image_url.url"),
    "nothing": ({"type": "file"}, "url"),
    "no object": ({"type": "file", "file": "x"}, "file"),
    "not base64": (file_part("data:text/plain,hello"), "file_url.url"),
    "no comma": (file_part("data:text/plain;base64"), "file_url.url"),
    "bad base64": (file_part(TEXT + "!!!!"), "file_url.url"),
    "half base64": (file_part(TEXT + "QUJDR"), "file_url.url"),
    "percent signs without end": (file_part(TEXT + "%" * 1_000_000), "file_url.url"),
    "padding within": (file_part(TEXT + "QQ==QUJD"), "file_url.url"),
    "empty": (file_part(TEXT), "file_url.url"),
    "too large": (file_part(data_url(bytes(2_097_153))), "file_url.url"),
    "other scheme": (file_part("file:///etc/passwd"), "file_url.url"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
async def test_a_bad_part_is_told_by_its_path(simulator: Simulator, open_proxy: str, name: str) -> None:
    part, path = BAD_PARTS[name]
    special = {"too large": (413, "file_too_large"), "other scheme": (400, "file_url_invalid")}
    token = simulator.token("read")
    status, answer = await ask(open_proxy, token, {"type": "text", "text": "a"}, part)
    assert (status, answer["error"]["code"]) == special.get(name, (400, "invalid_request")), answer
    assert answer["error"]["param"] == f"messages[0].content[1].{path}"
    await nothing_was_asked(simulator, token)


async def test_inline_files_have_a_limit_together(simulator: Simulator, open_proxy: str) -> None:
    token = simulator.token("read")
    good = [file_part(data_url(bytes([at]) * 1_040_000)) for at in range(3)]
    assert (await ask(open_proxy, token, *good))[0] == 200
    bad = [file_part(data_url(bytes([at]) * 1_250_000)) for at in range(3)]
    status, answer = await ask(open_proxy, simulator.token("read"), *bad)
    assert (status, answer["error"]["code"]) == (413, "file_too_large")


# Hostile addresses, with the guard as it is by default. No packet leaves: what reaches the socket is counted.


def count_sockets(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """The sockets that the guards of proxies make which are started from now on."""
    made: list[socket.socket] = []
    make = AddressGuard.make_socket

    def count(self: AddressGuard, address_info: tuple[Any, ...]) -> socket.socket:
        made.append(make(self, address_info))
        return made[-1]

    monkeypatch.setattr(AddressGuard, "make_socket", count)
    return made


HOSTILE = """
127.0.0.1 127.1 2130706433 0x7f000001 0x7f.1 0x7f.0x0.0x0.0x1 017700000001 0177.0.0.1 127.0.0.1. 0 0.0.0.0
localhost LOCALHOST. ⓛⓞⓒⓐⓛⓗⓞⓢⓣ 127。0。0。1 ①②⑦.⓪.⓪.① １２７.0.0.1 127.0.0.1%00 %31%32%37.0.0.1
10.0.0.1 172.31.255.255 192.168.1.1 100.64.0.1 100.100.100.200
169.254.169.254 169.254.170.2 168.63.129.16 192.0.0.8 192.88.99.1 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255
[::] [::1] [::ffff:127.0.0.1] [::127.0.0.1] [::ffff:0:127.0.0.1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::1] [2001:0:7f00:1::]
[2002:7f00:1::] [2001:db8::1] [3fff::1] [5f00::1] [fd00:ec2::254] [fe80::1%25lo] [fec0::1] [ff02::1] [::ffff:7f00:1]
a@127.0.0.1 a:80@127.0.0.1 127.0.0.1#@a 127.0.0.1\\@a
127.0.0.1:22 127.0.0.1:0 127.0.0.1:99999 [::1]:80 [0:0:0:0:0:0:0:1]
https://127.0.0.1/ ws://127.0.0.1/ tcp://127.0.0.1/ //127.0.0.1/ http:///127.0.0.1/ file:///etc/passwd ftp://127.0.0.1/
gopher://127.0.0.1/ dict://127.0.0.1:11211/ unix:///run/docker.sock jar:http://127.0.0.1!/
"""
HOSTILE_URLS = [one if "//" in one else f"http://{one}/x.pdf" for one in HOSTILE.split()]


def forbid_name_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a name is a number, or this machine's own: no name server is asked."""
    look_up = socket.getaddrinfo

    def resolve(host: str, port: int, family: int = 0, kind: int = 0, protocol: int = 0, flags: int = 0) -> list[Any]:
        if host.rstrip(".").lower() != "localhost":
            flags |= socket.AI_NUMERICHOST
        return look_up(host, port, family, kind, protocol, flags)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.usefixtures("nothing_is_left")
async def test_no_hostile_address_gets_a_socket(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(HOSTILE_URLS) >= 60
    made = count_sockets(monkeypatch)
    proxy = await start_proxy()
    forbid_name_servers(monkeypatch)
    token = simulator.token("read")
    hostile = [*HOSTILE_URLS, f"http://{own_address()}/", simulator.origin_url + "/100/a.pdf"]
    answers = [await ask(proxy, token, file_part(url)) for url in hostile]
    wrong = [
        url
        for url, (status, answer) in zip(hostile, answers, strict=True)
        if (status, answer.get("code")) != (400, -2003)
    ]
    assert wrong == [] and made == [] and simulator.fetches == []
    await nothing_was_asked(simulator, token)


@pytest.mark.usefixtures("nothing_is_left")
async def test_nobody_learns_whether_something_listens(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start_proxy()
    forbid_name_servers(monkeypatch)
    token = simulator.token("read")
    urls = [simulator.origin_url + "/100/a.pdf", "http://127.0.0.1:1234/", "http://10.9.8.7/", "http://x.invalid/"]
    answers = [await ask(proxy, token, file_part(url)) for url in urls]
    assert len({json.dumps(answer) for _, answer in answers}) == 1


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 alone passes the guard, so that an origin of a test can lead elsewhere."""
    rule = (ipaddress.ip_network("127.0.0.1/32"), "public")
    monkeypatch.setattr(kimi_proxy, "ADDRESS_RULES", [rule, *kimi_proxy.ADDRESS_RULES])
    monkeypatch.setattr(AddressGuard, "_judge", staticmethod(lambda _, address: classify_address(address[0])))


@pytest.mark.usefixtures("nothing_is_left")
async def test_each_redirect_is_judged(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    made = count_sockets(monkeypatch)
    proxy = await start_proxy()
    token = simulator.token("read")
    targets = ["http://127.0.0.2:8/", "http://10.0.0.1/", "//[::1]/", "file:///etc/passwd", "http://a@h/", "x://y"]
    for target in (*targets, "//[", "http://[x", "http://a℀b/"):
        before = len(made)
        url = f"{simulator.origin_url}/100/a.pdf?to={target}"
        status, answer = await ask(proxy, token, file_part(url))
        assert (status, answer["code"], len(made) - before) == (400, -2003, 1), target
    good = f"{simulator.origin_url}/100/a.pdf?to=/200/b.pdf"
    assert (await ask(proxy, token, file_part(good)))[0] == 200
    assert files_of(simulator.account(token))[0].size == 200


async def test_a_name_is_judged_by_each_address_that_it_has(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    port = int(simulator.origin_url.rpartition(":")[2])
    answers = {
        "private.test": ["10.0.0.1"],
        "six.test": ["::1"],
        "mixed.test": ["10.0.0.1", "127.0.0.2", "::1"],
        "name.test": ["localhost"],
        "scoped.test": ["fe80::1%lo"],
        "rebinds.test": ["127.0.0.1"],
    }

    def resolve(host: str, at: int, *_: Any) -> list[Any]:
        found = answers[host]
        if host == "rebinds.test":
            answers[host] = ["127.0.0.2"]
        return [(info(one)[0], socket.SOCK_STREAM, 6, "", (*info(one, at)[4],)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    made = count_sockets(monkeypatch)
    proxy = await start_proxy()
    token = simulator.token("read")
    for host in answers:
        before = len(made)
        expected = (200, 1) if host == "rebinds.test" else (400, 0)
        status, _ = await ask(proxy, token, file_part(f"http://{host}:{port}/100/a.pdf"))
        assert (status, len(made) - before) == expected, host
    status, _ = await ask(proxy, token, file_part(f"http://rebinds.test:{port}/100/b.pdf"))
    assert status == 400 and simulator.fetches == ["/100/a.pdf"]


async def test_the_environments_proxy_is_not_used_for_files(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    proxy = await start_proxy(allow_private_urls=True)
    token = simulator.token("read")
    assert (await ask(proxy, token, file_part(f"{simulator.origin_url}/100/a.pdf")))[0] == 200


@pytest.mark.parametrize("header", ['filename*0="a\'b"', "filename*=undefined''abc%41", "filename*=punycode''a-99%41"])
async def test_a_hostile_disposition_does_no_harm(simulator: Simulator, open_proxy: str, header: str) -> None:
    token = simulator.token("read")
    path = f"100+raw-disposition={quote(header, safe='')}/a.pdf"
    status, answer = await ask(open_proxy, token, file_part(f"{simulator.origin_url}/{path}"))
    assert status == 200, answer
    assert files_of(simulator.account(token))[0].size == 100


async def test_a_url_is_asked_for_as_it_is(simulator: Simulator, open_proxy: str) -> None:
    part = file_part(f"{simulator.origin_url}/100/a%2Fb.pdf?sig=a%2Fb%3A+c&x=%41")
    assert (await ask(open_proxy, simulator.token("read"), part))[0] == 200
    assert simulator.fetches == ["/100/a%2Fb.pdf?sig=a%2Fb%3A+c&x=%41"]


async def test_a_slow_signing_is_no_silence_of_the_storage(simulator: Simulator, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(FILE_SECONDS=0.3, call_seconds=5.0)
    token = simulator.token("read", "slow=sign:0.8")
    assert (await ask(proxy, token, file_part(data_url(CONTENT))))[0] == 200


async def test_an_inline_file_at_the_limit_may_have_its_lines_wrapped(simulator: Simulator, open_proxy: str) -> None:
    content = bytes(2_097_152)
    for text in (base64.b64encode(content), base64.encodebytes(content)):
        part = file_part("data:text/plain;base64," + text.decode())
        assert (await ask(open_proxy, simulator.token("read"), part))[0] == 200


@pytest.mark.usefixtures("nothing_is_left")
async def test_a_cancellation_is_not_lost_in_a_failure(simulator: Simulator, start_proxy: StartProxy) -> None:
    """An upload that fails while its request is cancelled does not go on with the other protocol."""
    simulator.retired = "404"
    proxy = await start_proxy(protocol="auto")
    for _ in range(10):
        token = simulator.token("read", "slow=refresh:0.05")
        asking = asyncio.create_task(ask(proxy, token, file_part(data_url(CONTENT))))
        await simulator.wait_until(lambda one=token: simulator.account(one).count("refresh") > 0)  # type: ignore[misc]
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        assert simulator.account(token).count("ask") == 0
