"""`make trace FILE=tests/wire/…`: print the frames and the events of a recorded stream. No network."""

from __future__ import annotations

import sys
from pathlib import Path

from golden import read_stream, render_event

from kimi_proxy import ProxyError, WireError


def main(arguments: list[str]) -> int:
    """Print what the stream in the file says, frame by frame."""
    if len(arguments) != 1:
        print("usage: make trace FILE=tests/wire/classic/hello.sse", file=sys.stderr)
        return 2
    try:
        for frame, events in read_stream(Path(arguments[0])):
            print(f"< {frame}")
            for event in events:
                print(f"    = {render_event(event)}")
    except (ProxyError, WireError, OSError) as error:
        print(f"    ! {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
