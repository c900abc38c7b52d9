"""Signed images: PCR8, and which signatures hold; agreed with AWS's tool by the vectors."""

import sys
from datetime import datetime, timezone

import pytest
from eif_images import (
    CURVES,
    VECTORS,
    cbor,
    der,
    key_and_certificate,
    pack_signed,
    pcr0_of,
    pem,
    register,
    sign,
)

from nitro_vsock import Eif, EifError, InvalidArgumentError, UnsupportedError, measure_image

PCR0 = pcr0_of()
SECTION = sign(PCR0)


@pytest.fixture
def verify(tmp_path):
    """Verifies an image with a signature section."""

    def run(section, now=None):
        path = tmp_path / "signed.eif"
        path.write_bytes(pack_signed(section))
        with Eif.open(path) as image:
            return image.verify(now)

    return run


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("tag", [b"", b"\xd2"])
def test_signature_of_every_curve_is_verified(verify, curve, tag):
    """The curves that AWS's tools know, with and without the tag of a COSE_Sign1."""
    found = verify(sign(PCR0, curve, tag=tag))
    _, certificate = key_and_certificate(curve)
    assert found.subject == found.issuer == f"CN=test {curve}"
    assert found.der == der(certificate)
    assert found.pcr8 == register(der(certificate))
    assert found.not_before == datetime(2020, 1, 1, tzinfo=timezone.utc)


def test_pcr8_is_of_the_certificate_alone(tmp_path):
    """Whether the signature holds is another question, which needs another package."""
    path = tmp_path / "signed.eif"
    path.write_bytes(pack_signed(sign(PCR0, signature=bytes(96))))
    assert measure_image(path).pcr8 == register(der(key_and_certificate()[1]))


def test_image_that_is_not_signed_has_no_certificate():
    """It passes all the same: there is nothing to be wrong."""
    with Eif.open(VECTORS / "unsigned.eif") as image:
        assert image.verify() is None
        assert image.measurements().pcr8 is None


@pytest.mark.parametrize("line_ends", [b"\n", b"\r\n"])
def test_certificate_is_found_among_other_text(verify, line_ends):
    """As `openssl x509 -text` writes it, and with more certificates after it."""
    certificate = pem(key_and_certificate()[1]) + pem(key_and_certificate("P-256")[1])
    text = b"Certificate:\n    Data:\n" + certificate
    found = verify(sign(PCR0, pem=text.replace(b"\n", line_ends)))
    assert found.subject == "CN=test P-384"


OTHER = key_and_certificate("P-256")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (sign(bytes(48)), "for another image"),
        (sign(PCR0, index=1), "for another image"),
        (sign(PCR0[:47]), "for another image"),
        (sign(PCR0, signature=bytes(96)), "not made by its certificate's key"),
        (sign(PCR0, signature=b"\xff" * 96), "not made by its certificate's key"),
        (sign(PCR0, signature=b""), "has 0 bytes and must have 96"),
        (sign(PCR0, signature=bytes(64)), "has 64 bytes and must have 96"),
        (sign(PCR0, algorithm=-7), "names an algorithm"),
        (sign(PCR0, algorithm=-37), "names an algorithm"),
        (sign(PCR0, certificate=OTHER[1]), "names an algorithm"),
        (sign(PCR0, certificate=key_and_certificate(last=2119)[1]), "not made by"),
    ],
)
def test_signature_that_does_not_hold_is_refused(verify, section, text):
    """Another image's, another key's, a broken one."""
    with pytest.raises(EifError, match=text) as caught:
        verify(section)
    assert caught.value.field == "signature"
    assert caught.value.offset == 633


@pytest.mark.parametrize(("first", "last"), [(2020, 2021), (2119, 2120)])
def test_certificate_must_be_valid_at_the_moment(verify, first, last):
    """AWS's tool refuses to run an image with one that is not; another moment can be asked for."""
    key, certificate = key_and_certificate("P-384", first, last)
    section = sign(PCR0, key=key, certificate=certificate)
    with pytest.raises(EifError, match=f"valid from {first}-01-01 00:00 .* sign the image again"):
        verify(section)
    assert verify(section, datetime(first, 6, 1, tzinfo=timezone.utc)).not_after.year == last
    with pytest.raises(InvalidArgumentError, match="time zone"):
        verify(section, datetime(first, 6, 1))


