"""PostgreSQL of Debian's packages as a process of its own, in its own folder, on loopback and a socket.

It refuses to run as root: then it runs as nobody, with what that needs to reach its program.
"""

import contextlib
import itertools
import os
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from rigs.loopback import POSTGRESQL, free_port, own_address

READY_LIMIT = 30
NOBODY = 65534
PASSWORD = "correct horse"
ROLE = "fjmcp"
# The folder of an unpacked package may be below one that only root may enter.
AS_NOBODY = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=-all,+dac_override",
    "--ambient-caps=-all,+dac_override",
]
# fsync protects from a machine that dies, which none does here: what a process wrote survives the process.
CONFIGURATION = """
listen_addresses = '{address}'
port = {port}
unix_socket_directories = '{folder}'
max_connections = 60
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
fsync = off
log_min_messages = warning
wal_level = replica
max_wal_senders = 4
wal_keep_size = 64MB
autovacuum_naptime = 10s
"""
ACCESS = """
local all all trust
local replication all trust
host all all 127.0.0.0/8 scram-sha-256
"""
_numbers = itertools.count(1)


def descendants(pid):
    """The pids of a process's children."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Server:
    """A PostgreSQL server; `binaries` is the folder of its programs. It listens once `start` has returned.

    url(database) names it by its address and the role's
    password, url(database, socket=True) by its Unix socket.
    """

    def __init__(self, binaries, **settings):
        self.binaries = Path(binaries)
        self.folder = Path(tempfile.mkdtemp(prefix="fjmcp-pg-"))
        self.data = self.folder / "data"
        self.address = own_address(POSTGRESQL)
        self.port = free_port(self.address)
        self.settings = settings
        self.process = None
        if os.geteuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)

    def create(self):
        """Make an empty cluster with the role of the broker; return self."""
        self.run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        self._configure()
        self.start()
        self.sql("postgres", f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        return self

    def _configure(self):
        lines = "".join(f"{name} = '{value}'\n" for name, value in self.settings.items())
        plain = CONFIGURATION.format(address=self.address, port=self.port, folder=self.folder)
        (self.data / "postgresql.conf").write_text(plain + lines)
        (self.data / "pg_hba.conf").write_text(ACCESS)

    def _argv(self, program, *words):
        prefix = AS_NOBODY if os.geteuid() == 0 else []
        return [*prefix, str(self.binaries / program), *map(str, words)]

    def run(self, program, *words):
        """Run one of PostgreSQL's programs to its end; its output."""
        done = subprocess.run(
            self._argv(program, *words),
            capture_output=True,
            text=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            timeout=READY_LIMIT * 4,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self):
        """Start the server and wait until it answers; return self."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self._argv("postgres", "-D", self.data),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                process_group=0,
            )
        # Its last line is "ready", or "standby" of a server that follows another.
        pid_file = self.data / "postmaster.pid"
        for _ in range(READY_LIMIT * 50):
            assert self.process.poll() is None, self.log
            with contextlib.suppress(OSError):
                lines = pid_file.read_text().split("\n")
                if (
                    lines[0] == str(self.process.pid)
                    and lines[7:8]
                    and lines[7].strip() in ("ready", "standby")
                ):
                    return self
            select.select([], [], [], 0.02)
        raise AssertionError(f"PostgreSQL was not ready within {READY_LIMIT} s: {self.log}")

    @property
    def log(self):
        """What the server wrote of itself."""
        return (self.folder / "log").read_text(errors="replace")

    def sql(self, database, text):
        """What psql answers to `text` as the superuser: rows as lines, columns divided by |."""
        words = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", self.folder, "-p", self.port]
        return self.run("psql", *words, "-U", "postgres", "-d", database, "-c", text).strip()

    def database(self, template="template1"):
        """Make a new database that belongs to the broker's role; its name."""
        name = f"fjmcp_{os.getpid()}_{next(_numbers)}"
        self.sql("postgres", f"CREATE DATABASE {name} OWNER {ROLE} TEMPLATE {template}")
        return name

    def url(self, database, *others, socket=False, **parameters):
        """libpq's URI of a database: at this server and, if it does not have it, at the others."""
        words = [f"{name}={value}" for name, value in parameters.items()]
        query = "?" + "&".join(words) if words else ""
        if socket:
            host = str(self.folder).replace("/", "%2F")
            return f"postgresql://{ROLE}@{host}:{self.port}/{database}{query}"
        hosts = ",".join(f"{server.address}:{server.port}" for server in (self, *others))
        return f"postgresql://{ROLE}@{hosts}/{database}{query}"

    def restart(self):
        """End it as an upgrade of the package does, and start it again.

        Connections are cut, no transaction is lost.
        """
        self.stop()
        return self.start()

    def kill(self):
        """End it and all its processes as `kill -9` does."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        descriptors = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptors.append(os.pidfd_open(pid))
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        self.process.wait()
        for descriptor in descriptors:
            select.select([descriptor], [], [], READY_LIMIT)
            os.close(descriptor)

    def stop(self):
        """End it in order, but without waiting for its clients."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(READY_LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()

    def close(self):
        """End it, and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def standby(self):
        """Start a synchronous standby of this server: a commit here is answered once it is there too.

        Returns the standby.
        """
        follower = Server(self.binaries, **self.settings)
        name = f"standby{follower.port}"
        source = f"host={self.folder} port={self.port} user=postgres application_name={name}"
        follower.run("pg_basebackup", "-D", follower.data, "-R", "-X", "stream", "-c", "fast", "-d", source)
        follower._configure()
        follower.start()
        self.sql("postgres", f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        self.sql("postgres", "SELECT pg_reload_conf()")
        found = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        for _ in range(READY_LIMIT * 20):
            if self.sql("postgres", found) == "1":
                return follower
            select.select([], [], [], 0.05)
        raise AssertionError("the standby does not follow: " + follower.log)

    def promote(self):
        """Make a standby the server that writes, and waits for no other."""
        self.sql("postgres", "SELECT pg_promote()")
        self.sql("postgres", "ALTER SYSTEM RESET synchronous_standby_names")
        self.sql("postgres", "SELECT pg_reload_conf()")
        return self
