"""The OAuth endpoints and clients' documents under fuzzing.

Whatever is sent, and whatever a document says, is answered in the form that its reader expects.
"""

import itertools
import json
import urllib.parse

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fjmcp_broker
from rigs import document_web
from rigs.mcp_client import Wire
from rigs.rig import Rig

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
REDIRECT = "https://app.example/cb?kept=1"
NUMBERS = itertools.count()

TEXTS = st.text(max_size=40) | st.sampled_from(
    [
        "code",
        "S256",
        CHALLENGE,
        REDIRECT,
        "forgejo:read",
        "none",
        "consent",
        "authorization_code",
        "refresh_token",
        "https://app.example/cb",
        "http://127.0.0.1/",
        "\0",
        "\r\nLocation: https://evil.example/",
        "%FF",
        "\ud800",
        "http://localho\u017ft/cb",
        "https://[::1",
    ]
)
NAMES = st.sampled_from(
    [
        "response_type",
        "client_id",
        "redirect_uri",
        "state",
        "scope",
        "resource",
        "code_challenge",
        "code_challenge_method",
        "prompt",
        "response_mode",
        "request",
        "request_uri",
        "grant_type",
        "code",
        "code_verifier",
        "refresh_token",
        "client_secret",
        "token",
        "client_assertion",
        "client_assertion_type",
        "login",
        "csrf",
        "decision",
        "access",
        "error",
        "iss",
    ]
) | st.text(max_size=8)
FIELDS = st.lists(st.tuples(NAMES, TEXTS), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
MEMBERS = [
    "redirect_uris",
    "client_name",
    "token_endpoint_auth_method",
    "grant_types",
    "response_types",
    "scope",
    "jwks",
    "jwks_uri",
    "client_id",
    "application_type",
    "client_uri",
    "logo_uri",
    "software_id",
    "token_endpoint_auth_methods_supported",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A broker for many examples, a client registered with it, and the internet that documents come from."""
    web = document_web.DocumentWeb(document_web.make_authority(tmp_path_factory.mktemp("authority")))
    rig = Rig(
        tmp_path_factory.mktemp("fuzz"),
        web=web.guarded(),
        rate_register=10**6,
        rate_authorize=10**6,
        rate_token=10**6,
    )
    rig.web, rig.wire = web, Wire(rig.url)
    status, body = post(
        rig,
        "/oauth/register",
        json.dumps({"redirect_uris": [REDIRECT], "token_endpoint_auth_method": "none"}),
        "application/json",
    )
    assert status == 201
    rig.client_id = body["client_id"]
    yield rig
    rig.wire.close()
    rig.close()
    web.close()


def encoded(fields):
    return urllib.parse.urlencode(
        [(name.encode("utf-8", "replace"), value.encode("utf-8", "replace")) for name, value in fields]
    )


def post(rig, path, body, kind="application/x-www-form-urlencoded"):
    """(status, JSON) of a POST; its answer must be JSON."""
    answer = rig.wire.exchange(
        "POST", rig.url + path, body.encode("utf-8", "replace"), {"Content-Type": kind}
    )
    return answer.status, json.loads(answer.body)


def nothing_broke(rig):
    assert not rig.log.named("internal_error") and not rig.log.named("reaper_failed")


@FUZZ
@given(fields=FIELDS, well_meant=st.booleans())
def test_an_authorization_request_ends_on_a_page_or_at_the_registered_uri(shared, fields, well_meant):
    if well_meant:
        given_names = {name for name, _ in fields}
        fields = [
            *fields,
            *(
                (name, value)
                for name, value in (
                    ("client_id", shared.client_id),
                    ("redirect_uri", REDIRECT),
                    ("response_type", "code"),
                    ("code_challenge", CHALLENGE),
                    ("code_challenge_method", "S256"),
                )
                if name not in given_names
            ),
        ]
    answer = shared.wire.exchange("GET", f"{shared.url}/oauth/authorize?{encoded(fields)}", None, {})
    location = answer.headers["Location"]
    if location is None:
        assert answer.status in (200, 400, 414) and answer.headers.get_content_type() == "text/html"
    else:
        assert answer.status == 303 and location.startswith(REDIRECT + "&")
        said = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query)
        assert "error" in said and "code" not in said and said["iss"] == [shared.url]
    nothing_broke(shared)


@FUZZ
@given(
    fields=FIELDS,
    path=st.sampled_from(["/oauth/token", "/oauth/revoke", "/token", "/revoke"]),
    known=st.booleans(),
)
def test_what_proves_nothing_gets_no_token_and_a_json_answer(shared, fields, path, known):
    if known:
        fields = [
            *((name, value) for name, value in fields if name not in ("client_id", "client_secret")),
            ("client_id", shared.client_id),
        ]
    status, body = post(shared, path, encoded(fields))
    assert status in ((200, 400, 401) if "revoke" in path else (400, 401)) and "access_token" not in body
    assert isinstance(body.get("error", ""), str)
    nothing_broke(shared)


@FUZZ
@given(document=VALUES | st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=8))
@example(
    document={
        "redirect_uris": ["https://app.example/cb"],
        "client_name": "\u202e\0<b>" * 40,
        "scope": "x" * 5000,
    }
)
def test_a_registration_is_taken_or_refused_with_the_words_of_its_rfc(shared, document):
    status, body = post(shared, "/oauth/register", json.dumps(document), "application/json")
    assert status in (201, 400)
    assert (
        body["error"] in ("invalid_redirect_uri", "invalid_client_metadata")
        if status == 400
        else None not in body.values()
    )
    nothing_broke(shared)


@FUZZ
@given(
    document=VALUES.map(json.dumps)
    | st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=8).map(json.dumps)
    | st.text(max_size=200),
    ours=st.booleans(),
)
def test_a_clients_document_makes_a_consent_page_or_one_that_says_why_not(shared, document, ours):
    url = f"https://h{next(NUMBERS)}.app.example/client.json"
    if ours and document.startswith("{"):
        document = json.dumps(
            {**json.loads(document), "client_id": url, "redirect_uris": ["https://app.example/cb"]}
        )
    shared.web.publish(document.encode("utf-8", "replace"), url=url)
    fields = [
        ("client_id", url),
        ("redirect_uri", "https://app.example/cb"),
        ("response_type", "code"),
        ("code_challenge", CHALLENGE),
        ("code_challenge_method", "S256"),
    ]
    answer = shared.wire.exchange("GET", f"{shared.url}/oauth/authorize?{encoded(fields)}", None, {})
    assert (
        answer.status in (200, 400)
        and answer.headers["Location"] is None
        and answer.headers.get_content_type() == "text/html"
    )
    nothing_broke(shared)


@settings(FUZZ, max_examples=400)
@given(
    registered=st.text(max_size=40)
    | st.sampled_from([REDIRECT, "http://localhost/cb", "http://127.0.0.1:1/cb?x=1"]),
    asked=st.text(max_size=40),
)
@example(registered="http://localhost/cb", asked="http://localhost:80@evil.example/cb")
@example(registered="http://127.0.0.1/cb", asked="http://127.0.0.1.evil.example/cb")
@example(registered="http://[::1]/cb", asked="http://[::1]:1/cb/../x")
def test_only_the_same_uri_or_a_loopback_one_on_another_port_matches(registered, asked):
    if fjmcp_broker.redirect_matches(registered, asked) and registered != asked:
        ours, theirs = urllib.parse.urlsplit(registered), urllib.parse.urlsplit(asked)
        assert (
            theirs.hostname in ("localhost", "127.0.0.1", "::1")
            and theirs.scheme == "http"
            and theirs.username is None
        )
        assert (ours.path or "/", ours.query) == (theirs.path or "/", theirs.query)
