"""`make test-systemd`: what README says in "As a service", done under a real systemd.

As root, a Debian of its own is made in a temporary directory (some 300 MB, from Debian's mirror) and its systemd booted
as process 1 of a container without a network. In there this file runs once more, with the simulator in its process: it
installs the product as README says, and looks at it from outside. Of what is installed only `QUICK` differs: waiting
times. Nothing of this machine is touched; what was made is removed at the end, however that comes.

    SUITE=trixie    another Debian (default bookworm)
    BASE=DIR        keep that Debian there for the next run, which boots a copy of it
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from kimi_simulator import HELLO, Account, Simulator
from units import Complaint, claim, step

ROOT: Final = Path(__file__).parent.parent
TOOLS: Final = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
PACKAGES: Final = "systemd,systemd-sysv,dbus,python3,python3-venv,make,iproute2,procps,ca-certificates"
BPF: Final = "bpf perf_event_open @keyring"  # what a container may not do otherwise, and some directives need
VENV: Final = "/var/lib/simulator"  # what the simulator runs in
BOOT_SECONDS: Final = 60.0
MOST_SECONDS: Final = 180.0  # for each test

HOME: Final = Path("/opt/kimi-proxy")
CONFIG: Final = Path("/etc/kimi-proxy")
STATE: Final = Path("/var/lib/private/kimi-proxy")
DROP_IN: Final = Path("/run/systemd/system/kimi-proxy.service.d/test.conf")
QUICK: Final = "[Service]\nWatchdogSec=4\nTimeoutStopSec=5\nRestartSec=100ms\n"
CLI: Final = HOME / "bin/kimi-proxy"
KEY: Final = "a-long-key-of-anna"


# ---- Within the container ---------------------------------------------------


async def run(*command: object, status: int | None = 0, text: str = "") -> str:
    """What a command says that is given `text`; it ends with `status`, if that is told."""
    process = await asyncio.create_subprocess_exec(*map(str, command), stdin=PIPE, stdout=PIPE, stderr=STDOUT)
    said = (await process.communicate(text.encode()))[0].decode()
    claim(status in (None, process.returncode), f"{command} ends with {process.returncode}:\n{said}")
    return said.strip()


async def systemctl(*words: object, status: int | None = 0) -> str:
    """What systemctl says."""
    return await run("systemctl", *words, status=status)


async def show(name: str, unit: str = "kimi-proxy.service") -> str:
    """A property of a unit."""
    return await systemctl("show", "--value", "-p", name, unit)


async def journal(unit: str = "kimi-proxy.service") -> str:
    """What the journal has of a unit, systemd's own lines included."""
    await run("journalctl", "--sync")
    return await run("journalctl", "--no-pager", "-u", unit)


async def follow_readme(start: str) -> str:
    """Run the command of README's section that begins like this, as it stands there."""
    section = (ROOT / "README.md").read_text("utf-8").split("\n## As a service")[1].split("\n## ")[0]
    found = re.search(rf"sudo ({re.escape(start)}[^`#|\n]*)", section)
    claim(found, f"README has no {start}")
    assert found is not None
    return await run(*found[1].split())


@dataclass(slots=True)
class World:
    """The simulator, a client, and the account that is held."""

    simulator: Simulator
    http: aiohttp.ClientSession
    token: str = ""

    @property
    def account(self) -> Account:
        """The held account, as the simulator sees it."""
        return self.simulator.account(self.token)

    def configure(self, *script: str, **settings: object) -> None:
        """Write an account that does as `script` says, the key and the settings."""
        self.token = self.simulator.token(*script) if script else self.token
        names = {"KIMI_BASE_URL": self.simulator.url, "KIMI_AUTH_URL": self.simulator.url, "KIMI_PROTOCOL": "classic"}
        names |= {"KIMI_REFRESH_TOKEN_FILE": "token", "PROXY_API_KEYS_FILE": "keys"}
        lines = [f"{name}={value}\n" for name, value in {**names, **settings}.items()]
        for name, text in (("token", self.token), ("keys", f"anna:{KEY}"), ("kimi-proxy.env", "".join(lines))):
            (CONFIG / name).write_text(f"{text}\n")

    async def start(self, *script: str, **settings: object) -> None:
        """Have such a proxy running, reached through the socket unit."""
        self.configure(*script, **settings)
        await systemctl("stop", "kimi-proxy.service")
        await systemctl("start", "kimi-proxy.socket", "kimi-proxy.service")

    async def ask(self, content: object = "Hello?", port: int = 8000, key: str = KEY, status: int = 200) -> str:
        """What is answered, with that HTTP status."""
        body = {"model": "kimi", "use_search": False, "messages": [{"role": "user", "content": content}]}
        headers, url = {"Authorization": f"Bearer {key}"}, f"http://127.0.0.1:{port}/v1/chat/completions"
        async with self.http.post(url, json=body, headers=headers) as response:
            answer = await response.json()
        claim(response.status == status, f"HTTP status {response.status}: {answer}")
        return str(answer["choices"][0]["message"]["content"] if status == 200 else answer)

    async def greet(self, port: int = 8000) -> None:
        """Ask the account with the script `hello`, which answers always the same."""
        claim(await self.ask(port=port) == HELLO, "it answers something else")


