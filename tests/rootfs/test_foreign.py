"""Foreign archives as root file systems: what becomes of every member, what is refused."""

import contextlib
import hashlib
import io
import itertools
import logging
import os
import random
import subprocess
import tarfile
import tracemalloc

import foreign_tars as foreign
import pytest
import trees
from foreign_tars import END, block, long_name, member, pax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import CID
from peer import Guest, GuestError

from nitro_vsock import (
    ArchiveError,
    EnclaveArgsWriter,
    InvalidArgumentError,
    Rootfs,
    SourceChangedError,
    SourceError,
    SourceReadError,
    Stage,
)
from nitro_vsock.archive import header as ustar
from nitro_vsock.archive.rules import TarChecker
from nitro_vsock.cli.ui.rootfs import choose_rootfs
from nitro_vsock.rootfs import foreign as tars
from nitro_vsock.transport.stream import FilePayload

GIB = 1 << 30


@pytest.fixture
def archive(tmp_path):
    """A function that stores an archive and returns its path."""
    numbers = itertools.count()

    def store(data):
        path = tmp_path / f"{next(numbers)}.tar"
        path.write_bytes(data)
        # So that every later write shows.
        os.utime(path, ns=(10**18, 10**18))
        return path

    return store


def converted(path, prefix="rootfs/"):
    """Return what is sent for a foreign archive."""
    source = Rootfs.from_tar(path, prefix).open()
    try:
        data = b"".join(map(bytes, source.chunks()))
        source.verify()
        assert len(data) == source.length
    finally:
        source.close()
    checker = TarChecker()
    checker.feed(memoryview(data))
    checker.finish()
    return data


def members(data):
    """Return the members as tarfile reads them, and their data."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        for info in tar:
            content = tar.extractfile(info).read() if info.isreg() else None
            found.append((info, content))
    return found


def names(data):
    """Return the names of the members."""
    return [info.name for info, _ in members(data)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The trees that are archived: {what it holds: path}."""
    above = tmp_path_factory.mktemp("trees")
    kinds = {"SHORT": foreign.SHORT, "MEDIUM": foreign.MEDIUM, "LONG": foreign.LONG}
    return {
        id(items): trees.build(above / name, items, mtime=1_700_000_000_123_456_789)
        for name, items in kinds.items()
    }


WRITTEN = [
    *((foreign.gnu_tar, form, items) for form, items in foreign.GNU_TAR.items()),
    *((foreign.bsdtar, form, items) for form, items in foreign.BSDTAR.items()),
    *((foreign.python, form, items) for form, items in foreign.PYTHON.values()),
]


@pytest.mark.parametrize(
    ("write", "form", "items"), WRITTEN, ids=lambda value: getattr(value, "__name__", None)
)
def test_archive_of_any_tool_becomes_the_directorys_own(archive, made, write, form, items):
    """Byte for byte the archive of the tree the tool was run on, in whatever format it writes."""
    root = made[id(items)]
    assert converted(archive(write(form, root))) == trees.model(root)


@pytest.mark.parametrize("start", [b"./", b"rootfs/", b"./rootfs/"])
def test_beginning_of_the_names_makes_no_difference(archive, made, tmp_path, start):
    """With or without ./, and where everything lies under rootfs/ already."""
    root = made[id(foreign.LONG)]
    above = root
    if b"rootfs" in start:
        above = tmp_path
        subprocess.run(["cp", "-a", root, tmp_path / "rootfs"], check=True)
    listed = b"".join(start + name + b"\0" for name in foreign.paths(root))
    done = subprocess.run(
        ["tar", "-c", "--format=gnu", "-C", above, "--no-recursion", "--null", "-T", "-"],
        input=listed,
        capture_output=True,
        check=True,
    )
    assert converted(archive(done.stdout)) == trees.model(root)


def test_directory_above_rootfs_is_left_out(archive, made, tmp_path):
    """`tar -C above .` has a member for the directory above too."""
    os.mkdir(tmp_path / "above")
    subprocess.run(["cp", "-a", made[id(foreign.LONG)], tmp_path / "above" / "rootfs"], check=True)
    done = subprocess.run(
        ["tar", "-c", "-C", tmp_path / "above", "."], capture_output=True, check=True
    )
    found = names(converted(archive(done.stdout)))
    assert found[0] == "rootfs"
    assert len(found) == len(trees.describe(made[id(foreign.LONG)]))


def test_directory_named_rootfs_among_others_is_one_of_them(archive):
    """Only where all lie under it is it taken for the root."""
    data = member(b"rootfs/bin/app") + member(b"etc/hosts") + END
    assert names(converted(archive(data))) == ["rootfs/rootfs/bin/app", "rootfs/etc/hosts"]


@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_archive_of_go_as_docker_exports_it(archive, form, caplog):
    """Names without ./, directories without slash, hard links, dev/console, other people's ids."""
    found = {
        info.name: (info, data) for info, data in members(converted(archive(foreign.go(form))))
    }
    assert list(found)[:4] == ["rootfs/.dockerenv", "rootfs/bin", "rootfs/bin/app", "rootfs/etc"]
    assert not any(name.startswith(("rootfs/dev", "rootfs/tmp")) for name in found)
    app, data = found["rootfs/bin/app"]
    assert (app.mode, data) == (0o4755, b"program\n" * 200)
    assert (app.uid, app.gid, app.mtime, app.uname, app.gname) == (0, 0, 0, "", "")
    assert not app.pax_headers
    assert found["rootfs/etc/secret"][0].mode == 0o600
    assert found["rootfs/etc/mtab"][0].linkname == "/proc/mounts"
    assert found["rootfs/etc/again"][0].linkname == "rootfs/bin/app"
    long = "rootfs/usr/" + "directory/" * 9 + "f" * 60
    assert found[long][1] == b"long"
    if form != "ustar":
        assert found["rootfs/usr/größe-" + "ü" * 80][1] == b"non-ASCII"
        assert found["rootfs/usr/hard"][0].linkname == "rootfs/usr/" + "l" * 250
        assert found["rootfs/usr/soft"][0].linkname == "../" * 60 + "bin/app"
    assert ("bin/app" in caplog.text) == (form == "pax")


