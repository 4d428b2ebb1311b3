"""The floors of `make bench`: what passing bytes on costs, without understanding any of them.

`python floors.py relay UPSTREAM` joins each client to the upstream, byte by byte, with asyncio's protocols alone.
`python floors.py aiohttp UPSTREAM` is the usual pass-through of an aiohttp server and an aiohttp client. Both print
their address, and serve until they are ended.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import aiohttp
from aiohttp import web
from yarl import URL


class Relay(asyncio.Protocol):
    """One end of a joined pair: what it gets goes to its peer, which is made when the first bytes come."""

    def __init__(self, upstream: URL | None, peer: Relay | None = None) -> None:
        self._upstream = upstream
        self._peer = peer
        self._early: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, and be joined to the upstream."""
        self._transport = cast(asyncio.Transport, transport)
        if self._upstream is not None:
            asyncio.get_running_loop().create_task(self._join(self._upstream))

    async def _join(self, upstream: URL) -> None:
        loop = asyncio.get_running_loop()
        address = (upstream.host or "", upstream.port or 0)
        _, self._peer = await loop.create_connection(lambda: Relay(None, self), *address)
        for data in self._early:
            self._peer.send(data)

    def send(self, data: bytes) -> None:
        """Write to this end."""
        if self._transport is not None:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Pass on."""
        if self._peer is None:
            self._early.append(data)
        else:
            self._peer.send(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other one too."""
        if self._peer is not None and self._peer._transport is not None:
            self._peer._transport.close()


async def run_relay(upstream: URL) -> int:
    """A relay's port."""
    server = await asyncio.get_running_loop().create_server(lambda: Relay(upstream), "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    return port


async def run_passthrough(upstream: URL) -> int:
    """A pass-through's port."""
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    async def pass_on(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        url = upstream.join(request.rel_url)
        async with session.request(request.method, url, headers=headers, data=await request.read()) as response:
            reply = web.StreamResponse(status=response.status, headers={"Content-Type": response.content_type})
            await reply.prepare(request)
            async for piece in response.content.iter_any():
                await reply.write(piece)
            await reply.write_eof()
            return reply

    async def pong(request: web.Request) -> web.Response:
        return web.Response(text="pong")

    app = web.Application()
    app.router.add_get("/ping", pong)
    app.router.add_route("*", "/{tail:.*}", pass_on)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port: int = runner.addresses[0][1]
    return port


async def main() -> None:
    """Serve."""
    run = {"relay": run_relay, "aiohttp": run_passthrough}[sys.argv[1]]
    print(f"http://127.0.0.1:{await run(URL(sys.argv[2]))}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
