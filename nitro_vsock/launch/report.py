"""Owns: what a launch did. Must not know: how."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

from nitro_vsock.transport import Peer, Strategy


@dataclass(frozen=True)
class LaunchReport:
    """What a launch did.

    Attributes:
        bytes_sent: bytes of the whole stream, ready byte not counted.
        rootfs_bytes: bytes of the root file system among them.
        strategy: how the root file system was moved in the end; READ where the kernel refused the
            first choice. Of a directory, how its last large file was; SEND where it has none.
        system_calls: calls that moved bytes or tried to.
        seconds: duration of each phase: accept (with the handshake), arguments, rootfs, finish.
        peer: who took it.
        strangers: connections refused, by reason: cid, ready (another first byte), closed (went
            away), crowded (silent while too many waited).
        peer_closed: True: the peer closed its end after Finished had been sent. That shows that it
            ended, not that it read everything: on AF_VSOCK a guest that dies with unread data looks
            the same, so watch the enclave's descriptor. False: it was not waited for.
    """

    bytes_sent: int
    rootfs_bytes: int
    strategy: Strategy
    system_calls: int
    seconds: dict[str, float]
    peer: Peer
    strangers: dict[str, int]
    peer_closed: bool

    @property
    def strangers_refused(self) -> int:
        """Connections refused, together."""
        return sum(self.strangers.values())

    @property
    def throughput(self) -> float:
        """Bytes of the root file system per second, until the peer closed."""
        seconds = self.seconds["rootfs"] + self.seconds["finish"]
        return self.rootfs_bytes / seconds if seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it with plain types only, as JSON wants it."""
        return {
            **dataclasses.asdict(self),
            "strategy": self.strategy.value,
            "throughput": self.throughput,
        }


@dataclass
class Phases:
    """Durations, in the order they end."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def end(self, name: str) -> None:
        """Note that a phase ends now."""
        now = time.monotonic()
        self.seconds[name], self.since = now - self.since, now
