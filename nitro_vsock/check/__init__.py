"""What the guest would do with a launch, said before it boots: findings and measurements.

Takes arguments and a source, as plain data. Knows nothing of the writer.
"""

from nitro_vsock.check.findings import Finding, Severity
from nitro_vsock.check.measurement import (
    PCR_EXEC,
    PCR_ROOTFS,
    Measurement,
    kms_condition,
    measure,
)
from nitro_vsock.check.preflight import preflight, quick_preflight
from nitro_vsock.check.strings import check_strings

__all__ = [
    "Measurement",
    "Finding",
    "PCR_EXEC",
    "PCR_ROOTFS",
    "Severity",
    "check_strings",
    "kms_condition",
    "measure",
    "preflight",
    "quick_preflight",
]
