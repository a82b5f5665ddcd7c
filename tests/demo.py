"""The main job on one machine with nothing but Python: two people, one URL, each acts as themselves.

    python3 tests/demo.py            show it, then stay up so that real clients can connect
    python3 tests/demo.py --once     show it and end (exit status 0 if all went well)

Starts a stand-in for Forgejo (tests/fake_forgejo.py) and the real broker, lets
a scripted client log in as alice and then as bob, and has each call the same
tool. The child is `forgejo-mcp` where it is installed, else a small stand-in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from rigs.broker_process import BROKER, BrokerProcess, NotReady, toml  # noqa: E402
from rigs.fake_forgejo import FakeForgejo  # noqa: E402
from rigs.mcp_client import McpClient, OAuthClient  # noqa: E402

ROOT = TESTS.parent
STAND_IN = TESTS / "rigs" / "stdio_child.py"
PASSWORD = "secret"
WHO_AM_I = "get_my_user_info"
LOG_TAIL = 40


class DemoFailed(Exception):
    """Something that keeps the demo from going on, in a sentence for people."""


# ---- The parts
# ------------------------------------------------------------------------------------------------------


def find_child():
    """(configuration value, description) of the MCP server to run.

    That is forgejo-mcp if there is one, else the stand-in.
    """
    binary = installed_forgejo_mcp()
    if binary:
        return binary, f"forgejo-mcp ({binary})"
    return [sys.executable, str(STAND_IN)], "tests/stdio_child.py, a stand-in (forgejo-mcp is not installed)"


def installed_forgejo_mcp():
    """The path of forgejo-mcp from PATH or from what tests/run.py installed, or None."""
    on_path = shutil.which("forgejo-mcp")
    if on_path:
        return on_path
    cache = Path(os.environ.get("FJMCP_CACHE") or ROOT / ".cache")
    found = sorted(
        path
        for path in cache.glob("forgejo-mcp-*/**/forgejo-mcp")
        if path.is_file() and os.access(path, os.X_OK)
    )
    return str(found[-1]) if found else None


def listen(port):
    """The socket that the broker will serve: made here, so that the port is known and cannot be lost."""
    try:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    except OSError as error:
        raise DemoFailed(f"port {port} is not free ({error.strerror}); name another with --port") from error


def log_tail(broker):
    """The last lines of the broker's log."""
    return broker.log.splitlines()[-LOG_TAIL:]


# ---- What is shown
# --------------------------------------------------------------------------------------------------


class Screen:
    """Prints for people: numbered steps, what happened, why it matters. Colours only on a terminal."""

    def __init__(self, out):
        self._out, self._step = out, 0
        self._colours = out.isatty() and "NO_COLOR" not in os.environ
        self._width = min(shutil.get_terminal_size((100, 24)).columns, 100)

    def _styled(self, code, text):
        return f"\033[{code}m{text}\033[0m" if self._colours else text

    def _print(self, text=""):
        print(text, file=self._out, flush=True)

    def title(self, text):
        self._print()
        self._print(self._styled("1", text))

    def step(self, text):
        """Begin a step."""
        self._step += 1
        self.title(f"{self._step}. {text}")

    def fact(self, name, value):
        """Something that was seen."""
        self._print(f"   {name:<11} {value}")

    def why(self, text):
        """Why it matters."""
        for line in textwrap.wrap(text, self._width - 5):
            self._print("   " + self._styled("2", line))

    def line(self, text):
        """A line to copy."""
        self._print("   " + self._styled("36", text))

    def failure(self, text, log=()):
        self._print()
        self._print(self._styled("31;1", f"The demo failed: {text}"))
        if log:
            self._print("The end of the broker's log:")
            for line in log:
                self._print("   " + line)


def tool_text(result):
    """The text of a tool's result; DemoFailed if the tool reports an error."""
    text = "\n".join(
        block.get("text", "") for block in result.get("content", ()) if block.get("type") == "text"
    )
    if result.get("isError"):
        raise DemoFailed(f"the tool reports an error: {text}")
    return text


def shortened(text, limit=200):
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."


def show_discovery(screen, url):
    """A client that knows the URL and nothing else finds out the rest; gives the registered client."""
    screen.step("A client is given one URL and finds out the rest")
    oauth = OAuthClient(url, name="Demo client")
    metadata = oauth.discover()
    screen.fact("the URL", oauth.mcp_url)
    screen.fact("answers", f"401, see {oauth.challenge['resource_metadata']}")
    screen.fact("log in at", metadata["authorization_endpoint"])
    made = oauth.register()
    if made.status != 201:
        raise DemoFailed(f"the registration was answered with {made.status}: {made.text}")
    screen.fact("registered", f"client_id {oauth.client_id}")
    screen.why(
        "No client needs to be set up by hand, and nobody copies a token: any MCP client can do these steps."
    )
    return oauth


def log_in(screen, oauth, login):
    """Log in as this user through the broker's and Forgejo's pages; gives an initialized McpClient."""
    screen.step(f"{login} logs in")
    tokens = oauth.login(None, login, PASSWORD)
    screen.fact("approved", "Demo client, full access, on the broker's own page")
    screen.fact("signed in", f"as {login} at Forgejo; the password went there, never to the broker")
    screen.fact("token", f"for this client only, {tokens['expires_in']} s, scope {tokens.get('scope')}")
    screen.why("The token is the broker's. Forgejo's own token for this user stays in the broker, encrypted.")
    client = McpClient(oauth.mcp_url, tokens["access_token"])
    client.initialize()
    return client


