"""What the broker reads from outside costs time in proportion to its length.

Each pattern in the file, each parser, each endpoint. Only growth is compared, by CPU clocks: what takes four
times the input may take twelve times the time at most.
"""

import ast
import contextlib
import fnmatch
import gc
import itertools
import json
import re
import socket
import time
import types
from pathlib import Path
from re import _constants as opcodes
from re import _parser as parser

import pytest

import fjmcp_broker
from rigs.broker_process import Installation
from rigs.fake_forgejo import FakeForgejo
from rigs.mcp_client import McpClient, OAuthClient
from rigs.rig import CHILD

SOURCE = Path(fjmcp_broker.__file__)
FUNCTIONS = {"compile", "fullmatch", "match", "search", "sub", "subn", "split", "findall", "finditer"}
METHODS = FUNCTIONS - {"compile"}
FLOOR = 0.05  # seconds of CPU below which no growth is judged
# Four times the input: what is linear takes four times the time,
# and more once caches are too small; what is quadratic sixteen.
FACTOR = 12.0


# -- growth


def own_cpu(make):
    """A function that gives the CPU time which this thread spends on the action that `make(size)` returns."""

    def cost(size):
        action = make(size)
        gc.disable()  # a collection goes through all that the tests have made
        try:
            started = time.thread_time()
            action()
            return time.thread_time() - started
        finally:
            gc.enable()

    return cost


