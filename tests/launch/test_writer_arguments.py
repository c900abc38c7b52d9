"""EnclaveArgsWriter and listen(): what is refused before anything is bound, what is made of it."""

import contextlib
import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from left_out import leave_out
from machine import CID
from peer import Guest, wait_until
from vectors import golden

from nitro_vsock import (
    AppOutput,
    DeviceProxy,
    DeviceProxyList,
    EnclaveArgsWriter,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    InvalidArgumentError,
    NetworkProxy,
    PollTimeout,
    RootFilesystem,
    Rootfs,
    Stage,
    Strategy,
    UnixAddress,
    VsockAddress,
)
from nitro_vsock.protocol import VMADDR_CID_ANY
from nitro_vsock.wire.frames import encode_packets

ROOTFS = Rootfs.from_bytes(b"t")
GOOD = {"rootfs": ROOTFS, "exec_path": "/bin/app", "argv": ["/bin/app"], "envp": {"A": "1"}}


def writer_with(**changes):
    """Return an ordinary writer with some arguments changed."""
    return EnclaveArgsWriter(**{**GOOD, **changes})


def descriptors():
    """Return the numbers of this process's descriptors."""
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def refused(uds):
    """A context that expects an InvalidArgumentError for a field, and nothing bound or left open.

    `value` is compared where given; `limit` are words of the error's limit.
    """

    @contextlib.contextmanager
    def refused(field, limit="", **value):
        before = descriptors()
        with pytest.raises(InvalidArgumentError) as caught:
            yield
        error = caught.value
        assert descriptors() == before
        assert os.listdir(Path(uds).parent) == []
        assert error.field == field
        assert limit in error.limit
        if value:
            assert error.value == value["value"]
            assert type(error.value) is type(value["value"])
        assert error.stage is Stage.VALIDATE
        assert (error.errno, error.bytes_sent, error.total) == (None, 0, None)
        assert not error.must_terminate_enclave
        assert str(error).startswith(f"{field}: {error.limit}, got ")
        assert isinstance(error, ValueError)

    return refused


# Strings

BAD_TEXT = {
    "NUL": ("a\0b", "must not contain NUL (at byte 1)"),
    "NUL in bytes": (b"\0", "must not contain NUL (at byte 0)"),
    "empty": ("", "must not be empty"),
    "empty bytes": (b"", "must not be empty"),
    "too long": ("x" * 4001, "must be at most 4000 bytes (one NSM request), is 4001 bytes"),
    "too long in UTF-8": ("é" * 2001, "is 4002 bytes"),
    "surrogate": ("ab\udcff", "must be encodable as UTF-8 (surrogate at index 2)"),
    "number": (5, "must be str or bytes"),
    "None": (None, "must be str or bytes"),
    "bytearray": (bytearray(b"a"), "must be str or bytes"),
    "path object": (Path("/bin/app"), "must be str or bytes"),
}


