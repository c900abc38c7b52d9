"""A whole session: its phases, what ends it, and what each party is told."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import session_guest
from machine import SOON, open_descriptors
from peer import connect, unread, wait_until
from session_guest import AFTER_FINISHED, BEFORE_FINISHED, INT, POINTS, die, stall
from sessions import CID, PATIENT, Enclave, Lines, small_writer

from nitro_vsock import (
    Console,
    EnclaveDiedError,
    EnclaveSession,
    Guest,
    InvalidArgumentError,
    NetProxy,
    NitroVsockError,
    OutputProxy,
    ProxyError,
    ReturnCode,
    ReturnCodeError,
    SessionTimeoutError,
    SessionTimeouts,
    SignalHandler,
    VsockBindError,
)
from nitro_vsock.core.calls import FOREVER_NS, Guard
from nitro_vsock.deadline import Deadline
from nitro_vsock.transport.loop import READABLE, EventLoop


def quick(stage, seconds=0.3):
    """Return deadlines of which this one comes soon, and all others late."""
    return replace(PATIENT, **{stage: seconds})


SERVICES = {"net": 2, "output": 3, "code": 4, "signal": 5}


# -- exit codes


@pytest.mark.parametrize(
    ("status", "code", "killer", "text"),
    [
        (0, 0, None, "exit code 0"),
        (3 << 8, 3, None, "exit code 3"),
        (255 << 8, 255, None, "exit code 255"),
        (9, None, 9, "ended by signal 9"),
        (15, None, 15, "ended by signal 15"),
        (64, None, 64, "ended by signal 64"),
    ],
)
def test_exit_status_is_what_the_guest_said(place, status, code, killer, text):
    """Exit codes, and signals that killed the program."""
    ended, guest = place.run(guest={"status": status})
    assert (ended.exit_code, ended.signal, str(ended)) == (code, killer, text)
    assert ended.returncode == (code if killer is None else -killer)
    assert (ended.core_dumped, ended.terminated, ended.output_complete) == (False, False, True)
    assert ended.launch.peer_closed
    assert guest.answer == bytes(4)


def test_core_dump_is_told(place):
    """The flag beside the signal."""
    ended, _ = place.run(guest={"status": 11 | 0x80})
    assert (ended.signal, ended.core_dumped, ended.exit_code) == (11, True, None)


def bare_writer():
    """A launch for the guest that reports the bare exit code."""
    return small_writer(guest=Guest.KRUN_RUST_INIT)


@pytest.mark.parametrize("code", [0, 3, 9, 127, 255])
def test_bare_exit_code_is_taken_where_the_guest_reports_one(place, code):
    """3 is an exit code there, not signal 3."""
    ended, _ = place.run(writer=bare_writer(), guest={"status": code})
    assert (ended.exit_code, ended.signal) == (code, None)


@pytest.mark.parametrize("said", [256, 768, -1, 1 << 30])
def test_number_that_is_no_bare_exit_code_is_an_error(place, said):
    """A wait status, for instance: the image has another guest than was said."""
    error, _ = place.fail(ReturnCodeError, writer=bare_writer(), guest={"status": said})
    assert error.errno == errno.EBADMSG
    assert f"{said:#x}" in str(error)


GARBAGE = [0x137F, 0xFFFF, 0x7F, 0x80, 0xFF, 0x0309, 0x10000, -1, -256, 65, 1 << 30]


@pytest.mark.parametrize("status", GARBAGE)
def test_status_of_no_ended_program_is_an_error(place, status):
    """Stopped, continued, a core dump without signal, bits that no status has."""
    error, _ = place.fail(ReturnCodeError, guest={"status": status})
    assert (error.errno, error.stage) == (errno.EBADMSG, "run")
    assert f"{status:#x}" in str(error)
    assert error.must_terminate_enclave


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\0", b"\0\0\0"])
def test_return_code_cut_short_is_never_a_zero(place, said):
    """The guest's end of file before four bytes is an error that counts them."""
    last = {"status": lambda guest: die(guest)}
    error, _ = place.fail(ReturnCodeError, guest={"status": said, "at": last})
    assert f"after {len(said)} of 4 bytes" in str(error)
    assert (error.errno, error.stage) == (errno.ECONNRESET, "run")


