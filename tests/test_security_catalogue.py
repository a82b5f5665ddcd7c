"""docs/security.md has a row for each case of the catalogue, and each row a test that there is, or a reason."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
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
}
ROWS = re.findall(
    r"^\| ([A-Z][0-9]{2}) \| (.*?) \| (.*) \|$",
    (TESTS.parent / "docs" / "security.md").read_text(),
    re.MULTILINE,
)


def known_tests():
    return {
        f"{path.name}::{name}"
        for path in TESTS.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }


def test_each_case_has_one_row():
    assert sorted(case for case, _, _ in ROWS) == sorted(
        f"{group}{number:02}" for group, count in CASES.items() for number in range(1, count + 1)
    )


def test_each_row_names_tests_that_there_are():
    named = {test for _, *cells in ROWS for test in re.findall(r"test_\w+\.py::test_\w+", " ".join(cells))}
    assert named - known_tests() == set()


def test_a_row_without_a_test_has_a_reason():
    assert [
        case
        for case, test, outcome in ROWS
        if not re.search(r"::test_", test) and (test != "-" or len(outcome) < 40)
    ] == []