@pytest.mark.parametrize(("text", "limit"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_string_the_guest_cannot_take_is_refused_by_name(refused, text, limit):
    """Wherever it stands: the field is the argument and its index, the value the string."""
    with refused("exec_path", limit, value=text):
        writer_with(exec_path=text)
    with refused("argv[1]", limit, value=text):
        writer_with(argv=["/bin/app", text])
    with refused("envp[2]", limit, value=text):
        writer_with(envp=["A=1", "B=2", text])


def test_strings_of_4000_bytes_are_taken():
    """The limit is the largest that passes, counted in bytes, str and bytes alike."""
    writer = writer_with(exec_path="é" * 2000, argv=["/" * 4000], envp={"A": b"x" * 3998})
    assert writer.args == (
        ExecPath("é".encode() * 2000),
        ExecArgv((b"/" * 4000,)),
        ExecEnvp((b"A=" + b"x" * 3998,)),
    )


@pytest.mark.parametrize("field", ["argv", "envp"])
def test_list_that_is_none_is_refused(refused, field):
    """A single string is a mistake, not a list of letters; and a list needs an entry."""
    for value in ("/bin/app", b"/bin/app", bytearray(b"a"), memoryview(b"a"), 5, None):
        with refused(field, "must be a list of strings", value=value):
            writer_with(**{field: value})
    for value in ([], (), iter([])):
        with refused(field, "must have at least one entry", value=[]):
            writer_with(**{field: value})
    with refused("envp", "must have at least one entry", value=[]):
        writer_with(envp={})


def test_lists_of_any_kind_are_taken():
    """What can be iterated over is read once."""
    writer = writer_with(argv=(text for text in ("/a", b"b")), envp=("A=1", b"B=\xff"))
    assert writer.args[1:] == (ExecArgv((b"/a", b"b")), ExecEnvp((b"A=1", b"B=\xff")))


# Environment


def test_mapping_becomes_assignments_in_its_order():
    """NAME=value each; a value may be empty and hold equals signs."""
    writer = writer_with(envp={"B": "x=y", "A": "", "É": "é"})
    assert writer.args[-1] == ExecEnvp((b"B=x=y", b"A=", "É=é".encode()))
    assert writer_with(envp={b"A": b"\xff"}).args[-1] == ExecEnvp((b"A=\xff",))


def test_name_that_is_none_is_refused(refused):
    """A name has no equals sign, no NUL, and is not empty."""
    for name, limit in (
        ("A=B", "must not contain '='"),
        ("=", "must not contain '='"),
        (b"A=", "must not contain '='"),
        ("", "must not be empty"),
        ("A\0", "must not contain NUL"),
        (5, "must be str or bytes"),
        (None, "must be str or bytes"),
    ):
        with refused("envp name", limit, value=name):
            writer_with(envp={"GOOD": "1", name: "1"})


def test_value_that_is_none_is_refused_by_its_name(refused):
    """The field shows whose value it is."""
    for value, limit in (
        ("a\0", "must not contain NUL"),
        (5, "must be str or bytes"),
        (None, "must be str or bytes"),
        ("\ud800", "surrogate at index 0"),
        ("x" * 4001, "is 4001 bytes"),
    ):
        with refused("envp['A']", limit, value=value):
            writer_with(envp={"GOOD": "1", "A": value})


def test_assignment_over_the_limit_is_refused(refused):
    """Name, sign and value together are the string that is measured."""
    with refused("envp[1]", "is 4001 bytes", value=b"NAME=" + b"x" * 3996):
        writer_with(envp={"A": "1", "NAME": "x" * 3996})


def test_path_comes_first_when_the_program_has_no_slash():
    """The guest looks for PATH in envp[0] only; the rest keeps its order."""
    envp = ["A=1", "XPATH=no", "PATH=/bin", "B=2", "PATH=/second"]
    writer = writer_with(argv=["app"], envp=envp)
    assert writer.args[-1] == ExecEnvp((b"PATH=/bin", b"A=1", b"XPATH=no", b"B=2", b"PATH=/second"))
    writer = writer_with(argv=[b"app"], envp={"A": "1", "PATH": ""})
    assert writer.args[-1] == ExecEnvp((b"PATH=", b"A=1"))


@pytest.mark.parametrize("program", ["/bin/app", "./app", "bin/app", "app/"])
def test_order_is_kept_when_the_program_has_a_slash(program):
    """No lookup, no reason to touch what is measured."""
    writer = writer_with(argv=[program, "app"], envp={"A": "1", "PATH": "/bin"})
    assert writer.args[-1] == ExecEnvp((b"A=1", b"PATH=/bin"))


def test_program_that_will_not_be_found_is_warned_of(caplog):
    """No slash and no PATH is sent as given, with a word in the log."""
    with caplog.at_level(logging.WARNING, "nitro_vsock"):
        writer = writer_with(argv=["app"], envp={"A": "1"})
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        writer_with(argv=["/app"], envp={"A": "1"})
        writer_with(argv=["app"], envp={"PATH": "/"})
    assert len(caplog.records) == 1
    assert "no PATH" in caplog.text
    assert writer.args[-1] == ExecEnvp((b"A=1",))


# Frames, flags, proxies


def test_frames_are_sent_flags_first():
    """A guest spins for ever on a stream that ends after a flag, so none comes late."""
    writer = writer_with(network_proxy=True, app_output=True)
    assert writer.args == (
        NetworkProxy(),
        AppOutput(),
        ExecPath(b"/bin/app"),
        ExecArgv((b"/bin/app",)),
        ExecEnvp((b"A=1",)),
    )
    assert writer_with().args == writer.args[2:]
    assert writer_with(app_output=True).args == writer.args[1:]


def proxy(arg):
    """Return a device proxy whose frame is `arg`."""
    return SimpleNamespace(arg=lambda: arg)


def test_proxies_add_their_frames_once_each():
    """In the list's order; a proxy without a frame adds none, and no flag is sent twice."""
    proxies = DeviceProxyList([proxy(None), proxy(AppOutput()), proxy(NetworkProxy())])
    assert proxies.args() == [AppOutput(), NetworkProxy()]
    assert writer_with(proxies=proxies).args[:2] == (AppOutput(), NetworkProxy())
    assert writer_with(proxies=proxies, network_proxy=True).args[:3] == (
        NetworkProxy(),
        AppOutput(),
        ExecPath(b"/bin/app"),
    )
    assert writer_with(proxies=[proxy(AppOutput())]).args[0] == AppOutput()
    assert writer_with(proxies=DeviceProxyList()).args[0] == ExecPath(b"/bin/app")


def test_what_is_no_proxy_is_refused(refused):
    """An entry has an arg() method, and its frame is a flag."""
    assert isinstance(proxy(None), DeviceProxy)
    for entry in (5, None, "proxy", NetworkProxy()):
        with refused("proxies[1]", "must have an arg() method", value=entry):
            writer_with(proxies=[proxy(None), entry])
        with refused("proxies[0]", "must have an arg() method", value=entry):
            DeviceProxyList([entry])
    for arg in (Finished(), ExecPath(b"/a"), RootFilesystem(1), 4, False):
        with refused("proxies[1].arg()", "must be NetworkProxy, AppOutput or None", value=arg):
            writer_with(proxies=[proxy(None), proxy(arg)])
    for proxies in (5, True, proxy(None)):
        with refused("proxies", "must be a list of proxies", value=proxies):
            writer_with(proxies=proxies)


@pytest.mark.parametrize("rootfs", ["rootfs.tar", b"tar", 5, None, Path("rootfs.tar")])
def test_rootfs_of_another_type_is_refused(refused, rootfs):
    """A path or bytes could mean several things; the class methods say which."""
    with refused("rootfs", "must be a Rootfs (Rootfs.from_file, ...)", value=rootfs):
        writer_with(rootfs=rootfs)


def test_arguments_past_the_guests_window_are_refused(refused):
    """256 KiB encoded: more would be cut by the guest's receive window."""
    argv = ["/bin/app", *["x" * 3999] * 66]
    size = sum(8 + len(text) + 1 for text in argv) + 9 + 18 + 21 + 9
    with refused("arguments", "at most 262144 bytes", value=size):
        writer_with(argv=argv)
    assert len(writer_with(argv=argv[:-1]).args[1].strings) == 66


# The reference's arguments


def reference(**changes):
    """Return what from_reference makes of ordinary arguments with some changed."""
    return EnclaveArgsWriter.from_reference(
        **{
            "rootfs": b"t",
            "exec_path": "/bin/app",
            "argv_str": '/bin/app "a b"  c',
            "envp_str": 'B="2 3" PATH=/bin',
            "proxies": [],
            **changes,
        }
    )


def test_reference_arguments_split_as_there():
    """Quotes are deleted, every single space splits, empty strings stay, the order too."""
    writer = reference()
    frames = [*writer.args, RootFilesystem(writer.rootfs.length)]
    assert b"".join(encode_packets(frames)) == golden("reference")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", (b"",)),
        ('""', (b"",)),
        (" ", (b"", b"")),
        (" a ", (b"", b"a", b"")),
        ("a\tb\nc", (b"a\tb\nc",)),
        ("'a b'", (b"'a", b"b'")),
        ("a\\ b", (b"a\\", b"b")),
        ('a"b"c', (b"abc",)),
        ("a\u00a0b", ("a\u00a0b".encode(),)),
    ],
)
def test_reference_splits_at_spaces_and_nothing_else(text, parts):
    """No shell rules, no other white space; argv and envp alike."""
    assert reference(argv_str=text).args[1] == ExecArgv(parts)
    assert reference(envp_str=text).args[2] == ExecEnvp(parts)


