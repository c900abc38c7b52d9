"""Owns: which services a session has, and the port of each.

Must not know: the phases.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Final

from nitro_vsock.errors import InvalidArgumentError, VsockBindError
from nitro_vsock.launch import (
    DeviceService,
    EnclaveArgsWriter,
    SessionProxy,
    bind_hint,
    service_address,
)
from nitro_vsock.protocol import VsockPortOffset
from nitro_vsock.session.services.console import Console
from nitro_vsock.session.services.exit_status import ReturnCode
from nitro_vsock.session.services.output import OutputProxy
from nitro_vsock.session.services.signal import SignalHandler
from nitro_vsock.transport import Listener, PathLike, WakeUp
from nitro_vsock.wire import AppOutput, NetworkProxy

output_logger: Final = logging.getLogger("nitro_vsock.output")

LAST_PORT: Final = 0xFFFFFFFE

_BUILT_IN: Final = {
    VsockPortOffset.RETURN_CODE: ReturnCode,
    VsockPortOffset.SIGNAL_HANDLER: SignalHandler,
    VsockPortOffset.CONSOLE: Console,
}
"""Services the session itself has to do with: only these proxies, or subclasses of theirs."""


def complete(writer: EnclaveArgsWriter) -> list[SessionProxy]:
    """Return the writer's proxies and those that a session always has."""
    if not isinstance(writer, EnclaveArgsWriter):
        raise InvalidArgumentError("writer", writer, "must be an EnclaveArgsWriter")
    found: dict[int, SessionProxy] = {}
    for index, proxy in enumerate(writer.proxies):
        name = f"proxies[{index}]"
        if not isinstance(proxy, SessionProxy):
            limit = "must have port_offset and open() to be part of a session (see SessionProxy)"
            raise InvalidArgumentError(name, proxy, limit)
        try:
            offset = VsockPortOffset(proxy.port_offset)
        except ValueError:
            offset = VsockPortOffset.ARGS_READER
        if offset is VsockPortOffset.ARGS_READER:
            limit = "must be a VsockPortOffset, and not the arguments': the guest knows no other"
            raise InvalidArgumentError(f"{name}.port_offset", proxy.port_offset, limit)
        if not isinstance(proxy, _BUILT_IN.get(offset, object)):
            limit = f"must be a {_BUILT_IN[offset].__name__}, which this port is for"
            raise InvalidArgumentError(name, proxy, limit)
        if offset in found:
            limit = f"must be the only proxy for {offset.name.lower()}"
            raise InvalidArgumentError(name, proxy, limit)
        found[offset] = proxy
    if writer.network_proxy and VsockPortOffset.NET not in found:
        limit = "needs a NetProxy among the proxies: the guest would wait for ever"
        raise InvalidArgumentError("network_proxy", True, limit)
    for offset, (flag, is_asked_for) in {
        VsockPortOffset.NET: (NetworkProxy(), writer.network_proxy),
        VsockPortOffset.APP_OUTPUT: (AppOutput(), writer.app_output),
    }.items():
        if offset in found and not is_asked_for:
            limit = f"its arg() must return {flag}: the guest would not connect"
            raise InvalidArgumentError("proxies", found[offset], limit)
    if writer.app_output and VsockPortOffset.APP_OUTPUT not in found:
        found[VsockPortOffset.APP_OUTPUT] = OutputProxy(output_logger)
    found.setdefault(VsockPortOffset.SIGNAL_HANDLER, SignalHandler())
    found.setdefault(VsockPortOffset.RETURN_CODE, ReturnCode())
    return list(found.values())


def bind(cid: int, offset: int, uds_path: PathLike | None, wake_up: WakeUp) -> Listener:
    """Bind the port of a service; a failure says whose the port may be."""
    address = service_address(cid, VsockPortOffset(offset), uds_path)
    try:
        return Listener(address, wake_up)
    except VsockBindError as error:
        error.explain(bind_hint(cid, address))
        raise


@dataclass
class Port:
    """A proxy at work."""

    offset: int
    service: DeviceService
    listener: Listener | None = None
    connection: socket.socket | None = None
    closed: bool = False

    def close(self) -> None:
        """Close everything; again where Ctrl-C ended it. Raises what the service says, once."""
        if self.listener is not None:
            self.listener.close()
        try:
            if not self.closed:
                self.closed = True
                self.service.close()
        finally:
            if self.connection is not None:
                self.connection.close()
