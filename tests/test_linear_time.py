"""What the broker reads from outside costs time in proportion to its length: each pattern in the file, each parser, each endpoint.

Only growth is compared, by CPU clocks: what takes four times the input may take less than eight times the time.
"""

import ast
import fnmatch
import itertools
import re
import time
import types
from pathlib import Path
from re import _constants as opcodes
from re import _parser as parser

import pytest

import fjmcp_broker

SOURCE = Path(fjmcp_broker.__file__)
FUNCTIONS = {"compile", "fullmatch", "match", "search", "sub", "subn", "split", "findall", "finditer"}
METHODS = FUNCTIONS - {"compile"}
FLOOR = 0.025  # seconds of CPU below which no growth is judged
FACTOR = 8.0


# -- growth


def cpu_of(action):
    started = time.thread_time()
    action()
    return time.thread_time() - started


def grows_too_fast(make, sizes):
    """A sentence if four times the input takes eight times the time or more, else None. `make(size)` gives what is measured.

    `sizes` rise by four, so that what is exponential is found before it takes for ever.
    """
    before = 0.0
    for size in sizes:
        took = cpu_of(make(size))
        if (
            took > FLOOR and took > FACTOR * before
        ):  # measured again: another process may have been in the way
            smaller = min(cpu_of(make(size // 4)) for _ in range(3))
            took = min(took, cpu_of(make(size)), cpu_of(make(size)))
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
    """Some texts that a sequence of a parsed pattern matches, as lists of numbers; the first is a short one."""
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
    """(what stands before, the repeated part) for each repetition without a narrow bound, at any depth of a parsed pattern."""
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
    """The first attack on a pattern that takes more than linear time, as a sentence; None if there is none."""
    compiled = re.compile(pattern.text, pattern.flags)
    for method, (head, unit, tail) in itertools.product(sorted(pattern.methods), attacks_on(pattern)):
        empty = tail[:0]
        arguments = {"sub": (empty,), "subn": (empty,)}.get(method, ())
        function = getattr(compiled, method)

        def make(size, function=function, arguments=arguments, head=head, unit=unit, tail=tail):
            text = head + unit * (size // len(unit)) + tail
            return lambda: drained(function(*arguments, text))

        grown = grows_too_fast(make, (6, 24, 96, 384, 1536, 6144, 24576))
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
    source = "import re\nONE = re.compile('a+')\ndef f(t):\n    return ONE.search(t) or re.sub('b+', '', t, flags=re.I)\n"
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

    assert grows_too_fast(make, (256, 1024, 4096, 16384, 65536)) is None
