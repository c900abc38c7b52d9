"""Owns: running passt beside a session. Must not know: what the session does with it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import click

from nitro_vsock.cli.ui.output import print_note

GUEST_NETWORK: Final = ("--address", "172.31.10.83", "--netmask", "24", "--gateway", "172.31.10.1")
"""The address the deployed guest gives itself (its init, `net_tap_afvsock.c`). It takes its own
address for the gateway's and asks for every other one directly; passt answers for all of them."""

_GRACE: Final = 2.0
"""Seconds passt gets to see that its socket has closed."""


@contextmanager
def passt(arguments: Sequence[str]) -> Iterator[socket.socket]:
    """Give a socket to a running passt; it ends with the context, or with this process.

    The guest cannot reach this machine's loopback addresses through it (--no-map-gw).

    Args:
        arguments: passed on to it.

    Raises:
        click.UsageError: it is not installed.
    """
    program = shutil.which("passt")
    if program is None:
        raise click.UsageError("--passt needs the program passt (Debian: apt-get install passt)")
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as said:
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - no shell
                [
                    *(program, "--foreground", "--quiet", "--stderr", "--no-map-gw"),
                    *(*GUEST_NETWORK, "--fd", str(theirs.fileno()), *arguments),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,  # a Ctrl-C is for the program in the enclave
            )
        try:
            yield ours
        finally:
            ours.close()
            _end(process)
            if process.returncode:
                said.seek(0)
                print_note(f"passt ended with exit code {process.returncode}: {_why(said.read())}")


def _why(said: bytes) -> str:
    """Return the first line that is not about the system's log, which containers lack."""
    lines = said.decode("utf-8", "backslashreplace").splitlines()
    return next((line for line in lines if line and "syslog" not in line), "it said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    """See it end: it does by itself where its socket has closed, which the session has seen to."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
