"""Section 19: the program, as a person starts and stops it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import pty
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import StartProxy, bearer, chat_body
from golden import WIRE_FOLDER, read_index, read_stream, render_stream
from kimi_simulator import HELLO, SCRIPTS, Cite, End, Hit, Say, Simulator, Think, Wait, make_access_token
from toc import MODULE

from kimi_proxy import Chain, CitationFilter, ProxyError, Text, ThinkFilter, anonymize, anonymize_stream

PROGRAM = [sys.executable, "-W", "error", str(Path(__file__).parent.parent / "kimi_proxy.py")]
PIPE = asyncio.subprocess.PIPE
CHAT = "/v1/chat/completions"
JSON = "application/json"


@pytest.fixture(autouse=True)
def no_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program starts where there is no .env: a maintainer's own is in the repository."""
    monkeypatch.chdir(tmp_path)


async def run(
    *arguments: str, text: str | None = None, program: Sequence[str] = PROGRAM, **environment: str
) -> tuple[int, str, str]:
    """Run the program to its end: exit status, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *program,
        *arguments,
        stdin=PIPE if text is not None else asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env={**clean_environment(), **environment},
    )
    out, err = await asyncio.wait_for(process.communicate(text.encode() if text is not None else None), 20)
    return process.returncode or 0, out.decode(), err.decode()


def clean_environment() -> dict[str, str]:
    others = ("KIMI_", "PROXY_", "PYTHONDONTWRITEBYTECODE")  # as its users start it: it runs in compiled form
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {**kept, "PROXY_STATE_DIR": ""}


class Running:
    """A proxy as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, first_line: str) -> None:
        self.process = process
        self.url = url
        self.first_line = first_line

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send the signal; exit status and log."""
        self.process.send_signal(number)
        _, err = await asyncio.wait_for(self.process.communicate(), 20)
        return self.process.returncode or 0, err.decode()


@pytest.fixture
async def service(simulator: Simulator) -> AsyncIterator[Running]:
    """The proxy, started as the README says."""
    environment = {"KIMI_BASE_URL": simulator.url, "PROXY_PORT": "0", "PROXY_DRAIN_SECONDS": "0.3"}
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, stdout=PIPE, stderr=PIPE, env={**clean_environment(), **environment}
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, line
    running = Running(process, found[0], line)
    yield running
    if process.returncode is None:
        await running.stop(signal.SIGKILL)


async def test_a_good_start_prints_the_base_url_and_a_signal_ends_it_with_0(service: Running) -> None:
    assert re.search(r"http://127\.0\.0\.1:\d+/v1$", service.first_line.strip())
    status, log = await service.stop()
    assert status == 0 and "Traceback" not in log


async def test_a_start_for_all_addresses_prints_what_to_use_here_and_elsewhere(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    running = await start(simulator, PROXY_HOST="0.0.0.0")
    urls = re.findall(r"http://[\w.:\[\]]+(?=/v1)", running.first_line)
    assert urls[0].startswith("http://127.0.0.1:") and "0.0.0.0" not in running.first_line
    for url in urls:  # a machine without a network has the first one alone
        async with http.get(url + "/ping") as response:
            assert response.status == 200
    assert (await running.stop())[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_at_a_signal_streams_are_told_and_removals_finished(
    simulator: Simulator, service: Running, http: aiohttp.ClientSession, number: int
) -> None:
    token = simulator.token("long", "stall=6")
    async with http.post(
        service.url + "/v1/chat/completions", json=chat_body(stream=True), headers=bearer(token)
    ) as response:
        await response.content.readuntil(b"\n\n")
        stopping = asyncio.create_task(service.stop(number))
        rest = (await response.read()).decode()
    status, log = await stopping
    assert status == 0, log
    assert '"shutting_down"' in rest and "[DONE]" not in rest
    assert simulator.account(token).settled
    assert token not in log and simulator.account(token).access_tokens[0] not in log


async def test_a_port_in_use_stops_the_start_with_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, out, err = await run("--port", str(taken.getsockname()[1]))
    assert status == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and "already in use; choose another with --port" in err


@pytest.mark.parametrize(
    ("arguments", "environment", "names"),
    [
        (["--port", "x"], {}, "--port"),
        ([], {"KIMI_PROTOCOL": "x"}, "KIMI_PROTOCOL"),
        (["--host", "300.1.1.1"], {}, "300.1.1.1"),
        (["--prot", "8000"], {}, "--prot: there is no such option or command; do you mean --port?"),
        (["aks", "hello"], {}, "do you mean ask?"),
        (["ask", "--modle=x", "hello"], {}, "--modle: there is no such option or command; do you mean --model?"),
        (["check", "--kimi-protcol", "x"], {}, "do you mean --kimi-protocol?"),
        (["--kimi-refresh-token", "eyJzZXNhbWU"], {}, "do you mean --kimi-refresh-token-file?"),
        ([], {"KIMI_BASE_URL": "https://www.kimi.com/v1"}, "without a path; the one with /v1 is the proxy's"),
        (["--", "aks"], {}, "do you mean ask?"),
        (["--env-file", "/no/such/file"], {}, "/no/such/file cannot be read"),
    ],
)
async def test_a_bad_setting_stops_the_start_with_one_line(
    arguments: list[str], environment: dict[str, str], names: str
) -> None:
    status, _, err = await run(*arguments, **{"PROXY_PORT": "0", **environment})
    assert status == 2 and names in err and len(err.strip().splitlines()) == 1 and "eyJ" not in err


async def test_settings_from_a_file_as_docker_and_systemd_write_them(tmp_path: Path) -> None:
    path = tmp_path / "my.env"
    path.write_bytes(
        b'\xef\xbb\xbf# KIMI_USE_SEARCH=false\r\nKIMI_BASE_URL="http://no-such-host.invalid"\r\n\r\n'
        b"KIMI_PROTOCOL=connect\r\n"
        b"export KIMI_PROTOCOL='classic'\r\nKIMI_REFRESH_TOKEN = eyJ0.a=b'c # mine\r\nOTHER=1\r\n"
    )
    status, out, err = await run("check", "--env-file", str(path))
    assert status == 1 and "FAIL  classic  token" in out and "FAIL  connect" not in out and err == ""
    status, out, _ = await run("check", "--env-file", str(path), KIMI_PROTOCOL="connect")
    assert status == 1 and "FAIL  connect  token" in out and "FAIL  classic" not in out
    path.rename(tmp_path / ".env")
    status, out, err = await run("check")
    assert "FAIL  classic  token" in out and err == (
        "kimi_proxy: .env in this directory sets KIMI_BASE_URL, KIMI_PROTOCOL, KIMI_REFRESH_TOKEN\n"
    )
    _, _, err = await run("check", KIMI_PROTOCOL="classic", KIMI_REFRESH_TOKEN="x")
    assert err == "kimi_proxy: .env in this directory sets KIMI_BASE_URL\n"


async def test_help_and_version() -> None:
    status, out, _ = await run("--help")
    parts = ["  setup ", "  ask ", "  check ", "server:", "PROXY_PORT", "Kimi:", "accounts and keys:"]
    parts += ["files:", "limits:", "logs:"]
    assert status == 0 and sorted(parts, key=out.index) == parts
    assert (await run("serve", "--help"))[1] == out
    status, out, _ = await run("ask", "--help")
    assert status == 0 and "--no-search" in out and "PROXY_PORT" not in out
    status, out, _ = await run("--version")
    assert status == 0 and re.fullmatch(r"kimi_proxy \d+\.\d+\.\d+\n", out)


async def test_ask_prints_the_answer(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello")
    assert await run("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=token) == (0, HELLO + "\n", "")


async def test_ask_takes_what_follows_two_dashes_as_the_question(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("echo")
    status, out, _ = await run("ask", "say", "--url", proxy, "--", "--why", "--", "-x", KIMI_REFRESH_TOKEN=token)
    assert (status, out) == (0, "user:say --why -- -x\n\n")


async def test_ask_takes_an_address_without_a_scheme(simulator: Simulator, proxy: str) -> None:
    address = f"{proxy.removeprefix('http://')}/v1/"
    assert (await run("ask", "hi", "--url", address, KIMI_REFRESH_TOKEN=simulator.token("hello")))[0] == 0


CHINESE = "据搜索，Kimi 是月之暗面的助手。\n\n来源：\n1. Kimi 首页 https://www.kimi.com/\n2. 月之暗面 https://www.moonshot.cn/"
HITS = tuple(Hit(f"Page {name}", f"https://{name}.example/") for name in "abc")


@pytest.mark.parametrize(
    ("protocol", "steps", "shown"),
    [
        ("classic", SCRIPTS["search"], CHINESE + "about?a=1&b=2\n"),
        ("connect", SCRIPTS["search"], CHINESE + "about?a=1&b=2\n"),
        (
            "connect",
            (*HITS, Say("So"), Cite((3,)), Say(" it is"), Cite((2, 3)), End()),
            "So[1] it is[2][1]\n\nSources:\n1. Page c https://c.example/\n2. Page b https://b.example/\n"
            "3. Page a https://a.example/\n",
        ),
    ],
)
async def test_ask_lists_sources_at_the_end_in_the_language_and_by_the_numbers_of_the_text(
    simulator: Simulator,
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    steps: Any,
    shown: str,
) -> None:
    monkeypatch.setitem(SCRIPTS, "made", steps)
    proxy = await start_proxy(protocol=protocol)
    assert await run("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=simulator.token("made")) == (0, shown, "")


async def test_ask_says_which_model_and_whether_to_search(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("hello")
    cases = {"--model=kimi": True, "--model=kimi-nosearch": False, "--no-search": False, "--search": True}
    for flag, expected in cases.items():
        assert (await run("ask", flag, "hi", "--url", proxy, KIMI_REFRESH_TOKEN=token))[0] == 0
        assert simulator.account(token).asked[-1]["use_search"] is expected


async def test_ask_sets_thinking_apart_from_the_answer(simulator: Simulator, start_proxy: StartProxy) -> None:
    token = simulator.token("think")
    proxy = await start_proxy(protocol="connect")
    assert await run("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=token) == (0, "让我想想。\n\n答案是 42。\n", "")


async def test_ask_appends_what_comes_from_a_pipe(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("echo")
    status, out, _ = await run("ask", "sum", "up:", "--url", proxy, text="a text\n", KIMI_REFRESH_TOKEN=token)
    assert (status, out) == (0, "user:sum up:\na text\n\n")


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (("unauthorized-always=refresh",), "Kimi refused this refresh token"),
        (("status=ask:500",), "ordered status 500"),
        (("cut=5",), "broke"),
    ],
)
async def test_ask_shows_a_failure_and_ends_with_1(
    simulator: Simulator, proxy: str, faults: tuple[str, ...], says: str
) -> None:
    token = simulator.token("hello", *faults)
    status, _, err = await run("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=token)
    assert status == 1 and says in err and token not in err and "Traceback" not in err


async def test_a_reader_that_leaves_and_a_text_that_is_none_make_no_traceback(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("long", "pace=0.01")
    command = f"{shlex.join([*PROGRAM, 'ask', 'hi', '--url', proxy])} | head -c3"
    environment = {**clean_environment(), "KIMI_REFRESH_TOKEN": token}
    process = await asyncio.create_subprocess_shell(command, stdout=PIPE, stderr=PIPE, env=environment)
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (len(out), err) == (3, b"")
    await simulator.settle(token)
    process = await asyncio.create_subprocess_exec(*PROGRAM, "ask", "hi", stdin=PIPE, stderr=PIPE, env=environment)
    _, err = await asyncio.wait_for(process.communicate(b"\xff\xd8\xff"), 20)
    assert process.returncode == 2 and b"not text in UTF-8" in err and b"--file" in err and err.count(b"\n") == 1


async def test_ask_says_what_is_missing(proxy: str) -> None:
    status, _, err = await run("ask", "hi", "--url", proxy)
    assert status == 1 and "set PROXY_API_KEY or KIMI_REFRESH_TOKEN" in err
    status, _, err = await run("ask", KIMI_REFRESH_TOKEN="x")
    assert status == 2 and "question" in err
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        status, _, err = await run("ask", "hi", "--url", url, KIMI_REFRESH_TOKEN="x")
    assert status == 1 and "running" in err


class Terminal:
    """The program in a terminal: what was `shown`, its exit status."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process, self.descriptor = process, descriptor
        self.shown = ""

    async def read(self, wanted: str, times: int = 1) -> None:
        """Return once `wanted` is shown."""
        async with asyncio.timeout(20):
            while self.shown.count(wanted) < times:
                self.shown += (await asyncio.to_thread(os.read, self.descriptor, 65_536)).decode()

    async def end(self) -> int:
        """The exit status, once all is shown."""
        with suppress(OSError):
            await self.read("what is never shown")
        return await asyncio.wait_for(self.process.wait(), 20)

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())


