"""Owns: making an enclave image; the same inputs give the same bytes.

Knows nothing of: how an image is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Final

from nitro_vsock.enclave.eif import METADATA_LIMIT, Checksum, parse_metadata
from nitro_vsock.enclave.files import CHUNK, InputFile, fail
from nitro_vsock.enclave.layout import (
    ARM64,
    CHECKSUM_AT,
    HEADER_SIZE,
    SECTION_SIZE,
    SECTIONS_MAX,
    VERSION,
    Header,
    SectionType,
    pack_header,
    pack_section,
)
from nitro_vsock.enclave.pcr import EnclaveMeasurement, ImageMeter
from nitro_vsock.errors import InvalidArgumentError, require_int
from nitro_vsock.rootfs import Sink, open_sink
from nitro_vsock.transport import PathLike

ARCHITECTURES: Final = {"x86_64": 0, "aarch64": ARM64}
"""By name: the header's flags."""

_RAMDISKS_MAX: Final = SECTIONS_MAX - 4
"""So that the image can still be signed."""

_NEEDED: Final = (
    *("ImageName", "ImageVersion", "BuildMetadata", "DockerInfo", "CustomMetadata"),
    *("BuildMetadata.BuildTime", "BuildMetadata.BuildTool", "BuildMetadata.BuildToolVersion"),
    *("BuildMetadata.OperatingSystem", "BuildMetadata.KernelVersion"),
)
"""What AWS's tools want in the metadata: they cannot describe or sign an image that lacks any."""

_UNKNOWN: Final = json.dumps(
    {
        "ImageName": "unknown",
        "ImageVersion": "unknown",
        "BuildMetadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",
            "BuildTool": "nitro_vsock",
            "BuildToolVersion": "unknown",
            "OperatingSystem": "Linux",
            "KernelVersion": "unknown",
        },
        "DockerInfo": {},
        "CustomMetadata": {},
    },
    separators=(",", ":"),
).encode()


