"""pytest plugin for tests marked `@pytest.mark.real(name)`: they run last, and wait for their part's install.

Names: "mcp1", "mcp2" and "fastmcp" (an interpreter with that package), "npm" (a Node with the JavaScript
clients), "assistants" (one of their programs), "go-clients" (one of them, the others beside it),
"java-client", "desktop" (its xdg-open), "forgejo-mcp", "mcp-go-child" (a small server on its SDK),
"postgresql" (its server, its other programs beside it), "caddy", "nginx", "haproxy", "pgbouncer", "chromium",
"promtool", "jq" and "systemd-analyze" (programs).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import run

TEST_LIMIT = 60


def part_names(item: pytest.Item) -> list[str]:
    """The real parts a test names in its marks."""
    return [name for mark in item.iter_markers("real") for name in mark.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests with real parts behind all others.

    Keep the wait for an install out of their time limit.
    """
    items.sort(key=lambda item: bool(part_names(item)))
    for item in items:
        if part_names(item) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_LIMIT, func_only=True))


def part_folders() -> dict[str, Path]:
    """{name: folder} of the real parts of this working copy and this Python."""
    return {name: folder for name, (folder, _) in parts_here().items()}


def parts_here() -> dict[str, Any]:
    """{name: (folder, installer)} of the real parts of this working copy and this Python."""
    python = run.Python(tuple(sys.version_info[:3]), sys.executable)
    cache = Path(os.environ.get("FJMCP_CACHE") or run.ROOT / ".cache")
    return run.real_parts(cache, python)


@functools.cache
def outcome_of(folder: Path, installer: Any) -> tuple[str, str]:
    """(state, text) of a part.

    It is waited for if it is being installed, and installed if tests/run.py leaves that to us.
    """
    state, text = run.await_stamp(folder)
    if state != "ok" and os.environ.get(run.INSTALLS):
        return run.install(folder, lambda place: installer(place, run.Commands()))
    return state, text


@pytest.fixture(scope="session")
def real_part() -> Callable[[str], str]:
    """A function from a real part's name to its program (a path).

    Waits for the install; skips, or fails in CI.
    """
    parts = parts_here()

    def program(name: str) -> str:
        state, text = outcome_of(*parts[name])
        missing = run.on_missing_part(name, state, text, run.is_ci())
        if missing is None:
            return text
        outcome, why = missing
        if outcome == "skip":
            raise pytest.skip.Exception(why)
        raise pytest.fail.Exception(why, pytrace=False)

    return program


@pytest.fixture(autouse=True)
def real_parts_are_there(request: pytest.FixtureRequest) -> None:
    """A test marked `real` starts only when all its parts are there.

    Whether or not it asks for their programs.
    """
    for name in part_names(request.node):
        request.getfixturevalue("real_part")(name)