def test_left_out_attributes_are_logged_once(archive, caplog):
    """An extended attribute may be what a program lives by; who reads the log learns of it."""
    data = b"".join(
        pax([(b"SCHILY.xattr.security.capability", b"\1\0\n")]) + member(b"ping%d" % index)
        for index in range(3)
    )
    rootfs = Rootfs.from_tar(archive(data + END))
    rootfs.open().close()
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        f"{rootfs.name}: extended attributes are left out, the guest would not set them: "
        "'ping0' and 2 more"
    ]


def test_guest_unpacks_the_tree(archive, made, uds, guest_path, tmp_path):
    """Sent over a socket, and unpacked by libarchive without a locale, as the guest does."""
    root = made[id(foreign.LONG)]
    path = archive(foreign.gnu_tar("posix", root, start=b"./"))
    writer = EnclaveArgsWriter(Rootfs.from_tar(path), "/bin/app", ["/bin/app"], {"A": "1"})
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        report = launch.send(30)
    data = converted(path)
    assert guest.result().rootfs_sha256 == hashlib.sha256(data).hexdigest()
    assert report.rootfs_bytes == len(data)
    done = subprocess.run(
        ["bsdtar", "-xpf", "-", "-C", tmp_path],
        input=data,
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    assert not done.stderr
    assert trees.describe(tmp_path / "rootfs") == trees.describe(root)


# Sparse files


@pytest.fixture
def holes(tmp_path):
    """A tree with files with holes: many, only one, at each end, none."""
    (tmp_path / "holes").mkdir()
    for name, size, islands in (
        ("many", 3_000_001, range(0, 3_000_000, 65536)),
        ("begins", 1_000_000, [524_288]),
        ("ends", 1_048_576 + 5, [1_048_576]),
        ("only", 300_000, []),
        ("none", 5000, [0]),
    ):
        with open(tmp_path / "holes" / name, "wb") as out:
            out.truncate(size)
            for island in islands:
                out.seek(island)
                out.write(random.Random(island).randbytes(min(5000, size - island)))
    return str(tmp_path / "holes")


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("oldgnu", ()),
        ("gnu", ()),
        ("posix", ("--sparse-version=0.0",)),
        ("posix", ("--sparse-version=0.1",)),
        ("posix", ("--sparse-version=1.0",)),
    ],
)
def test_sparse_file_is_sent_whole(archive, holes, form, options):
    """Every form GNU tar has for holes becomes a plain file with zeros in their place."""
    data = foreign.gnu_tar(form, holes, "--sparse", *options)
    assert len(data) < 1_500_000
    assert converted(archive(data)) == trees.model(holes)


def test_sparse_file_of_bsdtar_is_sent_whole(archive, holes):
    """It writes the 1.0 form."""
    data = foreign.bsdtar("pax", holes, "--read-sparse")
    assert len(data) < 1_500_000
    assert b"GNU.sparse.major=1" in data
    assert converted(archive(data)) == trees.model(holes)


def number(value):
    """Return a number's field of 12 bytes."""
    return b"%011o\0" % value if value < 8**11 else b"\x80" + value.to_bytes(11, "big")


def old_sparse(runs, size, stored, **fields):
    """Return the header of a sparse file in the old GNU form."""
    numbers = b"".join(number(value) for run in runs for value in run)
    return block(b"s", b"S", stored, magic=b"ustar  \0", b386=numbers, b483=number(size), **fields)


def test_sparse_file_that_is_left_out_is_left_out_whole(archive):
    """Its map has blocks of its own."""
    head = old_sparse([(0, 512)], 4096, 512, b0=b"dev/s", b482=b"\1")
    data = head + bytes(512) + b"x" * 512 + member(b"after", b"text") + END
    assert names(converted(archive(data))) == ["rootfs/after"]


def test_terabytes_of_holes_take_no_memory(archive):
    """Planned to the byte, made a piece at a time."""
    size = 5 << 40
    path = archive(old_sparse([(size - 512, 512)], size, 512) + b"x" * 512 + END)
    source = Rootfs.from_tar(path).open()
    try:
        assert source.length == ustar.BLOCK + size + ustar.end_of_archive(ustar.BLOCK + size)
        pieces = itertools.islice(source.pieces(), 50)
        head = bytes(next(pieces))
        assert tarfile.TarInfo.frombuf(head[:512], "utf-8", "strict").size == size
        assert not any(any(piece) for piece in pieces)
    finally:
        source.close()


# Headers


TEXT = st.binary(min_size=1, max_size=300).filter(lambda text: b"\0" not in text)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([b"0", b"1", b"2", b"5", b"6"]),
    name=st.one_of(TEXT, st.just(b"a" * 100), st.just(b"a" * 101)),
    link=st.one_of(st.just(b""), TEXT),
    size=st.one_of(st.integers(0, 1 << 20), st.integers(8**11 - 2, 1 << 62)),
    mode=st.integers(0, 0o7777),
)
def test_header_is_what_the_standard_library_makes(kind, name, link, size, mode):
    """To the byte; ours is only faster."""
    name = name.rstrip(b"/") + b"/" if kind == b"5" else name
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.type, info.size, info.mode = kind, size, mode
    info.linkname = link.decode("utf-8", "surrogateescape")
    made = tars._header(kind, name, link, size, mode)
    assert made == ustar.header(info)
    assert len(made) == ustar.header_length(len(name), len(link))


