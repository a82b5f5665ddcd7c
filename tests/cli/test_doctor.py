"""doctor: what real clients do at a public URL, and what each crippled answer would break."""

import json
import sqlite3
from dataclasses import replace

import pytest

import fjmcp_broker
from rigs.broker_process import Installation, run_program
from rigs.browser import Browser, approve_login
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import OAuthClient
from rigs.proxy import Proxy
from rigs.rig import CHILD


class Cripple(Proxy):
    """A proxy before a broker that spoils what `spoil(method, path, answer)` wants.

    Answer has status, headers (a dict) and body.
    """

    def __init__(self):
        super().__init__()
        self.spoil, self.seen = lambda method, path, answer: None, []

    def pass_on(self, method, path, request, answer):
        self.seen.append((method, path, request[1]))
        spoiled = {**answer, "headers": dict(answer["headers"])}
        self.spoil(method, path, spoiled)
        answer.update(spoiled, headers=list(spoiled["headers"].items()))


@pytest.fixture
def broker(make_installation):
    installation = make_installation()
    installation.start()
    return installation


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A proxy that can be crippled, before a broker whose public URL it is."""
    forgejo = FakeForgejo().start()
    with Cripple() as proxy:
        installation = Installation(tmp_path_factory.mktemp("doctor"), forgejo, CHILD)
        installation.write(**{**installation.settings, "public_url": proxy.url})
        proxy.target = installation.socket.getsockname()[1]
        installation.start()
        yield proxy
        installation.close()
    forgejo.stop()


def findings(proxy, spoil=lambda method, path, answer: None, register=True):
    """What examine() finds behind the proxy, spoiled like that."""
    proxy.spoil = spoil
    return list(fjmcp_broker.examine(proxy.url, register))


def failures(found):
    return [finding for finding in found if finding[0] == "fail"]


# -- nothing wrong


def test_all_is_well_at_a_real_broker_and_no_client_is_left_behind(broker):
    done = run_program("doctor", broker.url + "/mcp")
    assert done.returncode == 0 and "fail" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("ok   ") > 40
    assert [record["name"] for record in broker.records("client_registered")] == ["fjmcp-broker doctor"]
    with sqlite3.connect(broker.folder / "broker.db") as db:
        assert db.execute("SELECT count(*) FROM clients").fetchone() == (0,)
        assert (
            db.execute("SELECT count(*) FROM logins").fetchone()
            == db.execute("SELECT count(*) FROM grants").fetchone()
            == (0,)
        )
    db.close()


def test_check_tries_the_same_but_registers_nobody(broker):
    assert broker.command("check").returncode == 0
    assert not broker.records("client_registered")


def test_it_needs_no_configuration_and_says_what_is_wrong_with_its_word(tmp_path):
    for words, expected in (
        (("doctor",), "takes one URL"),
        (("doctor", "mcp.example.org"), "must be a URL"),
        (("doctor", "http://x.org"), "must be https"),
    ):
        done = run_program(*words, cwd=tmp_path)
        assert (
            "Traceback" not in done.stderr
            and expected in done.stdout + done.stderr
            and done.returncode in (1, 2)
        )
    done = run_program("doctor", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 1 and "does not answer" in done.stdout


def test_an_honest_proxy_is_found_well(shared):
    assert not failures(findings(shared))[:-1]  # but for its buffering, which is the last


def test_https_is_wanted_from_end_to_end(make_installation, monkeypatch):
    installation = make_installation()
    installation.write(**{**installation.settings, "public_url": "https://mcp.example.org"})
    installation.start()
    real, plain = fjmcp_broker.fetch, []

    def without_dns(method, url, **arguments):
        if url.startswith("http://mcp.example.org"):
            plain.append(url)
            if len(plain) > 1:
                raise fjmcp_broker.FetchFailed("refused")
        return real(method, installation.url + url.partition("mcp.example.org")[2], **arguments)

    monkeypatch.setattr(fjmcp_broker, "fetch", without_dns)
    found = [finding for finding in fjmcp_broker.examine("https://mcp.example.org") if finding[0] != "ok"]
    assert [(level, "over http" in text) for level, text, _ in found] == [("warn", True)]
    assert (
        all(finding[0] == "ok" for finding in fjmcp_broker.examine("https://mcp.example.org"))
        and len(plain) == 2
    )
    done = run_program("doctor", installation.url.replace("http:", "https:"))
    assert (
        done.returncode == 1
        and "does not answer: it speaks no TLS" in done.stdout
        and "its certificate" in done.stdout
    )


def test_nobody_logs_in_through_the_client_as_which_it_asks(broker):
    client = OAuthClient(broker.url, redirect_uri="http://127.0.0.1:33418/")
    client.discover()
    client.client_id = fjmcp_broker.TRIAL_CLIENT
    url = client.authorize_url(state="s")
    with pytest.raises(Exception, match="not registered here"):
        approve_login(Browser(), url, "alice", "secret")
    assert "access_denied" in approve_login(Browser(), url, "alice", "secret", decision="deny")
    assert not broker.records("consent_given") and broker.records("refused")[0]["reason"] == "unknown_client"


# -- crippled


def changed(method, path, **change):
    """Spoil one request's answer."""

    def spoil(its_method, its_path, answer):
        if (its_method, its_path.partition("?")[0]) == (method, path):
            for name, value in change.items():
                answer[name] = value(answer[name]) if callable(value) else value

    return spoil


