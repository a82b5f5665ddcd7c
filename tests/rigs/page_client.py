"""Real clients that are pages in Chromium.

One has the TypeScript SDK: its every request is one of CORS, for its origin is not the broker's. The other is
the Inspector's, which speaks to the broker through a server of its own.
"""

from __future__ import annotations

import fnmatch
import http.server
import re
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rigs.client_rig import CLIENTS, ClientFailed, Program, person_environment, run_program
from rigs.loopback import free_port

LIMIT = 20_000  # milliseconds, as the browser counts
ANSWER_LIMIT = 60.0
PAGE = b"<!doctype html><title>A client</title><script src=/page.js></script>"
CALLBACK = (
    b"<!doctype html><title>Done</title>"
    b"<script>new BroadcastChannel('logins').postMessage(location.search)</script>"
)


def bundle(node: str, modules: Path, folder: Path) -> bytes:
    """The page's program and the SDK in one script, made without a network."""
    (folder / "node_modules").symlink_to(modules)
    (folder / "page.mjs").write_bytes((CLIENTS / "page.mjs").read_bytes())
    rolldown = modules / "rolldown/bin/cli.mjs"
    words = [node, rolldown, "page.mjs", "--platform", "browser", "--format", "iife", "--file", "page.js"]
    done = run_program(words, folder=folder)
    if done.returncode:
        raise ClientFailed(done.stdout + done.stderr)
    return (folder / "page.js").read_bytes()


class Site(http.server.ThreadingHTTPServer):
    """The page's own origin."""

    daemon_threads = True

    def __init__(self, script: bytes) -> None:
        answers = {
            "/": (b"text/html", PAGE),
            "/callback": (b"text/html", CALLBACK),
            "/page.js": (b"text/javascript", script),
        }

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, body = answers.get(self.path.partition("?")[0], (b"text/plain", b""))
                self.send_response(200)
                self.send_header("Content-Type", kind.decode())
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.origin = "http://127.0.0.1:%d" % self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def log_in(page: Any, finished: str) -> None:
    """Allow, sign in at Forgejo, grant where it asks.

    What a person does in the window of a login, until `finished` (a pattern of URLs).
    """
    page.set_default_timeout(LIMIT)
    page.get_by_label("Full access").check()
    page.get_by_role("button", name="Allow").click(no_wait_after=True)
    deadline = time.monotonic() + ANSWER_LIMIT
    steps = {"[name=password]": _sign_in, "[name=granted][value=true]": _grant}
    while not fnmatch.fnmatch(page.url, finished):
        if time.monotonic() > deadline:
            raise ClientFailed(f"the login does not end, but at {page.url}")
        for selector, step in list(steps.items()):
            if page.locator(selector).count():
                step(page)
                del steps[selector]  # once each: the page stays until the next is there
        page.wait_for_timeout(20)


def _sign_in(page: Any) -> None:
    page.fill("[name=user_name]", "alice")
    page.fill("[name=password]", "secret")
    page.press("[name=password]", "Enter", no_wait_after=True)


def _grant(page: Any) -> None:
    page.locator("[name=granted][value=true]").click(no_wait_after=True)


