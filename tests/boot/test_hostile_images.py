"""Images from anybody: always a typed error or a right answer, within bounds of time and memory."""

import contextlib
import hashlib
import os
import random
import struct
import tracemalloc
import zlib

import pytest
from eif_images import HEADER, METADATA, ORDINARY, VECTORS, cbor, pack, pack_signed, pcr0_of, sign
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nitro_vsock import Eif, EifError, build_eif
from nitro_vsock.enclave.cbor import CborError, decode

SEEDS = [
    pack(),
    pack((*ORDINARY, (METADATA, b'{"ImageName": "x"}'))),
    pack_signed(sign(pcr0_of())),
    *(path.read_bytes() for path in sorted(VECTORS.glob("*.eif"))),
]

EXTREMES = [0, 1, 2, 12, 31, 32, 33, 255, 65535, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]

SETTINGS = settings(deadline=None, max_examples=300, derandomize="CI" in os.environ)


def mend(data):
    """Return the image with the checksum that fits, so that what lies behind it is reached."""
    if len(data) < HEADER.size:
        return data
    checksum = zlib.crc32(data[HEADER.size :], zlib.crc32(data[: HEADER.size - 4]))
    return data[: HEADER.size - 4] + struct.pack(">I", checksum) + data[HEADER.size :]


def judge(path, data):
    """Do everything that can be done with an image; check that an answer is right."""
    path.write_bytes(data)
    failure = None
    try:
        with Eif.open(path) as image:
            with contextlib.suppress(EifError):
                image.metadata()
            found = image.measurements()
            image.verify()
    except EifError as error:
        failure = error
    if failure is not None:
        assert failure.field
        assert failure.offset is None or 0 <= failure.offset <= len(data)
        return
    contents = [
        data[section.offset : section.offset + section.size]
        for section in image.sections
        if section.type in (1, 2, 3)
    ]
    digest = hashlib.sha384(b"".join(contents)).digest()
    assert found.pcr0 == hashlib.sha384(bytes(48) + digest).digest()


def mutate(rng, data):
    """Return the bytes with some of them changed, in one of the ways that break parsers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(6)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
        elif way == 3:
            del data[at : at + rng.randint(1, 40)]
        elif way == 4:  # a number of the header
            at = rng.choice([4, 6, 8, 16, 24, 26, *range(28, 540, 8)])
            size = 2 if at in (4, 6, 24, 26) else 8
            number = rng.choice(EXTREMES) & (1 << 8 * size) - 1
            data[at : at + size] = number.to_bytes(size, "big")
        else:  # a number anywhere
            data[at : at + 8] = rng.choice(EXTREMES).to_bytes(8, "big")
        if not data:
            return b""
    return bytes(data)


@pytest.mark.parametrize("seed", range(10))
def test_broken_images_are_refused_or_read_right(tmp_path, seed):
    """Real ones with a few bytes changed; every second one has a checksum that fits."""
    rng = random.Random(seed)
    for number in range(200):
        data = mutate(rng, rng.choice(SEEDS))
        judge(tmp_path / "image.eif", mend(data) if number % 2 else data)


@SETTINGS
@given(data=st.binary(max_size=2000), head=st.booleans())
@example(data=b"", head=False)
def test_any_bytes_are_refused_or_read_right(tmp_path_factory, data, head):
    """With and without a header before them."""
    path = tmp_path_factory.getbasetemp() / "any.eif"
    judge(path, mend(pack(())[: HEADER.size] + data) if head else data)


@SETTINGS
@given(
    sections=st.lists(st.tuples(st.integers(0, 7), st.binary(max_size=50)), max_size=32),
    tail=st.binary(max_size=20),
)
def test_any_sections_are_refused_or_read_right(tmp_path_factory, sections, tail):
    """In any number and order."""
    judge(tmp_path_factory.getbasetemp() / "any.eif", pack(sections, tail=tail))


@SETTINGS
@given(data=st.binary(max_size=300))
@example(data=b"\x9b" + b"\xff" * 8)
@example(data=b"\x81" * 300)
def test_any_bytes_are_decoded_or_refused_as_cbor(data):
    """With the place of what is wrong."""
    at = 0
    try:
        decode(data)
    except CborError as error:
        at = error.offset
    assert 0 <= at <= len(data)


values = st.recursive(
    st.integers(-65536, 65535) | st.binary(max_size=300) | st.text("abc", max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(0, 99) | st.text("abc", max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@SETTINGS
@given(value=values)
def test_cbor_is_decoded_to_what_was_encoded(value):
    """By an encoder of the tests' own."""
    decoded = value
    try:
        decoded = decode(cbor(value))
    except CborError as error:
        assume("too deeply" not in str(error))
        raise
    assert decoded == value


@pytest.mark.parametrize(
    "data",
    [
        pack(sizes=[6, 13, 3, 2**63 - 1]),
        pack([*ORDINARY[:3], (3, b"two", 2**63 - 1)]),
        pack(count=65535),
        pack_signed(b"\x9b" + b"\xff" * 8),
        pack_signed(b"\x9a\x00\x02\x00\x00" + bytes(0x20000)),
        pack_signed(b"\x81" * (256 << 10)),
    ],
)
def test_memory_does_not_follow_what_an_image_claims(tmp_path, data):
    """A few MiB, whatever lengths and counts it has."""
    path = tmp_path / "image.eif"
    tracemalloc.start()
    try:
        judge(path, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_memory_does_not_grow_with_the_image(tmp_path):
    """128 MiB, most of them a hole."""
    for name in ("kernel", "disk"):
        (tmp_path / name).write_bytes(b"x")
        os.truncate(tmp_path / name, 64 << 20)
    out = tmp_path / "image.eif"
    tracemalloc.start()
    try:
        built = build_eif(out, tmp_path / "kernel", "", [tmp_path / "disk"])
        with Eif.open(out) as image:
            assert image.measurements() == built
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
