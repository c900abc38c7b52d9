"""Owns: lending signals to sessions: handlers put in place together, the program's own put back.

Must not know: what is done about a signal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

Take = Callable[[int], object]


class _Lending:
    """Which sessions want a signal, and the handler that was there before the first of them."""

    def __init__(self, number: int) -> None:
        self.takers: list[Take] = []
        self.before: Any = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        for take in list(self.takers):
            take(number)


_lent: Final[dict[int, _Lending]] = {}


def in_main_thread() -> bool:
    """Whether handlers may be set here (signal.signal)."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def lent(numbers: Iterable[int], take: Take) -> Iterator[None]:
    """Call `take(number)` for these signals meanwhile, in the main thread.

    Several sessions may overlap, in any order: each is told, and the program's own handlers come
    back with the last one's end. In other threads than the main one nothing happens, since Python
    allows no handlers there.
    """
    if not in_main_thread():
        yield
        return
    taken: list[int] = []
    try:
        for number in numbers:
            if number not in _lent:
                _lent[number] = _Lending(number)
            _lent[number].takers.append(take)
            taken.append(number)
        yield
    finally:
        for number in taken:
            lending = _lent[number]
            lending.takers.remove(take)
            if not lending.takers:
                del _lent[number]
                # None: a handler that C code had installed; Python cannot put it back.
                if lending.before is not None:
                    signal.signal(number, lending.before)


class WakeUpPipe:
    """Becomes readable when a signal has arrived, so that a poll ends and its handler runs.

    A signal between the interpreter's last look and a poll interrupts nothing by itself. Only in
    the main thread; elsewhere there is no descriptor, and no handlers run.
    """

    def __init__(self) -> None:
        self._reading = self._writing = self._before = -1
        if in_main_thread():
            self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """What to poll; -1 where there is none."""
        return self._reading

    def clear(self) -> None:
        """Take what has arrived, and pass it on to whom it would have gone without us."""
        with suppress(BlockingIOError):
            arrived = os.read(self._reading, 4096)
            if self._before >= 0:
                os.write(self._before, arrived)

    def close(self) -> None:
        """Put back what was there before."""
        if self._reading >= 0:
            signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
            self.clear()
            os.close(self._reading)
            os.close(self._writing)
            self._reading = self._writing = -1
