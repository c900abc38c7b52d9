"""One deadline covers everything from the accept to the guest's end, and is kept at every point."""

import contextlib
import os
import socket
import threading
import time

import pytest
from archives import make_tar
from machine import CID, SOON
from peer import READY, Guest, connect
from stages import ARGUMENT_BYTES, TOTAL, RawGuest, long_launch, stuck

from nitro_vsock import (
    ConnectTimeoutError,
    EnclaveArgsReader,
    EnclaveArgsWriter,
    HandshakeTimeoutError,
    PollNoEventsError,
    PollTimeout,
    Rootfs,
    StreamTimeoutError,
)

TIMEOUT = 0.3


@contextlib.contextmanager
def times_out(cls, timeout=TIMEOUT, stage=None):
    """Expect this class, not before the timeout and not long after it; yield pytest's info."""
    began = time.monotonic()
    with pytest.raises(cls) as caught:
        yield caught
    elapsed = time.monotonic() - began
    assert timeout <= elapsed < timeout + SOON
    assert type(caught.value) is cls
    assert stage is None or caught.value.stage == stage


def test_nobody_connects(writer, uds):
    """No guest comes: nothing was sent, and the enclave need not be ended."""
    with (
        writer.listen(CID, uds_path=uds) as launch,
        times_out(PollNoEventsError, stage="accept") as caught,
    ):
        launch.send(TIMEOUT)
    assert caught.value.bytes_sent == 0
    assert not caught.value.must_terminate_enclave


def test_silent_peer(writer, uds, guest_path):
    """A peer that connects and says nothing is a handshake that took too long."""
    with (
        writer.listen(CID, uds_path=uds) as launch,
        connect(guest_path),
        times_out(HandshakeTimeoutError, stage="handshake") as caught,
    ):
        launch.send(TIMEOUT)
    assert caught.value.bytes_sent == 0
    assert not caught.value.must_terminate_enclave


@pytest.mark.parametrize("stage", ["arguments", "rootfs", "close"])
@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_guest_that_stops(uds, guest_path, stage, strategy):
    """A guest that stops reading, or stays after Finished: the count sent is exact."""
    with (
        long_launch(CID, uds, strategy=strategy) as launch,
        stuck(guest_path, stage) as (reached, guest),
    ):
        timeout = {"arguments": TIMEOUT, "rootfs": 1.0, "close": 2.0}[stage]
        with times_out(StreamTimeoutError, timeout, stage) as caught:
            launch.send(timeout)
        reached()
        guest.end()
    error = caught.value
    assert error.bytes_sent == guest.received
    assert error.total == TOTAL
    assert error.must_terminate_enclave
    if stage == "arguments":
        assert 0 < error.bytes_sent < ARGUMENT_BYTES
    elif stage == "rootfs":
        assert ARGUMENT_BYTES < error.bytes_sent < TOTAL
    else:
        assert error.bytes_sent == TOTAL


def test_guest_that_stops_reading_memory(uds, guest_path):
    """The same where the root file system is in memory."""
    data = make_tar(16 << 20)  # twice the largest send buffer: it cannot all be taken
    writer = EnclaveArgsWriter(Rootfs.from_bytes(data), "/bin/app", ["/bin/app"], ["A=1"])
    with writer.listen(CID, uds_path=uds) as launch, RawGuest(guest_path, 1 << 20) as guest:
        with times_out(StreamTimeoutError, stage="rootfs") as caught:
            launch.send(TIMEOUT)
        guest.end()
    assert 1 << 20 <= caught.value.bytes_sent == guest.received < len(data)


def test_guest_that_dribbles(uds, guest_path):
    """A guest that takes a little again and again gets no new deadline each time."""
    pause = threading.Event()
    with (
        long_launch(CID, uds) as launch,
        times_out(StreamTimeoutError),
    ):
        guest = Guest(guest_path, before_read=lambda received: pause.wait(0.02))
        try:
            launch.send(TIMEOUT)
        finally:
            pause.set()
    assert guest.failure() is not None


