#!/usr/bin/env python3
"""A stdio MCP server that stands in for forgejo-mcp, and misbehaves when told to.

`stdio_child.py [--transport stdio] [--url URL] [--no-forgejo] [--control PATH]
[--era modern] [--mode NAME[=ARG]]...`; the environment is forgejo-mcp's. It is of
the era of `initialize`, as forgejo-mcp is; with `--era modern` of 2026-07-28 and of
no other. Everything else on the command line is ignored; `version` prints a version.

Modes (scripting is on the command line because a child's environment is an allow-list):
    exit1[=FILE]      end with status 1 at once (with FILE: only while that file exists)
    hang_start[=FILE] never get ready (likewise)
    slow_start=FILE   get ready only once FILE exists
    ignore_term       ignore SIGTERM
    term_waits        on SIGTERM finish the running calls first, as forgejo-mcp does (default: end at once)
    flood_stderr_at_start=BYTES, junk_at_start (lines that are no JSON on stdout)
    version=X         answer every initialize with X;   instructions=TEXT  put them into that answer
    version_file=FILE answer every initialize with what is in FILE, if it exists
    deaf              never answer server/discover, as some older servers do with what they do not know
    asks_on_init      send a roots/list request as soon as the client is initialized
    page=N            tools/list in pages of N
    ttl=MS            what a modern one says of how long its lists may be kept
    more_tools=FILE   read at start: a JSON list of further tools (names or whole definitions), if FILE exists

With --control the child reports what it sees to a test and takes commands from it: see child_control.py.
"""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time

NAME, VERSION = "Forgejo MCP Server", "0.0.0-test"
PROTOCOLS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
MODERN = ("2026-07-28",)
META = "io.modelcontextprotocol/"
KINDS = {
    "elicitation/create": "elicitation",
    "sampling/createMessage": "sampling",
    "roots/list": "roots",
}  # and the capability each needs
CACHEABLE = (
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
)
STATE_KEY = b"stands in for a key of the operator's"
VALUED = ("url", "transport", "mode", "control", "era")
CHUNK = 65536
GONE = {"error": {"code": -32603, "message": "the client is gone"}}
TOOLS = {}
RESOURCES = {"test://note": "a note", "test://whoami": None}
TEMPLATES = [{"uriTemplate": "test://echo/{text}", "name": "echo", "mimeType": "text/plain"}]
PROMPTS = [
    {
        "name": "summary",
        "description": "Sum something up",
        "arguments": [{"name": "topic", "description": "what to sum up", "required": True}],
    }
]


class Refused(Exception):
    """A JSON-RPC error as the answer."""

    def __init__(self, code, message, data=None):
        super().__init__(message)
        self.code, self.data = code, data


class InputRequired(Exception):
    """A modern call that cannot go on without its client's answers."""

    def __init__(self, requests, state):
        super().__init__("input required")
        self.requests, self.state = requests, state


# ---- Command line
# ---------------------------------------------------------------------------------------------------


class Options:
    """What the command line says, read as Go's flag package does (one dash or two).

    Unknown options skipped.
    """

    def __init__(self, argv):
        self.url = self.control = ""
        self.era = "legacy"
        self.modes = {}
        self.forgejo = True
        words = iter(argv)
        for word in words:
            name, equals, value = word.lstrip("-").partition("=")
            if not word.startswith("-") or name not in (*VALUED, "no-forgejo"):
                continue
            if name in VALUED and not equals:
                value = next(words, "")
            self.take(name, value)

    def take(self, name, value):
        if name == "mode":
            mode, _, argument = value.partition("=")
            self.modes[mode] = argument
        elif name == "no-forgejo":
            self.forgejo = False
        elif name != "transport":
            setattr(self, name, value)

    def strikes(self, mode):
        """Whether a mode is on that may hang on a file's existence."""
        return mode in self.modes and (not self.modes[mode] or os.path.exists(self.modes[mode]))


# ---- Forgejo
# --------------------------------------------------------------------------------------------------------


