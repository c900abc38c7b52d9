"""Directories as root file systems: what arrives, the same anywhere; what is refused; races."""

import errno
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import trees
from hypothesis import given, settings
from hypothesis import strategies as st
from left_out import AS_ROOT, leave_out, needs_root, needs_tool
from machine import CID
from peer import Guest, GuestError
from trees import build, fifo, file, folder, link, symlink

from nitro_vsock import (
    EnclaveArgsWriter,
    InvalidArgumentError,
    Rootfs,
    SourceChangedError,
    SourceReadError,
    SourceTruncatedError,
    Stage,
    Strategy,
    StreamTimeoutError,
)
from nitro_vsock.rootfs.directory import AHEAD, ALONE, LARGE, STAGE_BYTES
from nitro_vsock.transport.stream import FilePayload

BEHIND = 24 << 20
"""More than twice what the sockets hold: a guest that stops inside a file of this size keeps the
host from every file behind it."""


@pytest.fixture
def root():
    """A path where a tree can be made that another user can get at."""
    with tempfile.TemporaryDirectory(prefix="nv") as above:
        os.chmod(above, 0o755)
        yield f"{above}/tree"


def packed(path, **options):
    """Return a directory's archive as it would be sent."""
    source = Rootfs.from_directory(path, **options).open()
    try:
        data = b"".join(map(bytes, source.chunks()))
        assert len(data) == source.length
        return data
    finally:
        source.close()


def names(data):
    """Return the members' names of an archive, as Python's tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        return [member.name for member in tar]


def launch(path, uds, *, meanwhile=None, guests=None, sink=None, strategy="auto"):
    """Launch a directory against a guest; return the report and what the guest took.

    `meanwhile` runs once in the guest when a MiB has come, while it reads nothing.
    """
    events = [meanwhile] if meanwhile else []

    def before_read(received):
        if events and received > 1 << 20:
            events.pop()()

    writer = EnclaveArgsWriter(Rootfs.from_directory(path), "/bin/app", ["/bin/app"], {"A": "1"})
    with writer.listen(CID, uds_path=uds, strategy=strategy) as launched:
        guest = Guest(f"{uds}_{CID + 1}", before_read=before_read, sink=sink)
        if guests is not None:
            guests.append(guest)
        report = launched.send(30)
    return report, guest.result()


def pattern(size):
    """Return bytes without a period that anything here has."""
    return random.Random(size).randbytes(size)


# What arrives

NAMES = (
    *(b"a", b"a-c", b"a.b", b"a/", b"b", b"lib", b"dev", b" ", b"-x", b"*", b"new\nline", b"\\"),
    *("é".encode(), "\U0001f600".encode(), "\uffee".encode(), b"\xff\xfe", b"\xc3"),
    *(b"n" * 92, b"n" * 93, b"n" * 94, b"x" * 255),
)
SIZES = (0, 1, 511, 512, 513, 3000, LARGE - 1, LARGE, LARGE + 1)


@functools.cache
def content(size):
    """Return the content of a file of a random tree."""
    return pattern(size)


@st.composite
def random_trees(draw):
    """Trees as `trees.build` takes them."""
    items = {}
    parts = st.sampled_from([name.rstrip(b"/") for name in NAMES])
    kinds = st.sampled_from(["file"] * 4 + ["dir", "symlink", "link", "fifo"])
    for _ in range(draw(st.integers(0, 12))):
        path = draw(st.lists(parts, min_size=1, max_size=4).map(b"/".join))
        above = {path[:at] for at in range(len(path)) if path[at : at + 1] == b"/"}
        taken = any(items.get(part, ("dir",))[0] != "dir" for part in above)
        if taken or path in items or any(other.startswith(path + b"/") for other in items):
            continue
        kind = draw(kinds)
        files = sorted(name for name, item in items.items() if item[0] == "file")
        if kind == "dir":
            items[path] = folder(draw(st.sampled_from([0o755, 0o700, 0o1777, 0o2755])))
        elif kind == "symlink":
            target = st.sampled_from([b"a", b"/etc/passwd", b"../..", b"t" * 100, b"t" * 101])
            items[path] = symlink(draw(target))
        elif kind == "fifo":
            items[path] = fifo(draw(st.sampled_from([0o644, 0o600])))
        elif kind == "link" and files:
            items[path] = link(draw(st.sampled_from(files)))
        else:
            mode = draw(st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o444]))
            items[path] = file(content(draw(st.sampled_from(SIZES))), mode)
    return items


@settings(deadline=None, max_examples=60)
@given(random_trees())
def test_archive_equals_the_naive_one_of_tarfile_byte_for_byte(items):
    """Headers, order, links, padding and end are tarfile's own, whatever the tree."""
    with tempfile.TemporaryDirectory(prefix="nv") as above:
        path = build(f"{above}/tree", items)
        assert packed(path) == trees.model(path)


