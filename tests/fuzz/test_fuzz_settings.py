"""Configuration under fuzzing.

File, secrets file, environment, flags and command lines of any shape give settings or sentences.
"""

import json
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fjmcp_broker import (
    FILE_ONLY_KINDS,
    KINDS,
    REQUIRED,
    SETTING,
    SETTINGS,
    ConfigurationError,
    load_settings,
    parse_arguments,
)
from rigs.broker_process import run_program

NEEDED = {
    "public_url": "https://mcp.example.org",
    "forgejo_url": "https://forge.example.org",
    "forgejo_oauth_client_id": "id",
    "forgejo_oauth_client_secret": "canary-secret",
}
NAMES = [name for name in SETTING if name != "secrets_file"]
PLAIN = [
    setting
    for setting in SETTINGS
    # max_body and body_bytes have a say in each other
    if setting.kind not in FILE_ONLY_KINDS
    and setting.name not in ("secrets_file", "key_file", "key", "max_body", "body_bytes")
]

odd_texts = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "0",
        "-1",
        "1e9",
        "9" * 400,
        "true",
        "NaN",
        "\0",
        "a,b",
        ",",
        "https://",
        "http://[",
        "https://[::1]:x",
        "[::]:1",
        "::1",
        "1h1h",
        "0.0000001s",
        "9" * 300 + "d",
        "read:user",
        "all",
        "127.0.0.0/8",
        "\u0660",
    ]
)
odd_values = (
    odd_texts
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.lists(odd_texts | st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=5), odd_texts, max_size=2)
    | st.lists(
        st.dictionaries(
            st.sampled_from(["client_id", "name", "redirect_uris", "client_secret"]),
            odd_texts | st.lists(odd_texts, max_size=2),
            max_size=4,
        ),
        max_size=2,
    )
)
keys = st.sampled_from(NAMES) | st.sampled_from(NAMES).map(lambda name: name + "_file") | st.text(max_size=10)


def loads(flags, environ, config=None):
    """Settings or None; everything that is wrong is a sentence, and none of them tells a secret."""
    try:
        return load_settings(flags, environ, config)
    except ConfigurationError as error:
        assert error.problems and all(
            isinstance(problem, str) and problem.strip() for problem in error.problems
        )
        assert "canary" not in str(error)
        return None


def written(values):
    """TOML of text, numbers, switches, lists and tables, as far as it can be written."""

    def form(value):
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (int, float)):
            return repr(value)
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=True)
        if isinstance(value, list):
            return "[" + ", ".join(map(form, value)) + "]"
        return (
            "{" + ", ".join(f"{json.dumps(key)} = {form(item)}" for key, item in (value or {}).items()) + "}"
        )

    return "".join(f"{json.dumps(key)} = {form(value)}\n" for key, value in values.items())


@settings(max_examples=200)
@given(
    values=st.dictionaries(keys, odd_values, max_size=4),
    secret_values=st.dictionaries(keys, odd_values, max_size=2),
)
@example({"listen": "[::1]:0", "max_body": 1 << 70}, {})
@example({"session_lifetime": "9" * 400 + "d"}, {})
@example({"trusted_proxies": [1]}, {"forgejo_oauth_client_secret": "canary\0"})
def test_any_file_and_secrets_file_give_settings_or_sentences(values, secret_values):
    with (
        tempfile.NamedTemporaryFile("w", suffix=".toml") as file,
        tempfile.NamedTemporaryFile("w", suffix=".toml") as secrets,
    ):
        file.write(written({**NEEDED, **values, "secrets_file": secrets.name}))
        secrets.write(written(secret_values))
        file.flush()
        secrets.flush()
        loads({}, {}, file.name)


@settings(max_examples=300)
@given(
    data=st.binary(max_size=200)
    | st.text(st.sampled_from(" \n\t=\"[]{}#'\\,.0123456789abcmxs_"), max_size=80).map(str.encode)
)
@example(b"\xff\xfe")
@example(b"a = " + b"[" * 2000)  # ended with a traceback
@example(b"public_url = 1979-05-27")
def test_any_bytes_as_a_file_give_settings_or_sentences(data):
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        loads(NEEDED, {}, file.name)


def usable(setting, value):
    try:
        return (KINDS[setting.kind](value),)
    except (ValueError, TypeError):
        return None


