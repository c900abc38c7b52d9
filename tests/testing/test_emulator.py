"""Owns: the guest stand-in against a scripted host: order, output, signals, return code, faults."""

import os
import select
import signal
import struct
import threading

import pytest
from host import launch
from machine import CID
from peer import READY
from programs import directory, file, link
from scripted_host import (
    ARGS,
    NET,
    OUTPUT,
    RETURN_CODE,
    SIGNAL,
    ScriptedHost,
    exactly,
    until_end,
)

from nitro_vsock import errors
from nitro_vsock.testing import GuestEmulator, Misbehaviour, Point

NET_FLAG, OUTPUT_FLAG = b"\4", b"\5"
BOTH = NET_FLAG + OUTPUT_FLAG
ISOLATIONS = ("namespaces", "plain")
TERM = struct.pack("=i", signal.SIGTERM)


@pytest.fixture
def host(uds):
    """A host that listens on every port of the enclave."""
    with ScriptedHost(uds, CID) as host:
        yield host


@pytest.fixture
def boot(uds):
    """Boot guests that are gone after the test."""
    guests = []

    def boot(**options):
        guests.append(GuestEmulator(CID, uds_path=uds, **options))
        return guests[-1].start()

    yield boot
    for guest in guests:
        guest.close()


def has_hung_up(guest):
    """Whether the stand-in for the enclave's descriptor says that it is gone."""
    poller = select.poll()
    poller.register(guest.fileno(), 0)
    return bool(poller.poll(0))


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_the_order_of_a_life(host, boot, programs, isolation):
    """Output, net, signal, the program, then all of them closed and the return code."""
    guest = boot(isolation=isolation)
    host.hand_over(programs.tar("hello"), [b"/bin/hello", b"3"], flags=BOTH)
    output, net, signals = host.accept(OUTPUT), host.accept(NET), host.accept(SIGNAL)
    assert until_end(output) == b"hello\ntrouble\n"
    assert exactly(net, 4) == struct.pack(">I", 1514)
    until_end(net)
    assert signals.recv(1) == b""
    assert host.waiting() == {RETURN_CODE} or not has_hung_up(guest)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_the_order_of_points_and_the_report(host, boot, programs, isolation):
    """Every point is reached in the order of the enum, and the report says all."""
    seen = []
    guest = boot(isolation=isolation, on_point=seen.append)
    host.hand_over(programs.tar("hello"), [b"/bin/hello", b"3"], flags=BOTH)
    assert not has_hung_up(guest)
    assert host.status() == 3 << 8
    report = guest.result()
    assert seen == list(Point) == list(guest.points)
    assert list(report.seconds) == [point.value for point in Point]
    assert report.isolation == isolation
    assert report.args.argv == ("/bin/hello", "3")
    assert (report.status, report.program_status, report.exit_code) == (768, 768, 3)
    assert report.answered
    assert report.signals == ()
    assert has_hung_up(guest)
    assert bool(report.notes) == (isolation == "plain")


def test_no_flags_no_connections(host, boot, programs):
    """Without flags only the signal handler is connected before the program."""
    guest = boot()
    host.hand_over(programs.tar("wait"), [b"/bin/wait"])
    guest.wait_for("running")
    assert host.waiting() == {SIGNAL}


