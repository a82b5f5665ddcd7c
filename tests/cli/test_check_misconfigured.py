"""What strangers write into broker.toml: check names cause and fix of each."""

import re
import socket

import pytest

import fjmcp_broker

WRONG = {  # name: (settings that differ, what is said)
    "a URL with other letters": ({"public_url": "https://müller.example"}, "xn--"),
    "a URL without scheme": ({"public_url": "mcp.example.org"}, "starts with https://"),
    "a URL with a path": ({"public_url": "https://mcp.example.org/mcp"}, "without a path"),
    "listen as a URL": ({"listen": "http://127.0.0.1:8080"}, "must be HOST:PORT"),
    "listen without host": ({"listen": ":8080"}, "must be HOST:PORT"),
    "metrics where the rest is": (
        {"listen": "127.0.0.1:8099", "metrics_listen": "127.0.0.1:8099"},
        "give it another port",
    ),
    "the store is a folder": (
        {"store_path": "/tmp"},
        "is a folder. Name a file in it, such as /tmp/broker.db",
    ),
    "the store is a text": ({"store_path": "/etc/hostname"}, "is another file, no store"),
    "the store's folder is missing": ({"store_path": "/nonexistent/x/broker.db"}, "install -d -m 700"),
    "the key is a folder": ({"key_file": "/tmp"}, "Is a directory"),
    "the key is a text": ({"key_file": "/etc/passwd"}, "openssl rand -base64 32"),
    "a program with arguments": ({"forgejo_mcp_binary": "sh -c true"}, 'as a list, ["sh", "-c", "true"]'),
    "a program at home": ({"forgejo_mcp_binary": "~/bin/forgejo-mcp"}, "write the whole path"),
    "a program that is a folder": ({"forgejo_mcp_binary": "/usr/bin"}, "it is a folder"),
    "no authority": ({"forgejo_ca_file": "/etc/none.pem"}, "put the file there"),
    "an authority that is none": ({"forgejo_ca_file": "/etc/passwd"}, "BEGIN CERTIFICATE"),
    "an authority that is a folder": ({"forgejo_ca_file": "/etc"}, "BEGIN CERTIFICATE"),
    "an origin with a path": ({"allowed_origins": ["https://app.example.org/x"]}, "no origin such as"),
    "a scheme that is none": ({"allowed_redirect_schemes": ["//x"]}, "no scheme such as myapp"),
    "a proxy by name": ({"trusted_proxies": ["caddy"]}, "addresses or networks"),
    "scopes with commas": ({"forgejo_oauth_scopes": "read:user,write:issue"}, "separated by spaces"),
    "names with spaces": ({"allowed_users": "alice bob"}, "separated by commas"),
    "no sessions": ({"max_sessions": "0"}, "at least 1"),
    "an unknown word": ({"log_format": "xml"}, "must be json or text"),
    "a misspelled key": ({"alowed_users": ["alice"]}, "did you mean 'allowed_users'"),
    "http where https is": ({"forgejo_url": "TLS"}, "http as forgejo_internal_url"),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_names_what_is_wrong_and_what_to_do(make_installation, name):
    place = make_installation(client_documents="false")
    settings, said = WRONG[name]
    if settings.get("forgejo_url") == "TLS":
        settings = {"forgejo_url": place.forgejo.url.replace("http:", "https:")}
    place.write(**{**place.settings, "public_url": "http://127.0.0.1:9", **settings})
    done = place.command("check")
    shown = done.stdout + done.stderr
    assert done.returncode == 1 and said in shown, shown
    assert not re.search(r"Traceback|[a-z]Error\b|Exception", shown), shown
    assert not re.search(r"chmod 700 (/|/etc|/tmp)$", shown, re.MULTILINE)  # these are everybody's


def test_settings_in_a_section_are_told_to_leave_it(make_installation):
    place = make_installation()
    place.config.write_text("[broker]\n" + place.config.read_text())
    assert "in no section" in place.command("check").stdout


def test_an_address_that_another_program_has_is_named(make_installation):
    place = make_installation(client_documents="false")
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = "127.0.0.1:%d" % other.getsockname()[1]
        place.write(**{**place.settings, "public_url": "http://127.0.0.1:9", "listen": listen})
        done = place.command("check")
    assert f"listen: {listen} cannot be had: Address already in use" in done.stdout


def test_origins_and_schemes_are_taken_as_meant():
    assert fjmcp_broker.KINDS["origins"](["https://App.example.org/"]) == ("https://app.example.org",)
    assert fjmcp_broker.KINDS["schemes"](["MyApp://", "other:"]) == ("myapp", "other")
