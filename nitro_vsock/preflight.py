"""Owns: what the guest would fail on, told before it boots: findings, and the tree they come from.

Must not know: sockets, how an archive is parsed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from nitro_vsock.errors import ArchiveError, InvalidArgumentError, SourceError, require_int
from nitro_vsock.frames import EnclaveArg, ExecArgv, ExecEnvp, ExecPath
from nitro_vsock.guestrules import name_flaw, name_parts, string_flaws
from nitro_vsock.guesttree import (
    HEAD,
    MAX_SCRIPTS,
    NEITHER,
    Format,
    Node,
    Programs,
    Tree,
    may_run,
    recognise,
)
from nitro_vsock.members import BLOCK, BrokenTarError, Data, Flaw, Kind, Member, MemberReader
from nitro_vsock.sources import OpenRootfs, Rootfs, compression
from nitro_vsock.transport import FilePayload

if TYPE_CHECKING:
    from nitro_vsock.writer import EnclaveArgsWriter

MAX_FINDINGS: Final = 10_000

_MAGIC: Final = 6
"""Bytes that tell what an archive is compressed with."""
_PAGE: Final = 4096
_INODE: Final = 1024
"""Bytes the guest's kernel takes for a member beside its data, about."""
_MEMORY_MAX: Final = (1 << 63) - 1


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


def preflight(
    writer: EnclaveArgsWriter, memory_bytes: int | None = None, *, machine: str | None = None
) -> tuple[Finding, ...]:
    """Return everything that the guest would fail on, or may; MAX_FINDINGS at most, and one more.

    The archive is read once, from its start to its end. A part of it that cannot be read is a
    finding, and what came before is looked at all the same.

    Args:
        writer: the launch.
        memory_bytes: of the enclave; not checked where it is left out.
        machine: what the enclave runs on, as `os.uname().machine` says it; this host by default.

    Raises:
        InvalidArgumentError: a memory_bytes that is no number of bytes.
    """
    if memory_bytes is not None:
        require_int("memory_bytes", memory_bytes, 1, _MEMORY_MAX)
    findings = _Findings()
    path, argv, envp = _strings(writer.args)
    for subject, flaw in string_flaws(path, argv, envp):
        findings.add(subject, flaw)
    survey = _Survey()
    survey.read(writer.rootfs)
    if survey.tree is not None:
        programs = Programs(survey.tree, os.uname().machine if machine is None else machine)
        for subject, flaw in programs.flaws(path.path, argv.strings[0], envp.strings[0]):
            # What is missing may be in the part that was not read.
            if survey.whole or flaw.code not in _MISSING:
                findings.add(subject, flaw)
    if memory_bytes is not None and memory_bytes < survey.memory:
        text = (
            f"the archive ({survey.length:,} bytes) and the unpacked tree take {survey.memory:,} "
            f"bytes, and the kernel and the program more; the enclave has {memory_bytes:,}"
        )
        findings.add("memory_bytes", Flaw("too-little-memory", text))
    findings.extend(survey.findings)
    return findings.all()


def quick_preflight(writer: EnclaveArgsWriter, source: OpenRootfs) -> tuple[Finding, ...]:
    """Return what shows without reading the archive: the strings, and a file's first header.

    Memory is not looked at: it may be a mapping of a file that has shrunk since. Neither is what
    cannot be read twice, nor a plan, which is an archive of our own making.

    Args:
        writer: the launch.
        source: its rootfs, open.
    """
    findings = _Findings()
    for subject, flaw in string_flaws(*_strings(writer.args)):
        findings.add(subject, flaw)
    payload = source.payload
    if isinstance(payload, FilePayload) and stat.S_ISREG(payload.mode):
        try:
            head = os.pread(payload.fd, BLOCK, payload.offset)
            for _ in MemberReader().feed(head):
                break
        except BrokenTarError as error:
            findings.add("rootfs", error.flaw)
        except OSError:
            # An O_DIRECT descriptor wants aligned memory. What is really wrong shows when it is
            # sent.
            pass
    return findings.all()


def _strings(args: tuple[EnclaveArg, ...]) -> tuple[ExecPath, ExecArgv, ExecEnvp]:
    return _only(args, ExecPath), _only(args, ExecArgv), _only(args, ExecEnvp)


_Arg = TypeVar("_Arg", bound=EnclaveArg)


