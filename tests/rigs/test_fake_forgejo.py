"""The fake Forgejo answers as the real one does, oddities and failures included."""

import base64
import hashlib
import hmac
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from rigs import fake_forgejo
from rigs.fake_forgejo import (
    MISSING,
    FakeForgejo,
    cut_body,
    hang,
    html,
    huge_json,
    json_override,
    lose_response,
    oauth_error,
    redirect,
    run,
    slow_until,
    status,
    truncated_json,
    wrong_content_type,
)

CALLBACK = "http://127.0.0.1:8080/oauth/callback"
SCOPE = "openid profile email groups read:user write:repository write:issue"
VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).decode().rstrip("=")
TOKEN_PATH = "/login/oauth/access_token"


class Clock:
    def __init__(self, now=1_800_000_000):
        self.now = now

    def __call__(self):
        return self.now


class Answer:
    def __init__(self, raw):
        self.status, self.headers, self.body = raw.status, raw.headers, raw.read()

    @property
    def text(self):
        return self.body.decode()

    def json(self):
        assert self.headers["Content-Type"] == "application/json;charset=utf-8"
        return json.loads(self.body)

    def sent_to(self):
        """Where a redirect leads and with which query."""
        assert self.status == 303
        parts = urlsplit(self.headers["Location"])
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return self.headers["Location"].partition("?")[0], query


def call(forgejo, method, path, *, form=None, as_json=None, token=None, headers=(), scheme="Bearer"):
    headers = dict(headers)
    body = None
    if form is not None:
        body, headers["Content-Type"] = urlencode(form), "application/x-www-form-urlencoded"
    if as_json is not None:
        body, headers["Content-Type"] = json.dumps(as_json), "application/json"
    if token is not None:
        headers["Authorization"] = f"{scheme} {token}"
    connection = http.client.HTTPConnection("127.0.0.1", forgejo.port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def basic(name, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


class Browser:
    """Keeps cookies, follows nothing by itself."""

    def __init__(self, forgejo):
        self.forgejo, self.cookies = forgejo, {}

    def open(self, method, path, form=None, headers=()):
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        sent = {**dict(headers), "Cookie": cookie} if cookie else dict(headers)
        answer = call(self.forgejo, method, path, form=form, headers=sent)
        for line in answer.headers.get_all("Set-Cookie") or ():
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    def get(self, path):
        return self.open("GET", path)

    def post(self, path, form, headers=()):
        return self.open("POST", path, form, headers)

    def sign_in(self, login="alice", password="secret"):
        return self.post("/user/login", {"user_name": login, "password": password})

    def decide(self, page, granted="true", headers=(), **changes):
        found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page.text)
        fields = {name: unescape(value) for name, value in found}
        return self.post("/login/oauth/grant", {**fields, "granted": granted, **changes}, headers)


def authorize_path(app, **changes):
    asked = {
        "response_type": "code",
        "client_id": app.client_id,
        "redirect_uri": CALLBACK,
        "state": "st",
        "scope": SCOPE,
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        **changes,
    }
    return "/login/oauth/authorize?" + urlencode(
        {name: value for name, value in asked.items() if value is not None}
    )


def get_code(forgejo, app, login="alice", **asked):
    """A code, by sign-in and consent (or without it, where Forgejo asks none)."""
    browser = Browser(forgejo)
    browser.sign_in(login)
    answer = browser.get(authorize_path(app, **asked))
    if answer.status == 200:
        answer = browser.decide(answer)
    return answer.sent_to()[1]["code"]


def exchange(forgejo, app, code, /, **changes):
    form = {
        "grant_type": "authorization_code",
        "client_id": app.client_id,
        "client_secret": app.client_secret,
        "code": code,
        "redirect_uri": CALLBACK,
        "code_verifier": VERIFIER,
        **changes,
    }
    return call(forgejo, "POST", TOKEN_PATH, form={k: v for k, v in form.items() if v is not None})


def refresh(forgejo, app, token, /, **changes):
    form = {
        "grant_type": "refresh_token",
        "client_id": app.client_id,
        "client_secret": app.client_secret,
        "refresh_token": token,
        **changes,
    }
    return call(forgejo, "POST", TOKEN_PATH, form=form)


def log_in(forgejo, app, login="alice", **asked):
    answer = exchange(forgejo, app, get_code(forgejo, app, login, **asked))
    assert answer.status == 200
    return answer.json()


def refused(answer, error, description):
    assert answer.status == 400
    assert answer.json() == {"error": error, "error_description": description}


def forbidden_scope(answer, names):
    assert answer.status == 403
    assert answer.json()["message"] == f"token does not have at least one of required scope(s): [{names}]"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def start(clock):
    """Starts servers with the test's clock and stops them at the end."""
    started = []

    def make(**options):
        started.append(FakeForgejo(clock=clock, **options))
        return started[-1].start()

    yield make
    for forgejo in started:
        forgejo.stop()
        assert not forgejo._threads and not forgejo._connections


@pytest.fixture
def forgejo(start):
    return start()


@pytest.fixture
def app(forgejo):
    return forgejo.add_app([CALLBACK])


# ---- Discovery
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", [True, False])
def test_discovery_names_every_endpoint_and_the_issuer_with_or_without_slash(start, slash):
    forgejo = start(issuer_slash=slash)
    found = call(forgejo, "GET", "/.well-known/openid-configuration").json()
    assert found["issuer"] == forgejo.url + "/" * slash
    assert found["token_endpoint"] == forgejo.url + TOKEN_PATH
    assert found["code_challenge_methods_supported"] == ["plain", "S256"]
    assert "revocation_endpoint" not in found and "token_endpoint_auth_methods_supported" not in found
    assert call(forgejo, "GET", "/login/oauth/keys").json()["keys"][0]["alg"] == "HS256"


def test_there_is_no_rfc_8414_document_no_registration_and_no_revocation(forgejo):
    for path in ("/.well-known/oauth-authorization-server", "/login/oauth/register", "/login/oauth/revoke"):
        assert call(forgejo, "GET", path).status == 404


# ---- Sign-in and authorize
# ------------------------------------------------------------------------------------------


def test_the_whole_login_works_from_sign_in_over_consent_to_the_api(forgejo, app):
    browser = Browser(forgejo)
    path = authorize_path(app)
    assert browser.get(path).headers["Location"] == "/user/login"
    assert "alice" in browser.get("/user/login").text
    assert browser.sign_in().headers["Location"] == path
    page = browser.get(path)
    assert page.status == 200 and "broker" in page.text
    where, query = browser.decide(page).sent_to()
    assert where == CALLBACK and query["state"] == "st" and query["code"].startswith("gta_")
    tokens = exchange(forgejo, app, query["code"]).json()
    assert tokens["token_type"] == "bearer" and tokens["expires_in"] == 3600 and "scope" not in tokens
    assert tokens["access_token"].count(".") == 2
    assert call(forgejo, "GET", "/api/v1/user", token=tokens["access_token"]).json()["login"] == "alice"


def test_a_wrong_password_shows_the_login_page_again_and_signs_nobody_in(forgejo, app):
    browser = Browser(forgejo)
    answer = browser.sign_in(password="wrong")
    assert answer.status == 200 and "incorrect" in answer.text
    assert browser.get(authorize_path(app)).headers["Location"] == "/user/login"


def test_login_returns_only_to_paths_of_its_own(forgejo):
    for target in ("//evil.example/", "https://evil.example/", "/\\evil.example"):
        browser = Browser(forgejo)
        browser.cookies["redirect_to"] = target.replace("/", "%2F")
        assert browser.sign_in().headers["Location"] == "/"


def test_a_confidential_client_with_a_grant_gets_a_code_without_consent(forgejo, app):
    browser = Browser(forgejo)
    browser.sign_in()
    browser.decide(browser.get(authorize_path(app)))
    where, query = browser.get(authorize_path(app, state="second")).sent_to()
    assert where == CALLBACK and query["state"] == "second" and "code" in query


def test_a_public_client_is_asked_for_consent_every_time(forgejo):
    app = forgejo.add_app([CALLBACK], confidential=False)
    browser = Browser(forgejo)
    browser.sign_in()
    assert "code" in browser.decide(browser.get(authorize_path(app))).sent_to()[1]
    assert browser.get(authorize_path(app)).status == 200


def test_a_refused_consent_comes_back_as_access_denied_and_makes_no_grant(forgejo, app):
    browser = Browser(forgejo)
    browser.sign_in()
    where, query = browser.decide(browser.get(authorize_path(app)), granted="false").sent_to()
    assert where == CALLBACK
    assert query == {"error": "access_denied", "error_description": "the request is denied", "state": "st"}
    assert forgejo.grant_of("alice", app.client_id) is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "other"},
        {"client_id": "other"},
        {"redirect_uri": "https://evil.example/"},
    ],
)
def test_a_consent_that_differs_from_the_page_shown_is_a_400(forgejo, app, change):
    browser = Browser(forgejo)
    browser.sign_in()
    assert browser.decide(browser.get(authorize_path(app)), **change).status == 400
    assert forgejo.grant_of("alice", app.client_id) is None


