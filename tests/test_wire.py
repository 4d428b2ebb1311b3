"""Section 5: the SSE parser against the standard's rules, for any split; JSON that must be refused."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    EnvelopeParser,
    SSEParser,
    WireError,
    decode_base64,
    encode_envelope,
    encode_json,
    encode_sse,
    parse_json,
)

# What stands in a stream, and the data of the events that it must give.
CASES = {
    "one line": (b"data: a\n\n", ["a"]),
    "no space after the colon": (b"data:a\n\n", ["a"]),
    "one space only is taken": (b"data:  a\n\n", [" a"]),
    "several lines": (b"data: a\ndata\ndata: b\n\n", ["a\n\nb"]),
    "an empty data line is dispatched": (b"data\n\n", [""]),
    "no data, no dispatch": (b"event: x\nid: 1\n\ndata: a\n\n", ["a"]),
    "event type is for one event": (b"event: x\ndata: a\n\ndata: b\n\n", ["a", "b"]),
    "an empty event type is message": (b"event: x\nevent:\ndata: a\n\n", ["a"]),
    "comments": (b": hello\n:\ndata: a\n: more\n\n", ["a"]),
    "unknown fields": (b"name: x\nData: b\n data: c\ndata: a\n\n", ["a"]),
    "CRLF": (b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
    "CR": (b"data: a\rdata: b\r\r", ["a\nb"]),
    "mixed ends": (b"data: a\r\ndata: b\rdata: c\n\r\n", ["a\nb\nc"]),
    "CR, then an empty line": (b"data: a\r\n\ndata: b\n\n", ["a", "b"]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
    "a second byte order mark is text": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"]),
    "half a byte order mark is text": (b"\xef\xbbdata: a\n\ndata: b\n\n", ["b"]),
    "an unfinished event is dropped": (b"data: a\n\ndata: b\n", ["a"]),
    "an unfinished line is dropped": (b"data: a\n\ndata: b", ["a"]),
    "characters of several bytes": ("data: 你好👍\n\n".encode(), ["你好👍"]),
    "what is not UTF-8 is replaced": (b"data: a\xff\xe4\xbd\n\n", ["a\ufffd\ufffd"]),
    "other line ends of Unicode are text": (
        "data: a\x0b\x0c\x1c\x85\u2028b\n\n".encode(),
        ["a\x0b\x0c\x1c\x85\u2028b"],
    ),
    "retry says no event": (b"retry: 10\n\ndata: a\n\n", ["a"]),
    "nothing": (b"", []),
}


def parse_pieces(pieces: list[bytes]) -> list[str]:
    parser = SSEParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    parser.finish()
    return events


@pytest.mark.parametrize("name", CASES)
def test_the_standards_rules_hold_whole_byte_by_byte_and_with_more_behind(name: str) -> None:
    data, expected = CASES[name]
    assert parse_pieces([data]) == expected
    assert parse_pieces([data[at : at + 1] for at in range(len(data))]) == expected
    more = parse_pieces([data + b"\n\ndata: more\n\n"])
    assert more[-1] == "more"
    assert more[: len(expected)] == expected


def parse_by_the_letter(data: bytes) -> list[str]:
    """The standard's algorithm, written down as it stands there, slow and over the whole stream."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unfinished = re.split("\r\n|\n|\r", text)
    buffer = ""
    events = []
    for line in lines:
        if line == "":
            if buffer:
                events.append(buffer[:-1])
            buffer = ""
            continue
        if line.startswith(":"):
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            buffer += value + "\n"
    return events


PIECES = st.lists(
    st.sampled_from(
        [b"data", b"event", b"id", b"retry", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b"a", b"\0", b"12"]
        + ["你".encode(), b"\xe4", b"\xbd", b"\xf0\x9f", b"\xff", b"\xef\xbb\xbf", b"data: x\n\n", b": c\n"]
    ),
    max_size=40,
).map(b"".join)