@settings(max_examples=300, deadline=None)
@given(
    made=st.one_of(
        st.builds(
            block,
            name=st.binary(max_size=100),
            kind=st.sampled_from([b"\0", b"0", b"5"]),
            size=st.one_of(
                st.integers(0, 8**11 - 1),
                st.binary(min_size=12, max_size=12),
                st.from_regex(rb"[0-7]{12}", fullmatch=True),
                st.from_regex(rb"[ 0-9_+-]{8,12}", fullmatch=True).map(lambda text: text[:12]),
            ),
            mode=st.sampled_from([b"0000644\0", b"000755 \0", b"  100644", b"0100755\0", b"644\0"]),
            magic=st.sampled_from([b"ustar\x0000", b"ustar  \0", b""]),
        )
    ),
    broken=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=1),
)
def test_header_is_read_as_the_standard_library_reads_it(made, broken):
    """The same blocks are headers, and the same size and mode are in them."""
    made = bytearray(made)
    for at, value in broken:
        made[at] = value
    try:
        info = tarfile.TarInfo.frombuf(bytes(made), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        # Of owner and times nothing is read; checksum, size and mode must be right.
        try:
            tars._parse(bytes(made))
        except (tarfile.HeaderError, tars._MalformedError):
            return
        for field in ((108, 116), (116, 124), (136, 148), (329, 337), (337, 345)):
            made[slice(*field)] = bytes(field[1] - field[0])
        made[148:156] = b" " * 8
        made[148:156] = b"%06o\0 " % sum(made)
        tarfile.TarInfo.frombuf(bytes(made), "utf-8", "surrogateescape")
        return
    _, _, size, mode, _ = tars._parse(bytes(made))
    assert (size, mode) == (info.size, info.mode & 0o7777)


def test_old_prefix_field_of_gnu_is_no_name(archive):
    """GNU tar keeps times where others have the first part of a long name."""
    data = block(b"name", magic=b"ustar  \0", b345=b"14373016432\0") + END
    assert names(converted(archive(data))) == ["rootfs/name"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"/etc/passwd", "rootfs/etc/passwd"),
        (b"//etc//passwd", "rootfs/etc/passwd"),
        (b"./././a/./b", "rootfs/a/b"),
        (b"..a/b..", "rootfs/..a/b.."),
        (b".hidden", "rootfs/.hidden"),
        (b"a/...", "rootfs/a/..."),
        (b"development", "rootfs/development"),
        (b"a/dev/b", "rootfs/a/dev/b"),
        (b"\xff\xfe", "rootfs/\udcff\udcfe"),
    ],
)
def test_name_is_put_in_order(archive, name, expected):
    """Slashes at the beginning, doubled ones and single dots go; nothing else does."""
    assert names(converted(archive(member(name) + END))) == [expected]


def test_hard_link_targets_are_renamed_and_symbolic_ones_are_not(archive):
    """A hard link names a member, a symbolic one a path in the guest."""
    data = (
        member(b"a", b"x")
        + block(b"b", b"1", link=b"./a")
        + block(b"c", b"1", link=b"/b")
        + block(b"d", b"2", link=b"/a")
        + block(b"e", b"2", link=b"../a/./b")
        + END
    )
    found = {info.name: info.linkname for info, _ in members(converted(archive(data)))}
    assert found == {
        "rootfs/a": "",
        "rootfs/b": "rootfs/a",
        "rootfs/c": "rootfs/b",
        "rootfs/d": "/a",
        "rootfs/e": "../a/./b",
    }


@pytest.mark.parametrize("top", ["dev", "proc", "run", "sys", "tmp", "krun-awsnitro"])
def test_what_the_guest_makes_is_left_out(archive, top):
    """With everything below, whatever it is; the same name elsewhere stays."""
    name = top.encode()
    data = (
        block(name + b"/", b"5")
        + member(name + b"/file", b"x" * 2000)
        + block(b"./" + name + b"/console", b"3")
        + block(name + b"/link", b"1", link=b"nowhere")
        + member(b"etc/" + name, b"kept")
        + END
    )
    assert names(converted(archive(data))) == [f"rootfs/etc/{top}"]
    as_link = block(name, b"2", link=b"var") + member(b"x") + END
    assert names(converted(archive(as_link))) == ["rootfs/x"]


def test_prefix_may_lead_below_the_root(archive):
    """Then nothing is left out: it does not lie where the guest makes something."""
    data = member(b"tmp/x") + block(b"y", b"1", link=b"tmp/x") + END
    found = members(converted(archive(data), "rootfs/opt/app"))
    assert [info.name for info, _ in found] == ["rootfs/opt/app/tmp/x", "rootfs/opt/app/y"]
    assert found[1][0].linkname == "rootfs/opt/app/tmp/x"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "/",
        "other/",
        "rootfs/../x",
        "rootfs/./x",
        "rootfs//x",
        "/rootfs/",
        "rootfs/tmp/x",
        "rootfs/a\0b",
        5,
    ],
)
def test_prefix_that_the_guest_would_not_take_is_refused(archive, prefix):
    """Everything must lie under rootfs/."""
    with pytest.raises(InvalidArgumentError) as caught:
        Rootfs.from_tar(archive(member() + END), prefix)
    assert caught.value.field == "prefix"


def test_pax_header_becomes_plain(archive):
    """Name, target and size count, an empty value means the header's own, the rest is dropped."""
    data = (
        pax([(b"comment", b"of git archive")], kind=b"g")
        + pax([(b"path", b"n" * 200), (b"size", b"5"), (b"mtime", b"1.5"), (b"uid", b"7")])
        + block(b"short")
        + foreign.data(b"hello")
        + pax([(b"path", b""), (b"linkpath", b"n" * 200)])
        + block(b"hard", b"1", link=b"cut")
        + END
    )
    result = converted(archive(data))
    assert b"PaxHeaders" not in result
    (first, text), (second, _) = members(result)
    assert (first.name, text) == ("rootfs/" + "n" * 200, b"hello")
    assert (second.name, second.linkname) == ("rootfs/hard", first.name)


