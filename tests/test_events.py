"""Section 6: events compare by value and show no content."""

from __future__ import annotations

import pytest

from kimi_proxy import Event, Finished, Opened, SearchHit, Text


@pytest.mark.parametrize("event", [Text("sesame"), SearchHit("sesame", "https://sesame.example/x?y=z")])
def test_reprs_show_the_shape_alone(event: Event) -> None:
    assert "sesame" not in repr(event)
    assert repr(Text("abc")) == "Text(3 characters)"


def test_events_compare_by_value() -> None:
    assert Text("a") == Text("a") != Text("b")
    assert len({Text("a"), Text("a"), Finished("stop"), Finished("stop"), Opened("c", True), Opened("c", True)}) == 3
    assert Text("a") != "a"