def test_the_connections_come_in_order(host, boot, programs):
    """Told to die after each proxy, the guest has connected that one and none that comes later."""
    for at, expected in ((Point.OUTPUT, {OUTPUT}), (Point.NET, {OUTPUT, NET})):
        guest = boot(die_at=at)
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=BOTH)
        assert guest.result().died_at is at
        assert host.waiting() == expected


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([b"/bin/hello", b"0"], 0),
        ([b"/bin/hello", b"3"], 768),
        ([b"/bin/kill-me", b"9"], 9),
        ([b"/bin/kill-me", b"15"], 15),
    ],
)
def test_wait_statuses(host, boot, programs, isolation, argv, status):
    """The status is the kernel's own, exits and signals."""
    guest = boot(isolation=isolation)
    host.hand_over(programs.tar("hello", "kill-me"), argv)
    assert host.status() == status
    assert guest.result().program_status == status


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_program_that_is_not_there(host, boot, programs, isolation):
    """The words of perror are in the output, and the status is no success."""
    guest = boot(isolation=isolation)
    host.hand_over(programs.tar("hello"), [b"/bin/nothing"], flags=OUTPUT_FLAG)
    assert until_end(host.accept(OUTPUT)) == b"exec application: No such file or directory\n"
    assert host.status() == 254 << 8
    assert guest.result().exit_code == 254


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize(
    ("envp", "code"), [(b"PATH=/x:/bin", 3), (b"A=/bin", 3), (b"PATH=/x", 254)]
)
def test_the_path_is_that_of_the_first_variable(host, boot, programs, isolation, envp, code):
    """argv[0] without a slash is looked up in envp[0] alone; without PATH in /bin and /usr/bin."""
    boot(isolation=isolation, strict=False)
    host.hand_over(programs.tar("hello"), [b"hello", b"3"], [envp, b"PATH=/bin"])
    assert host.status() == code << 8


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_output_is_raw_and_complete(host, boot, programs, isolation):
    """20 MiB arrive as they were written, through the very socket."""
    boot(isolation=isolation)
    size = 20 << 20
    host.hand_over(programs.tar("flood"), [b"/bin/flood", str(size).encode()], flags=OUTPUT_FLAG)
    data = until_end(host.accept(OUTPUT))
    assert host.status() == 0
    assert len(data) == size
    for word in (0, 1, 12345, size // 4 - 1):
        assert struct.unpack_from("=I", data, 4 * word)[0] == word * 2654435761 % (1 << 32)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("program", ["wait", "stubborn", "polite"])
def test_sigterm_is_forwarded_and_zero_reported(host, boot, programs, isolation, program):
    """SIGTERM ends the wait whatever the program does of it; other signals do nothing."""
    guest = boot(isolation=isolation)
    host.hand_over(programs.tar(program), [f"/bin/{program}".encode()], flags=OUTPUT_FLAG)
    output, signals = host.accept(OUTPUT), host.accept(SIGNAL)
    assert exactly(output, 6) == b"ready\n"
    signals.sendall(struct.pack("=i", signal.SIGUSR1))
    signals.sendall(TERM)
    code = host.accept(RETURN_CODE)
    assert exactly(code, 4) == bytes(4)
    # The program has its output until the guest goes down.
    last = {"wait": b"", "stubborn": b"term\n", "polite": b"bye\n"}[program]
    assert exactly(output, len(last)) == last
    code.sendall(bytes(4))
    report = guest.result()
    assert report.forwarded
    assert report.signals == (signal.SIGUSR1, signal.SIGTERM)
    assert until_end(output) == b""


def test_a_sigterm_before_the_program_runs_is_lost(host, boot, programs):
    """As in the real guest, whose init ignores it."""
    sent = threading.Event()
    guest = boot(on_point=lambda point: point is Point.SIGNAL and sent.wait(10))
    host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=OUTPUT_FLAG)
    output, signals = host.accept(OUTPUT), host.accept(SIGNAL)
    signals.sendall(TERM)
    sent.set()
    assert exactly(output, 6) == b"ready\n"
    signals.sendall(TERM)
    assert host.status() == 0
    report = guest.result()
    assert report.signals_lost == 1
    assert report.signals == (15, 15)


@pytest.mark.parametrize("sent", [b"", b"\x01\x02"])
def test_the_end_of_the_signals_is_a_sigterm(host, boot, programs, sent):
    """So is whatever is short."""
    guest = boot()
    host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=OUTPUT_FLAG)
    output, signals = host.accept(OUTPUT), host.accept(SIGNAL)
    assert exactly(output, 6) == b"ready\n"
    if sent:
        signals.sendall(sent)
    else:
        signals.close()
    assert host.status() == 0
    assert guest.result().forwarded


def test_signals_that_ended_before_the_program_end_it(host, boot, programs):
    """The end of file is read again and again."""
    closed = threading.Event()
    guest = boot(on_point=lambda point: point is Point.SIGNAL and closed.wait(10))
    host.hand_over(programs.tar("wait"), [b"/bin/wait"])
    host.accept(SIGNAL).close()
    closed.set()
    assert host.status() == 0
    assert guest.result().forwarded


