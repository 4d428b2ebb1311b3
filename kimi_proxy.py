#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kimi_proxy: an OpenAI-compatible gateway in front of the Kimi web service, in one module.

A program that speaks the OpenAI API calls us (the *client*). We drive the Kimi web service with the user's own refresh
token (the *account*), and answer in the client's form. The path of a chat:

    client ─▶ middleware ─▶ handler ─▶ ChatRequest ─▶ Question (prompt, attachments)
                              │
                              │  async with gateway.answer(accounts, question, …) as answer:
                              │      picks an account, uploads, opens and asks, until there is something to show
                              │  while (events := await answer.read()) is not None:
                              │      bytes ─▶ SSEParser / EnvelopeParser ─▶ ClassicAnswer / ConnectAnswer ─▶ filters
                              ▼
    client ◀─ StreamResponse.write(encoder.feed(events))

Data is pulled, by `await answer.read()`, and flows through return values. Two seams carry the design, and both are
plain values: *events* (what Kimi says, in either protocol) and *encoders* (the form that the client wants). Sections 5
to 11 do no I/O and read no clock; each section uses only names from above it.

Run it with ``python kimi_proxy.py``; ``--help`` lists the settings, ``setup`` keeps your token, ``ask "question"`` is a
terminal client, ``check`` tries every step of Kimi. To read it, start at ``Gateway`` in section 16, then at the
handlers in section 18. What is known of Kimi, and how surely, is told by the docstring of ``tests/kimi_simulator.py``;
[ref], [2+], [1] and [open] below are its marks.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import struct
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader

if sys.version_info < (3, 11):  # noqa: UP036  # for whoever has an older one: so the syntax here is that of 3.9
    sys.exit("kimi_proxy needs Python 3.11 or later; this is Python " + sys.version.partition(" ")[0])

if __spec__ is None and os.name == "posix" and sys.argv[0].endswith(".py") and not sys.dont_write_bytecode:
    # Python keeps the syntax tree of a script, 17 MB, for as long as it runs. So start anew in the compiled form that
    # an import uses, where that can be written. A debugger or profiler that runs this as its script is left alone.
    SourceFileLoader("kimi_proxy", __file__).get_code("kimi_proxy")  # has it written, unless it is there and new
    compiled, source = importlib.util.cache_from_source(__file__), os.stat(__file__)
    head = struct.pack("<4s3I", importlib.util.MAGIC_NUMBER, 0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size)
    flags, words = sys.orig_argv[1 : -len(sys.argv)], sys.orig_argv[-len(sys.argv) :]
    with suppress(OSError), open(compiled, "rb") as file:
        if file.read(len(head)) == head and words == sys.argv and not sys.gettrace():
            os.execv(sys.executable, [sys.executable, *flags, compiled, *words[1:]])

if sys.path[0].endswith("__pycache__"):
    sys.path[0] = os.path.dirname(sys.path[0])  # started anew: packages may lie beside the module

if __name__ == "__main__":
    gc.disable()  # until all is loaded: there is little to free yet, and each look takes longer

import argparse
import asyncio
import base64
import binascii
import codecs
import ctypes
import difflib
import errno
import getpass
import hashlib
import io
import ipaddress
import json
import logging
import mimetypes
import operator
import platform
import random
import re
import secrets
import signal
import socket
import tempfile
import time
import traceback
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate, cycle, islice
from math import inf, isfinite
from pathlib import Path
from typing import IO, Any, ClassVar, Final, Generic, Literal, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import unquote, urljoin

try:
    import aiohttp
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError
    from yarl import URL
except ModuleNotFoundError as error:
    sys.exit(
        f"kimi_proxy: the package {error.name} is missing. Run `make run`, or in a virtual environment: "
        "python -m pip install -r requirements.txt"
    )

__version__: Final = "2.0.0"


# ==== 2. Settings ===========================================================
#
# One row per setting. Its variable and unit follow from its name, its check from the type of its default. A flag wins
# over the variable, and that over a file. Secrets have no flag: `ps` shows flags.

MEGABYTE: Final = 1_048_576
TOKEN_SHAPE: Final = re.compile(r"[!-+\--~]{1,8192}")  # of a token or a key: no whitespace, no comma
_BOOLEANS: Final = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


class SettingsError(ValueError):
    """A setting is not usable; the text is one line for whoever starts the program."""


def _kimi(default: Any, text: str, prefix: str = "KIMI_", *, secret: bool = False, **checks: object) -> Any:
    return field(default=default, metadata={"help": text, "prefix": prefix, "secret": secret, **checks})


_proxy: Final = partial(_kimi, prefix="PROXY_")


@dataclass(frozen=True, slots=True, repr=False)
class Settings:
    """Everything that can be set."""

    host: str = _proxy("127.0.0.1", "address to listen on", group="server")
    port: int = _proxy(8000, "port to listen on; 0 takes a free one", low=0, high=65_535)
    state_dir: str = _proxy("default", "where tokens are kept; default: $STATE_DIRECTORY or the user's; empty: nowhere")
    cors_origins: tuple[str, ...] = _proxy(("*",), "comma-separated origins whose web pages may call; * is any")
    drain_delay_seconds: float = _proxy(0.0, "on shutdown, only /health says 503 at first; 2 behind a balancer", low=0)
    drain_seconds: float = _proxy(30.0, "on shutdown, time for running requests to finish", low=0)
    language: str = _proxy("en", "of errors; a client gets zh by its Accept-Language, too", choices="en zh")
    base_url: str = _kimi(
        "", "Kimi's base URL; empty: https://kimi.moonshot.cn, or www.kimi.com for connect", group="Kimi"
    )
    auth_url: str = _kimi("https://auth.kimi.com", "base URL of the newer token refresh")
    web_version: str = _kimi("2.2.0", "web page's version that connect sends (x-msh-version)")
    protocol: str = _kimi("auto", "auto: classic until that is retired", choices="auto classic connect")
    system_prompt: bool = _kimi(False, "describe tools to kimi.com in a system prompt, not in the text")
    use_search: bool = _kimi(True, "search the web where neither request nor model says so")
    sources: str = _kimi("text", "how to show search hits; text: in the answer too", choices="text annotations none")
    proxy_url: str = _kimi("", "HTTP proxy for all but file URLs, http://user:password@host:port", secret=True)
    refresh_token: str = _kimi(
        "", "comma-separated refresh tokens of the accounts to hold", secret=True, group="accounts and keys"
    )
    refresh_token_file: str = _kimi("", "a file with them; relative to $CREDENTIALS_DIRECTORY first")
    api_keys: str = _proxy("", "comma-separated keys (key or name:key) that clients must send", secret=True)
    api_keys_file: str = _proxy("", "a file with them, comma-separated or one per line")
    allowed_hosts: tuple[str, ...] = _proxy((), "comma-separated host names of a proxy that holds an account")
    max_file_mb: int = _proxy(100, "largest file of a request (1 MB is 1,048,576 bytes)", group="files")
    max_inline_mb: int = _proxy(32, "files inside a request, decoded, together")
    spool_dir: str = _proxy("", "where a file of unknown length waits; empty: the system's temporary files")
    allow_private_urls: bool = _proxy(False, "let file URLs lead into private networks")
    max_requests: int = _proxy(256, "requests at once; beyond it a 503 with Retry-After", group="limits")
    queue_length: int = _proxy(16, "requests that may wait for an account that answers one at a time", low=0)
    call_seconds: float = _kimi(15.0, "limit of one ordinary call to Kimi")
    silence_seconds: float = _kimi(120.0, "limit of silence in an answer")
    answer_seconds: float = _kimi(1800.0, "limit of one whole answer")
    log_level: str = _proxy(
        "info", "debug tells of each upstream event", choices="debug info warning error", group="logs"
    )
    log_format: str = _proxy("text", "json is one JSON object per line", choices="text json")

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request: base64 takes 4 bytes for 3."""
        return self.max_inline_mb * MEGABYTE * 4 // 3 + MEGABYTE

    @classmethod
    def load(cls, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Settings:
        """The settings in `environ` and in `flags`, by name. Raises `SettingsError`."""
        chosen: dict[str, Any] = {}
        for option in fields(cls):
            source, text = option_flag(option), (flags or {}).get(option.name)
            if text is None and (text := environ.get(source := option_variable(option))) is None:
                continue
            try:
                chosen[option.name] = _parse_setting(option, text.strip())
            except ValueError as error:
                shown = "" if option.metadata["secret"] else f"={text[:80]!r}"
                raise SettingsError(f"{source}{shown}: {error}") from None
        return cls(**chosen)


def _parse_setting(option: Field[Any], text: str) -> Any:
    """The value of `text`. Raises `ValueError`, which quotes none of it."""
    checks: Mapping[str, Any] = option.metadata
    kind = type(cast(Any, option.default))
    if kind in (int, float):
        low, high = (1, 1_000_000) if kind is int else (0.01, 86_400)
        low, high = checks.get("low", low), checks.get("high", high)
        with suppress(ValueError):
            if low <= (number := kind(text)) <= high:
                return number
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number from {low} to {high}")
    if kind is bool or "choices" in checks:
        choices = _BOOLEANS if kind is bool else {word: word for word in checks["choices"].split()}
        if text.lower() not in choices:
            raise ValueError("must be true or false" if kind is bool else f"must be one of {', '.join(choices)}")
        return choices[text.lower()]
    if option.name.endswith("_url"):
        url = _check_url(text.rstrip("/"))
        if option.name == "base_url" and URL(url).path not in ("", "/"):
            raise ValueError("is Kimi's own address, without a path; the one with /v1 is the proxy's, for your program")
        return url
    if option.name == "spool_dir" and text and not os.path.isdir(text):
        raise ValueError("must be a directory that exists")
    return text if kind is str else tuple(text.replace(",", " ").split())


def _check_url(text: str) -> str:
    try:
        url = URL(text)
    except ValueError as error:  # its text may quote a password
        raise ValueError("the port is not valid" if "port" in str(error).lower() else "is not a valid URL") from None
    if url.scheme.startswith("socks"):
        raise ValueError("SOCKS is not supported; an HTTP proxy is, http://host:port")
    if text and (url.scheme not in ("http", "https") or not url.host or url.query or url.fragment):
        raise ValueError("must look like https://host or http://host:port")
    return str(url)  # encoded as needed: paths are appended to it


def option_variable(option: Field[Any]) -> str:
    """`PROXY_LOG_LEVEL`, `KIMI_PROTOCOL`."""
    return f"{option.metadata['prefix']}{option.name.upper()}"


def option_flag(option: Field[Any]) -> str:
    """`--log-level`, `--kimi-protocol`."""
    return "--" + option_variable(option).removeprefix("PROXY_").lower().replace("_", "-")


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none, perhaps no longer, each with the setting most like it."""
    known = [*map(option_variable, fields(Settings)), "PROXY_API_KEY"]
    unknown = sorted(name for name in environ if name.startswith(("KIMI_", "PROXY_")) and name not in known)
    nearest = {name: difflib.get_close_matches(name, known, 1, 0.9) for name in unknown}
    return [f"{name} (do you mean {nearest[name][0]}?)" if nearest[name] else name for name in unknown]


def describe_option(option: Field[Any]) -> tuple[str, str]:
    """Default and help of a setting, as `--help` and README show them."""
    unit = {"seconds": " s", "mb": " MB"}.get(option.name.rpartition("_")[2], "")
    value = ",".join(option.default) if isinstance(option.default, tuple) else option.default
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    choices = ", ".join(option.metadata.get("choices", "").split())
    return f"`{text or '(empty)'}`{unit}", ": ".join(filter(None, (choices, option.metadata["help"])))


def add_options(parser: argparse.ArgumentParser, *, hidden: bool) -> None:
    """Add the flags of all settings but secrets, in their groups, or `hidden` in its help. One not given is None."""
    for option in fields(Settings):
        if "group" in option.metadata:
            group = parser.add_argument_group(option.metadata["group"])
        default, text = describe_option(option)
        text = f"{text} (default {default}; {option_variable(option)})".replace("%", "%%")
        if not option.metadata["secret"]:
            shown = argparse.SUPPRESS if hidden else text
            group.add_argument(option_flag(option), dest=option.name, metavar="X", help=shown)


def read_text(path: Path) -> str:
    """The text in a file that a setting names. Raises `SettingsError`."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "") or "not a text file"
        raise SettingsError(f"{path} cannot be read ({reason})") from None


# A line of a file of settings, as Docker and systemd take it; whitespace and # begin a comment outside of quotes.
_ENV_LINE: Final = re.compile(
    r"""(?m)^\s*(?:export\s+)?((?:KIMI|PROXY)_\w+)[ \t]*=[ \t]*(["']?)(.*?)\2(?:[ \t]*(?<=[ \t])#.*)?[ \t]*$"""
)


def parse_env(text: str) -> dict[str, str]:
    """The variables in the text of a file of settings; of two with one name the last one counts."""
    return {name: value for name, _, value in _ENV_LINE.findall(text)}


# ==== 3. Errors =============================================================
#
# Every failure has one code: the same word here, in the log, in the client's answer and in the README's table. Its row
# is HTTP status, the reference's number [ref], what happened and what to do, and `Retry-After` in seconds; a detail
# goes to the end of the first sentence. A message quotes Kimi where that helps, redacted, never the client's text.


class Failure(NamedTuple):
    """One kind of failure."""

    status: int
    number: int
    text: str
    retry_after_seconds: int = 0

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of failure."""
        kind = "api_error" if self.status >= 500 else "invalid_request_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status, kind)


_COPY: Final = "Log in at the Kimi page and copy one: developer tools (F12), Application, Local Storage, refresh_token."
FAILURES: Final[Mapping[str, Failure]] = {
    "invalid_json": Failure(400, -2000, "The body is not valid JSON."),
    "invalid_request": Failure(400, -2000, "The request is not valid."),
    "body_broken": Failure(400, -2000, "The body cannot be read. Check its length and Content-Encoding."),
    "file_url_invalid": Failure(400, -2003, "This file cannot be fetched. Use a public URL that needs no login."),
    "file_unreadable": Failure(400, -2000, "Kimi cannot read this file. Try another format."),
    "previous_response_not_found": Failure(400, -2000, "There is no such response. Send the whole input instead."),
    "token_missing": Failure(401, -2002, "No token was sent. Send your refresh token as API key."),
    "token_malformed": Failure(401, -2002, f"This is no refresh token. {_COPY}"),
    "token_dead": Failure(401, -2002, f"Kimi refused this refresh token. {_COPY}"),
    "token_expired": Failure(401, -2002, "This access token has expired. Send a refresh token instead."),
    "key_refused": Failure(401, -2002, "This is none of the proxy's API keys. Ask for one whoever runs it."),
    "host_denied": Failure(403, -2000, "The proxy does not go by this name. Add it to PROXY_ALLOWED_HOSTS."),
    "origin_denied": Failure(403, -2000, "Pages from there may not call. Add their origin to PROXY_CORS_ORIGINS."),
    "file_not_found": Failure(404, -2000, "There is no such file. Upload it again: a restart of the proxy forgets it."),
    "response_not_found": Failure(404, -2000, "There is no such response of this account. A restart forgets them."),
    "not_found": Failure(404, -2000, "There is nothing at this path."),
    "model_not_found": Failure(404, -2000, "There is no such model. GET /v1/models lists those there are."),
    "conversation_not_found": Failure(404, -2000, 'No such conversation. The `conversation_id` "new" opens one.'),
    "method_not_allowed": Failure(405, -2000, "This path does not take that method."),
    "body_timeout": Failure(408, -2000, "The body did not arrive in time. Send it again, or a smaller one."),
    "body_too_large": Failure(413, -2000, "The body is too large. Send less."),
    "encoding_unknown": Failure(415, -2000, "This encoding is not known. Send the body as it is, or JSON with gzip."),
    "file_too_large": Failure(413, -2004, "The file is too large. See PROXY_MAX_FILE_MB and PROXY_MAX_INLINE_MB."),
    "tool_call_failed": Failure(422, -2001, "The model made no valid tool call, twice. Simplify the tool's schema."),
    "structured_output_failed": Failure(422, -2001, "The answer did not fit response_format, twice. Simplify it."),
    "answer_running": Failure(429, -2001, "Kimi still answers another question of this account. Wait for it.", 5),
    "queue_full": Failure(429, -2001, "This account has too many requests. Try again shortly.", 5),
    "rate_limited": Failure(429, -2001, "Kimi limits this account for now. Wait as long as Retry-After says.", 60),
    "service_busy": Failure(429, -2001, "Kimi serves paying users first for now. Try again shortly.", 30),
    "quota_used_up": Failure(429, -2001, "This account's quota is used up. Ask another model, or wait.", 3600),
    "internal_error": Failure(500, -2001, "The proxy itself failed. Its log has the traceback: please report it."),
    "service_refused": Failure(502, -2000, "Kimi refused a call. Open Kimi in a browser to see why."),
    "service_failed": Failure(502, -2001, "Kimi failed. Try again later."),
    "service_unreachable": Failure(502, -2001, "Kimi cannot be reached. Check the network and KIMI_BASE_URL."),
    "answer_broken": Failure(502, -2001, "Kimi's answer broke off, or cannot be read. Try again."),
    "answer_empty": Failure(502, -2001, "Kimi's answer has no text. Try again."),
    "file_broken": Failure(502, -2003, "The file did not arrive whole. Try again."),
    "storage_failed": Failure(502, -2001, "Kimi's storage did not take the file. Try again."),
    "state_locked": Failure(503, -2001, "Another process locks this account's state. Stop it if it hangs.", 5),
    "too_busy": Failure(503, -2001, "The proxy has too much to do. Try again shortly.", 5),
    "shutting_down": Failure(503, -2001, "The proxy shuts down. Try again shortly.", 5),
    "service_silent": Failure(504, -2001, "Kimi sent nothing for too long. Try again."),
    "answer_too_long": Failure(504, -2001, "The answer did not end within KIMI_ANSWER_SECONDS. Ask for less."),
    "file_silent": Failure(504, -2003, "The file's origin is too slow. Try again."),
    "storage_silent": Failure(504, -2001, "Kimi's storage is too slow. Try again."),
    "spool_full": Failure(507, -2001, "This file has no room in PROXY_SPOOL_DIR. Make some, and try again."),
}
# With what the older `message` begins, for the numbers -2000, -2001, … [ref].
_PREFIXES: Final = ("请求参数非法", "请求kimi失败", "Token已失效", "远程文件URL非法", "远程文件超出大小")
_COPY_IN_CHINESE: Final = "请登录 Kimi 网页，按 F12，在 Application → Local Storage 中复制 refresh_token。"
_CHINESE: Final[Mapping[str, str]] = {  # the texts for whoever reads Chinese
    "invalid_json": "请求正文不是有效的 JSON。",
    "invalid_request": "请求无效。",
    "body_broken": "无法读取请求正文。请检查长度和 Content-Encoding。",
    "file_url_invalid": "无法下载此文件。请使用无需登录的公网地址。",
    "file_unreadable": "Kimi 无法读取此文件。请换一种格式。",
    "previous_response_not_found": "没有这个回答。请改为发送完整的输入。",
    "token_missing": "没有收到 token。请将 refresh token 作为 API key 发送。",
    "token_malformed": f"这不是 refresh token。{_COPY_IN_CHINESE}",
    "token_dead": f"Kimi 拒绝了这个 refresh token。{_COPY_IN_CHINESE}",
    "token_expired": "这个 access token 已过期。请改用 refresh token。",
    "key_refused": "这不是本代理的 API key。请向代理的运行者索取。",
    "host_denied": "本代理不使用这个主机名。请将其加入 PROXY_ALLOWED_HOSTS。",
    "origin_denied": "不允许该来源的网页调用。请将其加入 PROXY_CORS_ORIGINS。",
    "file_not_found": "没有这个文件。请重新上传：代理重启后不再记得它。",
    "response_not_found": "这个账号没有这个回答。代理重启后不再保留。",
    "not_found": "此路径不存在。",
    "model_not_found": "没有这个模型。GET /v1/models 列出所有模型。",
    "conversation_not_found": '没有这个会话。`"conversation_id": "new"` 可新建会话。',
    "method_not_allowed": "此路径不支持该请求方法。",
    "body_timeout": "请求正文未及时到达。请重新发送，或减小正文。",
    "body_too_large": "请求正文过大。请减小后再发送。",
    "encoding_unknown": "不支持这种编码。请不要压缩，JSON 可用 gzip。",
    "file_too_large": "文件过大。参见 PROXY_MAX_FILE_MB 和 PROXY_MAX_INLINE_MB。",
    "tool_call_failed": "模型两次都没有给出有效的工具调用。请简化工具的 schema。",
    "structured_output_failed": "回答两次都不符合 response_format。请将其简化。",
    "answer_running": "Kimi 仍在回答这个账号的另一个问题。请等它结束。",
    "queue_full": "这个账号的请求过多。请稍后重试。",
    "rate_limited": "Kimi 暂时限制了这个账号。请按 Retry-After 等待。",
    "service_busy": "Kimi 目前优先服务付费用户。请稍后重试。",
    "quota_used_up": "这个账号的额度已用完。请换一个模型，或等待。",
    "internal_error": "代理自身出错。请报告日志中的错误信息。",
    "service_refused": "Kimi 拒绝了请求。请在浏览器中打开 Kimi 查看原因。",
    "service_failed": "Kimi 出错。请稍后重试。",
    "service_unreachable": "无法连接 Kimi。请检查网络和 KIMI_BASE_URL。",
    "answer_broken": "Kimi 的回答中断，或无法解析。请重试。",
    "answer_empty": "Kimi 的回答没有内容。请重试。",
    "file_broken": "文件没有完整到达。请重试。",
    "storage_failed": "Kimi 的存储没有接收文件。请重试。",
    "state_locked": "另一个进程锁住了这个账号的状态。如果它已卡住，请将其停止。",
    "too_busy": "代理过于繁忙。请稍后重试。",
    "shutting_down": "代理正在关闭。请稍后重试。",
    "service_silent": "Kimi 太久没有响应。请重试。",
    "answer_too_long": "回答没有在 KIMI_ANSWER_SECONDS 内结束。请缩小问题。",
    "file_silent": "文件所在的服务器太慢。请重试。",
    "storage_silent": "Kimi 的存储太慢。请重试。",
    "spool_full": "PROXY_SPOOL_DIR 中没有空间存放此文件。请腾出空间后重试。",
}

_SECRETS = re.compile(
    r"eyJ[\w-]{6,}(?:\.[\w-]*){0,2}|sk-[\w-]{16,}"  # a JSON Web Token (RFC 7519), also a cut one; a key
    r"|(?i:bearer\s+)\S+|[A-Za-z0-9_~+-]{40,}"
    r"|(?<=[?])[^\s\"'<>]+=[^\s\"'<>]*"  # a query, signed ones among them
)


def redact(text: str) -> str:
    """`text` with all that looks like a token, a key or a signed query replaced by `…`."""
    return _SECRETS.sub("…", text)


def quote_words(text: str) -> str:
    """Words of Kimi or of an origin, fit for an error: redacted, on one line, at most 300 characters."""
    return " ".join(redact(text[:2000]).split())[:300]


def quote_name(text: str) -> str:
    """A client's name for something (a path, a model), fit for a log line: redacted, at most 24 characters."""
    name = quote_words(text)
    return name if len(name) <= 24 else f"{name[:24]}…"


class ProxyError(Exception):
    """A failure that a client is told about: what failed, the field at fault, Kimi's HTTP status or 0."""

    access_token = ""  # the one that Kimi called dead, where the caller has to ask again with a new one

    def __init__(
        self, code: str, detail: str = "", *, param: str = "", retry_after_seconds: int = 0, upstream_status: int = 0
    ) -> None:
        super().__init__(code, detail)
        self.code, self.detail, self.param, self.upstream_status = code, detail, param, upstream_status
        self.failure = FAILURES[code]
        self.status = self.failure.status
        self.retry_after_seconds = retry_after_seconds or self.failure.retry_after_seconds
        what, stop, advice = self.failure.text.partition(".")
        self.message = f"{what} ({detail}){stop}{advice}" if detail else self.failure.text

    def __str__(self) -> str:
        return f"{self.code}: {self.detail or self.failure.text}"

    def copy(self) -> ProxyError:
        """An equal error without a traceback: a failure that many wait for is raised anew for each."""
        return copy(self)

    def in_chinese(self) -> ProxyError:
        """An equal error whose message is Chinese, but for what it is about."""
        error = self.copy()
        what, stop, advice = _CHINESE[self.code].partition("。")
        error.message = f"{what}（{self.detail}）{stop}{advice}" if self.detail else _CHINESE[self.code]
        return error


class ProtocolRetired(ProxyError):
    """Kimi answered a call as it would if the protocol were retired."""


def render_error(error: ProxyError) -> dict[str, Any]:
    """OpenAI's error object, with the reference's `code` and `message` beside it [ref]."""
    inner = {"message": error.message, "type": error.failure.type, "param": error.param or None, "code": error.code}
    number = error.failure.number
    return {"error": inner, "code": number, "message": f"[{_PREFIXES[-2000 - number]}]: {error.message}"}


# ==== 4. Logs and metrics ===================================================
#
# A log line says what happened, to which request, and never what was said: no token, key, message text or signed URL.
# The formatter is the second fence: tracebacks lose their messages, and other packages' lines all from the first value.

logger: Final = logging.getLogger("kimi_proxy")
request_id: Final[ContextVar[str]] = ContextVar("request_id", default="-")
_PRIORITIES: Final = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class RedactingFormatter(logging.Formatter):
    """Redacted lines with the request's id and the record's `fields`, tracebacks without messages; as text or JSON."""

    def __init__(self, form: str = "text", *, with_priority: bool = False) -> None:
        super().__init__()
        self._form = form
        self._with_priority = with_priority  # as systemd's journal reads it (sd-daemon(3))

    def format(self, record: logging.LogRecord) -> str:
        """One line, without control characters; as text, one more for each frame of a traceback."""
        text = record.getMessage()
        if record.name != logger.name:
            constant = ": ".join(str(record.msg).partition("%")[0].partition("\n")[0].split(": ")[:2])
            text = f"{record.name}: {constant[:160]}".strip()
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        level, text, told = record.levelname.lower(), _clean(text), getattr(record, "fields", {})
        told = {key: _clean(value) if isinstance(value, str) else value for key, value in told.items()}
        places = _trace(record.exc_info[1] if record.exc_info else None)
        if self._form == "text":
            priority = f"<{_PRIORITIES[record.levelno]}>" if self._with_priority else ""
            for key, value in told.items():
                text += f" {key}={json.dumps(value, ensure_ascii=False) if ' ' in str(value) else value}"
            return "\n    ".join([f"{priority}{time} {level} [{request_id.get()}] {text}", *places])
        value = {"time": time, "level": level, "request_id": request_id.get(), "message": text, **told}
        return json.dumps(value | ({"traceback": places} if places else {}), ensure_ascii=False)


def _clean(text: str) -> str:
    """`text` without secrets, on one line and without control characters."""
    text = redact(text)
    return text if text.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _trace(error: BaseException | None) -> list[str]:
    """Class and frames of `error` and its causes, without any value."""
    if error is None:
        return []
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"at {os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}" for frame in frames]
    before = _trace(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
    return [*before, f"{type(error).__module__}.{type(error).__qualname__}", *places]


class QuietFilter(logging.Filter):
    """Makes less of a client's fault, and of what asyncio says of each try to accept while it cannot."""

    _accept_failed = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        error = record.exc_info[1] if record.exc_info else None
        if record.name == "aiohttp.server" and isinstance(error, HttpProcessingError):
            record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
        if record.name == "asyncio" and re.search(r"socket\.accept\(\)|\._start_serving\(", str(record.msg)):
            before, self._accept_failed = self._accept_failed, record.created
            return record.created > before + 2
        return record.name != "aiohttp.server" or not isinstance(error, web.RequestPayloadError)  # has its own line


def configure_logging(level: str, form: str = "text") -> None:
    """Send all logging to standard error, through `RedactingFormatter`."""
    handler = logging.StreamHandler()
    to_journal = os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
    handler.setFormatter(RedactingFormatter(form, with_priority=to_journal))
    handler.addFilter(QuietFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logger.setLevel(level.upper())


# Every metric that there is: its type and what it counts (Prometheus text format, version 0.0.4).
METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "kimi_proxy_requests_total": ("labelled counter", "Requests answered, by route and status."),
    "kimi_proxy_build_info": ("labelled gauge", "The versions that run, as labels."),
    "process_start_time_seconds": ("gauge", "When the process started, in Unix seconds."),
    "process_resident_memory_bytes": ("gauge", "Memory of the process (Linux)."),
    "kimi_proxy_requests_running": ("gauge", "Requests in progress."),
    "kimi_proxy_requests_waiting": ("gauge", "Requests that wait in line for an account."),
    "kimi_proxy_queue_seconds": ("histogram", "Time in line for an account."),
    "kimi_proxy_answers_running": ("gauge", "Answers of Kimi in progress."),
    "kimi_proxy_accounts": ("gauge", "Accounts in memory."),
    "kimi_proxy_account_live": ("labelled gauge", "Whether a held account works, by its label."),
    "kimi_proxy_chunks_total": ("counter", "Pieces of answers sent to clients."),
    "kimi_proxy_failures_total": ("labelled counter", "Failures that a client was told of, by code."),
    "kimi_proxy_tokens_refreshed_total": ("counter", "Access tokens fetched."),
    "kimi_proxy_upstream_seconds": ("histogram", "Time until Kimi answered a call."),
    "kimi_proxy_first_text_seconds": ("histogram", "Time to the first piece of an answer."),
    "kimi_proxy_removals_failed_total": ("counter", "Conversations that may be left at Kimi."),
    "kimi_proxy_orphans": ("gauge", "Conversations still to be removed."),
    "kimi_proxy_orphans_dropped_total": ("counter", "Conversations given up, as too many could not be removed."),
    "kimi_proxy_denied_addresses_total": ("labelled counter", "Denied connections to file addresses, by verdict."),
    "kimi_proxy_state_failures_total": ("counter", "Failed uses of the state directory."),
    "kimi_proxy_degraded_answers_total": ("counter", "Answers that Kimi gave with a weaker model."),
    "kimi_proxy_unknown_total": ("labelled counter", "Unknown things that Kimi sent, by kind."),
}
_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, inf)


class Metrics:
    """Counts of what happened, by name and labels, and how long it took."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {name: 0 for name, (kind, _) in METRICS.items() if kind in ("counter", "gauge")}
        # How many times fell into each bucket, and at last their sum.
        self._times = {name: [0.0] * (len(_BUCKETS) + 1) for name, (kind, _) in METRICS.items() if kind == "histogram"}
        self._warned: set[tuple[str, str]] = set()

    def count(self, name: str, amount: float = 1, **labels: str) -> float:
        """Add to the counter `name`; its value then."""
        shown = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
        key = f"{name}{{{shown}}}" if shown else name
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def observe(self, name: str, seconds: float) -> None:
        """Add a time to the histogram `name`."""
        times = self._times[name]
        times[bisect_left(_BUCKETS, seconds)] += 1
        times[-1] += seconds

    def warn_once(self, what: str, name: str) -> None:
        """Count something unknown from Kimi, and log each `name` once (1,000 at most)."""
        self.count("kimi_proxy_unknown_total", what=what)
        seen = what, quote_words(name)[:60]
        if seen not in self._warned and len(self._warned) < 1000:
            self._warned.add(seen)
            logger.warning("! unknown %s from Kimi, ignored: %s", *seen)

    def render(self, gauges: Mapping[str, float]) -> str:
        """All metrics, `gauges` too, in Prometheus' text format; those without labels from 0 on."""
        lines: list[str] = []
        for name, (kind, text) in METRICS.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind.removeprefix('labelled ')}"]
            if kind == "histogram":
                *numbers, seconds = self._times[name]
                for bound, total in zip(_BUCKETS, accumulate(numbers), strict=True):
                    lines.append(f'{name}_bucket{{le="{"+Inf" if bound == inf else bound}"}} {total:.0f}')
                lines += [f"{name}_count {sum(numbers):.0f}", f"{name}_sum {seconds}"]
            values = {**self.counts, **gauges}.items()
            lines += [f"{key} {value}" for key, value in values if key.partition("{")[0] == name]
        return "\n".join(lines) + "\n"


# ==== 5. Wire formats =======================================================
#
# Bytes to values and back, without I/O. A parser's `feed` is a generator: it yields what became complete, and then
# raises `WireError` where the bytes break the format or a limit. Any split of the bytes gives the same values.


class WireError(ValueError):
    """The bytes break the format or exceed a limit. The text quotes no content."""


class SSEParser:
    """Parser of `text/event-stream` (WHATWG HTML, section 9.2.6 "Interpreting an event stream").

    `limit_bytes` bounds what is kept of an unfinished event. Fields but `data` are ignored: Kimi's data tell their own
    type, and nobody reconnects.
    """

    def __init__(self, limit_bytes: int = 1_048_576) -> None:
        self._limit_bytes = limit_bytes
        self._is_start = True
        self._after_cr = False
        self._pieces: list[bytes] = []  # of the unfinished line
        self._data: list[bytes] = []
        self._size = 0  # of the unfinished event, in bytes

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the data of the events that `data` completes. Raises `WireError` beyond the limit."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if 13 in data:  # CR
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        rest = lines.pop()
        for piece in lines:
            self._size += len(piece)
            line = piece
            if self._pieces:
                line = b"".join([*self._pieces, piece])
                self._pieces.clear()
            if self._is_start:
                line, self._is_start = line.removeprefix(codecs.BOM_UTF8), False
            if line:
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
                continue
            if self._data:
                yield b"\n".join(self._data).decode("utf-8", "replace")
            self._data, self._size = [], 0
        if rest:
            self._pieces.append(rest)
            self._size += len(rest)
        if self._size > self._limit_bytes:
            raise WireError(f"an event of more than {self._limit_bytes} bytes")

    def finish(self) -> None:
        """Nothing: at the end of the input, an event without its blank line is dropped."""


def encode_sse(data: str, event: str = "") -> bytes:
    """One event as bytes; each line of `data` becomes a `data:` line."""
    head = f"event: {event}\n" if event else ""
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(re.split(r"\r\n|\r|\n", data))
    return f"{head}data: {data}\n\n".encode()


Envelope = tuple[int, bytes | bytearray]  # the flags and the payload of one message of a Connect stream
_ENVELOPE_HEAD: Final = struct.Struct(">BI")


class EnvelopeParser:
    """Parser of Connect's envelopes (Connect protocol, "Streaming RPCs"): flags, 4 bytes big-endian length, payload.

    `limit_bytes` bounds a payload. A compressed one (flag 0x01), which nobody asked for, is an error.
    """

    def __init__(self, limit_bytes: int = 1_048_576) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Envelope]:
        """Yield the envelopes that `data` completes. Raises `WireError` for what cannot be one."""
        buffer = self._buffer
        buffer += data
        start, size = 0, len(buffer)
        while size - start >= 5:
            flags, length = _ENVELOPE_HEAD.unpack_from(buffer, start)
            if length > self._limit_bytes:
                raise WireError(f"an envelope of more than {self._limit_bytes} bytes")
            if flags & 0x01:
                raise WireError("a compressed envelope")
            end = start + 5 + length
            if end > size:
                break
            yield flags, buffer[start + 5 : end]
            start = end
        del buffer[:start]

    def finish(self) -> None:
        """Raise `WireError` where the input ended in the middle of an envelope."""
        if self._buffer:
            raise WireError("the stream ended in the middle of an envelope")


def encode_envelope(payload: bytes, flags: int = 0) -> bytes:
    """One envelope as bytes."""
    return bytes((flags,)) + len(payload).to_bytes(4, "big") + payload


def _refuse_constant(name: str) -> NoReturn:
    raise WireError(f"{name} is not JSON")


MAX_MARKS: Final = 600_000  # commas, colons and brackets, of which a value takes at least one
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def parse_json(data: str | bytes | bytearray, *, surrogates: bool = False) -> Any:
    """The JSON value of `data` (RFC 8259: UTF-8, no NaN). Raises `WireError` for anything else, however deep or long.

    Half of an escaped surrogate pair is an error too, unless `surrogates`: the service may cut a pair in two.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        if len(text) > MAX_MARKS < sum(map(text.count, ",:[{")):
            raise WireError(f"more than {MAX_MARKS} commas, colons and brackets")
        text = text.strip(" \t\r\n")
        value, end = _DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if not surrogates and ("\\ud" in text or "\\uD" in text):
            _ENCODER.encode(value).encode()
    except UnicodeError:
        raise WireError("not UTF-8, or half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise WireError(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise WireError("nested too deep") from None
    except WireError:
        raise
    except ValueError:
        raise WireError("a number with too many digits") from None
    return value


def encode_json(value: object) -> str:
    """`value` as compact JSON on one line; characters beyond ASCII are kept, lone surrogates replaced."""
    text = _ENCODER.encode(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_BASE64_ALPHABET: Final = str.maketrans("-_=", "+/!", " \t\r\n")  # padding that is not at the end is an error


def decode_base64(text: str, start: int = 0) -> Iterator[bytes]:
    """Yield the bytes of the base64 (RFC 4648, either alphabet) in `text` from `start` on, in pieces of 48 KiB.

    White space may stand anywhere, the padding may be missing. Raises `WireError` for anything else.
    """
    tail = text[-100:]
    end = len(text) - len(tail) + len(tail.rstrip("= \t\r\n"))
    rest = ""
    for at in range(start, end, 65_536):
        rest += text[at : min(at + 65_536, end)].translate(_BASE64_ALPHABET)
        size = len(rest) & ~3 if at + 65_536 < end else len(rest)
        try:
            piece = binascii.a2b_base64(rest[:size] + "=" * (-size % 4), strict_mode=True)
        except ValueError:
            raise WireError("not base64") from None
        if piece:
            yield piece
        rest = rest[size:]


# ==== 6. Events =============================================================
#
# Whatever Kimi says, in either protocol, becomes one small closed set of values. Nothing after this point knows which
# protocol spoke. `Text` and `Thinking`, the most common, are not frozen: that makes them cheaper to create.

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Opened:
    """The conversation exists. `hits_inline`: search hits are shown in the reference's words, else as a list."""

    conversation_id: str
    hits_inline: bool


@dataclass(slots=True)
class Text:
    """A piece of the answer's text, never empty."""

    text: str = field(repr=False)


@dataclass(slots=True)
class Thinking(Text):
    """A piece of what the model thought before it answered, never empty."""


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A page that the service's search found. `key` is the name by which the text may cite it, or empty."""

    title: str = field(repr=False)
    url: str = field(repr=False)
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Citation:
    """A place in the text that cites a hit, shown as `[number]`."""

    number: int
    hit: SearchHit


