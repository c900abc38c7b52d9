"""Whole sessions over a real AF_VSOCK: the tests of Unix sockets, and what only CIDs can show."""

import contextlib
import socket

import pytest
from session import test_outputs, test_proxies, test_session, test_signals
from session_guest import die, stall
from sessions import Enclave, Lines, Place
from vsock_guest import LOOPBACK

from nitro_vsock import (
    EnclaveDiedError,
    NetProxy,
    NitroVsockError,
    OutputProxy,
    SessionTimeoutError,
    SessionTimeouts,
    VsockBindError,
)

BULK = 64 << 20
"""Bytes in place of a GiB: the machine is emulated."""

test_exit_status_is_what_the_guest_said = test_session.test_exit_status_is_what_the_guest_said
test_return_code_cut_short_is_never_a_zero = test_session.test_return_code_cut_short_is_never_a_zero
test_answer_comes_only_after_the_output_was_drained = (
    test_session.test_answer_comes_only_after_the_output_was_drained
)
test_signal_connection_stays_open_until_the_guest_closes = (
    test_session.test_signal_connection_stays_open_until_the_guest_closes
)
test_bulk_of_output_is_complete_and_in_order = (
    test_outputs.test_bulk_of_output_is_complete_and_in_order
)
test_slow_target_holds_the_guest_and_loses_nothing = (
    test_outputs.test_slow_target_holds_the_guest_and_loses_nothing
)
test_sigterm_reaches_the_guest_once = test_signals.test_sigterm_reaches_the_guest_once
own_handler = test_signals.own_handler
test_bytes_pass_both_ways_unchanged = test_proxies.test_bytes_pass_both_ways_unchanged
test_backend_that_dies_ends_the_session = test_proxies.test_backend_that_dies_ends_the_session


@pytest.fixture
def place(cid):
    """AF_VSOCK loopback, ports of the test's own."""
    return Place(cid, None, BULK)


@pytest.fixture
def rounds():
    """Fewer than on Unix sockets."""
    return 300


def test_guest_that_connects_at_once_is_never_refused(place, rounds):
    """To all its ports within a moment of Finished."""
    test_session.check_haste(place, rounds)


@pytest.mark.parametrize("point", ["closed", "signal", "said", "code"])
def test_guest_that_vanishes_ends_the_session(place, point):
    """A typed error with a stage, in time, with the last lines."""
    timeouts = SessionTimeouts(launch=10, services=2, run=20, drain=0.5)
    error, _ = place.fail(
        NitroVsockError,
        OutputProxy(lambda _: None),
        guest={"at": {point: die}, "says": b"one\ntwo\n"},
        timeouts=timeouts,
    )
    assert error.stage in ("services", "run")
    assert error.must_terminate_enclave
    assert isinstance(error, SessionTimeoutError) == (point == "closed")
    assert error.last_output == (("one", "two") if point in ("said", "code") else ())


def test_dead_enclave_ends_the_session(place):
    """By its descriptor, with its last lines."""
    with Enclave() as enclave:
        at = {"said": lambda guest: (enclave.die(), stall(guest))}
        error, _ = place.fail(
            EnclaveDiedError,
            OutputProxy(lambda _: None),
            guest={"at": at, "says": b"one\ntwo\n"},
            enclave_fd=enclave.fileno(),
        )
    assert error.last_output == ("one", "two")


@pytest.mark.parametrize("service", [1, 2, 3, 4, 5])
def test_all_ports_are_bound_or_none(place, service):
    """Whichever is taken, the others are free afterwards."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with listening(place.cid + service):
            with pytest.raises(VsockBindError) as caught:
                place.session(OutputProxy(print), NetProxy(ours))
            assert f"port {place.cid + service}" in str(caught.value)
            for other in {1, 2, 3, 4, 5} - {service}:
                listening(place.cid + other).close()
        place.session(OutputProxy(print), NetProxy(ours)).close()


def listening(port):
    """Return a socket that listens at a port."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.bind((socket.VMADDR_CID_ANY, port))
    sock.listen()
    return sock


@pytest.mark.parametrize("service", [3, 4, 5])
def test_peer_of_another_cid_is_dropped(place, service):
    """Loopback's peers show CID 1; the session waits for its enclave's: nobody gets in."""
    lines = Lines()
    with place.session(
        lines.proxy, peer_cid=place.cid, timeouts=SessionTimeouts(launch=1)
    ) as session:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(20)
            stranger.connect((LOOPBACK, place.cid + service))
            with pytest.raises(NitroVsockError):
                session.run_sync()
            assert session.strangers_refused == 1
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert lines == []
