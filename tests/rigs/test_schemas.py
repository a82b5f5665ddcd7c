"""The judge of messages itself: what a revision allows passes, what it does not allow is named."""

import pytest

from rigs import schemas

LIST = {"tools": [{"name": "a", "inputSchema": {"type": "object"}}]}
STAMPED = {**LIST, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}


def answer(result):
    return {"jsonrpc": "2.0", "id": 1, "result": result}


def error(code, **more):
    return {"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": "m", **more}}


@pytest.mark.parametrize(
    "revision, method, message",
    [
        ("2025-03-26", "tools/list", answer(LIST)),
        ("2025-11-25", "tools/list", answer(LIST)),
        ("2026-07-28", "tools/list", answer(STAMPED)),
        ("2025-11-25", "ping", answer({})),
        ("2025-11-25", "unknown/method", answer({"anything": 1})),
        ("2025-11-25", None, {"jsonrpc": "2.0", "id": 1, "method": "roots/list"}),
        ("2025-06-18", None, {**error(-32700), "id": None}),
        ("2026-07-28", "tools/call", answer({"resultType": "input_required", "requestState": "x"})),
        ("2026-07-28", None, error(-32022, data={"supported": ["2026-07-28"], "requested": "2099"})),
        ("2024-11-05", "tools/list", answer({})),
    ],
)
def test_what_a_revision_allows_passes(revision, method, message):
    schemas.judge(message, revision, method)


@pytest.mark.parametrize(
    "revision, method, message",
    [
        ("2025-11-25", "tools/list", answer({})),
        ("2026-07-28", "tools/list", answer(LIST)),
        ("2026-07-28", "tools/call", answer({"content": []})),
        ("2026-07-28", "tools/list", answer({"resultType": "input_required", "requestState": "x"})),
        ("2026-07-28", None, {**error(-32700), "id": None}),
        ("2026-07-28", None, error(-32002)),
        ("2026-07-28", None, error(-32022)),
        ("2026-07-28", None, error(-32021, data={})),
        ("2026-07-28", None, {"jsonrpc": "2.0", "id": 1, "method": "roots/list"}),
        ("2025-03-26", None, {"jsonrpc": "2.0", "id": 1, "method": "elicitation/create"}),
        ("2025-11-25", None, {"jsonrpc": "2.0", "method": "notifications/unknown"}),
        ("2025-11-25", None, {"jsonrpc": "2.0", "method": "notifications/progress"}),
        ("2025-11-25", "initialize", answer({"protocolVersion": "2025-11-25"})),
        ("2025-11-25", None, {**answer({}), "id": 1.5}),
    ],
)
def test_what_a_revision_does_not_allow_is_a_violation(revision, method, message):
    with pytest.raises(schemas.SchemaViolation):
        schemas.judge(message, revision, method)
