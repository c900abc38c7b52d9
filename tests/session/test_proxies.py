"""The network, proxies of one's own, strangers: what there is in a session besides output."""

import contextlib
import errno
import os
import socket
import struct
import threading

import driver
import faults
import pytest
from peer import wait_until
from session_guest import die, stall
from sessions import CID, Enclave, is_full, small_writer

from nitro_vsock import (
    AppOutput,
    EnclaveSession,
    Guest,
    InvalidArgumentError,
    NetProxy,
    NitroVsockError,
    OutputProxy,
    ProxyError,
    VsockPortOffset,
)
from nitro_vsock.session.services import network
from nitro_vsock.transport.loop import READABLE

MIB = 1 << 20


@contextlib.contextmanager
def backend_pair():
    """Yield our end for a NetProxy, and the end of a network backend."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    with ours, theirs:
        yield ours, theirs


# -- the guest's largest frame


@pytest.mark.parametrize("size", [82, 1514, 65520 + 14, 65549])
def test_largest_frame_within_bounds_is_taken(place, size):
    """And its four bytes are not passed on."""
    with backend_pair() as (ours, theirs):
        guest = {
            "header": struct.pack(">I", size),
            "program": lambda g: g.net.sendall(frame(b"data")),
        }
        place.run(NetProxy(ours), guest=guest)
        ours.close()
        assert theirs.recv(8, socket.MSG_WAITALL) == frame(b"data")


@pytest.mark.parametrize("mtu", [68, 255, 1500, 4096, 9000, 65520, 65535])
def test_mtu_in_the_guests_own_byte_order_is_taken_without_being_asked_for(place, mtu):
    """As guests before libkrun 1.18 say it; the relay takes frames of MTU + 14 bytes then."""
    with backend_pair() as (ours, theirs):
        largest = frame(b"x" * (mtu + 14))
        guest = {"header": struct.pack("=I", mtu), "program": lambda g: g.net.sendall(largest)}
        with place.running(NetProxy(ours), guest=guest) as (session, _):
            ours.close()
            got = []
            reader = threading.Thread(
                target=lambda: got.append(theirs.recv(len(largest), socket.MSG_WAITALL))
            )
            reader.start()
            session.run_sync()
            theirs.shutdown(socket.SHUT_RD)
            reader.join()
        assert got == [largest]


@pytest.mark.parametrize(
    ("guest", "frame_bytes"), [(Guest.KRUN_1_18, 65536), (Guest.MSB_KRUN, 256 + 14)]
)
def test_mtu_256_which_is_ambiguous_follows_the_guest(guest, frame_bytes):
    """The one number that both byte orders allow."""
    assert network._frame_bytes(struct.pack("=I", 256), guest) == frame_bytes


@pytest.mark.parametrize("size", [0, 1, 81, 65550, 0x01010101, 0xFFFFFFFF])
def test_largest_frame_out_of_bounds_is_an_error(place, size):
    """It would be another protocol, or an attack; the error has both numbers."""
    with backend_pair() as (ours, theirs):
        guest = {"header": struct.pack(">I", size), "at": {"mtu": stall}}
        error, _ = place.fail(ProxyError, NetProxy(ours), guest=guest)
        ours.close()
        assert theirs.recv(100) == b""
    assert error.errno == errno.EBADMSG
    assert str(size) in str(error)
    assert "82 to 65549" in str(error)
    assert error.must_terminate_enclave


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\0", b"\0\0\xff"])
def test_header_cut_short_is_an_error(place, said):
    """A guest that closes its network before it has said its MTU."""
    with backend_pair() as (ours, _):
        guest = {"header": said, "at": {"mtu": lambda g: (g.net.close(), stall(g))}}
        error, _ = place.fail(ProxyError, NetProxy(ours), guest=guest)
    assert "before it said its MTU" in str(error)


def test_header_in_single_bytes_is_put_together(place):
    """Each comes by itself."""

    def dribble(guest):
        for byte in struct.pack(">I", 1514):
            guest.net.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                guest.net.settimeout(0.02)
                guest.net.recv(1)
        guest.net.settimeout(20)
        guest.net.sendall(frame(b"data"))

    with backend_pair() as (ours, theirs):
        place.run(NetProxy(ours), guest={"header": b"", "program": dribble})
        assert theirs.recv(8, socket.MSG_WAITALL) == frame(b"data")


# -- the bytes


def frame(data):
    """Return an Ethernet frame as it is on the stream."""
    return struct.pack(">I", len(data)) + data


def swap(one, other, size, seed):
    """Send about `size` bytes of frames each way at once; return whether both ends got them."""
    body = bytes((seed + n) % 251 for n in range(65_521))  # no power of two divides it
    streams = {mark: frame(mark + body) * (size // len(body)) for mark in (b"1", b"2")}
    right = []

    def receive(sock, mark):
        expected, at = memoryview(streams[mark]), 0
        while at < len(expected):
            piece = sock.recv(min(MIB, len(expected) - at))
            if not piece or piece != expected[at : at + len(piece)]:
                return
            at += len(piece)
        right.append(mark)

    threads = [
        threading.Thread(target=one.sendall, args=(streams[b"1"],)),
        threading.Thread(target=other.sendall, args=(streams[b"2"],)),
        threading.Thread(target=receive, args=(other, b"1")),
        threading.Thread(target=receive, args=(one, b"2")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return sorted(right) == [b"1", b"2"]


@pytest.mark.parametrize("kind", ["descriptor", "socket", "path"])
def test_bytes_pass_both_ways_unchanged(place, tmp_path, kind):
    """64 MiB each way at once; by an inherited descriptor, a socket, a path."""
    results = []
    size = min(64 * MIB, place.bulk // 16)

    def program(guest):
        results.append(swap(guest.net, theirs, size, 7))

    with contextlib.ExitStack() as stack:
        if kind == "path":
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / "b"))
            listener.listen()
            proxy = NetProxy(tmp_path / "b")
        else:
            ours, theirs = stack.enter_context(backend_pair())
            proxy = NetProxy(ours.fileno() if kind == "descriptor" else ours)
        with place.session(proxy) as session:
            if kind == "path":
                theirs = stack.enter_context(listener.accept()[0])
            guest = place.guest(program=program)
            assert session.run_sync().exit_code == 0
        guest.result()
    assert results == [True]


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("default", [None, 5.0])
def test_inherited_descriptor_is_given_back_as_it_came(place, blocking, default):
    """Its blocking mode, which others share; also where sockets have a default timeout."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.set_blocking(ours.fileno(), blocking)
        socket.setdefaulttimeout(default)
        try:
            place.run(NetProxy(ours.fileno()), guest={})
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(ours.fileno()) == blocking
        ours.settimeout(20)
        theirs.sendall(b"still open")
        assert ours.recv(100) == b"still open"