def test_bytes_after_the_status_change_nothing(place):
    """The first four count."""
    ended, _ = place.run(guest={"status": INT.pack(768) + b"more"})
    assert ended.exit_code == 3


def test_status_in_single_bytes_is_put_together(place):
    """Each in a packet of its own."""

    def dribble(guest):
        for byte in INT.pack(768):
            guest.code.sendall(bytes([byte]))
            wait_until(lambda: unread(guest.code) == 0, what="the reading")

    ended, _ = place.run(guest={"status": b"", "at": {"half": dribble}})
    assert ended.exit_code == 3


def test_answer_comes_only_after_the_output_was_drained(place):
    """The guest goes down with the answer, and what it had not sent would be lost."""
    lines = Lines()

    def still_talking(guest):
        guest.code.settimeout(0.3)
        with pytest.raises(TimeoutError):
            guest.code.recv(4)
        guest.code.settimeout(60)
        guest.output.sendall(b"the last line\n")
        guest.output.close()

    ended, guest = place.run(
        lines.proxy, guest={"keeps": ("output",), "at": {"status": still_talking}}
    )
    assert lines == ["the last line"]
    assert ended.output_complete
    assert guest.answer == bytes(4)


def test_signal_connection_stays_open_until_the_guest_closes(place):
    """The guest would take its end of file for SIGTERM, again and again."""
    seen = []

    def look(guest):
        guest.signal.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            seen.append(guest.signal.recv(4))

    ended, guest = place.run(guest={"keeps": ("signal",), "at": {"answered": look}})
    assert seen == []
    assert ended.exit_code == 0
    assert guest.signals == []


# -- binding


def taken(path):
    """Bind a Unix socket, which somebody listens at."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen()
    return sock


@pytest.mark.parametrize("service", [1, 2, 3, 4, 5])
def test_all_ports_are_bound_or_none(uds, service):
    """Whichever is taken: the error names it, the others are free again, nothing is left."""
    backend, other = socket.socketpair()
    with backend, other, taken(f"{uds}_{CID + service}"):
        before = open_descriptors()
        writer = small_writer(OutputProxy(print), NetProxy(backend))
        with pytest.raises(VsockBindError) as caught:
            EnclaveSession(writer, CID, uds_path=uds)
        assert str(CID + service) in str(caught.value)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.listdir(os.path.dirname(uds)) == [f"v.sock_{CID + service}"]
        del caught
        assert open_descriptors() == before


def test_what_a_killed_host_left_is_replaced(place):
    """A socket file that nobody listens at is no obstacle, on any port."""
    for service in range(1, 6):
        taken(f"{place.uds}_{CID + service}").close()
    ended, _ = place.run(OutputProxy(print), guest={})
    assert ended.exit_code == 0


def test_proxies_are_opened_before_anything_is_bound(uds):
    """One that cannot be leaves every port free, and closes those opened before it."""
    seen = []

    class Probe(OutputProxy):
        def open(self):
            seen.append(os.listdir(os.path.dirname(uds)))
            return super().open()

    before = open_descriptors()
    with pytest.raises(ProxyError, match="/nonexistent") as caught:
        EnclaveSession(
            small_writer(Probe(print), NetProxy("/nonexistent/backend")), CID, uds_path=uds
        )
    assert caught.value.errno == errno.ENOENT
    assert not caught.value.must_terminate_enclave
    del caught
    assert seen == [[]]
    assert open_descriptors() == before


class Alien:
    """A proxy of somebody's; its offset and frame are given."""

    def __init__(self, offset, arg=None):
        self.port_offset = offset
        self._arg = arg

    def arg(self):
        """The frame."""
        return self._arg

    def open(self):
        """Must not be reached."""
        raise AssertionError("opened")


