"""FastMCP's client as a client of the broker: fastmcp_client.py URL. It opens $BROWSER itself. Prints one JSON line."""

import asyncio
import json
import sys

from fastmcp import Client


async def main():
    async with Client(sys.argv[1], auth="oauth") as client:
        tools = await client.list_tools()
        result = await client.call_tool("get_my_user_info", {})
        print(json.dumps({"tools": len(tools), "first": result.content[0].text}))


asyncio.run(main())