def test_default_timeout_of_sockets_makes_nothing_wait(place):
    """socket.setdefaulttimeout of the embedding program is not for the session's sockets."""
    one, other = socket.socketpair()
    socket.setdefaulttimeout(30.0)
    try:
        with one, other:

            def program(guest):
                guest.output.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        guest.output.send(bytes(1 << 20))
                threads[0].start()
                guest.wait_for_signal()
                read.start()

            def drain():
                with contextlib.suppress(OSError):
                    while other.recv(MIB):
                        pass

            read = threading.Thread(target=drain)
            with place.session(OutputProxy(one.fileno())) as session:
                threads = [threading.Thread(target=session.terminate)]
                guest = place.guest(program=program)
                assert session.run_sync().terminated
            guest.result()
            one.close()
            other.shutdown(socket.SHUT_RDWR)
            read.join(20)
    finally:
        socket.setdefaulttimeout(None)


def test_backend_that_dies_ends_the_session(place):
    """The guest has no network any more: the error says so."""
    with backend_pair() as (ours, theirs):

        def program(guest):
            theirs.close()
            stall(guest)

        error, _ = place.fail(ProxyError, NetProxy(ours), guest={"program": program})
    assert "network backend" in str(error)
    assert error.stage in ("services", "run")  # the guest may be faster than the session
    assert error.must_terminate_enclave


