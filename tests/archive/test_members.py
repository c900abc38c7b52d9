"""Splitting a tar into members and data, as the guest's libarchive does it."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tar_strategies import FORMS, cut, whole_archives
from vectors.tars import (
    BAD_TARS,
    GOOD_TARS,
    LONG_300,
    edited,
    octal,
    pax,
    record,
    sparse_tar,
    tar_of,
)

from nitro_vsock.archive.members import BrokenTarError, Data, Kind, MemberReader


def split(pieces):
    """Return [(member, its runs of data)]; raise what the reader raises."""
    reader = MemberReader()
    found = []
    run = b""
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, Data):
                run += bytes(event.view)
                if event.last:
                    found[-1][1].append(run)
                    run = b""
            else:
                found.append((event, []))
    reader.finish()
    assert reader.members == len(found)
    return found


def summary(archive):
    """Return [(name, kind, runs)]."""
    return [(member.name, member.kind, runs) for member, runs in split([archive])]


def test_every_kind_of_member_is_told_apart():
    """Type flags as libarchive takes them; a link's target comes along."""
    kinds = {
        tarfile.REGTYPE: Kind.FILE,
        tarfile.AREGTYPE: Kind.FILE,
        tarfile.CONTTYPE: Kind.FILE,
        tarfile.LNKTYPE: Kind.HARD_LINK,
        tarfile.SYMTYPE: Kind.SYMLINK,
        tarfile.CHRTYPE: Kind.CHARACTER,
        tarfile.BLKTYPE: Kind.BLOCK,
        tarfile.DIRTYPE: Kind.DIRECTORY,
        tarfile.FIFOTYPE: Kind.FIFO,
        b"Z": Kind.FILE,
    }
    for flag, kind in kinds.items():
        data = tar_of("rootfs/a", type=flag, linkname="to", mode=0o4751)
        ((member, _),) = split([data])
        assert (member.kind, member.mode) == (kind, 0o4751), flag
        is_link = kind in (Kind.HARD_LINK, Kind.SYMLINK)
        assert member.link == (b"to" if is_link else b"")


