"""Real clients as the tests drive them.

Each logs in as alice, calls tools, and can be told that its token has expired. `TABLE` is the list of them,
and says what each can do. A client is made by its entry's `start(parts, url, folder)`, where `parts` gives
the program of a real part; it has `call(name, arguments)` (a result as {"text", "progress_count"}, or
{"error"}), `expire()`, `logins`, and is a context manager that ends it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rigs.assistants import Assistant, ClaudeCode, Codex, CopilotCli
from rigs.client_rig import (
    CLIENTS,
    ClientFailed,
    LineClient,
    Program,
    person_environment,
    run_program,
    visits,
)
from rigs.page_client import InspectorPage, PageClient

Parts = Callable[[str], str]
Result = dict[str, Any]


class Client(Protocol):
    """What the tests ask of a client."""

    @property
    def logins(self) -> int: ...
    def call(self, name: str, arguments: dict[str, object] | None = None) -> Result: ...
    def expire(self) -> None: ...
    def __enter__(self) -> Client: ...
    def __exit__(self, *_exc: object) -> None: ...


class ByLine:
    """A client program of the suite's own, on a library.

    It stays connected and takes commands by the line.
    """

    def __init__(self, words: list[object], folder: Path, *, opens_browser: bool = False) -> None:
        self._folder = folder
        environment = person_environment(folder, background=True) if opens_browser else None
        self._client = LineClient(words, environment=environment)
        if "error" in self._client.started:
            with self._client:
                raise ClientFailed(f"{self._client.started}: {self._client.errors()}")
        self.started: Result = self._client.started
        self._rounds = self.started.get("authorize_rounds", 0)

    @property
    def logins(self) -> int:
        """How often a person has logged in: here, in its own program, or in a browser that it opened."""
        return self._client.logins + self._rounds + visits(self._folder)

    def call(self, name: str, arguments: dict[str, object] | None = None) -> Result:
        said = self._client.ask(f"call {name} {json.dumps(arguments or {})}")
        self._rounds = said.get("authorize_rounds", self._rounds)
        return said.get("call", said)

    def expire(self) -> None:
        self._client.ask("expire")

    def __enter__(self) -> ByLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.__exit__(*exc)


class McpRemote:
    """mcp-remote: a bridge that a client starts as if it were a server on stdio.

    The client here is the test.
    """

    def __init__(self, node: str, url: str, folder: Path) -> None:
        self._folder, self._number = folder, 0
        script = modules(node) / "mcp-remote/dist/proxy.js"
        self._program = Program([node, script, url], environment=person_environment(folder))
        capabilities = {"elicitation": {}}
        info = {"name": "stdio", "version": "1"}
        try:
            self._ask(
                "initialize",
                {"protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": info},
            )
            self._tell({"method": "notifications/initialized"})
        except BaseException:
            self._program.__exit__()
            raise

    @property
    def logins(self) -> int:
        return visits(self._folder)

    def _tell(self, message: Result) -> None:
        self._program.tell(json.dumps({"jsonrpc": "2.0", **message}))

    def _ask(self, method: str, params: Result) -> Result:
        """The answer to a request; questions are answered, progress is counted in it."""
        self._number += 1
        self._tell({"id": self._number, "method": method, "params": params})
        told = 0
        while True:
            message = self._program.value()
            if message.get("method") == "elicitation/create":
                answer = {"action": "accept", "content": {"answer": "scripted"}}
                self._tell({"id": message["id"], "result": answer})
            elif message.get("method") == "notifications/progress":
                told += 1
            elif message.get("id") == self._number:
                return {**message, "progress_count": told}

    def call(self, name: str, arguments: dict[str, object] | None = None) -> Result:
        params = {"name": name, "arguments": arguments or {}, "_meta": {"progressToken": "told"}}
        answer = self._ask("tools/call", params)
        if "error" in answer:
            return {"error": answer["error"]}
        text = "".join(part["text"] for part in answer["result"]["content"])
        return {"text": text, "progress_count": answer["progress_count"]}

    def expire(self) -> None:
        """It learns so from the 401."""

    def __enter__(self) -> McpRemote:
        return self

    def __exit__(self, *exc: object) -> None:
        self._program.__exit__(*exc)


class Mcpc:
    """mcpc: one command a call, and a bridge of its own behind them that keeps the session."""

    def __init__(self, node: str, url: str, folder: Path) -> None:
        self._folder, self._url = folder, url
        self._words: list[object] = [node, modules(node) / "@apify/mcpc/dist/cli/index.js"]
        self._environment = person_environment(folder, tools=[Path(node)])
        self._environment["MCPC_HOME_DIR"] = str(folder / "mcpc")
        self.login()
        done = self._run("connect", url, "@here")
        if done.returncode:
            raise ClientFailed(done.stdout + done.stderr)

    def _run(self, *words: str) -> Any:
        return run_program([*self._words, *words], environment=self._environment, folder=self._folder)

    @property
    def logins(self) -> int:
        return visits(self._folder)

    def login(self) -> None:
        """What its user does first, and again when it says that it is not authorized any more."""
        done = self._run("login", self._url)
        if done.returncode:
            raise ClientFailed(done.stdout + done.stderr)

    def call(self, name: str, arguments: dict[str, object] | None = None) -> Result:
        done = self._run("--json", "@here", "tools-call", name, json.dumps(arguments or {}))
        if done.returncode:
            return {"error": done.stdout + done.stderr}
        return {"text": "".join(part["text"] for part in json.loads(done.stdout)["content"])}

    def expire(self) -> None:
        """Date its stored token back: it refreshes by its own clock.

        A bridge that runs has its own copy, and is started anew.
        """
        stored = self._folder / "mcpc" / "credentials.json"
        entries = json.loads(stored.read_text())
        for name in [name for name in entries if name.endswith(":tokens")]:
            entries[name] = json.dumps({**json.loads(entries[name]), "expiresAt": 1})
        stored.write_text(json.dumps(entries))
        self._run("@here", "restart")

    def __enter__(self) -> Mcpc:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._run("@here", "close")


class InspectorCommand:
    """The Inspector's command line: one command a call, each a session of its own.

    Its login lies in its home, where there is no keyring.
    """

    def __init__(self, node: str, url: str, folder: Path) -> None:
        self._folder = folder
        launcher = modules(node) / "@modelcontextprotocol/inspector/clients/launcher/build/index.js"
        callback = "http://127.0.0.1:0/oauth/callback"
        self._words: list[object] = [node, launcher, "--cli", url, "--transport", "http"]
        self._words += ["--callback-url", callback, "--method"]
        self._environment = person_environment(folder, tools=[Path(node)])
        self._environment["MCP_INSPECTOR_SECRET_STORE"] = "file"

    @property
    def logins(self) -> int:
        return visits(self._folder)

    def call(self, name: str, arguments: dict[str, object] | None = None) -> Result:
        given: list[object] = []
        for key, value in (arguments or {}).items():
            given += ["--tool-arg", f"{key}={json.dumps(value)}"]
        words = [*self._words, "tools/call", "--tool-name", name, *given]
        done = run_program(words, environment=self._environment, folder=self._folder)
        if done.returncode:
            return {"error": done.stdout + done.stderr}
        return {"text": "".join(part["text"] for part in json.loads(done.stdout)["content"])}

    def expire(self) -> None:
        """It learns so from the 401."""

    def __enter__(self) -> InspectorCommand:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Nothing of it runs between calls."""


