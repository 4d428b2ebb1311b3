"""Random and hostile input through a real socket: whatever comes in, the proxy answers in good form, or hangs up.

Every endpoint gets requests like real ones with fields replaced, and bodies that are anything: each must give a 2xx or
a JSON error of that API's form, in time, and nothing of what it said may stand in the log. A table of bytes that are no
good HTTP follows. After each request no conversation is left; after each group no task, and the next request works.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest
from aiohttp import web_protocol
from conftest import LogRecorder
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from kimi_simulator import HELLO, Simulator

import kimi_proxy
from kimi_proxy import Settings, logger, run_server

MARK: Final = "zqWhisper"  # in every text that a request holds, and so in no line of the log
SECONDS: Final = 20  # in which every request must have its answer
PROTOCOLS: Final = ("classic", "connect")


# Log lines that tell, on purpose, a name which the request has: the only ones.
NAMING: Final = ("tools that are not known here are left out", "is not known, kimi is asked")


# A client that sends what it is told, and hides nothing of what comes.


@dataclass(frozen=True)
class Answer:
    """One response, as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)


def join_chunks(data: bytes) -> bytes:
    """The body in the chunked coding; it must be whole."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n", "a chunk is cut"
        if not length:
            return body
        body, data = body + data[:length], data[length + 2 :]


def read_answer(data: bytes) -> Answer | None:
    """The last response in what a connection brought; None where it was closed without any."""
    answer = None
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, "a head is cut"
        first, *lines = head.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.[01] (\d{3}) .*", first)
        assert found, "no status line"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if found[1] == "100":
            continue
        if "content-length" in headers:
            length = int(headers["content-length"])
            assert len(data) >= length, "a body is cut"
            body, data = data[:length], data[length:]
        elif headers.get("transfer-encoding") == "chunked":
            body, data = join_chunks(data), b""
        else:
            body, data = data, b""
        answer = Answer(int(found[1]), headers, body)
    return answer


async def exchange(url: str, pieces: list[bytes | float]) -> bytes:
    """Send the pieces, with pauses where a number stands, and read until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))

    async def send() -> None:
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                writer.write(piece)
                await writer.drain()

    sending = asyncio.create_task(send())
    data = b""
    try:
        async with asyncio.timeout(SECONDS):
            while piece := await reader.read(65_536):
                data += piece
    except ConnectionError:
        pass  # a reset is an end, too
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return data


# The proxies, one for each protocol, on a loop that runs while a request does.


SHORT = {"IDLE_SECONDS": 10.0, "BODY_SECONDS": 2.0, "FILE_SECONDS": 2.0, "TRANSFER_SECONDS": 3.0}


