"""A look-alike of the Kimi web service, strict and unsteady on purpose, with faults to order.

It imports nothing of the proxy. ``python tests/kimi_simulator.py --port 8010`` runs it by itself, and prints the tokens
to try.

What is known of the service
----------------------------
Nobody can reach the real service from a test, so each fact carries its standing: **[ref]** taken from the original
design (kimi-free-api 0.0.7) and its running implementation, **[2+]** told alike by two or more independent public
sources in 2026, **[1]** told once, **[open]** sources disagree. Code for [1] and [open] bears the other reading too.

*Tokens.* A long-lived refresh token (from the browser's local storage) buys a short-lived access token:
``GET /api/auth/token/refresh`` with the refresh token as Bearer gives ``{access_token, refresh_token}``; an access
token is used for 300 s [ref]. HTTP 401 says that the access token is dead: forget it, refresh once, call once more
[ref]. All other calls carry the access token [ref].

*A JSON body with a string* ``error_type`` is a failure whatever the HTTP status, 200 included; ``message`` says why.
``auth.token.invalid``: the token is dead. ``chat.user_stream_pushing``: this account has an answer under way [ref].

*Headers.* Each call carries ``Referer`` (the base URL without a slash, or ``…/chat/<id>``) [ref], ``Origin`` [2+], and
a desktop Chrome's ``User-Agent`` and three ``Sec-Ch-Ua`` headers, all of one version [ref]. No cookies are kept [ref].

*One chat is four calls* [ref]: refresh (above); open, ``POST /api/chat`` ``{"name": "cmpl-<32 hex>", "is_example":
false}`` → ``{"id": <20 characters>}``; ask, ``POST /api/chat/<id>/completion/stream`` ``{"messages": [{"role": "user",
"content": <text>}], "refs": [], "use_search": <bool>}`` → ``text/event-stream``; remove, ``DELETE /api/chat/<id>``,
which may fail after moderation: log it, never show it. The last two carry ``Referer: …/chat/<id>``.

*The text.* The service takes one message, so a chat is merged: ``<role>:<text>`` and a line end for each message, in
order, ``user`` where the role is missing. A URL in a user's message becomes ``<url id="" type="url" status="" title=""
wc="">URL</url>`` [ref] (in every role at first, later in the user's alone [2+]). The original lost role and line end
for array content, and left its URLs bare: faults of its own, mended here.

*The stream.* Each event's data is a JSON object with ``event`` [ref]: ``cmpl`` has a piece of the answer in ``text``
(missing or null: nothing); ``search_plus`` with ``msg.type`` ``get_res`` has a hit, ``msg.title`` and ``msg.url``,
other types say nothing; ``all_done`` is the end; ``error`` is the end too, by moderation; ``req`` has a segment's
``id`` and ``length`` says that the answer met its length limit [2+]; ``resp``, ``ping``, ``loading``, ``rename``,
``k1`` and what comes next: pass over. The stream may also just end, or break. Text may be cut inside a pair of
surrogate escapes [open].

*Later additions* [2+]: ``kimiplus_id`` in open and ask (a 20-character agent, ``crm40ee9e5jvhsn7ptcg`` is the thinking
model k1), ``use_math``, ``use_research`` with ``GET /api/chat/research/usage`` → ``{remain, total, used}``; an answer
that met its length limit goes on by the same call with ``segment_id``, ``"action": "continue"`` and a blank message.

*What the original answers* [ref]: streamed, a hit is ``检索 TITLE(URL) ...`` and a line end, and the first text after
hits begins with a line end; whole, the hits stand after the text, under ``搜索结果来自：``, one ``TITLE(URL)`` a line;
a moderated answer ends with ``[内容由于不合规被停止生成，我们换个话题吧]`` on a line of its own, before the hits; the
answer's id is the conversation's; usage is zeros. Its numbers: -2000 请求参数非法, -2001 请求失败, -2002 Token已失效.

*The other protocol, connect* (``https://www.kimi.com``) [2+] unless marked. Refresh, new: ``POST`` to auth.kimi.com,
``/api/account.gateway.v1.AuthService/RefreshToken``, JSON, no Bearer, ``{"refresh_token"}`` or ``{"refreshToken"}`` →
``accessToken``, ``refreshToken``, inside ``data`` [1]. Both rotate; whether the old one stays valid is [open]. Access
tokens live 900 s, refresh tokens 90 days. The old refresh is still in use. An access token is a JSON Web Token with
``app_id`` ``kimi`` and ``typ`` ``access``; clients may give one directly. Ask: ``POST
/apiv2/kimi.gateway.chat.v1.ChatService/Chat``, ``application/connect+json``, ``Connect-Protocol-Version: 1``, one
envelope: ``{"scenario", "tools": [{"type":"TOOL_TYPE_SEARCH","search":{}}] or [], "message": {"role", "blocks":
[{"message_id":"","text":{"content"}}], "scenario"}, "options": {"thinking"}}``; in a new chat ``chat_id`` and
``parent_id`` are left out. Remove: ``POST /apiv2/kimi.chat.v1.ChatService/DeleteChat`` ``{"chat_id"}``. Headers:
``x-msh-platform: web``, ``x-msh-device-id``, ``x-msh-session-id``, ``x-traffic-id``, the token's ``device_id``,
``ssid``, ``sub``.

An envelope is a byte of flags, four of length (big-endian), and the payload; flag 0x01 is compressed (never seen), 0x02
the end, ``{}`` or ``{"error":{…}}``; some saw 0x80 for the end [open]. Objects are ``{"op":"set"|"append","mask",
"eventOffset",…}``: ``chat.id`` early; ``message`` with its id and role; ``block.text.content`` and
``block.think.content``, first ``set``, then ``append``; ``block.multiStage.stages[0]`` named ``STAGE_NAME_THINKING``
says when text carries thinking; ``block.tool.contents[]`` and ``message.refs.searchChunks[]``, ``usedSearchChunks[]``
have hits, bare or as ``searchResult``, ``base{title,url}`` and ``refIndex``, the same one more than once; older:
``block.search.webPages``. Citations are U+E3A0 ``cite`` U+E3A3 key … U+E3A8, cut anywhere (U+1F6E0 for U+E3A3 [open]),
older ``[^n^]``, or U+1F6E0 key U+1F6E0 [open]. ``{"heartbeat":{}}`` says nothing, ``{"done":{}}``
that the text is over; an error can follow it in the end envelope. Errors:
``{"error":{"code","message","details":[{"debug":{"reason","localizedMessage":{"message"}}}]}}``,
codes ``unauthenticated``, ``resource_exhausted``, ``permission_denied``, ``invalid_argument``, ``not_found``,
``unavailable``, ``internal``; models, ``POST /apiv2/kimi.gateway.config.v1.ConfigService/GetAvailableModels`` ``{}`` →
``availableModels[{scenario, displayName, key, id, thinking, kimiPlusId, agentMode}]``, ``defaultScenario{scenario,
thinking}``, names change; or ``block.exception`` with ``error.reason`` (``REASON_COMPLETION_OVERLOADED``), or a list
of objects with ``reason``; or ``block.error`` [2+]. How a
moderated answer looks nobody told: here it is an exception whose reason says so [open].

*The stream since autumn 2026.* Citations are ``<REF>cite✦tools://CALL#N:~:text=START...END</REF>``, ✦ is U+2726, cut
anywhere; N counts from 0 and means the search result with ``id`` N+1 in the tool block whose ``toolCallId`` is CALL,
or the place in ``contents`` for opened pages (``webOpenUrl {url}``) [2+]; also ``<REF>cite:tools://CALL#N</REF>`` [1].
``ref {message_id, search {id, base}}`` is a frame that has a hit [1]. A second ``set`` of a text block replaces what
was before [2+]. A ``mask`` may be a list [1]; statuses and stage names come in either case. Status
``…ASK_USER_QUESTION``: the model waits for the user, and the stream stays open [1]. ``notification`` of
``TYPE_MODEL_DEGRADE``: a weaker model answers [2+]. A stream may be heartbeats alone for long: that is silence. The
text may begin with ``<think>…</think>`` [1], and calls may come in the model's own marks,
``<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>…`` [2+
on other ways to the same models]. The user's own message is echoed, in ``message.blocks`` [1] or in blocks with its
``messageId`` [open]. A tool block of the model's own sandbox (``ipython``) is neither text nor a call [1].

*The calls since autumn 2026.* ``POST /apiv2/kimi.gateway.chat.v1.ChatService/CancelChat`` ``{"chat_id",
"message_id"}`` stops an answer; the message is the assistant's [2+]. DeleteChat is also seen with ``gateway`` in its
package [2+], Chat without it [1]: where one name is answered by 404 or 501, the other may be known. Headers besides
the ids: ``x-msh-version: 2.2.0`` [1], ``x-language``, ``r-timezone`` [2+], of Chrome 146. Models have ``id``,
``key``, ``displayName``, ``scenario``, and agents ``kimiPlusId`` and ``agentMode``;
``reasoningEffortOptions[{effort}]`` and ``defaultReasoningEffort`` instead of ``thinking``;
``defaultScenario{scenario, model}``. They are asked with their scenario, ``kimiplusId``, ``agentMode``,
``options.model`` (the ``id``) and ``options.reasoning_effort`` [1, a capture]. ``options.enable_plugin: false`` keeps
the model's own tools away, ``options.system_prompt`` is taken [2+]. kimi.ai is a twin with tokens of its own, whose
claims tell ``"aud":["kimi.ai"]`` and ``"region":"overseas"`` [2+].

*What* ``resource_exhausted`` *means* is told by the reason [2+]: ``REASON_SERVER_OVERLOADED_FOR_FREE_USER`` and
``REASON_COMPLETION_OVERLOADED``: the service is full; ``QUOTA_EXCEEDED_WINDOW_5H``, ``…_7D``: a quota is used up; any
other: another answer is under way. More reasons [1]: ``REASON_INVALID_AUTH_TOKEN``,
``REASON_KIMI_FILE_PARSE_JOB_FAIL``, ``REASON_KIMI_FILE_MODERATION_FAIL``, those of a captcha; classic has
``auth.account_abnormal`` and ``chat.anonymous_usage_exceeded``. Where the code is ``unknown`` or missing, the HTTP
status tells: 401, 429, 503.

*Files, classic* [ref] unless marked: ``POST /api/pre-sign-url`` ``{"action": "file", "name"}`` → ``{"url",
"object_name"}``; ``PUT`` the bytes to that URL, with ``Content-Type`` and ``Content-Length`` (object storage refuses
chunked bodies) and without any token, as it is signed; ``POST /api/file`` ``{"type": "file", "name", "object_name"}`` →
``{"id"}``; ``POST /api/file/parse_process`` ``{"ids": [id]}``: when it answers (with whatever body), ``refs`` of a
question may hold the id. Later versions say ``"action": "image"`` for pictures, get a ``file_id`` with the URL, and
register ``{"type": "image", "file_id", "name"}`` [2+]; the reply may have a ``status``, and while that is neither
``initialized`` nor ``parsed``, the call is repeated, for 30 s at most [1]. Its limits: 60 s to fetch a remote file, 60
s to upload, 120 s to parse. Its numbers: -2003 远程文件URL非法, -2004 远程文件超出大小.

*Files, connect* [2+]: ``POST /apiv2-files/file/upload``, a form with the field ``file`` → ``file.id``; then ``POST
/apiv2-files/kimi.gateway.file.v1.FileService/GetFileParseProgress`` ``{"file_ids": [id]}`` →
``progresses[].status`` until ``PROCESS_STATUS_SUCCESS`` (``PROCESS_STATUS_FAIL`` or ``…_FAILED``: it cannot be read;
also numbers, 3 and 4 [1]).
A question has it as a block: ``{"message_id": "", "file": {"id", "status": "PROCESS_STATUS_SUCCESS"}}``.

How to order
------------
A refresh token is ``SCRIPT[+FAULT[=VALUE]]…[~ANYTHING]``: ``search``, ``hello+cut-characters``,
``hello+status=ask:500~42``. So any client can order a fault, and two tests never meet. ``SCRIPTS``, ``SHAPES`` and
``FAULTS`` list what there is. A refresh token with an unknown script is refused, as a dead one is.

Beside the service run its storage, and an *origin* for files: ``GET <origin>/SIZE[+FAULT[=VALUE]]…/NAME`` gives SIZE
bytes, always the same ones; ``ORIGIN_FAULTS`` lists what can be ordered of it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import hashlib
import json
import os
import random
import re
import secrets
import socket
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

# ==== 1. Scripts ============================================================
#
# What an account answers, as steps that name no protocol.


@dataclass(frozen=True, slots=True)
class Say:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A search hit."""

    title: str
    url: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Silence, in seconds; None is for ever."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class End:
    """The end of the answer: its `kind` is `all_done`, `error` (moderation) or `length` (then all_done)."""

    kind: str = "all_done"


