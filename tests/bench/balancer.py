"""`make bench-cluster`: one instance by itself, one and two behind HAProxy, with the configuration that is shipped.

What the balancer costs is its CPU time a chunk. What a second core brings is seen where there is one: load and
simulator take a core too, and how many cores there are is printed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from load import Bench, NotingSimulator, Target, connect, proxy_command, proxy_environment, read_machine, start

ROUNDS: Final = 5
STREAMS: Final = 100
ROOT: Final = Path(__file__).parents[2]


@dataclass
class Group(Target):
    """Several processes behind one port; the CPU time is that of all."""

    members: tuple[Target, ...] = ()

    def cpu_ns(self) -> int:
        """The CPU time of all members so far."""
        return sum(member.cpu_ns() for member in self.members)


async def open_instance(stack: AsyncExitStack, simulator: NotingSimulator, core: int) -> Target:
    """An instance on its core."""
    environment = proxy_environment(simulator, "classic", stack.enter_context(TemporaryDirectory()))
    port, process_id = await stack.enter_async_context(start(proxy_command(), environment, core))
    return Target("instance", port, process_id, "classic", 2)


async def open_balancer(stack: AsyncExitStack, instances: list[Target]) -> tuple[int, Target]:
    """HAProxy before one or two instances, on the first core: its port, and itself."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    port = 20_000 + os.getpid() % 20_000 + len(instances)
    text = (ROOT / "systemd" / "haproxy.cfg").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    text = text.replace("127.0.0.1:8001", f"127.0.0.1:{instances[0].port}")
    if len(instances) > 1:
        text = text.replace("127.0.0.1:8002", f"127.0.0.1:{instances[1].port}")
    else:
        text = "".join(line for line in text.splitlines(keepends=True) if "server 8002" not in line)
    (folder / "haproxy.cfg").write_text(text)
    process = await asyncio.create_subprocess_exec(
        *("haproxy", "-db", "-f", str(folder / "haproxy.cfg")),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def end() -> None:
        process.terminate()
        await process.wait()

    stack.push_async_callback(end)
    balancer = Target("HAProxy", port, process.pid)
    while True:
        try:
            (await connect(balancer)).close()
            break
        except OSError:
            await asyncio.sleep(0.05)
    await asyncio.sleep(2)  # until it has looked at its instances twice
    return port, balancer


async def measure(bench: Bench, count: int, *, behind: bool) -> tuple[float, float, float]:
    """Nanoseconds of CPU a chunk of the instances and of HAProxy, and seconds of latency (p99): medians."""
    async with AsyncExitStack() as stack:
        simulator = bench.simulator
        cores = os.cpu_count() or 1
        instances = [await open_instance(stack, simulator, number % cores) for number in range(count)]
        port, balancer = await open_balancer(stack, instances) if behind else (instances[0].port, None)
        group = Group("group", port, 0, "classic", 2, members=tuple(instances))
        figures, cost = [], []
        for _ in range(ROUNDS):
            before = balancer.cpu_ns() if balancer is not None else 0
            figures.append(await bench.stream_paced(group, STREAMS, 150))
            after = balancer.cpu_ns() if balancer is not None else 0
            cost.append((after - before) / (STREAMS * 150))
        return median(one["whole"] for one in figures), median(cost), median(one["p99"] for one in figures)


async def main() -> int:
    """Print the table; the exit status."""
    if shutil.which("haproxy") is None:
        print("this needs HAProxy; on Debian: sudo apt install haproxy", file=sys.stderr)
        return 1
    machine = read_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores for instances, balancer, clients and simulator alike")
    print(f"{STREAMS} streams of 150 chunks, a chunk every 20 to 50 ms, medians of {ROUNDS}\n")
    print(f"{'':32}{'instances':>12}{'HAProxy':>12}{'p99':>12}")
    async with NotingSimulator() as simulator:
        assert isinstance(simulator, NotingSimulator)
        bench = Bench(simulator)
        for text, count, behind in (
            ("1 instance", 1, False),
            ("1 instance behind HAProxy", 1, True),
            ("2 instances behind HAProxy", 2, True),
        ):
            whole, cost, p99 = await measure(bench, count, behind=behind)
            print(f"{text:32}{whole / 1e3:9.1f} µs{cost / 1e3:9.1f} µs{p99 * 1e3:9.2f} ms", flush=True)
        simulator.violations.clear()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