class Forgejo:
    """The API calls. HTTP by hand over a plain socket: http.client would double the start time."""

    def __init__(self, url, token, user_agent):
        scheme, separator, rest = url.rstrip("/").partition("://")
        if scheme not in ("http", "https") or not separator or not rest:
            raise Refused(-32603, f"invalid URL {url!r}")
        self.authority, slash, base = rest.partition("/")
        self.base = slash + base
        self.tls = scheme == "https"
        self.token = token
        self.user_agent = user_agent

    def connect(self):
        """A connected socket. Without a timeout, as forgejo-mcp has none."""
        host, colon, port = self.authority.rpartition(":")
        if not colon or port.endswith("]"):
            host, port = self.authority, "443" if self.tls else "80"
        connection = socket.create_connection((host.strip("[]"), int(port)))
        if not self.tls:
            return connection
        import ssl

        return ssl.create_default_context().wrap_socket(connection, server_hostname=host.strip("[]"))

    def call(self, method, path, body=None):
        """The decoded JSON answer of one API call; Refused if it is not a success."""
        payload = b"" if body is None else json.dumps(body).encode()
        headers = [
            f"{method} {self.base}/api/v1{path} HTTP/1.0",
            f"Host: {self.authority}",
            f"User-Agent: {self.user_agent}",
            "Accept: application/json",
            f"Content-Length: {len(payload)}",
        ]
        if body is not None:
            headers.append("Content-Type: application/json")
        if self.token:
            headers.append(f"Authorization: token {self.token}")
        try:
            with self.connect() as connection:
                connection.sendall("\r\n".join([*headers, "", ""]).encode() + payload)
                with connection.makefile("rb") as stream:
                    status, text = read_response(stream)
        except OSError as error:
            raise Refused(-32603, f"{method} {self.base}/api/v1{path}: {error}") from None
        return decoded(method, path, status, text)

    def check_version(self):
        """Two identical requests, as forgejo-mcp's start makes them; Refused if it would not start."""
        for _ in range(2):
            version = self.call("GET", "/version").get("version", "")
        numbers = version.split("+")[0].split("-")[0].split(".")
        if not all(number.isdigit() for number in numbers) or [int(number) for number in numbers] < [1, 11]:
            raise Refused(-32603, f"unknown or too old version {version!r}")


def read_response(stream):
    """(status, body) of an HTTP response that ends with its connection."""
    status_line = stream.readline().split(None, 2)
    if len(status_line) < 2:
        raise OSError("no HTTP response")
    length = None
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    body = stream.read()
    if length is not None and len(body) < length:
        raise OSError("unexpected EOF")
    return int(status_line[1]), body


def decoded(method, path, status, text):
    """The JSON of a success; Refused with the words forgejo-mcp's SDK finds for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if 200 <= status < 300 and value is not None:
        return value
    if isinstance(value, dict) and value.get("message"):
        raise Refused(-32603, value["message"])
    raise Refused(-32603, f"unknown API Error: {status}\nRequest: '/api/v1{path}' with '{method}' method")


# ---- Control
# --------------------------------------------------------------------------------------------------------


class Control:
    """The line to a test: events out, commands in. Without a path it says nothing."""

    def __init__(self, path):
        self.lock = threading.Lock()
        self.socket = None
        if path:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(path)

    def tell(self, event, **fields):
        if not self.socket:
            return
        line = json.dumps({"event": event, "pid": os.getpid(), **fields}).encode() + b"\n"
        with self.lock:
            try:
                self.socket.sendall(line)
            except OSError:
                os._exit(4)

    def listen(self, obey):
        """Wait until the test has taken note of this child, then obey commands in a thread."""
        if not self.socket:
            return
        commands = self.socket.makefile("rb")
        commands.readline()
        threading.Thread(target=self.follow, args=(commands, obey), daemon=True).start()

    @staticmethod
    def follow(commands, obey):
        for line in commands:
            obey(json.loads(line))
        # The test is over: nothing it scripted may outlive it.
        os._exit(4)


# ---- The server
# -----------------------------------------------------------------------------------------------------


def packed(message):
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def as_go_number(value):
    """An id after mcp-go's detour through float64."""
    if type(value) is int and abs(value) > 2**53:
        value = float(value)
        return int(value) if abs(value) < 1e21 else value
    return value


def result_of(answer):
    """A tool's result: the answer as it is, or a text as the only content."""
    return answer if isinstance(answer, dict) else {"content": [{"type": "text", "text": answer}]}


class Question:
    """A request to the client that waits for its answer."""

    def __init__(self):
        self.answered = threading.Event()
        self.message = None

    def answer(self, message):
        self.message = message
        self.answered.set()


class Call:
    """One tools/call: its arguments and the ways to answer it."""

    def __init__(self, server, request_id, params):
        self.server = server
        self.id = request_id
        self.arguments = params.get("arguments") or {}
        self.meta = params.get("_meta") or {}
        self.progress_token = self.meta.get("progressToken")

    def get(self, name, default=None):
        value = self.arguments.get(name)
        return default if value is None else value

    def answer_line(self, answer):
        return packed({"jsonrpc": "2.0", "id": self.id, "result": result_of(answer)})

    def ask(self, *questions):
        """The client's answers to (method, params) each, asked at once."""
        return self.server.ask(*questions)

    def wants_log(self, level):
        """Whether a log message of this level is to be sent."""
        return LEVELS.index(level) >= LEVELS.index(self.server.level or LEVELS[0])

    def answer(self, text):
        self.server.write(self.answer_line(text) + b"\n")

    def pause(self):
        """Until its key is released; with `ms` that long at most; without a test to release it not at all."""
        ms = self.get("ms", None if self.server.control.socket else 0)
        self.server.key(self.get("key", "")).wait(None if ms is None else ms / 1000)


