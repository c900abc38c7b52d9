"""Rootfs sources: what is accepted, and what of it arrives at a guest in real launches."""

import array
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import random
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from left_out import leave_out
from machine import CID
from peer import Guest, GuestError, connect, handshake

from nitro_vsock import (
    EnclaveArgsWriter,
    InvalidArgumentError,
    PeerClosedError,
    Rootfs,
    SourceChangedError,
    SourceError,
    SourceReadError,
    SourceTruncatedError,
    Stage,
    Strategy,
    StreamTimeoutError,
)

PAGE = os.sysconf("SC_PAGE_SIZE")
# Seeded: bytes that happen to begin like a gzip file would be refused.
DATA = random.Random(5).randbytes(300_000)
HEADER = 1 + 8 + 9 + 1 + 8 + 8 + 9 + 1 + 8 + 8 + 4 + 1 + 8
"""Bytes of an ordinary launch before the archive: path, one argument, one variable, length."""
LARGE = 24 << 20
"""More than twice what the sockets hold, so that a guest that does not read stalls the host."""
CUT = (16 << 20) + 123
"""Where a large source ends early: past what the sockets hold, and in the middle of a page."""


def sha256(data):
    """Return the digest in hex."""
    return hashlib.sha256(data).hexdigest()


def writer_of(rootfs):
    """Return the writer of an ordinary launch."""
    return EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], {"A": "1"})


@pytest.fixture
def launch(uds, guest_path):
    """A function that launches a Rootfs against a guest; returns (report, what the guest took).

    `meanwhile` runs once in the guest when the first MiB of a large archive has arrived, while the
    guest reads nothing: what it does happens in the middle of the transfer.
    """

    def launch(rootfs, *, strategy="auto", meanwhile=None, timeout=30, guests=None):
        events = [meanwhile] if meanwhile else []

        def before_read(received):
            if events and received > HEADER + (1 << 20):
                events.pop()()

        # What is sent is mostly no tar.
        with writer_of(rootfs).listen(
            CID, uds_path=uds, strategy=strategy, preflight=False
        ) as launch:
            guest = Guest(guest_path, before_read=before_read)
            if guests is not None:
                guests.append(guest)
            report = launch.send(timeout)
        return report, guest.result()

    return launch


@pytest.fixture
def fails(launch):
    """A function that launches a Rootfs that fails; returns (the error, the guest's own error)."""

    def fails(rootfs, expected, **options):
        guests = []
        with pytest.raises(expected) as caught:
            launch(rootfs, guests=guests, **options)
        return caught.value, guests[0].failure()

    return fails


@pytest.fixture
def file(tmp_path):
    """A file of DATA, last written a while ago."""
    return old_file(tmp_path / "rootfs.tar", DATA)


