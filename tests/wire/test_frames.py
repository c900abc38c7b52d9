"""Frames against golden bytes: encoding, the cut into sends, incremental decoding, refusals."""

import struct
import tracemalloc

import pytest
from vectors import golden, sends
from vectors.walker import check_packets, number_fields

from nitro_vsock import (
    AppOutput,
    BadStringError,
    DuplicateFrameError,
    EarlyEndError,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    FrameDecoder,
    FrameId,
    InvalidArgumentError,
    LimitExceededError,
    Limits,
    MissingFrameError,
    NetworkProxy,
    RootFilesystem,
    RootfsData,
    UnknownFrameError,
)
from nitro_vsock.wire.frames import encode_packets

ARGUMENTS_LIMIT = 256 * 1024

PATH = ExecPath(b"/bin/app")
ENVP = ExecEnvp((b"A=1",))
ROOTFS = RootFilesystem(1)

FRAMES = {
    "root_filesystem": RootFilesystem(0x0102030405060708),
    "exec_path": PATH,
    "exec_argv": ExecArgv((b"/bin/app", b"a b", b"", "é".encode())),
    "exec_envp": ExecEnvp((b"PATH=/bin", b"A=" + b"x" * 298)),
    "network_proxy": NetworkProxy(),
    "app_output": AppOutput(),
    "finished": Finished(),
}

LAUNCH = [
    NetworkProxy(),
    AppOutput(),
    PATH,
    ExecArgv((b"/bin/app", b"a b")),
    ExecEnvp((b"PATH=/bin", b"A=1")),
    RootFilesystem(16),
]

CUT = {
    "launch": LAUNCH,
    "cut_before_length": [
        NetworkProxy(),
        PATH,
        ExecArgv((b"a" * 3543, b"b" * 199, b"c")),
        ENVP,
        RootFilesystem(6 << 30),
    ],
    "last_of_64": [ExecPath(b"/a"), ExecArgv((b"b" * 3540,)), ENVP, ROOTFS],
}


def decode(data, step=None, limits=None):
    """Feed all of `data`, `step` bytes at a time; return (events, decoder)."""
    decoder = FrameDecoder(*([limits] if limits else []))
    events = []
    for begin in range(0, len(data), step or len(data)):
        for event in decoder.feed(data[begin : begin + (step or len(data))]):
            if isinstance(event, RootfsData):
                event = bytes(event.data)
            if isinstance(event, bytes) and events and isinstance(events[-1], bytes):
                event = events.pop() + event
            events.append(event)
    return events, decoder


@pytest.mark.parametrize("name", FRAMES)
def test_frame_encodes_to_its_golden_bytes(name):
    """Each frame's bytes are those written down by hand."""
    assert FRAMES[name].encode() == golden(name)


@pytest.mark.parametrize("name", CUT)
def test_frames_are_cut_into_the_golden_sends(name):
    """The sends of a launch's arguments end where the vector says."""
    expected = sends(name)[:1] if name == "launch" else sends(name)
    assert encode_packets(CUT[name]) == expected


@pytest.mark.parametrize("step", [None, 1, 2, 7, 8, 9])
def test_golden_launch_decodes_however_it_is_cut(step):
    """Whole, byte by byte and in odd pieces: the same events in the same order."""
    events, decoder = decode(golden("launch"), step)
    assert events == [*LAUNCH, sends("launch")[1], Finished()]
    assert decoder.finished
    assert decoder.trailing == 0
    assert decoder.taken == len(golden("launch"))
    assert [int(frame) for frame in decoder.seen] == [4, 5, 1, 2, 3, 0, 255]
    decoder.end()


@pytest.mark.parametrize("step", [None, 1])
def test_bytes_after_finished_are_counted_and_not_decoded(step):
    """Junk after Finished changes nothing but `trailing`, whichever feed brings it."""
    junk = b"\x00\x01\xffjunk"
    events, decoder = decode(golden("launch") + junk, step)
    assert events[-1] == Finished()
    assert decoder.trailing == len(junk)
    assert decoder.taken == len(golden("launch"))
    assert decoder.need == 0
    assert list(decoder.feed(b"more")) == []
    assert decoder.trailing == len(junk) + 4


def test_rootfs_pieces_are_views_of_what_was_fed():
    """The archive passes through without a copy."""
    data = golden("launch")
    pieces = [event for event in FrameDecoder().feed(data) if isinstance(event, RootfsData)]
    assert [piece.data.obj is data for piece in pieces] == [True]