def test_device_keeps_its_numbers(archive):
    """Outside of /dev a device node is a member like any other."""
    data = block(b"null", b"3", b329=b"0000001\00000003\0", mode=b"0020666\0") + END
    ((info, _),) = members(converted(archive(data)))
    assert (info.type, info.devmajor, info.devminor, info.mode) == (b"3", 1, 3, 0o666)


def test_volume_label_is_left_out(archive):
    """`tar -V` writes one; it is no file."""
    assert names(converted(archive(block(b"label", b"V") + member() + END))) == ["rootfs/x"]


def test_name_that_comes_twice_stays_twice(archive):
    """The guest takes the later one, as every tar does."""
    data = member(b"a", b"old") + member(b"a", b"new") + END
    assert [text for _, text in members(converted(archive(data)))] == [b"old", b"new"]


@pytest.mark.parametrize(
    "end", [b"", END[:512], bytes(100), END + b"garbage" * 1000, bytes(70_000)]
)
def test_any_end_of_the_archive_is_taken(archive, end):
    """None, half of one, and what follows one."""
    data = converted(archive(member(b"a", b"text") + end))
    assert len(data) == tarfile.RECORDSIZE
    assert names(data) == ["rootfs/a"]


# The command line


def test_ready_archive_is_sent_as_it_is(archive, made):
    """Byte for byte: whoever measured it must get what was measured."""
    data = member(b"rootfs/x", b"text", b108=b"0001000\0") + END + b"behind"
    path = archive(data)
    source = choose_rootfs(str(path)).open()
    try:
        assert isinstance(source.payload, FilePayload)
        assert b"".join(map(bytes, source.chunks())) == data
    finally:
        source.close()


@pytest.mark.parametrize("first", [b"x", b"./", b"/rootfs/x", b"rootfs/../x", b"rootfsx"])
def test_other_archive_is_put_under_rootfs(archive, first):
    """The first member decides."""
    path = archive(member(first) + member(b"y") + END)
    if b".." in first:
        with pytest.raises(ArchiveError):
            choose_rootfs(str(path))
    else:
        assert choose_rootfs(str(path)).length == Rootfs.from_tar(path).length
        with contextlib.closing(choose_rootfs(str(path)).open()) as source:
            assert isinstance(source.payload, tars.TarPlan)


def test_file_that_is_no_archive_is_left_to_the_checks(archive):
    """They say more about it."""
    with contextlib.closing(choose_rootfs(str(archive(b"x" * 5000))).open()) as source:
        assert isinstance(source.payload, FilePayload)


# What is refused

