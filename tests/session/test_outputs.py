"""Where the guest's output goes: all of it, in order, to every kind of target."""

import codecs
import contextlib
import errno
import io
import logging
import os
import pty
import select
import signal
import socket
import tempfile
import threading
import time
import tty

import pytest
from machine import open_descriptors
from peer import wait_until
from session_guest import is_pattern, stall, until_terminated, write_pattern
from sessions import Lines, is_full

from nitro_vsock import InvalidArgumentError, OutputProxy, ProxyError, SessionTimeouts
from nitro_vsock.session.outputs import MAX_LINE, open_output

MIB = 1 << 20


class PatternReader(threading.Thread):
    """Reads a descriptor to its end, and checks that it gives what `write_pattern` wrote."""

    def __init__(self, fd):
        super().__init__(daemon=True)
        self._file = os.fdopen(fd, "rb")
        self.right = 0
        self.start()

    def run(self):
        """Read."""
        with self._file as file:
            while block := file.read(MIB):
                if not is_pattern(self.right, block):
                    return
                self.right += 1


def target(kind, tmp_path, stack):
    """Return a target, and a function that says how many right MiB it got."""
    if kind in ("path", "file descriptor", "file object"):
        path = tmp_path / "out"

        def right():
            with open(path, "rb") as file:
                count = 0
                while block := file.read(MIB):
                    assert is_pattern(count, block)
                    count += 1
                return count

        if kind == "path":
            return path, right
        file = stack.enter_context(path.open("wb"))
        return (file.fileno() if kind == "file descriptor" else file), right
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        one, other = socket.socketpair()
        reading, writing = one.detach(), other.detach()
    reader = PatternReader(reading)
    stack.callback(os.close, writing)

    def right():
        stack.close()
        reader.join(20)
        return reader.right

    return writing, right


@pytest.mark.parametrize("kind", ["path", "file descriptor", "file object", "pipe", "socket"])
def test_bulk_of_output_is_complete_and_in_order(place, tmp_path, kind):
    """A GiB (less where a test says so), each MiB checked."""
    with contextlib.ExitStack() as stack:
        goal, right = target(kind, tmp_path, stack)
        size = place.bulk
        ended, _ = place.run(
            OutputProxy(goal), guest={"program": lambda guest: write_pattern(guest, size)}
        )
        assert ended.output_complete
        assert right() == size // MIB
    (tmp_path / "out").unlink(missing_ok=True)


def test_output_without_a_proxy_goes_to_the_logger(place, caplog):
    """Where the flag alone asks for it."""
    from sessions import small_writer

    with caplog.at_level(logging.INFO, "nitro_vsock.output"):
        place.run(writer=small_writer(app_output=True), guest={"says": b"one\ntwo %d\n"})
    records = [r for r in caplog.records if r.name == "nitro_vsock.output"]
    assert [record.getMessage() for record in records] == ["one", "two %d"]


def test_logger_gets_a_record_for_each_line(place, caplog):
    """At the level asked for."""
    logger = logging.getLogger("guest")
    with caplog.at_level(logging.DEBUG, "guest"):
        place.run(OutputProxy(logger, level=logging.WARNING), guest={"says": b"a\n\nb"})
    assert [(r.getMessage(), r.levelname) for r in caplog.records if r.name == "guest"] == [
        ("a", "WARNING"),
        ("", "WARNING"),
        ("b", "WARNING"),
    ]


