"""The README says what is so: its tables are the program's, its examples run, its commands exist."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from dataclasses import fields

import aiohttp
import pytest
from clients import CLIENTS
from conftest import StartProxy
from kimi_simulator import HELLO, Simulator
from toc import MODULE

from kimi_proxy import FAILURES, Settings, __version__, describe_option, option_variable

README = (MODULE.parent / "README.md").read_text("utf-8")


def render_settings() -> list[str]:
    """The rows of the table of settings."""
    return [f"| `{option_variable(option)}` | {' | '.join(describe_option(option))} |" for option in fields(Settings)]


def examples(language: str) -> list[str]:
    """The code blocks of a language."""
    return [re.sub(r"(?m)^   ", "", block) for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)]


def test_the_settings_table_is_the_programs() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| `(KIMI|PROXY)_", line)]
    assert rows == render_settings()


def test_the_table_of_errors_is_the_programs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (-\d+) \| .+ \|$", README, re.MULTILINE)
    assert {code: (int(status), int(number)) for code, status, number in rows} == {
        code: (failure.status, failure.number) for code, failure in FAILURES.items()
    }


def test_every_make_target_that_it_names_exists() -> None:
    makefile = (MODULE.parent / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "run", "help", "toc"} <= named <= targets


def test_it_names_the_version_of_each_program_that_is_tested() -> None:
    named = re.findall(r"\(`(\S+?(?:==|@)[\d.]+)`", README)
    assert sorted(named) == sorted(client.packages.split()[0] for client in CLIENTS)


def test_it_can_be_read_in_one_sitting_and_its_pictures_exist() -> None:
    assert README.count("\n") <= 450
    files = re.findall(r"\]\((tests/[^)]+)\)|`(systemd/[\w.-]+)`", README)
    assert len(files) >= 5 and all((MODULE.parent / (one or other)).exists() for one, other in files)


def test_it_tells_of_this_version() -> None:
    assert f"**{__version__}**" in README


CURLS = [block for block in examples("sh") if "curl" in block]


@pytest.mark.parametrize("number", range(len(CURLS)))
async def test_its_curl_examples_work(
    simulator: Simulator, start_proxy: StartProxy, http: aiohttp.ClientSession, number: int
) -> None:
    proxy = await start_proxy(allow_private_urls=True)
    found = re.search(r"(http://127\.0\.0\.1:8000)(\S+).*?-d '(.*)'", CURLS[number], re.DOTALL)
    assert found is not None
    body = json.loads(found[3].replace("https://example.com", f"{simulator.origin_url}/100"))
    script = "search" if body.get("stream") else "read"
    token = simulator.token(script)
    async with http.post(proxy + found[2], json=body, headers={"Authorization": f"Bearer {token}"}) as response:
        text = await response.text()
    assert response.status == 200
    expected = {"search": "检索", "read": "100 bytes"}[script]
    assert expected in text and text.endswith("data: [DONE]\n\n") is bool(body.get("stream"))
    assert simulator.account(token).asked[0]["use_search"] is bool(body.get("stream"))


@pytest.mark.parametrize("block", examples("python"))
async def test_its_python_examples_work(simulator: Simulator, start_proxy: StartProxy, block: str) -> None:
    proxy = await start_proxy()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", block.replace("http://127.0.0.1:8000", proxy)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "KIMI_REFRESH_TOKEN": simulator.token("hello")},
    )
    out = (await asyncio.wait_for(process.communicate(), 30))[0].decode().strip()
    assert process.returncode == 0
    assert out == HELLO


def test_there_are_examples_to_run() -> None:
    assert len(CURLS) == 2 and len(examples("python")) == 1
