"""Owns: archives a guest unpacks and archives it stops on, byte by byte where tools make none.

`tarfile` makes the ordinary ones; what it does not write is put together here. Must not know: the
package under test.
"""

import gzip
import io
import tarfile

from archives import make_tar


def tar_of(*names, form=tarfile.GNU_FORMAT, data=b"data", **changes):
    """Return an archive of files of those names; `changes` are made to each TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, bufsize=512) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            for attribute, value in changes.items():
                setattr(member, attribute, value)
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def edited(archive, *edits, block=0):
    """Return the archive with a header's bytes changed, and its checksum right again."""
    header = bytearray(archive[block * 512 : block * 512 + 512])
    for at, value in edits:
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return archive[: block * 512] + bytes(header) + archive[block * 512 + 512 :]


def octal(number):
    """Return a 12-byte number of a tar header."""
    return b"%011o\0" % number


def pax(records, *, kind=b"x"):
    """Return a PAX header: `records` is its whole content."""
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = kind, len(records)
    return member.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def record(key, value):
    """Return one PAX record."""
    body = f" {key}={value}\n".encode()
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return str(size).encode() + body


def sparse_tar(*behind):
    """Return an old GNU sparse file of 26 runs, whose map goes on in two more blocks, and `behind`.

    Its data looks like a block of the map that says that another follows.
    """
    runs = [(index * 4096, 512) for index in range(26)] + [(26 * 4096, 0)]
    data = b"\1" * (26 * 512)
    member = tarfile.TarInfo("rootfs/sparse")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(data)
    entries = [octal(offset) + octal(size) for offset, size in runs]
    header = edited(
        member.tobuf(tarfile.GNU_FORMAT),
        (386, b"".join(entries[:4])),
        (482, b"\1"),  # the map goes on
        (483, octal(26 * 4096)),
    )
    first = b"".join(entries[4:25]) + b"\1" + bytes(7)
    second = b"".join(entries[25:]).ljust(512, b"\0")
    return header + first + second + data + tar_of(*behind)


LONG_101, LONG_300 = ("rootfs/" + "n" * (size - 7) for size in (101, 300))

GOOD_TARS = {
    "GNU": tar_of("rootfs", "rootfs/a", "./rootfs/b"),
    "PAX, ASCII": tar_of("rootfs/a", form=tarfile.PAX_FORMAT, pax_headers={"comment": "c"}),
    "PAX, long name": tar_of(LONG_300, form=tarfile.PAX_FORMAT),
    "GNU, non-ASCII name": tar_of("rootfs/é", "rootfs/" + "é" * 200),
    "GNU, names over 100 and 255": tar_of(LONG_101, LONG_300, "rootfs/a"),
    "long link name": tar_of("rootfs/l", type=tarfile.SYMTYPE, linkname="x" * 300),
    "link out of the tree": tar_of("rootfs/l", type=tarfile.SYMTYPE, linkname="../../etc"),
    "hard link": tar_of("rootfs/a")[:1024]
    + tar_of("rootfs/b", type=tarfile.LNKTYPE, linkname="rootfs/a"),
    "directory and device": tar_of("rootfs/d/", type=tarfile.DIRTYPE)[:512]
    + tar_of("rootfs/null", type=tarfile.CHRTYPE),
    "nearly forbidden names": tar_of("rootfs/device", "rootfs/tmp2/x", "rootfs/a/dev"),
    "dots in a name": tar_of("rootfs/..a", "rootfs/b..", "rootfs/..."),
    "PAX size override": pax(record("size", 700))
    + edited(tar_of("rootfs/a", data=bytes(700)), (124, octal(0))),
    "PAX global header": pax(record("path", "é"), kind=b"g") + tar_of("rootfs/a"),
    "non-ASCII PAX comment": pax(record("comment", "é")) + tar_of("rootfs/a"),
    "PAX header of 0 bytes": pax(b"") + tar_of("rootfs/a"),
    "GNU sparse": sparse_tar("rootfs/behind"),
    "no end-of-archive blocks": tar_of("rootfs/a")[:1024],
    "junk behind the end": tar_of("rootfs/a") + b"junk" * 200,
    "base-256 size": edited(tar_of("rootfs/a"), (124, b"\x80" + bytes(10) + b"\4")),
}
"""What libarchive unpacks without a locale."""

