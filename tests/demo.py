"""`make demo`: the proxy as a person meets it, with the simulator in place of Kimi. No token, no network."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from kimi_simulator import Simulator

PROGRAM = str(Path(__file__).parent.parent / "kimi_proxy.py")
NO_ENV_FILE = ("--env-file", os.devnull)  # the settings of whoever looks on are not ours
SCENES = (
    ("A streamed answer", "long+pace=0.04+chunks=40", ["Count to forty."], 0),
    ("An answer with web search", "search+pace=0.4", ["Who makes Kimi?"], 0),
    ("A document, read from its URL", "read", ["--file", "ORIGIN/90000+text/report.txt", "What does it say?"], 0),
    ("A failure: the token was refused", "hello+unauthorized-always=refresh", ["Hello?"], 1),
)


async def main() -> int:
    """Play the scenes; the exit status: 0 where each ended as it should."""
    async with Simulator() as simulator:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("KIMI_", "PROXY_"))},
            "KIMI_BASE_URL": simulator.url,
            "PROXY_PORT": "0",
            "PROXY_STATE_DIR": "",
            "PROXY_LOG_LEVEL": "error",
            "PROXY_ALLOW_PRIVATE_URLS": "1",  # the simulator's files are on this machine
        }
        proxy = await asyncio.create_subprocess_exec(
            *(sys.executable, PROGRAM, *NO_ENV_FILE), stdout=asyncio.subprocess.PIPE, env=environment
        )
        try:
            assert proxy.stdout is not None
            line = (await proxy.stdout.readline()).decode()
            print(line, end="")
            address = re.search(r"http://\S+", line)
            good = address is not None and all(
                [await play(address[0], simulator, *scene, environment=environment) for scene in SCENES]
            )
        finally:
            if proxy.returncode is None:
                proxy.terminate()
            await proxy.wait()
    print("\nThat was a simulator of Kimi. With your own refresh token: make run, then the README's examples.")
    return 0 if good else 1


async def play(
    url: str,
    simulator: Simulator,
    title: str,
    order: str,
    arguments: list[str],
    expected_status: int,
    *,
    environment: dict[str, str],
) -> bool:
    """Ask one question in the terminal; whether it ended as expected."""
    script, *faults = order.split("+")
    arguments = [argument.replace("ORIGIN", simulator.origin_url) for argument in arguments]
    shown = " ".join(f'"{argument}"' if " " in argument else argument for argument in arguments)
    print(f"\n── {title}\n$ python kimi_proxy.py ask {shown}", flush=True)
    asking = await asyncio.create_subprocess_exec(
        *(sys.executable, PROGRAM, "ask", *NO_ENV_FILE, *arguments, "--url", url),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.STDOUT,
        env={**environment, "KIMI_REFRESH_TOKEN": simulator.token(script, *faults)},
    )
    status = await asyncio.wait_for(asking.wait(), 30)
    if status:
        print(f"(exit status {status})", flush=True)
    return status == expected_status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
