"""The guest or its enclave dies at every stage: the right exception, soon, with an honest count."""

import contextlib
import os
import random
import socket
import threading
import time

import pytest
from machine import CID, SOON
from peer import READY, Guest, connect
from stages import ARGUMENT_BYTES, ROOTFS_BYTES, TOTAL, RawGuest, long_launch, stuck

from nitro_vsock import (
    EnclaveArgsReader,
    EnclaveArgsWriter,
    EnclaveDiedError,
    InvalidArgumentError,
    PeerClosedError,
    PollNoEventsError,
    Rootfs,
)

SEED = 20250211


def close(sock):
    """As a process's end does; what was unread is lost."""
    sock.close()


def shut(sock):
    """Both directions, the descriptor still open."""
    sock.shutdown(socket.SHUT_RDWR)


def stop_reading(sock):
    """Only the guest's reading direction: what we send has nowhere to go."""
    sock.shutdown(socket.SHUT_RD)


HOWS = [close, shut, stop_reading]


@contextlib.contextmanager
def raises_soon(cls):
    """Expect the class, soon; yield pytest's info."""
    began = time.monotonic()
    with pytest.raises(cls) as caught:
        yield caught
    assert time.monotonic() - began < SOON
    assert type(caught.value) is cls


def dies_at(launch, path, size, how):
    """Send to a guest that takes `size` bytes and dies; return the exception and the guest."""
    with RawGuest(path, size) as guest:
        guest.die(how)
        with raises_soon(PeerClosedError) as caught:
            launch.send(timeout=30)
    return caught.value, guest


@pytest.mark.parametrize("speaks", [False, True])
def test_guest_dies_in_the_handshake(writer, uds, guest_path, speaks):
    """It counts as a stranger: nothing was sent, and the wait goes on to the deadline."""
    with writer.listen(CID, uds_path=uds) as launch:
        with connect(guest_path) as sock:
            if speaks:
                sock.sendall(READY)
        with pytest.raises(PollNoEventsError) as caught:
            launch.send(timeout=0.5)
    assert caught.value.refused["closed"] == 1
    assert not caught.value.must_terminate_enclave


