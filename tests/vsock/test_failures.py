"""What goes wrong over a real AF_VSOCK: strangers, guests that die, stall or trickle, SIGPIPE."""

import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from vsock_guest import LOOPBACK, MIB

from nitro_vsock import (
    EnclaveArgsWriter,
    PeerClosedError,
    PollNoEventsError,
    ReadySignalNotDetectedError,
    Rootfs,
    StreamTimeoutError,
    VsockCidMismatchError,
)

DRIVER = Path(__file__).resolve().parent.parent / "support" / "vsock_driver.py"
WINDOW = 256 << 10
"""Bytes a peer's kernel takes on without its reader: AF_VSOCK's default."""

OVERHEAD = 12 + 20 + 21 + 9 + 1
"""Bytes of the frames around the rootfs of a launch of ("/a", ["/a"], ["A=1"])."""


def stranger(cid, says=b""):
    """Connect to the arguments port as somebody else."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.connect((LOOPBACK, cid + 1))
    if says:
        sock.sendall(says)
    return sock


def test_peer_with_another_cid_is_refused_and_the_wait_goes_on(cid, small_writer):
    """Over loopback everybody is CID 1: a launch that wants its own CID refuses, until the end."""
    with small_writer.listen(cid) as launch, stranger(cid, b"\xb7"), stranger(cid):
        with pytest.raises(PollNoEventsError) as caught:
            launch.send(timeout=0.5)
    assert caught.value.refused["cid"] == 2


def test_peer_with_another_cid_ends_a_strict_launch(cid, small_writer):
    """strict_peer has the reference's behaviour, with both CIDs in the error."""
    with small_writer.listen(cid, strict_peer=True) as launch, stranger(cid, b"\xb7"):
        with pytest.raises(VsockCidMismatchError) as caught:
            launch.send(timeout=30)
    assert (caught.value.expected, caught.value.actual) == (cid, LOOPBACK)


def test_first_byte_of_a_stranger_ends_a_strict_launch(cid, small_writer):
    """strict_peer with the right CID and the wrong byte."""
    with small_writer.listen(cid, peer_cid=LOOPBACK, strict_peer=True) as launch:
        with stranger(cid, b"x"), pytest.raises(ReadySignalNotDetectedError):
            launch.send(timeout=30)


def test_strangers_before_the_guest_are_dropped_and_counted(cid, small_writer, stand_in):
    """One that closed, one that writes junk and ten silent ones do not hold up the guest."""
    with small_writer.listen(cid, peer_cid=LOOPBACK) as launch:
        stranger(cid).close()
        others = [stranger(cid, b"junk"), *(stranger(cid) for _ in range(10))]
        guest = stand_in(cid)
        report = launch.send(timeout=60)
        for other in others:
            other.close()
    assert guest.result()["ok"]
    assert report.strangers == {"cid": 0, "ready": 1, "closed": 1, "crowded": 0}


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_guest_that_dies_at_a_random_byte_is_an_error(cid, stand_in, small_tar, strategy):
    """A launch that a guest did not take to within its last window is never a success."""
    path, _, size = small_tar
    writer = EnclaveArgsWriter(Rootfs.from_file(path), "/a", ["/a"], ["A=1"])
    rng = random.Random(cid)
    for die_at in [0, 1, 9, 10, *(rng.randrange(size - 2 * WINDOW) for _ in range(12))]:
        with writer.listen(cid, peer_cid=LOOPBACK, strategy=strategy) as launch:
            guest = stand_in(cid, die_at=die_at)
            with pytest.raises(PeerClosedError) as caught:
                launch.send(timeout=60)
        taken = guest.result()
        assert taken["received"] == die_at
        assert die_at <= caught.value.bytes_sent <= die_at + 2 * WINDOW
        assert caught.value.total == size + OVERHEAD
        assert caught.value.must_terminate_enclave