def show_tools(screen, client):
    screen.step("The tools are those of the child behind the broker")
    names = [tool["name"] for tool in client.list_tools()]
    if WHO_AM_I not in names:
        raise DemoFailed(f"the child has no tool {WHO_AM_I}, only {', '.join(names)}")
    server = client.server["serverInfo"]
    screen.fact("server", f"{server['name']} {server.get('version', '')}".rstrip())
    screen.fact("tools", shortened(", ".join(names)))
    screen.fact("count", len(names))


def show_call(screen, client, login, others):
    """Ask Forgejo, by tool, who is calling: it must be this user and none of the others."""
    screen.step(f"{login} asks Forgejo: who am I?")
    text = tool_text(client.call_tool(WHO_AM_I))
    screen.fact("tool", WHO_AM_I)
    screen.fact("answer", shortened(text))
    if login not in text or any(other in text for other in others):
        raise DemoFailed(f"the answer to {login} should name {login} alone: {text}")
    screen.fact("so", f"Forgejo sees {login}")


def show_main_job(screen, url):
    """The scripted part, from nothing to two people served."""
    oauth = show_discovery(screen, url)
    with log_in(screen, oauth, "alice") as alice:
        show_tools(screen, alice)
        show_call(screen, alice, "alice", ["bob"])
        with log_in(screen, oauth, "bob") as bob:
            show_call(screen, bob, "bob", ["alice"])
            screen.why(
                "The same URL, the same client and the same tool: each person acts with their own rights, "
                "in a child process that holds only their own token."
            )
            show_call(screen, alice, "alice", ["bob"])
            screen.why("bob's login changed nothing for alice.")
            bob.delete()
        alice.delete()


def show_how_to_connect(screen, url, forgejo_url):
    mcp_url = url + "/mcp"
    screen.title("Now connect a real client")
    screen.fact("URL", mcp_url)
    screen.fact("users", f"alice / {PASSWORD}, bob / {PASSWORD}")
    screen.fact("Forgejo", f"{forgejo_url} (sign out there to change the user)")
    screen.title("Claude Code (then /mcp, choose forgejo, Authenticate):")
    screen.line(f"claude mcp add --transport http forgejo {mcp_url}")
    screen.title("MCP Inspector (transport Streamable HTTP, this URL, then Connect):")
    screen.line(f"npx @modelcontextprotocol/inspector --transport http --server-url {mcp_url}")


# ---- The whole
# ------------------------------------------------------------------------------------------------------


def run(screen, options):
    """Start everything, show it, and end everything again; gives the exit status."""
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(listen(options.port))
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="fjmcp-demo-")))
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        forgejo = FakeForgejo(port=0).start()
        cleanup.callback(forgejo.stop)
        child, description = find_child()
        app = forgejo.add_app([url + "/oauth/callback"])
        config = folder / "broker.toml"
        config.write_text(
            toml(
                {
                    "public_url": url,
                    "listen": url.removeprefix("http://"),
                    "forgejo_url": forgejo.url,
                    "forgejo_oauth_client_id": app.client_id,
                    "forgejo_oauth_client_secret": app.client_secret,
                    "forgejo_mcp_binary": child,
                    "store_path": str(folder / "broker.db"),
                    "key_file": str(folder / "broker.key"),
                    "log_format": "text",
                }
            )
        )
        config.chmod(0o600)
        broker = BrokerProcess(config, listener, folder / "broker.log", folder, program=BROKER)
        cleanup.callback(broker.stop)
        # It is the broker's now: were it open here too, clients of a dead broker would wait for ever.
        listener.close()
        try:
            broker.await_ready()
            screen.title("A broker between MCP clients and Forgejo")
            screen.fact("broker", f"{url} ({BROKER.name}, Python {sys.version.split()[0]})")
            screen.fact("Forgejo", f"{forgejo.url} (a stand-in in this process)")
            screen.fact("child", description)
            show_main_job(screen, url)
        except Exception as error:
            status = broker.stop()
            reason = (
                str(error)
                if isinstance(error, (DemoFailed, NotReady))
                else f"{type(error).__name__}: {error}"
            )
            screen.failure(
                f"{reason} (broker's exit status: {status})",
                log_tail(broker),
            )
            return 1
        if not options.once:
            show_how_to_connect(screen, url, forgejo.url)
            stay_up(screen)
        return ended_well(screen, broker)


def stay_up(screen):
    """Wait for Ctrl-C or a signal to end."""
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    with woken, wakes, contextlib.suppress(KeyboardInterrupt):
        # A signal between the line and the wait would be slept through without this.
        signal.set_wakeup_fd(wakes.fileno())
        screen.title("Ctrl-C ends everything.")
        while True:
            select.select([woken], [], [])
    signal.set_wakeup_fd(-1)


def ended_well(screen, broker):
    status = broker.stop()
    if status != 0:
        screen.failure(f"the broker ended with status {status}", log_tail(broker))
        return 1
    screen.title("Done: the broker, its children and the stand-in have ended.")
    return 0


def interrupt(*_args):
    raise KeyboardInterrupt


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Show the broker's main job on this machine, with a stand-in for "
        "Forgejo; then stay up for real clients."
    )
    parser.add_argument("--once", action="store_true", help="end after the scripted part")
    parser.add_argument("--port", type=int, default=0, help="the broker's port (default: a free one)")
    options = parser.parse_args(argv)
    screen = Screen(sys.stdout)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's `&` starts us with it ignored
        signal.signal(number, interrupt)
    try:
        return run(screen, options)
    except DemoFailed as error:
        screen.failure(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