def test_file_whose_name_ends_in_a_slash_is_a_directory():
    """As old writers put it."""
    assert summary(tar_of("rootfs/d/", data=b""))[0][1] is Kind.DIRECTORY


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4096])
def test_data_comes_whole_and_without_padding(form, size):
    """One run a file, none of an empty one."""
    data = bytes(index % 251 for index in range(size))
    archive = tar_of("rootfs/a", "rootfs/b", data=data, form=form)
    runs = [data] if size else []
    assert summary(archive) == [
        (b"rootfs/a", Kind.FILE, runs),
        (b"rootfs/b", Kind.FILE, runs),
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_long_names_and_link_targets_come_whole(form):
    """Over 100 bytes, over 255 bytes, both at once."""
    archive = tar_of(LONG_300, type=tarfile.SYMTYPE, linkname="t" * 5000, form=form)
    ((member, _),) = split([archive])
    assert (member.name, member.link) == (LONG_300.encode(), b"t" * 5000)


def test_prefix_of_ustar_is_put_before_the_name():
    """And that of GNU, which holds other things there, is not."""
    name = "rootfs/" + "d" * 90 + "/" + "n" * 90
    assert summary(tar_of(name, form=tarfile.USTAR_FORMAT))[0][0] == name.encode()
    gnu = edited(tar_of("rootfs/a"), (345, octal(1)))  # the time of access
    assert summary(gnu)[0][0] == b"rootfs/a"


def test_first_of_two_long_names_counts():
    """Headers that come earlier are applied later."""
    long_name = tar_of(LONG_300)[:1024]
    archive = long_name + pax(record("path", "rootfs/pax")) + tar_of("rootfs/a")
    assert summary(archive)[0][0] == LONG_300.encode()
    archive = pax(record("path", "rootfs/pax")) + long_name + tar_of("rootfs/a")
    assert summary(archive)[0][0] == b"rootfs/pax"


@pytest.mark.parametrize("size", [700, 0])
def test_hard_link_has_data_in_pax_archives_only(size):
    """Elsewhere its size is that of what it links to, and no data follows."""
    behind = tar_of("rootfs/b")
    data = b"\1" * size
    blocks = data + bytes(-size % 512)
    for form, magic in (("GNU", b"ustar  \0"), ("ustar", b"ustar\x0000"), ("v7", bytes(8))):
        link = edited(
            tar_of("rootfs/l", type=tarfile.LNKTYPE, linkname="rootfs/a"),
            (124, octal(size)),
            (257, magic),
        )[:512]
        names = [name for name, _, _ in summary(link + behind)]
        assert names == [b"rootfs/l", b"rootfs/b"], form
    # A GNU header ends what a PAX header began.
    gnu = edited(tar_of("rootfs/l", type=tarfile.LNKTYPE, linkname="a"), (124, octal(size)))[:512]
    names = [name for name, _, _ in summary(pax(record("comment", "c")) + gnu + behind)]
    assert names == [b"rootfs/l", b"rootfs/b"]
    link = edited(
        tar_of("rootfs/l", type=tarfile.LNKTYPE, linkname="rootfs/a", form=tarfile.USTAR_FORMAT),
        (124, octal(size)),
    )[:512]
    runs = [data] if size else []
    found = summary(pax(record("comment", "c")) + link + blocks + behind)
    assert found[0] == (b"rootfs/l", Kind.HARD_LINK, runs)
    assert found[1][0] == b"rootfs/b"


def test_old_gnu_sparse_file_has_a_run_for_each_stretch_of_data():
    """26 runs, the map going on in two more blocks; holes do not come."""
    archive = sparse_tar("rootfs/behind")
    (sparse, runs), (behind, _) = split([archive])
    assert runs == [b"\1" * 512] * 26
    assert sparse.size == 26 * 4096
    assert behind.name == b"rootfs/behind"


def test_pax_sparse_files_have_runs_too():
    """GNU's formats 0.0, 0.1 and 1.0; of the last the map that leads the data is left out."""
    data = b"a" * 600 + b"b" * 100
    in_records = record("GNU.sparse.numblocks", 2) + b"".join(
        record("GNU.sparse.offset", offset) + record("GNU.sparse.numbytes", size)
        for offset, size in ((0, 600), (4096, 100))
    )
    in_one = record("GNU.sparse.map", "0,600,4096,100")
    size = record("GNU.sparse.size", 8192)
    for records in (in_records + size, in_one + size):
        archive = pax(records) + tar_of("rootfs/s", data=data)
        ((member, runs),) = split([archive])
        assert runs == [b"a" * 600, b"b" * 100]
        assert member.size == 8192
    version = record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0)
    names = record("GNU.sparse.name", "rootfs/s") + record("path", "rootfs/GNUSparseFile.1/s")
    head = b"2\n0\n600\n4096\n100\n".ljust(512, b"\0")
    archive = pax(version + names) + tar_of("rootfs/x", data=head + data)
    assert summary(archive) == [(b"rootfs/s", Kind.FILE, [b"a" * 600, b"b" * 100])]


def test_data_past_the_last_run_is_passed_over():
    """What no run claims is not given, and the next member is found."""
    archive = pax(record("GNU.sparse.map", "0,10")) + tar_of("rootfs/s", "rootfs/t", data=b"x" * 99)
    assert [runs for _, _, runs in summary(archive)] == [[b"x" * 10], [b"x" * 99]]


@pytest.mark.parametrize(
    "archive",
    [
        pax(record("GNU.sparse.map", "0,10,5")) + tar_of("rootfs/s"),
        pax(record("GNU.sparse.map", "0,-1")) + tar_of("rootfs/s"),
        pax(record("GNU.sparse.major", 2) + record("GNU.sparse.minor", 0)) + tar_of("rootfs/s"),
        pax(record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0))
        + tar_of("rootfs/s", data=b"x" * 600),
        pax(record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0))
        + tar_of("rootfs/s", data=b"9" * 5000),
        pax(record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0)) + tar_of("rootfs/s"),
        pax(record("SUN.holesdata", " 0 5")) + tar_of("rootfs/s"),
        edited(sparse_tar(), (398, b"-0000000001\0")),
    ],
)
def test_malformed_sparse_map_is_refused(archive):
    """Before any of its data is given."""
    with pytest.raises(BrokenTarError, match="sparse map") as caught:
        split([archive])
    assert caught.value.flaw.code == "bad-header"


def test_sizes_of_every_writing_are_read():
    """Octal with blanks before it, base 256, and a PAX record over both."""
    for field in (b"        700 ", b"00000000700\0", b"\x80" + bytes(9) + b"\1\xc0"):
        archive = edited(tar_of("rootfs/a", data=bytes(448)), (124, field))
        assert len(summary(archive)[0][2][0]) == 448
    archive = pax(record("size", 448)) + edited(
        tar_of("rootfs/a", data=bytes(448)), (124, octal(0))
    )
    assert len(summary(archive)[0][2][0]) == 448


