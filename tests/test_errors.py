"""Section 3: the table of failures, and that no secret gets into a message."""

from __future__ import annotations

import json
import re

import pytest

from kimi_proxy import FAILURES, ProxyError, quote_words, redact, render_error

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJlLXNpZ25hdHVyZQ"

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@pytest.mark.parametrize("code", FAILURES)
def test_every_failure_is_an_openai_error_with_the_references_number(code: str) -> None:
    error = ProxyError(code, "the part", param="p")
    value = json.loads(json.dumps(render_error(error)))
    assert value["error"] == {
        "message": error.message,
        "type": TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error"),
        "param": "p",
        "code": code,
    }
    assert value["code"] in (-2000, -2001, -2002, -2003, -2004)
    prefix, _, rest = value["message"].partition(": ")
    assert re.fullmatch(r"\[\w*[一-鿿]+\]", prefix) and rest == error.message
    assert 400 <= error.status < 600
    assert (error.status in (429, 503)) == (error.retry_after_seconds > 0)


@pytest.mark.parametrize("code", FAILURES)
def test_a_message_says_what_happened_about_what_and_what_to_do_in_one_language(code: str) -> None:
    for detail in ("", "the part"):
        english = ProxyError(code, detail, param="p")
        chinese = english.in_chinese()
        assert english.message.isascii() and re.fullmatch(r"[A-Z][^.]+\.( [A-Z`].+\.)?", english.message)
        assert re.search("[一-鿿]", chinese.message) and chinese.message.endswith("。")
        assert chinese.message.count("。") == english.message.count(". ") + 1
        assert f" ({detail})." in english.message if detail else "(the" not in english.message
        assert f"（{detail}）。" in chinese.message if detail else "（" not in chinese.message
        assert render_error(chinese)["error"] == render_error(english)["error"] | {"message": chinese.message}


@pytest.mark.parametrize(
    ("code", "status", "number"),
    [
        ("invalid_request", 400, -2000),
        ("token_missing", 401, -2002),
        ("token_dead", 401, -2002),
        ("answer_running", 429, -2001),
        ("rate_limited", 429, -2001),
        ("service_busy", 429, -2001),
        ("service_refused", 502, -2000),
        ("service_failed", 502, -2001),
        ("answer_empty", 502, -2001),
        ("service_silent", 504, -2001),
    ],
)
def test_statuses_and_numbers_that_clients_rely_on(code: str, status: int, number: int) -> None:
    assert (FAILURES[code].status, FAILURES[code].number) == (status, number)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (JWT, "…"),
        (f"Authorization: Bearer {JWT}x", "Authorization: …"),
        (f"cut {JWT[:20]} short", "cut … short"),
        ("Bearer short", "…"),
        ("bearer  short more", "… more"),
        ("https://storage.example/a/b?Signature=abc&Expires=1 end", "https://storage.example/a/b?… end"),
        ("key " + "k" * 48, "key …"),
        ("nothing to hide", "nothing to hide"),
        ("conversation d1a2b3c4e5f6a7b8c9d0", "conversation d1a2b3c4e5f6a7b8c9d0"),
    ],
)
def test_what_looks_like_a_secret_is_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_quoted_words_are_short_one_line_and_redacted() -> None:
    words = quote_words("a\nb\r\n" + JWT + " " + "word " * 1000)
    assert len(words) <= 300 and words.startswith("a b …") and "\n" not in words


def test_a_copy_of_an_error_is_equal_and_has_no_traceback() -> None:
    error = ProxyError("rate_limited", "d", param="p", retry_after_seconds=3, upstream_status=429)
    try:
        raise error
    except ProxyError as caught:
        copy = caught.copy()
    assert copy.__traceback__ is None
    assert render_error(copy) == render_error(error)
    assert (copy.retry_after_seconds, copy.upstream_status) == (3, 429)
