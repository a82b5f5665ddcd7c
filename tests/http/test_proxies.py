"""Behind real Caddy and nginx with the configuration files of docs/.

Only host names, ports and certificates are put in.
"""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rigs import loopback
from rigs.browser import Browser
from rigs.child_control import ChildControl
from rigs.loopback import free_port, own_address, running
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import text_of

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
HOST = "mcp.example.org"
pytestmark = pytest.mark.timeout(60, func_only=True)


OWN_ADDRESS = own_address(loopback.PROXY)


def certificate(folder):
    """A self-signed certificate for HOST and its key; their paths."""
    paths = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN={HOST}",
            "-addext",
            f"subjectAltName=DNS:{HOST}",
            "-out",
            paths[0],
            "-keyout",
            paths[1],
        ],
        check=True,
        capture_output=True,
    )
    return paths


def caddy_configuration(folder, port, upstream):
    """docs/Caddyfile with a port, a certificate and without what a test machine has no right to."""
    text = (DOCS / "Caddyfile").read_text()
    cert, key = certificate(folder)
    text = text.replace("127.0.0.1:8080", upstream).replace(
        f"{HOST} {{", f"{HOST}:{port} {{\n\tbind {OWN_ADDRESS}\n\ttls {cert} {key}", 1
    )
    path = folder / "Caddyfile"
    path.write_text("{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n" + text)
    return ["run", "--config", path, "--adapter", "caddyfile"]


def nginx_configuration(folder, port, upstream):
    """docs/nginx.conf within a main configuration that keeps to the folder."""
    cert, key = certificate(folder)
    text = (DOCS / "nginx.conf").read_text()
    text = re.sub(r"listen \[::\]:443[^;]*;", "", text).replace("listen 443", f"listen {OWN_ADDRESS}:{port}")
    text = re.sub(r"/etc/letsencrypt\S*fullchain.pem", str(cert), text)
    text = re.sub(r"/etc/letsencrypt\S*privkey.pem", str(key), text).replace("127.0.0.1:8080", upstream)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nuser root;\nevents {{}}\nhttp "
        f"{{\naccess_log off;\n"
        f"{temporary}\n{text}}}\n"
    )
    return ["-c", path, "-p", folder]


CONFIGURATIONS = {"caddy": caddy_configuration, "nginx": nginx_configuration}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.real(name)) for name in CONFIGURATIONS])
def behind(request, real_part, make_installation, tmp_path):
    """(installation, routes, TLS context, control of its children).

    The broker behind a real proxy, at https://mcp.example.org:PORT.
    """
    folder = tmp_path / "proxy"
    folder.mkdir()
    port = free_port(OWN_ADDRESS)
    with ChildControl(str(tmp_path / "control")) as control:
        installation = make_installation(child=("--control", control.path), debug=True)
        upstream = urlsplit(installation.url).netloc
        origin = f"https://{HOST}:{port}"
        installation.app = installation.forgejo.add_app([origin + "/oauth/callback"])
        installation.write(
            **{
                **installation.settings,
                "public_url": origin,
                "forgejo_oauth_client_id": installation.app.client_id,
                "forgejo_oauth_client_secret": installation.app.client_secret,
            }
        )
        installation.start()
        installation.url = origin
        words = CONFIGURATIONS[request.param](folder, port, upstream)
        context = ssl.create_default_context(cafile=folder / "cert.pem")
        homes = dict.fromkeys(("XDG_DATA_HOME", "XDG_CONFIG_HOME", "HOME"), str(folder))
        with running(real_part(request.param), words, folder, (OWN_ADDRESS, port), {**os.environ, **homes}):
            yield installation, {origin: f"https://{OWN_ADDRESS}:{port}"}, context, control


def login(behind, user="alice"):
    installation, routes, context, _ = behind
    client = OAuthClient(installation.url, routes=routes, context=context)
    client.login(Browser(routes=routes, context=context), user, "secret")
    return client


def session(behind, user="alice"):
    installation, routes, context, _ = behind
    mcp = McpClient(
        installation.url + "/mcp", login(behind, user).tokens["access_token"], routes=routes, context=context
    )
    mcp.initialize()
    return mcp


def test_the_whole_flow_goes_through_the_proxy(behind):
    for user in ("alice", "bob"):
        with session(behind, user) as mcp:
            assert len(mcp.list_tools()) > 3
            assert f'"login": "{user}"' in text_of(mcp.call_tool("get_my_user_info"))
            assert mcp.delete().status == 204
    assert {record["address"] for record in behind[0].records("client_registered")} == {"127.0.0.1"}