@dataclass(frozen=True, slots=True)
class Think:
    """A piece of thinking; classic has no form for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Cite:
    """A mark that cites hits by their numbers; classic has no form for it."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """A mark of the newer kind that cites a hit of the search by its number, or (`opened`) a page that was opened."""

    number: int
    quote: str = ""
    opened: bool = False
    separator: str = "\u2726"


@dataclass(frozen=True, slots=True)
class Open:
    """A page that the model opened."""

    url: str


@dataclass(frozen=True, slots=True)
class Replace:
    """The text so far, set anew; classic has no form for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """An object of connect's stream as it is, as JSON; classic passes it over."""

    json: str


Step = Say | Hit | Wait | End | Think | Cite | Ref | Open | Replace | Frame

_HITS: Final = (Hit("Kimi 首页", "https://www.kimi.com/"), Hit("月之暗面", "https://www.moonshot.cn/about?a=1&b=2"))
HELLO: Final = "你好，世界！Hello 👋🏽 — I am Kimi."

SCRIPTS: Final[dict[str, tuple[Step, ...]]] = {
    "hello": (*(Say(HELLO[at : at + 4]) for at in range(0, len(HELLO), 4)), End()),
    "search": (*_HITS, Say("据搜索，"), Say("Kimi 是月之暗面的助手。"), End()),
    "think": (Think("让我想"), Think("想。"), Say("答案"), Say("是 42。"), End()),
    "think-tags": (Say("<thi"), Say("nk>让我想想。</thi"), Say("nk>\n答案"), Say("是 42。"), End()),
    "think-only": (Think("让我想"), End()),
    "think-tags-only": (Say("<think>让我想"), Say("想。</think>"), End()),
    "cite": (*_HITS, Say("甲"), Cite((2,)), Say("乙"), Cite((1, 2)), Cite((9,)), Say("丙[^1^]。"), End()),
    "cite-ref": (
        *_HITS,
        Open("https://opened.example/a"),
        Say("甲"),
        Ref(2, "月之暗面...[^1^] <REF>x " + "很长" * 1000),
        Say("乙"),
        Ref(1),
        Ref(9),
        Ref(1, "页", opened=True),
        Say("丙"),
        Ref(2, separator=":"),
        Say("。"),
        End(),
    ),
    "cite-none": (Say("Use [^1"), Say("^] or [^0^], a < b, <REF>x</R"), Say("EF> to match."), End()),
    "set-again": (Say("一"), Say("二"), Replace("一二三"), Replace("另一个"), Say("四"), Replace("另一个四五"), End()),
    "ask-user": (
        Say("Which"),
        Say(" one?"),
        Frame(
            '{"op":"set","mask":"message.status","message":{"id":"m-assistant","status":"STATUS_ASK_USER_QUESTION"}}'
        ),
        Wait(None),
    ),
    "degraded": (
        Frame('{"notification":{"type":"TYPE_MODEL_DEGRADE","message":"K2.6 answers instead of K3"}}'),
        Say("答案"),
        End(),
    ),
    "sandbox": (
        Frame('{"op":"set","block":{"id":"5","tool":{"name":"ipython","toolCallId":"i:0","contents":[{"text":"x"}]}}}'),
        Frame(
            '{"op":"append","mask":["block.text"],"block":{"id":"5","text":{"content":"<tool_call>{}</tool_call>"}}}'
        ),
        Say("答案"),
        End(),
    ),
    "user-echo": (
        Frame('{"op":"set","block":{"id":"0","messageId":"m-user","text":{"content":"<tool_call>{}</tool_call>"}}}'),
        Say("答案"),
        End(),
    ),
    "moderated": (Say("从前有座山，"), Say("山里有"), End("error")),
    "moderated-search": (*_HITS, Say("从前"), End("error")),
    "moderated-empty": (End("error"),),
    "empty": (End(),),
    "hits-only": (*_HITS, End()),
    "length": (Say("第一"), End("length"), Say("第二"), End("length"), Say("第三"), End()),
    "length-empty": (End("length"),),
    "length-again": (Say("又"), End("length")) * 9,
    "surrogate": (Say("好\ud83d"), Say("\udc4d了"), End()),
    "unicode": (Say("e\u0301 \u200f\u05e2\u05d1 \u2028\u2029 "), Say('👩\u200d👧 𠮷 \x00\x7f "\\</script>'), End()),
    "quiet": (Wait(1.0), Say("late"), End()),
    "broad": (Say("x" * 200_000), End()),
}
_LONG_CHUNKS: Final = 150
_AGAIN: Final = "Your last answer could not be used"  # how the proxy begins to tell the model what was wrong


def make_sample(schema: Any) -> Any:
    """A value that fits a simple JSON Schema."""
    if not isinstance(schema, dict):
        return None
    if "enum" in schema:
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            return make_sample(schema[keyword][0])
    match schema.get("type", "object" if "properties" in schema else None):
        case "string":
            return "Paris"
        case "integer" | "number":
            return max(7, schema.get("minimum", 7))
        case "boolean":
            return True
        case "array":
            return [make_sample(schema.get("items"))]
        case "object":
            return {name: make_sample(inner) for name, inner in schema.get("properties", {}).items()}
        case _:
            return None


def _read_tools(asked: str) -> list[dict[str, Any]]:
    found = re.search(r"<tools>\n(.*?)\n</tools>", asked, re.DOTALL)
    return [json.loads(line) for line in found[1].splitlines()] if found else []


def _render_call(tool: dict[str, Any]) -> str:
    call = {"name": tool["name"], "arguments": make_sample(tool["parameters"])}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _call_tools(asked: str, most: int = 1) -> str:
    """Call the first functions that the prompt describes; once it has results, tell of them."""
    results = re.findall(r"<tool_response>\n(.*?)\n</tool_response>", asked)
    if results:
        return "The results are: " + ", ".join(str(json.loads(result)["content"]) for result in results)
    calls = "\n".join(map(_render_call, _read_tools(asked)[:most]))
    return f"Let me see.\n\n{calls}" if calls else "There is nothing to call."


def _call_natively(asked: str) -> str:
    """A call of each function in the form that Kimi's models write by themselves [2+]."""
    calls = [
        f"<|tool_call_begin|>functions.{tool['name']}:{number}<|tool_call_argument_begin|>"
        f"{json.dumps(make_sample(tool['parameters']), ensure_ascii=False)}<|tool_call_end|>"
        for number, tool in enumerate(_read_tools(asked))
    ]
    return f"Let me see.\n\n<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def _call_loosely(asked: str) -> str:
    """A call of the first function as models get it nearly right: numbers as text, a null, wrapped, in a fence."""
    (tool, *_) = _read_tools(asked)
    sample = {
        name: str(value) if isinstance(value, int) else value for name, value in make_sample(tool["parameters"]).items()
    }
    call = {
        "type": "function",
        "function": {"name": f"functions.{tool['name']}", "arguments": {**sample, "more": None}},
    }
    return f"Let me see.\n\n```json\n<tool_call>\n{json.dumps([call], ensure_ascii=False)}\n</tool_call>\n```\n"


def _call_barely(asked: str) -> str:
    """The arguments of the first function and nothing of a call, amid words."""
    (tool, *_) = _read_tools(asked)
    return f"好的：{json.dumps(make_sample(tool['parameters']), ensure_ascii=False)}\n\nShall I go on?"


_SHELLS: Final = "exec_command|shell(_command)?|bash|run_commands?|run_shell_command"


def _fill_in(name: str, schema: dict[str, Any], values: dict[str, str]) -> Any:
    """A value for an agent's parameter `name`: the first of `values` whose pattern is in the name, else a sample."""
    if schema.get("type") == "array":
        return [_fill_in(name, schema["items"], values)]
    if "properties" in schema:
        inner = schema["properties"]
        return {one: _fill_in(one, inner[one], values) for one in schema.get("required", ()) if one in inner}
    return next((value for pattern, value in values.items() if re.search(pattern, name)), make_sample(schema))


