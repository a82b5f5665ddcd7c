"""Nothing secret in any output.

A run of the real program through its flows and errors, every secret of it known, every output searched.
"""

import base64
import binascii
import http.client
import http.server
import re
import socket
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest

from fjmcp_broker import Keyring, Store
from rigs.broker_process import Installation
from rigs.browser import Browser, approve_login
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import HttpError, McpClient, OAuthClient, RpcError
from rigs.proxy import Proxy
from rigs.rig import CHILD, text_of

MARK = "CANARY"
ARGUMENT = f"{MARK}-argument-of-a-tool"
PASSWORD = f"{MARK}-password"
# A child that tells its token on stderr, as a careless program would in its debug output.
CARELESS = ["/bin/sh", "-c", 'echo "starting with $FORGEJO_ACCESS_TOKEN" >&2; exec "$@"', "child", *CHILD]


@dataclass
class Exchange:
    """One request and its answer, as text."""

    method: str
    path: str
    request: str
    answer: str


class Tap(Proxy):
    """A proxy before the broker that keeps every exchange."""

    def __init__(self):
        super().__init__()
        self.exchanges = []

    def pass_on(self, method, path, request, answer):
        headers, body = request
        self.exchanges.append(
            Exchange(
                method,
                path,
                f"{path}\n{headers}\n{body.decode('utf-8', 'replace')}",
                "\n".join(f"{name}: {value}" for name, value in answer["headers"])
                + "\n\n"
                + answer["body"].decode("utf-8", "replace"),
            )
        )


