"""Owns: flows between two sockets, and waiting for many descriptors beside them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from nitro_vsock._core import ffi, lib
from nitro_vsock.core.calls import Guard

FLOW_BYTES: Final = 1 << 16
"""Buffer of a flow; what fills it at once is spliced from then on."""


class FlowState(IntEnum):
    """How a flow stands; see `enum nv_flow_state`."""

    OPEN = lib.NV_FLOW_OPEN
    ENDED = lib.NV_FLOW_ENDED
    FROM_FAILED = lib.NV_FLOW_FROM_FAILED
    TO_FAILED = lib.NV_FLOW_TO_FAILED


class Flow:
    """Bytes on their way from one socket to another; see `struct nv_flow`."""

    __slots__ = ("_buffer", "struct")

    def __init__(
        self, source: int, sink: int, pipe: tuple[int, int] | None, record_most: int = 0
    ) -> None:
        """Borrow all descriptors.

        Args:
            source: where bytes come from.
            sink: where they go.
            pipe: its two ends, where splicing may pay.
            record_most: bytes of the largest record, where whole records are to be sent at once.
        """
        self.struct = flow = ffi.new("struct nv_flow *")
        self._buffer = ffi.new("uint8_t[]", FLOW_BYTES + 2 * record_most)
        setattr(flow, "from", source)
        flow.to, flow.buf, flow.size = sink, self._buffer, len(self._buffer)
        flow.record_most = record_most
        flow.pipe_out, flow.pipe_in = pipe or (-1, -1)

    @property
    def state(self) -> FlowState:
        """How it stands."""
        return FlowState(self.struct.state)

    @property
    def error(self) -> int:
        """The errno value of a failed one, positive."""
        return int(self.struct.error)

    @property
    def moved(self) -> int:
        """Bytes delivered."""
        return int(self.struct.moved)


class Pump:
    """Waits for many descriptors while flows flow beside it. Owns none of the descriptors."""

    def __init__(self) -> None:
        self._flows: list[Flow] = []
        self._pointers = ffi.new("struct nv_flow *[]", 0)
        self._fds = ffi.new("struct pollfd[]", lib.NV_GUARDS)
        self._watches = 0

    def prepare(self, watches: Sequence[tuple[int, int]], flows: Sequence[Flow]) -> None:
        """Wait for these (descriptor, events) and let these flows flow from now on."""
        self._flows = list(flows)
        self._pointers = ffi.new("struct nv_flow *[]", [flow.struct for flow in flows])
        self._watches = len(watches)
        self._fds = ffi.new("struct pollfd[]", lib.NV_GUARDS + len(watches) + len(flows))
        for index, (fd, events) in enumerate(watches, lib.NV_GUARDS):
            self._fds[index].fd, self._fds[index].events = fd, events

    def wait(self, guard: Guard) -> tuple[int, list[tuple[int, int]]]:
        """Wait once. Return 0 or the positive errno value of the guard's verdict, and events.

        Events are (index of a watch, `revents`). EINTR comes back like a verdict, so that the
        caller sees what signal handlers did.
        """
        code = -lib.nv_relay(self._pointers, len(self._flows), self._fds, self._watches, guard.wait)
        if code:
            return code, []
        first = lib.NV_GUARDS
        return 0, [
            (index, revents)
            for index in range(self._watches)
            if (revents := int(self._fds[first + index].revents))
        ]
