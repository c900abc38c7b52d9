"""Owns: the registers (PCRs) of an enclave before it boots: how they are computed and shown.

Knows nothing of: where the bytes of an image lie.

Sources: `aws-nitro-enclaves-image-format` for PCR0, 1, 2 and 8, the AWS Nitro Enclaves user guide
("Where to get an enclave's measurements") for PCR3 and 4.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any, Final

from nitro_vsock.check import PCR_EXEC, PCR_ROOTFS, Measurement, kms_condition
from nitro_vsock.errors import InvalidArgumentError

START: Final = bytes(hashlib.sha384().digest_size)
"""What a register holds before it is extended."""

_ROLE_ARN: Final = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)

_INSTANCE_ID: Final = re.compile(r"i-(?:[0-9a-f]{17}|[0-9a-f]{8})")


def measure_content(content: bytes) -> bytes:
    """Return the register that is extended once with the digest of this content."""
    return _extend(hashlib.sha384(content).digest())


def measure_role(role_arn: str) -> bytes:
    """Return PCR3: of the ARN of the IAM role that the parent instance has.

    Raises:
        InvalidArgumentError: it is no ARN of a role. The ARN of an instance profile or of an
            assumed role (`sts`) gives another register, so neither is taken.
    """
    if not isinstance(role_arn, str) or not _ROLE_ARN.fullmatch(role_arn):
        limit = "must be a role's ARN such as arn:aws:iam::123456789012:role/name"
        raise InvalidArgumentError("role_arn", role_arn, limit)
    return _extend(role_arn.encode())


def measure_instance(instance_id: str) -> bytes:
    """Return PCR4: of the parent instance's id.

    Raises:
        InvalidArgumentError: it is no instance id.
    """
    if not isinstance(instance_id, str) or not _INSTANCE_ID.fullmatch(instance_id):
        limit = "must be an instance's id such as i-0123456789abcdef0"
        raise InvalidArgumentError("instance_id", instance_id, limit)
    return _extend(instance_id.encode())


def _extend(data: bytes) -> bytes:
    return hashlib.sha384(START + data).digest()


@dataclass(frozen=True)
class EnclaveMeasurement:
    """What an enclave's registers hold, as far as it is known before the enclave boots.

    In debug mode the enclave attests zeros for the image's registers instead.

    Attributes:
        pcr0: of the image: kernel, command line and all ramdisks; 48 bytes, as all are.
        pcr1: of kernel, command line and first ramdisk.
        pcr2: of the other ramdisks.
        pcr3: of the parent instance's IAM role, or None where the role was not given.
        pcr4: of the parent instance's id, or None where the id was not given.
        pcr8: of the certificate that signed the image, or None for an unsigned image.
        launch: PCR16 and PCR17, or None where the launch was not given.
    """

    pcr0: bytes
    pcr1: bytes
    pcr2: bytes
    pcr3: bytes | None = None
    pcr4: bytes | None = None
    pcr8: bytes | None = None
    launch: Measurement | None = None

    @property
    def registers(self) -> dict[int, bytes]:
        """The known registers by number, in ascending order."""
        found = {0: self.pcr0, 1: self.pcr1, 2: self.pcr2}
        found |= {
            number: value
            for number, value in ((3, self.pcr3), (4, self.pcr4), (8, self.pcr8))
            if value is not None
        }
        if self.launch is not None:
            found |= {PCR_ROOTFS: self.launch.pcr16, PCR_EXEC: self.launch.pcr17}
        return found

    def joined(
        self,
        launch: Measurement | None = None,
        *,
        role_arn: str | None = None,
        instance_id: str | None = None,
    ) -> EnclaveMeasurement:
        """Return the same measurement with more registers; what is None stays as it is.

        Args:
            launch: of the launch that the enclave will take: `writer.measure()`.
            role_arn: of the IAM role of the parent instance, for PCR3.
            instance_id: of the parent instance, for PCR4.

        Raises:
            InvalidArgumentError: as `measure_role` and `measure_instance` do.
        """
        return replace(
            self,
            launch=self.launch if launch is None else launch,
            pcr3=self.pcr3 if role_arn is None else measure_role(role_arn),
            pcr4=self.pcr4 if instance_id is None else measure_instance(instance_id),
        )

    def as_dict(self) -> dict[str, str]:
        """Return the known registers in hex: `pcr0` and so on."""
        return {f"pcr{number}": value.hex() for number, value in self.registers.items()}

    def kms_condition(self) -> dict[str, Any]:
        """Return the `Condition` of a KMS key policy that asks for all known registers."""
        return kms_condition(self.registers)


class ImageMeter:
    """Hashes an image's sections as they stream past.

    Kernel, command line and first ramdisk are hashed once for PCR0 and PCR1. Hashes of the same
    bytes run beside each other where an executor is given.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = executor
        self._running: list[Future[None]] = []
        self._image = hashlib.sha384()
        self._boot: bytes | None = None
        self._others = hashlib.sha384()
        self._ramdisks = 0
        self._updates: tuple[Callable[[memoryview], None], ...] = ()

    def begin(self, *, ramdisk: bool) -> None:
        """Say that what is fed from now on is a ramdisk, or else the kernel or command line."""
        self.wait()
        self._updates = (self._image.update,)
        if ramdisk:
            self._ramdisks += 1
            if self._ramdisks > 1:
                self._boot = self._boot or self._image.digest()
                self._updates = (self._image.update, self._others.update)

    def feed(self, data: memoryview, *also: Callable[[memoryview], None]) -> None:
        """Hash the next bytes, and call `also` with them; returns before that is done.

        The bytes must stay as they are until the next `feed`, `begin` or `wait` has returned.
        """
        self.wait()
        for update in (*self._updates, *also):
            if self._executor is None:
                update(data)
            else:
                self._running.append(self._executor.submit(update, data))

    def wait(self) -> None:
        """Wait until everything fed is hashed."""
        while self._running:
            self._running[-1].result()
            self._running.pop()

    def skip(self) -> None:
        """Say that what is fed from now on is not measured."""
        self.wait()
        self._updates = ()

    def finish(self) -> EnclaveMeasurement:
        """Return PCR0, PCR1 and PCR2 of everything fed."""
        self.wait()
        image = self._image.digest()
        boot = self._boot or image
        return EnclaveMeasurement(_extend(image), _extend(boot), _extend(self._others.digest()))
