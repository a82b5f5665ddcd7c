"""A door for programs outside the suite, which name this module here: it is rigs/mcp_client.py."""

from rigs.mcp_client import *  # noqa: F403
