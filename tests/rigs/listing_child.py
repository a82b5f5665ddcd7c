"""A legacy stdio MCP server whose tools stand in a file: `listing_child.py TOOLS HEARD`.

The file may have another list at any time.

TOOLS is a JSON array of pages, each an array of tools; without a page tools/list is never answered. Each line
that is read is appended to HEARD. A call is never refused: the answer says which name it had, and with
params.task it is a task named after the tool. After `notifications/poke` the list is said to have changed.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(method: str, params: dict[str, Any], pages: list[Any]) -> dict[str, Any]:
    if method == "initialize":
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {"listChanged": True}},
            "serverInfo": {"name": "listing", "version": "1"},
        }
    if method == "tools/list":
        page = int(params.get("cursor") or 0)
        more = {"nextCursor": str(page + 1)} if page + 1 < len(pages) else {}
        return {"tools": pages[page], **more}
    if method == "tools/call" and "task" in params:
        return {"task": {"taskId": "task of " + params["name"], "status": "working"}}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": "RAN " + params["name"]}]}
    return {"did": method}


def main(tools: str, heard: str) -> None:
    for line in sys.stdin:
        with open(heard, "a", encoding="utf-8") as file:
            file.write(line)
        message = json.loads(line)
        out: dict[str, Any] = {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}
        if message.get("method") == "server/discover":
            out = {"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "unknown"}}
        elif "id" in message:
            with open(tools, encoding="utf-8") as file:
                pages = json.load(file)
            if message["method"] == "tools/list" and not pages:
                continue
            result = answer(message["method"], message.get("params") or {}, pages)
            out = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        elif message["method"] != "notifications/poke":
            continue
        print(json.dumps(out), flush=True)


main(*sys.argv[1:])