@pytest.mark.parametrize(
    "change, code, text",
    [
        ({"client_id": None}, 500, "Internal Server Error"),
        ({"client_id": "nobody"}, 400, "Client ID not registered"),
        ({"redirect_uri": "https://evil.example/"}, 400, "Unregistered Redirect URI"),
    ],
)
def test_authorize_errors_without_a_trusted_redirect_are_pages(forgejo, app, change, code, text):
    browser = Browser(forgejo)
    browser.sign_in()
    answer = browser.get(authorize_path(app, **change))
    assert answer.status == code and text in answer.text and "Location" not in answer.headers


def test_other_authorize_errors_go_to_the_redirect_with_a_state_even_if_empty(forgejo, app):
    browser = Browser(forgejo)
    browser.sign_in()
    _, query = browser.get(authorize_path(app, code_challenge_method="S512", state=None)).sent_to()
    assert query == {
        "error": "invalid_request",
        "error_description": "unsupported code challenge method",
        "state": "",
    }
    for wrong in ("token", "", None):
        _, query = browser.get(authorize_path(app, response_type=wrong)).sent_to()
        assert query["error"] == "unsupported_response_type" and query["state"] == "st"
    public = forgejo.add_app([CALLBACK], confidential=False)
    _, query = browser.get(authorize_path(public, code_challenge_method=None)).sent_to()
    assert query["error_description"] == "PKCE is required for public clients"


def test_redirects_match_but_for_case_one_slash_and_a_public_clients_loopback_port(forgejo, app):
    assert app.accepts_redirect(CALLBACK.upper() + "/")
    assert not app.accepts_redirect(CALLBACK + "//")
    assert not app.accepts_redirect("http://127.0.0.1:9999/oauth/callback")
    public = forgejo.add_app(["http://127.0.0.1/cb", "http://localhost/cb"], confidential=False)
    assert public.accepts_redirect("http://127.0.0.1:9999/cb")
    assert not public.accepts_redirect("http://localhost:9999/cb")
    assert not public.accepts_redirect("http://127.0.0.2:9999/cb")


def test_another_account_can_be_chosen_on_the_consent_page(forgejo, app):
    browser = Browser(forgejo)
    browser.sign_in("alice")
    page = browser.get(authorize_path(app))
    browser.get(unescape(re.search(r'href="(/user/logout[^"]+)"', page.text)[1]))
    answer = browser.sign_in("bob")
    assert answer.headers["Location"] == authorize_path(app)
    assert "<strong>bob</strong>" in browser.get(answer.headers["Location"]).text


