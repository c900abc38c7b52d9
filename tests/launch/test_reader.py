"""EnclaveArgsReader over Unix sockets: against a scripted plain-socket host, and our own writer."""

import contextlib
import errno
import hashlib
import io
import os
import re
import socket
import stat
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from archives import make_tar
from host import READY, Host, launch, rootfs, string, strings, u64
from left_out import leave_out
from machine import CID
from vectors.tars import BAD_TARS, GOOD_TARS, tar_of

import nitro_vsock.progress
from nitro_vsock import (
    BadStringError,
    BusyError,
    ClosedError,
    ConnectTimeoutError,
    DuplicateFrameError,
    EarlyEndError,
    EnclaveArgsReader,
    EnclaveArgsWriter,
    GuestRuleError,
    HandshakeTimeoutError,
    InvalidArgumentError,
    LaunchCancelledError,
    LimitExceededError,
    Limits,
    MissingFrameError,
    PeerClosedError,
    ProtocolError,
    ReadySignalNotDetectedError,
    Rootfs,
    Stage,
    StreamTimeoutError,
    UnknownFrameError,
    VsockAddress,
    VsockConnectError,
)

ARCHIVE = bytes(range(256)) * 40
STREAM = launch(ARCHIVE)


@pytest.fixture
def reader(uds):
    """A reader of CID 16."""
    with EnclaveArgsReader(CID, uds_path=uds) as reader:
        yield reader


@pytest.fixture
def take(uds, guest_path):
    """A function that sends a stream, or a list of pieces, to a reader; returns what it took."""

    def take(stream, sink=None, *, options=None, timeout=20, progress=None, **host):
        pieces = [stream] if isinstance(stream, bytes) else stream
        with (
            Host(guest_path, pieces, **host),
            EnclaveArgsReader(CID, uds_path=uds, **(options or {})) as reader,
        ):
            return reader.read_args(sink, timeout, progress)

    return take


@contextlib.contextmanager
def reading(reader, *args, **kwargs):
    """Run read_args in a thread; yield its future. Its exception is the block's to look at."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(reader.read_args, *args, **kwargs)


# What is taken


def test_everything_a_launch_says_is_in_the_result(take):
    """Strings, flags, digest, order and sizes are those of the stream."""
    stream = launch(
        ARCHIVE,
        argv=[b"/bin/app", b"a b", b""],
        envp=[b"PATH=/bin", b"B=\xff\xc3\xa9"],
        flags=b"\4",
    )
    args = take(stream)
    assert args.exec_path == "/bin/app"
    assert args.argv == ("/bin/app", "a b", "")
    assert args.envp == ("PATH=/bin", "B=\udcff\u00e9")
    assert args.network_proxy
    assert not args.app_output
    assert args.rootfs_length == len(ARCHIVE)
    assert args.rootfs_sha256 == hashlib.sha256(ARCHIVE).hexdigest()
    assert args.frames == (
        "NETWORK_PROXY", "EXEC_PATH", "EXEC_ARGV", "EXEC_ENVP", "ROOT_FILESYSTEM", "FINISHED",
    )  # fmt: skip
    assert args.bytes_received == len(stream)
    assert args.seconds >= 0


def test_order_of_frames_is_free(take):
    """The guest takes any order, and so does the reader."""
    arguments = [
        rootfs(ARCHIVE),
        strings(3, [b"A=1"]),
        b"\5",
        strings(2, [b"/a"]),
        b"\1" + string(b"/a"),
    ]
    args = take(b"".join(arguments) + b"\xff")
    assert args.frames[:3] == ("ROOT_FILESYSTEM", "EXEC_ENVP", "APP_OUTPUT")
    assert (args.app_output, args.network_proxy) == (True, False)


def test_bytes_after_finished_are_not_counted(take):
    """What a host sends after Finished is no part of the launch."""
    assert take(STREAM + b"junk").bytes_received == len(STREAM)


@pytest.mark.parametrize("strict", [False, True])
def test_stream_in_single_bytes_is_whole_to_a_patient_reader_only(take, strict):
    """A length in pieces is nothing to the plain reader, and fatal to the guest and strict."""
    pieces = [bytes([byte]) for byte in launch(tar_of("rootfs/a"))[:60]]
    pieces.append(launch(tar_of("rootfs/a"))[60:])
    if strict:
        with pytest.raises(GuestRuleError, match="a length came in pieces, the first of 1 bytes"):
            take(pieces, options={"strict": True})
    else:
        assert take(pieces).exec_path == "/bin/app"


# Where the root file system goes


@pytest.mark.parametrize("kind", [Path, str, os.fsencode], ids=["Path", "str", "bytes"])
def test_rootfs_appears_at_a_path_of_any_kind(take, tmp_path, kind):
    """The file holds the archive, and nothing else is left in the folder."""
    path = tmp_path / "out.tar"
    take(STREAM, kind(path))
    assert path.read_bytes() == ARCHIVE
    assert os.listdir(tmp_path) == ["out.tar"]


@pytest.mark.parametrize("left", [1, 2000, len(ARCHIVE) + 50])
def test_failed_launch_leaves_the_path_as_it_was(take, tmp_path, left):
    """Whatever breaks off, the previous content stays, and nothing lies beside it."""
    path = tmp_path / "out.tar"
    path.write_bytes(b"previous")
    with pytest.raises(EarlyEndError):
        take(STREAM[:-left], path)
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == ["out.tar"]


def test_path_is_replaced_only_after_finished(uds, guest_path, tmp_path):
    """Even with the whole archive there, the old content stays until the launch is complete."""
    path = tmp_path / "out.tar"
    path.write_bytes(b"previous")
    with (
        Host(guest_path, [STREAM[:-1]], hold=True) as host,
        EnclaveArgsReader(CID, uds_path=uds) as reader,
        reading(reader, path) as future,
    ):
        assert host.drained.wait(20)
        assert path.read_bytes() == b"previous"
        reader.cancel()
        assert isinstance(future.exception(20), LaunchCancelledError)
    assert path.read_bytes() == b"previous"


def test_link_to_a_file_stays_a_link(take, tmp_path):
    """The file a link leads to is replaced, in its own folder."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "link").symlink_to("../b/file")
    take(STREAM, tmp_path / "a" / "link")
    assert (tmp_path / "a" / "link").is_symlink()
    assert (tmp_path / "b" / "file").read_bytes() == ARCHIVE
    assert os.listdir(tmp_path / "a") == ["link"]


