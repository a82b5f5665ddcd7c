"""What every test module shares."""

import ctypes
import os
import select
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import fjmcp_broker
from rigs import mcp_client, schemas

settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ci")
pytest_plugins = ("rigs.real_parts", "rigs.postgresql", "rigs.stores")
PR_SET_CHILD_SUBREAPER = 36
END_LIMIT = 30


OPT_IN = {
    "long": ("--long", "a long form", "run the long forms of floods, races and fuzzing too"),
    "second": ("--all", "second of its kind", "run the real clients that are second of their kind too"),
    "assistant": ("--assistants", "an assistant", "run the assistants too"),
}  # marker: its flag, what such a test is, the flag's help


def pytest_addoption(parser):
    """A flag for each kind of test that runs on demand only."""
    for flag, _, text in OPT_IN.values():
        parser.addoption(flag, action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    """Tests marked as opt-in run with their flag only."""
    for marker, (flag, kind, _) in OPT_IN.items():
        if not config.getoption(flag):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{kind}: run with {flag}"))


def pytest_runtest_logreport(report):
    """Print a failure when it happens: a run that is ended from outside never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\n---- {report.nodeid} failed ({report.when}):\n{report.longreprtext[-6000:]}\n----", flush=True
        )


@pytest.fixture
def scale(request):
    """A function (short, long) -> the size for this run."""
    return lambda short, long: long if request.config.getoption("--long") else short


def pytest_configure():
    """What a killed broker leaves behind becomes a child of this process, seen by the test that left it.

    Every message is judged by its schema.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    mcp_client.judge = schemas.judge


def child_pids():
    """The pids of this process's children, whichever thread started them."""
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(map(int, (task / "children").read_text().split()))
        except OSError:  # the thread has ended
            continue
    return pids


def runs_on(pid):
    """The command line of a child that does not end within END_LIMIT, else None.

    An ended one is taken away.
    """
    descriptor = os.pidfd_open(pid)
    try:
        if select.select([descriptor], [], [], END_LIMIT)[0]:
            os.waitpid(pid, 0)
            return None
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    finally:
        os.close(descriptor)


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """No test leaves a process or a thread. Set up first and so torn down last: what is there then is left.

    What a module's tests share may stay, until the module's end.
    """
    if "shared" in request.fixturenames:
        yield
        return
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine") == "postgresql":
        request.getfixturevalue("databases")  # its server is all tests' of this worker
    pids, threads = child_pids(), set(threading.enumerate())
    yield
    left = [command for pid in child_pids() - pids if (command := runs_on(pid))]
    for thread in set(threading.enumerate()) - threads:
        thread.join(END_LIMIT)
        if thread.is_alive():
            left.append(thread)
    assert not left


@pytest.fixture
def store_settings():
    """A function that returns the settings of a new store, where it is not the usual one."""
    return dict


@pytest.fixture
def make_rig(tmp_path, store_settings):
    """A function that makes a Rig (broker, fake Forgejo, children); all of it is ended with the test."""
    from rigs.rig import Rig

    made = []

    def make(**arguments):
        folder = tmp_path / f"rig{len(made)}"
        folder.mkdir()
        made.append(Rig(folder, **{**store_settings(), **arguments}))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig):
    """A Rig with the usual settings."""
    return make_rig()


@pytest.fixture
def control(tmp_path):
    """A ChildControl: what children are told, and what they say of themselves."""
    from rigs.child_control import ChildControl

    with ChildControl(str(tmp_path / "control")) as listener:
        yield listener


@pytest.fixture
def controlled(make_rig, control):
    """A Rig whose children can be told what to do."""
    return make_rig(child=("--control", control.path))


@pytest.fixture
def make_installation(tmp_path):
    """A function that makes an Installation: the real program as a process, with a fake Forgejo.

    Ended with the test.
    """
    from rigs.broker_process import Installation
    from rigs.fake_forgejo import FakeForgejo
    from rigs.rig import CHILD

    made = []

    def make(*, child=(), access_lifetime=3600, forgejo_args=None, **arguments):
        folder = tmp_path / f"installation{len(made)}"
        folder.mkdir()
        forgejo = FakeForgejo(access_lifetime=access_lifetime, **(forgejo_args or {})).start()
        # What a test counts at Forgejo, and among the children, is what it asked for itself.
        arguments = {"check_at_start": "false", **arguments}
        made.append(Installation(folder, forgejo, (*CHILD, *child), **arguments))
        return made[-1]

    yield make
    for installation in made:
        installation.close()
        installation.forgejo.stop()


@pytest.fixture
def guardian():
    """A guardian of this test's own."""
    made = fjmcp_broker.Guardian()
    yield made
    made.close()
