"""Owns: what tests of sessions share: a tiny launch, and a place where host and guest meet.

The same tests run over Unix sockets and over AF_VSOCK: they ask for the fixture `place`.
"""

import contextlib
import select
import socket
from dataclasses import dataclass
from functools import cache

from archives import make_tar
from session_guest import SessionGuest

from nitro_vsock import (
    DeviceProxyList,
    EnclaveArgsWriter,
    EnclaveSession,
    OutputProxy,
    Rootfs,
    SessionTimeouts,
)

CID = 16

PATIENT = SessionTimeouts(launch=30, services=30, run=60, stop=30, drain=30)
"""For what must not run into a deadline."""


@cache
def tiny():
    """An archive of one small file."""
    return Rootfs.from_bytes(make_tar(1))


def small_writer(*proxies, rootfs=None, **options):
    """A writer of a tiny launch with these proxies."""
    return EnclaveArgsWriter(
        rootfs or tiny(),
        "/bin/app",
        ["/bin/app"],
        {"A": "1"},
        proxies=DeviceProxyList(proxies),
        **options,
    )


@dataclass
class Place:
    """Where a host and its guest meet: Unix sockets, or AF_VSOCK loopback where `uds` is None."""

    cid: int
    uds: str | None
    bulk: int = 1 << 30

    def session(self, *proxies, writer=None, timeouts=PATIENT, **options):
        """Return a session of a tiny launch with these proxies."""
        if self.uds is None:
            options.setdefault("peer_cid", 1)
        return EnclaveSession(
            writer or small_writer(*proxies),
            self.cid,
            uds_path=self.uds,
            timeouts=timeouts,
            **options,
        )

    def guest(self, **options):
        """Start a guest."""
        return SessionGuest(self.uds, self.cid, **options)

    @contextlib.contextmanager
    def running(self, *proxies, guest=None, **options):
        """Yield a session and its guest; both are over in the end, however it comes."""
        with self.session(*proxies, **options) as session:
            started = self.guest(**(guest or {}))
            try:
                yield session, started
            finally:
                session.close()
                started.finish()

    def run(self, *proxies, guest=None, **options):
        """Run a session to its end; return its exit status and the guest."""
        with self.running(*proxies, guest=guest, **options) as (session, started):
            try:
                status = session.run_sync()
            except Exception as error:  # what went wrong with the guest says more
                raise started.finish() or error from error
            return status, started.result()

    def fail(self, kind, *proxies, guest=None, enclave_fd=None, **options):
        """Run a session into an exception of this kind; return it and the guest."""
        with self.running(*proxies, guest=guest, **options) as (session, started):
            try:
                status = session.run_sync(enclave_fd=enclave_fd)
            except kind as error:
                return error, started
        raise AssertionError(f"no {kind.__name__}, but {status}")


class Enclave:
    """An enclave's descriptor: hangs up when it dies. A context manager."""

    def __init__(self):
        self._ours, self._theirs = socket.socketpair()

    def fileno(self):
        """What the session watches."""
        return self._ours.fileno()

    def die(self, *_):
        """Hang up."""
        self._theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._ours.close()
        self._theirs.close()


class Lines(list):
    """A callback that keeps the lines it gets."""

    def __call__(self, line):
        """Keep it."""
        self.append(line)

    @property
    def proxy(self):
        """A proxy that tells us."""
        return OutputProxy(self)


def is_full(sock):
    """Whether a socket or pipe takes nothing now."""
    return not select.select([], [sock], [], 0)[1]