async def test_it_is_installed_and_says_when_it_is_ready(world: World) -> None:
    claim("systemctl enable --now" in await run("make", "-C", ROOT, "install"), "make install does not say what next")
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text(QUICK)
    world.configure("hello")
    await systemctl("daemon-reload")
    await follow_readme("systemctl enable --now kimi-proxy.socket")
    states = [await show(name) for name in ("ActiveState", "Type", "UnitFileState", "NRestarts")]
    claim(states == ["active", "notify", "enabled", "0"], f"it is {states}")
    await world.greet()
    claim("answers" in await show("StatusText"), "it does not tell systemd how it is")
    await world.ask(key="another", status=401)
    log = await journal()
    claim("anna" in log, "the key's name is not in the log")
    claim(world.token not in log and KEY not in log, "a secret is in the log")


async def test_it_can_write_only_where_it_should(world: World) -> None:
    pid = await show("MainPID")
    user = os.stat(f"/proc/{pid}").st_uid
    claim(user not in (0, 65534), "it runs as root, or as nobody")
    for path, status in ((HOME, 1), (CONFIG, 1), ("/run", 1), ("/var/lib/kimi-proxy", 0)):
        await run("nsenter", "-t", pid, "-m", "-S", user, "touch", f"{path}/probe", status=status)
    (STATE / "probe").unlink()
    modes = {path.name: f"{path.stat().st_mode:o}" for path in (STATE, *STATE.rglob("*.json"))}
    claim(len(modes) > 1 and all(mode.endswith("00") for mode in modes.values()), f"state is readable: {modes}")


async def test_rotated_tokens_survive_restarts(world: World) -> None:
    await world.start("hello", "rotate")
    for _ in range(3):
        await world.greet()
        await systemctl("restart", "kimi-proxy")
    claim(world.account.count("refresh") == 1, "the tokens were asked for again after a restart")


async def test_a_full_disk_costs_no_account(world: World) -> None:
    await systemctl("stop", "kimi-proxy.socket", "kimi-proxy.service")
    await run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", STATE)
    try:
        await world.start("hello", "rotate", "unauthorized-once=open")
        await world.ask()
        await run("dd", "if=/dev/zero", f"of={STATE}/filler", "bs=4k", status=1)
        for is_full in (True, False):
            world.account.fired.clear()  # the next question is refused once, and takes a refresh
            await world.greet()
            if is_full:
                (STATE / "filler").unlink()
        claim("state cannot be kept" in await journal(), "nobody is told of the full disk")
        await systemctl("restart", "kimi-proxy")
        await world.greet()
        claim(world.account.count("refresh") == 4, f"{world.account.count('refresh')} refreshes, not 4")
    finally:
        await systemctl("stop", "kimi-proxy.socket", "kimi-proxy.service")
        await run("umount", STATE)


async def test_what_hangs_is_started_again(world: World) -> None:
    await world.start("hello")
    os.kill(int(await show("MainPID")), signal.SIGSTOP)
    await world.greet()  # by the next process: the question waits for it
    claim("watchdog" in (await journal()).lower() and await show("NRestarts") == "1", "no watchdog ended it")


async def test_a_stop_lets_a_stream_finish(world: World) -> None:
    await world.start("long", "chunks=40", "pace=0.25")  # longer than TimeoutStopSec
    asking = asyncio.create_task(world.ask())
    await world.simulator.wait_until(lambda: world.account.streams_open == 1)
    await systemctl("stop", "kimi-proxy.socket", "kimi-proxy.service")
    claim(asking.done(), "the stop did not wait for the stream")
    claim(len(await asking) > 40, "the answer is cut")
    await world.simulator.settle(world.token)
    states = [await show(name) for name in ("Result", "ExecMainStatus", "ActiveState")]
    claim(states == ["success", "0", "inactive"], f"after the stop it is {states}")