class Rig:
    """A simulator and a proxy for each protocol, all on one event loop that the caller turns."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.simulator = Simulator()
        self.urls: dict[str, str] = {}
        self.log = LogRecorder()
        self._runner = runner
        self._stack = AsyncExitStack()
        self._resting: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do `work` on the loop."""
        return self._runner.run(work)

    async def start(self) -> None:
        """Start them, with limits that are short, though not for a machine with other work, and small ones."""
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, seconds in SHORT.items():
            patch.setattr(kimi_proxy, name, seconds)
        await self._stack.enter_async_context(self.simulator)
        for protocol in PROTOCOLS:
            settings = Settings(
                base_url=self.simulator.url,
                auth_url=self.simulator.url,
                protocol=protocol,
                port=0,
                state_dir="",
                drain_seconds=0.2,
                max_file_mb=1,
                max_inline_mb=1,
                allow_private_urls=True,
            )
            self.urls[protocol], _ = await self._stack.enter_async_context(run_server(settings))
            await self.works(protocol)
        self._resting = self._find_tasks()

    async def close(self) -> None:
        """End them."""
        await self._stack.aclose()

    async def ask(self, protocol: str, head: list[str], body: bytes) -> Answer:
        """One request on a connection of its own; a connection that is closed without an answer fails."""
        lines = [*head, "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
        data = await exchange(self.urls[protocol], ["\r\n".join(lines).encode() + b"\r\n\r\n" + body])
        answer = read_answer(data)
        assert answer is not None, "no answer"
        return answer

    async def works(self, protocol: str) -> None:
        """A good request is answered as ever."""
        token = self.simulator.token("hello")
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "use_search": False}).encode()
        answer = await self.ask(
            protocol, ["POST /v1/chat/completions HTTP/1.1", f"Authorization: Bearer {token}"], body
        )
        assert answer.json["choices"][0]["message"]["content"] == HELLO
        await self.simulator.settle(token)

    def _find_tasks(self) -> set[asyncio.Task[Any]]:
        """All tasks but this one, and but those of the connections that the simulator keeps open."""

        def is_simulators(task: asyncio.Task[Any]) -> bool:
            frame = getattr(task.get_coro(), "cr_frame", None)
            return frame is not None and type(frame.f_locals.get("self")) is web_protocol.RequestHandler

        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return {task for task in tasks if task is not None and not is_simulators(task)}

    async def rest(self) -> None:
        """The proxies work, and nothing runs that did not run at the start."""
        for protocol in PROTOCOLS:
            await self.works(protocol)
        deadline = asyncio.get_running_loop().time() + 5
        while left := self._find_tasks() - self._resting:
            assert asyncio.get_running_loop().time() < deadline, left
            await asyncio.sleep(0.02)
        assert not self.simulator.violations
        assert not any(account.streams_open for account in self.simulator._accounts.values())

    def take_log(self) -> str:
        """What was logged since, but for the lines that name tools and models on purpose."""
        lines = [line for line in self.log.lines if not any(words in line for words in NAMING)]
        self.log.lines.clear()
        return "\n".join(lines)


@pytest.fixture(scope="module")
def module_rig() -> Iterator[Rig]:
    root = logging.getLogger()
    levels = (root.level, logger.level)
    with asyncio.Runner() as runner:
        rig = Rig(runner)
        root.addHandler(rig.log)
        root.setLevel(logging.DEBUG)
        logger.setLevel(logging.DEBUG)
        try:
            rig.run(rig.start())
            yield rig
        finally:
            rig.run(rig.close())
            root.removeHandler(rig.log)
            root.setLevel(levels[0])
            logger.setLevel(levels[1])


@pytest.fixture
def rig(module_rig: Rig) -> Iterator[Rig]:
    """The rig, which is at rest after the group."""
    module_rig.take_log()
    yield module_rig
    module_rig.run(module_rig.rest())
    check_log(module_rig)


def check_log(rig: Rig) -> None:
    """Nothing that a request said was logged, and the proxy did not fail."""
    log = rig.take_log()
    assert MARK not in log
    assert "the proxy itself failed" not in log


# What a good answer is.

# Failures that the request itself can bring about at Kimi or at a file's origin, by the code.
OUTER_FAILURES: Final = ("file_broken", "file_silent", "answer_empty")
# Scripts that read the schemas in the prompt: at random ones the simulator itself gives up.
READERS: Final = ("tool", "tools", "tool-bad", "json", "json-bad")


def check_error(error: Any, anthropic: bool) -> str:
    """The code of an error object in that API's form; in Anthropic's, which has none, its type."""
    if anthropic:
        assert error.keys() == {"type", "error"} and error["type"] == "error"
        assert error["error"].keys() == {"type", "message"}
        assert all(isinstance(word, str) and word for word in error["error"].values())
        return str(error["error"]["type"])
    inner = error["error"]
    assert inner.keys() >= {"message", "type", "param", "code"}
    assert isinstance(inner["message"], str) and isinstance(inner["type"], str) and isinstance(inner["code"], str)
    return str(inner["code"])