def test_reference_keeps_path_where_it_is():
    """PCR17 must be the reference's, so nothing is moved, found or not."""
    writer = reference(argv_str="app", envp_str="A=1 PATH=/bin", exec_path="")
    assert writer.args == (ExecPath(b""), ExecArgv((b"app",)), ExecEnvp((b"A=1", b"PATH=/bin")))


def test_reference_takes_the_archive_in_memory_or_as_rootfs():
    """`&[u8]` there; here a Rootfs too, so that it need not be in memory."""
    assert reference(rootfs=bytearray(b"tar")).rootfs.length == 3
    assert reference(rootfs=ROOTFS).rootfs is ROOTFS
    proxies = DeviceProxyList([proxy(NetworkProxy())])
    assert reference(proxies=proxies).args[0] == NetworkProxy()


def test_reference_arguments_that_cannot_be_used_are_refused(refused):
    """What the reference cannot turn into C strings, and what the guest cannot take."""
    for field in ("argv_str", "envp_str"):
        for value in (["/bin/app"], b"/bin/app", None):
            with refused(field, "must be str", value=value):
                reference(**{field: value})
    with refused("argv[1]", "must not contain NUL", value="a\0"):
        reference(argv_str="/bin/app a\0 b")
    with refused("envp[0]", "is 4001 bytes", value="x" * 4001):
        reference(envp_str="x" * 4001)
    with refused("exec_path", "must be str or bytes", value=None):
        reference(exec_path=None)
    with refused("rootfs", "must not be empty"):
        reference(rootfs=b"")
    with refused("rootfs", "must be a contiguous buffer", value="str"):
        reference(rootfs="rootfs.tar")
    with refused("proxies", "must be a list", value=None):
        reference(proxies=None)


