"""Section 8: filters, events in and events out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    Citation,
    CitationFilter,
    Event,
    Finished,
    Opened,
    SearchHit,
    Sources,
    Text,
    Thinking,
    apply_filters,
)

A = SearchHit("A", "https://aa.cd", "web_search:1#1")
B = SearchHit("B", "https://bb.cd", "web_search:1#2")
A_AGAIN = SearchHit("A", "https://aa.cd", "web_search:2#1")
OPENED = Opened("c1", hits_inline=False)
END = Finished("stop")


def mark(*keys: str, separator: str = "\ue3a3") -> str:
    return "\ue3a0cite" + "".join(separator + key for key in keys) + "\ue3a8"


def run(text: str, cuts: list[int], hits: tuple[SearchHit, ...] = (A, B)) -> list[Event]:
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    events: list[Event] = [OPENED, *hits, *(Text(piece) for piece in pieces if piece), END]
    return apply_filters([CitationFilter()], events)


def shown(events: list[Event]) -> str:
    return "".join(
        f"[{event.number}]" if isinstance(event, Citation) else event.text
        for event in events
        if isinstance(event, Citation | Text)
    )


TEXTS: dict[str, tuple[str, str, list[str]]] = {
    "none": ("abc", "abc", ["A", "B"]),
    "one": (f"a{mark(A.key)}b", "a[1]b", ["A", "B"]),
    "in the order of first use": (f"a{mark(B.key)}b{mark(A.key)}c{mark(B.key)}", "a[1]b[2]c[1]", ["B", "A"]),
    "several in one": (f"a{mark(B.key, A.key, B.key)}b", "a[1][2]b", ["B", "A"]),
    "another separator": (f"a{mark(B.key, A.key, separator=chr(0x1F6E0))}b", "a[1][2]b", ["B", "A"]),
    "unknown": (f"a{mark('web_search:9#9')}b", "ab", ["A", "B"]),
    "older": ("a[^2^]b[^1^][^9^][^0^]", "a[1]b[2]", ["B", "A"]),
    "what only looks like one": ("a[b] [^x^] [^1] [1] ^1^ [", "a[b] [^x^] [^1] [1] ^1^ [", ["A", "B"]),
    "never closed": ("a\ue3a0cite\ue3a3web", "a", ["A", "B"]),
    "an older one never closed": ("a[^1", "a[^1", ["A", "B"]),
    "too long": ("a\ue3a0" + "x" * 600 + "b", "a\ue3a0" + "x" * 600 + "b", ["A", "B"]),
}


@pytest.mark.parametrize("name", TEXTS)
@given(data=st.data())
def test_marks_become_citations_for_any_split(name: str, data: st.DataObject) -> None:
    text, expected, titles = TEXTS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    for places in (cuts, list(range(len(text)))):
        events = run(text, places)
        assert shown(events) == expected
        assert isinstance(events[-2], Sources)
        assert [hit.title for hit in events[-2].hits] == titles
        assert events[-1] == END
        assert not any(isinstance(event, SearchHit) for event in events)


def test_a_hit_told_by_two_names_is_one_source() -> None:
    events = run(f"{mark(A.key)}{mark(A_AGAIN.key)}", [], (A, B, A_AGAIN))
    assert shown(events) == "[1][1]"
    assert events[-2] == Sources((A, B))


def test_text_that_cannot_become_a_mark_is_not_held() -> None:
    citations = CitationFilter()
    citations.feed(OPENED)
    for piece in ("a", "b]", "c^", "d["[:-1]):
        assert citations.feed(Text(piece)) == [Text(piece)]
    assert citations.feed(Text("[")) == []
    assert citations.feed(Text("x")) == [Text("[x")]


def test_inline_hits_and_thinking_pass_unchanged() -> None:
    events: list[Event] = [Opened("c1", hits_inline=True), A, Text(f"a{mark(A.key)}"), END]
    assert apply_filters([CitationFilter()], events) == events
    thinking: list[Event] = [OPENED, Thinking("[^1^]"), Text("a"), END]
    assert apply_filters([CitationFilter()], thinking) == thinking


def test_no_hits_no_list() -> None:
    assert run("a[^1^]", [], ()) == [OPENED, Text("a"), END]


def test_an_empty_chain_gives_what_it_was_given() -> None:
    events: list[Event] = [Text("a")]
    assert apply_filters([], events) is events