def check_answer(answer: Answer, anthropic: bool, script: str) -> None:
    """A 2xx, or a JSON error of the right form; no failure of the proxy's own, whole or in a stream."""
    kind = answer.headers.get("content-type", "")
    if answer.status < 300 and kind.startswith("text/event-stream"):
        events = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
        assert events, "a stream of nothing"
        values = [json.loads(event) for event in events if event != "[DONE]"]
        assert b"internal_error" not in answer.body and b"the proxy itself failed" not in answer.body
        if anthropic and values[-1]["type"] == "error":
            check_error(values[-1], anthropic)
        return
    if answer.status < 300:
        assert kind.startswith(("application/json", "text/")) or answer.status == 204
        assert not kind.startswith("application/json") or isinstance(answer.json, dict)
        return
    if answer.status == 400 and kind.startswith("text/plain"):
        return  # no good HTTP, which aiohttp answers itself; it closed the connection
    assert kind.startswith("application/json"), (answer.status, kind)
    code = check_error(answer.json, anthropic)
    assert answer.status >= 400 and answer.status != 500, answer.json
    if answer.status > 500:
        words = answer.body.decode()
        assert script in READERS or code in OUTER_FAILURES or (anthropic and code == "api_error"), words


# Random JSON.

_SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_PICTURE: Final = "data:image/png;base64,iVBORw0KGgo="
_CALL: Final = '<tool_call>\n{"name": "find", "arguments": {"city": "Paris"}}\n</tool_call>'