@pytest.mark.parametrize("strategy", ["splice", "read"])
def test_source_pipe_that_stalls(uds, guest_path, strategy):
    """What the pipe had went out, and the wait for the rest ends."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x" * 5000)
        rootfs = Rootfs.from_fd(read_end, length=9000)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with (
            writer.listen(CID, uds_path=uds, strategy=strategy) as launch,
            RawGuest(guest_path, 1 << 60) as guest,
            times_out(StreamTimeoutError, stage="rootfs") as caught,
        ):
            launch.send(TIMEOUT)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert caught.value.total - caught.value.bytes_sent == 4000 + 1
    assert guest.received == caught.value.bytes_sent


def test_source_pipe_that_dribbles(uds, guest_path):
    """A byte now and then buys no time."""
    read_end, write_end = os.pipe()
    stop = threading.Event()

    def dribble():
        while not stop.wait(0.02):
            os.write(write_end, b"x")

    thread = threading.Thread(target=dribble)
    try:
        rootfs = Rootfs.from_fd(read_end, length=1 << 20)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with (
            writer.listen(CID, uds_path=uds) as launch,
            RawGuest(guest_path, 1 << 60) as guest,
            times_out(StreamTimeoutError, stage="rootfs") as caught,
        ):
            thread.start()
            launch.send(TIMEOUT)
    finally:
        stop.set()
        thread.join()
        os.close(read_end)
        os.close(write_end)
    assert guest.received == caught.value.bytes_sent


def test_late_guest_leaves_less_time_for_the_stream(uds, guest_path):
    """Accept, handshake and stream share one budget: it does not start anew at each."""
    timeout, late = 2.0, 1.0
    began = time.monotonic()

    def be_late():
        finished.wait(late / 2)
        with connect(guest_path) as sock:
            finished.wait(late / 2)
            sock.sendall(READY)
            assert sock.recv(1) == READY
            finished.wait(20)

    finished = threading.Event()
    thread = threading.Thread(target=be_late)
    with long_launch(CID, uds) as launch, times_out(StreamTimeoutError, timeout):
        thread.start()
        try:
            launch.send(timeout)
        finally:
            finished.set()
            thread.join()
    assert time.monotonic() - began < late + timeout


@pytest.mark.parametrize("timeout", [0, 0.0, PollTimeout(0)])
def test_no_time_at_all(writer, uds, guest_path, timeout):
    """A timeout of 0 fails at once, whoever waits there, and does not mean "no limit"."""
    with (
        writer.listen(CID, uds_path=uds) as launch,
        connect(guest_path) as guest,
        times_out(PollNoEventsError, 0),
    ):
        guest.sendall(READY)
        launch.send(timeout)


def test_poll_timeout_counts_milliseconds(writer, uds):
    """PollTimeout(300) is 0.3 seconds."""
    with writer.listen(CID, uds_path=uds) as launch, times_out(PollNoEventsError, 0.3):
        launch.send(PollTimeout(300))


@contextlib.contextmanager
def host(path, backlog=8):
    """Yield a listening socket of a host's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(backlog)
        yield listener


def test_reader_whose_host_accepts_nobody(uds, guest_path):
    """A full backlog cannot be polled for, and still ends in time."""
    with (
        host(guest_path, backlog=0),
        connect(guest_path),
        EnclaveArgsReader(CID, uds_path=uds) as reader,
        times_out(ConnectTimeoutError, stage="connect"),
    ):
        reader.read_args(timeout=TIMEOUT)


def test_reader_whose_host_is_silent(uds, guest_path):
    """Connected, and no ready byte comes back."""
    with (
        host(guest_path),
        EnclaveArgsReader(CID, uds_path=uds) as reader,
        times_out(HandshakeTimeoutError, stage="handshake"),
    ):
        reader.read_args(timeout=TIMEOUT)


def test_reader_whose_host_stops(uds, guest_path):
    """The stream stands still; bytes_sent counts what was received."""

    def serve():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(READY + b"\x04\x05\x01")
            finished.wait(20)

    finished = threading.Event()
    with host(guest_path) as listener, EnclaveArgsReader(CID, uds_path=uds) as reader:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with times_out(StreamTimeoutError, stage="read") as caught:
                reader.read_args(timeout=TIMEOUT)
        finally:
            finished.set()
            thread.join()
    assert caught.value.bytes_sent == 3