def test_the_answer_is_waited_for(host, boot, programs):
    """The guest stays until the host has answered; its going down without one is seen."""
    guest = boot()
    host.hand_over(programs.tar("hello"), [b"/bin/hello"])
    sock = host.accept(RETURN_CODE)
    assert exactly(sock, 4) == bytes(4)
    guest.wait_for(Point.REPORTED)
    assert not has_hung_up(guest)
    sock.close()
    report = guest.result()
    assert not report.answered
    assert report.status == 0


@pytest.mark.parametrize("point", [point for point in Point if point is not Point.CONNECT])
def test_dying_at_each_point(host, boot, programs, point):
    """Every connection that there is by then ends, the program too, and the descriptor hangs up."""
    guest = boot(die_at=point)
    connections = _follow(host, programs, point)
    report = guest.result()
    assert report.died_at is point
    assert report.status == (0 if point is Point.REPORTED else None)
    assert has_hung_up(guest)
    for sock in connections:
        until_end(sock)
    _nothing_runs(report)


def test_dying_before_anything(host, boot):
    """Nothing is connected."""
    guest = boot(die_at="connect")
    assert guest.result().died_at is Point.CONNECT
    assert host.waiting() == set()


@pytest.mark.parametrize("point", [point for point in Point if point is not Point.CONNECT])
def test_stalling_at_each_point(host, boot, programs, point):
    """It stays there with everything open, until it is closed."""
    guest = boot(stall_at=point)
    connections = _follow(host, programs, point)
    guest.wait_for(point)
    poller = select.poll()
    for sock in connections:
        poller.register(sock, select.POLLRDHUP)
    assert poller.poll(50) == []
    assert not has_hung_up(guest)
    guest.close()
    assert guest.result().stalled_at is point
    for sock in connections:
        until_end(sock)
    _nothing_runs(guest.result())


def _follow(host, programs, point):
    """Play the host's part up to a point; return the connections that are open then."""
    reached = list(Point).index(point)

    def at_least(other):
        return reached >= list(Point).index(other)

    name = "hello" if at_least(Point.EXITED) else "wait"
    path = f"/bin/{name}".encode()
    archive = programs.tar(name, extra=[file("rootfs/data", bytes(3 << 20))])
    if not at_least(Point.UNPACKED):
        sock = host.accept(ARGS)
        if at_least(Point.ARGUMENTS):
            assert sock.recv(1) == READY
            sock.sendall(READY)
        if at_least(Point.ROOTFS):
            stream = launch(archive, argv=[path], envp=[b"PATH=/bin"])
            thread = threading.Thread(target=_send, args=(sock, stream))
            thread.start()
            # What is not read when the guest goes ends the sending.
            return [_Joining(sock, thread)]
        return [sock]
    host.hand_over(archive, [path], flags=BOTH)
    found = []
    for port, since in ((OUTPUT, Point.OUTPUT), (NET, Point.NET), (SIGNAL, Point.SIGNAL)):
        if at_least(since):
            found.append(host.accept(port))
    if at_least(Point.RETURN_CODE):
        found = [host.accept(RETURN_CODE)]
    return found


class _Joining:
    """A connection that a thread sends to."""

    def __init__(self, sock, thread):
        self._sock = sock
        self._thread = thread

    def fileno(self):
        return self._sock.fileno()

    def recv(self, size):
        self._thread.join(20)
        return self._sock.recv(size)


def _send(sock, data):
    try:
        sock.sendall(data)
    except OSError:
        return


def _nothing_runs(report):
    """No process has its root, working directory or program in the guest's tree, which is gone."""
    assert report.root is None or not os.path.exists(os.path.dirname(report.root))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("root", "cwd", "exe"):
            try:
                target = os.readlink(f"/proc/{pid}/{name}")
            except OSError:
                continue
            assert report.root is None or not target.startswith(report.root), (pid, name)


