"""Owns: findings: their codes, severities and remedies.

Must not know: how they are found.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Final, NamedTuple

from nitro_vsock.archive import Flaw
from nitro_vsock.check.interpreter import HEAD, MAX_SCRIPTS

MAX_FINDINGS: Final = 10_000


class Severity(str, Enum):
    """How sure it is that the launch fails."""

    ERROR = "error"
    WARNING = "warning"

    def __str__(self) -> str:
        return self.value


class Rule(NamedTuple):
    """What a code stands for.

    Attributes:
        severity: of its findings.
        meaning: when it is found.
        remedy: what to do about it.
    """

    severity: Severity
    meaning: str
    remedy: str


_E, _W = Severity.ERROR, Severity.WARNING

CODES: Final[dict[str, Rule]] = {
    "string-empty": Rule(
        _W,
        "exec_path, or a string of argv or envp, is empty: what the guest makes of it is unknown",
        "leave it out",
    ),
    "string-too-long": Rule(
        _E,
        "a string is longer than the Nitro Secure Module measures with one request",
        "shorten it, or put it into a file of the rootfs",
    ),
    "path-not-first": Rule(
        _E,
        "argv[0] has no slash and envp[0] is not PATH=: the guest looks nowhere for the program",
        "give argv[0] with its directory, or make PATH the first variable",
    ),
    "program-missing": Rule(
        _E, "argv[0] is not in the rootfs", "add the program, or correct argv[0]"
    ),
    "program-not-executable": Rule(
        _E,
        "argv[0] is no file, or a file that nobody may execute",
        "chmod +x it before it is packed",
    ),
    "exec-format": Rule(
        _E,
        "the program, or its interpreter, is neither an ELF program nor a script that begins "
        "with #!",
        "begin a script with #! and its interpreter",
    ),
    "wrong-machine": Rule(
        _E,
        "the program, or its interpreter, is built for another processor than this host's",
        "build the rootfs for the host's processor",
    ),
    "interpreter-missing": Rule(
        _E,
        "the interpreter that a script names with #!, or the program loader that an ELF program "
        "names, is not in the rootfs",
        "add it, or link the program statically",
    ),
    "interpreter-not-executable": Rule(
        _E,
        "the interpreter or program loader is no file, or nobody may execute it",
        "chmod +x it before it is packed",
    ),
    "too-many-interpreters": Rule(
        _E,
        f"more than {MAX_SCRIPTS} scripts are each other's interpreters",
        "name a program with #!, not a script",
    ),
    "interpreter-unknown": Rule(
        _W,
        f"the name of an ELF program's loader lies past its first {HEAD} bytes: not checked",
        "see that the loader is in the rootfs (readelf -l)",
    ),
    "exec-path-missing": Rule(
        _W,
        "exec_path differs from argv[0] and is not in the rootfs: it is only measured, but then "
        "the measurement names a program that is not there",
        "give the path of the program that argv[0] runs",
    ),
    "too-little-memory": Rule(
        _E,
        "the enclave's memory is less than the archive and the unpacked tree take together",
        "give the enclave more memory, or leave files out",
    ),
    "compressed": Rule(_E, "the archive is compressed", "decompress it"),
    "not-a-tar": Rule(
        _E,
        "the rootfs does not begin with a tar header",
        "give a plain tar, or a directory",
    ),
    "no-member": Rule(_E, "the archive is empty", "pack the tree again"),
    "truncated": Rule(_E, "the archive ends inside a member", "copy or pack it again, whole"),
    "bad-header": Rule(
        _E,
        "a header that libarchive refuses or warns about; the guest stops at warnings too",
        "pack the tree in GNU format",
    ),
    "pax-non-ascii": Rule(
        _E,
        "a PAX header with a name that is not ASCII: the guest has no locale to convert it",
        "pack the tree in GNU format",
    ),
    "no-prefix": Rule(
        _E, "a member is not under rootfs/", "pack it under rootfs/, or use Rootfs.from_tar"
    ),
    "forbidden-directory": Rule(
        _E,
        "a member is, or lies in, a directory that the guest makes itself (dev, proc, run, sys, "
        "tmp), and stops where it exists",
        "leave it out; Rootfs.from_tar and Rootfs.from_directory do",
    ),
    "root-not-a-directory": Rule(
        _E, "the member rootfs is no directory", "make it a directory, or leave it out"
    ),
    "link-target-missing": Rule(
        _E,
        "a hard link's target is no file before it in the archive",
        "pack the target first",
    ),
    "through-symlink": Rule(
        _E,
        "a member's directory is a symbolic link that does not lead to a directory of the rootfs "
        "while it is unpacked: absolute ones lead into the guest's own files",
        "pack it under the directory's real name",
    ),
    "duplicate-member": Rule(
        _W,
        "a name comes twice: the later replaces the earlier, but both are measured",
        "pack it once",
    ),
    "read-once": Rule(
        _W,
        "the rootfs is a pipe: what is in it can be read once, by the guest",
        "check the archive before it goes into the pipe",
    ),
    "unreadable": Rule(_E, "the rootfs cannot be read", "see the reason"),
    "too-many-findings": Rule(
        _E,
        f"more than {MAX_FINDINGS:,} findings; the rest is only counted (an error where one of "
        "those left out is)",
        "correct these first",
    ),
}
"""Every code there is; docs/rootfs.md has the same."""


@dataclass(frozen=True)
class Finding:
    """One thing the guest would fail on, or may.

    Attributes:
        code: stable, for programs; a key of CODES.
        severity: an error stops the launch; a warning may not.
        subject: the member, or the argument of the writer.
        reason: why the guest would fail.
        remedy: what to do.
    """

    code: str
    severity: Severity
    subject: str
    reason: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """Return it with plain types only, as JSON wants it."""
        return {**asdict(self), "severity": self.severity.value}

    def __str__(self) -> str:
        return f"{self.severity}: {self.code}: {self.subject}: {self.reason}; {self.remedy}"


class Findings:
    """Collects up to MAX_FINDINGS, and counts the rest."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._left_out = 0
        self._worst = Severity.WARNING

    def add(self, subject: str, flaw: Flaw) -> None:
        """Take a flaw of a member or an argument."""
        rule = CODES[flaw.code]
        self._take(Finding(flaw.code, rule.severity, subject, flaw.text, rule.remedy))

    def extend(self, others: Findings) -> None:
        """Take what others have collected."""
        for finding in others._found:
            self._take(finding)
        self._left_out += others._left_out
        if others._worst is Severity.ERROR:
            self._worst = Severity.ERROR

    def _take(self, finding: Finding) -> None:
        if len(self._found) < MAX_FINDINGS:
            self._found.append(finding)
            return
        self._left_out += 1
        if finding.severity is Severity.ERROR:
            self._worst = Severity.ERROR

    def all(self) -> tuple[Finding, ...]:
        """Return them, and how many were left out."""
        if not self._left_out:
            return tuple(self._found)
        code = "too-many-findings"
        text = f"{self._left_out:,} findings more are left out"
        return (*self._found, Finding(code, self._worst, "rootfs", text, CODES[code].remedy))