class ModernCall(Call):
    """One try at a tools/call of 2026-07-28.

    What was asked and answered in earlier tries comes back in its requestState.
    """

    def __init__(self, server, request_id, params):
        super().__init__(server, request_id, params)
        self.capabilities = self.meta[META + "clientCapabilities"]
        self.given = params.get("inputResponses") or {}
        self.rounds = unsealed(params["requestState"]) if "requestState" in params else []
        self.round = 0

    def answer_line(self, answer):
        return packed({"jsonrpc": "2.0", "id": self.id, "result": self.server.stamped(result_of(answer))})

    def answer(self, text):
        if self.id not in self.server.cancelled:  # "MUST NOT send any further messages for it"
            super().answer(text)

    def wants_log(self, level):
        lowest = self.meta.get(META + "logLevel")
        return lowest is not None and LEVELS.index(level) >= LEVELS.index(lowest)

    def ask(self, *questions):
        self.round += 1
        if self.round <= len(self.rounds):
            return self.rounds[self.round - 1]
        for method, _params in questions:
            if KINDS[method] not in self.capabilities:
                raise Refused(-32021, f"needs {KINDS[method]}", {"requiredCapabilities": {KINDS[method]: {}}})
        keys = [f"round{self.round}-{number}" for number in range(len(questions))]
        if not all(isinstance(self.given.get(key), dict) for key in keys):
            requests = {
                key: {"method": method, "params": params} for key, (method, params) in zip(keys, questions)
            }
            raise InputRequired(requests, sealed(self.rounds))
        self.rounds.append([self.given[key] for key in keys])
        return self.rounds[-1]


def mark_of(data):
    import hashlib
    import hmac

    return hmac.new(STATE_KEY, data, hashlib.sha256).hexdigest()


def sealed(rounds):
    """A requestState."""
    data = packed(rounds)
    return f"{mark_of(data)}.{data.decode()}"


def unsealed(state):
    """What is in a requestState; Refused if it is none of ours."""
    mark, _, data = str(state).partition(".")
    if mark != mark_of(data.encode()):
        raise Refused(-32602, "the requestState is not ours")
    return json.loads(data)