@pytest.fixture
def device(tmp_path):
    """A function that returns a device like /dev/null or /dev/full.

    For root it is a node of its own: a reader that replaces devices must not harm the machine.
    """

    def device(name):
        real = f"/dev/{name}"
        if os.geteuid():
            return real
        path = tmp_path / name
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.stat(real).st_rdev)
            path.open("wb").close()
        except OSError as error:
            leave_out(f"device nodes ({error})", "a container with CAP_MKNOD, or no container")
        return path

    return device


def test_device_is_written_to_and_not_replaced(take, device):
    """A null device swallows the archive and is a device afterwards."""
    path = device("null")
    before = os.stat(path)
    args = take(STREAM, path)
    after = os.stat(path)
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_rdev) == (before.st_ino, before.st_rdev)
    assert args.rootfs_sha256 == hashlib.sha256(ARCHIVE).hexdigest()


def test_fifo_is_written_to_and_not_replaced(take, tmp_path):
    """Whoever reads a FIFO gets the archive."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        take(STREAM, path)
        assert os.read(fd, len(ARCHIVE) + 1) == ARCHIVE
    finally:
        os.close(fd)
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_descriptor_is_written_from_its_offset_on_and_stays_open(take, tmp_path):
    """What is before the offset stays, and the descriptor is the caller's."""
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        file.write(b"head")
        take(STREAM, file.fileno())
        assert file.tell() == 4 + len(ARCHIVE)
        file.seek(0)
        assert file.read() == b"head" + ARCHIVE


def test_callback_gets_every_byte_in_order(take):
    """The pieces together are the archive."""
    got = bytearray()
    take([STREAM[:100], STREAM[100:5000], STREAM[5000:]], got.extend)
    assert got == ARCHIVE


@pytest.mark.parametrize("archive", [ARCHIVE, make_tar(3 << 20)], ids=["small", "3 MiB"])
def test_rootfs_may_go_nowhere(take, archive):
    """Without a sink the digest is still that of every byte."""
    assert take(launch(archive)).rootfs_sha256 == hashlib.sha256(archive).hexdigest()


def test_sink_that_raises_ends_the_launch_with_its_own_error(take):
    """The caller's exception arrives untouched."""

    def full(piece):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match=r"^no room$"):
        take(STREAM, full)


