"""Owns: the emulator's end of its helper process: start, requests, the end of everything in it.

Must not know: sockets' addresses, what the guest does when.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from nitro_vsock import errors
from nitro_vsock.testing import control
from nitro_vsock.testing.child import python_command, start
from nitro_vsock.testing.unpack import remove_tree

_GRACE: Final = 30.0
"""Seconds for the helper to kill and to clear away; it has nothing else to wait for."""

Wait = Callable[[int], object]
"""Returns when a descriptor is readable, or raises what ends the guest."""


class Sandbox:
    """A helper process, and through it the program. Used by one thread.

    Attributes:
        isolation: what it turned out to be; None before `ready`.
    """

    def __init__(self, folder: str, root: str, isolation: str, *, temporary: bool) -> None:
        """Start the helper.

        Args:
            folder: where the archive is unpacked; it exists and is empty.
            root: the program's root below it.
            isolation: "auto", "namespaces" or "plain".
            temporary: remove the folder at the end, whatever becomes of this process.
        """
        self.isolation: str | None = None
        self._folder = folder
        self._temporary = temporary
        self._ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = start(
                    python_command("nitro_vsock.testing._init", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is the emulator's
                )
            except BaseException:
                self._ours.close()
                raise
        setup = {"isolation": isolation, "folder": folder, "root": root, "temporary": temporary}
        control.send(self._ours, setup)

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to `receive`."""
        return self._ours.fileno()

    def ready(self, wait: Wait) -> str:
        """Return the isolation once it is known.

        Raises:
            UnsupportedError: the one that is wanted cannot be had here.
        """
        self.isolation = str(self._expect("ready", wait)["isolation"])
        return self.isolation

    def unpack(self, archive: int, wait: Wait, *, tun: bool) -> list[str]:
        """Unpack, make and mount what a guest does; return what is not as in a guest.

        Raises:
            GuestRuleError: the guest would have stopped here.
        """
        self._send({"op": "unpack", "tun": tun}, [archive])
        return list(self._expect("unpacked", wait)["notes"])

    def connect_net(self, sock: socket.socket, mtu: int, wait: Wait) -> bool:
        """Relay frames from now on; return whether there is a device they come from.

        Raises:
            UnsupportedError: no tap device can be made here.
        """
        self._send({"op": "net", "mtu": mtu}, [sock.fileno()])
        return bool(self._expect("connected", wait)["tap"])

    def run(self, argv: Sequence[str], envp: Sequence[str], output: int | None, wait: Wait) -> None:
        """Run the program; `output` becomes its stdout and stderr, None throws that away."""
        message = {"op": "run", "argv": list(argv), "envp": list(envp)}
        self._send(message, [] if output is None else [output])
        self._expect("running", wait)

    def signal(self, number: int) -> None:
        """Forward a signal; "signalled" or an earlier "exited" is to be received."""
        self._send({"op": "signal", "number": number})

    def close_net(self) -> None:
        """Stop relaying frames; "closed" is to be received, an "exited" may come before it."""
        self._send({"op": "close net"})

    def receive(self) -> dict[str, Any]:
        """Return the next event.

        Raises:
            GuestRuleError, UnsupportedError: something did not work.
            NitroVsockError: the helper is gone.
        """
        try:
            event, fds = control.receive(self._ours)
        except EOFError:
            raise self._gone() from None
        for fd in fds:
            os.close(fd)
        if event["event"] == "failed":
            raise _failure(event)
        return event

    def _expect(self, name: str, wait: Wait) -> dict[str, Any]:
        wait(self.fileno())
        event = self.receive()
        if event["event"] != name:
            raise errors.NitroVsockError(f"the guest's helper said {event} where {name} was due")
        return event

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            control.send(self._ours, message, fds)
        except OSError:
            raise self._gone() from None

    def _gone(self) -> errors.NitroVsockError:
        said = self._finish()
        last = said.strip().splitlines()[-1:] or ["nothing"]
        return errors.NitroVsockError(f"the guest's helper process ended, and said: {last[0]}")

    def _finish(self) -> str:
        """Take the helper's last words and reap it; it is about to end, or made to."""
        try:
            _, said = self._process.communicate(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, said = self._process.communicate()
        except ValueError:  # taken before
            return ""
        return bytes(said or b"").decode(errors="replace")

    def end(self) -> None:
        """End the program and everything else in it; the folder too where it is temporary."""
        with suppress(OSError):  # closing is not enough where this process has been forked
            self._ours.shutdown(socket.SHUT_RDWR)
        self._ours.close()
        self._finish()
        if self._temporary and Path(self._folder).exists():
            remove_tree(self._folder)


def _failure(event: dict[str, Any]) -> errors.NitroVsockError:
    what, why, number = event["what"], event["why"], event["errno"]
    if what == "unpack":
        return errors.GuestRuleError(f"the guest stops while it unpacks: {why}", errno=number)
    needs = {"isolation": "namespaces", "net": "a tap device"}.get(what, what)
    return errors.UnsupportedError(f"{needs}: not to be had here: {why}", errno=number)