def test_path_is_emptied_or_added_to(place, tmp_path):
    """By `append`."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    place.run(OutputProxy(path, append=True), guest={"says": b" new"})
    assert path.read_bytes() == b"old new"
    place.run(OutputProxy(path), guest={"says": b"newer"})
    assert path.read_bytes() == b"newer"


# -- lines


def cuttings(data):
    """Return a text in pieces of every kind: whole, single bytes, primes, around the limits."""
    yield [data]
    for size in (1, 7, 4096, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, MAX_LINE + 2):
        if len(data) // size < 20_000:
            yield [data[at : at + size] for at in range(0, len(data), size)]


LONG = MAX_LINE * 2 + 5

TEXTS = {
    "plain": (b"one\ntwo\n", ["one", "two"]),
    "last line open": (b"one\ntwo", ["one", "two"]),
    "empty lines": (b"\n\na\n\n", ["", "", "a", ""]),
    "nothing": (b"", []),
    "crlf": (b"one\r\ntwo\r\n\r\nthree\r", ["one", "two", "", "three"]),
    "carriage return within": (b"10%\r20%\r\n", ["10%\r20%"]),
    "not utf-8": (b"\xff\xfe caf\xe9\n", ["\\xff\\xfe caf\\xe9"]),
    "utf-8": ("grün ☃ \U0001f600\n".encode(), ["grün ☃ \U0001f600"]),
    "nul": (b"a\0b\n", ["a\0b"]),
    "as long as can be": (b"x" * MAX_LINE + b"\ny\n", ["x" * MAX_LINE, "y"]),
    "as long as can be, crlf": (b"x" * MAX_LINE + b"\r\ny\n", ["x" * MAX_LINE, "y"]),
    "as long as can be, open": (b"x" * MAX_LINE, ["x" * MAX_LINE]),
    "a byte too long": (b"x" * (MAX_LINE + 1) + b"\n", ["x" * MAX_LINE, "x"]),
    "long": (b"x" * LONG + b"\ny", ["x" * MAX_LINE, "x" * MAX_LINE, "xxxxx", "y"]),
    "carriage return at the cut": (
        b"x" * (MAX_LINE - 1) + b"\ryy\n",
        ["x" * (MAX_LINE - 1) + "\r", "yy"],
    ),
    "character at the cut": (
        b"x" * (MAX_LINE - 1) + "☃yy\n".encode(),
        ["x" * (MAX_LINE - 1), "☃yy"],
    ),
    "bytes of no character at the cut": (
        b"\x80" * (MAX_LINE + 3) + b"\n",
        ["\\x80" * (MAX_LINE - 3), "\\x80" * 6],
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_lines_do_not_depend_on_how_their_bytes_arrive(text):
    """Each cutting of the same bytes gives the same lines."""
    data, expected = TEXTS[text]
    for pieces in cuttings(data):
        lines = Lines()
        output = open_output(lines)
        for piece in pieces:
            assert output.write(memoryview(piece)) == len(piece)
        output.close()
        assert lines == expected, len(pieces[0])


@pytest.mark.parametrize("text", ["crlf", "not utf-8", "long"])
def test_callback_gets_the_lines_of_a_session(place, text):
    """As they come through its socket."""
    data, expected = TEXTS[text]
    lines = Lines()
    place.run(lines.proxy, guest={"says": data})
    assert lines == expected


# -- file objects


def wrapped(kind, path):
    """Open a text file in one of the ways there are."""
    if kind == "open":
        return open(path, "w", encoding="utf-8", newline="")
    if kind == "codecs":
        return codecs.open(str(path), "w", "utf-8")
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
        "w", encoding="utf-8", newline="", dir=path.parent
    )
    os.link(file.name, path)
    return file


@pytest.mark.parametrize("kind", ["open", "codecs", "tempfile"])
@pytest.mark.filterwarnings("ignore:codecs.open:DeprecationWarning")
def test_text_file_gets_text(place, tmp_path, kind):
    """Decoded from UTF-8 across the pieces it comes in; the last character may be cut short."""
    data = "☃".encode() * 200_000 + b"\xff" + "☃".encode()[:2]
    with wrapped(kind, tmp_path / "out") as file:
        place.run(OutputProxy(file), guest={"says": data})
    expected = "☃" * 200_000 + "\\xff\\xe2\\x98"
    assert (tmp_path / "out").read_text(encoding="utf-8") == expected


def test_objects_with_write_get_every_byte_once(place):
    """Buffers, raw files that take a part at a time, and whatever they return."""

    class Raw(io.RawIOBase):
        def __init__(self):
            self.got = bytearray()

        def writable(self):
            return True

        def write(self, data):
            part = bytes(data)[:1000]
            self.got += part
            return len(part)

    class Odd:
        def __init__(self, answer):
            self.got, self.answer = bytearray(), answer

        def write(self, data):
            self.got += data
            return self.answer

    said = os.urandom(100_000)
    buffer = io.BytesIO()
    raw, odd = Raw(), [Odd(answer) for answer in (None, True, 0, -1, "x", 10**9)]
    for file in (buffer, raw, *odd):
        place.run(OutputProxy(file), guest={"says": said})
    assert buffer.getvalue() == said
    for file in (raw, *odd):
        assert bytes(file.got) == said


# -- a target that does not keep up


@pytest.mark.parametrize("kind", ["pipe", "shared pipe", "socket"])
def test_slow_target_holds_the_guest_and_loses_nothing(place, kind):
    """Backpressure; SIGTERM gets through meanwhile; then everything comes."""
    got = bytearray()
    size = 8 * MIB
    held = threading.Event()

    def program(guest):
        writer = threading.Thread(target=write_pattern, args=(guest, size), daemon=True)
        writer.start()
        wait_until(lambda: is_full(guest.output), what="backpressure")
        held.set()
        until_terminated(guest)
        held.signalled = len(got)
        go_on.set()
        writer.join(20)

    go_on = threading.Event()
    if kind == "socket":
        one, other = socket.socketpair()
        reading, writing = one.detach(), other.detach()
    else:
        reading, writing = os.pipe()
    os.set_blocking(writing, kind != "shared pipe")

    def read():
        go_on.wait(20)
        while piece := os.read(reading, MIB):
            got.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with place.session(OutputProxy(writing)) as session:
        os.close(writing)
        guest = place.guest(program=program)
        stopper = threading.Thread(target=lambda: (held.wait(20), session.terminate()))
        stopper.start()
        ended = session.run_sync()
        stopper.join()
    guest.result()
    reader.join(20)
    os.close(reading)
    assert held.signalled == 0
    assert ended.terminated
    assert len(got) == size
    assert all(is_pattern(n, got[n * MIB : (n + 1) * MIB]) for n in range(size // MIB))


def test_pipe_of_the_callers_stays_as_blocking_as_it_was(place):
    """The flag belongs to everybody who shares the description."""
    reading, writing = os.pipe()
    with place.session(OutputProxy(writing)):
        assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)


def test_pipe_that_cannot_be_opened_anew_never_blocks_the_session(place, monkeypatch):
    """A descriptor of another user's pipe: written in pieces that fit."""
    opened = os.open

    def refuse(path, *arguments, **options):
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "no")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    reading, writing = os.pipe()
    with place.running(
        OutputProxy(writing), guest={"says": bytes(MIB), "at": {"running": stall}}
    ) as (session, guest):
        threading.Thread(
            target=lambda: (
                guest.reached["running"].wait(20),
                guest.let_go(),
                wait_until(lambda: len(select.select([reading], [], [], 0)[0])),
                wait_until(lambda: is_full(writing)),
                session.cancel(),
            )
        ).start()
        from nitro_vsock import LaunchCancelledError

        with pytest.raises(LaunchCancelledError):
            session.run_sync()
    assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)


