"""Real logs are asked with the jq lines of docs/operate.md.

What an assistant did, and why somebody could not connect.
"""

import contextlib
import json
import re
import subprocess
from pathlib import Path

import pytest

import fjmcp_broker
from rigs import fake_forgejo
from rigs.browser import Browser, LoginFailed, approve_login
from rigs.mcp_client import McpClient, OAuthClient
from rigs.raw_http import ask, get, mcp_post

pytestmark = pytest.mark.real("jq")
OPERATE = (Path(fjmcp_broker.__file__).parent / "docs/operate.md").read_text()


def commands(heading):
    """The lines of a section's block of commands that read the log."""
    section = OPERATE[OPERATE.index(f"## {heading}") :]
    block = section[section.index("```sh") : section.index("```\n\n")]
    return [line for line in block.splitlines() if line.startswith("broker-log")]


def said(jq, log, command):
    """The lines that a command of the document prints of a log."""
    script = f'broker-log() {{ cat "$LOG"; }}; jq() {{ "$JQ" "$@"; }}; {command}'.replace(
        "broker-log", "broker_log"
    )
    done = subprocess.run(
        ["sh", "-c", script],
        env={"LOG": str(log), "JQ": str(jq), "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


# -- what did this assistant do


def test_the_log_tells_what_an_assistant_did(make_installation, real_part):
    installation = make_installation()
    installation.forgejo.add_repo("alice", "r")
    installation.start()
    for user, access in (("alice", "full"), ("bob", "read")):
        client = OAuthClient(installation.url, name="Assistant")
        client.login(None, user, "secret", access)
        mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
        mcp.initialize()
        mcp.call_tool("list_my_repos")
        mcp.call_tool("create_issue", owner="alice", repo="r", title="a title that no log has")
    assert installation.broker.stop() == 0
    all_calls, changes, counts, rest = (
        said(real_part("jq"), installation.log_path, line) for line in commands("What did this assistant do?")
    )
    assert [line.split("\t")[3:] for line in all_calls] == [["list_my_repos", "ok"], ["create_issue", "ok"]]
    assert [line.split("\t")[3:] for line in changes] == [["create_issue", "ok"]]
    assert len(counts) == 4 and any(line.endswith("create_issue\tdenied") for line in counts)
    events = [json.loads(line)["event"] for line in rest]
    assert events[:2] == ["login", "token_issued"] and "tool_called" not in events
    assert "a title" not in installation.log_path.read_text()


def test_what_runs_when_the_broker_is_killed_is_not_on_record_and_the_log_shows_that(make_installation):
    installation = make_installation()
    installation.start()
    client = OAuthClient(installation.url, name="Assistant")
    client.login(None, "alice", "secret", "full")
    mcp = McpClient(installation.url + "/mcp", client.tokens["access_token"])
    mcp.initialize()
    mcp.call_tool("get_pid")
    _, stream = mcp.start_request("tools/call", {"name": "silent", "arguments": {}})
    installation.broker.kill()
    stream.close()
    installation.start()
    installation.broker.stop()
    records = installation.records()
    assert [each["tool"] for each in records if each["event"] == "tool_called"] == ["get_pid"]
    lives = [each["event"] for each in records if each["event"] in ("serving", "stopping")]
    assert lives == ["serving", "serving", "stopping"]
    assert len(installation.records("child_started")) > len(installation.records("child_stopped"))


# -- why could X not connect


def registered(rig, **more):
    client = OAuthClient(rig.url, name="Test client", **more)
    client.discover()
    client.register()
    return client


def page_of(rig, client, **overrides):
    return Browser().get(client.authorize_url(**overrides))


def expired_login(rig):
    client = registered(rig)
    browser = Browser()
    page = browser.get(client.authorize_url())
    rig.clock.advance(rig.broker.settings.login_lifetime + 1)
    return browser.submit(page, ("decision", "approve"), form=page.form_with("login"), access="full")


def another_browser(rig):
    page = page_of(rig, registered(rig))
    return Browser().submit(page, ("decision", "approve"), form=page.form_with("login"), access="full")


def called(rig, client, tool="get_pid", token=None):
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {}}}
    return ask(rig, mcp_post(rig, token or client.tokens["access_token"], body))


def revoked(rig):
    client = rig.login()
    client.revoke(client.tokens["refresh_token"])
    return client


def reused(rig):
    client = rig.login()
    old = client.tokens["refresh_token"]
    client.refresh()
    rig.clock.advance(200)
    return client.refresh(refresh_token=old)


def used_code(rig):
    client = registered(rig)
    url = client.authorize_url()
    callback = approve_login(Browser(), url, "alice", "secret", redirect_uri=client.redirect_uri)
    client.finish(callback)
    return client.redeem(re.search("code=([^&]+)", callback)[1])


def late_code(rig):
    client = registered(rig)
    url = client.authorize_url()
    callback = approve_login(Browser(), url, "alice", "secret", redirect_uri=client.redirect_uri)
    rig.clock.advance(70)
    return client.redeem(re.search("code=([^&]+)", callback)[1])


def flooded(rig):
    client = rig.login()
    rig.broker.settings.max_requests_per_user = 0
    return called(rig, client)


