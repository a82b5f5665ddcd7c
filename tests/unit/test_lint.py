"""ruff and mypy as pyproject.toml configures them, each pinned in tests/locks/lint.txt."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.real("lint")


def run(real_part, *words):
    """What a tool of the part prints, empty when it finds nothing."""
    done = subprocess.run(
        [real_part("lint"), "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_finds_nothing(real_part):
    assert run(real_part, "ruff", "check", "--no-cache", "--quiet", ".") == ""


def test_the_text_is_set_as_ruff_sets_it(real_part):
    assert run(real_part, "ruff", "format", "--no-cache", "--check", "--quiet", ".") == ""


def test_mypy_finds_nothing(real_part, tmp_path):
    assert run(real_part, "mypy", "--cache-dir", str(tmp_path), "--no-error-summary") == ""