class Run:
    """The run: what was said, what was written, and every secret in it."""

    def __init__(self, folder, log_format):
        self.forgejo, self.outputs, self.secrets = FakeForgejo(access_lifetime=8).start(), {}, {}
        self.forgejo.add_user("carol", PASSWORD, full_name="Carola Full Name")
        with Tap() as self.tap, socket.create_server(("127.0.0.1", 0)) as free:
            metrics = "127.0.0.1:%d" % free.getsockname()[1]
            free.close()
            self.installation = Installation(
                folder,
                self.forgejo,
                CARELESS,
                metrics_listen=metrics,
                debug="true",
                log_format=log_format,
                request_timeout="2s",
            )
            app = self.forgejo.add_app([self.tap.url + "/oauth/callback"])
            self.installation.write(
                **{
                    **self.installation.settings,
                    "public_url": self.tap.url,
                    "forgejo_oauth_client_id": app.client_id,
                    "forgejo_oauth_client_secret": app.client_secret,
                }
            )
            self.tap.target = self.installation.socket.getsockname()[1]
            self.secrets["forgejo client secret"] = app.client_secret
            try:
                self.installation.start()
                self.flows()
                self.errors()
                self.commands(metrics)
                assert self.installation.broker.stop() == 0
            finally:
                self.installation.close()
                self.forgejo.stop()
        self.collect()
        self.outputs["log"] = self.installation.log_path.read_text()
        self.files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def client(self, method="client_secret_post"):
        client = OAuthClient(self.tap.url, name="Canary", auth_method=method)
        client.discover()
        client.register()
        return client

    def flows(self):
        self.clients = [
            self.client(method) for method in ("none", "client_secret_post", "client_secret_basic")
        ]
        for client in self.clients:
            client.login(None, "carol", PASSWORD, "full")
            mcp = McpClient(self.tap.url + "/mcp", client.tokens["access_token"])
            mcp.initialize()
            assert ARGUMENT in text_of(mcp.call_tool("get_echo", text=ARGUMENT))
            assert '"login": "carol"' in text_of(mcp.call_tool("get_my_user_info"))
            assert client.refresh().status == 200
        denied = self.client("none")
        callback = approve_login(
            Browser(),
            denied.authorize_url(),
            "carol",
            PASSWORD,
            decision="deny",
            redirect_uri=denied.redirect_uri,
        )
        assert "access_denied" in callback
        self.clients[1].revoke(self.clients[1].tokens["access_token"])

    def errors(self):
        client = self.clients[2]
        url = client.authorize_url()
        code = dict(
            parse_qsl(
                urlsplit(
                    approve_login(Browser(), url, "carol", PASSWORD, redirect_uri=client.redirect_uri)
                ).query
            )
        )["code"]
        assert client.redeem(code, code_verifier=f"{MARK}-verifier-that-is-wrong-{'x' * 30}").status == 400
        assert client.redeem(code).status == 200
        assert client.redeem(code).status == 400  # a replay
        assert client.refresh(refresh_token=f"fjr_{MARK}-unknown").status == 400
        secret, client.client_secret = client.client_secret, f"{MARK}-wrong-secret"
        assert client.refresh().status == 401
        client.client_secret, client = secret, self.clients[0]  # the replay has ended the other's login
        for method, path, headers, body in (
            ("POST", "/mcp", {"Authorization": f"Bearer {MARK}-bearer"}, "{}"),
            ("GET", f"/mcp?access_token={MARK}-query", {}, None),
            ("GET", "/nothing-here", {"Cookie": f"x={MARK}-cookie"}, None),
            ("POST", "/oauth/token", {}, f"{MARK}-body"),
            ("GET", f"/oauth/callback?state={MARK}-state&code={MARK}-code", {}, None),
            (
                "POST",
                "/oauth/register",
                {"Content-Type": "application/json"},
                f'{{"redirect_uris": "{MARK}-uri"',
            ),
            (
                "POST",
                "/oauth/consent",
                {"Content-Type": "application/x-www-form-urlencoded"},
                f"csrf={MARK}-csrf",
            ),
            (
                "POST",
                "/oauth/revoke",
                {"Content-Type": "application/x-www-form-urlencoded"},
                f"token={MARK}-token&client_id=x",
            ),
            (
                "POST",
                "/mcp",
                {"Authorization": f"Bearer {client.tokens['access_token']}"},
                f'{{"jsonrpc": {MARK}',
            ),
        ):
            connection = http.client.HTTPConnection(urlsplit(self.tap.url).netloc)
            connection.request(method, path, body, headers)
            assert connection.getresponse().status >= 400
            connection.close()
        mcp = McpClient(self.tap.url + "/mcp", client.tokens["access_token"])
        mcp.initialize()
        for tool, arguments in (
            ("get_error", {"why": ARGUMENT}),
            ("crash", {"why": ARGUMENT}),
            ("silent", {"why": ARGUMENT}),
            (ARGUMENT, {}),
        ):
            with pytest.raises((RpcError, HttpError)):
                mcp.call_tool(tool, **arguments)
        with pytest.raises((RpcError, HttpError)):
            mcp.request("no/method", {"x": ARGUMENT})
        mcp.call_tool("get_echo", text=ARGUMENT)
        self.forgejo.requests.wait_for(lambda request: request.form.get("grant_type") == "refresh_token")

    def commands(self, metrics):
        copy = str(self.installation.folder / "copy.db")
        for words in (
            ("users",),
            ("clients",),
            ("grants",),
            ("sessions",),
            ("users", "--json"),
            ("clients", "--json"),
            ("grants", "--json"),
            ("sessions", "--json"),
            ("check",),
            ("doctor", self.tap.url),
            ("backup", copy),
            ("rotate-key",),
            ("revoke", "--grant", "1"),
            ("--help",),
            ("users", "--forgejo-oauth-client-secret", ""),
        ):
            done = self.installation.command(*words)
            assert "Traceback" not in done.stderr and done.returncode == (
                2 if words[-1] == "" else words[0] in ("check", "doctor")
            ), done.stderr
            self.outputs[" ".join(words)] = done.stdout + done.stderr
        connection = http.client.HTTPConnection(metrics)
        connection.request("GET", "/metrics")
        self.outputs["metrics"] = connection.getresponse().read().decode()
        connection.close()

    def collect(self):
        """Every secret of the run, by what it is."""
        found = self.secrets
        for number, exchange in enumerate(self.tap.exchanges):
            for text in (exchange.request, exchange.answer):
                both = unquote(text)
                for name, pattern in (
                    ("broker token", r"fj[arcs]_[A-Za-z0-9_-]{30,}"),
                    ("cookie", r"(?im)^set-cookie: [^=\n]+=([^;\n]{16,})"),
                    ("form value", r'<input type="hidden" name="[a-z_]+" value="([^"]{16,})"'),
                    ("verifier", r"code_verifier=([^&\s]{43,})"),
                    ("session", r"(?im)^mcp-session-id: (\S+)"),
                    ("forgejo code or state", r"(?:code|state)=([^&\s\"]{16,})"),
                ):
                    found.update(
                        {
                            f"{name} {number}.{i}": value
                            for i, value in enumerate(re.findall(pattern, both))
                            if MARK not in value
                        }
                    )
        for number, request in enumerate(self.forgejo.requests):
            for name in ("code", "refresh_token", "client_secret", "code_verifier"):
                if len(request.form.get(name, "")) > 15:
                    found[f"upstream {name} {number}"] = request.form[name]
            bearer = request.headers.get("authorization", "").partition(" ")
            if bearer[0].lower() in ("bearer", "token") and bearer[2]:
                found[f"upstream access {number}"] = bearer[2]
        for number, line in enumerate((self.installation.folder / "key").read_text().split()):
            found[f"sealing key {number}"] = line
        keys = Keyring.parse((self.installation.folder / "key").read_text())
        store = Store(str(self.installation.folder / "broker.db"), keys)
        for row in store.boxes():
            if row.purpose == "upstream":
                for name, value in keys.unseal(row.purpose, row.owner, row.box).items():
                    found[f"upstream {name} of {row.owner}"] = value
        store.close()


