"""What PCR16 and PCR17 of an enclave are predicted to be."""

import contextlib
import ctypes
import hashlib
import io
import locale
import os
import pickle
import subprocess
import tarfile

import pytest
from archives import make_tar
from hypothesis import given
from hypothesis import strategies as st
from tar_strategies import FORMS, cut, whole_archives
from vectors.tars import BAD_TARS, GOOD_TARS, edited, octal, pax, record, sparse_tar, tar_of

from nitro_vsock import (
    ArchiveError,
    EnclaveArgsWriter,
    InvalidArgumentError,
    Rootfs,
    SourceChangedError,
    SourceReadError,
    measure,
)
from nitro_vsock.archive.members import BrokenTarError
from nitro_vsock.check.measurement import RootfsMeter

ZEROS = bytes(48)


def extend(pcr, *data):
    """Return a register after the Nitro Secure Module has extended it with each of `data`."""
    for piece in data:
        pcr = hashlib.sha384(pcr + piece).digest()
    return pcr


def writer_of(rootfs, path="/bin/app", argv=("/bin/app",), envp=("A=1",)):
    """Return a writer of a rootfs or of an archive."""
    if isinstance(rootfs, bytes):
        rootfs = Rootfs.from_bytes(rootfs)
    return EnclaveArgsWriter(rootfs, path, list(argv), list(envp))


def pcr16(archive):
    """Return what is predicted for an archive."""
    return measure(writer_of(archive)).pcr16


def model(archive):
    """Return PCR16 as a reader of docs/protocol.md would compute it, with tarfile."""
    pcr = ZEROS
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8") as tar:
        for member in tar:
            if "rootfs/etc/hostname" in member.name or "rootfs/etc/hosts" in member.name:
                continue
            if member.isreg():
                data = tar.extractfile(member).read()
                pcr = extend(pcr, *(data[at : at + 2048] for at in range(0, len(data), 2048)))
    return pcr


# Known answers


def test_pcr17_is_one_extension_for_each_string():
    """exec_path, argv, envp, in that order and without NUL; by hand and as a literal."""
    writer = writer_of(tar_of("rootfs/a"), "/bin/app", ("/bin/app", "a b"), ("PATH=/bin", "A=1"))
    expected = hashlib.sha384(bytes(48) + b"/bin/app").digest()
    expected = hashlib.sha384(expected + b"/bin/app").digest()
    expected = hashlib.sha384(expected + b"a b").digest()
    expected = hashlib.sha384(expected + b"PATH=/bin").digest()
    expected = hashlib.sha384(expected + b"A=1").digest()
    found = measure(writer)
    assert found.pcr17 == expected
    assert found.pcr17.hex() == (
        "eec15fb2227c9659fdc2fcaf435ce4f8892136b6047f25df"
        "8693e60bfab363e31dae06dda30741e5b5bd3270f2d240d8"
    )


def test_pcr16_is_one_extension_for_each_2_kib_of_a_file():
    """Two files of 4097 and 3 bytes: a chunk begins anew at each member."""
    first, second = b"x" * 4097, b"abc"
    archive = tar_of("rootfs/a", data=first)[: 512 + 4608] + tar_of("rootfs/b", data=second)
    expected = hashlib.sha384(bytes(48) + b"x" * 2048).digest()
    expected = hashlib.sha384(expected + b"x" * 2048).digest()
    expected = hashlib.sha384(expected + b"x").digest()
    expected = hashlib.sha384(expected + b"abc").digest()
    found = measure(writer_of(archive))
    assert found.pcr16 == expected
    assert found.pcr16.hex() == (
        "1a4a049ef00250d8781b726327b6a95c011d51b83260dfec"
        "5377aa99833074c269662e351bbab072f3ca791ae5e239a9"
    )


def test_archive_without_data_leaves_the_register_as_it_was():
    """Directories, links, devices and empty files extend nothing."""
    members = [
        tar_of("rootfs/", type=tarfile.DIRTYPE)[:512],
        tar_of("rootfs/empty", data=b"")[:512],
        tar_of("rootfs/hard", type=tarfile.LNKTYPE, linkname="rootfs/empty")[:512],
        tar_of("rootfs/soft", type=tarfile.SYMTYPE, linkname="empty")[:512],
        tar_of("rootfs/null", type=tarfile.CHRTYPE)[:512],
        tar_of("rootfs/fifo", type=tarfile.FIFOTYPE),
    ]
    assert pcr16(b"".join(members)) == ZEROS