FILE = member(b"f", b"x")
REFUSED = {
    "nothing but an end": (END * 10, "", "no member"),
    "only what is left out": (member(b"dev/x") + END, "", "no member"),
    "no tar": (b"#!/bin/sh\n" * 200, "", "no tar header at its beginning"),
    "half a block": (b"x" * 300, "", "in the middle of a header at its beginning"),
    "half a block behind": (FILE + b"x" * 300, "", "in the middle of a header after member 'f'"),
    "garbage behind": (FILE + b"x" * 512, "", "no tar header after member 'f'"),
    "bad checksum": (FILE + block(b"g").replace(b"g", b"h", 1), "", "bad checksum"),
    "checksum of seven digits": (
        block(b"g")[:154] + b"7" + block(b"g")[155:],
        "",
        "bad checksum",
    ),
    "parent": (member(b"a/../b"), "a/../b", "'..'"),
    "parent first": (member(b"../b"), "../b", "'..'"),
    "parent alone": (block(b"..", b"5"), "..", "'..'"),
    "parent in what is left out": (member(b"dev/../etc/x"), "dev/../etc/x", "'..'"),
    "root is a file": (member(b"./"[:1], b"x"), ".", "no directory"),
    "root is a link": (block(b".", b"2", link=b"/etc"), ".", "no directory"),
    "no name": (member(b""), "", "no directory"),
    "through a link": (
        block(b"a", b"2", link=b"/etc") + member(b"a/passwd"),
        "a/passwd",
        "behind the symbolic link 'a'",
    ),
    "through a link further up": (
        member(b"b/y") + block(b"b/a", b"2", link=b"..") + member(b"b/a/c/d"),
        "b/a/c/d",
        "behind the symbolic link 'b/a'",
    ),
    "through a link after its siblings": (
        member(b"a/x") + block(b"a", b"2", link=b"/") + member(b"a/y"),
        "a/y",
        "behind the symbolic link 'a'",
    ),
    "through a hard link to a link": (
        block(b"a", b"2", link=b"/") + block(b"h", b"1", link=b"a") + member(b"h/y"),
        "h/y",
        "behind the symbolic link 'h'",
    ),
    "directory over a link": (
        block(b"a", b"2", link=b"/etc") + block(b"a/", b"5"),
        "a/",
        "where a symbolic link was",
    ),
    "hard link through a link": (
        block(b"a", b"2", link=b"/etc") + block(b"h", b"1", link=b"a/shadow"),
        "h",
        "behind the symbolic link 'a'",
    ),
    "link to nothing": (block(b"a", b"2"), "a", "to nothing"),
    "hard link to itself": (FILE + block(b"a", b"1", link=b"./a"), "a", "to itself"),
    "hard link to a later one": (
        block(b"a", b"1", link=b"f") + FILE + block(b"b", b"1", link=b"f"),
        "a",
        "no file before it",
    ),
    "hard links in a circle": (
        block(b"a", b"1", link=b"b") + block(b"b", b"1", link=b"a"),
        "a",
        "no file before it",
    ),
    "hard link to nothing": (FILE + block(b"a", b"1", link=b"gone"), "a", "no file before it"),
    "hard link to a directory": (
        block(b"d/", b"5") + block(b"a", b"1", link=b"d"),
        "a",
        "no file before it",
    ),
    "hard link to what is left out": (
        member(b"tmp/f") + block(b"a", b"1", link=b"tmp/f"),
        "a",
        "left out",
    ),
    "hard link to a parent": (FILE + block(b"a", b"1", link=b"../f"), "a", "'..'"),
    "hard link to the root": (FILE + block(b"a", b"1", link=b"."), "a", "hard link to '.'"),
    "hard link out of rootfs": (
        member(b"rootfs/f") + block(b"rootfs/a", b"1", link=b"f"),
        "rootfs/a",
        "not under rootfs/",
    ),
    "cut in its data": (FILE + member(b"g", b"x" * 2000)[:-512], "g", "cut short"),
    "size past the end": (block(b"g", size=8**11 - 1) + END, "g", "cut short"),
    "size of 2^63": (block(b"g", size=b"\x80" + bytes(3) + b"\x80" + bytes(7)), "g", "cut short"),
    "size of 2^88": (block(b"g", size=b"\x80" + b"\xff" * 11), "g", "cut short"),
    "size of -1": (block(b"g", size=b"\xff" * 12), "g", "size of -1"),
    "size of -octal": (block(b"g", size=b"-0000000001\0"), "g", "size of -1"),
    "size that is no number": (block(b"g", size=b"12345678zzz\0"), "", "no tar header"),
    "directory with data": (member(b"d/", b"x"), "d/", "directory of 1 bytes"),
    "unknown type": (block(b"g", b"Q"), "g", "unknown type b'Q'"),
    "volume": (block(b"g", b"M"), "g", "another volume"),
    "dump directory": (block(b"g", b"D"), "g", "incremental"),
    "device of many digits": (
        block(b"g", b"3", b329=b"\x80" + b"\xff" * 7),
        "g",
        "is the device",
    ),
    "global name": (pax([(b"path", b"x")], kind=b"g") + FILE, "PaxHeaders/x", "every member"),
    "pax size past the end": (pax([(b"size", b"9" * 20)]) + FILE, "f", "cut short"),
    "pax size of 21 digits": (pax([(b"size", b"9" * 21)]) + FILE, "f", "the size '999"),
    "pax size negative": (pax([(b"size", b"-1")]) + FILE, "f", "the size '-1'"),
    "pax name with NUL": (pax([(b"path", b"a\0b")]) + FILE, "PaxHeaders/x", "a NUL inside"),
    "pax name too long": (pax([(b"path", b"a" * 5000)]) + FILE, "f", "more than 4095"),
    "pax target too long": (
        pax([(b"linkpath", b"a" * 5000)]) + block(b"l", b"2"),
        "l",
        "more than 4095",
    ),
    "pax names that differ": (
        pax([(b"path", b"a")]) + pax([(b"path", b"b")]) + FILE,
        "PaxHeaders/x",
        "different values of path",
    ),
    "long names that differ": (
        long_name(b"a") + long_name(b"b") + FILE,
        "././@LongLink",
        "different values of path",
    ),
    "long name with NUL": (long_name(b"a\0b") + FILE, "././@LongLink", "a NUL inside"),
    "long name of over a MiB": (
        long_name(b"a" * (1 << 20)) + FILE,
        "././@LongLink",
        "more than 1048576 bytes of headers",
    ),
    "pax headers of over a MiB": (
        pax([(b"comment", b"a" * (1 << 19))]) * 3 + FILE,
        "PaxHeaders/x",
        "more than 1048576 bytes of headers",
    ),
    "pax header alone": (FILE + pax([(b"path", b"a")]) + END, "PaxHeaders/x", "announces another"),
    "pax header cut short": (
        FILE + pax([(b"path", b"a" * 2000)])[:1024],
        "PaxHeaders/x",
        "cut short",
    ),
    **{
        f"pax record {text[:20]!r}": (
            block(b"p", b"x", len(text)) + foreign.data(text) + FILE,
            "p",
            "malformed PAX header",
        )
        for text in (
            b"5",
            b"11 path=abc",
            b"11 path=abcd",
            b"99 path=abc\n",
            b"0 path=abc\n",
            b"-9 path=abc\n",
            b"11 pathabcd\n",
            b"7 =abc\n",
            b"9" * 30 + b" path=a\n",
            b"\n",
            b"1 \n",
        )
    },
    "sparse of a link": (
        pax([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"1")])
        + block(b"a", b"2", link=b"b"),
        "a",
        "no file",
    ),
    "sparse of star, type S": (block(b"g", b"S"), "g", "not supported"),
    "sparse name with NUL": (pax([(b"GNU.sparse.name", b"a\0b")]) + FILE, "PaxHeaders/x", "a NUL"),
    "sparse of star": (pax([(b"SCHILY.realsize", b"1")]) + FILE, "PaxHeaders/x", "not supported"),
    "sparse of version 2": (pax([(b"GNU.sparse.major", b"2")]) + FILE, "f", "not supported"),
    "sparse without a size": (pax([(b"GNU.sparse.map", b"0,1")]) + FILE, "f", "the size ''"),
    "sparse map of odd length": (
        pax([(b"GNU.sparse.map", b"0,1,1"), (b"GNU.sparse.size", b"1")]) + FILE,
        "f",
        "odd length",
    ),
    "sparse map that does not fit": (
        pax([(b"GNU.sparse.map", b"0,2"), (b"GNU.sparse.size", b"2")]) + FILE,
        "f",
        "does not fit",
    ),
    "sparse map past its size": (
        pax([(b"GNU.sparse.map", b"5,1"), (b"GNU.sparse.size", b"5")]) + FILE,
        "f",
        "does not fit",
    ),
    "sparse file of 2^63": (
        pax([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"%d" % (1 << 63))]) + FILE,
        "f",
        "does not fit",
    ),
    "sparse files of 2^63 together": (
        (pax([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"%d" % (1 << 62))]) + FILE) * 2,
        "",
        "more than 2^63",
    ),
    "sparse map in the wrong order": (
        old_sparse([(512, 512), (0, 512)], 2048, 1024) + bytes(1024),
        "s",
        "out of order",
    ),
    "sparse map with a part of a block": (
        old_sparse([(0, 5), (512, 512)], 2048, 517) + bytes(1024),
        "s",
        "out of order",
    ),
    "sparse map that is negative": (
        old_sparse([(0, 512)], 512, 512, b398=b"-0000001000\0") + bytes(512),
        "s",
        "sparse map",
    ),
    "sparse map of letters": (
        old_sparse([(0, 512)], 512, 512, b398=b"zzzzzzzzzzzz") + bytes(512),
        "s",
        "the number b'zzz",
    ),
    "sparse map without an end": (
        old_sparse([(0, 512)], 512, 512, b482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 3000,
        "s",
        "does not end",
    ),
    "sparse map in the data without an end": (
        pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"1")])
        + member(b"s", b"999999999999\n" + b"1\n" * 100),
        "s",
        "does not end",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_archive_is_refused(archive, case):
    """Before anything is bound, by name and reason."""
    data, name, reason = REFUSED[case]
    path = archive(data)
    with pytest.raises(ArchiveError) as caught:
        Rootfs.from_tar(path)
    error = caught.value
    assert reason in str(error)
    assert str(path) in str(error)
    assert len(str(error)) < 1000
    assert (error.member, error.stage) == (name, Stage.VALIDATE)
    assert error.offset <= len(data)
    assert not error.must_terminate_enclave


