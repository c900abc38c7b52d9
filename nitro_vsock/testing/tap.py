"""Owns: the guest's network: a tap device set up as the guest does; frames to and from the host.

Must not know: who connects. On the wire a frame is a big-endian u32 length and an Ethernet frame.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

HEADER: Final = struct.Struct(">I")
"""The length before each frame; before the first one, the longest frame that may come."""
ETHERNET: Final = 14
"""Bytes of an Ethernet header, which an MTU does not count."""
MIN_MTU: Final = 68
MAX_MTU: Final = 65535 - ETHERNET
"""What a tap device takes."""

NAME: Final = "tap0"
ADDRESS: Final = "172.31.10.83"
MASK: Final = "255.255.255.0"
MAC: Final = bytes.fromhex("5a94efe40cee")

_TUN: Final = Path("/dev/net/tun")
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
"""linux/if_tun.h"""
_SIOCADDRT: Final = 0x890B
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
"""linux/sockios.h"""
_ARPHRD_ETHER: Final = 1
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_RTF_UP: Final = 0x1

_ROOM: Final = 1 << 18
"""Bytes moved at once, at least; and as many frames as fit."""


class _Route(ctypes.Structure):
    """`struct rtentry` of linux/route.h."""

    _fields_ = [
        ("pad1", ctypes.c_ulong),
        ("dst", ctypes.c_char * 16),
        ("gateway", ctypes.c_char * 16),
        ("genmask", ctypes.c_char * 16),
        ("flags", ctypes.c_ushort),
        ("pad2", ctypes.c_short),
        ("pad3", ctypes.c_ulong),
        ("pad4", ctypes.c_void_p),
        ("metric", ctypes.c_short),
        ("dev", ctypes.c_char_p),
        ("mtu", ctypes.c_ulong),
        ("window", ctypes.c_ulong),
        ("irtt", ctypes.c_ushort),
    ]


def open_tap(mtu: int) -> int:
    """Make tap0 in this network namespace, with the guest's address and default route.

    Args:
        mtu: MIN_MTU to MAX_MTU.

    Returns:
        The device's descriptor; closing it removes the device.

    Raises:
        OSError: no tun driver, or not permitted.
    """
    fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _request(struct.pack("=H", _IFF_TAP | _IFF_NO_PI)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            _set_up(sock, mtu)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _request(value: bytes) -> bytes:
    """Return a `struct ifreq` for tap0."""
    return NAME.encode().ljust(16, b"\0") + value.ljust(24, b"\0")


def _address(text: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


def _set_up(sock: socket.socket, mtu: int) -> None:
    fcntl.ioctl(sock, _SIOCSIFMTU, _request(struct.pack("=i", mtu)))
    fcntl.ioctl(sock, _SIOCSIFADDR, _request(_address(ADDRESS)))
    fcntl.ioctl(sock, _SIOCSIFNETMASK, _request(_address(MASK)))
    fcntl.ioctl(sock, _SIOCSIFHWADDR, _request(struct.pack("=H6s", _ARPHRD_ETHER, MAC)))
    had = fcntl.ioctl(sock, _SIOCGIFFLAGS, _request(b""))
    flags = struct.unpack_from("=H", had, 16)[0] | _IFF_UP | _IFF_RUNNING
    fcntl.ioctl(sock, _SIOCSIFFLAGS, _request(struct.pack("=H", flags)))
    route = _Route(flags=_RTF_UP, dev=NAME.encode())
    # Into the structure itself: an array of c_char set from bytes ends at the first NUL.
    for field in ("dst", "gateway", "genmask"):
        place = ctypes.addressof(route) + getattr(_Route, field).offset
        ctypes.memmove(place, _address("0.0.0.0"), 16)  # noqa: S104 - the route to everywhere
    fcntl.ioctl(sock, _SIOCADDRT, bytes(route))


def relay(tap: int | None, host: socket.socket, limit: int) -> None:
    """Move frames until the host closes or breaks the rules, which ends the guest's network.

    Args:
        tap: a device's descriptor, non-blocking; None throws the host's frames away.
        host: a connected stream socket.
        limit: bytes of the longest frame, Ethernet header included.
    """
    host.setblocking(False)
    poller = select.poll()
    inbound, outbound = _FromHost(host, tap, limit), _ToHost(host, tap, limit)
    while True:
        # Nothing is read from the device while the host does not take what was read before.
        poller.register(host, select.POLLIN | (select.POLLOUT if outbound.waiting else 0))
        if tap is not None:
            poller.register(tap, 0 if outbound.waiting else select.POLLIN)
        ready = dict(poller.poll())
        try:
            if ready.get(host.fileno(), 0) & ~select.POLLOUT and not inbound.move():
                return
            if outbound.waiting or (tap is not None and ready.get(tap)):
                outbound.move()
        except ConnectionError:
            return


class _FromHost:
    def __init__(self, host: socket.socket, tap: int | None, limit: int) -> None:
        self._host = host
        self._tap = tap
        self._limit = limit
        self._room = memoryview(bytearray(max(_ROOM, 4 * (limit + HEADER.size))))
        self._used = 0

    def move(self) -> bool:
        """Write to the device what one read gives; return False at the end."""
        room, start = self._room, 0
        try:
            count = self._host.recv_into(room[self._used :])
        except BlockingIOError:
            return True
        if count == 0:
            return False
        end = self._used + count
        while end - start >= HEADER.size:
            (length,) = HEADER.unpack_from(room, start)
            if length > self._limit:
                return False
            begin, stop = start + HEADER.size, start + HEADER.size + length
            if stop > end:
                break
            if self._tap is not None:
                # A frame that the kernel does not take is lost, as in the guest.
                with suppress(OSError):
                    os.write(self._tap, room[begin:stop])
            start = stop
        self._used = end - start
        if start and self._used:
            room[: self._used] = bytes(room[start:end])
        return True


class _ToHost:
    def __init__(self, host: socket.socket, tap: int | None, limit: int) -> None:
        self._host = host
        self._tap = tap
        self._limit = limit
        self._room = memoryview(bytearray(max(_ROOM, 4 * (limit + HEADER.size))))
        self._start = self._end = 0

    @property
    def waiting(self) -> bool:
        """Whether the host has not taken everything."""
        return self._end > self._start

    def move(self) -> None:
        """Send what waits, or else gather what the device has and send that."""
        if not self.waiting:
            self._gather()
        try:
            self._start += self._host.send(self._room[self._start : self._end], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        if not self.waiting:
            self._start = self._end = 0

    def _gather(self) -> None:
        if self._tap is None:
            return
        room, end = self._room, 0
        most = HEADER.size + self._limit
        while end + most <= len(room):
            try:
                count = os.readv(self._tap, [room[end + HEADER.size : end + most]])
            except BlockingIOError:
                break
            HEADER.pack_into(room, end, count)
            end += HEADER.size + count
        self._end = end
