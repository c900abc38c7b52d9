"""Owns: what the fixture `enclave` gives: an address of its own, and guests that boot there.

Must not know: pytest.
"""

from __future__ import annotations

import secrets
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from nitro_vsock import errors, protocol
from nitro_vsock.testing.emulator import GuestEmulator
from nitro_vsock.testing.loopback import loopback_problem

if TYPE_CHECKING:
    from typing_extensions import Self


TRANSPORTS: Final = ("auto", "vsock", "unix")

_FIRST_CID: Final = 5000

_CIDS: Final = 1 << 28

_SPREAD: Final = 5
"""CIDs closer to one another share ports."""


@cache
def _problem() -> str | None:
    return loopback_problem()


class Enclave:
    """A place for one enclave at a time, without hardware. A context manager.

    Attributes:
        cid: the enclave's; chosen at random, so that tests side by side do not meet.
        transport: "vsock" (loopback) or "unix".
        uds_path: base path of the hybrid vsock; None over AF_VSOCK.
        host_cid: where a guest connects to.
        peer_cid: whom the host has to admit.
        guests: those that booted.
    """

    def __init__(self, transport: str = "auto") -> None:
        """Choose an address.

        Args:
            transport: "vsock", "unix", or "auto" for AF_VSOCK where loopback answers.

        Raises:
            UnsupportedError: AF_VSOCK is wanted, and loopback does not answer.
            InvalidArgumentError: no such transport.
        """
        if transport not in TRANSPORTS:
            limit = f"must be one of {', '.join(TRANSPORTS)}"
            raise errors.InvalidArgumentError("transport", transport, limit)
        problem = None if transport == "unix" else _problem()
        if transport == "vsock" and problem is not None:
            raise errors.UnsupportedError(
                f"AF_VSOCK loopback does not answer ({problem}); modprobe vsock_loopback"
            )
        self.transport = "unix" if transport == "unix" or problem is not None else "vsock"
        self.cid = _FIRST_CID + _SPREAD * secrets.randbelow(_CIDS)
        self.host_cid = self.peer_cid = protocol.VMADDR_CID_LOCAL
        self.guests: list[GuestEmulator] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.uds_path: str | None = None
        if self.transport == "unix":
            # Not pytest's tmp_path: a Unix socket's path has 107 bytes at most.
            self._folder = tempfile.TemporaryDirectory(prefix="nv-")
            self.uds_path = str(Path(self._folder.name, "v"))

    @property
    def host_options(self) -> dict[str, Any]:
        """Keyword arguments for `EnclaveArgsWriter.listen`, beside the CID."""
        return {"uds_path": self.uds_path, "peer_cid": self.peer_cid}

    @property
    def guest_options(self) -> dict[str, Any]:
        """Keyword arguments for `GuestEmulator` and `EnclaveArgsReader`, beside the CID."""
        return {"uds_path": self.uds_path, "host_cid": self.host_cid}

    def guest(self, **options: Any) -> GuestEmulator:
        """Return a guest of this enclave that has not booted; closed with this.

        Args:
            options: keyword arguments of `GuestEmulator`.
        """
        guest = GuestEmulator(self.cid, **{**self.guest_options, **options})
        self.guests.append(guest)
        return guest

    def boot(self, **options: Any) -> GuestEmulator:
        """Boot a guest in a thread and return it; its `fileno()` does as enclave descriptor.

        Args:
            options: keyword arguments of `GuestEmulator`.
        """
        return self.guest(**options).start()

    def close(self) -> None:
        """End every guest and remove what was made."""
        for guest in self.guests:
            guest.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
