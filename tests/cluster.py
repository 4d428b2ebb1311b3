"""`make test-cluster`: two instances behind HAProxy, then behind nginx, each with the configuration that is shipped.

The simulator runs in this process, the instances and the balancer in processes of their own, on free ports of this
machine, which end with this one however it ends. Each instance has a state directory of its own, as on two machines,
so that nothing but the balancer keeps an account on one of them. `SHOWN` lists what is looked at; each question has a
number, so that one that came twice would be seen. Linux only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import aiohttp
from kimi_simulator import Account, Simulator

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = {"haproxy": "haproxy", "nginx": "nginx-light", "setpriv": "util-linux"}
BALANCERS: Final = ("haproxy", "nginx")
WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL")  # what is started ends with this process, however it ends
ACCOUNTS: Final = 60
STREAMS: Final = 24
WORKERS: Final = 16
CHAT: Final = "/v1/chat/completions"
MOST_SECONDS: Final = 120.0  # with one balancer
NEVER_SECONDS: Final = 2.0  # what has not come by then does not come

# How to break a configuration, to see that it is seen.
BLIND: Final = {  # to whose request it is
    "haproxy": (("balance hash var(txn.key)", "balance roundrobin"),),
    "nginx": (("hash $kimi_proxy_key consistent;", ""),),
}
HOLDING: Final = {  # answers back until they are over; nginx passes on what comes in chunks in any case
    "haproxy": (("balance hash", "http-response wait-for-body time 20s\n    balance hash"),),
    "nginx": (("proxy_http_version 1.1", "proxy_http_version 1.0"), ("proxy_buffering off", "proxy_buffering on")),
}


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
        self.url = f"http://127.0.0.1:{self.port}"
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
                *(*WITH_PARENT, sys.executable, str(ROOT / "kimi_proxy.py"), "--env-file", os.devnull),
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
        async with http.get(f"{self.url}/metrics") as response:
            found = re.search(rf"^{name} (\d+)", await response.text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


class Cluster:
    """Two instances behind a balancer, at `url`, and what was asked of them: each question with its answer's fate."""

    def __init__(self, simulator: Simulator, balancer: str, folder: Path) -> None:
        self.simulator = simulator
        self.balancer = balancer
        self.folder = folder
        self.instances = [Instance(simulator, folder), Instance(simulator, folder)]
        self.port = find_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.asked: dict[str, bool] = {}  # whether it was answered
        self._numbers = count(1)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the instances, then the balancer."""
        for instance in self.instances:
            await instance.start()
        await self.start_balancer()

    def _place(self, name: str, changes: Sequence[tuple[str, str]]) -> str:
        """The shipped configuration, with the ports of this run, and `changes`: words and others for them."""
        text = (ROOT / "systemd" / name).read_text("utf-8")
        ports = ((8000, self.port), (8001, self.instances[0].port), (8002, self.instances[1].port))
        for words, others in (
            *((f"127.0.0.1:{port}", f"127.0.0.1:{ours}") for port, ours in ports),
            *changes,
        ):
            claim(words in text, f"{name} has no {words!r}")
            text = text.replace(words, others)
        return text

    def _write_haproxy(self, path: Path, changes: Sequence[tuple[str, str]]) -> list[str]:
        """But for the user that it becomes: that takes root, and what `WITH_PARENT` does would be undone by it."""
        path.write_text(re.sub(r"(?m)^ +(user|group|chroot) .*\n", "", self._place("haproxy.cfg", changes)))
        return ["haproxy", "-db", "-f", str(path)]

    def _write_nginx(self, path: Path, changes: Sequence[tuple[str, str]]) -> list[str]:
        """Around the shipped file stands what Debian's nginx.conf has, in a folder of this run, and one thing more:
        nginx obeys the proxy's X-Accel-Buffering by itself, and must not, as what the file does is to be seen.
        """
        folders = "".join(
            f"{name}_temp_path {self.folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        path.write_text(
            f"pid {self.folder}/nginx.pid;\ndaemon off;\nmaster_process off;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{folders}proxy_ignore_headers X-Accel-Buffering;\n"
            f"{self._place('nginx.conf', changes)}}}\n"
        )
        return ["nginx", "-c", str(path), "-p", str(self.folder)]

    async def start_balancer(self, changes: Sequence[tuple[str, str]] = ()) -> None:
        """Start the balancer, or start it anew, with its configuration and `changes` of that."""
        await self.stop_balancer()
        write = {"haproxy": self._write_haproxy, "nginx": self._write_nginx}[self.balancer]
        command = write(self.folder / "balancer.conf", changes)
        with (self.folder / "balancer.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*WITH_PARENT, *command, stdout=log, stderr=log)
        await wait_for(self._answers, f"{self.balancer} answers")

    async def _answers(self) -> bool:
        claim(self._process is not None and self._process.returncode is None, f"{self.balancer} ended")
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def stop_balancer(self) -> None:
        """End the balancer; may be called twice."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def close(self) -> None:
        """End all."""
        await self.stop_balancer()
        await asyncio.gather(*(instance.stop(signal.SIGKILL) for instance in self.instances))

    def read_logs(self) -> str:
        """The last of what everybody wrote."""
        logs = [self.folder / "balancer.log", *(instance.log for instance in self.instances)]
        return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.exists())

    @asynccontextmanager
    async def post(
        self, http: aiohttp.ClientSession, token: str, *, stream: bool = False, as_key: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A question through the balancer, and its response as it comes. It counts as answered where nothing is raised
        in the context.
        """
        question = f"question-{next(self._numbers)}"
        self.asked[question] = False
        headers = {"x-api-key": token, "Authorization": "Bearer x"} if as_key else {"Authorization": f"Bearer {token}"}
        headers["X-Request-Id"] = question
        messages = [{"role": "user", "content": question}]
        body: dict[str, Any] = {"messages": messages, "stream": stream, "use_search": False}
        async with http.post(self.url + CHAT, json=body, headers=headers) as response:
            yield response
            self.asked[question] = response.status == 200

    async def ask(self, http: aiohttp.ClientSession, token: str, *, stream: bool = False, as_key: bool = False) -> None:
        """Ask, and have the whole answer. Raises `Complaint` where it is not a good one."""
        async with self.post(http, token, stream=stream, as_key=as_key) as response:
            text = await response.text()
            claim(response.status == 200, f"HTTP {response.status}: {text[-300:]}")
            claim(not stream or text.endswith("data: [DONE]\n\n"), f"a stream without its end: {text[-300:]}")

    def claim_that_nothing_was_asked_twice(self) -> None:
        """What was answered reached the service once, what was not at most once."""
        bodies = [body for account in self.simulator._accounts.values() for body in account.asked]
        reached = Counter(re.findall(r"question-\d+", body["messages"][0]["content"])[0] for body in bodies)
        wrong = {
            question: reached[question]
            for question, is_answered in self.asked.items()
            if reached[question] > 1 or (is_answered and not reached[question])
        }
        claim(not wrong, f"questions that reached the service not once: {wrong}")

    async def claim_that_nothing_is_left(self) -> None:
        """No answer runs, and every conversation is removed in which something was asked, also by the killed instance.

        One whose id was on its way to that instance nobody can know of.
        """
        accounts = self.simulator._accounts.values()

        def is_settled() -> bool:
            conversations = [one for account in accounts for one in account.conversations.values() if one.asked]
            return not any(account.streams_open for account in accounts) and all(one.removed for one in conversations)

        try:
            await self.simulator.wait_until(is_settled, 10)
        except TimeoutError:
            raise Complaint("answers still run, or conversations are left") from None

    def unanswered(self) -> set[str]:
        """The questions without an answer so far."""
        return {question for question, is_answered in self.asked.items() if not is_answered}


class Load:
    """Workers that ask all the time, each with a connection and accounts of its own, as long as the context lasts.

    A request may fail where the `victim` was still alive when it was sent, else nothing may fail. Failures of the
    workers are raised at the end.
    """

    def __init__(self, cluster: Cluster, victim: Instance | None = None) -> None:
        self.done = 0
        self.lost = 0
        self._cluster = cluster
        self._victim = victim
        self._over = False
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._workers = [asyncio.create_task(self._work(number)) for number in range(WORKERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        failed = [one for one in await asyncio.gather(*self._workers, return_exceptions=True) if one is not None]
        claim(not failed, f"{len(failed)} workers failed after {self.done} good requests, the first: {failed[:1]!r}")
        claim(self.done > 5 * WORKERS, f"only {self.done} requests: no load")

    async def _work(self, number: int) -> None:
        whole = self._cluster.simulator.token("hello")
        streamed = self._cluster.simulator.token("long", "pace=0.02", "chunks=30")
        async with aiohttp.ClientSession() as http:
            while not self._over:
                is_alive = self._victim is not None and self._is_alive(self._victim)
                is_stream = (self.done + number) % 3 == 0
                try:
                    await self._cluster.ask(http, streamed if is_stream else whole, stream=is_stream)
                    self.done += 1
                except (Complaint, aiohttp.ClientError):
                    if not is_alive:
                        raise
                    self.lost += 1

    @staticmethod
    def _is_alive(instance: Instance) -> bool:
        return instance.process is not None and instance.process.returncode is None


# What is shown.


async def count_accounts(cluster: Cluster) -> list[int]:
    """How many accounts each instance knows."""
    async with aiohttp.ClientSession() as http:
        return [await one.read_metric(http, "kimi_proxy_accounts") for one in cluster.instances]


async def count_refreshes(cluster: Cluster) -> tuple[set[int], list[int]]:
    """How often accounts were refreshed, after three requests of each at once, and how many each instance has."""
    tokens = [cluster.simulator.token("hello") for _ in range(ACCOUNTS)]
    before = await count_accounts(cluster)
    async with aiohttp.ClientSession() as http:
        ways = (False, True, False)
        await asyncio.gather(*(cluster.ask(http, token, as_key=way) for token in tokens for way in ways))
    shares = [now - then for now, then in zip(await count_accounts(cluster), before, strict=True)]
    return {cluster.simulator.account(token).count("refresh") for token in tokens}, shares


async def show_that_accounts_stay(cluster: Cluster) -> str:
    """Each account is on one instance, and refreshed once, whatever header names it; both instances have some."""
    times, shares = await count_refreshes(cluster)
    claim(times == {1}, f"accounts were refreshed {sorted(times)} times")
    claim(sum(shares) == ACCOUNTS, f"of {ACCOUNTS} accounts the instances have {shares}")
    claim(min(shares) >= ACCOUNTS // 6, f"the accounts are shared {shares[0]} to {shares[1]}")
    several = ",".join(cluster.simulator.token("hello") for _ in range(2))
    before = await count_accounts(cluster)
    async with aiohttp.ClientSession() as http:
        for way in (False, True) * 3:
            await cluster.ask(http, several, as_key=way)
    after = await count_accounts(cluster)
    claim(sum(after) - sum(before) == 2, "several tokens in one header are on more than one instance")
    await cluster.start_balancer(BLIND[cluster.balancer])
    times, _ = await count_refreshes(cluster)
    claim(times != {1}, "without the hash the accounts stay as well: this shows nothing")
    await cluster.start_balancer()
    return (
        f"{ACCOUNTS} accounts, 3 requests of each at once: each refreshed once; {shares[0]} and {shares[1]} an instance"
    )


async def is_streamed(cluster: Cluster) -> bool:
    """Whether text arrives of an answer that never goes on: less than a buffer of nginx. Its client goes away."""
    token = cluster.simulator.token("long", "stall=9")
    try:
        async with (
            asyncio.timeout(NEVER_SECONDS),
            aiohttp.ClientSession() as http,
            cluster.post(http, token, stream=True) as response,
        ):
            for _ in range(5):
                await response.content.readuntil(b"\n\n")
            response.close()
    except TimeoutError:
        return False
    return True


async def count_pieces(cluster: Cluster, chunks: int) -> int:
    """In how many pieces the text arrives, where so many chunks are written, one in a tenth of a second."""
    token = cluster.simulator.token("long", "pace=0.1", f"chunks={chunks}")
    async with aiohttp.ClientSession() as http, cluster.post(http, token, stream=True) as response:
        return len([piece async for piece in response.content.iter_any()])


async def show_that_streams_flow(cluster: Cluster) -> str:
    """Each chunk arrives by itself while the answer runs, and it would be seen if none did."""
    claim(await is_streamed(cluster), "the text does not come while the answer runs")
    pieces = await count_pieces(cluster, 12)
    claim(pieces > 10, f"of 12 chunks some wait for others: {pieces} pieces")
    changes = HOLDING[cluster.balancer]
    if cluster.balancer == "nginx":
        await cluster.start_balancer(changes[:1])
        claim(await is_streamed(cluster), "without chunks the text does not come while the answer runs")
    await cluster.start_balancer(changes)
    claim(not await is_streamed(cluster), "the text comes early from a balancer that holds it back: this shows nothing")
    await cluster.start_balancer()
    return "each chunk arrives while the answer runs, and none where the balancer is told to hold it back"


def is_asked(account: Account) -> bool:
    """Whether a question has reached the service."""
    return account.count("ask") > 0


async def show_that_a_client_may_leave(cluster: Cluster) -> str:
    """An instance is told of a client that goes away, before its answer and in the middle of it."""
    simulator = cluster.simulator
    for fault, stream in (("silent=ask", False), ("silent=ask", True), ("stall=9", True)):
        token = simulator.token("long", fault)
        async with aiohttp.ClientSession() as http:
            asking = asyncio.create_task(cluster.ask(http, token, stream=stream))
            await simulator.wait_until(partial(is_asked, simulator.account(token)))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        try:
            await simulator.settle(token)
        except TimeoutError:
            raise Complaint(f"a client that left is not noticed ({fault}, stream: {stream})") from None
    return "a client that goes away is noticed, before and within its answer"


async def show_that_a_killed_instance_takes_only_its_own(cluster: Cluster) -> str:
    """Its streams break, the others end well, its accounts are served by the other one."""
    simulator, (victim, other) = cluster.simulator, cluster.instances
    tokens = [simulator.token("long", "pace=0.05", "chunks=60") for _ in range(STREAMS)]
    before = cluster.unanswered()
    async with aiohttp.ClientSession() as http, Load(cluster, victim) as load:
        work = [asyncio.create_task(cluster.ask(http, token, stream=True)) for token in tokens]
        await simulator.wait_until(lambda: all(simulator.account(token).streams_open for token in tokens), 20)
        await victim.stop(signal.SIGKILL)
        ended = await asyncio.gather(*work, return_exceptions=True)
        lost = [token for token, one in zip(tokens, ended, strict=True) if isinstance(one, BaseException)]
        claim(0 < len(lost) < STREAMS, f"{len(lost)} of {STREAMS} streams were lost with the instance")
        await asyncio.gather(*(cluster.ask(http, token) for token in lost))
    seen = set(re.findall(r"\[(question-\d+)\]", other.log.read_text())) & (cluster.unanswered() - before)
    claim(not seen, f"lost, and not with the instance that was killed: {seen}")
    await victim.start()
    return (
        f"killed under load: {len(lost)} of {STREAMS} streams and {load.lost} other requests lost with it, "
        f"{len(lost)} asked anew of the other one, {load.done} others answered"
    )


async def show_that_a_rolling_restart_fails_nothing(cluster: Cluster) -> str:
    """One instance after the other is restarted, under a steady load."""
    async with Load(cluster) as load:
        for instance in cluster.instances:
            await asyncio.sleep(1)  # of load on both
            status = await instance.stop()
            claim(status == 0, f"an instance ended with status {status}")
            await instance.start()
        await asyncio.sleep(1)
    return f"{load.done} requests through two restarts, none failed"


SHOWN: Final = (
    show_that_accounts_stay,
    show_that_streams_flow,
    show_that_a_client_may_leave,
    show_that_a_killed_instance_takes_only_its_own,
    show_that_a_rolling_restart_fails_nothing,
)


def complaints(simulator: Simulator) -> set[str]:
    """What the simulator found wrong. A removal that was on its way when its instance was killed may come again."""
    return set(simulator.violations) - {"a conversation removed twice"}


async def show(balancer: str) -> int:
    """All of it with one balancer; how many failed."""
    with tempfile.TemporaryDirectory(prefix="kimi-proxy-cluster-") as folder:
        async with Simulator(unsteady=False) as simulator:
            cluster = Cluster(simulator, balancer, Path(folder))
            try:
                async with asyncio.timeout(MOST_SECONDS):
                    await cluster.start()
                    for one in SHOWN:
                        print(f"ok   {balancer:8} {await one(cluster)}", flush=True)
                        cluster.claim_that_nothing_was_asked_twice()
                    await cluster.claim_that_nothing_is_left()
                claim(not complaints(simulator), f"the simulator complains: {complaints(simulator)}")
            except (Complaint, TimeoutError, aiohttp.ClientError, OSError) as complaint:
                print(f"FAIL {balancer:8} {str(complaint) or repr(complaint)}\n{cluster.read_logs()}", flush=True)
                return 1
            finally:
                simulator.violations.clear()
                await cluster.close()
    return 0


def main() -> int:
    """The exit status: 0 where all holds."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        print(f"this needs {', '.join(missing)}; on Debian: sudo apt install {' '.join(missing)}", file=sys.stderr)
        return 1
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # the simulator's, whose client is killed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = sum(asyncio.run(show(balancer)) for balancer in BALANCERS)
    print(f"{len(BALANCERS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
