"""SIGTERM: to the guest, once each, at any moment; and the program's own handlers after it."""

import asyncio
import contextlib
import os
import random
import signal
import threading
import time

import pytest
import session_guest
from machine import SOON
from peer import wait_until
from session_guest import INT, POINTS, stall, until_terminated
from sessions import CID, PATIENT, Lines, Place, small_writer

from nitro_vsock import (
    EnclaveArgsWriter,
    EnclaveSession,
    InvalidArgumentError,
    LaunchCancelledError,
    OutputProxy,
    Rootfs,
    SessionTimeoutError,
    SessionTimeouts,
    SignalHandler,
)

TERM = int(signal.SIGTERM)


@pytest.fixture
def own_handler():
    """A handler of the embedding program's; yields what it got. It must be back afterwards."""
    got = []

    def handle(number, _):
        got.append(number)

    old = signal.signal(signal.SIGTERM, handle)
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1
    yield got
    assert signal.getsignal(signal.SIGTERM) is handle
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGTERM, old)


class Acting:
    """Does something in another thread once a guest is at a point. A context manager."""

    def __init__(self, guest, point, act):
        self.at = None

        def wait_and_act():
            if guest.reached[point].wait(20):
                self.at = time.monotonic()
                act()

        self._thread = threading.Thread(target=wait_and_act)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._thread.join()


def raise_sigterm():
    """Send this process SIGTERM, from whichever thread."""
    os.kill(os.getpid(), signal.SIGTERM)


ORIGINS = ["signal", "terminate"]


def act_of(origin, session):
    """Return what asks the session to end."""
    return raise_sigterm if origin == "signal" else session.terminate


@pytest.mark.parametrize("origin", ORIGINS)
def test_sigterm_reaches_the_guest_once(place, own_handler, origin):
    """From the kernel and from another thread; the program's own handler hears nothing of it."""
    guest = {"program": until_terminated, "keeps": ("signal",)}
    with place.running(guest=guest) as (session, started):
        with Acting(started, "running", act_of(origin, session)):
            ended = session.run_sync()
        started.result()
    assert started.signals == [TERM]
    assert ended.terminated
    assert own_handler == []
    raise_sigterm()
    assert own_handler == [TERM]


