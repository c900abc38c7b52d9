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
from typing import Any, ClassVar, Final

Take = Callable[[int], object]


class _Lending:
    """Which sessions want a signal, and the handler that was there before the first of them."""

    def __init__(self, number: int, take: Take) -> None:
        self._number = number
        self.takers = [take]  # before the handler: a signal may come at once
        self.before: Any = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        takers = list(self.takers)
        for take in takers:
            take(number)
        if not takers and callable(self.before):  # it could not be put back
            self.before(number, frame)

    def give_back(self) -> None:
        """Put the program's handler back, unless it has put another one there meanwhile."""
        # None: a handler that C code had installed; Python cannot put it back. ValueError: an
        # abandoned coroutine, thrown away in another thread than the main one.
        if self.before is not None and signal.getsignal(self._number) == self._handle:
            with suppress(ValueError):
                signal.signal(self._number, self.before)


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
        for number in dict.fromkeys(numbers):
            lending = _lent.get(number)
            if lending is None:
                _lent[number] = _Lending(number, take)
            else:
                lending.takers.append(take)
            taken.append(number)
        yield
    finally:
        for number in taken:
            lending = _lent[number]
            if lending.takers == [take]:
                lending.give_back()  # first: a signal that comes now is the program's
                del _lent[number]
            lending.takers.remove(take)


@contextmanager
def no_sigpipe() -> Iterator[None]:
    """Let a broken pipe be an error only, also where the program has SIGPIPE at its default."""
    if signal.SIGPIPE in signal.sigpending():  # blocked, and not ours to take
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    except BrokenPipeError:
        signal.sigtimedwait({signal.SIGPIPE}, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


class WakeUpPipe:
    """Becomes readable when a signal has arrived, so that a poll ends and its handler runs.

    A signal between the interpreter's last look and a poll interrupts nothing by itself. Only in
    the main thread; elsewhere there is no descriptor, and no handlers run.

    What arrives goes on to the descriptor that was there before (that of asyncio, for instance),
    but for the signals that are lent: there the program's own handler is not to run.
    """

    _open: ClassVar[list[WakeUpPipe]] = []
    """The newest is the interpreter's; any of them wakes the main thread, and all handlers run."""
    _before = -1

    def __init__(self) -> None:
        self._reading = self._writing = -1
        if in_main_thread():
            self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            before = _set_wakeup_fd(self._writing)
            if before not in [pipe._writing for pipe in self._open]:
                WakeUpPipe._before = before
            self._open.append(self)

    def fileno(self) -> int:
        """What to poll; -1 where there is none."""
        return self._reading

    def clear(self) -> None:
        """Take what has arrived, and pass it on to whom it would have gone without us."""
        try:
            arrived = os.read(self._reading, 4096)
        except BlockingIOError:
            return
        others = bytes(number for number in arrived if number not in _lent)
        if others and self._before >= 0:
            with suppress(OSError):  # it is full, or was closed meanwhile
                os.write(self._before, others)

    def close(self) -> None:
        """Put back what was there before."""
        # Thrown away in another thread, it stays: the interpreter cannot be told to let go of it.
        if self._reading < 0 or not in_main_thread():
            return
        self._open.remove(self)
        next_one = self._open[-1]._writing if self._open else self._before
        found = _set_wakeup_fd(next_one)
        if found not in (self._writing, next_one):
            _set_wakeup_fd(found)  # the program's own, which came after ours
        self.clear()
        os.close(self._reading)
        os.close(self._writing)
        self._reading = self._writing = -1


def _set_wakeup_fd(fd: int) -> int:
    try:
        return signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    except (OSError, ValueError):  # whoever had it has closed it
        return signal.set_wakeup_fd(-1)
