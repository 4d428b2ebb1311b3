"""`make bench-cluster`: one instance by itself, one and two behind HAProxy, with the configuration that is shipped.

What the balancer costs is its CPU time a chunk. What a second core brings is computed from CPU time as well: how many
chunks a second fill the core of the busiest instance, if it has that core for itself. Here it has not, as clients and
simulator take a core or more: the chunks a second that were reached tell of them, and are printed to show it.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from cluster import find_port
from load import Bench, NotingSimulator, Target, connect, proxy_command, proxy_environment, read_machine, start

ROUNDS: Final = 5
PACED: Final = (100, 150)  # streams, and chunks of each
FLOOD: Final = (24, 1000)
ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True)
class Moment:
    """The CPU time of each instance and of the balancer so far, in nanoseconds, and when that was."""

    instances: tuple[int, ...]
    balancer: int
    at: float


@dataclass
class Group(Target):
    """Instances behind one port, and the balancer that has it; the CPU time is that of all instances.

    Each look at the CPU time is kept: the load program looks first and last where its measuring begins and ends.
    """

    members: tuple[Target, ...] = ()
    balancer: Target | None = None
    moments: list[Moment] = field(default_factory=list)

    def cpu_ns(self) -> int:
        """The CPU time of all members so far."""
        instances = tuple(member.cpu_ns() for member in self.members)
        balancer = self.balancer.cpu_ns() if self.balancer is not None else 0
        self.moments.append(Moment(instances, balancer, time.perf_counter()))
        return sum(instances)

    def read(self, chunks: int) -> dict[str, float]:
        """What so many chunks took between the first look and the last, which are forgotten."""
        first, last = self.moments[0], self.moments[-1]
        self.moments.clear()
        spent = [now - then for now, then in zip(last.instances, first.instances, strict=True)]
        return {
            "instances": sum(spent) / chunks,
            "balancer": (last.balancer - first.balancer) / chunks,
            "full": chunks / max(spent) * 1e9,
            "reached": chunks / (last.at - first.at),
        }


async def open_instance(stack: AsyncExitStack, simulator: NotingSimulator, core: int) -> Target:
    """An instance on its core."""
    environment = proxy_environment(simulator, "classic", stack.enter_context(TemporaryDirectory()))
    port, process_id = await stack.enter_async_context(start(proxy_command(), environment, core))
    return Target("instance", port, process_id, "classic", 2)


async def open_balancer(stack: AsyncExitStack, instances: list[Target]) -> Target:
    """HAProxy before one or two instances, on whatever core is free."""
    port = find_port()
    text = (ROOT / "systemd" / "haproxy.cfg").read_text("utf-8")
    left_out = r"user|group|chroot" if len(instances) > 1 else r"user|group|chroot|server 8002"
    text = re.sub(rf"(?m)^ +({left_out}) .*\n", "", text)
    for theirs, ours in zip((8000, 8001, 8002), (port, *(one.port for one in instances)), strict=False):
        text = text.replace(f"127.0.0.1:{theirs}", f"127.0.0.1:{ours}")
    path = Path(stack.enter_context(TemporaryDirectory())) / "haproxy.cfg"
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(
        *("haproxy", "-db", "-f", str(path)), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )

    async def end() -> None:
        if process.returncode is None:
            process.terminate()
        await process.wait()

    stack.push_async_callback(end)
    balancer = Target("HAProxy", port, process.pid)
    async with asyncio.timeout(20):
        while True:
            try:
                (await connect(balancer)).close()
                return balancer
            except OSError:
                await asyncio.sleep(0.05)


async def open_group(stack: AsyncExitStack, simulator: NotingSimulator, count: int, *, behind: bool) -> Group:
    """So many instances, each on another core as far as there are, alone or behind HAProxy."""
    cores = os.cpu_count() or 1
    instances = [await open_instance(stack, simulator, number % cores) for number in range(count)]
    balancer = await open_balancer(stack, instances) if behind else None
    name = f"{count} instance{'s' if count > 1 else ''}{' behind HAProxy' if behind else ''}"
    port = instances[0].port if balancer is None else balancer.port
    return Group(name, port, 0, "classic", 2, members=tuple(instances), balancer=balancer)


async def measure(bench: Bench, group: Group) -> dict[str, float]:
    """The figures of one round, by name."""
    latencies = await bench.stream_paced(group, *PACED)
    paced = group.read(PACED[0] * PACED[1])
    await bench.flood(group, *FLOOD)
    flood = group.read(FLOOD[0] * FLOOD[1])
    return {
        "p99": latencies["p99"],
        **{f"paced {name}": value for name, value in paced.items()},
        **{f"flood {name}": value for name, value in flood.items()},
    }


# What is printed: heading, its unit, and how many of it are one.
COLUMNS: Final = {
    "paced": (
        ("paced instances", "instances", "µs", 1e3),
        ("paced balancer", "HAProxy", "µs", 1e3),
        ("p99", "p99", "ms", 1e-3),
        ("paced reached", "chunks a s", "", 1),
        ("paced full", "core full", "", 1),
    ),
    "flood": (
        ("flood instances", "instances", "µs", 1e3),
        ("flood balancer", "HAProxy", "µs", 1e3),
        ("flood reached", "chunks a s", "", 1),
        ("flood full", "core full", "", 1),
    ),
}
TITLES: Final = {
    "paced": f"{PACED[0]} streams of {PACED[1]} chunks, a chunk every 20 to 50 ms, all calls of Kimi included",
    "flood": f"{FLOOD[0]} streams of {FLOOD[1]} chunks, as fast as they come",
}


def show(way: str, groups: list[Group], rounds: list[list[dict[str, float]]]) -> None:
    """Print a table, and what it says of the balancer and of a second core, in ratios within a round."""
    columns = COLUMNS[way]
    print(f"\n{TITLES[way]}\n{'':28}" + "".join(f"{heading:>12}" for _, heading, *_ in columns))
    for at, group in enumerate(groups):
        cells = [
            f"{median(figures[at][name] for figures in rounds) / one:{'.1f' if unit else '.0f'}} {unit}".strip()
            for name, _, unit, one in columns
        ]
        print(f"{group.name:28}" + "".join(f"{cell:>12}" for cell in cells))
    brings = median(two[f"{way} full"] / one[f"{way} full"] for _, one, two in rounds)
    costs = median(one[f"{way} balancer"] / one[f"{way} instances"] for _, one, _ in rounds)
    print(f"A second core brings {brings:.2f} ×. The balancer takes {costs:.2f} × what its instance takes.")


async def main() -> int:
    """Print the tables; the exit status."""
    if shutil.which("haproxy") is None:
        print("this needs HAProxy; on Debian: sudo apt install haproxy", file=sys.stderr)
        return 1
    machine = read_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores for instances, balancer, clients and simulator alike.")
    print(
        "µs are CPU time a chunk. Core full: the chunks a second at which the busiest instance would fill a core of its"
    )
    print(
        "own, by its CPU time. The chunks a second that were reached are bound by clients and simulator, not by that."
    )
    print(f"Rounds in turn, medians of {ROUNDS}.", flush=True)
    async with NotingSimulator() as simulator, AsyncExitStack() as stack:
        assert isinstance(simulator, NotingSimulator)
        bench = Bench(simulator)
        wanted = ((1, False), (1, True), (2, True))
        groups = [await open_group(stack, simulator, count, behind=behind) for count, behind in wanted]
        rounds = [[await measure(bench, group) for group in groups] for _ in range(ROUNDS)]
        for way in COLUMNS:
            show(way, groups, rounds)
        simulator.violations.clear()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