@pytest.mark.parametrize(
    ("command", "tool"), [("gzip -d", "gzip"), ("bzip2 -d", "bzip2"), ("xz -d", "xz")]
)
def test_compressed_archive_is_refused_with_the_command(archive, command, tool):
    """So that the next step is clear."""
    data = subprocess.run([tool], input=member() + END, capture_output=True, check=True).stdout
    with pytest.raises(InvalidArgumentError, match=command):
        Rootfs.from_tar(archive(data))


def test_file_that_cannot_be_used_is_refused(tmp_path):
    """Not there, a directory, empty."""
    with pytest.raises(SourceReadError):
        Rootfs.from_tar(tmp_path / "gone")
    with pytest.raises(InvalidArgumentError, match="regular file"):
        Rootfs.from_tar(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidArgumentError, match="must not be empty"):
        Rootfs.from_tar(tmp_path / "empty")


def test_links_beyond_a_bound_are_refused(archive, monkeypatch):
    """What must be remembered of a hostile archive is bounded."""
    monkeypatch.setattr(tars, "_MAX_REMEMBERED", 5000)
    fine = b"".join(block(b"%d" % index, b"2", link=b"x") for index in range(40))
    assert len(names(converted(archive(fine + END)))) == 40
    more = b"".join(block(b"%d" % index, b"2", link=b"x") for index in range(60))
    with pytest.raises(ArchiveError, match="one link too many"):
        Rootfs.from_tar(archive(more + END))


# Changes while it is sent


def overwrite(path):
    """Change a byte in place."""
    with open(path, "r+b") as file:
        file.seek(600)
        file.write(b"X")


def replace(path):
    """Overwrite all of it in place: at no moment is it any shorter."""
    with open(path, "r+b") as file:
        file.write(b"x" * path.stat().st_size)


def change_member(path, *fields, **more):
    """Change the header of the last member, and hide it."""
    with open(path, "r+b") as file:
        file.seek(-1024 - 1024, os.SEEK_END)
        file.write(block(*fields, size=1, **more))
    os.utime(path, ns=(10**18, 10**18))


HIDDEN = {
    "bad name": lambda path: change_member(path, b"../" * 30),
    "left out": lambda path: change_member(path, b"dev/last"),
    "long name": lambda path: change_member(path, b"last", b345=b"p" * 150),
    "no header": lambda path: change_member(path, b"last", kind=b"Q"),
    "huge hole": lambda path: change_member(
        path, b"l", b"S", magic=b"ustar  \0", b386=number(0) + number(1), b483=number(1 << 40)
    ),
}


CHANGES = {
    "overwritten": overwrite,
    "truncated": lambda path: os.truncate(path, 1 << 20),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "replaced by garbage": replace,
}


@pytest.fixture
def large(archive):
    """An archive with small members around a large one of 24 MiB."""
    body = random.Random(7).randbytes(24 << 20)
    small = b"".join(member(b"small/%d" % index, b"y" * 700) for index in range(3000))
    return archive(small + member(b"large", body) + small + member(b"last", b"x") + END)


@pytest.mark.parametrize("change", ["overwritten", "truncated", "replaced by garbage"])
def test_change_during_the_transfer_is_noticed(large, uds, guest_path, change):
    """While the guest reads nothing: an error names the file, Finished is not sent."""
    events = [CHANGES[change]]

    def before_read(received):
        if events and received > 4 << 20:
            events.pop()(large)

    writer = EnclaveArgsWriter(Rootfs.from_tar(large), "/bin/app", ["/bin/app"], {"A": "1"})
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path, before_read=before_read)
        with pytest.raises(SourceError) as caught:
            launch.send(30)
    if change != "truncated":
        assert isinstance(caught.value, SourceChangedError)
    assert str(large) in str(caught.value)
    assert caught.value.must_terminate_enclave
    assert isinstance(guest.failure(), GuestError)


@pytest.mark.parametrize("change", CHANGES)
def test_change_before_the_transfer_is_noticed_before_a_byte(large, change):
    """The length was declared already; the next launch takes the file as it is then."""
    rootfs = Rootfs.from_tar(large)
    source = rootfs.open()
    try:
        CHANGES[change](large)
        with pytest.raises(SourceChangedError, match=str(large)):
            next(source.pieces())
    finally:
        source.close()
    if change == "overwritten":
        rootfs.open().close()
    elif change != "longer":
        with pytest.raises(ArchiveError):
            rootfs.open()


