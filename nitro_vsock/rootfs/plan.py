"""Owns: what an archive that is put together while it is sent looks like to whoever sends it.

Must not know: sockets, directories, tar headers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Union

from nitro_vsock.transport import FilePayload

Piece = Union[FilePayload, memoryview]


class Plan(ABC):
    """An archive whose exact length is known before its first byte is made.

    A plan is run once, by whoever opened it. Its pieces, joined, are the archive.
    """

    length: int
    """Bytes of the whole archive."""

    left_out: tuple[str, ...] = ()
    """Members of the source that an archive cannot hold, such as sockets; paths of the source."""

    where: str = ""
    """Which member's file the piece is of that was given last; empty where that says nothing."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Make the archive, piece by piece.

        A piece is good until the next one is asked for: memory may be used again, and a descriptor
        be closed. Small things come gathered in memory, large files as runs of their descriptors.

        Raises:
            SourceChangedError, SourceTruncatedError, SourceReadError: a member is not any more what
                was planned; the message names it. What was made so far must not count as a success.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every descriptor the plan holds; any number of times."""
