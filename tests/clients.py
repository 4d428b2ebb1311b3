"""`make test-clients`: real programs do one task each through the proxy, with the simulator behind it.

Each row of `CLIENTS` is installed into a folder of its own outside of this tree, and run over both protocols. Programs
that cannot be installed are reported as not run. The arguments: the folder for the installations, and the names of the
clients to run (all, if there are none).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from kimi_simulator import HELLO, Simulator

from kimi_proxy import Settings, logger, run_server

INSTALL_SECONDS = 900
TASK_SECONDS = 180

# Whatever a client would call beside the proxy ends at a port where nobody listens.
FENCE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost"}

WORD = "the magic word is sesame-7431"
COPY = "Copy the file $home/secret.txt to $home/copy.txt and tell me what it says."
CALLS = "The results are: sunny in Paris"  # the simulator's words once it has the result of a call
CITY = '{"name":"Paris","people":7}'  # and what it answers to a schema of two fields


@dataclass(frozen=True, slots=True)
class Client:
    """One program. In commands, environment and files, `$url`, `$key` and `$home` stand for what is set at each run.

    It passes if it ends with exit status 0, prints `prints`, has written `writes` (name and text) into its home, has
    asked at least `questions` questions, and had the web searched only where it `searches`.
    """

    name: str
    packages: str  # of PyPI ("llm==0.36") or npm ("cline@3.0.65"); the first one's version is the client's
    script: str  # what the simulator answers
    commands: Sequence[Sequence[str]]  # run in order; what the last one prints is checked
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    prints: str = WORD
    writes: Mapping[str, str] = field(default_factory=dict)
    questions: int = 1
    searches: bool = False

    @property
    def from_npm(self) -> bool:
        """Whether the packages are npm's."""
        return "==" not in self.packages

    @property
    def version(self) -> str:
        """The version of the first package."""
        return re.split("==|@", self.packages.split()[0])[-1]


def agent(
    name: str,
    packages: str,
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    searches: bool = False,
) -> Client:
    """A coding agent: it copies a file with its own tools, in three questions or more, and tells of it."""
    return Client(
        *(name, packages, "agent", commands, environment or {}, files or {}),
        writes={"copy.txt": WORD},
        questions=3,
        searches=searches,
    )