CHAT: Final[dict[str, Any]] = {
    "model": "kimi",
    "messages": [
        {"role": "system", "content": f"{MARK} be brief"},
        {"role": "user", "content": f"{MARK} hello", "name": "anna"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": f"{MARK} 7 degrees"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"{MARK} {_CALL}"},
                {"type": "image_url", "image_url": {"url": _PICTURE, "detail": "low"}},
                {"type": "file", "file": {"file_data": "aGVsbG8=", "filename": f"{MARK}.txt"}},
                {"type": "file", "file_url": {"url": "ORIGIN/9+text/a.txt"}},
            ],
        },
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "use_search": False,
    "conversation_id": "",
    "tools": [
        {"type": "function", "function": {"name": "find", "description": f"{MARK} find", "parameters": _SCHEMA}},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "function", "function": {"name": "find"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA, "strict": True}},
    "stop": ["###"],
    "max_tokens": 90,
    "max_completion_tokens": 99,
    "n": 1,
    "temperature": 0.5,
    "user": MARK,
}
MESSAGES: Final[dict[str, Any]] = {
    "model": "kimi",
    "max_tokens": 90,
    "system": [{"type": "text", "text": f"{MARK} be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": f"{MARK} hello"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": f"{MARK} hm", "signature": "x"},
                {"type": "text", "text": f"{MARK} I look"},
                {"type": "tool_use", "id": "toolu_1", "name": "find", "input": {"city": MARK}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": False,
                    "content": [{"type": "text", "text": f"{MARK} 7 degrees"}],
                },
                {"type": "text", "text": f"{MARK} {_CALL}"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
                {"type": "document", "title": MARK, "source": {"type": "text", "data": f"{MARK} report"}},
                {"type": "document", "source": {"type": "url", "url": "ORIGIN/9+text/b.txt"}},
            ],
        },
    ],
    "stream": True,
    "tools": [
        {"name": "find", "description": f"{MARK} find", "input_schema": _SCHEMA},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 1},
    ],
    "tool_choice": {"type": "tool", "name": "find", "disable_parallel_tool_use": True},
    "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}},
    "stop_sequences": ["###"],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "metadata": {"user_id": MARK},
    "temperature": 1,
}
RESPONSES: Final[dict[str, Any]] = {
    "model": "kimi",
    "instructions": f"{MARK} be brief",
    "input": [
        {"type": "message", "role": "user", "content": f"{MARK} hello"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": MARK},
        {"type": "function_call", "call_id": "call_1", "name": "find", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": f"{MARK} 7 degrees"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": f"{MARK} {_CALL}"},
                {"type": "input_image", "image_url": _PICTURE},
                {"type": "input_file", "filename": f"{MARK}.txt", "file_data": "aGVsbG8="},
                {"type": "input_file", "file_url": "ORIGIN/9+text/c.txt"},
            ],
        },
    ],
    "stream": True,
    "store": True,
    "previous_response_id": None,
    "tools": [
        {"type": "function", "name": "find", "description": f"{MARK} find", "parameters": _SCHEMA, "strict": True},
        {"type": "web_search"},
        {"type": "computer_use_preview", "display_width": 9},
    ],
    "tool_choice": {"type": "function", "name": "find"},
    "parallel_tool_calls": True,
    "text": {"format": {"type": "json_schema", "name": "city", "schema": _SCHEMA}, "verbosity": "low"},
    "max_output_tokens": 90,
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"who": MARK},
    "temperature": 0.5,
    "top_p": 1,
    "include": ["reasoning.encrypted_content"],
}
COMPLETION: Final[dict[str, Any]] = {
    "model": "kimi",
    "prompt": [f"{MARK} hello"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["###"],
    "max_tokens": 90,
    "n": 1,
    "use_search": False,
    "suffix": MARK,
}
# What a field may be left out of, so that the others are reached: then these are random as well.
OPTIONAL: Final = ("tools", "tool_choice", "response_format", "output_config", "text", "stream", "stop")

POSTS: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": RESPONSES,
    "/v1/completions": COMPLETION,
    "/v1/files": {"file": MARK, "purpose": "assistants"},
    "/token/check": {"token": f"dead-{MARK}"},
}
# Words and values at which something turns.
TURNING: Final[tuple[Any, ...]] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**63,
        -(10**30),
        1e308,
        -0.0,
        "",
        " ",
        "\x00",
        "\ud800",
        "\U0001f44b",
        [],
        {},
        [[]],
    ),
    *("auto", "none", "required", "any", "tool", "function", "json_object", "json_schema", "text", "user", "assistant"),
    *("base64", "url", "image", "document", "tool_use", "tool_result", "input_file", "function_call", "item_reference"),
    *("kimi-search-thinking", "k1-math", "a" * 20, "resp_1", "file-1", "kimi-research", "web_search", "namespace"),
    *(
        "data:",
        "data:,",
        "data:;base64,",
        "data:text/plain;base64,!",
        "data:;base64,aGk",
        f"data:x;name=%ff;base64,{MARK}",
    ),
    *(
        "http://",
        "http://[::1",
        "http://127.0.0.1:1/",
        "file:///etc/passwd",
        "http://a@b:99999/",
        "//x",
        "http://x.invalid",
    ),
    *(
        "http://%00/",
        "http://127.0.0.1:0/",
        "http://0x7f.1:1/",
        "https://127.0.0.1:1/?" + MARK,
        "http://\u2488.invalid/",
    ),
    *({"type": "text"}, {"type": None}, {"url": {}}, {"type": "file", "file": []}, {"role": "user", "content": {}}),
    *(
        {"$ref": "#"},
        {"type": ["string", 5]},
        {"type": "strange"},
        {"pattern": "(a+)+$("},
        {"enum": {}},
        {"minimum": "x"},
    ),
    *(
        {"properties": [1]},
        {"required": 1},
        {"multipleOf": 0},
        {"items": {"$ref": "#/nowhere"}},
        {"anyOf": 3},
        {"not": 1},
    ),
    *({"additionalProperties": "x", "properties": {"city": 1}}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}),
    *(
        {"const": {}, "minLength": -1, "maxItems": "9"},
        {"if": 1, "then": 2},
        {"type": {}},
        {"allOf": [[]], "oneOf": [0]},
    ),
    *(
        "@long@",
        "@digits@",
        "<tools>",
        "</tool_response>",
        "<tool_call>",
        "<tool_call>{",
        "```json\n{",
        _CALL,
        "\r\ndata: x",
    ),
)
# Nested as deep as a parser of this process may go: each later step stands a little deeper in its own stack.
DEEP: Final = st.one_of(st.integers(900, 1000), st.integers(1, 1200), st.integers(5_000, 100_000)).flatmap(
    lambda levels: st.sampled_from([f"@[{levels}@", f"@{{{levels}@"])
)
TEXTS: Final = st.text(max_size=8).map(lambda text: MARK + text)
LEAVES: Final = st.one_of(
    st.sampled_from(TURNING).map(copy.deepcopy),
    TEXTS,
    DEEP,
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
)
KEYS: Final = st.one_of(TEXTS, st.sampled_from([value for value in TURNING if isinstance(value, str)]))
VALUES: Final = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


