"""Section 6: events compare by value and show no content."""

from __future__ import annotations

import pytest

from kimi_proxy import Event, Finished, Opened, SearchHit, Text, Thinking, ToolCall


@pytest.mark.parametrize(
    "event",
    [
        Text("sesame"),
        Thinking("sesame"),
        SearchHit("sesame", "https://a.example/sesame", "sesame"),
        ToolCall("call_1", "sesame", '{"a":"sesame"}'),
    ],
)
def test_reprs_show_no_content(event: Event) -> None:
    assert "sesame" not in repr(event)


def test_events_compare_by_value_and_type() -> None:
    assert Text("a") == Text("a") != Text("b")
    assert Text("a") != Thinking("a")
    assert Opened("c", True) == Opened("c", True) and Finished("stop") != Finished("length")