class TestMisbehaviour:
    """What no guest does, one by one."""

    def test_wrong_ready(self, host, boot):
        """The first byte is another one; it stays until the host closes."""
        guest = boot(misbehave=Misbehaviour.WRONG_READY)
        sock = host.accept(ARGS)
        assert sock.recv(1) == b"\0"
        sock.close()
        assert guest.result().args is None

    def test_short_return_code(self, host, boot, programs):
        """Two bytes and the end."""
        boot(misbehave="short-return-code")
        host.hand_over(programs.tar("hello"), [b"/bin/hello", b"3"])
        assert until_end(host.accept(RETURN_CODE)) == struct.pack("=i", 768)[:2]

    def test_no_wait_status(self, host, boot, programs):
        """A status that says stopped."""
        boot(misbehave="no-wait-status")
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        assert os.WIFSTOPPED(host.status())

    def test_no_return_code(self, host, boot, programs):
        """Goes down without a word."""
        guest = boot(misbehave="no-return-code")
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        report = guest.result()
        assert report.status is None
        assert report.program_status == 0
        assert host.waiting() == {SIGNAL}

    def test_unread_answer(self, host, boot, programs):
        """Goes down at once after the status."""
        guest = boot(misbehave="unread-answer")
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        assert until_end(host.accept(RETURN_CODE)) == bytes(4)
        assert guest.result().answer is None

    @pytest.mark.parametrize(
        ("how", "bytes_"),
        [
            ("absurd-mtu", b"\xff" * 4),
            ("cut-mtu", b"\0\0"),
            ("long-frame", struct.pack(">II", 1514, 0x7FFFFFFF) + bytes(64)),
        ],
    )
    def test_the_network(self, host, boot, programs, how, bytes_):
        """What comes on the network's connection first."""
        guest = boot(misbehave=how, isolation="plain")
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=NET_FLAG)
        assert exactly(host.accept(NET), len(bytes_)) == bytes_
        guest.wait_for(Point.RUNNING)

    def test_ignored_sigterm(self, host, boot, programs):
        """The program never hears of it, not even of the signals' end."""
        guest = boot(misbehave="ignore-sigterm")
        host.hand_over(programs.tar("wait"), [b"/bin/wait"])
        signals = host.accept(SIGNAL)
        guest.wait_for(Point.RUNNING)
        signals.sendall(TERM)
        signals.close()
        with pytest.raises(TimeoutError):
            guest.result(0.2)
        guest.close()
        with pytest.raises(errors.ClosedError):
            guest.result()


class TestEnds:
    """How a guest ends before its time."""

    def test_nobody_listens(self, uds):
        """A guest tries once."""
        with GuestEmulator(CID, uds_path=uds) as guest, pytest.raises(errors.VsockConnectError):
            guest.run()

    @pytest.mark.parametrize("port", [OUTPUT, NET, SIGNAL, RETURN_CODE])
    def test_a_port_that_nobody_listens_on(self, uds, boot, programs, port):
        """The error names it, and the guest is gone."""
        everything = {ARGS, NET, OUTPUT, RETURN_CODE, SIGNAL}
        with ScriptedHost(uds, CID, everything - {port}) as host:
            guest = boot()
            host.hand_over(programs.tar("hello"), [b"/bin/hello"], flags=BOTH)
            with pytest.raises(errors.VsockConnectError, match=f"_{CID + port}"):
                guest.result()
            assert has_hung_up(guest)

    def test_the_deadline(self, host, boot, programs):
        """It ends a program that runs on."""
        guest = boot(timeout=1)
        host.hand_over(programs.tar("wait"), [b"/bin/wait"])
        with pytest.raises(errors.DeadlineError, match="running"):
            guest.result()
        assert has_hung_up(guest)

    def test_closing_a_running_guest(self, host, boot, programs):
        """Everything ends at once."""
        guest = boot()
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=OUTPUT_FLAG)
        output = host.accept(OUTPUT)
        guest.wait_for(Point.RUNNING)
        guest.close()
        assert guest.fileno() == -1
        until_end(output)
        with pytest.raises(errors.ClosedError):
            guest.result()

    def test_closing_from_another_thread_ends_run(self, uds, host):
        """`run` in this thread raises ClosedError."""
        with GuestEmulator(CID, uds_path=uds) as guest:
            thread = threading.Thread(target=lambda: (guest.wait_for("handshake"), guest.close()))
            thread.start()
            with pytest.raises(errors.ClosedError):
                guest.run()
            thread.join()

    def test_only_once(self, uds):
        """A second life needs a second emulator."""
        with GuestEmulator(CID, uds_path=uds, die_at="connect") as guest:
            guest.run()
            with pytest.raises(errors.ClosedError):
                guest.run()
            with pytest.raises(errors.ClosedError):
                guest.start()
        with GuestEmulator(CID) as guest, pytest.raises(errors.ClosedError):
            guest.result()

    def test_waiting_for_a_point_that_never_comes(self, uds, boot):
        """The wait ends with the guest."""
        guest = boot(die_at="connect")
        with pytest.raises(errors.ClosedError):
            guest.wait_for("running")

    @pytest.mark.parametrize("name", ["dev", "proc", "run", "sys", "tmp"])
    def test_a_directory_that_the_guest_makes(self, host, boot, programs, name):
        """An archive that has it stops the guest, strictly read or not."""
        archive = programs.tar("hello", extra=[directory(f"rootfs/{name}")])
        guest = boot(strict=False)
        host.hand_over(archive, [b"/bin/hello"])
        with pytest.raises(errors.GuestRuleError, match=f"{name}: File exists"):
            guest.result()