def test_a_user_can_revoke_the_grant_on_the_home_page(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    browser = Browser(forgejo)
    browser.sign_in()
    page = browser.get("/").text
    action = re.search(r'action="([^"]+/revoke/\d+)"', page)[1]
    assert browser.post(action, {}).status == 303
    assert call(forgejo, "GET", "/api/v1/user", token=token).status == 401


def test_forms_are_protected_by_where_they_come_from_and_no_token(forgejo, app):
    browser = Browser(forgejo)
    browser.sign_in()
    page = browser.get(authorize_path(app))
    assert set(browser.cookies) - {"redirect_to"} == {"session"} and "_csrf" not in page.text
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert browser.decide(page, headers=headers).status == 400
    assert browser.decide(page, headers={"Origin": forgejo.url}).status == 303


def test_older_servers_compare_a_token_in_forms(start):
    forgejo = start(profile="gitea")
    app = forgejo.add_app([CALLBACK])
    browser = Browser(forgejo)
    browser.sign_in()
    page = browser.get(authorize_path(app))
    assert "i_like_gitea" in browser.cookies and browser.decide(page, _csrf="wrong").status == 400
    assert browser.decide(page).status == 303


# ---- The scope of a grant
# -------------------------------------------------------------------------------------------


def test_the_scope_of_a_grant_is_frozen_for_a_confidential_client(forgejo, app):
    log_in(forgejo, app, scope="read:user")
    token = log_in(forgejo, app, scope="read:user write:repository")["access_token"]
    assert forgejo.grant_of("alice", app.client_id).scope == "read:user"
    forbidden_scope(call(forgejo, "GET", "/api/v1/repos/search", token=token), "read:repository")


def test_another_scope_is_an_error_for_a_public_client_until_the_grant_is_revoked(forgejo):
    app = forgejo.add_app([CALLBACK], confidential=False)
    browser = Browser(forgejo)
    browser.sign_in()
    browser.decide(browser.get(authorize_path(app, scope="read:user")))
    _, query = browser.decide(browser.get(authorize_path(app, scope="all"))).sent_to()
    assert (query["error"], query["error_description"]) == (
        "server_error",
        "a grant exists with different scope",
    )
    forgejo.revoke_grant("alice", app.client_id)
    assert "code" in browser.decide(browser.get(authorize_path(app, scope="all"))).sent_to()[1]


def test_gitea_lets_the_scope_follow_the_request(start):
    forgejo = start(profile="gitea")
    app = forgejo.add_app([CALLBACK])
    log_in(forgejo, app, scope="read:user")
    log_in(forgejo, app, scope="read:repository")
    assert forgejo.grant_of("alice", app.client_id).scope == "read:repository"


def test_set_grant_scope_changes_a_grant_or_makes_an_old_one(forgejo, app):
    forgejo.set_grant_scope("alice", app.client_id, "read:user")
    token = log_in(forgejo, app)["access_token"]
    forbidden_scope(call(forgejo, "GET", "/api/v1/user/repos", token=token), "read:repository")
    forgejo.set_grant_scope("alice", app.client_id, "read:user read:repository")
    assert call(forgejo, "GET", "/api/v1/user/repos", token=token).status == 200


# ---- The token endpoint
# ---------------------------------------------------------------------------------------------


def test_client_credentials_work_in_the_form_in_json_and_as_basic(forgejo, app):
    assert exchange(forgejo, app, get_code(forgejo, app)).status == 200
    body = {
        "grant_type": "authorization_code",
        "code": get_code(forgejo, app),
        "redirect_uri": CALLBACK,
        "code_verifier": VERIFIER,
    }
    sent = call(
        forgejo,
        "POST",
        TOKEN_PATH,
        as_json={**body, "client_id": app.client_id, "client_secret": app.client_secret},
    )
    assert sent.status == 200
    body["code"] = get_code(forgejo, app)
    assert (
        call(forgejo, "POST", TOKEN_PATH, form=body, headers=basic(app.client_id, app.client_secret)).status
        == 200
    )


def test_basic_credentials_must_be_readable_and_agree_with_the_body(forgejo, app):
    def tried(form, header):
        return call(forgejo, "POST", TOKEN_PATH, form=form, headers=header)

    refused(tried({}, {"Authorization": "Basic !!"}), "invalid_request", "cannot parse basic auth header")
    refused(
        tried({"client_id": "x"}, basic(app.client_id, "y")),
        "invalid_request",
        "client_id in request body inconsistent with Authorization header",
    )
    refused(
        tried({"client_secret": "x"}, basic(app.client_id, "y")),
        "invalid_request",
        "client_secret in request body inconsistent with Authorization header",
    )


@pytest.mark.parametrize(
    "change, error, description",
    [
        ({"client_id": "x"}, "invalid_client", "cannot load client with client id: 'x'"),
        ({"client_secret": "x"}, "unauthorized_client", "invalid client secret"),
        ({"client_secret": ""}, "unauthorized_client", "invalid empty client secret"),
        ({"code": "x"}, "unauthorized_client", "client is not authorized"),
        ({"code_verifier": "x"}, "unauthorized_client", "failed PKCE code challenge"),
        ({"code_verifier": None}, "unauthorized_client", "failed PKCE code challenge"),
        ({"redirect_uri": "https://evil.example/"}, "unauthorized_client", "unexpected redirect URI"),
        (
            {"redirect_uri": CALLBACK + "/"},
            "unauthorized_client",
            "redirect_uri does not match the authorization request",
        ),
        (
            {"grant_type": "password"},
            "unsupported_grant_type",
            "Only refresh_token or authorization_code grant type is supported",
        ),
    ],
)
def test_a_bad_code_exchange_is_refused_in_forgejos_words_and_burns_nothing(
    forgejo, app, change, error, description
):
    code = get_code(forgejo, app)
    refused(exchange(forgejo, app, code, **change), error, description)
    assert exchange(forgejo, app, code).status == 200


def test_a_code_works_once_and_only_for_its_client(forgejo, app):
    other = forgejo.add_app([CALLBACK])
    code = get_code(forgejo, app)
    refused(exchange(forgejo, other, code), "invalid_grant", "invalid grant")
    assert exchange(forgejo, app, code).status == 200
    refused(exchange(forgejo, app, code), "unauthorized_client", "client is not authorized")


@pytest.mark.parametrize(
    "change, error, description",
    [
        ({"client_id": "x"}, "invalid_client", 'cannot load client with client id: "x"'),
        ({"client_secret": "x"}, "invalid_client", "invalid client secret"),
        ({"client_secret": ""}, "invalid_client", "invalid empty client secret"),
        ({"refresh_token": "x"}, "unauthorized_client", "unable to parse refresh token"),
    ],
)
def test_a_bad_refresh_is_refused_in_forgejos_words_and_burns_nothing(
    forgejo, app, change, error, description
):
    token = log_in(forgejo, app)["refresh_token"]
    refused(refresh(forgejo, app, token, **change), error, description)
    assert refresh(forgejo, app, token).status == 200


def test_refresh_refuses_forged_expired_foreign_and_access_tokens(forgejo, app, clock):
    tokens, other = log_in(forgejo, app), forgejo.add_app([CALLBACK])
    head, claims, signature = tokens["refresh_token"].split(".")
    forged = ".".join((head, claims, signature[::-1]))
    refused(refresh(forgejo, app, forged), "unauthorized_client", "unable to parse refresh token")
    refused(
        refresh(forgejo, app, tokens["access_token"]), "unauthorized_client", "token is not a refresh token"
    )
    refused(
        refresh(forgejo, other, tokens["refresh_token"]),
        "invalid_grant",
        "refresh token was not issued to this client",
    )
    clock.now += 730 * 3600
    refused(
        refresh(forgejo, app, tokens["refresh_token"]), "unauthorized_client", "unable to parse refresh token"
    )


def test_a_refresh_voids_the_refresh_token_before_it(forgejo, app):
    first = log_in(forgejo, app)["refresh_token"]
    second = refresh(forgejo, app, first).json()["refresh_token"]
    refused(refresh(forgejo, app, first), "unauthorized_client", "token was already used")
    assert refresh(forgejo, app, second).status == 200


def test_a_second_login_of_the_same_user_voids_the_first_ones_refresh_token_but_not_its_access_token(
    forgejo, app
):
    first = log_in(forgejo, app)
    second = log_in(forgejo, app)
    other = log_in(forgejo, app, "bob")
    refused(refresh(forgejo, app, first["refresh_token"]), "unauthorized_client", "token was already used")
    assert call(forgejo, "GET", "/api/v1/user", token=first["access_token"]).status == 200
    assert refresh(forgejo, app, second["refresh_token"]).status == 200
    assert refresh(forgejo, app, other["refresh_token"]).status == 200


@pytest.mark.parametrize("profile", ["forgejo-old", "gitea"])
def test_old_forgejo_and_gitea_let_a_refresh_token_be_used_again(start, profile):
    forgejo = start(profile=profile)
    app = forgejo.add_app([CALLBACK])
    token = log_in(forgejo, app)["refresh_token"]
    assert refresh(forgejo, app, token).status == refresh(forgejo, app, token).status == 200


@pytest.mark.parametrize("gone", ["grant", "user"])
def test_after_revocation_or_deletion_a_refresh_meets_no_grant_and_the_access_token_is_dead(
    forgejo, app, gone
):
    tokens = log_in(forgejo, app)
    forgejo.revoke_grant("alice", app.client_id) if gone == "grant" else forgejo.delete_user("alice")
    refused(refresh(forgejo, app, tokens["refresh_token"]), "invalid_grant", "grant does not exist")
    answer = call(forgejo, "GET", "/api/v1/version", token=tokens["access_token"])
    assert answer.status == 401
    assert answer.json() == {
        "message": f"access token does not exist [sha: {tokens['access_token']}]\n"
        "oauth2 grant not found or revoked",
        "url": forgejo.url + "/api/swagger",
    }


def test_a_deleted_application_is_unknown_and_its_tokens_die(forgejo, app):
    tokens = log_in(forgejo, app)
    forgejo.delete_app(app.client_id)
    assert refresh(forgejo, app, tokens["refresh_token"]).json()["error"] == "invalid_client"
    assert call(forgejo, "GET", "/api/v1/user", token=tokens["access_token"]).status == 401


def test_a_rotated_secret_refuses_the_old_one_and_leaves_tokens_alone(forgejo, app):
    tokens, old = log_in(forgejo, app), app.client_secret
    new = forgejo.rotate_secret(app.client_id)
    answer = refresh(forgejo, app, tokens["refresh_token"], client_secret=old)
    refused(answer, "invalid_client", "invalid client secret")
    assert call(forgejo, "GET", "/api/v1/user", token=tokens["access_token"]).status == 200
    assert refresh(forgejo, app, tokens["refresh_token"], client_secret=new).status == 200


def test_a_code_never_expires_in_forgejo_and_does_in_gitea(start, clock):
    forgejo, gitea = start(), start(profile="gitea")
    apps = [server.add_app([CALLBACK]) for server in (forgejo, gitea)]
    codes = [get_code(server, app) for server, app in zip((forgejo, gitea), apps)]
    clock.now += 86400
    assert exchange(forgejo, apps[0], codes[0]).status == 200
    refused(exchange(gitea, apps[1], codes[1]), "invalid_grant", "authorization code expired")


def test_old_forgejo_forgets_an_s256_challenge_on_the_consent_path_only(start):
    forgejo = start(profile="forgejo-old")
    app = forgejo.add_app([CALLBACK])
    after_consent = get_code(forgejo, app)
    assert exchange(forgejo, app, after_consent, code_verifier="x").status == 200
    without_consent = get_code(forgejo, app)
    refused(
        exchange(forgejo, app, without_consent, code_verifier="x"),
        "unauthorized_client",
        "failed PKCE code challenge",
    )


def test_plain_pkce_is_checked_and_a_confidential_client_may_do_without(forgejo, app):
    code = get_code(forgejo, app, code_challenge="plain-text", code_challenge_method="plain")
    refused(exchange(forgejo, app, code), "unauthorized_client", "failed PKCE code challenge")
    assert exchange(forgejo, app, code, code_verifier="plain-text").status == 200
    code = get_code(forgejo, app, code_challenge=None, code_challenge_method=None)
    assert exchange(forgejo, app, code, code_verifier=None).status == 200


def test_two_access_tokens_of_one_grant_in_the_same_second_are_the_same_string(forgejo, app, clock):
    first = log_in(forgejo, app)
    same = refresh(forgejo, app, first["refresh_token"]).json()
    assert same["access_token"] == first["access_token"] and same["refresh_token"] != first["refresh_token"]
    clock.now += 1
    assert refresh(forgejo, app, same["refresh_token"]).json()["access_token"] != first["access_token"]


def test_an_id_token_comes_with_openid_only_and_is_signed_with_the_client_secret(forgejo, app):
    signed, _, signature = log_in(forgejo, app, nonce="n1")["id_token"].rpartition(".")
    digest = hmac.digest(app.client_secret.encode(), signed.encode(), "sha256")
    assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == signature
    claims = json.loads(base64.urlsafe_b64decode(signed.split(".")[1] + "=="))
    assert claims["sub"] == "1001" and claims["aud"] == [app.client_id] and claims["nonce"] == "n1"
    assert claims["iss"] == forgejo.issuer and claims["preferred_username"] == "alice"
    assert "id_token" not in log_in(forgejo, app, "bob", scope="read:user")


def test_issue_tokens_makes_what_a_login_would(forgejo, app):
    tokens = forgejo.issue_tokens("bob", app.client_id, "read:user")
    assert call(forgejo, "GET", "/api/v1/user", token=tokens["access_token"]).json()["login"] == "bob"
    assert refresh(forgejo, app, tokens["refresh_token"]).status == 200


# ---- Userinfo and introspection
# -------------------------------------------------------------------------------------


def userinfo(forgejo, token):
    return call(forgejo, "GET", "/login/oauth/userinfo", token=token)


def test_userinfo_tells_who_the_user_is_whatever_the_scopes(forgejo, app):
    forgejo.add_user("carol", full_name="Carol C", groups=["team", "team:owners"], sub="77")
    token = log_in(forgejo, app, "carol", scope="read:issue")["access_token"]
    assert userinfo(forgejo, token).json() == {
        "sub": "77",
        "name": "Carol C",
        "preferred_username": "carol",
        "email": "carol@example.test",
        "picture": forgejo.url + "/avatars/77",
        "groups": ["team", "team:owners"],
    }


def test_userinfo_without_groups_omits_them_in_forgejo_and_sends_null_in_gitea(start):
    for profile, expected in (("forgejo", False), ("gitea", True)):
        forgejo = start(profile=profile)
        app = forgejo.add_app([CALLBACK])
        assert ("groups" in userinfo(forgejo, log_in(forgejo, app)["access_token"]).json()) is expected


def test_the_sub_stays_when_a_user_is_renamed(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    before = userinfo(forgejo, token).json()
    forgejo.rename("alice", "alicia")
    after = userinfo(forgejo, token).json()
    assert after["sub"] == before["sub"] and after["preferred_username"] == "alicia"


def test_userinfo_without_and_with_a_bad_token_is_a_plain_text_401(forgejo):
    answer = call(forgejo, "GET", "/login/oauth/userinfo")
    assert (answer.status, answer.text) == (401, "no valid authorization")
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm=""'
    answer = userinfo(forgejo, "garbage")
    assert answer.status == 401 and answer.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("trouble", ["suspend", "deactivate", "must_change_password"])
def test_only_the_api_knows_who_may_not_sign_in(forgejo, app, trouble):
    tokens = log_in(forgejo, app)
    getattr(forgejo, trouble)("alice")
    assert userinfo(forgejo, tokens["access_token"]).json()["sub"] == "1001"
    renewed = refresh(forgejo, app, tokens["refresh_token"])
    assert renewed.status == 200
    form, credentials = {"token": tokens["access_token"]}, basic(app.client_id, app.client_secret)
    answer = call(forgejo, "POST", "/login/oauth/introspect", form=form, headers=credentials)
    assert answer.json()["active"] is True
    refused = call(forgejo, "GET", "/api/v1/version", token=renewed.json()["access_token"])
    assert refused.status == 403 and list(refused.json()) == ["message"]
    sentence = fake_forgejo.PROHIBITED
    if trouble == "must_change_password":
        sentence = f"You must change your password. Change it at: {forgejo.url}/user/change_password"
    assert refused.json()["message"] == sentence


def test_older_servers_show_a_suspended_user_a_page_in_place_of_userinfo(start):
    forgejo = start(profile="forgejo-old")
    app = forgejo.add_app([CALLBACK])
    token = log_in(forgejo, app)["access_token"]
    forgejo.suspend("alice")
    answer = userinfo(forgejo, token)
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/html")
    forgejo.unsuspend("alice")
    forgejo.must_change_password("alice")
    assert userinfo(forgejo, token).sent_to()[0] == "/user/settings/change_password"


def test_userinfo_answers_a_post_and_a_token_in_the_query(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    path = "/login/oauth/userinfo"
    assert call(forgejo, "POST", path, token=token).json()["sub"] == "1001"
    assert call(forgejo, "GET", f"{path}?access_token={token}").json()["sub"] == "1001"


def test_a_team_is_written_in_lower_case_and_an_organization_as_it_was_made(forgejo, app):
    forgejo.add_user("carol", groups=["Acme", "Acme:Writers"])
    token = log_in(forgejo, app, "carol")["access_token"]
    assert userinfo(forgejo, token).json()["groups"] == ["Acme", "Acme:writers"]


@pytest.mark.parametrize(
    "scope, shown",
    [
        ("openid read:user", False),
        ("openid groups write:organization", False),
        ("openid read:organization", True),
        ("openid all", True),
    ],
)
def test_additional_grant_scopes_hide_private_organizations(start, scope, shown):
    forgejo = start(additional_grant_scopes=True)
    app = forgejo.add_app([CALLBACK])
    forgejo.add_user("carol", groups=["open", "acme", "acme:writers"])
    forgejo.private_organizations.add("acme")
    token = log_in(forgejo, app, "carol", scope=scope)["access_token"]
    expected = ["open", "acme", "acme:writers"] if shown else ["open"]
    assert userinfo(forgejo, token).json()["groups"] == expected


def test_introspection_tells_the_grants_scope_to_any_confidential_client(forgejo, app):
    tokens, other = log_in(forgejo, app), forgejo.add_app([CALLBACK])
    for token in (tokens["access_token"], tokens["refresh_token"]):
        answer = call(
            forgejo,
            "POST",
            "/login/oauth/introspect",
            form={"token": token},
            headers=basic(other.client_id, other.client_secret),
        )
        assert answer.json() == {
            "active": True,
            "scope": SCOPE,
            "username": "alice",
            "iss": forgejo.issuer,
            "sub": "1001",
            "aud": [app.client_id],
        }


def test_introspection_of_a_dead_token_is_inactive_and_without_credentials_a_401(forgejo, app, clock):
    token = log_in(forgejo, app)["access_token"]
    headers = basic(app.client_id, app.client_secret)
    assert call(forgejo, "POST", "/login/oauth/introspect", form={"token": token}).status == 401
    public = forgejo.add_app([CALLBACK], confidential=False)
    assert (
        call(
            forgejo,
            "POST",
            "/login/oauth/introspect",
            form={"token": token},
            headers=basic(public.client_id, public.client_secret),
        ).status
        == 401
    )
    clock.now += 3600
    answer = call(forgejo, "POST", "/login/oauth/introspect", form={"token": token}, headers=headers)
    assert answer.json() == {"active": False}


# ---- The API
# --------------------------------------------------------------------------------------------------------


def test_version_needs_no_token_but_refuses_a_bad_or_expired_one(start, clock):
    forgejo = start(access_lifetime=60)
    app = forgejo.add_app([CALLBACK])
    token = log_in(forgejo, app)["access_token"]
    assert call(forgejo, "GET", "/api/v1/version").json() == {"version": "11.0.1+gitea-1.22.0"}
    assert call(forgejo, "GET", "/api/v1/version", token=token, scheme="token").status == 200
    assert call(forgejo, "GET", "/api/v1/version", token="garbage").status == 401
    clock.now += 59
    assert call(forgejo, "GET", "/api/v1/version", token=token).status == 200
    clock.now += 1
    answer = call(forgejo, "GET", "/api/v1/version", token=token)
    assert answer.status == 401 and "expired" in answer.json()["message"]


def test_old_forgejo_gives_one_reason_for_every_bad_token(start):
    forgejo = start(profile="forgejo-old")
    answer = call(forgejo, "GET", "/api/v1/version", token="a.b.c")
    assert answer.json() == {
        "message": "user does not exist [uid: 0, name: ]",
        "url": forgejo.url + "/api/swagger",
    }


def test_the_api_takes_lower_case_token_and_bearer_in_any_case_only(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    for scheme, code in (("token", 200), ("Bearer", 200), ("bEaReR", 200), ("Token", 401), ("Basic", 401)):
        assert call(forgejo, "GET", "/api/v1/user", token=token, scheme=scheme).status == code


def test_a_refresh_token_is_no_access_token(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    answer = call(forgejo, "GET", "/api/v1/user", token=token)
    assert answer.status == 401 and answer.json()["message"].endswith(
        "\ntoken was not an oauth2 access token"
    )


def test_with_require_signin_view_the_api_answers_no_anonymous_caller(start):
    forgejo = start(require_signin=True)
    app = forgejo.add_app([CALLBACK])
    answer = call(forgejo, "GET", "/api/v1/version")
    assert (answer.status, answer.json()["message"]) == (403, fake_forgejo.SIGNED_IN_ONLY)
    token = log_in(forgejo, app)["access_token"]
    assert call(forgejo, "GET", "/api/v1/version", token=token).status == 200


def test_a_repository_of_ones_own_needs_the_scope_that_also_adds_keys(forgejo, app):
    token = log_in(forgejo, app, scope="write:repository read:user")["access_token"]
    answer = call(forgejo, "POST", "/api/v1/user/repos", token=token, as_json={"name": "mine"})
    forbidden_scope(answer, "write:user")
    forgejo.set_grant_scope("alice", app.client_id, "write:repository write:user")
    answer = call(forgejo, "POST", "/api/v1/user/repos", token=token, as_json={"name": "mine"})
    assert answer.status == 201 and answer.json()["full_name"] == "alice/mine"


def test_a_public_application_takes_any_secret_and_cannot_introspect(forgejo):
    app = forgejo.add_app([CALLBACK], confidential=False)
    code = get_code(forgejo, app)
    tokens = exchange(forgejo, app, code, client_secret="wrong")
    assert tokens.status == 200
    form, credentials = {"token": tokens.json()["access_token"]}, basic(app.client_id, app.client_secret)
    answer = call(forgejo, "POST", "/login/oauth/introspect", form=form, headers=credentials)
    assert answer.status == 401


def test_a_restored_forgejo_counts_from_where_the_backup_was_and_gives_numbers_again(forgejo, app):
    kept = forgejo.backup()
    carol = forgejo.add_user("carol", created="2026-05-05T05:05:05Z")
    tokens = log_in(forgejo, app, "carol")
    forgejo.restore(kept)
    refused(refresh(forgejo, app, tokens["refresh_token"]), "invalid_grant", "grant does not exist")
    dave = forgejo.add_user("dave", created="2026-06-06T06:06:06Z")
    assert dave.id == carol.id
    log_in(forgejo, app, "dave")
    # A grant's number comes again too, and with it what was signed for the other person.
    assert userinfo(forgejo, tokens["access_token"]).json()["preferred_username"] == "dave"


def test_below_a_path_everything_is_there_and_nothing_beside_it(start):
    forgejo = start(path="/git")
    app = forgejo.add_app([CALLBACK])
    assert call(forgejo, "GET", "/api/v1/version").status == 404
    assert call(forgejo, "GET", "/gitx/api/v1/version").status == 404
    assert call(forgejo, "GET", "/git/api/v1/version").status == 200
    assert forgejo.url.endswith("/git") and forgejo.issuer == forgejo.url + "/"
    browser = Browser(forgejo)
    where = browser.get("/git" + authorize_path(app)).headers["Location"]
    assert where == "/git/user/login"
    answer = browser.post(where, {"user_name": "alice", "password": "secret"})
    assert answer.headers["Location"] == "/git" + authorize_path(app)
    page = browser.get(answer.headers["Location"])
    assert re.findall(r'(?:action|href)="([^"?]+)', page.text) == [
        "/git/login/oauth/grant",
        "/git/user/logout",
    ]


def test_a_suspended_user_is_refused_everywhere_in_the_api(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    forgejo.suspend("alice")
    for path in ("/api/v1/version", "/api/v1/user"):
        answer = call(forgejo, "GET", path, token=token)
        assert answer.status == 403 and answer.json()["message"] == fake_forgejo.PROHIBITED


@pytest.mark.parametrize(
    "path, scope, missing",
    [
        ("/user", "read:issue", "read:user"),
        ("/user/repos", "read:repository", "read:user"),
        ("/user/repos", "read:user", "read:repository"),
        ("/user/orgs", "read:user", "read:user read:organization"),
        ("/users/bob", "read:issue", "read:user"),
        ("/users/bob/repos", "read:user", "read:repository"),
        ("/repos/search", "read:user", "read:repository"),
        ("/repos/alice/alice-private", "read:user", "read:repository"),
        ("/repos/alice/alice-private/issues", "read:repository", "read:issue"),
        ("/notifications", "read:user", "read:notification"),
    ],
)
def test_each_api_path_names_the_scope_that_is_missing(forgejo, app, path, scope, missing):
    token = forgejo.issue_tokens("alice", app.client_id, scope)["access_token"]
    forbidden_scope(call(forgejo, "GET", "/api/v1" + path, token=token), missing)


def test_a_write_scope_reads_and_a_read_scope_does_not_write(forgejo, app):
    path = "/api/v1/repos/alice/alice-private/issues"
    token = forgejo.issue_tokens("alice", app.client_id, "read:issue")["access_token"]
    assert call(forgejo, "GET", path, token=token).status == 200
    forbidden_scope(call(forgejo, "POST", path, token=token, as_json={"title": "x"}), "write:issue")
    forgejo.set_grant_scope("alice", app.client_id, "write:issue")
    assert call(forgejo, "POST", path, token=token, as_json={"title": "x"}).status == 201
    assert [issue["title"] for issue in call(forgejo, "GET", path, token=token).json()] == [
        "x",
        "First issue of alice",
    ]
    assert call(forgejo, "POST", path, token=token, as_json={"title": ""}).status == 422


@pytest.mark.parametrize(
    "scope", ["", "openid profile email", "read:repo", "read:user,read:repository", "all"]
)
def test_without_one_valid_api_scope_a_token_can_do_everything(forgejo, app, scope):
    token = forgejo.issue_tokens("alice", app.client_id, scope)["access_token"]
    assert call(forgejo, "GET", "/api/v1/user/repos", token=token).status == 200
    assert call(forgejo, "GET", "/api/v1/notifications", token=token).status == 200


def test_invalid_scope_names_beside_a_valid_one_are_ignored(forgejo, app):
    token = forgejo.issue_tokens("alice", app.client_id, "read:repo read:user")["access_token"]
    assert call(forgejo, "GET", "/api/v1/user", token=token).status == 200
    assert call(forgejo, "GET", "/api/v1/repos/search", token=token).status == 403


def test_old_forgejo_does_not_limit_tokens_by_scope(start):
    forgejo = start(profile="forgejo-old")
    app = forgejo.add_app([CALLBACK])
    token = forgejo.issue_tokens("alice", app.client_id, "read:user")["access_token"]
    assert call(forgejo, "GET", "/api/v1/user/repos", token=token).status == 200


def test_every_listing_names_the_tokens_user_and_nobody_else(forgejo, app):
    forgejo.add_user("carol", groups=["club", "club:all"])
    for login, others in (("alice", ("bob", "carol")), ("carol", ("alice", "bob"))):
        token = forgejo.issue_tokens(login, app.client_id)["access_token"]
        for path in (
            "/user",
            "/user/repos",
            f"/users/{login}",
            f"/users/{login}/repos",
            "/repos/search",
            f"/repos/{login}/{login}-private",
            f"/repos/{login}/{login}-private/issues",
            "/notifications",
        ):
            text = call(forgejo, "GET", "/api/v1" + path, token=token).text
            assert login in text and not any(other in text for other in others)
    orgs = call(forgejo, "GET", "/api/v1/user/orgs", token=token).json()
    assert [(org["name"], org["description"]) for org in orgs] == [("club", "Organization of carol")]


def test_private_repositories_of_others_do_not_exist_and_public_ones_do(forgejo, app):
    forgejo.add_repo("alice", "open", private=False)
    token = forgejo.issue_tokens("bob", app.client_id)["access_token"]
    answer = call(forgejo, "GET", "/api/v1/repos/alice/alice-private", token=token)
    assert (answer.status, answer.json()["message"]) == (404, "The target couldn't be found.")
    assert call(forgejo, "GET", "/api/v1/repos/alice/open", token=token).json()["full_name"] == "alice/open"
    assert call(forgejo, "GET", "/api/v1/repos/alice/open").status == 200
    forgejo.set_grant_scope("bob", app.client_id, "public-only read:repository")
    assert call(forgejo, "GET", "/api/v1/repos/bob/bob-private", token=token).status == 404


def test_a_listing_has_pages_and_a_total(forgejo, app):
    for number in range(4):
        forgejo.add_repo("alice", f"more-{number}")
    token = forgejo.issue_tokens("alice", app.client_id)["access_token"]
    answer = call(forgejo, "GET", "/api/v1/user/repos?page=2&limit=3", token=token)
    assert len(answer.json()) == 2 and answer.headers["X-Total-Count"] == "5"
    found = call(forgejo, "GET", "/api/v1/repos/search?q=more", token=token).json()
    assert found["ok"] is True and len(found["data"]) == 4


def test_the_rest_of_the_api_is_a_json_404_and_user_endpoints_need_a_token(forgejo):
    answer = call(forgejo, "GET", "/api/v1/nothing")
    assert answer.status == 404 and answer.json()["url"] == forgejo.url + "/api/swagger"
    answer = call(forgejo, "GET", "/api/v1/user")
    assert (answer.status, answer.json()["message"]) == (401, "token is required")
    assert call(forgejo, "DELETE", "/api/v1/version").status == 405


# ---- The log
# --------------------------------------------------------------------------------------------------------


def test_the_log_tells_path_query_agent_user_grant_and_status(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    call(forgejo, "GET", "/api/v1/user?a=1", token=token, headers={"User-Agent": "agent/1"})
    last = forgejo.requests[-1]
    assert (last.method, last.path, last.query, last.user_agent) == (
        "GET",
        "/api/v1/user",
        {"a": "1"},
        "agent/1",
    )
    assert (last.auth_user, last.status) == ("alice", 200)
    assert last.grant_id == forgejo.grant_of("alice", app.client_id).id
    exchanged = forgejo.requests.wait_for(lambda r: r.path == TOKEN_PATH)
    assert exchanged.auth_user == "alice" and exchanged.form["code_verifier"] == VERIFIER
    assert forgejo.requests.count("/api/v1/") == 1
    assert forgejo.count("/login/", method="POST") == 2


def test_wait_for_blocks_until_the_request_comes(forgejo):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(forgejo.requests.wait_for, lambda r: r.path == "/api/v1/version")
        call(forgejo, "GET", "/login/oauth/keys")
        assert not waiting.done()
        call(forgejo, "GET", "/api/v1/version")
        assert waiting.result(10).status == 200
    with pytest.raises(TimeoutError, match="keys"):
        forgejo.wait_for(lambda r: r.path == "/never", timeout=0.01)


# ---- Faults
# ---------------------------------------------------------------------------------------------------------


def version(forgejo):
    return call(forgejo, "GET", "/api/v1/version")


def test_a_fault_strikes_the_nth_matching_request_only_as_often_as_told(forgejo):
    injection = forgejo.inject("/api/v1/version", status(503), nth=2, times=2, method="GET")
    call(forgejo, "POST", "/api/v1/version")
    assert [version(forgejo).status for _ in range(4)] == [200, 503, 503, 200]
    assert injection.hits == 2
    forgejo.inject("/api/", status(500), times=None)
    assert [version(forgejo).status for _ in range(2)] == [500, 500]
    forgejo.clear_faults()
    assert version(forgejo).status == 200


def test_a_status_fault_carries_body_type_and_headers(forgejo):
    forgejo.inject("/api", status(429, {"message": "slow down"}, headers={"Retry-After": "7"}))
    answer = version(forgejo)
    assert (answer.status, answer.headers["Retry-After"], answer.json()) == (
        429,
        "7",
        {"message": "slow down"},
    )
    forgejo.inject("/api", status(200, "{}", "text/plain"))
    assert version(forgejo).headers["Content-Type"] == "text/plain"


def test_html_redirect_and_oauth_error_answer_instead_of_processing(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    for fault, code in ((html(502), 502), (html(200), 200), (redirect("/user/login"), 303)):
        forgejo.inject(TOKEN_PATH, fault)
        assert refresh(forgejo, app, token).status == code
    forgejo.inject(TOKEN_PATH, oauth_error("unauthorized_client", "token was already used"))
    refused(refresh(forgejo, app, token), "unauthorized_client", "token was already used")
    assert refresh(forgejo, app, token).status == 200


def test_a_lost_response_consumes_the_token_and_is_logged(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    forgejo.inject(TOKEN_PATH, lose_response)
    with pytest.raises(http.client.RemoteDisconnected):
        refresh(forgejo, app, token)
    assert forgejo.requests[-1].status == 200
    refused(refresh(forgejo, app, token), "unauthorized_client", "token was already used")


def test_a_cut_body_ends_before_its_announced_length(forgejo):
    forgejo.inject("/api", cut_body())
    with pytest.raises(http.client.IncompleteRead):
        version(forgejo)


def test_truncated_json_is_a_complete_message_that_does_not_parse(forgejo):
    forgejo.inject("/api", truncated_json())
    answer = version(forgejo)
    assert answer.status == 200 and len(answer.body) == int(answer.headers["Content-Length"])
    with pytest.raises(ValueError):
        answer.json()


def test_huge_json_parses_and_is_as_large_as_asked(forgejo):
    forgejo.inject("/api", huge_json(1 << 20))
    answer = version(forgejo)
    assert len(answer.body) > 1 << 20 and answer.json()["version"] == forgejo.version


def test_json_override_replaces_removes_and_maps(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    forgejo.inject(TOKEN_PATH, json_override({"expires_in": "3600", "token_type": MISSING}))
    answer = refresh(forgejo, app, token).json()
    assert answer["expires_in"] == "3600" and "token_type" not in answer and "refresh_token" in answer
    forgejo.inject("/login/oauth/userinfo", json_override(lambda value: [value["sub"]]))
    assert userinfo(forgejo, answer["access_token"]).json() == ["1001"]


def test_wrong_content_type_changes_nothing_else(forgejo):
    forgejo.inject("/api", wrong_content_type("text/html"))
    answer = version(forgejo)
    assert answer.headers["Content-Type"] == "text/html" and json.loads(answer.body)["version"]


def test_run_changes_the_world_just_before_the_request(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    forgejo.inject("/api/v1/version", run(lambda: forgejo.revoke_grant("alice", app.client_id)))
    assert call(forgejo, "GET", "/api/v1/version", token=token).status == 401


def test_a_hanging_request_is_seen_in_the_log_and_processed_once_released(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    injection = forgejo.inject(TOKEN_PATH, hang())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh, forgejo, app, token)
        injection.wait_hit()
        forgejo.wait_for(lambda r: r.form.get("refresh_token") == token and r.status == 0)
        assert forgejo.grant_of("alice", app.client_id).counter == 1
        injection.release()
        assert waiting.result(10).status == 200
    assert forgejo.requests[-1].status == 200
    assert forgejo.requests.count(TOKEN_PATH) == 2


def test_a_hang_after_processing_has_taken_effect(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    forgejo.inject(TOKEN_PATH, hang(processed=True))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh, forgejo, app, token)
        forgejo.wait_for(lambda r: r.form.get("refresh_token") == token)
        assert refresh(forgejo, app, token).json()["error_description"] == "token was already used"
        forgejo.clear_faults()
        assert waiting.result(10).status == 200


def test_stopping_cuts_what_hangs_and_what_waits_at_a_gate(start):
    forgejo = start()
    injection, gate = forgejo.inject("/api/v1/version", hang()), forgejo.hold("/api/v1/user")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(version, forgejo), pool.submit(call, forgejo, "GET", "/api/v1/user")]
        injection.wait_hit()
        gate.wait_arrived()
        forgejo.stop()
        for call_made in waiting:
            assert isinstance(call_made.exception(10), (http.client.RemoteDisconnected, ConnectionError))
    assert forgejo.requests[-1].status == 0


def test_a_slow_request_waits_for_its_event(forgejo):
    event = threading.Event()
    injection = forgejo.inject("/api", slow_until(event))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(version, forgejo)
        injection.wait_hit()
        assert not waiting.done()
        event.set()
        assert waiting.result(10).status == 200


def test_down_refuses_on_the_same_port_keeps_the_state_and_up_serves_again(forgejo, app):
    token = log_in(forgejo, app)["access_token"]
    idle = http.client.HTTPConnection("127.0.0.1", forgejo.port, timeout=10)
    idle.request("GET", "/api/v1/version")
    idle.getresponse().read()
    forgejo.down()
    assert idle.sock.recv(1) == b""
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        version(forgejo)
    with pytest.raises(OSError), socket.socket() as other:
        other.bind(("127.0.0.1", forgejo.port))
    forgejo.up()
    assert call(forgejo, "GET", "/api/v1/user", token=token).status == 200


# ---- Gates
# ----------------------------------------------------------------------------------------------------------


def test_a_gate_holds_requests_before_they_are_processed(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    gate = forgejo.hold(TOKEN_PATH)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(refresh, forgejo, app, token) for _ in range(2)]
        gate.wait_arrived(2)
        assert forgejo.grant_of("alice", app.client_id).counter == 1
        gate.let(1)
        forgejo.wait_for(lambda r: r.form.get("refresh_token") == token)
        assert forgejo.grant_of("alice", app.client_id).counter == 2
        gate.open()
        assert sorted(call_made.result(10).status for call_made in waiting) == [200, 400]
    assert gate.count == 2 and gate.arrived.is_set()
    with pytest.raises(TimeoutError):
        gate.wait_arrived(3, timeout=0.01)


def test_two_refreshes_that_both_passed_the_check_both_succeed_and_the_last_token_counts(forgejo, app):
    token = log_in(forgejo, app)["refresh_token"]
    with ThreadPoolExecutor(2) as pool:
        with forgejo.hold(TOKEN_PATH, at="checked") as gate:
            waiting = [pool.submit(refresh, forgejo, app, token) for _ in range(2)]
            gate.wait_arrived(2)
        answers = [call_made.result(10) for call_made in waiting]
    assert [answer.status for answer in answers] == [200, 200]
    assert sorted(refresh(forgejo, app, answer.json()["refresh_token"]).status for answer in answers) == [
        200,
        400,
    ]


# ---- HTTP and the program
# -------------------------------------------------------------------------------------------


def test_one_connection_serves_many_requests_chunked_ones_and_heads_too(forgejo):
    connection = http.client.HTTPConnection("127.0.0.1", forgejo.port, timeout=10)
    connection.request("GET", "/api/v1/version")
    full = connection.getresponse().read()
    used = connection.sock
    connection.request("HEAD", "/api/v1/version")
    head = connection.getresponse()
    assert head.read() == b"" and int(head.headers["Content-Length"]) == len(full)
    connection.request(
        "POST",
        TOKEN_PATH,
        iter([b"grant_type=", b"password"]),
        encode_chunked=True,
        headers={"Content-Type": "application/x-www-form-urlencoded", "Transfer-Encoding": "chunked"},
    )
    assert json.loads(connection.getresponse().read())["error"] == "unsupported_grant_type"
    connection.request("GET", "/nowhere")
    assert connection.getresponse().status == 404 and connection.sock is used
    connection.close()


def test_a_port_that_is_taken_is_not_shared(forgejo):
    with pytest.raises(OSError):
        FakeForgejo(port=forgejo.port)


def test_a_user_can_be_added_once_only(forgejo):
    with pytest.raises(ValueError):
        forgejo.add_user("Alice")
    assert forgejo.add_user("dave").id == 1003


def test_the_program_prints_what_is_needed_serves_and_ends_on_sigterm():
    program = subprocess.Popen(
        [
            sys.executable,
            str(Path(fake_forgejo.__file__)),
            "--port",
            "0",
            "--client-id",
            "me",
            "--client-secret",
            "s3",
            "--redirect-uri",
            "http://one.example/cb",
            "--redirect-uri",
            "http://two.example/cb",
            "--access-lifetime",
            "60",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        printed = {}
        while "client_secret" not in printed:
            name, _, value = program.stdout.readline().partition(" ")
            assert value, "the program ended early"
            printed[name] = value.strip()
        assert printed["client_id"] == "me" and printed["client_secret"] == "s3"
        assert printed["redirect_uris"] == "http://one.example/cb http://two.example/cb"
        connection = http.client.HTTPConnection(urlsplit(printed["url"]).netloc, timeout=10)
        connection.request("GET", "/user/login")
        assert b"bob" in connection.getresponse().read()
        connection.close()
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