def test_sink_without_room_is_an_oserror(take, device):
    """A device that refuses the bytes says so."""
    with pytest.raises(OSError) as caught:
        take(STREAM, device("full"))
    assert caught.value.errno == errno.ENOSPC


def test_sink_that_cannot_be_opened_costs_no_connection(reader, tmp_path):
    """The error is the sink's although nobody listens either: it is opened first."""
    with pytest.raises(FileNotFoundError):
        reader.read_args(tmp_path / "missing" / "out.tar")


@pytest.mark.parametrize("sink", [3.5, True, -1, 1 << 31, "a\0b", [], object()])
def test_sink_of_another_type_is_refused_before_connecting(reader, sink):
    """A sink is nothing, a descriptor, a path or a callback."""
    with pytest.raises(InvalidArgumentError) as caught:
        reader.read_args(sink)
    assert caught.value.field == "rootfs"
    assert caught.value.value is sink


# Limits and malformed streams

SMALL = Limits(rootfs_bytes=50, string_bytes=10, strings=2, arguments_bytes=25)
PREFIX = b"\1" + string(b"/bin/app")

REFUSED = {
    "rootfs too long": (b"\0" + u64(51), LimitExceededError),
    "rootfs of 2**63": (b"\0" + u64(1 << 63), LimitExceededError),
    "empty rootfs": (b"\0" + u64(0), LimitExceededError),
    "path too long": (b"\1" + u64(11), LimitExceededError),
    "path without bytes": (b"\1" + u64(0), LimitExceededError),
    "too many argv": (b"\2" + u64(3), LimitExceededError),
    "2**61 argv": (b"\2" + u64(1 << 61), LimitExceededError),
    "no envp": (b"\3" + u64(0), LimitExceededError),
    "argv[0] too long": (b"\2" + u64(1) + u64(11), LimitExceededError),
    "envp[1] too long": (b"\3" + u64(2) + string(b"A=1") + u64(1 << 63), LimitExceededError),
    "strings too long together": (PREFIX + strings(2, [b"a" * 9, b"b" * 9]), LimitExceededError),
    "unknown id": (PREFIX + b"\6", UnknownFrameError),
    "duplicate path": (PREFIX * 2, DuplicateFrameError),
    "duplicate flag": (b"\5\5", DuplicateFrameError),
    "nothing but Finished": (b"\xff", MissingFrameError),
    "no rootfs": (STREAM[: -len(rootfs(ARCHIVE)) - 1] + b"\xff", MissingFrameError),
    "no NUL": (b"\1" + u64(2) + b"/a", BadStringError),
    "NUL inside": (b"\2" + u64(1) + u64(4) + b"/\0a\0", BadStringError),
}


@pytest.mark.parametrize(("stream", "error"), REFUSED.values(), ids=REFUSED)
def test_malformed_stream_is_refused_while_the_host_still_holds(take, stream, error):
    """The reader does not wait for more: it closes, and says what is wrong and how far it came."""
    with pytest.raises(error) as caught:
        take(stream, options={"limits": SMALL}, hold=True)
    assert isinstance(caught.value, ProtocolError)
    assert caught.value.stage is Stage.READ
    assert caught.value.bytes_sent == len(stream)


def test_stream_at_every_limit_passes(take):
    """The limits are the largest values taken."""
    stream = launch(b"x" * 50, path=b"/a", argv=[b"/b" * 4, b""], envp=[b"A=123456"])
    args = take(stream, options={"limits": SMALL})
    assert args.argv == ("/b/b/b/b", "")


def test_early_end_is_noticed_at_every_byte(take):
    """Whatever prefix of a stream comes before the end, it is not taken for a launch."""
    stream = launch(b"tar", path=b"/a", argv=[b"/a", b""], envp=[b"B="], flags=b"\4\5")
    for size in range(len(stream)):
        with pytest.raises(EarlyEndError) as caught:
            take(stream[:size])
        assert caught.value.bytes_sent == size
        assert isinstance(caught.value, ConnectionError)
    assert take(stream).rootfs_length == 3


# What the real guest needs


@pytest.mark.parametrize("archive", GOOD_TARS.values(), ids=GOOD_TARS)
def test_archive_the_guest_unpacks_passes_strict(take, archive):
    """Every kind of tar that libarchive unpacks without a locale, whatever its headers."""
    args = take(launch(archive), options={"strict": True})
    assert args.rootfs_sha256 == hashlib.sha256(archive).hexdigest()