@dataclass(frozen=True, slots=True)
class Sources:
    """All hits of an answer whose hits are listed at its end, each once; the first is number 1."""

    hits: tuple[SearchHit, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model makes of a client's function; `arguments` is a JSON object as text."""

    id: str
    name: str = field(repr=False)
    arguments: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is over: always the last event. `stop_sequence` is the client's that ended it, or empty."""

    reason: FinishReason
    stop_sequence: str = field(default="", repr=False)


Event = Opened | Text | Thinking | SearchHit | Citation | Sources | ToolCall | Finished


# ==== 7. Answers ============================================================
#
# Frames in, events out, one object per answer. What is unknown is ignored, never a failure. An answer that ends without
# any text is an error, not an empty success.

MAX_TEXT: Final = 2_000_000  # characters of an answer, with thinking
MAX_HITS: Final = 1000  # of an answer
MAX_PIECE: Final = 4096  # characters: some clients read no line longer than 64 KiB
IDENTIFIER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # an id of the service that may stand in a path as it is


def dig(value: object, *path: str) -> Any:
    """What stands at `path` in a JSON value; None where there is no such path."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def dig_word(value: object, *path: str) -> str:
    """The string or number at `path` in a JSON value, as a string; empty for anything else."""
    word = dig(value, *path)
    return word if isinstance(word, str) else str(word) if isinstance(word, int) else ""


def dig_list(value: object, *path: str) -> list[Any]:
    """The list at `path` in a JSON value; empty for anything else."""
    found = dig(value, *path)
    return found if isinstance(found, list) else []


def join_surrogates(text: str) -> str:
    """`text` with the halves of surrogate pairs joined, and U+FFFD for a half that stays alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _parse_frame(data: str | bytes | bytearray) -> dict[str, Any]:
    try:
        value = parse_json(data, surrogates=True)
    except WireError as error:
        raise ProxyError("answer_broken", f"a frame of Kimi's stream is not JSON: {error}") from None
    if isinstance(value, dict):
        return value
    raise ProxyError("answer_broken", "a frame of Kimi's stream is not a JSON object")


class Answer:
    """What is known of one answer so far; the subclass of a protocol reads its frames."""

    def __init__(self, conversation_id: str = "") -> None:
        self.ended = False  # the service said the end: later frames are ignored
        self.done = False  # the text is over, though an error may follow
        self.kind: object = ""  # of the last frame, for the debug log
        self.progress = 0  # how many frames were more than a heartbeat
        self.conversation_id = conversation_id
        self.message_id = ""
        self.segment_id = ""  # where an answer that ended at its length limit can be continued
        self.degraded = ""  # the service's words when a weaker model answers
        self.unknown_fields: set[tuple[str, str]] = set()  # what was ignored, as (where, name)
        self._has_text = False
        self.size = 0  # characters
        self._halves: dict[type[Text], str] = {}  # of surrogate pairs that wait for the next text [open]
        self._hits: set[tuple[str, str]] = set()  # those emitted, as (url, key)

    def finish(self) -> list[Event]:
        """What the end of the stream means where none was said: after `done` an end, else a cut [ref]."""
        return [] if self.ended else self._end("stop" if self.done else "length")

    def _say(self, kind: type[Text], content: object) -> list[Event]:
        if not isinstance(content, str) or not content:
            return []
        self._has_text = self._has_text or kind is Text
        if self._halves:
            content = self._halves.pop(kind, "") + content
        if "\ud800" <= content[-1] <= "\udbff":
            self._halves[kind], content = content[-1], content[:-1]
        self.size += len(content)
        if self.size > MAX_TEXT:
            raise ProxyError("answer_broken", f"more than {MAX_TEXT} characters")
        text = join_surrogates(content)
        if len(text) <= MAX_PIECE:
            return [kind(text)] if text else []
        return [kind(text[at : at + MAX_PIECE]) for at in range(0, len(text), MAX_PIECE)]

    def _read_hits(self, values: list[Any], call_id: str = "", first: int = 0) -> list[Event]:
        """The hits that were not emitted yet, once by each key: `tools://CALL#N` [2+] and the older `refIndex`.

        N counts from 0: a search result is number `id` - 1, an opened page is where it stands among all of its call.
        """
        events: list[Event] = []
        for position, value in enumerate(values, first):
            page = dig(value, "searchResult") or dig(value, "webOpenUrl") or value
            base = dig(page, "base") or page
            keys = [dig_word(page, "refIndex") or dig_word(value, "refIndex")]
            if call_id:
                number = dig_word(value, "searchResult", "id")
                is_number = re.fullmatch("[0-9]{1,9}", number)
                keys.insert(0, f"tools://{call_id}#{int(number) - 1 if is_number else position}")
            url = join_surrogates(dig_word(base, "url"))
            for key in keys:
                if url and (url, key) not in self._hits and len(self._hits) < 2 * MAX_HITS:
                    self._hits |= {(url, key), (url, "")}
                    events.append(SearchHit(join_surrogates(dig_word(base, "title")) or url, url, key))
        return events

    def _end(self, reason: FinishReason) -> list[Event]:
        self.ended = True
        if not self._has_text and reason != "content_filter":
            raise ProxyError("answer_empty")
        return [*(kind("\ufffd") for kind in self._halves), Finished(reason)]


class ClassicAnswer(Answer):
    """The events of one classic answer [ref], but `Opened`. One that `continues` another may have no text [2+]."""

    def __init__(self, *, continues: bool = False) -> None:
        super().__init__()
        self._has_text = continues
        self._request_id = ""
        self._reason: FinishReason = "stop"

    def feed(self, frame: str) -> list[Event]:
        """What the data of one event say. Raises `ProxyError`, such as `answer_empty`."""
        if self.ended:
            return []
        value = _parse_frame(frame)
        if isinstance(value.get("error_type"), str):
            raise error_of_reply(200, value, "asking")
        self.progress += 1
        kind = self.kind = value.get("event")
        if kind == "cmpl":
            return self._say(Text, value.get("text"))
        if kind == "search_plus" and dig(value, "msg", "type") == "get_res":
            return self._read_hits([value["msg"]])
        if kind == "all_done":
            self.segment_id = self._request_id if self._reason == "length" else ""
            return self._end(self._reason)
        if kind == "error":
            return self._end("content_filter")
        if kind == "req":
            self._request_id = dig_word(value, "id")
        elif kind == "length":
            self._reason = "length"
        return []


_SANDBOX: Final = re.compile(r"python|shell|bash|sandbox", re.IGNORECASE)  # names of the model's own tools [2+]
_MODERATION: Final = re.compile(r"MODERAT|SENSITIVE|SAFETY|CENSOR|CONTENT_FILTER", re.IGNORECASE)  # not told [open]
_FRAME_KEYS: Final = {"op", "mask", "eventOffset", "messageId", "timestamp", "heartbeat", "done"}
_FRAME_PARTS: Final = {"chat", "message", "block", "ref", "notification"}
_BLOCK_KEYS: Final = {"id", "messageId", "message_id", "parentId", "stage", "createTime", "updateTime"}


class ConnectAnswer(Answer):
    """The events of one connect answer [2+]; `Opened` only where no `conversation_id` is given."""

    def __init__(self, conversation_id: str = "") -> None:
        super().__init__(conversation_id)
        self._ending: FinishReason | None = None  # where the answer ends before its stream
        self._thinks = False  # whether text carries thinking
        self._has_think_blocks = False
        self._other_messages: set[str] = set()  # the ids of messages that are not the model's
        self._texts: dict[tuple[str, type[Text]], io.StringIO] = {}  # of each block
        self._tools: dict[str, dict[str, Any]] = {}  # the service's own at work, by block

    def feed(self, envelope: Envelope) -> list[Event]:
        """What one envelope says. Raises `ProxyError`, such as `answer_empty`."""
        if self.ended:
            return []
        flags, payload = envelope
        value = _parse_frame(payload or b"{}")
        if isinstance(value.get("error"), dict):
            raise error_of_reply(200, value, "asking")
        if flags & 0x82:  # the end: 0x02 [2+], some saw 0x80 [open]
            self.kind = "end"
            return self._end("stop")
        self.kind = value.get("mask") or next(iter(value), "")
        if value and "heartbeat" not in value:
            self.progress += 1
        self.done = self.done or "done" in value
        events = [] if "messageId" in value and self._is_of_other(value) else self._read_frame(value)
        return events + self._end(self._ending) if self._ending else events

    def _is_of_other(self, value: dict[str, Any]) -> bool:
        """Whether a frame or block belongs to another message, such as the user's own."""
        identifier = value.get("messageId") or value.get("message_id")
        return isinstance(identifier, str) and identifier in self._other_messages

    def _read_status(self, status: object) -> None:
        """Note where the model waits for the user: the answer ends there [1]."""
        if str(status).upper().endswith("ASK_USER_QUESTION"):
            self._ending = "stop"

    def _read_frame(self, value: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        append = str(value.get("op")).lower() == "append"
        for key, part in value.items():
            if key in _FRAME_KEYS:
                continue
            if key == "status":
                self._read_status(part)
            elif key not in _FRAME_PARTS:
                self.unknown_fields.add(("message", key))
            elif not isinstance(part, dict) or self._is_of_other(part):
                continue
            elif key == "block":
                events += self._read_block(part, append)
            elif key == "chat" and not self.conversation_id and IDENTIFIER.fullmatch(dig_word(part, "id")):
                self.conversation_id = dig_word(part, "id")
                events.append(Opened(self.conversation_id, hits_inline=False))
            elif key == "message":
                events += self._read_message(part)
            elif key == "ref":
                events += self._read_hits([part.get("search")])
            elif key == "notification" and "DEGRADE" in dig_word(part, "type").upper():
                self.degraded = quote_words(dig_word(part, "message") or dig_word(part, "type"))
        return events

    def _read_message(self, message: dict[str, Any]) -> list[Event]:
        identifier, role = dig_word(message, "id"), dig_word(message, "role").lower()
        if identifier and role == "assistant":
            self.message_id = identifier
        elif identifier and role:
            self._other_messages.add(identifier)
            return []
        self._read_status(message.get("status"))
        found = message.get("refs")
        return self._read_hits(dig_list(found, "searchChunks") + dig_list(found, "usedSearchChunks"))

    def _read_block(self, block: dict[str, Any], append: bool) -> list[Event]:
        events: list[Event] = []
        identifier = str(block.get("id"))
        for key, part in block.items():
            if key in _BLOCK_KEYS:
                continue
            if key == "status":
                self._read_status(part)
            elif key == "text":
                thinks = self._thinks and not self._has_think_blocks
                events += self._read_text(Thinking if thinks else Text, identifier, part, append)
            elif key == "think":
                self._has_think_blocks = True
                events += self._read_text(Thinking, identifier, part, append)
            elif key == "tool" and isinstance(part, dict):
                events += self._read_tool(identifier, part, append)
            elif key == "search":
                events += self._read_hits(dig_list(part, "webPages"))
            elif key == "multiStage":
                self._read_stages(dig_list(part, "stages"))
            elif key in ("exception", "error"):
                self._read_exception(part)
            else:
                self.unknown_fields.add(("block", key))
        return events

    def _read_text(self, kind: type[Text], identifier: str, part: object, append: bool) -> list[Event]:
        """What a piece adds to its block. A second `set` cannot take back what was sent, only extend it [2+]."""
        content = part.get("content") if isinstance(part, dict) else part
        tool = self._tools.get(identifier)
        if not isinstance(content, str) or (tool and _SANDBOX.search(dig_word(tool, "name"))):
            return []
        begun = self._texts.get((identifier, kind))
        if begun is None:
            begun = self._texts[identifier, kind] = io.StringIO()
        added = content
        if not append:
            begun.seek(0)
            before = begun.read(len(content) + 1)  # all of it, where `content` extends it
            begun.seek(0, 2)
            if before.startswith(content):
                return []
            added = content[len(before) :] if content.startswith(before) else ""
            begun.seek(0)
            begun.truncate()
        begun.write(content)
        return self._say(kind, added)

    def _read_stages(self, stages: list[Any]) -> None:
        for stage in stages:
            if dig_word(stage, "name").upper() == "STAGE_NAME_THINKING":
                self._thinks = not dig_word(stage, "status").upper().endswith(("DONE", "END", "FINISHED", "COMPLETED"))

    def _read_exception(self, part: object) -> None:
        part = dig(part, "error") or part
        for error in part if isinstance(part, list) else [part]:
            if _MODERATION.search(dig_word(error, "reason")):
                self._ending = "content_filter"
            elif error and isinstance(error, dict):
                raise error_of_reply(200, error, "asking")

    def _read_tool(self, identifier: str, part: dict[str, Any], append: bool) -> list[Event]:
        self._read_status(part.get("status"))
        tool, contents = self._tools.setdefault(identifier, {}), dig_list(part, "contents")
        first = 0 if contents and not append else tool.get("count", 0)
        tool |= {key: part[key] for key in ("name", "toolCallId") if part.get(key)}
        tool["count"] = first + len(contents)
        if _SANDBOX.search(dig_word(tool, "name")):
            return []
        return self._read_hits(contents, dig_word(tool, "toolCallId"), first)


_CODES: Final = {  # by a word of classic's `error_type` [ref] or of a reason in connect [2+], [1]
    "AUTH.TOKEN.INVALID": "token_dead",
    "AUTH.ACCOUNT_ABNORMAL": "service_refused",
    "USER_STREAM_PUSHING": "answer_running",
    "USAGE_EXCEEDED": "quota_used_up",
    "OVERLOAD": "service_busy",
    "QUOTA": "quota_used_up",
    "INVALID_AUTH_TOKEN": "token_dead",
    "FILE_PARSE": "file_unreadable",
    "FILE_MODERATION": "file_unreadable",
    "CAPTCHA": "service_refused",
}
_CONNECT_STATUSES: Final = (  # the HTTP status of each code (Connect protocol, "Error Codes")
    {"invalid_argument": 400, "failed_precondition": 400, "unauthenticated": 401, "permission_denied": 403}
    | {"not_found": 404, "resource_exhausted": 429, "internal": 500, "unimplemented": 501, "unavailable": 503}
)


def error_of_reply(
    status: int, value: object, step: str, *, retry_after_seconds: int = 0, words: str = ""
) -> ProxyError:
    """The failure that a reply or a frame means, by a known reason, else by connect's code, else by the HTTP `status`.

    `words` stand in where the JSON `value` has none.
    """
    error = dig(value, "error") if isinstance(dig(value, "error"), dict) else value
    name = dig_word(value, "error_type") or dig_word(error, "code")
    status = _CONNECT_STATUSES.get(name, status)
    parts = [error, *(dig(part, "debug") for part in [error, *dig_list(error, "details")[:10]])]
    reasons = [dig_word(part, "reason") for part in parts]
    said = [dig_word(part, *path) for path in (("message",), ("localizedMessage", "message")) for part in parts]
    said = [word for word in dict.fromkeys(said + reasons) if word] or [words]
    reason = " ".join([name, *reasons]).upper()
    if "CAPTCHA" in reason:
        said.append("open Kimi in a browser once, and solve its captcha")
    by_status = "service_refused" if 400 <= status < 500 else "service_failed"
    by_status = {401: "token_dead", 429: "rate_limited"}.get(status, by_status)
    code = next((code for word, code in _CODES.items() if word in reason), by_status)
    if FAILURES[code].status != 429 and status != 503:
        retry_after_seconds = 0
    if code == "quota_used_up":
        retry_after_seconds = max(retry_after_seconds, 1800)
    head = ", ".join(filter(None, (f"{step}: HTTP {status}", quote_words(name))))
    detail = ": ".join(filter(None, (head, quote_words(", ".join(said)))))
    return ProxyError(code, detail, retry_after_seconds=retry_after_seconds, upstream_status=status)


# ==== 8. Tools ==============================================================
#
# Calls of a client's functions, and answers in a given form. Kimi's web service knows neither, so both are described in
# the prompt and read back from the answer: `<tool_call>`, a JSON object, `</tool_call>`. What strangers define has its
# tags escaped before it reaches the prompt, and every search and check here takes bounded time.


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of the client. `parameters` is the JSON schema of a call's arguments; True takes any object.

    The `name` of one in a `namespace` begins with that and a dot.
    """

    name: str = field(repr=False)
    description: str = field(repr=False)
    parameters: dict[str, Any] | bool = field(repr=False)
    namespace: str = field(default="", repr=False)

    @property
    def own_name(self) -> str:
        """The name within the namespace."""
        return self.name.removeprefix(f"{self.namespace}.") if self.namespace else self.name


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must not or must call a tool, or must call the one of this `name`."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The JSON that the client wants for an answer: any object, or what fits `schema`."""

    kind: Literal["json_object", "json_schema"]
    schema: dict[str, Any] | bool | None = field(default=None, repr=False)
    name: str = field(default="", repr=False)


# Kimi's own form [2+]: <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>.
CALL_MARKUP: Final = re.compile(r"</?tool_call>|<\|tool_calls?_(?:section_|argument_)?(?:begin|end)\|>")
_CALL_START: Final = re.compile(
    r"(?:<tool_call>|<\|tool_call_begin\|>(?:([^<]{0,200})<\|tool_call_argument_begin\|>)?)[^<{\[]*+"
)
_CLOSERS: Final = {"{": "}", "[": "]"}
_OPENER: Final = re.compile(r"[{\[]")
_NEXT_VALUE: Final = re.compile(r"[\s,]*+(?=[{\[])")
_JSON_PARTS: Final = re.compile(
    rf'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[{{}}\[\]]|,(?=\s*+(?:[}}\]<`]|\Z))|```|{CALL_MARKUP.pattern}', re.DOTALL
)
MAX_CALLS: Final = 100  # or other JSON, in an answer
_LENIENT_DECODER: Final = json.JSONDecoder(strict=False)  # takes raw line ends in strings


def _read_json(text: str) -> Any:
    return parse_json(encode_json(_LENIENT_DECODER.decode(text)))  # which refuses NaN


def _read_value(text: str, start: int, *, is_cut: bool = False) -> tuple[Any, int]:
    """The object or array that begins at `start`, None where it is broken, and where it ends.

    Repairs trailing commas, raw control characters in strings, and missing brackets where the text is not cut.
    """
    pieces: list[str] = []
    missing: list[str] = []
    at, end = start, len(text)
    for part in _JSON_PARTS.finditer(text, start):
        if part[0] in _CLOSERS:
            missing.append(_CLOSERS[part[0]])
        elif part[0] == ",":
            pieces.append(text[at : part.start()])
            at = part.end()
        elif part[0][0] in "<`" or (part[0] in "}]" and missing.pop() and not missing):
            end = part.start() if part[0][0] in "<`" else part.end()
            break
    pieces += [text[at:end], *([] if is_cut else reversed(missing))]
    with suppress(ValueError, RecursionError):
        return _read_json("".join(pieces)), end
    return None, end


def find_json(text: str) -> list[Any]:
    """The first objects and arrays in `text`, amid words and code fences."""
    values: list[Any] = []
    at = 0
    while len(values) < MAX_CALLS and (start := _OPENER.search(text, at)):
        value, at = _read_value(text, start.start())
        values += [] if value is None else [value]
    return values


MAX_CHECK_STEPS: Final = 50_000
_Mistake = tuple[str, Any] | None  # a path, and the broken keyword with its limit or a sentence
_JSON_TYPES: Final[Mapping[str, set[type]]] = {
    "string": {str}, "number": {int, float}, "integer": {int}, "boolean": {bool}, "null": {type(None)},
    "array": {list}, "object": {dict},
}  # fmt: skip


def _has_type(value: Any, names: Any) -> bool:
    """Whether the value has one of these types; true is no number, 1.0 is an integer."""
    kind = int if isinstance(value, float) and value.is_integer() else type(value)
    return any(kind in _JSON_TYPES[name] for name in (names if isinstance(names, list) else [names]))


_CHECKS: Final[Mapping[str, tuple[Any, Callable[[Any, Any], bool]]]] = {  # of what, and what holds
    "type": (object, _has_type),
    "enum": (object, lambda value, options: value in options),
    "const": (object, operator.eq),
    "required": (dict, lambda value, names: all(name in value for name in names)),
    "minimum": ((int, float), operator.ge),
    "maximum": ((int, float), operator.le),
    "minLength": (str, lambda value, limit: len(value) >= limit),
    "maxLength": (str, lambda value, limit: len(value) <= limit),
    "minItems": (list, lambda value, limit: len(value) >= limit),
    "maxItems": (list, lambda value, limit: len(value) <= limit),
}


def _fits(value: Any, keyword: str, limit: Any) -> bool:
    kind, check = _CHECKS[keyword]
    with suppress(TypeError, LookupError):  # a limit that makes no sense
        return not isinstance(value, kind) or check(value, limit)
    return True


def _list_at(schema: dict[str, Any], keyword: str) -> list[Any]:
    return value if isinstance(value := schema.get(keyword), list) else []


class SchemaCheck:
    """Fits the values of one answer to schemas, within `MAX_CHECK_STEPS` for all of them together.

    Of JSON Schema (2020-12) this knows `_CHECKS`, properties, additionalProperties, items, anyOf, allOf, local `$ref`,
    and oneOf as anyOf. All else allows anything, `pattern` above all: a hostile one would stop the loop.
    """

    def __init__(self) -> None:
        self._root: Any = None
        self._steps = MAX_CHECK_STEPS

    def fit(self, value: Any, schema: Any) -> tuple[Any, str]:
        """The JSON `value` as `schema` plainly wants it, and empty; or as it is, and how it breaks the schema even so.

        Nulls of optional properties are left out, and scalars and JSON text get the type that the schema names.
        """
        self._root = schema
        try:
            fitted, mistake = self._fit(value, schema)
        except RecursionError:
            mistake = ("", "the value or its schema is nested too deep")
        if mistake is None:
            return fitted, ""
        path, rule = mistake
        words = rule if isinstance(rule, str) else f"must fit {encode_json(rule)}"
        self._steps -= len(words) // 100
        return value, f"at ${path}: {words}"[:500]

    def _fit(self, value: Any, schema: Any) -> tuple[Any, _Mistake]:
        if not isinstance(schema, dict):
            return value, ("", "nothing is allowed here") if schema is False else None
        self._steps -= 1 + len(_list_at(schema, "enum")) + len(_list_at(schema, "required"))
        if self._steps < 0:
            return value, ("", "the value or its schema is too large to be checked")
        parts = [[self._resolve(schema["$ref"])]] if "$ref" in schema else []
        parts += [[part] for part in _list_at(schema, "allOf")]
        parts += filter(None, (_list_at(schema, "anyOf"), _list_at(schema, "oneOf")))
        for options in parts:
            value, mistake = self._fit_any(value, options)
            if mistake:
                return value, mistake
        if "type" in schema and not _fits(value, "type", schema["type"]):
            value = self._convert(value, schema["type"])
        for keyword in _CHECKS:
            if keyword in schema and not _fits(value, keyword, schema[keyword]):
                return value, ("", {keyword: schema[keyword]})
        return self._fit_children(value, schema) if isinstance(value, (dict, list)) else (value, None)

    def _convert(self, value: Any, types: Any) -> Any:
        """`value` in one of `types`, where nothing is lost; else as it is."""
        other = value
        if isinstance(value, str):
            self._steps -= len(value) // 10
            with suppress(ValueError, RecursionError):
                other = _read_json({"True": "true", "False": "false"}.get(value, value))
        elif isinstance(value, (int, float)) and abs(value) < 1e40:
            other = encode_json(value)
        return other if _fits(other, "type", types) else value

    def _fit_any(self, value: Any, options: list[Any]) -> tuple[Any, _Mistake]:
        results = [self._fit(value, one) for one in options]
        fitting = [result for result in results if not result[1]] or results
        return next((result for result in fitting if result[0] == value), fitting[0])

    def _fit_children(self, value: Any, schema: dict[str, Any]) -> tuple[Any, _Mistake]:
        is_list = isinstance(value, list)
        known = known if isinstance(known := schema.get("properties"), dict) and not is_list else {}
        others = schema.get("items" if is_list else "additionalProperties")
        others = True if "patternProperties" in schema and not is_list else others
        required = frozenset(name for name in _list_at(schema, "required") if isinstance(name, str))
        fitted: dict[Any, Any] = {}
        pairs: Iterable[tuple[Any, Any]] = enumerate(value) if is_list else value.items()
        for key, one in pairs:
            child, mistake = self._fit(one, known.get(key, others))
            if not mistake:
                fitted[key] = child
            elif is_list or one is not None or key in required:
                path = f"[{key}]" if is_list else f".{key[:40]}"
                return value, ((path + mistake[0])[:200], mistake[1])
        return [*fitted.values()] if is_list else fitted, None

    def _resolve(self, reference: Any) -> Any:
        """What `#/$defs/a` or the like leads to (RFC 6901); None, which allows anything, where it is nothing."""
        is_short = isinstance(reference, str) and len(reference) <= 200
        root, *names = unquote(reference).split("/") if is_short else [""]
        found: Any = self._root if root == "#" else None
        for name in names:
            is_index = isinstance(found, list) and name.isdecimal() and int(name) < len(found)
            found = found[int(name)] if is_index else dig(found, name.replace("~1", "/").replace("~0", "~"))
        return found


class Call(NamedTuple):
    """A call as the model wrote it, mended; without a `name` where it has none. `wrong` tells the model its mistake."""

    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    wrong: str = ""


class CallReader:
    """Reads the calls of `tools` in the texts of one question's answers."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools
        self._check = SchemaCheck()
        self.names = encode_json([*islice(tools, 20)])[:200]

    def find_marked(self, text: str, *, is_cut: bool) -> Iterator[Call]:
        """The calls behind the marks in `text`, but in JSON strings. A cut one is not repaired."""
        at = 0
        while start := _CALL_START.search(text, at):
            at = start.end()
            if text[at : at + 1] not in _CLOSERS:
                yield self._read({"name": start[1]})
            while gap := _NEXT_VALUE.match(text, at):
                value, at = _read_value(text, gap.end(), is_cut=is_cut)
                if start[1] and value is not None:
                    value = {"name": start[1], "arguments": value}
                yield from map(self._read, value if isinstance(value, list) else [value])

    def find_bare(self, text: str) -> Iterator[Call]:
        """The JSON in `text` as calls, or as the arguments of the only tool."""
        for value in find_json(text):
            is_call = len(self._tools) != 1 or ("name" in value and "arguments" in value)
            yield self._read(value if is_call else {"name": next(iter(self._tools)), "arguments": value})

    def _read(self, value: Any) -> Call:
        value = value if isinstance(value, dict) else {}
        value = function if isinstance(function := value.get("function"), dict) else value
        name = value.get("name")
        if not isinstance(name, str) or not name:
            return Call(wrong="a call must be a JSON object with a `name` and `arguments`")
        name = re.sub(r"\Afunctions\.|:\d+\Z", "", name.strip())
        arguments = value.get("arguments", value.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = (find_json(arguments) or [arguments.strip() or {}])[0]
        where = f"the `arguments` in the call of {encode_json(name[:60])}"
        if not isinstance(arguments, dict):
            return Call(wrong=f"{where} must be a JSON object")
        if name not in self._tools:
            return Call(name, arguments, f"a call must have a `name` that is one of {self.names}")
        arguments, wrong = self._check.fit(arguments, self._tools[name].parameters)
        return Call(name, arguments, wrong and f"{where}: {wrong}")


_TAG: Final = re.compile(r"<(/?(?:tool_call|tool_response|tools)>|\|tool_call)", re.IGNORECASE)


def escape_tags(text: str) -> str:
    """What strangers wrote, with no tag of the tools' form left: `< tool_call>` for `<tool_call>`, and the like."""
    return _TAG.sub(r"< \1", text)


def render_tool_call(name: str, arguments: str) -> str:
    """A call that the model made before, as it wrote it; `arguments` should be JSON."""
    value: Any = arguments
    with suppress(WireError):
        value = parse_json(arguments.encode("utf-8", "replace")) if arguments.strip() else {}
    return f"<tool_call>\n{escape_tags(encode_json({'name': name, 'arguments': value}))}\n</tool_call>"


def render_tool_response(name: str, content: str) -> str:
    """The result of a call."""
    return f"<tool_response>\n{escape_tags(encode_json({'name': name, 'content': content}))}\n</tool_response>"


_TOOLS_TEXT: Final = """\
# Tools

You can call these tools, which the user's program runs for you. Each line between the marks defines one, as JSON:
<tools>
{definitions}
</tools>

To call a tool, write exactly this, with the tool's name and a JSON object that fits its parameters:
<tool_call>
{{"name": "…", "arguments": {{…}}}}
</tool_call>

- {choice}
- {parallel}
- Write a call as plain text without a code fence, and nothing after the last call: its result comes with the next \
message, between <tool_response> and </tool_response>. Never write a result yourself.
"""
_CHOICES: Final = {
    "auto": "Call a tool where it helps. Where none does, answer without a call, and do not mention the tools.",
    "required": "Your answer must call at least one tool.",
    "named": "Your answer must call the tool {name}, and no other.",
}


def describe_tools(tools: Sequence[Tool], choice: ToolChoice, parallel: bool) -> str:
    """The part of the prompt that defines the tools and the form of a call; empty where the model must not call any."""
    if choice.mode == "none" or not tools:
        return ""
    definitions = [
        encode_json({"name": tool.name, "description": tool.description, "parameters": tool.parameters})
        for tool in tools
        if choice.mode != "named" or tool.name == choice.name
    ]
    rule = "Call several tools at once by several such pairs of marks, one call in each."
    return _TOOLS_TEXT.format(
        definitions=escape_tags("\n".join(definitions)),
        choice=_CHOICES[choice.mode].format(name=escape_tags(encode_json(choice.name))),
        parallel=rule if parallel else "Make one call at most, and wait for its result.",
    )


def describe_format(format: ResponseFormat) -> str:
    """The part of the prompt that asks for JSON alone, and tells its schema where there is one."""
    what, schema = "object", ""
    if format.kind == "json_schema" and format.schema is not None:
        what, schema = "value", f"It must fit this JSON schema:\n{escape_tags(encode_json(format.schema))}\n"
    only = "and nothing else: no words around it, no code fence."
    return f"# Form of the answer\n\nAnswer with one JSON {what} {only}\n{schema}"


def describe_failure(error: str, previous: str) -> str:
    """The part of a second prompt that tells the model what was wrong with its answer `previous`, and what to do."""
    quoted = f"\n\nYour answer was:\n{previous}" if previous else ""
    again = "Answer again, in the form that was asked for and without this mistake. Write nothing else: no apology."
    return f"Your last answer could not be used: {escape_tags(error)}.{quoted}\n\n{again}\n"


# ==== 9. Filters ============================================================
#
# Events in, events out: what changes an answer on its way. Every chain has a `ThinkFilter` and a `CitationFilter`; the
# others are there where the request asks for them. Any split of a text gives the same, in linear time, and text in
# which nothing can begin passes as it is.

MAX_PREVIOUS: Final = 20_000  # characters of an answer that a retry quotes


class Filter:
    """One change of an answer's events; this one changes nothing."""

    passes = False  # it changes nothing any more
    ended = False  # it has ended the answer: what follows is dropped
    retry_reason = ""  # the mistake in an answer that is over and has to be asked for once more
    previous = ""  # what the model wrote there
    has_fallback = False  # it can show the first answer, should the second fail
    starts = ""  # characters: text without any of them passes while nothing is held; empty where all text counts
    _held = ""  # the end of the text, which may become something else
    _retried = False

    @property
    def is_calm(self) -> bool:
        """Whether text without any of `starts` passes as it is."""
        return self.passes or bool(self.starts and not self._held)

    def feed(self, events: list[Event]) -> list[Event]:
        """What becomes of `events`. `Finished` flows through, after all that was held."""
        result: list[Event] = []
        for event in events:
            if self.ended:
                break
            if self.passes:
                result.append(event)
            elif type(event) is Text:
                result += self._take_text(event)
            else:
                result += self._finish(event) if isinstance(event, Finished) else self._take_other(event)
        return result

    def begin_retry(self) -> None:
        """Expect another answer, the last one."""
        self._reset()
        self._retried, self.retry_reason = True, ""

    def _reset(self) -> None:
        self._held = ""

    def _take_text(self, event: Text) -> list[Event]:
        return [event]

    def _take_other(self, event: Event) -> list[Event]:
        return [event]

    def _finish(self, event: Finished) -> list[Event]:
        return [*self._flush(), event]

    def _flush(self) -> list[Event]:
        text, self._held = self._held, ""
        return _texts(text)

    def _ask_again(self, code: str, mistake: str, text: str) -> list[Event]:
        """Nothing: another answer is to come. Raises `ProxyError` where this was the second."""
        if self._retried:
            raise ProxyError(code, mistake)
        self.retry_reason, self.previous = mistake, text[:MAX_PREVIOUS]
        return []


def _texts(text: str) -> list[Event]:
    return [Text(text)] if text else []


def _split_begun(text: str, marks: Sequence[str]) -> tuple[str, str]:
    """`text` in two: the longest end that may begin one of `marks`, and what is before it."""
    for at in range(max(0, len(text) - max(map(len, marks)) + 1), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return text[:at], text[at:]
    return text, ""


class ThinkFilter(Filter):
    """Turns `<think>…</think>` at the start of the text, behind 100 spaces at most, into `Thinking` [1].

    Raises `answer_empty` where nothing else follows.
    """

    _phase: Literal["start", "thinking", "after"] = "start"

    def _reset(self) -> None:
        self._held, self._phase, self.passes = "", "start", False

    def _take_text(self, event: Text) -> list[Event]:
        text = self._held + event.text
        thought = self._held = ""
        if self._phase == "start":
            begin = text.lstrip() if len(text) - len(text.lstrip()) <= 100 else text
            if begin != "<think>" and "<think>".startswith(begin):
                self._held = text
                return []
            self.passes = not begin.startswith("<think>")
            if self.passes:
                return _texts(text)
            self._phase, text = "thinking", begin[7:]
        if self._phase == "thinking":
            thought, end, text = text.partition("</think>")
            if end:
                self._phase = "after"
            else:
                thought, self._held = _split_begun(thought, ["</think>"])
        text = text.lstrip()
        self.passes = bool(text)
        return [*([Thinking(thought)] if thought else []), *_texts(text)]

    def _finish(self, event: Finished) -> list[Event]:
        if self._phase == "start":
            return super()._finish(event)
        if event.reason != "content_filter":
            self.passes = True  # the first answer may follow
            raise ProxyError("answer_empty")
        return [event]


class MarkFilter(Filter):
    """Replaces the marks in a text. `marks` finds a whole one, or without any group what may become one at the end."""

    marks: re.Pattern[str]  # each alternative begins with a character, which makes looking for it fast

    def _take_text(self, event: Text) -> list[Event]:
        text, self._held = self._held + event.text, ""
        events: list[Event] = []
        at = 0
        for mark in self.marks.finditer(text):
            events += _texts(text[at : mark.start()])
            at = mark.end()
            if mark.lastgroup:
                events += self._replace(mark)
            else:
                self._held = mark[0]
        return events + _texts(text[at:])

    def _replace(self, mark: re.Match[str]) -> list[Event]:
        raise NotImplementedError


class UrlMarkFilter(MarkFilter):
    """Frees URLs of the marks that the prompt put around them, where the model repeats these."""

    starts = "<"
    marks = re.compile(
        r'<url id="[^<>"]{0,500}" type="url"[^<>]{0,500}>(?P<url>[^<>]{0,2000})</url>'
        r"|<(?:u?r?l? ?i?d?=?|url id=[^<>]{0,1030}(?:>[^<>]{0,2000}(?:</?u?r?l?)?)?)\Z"
    )

    def _replace(self, mark: re.Match[str]) -> list[Event]:
        return _texts(mark["url"])


MAX_CITATION: Final = 16_384  # characters between <REF> and </REF>, quotation included


class CitationFilter(MarkFilter):
    """Turns the marks by which a text cites hits into `Citation` events, and lists the hits [2+].

    A mark is `<REF>cite✦tools://KEY:~:text=QUOTATION</REF>` (or with a colon for ✦ [1]), U+E3A0 `cite` U+E3A3 KEY …
    U+E3A8 (U+1F6E0 for U+E3A3 [open]), `[^n^]`, or U+1F6E0 KEY U+1F6E0 [open]. Numbers are given in the order of first
    use; hits that no mark cites follow. A mark that names no hit known by then, or is never closed, is dropped, but
    `[^n^]` stays text while there is no hit at all. An answer with inline hits passes unchanged.
    """

    starts = "<[\ue3a0\U0001f6e0"
    marks = re.compile(
        f"<REF>cite[\u2726:](?:(?P<ref>.{{0,{MAX_CITATION}}}?)</REF>|(?P<endless>.{{{MAX_CITATION}}})(?=.{{6}}))"
        "|\ue3a0cite[\ue3a3\U0001f6e0](?P<keys>[^\ue3a0\ue3a8]{0,500}+)\ue3a8"
        r"|\[\^(?P<number>[0-9]{1,4})\^\]"
        "|\U0001f6e0(?P<key>[^\\s\U0001f6e0]{1,100}#[0-9]{1,6})\U0001f6e0"
        "|<REF>cite[\u2726:].*\\Z|<R?E?F?>?c?i?t?e?\\Z|\ue3a0[^\ue3a8]{0,510}+\\Z"
        "|\\[(?:\\^(?:[0-9]{1,4}\\^?)?)?\\Z|\U0001f6e0[^\\s\U0001f6e0]{0,107}+\\Z",
        re.DOTALL,
    )

    def __init__(self) -> None:
        self._hits: dict[str, SearchHit] = {}  # by URL
        self._numbers: dict[str, int] = {}  # of cited URLs
        self._reset()

    def _reset(self) -> None:
        """Let the marks of a second answer name its own hits; its numbers go on."""
        self._held = ""
        self._urls: dict[str, str] = {}  # of this answer's hits, by key, by `^` and number, and by themselves
        self._count = 0

    def list_sources(self) -> list[Event]:
        """The list of all hits so far, in the order of their numbers; empty where there are none."""
        urls = dict.fromkeys([*self._numbers, *self._hits])
        return [Sources(tuple(self._hits[url] for url in urls))] if urls else []

    def _take_other(self, event: Event) -> list[Event]:
        if isinstance(event, Opened):
            self.passes = event.hits_inline
        if not isinstance(event, SearchHit):
            return [event]
        if event.url not in self._urls:
            self._count += 1
            self._urls[f"^{self._count}"] = event.url
        self._urls |= {event.url: event.url, event.key or event.url: event.url}
        self._hits.setdefault(event.url, event)
        return []

    def _take_text(self, event: Text) -> list[Event]:
        is_open = self._held[:10] in ("<REF>cite\u2726", "<REF>cite:")
        fits = len(self._held) + len(event.text) < MAX_CITATION
        if is_open and fits and "</REF>" not in self._held[-6:] + event.text:  # not searched again and again
            self._held += event.text
            return []
        return super()._take_text(event)

    def _flush(self) -> list[Event]:
        is_cut_mark = re.match("\ue3a0|<REF>cite|\U0001f6e0\\w+:", self._held)
        return [] if is_cut_mark else super()._flush()

    def _replace(self, mark: re.Match[str]) -> list[Event]:
        ref, keys, number, key = mark.group("ref", "keys", "number", "key")
        if number and not self._hits:
            return [Text(mark[0])]
        names = re.split("[\ue3a3\U0001f6e0]", keys or key or "")
        if number:
            names = [f"^{int(number)}"]
        elif ref:
            names = re.findall("tools://[^\\s#<>\u2726]{1,200}#[0-9]{1,6}", ref.partition(":~:")[0])
        numbers = {url: self._numbers.setdefault(url, len(self._numbers) + 1) for url in map(self._find, names) if url}
        return [Citation(number, self._hits[url]) for url, number in numbers.items()]

    def _find(self, name: str) -> str:
        """The URL of a known hit, or empty; its key may be known without its `tools://`, or with it."""
        bare = name.removeprefix("tools://")
        return self._urls.get(name) or self._urls.get(bare) or self._urls.get(f"tools://{bare}", "")


_TOKEN_WEIGHTS: Final = (  # first bytes of a character in UTF-8, and hundredths of a token
    (range(ord("a"), ord("z") + 1), 25),
    (range(ord("A"), ord("Z") + 1), 32),
    (range(ord("0"), ord("9") + 1), 52),
    (b" \t", 2),
    (b"\n\r", 33),
    (range(0x80), 57),  # ASCII punctuation
    (range(0xC0), 0),  # the other bytes of a character
    (range(0xE0), 35),  # other alphabets
    (range(0xEA), 62),  # Chinese, and scripts near it
    (range(0x100), 84),  # Hangul, wide forms, emoji
)
_WEIGHTS_OF_BYTES: Final = bytes(next(weight for row, weight in _TOKEN_WEIGHTS if byte in row) for byte in range(256))


def weigh(text: str) -> int:
    """The tokens of `text` in hundredths: an estimate that is the same for any split.

    Within 25 % of DeepSeek's own tokenizer for texts of 300 characters and more in Chinese, English or both.
    """
    return sum(text.encode("utf-8", "surrogatepass").translate(_WEIGHTS_OF_BYTES))


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` has, rounded up."""
    return -(-weigh(text) // 100)


class LengthFilter(Filter):
    """Cuts what the model writes, text and the calls that are still text here, at `limit_tokens`; thinking is free.

    Then follow `Finished("length")` and nothing more. In a retry the limit is that answer's alone.
    """

    def __init__(self, limit_tokens: int) -> None:
        self._limit = 100 * limit_tokens
        self._reset()

    def _reset(self) -> None:
        self._room = self._limit
        self.ended = False

    def _take_text(self, event: Text) -> list[Event]:
        size = weigh(event.text)
        self._room -= size
        if self._room >= 0:
            return [event]
        self.ended = True
        fitting = bisect_right(list(accumulate(map(weigh, event.text))), self._room + size)
        return [*_texts(event.text[:fitting]), Finished("length")]


_CALL_BEGIN: Final = re.compile(  # with the fence before it, or what may become one
    rf"(?:(?<!\s)\s{{0,40}}+)?(?:```\w{{0,20}}+\s{{0,20}}+)?(?P<mark>{CALL_MARKUP.pattern})"
    r"|(?:(?<!\s)\s{0,40}+)?(?:`{1,2}|(?:```\w{0,20}+\s{0,20}+)?(?:<(?:/?t?o?o?l?_?c?a?l?l?|\|[a-z_]{0,29}\|?))?)\Z"
)
_CODE: Final = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def _is_quoted(text: str) -> bool:
    """Whether all marks of calls in `text` stand in code, with words around it."""
    words = _CODE.sub("", text)
    return bool(words.strip()) and not CALL_MARKUP.search(words)


class ToolCallFilter(Filter):
    """Turns the calls in an answer's text into `ToolCall` events with new ids of `make_id`, once the answer is over.

    From the first mark of a call on all text is held, and everything where `choice` demands a call. One valid call
    passes on all that have a name and arguments. Without one, where a call is demanded or tried, the model is asked
    again; of that answer only the calls are used, imperfect ones too. Without any the first answer's text follows,
    freed of marks; but a demanded call that is not valid raises `tool_call_failed`. A cut answer is not repaired.
    """

    def __init__(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool, make_id: Callable[[], str]) -> None:
        own = {tool.name: tool for tool in tools if choice.mode != "named" or tool.name == choice.name}
        self._reader = CallReader(own)
        self._demanded = choice.mode in ("required", "named")
        self._parallel = parallel
        self._make_id = make_id
        self._fallback: list[Event] = []  # what there is to show of the first answer, in a retry
        self._reset()

    def _reset(self) -> None:
        self.has_fallback = bool(self.retry_reason)
        self._written: list[str] = []
        self._shown = 0  # characters
        self._held = ""  # the end of the text, which may begin a call
        self._holds = self._demanded or self.has_fallback  # all that follows
        self._thoughts: list[Event] = []  # where a call is demanded

    def _take_text(self, event: Text) -> list[Event]:
        self._written.append(event.text)
        if self._holds:
            return []
        text = self._held + event.text
        if not (self._held or "<" in text or "`" in text or text[-1].isspace()):
            self._shown += len(text)
            return [event]
        found = cast(re.Match[str], _CALL_BEGIN.search(text))  # matches at the end at least
        self._holds = bool(found["mark"])
        self._held = text[found.start() :]
        self._shown += found.start()
        return _texts(text[: found.start()])

    def _take_other(self, event: Event) -> list[Event]:
        if self._holds and (self.has_fallback or isinstance(event, Citation)):
            return []
        if self._demanded and isinstance(event, Thinking):
            self._thoughts.append(event)
            return []
        if self._holds:
            return [event]
        self._shown += len(self._held)
        return [*self._flush(), event]

    def _finish(self, event: Finished) -> list[Event]:
        text = "".join(self._written)
        is_cut = event.reason != "stop"
        calls = self._find_calls(text, is_cut)
        good = [call for call in calls if call.name and not (self._demanded and call.wrong)]
        shown = self._render(good, text)
        is_bad = all(call.wrong for call in calls) and (calls or self._demanded) and not is_cut
        if is_bad and (self._demanded or not self._retried):
            self._fallback = shown
            none = f"it must call one of {self._reader.names}, and calls no tool"
            return self._ask_again("tool_call_failed", calls[0].wrong if calls else none, text)
        if self.has_fallback and not good:
            shown, is_cut = self._fallback, is_cut and self._demanded
        reason: FinishReason = "tool_calls" if any(isinstance(one, ToolCall) for one in shown) else "stop"
        return [*shown, event if is_cut else Finished(reason)]

    def _find_calls(self, text: str, is_cut: bool) -> list[Call]:
        """The calls in an answer, quoted ones left out. JSON without marks may be the call that is demanded."""
        calls = [*islice(self._reader.find_marked(text, is_cut=is_cut), MAX_CALLS)]
        if not calls and self._demanded and not is_cut:
            calls = [call for call in self._reader.find_bare(text) if not call.wrong][:1]
        return [] if _is_quoted(text) and all(call.wrong for call in calls) else calls

    def _render(self, calls: Sequence[Call], text: str) -> list[Event]:
        """The calls, with what comes before them; else what was held, as text."""
        if not calls:
            held = text[self._shown :]
            return [*self._thoughts, *_texts(held if _is_quoted(text) else CALL_MARKUP.sub(" ", held))]
        if not self._parallel:
            calls = [min(calls, key=lambda call: bool(call.wrong))]
        begin = cast(re.Match[str], _CALL_BEGIN.search(text))
        is_first = self._demanded and not self.has_fallback and begin["mark"]
        before = _texts(text[: begin.start()]) if is_first else []
        made = (ToolCall(self._make_id(), call.name, encode_json(call.arguments)) for call in calls)
        return [*self._thoughts, *before, *made]


class StopFilter(Filter):
    """Ends the answer before the first of `stops` in its text: the one complete first, at the same end the longer.

    Works on `Text` alone. After a stop follow `Finished` and nothing more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.starts = "".join(stop[0] for stop in stops)

    def _reset(self) -> None:
        self.ended = False  # a second answer's text goes on behind what is held

    def _take_other(self, event: Event) -> list[Event]:
        return [event] if isinstance(event, (Thinking, SearchHit)) else [*self._flush(), event]

    def _take_text(self, event: Text) -> list[Event]:
        text = self._held + event.text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.ended = True
            end, size, stop = min(ends)
            return [*_texts(text[: end + size]), Finished("stop", stop)]
        text, self._held = _split_begun(text, self._stops)
        return _texts(text)


class StructureFilter(Filter):
    """Holds text and thinking to the end, and passes the text on as one piece: the JSON that `format` asks for.

    JSON is found amid words, mended, and made compact. Where none fits, the model is asked again; a second failure
    raises `structured_output_failed`. An answer that calls tools, or was cut, passes as it is. Citations are dropped.
    """

    def __init__(self, format: ResponseFormat) -> None:
        self._schema = {"type": "object"} if format.kind == "json_object" else format.schema
        self._events: list[Event] = []

    def _reset(self) -> None:
        """Drop what could not be used; where another filter asks again, the second answer goes on behind it."""
        if self.retry_reason:
            self._events = []

    def _take_text(self, event: Text) -> list[Event]:
        self._events.append(event)
        return []

    def _take_other(self, event: Event) -> list[Event]:
        if isinstance(event, Thinking):
            return self._take_text(event)
        if isinstance(event, ToolCall):
            return [*self._release(), event]
        return [] if isinstance(event, Citation) else [event]

    def _release(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _finish(self, event: Finished) -> list[Event]:
        if event.reason != "stop" or event.stop_sequence:
            return [*self._release(), event]
        text = "".join(one.text for one in self._events if type(one) is Text)
        values = find_json(text)
        with suppress(WireError):
            values = [parse_json(text.encode("utf-8", "replace"))]
        check = SchemaCheck()
        mistake = ""
        for value in values:
            fitted, wrong = check.fit(value, self._schema)
            if not wrong:
                thoughts = [one for one in self._release() if type(one) is Thinking]
                return [*thoughts, Text(encode_json(fitted)), event]
            mistake = mistake or f"its JSON does not fit the schema: {wrong}"
        return self._ask_again("structured_output_failed", mistake or "it is not JSON", text)


class Chain:
    """The filters of one answer, in order, and the one retry that they may ask for.

    Exactly one `Finished` comes out, after the list of hits, and nothing after it. Where `retry_reason` is set, the
    caller calls `begin_retry`, asks again, and feeds that answer too.
    """

    def __init__(self, filters: Sequence[Filter] = ()) -> None:
        self.filters = filters
        self.retry_reason = ""  # what to tell the model, when an answer is over that has to be asked for once more
        self.previous = ""  # what it wrote there, cut
        self._over = False
        self._retried = False
        self._starts = re.compile("|".join(map(re.escape, "".join(one.starts for one in filters))) or r"\Z")
        self._is_calm = False  # text in which nothing can begin passes as it is

    def feed(self, events: list[Event]) -> list[Event]:
        """What becomes of `events`. Raises `ProxyError` as the filters do."""
        result: list[Event] = []
        for event in events:
            if self._is_calm and isinstance(event, Text) and not self._starts.search(event.text):
                result.append(event)
            else:
                result += self._filter(event)
                self._is_calm = not self._over and all(one.is_calm for one in self.filters)
        return result

    def _filter(self, event: Event) -> list[Event]:
        if self._over or (self._retried and isinstance(event, Opened)):
            return []
        events = [event]
        for one in self.filters:
            if not one.passes:
                events = one.feed(events)
            if one.retry_reason:
                self.retry_reason, self.previous = one.retry_reason, one.previous
        if events and isinstance(events[-1], Finished):
            self._over = True
            self.retry_reason = ""
            citations = [one for one in self.filters if isinstance(one, CitationFilter)]
            return [*events[:-1], *(hits for one in citations for hits in one.list_sources()), events[-1]]
        return events

    def give_up(self) -> list[Event]:
        """What the first answer still has, when the second could not be had; empty where that is of no use."""
        return self.feed([Finished("stop")]) if any(one.has_fallback for one in self.filters) else []

    def begin_retry(self) -> None:
        """Expect another answer, the last one."""
        self._retried, self._is_calm = True, False
        self.retry_reason = ""
        for one in self.filters:
            one.begin_retry()


# ==== 10. Requests ==========================================================
#
# What a client sent, checked and made neutral. All APIs share one reader, which takes every API's spelling, since
# programs mix them. Unknown fields are ignored; a wrong type in a known one is a `ProxyError` that names it.

# What one request may have, so that it keeps no other client waiting.
LIMITS: Final[Mapping[str, int]] = {
    "levels of JSON": 100,
    "objects and lists": 100_000,
    "entries": 10_000,  # of one of them
    "digits": 40,
    "characters of a name or id": 256,
    "characters of text": 4_000_000,  # more than the service takes
    "stop sequences": 16,
    "characters of a stop sequence": 1000,
    "files and pictures in a message": 20,
}
_BEYOND: Final = 10 ** LIMITS["digits"]
MAX_MARKED_URLS: Final = 100
MAX_MARKED_TEXT: Final = 100_000  # characters around them
NEW_CONVERSATION: Final = "new"
RESULT_ROLES: Final = ("tool", "function")
_KINDS: Final[Mapping[type, str]] = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}
_FUNCTION_NAME: Final = re.compile(r"[^\s\x00-\x1f<>\"{}]{1,256}")
_LOADED_TOOL: Final = re.compile(r"^The tool (\S+) can be called now\.$", re.MULTILINE)
AttachmentKind = Literal["file", "image"]
Result = TypeVar("Result")
FindItem = Callable[[str], Mapping[str, Any] | None]  # gives an item of an earlier answer by its id


@dataclass(frozen=True, slots=True, repr=False)
class Attachment:
    """A file or picture: at a `url`, uploaded as `file_id`, or the base64 in `data` from `start` on.

    `uploaded` with an earlier answer: the account's digest, the protocol, the service's id.
    """

    kind: AttachmentKind
    path: str = field(compare=False)
    url: str = ""
    data: str = ""
    start: int = 0
    name: str = ""
    content_type: str = ""
    file_id: str = ""
    uploaded: tuple[bytes, str, str] | None = None

    @property
    def inline_bytes(self) -> int:
        """At least how many bytes are inline; up to a tenth of the base64 may be line ends."""
        return (len(self.data) - self.start) * 27 // 40


@dataclass(slots=True, repr=False)
class Message:
    """One message, or with one of `RESULT_ROLES` the result of the call `tool_call_id` of `tool_name`, if known."""

    role: str
    text: str
    attachments: tuple[Attachment, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tool_name: str = ""


@dataclass(slots=True, repr=False)
class ChatRequest:
    """A chat that a client asks for, by any API. `use_search` is None where it does not say.

    `conversation_id`: `new` opens a conversation that is kept, an id continues one. `left_out`: names of tools that
    nobody here can run. `effort` of thinking: the client's word, or `none` or `enabled` where it is only switched.
    """

    model: str
    messages: tuple[Message, ...]
    stream: bool
    include_usage: bool | None
    use_search: bool | None
    conversation_id: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    left_out: tuple[str, ...] = ()
    effort: str = ""
    legacy_functions: bool = False
    instructions: str = ""
    previous_response_id: str = ""
    store: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a person asks, not a program."""
        return not (self.tools or self.left_out or self.response_format)

    @property
    def continues(self) -> bool:
        """Whether the conversation exists."""
        return self.conversation_id not in ("", NEW_CONVERSATION)

    @property
    def sent_messages(self) -> tuple[Message, ...]:
        """All messages; in a conversation that exists only the last, or the last results of tools."""
        first = len(self.messages) - 1 if self.continues else 0
        while first and self.messages[first].role == self.messages[first - 1].role == "tool":
            first -= 1
        return self.messages[first:]

    @property
    def attachments(self) -> list[Attachment]:
        """What is attached to the messages that the service is sent."""
        return [attachment for message in self.sent_messages for attachment in message.attachments]


@dataclass(slots=True, repr=False)
class Node:
    """A JSON value in a request and the path that names it in an error."""

    value: Any
    path: str = ""

    def __getitem__(self, key: str | int) -> Node:
        if isinstance(key, int):
            return Node(self.value[key], f"{self.path}[{key}]")
        return Node(self.value.get(key), f"{self.path}.{key}" if self.path else key)

    def __contains__(self, name: str) -> bool:
        return self.value.get(name) is not None

    def first(self, *names: str) -> Node:
        """The first of these fields that is there, else the last."""
        return self[next((name for name in names if name in self), names[-1])]

    def invalid_param(self, reason: str) -> ProxyError:
        """The error of a client whose value here is wrong."""
        path = self.path[:200]
        return ProxyError("invalid_request", f"{path or 'the body'}: {reason}", param=path)

    def check(self, count: int, unit: str) -> None:
        """Raise `ProxyError` for more of a unit than `LIMITS` has."""
        if count > LIMITS[unit]:
            raise self.invalid_param(f"at most {LIMITS[unit]} {unit}")

    def read(self, kind: type[Result], default: Result) -> Result:
        """The value, `default` where it is missing or null. Raises `ProxyError` for another type."""
        if self.value is not None and not isinstance(self.value, kind):
            raise self.invalid_param(f"must be {_KINDS[kind]}")
        return default if self.value is None else self.value

    @property
    def text(self) -> str:
        """The string, empty where it is missing."""
        return self.read(str, "")

    @property
    def word(self) -> str:
        """The string, which is short: a name or an id."""
        self.check(len(self.text), "characters of a name or id")
        return self.text

    @property
    def object(self) -> Node:
        """The object, an empty one where it is missing."""
        return Node(self.read(dict, {}), self.path)

    @property
    def objects(self) -> list[Node]:
        """The objects of the list."""
        items = [Node(one, f"{self.path}[{index}]") for index, one in enumerate(self.read(list, []))]
        if wrong := [item for item in items if not isinstance(item.value, dict)]:
            raise wrong[0].invalid_param("must be an object")
        return items


def _parse_body(body: bytes | bytearray) -> Node:
    """The JSON object in a body; half of a surrogate pair becomes U+FFFD."""
    data = body.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n")
    try:
        try:
            value = parse_json(data)
        except WireError:
            halves = data.lower().count(b"\\ud")
            if not halves:
                raise
            if halves > MAX_MARKS // 2:
                raise WireError("too many halves of pairs") from None
            text = json.dumps(parse_json(data, surrogates=True), ensure_ascii=False)
            value = parse_json(join_surrogates(text))
    except (WireError, RecursionError) as error:
        raise ProxyError("invalid_json", str(error)) from None
    if not isinstance(value, dict):
        raise ProxyError("invalid_json", "it must be an object")
    root = Node(value)
    level, depth, count = [root], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        level[0].check(depth, "levels of JSON")
        root.check(count, "objects and lists")
        inner = (inner for node in level for inner in _check_values(node))
        level = [*islice(inner, LIMITS["objects and lists"])]
    return root


def _check_values(node: Node) -> Iterator[Node]:
    """The objects and lists in one whose numbers are within `LIMITS`."""
    node.check(len(node.value), "entries")
    for key, value in node.value.items() if isinstance(node.value, dict) else enumerate(node.value):
        kind = type(value)  # of up to a million values
        if (kind is dict or kind is list) and value:
            yield node[key]
        elif kind is int and abs(value) >= _BEYOND:
            raise node[key].invalid_param(f"at most {LIMITS['digits']} digits")
        elif kind is float and not isfinite(value):
            raise node[key].invalid_param("the number is too large")


def parse_chat_request(body: bytes | bytearray) -> ChatRequest:
    """The request in the body of `POST /v1/chat/completions` (OpenAI API reference, "Create chat completion")."""
    root = _parse_body(body)
    request = _make_request(root, "messages", _parse_items(_get_items(root["messages"])))
    request.conversation_id = root["conversation_id"].word
    return request


def parse_completion_request(body: bytes | bytearray) -> ChatRequest:
    """The request in the body of the older `POST /v1/completions`: its one prompt is a user's message."""
    root = _parse_body(body)
    prompt = root.value.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str) or not prompt:
        raise root["prompt"].invalid_param("must be one text")
    return _make_request(root, "prompt", [Message("user", prompt)])


