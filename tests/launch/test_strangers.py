"""Strangers before and beside the guest: it is served, they are counted, the deadline holds."""

import contextlib
import errno
import os
import resource
import threading
import time

import driver
import pytest
from machine import CID, SOON
from peer import READY, Guest, Parser, connect, wait_until

from nitro_vsock import PollNoEventsError, ReadySignalNotDetectedError, VsockAcceptError

KEPT = 64
"""Silent connections a gate keeps, NV_GATE_PENDING."""

NONE = {"cid": 0, "ready": 0, "closed": 0, "crowded": 0}


def patient(path):
    """Connect, however full the backlog is."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            return connect(path)
    raise AssertionError("nobody accepts")


class PatientGuest(threading.Thread):
    """A guest whose connection is there already."""

    def __init__(self, sock, *, spoken=False):
        super().__init__(daemon=True)
        self._sock = sock
        self._spoken = spoken
        self._taken = None
        self.start()

    def run(self):
        """Be the guest."""
        with self._sock as sock:
            if not self._spoken:
                sock.sendall(READY)
            if sock.recv(1) == READY:
                self._taken = Parser(sock).run()

    def result(self):
        """Return what was taken."""
        self.join(20)
        return self._taken


def closes(path, connect=patient):
    """A stranger that connects and goes away."""
    connect(path).close()


def says_junk(path, connect=patient):
    """A stranger that says something else, and goes away."""
    with connect(path) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")


def says_ready_and_closes(path):
    """A guest that died right after its ready byte."""
    with connect(path) as sock:
        sock.sendall(READY)


STRANGERS = {closes: "closed", says_junk: "ready", says_ready_and_closes: "closed"}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_guest_is_served_after_a_stranger(writer, archive, uds, guest_path, stranger):
    """The stranger is refused and counted by its reason."""
    with writer.listen(CID, uds_path=uds) as launch:
        stranger(guest_path)
        guest = Guest(guest_path)
        report = launch.send(timeout=20)
    assert guest.result().rootfs_sha256 == archive.sha256
    assert report.strangers == {**NONE, STRANGERS[stranger]: 1}
    assert report.strangers_refused == 1


def test_silent_stranger_does_not_hold_up_the_guest(writer, archive, uds, guest_path):
    """It is neither waited for nor refused, and it learns nothing of the launch."""
    with writer.listen(CID, uds_path=uds) as launch, connect(guest_path) as silent:
        guest = Guest(guest_path)
        report = launch.send(timeout=20)
        assert silent.recv(1) == b""
    assert guest.result().rootfs_sha256 == archive.sha256
    assert report.seconds["accept"] < SOON
    assert report.strangers == NONE


def test_late_junk_of_a_silent_stranger_is_refused(writer, uds, guest_path):
    """A stranger that was kept is still looked at when it speaks."""

    def speak():
        assert silent.recv(1) == b""  # the second stranger was refused: both have been looked at
        first.sendall(b"G")
        assert first.recv(1) == b""
        guests.append(Guest(guest_path))

    guests = []
    with (
        writer.listen(CID, uds_path=uds) as launch,
        connect(guest_path) as first,
        connect(guest_path) as silent,
    ):
        silent.sendall(b"G")
        thread = threading.Thread(target=speak)
        thread.start()
        report = launch.send(timeout=20)
        thread.join()
    assert guests[0].result().received == report.bytes_sent
    assert report.strangers == {**NONE, "ready": 2}


@pytest.mark.parametrize("stranger", [closes, says_junk])
def test_two_hundred_strangers(writer, archive, uds, guest_path, stranger):
    """More than the backlog holds at once, all before the guest."""

    def crowd():
        for _ in range(200):
            stranger(guest_path)
        guests.append(PatientGuest(patient(guest_path)))

    guests = []
    with writer.listen(CID, uds_path=uds) as launch:
        thread = threading.Thread(target=crowd)
        thread.start()
        report = launch.send(timeout=20)
        thread.join()
    assert guests[0].result().rootfs_sha256 == archive.sha256
    assert report.strangers == {**NONE, STRANGERS[stranger]: 200}


def test_more_silent_strangers_than_are_kept(writer, archive, uds, guest_path):
    """The ones that were silent longest make room, and the guest is served."""
    with contextlib.ExitStack() as crowd, writer.listen(CID, uds_path=uds) as launch:
        for _ in range(100):
            crowd.enter_context(connect(guest_path))
        guest = Guest(guest_path)
        report = launch.send(timeout=20)
    assert guest.result().rootfs_sha256 == archive.sha256
    assert report.strangers == {**NONE, "crowded": 100 + 1 - KEPT}


def test_guest_among_silent_strangers(writer, archive, uds, guest_path):
    """A guest that has spoken is admitted however many come behind it."""
    with contextlib.ExitStack() as crowd, writer.listen(CID, uds_path=uds) as launch:
        for _ in range(40):
            crowd.enter_context(connect(guest_path))
        sock = connect(guest_path)
        sock.sendall(READY)
        for _ in range(80):
            crowd.enter_context(connect(guest_path))
        guest = PatientGuest(sock, spoken=True)
        report = launch.send(timeout=20)
    assert guest.result().rootfs_sha256 == archive.sha256
    assert report.strangers == NONE


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strict_launch_fails_at_the_first_stranger(writer, uds, guest_path, stranger):
    """As the reference does; the enclave has nothing of the launch yet."""
    with writer.listen(CID, uds_path=uds, strict_peer=True) as launch:
        stranger(guest_path)
        with pytest.raises(ReadySignalNotDetectedError) as caught:
            launch.send(timeout=20)
    assert caught.value.stage == "handshake"
    assert caught.value.refused == {**NONE, STRANGERS[stranger]: 1}
    assert not caught.value.must_terminate_enclave


def test_want_of_descriptors_is_told_although_a_stranger_waits(writer, uds, guest_path):
    """It is the accept that failed, not the handshake with the silent one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with writer.listen(CID, uds_path=uds) as launch, connect(guest_path), connect(guest_path):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
        try:
            with pytest.raises(VsockAcceptError) as caught:
                launch.send(timeout=20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (caught.value.errno, caught.value.stage) == (errno.EMFILE, "accept")


def test_deadline_error_counts_who_came(writer, uds, guest_path):
    """Three strangers and no guest: the exception says so, in words too."""
    with writer.listen(CID, uds_path=uds) as launch:
        closes(guest_path)
        closes(guest_path)
        says_junk(guest_path)
        with pytest.raises(PollNoEventsError, match="refused") as caught:
            launch.send(timeout=1.0)
    assert caught.value.refused == {**NONE, "closed": 2, "ready": 1}


@contextlib.contextmanager
def flood(path, stranger):
    """Let strangers come all the time; yield a count of them."""
    stop = threading.Event()
    count = [0]

    def come():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                stranger(path, connect)
                count[0] += 1

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("stranger", [closes, says_junk])
def test_flood_of_strangers_does_not_move_the_deadline(writer, uds, guest_path, stranger):
    """Somebody is always there to be refused, and the call still ends in time."""
    with writer.listen(CID, uds_path=uds) as launch, flood(guest_path, stranger):
        began = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            launch.send(timeout=0.5)
        assert 0.5 <= time.monotonic() - began < SOON
    assert sum(caught.value.refused.values()) > 0


def test_flood_that_never_pauses_does_not_move_the_deadline(shim):
    """Whenever the core looks, one more stranger is there."""
    plan = {"call": "accept4", "action": "crowd", "step": 1}
    (result,) = driver.run(driver.launches, shim=shim, plans=[plan], nth=1, timeout=0.5)
    assert result["error"] == "PollNoEventsError"
    assert 0.5 <= result["seconds"] < SOON
    assert result["refused"]["closed"] > 64
    assert result["leaked"] == []


@pytest.mark.parametrize("stranger", [closes, says_junk])
def test_guest_gets_through_a_flood(writer, archive, uds, guest_path, stranger):
    """Strangers come before, beside and after the guest."""
    with writer.listen(CID, uds_path=uds) as launch, flood(guest_path, stranger) as count:
        guests = []
        wait_until(lambda: count[0], what="a stranger")
        thread = threading.Thread(target=lambda: guests.append(PatientGuest(patient(guest_path))))
        thread.start()
        report = launch.send(timeout=20)
        thread.join()
        assert guests[0].result().rootfs_sha256 == archive.sha256
    assert report.strangers_refused > 0


def test_another_cid_is_refused_whatever_it_says(shim):
    """On AF_VSOCK the CID decides before the first byte; the right one is served."""
    plan = {"call": "accept4", "action": "stranger", "value": 99, "step": 1}
    (result,) = driver.run(
        driver.launches, shim=shim, plans=[plan], nth=1, vsock_cid=CID, timeout=0.3
    )
    assert (result["error"], result["refused"]) == ("PollNoEventsError", {**NONE, "cid": 1})
    plan["step"] = 0
    (result,) = driver.run(
        driver.launches, shim=shim, plans=[plan], nth=1, vsock_cid=CID, before=1, timeout=20
    )
    assert result["right"]
    assert result["report"]["strangers"] == {**NONE, "cid": 1}
    assert result["report"]["peer"]["cid"] == CID
