"""The sections of `kimi_proxy.py`, read from its banners; `make toc` prints them with their lengths.

`test_layout.py` checks with the same reader what a machine can check of the module's layout.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

MODULE = Path(__file__).parent.parent / "kimi_proxy.py"
BANNER = re.compile(r"# ==== (\d+)\. (.+?) (=+)$")


@dataclass(frozen=True)
class Section:
    """One section: its number and title, its first and last line, the top-level definitions in it."""

    number: int
    title: str
    first_line: int
    last_line: int
    nodes: tuple[ast.stmt, ...]

    @property
    def names(self) -> list[str]:
        """What the section defines, in order."""
        return [name for node in self.nodes for name in defined_names(node)]

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method in the section."""
        return [
            inner
            for node in self.nodes
            for inner in ast.walk(node)
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case _:
            return []


def read_sections(source: str) -> list[Section]:
    """The sections of a module's source; what stands before the first banner is number 1."""
    lines = source.splitlines()
    starts = [(1, 1, "Introduction")]
    for at, line in enumerate(lines, 1):
        if found := BANNER.match(line):
            starts.append((at, int(found[1]), found[2]))
    body = ast.parse(source).body
    sections = []
    for index, (first, number, title) in enumerate(starts):
        last = starts[index + 1][0] - 1 if index + 1 < len(starts) else len(lines)
        nodes = tuple(node for node in body if first <= node.lineno <= last)
        sections.append(Section(number, title, first, last, nodes))
    return sections


def length(node: ast.stmt) -> int:
    """How many lines a definition has."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> int:
    """Print the table."""
    sections = read_sections(MODULE.read_text("utf-8"))
    for section in sections:
        size = section.last_line - section.first_line + 1
        print(f"{section.number:3}. {section.title:<18} {section.first_line:5}-{section.last_line:<5} {size:5} lines")
        public = [node for node in section.nodes for name in defined_names(node) if not name.startswith("_")]
        print("     ", ", ".join(f"{defined_names(node)[0]} ({length(node)})" for node in public))
    lengths = sorted(length(function) for section in sections for function in section.functions)
    print(
        f"{len(lengths)} functions: half have {statistics.median(lengths):g} lines or fewer, "
        f"nine of ten {lengths[len(lengths) * 9 // 10]}, the longest {lengths[-1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