def parse_messages_request(body: bytes | bytearray) -> ChatRequest:
    """The request in the body of `POST /v1/messages` (Anthropic API reference, "Create a Message")."""
    root = _parse_body(body)
    nodes = _get_items(root["messages"])
    last = max((index for index, node in enumerate(nodes) if node["role"].text in ("", "user", "tool")), default=0)
    # The model answers what it reads last: what the system says after the user's last turn is moved before it.
    ordered = [*nodes[:last], *sorted(nodes[last:], key=lambda node: node["role"].text != "system")]
    system = _make_message("system", _parse_content(root["system"], "history"))
    return _make_request(root, "messages", _parse_items(ordered), system.text)


def parse_responses_request(body: bytes | bytearray, find_item: FindItem = lambda item_id: None) -> ChatRequest:
    """The request in the body of `POST /v1/responses` (OpenAI API reference, "Create a model response")."""
    root = _parse_body(body)
    if "conversation" in root:
        raise root["conversation"].invalid_param("is not known here: use previous_response_id, or send all items")
    items = _get_items(root["input"], find_item)
    tools = [tool for item in items if item["type"].text in _TOOL_KINDS for tool in item["tools"].objects]
    request = _make_request(root, "input", _parse_items(items), root["instructions"].text, tools)
    request.previous_response_id = root["previous_response_id"].word
    request.store = root["store"].read(bool, True)
    return request


def _make_request(
    root: Node, param: str, messages: Sequence[Message], instructions: str = "", more_tools: Sequence[Node] = ()
) -> ChatRequest:
    """A request from the fields of any API. `param` names the one with its messages."""
    if not messages and "previous_response_id" not in root:
        raise root[param].invalid_param("must be a text, or a list with at least one message")
    if root.value.get("n") not in (None, 1):
        raise root["n"].invalid_param("only 1 answer at a time")
    model = root["model"].word.strip() or "kimi"
    is_legacy = "functions" in root and "tools" not in root
    loaded = {name for one in messages if one.role in RESULT_ROLES for name in _LOADED_TOOL.findall(one.text)}
    tools, foreign = _parse_tools([*root["functions" if is_legacy else "tools"].objects, *more_tools], loaded)
    choice_node = root["function_call" if is_legacy else "tool_choice"]
    choice, tools = _parse_choice(choice_node, tools, foreign)
    form, options = _parse_format(root), root["stream_options"].object
    if described := [*([tool.description, tool.parameters] for tool in tools), *([form.schema] if form else [])]:
        root["tools"].check(len(encode_json(described)), "characters of text")
    is_serial = is_legacy or dig(choice_node.value, "disable_parallel_tool_use") is True
    words = {*model.split("-")[1:], *(["search"] if _SEARCH in foreign else [])}
    by_name = "nosearch" not in words if words & {"search", "nosearch"} else None
    request = ChatRequest(
        model=model,
        messages=(),
        stream=root["stream"].read(bool, False),
        include_usage=options["include_usage"].read(bool, False if "stream_options" in root else None),
        use_search=root["use_search"].read(bool, by_name),
        tools=tuple(tools),
        tool_choice=choice,
        parallel_tool_calls=root["parallel_tool_calls"].read(bool, True) and not is_serial,
        response_format=form,
        stop=_parse_stop(root.first("stop", "stop_sequences")),
        max_tokens=_parse_limit(root.first("max_completion_tokens", "max_output_tokens", "max_tokens")),
        left_out=tuple(name for name in foreign if name != _SEARCH),
        effort=_parse_effort(root.value),
        legacy_functions=is_legacy,
        instructions=instructions,
    )
    return add_messages(request, messages, param)


def _parse_format(root: Node) -> ResponseFormat | None:
    """The form of the answer, wherever an API has it; chat nests the schema once more."""
    nested = (root["text"].object["format"], root["output_config"].object["format"])
    form = next((one for one in nested if one.value), root.first("response_format", "output_format")).object
    kind = form["type"].text or "text"
    if kind not in ("text", "json_object", "json_schema"):
        raise form["type"].invalid_param("must be text, json_object or json_schema")
    if kind != "json_schema":
        return ResponseFormat("json_object") if kind == "json_object" else None
    own = form["json_schema"].object if "json_schema" in form else form
    return ResponseFormat("json_schema", _read_schema(own["schema"].value), own["name"].word)


def _read_schema(value: Any) -> Any:
    """A JSON Schema; anything else, such as PHP's empty list, means any object."""
    return value if isinstance(value, dict | bool) else {"type": "object", "properties": {}}


def _parse_stop(node: Node) -> tuple[str, ...]:
    stops = [node.value] if isinstance(node.value, str) else node.read(list, [])
    if not all(isinstance(stop, str) for stop in stops):
        raise node.invalid_param("must be a string, or a list of strings")
    node.check(len(stops), "stop sequences")
    node.check(max(map(len, stops), default=0), "characters of a stop sequence")
    return tuple(filter(None, dict.fromkeys(stops)))


def _parse_limit(node: Node) -> int | None:
    """The limit of the answer; 0 and less, as some clients send it, is none."""
    limit = 0 if node.value is None else node.value
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit % 1:
        raise node.invalid_param("must be a whole number")
    return int(limit) if limit > 0 else None


def _parse_effort(root: object) -> str:
    """The effort of thinking, wherever an API has it; what is no word means nothing."""
    switches = {"disabled": "none", "enabled": "enabled", "adaptive": "enabled"}
    switch = switches.get(dig_word(root, "thinking", "type"), "")
    paths = ("reasoning_effort",), ("reasoning", "effort"), ("output_config", "effort")
    words = [dig_word(root, *path) for path in paths if switch != "none"]
    return next(filter(None, words), switch)


_SEARCH: Final = "web_search"


def _parse_tools(nodes: Iterable[Node], loaded: set[str]) -> tuple[Sequence[Tool], Sequence[str]]:
    """The functions among tools, each name once, and the names of what is none, `_SEARCH` for a web search.

    A deferred function counts once it is `loaded`; `DeferredToolPlaceholder` is Claude Code's, for the rest.
    """
    tools: dict[str, Tool] = {}
    foreign: list[str] = []
    for node in nodes:
        kind, name = node["type"].text or "function", _read_function_name(node.value)
        own = node["function"].object if "function" in node else node
        if kind == "namespace":
            inner, _ = _parse_tools(
                (Node({**one.value, "namespace": name}, one.path) for one in node["tools"].objects), loaded
            )
            tools.update((tool.name, tool) for tool in inner)
        elif kind.startswith(_SEARCH) or name == "$web_search":
            foreign.append(_SEARCH)
        elif kind != "function" and not (kind == "custom" and "input_schema" in node):
            words = (name, dig_word(node.value, "server_label"), kind)
            foreign.append(next(filter(_FUNCTION_NAME.fullmatch, words), "(other)"))
        elif not _FUNCTION_NAME.fullmatch(name):
            raise own["name"].invalid_param("must be a name without whitespace, of at most 256 characters")
        elif name in loaded or not (node["defer_loading"].value or name == "DeferredToolPlaceholder"):
            schema = _read_schema(own.first("input_schema", "parameters").value)
            tools.setdefault(name, Tool(name, own["description"].text, schema, own["namespace"].word))
    return [*tools.values()], [*dict.fromkeys(foreign)]


def _read_function_name(value: Any) -> str:
    """The `name` in an object, or in its `function` or `custom`, behind that of its namespace; empty without one."""
    own = dig(value, "function") or dig(value, "custom") or value
    return ".".join(filter(None, [dig_word(own, "namespace"), dig_word(own, "name")]))


def _parse_choice(node: Node, tools: Sequence[Tool], foreign: Sequence[str]) -> tuple[ToolChoice, Sequence[Tool]]:
    """The choice, and the tools that it allows; `auto` where it wants `foreign` ones."""
    mode = value = node.value
    name = _read_function_name(value)
    if isinstance(value, dict):
        mode = value.get("type") or ("function" if name else "auto")
    if mode == "allowed_tools":
        own = dig(value, mode) or value  # chat nests it
        names = {*map(_read_function_name, dig_list(own, "tools"))} - {""}
        allowed = [tool for tool in tools if names & {tool.name, tool.own_name, tool.namespace}]
        mode, tools = (dig(own, "mode"), allowed) if allowed else ("none", tools)
    if mode == "none":
        return ToolChoice("none"), tools
    choice = None  # not known
    if mode in ("required", "any"):
        choice = ToolChoice("required") if tools else ToolChoice() if foreign else None
    elif mode in ("function", "tool"):
        named = (tool.name for tool in tools if name and name in (tool.name, tool.own_name))
        choice = next((ToolChoice("named", one) for one in named), ToolChoice() if name in foreign else None)
    elif mode in (None, "auto") or isinstance(value, dict):  # another kind of tool means auto
        choice = ToolChoice()
    if choice is None:
        raise node.invalid_param("must be auto, none, required, or name one of the functions in tools")
    return choice, tools


_DATA_URL: Final = re.compile(r'data:([^;,]*)((?:;(?:[^;,"]|"[^"]*")*)*?);\s*base64\s*,', re.IGNORECASE)  # RFC 2397
_DATA_NAME: Final = re.compile(r'name=("[^"]*"|[^;,"]*)', re.IGNORECASE)
_Piece = str | Attachment | ToolCall | Message  # what one part may be; a Message is the result of a call
_Place = Literal["last", "history", "inside"]  # said by a person and last, said before, or in a part or a result
_IMAGE_KINDS: Final = ("image_url", "input_image", "image")
_FILE_KINDS: Final = ("file", "input_file", "document")
_TOOL_KINDS: Final = ("additional_tools", "tool_search_output")
_DROPPED_KINDS: Final = ("thinking", "redacted_thinking", "reasoning", *_TOOL_KINDS)  # not for the model, or no words


def _get_items(node: Node, find_item: FindItem = lambda item_id: None) -> list[Node]:
    """The messages or items; each item of an earlier answer can be referred to once, to bound the text."""
    if isinstance(node.value, str):
        return [Node({"content": node.value}, node.path)] if node.value else []
    seen: set[str] = set()
    items: list[Node] = []
    for item in node.objects:
        found: Mapping[str, Any] | None = item.value
        is_bare = "id" in item and item.value.keys().isdisjoint(("type", "role", "content"))
        if is_bare or item["type"].value == "item_reference":
            name = item["id"].word
            found = find_item(name) if name not in seen else None
            seen.add(name)
        if found is None:
            raise item.invalid_param("is of no kept answer, or referred to a second time: send the item itself")
        items.append(Node(found, item.path))
    return items


def _parse_items(nodes: Sequence[Node]) -> list[Message]:
    """The messages in the messages of any API, or in the items of the Responses API."""
    messages: list[Message] = []
    for node in nodes:
        if node["type"].text in ("", "message") or ("role" in node and "content" in node):
            messages += _parse_message(node, "last" if node is nodes[-1] else "history")
        elif pieces := _parse_content(node, "history"):
            messages += _make_messages("assistant", pieces)
    return messages


def _parse_message(node: Node, place: _Place) -> list[Message]:
    """The message in a `{"role", "content"}` of any API, and the results of tools that are among its parts."""
    role = node["role"].text or "user"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,31}", role):
        raise node["role"].invalid_param("must be a short word such as user")
    called, name = node["tool_call_id"].word, node["name"].word
    is_result = bool(called) or role in RESULT_ROLES
    pieces = _parse_content(node["content"], "inside" if is_result else place if role == "user" else "history")
    pieces += [node["refusal"].text, *map(_parse_call, node["tool_calls"].objects)]
    if "function_call" in node:
        pieces.append(_parse_call(node["function_call"].object))
    if is_result:
        return [replace(_make_message("tool" if called else role, pieces), tool_call_id=called, tool_name=name)]
    return _make_messages(role, pieces, f"{quote_words(name)[:64]}: " if name else "")


def _make_message(role: str, pieces: Sequence[_Piece], prefix: str = "") -> Message:
    """The texts, attachments and calls among `pieces` as one message; each text begins on a line of its own."""
    return Message(
        role,
        prefix + "\n".join(piece for piece in pieces if isinstance(piece, str) and piece),
        tuple(piece for piece in pieces if isinstance(piece, Attachment)),
        tuple(piece for piece in pieces if isinstance(piece, ToolCall)),
    )


def _make_messages(role: str, pieces: Sequence[_Piece], prefix: str = "") -> list[Message]:
    """The message that `pieces` are, and the results of tools among them, which come before a person's words."""
    results = [piece for piece in pieces if isinstance(piece, Message)]
    message = _make_message(role, pieces, prefix)
    if results and not (message.text or message.attachments or message.calls):
        return results
    return [message, *results] if role == "assistant" else [*results, message]


def _parse_content(content: Node, place: _Place) -> list[_Piece]:
    """What a content, a part of one or an item says; the result of a tool may be any JSON."""
    value = content.value
    if value is None or isinstance(value, str):
        return [value or ""]
    if isinstance(value, list):
        return [piece for index in range(len(value)) for piece in _parse_content(content[index], place)]
    if place == "inside" and not dig_word(value, "type"):
        return [encode_json(value)]
    if not isinstance(value, dict):
        raise content.invalid_param("must be a string, an object, or a list of them")
    kind = content["type"].text
    if kind in ("text", "input_text", "output_text", "refusal"):
        return [content.first("refusal", "data", "text").text]
    if kind in _IMAGE_KINDS or (kind in _FILE_KINDS and dig(value, "source", "type") not in ("text", "content")):
        return [content["context"].text, _parse_attachment("image" if kind in _IMAGE_KINDS else "file", content)]
    if kind in _DROPPED_KINDS:
        return []
    if kind == "tool_reference":
        return [f"The tool {content['tool_name'].word} can be called now."]
    is_call, is_result = kind.endswith(("_call", "tool_use")), kind.endswith(("_call_output", "tool_result"))
    if place == "inside" or not (is_call or is_result):
        return _tell_part(content, place)
    result = [_parse_result(content)] if is_result or "output" in content or "error" in content else []
    return [*([_parse_call(content)] if is_call else []), *result]


def _tell_part(part: Node, place: _Place) -> list[_Piece]:
    """The texts in a document, a search result or an unknown part; else a word in its place."""
    told: list[_Piece] = []
    for one in map(part.__getitem__, ("title", "url", "context", "source", "text", "content")):
        if isinstance(one.value, str | list) or dig(one.value, "type") in ("text", "content"):
            told += _parse_content(one, "inside")
    kind = quote_words(part["type"].text)[:40]
    if place == "last" and not any(told):
        raise part["type"].invalid_param(f"unknown kind of part: {kind or '(none)'}; text, images and files are known")
    return told if any(told) else [f"[{kind or 'part'} left out]"]


def _parse_call(node: Node) -> ToolCall:
    """A call that the model made earlier."""
    own = next((node[kind] for kind in ("function", "custom") if isinstance(node[kind].value, dict)), node)
    value = own.first("arguments", "input", "action", "operation").value or {}
    name = _read_function_name(node.value) or node["type"].text.removesuffix("_call")
    own["name"].check(len(name), "characters of a name or id")
    return ToolCall(node.first("call_id", "id").word, name, value if isinstance(value, str) else encode_json(value))


def _parse_result(node: Node) -> Message:
    """What a tool gave back, with the pictures and files in it."""
    content = node.first("output", "error", "content")
    is_error = ("error" in node and "output" not in node) or node["is_error"].read(bool, False)
    message = _make_message("tool", _parse_content(content, "inside"), "Error: " if is_error else "")
    return replace(message, tool_call_id=node.first("tool_use_id", "call_id", "id").word)


def _parse_attachment(kind: AttachmentKind, part: Node) -> Attachment:
    """The attachment of a part, in its `file`, its `source` or itself: a file's id, a URL, or base64."""
    own = part.first("file", "source").object if "file" in part or "source" in part else part
    name = own["filename"].text or part.first("filename", "title").text
    if "file_id" in own:
        return Attachment(kind, own["file_id"].path, file_id=own["file_id"].word)
    node = own.first("image_url", "file_url", "data", "file_data", "url")
    node = node["url"] if isinstance(node.value, dict) else node
    data = node.text.strip()
    if not data:
        raise node.invalid_param("must be a URL, or base64; else give file_id")
    if {":", "."}.isdisjoint(data[:20]):  # which are no letters of base64
        content_type = own.first("media_type", "mimeType").text
        return Attachment(kind, node.path, data=data, name=name, content_type=content_type.strip().lower())
    if data[:5].lower() != "data:":
        return Attachment(kind, node.path, url=data, name=name)
    head = _DATA_URL.match(data[:1024])
    if head is None:
        raise node.invalid_param("a data URL must look like data:TYPE;base64,…")
    named = _DATA_NAME.search(head[2])
    name = name or (unquote(named[1].strip('"')) if named else "")
    return Attachment(kind, node.path, "", data, head.end(), name, head[1].strip().lower())


def add_messages(request: ChatRequest, before: Sequence[Message], param: str) -> ChatRequest:
    """The request with messages `before` its own. Only the newest attachments are kept; the same one counts once."""
    messages, node, unit = (*before, *request.messages), Node(None, param), "files and pictures in a message"
    texts = [text for one in messages for text in (one.text, *(call.arguments for call in one.calls))]
    node.check(sum(map(len, texts)) + len(request.instructions), "characters of text")
    seen: set[Attachment] = set()
    limited: list[Message] = []
    for message in reversed(messages):
        if not message.attachments:
            limited.append(message)
            continue
        fresh = [one for one in dict.fromkeys(message.attachments) if one not in seen]
        if not limited:
            node.check(len(fresh), unit)
        left = max(0, len(seen) + len(fresh) - LIMITS[unit])
        seen.update(fresh[left:])
        text = "\n".join(filter(None, [message.text, *(f"[{one.kind} left out]" for one in fresh[:left])]))
        limited.append(replace(message, text=text, attachments=tuple(fresh[left:])))
    return replace(request, messages=tuple(reversed(limited)))


def answer_message(response: Mapping[str, Any]) -> Message:
    """The assistant's message that a response object becomes in the next turn, without thinking."""
    texts = [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]
    calls = (_parse_call(Node(item)) for item in response["output"] if item["type"] == "function_call")
    return Message("assistant", "\n".join(filter(None, texts)), calls=tuple(calls))


