"""Sessions whose n-th system call fails: the right end or a typed error, and nothing is left."""

import driver
import faults
import pytest
from faults import check_clean, plans

TIMEOUT = 2.0

RELAYED = {"recv", "send", "ppoll", "splice"}
"""Calls that a session with a network makes for certain, beside those of its launch."""


def sessions(shim, plans, **options):
    """Live through sessions until no plan strikes any more."""
    return driver.run(driver.sessions, shim=shim, plans=plans, timeout=TIMEOUT, **options)


def check_success(result):
    """The program's end, its output and its network are right."""
    assert (result["error"], result["status"], result["lines"]) == (None, 768, ["hello"]), result
    assert result["guest"] is None, result


@pytest.mark.parametrize("value", ["EIO", "ENOMEM"])
def test_failing_call_is_a_typed_error_or_harmless(shim, value):
    """Whatever fails, in the core or in Python's own calls: never a wrong status, never a hang."""
    # sigtimedwait cannot fail so on Linux, and what it would leave pending is fatal.
    calls = [call for call in faults.CALLS if call not in ("close", "munmap", "sigtimedwait")]
    results = sessions(shim, plans("fail", calls, value))
    assert {result["call"] for result in results} >= RELAYED
    for result in results:
        check_clean({**result, "left": []}, 2 * TIMEOUT)
        if result["error"] is None:
            assert result["status"] == 768, result
            assert result["lines"] == ["hello"] or not result["complete"], result
        else:
            assert result["typed"], result


@pytest.mark.parametrize(("action", "value"), [("fail", "EINTR"), ("short", 0)])
def test_interrupted_and_short_calls_change_nothing(shim, action, value):
    """Every byte arrives, whatever is done in pieces."""
    calls = ("recv", "send", "splice", "ppoll") if action == "fail" else ("recv", "send", "splice")
    results = sessions(shim, plans(action, calls, value))
    assert {result["call"] for result in results} >= {"recv", "send"}
    for result in results:
        check_clean(result, 2 * TIMEOUT)
        check_success(result)


@pytest.mark.parametrize("cap", [1009, 40_000])
def test_small_transfers_change_nothing(shim, cap):
    """A kernel that moves little at once."""
    (result,) = sessions(
        shim, [{"call": "recv", "action": "fail", "value": "EINTR"}], nth=1, cap=cap
    )
    check_success(result)
