"""`make test-agents`: Claude Code and Codex CLI do one task each through the proxy, with the simulator behind it.

The task: read a file, and answer from it. Nothing but loopback is reached. The first argument is the folder into which
the agents were installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kimi_simulator import Simulator

from kimi_proxy import Settings, run_server

WORD = "the magic word is sesame-7431"


async def run_agent(command: list[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run one agent in `folder`, its home: exit status, and all that it printed."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    # Whatever the agent would call beside the proxy ends at a port where nobody listens.
    fence = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost"}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**kept, **fence, "HOME": str(folder), **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 180)
    return process.returncode or 0, out.decode("utf-8", "replace")


def make_home(place: str) -> Path:
    """An agent's home, with the file to read."""
    folder = Path(place).resolve()
    (folder / "secret.txt").write_text(f"{WORD}\n")
    return folder


def make_claude(installed: Path, address: str, token: str, task: str) -> tuple[list[str], dict[str, str]]:
    """Claude Code's command and environment."""
    command = [str(installed / "node_modules/.bin/claude"), "-p", task, "--allowedTools", "Read"]
    return command, {
        "ANTHROPIC_BASE_URL": address,
        "ANTHROPIC_AUTH_TOKEN": token,
        "ANTHROPIC_MODEL": "kimi",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
    }


def make_codex(installed: Path, address: str, token: str, task: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Codex CLI's command and environment; its settings are a file."""
    (folder / ".codex").mkdir(exist_ok=True)
    (folder / ".codex/config.toml").write_text(
        f"""model = "kimi"
model_provider = "kimi_proxy"

[model_providers.kimi_proxy]
name = "kimi_proxy"
base_url = "{address}/v1"
env_key = "KIMI_KEY"
wire_api = "responses"
"""
    )
    flags = ["exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return [str(installed / "node_modules/.bin/codex"), *flags, task], {"KIMI_KEY": token}


async def main(installed: Path) -> int:
    """Run each agent over both protocols; the exit status: 0 where all found the word."""
    failed = 0
    for protocol in ("classic", "connect"):
        async with Simulator() as simulator:
            settings = Settings(
                base_url=simulator.url, auth_url=simulator.url, protocol=protocol, port=0, state_dir="", drain_seconds=1
            )
            async with run_server(settings) as address:
                for name in ("claude", "codex"):
                    with tempfile.TemporaryDirectory() as home:
                        folder = make_home(home)
                        task = f"Read the file {folder}/secret.txt and tell me the magic word."
                        token = simulator.token("agent")
                        made = (
                            make_claude(installed, address, token, task)
                            if name == "claude"
                            else make_codex(installed, address, token, task, folder)
                        )
                        status, out = await run_agent(made[0], folder, made[1])
                        account = await simulator.settle(token)
                        good = status == 0 and WORD in out and len(account.asked) >= 2
                        print(
                            f"{'ok  ' if good else 'FAIL'} {protocol:8} {name}: {len(account.asked)} questions",
                            flush=True,
                        )
                        if not good:
                            failed += 1
                            print(f"exit status {status}\n{out[-4000:]}")
    versions = {
        name: json.loads((installed / "node_modules" / name / "package.json").read_text())["version"]
        for name in ("@anthropic-ai/claude-code", "@openai/codex")
    }
    print(f"{4 - failed} passed, {failed} failed: {versions}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]))))
