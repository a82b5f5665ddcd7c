"""A login before a child whose list of tools stands in a file, for what is decided by that list."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rigs.mcp_client import McpClient

if TYPE_CHECKING:
    from rigs.mcp_client import Json
    from rigs.rig import Rig

LISTING_CHILD = Path(__file__).resolve().parent / "listing_child.py"
READER, WRITER = "get_my_user_info", "delete_repo"


def request(method: str, params: object, request_id: object = 1) -> Json:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}


class Listing:
    """A login, which reads only unless `access` says otherwise, before a child whose tools a test chooses."""

    def __init__(self, make_rig: Callable[..., Rig], folder: Path, access: str = "read") -> None:
        self.tools, self._heard = folder / "tools.json", folder / "heard"
        self._heard.touch()
        self.say([tool(READER)])
        binary = ",".join((sys.executable, str(LISTING_CHILD), str(self.tools), str(self._heard)))
        self.rig = make_rig(forgejo_mcp_binary=binary)
        self.oauth = self.rig.login(access=access)
        self.pool = McpClient(self.rig.url + "/mcp", self.oauth.tokens["access_token"])

    def say(self, *pages: list[Json]) -> None:
        self.tools.write_text(json.dumps(pages))

    def session(self, protocol: str = "2025-11-25") -> McpClient:
        mcp = McpClient(self.rig.url + "/mcp", self.oauth.tokens["access_token"], protocol=protocol)
        mcp.initialize()
        return mcp

    def heard(self, method: str) -> list[Any]:
        """The params of what the children were sent of a method."""
        messages = map(json.loads, self._heard.read_text().splitlines())
        return [message.get("params") for message in messages if message.get("method") == method]


def tool(name: str, reads: bool = False) -> Json:
    return {"name": name, "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": reads}}


def called(mcp: McpClient, name: str, **params: object) -> str | int:
    """("ran" or "refused" or an error's code) of a call."""
    answer = mcp.post(request("tools/call", {"name": name, **params})).messages()[-1]
    if "error" in answer:
        return int(answer["error"]["code"])
    return "refused" if answer["result"].get("isError") else "ran"
