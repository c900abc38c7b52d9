"""Calls that never wait: sending, receiving and polling what is possible at once."""

import os
import select
import signal
import socket

import pytest

from nitro_vsock.core import streams


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def pair(request):
    """Two connected sockets, of either kind."""
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(request.param)
        yield one, other


def test_full_socket_takes_nothing_and_nobody_waits(pair):
    """BlockingIOError also where the socket itself would block; what it took is counted."""
    one, other = pair
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += streams.send_now(one.fileno(), bytes(1 << 16))
    got = 0
    while got < sent:
        got += len(other.recv(1 << 20))
    assert got == sent > 0


def test_nothing_to_receive_is_no_wait(pair):
    """BlockingIOError, then what has come, then 0 for the end."""
    one, other = pair
    room = memoryview(bytearray(10))
    with pytest.raises(BlockingIOError):
        streams.receive_now(one.fileno(), room)
    other.sendall(b"abc")
    assert streams.receive_now(one.fileno(), room) == 3
    assert bytes(room[:3]) == b"abc"
    other.close()
    assert streams.receive_now(one.fileno(), room) == 0


def test_broken_pipe_is_an_error_and_no_signal(pair):
    """Also where the program has SIGPIPE at its default."""
    one, other = pair
    other.close()
    old = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with pytest.raises(BrokenPipeError):
            streams.send_now(one.fileno(), b"x")
    finally:
        signal.signal(signal.SIGPIPE, old)


def test_poll_tells_what_is_there_now(pair):
    """Events of those asked for, and a hang-up without being asked."""
    one, other = pair
    assert streams.poll_now(one.fileno(), select.POLLIN) == 0
    assert streams.poll_now(one.fileno(), select.POLLOUT) == select.POLLOUT
    other.sendall(b"x")
    assert streams.poll_now(one.fileno(), select.POLLIN) == select.POLLIN
    other.close()
    assert streams.poll_now(one.fileno(), 0) & select.POLLHUP


def test_what_is_no_socket_is_an_error():
    """ENOTSOCK for sending, POLLNVAL for a closed descriptor."""
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="socket"):
        streams.send_now(writing, b"x")
    os.close(reading)
    os.close(writing)
    assert streams.poll_now(writing, select.POLLIN) == select.POLLNVAL
