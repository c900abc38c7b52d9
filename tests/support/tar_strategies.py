"""Owns: Hypothesis strategies of archives, whole and broken."""

import base64
import io
import itertools
import tarfile
import zlib

from hypothesis import strategies as st

NAMES = ["rootfs/a", "rootfs/é", "rootfs/dev/x", "/b", "rootfs/" + "c" * 300]


PAX = [{}, {"comment": "c"}] + [{"size": size} for size in ("5", "-5", "abc", "²", "9" * 5000)]


FORMS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}


header_edits = st.lists(
    st.sampled_from(
        [
            (124, b"-0000000005\0"),
            (124, b"\xff" * 12),
            (124, b"\x80" + b"\x7f" * 11),
            (124, b"00000000000\0"),
            (482, b"\1"),
            *((156, bytes([kind])) for kind in b"0157LKxgXSDZ"),
        ]
    )
    | st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=3)),
    max_size=3,
)


contents = st.binary(max_size=1500)


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120
).map(lambda text: "rootfs/" + (text.strip("/") or "a"))


@st.composite
def archives(draw):
    """A tar of either format, with members a guest takes and some it does not."""
    buffer = io.BytesIO()
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)):
            member = tarfile.TarInfo(name)
            member.size = draw(st.sampled_from([0, 1, 512, 700]))
            member.pax_headers = dict(draw(st.sampled_from(PAX)))
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


@st.composite
def broken_archives(draw):
    """A tar with a header or two changed, its checksum right again so that it is looked at."""
    data = bytearray(draw(archives()))
    for block in draw(st.lists(st.integers(0, 4), max_size=2)):
        header = data[block * 512 : block * 512 + 512]
        for at, value in draw(header_edits):
            header[at : at + len(value)] = value
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[block * 512 : block * 512 + 512] = header
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


class Archive(bytes):
    """An archive that shows itself compressed: Hypothesis warns of what is too long to print."""

    def __repr__(self):
        return (
            f"Archive(zlib.decompress(base64.b64decode({base64.b64encode(zlib.compress(self))})))"
        )


@st.composite
def whole_archives(draw):
    """A tar written by tarfile in one of its formats."""
    form = draw(st.sampled_from(list(FORMS.values())))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, bufsize=512) as tar:
        for name, data in draw(st.lists(st.tuples(names, contents), max_size=6)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # a name that ustar has no room for
                continue
    return Archive(buffer.getvalue())


def cut(data, points):
    """Return the data in pieces."""
    edges = [0, *sorted({point % (len(data) + 1) for point in points}), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]
