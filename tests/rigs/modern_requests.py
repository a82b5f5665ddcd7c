"""Helpers for what speaks 2026-07-28 to the broker.

A logged-in client, its refusals, its questions and its listeners.
"""

import contextlib

from rigs.mcp_client import META, MODERN, McpClient, RpcError, SseStream

ALL_INPUT = {"elicitation": {}, "sampling": {}, "roots": {}}
ANSWERS = {
    "elicitation/create": {"action": "accept", "content": {"answer": "blue"}},
    "sampling/createMessage": {
        "role": "assistant",
        "content": {"type": "text", "text": "said"},
        "model": "m",
    },
    "roots/list": {"roots": [{"uri": "file:///home", "name": "home"}]},
}


def connect(rig, user="alice", access="full", capabilities=None, *, oauth=None, **arguments):
    """A modern McpClient of a user who logged in through a client of its own (or through `oauth`)."""
    oauth = oauth or rig.login(user, access, **arguments)
    mcp = McpClient(
        rig.url + "/mcp", oauth.tokens["access_token"], protocol=MODERN, capabilities=capabilities
    )
    mcp.oauth = oauth
    return mcp


def refused(mcp, method, params=None, headers=None):
    """(HTTP status, code, data) of the error that answers a request."""
    try:
        result = mcp.request(method, params, headers=headers)
    except RpcError as error:
        return error.http_status, error.code, error.data
    raise AssertionError(f"{method} was answered with {result}")


def call(mcp, name, arguments=None, headers=None, **params):
    """The result of a tools/call, whatever kind of result it is."""
    return mcp.request("tools/call", {"name": name, "arguments": arguments or {}, **params}, headers=headers)


def retry_of(asked, answers=None):
    """The parameters that answer an `input_required`.

    Every question by its kind, or `answers` as they are.
    """
    given = (
        {key: ANSWERS[question["method"]] for key, question in asked["inputRequests"].items()}
        if answers is None
        else answers
    )
    return {"inputResponses": given, "requestState": asked["requestState"]}


def asked_methods(asked):
    """What an `input_required` asks for, sorted."""
    assert asked["resultType"] == "input_required", asked
    return sorted(question["method"] for question in asked["inputRequests"].values())


def subscription_of(message):
    """The subscription that a message on a listener's stream belongs to."""
    return (message.get("params") or message.get("result"))["_meta"][META + "subscriptionId"]


@contextlib.contextmanager
def listening(mcp, request_id=None, **wanted):
    """(acknowledged filter, stream, id) of a subscriptions/listen."""
    request_id, stream = mcp.start_request("subscriptions/listen", {"notifications": wanted}, id=request_id)
    with stream:
        assert isinstance(stream, SseStream) and stream.response is None, (
            stream.response and stream.response.text
        )
        first = stream.next().data
        assert (
            first["method"] == "notifications/subscriptions/acknowledged"
            and subscription_of(first) == request_id
        )
        yield first["params"]["notifications"], stream, request_id
