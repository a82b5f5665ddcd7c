"""What an operator measures: every series from the start.

Prometheus' own tools, and the rules and the dashboard of docs/, against a running broker.
"""

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

import fjmcp_broker
from rigs.raw_http import ask, get

DOCS = Path(fjmcp_broker.__file__).parent / "docs"


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return "127.0.0.1:%d" % free.getsockname()[1]


@pytest.fixture
def measured(make_rig):
    rig = make_rig(metrics_listen=free_address())
    rig.metrics = f"http://{rig.values['metrics_listen']}/metrics"
    return rig


def scrape(rig):
    with urllib.request.urlopen(rig.metrics, timeout=20) as answer:
        return answer.read().decode()


def series(text):
    """{name and labels: value} of what was scraped."""
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def test_every_series_is_there_from_the_start_and_none_is_added(measured):
    before = series(scrape(measured))
    mcp = measured.session()
    mcp.call_tool("get_my_user_info")
    for path in ("/", "/nothing", "/.well-known/x", "/oauth/authorize?client_id=x", "/oauth/token", "/mcp"):
        ask(measured, get(measured, path))
    after = series(scrape(measured))
    assert set(before) == set(after)
    assert (
        before['fjmcp_events_total{event="login"}'] == 0 and after['fjmcp_events_total{event="login"}'] == 1
    )
    assert after['fjmcp_refusals_total{endpoint="other",reason="not_found"}'] == 1
    assert after['fjmcp_refusals_total{endpoint="mcp",reason="no_token"}'] >= 1
    assert after['fjmcp_refusals_total{endpoint="authorize",reason="unknown_client"}'] == 1
    assert after['fjmcp_http_request_duration_seconds_count{endpoint="token"}'] >= 1
    assert after['fjmcp_forgejo_request_duration_seconds_count{endpoint="userinfo",outcome="ok"}'] >= 1
    assert after["fjmcp_child_start_duration_seconds_count"] == 1
    assert (
        after["fjmcp_sessions"] == 1
        and sum(v for k, v in after.items() if k.startswith("fjmcp_children{")) == 1
    )
    assert "alice" not in scrape(measured)


def test_each_family_says_what_it_is_and_a_histogram_has_8_to_12_buckets():
    for family in fjmcp_broker.FAMILIES:
        assert family.help and family.kind in ("counter", "gauge", "histogram")
        assert family.kind != "histogram" or 8 <= len(family.buckets) <= 12


def test_a_histogram_counts_what_is_at_most_each_bound():
    metrics = fjmcp_broker.Metrics()
    for seconds in (0.005, 0.006, 1000):
        metrics.observe("fjmcp_tool_call_duration_seconds", ("ok",), seconds)
    values = series(metrics.text({}).decode())
    name = 'fjmcp_tool_call_duration_seconds_bucket{outcome="ok",le="%s"}'
    assert [values[name % bound] for bound in ("0.005", "0.01", "300", "+Inf")] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    "client_id, name, agent, word",
    [
        ("https://claude.ai/oauth/mcp-oauth-client-metadata", "", "", "claude"),
        ("https://chatgpt.com/oauth/codex/client.json", "", "", "codex"),
        ("https://chatgpt.com/oauth/x/client.json", "", "", "chatgpt"),
        ("fjd_x", "Visual Studio Code", "", "vscode"),
        ("fjd_x", "Claude Code (forgejo)", "", "claude"),
        ("", "", "Cursor/1.0", "cursor"),
        ("https://claude.ai.evil.example/", "evil", "", "other"),
        ("", "", "", "other"),
    ],
)
def test_clients_are_counted_under_known_words_only(client_id, name, agent, word):
    assert fjmcp_broker.known_client(client_id, name, agent) == word


def test_each_step_of_connecting_is_counted_for_the_client(measured):
    measured.login(name="Claude Code")
    values = series(scrape(measured))
    for step in ("registered", "authorize", "consent", "login", "token"):
        assert values[f'fjmcp_connect_total{{client="claude",step="{step}"}}'] == 1, step


def test_a_reason_that_no_table_knows_adds_no_series():
    metrics = fjmcp_broker.Metrics()
    metrics.count("fjmcp_refusals_total", ("mcp", "never heard of"))
    assert metrics.value("fjmcp_refusals_total", ("mcp", "other")) == 1


# -- Prometheus itself


@pytest.mark.real("promtool")
def test_promtool_finds_nothing_in_metrics_and_rules(real_part, measured):
    promtool = real_part("promtool")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(measured), text=True, capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    rules = subprocess.run(
        [promtool, "check", "rules", DOCS / "alerts.yml"], text=True, capture_output=True, timeout=60
    )
    assert rules.returncode == 0 and "rules found" in rules.stdout


def queries():
    """[(where, PromQL)] of the alerts and the dashboard."""
    dashboard = json.loads((DOCS / "dashboard.json").read_text())
    shown = [(p["title"], target["expr"]) for p in dashboard["panels"] for target in p["targets"]]
    return shown + [("alert", each) for each in re.findall(r"expr: (.+)", (DOCS / "alerts.yml").read_text())]


def test_rules_and_dashboard_name_only_metrics_that_there_are():
    known = {family.name for family in fjmcp_broker.FAMILIES}
    for where, query in queries():
        for name in re.findall(r"\b(?:fjmcp|process)_\w+", query):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, (where, name)


def ask_prometheus(url, path, **parameters):
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=20) as answer:
        return json.load(answer)["data"]


@pytest.mark.real("promtool")
def test_a_real_Prometheus_scrapes_a_broker_loads_the_rules_and_answers_the_dashboard(
    real_part, measured, tmp_path
):
    prometheus = Path(real_part("promtool")).parent / "root/usr/bin/prometheus"
    target = measured.values["metrics_listen"]
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [{json.dumps(str(DOCS / 'alerts.yml'))}]\n"
        f"scrape_configs: [{{job_name: fjmcp-broker, static_configs: [{{targets: "
        f"[{json.dumps(target)}]}}]}}]\n"
    )
    address = free_address()
    words = [
        prometheus,
        f"--config.file={configuration}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        url = f"http://{address}"
        deadline = time.monotonic() + 60
        while True:
            try:
                found = ask_prometheus(url, "query", query="fjmcp_build_info")["result"]
            except OSError:
                found = []
            if found:
                break
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        assert found[0]["metric"]["version"] == fjmcp_broker.__version__
        for _, query in queries():
            ask_prometheus(url, "query", query=query)  # one that cannot be evaluated is a 400
        groups = ask_prometheus(url, "rules")["groups"]
        assert len(groups[0]["rules"]) == (DOCS / "alerts.yml").read_text().count("- alert:")
    finally:
        process.terminate()
        process.wait(30)


def test_the_process_is_measured_where_proc_shows_processes_only(monkeypatch):
    """ProcSubset=pid of the shipped unit: /proc has no stat, meminfo and the like."""
    real = open

    def only_processes(path, *more, **named):
        assert not str(path).startswith("/proc/") or str(path).startswith("/proc/self/"), path
        return real(path, *more, **named)

    monkeypatch.setattr("builtins.open", only_processes)
    found = fjmcp_broker.process_metrics()
    began = found["process_start_time_seconds", ()]
    assert 0 < began <= time.time() and found["process_resident_memory_bytes", ()] > 0
