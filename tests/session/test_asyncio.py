"""Sessions as asyncio tasks: awaited, cancelled anywhere, many at once; nothing is left."""

import asyncio
import contextlib
import gc
import threading
import time

import pytest
import session_guest
from machine import SOON, open_descriptors
from session_guest import POINTS, stall
from sessions import PATIENT, Lines, small_writer

from nitro_vsock import EnclaveSession, OutputProxy, ReturnCodeError, SessionTimeouts


def test_run_returns_the_exit_status(place):
    """The same as run_sync."""
    lines = Lines()
    with place.running(lines.proxy, guest={"says": b"hello\n", "status": 768}) as (session, guest):
        ended = asyncio.run(session.run())
        guest.result()
    assert (ended.exit_code, lines) == (3, ["hello"])


def test_errors_come_through(place):
    """A typed error of the session, and what a callback raised."""
    with place.running(guest={"status": 0x7F}) as (session, _):
        with pytest.raises(ReturnCodeError):
            asyncio.run(session.run())

    def fall(_line):
        raise ZeroDivisionError

    with place.running(OutputProxy(fall), guest={"says": b"x\n"}) as (session, _):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(session.run())


def test_error_leaves_no_cycle_to_collect(place):
    """What it refers to, sockets for instance, goes with it."""
    with place.running(guest={"status": 0x7F}) as (session, _):

        async def main():
            try:
                await session.run()
            except ReturnCodeError:
                return
            raise AssertionError

        asyncio.run(main())
    gc.collect()


def test_loop_goes_on_meanwhile(place):
    """The session is in a thread of its own."""
    ticks = []

    async def main():
        with place.running(guest={"at": {"running": stall}}) as (session, guest):
            task = asyncio.ensure_future(session.run())
            while not guest.reached["running"].is_set():
                await asyncio.sleep(0.001)
            for _ in range(50):
                ticks.append(await asyncio.sleep(0))
            guest.let_go()
            return await task

    assert asyncio.run(main()).exit_code == 0
    assert len(ticks) == 50


async def cancelled(task):
    """Cancel a task and see it end so."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("point", [p for p in POINTS if p not in ("net", "answered")])
def test_cancelling_at_each_step_cleans_up(place, point):
    """The task ends with CancelledError, soon; no thread, descriptor or socket file is left."""

    async def main():
        guest = {"at": {point: stall}, "keeps": ("output", "signal"), "says": b"x"}
        with place.running(OutputProxy(lambda _: None), guest=guest) as (session, started):
            task = asyncio.ensure_future(session.run())
            while not started.reached[point].is_set():
                await asyncio.sleep(0.0005)
            began = time.monotonic()
            if point in ("half", "status"):  # it may have ended before it could be cancelled
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            else:
                await cancelled(task)
            assert time.monotonic() - began < SOON
            assert session_threads() == []

    before = open_descriptors()
    asyncio.run(main())
    gc.collect()
    assert open_descriptors() == before


def session_threads():
    """Threads of sessions."""
    return [t for t in threading.enumerate() if t.name.startswith("nitro_vsock session")]


def test_cancelling_after_any_number_of_steps_cleans_up(place):
    """At every await: the task is cancelled after k rounds of the loop, whatever k."""

    async def attempt(rounds):
        with place.running(Lines().proxy, guest={"says": b"x"}) as (session, _):
            task = asyncio.ensure_future(session.run())
            for _ in range(rounds):
                await asyncio.sleep(0)
            ended = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert session_threads() == []
            return ended

    before = open_descriptors()
    steps = [*range(50), *(int(50 * 1.3**power) for power in range(22))]
    cancelled_ones = sum(not asyncio.run(attempt(rounds)) for rounds in steps)
    gc.collect()
    assert cancelled_ones > 20
    assert open_descriptors() == before


def test_task_cancelled_twice_waits_for_the_end_all_the_same(place):
    """A second cancellation while the thread ends does not leave it behind."""
    hold, held = threading.Event(), threading.Event()

    def block(_line):
        held.set()
        hold.wait(20)

    async def main():
        guest = {"says": b"x\n", "at": {"said": stall}}
        with place.running(OutputProxy(block), guest=guest) as (session, _):
            task = asyncio.ensure_future(session.run())
            while not held.is_set():
                await asyncio.sleep(0.001)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.01)
                assert not task.done()
            hold.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert session_threads() == []

    asyncio.run(main())


def test_timeout_of_asyncio_cancels(place):
    """asyncio.wait_for: TimeoutError, and everything is cleaned up."""

    async def main():
        with place.running(guest={"at": {"running": stall}}) as (session, _):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.run(), 0.2)
            assert session_threads() == []

    asyncio.run(main())


def test_cancelling_before_the_first_step_spends_nothing(place):
    """The session can be run afterwards."""

    async def main():
        with place.running(guest={}) as (session, _):
            task = asyncio.ensure_future(session.run())
            await cancelled(task)
            return await session.run()

    assert asyncio.run(main()).exit_code == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_loop_closed_early_ends_the_session(place):
    """The task is thrown away with its loop: the thread ends, the handlers are back."""
    import signal

    handler = signal.getsignal(signal.SIGTERM)
    with place.running(guest={"at": {"running": stall}}) as (session, guest):
        loop = asyncio.new_event_loop()
        task = loop.create_task(session.run())

        async def wait():
            while not guest.reached["running"].is_set():
                await asyncio.sleep(0.001)

        loop.run_until_complete(wait())
        loop.close()
        task._log_destroy_pending = False
        del task, loop
        gc.collect()
        assert session_threads() == []
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.set_wakeup_fd(-1) == -1


def test_sixty_four_tasks_at_once_keep_their_bytes_apart(uds):
    """One loop, each session with its own guest, output and status."""

    async def serve(cid):
        lines = Lines()
        with EnclaveSession(
            small_writer(lines.proxy), cid, uds_path=uds, timeouts=PATIENT
        ) as session:
            guest = session_guest.SessionGuest(
                uds, cid, says=b"I am %d\n" % cid * 1000, status=(cid % 200) << 8
            )
            ended = await session.run()
            guest.result()
            return set(lines), len(lines), ended.exit_code

    async def main():
        return await asyncio.gather(*(serve(16 + 10 * n) for n in range(64)))

    outcomes = asyncio.run(main())
    assert outcomes == [({f"I am {16 + 10 * n}"}, 1000, (16 + 10 * n) % 200) for n in range(64)]


def test_half_of_many_tasks_cancelled_leaves_the_others_alone(uds):
    """Sixteen sessions; eight are cancelled while they run."""

    async def serve(cid):
        with EnclaveSession(
            small_writer(), cid, uds_path=uds, timeouts=SessionTimeouts()
        ) as session:
            guest = session_guest.SessionGuest(uds, cid, at={"running": stall})
            guests.append(guest)
            try:
                return (await session.run()).exit_code
            finally:
                session.close()
                guest.finish()

    async def main():
        tasks = [asyncio.ensure_future(serve(16 + 10 * n)) for n in range(16)]
        while len(guests) < 16 or not all(g.reached["running"].is_set() for g in guests):
            await asyncio.sleep(0.001)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks[::2])
        for guest in guests:
            guest.let_go()
        return await asyncio.gather(*tasks, return_exceptions=True)

    guests = []
    outcomes = asyncio.run(main())
    assert all(isinstance(o, asyncio.CancelledError) for o in outcomes[::2])
    assert outcomes[1::2] == [0] * 8
