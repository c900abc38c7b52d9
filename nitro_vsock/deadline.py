"""Owns: turning seconds into one absolute deadline, and the reference's timeout formula.

Must not know: what is waited for.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final, Union

from nitro_vsock.errors import InvalidArgumentError, require_int
from nitro_vsock.protocol import U64_MAX

MAX_TIMEOUT: Final = 1e9
"""Seconds, about 31 years: what fits a 64-bit count of nanoseconds with room to spare."""

_GIB: Final = 1 << 30
_EIF_STEP: Final = 6 * _GIB
_MEMORY_STEP: Final = 100 * _GIB
_MINUTE_MS: Final = 60_000


@dataclass(frozen=True)
class PollTimeout:
    """A timeout in whole milliseconds, as the reference's type of this name has it.

    Unlike there it is never cut to 16 bits: 120 000 ms stay 120 000 ms.
    """

    milliseconds: int

    def __post_init__(self) -> None:
        require_int("milliseconds", self.milliseconds, 0, int(MAX_TIMEOUT) * 1000)

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.milliseconds / 1000

    @classmethod
    def from_sizes(cls, eif_bytes: int, memory_bytes: int) -> PollTimeout:
        """Compute the reference's launch timeout.

        It is a minute for each begun 6 GiB of enclave image plus a minute for each begun 100 GiB of
        enclave memory.

        Args:
            eif_bytes: size of the enclave image file, at least 1.
            memory_bytes: memory of the enclave, at least 1.

        Raises:
            InvalidArgumentError: a size is not an int or below 1.
        """
        minutes = 0
        for field, size, step in (
            ("eif_bytes", eif_bytes, _EIF_STEP),
            ("memory_bytes", memory_bytes, _MEMORY_STEP),
        ):
            minutes += 1 + (require_int(field, size, 1, U64_MAX) - 1) // step
        return cls(minutes * _MINUTE_MS)


def poll_timeout(eif_bytes: int, memory_bytes: int) -> PollTimeout:
    """Return `PollTimeout.from_sizes(eif_bytes, memory_bytes)`."""
    return PollTimeout.from_sizes(eif_bytes, memory_bytes)


DEFAULT_TIMEOUT: Final = PollTimeout(2 * _MINUTE_MS)
"""The least the reference's formula gives."""

Timeout = Union[float, PollTimeout]
"""Seconds, or a PollTimeout."""


@dataclass(frozen=True)
class Deadline:
    """An absolute moment of CLOCK_MONOTONIC, in nanoseconds."""

    ns: int

    @classmethod
    def after(cls, timeout: Timeout) -> Deadline:
        """Return the moment `timeout` from now.

        Raises:
            InvalidArgumentError: not a number, NaN, negative, or above MAX_TIMEOUT.
        """
        seconds = timeout.seconds if isinstance(timeout, PollTimeout) else timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise InvalidArgumentError("timeout", timeout, "must be seconds or a PollTimeout")
        if not 0 <= seconds <= MAX_TIMEOUT:  # NaN is not either
            raise InvalidArgumentError(
                "timeout", timeout, f"must be 0 to {MAX_TIMEOUT:.0f} seconds"
            )
        return cls(time.monotonic_ns() + math.ceil(seconds * 1e9))
