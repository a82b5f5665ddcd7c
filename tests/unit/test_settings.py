"""Settings: one table, four sources, every problem at once."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fjmcp_broker
from fjmcp_broker import REQUIRED, SETTING, SETTINGS, ConfigurationError, load_settings
from rigs.broker_process import BROKER, run_program

NEEDED = {
    "public_url": "https://mcp.example.org",
    "forgejo_url": "https://forge.example.org",
    "forgejo_oauth_client_id": "id",
    "forgejo_oauth_client_secret": "canary-secret",
}


def load(flags=(), environ=(), config=None, **more):
    return load_settings({**NEEDED, **dict(flags), **more}, dict(environ), config)


def problems(**values):
    with pytest.raises(ConfigurationError) as error:
        load(**values)
    return error.value.problems


def test_precedence_is_flag_environment_file_default(tmp_path):
    config = tmp_path / "b.toml"
    config.write_text("max_sessions = 11\nmax_inflight = 12\nmax_connections = 13\n")
    environ = {"FJMCP_BROKER_MAX_SESSIONS": "21", "FJMCP_BROKER_MAX_INFLIGHT": "22"}
    loaded = load(flags={"max_sessions": "31"}, environ=environ, config=str(config))
    assert (
        loaded.max_sessions,
        loaded.max_inflight,
        loaded.max_connections,
        loaded.max_sessions_per_user,
    ) == (31, 22, 13, 10)
    assert loaded.sources["max_sessions"] == "flag" and loaded.sources["max_inflight"] == "environment"
    assert (
        str(config) in loaded.sources["max_connections"]
        and loaded.sources["max_sessions_per_user"] == "default"
    )


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("session_idle_timeout", "90", 90),
        ("session_idle_timeout", "1h30m", 5400),
        ("session_idle_timeout", "250ms", 0.25),
        ("session_lifetime", "90d", 7776000),
        ("max_body", "4MiB", 4194304),
        ("max_body", "64k", 65536),
        ("max_body", "1 MB", 1048576),
        ("broker_name", "mcp-2", "mcp-2"),
        ("listen", "[::1]:0", ("::1", 0)),
        ("listen", "127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("debug", "yes", True),
        ("debug", "off", False),
        ("allowed_users", " alice, bob ,", ("alice", "bob")),
        ("allowed_users", "", ()),
        ("public_url", "https://MCP.Example.org:443/", "https://mcp.example.org"),
        ("public_url", "http://[::1]:8080", "http://[::1]:8080"),
        ("forgejo_url", "https://x.org/git/", "https://x.org/git"),
        ("forgejo_mcp_binary", "python3,-m,x", ("python3", "-m", "x")),
        ("forgejo_mcp_binary", "/opt/a b/mcp", "/opt/a b/mcp"),
        ("forgejo_oauth_scopes", "read:user  openid", "read:user openid"),
        ("forgejo_internal_url", "http://10.0.0.1:3000", "http://10.0.0.1:3000"),
    ],
)
def test_values_are_read_as_written(name, text, value):
    assert getattr(load(**{name: text}), name) == value


@pytest.mark.parametrize(
    "name, text",
    [
        ("public_url", "mcp.example.org"),
        ("public_url", "https://mcp.example.org/path"),
        ("public_url", "http://mcp.example.org"),
        ("public_url", "https://user@mcp.example.org"),
        ("public_url", "https://x.org?y"),
        ("public_url", "https://x.org:99999"),
        ("public_url", "ftp://x.org"),
        ("public_url", "https://x.org\r\nX: y"),
        ("public_url", "https://ex\u00e4mple.org"),
        ("forgejo_url", "http://forge.example.org"),
        ("listen", "8080"),
        ("listen", "x:y"),
        ("listen", "127.0.0.1:70000"),
        ("listen", ""),
        ("listen", ":80"),
        ("session_idle_timeout", "soon"),
        ("session_idle_timeout", "-5m"),
        ("session_idle_timeout", "0"),
        ("session_idle_timeout", "5 fortnights"),
        ("max_sessions", "0"),
        ("max_sessions", "1.5"),
        ("max_sessions", "many"),
        ("max_body", "4 gallons"),
        ("debug", "perhaps"),
        ("rate_register", "10"),
        ("trusted_proxies", "10.0.0.0/99"),
        ("log_format", "xml"),
        ("forgejo_mcp_binary", ""),
        ("forgejo_oauth_scopes", "read:repo"),
        ("forgejo_oauth_scopes", "openid profile email"),
        ("forgejo_oauth_scopes", "read:user,read:issue"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_name(name, text):
    found = problems(**{name: text})
    assert len(found) == 1 and name in found[0] and ("flag" in found[0] or "missing" in found[0])


def test_scopes_without_an_API_scope_would_mean_all_power_and_say_so():
    assert "grant everything" in problems(forgejo_oauth_scopes="openid email")[0]


def test_all_problems_come_at_once_with_key_and_source(tmp_path):
    config = tmp_path / "b.toml"
    config.write_text(
        'max_sessions = "x"\nmax_sesions = 3\nlisten = "nowhere"\n[[clients]]\nname = "no id"\n'
    )
    with pytest.raises(ConfigurationError) as error:
        load_settings(
            {"debug": "perhaps"}, {"FJMCP_BROKER_MAX_BODY": "big", "FJMCP_BROKER_NOTHING": "1"}, str(config)
        )
    text = str(error.value)
    for part in (
        f"file {config}: max_sessions",
        f"file {config}: unknown setting 'max_sesions'; did you mean 'max_sessions'?",
        "listen",
        "flag: debug",
        "environment: max_body",
        "unknown setting 'nothing'",
        "clients",
        "public_url is missing",
        "forgejo_url is missing",
    ):
        assert part in text, part
    assert "--public-url" in text and "FJMCP_BROKER_PUBLIC_URL" in text


@pytest.mark.parametrize(
    "given", [{"max_body": "17MiB"}, {"body_bytes": "15MiB"}, {"max_body": "1025KiB", "body_bytes": "4MiB"}]
)
def test_max_body_may_be_a_quarter_of_body_bytes_and_no_more(given):
    (problem,) = problems(**given)
    assert "max_body = " in problem and "body_bytes = " in problem
    assert load(max_body="1MiB", body_bytes="4MiB").body_bytes == 4 << 20


@pytest.mark.parametrize("name", ["A", "a.b", "a_b", "a b", "a" * 21])
def test_the_name_of_a_broker_can_stand_before_a_dot_in_a_header(name):
    (problem,) = problems(broker_name=name)
    assert "broker_name" in problem


def test_a_secret_is_never_shown_in_an_error():
    assert "canary" not in str(problems(key="canary\x00key"))


def test_every_text_can_come_from_a_file(tmp_path):
    (tmp_path / "secret").write_text("from a file\n")
    values = {name: value for name, value in NEEDED.items() if name != "forgejo_oauth_client_secret"}
    loaded = load_settings({**values, "forgejo_oauth_client_secret_file": str(tmp_path / "secret")}, {})
    assert loaded.forgejo_oauth_client_secret == "from a file"
    with pytest.raises(ConfigurationError, match="forgejo_oauth_client_secret_file: cannot read"):
        load_settings({**values, "forgejo_oauth_client_secret_file": "/nowhere"}, {})
    environ = {"FJMCP_BROKER_FORGEJO_OAUTH_CLIENT_SECRET_FILE": str(tmp_path / "secret")}
    assert load_settings(values, environ).forgejo_oauth_client_secret == "from a file"


def test_a_number_is_not_taken_for_an_open_file(tmp_path):
    (tmp_path / "b.toml").write_text("forgejo_oauth_client_id_file = 0\nsecrets_file = 0\n")
    found = problems(config=str(tmp_path / "b.toml"))
    assert (
        len(found) == 2
        and "forgejo_oauth_client_id_file: cannot read 0: must be text" in found[0]
        and "secrets_file = 0" in found[1]
    )


def test_a_secrets_file_holds_secrets_and_nothing_else(tmp_path):
    secrets = tmp_path / "s.toml"
    secrets.write_text('forgejo_oauth_client_secret = "kept apart"\n')
    values = {name: value for name, value in NEEDED.items() if name != "forgejo_oauth_client_secret"}
    assert (
        load_settings({**values, "secrets_file": str(secrets)}, {}).forgejo_oauth_client_secret
        == "kept apart"
    )
    secrets.write_text('forgejo_oauth_client_secret = "kept apart"\nlisten = "127.0.0.1:1"\n')
    with pytest.raises(ConfigurationError, match="'listen' is not a secret setting"):
        load_settings({**values, "secrets_file": str(secrets)}, {})


def test_a_secrets_file_can_be_standard_input(tmp_path):
    done = run_program(
        "--secrets-file",
        "/dev/stdin",
        "--public-url",
        "https://mcp.example.org",
        "--forgejo-url",
        "http://127.0.0.1:1",
        "--forgejo-oauth-client-id",
        "id",
        "--store-path",
        str(tmp_path / "b.db"),
        "check",
        stdin='forgejo_oauth_client_secret = "x"\n',
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "is missing" not in done.stdout and "forgejo_url" in done.stdout


CLIENTS = """
[[clients]]
client_id = "a"
redirect_uris = ["https://x.example/cb"]
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        (CLIENTS + CLIENTS, "twice"),
        (CLIENTS.replace("redirect_uris", "uris"), "unknown key"),
        (CLIENTS.replace('"a"', '""'), "client_id"),
        (CLIENTS.replace('["https://x.example/cb"]', "[]"), "needs redirect_uris"),
        (CLIENTS + "name = 3\n", "must be text"),
        (CLIENTS + "client_secret = 3\n", "must be text"),
        ("clients = 3", "[[clients]]"),
        (CLIENTS.replace('["https://x.example/cb"]', '["http://evil.example/cb"]'), "is http"),
        (CLIENTS.replace('["https://x.example/cb"]', '["javascript:alert(1)"]'), "never allowed"),
    ],
)
def test_a_pre_registered_client_is_checked_like_any_other(tmp_path, text, expected):
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        fjmcp_broker.check_configured_clients(load(config=str(tmp_path / "b.toml")))