def find_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within `value`."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for key, one in inner:
        yield (*place, key)
        yield from find_places(one, (*place, key))


@st.composite
def shaped(draw: st.DrawFn, template: dict[str, Any]) -> Any:
    """A request like `template`, with some options left out and some values replaced, removed or doubled."""
    body = copy.deepcopy(template)
    for name in OPTIONAL:
        if name in body and draw(st.booleans()):
            del body[name]
    for _ in range(draw(st.integers(0, 3))):
        places = list(find_places(body))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder: Any = body
        for key in way:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "wrap"]))
        if change == "replace":
            holder[last] = draw(VALUES)
        elif change == "remove":
            del holder[last]
        elif change == "wrap":
            holder[last] = [holder[last]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[draw(TEXTS)] = copy.deepcopy(holder[last])
    return body


def write_json(value: Any, origin: str) -> bytes:
    """`value` as JSON, with what Python would not write: nested too deep, or with too many digits."""

    def fill(found: re.Match[str]) -> str:
        letter, levels = found[1], int(found[2])
        return "[" * levels + "]" * levels if letter == "[" else '{"a":' * levels + "1" + "}" * levels

    text = json.dumps(value).replace("ORIGIN", origin)
    text = text.replace('"@long@"', f'"{MARK * 2000}"').replace('"@digits@"', "9" * 5000)
    # A key stays one.
    return re.sub(r'"@([\[{])(\d+)@"(?!:)', fill, text).encode()


# A 2 MB body, random bytes, several values, a cut value, a mark of byte order: what is no JSON object.
BODIES: Final = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda value: write_json(value, "")),
    VALUES.map(lambda value: write_json(value, "")[:-1]),
    VALUES.map(lambda value: b"\xef\xbb\xbf" + write_json(value, "")),
    VALUES.map(lambda value: json.dumps({"a": "b"}).encode() + write_json(value, "")),
    VALUES.map(lambda value: json.dumps(value).encode("utf-16")),
)
SCRIPTS: Final = (
    *("hello", "hello", "echo", "echo", "search", "think", "cite", "moderated", "surrogate", "unicode", "length"),
    *READERS,
)
_LINES: Final = """\
Content-Type: application/json
Content-Type: text/plain
Content-Type: ;;;=
Content-Type: multipart/form-data
Content-Type: application/json; charset=nope
Content-Encoding: gzip
Content-Encoding: br
Content-Encoding: x
Accept: text/html
Accept-Encoding: gzip, br
Origin: null
Origin: http://evil.example
anthropic-version: 2023-06-01
Expect: 100-continue
Range: bytes=0-1
Upgrade: websocket
X-HTTP-Method-Override: DELETE
X-Other: MARK""".replace("MARK", MARK).split("\n")
HEADERS: Final = st.lists(st.sampled_from(_LINES), max_size=2, unique_by=lambda line: line.partition(":")[0])
IDS: Final = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?/"), min_size=1, max_size=12
)


