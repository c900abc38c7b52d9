"""Owns: what the real guest's unpacking needs beyond a well-formed tar. Sans-IO.

Must not know: where the bytes come from.
"""

from __future__ import annotations

from typing import Final

from nitro_vsock.archive.members import BrokenTarError, Flaw, Member, MemberReader
from nitro_vsock.errors import GuestRuleError
from nitro_vsock.protocol import FORBIDDEN_TOP, ROOTFS_PREFIX

_PREFIX: Final = ROOTFS_PREFIX.encode()

_FORBIDDEN: Final = frozenset(name.encode() for name in FORBIDDEN_TOP)


def name_parts(name: bytes) -> list[bytes]:
    """Return a member's name as the file system sees it: neither empty parts nor dots."""
    return [part for part in name.split(b"/") if part not in (b"", b".")]


def name_flaw(name: bytes) -> Flaw | None:
    """Return why a member of this name stops the guest or gets lost; None: it does not."""
    parts = name_parts(name)
    text = name.decode("utf-8", "surrogateescape")
    if name.startswith(b"/") or not parts or parts[0] != _PREFIX or b".." in parts:
        return Flaw("no-prefix", f"member {text!r} is not under {ROOTFS_PREFIX}/")
    if len(parts) > 1 and parts[1] in _FORBIDDEN:
        what = parts[1].decode()
        return Flaw(
            "forbidden-directory", f"member {text!r}: the guest makes {what} itself, and stops"
        )
    return None


class TarChecker:
    """Looks at the headers of a tar that streams past, without keeping its data."""

    def __init__(self) -> None:
        self._reader = MemberReader()

    @property
    def members(self) -> int:
        """How many members there were."""
        return self._reader.members

    def feed(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            GuestRuleError: not a plain tar, or a member the guest cannot unpack.
        """
        try:
            for event in self._reader.feed(data):
                if isinstance(event, Member):
                    _refuse(event)
        except BrokenTarError as error:
            raise GuestRuleError(error.flaw.text) from None

    def finish(self) -> None:
        """Say that the archive is over.

        Raises:
            GuestRuleError: it has no member, or ends inside one.
        """
        try:
            self._reader.finish()
        except BrokenTarError as error:
            raise GuestRuleError(error.flaw.text) from None
        if not self.members:
            raise GuestRuleError("the rootfs has no member")


def _refuse(member: Member) -> None:
    for flaw in (*member.flaws, name_flaw(member.name)):
        if flaw is not None:
            raise GuestRuleError(flaw.text)
