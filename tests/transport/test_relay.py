"""Bytes between two sockets: order, ends, failures, and no work where there is none to do."""

import contextlib
import errno
import hashlib
import os
import random
import signal
import threading
import time

import driver
import faults
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relaying import ENDED, Relayed, guard, processor_share

from nitro_vsock.core.relays import FlowState
from nitro_vsock.transport.loop import EventLoop

OPEN = (FlowState.OPEN, FlowState.OPEN)
HELD_AT_MOST = 4 << 20
"""Bytes that a direction may hold: two sockets' buffers, a pipe, and ours."""


@pytest.fixture
def relayed():
    """A relay between two ends."""
    with Relayed() as made:
        yield made


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled shim."""
    return faults.build(tmp_path_factory.getbasetemp())


SIZES = st.one_of(
    st.integers(1, 200), st.integers(1400, 1600), st.sampled_from([1 << 16, 70_000, 300_000])
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["send one", "send other", "take one", "take other"]), SIZES),
        st.just(("pump", 0)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1 << 30))
def test_bytes_arrive_unchanged_and_in_order(steps, seed):
    """Any sizes, any order of sending, relaying and taking, both ways at once."""
    noise = random.Random(seed)
    with Relayed() as relayed:
        due = {"one": bytearray(), "other": bytearray()}
        for verb, size in steps:
            if verb == "pump":
                relayed.pump()
                continue
            what, name = verb.split()
            end = getattr(relayed, name)
            if what == "take":
                end.receive(size)
            else:
                data = noise.randbytes(size)
                due[name] += data
                end.send(data)
        relayed.settle(
            lambda: (
                len(relayed.other.got) >= len(due["one"])
                and len(relayed.one.got) >= len(due["other"])
            )
        )
        assert relayed.other.got == due["one"]
        assert relayed.one.got == due["other"]
        assert (relayed.relay.there.moved, relayed.relay.back.moved) == (
            len(due["one"]),
            len(due["other"]),
        )
        assert relayed.states == OPEN


def test_streams_both_ways_at_once_from_other_threads(relayed):
    """32 MiB each way in pieces of any size, taken with pauses: the digests are equal."""
    size = 32 << 20
    ends = {"one": relayed.one.sock, "other": relayed.other.sock}
    digests = {}

    def sends(name):
        noise, left, digest = random.Random(name), size, hashlib.sha256()
        block = noise.randbytes(1 << 18)
        while left:
            piece = block[: min(left, noise.choice([4, 60, 1514, 1 << 16, 1 << 18]))]
            digest.update(piece)
            ends[name].sendall(piece)
            left -= len(piece)
        ends[name].shutdown(1)
        digests["sent", name] = digest.hexdigest()

    def takes(name):
        noise, digest = random.Random(name), hashlib.sha256()
        while data := ends[name].recv(noise.choice([1000, 1 << 16, 1 << 20])):
            digest.update(data)
            if noise.random() < 0.01:
                time.sleep(0.001)
        digests["got", name] = digest.hexdigest()

    for sock in ends.values():
        sock.settimeout(30)
    threads = [threading.Thread(target=f, args=(n,)) for f in (sends, takes) for n in ends]
    for thread in threads:
        thread.start()
    limit = guard(60)
    while relayed.states != ENDED:
        assert relayed.loop.run_once(limit) != errno.ETIME
    for thread in threads:
        thread.join(30)
    assert digests["got", "other"] == digests["sent", "one"]
    assert digests["got", "one"] == digests["sent", "other"]


@pytest.mark.parametrize("size", [0, 10, 1 << 20])
def test_end_of_one_side_is_passed_on_behind_its_bytes(relayed, size):
    """The other direction goes on; when it ends too, so does the relay."""
    relayed.one.send(b"x" * size)
    relayed.settle(lambda: not relayed.one.unsent)
    relayed.one.sock.shutdown(1)
    relayed.settle(lambda: relayed.other.ended)
    assert len(relayed.other.got) == size
    assert relayed.states == (FlowState.ENDED, FlowState.OPEN)
    assert relayed.calls == 1
    relayed.other.send(b"y" * 100_000)
    relayed.settle(lambda: len(relayed.one.got) == 100_000)
    relayed.other.sock.shutdown(1)
    relayed.settle(lambda: relayed.one.ended)
    assert relayed.states == ENDED


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_receiver_that_is_gone_is_the_receivers_failure(relayed, size):
    """EPIPE, and no SIGPIPE, by send and by splice."""
    relayed.other.sock.close()
    relayed.pump()  # its end of file
    relayed.one.send(b"x" * size)
    relayed.settle(lambda: relayed.relay.there.state is not FlowState.OPEN)
    assert relayed.relay.there.state is FlowState.TO_FAILED
    assert relayed.relay.there.error == errno.EPIPE
    assert relayed.relay.back.state is not FlowState.TO_FAILED


def test_receiver_that_goes_while_bytes_are_spliced_is_its_failure(relayed):
    """What is in the pipe then is lost, and said to be."""
    relayed.one.send(b"x" * (8 << 20))
    for _ in range(8):
        relayed.one.send()
        relayed.pump()
        relayed.other.receive(100_000)
    relayed.other.sock.close()
    relayed.settle(lambda: relayed.relay.there.state is not FlowState.OPEN)
    assert relayed.relay.there.state is FlowState.TO_FAILED
    assert relayed.relay.there.error in (errno.EPIPE, errno.ECONNRESET)


def test_sender_that_is_reset_is_the_senders_failure(relayed):
    """A Unix socket closed with unread bytes resets its peer; what it had sent still arrives."""
    relayed.other.send(b"never read")
    relayed.settle(lambda: relayed.relay.back.moved == 10 and not relayed.one.ended)
    relayed.other.send(b"nor this")
    relayed.pump()
    reset, unread = relayed.one.sock, relayed.relay.back.moved
    assert unread == 18
    reset.close()
    relayed.pump(3)
    assert relayed.relay.there.state is FlowState.FROM_FAILED
    assert relayed.relay.there.error == errno.ECONNRESET


def test_nobody_reading_holds_the_writer_back(relayed):
    """The relay keeps a bounded number of bytes, and goes on where it was."""
    taken = 0
    for _ in range(50):
        taken += relayed.one.fill()
        relayed.pump()
    assert relayed.one.fill() == 0
    assert 0 < taken <= HELD_AT_MOST
    relayed.settle(lambda: len(relayed.other.got) == taken)


def test_one_direction_that_stands_does_not_hold_up_the_other(relayed):
    """The guest's frames flow though the backend's are not taken."""
    for _ in range(50):
        relayed.one.fill()
        relayed.pump()
    relayed.other.send(b"z" * 500_000)
    end = time.monotonic() + 10
    while len(relayed.one.got) < 500_000 and time.monotonic() < end:
        relayed.other.send()
        relayed.pump()
        relayed.one.receive()
    assert len(relayed.one.got) == 500_000


def stuff(relayed):
    """Fill every buffer from one to other."""
    for _ in range(50):
        relayed.one.fill()
        relayed.pump()


def is_idle(_relayed):
    """Nothing has ever come."""


def has_spoken(relayed):
    """Bytes came a moment ago: the spin must end."""
    relayed.one.send(b"x")
    relayed.other.send(b"y")
    relayed.pump()


def is_full(relayed):
    """Bytes are held, and nobody takes them."""
    stuff(relayed)


def is_full_and_ended(relayed):
    """The sender has ended and closed, and what it had sent is not taken."""
    stuff(relayed)
    relayed.one.sock.shutdown(1)


def is_full_and_hung_up(relayed):
    """The sender is gone, and what it had sent is not taken."""
    stuff(relayed)
    relayed.one.sock.close()


def is_half_closed(relayed):
    """One direction has ended, the other is open and silent."""
    relayed.one.sock.shutdown(1)
    relayed.pump(3)
    assert relayed.relay.there.state is FlowState.ENDED


def is_half_closed_and_full(relayed):
    """One direction is full, the other has ended."""
    relayed.other.sock.shutdown(1)
    stuff(relayed)
    assert relayed.relay.back.state is FlowState.ENDED


def has_failed_one_way(relayed):
    """The receiver takes no more and says nothing more, and the sender goes on."""
    relayed.other.sock.shutdown(0)
    relayed.one.send(b"x")
    relayed.pump(3)
    assert relayed.relay.there.state is FlowState.TO_FAILED
    relayed.one.send(b"x")


def ended_both_ways(relayed):
    """Everything is over, and the caller has not closed the relay."""
    relayed.one.sock.close()
    relayed.other.sock.close()
    relayed.pump(5)


@pytest.mark.parametrize(
    "state",
    [
        is_idle,
        has_spoken,
        is_full,
        is_full_and_ended,
        is_full_and_hung_up,
        is_half_closed,
        is_half_closed_and_full,
        has_failed_one_way,
        ended_both_ways,
    ],
)
def test_waiting_takes_no_processor_time(relayed, state):
    """In no state that lasts does the relay look again and again."""
    state(relayed)
    assert processor_share(relayed.loop) < 0.1


@contextlib.contextmanager
def carousel():
    """Yield a loop in which bytes go round for ever, so that it never waits."""
    loop = EventLoop()
    with Relayed(loop) as one:
        other = loop.relay(one.one.sock, one.other.sock, lambda _: None)
        one.relayed[0].send(b"x" * 1000)  # to one.one, and from there on
        loop.poll()
        yield loop, one
        assert other.there.moved > 100_000, "it stands"


def test_deadline_is_noticed_in_a_stream_that_never_waits():
    """Bytes go in a circle; the deadline ends it all the same."""
    with carousel() as (loop, _):
        began = time.monotonic()
        limit = guard(0.3)
        while loop.run_once(limit) != errno.ETIME:
            assert time.monotonic() < began + 5
        assert 0.25 < time.monotonic() - began < 1


def test_cancel_is_noticed_in_a_stream_that_never_waits():
    """A descriptor that another thread makes readable."""
    reading, writing = os.pipe()
    with carousel() as (loop, _):
        timer = threading.Timer(0.2, os.write, (writing, b"x"))
        timer.start()
        began = time.monotonic()
        limit = guard(5, reading)
        while loop.run_once(limit) != errno.ECANCELED:
            assert time.monotonic() < began + 4
        timer.join()
    os.close(reading)
    os.close(writing)


def test_watched_descriptor_is_not_starved_by_a_stream_that_never_waits():
    """Its callback is called soon after it is readable."""
    reading, writing = os.pipe()
    with carousel() as (loop, _):
        seen = []
        loop.watch(reading, 1, lambda _: seen.append(time.monotonic()))
        loop.run_once(guard(0.1))
        began = time.monotonic()
        os.write(writing, b"x")
        limit = guard(5)
        while not seen:
            assert loop.run_once(limit) != errno.ETIME
        assert seen[0] - began < 0.5
        loop.unwatch(reading)
    os.close(reading)
    os.close(writing)


def test_signal_handler_runs_in_a_stream_that_never_waits():
    """No system call is interrupted then, and nobody watches a wake-up descriptor."""

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with carousel() as (loop, _):
            limit = guard(5)
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(StopError):
                while loop.run_once(limit) != errno.ETIME:
                    pass
            assert time.monotonic() - began < 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def relays(shim, plans, **more):
    """Relay in a child until no plan strikes any more."""
    results = driver.run(driver.relays, shim=shim, plans=plans, **more)
    for result in results:
        assert result["leaked"] == [], result
        assert result["mask_kept"], result
        assert not result["sigpipe_pending"], result
    return results


def plan(call, value, action="fail"):
    """Return a plan for the shim."""
    return {"call": call, "action": action, "value": value}


@pytest.mark.parametrize("code", ["EINTR", "EAGAIN"])
def test_interrupted_and_spurious_calls_change_nothing(shim, code):
    """At every turn of every call that moves bytes or waits."""
    results = relays(shim, [plan(call, code) for call in ("recv", "send", "splice", "ppoll")])
    assert {result["call"] for result in results} == {"recv", "send", "splice", "ppoll"}
    assert all(result["right"] for result in results), results


def test_transfers_of_one_byte_are_continued(shim):
    """A count of 1 at any transfer changes nothing."""
    results = relays(shim, [plan(call, 0, "short") for call in ("recv", "send", "splice")])
    assert {result["call"] for result in results} == {"recv", "send", "splice"}
    assert all(result["right"] for result in results), results


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_refused_splice_goes_on_by_copying(shim, code):
    """Into the pipe or out of it: what is in there is read and sent."""
    results = relays(shim, [plan("splice", code)])
    assert len(results) >= 4
    assert all(result["right"] for result in results), results


@pytest.mark.parametrize("call", ["recv", "send", "splice", "shutdown"])
def test_failing_call_fails_one_direction_with_its_code(shim, call):
    """Which of the two sockets it was is told apart, and the other direction's bytes arrive."""
    results = relays(shim, [plan(call, "EIO")])
    assert results
    states = set()
    for result in results:
        failed = [state for state in result["states"] if state.endswith("FAILED")]
        assert (len(failed), result["errors"]) == (1, ["EIO"]), result
        states.update(failed)
    assert (
        states
        == {
            "recv": {"FROM_FAILED"},
            "send": {"TO_FAILED"},
            "splice": {"FROM_FAILED", "TO_FAILED"},
            "shutdown": {"TO_FAILED"},
        }[call]
    )