def modules(node: str) -> Path:
    """The folder of packages that a Node of the real part "npm" stands in."""
    return Path(node).parents[2]


def script_beside(node: str, folder: Path, name: str) -> Path:
    """A script of clients/ where its imports are found: that is decided by where it lies."""
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(modules(node))
    for script in CLIENTS.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder / name


def python_sdk(line: int) -> Callable[[Parts, str, Path], ByLine]:
    """Starts a client on one of the two lines of the Python SDK; the person is in its program."""

    def start(parts: Parts, url: str, folder: Path) -> ByLine:
        script = CLIENTS / f"sdk{line}_client.py"
        return ByLine([parts(f"mcp{line}"), script, url, "alice", "secret", "--interactive-lines"], folder)

    return start


def typescript_sdk(line: int, mode: str) -> Callable[[Parts, str, Path], ByLine]:
    """Starts a client on one of the two lines of the TypeScript SDK."""

    def start(parts: Parts, url: str, folder: Path) -> ByLine:
        node = parts("npm")
        script = script_beside(node, folder, "ts_client.mjs")
        return ByLine([node, script, str(line), url, mode, "--interactive-lines"], folder)

    return start


def ai_sdk(parts: Parts, url: str, folder: Path) -> ByLine:
    """Starts @ai-sdk/mcp."""
    node = parts("npm")
    return ByLine([node, script_beside(node, folder, "ai_client.mjs"), url], folder)