def run_examples(count: int) -> Callable[[Any], Any]:
    """How the examples of a group run: so many, without a limit of time for one, since each has its own."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return examples(max_examples=count, deadline=None, suppress_health_check=slow)


def try_request(rig: Rig, protocol: str, line: str, headers: list[str], body: bytes, script: str = "hello") -> None:
    """Send it with a token of its own: the answer is good, the log silent, and no conversation left."""
    token = rig.simulator.token(script)
    head = [f"{line} HTTP/1.1", *headers, f"Authorization: Bearer {token}"]

    async def work() -> Answer:
        answer = await rig.ask(protocol, head, body)
        if b'"conversation_id": "new"' not in body:
            await rig.simulator.settle(token)
        return answer

    answer = rig.run(work())
    path = line.split(" ")[1].partition("?")[0]
    anthropic = path.startswith("/v1/messages") or any(header.startswith("anthropic-version") for header in headers)
    check_answer(answer, anthropic, script)
    check_log(rig)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", POSTS)
def test_a_request_like_a_real_one_is_answered_or_refused_in_form(rig: Rig, path: str, protocol: str) -> None:
    @run_examples(32)
    @given(shaped(POSTS[path]), st.sampled_from(SCRIPTS))
    def run(value: Any, script: str) -> None:
        body = write_json(value, rig.simulator.origin_url)
        try_request(rig, protocol, f"POST {path}", ["Content-Type: application/json"], body, script)

    run()


@pytest.mark.parametrize("path", POSTS)
def test_any_body_is_refused_in_form(rig: Rig, path: str) -> None:
    @run_examples(20)
    @given(BODIES, HEADERS, st.sampled_from(PROTOCOLS))
    def run(body: bytes, headers: list[str], protocol: str) -> None:
        try_request(rig, protocol, f"POST {path}?key={MARK}", headers, body)

    run()


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/{}", "/v1/files", "/v1/files/{}", "/v1/responses/{}", "/{}"]
)
def test_a_path_with_any_id_is_answered_or_refused_in_form(rig: Rig, path: str) -> None:
    @run_examples(20)
    @given(
        IDS,
        st.sampled_from(["GET", "DELETE", "PUT", "POST", "OPTIONS", "PATCH", "PROPFIND"]),
        HEADERS,
        st.binary(max_size=9),
    )
    def run(name: str, method: str, headers: list[str], body: bytes) -> None:
        try_request(rig, "connect", f"{method} {path.format(name)}?key={MARK}", headers, body)

    run()


_DISPOSITIONS: Final = """\
form-data; name="file"; filename="a.txt"
form-data; name="purpose"
form-data; name=file
form-data
form-data; name=file; filename*=UTF-8''%ffMARK
attachment; filename=
;;
form-data; name="file
""".replace("MARK", MARK).split("\n")
_PART_LINES: Final = (
    "",
    "Content-Type: text/plain",
    "Content-Type: multipart/mixed",
    "Content-Type: multipart/mixed; boundary=y",
    "Content-Transfer-Encoding: base64",
    "Content-Transfer-Encoding: odd",
    "Content-Encoding: gzip",
    "Content-Encoding: odd",
    "Content-Length: -1",
    "Content-Length: 3",
    "Content-Length: 99999",
    "no colon",
)
PARTS: Final = st.lists(
    st.tuples(
        st.sampled_from(_DISPOSITIONS),
        st.sampled_from(_PART_LINES),
        st.one_of(st.binary(max_size=20), st.just(MARK.encode()), st.just(b"--y\r\n\r\nx\r\n--y--")),
    ),
    max_size=3,
)


# Where warnings are no errors, aiohttp goes on after these.
@pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionHeader")
@pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionParam")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_form_is_taken_or_refused_in_form(rig: Rig, protocol: str) -> None:
    @run_examples(40)
    @given(PARTS, st.sampled_from(["x", '"x"', '"', "", "x" * 71]), st.sampled_from([b"--x--\r\n", b"--x", b""]))
    def run(parts: list[tuple[str, str, bytes]], boundary: str, end: bytes) -> None:
        body = b"".join(
            f"--x\r\nContent-Disposition: {disposition}\r\n{header}{chr(13) + chr(10) if header else ''}\r\n".encode()
            + content
            + b"\r\n"
            for disposition, header, content in parts
        )
        kind = f"Content-Type: multipart/form-data; boundary={boundary}"
        try_request(rig, protocol, "POST /v1/files", [kind], body + end)

    run()


# Bytes that are no good HTTP, or no good body. A number is a pause; a row may also end in a closed connection.

REFUSED: Final = (400, 408, 413, 415, 431)
_POST: Final = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {MARK}\r\nConnection: close\r\n"
_GET: Final = "GET /ping HTTP/1.1\r\nHost: x\r\n"


def post(headers: str, body: bytes = b"") -> list[bytes | float]:
    """A chat request with these headers."""
    return [f"{_POST}{headers}\r\n\r\n".encode("latin-1") + body]


def get(headers: str, first: str = _GET) -> list[bytes | float]:
    """A request for nothing with these headers."""
    return [f"{first}{headers}\r\n\r\n".encode("latin-1")]


def form(body: bytes, boundary: str = "x") -> list[bytes | float]:
    """A file's upload."""
    head = _POST.replace("chat/completions", "files")
    kind = f"Content-Type: multipart/form-data; boundary={boundary}\r\nContent-Length: {len(body)}\r\n\r\n"
    return [f"{head}{kind}".encode() + body]


