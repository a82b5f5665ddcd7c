"""The person at the browser, for clients that start one: person.py [--visits FILE] LOGIN PASSWORD URL.

Logs in, approves, calls the callback.
"""

import argparse
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rigs.browser import Browser, approve_login  # noqa: E402

LIMIT = 30


def call(url: str) -> None:
    """Fetch the callback. Some clients open the browser first and their callback's listener afterwards."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return urllib.request.urlopen(url, timeout=LIMIT).close()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main() -> None:
    """Visit one URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--visits", type=Path, help="a file that gets a line for each visit")
    parser.add_argument("login")
    parser.add_argument("password")
    parser.add_argument("url")
    given = parser.parse_args()
    if given.visits:
        with open(given.visits, "a", encoding="utf-8") as file:
            file.write(given.url.partition("?")[0] + "\n")
    call(approve_login(Browser(), given.url, given.login, given.password))


if __name__ == "__main__":
    main()
