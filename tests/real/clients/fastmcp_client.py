"""FastMCP's client as a client of the broker: fastmcp_client.py URL.

It opens $BROWSER itself, and takes a command a line as the others do.
"""

import asyncio
import json
import sys
import time

from fastmcp import Client

told: list[float] = []


async def on_progress(progress, total, message):
    told.append(progress)


async def on_question(message, response_type, params, context):
    return {"answer": "scripted"}


def say(value):
    print(json.dumps(value), flush=True)


async def call(client, rest):
    name, _, arguments = rest.partition(" ")
    told.clear()
    result = await client.call_tool(name, json.loads(arguments or "{}"))
    text = "".join(part.text for part in result.content if part.type == "text")
    return {"call": {"text": text, "is_error": result.is_error, "progress_count": len(told)}}


async def main():
    handlers = {"progress_handler": on_progress, "elicitation_handler": on_question}
    async with Client(sys.argv[1], auth="oauth", **handlers) as client:
        say({"tools": len(await client.list_tools())})
        while (line := (await asyncio.to_thread(sys.stdin.readline)).strip()) not in ("", "quit"):
            verb, _, rest = line.partition(" ")
            try:
                if verb == "expire":
                    client.transport.auth.context.token_expiry_time = time.time() - 1
                say(await call(client, rest) if verb == "call" else {"expired": True})
            except Exception as error:
                say({"error": str(error)})


asyncio.run(main())
