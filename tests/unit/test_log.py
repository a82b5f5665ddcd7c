"""Log: one line an event, and nothing in it that was not meant for it.

Who did what can be told afterwards.
"""

import ast
import io
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

import fjmcp_broker
from fjmcp_broker import Log
from rigs.browser import Browser, approve_login
from rigs.mcp_client import McpClient

LOUD = "\x1b[31m\r\nFAKE \u2028 line \u202e \x00 \U0001f600 \ud800"


@pytest.mark.parametrize("form", ["json", "text"])
def test_L02_whatever_a_field_holds_an_event_is_one_line_of_plain_characters(form):
    stream = io.StringIO()
    log = Log(SimpleNamespace(debug=False, log_format=form, log_addresses="full"), stream)
    log.event("info", "event", field=LOUD, number=3, nothing=None)
    log.event("debug", "not shown")
    text = stream.getvalue()
    assert (
        text.count("\n") == 1
        and text.endswith("\n")
        and all(" " <= character <= "~" for character in text[:-1])
    )
    assert form == "text" or json.loads(text)["field"] == LOUD and "nothing" not in json.loads(text)


def raw(url, data):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 10) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "path",
    ["/%1B[31m%0D%0AFAKE%E2%80%A8", "/\x1b[31m", "/" + "x" * 6000, "/?access_token=fja_secret", "/\u2028"],
)
def test_L02_a_path_cannot_forge_a_line_or_fill_the_log(rig, path):
    host = urlsplit(rig.url).netloc
    raw(rig.url, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    raw(rig.url, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    rig.log.wait("request")
    text = rig.log.text
    assert text.isascii() and "\x1b" not in text and "fja_secret" not in text
    for line in text.splitlines():
        assert json.loads(line)["event"] and len(line) < 600


def test_L03_an_exception_in_a_handler_tells_the_operator_where_and_the_client_only_a_number(
    rig, monkeypatch
):
    def fails(request):
        token = "fja_in-a-local"
        raise RuntimeError(f"with {token} in its message")

    monkeypatch.setattr(rig.broker.server, "handle", fails)
    answer = raw(
        rig.url,
        b"POST /mcp HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fja_bearer\r\n"
        b"Content-Length: 2\r\nConnection: close\r\n\r\n{}",
    )
    (record,) = rig.log.wait("internal_error")
    assert record["error"] == "RuntimeError" and record["line"]
    number = json.loads(rig.log.text.splitlines()[-1])["request"]
    assert b" 500 " in answer and f"Internal error {number}.".encode() in answer
    for part in ("fja_", "RuntimeError(", "Traceback", "with "):
        assert part not in answer.decode() and part not in rig.log.text


def test_L04_debug_is_off_unless_asked_for_and_is_told_at_the_start(make_installation):
    quiet, loud = make_installation(), make_installation(debug="true")
    for installation in (quiet, loud):
        installation.start()
        assert installation.broker.stop() == 0
    assert not quiet.records("debug_on") and loud.records("debug_on")[0]["level"] == "warning"


def test_L06_each_step_of_a_login_and_a_session_is_on_record_with_who_and_what(rig):
    mcp = rig.session()
    client = mcp.oauth
    old = client.tokens["refresh_token"]
    assert client.refresh().status == 200
    assert client.refresh().status == 200
    McpClient(mcp.url, client.tokens["access_token"], session_id=mcp.session_id).delete()
    rig.clock.advance(200)
    assert client.refresh(refresh_token=old).status == 400  # reuse
    other = rig.login("bob")
    assert other.revoke(other.tokens["refresh_token"]).status == 200
    approve_login(
        Browser(), other.authorize_url(), "bob", "secret", decision="deny", redirect_uri=other.redirect_uri
    )
    grants = {record["grant"] for record in rig.log.named("login")}
    assert len(grants) == 2
    for event, fields in (
        ("client_registered", {"client", "name", "address"}),
        ("consent_given", {"client", "scope"}),
        ("consent_refused", {"client"}),
        ("login", {"user", "login", "client", "grant", "scope"}),
        ("token_issued", {"user", "client", "grant", "scope"}),
        ("token_refreshed", {"user", "client", "grant"}),
        ("reuse_detected", {"user", "client", "grant"}),
        ("token_revoked", {"user", "client", "grant"}),
        ("session_opened", {"user", "client"}),
        ("session_ended", {"user", "client", "reason"}),
        ("child_started", {"user", "client", "pid"}),
        ("child_stopped", {"user", "client", "reason"}),
    ):
        for record in rig.log.wait(event):
            assert record["audit"] is True and fields <= set(record), (event, record)
            assert "grant" not in record or record["grant"] in grants
    for secret in (
        old,
        *(
            tokens[kind]
            for tokens in (client.tokens, other.tokens)
            for kind in ("access_token", "refresh_token")
        ),
    ):
        assert secret not in rig.log.text


def test_L07_a_flood_of_401s_writes_ten_records_a_minute(make_rig):
    rig = make_rig(debug="false")
    host, before = urlsplit(rig.url).netloc, rig.log.text
    for _ in range(200):
        assert b" 401 " in raw(
            rig.url,
            f"POST /mcp HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer fja_x\r\nContent-Length: "
            "0\r\nConnection: close\r\n\r\n".encode(),
        )
    records = [json.loads(line) for line in rig.log.text[len(before) :].splitlines()]
    assert [each["event"] for each in records] == ["refused"] * 10


def test_time_is_that_of_rfc_3339_in_utc_with_milliseconds():
    stream = io.StringIO()
    clock = SimpleNamespace(now=lambda: 1764547200.25)
    settings = SimpleNamespace(debug=False, log_format="json", log_addresses="full")
    Log(settings, stream, clock).event("info", "serving")
    assert json.loads(stream.getvalue())["time"] == "2025-12-01T00:00:00.250Z"


def test_each_line_begins_with_its_priority_where_the_journal_reads_it(tmp_path, monkeypatch):
    settings = SimpleNamespace(debug=True, log_format="json", log_addresses="full")
    with open(tmp_path / "journal", "w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log = Log(settings, stream)
        for level in ("debug", "info", "warning", "error"):
            log.event(level, "serving")
        stream.seek(0)
        assert [line[:3] for line in stream] == ["<7>", "<6>", "<4>", "<3>"]


def test_a_journal_that_is_not_this_stream_gets_no_priorities(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    settings = SimpleNamespace(debug=True, log_format="json", log_addresses="full")
    with open(tmp_path / "log", "w+") as stream:
        Log(settings, stream).event("error", "internal_error")
        stream.seek(0)
        assert stream.read().startswith("{")


def test_each_event_is_one_snake_case_word():
    tree = ast.parse(Path(fjmcp_broker.__file__).read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    named = [call.args[1:2] for call in calls if call.func.attr in ("event", "bounded", "_dropped")]
    named += [call.args[:1] for call in calls if call.func.attr == "audit"]
    words = {
        text.value
        for argument in sum(named, [])
        for text in ast.walk(argument)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    }
    assert len(words) > 30 and [word for word in words if not re.fullmatch(r"[a-z][a-z_]*[a-z]", word)] == []