# listen()

MAX_CID = 0xFFFFFFFE - 5


@pytest.mark.parametrize(
    "cid", [0, 1, 2, -1, MAX_CID + 1, 0xFFFFFFFF, 1 << 32, 1 << 64, True, 16.0, "16", None]
)
def test_cid_no_enclave_can_have_is_refused(refused, uds, cid):
    """Reserved ones, and those whose services' ports would not exist; over either transport."""
    limit = f"must be 3 to {MAX_CID} (0, 1 and 2 are reserved"
    for place in ({}, {"uds_path": uds}):
        with refused("cid", limit, value=cid):
            writer_with().listen(cid, **place)


def test_port_is_the_cid_plus_one_up_to_the_last(uds):
    """On AF_VSOCK and as the suffix of a hybrid vsock's path."""
    with writer_with().listen(MAX_CID, uds_path=uds) as launch:
        assert launch.address == UnixAddress(f"{uds}_{MAX_CID + 1}")
        assert os.path.exists(f"{uds}_{MAX_CID + 1}")
    with writer_with().listen(3, uds_path=Path(uds)) as launch:
        assert launch.address == UnixAddress(f"{uds}_4")
    assert os.listdir(Path(uds).parent) == []


def test_vsock_listens_on_any_cid():
    """The host's own CID is not known beforehand."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        leave_out(f"AF_VSOCK ({error})", "modprobe vsock")
    with writer_with().listen(54_000) as launch:
        assert launch.address == VsockAddress(VMADDR_CID_ANY, 54_001)
        with socket.socket(fileno=os.dup(launch.fileno())) as sock:
            assert sock.getsockname() == (VMADDR_CID_ANY, 54_001)


@pytest.mark.parametrize("cid", [-1, 1 << 32, True, 1.0, "1"])
def test_peer_cid_that_is_none_is_refused(refused, uds, cid):
    """32 bits; any of them, VMADDR_CID_ANY included."""
    with refused("peer_cid", "must be 0 to 4294967295", value=cid):
        writer_with().listen(CID, uds_path=uds, peer_cid=cid)
    with refused("peer_cid"):
        writer_with().listen(54_000, peer_cid=cid)


@pytest.mark.parametrize("cid", [0, 1, 2, CID, VMADDR_CID_ANY])
def test_peer_cid_of_any_address_is_taken(uds, cid):
    """Loopback's 1 among them."""
    with writer_with().listen(CID, uds_path=uds, peer_cid=cid) as launch:
        assert launch.fileno() >= 0


@pytest.mark.parametrize("strategy", ["fast", "", "SENDFILE", None, 1, b"send", ["send"]])
def test_strategy_of_no_name_is_refused(refused, uds, strategy):
    """The names there are stand in the error."""
    limit = "must be one of auto, sendfile, splice, mmap, read, send"
    with refused("strategy", limit, value=strategy):
        writer_with().listen(CID, uds_path=uds, strategy=strategy)


def test_strategy_that_does_not_fit_the_source_is_refused(refused, uds, archive):
    """Memory is sent, descriptors are not; what the kernel decides falls back by itself."""
    file = Rootfs.from_file(archive.path)
    with refused("strategy", "must be auto, sendfile, splice, mmap or read", value="send"):
        writer_with(rootfs=file).listen(CID, uds_path=uds, strategy="send")
    for strategy in ("sendfile", Strategy.SPLICE, "mmap", Strategy.READ):
        with refused("strategy", "must be auto, send for", value=str(strategy)):
            writer_with().listen(CID, uds_path=uds, strategy=strategy)
    for rootfs, strategy in ((ROOTFS, "send"), (ROOTFS, Strategy.AUTO), (file, Strategy.MMAP)):
        with writer_with(rootfs=rootfs).listen(CID, uds_path=uds, strategy=strategy):
            pass


