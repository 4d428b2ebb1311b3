"""`make test-page`: the page at `/`, used in chromium as a person would, before a proxy and the simulator.

Chromium is driven over its DevTools protocol. `SCENES` are what is looked at; after them nothing may have been fetched
from elsewhere, blocked by the page's policy, or written to the console. A path as argument: write a picture there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
from kimi_simulator import SCRIPTS, Cite, End, Hit, Say, Simulator, Think

PROGRAM: Final = str(Path(__file__).parent.parent / "kimi_proxy.py")
LAN: Final = "proxy.example"  # this machine by a name, which a browser trusts less than 127.0.0.1
CHROMIUM: Final = (
    *("chromium", "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"),
    *("--remote-debugging-port=0", f"--host-resolver-rules=MAP {LAN} 127.0.0.1", "about:blank"),
)
MARKUP: Final = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
KEY: Final = "sesame-" + "0" * 16

SCRIPTS["markup"] = (
    *(Hit(MARKUP, "https://a.example/?" + "long" * 50), Hit("nolink" * 60, "javascript:window.ran=1")),
    *(Think(MARKUP), Say(MARKUP), Cite((1, 2)), Say("x" * 500), End()),
)
SCRIPTS["sky"] = (
    Hit("Rayleigh scattering", "https://encyclopedia.example/Rayleigh_scattering"),
    Hit("Why is the sky blue?", "https://space.example/blue-sky"),
    Think("A short reason is asked for: scattering grows with the fourth power of the frequency."),
    Say("Molecules of the air scatter blue light far more than red light, so that blue light reaches "),
    *(Say("your eyes from every part of the sky "), Cite((2,)), Say(", while red light goes nearly straight on ")),
    *(Cite((1,)), Say("."), End()),
)


class Page:
    """A tab of the browser, and all `events` that it told. Elements are named by selectors, which `$` finds."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket
        self._number = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the DevTools protocol."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (message := await self._socket.receive_json()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression, or of its promise."""
        script = f"(() => {{ const $ = one => document.querySelector(one); return {script} }})()"
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, f"{script}: {result}"
        return result["result"].get("value")

    async def see(self, condition: str) -> None:
        """Return once a condition holds; where it does not within 10 s, complain with what is shown."""
        look = f"() => ({condition}) || Date.now() > end ? done(!!({condition})) : setTimeout(look, 20)"
        if not await self.run(f"new Promise(done => {{ const end = Date.now() + 10000, look = {look}; look() }})"):
            raise AssertionError(f"not seen: {condition}; instead:\n{await self.run('document.body.innerText')}")

    async def read(self, selector: str, pattern: str) -> None:
        """Return once the text that is shown of an element matches."""
        await self.see(f"new RegExp({json.dumps(pattern)}, 'i').test($('{selector}')?.innerText)")

    async def open(self, url: str) -> None:
        """Open the page, and wait until it has looked at the account."""
        await self.call("Page.navigate", url=url)
        await self.see(f"location.origin === '{url}' && /^(?!Asking)./.test($('#checked')?.innerText)")

    async def click(self, selector: str) -> None:
        """Click on an element, by the mouse: it has to be in sight."""
        where = await self.run(f"""new Promise(done => requestAnimationFrame(() => {{
            $('{selector}').scrollIntoView({{block: 'center'}});
            const box = $('{selector}').getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            done($('{selector}').contains(document.elementFromPoint(x, y)) && {{x, y}});
        }}))""")
        assert where, f"{selector} is not in sight"
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, **where, button="left", clickCount=1)

    async def submit(self, button: str, key: str, question: str = "") -> None:
        """Type a key or token, and a question if there is one, and press a button."""
        for selector, text in (("#key", key), ("#question", question))[: 2 if question else 1]:
            await self.click(selector)
            await self.run(f"$('{selector}').select()")
            await self.call("Input.insertText", text=text)
        await self.click(button)


async def show_tokens(page: Page, simulator: Simulator, url: str) -> None:
    """A good token, a dead one, what is pasted wrongly, and a check that another one overtakes."""
    await page.open(url)
    await page.read("#status", r"Version \d+\.\d+.* since .*20\d\d.* in progress: 0\. Bring your own token")
    await page.read("#checked", "Enter your token")
    for token, place, words in (
        (simulator.token("hello"), "#accounts .good", r"^Account \w+ at 127\.0\.0\.1 \(connect\) works$"),
        (simulator.token("hello", "status=refresh:401"), "#accounts .bad", r"^Account \w+ at .* not work: .*token"),
        ("https://www.kimi.com/", "#checked.bad", "token"),
        ("schlüssel", "#checked.bad", "copy it once more"),
    ):
        await page.submit("#check button", token)
        await page.read(place, words)
    checks = "performance.getEntriesByType('resource').filter(one => /health/.test(one.name)).length"
    before = await page.run(checks)
    await page.submit("#check button", simulator.token("hello", "slow=refresh:1"))
    await page.submit("#check button", simulator.token("hello"))
    await page.see(f"{checks} === {before} + 2 && $('#accounts li')")
    assert await page.run("$('#accounts').children.length") == 1, "a check that was overtaken is shown too"