class Server:
    """The state of one run and what is done with each message."""

    make_call = Call

    def __init__(self, options, forgejo, token, control):
        self.options = options
        self.forgejo = forgejo
        self.token = token
        self.control = control
        self.output = threading.RLock()
        self.leaving = threading.Lock()
        self.serving = self.input_ended = False
        self.running = set()
        self.keys = {}
        self.questions = {}
        self.question_ids = itertools.count(1)
        self.tools = dict(TOOLS)
        self.seen = {"initialize": 0, "initialized": 0, "setLevel": 0, "subscribe": 0, "unsubscribe": 0}
        self.parameters = self.level = self.answer_on_init = None
        self.subscriptions = []
        self.cancelled = []
        self.methods = {
            "initialize": self.initialize,
            "ping": lambda _params: {},
            "logging/setLevel": self.set_level,
            "tools/list": self.list_tools,
            "prompts/get": self.get_prompt,
            "prompts/list": lambda _params: {"prompts": PROMPTS},
            "resources/list": lambda _params: {
                "resources": [{"uri": uri, "name": uri[7:]} for uri in RESOURCES]
            },
            "resources/templates/list": lambda _params: {"resourceTemplates": TEMPLATES},
            "resources/read": self.read_resource,
            "resources/subscribe": self.subscribe,
            "resources/unsubscribe": self.unsubscribe,
            "completion/complete": lambda params: {
                "completion": {
                    "values": [params["argument"]["value"] + "-completed"],
                    "total": 1,
                    "hasMore": False,
                }
            },
        }

    # Output

    def write(self, data):
        """All of `data` to stdout, nothing of another thread's in between."""
        view = memoryview(data)
        with self.output:
            while view:
                try:
                    view = view[os.write(1, view) :]
                except BrokenPipeError:
                    # A Go program dies of a broken stdout; the signal is pending and was only held back.
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})

    def send(self, **message):
        self.write(packed({"jsonrpc": "2.0", **message}) + b"\n")

    def refuse(self, request_id, code, text, data=None):
        self.send(
            id=request_id, error={"code": code, "message": text, **({} if data is None else {"data": data})}
        )

    def announce(self, method, params=None, kind=None):
        """A notification of what belongs to no request; `kind` is the filter of 2026-07-28 it falls under."""
        self.send(method=method, **({"params": params} if params else {}))

    # Being told

    def key(self, name):
        """The event behind a key; once released it stays so."""
        return self.keys.setdefault(str(name), threading.Event())

    def obey(self, command):
        """One command of the test."""
        kind = command["cmd"]
        if kind == "release":
            self.key(command["key"]).set()
        elif kind == "emit":
            self.write(packed(command["message"]) + b"\n")
        elif kind == "raw":
            self.write(bytes.fromhex(command["hex"]) if "hex" in command else command["text"].encode())
        elif kind == "exit":
            self.leave(command["code"], "command")

    def leave(self, code, reason):
        """End the process. The lock is kept: of two reasons at once only the first is told."""
        self.leaving.acquire()
        self.control.tell("exit", code=code, reason=reason)
        os._exit(code)

    def await_signals(self, awaited):
        """Thread.

        Before the start is over signals kill, as Go's defaults do; later they end the server with 0.
        """
        number = signal.sigwait(awaited)
        if not self.serving:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
            os.kill(os.getpid(), number)
        if "term_waits" in self.options.modes:
            self.finish_calls()
        self.leave(0, signal.Signals(number).name)

    # Input

    def serve(self):
        """Read until the end of stdin, then finish what runs."""
        self.serving = True
        log("INFO", "Forgejo MCP Server started")
        for line in sys.stdin.buffer:
            if line.endswith(b"\n"):
                self.take(line)
        self.input_ended = True
        for question in list(self.questions.values()):
            question.answer(GONE)
        self.finish_calls()
        self.leave(0, "end of input")

    def finish_calls(self):
        for thread in list(self.running):
            thread.join()

    def take(self, line):
        """One line of the client."""
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.control.tell("message", method=None)
            return self.refuse(None, -32700, "Parse error" if message is None else "Failed to parse message")
        request_id, method = as_go_number(message.get("id")), message.get("method")
        self.control.tell("message", method=method, id=request_id)
        if message.get("jsonrpc") != "2.0":
            return self.refuse(request_id, -32600, "Invalid JSON-RPC version")
        if method is None:
            return self.take_answer(message)
        if request_id is None:
            return self.take_notification(method, message.get("params") or {})
        return self.take_request(request_id, method, message.get("params") or {})

    def take_answer(self, message):
        question = self.questions.pop(message.get("id"), None)
        if question:
            question.answer(message)

    def take_notification(self, method, params):
        if method == "notifications/cancelled":
            self.cancelled.append(params.get("requestId"))
            self.control.tell("cancelled", requestId=params.get("requestId"))
        elif method == "notifications/initialized":
            self.seen["initialized"] += 1
            if "asks_on_init" in self.options.modes:
                threading.Thread(target=self.ask_on_init, daemon=True).start()

    def take_request(self, request_id, method, params):
        if method == "server/discover" and "deaf" in self.options.modes:
            return None
        if method == "tools/call":
            return self.take_call(request_id, params)
        try:
            if method not in self.methods:
                raise Refused(-32601, f"Method {method} not found")
            self.send(id=request_id, result=self.methods[method](params))
        except Refused as error:
            self.refuse(request_id, error.code, str(error), error.data)
        except Exception as error:
            self.refuse(request_id, -32602, f"{type(error).__name__}: {error}")

    def take_call(self, request_id, params):
        name = params.get("name")
        if name not in self.tools:
            return self.refuse(request_id, -32602, f"tool '{name}' not found: tool not found")
        call = self.make_call(self, request_id, params)
        thread = threading.Thread(target=self.run_call, args=(call, name), daemon=True)
        self.running.add(thread)
        thread.start()
        if name == "stop_reading":
            thread.join()
            self.key(call.get("key", "")).wait()

    def run_call(self, call, name):
        self.control.tell(
            "call", tool=name, id=call.id, args=call.arguments
        )  # from here on it is one of `running`
        try:
            text = self.tools[name][1](call)
            if text is not None:
                call.answer(text)
        except InputRequired as needed:
            self.send(
                id=call.id,
                result=self.stamped(
                    {"inputRequests": needed.requests, "requestState": needed.state}, "input_required"
                ),
            )
        except Refused as error:
            self.refuse(call.id, error.code, str(error), error.data)
        except Exception as error:
            self.refuse(call.id, -32603, f"{type(error).__name__}: {error}")
        finally:
            self.running.discard(threading.current_thread())

    # Asking the client

    def ask(self, *questions):
        """Send requests, each (method, params), to the client at once.

        Its answers, each the result or {"error": ...}.
        """
        asked = []
        for method, params in questions:
            number, question = next(self.question_ids), Question()
            self.questions[number] = question
            asked.append(question)
            self.send(id=number, method=method, params=params)
        for question in asked:
            if self.input_ended:
                question.answer(question.message or GONE)
            question.answered.wait()
        return [
            question.message["result"]
            if "result" in question.message
            else {"error": question.message.get("error")}
            for question in asked
        ]

    def ask_on_init(self):
        self.answer_on_init = self.ask(("roots/list", {}))[0]

    # Methods

    def initialize(self, params):
        self.seen["initialize"] += 1
        self.parameters = params
        asked = params.get("protocolVersion") or "2025-03-26"
        modes = self.options.modes
        if os.path.exists(modes.get("version_file", "")):
            with open(modes["version_file"], encoding="ascii") as file:
                modes = {**modes, "version": file.read()}
        result = {
            "protocolVersion": modes.get("version") or (asked if asked in PROTOCOLS else PROTOCOLS[-1]),
            "capabilities": {
                "logging": {},
                "resources": {"subscribe": True},
                "tools": {"listChanged": True},
                "prompts": {},
            },
            "serverInfo": {"name": NAME, "version": VERSION},
        }
        return {**result, "instructions": modes["instructions"]} if "instructions" in modes else result

    def set_level(self, params):
        if self.parameters is None:
            raise Refused(-32603, "session not initialized")
        if params.get("level") not in LEVELS:
            raise Refused(-32602, f"invalid level {params.get('level')!r}")
        self.seen["setLevel"] += 1
        self.level = params["level"]
        return {}

    def list_tools(self, params):
        tools = [definition for definition, _ in list(self.tools.values())]
        size = int(self.options.modes.get("page") or len(tools))
        cursor = params.get("cursor") or "after-0"
        if not cursor.startswith("after-") or not cursor[6:].isdigit():
            raise Refused(-32602, f"invalid cursor {cursor!r}")
        end = int(cursor[6:]) + size
        page = {"tools": tools[end - size : end]}
        return {**page, "nextCursor": f"after-{end}"} if end < len(tools) else page

    def read_resource(self, params):
        uri = params["uri"]
        if uri == "test://whoami":
            text = get_my_user_info(Call(self, None, {}))
        elif uri.startswith("test://echo/"):
            text = uri[12:]
        elif uri in RESOURCES:
            text = RESOURCES[uri]
        else:
            raise Refused(-32002, f"resource not found: {uri}")
        return {"contents": [{"uri": uri, "mimeType": "text/plain", "text": text}]}

    def subscribe(self, params):
        self.seen["subscribe"] += 1
        self.subscriptions.append(params["uri"])
        return {}

    def unsubscribe(self, params):
        self.seen["unsubscribe"] += 1
        if params["uri"] in self.subscriptions:
            self.subscriptions.remove(params["uri"])
        return {}

    def get_prompt(self, params):
        if params.get("name") != "summary":
            raise Refused(-32602, f"prompt '{params.get('name')}' not found")
        text = f"Sum up {(params.get('arguments') or {}).get('topic', 'everything')}"
        return {"messages": [{"role": "user", "content": {"type": "text", "text": text}}]}