def test_path_too_long_for_a_socket_is_refused(refused, uds):
    """107 bytes with the port's suffix, counted as bytes."""
    room = 107 - len("_17")
    for path in ("x" * (room + 1), "/tmp/" + "é" * 60):
        with refused("uds_path", "must encode to 1 to 107 bytes without NUL", value=f"{path}_17"):
            writer_with().listen(CID, uds_path=path)
    with refused("uds_path", value="a\0b_17"):
        writer_with().listen(CID, uds_path="a\0b")
    longest = f"{Path(uds).parent}/".ljust(room, "x")
    with writer_with().listen(CID, uds_path=longest):
        assert len(os.listdir(Path(uds).parent)[0]) + len(f"{Path(uds).parent}/") == 107


@pytest.mark.parametrize("path", [5, True, ["a"], "\ud800"])
def test_socket_path_that_is_none_is_refused(refused, monkeypatch, tmp_path, path):
    """A path is str or a path object; no file is made of the name of something else."""
    monkeypatch.chdir(tmp_path)
    with refused("uds_path"), writer_with().listen(CID, uds_path=path):
        pass


def test_socket_path_may_be_bytes(monkeypatch, uds):
    """As everywhere a path is taken."""
    monkeypatch.chdir(Path(uds).parent)
    with writer_with().listen(CID, uds_path=os.fsencode(uds)) as launch:
        assert launch.address == UnixAddress(f"{uds}_{CID + 1}")


BAD_TIMEOUTS = [-1, float("nan"), float("inf"), 1e10, 10**400, True, "5", None]


@pytest.mark.parametrize("timeout", BAD_TIMEOUTS, ids=lambda timeout: repr(timeout)[:12])
def test_timeout_that_is_none_is_refused_before_binding(refused, uds, archive, timeout):
    """The one-call form checks it first: even a rootfs that is gone comes after."""
    writer = writer_with(rootfs=Rootfs.from_file(archive.path))
    archive.path.unlink()
    with refused("timeout", "seconds"):
        writer.write_args(CID, timeout, uds_path=uds)


def test_mistake_in_send_does_not_use_the_launch_up(uds, guest_path):
    """A timeout or descriptor that is none is no launch: it can be sent afterwards."""
    with writer_with().listen(CID, uds_path=uds) as launch:
        closed = os.dup(launch.fileno())
        os.close(closed)
        for timeout in BAD_TIMEOUTS:
            with pytest.raises(InvalidArgumentError) as caught:
                launch.send(timeout)
            assert caught.value.field == "timeout"
            assert caught.value.value is timeout
        for enclave_fd in (closed, -1, True, "3", 1 << 31, 3.0):
            with pytest.raises(InvalidArgumentError) as caught:
                launch.send(enclave_fd=enclave_fd)
            assert caught.value.field == "enclave_fd"
            assert caught.value.value is enclave_fd
        guest = Guest(guest_path)
        assert launch.send(PollTimeout(30_000)).rootfs_bytes == 1
    assert guest.result().path == b"/bin/app"


def test_progress_that_cannot_be_called_is_refused_before_the_guest_gets_a_byte(uds, guest_path):
    """In the middle of the stream it would cost the launch."""
    with writer_with().listen(CID, uds_path=uds) as launch:
        with pytest.raises(InvalidArgumentError) as caught:
            launch.send(30, progress=5)
        assert (caught.value.field, caught.value.value) == ("progress", 5)
        assert not caught.value.must_terminate_enclave


def test_writer_is_used_any_number_of_times(uds, guest_path):
    """It holds nothing; one after another, and two at a time for different enclaves."""
    writer = writer_with()
    for _ in range(2):
        with writer.listen(CID, uds_path=uds) as launch:
            guest = Guest(guest_path)
            launch.send(30)
            assert guest.result().envp == [b"A=1"]
    with writer.listen(CID, uds_path=uds), writer.listen(CID + 5, uds_path=uds):
        assert len(os.listdir(Path(uds).parent)) == 2


def test_write_args_listens_sends_and_closes(uds, guest_path):
    """The reference's one call, with the options of listen."""

    def listening():
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(guest_path) == 0

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(writer_with().write_args, CID, 30, uds_path=uds, strategy="send")
        wait_until(listening, what="the listening")
        guest = Guest(guest_path)
        report = sent.result(30)
    assert report.bytes_sent == guest.result().received
    assert report.strangers == {"cid": 0, "ready": 0, "closed": 1, "crowded": 0}
    assert os.listdir(Path(uds).parent) == []
