"""Owns: what a device proxy is, to a launch and to a session.

Must not know: how any of them runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nitro_vsock.errors import InvalidArgumentError
from nitro_vsock.wire import AppOutput, EnclaveArg, NetworkProxy

if TYPE_CHECKING:
    import socket

    from nitro_vsock.transport import EventLoop


@runtime_checkable
class DeviceProxy(Protocol):
    """What a launch needs of a device proxy; the reference's trait of this name."""

    def arg(self) -> EnclaveArg | None:
        """Return the frame that makes the guest connect to this proxy, or None.

        NetworkProxy() and AppOutput() are the frames the guest knows; a proxy the guest always
        connects to, as the signal handler, has none.
        """


@runtime_checkable
class SessionProxy(DeviceProxy, Protocol):
    """What a session needs of a device proxy. docs/launcher.md has an example of one's own.

    It is a description that serves any number of sessions; what one session needs is in the
    service that `open` returns.
    """

    @property
    def port_offset(self) -> int:
        """The port the guest connects to, above its CID: a VsockPortOffset."""

    def open(self) -> DeviceService:
        """Make what one session needs, before anything is bound.

        What it raises ends the session before the enclave boots.
        """


class DeviceService(Protocol):
    """A proxy at work in one session.

    Its methods are called in the session's thread and must not block. What they raise ends the
    session.
    """

    @property
    def finished(self) -> bool:
        """Whether nothing more is expected of the guest.

        Asked once the program has ended: the guest goes down when every service has finished, or
        when nothing has come for as long as `SessionTimeouts.drain`.
        """

    def connected(self, connection: socket.socket, loop: EventLoop) -> None:
        """The guest is there.

        Args:
            connection: does not block, and is the session's: it closes it in the end.
            loop: `watch` and `relay` say what to do about it.
        """

    def close(self) -> None:
        """Let go of everything; called once, however the session ends."""


class DeviceProxyList(list[DeviceProxy]):
    """The proxies of a launch, in the order given."""

    def __init__(self, proxies: Iterable[DeviceProxy] = ()) -> None:
        """Check each entry.

        Raises:
            InvalidArgumentError: no list, or an entry has no `arg` method.
        """
        if not isinstance(proxies, Iterable):
            raise InvalidArgumentError("proxies", proxies, "must be a list of proxies")
        super().__init__(proxies)
        for index, proxy in enumerate(self):
            if not isinstance(proxy, DeviceProxy):
                raise InvalidArgumentError(
                    f"proxies[{index}]", proxy, "must have an arg() method (see DeviceProxy)"
                )

    def args(self) -> list[EnclaveArg]:
        """Return the proxies' frames.

        Raises:
            InvalidArgumentError: a proxy asks for a frame that is no flag.
        """
        args: list[EnclaveArg] = []
        for index, proxy in enumerate(self):
            arg = proxy.arg()
            if arg is None:
                continue
            if not isinstance(arg, (NetworkProxy, AppOutput)):
                raise InvalidArgumentError(
                    f"proxies[{index}].arg()", arg, "must be NetworkProxy, AppOutput or None"
                )
            args.append(arg)
        return args
