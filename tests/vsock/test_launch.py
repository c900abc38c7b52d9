"""Whole launches over a real AF_VSOCK, to a guest that reads as the deployed one does."""

import errno
import os
import random
import socket
import subprocess
import threading
import zlib

import pytest
from vsock_guest import LOOPBACK, MIB

from nitro_vsock import (
    VMADDR_CID_ANY,
    EnclaveArgsWriter,
    Rootfs,
    Strategy,
    VsockBindError,
    VsockPortOffset,
)

RANDOM_LAUNCHES = 2000
ALL_FRAMES = "4512309"  # both flags, path, argv, envp, rootfs, Finished (shown as 9)


def kernel():
    """The running kernel as (major, minor)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def check_strategy(report, forced, *, old, new):
    """The forced strategy was used; or, for auto, the one for kernels before or from 6.5."""
    automatic = old if kernel() < (6, 5) else new
    assert report.strategy is (automatic if forced == "auto" else Strategy(forced))


def record(record_property, report, asked):
    """Leave what docs/performance.md needs in the JUnit file."""
    record_property("strategy", f"{asked} -> {report.strategy}")
    record_property("mib_per_second", round(report.throughput / MIB, 1))


def strings_crc(path, argv, envp):
    """What the stand-in computes over the strings it got."""
    crc = 0
    for string in (path, *argv, *envp):
        crc = zlib.crc32(string.encode() + b"\0", crc)
    return crc


@pytest.mark.parametrize("strategy", ["auto", "sendfile", "mmap", "read"])
def test_guest_gets_a_gibibyte_whole_with_each_strategy(
    cid, stand_in, big_rootfs, strategy, record_property
):
    """Every frame arrives, the digest of 1 GiB is equal, no length was read short."""
    path, crc, size = big_rootfs
    argv, envp = ["/bin/app", "a b"], ["PATH=/bin", "A=1"]
    writer = EnclaveArgsWriter(
        Rootfs.from_file(path), "/bin/app", argv, envp, network_proxy=True, app_output=True
    )
    with writer.listen(cid, peer_cid=LOOPBACK, strategy=strategy) as launch:
        guest = stand_in(cid)
        report = launch.send(timeout=300)
    taken = guest.result()
    assert taken["ok"], taken
    assert (taken["rootfs_bytes"], taken["rootfs_crc"]) == (size, crc)
    assert taken["strings_crc"] == strings_crc("/bin/app", argv, envp)
    assert taken["order"] == ALL_FRAMES
    assert report.bytes_sent == taken["received"]
    assert report.peer.cid == LOOPBACK
    check_strategy(report, strategy, old=Strategy.MMAP, new=Strategy.SENDFILE)
    record(record_property, report, strategy)


@pytest.mark.parametrize("strategy", ["auto", "splice", "read"])
def test_guest_gets_a_gibibyte_whole_through_a_pipe(
    cid, stand_in, big_rootfs, strategy, record_property
):
    """From a pipe that another process fills, with each strategy that takes one."""
    path, crc, size = big_rootfs
    source, sink = os.pipe()
    filler = subprocess.Popen(["cat", path], stdout=sink)
    os.close(sink)
    writer = EnclaveArgsWriter(Rootfs.from_fd(source, length=size), "/a", ["/a"], ["A=1"])
    with writer.listen(cid, peer_cid=LOOPBACK, strategy=strategy) as launch:
        guest = stand_in(cid)
        report = launch.send(timeout=300)
    filler.wait()
    os.close(source)
    taken = guest.result()
    assert (taken["ok"], taken["rootfs_bytes"], taken["rootfs_crc"]) == (True, size, crc)
    check_strategy(report, strategy, old=Strategy.READ, new=Strategy.SPLICE)
    record(record_property, report, f"pipe: {strategy}")


def random_strings(rng):
    """Arguments of every shape: few, many, long, short, up to 200 KiB together."""
    kind = rng.randrange(6)
    if kind == 0:
        return ["x" * rng.randint(1, 4000)]
    if kind == 1:
        return ["y" * rng.randint(1, 30) for _ in range(2000)]
    if kind == 2:
        return ["z" * rng.randint(3900, 4000) for _ in range(rng.randint(17, 24))]
    return ["w" * rng.randint(1, 200) for _ in range(rng.randint(1, 40))]


def test_thousands_of_random_launches_never_give_a_short_length(cid, stand_in):
    """Arguments of random sizes, a guest that stalls at random: each launch arrives whole."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    guest = stand_in(cid, repeat=RANDOM_LAUNCHES, stall_us=2000, seed=seed, told=True)
    for number in range(RANDOM_LAUNCHES):
        argv, envp = ["/a", *random_strings(rng)], random_strings(rng)
        # Bytes that begin like a gzip file would be refused.
        rootfs = b"r" + rng.randbytes(rng.randint(0, 20000))
        writer = EnclaveArgsWriter(Rootfs.from_bytes(rootfs), "/a", argv, envp)
        with writer.listen(cid, peer_cid=LOOPBACK) as launch:
            guest.go()
            launch.send(timeout=60)
        taken = guest.next()
        assert taken["ok"], (seed, number, taken)
        assert taken["strings_crc"] == strings_crc("/a", argv, envp), (seed, number)
        assert taken["rootfs_crc"] == zlib.crc32(rootfs), (seed, number)


def test_sixty_four_launches_at_once_keep_their_bytes_apart(stand_in, small_tar):
    """64 threads of one process serve 64 guests on ports of their own."""
    path, crc, size = small_tar
    cids = [3000 + 10 * number for number in range(64)]
    guests = {cid: stand_in(cid) for cid in cids}
    reports = {}

    def serve(cid):
        writer = EnclaveArgsWriter(Rootfs.from_file(path), "/a", [f"/a{cid}"], ["A=1"])
        reports[cid] = writer.write_args(cid, timeout=120, peer_cid=LOOPBACK)

    threads = [threading.Thread(target=serve, args=(cid,)) for cid in cids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(reports) == set(cids)
    for cid, guest in guests.items():
        taken = guest.result()
        assert (taken["ok"], taken["rootfs_bytes"], taken["rootfs_crc"]) == (True, size, crc)
        assert taken["strings_crc"] == strings_crc("/a", [f"/a{cid}"], ["A=1"])


def test_listener_can_be_torn_down_and_bound_again(cid, small_writer):
    """A thousand times on the same port."""
    for _ in range(1000):
        small_writer.listen(cid).close()


def test_port_in_use_names_the_service_and_the_cids(cid, small_writer):
    """Binding the same port twice says whose port it is, and which CIDs share it."""
    with small_writer.listen(cid), pytest.raises(VsockBindError) as caught:
        small_writer.listen(cid)
    said = str(caught.value)
    assert f"port {cid + 1}" in said
    assert f"args reader of CID {cid}" in said
    assert f"net of CID {cid - 1}" in said
    assert f"signal handler of CID {cid - 4}" in said


def test_neighbours_conflict_where_their_services_share_a_port(cid, small_writer):
    """The arguments port of CID n+1 is the network port of CID n."""
    network = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    with network:
        network.bind((VMADDR_CID_ANY, cid + VsockPortOffset.NET))
        with pytest.raises(VsockBindError) as caught:
            small_writer.listen(cid + 1)
    assert caught.value.errno == errno.EADDRINUSE
    assert f"net of CID {cid}" in str(caught.value)
    with small_writer.listen(cid), small_writer.listen(cid + 1):
        pass  # the arguments ports of neighbours differ
