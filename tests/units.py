"""`make test-units`: what `make install` puts in place, done into a temporary directory, and systemd's view of it.

Nothing of this machine is touched. Needs systemd's own tools, not a running systemd.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from kimi_proxy import Settings, __version__, make_parser, option_variable

ROOT = Path(__file__).parent.parent
UNITS = ("kimi-proxy.service", "kimi-proxy@.service", "kimi-proxy.socket")
SERVICES = ("kimi-proxy.service", "kimi-proxy@.service", "kimi-proxy@8001.service")
THRESHOLD = 15  # of `systemd-analyze security`, in tenths
SAME = {"DynamicUser": "yes", "User": "kimi-proxy", "StateDirectory": "kimi-proxy", "Type": "notify"}


class Complaint(Exception):
    """Something is not as it should be."""


def claim(good: object, words: str) -> None:
    """Complain where `good` is false."""
    if not good:
        raise Complaint(words)


def run(*command: object) -> tuple[int, str]:
    """Exit status of a command, and all that it said; nothing of an outer make or a colour reaches it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environ |= {"LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


class Place:
    """A directory that stands for the root of a machine."""

    def __init__(self, root: Path, python: str) -> None:
        self.root = root
        self.python = python
        self.home = root / "opt/kimi-proxy"
        self.units = root / "etc/systemd/system"
        self.config = root / "etc/kimi-proxy"
        self.state = root / "var/lib/private/kimi-proxy"

    def make(self, target: str, *variables: str, good: bool = True) -> str:
        """What `make install` or `make uninstall` says."""
        status, said = run("make", "--silent", target, f"DESTDIR={self.root}", f"PYTHON={self.python}", *variables)
        claim((status == 0) is good, f"make {target} {' '.join(variables)}: exit status {status}\n{said}")
        return said

    def files(self) -> dict[str, tuple[str, str]]:
        """All that is below: the mode, and the content or the link's aim. Compiled modules may be made anew."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if "__pycache__" in path.parts:
                continue
            content = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes().hex()
            found[str(path.relative_to(self.root))] = (stat.filemode(path.lstat().st_mode), content)
        return found


def test_a_dry_run_does_nothing(place: Place) -> None:
    said = place.make("install", "DRY_RUN=1")
    claim(place.files() == {}, f"a dry run made {list(place.files())}")
    for path in (
        place.home / "kimi_proxy.py",
        *(place.units / unit for unit in UNITS),
        place.config / "kimi-proxy.env",
    ):
        claim(f"would write: {path}\n" in said, f"a dry run does not tell of {path}:\n{said}")


def test_a_first_install_is_complete(place: Place) -> None:
    place.make("install")
    modes = {name: mode for name, (mode, _) in place.files().items()}
    expected = {
        "opt/kimi-proxy": "drwxr-xr-x",
        "opt/kimi-proxy/kimi_proxy.py": "-rw-r--r--",
        "opt/kimi-proxy/bin/kimi-proxy": "-rwxr-xr-x",
        **{f"etc/systemd/system/{unit}": "-rw-r--r--" for unit in UNITS},
        "etc/kimi-proxy": "drwx------",
        "etc/kimi-proxy/kimi-proxy.env": "-rw-------",
    }
    wrong = {name: modes.get(name) for name, mode in expected.items() if modes.get(name) != mode}
    claim(not wrong, f"missing, or of another mode: {wrong}")
    closed = [name for name, mode in modes.items() if name.startswith("opt/") and mode[0] != "l" and mode[7] != "r"]
    claim(not closed, f"the service's user cannot read {closed[:3]}")
    status, said = run("env", "-C", place.home, place.home / "venv/bin/python", "-m", "kimi_proxy", "--version")
    claim((status, said.split()[-1:]) == (0, [__version__]), f"what was installed does not start:\n{said}")


def test_a_second_install_changes_nothing(place: Place) -> None:
    before = place.files()
    place.make("install")
    changed = {name for name, _ in set(before.items()) ^ set(place.files().items())}
    claim(not changed, f"a second install changed {sorted(changed)[:5]}")


def test_an_upgrade_leaves_configuration_and_state(place: Place) -> None:
    before = place.files()
    own = {
        place.config / "kimi-proxy.env": "PROXY_LOG_LEVEL=debug\n",
        place.config / "token": "a-token\n",
        place.config / "8001.env": "",
        place.units / "kimi-proxy.service.d/own.conf": "[Service]\nTasksMax=64\n",
        place.state / "0.json": "{}",
    }
    for path, text in own.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (place.home / "kimi_proxy.py").write_text("raise SystemExit('an old version')\n")
    (place.units / "kimi-proxy.service").write_text("[Service]\nExecStart=/bin/false\n")
    shutil.rmtree(next((place.home / "venv/lib").glob("python*/site-packages/aiohttp")))
    for path in (place.home / "venv/lib").glob("python*/site-packages/aiohttp-*"):
        shutil.rmtree(path)
    place.make("install")
    after = place.files()
    kept = {path: path.read_text() for path in own}
    claim(kept == own, "an upgrade touched configuration or state")
    mended = {name for name in before if name != "etc/kimi-proxy/kimi-proxy.env" and after.get(name) != before[name]}
    claim(not mended, f"an upgrade left {sorted(mended)[:5]}")
    shutil.rmtree(place.home / "venv/lib")
    place.make("install")
    again = place.files()
    lost = {name for name in after if again.get(name) != after[name]}
    claim(not lost, f"a broken environment was not made anew: {sorted(lost)[:5]}")


def test_another_prefix_stands_in_the_units(place: Place) -> None:
    units = "/usr/lib/systemd/system"
    shutil.copytree(place.home, place.root / "srv/kimi", symlinks=True)
    place.make("install", "PREFIX=/srv/kimi", f"UNITDIR={units}")
    for unit in UNITS:
        text = (place.root / units[1:] / unit).read_text()
        claim("/opt/" not in text, f"PREFIX=/srv/kimi: {unit} still names /opt")
        claim(unit.endswith(".socket") or "ExecStart=/srv/kimi/venv/bin/python " in text, f"{unit} names no /srv/kimi")
    command = (place.root / "srv/kimi/bin/kimi-proxy").read_text()
    claim(
        "/opt/" not in command and "/srv/kimi/venv/bin/python " in command,
        "PREFIX=/srv/kimi: its command is for another",
    )
    place.make("uninstall", "PREFIX=/srv/kimi", f"UNITDIR={units}")
    claim(not (place.root / "srv/kimi").exists(), "uninstall left /srv/kimi")
    for wrong in ("kimi", "/", "/opt/", "/opt", "/home/me/kimi", "/tmp/kimi", "/opt/../etc", "/opt/a b", "/opt/a|b"):
        place.make("install", f"PREFIX={wrong}", "DRY_RUN=1", good=False)


def test_uninstalling_leaves_configuration_and_state(place: Place) -> None:
    before = place.files()
    said = place.make("uninstall", "DRY_RUN=1")
    claim(place.files() == before and "would run: rm" in said, "a dry run of uninstall removed something, or is mute")
    (place.home / "own").write_text("not ours\n")
    for _ in range(2):
        said = place.make("uninstall")
        left = {path.relative_to(place.root).as_posix() for path in place.root.rglob("*") if path.is_file()}
        kept = {name for name in before if name.startswith(("etc/kimi-proxy/", "var/")) and name.count(".")}
        kept |= {"etc/kimi-proxy/token", "etc/systemd/system/kimi-proxy.service.d/own.conf", "opt/kimi-proxy/own"}
        claim(left == kept, f"uninstall: {sorted(left ^ kept)[:5]} should not be there, or should")
        for path in (place.config, place.state):
            claim(str(path) in said, f"uninstall does not say where {path} is:\n{said}")
    (place.home / "own").unlink()
    place.make("uninstall")
    claim(not place.home.exists(), "uninstall left an empty directory")


def copy_units(place: Place, target: Path) -> None:
    """The installed units, with the paths at which things are now, and an instance of the template."""
    target.mkdir()
    for unit in UNITS:
        text = (place.units / unit).read_text().replace("/opt/kimi-proxy", str(place.home))
        (target / unit).write_text(text)
    shutil.copy(target / "kimi-proxy@.service", target / "kimi-proxy@8001.service")


def verify(unit: Path) -> str:
    """What `systemd-analyze verify` has to say: nothing, for a good unit. (Its status is 0 for many a fault.)"""
    status, said = run("systemd-analyze", "verify", unit)
    return said or ("" if status == 0 else f"exit status {status}")


def measure(unit: Path) -> tuple[bool, str]:
    """Whether the score of `systemd-analyze security` is good enough, and the score."""
    status, said = run("systemd-analyze", "security", "--offline=true", f"--threshold={THRESHOLD}", unit)
    score = re.search(r"exposure level for \S+ (\S+)", said)
    return status == 0 and score is not None, score[1] if score else said


def test_systemd_has_no_complaint(place: Place, units: Path) -> None:
    for unit in (*UNITS, SERVICES[-1]):
        claim(not verify(units / unit), f"systemd-analyze verify {unit}:\n{verify(units / unit)}")
    for unit in SERVICES:
        good, score = measure(units / unit)
        claim(good, f"systemd-analyze security {unit}: {score}, should be {THRESHOLD / 10} or less")
        print(f"   {unit}: verify is silent, security {score}")


def test_the_checks_can_fail(place: Place, units: Path) -> None:
    text = (units / "kimi-proxy.service").read_text()
    for good, bad in (
        ("SetCredential=token:\\n", "SetCredential=token:"),
        ("Restart=on-failure", "Restart=sometimes"),
        ("/venv/bin/python ", "/venv/bin/pythoff "),
        ("LimitNOFILE", "LimitFiles"),
    ):
        claim(good in text, f"{good} is not there any more")
        (units / "bad.service").write_text(text.replace(good, bad))
        claim(verify(units / "bad.service"), f"systemd-analyze verify does not see {bad}")
    (units / "bad.service").write_text(text.replace("CapabilityBoundingSet=\n", ""))
    claim(not measure(units / "bad.service")[0], "systemd-analyze security does not see what is missing")
    (units / "bad.service").unlink()


def read_unit(path: Path) -> list[tuple[str, str]]:
    """The directives of a unit, in order."""
    return re.findall(r"(?m)^(\w+)=(.*)$", path.read_text())


def test_the_units_agree_with_each_other_and_the_settings(place: Place, units: Path) -> None:
    one, several = (read_unit(units / unit) for unit in UNITS[:2])
    differ = {name for name, _ in set(one) ^ set(several)}
    expected = {"Description", "ExecStart", "SyslogIdentifier", "EnvironmentFile", "SocketBindAllow"}
    claim(differ == expected, f"the template differs from the service in {sorted(differ)}")
    claim(SAME.items() <= dict(one).items(), f"kimi-proxy.service has not all of {SAME}")
    command = dict(several)["ExecStart"].partition(" -m kimi_proxy ")[2].replace("%i", "8001")
    claim(make_parser("serve").parse_intermixed_args(command.split()).port == "8001", f"no port in {command}")
    listen = dict(read_unit(units / "kimi-proxy.socket"))["ListenStream"]
    default = Settings()
    claim(listen == f"{default.host}:{default.port}", f"the socket is {listen}, the settings say otherwise")
    claim(dict(one)["SocketBindAllow"] == f"tcp:{default.port}", "the service may not bind the default port")

    status, said = run(place.home / "bin/kimi-proxy", "serve")
    claim(status == 2 and "kimi-proxy check" in said, f"its command does not say how to use it: {said}")
    command = (place.home / "bin/kimi-proxy").read_text()
    names = {"DynamicUser", "User", "StateDirectory", "StateDirectoryMode", "UMask", "EnvironmentFile"}
    names |= {"LoadCredential", "SetCredential"}
    alone = [f"{name}={value}" for name, value in one if name in names and f"{name}={value}" not in command]
    claim(not alone, f"its command does not run as the service: {alone}")

    environ = dict(value.split("=", 1) for name, value in one if name == "Environment")
    example = (ROOT / "systemd/kimi-proxy.env").read_text()
    claim(not re.search(r"(?m)^[^#\n]", example), "kimi-proxy.env sets something by itself")
    pairs = re.findall(r"(?m)^#(\w+)=(\S+)$", example)
    loose = [line for line in example.splitlines() if re.match(r"#\S", line) and not re.fullmatch(r"#\w+=\S+", line)]
    claim(len(pairs) > 5 and not loose, f"kimi-proxy.env: {loose}")
    known = set(map(option_variable, fields(Settings)))
    unknown = {*dict(pairs), *environ} - known
    claim(not unknown, f"there are no settings {sorted(unknown)}")
    Settings.load({**environ, **dict(pairs)})
    loaded = {value.partition(":")[0] for name, value in one if name == "LoadCredential"}
    fallbacks = {value.partition(":")[0] for name, value in one if name == "SetCredential"}
    named = {value for name, value in pairs if name.endswith("_FILE")}
    claim(loaded == fallbacks == named, f"credentials: {loaded} loaded, {fallbacks} may be missing, {named} named")


def main(python: str) -> int:
    """The exit status: 0 where nobody complained."""
    for tool, package in (("systemd-analyze", "systemd"), ("make", "make")):
        if shutil.which(tool) is None:
            print(f"this needs {tool}; on Debian: sudo apt install {package}", file=sys.stderr)
            return 1
    with tempfile.TemporaryDirectory(prefix="kimi-proxy-units-") as name:
        place, units = Place(Path(name) / "root", python), Path(name) / "units"
        place.root.mkdir()
        try:
            for test in (
                test_a_dry_run_does_nothing,
                test_a_first_install_is_complete,
                test_a_second_install_changes_nothing,
            ):
                step(test.__name__)
                test(place)
            copy_units(place, units)
            for check in (
                test_systemd_has_no_complaint,
                test_the_checks_can_fail,
                test_the_units_agree_with_each_other_and_the_settings,
            ):
                step(check.__name__)
                check(place, units)
            for test in (
                test_an_upgrade_leaves_configuration_and_state,
                test_another_prefix_stands_in_the_units,
                test_uninstalling_leaves_configuration_and_state,
            ):
                step(test.__name__)
                test(place)
        except Complaint as complaint:
            print(f"FAIL: {complaint}", file=sys.stderr)
            return 1
    return 0


def step(name: str) -> None:
    """Say what is looked at."""
    print(f"== {name.removeprefix('test_').replace('_', ' ')}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else sys.executable))
