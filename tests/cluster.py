"""`make test-cluster`: two instances behind HAProxy, then behind nginx, each with the configuration that is shipped.

The simulator runs in this process, the instances and the balancer in processes of their own, on free ports of this
machine. Each instance has a state directory of its own, as on two machines. Shown are: an account stays on one
instance; first bytes arrive while the answer runs; an instance that is killed takes its own streams with it and
nothing else; a rolling restart fails no request; and no question is ever asked twice.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
from kimi_simulator import HELLO, Simulator

ROOT: Final = Path(__file__).parent.parent
PROGRAMS: Final = {"haproxy": "haproxy", "nginx": "nginx-light"}
ACCOUNTS: Final = 60
STREAMS: Final = 24
WORKERS: Final = 16
CHAT: Final = "/v1/chat/completions"


class Complaint(Exception):
    """Something is not as it should be."""


def claim(good: object, words: str) -> None:
    """Complain where `good` is false."""
    if not good:
        raise Complaint(words)


def find_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def wait_for(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 20.0) -> None:
    """Return once `condition` holds, which is asked again and again: another process has no event for it."""
    end = time.monotonic() + seconds
    while not await condition():
        claim(time.monotonic() < end, f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.05)


class Instance:
    """A proxy in a process of its own, which can be killed, and started again on the same port."""

    def __init__(self, simulator: Simulator, folder: Path) -> None:
        self.port = find_port()
        self.process: asyncio.subprocess.Process | None = None
        self.log = folder / f"{self.port}.log"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("KIMI_", "PROXY_"))},
            "KIMI_BASE_URL": simulator.url,
            "KIMI_AUTH_URL": simulator.url,
            "KIMI_PROTOCOL": "classic",
            "PROXY_PORT": str(self.port),
            "PROXY_STATE_DIR": str(folder / str(self.port)),
            "PROXY_DRAIN_DELAY_SECONDS": "2",
        }

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(ROOT / "kimi_proxy.py")),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
            )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 20)
        claim(b"is ready" in line, f"an instance did not start:\n{self.log.read_text()}")

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end: the exit status."""
        if self.process is None or self.process.returncode is not None:
            return 0
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def read_metric(self, http: aiohttp.ClientSession, name: str) -> int:
        """A metric without labels."""
        async with http.get(f"http://127.0.0.1:{self.port}/metrics") as response:
            found = re.search(rf"^{name} (\d+)", await response.text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


class Cluster:
    """Two instances behind a balancer, at `url`."""

    def __init__(self, simulator: Simulator, balancer: str, folder: Path) -> None:
        self.simulator = simulator
        self.balancer = balancer
        self.folder = folder
        self.instances = [Instance(simulator, folder), Instance(simulator, folder)]
        self.port = find_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the instances, then the balancer."""
        for instance in self.instances:
            await instance.start()
        await self.start_balancer()

    def _place(self, name: str) -> str:
        """The shipped configuration, with the ports of this run."""
        text = (ROOT / "systemd" / name).read_text("utf-8")
        for port, ours in ((8000, self.port), (8001, self.instances[0].port), (8002, self.instances[1].port)):
            claim(f"127.0.0.1:{port}" in text, f"{name} does not name port {port}")
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ours}")
        return text

    async def start_balancer(self, changes: Sequence[tuple[str, str]] = ()) -> None:
        """Start the balancer with its configuration, in which `changes` replace words by others."""
        await self.stop_balancer()
        path = self.folder / "balancer.conf"
        if self.balancer == "haproxy":
            path.write_text(self._place("haproxy.cfg"))
            command = ["haproxy", "-db", "-f", str(path)]
        else:
            # nginx obeys the proxy's X-Accel-Buffering by itself: it is told not to, to see what the file does.
            server = self._place("nginx.conf")
            for words, others in (
                *changes,
                ("proxy_buffering", "proxy_ignore_headers X-Accel-Buffering; proxy_buffering"),
            ):
                server = server.replace(words, others)
            folders = "".join(
                f"{name}_temp_path {self.folder}/{name};"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            path.write_text(
                f"pid {self.folder}/pid; daemon off; error_log stderr; user root;\n"
                f"events {{}}\nhttp {{ access_log off; {folders}\n{server}\n}}\n"
            )
            command = ["nginx", "-c", str(path), "-p", str(self.folder)]
        with (self.folder / "balancer.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        async with aiohttp.ClientSession() as http:
            for _ in range(2):  # HAProxy takes an instance for good after two looks at it
                await wait_for(lambda: self._answers(http), f"{self.balancer} answers")
                await asyncio.sleep(1)

    async def _answers(self, http: aiohttp.ClientSession) -> bool:
        claim(self._process is not None and self._process.returncode is None, f"{self.balancer} ended")
        try:
            async with http.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def stop_balancer(self) -> None:
        """End the balancer; may be called twice."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    async def close(self) -> None:
        """End all."""
        await self.stop_balancer()
        await asyncio.gather(*(instance.stop(signal.SIGKILL) for instance in self.instances))

    def read_logs(self) -> str:
        """The last of what everybody wrote."""
        logs = [self.folder / "balancer.log", *(instance.log for instance in self.instances)]
        return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.exists())

    async def ask(self, http: aiohttp.ClientSession, token: str, *, stream: bool = False, as_key: bool = False) -> str:
        """One chat through the balancer: its whole body. Raises `Complaint` where it is not a good one."""
        headers = {"x-api-key": token} if as_key else {"Authorization": f"Bearer {token}"}
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "use_search": False}
        async with http.post(self.url + CHAT, json=body, headers=headers) as response:
            text = await response.text()
            claim(response.status == 200, f"HTTP {response.status}: {text[-300:]}")
        claim(not stream or text.endswith("data: [DONE]\n\n"), f"a stream without its end: {text[-300:]}")
        return text


