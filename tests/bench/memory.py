"""How far a file raises the proxy's peak memory: one process a row, `VmHWM` after a small chat and after the file.

Linux only, as it reads /proc.
"""

from __future__ import annotations

import asyncio
import base64
import os
import platform
import re
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from kimi_simulator import Simulator, digest_content, make_content

PROGRAM = str(Path(__file__).parents[2] / "kimi_proxy.py")
MEGABYTE = 1_048_576
ROWS = [("by URL", megabytes) for megabytes in (1, 10, 99)] + [("inline", megabytes) for megabytes in (1, 10, 30)]


@asynccontextmanager
async def run_proxy(simulator: Simulator, protocol: str) -> AsyncIterator[tuple[str, int]]:
    """A proxy in a process of its own: its address and process id."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KIMI_", "PROXY_"))},
        "KIMI_BASE_URL": simulator.url,
        "KIMI_AUTH_URL": simulator.url,
        "KIMI_PROTOCOL": protocol,
        "PROXY_PORT": "0",
        "PROXY_STATE_DIR": "",
        "PROXY_LOG_LEVEL": "error",
        "PROXY_ALLOW_PRIVATE_URLS": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAM, stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        address = re.search(rb"http://\S+(?=/v1)", await process.stdout.readline())
        assert address is not None
        yield address[0].decode(), process.pid
    finally:
        process.terminate()
        await process.wait()


def read_peak(process_id: int) -> int:
    """The highest resident memory of a process so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def render_body(simulator: Simulator, kind: str, size: int) -> Iterable[bytes]:
    """The body of a chat about a file of `size` bytes, in pieces."""
    yield b'{"messages":[{"role":"user","content":[{"type":"file","file_url":{"url":"'
    if kind == "inline":
        yield b"data:application/pdf;base64," + base64.b64encode(b"".join(make_content(size)))
    elif size:
        yield f"{simulator.origin_url}/{size}/a.pdf".encode()
    yield b'"}},{"type":"text","text":"?"}]}]}'


async def send(url: str, token: str, pieces: Iterable[bytes]) -> None:
    """Ask, and wait for the answer."""

    async def read() -> AsyncIterator[bytes]:
        for piece in pieces:
            for at in range(0, len(piece), 65_536):
                yield piece[at : at + 65_536]

    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", data=read(), headers=headers) as response,
    ):
        assert response.status == 200, await response.text()


async def measure(kind: str, size: int, protocol: str) -> tuple[int, int]:
    """By how many bytes the peak grew, and the length of the request's body."""
    async with Simulator() as simulator, run_proxy(simulator, protocol) as (url, process_id):
        await send(url, simulator.token("read"), render_body(simulator, "by URL", 1000))
        before = read_peak(process_id)
        token = simulator.token("read")
        pieces = list(render_body(simulator, kind, size))
        await send(url, token, pieces)
        (file,) = simulator.account(token).files.values()
        assert file.sha256 == digest_content(size)
        return read_peak(process_id) - before, sum(map(len, pieces))


async def main() -> None:
    """Print the table."""
    print(f"Peak memory of the proxy, growth in MB ({platform.machine()}, Python {platform.python_version()})")
    print(f"{'':24}{'classic':>10}{'connect':>10}")
    for kind, megabytes in ROWS:
        grown = []
        for protocol in ("classic", "connect"):
            growth, body = await measure(kind, megabytes * MEGABYTE, protocol)
            grown.append(f"{growth / MEGABYTE:.1f}")
        factor = f"  ({float(grown[0]) * MEGABYTE / body:.1f} × the body)" if kind == "inline" else ""
        print(f"{megabytes:>4} MB file {kind:<12}{grown[0]:>10}{grown[1]:>10}{factor}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