def test_events_arrive_as_they_are_sent_and_a_long_call_is_waited_for(behind):
    control = behind[3]
    with session(behind) as mcp:
        stream = mcp.open_stream()
        stream.wait_comment(20)  # a proxy that buffers would keep it
        control.emit({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        assert stream.next(20).data["method"] == "notifications/tools/list_changed"
        _, call = mcp.start_request("tools/call", {"name": "get_slow", "arguments": {"key": "k"}})
        assert (
            call.headers["Content-Type"] == "text/event-stream"
        )  # its head is here before its answer is made
        control.release("k")
        assert [call.next(20).data == "", "result" in call.next(20).data] == [
            True,
            True,
        ]  # the first event only has an id
        stream.close()


def exchange(behind, head, body):
    """Send one request to /mcp over a connection of its own; the answer and its body.

    It may come before all was sent.
    """
    installation, routes, context, _ = behind
    proxy, token = urlsplit(routes[installation.url]), login(behind).tokens["access_token"]
    with context.wrap_socket(
        socket.create_connection((proxy.hostname, proxy.port), 20), server_hostname=HOST
    ) as sock:
        head = [
            f"POST /mcp HTTP/1.1\r\nHost: {urlsplit(installation.url).netloc}",
            f"Authorization: Bearer {token}",
            "Content-Type: application/json",
            "Connection: close",
            *head,
        ]
        with contextlib.suppress(OSError):
            sock.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        return answer, json.loads(answer.read())


def test_a_chunked_body_is_read(behind):
    body = json.dumps(
        {"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"_meta": {"x": "y" * 100_000}}}
    ).encode()
    parts = [body[start : start + 7000] for start in range(0, len(body), 7000)] + [b""]
    answer, message = exchange(
        behind,
        ["Transfer-Encoding: chunked"],
        b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts),
    )
    assert answer.status == 200 and message == {"jsonrpc": "2.0", "id": 1, "result": {}}


def test_B13_a_forged_address_is_not_believed(behind):
    installation, routes, context, _ = behind
    client = OAuthClient(installation.url, routes=routes, context=context)
    client.discover()
    client._http(
        "POST",
        client.metadata["registration_endpoint"],
        json.dumps({"redirect_uris": ["https://a.example/cb"]}).encode(),
        {
            "Content-Type": "application/json",
            "X-Forwarded-For": "203.0.113.9",
            "X-Real-IP": "203.0.113.9",
            "Forwarded": "for=203.0.113.9",
        },
    )
    assert installation.records("client_registered")[-1]["address"] == "127.0.0.1"


def test_slow_bodies_of_one_client_behind_the_proxy_meet_its_limit_and_another_client_none(behind):
    """The proxy passes half a body on, and says whose it is."""
    installation, routes, context, _ = behind
    proxy, netloc = urlsplit(routes[installation.url]), urlsplit(installation.url).netloc
    installation.write(**installation.settings, trusted_proxies="127.0.0.1", max_requests_per_address=8)
    installation.broker.process.send_signal(signal.SIGHUP)
    while not installation.records("settings_reloaded"):
        select.select([], [], [], 0.02)

    def connection(address):
        plain = socket.create_connection((proxy.hostname, proxy.port), 20, (address, 0))
        return context.wrap_socket(plain, server_hostname=HOST)

    half = f"POST /oauth/token HTTP/1.1\r\nHost: {netloc}\r\nContent-Length: 9\r\n"
    half += "Content-Type: application/x-www-form-urlencoded\r\n\r\na"
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(connection("127.0.0.5")) for _ in range(12)]
        for sock in slow:
            sock.sendall(half.encode())
        # Caddy reads the rest of a body before it passes the
        # refusal on; the broker has no part in that any more.
        while len(found := [each for each in installation.records("request") if each["status"] == 429]) < 4:
            select.select([], [], [], 0.02)
        assert {each["address"] for each in found} == {"127.0.0.5"}
        other = opened.enter_context(connection("127.0.0.6"))
        other.sendall(f"GET /healthz HTTP/1.1\r\nHost: {netloc}\r\nConnection: close\r\n\r\n".encode())
        assert other.recv(12) == b"HTTP/1.1 200"


def test_too_large_a_body_gets_the_brokers_own_words(behind):
    body = b" " * (4 * 2**20 + 10)
    answer, message = exchange(behind, [f"Content-Length: {len(body)}"], body)
    assert answer.status == 413 and "4194304" in message["error_description"]


AMBIGUOUS = [  # (field lines, body): each could be read as one request or as two
    ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], b"0\r\n\r\n"),
    ([b"Content-Length: 5", b"Content-Length: 0"], b"GET /x"),
    ([b"Content-Length: 0", b"Content-Length: 5"], b"GET /x"),
    ([b"Content-Length: +5"], b"abcde"),
    ([b"Content-Length: 5, 5"], b"abcde"),
    ([b"Transfer-Encoding: xchunked"], b"0\r\n\r\n"),
    ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"], b"0\r\n\r\n"),
    ([b"Transfer-Encoding : chunked"], b"0\r\n\r\n"),
    ([b"Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n"),
    ([b"X: y\rContent-Length: 5"], b"abcde"),
    ([b"X: y\nContent-Length: 5"], b"abcde"),
    ([b" Content-Length: 5"], b"abcde"),
    ([b"Transfer-Encoding: chunked"], b"5\nabcde\n0\n\n"),
    ([b"Transfer-Encoding: chunked"], b"5 \r\nabcde\r\n0\r\n\r\n"),
    ([b"Transfer-Encoding: chunked"], b"fffffffffffffffff1\r\na\r\n0\r\n\r\n"),
    ([b"Content-Length: 5", b"Expect: 100-continue"], b"abcde"),
]


def test_H23_the_broker_never_reads_more_requests_than_the_proxy_sent(behind):
    installation, routes, context, _ = behind
    proxy, netloc = urlsplit(routes[installation.url]), urlsplit(installation.url).netloc.encode()
    answers = 0
    for lines, body in AMBIGUOUS:
        with context.wrap_socket(
            socket.create_connection((proxy.hostname, proxy.port), 20), server_hostname=HOST
        ) as sock:
            head = b"\r\n".join([b"POST /oauth/token HTTP/1.1", b"Host: " + netloc, *lines])
            last = b"GET /healthz HTTP/1.1\r\nHost: " + netloc + b"\r\nConnection: close\r\n\r\n"
            data = b""
            sock.settimeout(3)  # a proxy may wait for a body that never comes
            with contextlib.suppress(OSError):
                sock.sendall(head + b"\r\n\r\n" + body + last)
                while more := sock.recv(65536):
                    data += more
            found = len(re.findall(rb"HTTP/1\.1 [2-5][0-9][0-9]", data))
            assert found <= 2 and b" 500 " not in data
            answers += found
    assert 0 < len(installation.records("request")) <= answers
    assert session(behind).delete().status == 204
