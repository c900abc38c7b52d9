"""Owns: `Eif`, an enclave image that is open: its sections, its checksum, its registers.

Knows nothing of: how an image is made or booted.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import cycle
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from nitro_vsock.check import Measurement
from nitro_vsock.enclave.files import CHUNK, InputFile, fail
from nitro_vsock.enclave.layout import (
    ARM64,
    CHECKSUM_AT,
    HEADER_SIZE,
    SECTION_SIZE,
    EifSection,
    Header,
    SectionType,
    unpack_header,
    unpack_section,
)
from nitro_vsock.enclave.pcr import EnclaveMeasurement, ImageMeter
from nitro_vsock.enclave.signature import SIGNATURE_LIMIT, Signature, SigningCertificate
from nitro_vsock.errors import EifError, InvalidArgumentError
from nitro_vsock.transport import PathLike

if TYPE_CHECKING:
    from typing_extensions import Self

METADATA_LIMIT: Final = 1 << 20
"""Bytes of a metadata section that are read."""

_CMDLINE_LIMIT: Final = 64 << 10
"""Bytes of a command line that are read; a kernel takes 2048."""

_SMALL: Final = 4 << 20
"""Up to this size, starting threads costs more than they save."""

MEASURED: Final = (SectionType.KERNEL, SectionType.CMDLINE, SectionType.RAMDISK)
"""What is measured, in the order in which it is."""

__all__ = ["Eif", "EifSection", "SectionType", "measure_image"]


class Eif:
    """An enclave image (EIF) that is open for reading.

    Opening reads the headers only, and takes none of their lengths, counts and offsets on trust.
    `measurements` and `verify` read the whole file once, in constant memory. Any thread may use it;
    `close` waits for a call that is running.

    Attributes:
        path: of the file.
        size: of the file, in bytes.
        version: of the format, 2 to 4.
        flags: of the header.
        default_memory: bytes of memory that the image asks for.
        default_cpus: number of vCPUs that it asks for.
        checksum: CRC32 that the header states.
        sections: in the order of the file.
        warnings: what is odd and does not matter to the registers, in sentences.
    """

    def __init__(self, file: InputFile) -> None:
        """Take an open file; use `Eif.open`."""
        self._file = file
        self._lock = threading.RLock()
        self._scanned: tuple[int, EnclaveMeasurement] | None = None
        self.path, self.size = file.name, file.size
        header = self._read_header()
        self.version, self.flags = header.version, header.flags
        self.default_memory, self.default_cpus = header.default_memory, header.default_cpus
        self.checksum = header.checksum
        warnings: list[str] = []
        self.sections = tuple(self._walk(header, warnings))
        self._check_order()
        if self.flags & ~ARM64:
            warnings.append(f"the header has unknown flags ({self.flags:#x})")
        if not any(section.type is SectionType.RAMDISK for section in self.sections):
            warnings.append("there is no ramdisk")
        self.warnings = tuple(warnings)

    @classmethod
    def open(cls, path: PathLike) -> Eif:
        """Open an image.

        Args:
            path: of a regular file.

        Raises:
            InvalidArgumentError: `path` is no path, or leads to something else than a file.
            EifReadError: the file cannot be opened or read.
            EifError: it is no well-formed image; `field` and `offset` say where. An image that
                AWS's tools and an enclave could take differently, for instance because the header
                and the sections' own headers disagree, is refused too.
        """
        file = InputFile("image", path)
        try:
            with _naming(file.name):
                return cls(file)
        except BaseException:
            file.close()
            raise

    @property
    def architecture(self) -> str:
        """What the image is for: `x86_64` or `aarch64`."""
        return "aarch64" if self.flags & ARM64 else "x86_64"

    @property
    def signed(self) -> bool:
        """True when there is a signature section; `verify` says whether it holds."""
        return self._find(SectionType.SIGNATURE) is not None

    def cmdline(self) -> bytes:
        """Return the kernel's command line.

        Raises:
            EifError: it has more than 64 KiB.
        """
        with _naming(self.path):
            section = self._find(SectionType.CMDLINE)
            return b"" if section is None else self._read(section, _CMDLINE_LIMIT)

    def metadata(self) -> dict[str, Any] | None:
        """Return what the image says about itself, or None where it says nothing.

        Not measured: whoever has the image can change it. An enclave boots without it.

        Raises:
            EifError: it has more than 1 MiB, or is no JSON object.
        """
        with _naming(self.path):
            section = self._find(SectionType.METADATA)
            if section is None:
                return None
            return parse_metadata(self._read(section, METADATA_LIMIT), section.offset)

    def measurements(
        self,
        launch: Measurement | None = None,
        *,
        role_arn: str | None = None,
        instance_id: str | None = None,
    ) -> EnclaveMeasurement:
        """Predict PCR0, PCR1, PCR2 and, for a signed image, PCR8 of an enclave that boots it.

        The file is read once, however often this and `verify` are called. The signature is not
        verified here: PCR8 is of the certificate alone.

        Args:
            launch: of the launch that the enclave will take, for PCR16 and PCR17.
            role_arn: of the IAM role of the parent instance, for PCR3.
            instance_id: of the parent instance, for PCR4.

        Raises:
            InvalidArgumentError: `role_arn` or `instance_id` is none.
            EifError: the checksum is wrong, the signature section is malformed, or the file has
                changed since it was opened.
            EifReadError: the file cannot be read.
        """
        with _naming(self.path):
            checksum, found = self._scan()
            if checksum != self.checksum:
                text = (
                    f"the checksum is {checksum:#010x}, the header says {self.checksum:#010x}: "
                    "the file is damaged; build or copy it again"
                )
                raise fail(text, "eif_crc32", CHECKSUM_AT)
        return found.joined(launch, role_arn=role_arn, instance_id=instance_id)

    def verify(self, now: datetime | None = None) -> SigningCertificate | None:
        """Check the checksum and, where there is one, the signature.

        Args:
            now: the moment at which the certificate must be valid, with a time zone.
                The present is the default.

        Returns:
            The certificate that has signed the image, or None for an unsigned image. Nobody vouches
            for the certificate: compare its `pcr8` with the one you expect.

        Raises:
            InvalidArgumentError: `now` has no time zone.
            EifError: as `measurements` does; also: the certificate's key has not signed this PCR0,
                or the certificate is not valid at this moment.
            UnsupportedError: the image is signed and the package `cryptography` is missing.
        """
        if now is not None and now.tzinfo is None:
            raise InvalidArgumentError("now", now, "must have a time zone")
        found = self.measurements()
        with _naming(self.path):
            signature = self._signature()
            return None if signature is None else signature.verify(found.pcr0, now)

    def close(self) -> None:
        """Close the file, once no call is running; any number of times."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_header(self) -> Header:
        if self.size < HEADER_SIZE:
            text = f"it has {self.size} bytes; the header alone has {HEADER_SIZE}"
            raise fail(text, "header", self.size)
        return unpack_header(self._file.read(0, HEADER_SIZE))

    def _walk(self, header: Header, warnings: list[str]) -> Iterator[EifSection]:
        """Give the sections one after the other, held against what the header says of them."""
        at = HEADER_SIZE
        for index, (offset, size) in enumerate(zip(header.offsets, header.sizes, strict=True)):
            field = f"section {index}"
            if offset != at:
                text = f"{field} is at {offset:,} by the header, but the one before ends at {at:,}"
                raise fail(text, field, at)
            if self.size - at < SECTION_SIZE:
                raise fail(f"it ends in the header of {field}", field, at)
            section = unpack_section(self._file.read(at, SECTION_SIZE), index, at)
            field = f"{field} ({section.type})"
            end = section.offset + section.size
            if end > self.size:
                left = self.size - section.offset
                raise fail(f"{field} has {section.size:,} bytes, but {left:,} are left", field, at)
            if section.flags:
                warnings.append(f"{field} has unknown flags ({section.flags:#x})")
            if section.size != size:
                text = f"{field} has {section.size:,} bytes, but {size:,} by the header"
                # AWS's own tool leaves the old size there when it signs an image again.
                if section.type is not SectionType.SIGNATURE:
                    raise fail(text, field, at)
                warnings.append(text)
            yield section
            at = end
        if at != self.size:
            text = f"there are {self.size - at:,} bytes after the last section"
            raise fail(text, "num_sections", at)

    def _check_order(self) -> None:
        """Refuse what is measured in one order by some and in another by others."""
        kinds = [section.type for section in self.sections]
        for kind in SectionType:
            count = kinds.count(kind)
            if count == 0 and kind in (SectionType.KERNEL, SectionType.CMDLINE):
                raise fail(f"it has no {kind} section", str(kind))
            if count > 1 and kind is not SectionType.RAMDISK:
                raise fail(f"it has {count} {kind} sections", str(kind))
        order = [kind for kind in kinds if kind in MEASURED]
        if order != sorted(order):
            raise fail("kernel, command line and ramdisks are not in this order", "sections")

    def _find(self, kind: SectionType) -> EifSection | None:
        return next((section for section in self.sections if section.type is kind), None)

    def _read(self, section: EifSection, limit: int) -> bytes:
        if section.size > limit:
            text = f"the {section.type} has {section.size:,} bytes; {limit:,} at most are read"
            raise fail(text, str(section.type), section.offset)
        with self._lock:
            return self._file.read(section.offset, section.size)

    def _signature(self) -> Signature | None:
        section = self._find(SectionType.SIGNATURE)
        if section is None:
            return None
        return Signature(self._read(section, SIGNATURE_LIMIT), section.offset)

    def _scan(self) -> tuple[int, EnclaveMeasurement]:
        """Read everything once; return the checksum and the registers."""
        with self._lock, ExitStack() as stack:
            if self._scanned is None:
                signature = self._signature()
                executor: Executor | None = None
                if self.size > _SMALL:
                    executor = stack.enter_context(ThreadPoolExecutor(3))
                checksum, found = self._hash(executor)
                self._file.check_unchanged()
                pcr8 = None if signature is None else signature.pcr8
                self._scanned = checksum, replace(found, pcr8=pcr8)
            return self._scanned

    def _hash(self, executor: Executor | None) -> tuple[int, EnclaveMeasurement]:
        checksum, meter = Checksum(), ImageMeter(executor)
        # One buffer is filled while the other is hashed.
        buffers = cycle([memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))])

        def feed(offset: int, size: int) -> None:
            for chunk in self._file.chunks(offset, size, buffers):
                meter.feed(chunk, checksum.update)

        feed(0, CHECKSUM_AT)
        for section in self.sections:
            meter.skip()
            feed(section.offset - SECTION_SIZE, SECTION_SIZE)
            if section.type in MEASURED:
                meter.begin(ramdisk=section.type is SectionType.RAMDISK)
            feed(section.offset, section.size)
        found = meter.finish()
        return checksum.value, found


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say in an error which image is at fault."""
    try:
        yield
    except EifError as error:
        if not error.message.startswith("image "):
            error.message = f"image {path}: {error.message}"
        raise


class Checksum:
    """The checksum of an image, taken as it streams past.

    Attributes:
        value: CRC32 of what was fed.
    """

    value: int = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self.value = zlib.crc32(data, self.value)


def parse_metadata(data: bytes, offset: int | None = None) -> dict[str, Any]:
    """Return the JSON object of a metadata section.

    Raises:
        EifError: it is none.
    """
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        text = f"the metadata is no JSON ({error})"
        raise fail(text, str(SectionType.METADATA), offset) from None
    if not isinstance(found, dict):
        raise fail("the metadata is no JSON object", str(SectionType.METADATA), offset)
    return found


def measure_image(
    path: PathLike,
    launch: Measurement | None = None,
    *,
    role_arn: str | None = None,
    instance_id: str | None = None,
) -> EnclaveMeasurement:
    """Open an image and return its `measurements`; arguments and errors are those of both."""
    with Eif.open(path) as image:
        return image.measurements(launch, role_arn=role_arn, instance_id=instance_id)