def test_hand_made_headers_are_what_tar_understands():
    """The sparse file and the PAX override of these tests are real: tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(GOOD_TARS["GNU sparse"])) as tar:
        assert tar.getnames() == ["rootfs/sparse", "rootfs/behind"]
        run = b"\1" * 512 + bytes(3584)
        assert tar.extractfile("rootfs/sparse").read() == run * 26
        assert tar.extractfile("rootfs/behind").read() == b"data"
    with tarfile.open(fileobj=io.BytesIO(GOOD_TARS["PAX size override"])) as tar:
        assert [(member.name, member.size) for member in tar] == [("rootfs/a", 700)]


@pytest.mark.parametrize(("archive", "message"), BAD_TARS.values(), ids=BAD_TARS)
def test_archive_the_guest_stops_on_is_refused_by_strict_only(take, archive, message):
    """The plain reader takes any bytes; strict says what the guest would stop on."""
    stream = launch(archive)
    assert take(stream).rootfs_length == len(archive)
    with pytest.raises(GuestRuleError) as caught:
        take(stream, options={"strict": True})
    assert message in str(caught.value)
    assert caught.value.stage is Stage.READ


BAD_STRINGS = {
    "empty path": ({"path": b""}, "exec_path is 0 bytes"),
    "empty argument": ({"argv": [b"/a", b""]}, r"argv\[1\] is 0 bytes"),
    "empty variable": ({"envp": [b"A=1", b""]}, r"envp\[1\] is 0 bytes"),
    "path too long": ({"path": b"/" * 4001}, "exec_path is 4001 bytes, must be 1 to 4000"),
    "argument too long": ({"argv": [b"/a", b"x" * 4001]}, r"argv\[1\] is 4001 bytes"),
    "variable too long": ({"envp": [b"x" * 4001]}, r"envp\[0\] is 4001 bytes"),
    "program without slash or PATH": ({"argv": [b"app"]}, "envp.0. is not PATH="),
    "PATH not first": ({"argv": [b"app"], "envp": [b"A=1", b"PATH=/bin"]}, "envp.0. is not PATH="),
}


@pytest.mark.parametrize(("strings_", "message"), BAD_STRINGS.values(), ids=BAD_STRINGS)
def test_string_the_guest_fails_on_is_refused_by_strict_only(take, strings_, message):
    """Well-formed strings that the guest cannot measure or find the program with."""
    stream = launch(tar_of("rootfs/a"), **strings_)
    take(stream)
    with pytest.raises(GuestRuleError, match=message):
        take(stream, options={"strict": True})


def test_string_of_4000_bytes_and_path_first_pass_strict(take):
    """The limits themselves, and a program found by PATH."""
    stream = launch(
        tar_of("rootfs/a"),
        path=b"/" * 4000,
        argv=[b"app", b"x" * 4000],
        envp=[b"PATH=/bin", b"A=1"],
    )
    assert take(stream, options={"strict": True}).argv[0] == "app"


NUMBERS = {"path": 1, "argv": 19, "argv[0]": 27, "envp": 45, "envp[0]": 53, "rootfs": 66}
"""Where the lengths and counts of an ordinary launch begin."""


@pytest.mark.parametrize("begin", NUMBERS.values(), ids=NUMBERS)
def test_length_in_two_reads_is_refused_by_strict_only(take, begin):
    """Three bytes of a number, read before the rest comes: the guest's one read is short."""
    stream = launch(tar_of("rootfs/a"))
    pieces = [stream[: begin + 3], stream[begin + 3 :]]
    assert take(pieces).argv == ("/bin/app",)
    with pytest.raises(GuestRuleError, match="the first of 3 bytes") as caught:
        take(pieces, options={"strict": True})
    assert caught.value.bytes_sent == begin + 3


def test_anything_else_in_two_reads_passes_strict(take):
    """Only numbers must come whole: strings and archive may be cut anywhere."""
    stream = launch(tar_of("rootfs/a"))
    pieces = [stream[:1], stream[1:9], stream[9:11], stream[11:80], stream[80:777], stream[777:]]
    assert take(pieces, options={"strict": True}).exec_path == "/bin/app"


