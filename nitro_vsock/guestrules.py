"""Owns: what the real guest needs beyond well-formed frames. Sans-IO.

That is strings it can measure and a tar it can unpack.

Must not know: where the bytes come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nitro_vsock.errors import GuestRuleError
from nitro_vsock.frames import ExecArgv, ExecEnvp, ExecPath
from nitro_vsock.members import BrokenTarError, Flaw, Member, MemberReader
from nitro_vsock.protocol import FORBIDDEN_TOP, MAX_STRING_BYTES, ROOTFS_PREFIX

_PREFIX: Final = ROOTFS_PREFIX.encode()
_FORBIDDEN: Final = frozenset(name.encode() for name in FORBIDDEN_TOP)


def string_flaws(path: ExecPath, argv: ExecArgv, envp: ExecEnvp) -> Iterator[tuple[str, Flaw]]:
    """Yield each string the guest cannot take, by the field's name, and what is wrong with it."""
    named = [("exec_path", path.path)]
    named += [(f"argv[{index}]", string) for index, string in enumerate(argv.strings)]
    named += [(f"envp[{index}]", string) for index, string in enumerate(envp.strings)]
    for name, string in named:
        if not 0 < len(string) <= MAX_STRING_BYTES:
            code = "string-too-long" if string else "string-empty"
            text = f"{name} is {len(string)} bytes, must be 1 to {MAX_STRING_BYTES}"
            yield name, Flaw(code, text)
    if b"/" not in argv.strings[0] and not envp.strings[0].startswith(b"PATH="):
        text = "argv[0] has no slash, and envp[0] is not PATH=: it is not found"
        yield "envp", Flaw("path-not-first", text)


def check_strings(path: ExecPath, argv: ExecArgv, envp: ExecEnvp) -> None:
    """Check the strings together.

    Raises:
        GuestRuleError: an empty string, one the NSM does not take, or a PATH that is not envp[0]
            while argv[0] has no slash.
    """
    for _, flaw in string_flaws(path, argv, envp):
        raise GuestRuleError(flaw.text)


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