@asynccontextmanager
async def open_terminal(*arguments: str, **environment: str) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean_environment(), **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(ours)


async def test_ask_in_a_terminal_shows_a_moving_mark_takes_it_away_and_dims_thinking(
    simulator: Simulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCRIPTS, "made", (Wait(1.0), Think("let me see"), Say("42"), End()))
    proxy = await start_proxy(protocol="connect")
    async with open_terminal("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=simulator.token("made")) as terminal:
        assert await terminal.end() == 0
    assert "- waiting for Kimi" in terminal.shown
    assert terminal.shown.endswith("\r\x1b[K\x1b[2mlet me see\x1b[0m\r\n\r\n42\r\n")


async def test_ask_in_a_terminal_tells_how_far_a_file_is_sent(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(20_000_000))
    done = asyncio.Event()

    async def read_slowly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async with await asyncio.start_server(read_slowly, "127.0.0.1", 0) as server:
        url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with open_terminal("ask", "?", "--file", str(tmp_path / "large"), "--url", url) as terminal:
            await terminal.read(" sending, ", 3)
            done.set()
            assert await terminal.end() == 1
    assert re.search(r"sending, [1-9][0-9]? %", terminal.shown) and "is the proxy running?" in terminal.shown


@pytest.mark.parametrize("order", ["stall=6", "silent=ask"], ids=["amid the answer", "before it"])
async def test_ctrl_c_stops_an_answer_at_kimi_and_says_so(simulator: Simulator, proxy: str, order: str) -> None:
    token = simulator.token("long", order)
    async with open_terminal("ask", "hi", "--url", proxy, KIMI_REFRESH_TOKEN=token) as terminal:
        await simulator.wait_until(lambda: simulator.account(token).count("ask") == 1)
        await terminal.read("2 " if order == "stall=6" else "waiting for Kimi")
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.end() == 130
    assert terminal.shown.endswith("\r\nkimi_proxy: stopped, at Kimi too\r\n") or order != "stall=6"
    assert "stopped, at Kimi too" in terminal.shown and "Traceback" not in terminal.shown
    await simulator.settle(token)


async def test_ask_without_a_question_is_a_chat_that_ends_at_ctrl_d(simulator: Simulator, proxy: str) -> None:
    token = simulator.token("echo")
    async with open_terminal("ask", "--url", proxy, KIMI_REFRESH_TOKEN=token) as terminal:
        await terminal.read("> ")
        terminal.type("\none\n")
        await terminal.read("user:one")
        await terminal.read("> ", 3)
        terminal.type("two\n")
        await terminal.read("> ", 4)
        terminal.type("thre\x1b[De\n")  # and the key that goes left
        await terminal.read("user:three")
        await terminal.read("> ", 5)
        terminal.type("\x04")
        assert await terminal.end() == 0
    assert "user:one\r\nassistant:user:one\r\n\r\nuser:two" in terminal.shown


def test_the_file_has_its_licence_line() -> None:
    head: Any = Path(PROGRAM[-1]).read_text("utf-8").splitlines()[:3]
    assert "# SPDX-License-Identifier: MIT" in head


@pytest.mark.parametrize("place", [".env", "my.env", "token"])
async def test_setup_checks_a_token_and_writes_it_where_the_next_start_finds_it(
    simulator: Simulator, tmp_path: Path, place: str
) -> None:
    token, arguments = simulator.token("hello", "rotate"), ["--env-file", "my.env"] if place == "my.env" else []
    lines = ["# mine", f"KIMI_BASE_URL='{simulator.url}'", "PROXY_PORT=8123"]
    lines += (
        ["KIMI_REFRESH_TOKEN_FILE=token"]
        if place == "token"
        else ["export KIMI_REFRESH_TOKEN=old", "KIMI_SOURCES=none"]
    )
    (tmp_path / ("my.env" if arguments else ".env")).write_text("\n".join(lines))
    (tmp_path / "token").write_text("old")
    status, out, err = await run("setup", *arguments, text=f'{{"refresh_token": "{token}"}}\n')
    assert status == 0, err
    assert "of 127.0.0.1, user d" in out and str(tmp_path / place) in out
    assert "base URL http://127.0.0.1:8123/v1, API key: any text" in out
    written, kept = (tmp_path / place), simulator.account(token).refresh_tokens[-1]
    assert kept != token and written.stat().st_mode & 0o777 == 0o600 and kept not in out + err
    if place == "token":
        assert written.read_text() == f"{kept}\n"
    else:
        assert written.read_text().splitlines() == [*lines[:3], "KIMI_SOURCES=none", f"KIMI_REFRESH_TOKEN={kept}"]
    assert f"account {hashlib.sha256(kept.encode()).hexdigest()[:8]} of" in out
    status, out, _ = await run("check", *arguments)
    assert status == 0, out


async def test_setup_in_a_terminal_does_not_show_the_token_and_refuses_one_of_no_use(
    simulator: Simulator, tmp_path: Path
) -> None:
    good, dead = simulator.token("hello"), simulator.token("hello", "unauthorized-always=refresh")
    access = make_access_token(random.Random(), opaque=False)
    for token, says in (
        (good, "Kimi takes this token"),
        (dead, "refused"),
        ("", "a cut token"),
        (access, "access token"),
    ):
        async with open_terminal("setup", KIMI_BASE_URL=simulator.url) as terminal:
            await terminal.read("not shown): ")
            terminal.type(f"{token}\n")
            assert await terminal.end() == (0 if token == good else 1)
        assert says in terminal.shown and (not token or token not in terminal.shown)
        assert "Traceback" not in terminal.shown
    assert (tmp_path / ".env").read_text() == f"KIMI_REFRESH_TOKEN={good}\n"


@pytest.mark.parametrize("name", ["KIMI_REFRESH_TOKEN", "KIMI_REFRESH_TOKEN_FILE"])
async def test_setup_makes_its_file_and_warns_where_the_environment_wins(
    simulator: Simulator, tmp_path: Path, name: str
) -> None:
    environment = {"KIMI_BASE_URL": simulator.url, "PROXY_PORT": "8123", "PROXY_HOST": "::"}
    arguments, token = ("setup", "--env-file", "new.env"), simulator.token("hello")
    status, out, err = await run(*arguments, text=token, **environment)
    assert (status, err) == (0, "") and "base URL http://[::1]:8123/v1" in out and "//[::]" not in out
    assert (tmp_path / "new.env").read_text() == f"KIMI_REFRESH_TOKEN={token}\n"
    (tmp_path / "new.env").write_text(f"{name}=x\n")
    assert (await run(*arguments, text=token, **environment))[2] == ""
    status, _, err = await run(*arguments, text=token, **environment, **{name: "x"})
    assert status == 0 and f"{name} is set in the environment, which wins" in err


def make_refresh_token(number: int, user: str) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"sub": user}).encode()).decode().rstrip("=")
    return f"hello~{number}.{claims}.s"


