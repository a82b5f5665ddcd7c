"""A wire between the store and PostgreSQL that a test cuts, or holds, at a message of the store."""

import contextlib
import select
import socket
import threading

import fjmcp_broker

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class CutWire:
    """Passes on what comes and goes. `plan(message)` judges each message of the store.

    None: it is passed on. `before`: the connection ends, the server never sees the message. `after`: the
    server does it, its answer is lost. `hold`: nothing is passed on any more. `place` is the database as the
    store takes it, behind this wire; the wire reaches it by its socket.
    """

    def __init__(self, place, plan=lambda message: None):
        self._target = place.hosts[0]
        database = place.url.rpartition("/")[2]
        self.plan = plan
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.place = fjmcp_broker.PostgresServer(
            f"postgresql://fjmcp@127.0.0.1:{port}/{database}", place.password
        )
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        pairs, held = {}, set()
        while True:
            ready, _, _ = select.select([self._listener, self._woken, *pairs.keys() - held], [], [])
            for end in ready:
                if end is self._woken:
                    for each in pairs:
                        each.close()
                    return
                if end is self._listener:
                    client = self._listener.accept()[0]
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(f"{self._target.name}/.s.PGSQL.{self._target.port}")
                    pairs[client], pairs[server] = (server, True), (client, False)
                elif end in pairs:
                    self._pass_on(end, pairs, held)

    def _pass_on(self, end, pairs, held):
        other, is_client = pairs[end]
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(65536)
        what = self.plan(data) if is_client and data else None
        if what == "hold":
            held |= {end, other}
            return
        if data and what != "before":
            other.sendall(data)
        if what == "after":
            other.recv(65536)
        if what or not data:
            for each in (end, other):
                del pairs[each]
                each.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._listener.close()