@pytest.mark.parametrize("change", HIDDEN)
def test_hidden_change_never_makes_a_bad_archive(large, change):
    """Even where the time is put back: headers are checked again, and no byte too many is made."""
    source = Rootfs.from_tar(large).open()
    try:
        pieces = source.pieces()
        made = next(pieces).nbytes
        HIDDEN[change](large)
        with pytest.raises(SourceChangedError):
            for piece in pieces:
                made += piece.nbytes if isinstance(piece, memoryview) else piece.length
        assert made <= source.length
    finally:
        source.close()


def test_change_is_noticed_by_who_reads_too(large):
    """Packing and measuring call no `verify`."""
    source = Rootfs.from_tar(large).open()
    try:
        chunks = source.chunks()
        next(chunks)
        overwrite(large)
        with pytest.raises(SourceChangedError):
            list(chunks)
    finally:
        source.close()


def bytes_read(act):
    """Return how many bytes this process reads meanwhile."""

    def count():
        with open("/proc/self/io", "rb", buffering=0) as file:
            return int(file.read().split()[1])

    before = count()
    act()
    return count() - before


def test_file_is_looked_through_once_while_it_stays(large):
    """A second launch of the same file costs no second look; of a changed one it does."""
    rootfs = Rootfs.from_tar(large)
    assert bytes_read(lambda: rootfs.open().close()) < 1 << 10  # the compression's mark
    overwrite(large)
    assert bytes_read(lambda: rootfs.open().close()) > 6000 * 512


# Memory and speed


def test_memory_does_not_depend_on_sizes(tmp_path):
    """12 GiB in one member, whose size needs base 256, and thousands of small ones: a few MiB."""
    path = tmp_path / "sparse.tar"
    size = 12 * GIB
    info = tarfile.TarInfo("large")
    info.size = size
    with open(path, "wb") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        out.seek(size, os.SEEK_CUR)
        out.write(b"".join(member(b"small/%d" % index, b"z" * 600) for index in range(20_000)))
        out.write(END)
    tracemalloc.start()
    try:
        source = Rootfs.from_tar(path).open()
        try:
            kinds, total = set(), 0
            for piece in source.pieces():
                kinds.add(type(piece).__name__)
                total += piece.nbytes if isinstance(piece, memoryview) else piece.length
        finally:
            source.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kinds == {"FilePayload", "memoryview"}
    assert total == source.length > size
    assert peak < 3 << 20


def test_pieces_are_few(large):
    """Small members are gathered, a large one is a run of the file."""
    source = Rootfs.from_tar(large).open()
    try:
        sizes = [
            piece.nbytes if isinstance(piece, memoryview) else piece.length
            for piece in source.pieces()
        ]
    finally:
        source.close()
    assert 24 << 20 in sizes
    assert len(sizes) < 15


# Random archives


NAME = st.text("ab.é/", min_size=1, max_size=130)
ENTRY = st.tuples(
    NAME,
    st.sampled_from("0025"),
    st.binary(max_size=1500),
    st.text("ab/.", min_size=1, max_size=120),
    st.integers(0, 0o7777),
)