ANNA, ANNAS_NEW, BEN = make_refresh_token(1, "anna"), make_refresh_token(2, "anna"), make_refresh_token(3, "ben")


@pytest.mark.parametrize(
    ("held", "new", "kept"),
    [
        ([ANNA, BEN], ANNAS_NEW, [BEN, ANNAS_NEW]),
        ([ANNA], BEN, [ANNA, BEN]),
        ([ANNA], "hello~4", ["hello~4"]),
        (["hello~4"], ANNA, [ANNA]),
        (["hello~4", "hello~5"], "hello~6", ["hello~4", "hello~5", "hello~6"]),
        (["hello~4", "hello~5"], "hello~4", ["hello~5", "hello~4"]),
        (["<token>"], ANNA, [ANNA]),
        ([], ANNA, [ANNA]),
    ],
)
async def test_setup_keeps_the_tokens_of_others(
    simulator: Simulator, tmp_path: Path, held: list[str], new: str, kept: list[str]
) -> None:
    (tmp_path / ".env").write_text(f"KIMI_REFRESH_TOKEN={','.join(held)}\n")
    status, out, err = await run("setup", text=new, KIMI_BASE_URL=simulator.url)
    assert status == 0, err
    assert f"Accounts held there now: {len(kept)}.\n" in out
    assert (tmp_path / ".env").read_text() == f"KIMI_REFRESH_TOKEN={','.join(kept)}\n"
    (tmp_path / "token").write_text("\n".join(held))
    assert (await run("setup", text=new, KIMI_BASE_URL=simulator.url, KIMI_REFRESH_TOKEN_FILE="token"))[0] == 0
    assert (tmp_path / "token").read_text().split() == kept


