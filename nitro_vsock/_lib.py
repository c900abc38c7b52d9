"""Owns: every call into the compiled core: types, EINTR and tick retries, return code -> exception.

The only importer of the compiled module. Must not know: frames, addresses, who owns a descriptor.

Buffers are borrowed by `with ffi.from_buffer`: what an exception's frames still borrowed would
crash the garbage collector (CPython cannot clear a memoryview in a cycle that has an export).
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nitro_vsock import errors
from nitro_vsock._core import ffi, lib
from nitro_vsock.deadline import Deadline
from nitro_vsock.errors import Stage
from nitro_vsock.progress import Meter

if TYPE_CHECKING:
    from typing_extensions import Self

TICK_NS: Final = 50_000_000
"""C returns at least this often, so that signal handlers run although the signal reached another
thread, or this one between two system calls."""

FOREVER_NS: Final = (1 << 63) - 1
"""A deadline or tick that never comes."""

FLOW_BYTES: Final = 1 << 16
"""Buffer of a flow; what fills it at once is spliced from then on."""

STAGE_BYTES: Final = 1 << 20
"""Staging buffer of the read strategy; memory is touched only where it is used."""

SENDFILE: Final = int(lib.NV_SENDFILE)
SPLICE: Final = int(lib.NV_SPLICE)
MMAP: Final = int(lib.NV_MMAP)
READ: Final = int(lib.NV_READ)

CHANGED: Final = int(lib.NV_E_CHANGED)
SHORT: Final = int(lib.NV_E_SHORT)
"""`errno` of the OSError that says: not any more what was seen in a directory, or shorter."""

_SCAN_ROOM: Final = 4096
_DENTS_BYTES: Final = 1 << 16

_GUARD_VERDICTS: Final = (lib.NV_E_DEADLINE, lib.NV_E_CANCELLED, lib.NV_E_DIED)


VERDICTS: Final = frozenset({*_GUARD_VERDICTS, lib.NV_E_TICK, errno.EINTR})
"""Why waiting ends although nothing failed."""


@dataclass(frozen=True)
class PeerInfo:
    """Who the kernel says is at the other end; what does not apply to the family is 0."""

    family: int
    cid: int
    port: int
    pid: int
    uid: int
    gid: int


class Guard:
    """What ends a call early: the deadline, a cancel descriptor, a watched descriptor."""

    def __init__(
        self,
        deadline: Deadline,
        cancel_fd: int = -1,
        watch_fd: int = -1,
        *,
        on_tick: Callable[[], object] | None = None,
    ) -> None:
        """`on_tick` is called at every tick; what it raises ends the call."""
        self.wait = ffi.new("struct nv_wait *")
        self.wait.deadline_ns = deadline.ns
        self.wait.cancel_fd = cancel_fd
        self.wait.watch_fd = watch_fd
        # The first tick is due at once: it shows what was cancelled or dead before the first call.
        self.wait.tick_ns = 0
        self._on_tick = on_tick

    def next_tick(self) -> None:
        """Allow the next call into C another tick."""
        if self._on_tick is not None:
            self._on_tick()
        self.wait.tick_ns = time.monotonic_ns() + TICK_NS


def _drive(call: Callable[[], int], guard: Guard, on_tick: Callable[[], None] | None = None) -> int:
    """Repeat a call over signals and ticks; return 0 or the positive errno value it ends with.

    Python runs signal handlers between two rounds, so Ctrl-C is raised from here.
    """
    while True:
        code = -call()
        if code == lib.NV_E_TICK:
            guard.next_tick()
            if on_tick is not None:
                on_tick()
        elif code != errno.EINTR:
            return code


def listen_vsock(cid: int, port: int, backlog: int) -> int:
    """Return a listening descriptor; raise what ERRNO_TABLE says for stage bind."""
    return _bound(lambda: lib.nv_listen_vsock(cid, port, backlog))


def listen_unix(path: bytes, backlog: int) -> int:
    """Return a listening descriptor; raise what ERRNO_TABLE says for stage bind."""
    return _bound(lambda: lib.nv_listen_unix(path, len(path), backlog))


def _bound(call: Callable[[], int]) -> int:
    while True:
        code = call()
        if code >= 0:
            return code
        if code != -errno.EINTR:
            raise errors.from_errno(-code, Stage.BIND)


def connect_vsock(cid: int, port: int, guard: Guard) -> int:
    """Return a connected descriptor; raise what ERRNO_TABLE says for stage connect."""
    return _connect(lambda out: lib.nv_connect_vsock(cid, port, guard.wait, out), guard)


def connect_unix(path: bytes, guard: Guard) -> int:
    """Return a connected descriptor; raise what ERRNO_TABLE says for stage connect."""
    return _connect(lambda out: lib.nv_connect_unix(path, len(path), guard.wait, out), guard)


def _connect(call: Callable[[Any], int], guard: Guard) -> int:
    out = ffi.new("int32_t *", -1)
    try:
        code = _drive(lambda: call(out), guard)
        if code:
            raise errors.from_errno(code, Stage.CONNECT)
        fd, out[0] = int(out[0]), -1
        return fd
    finally:
        if out[0] >= 0:
            os.close(out[0])


class Gate:
    """Admits the one peer that counts; owns every connection that is not admitted.

    Use as a context manager: leaving it closes what is left.
    """

    def __init__(
        self, listen_fd: int, want_cid: int | None, opening: bytes, *, strict: bool
    ) -> None:
        self._gate = ffi.new("struct nv_gate *")
        self._opening = ffi.new("uint8_t[]", opening)
        self._gate.opening = self._opening
        self._gate.opening_length = len(opening)
        self._gate.listen_fd = listen_fd
        self._gate.want_cid = lib.NV_CID_ANY if want_cid is None else want_cid
        self._gate.strict = strict
        self._gate.ready = opening[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.nv_gate_close(self._gate)

    def admit(self, guard: Guard) -> tuple[int, int]:
        """Wait for the peer; return its descriptor and how much of the opening its socket took.

        The descriptor is the caller's from then on.

        Raises what ERRNO_TABLE says: for stage handshake where a connected peer keeps silent or
        says something else, for stage accept otherwise.
        """
        gate = self._gate
        code = _drive(lambda: lib.nv_gate_admit(gate, guard.wait), guard)
        if code:
            silent = gate.npending and code in _GUARD_VERDICTS
            raise errors.from_errno(
                code, Stage.HANDSHAKE if silent or gate.talked else Stage.ACCEPT
            )
        gate.admitted = 0
        return int(gate.admitted_fd), int(gate.opening_sent)

    @property
    def peer(self) -> PeerInfo:
        """The admitted peer, or the one a strict gate refused."""
        peer = self._gate.peer
        return PeerInfo(peer.family, peer.cid, peer.port, peer.pid, peer.uid, peer.gid)

    @property
    def refused(self) -> dict[str, int]:
        """Strangers by reason."""
        gate = self._gate
        return {
            "cid": gate.refused_cid,
            "ready": gate.refused_ready,
            "closed": gate.refused_closed,
            "crowded": gate.refused_crowded,
        }


def accept(listen_fd: int) -> tuple[int, PeerInfo] | None:
    """Accept a connection that waits already; None where none does.

    The descriptor is the caller's, and does not block. Raises what ERRNO_TABLE says for stage
    services.
    """
    peer = ffi.new("struct nv_peer *")
    out = ffi.new("int32_t *", -1)
    while True:
        code = -lib.nv_accept(listen_fd, peer, out)
        if code == 0:
            return int(out[0]), PeerInfo(
                peer.family, peer.cid, peer.port, peer.pid, peer.uid, peer.gid
            )
        if out[0] >= 0:
            os.close(out[0])
        if code == errno.EAGAIN:
            return None
        if code != errno.EINTR:
            raise errors.from_errno(code, Stage.SERVICES)


def handshake(fd: int, ready: int, guard: Guard) -> None:
    """Exchange the ready byte as the connecting side."""
    sent = ffi.new("uint64_t *")
    code = _drive(lambda: lib.nv_handshake(fd, ready, guard.wait, sent), guard)
    if code:
        raise errors.from_errno(code, Stage.HANDSHAKE)


def enlarge_sndbuf(fd: int, want: int) -> int:
    """Enlarge the send buffer towards `want` bytes; return what the kernel reports afterwards.

    A kernel that refuses is no error: the transfer only gets slower.
    """
    got = ffi.new("int32_t *")
    return int(got[0]) if lib.nv_enlarge_sndbuf(fd, want, got) == 0 else 0


def block_briefly(fd: int, usec: int) -> None:
    """Let sends wait in the kernel for `usec` at most; a kernel that refuses is no error."""
    lib.nv_block_briefly(fd, usec)


def send(fd: int, data: bytes | memoryview, guard: Guard, meter: Meter) -> None:
    """Send all of a buffer; the meter is exact also after an error."""
    with ffi.from_buffer("uint8_t[]", data) as view:
        length = len(view)
        _transfer(lambda xfer: lib.nv_send(fd, view, length, guard.wait, xfer), guard, meter)


def send_from(
    fd: int,
    source_fd: int,
    offset: int,
    length: int,
    strategy: int,
    guard: Guard,
    meter: Meter,
    *,
    seekable: bool,
) -> int:
    """Send `length` bytes of a descriptor; return the strategy in use at the end.

    The meter is exact also after an error.
    """
    source = ffi.new("struct nv_source *")
    source.fd = source_fd
    source.strategy = strategy
    source.seekable = seekable
    source.offset = offset
    source.length = length

    with ExitStack() as stack:

        def call(xfer: Any) -> int:
            code = int(lib.nv_send_from(fd, source, guard.wait, xfer))
            if code != -lib.NV_E_STAGE:
                return code
            try:
                stage = stack.enter_context(mmap.mmap(-1, STAGE_BYTES))
            except OSError as error:
                return -(error.errno or errno.ENOMEM)
            source.stage = stack.enter_context(ffi.from_buffer("uint8_t[]", stage))
            source.stage_size = STAGE_BYTES
            return int(lib.nv_send_from(fd, source, guard.wait, xfer))

        _transfer(call, guard, meter)
    return int(source.strategy)


def _failed(code: int, meter: Meter, *, source: bool = False) -> errors.NitroVsockError:
    return errors.from_errno(
        code, meter.stage, source=source, bytes_sent=meter.done, total=meter.total
    )


def _transfer(call: Callable[[Any], int], guard: Guard, meter: Meter) -> None:
    """Drive a call that keeps its progress in a struct nv_xfer, and keep the meter in step."""
    xfer = ffi.new("struct nv_xfer *")
    base, base_calls = meter.done, meter.calls

    def count() -> None:
        meter.done = base + xfer.done
        meter.calls = base_calls + xfer.calls

    def on_tick() -> None:
        count()
        meter.tick()

    try:
        code = _drive(lambda: call(xfer), guard, on_tick)
    finally:
        count()
    if code:
        raise _failed(code, meter, source=bool(xfer.from_source))


def receive(fd: int, view: memoryview, guard: Guard, meter: Meter) -> int:
    """Receive with one recv into a writable buffer; return the count, 0 at end of stream."""
    got = ffi.new("uint64_t *")
    with ffi.from_buffer("uint8_t[]", view, require_writable=True) as buffer:
        length = len(buffer)
        code = _drive(lambda: lib.nv_recv(fd, buffer, length, guard.wait, got), guard, meter.tick)
    if code:
        raise _failed(code, meter)
    return int(got[0])


class FlowState(IntEnum):
    """How a flow stands; see `enum nv_flow_state`."""

    OPEN = lib.NV_FLOW_OPEN
    ENDED = lib.NV_FLOW_ENDED
    FROM_FAILED = lib.NV_FLOW_FROM_FAILED
    TO_FAILED = lib.NV_FLOW_TO_FAILED


class Flow:
    """Bytes on their way from one socket to another; see `struct nv_flow`."""

    __slots__ = ("_buffer", "struct")

    def __init__(
        self, source: int, sink: int, pipe: tuple[int, int] | None, record_most: int = 0
    ) -> None:
        """Borrow all descriptors.

        Args:
            source: where bytes come from.
            sink: where they go.
            pipe: its two ends, where splicing may pay.
            record_most: bytes of the largest record, where whole records are to be sent at once.
        """
        self.struct = flow = ffi.new("struct nv_flow *")
        self._buffer = ffi.new("uint8_t[]", FLOW_BYTES + 2 * record_most)
        setattr(flow, "from", source)
        flow.to, flow.buf, flow.size = sink, self._buffer, len(self._buffer)
        flow.record_most = record_most
        flow.pipe_out, flow.pipe_in = pipe or (-1, -1)

    @property
    def state(self) -> FlowState:
        """How it stands."""
        return FlowState(self.struct.state)

    @property
    def error(self) -> int:
        """The errno value of a failed one, positive."""
        return int(self.struct.error)

    @property
    def moved(self) -> int:
        """Bytes delivered."""
        return int(self.struct.moved)


class Pump:
    """Waits for many descriptors while flows flow beside it. Owns none of the descriptors."""

    def __init__(self) -> None:
        self._flows: list[Flow] = []
        self._pointers = ffi.new("struct nv_flow *[]", 0)
        self._fds = ffi.new("struct pollfd[]", lib.NV_GUARDS)
        self._watches = 0

    def prepare(self, watches: Sequence[tuple[int, int]], flows: Sequence[Flow]) -> None:
        """Wait for these (descriptor, events) and let these flows flow from now on."""
        self._flows = list(flows)
        self._pointers = ffi.new("struct nv_flow *[]", [flow.struct for flow in flows])
        self._watches = len(watches)
        self._fds = ffi.new("struct pollfd[]", lib.NV_GUARDS + len(watches) + len(flows))
        for index, (fd, events) in enumerate(watches, lib.NV_GUARDS):
            self._fds[index].fd, self._fds[index].events = fd, events

    def wait(self, guard: Guard) -> tuple[int, list[tuple[int, int]]]:
        """Wait once. Return 0 or the positive errno value of the guard's verdict, and events.

        Events are (index of a watch, `revents`). EINTR comes back like a verdict, so that the
        caller sees what signal handlers did.
        """
        code = -lib.nv_relay(self._pointers, len(self._flows), self._fds, self._watches, guard.wait)
        if code:
            return code, []
        first = lib.NV_GUARDS
        return 0, [
            (index, revents)
            for index in range(self._watches)
            if (revents := int(self._fds[first + index].revents))
        ]


class Kind(IntEnum):
    """What becomes of a name in a directory; see `enum nv_kind`."""

    DROPPED = lib.NV_DROPPED
    FILE = lib.NV_FILE
    LARGE = lib.NV_LARGE
    DIRECTORY = lib.NV_DIRECTORY
    SYMLINK = lib.NV_SYMLINK
    SHARED = lib.NV_SHARED
    OTHER = lib.NV_OTHER


class Stop(IntEnum):
    """Why gathering came back; see `enum nv_stop`. TICK: for the caller to look around."""

    END = lib.NV_STOP_END
    FULL = lib.NV_STOP_FULL
    OPENED = lib.NV_STOP_OPENED
    OTHER = lib.NV_STOP_OTHER
    TICK = -lib.NV_E_TICK


class Seen(NamedTuple):
    """A name in a directory and what `fstatat` said of it."""

    kind: int
    name: bytes
    mode: int
    size: int
    dev: int
    ino: int
    rdev: int


class Listing:
    """What is in a directory, sorted as in an archive.

    Attributes:
        count: entries.
        look: indices of the entries the caller must decide about.
        length: bytes of the archive the other entries make.
    """

    __slots__ = ("count", "entries", "length", "look", "names")

    def __init__(self, scan: Any) -> None:
        self.count = int(scan.count)
        self.entries = ffi.new("struct nv_entry[]", self.count)
        ffi.memmove(self.entries, scan.entries, ffi.sizeof(self.entries))
        self.names = ffi.new("char[]", scan.names_used)
        ffi.memmove(self.names, scan.names, scan.names_used)
        self.look: list[int] = ffi.unpack(scan.look, scan.looks)
        self.length = int(scan.length)

    def seen(self, index: int) -> Seen:
        """Return an entry."""
        entry = self.entries[index]
        name = ffi.unpack(self.names + entry.name, entry.name_length)
        return Seen(entry.kind, name, entry.mode, entry.size, entry.dev, entry.ino, entry.rdev)

    def decide(self, index: int, kind: Kind) -> None:
        """Say what becomes of an entry."""
        self.entries[index].kind = kind

    def open(self, dir_fd: int, index: int) -> int:
        """Open a directory or regular file that is still what was seen; the caller closes it.

        Raises:
            OSError: CHANGED, SHORT, or what the system says.
        """
        name = self.names + self.entries[index].name
        return _call(lambda: lib.nv_open_entry(dir_fd, name, self.entries + index))

    def check(self, dir_fd: int, index: int) -> None:
        """Check that a name in this directory is still what was seen.

        Raises:
            OSError: CHANGED, SHORT, or what the system says.
        """
        name = self.names + self.entries[index].name
        _call(lambda: lib.nv_unchanged(dir_fd, name, self.entries + index))

    def check_open(self, fd: int, index: int) -> None:
        """Check that an open file is still what was seen. Raises as `check` does."""
        _call(lambda: lib.nv_unchanged(fd, b"", self.entries + index))


def _call(call: Callable[[], int]) -> int:
    while True:
        code = call()
        if code >= 0:
            return code
        if code != -errno.EINTR:
            raise OSError(-code, os.strerror(-code))


class Scanner:
    """Looks at directories, one after the other, with memory that is used again."""

    def __init__(self, large: int) -> None:
        """`large`: bytes above which a file is of kind LARGE."""
        self._scan = ffi.new("struct nv_scan *")
        self._scan.large = large
        self._scan.open_all = os.geteuid() != 0
        self._dents = ffi.new("uint64_t[]", _DENTS_BYTES // 8)
        self._scan.dents = ffi.cast("uint8_t *", self._dents)
        self._scan.dents_room = _DENTS_BYTES
        self._give_room(_SCAN_ROOM)

    def _give_room(self, room: int) -> None:
        scan = self._scan
        entries = ffi.new("struct nv_entry[]", room)
        look = ffi.new("uint32_t[]", room)
        names = ffi.new("char[]", room * 64)
        if scan.count:
            ffi.memmove(entries, scan.entries, scan.count * ffi.sizeof("struct nv_entry"))
            ffi.memmove(names, scan.names, scan.names_used)
        scan.entries, scan.look, scan.names = self._memory = entries, look, names
        scan.room, scan.names_room = room, room * 64

    def scan(self, fd: int, prefix_length: int, *, look_at_all: bool = False) -> Listing:
        """Look at an open directory that has not been read yet.

        Args:
            fd: of the directory.
            prefix_length: bytes of a full name before the names in this directory.
            look_at_all: put every entry into `look`.

        Raises:
            OSError: `filename` is the name it is about, None for the directory itself.
        """
        scan = self._scan
        scan.fd, scan.prefix_length, scan.look_at_all = fd, prefix_length, look_at_all
        scan.count = scan.looks = scan.names_used = scan.length = 0
        scan.dents_pos = scan.dents_end = 0
        while True:
            scan.culprit = ffi.NULL
            scan.tick_ns = time.monotonic_ns() + TICK_NS
            code = -lib.nv_scan(scan)
            if code == 0:
                return Listing(scan)
            if code == lib.NV_E_ROOM:
                self._give_room(2 * scan.room)
            elif code not in (errno.EINTR, lib.NV_E_TICK):
                name = ffi.string(scan.culprit) if scan.culprit else None
                raise OSError(code, os.strerror(code), name)


class Gatherer:
    """Memory that members are gathered in.

    Attributes:
        memory: all of it.
        used: bytes from its beginning that are members.
    """

    def __init__(self, templates: bytes, size: int) -> None:
        """`templates`: header blocks in the order of `enum nv_template`."""
        self._templates = ffi.new("uint8_t[]", templates)
        self._stage = ffi.new("uint8_t[]", size)
        self.memory = memoryview(ffi.buffer(self._stage))
        self.used = 0

    def gather(self, gathering: Gathering) -> Stop:
        """Put more members of a tree into memory.

        Raises:
            OSError: about the entry `gathering.next`: CHANGED, SHORT, or what the system says.
        """
        g = gathering.state
        g.templates, g.stage, g.stage_size = self._templates, self._stage, len(self._stage)
        g.used = self.used
        g.tick_ns = time.monotonic_ns() + TICK_NS
        code = lib.nv_gather(g)
        self.used = g.used
        if code == -errno.EINTR:
            return Stop.TICK
        if code < 0 and code != Stop.TICK:
            raise OSError(-code, os.strerror(-code))
        return Stop(code)


class Gathering:
    """A tree that is being gathered, in whatever memory."""

    __slots__ = ("_kept", "state")

    def __init__(
        self, fd: int, listings: Sequence[Listing], prefix: bytes, depth: int, longest: int
    ) -> None:
        """Begin with the first directory.

        Args:
            fd: of it; ours from now on.
            listings: of all directories, in the order in which they are entered.
            prefix: what precedes the names in the first.
            depth: how many are open at once, at most.
            longest: bytes of the longest name of a directory, with prefix and slash.
        """
        dirs = ffi.new("struct nv_dir[]", len(listings))
        for directory, listing in zip(dirs, listings, strict=True):
            directory.entries, directory.names = listing.entries, listing.names
            directory.count = listing.count
        frames = ffi.new("struct nv_frame[]", depth)
        frames[0].fd, frames[0].prefix_length = fd, len(prefix)
        before = ffi.new("char[]", longest)
        ffi.memmove(before, prefix, len(prefix))
        self.state = g = ffi.new("struct nv_gather *")
        g.fd, g.dirs, g.entered, g.frames, g.depth, g.prefix = -1, dirs, 1, frames, 1, before
        self._kept = dirs, frames, before, listings

    def _top(self) -> Any:
        return self.state.frames[self.state.depth - 1]

    @property
    def fd(self) -> int:
        """The descriptor of the directory it is in."""
        return int(self._top().fd)

    @property
    def directory(self) -> int:
        """Index of the directory it is in."""
        return int(self._top().dir)

    @property
    def prefix(self) -> bytes:
        """What precedes the names in the directory it is in."""
        return bytes(ffi.buffer(self.state.prefix, self._top().prefix_length))

    @property
    def next(self) -> int:
        """Index of the entry that comes next in the directory it is in."""
        return int(self._top().next)

    def skip(self) -> None:
        """Go past the next entry: the caller has put it into memory."""
        self._top().next += 1

    @property
    def opened(self) -> int:
        """The descriptor opened for the caller by the last call."""
        return int(self.state.fd)

    def close(self) -> None:
        """Close the directories that are open; any number of times."""
        while self.state.depth:
            fd = self.fd
            self.state.depth -= 1
            os.close(fd)


class TarRun:
    """Runs over the members of a tar that have nothing unusual; the rest is left to the caller.

    Attributes:
        at: the first header that was left.
    """

    def __init__(
        self, fd: int, size: int, prefix: bytes, skip: bytes, templates: bytes, *, room: int
    ) -> None:
        """Nothing passes before `let_pass`.

        Args:
            fd: of the archive; borrowed.
            size: of the archive.
            prefix: before every new name.
            skip: what the names must begin with, and lose; may be empty.
            templates: header blocks in the order of `enum nv_template`.
            room: bytes that are read at once.
        """
        self._tar = tar = ffi.new("struct nv_tar *")
        self._window = ffi.new("uint8_t[]", room)
        self._filter = ffi.new("uint8_t[]", lib.NV_TAR_FILTER_BITS // 8)
        self._kept = [ffi.new("char[]", text) for text in (prefix, skip)]
        self._templates = ffi.new("uint8_t[]", templates)
        self._passing = b""
        tar.fd, tar.size, tar.room = fd, size, room
        tar.window, tar.filter, tar.templates = self._window, self._filter, self._templates
        tar.prefix, tar.skip = self._kept
        tar.prefix_length, tar.skip_length = len(prefix), len(skip)
        self._memory = memoryview(ffi.buffer(self._window))
        self.at = 0

    def note(self, name: bytes) -> None:
        """Leave a name to the caller from now on, and what lies below it; and others by chance."""
        lib.nv_tar_note(self._filter, name, len(name))

    def let_pass(self, top: bytes) -> None:
        """Let names pass whose first part is this, until another is given."""
        if self._passing != top:
            self._passing = top
            self._tar.top = self._top = ffi.new("char[]", top)
            self._tar.top_length = len(top)

    def measure(self, at: int) -> bool:
        """Run over members from a header on; return whether there was one.

        Raises:
            OSError: the archive cannot be read.
        """
        self._tar.renames = 0
        return self._run(at)

    def rename(self, at: int) -> memoryview | None:
        """Do the same and return what is to stand for the file's bytes from there on, headers anew.

        It ends with the last member, or where the memory does; it is good until the next call.

        Raises:
            OSError: the archive cannot be read.
        """
        self._tar.renames = 1
        if not self._run(at):
            return None
        tar = self._tar
        return self._memory[at - tar.window_at : min(self.at - tar.window_at, tar.filled)]

    def _run(self, at: int) -> bool:
        tar = self._tar
        tar.at = at
        code = errno.EINTR
        while code and tar.at == at:
            tar.tick_ns = time.monotonic_ns() + TICK_NS
            code = -lib.nv_tar_run(tar)
            if code not in (0, errno.EINTR, lib.NV_E_TICK):
                raise OSError(code, os.strerror(code))
        self.at = int(tar.at)
        return self.at > at

    @property
    def last(self) -> bytes:
        """The name of the member that was run over last, as it stood in its header."""
        raw: bytes = ffi.unpack(self._tar.last, len(self._tar.last))
        return raw.partition(b"\0")[0]

    def read(self, at: int, size: int) -> bytes | None:
        """Return bytes of the archive that are in memory, unless not all of them are."""
        tar = self._tar
        index = at - tar.window_at
        if index >= 0 and index + size <= tar.filled:
            return bytes(self._memory[index : index + size])
        return None