# A bare URL, or a stretch of text in which none is marked: from there the mark would get into users' files.
_URL_OR_LITERAL: Final = re.compile(
    r"""
      ^[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<fence>`{3,}+(?!.*`)|~{3,}+).*  # a code fence, to its end or the text's
        (?:\n(?![ \t>]*(?P=fence)[`~]*[ \t]*$).*)*+(?:\n.*)?
    | ^(?:[ ]{4}|\t).* | ^[ ]{0,3}\[[^\[\]\n]+\]:.*  # indented code, a link's definition
    | ```.*?``` | ``(?:[^`\n]|`(?!`))*`` | `[^`\n]*`
    | "[^"\n]*" | [“‘「『«][^“”‘’「」『』«»\n]*[”’」』»] | (?<!\w)'[^'\n]*'(?!\w)
    | <url\s[^<>\n]*>[^<>\n]*</url> | <[^<>\n]*> | \[[^\[\]\n]*\]\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\)
    | (?P<url>https?://(?:www\.)?[-a-z0-9@:%._+~#=]{2,256}\.[a-z]{2,6}\b[-a-z0-9@:%_+.~#?&/=]*)
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII | re.MULTILINE,
)


def _marks_urls(request: ChatRequest) -> bool:
    """Whether URLs in what the user said are put in the tag that has the service read those pages [ref]."""
    return request.is_plain and request.use_search is not False


def _mark_urls(messages: Sequence[Message]) -> list[Message]:
    """The messages with the URLs marked in the newest of what the user said."""
    left = iter(range(MAX_MARKED_URLS))

    def mark(found: re.Match[str]) -> str:
        is_marked = found["url"] and next(left, None) is not None
        return f'<url id="" type="url" status="" title="" wc="">{found[0]}</url>' if is_marked else found[0]

    marked = [
        replace(one, text=_URL_OR_LITERAL.sub(mark, one.text))
        if one.role == "user" and "://" in one.text and len(one.text) <= MAX_MARKED_TEXT
        else one
        for one in reversed(messages)
    ]
    return marked[::-1]


def render_tools(request: ChatRequest) -> str:
    """The first line of the prompt, which tells what the model may call, if anything."""
    tools = describe_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    return f"system:{tools}\n" if tools else ""


def render_prompt(request: ChatRequest) -> str:
    """The one text that the service is sent: tools, each message as `role:text` and a line end [ref], and the form of
    the answer. In a conversation that exists a message that is alone goes without its role.
    """
    names: dict[str, str] = {}
    lines: list[str] = []
    for message in _mark_urls(request.messages) if _marks_urls(request) else request.messages:
        names.update((call.id, call.name) for call in message.calls)
        words = [message.text] if message.text else []
        if message.role in RESULT_ROLES:
            words = [render_tool_response(names.get(message.tool_call_id) or message.tool_name, message.text)]
        words += (render_tool_call(call.name, call.arguments) for call in message.calls)
        lines.append(f"{message.role}:" + "\n".join(words))
    lines = lines[-len(request.sent_messages) :]
    if request.instructions and not request.continues:
        lines.insert(0, f"system:{request.instructions}")
    tools = render_tools(request)
    if request.response_format:
        lines.append(f"system:{describe_format(request.response_format)}")
    if request.continues and not tools and len(lines) == 1:
        return lines[0].partition(":")[2]
    return tools + "".join(f"{line}\n" for line in lines)


def make_chain(request: ChatRequest, make_id: Callable[[], str]) -> Chain:
    """The filters that `request` needs, in their order; `make_id` gives the ids of calls."""
    filters: list[Filter] = [ThinkFilter(), *([UrlMarkFilter()] if _marks_urls(request) else []), CitationFilter()]
    if request.max_tokens is not None:
        filters.append(LengthFilter(request.max_tokens))
    if request.tools and request.tool_choice.mode != "none":
        filters.append(ToolCallFilter(request.tools, request.tool_choice, request.parallel_tool_calls, make_id))
    if request.stop:
        filters.append(StopFilter(request.stop))
    if request.response_format is not None:
        filters.append(StructureFilter(request.response_format))
    return Chain(filters)


# ==== 11. Replies ===========================================================
#
# Events in, the client's bytes out. `APIS` has one row for each API: how its requests are read, how its answers are
# encoded, how its failures look. Nothing before this point knows which API the client speaks. `ContentRenderer` decides
# which text and annotations a client is shown; an `Encoder` gives them the form of an API, streamed or whole.

MODERATED_SENTENCE: Final = "\n[内容由于不合规被停止生成，我们换个话题吧]"
_SOURCES_HEAD: Final = "\n\n搜索结果来自：\n"


_JSON_START: Final = re.compile(r"\s*(?:```\w*\s*)?(?:\{\s*[\"}]|\[\s*[\"{\[\]])")


class ContentRenderer:
    """The text that a client is shown, event by event, and OpenAI's `annotations` of it.

    `sources`: `text`, `annotations` or `none`. Inline hits stand where they arrive if `streamed`, else in a list at the
    end [ref]; others in a numbered Markdown list at the end. Without `sentence` a moderated answer ends as it is.
    """

    def __init__(self, sources: str, *, streamed: bool, sentence: bool = True) -> None:
        self.length = 0
        self.annotations: list[dict[str, Any]] = []
        self._sources = sources
        self._streamed = streamed and sources == "text"
        self._sentence = sentence
        self._inline = False
        self._after_hits = False
        self._hits: list[SearchHit] = []
        self._annotated = 0
        self._cited: set[str] = set()
        self._start = ""  # of the answer

    def feed(self, event: Event) -> str:
        """The text that `event` adds to the content."""
        text = ""
        if isinstance(event, Text):
            if len(self._start) < 40:
                self._start += event.text[:40]
                if self._sources == "text" and _JSON_START.match(self._start):
                    self._sources = "annotations"  # a program reads it, a title say
            text = "\n" + event.text if self._after_hits else event.text
            self._after_hits = False
        elif isinstance(event, Opened):
            self._inline = event.hits_inline
        elif isinstance(event, SearchHit) and self._inline and self._streamed:
            self._after_hits = True
            text = f"检索 {event.title}({event.url}) ...\n"
            self._annotate(event, self.length, text[:-1])
        elif isinstance(event, SearchHit) and self._inline:
            self._hits.append(event)
        elif isinstance(event, Citation) and self._sources != "none":
            text = "" if _JSON_START.match(self._start) else f"[{event.number}]"
            self._cited.add(event.hit.url)
            self._annotate(event.hit, self.length, text)
        elif isinstance(event, Sources):
            self._hits = list(event.hits)
        elif isinstance(event, Finished) and event.reason == "content_filter" and self._sentence:
            text = MODERATED_SENTENCE if self.length else MODERATED_SENTENCE.lstrip()
        self.length += len(text)
        return text

    def list_sources(self) -> str:
        """The list of sources at the end of an answer. Hits that are not cited are annotated there."""
        text = _SOURCES_HEAD if self._hits and self._sources == "text" else ""
        for number, hit in enumerate(self._hits, 1):
            line = self._render_hit(number, hit) if text else ""
            if hit.url not in self._cited:
                self._annotate(hit, self.length + len(text), line.rstrip("\n"))
            text += line
        text = text if self._inline else text.rstrip("\n")
        self.length += len(text)
        return text

    def _render_hit(self, number: int, hit: SearchHit) -> str:
        """A line of the list: a Markdown link whatever the hit holds, or as the reference words inline hits [ref]."""
        if self._inline:
            return f"{hit.title}({hit.url})\n"
        title = " ".join(re.sub(r"([\\\[\]])", r"\\\1", hit.title).split())
        url = hit.url.replace("(", "%28").replace(")", "%29").replace(" ", "%20")
        return f"{number}. [{title}]({url})\n"

    def _annotate(self, hit: SearchHit, start: int, text: str) -> None:
        self._annotated += 1
        if self._sources != "none" and self._annotated <= MAX_HITS:
            citation = {"url": hit.url, "title": hit.title, "start_index": start, "end_index": start + len(text)}
            self.annotations.append({"type": "url_citation", "url_citation": citation})


def encode_event(value: Mapping[str, Any]) -> bytes:
    """`value` as an SSE event, which has the name of its `type` where there is one."""
    return encode_sse(encode_json(value), value.get("type", ""))


def split_event(value: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """An event before and after its last empty string: rendered once, since only the text there changes."""
    before, _, after = encode_event(value).rpartition(b'""')
    return before, after


class Encoder:
    """Encodes one answer for a client: a stream event by event, else one JSON object once the answer is over.

    `chunks`: how many pieces of text and calls the client was shown. `keep_alive` fills silence; empty where nothing
    may. `response`: the Responses API's object once the answer is over, None in the other APIs.

    A subclass is the form of an API. It streams runs of text (`kind`: `text`, `thinking`, or `sources` for their list)
    by the template that `_begin_text` makes, and has `_stream_call` and `_stream_end`. Its `_render_whole` makes the
    object of `_blocks`: runs of text with their kinds, and calls with the kind `call`, in the order in which they came.
    """

    keep_alive = b": still waiting for Kimi\n\n"  # a comment, which clients skip (WHATWG HTML, section 9.2.7)
    response: Mapping[str, Any] | None = None
    _annotates = True  # the API has a place for annotations
    _streams_hits = False  # a stream shows inline hits where they arrive
    _ending = b""
    _kind = ""  # of the run of text that is being streamed
    _template = (b"", b"")  # of its events: what stands before and after the text

    def __init__(self, request: ChatRequest, *, created: int, sources: str, prompt: str, response_id: str = "") -> None:
        self.chunks = 0
        self.content_type = "text/event-stream" if request.stream else "application/json"
        self.keep_alive = self.keep_alive if request.stream else b""
        self._streamed = request.stream
        self._request = request
        self._created = created
        self._conversation_id = ""
        self._renderer = ContentRenderer(
            self._choose_sources(request, sources),
            streamed=request.stream and self._streams_hits,
            sentence=request.response_format is None,
        )
        self._prompt_tokens = estimate_tokens(prompt)
        self._written = 0  # hundredths of tokens
        self._thought = 0
        self._blocks: list[tuple[str, Any]] = []
        self._output: list[bytes] = []

    def _choose_sources(self, request: ChatRequest, sources: str) -> str:
        """How sources are shown: never as text where a program reads it, and no mark without its source."""
        is_silent = "silent" in request.model.split("-")[1:] or request.tools or request.response_format is not None
        if sources == "text" and is_silent:
            sources = "annotations"
        return "none" if sources == "annotations" and not self._annotates else sources

    def feed(self, events: list[Event]) -> bytes:
        """The bytes for `events`. Empty until there is something to show: before that, a failure has its own status."""
        for event in events:
            if isinstance(event, Thinking):
                self._thought += weigh(event.text)
                self._add_text("thinking", event.text)
            elif isinstance(event, Text):
                self._written += weigh(event.text)
                self._add_text("text", self._renderer.feed(event))
            elif isinstance(event, ToolCall):
                self._written += weigh(render_tool_call(event.name, event.arguments))
                self._blocks.append(("call", event))
                self.chunks += 1
                if self._streamed:
                    self._stream_call(event)
            else:
                if isinstance(event, Opened):
                    self._conversation_id = event.conversation_id
                if text := self._renderer.feed(event):
                    self._add_text("text", text)
                if isinstance(event, Finished):
                    self._add_end(event)
        data = b"".join(self._output) if self._streamed else b""
        self._output.clear()
        return data

    def finish(self) -> bytes:
        """What ends a complete answer, or all of it where it is not streamed."""
        return self._ending

    def fail(self, error: ProxyError) -> bytes:
        """The last event of a stream that failed after its first bytes were sent; empty for a whole answer."""
        return encode_event(self._render_failure(error)) if self._streamed else b""

    def _add_text(self, kind: str, text: str) -> None:
        if not self._streamed:
            if not self._blocks or self._blocks[-1][0] != kind:
                self._blocks.append((kind, bytearray()))  # thousands of small strings would take ten times the memory
            self._blocks[-1][1].extend(text.encode("utf-8", "replace"))
            self.chunks += 1
            return
        if kind != self._kind:
            self._kind = kind
            self._begin_text(kind)
        before, after = self._template
        for start in range(0, len(text), MAX_PIECE):
            piece = text[start : start + MAX_PIECE]
            self._output += (before, encode_json(piece).encode(), after)
            self.chunks += 1

    def _add_end(self, finished: Finished) -> None:
        if text := self._renderer.list_sources():
            self._add_text("sources", text)
        if self._streamed:
            self._stream_end(finished)
        else:
            self._ending = encode_json(self._render_whole(finished)).encode()

    def _count_tokens(self) -> tuple[int, int, int]:
        """The tokens of the prompt, of all that the model wrote, and of its thinking. What the proxy adds is free."""
        thought = -(-self._thought // 100)
        return self._prompt_tokens, thought - (-self._written // 100), thought

    def _write(self, value: Mapping[str, Any]) -> None:
        self._output.append(encode_event(value))

    def _begin_text(self, kind: str) -> None: ...
    def _stream_call(self, call: ToolCall) -> None: ...
    def _stream_end(self, finished: Finished) -> None: ...

    def _render_whole(self, finished: Finished) -> Mapping[str, Any] | None:
        self._stream_end(finished)
        return self.response

    def _render_failure(self, error: ProxyError) -> dict[str, Any]:
        return {**render_error(error), "choices": []}


class ChatEncoder(Encoder):
    """OpenAI's `chat.completion`, or its chunks (OpenAI API reference, "Create chat completion", "Streaming").

    The last chunk carries `usage` where `include_usage` of `stream_options` is not given [ref].
    """

    _streams_hits = True
    _ending = b"data: [DONE]\n\n"
    _objects = ("chat.completion", "chat.completion.chunk")
    _is_first = True  # the first delta has the role

    def _begin_text(self, kind: str) -> None:
        if self._is_first:
            self._kind = ""  # what follows the first delta needs another template
        name = "reasoning_content" if kind == "thinking" else "content"
        self._template = split_event(self._render_chunk({**self._start(), name: ""}))

    def _stream_call(self, call: ToolCall) -> None:
        calls = self._render_calls([{"index": len(self._blocks) - 1, **_render_call(call)}])
        self._write(self._render_chunk({**self._start(content=None), **calls}))

    def _stream_end(self, finished: Finished) -> None:
        chunk = self._render_chunk({**self._start(content=""), **self._render_annotations()}, finished.reason)
        usage = {"usage": self._render_usage()}
        self._write(chunk | (usage if self._request.include_usage is None else {}))
        if self._request.include_usage:
            self._write({**chunk, "choices": [], **usage})

    def _start(self, **fields: Any) -> dict[str, Any]:
        """What the first delta has beside its own fields."""
        is_first, self._is_first = self._is_first, False
        return {"role": "assistant", **fields} if is_first else {}

    def _render_chunk(self, delta: dict[str, Any], reason: FinishReason | None = None) -> dict[str, Any]:
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._render_head(), **usage, "choices": [self._render_choice("delta", delta, reason)]}

    def _render_whole(self, finished: Finished) -> dict[str, Any]:
        text = b"".join(value for kind, value in self._blocks if kind in ("text", "sources")).decode()
        thinking = b"".join(value for kind, value in self._blocks if kind == "thinking").decode()
        calls = [_render_call(call) for kind, call in self._blocks if kind == "call"]
        message = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            **(self._render_calls(calls) if calls else {}),
            **({"reasoning_content": thinking} if thinking else {}),
            **self._render_annotations(),
        }
        choice = self._render_choice("message", message, finished.reason)
        return {**self._render_head(), "choices": [choice], "usage": self._render_usage()}

    def _render_head(self) -> dict[str, Any]:
        kind = self._objects[self._streamed]
        return {"id": self._conversation_id, "object": kind, "created": self._created, "model": self._request.model}

    def _render_choice(self, field: str, message: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        is_old_call = self._request.legacy_functions and reason == "tool_calls"
        return {"index": 0, field: message, "finish_reason": "function_call" if is_old_call else reason}

    def _render_calls(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"function_call": calls[0]["function"]} if self._request.legacy_functions else {"tool_calls": calls}

    def _render_annotations(self) -> dict[str, Any]:
        return {"annotations": self._renderer.annotations} if self._renderer.annotations else {}

    def _render_usage(self) -> dict[str, Any]:
        prompt, completion, thought = self._count_tokens()
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**usage, "completion_tokens_details": {"reasoning_tokens": thought}} if thought else usage


def _render_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class CompletionEncoder(ChatEncoder):
    """The older API's `text_completion`, which has no form for thinking, calls and annotations."""

    _objects = ("text_completion", "text_completion")

    def _add_text(self, kind: str, text: str) -> None:
        if kind != "thinking":
            super()._add_text(kind, text)

    def _render_choice(self, field: str, message: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "logprobs": None, "text": message.get("content") or "", "finish_reason": reason}


_SIGNATURE: Final = "a2ltaV9wcm94eQ=="  # clients send it back with the thinking, where it is dropped
_STOP_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_MESSAGES_ERRORS: Final = {404: "not_found_error", 408: "api_error", 413: "request_too_large", 504: "timeout_error"}


def render_messages_error(error: ProxyError) -> dict[str, Any]:
    """Anthropic's error object (Anthropic API reference, "Errors")."""
    kind = _MESSAGES_ERRORS.get(error.status, error.failure.type)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessagesEncoder(Encoder):
    """Anthropic's message, or its events (Anthropic API reference, "Create a Message", "Streaming Messages").

    Thinking, text and each call have blocks of their own, in the order in which they came. The list of sources is the
    last. An answer without any block has an empty text, since clients read the first block without asking.
    """

    keep_alive = encode_event({"type": "ping"})  # may stand before `message_start` too
    _annotates = False
    _ending = encode_event({"type": "message_stop"})
    _index = -1  # of the block that is open
    _type = ""  # of that block

    def _begin_text(self, kind: str) -> None:
        self._begin_block(_render_block(kind, b"", signature=""))
        self._template = split_event(self._render_delta({"type": f"{self._type}_delta", self._type: ""}))

    def _stream_call(self, call: ToolCall) -> None:
        self._kind = ""
        self._begin_block({**_render_block("call", call), "input": {}})
        self._write(self._render_delta({"type": "input_json_delta", "partial_json": call.arguments}))

    def _stream_end(self, finished: Finished) -> None:
        if self._index < 0:
            self._begin_text("text")
        self._end_block()
        usage = {"output_tokens": self._count_tokens()[1]}
        self._write({"type": "message_delta", "delta": _render_stop(finished), "usage": usage})

    def _begin_block(self, block: dict[str, Any]) -> None:
        """Begin a block after the one that is open, or the message where it is the first."""
        if self._index < 0:
            stop = {"stop_reason": None, "stop_sequence": None}
            self._write({"type": "message_start", "message": self._render_message([], stop, 1)})
        else:
            self._end_block()
        self._index += 1
        self._type = block["type"]
        self._write({"type": "content_block_start", "index": self._index, "content_block": block})

    def _end_block(self) -> None:
        if self._type == "thinking":
            self._write(self._render_delta({"type": "signature_delta", "signature": _SIGNATURE}))
        self._write({"type": "content_block_stop", "index": self._index})

    def _render_delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _render_whole(self, finished: Finished) -> dict[str, Any]:
        content = [_render_block(kind, value) for kind, value in self._blocks or [("text", b"")]]
        return self._render_message(content, _render_stop(finished), self._count_tokens()[1])

    def _render_message(self, content: list[Any], stop: Mapping[str, Any], output_tokens: int) -> dict[str, Any]:
        head = {"id": f"msg_{self._conversation_id}", "type": "message", "role": "assistant"}
        tokens = {"input_tokens": self._prompt_tokens, "output_tokens": output_tokens}
        usage = {**tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {**head, "model": self._request.model, "content": content, **stop, "usage": usage}

    def _render_failure(self, error: ProxyError) -> dict[str, Any]:
        return render_messages_error(error)


def _render_block(kind: str, value: Any, signature: str = _SIGNATURE) -> dict[str, Any]:
    """A block of a message: of a run of text, or of a call."""
    if kind == "call":
        return {"type": "tool_use", "id": value.id, "name": value.name, "input": json.loads(value.arguments)}
    if kind == "thinking":
        return {"type": "thinking", "thinking": value.decode(), "signature": signature}
    return {"type": "text", "text": value.decode()}


def _render_stop(finished: Finished) -> dict[str, str | None]:
    reason = "stop_sequence" if finished.stop_sequence else _STOP_REASONS.get(finished.reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": finished.stop_sequence or None}


class _Item:
    """The message or reasoning item that is being written, with its one part.

    `start` is its position in all text shown; `path` leads its events to the part; `extra` is in those about the text.
    """

    def __init__(self, type: str, id: str, output_index: int, start: int) -> None:
        self.type = type
        self.start = start
        self.text = bytearray()  # thousands of small strings would take ten times the memory
        self.parts: list[dict[str, Any]] = []
        index = "content_index" if type == "message" else "summary_index"
        self.path: dict[str, Any] = {"item_id": id, "output_index": output_index, index: 0}
        if type == "message":
            self.value = {"id": id, "type": type, "status": "in_progress", "role": "assistant", "content": self.parts}
            self.part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.extra: dict[str, Any] = {"logprobs": []}
            self.part_event, self.text_event = "response.content_part", "response.output_text"
        else:
            self.value = {"id": id, "type": type, "summary": self.parts}
            self.part = {"type": "summary_text", "text": ""}
            self.extra = {}
            self.part_event, self.text_event = "response.reasoning_summary_part", "response.reasoning_summary_text"
        # From delta to delta, only the text and the number after it differ.
        self.delta_start, _ = split_event({"type": f"{self.text_event}.delta", **self.path, **self.extra, "delta": ""})


_ID_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponsesEncoder(Encoder):
    """The Responses API's object, or its events (OpenAI API reference, "Streaming events"), numbered from 0.

    Each run of thinking becomes a reasoning item, each run of text a message. Calls come last: what stands at the
    text's end, sources and the sentence of moderation, is known only when the answer is over, and a message is whole
    before the next item begins. A whole answer is the object that ends a stream.
    """

    def __init__(self, request: ChatRequest, *, response_id: str = "", **fields: Any) -> None:
        super().__init__(request, **fields)
        head = {"id": response_id, "object": "response", "created_at": self._created, "model": request.model}
        self._head: dict[str, Any] = head | {
            "instructions": request.instructions or None,
            "max_output_tokens": request.max_tokens,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id or None,
            "tool_choice": "auto",
            "tools": [],
        }
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._item: _Item | None = None

    def fail(self, error: ProxyError) -> bytes:
        """The last event of an answer that failed; nothing where it was over before.

        The codes of its `error` are a closed set; ours stands in the message. Codex CLI waits as `try again in` says.
        """
        if self.response is not None:
            return b""
        is_limit = error.status == 429
        wait = f"; try again in {error.retry_after_seconds}s" if is_limit else ""
        code = "rate_limit_exceeded" if is_limit else "server_error"
        details = {"code": code, "message": f"{error.code}: {error.message}{wait}"}
        self._begin()
        self._emit("response.failed", response=self._render("failed", error=details))
        return self.feed([])

    def _add_text(self, kind: str, text: str) -> None:
        item, item_type = self._item, "reasoning" if kind == "thinking" else "message"
        if item is None or item.type != item_type:
            item = self._begin_item(item_type, self._renderer.length - len(text))
        item.text += text.encode("utf-8", "replace")
        for start in range(0, len(text), MAX_PIECE):
            piece = encode_json(text[start : start + MAX_PIECE]).encode()
            self._output += (item.delta_start, piece, b',"sequence_number":%d}\n\n' % self._number)
            self._number += 1
            self.chunks += 1
        self._emit_annotations(item)

    def _stream_end(self, finished: Finished) -> None:
        """Emit all that is left. An answer without calls ends with a message, be it empty."""
        reason = _INCOMPLETE.get(finished.reason)
        status = "incomplete" if reason else "completed"
        self._begin()
        if not self._blocks and (self._item is None or self._item.type != "message"):
            self._begin_item("message", self._renderer.length)
        self._end_item(status)
        for _, call in self._blocks:
            self._emit_call(call)
        details = {"reason": reason} if reason else None
        self.response = self._render(status, incomplete_details=details, usage=self._render_usage())
        self._emit(f"response.{status}", response=self.response)

    def _begin(self) -> None:
        """Emit the two events before all others, once."""
        if self._number == 0:
            self._emit("response.created", response=self._render("in_progress"))
            self._emit("response.in_progress", response=self._render("in_progress"))

    def _begin_item(self, type: str, start: int) -> _Item:
        self._begin()
        self._end_item("completed")
        item = self._item = _Item(type, self._make_id(type), len(self._items), start)
        self._emit("response.output_item.added", output_index=len(self._items), item=item.value)
        self._emit(f"{item.part_event}.added", **item.path, part=item.part)
        return item

    def _end_item(self, status: str) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        self._emit_annotations(item)
        item.part["text"] = item.text.decode()
        self._emit(f"{item.text_event}.done", **item.path, text=item.part["text"], **item.extra)
        self._emit(f"{item.part_event}.done", **item.path, part=item.part)
        item.parts.append(item.part)
        if item.type == "message":
            item.value["status"] = status
        self._emit_item(item.value)

    def _emit_call(self, call: ToolCall) -> None:
        tool = next((tool for tool in self._request.tools if tool.name == call.name and tool.namespace), None)
        name = {"namespace": tool.namespace, "name": tool.own_name} if tool is not None else {"name": call.name}
        item = {"id": self._make_id("function_call"), "type": "function_call", "call_id": call.id, **name}
        item |= {"status": "in_progress", "arguments": ""}
        path = {"item_id": item["id"], "output_index": len(self._items)}
        event = "response.function_call_arguments"
        self._emit("response.output_item.added", output_index=len(self._items), item=item)
        self._emit(f"{event}.delta", **path, delta=call.arguments)
        self._emit(f"{event}.done", **path, name=item["name"], arguments=call.arguments)
        self._emit_item({**item, "status": "completed", "arguments": call.arguments})

    def _emit_item(self, item: dict[str, Any]) -> None:
        self._emit("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)

    def _make_id(self, type: str) -> str:
        return f"{_ID_PREFIXES[type]}_{self._head['id'].removeprefix('resp_')}_{len(self._items)}"

    def _emit_annotations(self, item: _Item) -> None:
        """Emit the annotations that are new, with their positions in the message that is being written."""
        if item.type != "message":
            return
        known = item.part["annotations"]
        for annotation in self._renderer.annotations:
            value = {"type": "url_citation", **annotation["url_citation"]}
            value["start_index"] -= item.start
            value["end_index"] -= item.start
            path = {**item.path, "annotation_index": len(known)}
            self._emit("response.output_text.annotation.added", **path, annotation=value)
            known.append(value)
        self._renderer.annotations.clear()

    def _emit(self, event: str, **fields: Any) -> None:
        self._write({"type": event, "sequence_number": self._number, **fields})
        self._number += 1

    def _render(self, status: str, **fields: Any) -> dict[str, Any]:
        """The response object as it is now."""
        unknown = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, **unknown, "output": list(self._items), **fields}

    def _render_usage(self) -> dict[str, Any]:
        prompt, completion, thought = self._count_tokens()
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + completion,
        }


@dataclass(frozen=True, slots=True)
class Api:
    """How one API is spoken; `call_prefix` begins the ids of calls."""

    parse: Callable[[bytes | bytearray, FindItem], ChatRequest]
    make_encoder: type[Encoder]
    call_prefix: str = "call"


APIS: Final[Mapping[str, Api]] = {
    "/v1/chat/completions": Api(lambda body, _: parse_chat_request(body), ChatEncoder),
    "/v1/completions": Api(lambda body, _: parse_completion_request(body), CompletionEncoder),
    "/v1/messages": Api(lambda body, _: parse_messages_request(body), MessagesEncoder, "toolu"),
    "/v1/responses": Api(parse_responses_request, ResponsesEncoder),
}


# ==== 12. Tasks =============================================================
#
# What outlives a request is a tracked task: logged when it fails, waited for on shutdown. What waits for time is one
# timer per stream: a chunk only notes when it came, and the timer looks at that note when it fires.

REMOVAL_SECONDS: Final = 10.0  # how long pending removals may take on shutdown


def loop_time() -> float:
    """The event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


async def drain(tasks: Iterable[asyncio.Task[Any]], seconds: float) -> int:
    """Wait for all `tasks`, those that come meanwhile included; cancel what is left after `seconds`: its number."""
    deadline = loop_time() + seconds
    while (late := set(tasks)) and (left := deadline - loop_time()) > 0:
        await asyncio.wait(late, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=2)
    return len(late)


class BackgroundTasks:
    """Tasks that belong to the application, not to a request."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Result], what: str) -> asyncio.Task[Result]:
        """A task that runs `work`; `what` names it in the log, should it fail.

        A `ProxyError` belongs to whoever awaits the task, and is not logged: that client may be gone.
        """
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def drain(self, seconds: float) -> int:
        """Wait for all as `drain` does."""
        return await drain(self._tasks, seconds)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ProxyError):
            logger.error("! background task failed: %s", task.get_name(), exc_info=error)


class Watchdog:
    """One lazily re-armed timer: calls `check(now)`, which does what is due and returns the loop time of its next look.

    The first look is in `seconds`. `check` may not raise; it may call `stop`.
    """

    def __init__(self, check: Callable[[float], float], seconds: float) -> None:
        self._check: Callable[[float], float] | None = check
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._look)

    def stop(self) -> None:
        """Look no more; may be called twice. What `check` belongs to, and all that hangs on it, is free at once."""
        self._check = None
        self._timer.cancel()

    def _look(self) -> None:
        if (check := self._check) is not None:
            now = self._loop.time()
            due = max(check(now), now + 0.01)  # a time that is past would be looked at again at once, for ever
            if self._check is not None:
                self._timer = self._loop.call_at(due, self._look)


# ==== 13. Accounts ==========================================================
#
# One account is one refresh token as the client sends it. One tracked task fetches its access token, however many
# requests wait: none of them can cancel it, and no rotated token gets lost. The state directory has a file for each
# account (its newest tokens, the conversations that its client keeps) and for each process (what it has open).

TOKEN_SECONDS: Final = 300.0  # life of an access token that does not tell it [ref]
MAX_ACCOUNTS: Final = 1000  # in memory; the longest unused is forgotten first
MAX_ACCOUNT_REQUESTS: Final = 64  # answers of one account at once
QUEUE_SECONDS: Final = 60.0  # limit of a request's wait for its turn
SERIALIZED_SECONDS: Final = 600.0  # how long answers run one by one once Kimi asked for that
LOCK_SECONDS: Final = 30.0  # limit of the wait for another process
REFUSAL_SECONDS: Final = 10.0  # programs repeat a 401 many times; Kimi is asked once in this time
MAX_OPEN: Final = 10_000  # conversations that wait for their removal
MAX_JOURNAL_BYTES: Final = 4 * MEGABYTE  # more than those take
_DAY_SECONDS: Final = 86_400


@dataclass(frozen=True, slots=True)
class TokenPair:
    """What a refresh gives: an access token, and the next refresh token (empty: the same)."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    previous_refresh_token: str = field(default="", repr=False)  # gave them; may be good where the newest is not [open]
    received: float = 0.0  # Unix seconds
    life_seconds: float = 0.0  # of the access token

    @property
    def is_live(self) -> bool:
        """Whether the access token is still valid."""
        return 0 <= time.time() - self.received < self.life_seconds


_NO_TOKEN: Final = re.compile(r"(?is)https?://.*|sk-[\w-]{16,}|\{.*|null|undefined|none|\[object object\]|<.*>|\W*")


def read_pasted_token(text: str) -> str:
    """The token in what a user pasted: bare, quoted, after `Bearer`, in a cookie or in JSON [2+]; else `ProxyError`."""
    token = re.sub(r"(?i)^(?:[\"'`\s]|authorization:|bearer\s)+", "", text).rstrip("\"'`; \t\r\n")
    for name in ("access_?token", "kimi-auth", "refresh_?token"):  # the last one found counts
        if found := re.search(rf"(?i)\b{name}[\"']?\s*[=:]\s*[\"']?([^\s\"',;}}]+)", text):
            token = found[1]
    if _NO_TOKEN.fullmatch(token) or not TOKEN_SHAPE.fullmatch(token):
        kinds = {"://": "a URL", "sk-": "a key of Kimi's API platform", "{": "JSON without a token", ";": "a cookie"}
        kind = next((kind for sign, kind in kinds.items() if sign in token), "a placeholder, or a cut token")
        raise ProxyError("token_malformed", f"it looks like {kind}")
    return token


def read_pasted_tokens(text: str, separators: str = ",") -> tuple[str, ...]:
    """The tokens in what a user pasted, each once; cookies and JSON hold one. Raises `ProxyError`."""
    is_one = text.lstrip().startswith("{") or ";" in text
    words = [text] if is_one else re.split(f"[{separators}]+", re.sub(r"(?i)\bbearer\s+", "", text))
    return tuple(dict.fromkeys(read_pasted_token(word) for word in words if word.strip()))


def read_claims(token: str) -> dict[str, Any]:
    """The claims of a JSON Web Token (RFC 7519), unverified; empty for any other token."""
    try:
        _, payload, _ = token.split(".")
        value: Any = parse_json(base64.urlsafe_b64decode(payload + "=="))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else 0.0


def is_access_token(claims: Mapping[str, Any]) -> bool:
    """Whether these are an access token's, which is used as it is [2+]."""
    return claims.get("app_id") == "kimi" and claims.get("typ") == "access"


def region_of(claims: Mapping[str, Any]) -> str:
    """Which twin a token is for: `cn` (kimi.com), `global` (kimi.ai) or, where its claims do not tell, none [2+]."""
    audience = claims.get("aud")
    told = {*map(str, audience if isinstance(audience, list) else [audience]), str(claims.get("region"))}
    if told & {"kimi.ai", "www.kimi.ai", "overseas", "global"}:
        return "global"
    return "cn" if told & {"kimi.com", "www.kimi.com", "kimi.moonshot.cn", "cn", "china", "domestic"} else ""


class AnswerSlots:
    """The answers of one account that run, and the requests that wait for their turn.

    Once Kimi refused one because another ran, they run one by one for ten minutes.
    """

    def __init__(self) -> None:
        self.running = self.waiting = 0
        self._serialized_until = 0.0
        self._turn = asyncio.Lock()  # of the next request; the others wait here in their order
        self._changed = asyncio.Event()

    @property
    def serialized(self) -> bool:
        """Whether the answers run one by one."""
        return loop_time() < self._serialized_until

    def _is_full(self) -> bool:
        return self.running >= (1 if self.serialized else MAX_ACCOUNT_REQUESTS)

    async def acquire(self, queue_length: int) -> None:
        """Wait for a slot, which `release` gives back. Raises `queue_full`."""
        if self._is_full() and (not self.serialized or self.waiting >= queue_length):
            raise ProxyError("queue_full", f"{self.running} answers run, {self.waiting} wait; see PROXY_QUEUE_LENGTH")
        if self._is_full():
            logger.info("has to wait in line for its account, behind %d others", self.waiting)
        self.waiting += 1
        self._changed.set()  # the ten minutes may be over
        try:
            async with asyncio.timeout(QUEUE_SECONDS), self._turn:
                while self._is_full():
                    self._changed.clear()
                    await self._changed.wait()
                self.running += 1
        except TimeoutError:
            raise ProxyError("queue_full", f"waited {QUEUE_SECONDS:g} s for the answers before") from None
        finally:
            self.waiting -= 1

    def release(self) -> None:
        """Give a slot back, once the response of its answer is closed."""
        self.running -= 1
        self._changed.set()

    def note_refused(self) -> None:
        """Kimi refused an answer because another one runs."""
        self._serialized_until = loop_time() + SERIALIZED_SECONDS


KeptConversation = tuple[str, str, str]  # protocol, id of the last answer, name of the key that opened it


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Account:
    """The `token` that a client sends, and what came of it. Times are the event loop's."""

    token: str
    digest: bytes  # SHA-256 of that token
    label: str  # its name in the log
    refresh_token: str  # the one used last
    tokens: TokenPair  # the newest
    is_access_token: bool  # the client's token is one, which cannot be renewed
    kept: dict[str, KeptConversation] = field(default_factory=dict)  # by id
    is_saved: bool = True  # whether `tokens` and `kept` are on disk
    twin: str = ""  # where its refresh token was taken, if it does not tell: see `TWINS`
    is_held: bool = False  # by the proxy: what becomes of it is logged
    state: str = ""  # when its access token was last asked for: `live`, or the failure's code
    refused_until: float = 0.0  # Kimi is not asked for a token before
    cooldown_until: float = 0.0  # others are asked before
    used_at: float = 0.0
    slots: AnswerSlots = field(default_factory=AnswerSlots)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    refreshing: asyncio.Task[str] | None = None


def find_state_dir(setting: str, environ: Mapping[str, str]) -> Path | None:
    """The directory that PROXY_STATE_DIR names; by default systemd's (systemd.exec(5)), else the user's own (XDG)."""
    if setting != "default":
        return Path(setting) if setting else None
    own = environ.get("XDG_STATE_HOME") or environ.get("LOCALAPPDATA") or f"{environ.get('HOME', '')}/.local/state"
    return Path(environ.get("STATE_DIRECTORY", "").partition(":")[0] or f"{own}/kimi_proxy")


def twin_of(account: Account) -> str:
    """The region of an account, as far as it is known: see `region_of`."""
    tokens = (account.tokens.access_token, account.refresh_token)
    return next(filter(None, (region_of(read_claims(token)) for token in tokens)), account.twin)


def lives_until(account: Account) -> str:
    """When the account's token expires, `2026-12-24 18:00 UTC`; empty where it does not tell."""
    seconds = _read_time(read_claims(account.tokens.refresh_token), "exp")
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds > 0 else ""


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, which its owner alone can read, whole or not at all, even in a crash of the machine."""
    temporary = path.with_suffix(".new")
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


class StateFiles:
    """JSON files of the service at `base_url` in the state directory, which processes may share (not on Windows)."""

    def __init__(self, directory: Path | None, metrics: Metrics, base_url: str = "") -> None:
        host = URL(base_url).host or "kimi"
        self.service = "kimi" if re.fullmatch(r"kimi\.moonshot\.cn|(www\.)?kimi\.(com|ai)", host) else host
        self.is_kept = directory is not None
        self.has_locks = self.is_kept and os.name == "posix"
        self.directory = directory or Path()
        self.metrics = metrics

    def read(self, name: str, parse: Callable[[dict[str, Any]], Result]) -> Result | None:
        """What `parse` makes of a file; None where there is none of use. A broken one is set aside."""
        path = self.directory / f"{name}.json"
        try:
            value: Any = parse_json(path.read_bytes()) if self.is_kept else {"service": ""}
            return parse(value) if value.pop("service", "kimi") == self.service else None
        except FileNotFoundError:
            pass
        except OSError as error:
            self.note_failure(error)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            logger.warning("! %s cannot be read (%s), and is set aside as *.bad", path, type(error).__name__)
            with suppress(OSError):
                path.replace(path.with_suffix(".bad"))
        return None

    def write(self, name: str, value: Mapping[str, Any]) -> bool:
        """Replace a file; whether that went well."""
        if not self.is_kept:
            return True
        path = self.directory / f"{name}.json"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, encode_json({"service": self.service, **value}).encode())
        except OSError as error:
            self.note_failure(error)
            return False
        return True

    def take_lock(self, path: Path) -> IO[bytes]:
        """The file, locked until it is closed. Raises `OSError`, `BlockingIOError` where another process has it."""
        import fcntl  # noqa: PLC0415  # POSIX only

        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # whoever held it has just removed it
        except OSError:
            file.close()
            raise
        return file

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        """Hold `name`, where there are locks, once it is free. Raises `state_locked` after LOCK_SECONDS."""
        path, deadline, held = self.directory / f"{name}.lock", time.monotonic() + LOCK_SECONDS, None
        while self.has_locks and held is None:
            try:
                held = self.take_lock(path)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ProxyError("state_locked") from None
                await asyncio.sleep(0.05)
            except OSError as error:
                self.note_failure(error)
                break
        try:  # nothing is awaited between taking it and this: no cancellation can lose it
            yield
        finally:
            if held is not None:
                with held, suppress(OSError):
                    path.unlink()

    def note_failure(self, error: OSError) -> None:
        """Count a failure to keep something, and log the first."""
        if self.metrics.count("kimi_proxy_state_failures_total") == 1:
            words = "! state cannot be kept in %s (%s), and a restart may lose tokens: see PROXY_STATE_DIR"
            logger.warning(words, self.directory, error.strerror)


class OpenConversations:
    """The conversations that are open at Kimi, for the next process to remove should this one die.

    Each process appends to a journal of its own, and locks it: that tells the living from the dead. A line is
    `[id, protocol, account]` for one that was opened, `[id]` once it is removed. Without locks, none is noted.
    """

    def __init__(self, state: StateFiles) -> None:
        self.orphans: dict[bytes, dict[str, str]] = {}  # to be removed: by account, ids and protocols
        self._state = state
        self._path = state.directory / f"conversations-{state.service}" / f"{os.getpid()}-{secrets.token_hex(8)}"
        self._open: dict[str, tuple[str, str]] = {}  # by id, the oldest first: protocol, digest of the account
        self._journal: IO[bytes] | None = None
        if state.has_locks:
            try:
                self._journal = state.take_lock(self._path)
            except OSError as error:
                state.note_failure(error)

    def add(self, account: bytes, protocol: str, conversation_id: str) -> bool:
        """Note a conversation of the account with that digest; whether that went well."""
        if self._journal is None:
            return False
        self._open[conversation_id] = (protocol, account.hex())
        is_written = self._write(conversation_id)
        if len(self._open) > MAX_OPEN:
            if self._state.metrics.count("kimi_proxy_orphans_dropped_total") == 1:
                logger.warning("! more than %d conversations could not be removed, the oldest stay at Kimi", MAX_OPEN)
            self.discard(next(iter(self._open)))
        return is_written

    def discard(self, conversation_id: str) -> None:
        """It is removed, or its client's to keep."""
        if self._open.pop(conversation_id, None) is not None:
            self._write(conversation_id)

    def postpone(self, conversation_id: str) -> None:
        """It could not be removed: that is tried again when its account calls."""
        if conversation_id in self._open:
            protocol, account = self._open[conversation_id]
            self.orphans.setdefault(bytes.fromhex(account), {})[conversation_id] = protocol

    def recover(self) -> int:
        """Take over what dead processes left open; its number."""
        for path in self._path.parent.iterdir() if self._journal is not None else ():
            with suppress(OSError), self._state.take_lock(path):  # a living process's is passed over
                if not [known for known in _parse_journal(path.read_bytes()) if not self.add(*known)]:
                    path.unlink()
        for conversation_id in self._open:
            self.postpone(conversation_id)
        return len(self._open)

    def close(self) -> None:
        """Leave what is still open to the next process."""
        if self._journal is not None:
            with self._journal, suppress(OSError):
                if not self._open:
                    self._path.unlink()

    def _write(self, conversation_id: str) -> bool:
        """Append what is known of a conversation, or write a journal anew that is long; whether that went well."""
        journal, ids = cast(IO[bytes], self._journal), [conversation_id]
        try:
            if journal.tell() > MAX_JOURNAL_BYTES:
                journal.truncate(0)
                ids = list(self._open)
            # Each line end comes first: it ends a line that a full disk cut.
            data = "".join("\n" + encode_json([one, *self._open.get(one, ())]) for one in ids).encode()
            return journal.write(data) == len(data)
        except OSError as error:
            self._state.note_failure(error)
            return False


