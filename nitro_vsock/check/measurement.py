"""Owns: the two measurements the guest extends: PCR16 of the archive, PCR17 of the strings.

Must not know: how an archive is parsed, where it comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nitro_vsock.archive import BrokenTarError, Data, MemberReader
from nitro_vsock.errors import ArchiveError, InvalidArgumentError, Stage
from nitro_vsock.rootfs import Rootfs
from nitro_vsock.transport import FilePayload
from nitro_vsock.wire import ExecArgv, ExecEnvp, ExecPath

PCR_ROOTFS: Final = 16

PCR_EXEC: Final = 17

_CHUNK: Final = 2048
"""Bytes of a file's data that one request to the Nitro Secure Module carries."""

_START: Final = bytes(hashlib.sha384().digest_size)

_UNMEASURED: Final = (b"rootfs/etc/hostname", b"rootfs/etc/hosts")
"""A member whose full name contains one of them, anywhere, is left out."""

_READ: Final = 512 << 10
"""Bytes read at once: they are still in the processor's cache when they are hashed."""


@dataclass(frozen=True)
class Measurement:
    """What the registers of an enclave hold after this launch.

    Attributes:
        pcr16: of the archive's file data, 48 bytes.
        pcr17: of exec_path, argv and envp, 48 bytes.
    """

    pcr16: bytes
    pcr17: bytes

    def as_dict(self) -> dict[str, str]:
        """Return both in hex."""
        return {"pcr16": self.pcr16.hex(), "pcr17": self.pcr17.hex()}

    def kms_condition(self) -> dict[str, Any]:
        """Return the `Condition` of a KMS key policy that this enclave alone fulfils.

        Add the enclave image's own registers (PCR0 to PCR2): without them any image may claim it.
        """
        return kms_condition({PCR_ROOTFS: self.pcr16, PCR_EXEC: self.pcr17})


def kms_condition(registers: Mapping[int, bytes]) -> dict[str, Any]:
    """Return the `Condition` of a KMS key policy that asks for these values of these registers."""
    return {
        "StringEqualsIgnoreCase": {
            f"kms:RecipientAttestation:PCR{number}": value.hex()
            for number, value in registers.items()
        }
    }


def measure(args: Iterable[object], rootfs: Rootfs) -> Measurement:
    """Predict PCR16 and PCR17 of an enclave that takes this launch.

    The archive is read once, from its start to its end; memory does not grow with it. Names, modes,
    links, directories, owners and times are not measured, but the order of the members is.

    Args:
        args: frames of the launch, the strings among them.
        rootfs: of the launch.

    Raises:
        InvalidArgumentError: the rootfs is a pipe, which would be empty afterwards.
        ArchiveError: it is no tar that the guest reads to its end.
        SourceError: it could not be read.
    """
    return Measurement(_pcr16(rootfs), measure_strings(args))


def measure_strings(args: Iterable[object]) -> bytes:
    """Return PCR17 of a launch's frames, in whatever order they are given."""
    frames = {type(arg): arg for arg in args}
    path, argv, envp = frames[ExecPath], frames[ExecArgv], frames[ExecEnvp]
    assert isinstance(path, ExecPath)  # noqa: S101 - keyed by its type
    assert isinstance(argv, ExecArgv)  # noqa: S101
    assert isinstance(envp, ExecEnvp)  # noqa: S101
    pcr = _START
    for string in (path.path, *argv.strings, *envp.strings):
        pcr = hashlib.sha384(pcr + string).digest()
    return pcr


class RootfsMeter:
    """Extends PCR16 with an archive that streams past.

    Each run of a member's data begins a chunk of its own; only a run's last chunk is short.
    """

    def __init__(self) -> None:
        self._reader = MemberReader()
        self._pcr = _START
        self._rest = b""
        self._measured = True

    def feed(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            BrokenTarError: the guest would not read on from here.
        """
        for event in self._reader.feed(data):
            if isinstance(event, Data):
                if self._measured:
                    self._extend(event.view, last=event.last)
            elif event.flaws:
                raise BrokenTarError(*event.flaws[0])
            else:
                name = event.name
                self._measured = not any(part in name for part in _UNMEASURED)

    def finish(self) -> bytes:
        """Return PCR16.

        Raises:
            BrokenTarError: the archive has no member, or ends inside one.
        """
        self._reader.finish()
        if not self._reader.members:
            raise BrokenTarError("no-member", "the rootfs has no member")
        return self._pcr

    def _extend(self, view: memoryview, *, last: bool) -> None:
        at = 0
        if self._rest:
            at = _CHUNK - len(self._rest)
            self._rest += view[:at]
            if len(self._rest) < _CHUNK and not last:
                return
            self._pcr = hashlib.sha384(self._pcr + self._rest).digest()
            self._rest = b""
        end = len(view)
        whole = end - max(end - at, 0) % _CHUNK
        # A hash object that is copied is cheaper than one that is made.
        pcr, fresh = self._pcr, hashlib.sha384().copy
        for start in range(at, whole, _CHUNK):
            digest = fresh()
            digest.update(pcr)
            digest.update(view[start : start + _CHUNK])
            pcr = digest.digest()
        rest = bytes(view[max(whole, at) :])
        if rest and last:
            pcr, rest = hashlib.sha384(pcr + rest).digest(), b""
        self._pcr, self._rest = pcr, rest


def _pcr16(rootfs: Rootfs) -> bytes:
    source = rootfs.open()
    try:
        payload = source.payload
        if isinstance(payload, FilePayload) and not payload.seekable:
            raise InvalidArgumentError(
                "rootfs", source.name, "must be a source that can be read twice to be measured"
            )
        meter = RootfsMeter()
        for chunk in source.chunks(_READ):
            meter.feed(chunk)
        source.verify()
        return meter.finish()
    except BrokenTarError as error:
        text = f"{source.name} cannot be measured: {error.flaw.text}"
        raise ArchiveError(text, stage=Stage.VALIDATE) from None
    finally:
        source.close()
