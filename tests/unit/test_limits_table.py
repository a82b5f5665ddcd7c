"""docs/limits.md has a row for every container of the program that outlives a request.

Each row is true as far as that can be seen.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TREE = ast.parse((ROOT / "fjmcp_broker.py").read_text())
FILES = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
CONTAINERS = {
    "dict",
    "list",
    "set",
    "deque",
    "Counter",
    "OrderedDict",
    "defaultdict",
    "WeakValueDictionary",
    "WeakKeyDictionary",
    "WeakSet",
    "Queue",
    "SimpleQueue",
    "LifoQueue",
    "PriorityQueue",
    "bytearray",
    "BytesIO",
    "cache",
    "lru_cache",
}
LITERALS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
CHANGES = {"append", "add", "update", "setdefault", "insert", "extend", "appendleft"}


def name_of(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_container(value):
    """Whether an expression makes something that can grow."""
    if isinstance(value, ast.BinOp):
        return is_container(value.left) or is_container(value.right)
    if isinstance(value, ast.IfExp):
        return is_container(value.body) or is_container(value.orelse)
    return isinstance(value, LITERALS) or isinstance(value, ast.Call) and name_of(value.func) in CONTAINERS


def assigned(node):
    """(targets, value) of an assignment."""
    if isinstance(node, ast.Assign):
        return node.targets, node.value
    return ([node.target], node.value) if isinstance(node, ast.AnnAssign) else ([], None)


def own_attributes(function):
    """What a method's assignments make of `self`: (name, value)."""
    for node in ast.walk(function):
        targets, value = assigned(node)
        for target in targets:
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                yield target.attr, value


def is_cached(function):
    return any(name_of(getattr(each, "func", each)) in CONTAINERS for each in function.decorator_list)


def attributes_of(class_node):
    """Every attribute that a class assigns to `self`, in its body, or in `__slots__`."""
    names = set()
    for each in class_node.body:
        targets, value = assigned(each)
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(each, ast.FunctionDef):
            names |= {name for name, _ in own_attributes(each)}
        if "__slots__" in {getattr(target, "id", "") for target in targets}:
            names |= {element.value for element in value.elts}
    return names


def changed_at_run_time():
    """Names of the module that some function changes."""
    names = set()
    for function in (node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in CHANGES
            ):
                names.add(getattr(node.func.value, "id", ""))
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                names.add(getattr(node.value, "id", ""))
            if isinstance(node, ast.Global):
                names |= set(node.names)
    return names


def containers():
    """Class.attribute of what a class makes that can grow.

    function() of caches, and names of the module that change.
    """
    found, changed = set(), changed_at_run_time()
    for node in TREE.body:
        targets, value = assigned(node)
        if is_container(value):
            found |= {each.id for each in targets if isinstance(each, ast.Name) and each.id in changed}
        if isinstance(node, ast.FunctionDef) and is_cached(node):
            found.add(f"{node.name}()")
        for each in node.body if isinstance(node, ast.ClassDef) else ():
            targets, value = assigned(each)
            if is_container(value) or isinstance(value, ast.Call) and "default_factory" in ast.unparse(value):
                found |= {f"{node.name}.{target.id}" for target in targets}
            if isinstance(each, ast.FunctionDef):
                found |= {
                    f"{node.name}.{name}" for name, value in own_attributes(each) if is_container(value)
                }
    return found


def rows():
    """{container: (what makes it grow, bound, owner, test)} of the document."""
    lines = (ROOT / "docs" / "limits.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]
    return {
        each[0].strip("`"): each[1:]
        for each in cells
        if re.fullmatch(r"`[A-Za-z_.]+(\(\))?`", each[0]) and len(each) == 5
    }


ROWS = rows()


def test_every_container_has_a_row_and_every_row_a_container():
    known = {
        f"{node.name}.{name}"
        for node in TREE.body
        if isinstance(node, ast.ClassDef)
        for name in attributes_of(node)
    } | {f"{node.name}()" for node in TREE.body if isinstance(node, ast.FunctionDef)}
    assert len(ROWS) > 30
    assert sorted(containers() - ROWS.keys()) == []
    assert sorted(ROWS.keys() - known) == []


@pytest.mark.parametrize("container", sorted(ROWS))
def test_a_row_says_everything_and_names_tests_that_exist(container):
    growth, bound, owner, proof = ROWS[container]
    assert growth and bound and owner
    named = re.findall(r"`(\w+\.py)::(\w+)`", proof)
    assert named or proof == "-" and bound.startswith(("fixed", "as many as", "one ", "see "))
    for file, test in named:
        assert f"def {test}(" in FILES[file].read_text(), f"{file} has no {test}"


def test_the_walk_sees_what_it_is_meant_to_see():
    found = containers()
    assert {"EventStream._items", "KeptBytes.users", "Sessions.pools", "Backend.pending"} <= found
    assert "SETTINGS" not in found and "LISTS" not in found