@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 4096, 1 << 18, (1 << 18) + 1])
def test_chunks_end_at_2048_bytes(size):
    """Sizes around the chunk's and around what is read at once."""
    data = os.urandom(size)
    expected = extend(ZEROS, *(data[at : at + 2048] for at in range(0, size, 2048)))
    assert pcr16(tar_of("rootfs/a", data=data)) == expected


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("rootfs/etc/hostname", False),
        ("rootfs/etc/hosts", False),
        ("./rootfs/etc/hosts", False),
        ("rootfs/etc/hosts.allow", False),
        ("rootfs/etc/hosts.d/a", False),
        ("rootfs/srv/rootfs/etc/hostname.bak", False),
        ("rootfs/" + "d" * 120 + "/rootfs/etc/hosts", False),
        ("rootfs/etc/host.conf", True),
        ("rootfs//etc/hosts", True),
        ("rootfs/./etc/hosts", True),
        ("rootfs/usr/etc/hosts", True),
        ("rootfs/etc/Hosts", True),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_members_whose_full_name_contains_these_are_left_out(name, measured, form):
    """The name as the archive has it is searched, and it is not tidied up before."""
    archive = tar_of(name, data=b"content", form=form)
    assert pcr16(archive) == (extend(ZEROS, b"content") if measured else ZEROS)


def test_member_after_one_that_is_left_out_is_measured():
    """The rule is for that member only."""
    archive = tar_of("rootfs/etc/hosts", "rootfs/etc/passwd", data=b"content")
    assert pcr16(archive) == extend(ZEROS, b"content")


def test_order_counts_and_names_and_modes_do_not():
    """Two archives of the same data in the same order are the same to the guest."""
    one = tar_of("rootfs/a", data=b"1")[:1024]
    two = tar_of("rootfs/b", data=b"2")[:1024]
    assert pcr16(one + two) != pcr16(two + one)
    renamed = tar_of("rootfs/c/d", data=b"1", mode=0o4755, uid=5, mtime=7)[:1024]
    assert pcr16(one + two) == pcr16(renamed + two)


def test_each_run_of_a_sparse_file_begins_a_chunk():
    """Holes are not measured; libarchive gives each stretch of data by itself."""
    assert pcr16(sparse_tar("rootfs/a")) == extend(ZEROS, *[b"\1" * 512] * 26, b"data")


def test_hard_link_with_data_is_measured_in_a_pax_archive():
    """As libarchive unpacks it."""
    link = edited(
        tar_of("rootfs/l", type=tarfile.LNKTYPE, linkname="rootfs/a", form=tarfile.USTAR_FORMAT),
        (124, octal(3)),
    )[:512]
    archive = pax(record("comment", "c")) + link + b"abc".ljust(512, b"\0")
    assert pcr16(archive) == extend(ZEROS, b"abc")


# Sources


def test_every_kind_of_source_measures_the_same(tmp_path):
    """File, run of a descriptor, memory; the archive is longer than one read."""
    data = make_tar(3 << 20)
    path = tmp_path / "rootfs.tar"
    path.write_bytes(b"12345" + data + b"678")
    expected = model(data)
    assert pcr16(data) == expected
    with open(path, "rb") as file:
        assert pcr16(Rootfs.from_fd(file.fileno(), offset=5, length=len(data))) == expected
        assert file.tell() == 0
    path.write_bytes(data)
    assert pcr16(Rootfs.from_file(path)) == expected