def grows_too_fast(cost, sizes):
    """A sentence if four times the size costs more than FACTOR times the seconds, else None.

    `cost(size)` measures. `sizes` rise by four, so that
    what is exponential is found before it takes for ever.
    """
    before = 0.0
    for size in sizes:
        took = cost(size)
        if (
            took > FLOOR and took > FACTOR * before
        ):  # measured again: another process may have been in the way
            pairs = [(cost(size // 4), cost(size)) for _ in range(4)]
            smaller, took = (min(taken) for taken in zip(*pairs))
            if took > FLOOR and took > FACTOR * smaller:
                return f"{size // 4}: {smaller * 1000:.1f} ms, {size}: {took * 1000:.1f} ms"
        before = took
    return None


# -- every pattern of the file


class Pattern:
    """A pattern as it stands in the source: its line, text, flags and the methods by which it is used."""

    def __init__(self, line, text, flags, methods):
        self.line, self.text, self.flags, self.methods = line, text, flags, methods

    def __repr__(self):
        return f"line-{self.line}-{'-'.join(sorted(self.methods))}"


def calls_of(tree, owner, names):
    """The calls `owner.name(...)` in a tree, as (name, call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            if isinstance(node.func.value, ast.Name) and node.func.value.id == owner:
                yield node.func.attr, node


def flags_of(call, position):
    given = [keyword.value for keyword in call.keywords if keyword.arg == "flags"] + call.args[position:]
    return eval(compile(ast.Expression(given[0]), "flags", "eval"), {"re": re}) if given else 0


def patterns_of(source):
    """Every pattern in a program's source. ValueError for one that is not written where it is used."""
    tree = ast.parse(source)
    for alias in (each for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names):
        if alias.name in FUNCTIONS and alias.asname is None and alias.name != "compile":
            raise ValueError(f"{alias.name} is imported by name")
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.value] = node.targets[0].id
    found = []
    for function, call in calls_of(tree, "re", FUNCTIONS):
        if not isinstance(call.args[0], ast.Constant):
            raise ValueError(f"line {call.lineno}: a pattern that is computed")
        if function != "compile":
            at = {"sub": 4, "subn": 4, "split": 3}.get(function, 2)
            found.append(Pattern(call.lineno, call.args[0].value, flags_of(call, at), {function}))
        else:
            used = {method for method, _ in calls_of(tree, names.get(call), METHODS)}
            if not used:
                raise ValueError(f"line {call.lineno}: nothing is seen to use this pattern")
            found.append(Pattern(call.lineno, call.args[0].value, flags_of(call, 1), used))
    return found


def characters(pattern):
    """Characters that mean something in a pattern, and some that mean nothing: as numbers."""
    found = {ord(c) if isinstance(c, str) else c for c in pattern.text}
    return sorted(found & set(b' \t"\\-.:;/%0129aAzZ_[]{},=?')) or [97]


def members(items, alphabet):
    """Some characters of a class, those of the alphabet first."""
    ranges = [(value, value) for kind, value in items if kind is opcodes.LITERAL]
    ranges += [value for kind, value in items if kind is opcodes.RANGE]
    of_category = {
        opcodes.CATEGORY_SPACE: b" \t",
        opcodes.CATEGORY_NOT_SPACE: b"a/",
        opcodes.CATEGORY_DIGIT: b"1",
        opcodes.CATEGORY_WORD: b"a1",
    }
    ranges += [
        (c, c) for kind, value in items if kind is opcodes.CATEGORY for c in of_category.get(value, b"")
    ]
    if items and items[0][0] is opcodes.NEGATE:
        return [c for c in (*alphabet, 97, 1) if not any(low <= c <= high for low, high in ranges)][:4]
    chosen = [c for c in alphabet if any(low <= c <= high for low, high in ranges)]
    return list(dict.fromkeys([*chosen, *(low for low, _ in ranges), *(high for _, high in ranges)]))[:5]


def samples(parts, alphabet):
    """Some texts that a sequence of a parsed pattern matches, as lists of numbers.

    The first is a short one.
    """
    options = [[]]
    for kind, value in parts:
        one = samples_of(kind, value, alphabet) or [[]]
        options = [left + right for left, right in itertools.islice(itertools.product(options, one), 12)]
    return options


def samples_of(kind, value, alphabet):
    if kind is opcodes.LITERAL:
        return [[value]]
    if kind is opcodes.NOT_LITERAL:
        return [[c] for c in (*alphabet, 97) if c != value][:4]
    if kind is opcodes.ANY:
        return [[c] for c in (*alphabet, 97)][:8]
    if kind is opcodes.IN:
        return [[c] for c in members(value, alphabet)]
    if kind is opcodes.BRANCH:
        return [text for branch in value[1] for text in samples(branch, alphabet)][:12]
    if kind is opcodes.SUBPATTERN:
        return samples(value[3], alphabet)
    if kind is opcodes.ATOMIC_GROUP:
        return samples(value, alphabet)
    if kind in (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, opcodes.POSSESSIVE_REPEAT):
        least, _, inner = value
        return [text * max(1, least) for text in samples(inner, alphabet)]
    return []


def inner_sequences(kind, value):
    if kind is opcodes.BRANCH:
        return value[1]
    if kind is opcodes.SUBPATTERN:
        return [value[3]]
    if kind is opcodes.ATOMIC_GROUP:
        return [value]
    if kind in (opcodes.ASSERT, opcodes.ASSERT_NOT):
        return [value[1]]
    if kind in (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, opcodes.POSSESSIVE_REPEAT):
        return [value[2]]
    return []


def repeats(parts, before, alphabet):
    """(what stands before, the repeated part) for each repetition without a narrow bound.

    At any depth of a parsed pattern.
    """
    for kind, value in parts:
        repeated = kind in (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT, opcodes.POSSESSIVE_REPEAT)
        if repeated and value[1] > 100:
            for unit in samples(value[2], alphabet):
                yield before, unit
        for inner in inner_sequences(kind, value):
            yield from repeats(inner, before, alphabet)
        before = before + (samples_of(kind, value, alphabet) or [[]])[0]


def attacks_on(pattern):
    """(what stands before, what is repeated, what cannot match) for a pattern, as texts of its own type."""
    tree = parser.parse(pattern.text, pattern.flags)
    alphabet = characters(pattern)
    starts = [text[:1] for text in samples(tree, alphabet)]
    made = set()
    for before, unit in repeats(tree, [], alphabet):
        # A search begins anew wherever the pattern may: so each repeated part may begin it, too.
        for head, body in itertools.product((before, []), (unit, *(start + unit for start in starts[:4]))):
            made.update((tuple(head), tuple(body), end) for end in ((), (1,), (10,), tuple(b"!\0")))
    as_text = bytes if isinstance(pattern.text, bytes) else lambda numbers: "".join(map(chr, numbers))
    return sorted(tuple(as_text(part) for part in attack) for attack in made)


def slow_input(pattern):
    """The first attack on a pattern that takes more than linear time, as a sentence.

    None if there is none.
    """
    compiled = re.compile(pattern.text, pattern.flags)
    for method, (head, unit, tail) in itertools.product(sorted(pattern.methods), attacks_on(pattern)):
        empty = tail[:0]
        arguments = {"sub": (empty,), "subn": (empty,)}.get(method, ())
        function = getattr(compiled, method)

        def make(size, function=function, arguments=arguments, head=head, unit=unit, tail=tail):
            text = head + unit * (size // len(unit)) + tail
            return lambda: drained(function(*arguments, text))

        grown = grows_too_fast(own_cpu(make), (6, 24, 96, 384, 1536, 6144, 24576))
        if grown:
            return f"{method} of {head!r}, {unit!r} again and again, {tail!r}: {grown}"
    return None


def drained(found):
    """An iterator of matches, run to its end."""
    return list(found) if hasattr(found, "__next__") else found


@pytest.mark.parametrize("pattern", patterns_of(SOURCE.read_text()), ids=repr)
def test_a_pattern_takes_time_in_proportion_to_its_input(pattern):
    assert slow_input(pattern) is None


@pytest.mark.parametrize(
    "text, method",
    [
        (r'"(?:[^"\\]|\\.)*"', "sub"),
        (rb"([!#-~]+):[ \t]*((?:[!-~](?:[ \t!-~]*[!-~])?)?)[ \t]*", "fullmatch"),
        (r"v?([0-9]+)\.[0-9]+", "search"),
        (r"(a+)+b", "fullmatch"),
        (r"https://(?:[a-z0-9]+\.)+[a-z]+(?!\S*/\.\.)/.*", "fullmatch"),
        (r"\s+$", "search"),
    ],
)
def test_a_pattern_that_is_not_linear_is_found(text, method):
    assert slow_input(Pattern(0, text, 0, {method}))


def test_every_use_of_patterns_is_found():
    source = (
        "import re\nONE = re.compile('a+')\ndef f(t):\n    return ONE.search(t) or re.sub('b+', '', "
        "t, flags=re.I)\n"
    )
    assert [(p.text, p.flags, p.methods) for p in patterns_of(source)] == [
        ("a+", 0, {"search"}),
        ("b+", re.I, {"sub"}),
    ]
    for bad in (
        "import re\nre.match(a + b, t)\n",
        "import re\nX = re.compile('a')\n",
        "from re import sub\n",
    ):
        with pytest.raises(ValueError):
            patterns_of(bad)


@pytest.mark.parametrize("pattern", ["get_*", "*a*a*a*a*b", "*[a-z]*[a-z]*!", "?*?*?*?*b"])
def test_a_glob_of_the_operator_takes_time_in_proportion_to_a_tools_name(pattern):
    assert fnmatch.fnmatchcase("get_a", "get_*")  # the function that the broker asks, too
    settings = types.SimpleNamespace(read_only_tools=(pattern,))

    def make(size):
        return lambda: fjmcp_broker.name_reads("a" * size, settings)

    assert grows_too_fast(own_cpu(make), (256, 1024, 4096, 16384, 65536)) is None


# -- every parser, and every endpoint

JSON = {  # what is repeated in a text that holds `size` bytes of it
    "open brackets": lambda size: b"[" * size,
    "open objects": lambda size: b'{"a":' * (size // 5),
    "nested as deep as may be": lambda size: b"[" + b",".join([b"[" * 40 + b"]" * 40] * (size // 81)) + b"]",
    "closed before they are open": lambda size: b"][" * (size // 2),
    "escaped quotes after brackets": lambda size: b"[" * 65 + b'"' + b'\\"' * (size // 2),
    "backslashes after brackets": lambda size: b"[" * 65 + b'"' + b"\\" * size,
    "quotes after brackets": lambda size: b"[" * 65 + b'"' * size,
    "empty objects": lambda size: b"[" + b"{}," * (size // 3) + b"1]",
    "one member each": lambda size: b"[" + b'{"":0},' * (size // 7) + b"1]",
    "members": lambda size: json.dumps({f"{n:x}": n for n in range(size // 12)}).encode(),
    "the same member": lambda size: b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
    "digits": lambda size: b"[" + b"1" * size + b"]",
    "long integers": lambda size: b"[" + b",".join([b"9" * 4000] * (size // 4001)) + b"]",
    "digits after a point": lambda size: b"[0." + b"1" * size + b"]",
    "an exponent": lambda size: b"[1e" + b"9" * size + b"]",
    "numbers": lambda size: b"[" + b"1e400," * (size // 6) + b"1]",
    "halves of surrogate pairs": lambda size: b'["' + b"\\ud800" * (size // 6) + b'"]',
    "other halves": lambda size: b'["' + b"\\udfff\\\\" * (size // 8) + b'"]',
    "surrogate pairs": lambda size: b'["' + b"\\ud83d\\ude00" * (size // 12) + b'"]',
    "spaces": lambda size: b" " * size,
    "text with brackets": lambda size: json.dumps(
        ["int f(int a[]) { return a[0]; }\n" * (size // 32)]
    ).encode(),
    "separators of lines": lambda size: b'["' + b"\xe2\x80\xa8" * (size // 3) + b'"]',
}
READERS = {
    "a text from outside": fjmcp_broker.read_json,
    "a line of a child": fjmcp_broker.read_child_json,
    "an answer of a child": lambda text: fjmcp_broker.with_id(
        b'{"jsonrpc":"2.0","id":1,"result":' + text + b"}",
        fjmcp_broker.Message("response", 1, "", None, fjmcp_broker.PlainResult(result={})),
        2,
    ),
    "an answer of Forgejo": lambda text: fjmcp_broker.Fetched(
        200, {"content-type": "application/json"}, text
    ).json(),
    "a token": lambda text: fjmcp_broker.jwt_claims(f"a.{fjmcp_broker.b64url(text)}.c"),
}


@pytest.mark.parametrize("shape", JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_is_read_in_time_in_proportion_to_its_length(reader, shape):
    def make(size):
        text = JSON[shape](size)

        def read():
            with contextlib.suppress(ValueError):
                READERS[reader](text)

        return read

    assert (
        grows_too_fast(own_cpu(make), (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)) is None
    )


def refusing(function):
    """The function, without what it raises for bad input."""

    def call(text):
        with contextlib.suppress(ValueError, fjmcp_broker.HTTPError):
            function(text)

    return call


SMALL = {
    "a form": lambda text: fjmcp_broker.parse_form(text.encode("latin-1"), ValueError()),
    "a name": fjmcp_broker.clean_name,
    "a redirect URI": lambda text: fjmcp_broker.check_redirect_uri("https://" + text, ()),
    "scopes": fjmcp_broker.known_scopes,
    "base64url": fjmcp_broker.unb64url,
}


@pytest.mark.parametrize(
    "unit", ["a", "%", "%25", "%e2%80", "+", "&", "=", "a=b;", " ", ".", "[", ":", "\u0301", "-a."]
)
@pytest.mark.parametrize("function", SMALL)
def test_a_text_is_read_in_time_in_proportion_to_its_length(function, unit):
    def make(size):
        text = unit * (size // len(unit))
        return lambda: refusing(SMALL[function])(text)

    assert grows_too_fast(own_cpu(make), (1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)) is None


class Attacked:
    """A broker process that is sent raw requests, and whose CPU time is asked for each."""

    def __init__(self, installation):
        installation.start()
        self.url = installation.url
        self._address = installation.socket.getsockname()
        self._clock = (
            ~installation.broker.pid << 3
        ) | 2  # clock_getcpuclockid(3): all threads, ended ones too
        oauth = OAuthClient(self.url)
        oauth.login(None, "alice", "secret", "read")
        self.client_id = oauth.client_id
        self.bearer = f"Authorization: Bearer {oauth.tokens['access_token']}\r\n"
        with McpClient(oauth.mcp_url, oauth.tokens["access_token"], protocol="2025-03-26") as mcp:
            mcp.initialize(version="2025-03-26")
            self.session = f"Mcp-Session-Id: {mcp.session_id}\r\n"

    def cost(self, request):
        """The seconds of CPU that the broker spends on a request, which it may refuse at any byte."""
        started = time.clock_gettime(self._clock)
        with socket.create_connection(self._address, timeout=100) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(request)
            answer = b""
            with contextlib.suppress(OSError):
                answer = sock.recv(100)
                while sock.recv(1 << 20):
                    pass
        assert not answer.startswith(b"HTTP/1.1 500"), answer
        return time.clock_gettime(self._clock) - started

    def request(self, method, target, head="", body=b"", framing=None):
        framing = framing or f"Content-Length: {len(body)}\r\n"
        host = f"Host: {self.url[7:]}\r\nConnection: close\r\n"
        return f"{method} {target} HTTP/1.1\r\n{host}{head}{framing}\r\n".encode("latin-1") + body


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One broker process for all attacks: with limits of bodies that show growth."""
    forgejo = FakeForgejo().start()
    installation = Installation(tmp_path_factory.mktemp("attacked"), forgejo, CHILD)
    yield Attacked(installation)
    installation.close()
    forgejo.stop()


HEAD = (256, 1024, 4096, 16384, 30000)
FORM = (256, 1024, 4096, 16384, 65000)
MCP = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
FORM_TYPE = "Content-Type: application/x-www-form-urlencoded\r\n"


@pytest.mark.parametrize("shape", JSON)
@pytest.mark.parametrize(
    "path, sizes",
    [("/oauth/register", FORM), ("/register", FORM), ("/mcp", MCP)],
    ids=["register", "root", "mcp"],
)
def test_an_endpoint_that_takes_json_spends_time_in_proportion_to_it(shared, path, sizes, shape):
    head = shared.bearer + "Accept: application/json\r\n" if path == "/mcp" else ""
    assert (
        grows_too_fast(lambda n: shared.cost(shared.request("POST", path, head, JSON[shape](n))), sizes)
        is None
    )


FIELDS = {
    "fields": lambda size: b"a=b&" * (size // 4),
    "empty fields": lambda size: b"&" * size,
    "escapes": lambda size: b"scope=" + b"%25" * (size // 3),
    "half escapes": lambda size: b"scope=" + b"%e2" * (size // 3),
    "pluses": lambda size: b"scope=" + b"+" * size,
    "a resource": lambda size: b"resource=" + b":/" * (size // 2),
    "a verifier": lambda size: b"grant_type=authorization_code&code=x&code_verifier=" + b"a" * size,
    "a token": lambda size: b"token=" + b"x" * size + b"&refresh_token=" + b"y",
    "an assertion": lambda size: b"client_assertion=" + b"." * size,
    "an assertion of brackets": lambda size: (
        b"client_assertion=a." + as_base64(b"[" * (size // 4 * 3)) + b".c"
    ),
    "an assertion of escapes": lambda size: (
        b"client_assertion=a." + as_base64(b"[" * 65 + b'"' + b'\\"' * (size // 3)) + b".c"
    ),
    "a login": lambda size: b"decision=approve&csrf=x&login=" + b"A" * size,
}


def as_base64(text):
    return fjmcp_broker.b64url(text).encode()


@pytest.mark.parametrize("shape", FIELDS)
@pytest.mark.parametrize("path", ["/oauth/token", "/oauth/revoke", "/oauth/consent", "/account/end"])
def test_an_endpoint_that_takes_a_form_spends_time_in_proportion_to_it(shared, path, shape):
    def cost(size):
        body = FIELDS[shape](size)[:65000]
        if "assertion" not in shape:  # which names the client itself
            body += f"&client_id={shared.client_id}".encode()
        return shared.cost(shared.request("POST", path, FORM_TYPE, body))

    assert grows_too_fast(cost, FORM) is None


@pytest.mark.parametrize("shape", FIELDS)
@pytest.mark.parametrize("path", ["/oauth/authorize", "/oauth/callback"])
def test_a_query_costs_time_in_proportion_to_it(shared, path, shape):
    def cost(size):
        return shared.cost(
            shared.request("GET", f"{path}?{FIELDS[shape](size).decode()}&client_id={shared.client_id}")
        )

    assert grows_too_fast(cost, (128, 512, 2048, 7500)) is None


@pytest.mark.parametrize(
    "unit", [" ", "\t", "a", "a ", ",", "127.0.0.1,", "a=b; ", '"', "\\", "=?base64?", "\xff", ";q=", "\x01"]
)
@pytest.mark.parametrize(
    "name",
    [
        "X-A", "Accept", "Authorization", "Cookie", "Connection", "Content-Type", "Mcp-Session-Id",
        "Mcp-Method", "Last-Event-ID", "Origin", "User-Agent", "X-Forwarded-For",
        "Access-Control-Request-Headers", "Expect",
    ],
)  # fmt: skip
def test_a_header_costs_time_in_proportion_to_it(shared, name, unit):
    def cost(size):
        head = (
            f"{name}: {unit * (size // len(unit))}\x01\r\n"
            if unit == " "
            else f"{name}: {unit * (size // len(unit))}\r\n"
        )
        bearer = "" if name == "Authorization" else shared.bearer
        return shared.cost(shared.request("GET", "/mcp", bearer + head))

    assert grows_too_fast(cost, HEAD) is None


@pytest.mark.parametrize("line", ["a:\r\n", "a: b\r\n", "Cookie: a=b\r\n", "X-Forwarded-For: 127.0.0.1\r\n"])
def test_header_lines_cost_time_in_proportion_to_their_number(shared, line):
    assert grows_too_fast(lambda n: shared.cost(shared.request("GET", "/", line * n)), (6, 24, 96)) is None


@pytest.mark.parametrize(
    "chunk", [b"1\r\na\r\n", b"1;" + b" " * 500 + b"\r\na\r\n", b"0a\r\n" + b"a" * 10 + b"\r\n"]
)
@pytest.mark.parametrize("path", ["/oauth/register", "/oauth/token", "/mcp"])
def test_chunks_cost_time_in_proportion_to_their_number(shared, path, chunk):
    def cost(size):
        body = chunk * size + b"0\r\n\r\n"
        head = shared.bearer if path == "/mcp" else FORM_TYPE
        return shared.cost(shared.request("POST", path, head, body, "Transfer-Encoding: chunked\r\n"))

    assert grows_too_fast(cost, (64, 256, 1024, 4096, 16384)) is None


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "w"}},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        {},
    ],
    ids=["refusals", "cancellations", "answers", "notifications", "requests", "nothing"],
)
def test_a_batch_costs_time_in_proportion_to_its_messages(shared, message):
    def cost(size):
        items = [{**message, "id": n} if "id" in message else message for n in range(size)]
        head = shared.bearer + shared.session + "Accept: application/json\r\n"
        return shared.cost(shared.request("POST", "/mcp", head, json.dumps(items).encode()))

    assert grows_too_fast(cost, (16, 64, 256, 1024, 4096, 16384)) is None
