"""Signals, cancel() and close() end a launch where they should, soon, and nowhere else."""

import contextlib
import os
import signal
import threading
import time

import driver
import pytest
from machine import CID, SOON
from peer import Guest
from stages import ARGUMENT_BYTES, TOTAL, RawGuest, long_launch, stuck

from nitro_vsock import ClosedError, EnclaveArgsReader, LaunchCancelledError, PollNoEventsError

STAGES = ["accept", "handshake", "arguments", "rootfs", "close"]

ROUTES = {
    "sendfile": {"source": "file", "strategy": "sendfile"},
    "splice": {"source": "pipe", "strategy": "splice"},
    "mmap": {"source": "file", "strategy": "mmap"},
    "read": {"source": "file", "strategy": "read"},
    "memory": {"source": "memory", "strategy": "send"},
}


@pytest.mark.parametrize("place", ["accept", "blocked", "transfer"])
@pytest.mark.parametrize("taker", ["main", "thread"])
def test_ctrl_c_is_answered_at_once(place, taker):
    """KeyboardInterrupt within 100 ms, in a running transfer too, whichever thread is signalled."""
    results = driver.run(driver.interrupts, place=place, taker=taker)
    for result in results:
        assert result["raised"] == "KeyboardInterrupt"
        assert 0 < result["seconds"] < SOON
        assert (result["leaked"], result["left"]) == ([], [])
    assert min(result["seconds"] for result in results) < 0.1


@pytest.mark.parametrize("route", ROUTES)
def test_storm_of_signals_disturbs_nothing(route):
    """A signal each millisecond: the guest has the right bytes, and the handlers ran meanwhile."""
    result = driver.run(driver.storm, **ROUTES[route])
    assert result["right"]
    assert result["struck"] >= 100, result
    assert (result["leaked"], result["left"]) == ([], [])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("pending", [False, True])
def test_broken_pipe_raises_no_signal(route, pending):
    """SIGPIPE at its default: the process lives, and what was pending and masked before is."""
    results = driver.run(driver.broken_pipes, pending=pending, **ROUTES[route])
    assert len(results) == 8
    for result in results:
        assert (result["error"], result["stage"]) == ("PeerClosedError", "rootfs"), result
        assert result["sigpipe_pending"] == pending
        assert result["mask_kept"]
        assert (result["leaked"], result["left"]) == ([], [])


@contextlib.contextmanager
def acted_on(reached, act):
    """Do `act` in another thread once `reached` returns; yield a list that gets the moment."""
    moments = []

    def wait_and_act():
        reached()
        moments.append(time.monotonic())
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield moments
    finally:
        thread.join()


@contextlib.contextmanager
def handler(number, handle):
    """Install a signal handler meanwhile."""
    old = signal.signal(number, lambda *_: handle())
    try:
        yield
    finally:
        signal.signal(number, old)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("origin", ["thread", "handler"])
def test_cancel_ends_the_launch_at_every_stage(uds, guest_path, stage, origin):
    """From another thread or a signal handler, at once; the error says how far it was."""
    with (
        long_launch(CID, uds) as launch,
        stuck(guest_path, stage) as (reached, guest),
        handler(signal.SIGUSR1, launch.cancel),
    ):
        signals = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
        act = launch.cancel if origin == "thread" else signals
        with acted_on(reached, act) as moments:
            with pytest.raises(LaunchCancelledError) as caught:
                launch.send(timeout=30)
            ended = time.monotonic()
        assert ended - moments[0] < SOON
        if guest:
            guest.end()
            assert caught.value.bytes_sent == guest.received
    assert caught.value.stage == stage


def test_cancel_ends_a_running_transfer(uds, guest_path):
    """Nothing ever blocks there, and it is noticed all the same."""
    with (
        long_launch(CID, uds, rootfs_bytes=1 << 42) as launch,
        RawGuest(guest_path, 64 << 20) as guest,
    ):
        guest.flow()
        with acted_on(guest.reached.wait, launch.cancel) as moments:
            with pytest.raises(LaunchCancelledError):
                launch.send(timeout=30)
            assert time.monotonic() - moments[0] < SOON


def test_cancel_before_send_ends_the_next_send(writer, uds, guest_path):
    """Also where the guest is there and all would be over before anybody looked."""
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.cancel()
        with pytest.raises(LaunchCancelledError) as caught:
            launch.send(timeout=30)
    assert caught.value.bytes_sent == 0
    assert guest.failure() is not None


def test_cancel_before_reading_ends_the_read(uds, guest_path, writer):
    """The reader's cancel is as sticky."""
    with writer.listen(CID, uds_path=uds), EnclaveArgsReader(CID, uds_path=uds) as reader:
        reader.cancel()
        with pytest.raises(LaunchCancelledError):
            reader.read_args(timeout=30)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("origin", ["thread", "handler"])
def test_close_ends_the_launch_at_every_stage(uds, guest_path, stage, origin):
    """ClosedError says that it was no failure; stage and bytes are there as ever."""
    with (
        long_launch(CID, uds) as launch,
        stuck(guest_path, stage) as (reached, guest),
        handler(signal.SIGUSR1, launch.close),
    ):
        signals = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
        act = launch.close if origin == "thread" else signals
        with acted_on(reached, act) as moments:
            with pytest.raises(ClosedError) as caught:
                launch.send(timeout=30)
            ended = time.monotonic()
        assert ended - moments[0] < SOON
        assert launch.fileno() == -1
        assert not os.path.exists(guest_path)
        if guest:
            guest.end()
            assert caught.value.bytes_sent == guest.received
    if not (stage == "accept" and caught.value.stage is None):  # it may close before send begins
        assert caught.value.stage == stage
    assert caught.value.must_terminate_enclave == (stage in ("arguments", "rootfs", "close"))


def test_close_beside_send_is_never_called_busy(writer, uds):
    """Whoever closes holds the launch for a moment; that is no second sender."""
    for _ in range(200):
        with writer.listen(CID, uds_path=uds) as launch:
            thread = threading.Thread(target=launch.close)
            thread.start()
            with pytest.raises((ClosedError, PollNoEventsError)):
                launch.send(timeout=0)
            thread.join()


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_close_in_a_transfer_hits_no_descriptor_that_is_reused(uds, tmp_path, strategy):
    """The closer opens files at once, whose numbers may be the old ones: none gets a byte."""
    for round_ in range(5):
        victims = []

        def close_and_open(launch, victims):
            launch.close()
            for index in range(64):
                path = tmp_path / f"victim-{index}"
                victims.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))

        path = f"{uds}{round_}"
        with (
            long_launch(CID, path, rootfs_bytes=1 << 42, strategy=strategy) as launch,
            RawGuest(f"{path}_{CID + 1}", 32 << 20) as guest,
        ):
            guest.flow()
            act = lambda launch=launch, victims=victims: close_and_open(launch, victims)  # noqa: E731
            with acted_on(guest.reached.wait, act), pytest.raises(ClosedError) as caught:
                launch.send(timeout=30)
            guest.end()
        sizes = [os.fstat(fd).st_size for fd in victims]
        for fd in victims:
            os.close(fd)
        assert len(sizes) == 64
        assert not any(sizes)
        assert ARGUMENT_BYTES < caught.value.bytes_sent == guest.received < TOTAL + (1 << 42)