def test_decoder_says_what_the_guest_reads_next():
    """`need` and `in_length` follow the guest's reads: id, number, content."""
    decoder, data = FrameDecoder(), golden("launch")
    fields = number_fields(sends("launch")[0])
    ends = {end for _, end in fields}
    at = 0
    while not decoder.finished:
        need, in_length = decoder.need, decoder.in_length
        assert in_length == (at + 8 in ends and need == 8)
        list(decoder.feed(data[at : at + need]))
        at += need
    assert at == len(data)


LISTS = {
    "2,000 strings": [b"%d" % index for index in range(2000)],
    "one string at the limit": [b"x" * 4000],
    "over 64 KiB": [b"y" * 3999] * 20,
    "lengths all over": [b"z" * (index * 37 % 4000 + 1) for index in range(100)],
}


@pytest.mark.parametrize("strings", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("flags", [[], [NetworkProxy(), AppOutput()]], ids=["plain", "flagged"])
def test_large_arguments_fit_packets_that_cut_no_number(strings, flags):
    """No send is over the limit, ends inside a number, or is tiny; together they are the frames."""
    args = [*flags, PATH, ExecArgv(tuple(strings)), ENVP, ROOTFS]
    stream = check_packets(encode_packets(args))
    assert stream == b"".join(arg.encode() for arg in args)
    assert decode(stream)[0] == args


def test_cut_at_every_place_keeps_numbers_whole():
    """Whatever lies across the packet limit: ids, counts, lengths, content, the last few bytes."""
    for size in range(3400, 3700):
        args = [PATH, ExecArgv((b"a" * size, b"b", b"cc")), ENVP, ROOTFS]
        check_packets(encode_packets(args))


def test_small_arguments_are_one_send():
    """An ordinary launch's arguments leave in one send, even one under the least size."""
    assert [len(packet) for packet in encode_packets([ROOTFS])] == [9]
    assert len(encode_packets(LAUNCH)) == 1


def test_arguments_up_to_the_guests_window_are_accepted_and_no_byte_more():
    """Exactly 256 KiB pass; one byte more is refused, with the size and the limit."""

    def args(last):
        strings = (*[b"x" * 3991] * 65, b"y" * last)  # 4000 bytes encoded each
        return [PATH, ExecArgv(strings), ENVP, ROOTFS]

    room = ARGUMENTS_LIMIT - sum(len(arg.encode()) for arg in args(0))
    packets = encode_packets(args(room))
    assert len(check_packets(packets)) == ARGUMENTS_LIMIT
    with pytest.raises(InvalidArgumentError, match="at most 262144 bytes") as caught:
        encode_packets(args(room + 1))
    assert (caught.value.field, caught.value.value) == ("arguments", ARGUMENTS_LIMIT + 1)


@pytest.mark.parametrize("length", [0, -1, 1 << 64, True, 1.0, "1", None])
def test_rootfs_length_that_is_none_is_refused(length):
    """A length is an int that fits the wire, and not zero."""
    with pytest.raises(InvalidArgumentError) as caught:
        RootFilesystem(length)
    assert caught.value.field == "rootfs length"
    assert caught.value.value is length


WHOLE = {arg.frame_id: arg.encode() for arg in LAUNCH}
WHOLE[FrameId.ROOT_FILESYSTEM] += sends("launch")[1]


def u64(value):
    """Return a number as the wire has it."""
    return struct.pack("<Q", value)


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("frame", [6, 7, 127, 128, 254])
def test_unknown_id_is_refused(frame, step):
    """An id the protocol does not have ends decoding, and is named."""
    with pytest.raises(UnknownFrameError, match=f"id {frame} "):
        decode(WHOLE[FrameId.EXEC_PATH] + bytes([frame]), step)


@pytest.mark.parametrize("frame", list(WHOLE))
def test_frame_that_comes_twice_is_refused(frame):
    """The guest would take the second; a strict reading takes none, flags included."""
    with pytest.raises(DuplicateFrameError, match=frame.name):
        decode(WHOLE[frame] * 2)


@pytest.mark.parametrize("missing", list(WHOLE)[2:])
def test_finished_before_a_mandatory_frame_is_refused(missing):
    """Each of the four mandatory frames is missed by name."""
    stream = b"".join(data for frame, data in WHOLE.items() if frame is not missing)
    with pytest.raises(MissingFrameError, match=f"without {missing.name}$"):
        decode(stream + b"\xff")


def test_flags_are_not_mandatory_and_order_is_free():
    """Any order of the mandatory frames is accepted."""
    order = [FrameId.ROOT_FILESYSTEM, FrameId.EXEC_ENVP, FrameId.EXEC_ARGV, FrameId.EXEC_PATH]
    events, decoder = decode(b"".join(WHOLE[frame] for frame in order) + b"\xff")
    assert decoder.seen == (*order, FrameId.FINISHED)
    assert events[0] == RootFilesystem(16)


SMALL = Limits(rootfs_bytes=100, string_bytes=10, strings=3, arguments_bytes=20)
TOO_MUCH = {
    "rootfs of 0": b"\0" + u64(0),
    "rootfs over the limit": b"\0" + u64(101),
    "rootfs of 2**63": b"\0" + u64(1 << 63),
    "path of 0": b"\1" + u64(0),
    "path over the limit": b"\1" + u64(11),
    "no argv": b"\2" + u64(0),
    "too many argv": b"\2" + u64(4),
    "2**61 envp": b"\3" + u64(1 << 61),
    "argv[0] of 0": b"\2" + u64(1) + u64(0),
    "argv[1] over the limit": b"\2" + u64(2) + u64(2) + b"a\0" + u64(11),
    "all together": b"\1"
    + u64(10)
    + b"a" * 9
    + b"\0\2"
    + u64(2)
    + u64(10)
    + b"b" * 9
    + b"\0"
    + u64(1),
}


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("stream", TOO_MUCH.values(), ids=TOO_MUCH)
def test_number_over_a_limit_is_refused(stream, step):
    """Each length, each count and the sum have a limit, and zero is out of every range."""
    with pytest.raises(LimitExceededError):
        decode(stream, step, SMALL)
    assert not decode(stream[:-8], step, SMALL)[1].finished


AT_LIMIT = {
    "rootfs": (b"\0" + u64(100), RootFilesystem(100)),
    "path": (b"\1" + u64(10) + b"a" * 9 + b"\0", ExecPath(b"a" * 9)),
    "argv": (b"\2" + u64(3) + (u64(1) + b"\0") * 3, ExecArgv((b"", b"", b""))),
    "together": (b"\3" + u64(2) + (u64(10) + b"a" * 9 + b"\0") * 2, ExecEnvp((b"a" * 9,) * 2)),
}


@pytest.mark.parametrize(("stream", "event"), AT_LIMIT.values(), ids=AT_LIMIT)
def test_number_at_a_limit_is_accepted(stream, event):
    """The limits are the largest values that pass."""
    assert decode(stream, limits=SMALL)[0] == [event]


@pytest.mark.parametrize(
    "number", [1 << 61, 1 << 63, (1 << 64) - 1], ids=["2**61", "2**63", "2**64-1"]
)
@pytest.mark.parametrize("begin", [b"\0", b"\1", b"\2", b"\3", b"\2" + u64(1), b"\3" + u64(1)])
def test_nothing_is_allocated_for_a_number_out_of_range(begin, number):
    """What a number claims is checked before memory is taken for it."""
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceededError):
            decode(begin + u64(number) + b"x" * 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


BAD_STRINGS = {
    "no NUL": (b"abc", "no trailing NUL"),
    "NUL inside": (b"a\0b\0", "NUL inside, at byte 1"),
    "NULs only": (b"\0\0", "NUL inside, at byte 0"),
}


@pytest.mark.parametrize(("content", "message"), BAD_STRINGS.values(), ids=BAD_STRINGS)
@pytest.mark.parametrize(
    ("begin", "name"),
    [(b"\1", "ExecPath"), (b"\2" + u64(1), "EXEC_ARGV[0]"), (b"\3" + u64(9), "EXEC_ENVP[0]")],
)
def test_string_that_is_no_c_string_is_refused_by_name(begin, name, content, message):
    """A string ends with its one NUL, in each frame that has strings."""
    with pytest.raises(BadStringError) as caught:
        decode(begin + u64(len(content)) + content)
    assert str(caught.value).startswith(f"{name} has ")
    assert message in str(caught.value)


def test_end_is_refused_at_every_byte_before_finished():
    """After every prefix but the whole, `end` says that the stream ended early."""
    stream = golden("launch")
    for size in range(len(stream)):
        decoder = decode(stream[:size], 1)[1] if size else FrameDecoder()
        with pytest.raises(EarlyEndError, match="before Finished"):
            decoder.end()


@pytest.mark.parametrize(
    ("prefix", "where"),
    [
        (b"", "where a frame id was due"),
        (b"\4", "where a frame id was due"),
        (b"\1\1\1", "in EXEC_PATH, 6 bytes short of a field's end"),
        (b"\2" + u64(2) + u64(3), "in EXEC_ARGV, 3 bytes short of a field's end"),
        (b"\0" + u64(9) + b"abc", "6 bytes short of the rootfs's end"),
    ],
)
def test_early_end_says_where(prefix, where):
    """The message names the frame and how much of it is missing."""
    decoder = FrameDecoder()
    list(decoder.feed(prefix))
    with pytest.raises(EarlyEndError, match=where):
        decoder.end()
