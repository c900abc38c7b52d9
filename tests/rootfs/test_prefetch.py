"""Items made on a thread before they are asked for: the same, in order, and nothing left."""

import itertools
import os
import signal
import sys
import threading

import pytest

from nitro_vsock.rootfs.prefetch import Prefetch as Ahead

ALONE, ROOM = 2, 3


@pytest.fixture
def ahead():
    """Make an `Ahead` that is closed after the test."""
    made = []

    def make(items):
        made.append(Ahead(iter(items), ALONE, ROOM))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("count", [0, ALONE, ALONE + 1, 100])
def test_items_are_the_same_in_the_same_order(ahead, count):
    """Few of them or many; and the end stays the end."""
    items = ahead(range(count))
    assert list(items) == list(range(count))
    assert list(items) == []


def test_first_items_are_made_by_the_taker(ahead):
    """The others by one thread that is not the taker's."""
    makers = list(ahead(threading.get_ident() for _ in range(20)))
    assert makers[:ALONE] == [threading.get_ident()] * ALONE
    assert len(set(makers[ALONE:])) == 1
    assert makers[-1] != threading.get_ident()


def test_no_more_than_the_room_is_made_ahead(ahead):
    """Whoever takes nothing stops the thread."""
    made = []
    there = threading.Semaphore(0)

    def make():
        for number in itertools.count():
            made.append(number)
            there.release()
            yield number

    items = ahead(make())
    for taken in range(1, 500):
        next(items)
        assert len(made) <= taken + ROOM
    for _ in range(taken + ROOM):
        assert there.acquire(timeout=10)


def test_error_comes_in_its_place(ahead):
    """Behind all that was made before it; then there is nothing more, and no thread."""

    def make():
        yield from range(10)
        raise ValueError("here")

    items, found = ahead(make()), []
    before = threading.active_count()
    with pytest.raises(ValueError, match="here"):
        for item in items:
            found.append(item)
    assert found == list(range(10))
    assert threading.active_count() == before
    assert list(items) == []


def test_closing_ends_a_thread_that_has_no_room(ahead):
    """It waits for a taker that never comes back."""
    there = threading.Semaphore(0)

    def make():
        for number in itertools.count():
            there.release()
            yield number

    items = ahead(make())
    before = threading.active_count()
    assert [next(items) for _ in range(ALONE + 1)] == list(range(ALONE + 1))
    for _ in range(ALONE + 1 + ROOM):
        assert there.acquire(timeout=10)
    assert threading.active_count() == before + 1
    items.close()
    items.close()
    assert threading.active_count() == before
    assert list(items) == []


def test_taker_makes_the_items_where_no_thread_can_be_started(ahead, monkeypatch):
    """As under a limit of processes."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    makers = list(ahead(threading.get_ident() for _ in range(20)))
    assert makers == [threading.get_ident()] * 20


class HandlerError(Exception):
    """Raised by a signal's handler."""


def test_signal_that_another_thread_gets_interrupts_the_taker(ahead):
    """Its handler runs while the taker waits for an item that does not come."""
    go_on, came = threading.Event(), []
    taker = threading.get_ident()

    def make():
        yield from range(ALONE)
        while sys._current_frames()[taker].f_code is not Ahead.__next__.__code__:
            os.sched_yield()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        yield came.append(go_on.wait(10))

    def handle(*_):
        raise HandlerError

    old = signal.signal(signal.SIGUSR1, handle)
    try:
        items = ahead(make())
        with pytest.raises(HandlerError):
            list(items)
        assert not came
    finally:
        go_on.set()
        signal.signal(signal.SIGUSR1, old)
