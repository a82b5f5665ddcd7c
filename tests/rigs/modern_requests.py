"""Helpers for what speaks 2026-07-28 to the broker.

A logged-in client, its refusals, its questions and its listeners.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rigs.mcp_client import META, MODERN, McpClient, RpcError, SseStream

if TYPE_CHECKING:
    from rigs.mcp_client import Json, OAuthClient
    from rigs.rig import Rig

ALL_INPUT: Json = {"elicitation": {}, "sampling": {}, "roots": {}}
ANSWERS = {
    "elicitation/create": {"action": "accept", "content": {"answer": "blue"}},
    "sampling/createMessage": {
        "role": "assistant",
        "content": {"type": "text", "text": "said"},
        "model": "m",
    },
    "roots/list": {"roots": [{"uri": "file:///home", "name": "home"}]},
}


def connect(
    rig: Rig,
    user: str = "alice",
    access: str = "full",
    capabilities: Json | None = None,
    *,
    oauth: OAuthClient | None = None,
    **arguments: Any,
) -> McpClient:
    """A modern McpClient of a user who logged in through a client of its own (or through `oauth`)."""
    oauth = oauth or rig.login(user, access, **arguments)
    mcp = McpClient(
        rig.url + "/mcp", oauth.tokens["access_token"], protocol=MODERN, capabilities=capabilities
    )
    mcp.oauth = oauth
    return mcp


def refused(
    mcp: McpClient, method: str, params: Json | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int | None, int, Any]:
    """(HTTP status, code, data) of the error that answers a request."""
    try:
        result = mcp.request(method, params, headers=headers)
    except RpcError as error:
        return error.http_status, error.code, error.data
    raise AssertionError(f"{method} was answered with {result}")


def call(
    mcp: McpClient,
    name: str,
    arguments: Json | None = None,
    headers: Mapping[str, str] | None = None,
    **params: object,
) -> Any:
    """The result of a tools/call, whatever kind of result it is."""
    return mcp.request("tools/call", {"name": name, "arguments": arguments or {}, **params}, headers=headers)


def retry_of(asked: Json, answers: Json | None = None) -> Json:
    """The parameters that answer an `input_required`.

    Every question by its kind, or `answers` as they are.
    """
    given = (
        {key: ANSWERS[question["method"]] for key, question in asked["inputRequests"].items()}
        if answers is None
        else answers
    )
    return {"inputResponses": given, "requestState": asked["requestState"]}


def asked_methods(asked: Json) -> list[str]:
    """What an `input_required` asks for, sorted."""
    assert asked["resultType"] == "input_required", asked
    return sorted(question["method"] for question in asked["inputRequests"].values())


def subscription_of(message: Json) -> object:
    """The subscription that a message on a listener's stream belongs to."""
    return (message.get("params") or message["result"])["_meta"][META + "subscriptionId"]


@contextlib.contextmanager
def listening(
    mcp: McpClient, request_id: object = None, **wanted: object
) -> Iterator[tuple[Json, SseStream, object]]:
    """(acknowledged filter, stream, id) of a subscriptions/listen."""
    request_id, stream = mcp.start_request("subscriptions/listen", {"notifications": wanted}, id=request_id)
    with stream:
        assert isinstance(stream, SseStream) and stream.response is None, (
            stream.response and stream.response.text
        )
        first: Any = stream.next().data
        assert (
            first["method"] == "notifications/subscriptions/acknowledged"
            and subscription_of(first) == request_id
        )
        yield first["params"]["notifications"], stream, request_id
