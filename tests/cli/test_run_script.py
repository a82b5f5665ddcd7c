"""tests/run.py: the parts that decide.

Which Pythons run, what an install left, and what a missing part means.
"""

import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import pytest

import run
from rigs import real_parts


def python(major, minor, micro=0):
    return run.Python((major, minor, micro), "/somewhere/python%d.%d" % (major, minor))


def program(path, text="#!/bin/sh\nexit 1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def finder(*versions):
    there = {found.version[:2]: found for found in versions}
    return there.get


# Pythons


def test_the_running_interpreter_is_probed_with_its_own_version():
    found = run.probe_python(sys.executable)
    assert found.version == tuple(sys.version_info[:3])


def test_a_shim_that_starts_nothing_is_no_python(tmp_path):
    assert run.probe_python(program(tmp_path / "python3.13")) is None


def test_a_path_that_is_not_there_is_no_python(tmp_path):
    assert run.probe_python(tmp_path / "python3.13") is None


def test_path_comes_before_pyenv_and_only_the_wanted_version_is_offered(tmp_path):
    on_path = program(tmp_path / "bin" / "python3.13")
    program(tmp_path / "bin" / "python3.11")
    in_pyenv = program(tmp_path / ".pyenv" / "versions" / "3.13.0" / "bin" / "python3")
    program(tmp_path / ".pyenv" / "versions" / "3.1.3" / "bin" / "python3")
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    assert list(run.candidate_paths((3, 13), environ)) == [str(on_path), str(in_pyenv)]


def test_a_pyenv_elsewhere_is_searched_and_an_empty_path_entry_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(program(tmp_path / "here" / "python3.11").parent)
    in_pyenv = program(tmp_path / "env" / "versions" / "3.11.7" / "bin" / "python3")
    environ = {"PATH": ":", "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "env")}
    assert list(run.candidate_paths((3, 11), environ)) == [str(in_pyenv)]


def test_a_candidate_of_another_version_or_none_is_passed_over(tmp_path):
    broken = program(tmp_path / "a" / "python3.13")
    lying = program(tmp_path / "b" / "python3.13")
    good = program(tmp_path / "c" / "python3.13")
    answers = {str(broken): None, str(lying): python(3, 12), str(good): python(3, 13)}
    environ = {
        "PATH": os.pathsep.join(str(path.parent) for path in (broken, lying, good)),
        "HOME": str(tmp_path),
    }
    assert run.find_python((3, 13), environ, answers.get) == python(3, 13)


@pytest.mark.parametrize(
    ("running", "there", "chosen"),
    [
        (python(3, 11), [python(3, 11), python(3, 13)], (python(3, 11), python(3, 13))),
        (python(3, 13), [python(3, 11), python(3, 13)], (python(3, 13), python(3, 11))),
        (python(3, 12), [python(3, 11), python(3, 13)], (python(3, 12), python(3, 13))),
        (python(3, 12), [python(3, 11)], (python(3, 12), python(3, 11))),
        (python(3, 11), [python(3, 11)], (python(3, 11), None)),
        (python(3, 10), [python(3, 11), python(3, 13)], (python(3, 13), python(3, 11))),
        (python(3, 10), [], (None, None)),
        (None, [python(3, 11)], (python(3, 11), None)),
    ],
)
def test_the_running_python_is_main_if_new_enough_and_the_second_is_another(running, there, chosen):
    assert run.choose_pythons(running, finder(*there)) == chosen


# Locks and folders


@pytest.mark.parametrize("lock", sorted(path.name for path in run.LOCKS.glob("*.txt")))
def test_a_lock_pins_every_package_with_hashes_and_names_no_index(lock):
    text = (run.LOCKS / lock).read_text()
    assert "://" not in text and "--index" not in text
    entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)
    assert entries[0] == "" and len(entries) > 5
    for entry in entries[1:]:
        assert re.match(r"[a-z0-9.-]+(\[\w+\])?==[^ ]+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_another_lock_text_or_python_means_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOCKS", tmp_path)
    (tmp_path / "ring1.txt").write_text("pytest==1\n")
    first = run.venv_folder("cache", "ring1", python(3, 11, 7))
    assert run.venv_folder("cache", "ring1", python(3, 11, 8)) != first
    (tmp_path / "ring1.txt").write_text("pytest==2\n")
    assert run.venv_folder("cache", "ring1", python(3, 11, 7)) != first
    assert run.forgejo_mcp_folder("cache", {}) != run.forgejo_mcp_folder(
        "cache", {"FORGEJO_MCP": "/bin/other"}
    )


def test_the_tests_look_for_a_part_where_the_run_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FJMCP_CACHE", str(tmp_path))
    parts = run.real_parts(tmp_path, run.probe_python(sys.executable))
    assert real_parts.part_folders() == {name: folder for name, (folder, _) in parts.items()}
    assert len(set(real_parts.part_folders().values())) == len(parts)


# Stamps


def test_without_an_install_the_stamp_is_missing(tmp_path):
    assert run.read_stamp(tmp_path / "mcp1")[0] == "missing"


def test_a_good_install_leaves_its_program_and_is_not_repeated(tmp_path):
    tool = program(tmp_path / "tool")
    assert run.install(tmp_path / "part", lambda folder: tool) == ("ok", str(tool))

    def again(folder):
        raise AssertionError("installed twice")

    assert run.install(tmp_path / "part", again) == ("ok", str(tool))


def test_an_install_whose_program_vanished_is_repeated(tmp_path):
    tool = program(tmp_path / "tool")
    run.install(tmp_path / "part", lambda folder: tool)
    tool.unlink()
    assert run.read_stamp(tmp_path / "part")[0] == "missing"
    other = program(tmp_path / "other")
    run.install(tmp_path / "part", lambda folder: other)
    assert run.read_stamp(tmp_path / "part") == ("ok", str(other))


def test_a_failed_install_leaves_its_reason_and_is_tried_again_in_an_empty_folder(tmp_path):
    def fails(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise run.InstallFailed("the network is away")

    assert run.install(tmp_path / "part", fails) == ("failed", "the network is away")
    assert run.read_stamp(tmp_path / "part") == ("failed", "the network is away")
    found = []

    def works(folder):
        found.append(folder.exists())
        return program(folder / "tool")

    assert run.install(tmp_path / "part", works)[0] == "ok"
    assert found == [False]


def test_a_waiter_gets_the_stamp_of_the_install_under_way_and_not_the_state_before(tmp_path):
    folder, tool, seen = tmp_path / "part", program(tmp_path / "tool"), []
    waiting = threading.Event()

    def wait():
        waiting.set()
        seen.append(run.await_stamp(folder))

    with run.folder_lock(folder, fcntl.LOCK_EX):
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert waiting.wait(30)
        run.install_locked(folder, lambda place: tool)
    waiter.join(30)
    assert seen == [("ok", str(tool))]


def test_when_installs_have_started_no_test_can_look_before_they_end(tmp_path):
    part, tool, go = tmp_path / "part", program(tmp_path / "tool"), threading.Event()

    def slow(folder, commands):
        assert go.wait(30)
        return tool

    installs = run.BackgroundInstalls(tmp_path, run.probe_python(sys.executable), run.Commands())
    installs._parts = {"part": (part, slow)}
    installs.start()
    with pytest.raises(BlockingIOError), run.folder_lock(part, fcntl.LOCK_SH | fcntl.LOCK_NB):
        pass
    go.set()
    assert run.await_stamp(part) == ("ok", str(tool))
    installs.join()
    assert installs.outcomes == {"part": ("ok", str(tool))}


# Skip or failure


def test_a_missing_part_is_a_skip_with_its_name_and_in_ci_a_failure():
    why = "real part mcp2: no network"
    assert run.on_missing_part("mcp2", "failed", "no network", ci=False) == ("skip", why)
    assert run.on_missing_part("mcp2", "failed", "no network", ci=True) == ("fail", why)
    assert run.on_missing_part("mcp2", "missing", "no network", ci=True) == ("fail", why)


@pytest.mark.parametrize("ci", [False, True])
def test_a_part_that_is_there_is_neither(ci):
    assert run.on_missing_part("mcp2", "ok", "/bin/tool", ci) is None


@pytest.mark.parametrize(
    ("environ", "answer"),
    [
        ({}, False),
        ({"CI": ""}, False),
        ({"CI": "false"}, False),
        ({"CI": "0"}, False),
        ({"CI": "true"}, True),
    ],
)
def test_ci_is_what_the_usual_variable_says(environ, answer):
    assert run.is_ci(environ) is answer


INNER_TEST = """
import pytest

@pytest.mark.real("mcp1")
def test_with_the_sdk(real_part):
    print("program", real_part("mcp1"))

def test_without():
    pass
"""


def inner_run(tmp_path, ci):
    """Run INNER_TEST in a pytest process of its own, with an empty cache; its output."""
    (tmp_path / "test_inner.py").write_text(INNER_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = real(name): real part\n")
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "CI", run.INSTALLS))
    }
    environ.update(
        FJMCP_CACHE=str(tmp_path / "cache"),
        PYTHONPATH=str(run.ROOT / "tests"),
        **({"CI": "true"} if ci else {}),
    )
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "rigs.real_parts",
        "-p",
        "no:cacheprovider",
        "-v",
        "-rs",
        str(tmp_path),
    ]
    return subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50)