def test_guest_that_stops_reading_is_a_timeout(cid, stand_in, small_tar):
    """Not a hang, not a success, wherever it stops; in the last window too."""
    path, _, size = small_tar
    writer = EnclaveArgsWriter(Rootfs.from_file(path), "/a", ["/a"], ["A=1"])
    for stop_at in (0, 20, MIB, size - WINDOW // 2, size + OVERHEAD - 1):
        with writer.listen(cid, peer_cid=LOOPBACK) as launch:
            guest = stand_in(cid, stop_at=stop_at)
            began = time.monotonic()
            with pytest.raises(StreamTimeoutError) as caught:
                launch.send(timeout=4)
            assert 4 <= time.monotonic() - began < 8
        assert stop_at <= caught.value.bytes_sent <= stop_at + 2 * WINDOW
        guest.kill()


def test_guest_that_trickles_gets_everything(cid, stand_in, small_tar):
    """Reads of 1000 bytes: slow, and whole."""
    path, crc, _ = small_tar
    writer = EnclaveArgsWriter(Rootfs.from_file(path), "/a", ["/a"], ["A=1"])
    with writer.listen(cid, peer_cid=LOOPBACK) as launch:
        guest = stand_in(cid, trickle=1000)
        launch.send(timeout=120)
    assert guest.result()["rootfs_crc"] == crc


def test_guest_that_keeps_open_after_finished_is_a_timeout(cid, stand_in, small_writer):
    """The protocol says it closes; one that does not is not reported as done."""
    with small_writer.listen(cid, peer_cid=LOOPBACK) as launch:
        stand_in(cid, hold=True)
        with pytest.raises(StreamTimeoutError) as caught:
            launch.send(timeout=5)
    assert caught.value.bytes_sent == caught.value.total


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_broken_stream_with_default_sigpipe_leaves_the_process_alive(
    cid, stand_in, small_tar, strategy
):
    """Kernels differ in raising SIGPIPE; the embedding process sees a typed error either way."""
    guest = stand_in(cid, die_at=MIB)
    driver = [sys.executable, DRIVER, str(cid), small_tar[0], strategy]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    outcome = json.loads(done.stdout)
    assert (outcome["error"], outcome["pending"]) == ("PeerClosedError", False)
    assert not guest.result()["ok"]


def traced(calls, folder, *driver):
    """Run the driver under strace; return its outcome and the traced lines."""
    log = folder / "strace"
    command = ["strace", "-f", "-o", log, "-e", f"trace={calls}", sys.executable, DRIVER, *driver]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout), log.read_text().splitlines()


def test_small_guest_window_causes_no_busy_loop(cid, stand_in, small_tar, tmp_path):
    """A 4 KiB window, arguments that nearly fill it: calls stay in proportion to the windows."""
    path, crc, size = small_tar
    guest = stand_in(cid, window=4096)
    outcome, lines = traced("sendto,sendfile,ppoll,splice", tmp_path, cid, path, "auto", 3000)
    taken = guest.result()
    assert (taken["ok"], taken["rootfs_crc"]) == (True, crc)
    assert outcome["sent"] == taken["received"]
    counts = Counter(re.search(r"\b([a-z]+)\(", line)[1] for line in lines if "(" in line)
    # A fill, a refusal, and a wait for every lump of credit; a lump is a read of the guest's.
    assert sum(counts.values()) <= 4 * taken["reads"] + 200, (counts, taken)
    assert taken["reads"] <= size / 1024


def test_arguments_of_an_ordinary_launch_take_few_sends(cid, stand_in, small_tar, tmp_path):
    """One send before the rootfs, with the ready byte and all arguments; Finished is the other."""
    guest = stand_in(cid)
    _, lines = traced("sendto,sendfile,mmap", tmp_path, cid, small_tar[0], "sendfile")
    assert guest.result()["ok"]
    calls = [line for line in lines if re.search(r"\b(sendto|sendfile)\(", line)]
    first_payload = next(i for i, line in enumerate(calls) if "sendfile(" in line)
    sizes = [int(line.rsplit("= ", 1)[1]) for line in calls if "sendto(" in line]
    assert first_payload == 1
    assert 64 <= sizes[0] <= 3585
    assert sizes[1:] == [1]