class ModernServer(Server):
    """The same for 2026-07-28 alone.

    No handshake, metadata with every request, nothing asked but in a result.
    """

    make_call = ModernCall

    def __init__(self, options, forgejo, token, control):
        super().__init__(options, forgejo, token, control)
        self.listeners = {}
        for gone in (
            "initialize",
            "ping",
            "logging/setLevel",
            "resources/subscribe",
            "resources/unsubscribe",
        ):
            del self.methods[gone]
        self.methods["server/discover"] = self.discover

    def stamped(self, result, kind="complete", method=None):
        kept = (
            {"ttlMs": int(self.options.modes.get("ttl") or 0), "cacheScope": "private"}
            if method in CACHEABLE
            else {}
        )
        return {
            "resultType": kind,
            **kept,
            **result,
            "_meta": {**result.get("_meta", {}), META + "serverInfo": {"name": NAME, "version": VERSION}},
        }

    def take_request(self, request_id, method, params):
        try:
            self.check_metadata(method, params.get("_meta"))
            if method == "subscriptions/listen":
                return self.listen(request_id, params["notifications"])
            if method == "tools/call":
                return self.take_call(request_id, params)
            if method not in self.methods:
                raise Refused(-32601, f"Method {method} not found")
            self.send(id=request_id, result=self.stamped(self.methods[method](params), method=method))
        except Refused as error:
            self.refuse(request_id, error.code, str(error), error.data)
        except Exception as error:
            self.refuse(request_id, -32602, f"{type(error).__name__}: {error}")

    def check_metadata(self, method, meta):
        """Refused without what every request must have (2026-07-28, per-request protocol fields)."""
        version = meta.get(META + "protocolVersion") if isinstance(meta, dict) else None
        if version is None or not isinstance(meta.get(META + "clientCapabilities"), dict):
            raise Refused(-32602, f"{method} without its metadata; this server speaks {', '.join(MODERN)}")
        if version not in MODERN:
            raise Refused(-32022, "unsupported version", {"supported": list(MODERN), "requested": version})
        if meta.get(META + "logLevel") not in (None, *LEVELS):
            raise Refused(-32602, f"invalid level {meta[META + 'logLevel']!r}")
        self.parameters = meta

    def discover(self, _params):
        modes = self.options.modes
        capabilities = {
            "logging": {},
            "resources": {"subscribe": True},
            "tools": {"listChanged": True},
            "prompts": {},
            "completions": {},
        }
        found = {"supportedVersions": list(MODERN), "capabilities": capabilities}
        return {**found, "instructions": modes["instructions"]} if "instructions" in modes else found

    def read_resource(self, params):
        try:
            return super().read_resource(params)
        except Refused as error:
            raise Refused(-32602, str(error)) from None

    def listen(self, request_id, wanted):
        """Acknowledge first; the answer comes when it is over, which for a client that cancels is never."""
        honoured = {
            kind: value
            for kind, value in wanted.items()
            if kind in ("toolsListChanged", "resourceSubscriptions") and value
        }
        self.seen["subscribe"] += 1
        self.control.tell("listen", id=request_id, notifications=wanted)
        self.send(
            method="notifications/subscriptions/acknowledged",
            params={"_meta": {META + "subscriptionId": request_id}, "notifications": honoured},
        )
        self.listeners[request_id] = honoured

    def take_notification(self, method, params):
        super().take_notification(method, params)
        if (
            method == "notifications/cancelled"
            and self.listeners.pop(params.get("requestId"), None) is not None
        ):
            self.seen["unsubscribe"] += 1

    def announce(self, method, params=None, kind=None):
        for listener, honoured in list(self.listeners.items()):
            wanted = honoured.get(kind)
            if wanted is True or (wanted and params["uri"] in wanted):
                self.send(
                    method=method, params={**(params or {}), "_meta": {META + "subscriptionId": listener}}
                )


