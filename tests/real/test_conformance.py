"""The official conformance suite before the real broker and its real OAuth.

There is a test for each scenario that a revision requires.

The suite runs once for each (child, revision) and module: what it wrote down of a scenario is what that
scenario's test judges.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import tomllib
from pathlib import Path

import pytest

from rigs.broker_process import Installation
from rigs.browser import Browser, approve_login
from rigs.client_rig import Program
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import OAuthClient
from run import end_group, start_group

HERE = Path(__file__).resolve().parent / "conformance"
SCENARIOS = tomllib.loads((HERE / "scenarios.toml").read_text())
CHILDREN = {"legacy": ("legacy-child.mjs",), "modern": ("modern-child.mjs",)}
FEWEST = {
    ("legacy", "2025-11-25"): 30,
    ("legacy", "2026-07-28"): 36,
    ("modern", "2025-11-25"): 28,
    ("modern", "2026-07-28"): 37,
}
# What the suite also runs but no revision requires, and that is promised here all the same.
BESIDES = {
    "2025-11-25": ["server-session-lifecycle", "json-schema-2020-12"],
    "2026-07-28": ["http-header-validation", "http-custom-header-server-validation", "json-schema-2020-12"],
}
SUITE_LIMIT = 240
START_LIMIT = 20

pytestmark = [pytest.mark.real("npm"), pytest.mark.timeout(300, func_only=True)]


def expected_failures(text):
    """{(child, revision): {scenario: why}} of expected-failures.yaml.

    Each scenario's reason is the comment above it.
    """
    found, run, why = {}, None, []
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+)-(\d{4}-\d\d-\d\d):( \[\])?", line):
            run = found[match[1], match[2]] = {}
        elif match := re.fullmatch(r"  # (.*)", line):
            why.append(match[1])
        elif match := re.fullmatch(r"  - ([\w-]+)", line):
            run[match[1]], why = " ".join(why), []
        else:
            assert not line or line.startswith("#"), f"not understood: {line!r}"
    return found


EXPECTED = expected_failures((HERE / "expected-failures.yaml").read_text())


def scenario_cases():
    """A pytest.param for each (child, revision, scenario)."""
    for child, revision in FEWEST:
        for scenario in SCENARIOS[revision] + BESIDES[revision]:
            why = EXPECTED[child, revision].get(scenario)
            marks = [pytest.mark.xdist_group(f"conformance-{child}")]
            marks += [pytest.mark.xfail(strict=True, reason=why)] if why else []
            yield pytest.param(child, revision, scenario, id=f"{child}-{revision}-{scenario}", marks=marks)


class Suite:
    """The suite, the children and the proxy laid out in a folder beside the modules they import."""

    def __init__(self, folder, node):
        self.folder, self.node = Path(folder), node
        shutil.copytree(HERE, self.folder, dirs_exist_ok=True)
        (self.folder / "node_modules").symlink_to(Path(node).parents[2])
        self.program = self.folder / "node_modules/@modelcontextprotocol/conformance/dist/index.js"

    def child(self, name):
        """The command of a child; the modern one refuses the older era."""
        return [
            "/usr/bin/env",
            "MODERN_ONLY=1",
            self.node,
            *(str(self.folder / "children" / part) for part in CHILDREN[name]),
        ]

    @contextlib.contextmanager
    def proxy(self, upstream, token):
        """The proxy that adds the token; gives its address."""
        words = [self.node, self.folder / "inject-bearer.mjs", upstream]
        with Program(words, environment={**os.environ, "BEARER": token}, patience=0) as process:
            yield f"http://127.0.0.1:{int(process.line())}"

    def run(self, url, revision, results):
        """Run the scenarios that the revision requires; {scenario: its checks}."""
        log = results.with_suffix(".log")
        with open(log, "wb") as output:
            subprocess.run(
                [
                    *(self.node, "--import", self.folder / "patient-timers.mjs", self.program, "server"),
                    *("--url", url, "--requirements", revision, "-o", results),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=SUITE_LIMIT,
            )
        return {
            scenario_of(path.parent.name): json.loads(path.read_text())
            for path in results.glob("*/checks.json")
        }


def scenario_of(folder):
    """The scenario whose results the suite wrote into a folder of this name."""
    return re.sub(r"-\d{4}-\d\d-\d\dT.*$", "", folder).removeprefix("server-")


@contextlib.contextmanager
def installation(folder, child, **settings):
    """The broker as a process before a fake Forgejo and this child."""
    folder.mkdir()
    forgejo = FakeForgejo().start()
    made = Installation(folder, forgejo, child, **settings)
    try:
        made.start()
        yield made
    finally:
        made.close()
        forgejo.stop()


@pytest.fixture(scope="module")
def shared(real_part, tmp_path_factory):
    """The Suite; what it starts lives as long as this module's tests."""
    return Suite(tmp_path_factory.mktemp("suite"), real_part("npm"))


