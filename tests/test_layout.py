"""The layout of the module and of the repository, as far as a machine can check it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from toc import BANNER, MODULE, Section, defined_names, read_sections

ROOT = MODULE.parent
TITLES = {
    1: "Introduction",
    2: "Settings",
    3: "Errors",
    4: "Logs and metrics",
    5: "Wire formats",
    6: "Events",
    7: "Answers",
    8: "Tools",
    9: "Filters",
    10: "Requests",
    11: "Replies",
    12: "Tasks",
    13: "Accounts",
    14: "Files",
    15: "Kimi",
    16: "Gateway",
    17: "Access",
    18: "Server",
    19: "Service",
}
PURE = range(5, 12)
IMPURE_NAMES = {"asyncio", "time", "aiohttp", "web", "logger", "logging", "os", "secrets", "socket", "signal", "sys"}
ACROSS = {"clients", "faults", "fuzz", "hostile", "readme", "layout", "simulator", "messages_api", "responses_api"}


def check_order(source: str) -> list[str]:
    """Banners out of order, of another title or width, or without a paragraph below."""
    problems = []
    sections = read_sections(source)
    problems += [f"{b.number} after {a.number}" for a, b in pairwise(sections) if a.number >= b.number]
    problems += [f"{s.number} is {s.title}" for s in sections if TITLES.get(s.number) != s.title]
    lines = source.splitlines()
    for at, line in enumerate(lines):
        if BANNER.match(line) and (len(line) != 78 or lines[at + 1] != "#" or not lines[at + 2].startswith("# ")):
            problems.append(f"banner at line {at + 1}")
    return problems


def used_names(node: ast.AST) -> set[str]:
    """All names that a definition mentions, annotations included."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def check_dependencies(source: str) -> list[str]:
    """Names taken from a section below, and private names taken from another section."""
    sections = read_sections(source)
    home = {name: section.number for section in sections for name in section.names}
    problems = []
    for section in sections:
        for node in section.nodes:
            for name in used_names(node) & home.keys():
                if home[name] > section.number:
                    problems.append(f"section {section.number} uses {name} of section {home[name]}")
                if name.startswith("_") and not name.startswith("__") and home[name] != section.number:
                    problems.append(f"section {section.number} uses the private {name} of section {home[name]}")
    return problems


def check_purity(source: str) -> list[str]:
    """What does I/O, waits, logs or reads a clock where *pure* stands."""
    problems = []
    for section in read_sections(source):
        if section.number not in PURE:
            continue
        for node in section.nodes:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Global):
                    problems.append(f"section {section.number}: {type(inner).__name__} at line {inner.lineno}")
            problems += [f"section {section.number}: {name}" for name in used_names(node) & IMPURE_NAMES]
    return problems


def check_docstrings(source: str) -> list[str]:
    """Public classes, functions and methods without a docstring."""
    problems = []

    def look(node: ast.AST, path: str) -> None:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if inner.name.startswith("_"):
                    continue
                if ast.get_docstring(inner) is None:
                    problems.append(f"{path}{inner.name}")
                if isinstance(inner, ast.ClassDef):
                    look(inner, f"{inner.name}.")

    look(ast.parse(source), "")
    return problems


AIOHTTP = {"aiohttp", "aiohttp.web", "aiohttp.abc", "aiohttp.http_exceptions"}
INTERNALS = re.compile(r"_[^_]\w*|c_make_encoder|scan_once")
DOCUMENTED = {"os._exit"}


def check_public_api(source: str) -> list[str]:
    """Underscore attributes of anything but `self`, and imports of what a library does not document."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=owner, attr=name) if INTERNALS.fullmatch(name):
                if ast.unparse(owner) not in ("self", "cls", "super()") and ast.unparse(node) not in DOCUMENTED:
                    problems.append(f"line {node.lineno}: {ast.unparse(node)}")
            case ast.Call(func=ast.Name(id="getattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
                problems += [f"line {node.lineno}: {name!r}"] if INTERNALS.fullmatch(name) else []
            case ast.Import(names=names):
                problems += [f"import {one.name}" for one in names if is_internal(one.name)]
            case ast.ImportFrom(module=str(module), names=names):
                problems += [f"from {module}" for _ in names[:1] if is_internal(module)]
                problems += [f"from {module} import {one.name}" for one in names if one.name.startswith("_")]
                problems += ["from json.encoder"] * module.startswith("json.")
            case _:
                pass
    return [problem for problem in problems if problem != "from __future__ import annotations"]


def is_internal(module: str) -> bool:
    """Whether a module is one of aiohttp's that its documentation does not name."""
    return module.partition(".")[0] == "aiohttp" and module not in AIOHTTP


MAX_LINES, MAX_BYTES, MAX_CLASS_LINES = 7365, 372_800, 250  # on the way to 6,000 lines


