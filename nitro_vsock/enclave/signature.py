"""Owns: the signature section of an image: its certificate, PCR8, and whether the signature holds.

Knows nothing of: where the section lies.

The section is a CBOR array of one map with the keys `signing_certificate` (PEM) and `signature` (a
COSE_Sign1 of RFC 9052), both as arrays of numbers. What is signed is PCR0.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final, NoReturn

from nitro_vsock.enclave import cbor
from nitro_vsock.enclave.files import fail
from nitro_vsock.enclave.pcr import measure_content
from nitro_vsock.errors import EifError, Stage, UnsupportedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_LIMIT: Final = 256 << 10
"""Bytes of a signature section that are read; a certificate takes about two for each of its own."""

_COSE_SIGN1: Final = 18
"""Tag of RFC 9052 that may stand before a COSE_Sign1."""

_ALGORITHM: Final = 1
"""Label of the algorithm in a protected header."""

_CURVES: Final = {
    "secp256r1": (-7, "SHA256", 32),
    "secp384r1": (-35, "SHA384", 48),
    "secp521r1": (-36, "SHA512", 66),
}
"""By curve: COSE algorithm, digest, bytes of half a signature. AWS's tools know no other."""


@dataclass(frozen=True)
class SigningCertificate:
    """The certificate of a signature that was verified.

    Attributes:
        subject: whom it names, as RFC 4514 writes it.
        issuer: who issued it; nobody checks that this is true, and it is often the subject.
        not_before: the first moment at which it is valid.
        not_after: the last one.
        der: the certificate itself.
        pcr8: the register that an enclave with this certificate shows, 48 bytes.
    """

    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime
    der: bytes
    pcr8: bytes