def test_reader_takes_what_our_writer_sends(uds, tmp_path):
    """A real archive, every kind of member, strict: the launch arrives whole and is unpacked."""
    source = tmp_path / "rootfs.tar"
    tree = tmp_path / "rootfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "app").write_bytes(os.urandom(300_000))
    os.link(tree / "bin" / "app", tree / "bin" / "same")
    (tree / "empty").touch()
    (tree / ("é" * 100)).write_text("long")
    (tree / "link").symlink_to("bin/app")
    with tarfile.open(source, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree, "rootfs")
    argv = ["app", *(f"argument {index} " + "x" * 200 for index in range(500))]
    writer = EnclaveArgsWriter(
        Rootfs.from_file(source),
        "/bin/app",
        argv,
        {"A": "é", "PATH": "/bin"},
        network_proxy=True,
        app_output=True,
    )
    with (
        writer.listen(CID, uds_path=uds) as launch,
        EnclaveArgsReader(CID, uds_path=uds, strict=True) as reader,
        reading(reader, tmp_path / "got.tar", 30) as future,
    ):
        report = launch.send(30)
        args = future.result(30)
    assert args.exec_path == "/bin/app"
    assert list(args.argv) == argv
    assert args.envp == ("PATH=/bin", "A=é")
    assert (args.network_proxy, args.app_output) == (True, True)
    assert args.bytes_received == report.bytes_sent
    assert (tmp_path / "got.tar").read_bytes() == source.read_bytes()


# Connection, time, threads


def test_nobody_listening_is_a_connect_error(reader, guest_path):
    """The address is in the message, the kernel's reason in errno."""
    with pytest.raises(VsockConnectError, match=re.escape(guest_path)) as caught:
        reader.read_args(timeout=5)
    assert (caught.value.errno, caught.value.stage) == (errno.ENOENT, Stage.CONNECT)


