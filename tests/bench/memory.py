"""How far a file raises the proxy's peak memory: one process a row, `VmHWM` after a small chat and after the file.

Linux only, as it reads /proc.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from tempfile import TemporaryDirectory

import aiohttp
from kimi_simulator import Simulator, digest_content, make_content
from load import Target, proxy_command, proxy_environment, start

MEGABYTE = 1_048_576
ROWS = [("by URL", megabytes) for megabytes in (1, 10, 99)] + [("inline", megabytes) for megabytes in (1, 10, 30)]


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
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator())
        environment = proxy_environment(simulator, protocol, stack.enter_context(TemporaryDirectory()))
        target = Target(protocol, *await stack.enter_async_context(start(proxy_command(), environment, 0)), protocol)
        url = f"http://127.0.0.1:{target.port}"
        await send(url, simulator.token("read"), render_body(simulator, "by URL", 1000))
        before = target.memory_bytes("VmHWM")
        token = simulator.token("read")
        pieces = list(render_body(simulator, kind, size))
        await send(url, token, pieces)
        (file,) = simulator.account(token).files.values()
        assert file.sha256 == digest_content(size)
        return target.memory_bytes("VmHWM") - before, sum(map(len, pieces))


async def main() -> None:
    """Print the table."""
    print("Peak memory of the proxy, growth in MB")
    print(f"{'':24}{'classic':>10}{'connect':>10}")
    for kind, megabytes in ROWS:
        grown = []
        for protocol in ("classic", "connect"):
            growth, body = await measure(kind, megabytes * MEGABYTE, protocol)
            grown.append(f"{growth / MEGABYTE:.1f}")
        factor = f"  ({float(grown[0]) * MEGABYTE / body:.1f} × the body)" if kind == "inline" else ""
        print(f"{megabytes:>4} MB file {kind:<12}{grown[0]:>10}{grown[1]:>10}{factor}", flush=True)
