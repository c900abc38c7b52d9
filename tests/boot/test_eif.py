"""Enclave images: what is read of them, what is refused, and their registers."""

import json
import os
import struct
import threading

import pytest
from eif_images import (
    CMDLINE,
    HEADER,
    KERNEL,
    METADATA,
    ORDINARY,
    RAMDISK,
    SIGNATURE,
    VECTORS,
    pack,
    register,
)

from nitro_vsock import (
    ClosedError,
    Eif,
    EifError,
    EifReadError,
    InvalidArgumentError,
    SectionType,
    measure_image,
)
from nitro_vsock.enclave import files

EXPECTED = json.loads((VECTORS / "expected.json").read_text())


@pytest.fixture
def image(tmp_path):
    """Writes an image's bytes to a file; gives its path."""

    def write(data):
        path = tmp_path / "image.eif"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", EXPECTED)
def test_registers_of_aws_s_own_images_are_as_aws_s_tool_says(name):
    """PCR0, 1, 2, and 8 where the image is signed; the checksum too."""
    with Eif.open(VECTORS / name) as opened:
        assert opened.measurements().as_dict() == EXPECTED[name]["registers"]
        assert opened.checksum == EXPECTED[name]["checksum"]
        assert (opened.verify() is not None) == bool(EXPECTED[name]["signature_valid"])


def test_everything_in_an_image_can_be_looked_at():
    """Header, sections, command line and metadata of an image of AWS's."""
    with Eif.open(VECTORS / "unsigned.eif") as opened:
        assert (opened.version, opened.flags, opened.architecture) == (4, 0, "x86_64")
        assert (opened.default_memory, opened.default_cpus) == (1 << 30, 2)
        kinds = [section.type for section in opened.sections]
        ramdisk = SectionType.RAMDISK
        first = [SectionType.KERNEL, SectionType.CMDLINE, SectionType.METADATA]
        assert kinds == [*first, ramdisk, ramdisk, ramdisk]
        assert opened.cmdline() == b"console=ttyS0 reboot=k"
        assert opened.metadata() == json.loads((VECTORS / "metadata.json").read_text())
        assert not opened.signed
        assert opened.warnings == ()
    with Eif.open(VECTORS / "signed.eif") as opened:
        assert opened.architecture == "aarch64"
        assert opened.signed


@pytest.mark.parametrize("version", [2, 3, 4])
def test_older_versions_are_read_the_same(image, version):
    """Their layout is the same; only sections were added."""
    found = measure_image(image(pack(version=version)))
    boot = (b"kernel", b"console=ttyS0", b"one")
    assert (found.pcr0, found.pcr1) == (register(*boot, b"two"), register(*boot))
    assert (found.pcr2, found.pcr8) == (register(b"two"), None)


@pytest.mark.parametrize("ramdisks", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, files.CHUNK, 2 * files.CHUNK + 1, 5 << 20])
def test_registers_are_of_the_right_sections_whatever_their_sizes(image, ramdisks, size):
    """Below and above one chunk, with threads and without."""
    disks = [bytes([number]) * (size + number) for number in range(ramdisks)]
    sections = [(KERNEL, b"k" * size), (CMDLINE, b""), (METADATA, b"{}")]
    found = measure_image(image(pack((*sections, *((RAMDISK, disk) for disk in disks)))))
    boot = (b"k" * size, *disks[:1])
    assert found.pcr0 == register(*boot, *disks[1:])
    assert found.pcr1 == register(*boot)
    assert found.pcr2 == register(*disks[1:])


@pytest.mark.parametrize(
    ("data", "field", "offset"),
    [
        (b"", "header", 0),
        (pack()[:547], "header", 547),
        (pack(magic=b".elf"), "magic", 0),
        (pack(version=1), "version", 4),
        (pack(version=5), "version", 4),
        (pack(count=33), "num_sections", 26),
        (pack(count=65535), "num_sections", 26),
        (pack(count=3), "num_sections", 606),
        (pack(count=5), "section 4", 621),
        (pack(())[:548], "kernel", None),
        (pack(tail=b"x"), "num_sections", 621),
        (pack(tail=struct.pack(">HHQ", 5, 0, 2) + b"{}"), "num_sections", 621),
        (pack()[:-1], "section 3 (ramdisk)", 606),
        (pack()[:610], "section 3", 606),
        (pack(offsets=[548, 566, 591, 0]), "section 3", 606),
        (pack(offsets=[548, 566, 591, 548]), "section 3", 606),
        (pack(offsets=[548, 566, 591, 2**64 - 1]), "section 3", 606),
        (pack(sizes=[6, 13, 3, 4]), "section 3 (ramdisk)", 606),
        (pack(sizes=[6, 13, 3, 2**64 - 1]), "section 3 (ramdisk)", 606),
        (pack([*ORDINARY[:3], (RAMDISK, b"two", 2**64 - 1)]), "section 3 (ramdisk)", 606),
        (pack([*ORDINARY[:3], (RAMDISK, b"two", 2**64 - 12)]), "section 3 (ramdisk)", 606),
        (pack([*ORDINARY[:3], (0, b"two")]), "section 3", 606),
        (pack([*ORDINARY[:3], (6, b"two")]), "section 3", 606),
        (pack([*ORDINARY[:3], (65535, b"two")]), "section 3", 606),
        (pack(ORDINARY[1:]), "kernel", None),
        (pack([ORDINARY[0], *ORDINARY[2:]]), "cmdline", None),
        (pack([ORDINARY[0], *ORDINARY]), "kernel", None),
        (pack([*ORDINARY, ORDINARY[1]]), "cmdline", None),
        (pack([*ORDINARY, (METADATA, b"{}"), (METADATA, b"{}")]), "metadata", None),
        (pack([*ORDINARY, (SIGNATURE, b""), (SIGNATURE, b"")]), "signature", None),
        (pack(ORDINARY[::-1]), "sections", None),
        (pack([ORDINARY[0], ORDINARY[2], ORDINARY[1]]), "sections", None),
    ],
)
def test_malformed_image_is_refused_when_it_is_opened(image, data, field, offset):
    """The error says which field it is and where it lies."""
    path = image(data)
    with pytest.raises(EifError, match=f"image {path}: ") as caught:
        Eif.open(path)
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_wrong_checksum_is_an_error_of_the_measuring(image):
    """The headers can be looked at all the same."""
    with Eif.open(image(pack(crc=1))) as opened:
        assert opened.checksum == 1
        for check in (opened.measurements, opened.verify):
            with pytest.raises(EifError, match="damaged") as caught:
                check()
            assert (caught.value.field, caught.value.offset) == ("eif_crc32", HEADER.size - 4)