def random_tar(entries, form):
    """Return the archive of random members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8") as tar:
        for name, kind, data, target, mode in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind.encode(), mode, 1.5
            info.linkname = target if kind == "2" else ""
            info.size = len(data) if kind == "0" else 0
            if kind == "0":
                info.name = name.rstrip("/") or "a"
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that ustar cannot hold
                continue
    return out.getvalue()


FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(entries=st.lists(ENTRY, max_size=12), form=st.sampled_from(FORMS))
def test_random_archive_keeps_its_members(archive, entries, form):
    """What is taken has the same members with the same data under rootfs/."""
    data = random_tar(entries, form)
    try:
        result = converted(archive(data))
    except ArchiveError:
        return
    wanted = []
    for info, text in members(data):
        parts = [part for part in info.name.split("/") if part not in ("", ".")]
        wanted.append(("/".join(["rootfs", *parts]), info.type, info.mode, info.linkname, text))
    got = [(info.name, info.type, info.mode, info.linkname, text) for info, text in members(result)]
    assert got == wanted


def mostly(usual, *rare):
    """Choose from the rare ones once in a while: an archive with many of them is soon refused."""
    often = [*usual] * (20 // len(usual) + 1)
    return st.one_of(st.sampled_from(often), st.sampled_from([*often, *often, *rare]))


PART = mostly([b"a", b"b", b"c", b"d"], b"rootfs", b"tmp", b".", b"..", b".c", b"", b"a" * 45)
PARTS = st.lists(PART, min_size=1, max_size=4).map(b"/".join)
START = mostly([b"a/", b"a/b/"], b"", b"rootfs/", b"./a/", b"./")
"""Most members have neighbours; so the core runs over some."""
ODDITIES = {
    "none": {},
    "prefix": {"b345": b"a/b"},
    "v7": {"magic": b"\0" * 8},
    "gnu": {"magic": b"ustar  \0", "b345": b"00000000000\0"},
    "spaces": {"size": b"        1 \0"},
    "unended": {"size": b"000000000010"},
    "base 256": {"size": b"\x80" + bytes(10) + b"\1"},
    "mode": {"mode": b"000755 \0"},
    "no mode": {"mode": b"\0" * 8},
    "all bits": {"mode": b"7777777\0"},
    "eight digits": {"mode": b"00000644"},
}
ODD = st.tuples(
    START,
    PARTS,
    mostly([b"0", b"5"], b"\0", b"7", b"2", b"1", b"x"),
    st.sampled_from([0, 1, 600, 130 << 10]),
    mostly(["none"], *ODDITIES),
    st.one_of(st.just(0), st.integers(85, 99)),
    mostly([b""], b"/"),
)


def odd_member(start, name, kind, size, oddity, length, end):
    """Return a member that is ordinary but for a thing or two."""
    name = (start + name).ljust(length, b"n")[:99] + end
    fields = {"kind": kind, "link": b"a/b" if kind in (b"1", b"2") else b"", **ODDITIES[oddity]}
    has_data = kind in (b"0", b"\0", b"7")
    text = b"q" * (8 if "size" in fields else size) if has_data else b""
    return block(name, **{"size": len(text), **fields}) + foreign.data(text)


def outcome(path, prefix):
    """Return what becomes of an archive: its bytes, or the error in full."""
    try:
        return converted(path, prefix)
    except (ArchiveError, SourceError) as error:
        return str(error), error.must_terminate_enclave


def check_core(path, prefix="rootfs/"):
    """Check that all is the same where the core runs over nothing."""
    result = outcome(path, prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars.TarRun, "let_pass", lambda *_: None)
        assert outcome(path, prefix) == result


BETWEEN = {
    **{
        f"{kind} {oddity} {end}": odd_member(b"a/", b"x", kind.encode(), 600, oddity, 0, end)
        for kind in "057"
        for oddity in ODDITIES
        for end in (b"", b"/")
    },
    "bad checksum": b"a/y" + member(b"a/x", b"text")[3:],
    "cut short": block(b"a/x", size=1 << 20),
    "directory with a size": block(b"a/x", b"5", 10),
    "another top": member(b"ab/x", b"text"),
    "dropped": member(b"tmp/x", b"text"),
    "longest": member(b"a/" + b"x" * 91, b"text"),
    "too long": member(b"a/" + b"x" * 92, b"text"),
    "longest directory": member(b"a/" + b"x" * 90 + b"/", kind=b"5"),
    "too long a directory": member(b"a/" + b"x" * 91 + b"/", kind=b"5"),
    "behind a link": member(b"a/l", kind=b"2", link=b"c") + member(b"a/l/x", b"text"),
    "a link's place": member(b"a/l", kind=b"2", link=b"c") + member(b"a/l", kind=b"5"),
    "linked to": member(b"a/h", kind=b"1", link=b"a/2"),
    "linked to what comes later": member(b"a/h", kind=b"1", link=b"a/3"),
    **{f"part {part}": member(b"a/%b/x" % part, b"text") for part in (b".", b"..", b"", b"...")},
}


@pytest.mark.parametrize("top", [b"a/", b"t/", b"rootfs/a/"])
@pytest.mark.parametrize("case", BETWEEN)
def test_core_knows_what_is_not_ordinary(archive, case, top):
    """Between neighbours that it runs over: the same bytes, the same error, as without it."""
    beside = [member(top + b"%d" % number, b"text") for number in range(5)]
    check_core(archive(b"".join([*beside[:3], BETWEEN[case], *beside[3:], END])))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    entries=st.lists(ODD, min_size=1, max_size=12),
    changes=st.lists(
        st.tuples(st.integers(0, 8 << 10), st.binary(min_size=1, max_size=3)), max_size=2
    ),
    prefix=st.sampled_from(["rootfs/", "rootfs/below/"]),
    changed=st.sampled_from([False, False, False, True]),
)
def test_core_makes_what_python_makes(archive, entries, changes, prefix, changed):
    """Where the core runs over members nothing comes out otherwise: not a word of an error."""
    data = bytearray(b"".join(odd_member(*entry) for entry in entries) + END)
    for at, change in changes if changed else []:
        at %= len(data)
        data[at : at + len(change)] = change[: len(data) - at]
    check_core(archive(bytes(data)), prefix)


@pytest.fixture(scope="module")
def seeds(made, tmp_path_factory):
    """Archives of all formats to be broken."""
    tree = trees.build(
        tmp_path_factory.mktemp("seeds") / "tree",
        {
            b"a" * 120: foreign.file(b"x" * 600),
            b"b": foreign.symlink(b"c"),
            b"d/e": foreign.link(b"a" * 120),
        },
    )
    return [
        *(foreign.gnu_tar(form, tree) for form in ("gnu", "posix")),
        foreign.python(tarfile.PAX_FORMAT, tree),
        pax([(b"GNU.sparse.map", b"0,1,9,0"), (b"GNU.sparse.size", b"9")]) + FILE + END,
        old_sparse([(0, 512), (1024, 100)], 2048, 612, b482=b"\1") + bytes(512) + b"x" * 1024 + END,
        pax(
            [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.realsize", b"9"),
            ]
        )
        + member(b"s", foreign.data(b"1\n0\n4\n") + b"data")
        + END,
    ]


def mend(data):
    """Make the checksum of every block that may be a header right, so that changes get further."""
    data = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, 5),
    changes=st.lists(
        st.tuples(st.integers(0, 7 * 512), st.binary(min_size=1, max_size=12)), max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(1, 7 * 512)),
    mended=st.booleans(),
)
def test_broken_archive_is_refused_or_becomes_a_good_one(
    archive, seeds, which, changes, cut, mended
):
    """Whatever the bytes: an error of ours, or an archive that keeps the guest's rules."""
    data = bytearray(seeds[which])
    for at, change in changes:
        at %= len(data)
        data[at : at + len(change)] = change[: len(data) - at]
    data = (mend(data) if mended else bytes(data))[:cut]
    try:
        path = archive(data)
        source = Rootfs.from_tar(path).open()
    except (ArchiveError, InvalidArgumentError):
        return
    try:
        if source.length > 1 << 24:
            return  # a sparse file that grew
    finally:
        source.close()
    result = converted(path)
    assert len(result) % tarfile.RECORDSIZE == 0
    assert members(result)