def old_file(path, data):
    """Write a file whose times are in the past, so that every later write shows."""
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture
def large_file(tmp_path):
    """A file of LARGE random bytes."""
    path = old_file(tmp_path / "large.tar", random.Random(6).randbytes(LARGE))
    yield path
    path.unlink()


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    """Yield a descriptor of the path."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


# Regular files


def test_file_arrives_whole(launch, file):
    """The whole file, and the report says how."""
    report, taken = launch(Rootfs.from_file(file))
    assert taken.rootfs_sha256 == sha256(DATA)
    assert (report.rootfs_bytes, report.strategy) == (len(DATA), Strategy.SENDFILE)
    assert report.bytes_sent == HEADER + len(DATA) + 1 == taken.received


@pytest.mark.parametrize("kind", [str, os.fsencode, Path], ids=["str", "bytes", "Path"])
def test_path_of_any_kind_is_taken(file, kind):
    """What open() takes is taken."""
    rootfs = Rootfs.from_file(kind(file))
    assert (rootfs.length, rootfs.name) == (len(DATA), str(file))


def test_file_of_one_byte_arrives(launch, tmp_path):
    """The smallest source there is."""
    (tmp_path / "one").write_bytes(b"\xff")
    assert launch(Rootfs.from_file(tmp_path / "one"))[1].rootfs_sha256 == sha256(b"\xff")


def test_file_is_measured_anew_by_each_launch(launch, file):
    """A Rootfs names its file; what the file is counts when the launch begins to listen."""
    rootfs = Rootfs.from_file(file)
    assert launch(rootfs)[1].rootfs_bytes == len(DATA)
    file.write_bytes(b"another")
    assert launch(rootfs)[1].rootfs_sha256 == sha256(b"another")


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, None), (1, None), (PAGE, 1), (PAGE - 1, PAGE + 2), (4097, 200_001), (299_999, 1)],
)
def test_run_of_a_descriptor_arrives(launch, file, strategy, offset, length):
    """Any offset and length, odd ones too, by each way of sending."""
    with opened(file) as fd:
        report, taken = launch(Rootfs.from_fd(fd, offset, length), strategy=strategy)
    expected = DATA[offset:] if length is None else DATA[offset : offset + length]
    assert (taken.rootfs_bytes, taken.rootfs_sha256) == (len(expected), sha256(expected))
    assert report.strategy is Strategy(strategy)


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_descriptor_begins_at_its_own_offset_and_keeps_it(launch, file, strategy):
    """Without an offset the descriptor's own counts; it and the flags are as before."""
    with opened(file, os.O_RDONLY | os.O_APPEND) as fd:
        os.lseek(fd, 777, os.SEEK_SET)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD)
        rootfs = Rootfs.from_fd(fd)
        for _ in range(2):
            assert launch(rootfs, strategy=strategy)[1].rootfs_sha256 == sha256(DATA[777:])
        assert os.lseek(fd, 0, os.SEEK_CUR) == 777
        assert flags == (fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD))


def test_descriptor_may_be_closed_once_the_launch_listens(uds, guest_path, file):
    """The launch has one of its own."""
    with opened(file) as fd:
        launch = writer_of(Rootfs.from_fd(fd)).listen(CID, uds_path=uds, preflight=False)
    with launch:
        guest = Guest(guest_path)
        launch.send(30)
    assert guest.result().rootfs_sha256 == sha256(DATA)


def test_deleted_file_arrives(launch, file):
    """Its name is not needed any more."""
    with opened(file) as fd:
        file.unlink()
        assert launch(Rootfs.from_fd(fd))[1].rootfs_sha256 == sha256(DATA)


