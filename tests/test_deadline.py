"""Timeouts: the reference's formula, what is no timeout, and the moment a deadline is."""

import time
from decimal import Decimal

import pytest

from nitro_vsock import DEFAULT_TIMEOUT, InvalidArgumentError, PollTimeout, poll_timeout
from nitro_vsock.deadline import MAX_TIMEOUT, Deadline

GIB = 1 << 30
MINUTE = 60_000


@pytest.mark.parametrize(
    ("eif", "memory", "milliseconds"),
    [
        (1, 1, 120_000),
        (6 * GIB, 1, 2 * MINUTE),
        (6 * GIB + 1, 1, 3 * MINUTE),
        (1, 100 * GIB, 2 * MINUTE),
        (1, 100 * GIB + 1, 3 * MINUTE),
        (6 * GIB, 100 * GIB, 2 * MINUTE),
        (6 * GIB + 1, 100 * GIB + 1, 4 * MINUTE),
        (12 * GIB, 200 * GIB, 4 * MINUTE),
        (12 * GIB + 1, 200 * GIB + 1, 6 * MINUTE),
        (60 * GIB, 1000 * GIB, 20 * MINUTE),
    ],
)
def test_poll_timeout_is_the_references_formula(eif, memory, milliseconds):
    """A minute for each begun 6 GiB of image and each begun 100 GiB of memory, never cut short."""
    timeout = poll_timeout(eif, memory)
    assert timeout == PollTimeout.from_sizes(eif, memory) == PollTimeout(milliseconds)
    assert timeout.seconds == milliseconds / 1000


def test_default_is_the_least_the_formula_gives():
    """120 s; the reference's 16 bits would make 54.464 s of it."""
    assert poll_timeout(1, 1) == DEFAULT_TIMEOUT
    assert DEFAULT_TIMEOUT.milliseconds == 120_000


@pytest.mark.parametrize("size", [0, -1, 1 << 64, True, 1.0, "1", None])
def test_size_that_is_none_is_refused_by_name(size):
    """Each size is checked, and named."""
    for field, sizes in (("eif_bytes", (size, 1)), ("memory_bytes", (1, size))):
        with pytest.raises(InvalidArgumentError) as caught:
            poll_timeout(*sizes)
        assert caught.value.field == field
        assert caught.value.value is size


@pytest.mark.parametrize("milliseconds", [-1, 10**12 + 1, True, 1.5, "1", None])
def test_milliseconds_that_are_none_are_refused(milliseconds):
    """A PollTimeout is a whole number of milliseconds, up to some 31 years."""
    with pytest.raises(InvalidArgumentError) as caught:
        PollTimeout(milliseconds)
    assert caught.value.field == "milliseconds"
    assert caught.value.value is milliseconds


def test_milliseconds_at_the_ends_of_the_range_are_taken():
    """Zero, and the most a deadline can be away."""
    assert PollTimeout(0).seconds == 0
    assert Deadline.after(PollTimeout(10**12)).ns > 10**18


INVALID = [
    float("nan"),
    float("inf"),
    float("-inf"),
    -1,
    -1e-9,
    MAX_TIMEOUT + 1,
    1e300,
    10**400,
    -(10**400),
    True,
    False,
    "5",
    b"5",
    None,
    Decimal(5),
    5j,
    [5],
]


@pytest.mark.parametrize("timeout", INVALID, ids=lambda timeout: repr(timeout)[:12])
def test_timeout_that_is_none_is_refused(timeout):
    """Neither NaN nor infinity nor a number of any size gets past the check as another error."""
    with pytest.raises(InvalidArgumentError) as caught:
        Deadline.after(timeout)
    assert caught.value.field == "timeout"
    assert caught.value.value is timeout
    assert "seconds" in caught.value.limit


@pytest.mark.parametrize(
    ("timeout", "ns"),
    [
        (0, 0),
        (0.0, 0),
        (1, 10**9),
        (0.5, 5 * 10**8),
        (1e-12, 1),
        (MAX_TIMEOUT, 10**18),
        (PollTimeout(1), 10**6),
        (PollTimeout(120_000), 120 * 10**9),
    ],
)
def test_deadline_is_the_timeout_from_now(timeout, ns):
    """On the monotonic clock, in nanoseconds, rounded up; and it fits 64 bits."""
    before = time.monotonic_ns()
    deadline = Deadline.after(timeout)
    after = time.monotonic_ns()
    assert before + ns <= deadline.ns <= after + ns
    assert deadline.ns < 1 << 63