def test_clients_come_from_the_file_only():
    assert "in the configuration file only" in problems(clients="x")[0]


def test_reload_takes_what_may_change_and_names_what_may_not():
    running, newer = load(), load(max_sessions="7", listen="127.0.0.1:9", allowed_users="alice")
    assert running.reload(newer) == ["listen"]
    assert (running.max_sessions, running.allowed_users, running.listen) == (
        7,
        ("alice",),
        ("127.0.0.1", 8080),
    )


@pytest.mark.parametrize(
    "name, default",
    [
        ("listen", ("127.0.0.1", 8080)),
        ("forgejo_mcp_binary", "forgejo-mcp"),
        ("store_path", "broker.db"),
        ("max_sessions", 50),
        ("max_sessions_per_user", 10),
        ("max_session_rows_per_user", 1000),
        ("session_idle_timeout", 900),
        ("session_lifetime", 90 * 86400),
        ("access_token_lifetime", 3600),
        ("refresh_token_lifetime", 90 * 86400),
        ("request_timeout", 300),
        ("input_timeout", 600),
        ("max_connections", 3072),
        ("max_requests_per_user", 128),
        ("max_requests_per_address", 64),
        ("max_streams_per_user", 64),
        ("body_bytes", 64 << 20),
        ("max_body", 4 << 20),
        ("max_line", 16 << 20),
        ("max_inflight", 32),
        ("stream_events", 256),
        ("stream_bytes", 1 << 20),
        ("header_timeout", 10),
        ("body_timeout", 30),
        ("write_timeout", 30),
        ("code_lifetime", 60),
        ("login_lifetime", 600),
        ("allowed_redirect_schemes", ("cursor", "vscode", "vscode-insiders", "jetbrains", "claude")),
        ("read_only_tools", ("get_*", "list_*", "search_*", "check_*", "download_*")),
        ("child_keeps_state", False),
        ("strict_scopes", False),
    ],
)
def test_defaults_are_those_of_the_contract(name, default):
    assert getattr(load(), name) == default


