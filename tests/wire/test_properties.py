"""Properties of frames and of the archive check that hold for any input, searched by Hypothesis."""

import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tar_strategies import broken_archives
from vectors.walker import check_packets

from nitro_vsock import (
    AppOutput,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    FrameDecoder,
    GuestRuleError,
    InvalidArgumentError,
    Limits,
    NetworkProxy,
    ProtocolError,
    RootFilesystem,
    RootfsData,
)
from nitro_vsock.archive.rules import TarChecker
from nitro_vsock.wire.frames import encode_packets

text = st.binary(min_size=1, max_size=40).map(lambda data: data.replace(b"\0", b"0"))
sized = st.integers(1, 4000).map(lambda size: b"x" * size)
strings = st.lists(text | sized, min_size=1, max_size=12).map(tuple)


@st.composite
def launches(draw):
    """A launch's frames in any order, and its archive."""
    archive = draw(st.binary(min_size=1, max_size=200))
    frames = [
        ExecPath(draw(text | sized)),
        ExecArgv(draw(strings)),
        ExecEnvp(draw(strings)),
        *draw(st.lists(st.sampled_from([NetworkProxy(), AppOutput()]), unique=True)),
    ]
    return [*draw(st.permutations(frames)), RootFilesystem(len(archive))], archive


def decode(pieces, limits=None):
    """Return (frames, archive, decoder) of bytes in pieces."""
    decoder = FrameDecoder(limits or Limits())
    frames, archive = [], b""
    for piece in pieces:
        for event in decoder.feed(piece):
            if isinstance(event, RootfsData):
                archive += event.data
            else:
                frames.append(event)
    return frames, archive, decoder


def cut(stream, points):
    """Cut at the points, wherever they are."""
    bounds = [0, *sorted(point % (len(stream) + 1) for point in points), len(stream)]
    return [stream[begin:end] for begin, end in pairwise(bounds)]


points = st.lists(st.integers(0, 1 << 20), max_size=12)


@given(launches(), points, st.binary(max_size=20))
def test_launch_survives_packets_and_any_cut(launch, where, junk):
    """Encoded, cut into sends, cut again anywhere, followed by junk: the same frames come out."""
    args, archive = launch
    packets = encode_packets(args)
    assert check_packets(packets) == b"".join(arg.encode() for arg in args)
    stream = b"".join(packets) + archive + Finished().encode()
    for pieces in (
        [*packets, archive, b"\xff"],
        cut(stream, where),
        [stream[at : at + 1] for at in range(len(stream))],
        cut(stream + junk, where),
    ):
        frames, got, decoder = decode(pieces)
        assert (frames, got) == ([*args, Finished()], archive)
        assert decoder.taken == len(stream)
        assert decoder.taken + decoder.trailing == sum(map(len, pieces))
        decoder.end()


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=60), st.booleans())
@example([3543, 199], False)
@example([1] * 1500, True)
def test_no_send_ends_inside_a_number(sizes, flagged):
    """For argument lists of any sizes every send keeps the guest's limits."""
    flags = [NetworkProxy(), AppOutput()] if flagged else []
    argv = ExecArgv(tuple(b"x" * size for size in sizes))
    args = [*flags, ExecPath(b"/a"), argv, ExecEnvp((b"A=1",)), RootFilesystem(1 << 40)]
    check_packets(encode_packets(args))


@given(st.integers(0, 1 << 18), st.integers(1, 4000))
def test_arguments_are_refused_exactly_past_the_window(total, size):
    """Above 256 KiB encoded a list is refused, below it is not."""
    argv = ExecArgv((b"x" * size,) * (total // size + 1))
    length = len(argv.encode())
    if length <= 256 * 1024:
        assert sum(map(len, encode_packets([argv]))) == length
    else:
        with pytest.raises(InvalidArgumentError):
            encode_packets([argv])


number = st.integers(0, (1 << 64) - 1) | st.integers(0, 40)
piece = (
    st.binary(max_size=30)
    | number.map(lambda value: struct.pack("<Q", value))
    | st.sampled_from([bytes([frame]) for frame in (0, 1, 2, 3, 4, 5, 255)])
    | text.map(lambda data: ExecPath(data).encode())
    | strings.map(lambda items: ExecArgv(items).encode())
)


@given(st.lists(piece, max_size=12).map(b"".join), points)
def test_any_bytes_give_events_or_a_protocol_error(stream, where):
    """No other exception, the same verdict however cut, and no byte counted twice."""

    def verdict(pieces):
        try:
            frames, archive, decoder = decode(pieces)
            assert decoder.taken + decoder.trailing == len(stream)
            decoder.end()
        except ProtocolError as error:
            return type(error), str(error)
        return frames, archive

    whole = verdict([stream])
    assert verdict(cut(stream, where)) == whole
    assert verdict([stream[at : at + 1] for at in range(len(stream))]) == whole


@settings(max_examples=40)
@given(
    st.sampled_from([b"\0", b"\1", b"\2", b"\3", b"\2" + struct.pack("<Q", 5)]),
    st.integers(1 << 20, (1 << 64) - 1),
)
@example(b"\1", 1 << 63)
@example(b"\2", 1 << 61)
def test_no_number_makes_the_decoder_allocate(begin, claimed):
    """Memory follows what arrived, not what a length or count says."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([begin + struct.pack("<Q", claimed), bytes(1000)], Limits(rootfs_bytes=1 << 20))
            assume(False)  # a length of exactly the limit
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def tar_verdict(pieces):
    """Return what the archive check says."""
    checker = TarChecker()
    try:
        for data in pieces:
            checker.feed(memoryview(data))
        checker.finish()
    except GuestRuleError as error:
        return str(error)
    return checker.members


@given(broken_archives(), points)
def test_any_archive_gets_a_verdict_however_it_is_cut(data, where):
    """The archive check raises nothing but GuestRuleError, and cuts do not change its mind."""
    assert tar_verdict(cut(data, where)) == tar_verdict([data])


@given(st.binary(min_size=1, max_size=1500).filter(any))
def test_bytes_that_are_no_archive_are_refused(data):
    """Noise is not taken for a tar."""
    assert isinstance(tar_verdict([data]), str)