def _parse_journal(data: bytes) -> list[tuple[bytes, str, str]]:
    """What a journal says is open: accounts, protocols and ids. Lines that cannot be read are passed over."""
    opened: dict[str, tuple[bytes, str, str]] = {}
    for line in data.split(b"\n"):
        with suppress(ValueError, TypeError, IndexError):
            conversation_id, *row = parse_json(line)
            opened.pop(conversation_id, None)
            if row:
                opened[conversation_id] = (bytes.fromhex(row[1]), str(row[0]), conversation_id)
    return list(opened.values())


def _parse_account(value: dict[str, Any]) -> tuple[TokenPair, dict[str, KeptConversation]]:
    refresh_token = value["refresh_token"]
    tokens = (value["access_token"], refresh_token, value.get("previous_refresh_token", refresh_token))
    if not all(re.fullmatch("[!-~]{0,8192}", token) for token in tokens):
        raise ValueError("not of our making")
    rows = {one: (*row, "")[:3] for one, row in value.get("kept", {}).items()}  # older ones without a key
    kept = {one: (str(protocol), str(message_id), str(key)) for one, (protocol, message_id, key) in rows.items()}
    return TokenPair(*tokens, float(value["received"]), float(value["life_seconds"])), kept


@dataclass(slots=True)
class Accounts:
    """The token cache. `refresh` asks Kimi for a new pair by an account's `refresh_token`."""

    refresh: Callable[[Account], Awaitable[TokenPair]]
    tasks: BackgroundTasks
    state: StateFiles
    known: dict[bytes, Account] = field(default_factory=dict)  # by digest, the one unused for longest first
    _in_use: weakref.WeakValueDictionary[bytes, Account] = field(default_factory=weakref.WeakValueDictionary)

    def get(self, token: str, *, is_held: bool = False) -> Account:
        """The account of the client's `token`, or of one that the proxy holds, made if it is new."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        account = self._find(token, digest)
        if account.token != token:  # it was known by what is kept of it alone
            account.token, account.refused_until = token, 0.0
        account.is_held = account.is_held or is_held
        return account

    async def recall(self, digest: bytes) -> Account | None:
        """The account with that digest, in memory or from its file."""
        if (account := self._in_use.get(digest)) is not None:
            return account
        found = await self._read(digest)
        return None if found is None else self._find(found[0].refresh_token, digest)  # its client may have come first

    async def access_token(self, account: Account) -> str:
        """A live access token. Raises `token_dead`, `token_expired` or what else keeps Kimi from giving one."""
        try:
            token = await self._find_access_token(account)
        except ProxyError as error:
            self._note_state(account, error.code, logging.WARNING, f"does not work: {error.message}")
            raise
        if account.state != "live":
            until = lives_until(account)
            self._note_state(account, "live", logging.INFO, f"works until {until}" if until else "works")
        return token

    def _note_state(self, account: Account, state: str, level: int, words: str) -> None:
        before, account.state = account.state, state
        if account.is_held and state != before:
            logger.log(level, "held account %s of %s %s", account.label, self.place_of(account), words)

    def place_of(self, account: Account) -> str:
        """Which of the twins an account is of, or the host of a service of another name."""
        twin = "kimi.ai" if twin_of(account) == "global" else "kimi.com"
        return twin if self.state.service == "kimi" else self.state.service

    async def _find_access_token(self, account: Account) -> str:
        is_refused = loop_time() < account.refused_until
        if account.tokens.is_live and not is_refused:
            return account.tokens.access_token
        if is_refused or account.is_access_token:
            raise ProxyError("token_expired" if account.is_access_token else "token_dead")
        if account.refreshing is None or account.refreshing.done():
            account.refreshing = self.tasks.start(self._renew(account), "refresh")
        return await asyncio.shield(account.refreshing)

    def drop(self, account: Account, access_token: str) -> None:
        """Use `access_token` no more, as Kimi refused it; a newer one stays."""
        if account.is_access_token:
            account.refused_until = loop_time() + REFUSAL_SECONDS
        elif account.tokens.access_token == access_token:
            account.tokens = replace(account.tokens, life_seconds=0.0)

    async def read_kept(self, account: Account, key: str = "") -> Mapping[str, tuple[str, str]]:
        """The conversations that the client with that key keeps: by id, protocol and last answer's id."""
        await self._load(account)
        return {one: known[:2] for one, known in account.kept.items() if known[2] == key}

    async def keep(self, account: Account, conversation_id: str, protocol: str, message_id: str, key: str = "") -> None:
        """Keep the conversation, as the last of at most 100 of the key."""
        async with self._hold(account):
            account.kept.pop(conversation_id, None)
            own = [one for one, known in account.kept.items() if known[2] == key]
            others = {one: known for one, known in account.kept.items() if one not in own[:-99]}
            account.kept = others | {conversation_id: (protocol, message_id, key)}
            account.is_saved = False

    async def save(self) -> None:
        """Try once more to write what could not be written."""
        for account in [one for one in self.known.values() if not one.is_saved]:
            with suppress(ProxyError):
                async with self._hold(account):
                    pass

    @asynccontextmanager
    async def _hold(self, account: Account) -> AsyncIterator[None]:
        """Hold an account, read anew; it is written at the end, if it has changed."""
        name = f"tokens/{account.digest.hex()}"
        async with account.lock, self.state.lock(name):
            await self._load(account)
            yield
            if not account.is_saved:
                record = {**asdict(account.tokens), "kept": account.kept}
                account.is_saved = await asyncio.to_thread(self.state.write, name, record)
                if not account.is_saved:
                    self.known[account.digest] = account  # its tokens are nowhere else

    async def _read(self, digest: bytes) -> tuple[TokenPair, dict[str, KeptConversation]] | None:
        return await asyncio.to_thread(self.state.read, f"tokens/{digest.hex()}", _parse_account)

    async def _load(self, account: Account) -> None:
        """Merge what another process may have written into `account`: the newest tokens win."""
        if (found := await self._read(account.digest)) is not None:
            account.tokens = max(account.tokens, found[0], key=lambda tokens: tokens.received)
            account.kept = found[1] if account.is_saved else found[1] | account.kept

    async def _renew(self, account: Account) -> str:
        async with self._hold(account):
            if not account.tokens.is_live:
                account.tokens = await self._fetch(account)
                account.is_saved = False
        return account.tokens.access_token

    async def _fetch(self, account: Account) -> TokenPair:
        """A new pair, by the newest refresh token that Kimi takes: each older one is tried once [open]."""
        old = account.tokens
        for used in dict.fromkeys((old.refresh_token, old.previous_refresh_token, account.token)):
            account.refresh_token = used
            try:
                new = await self.refresh(account)
                break
            except ProxyError as error:
                if error.code != "token_dead":
                    raise
                refusal = error
        else:
            account.refused_until = loop_time() + REFUSAL_SECONDS
            raise refusal
        claims = read_claims(new.access_token)
        life = _read_time(claims, "exp") - _read_time(claims, "iat")  # a difference: the clock here may be wrong
        life = life - 60 if 120 < life < 30 * _DAY_SECONDS else TOKEN_SECONDS
        return TokenPair(new.access_token, new.refresh_token or used, used, time.time(), life)

    def _find(self, token: str, digest: bytes) -> Account:
        """The account with that digest, made if it is new, as the one used last.

        Others that are too many are forgotten, unless their tokens are nowhere else. What still uses one shares it.
        """
        account = self._in_use.get(digest)
        if account is None:
            claims = read_claims(token)
            tokens = TokenPair("", token, token)
            if is_direct := is_access_token(claims):
                tokens = replace(tokens, access_token=token, life_seconds=_read_time(claims, "exp") or 1e12)
            account = self._in_use[digest] = Account(token, digest, digest.hex()[:8], token, tokens, is_direct)
        self.known.pop(digest, None)
        self.known[digest] = account
        while len(self.known) > MAX_ACCOUNTS:
            idle = next((one for one in self.known.values() if one.is_saved), account)
            del self.known[idle.digest]
        return account


# ==== 14. Files =============================================================
#
# Streams a file from its origin, from base64, or from a temporary file where its size is not known in advance. URLs
# come from strangers: `AddressGuard.make_socket` begins every connection to an origin, and decides on the very address.

FILE_SECONDS: Final = 60.0  # limit for an origin to send more
TRANSFER_SECONDS: Final = 120.0  # limit for a whole file
MAX_REDIRECTS: Final = 5
PUBLIC: Final = "public"

# The first that fits decides. Python's `is_global` says yes to a dozen of these ranges.
ADDRESS_RULES: Final = [
    (ipaddress.ip_network(network), verdict)
    for verdict, networks in (
        ("this-network", "0.0.0.0/8"),  # RFC 791
        ("private", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16"),  # RFC 1918
        ("shared", "100.64.0.0/10"),  # RFC 6598; some clouds' metadata is in it
        ("loopback", "127.0.0.0/8"),  # RFC 1122
        ("cloud-host", "168.63.129.16/32"),  # Azure's
        ("link-local", "169.254.0.0/16"),  # RFC 3927; most clouds' metadata is in it
        ("protocol", "192.0.0.0/24 2001::/23"),  # RFC 6890, RFC 2928; Teredo (RFC 4380) is in it
        ("documentation", "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32"),  # RFC 5737, RFC 3849
        ("documentation", "3fff::/20"),  # RFC 9637
        ("relay", "192.88.99.0/24"),  # RFC 7526
        ("benchmark", "198.18.0.0/15"),  # RFC 2544
        ("multicast", "224.0.0.0/4"),  # RFC 5771
        ("reserved", "240.0.0.0/4"),  # RFC 1112
        ("6to4", "2002::/16"),  # RFC 3056
        (PUBLIC, "0.0.0.0/0 2000::/3"),  # RFC 4291: global unicast
        ("not-unicast", "::/0"),
    )
    for network in networks.split()
]
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052


def classify_address(text: str) -> str:
    """The verdict on an address, or on the IPv4 one that it stands for: `public`, or why it is denied."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "unreadable"
    if "%" in text:
        return "scoped"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return next(verdict for network, verdict in ADDRESS_RULES if address in network)


# Ports of other protocols than the web's.
_BAD_PORTS: Final = {*range(80), 87, *range(91, 443), *range(444, 1024), 6000, *range(6665, 6670), 6697}


def check_file_url(text: str) -> URL:
    """The URL in `text`, if it may be fetched as far as its letters tell. Raises `ProxyError`."""
    text = text.strip()
    if not re.match(r"https?://[^/?#]{1,255}(?:[/?#]|\Z)", text, re.IGNORECASE):
        raise ProxyError("file_url_invalid", "the file's URL does not begin with http:// or https:// and a host")
    with suppress(ValueError, IndexError):  # IndexError: yarl's, for some brackets
        url = URL(text, encoded=text.isascii() and " " not in text)  # signed ones must stay as they are
        is_clean = len(text) <= 8192 and "\\" not in text and text.isprintable()
        if is_clean and url.host and url.port not in _BAD_PORTS and url.raw_user is url.raw_password is None:
            return url
    raise ProxyError("file_url_invalid", "the file's URL is not valid, or has a user name or another protocol's port")


_EXTRA_TYPES: Final = {
    ".md": "text/markdown",
    ".xml": "application/xml",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".epub": "application/epub+zip",
    ".wav": "audio/wav",
}
_BUILT_IN: Final = mimetypes.MimeTypes().types_map  # Python's own
_TYPES: Final = _EXTRA_TYPES | _BUILT_IN[False] | _BUILT_IN[True] | _EXTRA_TYPES  # the first extension of a type counts
_MEANINGLESS_TYPES: Final = ("application/octet-stream", "binary/octet-stream", "application/x-download")
_EXTENSION: Final = re.compile(r"\.[A-Za-z0-9]{1,8}\Z")


def name_file(names: Sequence[str], content_type: str, kind: str) -> tuple[str, str]:
    """Name and `Content-Type` of a file: the first of `names` with an extension, else the first with one added; and
    `content_type`, or where that means nothing the type of the extension.
    """
    cleaned = [*filter(None, map(_clean_name, names)), kind]
    name = next(filter(_EXTENSION.search, cleaned), cleaned[0])
    extension = _EXTENSION.search(name)
    content_type = content_type.partition(";")[0].strip().lower()
    if content_type in _MEANINGLESS_TYPES or not re.fullmatch(r"[a-z0-9.+-]+/[a-z0-9.+-]+", content_type):
        content_type = _TYPES.get(extension[0].lower() if extension else "", _MEANINGLESS_TYPES[0])
    if extension is None and content_type not in _MEANINGLESS_TYPES:
        name += next((one for one, kind in _TYPES.items() if kind == content_type), "")
    return name, content_type


def _clean_name(name: str) -> str:
    """The last segment of a path, without characters that file systems refuse, in at most 120 characters."""
    name = re.split(r"[/\\]", name[-1000:])[-1]
    name = "".join(letter for letter in name if letter.isprintable() and letter not in '"<>|:*?').strip(". ")
    extension = _EXTENSION.search(name)
    return name if len(name) <= 120 else name[:100] + (extension[0] if extension else "")


class AddressGuard:
    """The `socket_factory` of every connection to an origin."""

    def __init__(self, metrics: Metrics, *, allow_private: bool) -> None:
        self._metrics = metrics
        self._allow_private = allow_private

    def make_socket(self, address_info: tuple[Any, ...]) -> socket.socket:
        """A socket for `(family, type, proto, name, address)`. Raises `PermissionError`; only the log tells why."""
        family, kind, protocol, _, address = address_info
        verdict = PUBLIC if self._allow_private else self._judge(family, address)
        if verdict != PUBLIC:
            self._metrics.count("kimi_proxy_denied_addresses_total", verdict=verdict)
            logger.warning("! a file's URL led to an address that is denied (%s)", verdict)
            raise PermissionError("denied")
        return socket.socket(family, kind, protocol)

    @staticmethod
    def _judge(family: int, address: tuple[Any, ...]) -> str:
        verdict = classify_address(str(address[0]))
        if verdict != PUBLIC:
            return verdict
        # Connecting a datagram socket sends nothing, and tells the own address.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            if probe.getsockname()[0] == address[0]:
                return "own"
        return PUBLIC


@dataclass(slots=True)
class OpenFile:
    """A file that is ready to be sent. `source` returns the next piece, empty at the end.

    `failure` is what `read` raised, since aiohttp raises an error of its own instead.
    """

    kind: str
    name: str = field(repr=False)
    content_type: str
    size_bytes: int
    source: Callable[[], Awaitable[bytes]] = field(repr=False)
    sent_bytes: int = 0
    waiting_for_source: bool = False
    failure: ProxyError | None = None

    async def read(self) -> AsyncIterator[bytes]:
        """The `size_bytes` bytes, once. Raises `ProxyError`: the source's, or `file_broken` for more or fewer."""
        try:
            while True:
                self.waiting_for_source = True
                piece = await self.source()
                self.waiting_for_source = False
                self.sent_bytes += len(piece)
                if self.sent_bytes > self.size_bytes or (not piece and self.sent_bytes < self.size_bytes):
                    raise ProxyError("file_broken", "the file is longer or shorter than promised")
                if not piece:
                    return
                yield piece
        except ProxyError as error:
            self.failure = error
            raise


def open_spool(kind: str, name: str, content_type: str, spool: IO[bytes]) -> OpenFile:
    """The file in `spool`."""
    size_bytes = spool.seek(0, os.SEEK_END)
    spool.seek(0)
    return OpenFile(kind, name, content_type, size_bytes, partial(asyncio.to_thread, spool.read, 65_536))


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file that a client uploaded."""

    name: str = field(repr=False)
    content_type: str
    purpose: str = field(repr=False)
    spool: IO[bytes]

    def open(self) -> OpenFile:
        """The file, from its beginning each time."""
        name, content_type = name_file([self.name], self.content_type, "file")
        kind = "image" if content_type.startswith("image/") else "file"
        return open_spool(kind, name, content_type, self.spool)


class Files:
    """Opens what clients attach. Owns the connections to origins."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._limit_mb = settings.max_file_mb
        self._spool_dir = settings.spool_dir
        make_socket = AddressGuard(metrics, allow_private=settings.allow_private_urls).make_socket
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=make_socket, force_close=True, use_dns_cache=False),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            headers={"User-Agent": "kimi_proxy", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    def check_size(self, size_bytes: int) -> None:
        """Raises `ProxyError` `file_too_large` if a file of `size_bytes` is over the limit."""
        if size_bytes > self._limit_mb * MEGABYTE:
            raise ProxyError("file_too_large", f"the file has more than {self._limit_mb} MB")

    async def identify(self, attachment: Attachment) -> tuple[bytes, int]:
        """A digest of the URL, or of the inline bytes, and their number. Raises `ProxyError`."""
        if attachment.url:
            return hashlib.sha256(attachment.url.encode()).digest(), 0
        self.check_size(attachment.inline_bytes)
        digest, size_bytes = hashlib.sha256(), 0
        try:
            for piece in decode_base64(attachment.data, attachment.start):
                digest.update(piece)
                size_bytes += len(piece)
                await asyncio.sleep(0)
        except WireError as error:
            raise ProxyError("invalid_request", f"{attachment.path}: {error}") from None
        self.check_size(size_bytes)
        if not size_bytes:
            raise ProxyError("invalid_request", f"{attachment.path}: the file is empty")
        return digest.digest(), size_bytes

    @asynccontextmanager
    async def open(self, attachment: Attachment, size_bytes: int) -> AsyncIterator[OpenFile]:
        """The file of `attachment`; `size_bytes` as in `identify`. Raises `ProxyError`."""
        kind = attachment.kind
        if not attachment.url:
            read = partial(asyncio.to_thread, next, decode_base64(attachment.data, attachment.start), b"")
            yield OpenFile(kind, *name_file([attachment.name], attachment.content_type, kind), size_bytes, read)
            return
        async with await self._follow(attachment.url) as response:
            promised_bytes = self._check_head(response)
            names = [_disposition_name(response), response.url.name]
            named = name_file(names, response.headers.get("Content-Type", ""), kind)
            if promised_bytes is not None:
                yield OpenFile(kind, *named, promised_bytes, lambda: _ask_origin(response.content.readany()))
                return
            with self.make_spool() as spool:
                while piece := await _ask_origin(response.content.readany()):
                    await self.write_spool(spool, piece)
                if not spool.tell():
                    raise ProxyError("file_url_invalid", "the file is empty")
                yield open_spool(kind, *named, spool)

    @contextmanager
    def make_spool(self) -> Iterator[IO[bytes]]:
        """A temporary file. Raises `ProxyError` `spool_full` where it cannot be made or written."""
        try:
            with tempfile.TemporaryFile(dir=self._spool_dir or None) as spool:
                yield spool
        except ConnectionError:  # the client's
            raise
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise ProxyError("spool_full", f"writing a temporary file: {reason}") from None

    async def write_spool(self, spool: IO[bytes], piece: bytes) -> None:
        """Append `piece`. Raises `ProxyError` `file_too_large`."""
        self.check_size(spool.tell() + len(piece))
        await asyncio.to_thread(spool.write, piece)

    async def _follow(self, text: str) -> aiohttp.ClientResponse:
        """The response at a URL after redirects. The caller closes it."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await _ask_origin(self._session.get(check_file_url(text), allow_redirects=False))
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            text = ""
            with suppress(KeyError, ValueError):
                text = urljoin(str(response.url), response.headers["Location"])
        raise ProxyError("file_url_invalid", f"more than {MAX_REDIRECTS} redirects")

    def _check_head(self, response: aiohttp.ClientResponse) -> int | None:
        """The size of the file, None where the response's head does not tell it."""
        if response.status != 200:
            raise ProxyError("file_url_invalid", f"the file's origin answers HTTP {response.status}")
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            raise ProxyError("file_url_invalid", "the file's origin encodes it, which nobody asked for")
        if response.content_length == 0:
            raise ProxyError("file_url_invalid", "the file is empty")
        self.check_size(response.content_length or 0)
        return response.content_length if encoding == "identity" else None


async def _ask_origin(work: Awaitable[Result]) -> Result:
    """What an origin gives within `FILE_SECONDS`: a response, or the next bytes of one."""
    try:
        async with asyncio.timeout(FILE_SECONDS):
            return await work
    except TimeoutError:
        raise ProxyError("file_silent", f"the file's origin sends nothing for {FILE_SECONDS:g} s") from None
    except aiohttp.ClientConnectorCertificateError:
        raise ProxyError("file_url_invalid", "the TLS certificate of the file's origin is not valid") from None
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL, ValueError):
        # One answer for a name that does not exist, a denied address, and one where nobody listens.
        raise ProxyError("file_url_invalid", "not reached, or not public: see PROXY_ALLOW_PRIVATE_URLS") from None
    except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:  # the last where it was lost before
        raise ProxyError("file_broken", f"the file's origin broke off ({type(error).__name__})") from None


def _disposition_name(response: aiohttp.ClientResponse) -> str:
    """The file name in `Content-Disposition` (RFC 6266), or empty."""
    with suppress(ValueError, LookupError):  # a hostile header
        return getattr(response.content_disposition, "filename", None) or ""
    return ""


# ==== 15. Kimi ==============================================================
#
# `KimiClient` makes the calls of the service, and repeats one only when the access token was dead or a kept connection
# was closed. `Classic` and `Connect` are a table of calls each, and their bodies. `AnswerStream` reads an answer.

PARSE_SECONDS: Final = 120.0  # limit for Kimi to read a file that was uploaded
_POLL_SECONDS: Final = 0.5
_PARSING: Final = "having a file read"
_REFRESH: Final = "refreshing the token"
END_SECONDS: Final = 1.0  # how long the end of the stream is awaited once the text is over
ID_SECONDS: Final = 5.0  # and the id of a conversation that was left while it was opened
MAX_REPLY_BYTES: Final = 1_048_576
MAX_MODELS: Final = 200  # of a list
READ_BYTES: Final = 16_384  # of an answer at once, which are parsed without a wait
READ_EVENTS: Final = 16  # of them, which are filtered and sent without a wait

# All of one browser version: the service may compare them.
_BROWSER_HEADERS: Final = {
    "User-Agent": "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/146.0.0.0 Safari/537.36",
    "Sec-Ch-Ua": '"Chromium";v="146", "Not-A.Brand";v="24", "Google Chrome";v="146"',
    "Sec-Ch-Ua-Mobile": "?0",
    "Sec-Ch-Ua-Platform": '"Windows"',
    "Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8",
}
_PAGE_HEADERS: Final = {"x-msh-platform": "web", "x-language": "zh-CN", "r-timezone": "Asia/Shanghai"}
_ID_HEADERS: Final = {"x-msh-device-id": "device_id", "x-msh-session-id": "ssid", "x-traffic-id": "sub"}  # claims


def _without_empty(**fields: object) -> dict[str, Any]:
    """`fields` without those that are empty strings, which the service's page leaves out."""
    return {name: value for name, value in fields.items() if value != ""}


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it is asked for; `agent_id` is a kimiplus id, `efforts` are connect's constants."""

    id: str
    scenario: str = ""
    thinking: bool = False
    agent_id: str = ""
    agent_mode: str = ""
    service_id: str = ""
    key: str = ""
    efforts: tuple[str, ...] = ()
    default_effort: str = ""
    use_math: bool = False
    use_research: bool = False

    @property
    def is_agent(self) -> bool:
        """Whether it works with tools and a sandbox of its own, which costs credits."""
        return bool(self.agent_id or self.agent_mode)

    def describe(self) -> dict[str, Any]:
        """What the list of models says of it."""
        agent = "An agent with tools and a sandbox of its own, which costs credits." if self.is_agent else ""
        efforts = [effort.rpartition("_")[2].lower() for effort in self.efforts]
        return _without_empty(description=agent, reasoning_efforts=efforts or "")


KIMI: Final = Model("kimi")
CLASSIC_MODELS: Final = (
    KIMI,
    Model("kimi-k1", thinking=True),
    Model("kimi-math", use_math=True),
    Model("kimi-research", use_research=True),
)
CONNECT_MODELS: Final = (KIMI, Model("kimi-thinking", thinking=True))  # when the service lists none
_FALLBACKS: Final = (("SCENARIO_CHAT", "k2d6-chat"), ("SCENARIO_K2D5", ""))  # what those are asked as, newest first
_AGENT_ID: Final = re.compile(r"[0-9a-z]{20}")
_SUFFIXES: Final = (  # what they switch on; those of the search are read elsewhere
    {"thinking": "thinking", "k1": "thinking", "math": "use_math", "research": "use_research"}
    | dict.fromkeys(("search", "nosearch", "silent"), "")
)
_EFFORTS: Final = {"none": 0, "minimal": 0, "low": 1, "medium": 2, "high": 3, "enabled": 3, "xhigh": 4, "max": 5}


def parse_models(value: object) -> tuple[Model, ...]:
    """The models in a reply of GetAvailableModels, the default one as `kimi` first [2+]; empty when it lists none."""
    entries = dig_list(value, "availableModels")[:MAX_MODELS]
    models = [_parse_model(entry) for entry in entries if _get_name(entry, "scenario")]
    if not models:
        return ()
    own_id, scenario = (dig_word(value, "defaultScenario", key) for key in ("model", "scenario"))
    thinks = dig(value, "defaultScenario", "thinking") is True
    chats = [model for model in models if not model.is_agent] or [KIMI]
    default = max(chats, key=lambda one: (one.service_id == own_id, one.scenario == scenario, one.thinking is thinks))
    found = {"kimi": replace(default, id="kimi")}
    for model in models:
        name = model.id if model.id not in found else model.service_id or model.key or model.id
        found.setdefault(name, replace(model, id=name))
    return tuple(found.values())


def _get_name(entry: object, key: str) -> str:
    """A name of the service that can be shown as it is; empty for anything else."""
    name = dig_word(entry, key)
    return name if re.fullmatch("[!-~]{1,64}", name) else ""


def _parse_model(entry: object) -> Model:
    scenario, key, service_id = (_get_name(entry, name) for name in ("scenario", "key", "id"))
    thinking = dig(entry, "thinking") is True
    name = re.sub(r"[^a-z0-9.]+", "-", (dig_word(entry, "displayName")[:64] or key or scenario).lower()).strip("-")
    name = name if name.startswith("kimi") else f"kimi-{name}"
    efforts = (_get_name(option, "effort") for option in dig_list(entry, "reasoningEffortOptions")[:MAX_MODELS])
    return Model(
        id=f"{name}-thinking" if thinking and "thinking" not in name else name,
        scenario=scenario,
        thinking=thinking,
        agent_id=_get_name(entry, "kimiPlusId"),
        agent_mode=_get_name(entry, "agentMode"),
        service_id="" if service_id.isdecimal() else service_id,  # a number in older lists, of no use
        key=key,
        efforts=tuple(filter(None, efforts)),
        default_effort=_get_name(entry, "defaultReasoningEffort"),
    )


def choose_effort(model: Model, wanted: str) -> str:
    """The listed constant nearest to what a client `wanted`, the lower of two; empty when the model lists none.

    No thinking means NONE when it is listed, else the lowest.
    """
    wanted = wanted or ("enabled" if model.thinking else "")
    if wanted not in _EFFORTS:
        return model.default_effort
    goal = _EFFORTS[wanted]
    ranks = {effort: _EFFORTS.get(effort.rpartition("_")[2].lower(), 6) for effort in model.efforts}
    choices = [effort for effort in ranks if ranks[effort] or not goal] or ranks
    return min(choices, key=lambda effort: (abs(ranks[effort] - goal), ranks[effort]), default="")


def choose_model(name: str, models: Sequence[Model]) -> tuple[Model, bool]:
    """The model that a client's `name` means, and whether the name was known; the default where it was not.

    A 20-character id is an agent; suffixes may be combined [2+].
    """
    known = {"kimi": KIMI} | {name: model for model in models for name in (model.key, model.service_id) if name}
    known |= {model.id: model for model in models}
    switches: set[str] = set()
    while name not in known and (suffix := name.rpartition("-")[2]) in _SUFFIXES:
        name = name[: -len(suffix) - 1]
        switches.add(_SUFFIXES[suffix])
    if _AGENT_ID.fullmatch(name):
        known[name] = replace(known["kimi"], agent_id=name)
    changes: dict[str, Any] = dict.fromkeys(filter(None, switches), True)
    return replace(known.get(name, known["kimi"]), **changes), name in known


@dataclass(slots=True)
class Question:
    """What the service is asked: the merged `text`, and all that goes with it."""

    text: str = field(repr=False)
    use_search: bool
    model_name: str = "kimi"  # the client's
    model: Model = KIMI  # what that means for the account that is asked
    effort: str = ""  # how much the client wants it to think
    has_tools: bool = False  # the client's own
    preface: str = field(default="", repr=False)  # with which `text` begins; connect takes it as a system prompt
    segment_id: str = ""  # of an answer at its length limit, which is to go on (classic)
    conversation_id: str = ""  # the one to continue
    keeps: bool = False  # its conversation, or a new one, for the client
    key: str = ""  # the name of the client's, for whom it is kept
    parent_id: str = ""  # the message to continue after (connect)
    attachments: list[Attachment] = field(default_factory=list, repr=False)  # emptied when no longer needed
    file_ids: tuple[str, ...] = ()  # of what was uploaded


async def _note_reuse(_: aiohttp.ClientSession, context: Any, params: aiohttp.TraceConnectionReuseconnParams) -> None:
    context.trace_request_ctx.append("kept")


def open_service_session(proxy_url: str = "", *, reuse: bool = True) -> aiohttp.ClientSession:
    """Connections to the service, without cookies, as they serve many accounts; each for one call unless `reuse`."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30 if reuse else None, force_close=not reuse),
        trace_configs=[trace],
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        headers=_BROWSER_HEADERS,
        read_bufsize=READ_BYTES,
        proxy=proxy_url or None,
    )


_NETWORK_ERRORS: Final = (TimeoutError, aiohttp.ClientError, ConnectionError)
_NETWORK_FAILURES: Final[tuple[tuple[type[BaseException], str, str], ...]] = (  # the first that fits
    (aiohttp.ClientProxyConnectionError, "unreachable", "the outgoing proxy (KIMI_PROXY_URL) cannot be reached"),
    (aiohttp.ClientHttpProxyError, "unreachable", "the outgoing proxy (KIMI_PROXY_URL) answers HTTP {0.status}"),
    (aiohttp.ClientConnectorCertificateError, "unreachable", "its TLS certificate is not valid"),
    (aiohttp.ClientConnectorDNSError, "unreachable", "the name {0.host} cannot be resolved"),
    (aiohttp.ClientConnectorError, "unreachable", "no connection to {0.host}:{0.port} ({1})"),
    (TimeoutError, "silent", "no reply in time"),
    (BaseException, "failed", "the connection broke ({0.__class__.__name__})"),
)


@contextmanager
def _network_failures(step: str, file: OpenFile | None = None) -> Iterator[None]:
    """Raise a failure of the network as the service's, or as the storage's or `file`'s own where one is sent."""
    try:
        yield
    except _NETWORK_ERRORS as error:
        if file is not None and file.failure is not None:
            raise file.failure from None
        code, words = next((code, words) for kind, code, words in _NETWORK_FAILURES if isinstance(error, kind))
        number = getattr(error, "errno", None)
        words = words.format(error, os.strerror(number) if number else "failed")
        raise ProxyError(f"service_{code}" if file is None else "storage_failed", f"{step}: {words}") from None


_CONNECT_TYPE: Final = "application/connect+json"
_RETIRED_STATUSES: Final = frozenset({301, 302, 303, 307, 308, 404, 405, 410})


async def _parse_reply(response: aiohttp.ClientResponse, step: str) -> dict[str, Any]:
    """The JSON object of a reply that means success, empty for any other body; else the failure that it means."""
    try:
        body = await response.content.readexactly(MAX_REPLY_BYTES)  # of a failure, its beginning will do
        if response.status < 400:
            raise ProxyError("service_failed", f"{step}: a reply of more than {MAX_REPLY_BYTES} bytes")
    except asyncio.IncompleteReadError as end:
        body = end.partial
    reply: Any = None
    with suppress(WireError):
        reply = parse_json(body or b"{}", surrogates=True)
    status = response.status
    value: dict[str, Any] = reply if isinstance(reply, dict) else {}
    is_page = value is not reply and "html" in response.content_type and status < 500
    if status < 300 and not is_page and not dig_word(value, "error_type"):
        return value
    seconds = response.headers.get("Retry-After", "")
    retry_after = min(int(seconds), 86_400) if re.fullmatch("[0-9]{1,9}", seconds) else 0
    words = "" if value is reply else f"{quote_words(response.content_type)}, no JSON object"
    error = error_of_reply(status, value, step, retry_after_seconds=retry_after, words=words)
    if is_page or (status in _RETIRED_STATUSES and not dig_word(value, "code")):  # connect's own 404 has a code
        raise ProtocolRetired(error.code, error.detail, upstream_status=status)
    raise error


