"""A launch end to end over Unix sockets, against the independent guest of peer.py."""

import hashlib
import mmap
import os

import pytest
from archives import make_tar
from machine import CID
from peer import Guest
from stages import RawGuest

from nitro_vsock import EnclaveArgsWriter, Rootfs, SourceReadError, Strategy


@pytest.mark.parametrize("strategy", ["auto", "sendfile", "mmap", "read"])
def test_guest_gets_every_byte_with_each_strategy(writer, archive, uds, guest_path, strategy):
    """The guest parses the whole launch and its digest is the archive's."""
    with writer.listen(CID, uds_path=uds, strategy=strategy) as launch:
        guest = Guest(guest_path)
        report = launch.send(timeout=30)
    taken = guest.result()
    assert taken.rootfs_sha256 == archive.sha256
    assert (taken.path, taken.argv) == (b"/bin/app", [b"/bin/app", b"a b"])
    assert taken.envp == [b"PATH=/bin", b"A=1"]
    assert taken.order == [1, 2, 3, 0, 255]
    assert report.bytes_sent == taken.received
    assert report.rootfs_bytes == len(archive.data)
    assert report.strategy is (Strategy.SENDFILE if strategy == "auto" else Strategy(strategy))
    assert report.peer_closed


def small_launch(uds, guest_path, rootfs):
    """Launch with this root file system; return the report and what the guest took."""
    writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        return launch.send(timeout=20), guest.result()


@pytest.mark.parametrize("source", ["file", "bytes", "bytearray", "slice"])
def test_small_archive_travels_in_one_send_with_the_arguments(uds, guest_path, tmp_path, source):
    """One system call moves everything, the ready byte's answer included."""
    data = make_tar(20_480)
    (tmp_path / "a.tar").write_bytes(data)
    rootfs = {
        "file": lambda: Rootfs.from_file(tmp_path / "a.tar"),
        "bytes": lambda: Rootfs.from_bytes(data),
        "bytearray": lambda: Rootfs.from_bytes(bytearray(data)),
        "slice": lambda: Rootfs.from_bytes(memoryview(b"xx" + data)[2:]),
    }[source]()
    report, taken = small_launch(uds, guest_path, rootfs)
    assert report.system_calls == 1
    assert report.strategy is (Strategy.READ if source == "file" else Strategy.SEND)
    assert taken.rootfs_sha256 == hashlib.sha256(data).hexdigest()
    assert report.bytes_sent == taken.received


def test_small_mapping_whose_file_shrank_fails_typed(uds, guest_path, tmp_path):
    """A mapping is left to the kernel to read: here it would kill the process."""
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(20_480))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        rootfs = Rootfs.from_bytes(mapping)
        os.truncate(path, 0)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with (
            writer.listen(CID, uds_path=uds) as launch,
            RawGuest(guest_path, 1 << 20),
            pytest.raises(SourceReadError),
        ):
            launch.send(timeout=20)
        del rootfs, writer, launch


def test_small_file_is_sent_by_a_strategy_that_is_forced(uds, guest_path, tmp_path):
    """Only the automatic choice reads a small file ahead."""
    (tmp_path / "a.tar").write_bytes(make_tar(20_480))
    writer = EnclaveArgsWriter(
        Rootfs.from_file(tmp_path / "a.tar"), "/bin/app", ["/bin/app"], ["A=1"]
    )
    with writer.listen(CID, uds_path=uds, strategy="sendfile") as launch:
        guest = Guest(guest_path)
        assert launch.send(timeout=20).strategy is Strategy.SENDFILE
    assert guest.result().rootfs_sha256