def test_any_flipped_bit_is_noticed(image):
    """In the header, in a section's header, or in data."""
    data = pack()
    path = image(data)
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(EifError):
            measure_image(path)


def test_odd_flags_are_a_warning(image):
    """They change no register."""
    with Eif.open(image(pack(flags=2, section_flags=1))) as opened:
        assert len(opened.warnings) == 5
        assert opened.measurements() == measure_image(image(pack()))


def test_image_without_a_ramdisk_is_a_warning(image):
    """AWS's tool builds one; no enclave gets far with it."""
    with Eif.open(image(pack(ORDINARY[:2]))) as opened:
        assert opened.warnings == ("there is no ramdisk",)


def test_stale_size_of_a_signature_is_a_warning():
    """AWS's tool leaves the old size in the header when it signs an image again."""
    with Eif.open(VECTORS / "resigned.eif") as opened:
        (warning,) = opened.warnings
        assert warning.startswith("section 5 (signature) has ")
        assert opened.verify() is not None


@pytest.mark.parametrize(
    "metadata",
    [b"", b"{", b"[]", b"1", b"\xff{}", "{}".encode("utf-16"), b"[" * 100_000, b"9" * 5000],
)
def test_metadata_that_is_no_json_object_stops_nothing_but_its_reading(image, metadata):
    """It is not measured, and an enclave boots without it."""
    with Eif.open(image(pack((*ORDINARY, (METADATA, metadata))))) as opened:
        with pytest.raises(EifError, match="metadata") as caught:
            opened.metadata()
        assert caught.value.field == "metadata"
        assert opened.measurements() == measure_image(image(pack()))


@pytest.mark.parametrize(
    ("sections", "call", "field"),
    [
        ((*ORDINARY, (METADATA, b" " * (1 << 20) + b"{}")), Eif.metadata, "metadata"),
        ((ORDINARY[0], (CMDLINE, bytes(65537))), Eif.cmdline, "cmdline"),
        ((*ORDINARY, (SIGNATURE, bytes((256 << 10) + 1))), Eif.measurements, "signature"),
    ],
)
def test_section_that_must_be_held_in_memory_has_a_limit(image, sections, call, field):
    """However large an image is, no more than that is read at once."""
    with Eif.open(image(pack(sections))) as opened:
        with pytest.raises(EifError, match="at most are read") as caught:
            call(opened)
        assert caught.value.field == field


def test_no_metadata_is_none(image):
    """Images before version 4 have none."""
    with Eif.open(image(pack())) as opened:
        assert opened.metadata() is None


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    """A FIFO is not waited for."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/null", "/dev/zero", 3, None, "a\0b"):
        with pytest.raises(InvalidArgumentError) as caught:
            Eif.open(path)
        assert caught.value.field == "image"


def test_file_that_cannot_be_opened_is_named(tmp_path):
    """An OSError too, with its errno."""
    with pytest.raises(EifReadError, match=r"gone\.eif cannot be opened: No such file") as caught:
        Eif.open(tmp_path / "gone.eif")
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.errno == 2
    assert caught.value.field == "image"


def test_file_that_changes_after_opening_is_refused(image):
    """Written to in place, cut, or grown."""
    data = pack()
    for change in (data, data[:300], data + b"x"):
        path = image(data)
        with Eif.open(path) as opened:
            times = os.stat(path)
            path.write_bytes(change)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            with pytest.raises(EifError, match=r"changed|shorter") as caught:
                opened.measurements()
            assert caught.value.field == "image"


def test_closed_image_says_so(image):
    """Closing again does nothing; what was read already stays known."""
    opened = Eif.open(image(pack()))
    found = opened.measurements()
    opened.close()
    opened.close()
    assert opened.measurements() == found
    with pytest.raises(ClosedError):
        opened.cmdline()


def test_image_that_nobody_closed_warns_and_closes(image):
    """As files do."""
    path = image(pack())
    with pytest.warns(ResourceWarning, match="unclosed"):
        Eif.open(path)


def test_threads_share_one_reading(image):
    """All get the same registers."""
    path = image(pack((*ORDINARY, (RAMDISK, os.urandom(6 << 20)))))
    found = []
    with Eif.open(path) as opened:
        threads = [
            threading.Thread(target=lambda: found.append(opened.measurements())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [measure_image(path)] * 4
