"""What makes the common clients just work, with a test for each numbered point.

A discovery, B registration, C tokens, D transport.

Points 14 (Client ID Metadata Documents) and the modern half of 32 come with those features. Where the
contract overrules a point, the test says what holds instead: 4 (`/oauth/*` is advertised, the root works), 28
(nothing is recreated from an unknown session id), 34 (on /mcp, CORS goes by the list of origins).
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rigs.browser import Browser, approve_login, query_of
from rigs.mcp_client import McpClient, OAuthClient, Wire
from rigs.processes import ended
from rigs.rig import text_of
from tools.replay import Replay, transcripts


@pytest.fixture
def engine():
    """What is tested here is the same on each."""
    return "sqlite"


PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
LIST_ORIGIN = "https://claude.ai"


def http(rig, method, path, body=None, headers=None):
    wire = Wire(rig.url)
    try:
        return wire.exchange(method, path, body, headers or {})
    finally:
        wire.close()


def well_known(rig, path):
    return http(rig, "GET", rig.url + "/.well-known/" + path).json()


def registered(rig, **asked):
    client = OAuthClient(rig.url)
    client.discover()
    answer = client.register(**asked)
    assert answer.status == 201, answer
    return client


def post(rig, token, message=PING, **headers):
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "Authorization": f"Bearer {token}",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return http(
        rig,
        "POST",
        rig.url + "/mcp",
        json.dumps(message).encode(),
        {name: value for name, value in headers.items() if value},
    )


@pytest.fixture
def token(rig):
    return rig.login().tokens["access_token"]


# -- A. discovery


def test_A01_the_issuer_is_the_same_bytes_everywhere(rig):
    client = registered(rig)
    callback = approve_login(Browser(), client.authorize_url(), "alice", "secret")
    issuer = client.metadata["issuer"]
    assert issuer == rig.url and not issuer.endswith("/")
    assert (
        client.resource_metadata["authorization_servers"] == [issuer] and query_of(callback)["iss"] == issuer
    )


def test_A02_the_server_metadata_are_one_document_in_three_places(rig):
    documents = [
        http(rig, "GET", rig.url + path)
        for path in (
            "/.well-known/oauth-authorization-server",
            "/.well-known/oauth-authorization-server/mcp",
            "/mcp/.well-known/oauth-authorization-server",
        )
    ]
    assert {answer.status for answer in documents} == {200} and len(
        {answer.body for answer in documents}
    ) == 1
    assert {answer.headers["Content-Type"] for answer in documents} == {"application/json"}


def test_A03_the_resource_metadata_name_the_mcp_url_with_and_without_slash_and_at_the_root(rig):
    assert {
        well_known(rig, "oauth-protected-resource" + path)["resource"] for path in ("", "/mcp", "/mcp/")
    } == {rig.url + "/mcp"}


def test_A04_the_endpoints_at_the_root_work_and_are_not_advertised(rig):
    metadata = well_known(rig, "oauth-authorization-server")
    assert metadata["token_endpoint"] == rig.url + "/oauth/token"
    client = registered(rig)
    client.metadata = {
        **client.metadata,
        **{
            f"{name}_endpoint": f"{rig.url}/{path}"
            for name, path in (
                ("authorization", "authorize"),
                ("token", "token"),
                ("registration", "register"),
                ("revocation", "revoke"),
            )
        },
    }
    client.client_id = None
    client.login(None, "alice", "secret")
    assert client.refresh().status == 200
    assert client.revoke(client.tokens["refresh_token"]).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "openid-configuration",
        "openid-configuration/mcp",
        "jwks.json",
        "oauth-protected-resource/other",
        "x/y",
    ],
)
@pytest.mark.parametrize("version", ["2024-11-05", "2099-01-01", "rubbish"])
def test_A05_under_well_known_is_json_whatever_is_asked(rig, path, version):
    answer = http(rig, "GET", rig.url + "/.well-known/" + path, headers={"MCP-Protocol-Version": version})
    assert (
        answer.status == 404
        and answer.headers["Content-Type"] == "application/json"
        and answer.json()["error"]
    )


def test_A06_the_metadata_say_all_that_clients_read_and_nothing_empty(rig):
    metadata = well_known(rig, "oauth-authorization-server")
    for name in (
        "issuer",
        "authorization_endpoint",
        "token_endpoint",
        "registration_endpoint",
        "revocation_endpoint",
    ):
        assert metadata[name].startswith(rig.url)
    assert metadata["response_types_supported"] == ["code"] and metadata[
        "code_challenge_methods_supported"
    ] == ["S256"]
    assert metadata["grant_types_supported"] == ["authorization_code", "refresh_token"]
    assert {"none", "client_secret_post", "client_secret_basic"} <= set(
        metadata["token_endpoint_auth_methods_supported"]
    )
    assert (
        metadata["authorization_response_iss_parameter_supported"] is True
        and "offline_access" in metadata["scopes_supported"]
    )
    assert not [name for name, value in metadata.items() if value in (None, "", [])]


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "HEAD"])
@pytest.mark.parametrize("sent", ["", "Bearer wrong"])
def test_A07_without_a_good_token_every_method_is_shown_the_way(rig, method, sent):
    answer = http(
        rig,
        method,
        rig.url + "/mcp",
        b"not JSON" if method == "POST" else None,
        {"Accept": "text/html", **({"Authorization": sent} if sent else {})},
    )
    challenge = answer.headers["WWW-Authenticate"]
    assert (
        answer.status == 401
        and f'resource_metadata="{rig.url}/.well-known/oauth-protected-resource/mcp"' in challenge
    )
    assert 'scope="' in challenge and ('error="invalid_token"' in challenge) == bool(sent)


def test_A08_a_port_in_the_public_url_is_warned_of(make_installation):
    installation = make_installation()
    installation.start()
    assert "443" in installation.command("--public-url", "https://mcp.example.test:8443", "check").stdout


# -- B. registration


@pytest.mark.parametrize(
    "asked, kept",
    [
        ("none", "none"),
        ("client_secret_post",) * 2,
        ("client_secret_basic",) * 2,
        (None, "client_secret_basic"),
    ],
)
def test_B09_registration_is_open_and_honours_the_way_of_authentication(rig, asked, kept):
    answer = OAuthClient(rig.url).register(token_endpoint_auth_method=asked)
    made = answer.json()
    assert (
        answer.status == 201
        and answer.headers["Content-Type"] == "application/json"
        and made["token_endpoint_auth_method"] == kept
    )
    assert ("client_secret" in made) == (kept != "none") and made.get("client_secret_expires_at", 0) == 0


def test_B10_the_answer_echoes_what_was_asked_and_fills_in_the_defaults(rig):
    asked = {
        "client_name": "Mine",
        "scope": "claudeai",
        "redirect_uris": ["https://a.example/cb"],
        "grant_types": ["authorization_code"],
        "response_types": ["code"],
        "token_endpoint_auth_method": "none",
    }
    made = OAuthClient(rig.url).register(**asked).json()
    assert {name: made[name] for name in asked} == asked
    least = http(
        rig,
        "POST",
        rig.url + "/register",
        b'{"redirect_uris":["https://a.example/cb"]}',
        {"Content-Type": "application/json"},
    ).json()
    assert (
        least["grant_types"] == ["authorization_code"]
        and least["response_types"] == ["code"]
        and least["redirect_uris"]
    )
    assert not [name for name, value in {**made, **least}.items() if value in (None, "")]


@pytest.mark.parametrize("scope", [None, "claudeai", "openid email profile", "forgejo:read", ""])
def test_B11_A12_no_scope_is_fatal_and_unknown_ones_are_dropped(rig, scope):
    client = registered(rig, scope=scope)
    tokens = client.login(
        None, "alice", "secret", scope="claudeai openid forgejo:read forgejo:write offline_access"
    )
    assert set(tokens["scope"].split()) == {"forgejo:read", "forgejo:write"}


def test_B12_redirect_uris_are_https_loopback_or_a_listed_scheme(rig):
    cursors = transcripts()["cursor"]["registration"]
    assert OAuthClient(rig.url).register(**cursors).json()["redirect_uris"] == cursors["redirect_uris"]
    for uri in (
        "vscode://x/cb",
        "vscode-insiders://x/cb",
        "jetbrains://gateway/cb",
        "http://[::1]:1/cb",
        "https://a.example:8443/cb",
    ):
        assert OAuthClient(rig.url).register(redirect_uris=[uri]).status == 201
    for uri in ("javascript:alert(1)", "data:text/html,x", "file:///x", "vbscript:x", "http://a.example/cb"):
        assert OAuthClient(rig.url).register(redirect_uris=[uri, "https://a.example/cb"]).status == 400


@pytest.mark.parametrize(
    "uri, matches",
    [
        ("http://localhost:55555/callback", True),
        ("http://127.0.0.1:1/callback", True),
        ("http://[::1]:9/callback", True),
        ("http://localhost/callback", True),
        ("http://localhost:5/other", False),
        ("http://localhost:5/callback/", False),
    ],
)
def test_B13_loopback_matches_on_any_port_and_name_but_never_on_another_path(rig, uri, matches):
    client = registered(rig, redirect_uris=["http://127.0.0.1:3118/callback"])
    assert Browser().get(client.authorize_url(redirect_uri=uri)).status == (200 if matches else 400)


def test_B13_the_exact_string_is_bound_to_the_code(rig):
    client = registered(rig, redirect_uris=["http://127.0.0.1/"])
    url = client.authorize_url(redirect_uri="http://127.0.0.1:49811")
    code = query_of(approve_login(Browser(), url, "alice", "secret", redirect_uri="http://127.0.0.1:49811"))[
        "code"
    ]
    assert client.redeem(code, redirect_uri="http://127.0.0.1:49811/").json()["error"] == "invalid_grant"
    assert client.redeem(code, redirect_uri="http://127.0.0.1:49811").status == 200


def test_B15_registering_over_and_over_hurts_nobody(make_rig):
    rig = make_rig(rate_register="1000000")
    kept = rig.login()
    asked = transcripts()["claude_ai"]["registration"]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(
            pool.map(lambda _: OAuthClient(rig.url, name="again").register(**asked).status, range(300))
        )
    assert set(statuses) == {201}
    assert kept.refresh().status == 200


def test_B16_an_unknown_client_is_told_how_to_go_on(rig):
    client = registered(rig)
    client.client_id = "fjd_pruned"
    answer = client.redeem("code")
    assert answer.status == 401 and answer.json()["error"] == "invalid_client"
    page = Browser().get(client.authorize_url())
    assert page.status == 400 and page.redirected_to is None
    for name in ("Claude", "VS Code", "mcp-remote"):
        assert name in page.text


def test_B17_a_shared_address_has_room_and_the_limit_is_json_with_retry_after(rig):
    asked = json.dumps({"redirect_uris": ["https://a.example/cb"]}).encode()
    headers = {"Content-Type": "application/json", "X-Forwarded-For": "160.79.104.10"}
    statuses = [http(rig, "POST", rig.url + "/register", asked, headers).status for _ in range(60)]
    assert set(statuses) == {201}
    while (answer := http(rig, "POST", rig.url + "/register", asked, headers)).status == 201:
        pass
    assert answer.status == 429 and int(answer.headers["Retry-After"]) > 0 and answer.json()["error"]
    other = {**headers, "X-Forwarded-For": "160.79.104.11"}
    assert http(rig, "POST", rig.url + "/register", asked, other).status == 201


# -- C. authorize and token


def test_C18_the_consent_page_does_not_stop_the_chain_of_redirects(rig):
    page = Browser().get(registered(rig).authorize_url())
    assert "form-action" not in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    "resource, granted",
    [
        ("{}/mcp", True),
        ("{}/mcp/", True),
        ("{}", True),
        ("{}/", True),
        (None, True),
        ("https://other.example/mcp", False),
    ],
)
def test_C19_resource_in_every_spelling(rig, resource, granted):
    client = registered(rig)
    url = client.authorize_url(resource=resource and resource.format(rig.url), prompt="consent")
    if granted:
        client.finish(approve_login(Browser(), url, "alice", "secret"))
        assert client.refresh(resource=None).status == 200
        assert post(rig, client.tokens["access_token"]).status == 200
    else:
        page = Browser(callbacks=(client.redirect_uri,)).get(url)
        assert query_of(page.redirected_to)["error"] == "invalid_target"


@pytest.mark.parametrize("registered_as", ["client_secret_basic", "client_secret_post"])
@pytest.mark.parametrize("used", ["client_secret_basic", "client_secret_post"])
def test_C20_a_secret_may_come_either_way(rig, registered_as, used):
    client = registered(rig, token_endpoint_auth_method=registered_as)
    client.auth_method = used
    assert client.login(None, "alice", "secret")["access_token"] and client.refresh().status == 200


def test_C20_a_stray_secret_of_a_public_client_is_ignored(rig):
    client = rig.login()
    assert client.refresh(client_secret="stray").status == 200


def test_C21_the_token_answer_has_all_that_clients_read(rig):
    client = registered(rig)
    code = query_of(
        approve_login(Browser(), client.authorize_url(scope="forgejo:read"), "alice", "secret", access="read")
    )["code"]
    answer = client.redeem(code)
    tokens = answer.json()
    assert (
        answer.status == 200
        and answer.headers["Cache-Control"] == "no-store"
        and answer.headers["Content-Type"] == "application/json"
    )
    assert (
        tokens["token_type"] == "Bearer"
        and type(tokens["expires_in"]) is int
        and tokens["scope"] == "forgejo:read"
        and tokens["refresh_token"]
    )
    refused = client.redeem("wrong")
    assert refused.status == 400 and refused.headers["Content-Type"] == "application/json"


def test_C22_refreshes_from_two_addresses_at_once_all_succeed_and_go_on(rig):
    client = rig.login()
    rig.clock.stop()
    first = client.tokens
    endpoint, fields = (
        rig.url + "/oauth/token",
        f"grant_type=refresh_token&client_id={client.client_id}&refresh_token={first['refresh_token']}",
    )

    def refresh(number):
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "X-Forwarded-For": f"160.79.104.{number % 2}",
        }
        return http(rig, "POST", endpoint, fields.encode(), headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(refresh, range(20)))
    assert {answer.status for answer in answers} == {200} and len(
        {answer.json()["refresh_token"] for answer in answers}
    ) == 1
    rig.clock.advance(110)
    client.tokens = refresh(0).json()
    assert post(rig, client.tokens["access_token"]).status == post(rig, first["access_token"]).status == 200
    rig.clock.advance(3000)
    assert client.refresh().status == 200
    assert client.refresh(refresh_token=first["refresh_token"]).json()["error"] == "invalid_grant"
    assert client.refresh().status == 400  # reuse long after: the whole login has ended


def test_C23_a_login_that_is_used_lasts(rig):
    client = rig.login()
    assert client.tokens["expires_in"] == 3600
    for _ in range(12):
        rig.clock.advance(9 * 86400)
        rig.tick()  # refreshes upstream in time
        ended("refresh")
        assert client.refresh().status == 200


def test_C24_trouble_upstream_is_never_the_clients_fault(rig):
    client = registered(rig)
    code = query_of(approve_login(Browser(), client.authorize_url(), "alice", "secret"))["code"]
    rig.forgejo.down()
    assert client.redeem(code).status == 200
    assert client.refresh().status == 200


# -- D. transport


@pytest.mark.parametrize("path", ["/mcp", "/mcp/"])
def test_D25_with_and_without_slash_and_never_a_redirect(rig, token, path):
    answer = http(
        rig,
        "POST",
        rig.url + path,
        json.dumps(PING).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    assert answer.status == 200 and answer.json() == {"jsonrpc": "2.0", "id": 1, "result": {}}


@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/json", "application/*", "text/event-stream", "text/html"]
)
def test_D26_no_accept_header_is_refused(rig, token, accept):
    answer = post(rig, token, Accept=accept)
    assert answer.status == 200 and answer.headers["Content-Type"] in (
        "application/json",
        "text/event-stream",
    )
    assert (
        post(rig, token, {"jsonrpc": "2.0", "method": "notifications/initialized"}, Accept=accept).status
        == 202
    )


@pytest.mark.parametrize(
    "version, status",
    [
        (None, 200),
        ("2025-11-25", 200),
        ("2025-06-18", 200),
        ("2025-03-26", 200),
        ("2024-11-05", 200),
        ("2023-01-01", 400),
        ("latest", 400),
    ],
)
def test_D27_any_supported_version_header_is_tolerated(rig, version, status):
    mcp = rig.session(protocol="2025-06-18")
    assert post(rig, mcp.token, Mcp_Session_Id=mcp.session_id, MCP_Protocol_Version=version).status == status


def test_D28_sessions_survive_restarts_and_a_day_of_rest_and_requests_without_an_id_are_served(rig):
    mcp = rig.session()
    rig.restart()
    assert "alice" in text_of(mcp.call_tool("get_my_user_info"))
    rig.clock.advance(86400)
    rig.tick()
    mcp.oauth.refresh()
    again = McpClient(mcp.url, mcp.oauth.tokens["access_token"], session_id=mcp.session_id)
    assert "alice" in text_of(again.call_tool("get_my_user_info"))
    call = {
        "jsonrpc": "2.0",
        "id": 5,
        "method": "tools/call",
        "params": {"name": "get_my_user_info", "arguments": {}},
    }
    assert "alice" in post(rig, mcp.oauth.tokens["access_token"], call).body.decode()


def test_D28_an_unknown_session_is_404_and_a_new_one_can_be_opened(rig, token):
    answer = post(rig, token, Mcp_Session_Id="unknown")
    assert answer.status == 404 and answer.json()["error"]["code"] == -32001
    assert McpClient(rig.url + "/mcp", token).initialize()


def test_D29_a_get_stream_begins_at_once_and_delete_ends(rig):
    mcp = rig.session()
    stream = mcp.open_stream()
    stream.wait_comment(10)
    assert mcp.delete().status == 204
    assert stream.ended.wait(30)


def test_D30_a_slow_call_streams_soon_with_ids_and_no_buffering(make_rig, tmp_path):
    from rigs.child_control import ChildControl

    with ChildControl(str(tmp_path / "control")) as control:
        rig = make_rig(child=("--control", control.path))
        mcp = rig.session()
        _, stream = mcp.start_request("tools/call", {"name": "get_slow", "arguments": {"key": "k"}}, id=9)
        assert (
            stream.headers["X-Accel-Buffering"] == "no"
            and stream.headers["Content-Type"] == "text/event-stream"
        )
        control.release("k")
        events = [stream.next(20)]
        while "result" not in events[-1].data:
            events.append(stream.next(20))
        assert events[-1].id


def test_D31_403_means_one_thing_only(rig):
    client = rig.login(access="read", scope="forgejo:read")
    call = {
        "jsonrpc": "2.0",
        "id": 5,
        "method": "tools/call",
        "params": {"name": "create_issue", "arguments": {}},
    }
    answer = post(rig, client.tokens["access_token"], call)
    assert answer.status == 403 and 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
    assert 'scope="' in answer.headers["WWW-Authenticate"]
    chosen = rig.login(access="read")  # asked for both, the person chose read only: asking again would loop
    answer = post(rig, chosen.tokens["access_token"], call)
    assert answer.status == 200 and answer.json()["result"]["isError"]


def test_D32_a_modern_probe_never_hangs_and_initialize_still_works(rig, token):
    replay = Replay(rig.url, transcripts()["python_sdk"])
    replay.tokens = {"access_token": token}
    replay.probe()
    replay.open()
    answer = http(
        rig,
        "POST",
        rig.url + "/mcp",
        b'{"jsonrpc":"2.0","id":1,"method":"server/discover","params":{}}',
        {"MCP-Protocol-Version": "2026-07-28", "Content-Type": "application/json"},
    )
    assert answer.status == 401


@pytest.mark.parametrize("wanted", ["2024-10-07", "2099-01-01", "DRAFT-2026-v1"])
def test_D33_an_unknown_version_is_negotiated_down(rig, token, wanted):
    message = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": wanted,
            "capabilities": {},
            "clientInfo": {"name": "x", "version": "1"},
        },
    }
    answer = post(rig, token, message)
    assert answer.status == 200 and answer.json()["result"]["protocolVersion"] == "2025-11-25"


def test_D33_batches_are_for_sessions_of_their_revision(rig):
    old, new = rig.session(protocol="2025-03-26"), rig.session()
    batch = [PING, {**PING, "id": 2}]
    assert {answer["id"] for answer in post(rig, old.token, batch, Mcp_Session_Id=old.session_id).json()} == {
        1,
        2,
    }
    refused = post(rig, new.token, batch, Mcp_Session_Id=new.session_id)
    assert refused.status == 400 and refused.json()["error"]["code"] == -32600


@pytest.mark.parametrize(
    "path",
    [
        "/.well-known/oauth-protected-resource/mcp",
        "/.well-known/oauth-authorization-server",
        "/oauth/register",
        "/oauth/token",
        "/oauth/revoke",
        "/register",
        "/token",
        "/mcp",
    ],
)
def test_D34_browsers_are_let_in_by_cors(rig, path):
    origin = "http://localhost:6274"
    answer = http(
        rig,
        "OPTIONS",
        rig.url + path,
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, mcp-session-id, "
            "mcp-method, x-custom",
        },
    )
    assert answer.status == 204 and answer.headers["Access-Control-Allow-Origin"] in ("*", origin)
    assert "x-custom" in answer.headers["Access-Control-Allow-Headers"]
    refused = http(rig, "POST", rig.url + path, b"{}", {"Origin": origin, "Content-Type": "application/json"})
    assert (
        refused.headers["Access-Control-Allow-Origin"] in ("*", origin)
        and "WWW-Authenticate" in refused.headers["Access-Control-Expose-Headers"]
    )


@pytest.mark.parametrize(
    "origin, status",
    [
        (None, 200),
        ("https://claude.ai", 200),
        ("https://claude.com", 200),
        ("https://chatgpt.com", 200),
        ("http://localhost:6274", 200),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_D35_origins_of_the_clients_may_call(rig, token, origin, status):
    assert post(rig, token, Origin=origin).status == status


@pytest.mark.parametrize(
    "agent",
    [None, "python-httpx/0.28.1", "Claude-User", "openai-mcp/1.0.0", "Ruby", "curl/8", "bot spider crawler"],
)
def test_D36_no_user_agent_is_refused(rig, token, agent):
    assert post(rig, token, User_Agent=agent).status == 200


def test_D36_the_docs_say_what_a_firewall_must_let_through():
    text = (Path(__file__).resolve().parent.parent.parent / "docs" / "install.md").read_text()
    assert all(path in text for path in ("/mcp", "/.well-known", "/register", "/token"))
