"""Owns: what it means to own something one thread uses and any thread closes.

Must not know: what is owned.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final

from nitro_vsock.errors import BusyError, ClosedError, LaunchCancelledError
from nitro_vsock.transport.wakeup import WakeUp

if TYPE_CHECKING:
    from typing_extensions import Self


FD_MAX: Final = (1 << 31) - 1


class Holder:
    """Something that is used by one thread at a time and can be closed from any.

    Closing while a call runs never pulls a descriptor from under it: the call is woken, and closes
    on its way out.
    """

    def __init__(self, wake_up: WakeUp) -> None:
        """Take what ends a running call; whoever made it closes it, after this."""
        self._user_lock = threading.RLock()
        self._user: object | None = None
        self._closing = False
        self._wake_up = wake_up

    def _release(self) -> None:
        """Let go of what is held; called once at least, with no call running."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closing

    def _name(self) -> str:
        return type(self).__name__

    def _take(self, user: object) -> bool:
        """Make this the user, unless there is one; return whether it is the user.

        Ctrl-C may come as soon as a call returns. A lock that is held while something is used would
        then stay locked, without anybody who knows; whoever calls this sees it at `_user`.
        """
        with self._user_lock:
            if self._user is None:
                self._user = user
        return self._user is user

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        user = object()
        try:
            if not self._take(user) and not self._closing:
                raise BusyError(f"another thread is using this {self._name()}")
            if self._closing:  # whoever is closing it may be its user
                raise ClosedError(f"this {self._name()} is closed")
            yield
        except LaunchCancelledError as error:
            if self._closing:
                raise ClosedError(
                    f"this {self._name()} was closed during the call",
                    stage=error.stage,
                    bytes_sent=error.bytes_sent,
                    total=error.total,
                ) from None
            raise
        finally:
            if self._user is user:
                self._user = None
            if self._closing:
                self._release_if_idle()

    def _release_if_idle(self) -> None:
        user = object()
        try:
            if self._take(user):
                self._release()
        finally:
            if self._user is user:
                self._user = None

    def close(self) -> None:
        """Close now, or as soon as a running call has been woken. From any thread, repeatedly."""
        self._closing = True
        self._wake_up.set()
        self._release_if_idle()

    def close_quietly(self) -> None:
        """Close without waking whoever else waits with the same wake-up; no call may be running."""
        self._closing = True
        self._release_if_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closing", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
