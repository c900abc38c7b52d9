"""Owns: enclave images written by hand for tests, right and wrong ones, and signatures of them.

Knows nothing of: the package under test.
"""

import hashlib
import struct
import zlib
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "eif"

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5

HEADER = struct.Struct(">4sHHQQHH32Q32QII")
SECTION = struct.Struct(">HHQ")

ORDINARY = ((KERNEL, b"kernel"), (CMDLINE, b"console=ttyS0"), (RAMDISK, b"one"), (RAMDISK, b"two"))


def pack(sections=ORDINARY, *, tail=b"", crc=None, **header):
    """Return an image; `header` replaces what would be right: offsets, sizes, count, version..."""
    body, offsets, sizes = b"", [], []
    for kind, data, *stated in sections:
        offsets.append(HEADER.size + len(body))
        sizes.append(len(data))
        body += SECTION.pack(kind, header.get("section_flags", 0), *stated or [len(data)]) + data
    offsets = header.get("offsets", offsets)
    sizes = header.get("sizes", sizes)
    fill = lambda numbers: (*numbers, *(0,) * (32 - len(numbers)))  # noqa: E731
    head = HEADER.pack(
        header.get("magic", b".eif"),
        header.get("version", 4),
        header.get("flags", 0),
        1 << 30,
        2,
        0,
        header.get("count", len(sections)),
        *fill(offsets),
        *fill(sizes),
        0,
        0,
    )[:-4]
    body += tail
    if crc is None:
        crc = zlib.crc32(head + body)
    return head + struct.pack(">I", crc) + body


def register(*contents):
    """Return a PCR that was extended once, with the digest of the contents."""
    return hashlib.sha384(bytes(48) + hashlib.sha384(b"".join(contents)).digest()).digest()


def cbor_head(kind, number):
    """Return the start of a CBOR item."""
    if number < 24:
        return bytes([kind << 5 | number])
    if number < 256:
        return bytes([kind << 5 | 24, number])
    return bytes([kind << 5 | 25]) + number.to_bytes(2, "big")


def cbor(value):
    """Return a value in CBOR; a list of numbers is what AWS's tools make of bytes."""
    if isinstance(value, int):
        return cbor_head(0, value) if value >= 0 else cbor_head(1, -1 - value)
    if isinstance(value, bytes):
        return cbor_head(2, len(value)) + value
    if isinstance(value, str):
        return cbor_head(3, len(value)) + value.encode()
    if isinstance(value, list):
        return cbor_head(4, len(value)) + b"".join(map(cbor, value))
    pairs = b"".join(cbor(key) + cbor(item) for key, item in value.items())
    return cbor_head(5, len(value)) + pairs


CURVES = {
    "P-256": (ec.SECP256R1(), hashes.SHA256(), -7, 32),
    "P-384": (ec.SECP384R1(), hashes.SHA384(), -35, 48),
    "P-521": (ec.SECP521R1(), hashes.SHA512(), -36, 66),
}


def key_and_certificate(curve="P-384", first=2020, last=2120):
    """Return a private key and its certificate; the same ones for the same arguments."""
    return _make_key_and_certificate(curve, first, last)


@cache
def _make_key_and_certificate(curve, first, last):
    key = ec.generate_private_key(CURVES[curve][0])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {curve}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(first, 1, 1, tzinfo=timezone.utc))
        .not_valid_after(datetime(last, 1, 1, tzinfo=timezone.utc))
        .sign(key, hashes.SHA384())
    )
    return key, certificate


def pem(certificate):
    """Return a certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def der(certificate):
    """Return a certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def sign(pcr0, curve="P-384", *, key=None, certificate=None, tag=b"", **wrong):
    """Return a signature section for this PCR0; `wrong` replaces parts of it."""
    own_key, own_certificate = key_and_certificate(curve)
    key, certificate = key or own_key, certificate or own_certificate
    _, digest, algorithm, size = CURVES[curve]
    protected = cbor({1: wrong.get("algorithm", algorithm)})
    payload = cbor({"register_index": wrong.get("index", 0), "register_value": list(pcr0)})
    signed = cbor(["Signature1", protected, b"", payload])
    r, s = utils.decode_dss_signature(key.sign(signed, ec.ECDSA(digest)))
    signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
    signature = wrong.get("signature", signature)
    cose = tag + cbor([protected, {}, payload, signature])
    entry = {
        "signing_certificate": list(wrong.get("pem", pem(certificate))),
        "signature": list(cose),
    }
    return cbor(wrong.get("entries", [entry]))


def pack_signed(section, sections=ORDINARY):
    """Return an image with this signature section."""
    return pack((*sections, (SIGNATURE, section)))


def pcr0_of(sections=ORDINARY):
    """Return PCR0 of an image with these sections."""
    return register(*(data for kind, data in sections if kind in (KERNEL, CMDLINE, RAMDISK)))