async def show_an_answer(page: Page, simulator: Simulator, url: str) -> None:
    """An answer streams in, its thinking is folded, its sources are links; the keyboard's place is kept."""
    await page.open(url)
    token = simulator.token("sky", "pace=0.1")
    await page.submit("#check button", token)
    await page.read("#checked", "^Models: kimi")
    await page.submit("#ask", token, "Why is the sky blue?")
    await page.see("$('#answer').innerText && !$('#ask').checkVisibility() && document.activeElement.id === 'stop'")
    await page.see("!$('#stop').checkVisibility() && document.activeElement.id === 'ask'")
    await page.read("#answer", r"^Molecules .* of the sky \[1\], .* on \[2\]\.$")
    await page.see("[...document.links].map(one => one.host).join() === 'space.example,encyclopedia.example'")
    await page.see("$('#thought').checkVisibility() && !$('#thinking').checkVisibility()")
    await page.click("#thought summary")
    await page.read("#thinking", "fourth power")
    assert simulator.account(token).asked[0]["tools"] == [], "the web was searched, which was not wanted"


async def show_a_file(page: Page, simulator: Simulator, url: str) -> None:
    """A file is read and the web is searched; then the file is gone, which is told."""
    await page.open(url)
    token = simulator.token("read")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        print("The first line.", file=file, flush=True)
        field = await page.call("Runtime.evaluate", expression="document.querySelector('#file')")
        await page.call("DOM.setFileInputFiles", objectId=field["result"]["objectId"], files=[file.name])
        await page.click("#search")
        await page.submit("#ask", token, "What does it say?")
        await page.read("#answer", r"\.txt \(text/plain, 16 bytes\): The first line\.")
        assert simulator.account(token).asked[0]["tools"], "the web was not searched"
    await page.submit("#ask", token, "And now?")
    await page.read("#failure", "cannot be read any more")


async def show_stop(page: Page, simulator: Simulator, url: str) -> None:
    """A long answer is stopped upstream, and what came of it stays."""
    await page.open(url)
    token = simulator.token("long", "pace=0.05", "chunks=2000")
    await page.submit("#ask", token, "Count.")
    await page.read("#answer", "^0 1 2 3")
    await page.click("#stop")
    await page.read("#failure", r"^Stopped\.$")
    account = await simulator.settle(token)
    assert account.count("stop") == 1 and account.count("remove") == 1, "the answer was not stopped upstream"
    await page.see("/^0 1 2 3/.test($('#answer').innerText) && $('#ask').checkVisibility()")


async def show_markup(page: Page, simulator: Simulator, url: str) -> None:
    """HTML in an answer, its thinking and its sources is text; on a phone nothing is wider than the screen."""
    await page.open(url)
    await page.submit("#ask", simulator.token("markup"), MARKUP)
    await page.read("#answer", rf"^{re.escape(MARKUP)}\[1\]\[2\]x+$")
    await page.click("#thought summary")
    for selector in ("#thinking", "#sources li"):
        await page.read(selector, f"^{re.escape(MARKUP)}$")
    await page.see("!$('#answer *, #thinking *, #sources li * *') && document.links.length === 1 && !window.ran")
    await page.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    await page.see("innerWidth === 360 && document.documentElement.scrollWidth === 360")
    await page.call("Emulation.clearDeviceMetricsOverride")


async def show_settings(page: Page, simulator: Simulator, url: str) -> None:
    """Each program's settings have the address by which the page was opened, and can be copied, also from afar."""
    await page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    for base in (url, url.replace("127.0.0.1", LAN)):
        await page.open(base)
        for program in await page.run("[...$('#program').options].map(one => one.value)"):
            await page.run(f"$('#program').value = '{program}', $('#program').dispatchEvent(new Event('change'))")
            await page.read("#setting", re.escape(base))
        await page.read("#copied", "^$")
        await page.click("#copy")
        await page.read("#copied", "^copied$")
        shown = await page.run("$('#setting').innerText")
        await page.open(url)
        assert await page.run("navigator.clipboard.readText()") == shown, f"not in the clipboard:\n{shown}"