@pytest.mark.parametrize("how", HOWS)
# No more: the socket holds some 216 KiB, so the host cannot be done with the arguments meanwhile.
@pytest.mark.parametrize("size", [0, 1, 9, 10_000])
def test_guest_dies_in_the_arguments(uds, guest_path, size, how):
    """The stage is arguments, and at least what the guest had read was sent."""
    with long_launch(CID, uds) as launch:
        error, guest = dies_at(launch, guest_path, size, how)
    assert error.stage == "arguments"
    assert guest.received <= error.bytes_sent < ARGUMENT_BYTES
    assert (error.total, error.must_terminate_enclave) == (TOTAL, True)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_guest_dies_at_random_bytes_of_the_rootfs(uds, strategy, how):
    """Wherever it is, with whatever is unread."""
    # Nothing beyond: the socket's buffers hold some 8 MiB, and what fits them is sent before.
    numbers = random.Random(f"{SEED} {strategy} {how.__name__}")
    for size in numbers.sample(range(ARGUMENT_BYTES, ROOTFS_BYTES // 4), 4):
        with long_launch(CID, uds, strategy=strategy) as launch:
            error, guest = dies_at(launch, f"{uds}_{CID + 1}", size, how)
        assert error.stage == "rootfs", size
        assert size == guest.received <= error.bytes_sent < TOTAL
        assert (error.total, error.must_terminate_enclave) == (TOTAL, True)


@pytest.mark.parametrize("how", HOWS)
def test_guest_dies_while_memory_is_sent(uds, guest_path, how):
    """The same for a root file system in memory."""
    rootfs = Rootfs.from_bytes(bytes(ROOTFS_BYTES))
    writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
    with writer.listen(CID, uds_path=uds) as launch:
        error, guest = dies_at(launch, guest_path, 1 << 20, how)
    assert error.stage == "rootfs"
    assert guest.received <= error.bytes_sent < error.total


@pytest.mark.parametrize("how", [close, shut])
@pytest.mark.parametrize("strategy", ["splice", "read"])
def test_guest_dies_while_the_source_is_slow(uds, guest_path, strategy, how):
    """A pipe that gives nothing does not keep us from noticing."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x" * 100)
        rootfs = Rootfs.from_fd(read_end, length=5000)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with writer.listen(CID, uds_path=uds, strategy=strategy) as launch:
            error, _ = dies_at(launch, guest_path, 150, how)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert error.stage == "rootfs"
    assert error.total - error.bytes_sent == 4900 + 1


def test_guest_closes_with_bytes_unread_after_finished(uds, guest_path):
    """On Unix sockets it shows, and is an error: the guest has not got everything."""
    with long_launch(CID, uds) as launch:
        error, _ = dies_at(launch, guest_path, TOTAL - 1, leave_finished_unread)
    assert (error.stage, error.bytes_sent, error.total) == ("close", TOTAL, TOTAL)
    assert error.must_terminate_enclave


def leave_finished_unread(sock):
    """Wait for Finished to be there, and close without reading it."""
    assert sock.recv(1, socket.MSG_PEEK) == b"\xff"
    sock.close()


@pytest.mark.parametrize("how", [close, shut])
def test_guest_that_has_everything_may_go_as_it_likes(uds, guest_path, how):
    """After the last byte was read, a close is the success it should be."""
    with long_launch(CID, uds) as launch, RawGuest(guest_path, TOTAL) as guest:
        guest.die(how)
        report = launch.send(timeout=30)
    assert report.peer_closed
    assert guest.received == report.bytes_sent == TOTAL


def test_guest_that_talks_after_the_handshake_is_not_listened_to(writer, archive, uds, guest_path):
    """Bytes the protocol does not have neither stop the stream nor count as its end."""
    with writer.listen(CID, uds_path=uds) as launch, connect(guest_path) as sock:
        sock.sendall(READY + b"noise")
        thread = threading.Thread(target=launch.send, args=(20,))
        thread.start()
        data = b""
        while not data.endswith(b"\xff") or len(data) < len(archive.data):
            data += sock.recv(1 << 20)
        sock.sendall(b"more noise")
        assert thread.is_alive()
        sock.close()
        thread.join(10)
    assert archive.data in data


@pytest.mark.parametrize("stage", ["accept", "handshake", "arguments", "rootfs", "close"])
@pytest.mark.parametrize("watched", ["pipe", "socket"])
def test_enclave_dies(uds, guest_path, stage, watched):
    """A hang-up of its descriptor ends the launch at once, wherever it is."""
    ours, theirs = pair(watched)
    hung_up = []

    def die():
        reached()
        hung_up.append(time.monotonic())
        os.close(theirs)

    with long_launch(CID, uds) as launch, stuck(guest_path, stage) as (reached, _):
        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(EnclaveDiedError) as caught:
            launch.send(timeout=30, enclave_fd=ours)
        assert time.monotonic() - hung_up[0] < SOON
        thread.join()
    os.close(ours)
    assert caught.value.stage == stage
    assert caught.value.must_terminate_enclave == (stage in ("arguments", "rootfs", "close"))


def pair(kind):
    """Return two descriptors, of which the first hangs up when the second is closed."""
    if kind == "pipe":
        return os.pipe()
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def test_enclave_dies_in_the_middle_of_a_fast_transfer(uds, guest_path):
    """Also where nothing ever blocks."""
    ours, theirs = os.pipe()
    hung_up = []

    def die():
        assert guest.reached.wait(20)
        hung_up.append(time.monotonic())
        os.close(theirs)

    with (
        long_launch(CID, uds, rootfs_bytes=1 << 42) as launch,
        RawGuest(guest_path, 64 << 20) as guest,
    ):
        guest.flow()
        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(EnclaveDiedError) as caught:
            launch.send(timeout=30, enclave_fd=ours)
        assert time.monotonic() - hung_up[0] < SOON
        thread.join()
    os.close(ours)
    assert caught.value.stage == "rootfs"
    assert caught.value.bytes_sent == guest.received


def test_enclave_that_is_dead_already(writer, uds, guest_path):
    """It is noticed before a byte goes out, although a guest waits there."""
    ours, theirs = os.pipe()
    os.close(theirs)
    with writer.listen(CID, uds_path=uds) as launch, connect(guest_path) as sock:
        sock.sendall(READY)
        with pytest.raises(EnclaveDiedError) as caught:
            launch.send(timeout=30, enclave_fd=ours)
    os.close(ours)
    assert caught.value.bytes_sent == 0


def test_living_enclave_is_let_be(writer, archive, uds, guest_path):
    """A descriptor that does not hang up changes nothing, even with bytes to read."""
    ours, theirs = os.pipe()
    os.write(theirs, b"event")
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.send(timeout=30, enclave_fd=ours)
    assert guest.result().rootfs_sha256 == archive.sha256
    assert os.read(ours, 10) == b"event"
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("fd", [-1, 1 << 31, "closed", True, 1.5])
def test_enclave_fd_that_is_none_is_refused(writer, archive, uds, guest_path, fd):
    """To the core a closed one would look like a dead enclave; the launch can still be used."""
    with writer.listen(CID, uds_path=uds) as launch:
        if fd == "closed":
            fd = os.dup(0)
            os.close(fd)
        with pytest.raises(InvalidArgumentError) as caught:
            launch.send(timeout=30, enclave_fd=fd)
        assert caught.value.field == "enclave_fd"
        guest = Guest(guest_path)
        launch.send(timeout=30)
    assert guest.result().rootfs_sha256 == archive.sha256


def test_host_dies_under_a_reader(uds, guest_path):
    """The reader's own errors count what it had received."""

    def serve():
        with listener.accept()[0] as sock:
            assert sock.recv(1) == READY
            sock.sendall(READY + b"\x04\x00" + (1000).to_bytes(8, "little") + b"x" * 400)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(guest_path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with (
            EnclaveArgsReader(CID, uds_path=uds) as reader,
            pytest.raises(ConnectionError) as caught,
        ):
            reader.read_args(timeout=30)
        thread.join()
    assert type(caught.value).__name__ == "EarlyEndError"
    assert (caught.value.stage, caught.value.bytes_sent) == ("read", 410)