def test_terminal_gets_the_output(place):
    """A slave; and a master, which must not be opened anew: that would be another terminal."""
    for end in (0, 1):
        ends = pty.openpty()
        for fd in ends:
            tty.setraw(fd)
        place.run(OutputProxy(ends[end]), guest={"says": b"hello"})
        assert select.select([ends[1 - end]], [], [], 5)[0], f"end {end}"
        assert os.read(ends[1 - end], 100) == b"hello"
        for fd in ends:
            os.close(fd)


# -- a target that fails


@pytest.fixture(params=["default", "ignored"])
def sigpipe(request):
    """SIGPIPE as a program may have it."""
    action = signal.SIG_DFL if request.param == "default" else signal.SIG_IGN
    old = signal.signal(signal.SIGPIPE, action)
    yield
    signal.signal(signal.SIGPIPE, old)
    assert signal.SIGPIPE not in signal.sigpending()


@pytest.mark.parametrize("kind", ["full path", "full descriptor", "full object", "full text"])
def test_full_disk_is_an_error_that_names_the_target(place, kind):
    """ENOSPC, by every way a file is written."""
    with contextlib.ExitStack() as stack:
        goal = "/dev/full"
        if kind == "full descriptor":
            goal = stack.enter_context(open("/dev/full", "wb", buffering=0)).fileno()
        elif kind == "full object":
            goal = stack.enter_context(open("/dev/full", "wb", buffering=0))
        elif kind == "full text":
            goal = open("/dev/full", "w")  # noqa: SIM115 - its closing fails
            stack.callback(_close, goal)
        error, _ = place.fail(ProxyError, OutputProxy(goal), guest={"says": b"hello\n"})
    assert error.errno == errno.ENOSPC
    name = {"full descriptor": "descriptor"}.get(kind, "/dev/full")
    assert name in str(error)
    assert error.last_output == ("hello",)
    assert error.stage in ("services", "run", "drain")
    assert error.must_terminate_enclave