def test_locally_a_test_without_its_part_is_skipped_by_name_and_runs_behind_the_others(tmp_path):
    done = inner_run(tmp_path, ci=False)
    assert done.returncode == 0, done.stdout
    assert "real part mcp1: not installed" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert done.stdout.index("test_without") < done.stdout.index("test_with_the_sdk")


def test_in_ci_a_test_without_its_part_fails_by_name(tmp_path):
    done = inner_run(tmp_path, ci=True)
    assert done.returncode == 1, done.stdout
    assert "real part mcp1: not installed" in done.stdout


# The given forgejo-mcp


def test_a_given_forgejo_mcp_is_taken_as_it_is(tmp_path):
    binary = program(tmp_path / "forgejo-mcp")
    assert run.install_forgejo_mcp(tmp_path / "part", run.Commands(), {"FORGEJO_MCP": str(binary)}) == str(
        binary
    )


def test_a_given_forgejo_mcp_that_is_no_program_is_an_error(tmp_path):
    with pytest.raises(run.InstallFailed, match="no program"):
        run.install_forgejo_mcp(tmp_path / "part", run.Commands(), {"FORGEJO_MCP": str(tmp_path / "none")})


# Commands and the report


def test_a_failing_command_is_named_with_its_status_and_the_end_of_its_output():
    with pytest.raises(run.InstallFailed, match=r"failed with status 3: .*last words"):
        run.Commands().run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"])


