"""Owns: enclave images, and what the registers of an enclave hold that boots one.

Knows nothing of: sessions. No other room but `testing` and `cli` imports this one.
"""

from nitro_vsock.enclave.build import build_eif
from nitro_vsock.enclave.eif import Eif, EifSection, SectionType, measure_image
from nitro_vsock.enclave.pcr import EnclaveMeasurement
from nitro_vsock.enclave.signature import SigningCertificate

__all__ = [
    "Eif",
    "EifSection",
    "EnclaveMeasurement",
    "SectionType",
    "SigningCertificate",
    "build_eif",
    "measure_image",
]