def check_sizes(source: str) -> list[str]:
    """What is too long: the module, a class, more than half or a tenth of the functions."""
    lines = len(source.splitlines())
    problems = [f"{lines} lines"] if lines > MAX_LINES else []
    problems += [f"{len(source.encode())} bytes"] if len(source.encode()) > MAX_BYTES else []
    lengths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if not isinstance(node, ast.ClassDef):
                lengths.append(length)
            elif length > MAX_CLASS_LINES:
                problems.append(f"class {node.name} has {length} lines")
    lengths.sort()
    for share, most in ((0.5, 10), (0.9, 35)):
        if lengths and (length := lengths[int(len(lengths) * share)]) >= most:
            problems.append(f"{share:.0%} of the functions have up to {length} lines")
    return problems


CHECKS = [check_order, check_dependencies, check_purity, check_docstrings, check_public_api, check_sizes]


@pytest.mark.parametrize("check", CHECKS)
def test_the_module_keeps_its_layout(check: object) -> None:
    assert callable(check)
    assert check(MODULE.read_text("utf-8")) == []


def banner(number: int, title: str) -> str:
    return f"# ==== {number}. {title} ".ljust(78, "=") + "\n#\n# What it is for.\n"


BAD = {
    "order": (check_order, banner(3, "Errors") + banner(2, "Settings")),
    "title": (check_order, banner(2, "Things")),
    "paragraph": (check_order, banner(2, "Settings").splitlines()[0] + "\nx = 1\n\n"),
    "from below": (check_dependencies, banner(2, "Settings") + "def a(): return b\n" + banner(3, "Errors") + "b = 1\n"),
    "annotation from below": (
        check_dependencies,
        banner(2, "Settings") + "def a(x: B): ...\n" + banner(3, "Errors") + "class B: ...\n",
    ),
    "private": (check_dependencies, banner(2, "Settings") + "_a = 1\n" + banner(3, "Errors") + "b = _a\n"),
    "await": (check_purity, banner(7, "Answers") + "async def a(): await b\n"),
    "clock": (check_purity, banner(7, "Answers") + "def a(): return time.time()\n"),
    "logger": (check_purity, banner(11, "Replies") + "def a(): logger.info('x')\n"),
    "docstring": (check_docstrings, "class A:\n    '''a'''\n    def b(self): ...\n"),
    "private attribute": (check_public_api, "def a(response): return response._connection\n"),
    "private name": (check_public_api, "a = getattr(b, '_parser')\n"),
    "internal module": (check_public_api, "from aiohttp.client_proto import ResponseHandler\n"),
    "internal import": (check_public_api, "import aiohttp.connector\n"),
    "private import": (check_public_api, "from json import _default_encoder\n"),
    "lines": (check_sizes, "\n" * (MAX_LINES + 1)),
    "bytes": (check_sizes, f"a = '{'x' * MAX_BYTES}'\n"),
    "class": (check_sizes, "class A:\n" + "    a = 1\n" * MAX_CLASS_LINES),
    "half of the functions": (check_sizes, "def a():\n" + "    b()\n" * 10),
    "a tenth of the functions": (check_sizes, "def a(): ...\n" * 8 + ("def b():\n" + "    c()\n" * 40) * 2),
}


@pytest.mark.parametrize("name", BAD)
def test_each_check_can_fail(name: str) -> None:
    check, source = BAD[name]
    assert check(source)


def test_names_are_read_from_every_kind_of_definition() -> None:
    section: Section = read_sections("a = 1\nb: int = 2\ndef c(): ...\nclass D: ...\n")[0]
    assert section.names == ["a", "b", "c", "D"]
    assert defined_names(ast.parse("import x").body[0]) == []


def tracked_files() -> list[str]:
    """What git keeps, or would with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_level_is_the_design_cards() -> None:
    card = {"kimi_proxy.py", "requirements.txt", "README.md", "tests", "systemd", "Makefile"}
    assert {name.split("/")[0] for name in tracked_files() if not name.startswith(".")} <= card


def test_no_file_names_a_path_of_the_machine_it_was_made_on() -> None:
    pattern = re.compile(rb"(?<![\w.])/(?:work|root)/\w|shared/\w+\.md")
    found = {name for name in tracked_files() if pattern.search((ROOT / name).read_bytes())}
    assert not found


def test_every_test_file_is_of_a_section_or_goes_across() -> None:
    words = {title.split()[0].lower() for title in TITLES.values()}
    names = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert names <= words | ACROSS


def test_an_older_python_is_told_which_is_needed() -> None:
    ast.parse(MODULE.read_text("utf-8"), feature_version=(3, 9))
    program = f"import runpy, sys; sys.version_info = (3, 10, 1); runpy.run_path({str(MODULE)!r})"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert told.returncode == 1 and told.stderr.startswith("kimi_proxy needs Python 3.11 or later")
    assert len(told.stderr.splitlines()) == 1