async def show_that_accounts_stay(cluster: Cluster) -> str:
    """Each account is refreshed once, however it is named, and both instances have some."""
    tokens = [cluster.simulator.token("hello") for _ in range(ACCOUNTS)]
    async with aiohttp.ClientSession() as http:
        before = [await one.read_metric(http, "kimi_proxy_tokens_refreshed_total") for one in cluster.instances]
        for as_key in (False, True, False):
            texts = await asyncio.gather(*(cluster.ask(http, token, as_key=as_key) for token in tokens))
            claim(all(HELLO in text for text in texts), "an answer is not whole")
        after = [await one.read_metric(http, "kimi_proxy_tokens_refreshed_total") for one in cluster.instances]
    counts = {cluster.simulator.account(token).count("refresh") for token in tokens}
    claim(counts == {1}, f"accounts were refreshed {sorted(counts)} times")
    shares = [now - then for now, then in zip(after, before, strict=True)]
    claim(min(shares) >= ACCOUNTS // 6, f"the accounts are shared {shares[0]} to {shares[1]}")
    return f"{ACCOUNTS} accounts, {3 * ACCOUNTS} requests: each refreshed once, {shares[0]} and {shares[1]} an instance"


async def is_streamed(cluster: Cluster) -> bool:
    """Whether each piece of text arrives before the next is written."""
    token = cluster.simulator.token("long", "pace=0.1", "chunks=12")  # less than a buffer of nginx
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "use_search": False}
    async with (
        aiohttp.ClientSession() as http,
        http.post(cluster.url + CHAT, json=body, headers={"Authorization": f"Bearer {token}"}) as response,
    ):
        return len([piece async for piece in response.content.iter_any()]) >= 10


async def show_that_streams_flow(cluster: Cluster) -> str:
    """First bytes arrive early; with nginx also that this would be seen if they did not."""
    claim(await is_streamed(cluster), "pieces of text wait for others")
    if cluster.balancer == "haproxy":
        return "text arrives while the answer runs"
    # What comes in chunks nginx passes on in any case; so the difference is looked for where there are none.
    for setting in ("off", "on"):
        changed = (("proxy_http_version 1.1", "proxy_http_version 1.0"), ("buffering off", f"buffering {setting}"))
        await cluster.start_balancer(changed)
        claim(
            await is_streamed(cluster) is (setting == "off"),
            f"with proxy_buffering {setting} it is the other way round",
        )
    await cluster.start_balancer()
    return "text arrives while the answer runs (without chunks: so too, and not with proxy_buffering on)"


