"""Clients that open a browser reach the suite's person.

On a desktop, whose handler of links must never start, and where nothing can open links.
"""

import os

import pytest

from rigs import client_rig, real_clients

OPENERS = ("FastMCP", "mcp-remote", "mcpc", "Inspector's command line")
ENTRY = """[Desktop Entry]
Type=Application
Name=A browser
Exec={program} %u
MimeType=x-scheme-handler/http;x-scheme-handler/https;
"""
DEFAULTS = "[Default Applications]\nx-scheme-handler/http=trap.desktop\nx-scheme-handler/https=trap.desktop\n"

pytestmark = pytest.mark.timeout(180, func_only=True)


def openers():
    """The clients that open a browser; one of them is enough for a usual run."""
    for name in OPENERS:
        entry = real_clients.TABLE[name]
        marks = [pytest.mark.real(*entry.parts, "desktop")]
        yield pytest.param(entry, id=name, marks=marks if name == "mcpc" else [*marks, pytest.mark.second])


@pytest.fixture
def desktop(real_part, tmp_path, monkeypatch):
    """The file that exists once a browser has been started on this desktop.

    xdg-utils is first on PATH, with a browser registered for links.
    """
    called = tmp_path / "browser-was-called"
    applications = tmp_path / "share" / "applications"
    applications.mkdir(parents=True)
    trap = client_rig.write_program(tmp_path / "trap", f"echo \"$@\" >> '{called}'")
    (applications / "trap.desktop").write_text(ENTRY.format(program=trap))
    for folder in (applications, tmp_path / "etc"):
        folder.mkdir(exist_ok=True)
        (folder / "mimeapps.list").write_text(DEFAULTS)
    programs = os.path.dirname(real_part("desktop"))
    monkeypatch.setenv("PATH", programs + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setenv("XDG_CURRENT_DESKTOP", "X-Generic")
    monkeypatch.setenv("DISPLAY", ":9999")
    monkeypatch.setenv("BROWSER", str(trap))
    return called


def check(entry, rig, real_part, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with entry.start(real_part, rig.url + "/mcp", home) as client:
        assert "alice" in client.call("get_my_user_info")["text"]
        assert client.logins == 1


@pytest.mark.real("desktop")
def test_the_desktop_of_these_tests_does_open_its_browser(desktop, real_part):
    """Or else the tests below would show nothing."""
    done = client_rig.run_program([real_part("desktop"), "http://127.0.0.1:1/"], environment=os.environ)
    assert desktop.read_text() == "http://127.0.0.1:1/\n", done.stderr


@pytest.mark.parametrize("entry", list(openers()))
def test_on_a_desktop_a_client_opens_the_suites_person_and_no_browser(
    entry, desktop, rig, real_part, tmp_path
):
    check(entry, rig, real_part, tmp_path)
    assert not desktop.exists()


@pytest.mark.parametrize("entry", list(openers()))
def test_without_anything_that_opens_links_a_client_opens_the_suites_person(
    entry, rig, real_part, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("BROWSER", "DISPLAY", "XDG_DATA_DIRS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    check(entry, rig, real_part, tmp_path)
