"""Owns: what every benchmark needs: archives, compiled peers, addresses, the reader, the entrants.

Must not know: which figures are made of them.
"""

import json
import os
import shutil
import socket
import subprocess
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nitro_vsock.cli.compare import contest, senders
from nitro_vsock.cli.compare.contest import Entrant
from nitro_vsock.testing import child

PEERS = Path(__file__).resolve().parent / "peers"
GUEST = PEERS.parent.parent / "tests" / "support" / "guest" / "guest.c"
PORT = 2017
MIB = 1 << 20
GIB = 1 << 30

OURS = "nitro_vsock"
CEILING = "ceiling: sendfile"
RESIDENT = "ceiling: resident memory"
ZEROCOPY = "ceiling: MSG_ZEROCOPY"
REFERENCE = "reference way"
STANDARD = ("socket.sendfile", "read+sendall")
SOCAT = "socat"


@dataclass(frozen=True)
class Archive:
    """A file of bytes that stand for an archive.

    `wire` is the whole stream in one file, for socat, which can send but one.
    """

    path: Path
    size: int
    crc: int
    head: Path
    wire: Path | None

    @property
    def received(self):
        """Bytes that a reader counts: all but the ready byte."""
        return len(senders.head(self.size)) - 1 + self.size + len(senders.TAIL)


