"""Every row of the errno table is provoked; the exceptions are what their documentation says."""

import builtins
import contextlib
import errno
import inspect
import mmap
import os
import pickle
import re
import resource
import select
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import driver
import faults
import pytest
from command import PROJECT
from machine import CID
from nitro_vsock._core import lib
from peer import READY, connect, handshake
from stages import STOPS, RawGuest, long_launch

import nitro_vsock
from nitro_vsock import (
    EnclaveArgsReader,
    EnclaveArgsWriter,
    NitroVsockError,
    Rootfs,
    errors,
)
from nitro_vsock.errors import ERRNO_TABLE, Stage
from nitro_vsock.transport.addresses import UnixAddress
from nitro_vsock.transport.listener import Listener
from nitro_vsock.transport.wakeup import WakeUp

HEADER = 74
"""Bytes before the root file system's first, for the arguments of driver.py."""
ARCHIVE = 81_920
"""Bytes of a root file system that is too large to travel with the arguments."""
OPENING = 40
"""Bytes of the first send, where it is cut short."""


@dataclass
class Scene:
    """What a case can use."""

    uds: str
    path: str
    writer: EnclaveArgsWriter
    tmp_path: Path
    shim: Path

    def listen(self, **options):
        """Listen with the ordinary writer."""
        return self.writer.listen(CID, uds_path=self.uds, **options)

    def fail(self, call, code, nth=1, scenario=driver.launches, **options):
        """Return how a launch (or a read) in a child ends whose n-th `call` fails."""
        plan = {"call": call, "action": "fail", "value": code}
        options.setdefault("timeout", 20)
        (result,) = driver.run(scenario, shim=self.shim, plans=[plan], nth=nth, **options)
        return from_child(result)


def from_child(result):
    """Return a child's exception as something with its attributes."""
    assert result["typed"], result
    code = result["errno"]
    return SimpleNamespace(
        cls=getattr(errors, result["error"]),
        errno=getattr(errno, code) if isinstance(code, str) else code,
        stage=result["stage"],
        bytes_sent=result["bytes_sent"],
        text=result["text"],
        expected=result["expected"],
        actual=result["actual"],
    )


@contextlib.contextmanager
def caught():
    """Yield a namespace that gets what the block raises."""
    found = SimpleNamespace()
    with pytest.raises(NitroVsockError) as caught:
        yield found
    error = caught.value
    found.cls, found.text = type(error), str(error)
    found.errno, found.stage, found.bytes_sent = error.errno, error.stage, error.bytes_sent


def cancelled(scene):
    """cancel() before send()."""
    with scene.listen() as launch, caught() as error:
        launch.cancel()
        launch.send()
    return error


def died(scene):
    """The enclave's descriptor has hung up."""
    watched, theirs = os.pipe()
    os.close(theirs)
    with scene.listen() as launch, caught() as error:
        launch.send(enclave_fd=watched)
    os.close(watched)
    return error


def nobody_comes(scene):
    """No guest."""
    with scene.listen() as launch, caught() as error:
        launch.send(timeout=0.05)
    return error


def silent_peer(scene):
    """A guest that says nothing."""
    with scene.listen() as launch, connect(scene.path), caught() as error:
        launch.send(timeout=0.05)
    return error


def stuck_guest(scene):
    """A guest that stops reading."""
    with (
        long_launch(CID, scene.uds) as launch,
        RawGuest(scene.path, STOPS["rootfs"]) as guest,
        caught() as error,
    ):
        launch.send(timeout=0.5)
    error.wanted_bytes = guest.received
    return error


def other_cid(scene):
    """A peer with another CID, where strangers are not tolerated."""
    plan = {"call": "accept4", "action": "stranger", "value": 99}
    (result,) = driver.run(
        driver.launches,
        shim=scene.shim,
        plans=[plan],
        nth=1,
        vsock_cid=CID,
        strict_peer=True,
        timeout=20,
    )
    error = from_child(result)
    assert (error.expected, error.actual) == (CID, 99)
    assert "expected CID 16, got CID 99" in error.text
    return error


def junk(scene):
    """A peer that says something else, where strangers are not tolerated."""
    with scene.listen(strict_peer=True) as launch, connect(scene.path) as peer, caught() as error:
        peer.sendall(b"G")
        launch.send()
    return error


def truncated(scene):
    """The file shrinks between listen and send."""
    path = scene.tmp_path / "rootfs.tar"
    with scene.listen() as launch, RawGuest(scene.path, 1 << 60) as guest, caught() as error:
        os.truncate(path, 100_000)
        launch.send()
    error.wanted_bytes = guest.received
    return error


