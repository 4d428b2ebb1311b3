"""`make golden`: write the events that each recorded stream of `tests/wire/` gives beside it, for a reviewer's diff.

`index.json` lists the streams with their source, standing and date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kimi_proxy import ClassicAnswer, Event, Finished, Opened, ProxyError, SearchHit, SSEParser, Text

WIRE_FOLDER = Path(__file__).parent / "wire"


def read_index() -> dict[str, dict[str, str]]:
    """The recorded streams: path inside the folder → source, standing, date."""
    index: dict[str, dict[str, str]] = json.loads((WIRE_FOLDER / "index.json").read_text("utf-8"))
    return index


def render_event(event: Event) -> list[Any]:
    """An event as JSON: its name, then its values."""
    match event:
        case Text():
            return ["Text", event.text]
        case SearchHit():
            return ["SearchHit", event.title, event.url]
        case Opened():
            return ["Opened", event.conversation_id]
        case Finished():
            return ["Finished", event.reason]


def render_stream(path: Path) -> list[Any]:
    """The events of a recorded stream as JSON; a failure is the last of them."""
    parser, answer = SSEParser(), ClassicAnswer()
    rendered: list[Any] = []
    try:
        for frame in parser.feed(path.read_bytes()):
            rendered += map(render_event, answer.feed(frame))
        parser.finish()
        rendered += map(render_event, answer.finish())
    except ProxyError as error:
        rendered.append(["failure", error.code])
    return rendered


def main() -> int:
    """Rewrite the expected side of every stream."""
    for name in read_index():
        path = WIRE_FOLDER / name
        lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in render_stream(path))
        path.with_suffix(".json").write_text(f"[\n{lines}\n]\n", "utf-8")
        print(path.with_suffix(".json").name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
