"""Owns: a walk over encoded arguments that knows where numbers lie, to judge how they were cut.

Must not know: the package under test.
"""

import struct

PACKET_LIMIT = 3584
MIN_PACKET = 64


def number_fields(stream):
    """Return (begin, end) of each id with its number, and of each further length; walks by hand."""
    fields, at = [], 0

    def number(begin, where):
        fields.append((begin, where + 8))
        return struct.unpack_from("<Q", stream, where)[0]

    while at < len(stream):
        frame, begin = stream[at], at
        at += 1
        if frame == 0:
            number(begin, at)
            at += 8  # the archive is not among the arguments
        elif frame == 1:
            at += 8 + number(begin, at)
        elif frame in (2, 3):
            count = number(begin, at)
            at += 8
            for _ in range(count):
                at += 8 + number(at, at)
        else:
            assert frame in (4, 5, 255)
    assert at == len(stream)
    return fields


def check_packets(packets):
    """Assert what the guest needs of the sends, whatever is in them."""
    stream = b"".join(packets)
    cuts, at = set(), 0
    for packet in packets:
        assert len(packet) <= PACKET_LIMIT
        assert len(packet) >= MIN_PACKET or len(packets) == 1
        at += len(packet)
        cuts.add(at)
    for begin, end in number_fields(stream):
        assert not cuts & set(range(begin + 1, end)), f"a send ends inside {begin}..{end}"
    return stream