def go_client(name: str) -> Callable[[Parts, str, Path], ByLine]:
    """Starts one of the clients on Go's libraries."""
    return lambda parts, url, folder: ByLine([Path(parts("go-clients")).parent / name, url], folder)


def assistant(kind: type[Assistant]) -> Callable[[Parts, str, Path], Assistant]:
    """Starts an assistant."""
    return lambda parts, url, folder: kind(Path(parts("assistants")).parents[1], url, folder)


def fastmcp(parts: Parts, url: str, folder: Path) -> ByLine:
    """Starts FastMCP's client."""
    words: list[object] = [parts("fastmcp"), CLIENTS / "fastmcp_client.py", url]
    return ByLine(words, folder, opens_browser=True)


@dataclass(frozen=True)
class Entry:
    """One client: the real parts it needs, how it starts, and what it can do.

    And whether it is second of its kind or an assistant.
    """

    parts: tuple[str, ...]
    start: Callable[[Parts, str, Path], Client]
    second: bool = False
    assistant: bool = False
    progress: bool = True
    question: bool = True
    # Whether it gives a server up whose stream broke, when that
    # does not come back at once: until it is started anew.
    gives_up: bool = False
    # After a revocation: "asks" its person and goes on; "asks, may lose its
    # session": it asks, but keeps naming the session that ended with the
    # login, until it is started anew; "says so": it tells its user to log in.
    revoked: str = field(default="asks")


TABLE: dict[str, Entry] = {
    "Python SDK 1": Entry(("mcp1",), python_sdk(1), second=True, revoked="asks, may lose its session"),
    "Python SDK 2": Entry(("mcp2",), python_sdk(2)),
    "TypeScript SDK 1": Entry(
        ("npm",), typescript_sdk(1, "legacy"), second=True, revoked="asks, may lose its session"
    ),
    "TypeScript SDK 2": Entry(("npm",), typescript_sdk(2, "auto")),
    "AI SDK": Entry(("npm",), ai_sdk, progress=False),
    "Go SDK": Entry(("go-clients",), go_client("sdk")),
    "mcp-go": Entry(("go-clients",), go_client("mark3labs"), second=True),
    "Java SDK": Entry(
        ("java-client",),
        lambda parts, url, folder: ByLine([parts("java-client"), url], folder),
        revoked="asks, may lose its session",
    ),
    "FastMCP": Entry(("fastmcp",), fastmcp, second=True, revoked="asks, may lose its session"),
    "TypeScript SDK in a page": Entry(
        ("npm", "chromium"),
        lambda parts, url, folder: PageClient(parts("npm"), parts("chromium"), url, folder),
    ),
    "mcp-remote": Entry(
        ("npm",),
        lambda parts, url, folder: McpRemote(parts("npm"), url, folder),
        second=True,
        revoked="asks, may lose its session",
    ),
    "mcpc": Entry(
        ("npm",),
        lambda parts, url, folder: Mcpc(parts("npm"), url, folder),
        progress=False,
        question=False,
        revoked="says so",
    ),
    "Inspector's page": Entry(
        ("npm", "chromium"),
        lambda parts, url, folder: InspectorPage(parts("npm"), parts("chromium"), url, folder),
        second=True,
        revoked="asks, may lose its session",
    ),
    "Inspector's command line": Entry(
        ("npm",),
        lambda parts, url, folder: InspectorCommand(parts("npm"), url, folder),
        second=True,
        progress=False,
        question=False,
    ),
    # Without a person at a terminal assistants decline questions, and show progress to nobody.
    **{
        name: Entry(
            ("assistants",),
            assistant(kind),
            assistant=True,
            progress=False,
            question=False,
            gives_up=kind is CopilotCli,
            revoked="says so",
        )
        for name, kind in (("Codex", Codex), ("Claude Code", ClaudeCode), ("Copilot CLI", CopilotCli))
    },
}
