"""Owns: the command `doctor`: what launches can do on this machine.

Must not know: how it is shown.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any, Final

import click

from nitro_vsock.cli.ui import output
from nitro_vsock.cli.ui.failures import ExitCode
from nitro_vsock.cli.ui.options import EPILOG, global_options
from nitro_vsock.core import sockets
from nitro_vsock.protocol import VMADDR_CID_ANY
from nitro_vsock.testing.loopback import RESERVED_PORT, has_vsock, loopback_problem
from nitro_vsock.transport import SEND_BUFFER, FilePayload, choose_strategy


@click.command(epilog=EPILOG)
@global_options
@click.pass_context
def doctor(context: click.Context) -> None:
    """Say what launches can do on this machine.

    Exits with 9 where the kernel has no AF_VSOCK, with 0 elsewhere.
    """
    found, lines = examine()
    output.print_result(context.obj, found, lines)
    context.exit(ExitCode.OK if found["af_vsock"] else ExitCode.UNSUPPORTED)


_ENCLAVES_DEVICE: Final = Path("/dev/nitro_enclaves")


def strategies(family: int) -> dict[str, str]:
    """Return how a regular file and a pipe would be sent over sockets of this family."""
    read_end, write_end = os.pipe()
    try:
        with tempfile.TemporaryFile() as file:
            sources = {"file": file.fileno(), "pipe": read_end}
            return {
                name: choose_strategy(
                    family, FilePayload(fd, 0, 1, os.fstat(fd).st_mode, seekable=name == "file")
                ).value
                for name, fd in sources.items()
            }
    finally:
        os.close(read_end)
        os.close(write_end)


def examine() -> tuple[dict[str, Any], list[str]]:
    """Return what was found, as an object and as lines."""
    found: dict[str, Any] = {
        "kernel": os.uname().release,
        "af_vsock": has_vsock(),
        "loopback_problem": loopback_problem(),
        "local_cid": None,
        "local_cid_problem": None,
        "reserved_ports_problem": _reserved_ports_problem(),
        "nitro_enclaves": _ENCLAVES_DEVICE.exists(),
        "strategies": {
            "vsock": strategies(socket.AF_VSOCK),
            "unix": strategies(socket.AF_UNIX),
        },
        "wmem_max": _wmem_max(),
        "unix_sndbuf": _unix_sndbuf(),
    }
    try:
        found["local_cid"] = _local_cid()
    except OSError as error:
        found["local_cid_problem"] = error.strerror
    return found, _lines(found)


def _local_cid() -> int | None:
    fd = os.open("/dev/vsock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer = fcntl.ioctl(fd, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4))
    finally:
        os.close(fd)
    cid: int = struct.unpack("=I", answer)[0]
    return None if cid == VMADDR_CID_ANY else cid


def _reserved_ports_problem() -> str | None:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((VMADDR_CID_ANY, RESERVED_PORT))
    except OSError as error:
        # The kernel looks at the privilege first.
        return None if error.errno == errno.EADDRINUSE else error.strerror
    return None


def _wmem_max() -> int | None:
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text())
    except OSError:
        return None  # not shown in a container's network namespace


def _unix_sndbuf() -> int:
    """Return what the kernel makes of the send buffer a launch asks for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sockets.enlarge_sndbuf(sock.fileno(), SEND_BUFFER)


def _lines(found: dict[str, Any]) -> list[str]:
    def ways(family: str) -> str:
        return ", ".join(f"{source}: {way}" for source, way in found["strategies"][family].items())

    def answer(problem: str | None, needs: str) -> str:
        return "yes" if problem is None else f"no ({problem}; needs {needs})"

    local_cid = found["local_cid"]
    if local_cid is None:
        local_cid = f"unknown ({found['local_cid_problem'] or 'none assigned'})"
    return [
        f"kernel              {found['kernel']}",
        f"AF_VSOCK            {'yes' if found['af_vsock'] else 'no (needs module vsock)'}",
        f"vsock loopback      {answer(found['loopback_problem'], 'module vsock_loopback')}",
        f"local CID           {local_cid}",
        f"ports up to 1023    {answer(found['reserved_ports_problem'], 'CAP_NET_BIND_SERVICE')}",
        f"{_ENCLAVES_DEVICE} {'yes' if found['nitro_enclaves'] else 'no'}",
        f"strategy, vsock     {ways('vsock')}",
        f"strategy, Unix      {ways('unix')}",
        f"wmem_max            {found['wmem_max'] or 'not shown here'}",
        f"Unix send buffer    {found['unix_sndbuf']} (asked for {SEND_BUFFER}; Linux doubles it)",
    ]