class Signature:
    """A signature section, decoded and not verified.

    Attributes:
        der: the certificate.
        pcr8: the register of the certificate.
    """

    def __init__(self, section: bytes, offset: int) -> None:
        """Decode a section.

        Args:
            section: its data.
            offset: of the data in the file, for messages.

        Raises:
            EifError: it is not what AWS's tools write.
        """
        self._offset = offset
        entries = self._decode(section, "section")
        if not isinstance(entries, list) or len(entries) != 1:
            self._refuse("must hold one signature, of PCR0")
        entry = entries[0]
        if not isinstance(entry, dict) or set(entry) != {"signing_certificate", "signature"}:
            self._refuse("must hold a certificate and a signature and nothing else")
        self.der = self._unwrap(self._octets(entry["signing_certificate"], "certificate"))
        self.pcr8 = measure_content(self.der)
        cose = self._decode(
            self._octets(entry["signature"], "COSE_Sign1"), "COSE_Sign1", tag=_COSE_SIGN1
        )
        if not isinstance(cose, list) or len(cose) != 4:
            self._refuse("has a COSE_Sign1 that is no array of four")
        protected, unprotected, payload, signature = cose
        if not (
            isinstance(protected, bytes)
            and isinstance(unprotected, dict)
            and isinstance(payload, bytes)
            and isinstance(signature, bytes)
        ):
            self._refuse("has a COSE_Sign1 with fields of other types")
        header = self._decode(protected, "protected header")
        self._algorithm = header.get(_ALGORITHM) if isinstance(header, dict) else None
        self._protected, self._payload, self._signature = protected, payload, signature

    def verify(self, pcr0: bytes, now: datetime | None = None) -> SigningCertificate:
        """Check that the certificate's key has signed this PCR0, and that it is valid now.

        Nobody vouches for the certificate: compare `pcr8` with the one you expect.

        Args:
            pcr0: as it was computed from the image.
            now: the moment at which the certificate must be valid, with a time zone.

        Raises:
            EifError: any of it is not so.
            UnsupportedError: the package `cryptography` is not installed.
        """
        try:
            from cryptography import x509
            from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        except ImportError:
            raise UnsupportedError(
                "verifying the signature of an image needs the package cryptography: "
                "pip install 'nitro_vsock[eif]'",
                stage=Stage.VALIDATE,
            ) from None
        try:
            certificate = x509.load_der_x509_certificate(self.der)
            key = certificate.public_key()
            found = SigningCertificate(
                certificate.subject.rfc4514_string(),
                certificate.issuer.rfc4514_string(),
                certificate.not_valid_before_utc,
                certificate.not_valid_after_utc,
                self.der,
                self.pcr8,
            )
        except Exception as error:  # the parser has many, and the bytes may be anybody's
            raise self._failure(f"has a certificate that cannot be read ({error})") from None
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
            self._refuse("has a certificate whose key is not of the curve P-256, P-384 or P-521")
        self._check(key)
        if self._payload != _payload_of(pcr0):
            self._refuse("is valid, but for another image: its PCR0 is not this image's")
        now = now or datetime.now(timezone.utc)
        if not found.not_before <= now <= found.not_after:
            self._refuse(
                f"is of a certificate valid from {found.not_before:%Y-%m-%d %H:%M} "
                f"to {found.not_after:%Y-%m-%d %H:%M} UTC, which is not now: sign the image again"
            )
        return found

    def _check(self, key: EllipticCurvePublicKey) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        algorithm, digest, size = _CURVES[key.curve.name]
        if self._algorithm != algorithm:
            self._refuse("names an algorithm that does not fit its certificate's key")
        if len(self._signature) != 2 * size:
            self._refuse(f"has {len(self._signature)} bytes and must have {2 * size}")
        half = (self._signature[:size], self._signature[size:])
        encoded = utils.encode_dss_signature(*(int.from_bytes(part, "big") for part in half))
        signed = (
            b"\x84"
            + cbor.encode_text("Signature1")
            + b"".join(map(cbor.encode_bytes, (self._protected, b"", self._payload)))
        )
        try:
            key.verify(encoded, signed, ec.ECDSA(getattr(hashes, digest)()))
        except InvalidSignature:
            self._refuse("was not made by its certificate's key, or was changed since")

    def _decode(self, data: bytes, what: str, *, tag: int | None = None) -> cbor.Value:
        try:
            return cbor.decode(data, tag=tag)
        except cbor.CborError as error:
            at = f"byte {error.offset:,} of its {what}"
            raise self._failure(f"is no CBOR that AWS's tools write: {at}: {error}") from None

    def _octets(self, value: cbor.Value, what: str) -> bytes:
        if isinstance(value, list):
            numbers = [item for item in value if isinstance(item, int) and 0 <= item < 256]
            if len(numbers) == len(value):
                return bytes(numbers)
        raise self._failure(f"has a {what} that is no array of bytes")

    def _unwrap(self, pem: bytes) -> bytes:
        """Return the first certificate of a PEM in DER."""
        for label in (b"CERTIFICATE", b"X509 CERTIFICATE"):
            begin, end = b"-----BEGIN " + label + b"-----", b"-----END " + label + b"-----"
            before, found, rest = pem.partition(begin)
            if not found or (before and not before.endswith(b"\n")):
                continue
            body, found, _ = rest.partition(end)
            try:
                der = base64.b64decode(b"".join(body.split()), validate=True)
            except binascii.Error:
                break
            if found and _is_sequence(der):
                return der
            break
        raise self._failure("has no certificate in PEM")

    def _failure(self, text: str) -> EifError:
        return fail(f"the signature {text}", "signature", self._offset)

    def _refuse(self, text: str) -> NoReturn:
        raise self._failure(text)


def _is_sequence(der: bytes) -> bool:
    """Return whether this is one DER sequence with nothing after it."""
    if len(der) < 2 or der[0] != 0x30:
        return False
    size, at = der[1], 2
    if size & 0x80:
        at += size & 0x7F
        size = int.from_bytes(der[2:at], "big")
    return len(der) == at + size


def _payload_of(pcr0: bytes) -> bytes:
    """Return what a signature of this PCR0 signs, byte for byte as AWS's tools write it."""
    return (
        b"\xa2"
        + cbor.encode_text("register_index")
        + b"\x00"
        + cbor.encode_text("register_value")
        + cbor.encode_numbers(pcr0)
    )