def without(name):
    return lambda headers: {key: value for key, value in headers.items() if key.lower() != name}


def with_header(name, value):
    return lambda headers: {**without(name)(headers), name: value}


HTML = {"status": 200, "headers": with_header("content-type", "text/html"), "body": b"<p>Just a moment</p>"}


@pytest.mark.parametrize(
    "spoil, expected, fix",
    [
        (
            changed("GET", "/.well-known/oauth-protected-resource/mcp", status=404),
            "status is 404, not 200. Needed by Claude, VS Code",
            "pass this on",
        ),
        (
            changed("GET", "/.well-known/oauth-protected-resource", status=302),
            "status is 302",
            "serve this path directly",
        ),
        (
            changed("GET", "/.well-known/openid-configuration", **HTML),
            "status is 200, not 404. Needed by Claude.ai, ChatGPT",
            "pass this on",
        ),
        (changed("GET", "/.well-known/oauth-authorization-server", **HTML), "no JSON object", "pass this on"),
        (changed("POST", "/mcp", status=403), "status is 403, not 401. Needed by every client", "bot rules"),
        (
            changed("POST", "/mcp", headers=without("www-authenticate")),
            "www-authenticate is None",
            "pass POST on",
        ),
        (changed("HEAD", "/mcp", status=405), "status is 405, not 401. Needed by Gemini CLI", "pass HEAD on"),
        (changed("DELETE", "/mcp", status=501), "status is 501, not 401. Needed by SDKs", "pass DELETE on"),
        (
            changed("GET", "/mcp", status=504),
            "status is 504, not 401. Needed by clients that open a stream",
            "start the broker",
        ),
        (
            changed("POST", "/mcp/", status=308),
            "status is 308, not 401. Needed by clients given the URL with a slash",
            "serve this path directly",
        ),
        (
            changed("OPTIONS", "/mcp", status=401),
            "status is 401, not 204. Needed by clients in a browser",
            "pass OPTIONS on",
        ),
        (
            changed("OPTIONS", "/oauth/token", headers=without("access-control-allow-origin")),
            "access-control-allow-origin is None",
            "pass OPTIONS on",
        ),
        (
            changed("POST", "/oauth/register", status=429),
            "status is 429, not 201. Needed by Claude.ai, Cursor",
            "bot rules",
        ),
        (
            changed(
                "POST",
                "/oauth/register",
                body=lambda body: json.dumps({**json.loads(body), "scope": None}).encode(),
            ),
            "scope is None",
            "allowed_redirect",
        ),
        (
            changed("POST", "/oauth/register", body=lambda body: body.replace(b"cursor://", b"https://")),
            "redirect_uris is",
            "allowed_redirect_schemes",
        ),
        (
            changed(
                "GET",
                "/oauth/authorize",
                headers=with_header("content-security-policy", "frame-ancestors 'none'; form-action 'self'"),
            ),
            "content-security-policy is",
            "leave answers alone",
        ),
        (
            changed(
                "GET",
                "/oauth/authorize",
                headers=lambda headers: {
                    **headers,
                    **(
                        {"Location": "http://localhost:41999/callback?error=invalid_target"}
                        if "Location" in headers
                        else {}
                    ),
                },
            ),
            "location is",
            "upgrade the broker",
        ),
        (
            changed("POST", "/token", **HTML),
            "status is 200, not 401. Needed by clients that ignore metadata",
            "pass this on",
        ),
        (
            changed("GET", "/authorize", status=421),
            "status is 421, not 400. Needed by people whose client was forgotten",
            "Host header",
        ),
        (changed("GET", "/healthz", status=200), "holds streams back", "buffering off"),
    ],
)
def test_what_a_proxy_spoils_is_named_with_who_needs_it_and_how_to_mend_it(shared, spoil, expected, fix):
    found = [(text, mend) for _, text, mend in failures(findings(shared, spoil)) if expected in text]
    assert found, failures(findings(shared, spoil))
    assert fix in found[0][1]