GOOD = {
    "count": ["1", "77"],
    "rate": ["60", "600"],
    "size": ["1k", "4MiB"],
    "duration": ["5s", "1h30m", "250ms"],
    "switch": ["true", "off"],
    "list": ["", "a,b"],
    "names": ["", "a,b"],
    "origins": ["", "https://a.example,https://b.example"],
    "schemes": ["", "a,b"],
    "networks": ["10.0.0.0/8", ""],
    "log_format": ["json", "text"],
    "log_addresses": ["full", "network", "off"],
    "address": ["127.0.0.1:1", "[::1]:2"],
    "any_address": ["", "127.0.0.1:3"],
    "any_url": ["", "https://a.example"],
    "base_url": ["https://a.example/x"],
    "origin": ["https://b.example"],
    "text": ["words"],
    "path": ["/tmp/x"],
    "command": ["program", "a,b"],
    "forgejo_scopes": ["read:user"],
    "store_url": [""],
    "broker_name": ["", "b1"],
}


@settings(max_examples=200)
@given(data=st.data())
def test_of_all_sources_the_nearest_wins_and_its_name_is_kept(data):
    chosen = data.draw(
        st.lists(st.sampled_from(PLAIN), min_size=1, max_size=4, unique_by=lambda setting: setting.name)
    )
    layers = [{}, {}, {}]
    for setting in chosen:
        for layer in layers:
            if data.draw(st.booleans()):
                layer[setting.name] = data.draw(st.sampled_from(GOOD[setting.kind]))
    file_values, environ, flags = layers
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(written({**NEEDED, **file_values}))
        file.flush()
        loaded = loads(
            flags, {f"FJMCP_BROKER_{name.upper()}": value for name, value in environ.items()}, file.name
        )
        for setting in chosen if loaded else ():
            expected, source = setting.default, "default"
            for layer, name in (
                (({**NEEDED, **file_values}), "file"),
                (environ, "environment"),
                (flags, "flag"),
            ):
                if setting.name in layer:
                    expected, source = layer[setting.name], name
            assert expected is not REQUIRED and (getattr(loaded, setting.name),) == usable(setting, expected)
            assert loaded.sources[setting.name].startswith(source)
        assert loaded or any(
            usable(setting, layer[setting.name]) in (None, ("",))
            or setting.name in ("max_body", "body_bytes")
            for setting in chosen
            for layer in layers
            if setting.name in layer
        )


@settings(max_examples=300)
@given(
    environ=st.dictionaries(
        st.sampled_from(NAMES).map(lambda name: "FJMCP_BROKER_" + name.upper()) | st.text(max_size=12),
        odd_texts,
        max_size=4,
    ),
    flags=st.dictionaries(keys, odd_texts, max_size=4),
)
@example({}, {"max_sessions": "\u0661"})
@example({"FJMCP_BROKER_": ""}, {})
def test_any_environment_and_flags_give_settings_or_sentences(environ, flags):
    loaded = loads({**NEEDED, **flags}, environ)
    if loaded:
        assert all(hasattr(loaded, setting.name) for setting in SETTINGS)
        assert all(
            getattr(loaded, setting.name) > 0
            for setting in SETTINGS
            if setting.kind in ("count", "rate", "size", "duration")
        )


words = st.sampled_from(
    [
        "--config",
        "--json",
        "--all",
        "--user",
        "serve",
        "check",
        "revoke",
        "--debug",
        "--max-sessions",
        "--max_sessions=1",
        "--",
        "--=",
        "-x",
        "true",
        "--key",
        "--clients",
        "--forgejo-url=",
    ]
) | st.text(max_size=12)


@settings(max_examples=300)
@given(arguments=st.lists(words, max_size=6))
@example(["--config"])
@example(["--", "--=x", "--json=no"])
def test_any_command_line_is_understood_or_a_sentence(arguments):
    try:
        parsed = parse_arguments(arguments)
    except ConfigurationError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
    else:
        assert isinstance(parsed.command, str) and all(
            isinstance(value, str) for value in parsed.flags.values()
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "/nowhere.toml"],
        ["--nonsense"],
        ["check", "--config"],
        ["frobnicate"],
        ["--max-sessions", "x", "users"],
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(arguments):
    finished = run_program(*arguments)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr and finished.stderr.strip()
