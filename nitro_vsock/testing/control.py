"""Owns: messages between the emulator and its helper process: JSON objects with descriptors.

Must not know: what they say.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Final

_HEAD: Final = struct.Struct("=I")

_MAX_FDS: Final = 4


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message; the descriptors stay the caller's.

    Raises:
        OSError: the other end is gone.
    """
    body = json.dumps(message).encode()
    data = _HEAD.pack(len(body)) + body
    # Without a SIGPIPE, which only Python programs ignore by themselves.
    # Not socket.send_fds and recv_fds: until Python 3.13 they forget their flags.
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    if sent < len(data):
        sock.sendall(data[sent:], socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for a message and return it; the descriptors are the caller's now.

    Raises:
        EOFError: the other end is gone.
    """
    try:
        room = socket.CMSG_SPACE(_MAX_FDS * array("i").itemsize)
        head, extra, _, _ = sock.recvmsg(_HEAD.size, room, socket.MSG_CMSG_CLOEXEC)
        fds = array("i")
        for _, _, data in extra:  # nothing but SCM_RIGHTS comes here
            fds.frombytes(data)
        try:
            head += _exactly(sock, _HEAD.size - len(head))
            message: dict[str, Any] = json.loads(_exactly(sock, _HEAD.unpack(head)[0]))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
    except ConnectionError:
        raise EOFError from None
    return message, list(fds)


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