class Chromium:
    """A browser with one page, before which a person sits."""

    def __init__(self, program: str) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            browser = self._playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
            self.page = self.context.new_page()
            self.page.set_default_timeout(LIMIT)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the browser."""
        self._playwright.stop()


class PageClient:
    """The page, and the person before it."""

    def __init__(self, node: str, chromium: str, url: str, folder: Path) -> None:
        self._site = Site(bundle(node, Path(node).parents[2], folder))
        try:
            self._browser = Chromium(chromium)
        except BaseException:
            self._site.close()
            raise
        try:
            self._page, self._context = self._browser.page, self._browser.context
            self._page.goto(f"{self._site.origin}/?url={quote(url, safe='')}")
            self.started = self._ask("connect")
            if "error" in self.started:
                raise ClientFailed(str(self.started))
        except BaseException:
            self.__exit__()
            raise

    @property
    def logins(self) -> int:
        rounds = self._page.evaluate("rounds()")
        assert isinstance(rounds, int)
        return rounds

    def _ask(self, verb: str, name: str = "", arguments: dict[str, object] | None = None) -> dict[str, Any]:
        """The answer to a line; windows that open meanwhile are logins."""
        self._page.evaluate("([verb, name, given]) => ask(verb, name, given)", [verb, name, arguments or {}])
        deadline = time.monotonic() + ANSWER_LIMIT
        while time.monotonic() < deadline:
            answer: dict[str, Any] | None = self._page.evaluate("take()")
            if answer is not None:
                return answer
            for window in self._context.pages[1:]:
                log_in(window, self._site.origin + "/callback[?]*")
                window.wait_for_load_state("load")  # it has told the page
                window.close()
            self._page.wait_for_timeout(20)
        raise ClientFailed(f"no answer within {ANSWER_LIMIT:.0f} s")

    def call(self, name: str, arguments: dict[str, object] | None = None) -> dict[str, Any]:
        answer = self._ask("call", name, arguments)
        result: dict[str, Any] = answer.get("call", answer)
        return result

    def expire(self) -> None:
        """It learns so from the 401."""

    def __enter__(self) -> PageClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._browser.close()
        self._site.close()


class InspectorPage:
    """The Inspector's web page: a person connects, chooses a tool, reads what it says.

    Its forms are filled in with defaults.
    """

    def __init__(self, node: str, chromium: str, url: str, folder: Path) -> None:
        self.logins = 0
        environment = person_environment(folder, tools=[Path(node)])
        environment |= {"MCP_AUTO_OPEN_ENABLED": "false", "MCP_INSPECTOR_SECRET_STORE": "file"}
        environment |= {name: str(free_port("127.0.0.1")) for name in ("CLIENT_PORT", "MCP_SANDBOX_PORT")}
        launcher = Path(node).parents[2] / "@modelcontextprotocol/inspector/clients/launcher/build/index.js"
        words = [node, launcher, "--web", url, "--transport", "http"]
        self._server = Program(words, environment=environment, patience=0)
        try:
            address = self._server.line()
            while "MCP_INSPECTOR_API_TOKEN=" not in address:
                address = self._server.line()
            self._home = address.strip().partition("?")[0]
            self._browser = Chromium(chromium)
        except BaseException:
            self._server.__exit__()
            raise
        try:
            self._page = self._browser.page
            self._page.goto(address.strip())
            self._page.get_by_role("switch").first.click(force=True)  # its track lies over it
            self._page.wait_for_url("**/oauth/authorize?*")
            self._log_in()
        except BaseException:
            self.__exit__()
            raise

    def _log_in(self) -> None:
        log_in(self._page, self._home + "*")
        self.logins += 1

    def call(self, name: str, arguments: dict[str, object] | None = None) -> dict[str, Any]:
        """What the page shows of a call, after a login where it asks for one."""
        shown = self._call(name)
        while shown is None:
            self._log_in()
            shown = self._call(name)
        return shown

    def _call(self, name: str) -> dict[str, Any] | None:
        """What the page shows of a call; None if it went to a login instead."""
        page = self._page
        results = page.get_by_role("heading", name="Results", exact=True)
        steps = [
            (page.get_by_role("button", name="Close results"), lambda found: found.click()),
            (page.get_by_role("button", name="Execute Tool"), lambda found: found.click()),
            (page.get_by_role("dialog").get_by_role("textbox"), self._answer),
        ]
        page.get_by_text("Tools", exact=True).first.click()
        page.get_by_role("button", name=name, exact=True).click()
        executed = False
        deadline = time.monotonic() + ANSWER_LIMIT
        while time.monotonic() < deadline:
            if "/oauth/authorize" in page.url:
                return None
            if executed and results.count():
                return {"text": self._results(results), "progress_count": self._progress()}
            position = 2 if executed else 0 if steps[0][0].count() else 1
            found, act = steps[position]
            if found.count():
                act(found.first)
                executed = executed or position == 1
            page.wait_for_timeout(20)
        raise ClientFailed(f"the page shows no result: {page.inner_text('body')[:2000]}")

    def _answer(self, field: Any) -> None:
        """Answer the question in the dialog."""
        field.fill("scripted")
        self._page.get_by_role("dialog").get_by_role("button", name="Submit").click()
        self._page.get_by_role("dialog").wait_for(state="hidden")

    def _results(self, heading: Any) -> str:
        """The text below the heading, without its editor's numbers of lines and its buttons."""
        shown = heading.locator("xpath=../../..").inner_text()
        return "\n".join(line for line in shown.splitlines()[1:] if not line.isdigit() and line.isascii())

    def _progress(self) -> int:
        """The step that the page's notice of progress has come to."""
        told = re.findall(r"step (\d+) — \d+ / \d+", self._page.inner_text("body"))
        return int(told[-1]) if told else 0

    def expire(self) -> None:
        """It learns so from the 401."""

    def __enter__(self) -> InspectorPage:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._browser.close()
        self._server.__exit__()
