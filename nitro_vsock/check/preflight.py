"""Owns: what the guest would fail on, told before it boots: findings, and the tree they come from.

Must not know: sockets, how an archive is parsed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Final, TypeVar

from nitro_vsock.archive import (
    BLOCK,
    BrokenTarError,
    Data,
    Flaw,
    Kind,
    Member,
    MemberReader,
    Node,
    Tree,
    compression,
    name_flaw,
    name_parts,
)
from nitro_vsock.check.findings import Finding, Findings
from nitro_vsock.check.interpreter import HEAD, NEITHER, Format, Programs, may_run, recognise
from nitro_vsock.check.strings import string_flaws
from nitro_vsock.errors import ArchiveError, InvalidArgumentError, SourceError, require_int
from nitro_vsock.rootfs import OpenRootfs, Rootfs
from nitro_vsock.transport import FilePayload
from nitro_vsock.wire import EnclaveArg, ExecArgv, ExecEnvp, ExecPath


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_MAGIC: Final = 6
"""Bytes that tell what an archive is compressed with."""

_PAGE: Final = 4096

_INODE: Final = 1024
"""Bytes the guest's kernel takes for a member beside its data, about."""

_MEMORY_MAX: Final = (1 << 63) - 1


def preflight(
    args: Sequence[EnclaveArg],
    rootfs: Rootfs,
    memory_bytes: int | None = None,
    *,
    machine: str | None = None,
) -> tuple[Finding, ...]:
    """Return everything that the guest would fail on, or may; MAX_FINDINGS at most, and one more.

    The archive is read once, from its start to its end. A part of it that cannot be read is a
    finding, and what came before is looked at all the same.

    Args:
        args: frames of the launch, the strings among them.
        rootfs: of the launch.
        memory_bytes: of the enclave; not checked where it is left out.
        machine: what the enclave runs on, as `os.uname().machine` says it; this host by default.

    Raises:
        InvalidArgumentError: a memory_bytes that is no number of bytes.
    """
    if memory_bytes is not None:
        require_int("memory_bytes", memory_bytes, 1, _MEMORY_MAX)
    findings = Findings()
    path, argv, envp = _strings(args)
    for subject, flaw in string_flaws(path, argv, envp):
        findings.add(subject, flaw)
    survey = _Survey()
    survey.read(rootfs)
    if survey.tree is not None:
        programs = Programs(
            survey.tree, survey.formats, os.uname().machine if machine is None else machine
        )
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


def quick_preflight(args: Sequence[EnclaveArg], source: OpenRootfs) -> tuple[Finding, ...]:
    """Return what shows without reading the archive: the strings, and a file's first header.

    Memory is not looked at: it may be a mapping of a file that has shrunk since. Neither is what
    cannot be read twice, nor a plan, which is an archive of our own making.

    Args:
        args: frames of the launch, the strings among them.
        source: its rootfs, open.
    """
    findings = Findings()
    for subject, flaw in string_flaws(*_strings(args)):
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


def _strings(args: Sequence[EnclaveArg]) -> tuple[ExecPath, ExecArgv, ExecEnvp]:
    return _only(args, ExecPath), _only(args, ExecArgv), _only(args, ExecEnvp)


_Arg = TypeVar("_Arg", bound=EnclaveArg)


def _only(args: Sequence[EnclaveArg], kind: type[_Arg]) -> _Arg:
    return next(arg for arg in args if isinstance(arg, kind))


_MISSING: Final = frozenset({"program-missing", "interpreter-missing", "exec-path-missing"})


class _Survey:
    """What a look through the whole archive shows.

    Attributes:
        findings: of its members.
        length: of the archive, in bytes.
        memory: what archive and unpacked tree take, in bytes.
        formats: of the files that may run.
        tree: None where the archive was not looked at.
        whole: it was read to its end.
    """

    def __init__(self) -> None:
        self.findings = Findings()
        self.length = 0
        self.memory = 0
        self.tree: Tree | None = None
        self.whole = False
        self._node: Node | None = None
        self._head = b""
        self.formats: dict[Node, Format] = {}
        self._shared: dict[Format, Format] = {}

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
            if found is not NEITHER:
                self.formats[self._node] = self._shared.setdefault(found, found)
            self._node = None


def _refuse_compressed(head: bytes) -> None:
    found = compression(head)
    if found is not None:
        kind, command = found
        raise BrokenTarError("compressed", f"the archive is {kind}: run `{command}` first")