BAD_TARS = {
    "gzip": (gzip.compress(make_tar(20_000)), "no plain tar"),
    "noise": (bytes(range(256)) * 4, "no plain tar"),
    "wrong checksum": (tar_of("rootfs/a").replace(b"rootfs/a", b"rootfs/b"), "no plain tar"),
    "empty": (bytes(10240), "no member"),
    "outside rootfs": (tar_of("rootfs/a", "etc/passwd"), "'etc/passwd' is not under rootfs/"),
    "beside rootfs": (tar_of("rootfs2/a"), "'rootfs2/a' is not under rootfs/"),
    "nothing but a dot": (tar_of("./"), "is not under rootfs/"),
    "dot dot": (tar_of("rootfs/../etc"), "'rootfs/../etc' is not under rootfs/"),
    "absolute": (tar_of("/rootfs/a"), "'/rootfs/a' is not under rootfs/"),
    **{
        f"{name} of its own": (
            tar_of(f"rootfs/{name}", type=tarfile.DIRTYPE),
            f"makes {name} itself",
        )
        for name in ("dev", "proc", "run", "sys", "tmp")
    },
    "file in dev": (tar_of("rootfs/a", "./rootfs//dev/null"), "makes dev itself"),
    "forbidden long name": (tar_of("rootfs/tmp/" + "n" * 300), "makes tmp itself"),
    "forbidden PAX name": (pax(record("path", "rootfs/sys/a")) + tar_of("rootfs/a"), "makes sys"),
    "forbidden PAX sparse name": (
        pax(record("GNU.sparse.name", "rootfs/run/a") + record("path", "rootfs/a"))
        + tar_of("rootfs/a"),
        "makes run itself",
    ),
    "forbidden behind a sparse file": (sparse_tar("rootfs/proc/1"), "makes proc itself"),
    "forbidden behind a PAX size": (
        pax(record("size", 700))
        + edited(tar_of("rootfs/a", data=b"\1" * 700), (124, octal(0)))[:1536]
        + tar_of("rootfs/dev/x"),
        "makes dev itself",
    ),
    "truncated data": (tar_of("rootfs/a", data=bytes(2000))[:1024], "middle of a member"),
    "truncated header": (tar_of("rootfs/a")[:300], "middle of a member"),
    "truncated long name": (tar_of(LONG_300)[:700], "middle of a member"),
    "long name without a member": (tar_of(LONG_300)[:1024], "middle of a member"),
    "PAX header without a member": (pax(record("comment", "c")), "middle of a member"),
    "truncated sparse map": (sparse_tar()[:1024], "middle of a member"),
    "truncated sparse data": (sparse_tar()[:2048], "middle of a member"),
    "PAX, non-ASCII name": (tar_of("rootfs/é", form=tarfile.PAX_FORMAT), "non-ASCII path"),
    "PAX, non-ASCII link": (
        tar_of("rootfs/l", form=tarfile.PAX_FORMAT, type=tarfile.SYMTYPE, linkname="é"),
        "non-ASCII linkpath",
    ),
    "PAX, non-ASCII owner": (
        tar_of("rootfs/a", form=tarfile.PAX_FORMAT, uname="é"),
        "non-ASCII uname",
    ),
    "PAX, non-ASCII group": (
        tar_of("rootfs/a", form=tarfile.PAX_FORMAT, gname="é"),
        "non-ASCII gname",
    ),
    "PAX size of letters": (pax(record("size", "abc")) + tar_of("rootfs/a"), "the size 'abc'"),
    "PAX size below zero": (pax(record("size", -5)) + tar_of("rootfs/a"), "the size '-5'"),
    "PAX size without end": (pax(record("size", "9" * 5000)) + tar_of("rootfs/a"), "the size '999"),
    "PAX record too long": (pax(b"99 path=rootfs/a\n") + tar_of("rootfs/a"), "malformed PAX"),
    "PAX record without length": (pax(b"path=rootfs/a\n") + tar_of("rootfs/a"), "malformed PAX"),
    "PAX header of 8 GiB": (edited(pax(b"x"), (124, b"77777777777\0")), "header of 8589934591"),
    "size below zero": (edited(tar_of("rootfs/a"), (124, b"-0000001000\0")), "of -512 bytes"),
    "base-256 size below zero": (edited(tar_of("rootfs/a"), (124, b"\xff" * 12)), "of -1 bytes"),
}
"""What the guest stops on, and what the error is to say."""
