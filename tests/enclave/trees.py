"""Owns: archives and launches for the emulated enclave, and asking a guest that judges.

Must not know: what is expected of them.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Any

from enclave.bed import Machine

from nitro_vsock import EnclaveArgsWriter, EnclaveSession, NitroVsockError, OutputProxy, Rootfs

PROBE = "/bin/probe"
ENVIRONMENT = {"PATH": "/bin"}


def writer_of(rootfs: Rootfs, *argv: str, output: Any = None, **options: Any) -> EnclaveArgsWriter:
    """Return a launch that runs the probe with these arguments."""
    proxies = [] if output is None else [OutputProxy(output)]
    proxies += options.pop("proxies", [])
    options.setdefault("exec_path", PROBE)
    options.setdefault("envp", ENVIRONMENT)
    return EnclaveArgsWriter(rootfs, argv=[PROBE, *argv], proxies=proxies, **options)


def launch(machine: Machine, writer: EnclaveArgsWriter, boot: str = "", **options: Any) -> Any:
    """Be the host of one whole life of the machine; return the program's status."""
    nsm, memory = options.pop("nsm", True), options.pop("memory", "1G")
    with EnclaveSession(writer, machine.cid, **machine.host_options, **options) as session:
        machine.boot(boot, nsm=nsm, memory=memory)
        return session.run_sync(enclave_fd=machine.fileno())


@dataclass
class Outcome:
    """How a launch went: in the guest's words, and in the host's."""

    verdict: str
    status: Any
    error: NitroVsockError | None
    output: bytes

    @property
    def ran(self) -> bool:
        """Whether the program ran to its end."""
        return self.verdict.startswith("ran")


class Judge:
    """A guest that takes launch after launch."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def try_out(self, writer: EnclaveArgsWriter, **options: Any) -> Outcome:
        """Let it take a launch, whatever preflight thinks of it."""
        options.setdefault("preflight", False)
        status, error = None, None
        with EnclaveSession(
            writer, self.machine.cid, **self.machine.host_options, **options
        ) as session:
            with self.machine.poke() as asked:
                try:
                    # The guest's end of this connection hangs up when its life is over.
                    status = session.run_sync(enclave_fd=asked.fileno())
                except NitroVsockError as caught:
                    error = caught
                session.close()
                verdict = b""
                while True:
                    got = asked.recv(4096)
                    if not got:
                        break
                    verdict += got
        return Outcome(verdict.decode().strip(), status, error, b"")

    def run(self, rootfs: Rootfs, *argv: str, **options: Any) -> Outcome:
        """Run the probe with these arguments, its output kept."""
        output = io.BytesIO()
        outcome = self.try_out(writer_of(rootfs, *argv, output=output, **options))
        outcome.output = output.getvalue()
        return outcome


class Tar:
    """Makes an archive, member by member, under rootfs/."""

    def __init__(self, probe: bytes | None = None, form: int = tarfile.GNU_FORMAT) -> None:
        """`probe`: goes to rootfs/bin/probe."""
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=form)
        if probe is not None:
            self.add("bin/probe", probe, 0o755)

    def add(self, name: str, data: bytes = b"", mode: int = 0o644, **changes: Any) -> Tar:
        """Add a file, or what `type` says."""
        prefix = changes.pop("prefix", "rootfs/")
        member = tarfile.TarInfo(f"{prefix}{name}")
        member.mode, member.size = mode, len(data)
        for attribute, value in changes.items():
            setattr(member, attribute, value)
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def link(self, name: str, target: str) -> Tar:
        """Add a symbolic link."""
        return self.add(name, type=tarfile.SYMTYPE, linkname=target)

    def hard(self, name: str, target: str) -> Tar:
        """Add a hard link."""
        return self.add(name, type=tarfile.LNKTYPE, linkname=f"rootfs/{target}")

    def folder(self, name: str, mode: int = 0o755) -> Tar:
        """Add a directory."""
        return self.add(name, mode=mode, type=tarfile.DIRTYPE)

    def raw(self, data: bytes) -> Tar:
        """Add blocks as they are."""
        self._buffer.write(data)
        self._tar.offset += len(data)
        return self

    def unfinished(self) -> bytes:
        """Return it without its end."""
        return self._buffer.getvalue()

    def bytes(self) -> bytes:
        """Return the archive."""
        self._tar.close()
        return self._buffer.getvalue()


def block(name: bytes, kind: bytes = b"0", size: int = 0, **fields: bytes) -> bytes:
    """Return a header with a right checksum, its fields as bytes where they are given."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[108:116], head[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    head[124:136] = b"%011o\0" % size
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    places = {"mode": 100, "uid": 108, "gid": 116, "size_field": 124, "mtime": 136, "link": 157}
    places |= {"magic": 257, "uname": 265, "gname": 297, "major": 329, "minor": 337, "up": 345}
    checksum = fields.pop("checksum", None)
    for field, value in fields.items():
        head[places[field] : places[field] + len(value)] = value
    head[148:156] = b" " * 8
    head[148:156] = checksum or b"%06o\0 " % sum(head)
    return bytes(head)


def padded(data: bytes) -> bytes:
    """Return data as it stands in an archive."""
    return data + bytes(-len(data) % 512)


def pax(key: bytes, value: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header of one record."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    text = b"%d" % length + body
    return block(b"PaxHeaders/x", kind, len(text)) + padded(text)
