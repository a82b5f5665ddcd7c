"""Broker processes of one PostgreSQL, each at its own address, and a proxy as docs/scale.md has it."""

import re
import socket
from pathlib import Path

import fjmcp_broker
from rigs import loopback
from rigs.broker_process import BrokerProcess, toml
from rigs.browser import Browser
from rigs.loopback import free_port, own_address, running
from rigs.mcp_client import McpClient, OAuthClient
from rigs.postgresql_server import PASSWORD
from rigs.processes import await_end
from rigs.rig import CHILD

SCALE = Path(__file__).resolve().parent.parent.parent / "docs" / "scale.md"
NAMES = "abc"
DOCUMENTED = {"a": "10.0.0.11:8080", "b": "10.0.0.12:8080", "c": "10.0.0.13:8080"}


OWN_ADDRESS = own_address(loopback.FLEET)


class FleetMember:
    """One broker: its configuration, its address, and the process that runs or not.

    `kept`: its socket is held for it, as a service manager does: connections wait while no process is there.
    """

    def __init__(self, fleet, name, kept):
        self.fleet, self.name = fleet, name
        self.folder = fleet.folder / name
        self.folder.mkdir()
        self.address = f"{OWN_ADDRESS}:{free_port(OWN_ADDRESS)}"
        self.log_path = self.folder / "log"
        self.program = None
        host, port = self.address.rsplit(":", 1)
        self.socket = socket.create_server((host, int(port)), backlog=1024) if kept else None
        self.process = None

    def write(self, **changes):
        """Write this broker's configuration."""
        values = {**self.fleet.settings, "broker_name": self.name, "listen": self.address, **changes}
        path = self.folder / "broker.toml"
        path.write_text(toml(values))
        path.chmod(0o600)
        return path

    def start(self):
        """Start it and wait until it serves."""
        self.process = BrokerProcess(
            self.write(), self.socket, self.log_path, self.folder, program=self.program
        )
        self.process.await_ready()
        return self

    def kill(self):
        """End it as `kill -9` does, and wait for the end of its children."""
        children = self.process.children()
        self.process.kill()
        assert not await_end(children)

    def stop(self):
        """End it in order; its exit status."""
        return self.process.stop()

    @property
    def is_running(self):
        return self.process is not None and self.process.process.poll() is None

    @property
    def routes(self):
        """Lead the public URL to this broker."""
        return {self.fleet.url: f"http://{self.address}"}


class Fleet:
    """`count` brokers of a new database of `server` (a rigs.postgresql_server.Server).

    People come to `url`: to a proxy by `routes`, or to one broker by the member's.
    """

    def __init__(self, folder, server, forgejo, count, *, kept=False, others=(), child=(), **settings):
        self.folder, self.server, self.forgejo = Path(folder), server, forgejo
        self.port = free_port(OWN_ADDRESS)
        # The proxy ends TLS, which is left out here.
        self.url = "https://mcp.example.org"
        self.routes = {self.url: f"http://{OWN_ADDRESS}:{self.port}"}
        self.database = server.database()
        app = forgejo.add_app([self.url + "/oauth/callback"])
        self.settings = {
            "public_url": self.url,
            "forgejo_url": forgejo.url,
            "forgejo_oauth_client_id": app.client_id,
            "forgejo_oauth_client_secret": app.client_secret,
            "forgejo_mcp_binary": [*CHILD, *child],
            "store_url": server.url(self.database, *others),
            "store_password": PASSWORD,
            "key": fjmcp_broker.new_key().strip(),
            "check_at_start": False,
            "client_documents": False,
            **settings,
        }
        self.members = [FleetMember(self, name, kept) for name in NAMES[:count]]

    def start(self):
        """Start all brokers; returns self."""
        for member in self.members:
            member.start()
        return self

    def close(self):
        for member in self.members:
            if member.is_running:
                member.stop()
            if member.socket:
                member.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()

    def login(self, user="alice", routes=None):
        """A client that logged in, through the proxy or at one broker."""
        routes = routes or self.routes
        client = OAuthClient(self.url, name=f"an application of {user}", routes=routes)
        client.login(Browser(routes=routes), user, "secret")
        return client

    def session(self, user="alice", routes=None, **arguments):
        """A session, through the proxy or at one broker."""
        routes = routes or self.routes
        client = self.login(user, routes)
        mcp = McpClient(self.url + "/mcp", client.tokens["access_token"], routes=routes, **arguments)
        mcp.initialize()
        mcp.oauth = client
        return mcp

    def at(self, mcp, member):
        """The same session over another connection, to one broker or (None) through the proxy."""
        routes = member.routes if member else self.routes
        return McpClient(mcp.url, mcp.token, session_id=mcp.session_id, routes=routes)


def documented(language, fleet):
    """The configuration of docs/scale.md in this language, for the brokers that there are, without TLS."""
    text = re.search(rf"```{language}\n(.*?)```", SCALE.read_text(), re.DOTALL)[1]
    there = {member.name: member.address for member in fleet.members}
    for name, address in DOCUMENTED.items():
        if name in there:
            text = text.replace(address, there[name])
        else:
            text = re.sub(rf"upstream fjmcp_{name} \{{.*?\n\}}\n", "", text, flags=re.DOTALL)
            gone = re.compile(rf".*(?:{re.escape(address)}|\b{name}\\?\.).*\n")
            text = gone.sub("", text)
    return text


def nginx_configuration(folder, fleet):
    """docs/scale.md's nginx within a main configuration that keeps to the folder."""
    text = documented("nginx", fleet)
    text = text.replace("listen 443 ssl http2;", f"listen {OWN_ADDRESS}:{fleet.port};")
    text = re.sub(r" *ssl_certificate.*\n", "", text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/error.log;\nuser root;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{text}}}\n"
    )
    return ["-c", path, "-p", folder]


def haproxy_configuration(folder, fleet):
    """docs/scale.md's HAProxy."""
    text = documented("haproxy", fleet)
    text = re.sub(r"bind :443 .*", f"bind {OWN_ADDRESS}:{fleet.port}", text)
    path = folder / "haproxy.cfg"
    path.write_text(text)
    return ["-db", "-f", path]


PROXIES = {"nginx": nginx_configuration, "haproxy": haproxy_configuration}


def proxy(name, program, folder, fleet):
    """The proxy before a fleet as a process, once it accepts connections: a context manager."""
    folder = Path(folder)
    folder.mkdir()
    words = PROXIES[name](folder, fleet)
    return running(program, words, folder, (OWN_ADDRESS, fleet.port))