# ---- Tools
# ----------------------------------------------------------------------------------------------------------


def definition_of(name, description="", read_only=False, properties=None):
    """A tool as tools/list shows it; the annotations are those mcp-go stamps on every tool."""
    properties = properties or {}
    schema = {
        "type": "object",
        "properties": {key: {"type": kind.rstrip("!")} for key, kind in properties.items()},
    }
    required = [key for key, kind in properties.items() if kind.endswith("!")]
    return {
        "name": name,
        "description": description,
        "inputSchema": {**schema, "required": required} if required else schema,
        "annotations": {
            "readOnlyHint": read_only,
            "destructiveHint": True,
            "idempotentHint": False,
            "openWorldHint": True,
        },
    }


def tool(read_only=False, **properties):
    """Decorator: register a function of a Call.

    It returns the answer (a text or a whole result), or None for no (further) answer. `properties`:
    {argument: JSON type}, a required one's with "!".
    """

    def register(function):
        name = function.__name__
        TOOLS[name] = (definition_of(name, function.__doc__, read_only, properties), function)
        return function

    return register


def api(call, what, *request, offline):
    """The answer of a Forgejo call the way forgejo-mcp wraps it, or what stands for it without a Forgejo."""
    if call.server.forgejo is None:
        return offline
    try:
        return json.dumps({"Result": call.server.forgejo.call(*request)})
    except Refused as error:
        raise Refused(error.code, f"{what} err: {error}") from None


def token_mark(call):
    """What tells one user from another where there is no Forgejo to ask."""
    import hashlib

    return hashlib.sha256(call.server.token.encode()).hexdigest()[:8]


@tool()
def get_my_user_info(call):
    """Who the token belongs to"""
    return api(call, "get user info", "GET", "/user", offline=token_mark(call))


@tool()
def list_my_repos(call):
    """The user's repositories"""
    return api(call, "list my repos", "GET", "/user/repos", offline=f"repositories of {token_mark(call)}")


@tool(owner="string!", repo="string!", title="string!")
def create_issue(call):
    """Open an issue"""
    from urllib.parse import quote

    owner, repo, title = (call.arguments[name] for name in ("owner", "repo", "title"))
    path = f"/repos/{quote(owner, '')}/{quote(repo, '')}/issues"
    return api(call, "create issue", "POST", path, {"title": title}, offline=f"{owner}/{repo}: {title}")