def _work_as_agent(asked: str) -> str:
    """Copy the file that the task names by an agent's own tools: read it, write what was read, then tell it."""
    task = re.search(r"Copy the file (/\S+) to (/\S+)", asked)
    if task is None:
        return "There is nothing to do."
    results = [json.loads(one)["content"] for one in re.findall(r"<tool_response>\n(.*?)\n</tool_response>", asked)]
    words = re.search(r"the magic word is [\w-]+", " ".join(results))
    if words is None and results:
        return f"I cannot read it: {results}"
    if words is not None and len(results) > 1:
        return f"The file says: {words[0]}"
    if words is None:
        wanted, values = r"read(_?files?)?", {"cmd|command": f"cat {task[1]}", "path|file": task[1]}
    else:
        wanted = r"write(_?file|_to_file)?"
        values = {"cmd|command": f"cp {task[1]} {task[2]}", "content|text": words[0], "path|file": task[2]}
    tools = {tool["name"]: tool["parameters"] for tool in _read_tools(asked)}
    fitting = (name for names in (wanted, _SHELLS) for name in tools if re.fullmatch(names, name, re.IGNORECASE))
    name = next(fitting, None)
    if name is None:
        return f"No way to do it among {sorted(tools)}."
    call = json.dumps({"name": name, "arguments": _fill_in("", tools[name], values)}, ensure_ascii=False)
    return f"I do it.\n<tool_call>\n{call}\n</tool_call>"


def _edit_as_aider(asked: str) -> str:
    """An edit in the form that aider's editor asks for, and a message for its commit."""
    if "SEARCH/REPLACE" not in asked:
        return "feat: Greet more"
    return (
        'Here it is:\n\nhello.py\n```python\n<<<<<<< SEARCH\nprint("hello")\n=======\n'
        'print("hello https://example.com/?a=1")\n>>>>>>> REPLACE\n```\n'
    )


def _answer_in_form(asked: str) -> str:
    """A value that fits the schema in the prompt; any object where there is none."""
    found = re.search(r"JSON schema:\n(.*)\n", asked)
    return json.dumps(make_sample(json.loads(found[1])) if found else {"ok": True}, ensure_ascii=False, indent=1)


_BAD_CALL: Final = 'Let me see.\n<tool_call>\n{"name": "no_such_function", "arguments": {}}\n</tool_call>'

# Scripts that answer to what is asked. A `-bad` one gives a good answer when it is asked again, `-worse` never.
TALKS: Final[dict[str, Callable[[str], str]]] = {
    "echo": lambda asked: asked,
    "tool": _call_tools,
    "tools": lambda asked: _call_tools(asked, 9),
    "tool-native": _call_natively,
    "tool-loose": _call_loosely,
    "tool-bare": _call_barely,
    "tool-bad": lambda asked: _call_tools(asked) if _AGAIN in asked else _BAD_CALL,
    "tool-worse": lambda asked: _BAD_CALL,
    "agent": _work_as_agent,
    "aider": _edit_as_aider,
    "json": _answer_in_form,
    "json-words": lambda asked: f"好的：{_answer_in_form(asked)}\n\nI hope this helps {{you}}.",
    "json-bad": lambda asked: _answer_in_form(asked) if _AGAIN in asked else "Sure! Here you are.",
    "json-worse": lambda asked: "Sure! Here you are.",
}


def make_steps(order: Order, asked: str, files: list[File] | None = None) -> tuple[Step, ...]:
    """The steps of the order's script: one of `SCRIPTS`, or what `TALKS` make of what was `asked`.

    `long` counts, `read` tells of the `files`.
    """
    if order.script == "read":
        told = [f"{file.name} ({file.content_type}, {file.size} bytes): {file.first_line}\n" for file in files or ()]
        return (*map(Say, told or ["There is no file."]), End())
    if order.script in TALKS:
        text = TALKS[order.script](asked)
        return (*(Say(text[at : at + 7]) for at in range(0, len(text), 7)), End())
    if order.script == "long":
        return (*(Say(f"{number} ") for number in range(int(order.value("chunks", str(_LONG_CHUNKS))))), End())
    return SCRIPTS[order.script]


def _part(steps: tuple[Step, ...], number: int) -> tuple[Step, ...]:
    """What is left of the steps after `number` ends by length."""
    ends = [at for at, step in enumerate(steps) if step == End("length")]
    return steps[ends[number - 1] + 1 :] if number else steps


@dataclass(frozen=True, slots=True)
class Order:
    """What a refresh token orders: a script, and faults with their values."""

    script: str
    faults: dict[str, str]

    def has(self, fault: str) -> bool:
        """Whether the fault is ordered."""
        return fault in self.faults

    def value(self, fault: str, default: str = "") -> str:
        """The value after `=`."""
        return self.faults.get(fault, default) or default

    def at(self, fault: str, step: str) -> str | None:
        """The fault's value for `step` (`status=ask:500` → `500`), None where it is not ordered there."""
        name, _, value = self.faults.get(fault, "").partition(":")
        return value if fault in self.faults and name == step else None


def parse_order(token: str) -> Order | None:
    """The order in a refresh token, None where it names no script or an unknown fault."""
    script, *faults = token.partition("~")[0].split("+")
    table = dict(fault.partition("=")[::2] for fault in faults)
    known = script in SCRIPTS or script in TALKS or script in ("long", "read")
    return (
        Order(script, table)
        if known and all(name in SHAPES or name in CONNECT_SHAPES or name in FAULTS for name in table)
        else None
    )


# ==== 2. Renderers ==========================================================
#
# Steps become the bytes of each event, shapes change them. Pure but for the dice that they are handed.

Pieces = list[bytes]


def render_events(steps: tuple[Step, ...], dice: random.Random | None) -> Iterator[dict[str, Any] | Wait]:
    """The classic stream's JSON objects; with `dice`, events to be ignored stand between them."""
    noise: list[dict[str, Any]] = [
        {"event": "ping"},
        {"event": "loading", "loading": True},
        {"event": "rename", "text": "a title"},
        {"event": "k1", "k1": {"event": "thinking", "text": "hm"}},
        {"event": "cmpl"},
        {"event": "cmpl", "text": None},
        {"event": "search_plus", "msg": {"type": "start"}},
        {"event": "tomorrow", "data": [1, {"a": None}]},
    ]
    yield {"event": "req", "id": "cs1segment0000000001"}
    yield {"event": "resp", "id": "cs1segment0000000002"}
    for step in steps:
        if dice is not None and dice.random() < 0.3:
            yield dice.choice(noise)
        match step:
            case Say():
                yield {"event": "cmpl", "text": step.text, "view": "cmpl"}
            case Hit():
                message = {"type": "get_res", "title": step.title, "url": step.url, "snippet": "…", "successNum": 1}
                yield {"event": "search_plus", "msg": message}
            case Wait():
                yield step
            case Think():
                yield {"event": "k1", "k1": {"event": "thinking", "text": step.text}}
            case Cite() | Ref() | Open() | Replace() | Frame():
                pass
            case End("length"):
                yield {"event": "length"}
                yield {"event": "all_done"}
                return
            case End("error"):
                yield {"event": "error", "error": {"error_type": "content", "message": "stopped"}}
            case End():
                yield {"event": "all_done"}


def render_stream(steps: tuple[Step, ...], dice: random.Random | None) -> list[bytes | Wait]:
    """The bytes of each event, with the waits between; with `dice`, keys come in any order."""
    rendered: list[bytes | Wait] = []
    for value in render_events(steps, dice):
        if isinstance(value, Wait):
            rendered.append(value)
            continue
        keys = list(value)
        if dice is not None:
            dice.shuffle(keys)
        ordered = {key: value[key] for key in keys}
        try:
            text = f"data: {json.dumps(ordered, ensure_ascii=False)}\n\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair has to be escaped
            text = f"data: {json.dumps(ordered)}\n\n".encode()
        rendered.append(text)
    return rendered


def render_connect_objects(
    steps: tuple[Step, ...], chat_id: str, dice: random.Random | None, stages: bool
) -> Iterator[dict[str, Any] | Wait]:
    """The connect stream's JSON objects up to `done`; with `stages`, thinking comes as text of a phase."""
    offset = count(1)
    noise: list[dict[str, Any]] = [
        {"heartbeat": {}},
        {"op": "set", "mask": "message.status", "message": {"status": "MESSAGE_STATUS_GENERATING"}},
        {"op": "merge", "mask": "tomorrow", "tomorrow": {"a": [None]}},
        {"op": "set", "mask": "block.tomorrow", "block": {"id": "7", "tomorrow": {}}},
    ]
    hits = [step for step in steps if isinstance(step, Hit)]
    begun: set[str] = set()

    def block(kind: str, text: str) -> dict[str, Any]:
        first = kind not in begun
        begun.add(kind)
        part = {"id": "2" if kind == "text" else "1", kind: {"content": text}}
        mask = f"block.{kind}" if first else f"block.{kind}.content"
        return {"op": "set" if first else "append", "mask": mask, "eventOffset": next(offset), "block": part}

    def stage(status: str) -> dict[str, Any]:
        stages = [{"name": "STAGE_NAME_THINKING", "status": status}]
        return {"op": "set", "mask": "block.multiStage", "block": {"id": "0", "multiStage": {"stages": stages}}}

    yield {"op": "set", "mask": "chat", "eventOffset": next(offset), "chat": {"id": chat_id, "name": "新会话"}}
    echo = [{"id": "0", "text": {"content": "the user's own words"}}]
    yield {"op": "set", "mask": "message", "message": {"id": "m-user", "role": "user", "blocks": echo}}
    yield {"op": "set", "mask": "message", "message": {"id": "m-assistant", "role": "assistant"}}
    if hits:
        yield from _render_search(hits)
    if opened := [{"webOpenUrl": {"url": step.url}} for step in steps if isinstance(step, Open)]:
        tool = {"name": "fetch_urls", "toolCallId": "fetch_urls:2", "status": "status_done", "contents": opened}
        yield {"op": "set", "mask": ["block.tool", "block.status"], "block": {"id": "u", "tool": tool}}
    phase = ""
    for step in steps:
        if dice is not None and dice.random() < 0.3:
            yield dice.choice(noise)
        if stages and isinstance(step, Think) and phase != "think":
            phase = "think"
            yield stage("STAGE_STATUS_RUNNING")
        elif phase == "think" and isinstance(step, Say):
            phase = ""
            yield stage("stage_status_done")
        match step:
            case Say():
                yield block("text", step.text)
            case Think() if stages:
                yield {"op": "append", "mask": "block.text", "block": {"id": "1", "text": {"content": step.text}}}
            case Think():
                yield block("think", step.text)
            case Cite():
                for piece in ("\ue3a0ci", "te", "".join(f"\ue3a3web_search:1#{n}" for n in step.numbers), "\ue3a8"):
                    yield block("text", piece)
            case Ref():
                call = "fetch_urls:2" if step.opened else "web_search:1"
                quote = f":~:text={step.quote}" if step.quote else ""
                mark = f"<REF>cite{step.separator}tools://{call}#{step.number - 1}{quote}</REF>"
                at = dice.randrange(len(mark)) if dice is not None else 3
                for piece in (mark[:at], mark[at:]):
                    yield block("text", piece)
            case Replace():
                yield {"op": "set", "mask": "block.text", "block": {"id": "2", "text": {"content": step.text}}}
            case Frame():
                yield json.loads(step.json)
            case Wait():
                yield step
            case End("length"):
                return
            case End("error"):
                error = {"error": {"reason": "REASON_CONTENT_MODERATED"}}
                yield {"op": "set", "mask": "block.exception", "block": {"id": "9", "exception": error}}
            case _:
                pass
    yield {"op": "set", "mask": "message.status", "message": {"status": "MESSAGE_STATUS_COMPLETED"}}
    yield {"done": {}}