ENTRY = {"signing_certificate": list(pem(OTHER[1])), "signature": [0]}
GOOD_PEM = pem(OTHER[1])


@pytest.mark.parametrize(
    "section",
    [
        b"",
        b"\x00",
        b"\x9f\xff",
        b"\x80",
        b"\x81\x00",
        b"\x81" * 200_000,
        b"\x9b" + b"\xff" * 8,
        b"\xbb" + b"\xff" * 8,
        b"\x5b" + b"\xff" * 8,
        b"\xc6\x80",
        b"\xf6",
        b"\x1c",
        b"\x19\x01",
        SECTION + b"\x00",
        SECTION[:-1],
        sign(PCR0, entries=[ENTRY, ENTRY]),
        sign(PCR0, entries={0: ENTRY}),
        sign(PCR0, entries=[{**ENTRY, "more": 1}]),
        sign(PCR0, entries=[{"signature": [0]}]),
        sign(PCR0, entries=[{**ENTRY, "signing_certificate": GOOD_PEM}]),
        sign(PCR0, entries=[{**ENTRY, "signing_certificate": [256]}]),
        sign(PCR0, entries=[{**ENTRY, "signing_certificate": [-1]}]),
        sign(PCR0, entries=[{**ENTRY, "signing_certificate": ["x"]}]),
        sign(PCR0, entries=[{**ENTRY, "signature": list(cbor([b"", {}, b""]))}]),
        sign(PCR0, entries=[{**ENTRY, "signature": list(cbor([b"", [], b"", b""]))}]),
        sign(PCR0, entries=[{**ENTRY, "signature": list(cbor([0, {}, b"", b""]))}]),
        sign(PCR0, tag=b"\xd3"),
        b"\x81\xa2\x61a\x00\x61a\x00",
        b"\x81\xa2\x80\x00\x61a\x00",
        b"\x81\x61\xff",
        sign(PCR0, pem=b""),
        sign(PCR0, pem=GOOD_PEM.replace(b"BEGIN", b"BEGUN")),
        sign(PCR0, pem=GOOD_PEM.replace(b"END", b"FIN")),
        sign(PCR0, pem=GOOD_PEM.replace(b"M", b"*", 1)),
        sign(PCR0, pem=GOOD_PEM.replace(b"MI", b"MA", 1)),
        sign(PCR0, pem=b"x" + GOOD_PEM),
        sign(PCR0, pem=b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"),
    ],
)
def test_section_that_aws_s_tools_do_not_write_has_no_pcr8(tmp_path, section):
    """Refused when it is measured: what cannot be read cannot be predicted."""
    path = tmp_path / "signed.eif"
    path.write_bytes(pack_signed(section))
    with Eif.open(path) as image:
        for call in (image.measurements, image.verify):
            with pytest.raises(EifError, match=f"image {path}: the signature ") as caught:
                call()
            assert caught.value.field == "signature"


def test_certificate_that_is_none_is_refused_when_it_is_verified(verify):
    """A DER sequence of other things; PCR8 does not look into it."""
    text = b"-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n"
    with pytest.raises(EifError, match="certificate that cannot be read"):
        verify(sign(PCR0, pem=text))


def test_key_of_another_kind_is_refused(verify):
    """AWS's tools know elliptic curves only."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([])
    moment = datetime(2020, 1, 1, tzinfo=timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(moment)
        .not_valid_after(moment.replace(year=2120))
        .sign(key, None)
    )
    with pytest.raises(EifError, match="P-256, P-384 or P-521"):
        verify(sign(PCR0, certificate=certificate))


def test_missing_package_is_named_with_the_way_to_install_it(verify, monkeypatch):
    """Measuring needs nothing but the standard library."""
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'nitro_vsock\[eif\]'"):
        verify(SECTION)
    with Eif.open(VECTORS / "signed.eif") as image:
        assert image.measurements().pcr8 is not None