def make_archive(folder, size, *, wire):
    """Write an archive in which no two MiB are alike."""
    path = folder / f"archive-{size}"
    block = bytearray(os.urandom(min(size, MIB)))
    crc = 0
    with path.open("wb") as file:
        for number in range(size // len(block)):
            block[:8] = number.to_bytes(8, "big")
            crc = zlib.crc32(block, crc)
            file.write(block)
        file.flush()
        os.fdatasync(file.fileno())
    head = folder / f"head-{size}"
    head.write_bytes(senders.head(size))
    whole = folder / f"wire-{size}" if wire else None
    if whole:
        with whole.open("wb") as out, path.open("rb") as file:
            out.write(senders.head(size))
            shutil.copyfileobj(file, out, MIB)
            out.write(senders.TAIL)
    return Archive(path, path.stat().st_size, crc, head, whole)


def compile_tools(folder):
    """Compile the guest and the peers; return their folder and the reference's language."""

    def build(*command):
        subprocess.run([str(part) for part in command], check=True)

    gcc = ("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2")
    build("gcc", "-std=c11", "-O2", GUEST, "-o", folder / "guest", "-lz")
    for name in ("ceiling", "meter", "traffic"):
        build(*gcc, PEERS / f"{name}.c", "-o", folder / name)
    if shutil.which("rustc"):
        for name in ("reference", "net_reference"):
            build("rustc", "--edition=2021", "-O", "-o", folder / name, PEERS / f"{name}.rs")
        return "Rust"
    for name in ("reference", "net_reference"):
        build(*gcc, "-pthread", PEERS / f"{name}.c", "-o", folder / name)
    return "C"


def compile_tree_reference(folder):
    """Compile what the reference crate does with a directory; None without cargo and its crates."""
    source = folder / "tree_reference"  # a copy: cargo writes beside its manifest
    source.mkdir()
    for path in (PEERS / "Cargo.toml", *PEERS.glob("*.rs")):
        shutil.copy(path, source)
    manifest = ("--quiet", "--manifest-path", str(source / "Cargo.toml"))
    if shutil.which("cargo") is None or subprocess.run(["cargo", "fetch", *manifest]).returncode:
        return None
    target = folder / "cargo"
    subprocess.run(
        ["cargo", "build", "--release", "--offline", *manifest, "--target-dir", target], check=True
    )
    return target / "release" / "tree_reference"


@dataclass
class Arena:
    """A transport with everything that runs over it."""

    transport: str  # "unix" or "vsock"
    folder: Path
    strategy: str = "auto"
    archives: dict = field(default_factory=dict)

    @cached_property
    def language(self):
        """What the reference's stand-in is written in."""
        return compile_tools(self.folder)

    def address_at(self, port):
        """Return where a sender listens."""
        if self.transport == "unix":
            return f"unix:{self.folder / 'v.sock'}_{port}"
        return f"vsock:{senders.protocol.VMADDR_CID_ANY}:{port}"

    @property
    def address(self):
        """Where a sender listens that is alone."""
        return self.address_at(PORT)

    def archive(self, size, *, wire=True):
        """Return an archive of this size, made once and kept."""
        if size not in self.archives:
            self.archives[size] = make_archive(self.folder, size, wire=wire)
        return self.archives[size]

    def forget(self, size):
        """Remove an archive, which takes twice its size of disk and page cache."""
        archive = self.archives.pop(size)
        for path in (archive.path, archive.head, archive.wire):
            if path:
                path.unlink()

    def guest(self, *options, port=PORT):
        """Return the command of a guest that connects as soon as somebody listens."""
        assert self.language  # compiles the guest
        kind, _, where = self.address_at(port).partition(":")
        where = f"--unix={where}" if kind == "unix" else f"--port={port}"
        return [str(self.folder / "guest"), where, *options]

    def reader(self, *options):
        """Return the same for one launch at its time: it waits for a byte before it connects."""
        return self.guest("--told", *options)

    def ours(self, archive, strategy=None):
        """Return the package as an entrant."""
        name = OURS if strategy is None else f"{OURS}: {strategy}"
        return Entrant(name, self._python(strategy or self.strategy, archive.path))

    def _python(self, name, path):
        return child.python_command(
            "nitro_vsock.cli.compare.senders", name, self.address, str(path)
        )

    def metered(self, name, *args):
        """Return the command of a peer that does not say itself what it took."""
        assert self.language  # compiles the meter
        return [str(self.folder / "meter"), str(name), *map(str, args)]

    def reference(self, program, path):
        """Return the command of a stand-in for the reference, which packs or reads `path` first."""
        texts = [text.decode() for text in (*senders.ARGV, *senders.ENVP)]
        where = (self.address, senders.EXEC_PATH.decode(), path)
        return self.metered(program, *where, len(senders.ARGV), *texts)

    def peers(self, archive):
        """Return whom we are compared with."""
        for name in STANDARD:
            yield Entrant(name, self._python(name, archive.path))
        yield Entrant(REFERENCE, self.reference(self.folder / "reference", archive.path))
        if archive.wire and shutil.which("socat"):
            listener = self.address.removeprefix("unix:")
            listener = (
                f"UNIX-LISTEN:{listener}" if self.transport == "unix" else f"VSOCK-LISTEN:{PORT}"
            )
            command = ("socat", "-u", "-b", MIB, f"OPEN:{archive.wire}", listener)
            yield Entrant(SOCAT, self.metered(*command))

    def ceilings(self, archive):
        """Return what the kernel gives at most."""
        modes = {CEILING: "sendfile", RESIDENT: "resident"}
        if self.transport == "vsock" and kernel() >= (6, 7):
            modes[ZEROCOPY] = "zerocopy"
        for name, mode in modes.items():
            args = (mode, self.address, archive.head, archive.path)
            yield Entrant(name, self.metered(self.folder / "ceiling", *args))

    def check_bytes(self, entrant, archive):
        """Let the guest compute the digest of what an entrant sends, once, untimed."""
        contest.launch(
            entrant.command,
            self.reader("--drain", "--digest"),
            {"received": archive.received, "rootfs_crc": archive.crc, "ok": True},
        )

    def launch(self, entrant, archive, *reader_options):
        """Do one timed launch, every byte counted."""
        return contest.launch(
            entrant.command,
            self.reader(*(reader_options or ["--drain"])),
            {"received": archive.received, "rootfs_bytes": archive.size, "ok": True},
        )


def drop_cache(path):
    """Remove a file from page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def kernel():
    """Return the running kernel's major and minor number."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def loopback_answers():
    """Return whether CID 1 answers on this kernel."""
    from nitro_vsock.testing.loopback import loopback_problem

    return hasattr(socket, "AF_VSOCK") and loopback_problem() is None


def read_lines(text):
    """Return the JSON objects of a text, one a line."""
    return [json.loads(line) for line in text.splitlines()]