def unreadable(scene):
    """A process's memory where its stack ends: a page that can be read and one that cannot."""
    maps = Path("/proc/self/maps").read_text()
    end = int(re.search(r"-(\w+) .*\[stack\]", maps)[1], 16)
    with open("/proc/self/mem", "rb") as memory:
        rootfs = Rootfs.from_fd(memory.fileno(), offset=end - 4096, length=8192)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with (
            writer.listen(CID, uds_path=scene.uds, preflight=False) as launch,
            RawGuest(scene.path, 1 << 60) as guest,
            caught() as error,
        ):
            launch.send()
    error.wanted_bytes = guest.received
    return error


def unmapped(scene):
    """Memory that is a mapping of a file that shrank."""
    path = scene.tmp_path / "rootfs.tar"
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        writer = EnclaveArgsWriter(Rootfs.from_bytes(memory), "/bin/app", ["/bin/app"], ["A=1"])
        with (
            writer.listen(CID, uds_path=scene.uds) as launch,
            RawGuest(scene.path, 1 << 60) as guest,
            caught() as error,
        ):
            file.truncate(8192)
            launch.send()
    error.wanted_bytes = guest.received
    return error


def bound_twice(scene):
    """Another launch listens there."""
    with scene.listen(), caught() as error:
        scene.listen()
    return error


@contextlib.contextmanager
def unprivileged():
    """Be somebody who may not do everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def not_permitted(scene):
    """A folder one may not write to."""
    folder = Path(scene.uds).parent
    writer = EnclaveArgsWriter(Rootfs.from_bytes(b"tar"), "/bin/app", ["/bin/app"], ["A=1"])
    folder.chmod(0o500)
    with unprivileged(), caught() as error:
        writer.listen(CID, uds_path=scene.uds)
    folder.chmod(0o700)
    return error


def no_folder(scene):
    """A folder that is not there."""
    with caught() as error:
        scene.writer.listen(CID, uds_path=f"{scene.uds}/v")
    return error


def reader_of(scene, timeout=5.0):
    """Read at the scene's path."""
    with EnclaveArgsReader(CID, uds_path=scene.uds) as reader, caught() as error:
        reader.read_args(timeout=timeout)
    return error


@contextlib.contextmanager
def plain_host(scene, backlog=8):
    """Yield a listening socket at the scene's path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(scene.path)
        listener.listen(backlog)
        yield listener


def served(scene, serve):
    """Read while `serve` does what it does to the accepted connection."""

    def accept():
        with listener.accept()[0] as sock:
            serve(sock)

    with plain_host(scene) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        error = reader_of(scene)
        thread.join()
    return error


def full_backlog(scene):
    """A host that accepts nobody."""
    with plain_host(scene, backlog=0), connect(scene.path):
        return reader_of(scene, timeout=0.1)


def nobody_listens(scene):
    """A socket file without a listener."""
    with plain_host(scene):
        pass
    return reader_of(scene)


def host_closes_instead(scene):
    """A host that takes the ready byte and closes."""
    return served(scene, lambda sock: sock.recv(1))


def host_resets(scene):
    """A host that answers unasked and closes with the reader's byte unread."""

    def serve(sock):
        sock.sendall(READY)
        select.select([sock], [], [], 10)

    return served(scene, serve)


@contextlib.contextmanager
def exhausted():
    """No descriptor is left meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def no_descriptors(scene):
    """No descriptor is left for the guest's connection."""
    with scene.listen() as launch, connect(scene.path), caught() as error, exhausted():
        launch.send()
    return error


def no_descriptors_for_a_service(scene):
    """The guest connects to a service of a session, and no descriptor is left for it."""
    with (
        contextlib.closing(WakeUp()) as wake_up,
        Listener(UnixAddress(scene.path), wake_up) as listener,
        connect(scene.path),
        caught() as error,
        exhausted(),
    ):
        listener.accept(None)
    return error


def closed_with_bytes_unread(scene):
    """A guest that goes away before it has read Finished."""
    with (
        scene.listen() as launch,
        connect(scene.path) as guest,
        caught() as error,
    ):
        total = scene.writer.rootfs.length + len(b"".join(a.encode() for a in scene.writer.args))
        thread = threading.Thread(target=leave_one_byte, args=(guest, total + 9))
        thread.start()
        try:
            launch.send()
        finally:
            thread.join()
    error.wanted_bytes = total + 10
    return error


def leave_one_byte(sock, size):
    """Take `size` bytes, wait for one more, and close without reading it."""
    handshake(sock)
    while size:
        size -= len(sock.recv(min(size, 1 << 20)))
    assert sock.recv(1, socket.MSG_PEEK) == b"\xff"
    sock.close()


def receiving_fails(stage, scenario):
    """The first recv of this stage."""

    def case(scene):
        plan = {"call": "recv", "action": "fail", "value": "EIO"}
        results = driver.run(scenario, shim=scene.shim, plans=[plan], timeout=0.5)
        found = next(result for result in results if result["stage"] == stage)
        error = from_child(found)
        error.wanted_bytes = found["total"]
        return error

    return case