STRATEGIES = ["sendfile", "mmap", "read"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_growing_file_is_sent_as_long_as_declared(launch, large_file, strategy):
    """What is appended during the transfer is no part of the launch."""
    digest = sha256(large_file.read_bytes())

    def append():
        with large_file.open("ab") as file:
            file.write(b"more" * 1000)

    report, taken = launch(Rootfs.from_file(large_file), strategy=strategy, meanwhile=append)
    assert (taken.rootfs_bytes, taken.rootfs_sha256) == (LARGE, digest)
    assert report.rootfs_bytes == LARGE
    assert large_file.stat().st_size == LARGE + 4000


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_file_truncated_during_the_transfer_is_named(fails, large_file, strategy):
    """The error says where, the guest got exactly that much, and no Finished."""
    error, guest_error = fails(
        Rootfs.from_file(large_file),
        SourceTruncatedError,
        strategy=strategy,
        meanwhile=lambda: os.truncate(large_file, CUT),
    )
    if strategy == "mmap":
        # A mapping is copied in pieces of some pages, and shows zeros up to the end of the last.
        assert CUT - (256 << 10) <= error.offset <= CUT + PAGE
    else:
        assert error.offset == CUT
    assert error.bytes_sent == HEADER + error.offset
    assert error.total == HEADER + LARGE + 1
    assert error.stage is Stage.ROOTFS
    assert error.must_terminate_enclave
    assert str(large_file) in str(error)
    assert isinstance(guest_error, GuestError)
    assert f"end of stream {LARGE - error.offset} bytes before" in str(guest_error)


def test_file_truncated_before_the_guest_came_is_named(uds, guest_path, file):
    """The length was declared when the launch began to listen."""
    writer = writer_of(Rootfs.from_file(file))
    with writer.listen(CID, uds_path=uds, preflight=False) as launch:
        os.truncate(file, 1000)
        guest = Guest(guest_path)
        with pytest.raises(SourceTruncatedError) as caught:
            launch.send(30)
    assert caught.value.offset == 1000
    assert isinstance(guest.failure(), GuestError)


def overwrite(path):
    """Change a byte of a file in place."""
    with path.open("r+b") as file:
        file.write(b"X")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_file_modified_in_place_is_noticed_before_finished(fails, large_file, strategy):
    """The guest has every byte but no Finished: it must not run a mixture."""
    error, guest_error = fails(
        Rootfs.from_file(large_file),
        SourceChangedError,
        strategy=strategy,
        meanwhile=lambda: overwrite(large_file),
    )
    assert error.stage is Stage.ROOTFS
    assert error.bytes_sent == error.total - 1  # Finished
    assert error.must_terminate_enclave
    assert str(large_file) in str(error)
    assert str(guest_error) == "end of stream where an id was due"


def test_file_shrunk_after_it_was_sent_is_noticed(file):
    """Shorter than declared is changed, whenever it happened."""
    source = Rootfs.from_file(file).open()
    try:
        os.truncate(file, len(DATA) - 1)
        with pytest.raises(SourceChangedError):
            source.verify()
    finally:
        source.close()


def test_descriptor_modified_meanwhile_is_the_callers_business(launch, large_file):
    """Who hands over a descriptor may write to it; nothing is verified."""
    with opened(large_file) as fd:
        _, taken = launch(Rootfs.from_fd(fd), meanwhile=lambda: overwrite(large_file))
    assert taken.rootfs_bytes == LARGE


# Pipes, FIFOs, sockets, devices, /proc


class Feeder(threading.Thread):
    """Writes into a descriptor, and closes it unless it is to stay open."""

    def __init__(self, fd, data, *, stay=None):
        super().__init__(daemon=True)
        self._fd, self._data, self._stay = fd, data, stay
        self.start()

    def run(self):
        """Feed."""
        left = memoryview(self._data)
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self._fd, left) :]
        if self._stay:
            self._stay.wait(30)
        os.close(self._fd)


@contextlib.contextmanager
def pipe_of(data, *, stay=None):
    """Yield the reading end of a pipe that is being fed."""
    reading, writing = os.pipe()
    feeder = Feeder(writing, data, stay=stay)
    try:
        yield reading
    finally:
        os.close(reading)
        feeder.join(30)


