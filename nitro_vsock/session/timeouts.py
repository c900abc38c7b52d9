"""Owns: how long each phase of a session may take. Must not know: the phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nitro_vsock.deadline import DEFAULT_TIMEOUT, Deadline, Timeout
from nitro_vsock.errors import InvalidArgumentError

UNPACK_RATE: Final = 4 << 20
"""Bytes a second that a guest is trusted to measure and unpack at least: each 2 KiB are a request
to the Nitro Secure Module."""


@dataclass(frozen=True)
class SessionTimeouts:
    """How long each phase of a session may take: seconds or a PollTimeout; None: no limit.

    Attributes:
        launch: until the guest has taken its arguments and root file system.
        services: from then on until it is connected to its services. It measures and unpacks the
            archive meanwhile. By default 60 s and a second for each 4 MiB of the archive.
        run: from then on until the program ends.
        stop: from the first `terminate` until the program ends.
        drain: how long nothing may come after the program's end, of its output for instance; and
            how long after the guest closed its signal connection the return code may take.
    """

    launch: Timeout = DEFAULT_TIMEOUT
    services: Timeout | None = None
    run: Timeout | None = None
    stop: Timeout | None = 30.0
    drain: Timeout = 5.0

    def __post_init__(self) -> None:
        for name in ("launch", "services", "run", "stop", "drain"):
            timeout = getattr(self, name)
            if timeout is None and name in ("services", "run", "stop"):
                continue
            try:
                Deadline.after(timeout)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(name, timeout, error.limit) from None