@pytest.mark.parametrize(
    ("proxies", "options", "said"),
    [
        ([], {"network_proxy": True}, "network_proxy: needs a NetProxy"),
        ([OutputProxy(print), OutputProxy(print)], {}, "the only proxy for app_output"),
        ([SignalHandler(), SignalHandler(())], {}, "the only proxy for signal_handler"),
        ([Alien(5)], {}, "must be a SignalHandler"),
        ([Alien(4)], {}, "must be a ReturnCode"),
        ([Alien(10000)], {}, "must be a Console"),
        ([Alien(1)], {}, "port_offset"),
        ([Alien(7)], {}, "port_offset"),
        ([Alien("x")], {}, "port_offset"),
        ([Alien(2)], {}, "arg\\(\\) must return NetworkProxy"),
        ([Alien(3)], {}, "arg\\(\\) must return AppOutput"),
    ],
)
def test_proxies_that_cannot_work_are_refused_before_binding(uds, proxies, options, said):
    """Two for one port, a port the guest does not know, a guest that would wait for ever."""
    with pytest.raises(InvalidArgumentError, match=said):
        EnclaveSession(small_writer(*proxies, **options), CID, uds_path=uds)
    assert os.listdir(os.path.dirname(uds)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"cid": 2},
        {"cid": "16"},
        {"uds_path": "x" * 200},
        {"uds_path": 5},
        {"peer_cid": -1},
        {"timeouts": 5},
        {"strategy": "fast"},
    ],
)
def test_bad_arguments_leave_an_output_file_alone(uds, tmp_path, arguments):
    """It would be emptied for a session that never was."""
    kept = tmp_path / "kept"
    kept.write_text("old")
    usual = {"cid": CID, "uds_path": uds, **arguments}
    with pytest.raises(InvalidArgumentError):
        EnclaveSession(small_writer(OutputProxy(kept)), usual.pop("cid"), **usual)
    if "strategy" not in arguments:  # known once the rootfs is open
        assert kept.read_text() == "old"


def test_console_needs_no_room_in_the_path_of_a_session_without_one(tmp_path):
    """Its port has two digits more than the others."""
    base = str(tmp_path / "v")
    base += "v" * (104 - len(base))
    EnclaveSession(small_writer(), CID, uds_path=base).close()
    with pytest.raises(InvalidArgumentError, match="uds_path"):
        EnclaveSession(small_writer(Console(print)), CID, uds_path=base)


@pytest.mark.parametrize("field", ["launch", "services", "run", "stop", "drain"])
@pytest.mark.parametrize("value", [-1, float("nan"), "5", True])
def test_bad_timeouts_are_named(field, value):
    """Before there is a session."""
    with pytest.raises(InvalidArgumentError, match=field):
        SessionTimeouts(**{field: value})


# -- the guest's haste


def test_guest_that_connects_at_once_is_never_refused(place):
    """To all its ports within a moment of Finished, a thousand sessions one after another."""
    check_haste(place, 1000)