@contextlib.contextmanager
def fifo_of(data):
    """Yield a FIFO's reading end."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/fifo"
        os.mkfifo(path)
        with opened(path, os.O_RDONLY | os.O_NONBLOCK) as reading:
            feeder = Feeder(os.open(path, os.O_WRONLY), data)
            yield reading
        feeder.join(30)


@contextlib.contextmanager
def socket_of(data):
    """Yield one end of a socket pair."""
    ours, theirs = socket.socketpair()
    feeder = Feeder(theirs.detach(), data)
    with ours:
        yield ours.fileno()
    feeder.join(30)


@pytest.mark.parametrize(
    ("source", "way"),
    [(pipe_of, Strategy.SPLICE), (fifo_of, Strategy.SPLICE), (socket_of, Strategy.READ)],
    ids=["pipe", "FIFO", "socket"],
)
@pytest.mark.parametrize("strategy", ["auto", "splice", "sendfile", "mmap", "read"])
def test_descriptor_that_cannot_seek_arrives(launch, source, way, strategy):
    """Its declared length of it, by the way that fits or by reading."""
    with source(DATA) as fd:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        report, taken = launch(Rootfs.from_fd(fd, length=len(DATA)), strategy=strategy)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
    assert taken.rootfs_sha256 == sha256(DATA)
    fits = strategy == "auto" or strategy == way.value
    assert report.strategy is (way if fits else Strategy.READ)


@pytest.mark.parametrize("strategy", ["splice", "read"])
def test_no_more_is_taken_from_a_pipe_than_declared(launch, strategy):
    """What is behind the declared length stays in the pipe for others."""
    with pipe_of(b"rootfs" * 100 + b"rest") as fd:
        assert launch(Rootfs.from_fd(fd, length=600), strategy=strategy)[1].rootfs_bytes == 600
        assert os.read(fd, 10) == b"rest"


@pytest.mark.parametrize("strategy", ["splice", "read"])
def test_pipe_that_ends_early_is_named(fails, strategy):
    """Its end before the declared length breaks the launch, at that offset."""
    with pipe_of(DATA) as fd:
        error, guest_error = fails(
            Rootfs.from_fd(fd, length=len(DATA) + 1), SourceTruncatedError, strategy=strategy
        )
    assert error.offset == len(DATA)
    assert error.bytes_sent == HEADER + len(DATA)
    assert "end of stream 1 bytes before" in str(guest_error)


@pytest.mark.parametrize("strategy", ["splice", "read"])
def test_pipe_whose_writer_stalls_ends_at_the_deadline(fails, strategy):
    """The writer stays and says nothing: the deadline ends it, not the writer."""
    stay = threading.Event()
    with pipe_of(DATA[:1000], stay=stay) as fd:
        try:
            error, guest_error = fails(
                Rootfs.from_fd(fd, length=2000), StreamTimeoutError, strategy=strategy, timeout=0.6
            )
        finally:
            stay.set()
    assert (error.stage, error.errno) == (Stage.ROOTFS, errno.ETIMEDOUT)
    assert error.bytes_sent == HEADER + 1000
    assert isinstance(guest_error, GuestError)


def test_guest_that_leaves_while_a_pipe_is_silent_is_noticed(uds, guest_path):
    """Waiting for the source does not hide the peer's end."""
    stay = threading.Event()
    with (
        pipe_of(b"", stay=stay) as fd,
        writer_of(Rootfs.from_fd(fd, length=10)).listen(CID, uds_path=uds) as launch,
        ThreadPoolExecutor(1) as pool,
    ):
        sent = pool.submit(launch.send, 30)
        with connect(guest_path) as sock:
            handshake(sock)
            assert len(sock.recv(HEADER, socket.MSG_WAITALL)) == HEADER
        error = sent.exception(20)
        stay.set()
    assert isinstance(error, PeerClosedError)
    assert error.bytes_sent == HEADER


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_device_arrives_with_a_length(launch, strategy):
    """/dev/zero has no size and gives as much as is asked for."""
    size = (3 << 20) + 17
    with opened("/dev/zero") as fd:
        _, taken = launch(Rootfs.from_fd(fd, length=size), strategy=strategy)
    assert taken.rootfs_sha256 == sha256(bytes(size))


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("offset", [0, 4095])
def test_file_of_proc_arrives_with_a_length(launch, strategy, offset):
    """It says that it has 0 bytes; asked for its real ones, it gives them."""
    path = "/proc/kallsyms"
    with opened(path) as fd:
        data = b""
        while len(data) < 3 * PAGE:
            data += os.pread(fd, PAGE, len(data)) or pytest.fail(f"{path} is too short")
        assert os.fstat(fd).st_size == 0
        _, taken = launch(Rootfs.from_fd(fd, offset, len(data) - offset), strategy=strategy)
    assert taken.rootfs_sha256 == sha256(data[offset:])


def test_file_of_proc_that_ends_early_is_named(fails):
    """A length beyond what there is breaks the launch where it ends."""
    with opened("/proc/self/limits") as fd:
        size = len(os.pread(fd, 1 << 16, 0))
        error, _ = fails(Rootfs.from_fd(fd, length=size + 100), SourceTruncatedError)
    assert error.offset == size


# O_DIRECT