async def show_that_a_killed_instance_takes_only_its_own(cluster: Cluster) -> str:
    """Its streams break, the others end well, its accounts are served by the other one, and nothing is asked twice."""
    simulator, victim = cluster.simulator, cluster.instances[0]
    tokens = [simulator.token("long", "pace=0.05", "chunks=60") for _ in range(STREAMS)]
    async with aiohttp.ClientSession() as http:
        work = [asyncio.create_task(cluster.ask(http, token, stream=True)) for token in tokens]
        await simulator.wait_until(lambda: all(simulator.account(token).streams_open for token in tokens), 20)
        running = await victim.read_metric(http, "kimi_proxy_answers_running")
        await victim.stop(signal.SIGKILL)
        ended = await asyncio.gather(*work, return_exceptions=True)
    lost = sum(isinstance(one, BaseException) for one in ended)
    claim(0 < running < STREAMS, f"{running} of {STREAMS} streams ran on the one that was killed")
    claim(lost == running, f"{lost} streams were lost, {running} ran on the one that was killed")
    claim({simulator.account(token).count("ask") for token in tokens} == {1}, "a question was asked twice")
    again = [simulator.token("hello") for _ in range(STREAMS)]
    async with aiohttp.ClientSession() as http:
        await asyncio.gather(*(cluster.ask(http, token) for token in again))
    claim({simulator.account(token).count("ask") for token in again} == {1}, "a question was asked twice")
    await victim.start()
    await asyncio.sleep(2)
    return f"{lost} of {STREAMS} streams lost with the one killed, {STREAMS} new requests served by the other"


async def show_that_a_rolling_restart_fails_nothing(cluster: Cluster) -> str:
    """One instance after the other is restarted, under a steady load."""
    simulator, done, over = cluster.simulator, 0, False

    async def work(number: int) -> None:
        nonlocal done
        whole = simulator.token("hello")
        stream = simulator.token("long", "pace=0.02", "chunks=30")
        async with aiohttp.ClientSession() as http:
            while not over:
                is_stream = (done + number) % 3 == 0
                await cluster.ask(http, stream if is_stream else whole, stream=is_stream)
                done += 1

    workers = [asyncio.create_task(work(number)) for number in range(WORKERS)]
    try:
        for instance in cluster.instances:
            await asyncio.sleep(1)
            status = await instance.stop()
            claim(status == 0, f"an instance ended with status {status}")
            await instance.start()
            await asyncio.sleep(2)
    finally:
        over = True
        ended = await asyncio.gather(*workers, return_exceptions=True)
    failures = [one for one in ended if isinstance(one, BaseException)]
    claim(not failures, f"{len(failures)} requests failed after {done} good ones, the first: {failures[:1]!r}")
    claim(done > 100, f"only {done} requests: no load")
    return f"{done} requests through two restarts, none failed"


SHOWN: Final = (
    show_that_accounts_stay,
    show_that_streams_flow,
    show_that_a_killed_instance_takes_only_its_own,
    show_that_a_rolling_restart_fails_nothing,
)


async def show(balancer: str) -> int:
    """All of it with one balancer; how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        async with AsyncExitStack() as stack:
            simulator = await stack.enter_async_context(Simulator(unsteady=False))
            cluster = Cluster(simulator, balancer, Path(folder))
            stack.push_async_callback(cluster.close)
            try:
                await cluster.start()
                for one in SHOWN:
                    print(f"ok   {balancer:8} {await one(cluster)}", flush=True)
                claim(not simulator.violations, f"the simulator complains: {set(simulator.violations)}")
            except (Complaint, TimeoutError) as complaint:
                failed = 1
                print(f"FAIL {balancer:8} {complaint or type(complaint).__name__}\n{cluster.read_logs()}", flush=True)
            simulator.violations.clear()
    return failed


def main() -> int:
    """The exit status: 0 where all holds."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        print(f"this needs HAProxy and nginx; on Debian: sudo apt install {' '.join(missing)}", file=sys.stderr)
        return 1
    failed = sum(asyncio.run(show(balancer)) for balancer in PROGRAMS)
    print(f"{len(PROGRAMS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