@dataclass(eq=False)
class AnswerStream:
    """The events of one answer. It fails when nothing of it comes for `silence_seconds` while it is read, and at
    `deadline` (loop time). `raw`, where it is a list, gets the bytes as they came.
    """

    response: aiohttp.ClientResponse
    parser: SSEParser | EnvelopeParser
    answer: Any  # a `ClassicAnswer` or `ConnectAnswer`
    access_token: str = field(repr=False)
    silence_seconds: float
    deadline: float
    raw: list[bytes] | None = None
    _failure: ProxyError | None = None  # raised by the next read
    _next: list[Event] = field(default_factory=list)  # returned by the next reads
    _waits: bool = False
    _progress: int = -1  # of `answer`, when silence began
    _silent_since: float = 0.0

    def __post_init__(self) -> None:
        self._debug = logger.isEnabledFor(logging.DEBUG)
        self._loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(self._check, min(self.silence_seconds, self.deadline - self._loop.time()))

    async def read(self) -> list[Event] | None:
        """Some of the events of one network read, perhaps none; None once the answer is over.

        Raises `ProxyError`, after the events that came before the failure were returned.
        """
        if self._next:
            await asyncio.sleep(0)
            return self._take_some()
        if self._failure is not None:
            raise self._failure
        if self.answer.ended:
            return None
        if self.answer.progress != self._progress:  # heartbeats alone are silence
            self._progress, self._silent_since = self.answer.progress, self._loop.time()
        self._waits = True
        try:
            piece = await (self._read_end() if self.answer.done else self.response.content.read(READ_BYTES))
            if len(piece) == READ_BYTES:  # more is there already, so that no read would wait
                await asyncio.sleep(0)
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:  # the last: it was lost before
            self._watchdog.stop()
            broken = ProxyError("answer_broken", f"the connection broke ({type(error).__name__})")
            self._failure = self._failure or broken
            raise self._failure from None
        finally:
            self._waits = False
        events = self._feed(piece)
        if len(events) <= READ_EVENTS:
            return events
        self._next = events
        return self._take_some()

    async def peek(self) -> None:
        """Wait for the first events, which the next `read` returns."""
        try:
            while not self._next and not self.answer.ended:
                self._next = [*(await self.read() or []), *self._next]
        except BaseException:
            self.close()
            raise

    async def drain(self, seconds: float) -> None:
        """Read what is left, so that the connection can be used again; close it where that takes longer."""
        with suppress(*_NETWORK_ERRORS, RuntimeError):
            async with asyncio.timeout(seconds):
                while await self.response.content.read(READ_BYTES):
                    pass
        self.close()  # has no effect on a connection that went back to the pool

    def close(self) -> None:
        """Close the connection, unless the response was read to its end. A read that waits fails."""
        self._watchdog.stop()
        self.response.close()

    def _take_some(self) -> list[Event]:
        events, self._next = self._next[:READ_EVENTS], self._next[READ_EVENTS:]
        return events

    async def _read_end(self) -> bytes:
        """What follows the text: the end or an error [2+]; nothing where neither comes."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._silent_since + END_SECONDS):
                return await self.response.content.read(READ_BYTES)
        return b""

    def _feed(self, piece: bytes) -> list[Event]:
        events: list[Event] = []
        if self.raw is not None:
            self.raw.append(piece)
        try:
            for frame in self.parser.feed(piece):
                events += self.answer.feed(frame)
                if self._debug:
                    size = len(frame if isinstance(frame, str) else frame[1])
                    logger.debug("< %s, %d characters", quote_words(str(self.answer.kind)[:40]), size)
            if not piece:
                self.parser.finish()
                events += self.answer.finish()
        except WireError as error:
            self._failure = ProxyError("answer_broken", str(error))
        except ProxyError as error:
            self._failure = error
            error.access_token = self.access_token
        if self._failure is not None or self.answer.ended:
            self._watchdog.stop()
        if self._failure is not None and not events:
            raise self._failure
        return events

    def _check(self, now: float) -> float:
        due = min(self.silence_seconds + (self._silent_since if self._waits else now), self.deadline)
        if now >= due and self._failure is None:
            self._failure = ProxyError("answer_too_long" if now >= self.deadline else "service_silent", "asking")
            self.close()
        return due


async def _enclose(head: bytes, file: OpenFile, tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for piece in file.read():
        yield piece
    yield tail


@dataclass(eq=False)
class KimiClient:
    """What the two protocols share: they send JSON as the service's own web page does."""

    session: aiohttp.ClientSession
    transfers: aiohttp.ClientSession  # keeps no connection
    accounts: Accounts
    metrics: Metrics
    settings: Settings
    name: ClassVar[str]
    busy_code: ClassVar[str]  # of the failure that says that another answer is running
    hits_inline: ClassVar[bool]  # whether search hits are shown where they come
    _calls: ClassVar[Mapping[str, str]]  # by step: the method, the path, and perhaps another of the same call

    def base_url_for(self, account: Account, step: str = "") -> str:
        """Where the service of `account` is."""
        return self.settings.base_url or CLASSIC_URL

    async def refresh(self, account: Account) -> TokenPair:
        """A new pair of tokens for `account`."""
        return _get_tokens(await self._exchange(account, _REFRESH, account.refresh_token))

    def _render_headers(self, account: Account, step: str, token: str, chat: str = "") -> dict[str, str]:
        base_url = self.base_url_for(account)
        return {
            "Origin": str(URL(base_url).origin()),
            "Referer": f"{base_url}/chat/{chat}" if chat else base_url,
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **({"Accept-Encoding": "identity"} if step == "asking" else {}),
        }

    async def _send(self, account: Account, step: str, body: bytes, chat: str, token: str) -> aiohttp.ClientResponse:
        method, *paths = self._calls[step].split()
        kept: list[str] = []  # filled by aiohttp's tracing where the connection was

        def send(session: aiohttp.ClientSession, path: str) -> Awaitable[aiohttp.ClientResponse]:
            return session.request(
                method,
                URL(self.base_url_for(account, step) + path.format(chat), encoded=True),
                data=io.BytesIO(body) if len(body) > MEGABYTE else body or None,  # a large one is sent in pieces
                headers=self._render_headers(account, step, token, chat),
                allow_redirects=False,
                trace_request_ctx=kept,
            )

        for path in paths:
            started = time.monotonic()
            try:
                response = await send(self.session, path)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not kept or method != "POST":  # aiohttp itself repeats the others
                    raise
                logger.debug("! %s: a kept connection was closed, calling once more", step)
                response = await send(self.transfers, path)
            self.metrics.observe("kimi_proxy_upstream_seconds", time.monotonic() - started)
            logger.debug("> %s HTTP %d", step, response.status)
            if response.status not in (404, 501) or path == paths[-1]:  # else the service may know the other path
                break
            response.close()
        return response

    async def _exchange(
        self, account: Account, step: str, token: str = "", value: object = None, chat: str = ""
    ) -> dict[str, Any]:
        body = b"" if value is None else encode_json(value).encode()
        seconds = PARSE_SECONDS if step == _PARSING else self.settings.call_seconds
        with _network_failures(step):
            async with asyncio.timeout(seconds), await self._send(account, step, body, chat, token) as response:
                return await _parse_reply(response, step)

    async def _with_token(self, account: Account, once: Callable[[str], Awaitable[Result]]) -> Result:
        """What `once` returns for the account's access token, or for a new one when that was dead."""
        token = await self.accounts.access_token(account)
        try:
            return await once(token)
        except ProxyError as error:
            if error.code != "token_dead":
                raise
        self.accounts.drop(account, token)
        return await once(await self.accounts.access_token(account))

    async def _call(self, account: Account, step: str, value: object = None, chat: str = "") -> dict[str, Any]:
        return await self._with_token(account, lambda token: self._exchange(account, step, token, value, chat))

    async def _stream(
        self, account: Account, body: bytes, chat: str, answer: ClassicAnswer | ConnectAnswer, deadline: float
    ) -> AnswerStream:
        expected = _CONNECT_TYPE if isinstance(answer, ConnectAnswer) else "text/event-stream"

        async def once(token: str) -> AnswerStream:
            seconds = self.settings.silence_seconds
            until = min(loop_time() + seconds, deadline)  # for the head of the response
            with _network_failures("asking"):
                async with asyncio.timeout_at(until):
                    response = await self._send(account, "asking", body, chat, token)
                    if response.status == 200 and response.content_type == expected:
                        if response.headers.get("Content-Encoding", "identity") != "identity":
                            response.close()
                            raise ProxyError("answer_broken", "asking: a compressed answer, which nobody asked for")
                        parser = EnvelopeParser() if expected == _CONNECT_TYPE else SSEParser()
                        return AnswerStream(response, parser, answer, token, seconds, deadline)
                    async with response:
                        await _parse_reply(response, "asking")
            raise ProxyError("answer_broken", f"asking: a reply of type {quote_words(response.content_type)}")

        return await self._with_token(account, once)

    @asynccontextmanager
    async def _send_file(
        self, method: str, url: str, headers: dict[str, str], file: OpenFile, head: bytes = b"", tail: bytes = b""
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        with _network_failures("storing the file", file):
            async with self.transfers.request(
                method,
                URL(url, encoded=True),
                data=_enclose(head, file, tail),
                headers=headers | {"Content-Length": str(len(head) + file.size_bytes + len(tail))},
                allow_redirects=False,
            ) as response:
                logger.debug("> %d of %d bytes of a file HTTP %d", file.sent_bytes, file.size_bytes, response.status)
                yield response
                if response.status < 300 and file.sent_bytes < file.size_bytes:
                    raise ProxyError("storage_failed", "storing the file: an answer before its end")


def _get_id(value: object, step: str) -> str:
    found = dig_word(value, "id")
    if not IDENTIFIER.fullmatch(found):
        raise ProxyError("service_failed", f"{step}: the reply has no id")
    return found


def _get_tokens(reply: Mapping[str, Any]) -> TokenPair:
    """The tokens in a refresh's reply, in either spelling, bare or inside `data` [open]."""
    data = reply.get("data") or reply
    kinds = ("access", "refresh")
    access_token, refresh_token = (dig_word(data, f"{kind}Token") or dig_word(data, f"{kind}_token") for kind in kinds)
    if not TOKEN_SHAPE.fullmatch(access_token):
        raise ProxyError("service_failed", "refreshing the token: the reply has no access token")
    return TokenPair(access_token, refresh_token if TOKEN_SHAPE.fullmatch(refresh_token) else "")


StoredFile = Mapping[str, str]  # a file whose bytes the service has, as the fields that register it
CLASSIC_URL: Final = "https://kimi.moonshot.cn"
_K1_AGENT: Final = "crm40ee9e5jvhsn7ptcg"


def _agent_of(model: Model) -> str:
    return model.agent_id or (_K1_AGENT if model.thinking else "")  # classic's thinking model is an agent [2+]


class Classic(KimiClient):
    """The classic protocol [ref]."""

    name = "classic"
    busy_code = "answer_running"
    hits_inline = True
    _calls: ClassVar = {
        _REFRESH: "GET /api/auth/token/refresh",
        "asking for the research quota": "GET /api/chat/research/usage",
        "opening a conversation": "POST /api/chat",
        "asking": "POST /api/chat/{}/completion/stream",
        "removing the conversation": "DELETE /api/chat/{}",
        "signing an upload": "POST /api/pre-sign-url",
        "registering a file": "POST /api/file",
        _PARSING: "POST /api/file/parse_process",
    }

    async def open(self, account: Account, model: Model) -> str:
        """The id of a new conversation. Raises `ProxyError` `quota_used_up` when the model's quota is."""
        if model.use_research:
            usage = await self._call(account, "asking for the research quota")
            if usage.get("remain") == 0:
                raise ProxyError("quota_used_up", f"{usage.get('used')} of {usage.get('total')} used")
        name = f"cmpl-{random.getrandbits(128):032x}"
        value = _without_empty(name=name, is_example=False, kimiplus_id=_agent_of(model))
        return _get_id(await self._call(account, "opening a conversation", value), "opening a conversation")

    async def ask(self, account: Account, conversation_id: str, question: Question, deadline: float) -> AnswerStream:
        """The answer, which the caller drains or closes."""
        model, segment_id = question.model, question.segment_id
        value = _without_empty(
            messages=[{"role": "user", "content": " " if segment_id else question.text}],
            refs=question.file_ids,
            use_search=question.use_search,
            segment_id=segment_id,
            action="continue" if segment_id else "",
            kimiplus_id=_agent_of(model),
            use_math=model.use_math or "",
            use_research=model.use_research or "",
        )
        body, answer = encode_json(value).encode(), ClassicAnswer(continues=bool(segment_id))
        return await self._stream(account, body, conversation_id, answer, deadline)

    async def stop(self, account: Account, conversation_id: str, message_id: str) -> None:
        """Nothing: the service stops an answer when its stream is closed."""

    async def remove(self, account: Account, conversation_id: str) -> None:
        """Remove the conversation from the user's history."""
        await self._call(account, "removing the conversation", chat=conversation_id)

    async def store_file(self, account: Account, file: OpenFile) -> StoredFile:
        """Have a URL signed, and put the bytes there. Pictures are `image` in later versions [2+]."""
        value = {"action": file.kind, "name": file.name}
        try:
            signed = await self._call(account, "signing an upload", value)
        except ProxyError as error:
            if file.kind == "file" or error.upstream_status not in (400, 422):
                raise
            signed = await self._call(account, "signing an upload", value | {"action": "file"})
        url, object_name, file_id = (dig_word(signed, name) for name in ("url", "object_name", "file_id"))
        if not url or not object_name:
            raise ProxyError("service_failed", "signing an upload: the reply has no URL")
        headers = {"Content-Type": file.content_type}  # the URL is signed: it needs no token and gets none
        async with self._send_file("PUT", url, headers, file) as response:
            if response.status >= 300:
                raise ProxyError("storage_failed", f"storing the file: HTTP {response.status}")
        if file_id:  # a picture has its id from the signing [2+]
            return {"type": "image", "file_id": file_id, "name": file.name}
        return {"type": "file", "name": file.name, "object_name": object_name}

    async def register_file(self, account: Account, stored: StoredFile) -> str:
        """The file's id, once the service has read it; registered again while its status says not yet [1]."""
        for _ in range(60):
            known = await self._call(account, "registering a file", stored)
            if known.get("status", "parsed") in ("initialized", "parsed"):
                break
            await asyncio.sleep(_POLL_SECONDS)
        file_id = _get_id(known, "registering a file")
        await self._call(account, _PARSING, {"ids": [file_id]})
        return file_id


# The twins of the connect service: base URL, and where tokens are refreshed. A token is for one of them [2+].
TWINS: Final[Mapping[str, tuple[str, str]]] = {
    "cn": ("https://www.kimi.com", "https://auth.kimi.com"),
    "global": ("https://www.kimi.ai", "https://auth.kimi.ai"),
}
_NEW_REFRESH: Final = "refreshing the token by the new call"


class Connect(KimiClient):
    """The connect protocol [2+]."""

    name = "connect"
    busy_code = "rate_limited"  # it has no code of its own for it
    hits_inline = False
    _calls: ClassVar = {
        _NEW_REFRESH: "POST /api/account.gateway.v1.AuthService/RefreshToken",
        _REFRESH: "GET /api/auth/token/refresh",
        "asking for the models": "POST /apiv2/kimi.gateway.config.v1.ConfigService/GetAvailableModels",
        "asking": "POST /apiv2/kimi.gateway.chat.v1.ChatService/Chat /apiv2/kimi.chat.v1.ChatService/Chat",
        "stopping the answer": "POST /apiv2/kimi.gateway.chat.v1.ChatService/CancelChat",
        "removing the conversation": "POST /apiv2/kimi.chat.v1.ChatService/DeleteChat "
        "/apiv2/kimi.gateway.chat.v1.ChatService/DeleteChat",
        "uploading a file": "POST /apiv2-files/file/upload",
        _PARSING: "POST /apiv2-files/kimi.gateway.file.v1.FileService/GetFileParseProgress",
    }
    _fallbacks: Sequence[tuple[str, str]] = _FALLBACKS  # the first is in use

    def base_url_for(self, account: Account, step: str = "") -> str:
        """Where the service of `account` is."""
        auth_url = "" if self.settings.auth_url == Settings().auth_url else self.settings.auth_url
        is_refresh = step == _NEW_REFRESH
        url = auth_url if is_refresh else self.settings.base_url  # what the user set wins
        return url or TWINS[twin_of(account) or "cn"][is_refresh]

    def needs(self, account: Account) -> bool:
        """Whether the token of `account` is of no use to classic."""
        return account.is_access_token or twin_of(account) == "global" or bool(account.twin)

    async def refresh(self, account: Account) -> TokenPair:
        """A new pair of tokens by the new call, else by the old one; of kimi.ai too, where nothing tells the twin [2+].

        A dead token wins over any other failure.
        """
        is_known = bool(self.settings.base_url or twin_of(account))
        verdict = ProxyError("service_failed")  # replaced by the first that comes
        for twin in (account.twin,) if is_known else ("", "global"):
            account.twin = twin
            for step, token in ((_NEW_REFRESH, ""), (_REFRESH, account.refresh_token)):
                value = None if token else {"refresh_token": account.refresh_token}
                try:
                    return _get_tokens(await self._exchange(account, step, token, value))
                except ProxyError as error:
                    logger.debug("! %s", error)
                    verdict = verdict if verdict.code == "token_dead" else error
            if verdict.code != "token_dead":
                break
        account.twin = account.twin if is_known else ""
        raise verdict

    def _render_headers(self, account: Account, step: str, token: str, chat: str = "") -> dict[str, str]:
        headers = super()._render_headers(account, step, token, chat) | _PAGE_HEADERS
        headers["x-msh-version"] = self.settings.web_version
        claims = read_claims(account.tokens.access_token)
        for header, claim in _ID_HEADERS.items():  # the ids in the token [2+], or one of our own
            value = dig_word(claims, claim)
            headers[header] = value if re.fullmatch("[!-~]{1,256}", value) else account.label
        if step == "asking":
            headers |= {"Content-Type": _CONNECT_TYPE, "Connect-Protocol-Version": "1"}
        return headers

    async def models(self, account: Account) -> tuple[Model, ...]:
        """The models that the account may ask."""
        return parse_models(await self._call(account, "asking for the models", {}))

    async def open(self, account: Account, model: Model) -> str:
        """Nothing: the answer's stream tells the conversation's id."""
        return ""

    async def ask(self, account: Account, conversation_id: str, question: Question, deadline: float) -> AnswerStream:
        """The answer, which the caller drains or closes."""
        model = question.model
        tries = [replace(model, scenario=scenario, service_id=service_id) for scenario, service_id in self._fallbacks]
        tries = [model] if model.scenario else tries
        while True:
            value = _render_question(question, tries.pop(0), conversation_id)
            body, answer = encode_envelope(encode_json(value).encode()), ConnectAnswer(conversation_id)
            try:
                stream = await self._stream(account, body, "", answer, deadline)
                if tries:
                    await stream.peek()
                return stream
            except ProxyError as error:
                if error.upstream_status != 400 or not tries:
                    raise
                logger.debug("! %s", error)
                self._fallbacks = _FALLBACKS[::-1]

    async def stop(self, account: Account, conversation_id: str, message_id: str) -> None:
        """Stop an answer that is running; `message_id` is the answer's [2+]."""
        ids = {"chat_id": conversation_id, "message_id": message_id}
        await self._call(account, "stopping the answer", ids, conversation_id)

    async def remove(self, account: Account, conversation_id: str) -> None:
        """Remove the conversation from the user's history."""
        await self._call(account, "removing the conversation", {"chat_id": conversation_id}, conversation_id)

    async def store_file(self, account: Account, file: OpenFile) -> StoredFile:
        """Send the bytes as the form field `file` (RFC 7578), once: a file can be read only once."""
        step, boundary = "uploading a file", secrets.token_hex(16)
        token = await self.accounts.access_token(account)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file.name}"\r\n'
        head += f"Content-Type: {file.content_type}\r\n\r\n"
        headers = self._render_headers(account, step, token)
        headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        url, tail = self.base_url_for(account) + self._calls[step].split()[1], f"\r\n--{boundary}--\r\n"
        try:
            async with self._send_file("POST", url, headers, file, head.encode(), tail.encode()) as response:
                reply = await _parse_reply(response, step)
        except ProxyError as error:
            error.access_token = token
            raise
        return {"id": _get_id(reply.get("file"), step)}

    async def register_file(self, account: Account, stored: StoredFile) -> str:
        """The file's id, once the service has read it."""
        with _network_failures(_PARSING):
            async with asyncio.timeout(PARSE_SECONDS):
                while True:
                    reply = await self._call(account, _PARSING, {"file_ids": [stored["id"]]})
                    status = dig_word(next(iter(dig_list(reply, "progresses")), None), "status").upper()
                    if status in ("PROCESS_STATUS_SUCCESS", "3"):  # numbers [1]
                        return stored["id"]
                    if status in ("PROCESS_STATUS_FAIL", "PROCESS_STATUS_FAILED", "4"):
                        raise ProxyError("file_unreadable")
                    await asyncio.sleep(_POLL_SECONDS)


def _render_question(question: Question, model: Model, conversation_id: str) -> dict[str, Any]:
    blocks: list[Any] = [{"message_id": "", "text": {"content": question.text.removeprefix(question.preface)}}]
    for file_id in question.file_ids:
        blocks.append({"message_id": "", "file": {"id": file_id, "status": "PROCESS_STATUS_SUCCESS"}})
    effort = choose_effort(model, question.effort)
    thinking = not effort.endswith("_NONE") if effort else bool(_EFFORTS.get(question.effort, model.thinking))
    return _without_empty(
        scenario=model.scenario,
        kimiplusId=model.agent_id,
        agentMode=model.agent_mode,
        tools=[{"type": "TOOL_TYPE_SEARCH", "search": {}}] if question.use_search else [],
        chat_id=conversation_id,
        message=_without_empty(role="user", blocks=blocks, scenario=model.scenario, parent_id=question.parent_id),
        options=_without_empty(
            thinking=thinking,
            reasoning_effort=effort,
            model=model.service_id,
            system_prompt=question.preface.removeprefix("system:"),
            enable_plugin=False if question.has_tools else "",  # keeps the model's own tools away [2+]
        ),
    )


KimiProtocol = Classic | Connect


# ==== 16. Gateway ===========================================================
#
# The way of every chat. `Uploads` brings what is attached to Kimi. `Gateway` chooses account and protocol, and owns
# what outlives a request. `LiveAnswer` asks, and is left through one place, `_leave`: a tracked task stops the exchange
# that is open then, and removes its conversation.

MODELS_SECONDS: Final = 300.0  # how long Kimi's list of models is used
NO_MODELS_SECONDS: Final = 30.0  # and a built-in one in its place
DEAD_SECONDS: Final = 600.0  # an account whose token was refused is not asked for this long, if there are others
MAX_REMOVAL_FAILURES: Final = 3  # one after the other
MAX_CONTINUATIONS: Final = 3  # of one answer that meets its length limit (classic)
MAX_KEPT_FILES: Final = 4096
MAX_KEPT_RESPONSES: Final = 1000
MAX_KEPT_BYTES: Final = 64 * MEGABYTE  # of them
MAX_LOOP_SIZE: Final = 65_536  # bytes of a body, characters of an answer, to be handled without a thread

Owner = tuple[bytes, str]  # of what is kept: the account's digest, and the name of the key that used it
Reference = tuple[bytes, str, str]  # of an uploaded file: its owner's digest, the protocol, Kimi's id


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file that a client uploaded, and OpenAI's object of it."""

    reference: Reference = field(repr=False)
    shown: Mapping[str, Any] = field(repr=False)


def keep_messages(messages: Sequence[Message], references: Sequence[Reference]) -> tuple[Message, ...]:
    """`messages` with their attachments as references to what was uploaded: nothing large is kept."""
    rest, kept = iter(references), list[Message]()
    for message in messages:
        uploaded = (Attachment(one.kind, one.path, uploaded=next(rest)) for one in message.attachments)
        kept.append(replace(message, attachments=tuple(uploaded)))
    return tuple(kept)


class KeptTable(Generic[Result]):
    """Values that clients may come back to, by id, each found by its owner alone: in this process's memory.

    Where they are more than `limit` together, the owner who has the most loses the oldest.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: dict[tuple[Owner, object], tuple[Result, int]] = {}  # with its size, the oldest first

    def keep(self, owner: Owner, key: object, value: Result, size: int = 1) -> None:
        """Keep a value as the newest of its owner's; one that is larger than the limit is not."""
        if size > self._limit:
            return
        self.forget([owner], key)
        self._values[owner, key] = value, size
        sizes = Counter[Owner]()
        for (one, _), (_, taken) in self._values.items():
            sizes[one] += taken
        while sizes.total() > self._limit:
            largest = max(sizes, key=sizes.__getitem__)
            oldest = next(known for known in self._values if known[0] == largest)
            sizes[largest] -= self._values.pop(oldest)[1]

    def find(self, owners: Iterable[Owner], key: object) -> Result | None:
        """The value of one of `owners`; None where it is not kept, or a stranger's."""
        rows = (self._values.get((owner, key)) for owner in owners)  # one look each: threads ask, too
        return next((row[0] for row in rows if row is not None), None)

    def find_all(self, owners: Iterable[Owner]) -> list[Result]:
        """All values of `owners`, the newest of each first."""
        rows = list(reversed(self._values.items()))
        return [value for owner in owners for (one, _), (value, _) in rows if one == owner]

    def forget(self, owners: Iterable[Owner], key: object) -> None:
        """Forget a value of `owners`, if it is kept."""
        for owner in owners:
            self._values.pop((owner, key), None)


class Uploads:
    """Uploads files to Kimi, and remembers the ids for an hour: programs send the files of a chat with each turn."""

    KEPT_SECONDS = 3600.0

    def __init__(self, files: Files, settings: Settings) -> None:
        self._files = files
        self._max_inline_mb = settings.max_inline_mb
        self._kept: KeptTable[tuple[float, str]] = KeptTable(MAX_KEPT_FILES)
        self._running: dict[tuple[object, ...], asyncio.Future[ProxyError | None]] = {}

    async def upload(self, account: Account, protocol: KimiProtocol, files: Sequence[Attachment]) -> list[Reference]:
        """References to `files`, in their order. Raises the first `ProxyError`, and cancels the other uploads."""
        if sum(file.inline_bytes for file in files) > self._max_inline_mb * MEGABYTE:
            raise ProxyError("file_too_large", f"inline files of more than {self._max_inline_mb} MB together")
        gate = asyncio.Semaphore(4)
        work = [asyncio.create_task(self._find(gate, account, protocol, file)) for file in files]
        try:
            return [(account.digest, protocol.name, kimi_id) for kimi_id in await asyncio.gather(*work)]
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _find(self, gate: asyncio.Semaphore, account: Account, protocol: KimiProtocol, file: Attachment) -> str:
        """The id of one file: the one that is remembered, else a new one."""
        if file.uploaded is not None:
            if file.uploaded[:2] != (account.digest, protocol.name):
                code = "file_not_found" if file.file_id else "previous_response_not_found"
                raise ProxyError(code, "its file was uploaded in another protocol of Kimi", param=file.path)
            return file.uploaded[2]
        async with gate:
            try:
                return await self._upload_once(account, protocol, file)
            except ProxyError as error:
                error.param = error.param or file.path
                raise

    async def _upload_once(self, account: Account, protocol: KimiProtocol, attachment: Attachment) -> str:
        """The id of a file, uploaded once for all who want it now: they share its failure, but no cancellation."""
        digest, size_bytes = await self._files.identify(attachment)
        key = (account.digest, protocol.name, attachment.kind, attachment.name, bool(attachment.url), digest)
        while (running := self._running.get(key)) is not None:
            await asyncio.wait({running})
            if (failure := running.result()) is not None:
                raise failure.copy()
        loop, outcome = asyncio.get_running_loop(), None
        until, file_id = self._kept.find([(account.digest, "")], key) or (0.0, "")
        if loop.time() < until:
            return file_id
        self._running[key] = loop.create_future()
        try:
            file_id = await _upload(account, protocol, self._files.open(attachment, size_bytes))
        except ProxyError as error:
            outcome = error.copy()
            raise
        finally:
            self._running.pop(key).set_result(outcome)
        self._kept.keep((account.digest, ""), key, (loop.time() + self.KEPT_SECONDS, file_id))
        return file_id

    async def add(self, account: Account, received: ReceivedFile, protocol: KimiProtocol) -> UploadedFile:
        """Upload a client's file to Kimi."""
        file = received.open()
        kimi_id = await _upload(account, protocol, nullcontext(file))
        shown = {
            "id": f"file-{secrets.token_hex(12)}",
            "object": "file",
            "bytes": file.size_bytes,
            "created_at": int(time.time()),
            "filename": file.name,
            "purpose": received.purpose,
            "status": "processed",
        }
        return UploadedFile((account.digest, protocol.name, kimi_id), shown)


async def _upload(account: Account, protocol: KimiProtocol, opening: AbstractAsyncContextManager[OpenFile]) -> str:
    """Stream a file to Kimi, and wait until it can be referred to: Kimi's id of it."""
    file = None
    try:
        async with asyncio.timeout(TRANSFER_SECONDS), opening as file:
            stored = await protocol.store_file(account, file)
    except TimeoutError:
        code = "file_silent" if file is None or file.waiting_for_source else "storage_silent"
        raise ProxyError(code, f"the file's way to Kimi takes more than {TRANSFER_SECONDS:g} s") from None
    return await protocol.register_file(account, stored)


@dataclass(slots=True)
class Exchange:
    """One question to one account, and its answer: a conversation at Kimi and the response that is open in it."""

    account: Account
    protocol: KimiProtocol
    question: Question
    kept: bool  # the conversation is its client's, and stays
    conversation_id: str = ""  # empty while only the answer's stream knows it
    starting: asyncio.Task[None] | None = None  # asks, unless it is
    abandoned: bool = False
    stream: AnswerStream | None = None
    keeping: asyncio.Task[None] | None = None  # has the conversation kept


def order_accounts(accounts: Iterable[Account]) -> list[Account]:
    """The order in which to ask: the least busy, then the one unused for longest. Last are those that answer one
    question at a time, and have one; behind them, those on cooldown.
    """
    now = loop_time()

    def rank(account: Account) -> tuple[float, bool, int, float]:
        slots, wait = account.slots, max(account.cooldown_until, now)
        return wait, slots.serialized and slots.running > 0, slots.running + slots.waiting, account.used_at

    return sorted(accounts, key=rank)