def test_directory_its_pack_and_a_foreign_tar_measure_the_same(tmp_path):
    """A tree, what is sent of it, and a tar without prefix of its members in the same order."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hosts").write_text("localhost")
    (tree / "etc" / "passwd").write_text("root")
    (tree / "big").write_bytes(os.urandom(3_000_000))
    (tree / "empty").touch()
    (tree / "link").symlink_to("big")
    os.link(tree / "big", tree / "same")
    directory = Rootfs.from_directory(tree)
    source = directory.open()
    try:
        packed = b"".join(bytes(chunk) for chunk in source.chunks())
    finally:
        source.close()
    foreign = tmp_path / "foreign.tar"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar, tarfile.open(foreign, "w") as out:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            member.name = member.name.removeprefix("rootfs").lstrip("/") or "."
            if member.islnk():
                member.linkname = member.linkname.removeprefix("rootfs/")
            out.addfile(member, content)
    expected = model(packed)
    assert expected != ZEROS
    assert pcr16(directory) == expected
    assert pcr16(packed) == expected
    assert pcr16(Rootfs.from_tar(foreign)) == expected


def test_pipe_is_refused_and_not_read():
    """Measured, it could not be sent any more."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"archive")
        rootfs = Rootfs.from_fd(reading, length=7)
        with pytest.raises(InvalidArgumentError, match="read twice") as caught:
            measure(writer_of(rootfs))
        assert caught.value.field == "rootfs"
        assert os.read(reading, 7) == b"archive"
    finally:
        os.close(reading)
        os.close(writing)


BROKEN = {
    name: archive
    for name, (archive, message) in BAD_TARS.items()
    if not any(part in message for part in ("is not under", "makes ")) and name != "gzip"
}


@pytest.mark.parametrize("archive", BROKEN.values(), ids=BROKEN)
def test_archive_the_guest_does_not_read_to_its_end_has_no_measurement(archive):
    """A number for half an archive would be a wrong one."""
    with pytest.raises(ArchiveError, match="cannot be measured"):
        pcr16(archive)


class _Touched(Rootfs):
    """A file that is written to while it is open."""

    def open(self):
        source = super().open()
        os.utime(source.name, ns=(1, os.stat(source.name).st_mtime_ns + 1))
        return source


def test_file_that_changes_meanwhile_or_is_gone_is_named(tmp_path):
    """As when it is sent: a measurement of a mixture would be worth nothing."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(make_tar(1 << 20))
    with pytest.raises(SourceChangedError, match=r"rootfs\.tar"):
        measure(writer_of(_Touched.from_file(path)))
    writer = writer_of(Rootfs.from_file(path))
    path.unlink()
    with pytest.raises(SourceReadError, match=r"rootfs\.tar"):
        measure(writer)


# Against the model


@given(whole_archives(), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_any_archive_measures_as_the_model_says(archive, points):
    """All three formats, cut anywhere; what has no measurement has a reason."""
    meter = RootfsMeter()

    def measured():
        for piece in cut(archive, points):
            meter.feed(memoryview(piece))
        return meter.finish()

    if not archive.strip(b"\0"):
        with pytest.raises(BrokenTarError, match="no member"):
            measured()
    elif b"PaxHeader" in archive and not archive.isascii():
        # Data may be what is not ASCII.
        with contextlib.suppress(BrokenTarError):
            assert measured() == model(archive)
    else:
        assert measured() == model(archive)


@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=5),
    st.sampled_from(list(FORMS.values())),
    st.integers(1, 5000),
)
def test_any_sizes_measure_as_the_model_says(sizes, form, step):
    """Files over several chunks, fed in steps of any size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for index, size in enumerate(sizes):
            member = tarfile.TarInfo(f"rootfs/{index}")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes([index + 1]) * size))
    archive = memoryview(buffer.getvalue())
    meter = RootfsMeter()
    for at in range(0, len(archive), step):
        meter.feed(archive[at : at + step])
    assert meter.finish() == model(bytes(archive))


# Against libarchive itself


class Libarchive:
    """The guest's loop over an archive in memory, with the system's libarchive."""

    def __init__(self):
        self._lib = ctypes.CDLL("libarchive.so.13")
        self._lib.archive_read_new.restype = ctypes.c_void_p
        self._lib.archive_entry_pathname.restype = ctypes.c_char_p

    def pcr16(self, archive):
        """Return the register; None where libarchive gives anything but success."""
        lib = self._lib
        reader = ctypes.c_void_p(lib.archive_read_new())
        memory = ctypes.create_string_buffer(archive, len(archive))
        before = locale.setlocale(locale.LC_CTYPE)
        locale.setlocale(locale.LC_CTYPE, "C")  # the guest sets none
        try:
            assert lib.archive_read_support_format_tar(reader) == 0
            if lib.archive_read_open_memory(reader, memory, ctypes.c_size_t(len(archive))):
                return None
            return self._members(reader)
        finally:
            locale.setlocale(locale.LC_CTYPE, before)
            lib.archive_read_free(reader)

    def _members(self, reader):
        lib, pcr = self._lib, ZEROS
        entry, data = ctypes.c_void_p(), ctypes.c_void_p()
        size, offset = ctypes.c_size_t(), ctypes.c_int64()
        while (code := lib.archive_read_next_header(reader, ctypes.byref(entry))) == 0:
            name = lib.archive_entry_pathname(entry)
            measured = b"rootfs/etc/hostname" not in name and b"rootfs/etc/hosts" not in name
            while not (
                code := lib.archive_read_data_block(
                    reader, ctypes.byref(data), ctypes.byref(size), ctypes.byref(offset)
                )
            ):
                block = ctypes.string_at(data, size.value) if measured else b""
                pcr = extend(pcr, *(block[at : at + 2048] for at in range(0, len(block), 2048)))
            if code != END:
                return None
        return pcr if code == END else None


