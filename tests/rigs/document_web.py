"""The public internet for tests.

https origins of any name on one loopback port, a resolver, and a throw-away certificate authority.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fjmcp_broker import PublicWeb

DOCUMENTS = json.loads((Path(__file__).parent / "client_documents.json").read_text())
PUBLIC = "93.184.216.34"
NAMES = ("claude.ai", "chatgpt.com", "vscode.dev", "zed.dev", "goose-docs.ai", "app.example", "*.app.example")


def make_authority(folder: Path) -> tuple[Path, Path, Path]:
    """A certificate authority and a certificate of it for NAMES.

    Gives (CA file, certificate file, key file).
    """

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *curve,
        "-days",
        "2",
        "-subj",
        "/CN=throw-away",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
    )
    openssl("req", *curve, "-subj", "/CN=app.example", "-keyout", "leaf.key", "-out", "leaf.csr")
    (folder / "names").write_text(
        "authorityKeyIdentifier=keyid\nsubjectAltName=" + ",".join(f"DNS:{name}" for name in NAMES) + "\n"
    )
    openssl(
        "x509",
        "-req",
        "-in",
        "leaf.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "names",
        "-out",
        "leaf.pem",
    )
    return folder / "ca.pem", folder / "leaf.pem", folder / "leaf.key"


class DocumentWeb:
    """Answers by URL.

    `answers[url]` is (status, headers, body), or a function of the connection that sends the answer itself.

    `names[host]` is what the resolver says, by default one public address. `asked`, `resolved` and
    `connected` tell what happened.
    """

    def __init__(self, authority: tuple[Path, Path, Path]) -> None:
        self._ca, leaf, key = authority
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(leaf, key)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self.answers: dict[str, Any] = {}
        self.names: dict[str, Any] = {}
        self.asked: list[str] = []
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        # Addresses that refuse, that let every attempt time out, and
        # that accept and say nothing; how long each attempt waited.
        self.refused: set[str] = set()
        self.silent: set[str] = set()
        self.deaf: set[str] = set()
        self.patience: list[float] = []
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def guarded(self) -> PublicWeb:
        """The broker's own guard, before this internet."""
        return PublicWeb(self._resolve, self._connect, str(self._ca))

    def _resolve(self, host: str) -> Any:
        self.resolved.append(host)
        answer = self.names.get(host, [PUBLIC])
        return answer() if callable(answer) else answer

    def _connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.connected.append(address)
        if address[0] in self.refused:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        self.patience.append(timeout)
        if address[0] in self.silent:
            self.ended.wait(timeout)
            raise TimeoutError("timed out")
        if address[0] in self.deaf:
            return self._deaf(timeout)
        return socket.create_connection(self._listener.getsockname(), timeout)

    def _deaf(self, timeout: float) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._open.add(theirs)
        ours.settimeout(timeout)
        return ours

    def publish(
        self,
        document: Any,
        url: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        status: int = 200,
        kind: str = "application/json",
    ) -> str:
        """Serve a document at its client_id (or another URL); gives the URL."""
        url = url or document["client_id"]
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers[url] = (
            status,
            (("Content-Type", kind), ("Content-Length", str(len(body))), *headers),
            body,
        )
        return url

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            with raw, self._context.wrap_socket(raw, server_side=True) as connection:
                self._open.add(connection)
                head = b""
                while b"\r\n\r\n" not in head:
                    data = connection.recv(65536)
                    if not data:
                        return
                    head += data
                lines = head.decode().split("\r\n")
                host = next(line.split(": ")[1] for line in lines if line.lower().startswith("host:"))
                url = f"https://{host}{lines[0].split()[1]}"
                self.asked.append(url)
                answer = self.answers.get(url, (404, (("Content-Length", "0"),), b""))
                if callable(answer):
                    answer(connection)
                    return
                status, headers, body = answer
                text = "".join(f"{name}: {value}\r\n" for name, value in headers)
                connection.sendall(
                    f"HTTP/1.1 {status} Some\r\n{text}Connection: close\r\n\r\n".encode() + body
                )
        except OSError:
            pass  # the broker hung up, as it should on what it does not want

    def close(self) -> None:
        """End every connection and thread."""
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        for thread in (self._thread, *self._threads):
            thread.join(30)


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class RsaKey:
    """A private RSA key in plain numbers, so that tests can also sign what no library would."""

    def __init__(self, bits: int = 2048, kid: str = "k1") -> None:
        p, q = (
            int(
                subprocess.run(
                    ["openssl", "prime", "-generate", "-bits", str(bits // 2)],
                    check=True,
                    capture_output=True,
                ).stdout
            )
            for _ in "pq"
        )
        self.n, self.e, self.kid = p * q, 65537, kid
        self._d = pow(self.e, -1, (p - 1) * (q - 1))
        self.size = (self.n.bit_length() + 7) // 8

    @property
    def jwk(self) -> dict[str, str]:
        """The public key (RFC 7517)."""
        return {
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": self.kid,
            "e": b64url(self.e.to_bytes(3, "big")),
            "n": b64url(self.n.to_bytes(self.size, "big")),
        }

    def sign_block(self, block: bytes) -> bytes:
        """The signature whose block is this."""
        return pow(int.from_bytes(block, "big"), self._d, self.n).to_bytes(self.size, "big")

    def block(self, message: bytes) -> bytes:
        """EMSA-PKCS1-v1_5 with SHA-256."""
        info = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(message).digest()
        return b"\0\1" + b"\xff" * (self.size - 3 - len(info)) + b"\0" + info

    def jwt(
        self,
        claims: Mapping[str, Any],
        header: Mapping[str, Any] | None = None,
        block: Callable[[bytes], bytes] | None = None,
    ) -> str:
        """A signed JWT; `block(message)` is another block than the right one."""
        header = {"alg": "RS256", "typ": "JWT", "kid": self.kid, **(header or {})}
        signed = ".".join(b64url(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{b64url(self.sign_block((block or self.block)(signed.encode())))}"