_PART: Final = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
Rows = dict[str, list[bytes | float]]
HEADS: Final[Rows] = {
    "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n"],
    "zeros": [bytes(70_000)],
    "an endless line": [b"x" * 200_000],
    "blank lines": [b"\r\n" * 20_000],
    "HTTP/2": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "HTTP of another version": get("A: b", "GET /ping HTTP/9.9\r\n"),
    "no version": get("A: b", "GET /ping HTTP/\r\n"),
    "a method that is none": get("A: b", f"G@{MARK} /ping HTTP/1.1\r\n"),
    "no method": get("A: b", " /ping HTTP/1.1\r\n"),
    "a blank in the path": get("A: b", f"GET /{MARK} b HTTP/1.1\r\n"),
    "a zero in the path": get("A: b", f"GET /{MARK}\x00 HTTP/1.1\r\n"),
    "a path too long": get("A: b", f"GET /{MARK * 9000} HTTP/1.1\r\n"),
    "a port that is none": get("A: b", "GET http://a:b/ping HTTP/1.1\r\n"),
    "a bracket in the target": get("A: b", f"GET http://[{MARK}/ping HTTP/1.1\r\n"),
    "a header without colon": get(MARK),
    "a header without name": get(f": {MARK}"),
    "a blank before the colon": get(f"A : {MARK}"),
    "a zero in a header": get(f"A: {MARK}\x00"),
    "a bare CR in a header": get(f"A: b\rC: {MARK}"),
    "a folded header": get(f"A: b\r\n c{MARK}"),
    "a header too long": get(f"A: {MARK * 9000}"),
    "a name too long": get(f"{MARK * 9000}: a"),
    "too many headers": get("\r\n".join(f"A{number}: {MARK}" for number in range(20_000))),
    "a head without end": [_GET.encode(), b"A: b\r\n"],
    "a head by drops": [piece for letter in _GET for piece in (letter.encode(), 0.1)],
}
LENGTHS: Final[Rows] = {
    "a length that is negative": post("Content-Length: -1", b"{}"),
    "a length with a sign": post("Content-Length: +2", b"{}"),
    "a length that is no number": post(f"Content-Length: {MARK}", b"{}"),
    "a length in hex": post("Content-Length: 0x2", b"{}"),
    "two lengths": post("Content-Length: 2\r\nContent-Length: 3", b"{} "),
    "two lengths in one": post("Content-Length: 2, 2", b"{}"),
    "a length of 30 digits": post("Content-Length: " + "9" * 30, b"{}"),
    "a length of 9,000 digits": post("Content-Length: " + "9" * 9000, b"{}"),
    "a length over the limit": post("Content-Length: 99999999", b"{}"),
    "length and chunks": post("Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n"),
    "a coding that is unknown": post("Transfer-Encoding: odd", b"{}"),
    "chunks not last": post("Transfer-Encoding: chunked, gzip", b"2\r\n{}\r\n0\r\n\r\n"),
    "chunks twice": post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n"),
    "a chunk without size": post("Transfer-Encoding: chunked", b"\r\n{}\r\n0\r\n\r\n"),
    "a chunk of a size that is none": post("Transfer-Encoding: chunked", f"{MARK}\r\n".encode()),
    "a chunk of negative size": post("Transfer-Encoding: chunked", b"-2\r\n{}\r\n0\r\n\r\n"),
    "a chunk of a size with prefix": post("Transfer-Encoding: chunked", b"0x2\r\n{}\r\n0\r\n\r\n"),
    "a chunk of 2^80 bytes": post("Transfer-Encoding: chunked", b"1" + b"0" * 20 + b"\r\n{}"),
    "a chunk with more than its size": post("Transfer-Encoding: chunked", b"1\r\n{}\r\n0\r\n\r\n"),
    "a chunk with a long extension": post("Transfer-Encoding: chunked", b"2;" + b"x" * 200_000 + b"\r\n{}\r\n"),
    "chunks over the limit": post("Transfer-Encoding: chunked", (b"10000\r\n" + b" " * 65_536 + b"\r\n") * 60),
    "chunks without end": post("Transfer-Encoding: chunked", b"2\r\n{}\r\n"),
    "a body without end": post("Content-Length: 9", b"{}"),
    "a body by drops": [*post("Content-Length: 900"), *(piece for _ in range(30) for piece in (b" ", 0.1))],
    "a body that is awaited": post("Content-Length: 9\r\nExpect: 100-continue"),
}
BODIES_REFUSED: Final[Rows] = {
    "no gzip": post("Content-Encoding: gzip\r\nContent-Length: 2", b"{}"),
    "half a gzip": post("Content-Encoding: gzip\r\nContent-Length: 10", b"\x1f\x8b\x08\0\0\0\0\0\0\x03"),
    "no deflate": post("Content-Encoding: deflate\r\nContent-Length: 2", b"{}"),
    "an encoding that is unknown": post("Content-Encoding: odd\r\nContent-Length: 2", b"{}"),
    "no JSON": post("Content-Length: 3", b"{}}"),
    "JSON without end": post("Content-Length: 200000", b"[" * 200_000),
    "a good request and garbage": [(_GET + "\r\n").encode(), b"\x00" + MARK.encode() + b"\r\n\r\n"],
}
FORMS: Final[Rows] = {
    "a form without parts": form(b""),
    "a form without end": form(_PART + b"\r\nhello"),
    "a form without boundary": form(_PART + b"\r\nhello\r\n--x--\r\n", ""),
    "a form with a boundary too long": form(_PART + b"\r\nhello\r\n--x--\r\n", "x" * 5000),
    "a form with a header too long": form(_PART + b"A: " + b"x" * 100_000 + b"\r\n\r\nhello\r\n--x--\r\n"),
    "a form with headers without end": form(_PART + b"A: b\r\n" * 20_000),
    "a form within forms": form(b"--x\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n" * 2000),
    "a form with a file too large": form(_PART + b"\r\n" + b"x" * 1_100_000 + b"\r\n--x--\r\n"),
}


async def try_rows(rig: Rig, rows: Rows) -> dict[str, str]:
    """What is wrong with the answers to `rows`, which are sent at once."""

    async def try_row(row: list[bytes | float]) -> str:
        try:
            answer = read_answer(await exchange(rig.urls["classic"], row))
            if answer is not None:
                assert answer.status in REFUSED, (answer.status, answer.body[:300])
                check_answer(answer, anthropic=False, script="")
        except (AssertionError, TimeoutError) as error:
            return repr(error)
        return ""

    wrong = zip(rows, await asyncio.gather(*map(try_row, rows.values())), strict=True)
    return {name: what for name, what in wrong if what}


@pytest.mark.parametrize("rows", [HEADS, LENGTHS, BODIES_REFUSED, FORMS], ids=["heads", "lengths", "bodies", "forms"])
def test_hostile_bytes_are_refused_or_the_connection_closed(rig: Rig, rows: Rows) -> None:
    assert not rig.run(try_rows(rig, rows))