def _render_search(hits: list[Hit]) -> Iterator[dict[str, Any]]:
    """A search, each hit told several times, bare and wrapped."""
    bare = [
        {"base": {"title": hit.title, "url": hit.url, "siteName": "s", "snippet": "…"}, "refIndex": f"web_search:1#{n}"}
        for n, hit in enumerate(hits, 1)
    ]
    results = [{"searchResult": {"id": n, **value}} for n, value in enumerate(bare, 1)]
    for status, contents in (("STATUS_PENDING", []), ("status_running", results[:1]), ("STATUS_DONE", results)):
        tool = {"name": "$web_search", "toolCallId": "web_search:1", "status": status, "contents": contents}
        yield {"op": "set", "mask": "block.tool", "block": {"id": "t", "tool": tool}}
    references = {"searchChunks": bare, "usedSearchChunks": [{"searchResult": value} for value in bare[:1]]}
    yield {"op": "set", "mask": "message.refs", "message": {"id": "m-assistant", "refs": references}}
    yield {"op": "append", "mask": "ref", "ref": {"message_id": "m-assistant", "search": {"id": 1, **bare[0]}}}


def render_connect(
    steps: tuple[Step, ...], chat_id: str, dice: random.Random | None, *, stages: bool = False
) -> list[bytes | Wait]:
    """The envelopes of an answer, with the waits between."""
    rendered: list[bytes | Wait] = []
    for value in render_connect_objects(steps, chat_id, dice, stages):
        rendered.append(value if isinstance(value, Wait) else make_envelope(value))
    if End("length") in steps:
        return rendered  # neither done nor end: connect has no other form for it
    return [*rendered, make_envelope({}, 2)]


def make_envelope(value: object, flags: int = 0) -> bytes:
    """One envelope."""
    try:
        payload = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair has to be escaped
        payload = json.dumps(value).encode()
    return bytes([flags]) + struct.pack(">I", len(payload)) + payload


def cut_anywhere(data: bytes, dice: random.Random) -> Pieces:
    """`data` in pieces of random sizes."""
    pieces, at = [], 0
    while at < len(data):
        size = dice.randint(1, max(1, min(len(data), 65_536)))
        pieces.append(data[at : at + size])
        at += size
    return pieces


def _with_comments(pieces: Pieces) -> Pieces:
    return [extra for piece in pieces for extra in (b": keep alive\n", b":\n\n", piece)]


def _with_garbage(pieces: Pieces) -> Pieces:
    return [*pieces[:-1], b'data: {"event":"cmpl","text":"never\n\n', pieces[-1]]


SHAPES: Final[dict[str, Callable[[Pieces], Pieces]]] = {
    "cut-characters": lambda pieces: [bytes((byte,)) for byte in b"".join(pieces)],
    "one-piece": lambda pieces: [b"".join(pieces)],
    "crlf": lambda pieces: [piece.replace(b"\n", b"\r\n") for piece in pieces],
    "cr": lambda pieces: [piece.replace(b"\n", b"\r") for piece in pieces],
    "comments": _with_comments,
    "bom": lambda pieces: [b"\xef\xbb\xbf", *pieces],
    "garbage": _with_garbage,
    "no-end": lambda pieces: pieces[:-1],
    "half-an-event": lambda pieces: [*pieces[:-1], pieces[-1][:9]],
    "huge-line": lambda pieces: [*pieces[:-1], *[b"data: " + b"x" * 65_536] * 64, pieces[-1]],
    "limit-late": lambda pieces: [*pieces[:-1], b'data: {"error_type":"chat.user_stream_pushing"}\n\n'],
    "dead-late": lambda pieces: [*pieces[:-1], b'data: {"error_type":"auth.token.invalid"}\n\n'],
    "steady": lambda pieces: pieces,
}

CONNECT_SHAPES: Final[dict[str, Callable[[Pieces], Pieces]]] = {
    "cut-characters": SHAPES["cut-characters"],
    "one-piece": SHAPES["one-piece"],
    "garbage": lambda pieces: [*pieces[:-1], make_envelope({})[:4] + b"\x05{oops", pieces[-1]],
    "no-end": lambda pieces: pieces[:-2],
    "half-an-event": lambda pieces: [*pieces[:-2], pieces[-2][:-3]],
    "done-without-end": lambda pieces: pieces[:-1],
    "error-after-done": lambda pieces: [*pieces[:-1], make_envelope(connect_error("internal", "late error"), 2)],
    "limit-late": lambda pieces: [*pieces[:-2], make_envelope(connect_error("resource_exhausted", "late"), 2)],
    "dead-late": lambda pieces: [*pieces[:-2], make_envelope(connect_error("unauthenticated", "late"), 2)],
    "end-flag-80": lambda pieces: [*pieces[:-1], make_envelope({}, 0x80)],
    "huge-line": lambda pieces: [*pieces[:-1], b"\0\x05\0\0\0", *[b"x" * 65_536] * 64, pieces[-1]],
    "set-twice": lambda pieces: [
        *pieces[:-2],
        make_envelope({"op": "set", "block": {"id": "2", "text": {"content": "quite another text"}}}),
        *pieces[-2:],
    ],
    "overloaded": lambda pieces: [
        *pieces[:3],
        make_envelope({"block": {"exception": {"error": {"reason": "REASON_COMPLETION_OVERLOADED"}}}}),
        *pieces[3:],
    ],
    "exception-list": lambda pieces: [
        *pieces[:-2],
        make_envelope({"block": {"exception": [{"reason": "REASON_COMPLETION_OVERLOADED"}]}}),
        *pieces[-2:],
    ],
    "block-error": lambda pieces: [*pieces[:-2], make_envelope({"block": {"error": {"reason": "X"}}}), *pieces[-2:]],
    "steady": lambda pieces: pieces,
}


def connect_error(code: str, message: str, reason: str = "REASON_X") -> dict[str, Any]:
    """Connect's error object."""
    debug = {"reason": reason, "localizedMessage": {"locale": "zh-CN", "message": f"{message} 出错"}}
    return {"error": {"code": code, "message": message, "details": [{"type": "x", "debug": debug}]}}


# What a token can order beside a shape. STEP is refresh, open, ask or remove.
FAULTS: Final[dict[str, str]] = {
    "status": "STEP:CODE, that HTTP status with a JSON error",
    "html": "STEP:CODE, that HTTP status with 10 MB of HTML",
    "error-type": "STEP:TYPE, a JSON error of that type under HTTP 200",
    "retry-after": "SECONDS, the header, on each failing status",
    "unauthorized-once": "STEP, a 401 the first time",
    "unauthorized-always": "STEP, a 401 each time",
    "silent": "STEP, no answer at all",
    "slow": "STEP:SECONDS, the answer after that time",
    "close": "STEP, the connection closed without an answer",
    "close-kept": "STEP, the same, once, and only on a connection that was used before",
    "redirect": "STEP, a redirect to another host",
    "wrong-type": "STEP, 200 with HTML",
    "bomb": "STEP, 200 with JSON without end",
    "no-id": "an opening reply without an id",
    "opaque": "access tokens that are no JSON Web Tokens",
    "new-models": "connect: the list of models as it is since September 2026, and strict about what is asked with it",
    "scenario": "NAME, connect: another scenario is not known, and refused within the stream",
    "other-names": "connect: Chat and DeleteChat have the name with the other package",
    "no-stop": "connect: CancelChat fails",
    "overseas": "the refresh token is for the twin of the service, whose tokens tell so",
    "rotate": "each refresh gives a new refresh token, and the one before is refused",
    "one-at-a-time": "a second answer at once is refused",
    "cut": "the answer's connection reset after N pieces",
    "cut-chunk": "the answer's transfer coding broken after N pieces",
    "stall": "silence for ever after N pieces",
    "heartbeats": "connect: nothing but heartbeats for ever after N pieces",
    "reason": "STEP:REASON, connect: HTTP 429 with a resource_exhausted of that reason",
    "unknown": "STEP:CODE, connect: that HTTP status with an error whose code says nothing",
    "linger": "the connection stays open after the last event",
    "endless": "the first text again and again, for ever",
    "pace": "SECONDS between two events",
    "chunks": "N chunks of the script `long`",
    "stages": "connect: thinking comes as the text of a phase",
    "stale-once": "connect: the first answer says that the access token is dead",
    "no-quota": "no research is left",
    "camel": "the new refresh wants `refreshToken`, and answers inside `data`",
    "old-refresh": "the new refresh is refused, the old one works",
    "new-refresh": "the old refresh is refused, the new one works",
    "again-status": "CODE, that HTTP status when the proxy asks again since the answer could not be used",
    "again-cut": "the second try is reset after N pieces",
    "again-stall": "the second try, or the continuation, is silent for ever after N pieces",
    "no-pictures": "classic before pictures: the action `image` is refused",
    "register-slow": "classic: a registration is not ready N times",
    "parse-slow": "connect: a file is not read yet N times",
    "parse-fail": "a file cannot be read",
    "parse-stream": "classic: reading a file answers with an event stream",
    "storage-status": "CODE, that HTTP status of the storage; in connect status=upload:CODE",
    "storage-stall": "the storage stops to read, and never answers",
    "storage-early": "the storage answers 200 before it has read",
    "storage-reset": "the storage resets the connection in the middle",
}

