"""Clients that use their sessions without a pause while a test does something to what serves them."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import urllib.request
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from rigs.broker_process import Installation
from rigs.mcp_client import McpClient, StreamEnded
from rigs.rig import Rig

if TYPE_CHECKING:
    pass

CUT = (OSError, http.client.HTTPException, StreamEnded)  # what a client sees when its server dies


def same(mcp: McpClient, token: str | None = None) -> McpClient:
    """Another client that uses the same session."""
    return McpClient(mcp.url, token or mcp.token, session_id=mcp.session_id)


def health(place: Installation | Rig) -> Any:
    """What /healthz says of the broker of a Rig or an Installation."""
    with urllib.request.urlopen(place.url + "/healthz", timeout=20) as answer:
        return json.load(answer)


def children(place: Installation | Rig) -> int:
    """How many children are awake, as /healthz says it."""
    return int(health(place)["children"])


class Load:
    """One thread for each session, which calls `call(client, number)` again and again.

    `outcomes` has (session, number, what came of it). As a context it begins at once and has ended behind it.
    """

    def __init__(self, sessions: Iterable[McpClient], call: Callable[[McpClient, int], object]) -> None:
        self.outcomes: list[tuple[McpClient, int, Any]] = []
        self._call, self._numbers = call, itertools.count(1)
        self._over, self._changed = threading.Event(), threading.Condition()
        self._threads = [threading.Thread(target=self._use, args=(session,)) for session in sessions]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _use(self, session: McpClient) -> None:
        client = same(session)
        while not self._over.is_set():
            number = next(self._numbers)
            try:
                outcome = self._call(client, number)
            except Exception as error:
                outcome = error
            with self._changed:
                self.outcomes.append((session, number, outcome))
                self._changed.notify_all()
        client.close()

    def wait(self, more: int, timeout: float = 30) -> None:
        """Until so many more calls have come to something."""
        with self._changed:
            wanted = len(self.outcomes) + more
            assert self._changed.wait_for(lambda: len(self.outcomes) >= wanted, timeout), (
                "the load stands still"
            )

    def wait_each(self, predicate: Callable[[McpClient, Any], object], timeout: float = 30) -> None:
        """Until the newest outcome of every session satisfies `predicate(session, outcome)`."""

        def all_do() -> bool:
            newest = {session: outcome for session, _, outcome in self.outcomes}
            return len(newest) == len(self._threads) and all(
                predicate(session, outcome) for session, outcome in newest.items()
            )

        with self._changed:
            assert self._changed.wait_for(all_do, timeout), f"not so: {self.outcomes[-len(self._threads) :]}"

    @property
    def failures(self) -> list[object]:
        """What the calls failed with."""
        return [outcome for _, _, outcome in self.outcomes if isinstance(outcome, Exception)]