def test_checksum_of_signed_bytes_is_taken():
    """Some old writers added up signed bytes."""
    name = "rootfs/" + "é" * 20
    header = bytearray(tar_of(name)[:512])
    header[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % signed
    archive = bytes(header) + tar_of(name)[512:]
    assert summary(archive)[0][0] == name.encode()


# Tarfile takes a global PAX header for a member's, libarchive does not.
COMPARABLE = {name: data for name, data in GOOD_TARS.items() if name != "PAX global header"}


@pytest.mark.parametrize("archive", COMPARABLE.values(), ids=COMPARABLE)
def test_good_archive_has_the_members_that_tarfile_sees(archive):
    """Names, in order."""
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8") as tar:
        names = [name.encode() for name in tar.getnames()]
    # Tarfile cuts a trailing slash.
    assert [name.rstrip(b"/") for name, _, _ in summary(archive)] == names


HUGE = edited(tar_of("rootfs/a"), (124, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7))


@pytest.mark.parametrize(
    ("archive", "code"),
    [
        (b"no tar" * 100, "not-a-tar"),
        (bytes(range(256)) * 2, "not-a-tar"),
        (edited(tar_of("rootfs/a"), (156, b"\x01")), "not-a-tar"),
        (edited(tar_of("rootfs/a"), (100, b"x")), "not-a-tar"),
        (tar_of("rootfs/a")[:1024] + b"junk" * 128, "bad-header"),
        (tar_of("rootfs/a")[:1000], "truncated"),
        (tar_of("rootfs/a")[:100], "truncated"),
        (HUGE, "truncated"),
        (BAD_TARS["PAX header of 8 GiB"][0], "bad-header"),
        (BAD_TARS["PAX size of letters"][0], "bad-header"),
        (BAD_TARS["truncated long name"][0], "truncated"),
        (BAD_TARS["long name without a member"][0], "truncated"),
    ],
)
def test_broken_archive_has_a_code(archive, code):
    """What a program can act on."""
    with pytest.raises(BrokenTarError) as caught:
        split([archive])
    assert caught.value.flaw.code == code


@pytest.mark.parametrize(
    ("archive", "codes"),
    [
        (tar_of("rootfs/é", form=tarfile.PAX_FORMAT), ["pax-non-ascii"]),
        (tar_of("rootfs/é", form=tarfile.PAX_FORMAT, uname="é"), ["pax-non-ascii"] * 2),
        (pax(b"99 path=rootfs/a\n") + tar_of("rootfs/a"), ["bad-header"]),
        (pax(b"16 path=rootfs/a") + tar_of("rootfs/a"), ["bad-header"]),
        (edited(tar_of("rootfs/a"), (124, b"-0000001000\0"))[:512], ["bad-header"]),
        # Bytes that are declared to be no text are not converted, and names in use are all that is.
        (pax(record("hdrcharset", "BINARY") + record("path", "rootfs/é")) + tar_of("rootfs/a"), []),
        (pax(record("path", "é") + record("GNU.sparse.name", "rootfs/a")) + tar_of("rootfs/b"), []),
    ],
)
def test_what_libarchive_only_warns_of_stays_with_the_member(archive, codes):
    """The archive is read on."""
    found = split([archive + tar_of("rootfs/z")])
    assert [flaw.code for flaw in found[0][0].flaws] == codes


def test_memory_does_not_grow_with_the_data():
    """A member of 4 GiB goes through in pieces; nothing of it is kept."""
    header = edited(tar_of("rootfs/a", data=b""), (124, b"\x80" + bytes(6) + b"\1" + bytes(4)))[
        :512
    ]
    reader = MemberReader()
    assert len(list(reader.feed(header))) == 1
    piece = memoryview(bytes(1 << 20))
    for _ in range((1 << 32 >> 20) - 1):
        ((view, last),) = reader.feed(piece)
        assert view.obj is piece.obj
        assert not last
    ((_, last),) = reader.feed(piece)
    assert last
    reader.finish()


@given(whole_archives(), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_any_archive_of_tarfile_is_read_as_tarfile_reads_it(archive, points):
    """Names and data, however the bytes are cut."""
    found = [(member.name, b"".join(runs)) for member, runs in split(cut(archive, points))]
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8") as tar:
        expected = [
            (member.name.encode("utf-8", "surrogateescape"), tar.extractfile(member).read())
            for member in tar
        ]
    assert [(name.rstrip(b"/"), data) for name, data in found] == [
        (name.rstrip(b"/"), data) for name, data in expected
    ]
