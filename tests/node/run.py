"""`make test-node`: a program from npm in front of the proxy, the simulator behind it, in both protocols."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from kimi_simulator import HELLO, Simulator

from kimi_proxy import Settings, run_server

SCRIPTS = {
    **{name: name for name in ("hello", "think", "tool", "tool-bad", "json", "json-bad", "json-worse")},
    "broken": "long+cut=9",
}


async def run(protocol: str) -> int:
    """Run the tests once; the exit status of node."""
    async with Simulator() as simulator:
        service = {"KIMI_BASE_URL": simulator.url, "KIMI_AUTH_URL": simulator.url, "KIMI_PROTOCOL": protocol}
        environ = {**service, "PROXY_PORT": "0", "PROXY_STATE_DIR": "", "PROXY_DRAIN_SECONDS": "0.2"}
        async with run_server(Settings.load(environ)) as (address, _):
            tokens = {name: simulator.token(*order.split("+")) for name, order in SCRIPTS.items()}
            environment = {"PROXY_URL": address, "PROTOCOL": protocol, "TOKENS": json.dumps(tokens), "HELLO": HELLO}
            node = await asyncio.create_subprocess_exec(
                "node", str(Path(__file__).with_name("clients.mjs")), env={**os.environ, **environment}
            )
            status = await asyncio.wait_for(node.wait(), 120)
            for token in tokens.values():
                await simulator.settle(token)
            return status


if __name__ == "__main__":
    sys.exit(max([asyncio.run(run(protocol)) for protocol in ("classic", "connect")]))