def _close(file):
    with contextlib.suppress(OSError):
        file.close()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_reader_that_went_away_is_an_error_and_no_signal(place, sigpipe, kind, when):
    """EPIPE, where nobody read from the start and where the reader goes while we wait for it."""
    if kind == "socket":
        one, other = socket.socketpair()
        reading, writing = one.detach(), other.detach()
    else:
        reading, writing = os.pipe()
    closed = threading.Event()

    def program(guest):
        if when == "meanwhile":
            with contextlib.suppress(TimeoutError):
                guest.output.settimeout(0.2)
                guest.output.sendall(bytes(16 * MIB))
            os.close(reading)
            closed.set()
            stall(guest)
        else:
            guest.output.sendall(b"hello")
            stall(guest)

    if when == "before":
        os.close(reading)
    error, _ = place.fail(ProxyError, OutputProxy(writing), guest={"program": program})
    os.close(writing)
    assert error.errno in (errno.EPIPE, errno.ECONNRESET)
    assert f"descriptor {writing}" in str(error)


def test_what_cannot_be_opened_is_refused_at_once(place, tmp_path):
    """Before anything is bound; the error says what and why."""
    os.mkfifo(tmp_path / "fifo")
    for goal, said in (
        (tmp_path / "no" / "out", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "nobody reads this FIFO"),
    ):
        with pytest.raises(ProxyError, match=said) as caught:
            place.session(OutputProxy(goal))
        assert str(goal) in str(caught.value)
    reading, writing = os.pipe()
    for goal in (reading, -1, 12345, None, 1.5, True):
        with pytest.raises(InvalidArgumentError):
            place.session(OutputProxy(goal))
    os.close(reading)
    os.close(writing)


class OopsError(Exception):
    """What a callback of the caller's raises."""


def test_callback_that_raises_ends_the_session_with_that(place):
    """It is not called again, and nothing is left."""
    told = []

    def fall(line):
        told.append(line)
        raise OopsError(line)

    before = open_descriptors()
    error, _ = place.fail(OopsError, OutputProxy(fall), guest={"says": b"one\ntwo\nthr"})
    assert str(error) == "one"
    del error
    assert told == ["one"]
    assert open_descriptors() == before


def test_object_that_raises_ends_the_session_with_that(place):
    """Also where it says so only when it is flushed."""

    class Sink:
        def write(self, data):
            pass

        def flush(self):
            raise OopsError("flush")

    place.fail(OopsError, OutputProxy(Sink()), guest={"says": b"one\n"})


def test_output_that_comes_with_its_end_is_delivered(place):
    """A guest that says something, closes and reports in one breath, a thousand times."""
    lines = Lines()
    began = time.monotonic()
    rounds = 0
    while rounds < 300 and time.monotonic() - began < 5:
        place.run(lines.proxy, guest={"says": b"x" * 1000}, timeouts=SessionTimeouts())
        rounds += 1
    assert lines == ["x" * 1000] * rounds
