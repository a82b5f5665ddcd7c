"""The order of the file is its architecture.

Sections name what stands above them, and nothing grows beyond a screen.
"""

import ast
import functools
import re
from pathlib import Path

import fjmcp_broker

SOURCE = Path(fjmcp_broker.__file__).read_text()
TREE = ast.parse(SOURCE)
MAX_FUNCTION = 50
MAX_CLASS = 350
MAX_PARAMETERS = 8
HEADING = re.compile(r"^# =+\n# (.+)\n(?:# .*\n)+# =+$", re.MULTILINE)

# What is not so yet. These lists only shrink: an entry that is no longer needed fails the test.
LONG_FUNCTIONS: set[str] = set()
LONG_CLASSES: set[str] = set()
WIDE_CONSTRUCTORS: set[str] = set()
NAMED_FROM_BELOW: set[str] = set()


@functools.cache
def sections():
    """[(title, first line, the lines of the heading)], in order."""
    return [
        (match[1], SOURCE.count("\n", 0, match.start()) + 1, match[0].splitlines())
        for match in HEADING.finditer(SOURCE)
    ]


def section_of(line):
    return [title for title, first, _ in sections() if first <= line][-1]


def names_of(node):
    """The names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def functions():
    """(qualified name, node) of every function."""
    for outer in ast.walk(TREE):
        for node in ast.iter_child_nodes(outer):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                owner = f"{outer.name}." if isinstance(outer, ast.ClassDef) else ""
                yield owner + node.name, node


def length(node):
    return node.end_lineno - node.lineno + 1


def test_each_section_says_in_its_heading_what_it_owns():
    found = sections()
    assert len(found) > 15
    assert [title for title, _, heading in found if not heading[2].startswith("# Owns ")] == []


def test_the_contents_at_the_top_are_the_sections():
    contents = ast.get_docstring(TREE).partition("stands above it:")[2]
    assert " ".join(contents.split()).replace(" · ", "|").split("|") == [title for title, _, _ in sections()]


def bound_in(function):
    """The names that a function binds itself: parameters and whatever it assigns."""
    arguments = function.args
    taken = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    found = {argument.arg for argument in taken if argument}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not function:
            found |= {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
            found |= {node.name} if isinstance(node, ast.FunctionDef) else set()
    return found


def global_names(node, local=frozenset()):
    """The names in a statement of the module that are not bound within it."""
    if isinstance(node, ast.FunctionDef):
        local = local | bound_in(node)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from global_names(child, local)


def test_a_section_names_only_what_stands_above_it():
    order = [title for title, _, _ in sections()]
    first = sections()[0][1]
    nodes = [node for node in TREE.body if node.lineno > first]
    home = {name: order.index(section_of(node.lineno)) for node in nodes for name in names_of(node)}
    below = set()
    for node in nodes:
        here = order.index(section_of(node.lineno))
        below |= {f"{order[here]} names {name}" for name in global_names(node) if home.get(name, -1) > here}
    assert below == NAMED_FROM_BELOW


def test_a_function_fits_a_screen():
    assert {name for name, node in functions() if length(node) > MAX_FUNCTION} == LONG_FUNCTIONS


def test_a_class_can_be_kept_in_mind():
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    assert {node.name for node in classes if length(node) > MAX_CLASS} == LONG_CLASSES


def test_a_constructor_takes_few_things():
    wide = set()
    for name, node in functions():
        taken = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) - 1
        if name.endswith(".__init__") and taken > MAX_PARAMETERS:
            wide.add(name.partition(".")[0])
    assert wide == WIDE_CONSTRUCTORS