@pytest.fixture(scope="module")
def direct_file():
    """A file of DATA on a file system that takes O_DIRECT."""
    for folder in (tempfile.gettempdir(), "/var/tmp", Path(__file__).parent):
        with tempfile.NamedTemporaryFile(dir=folder, prefix="direct") as file:
            file.write(DATA)
            file.flush()
            os.fsync(file.fileno())
            try:
                os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
            except OSError:
                continue
            yield file.name
            return
    leave_out("a file system that takes O_DIRECT", "TMPDIR on a disk")


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES, "splice"])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, None), (777, None), (4096, 8192), (4097, 200_001), (299_999, 1)]
)
def test_direct_file_arrives(launch, direct_file, strategy, offset, length):
    """O_DIRECT takes whole blocks only; any run of it arrives all the same."""
    with opened(direct_file, os.O_RDONLY | os.O_DIRECT) as fd:
        report, taken = launch(Rootfs.from_fd(fd, offset, length), strategy=strategy)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    expected = DATA[offset:] if length is None else DATA[offset : offset + length]
    assert (taken.rootfs_bytes, taken.rootfs_sha256) == (len(expected), sha256(expected))
    if strategy == "auto":
        assert report.strategy is Strategy.MMAP


# Memory


def mapped(data):
    """Return an anonymous mapping that holds the data."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


def numbers(data):
    """Return an array of 4-byte numbers with these bytes."""
    return array.array("I", data)


def integers(data):
    """Return a ctypes array with these bytes."""
    return (ctypes.c_int32 * (len(data) // 4)).from_buffer_copy(data)


def table(data):
    """Return a view of two dimensions."""
    return memoryview(data).cast("B", (600, 500))


@pytest.mark.parametrize(
    "make",
    [bytes, bytearray, memoryview, numbers, mapped, integers, table],
    ids=lambda f: f.__name__,
)
def test_contiguous_memory_arrives(launch, make):
    """Whatever the type of its items, its bytes are sent."""
    memory = make(DATA)
    report, taken = launch(Rootfs.from_bytes(memory))
    assert (taken.rootfs_bytes, taken.rootfs_sha256) == (len(DATA), sha256(DATA))
    assert report.strategy is Strategy.SEND


def test_memory_is_not_copied():
    """Changing it before the launch changes what is sent."""
    memory = bytearray(b"before")
    source = Rootfs.from_bytes(memory).open()
    memory[:] = b"behind"
    assert bytes(source.payload) == b"behind"
    assert source.length == 6


def test_mapping_of_a_file_that_is_truncated_meanwhile_is_an_error(fails, large_file):
    """The kernel's fault becomes SourceReadError, not the end of the process."""
    with large_file.open("rb") as opened_file:
        memory = mmap.mmap(opened_file.fileno(), 0, prot=mmap.PROT_READ)
    error, guest_error = fails(
        Rootfs.from_bytes(memory),
        SourceReadError,
        meanwhile=lambda: os.truncate(large_file, CUT),
    )
    assert (error.errno, error.stage) == (errno.EFAULT, Stage.ROOTFS)
    assert CUT - (256 << 10) <= error.offset <= CUT + PAGE
    assert error.bytes_sent == HEADER + error.offset
    assert f"end of stream {LARGE - error.offset} bytes before" in str(guest_error)


def test_mapping_of_a_file_that_is_truncated_before_is_an_error(fails, file):
    """Between Rootfs and listen too: nothing but the kernel looks at the memory again."""
    with file.open("rb") as opened_file:
        rootfs = Rootfs.from_bytes(mmap.mmap(opened_file.fileno(), 0, prot=mmap.PROT_READ))
    os.truncate(file, 0)
    error, _ = fails(rootfs, SourceReadError)
    assert (error.errno, error.offset) == (errno.EFAULT, 0)


# Refusals


@contextlib.contextmanager
def refused(field, limit=""):
    """Expect an InvalidArgumentError for a field whose limit has these words."""
    with pytest.raises(InvalidArgumentError) as caught:
        yield caught
    assert caught.value.field == field
    assert limit in caught.value.limit
    assert caught.value.stage is Stage.VALIDATE


@pytest.mark.parametrize(
    "data",
    [memoryview(DATA)[::2], memoryview(DATA).cast("B", (600, 500))[::-1], "text", 5, None, [1, 2]],
    ids=["every second byte", "backwards", "str", "int", "None", "list"],
)
def test_what_is_no_contiguous_memory_is_refused(data):
    """Only memory that is one run of bytes can be sent without a copy."""
    with refused("rootfs", "must be a contiguous buffer"):
        Rootfs.from_bytes(data)