@given(PIECES, st.data())
def test_any_split_gives_the_events_of_the_standards_algorithm(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    pieces = [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]
    assert parse_pieces(pieces) == parse_by_the_letter(data)


@pytest.mark.parametrize("field", [b"data: ", b": ", b"unknown"])
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_an_event_beyond_the_limit_raises_however_it_is_cut(field: bytes, size: int) -> None:
    parser = SSEParser(limit_bytes=1000)
    stream = b"data: before\n\n" + field + b"x" * 5000
    events: list[str] = []
    with pytest.raises(WireError, match="1000"):
        for at in range(0, len(stream), size):
            for event in parser.feed(stream[at : at + size]):
                events.append(event)
    assert events == ["before"]


def test_the_limit_is_on_one_event_not_on_the_stream() -> None:
    parser = SSEParser(limit_bytes=100)
    assert len(list(parser.feed(b"data: 0123456789\n\n" * 1000))) == 1000


def test_the_limit_counts_all_lines_of_an_event() -> None:
    with pytest.raises(WireError):
        list(SSEParser(limit_bytes=100).feed(b"data: 0123456789\n" * 20))


def test_a_very_long_line_in_small_pieces_costs_no_more_than_its_length() -> None:
    # Copying the line at each piece would move 45 GB here, and run into the suite's time limit.
    parser = SSEParser(limit_bytes=4_000_000)
    assert list(parser.feed(b"data: ")) == []
    for _ in range(30_000):
        assert list(parser.feed(b"0123456789" * 10)) == []
    (event,) = parser.feed(b"\n\n")
    assert len(event) == 3_000_000


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["", "done"]))
def test_what_is_encoded_is_parsed_back(data: str, event: str) -> None:
    (parsed,) = SSEParser().feed(encode_sse(data, event))
    assert parsed == "\n".join(re.split("\r\n|\r|\n", data))


HOSTILE_JSON = {
    "empty": b"",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "long number": b"1" * 5000,
    "not UTF-8": b'{"a":"\xff"}',
    "lone surrogate": b'{"a":"\\ud83d"}',
    "lone low surrogate": b'{"a":"\\uDC4D x"}',
    "lone surrogate as a key": b'{"\\ud83d":1}',
    "NaN": b"[NaN]",
    "Infinity": b"-Infinity",
    "two values": b"{} {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "unfinished": b'{"a"',
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_an_error_with_a_short_text(name: str) -> None:
    with pytest.raises(WireError) as caught:
        parse_json(HOSTILE_JSON[name])
    assert 0 < len(str(caught.value)) < 120


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\udc4d"') == "👍"


ESCAPES = ["a", "你", "👍", "\\n", "\\\\", "\\u0041", "\\ud7ff", "\\uE000"]
ESCAPES += ["\\ud83d\\udc4d", "\\uD83D\\uDC4D", "\\ud83d", "\\uDC4D"]


@given(st.lists(st.sampled_from(ESCAPES), max_size=12).map("".join))
def test_half_a_pair_is_found_wherever_it_stands(text: str) -> None:
    value = json.loads(f'"{text}"')
    if value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value):
        assert parse_json(f'["{text}"]'.encode()) == [value]
        return
    with pytest.raises(WireError, match="half"):
        parse_json(f'["{text}"]'.encode())


def test_half_a_pair_is_kept_where_it_may_be_completed() -> None:
    assert parse_json(b'"\\ud83d"', surrogates=True) == "\ud83d"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=10))
def test_json_comes_back_as_it_went(value: object) -> None:
    text = encode_json(value)
    assert "\n" not in text
    if isinstance(value, str):
        assert json.loads(text) == value.encode("utf-8", "replace").decode()


def test_the_limit_counts_bytes_not_characters() -> None:
    with pytest.raises(WireError):
        list(SSEParser(limit_bytes=100).feed("data: 你好你好你好你好你好你好你好你好".encode() * 3))