@dataclass(slots=True)
class Gateway:
    """What every answer needs: protocols, models, the choice of an account, and the end of conversations."""

    settings: Settings
    metrics: Metrics
    tasks: BackgroundTasks
    accounts: Accounts
    uploads: Uploads
    conversations: OpenConversations
    classic: Classic
    connect: Connect
    current: KimiProtocol  # until another one answers
    _listed: weakref.WeakKeyDictionary[Account, tuple[float, tuple[Model, ...]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def answer(self, accounts: Sequence[Account], question: Question, start_chain: Callable[[], Chain]) -> LiveAnswer:
        """The answer of one of `accounts`, for `async with`; `start_chain` makes the filters of each try."""
        if orphaned := [account.digest for account in accounts if account.digest in self.conversations.orphans]:
            self.tasks.start(self.remove_orphans(orphaned), "remove")
        deadline = loop_time() + self.settings.answer_seconds
        return LiveAnswer(self, accounts, question, start_chain, deadline)

    async def upload(self, accounts: Sequence[Account], received: ReceivedFile) -> UploadedFile:
        """Bring a client's file to Kimi, for one of `accounts`. Raises `ProxyError`."""
        return await self.ask_in_turn(
            accounts, lambda account: self.insist(account, partial(self.uploads.add, account, received))
        )

    async def ask_in_turn(self, accounts: Sequence[Account], ask: Callable[[Account], Awaitable[Result]]) -> Result:
        """What `ask` gives for the first of `accounts` that is not refused (401, 429); any other failure is raised.

        Where all were refused, a limit is raised rather than a dead token.
        """
        failures, queue = list[ProxyError](), order_accounts(accounts)
        for account in queue:
            # Dead tokens say nothing about the accounts on cooldown.
            if account.cooldown_until > loop_time() and any(failure.status != 401 for failure in failures):
                continue
            account.used_at, had_line = loop_time(), account.slots.serialized
            try:
                return await ask(account)
            except ProxyError as failure:
                if failure.status not in (401, 429):
                    raise
                failures.append(failure)
                if account.slots.serialized and not had_line:
                    queue.append(account)  # behind the others, to wait in its line
                # A full queue is our own, and research has a quota of its own, which Kimi tells without an error.
                elif failure.code != "queue_full" and (failure.code != "quota_used_up" or failure.upstream_status):
                    seconds = DEAD_SECONDS if failure.status == 401 else failure.retry_after_seconds
                    account.cooldown_until = loop_time() + seconds
        raise max(reversed(failures), key=lambda failure: failure.status)

    async def insist(
        self, account: Account, ask: Callable[[KimiProtocol], Awaitable[Result]], protocol_name: str = ""
    ) -> Result:
        """What `ask` gives: again where the token was stale, and by connect, from then on, where classic is retired."""
        first = protocol = self.protocol_of(account, protocol_name)
        is_fresh = False
        while True:
            try:
                result = await ask(protocol)
                break
            except ProxyError as failure:
                if failure.code == "token_dead" and failure.access_token and not is_fresh:
                    is_fresh = True
                    self.accounts.drop(account, failure.access_token)
                elif isinstance(failure, ProtocolRetired) and self.may_change(protocol):
                    logger.debug("! %s", failure)
                    protocol = self.connect
                else:
                    raise
        if protocol is not first and self.may_change(self.current):
            self.current = protocol
            logger.warning("classic seems to be retired, connect answered: staying with it (KIMI_PROTOCOL=connect)")
        return result

    async def refresh(self, account: Account) -> TokenPair:
        """A new pair of tokens, by the protocol in use, or in `auto` by connect where classic refuses the token."""
        protocol = self.protocol_of(account)
        try:
            pair = await protocol.refresh(account)
        except ProxyError as error:
            is_retired = isinstance(error, ProtocolRetired)
            if not self.may_change(protocol) or not (is_retired or error.code == "token_dead"):
                raise
            pair = await self.connect.refresh(account)
            if not is_retired:
                account.twin = account.twin or "cn"  # a token of connect alone
        self.metrics.count("kimi_proxy_tokens_refreshed_total")
        return pair

    async def models(self, account: Account | None) -> tuple[Model, ...]:
        """The models that can be asked: Kimi's own list, which only connect tells, else a built-in one.

        Raises `ProxyError` for a token that is refused.
        """
        protocol = self.current if account is None else self.protocol_of(account)
        built_in = CLASSIC_MODELS if protocol is self.classic else CONNECT_MODELS
        if account is None:
            return built_in
        until, models = self._listed.get(account, (0.0, ()))
        if protocol is self.connect and time.monotonic() < until:
            return models
        models, seconds = built_in, NO_MODELS_SECONDS
        try:
            await self.accounts.access_token(account)
            if protocol is self.connect:
                models, seconds = await self.connect.models(account) or built_in, MODELS_SECONDS
        except ProxyError as error:
            if error.status == 401:
                raise
            logger.warning("! %s; a built-in list of models is used", error)
        if protocol is self.connect:
            self._listed[account] = (time.monotonic() + seconds, models)
        return models

    def protocol_of(self, account: Account, name: str = "") -> KimiProtocol:
        """The protocol of that name, else the one in use, or the only one that takes the account's token."""
        if not name and self.may_change(self.current) and self.connect.needs(account):
            name = "connect"
        return self.connect if name == "connect" else self.classic if name == "classic" else self.current

    def may_change(self, protocol: KimiProtocol) -> bool:
        """Whether to ask again by connect what `protocol` refused as one that is retired would."""
        return self.settings.protocol == "auto" and protocol is self.classic

    async def ask(self, exchange: Exchange, deadline: float) -> None:
        """Open the conversation of `exchange` where it has none, and ask in it. Raises `ProxyError`."""
        account, protocol, question = exchange.account, exchange.protocol, exchange.question
        if not exchange.conversation_id:
            self.note_opened(exchange, await protocol.open(account, question.model))
        if not exchange.abandoned:
            exchange.stream = await protocol.ask(account, exchange.conversation_id, question, deadline)

    def note_opened(self, exchange: Exchange, conversation_id: str) -> None:
        """Have a new conversation on the list of those to remove, as soon as its id is known."""
        if conversation_id:
            exchange.conversation_id = conversation_id
            self.conversations.add(exchange.account.digest, exchange.protocol.name, conversation_id)

    async def keep(self, exchange: Exchange, message_id: str) -> None:
        """Remember the conversation of `exchange`, and its last answer, for its client. Raises `ProxyError`."""
        name, key = exchange.protocol.name, exchange.question.key
        await self.accounts.keep(exchange.account, exchange.conversation_id, name, message_id, key)
        self.conversations.discard(exchange.conversation_id)
        exchange.kept = True

    async def clean_up(self, exchange: Exchange, account: Account | None) -> None:
        """Stop what runs, release the slot of `account`, and have the conversation removed. Failures are logged."""
        try:
            await self._end_stream(exchange)
        finally:
            if account is not None:
                account.slots.release()
        if exchange.keeping is not None:
            await asyncio.wait({exchange.keeping})
        stream, starting = exchange.stream, exchange.starting
        if exchange.conversation_id:
            if not exchange.kept:
                removal = self._remove(exchange.account, exchange.protocol, exchange.conversation_id)
                self.tasks.start(removal, "remove")
        elif not stream.answer.ended if stream is not None else starting is not None and _is_unanswered(starting):
            self.metrics.count("kimi_proxy_removals_failed_total")
            logger.warning("! a conversation of account %s may be left: its id was not read", exchange.account.label)
        exchange.starting = exchange.stream = None  # frames of their failures hold the exchange, and so the prompt

    async def _end_stream(self, exchange: Exchange) -> None:
        """Stop the answer, or read what is left of an ended one; read on for ids that are in the stream [2+]."""
        exchange.abandoned = True
        if (starting := exchange.starting) is not None and not starting.done():
            if exchange.conversation_id:
                starting.cancel()
            # What opens a conversation is finished, so that its id is known: the call has a limit of its own.
            await asyncio.wait({starting}, timeout=ID_SECONDS if exchange.protocol is self.connect else None)
            starting.cancel()
            await asyncio.wait({starting})
        if (stream := exchange.stream) is None:
            return
        answer = stream.answer
        if not exchange.conversation_id:  # nobody may have read on since it came
            self.note_opened(exchange, answer.conversation_id)
        for what, name in islice(answer.unknown_fields, 20):
            self.metrics.warn_once(what, name)
        if answer.degraded:
            self.metrics.count("kimi_proxy_degraded_answers_total")
            logger.warning("! Kimi answered with a weaker model: %s", answer.degraded)
        if answer.ended:
            await stream.drain(END_SECONDS)
            if answer.done or stream.response.content.at_eof():
                return
        with suppress(ProxyError, TimeoutError):
            async with asyncio.timeout(END_SECONDS if exchange.conversation_id else ID_SECONDS - END_SECONDS) as limit:
                while exchange.protocol is self.connect and not answer.message_id and await stream.read() is not None:
                    if not exchange.conversation_id and answer.conversation_id:
                        self.note_opened(exchange, answer.conversation_id)
                        limit.reschedule(loop_time() + END_SECONDS)
        stream.close()
        if exchange.conversation_id and answer.message_id:
            try:
                await exchange.protocol.stop(exchange.account, exchange.conversation_id, answer.message_id)
            except ProxyError as error:
                logger.warning("! an answer of account %s may go on at Kimi: %s", exchange.account.label, error)

    async def _remove(self, account: Account, protocol: KimiProtocol, conversation_id: str) -> bool:
        """Remove a conversation; whether it is gone then. A failure is logged, and the removal tried again later."""
        try:
            await protocol.remove(account, conversation_id)
        except ProxyError as error:
            if error.upstream_status != 404:  # that one is gone
                self.conversations.postpone(conversation_id)
                self.metrics.count("kimi_proxy_removals_failed_total")
                text = "! conversation %s of account %s was not removed: %s"
                logger.warning(text, conversation_id, account.label, error)
                return False
        self.conversations.discard(conversation_id)
        return True

    async def remove_orphans(self, owners: Iterable[bytes]) -> None:
        """Remove what is left open for these accounts, as far as their tokens are known, until some removals fail."""
        for owner in owners:
            account = await self.accounts.recall(owner)
            if account is None or not (orphans := self.conversations.orphans.pop(owner, {})):
                continue
            tries: list[bool] = []
            for conversation_id, name in orphans.items():
                if tries.count(False) == MAX_REMOVAL_FAILURES:
                    self.conversations.postpone(conversation_id)
                else:
                    tries.append(await self._remove(account, self.protocol_of(account, name), conversation_id))
            words = "removed %d of %d conversations of account %s left open"
            logger.info(words, sum(tries), len(orphans), account.label)


def _is_unanswered(asking: asyncio.Task[None]) -> bool:
    """Whether `asking`, which is over, may have opened a conversation without a reply that tells its id."""
    failure = None if asking.cancelled() else asking.exception()
    if not isinstance(failure, ProxyError):
        return asking.cancelled()
    return failure.code in ("service_silent", "service_failed", "answer_broken") and not failure.upstream_status


@dataclass(slots=True)
class LiveAnswer:
    """One answer, pulled by `read` within `async with`; leaving that at any point cleans up.

    Entering asks until there is something for the client to see; from then on only a filter can want a second try.
    """

    _gateway: Gateway
    _accounts: Sequence[Account]
    _question: Question
    _start_chain: Callable[[], Chain]
    _deadline: float  # loop time
    _chain: Chain = field(init=False)
    owner: bytes = b""  # the digest of the account that is asked
    wait_seconds: float = 0.0  # in line for accounts
    references: Sequence[Reference] = ()  # to what was uploaded of the question
    degraded: str = ""  # the service's words when a weaker model answers
    _account: Account | None = None  # whose slot is taken
    _exchange: Exchange | None = None
    _first: list[Event] = field(default_factory=list)
    _continuations_left: int = MAX_CONTINUATIONS
    _is_second_try: bool = False
    _over: bool = False

    async def __aenter__(self) -> LiveAnswer:
        try:
            self._first = await self._gateway.ask_in_turn(await self._find_owner(), self._ask_account)
        except BaseException:
            self._leave()
            raise
        self._question.attachments.clear()  # inline files are large
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    async def read(self) -> list[Event] | None:
        """The next events, never none; None when the answer is over. Raises `ProxyError`."""
        events, self._first = self._first, []
        while not events and not self._over:
            try:
                if self._chain.retry_reason:
                    await self._ask_again()
                exchange: Any = self._exchange
                stream = exchange.stream
                events = await stream.read()
                if not exchange.conversation_id:
                    self._gateway.note_opened(exchange, stream.answer.conversation_id)
                is_over = events and isinstance(events[-1], Finished)
                if is_over and stream.answer.segment_id and self._continuations_left:
                    events = await self._go_on(exchange, events)
                if is_over and stream.answer.size > MAX_LOOP_SIZE:  # much may be held
                    events = await asyncio.to_thread(self._chain.feed, events)
                else:
                    events = self._chain.feed(events)
            except ProxyError as failure:
                # Where the second try fails, the first answer may still be of use.
                events = self._chain.give_up() if self._is_second_try and failure.status != 422 else []
                if not events:
                    raise
                logger.warning("! asking once more failed: %s", failure)
            if events and isinstance(events[-1], Finished):
                await self._finish()
        return events or None

    async def _find_owner(self) -> Sequence[Account]:
        """The account that the question's conversation or files belong to, else all. Raises `ProxyError` for two."""
        question = self._question
        owners = {one.uploaded[0] for one in question.attachments if one.uploaded is not None}
        if conversation_id := question.conversation_id:
            read, key = self._gateway.accounts.read_kept, question.key
            keepers = [one.digest for one in self._accounts if conversation_id in await read(one, key)]
            if not keepers:
                raise ProxyError("conversation_not_found", param="conversation_id")
            owners.add(keepers[0])
        if len(owners) > 1:
            raise ProxyError("invalid_request", "its files and its conversation belong to two accounts")
        return [account for account in self._accounts if account.digest in owners] or self._accounts

    async def _ask_account(self, account: Account) -> list[Event]:
        """The first events that `account` answers, when it has a slot free. Raises `ProxyError`."""
        gateway, slots, name = self._gateway, account.slots, ""
        others, started, self.owner = slots.running, loop_time(), account.digest
        try:
            await slots.acquire(gateway.settings.queue_length)
        finally:
            self.wait_seconds += loop_time() - started
            gateway.metrics.observe("kimi_proxy_queue_seconds", loop_time() - started)
        self._account = account
        try:
            await gateway.accounts.access_token(account)  # without one, a built-in list of models would not help
            model, is_known = choose_model(self._question.model_name, await gateway.models(account))
            if not is_known:
                logger.info(
                    "model %s is not known, %s is asked instead", quote_name(self._question.model_name), model.id
                )
            question = replace(self._question, model=model)
            if question.conversation_id:
                kept = (await gateway.accounts.read_kept(account, question.key)).get(question.conversation_id)
                if kept is None:  # dropped by another process, while this question waited
                    raise ProxyError("conversation_not_found", param="conversation_id")
                name, question.parent_id = kept
            events = await gateway.insist(account, partial(self._ask, account, question), name)
        except ProxyError as failure:
            # Kimi refuses an answer because another one of the account runs, which it does, or did, here.
            busy_code = self._exchange.protocol.busy_code if self._exchange is not None else ""
            if failure.code == busy_code and (others or slots.running > 1):
                slots.note_refused()
            self._leave()
            raise
        account.cooldown_until = 0.0
        return events

    async def _ask(self, account: Account, question: Question, protocol: KimiProtocol) -> list[Event]:
        """Ask by one protocol, until there is something to see. Files go first: a bad one opens no conversation."""
        self.references = ()
        if question.attachments:
            self.references = await self._gateway.uploads.upload(account, protocol, question.attachments)
            file_ids = dict.fromkeys(kimi_id for _, _, kimi_id in self.references)
            question = replace(question, attachments=[], file_ids=tuple(file_ids))
        self._chain = self._start_chain()
        exchange = Exchange(account, protocol, question, kept=bool(question.conversation_id))
        await self._start(exchange)
        opened = [Opened(exchange.conversation_id, protocol.hits_inline)] if exchange.conversation_id else []
        events = self._chain.feed(list[Event](opened))
        while not events or isinstance(events[-1], Opened):
            events += await self.read() or []
        return events

    async def _start(self, exchange: Exchange) -> None:
        """Let go of the exchange before, and have a task ask that outlives a client who leaves. Raises `ProxyError`."""
        gateway, question = self._gateway, exchange.question
        former, self._exchange = self._exchange, exchange
        exchange.conversation_id = question.conversation_id
        if former is not None:  # Kimi may give the account one answer at a time
            await asyncio.shield(gateway.tasks.start(gateway.clean_up(former, None), "clean up"))
        exchange.starting = gateway.tasks.start(gateway.ask(exchange, self._deadline), "ask")
        try:
            await asyncio.shield(exchange.starting)
        except ProxyError as failure:
            if question.conversation_id and failure.upstream_status == 404:
                raise ProxyError("conversation_not_found", failure.detail, param="conversation_id") from None
            raise

    async def _go_on(self, exchange: Exchange, events: list[Event]) -> list[Event]:
        """Have an answer that met its length limit go on: its last `events`, without the end where it does."""
        stream = cast(AnswerStream, exchange.stream)
        self._continuations_left -= 1
        await stream.drain(END_SECONDS)
        exchange.question = replace(exchange.question, segment_id=stream.answer.segment_id)
        try:
            await self._gateway.ask(exchange, self._deadline)
            return events[:-1]
        except ProxyError as failure:
            logger.warning("! the answer is cut short: %s", failure)
            return events

    async def _ask_again(self) -> None:
        """The second try, told what was wrong with the first; in the same conversation where that is kept."""
        logger.debug("= the answer cannot be used, asking once more")
        first, chain, stays = cast(Exchange, self._exchange), self._chain, self._question.keeps
        words = describe_failure(chain.retry_reason, "" if stays else chain.previous)
        text = words if stays else f"{first.question.text}system:{words}"
        question = replace(first.question, text=text, segment_id="")
        second = Exchange(first.account, first.protocol, question, first.kept)
        if stays:
            question.conversation_id = first.conversation_id
            question.parent_id = cast(AnswerStream, first.stream).answer.message_id
            first.kept = True  # the second has it now
        chain.begin_retry()
        self._is_second_try = True
        await self._start(second)

    async def _finish(self) -> None:
        """Note that the answer is over, and keep its conversation where the client wants that: before it is told."""
        self._over = True
        if self._question.keeps:
            exchange = cast(Exchange, self._exchange)
            message_id = cast(AnswerStream, exchange.stream).answer.message_id or exchange.question.parent_id
            exchange.keeping = self._gateway.tasks.start(self._gateway.keep(exchange, message_id), "keep")
            await asyncio.shield(exchange.keeping)

    def _leave(self) -> None:
        """Let go of exchange and slot; one tracked task does what takes time."""
        exchange, self._exchange = self._exchange, None
        account, self._account = self._account, None
        if exchange is not None:
            self.degraded = exchange.stream.answer.degraded if exchange.stream is not None else ""
            self._gateway.tasks.start(self._gateway.clean_up(exchange, account), "clean up")
        elif account is not None:
            account.slots.release()


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """One answer of the Responses API that can be continued."""

    owner: bytes = field(repr=False)  # the account's digest
    shown: Mapping[str, Any] = field(repr=False)
    messages: tuple[Message, ...] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        texts = [encode_json(self.shown)]
        for one in self.messages:
            texts += (one.text, one.tool_call_id, one.tool_name)
            texts += (text for call in one.calls for text in (call.id, call.name, call.arguments))
        return sum(map(sys.getsizeof, texts)) + 500 * len(self.messages)


# ==== 17. Access ============================================================
#
# Who may call, and for which accounts. Without a held account each client brings its own token, and nothing is checked.
# While one is held, web pages are kept out: a page can make a browser call any address (DNS rebinding).


MIN_KEY_LENGTH: Final = 16  # of a key that other machines may try to guess


def find_secrets(file_name: str, environ: Mapping[str, str]) -> Path:
    """The file of secrets; a relative name is first looked up in systemd's credentials (systemd.exec(5))."""
    found = Path(environ.get("CREDENTIALS_DIRECTORY", ""), file_name)
    return found if found.exists() else Path(file_name)


def read_secrets(name: str, text: str, file_name: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The words of the setting `name`, or of its file, each once. Raises `SettingsError`."""
    if text and file_name:
        raise SettingsError(f"{name} and {name}_FILE: set one of them")
    try:
        if file_name:
            text = read_text(find_secrets(file_name, environ))
        is_key = name == "PROXY_API_KEYS"
        words = tuple(dict.fromkeys(re.findall(r"[^,\s]+", text))) if is_key else read_pasted_tokens(text, r",\s")
    except SettingsError as error:
        raise SettingsError(f"{name}_FILE: {error}") from None
    except ProxyError as error:
        raise SettingsError(f"{name}: {error.message}") from None
    if file_name and not words:
        raise SettingsError(f"{name}_FILE: {file_name} is empty")
    return words


def _split_key(number: int, word: str) -> tuple[str, str]:
    """Key and name of the `number`th key, `word`, which is `key` or `name:key`. Raises `SettingsError`."""
    name, key = word.split(":", 1) if ":" in word else (f"#{number}", word)
    if not TOKEN_SHAPE.fullmatch(key) or not re.fullmatch(r"[#A-Za-z0-9_.-]{1,32}", name):
        raise SettingsError(f"PROXY_API_KEYS: word {number} must be a key or name:key; names: letters, digits, _ . -")
    return key, name


def _name_of(host: str) -> str:
    """The name in a `Host` header or a setting, without a port; empty where it is none."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]@]+)(?::[0-9]{1,5})?", host)
    return found[1].lower().rstrip(".").strip("[]") if found else ""


def _read_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    address = _read_address(host)
    return host == "localhost" if address is None else address.is_loopback


class Access:
    """The held accounts' refresh tokens, the proxy's own keys, and the names and pages that may use them."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], hosts: Sequence[str] = ()) -> None:
        self._token_source = (settings.refresh_token, settings.refresh_token_file, environ)
        self.tokens = read_secrets("KIMI_REFRESH_TOKEN", *self._token_source)
        words = read_secrets("PROXY_API_KEYS", settings.api_keys, settings.api_keys_file, environ)
        self.keys = dict(_split_key(number, word) for number, word in enumerate(words, 1))
        self._names = {"localhost", *map(_name_of, (settings.host, *settings.allowed_hosts))} - {""}
        self._origins = frozenset(settings.cors_origins) - ({"*"} if self.tokens else set())
        self.allows_all_origins = "*" in self._origins
        if self.keys and not self.tokens:
            raise SettingsError("PROXY_API_KEYS: there is no held account to guard; set KIMI_REFRESH_TOKEN too")
        exposed = [host for host in hosts or (settings.host,) if not is_loopback(host)]
        if exposed and self.tokens and not self.keys:
            raise SettingsError(f"PROXY_HOST={exposed[0]}: anyone there could use the held account; set PROXY_API_KEYS")
        if short := [name for key, name in self.keys.items() if len(key) < MIN_KEY_LENGTH]:
            advice = f"shorter than {MIN_KEY_LENGTH} characters can be guessed: {', '.join(short)}"
            if exposed:
                raise SettingsError(f"PROXY_API_KEYS: keys {advice}; make one by `openssl rand -hex 24`")
            logger.warning("PROXY_API_KEYS: keys %s; they are refused where other machines reach the proxy", advice)

    def reload_tokens(self) -> None:
        """Read the token file again, after a held token was refused."""
        try:
            self.tokens = read_secrets("KIMI_REFRESH_TOKEN", *self._token_source)
        except SettingsError as error:
            logger.warning("! the held tokens stay as they are: %s", error)

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of `origin` may call; while an account is held `*` allows none."""
        return self.allows_all_origins or origin in self._origins

    def check_page(self, host: str, origin: str | None) -> None:
        """Raise `ProxyError` for a request that a web page may have made: `host_denied`, `origin_denied`."""
        if not self.tokens:
            return
        name = _name_of(host)
        if name not in self._names and _read_address(name) is None:
            raise ProxyError("host_denied", f"Host {quote_words(name)[:100] or '(none)'}")
        is_own = origin is not None and origin.partition("://")[2] == host  # the page at `/`
        if origin is not None and not is_own and not self.allows_origin(origin):
            raise ProxyError("origin_denied", f"Origin {quote_words(origin)[:100]}")

    def check_key(self, key: str) -> str:
        """The name of the client's key. Raises `ProxyError` `key_refused`."""
        if key not in self.keys:  # a search by hash, whose time tells nothing of a key
            raise ProxyError("key_refused")
        return self.keys[key]


# ==== 18. Server ============================================================
#
# The aiohttp application: its state, one middleware around every request, and the handlers, one for all APIs that
# answer. A `ResponseWriter` sends the head with the first bytes: a failure before them still has its HTTP status.

KEEP_ALIVE_SECONDS: Final = 20.0  # a stream silent for this long gets a comment line
SEND_SECONDS: Final = 60.0  # drop a client that reads nothing for this long
BODY_SECONDS: Final = 60.0  # limit for the body of a request to arrive
MAX_BODIES_MB: Final = 256  # bodies of all running requests together, but always room for one
WRITE_BYTES: Final = 16_384  # of an answer at once
MAX_FORM_LINES: Final = 1000  # those between its fields
GRACE_SECONDS: Final = 3.0  # on shutdown, a connection that waits for a request may still send one
CLIENT_CLOSED: Final = 499  # as nginx logs a client that went away
OPEN_PATHS: Final = frozenset({"/", "/ping", "/health"})
BODY_ERRORS: Final = (web.RequestPayloadError, aiohttp.ClientPayloadError, HttpProcessingError, zlib.error)

_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 0 auto; padding: 0 1rem 3rem; overflow-wrap: anywhere }
section { border-top: 1px solid #8886; margin-top: 1.5rem }
input, select, textarea, button { font: inherit; padding: .4rem .6rem; max-width: 100%; box-sizing: border-box }
#key, #question { width: 100% }
pre { white-space: pre-wrap; background: #8882; padding: .7rem; margin: .5rem 0 }
#answer, #thinking { font: inherit }
#answer:empty:not([aria-busy=true]) { display: none }
#answer[aria-busy=true]::after { content: " …" }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .6rem 0 }
.bad { color: light-dark(#c62828, #ff8a80) } .good { color: light-dark(#2e7d32, #a5d6a7) }
"""
_SCRIPT: Final = r"""
const $ = id => document.getElementById(id);
const base = location.origin;
const settings = {
  "OpenAI compatible": `Base URL: ${base}/v1\nAPI key: KEY\nModel: kimi`,
  "curl": `curl ${base}/v1/chat/completions \\\n` +
    `  -H "Authorization: Bearer KEY" -H "Content-Type: application/json" \\\n` +
    `  -d '{"model": "kimi", "messages": [{"role": "user", "content": "Say hello."}]}'`,
  "Python": `import openai\n\nclient = openai.OpenAI(base_url="${base}/v1", api_key="KEY")\n` +
    `question = [{"role": "user", "content": "Say hello."}]\n` +
    `print(client.chat.completions.create(model="kimi", messages=question).choices[0].message.content)`,
  "Claude Code": `export ANTHROPIC_BASE_URL="${base}"\nexport ANTHROPIC_AUTH_TOKEN="KEY"\n` +
    `export ANTHROPIC_MODEL="kimi"\nclaude`,
  "Codex CLI": `# ~/.codex/config.toml; then: export KIMI_KEY="KEY" and codex\nmodel = "kimi"\n` +
    `model_provider = "kimi_proxy"\n\n[model_providers.kimi_proxy]\nname = "kimi_proxy"\n` +
    `base_url = "${base}/v1"\nenv_key = "KIMI_KEY"\nwire_api = "responses"`,
  "Open WebUI": `Admin Settings, Connections, OpenAI API\nURL: ${base}/v1\nKey: KEY\nModel: kimi-search`,
};
let running = null, checking = null;

function add(parent, name, text, href) {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  if (href && /^https?:/.test(href)) Object.assign(element, {href, target: "_blank", rel: "noopener noreferrer"});
  return element;
}

async function call(path, options = {}) {
  const key = $("key").value.trim();
  if (/[^ -~]/.test(key)) throw new Error("The key has characters that no key has: copy it once more.");
  const headers = {...(key && {Authorization: `Bearer ${key}`}), ...options.headers};
  const response = await fetch(path, {...options, headers}).catch(error => {
    throw error.name === "AbortError" ? error : new Error(`Nothing answers at ${base}. Does the proxy still run?`);
  });
  if (response.ok) return response;
  const value = await response.json().catch(() => ({error: {message: `HTTP ${response.status}`}}));
  if (!value.error) return {json: () => value};
  throw new Error(value.error.message);
}

async function check() {
  checking?.abort();
  const {signal} = checking = new AbortController();
  $("accounts").replaceChildren();
  Object.assign($("checked"), {className: "", textContent: "Asking Kimi …"});
  try {
    const state = await (await call("/health?accounts", {signal})).json();
    const started = new Date(Date.now() - state.uptime_seconds * 1000).toLocaleString();
    $("status").textContent = `Version ${state.version}, running since ${started}. Answers in progress: ` +
      `${state.answers_running}. ` + (state.holds_account ? "This proxy holds an account." : "Bring your own token.");
    for (const one of state.accounts) {
      const words = one.live ? `works${one.until ? ` until ${one.until}` : ""}` : `does not work: ${one.message}`;
      add($("accounts"), "li", `Account ${one.account} at ${one.service} (${one.protocol}) ${words}`)
        .className = one.live ? "good" : "bad";
    }
    const lives = state.accounts.some(one => one.live);
    const models = lives ? (await (await call("/v1/models", {signal})).json()).data : [];
    const names = models.map(one => one.id).filter(id => !id.endsWith("-search"));
    $("model").replaceChildren();
    for (const name of names.length ? names : ["kimi"]) add($("model"), "option", name);
    $("checked").textContent = names.length ? `Models: ${names.join(", ")}` : "Enter your token, then Check.";
    sessionStorage.setItem("key", $("key").value);
  } catch (error) {
    if (!signal.aborted) Object.assign($("checked"), {className: "bad", textContent: error.message});
  }
}

const readFile = file => new Promise((resolve, reject) => {
  const fail = () => reject(new Error(`${file.name} cannot be read any more: choose it once more.`));
  const reader = Object.assign(new FileReader(), {onload: () => resolve(reader.result), onerror: fail});
  reader.readAsDataURL(file);
});

function showSources(annotations) {
  const cited = new Map(annotations.map(one => [one.url_citation.url, one.url_citation.title]));
  for (const [url, title] of cited) add(add($("sources"), "li", ""), "a", title || url, url);
}

async function ask() {
  running = new AbortController();
  for (const id of ["thinking", "answer", "failure", "sources"]) $(id).replaceChildren();
  $("answer").ariaBusy = "true";
  $("stop").hidden = false;
  $("stop").focus();
  $("ask").hidden = $("thought").hidden = true;
  try {
    const content = [{type: "text", text: $("question").value}];
    for (const file of $("file").files) {
      const url = await readFile(file);
      content.push(file.type.startsWith("image/") ? {type: "image_url", image_url: {url}}
        : {type: "file", file: {filename: file.name, file_data: url}});
    }
    const body = {model: `${$("model").value || "kimi"}-silent`, stream: true, use_search: $("search").checked,
      messages: [{role: "user", content}]};
    const response = await call("/v1/chat/completions", {method: "POST", body: JSON.stringify(body),
      headers: {"Content-Type": "application/json"}, signal: running.signal});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", piece; !(piece = await reader.read()).done;) {
      const lines = (rest + piece.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: {")) continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        const delta = chunk.choices[0]?.delta ?? {};
        $("thinking").append(delta.reasoning_content ?? "");
        if (delta.reasoning_content) $("thought").hidden = false;
        $("answer").append(delta.content ?? "");
        showSources(delta.annotations ?? []);
      }
    }
  } catch (error) {
    $("failure").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  $("answer").ariaBusy = "false";
  $("ask").hidden = false;
  if (document.activeElement === $("stop")) $("ask").focus();
  $("stop").hidden = true;
}

for (const name of Object.keys(settings)) add($("program"), "option", name);
$("key").value = sessionStorage.getItem("key") || "";
$("check").onsubmit = event => { event.preventDefault(); check(); };
$("try").onsubmit = event => { event.preventDefault(); ask(); };
$("stop").onclick = () => running.abort();
$("copy").onclick = async () => {
  const done = navigator.clipboard ? navigator.clipboard.writeText($("setting").textContent) : Promise.reject();
  await done.catch(() => { getSelection().selectAllChildren($("setting")); document.execCommand("copy"); });
  $("copied").textContent = "copied";
};
($("program").onchange = () => {
  $("setting").textContent = settings[$("program").value];
  $("copied").textContent = "";
})();
check();
"""
_START_PAGE: Final = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>kimi_proxy</title><style>{_STYLE}</style>
<main><h1>kimi_proxy</h1><p id="status"></p>
<section><h2>Account</h2>
<form id="check"><label for="key">Key of this proxy, or your Kimi refresh token. It stays in this tab.</label>
<input id="key" type="password" autocomplete="off"><div class="row"><button>Check</button></div></form>
<ul id="accounts"></ul><p id="checked" role="status"></p></section>
<section><h2>Try it</h2><form id="try"><textarea id="question" rows="3" required aria-label="Question"></textarea>
<div class="row"><select id="model" aria-label="Model"></select>
<label><input id="search" type="checkbox"> search the web</label><input id="file" type="file" aria-label="File"></div>
<div class="row"><button id="ask">Ask</button><button id="stop" type="button" hidden>Stop</button></div></form>
<details id="thought" hidden><summary>Thinking</summary><pre id="thinking"></pre></details>
<pre id="answer" aria-live="polite"></pre><p id="failure" class="bad" role="alert"></p><ol id="sources"></ol></section>
<section><h2>Connect a program</h2><p>Write your key or token where KEY stands.</p>
<div class="row"><select id="program" aria-label="Program"></select>
<button id="copy">Copy</button><span id="copied" role="status"></span></div><pre id="setting"></pre></section></main>
<script>{_SCRIPT}</script></html>
"""


def _hash_inline(text: str) -> str:
    """The source expression that allows an inline script or style (Content Security Policy, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_START_PAGE_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; script-src {_hash_inline(_SCRIPT)}; "
    f"style-src {_hash_inline(_STYLE)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Outcome:
    """What becomes of one request, filled on the way."""

    key: str = ""
    body_bytes: int = 0  # of its body in memory
    level: int = logging.INFO  # of its log line
    told: dict[str, Any] = field(default_factory=dict)  # in that line


@dataclass(slots=True)
class State:
    """What the application owns, and the requests that run."""

    gateway: Gateway
    files: Files
    access: Access
    responses: KeptTable[KeptResponse] = field(default_factory=lambda: KeptTable(MAX_KEPT_BYTES))
    uploaded: KeptTable[UploadedFile] = field(default_factory=lambda: KeptTable(MAX_KEPT_FILES))
    parsers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))  # of large bodies
    running: dict[asyncio.Task[Any], Outcome] = field(default_factory=dict)
    answers_running: int = 0
    draining: bool = False  # balancers are told
    closing: bool = False  # every response closes its connection
    started: float = field(default_factory=time.time)
    told_of_search: bool = False  # that tools switch it off

    def held_accounts(self) -> list[Account]:
        """The accounts that the proxy holds."""
        return [self.gateway.accounts.get(token, is_held=True) for token in self.access.tokens]


STATE: Final = web.AppKey("state", State)
OUTCOME: Final = web.RequestKey("outcome", Outcome)


class ResponseWriter:
    """One reply on its way to the client. Its watchdog fills silence, and drops a client that reads nothing."""

    def __init__(self, request: web.Request, encoder: Encoder) -> None:
        self.response: web.StreamResponse | None = None  # once the head went out
        self._request = request
        self._encoder = encoder
        self._ended = False
        self._silent_at = loop_time() + KEEP_ALIVE_SECONDS
        self._unsent = (0, 0.0)  # bytes, and since when there are so many
        self._watchdog = Watchdog(self._check, min(KEEP_ALIVE_SECONDS, SEND_SECONDS))

    def close(self) -> None:
        """Stop watching."""
        self._ended = True
        self._watchdog.stop()

    async def write(self, data: bytes, *, is_last: bool = False) -> web.StreamResponse:
        """Write `data` as fast as the client takes it; the head goes before it.

        Raises `CancelledError` where the client is gone, as aiohttp does in any other wait of a handler.
        """
        self._ended, given = is_last, 0  # to aiohttp, bytes of it
        try:
            response = await self._begin(len(data)) if self.response is None else self.response
            while len(data) - given > WRITE_BYTES:
                given += WRITE_BYTES
                await response.write(data[given - WRITE_BYTES : given])
                self._silent_at = loop_time() + KEEP_ALIVE_SECONDS  # nothing may stand within an event
            rest, given = data[given:], len(data)
            await (response.write_eof(rest) if is_last else response.write(rest))
        except ConnectionError:
            raise asyncio.CancelledError from None
        except asyncio.CancelledError:
            if self._request.transport is None:
                raise
            if (rest := data[given:]) and self.response is not None and self.response.prepared:
                with suppress(ConnectionError, TimeoutError):  # what was begun is sent whole, and not waited for
                    async with asyncio.timeout(0):
                        await (self.response.write_eof(rest) if is_last else self.response.write(rest))
            if not is_last:
                raise
            self._request.transport.close()  # once all is sent: nothing may follow the end of an answer
        self._silent_at = loop_time() + KEEP_ALIVE_SECONDS
        return response

    async def _begin(self, size_bytes: int) -> web.StreamResponse:
        """Send the head; `size_bytes` come next, which is all where the answer is whole."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        headers["Content-Type"] = f"{self._encoder.content_type}; charset=utf-8"
        response = self.response = web.StreamResponse(headers=headers)
        if not self._encoder.keep_alive:
            response.content_length = size_bytes
        elif self._request.version >= aiohttp.HttpVersion11:
            response.enable_chunked_encoding()
        else:  # the end of the connection is that of the answer
            response.force_close()
        with suppress(OSError, AttributeError):  # a connection that is lost already
            # The system would hold some megabytes for each client that reads slowly.
            self._request.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 131_072)
            cast(asyncio.Transport, self._request.transport).set_write_buffer_limits(high=16_384)
        await response.prepare(self._request)
        return response

    def _check(self, now: float) -> float:
        """The watchdog's look; when to look again."""
        transport = self._request.transport
        unsent_bytes = transport.get_write_buffer_size() if transport is not None else 0
        if unsent_bytes != self._unsent[0]:
            self._unsent = (unsent_bytes, now)
        if transport is not None and unsent_bytes:
            if now - self._unsent[1] >= SEND_SECONDS:
                logger.warning("! a client was dropped that read nothing for %g s", SEND_SECONDS)
                transport.abort()
            return now + SEND_SECONDS / 4
        if now >= self._silent_at:
            self._silent_at = now + KEEP_ALIVE_SECONDS
            if self._encoder.keep_alive:
                self._request.app[STATE].gateway.tasks.start(self._keep_alive(), "keep-alive")
        return min(self._silent_at, now + SEND_SECONDS)

    async def _keep_alive(self) -> None:
        if not self._ended:
            with suppress(ConnectionError):
                response = self.response or await self._begin(0)
                await response.write(self._encoder.keep_alive)


async def _inflate(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a compressed body. Raises `zlib.error`."""
    inflater = zlib.decompressobj(47)  # gzip and zlib
    while not inflater.unused_data and (rest := await content.readany()):
        while piece := inflater.decompress(rest, 65_536):
            yield piece
            rest = inflater.unconsumed_tail
            await asyncio.sleep(0)
    if inflater.unused_data or not inflater.eof:
        raise zlib.error("cut, or something follows")


async def parse_body(request: web.Request, parse: Callable[[bytearray], Result]) -> Result:
    """What `parse` makes of the request's body: of a large one in a thread, so that others need not wait.

    Raises `ProxyError`: `body_…`, `encoding_unknown`, `too_busy`.
    """
    state, outcome, body = request.app[STATE], request[OUTCOME], bytearray()
    content, limit_bytes = request.content, state.gateway.settings.max_body_bytes
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "deflate"):
        raise ProxyError("encoding_unknown", f"Content-Encoding: {quote_words(encoding)[:24]}")
    pieces = _inflate(content) if encoding in ("gzip", "deflate") else content.iter_any()
    size_bytes = request.content_length or 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while size_bytes <= limit_bytes and (piece := await anext(pieces, b"")):
                body += piece
                outcome.body_bytes = size_bytes = len(body)
                if size_bytes > MEGABYTE + 100 * content.total_bytes:
                    raise ProxyError("body_too_large", "more than 100 times its compressed size")
                if sum(one.body_bytes for one in state.running.values()) > max(MAX_BODIES_MB * MEGABYTE, limit_bytes):
                    raise ProxyError("too_busy", "no room for this body beside those of other requests")
    except TimeoutError:
        raise ProxyError("body_timeout", f"not within {BODY_SECONDS:g} s") from None
    except BODY_ERRORS:
        raise ProxyError("body_broken") from None
    if size_bytes > limit_bytes:
        raise ProxyError("body_too_large", f"at most {limit_bytes} bytes; see PROXY_MAX_INLINE_MB")
    if len(body) <= MAX_LOOP_SIZE:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(state.parsers, parse, body)


def read_credential(request: web.Request) -> str:
    """What a client shows: `x-api-key` or `api-key`, else the Bearer token (RFC 6750), if any."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    key = request.headers.get("x-api-key") or request.headers.get("api-key")
    return key or (text.strip() if scheme.lower() == "bearer" else "")


def find_accounts(request: web.Request, *, is_needed: bool = True) -> list[Account]:
    """The accounts that a request is for: those that the proxy holds, else those of the client's own tokens.

    Raises `ProxyError` `token_missing` where there are none, and one is needed.
    """
    state = request.app[STATE]
    if state.access.tokens:
        return state.held_accounts()
    tokens = read_pasted_tokens(read_credential(request))
    if not tokens and is_needed:
        raise ProxyError("token_missing")
    if len(tokens) > 32:
        raise ProxyError("invalid_request", "at most 32 tokens")
    return [state.gateway.accounts.get(token) for token in tokens]


def _find_owners(request: web.Request, accounts: Iterable[Account]) -> list[Owner]:
    """Whose files and kept answers a client may use: each account's, and of a held one those of the client's key."""
    return [(account.digest, request[OUTCOME].key) for account in accounts]


def _parse_question(api: Api, state: State, owners: Sequence[Owner], body: bytearray) -> tuple[ChatRequest, str, bytes]:
    """A request, its prompt, and the digest of the account that gave the answer before it, if any."""

    def find_item(item_id: str) -> Mapping[str, Any] | None:
        """The item of a kept answer, if there is one. Its id has the answer's within it."""
        kept = state.responses.find(owners, f"resp_{item_id.partition('_')[2].rpartition('_')[0]}")
        return next((item for item in kept.shown["output"] if item["id"] == item_id), None) if kept else None

    chat, owner = api.parse(body, find_item), b""
    if chat.previous_response_id:
        before = state.responses.find(owners, chat.previous_response_id)
        if before is None:
            raise ProxyError("previous_response_not_found", param="previous_response_id")
        chat, owner = add_messages(chat, before.messages, "input"), before.owner
    return chat, render_prompt(chat), owner


async def _read_question(api: Api, request: web.Request) -> tuple[Encoder, LiveAnswer, tuple[Message, ...]]:
    """How a request is answered, the answer, and the messages to keep with it, if any."""
    state, accounts = request.app[STATE], find_accounts(request)
    settings, owners = state.gateway.settings, _find_owners(request, accounts)
    chat, prompt, owner = await parse_body(request, partial(_parse_question, api, state, owners))
    accounts = [account for account in accounts if owner in (b"", account.digest)]
    request[OUTCOME].told["model"] = quote_name(chat.model)
    if chat.left_out:
        logger.info("tools that are not known here are left out: %s", ", ".join(map(quote_name, chat.left_out)))
    created, response_id = int(time.time()), f"resp_{secrets.token_hex(24)}"
    bare = replace(chat, messages=())  # their files are large
    encoder = api.make_encoder(bare, created=created, sources=settings.sources, prompt=prompt, response_id=response_id)
    start_chain = partial(make_chain, bare, lambda: f"{api.call_prefix}_{secrets.token_hex(12)}")
    # Where nobody says, the web is searched for people alone, not with files or for programs.
    is_plain = chat.is_plain and not chat.attachments
    use_search = settings.use_search and is_plain if chat.use_search is None else chat.use_search
    if chat.use_search is None and settings.use_search and (chat.tools or chat.left_out) and not state.told_of_search:
        state.told_of_search = True
        logger.info("no web search: the request has tools; a model such as kimi-search searches all the same")
    question = Question(
        prompt,
        use_search,
        chat.model,
        effort=chat.effort,
        has_tools=bool(chat.tools),
        preface=render_tools(chat) if settings.system_prompt else "",
        conversation_id=chat.conversation_id if chat.continues else "",
        keeps=bool(chat.conversation_id),
        key=request[OUTCOME].key,
    )
    for one in chat.attachments:
        file = state.uploaded.find(owners, one.file_id)
        if one.file_id and file is None:
            raise ProxyError("file_not_found", param=one.path)
        question.attachments.append(one if file is None else replace(one, uploaded=file.reference))
    answer = state.gateway.answer(accounts, question, start_chain)
    return encoder, answer, chat.messages if chat.store else ()


async def _answer(api: Api, request: web.Request) -> web.StreamResponse:
    """Ask, and send the answer to the client, whatever becomes of it. Failures before the head are raised."""
    state, outcome, started = request.app[STATE], request[OUTCOME], time.monotonic()
    encoder, answer, messages = await _read_question(api, request)
    writer = ResponseWriter(request, encoder)
    state.answers_running += 1
    try:
        async with answer:
            seconds = outcome.told["first_text_seconds"] = round(time.monotonic() - started, 3)
            state.gateway.metrics.observe("kimi_proxy_first_text_seconds", seconds)
            messages = keep_messages(messages, answer.references) if messages else ()  # without inline files
            outcome.body_bytes = 0
            while (events := await answer.read()) is not None:
                if data := encoder.feed(events):
                    await writer.write(data)
        outcome.told["upstream_status"] = 200
        if messages and encoder.response is not None:
            said = (*messages, answer_message(encoder.response))
            kept = KeptResponse(answer.owner, encoder.response, said)
            size_bytes = max(kept.size_bytes, MAX_KEPT_BYTES // MAX_KEPT_RESPONSES)
            state.responses.keep((answer.owner, outcome.key), encoder.response["id"], kept, size_bytes)
        return await writer.write(encoder.finish(), is_last=True)
    except BaseException as failure:
        if writer.response is None or (error := _note_failure(request, failure)) is None:
            raise
        return await writer.write(encoder.fail(error), is_last=True)
    finally:
        writer.close()
        state.answers_running -= 1
        outcome.told |= {"account": answer.owner.hex()[:8], "wait_seconds": round(answer.wait_seconds, 3)}
        outcome.told |= {"chunks": encoder.chunks, "degraded": answer.degraded}
        state.gateway.metrics.count("kimi_proxy_chunks_total", encoder.chunks)


def _note_failure(request: web.Request, failure: BaseException) -> ProxyError | None:
    """What the client is told of a failure, which is counted and noted; None where nobody can be told."""
    state, outcome = request.app[STATE], request[OUTCOME]
    if isinstance(failure, ProxyError):
        error = failure
    elif isinstance(failure, web.HTTPNotFound | web.HTTPMethodNotAllowed):
        code = "not_found" if failure.status == 404 else "method_not_allowed"
        error = ProxyError(code, f"there are {', '.join(ROUTES)}")
    elif isinstance(failure, asyncio.CancelledError) and state.draining and request.transport is not None:
        error = ProxyError("shutting_down")  # cancelled by us; else the client is gone
    elif not isinstance(failure, Exception):
        return None
    else:
        logger.error("! the proxy itself failed", exc_info=failure)
        error = ProxyError("internal_error")
    failure.__traceback__ = None  # it goes in circles: all that its frames hold would wait for the garbage collector
    outcome.told |= {"status": error.status, "upstream_status": error.upstream_status or "", "code": error.code}
    if error.status >= 500 or error.status in (401, 429):
        outcome.level = logging.ERROR if error.status >= 500 else logging.WARNING
        outcome.told["reason"] = error.message
    state.gateway.metrics.count("kimi_proxy_failures_total", code=error.code)
    if error.code == "token_dead":
        state.access.reload_tokens()
    return _translate(request, error)


def _translate(request: web.Request, error: ProxyError) -> ProxyError:
    """The error in the language that the client or the settings ask for."""
    wanted = request.headers.get("Accept-Language", ""), request.app[STATE].gateway.settings.language
    return error.in_chinese() if any(one.strip().lower().startswith("zh") for one in wanted) else error


async def _count_tokens(request: web.Request) -> web.StreamResponse:
    find_accounts(request)
    prompt = await parse_body(request, lambda body: render_prompt(parse_messages_request(body)))
    return json_response({"input_tokens": estimate_tokens(prompt)})


async def _kept(request: web.Request) -> web.StreamResponse:
    """GET and DELETE of a kept answer, or of an uploaded file, whose content is at Kimi."""
    state, kept_id, route = request.app[STATE], request.match_info["id"], _name_route(request)
    is_file = route.startswith("/v1/files")
    table, owners = state.uploaded if is_file else state.responses, _find_owners(request, find_accounts(request))
    if (kept := table.find(owners, kept_id)) is None:
        raise ProxyError("file_not_found" if is_file else "response_not_found")
    if route.endswith("/content"):
        raise ProxyError("invalid_request", "the content of a file: Kimi gives none back, and the proxy keeps none")
    if request.method == "DELETE":
        table.forget(owners, kept_id)
        return json_response({"id": kept_id, "object": kept.shown["object"], "deleted": True})
    return json_response(kept.shown)


_MODEL_FORM: Final = {
    **{"object": "model", "created": 1_704_067_200, "owned_by": "kimi"},
    **{"type": "model", "created_at": "2024-01-01T00:00:00Z"},
}


async def _models(request: web.Request) -> web.StreamResponse:
    """The list of models, each also with search, or one of them; in OpenAI's and Anthropic's forms at once."""
    state, wanted = request.app[STATE], request.match_info.get("id")
    accounts, gateway = find_accounts(request, is_needed=False), state.gateway
    found = await gateway.ask_in_turn(accounts, gateway.models) if accounts else await gateway.models(None)
    models = {
        name: {"id": name, "display_name": name, **_MODEL_FORM, **model.describe()}
        for model in found
        for name in (model.id, f"{model.id}-search")
    }
    if wanted is None:
        ends = {"has_more": False, "first_id": next(iter(models)), "last_id": next(reversed(models))}
        return json_response({"object": "list", "data": list(models.values()), **ends})
    if wanted not in models:
        raise ProxyError("model_not_found", quote_words(wanted)[:60], param="model")
    return json_response(models[wanted])


class _FormReader:
    """The bytes of a form, of which aiohttp reads what stands before and between the fields line by line."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._lines_left = MAX_FORM_LINES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def readline(self, **limits: int) -> bytes:
        """The next line. Raises `ValueError` after too many."""
        self._lines_left -= 1
        if self._lines_left < 0:
            raise ValueError("too many lines")
        return await self._content.readline(**limits)


async def _create_file(request: web.Request) -> web.StreamResponse:
    """OpenAI's "Upload file": a form with `file` and `purpose`; `request.post()` would hold a field of any size."""
    state, accounts = request.app[STATE], find_accounts(request)
    if request.content_type != "multipart/form-data":
        raise ProxyError("invalid_request", "the body must be a form (multipart/form-data) with the field `file`")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ProxyError("encoding_unknown", "a form must not be compressed")
    state.files.check_size((request.content_length or 0) - MEGABYTE)  # the form around it takes less
    name, content_type, purpose = None, "", "assistants"
    with state.files.make_spool() as spool:
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                async for part in aiohttp.MultipartReader(request.headers, cast(Any, _FormReader(request.content))):
                    if not isinstance(part, aiohttp.BodyPartReader):
                        raise ValueError("a form within a form")
                    state.files.check_size(request.content.total_bytes - MEGABYTE)
                    if part.name == "file" and name is None:
                        name, content_type = part.filename or "", part.headers.get("Content-Type", "")
                        while piece := await part.read_chunk(65_536):
                            await state.files.write_spool(spool, piece)
                    elif part.name == "purpose":
                        purpose = (await part.read_chunk()).decode("utf-8", "replace")[:64]
        except TimeoutError:
            raise ProxyError("body_timeout", f"not within {TRANSFER_SECONDS:g} s") from None
        except (ValueError, AssertionError, RuntimeError, *BODY_ERRORS):  # RuntimeError: of some charsets
            raise ProxyError("body_broken", "the form cannot be read") from None
        if not spool.tell():
            raise ProxyError("invalid_request", "file: is missing" if name is None else "file: is empty", param="file")
        file = await state.gateway.upload(accounts, ReceivedFile(name or "", content_type, purpose, spool))
    state.uploaded.keep((file.reference[0], request[OUTCOME].key), file.shown["id"], file)
    return json_response(file.shown)


async def _list_files(request: web.Request) -> web.StreamResponse:
    owners = _find_owners(request, find_accounts(request))
    data = [file.shown for file in request.app[STATE].uploaded.find_all(owners)]
    return json_response({"object": "list", "data": data, "has_more": False})


async def _token_check(request: web.Request) -> web.StreamResponse:
    """The reference's `POST /token/check`: whether Kimi takes a refresh token [ref]."""
    accounts = request.app[STATE].gateway.accounts
    try:
        token = cast(Any, await parse_body(request, parse_json))["token"]
        if not TOKEN_SHAPE.fullmatch(token) or is_access_token(read_claims(token)):
            raise ProxyError("invalid_request", "token: must be a refresh token", param="token")
    except (WireError, LookupError, TypeError):
        raise ProxyError("invalid_json", 'it must be {"token": "…"}') from None
    account = accounts.get(token)
    try:
        await accounts.access_token(account)
    except ProxyError as error:
        if error.status != 401:
            raise
    return json_response({"live": account.state == "live"})


async def _health(request: web.Request) -> web.StreamResponse:
    """Whether it lives, and whether it should be sent requests: not while it shuts down.

    With `?accounts` also what the page at `/` shows: each account is asked, and where no held one lives, it is a 503.
    """
    state = request.app[STATE]
    health: dict[str, Any] = {"live": True, "ready": not state.draining}
    fails = state.draining
    if "accounts" in request.query:
        accounts = [await _describe_account(request, one) for one in find_accounts(request, is_needed=False)]
        holds, uptime = bool(state.access.tokens), int(time.time() - state.started)
        fails = fails or (holds and not any(one["live"] for one in accounts))
        health |= {"version": __version__, "uptime_seconds": uptime, "answers_running": state.answers_running}
        health |= {"holds_account": holds, "accounts": accounts}
    return json_response(health, 503 if fails else 200, FAILURES["shutting_down"].retry_after_seconds * fails)


async def _describe_account(request: web.Request, account: Account) -> dict[str, Any]:
    """Whether an account lives, until when or why not, and where and by which protocol it is asked."""
    gateway, failure = request.app[STATE].gateway, dict[str, Any]()
    try:
        await gateway.accounts.access_token(account)
    except ProxyError as error:
        failure = {"code": error.code, "message": _translate(request, error).message}
    protocol, until = gateway.protocol_of(account), lives_until(account)
    place = {"service": URL(protocol.base_url_for(account)).host, "protocol": protocol.name}
    return {"account": account.label, **place, "live": not failure, "until": until or None, **failure}


async def _metrics(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    gauges = {
        f'kimi_proxy_build_info{{version="{__version__}",python="{platform.python_version()}"}}': 1,
        "process_start_time_seconds": state.started,
        "kimi_proxy_requests_running": len(state.running),
        "kimi_proxy_requests_waiting": sum(one.slots.waiting for one in state.gateway.accounts.known.values()),
        "kimi_proxy_answers_running": state.answers_running,
        "kimi_proxy_accounts": len(state.gateway.accounts.known),
        "kimi_proxy_orphans": sum(map(len, state.gateway.conversations.orphans.values())),
    }
    for account in filter(lambda one: one.state, state.held_accounts()):
        gauges[f'kimi_proxy_account_live{{account="{account.label}"}}'] = float(account.state == "live")
    with suppress(OSError), open("/proc/self/statm", "rb") as file:  # noqa: ASYNC230  # no disk; Linux alone has it
        gauges["process_resident_memory_bytes"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    body = state.gateway.metrics.render(gauges).encode()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _ping(request: web.Request) -> web.StreamResponse:
    return web.Response(text="pong")


async def _page(request: web.Request) -> web.StreamResponse:
    return web.Response(body=_START_PAGE.encode(), headers=_START_PAGE_HEADERS)


def json_response(value: object, status: int = 200, retry_after_seconds: float = 0) -> web.Response:
    """A response with `value` as JSON."""
    headers = {"Retry-After": str(retry_after_seconds)} if retry_after_seconds else {}
    return web.json_response(value, status=status, headers=headers, dumps=encode_json)


@web.middleware
async def request_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Around every request: its id, who may call, and how many, failures in the client's form, and its log line."""
    state, started, response = request.app[STATE], time.monotonic(), None
    task = cast(asyncio.Task[Any], asyncio.current_task())
    given = request.headers.get("X-Request-Id", "")
    request_id.set(given if re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", given) else secrets.token_hex(6))
    state.running[task] = request[OUTCOME] = Outcome()
    try:
        is_preflight = _check_access(request)
        limit = state.gateway.settings.max_requests
        if len(state.running) > limit and request.path not in (*OPEN_PATHS, "/metrics"):
            raise ProxyError("too_busy", f"{limit} requests run; see PROXY_MAX_REQUESTS")
        response = web.Response(status=204) if is_preflight else await handler(request)
    except BaseException as failure:
        if (error := _note_failure(request, failure)) is None:
            raise
        response = _render_failure(request, failure, error)
    finally:
        del state.running[task]
        _log_request(request, CLIENT_CLOSED if response is None else response.status, time.monotonic() - started)
    return response


def _render_failure(request: web.Request, failure: BaseException, error: ProxyError) -> web.StreamResponse:
    is_anthropic = "/messages" in request.path or "anthropic-version" in request.headers
    body = render_messages_error(error) if is_anthropic else render_error(error)
    response = json_response(body, error.status, error.retry_after_seconds)
    if isinstance(failure, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = failure.headers["Allow"]
    if error.status == 401 or (error.status == 429 and error.retry_after_seconds > 60):
        response.headers["x-should-retry"] = "false"  # Anthropic's and OpenAI's SDKs read it
    if not request.content.is_eof():  # what is left of the body is not worth reading
        response.force_close()
    return response


def _name_route(request: web.Request) -> str:
    """The path of a request as the table of routes has it."""
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "other"
    return path.replace("{v1}", "v1/").replace("{top}", "").replace("{end}", "")


def _log_request(request: web.Request, status: int, seconds: float) -> None:
    metrics, outcome, route = request.app[STATE].gateway.metrics, request[OUTCOME], _name_route(request)
    told = {"status": status, "seconds": round(seconds, 3), "client": request.remote or "", "key": outcome.key}
    told |= outcome.told  # the status of a stream that failed is its failure's
    metrics.count("kimi_proxy_requests_total", route=route, status=str(told["status"]))
    # A balancer looks at the health all the time.
    level = logging.DEBUG if (route, status) == ("/health", 200) else outcome.level
    path = route if request.path == route else quote_name(request.path)
    fields = {name: value for name, value in told.items() if value != ""}
    logger.log(level, "%s %s", request.method, path, extra={"fields": fields})


def _check_access(request: web.Request) -> bool:
    """Whether this is a browser's preflight. Raises `ProxyError` for a web page, or a client, that may not call."""
    access, headers = request.app[STATE].access, request.headers
    is_open = request.path in OPEN_PATHS and "accounts" not in request.query
    hosts, origin = headers.getall("Host", [""]), headers.get("Origin")
    if "://" in request.raw_path.partition("?")[0]:  # an absolute-form target (RFC 9112, section 3.2.2) has a name too
        hosts.append(request.raw_path.partition("://")[2].partition("/")[0])
    if origin is None and headers.get("Sec-Fetch-Site") == "cross-site" and not is_open:
        origin = "null"  # of a page that shows ours as an image or the like
    for host in hosts:
        access.check_page(host, origin)
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in headers
    if access.keys and not is_open and not is_preflight:
        request[OUTCOME].key = access.check_key(read_credential(request))
    return is_preflight


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every response: the request's id, the CORS answer (Fetch standard, "CORS protocol")."""
    state, origin, headers = request.app[STATE], request.headers.get("Origin"), response.headers
    headers["X-Request-Id"] = request_id.get()
    headers["Server"] = "kimi_proxy"
    if state.closing:
        headers["Connection"] = "close"
        response.force_close()
    if origin is None or not state.access.allows_origin(origin):
        return
    headers["Access-Control-Allow-Origin"] = "*" if state.access.allows_all_origins else origin
    headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
    headers["Vary"] = "Origin"
    if request.method == "OPTIONS":
        headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "Authorization")
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        headers["Access-Control-Max-Age"] = "86400"
        if "Access-Control-Request-Private-Network" in request.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"


ROUTES: Final[Mapping[str, Handler]] = {
    **{f"POST {path}": partial(_answer, api) for path, api in APIS.items()},
    "POST /v1/messages/count_tokens": _count_tokens,
    "GET /v1/responses/{id}": _kept,
    "DELETE /v1/responses/{id}": _kept,
    "GET /v1/models": _models,
    "GET /v1/models/{id}": _models,
    "POST /v1/files": _create_file,
    "GET /v1/files": _list_files,
    "GET /v1/files/{id}": _kept,
    "DELETE /v1/files/{id}": _kept,
    "GET /v1/files/{id}/content": _kept,
    "POST /token/check": _token_check,
    "GET /ping": _ping,
    "GET /health": _health,
    "GET /metrics": _metrics,
    "GET /": _page,
}


@asynccontextmanager
async def own_state(settings: Settings, access: Access, app: web.Application) -> AsyncIterator[None]:
    """Open what the application owns, and close it in reverse: removals first, the connections last."""
    tasks, metrics, url = BackgroundTasks(), Metrics(), settings.proxy_url
    state_files = StateFiles(find_state_dir(settings.state_dir, os.environ), metrics, settings.base_url)
    files, conversations = Files(settings, metrics), OpenConversations(state_files)
    accounts = Accounts(lambda account: gateway.refresh(account), tasks, state_files)  # noqa: PLW0108  # made below
    async with open_service_session(url) as session, open_service_session(url, reuse=False) as transfers:
        parts = session, transfers, accounts, metrics, settings
        classic, connect = Classic(*parts), Connect(*parts)
        first = connect if settings.protocol == "connect" else classic
        gateway = Gateway(
            settings, metrics, tasks, accounts, Uploads(files, settings), conversations, classic, connect, first
        )
        if count := await asyncio.to_thread(conversations.recover):
            logger.info("%d conversations were left open by a process that ended", count)
            for token in access.tokens:
                accounts.get(token)  # so that it is found by its digest
            tasks.start(gateway.remove_orphans(list(conversations.orphans)), "remove")
        app[STATE] = State(gateway, files, access)
        try:
            yield
        finally:
            if late := await tasks.drain(REMOVAL_SECONDS):
                logger.warning("! %d background tasks did not end in %g s", late, REMOVAL_SECONDS)
            await accounts.save()
            app[STATE].parsers.shutdown(wait=False)
            conversations.close()
            await files.close()


def describe_start(state: State) -> None:
    """Log what the proxy works with, and soon how each held account is."""
    gateway, accounts = state.gateway, state.held_accounts()
    files = gateway.accounts.state
    place = files.directory.absolute() if files.is_kept else "memory alone"
    words = "protocol %s, held accounts: %d, API keys: %d, state in %s"
    logger.info(words, gateway.settings.protocol, len(accounts), len(state.access.keys), place)
    for account in accounts:
        gateway.tasks.start(gateway.accounts.access_token(account), "check")


async def end_requests(runner: web.AppRunner) -> None:
    """Accept no connection, and let what runs finish within the drain's time; what does not gets `shutting_down`.

    An end that was announced (`draining`) lets open connections send one more request within the grace, too. To be
    called before aiohttp closes, which drops what comes of a request's body.
    """
    state, deadline = runner.app[STATE], loop_time() + GRACE_SECONDS
    for site in runner.sites:
        await site.stop()
    is_announced, state.draining, state.closing = state.draining, True, True
    while is_announced and loop_time() < deadline:
        await asyncio.sleep(0.05)  # at first, too: it takes a moment until a connection is counted
        if runner.server is None or len(runner.server.connections) <= len(state.running):
            break
    await drain(state.running, state.gateway.settings.drain_seconds)


def _any_spelling(path: str) -> str:
    """The pattern of `path` in any spelling of the base URL: with `/v1` or without, twice, with slashes too many."""
    name, rest = ("v1", path[4:]) if path.startswith("/v1/") else ("top", path[1:])
    return f"/{{{name}:(?:v1/|/)*}}{rest}{{end:/*}}" if rest else "/{top:(?:v1/|/)*(?:v1)?}"


def make_app(settings: Settings, hosts: Sequence[str] = ()) -> web.Application:
    """The application; `hosts` as `Access` takes them. Raises `SettingsError` for secrets of no use."""
    app = web.Application(middlewares=[request_middleware])
    app.cleanup_ctx.append(partial(own_state, settings, Access(settings, os.environ, hosts)))
    app.on_response_prepare.append(_add_headers)
    make = {"GET": web.get, "POST": web.post, "DELETE": web.delete}
    for route, handler in ROUTES.items():
        method, path = route.split()
        app.add_routes([make[method](_any_spelling(path), handler)])
    return app


# ==== 19. Service ===========================================================
#
# The program around the application: listening, signals, systemd's protocol, and the command line with its terminal
# client `ask`, its self-test `check`, and `setup`.

IDLE_SECONDS: Final = 75.0  # limit for a request's head to arrive, and of an idle connection


@asynccontextmanager
async def run_server(
    settings: Settings, sockets: Sequence[socket.socket] = ()
) -> AsyncIterator[tuple[str, web.AppRunner]]:
    """A running proxy, on `sockets` or where the settings say: its (first) `http://host:port`, and what runs it."""
    runner = web.AppRunner(
        make_app(settings, [str(one.getsockname()[0]) for one in sockets]),
        handler_cancellation=True,
        auto_decompress=False,  # a small body may become a large one
        keepalive_timeout=IDLE_SECONDS,  # a request's head must arrive within it, too
        lingering_time=1,
        access_log=None,
        shutdown_timeout=1,
    )
    await runner.setup()
    try:
        sites: list[web.BaseSite] = [web.SockSite(runner, one) for one in sockets]
        try:
            for site in sites or [web.TCPSite(runner, settings.host, settings.port)]:
                await site.start()
        except (OSError, OverflowError) as error:
            is_taken = getattr(error, "errno", 0) == errno.EADDRINUSE
            reason = getattr(error, "strerror", None) or str(error)
            reason = "address already in use; choose another with --port" if is_taken else quote_words(reason)
            raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from None
        name, port = runner.addresses[0][:2]
        host = name if sockets else settings.host
        describe_start(runner.app[STATE])
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}", runner
        await end_requests(runner)
    finally:
        await runner.cleanup()


def notify(message: str) -> None:
    """Tell systemd, where it listens (sd_notify(3)); a full queue drops it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), address if address.startswith("/") else f"\0{address[1:]}")


def _trim_memory() -> None:
    """Give back to the system what is free within the heap."""
    with suppress(OSError, AttributeError, TypeError):  # glibc's; elsewhere there is no such function, or library
        ctypes.CDLL(None).malloc_trim(0)


async def _beat(state: State) -> None:
    """Tell systemd regularly that the loop runs, and what runs in it, until cancelled; when idle, trim memory."""
    is_ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    microseconds = int(os.environ.get("WATCHDOG_USEC", "0")) if is_ours else 0
    while True:
        accounts = len(state.gateway.accounts.known)
        status = f"{state.answers_running} answers, {len(state.running)} requests, {accounts} accounts"
        notify(f"WATCHDOG=1\nSTATUS={status}")
        if not state.running:
            _trim_memory()
        await asyncio.sleep(min(microseconds / 2e6 or 10.0, 10.0))


def _take_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd handed over (sd_listen_fds(3)); empty where it did not."""
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        return []
    return [socket.socket(fileno=number) for number in range(3, 3 + int(count))]


def _listen_for_signals() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def take(number: int, _: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, take)  # the loop's own method is missing on Windows
    return stop


def _tell_address(address: str) -> str:
    """The base URL at `address`; where that stands for all of this machine, one to use here and one for elsewhere."""
    is_six = "//[::]:" in address
    here = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    with suppress(OSError), socket.socket(socket.AF_INET6 if is_six else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("2001:db8::1" if is_six else "192.0.2.1", 9))  # sends nothing, but chooses an address
        own = probe.getsockname()[0]
        there = address.replace("[::]", f"[{own}]").replace("0.0.0.0", own)
        return f"{here}/v1" + f", elsewhere {there}/v1" * (here != address)
    return f"{here}/v1"


async def _serve(settings: Settings) -> None:
    """Serve until a signal asks to stop; then tell balancers, and leave in good order."""
    stop = _listen_for_signals()
    async with run_server(settings, _take_sockets(os.environ)) as (address, runner):
        _trim_memory()  # of what imports took and freed: a sixth of all memory as the service
        print(f"kimi_proxy {__version__} is ready. Base URL for your program: {_tell_address(address)}", flush=True)
        notify("READY=1")
        beating = asyncio.create_task(_beat(runner.app[STATE]))
        await stop.wait()
        running, seconds = runner.app[STATE].answers_running, settings.drain_delay_seconds + settings.drain_seconds
        waiting = f": waiting for {running} answer{'s' * (running > 1)}, at most {seconds:g} s; Ctrl-C again stops now"
        logger.info("shutting down%s", waiting if running else "")
        seconds += REMOVAL_SECONDS + 10
        notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")
        runner.app[STATE].draining = True
        await asyncio.sleep(settings.drain_delay_seconds)
    beating.cancel()


def _serve_command(settings: Settings, _: argparse.Namespace) -> int:
    configure_logging(settings.log_level, settings.log_format)
    if unknown := unknown_variables(os.environ):
        logger.warning("! ignored, as there are no such settings: %s", ", ".join(unknown))
    asyncio.run(_serve(settings))
    return 0


class CommandError(Exception):
    """A command failed; the text is one line for whoever started it."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


async def _identify(settings: Settings, token: str) -> tuple[str, str]:
    """Whose a refresh token is, in words, and the newest token of that account. Raises `ProxyError`."""
    app = web.Application()
    async with own_state(replace(settings, state_dir=""), Access(Settings(), {}), app):
        accounts = app[STATE].gateway.accounts
        account = accounts.get(token)
        user = read_claims(await accounts.access_token(account)).get("sub")
        newest = account.tokens.refresh_token or token  # its label is what the log will say
        words = f"account {accounts.get(newest).label} of {accounts.place_of(account)}" + f", user {user}" * bool(user)
        return f"{words}, works until {until}" if (until := lives_until(account)) else words, newest


def _join_tokens(text: str, pasted: str, newest: str) -> list[str]:
    """The held tokens in `text` with `newest` in place of its user's; else of an only one, or as one more."""
    held = list[str]()
    with suppress(SettingsError):  # no start would take them
        held += read_secrets("KIMI_REFRESH_TOKEN", text, "", {})
    users = {token: read_claims(token).get("sub") for token in [newest, *held]}
    user = users[newest]
    if len(held) == 1 and not (user and users[held[0]]):
        held = []
    return [*(one for one in held if one not in (pasted, newest) and not (user and users[one] == user)), newest]


def _setup_command(settings: Settings, options: argparse.Namespace) -> int:
    """Ask for a refresh token, check it at Kimi, and write it where the next start finds it."""
    ask = partial(getpass.getpass, "Refresh token (it is not shown): ")
    try:
        pasted = read_pasted_token(ask() if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace"))
        if is_access_token(read_claims(pasted)):
            raise ProxyError("token_malformed", "this is an access token")
        words, token = asyncio.run(_identify(settings, pasted))
    except ProxyError as error:
        raise CommandError(error.message) from None
    for name, advice in ("KIMI_REFRESH_TOKEN", "unset it"), ("KIMI_REFRESH_TOKEN_FILE", "the next start needs it, too"):
        if name in os.environ and name not in options.from_file:
            print(f"{name} is set in the environment, which wins over a file: {advice}.", file=sys.stderr)
    file_name = settings.refresh_token_file
    path = find_secrets(file_name, os.environ) if file_name else Path(options.env_file or ".env")
    old = read_text(path) if path.exists() else ""
    lines = tokens = _join_tokens(old if file_name else parse_env(old).get("KIMI_REFRESH_TOKEN", ""), pasted, token)
    if not file_name:
        lines = [line for line in old.splitlines() if not re.match(r"\s*(export\s+)?KIMI_REFRESH_TOKEN\b", line)]
        lines.append(f"KIMI_REFRESH_TOKEN={','.join(tokens)}")
    try:
        replace_file(path, "\n".join([*lines, ""]).encode())
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror})") from None
    key = "one of PROXY_API_KEYS" if settings.api_keys or settings.api_keys_file else "any text"
    url = _tell_address(str(URL.build(scheme="http", host=settings.host or "127.0.0.1", port=settings.port)))
    print(f"Kimi takes this token: {words}. It is in {path.absolute()}, which you alone can read.")
    print(f"Accounts held there now: {len(tokens)}.")
    print(f"Start the proxy again, and set in your program: base URL {url}, API key: {key}, model: kimi.")
    return 0


def _read_held_token(settings: Settings) -> str:
    """The first held refresh token; empty without one. Raises `SettingsError`."""
    tokens = read_secrets("KIMI_REFRESH_TOKEN", settings.refresh_token, settings.refresh_token_file, os.environ)
    return tokens[0] if tokens else ""


def _ask_command(settings: Settings, options: argparse.Namespace) -> int:
    """Ask a running proxy, and print the answer as it comes; without a question go on asking until Ctrl-D."""
    question = " ".join(options.question)
    if not sys.stdin.isatty():
        try:
            question = f"{question}\n{sys.stdin.buffer.read().decode('utf-8-sig')}".strip()
        except UnicodeDecodeError:
            raise SettingsError("standard input is not text in UTF-8; give documents and pictures by --file") from None
        if not question:
            raise SettingsError("ask a question")
    keys = read_secrets("PROXY_API_KEYS", settings.api_keys, settings.api_keys_file, os.environ)
    own_key = keys[0].partition(":")[2] or keys[0] if keys else _read_held_token(settings)
    token = os.environ.get("PROXY_API_KEY", "") or own_key
    address = options.url or f"127.0.0.1:{settings.port}"
    address = address if "://" in address else f"http://{address}"
    url = address.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    try:
        parts = [*map(_render_part, options.file)]
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from None
    # silent: the sources are listed here
    body = {"model": f"{options.model}-silent", "stream": True, "use_search": options.search}
    messages: list[dict[str, Any]] = []
    for asked in [question] if question else _type_questions():
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": asked}]}
        try:
            answer = asyncio.run(_print_answer(url, token, body | {"messages": [*messages, turn]}))
        except CommandError as error:
            if question:
                raise
            print(f"kimi_proxy: {error}", file=sys.stderr)
        else:
            messages += turn, {"role": "assistant", "content": answer}
            parts = []
    return 0


def _type_questions() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D."""
    with suppress(ImportError):  # on Windows
        import readline  # noqa: F401, PLC0415  # makes lines editable

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if line := input("> ").strip():
                yield line
    print()


def _render_part(path: str) -> dict[str, Any]:
    """The part of a message that has the file at a path or URL. Raises `OSError` where it cannot be read."""
    is_url = "://" in path
    name, content_type = name_file([URL(path).name if is_url else path], "", "file")
    url = path if is_url else f"data:{content_type};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    if content_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    if is_url:
        return {"type": "file", "file_url": {"url": url}}
    return {"type": "file", "file": {"filename": name, "file_data": url}}


async def _print_answer(url: str, token: str, body: dict[str, Any]) -> str:
    """Print the streamed answer; its text. Raises `CommandError`. Code that is not ours reads the stream: a check."""
    from aiohttp_sse_client.client import EventSource  # noqa: PLC0415  # serving does not need it

    logging.getLogger("aiohttp_sse_client").setLevel(logging.CRITICAL)

    async def refuse(response: aiohttp.ClientResponse) -> None:
        if response.status != 200 or response.content_type != "text/event-stream":
            try:
                message = json.loads(await response.read())["error"]["message"]
            except (ValueError, KeyError, TypeError):
                raise CommandError("the address answers, but not as kimi_proxy does") from None
            hint = "" if token else " In the terminal, set PROXY_API_KEY or KIMI_REFRESH_TOKEN."
            raise CommandError(f"{message}{hint}")

    screen = _Screen()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request: dict[str, Any] = {"headers": headers, "data": _send_body(encode_json(body).encode(), screen)}
    try:
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10), raise_for_status=refuse
            ) as session,
            EventSource(url, option={"method": "POST"}, session=session, max_connect_retry=0, **request) as source,
        ):
            return await _print_events(source, screen)
    except asyncio.CancelledError:
        raise CommandError("stopped, at Kimi too", 130) from None
    except aiohttp.ClientError as error:
        raise CommandError(f"cannot reach {url} ({type(error).__name__}); is the proxy running?") from None
    finally:
        screen.close()


async def _send_body(body: bytes, screen: _Screen) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65_536):
        screen.waiting_for = f"sending, {100 * start // len(body)} %"
        yield body[start : start + 65_536]
    screen.waiting_for = "waiting for Kimi"


async def _print_events(source: AsyncIterator[Any], screen: _Screen) -> str:
    """Print until `[DONE]` or an error, as reading on would make the reader ask again; the answer's text."""
    answer, annotations = "", list[dict[str, Any]]()
    async for event in source:
        if event.data == "[DONE]":
            screen.show(_list_sources(answer, annotations))
            return answer
        value = json.loads(event.data)
        if "error" in value:
            raise CommandError(value["error"]["message"])
        for choice in value["choices"]:
            if thinking := choice["delta"].get("reasoning_content"):
                screen.show(thinking, dimmed=True)
            if text := choice["delta"].get("content"):
                screen.show(text)
                answer += text
            annotations += choice["delta"].get("annotations", [])
    raise CommandError("the stream ended without [DONE]")


def _list_sources(text: str, annotations: Sequence[Mapping[str, Any]]) -> str:
    """The sources of `text` as a list, numbered as the marks like [2] there; empty without any."""
    titles = {one["url_citation"]["url"]: one["url_citation"]["title"] for one in annotations}
    heading = "来源：" if re.search("[\u4e00-\u9fff]", text) else "Sources:"
    lines = [f"{number}. {title} {url}" for number, (url, title) in enumerate(titles.items(), 1)]
    return "\n".join(["\n", heading, *lines]) if lines else ""


class _Screen:
    """Where `ask` prints: in a terminal a moving mark until text comes, and dimmed thinking; else plain text."""

    def __init__(self) -> None:
        self.waiting_for = ""
        self._terminal = sys.stdout.isatty()
        self._thinking = self._begun = False
        self._waiting = asyncio.create_task(self._show_waiting()) if self._terminal else None

    def show(self, text: str, *, dimmed: bool = False) -> None:
        """Print a piece of the answer."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
            print("\r\x1b[K", end="")
        if text and self._thinking and not dimmed:
            print("\n")
        self._thinking, self._begun = dimmed, self._begun or bool(text)
        if self._terminal:  # where the web's text may not move about
            text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
            text = f"\x1b[2m{text}\x1b[0m" if dimmed else text
        print(text, end="", flush=True)

    def close(self) -> None:
        """End the last line, if there is one."""
        self._thinking = False
        self.show("\n" * self._begun)

    async def _show_waiting(self) -> None:
        for mark in cycle("|/-\\"):
            print(f"\r\x1b[K{mark} {self.waiting_for}", end="", flush=True)
            await asyncio.sleep(0.1)


def _check_command(settings: Settings, options: argparse.Namespace) -> int:
    """Walk every step of Kimi once, in the protocols that the settings admit; 0 where a program in front would work."""
    if not (token := _read_held_token(settings)):
        raise SettingsError("set KIMI_REFRESH_TOKEN, or run `kimi_proxy.py setup`")
    if options.record and not Path(options.record).parent.is_dir():
        raise SettingsError(f"--record: there is no directory {Path(options.record).parent}")
    configure_logging("warning")
    good, seen = list[str](), list[str]()
    for name in ("classic", "connect") if settings.protocol == "auto" else (settings.protocol,):
        check = _Check(name)
        if asyncio.run(check.run(settings, token)):
            good.append(name)
        for step, pieces in check.recorded.items() if options.record else ():
            path = f"{options.record}-{step.replace(' ', '-')}.{'sse' if name == 'classic' else 'connect'}"
            Path(path).write_bytes(anonymize_stream(b"".join(pieces), name))
            print(f"recorded: {path}")
        seen += check.seen
    print(f"A program in front would work: {'yes, with ' + ' and '.join(good) if good else 'no'}.")
    versions = f"kimi_proxy {__version__}, Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
    print(f"For a bug report: {versions}; {'; '.join(seen)}.")
    return 0 if good else 1


_PREFACE: Final = "system:Begin each answer with the word OKAPI.\n"
_QUESTIONS: Final = {
    "answer": Question("user:Say OK.\n", use_search=False),
    "search": Question("user:Who makes Kimi?\n", use_search=True),
    "stop": Question("user:Count to 100.\n", use_search=False),
    "system prompt": Question(_PREFACE + "user:Say OK.\n", use_search=False, preface=_PREFACE),
}
_SMALL_FILE: Final = Attachment("file", "check", data="T0suCg==", name="check.txt", content_type="text/plain")
_CITATION_FORMS: Final = (("<REF>", b"tools://"), ("U+E3A0", "\ue3a0".encode()), ("[^n^]", b"[^"))


class _Check:
    """One protocol, step by step: what was `seen`, and the bytes of its answers as `recorded`, by step."""

    def __init__(self, name: str) -> None:
        self.recorded: dict[str, list[bytes]] = {}
        self.seen = [name]
        self._name = name

    async def run(self, settings: Settings, token: str) -> bool:
        """Walk the steps until one fails that a chat needs; whether none did."""
        # With the state directory, so that a token that a running proxy rotated is used, not rotated away.
        app = web.Application()
        async with own_state(replace(settings, protocol=self._name), Access(Settings(), {}), app):
            gateway = app[STATE].gateway
            protocol, account, model = gateway.current, gateway.accounts.get(token), KIMI
            try:
                await self._step("token", gateway.accounts.access_token(account))
                self.seen.append(f"at {URL(protocol.base_url_for(account)).host}")
                if isinstance(protocol, Connect):
                    model = choose_model("kimi", await self._step("models", protocol.models(account)))[0]
                await self._chat("answer", protocol, account, model)
            except ProxyError:
                return False
            for what in ("search", "stop", "system prompt")[: 3 if protocol is gateway.connect else 2]:
                with suppress(ProxyError):  # their lines say so: chats work all the same
                    await self._chat(what, protocol, account, model)
            with suppress(ProxyError):
                await self._step("upload", gateway.uploads.upload(account, protocol, [_SMALL_FILE]))
        return True

    async def _chat(self, what: str, protocol: KimiProtocol, account: Account, model: Model) -> None:
        """Ask in a conversation of its own, which is removed."""
        exchange = Exchange(account, protocol, replace(_QUESTIONS[what], model=model), kept=False)
        if isinstance(protocol, Classic):
            exchange.conversation_id = await self._step("open", protocol.open(account, model))
        try:
            await self._step(what, self._read(exchange, what))
        finally:
            if exchange.conversation_id:
                await self._step("remove", protocol.remove(account, exchange.conversation_id))

    async def _read(self, exchange: Exchange, what: str) -> list[Event]:
        """The events of an answer; `stop` is stopped at its first text."""
        account, protocol, events = exchange.account, exchange.protocol, list[Event]()
        deadline = loop_time() + protocol.settings.silence_seconds
        stream = await protocol.ask(account, exchange.conversation_id, exchange.question, deadline)
        stream.raw = self.recorded.setdefault(what, [])
        try:
            while (more := await stream.read()) is not None:
                events += more
                if what == "stop" and any(isinstance(event, Text) for event in more):
                    told = exchange.conversation_id or stream.answer.conversation_id
                    await protocol.stop(account, told, stream.answer.message_id)
                    break
        finally:
            exchange.conversation_id = exchange.conversation_id or stream.answer.conversation_id
            await stream.drain(END_SECONDS)
        if form := next((form for form, mark in _CITATION_FORMS if mark in b"".join(stream.raw)), ""):
            self.seen.append(f"citations as {form}")
        if "OKAPI" in "".join(event.text for event in events if isinstance(event, Text)):
            self.seen.append("which is obeyed")
        return events

    async def _step(self, what: str, work: Awaitable[Result]) -> Result:
        started, verdict, text, seen = time.monotonic(), "FAIL", "stopped", ""
        if sys.stdout.isatty():
            print(f"...   {self._name:8} {what}", end="\r", flush=True)
        try:
            result = await work
            seen, text = _render_seen(result), f"{time.monotonic() - started:.2f} s"
            verdict = "warn" if "moderated" in seen else "ok"
        except ProxyError as error:
            text = error.message
            raise
        finally:
            print(f"{verdict:5} {self._name:8} {what:19} {text}{seen}", flush=True)
            self.seen.append(f"{what} {verdict}{seen}")
        return result


def _render_seen(result: object) -> str:
    """What a step's result is worth telling: numbers and names of models, never tokens or texts."""
    if isinstance(result, tuple):
        shape = "new" if any(model.efforts for model in result) else "old"
        names = (f"{model.id} ({model.default_effort})" if model.efforts else model.id for model in result[:8])
        return f", {shape} list: " + ", ".join(names)
    events = [one for one in result if isinstance(one, Event)] if isinstance(result, list) else []
    counts = Counter(type(event).__name__ for event in events)
    words = [*(f", {number} {kind}" for kind, number in counts.items())]
    return "".join(words) + ", moderated by Kimi" * (Finished("content_filter") in events)


_KEPT_KEY: Final = re.compile("event|type|op|mask|role|status|name|scenario|code|reason|error_type")
_KEPT_VALUE: Final = re.compile(r"[A-Za-z_.$]{1,48}|[A-Z0-9_]{1,60}")
_KEPT_ID: Final = re.compile(r"[a-z_]*:?[0-9]{1,4}")  # of a block, or of a call that marks name
_KEPT_MARK: Final = re.compile(
    "(<REF>cite|(?:tools://)?[a-z_]+:[0-9]+#[0-9]+(?::~:text=)?|</REF>|</?think>"
    "|\ue3a0cite[\ue3a3\U0001f6e0a-z_0-9:#]*\ue3a8|\\[\\^[0-9]+\\^\\])"
)


def mask(text: str) -> str:
    """`text` with each letter and digit replaced, but those of marks."""
    parts = _KEPT_MARK.split(text)
    parts[::2] = [re.sub(r"[^\W_]", lambda one: "x" if one[0].isascii() else "字", part) for part in parts[::2]]
    return "".join(parts)


def anonymize(value: Any, mask_text: Callable[[str], object] = mask, key: str = "") -> Any:
    """A JSON value with every text, id and URL replaced; names of the protocol stay. `mask_text` gets the texts."""
    if isinstance(value, dict):
        return {name: anonymize(inner, mask_text, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [anonymize(inner, mask_text, key) for inner in value]
    if not isinstance(value, str) or (_KEPT_KEY.fullmatch(key) and _KEPT_VALUE.fullmatch(value)):
        return value
    if key in ("text", "content"):
        return mask_text(value)
    digest = hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()
    if key.lower().endswith("id"):
        return value if _KEPT_ID.fullmatch(value) else digest[:20]
    return f"https://example.com/{digest[:8]}" if value.startswith(("http://", "https://")) else mask(value)


def anonymize_stream(data: bytes, protocol: str) -> bytes:
    """A recorded answer without tokens, ids and texts, up to what breaks it, in the form of `tests/wire/`."""
    parser, frames = SSEParser() if protocol == "classic" else EnvelopeParser(), list[tuple[int, Any]]()
    with suppress(WireError):
        for frame in parser.feed(data):
            flags, payload = (0, frame) if isinstance(frame, str) else frame
            frames.append((flags, _read_frame(payload)))
    texts = io.StringIO()  # as one, since a mark may be cut between two
    anonymize(frames, texts.write)
    masked = io.StringIO(mask(texts.getvalue()))
    lines = [(flags, encode_json(anonymize(value, lambda text: masked.read(len(text))))) for flags, value in frames]
    if protocol == "classic":
        return b"".join(encode_sse(line) for _, line in lines)
    return b"".join(encode_envelope(line.encode(), flags) for flags, line in lines)


def _read_frame(data: str | bytes | bytearray) -> Any:
    with suppress(WireError):
        return parse_json(data, surrogates=True)
    return data if isinstance(data, str) else data.decode("utf-8", "replace")


_COMMANDS: Final[Mapping[str, tuple[Callable[[Settings, argparse.Namespace], int], str]]] = {
    "setup": (_setup_command, "Ask for your refresh token, or read it from a pipe; check it, and keep it in .env."),
    "ask": (_ask_command, "Ask a running proxy in the terminal; without a question, chat until Ctrl-D."),
    "check": (_check_command, "Try each step of Kimi with the held account, and say what was seen."),
    "serve": (_serve_command, "Serve programs: the same as without a command."),
}


def make_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command's flags. None can be abbreviated: it might be meant for a secret."""
    is_main = command == "serve"
    commands = [f"  {name:8} {about}" for name, (_, about) in _COMMANDS.items()]
    about = "An OpenAI-compatible gateway in front of the Kimi web service.\n\ncommands, each with a --help:\n"
    parser = argparse.ArgumentParser(
        f"kimi_proxy.py {command}",
        usage="kimi_proxy.py [command] [--option X ...]" if is_main else None,
        description=about + "\n".join(commands) if is_main else _COMMANDS[command][1],
        epilog="KIMI_REFRESH_TOKEN, PROXY_API_KEYS and KIMI_PROXY_URL are secrets, and have no flag.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"kimi_proxy {__version__}")
    parser.add_argument("--env-file", metavar="FILE", help="NAME=VALUE lines to take settings from (default: .env)")
    if command == "ask":
        parser.add_argument("question", nargs="*", help="the question; text from a pipe is appended to it")
        parser.add_argument("--url", help="address of the proxy (default: this machine's)")
        parser.add_argument("--model", default="kimi", help="model to ask (default: %(default)s)")
        parser.add_argument("--search", action=argparse.BooleanOptionalAction, help="search the web, or do not")
        parser.add_argument(
            "--file", action="append", default=[], help="a file or picture, or its URL; may be repeated"
        )
    if command == "check":
        text = "write the answers' streams, tokens, ids and texts replaced, to FILE-STEP.sse, FILE-STEP.connect"
        parser.add_argument("--record", metavar="FILE", help=text)
    add_options(parser, hidden=not is_main)
    return parser


def _explain_unknown(word: str, command: str) -> str:
    known = re.findall("--[a-z-]+", make_parser(command).format_help() + make_parser("serve").format_help())
    nearest = difflib.get_close_matches(word, [*_COMMANDS, *known], 1)
    meant = f"do you mean {nearest[0]}?" if nearest else "see --help"
    return f"{quote_name(word)}: there is no such option or command; {meant}"


def _load_env_file(name: str | None, command: str) -> list[str]:
    """Take settings from the file, or from .env where there is one, and name them. What the environment has wins."""
    path = Path(name or ".env")
    if (not name or command == "setup") and not path.is_file():  # `setup` makes it
        return []
    found = {name: value for name, value in parse_env(read_text(path)).items() if name not in os.environ}
    os.environ.update(found)
    if found and not name:
        print(f"kimi_proxy: .env in this directory sets {', '.join(found)}", file=sys.stderr)
    return [*found]


def main(argv: Sequence[str]) -> int:
    """Run the command in `argv`; the exit status: 0, 1 for a failure, 2 for a setting that is not usable."""
    command, *arguments = argv if argv and argv[0] in _COMMANDS else ("serve", *argv)
    end = [*arguments, "--"].index("--")  # what follows is a question, which Python 3.11 would read as options
    try:
        options, unknown = make_parser(command).parse_known_intermixed_args(arguments[:end])
        (options.question if command == "ask" else unknown).extend(arguments[end + 1 :])
        if unknown:
            raise SettingsError(_explain_unknown(unknown[0].partition("=")[0], command))
        options.from_file = _load_env_file(options.env_file, command)
        return _COMMANDS[command][0](Settings.load(os.environ, vars(options)), options)
    except (SettingsError, CommandError, argparse.ArgumentError) as error:
        print(f"kimi_proxy: {error}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 2
    except (KeyboardInterrupt, EOFError):
        return 130
    except BrokenPipeError:  # whoever read standard output is gone, and what is buffered is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    gc.freeze()  # what is loaded stays: else each full collection stops all streams for long enough to look at it
    gc.enable()
    sys.exit(main(sys.argv[1:]))