# What the path of an origin can order.
ORIGIN_FAULTS: Final[dict[str, str]] = {
    "type": "TYPE/SUBTYPE with a dot for the slash, the Content-Type",
    "raw-disposition": "PARAMETERS of Content-Disposition as they are, percent-encoded twice",
    "zeros-behind": "zeros without end behind an encoded body",
    "members": "empty gzip members without end behind an encoded body",
    "disposition": "NAME in Content-Disposition",
    "text": "the body is text",
    "zeros": "the body is zeros",
    "no-length": "a chunked body",
    "gzip": "the body encoded",
    "deflate": "the body encoded",
    "half": "the encoded body is cut, and ends in good order",
    "encoding": "NAME, a Content-Encoding that nobody knows",
    "status": "CODE, that HTTP status",
    "redirect": "N redirects before it",
    "hang": "no answer",
    "stall": "silence for ever in the middle",
    "slow": "SECONDS between two pieces",
    "cut": "the connection reset in the middle",
    "close": "the connection closed in the middle, in an orderly way",
    "cut-chunk": "a broken chunk in the middle",
    "endless": "a chunked body without end",
    "after-storage": "the second half comes when the storage has bytes of the first",
    "no-http": "an answer that is no HTTP",
}
_BLOCK: Final = random.Random(1).randbytes(65_521)
_BEHIND: Final = {"zeros-behind": bytes(65_536), "members": gzip.compress(b"") * 1000}
_LINE: Final = "文档的第一行 — the first line.\n".encode()


def make_content(size: int, block: bytes = _BLOCK) -> Iterator[bytes]:
    """`size` bytes, always the same ones, in pieces."""
    while size > 0:
        yield block[:size]
        size -= len(block)


def digest_content(size: int) -> str:
    """The SHA-256 of `make_content(size)`."""
    digest = hashlib.sha256()
    for piece in make_content(size):
        digest.update(piece)
    return digest.hexdigest()


# ==== 3. World ==============================================================
#
# What the service knows: accounts and their conversations. It is the record that tests look at.


@dataclass(slots=True)
class Call:
    """One call that arrived."""

    step: str
    headers: dict[str, str]
    body: Any


@dataclass(slots=True)
class Conversation:
    """One conversation: what was asked in it, how often it was removed, and whether its id was told."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    removed: int = 0
    told: bool = True


@dataclass(slots=True)
class File:
    """A file of an account: what was said of it, and what arrived."""

    name: str
    kind: str = "file"
    content_type: str = ""
    size: int = 0
    sha256: str = ""
    head: bytes = b""
    stored: bool = False
    ready: bool = False
    asked: int = 0

    @property
    def first_line(self) -> str:
        """Its first line, if it is text."""
        return self.head.split(b"\n")[0].decode("utf-8", "replace") if self.content_type.startswith("text/") else "…"


@dataclass(slots=True)
class Account:
    """One account, as the service sees it."""

    order: Order
    refresh_tokens: list[str]
    dice: random.Random
    calls: list[Call] = field(default_factory=list)
    access_tokens: list[str] = field(default_factory=list)
    conversations: dict[str, Conversation] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)
    streams_open: int = 0
    streams_cut: int = 0
    round: int = 0

    def count(self, step: str) -> int:
        """How many calls of `step` arrived."""
        return sum(call.step == step for call in self.calls)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all questions."""
        return [body for conversation in self.conversations.values() for body in conversation.asked]

    @property
    def settled(self) -> bool:
        """Whether nothing runs, and nothing is left of what was opened."""
        return self.streams_open == 0 and all(item.removed == 1 for item in self.conversations.values() if item.told)

    def fires(self, fault: str) -> bool:
        """Whether a fault that happens once is still to happen: True the first time."""
        first = fault not in self.fired
        self.fired.add(fault)
        return first