@settings(deadline=None, max_examples=30)
@given(random_trees())
def test_tree_that_was_sent_unpacks_to_the_same_tree(items):
    """Over a socket to a guest, unpacked by libarchive as the guest does."""
    with tempfile.TemporaryDirectory(prefix="nv") as above:
        path = build(f"{above}/tree", items)
        arrived = io.BytesIO()
        report, taken = launch(path, f"{above}/v", sink=arrived.write)
        assert taken.rootfs_bytes == report.rootfs_bytes == len(arrived.getvalue())
        os.mkdir(f"{above}/out")
        done = subprocess.run(
            ["bsdtar", "-xpf", "-", "-C", f"{above}/out"],
            input=arrived.getvalue(),
            capture_output=True,
            check=False,
            env={"PATH": os.environ["PATH"]},  # no locale, as in the guest
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert trees.describe(f"{above}/out/rootfs") == trees.describe(path)
        assert taken.rootfs_sha256 == hashlib.sha256(trees.model(path)).hexdigest()


TREE = {
    b"bin/app": file(b"#!/bin/sh\n" + bytes(700), 0o755),
    b"bin/a": link(b"bin/app"),
    b"bin-x": file(b"sorted before bin/"),
    b"etc/shadow": file(b"secret", 0o600),
    b"etc/empty": file(),
    b"home": folder(0o700),
    b"lib/" + "é".encode() + b"\xff": file(b"not UTF-8"),
    b"lib/" + b"n" * 120: file(b"long"),
    b"lib/libbig.so": file(bytes(range(256)) * 2000),
    b"run-me": symlink(b"bin/app"),
    b"var/pipe": fifo(0o640),
}
GOLDEN = "bbc0c213d1b4584b16b0135be6294f11f11f7a3ef482dc70ed34738dc942ff34"


def test_archive_of_a_fixed_tree_has_its_known_digest(root):
    """The bytes are a promise: PCR16 rests on their order, and caches on all of them."""
    assert hashlib.sha256(packed(build(root, TREE))).hexdigest() == GOLDEN


def test_same_tree_made_otherwise_gives_the_same_bytes(root):
    """Order of creation, umask, owner and times do not matter."""
    seen = set()
    for index, umask in enumerate((0o022, 0o077, 0)):
        path = build(f"{root}{index}", TREE, order=index, umask=umask, mtime=index * 10**18)
        if os.geteuid() == 0:
            os.chown(f"{path}/bin-x", index, 1000 + index)
        seen.add(packed(path))
    assert len(seen) == 1


def test_report_says_how_large_files_were_moved(root, uds):
    """The strategy of the last large file, or SEND where there is none."""
    path = build(root, {b"a": file(pattern(100))})
    assert launch(path, uds)[0].strategy is Strategy.SEND
    Path(path, "b").write_bytes(pattern(LARGE + 1))
    for strategy in ("sendfile", "mmap", "read"):
        report, taken = launch(path, uds, strategy=strategy)
        assert report.strategy is Strategy(strategy)
        assert taken.rootfs_sha256 == hashlib.sha256(trees.model(path)).hexdigest()


def test_crowded_directory_arrives_whole(root):
    """More names than one look at a directory takes, and more data than one gathering."""
    items = {b"d/%d" % n: file(b"%d" % n * 40) for n in range(6000)}
    items |= {b"e/" + b"x" * 200 + b"%d" % n: folder() for n in range(300)}
    items |= {b"f/%d" % n: file(content(LARGE - 1)) for n in range(9)}
    path = build(root, items)
    assert packed(path) == trees.model(path)


def test_names_at_the_edges_of_blocks_arrive(root):
    """Of files, directories and link targets: where a long name needs one more block."""
    items = {}
    for length in (99, 100, 101, 511, 512, 513, 1023, 1024, 1025):
        for kind, item in (("f", file()), ("d", folder()), ("s", symlink(b"t")), ("p", fifo())):
            left = length - len("rootfs/") - (kind == "d")
            name = "/".join([kind * 60] * (left // 61)) + "/"
            items[(name + "n" * (left - len(name))).encode()] = item
        items[b"t%d" % length] = symlink(b"t" * length)
    path = build(root, items)
    data = packed(path)
    assert data == trees.model(path)
    found = {len(name) for name in names(data)}
    assert found >= {99, 100, 101, 511, 512, 513, 1023, 1024, 1025}


def test_deep_directory_arrives_whole(root):
    """Deeper than Python recurses into, by names that no single path could reach."""
    os.mkdir(root)
    here = os.open(root, os.O_RDONLY)
    for _ in range(300):
        os.mkdir(b"d" * 20, dir_fd=here)
        below = os.open(b"d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    found = names(packed(root))
    assert found[-1] == "rootfs" + ("/" + "d" * 20) * 300
    assert len(found) == 301
    subprocess.run(["rm", "-r", root], check=True)  # shutil.rmtree needs whole paths


def test_empty_directory_is_an_archive_of_one_member(root):
    """Just rootfs/."""
    os.mkdir(root, 0o755)
    data = packed(root)
    assert (names(data), len(data)) == (["rootfs"], tarfile.RECORDSIZE)


def test_names_the_guest_makes_itself_are_left_out_at_the_top_only(root):
    """As in the reference; whatever they are, and deeper ones stay."""
    items = {name + b"/x": file() for name in (b"dev", b"proc", b"run", b"sys", b"krun-awsnitro")}
    items |= {
        b"tmp": symlink(b"var/tmp"),
        b"var/tmp/x": file(),
        b"var/dev": file(),
        b"tmp2": file(),
    }
    found = names(packed(build(root, items)))
    expected = ["rootfs", "rootfs/tmp2", "rootfs/var", "rootfs/var/dev", "rootfs/var/tmp"]
    assert found == [*expected, "rootfs/var/tmp/x"]


def test_socket_is_left_out_with_a_warning(root, caplog):
    """An archive cannot hold one; the log and the open source say so."""
    build(root, {b"srv/f": file()})
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{root}/srv/s")
    with caplog.at_level(logging.WARNING, "nitro_vsock"):
        source = Rootfs.from_directory(root).open()
    source.close()
    assert source.left_out == (f"{root}/srv/s",)
    assert f"{root}/srv/s" in caplog.text
    assert names(packed(root)) == ["rootfs", "rootfs/srv", "rootfs/srv/f"]


def test_devices_keep_their_numbers(root):
    """Character and block devices; they are never opened."""
    os.mkdir(root)
    try:
        os.mknod(f"{root}/c", stat.S_IFCHR | 0o622, os.makedev(1, 3))
        os.mknod(f"{root}/b", stat.S_IFBLK | 0o660, os.makedev(259, 1048575))
    except PermissionError:
        leave_out("root, to make devices", AS_ROOT)
    with tarfile.open(fileobj=io.BytesIO(packed(root))) as tar:
        found = {m.name: (m.type, m.devmajor, m.devminor) for m in tar}
    assert found["rootfs/c"] == (tarfile.CHRTYPE, 1, 3)
    assert found["rootfs/b"] == (tarfile.BLKTYPE, 259, 1048575)


def test_root_may_be_a_symbolic_link_and_links_inside_are_not_followed(root):
    """The root path is resolved; a link that leads outside is a link in the archive."""
    build(root, {b"out": symlink(b"/etc"), b"f": file()})
    os.symlink(root, f"{root}-link")
    with tarfile.open(fileobj=io.BytesIO(packed(f"{root}-link"))) as tar:
        assert [(m.name, m.linkname) for m in tar] == [
            ("rootfs", ""),
            ("rootfs/f", ""),
            ("rootfs/out", "/etc"),
        ]


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, (8 << 30) + 5])
def test_file_about_8_gib_has_the_size_tarfile_writes(root, size):
    """Eleven octal digits, or base 256 beyond; the header and the total, not every byte of it."""
    build(root, {b"a": file(), b"big": file(), b"c": file()})
    os.truncate(f"{root}/big", size)
    member = tarfile.TarInfo("rootfs/big")
    member.size = size
    source = Rootfs.from_directory(root).open()
    try:
        pieces = source.pieces()
        head = bytes(next(pieces))
        assert head[-512:] == member.tobuf(tarfile.GNU_FORMAT)
        run = next(pieces)
        assert (run.offset, run.length, os.fstat(run.fd).st_size) == (0, size, size)
        tail = bytes(next(pieces))
        assert next(pieces, None) is None
        assert source.length == len(head) + size + len(tail)
        assert source.length % tarfile.RECORDSIZE == 0
        behind = tail[-size % 512 :][:512]
        assert tarfile.TarInfo.frombuf(behind, "utf-8", "strict").name == "rootfs/c"
    finally:
        source.close()


def test_holes_arrive_as_zeros(root, uds):
    """A sparse file is sent as plain data, small or large."""
    build(root, {b"large": file(), b"small": file()})
    for name, size in (("large", 3 << 20), ("small", 10000)):
        with open(f"{root}/{name}", "r+b") as out:
            out.truncate(size)
            out.seek(size // 2)
            out.write(b"data")
    _, taken = launch(root, uds)
    assert taken.rootfs_sha256 == hashlib.sha256(trees.model(root)).hexdigest()


MEMORY = """
import re, sys
from nitro_vsock import Rootfs
source = Rootfs.from_directory(sys.argv[1]).open()
length = sum(map(len, source.chunks()))
source.close()
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())
print(length, int(peak[1]) * 1024)
"""


def test_memory_does_not_depend_on_the_size_of_files(root):
    """2 GiB pass through a few MiB."""
    peaks = []
    build(root, {b"f": file()})
    for size in (1 << 20, 2 << 30):
        os.truncate(f"{root}/f", size)
        said = subprocess.run(
            [sys.executable, "-c", MEMORY, root], capture_output=True, text=True, check=True
        ).stdout.split()
        assert int(said[0]) > size
        peaks.append(int(said[1]))
    assert peaks[1] - peaks[0] < 8 << 20
    assert peaks[1] < 100 << 20


# What is refused


def test_directory_is_named_where_it_cannot_be_used(root):
    """At once, where the Rootfs is made."""
    with pytest.raises(SourceReadError, match="No such file"):
        Rootfs.from_directory(f"{root}/none")
    Path(root).write_bytes(b"x")
    with pytest.raises(InvalidArgumentError, match="directory"):
        Rootfs.from_directory(root)
    with pytest.raises(InvalidArgumentError, match="path"):
        Rootfs.from_directory(5.0)
    with pytest.raises(InvalidArgumentError, match="path"):
        Rootfs.from_directory("a\0b")


def as_nobody(action):
    """Run a function as a user without privileges in a child; return what it returns."""
    if os.geteuid() != 0:
        return action()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writing, json.dumps(action()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:
        result = json.loads(said.read())
    os.waitpid(child, 0)
    return result


@pytest.mark.parametrize(
    ("name", "mode"),
    [("etc/shadow", 0), ("etc/shadow", 0o200), ("etc", 0), ("etc", 0o644), ("etc", 0o311)],
)
def test_file_without_read_permission_is_named_before_anything_is_bound(root, uds, name, mode):
    """A file that cannot be read, a directory that cannot be listed or searched."""
    build(root, {b"etc/shadow": file(b"secret", 0o644), b"x": file()})
    os.chmod(f"{root}/{name}", mode)
    writer = EnclaveArgsWriter(Rootfs.from_directory(root), "/bin/app", ["/bin/app"], {"A": "1"})

    def attempt():
        try:
            writer.listen(CID, uds_path=uds).close()
        except SourceReadError as error:
            return [str(error), error.errno, error.stage, error.must_terminate_enclave]

    text, number, stage, must_terminate = as_nobody(attempt)
    os.chmod(f"{root}/etc", 0o755)
    assert f"'{root}/{name if mode != 0o644 else 'etc/shadow'}'" in text
    assert (number, stage, must_terminate) == (13, "validate", False)
    assert not os.path.exists(f"{uds}_{CID + 1}")


def set_acl(path, mode, nobody):
    """Let an access control list say what nobody may, beside what the mode says of the others."""
    owner, group, others = (mode >> 6) & 7, (mode >> 3) & 7, mode & 7
    entries = [(1, owner), (2, nobody), (4, group), (16, group | nobody), (32, others)]
    none = 0xFFFFFFFF
    packed = [struct.pack("<HHI", tag, bits, 65534 if tag == 2 else none) for tag, bits in entries]
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + b"".join(packed))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        leave_out("access control lists in TMPDIR", "TMPDIR on ext4, xfs or btrfs")


@needs_root
@pytest.mark.parametrize(
    ("name", "mode", "nobody", "is_denied"),
    [
        ("etc/shadow", 0o644, 0, True),
        ("etc", 0o755, 0, True),
        ("etc/shadow", 0o600, 4, False),
        ("etc", 0o700, 5, False),
    ],
)
def test_access_control_list_counts_and_not_the_mode(root, uds, name, mode, nobody, is_denied):
    """What it denies is named before anything is bound; what it allows is taken. Root reads all."""
    build(root, {b"etc/shadow": file(b"secret"), b"x": file()})
    os.chmod(f"{root}/{name}", mode)
    set_acl(f"{root}/{name}", mode, nobody)

    def attempt():
        try:
            return packed(root) == trees.model(root)
        except SourceReadError as error:
            return [str(error), error.errno, error.stage]

    denied = [f"'{root}/{name}' cannot be read: Permission denied", 13, "validate"]
    assert as_nobody(attempt) == (denied if is_denied else True)
    assert attempt() is True


@needs_root
@needs_tool("strace")
def test_walk_of_root_opens_no_file_that_everybody_may_read(root, tmp_path):
    """100,000 files would be opened twice; a system call trace shows who is opened."""
    build(root, {b"etc/shadow": file(b"secret", 0o600), b"etc/hosts": file(b"hosts")})
    walk = "import sys; from nitro_vsock import Rootfs; Rootfs.from_directory(sys.argv[1]).length"
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-o", trace, "-e", "trace=openat", sys.executable, "-c", walk, root], check=True
    )
    opened = re.findall(r'openat\(\d+, "(shadow|hosts)"', trace.read_text())
    assert opened == ["shadow"]


# What is left out

EXCLUDED = {
    b"usr/share/doc/a": file(),
    b"usr/share/man": file(),
    b"usr/doc": file(),
    b"opt/a.pyc": file(),
    b"opt/a.py": file(),
    b"a.pyc/deep/x": file(),
}


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([], "a.pyc a.pyc/deep a.pyc/deep/x opt opt/a.py opt/a.pyc usr usr/doc usr/share"
         " usr/share/doc usr/share/doc/a usr/share/man"),
        (["*.pyc", "usr/share"], "opt opt/a.py usr usr/doc"),
        (["doc"], "a.pyc a.pyc/deep a.pyc/deep/x opt opt/a.py opt/a.pyc usr usr/share"
         " usr/share/man"),
        (("/doc", "/usr/", "opt/*.pyc", "a.pyc/*"), "a.pyc opt opt/a.py"),
        (iter(["[au]*"]), "opt"),
        (lambda path: path in ("usr", "opt/a.py") or "deep" in path, "a.pyc opt opt/a.pyc"),
    ],
)  # fmt: skip
def test_exclude_leaves_out_what_it_says_with_all_in_it(root, exclude, left):
    """Globs without a slash anywhere, with one from the root; or a function of the path."""
    build(root, EXCLUDED)
    assert names(packed(root, exclude=exclude)) == sorted(
        ["rootfs", *(f"rootfs/{name}" for name in left.split())],
        key=lambda name: name + "/" * os.path.isdir(root + name.removeprefix("rootfs")),
    )


