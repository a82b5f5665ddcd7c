"""The person at the browser, for clients that start one: person.py LOGIN PASSWORD URL. Logs in, approves, calls the callback."""

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rigs.browser import Browser, approve_login  # noqa: E402

LIMIT = 30


def call(url):
    """Fetch the callback. Some clients open the browser first and their callback's listener afterwards."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return urllib.request.urlopen(url, timeout=LIMIT).close()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    login, password, url = sys.argv[1:]
    call(approve_login(Browser(), url, login, password))