def test_broken_splice_raises_no_sigpipe(shim):
    """The kernel raises it and returns the count."""
    results = relays(shim, [plan("splice", 0, "broken")])
    assert results
    assert all(result["right"] for result in results), results


def frame(size, noise):
    """Return a frame with its length."""
    return size.to_bytes(4, "big") + noise.randbytes(size)


def whole(data):
    """Whether these bytes are frames and nothing else."""
    while data:
        size = 4 + int.from_bytes(data[:4], "big")
        if len(data) < size:
            return False
        data = data[size:]
    return True


@settings(deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 200), st.integers(1400, 1600), st.just(9014))),
    cuts=st.lists(st.one_of(st.integers(1, 8), st.integers(1, 40_000)), min_size=1),
    takes=st.lists(st.booleans(), min_size=1),
    seed=st.integers(0, 1 << 30),
)
def test_frames_arrive_whole_however_they_are_sent(sizes, cuts, takes, seed):
    """Whatever has arrived is whole frames, also where the other side takes nothing for a while."""
    noise = random.Random(seed)
    stream = b"".join(frame(size, noise) for size in sizes)
    with Relayed(whole_frames=9014) as relayed:
        sent = turn = 0
        while sent < len(stream):
            piece = stream[sent : sent + cuts[turn % len(cuts)]]
            relayed.one.send(piece)
            sent += len(piece)
            relayed.pump()
            if takes[turn % len(takes)]:
                relayed.other.receive()
                assert whole(bytes(relayed.other.got))
            turn += 1
        relayed.settle(lambda: len(relayed.other.got) == len(stream))
        assert relayed.other.got == stream
        assert relayed.states == OPEN