async def test_a_restart_refuses_nobody(world: World) -> None:
    await world.start("hello")
    over = asyncio.Event()

    async def work() -> int:
        number = 0
        while not over.is_set():
            await world.greet()
            number += 1
        return number

    workers = [asyncio.create_task(work()) for _ in range(8)]
    pids = {await show("MainPID")}
    for _ in range(3):
        await asyncio.sleep(1)
        await systemctl("restart", "kimi-proxy")
        pids.add(await show("MainPID"))
    over.set()
    answers = sum(await asyncio.gather(*workers))
    claim(len(pids) == 4, "it was not restarted")
    print(f"   {answers} questions during three restarts, all answered")


async def test_a_file_is_fetched_and_spooled(world: World) -> None:
    await world.start("read", PROXY_ALLOW_PRIVATE_URLS=1)
    for order in ("70000", "70000+no-length"):
        url = f"{world.simulator.origin_url}/{order}/a.pdf"
        said = await world.ask([{"type": "file", "file_url": {"url": url}}, {"type": "text", "text": "What is it?"}])
        claim("70000 bytes" in said, f"the file did not arrive: {said}")


async def test_instances_share_the_state(world: World) -> None:
    await world.start("hello", "rotate")
    (CONFIG / "8001.env").write_text("PROXY_LOG_FORMAT=json\n")
    await follow_readme("systemctl enable --now kimi-proxy@8001")
    for port in (8001, 8002, 8000):
        await world.greet(port)
    claim(world.account.count("refresh") == 1, "an instance does not use the tokens of another")
    has_json = ['{"' in await journal(f"kimi-proxy@{port}") for port in (8001, 8002)]
    claim(has_json == [True, False], "8001.env is not for 8001 alone")
    await systemctl("disable", "--now", "kimi-proxy@8001", "kimi-proxy@8002")


async def test_a_wrong_setting_is_mended_and_nothing_is_left_of_it(world: World) -> None:
    await world.start("hello")
    world.configure(PROXY_QUEUE_LENGTH="many")
    await systemctl("restart", "kimi-proxy", status=None)
    asking = asyncio.create_task(world.ask())
    while int(await show("NRestarts")) < 25:
        claim(await show("ActiveState") != "failed", f"systemd gives up after {await show('NRestarts')} starts")
        await asyncio.sleep(0.2)
    claim("PROXY_QUEUE_LENGTH" in await journal(), "the journal does not name the setting")
    claim(await show("ActiveState", "kimi-proxy.socket") == "active", "the socket unit is down")
    world.configure()
    claim(await asking == HELLO, "it answers something else")
    await systemctl("stop", "kimi-proxy.service")
    claim(await world.ask() == HELLO, "the socket unit does not hold the port any more")


async def test_check_and_ask_run_as_the_service(world: World) -> None:
    await world.start("hello", "rotate")
    await world.ask()
    claim("ok" in await follow_readme(f"{CLI} check"), "check does not say what it saw")
    claim(world.account.count("refresh") == 1, "check does not share the state")
    hard = "Costs it $5 or ${HOME}, 'so' or \"so\", 50% or %n \\n?"
    said = await run("env", "SUDO_USER=daemon", CLI, "ask", hard, text="And this?")
    claim(HELLO in said, f"ask says {said}")
    claim(f"{hard}\nAnd this?" in str(world.account.asked[-1]["messages"][0]["content"]), "the question is mangled")
    for words in ((), ("serve",)):
        claim("kimi-proxy ask" in await run(CLI, *words, status=2), "it does not say how to use it")


async def test_another_port_needs_a_drop_in_where_systemd_has_bpf(world: World) -> None:
    await systemctl("stop", "kimi-proxy.socket", "kimi-proxy.service")
    world.configure("hello", PROXY_PORT=8123)
    has_bpf = "+BPF_FRAMEWORK" in await systemctl("--version")
    await systemctl("start", "kimi-proxy", status=None)
    is_refused = "cannot listen on 127.0.0.1:8123" in await journal()
    claim(is_refused is has_bpf, f"systemd {'with' if has_bpf else 'without'} BPF: refused is {is_refused}")
    DROP_IN.write_text(f"{QUICK}SocketBindAllow=tcp:8123\n")
    await systemctl("daemon-reload")
    await systemctl("restart", "kimi-proxy")
    await world.greet(8123)
    print(f"   systemd {'with' if has_bpf else 'without'} BPF")


async def test_uninstalling_leaves_settings_and_state(world: World) -> None:
    await world.start("hello", "rotate")
    await world.ask()
    await run("make", "-C", ROOT, "uninstall")
    claim(await show("LoadState") == "not-found" and not HOME.exists(), "something is left")
    claim((CONFIG / "token").exists() and list(STATE.rglob("*.json")), "settings or state are gone")
    claim(await run("ss", "-Hltn", "sport = :8000") == "", "the port is still held")


TESTS: Final = [one for name, one in globals().items() if name.startswith("test_")]


