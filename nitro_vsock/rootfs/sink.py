"""Owns: where an archive goes that is received or packed: nothing half-made under its name.

Must not know: where it comes from.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Union

from nitro_vsock.errors import InvalidArgumentError, require_int
from nitro_vsock.transport import FD_MAX, PathLike

Sink = Union[None, int, PathLike, Callable[[memoryview], object]]
"""Where a root file system goes: nowhere, a descriptor, a path, or a callback per piece."""


@contextlib.contextmanager
def open_sink(sink: Sink) -> Iterator[Callable[[memoryview], object]]:
    """Give what stores a piece; what a path had before stays there until everything is stored.

    Raises:
        InvalidArgumentError: no sink at all.
        OSError: it cannot be opened, later also that it cannot be written.
    """
    if sink is None:
        yield len
    elif callable(sink):
        yield sink
    elif isinstance(sink, int):
        yield partial(_write_all, require_int("rootfs", sink, 0, FD_MAX))
    else:
        try:
            path = Path(os.fsdecode(sink))
            # A device or FIFO is written to, not replaced; of a link, what it leads to is replaced.
            in_place = path.exists() and not path.is_file()
            path = path if in_place else Path(os.path.realpath(path))
        except (TypeError, ValueError) as error:
            limit = f"must be None, a descriptor, a path or a callback ({error})"
            raise InvalidArgumentError("rootfs", sink, limit) from None
        target = path if in_place else path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        # O_NONBLOCK: opening a FIFO must not wait for its reader; ENXIO says that there is none.
        how = os.O_NONBLOCK | os.O_NOCTTY if in_place else os.O_CREAT | os.O_EXCL
        fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC | how, 0o666)
        try:
            os.set_blocking(fd, True)
            yield partial(_write_all, fd)
            if not in_place:
                target.replace(path)
        except BaseException:
            if not in_place:
                target.unlink()
            raise
        finally:
            os.close(fd)


def _write_all(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