def test_memory_that_is_gone_is_refused():
    """A closed mapping and a released view have no bytes."""
    memory = mmap.mmap(-1, PAGE)
    memory.close()
    view = memoryview(b"released")
    view.release()
    for gone in (memory, view):
        with refused("rootfs", "must be a contiguous buffer"):
            Rootfs.from_bytes(gone)


COMPRESSED = {
    "gzip": b"\x1f\x8b\x08\x00",
    "bzip2": b"BZh9",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"\x28\xb5\x2f\xfd",
}


@pytest.mark.parametrize(("kind", "magic"), COMPRESSED.items(), ids=COMPRESSED)
def test_compressed_archive_is_refused_with_the_command_that_helps(tmp_path, kind, magic):
    """The guest takes plain tar only; each source says so at once, and what to run."""
    path = old_file(tmp_path / "rootfs", magic + bytes(100))
    help_ = f"must be a plain tar, this is {kind}: run `{kind} -d` first"
    with refused("rootfs", help_):
        Rootfs.from_file(path)
    with refused("rootfs", help_):
        Rootfs.from_bytes(path.read_bytes())
    with opened(path) as fd:
        with refused("rootfs", help_):
            Rootfs.from_fd(fd)
        assert Rootfs.from_fd(fd, 1).length == len(magic) + 99


def test_empty_source_is_refused(tmp_path, file):
    """There is no launch without a root file system."""
    empty = old_file(tmp_path / "empty", b"")
    with refused("rootfs", "must not be empty"):
        Rootfs.from_file(empty)
    with refused("rootfs", "must not be empty"):
        Rootfs.from_file("/proc/cpuinfo")
    with refused("rootfs", "must not be empty"):
        Rootfs.from_bytes(b"")
    with opened(file) as fd:
        for offset in (len(DATA), len(DATA) + 1, (1 << 63) - 1):
            with refused("rootfs", "must not be empty"):
                Rootfs.from_fd(fd, offset)


def test_path_that_is_no_regular_file_is_refused(tmp_path):
    """A FIFO too, and without waiting for its writer."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        with refused("rootfs", "must be a regular file"):
            Rootfs.from_file(path)


@pytest.mark.parametrize("path", [3, 3.5, None, True, ["a"], "a\0b", b"\0"])
def test_what_is_no_path_is_refused(path):
    """Descriptors have a constructor of their own."""
    with refused("rootfs", "must be a path") as caught:
        Rootfs.from_file(path)
    assert caught.value.value is path


def test_path_that_cannot_be_opened_says_why(tmp_path):
    """The kernel's reason is in errno and in the message, with the path."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to("loop")
    for name, number in (("missing", errno.ENOENT), ("socket", errno.ENXIO), ("loop", errno.ELOOP)):
        with pytest.raises(SourceReadError) as caught:
            Rootfs.from_file(tmp_path / name)
        assert caught.value.errno == number
        assert caught.value.stage is Stage.VALIDATE
        assert f"{tmp_path / name}" in str(caught.value)
        assert isinstance(caught.value, (SourceError, OSError))
        assert not caught.value.must_terminate_enclave


def test_file_that_vanishes_before_the_launch_binds_nothing(uds, guest_path, file):
    """Listen opens the source before it binds."""
    writer = writer_of(Rootfs.from_file(file))
    file.unlink()
    with pytest.raises(SourceReadError):
        writer.listen(CID, uds_path=uds)
    assert not os.path.exists(guest_path)


@pytest.mark.parametrize("fd", [-1, -100, 1 << 31, True, False, 3.0, "3", None])
def test_what_is_no_descriptor_is_refused(fd):
    """A bool is an int to Python, but no descriptor."""
    with refused("rootfs fd") as caught:
        Rootfs.from_fd(fd, length=1)
    assert caught.value.value is fd


