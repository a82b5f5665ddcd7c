"""What was heard: by a session's child, and on a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rigs.child_control import ChildControl
    from rigs.mcp_client import Event, McpClient, SseStream
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "x", "version": "1"},
    },
}


class Heard:
    """What a session's child is sent from here on.

    Lines are read in order, so a notification of a name of its own marks both ends.
    """

    def __init__(self, mcp: McpClient, control: ChildControl) -> None:
        self._mcp, self._control = mcp, control
        self._from = self._mark("begin")

    def _mark(self, name: str) -> int:
        self._mcp.notify(f"notifications/{name}")
        mark = self._control.wait_event(event="message", method=f"notifications/{name}")
        return self._control.events.index(mark)

    def methods(self) -> list[str]:
        end = self._mark("end")
        return [
            event["method"]
            for event in self._control.events[self._from + 1 : end]
            if event["event"] == "message"
        ]


def answer_of(stream: SseStream, request_id: object) -> tuple[Event, list[Event]]:
    """The answer to a request on a stream, with what came before it."""
    events: list[Event] = []
    while not events or not (
        isinstance(events[-1].data, dict)
        and events[-1].data.get("id") == request_id
        and "method" not in events[-1].data
    ):
        events.append(stream.next(20))
    return events[-1], events[:-1]