TYPES = {
    **dict.fromkeys(
        (
            "text",
            "path",
            "origin",
            "base_url",
            "any_url",
            "forgejo_scopes",
            "log_format",
            "log_addresses",
            "broker_name",
            "store_url",
        ),
        "str",
    ),
    **dict.fromkeys(("list", "names", "origins", "schemes"), "tuple[str, ...]"),
    **dict.fromkeys(("count", "rate", "size"), "int"),
    "duration": "float",
    "switch": "bool",
    "address": "tuple[str, int]",
    "any_address": "tuple[str, int] | None",
    "networks": "tuple[Network, ...]",
    "command": "str | tuple[str, ...]",
    "clients": "tuple[ConfiguredClient, ...]",
    "tool_rules": "tuple[ToolRule, ...]",
}


def test_the_types_of_the_settings_are_those_of_the_table():
    declared = {setting.name: TYPES[setting.kind] for setting in SETTINGS}
    assert fjmcp_broker.Settings.__annotations__ == declared


@pytest.mark.parametrize(
    "name",
    ["allowed_users", "allowed_groups", "allowed_origins", "allowed_redirect_schemes", "read_only_tools"],
)
@pytest.mark.parametrize("text", ["alice bob", '["alice"', "'alice'", ["alice bob"], "`alice`", "alice\tbob"])
def test_a_list_that_is_not_separated_by_commas_is_refused_and_says_how_it_is_written(name, text):
    (problem,) = problems(**{name: text})
    assert name in problem and "separated by commas" in problem