async def show_keys(page: Page, simulator: Simulator, url: str) -> None:
    """Of a proxy with keys nothing is shown without a key; with one, its account; and it is told when it is gone."""
    token = simulator.token("hello")
    async with start_proxy(simulator, KIMI_REFRESH_TOKEN=token, PROXY_API_KEYS=f"me:{KEY}") as keyed:
        await page.open(keyed)
        await page.read("#checked.bad", "key")
        await page.see("!$('#status').innerText && !$('#accounts *, #model *')")
        await page.submit("#ask", "wrong", "Hello?")
        await page.read("#failure", "key")
        await page.submit("#check button", KEY)
        await page.read("#accounts .good", "works$")
        await page.read("#checked", "^Models")
        await page.open(keyed)  # which knows the key still
        await page.read("#status", "This proxy holds an account")
        await page.submit("#ask", KEY, "Hello?")
        await page.read("#answer", "I am Kimi")
        await page.see("$('#ask').checkVisibility()")
        assert token not in await page.run("document.documentElement.outerHTML"), "the held token is in the page"
    await page.submit("#ask", KEY, "Hello?")
    await page.read("#failure", "Does the proxy still run")


async def show_to_everybody(page: Page, simulator: Simulator, url: str) -> None:
    """Words stand out in light and in dark mode, and each control has a name to be read aloud."""
    await page.open(url)
    for scheme in ("light", "dark"):
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector in ("body", "#failure"):
            levels = await page.run(f"getComputedStyle($('{selector}')).color.match(/\\d+/g).map(Number)")
            assert (sum(levels) > 480) is (scheme == "dark"), f"{selector} is {levels} in {scheme} mode"
    await page.call("Emulation.setEmulatedMedia", features=[])
    nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    controls = [node for node in nodes if any(one["name"] == "focusable" for one in node.get("properties", ()))]
    assert len(controls) > 8 and all(one["name"]["value"] for one in controls), f"without a name: {controls}"


SCENES: Final = (
    *(show_tokens, show_a_file, show_stop, show_markup, show_settings, show_keys, show_to_everybody),
    show_an_answer,  # whose picture may be taken
)


def check_events(events: list[dict[str, Any]]) -> None:
    """Nothing came from elsewhere, nothing was blocked, and the console has no more than what scenes provoke."""
    for event in events:
        method, parameters = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            assert re.match(rf"http://(127\.0\.0\.1|{LAN}):\d+/", parameters["request"]["url"]), f"fetched: {event}"
        elif method == "Log.entryAdded":
            assert re.search("status of 401|ERR_CONNECTION_REFUSED", parameters["entry"]["text"]), f"logged: {event}"
        assert method not in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded"), f"{event}"


@asynccontextmanager
async def start(pattern: str, *command: str, **variables: str) -> AsyncIterator[str]:
    """What `pattern` finds in a line of a program at its start; the program runs while the context lasts."""
    program = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=variables
    )
    try:
        assert program.stdout is not None
        line = found = None
        while found is None:
            assert line != "", f"{command} did not start"
            line = (await program.stdout.readline()).decode()
            found = re.search(pattern, line)
        yield found[0]
    finally:
        if program.returncode is None:
            program.terminate()
        await program.communicate()


def start_proxy(simulator: Simulator, **variables: str) -> AbstractAsyncContextManager[str]:
    """The address of a proxy before the simulator."""
    variables |= {"KIMI_BASE_URL": simulator.url, "KIMI_PROTOCOL": "connect"}
    variables |= {"PROXY_PORT": "0", "PROXY_STATE_DIR": "", "PROXY_LOG_LEVEL": "error"}
    return start(r"http://127\.0\.0\.1:\d+", sys.executable, PROGRAM, "--env-file", os.devnull, **variables)


async def show(picture: str) -> None:
    """Play all scenes, and take a picture where a path is given."""
    with tempfile.TemporaryDirectory(prefix="kimi-proxy-page-") as folder:
        async with (
            Simulator() as simulator,
            start_proxy(simulator) as url,
            start(r"(?<=ws:)//\S+:\d+", *CHROMIUM, f"--user-data-dir={folder}", HOME=folder) as browser,
            aiohttp.ClientSession(f"http:{browser}") as http,
            http.get("/json/list") as tabs,
            http.ws_connect((await tabs.json())[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
                await page.call(f"{domain}.enable")
            for scene in SCENES:
                await scene(page, simulator, url)
                print(f"ok   {scene.__doc__}", flush=True)
            check_events(page.events)
            if picture:
                await page.click("h1")
                taken = await page.call("Page.captureScreenshot", captureBeyondViewport=True)
                Path(picture).write_bytes(base64.b64decode(taken["data"]))  # noqa: ASYNC240
            await page.call("Browser.close")


def main(picture: str = "") -> int:
    """The exit status: 0 where all is as it should be."""
    if shutil.which("chromium") is None:
        print("this needs chromium; on Debian: sudo apt install chromium", file=sys.stderr)
        return 1
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # the simulator's, whose client stops answers
    try:
        asyncio.run(asyncio.wait_for(show(picture), 55))
    except (AssertionError, TimeoutError, OSError) as complaint:
        print(f"FAIL {complaint or 'it takes too long'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
