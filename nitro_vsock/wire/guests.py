"""Owns: what each published guest expects of a host, and how it departs from the others.

Knows nothing of: frames, descriptors.

Every difference between guests is a field here. Code asks for the field, never for the guest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from nitro_vsock.errors import InvalidArgumentError


@dataclass(frozen=True)
class Guest:
    """What one published guest expects: the program that is process 1 in the enclave.

    Take the one that your enclave image contains. `KRUN_1_18` is the default everywhere.

    | guest | is in |
    |---|---|
    | `Guest.KRUN_1_17` | libkrun 1.17.x |
    | `Guest.MSB_KRUN` | libkrun between 2026-02-25 and 2026-04-23; `msb_krun` up to 0.1.42 |
    | `Guest.KRUN_1_18` | libkrun 1.18, 1.19 and main, with its init in C |
    | `Guest.KRUN_RUST_INIT` | libkrun with its init in Rust (libkrun pull request 788) |

    Attributes:
        name: what the command line calls it, such as "krun-1.18".
        frame_5_silences: frame 5 stands for DEBUG: with it the guest sends no output, without it
            the guest does. In the others frame 5 asks for output.
        native_mtu: the network stream begins with the MTU in the guest's own byte order, and the
            guest takes each frame with one read. The others say MTU + 14, big-endian, and read on.
        bare_exit_code: the return code is the program's exit code, 0 to 255, and 0 where a signal
            ended it. In the others it is a wait status.
        waits_after_sigterm: after a SIGTERM the guest waits for the program and reports its code.
            The others report 0 at once.
        strict_stream: an unknown frame id and an early end of the stream are errors. The others
            ignore the id, and may spin for ever at the end.
        utf8_strings: path, argv and envp must be UTF-8.
        special_files: FIFOs and devices of the archive are made. In the others they become empty
            files.
        expands_pax_sparse: a sparse file in PAX format 1.0 is expanded, and measured expanded. In
            the others it is unpacked and measured as it is stored, its map included.
        keeps_modes: setuid, setgid, sticky and the write bits of group and others survive the
            unpacking.
    """

    name: str
    frame_5_silences: bool = False
    native_mtu: bool = False
    bare_exit_code: bool = False
    waits_after_sigterm: bool = False
    strict_stream: bool = False
    utf8_strings: bool = False
    special_files: bool = True
    expands_pax_sparse: bool = True
    keeps_modes: bool = False

    KRUN_1_17: ClassVar[Guest]
    MSB_KRUN: ClassVar[Guest]
    KRUN_1_18: ClassVar[Guest]
    KRUN_RUST_INIT: ClassVar[Guest]

    @classmethod
    def published(cls) -> tuple[Guest, ...]:
        """Return every guest, the oldest first."""
        return (cls.KRUN_1_17, cls.MSB_KRUN, cls.KRUN_1_18, cls.KRUN_RUST_INIT)

    @classmethod
    def named(cls, name: str) -> Guest:
        """Return the guest of this name.

        Raises:
            InvalidArgumentError: no guest has it.
        """
        for guest in cls.published():
            if guest.name == name:
                return guest
        names = ", ".join(guest.name for guest in cls.published())
        raise InvalidArgumentError("guest", name, f"must be one of {names}")

    def __str__(self) -> str:
        return self.name


Guest.KRUN_1_17 = Guest("krun-1.17", frame_5_silences=True, native_mtu=True)
Guest.MSB_KRUN = Guest("msb-krun", native_mtu=True)
Guest.KRUN_1_18 = Guest("krun-1.18")
Guest.KRUN_RUST_INIT = Guest(
    "krun-rust-init",
    bare_exit_code=True,
    waits_after_sigterm=True,
    strict_stream=True,
    utf8_strings=True,
    special_files=False,
    expands_pax_sparse=False,
    keeps_modes=True,
)

DEFAULT_GUEST: Final = Guest.KRUN_1_18


def check_guest(guest: Guest | str) -> Guest:
    """Return the guest that an argument stands for.

    Args:
        guest: a `Guest`, or the name of a published one.

    Raises:
        InvalidArgumentError: it is neither.
    """
    if isinstance(guest, Guest):
        return guest
    if isinstance(guest, str):
        return Guest.named(guest)
    raise InvalidArgumentError("guest", guest, "must be a Guest or the name of one")
