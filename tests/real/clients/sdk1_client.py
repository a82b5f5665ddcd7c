"""The MCP Python SDK 1.x as a client of the broker; for the interpreter of the real part mcp1.

Prints JSON lines. sdk1_client.py URL LOGIN PASSWORD [options]
"""

import asyncio
import contextlib
import sys

import common
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.shared.auth import OAuthClientMetadata

from mcp import ClientSession, types


class Adapter:
    """A connected ClientSession, as common.Conversation needs it."""

    def __init__(self, session, initialized, updates):
        self._session, self._updates, self._started = session, updates, None
        self.protocol_version = initialized.protocolVersion
        self.server = initialized.serverInfo.name

    async def list_tools(self):
        names, cursor = [], None
        while True:
            page = await self._session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
            names += [tool.name for tool in page.tools]
            cursor = page.nextCursor
            if cursor is None:
                return names

    async def call(self, name, arguments, on_progress):
        result = await self._session.call_tool(name, arguments, progress_callback=on_progress)
        text = "".join(part.text for part in result.content if part.type == "text")
        return {"text": text, "is_error": result.isError, "structured": result.structuredContent}

    async def updated(self, uri, cause):
        await self._session.subscribe_resource(uri)
        await cause()
        told = await self._updates.get()
        await self._session.unsubscribe_resource(uri)
        return told

    async def start(self, name, arguments):
        # This SDK has no call for cancelling: who uses it tells the id that the next request will get.
        self._started = (
            self._session._request_id,
            asyncio.create_task(self._session.call_tool(name, arguments)),
        )

    async def cancel(self):
        request_id, task = self._started
        params = types.CancelledNotificationParams(requestId=request_id)
        await self._session.send_notification(
            types.ClientNotification(types.CancelledNotification(params=params))
        )
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def make_provider(arguments, login, storage):
    """The SDK's own OAuth provider, with the scripted browser and the loopback listener."""

    async def callback():
        query = await login.callback()
        return query["code"], query.get("state")

    metadata = OAuthClientMetadata(
        client_name="sdk1", redirect_uris=[login.listener.redirect_uri], scope=arguments.scope
    )
    return OAuthClientProvider(arguments.url, metadata, storage, login.open, callback)


async def connect(arguments, login, storage, converse):
    """Connect as the SDK does by default and hand the session on."""
    questions, updates = [], asyncio.Queue()

    async def on_message(message):
        if isinstance(message, types.ServerNotification) and isinstance(
            message.root, types.ResourceUpdatedNotification
        ):
            await updates.put(str(message.root.params.uri))

    async def on_elicit(context, params):
        questions.append(params.message)
        content = arguments.answer or common.answer_for(getattr(params, "requestedSchema", {}))
        return types.ElicitResult(action="accept", content=content)

    provider = make_provider(arguments, login, storage)
    async with (
        create_mcp_http_client(auth=provider) as http_client,
        streamable_http_client(arguments.url, http_client=http_client) as (read, write, _),
        ClientSession(read, write, elicitation_callback=on_elicit, message_handler=on_message) as session,
    ):
        initialized = await session.initialize()
        await converse(Adapter(session, initialized, updates), provider, questions)


if __name__ == "__main__":
    sys.exit(common.run_program("MCP Python SDK 1.x client", connect))