@pytest.mark.parametrize("place", ["credentials", "wrapper", ""])
async def test_setup_writes_the_token_file_that_the_next_start_reads(
    simulator: Simulator, tmp_path: Path, place: str
) -> None:
    for name in ("conf", "credentials"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf/kimi-proxy.env").write_text(f"KIMI_REFRESH_TOKEN_FILE=token\nKIMI_BASE_URL={simulator.url}\n")
    (tmp_path / "credentials/token").write_text("\n")
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")} if place == "credentials" else {}
    token, arguments = simulator.token("hello"), ["--env-file", "conf/kimi-proxy.env"]
    if place == "wrapper":  # as installed, but for its places, and who calls it
        script = (MODULE.parent / "systemd/kimi-proxy.sh").read_text()
        script = script.replace("/opt/kimi-proxy/venv/bin/python", sys.executable)
        script = script.replace("/opt/kimi-proxy/kimi_proxy.py", PROGRAM[-1])
        script = script.replace("/etc/kimi-proxy", str(tmp_path / "conf"))
        program = ["/bin/sh", "-c", f"id() {{ echo 0; }}\n{script}", "kimi-proxy"]
        assert (await run("setup", text=token, program=program))[0] == 0
        assert (tmp_path / "conf/token").read_text() == f"{token}\n"  # what the units load
        return
    assert (await run("setup", *arguments, text=token, **environment))[0] == 0
    assert (tmp_path / place / "token").read_text() == f"{token}\n"
    assert (await run("check", *arguments, **environment))[0] == 0


async def check(simulator: Simulator, token: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    url = {"KIMI_BASE_URL": simulator.url, "KIMI_AUTH_URL": simulator.url}
    return await run("check", *arguments, **{**url, "KIMI_REFRESH_TOKEN": token, **environment})


async def test_check_walks_every_step_of_both_protocols(simulator: Simulator, tmp_path: Path) -> None:
    token = simulator.token("cite")
    status, out, err = await check(simulator, token, "--record", str(tmp_path / "seen.v1"))
    assert status == 0, out + err
    lines = [line.split()[:3] for line in out.splitlines() if line.startswith("ok")]
    classic, connect = ([line[2] for line in lines if line[1] == name] for name in ("classic", "connect"))
    start, chats = ["token"], ["answer", "remove", "search", "remove", "stop", "remove"]
    assert classic == [*start, *(step for chat in chats[::2] for step in ("open", chat, "remove")), "upload"]
    assert connect == [*start, "models", *chats, "system", "remove", "upload"]
    assert "kimi-k2.6" in out and "yes, with classic and connect" in out
    report = next(line for line in out.splitlines() if line.startswith("For a bug report: kimi_proxy "))
    for seen in ("at 127.0.0.1", "old list", "citations as U+E3A0", "stop ok", "remove ok", "upload ok"):
        assert seen in report
    account = await simulator.settle(token)
    for secret in (token, *account.access_tokens, *account.conversations):
        assert secret not in out + err
        for name in ("answer.sse", "search.sse", "answer.connect", "search.connect", "system-prompt.connect"):
            assert secret.encode() not in (tmp_path / f"seen.v1-{name}").read_bytes()
    for name, text in (("seen.v1-answer.sse", "甲"), ("seen.v1-search.connect", "月之暗面")):
        assert text.encode() not in (tmp_path / name).read_bytes()
        assert ["Finished", "stop"] in render_stream(tmp_path / name)


async def test_check_warns_of_a_moderated_answer_and_in_a_terminal_names_a_step_when_it_begins(
    simulator: Simulator,
) -> None:
    token = simulator.token("moderated")
    environment = {"KIMI_BASE_URL": simulator.url, "KIMI_PROTOCOL": "classic", "KIMI_REFRESH_TOKEN": token}
    async with open_terminal("check", **environment) as terminal:
        assert await terminal.end() == 0
    assert re.search(r"\.\.\.   classic  answer\rwarn  classic  answer .*, moderated by Kimi\r\n", terminal.shown)


async def test_check_is_content_with_one_protocol_and_says_why_the_other_fails(simulator: Simulator) -> None:
    simulator.retired = "404"
    status, out, _ = await check(simulator, simulator.token("hello"))
    assert status == 0 and "yes, with connect." in out
    assert re.search(r"FAIL +classic +open .*HTTP 404", out)


@pytest.mark.parametrize(
    ("faults", "step"),
    [(("unauthorized-always=refresh",), "token"), (("status=ask:500",), "answer"), (("garbage",), "answer")],
)
async def test_check_ends_with_1_where_nothing_would_work(
    simulator: Simulator, faults: tuple[str, ...], step: str
) -> None:
    token = simulator.token("hello", *faults)
    status, out, err = await check(simulator, token)
    assert status == 1 and "would work: no" in out and token not in out + err
    assert len(re.findall(rf"FAIL +\w+ +{step} ", out)) == 2
    await simulator.settle(token)


async def test_check_says_what_is_missing_or_not_reached() -> None:
    status, _, err = await run("check")
    assert status == 2 and "KIMI_REFRESH_TOKEN" in err
    environment = {"KIMI_BASE_URL": "http://no-such-host.invalid", "KIMI_REFRESH_TOKEN": "x"}
    status, out, err = await run("check", "--record", "/no/such/place/seen", **environment)
    assert status == 2 and out == "" and "/no/such/place" in err and "Traceback" not in err
    status, out, _ = await run("check", **environment)
    assert status == 1 and "cannot be resolved" in out


async def test_check_uses_the_tokens_that_a_running_proxy_rotated(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    proxy = await start_proxy(state_dir=str(tmp_path), protocol="classic")
    token = simulator.token("hello", "rotate")

    async def ask() -> int:
        headers = bearer(token)
        async with http.post(f"{proxy}/v1/chat/completions", json=chat_body(), headers=headers) as response:
            return response.status

    assert await ask() == 200
    status, out, _ = await check(simulator, token, PROXY_STATE_DIR=str(tmp_path))
    assert status == 0, out
    assert await ask() == 200
    assert simulator.account(token).count("refresh") == 1


def test_a_recording_keeps_the_protocols_names_and_nothing_else() -> None:
    mark = "\ue3a0cite\ue3a3web_search:1#2\ue3a8"
    value = {
        "op": "append",
        "mask": "block.text",
        "id": "d1a2-b3",
        "refIndex": "web_search:1#2",
        "role": "assistant",
        "name": "张三",
        "list": [1, None, True, {"text": f"你好 Bob{mark}!", "url": "https://secret.example/a?b=c"}],
    }
    shown = anonymize(value)
    assert (shown["op"], shown["mask"], shown["role"]) == ("append", "block.text", "assistant")
    assert (shown["refIndex"], shown["name"]) == ("web_search:1#2", "字字") and "d1a2" not in shown["id"]
    assert shown["list"][:3] == [1, None, True]
    assert shown["list"][3]["text"] == f"字字 xxx{mark}!"
    assert shown["list"][3]["url"].startswith("https://example.com/") and "secret" not in str(shown)


def read_shape(path: Path) -> list[Any]:
    """What a recorded stream shows, without its words: events, lengths of texts, numbers of citations."""
    shape: list[Any] = []
    chain = Chain([ThinkFilter(), CitationFilter()])
    try:
        for _, read in read_stream(path):
            for event in chain.feed(read):
                size = len(event.text) if isinstance(event, Text) else 0
                shape.append((type(event).__name__, size, getattr(event, "number", 0)))
    except ProxyError as error:
        shape.append(error.code)
    return shape


# What becomes equal with its words, half of a pair of surrogates, and what has no end.
NOT_SHOWN = {"connect/set_again.connect", "classic/surrogate.sse", "connect/cut.connect"}


@pytest.mark.parametrize("name", sorted(read_index().keys() - NOT_SHOWN))
def test_a_recording_shows_all_that_is_not_said(tmp_path: Path, name: str) -> None:
    data = (WIRE_FOLDER / name).read_bytes()
    path = tmp_path / Path(name).name
    path.write_bytes(anonymize_stream(data, name.partition("/")[0]))
    assert read_shape(path) == read_shape(WIRE_FOLDER / name)


async def test_ask_sends_files_and_pictures(simulator: Simulator, start_proxy: StartProxy, tmp_path: Path) -> None:
    url = await start_proxy(allow_private_urls=True)
    document, picture = tmp_path / "年报.txt", tmp_path / "a.png"
    document.write_text("first line\nsecond")
    picture.write_bytes(b"not quite a picture")
    files = ["--file", str(document), "--file", str(picture), "--file", f"{simulator.origin_url}/100/b.pdf?x=1"]
    files += ["--file", f"{simulator.origin_url}/100/c.webp"]
    token = simulator.token("read")
    status, out, err = await run("ask", *files, "What is in it?", "--url", url, KIMI_REFRESH_TOKEN=token)
    assert (status, err) == (0, "")
    assert "年报.txt (text/plain, 17 bytes): first line" in out
    kinds = {file.name: file.kind for file in simulator.account(token).files.values()}
    assert kinds == {"年报.txt": "file", "image.png": "image", "b.pdf": "file", "c.webp": "image"}
    status, _, err = await run("ask", "--file", "/no/such/file", "?", "--url", url, KIMI_REFRESH_TOKEN=token)
    assert status == 2 and "/no/such/file: No such file" in err


async def test_ask_sends_the_proxys_key_and_check_uses_the_held_account(
    simulator: Simulator, start_proxy: StartProxy, tmp_path: Path
) -> None:
    token = simulator.token("hello")
    url = await start_proxy(refresh_token=token, api_keys="me:sesame-open")
    for environment, expected in (
        ({"PROXY_API_KEY": "sesame-open"}, 0),
        ({"PROXY_API_KEYS": "me:sesame-open,other", "KIMI_REFRESH_TOKEN": token}, 0),
        ({"PROXY_API_KEYS": "sesame-open"}, 0),
        ({"PROXY_API_KEY": "wrong", "PROXY_API_KEYS": "sesame-open"}, 1),
        ({}, 1),
    ):
        status, out, err = await run("ask", "hi", "--url", url, **environment)
        assert status == expected, err
        assert (HELLO in out) is (expected == 0)
    path = tmp_path / "token"
    path.write_text(f"{token}\n")
    status, out, _ = await check(simulator, "", KIMI_REFRESH_TOKEN_FILE=str(path))
    assert status == 0 and "yes" in out
    open_url = await start_proxy(refresh_token=token)
    assert (await run("ask", "hi", "--url", open_url))[0] == 0


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PROXY_API_KEYS": "k"}, "no held account"),
        ({"KIMI_REFRESH_TOKEN": "t", "PROXY_HOST": "0.0.0.0"}, "set PROXY_API_KEYS"),
        ({"KIMI_REFRESH_TOKEN_FILE": "/no/such/file"}, "KIMI_REFRESH_TOKEN_FILE: /no/such/file cannot be read"),
        ({"KIMI_REFRESH_TOKEN": "t", "PROXY_HOST": "::", "PROXY_API_KEYS": f"{'k' * 16},b:{'k' * 15}"}, "guessed: b;"),
        ({"KIMI_REFRESH_TOKEN": "t", "KIMI_REFRESH_TOKEN_FILE": "x"}, "set one of them"),
        ({"KIMI_REFRESH_TOKEN": "t", "PROXY_API_KEYS": "a b:"}, "PROXY_API_KEYS: word 2"),
        ({"KIMI_REFRESH_TOKEN": "t\x7fsesame"}, "it looks like"),
    ],
)
async def test_secrets_that_are_of_no_use_stop_the_start_with_one_line(environment: dict[str, str], says: str) -> None:
    status, out, err = await run("--port", "0", **environment)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    assert "sesame" not in err


# systemd's protocol, and the end in good order.

WRAPPER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


async def start(
    simulator: Simulator,
    *,
    listener: socket.socket | None = None,
    program: Sequence[str] = PROGRAM[1:],
    **environment: str,
) -> Running:
    """A proxy as a process, with the environment that systemd would give it."""
    known = {"KIMI_BASE_URL": simulator.url, "PROXY_PORT": "0", "PROXY_DRAIN_SECONDS": "5", **environment}
    known["PYTHONPATH"] = str(Path(PROGRAM[-1]).parent)
    command, descriptors = [sys.executable, *program], ()
    if listener is not None:
        known["LISTEN_FDS"] = "1"
        command = [sys.executable, "-c", WRAPPER, str(listener.fileno()), *program]
        descriptors = (listener.fileno(),)  # type: ignore[assignment]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=PIPE, env={**clean_environment(), **known}, pass_fds=descriptors
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, line
    return Running(process, found[0], line)


async def receive(queue: socket.socket, wanted: str, seconds: float = 10.0) -> str:
    """The first datagram that says `wanted`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        while True:
            said = (await loop.sock_recv(queue, 4096)).decode()
            if wanted in said:
                return said


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told_how_it_goes(simulator: Simulator, tmp_path: Path, abstract: bool) -> None:
    place = f"\0kimi-proxy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as queue:
        queue.bind(place)
        queue.setblocking(False)
        shown = place.replace("\0", "@")
        running = await start(simulator, NOTIFY_SOCKET=shown, WATCHDOG_USEC="400000")
        assert await receive(queue, "READY=1")
        for _ in range(3):
            assert "STATUS=0 answers, 0 requests" in await receive(queue, "WATCHDOG=1", 2.0)
        async with aiohttp.ClientSession() as http:
            headers = bearer(simulator.token("quiet"))
            asking = asyncio.create_task(http.post(running.url + CHAT, json=chat_body(), headers=headers))
            assert "WATCHDOG=1" in await receive(queue, "STATUS=1 answers, 1 requests, 1 accounts")
            async with await asking as response:
                assert response.status == 200
        stopping = asyncio.create_task(running.stop())
        assert "EXTEND_TIMEOUT_USEC=" in await receive(queue, "STOPPING=1")
        assert (await stopping)[0] == 0


BLOCKING = """
import sys, time
import kimi_proxy

render = kimi_proxy.Metrics.render

def block(*arguments):
    time.sleep(1)
    return render(*arguments)

kimi_proxy.Metrics.render = block
sys.exit(kimi_proxy.main([]))
"""


async def test_the_watchdog_is_told_nothing_while_the_loop_is_blocked(simulator: Simulator, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as queue:
        queue.bind(str(tmp_path / "notify"))
        queue.setblocking(False)
        environment: Any = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        running = await start(simulator, program=["-c", BLOCKING], **environment)
        await receive(queue, "WATCHDOG=1")
        async with aiohttp.ClientSession() as http:
            asking = asyncio.create_task(http.get(running.url + "/metrics"))
            beats = [time.monotonic()]
            while not asking.done():
                await receive(queue, "WATCHDOG=1")
                beats.append(time.monotonic())
            assert (await asking).status == 200
        assert max(later - earlier for earlier, later in pairwise(beats)) > 0.8
        assert (await running.stop())[0] == 0


async def test_a_full_queue_and_a_missing_one_stop_nothing(simulator: Simulator, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as queue:
        queue.bind(str(tmp_path / "notify"))  # nobody reads it
        running = await start(simulator, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="2000")
        async with aiohttp.ClientSession() as http:
            for _ in range(20):
                async with http.get(running.url + "/ping") as response:
                    assert response.status == 200
                await asyncio.sleep(0.02)  # the beats of this time fill the queue
        assert (await running.stop())[0] == 0
    running = await start(simulator, NOTIFY_SOCKET=str(tmp_path / "nowhere"), WATCHDOG_PID="1", WATCHDOG_USEC="1")
    assert (await running.stop())[0] == 0


async def test_log_lines_as_json(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    running = await start(simulator, PROXY_LOG_FORMAT="json", KIMI_PROTOCOL="classic")
    url, token = running.url + "/v1/chat/completions", simulator.token("hello")
    requests: dict[str, dict[str, Any]] = {
        "good": {"json": chat_body(), "headers": bearer(token)},
        "no-token": {"json": chat_body()},
        "no-gzip": {"data": b"oops", "headers": {**bearer(token), "Content-Encoding": "gzip"}},
        "broken": {"json": chat_body(), "headers": bearer(simulator.token("hello", "cut=4"))},
    }
    for name, request in requests.items():
        request["headers"] = {**request.get("headers", {}), "X-Request-Id": name}
        async with http.post(url, **request) as response:
            await response.read()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    writer.write(b"GET /ping HTTP/1.1\r\nHost : x\r\n\r\n")
    assert b" 400 " in await reader.read()
    writer.close()
    status, log = await running.stop()
    assert status == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert all([*line][:4] == ["time", "level", "request_id", "message"] for line in lines)
    assert all(re.fullmatch(r"20..-..-..T..:..:..\.\d{3}Z", line["time"]) for line in lines)
    told = {line["request_id"]: line for line in lines if line["request_id"] in requests}
    assert [line["request_id"] for line in lines].count("no-gzip") == 1
    statuses = {name: line["status"] for name, line in told.items()}
    assert statuses == {"good": 200, "no-token": 401, "no-gzip": 400, "broken": 502}
    assert [told[name].get("code") for name in requests] == [None, "token_missing", "body_broken", "answer_broken"]
    label = hashlib.sha256(token.encode()).hexdigest()[:8]
    good = {"message": "POST /v1/chat/completions", "client": "127.0.0.1", "account": label, "model": "kimi"}
    assert good.items() <= told["good"].items() and told["good"]["upstream_status"] == 200
    times = [told["good"][name] for name in ("wait_seconds", "first_text_seconds", "seconds")]
    assert times == sorted(times) and all(isinstance(one, float) for one in times)
    assert "broke" in told["broken"]["reason"]
    assert any("Error handling request" in line["message"] for line in lines)


async def test_failures_are_in_a_log_of_warnings_with_what_kimi_says(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    running = await start(simulator, PROXY_LOG_LEVEL="warning", KIMI_SILENCE_SECONDS="0.5", KIMI_PROTOCOL="classic")
    orders = {
        "unauthorized-always=refresh": 'status=401 .* code=token_dead reason=".*401',
        "status=ask:500": 'status=502 .* upstream_status=500 code=service_failed reason=".*ordered status 500',
        "stall=2": 'status=504 .* code=service_silent reason="Kimi sent nothing',
        "cut=5": 'status=502 .* code=answer_broken reason=".*broke',
        "empty": 'status=502 .* code=answer_empty reason=".*no text',
        "wrong-type=ask": 'status=502 .* code=service_failed reason=".*text/html',
    }
    for number, order in enumerate(orders):
        token = simulator.token("empty" if order == "empty" else "hello", *[order] * (order != "empty"))
        headers = {**bearer(token), "X-Request-Id": f"request-{number}"}
        async with http.post(running.url + CHAT, json=chat_body("sesame", stream=True), headers=headers) as response:
            await response.read()
    _, log = await running.stop()
    lines = log.splitlines()
    assert len(lines) == len(orders) and "sesame" not in log, log
    for number, (line, says) in enumerate(zip(lines, orders.values(), strict=True)):
        assert re.search(rf" \w+ \[request-{number}\] POST {CHAT} {says}", line), line


PATIENT = "import sys, kimi_proxy; kimi_proxy.GRACE_SECONDS = 60.0; sys.exit(kimi_proxy.main([]))"


async def test_with_a_socket_of_systemds_a_restart_refuses_nothing(simulator: Simulator) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        first = await start(simulator, listener=listener, program=["-c", PATIENT])
        assert first.url == url
        statuses: list[int] = []
        done = asyncio.Event()

        async def keep_asking() -> None:
            while not done.is_set():
                async with aiohttp.ClientSession() as http, http.get(url + "/ping") as response:
                    statuses.append(response.status)

        async def keep_asking_on_one_connection() -> None:
            body = {"model": "kimi", "messages": [{"role": "user", "content": "hi"}]}
            async with aiohttp.ClientSession(headers=bearer("t")) as http:
                while not done.is_set():
                    # What is not a GET, aiohttp's client does not send again by itself.
                    async with http.post(url + "/v1/messages/count_tokens", json=body) as response:
                        statuses.append(response.status)

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        asking += [asyncio.create_task(keep_asking_on_one_connection()) for _ in range(4)]
        await asyncio.sleep(0.2)
        assert (await first.stop())[0] == 0
        second = await start(simulator, listener=listener)
        count = len(statuses)
        async with asyncio.timeout(10):
            while len(statuses) < count + 20:
                await asyncio.sleep(0.01)
        done.set()
        await asyncio.gather(*asking)
        assert set(statuses) == {200}
        assert (await second.stop())[0] == 0


async def test_the_end_is_announced_while_all_is_still_served(simulator: Simulator) -> None:
    running = await start(simulator, PROXY_DRAIN_DELAY_SECONDS="0.5")
    token = simulator.token("long", "pace=0.05", "chunks=30")
    async with aiohttp.ClientSession() as http, aiohttp.ClientSession() as other:
        body = chat_body(stream=True)
        async with http.post(running.url + "/v1/chat/completions", json=body, headers=bearer(token)) as response:
            await response.content.readuntil(b"\n\n")
            stopping = asyncio.create_task(running.stop())
            seen: list[tuple[int, str]] = []
            async with asyncio.timeout(10):
                while not seen or seen[-1][1] != "close":
                    async with other.get(running.url + "/health") as health:
                        seen.append((health.status, health.headers.get("Connection", "")))
                        assert (health.status == 503) == ("Retry-After" in health.headers)
                    await asyncio.sleep(0.02)
            assert (503, "") in seen  # first to balancers, while connections are kept
            text = (await response.read()).decode()
    status, log = await stopping
    assert status == 0 and text.endswith("data: [DONE]\n\n") and "29" in text, log
    assert simulator.account(token).settled


@pytest.mark.parametrize("kept", [False, True])
async def test_a_connection_that_waits_for_a_request_is_served_to_the_end(simulator: Simulator, kept: bool) -> None:
    running = await start(simulator, program=["-c", PATIENT])
    request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    if kept:
        writer.write(request)
        assert b" 200 " in await reader.readuntil(b"pong")
    assert await is_open(running.url)  # those before it in the queue are accepted by then
    stopping = asyncio.create_task(running.stop())
    async with asyncio.timeout(10):
        while await is_open(running.url):
            await asyncio.sleep(0.01)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"Connection: close" in answer
    writer.close()
    assert (await stopping)[0] == 0


@pytest.mark.parametrize("busy", [False, True])
async def test_connections_that_are_kept_do_not_hold_up_the_end(simulator: Simulator, busy: bool) -> None:
    impatient = "import sys, kimi_proxy; kimi_proxy.GRACE_SECONDS = 0.3; sys.exit(kimi_proxy.main([]))"
    running = await start(simulator, program=["-c", impatient])
    async with aiohttp.ClientSession() as http:
        async with http.get(running.url + "/ping") as response:
            assert response.status == 200
        if not busy:
            assert (await running.stop())[0] == 0
            return
        stopping = asyncio.create_task(running.stop())
        with pytest.raises(aiohttp.ClientError):
            while True:
                async with http.get(running.url + "/health") as response:
                    await response.read()
        assert (await stopping)[0] == 0


async def test_whole_answers_are_told_at_the_end_with_a_503(simulator: Simulator) -> None:
    running = await start(simulator, PROXY_DRAIN_SECONDS="0.2")
    token = simulator.token("long", "stall=6")
    async with aiohttp.ClientSession() as http:
        asking = asyncio.create_task(
            http.post(running.url + "/v1/chat/completions", json=chat_body(), headers=bearer(token))
        )
        await simulator.wait_until(lambda: simulator.account(token).streams_open == 1)
        stopping = asyncio.create_task(running.stop())
        async with await asking as response:
            answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (503, "shutting_down")
            assert response.headers["Retry-After"] == "5"
    assert (await stopping)[0] == 0
    assert simulator.account(token).settled


async def test_where_nobody_asked_before_the_end_all_is_served_all_the_same(simulator: Simulator) -> None:
    running = await start(simulator, PROXY_DRAIN_DELAY_SECONDS="0.5")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.stderr is not None
    while b"shutting down" not in await asyncio.wait_for(running.process.stderr.readline(), 10):
        pass
    assert await ask_health(running.url) == 503
    async with aiohttp.ClientSession() as http:
        headers = bearer(simulator.token("hello"))
        async with http.post(running.url + CHAT, json=chat_body(), headers=headers) as response:
            assert response.status == 200
    await asyncio.wait_for(running.process.communicate(), 20)
    assert running.process.returncode == 0


@pytest.mark.parametrize("ends", [True, False], ids=["ends in time", "does not"])
@pytest.mark.parametrize("path", [CHAT, "/v1/files"])
async def test_a_body_that_is_on_its_way_at_the_end_may_arrive(simulator: Simulator, path: str, ends: bool) -> None:
    running = await start(simulator, PROXY_DRAIN_SECONDS="15" if ends else "0.2")
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    body, kind = (form, "multipart/form-data; boundary=x") if path != CHAT else (json.dumps(chat_body()).encode(), JSON)
    token = simulator.token("read")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nContent-Type: {kind}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:20])
    async with asyncio.timeout(5):
        while "requests_running 2" not in await get_metrics(running.url):
            await asyncio.sleep(0.01)
    stopping = asyncio.create_task(running.stop())
    async with asyncio.timeout(10):
        while await is_open(running.url):
            await asyncio.sleep(0.01)
    if ends:
        await asyncio.sleep(1.5)  # beyond what aiohttp itself waits for
        writer.write(body[20:])
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 200 " if ends else "HTTP/1.1 503 ")
    assert ("shutting_down" in answer) is ("Retry-After: " in answer) is not ends
    assert (await stopping)[0] == 0


async def get_metrics(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        return await response.text()


async def is_open(url: str) -> bool:
    """Whether connections are accepted."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    except ConnectionError:
        return False
    writer.close()
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once_and_its_conversations_are_the_next_ones_to_remove(
    simulator: Simulator, tmp_path: Path, number: int
) -> None:
    running = await start(simulator, PROXY_STATE_DIR=str(tmp_path))
    token = simulator.token("long", "stall=6")
    async with aiohttp.ClientSession() as http:
        body = chat_body(stream=True)
        async with http.post(running.url + "/v1/chat/completions", json=body, headers=bearer(token)) as response:
            await response.content.readuntil(b"\n\n")
            running.process.send_signal(number)
            async with asyncio.timeout(5):
                while await is_open(running.url):
                    await asyncio.sleep(0.01)
            status, log = await running.stop(number)
    assert status == 128 + number and "waiting for 1 answer, at most 5 s; Ctrl-C again stops now" in log
    assert [one.removed for one in simulator.account(token).conversations.values()] == [0]
    heir = await start(simulator, PROXY_STATE_DIR=str(tmp_path))
    await simulator.settle(token)
    assert (await heir.stop())[0] == 0


async def ask_health(url: str) -> int:
    async with aiohttp.ClientSession() as http, http.get(url + "/health") as response:
        return response.status


async def test_an_inherited_socket_that_others_reach_needs_keys_for_a_held_account(simulator: Simulator) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRAPPER, str(listener.fileno()), *PROGRAM[1:]),
            stdout=PIPE,
            stderr=PIPE,
            env={**clean_environment(), "LISTEN_FDS": "1", "KIMI_REFRESH_TOKEN": "t"},
            pass_fds=(listener.fileno(),),
        )
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (2, b"") and b"set PROXY_API_KEYS" in err