@pytest.mark.parametrize(
    "options",
    [
        {"cid": 2},
        {"mtu": 67},
        {"mtu": 65522},
        {"die_at": "never"},
        {"stall_at": "x"},
        {"misbehave": "x"},
        {"isolation": "x"},
        {"timeout": -1},
        {"console": -1},
        {"folder": "/does/not/exist"},
        {"host_cid": -1},
    ],
)
def test_arguments_are_checked(options):
    """Before anything is made."""
    with pytest.raises(errors.InvalidArgumentError):
        GuestEmulator(**{"cid": CID, **options})


def test_unpacked_tree(host, boot, programs, tmp_path):
    """Modes, links of both kinds, empty directories and files survive; setuid and owners do not."""
    members = [
        directory("rootfs/empty", 0o700),
        directory("rootfs/locked", 0o555),
        file("rootfs/locked/in", b"data", 0o640),
        file("rootfs/suid", b"x", 0o4755),
        file("rootfs/a", b"a" * 100, 0o600),
        link("rootfs/b", "rootfs/a", hard=True),
        link("rootfs/c", "/etc/passwd"),
        link("rootfs/up", ".."),
        file("rootfs/no/parent/here", b"", 0o644),
        file("rootfs/a b\u00e9", b"", 0o644),
        file("rootfs/twice", b"1", 0o600),
        file("rootfs/twice", b"22", 0o644),
    ]
    guest = boot(folder=tmp_path, isolation="plain")
    host.hand_over(programs.tar("hello", extra=members), [b"/bin/hello"])
    assert host.status() == 0
    guest.result()
    root = tmp_path / "rootfs"

    def mode(name):
        return (root / name).lstat().st_mode & 0o7777

    assert mode("empty") == 0o700
    assert mode("locked") == 0o555
    assert mode("locked/in") == 0o640
    assert mode("suid") == 0o755
    assert mode("a") == 0o600
    assert (root / "a").samefile(root / "b")
    assert os.readlink(root / "c") == "/etc/passwd"
    assert os.readlink(root / "up") == ".."
    assert (root / "no/parent/here").is_file()
    assert (root / "a b\u00e9").is_file()
    assert (root / "twice").read_bytes() == b"22"
    assert {"dev", "proc", "run", "sys", "tmp"} < set(os.listdir(root))


@pytest.mark.parametrize(
    "members",
    [
        [link("rootfs/out", "/var"), file("rootfs/out/nitro", b"x")],
        [link("rootfs/out", "../.."), file("rootfs/out/nitro", b"x")],
        [file("rootfs/../nitro", b"x")],
        [file("/nitro", b"x")],
        [link("rootfs/x", "../../etc/passwd", hard=True)],
    ],
)
def test_nothing_is_unpacked_outside(host, boot, programs, members):
    """Through a link, by dots or from the root."""
    guest = boot(strict=False)
    host.hand_over(programs.tar("hello", extra=members), [b"/bin/hello"])
    with pytest.raises(errors.GuestRuleError, match="outside"):
        guest.result()