@pytest.fixture(scope="module")
def outcomes(shared, tmp_path_factory):
    """A function of (child, revision): {scenario: checks} of the suite's one run."""
    kept = {}

    def outcome(child, revision):
        if (child, revision) not in kept:
            folder = tmp_path_factory.mktemp(f"{child}-{revision}")
            with installation(folder / "broker", shared.child(child)) as broker:
                client = OAuthClient(broker.url, name="conformance")
                client.login(None, "alice", "secret")
                with shared.proxy(broker.url, client.tokens["access_token"]) as url:
                    kept[child, revision] = shared.run(url + "/mcp", revision, folder / "results")
        return kept[child, revision]

    return outcome


@pytest.mark.parametrize("child, revision, scenario", list(scenario_cases()))
def test_scenario(outcomes, child, revision, scenario):
    checks = outcomes(child, revision).get(scenario)
    assert checks, f"{scenario} did not run"
    assert [
        (check["id"], check.get("errorMessage")) for check in checks if check["status"] == "FAILURE"
    ] == []


def test_the_required_scenarios_are_those_that_the_suite_has_frozen(shared):
    for revision, scenarios in SCENARIOS.items():
        text = (shared.program.parent.parent / "requirements" / f"{revision}.yaml").read_text()
        server = re.search(r"^server:\n((?:  - .*\n)+)", text, re.MULTILINE)[1]
        assert re.findall(r"  - (\S+)", server) == scenarios


@pytest.mark.parametrize("child, revision", list(FEWEST))
def test_few_enough_scenarios_are_expected_to_fail_and_each_has_its_reason(child, revision):
    expected = EXPECTED[child, revision]
    assert set(expected) <= set(SCENARIOS[revision]) and all(expected.values())
    assert len(SCENARIOS[revision]) - len(expected) >= FEWEST[child, revision]


# -- the authorization server


CLIENT = {
    "client_id": "conformance-client",
    "name": "Conformance",
    "redirect_uris": ["http://127.0.0.1/callback"],
}
EPHEMERAL = 32768  # below it no other process gets a port that it did not name


def unnamed_port():
    """A port for a program that must be told one.

    Outside the range the system gives out, another for each test process.
    """
    return 10000 + os.getpid() % (EPHEMERAL - 10000)


class Output(threading.Thread):
    """Reads a program's output to its end, and lets a test wait for a line of it."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self._stream, self._arrived, self.text = stream, threading.Condition(), ""
        self.start()

    def run(self):
        for line in self._stream:
            with self._arrived:
                self.text += line
                self._arrived.notify_all()

    def wait(self, pattern):
        """The first match of `pattern` in what was printed."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: re.search(pattern, self.text), START_LIMIT), self.text
            return re.search(pattern, self.text)[0]


def test_the_authorization_server_passes_with_a_preregistered_client_and_a_scripted_consent(shared, tmp_path):
    with installation(tmp_path / "broker", ["true"], clients=[CLIENT]) as broker:
        settings = tmp_path / "settings.json"
        settings.write_text(
            json.dumps({"url": broker.url, "clientId": CLIENT["client_id"], "resource": broker.url + "/mcp"})
        )
        port = str(unnamed_port())
        command = [
            shared.node,
            shared.program,
            "authorization",
            "--file",
            settings,
            "-p",
            port,
            "-o",
            tmp_path / "results",
        ]
        process = start_group(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output = Output(process.stdout)
            callback = approve_login(
                Browser(),
                output.wait(r"http://\S*response_type=code\S*"),
                "alice",
                "secret",
                redirect_uri=f"http://127.0.0.1:{port}/callback",
            )
            Browser().get(callback)
            process.wait(START_LIMIT)
            output.join(START_LIMIT)
        finally:
            end_group(process)
    checks = [
        check
        for path in (tmp_path / "results").glob("*/checks.json")
        for check in json.loads(path.read_text())
    ]
    assert len(checks) >= 3, output.text
    bodies = [
        check["details"].get("body", {}) for check in checks if check["id"] == "authorization-server-metadata"
    ]
    # Client ID Metadata Documents are advertised once they
    # work; until then the suite warns, and of nothing else.
    warned = (
        set()
        if bodies[0].get("client_id_metadata_document_supported")
        else {"authorization-server-metadata-cimd"}
    )
    assert {
        check["id"]: check["status"] for check in checks if check["status"] != "SUCCESS"
    } == dict.fromkeys(warned, "WARNING")
    assert process.returncode == 0, output.text