def gone(stage, code):
    """A send that ends with `code` in this stage."""

    def case(scene):
        if stage == "handshake":
            return scene.fail("send", code, scenario=driver.reads)
        call, nth = {"arguments": ("send", 2), "rootfs": ("sendfile", 1), "finish": ("send", 2)}[
            stage
        ]
        # The arguments travel with the ready byte, unless the socket takes only a part of them.
        cap = OPENING if stage == "arguments" else 0
        return scene.fail(call, code, nth, size=ARCHIVE, cap=cap)

    return case


SENT = {
    "handshake": 0,
    "arguments": OPENING - 1,
    "rootfs": HEADER,
    "finish": HEADER + ARCHIVE,
}
"""Bytes the socket had taken, by stage; the ready byte does not count."""

CASES = [
    # (stage and errno of the row, source?), what provokes it, stage and bytes of the exception
    (None, "ECANCELED", False, cancelled, "accept", 0),
    (None, "EOWNERDEAD", False, died, "accept", 0),
    ("accept", "ETIME", False, nobody_comes, "accept", 0),
    ("connect", "ETIME", False, full_backlog, "connect", 0),
    ("handshake", "ETIME", False, silent_peer, "handshake", 0),
    (None, "ETIME", False, stuck_guest, "rootfs", None),
    (None, "EREMCHG", False, other_cid, "accept", 0),
    ("handshake", "ENODATA", False, host_closes_instead, "handshake", 0),
    (None, "EBADMSG", False, junk, "handshake", 0),
    (None, "ENODATA", True, truncated, "rootfs", None),
    (None, None, True, unreadable, "rootfs", None),
    ("bind", "EAFNOSUPPORT", False, lambda s: s.fail("socket", "EAFNOSUPPORT"), "bind", 0),
    ("bind", "EADDRINUSE", False, bound_twice, "bind", 0),
    ("bind", "EACCES", False, not_permitted, "bind", 0),
    ("bind", None, False, no_folder, "bind", 0),
    (
        "connect",
        "EAFNOSUPPORT",
        False,
        lambda s: s.fail("socket", "EAFNOSUPPORT", scenario=driver.reads),
        "connect",
        0,
    ),
    (
        "connect",
        "ETIMEDOUT",
        False,
        lambda s: s.fail("connect", "ETIMEDOUT", scenario=driver.reads),
        "connect",
        0,
    ),
    ("connect", None, False, nobody_listens, "connect", 0),
    ("accept", None, False, no_descriptors, "accept", 0),
    ("services", None, False, no_descriptors_for_a_service, "services", 0),
    ("read", "ECONNRESET", False, host_resets, "read", 0),
    ("read", None, False, receiving_fails("read", driver.reads), "read", 0),
    ("close", "ECONNRESET", False, closed_with_bytes_unread, "close", None),
    ("close", None, False, receiving_fails("close", driver.launches), "close", None),
    ("rootfs", "EFAULT", False, unmapped, "rootfs", None),
    *(
        (stage, code, False, gone(stage, code), stage, SENT[stage])
        for stage in SENT
        for code in ("EPIPE", "ECONNRESET", "ENOTCONN")
    ),
    (None, None, False, gone("arguments", "ENOBUFS"), "arguments", SENT["arguments"]),
]