def test_descriptor_that_cannot_be_read_is_refused(tmp_path, file):
    """Closed, write-only, O_PATH, a directory: each says what it must be."""
    with opened(file) as closed:
        pass
    with refused("rootfs fd", "must be an open descriptor") as caught:
        Rootfs.from_fd(closed)
    assert caught.value.value == closed
    for path, flags, limit in (
        (file, os.O_WRONLY, "must be open for reading"),
        (file, os.O_PATH, "must be open for reading"),
        (tmp_path, os.O_PATH | os.O_DIRECTORY, "must be open for reading"),
        (tmp_path, os.O_RDONLY | os.O_DIRECTORY, "must not be a directory"),
    ):
        with opened(path, flags) as fd, refused("rootfs fd", limit) as caught:
            Rootfs.from_fd(fd)
        assert caught.value.value == fd


@pytest.mark.parametrize("offset", [-1, 1 << 63, True, 1.0, "0"])
def test_offset_out_of_range_is_refused(file, offset):
    """An offset is an int of a file's range."""
    with opened(file) as fd, refused("rootfs offset") as caught:
        Rootfs.from_fd(fd, offset)
    assert caught.value.value is offset


@pytest.mark.parametrize("length", [0, -1, 1 << 63, True, 1.0, "1"])
def test_length_out_of_range_is_refused(file, length):
    """A length is an int, and at least 1."""
    with opened(file) as fd, refused("rootfs length") as caught:
        Rootfs.from_fd(fd, length=length)
    assert caught.value.value is length


def test_run_past_the_end_of_the_file_is_refused(file):
    """Better now than in the middle of a launch."""
    with opened(file) as fd:
        for offset, length in ((0, len(DATA) + 1), (1, len(DATA)), (len(DATA), 1)):
            with refused("rootfs length", f"within the file's {len(DATA)} bytes (offset {offset})"):
                Rootfs.from_fd(fd, offset, length)
        os.lseek(fd, 10, os.SEEK_SET)
        with refused("rootfs length", "(offset 10)"):
            Rootfs.from_fd(fd, length=len(DATA) - 9)
        assert Rootfs.from_fd(fd, length=len(DATA) - 10).length == len(DATA) - 10


def test_descriptor_without_size_needs_a_length():
    """A pipe has no offset either; a device has one, but no end."""
    with pipe_of(b"") as fd:
        with refused("rootfs length", "must be given"):
            Rootfs.from_fd(fd)
        with refused("rootfs offset", "must be left out"):
            Rootfs.from_fd(fd, 0, 10)
    with opened("/dev/zero") as fd, refused("rootfs length", "must be given for a device"):
        Rootfs.from_fd(fd)


# Size


def test_six_gib_arrive_to_the_byte(uds, guest_path):
    """Past every 32-bit limit and the 2 GiB of one sendfile; data at each edge is in its place."""
    length = (6 << 30) + 5
    edges = [0, (1 << 31) - PAGE - 8, (1 << 31) - 8, (1 << 32) - 8, (1 << 32) + PAGE, length - 16]
    islands = {edge: os.urandom(16) for edge in edges}
    got = {edge: bytearray() for edge in edges}
    buffer = memoryview(bytearray(1 << 20))

    def take():
        with connect(guest_path) as sock:
            sock.settimeout(30)
            handshake(sock)
            assert len(sock.recv(HEADER, socket.MSG_WAITALL)) == HEADER
            at = 0
            while count := sock.recv_into(buffer):
                for edge, data in got.items():
                    if edge < at + count and at < edge + 16:
                        data += buffer[max(edge - at, 0) : min(edge + 16 - at, count)]
                at += count
            return at

    with contextlib.ExitStack() as stack:
        fd = os.memfd_create("rootfs", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, length)
        for edge, data in islands.items():
            os.pwrite(fd, data, edge)
        writer = writer_of(Rootfs.from_fd(fd))
        launch = stack.enter_context(writer.listen(CID, uds_path=uds, preflight=False))
        guest = stack.enter_context(ThreadPoolExecutor(1)).submit(take)
        report = launch.send(60, wait_closed=False)
        assert guest.result(60) == length + 1
    assert got == islands
    assert report.rootfs_bytes == length
