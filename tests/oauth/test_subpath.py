"""Forgejo below a path (https://host/git), with a port, at an IPv6 address.

The whole flow, from discovery to tools.
"""

import pytest

import fjmcp_broker
from rigs.browser import Browser, open_account
from rigs.busy_clients import same
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import json_of, who


@pytest.fixture
def engine():
    """What is tested here is the same on each."""
    return "sqlite"


PARTS = {
    "public_url": "https://mcp.example.org",
    "forgejo_oauth_client_id": "i",
    "forgejo_oauth_client_secret": "s",
}


@pytest.fixture
def below(make_rig):
    """A Rig whose Forgejo is below /git."""
    return make_rig(forgejo_args={"path": "/git"})


def test_login_call_refresh_suspension_and_account_page_work_below_a_path(below):
    rig = below
    mcp = rig.session()
    assert who(mcp) == "alice" and rig.forgejo.url.endswith("/git")
    rig.clock.advance(3590)
    assert mcp.oauth.refresh().status == 200
    assert who(same(mcp, mcp.oauth.tokens["access_token"])) == "alice"
    assert rig.log.named("upstream_refreshed")
    user = rig.broker.store.user("1001")
    assert (
        user.account_created is not None and user.upstream_scope
    )  # /api/v1/user and introspection were found
    _, page = open_account(rig, browser=Browser())
    assert "You are alice" in page.words
    rig.forgejo.suspend("alice")
    assert rig.broker.upstream.examine("1001") == "suspended"
    beside = [request for request in rig.forgejo.requests[:] if request.status == 404]
    assert not beside


def test_the_child_is_told_the_path_too(below):
    mcp = below.session()
    assert json_of(mcp.call_tool("get_env"))["FORGEJO_URL"] == below.forgejo.url


def test_a_real_broker_and_its_check_work_below_a_path(make_installation):
    place = make_installation(forgejo_args={"path": "/git"})
    checked = place.command("check")
    assert "forgejo_url: " + place.forgejo.url + " answers" in checked.stdout, checked.stdout
    assert "calls itself" not in checked.stdout
    place.start()
    client = OAuthClient(place.url)
    client.login(None, "alice", "secret")
    mcp = McpClient(client.mcp_url, client.tokens["access_token"])
    mcp.initialize()
    assert who(mcp) == "alice"


def test_the_internal_address_may_have_no_path_where_the_public_one_has():
    inner = {"forgejo_url": "https://host.example/git", "forgejo_internal_url": "http://127.0.0.1:3000"}
    settings = fjmcp_broker.load_settings({**PARTS, **inner}, {})
    forgejo = fjmcp_broker.Forgejo(settings, fjmcp_broker.SteadyClock(fjmcp_broker.Clock()))
    assert forgejo.authorize_url("s", "c").startswith("https://host.example/git/login/oauth/authorize?")
    assert forgejo._token == "http://127.0.0.1:3000/login/oauth/access_token"
    assert forgejo._api == "http://127.0.0.1:3000/api/v1"


@pytest.mark.parametrize(
    "url",
    [
        "https://host.example/git",
        "https://host.example:3000/git",
        "https://[2001:db8::1]/git",
        "https://[::1]:3000",
    ],
)
def test_every_endpoint_stands_below_the_path_and_keeps_port_and_brackets(url):
    settings = fjmcp_broker.load_settings({**PARTS, "forgejo_url": url}, {})
    forgejo = fjmcp_broker.Forgejo(settings, fjmcp_broker.SteadyClock(fjmcp_broker.Clock()))
    assert settings.forgejo_url == url
    assert forgejo.authorize_url("s", "c").startswith(url + "/login/oauth/authorize?")
    assert forgejo._token == url + "/login/oauth/access_token"
    assert forgejo._userinfo == url + "/login/oauth/userinfo"
    assert forgejo._introspection == url + "/login/oauth/introspect"
    assert forgejo._api == url + "/api/v1"


def test_the_whole_flow_works_at_an_IPv6_address(make_rig):
    rig = make_rig(forgejo_args={"host": "::1", "path": "/git"})
    assert rig.forgejo.url.startswith("http://[::1]:")
    mcp = rig.session()
    assert who(mcp) == "alice"
    rig.clock.advance(3590)
    rig.broker.upstream.refresh("1001")  # unless the reaper was first
    assert rig.log.wait("upstream_refreshed") and who(same(mcp)) == "alice"