def test_every_probe_fails_where_nothing_but_a_proxy_answers(shared):
    def broken(method, path, answer):
        answer.update(status=502, headers={"Content-Type": "text/html"}, body=b"Bad gateway")

    found = findings(shared, broken)
    assert len(failures(found)) == len(found) == len(probes(shared.url)) - len(LOGIN) + 1  # and the stream
    assert all("start the broker" in mend for _, _, mend in found[:-1])


LOGIN = list(fjmcp_broker.login_probes("https://mcp.example.org", "client"))


def probes(url):
    """Every probe, in the order in which examine() tries them."""
    return [
        *fjmcp_broker.discovery_probes(url),
        *fjmcp_broker.endpoint_probes(url),
        *fjmcp_broker.browser_probes(),
        *fjmcp_broker.refusal_probes(),
        fjmcp_broker.registration_probe(),
        *fjmcp_broker.login_probes(url, "client"),
    ]


def rules(url):
    """(number of the probe, where, name, rule) of every single expectation in the tables."""
    for number, probe in enumerate(probes(url)):
        for name, rule in probe.want.get("json", {}).items():
            yield number, "json", name, rule
        for name, rule in probe.want.items():
            if name not in ("status", "json"):
                yield number, "headers", name, rule


def spoiled(answer, where, name, rule):
    """The answer with one expectation broken."""
    plain, unwanted = name.removeprefix("!"), name.startswith("!")
    if where == "headers":
        value = answer.headers.get(plain, "") + rule[0] if unwanted else "x" if rule is None else "spoiled"
        return replace(answer, headers={**answer.headers, plain: value})
    document = answer.json()
    document[plain] = (
        [*document.get(plain, ()), *rule]
        if unwanted
        else ["spoiled"]
        if isinstance(rule, list)
        else "spoiled"
    )
    return replace(answer, body=json.dumps(document).encode())


def test_every_single_expectation_of_the_table_can_fail_and_names_itself(broker, monkeypatch):
    real, answers = fjmcp_broker.fetch, {}

    def remembered(method, url, **arguments):
        if "on_data" in arguments:  # the stream: half a second that is of no interest here
            return None
        key = (method, url, str(arguments))
        if key not in answers:
            answers[key] = real(method, url, **arguments)
        spoil = plan.get(len(calls))
        calls.append(key)
        return spoil(answers[key]) if spoil else answers[key]

    monkeypatch.setattr(fjmcp_broker, "fetch", remembered)
    for number, where, name, rule in rules(broker.url):
        plan, calls = {number: lambda answer: spoiled(answer, where, name, rule)}, []
        found = failures(fjmcp_broker.examine(broker.url))[:-1]
        assert len(found) == 1 and f"{name.removeprefix('!')} is " in found[0][1], (
            probes(broker.url)[number].request,
            name,
            found,
        )
    assert len(broker.records("client_registered")) == 1