CLIENTS = (
    agent(
        "claude",
        "@anthropic-ai/claude-code@2.1.332",
        [["claude", "-p", COPY, "--allowedTools", "Read,Write"]],
        {
            "ANTHROPIC_BASE_URL": "$url",
            "ANTHROPIC_AUTH_TOKEN": "$key",
            "ANTHROPIC_MODEL": "kimi",
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "128000",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_RETRIES": "0",
            "DISABLE_AUTOUPDATER": "1",
            "IS_SANDBOX": "1",
        },
    ),
    agent(
        "ccr",
        "@musistudio/claude-code-router@2.0.0 @anthropic-ai/claude-code@2.1.332",
        [["ccr", "code", "-p", COPY, "--allowedTools", "Read,Write"]],
        {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "IS_SANDBOX": "1"},
        {
            ".claude-code-router/config.json": """{"PORT": 34561, "NON_INTERACTIVE_MODE": true,
  "Providers": [{"name": "kimi", "api_base_url": "$url/v1/chat/completions", "api_key": "$key", "models": ["kimi"]}],
  "Router": {"default": "kimi,kimi"}}
"""
        },
    ),
    agent(
        "codex",
        "@openai/codex@0.171.0",
        [["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", COPY]],
        {"KIMI_KEY": "$key"},
        {
            ".codex/config.toml": """model = "kimi"
model_provider = "kimi_proxy"
model_context_window = 128000

[model_providers.kimi_proxy]
name = "kimi_proxy"
base_url = "$url/v1"
env_key = "KIMI_KEY"
wire_api = "responses"
"""
        },
        searches=True,  # it offers web_search with each question
    ),
    agent(
        "opencode",
        "opencode-ai@1.18.33",
        [["opencode", "run", "-m", "kimi/kimi-nosearch", COPY]],
        {},
        {
            "opencode.json": """{"permission": "allow", "provider": {"kimi": {
  "npm": "@ai-sdk/openai-compatible",
  "options": {"baseURL": "$url/v1", "apiKey": "$key"},
  "models": {"kimi-nosearch": {"attachment": true,
    "modalities": {"input": ["text", "image"], "output": ["text"]}, "limit": {"context": 128000, "output": 16000}}}}}}
"""
        },
    ),
    agent(
        "qwen",
        "@qwen-code/qwen-code@0.24.4 node@22",
        [["qwen", "--auth-type", "openai", "--yolo", "-p", COPY]],
        {"OPENAI_BASE_URL": "$url/v1", "OPENAI_API_KEY": "$key", "OPENAI_MODEL": "kimi"},
    ),
    agent(
        "cn",
        "@continuedev/cli@1.5.47",
        [["cn", "--config", "$home/config.yaml", "--auto", "-p", COPY]],
        {"CONTINUE_TELEMETRY_ENABLED": "0"},
        {
            "config.yaml": """name: kimi
version: 1.0.0
schema: v1
models:
  - name: kimi
    provider: openai
    model: kimi
    apiBase: $url/v1
    apiKey: $key
    roles: [chat]
    capabilities: [tool_use, image_input]
"""
        },
    ),
    agent(
        "cline",
        "cline@3.0.65",
        [["cline", "auth", "-p", "openai", "-k", "$key", "-m", "kimi", "-b", "$url/v1"], ["cline", COPY]],
    ),
    agent(
        "pi",
        "@mariozechner/pi-coding-agent@0.73.1",
        [["pi", "--provider", "kimi", "--model", "kimi", "-p", COPY]],
        {"PI_OFFLINE": "1"},
        {
            ".pi/agent/models.json": """{"providers": {"kimi": {
  "baseUrl": "$url/v1", "api": "openai-completions", "apiKey": "$key",
  "models": [{"id": "kimi", "input": ["text", "image"], "contextWindow": 128000, "maxTokens": 16000}]}}}
"""
        },
    ),
    Client(
        "aider",
        "aider-chat==0.86.2",
        "aider",
        [
            ["git", "init", "--quiet"],
            [
                *("aider", "--model", "openai/kimi-nosearch", "--edit-format", "diff", "--no-show-model-warnings"),
                *("--yes-always", "--no-detect-urls", "--analytics-disable", "--no-check-update", "--no-gitignore"),
                *("--message", "Greet https://example.com/?a=1 in hello.py", "hello.py"),
            ],
        ],
        {"OPENAI_API_BASE": "$url/v1", "OPENAI_API_KEY": "$key", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        {"hello.py": 'GREETED = "https://example.org/"  # see `https://example.org/why`\nprint("hello")\n'},
        prints="Applied edit to hello.py",
        writes={
            "hello.py": 'GREETED = "https://example.org/"  # see `https://example.org/why`\n'
            'print("hello https://example.com/?a=1")\n',
            ".git/COMMIT_EDITMSG": "feat: Greet more\n\n"
            "Co-authored-by: aider (openai/kimi-nosearch) <aider@aider.chat>",
        },
        questions=3,  # aider commits what was there before, too
    ),
    Client(
        "llm",
        "llm==0.36",
        "tool",
        [["llm", "-m", "kimi", "--functions", "$home/weather.py", "What is the weather in Paris?"]],
        {"LLM_USER_PATH": "$home"},
        {
            "extra-openai-models.yaml": """- model_id: kimi
  model_name: kimi
  api_base: $url/v1
  api_key_name: kimi
  supports_tools: true
  supports_schema: true
  vision: true
""",
            "keys.json": '{"kimi": "$key"}',
            "weather.py": 'def weather(city: str) -> str:\n    """The weather."""\n    return f"sunny in {city}"\n',
        },
        prints=CALLS,
        questions=2,
    ),
    Client(
        "shell-gpt",
        "shell-gpt==1.5.1 click",
        "hello",
        [["sgpt", "--no-interaction", "--no-md", "Say hello."]],
        {"API_BASE_URL": "$url/v1", "OPENAI_API_KEY": "$key", "DEFAULT_MODEL": "kimi-nosearch"},
        prints=HELLO,
    ),
    Client(
        "gptme",
        "gptme==0.35.1",
        "hello",
        [["gptme", "--non-interactive", "--model", "kimi/kimi-nosearch", "Say hello."]],
        {},
        {
            ".config/gptme/config.toml": """[[providers]]
name = "kimi"
base_url = "$url/v1"
api_key = "$key"
default_model = "kimi-nosearch"
"""
        },
        prints=HELLO,
    ),
    Client(
        "instructor",
        "instructor==1.17.0",
        "json",
        [["python", "program.py"]],
        {"OPENAI_BASE_URL": "$url/v1", "OPENAI_API_KEY": "$key"},
        {
            "program.py": """import instructor, openai, pydantic

class City(pydantic.BaseModel):
    name: str
    people: int

client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
asked = [{"role": "user", "content": "Paris?"}]
print(client.chat.completions.create(model="kimi", response_model=City, messages=asked).model_dump_json())
"""
        },
        prints=CITY,
    ),
    Client(
        "pydantic-ai",
        "pydantic-ai-slim[openai]==2.66.0",
        "tool",
        [["python", "program.py"]],
        {},
        {
            "program.py": """from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

agent = Agent(OpenAIChatModel("kimi", provider=OpenAIProvider(base_url="$url/v1", api_key="$key")))

@agent.tool_plain
def weather(city: str) -> str:
    "The weather."
    return f"sunny in {city}"

print(agent.run_sync("What is the weather in Paris?").output)
"""
        },
        prints=CALLS,
        questions=2,
    ),
    Client(
        "litellm",
        "litellm==1.110.2",
        "json",
        [["python", "program.py"]],
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        {
            "program.py": """import litellm, pydantic

class City(pydantic.BaseModel):
    name: str
    people: int

answer = litellm.completion(model="openai/kimi", api_base="$url/v1", api_key="$key", response_format=City,
                            messages=[{"role": "user", "content": "Paris?"}])
print(City.model_validate_json(answer.choices[0].message.content).model_dump_json())
"""
        },
        prints=CITY,
    ),
    Client(
        "llama-index",
        "llama-index-llms-openai-like==0.8.1",
        "tool",
        [["python", "program.py"]],
        {},
        {
            "program.py": """from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

def weather(city: str) -> str:
    "The weather."
    return f"sunny in {city}"

llm = OpenAILike(model="kimi", api_base="$url/v1", api_key="$key", is_chat_model=True, is_function_calling_model=True)
print(llm.predict_and_call([FunctionTool.from_defaults(weather)], user_msg="What is the weather in Paris?").response)
"""
        },
        prints="sunny in Paris",
    ),
)


class NotRun(Exception):
    """The client cannot be installed here; the text says why."""


async def run_command(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> tuple[str, str]:
    """Run a command in `folder`: what is wrong (empty if it ended with status 0), and all that it printed."""
    with tempfile.TemporaryFile() as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = await asyncio.wait_for(process.wait(), seconds)
            wrong = f"exit status {status}" if status else ""
        except TimeoutError:
            wrong = f"not done after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # whatever it left running
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        out.seek(0)
        return wrong, out.read().decode("utf-8", "replace")


async def install(client: Client, root: Path) -> Path:
    """The folder of the client's programs, installed there unless that was done before. Raises `NotRun`."""
    folder = root / client.name
    stamp = folder / "installed"
    programs = folder / ("node_modules/.bin" if client.from_npm else "bin")
    if stamp.is_file() and stamp.read_text() == client.packages:
        return programs
    print(f"     installing {client.packages}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client.from_npm:
        commands = [["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--loglevel=error"]]
    else:
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        commands = [[sys.executable, "-m", "venv", str(folder)], pip]
    commands[-1] += client.packages.split()
    for command in commands:
        if shutil.which(command[0]) is None:
            raise NotRun(f"{command[0]} is missing")
        wrong, out = await run_command(command, folder, os.environ, INSTALL_SECONDS)
        if wrong:
            raise NotRun(f"{wrong} of {' '.join(command)}\n{out[-2000:]}")
    stamp.write_text(client.packages)
    return programs


def make_home(client: Client, place: str, values: Mapping[str, str]) -> Path:
    """The client's home: the file of the task, and the client's settings."""
    home = Path(place)
    for name, text in {"secret.txt": f"{WORD}\n", **client.files}.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(Template(text).substitute(values))
    return home


def end_processes(home: Path) -> None:
    """End what a client left running in the background, known by its home (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"HOME={home}\0".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def find_faults(client: Client, home: Path, printed: str, questions: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with what the client did; empty if nothing is."""
    faults = [] if client.prints in printed else [f"it did not print {client.prints!r}"]
    for name, text in client.writes.items():
        found = (home / name).read_text() if (home / name).is_file() else None
        if found is None or found.strip() != text.strip():
            faults.append(f"{name} has {found!r}")
    if len(questions) < client.questions:
        faults.append(f"only {len(questions)} questions")
    if any(question.get("use_search") or question.get("tools") for question in questions) != client.searches:
        faults.append("it searched the web" if not client.searches else "it did not search the web")
    return "; ".join(faults)


async def run_client(client: Client, programs: Path, protocol: str) -> str:
    """Have the client do its task; what is wrong, empty if it passed."""
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator())
        settings = Settings(
            base_url=simulator.url, auth_url=simulator.url, protocol=protocol, port=0, state_dir="", drain_seconds=1
        )
        url, _ = await stack.enter_async_context(run_server(settings))
        token = simulator.token(client.script)
        place = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        values = {"url": url, "key": token, "home": place}
        home = make_home(client, place, values)
        stack.callback(end_processes, home)
        environment = {
            **{name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ},
            **FENCE,
            "HOME": place,
            "TMPDIR": place,
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            **{name: Template(text).substitute(values) for name, text in client.environment.items()},
        }
        for words in client.commands:
            program, *arguments = [Template(word).substitute(values) for word in words]
            command = [shutil.which(program, path=environment["PATH"]) or program, *arguments]
            wrong, printed = await run_command(command, home, environment, TASK_SECONDS)
            if wrong:
                return f"{wrong}\n{printed[-4000:]}"
        account = await simulator.settle(token)
        faults = find_faults(client, home, printed, account.asked)
        return f"{faults}\n{printed[-4000:]}" if faults else ""


async def main(root: Path, names: Sequence[str]) -> int:
    """Run each client over both protocols; the exit status: 0 where none failed."""
    unknown = set(names) - {client.name for client in CLIENTS}
    if unknown:
        print(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in CLIENTS)}")
        return 2
    logger.setLevel(logging.ERROR)  # the simulator sends much that is new to the proxy
    results: dict[str, list[str]] = {"passed": [], "failed": [], "not run": []}
    for client in CLIENTS:
        if names and client.name not in names:
            continue
        title = f"{client.name} {client.version}"
        try:
            programs = await install(client, root)
        except NotRun as error:
            print(f"----  {title}: not run: {error}", flush=True)
            results["not run"].append(title)
            continue
        failed = False
        for protocol in ("classic", "connect"):
            start = time.monotonic()
            wrong = await run_client(client, programs, protocol)
            failed = failed or bool(wrong)
            took = time.monotonic() - start
            print(f"{'FAIL' if wrong else 'ok  '}  {title}, {protocol}: {took:.0f} s {wrong}", flush=True)
        results["failed" if failed else "passed"].append(title)
    print("; ".join(f"{len(titles)} {word}: {', '.join(titles)}" for word, titles in results.items() if titles))
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2:])))
