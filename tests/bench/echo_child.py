"""The smallest stdio MCP server that a bridge can stand before: answers at once, so that what is measured is the bridge."""

import json
import sys

TOOLS = [
    {
        "name": "echo",
        "description": "Answers with its text",
        "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}},
    }
]

for line in sys.stdin.buffer:
    message = json.loads(line)
    if "id" not in message or "method" not in message:
        continue
    method, params = message["method"], message.get("params") or {}
    if method == "initialize":
        result = {
            "protocolVersion": params.get("protocolVersion", "2025-06-18"),
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "echo", "version": "1"},
        }
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "tools/call":
        result = {"content": [{"type": "text", "text": str((params.get("arguments") or {}).get("text", ""))}]}
    else:
        result = {}
    sys.stdout.buffer.write(
        json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode() + b"\n"
    )
    sys.stdout.buffer.flush()
