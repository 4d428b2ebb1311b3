"""`make trace FILE=tests/wire/…`: print the frames and the events of a recorded stream. No network."""

from __future__ import annotations

import sys
from pathlib import Path

from golden import render_event

from kimi_proxy import ClassicAnswer, ProxyError, SSEParser


def main(arguments: list[str]) -> int:
    """Print what the stream in the file says, frame by frame."""
    if len(arguments) != 1:
        print("usage: make trace FILE=tests/wire/classic/hello.sse", file=sys.stderr)
        return 2
    parser, answer = SSEParser(), ClassicAnswer()
    try:
        for frame in parser.feed(Path(arguments[0]).read_bytes()):
            print(f"< {frame.event}: {frame.data}")
            for event in answer.feed(frame):
                print(f"    = {render_event(event)}")
        print("< end of the stream")
        for event in answer.finish():
            print(f"    = {render_event(event)}")
    except (ProxyError, OSError) as error:
        print(f"    ! {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
