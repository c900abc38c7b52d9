"""Owns: a launch with a tree that Python's tarfile packs: as a stream, or whole in memory first.

    tarfile_peer.py stream ADDRESS TREE LENGTH
    tarfile_peer.py memory ADDRESS TREE
    tarfile_peer.py pack TREE

It says "ready", waits for a line, does its one launch and prints a line of JSON. `memory` does what
a launcher on the reference crate does (the archive built in memory, then one write of it) with the
tar library of this language, since the reference's is Rust's. A stream's length must be known
before its first byte: `pack` writes the archive to standard output, to be counted.

Must not know: how the package makes an archive.
"""

import io
import json
import resource
import socket
import sys
import tarfile
from pathlib import Path

from nitro_vsock.cli.compare import senders
from nitro_vsock.cli.compare.memory import PeakMemory


def pack(tree, out, mode):
    """Write the archive of a tree."""
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree, "rootfs")


def take_guest(address):
    """Return the connection of the one guest that comes."""
    family, where = senders.parse_address(address)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(where)
        listener.listen(1)
        guest, _ = listener.accept()
    if isinstance(where, str):
        Path(where).unlink()
    guest.recv(1)
    return guest


def stream(address, tree, length):
    """Pack into the socket."""
    with take_guest(address) as guest:
        guest.sendall(senders.head(int(length)))
        with guest.makefile("wb") as out:
            pack(tree, out, "w|")
        guest.sendall(senders.TAIL)
        guest.recv(1)  # its end of stream


def memory(address, tree):
    """Pack into memory, then send that."""
    out = io.BytesIO()
    pack(tree, out, "w")
    archive = out.getbuffer()
    with take_guest(address) as guest:
        guest.sendall(senders.head(len(archive)))
        guest.sendall(archive)
        guest.sendall(senders.TAIL)
        guest.recv(1)


def main(mode, *args):
    """Do what the module says."""
    if mode == "pack":
        pack(*args, sys.stdout.buffer, "w|")
        return
    print("ready", flush=True)
    sys.stdin.readline()
    peak = PeakMemory()
    before = resource.getrusage(resource.RUSAGE_SELF)
    {"stream": stream, "memory": memory}[mode](*args)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"cpu": cpu, "peak": peak.measure()["peak"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
