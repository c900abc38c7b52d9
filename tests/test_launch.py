"""A launch end to end over Unix sockets, against the independent guest of peer.py."""

import pytest
from conftest import CID
from peer import Guest

from nitro_vsock import Strategy


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