def test_backend_may_die_once_the_program_has_ended(place):
    """The exit status counts, and what output is still to come."""
    lines = []
    with backend_pair() as (ours, theirs):

        def late(guest):
            wait_until(lambda: session.stage == "drain", what="the status")
            theirs.close()
            guest.code.settimeout(0.3)
            with contextlib.suppress(TimeoutError):  # the loop has seen it meanwhile
                guest.code.recv(4, socket.MSG_PEEK)
            guest.code.settimeout(20)
            guest.output.sendall(b"late\n")
            guest.output.close()

        with place.session(NetProxy(ours), OutputProxy(lines.append)) as session:
            guest = place.guest(keeps=("output", "net"), at={"status": late}, status=768)
            ended = session.run_sync()
        guest.result()
    assert (ended.exit_code, ended.output_complete, lines) == (3, True, ["late"])


@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_guest_that_closes_its_network_is_no_error(place, how):
    """The program goes on; the backend sees an end of file, after every byte."""
    with backend_pair() as (ours, theirs):

        def program(guest):
            guest.net.sendall(frame(b"last"))
            if how == "close":
                guest.net.close()
            else:
                guest.net.shutdown(socket.SHUT_WR)
            got.append(theirs.recv(100, socket.MSG_WAITALL))

        got = []
        ended, _ = place.run(NetProxy(ours), guest={"program": program})
    assert ended.exit_code == 0
    assert got == [frame(b"last")]


def test_backend_that_takes_nothing_holds_the_guest(place):
    """Backpressure by the kernel's buffers; SIGTERM gets through meanwhile."""
    with backend_pair() as (ours, theirs):

        def program(guest):
            guest.net.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                data = frame(bytes(65_000))
                while True:
                    guest.net.send(data)
            threading.Thread(target=session.terminate).start()
            guest.wait_for_signal()

        with place.session(NetProxy(ours)) as session:
            guest = place.guest(program=program)
            assert session.run_sync().terminated
        guest.result()
        del theirs


@pytest.mark.parametrize("kind", ["closed", "file", "pipe", "datagram", "listener", "inet", "lone"])
def test_what_is_no_backend_is_refused_before_binding(uds, kind):
    """And the duplicate of the descriptor is closed again."""
    with contextlib.ExitStack() as stack:
        if kind == "closed":
            fd = 12345
        elif kind == "file":
            fd = stack.enter_context(open(__file__)).fileno()
        elif kind == "pipe":
            fd, other = os.pipe()
            stack.callback(os.close, fd)
            stack.callback(os.close, other)
        elif kind == "datagram":
            pair = socket.socketpair(type=socket.SOCK_DGRAM)
            fd = stack.enter_context(pair[0]).fileno()
            stack.enter_context(pair[1])
        else:
            family = socket.AF_INET if kind == "inet" else socket.AF_UNIX
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if kind == "listener":
                sock.bind(f"{uds}_b")
                sock.listen()
            fd = sock.fileno()
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(InvalidArgumentError, match="backend"):
            EnclaveSession(small_writer(NetProxy(fd)), CID, uds_path=uds)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("backend", [-1, True, 1.5, None, "", "x" * 200])
def test_what_can_be_no_backend_is_refused_at_once(backend):
    """By its type."""
    with pytest.raises(InvalidArgumentError):
        NetProxy(backend)


# -- proxies of one's own


class Upper:
    """The program's output in capitals: an example of a proxy that watches."""

    port_offset = VsockPortOffset.APP_OUTPUT

    def __init__(self):
        self.got = b""
        self.closes = 0
        self.finished = False
        self.fall = None

    def arg(self):
        """The guest is to send it."""
        return AppOutput()

    def open(self):
        """Be the service too: this serves one session."""
        return self

    def connected(self, connection, loop):
        """Watch."""
        self._connection, self._loop = connection, loop
        loop.watch(connection.fileno(), READABLE, self._receive)

    def _receive(self, events):
        assert events & READABLE
        data = self._connection.recv(100)
        if self.fall:
            raise self.fall
        self.got += data.upper()
        if not data:
            self._loop.unwatch(self._connection.fileno())
            self.finished = True

    def close(self):
        """Count."""
        self.closes += 1


class Echo(Upper):
    """The network, relayed to a socket of one's own."""

    port_offset = VsockPortOffset.NET

    def __init__(self, sock):
        super().__init__()
        self._sock = sock
        self.finished = True

    def arg(self):
        """The guest is to connect."""
        from nitro_vsock import NetworkProxy

        return NetworkProxy()

    def connected(self, connection, loop):
        """Relay."""
        self.relay = loop.relay(connection, self._sock, self._ended)

    def _ended(self, relay):
        relay.close()

    def close(self):
        """Stop."""
        super().close()
        self.relay.close()


