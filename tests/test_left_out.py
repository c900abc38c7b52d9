"""What a run leaves out is said at its end, with what to do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"

SOME_TESTS = """
import pytest
from left_out import leave_out, needs

@needs(False, "a teapot", "buy one")
@pytest.mark.parametrize("cup", range(3))
def test_tea(cup):
    pass

def test_moon():
    leave_out("the moon", "wait for the night")

def test_that_runs():
    pass

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""


def skips(path):
    """Return the lines on which a file skips tests without `left_out`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in {"skip", "skipif", "importorskip", "SkipTest"}
    ]


def test_every_skip_says_how_to_get_the_test():
    """Tests are left out by `leave_out` and `needs` only, which ask for a remedy."""
    found = {path.name: lines for path in TESTS.rglob("*.py") if (lines := skips(path))}
    assert set(found) == {"left_out.py"}


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_run_says_at_its_end_what_it_left_out(tmp_path, workers):
    """One line a need, with the number of tests; what is expected to fail is not left out."""
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "left_out", *workers, str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [
        line for line in done.stdout.splitlines() if "test left" in line or "tests left" in line
    ]
    assert said == [
        "3 tests left out, needs a teapot: buy one",
        "1 test left out, needs the moon: wait for the night",
    ]