def test_full_backend_gets_whole_frames_all_the_same():
    """Each send fits or does not: what is in the backend's socket never ends within a frame."""
    noise = random.Random(0)
    stream = b"".join(frame(1514, noise) for _ in range(4000))
    with Relayed(whole_frames=1514) as relayed:
        relayed.one.send(stream)
        while len(relayed.other.got) < len(stream):
            relayed.pump(20)
            relayed.other.receive()
            relayed.one.send()
            assert len(relayed.other.got) % 1518 == 0
        assert relayed.other.got == stream


def test_frame_beyond_the_limit_fails_its_direction():
    """Its length is refused as soon as it is there; what came before it is not lost."""
    with Relayed(whole_frames=1514) as relayed:
        relayed.one.send(frame(60, random.Random(0)) + (1515).to_bytes(4, "big"))
        relayed.settle(lambda: relayed.calls)
        relayed.other.receive()
        assert len(relayed.other.got) == 64
        assert relayed.states == (FlowState.FROM_FAILED, FlowState.OPEN)
        assert relayed.relay.there.error == errno.EMSGSIZE


def test_end_within_a_frame_is_passed_on_with_its_beginning():
    """Not a byte is swallowed."""
    with Relayed(whole_frames=1514) as relayed:
        relayed.one.send(frame(60, random.Random(0)) + b"\0\0\1")
        relayed.settle(lambda: len(relayed.other.got) == 64)
        relayed.one.sock.shutdown(1)
        relayed.settle(lambda: relayed.other.ended)
        assert len(relayed.other.got) == 67
        assert relayed.states == (FlowState.ENDED, FlowState.OPEN)