def test_proxy_of_ones_own_watches(place):
    """It gets the connection, is waited for until it has finished, and is closed once."""
    proxy = Upper()
    ended, _ = place.run(proxy, guest={"says": b"hello " * 1000})
    assert proxy.got == b"HELLO " * 1000
    assert ended.output_complete
    assert proxy.closes == 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, OSError, ProxyError, KeyboardInterrupt])
def test_error_of_ones_own_proxy_ends_the_session(place, kind):
    """As it is; it is closed all the same, once."""
    proxy = Upper()
    proxy.fall = kind("mine")
    error, _ = place.fail(kind, proxy, guest={"says": b"hello", "at": {"said": stall}})
    assert error is proxy.fall
    assert proxy.closes == 1
    if isinstance(error, NitroVsockError):
        assert error.must_terminate_enclave


def test_error_of_one_service_closes_the_others(place):
    """Also where closing fails, and where a proxy fails when it is told of the guest."""

    class Bad(Upper):
        def connected(self, connection, loop):
            raise ZeroDivisionError

        def close(self):
            super().close()
            raise ValueError("cannot close")

    one, other = socket.socketpair()
    with one, other:
        bad, echo = Bad(), Echo(one)
        echo.relay = contextlib.closing(one).thing  # anything with close
        place.fail(ZeroDivisionError, bad, echo, guest={})
        assert (bad.closes, echo.closes) == (1, 1)


def test_proxy_of_ones_own_relays(place):
    """The relay takes every byte, the guest's first four too."""
    one, other = socket.socketpair()
    with one, other:
        echo = Echo(one)
        results = []

        def program(guest):
            assert other.recv(4) == struct.pack(">I", 65534)
            results.append(swap(guest.net, other, 4 * MIB, 3))

        place.run(echo, guest={"program": program})
    assert results == [True]
    assert echo.closes == 1


def test_description_serves_any_number_of_sessions(uds, tmp_path):
    """A proxy list is no state: the same writer, two sessions at once."""
    from sessions import Place

    writer = small_writer(OutputProxy(tmp_path / "out", append=True))
    places = [Place(CID, uds), Place(CID + 10, uds)]
    with places[0].session(writer=writer) as one, places[1].session(writer=writer) as two:
        guests = [p.guest(says=b"x") for p in places]
        assert one.run_sync().exit_code == two.run_sync().exit_code == 0
        for guest in guests:
            guest.result()
    assert (tmp_path / "out").read_bytes() == b"xx"


# -- strangers


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled shim."""
    return faults.build(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("service", [2, 3, 4, 5])
@pytest.mark.parametrize("crowd", [1, 100])
def test_stranger_on_any_port_is_dropped_and_the_guest_gets_in(shim, service, crowd):
    """Another CID connects first, a hundred times: counted, closed, nothing of it is heard."""
    result = driver.run(driver.strange_services, shim=shim, service=service, crowd=crowd)
    assert result["refused"] == crowd
    assert result["hung_up"] == crowd
    assert result["status"] == 3
    assert result["output"] == "hello"
    assert result["leaked"] == []


def test_dead_enclave_is_noticed_through_a_busy_network(place):
    """The relay never waits, and the descriptor is looked at all the same."""
    with backend_pair() as (ours, theirs), Enclave() as enclave:
        stop = threading.Event()

        def flood(sock):
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    sock.sendall(frame(bytes(65_000)))

        def sink(sock):
            with contextlib.suppress(OSError):
                while sock.recv(MIB):
                    pass

        def program(guest):
            threads = [threading.Thread(target=flood, args=(guest.net,), daemon=True)]
            threads.append(threading.Thread(target=sink, args=(theirs,), daemon=True))
            for thread in threads:
                thread.start()
            while not is_full(guest.net) and not stop.wait(0.01):
                pass
            enclave.die()
            stall(guest)
            stop.set()
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(20)
            die(guest)

        from nitro_vsock import EnclaveDiedError

        place.fail(
            EnclaveDiedError,
            NetProxy(ours),
            guest={"program": program},
            enclave_fd=enclave.fileno(),
        )
