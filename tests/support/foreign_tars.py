"""Owns: archives as other tools write them, of one tree; and odd ones, block by block.

Must not know: the package under test.
"""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import trees
from trees import fifo, file, folder, link, symlink

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
BLOCK = 512
END = bytes(2 * BLOCK)

SHORT = {
    b"bin/app": file(b"program\n" * 200, 0o4755),
    b"bin/again": link(b"bin/app"),
    b"bin/exact": file(bytes(range(256)) * 4),
    b"big": file(b"0123456789abcdef" * 20_000, 0o600),
    b"empty": folder(0o1777),
    b"etc/hidden/.config": file(b"hidden"),
    b"etc/mtab": symlink(b"/proc/mounts"),
    b"etc/secret": file(b"secret", 0o600),
    b"etc/nothing": file(),
    b"etc/up": symlink(b"../bin/./app"),
    "etc/grüße".encode(): file(b"non-ASCII"),
    "etc/grüße-auch".encode(): link("etc/grüße".encode()),
}
"""What every format can hold."""

MEDIUM = {
    **SHORT,
    b"fifo": fifo(0o640),
    b"a" * 92: file(b"longest that fits with the prefix"),
    b"a" * 93 + b"/" + b"b" * 90: file(b"needs the prefix field of ustar"),
    b"z" * 80 + b"/" + b"y" * 12: folder(0o700),
}
"""What ustar can hold."""

LONG = {
    **MEDIUM,
    b"deep/" + b"x" * 200: file(b"over 100"),
    b"deep/" + b"d" * 200 + b"/" + b"e" * 200 + b"/" + "ü".encode() * 100: file(b"over 255"),
    b"deep/hard": link(b"deep/" + b"x" * 200),
    b"deep/soft": symlink(b"../" * 60 + b"bin/app"),
}
"""What needs extensions."""

GNU_TAR = {"v7": SHORT, "ustar": MEDIUM, "oldgnu": LONG, "gnu": LONG, "posix": LONG}
BSDTAR = {"v7": SHORT, "ustar": MEDIUM, "gnutar": LONG, "pax": LONG}
PYTHON = {
    "ustar": (tarfile.USTAR_FORMAT, MEDIUM),
    "gnu": (tarfile.GNU_FORMAT, LONG),
    "pax": (tarfile.PAX_FORMAT, LONG),
}


def paths(root):
    """Return the paths of a tree in the order of a directory's archive."""
    return sorted(trees.describe(root))


def _run(command, root, names, start):
    listed = b"".join(start + (name.rstrip(b"/") or b".") + b"\0" for name in names)
    done = subprocess.run(
        [*command, "-C", root, "--no-recursion", "--null", "-T", "-"],
        input=listed,
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert not done.stderr, done.stderr
    return done.stdout


def gnu_tar(form, root, *options, start=b""):
    """Return a tree's archive as GNU tar writes it; `start` stands before every name."""
    command = ["tar", "-c", f"--format={form}", *options]
    return _run(command, root, paths(root), start)


def bsdtar(form, root, *options, start=b""):
    """Return a tree's archive as bsdtar writes it."""
    command = ["bsdtar", "-c", "-f", "-", f"--format={form}", *options]
    return _run(command, root, paths(root), start)


def python(form, root):
    """Return a tree's archive as Python's tarfile writes it."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name in paths(root):
            name = os.fsdecode(name.rstrip(b"/"))
            tar.add(os.path.join(root, name), name or ".", recursive=False)
    return out.getvalue()


def go(form):
    """Return an archive that Go's archive/tar wrote; vectors/foreign.go says of what."""
    return gzip.decompress((VECTORS / f"go-{form}.tar.gz").read_bytes())


def block(name=b"x", kind=b"0", size=0, *, link=b"", mode=b"0000644\0", magic=b"ustar\x0000", **at):
    """Return a header block; `size` may be the field itself. `at` sets fields by `b<offset>`."""
    made = bytearray(BLOCK)
    for offset, value in (
        (0, name),
        (100, mode),
        (108, b"0000000\0" * 2),
        (124, size if isinstance(size, bytes) else b"%011o\0" % size),
        (136, b"00000000000\0"),
        (156, kind),
        (157, link),
        (257, magic),
        *((int(key[1:]), value) for key, value in at.items()),
    ):
        made[offset : offset + len(value)] = value
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    assert len(made) == BLOCK
    return bytes(made)


def data(text):
    """Return a member's data with its padding."""
    return text + bytes(-len(text) % BLOCK)


def member(name=b"x", text=b"", **fields):
    """Return a member with its data."""
    return block(name, size=len(text), **fields) + data(text)


def pax(records, *, kind=b"x"):
    """Return a PAX header of (key, value) pairs."""
    text = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        size = len(rest) + 1
        while size != len(rest) + len(str(size)):
            size = len(rest) + len(str(size))
        text += b"%d%b" % (size, rest)
    return block(b"PaxHeaders/x", kind, len(text)) + data(text)


def long_name(text, kind=b"L"):
    """Return the header of a long name or link target in GNU's form."""
    return member(b"././@LongLink", text + b"\0", kind=kind, magic=b"ustar  \0")