def make_access_token(dice: random.Random, opaque: bool, life_seconds: float = 900, overseas: bool = False) -> str:
    """An access token: a JSON Web Token as the service makes it, or opaque."""
    body = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=40))
    if opaque:
        return body
    now = int(time.time())
    claims = {"iss": "user-center", "app_id": "kimi", "typ": "access", "iat": now, "exp": int(now + life_seconds)}
    claims |= {"device_id": f"7{body[:12]}", "ssid": f"17{body[12:20]}", "sub": f"d{body[20:30]}", "jti": body}
    claims |= {"aud": ["kimi.ai"], "region": "overseas"} if overseas else {}
    parts = ({"alg": "HS512", "typ": "JWT"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


def read_claims(token: str) -> dict[str, Any]:
    """The claims of such a token; empty for an opaque one."""
    if token.count(".") != 2:
        return {}
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims


# ==== 4. Simulator ==========================================================
#
# The service on a socket. What the proxy must not do is a violation, and fails the test at its end.

_BREAKS: Final = ("cut", "cut-chunk", "stall", "heartbeats")
_BROWSER: Final = re.compile(r"Mozilla/5\.0 .* Chrome/(\d+)\.0\.0\.0 Safari/537\.36")
_HTML: Final = b"<!doctype html><title>502</title>" + b"<p>the page of some machine in between</p>" * 250


# Replies with the list of models: as they were until August 2026 [2+], and as one was in September [1, a capture].
_WIRE: Final = Path(__file__).parent / "wire" / "connect"
OLD_LIST: Final[dict[str, Any]] = json.loads((_WIRE / "models_august.json").read_text("utf-8"))
NEW_LIST: Final[dict[str, Any]] = json.loads((_WIRE / "models_september.json").read_text("utf-8"))
_CONNECT_TYPES: Final = {
    "chat.user_stream_pushing": "resource_exhausted",
    "auth.token.invalid": "unauthenticated",
}


class Refusal(Exception):
    """A reply other than success."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__(response.status)
        self.response = response


class Simulator:
    """The service, on a port of this machine, while the context lasts. Violations are raised at its end."""

    def __init__(
        self,
        *,
        port: int = 0,
        seed: int | None = None,
        unsteady: bool = True,
        retired: str = "",
        overseas: bool = False,
    ) -> None:
        self.overseas = overseas  # kimi.ai, whose tokens are of no use at kimi.com, and the other way round
        self.refresh_retired = False  # the old refresh too
        self.retired = retired  # how the classic calls answer: redirect, html, or a status
        self.web_version = "2.2.0"  # what x-msh-version has to be
        self.seed = seed if seed is not None else int(os.environ.get("KIMI_SIMULATOR_SEED") or secrets.randbits(32))
        self.url = ""
        self.storage_url = ""
        self.origin_url = ""
        self.violations: list[str] = []
        self.fetches: list[str] = []  # what was asked of the origin
        self.requests_open = 0  # of all of its servers
        self.transfers_open = 0
        self.origins_open = 0
        self.origins_most = 0  # at once
        self.storage_bytes = 0
        self.stalled = asyncio.Event()  # set it, and a storage that stalls looks what became of its client
        self._elsewhere_url = ""
        self._dice = random.Random(self.seed)
        self._unsteady = unsteady
        self._port = port
        self._accounts: dict[str, Account] = {}
        self._numbers = count(1)
        self._changed = asyncio.Event()
        self._used_connections: dict[int, asyncio.BaseTransport] = {}
        self._objects: dict[str, tuple[Account, File]] = {}
        self._runners: list[web.AppRunner] = []

    async def __aenter__(self) -> Simulator:
        app = web.Application(middlewares=[self._count, self._check])
        app.router.add_get("/api/auth/token/refresh", self._refresh)
        app.router.add_post("/api/chat", self._open)
        app.router.add_post("/api/chat/{id}/completion/stream", self._ask)
        app.router.add_delete("/api/chat/{id}", self._remove)
        app.router.add_get("/api/chat/research/usage", self._research_usage)
        app.router.add_post("/apiv2/kimi.gateway.config.v1.ConfigService/GetAvailableModels", self._list_models)
        app.router.add_post("/api/account.gateway.v1.AuthService/RefreshToken", self._connect_refresh)
        for package in ("kimi.gateway.chat.v1", "kimi.chat.v1"):
            app.router.add_post(f"/apiv2/{package}.ChatService/Chat", self._connect_ask)
            app.router.add_post(f"/apiv2/{package}.ChatService/DeleteChat", self._connect_remove)
        app.router.add_post("/apiv2/kimi.gateway.chat.v1.ChatService/CancelChat", self._connect_stop)
        app.router.add_post("/api/pre-sign-url", self._sign)
        app.router.add_post("/api/file", self._register)
        app.router.add_post("/api/file/parse_process", self._parse)
        app.router.add_post("/apiv2-files/file/upload", self._connect_upload)
        app.router.add_post(
            "/apiv2-files/kimi.gateway.file.v1.FileService/GetFileParseProgress", self._connect_progress
        )
        storage, origin, elsewhere = (web.Application(middlewares=[self._count]) for _ in range(3))
        elsewhere.router.add_route("*", "/{tail:.*}", self._refuse_elsewhere)
        storage.router.add_route("*", "/{tail:.*}", self._store)
        origin.router.add_route("*", "/{order}/{name:.*}", self._serve_file)
        self.url = await self._listen(app, self._port)
        self.storage_url = await self._listen(storage)
        self.origin_url = await self._listen(origin)
        self._elsewhere_url = (await self._listen(elsewhere)).replace("127.0.0.1", "localhost")
        return self

    async def _listen(self, app: web.Application, port: int = 0) -> str:
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            await runner.cleanup()
        if kind is None and self.violations:
            raise AssertionError(f"violations (seed {self.seed}): {self.violations}")

    def token(self, script: str, *faults: str) -> str:
        """A refresh token that no one else has, ordering `script` with `faults`."""
        return "+".join([script, *faults]) + f"~{next(self._numbers)}-{secrets.token_hex(4)}"

    def account(self, token: str) -> Account:
        """The record of the account that this refresh token belongs to."""
        if token not in self._accounts:
            order = parse_order(token)
            if order is None:
                raise KeyError(f"no such order: {token}")
            self._accounts[token] = Account(order, [token], random.Random(self._dice.random()))
        return self._accounts[token]

    def make_access_token(self, token: str, life_seconds: float = 900) -> str:
        """An access token of the account, as its owner may copy it from the page."""
        account = self.account(token)
        account.access_tokens.append(make_access_token(account.dice, False, life_seconds, self.overseas))
        return account.access_tokens[-1]

    @property
    def connections(self) -> int:
        """How many connections carried an answered call."""
        return len(self._used_connections)

    @property
    def connections_idle(self) -> int:
        """How many connections are open that carry no request: the pools of who calls have their other ends."""
        servers = [runner.server for runner in self._runners if runner.server is not None]
        return sum(len(server.connections) for server in servers) - self.requests_open

    async def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Return once `condition` holds; looked at whenever something changed. Raises `TimeoutError`."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def settle(self, token: str, seconds: float = 5.0) -> Account:
        """The account's record, once nothing of it runs and every conversation was removed."""
        account = self.account(token)
        await self.wait_until(lambda: account.settled, seconds)
        return account

    # The calls.

    async def _refresh(self, request: web.Request) -> web.StreamResponse:
        token = self._bearer(request)
        account = self._account_of_refresh(token)
        if account is None:
            return _failure(401, "auth.token.invalid", "the refresh token is dead")
        self._note(account, "refresh", request, None)
        if account.order.has("new-refresh"):
            return _failure(401, "auth.token.invalid", "use the new refresh")
        await self._order(account, "refresh", request)
        access_token, refresh_token = self._make_tokens(account, token)
        return web.json_response({"access_token": access_token, "refresh_token": refresh_token})

    def _make_tokens(self, account: Account, token: str) -> tuple[str, str]:
        access_token = make_access_token(account.dice, account.order.has("opaque"), overseas=self.overseas)
        account.access_tokens.append(access_token)
        self._changed.set()
        refresh_token = token
        if account.order.has("rotate"):
            refresh_token = f"{token.partition('~')[0]}~rotated-{secrets.token_hex(8)}"
            account.refresh_tokens = [refresh_token]
        return access_token, refresh_token

    async def _connect_refresh(self, request: web.Request) -> web.StreamResponse:
        if "Authorization" in request.headers:
            self._violate("a Bearer at the new refresh")
        body = await request.json()
        ((spelling, token),) = body.items()
        account = self._account_of_refresh(token)
        if account is None or account.order.has("old-refresh"):
            return web.json_response(connect_error("unauthenticated", "dead")["error"], status=401)
        self._note(account, "refresh", request, None)
        if account.order.has("camel") and spelling != "refreshToken":
            return web.json_response(connect_error("invalid_argument", "refreshToken")["error"], status=400)
        await self._order(account, "refresh", request)
        access_token, refresh_token = self._make_tokens(account, token)
        tokens: dict[str, Any] = {"accessToken": access_token, "refreshToken": refresh_token}
        return web.json_response({"data": tokens} if account.order.has("camel") else tokens)

    async def _research_usage(self, request: web.Request) -> web.StreamResponse:
        account = self._account_of_access(request, "research-usage", None)
        remain = 0 if account.order.has("no-quota") else 3
        return web.json_response({"remain": remain, "total": 5, "used": 5 - remain})

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        account = self._account_of_access(request, "models", await self._body(request, {}))
        self._check_connect_headers(account, request)
        await self._order(account, "models", request)
        return web.json_response(NEW_LIST if account.order.has("new-models") else OLD_LIST)

    async def _connect_ask(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/connect+json" or request.headers.get("Connect-Protocol-Version") != "1":
            self._violate("Content-Type or Connect-Protocol-Version")
        data = await request.read()
        if data[:1] != b"\0" or struct.unpack(">I", data[1:5])[0] != len(data) - 5:
            self._violate("no envelope")
        body = json.loads(data[5:])
        account = self._account_of_access(request, "ask", body)
        self._check_connect_headers(account, request)
        if sorted(body.keys() - {"kimiplusId", "agentMode", "chat_id"}) != ["message", "options", "scenario", "tools"]:
            self._violate(f"keys of Chat: {sorted(body)}")
        self._check_other_name(account, request, usual="kimi.gateway.chat.v1")
        self._check_question(account, body)
        block, *file_blocks = body["message"]["blocks"]
        files = self._files_of(account, [one["file"]["id"] for one in file_blocks])
        await self._order(account, "ask", request)
        if body["scenario"] != account.order.value("scenario", body["scenario"]):
            raise Refusal(self._connect_failure("invalid_argument", "no such scenario"))
        if account.order.has("stale-once") and account.fires("stale-once"):
            raise Refusal(self._connect_failure("unauthenticated", "the access token is dead"))
        if account.order.has("one-at-a-time") and account.streams_open:
            raise Refusal(self._connect_failure("resource_exhausted", "another answer is under way"))
        if "chat_id" in body:
            chat_id = body["chat_id"]
            if chat_id not in account.conversations or account.conversations[chat_id].removed:
                raise Refusal(web.json_response(connect_error("not_found", "no such chat")["error"], status=404))
            if body["message"].get("parent_id") != "m-assistant":
                self._violate("another parent_id")
            account.conversations[chat_id].asked.append(body)
        else:
            chat_id = f"{secrets.token_hex(4)}-{secrets.token_hex(6)}"
            account.conversations[chat_id] = Conversation([body], told=False)
        asked = body["options"].get("system_prompt", "") + block["text"]["content"]
        return await self._run_stream(request, account, asked, chat_id, files)

    def _check_other_name(self, account: Account, request: web.Request, usual: str) -> None:
        """Refuse the name that a call is known by, where the service shall know it by the other."""
        if account.order.has("other-names") and f"/{usual}." in request.path:
            raise Refusal(web.Response(status=404))

    def _check_question(self, account: Account, body: dict[str, Any]) -> None:
        """What is asked has to fit the model that it is asked of."""
        options, scenario = body["options"], body["scenario"]
        if options.keys() - {"thinking", "reasoning_effort", "model", "enable_plugin", "system_prompt"}:
            self._violate(f"options of Chat: {sorted(options)}")
        if body["message"]["scenario"] != scenario:
            self._violate("two scenarios")
        if not account.order.has("new-models"):
            return
        named = [model for model in NEW_LIST["availableModels"] if model["id"] == options.get("model")]
        asked = {"scenario": scenario, "kimiPlusId": body.get("kimiplusId"), "agentMode": body.get("agentMode")}
        if not named or any(named[0].get(key) != value for key, value in asked.items()):
            self._violate(f"a model asked as another: {asked} {options}")
            return
        efforts = [option["effort"] for option in named[0]["reasoningEffortOptions"]]
        if options.get("reasoning_effort") not in efforts:
            self._violate(f"an effort that the model does not have: {options}")
        if options["thinking"] is options["reasoning_effort"].endswith("_NONE"):
            self._violate(f"thinking and effort do not fit: {options}")

    def _files_of(self, account: Account, file_ids: list[str]) -> list[File]:
        """The files that a question refers to."""
        for file_id in file_ids:
            if file_id not in account.files or not account.files[file_id].ready:
                self._violate("a question that refers to a file which is not there")
        return [account.files[file_id] for file_id in file_ids if file_id in account.files]

    async def _sign(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"action": str, "name": str})
        account = self._account_of_access(request, "sign", body)
        await self._order(account, "sign", request)
        if body["action"] not in ("file", "image"):
            self._violate("another action")
        if body["action"] == "image" and account.order.has("no-pictures"):
            return _failure(400, "file.action", "no such action")
        name = f"prod/{secrets.token_hex(8)}"
        self._objects[name] = account, File(body["name"], body["action"])
        reply = {"url": f"{self.storage_url}/{name}?sign=a%2Fb&X-Expires=60", "object_name": name}
        if body["action"] == "image":
            reply["file_id"] = f"f{secrets.token_hex(9)}"
            account.files[reply["file_id"]] = self._objects[name][1]
        return web.json_response(reply)

    async def _store(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        account, file = self._objects[request.path[1:]]
        if request.method != "PUT" or request.raw_path.partition("?")[2] != "sign=a%2Fb&X-Expires=60":
            self._violate("another method or signature at the storage")
        if {"Authorization", "Cookie", "Origin", "Referer"} & headers.keys() or "x-msh" in str(headers).lower():
            self._violate("an account's header at the storage")
        if "Content-Length" not in headers or "Transfer-Encoding" in headers:
            self._violate("a chunked body at the storage")
        account.calls.append(Call("store", dict(headers), None))
        if account.order.has("storage-status"):
            return web.Response(status=int(account.order.value("storage-status")), text="<Error>expired</Error>")
        file.content_type = headers.get("Content-Type", "")
        await self._receive(request, request.content.iter_any(), account, file)
        return web.Response()

    async def _receive(self, request: web.Request, pieces: AsyncIterator[bytes], account: Account, file: File) -> None:
        """Take the bytes of a file."""
        if account.order.has("storage-early"):
            raise Refusal(web.Response()) if request.path.startswith("/apiv2") else web.HTTPOk()
        digest, size = hashlib.sha256(), 0
        with self._transfer():
            async for piece in pieces:
                digest.update(piece)
                file.head = file.head or bytes(piece[:200])
                size += len(piece)
                self.storage_bytes += len(piece)
                self._changed.set()
                if account.order.has("storage-stall") and size > 1000:
                    await self.stalled.wait()
                if account.order.has("storage-reset") and size > 1000 and request.transport is not None:
                    self._reset(request.transport)
                    await asyncio.Event().wait()
        file.size, file.sha256, file.stored = size, digest.hexdigest(), True

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        self.transfers_open += 1
        try:
            yield
        finally:
            self.transfers_open -= 1
            self._changed.set()

    async def _register(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await self._body(
            request, {"type": str, "name": str}, {"object_name": str, "file_id": str}
        )
        account = self._account_of_access(request, "register", body)
        await self._order(account, "register", request)
        if "file_id" in body:
            file_id, file = body["file_id"], account.files[body["file_id"]]
        else:
            file = self._objects[body["object_name"]][1]
            file_id = f"d{secrets.token_hex(9)}"
            account.files[file_id] = file
        if (body["type"] == "image") is not ("file_id" in body) or body["name"] != file.name or not file.stored:
            self._violate("a registration of something else")
        file.asked += 1
        pending = file.asked <= int(account.order.value("register-slow", "0"))
        status = {"status": "uploading"} if pending else self._dice.choice([{}, {"status": "initialized"}])
        return web.json_response({"id": file_id, "name": file.name, **status})

    async def _parse(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"ids": list})
        account = self._account_of_access(request, "parse", body)
        await self._order(account, "parse", request)
        if account.order.has("parse-fail"):
            return _failure(200, "file.parse", "the file cannot be read")
        for file_id in body["ids"]:
            account.files[file_id].ready = True
        if account.order.has("parse-stream"):
            return web.Response(text='data: {"event":"resp","status":"parsed"}\n\n', content_type="text/event-stream")
        return web.json_response({})

    async def _connect_upload(self, request: web.Request) -> web.StreamResponse:
        account = self._account_of_access(request, "upload", None)
        self._check_connect_headers(account, request)
        await self._order(account, "upload", request)
        if "Content-Length" not in request.headers:
            self._violate("a chunked form")
        form = await request.multipart()
        part: Any = await form.next()
        if part is None or part.name != "file" or not part.filename:
            self._violate("a form without the field `file`")
        file = File(part.filename, content_type=part.headers.get("Content-Type", ""))

        async def read() -> AsyncIterator[bytes]:
            while piece := await part.read_chunk(65_536):
                yield piece

        await self._receive(request, read(), account, file)
        if await form.next() is not None:
            self._violate("a form with more than one field")
        file_id = f"c{secrets.token_hex(9)}"
        account.files[file_id] = file
        return web.json_response({"file": {"id": file_id, "name": file.name}})

    async def _connect_progress(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"file_ids": list})
        account = self._account_of_access(request, "progress", body)
        self._check_connect_headers(account, request)
        await self._order(account, "progress", request)
        statuses = []
        for file_id in body["file_ids"]:
            file = account.files[file_id]
            file.asked += 1
            file.ready = file.asked > int(account.order.value("parse-slow", "0"))
            status = "FAILED" if account.order.has("parse-fail") else "SUCCESS" if file.ready else "RUNNING"
            statuses.append({"fileId": file_id, "status": f"PROCESS_STATUS_{status}"})
        return web.json_response({"progresses": statuses})

    # The origin of files.

    async def _serve_file(self, request: web.Request) -> web.StreamResponse:
        headers = request.headers
        self.fetches.append(request.path_qs)
        self._changed.set()
        forbidden = {"Authorization", "Cookie", "Origin", "Referer", "Sec-Ch-Ua"} & headers.keys()
        if forbidden or request.method != "GET" or "Mozilla" in headers.get("User-Agent", ""):
            self._violate(f"{request.method} at an origin, with {sorted(forbidden)}")
        if headers.get("Accept-Encoding") != "identity":
            self._violate("another Accept-Encoding at an origin")
        size, *faults = request.match_info["order"].split("+")
        order = dict(fault.partition("=")[::2] for fault in faults)
        if order.keys() - ORIGIN_FAULTS.keys():
            self._violate(f"no such fault of an origin: {sorted(order)}")
        if "to" in request.query:
            return web.Response(status=302, headers={"Location": request.query["to"]})
        if (left := int(order.get("redirect", "0"))) > 0:
            path = f"/{size}+redirect={left - 1}/{request.match_info['name']}"
            return web.Response(status=307, headers={"Location": path})
        if "status" in order:
            return web.Response(status=int(order["status"]), body=_HTML, content_type="text/html")
        if "no-http" in order and request.transport is not None:
            request.transport.write(b"220 smtp.example.com ESMTP\r\n")
            request.transport.close()
        if "hang" in order or "no-http" in order:
            await asyncio.Event().wait()
        with self._transfer():
            self.origins_open += 1
            self.origins_most = max(self.origins_most, self.origins_open)
            try:
                return await self._send_file(request, int(size), order)
            finally:
                self.origins_open -= 1

    async def _send_file(self, request: web.Request, size: int, order: dict[str, str]) -> web.StreamResponse:
        block = bytes(65_536) if "zeros" in order else _LINE if "text" in order else _BLOCK
        pieces = [_LINE[: max(0, size)], b"x" * (size - len(_LINE))] if "text" in order else make_content(size, block)
        response = web.StreamResponse()
        response.headers["Content-Type"] = order.get("type", "application/octet-stream").replace(".", "/", 1)
        if "raw-disposition" in order:
            response.headers["Content-Disposition"] = f"attachment; {unquote(order['raw-disposition'])}"
        if "disposition" in order:
            response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{order['disposition']}"
        encoding = next((name for name in ("gzip", "deflate") if name in order), order.get("encoding"))
        if encoding is not None:
            packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
            body = b"".join(map(packer.compress, pieces)) + packer.flush()
            body = body[: len(body) // 2] if "half" in order else body
            pieces, size = [body[at : at + 65_536] for at in range(0, len(body), 65_536)], len(body)
            response.headers["Content-Encoding"] = encoding
        if not order.keys() & {"no-length", "cut-chunk", "endless", *_BEHIND}:
            response.content_length = size
        await response.prepare(request)
        await self._send_pieces(request, response, pieces, size, order)
        await response.write_eof()
        return response

    async def _send_pieces(
        self,
        request: web.Request,
        response: web.StreamResponse,
        pieces: Iterable[bytes],
        size: int,
        order: dict[str, str],
    ) -> None:
        sent, transport = 0, request.transport
        assert transport is not None
        for piece in pieces:
            await response.write(piece)
            sent += len(piece)
            if "slow" in order:
                await asyncio.sleep(float(order["slow"]))
            if sent * 2 < size:
                continue
            if "after-storage" in order:
                await self.wait_until(lambda: self.storage_bytes > 0)
            if "stall" in order:
                await asyncio.Event().wait()
            if "cut" in order:
                self._reset(transport)
            elif "close" in order:
                transport.close()
            elif "cut-chunk" in order:
                transport.write(b"zz\r\nthis is no chunk\r\n")
                transport.close()
            if order.keys() & {"cut", "close", "cut-chunk"}:
                await asyncio.Event().wait()
        while "endless" in order:
            await response.write(_BLOCK)
        for name in order.keys() & _BEHIND.keys():
            while True:
                await response.write(_BEHIND[name])

    async def _connect_remove(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"chat_id": str})
        account = self._account_of_access(request, "remove", body)
        self._check_connect_headers(account, request)
        self._check_other_name(account, request, usual="kimi.chat.v1")
        conversation = account.conversations.get(body["chat_id"])
        if conversation is None:
            self._violate("a chat that is not the account's")
            return _failure(404, "chat.not_found", "no such chat")
        return await self._take_away(account, conversation, request)

    async def _connect_stop(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"chat_id": str, "message_id": str})
        account = self._account_of_access(request, "stop", body)
        self._check_connect_headers(account, request)
        conversation = account.conversations.get(body["chat_id"])
        if conversation is None or conversation.removed or body["message_id"] != "m-assistant":
            self._violate("a stop of another answer, or after its removal")
        if account.order.has("no-stop"):
            return web.json_response(connect_error("internal", "not stopped")["error"], status=500)
        return web.json_response({})

    def _check_connect_headers(self, account: Account, request: web.Request) -> None:
        claims = read_claims(self._bearer(request))
        named = {"x-msh-device-id": "device_id", "x-msh-session-id": "ssid", "x-traffic-id": "sub"}
        for header, claim in named.items():
            if not request.headers.get(header) or (claims and request.headers[header] != claims[claim]):
                self._violate(f"{header} of {request.path}")
        page = {"x-msh-platform": "web", "x-msh-version": self.web_version}
        if not page.items() <= {name.lower(): value for name, value in request.headers.items()}.items():
            self._violate("x-msh-platform or x-msh-version")
        if not request.headers.get("x-language") or not request.headers.get("r-timezone"):
            self._violate("x-language or r-timezone")

    def _connect_failure(self, code: str, message: str) -> web.Response:
        body = make_envelope(connect_error(code, message), 2)
        return web.Response(body=body, content_type="application/connect+json")

    async def _open(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, {"name": str, "is_example": bool}, {"kimiplus_id": str})
        if not re.fullmatch(r"cmpl-[0-9a-f]{32}", str(body.get("name"))):
            self._violate("a conversation's name")
        account = self._account_of_access(request, "open", body)
        await self._order(account, "open", request)
        if account.order.has("no-id"):
            return web.json_response({"name": body["name"]})
        conversation_id = secrets.token_hex(10)
        account.conversations[conversation_id] = Conversation()
        self._changed.set()
        return web.json_response({"id": conversation_id, "name": body["name"]})

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        account = self._account_of_access(request, "remove", None)
        conversation = self._conversation(account, request)
        return await self._take_away(account, conversation, request)

    async def _take_away(
        self, account: Account, conversation: Conversation, request: web.Request
    ) -> web.StreamResponse:
        if conversation.removed:
            self._violate("a conversation removed twice")
        await self._order(account, "remove", request)
        conversation.removed += 1
        self._changed.set()
        return web.json_response({})

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        optional = {"segment_id": str, "action": str, "kimiplus_id": str, "use_math": bool, "use_research": bool}
        body = await self._body(request, {"messages": list, "refs": list, "use_search": bool}, optional)
        account = self._account_of_access(request, "ask", body)
        conversation = self._conversation(account, request)
        if conversation.removed:
            self._violate("a removed conversation asked")
        if [sorted(message) for message in body["messages"]] != [["content", "role"]]:
            self._violate("not one message of role and content")
        conversation.asked.append(body)
        self._changed.set()
        if body.get("action") == "continue" and body["segment_id"] != "cs1segment0000000001":
            self._violate("another segment continued")
        await self._order(account, "continue" if "segment_id" in body else "ask", request)
        if account.order.has("one-at-a-time") and account.streams_open:
            return _failure(200, "chat.user_stream_pushing", "another answer is under way")
        account.round = sum("segment_id" in asked for asked in conversation.asked)
        files = self._files_of(account, body["refs"])
        return await self._run_stream(request, account, body["messages"][0]["content"], "", files)

    async def _run_stream(
        self, request: web.Request, account: Account, asked: str, chat_id: str, files: list[File]
    ) -> web.StreamResponse:
        if _AGAIN in asked and account.order.has("again-status"):
            return _failure(int(account.order.value("again-status")), "order.again", "ordered for the second try")
        account.streams_open += 1
        self._changed.set()
        try:
            return await self._stream(request, account, make_steps(account.order, asked, files), chat_id)
        except (asyncio.CancelledError, ConnectionError):
            account.streams_cut += 1
            raise
        finally:
            account.streams_open -= 1
            self._changed.set()

    async def _stream(
        self, request: web.Request, account: Account, steps: tuple[Step, ...], chat_id: str
    ) -> web.StreamResponse:
        """Stream an answer, in connect where there is a `chat_id`."""
        kind = "application/connect+json" if chat_id else "text/event-stream; charset=utf-8"
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        order = account.order
        pace = float(order.value("pace", "0"))
        loop = asyncio.get_running_loop()
        due = loop.time()
        limits = {name: int(order.value(name, "0")) for name in _BREAKS if order.has(name)}
        if sum(map(len, (one.asked for one in account.conversations.values()))) > 1:
            limits |= {name: int(order.value(name)) for name in ("again-cut", "again-stall") if order.has(name)}
        number, written = 0, b""
        for piece in self._pieces(account, _part(steps, account.round), chat_id):
            if number == limits.get("heartbeats"):
                await self._beat_for_ever(response)
            elif number in limits.values():
                await self._break(request, account)
            if isinstance(piece, Wait):
                await (asyncio.sleep(piece.seconds) if piece.seconds is not None else asyncio.Event().wait())
                continue
            await response.write(piece)
            number += 1
            if chat_id and not account.conversations[chat_id].told:
                written += piece
                account.conversations[chat_id].told = chat_id.encode() in written
                self._changed.set()
            if pace:
                due += pace
                await asyncio.sleep(max(0.0, due - loop.time()))
            elif self._unsteady:
                await asyncio.sleep(0)
        if number in limits.values():
            await self._break(request, account)
        if order.has("endless"):
            await self._write_for_ever(response, steps[:1], chat_id)
        if order.has("linger"):
            await asyncio.Event().wait()
        await response.write_eof()
        return response

    @staticmethod
    async def _beat_for_ever(response: web.StreamResponse) -> None:
        while True:
            await response.write(make_envelope({"heartbeat": {}}))
            await asyncio.sleep(0.02)

    @staticmethod
    async def _write_for_ever(response: web.StreamResponse, first: tuple[Step, ...], chat_id: str) -> None:
        again = render_connect(first * 2, chat_id, None)[4] if chat_id else render_stream(first, None)[2]
        while isinstance(again, bytes):
            await response.write(again)
            await asyncio.sleep(0.01)

    def _pieces(self, account: Account, steps: tuple[Step, ...], chat_id: str) -> Iterator[bytes | Wait]:
        order = account.order
        steady = not self._unsteady or order.has("steady") or order.has("pace")
        dice = None if steady else account.dice
        if order.has("endless"):
            steps = steps[:1]
        if any(order.has(fault) for fault in (*_BREAKS, "endless", "again-cut", "again-stall")):
            dice = None  # pieces are counted: one is one event, the first two or three before the text
        if chat_id:
            rendered = render_connect(steps, chat_id, dice, stages=order.has("stages"))
            rendered = rendered[:-3] if order.has("endless") else rendered
        else:
            rendered = render_stream(steps, dice)
        if any(isinstance(piece, Wait) for piece in rendered):
            yield from rendered
            return
        pieces = [piece for piece in rendered if isinstance(piece, bytes)]
        table = CONNECT_SHAPES if chat_id else SHAPES
        shapes = [name for name in order.faults if name in table]
        for name in shapes:
            pieces = table[name](pieces)
        yield from pieces if dice is None or shapes else cut_anywhere(b"".join(pieces), dice)

    async def _break(self, request: web.Request, account: Account) -> None:
        if account.order.has("stall") or account.order.has("again-stall"):
            await asyncio.Event().wait()
        transport = request.transport
        if transport is None:
            return
        if account.order.has("cut-chunk"):
            transport.write(b"zz\r\nthis is no chunk\r\n")
            transport.close()
        else:
            self._reset(transport)
        await asyncio.sleep(0)

    # Checks and orders.

    async def _order(self, account: Account, step: str, request: web.Request) -> None:
        """Do what the account's order says of `step`. Raises `Refusal` with the reply."""
        order = account.order
        if (seconds := order.at("slow", step)) is not None:
            await asyncio.sleep(float(seconds))
        if order.at("silent", step) is not None:
            await asyncio.Event().wait()
        key = id(request.transport)
        kept = key in self._used_connections and order.at("close-kept", step) is not None
        if order.at("close", step) is not None or (kept and account.fires("close-kept")):
            if request.transport is not None:
                self._reset(request.transport)
            await asyncio.Event().wait()
        if order.at("unauthorized-always", step) is not None:
            raise Refusal(_failure(401, "auth.token.invalid", "the access token is dead"))
        if order.at("unauthorized-once", step) is not None and account.fires("unauthorized-once"):
            raise Refusal(_failure(401, "auth.token.invalid", "the access token is dead"))
        if (status := order.at("status", step)) is not None:
            response = _failure(int(status), "order.status", f"ordered status {status}")
            if order.has("retry-after"):
                response.headers["Retry-After"] = order.value("retry-after")
            raise Refusal(response)
        if (reason := order.at("reason", step)) is not None:
            error = connect_error("resource_exhausted", "ordered reason", reason)["error"]
            raise Refusal(web.json_response(error, status=429))
        if (status := order.at("unknown", step)) is not None:
            response = web.json_response({"code": "unknown", "message": "ordered status"}, status=int(status))
            if order.has("retry-after"):
                response.headers["Retry-After"] = order.value("retry-after")
            raise Refusal(response)
        if (kind := order.at("error-type", step)) is not None:
            if request.content_type == "application/connect+json":
                raise Refusal(self._connect_failure(_CONNECT_TYPES.get(kind, "internal"), f"ordered error {kind}"))
            raise Refusal(_failure(200, kind, "ordered error"))
        if order.at("redirect", step) is not None:
            raise Refusal(web.Response(status=302, headers={"Location": f"{self._elsewhere_url}/elsewhere"}))
        if order.at("wrong-type", step) is not None:
            raise Refusal(web.Response(body=_HTML, content_type="text/html"))
        if (status := order.at("html", step)) is not None:
            raise Refusal(web.Response(body=_HTML * 1000, status=int(status), content_type="text/html"))
        if order.at("bomb", step) is not None:
            await self._bomb(request)

    async def _bomb(self, request: web.Request) -> None:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"id":"')
        for _ in range(1000):
            await response.write(b"x" * 65_536)

    @web.middleware
    async def _count(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests_open += 1
        try:
            return await handler(request)
        finally:
            self.requests_open -= 1
            self._changed.set()

    async def _refuse_elsewhere(self, request: web.Request) -> web.StreamResponse:
        self._violate("a redirect to another host was followed")
        return web.Response(status=404)

    @web.middleware
    async def _check(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        headers = request.headers
        if "Cookie" in headers:
            self._violate("a cookie")
        browser = _BROWSER.fullmatch(headers.get("User-Agent", ""))
        if browser is None or f'"Google Chrome";v="{browser[1]}"' not in headers.get("Sec-Ch-Ua", ""):
            self._violate("no browser of one version")
        if headers.get("Origin") != self.url or not headers.get("Sec-Ch-Ua-Platform"):
            self._violate("no Origin, or no platform")
        place = request.match_info.get("id")
        if request.path.endswith(("DeleteChat", "CancelChat")):
            place = (await request.json()).get("chat_id")
        if headers.get("Referer") != (f"{self.url}/chat/{place}" if place else self.url):
            self._violate(f"Referer of {request.method} {request.path}")
        try:
            paths = ("/api/chat", "/api/pre-sign-url", "/api/file", *(["/api/auth"] if self.refresh_retired else []))
            retired = self._answer_as_retired() if request.path.startswith(paths) else None
            response = retired or await handler(request)
        except Refusal as refusal:
            response = refusal.response
        except web.HTTPException as error:
            self._violate(f"{request.method} {request.path}: {error.status}")
            raise
        if request.transport is not None:
            self._used_connections[id(request.transport)] = request.transport
        if not response.prepared:
            response.set_cookie("session", "do-not-send-me-back")
        return response

    def _answer_as_retired(self) -> web.Response | None:
        if self.retired == "redirect":
            return web.Response(status=301, headers={"Location": "https://www.kimi.com/"})
        if self.retired == "html":
            return web.Response(body=_HTML, content_type="text/html")
        return web.Response(status=int(self.retired)) if self.retired else None

    def _violate(self, what: str) -> None:
        self.violations.append(what)
        self._changed.set()

    def _note(self, account: Account, step: str, request: web.Request, body: Any) -> None:
        account.calls.append(Call(step, dict(request.headers), body))
        self._changed.set()

    @staticmethod
    def _bearer(request: web.Request) -> str:
        return request.headers.get("Authorization", "").removeprefix("Bearer ")

    def _account_of_refresh(self, token: str) -> Account | None:
        for account in self._accounts.values():
            if token in account.refresh_tokens:
                return account
        order = parse_order(token)
        if "~rotated-" in token or order is None or token in self._accounts:
            return None
        if order.has("overseas") is not self.overseas:
            return None
        return self.account(token)

    def _account_of_access(self, request: web.Request, step: str, body: Any) -> Account:
        token = self._bearer(request)
        for account in self._accounts.values():
            if token in account.access_tokens:
                self._note(account, step, request, body)
                return account
        self._violate(f"{step} without an access token")
        raise Refusal(_failure(401, "auth.token.invalid", "no such access token"))

    def _conversation(self, account: Account, request: web.Request) -> Conversation:
        conversation = account.conversations.get(request.match_info["id"])
        if conversation is None:
            self._violate("a conversation that is not the account's")
            raise Refusal(_failure(404, "chat.not_found", "no such conversation"))
        return conversation

    async def _body(
        self, request: web.Request, shape: dict[str, type], optional: dict[str, type] | None = None
    ) -> dict[str, Any]:
        if request.content_type != "application/json":
            self._violate(f"Content-Type of {request.path}")
        body: dict[str, Any] = await request.json()
        kinds = {key: type(value) for key, value in body.items()}
        if (
            any(kinds.get(key) is not kind for key, kind in shape.items())
            or kinds.items() - shape.items() - (optional or {}).items()
        ):
            self._violate(f"keys of {request.path}: {sorted(body)}")
        return body

    @staticmethod
    def _reset(transport: asyncio.BaseTransport) -> None:
        """Reset the connection: its peer sees a broken one, not an orderly end."""
        raw = transport.get_extra_info("socket")
        with suppress(OSError, AttributeError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()  # type: ignore[attr-defined]


def _failure(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error_type": kind, "message": message, "detail": "…"}, status=status)


# ==== 5. Program ============================================================
#
# The simulator by itself.


async def _run(port: int, seed: int | None) -> None:
    async with Simulator(port=port, seed=seed) as simulator:
        print(f"The simulator answers at {simulator.url} (seed {simulator.seed}). Start the proxy with")
        print(f"    KIMI_BASE_URL={simulator.url} KIMI_AUTH_URL={simulator.url} python kimi_proxy.py")
        print("and use as token one of:", ", ".join([*SCRIPTS, *TALKS, "long", "read"]))
        print(
            "each with +FAULT[=VALUE] as often as you like:",
            ", ".join({**SHAPES, **CONNECT_SHAPES, **FAULTS}),
        )
        print(f"Files are at {simulator.origin_url}/SIZE[+FAULT[=VALUE]]…/NAME (PROXY_ALLOW_PRIVATE_URLS=1),")
        print("with the faults:", ", ".join(ORIGIN_FAULTS), flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            simulator.violations.clear()


def main() -> int:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(description="A look-alike of the Kimi web service.")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--seed", type=int, default=None, help="repeat a run that printed this seed")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(options.port, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