END = 1
"""ARCHIVE_EOF"""

HOLES = b"".join(b"%04d" % index * 1024 + bytes(8192) for index in range(40))


def gnu_tar(folder, *options):
    """Return an archive of a tree with a sparse file, by GNU tar."""
    root = folder / "rootfs"
    root.mkdir()
    with open(root / "sparse", "wb") as file:
        for at in range(0, len(HOLES), 4096):
            if HOLES[at : at + 4096].strip(b"\0"):
                file.seek(at)
                file.write(HOLES[at : at + 4096])
        file.truncate(len(HOLES) + 99_999)
    (root / "plain").write_bytes(b"plain" * 1000)
    os.link(root / "plain", root / "same")
    done = subprocess.run(
        ["tar", "-C", folder, "--sparse", "--hole-detection=raw", *options, "-cf", "-", "rootfs"],
        capture_output=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_sparse_files_of_gnu_tar_measure_as_libarchive_gives_them(tmp_path, options):
    """All four forms have runs of their own."""
    archive = gnu_tar(tmp_path, *options)
    assert len(archive) < len(HOLES)
    assert pcr16(archive) == Libarchive().pcr16(archive) != model(archive)


@pytest.mark.parametrize("name", [*GOOD_TARS, *BROKEN])
def test_vector_measures_as_libarchive_gives_it(name):
    """What libarchive gives without a warning has this measurement; the rest has none."""
    archive = GOOD_TARS.get(name) or BROKEN[name]
    expected = Libarchive().pcr16(archive)
    if name == "empty":  # nothing is what it gives, and the guest stops later
        assert expected == ZEROS
        expected = None
    if expected is None:
        with pytest.raises(ArchiveError):
            pcr16(archive)
    else:
        assert pcr16(archive) == expected


@pytest.mark.parametrize("data", [b"\0", b"a" * 600])
def test_file_with_a_slash_at_its_end_measures_as_libarchive_gives_it(data):
    """It is taken for a directory, and the block that follows for a header."""
    member = tarfile.TarInfo("rootfs/a/")
    member.size = len(data)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(data))
    expected = Libarchive().pcr16(buffer.getvalue())
    if expected is None:
        with pytest.raises(ArchiveError):
            pcr16(buffer.getvalue())
    else:
        assert pcr16(buffer.getvalue()) == expected == ZEROS


@given(whole_archives())
def test_any_archive_measures_as_libarchive_gives_it(archive):
    """All three formats."""
    expected = Libarchive().pcr16(archive)
    if expected is None or not archive.strip(b"\0"):
        with pytest.raises(ArchiveError):
            pcr16(archive)
    else:
        assert pcr16(archive) == expected


# What is done with it


def test_measurement_is_plain_data():
    """Hex for people, and it can be compared and sent to another process."""
    found = measure(writer_of(tar_of("rootfs/a")))
    assert found.as_dict() == {"pcr16": found.pcr16.hex(), "pcr17": found.pcr17.hex()}
    assert pickle.loads(pickle.dumps(found)) == found


def test_condition_of_a_key_policy_names_both_registers():
    """In the form that AWS KMS documents."""
    found = measure(writer_of(tar_of("rootfs/a")))
    assert found.kms_condition() == {
        "StringEqualsIgnoreCase": {
            "kms:RecipientAttestation:PCR16": found.pcr16.hex(),
            "kms:RecipientAttestation:PCR17": found.pcr17.hex(),
        }
    }
    assert len(found.pcr16.hex()) == 96
