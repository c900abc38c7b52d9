"""Owns: the device proxies' part in a launch: which frames they add.

Must not know: how a proxy runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from nitro_vsock.errors import InvalidArgumentError
from nitro_vsock.frames import AppOutput, EnclaveArg, NetworkProxy


@runtime_checkable
class DeviceProxy(Protocol):
    """What a launch needs of a device proxy; the reference's trait of this name."""

    def arg(self) -> EnclaveArg | None:
        """Return the frame that makes the guest connect to this proxy, or None.

        NetworkProxy() and AppOutput() are the frames the guest knows; a proxy the guest always
        connects to, as the signal handler, has none.
        """


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
