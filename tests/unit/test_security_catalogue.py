"""Each case of the catalogue has a row in docs/security.md.

Its tests exist, run, and can fail.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PAGE = (TESTS.parent / "docs" / "security.md").read_text()
CASES = {
    "A": 22,
    "B": 16,
    "C": 20,
    "D": 12,
    "G": 18,
    "H": 24,
    "J": 25,
    "K": 19,
    "L": 7,
    "N": 5,
    "P": 20,
    "R": 17,
    "S": 19,
    "T": 22,
    "U": 12,
    "X": 14,
    "Y": 54,
}
ROWS = re.findall(r"^\| ([A-Z][0-9]{2}) \| (.*?) \| (.*) \|$", PAGE, re.MULTILINE)
NUMBERED_OTHERWISE = {"test_clients.py"}  # its numbers are those of what clients need
NEVER_RUNS = re.compile(r"pytest\.mark\.(skip|xfail|long)\b|pytest\.skip\(")
CHECKS = re.compile(r"\bassert\b|pytest\.(raises|fail)\(|raise AssertionError")


class Module:
    """One test file: its top-level functions and classes, and what marks all of its tests."""

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_text())
        self.name = path.name
        self.parts = {
            node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        self.marks = "".join(
            ast.unparse(node)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        )

    def tests(self) -> list[str]:
        """The names of its test functions."""
        return [name for name in self.parts if name.startswith("test_")]

    def never_runs(self, test: str) -> bool:
        """Whether a test is skipped, expected to fail, or left to --long."""
        return bool(NEVER_RUNS.search(self.marks + ast.unparse(self.parts[test])))

    def can_fail(self, name: str, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a function asserts something, itself or by one of this file that it names."""
        part = self.parts[name]
        named = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        named |= {argument.arg for argument in part.args.args} if isinstance(part, ast.FunctionDef) else set()
        return bool(CHECKS.search(ast.unparse(part))) or any(
            self.can_fail(other, seen | {name}) for other in named & self.parts.keys() - seen - {name}
        )


MODULES = {path.name: Module(path) for path in TESTS.rglob("test_*.py")}
KNOWN = {(module.name, test) for module in MODULES.values() for test in module.tests()}


def named_in(text: str) -> set[tuple[str, str]]:
    """The (file, test) pairs that a text names."""
    return set(re.findall(r"(test_\w+\.py)::(test_\w+)", text))


def test_each_case_has_one_row():
    assert sorted(case for case, _, _ in ROWS) == sorted(
        f"{group}{number:02}" for group, count in CASES.items() for number in range(1, count + 1)
    )


def test_each_row_names_tests_that_there_are_and_in_full():
    assert named_in(PAGE) - KNOWN == set()
    assert set(re.findall(r"(?<!::)\btest_\w+(?!\w*\.py)", PAGE)) == set()
    assert [case for case, tests, _ in ROWS if not named_in(tests)] == []


def test_a_test_that_has_a_cases_id_in_its_name_is_in_the_row_of_that_case():
    rows = {case: named_in(tests) for case, tests, _ in ROWS}
    missing = [
        (case, file, test)
        for file, test in sorted(KNOWN)
        if file not in NUMBERED_OTHERWISE
        for case in re.findall(r"(?<=_)[A-Z][0-9]{2}(?=_)", test)
        if (file, test) not in rows.get(case, ())
    ]
    assert missing == [], "name each in the row of its case in docs/security.md"


def test_no_row_rests_on_a_test_that_never_runs_or_cannot_fail():
    named = named_in(PAGE) & KNOWN
    assert [each for each in sorted(named) if MODULES[each[0]].never_runs(each[1])] == []
    assert [each for each in sorted(named) if not MODULES[each[0]].can_fail(each[1])] == []


def test_what_a_row_says_is_not_met_or_not_proven_has_a_reason():
    bare = [
        case for case, _, outcome in ROWS if re.search(r"NOT MET|NOT PROVEN", outcome) and len(outcome) < 40
    ]
    assert bare == []