def test_socket_file_nobody_listens_at_is_a_connect_error(reader, guest_path):
    """A file left from a host that is gone refuses at once."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(guest_path)
        with pytest.raises(VsockConnectError) as caught:
            reader.read_args(timeout=5)
    assert caught.value.errno == errno.ECONNREFUSED


@contextlib.contextmanager
def full_backlog(path):
    """Yield a listening socket without room for another connection, and how many it holds."""
    waiting = 0
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(path):
                yield listener, waiting
                return
            waiting += 1


def test_host_without_room_is_waited_for_until_the_deadline(reader, guest_path):
    """A full backlog is no refusal; the deadline ends the wait."""
    with full_backlog(guest_path), pytest.raises(ConnectTimeoutError) as caught:
        reader.read_args(timeout=0.05)
    assert (caught.value.errno, caught.value.stage) == (errno.ETIMEDOUT, Stage.CONNECT)
    assert isinstance(caught.value, TimeoutError)


def test_host_that_makes_room_is_connected_to(reader, guest_path):
    """The wait on a full backlog ends when a connection is taken from it."""
    with full_backlog(guest_path) as (listener, waiting), reading(reader, timeout=20) as future:
        listener.settimeout(20)
        for _ in range(waiting):
            listener.accept()[0].close()
        with listener.accept()[0] as connection:
            connection.sendall(READY + STREAM)
            assert future.result(20).rootfs_length == len(ARCHIVE)


def test_silent_host_ends_at_the_deadline(take):
    """A connection without a ready byte is a handshake that timed out."""
    with pytest.raises(HandshakeTimeoutError) as caught:
        take(b"", answer=None, hold=True, timeout=0.3)
    assert (caught.value.errno, caught.value.stage) == (errno.ETIMEDOUT, Stage.HANDSHAKE)


@pytest.mark.parametrize(
    ("answer", "number"),
    [(b"\0", errno.EBADMSG), (b"\x48TTP", errno.EBADMSG), (b"", errno.ENODATA)],
)
def test_host_without_the_ready_byte_is_not_read_from(take, answer, number):
    """Another byte, or a close in place of one, is named as such."""
    with pytest.raises(ReadySignalNotDetectedError) as caught:
        take(STREAM, answer=answer)
    assert (caught.value.errno, caught.value.stage) == (number, Stage.HANDSHAKE)


def test_stalled_stream_ends_at_the_deadline(take):
    """bytes_sent says how far it came."""
    with pytest.raises(StreamTimeoutError) as caught:
        take(STREAM[:5000], hold=True, timeout=0.5)
    assert (caught.value.errno, caught.value.stage) == (errno.ETIMEDOUT, Stage.READ)
    assert caught.value.bytes_sent == 5000
    assert caught.value.total == len(STREAM)


def test_reset_in_the_stream_is_a_closed_peer(take):
    """A host that closes with our byte unread resets, and what came before is counted."""
    with pytest.raises(PeerClosedError) as caught:
        take(STREAM[:5000], listen_to_ready=False)
    assert (caught.value.errno, caught.value.stage) == (errno.ECONNRESET, Stage.READ)
    assert caught.value.bytes_sent == 5000


STUCK = {
    "connect": None,
    "handshake": {"answer": None},
    "stream": {"pieces": [STREAM[:5000]]},
}


@contextlib.contextmanager
def stuck(uds, guest_path, stage):
    """Yield (reader, future) of a read_args that hangs at a stage, known to be there."""
    with contextlib.ExitStack() as stack:
        if STUCK[stage] is None:
            stack.enter_context(full_backlog(guest_path))
        else:
            host = stack.enter_context(Host(guest_path, hold=True, **STUCK[stage]))
        reader = stack.enter_context(EnclaveArgsReader(CID, uds_path=uds))
        future = stack.enter_context(reading(reader))
        if stage == "handshake":
            assert host.shaken.wait(20)
        elif stage == "stream":
            assert host.drained.wait(20)
        try:
            yield reader, future
        finally:
            reader.cancel()


@pytest.mark.parametrize("stage", STUCK)
def test_cancel_from_another_thread_ends_the_call(uds, guest_path, stage):
    """Wherever it hangs, the call ends at once, and the reader is used up."""
    with stuck(uds, guest_path, stage) as (reader, future):
        reader.cancel()
        assert isinstance(future.exception(10), LaunchCancelledError)
        with pytest.raises(ClosedError, match="has been used"):
            reader.read_args()


@pytest.mark.parametrize("stage", STUCK)
def test_close_from_another_thread_ends_the_call(uds, guest_path, stage):
    """The call says that its reader was closed."""
    with stuck(uds, guest_path, stage) as (reader, future):
        reader.close()
        error = future.exception(10)
        assert isinstance(error, ClosedError)
        assert "closed during the call" in str(error)
        assert reader.closed


def test_second_thread_is_refused_and_the_first_goes_on(uds, guest_path):
    """Two calls at a time would tear the stream apart."""
    with stuck(uds, guest_path, "stream") as (reader, future):
        with pytest.raises(BusyError):
            reader.read_args()
        assert not future.done()


def test_reader_is_used_once(uds, guest_path):
    """A guest connects once; a reader too, whether it worked or not."""
    with EnclaveArgsReader(CID, uds_path=uds) as reader:
        with Host(guest_path, [STREAM]):
            reader.read_args()
        with pytest.raises(ClosedError, match="has been used"):
            reader.read_args()
    with pytest.raises(ClosedError, match="is closed"):
        reader.read_args()
    reader.close()


def test_cancel_before_the_call_counts(uds, guest_path):
    """Nothing is lost between making a reader and using it."""
    with EnclaveArgsReader(CID, uds_path=uds) as reader, Host(guest_path, [STREAM]):
        reader.cancel()
        with pytest.raises(LaunchCancelledError):
            reader.read_args()


def test_reader_that_is_forgotten_warns(uds):
    """A reader holds a descriptor; who drops it hears of it."""
    with pytest.warns(ResourceWarning, match="^unclosed <EnclaveArgsReader at unix:"):
        EnclaveArgsReader(CID, uds_path=uds)


INVALID = {
    "cid 2": ({"cid": 2}, "cid", 2),
    "cid as text": ({"cid": "16"}, "cid", "16"),
    "cid that is no number": ({"cid": True}, "cid", True),
    "cid whose ports end": ({"cid": 0xFFFFFFFF}, "cid", 0xFFFFFFFF),
    "host of no address": ({"cid": CID, "host_cid": 0xFFFFFFFF}, "host_cid", 0xFFFFFFFF),
    "host below zero": ({"cid": CID, "host_cid": -1}, "host_cid", -1),
}


@pytest.mark.parametrize(("arguments", "field", "value"), INVALID.values(), ids=INVALID)
def test_reader_of_no_address_is_refused(arguments, field, value):
    """The error names the argument and its value, and nothing is left open."""
    with pytest.raises(InvalidArgumentError) as caught:
        EnclaveArgsReader(**arguments)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_reader_connects_to_the_host_by_default():
    """From a guest: CID 2, port CID + 1."""
    with EnclaveArgsReader(CID) as reader:
        assert reader.address == VsockAddress(2, CID + 1)
    with EnclaveArgsReader(CID, host_cid=1) as reader:
        assert reader.address == VsockAddress(1, CID + 1)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", None])
def test_bad_timeout_does_not_use_the_reader_up(reader, guest_path, timeout):
    """A mistake in the call is no launch."""
    with pytest.raises(InvalidArgumentError) as caught:
        reader.read_args(timeout=timeout)
    assert caught.value.field == "timeout"
    with Host(guest_path, [STREAM]):
        assert reader.read_args().rootfs_length == len(ARCHIVE)


# Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(nitro_vsock.progress, "time", clock)
    return clock


def test_progress_comes_ten_times_a_second_at_most(take, clock):
    """However often bytes come: no two reports less than 0.1 s apart, but for the last."""
    reports = []

    def sink(piece):
        clock.now += 0.03

    archive = bytes(1 << 20)
    stream = launch(archive)
    pieces = [stream[begin : begin + 30_000] for begin in range(0, len(stream), 30_000)]
    take(pieces, sink, progress=reports.append)
    times = [report.seconds for report in reports]
    assert 5 < len(times) <= 0.03 * len(pieces) * 2 / 0.1 + 2
    assert all(late - early >= 0.0999 for early, late in pairwise(times[:-1]))
    assert [report.stage for report in reports] == [Stage.READ] * len(reports)


def test_progress_knows_the_total_as_soon_as_the_length_is_read(take, clock):
    """Every report names the same total, and the counts rise to it."""
    reports = []

    def sink(piece):
        clock.now += 1

    stream = launch(bytes(25_000))
    pieces = [stream[:10_000], stream[10_000:20_000], stream[20_000:]]  # each fits one read
    take(pieces, sink, progress=reports.append)
    assert {report.bytes_total for report in reports} == {len(stream)}
    assert [report.bytes_done for report in reports[:-1]] == [10_000, 20_000, len(stream)]
    assert reports[0].rate == pytest.approx(10_000)
    assert reports[0].seconds_left == pytest.approx((len(stream) - 10_000) / 10_000)


def test_last_report_is_the_whole_stream(take):
    """At the end there is a report, however quick the launch was: 100 %."""
    reports = []
    take(STREAM + b"junk", progress=reports.append)
    assert (reports[-1].bytes_done, reports[-1].bytes_total) == (len(STREAM), len(STREAM))
    assert len(reports) == 1


def test_report_at_the_first_moment_divides_by_nothing(take, clock):
    """A clock that has not moved gives no rate and no estimate, and no error."""
    reports = []
    take(STREAM, progress=reports.append)
    assert (reports[-1].seconds, reports[-1].average_rate) == (0, 0)
    assert (reports[-1].rate, reports[-1].seconds_left) == (0, None)


def test_total_is_unknown_before_the_length(uds, guest_path, clock):
    """Until the rootfs's length came, a report does not guess."""
    reports = []

    def tick(report):
        reports.append(report)

    with (
        Host(guest_path, [STREAM[:40]], hold=True) as host,
        EnclaveArgsReader(CID, uds_path=uds) as reader,
        reading(reader, progress=tick) as future,
    ):
        assert host.drained.wait(20)
        clock.now += 1
        while not reports:
            os.sched_yield()
        reader.cancel()
        future.exception(20)
    assert (reports[0].bytes_done, reports[0].bytes_total) == (40, None)
    assert reports[0].seconds_left is None


def test_progress_that_raises_ends_the_launch(take, tmp_path):
    """The callback's exception arrives untouched, and the path stays empty."""

    def stop(report):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        take(STREAM, tmp_path / "out.tar", progress=stop)
    assert os.listdir(tmp_path) == []


def test_progress_that_cannot_be_called_is_refused_before_connecting(reader):
    """It would end the launch in its middle."""
    with pytest.raises(InvalidArgumentError) as caught:
        reader.read_args(progress=5)
    assert (caught.value.field, caught.value.value) == ("progress", 5)


def test_fifo_without_a_reader_is_refused_at_once(tmp_path, uds):
    """Opening it to write would wait for a reader, past any deadline."""
    os.mkfifo(tmp_path / "fifo")
    with EnclaveArgsReader(CID, uds_path=uds) as reader, pytest.raises(OSError) as caught:
        reader.read_args(tmp_path / "fifo", timeout=60)
    assert caught.value.errno == errno.ENXIO
