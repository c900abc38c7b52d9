"""Owns: trying again until a host listens. Must not know: what connects."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Final, TypeVar

from nitro_vsock import errors
from nitro_vsock.cli.ui import output

_RETRY_SECONDS: Final = 0.02

_NOBODY_THERE: Final = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET})

_Result = TypeVar("_Result")


def retry(attempt: Callable[[float], _Result], timeout: float) -> _Result:
    """Attempt something until somebody listens or the deadline passes.

    Args:
        attempt: takes the seconds that are left.
        timeout: seconds.

    Raises:
        ConnectTimeoutError: nobody listened in time.
        BaseException: what else an attempt raises, at once.
    """
    deadline = time.monotonic() + timeout
    waiting = False
    while True:
        try:
            return attempt(max(deadline - time.monotonic(), 0))
        except (errors.VsockConnectError, errors.ConnectTimeoutError) as error:
            # A connect over AF_VSOCK has a timeout of the kernel's too, of two seconds.
            if error.errno not in _NOBODY_THERE | {errno.ETIMEDOUT}:
                raise
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise errors.ConnectTimeoutError(
                    f"nobody listened before the deadline; {error}",
                    errno=errno.ETIMEDOUT,
                    stage=errors.Stage.CONNECT,
                ) from error
            if not waiting:
                output.print_note(f"waiting for a listener; {error}")
                waiting = True
        time.sleep(_RETRY_SECONDS)