def _only(args: tuple[EnclaveArg, ...], kind: type[_Arg]) -> _Arg:
    return next(arg for arg in args if isinstance(arg, kind))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_MISSING: Final = frozenset({"program-missing", "interpreter-missing", "exec-path-missing"})


class _Findings:
    """Collects up to MAX_FINDINGS, and counts the rest."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._left_out = 0
        self._worst = Severity.WARNING

    def add(self, subject: str, flaw: Flaw) -> None:
        rule = CODES[flaw.code]
        self._take(Finding(flaw.code, rule.severity, subject, flaw.text, rule.remedy))

    def extend(self, others: _Findings) -> None:
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
        if not self._left_out:
            return tuple(self._found)
        code = "too-many-findings"
        text = f"{self._left_out:,} findings more are left out"
        return (*self._found, Finding(code, self._worst, "rootfs", text, CODES[code].remedy))


class _Survey:
    """What a look through the whole archive shows.

    Attributes:
        findings: of its members.
        length: of the archive, in bytes.
        memory: what archive and unpacked tree take, in bytes.
        tree: None where the archive was not looked at.
        whole: it was read to its end.
    """

    def __init__(self) -> None:
        self.findings = _Findings()
        self.length = 0
        self.memory = 0
        self.tree: Tree | None = None
        self.whole = False
        self._node: Node | None = None
        self._head = b""
        self._formats: dict[Format, Format] = {NEITHER: NEITHER}

    def read(self, rootfs: Rootfs) -> None:
        """Look at all of it; what fails is a finding."""
        try:
            source = rootfs.open()
        except (InvalidArgumentError, SourceError) as error:
            code, text = "unreadable", str(error)
            if isinstance(error, ArchiveError):
                code = "bad-header"
            elif isinstance(error, InvalidArgumentError) and error.code:
                code, text = error.code, f"{rootfs.name} {error.limit}"
            self.findings.add("rootfs", Flaw(code, text))
            return
        try:
            self.length = source.length
            self.memory = 2 * self.length
            payload = source.payload
            if isinstance(payload, FilePayload) and not payload.seekable:
                text = f"{source.name} can be read once, by the guest; it was not looked at"
                self.findings.add("rootfs", Flaw("read-once", text))
                return
            self._read(source)
        except BrokenTarError as error:
            self.findings.add("rootfs", error.flaw)
        except SourceError as error:
            self.findings.add("rootfs", Flaw("unreadable", str(error)))
        finally:
            source.close()

    def _read(self, source: OpenRootfs) -> None:
        self.tree = Tree()
        reader = MemberReader()
        unpacked = data = 0
        first = True
        for chunk in source.chunks():
            if first:
                _refuse_compressed(bytes(chunk[:_MAGIC]))
                first = False
            for event in reader.feed(chunk):
                if isinstance(event, Data):
                    data += len(event.view)
                    if self._node is not None:
                        self._look(event)
                else:
                    # A file's data begins a page of its own.
                    unpacked += -(-data // _PAGE) * _PAGE + _INODE
                    data = 0
                    self._add(event)
        self.memory = self.length + unpacked + -(-data // _PAGE) * _PAGE
        reader.finish()
        if not reader.members:
            raise BrokenTarError("no-member", "the rootfs has no member")
        self.whole = True

    def _add(self, member: Member) -> None:
        assert self.tree is not None  # noqa: S101 - _read made it
        self._node, self._head = None, b""
        name = _text(member.name) or "a member without a name"
        for warning in member.flaws:
            self.findings.add(name, warning)
        flaw = name_flaw(member.name)
        if flaw is None:
            node, flaw = self.tree.add(member, name_parts(member.name)[1:])
            if member.kind is Kind.FILE:
                self._node = node
        if flaw is not None:
            self.findings.add(name, flaw)

    def _look(self, data: Data) -> None:
        """Take a piece of the first run of a file, until its head is there."""
        assert self._node is not None  # noqa: S101 - the caller looked
        self._head += data.view[: HEAD - len(self._head)]
        if len(self._head) == HEAD or data.last or not may_run(self._head):
            found = recognise(self._head)
            self._node.format = self._formats.setdefault(found, found)
            self._node = None


def _refuse_compressed(head: bytes) -> None:
    found = compression(head)
    if found is not None:
        kind, command = found
        raise BrokenTarError("compressed", f"the archive is {kind}: run `{command}` first")