def test_each_problem_of_a_file_names_its_line(tmp_path):
    config = tmp_path / "b.toml"
    config.write_text(
        'secrets_file = "s.toml"\n'
        'forgejo_oauth_scopes = """\\\n  read:user\nmax_sessions = 1\n"""\n'
        "# max_sessions = 2\n"
        '  "max_sessions" = "x"\n'
        "max_sesions = 3\n"
        "log_format_file = 3\n"
        'max_body = "17MiB"\n'
        '[[clients]]\nname = "no id"\n'
        "[max_line]\nx = 1\n",
    )
    with pytest.raises(ConfigurationError) as error:
        load_settings(NEEDED, {}, str(config))
    lines = {
        "forgejo_oauth_scopes": 2,
        "max_sessions": 7,
        "max_sesions": 8,
        "log_format_file": 9,
        "max_body": 10,
        "clients": 11,
        "max_line": 13,
    }
    found = [problem for problem in error.value.problems if "(line" in problem]
    assert len(found) == len(lines)
    for name, line in lines.items():
        assert [problem for problem in found if name in problem and problem.endswith(f" (line {line})")], name


def test_a_problem_of_the_secrets_file_names_its_line(tmp_path):
    secrets = tmp_path / "s.toml"
    secrets.write_text('\n\nlisten = "127.0.0.1:1"\n')
    (problem,) = problems(secrets_file=str(secrets))
    assert problem == f"file {secrets}: 'listen' is not a secret setting and does not belong here (line 3)"


@pytest.fixture
def current_folder(tmp_path, monkeypatch):
    """An empty current folder of ours, and a file for /etc's beside it."""
    folder = tmp_path / "here"
    folder.mkdir(mode=0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fjmcp_broker, "SYSTEM_CONFIGURATION", str(tmp_path / "etc.toml"))
    return folder


def test_without_a_file_there_is_no_configuration_file(current_folder):
    assert fjmcp_broker.find_configuration({}) is None