@pytest.mark.parametrize("known", ["held", "on disk", "by its next call"])
@pytest.mark.parametrize("protocol", ["classic", "connect"])
async def test_what_a_killed_process_left_open_is_removed_by_the_next_one(
    simulator: Simulator, tmp_path: Path, protocol: str, known: str
) -> None:
    token, waiting = simulator.token("long", "stall=6", "rotate"), simulator.token("long", "stall=6")
    tokens = (token, waiting) if known == "by its next call" else (token,)
    settings: Any = {"KIMI_PROTOCOL": protocol, "KIMI_AUTH_URL": simulator.url, "PROXY_STATE_DIR": str(tmp_path)}
    killed = await start(simulator, **settings)
    async with aiohttp.ClientSession() as http, AsyncExitStack() as streams:
        for each in tokens * 3:
            asking = http.post(killed.url + CHAT, json=chat_body(stream=True), headers=bearer(each))
            response = await streams.enter_async_context(asking)
            await response.content.readuntil(b"\n\n")
        assert (await killed.stop(signal.SIGKILL))[0] == -signal.SIGKILL
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await simulator.wait_until(lambda: all(simulator.account(each).streams_open == 0 for each in tokens))
    if known != "on disk":
        digest = hashlib.sha256((waiting if known == "by its next call" else token).encode()).hexdigest()
        (tmp_path / "tokens" / f"{digest}.json").unlink()
    held: Any = {"KIMI_REFRESH_TOKEN": token} if known == "held" else {}
    if held:  # the service would not take it, had it been rotated
        simulator.account(token).refresh_tokens.append(token)
    heir = await start(simulator, **settings, **held)
    account = await simulator.settle(token)
    assert account.count("remove") == 3
    if known == "by its next call":
        assert simulator.account(waiting).count("remove") == 0
        async with (
            aiohttp.ClientSession() as http,
            http.post(heir.url + CHAT, json=chat_body(stream=True), headers=bearer(waiting)) as response,
        ):
            await response.content.readuntil(b"\n\n")
            await simulator.wait_until(lambda: simulator.account(waiting).count("remove") == 3)
        await simulator.settle(waiting)
    status, log = await heir.stop()
    assert status == 0 and "left open by a process that ended" in log and token not in log
    assert list((tmp_path / "conversations-127.0.0.1").iterdir()) == []