@pytest.fixture(scope="module", params=["json", "text"])
def shared(request, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("canary"), request.param)


def kinds(run):
    return {name.rstrip("0123456789.").strip() for name in run.secrets}


def test_L01_the_run_met_every_kind_of_secret(shared):
    assert {
        "forgejo client secret",
        "broker token",
        "cookie",
        "form value",
        "verifier",
        "session",
        "forgejo code or state",
        "upstream code",
        "upstream refresh_token",
        "upstream access",
        "upstream client_secret",
        "sealing key",
    } <= kinds(shared)
    prefixes = {value[:4] for name, value in shared.secrets.items() if name.startswith("broker token")}
    assert prefixes == {"fja_", "fjr_", "fjc_", "fjs_"} and len(set(shared.secrets.values())) > 60


def test_L01_L04_no_secret_is_in_any_log_listing_metric_or_message_not_even_with_debug(shared):
    for output, text in shared.outputs.items():
        assert MARK not in text, (output, text[max(0, text.index(MARK) - 200) :][:400])
        leaked = [
            name for name, value in shared.secrets.items() if value in text or quote(value, safe="") in text
        ]
        assert not leaked, (output, leaked)
    log = shared.outputs["log"]
    assert "child_stderr" in log and "starting with [token]" in log, (
        "the careless child was heard, its token was not"
    )


def test_G03_no_usable_secret_is_in_the_database_its_journal_or_a_backup(shared):
    for file, data in shared.files.items():
        allowed = {
            "broker.toml": ("forgejo client secret", "upstream client_secret"),
            "key": ("sealing key",),
        }.get(file, ())
        for name, value in shared.secrets.items():
            forms = {value.encode()}
            if len(value) >= 40:
                with_padding = value[4:] if value.startswith("fj") else value
                try:
                    raw = base64.b64decode(
                        with_padding + "=" * (-len(with_padding) % 4), altchars=b"-_", validate=True
                    )
                    forms |= {raw, raw.hex().encode(), binascii.hexlify(raw).upper()}
                except ValueError:
                    pass
            assert name.startswith(allowed or "-") or not any(form in data for form in forms), (file, name)
        assert MARK.encode() not in data, file


def test_L01_a_secret_is_in_the_answer_that_issues_it_and_in_no_other(shared):
    issuing = {"fja_": ("/token",), "fjr_": ("/token",), "fjs_": ("/register",), "fjc_": ("/callback",)}
    for name, value in shared.secrets.items():
        answers = [exchange for exchange in shared.tap.exchanges if value in unquote(exchange.answer)]
        paths = {exchange.path.partition("?")[0] for exchange in answers}
        if value[:4] in issuing:
            assert len(answers) == 1 and paths.pop().endswith(issuing[value[:4]]), name
        elif name.startswith("form value"):
            assert paths <= {"/oauth/authorize", "/oauth/consent"}, (name, paths)
        elif (
            name.startswith("upstream")
            and "code" not in name.split()
            and "state" not in name
            or name.startswith(("sealing", "forgejo client"))
        ):
            assert not answers, (name, paths)


def test_L01_no_error_or_page_repeats_what_it_was_given(shared):
    for exchange in shared.tap.exchanges:
        if MARK in exchange.request and MARK in exchange.answer:
            assert exchange.path.startswith("/mcp") and ARGUMENT in exchange.answer, (
                exchange.path,
                exchange.answer,
            )


def test_L05_a_full_name_and_an_address_of_mail_are_in_no_log(shared):
    assert "Full Name" not in shared.outputs["log"] and "@" not in shared.outputs["log"].replace("@@", "")
    assert "carol" in shared.outputs["log"], "logins are, at a login"