async def look() -> int:
    """Run the tests, in order, on the machine that this is; the exit status."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with Simulator() as simulator, aiohttp.ClientSession(timeout=timeout) as http:
        world = World(simulator, http)
        for test in TESTS:
            step(test.__name__)
            try:
                await asyncio.wait_for(test(world), MOST_SECONDS)
            except (Complaint, TimeoutError, aiohttp.ClientError) as error:
                print(await run("journalctl", "--no-pager", "-n", "40", "-u", "kimi-proxy*", status=None))
                print(f"FAIL: {test.__name__}: {type(error).__name__}: {error}", flush=True)
                simulator.violations.clear()
                return 1
    return 0


# ---- Outside of it ----------------------------------------------------------


def find_cgroups() -> Path:
    """Where control groups are mounted, in their second version. Complains where this machine cannot do it."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    claim(not missing, f"this needs some packages; on Debian: sudo apt install {' '.join(missing)}")
    claim(os.geteuid() == 0, "this needs root: sudo make test-systemd")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    groups = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    claim(groups, "this needs a mounted cgroup2")
    return groups[0]


def make_debian(base: Path, suite: str) -> None:
    """Make a Debian there, unless it is there; and fetch the packages that its Python needs."""
    if not (base / "usr/bin/python3").exists():
        step(f"{suite} into {base}")
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(base)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        claim(done.returncode == 0, f"debootstrap says:\n{done.stdout[-2000:]}")
    step("packages from PyPI")
    version = subprocess.run(["chroot", base, "python3", "-V"], capture_output=True, text=True, check=True).stdout
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    pip += ["--python-version", version.split()[1], "-d", str(base / "wheels"), "-r", str(ROOT / "requirements.txt")]
    subprocess.run(pip, check=True)


@contextmanager
def boot(base: Path, groups: Path) -> Iterator[list[str]]:
    """A container whose systemd has booted what is in `base`; gives the words that run a command in it."""
    name = f"kimi-proxy-{secrets.token_hex(4)}"
    group = groups / name  # else nspawn would ask this machine's systemd for one, which there may not be
    group.mkdir()
    words = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    words += ["env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "systemd-nspawn", "--quiet", "--boot", f"--machine={name}"]
    words += ["--private-network", "--resolv-conf=off", "--register=no", "--keep-unit", "--console=pipe"]
    words += ["--capability=all", f"--system-call-filter={BPF}", f"--bind-ro={ROOT}:/src", f"--directory={base}"]
    log = base.parent / "container.log"
    with log.open("wb") as output:
        container = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        end = time.monotonic() + BOOT_SECONDS
        while not (enter := find_way_in(container.pid)):
            is_alive = time.monotonic() < end and container.poll() is None
            claim(is_alive, f"systemd does not boot in a container here:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
        yield enter
    finally:
        for _ in range(2):  # the second time it does not wait for an orderly end
            container.terminate()
            time.sleep(1)
        container.wait()
        for path, _, _ in os.walk(group, topdown=False):
            os.rmdir(path)
        # Where /run is a disk, nspawn leaves this.
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{name}", ignore_errors=True)


def find_way_in(pid: int) -> list[str]:
    """The words that run a command within nspawn's container, once it has booted; empty before."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        enter = ["nsenter", "-t", child, "-a", "env", "-i", "PATH=/usr/sbin:/usr/bin", "HOME=/tmp", "LANG=C.UTF-8"]
        enter += ["PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", "PYTHONPATH=/src:/src/tests", "PYTHONUNBUFFERED=1"]
        if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
            command = [*enter, "systemctl", "is-system-running"]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            return enter if said.strip() in ("running", "degraded") else []
    return []


def main() -> int:
    """Make it, boot it and have this file run in it; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed
    kept = os.environ.get("BASE")
    with tempfile.TemporaryDirectory(prefix="kimi-proxy-systemd-") as folder:
        base = Path(folder, "debian")
        try:
            groups = find_cgroups()
            make_debian(Path(kept or base).resolve(), os.environ.get("SUITE", "bookworm"))
            if kept:
                subprocess.run(["cp", "-a", "--reflink=auto", kept, base], check=True)
            step("booting")
            with boot(base, groups) as enter:
                venv = f"python3 -m venv {VENV} && {VENV}/bin/pip install -q -r /src/requirements.txt"
                inside = f"systemctl --version && {venv} && exec {VENV}/bin/python /src/tests/systemd.py inside"
                return subprocess.run([*enter, "sh", "-c", inside], check=False).returncode
        except (Complaint, subprocess.CalledProcessError) as error:
            print(f"FAIL: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(look()) if sys.argv[1:] == ["inside"] else main())
