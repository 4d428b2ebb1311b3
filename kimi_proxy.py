#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kimi_proxy: an OpenAI-compatible gateway in front of the Kimi web service, in one module.

A program that speaks the OpenAI API calls us (the *client*); we drive the Kimi web service (the *service*)
with the user's own refresh token (the *account*), and answer in the client's form.

    client ──HTTP──▶ handler ─▶ ChatRequest ─▶ merged text + attachments
                                                     │
                      Account (token cache) ◀── Asking ─▶ Classic | Connect: upload, open, ask, remove
                                                     │  bytes, as the network cut them
                          SSEParser / EnvelopeParser │  frames
                       ClassicAnswer / ConnectAnswer │  events (Text, Thinking, SearchHit, … Finished)
                  filters: citations, tool calls, …  │  events
    client ◀── StreamResponse ◀── reply encoder ◀────┘

Two seams carry the design, and both are plain values: *events* (whatever Kimi says, in either dialect) and
*reply encoders* (whatever form the client wants). Sections 5 to 10 do no I/O and read no clock; each section knows only what stands above it.

Run it with ``python kimi_proxy.py``; ``--help`` lists the settings, ``ask "question"`` is a terminal client,
``check`` walks every step of the service with your token. To read it, start at ``Asking`` in section 14, the one
loop through which every chat goes, then ``_chat_completions`` in section 15. What is known of the service, and how
surely, is told by the docstring of ``tests/kimi_simulator.py``; [ref], [2+], [1] and [open] below are its marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__version__: Final = "1.0.0"


# ==== 3. Errors =============================================================
#
# Every failure has one code: the same word here, in the log line, in the client's answer and in the README's table.
# `FAILURES` gives it a status, OpenAI's error type and the number by which clients of the reference know it [ref].
# A message quotes the service where that helps, redacted, and never the client's text.


@dataclass(frozen=True, slots=True)
class Failure:
    """What one kind of failure looks like to a client."""

    status: int
    type: str
    number: int
    text: str
    retry_after_seconds: int = 0


_REQUEST, _AUTHENTICATION, _LIMIT, _SERVICE = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "api_error",
)
_WORDS = {
    -2000: "请求参数非法",
    -2001: "请求kimi失败",
    -2002: "Token已失效",
    -2003: "远程文件URL非法",
    -2004: "远程文件超出大小",
}

FAILURES: Final[Mapping[str, Failure]] = {
    "invalid_json": Failure(400, _REQUEST, -2000, "the body is not the JSON it should be"),
    "invalid_request": Failure(400, _REQUEST, -2000, "the request is not valid"),
    "token_missing": Failure(401, _AUTHENTICATION, -2002, "send `Authorization: Bearer <refresh token>`"),
    "token_dead": Failure(
        401,
        _AUTHENTICATION,
        -2002,
        "Kimi refused this refresh token. Log in at the Kimi web page and copy a new one: browser developer tools, "
        "Application, Local Storage, refresh_token",
    ),
    "token_expired": Failure(
        401, _AUTHENTICATION, -2002, "this access token has expired; send a refresh token, which renews itself"
    ),
    "not_found": Failure(404, _REQUEST, -2000, "there is nothing at this path"),
    "conversation_not_found": Failure(404, _REQUEST, -2000, "this conversation is not known to the account"),
    "method_not_allowed": Failure(405, _REQUEST, -2000, "this path does not take that method"),
    "body_timeout": Failure(408, _REQUEST, -2000, "the body of the request did not arrive in time"),
    "body_too_large": Failure(413, _REQUEST, -2000, "the body of the request is too large"),
    "answer_running": Failure(
        429, _LIMIT, -2001, "Kimi is still answering another question of this account; try again shortly", 5
    ),
    "rate_limited": Failure(429, _LIMIT, -2001, "Kimi limits this account for now", 60),
    "quota_used_up": Failure(429, _LIMIT, -2001, "this account's research quota is used up", 60),
    "internal_error": Failure(500, _SERVICE, -2001, "the proxy itself failed; its log has the traceback"),
    "service_refused": Failure(502, _SERVICE, -2000, "Kimi did not accept a call"),
    "service_failed": Failure(502, _SERVICE, -2001, "Kimi failed"),
    "service_moved": Failure(502, _SERVICE, -2001, "Kimi no longer answers in this protocol; see KIMI_PROTOCOL"),
    "service_unreachable": Failure(502, _SERVICE, -2001, "Kimi cannot be reached; check the network and KIMI_BASE_URL"),
    "answer_broken": Failure(502, _SERVICE, -2001, "Kimi's answer broke off or cannot be read"),
    "answer_empty": Failure(502, _SERVICE, -2001, "Kimi ended its answer without any text; try again"),
    "shutting_down": Failure(503, _SERVICE, -2001, "the proxy is shutting down; try again shortly", 5),
    "service_silent": Failure(504, _SERVICE, -2001, "Kimi sent nothing for too long; try again"),
    "answer_too_long": Failure(504, _SERVICE, -2001, "Kimi's answer did not end in time; see KIMI_ANSWER_SECONDS"),
}

