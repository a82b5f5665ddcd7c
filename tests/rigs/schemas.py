"""What a server may send, revision by revision.

Every message a test's client receives is held against MCP's own JSON schema. `judge(message, revision,
method)` is what the tests hook into their clients (conftest.py).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator, Draft202012Validator

FOLDER = Path(__file__).resolve().parent / "schema"
REVISIONS = ("2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28")
MODERN = "2026-07-28"
RESULTS = {
    "initialize": "InitializeResult",
    "ping": "EmptyResult",
    "logging/setLevel": "EmptyResult",
    "resources/subscribe": "EmptyResult",
    "resources/unsubscribe": "EmptyResult",
    "tools/list": "ListToolsResult",
    "tools/call": "CallToolResult",
    "prompts/list": "ListPromptsResult",
    "prompts/get": "GetPromptResult",
    "resources/list": "ListResourcesResult",
    "resources/templates/list": "ListResourceTemplatesResult",
    "resources/read": "ReadResourceResult",
    "completion/complete": "CompleteResult",
    "server/discover": "DiscoverResult",
    "subscriptions/listen": "SubscriptionsListenResult",
}
ASKS_FOR_INPUT = ("tools/call", "prompts/get", "resources/read")
ERRORS = {
    -32020: "HeaderMismatchError",
    -32021: "MissingRequiredClientCapabilityError",
    -32022: "UnsupportedProtocolVersionError",
}
EARLIER_CODES = (
    -32002,
    -32042,
)  # "Implementations of this protocol version MUST NOT emit these codes" (2026-07-28, Error Codes)


class SchemaViolation(AssertionError):
    """A message that its revision does not allow."""


@functools.cache
def validator(revision: str, *names: str) -> Any:
    """A validator for a value that is one of these definitions of the revision's schema.

    None if it has none of them.
    """
    schema = json.loads((FOLDER / f"{revision}.json").read_text())
    place = "$defs" if "$defs" in schema else "definitions"
    known = [{"$ref": f"#/{place}/{name}"} for name in names if name in schema[place]]
    kind = Draft202012Validator if place == "$defs" else Draft7Validator
    return kind({place: schema[place], "anyOf": known}) if known else None


def failures(value: object, revision: str, *names: str) -> list[str]:
    """The sentences of what is wrong with a value that must be one of these definitions."""
    found = validator(revision, *names)
    if found is None:
        return [f"{revision} has no {' or '.join(names)}"]
    return [
        f"{' or '.join(names)} at {error.json_path}: {sentence}"
        for error in found.iter_errors(value)
        for sentence in sentences(error)
    ]


def sentences(error: Any) -> list[str]:
    """An error's message, and those of the alternatives it tried."""
    return [error.message[:300], *(inner.message[:300] for inner in error.context or ())]


def violations(message: Any, revision: str, method: str | None = None) -> list[str]:
    """What the revision says against this message of a server.

    `method` is that of the request it answers, if known.
    """
    if "method" in message:
        return failures(message, revision, "ServerRequest" if "id" in message else "ServerNotification")
    if "error" in message:
        return error_violations(message, revision)
    wrong = failures(message, revision, "JSONRPCResultResponse", "JSONRPCResponse")
    names = [
        RESULTS.get(method or "", "Result"),
        *(["InputRequiredResult"] if revision >= MODERN and method in ASKS_FOR_INPUT else []),
    ]
    if revision >= MODERN and message["result"].get("resultType") == "input_required":
        names = names[1:] or ["nothing that asks for input"]
    return wrong or failures(message["result"], revision, *names)


def error_violations(message: Any, revision: str) -> list[str]:
    """As violations, for an error.

    JSON-RPC's null for an id that could not be read is what the revisions have no form for.
    """
    message = {**message, "id": 0} if message.get("id") is None and revision < MODERN else message
    code = message["error"].get("code")
    if revision >= MODERN and code in EARLIER_CODES:
        return [f"{code} is a code of earlier revisions"]
    return failures(message, revision, "JSONRPCErrorResponse", "JSONRPCError") or (
        failures(message, revision, ERRORS[code]) if revision >= MODERN and code in ERRORS else []
    )


def judge(message: Any, revision: str, method: str | None = None) -> None:
    """SchemaViolation if the revision does not allow this message.

    Of revisions without a schema here anything goes.
    """
    if (
        revision in REVISIONS
        and isinstance(message, dict)
        and (wrong := violations(message, revision, method))
    ):
        raise SchemaViolation(f"{revision}, answer to {method}: {wrong[:5]} in {json.dumps(message)[:1500]}")
