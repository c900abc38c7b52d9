"""Owns: moving bytes through a connected socket, with exact progress."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from nitro_vsock import errors
from nitro_vsock._core import ffi, lib
from nitro_vsock.core.calls import Guard, drive, retry
from nitro_vsock.progress import Meter

STAGE_BYTES: Final = 1 << 20
"""Staging buffer of the read strategy; memory is touched only where it is used."""

SENDFILE: Final = int(lib.NV_SENDFILE)

SPLICE: Final = int(lib.NV_SPLICE)

MMAP: Final = int(lib.NV_MMAP)

READ: Final = int(lib.NV_READ)


def send(fd: int, data: bytes | memoryview, guard: Guard, meter: Meter) -> None:
    """Send all of a buffer; the meter is exact also after an error."""
    with ffi.from_buffer("uint8_t[]", data) as view:
        length = len(view)
        _transfer(lambda xfer: lib.nv_send(fd, view, length, guard.wait, xfer), guard, meter)


def send_from(
    fd: int,
    source_fd: int,
    offset: int,
    length: int,
    strategy: int,
    guard: Guard,
    meter: Meter,
    *,
    seekable: bool,
) -> int:
    """Send `length` bytes of a descriptor; return the strategy in use at the end.

    The meter is exact also after an error.
    """
    source = ffi.new("struct nv_source *")
    source.fd = source_fd
    source.strategy = strategy
    source.seekable = seekable
    source.offset = offset
    source.length = length

    with ExitStack() as stack:

        def call(xfer: Any) -> int:
            code = int(lib.nv_send_from(fd, source, guard.wait, xfer))
            if code != -lib.NV_E_STAGE:
                return code
            try:
                stage = stack.enter_context(mmap.mmap(-1, STAGE_BYTES))
            except OSError as error:
                return -(error.errno or errno.ENOMEM)
            source.stage = stack.enter_context(ffi.from_buffer("uint8_t[]", stage))
            source.stage_size = STAGE_BYTES
            return int(lib.nv_send_from(fd, source, guard.wait, xfer))

        _transfer(call, guard, meter)
    return int(source.strategy)


def _failed(code: int, meter: Meter, *, source: bool = False) -> errors.NitroVsockError:
    return errors.from_errno(
        code, meter.stage, source=source, bytes_sent=meter.done, total=meter.total
    )


def _transfer(call: Callable[[Any], int], guard: Guard, meter: Meter) -> None:
    """Drive a call that keeps its progress in a struct nv_xfer, and keep the meter in step."""
    xfer = ffi.new("struct nv_xfer *")
    base, base_calls = meter.done, meter.calls

    def count() -> None:
        meter.done = base + xfer.done
        meter.calls = base_calls + xfer.calls

    def on_tick() -> None:
        count()
        meter.tick()

    try:
        code = drive(lambda: call(xfer), guard, on_tick)
    finally:
        count()
    if code:
        raise _failed(code, meter, source=bool(xfer.from_source))


def receive(fd: int, view: memoryview, guard: Guard, meter: Meter) -> int:
    """Receive with one recv into a writable buffer; return the count, 0 at end of stream."""
    got = ffi.new("uint64_t *")
    with ffi.from_buffer("uint8_t[]", view, require_writable=True) as buffer:
        length = len(buffer)
        code = drive(lambda: lib.nv_recv(fd, buffer, length, guard.wait, got), guard, meter.tick)
    if code:
        raise _failed(code, meter)
    return int(got[0])


def send_now(fd: int, data: bytes | memoryview) -> int:
    """Send what a socket takes without waiting, whether it blocks or not; return the count.

    Raises OSError: BlockingIOError where it takes nothing now.
    """
    with ffi.from_buffer("uint8_t[]", data) as view:
        length = len(view)
        return retry(lambda: int(lib.nv_send_now(fd, view, length)))


def receive_now(fd: int, view: memoryview) -> int:
    """Receive what has come without waiting, whether the socket blocks or not; return the count.

    0 stands for the end of the stream. Raises OSError: BlockingIOError where nothing has come.
    """
    with ffi.from_buffer("uint8_t[]", view, require_writable=True) as buffer:
        length = len(buffer)
        return retry(lambda: int(lib.nv_recv_now(fd, buffer, length)))


def poll_now(fd: int, events: int) -> int:
    """Return which of a descriptor's poll events are there, without waiting.

    Raises OSError where the kernel does not let us look.
    """
    return retry(lambda: int(lib.nv_poll_now(fd, events)))