@tool(text="string!", size="integer")
def get_echo(call):
    """The text, repeated and cut to `size` characters if that is given"""
    text = call.arguments["text"]
    size = call.get("size", len(text))
    return (text * (size // max(1, len(text)) + 1))[:size]


@tool(key="string", ms="integer")
def get_slow(call):
    """Answers when its key is released, at the latest after `ms`; cancelling it changes nothing"""
    call.pause()
    return f"slow {call.get('key', '')}"


@tool(n="integer")
def get_progress(call):
    """Reports progress n times if the request has a progressToken, then answers"""
    n = call.get("n", 3)
    for step in range(1, n + 1):
        if call.progress_token is not None:
            call.server.send(
                method="notifications/progress",
                params={
                    "progressToken": call.progress_token,
                    "progress": step,
                    "total": n,
                    "message": f"step {step}",
                },
            )
    return f"{n} steps"


@tool(text="string", level="string", n="integer")
def get_log(call):
    """Sends n log messages unless they are below the level set, then answers"""
    level = call.get("level", "info")
    for _ in range(call.get("n", 1)):
        if call.wants_log(level):
            call.server.send(
                method="notifications/message",
                params={"level": level, "logger": "stdio_child", "data": call.get("text", "a log message")},
            )
    return "logged"


def asked(call, method, params):
    answers = call.ask(*[(method, params)] * call.get("count", 1))
    for answer in answers if call.get("strict") else ():
        if "error" in answer:
            raise Refused(-32603, f"{method} was refused: {answer['error']}")
    return json.dumps(answers if "count" in call.arguments else answers[0])


def elicitation(message):
    return {
        "message": message,
        "requestedSchema": {
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
        },
    }


def sampling(message):
    return {"messages": [{"role": "user", "content": {"type": "text", "text": message}}], "maxTokens": 50}


@tool(message="string", count="integer", strict="boolean")
def ask_elicit(call):
    """Asks the client to elicit something; the answer as JSON, with `count` a list; `strict`: or an error"""
    return asked(call, "elicitation/create", elicitation(call.get("message", "Which colour?")))


@tool(message="string", count="integer", strict="boolean")
def ask_sampling(call):
    """Asks the client's model"""
    return asked(call, "sampling/createMessage", sampling(call.get("message", "Say something")))


@tool()
def ask_all(call):
    """Asks for all three kinds of input at once; the answers as a JSON list"""
    return json.dumps(
        call.ask(
            ("elicitation/create", elicitation("Which colour?")),
            ("sampling/createMessage", sampling("Say something")),
            ("roots/list", {}),
        )
    )


@tool()
def ask_twice(call):
    """Asks, and when that is answered asks again; the answers as a JSON list"""
    first = call.ask(("elicitation/create", elicitation("Which colour?")))
    return json.dumps([*first, *call.ask(("elicitation/create", elicitation(f"After {json.dumps(first)}?")))])


@tool(count="integer", strict="boolean")
def ask_roots(call):
    """Asks for the client's roots"""
    return asked(call, "roots/list", {})


@tool()
def get_env(_call):
    """The process environment, and the token backwards: a broker takes it out of all that its child says"""
    return json.dumps({**os.environ, "TOKEN_BACKWARDS": os.environ.get("FORGEJO_ACCESS_TOKEN", "")[::-1]})


@tool()
def get_fds(call):
    """The open file descriptors and what they are, without the line to the test"""
    own = call.server.control.socket
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the listing's own
            pass
    return json.dumps(
        {number: what for number, what in found.items() if not own or int(number) != own.fileno()}
    )


@tool()
def get_argv(_call):
    """The command line"""
    return json.dumps(sys.argv)


@tool()
def get_pid(_call):
    """The process id"""
    return str(os.getpid())


@tool()
def get_initialize(call):
    """What this process was told of its client"""
    server = call.server
    return json.dumps(
        {
            **server.seen,
            "params": server.parameters,
            "level": server.level,
            "cancelled": server.cancelled,
            "subscriptions": server.subscriptions,
            "answer_on_init": server.answer_on_init,
        }
    )


@tool()
def get_error(_call):
    """Fails"""
    raise Refused(-32603, "get error err: as asked")


@tool(read_only=True)
def hint_reader(_call):
    """Says of itself that it only reads"""
    return "read"


@tool(signal="string")
def crash(call):
    """Ends the process with status 3, or by that signal"""
    if "signal" in call.arguments:
        number = signal.Signals[call.arguments["signal"]]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        signal.pthread_kill(
            threading.get_ident(), number
        )  # to the process it might reach the thread that waits for signals
    os._exit(3)


def add_tool(server, entry):
    """Add a tool that answers with its name and arguments. `entry`: its name or its definition."""
    definition = definition_of(entry) if isinstance(entry, str) else entry
    name = definition["name"]
    server.tools[name] = (definition, lambda call: f"{name} {json.dumps(call.arguments)}")


@tool(name="string")
def change_tools(call):
    """Adds a tool and says so"""
    add_tool(call.server, call.get("name", "get_added"))
    call.server.announce("notifications/tools/list_changed", kind="toolsListChanged")
    return "changed"


@tool(uri="string!")
def get_touched(call):
    """Tells whoever has subscribed to it that a resource has changed"""
    uri = call.arguments["uri"]
    if isinstance(call, ModernCall) or uri in call.server.subscriptions:
        call.server.announce("notifications/resources/updated", {"uri": uri}, "resourceSubscriptions")
    return "touched"


@tool()
def get_meta(call):
    """The metadata that this call came with, as JSON"""
    return json.dumps(call.meta)


@tool(value="object!")
def get_back(call):
    """All of its arguments as they came, in JSON"""
    return json.dumps(call.arguments, ensure_ascii=False)


@tool(result="object!")
def get_result(call):
    """The result it was given"""
    return call.arguments["result"]


@tool(code="integer!", message="string!", data="object")
def get_failure(call):
    """The error it was given"""
    raise Refused(call.arguments["code"], call.arguments["message"], call.arguments.get("data"))


@tool()
def silent(_call):
    """Never answers"""


@tool()
def double_answer(call):
    """Answers twice"""
    call.answer("first")
    return "second"


@tool(answer="boolean")
def wrong_id(call):
    """Answers a request nobody made; with `answer` its own afterwards"""
    call.server.send(id="never-asked", result=result_of("wrong id"))
    return "right id" if call.get("answer") else None


@tool(answer="boolean")
def null_id(call):
    """Answers with id null, as mcp-go does after a panic; with `answer` properly afterwards"""
    call.server.refuse(None, -32603, "panic recovered in null_id tool handler")
    return "right id" if call.get("answer") else None


BAD_LINES = (
    b"no JSON at all\n",
    b'{"jsonrpc":"2.0"}\n',
    b"12\n",
    b'{"jsonrpc":"2.0","method":"\xff\n',
    b'{"cut": \n',
)


@tool(n="integer")
def bad_lines(call):
    """Writes n lines that are no message, then answers"""
    n = call.get("n", 1)
    call.server.write(b"".join(itertools.islice(itertools.cycle(BAD_LINES), n)))
    return f"{n} bad lines"


@tool(bytes="integer!")
def big_line(call):
    """Answers in a line of exactly so many bytes, the newline not counted"""
    return "x" * (call.arguments["bytes"] - len(call.answer_line("")))


@tool()
def endless_line(call):
    """Starts an answer that never ends"""
    with call.server.output:
        call.server.write(call.answer_line("")[:-5])
        while True:
            call.server.write(b"x" * CHUNK)


@tool(key="string", ms="integer", exit="boolean")
def partial_line(call):
    """Writes half of its answer, the rest when the key is released or after `ms`; `exit`: ends in between"""
    line = call.answer_line("two halves")
    with call.server.output:
        call.server.write(line[: len(line) // 2])
        if call.get("exit"):
            call.server.leave(0, "partial_line")
        call.pause()
        call.server.write(line[len(line) // 2 :] + b"\n")


@tool(bytes="integer!")
def stderr_flood(call):
    """Writes so many bytes to stderr, then answers"""
    flood_stderr(call.arguments["bytes"])
    return "flooded"


@tool(kind="string!", bytes="integer!", ms="integer!")
def flood(call):
    """Sends questions, notifications, junk, many bytes or lines of stderr for a while; then answers"""
    kind, padding = call.arguments["kind"], "x" * call.arguments["bytes"]
    until = time.monotonic() + call.arguments["ms"] / 1000
    for number in itertools.count():
        if time.monotonic() > until:
            return "flooded"
        if kind == "questions":
            params = {"message": padding, "requestedSchema": {"type": "object", "properties": {}}}
            call.server.send(id=f"flood {number}", method="elicitation/create", params=params)
        elif kind == "notifications":
            call.server.send(method="notifications/message", params={"level": "info", "data": padding})
        elif kind == "answers":
            call.server.send(id=f"never asked {number}", result={"padding": padding})
        elif kind == "junk":
            call.server.write(padding.encode() + b"\n" + b'{"jsonrpc":"2.0","method":"notifications/x"}\n')
        else:
            os.write(2, padding.encode() + b"\n")


@tool(own_session="boolean")
def grandchild(call):
    """Starts a process that holds stdout and stderr for ten minutes; its pid"""
    return str(
        os.posix_spawnp(
            "sleep",
            ["sleep", "600"],
            os.environ,
            setsigmask=(),
            setsigdef=(signal.SIGTERM,),
            setsid=bool(call.get("own_session")),
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        )
    )


@tool(key="string")
def stop_reading(_call):
    """Answers, then reads no more input (not even its end) until the key is released"""
    return "stopped"


# ---- Start
# ----------------------------------------------------------------------------------------------------------


def log(level, text):
    os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%S')}\t{level}\tstdio_child\t{text}\n".encode())


def flood_stderr(size):
    line = b"flood " * 16 + b"...\n"
    for start in range(0, size, CHUNK):
        block = line * (CHUNK // len(line) + 1)
        rest = memoryview(block)[: min(CHUNK, size - start)]
        while rest:
            rest = rest[os.write(2, rest) :]


def misstart(options, server):
    """The modes that spoil or delay a start."""
    modes = options.modes
    if "flood_stderr_at_start" in modes:
        flood_stderr(int(modes["flood_stderr_at_start"]))
    if options.strikes("exit1"):
        log("FATAL", "Run Forgejo MCP Server Error: told to fail")
        server.leave(1, "exit1")
    if options.strikes("hang_start"):
        threading.Event().wait()
    while "slow_start" in modes and not os.path.exists(modes["slow_start"]):
        time.sleep(0.02)
    if "junk_at_start" in modes:
        server.write(b"Welcome to the server!\n\x1b[1mnot JSON\x1b[0m\n")
    if os.path.exists(modes.get("more_tools", "")):
        with open(modes["more_tools"], encoding="utf-8") as file:
            for entry in json.load(file):
                add_tool(server, entry)


def connect_forgejo(options, token):
    """The Forgejo client, not yet used, or None with --no-forgejo."""
    if not options.forgejo:
        return None
    user_agent = os.environ.get("FORGEJO_USER_AGENT") or f"forgejo-mcp/{VERSION}"
    return Forgejo(options.url or os.environ.get("FORGEJO_URL", ""), token, user_agent)


def take_signals(server, ignore_term):
    """Have one thread wait for the signals, so that no handler runs in the middle of a write."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    awaited = {signal.SIGINT}
    if ignore_term:
        # Not blocked as well: a signal that is both ignored and blocked still reaches sigwait.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        awaited.add(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, {*awaited, signal.SIGPIPE})
    threading.Thread(target=server.await_signals, args=(awaited,), daemon=True).start()


def main():
    if sys.argv[1:2] and sys.argv[1].lstrip("-") == "version":
        print(f"forgejo-mcp {VERSION}")
        return
    options = Options(sys.argv[1:])
    control = Control(options.control)
    token = os.environ.get("FORGEJO_ACCESS_TOKEN", "")
    server = (ModernServer if options.era == "modern" else Server)(options, None, token, control)
    take_signals(server, "ignore_term" in options.modes)
    control.tell("start")
    control.listen(server.obey)
    misstart(options, server)
    try:
        server.forgejo = connect_forgejo(options, token)
        if server.forgejo:
            server.forgejo.check_version()
    except Refused as error:
        log("FATAL", f"Run Forgejo MCP Server Error: connection test failed: create forgejo client: {error}")
        server.leave(1, "no Forgejo")
    server.serve()


if __name__ == "__main__":
    main()