def test_excluded_first_name_of_a_file_makes_the_second_the_file(root):
    """A hard link never leads to what is not there."""
    build(root, {b"a": file(b"data"), b"b": link(b"a"), b"c": link(b"a")})
    with tarfile.open(fileobj=io.BytesIO(packed(root, exclude=["a"]))) as tar:
        assert [(m.name, m.type, m.linkname) for m in tar][1:] == [
            ("rootfs/b", tarfile.REGTYPE, ""),
            ("rootfs/c", tarfile.LNKTYPE, "rootfs/b"),
        ]


def test_error_of_an_exclude_function_gets_out_and_leaves_nothing(root):
    """In the middle of the walk: `nothing_leaks` would see the directories it was in."""
    build(root, {b"a/b/c": file()})
    rootfs = Rootfs.from_directory(root, exclude=lambda path: path == "a/b/c" and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        rootfs.open()


@pytest.mark.parametrize("exclude", ["*.pyc", b"x", 5, [""], ["/"], [5], [b"x"]])
def test_exclude_that_is_none_is_refused(root, exclude):
    """A string alone is a mistake: it would be taken letter by letter."""
    os.mkdir(root)
    with pytest.raises(InvalidArgumentError, match="exclude"):
        Rootfs.from_directory(root, exclude=exclude)


# Trees that change while they are sent


def victim(root, size):
    """Make a tree whose file z/victim is looked at only when a guest reads on."""
    outside = f"{root}-outside"
    build(outside, {b"victim": file(pattern(size)), b"secret": file(b"secret")})
    items = {b"a": file(content(BEHIND)), b"z/victim": file(pattern(size)), b"zz": file()}
    return build(root, items), outside


def append(path):
    """Let a file grow."""
    with open(path, "ab") as out:
        out.write(b"more")


def overwrite(path):
    """Write to a file, so that only its times show it."""
    info = os.stat(path)
    with open(path, "r+b") as out:
        out.write(b"X")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def replace(path, outside):
    """Put another file of the same size and times there."""
    info = os.stat(path)
    shutil.copy2(f"{outside}/victim", f"{outside}/copy")
    os.utime(f"{outside}/copy", ns=(info.st_atime_ns, info.st_mtime_ns))
    os.replace(f"{outside}/copy", path)


def swap(path, make):
    """Put something else there."""
    os.rename(path, path + ".old")
    make(path)


CHANGES = {
    "truncated": (SourceTruncatedError, lambda path, _: os.truncate(path, 10)),
    "emptied": (SourceTruncatedError, lambda path, _: os.truncate(path, 0)),
    "grown": (SourceChangedError, lambda path, _: append(path)),
    "overwritten": (SourceChangedError, lambda path, _: overwrite(path)),
    "chmod": (SourceChangedError, lambda path, _: os.chmod(path, 0o777)),
    "removed": (SourceChangedError, lambda path, _: os.unlink(path)),
    "replaced": (SourceChangedError, replace),
    "symlink": (
        SourceChangedError,
        lambda path, out: swap(path, lambda path: os.symlink(f"{out}/secret", path)),
    ),
    "fifo": (SourceChangedError, lambda path, _: swap(path, os.mkfifo)),
    "directory": (SourceChangedError, lambda path, _: swap(path, os.mkdir)),
}


def expect_failure(root, uds, expected, meanwhile, name):
    """Launch, let something happen, and check the error and what the guest saw."""
    guests, arrived = [], io.BytesIO()
    with pytest.raises(expected) as caught:
        launch(root, uds, meanwhile=meanwhile, guests=guests, sink=arrived.write)
    failure = guests[0].failure()
    error = caught.value
    assert type(error) is expected
    assert f"{root}/{name}" in str(error)
    assert (error.stage, error.must_terminate_enclave) == (Stage.ROOTFS, True)
    assert 0 < error.bytes_sent < error.total
    assert error.offset == len(arrived.getvalue())
    assert isinstance(failure, GuestError)
    assert "of a payload" in str(failure)
    assert b"secret" not in arrived.getvalue()
    return error


@pytest.mark.parametrize("size", [1000, LARGE + 1000], ids=["gathered", "large"])
@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changed_before_its_turn_is_named(root, uds, change, size):
    """Nothing of what is there now is sent, and no Finished."""
    path, outside = victim(root, size)
    expected, act = CHANGES[change]
    error = expect_failure(
        path, uds, expected, lambda: act(f"{path}/z/victim", outside), "z/victim"
    )
    if change == "symlink":  # it was not even opened
        assert "is a symbolic link now" in str(error)


@pytest.mark.parametrize("change", ["symlink", "other", "gone", "file"])
def test_directory_swapped_before_its_turn_leads_nowhere(root, uds, change):
    """A symbolic link to outside, another directory with the same files, none, or a file."""
    path, outside = victim(root, 1000)

    def act():
        os.rename(f"{path}/z", f"{path}/.z")
        if change == "symlink":
            os.symlink(outside, f"{path}/z")
        elif change == "other":
            os.rename(outside, f"{path}/z")
        elif change == "file":
            Path(path, "z").write_bytes(b"")

    error = expect_failure(path, uds, SourceChangedError, act, "z")
    if change == "symlink":
        assert "is no directory any more" in str(error)


def test_other_directory_is_noticed_by_itself(root, uds):
    """Also where there is no file in it that could show it."""
    build(root, {b"a": file(content(BEHIND)), b"z": folder()})
    act = lambda: swap(f"{root}/z", os.mkdir)  # noqa: E731
    expect_failure(root, uds, SourceChangedError, act, "z")


def test_other_symbolic_link_is_noticed(root, uds):
    """Of the same length; what it leads to is no part of the walk."""
    build(root, {b"a": file(content(BEHIND)), b"z": symlink(b"target")})
    act = lambda: swap(f"{root}/z", lambda path: os.symlink("secret", path))  # noqa: E731
    expect_failure(root, uds, SourceChangedError, act, "z")


@pytest.mark.parametrize("kind", ["symlink", "long symlink", "fifo", "link", "empty"])
def test_member_without_data_that_was_replaced_is_named(root, uds, kind):
    """What is made of the walk alone is checked as files are."""
    make = {
        "symlink": symlink(b"target"),
        "long symlink": symlink(b"t" * 200),
        "fifo": fifo(),
        "link": link(b"0"),
        "empty": file(),
    }[kind]
    build(root, {b"0": file(), b"a": file(content(BEHIND)), b"z": make})
    expect_failure(root, uds, SourceChangedError, lambda: swap(f"{root}/z", os.mkfifo), "z")


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_large_file_cut_while_it_is_sent_is_named(root, uds, strategy):
    """What the core notices in the middle of a file says which file it was."""
    build(root, {b"a": file(content(BEHIND)), b"b": file()})
    guests = []
    with pytest.raises(SourceTruncatedError) as caught:
        launch(
            root,
            uds,
            meanwhile=lambda: os.truncate(f"{root}/a", BEHIND - 100_000),
            guests=guests,
            strategy=strategy,
        )
    assert f"{root}/a" in str(caught.value)
    assert isinstance(guests[0].failure(), GuestError)


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(overwrite, id="overwritten"),
        pytest.param(append, id="grown"),
        pytest.param(os.unlink, id="removed"),
    ],
)
def test_large_file_changed_while_it_is_sent_is_named(root, uds, act):
    """It is looked at once more behind its last byte."""
    build(root, {b"a": file(content(BEHIND)), b"b": file()})
    expect_failure(root, uds, SourceChangedError, lambda: act(f"{root}/a"), "a")