def row_of(stage, code, source):
    """Return the table's row of this key."""
    number = code and getattr(errno, code)
    (row,) = [r for r in ERRNO_TABLE if (r.stage, r.code, r.source) == (stage, number, source)]
    return row


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled shim."""
    return faults.build(tmp_path_factory.getbasetemp())


@pytest.fixture
def scene(uds, guest_path, writer, tmp_path, shim):
    """What a case can use."""
    return Scene(uds, guest_path, writer, tmp_path, shim)


@pytest.mark.parametrize(
    ("stage", "code", "source", "provoke", "raised_stage", "sent"),
    CASES,
    ids=[f"{stage}-{code}{'-source' * source}" for stage, code, source, *_ in CASES],
)
def test_row_is_provoked(scene, stage, code, source, provoke, raised_stage, sent):
    """The situation of the row raises its class with errno, stage and bytes sent."""
    row = row_of(stage, code, source)
    error = provoke(scene)
    assert error.cls is row.cls
    assert row.text in error.text
    assert error.stage == raised_stage
    assert error.bytes_sent == (sent if sent is not None else error.wanted_bytes)
    wanted = "ETIMEDOUT" if code == "ETIME" else code
    assert wanted is None or errno.errorcode[error.errno] == wanted
    # It is this row's doing, and not another's that happens to give the same class.
    found = errors.find_row(
        row.code if code == "ETIME" else error.errno, Stage(raised_stage), source=source
    )
    assert found is row


def test_every_row_is_provoked():
    """A row that is added needs a case above, and none is there twice."""
    cases = [(stage, code and getattr(errno, code), source) for stage, code, source, *_ in CASES]
    assert sorted(map(repr, cases)) == sorted(
        repr((row.stage and str(row.stage), row.code, row.source)) for row in ERRNO_TABLE
    )


def test_codes_of_the_core_are_those_of_the_table():
    """What csrc returns as a verdict is what errors.py looks for."""
    verdicts = {
        "NV_E_DEADLINE": errno.ETIME,
        "NV_E_CANCELLED": errno.ECANCELED,
        "NV_E_DIED": errno.EOWNERDEAD,
        "NV_E_SHORT": errno.ENODATA,
        "NV_E_PEER": errno.EREMCHG,
        "NV_E_READY": errno.EBADMSG,
    }
    assert {name: getattr(lib, name) for name in verdicts} == verdicts
    assert {name for name in dir(lib) if name.startswith("NV_E_")} == {
        *verdicts,
        "NV_E_TICK",
        *("NV_E_ROOM", "NV_E_CHANGED", "NV_E_STAGE"),  # for their callers, never raised
    }
    assert not {lib.NV_E_TICK, lib.NV_E_STAGE} & {row.code for row in ERRNO_TABLE}
    assert set(verdicts.values()) <= {row.code for row in ERRNO_TABLE}


CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, NitroVsockError)
]


def make(cls):
    """Return an exception of the class with every attribute set."""
    if cls is errors.InvalidArgumentError:
        return cls("timeout", -1, "must be more")
    if cls is errors.PreflightError:
        return cls("rootfs", "not-a-tar", "is no tar", ("a finding",))
    error = cls("broke", errno=errno.EPIPE, stage=Stage.ROOTFS, bytes_sent=12, total=345)
    error.refused = {"cid": 2}
    error.last_output = ("the last words",)
    error.explain("and more")
    for name in ("expected", "actual", "offset"):
        if hasattr(cls, name):
            setattr(error, name, 99)
    return error


@pytest.mark.parametrize("cls", CLASSES)
def test_exception_survives_pickling_with_every_attribute(cls):
    """As through a process pool: class, text, errno and all the rest."""
    error = make(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.errno == error.errno
    assert vars(again) == vars(error)
    assert again.must_terminate_enclave == error.must_terminate_enclave


BUILT_IN = {
    "InvalidArgumentError": "ValueError",
    "UnsupportedError": "OSError",
    "VsockBindError": "OSError",
    "VsockAcceptError": "OSError",
    "VsockConnectError": "ConnectionError",
    "DeadlineError": "TimeoutError",
    "PollNoEventsError": "TimeoutError",
    "ConnectTimeoutError": "TimeoutError",
    "HandshakeTimeoutError": "TimeoutError",
    "StreamTimeoutError": "TimeoutError",
    "VsockReadError": "OSError",
    "VsockWriteError": "OSError",
    "PeerClosedError": "ConnectionError",
    "SourceReadError": "OSError",
    "ArchiveError": "ValueError",
    "EifError": "ValueError",
    "EifReadError": "OSError",
    "ProtocolError": "ValueError",
    "EarlyEndError": "ConnectionError",
    "SessionTimeoutError": "TimeoutError",
    "ProxyError": "OSError",
}


@pytest.mark.parametrize("cls", CLASSES)
def test_exception_is_also_the_fitting_built_in_one(cls):
    """`except TimeoutError` and its like catch ours; those that fit none are none."""
    ours = [base.__name__ for base in cls.__mro__ if base.__name__ in BUILT_IN]
    wanted = {BUILT_IN[name] for name in ours}
    for name in ("OSError", "TimeoutError", "ConnectionError", "ValueError"):
        allowed = wanted | ({"OSError"} if wanted & {"TimeoutError", "ConnectionError"} else set())
        assert issubclass(cls, getattr(builtins, name)) == (name in allowed)


@pytest.mark.parametrize("stage", Stage)
def test_enclave_must_be_terminated_exactly_when_the_guest_has_bytes(stage):
    """Before the first frame it can still be served by another launch."""
    error = NitroVsockError("broke", stage=stage)
    before = ("validate", "bind", "connect", "accept", "handshake", "read")
    assert error.must_terminate_enclave == (stage not in before)


@pytest.mark.parametrize("cls", CLASSES)
def test_exception_is_public_and_documented(cls):
    """It can be imported from the package, and docs/errors.md says what it means."""
    assert getattr(nitro_vsock, cls.__name__) is cls
    assert cls.__name__ in nitro_vsock.__all__
    assert cls.__doc__
    documentation = (PROJECT / "docs" / "errors.md").read_text()
    assert cls.__name__ in re.findall(r"`(\w+)`", documentation)
