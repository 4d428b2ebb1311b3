"""`make bench`: the proxy beside its floors, on one machine, in one run (Linux).

The servers share one core, clients and simulator have the other. Each round asks every server in turn, and a ratio is
taken within its round: a machine that is slower for a while is so for both. What is printed and drawn are medians. The
pass-through runs twice under two names: what the two differ by is the noise. No figure is judged here.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import memory
from load import (
    FOLDER,
    Bench,
    NotingSimulator,
    Target,
    connect,
    make_environment,
    proxy_command,
    proxy_environment,
    read_machine,
    start,
)

FLOOR: Final = "pass-through"
NAMES: Final = ("relay", FLOOR, "the same", "classic", "connect")
PROTOCOLS: Final = ("classic", "connect")
SKIPPED: Final = {"classic": 2, "connect": 3}  # events of the service before the first that shows text
_TURNS: Final = 4  # in which a round's short answers are asked for

# What is measured: name in results.json, what it is called, its unit and how many of it are one.
ROWS: Final = (
    ("steady-100", "CPU a chunk, 100 streams, steady", "µs", 1e3),
    ("whole-100", "CPU a chunk, 100 streams, whole", "µs", 1e3),
    ("steady-300", "CPU a chunk, 300 streams, steady", "µs", 1e3),
    ("whole-300", "CPU a chunk, 300 streams, whole", "µs", 1e3),
    ("p50-100", "added latency of a chunk, p50, 100 streams", "ms", 1e-3),
    ("p99-100", "added latency of a chunk, p99, 100 streams", "ms", 1e-3),
    ("p50-300", "added latency of a chunk, p50, 300 streams", "ms", 1e-3),
    ("p99-300", "added latency of a chunk, p99, 300 streams", "ms", 1e-3),
    ("flood", "CPU a chunk, as fast as they come", "µs", 1e3),
    ("short", "CPU a short whole answer, all its calls", "µs", 1e3),
    ("short-after", "the same, after 300 streams at once", "µs", 1e3),
    ("first", "time to the first chunk, all calls before it", "ms", 1e-3),
    ("idle", "memory, idle", "MB", 1_048_576),
    ("stream", "memory for each open stream", "KiB", 1024),
    ("growth", "memory that 20,000 answers leave", "MB", 1_048_576),
    ("start", "start to the first answered /ping", "ms", 1e-3),
)
Results = dict[str, dict[str, list[float]]]


class Run:
    """One run: servers, rounds, and what came of them by row and name."""

    def __init__(self, simulator: NotingSimulator, rounds: int) -> None:
        self.simulator = simulator
        self.bench = Bench(simulator)
        self.rounds = rounds
        self.results: Results = {row: {} for row, *_ in ROWS}

    def note(self, row: str, name: str, value: float) -> None:
        """Keep one figure."""
        self.results[row].setdefault(name, []).append(value)

    async def open(self, stack: AsyncExitStack, name: str) -> Target:
        """Start the server of that name."""
        url = self.simulator.url
        if name in PROTOCOLS:
            environment = proxy_environment(self.simulator, name, stack.enter_context(TemporaryDirectory()))
            port, process_id = await stack.enter_async_context(start(proxy_command(), environment, 0))
            return Target(name, port, process_id, name, SKIPPED[name])
        kind = "relay" if name == "relay" else "aiohttp"
        command = [sys.executable, str(FOLDER / "floors.py"), kind, url]
        port, process_id = await stack.enter_async_context(start(command, make_environment(), 0))
        return Target(name, port, process_id)

    async def measure_streams(self) -> None:
        """Everything that flows, in rounds."""
        async with AsyncExitStack() as stack:
            targets = [await self.open(stack, name) for name in NAMES]
            for number in range(self.rounds):
                for target in targets:
                    for streams in (100, 300):
                        figures = await self.bench.stream_paced(target, streams, 150)
                        for row, value in figures.items():
                            self.note(f"{row}-{streams}", target.name, value)
                    self.note("flood", target.name, await self.bench.flood(target))
                    self.note("first", target.name, await self.bench.time_first_chunk(target))
                await self._measure_short("short-after", targets)
                _tell(f"round {number + 1} of {self.rounds}")

    async def measure_short(self) -> None:
        """Short whole answers, by servers that were asked nothing else."""
        async with AsyncExitStack() as stack:
            targets = [await self.open(stack, name) for name in NAMES]
            for _ in range(self.rounds):
                await self._measure_short("short", targets)
        _tell("short answers")

    async def _measure_short(self, row: str, targets: list[Target]) -> None:
        """Those of one round: in turns, since the machine's speed changes within the time that they take."""
        spent = dict.fromkeys((target.name for target in targets), 0.0)
        for _ in range(_TURNS):
            for target in targets:
                spent[target.name] += await self.bench.ask_short(target)
        for name, value in spent.items():
            self.note(row, name, value / _TURNS)

    async def measure_memory(self) -> None:
        """Memory: idle after the first answer, with streams open, and after many answers."""
        for name in (FLOOR, *PROTOCOLS):
            async with AsyncExitStack() as stack:
                target = await self.open(stack, name)
                await self.bench.ask_short(target, 4, 1)
                self.note("idle", name, target.memory_bytes())
                await self.bench.stream_paced(target, 50, 150)
                before = target.memory_bytes()
                self.note("stream", name, (await self.bench.hold_streams(target, 300) - before) / 300)
                await self.bench.ask_short(target, 2000, 8)
                before = target.memory_bytes()
                for _ in range(10):
                    await self.bench.ask_short(target, 2000, 8)
                self.note("growth", name, target.memory_bytes() - before)
            _tell(f"memory of {name}")

    async def measure_start(self) -> None:
        """From the start of a process to its first answer, beside an import of aiohttp's server alone."""
        imports = [sys.executable, "-c", "import aiohttp.web"]
        async with AsyncExitStack() as stack:
            for name in (FLOOR, *PROTOCOLS):  # each once, so that what Python compiles of packages is there
                await self.open(stack, name)
        for _ in range(self.rounds):
            started = time.perf_counter()
            process = await asyncio.create_subprocess_exec(*imports, env=make_environment(), preexec_fn=_use_core_0)
            await process.wait()
            self.note("start", "import aiohttp.web", time.perf_counter() - started)
            for name in (FLOOR, *PROTOCOLS):
                async with AsyncExitStack() as stack:
                    started = time.perf_counter()
                    target = await self.open(stack, name)
                    client = await connect(target)
                    await client.ask(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                    self.note("start", name, time.perf_counter() - started)
                    client.close()
        _tell("start")


def _use_core_0() -> None:
    os.sched_setaffinity(0, {0})


def _tell(words: str) -> None:
    print(f"  {words}", file=sys.stderr, flush=True)


def summarize(results: Results) -> list[tuple[str, str, str, dict[str, float], dict[str, float]]]:
    """Each row: its key, text and unit, the medians by name, and those of the ratios to the floor in each round."""
    rows = []
    for row, text, unit, one in ROWS:
        values = results[row]
        base = values.get("import aiohttp.web") or values.get(FLOOR) or []
        medians = {name: median(found) / one for name, found in values.items()}
        ratios = {
            name: median(value / floor for value, floor in zip(found, base, strict=True) if floor > 0)
            for name, found in values.items()
            if row != "growth" and any(floor > 0 for floor in base)
        }
        rows.append((row, text, unit, medians, ratios))
    return rows


def print_table(results: Results) -> None:
    """The medians, and in brackets the ratios to the pass-through (at the start, to the import)."""
    print(f"{'':46}{'':5}" + "".join(f"{name:>18}" for name in NAMES))
    for row, text, unit, medians, ratios in summarize(results):
        cells = []
        for name in NAMES:
            shown = f"{medians[name]:.2f}" if name in medians else ""
            ratio = f" ({ratios[name]:.2f})" if name in ratios and (name != FLOOR or row == "start") else ""
            cells.append(f"{shown + ratio:>18}")
        print(f"{text:46}{unit:5}" + "".join(cells))
    print(f"{'(import of aiohttp.web alone)':46}{'ms':5}{median(results['start']['import aiohttp.web']) * 1e3:18.2f}")


COLOURS: Final = {"relay": "#9aa5b1", FLOOR: "#627d98", "classic": "#2f80ed", "connect": "#27ae60"}
DRAWN: Final = ("steady-100", "whole-100", "short", "p99-100", "first", "idle", "start")


def draw_chart(results: Results, machine: dict[str, Any]) -> str:
    """The most telling rows as bars, in SVG."""
    rows = [row for row in summarize(results) if row[0] in DRAWN]
    parts, y = [], 40
    for _, text, unit, medians, ratios in rows:
        parts.append(f'<text x="12" y="{y + 12}" font-weight="bold">{text}, {unit}</text>')
        y += 20
        most = max(medians[name] for name in COLOURS if name in medians)
        for name, colour in COLOURS.items():
            if name not in medians:
                continue
            width = 380 * medians[name] / most
            ratio = f" ({ratios[name]:.2f} ×)" if name in PROTOCOLS and name in ratios else ""
            parts.append(f'<text x="104" y="{y + 11}" text-anchor="end">{name}</text>')
            parts.append(f'<rect x="112" y="{y}" width="{width:.1f}" height="13" fill="{colour}"/>')
            parts.append(f'<text x="{118 + width:.0f}" y="{y + 11}">{medians[name]:.3g}{ratio}</text>')
            y += 17
        y += 10
    title = f"{machine['cpu']}, {machine['machine']}, Python {machine['python']}: medians, less is better"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="{y}" font-family="sans-serif" font-size="12">'
    back = f'<rect width="620" height="{y}" fill="#ffffff"/><text x="12" y="22" font-size="13">{title}</text>'
    return "\n".join([head, back, '<g fill="#1f2933">', *parts, "</g>", "</svg>", ""])


async def measure(rounds: int) -> Results:
    """All rows but those of files."""
    os.sched_setaffinity(0, {min(1, (os.cpu_count() or 1) - 1)})
    gc.disable()  # while it runs, all wait, which would be told as their latency: see `NotingSimulator.forget`
    simulator = NotingSimulator()
    async with simulator:
        run = Run(simulator, rounds)
        await run.measure_start()
        await run.measure_memory()
        await run.measure_short()
        await run.measure_streams()
        violations = set(simulator.violations)
        simulator.violations.clear()
        if violations:
            print(f"The simulator complains: {violations}")
        return run.results


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write `results.json` and `chart.svg` where all is measured."""
    parser = argparse.ArgumentParser(prog="bench.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--files", action="store_true", help="measure the memory that files take, and nothing else")
    options = parser.parse_args(argv)
    machine = read_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['machine']}, Python {machine['python']}\n", flush=True)
    if not options.files:
        results = asyncio.run(measure(options.rounds))
        print_table(results)
        if options.rounds >= 9:
            kept = {"machine": machine, "unit": "nanoseconds of CPU, seconds, bytes", "rounds": results}
            (FOLDER / "results.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
            (FOLDER / "chart.svg").write_text(draw_chart(results, machine), "utf-8")
    print()
    asyncio.run(memory.main())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