def check_haste(place, rounds):
    """Run so many sessions with a guest, a process of its own, that connects as fast as it can."""
    lines = Lines()
    writer = small_writer(lines.proxy)
    guest = subprocess.Popen(
        [sys.executable, session_guest.__file__, place.uds or "", str(place.cid), str(rounds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with guest:
        try:
            for _ in range(rounds):
                with place.session(writer=writer) as session:
                    assert session.run_sync().exit_code == 0
            said = json.loads(guest.stdout.readline())
        finally:
            guest.kill()
    assert (said["error"], said["done"]) == (None, rounds)
    assert lines == ["hello"] * rounds


# -- a guest that vanishes


def expected_without_descriptor(point):
    """What a session that sees only its sockets makes of a guest that dies there."""
    if point in ("connect", "handshake", "arguments", "rootfs"):
        return NitroVsockError, ("accept", "arguments", "rootfs", "close", "handshake")
    if point in ("finished", "closed", "output", "mtu"):
        return SessionTimeoutError, ("services",)
    if point == "net":
        return ProxyError, ("services",)
    if point in ("code", "half"):
        return ReturnCodeError, ("run",)
    return EnclaveDiedError, ("run", "services")


@pytest.mark.parametrize("point", POINTS[: POINTS.index("status")])
def test_guest_that_vanishes_ends_the_session_in_time(place, point, tmp_path):
    """At each step: a typed error with its stage, the last lines, and nothing left."""
    backend, other = socket.socketpair()
    big = tmp_path / "big"
    with backend, other:
        began = time.monotonic()
        error, _ = place.fail(
            NitroVsockError,
            OutputProxy(lambda _: None),
            NetProxy(backend),
            guest={"at": {point: die}, "says": b"one\ntwo"},
            timeouts=SessionTimeouts(
                launch=0.5 if point in ("connect", "handshake") else 30,
                services=0.5,
                run=30,
                stop=30,
                drain=0.3,
            ),
        )
        assert time.monotonic() - began < SOON
    del big
    kind, stages = expected_without_descriptor(point)
    assert isinstance(error, kind), repr(error)
    assert error.stage in stages
    late = point in POINTS[POINTS.index("said") :]
    assert error.last_output == (("one", "two") if late else ())
    if point in AFTER_FINISHED:
        assert error.must_terminate_enclave


@pytest.mark.parametrize("point", ["status", "answered"])
def test_guest_that_vanishes_after_its_status_has_told_it(place, point):
    """Nothing is lost any more."""
    with place.running(OutputProxy(print), guest={"at": {point: die}, "status": 768}) as (
        session,
        _,
    ):
        assert session.run_sync().exit_code == 3


@pytest.mark.parametrize("point", [p for p in POINTS if p not in ("status", "answered")])
@pytest.mark.parametrize("sockets", ["open", "closed"])
def test_dead_enclave_ends_the_session_at_once(place, point, sockets):
    """The descriptor's hang-up, its sockets reset with it or not; the last lines are told."""
    backend, other = socket.socketpair()
    with backend, other, Enclave() as enclave:

        def end(guest):
            enclave.die()
            if sockets == "closed":
                die(guest)
            stall(guest)

        began = time.monotonic()
        error, _ = place.fail(
            NitroVsockError,
            OutputProxy(lambda _: None),
            NetProxy(backend),
            guest={"at": {point: end}, "says": b"one\ntwo"},
            enclave_fd=enclave.fileno(),
        )
        assert time.monotonic() - began < SOON
    if point in BEFORE_FINISHED and sockets == "closed":
        # Which of the two is seen first is chance.
        assert isinstance(error, NitroVsockError)
    elif sockets == "closed" and point in ("net", "code", "half"):
        assert isinstance(error, (EnclaveDiedError, ProxyError, ReturnCodeError))
    else:
        assert isinstance(error, EnclaveDiedError), repr(error)
    late = point in POINTS[POINTS.index("said") :]
    assert error.last_output == (("one", "two") if late else ())


def test_enclave_that_dies_with_its_last_line_shows_it(place):
    """What had come before the hang-up is delivered, all of it."""
    lines = Lines()
    said = b"".join(b"line %d\n" % number for number in range(20_000))
    with Enclave() as enclave:
        at = {"said": lambda guest: (enclave.die(), stall(guest))}
        error, _ = place.fail(
            EnclaveDiedError,
            lines.proxy,
            guest={"at": at, "says": said},
            enclave_fd=enclave.fileno(),
        )
    assert len(lines) == 20_000
    assert error.last_output == tuple(f"line {number}" for number in range(19_980, 20_000))


def test_enclave_that_dies_after_the_status_changes_nothing(place):
    """The program's end is known; what is open still is not waited for."""
    sessions = []

    def end(guest):
        """Die, once the host knows that the launch is over: earlier it would be a death in it."""
        wait_until(lambda: sessions and sessions[0].stage in ("run", "drain"))
        enclave.die()
        stall(guest)

    with Enclave() as enclave:
        guest = {"at": {"status": end}, "keeps": ("output",)}
        with place.running(OutputProxy(print), guest=guest) as (session, _):
            sessions.append(session)
            began = time.monotonic()
            ended = session.run_sync(enclave_fd=enclave.fileno())
            assert time.monotonic() - began < SOON
    assert (ended.exit_code, ended.output_complete) == (0, False)


# -- deadlines


@pytest.mark.parametrize(
    ("point", "stage"),
    [
        ("closed", "services"),
        ("output", "services"),
        ("mtu", "services"),
        ("signal", "run"),
        ("said", "run"),
        ("code", "run"),
        ("half", "run"),
    ],
)
def test_each_phase_has_its_deadline(place, point, stage):
    """A guest that stands still: SessionTimeoutError with the phase, and no later than that."""
    began = time.monotonic()
    error, _ = place.fail(
        SessionTimeoutError,
        OutputProxy(lambda _: None),
        guest={"at": {point: stall}, "says": b"one\ntwo\n", "keeps": ("signal",)},
        timeouts=quick(stage, 1.0 if point in ("said", "code", "half") else 0.3),
    )
    assert 0.2 < time.monotonic() - began < SOON
    assert (error.stage, error.errno) == (stage, errno.ETIMEDOUT)
    assert error.must_terminate_enclave
    assert error.last_output == (("one", "two") if point in ("said", "code", "half") else ())
    if point == "closed":
        assert f"v.sock_{CID + 3}" in str(error)
        assert f"v.sock_{CID + 5}" in str(error)
        assert f"v.sock_{CID + 4}" not in str(error)


@pytest.mark.parametrize("point", BEFORE_FINISHED)
def test_launch_has_its_deadline(place, point):
    """The errors of `Launch.send`."""
    error, _ = place.fail(NitroVsockError, guest={"at": {point: stall}}, timeouts=quick("launch"))
    assert isinstance(error, TimeoutError) or point in ("arguments", "rootfs")


def test_stop_deadline_begins_with_the_first_terminate(place):
    """A program that ignores SIGTERM: the error says what did not end."""
    timeouts = SessionTimeouts(run=None, stop=0.3)
    with place.running(guest={"at": {"signal": stall}}, timeouts=timeouts) as (session, guest):
        threading.Thread(
            target=lambda: (guest.reached["signal"].wait(20), session.terminate())
        ).start()
        with pytest.raises(SessionTimeoutError, match="after SIGTERM") as caught:
            session.run_sync()
    assert caught.value.stage == "stop"


def test_run_deadline_holds_against_a_guest_that_never_stops_talking(place):
    """Its output is always readable, and the clock is looked at all the same."""

    def talk(guest):
        with contextlib.suppress(OSError):
            while True:
                guest.output.sendall(bytes(1 << 20))

    with open(os.devnull, "wb") as sink:
        began = time.monotonic()
        error, _ = place.fail(
            SessionTimeoutError,
            OutputProxy(sink.fileno()),
            guest={"program": talk},
            timeouts=quick("run"),
        )
    assert error.stage == "run"
    assert time.monotonic() - began < SOON


def test_deadline_holds_where_something_is_always_ready():
    """The loop looks at the clock itself: the core's wait never comes to its end."""
    reading, writing = os.pipe()
    os.write(writing, b"x")
    calls = []
    loop = EventLoop()
    loop.watch(reading, READABLE, calls.append)
    guard = Guard(Deadline.after(0.05))
    guard.wait.tick_ns = FOREVER_NS
    while (code := loop.run_once(guard)) == 0 and len(calls) < 1_000_000:
        pass
    loop.close()
    os.close(reading)
    os.close(writing)
    assert code == errno.ETIME
    assert calls


# -- the end of the output


def test_output_held_open_is_waited_for_as_long_as_drain(place):
    """Something in the guest still has it: the status is told, and that the output is not whole."""
    lines = Lines()
    timeouts = SessionTimeouts(drain=0.3)
    guest = {"keeps": ("output",), "says": b"all", "status": 768}
    began = time.monotonic()
    ended, started = place.run(lines.proxy, guest=guest, timeouts=timeouts)
    assert 0.3 <= time.monotonic() - began < SOON
    assert (ended.exit_code, ended.output_complete, lines) == (3, False, ["all"])
    assert started.answer == bytes(4)


def test_guest_that_never_stops_talking_cannot_hold_the_session(place):
    """After the program's end it has `drain`, and no more."""
    talking = threading.Event()

    def talk(guest):
        def on():
            with contextlib.suppress(OSError):
                while True:
                    output.sendall(bytes(1 << 20))
                    talking.set()

        output = guest.output
        talker = threading.Thread(target=on, daemon=True)
        talker.start()
        guest.talker = talker

    with open(os.devnull, "wb") as sink:
        guest = {"program": talk, "keeps": ("output",)}
        began = time.monotonic()
        ended, started = place.run(
            OutputProxy(sink.fileno()), guest=guest, timeouts=SessionTimeouts(drain=0.5)
        )
        assert time.monotonic() - began < SOON
    started.talker.join(20)
    assert talking.is_set()
    assert (ended.exit_code, ended.output_complete) == (0, False)


def test_blocked_target_gets_everything_however_long_it_takes(place):
    """A reader that is slower than `drain`: the guest is held up by us, so nothing is cut."""
    reading, writing = os.pipe()
    got = bytearray()
    size = 3 << 20

    def read_slowly():
        while piece := os.read(reading, 1 << 20):
            got.extend(piece)
            time.sleep(0.02)  # slowness is the behaviour under test

    reader = threading.Thread(target=read_slowly)
    said = os.urandom(size)
    with place.session(OutputProxy(writing), timeouts=SessionTimeouts(drain=0.1)) as session:
        os.close(writing)
        guest = place.guest(
            program=lambda g: threading.Thread(
                target=lambda out: (out.sendall(said), out.close()), args=(g.output,)
            ).start(),
            keeps=("output",),
        )
        threading.Timer(0.5, reader.start).start()
        ended = session.run_sync()
    guest.result()
    reader.join(20)
    os.close(reading)
    assert bytes(got) == said
    assert ended.output_complete


def test_target_blocked_for_ever_is_ended_by_terminate(place):
    """The deadline `stop` is all that cuts output off."""
    reading, writing = os.pipe()
    timeouts = SessionTimeouts(drain=0.1, stop=0.3)
    guest = {
        "keeps": ("output",),
        "program": lambda g: (g.output.setblocking(False), g.output.send(bytes(1 << 17))),
    }
    with place.running(OutputProxy(writing), guest=guest, timeouts=timeouts) as (session, _):
        began = time.monotonic()
        threading.Thread(
            target=lambda: (
                wait_until(lambda: session.stage == "drain"),
                time.sleep(0.3),  # longer than drain: it must not end by itself
                session.terminate(),
            )
        ).start()
        ended = session.run_sync()
        assert 0.5 < time.monotonic() - began < SOON
    os.close(reading)
    os.close(writing)
    assert (ended.exit_code, ended.output_complete) == (0, False)


# -- the host is killed


HOST = """
import json, sys
from nitro_vsock import *
tar, uds, out = sys.argv[1:]
writer = EnclaveArgsWriter(Rootfs.from_file(tar), "/a", ["/a"], {"A": "1"},
                           proxies=DeviceProxyList([OutputProxy(out)]))
with EnclaveSession(writer, 16, uds_path=uds) as session:
    print("bound", flush=True)
    print(session.run_sync())
"""

KILLINGS = [
    *((signal.SIGKILL, point) for point in POINTS[:-2] if point != "net"),
    *((signal.SIGINT, point) for point in ("connect", "rootfs", "closed", "said", "half")),
    (signal.SIGTERM, "connect"),
]


def handles(pid, number):
    """Whether a process has a handler for a signal."""
    with open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (number - 1) & 1


@pytest.mark.parametrize(("number", "point"), KILLINGS)
def test_host_killed_at_each_step_leaves_nothing_behind(place, archive, tmp_path, number, point):
    """No process, no file but sockets that the next session replaces; and that one can bind."""
    with tempfile_folder(tmp_path) as folder:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST, archive.path, place.uds, tmp_path / "out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        with host:
            assert host.stdout.readline() == b"bound\n"
            guest = place.guest(at={point: stall}, says=b"one\n")
            guest.reached[point].wait(20)
            if number == signal.SIGTERM:  # the guest may be there before the session runs
                wait_until(lambda: handles(host.pid, number))
            host.send_signal(number)
            host.wait(20)
            guest.finish()
        # SIGTERM is ours: it cancels the launch, which the program does not catch.
        assert host.returncode == (1 if number == signal.SIGTERM else -number)
        with pytest.raises(ProcessLookupError):
            os.killpg(host.pid, 0)
        assert os.listdir(folder) == []
    if number != signal.SIGKILL:
        assert os.listdir(os.path.dirname(place.uds)) == []
    ended, _ = place.run(OutputProxy(print), guest={"status": 768})
    assert ended.exit_code == 3


@contextlib.contextmanager
def tempfile_folder(tmp_path):
    """A folder for temporary files, to see whether any are left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield str(folder)


# -- many, and again


def test_sixty_four_sessions_at_once_keep_their_bytes_apart(uds):
    """Threads of one process: each gets its own guest's output, status and answer."""
    outcomes = {}

    def serve(cid):
        lines = Lines()
        with EnclaveSession(
            small_writer(lines.proxy), cid, uds_path=uds, timeouts=PATIENT
        ) as session:
            guest = session_guest.SessionGuest(
                uds, cid, says=b"I am %d\n" % cid * 1000, status=(cid % 200) << 8
            )
            ended = session.run_sync()
            outcomes[cid] = (set(lines), len(lines), ended.exit_code)
            guest.result()

    threads = [threading.Thread(target=serve, args=(16 + 10 * n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {
        16 + 10 * n: ({f"I am {16 + 10 * n}"}, 1000, (16 + 10 * n) % 200) for n in range(64)
    }


def test_session_serves_once(place):
    """The second call is told so."""
    from nitro_vsock import ClosedError

    with place.running(guest={}) as (session, _):
        session.run_sync()
        with pytest.raises(ClosedError, match="used"):
            session.run_sync()


def test_bad_enclave_descriptor_spends_nothing(place):
    """It is refused before anything is done."""
    with place.running(guest={}) as (session, _):
        with pytest.raises(InvalidArgumentError, match="enclave_fd"):
            session.run_sync(enclave_fd=12345)
        assert session.run_sync().exit_code == 0


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("point", [p for p in POINTS if p not in ("net", "answered")])
def test_cancel_and_close_end_a_session_at_each_step(place, how, point):
    """From another thread, at once."""
    guest = {"at": {point: stall}, "keeps": ("output", "signal"), "says": b"x"}
    with place.running(OutputProxy(lambda _: None), guest=guest) as (session, started):
        thread = threading.Thread(
            target=lambda: (started.reached[point].wait(20), getattr(session, how)())
        )
        thread.start()
        began = time.monotonic()
        with pytest.raises(NitroVsockError) as caught:
            session.run_sync()
        assert time.monotonic() - began < SOON
        thread.join()
    kind = {"cancel": "LaunchCancelledError", "close": "ClosedError"}[how]
    assert type(caught.value).__name__ == kind


def test_want_of_descriptors_is_an_error_that_says_so(place):
    """EMFILE at an accept ends the session; nothing spins."""

    def exhaust(guest):
        wait_until(lambda: session.stage == "services", what="the launch's end")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits.append((soft, hard))
        most = max(open_descriptors()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        os.close(fillers.pop())  # one for the guest's own end

    limits, fillers = [], []
    try:
        with place.session() as session:
            guest = place.guest(at={"closed": exhaust, "signal": stall})
            with pytest.raises(NitroVsockError) as caught:
                session.run_sync()
        guest.finish()
        error = caught.value
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits[0])
        for fd in fillers:
            os.close(fd)
    assert (type(error).__name__, error.errno) == ("VsockAcceptError", errno.EMFILE)


def test_console_is_attached_and_told_in_errors(place):
    """Its lines are the last ones where there was no output."""
    lines = Lines()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.bind(f"{place.uds}_{CID + 10000}")
        console.listen()
        console.settimeout(20)

        def speak(guest):
            with console.accept()[0] as sock:
                sock.sendall(b"booting\r\npanic\n")
                stall(guest)

        with Enclave() as enclave:
            at = {"arguments": lambda g: threading.Thread(target=speak, args=(g,)).start()}
            at["closed"] = lambda g: (
                wait_until(lambda: "panic" in lines),
                enclave.die(),
                stall(g),
            )
            error, _ = place.fail(
                EnclaveDiedError, Console(lines), guest={"at": at}, enclave_fd=enclave.fileno()
            )
    assert lines == ["booting", "panic"]
    assert error.last_output == ("booting", "panic")


def test_stranger_on_a_unix_socket_is_served_as_the_guest(place):
    """Unix sockets have no CIDs: whoever may connect there is trusted; file permissions decide."""
    with place.session(ReturnCode()) as session:
        with connect(f"{place.uds}_{CID + 5}"):
            assert session.strangers_refused == 0
