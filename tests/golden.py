"""`make golden`: write the events that each recorded stream of `tests/wire/` gives beside it, for a reviewer's diff.

`index.json` lists the streams with their source, standing and date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kimi_proxy import (
    Chain,
    Citation,
    CitationFilter,
    ClassicAnswer,
    ConnectAnswer,
    EnvelopeParser,
    Event,
    Finished,
    Opened,
    ProxyError,
    SearchHit,
    Sources,
    SSEParser,
    Text,
    ToolCall,
    WireError,
)

WIRE_FOLDER = Path(__file__).parent / "wire"


def read_index() -> dict[str, dict[str, str]]:
    """The recorded streams: path inside the folder → source, standing, date."""
    index: dict[str, dict[str, str]] = json.loads((WIRE_FOLDER / "index.json").read_text("utf-8"))
    return index


def render_event(event: Event) -> list[Any]:
    """An event as JSON: its name, then its values."""
    match event:
        case Text():
            return [type(event).__name__, event.text]
        case SearchHit():
            return ["SearchHit", event.title, event.url, event.key]
        case Opened():
            return ["Opened", event.conversation_id]
        case Citation():
            return ["Citation", event.number, event.hit.url]
        case Sources():
            return ["Sources", *(hit.url for hit in event.hits)]
        case ToolCall():
            return ["ToolCall", event.name, event.arguments]
        case Finished():
            return ["Finished", event.reason]


def read_stream(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """The frames of a recorded stream as text, each with its events; the stream's end is the last."""
    data = path.read_bytes()
    parser: Any = SSEParser() if path.suffix == ".sse" else EnvelopeParser()
    answer: Any = ClassicAnswer() if path.suffix == ".sse" else ConnectAnswer()
    for frame in parser.feed(data):
        shown = frame if path.suffix == ".sse" else f"{frame[0]:#04x} {frame[1].decode()}"
        yield shown, answer.feed(frame)
    parser.finish()
    yield "end of the stream", answer.finish()


def render_stream(path: Path) -> list[Any]:
    """The events of a recorded stream as JSON; then a failure, or what is shown of a text with citations."""
    events: list[Event] = []
    failure = ""
    try:
        for _, read in read_stream(path):
            events += read
    except ProxyError as error:
        failure = error.code
    except WireError:
        failure = "wire"
    rendered = [*map(render_event, events), *([["failure", failure]] if failure else [])]
    shown, sources = "", list[str]()
    for event in Chain([CitationFilter()]).feed(events):
        if isinstance(event, Sources):
            sources = [hit.url for hit in event.hits]
        elif isinstance(event, Citation):
            shown += f"[{event.number}]"
        elif type(event) is Text:
            shown += event.text
    return [*rendered, *([["shown", shown, *sources]] if sources else [])]


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
