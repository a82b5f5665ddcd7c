"""The MCP Python SDK 2.x as a client of the broker; for the interpreter of the real part mcp2.

Prints JSON lines. sdk2_client.py URL LOGIN PASSWORD [options]
"""

import asyncio
import contextlib
import sys

import common
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientMetadata

from mcp import Client, types


class Adapter:
    """A connected Client, as common.Conversation needs it."""

    def __init__(self, client, updates):
        self._client, self._updates, self._started = client, updates, None
        self.protocol_version = client.protocol_version
        self.server = client.server_info and client.server_info.name

    async def list_tools(self):
        names, cursor = [], None
        while True:
            # Past the SDK's cache: after an expiry this is the request that has to refresh.
            page = await self._client.list_tools(cursor=cursor, cache_mode="refresh")
            names += [tool.name for tool in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                return names

    async def call(self, name, arguments, on_progress):
        result = await self._client.call_tool(name, arguments, progress_callback=on_progress)
        text = "".join(part.text for part in result.content if part.type == "text")
        return {"text": text, "is_error": result.is_error, "structured": result.structured_content}

    async def updated(self, uri, cause):
        if self.protocol_version < "2026":
            await self._client.subscribe_resource(uri)
            await cause()
            told = await self._updates.get()
            await self._client.unsubscribe_resource(uri)
            return told
        async with self._client.listen(resource_subscriptions=[uri]) as subscription:
            await cause()
            return str((await anext(subscription)).uri)

    async def start(self, name, arguments):
        self._started = asyncio.create_task(self._client.call_tool(name, arguments))

    async def cancel(self):
        self._started.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._started


def make_provider(arguments, login, storage):
    """The SDK's own OAuth provider, with the scripted browser and the loopback listener."""

    async def callback():
        query = await login.callback()
        return AuthorizationCodeResult(code=query["code"], state=query.get("state"), iss=query.get("iss"))

    metadata = OAuthClientMetadata(
        client_name="sdk2", redirect_uris=[login.listener.redirect_uri], scope=arguments.scope
    )
    return OAuthClientProvider(arguments.url, metadata, storage, login.open, callback)


async def connect(arguments, login, storage, converse):
    """Connect in the given mode ("auto", the SDK's default, unless said otherwise) and hand the client on."""
    questions, updates = [], asyncio.Queue()

    async def on_message(message):
        if isinstance(message, types.ResourceUpdatedNotification):
            await updates.put(str(message.params.uri))

    async def on_elicit(context, params):
        questions.append(params.message)
        content = arguments.answer or common.answer_for(getattr(params, "requested_schema", {}))
        return types.ElicitResult(action="accept", content=content)

    provider = make_provider(arguments, login, storage)
    async with create_mcp_http_client(auth=provider) as http_client:
        transport = streamable_http_client(arguments.url, http_client=http_client)
        async with Client(
            transport, mode=arguments.mode, elicitation_callback=on_elicit, message_handler=on_message
        ) as client:
            await converse(Adapter(client, updates), provider, questions)


if __name__ == "__main__":
    sys.exit(common.run_program("MCP Python SDK 2.x client", connect))