def test_the_environment_names_the_file_before_the_current_folder_and_that_before_the_systems(
    current_folder, tmp_path
):
    (tmp_path / "etc.toml").write_text("")
    assert fjmcp_broker.find_configuration({}) == str(tmp_path / "etc.toml")
    (current_folder / "broker.toml").write_text("")
    assert fjmcp_broker.find_configuration({}) == "broker.toml"
    assert fjmcp_broker.find_configuration({"FJMCP_BROKER_CONFIG": "/x.toml"}) == "/x.toml"


@pytest.mark.parametrize("which", ["file", "folder", "the folder of the file that a link leads to"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_file_of_the_current_folder_that_another_may_have_written_is_not_read_and_said_so(
    current_folder, tmp_path, which, mode
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    file = elsewhere / "real.toml" if "link" in which else current_folder / "broker.toml"
    file.write_text("max_sessions = 7\n")
    if "link" in which:
        (current_folder / "broker.toml").symlink_to(file)
    assert fjmcp_broker.find_configuration({}) == "broker.toml"
    open_one = {"file": file, "folder": current_folder}.get(which, elsewhere)
    open_one.chmod(open_one.stat().st_mode | mode)
    assert fjmcp_broker.find_configuration({}) is None
    with pytest.raises(ConfigurationError, match="broker.toml was not read.*--config broker.toml"):
        load_settings({}, {}, None)


def test_a_file_of_the_current_folder_that_belongs_to_another_is_not_read(current_folder, monkeypatch):
    (current_folder / "broker.toml").write_text("")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert fjmcp_broker.find_configuration({}) is None


def test_the_program_reads_the_file_of_the_current_folder(current_folder):
    (current_folder / "broker.toml").write_text('max_sessions = "many"\n')
    (current_folder / "broker.toml").chmod(0o600)
    done = run_program("users", cwd=current_folder)
    assert done.returncode == 2 and "file broker.toml: max_sessions = 'many'" in done.stderr


def test_an_older_Python_gets_a_sentence():
    source = BROKER.read_text()
    ast.parse(source, feature_version=(3, 8))
    pretend = (
        "import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0); sys.version = '3.10.13 (x)';"
        " sys.modules['tomllib'] = None; runpy.run_path(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", pretend, str(BROKER)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr == "fjmcp-broker needs Python 3.11 or newer; this is Python 3.10.13\n"


def test_every_setting_is_in_help_and_has_a_sentence():
    shown = subprocess.run(
        [sys.executable, str(BROKER), "--help"], capture_output=True, text=True, timeout=30
    ).stdout
    for setting in SETTINGS:
        assert len(setting.help) > 8 and setting.kind in fjmcp_broker.KINDS
        assert (
            setting.kind in fjmcp_broker.FILE_ONLY_KINDS or f"--{setting.name.replace('_', '-')}\n" in shown
        )
        assert (
            setting.default is REQUIRED
            or setting.kind in fjmcp_broker.FILE_ONLY_KINDS
            or fjmcp_broker.KINDS[setting.kind](setting.default) is not NotImplemented
        )


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.dates()
    | st.sampled_from(["1h", "4MiB", "127.0.0.1:1", "https://x.org", "read:user", "a,b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from([name for name in SETTING if name not in ("secrets_file",)]), value=VALUES)
def test_any_value_for_any_key_gives_settings_or_a_sentence(name, value):
    try:
        load(**{name: value})
    except ConfigurationError as error:
        assert all(isinstance(problem, str) and problem for problem in error.problems)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_any_file_gives_settings_or_a_sentence(text):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        try:
            load(config=file.name)
        except ConfigurationError as error:
            assert file.name in str(error)
        else:
            with open(file.name, "rb") as written:
                assert not tomllib.load(written)


# -- the database of several brokers

STORE = "postgresql://fjmcp@127.0.0.1/fjmcp"
KEY = {"key": "k" * 43 + "="}


@pytest.mark.parametrize(
    "url, parameters",
    [
        (STORE, {"user": "fjmcp", "host": "127.0.0.1", "dbname": "fjmcp"}),
        ("postgres://u%40x@[::1]:5433/d", {"user": "u@x", "host": "::1", "port": "5433", "dbname": "d"}),
        ("postgresql:///d", {"dbname": "d"}),
        (
            "postgresql://u@%2Frun%2Fpostgresql/d?connect_timeout=3",
            {"user": "u", "host": "/run/postgresql", "dbname": "d", "connect_timeout": "3"},
        ),
        ("postgresql://u@/d?host=/run/postgresql", {"user": "u", "dbname": "d", "host": "/run/postgresql"}),
        (
            "postgresql://u@a.example:1,b.example/d?sslmode=verify-full&sslrootcert=/etc/a%20b.pem",
            {
                "user": "u",
                "host": "a.example,b.example",
                "port": "1,",
                "dbname": "d",
                "sslmode": "verify-full",
                "sslrootcert": "/etc/a b.pem",
            },
        ),
    ],
)
def test_a_store_url_is_read_as_libpq_reads_it(url, parameters):
    assert fjmcp_broker.postgresql_parameters(url) == parameters
    assert load_settings({**NEEDED, **KEY, "store_url": url}, {}).store_url == url


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("mysql://u@127.0.0.1/d", "must be such as postgresql://"),
        ("postgresql://u:secret@127.0.0.1/d", "store_password"),
        ("postgresql://u@127.0.0.1/d?password=secret", "'password'"),
        ("postgresql://u@127.0.0.1/d?service=other", "'service'"),
        ("postgresql://u@127.0.0.1/d?sslmode", "'sslmode'"),
        ("postgresql://u@127.0.0.1:5432:1/d", "neither HOST nor HOST:PORT"),
        ("postgresql://u@127.0.0.1/d?port=1,2", "as many"),
        ("postgresql://u@db.internal/d", "sslmode=verify-full"),
        ("postgresql://u@db.internal/d?sslmode=require", "sslmode=verify-full"),
        ("postgresql://u@db.internal/d?sslmode=verify-ca", "sslmode=verify-full"),
        ("postgresql://u@127.0.0.1,db.internal/d", "sslmode=verify-full"),
        ("postgresql://u@127.0.0.1/d?host=db.internal", "sslmode=verify-full"),
        ("postgresql://u@127.0.0.1/d?hostaddr=192.0.2.1", "sslmode=verify-full"),
        ("postgresql://u@a.example,b.example/d?hostaddr=127.0.0.1,", "sslmode=verify-full"),
        ("postgresql://u@localhost.evil.example/d", "sslmode=verify-full"),
    ],
)
def test_a_store_url_that_cannot_be_is_refused_and_shown_nowhere(url, sentence):
    with pytest.raises(ConfigurationError) as error:
        load_settings({**NEEDED, **KEY, "store_url": url}, {})
    assert sentence in str(error.value) and url not in str(error.value) and "secret" not in str(error.value)


def test_a_store_of_several_brokers_needs_a_key_and_children_that_keep_no_state():
    with pytest.raises(ConfigurationError, match="store_url: key or key_file must be given"):
        load_settings({**NEEDED, "store_url": STORE}, {})
    with pytest.raises(ConfigurationError, match="store_url: it cannot be with child_keeps_state"):
        load_settings({**NEEDED, **KEY, "store_url": STORE, "child_keeps_state": "true"}, {})
    assert load_settings({**NEEDED, "key_file": "k", "store_url": STORE}, {}).store_url == STORE


def test_the_stores_password_is_a_secret(tmp_path):
    (tmp_path / "password").write_text("correct horse\n")
    values = {**NEEDED, **KEY, "store_url": STORE, "store_password_file": str(tmp_path / "password")}
    assert load_settings(values, {}).store_password == "correct horse"
    assert "correct horse" not in repr(fjmcp_broker.store_place(load_settings(values, {})))
