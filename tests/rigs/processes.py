"""What tests of processes and threads share.

Sessions of an installation, functions run beside, ends waited for.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rigs.mcp_client import McpClient, OAuthClient

if TYPE_CHECKING:
    from rigs.broker_process import Installation
    from rigs.child_control import ChildControl

GONE_LIMIT = 20  # seconds after which no child may be left: 5 (design 2), and a busy machine's delays


def login(installation: Installation, user: str = "alice") -> OAuthClient:
    client = OAuthClient(installation.url, name="Process test")
    client.login(None, user, "secret", "full")
    return client


def session(installation: Installation, user: str = "alice") -> McpClient:
    client = login(installation, user)
    mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    mcp.oauth = client
    return mcp


def again(mcp: McpClient) -> McpClient:
    """The same session over a new connection, with the client's newest token."""
    return McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id)


def in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[[], Any]:
    """Run a function beside; join() gives what it returned or raised."""
    outcome = []

    def body() -> None:
        try:
            outcome.append(function(*arguments, **named))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()

    def join() -> Any:
        thread.join(40)
        assert outcome, "it did not end"
        return outcome[0]

    return join


def ended(*names: str) -> None:
    """Wait for the broker's threads of these names."""
    for thread in threading.enumerate():
        if thread.name in names and thread.is_alive():
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} did not end"


def hanging_call(mcp: McpClient, control: ChildControl, key: str = "k") -> Callable[[], Any]:
    """A call that hangs in its child until the key is released; gives join()."""
    caller = McpClient(mcp.url, mcp.token, session_id=mcp.session_id)
    join = in_thread(caller.call_tool, "get_slow", key=key)
    control.wait_event(event="call", tool="get_slow")
    return join


def await_end(pids: Iterable[int], limit: float = GONE_LIMIT) -> list[int]:
    """The pids that still run after at most `limit` seconds."""
    descriptors = {}
    for pid in pids:
        try:
            descriptors[os.pidfd_open(pid)] = pid
        except ProcessLookupError:
            continue
    left, poll = dict(descriptors), select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    while left and (ready := poll.poll(limit * 1000)):
        for descriptor, _ in ready:
            poll.unregister(descriptor)
            left.pop(descriptor)
    for descriptor in descriptors:
        os.close(descriptor)
    return sorted(left.values())
