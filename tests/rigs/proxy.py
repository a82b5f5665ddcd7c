"""A proxy in the test's own process, before a broker: what it passes on, and how, is up to its makers."""

from __future__ import annotations

import http.client
import http.server
import threading
from typing import Any, Self

KEPT_BACK = ("connection", "transfer-encoding", "content-length", "server", "date")


class Proxy:
    """Reads each answer whole, and sends what `pass_on(method, path, request, answer)` leaves of it.

    `request` is (headers, body); `answer` a dict of status, headers (pairs) and body, which may be changed.
    `target` is the broker's port.
    """

    def __init__(self, target: int | None = None) -> None:
        proxy = self
        self.target = target

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                connection = http.client.HTTPConnection("127.0.0.1", proxy.target)
                connection.request(self.command, self.path, body or None, dict(self.headers))
                reply = connection.getresponse()
                answer: dict[str, Any] = {
                    "status": reply.status,
                    "headers": reply.getheaders(),
                    "body": reply.read(),
                }
                connection.close()
                proxy.pass_on(self.command, self.path, (self.headers, body), answer)
                self.send_response(answer["status"])
                for name, value in answer["headers"]:
                    if name.lower() not in KEPT_BACK:
                        self.send_header(name, value)
                has_body = answer["status"] != 204 and self.command != "HEAD"
                if has_body:
                    self.send_header("Content-Length", str(len(answer["body"])))
                self.end_headers()
                if has_body:
                    self.wfile.write(answer["body"])

            do_GET = do_POST = do_DELETE = do_HEAD = do_OPTIONS = handle_any

            def log_message(self, *_args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def pass_on(self, method: str, path: str, request: Any, answer: Any) -> None:
        """Nothing is changed."""

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
