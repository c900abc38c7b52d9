"""Owns: making the items of an iterator on a thread, a few ahead of whoever takes them.

Must not know: what the items are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_TICK: Final = 0.05
"""Seconds that the taker waits at once: a signal that reaches another thread wakes nobody."""


class Prefetch(Iterator[T], Generic[T]):
    """An iterator over the same items, in the same order, with the same error at the same place.

    The first items are made by whoever takes them, and so are all where no thread can be started:
    what has few items needs no thread.

    Attributes:
        on_thread: whether a thread makes them.
    """

    # A collection may close an abandoned iterator in the middle of anything: SimpleQueue can be
    # entered again, locks of Python's cannot.

    def __init__(self, items: Iterator[T], alone: int, room: int) -> None:
        """Begin nothing yet.

        Args:
            items: what makes them.
            alone: items before there is a thread.
            room: items that may be made, or be in the making, before they are asked for.
        """
        self._items = items
        self._alone = alone
        self.on_thread = False
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ready: queue.SimpleQueue[tuple[T | None, BaseException | None]]
        self._ready = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(room):
            self._room.put(None)

    def __next__(self) -> T:
        """Return the next item; what came with the one before may be used again."""
        if self._closed:
            raise StopIteration
        if self._thread is None:
            self._alone -= 1
            if self._alone != -1 or not self._start():
                return next(self._items)
        while True:
            with suppress(queue.Empty):
                item, error = self._ready.get(timeout=_TICK)
                break
        if error is not None:
            self.close()
            try:
                raise error
            finally:
                del error  # its traceback has this frame
        self._room.put(None)
        return item  # type: ignore[return-value]  # there is one where there is no error

    def close(self) -> None:
        """End the thread, if there is one; any number of times. Nothing comes afterwards."""
        self._closed = True
        self._room.put(None)
        self._items = iter(())
        if self._thread is not None:
            # It has not begun, and will find out; or a collection within it runs this, and the
            # next to close joins it.
            with suppress(RuntimeError):
                self._thread.join()

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, args=(self._items,), name="nitro_vsock ahead")
        thread.daemon = True  # an iterator that nobody closes holds up no interpreter's end
        self._thread = thread
        self.on_thread = True
        try:
            thread.start()
        except RuntimeError:
            self._thread = None
            self.on_thread = False
        return self.on_thread

    def _run(self, items: Iterator[T]) -> None:
        try:
            while True:
                self._room.get()
                if self._closed:
                    return
                self._ready.put((next(items), None))
        except BaseException as error:
            self._ready.put((None, error))