_SECRETS = re.compile(
    r"eyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?"  # a JSON Web Token (RFC 7519)
    r"|(?i:bearer\s+)\S+"
    r"|(?<=[?])[^\s\"'<>]+=[^\s\"'<>]*"  # a query, signed ones among them
    r"|[A-Za-z0-9_~+-]{40,}"
)


def redact(text: str) -> str:
    """`text` with all that looks like a token, a key or a signed query replaced by `…`."""
    return _SECRETS.sub("…", text)


def quote_words(text: str) -> str:
    """Words of the service or of an origin, fit for an error: redacted, on one line, 300 characters at most."""
    return " ".join(redact(text[:2000]).split())[:300]


class ProxyError(Exception):
    """A failure that a client is told about. `code` is a key of `FAILURES`; `detail` says which part, and why.

    `status` and `retry_after_seconds` default to the table's; `param` names the request's field at fault;
    `upstream_status` is the service's HTTP status where there was one, for the log.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        upstream_status: int | None = None,
    ) -> None:
        self.code = code
        self.failure = FAILURES[code]
        self.status = self.failure.status
        self.detail = detail
        self.param = param
        self.retry_after_seconds = retry_after_seconds or self.failure.retry_after_seconds
        self.upstream_status = upstream_status
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The sentence for people: the reference's prefix, what happened, what to do."""
        body = f"{self.detail} ({self.failure.text})" if self.detail else self.failure.text
        return f"[{_WORDS[self.failure.number]}]: {body}"

    def again(self) -> ProxyError:
        """An equal error without a traceback: a failure shared by many waiters is raised anew for each."""
        return type(self)(
            self.code,
            self.detail,
            param=self.param,
            retry_after_seconds=self.retry_after_seconds,
            upstream_status=self.upstream_status,
        )


class RetirementSign(ProxyError):
    """The service answered a classic call as a retired one would: `auto` asks again with connect."""


def render_error(error: ProxyError) -> dict[str, Any]:
    """OpenAI's error object, with the reference's `code` and `message` beside it [ref]."""
    return {
        "error": {
            "message": error.message,
            "type": error.failure.type,
            "param": error.param,
            "code": error.code,
        },
        "code": error.failure.number,
        "message": error.message,
    }


# ==== 6. Events =============================================================
#
# Whatever Kimi says, in either dialect, becomes one small closed set of values. Nothing after this point asks which
# dialect spoke; `Opened.hits_inline` alone tells how its search hits are shown. The two commonest are plain slotted
# classes, which are cheaper to make than frozen dataclasses.

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Opened:
    """The conversation exists: always the first event of an answer.

    `hits_inline`: search hits are shown where they arrive, in the reference's words; else as a numbered list at the end.
    """

    conversation_id: str
    hits_inline: bool


class Text:
    """A piece of the answer's own text, never empty."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and other.text == self.text

    def __hash__(self) -> int:
        return hash(("Text", self.text))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.text)} characters)"


class Thinking:
    """A piece of what the model thought before it answered, never empty."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thinking) and other.text == self.text

    def __hash__(self) -> int:
        return hash(("Thinking", self.text))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.text)} characters)"


@dataclass(frozen=True, slots=True, repr=False)
class SearchHit:
    """A page that the service's search found. `key` is the service's name for it (`web_search:1#2`), or empty."""

    title: str
    url: str
    key: str = ""

    def __repr__(self) -> str:
        return f"SearchHit({len(self.title)} characters)"


@dataclass(frozen=True, slots=True)
class Citation:
    """A place in the text that cites a hit, shown as `[number]`. Comes in order with the `Text` around it."""

    number: int
    hit: SearchHit


@dataclass(frozen=True, slots=True)
class Sources:
    """All hits of an answer whose hits are listed at its end, each once, in the list's order: number 1 first."""

    hits: tuple[SearchHit, ...]


@dataclass(frozen=True, slots=True, repr=False)
class ToolCall:
    """A call of one of the client's tools. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def __repr__(self) -> str:
        return f"ToolCall({len(self.arguments)} characters)"


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is over: always the last event.

    `message_id` is the service's id of this answer, to continue from (connect); `segment_id` is what classic's
    continuation wants after its length limit; `stop_sequence` is the client's stop text that ended the answer.
    """

    reason: FinishReason
    message_id: str = ""
    segment_id: str = ""
    stop_sequence: str = ""


Event = Opened | Text | Thinking | SearchHit | Citation | Sources | ToolCall | Finished

