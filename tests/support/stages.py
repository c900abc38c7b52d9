"""Owns: guests that take a launch to a chosen point and stay there, and a launch long enough.

Every stage can block: arguments and root file system are both larger than the sockets' buffers.
"""

import contextlib
import os
import threading

from peer import connect, handshake, wait_until

from nitro_vsock import EnclaveArgsWriter, Rootfs

ROOTFS_BYTES = 16 << 20
_ARGV = ["/bin/app", *["x" * 3990] * 60]
_STRINGS = ["/bin/app", *_ARGV, "A=1"]
ARGUMENT_BYTES = sum(8 + len(text) + 1 for text in _STRINGS) + 1 + 2 * (1 + 8) + (1 + 8)
"""Bytes before the root file system's first: ids, counts, lengths, strings with their NUL."""
TOTAL = ARGUMENT_BYTES + ROOTFS_BYTES + 1

STOPS = {
    "accept": None,
    "handshake": None,
    "arguments": 0,
    "rootfs": ARGUMENT_BYTES + (1 << 20),
    "close": TOTAL,
}
"""Bytes a guest takes before it stops, by the stage the launch is then in."""


@contextlib.contextmanager
def zeros(size):
    """Yield a root file system of zeros, which take no memory."""
    fd = os.memfd_create("rootfs")
    try:
        os.ftruncate(fd, size)
        yield Rootfs.from_fd(fd, offset=0)
    finally:
        os.close(fd)


@contextlib.contextmanager
def long_launch(cid, uds, rootfs_bytes=ROOTFS_BYTES, **options):
    """Yield a listening launch whose every stage can block."""
    with zeros(rootfs_bytes) as rootfs:
        writer = EnclaveArgsWriter(rootfs, "/bin/app", _ARGV, {"A": "1"})
        with writer.listen(cid, uds_path=uds, **options) as launch:
            yield launch


class RawGuest(threading.Thread):
    """Handshakes, takes `size` bytes without looking at them, sets `reached`, and stays there.

    Then `flow` lets it read on to the end of stream, or `die` lets it go away. Both may be called
    before: then it does not stop. Leaving the context ends it.
    """

    def __init__(self, path, size):
        super().__init__(daemon=True)
        self._path = path
        self._size = size
        self._until = 1 << 62
        self._go = threading.Event()
        self._over = threading.Event()
        self._death = None
        self.reached = threading.Event()
        self.received = 0
        self.start()

    def run(self):
        """Be the guest."""
        buffer = bytearray(1 << 20)
        with connect(self._path) as sock, contextlib.suppress(OSError):
            sock.settimeout(60)
            handshake(sock)
            while self.received < self._size:
                count = sock.recv_into(buffer, min(len(buffer), self._size - self.received))
                if not count:
                    return
                self.received += count
            self.reached.set()
            self._go.wait(60)
            if self._death:
                self._death(sock)
                self._over.wait(60)
                return
            while left := min(len(buffer), self._until - self.received):
                count = sock.recv_into(buffer, left)
                if not count:
                    return
                self.received += count

    def flow(self, until=1 << 62):
        """Read on, to the end of stream or until `until` bytes are there, and close."""
        self._until = until
        self._go.set()

    def die(self, how):
        """Do `how` to the socket, and nothing more."""
        self._death = how
        self._go.set()

    def end(self):
        """End, and wait for it."""
        self._go.set()
        self._over.set()
        self.join(30)
        assert not self.is_alive()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.end()


def open_descriptors():
    """Return {fd: what it is} of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _sockets():
    """Return how many sockets this process has open."""
    return sum(what.startswith("socket:") for what in open_descriptors().values())


@contextlib.contextmanager
def stuck(path, stage):
    """Hold a launch at `stage`.

    Yield a function that waits until it is there, and the guest (None before there is one).
    """
    if stage == "accept":
        yield lambda: None, None
    elif stage == "handshake":
        with connect(path):
            before = _sockets()
            yield lambda: wait_until(lambda: _sockets() > before, what="the accept"), None
    else:
        with RawGuest(path, STOPS[stage]) as guest:

            def wait():
                assert guest.reached.wait(20)

            yield wait, guest