@pytest.mark.parametrize("writable", [True, False])
def test_a_script_runs_in_its_newest_compiled_form_where_that_can_be_kept(tmp_path: Path, writable: bool) -> None:
    program, start = tmp_path / "kimi_proxy.py", "    sys.exit(main("
    if not writable:
        (tmp_path / "__pycache__").write_text("no directory")
    for version in ("first", "another"):
        told = f"    print({version!r}, __file__, sys.argv[1:], sys.warnoptions, input())\n"
        program.write_text(MODULE.read_text("utf-8").replace(start, told + start), "utf-8")
        for _ in range(2):
            command = [sys.executable, "-W", "error", str(program), "--nope", "a b"]
            result = subprocess.run(
                command, check=False, input="?", capture_output=True, text=True, env=clean_environment()
            )
            said, words, rest = result.stdout.partition(" ['--nope', 'a b'] ['error'] ?\n")
            assert said.startswith(f"{version} {tmp_path}/") and said.endswith(".pyc" if writable else "/kimi_proxy.py")
            assert words and not rest and result.returncode == 2 and "--nope" in result.stderr


async def test_a_missing_package_is_told_with_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError('no', name='aiohttp')")
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(MODULE.parent)!r}]; import kimi_proxy"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 1 and err.count(b"\n") == 1 and b"pip install -r requirements.txt" in err