def test_stop_ends_the_command_under_way_and_lets_none_start(tmp_path):
    commands, failures = run.Commands(), []
    started = tmp_path / "started"
    os.mkfifo(started)

    def command():
        try:
            commands.run(
                [
                    sys.executable,
                    "-c",
                    "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(600)",
                    started,
                ]
            )
        except run.InstallFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=command)
    thread.start()
    started.read_text()
    commands.stop()
    thread.join(30)
    assert len(failures) == 1 and "status -9" in failures[0]
    with pytest.raises(run.InstallFailed, match="stopped"):
        commands.run([sys.executable, "-c", ""])


def test_a_run_over_its_limit_is_ended_with_a_status_of_its_own():
    status, lines = run.run_pytest(
        [sys.executable, "-uc", "import time; print('begun'); time.sleep(600)"], dict(os.environ), 0
    )
    assert status == 124


def test_what_a_test_left_running_with_its_output_does_not_hold_up_the_end(tmp_path):
    left = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], "
        "start_new_session=True).pid, flush=True)"
    )
    status, lines = run.run_pytest([sys.executable, "-c", left], dict(os.environ), 60)
    os.kill(int(lines[0]), signal.SIGKILL)
    assert status == 0


FAILING_TEST = """
def test_fails():
    assert 1 == 2
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_failure_is_printed_when_it_happens(tmp_path, workers):
    (tmp_path / "test_inner.py").write_text(FAILING_TEST)
    (tmp_path / "conftest.py").write_text(
        "from conftest_of_the_suite import pytest_runtest_logreport\n"
        "def pytest_sessionfinish(): print('no summary yet', flush=True)\n"
    )
    (tmp_path / "conftest_of_the_suite.py").write_text((run.ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    argv = [sys.executable, "-m", "pytest", "-n", workers, "-p", "no:cacheprovider", str(tmp_path)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environ = {**kept, "PYTHONPATH": "%s:%s" % (run.ROOT, run.ROOT / "tests")}
    done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50)
    told = done.stdout.index("---- test_inner.py::test_fails failed (call)")
    assert "assert 1 == 2" in done.stdout[told:]
    assert told < done.stdout.index("no summary yet") < done.stdout.index("= FAILURES =")


def test_help_installs_nothing_and_names_every_flag(tmp_path):
    argv = [sys.executable, str(run.ROOT / "tests" / "run.py"), "--help"]
    environ = {"PATH": "", "FJMCP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and not (tmp_path / "cache").exists()
    assert all(flag in done.stdout for flag in run.FLAGS) and " -k " in done.stdout


def test_a_flag_chooses_no_tests_and_one_chosen_test_starts_no_workers():
    assert run.split_flags(["--all", "tests/test_x.py", "-k", "y"]) == (
        ["--all"],
        ["tests/test_x.py", "-k", "y"],
    )
    assert run.split_flags(["--long"]) == (["--long"], [])
    assert run.pytest_argv("python", ["-k", "y"])[3:5] == ["-n", "0"]
    assert run.pytest_argv("python", ["tests/test_x.py::test_y"])[3:5] == ["-n", "0"]
    assert run.pytest_argv("python", ["tests/test_x.py"])[3:5] == ["-n", "4"]


def test_a_missing_part_is_installed_by_the_test_that_asks_for_it_if_the_run_leaves_that_to_it(
    tmp_path, monkeypatch
):
    tool = program(tmp_path / "tool")
    monkeypatch.delenv(run.INSTALLS, raising=False)
    assert real_parts.outcome_of(tmp_path / "one", lambda place, commands: tool)[0] == "missing"
    monkeypatch.setenv(run.INSTALLS, "1")
    assert real_parts.outcome_of(tmp_path / "two", lambda place, commands: tool) == ("ok", str(tool))


def test_the_java_client_is_held_to_the_sums_of_its_jars(tmp_path, monkeypatch):
    """A jar that is not the pinned one is not run, nor compiled against."""
    for name in ("java", "javac"):
        program(tmp_path / "bin" / name)
    copying = (
        '#!/bin/sh\nfor word; do case $word in -DoutputDirectory=*) mkdir -p "${word#*=}"; '
        'echo > "${word#*=}/mcp-2.1.0.jar";; esac; done\n'
    )
    program(
        tmp_path / "bin" / "mvn",
        copying + 'for word; do case $word in -Dmaven.repo.local=*) mkdir -p "${word#*=}";; esac; done\n',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    with pytest.raises(run.InstallFailed, match=r"jars are not those of .*mcp-2\.1\.0\.jar"):
        run.install_java_client(tmp_path / "part", run.Commands())


@pytest.mark.parametrize("lock", ["npm", "assistants"])
def test_a_package_of_npm_is_pinned_exactly_and_locked_with_its_sum(lock):
    wanted = json.loads((run.LOCKS / lock / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", version) for version in wanted.values())
    locked = json.loads((run.LOCKS / lock / "package-lock.json").read_text())["packages"]
    for name, entry in locked.items():
        assert not name or entry.get("link") or entry.get("integrity", "").startswith("sha512-"), name
    assert {name: locked["node_modules/" + name]["version"] for name in wanted} == wanted


PASSED = ["collected\n", "== 5 passed in 1.00s ==\n"]
FAILED = ["FAILED tests/test_x.py::test_y - AssertionError\n", "== 1 failed, 4 passed in 1.00s ==\n"]


@pytest.mark.parametrize(
    ("ended", "status", "last"),
    [
        ([(python(3, 13), 0, PASSED), (python(3, 11), 0, PASSED)], 0, None),
        ([(python(3, 13), 1, FAILED), (python(3, 11), 0, PASSED)], 1, FAILED[-1]),
        ([(python(3, 13), 0, PASSED), (python(3, 11), 1, FAILED)], 1, None),
        ([(python(3, 13), 2, FAILED), (python(3, 11), 1, FAILED)], 2, FAILED[-1]),
    ],
)
def test_any_failed_run_fails_the_whole_and_its_summary_is_the_last_line(capsys, ended, status, last):
    assert run.report(ended, {}, ci=False) == status
    printed = capsys.readouterr().out.splitlines(keepends=True)
    assert (printed[-1] if printed else None) == last
    assert (FAILED[0] in printed) is (last is not None)


@pytest.mark.parametrize(("ci", "status"), [(False, 0), (True, 1)])
def test_a_part_that_was_not_installed_fails_the_run_in_ci_only_and_is_named(capsys, ci, status):
    outcomes = {"mcp1": ("ok", "/bin/tool"), "mcp2": ("failed", "no network")}
    assert run.report([(python(3, 11), 0, PASSED)], outcomes, ci) == status
    printed = capsys.readouterr().out
    assert "mcp2 could not be installed: no network" in printed and "mcp1" not in printed
    assert printed.endswith(PASSED[-1])