def test_file_added_after_the_walk_is_not_sent(root, uds):
    """What is sent is what was declared; a new name changes nothing."""
    path, _ = victim(root, 1000)
    expected = hashlib.sha256(trees.model(path)).hexdigest()
    _, taken = launch(path, uds, meanwhile=lambda: Path(path, "z/new").write_bytes(b"new"))
    assert taken.rootfs_sha256 == expected


def test_directory_is_walked_anew_by_each_launch(root, uds):
    """A Rootfs names its directory; what is in it counts when the launch begins to listen."""
    build(root, {b"a": file()})
    rootfs = Rootfs.from_directory(root)
    first = rootfs.length
    Path(root, "b").write_bytes(pattern(50_000))
    source = rootfs.open()
    source.close()
    assert source.length == rootfs.length > first


def test_abandoned_sending_closes_what_it_opened(root):
    """In the middle of a large file, deep in the tree: `nothing_leaks` would see them."""
    build(root, {b"a/b/c/large": file(content(LARGE + 1))})
    source = Rootfs.from_directory(root).open()
    pieces = source.pieces()
    next(pieces), next(pieces)
    source.close()
    source.close()


def test_stage_holds_the_largest_gathered_file():
    """With the longest name there can be; else a tree could never be sent."""
    assert STAGE_BYTES > LARGE + 2 * (1 << 16)