@pytest.mark.parametrize("times", [1, 2, 5, 1000])
def test_each_terminate_is_written_once(place, times):
    """However many, from several threads."""
    ready = threading.Event()

    def program(guest):
        ready.set()
        for _ in range(times):
            guest.wait_for_signal()

    with place.running(guest={"program": program, "keeps": ("signal",)}) as (session, started):

        def ask(count):
            ready.wait(20)
            for _ in range(count):
                session.terminate()

        threads = [threading.Thread(target=ask, args=(times // 2,)) for _ in range(2)]
        threads.append(threading.Thread(target=ask, args=(times % 2,)))
        for thread in threads:
            thread.start()
        ended = session.run_sync()
        for thread in threads:
            thread.join()
        started.result()
    assert started.signals == [TERM] * times
    assert ended.terminated


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("point", [p for p in POINTS if p not in ("net", "answered")])
def test_sigterm_at_each_step(place, own_handler, origin, point):
    """It cancels a launch; later it is written as soon as the guest is there, or is too late."""
    program = until_terminated if point in (*BEFORE_RUNNING, "running") else None
    at = {} if point == "running" else {point: stall}
    guest = {"program": program, "at": at, "keeps": ("signal",)}
    before = signal.getsignal(signal.SIGTERM)
    with place.running(guest=guest) as (session, started):

        def act():
            lent = lambda: signal.getsignal(signal.SIGTERM) is not before  # noqa: E731
            wait_until(lent, what="lending the signal")
            act_of(origin, session)()
            started.let_go()

        ended = error = None
        with Acting(started, point, act):
            try:
                ended = session.run_sync()
            except LaunchCancelledError as caught:
                error = caught
        started.finish()
    if error is not None:
        # The tiny launch goes out with the ready byte: from then on there may be a program.
        assert point in ("connect", "handshake")
        assert started.signals == []
    elif point in (*BEFORE_RUNNING, "running"):
        assert ended.terminated
        assert started.signals == [TERM]
    else:
        assert ended.terminated >= bool(started.signals)
        assert len(started.signals) <= 1
    assert own_handler == []


BEFORE_RUNNING = (
    "connect",
    "handshake",
    "arguments",
    "rootfs",
    "finished",
    "closed",
    "output",
    "mtu",
    "signal",
)


def test_sigterm_in_the_middle_of_a_long_launch_cancels_it(place, own_handler):
    """No program runs yet that could end by itself; the error says how far it was."""
    writer = EnclaveArgsWriter(Rootfs.from_bytes(bytes(64 << 20)), "/a", ["/a"], {"A": "1"})
    guest = {"at": {"rootfs": stall}}
    with place.running(writer=writer, preflight=False, guest=guest) as (session, started):
        with Acting(started, "rootfs", raise_sigterm) as acting:
            with pytest.raises(LaunchCancelledError) as caught:
                session.run_sync()
            assert time.monotonic() - acting.at < SOON
    assert caught.value.stage == "rootfs"
    assert 0 < caught.value.bytes_sent < caught.value.total
    assert caught.value.must_terminate_enclave


def test_guest_that_takes_no_end_is_bounded_by_stop(place):
    """After SIGTERM at the very end of a launch: the guest never closes its arguments."""
    guest = {"at": {"arguments": stall}}
    timeouts = SessionTimeouts(launch=30, stop=0.3)
    with place.running(guest=guest, timeouts=timeouts) as (session, started):
        with Acting(started, "arguments", session.terminate) as acting:
            with pytest.raises(SessionTimeoutError, match="after SIGTERM") as caught:
                session.run_sync()
            assert time.monotonic() - acting.at < SOON
    assert caught.value.stage == "stop"
    assert caught.value.must_terminate_enclave


def test_terminate_before_the_launch_cancels_it(place):
    """It is remembered."""
    with place.session() as session:
        session.terminate()
        with pytest.raises(LaunchCancelledError):
            session.run_sync()


def test_signal_that_could_not_be_written_is_not_told_as_written(place):
    """The guest has closed its signal connection before."""
    guest = {"at": {"code": stall}}  # it is closed by then
    with place.running(guest=guest) as (session, started):
        with Acting(
            started,
            "code",
            lambda: (
                wait_until(lambda: session._signal.gone, what="the guest's end"),
                session.terminate(),
                wait_until(lambda: session._forwarded, what="the forwarding"),
                started.let_go(),
            ),
        ):
            ended = session.run_sync()
    assert not ended.terminated


def test_signals_of_ones_choice_are_passed_on_as_sigterm(place):
    """SIGINT and SIGUSR1, say; none with an empty list."""
    guest = {"program": until_terminated, "keeps": ("signal",)}
    for number in (signal.SIGINT, signal.SIGUSR1):
        before = signal.getsignal(number)
        with place.running(SignalHandler((number, number)), guest=guest) as (session, started):
            with Acting(started, "running", lambda n=number: os.kill(os.getpid(), n)):
                ended = session.run_sync()
            started.result()
        assert started.signals == [TERM]
        assert ended.terminated
        assert signal.getsignal(number) == before


def test_without_signals_the_programs_own_handler_stays(place, own_handler):
    """`SignalHandler(())`: the program decides."""
    guest = {"program": until_terminated}
    with place.running(SignalHandler(()), guest=guest) as (session, started):
        with Acting(
            started,
            "running",
            lambda: (raise_sigterm(), wait_until(lambda: own_handler), session.terminate()),
        ):
            assert session.run_sync().terminated
    assert own_handler == [TERM]


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (0,), (-1,), (1000,), ("TERM",), 15, None])
def test_signals_that_cannot_be_handled_are_refused(signals):
    """Before there is a session."""
    with pytest.raises(InvalidArgumentError, match="signals"):
        SignalHandler(signals)


@pytest.mark.parametrize("how", ["error", "callback", "cancel"])
def test_own_handler_is_back_after_a_session_that_failed(place, own_handler, how):
    """Whatever ended it."""

    def fall(_line):
        raise ZeroDivisionError

    with place.running(OutputProxy(fall), guest={"says": b"x\n", "status": 0x7F}) as (session, _):
        if how == "cancel":
            session.cancel()
        if how == "error":
            session.timeouts = SessionTimeouts(launch=0)
        with pytest.raises((ZeroDivisionError, Exception)):
            session.run_sync()
    raise_sigterm()
    assert own_handler == [TERM]


def test_handler_the_program_sets_meanwhile_stays(place):
    """A callback of the session installs another: it is not undone."""
    old = signal.getsignal(signal.SIGTERM)
    mine = []

    def install(_line):
        signal.signal(signal.SIGTERM, lambda *_: mine.append(1))

    try:
        place.run(OutputProxy(install), guest={"says": b"x\n"})
        raise_sigterm()
        assert mine == [1]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_programs_wake_up_descriptor_is_back_and_gets_its_own_signals(place):
    """It hears of signals that are not lent, also while a session runs, and of no others."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert signal.set_wakeup_fd(writing) == -1
    guest = {"program": until_terminated, "keeps": ("signal",)}
    with place.running(guest=guest) as (session, started):
        with Acting(
            started,
            "running",
            lambda: (os.kill(os.getpid(), signal.SIGUSR1), raise_sigterm()),
        ):
            session.run_sync()
    assert signal.set_wakeup_fd(-1) == writing
    assert os.read(reading, 100) == bytes([signal.SIGUSR1])
    signal.signal(signal.SIGUSR1, old)
    os.close(reading)
    os.close(writing)


def test_session_within_a_callback_of_another_shares_its_signals(uds, own_handler):
    """Both are told; the handlers come back with the last."""
    outer, inner = Place(CID, uds), Place(CID + 100, uds)
    inner_guests = []

    def run_another(_line):
        with inner.running(guest={"program": until_terminated, "keeps": ("signal",)}) as (
            session,
            started,
        ):
            inner_guests.append(started)
            with Acting(started, "running", raise_sigterm):
                assert session.run_sync().terminated
        assert own_handler == []

    def program(guest):
        guest.output.sendall(b"go\n")
        guest.wait_for_signal()

    guest = {"program": program, "keeps": ("signal",)}
    with outer.running(OutputProxy(run_another), guest=guest) as (session, started):
        ended = session.run_sync()
        started.result()
    assert ended.terminated
    assert (started.signals, inner_guests[0].signals) == ([TERM], [TERM])


def test_sigterm_at_any_moment_is_neither_lost_nor_doubled(place, own_handler):
    """Random moments over whole sessions: it cancels the launch, or the guest has it once.

    Or it came too late, and was the session's or the program's.
    """
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    outcomes = {"cancelled": 0, "written": 0, "late": 0, "own": 0}
    writer = small_writer()

    def seen_all():
        return outcomes["written"] > 10 and outcomes["cancelled"] + outcomes["own"] > 0

    for number in range(2000):
        if number >= 200 and seen_all():
            break
        own_handler.clear()
        delay = rng.random() * 0.02
        done = threading.Event()

        def program(guest, done=done):
            guest.signal.settimeout(0.002)
            with contextlib.suppress(TimeoutError):
                data = guest.signal.recv(4)
                guest.signals.append(INT.unpack(data)[0])
            guest.signal.settimeout(60)

        with place.running(writer=writer, guest={"program": program, "keeps": ("signal",)}) as (
            session,
            started,
        ):
            signal.setitimer(signal.ITIMER_REAL, 0)
            killer = threading.Timer(delay, raise_sigterm)
            killer.start()
            ended = error = None
            try:
                ended = session.run_sync()
            except LaunchCancelledError as caught:
                error = caught
            killer.join()
            started.finish()
        context = (seed, ended, error, started.signals, own_handler)
        assert len(started.signals) <= 1, context
        if error is not None:
            assert started.signals == [], context
            assert own_handler == [], context
            outcomes["cancelled"] += 1
        elif own_handler:
            assert started.signals == [], context
            assert not ended.terminated, context
            outcomes["own"] += 1
        elif started.signals:
            assert ended.terminated, context
            outcomes["written"] += 1
        else:
            outcomes["late"] += 1
    assert seen_all(), outcomes


def test_sigterm_is_never_late(place):
    """A signal between Python's last look and the poll wakes it: each of a thousand is on time."""
    rounds = 1000
    delays = []

    def program(guest):
        for number in range(rounds):
            if number % 7 == 0:
                guest.output.sendall(b"x")  # the loop is busy around the signal
            began = time.monotonic()
            raise_sigterm()
            guest.wait_for_signal(2 * SOON)
            delays.append(time.monotonic() - began)

    ended, _ = place.run(OutputProxy(Lines()), guest={"program": program})
    assert ended.terminated
    assert len(delays) == rounds
    assert max(delays) < SOON
    assert sorted(delays)[rounds // 10] < 0.02


@pytest.mark.parametrize("way", ["plain", "asyncio"])
def test_sigterm_that_interrupts_nothing_is_passed_on_at_once(place, way):
    """The kernel gives it to another thread: this one's poll is woken by the descriptor alone."""
    delays = []

    def program(guest):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for _ in range(5):
            wait_until(lambda: is_asleep(main), what="the poll")
            began = time.monotonic()
            raise_sigterm()
            guest.wait_for_signal(2 * SOON)
            delays.append(time.monotonic() - began)

    main = threading.get_native_id()
    with place.session() as session:
        guest = place.guest(program=program)
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            ended = asyncio.run(session.run()) if way == "asyncio" else session.run_sync()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
    guest.result()
    assert ended.terminated
    assert len(delays) == 5
    assert max(delays) < SOON


def is_asleep(thread):
    """Whether a thread of this process waits for something."""
    with open(f"/proc/self/task/{thread}/stat") as file:
        return file.read().rpartition(") ")[2][0] == "S"


# -- under asyncio


def test_sigterm_under_asyncio_reaches_the_guest(place, own_handler):
    """asyncio.run in the main thread: passed on, and the program's handler is back afterwards."""
    guest = {"program": until_terminated, "keeps": ("signal",)}
    with place.running(guest=guest) as (session, started):
        with Acting(started, "running", raise_sigterm):
            ended = asyncio.run(session.run())
        started.result()
    assert ended.terminated
    assert started.signals == [TERM]
    assert own_handler == []


def test_sigterm_is_never_late_under_asyncio(place):
    """The loop waits in its own poll, and is woken all the same."""
    rounds = 1000
    delays = []

    def program(guest):
        for _ in range(rounds):
            began = time.monotonic()
            raise_sigterm()
            guest.wait_for_signal(2 * SOON)
            delays.append(time.monotonic() - began)

    with place.running(guest={"program": program}) as (session, _):
        assert asyncio.run(session.run()).terminated
    assert len(delays) == rounds
    assert max(delays) < SOON


def test_asyncio_programs_own_handler_is_not_called_meanwhile(place):
    """loop.add_signal_handler's: not while it is lent; again afterwards."""
    calls = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, calls.append, "own")
        loop.add_signal_handler(signal.SIGUSR1, calls.append, "usr1")
        try:
            guest = {"program": until_terminated, "keeps": ("signal",)}
            with place.running(guest=guest) as (session, started):
                with Acting(
                    started,
                    "running",
                    lambda: (os.kill(os.getpid(), signal.SIGUSR1), raise_sigterm()),
                ):
                    ended = await session.run()
                assert started.signals == [TERM]
            for _ in range(10):
                await asyncio.sleep(0)
            assert calls == ["usr1"]
            raise_sigterm()
            while len(calls) < 2:
                await asyncio.sleep(0.001)
            return ended
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            loop.remove_signal_handler(signal.SIGUSR1)

    assert asyncio.run(asyncio.wait_for(main(), 20)).terminated
    assert calls == ["usr1", "own"]


@pytest.mark.parametrize("first", [0, 1])
def test_overlapping_sessions_end_in_any_order(uds, own_handler, first):
    """Each SIGTERM goes to those that run; the handler comes back with the last one."""

    async def main():
        places = [Place(CID, uds), Place(CID + 100, uds)]
        with contextlib.ExitStack() as stack:
            sessions, guests = zip(
                *(
                    stack.enter_context(
                        p.running(guest={"program": until_terminated, "keeps": ("signal",)})
                    )
                    for p in places
                ),
                strict=True,
            )
            tasks = [asyncio.ensure_future(session.run()) for session in sessions]
            for guest in guests:
                while not guest.reached["running"].is_set():
                    await asyncio.sleep(0.001)
            sessions[first].terminate()
            assert (await tasks[first]).terminated
            assert not tasks[1 - first].done()
            assert own_handler == []
            raise_sigterm()
            assert (await asyncio.wait_for(tasks[1 - first], 10)).terminated
            assert own_handler == []
            return [guest.result().signals for guest in guests]

    assert asyncio.run(main()) == [[TERM], [TERM]]


def test_session_in_another_thread_leaves_signals_alone(place, own_handler):
    """Python allows handlers in the main thread only; `terminate` works from there."""
    guest = {"program": until_terminated, "keeps": ("signal",)}
    outcomes = []
    with place.running(guest=guest) as (session, started):
        thread = threading.Thread(target=lambda: outcomes.append(session.run_sync()))
        thread.start()
        assert started.reached["running"].wait(20)
        raise_sigterm()
        assert own_handler == [TERM]
        session.terminate()
        thread.join(20)
        assert started.result().signals == [TERM]
    assert outcomes[0].terminated


def test_default_action_is_restored(uds):
    """SIGTERM at its default ends the process again once the session is over."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            guest = session_guest.SessionGuest(uds, CID, patient=True)
            with EnclaveSession(small_writer(), CID, uds_path=uds, timeouts=PATIENT) as session:
                session.run_sync()
            guest.result()
            raise_sigterm()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