ENVELOPES = st.lists(st.tuples(st.sampled_from([0, 2, 0x80]), st.binary(max_size=40)), max_size=8)


@given(ENVELOPES, st.data())
def test_any_split_gives_the_same_envelopes(values: list[tuple[int, bytes]], draw: st.DataObject) -> None:
    data = b"".join(encode_envelope(payload, flags) for flags, payload in values)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    parser = EnvelopeParser()
    envelopes = [e for start, end in pairwise([0, *cuts, len(data)]) for e in parser.feed(data[start:end])]
    parser.finish()
    assert envelopes == values


@given(st.binary(max_size=60), st.data())
def test_any_bytes_are_envelopes_or_a_wire_error_however_cut(data: bytes, draw: st.DataObject) -> None:
    def parse(pieces: list[bytes]) -> list[object]:
        parser = EnvelopeParser(limit_bytes=20)
        seen: list[object] = []
        try:
            for piece in pieces:
                for envelope in parser.feed(piece):
                    seen.append(envelope)
            parser.finish()
        except WireError:
            seen.append("error")
        return seen

    cut = draw.draw(st.integers(0, len(data)))
    assert parse([data]) == parse([data[:cut], data[cut:]]) == parse([data[at : at + 1] for at in range(len(data))])


@pytest.mark.parametrize(
    "data",
    [
        encode_envelope(b"compressed", 1),
        b"\0\xff\xff\xff\xff",
        encode_envelope(b"x" * 1001),
    ],
)
def test_a_compressed_or_too_large_envelope_raises_after_those_before_it(data: bytes) -> None:
    envelopes = EnvelopeParser(limit_bytes=1000).feed(encode_envelope(b"a") + data)
    assert next(envelopes) == (0, b"a")
    with pytest.raises(WireError):
        next(envelopes)


def test_the_end_in_the_middle_of_an_envelope_raises() -> None:
    parser = EnvelopeParser()
    assert list(parser.feed(encode_envelope(b"abc")[:-1])) == []
    with pytest.raises(WireError, match="middle"):
        parser.finish()


def test_a_large_envelope_in_small_pieces_costs_no_more_than_its_length() -> None:
    data = encode_envelope(b"x" * 3_000_000)
    parser = EnvelopeParser(len(data))
    assert sum(len(list(parser.feed(data[at : at + 100]))) for at in range(0, len(data), 100)) == 1


def spoil_base64(text: str, spelling: str) -> str:
    """The same base64 as people write it."""
    match spelling:
        case "url":
            return text.replace("+", "-").replace("/", "_").rstrip("=")
        case "lines":
            return "\r\n ".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n"
        case _:
            return text


@given(st.binary(max_size=300), st.integers(0, 1000), st.sampled_from(["plain", "url", "lines"]), st.integers(0, 9))
def test_base64_in_any_spelling_gives_its_bytes(tail: bytes, blocks: int, spelling: str, start: int) -> None:
    data = bytes(range(256)) * blocks + tail
    text = "x" * start + spoil_base64(base64.b64encode(data).decode(), spelling)
    pieces = list(decode_base64(text, start))
    assert b"".join(pieces) == data
    assert all(len(piece) <= 65_536 for piece in pieces)


def test_padding_may_be_short_or_long() -> None:
    assert [b"".join(decode_base64(text)) for text in ("QQ", "QQ=", "QQ==", "QQ===\n")] == [b"A"] * 4


SHORT_BASE64 = ["A", "AAAAA", "A===", "QQ==QUJD", "Q=Q=", "AAA!", "文字", "%41", "\0" * 4]
LONG_BASE64 = ["=" * 200_000, "A" * 65_533, "A" * 65_534 + "==" + "A" * 4]


@pytest.mark.parametrize("text", SHORT_BASE64 + LONG_BASE64)
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(WireError):
        list(decode_base64(text))