# Gathered on a thread, ahead of what is sent


@pytest.fixture
def many(root):
    """A tree of so many pieces that they are made ahead: large files with small ones between."""
    items = {b"%02d/large" % n: file(content(LARGE + 1 + n)) for n in range(2 * (ALONE + AHEAD))}
    items |= {b"%02d/small" % n: file(pattern(3000 + n)) for n in range(2 * (ALONE + AHEAD))}
    return build(root, items | {b"zz": file(b"last")})


def take_until_ahead(pieces):
    """Take pieces up to a large file behind which a thread gathers; return that file's path."""
    before = threading.active_count()
    for piece in pieces:
        if threading.active_count() > before and isinstance(piece, FilePayload):
            return os.readlink(f"/proc/self/fd/{piece.fd}")
    pytest.fail("no thread was started")


def test_tree_gathered_ahead_is_the_same_archive(many):
    """With a thread, which is gone at the end, and where none can be started."""
    before = threading.active_count()
    assert packed(many) == trees.model(many)
    assert threading.active_count() == before


def test_tree_is_gathered_by_the_sender_where_no_thread_can_be_started(many, monkeypatch):
    """The same archive."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert packed(many) == trees.model(many)


def test_small_tree_is_sent_without_a_thread(root, monkeypatch):
    """It would cost more than it gains."""
    monkeypatch.delattr(threading.Thread, "start")
    build(root, {b"a": file(content(LARGE + 1)), b"b": file(b"b")})
    assert packed(root) == trees.model(root)


@pytest.mark.parametrize("how", ["closed", "forgotten", "source closed"])
def test_sending_abandoned_while_a_thread_gathers_leaves_nothing(many, how):
    """Neither thread nor descriptor, of which some are open ahead."""
    before = threading.active_count()
    source = Rootfs.from_directory(many).open()
    try:
        pieces = source.pieces()
        take_until_ahead(pieces)
        if how == "closed":
            pieces.close()
        elif how == "forgotten":
            del pieces
        else:
            source.close()
        assert threading.active_count() == before
    finally:
        source.close()


def test_first_change_in_the_archives_order_is_named(many):
    """Of a large file while it is sent, though the thread has met a later one before."""
    source = Rootfs.from_directory(many).open()
    try:
        os.unlink(f"{many}/zz")
        pieces = source.pieces()
        path = take_until_ahead(pieces)
        assert source.where == path
        overwrite(path)
        with pytest.raises(SourceChangedError, match=re.escape(path)):
            next(pieces)
    finally:
        source.close()


def test_change_that_the_thread_meets_is_raised_behind_all_before_it(many):
    """What was sound is given first; then the error that names the file, and no thread is left."""
    before = threading.active_count()
    source = Rootfs.from_directory(many).open()
    try:
        os.unlink(f"{many}/zz")
        large = 0
        with pytest.raises(SourceChangedError, match=re.escape(f"{many}/zz")):
            for piece in source.pieces():
                large += isinstance(piece, FilePayload)
        assert large == 2 * (ALONE + AHEAD)
        assert threading.active_count() == before
    finally:
        source.close()


def test_deadline_ends_a_launch_whose_tree_is_gathered_ahead(many, uds):
    """The guest reads nothing more: sender and thread wait, and both end."""
    Path(many, f"{ALONE:02}/m").write_bytes(content(BEHIND))
    stalled = threading.Event()
    before = threading.enumerate()
    writer = EnclaveArgsWriter(Rootfs.from_directory(many), "/bin/app", ["/bin/app"], {"A": "1"})
    with writer.listen(CID, uds_path=uds) as launched:
        guest = Guest(f"{uds}_{CID + 1}", before_read=lambda got: got > LARGE and stalled.wait(30))
        with pytest.raises(StreamTimeoutError):
            launched.send(1)
        assert set(threading.enumerate()) <= {guest, *before}
    stalled.set()
    assert isinstance(guest.failure(), GuestError)