@dataclass
class _Part:
    """A section to be written: its type, and where its data comes from."""

    kind: SectionType
    source: bytes | InputFile

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.size

    def chunks(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        if isinstance(self.source, bytes):
            yield memoryview(self.source)
        else:
            yield from self.source.chunks(0, self.source.size, buffers)


def build_eif(
    output: Sink,
    kernel: PathLike,
    cmdline: str | bytes,
    ramdisks: Iterable[PathLike],
    *,
    metadata: bytes | None = None,
    architecture: str = "x86_64",
    default_memory: int = 1 << 30,
    default_cpus: int = 2,
) -> EnclaveMeasurement:
    """Make an unsigned image of version 4, laid out as AWS's `eif_build` does.

    Nothing in it depends on the time, the machine or the names of the files. The inputs are read
    twice, in constant memory: the checksum is in the header.

    Args:
        output: where the image goes: a path, where it appears when it is complete, a descriptor, or
            a callback for each piece.
        kernel: path of a kernel (bzImage, or Image for aarch64); it is not looked into.
        cmdline: of the kernel.
        ramdisks: paths, 1 to 28. The first one goes into PCR1, the others into PCR2.
        metadata: a JSON object, written as it is. AWS's tools cannot read an image whose metadata
            lacks certain keys, so those are asked for. None says `unknown` everywhere.
        architecture: `x86_64` or `aarch64`.
        default_memory: bytes of memory that the image asks for.
        default_cpus: number of vCPUs that it asks for.

    Returns:
        The registers of an enclave that boots it.

    Raises:
        InvalidArgumentError: an argument cannot be used; `field` says which.
        EifReadError: an input cannot be read.
        EifError: an input has changed meanwhile, or the metadata is no JSON object.
        OSError: the output cannot be written.
    """
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise InvalidArgumentError("architecture", architecture, f"must be {known}")
    require_int("default_memory", default_memory, 0, (1 << 64) - 1)
    require_int("default_cpus", default_cpus, 0, (1 << 64) - 1)
    line = _encode_cmdline(cmdline)
    about = _UNKNOWN if metadata is None else _check_metadata(metadata)
    if isinstance(ramdisks, (str, bytes, os.PathLike)):
        raise InvalidArgumentError("ramdisks", ramdisks, "must be a list of paths")
    paths = list(ramdisks)
    if not 1 <= len(paths) <= _RAMDISKS_MAX:
        limit = f"must be 1 to {_RAMDISKS_MAX} paths"
        raise InvalidArgumentError("ramdisks", paths, limit)
    with ExitStack() as stack:

        def take(field: str, path: PathLike) -> InputFile:
            return stack.enter_context(closing(InputFile(field, path)))

        parts = [
            _Part(SectionType.KERNEL, take("kernel", kernel)),
            _Part(SectionType.CMDLINE, line),
            _Part(SectionType.METADATA, about),
            *(_Part(SectionType.RAMDISK, take("ramdisk", path)) for path in paths),
        ]
        flags = ARCHITECTURES[architecture]
        header = _lay_out(Header(VERSION, flags, default_memory, default_cpus, (), ()), parts)
        checksum, meter = Checksum(), ImageMeter()
        checksum.update(pack_header(header)[:CHECKSUM_AT])
        _stream(parts, checksum.update, meter)
        header = replace(header, checksum=checksum.value)
        again = Checksum()
        again.update(pack_header(header)[:CHECKSUM_AT])
        with open_sink(output) as store:

            def write(data: memoryview) -> None:
                again.update(data)
                store(data)

            store(memoryview(pack_header(header)))
            _stream(parts, write)
            for part in parts:
                if isinstance(part.source, InputFile):
                    part.source.check_unchanged()
            if again.value != checksum.value:
                raise fail("an input changed while it was read", "eif_crc32", CHECKSUM_AT)
        return meter.finish()


def read_metadata(path: PathLike) -> bytes:
    """Return what a file has to say for `build_eif(metadata=...)`.

    Raises:
        InvalidArgumentError: the file is no regular one, or has more than 1 MiB.
        EifReadError: it cannot be read.
    """
    with closing(InputFile("metadata", path)) as file:
        if file.size > METADATA_LIMIT:
            limit = f"must have at most {METADATA_LIMIT:,} bytes"
            raise InvalidArgumentError("metadata", file.name, limit)
        return file.read(0, file.size)


def _lay_out(header: Header, parts: list[_Part]) -> Header:
    offsets, at = [], HEADER_SIZE
    for part in parts:
        offsets.append(at)
        at += SECTION_SIZE + part.size
    return replace(header, offsets=tuple(offsets), sizes=tuple(part.size for part in parts))


def _stream(
    parts: list[_Part], store: Callable[[memoryview], None], meter: ImageMeter | None = None
) -> None:
    """Give everything after the header to `store`, and what is measured to the meter."""
    buffers = cycle([memoryview(bytearray(CHUNK))])
    for part in parts:
        store(memoryview(pack_section(part.kind, part.size)))
        if meter is not None:
            meter.skip()
            if part.kind is not SectionType.METADATA:
                meter.begin(ramdisk=part.kind is SectionType.RAMDISK)
        for chunk in part.chunks(buffers):
            store(chunk)
            if meter is not None:
                meter.feed(chunk)


def _encode_cmdline(cmdline: str | bytes) -> bytes:
    if not isinstance(cmdline, (str, bytes)):
        raise InvalidArgumentError("cmdline", cmdline, "must be str or bytes")
    line = os.fsencode(cmdline)
    if b"\0" in line:
        raise InvalidArgumentError("cmdline", cmdline, "must not contain a NUL byte")
    return line


def _check_metadata(metadata: bytes) -> bytes:
    if not isinstance(metadata, bytes) or len(metadata) > METADATA_LIMIT:
        limit = f"must be bytes of JSON, at most {METADATA_LIMIT:,}"
        raise InvalidArgumentError("metadata", metadata, limit)
    found = parse_metadata(metadata)
    for path in _NEEDED:
        *outer, name = path.split(".")
        inner = found[outer[0]] if outer else found
        if not isinstance(inner, dict) or name not in inner:
            limit = f"must have {path}: AWS's tools cannot read the image without it"
            raise InvalidArgumentError("metadata", metadata, limit)
    return metadata