def suspended(rig):
    client = rig.login()
    rig.forgejo.suspend("alice")
    rig.broker.upstream.examine(rig.log.named("login")[0]["user"])
    return called(rig, client)


def logged_out(rig):
    client = rig.login()
    rig.forgejo.revoke_grant("alice", rig.app.client_id)
    with contextlib.suppress(fjmcp_broker.LoggedOut):
        rig.broker.upstream.refresh(rig.log.named("login")[0]["user"])
    return called(rig, client)


def childless(rig):
    rig.broker.settings.forgejo_mcp_binary = ["/nonexistent/forgejo-mcp"]
    return called(rig, rig.login())


def unreadable(rig):
    rig.broker.documents._web = fjmcp_broker.PublicWeb(lambda host: [])  # no name of the internet is known
    return page_of(rig, registered(rig), client_id="https://client.example/c.json")


WAYS = {
    "unknown_client": lambda rig: page_of(rig, registered(rig), client_id="fjd_gone"),
    "unreadable_client": unreadable,
    "redirect_uri": lambda rig: page_of(rig, registered(rig), redirect_uri="https://evil.example/"),
    "no_pkce": lambda rig: ask(rig, get(rig, without_pkce(rig))),
    "expired": expired_login,
    "wrong_browser": another_browser,
    "bad_code": lambda rig: with_pending(rig).redeem("fjc_" + "x" * 43),
    "code_used": used_code,
    "code_expired": late_code,
    "bad_refresh_token": lambda rig: registered(rig).refresh(refresh_token="fjr_x"),
    "refresh_token_reused": reused,
    "login_ended": lambda rig: revoked(rig).refresh(),
    "logged_out": logged_out,
    "suspended": suspended,
    "bad_token": lambda rig: called(rig, None, token="fja_" + "x" * 43),
    "misdirected_request": lambda rig: ask(
        rig, b"GET /mcp HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n"
    ),
    "forbidden_origin": lambda rig: ask(rig, get(rig, "/mcp", "Origin: https://evil.example")),
    "too_many_requests": flooded,
    "not_found": lambda rig: Browser().get(rig.url + "/MCP"),
    "child_missing": childless,
    "insufficient_scope": lambda rig: called(
        rig, rig.login(access="read", scope="forgejo:read"), "create_issue"
    ),
}


def without_pkce(rig):
    url = registered(rig).authorize_url()
    return re.sub("&code_challenge=[^&]+", "", url.removeprefix(rig.url))


def with_pending(rig):
    client = registered(rig)
    client.authorize_url()
    return client


def header(answer, name):
    """A header of an answer, whichever rig has it."""
    return answer.header(name) if hasattr(answer, "header") else answer.headers[name]


@pytest.mark.parametrize("reason", WAYS)
def test_the_line_for_a_failure_finds_it_and_the_answer_shows_the_same_id(rig, real_part, tmp_path, reason):
    answer = WAYS[reason](rig)
    log = tmp_path / "log"
    log.write_text(rig.log.text)
    by_id, _, by_reason, *_ = commands("Why could X not connect?")
    assert "unknown_client" in by_reason and "ID" in by_id
    found = [
        json.loads(line) for line in said(real_part("jq"), log, by_reason.replace("unknown_client", reason))
    ]
    request = header(answer, "x-request-id")
    assert request in [each["request"] for each in found]
    if "text/html" in (header(answer, "content-type") or ""):
        body = answer.body if isinstance(answer.body, bytes) else answer.body.encode()
        assert request.encode() in body
    assert any(
        json.loads(line)["event"] == "refused"
        for line in said(real_part("jq"), log, by_id.replace("ID", request))
    )


LOGINS = {
    "account_refused": ({"allowed_users": "bob"}, lambda rig: None),
    "forgejo_down": (
        {},
        lambda rig: rig.forgejo.inject("/login/oauth/access_token", fake_forgejo.status(502), times=9),
    ),
    "access_denied": ({}, lambda rig: None),
}


@pytest.mark.parametrize("reason", LOGINS)
def test_the_line_for_a_login_that_fails_at_its_end_finds_it(make_rig, real_part, tmp_path, reason):
    settings, spoil = LOGINS[reason]
    rig = make_rig(**settings)
    client = registered(rig)
    spoil(rig)
    decision = {"decision": "deny"} if reason == "access_denied" else {}
    try:
        approve_login(
            Browser(), client.authorize_url(), "alice", "secret", redirect_uri=client.redirect_uri, **decision
        )
    except LoginFailed:
        pass
    log = tmp_path / "log"
    log.write_text(rig.log.text)
    by_reason = commands("Why could X not connect?")[2].replace("unknown_client", reason)
    (found,) = [json.loads(line) for line in said(real_part("jq"), log, by_reason)]
    assert found["client"] == client.client_id and found["request"]


def test_every_row_of_the_table_has_a_question_a_word_and_a_fix():
    section = OPERATE[OPERATE.index("## Why could") : OPERATE.index("## The clock")]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 30
    assert all(len(row) == 3 and all(len(cell.strip()) > 5 for cell in row) for row in rows)
    words = " ".join(row[1] for row in rows)
    assert not [reason for reason in [*WAYS, *LOGINS] if f"`{reason}`" not in words]
