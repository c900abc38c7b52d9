"""Owns: arguments <-> bytes: validation, encoding, packets, incremental decoding. Sans-IO.

Must not know: sockets, files, time. The rootfs's payload passes through untouched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Union

from nitro_vsock.errors import (
    BadStringError,
    DuplicateFrameError,
    EarlyEndError,
    InvalidArgumentError,
    LimitExceededError,
    MissingFrameError,
    UnknownFrameError,
    require_int,
)
from nitro_vsock.protocol import (
    ARGUMENTS_LIMIT,
    LENGTH,
    MAX_STRING_BYTES,
    MIN_PACKET,
    PACKET_LIMIT,
    U64_MAX,
    FrameId,
)

Text = Union[str, bytes]


def encode_text(name: str, value: Text, *, allow_empty: bool = False) -> bytes:
    """Return a path, argv or envp string as the bytes the guest is to get, without the NUL.

    Args:
        name: what to call it in an error.
        value: str (sent as UTF-8) or bytes.
        allow_empty: let the empty string through; its effect in the guest is unverified.

    Raises:
        InvalidArgumentError: another type, surrogates, a NUL inside, empty, or longer than
            MAX_STRING_BYTES.
    """
    if isinstance(value, str):
        try:
            encoded = value.encode()
        except UnicodeEncodeError as error:
            limit = f"must be encodable as UTF-8 (surrogate at index {error.start})"
            raise InvalidArgumentError(name, value, limit) from None
    elif isinstance(value, bytes):
        encoded = value
    else:
        raise InvalidArgumentError(name, value, "must be str or bytes")
    if b"\0" in encoded:
        limit = f"must not contain NUL (at byte {encoded.index(0)})"
        raise InvalidArgumentError(name, value, limit)
    if not encoded and not allow_empty:
        raise InvalidArgumentError(name, value, "must not be empty")
    if len(encoded) > MAX_STRING_BYTES:
        limit = (
            f"must be at most {MAX_STRING_BYTES} bytes (one NSM request), is {len(encoded)} bytes"
        )
        raise InvalidArgumentError(name, value, limit)
    return encoded


def encode_texts(
    name: str, values: Iterable[Text], *, allow_empty: bool = False
) -> tuple[bytes, ...]:
    """Return a list of strings encoded; at least one, and not a single str by mistake.

    Raises:
        InvalidArgumentError: as `encode_text`, naming the index; or no list, or an empty one.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(name, values, "must be a list of strings")
    encoded = tuple(
        encode_text(f"{name}[{index}]", value, allow_empty=allow_empty)
        for index, value in enumerate(values)
    )
    if not encoded:
        raise InvalidArgumentError(name, [], "must have at least one entry")
    return encoded


@dataclass(frozen=True)
class EnclaveArg:
    """One frame. The subclasses carry the reference's names."""

    frame_id: ClassVar[FrameId]

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (header that must not be cut, payload that may be)."""
        yield bytes((self.frame_id,)), b""

    def encode(self) -> bytes:
        """Return the frame's bytes; of a RootFilesystem only id and length."""
        return b"".join(header + payload for header, payload in self._chunks())


@dataclass(frozen=True)
class RootFilesystem(EnclaveArg):
    """The root file system, a plain tar.

    Attributes:
        length: bytes of the archive, 1 to 2**64 - 1.
    """

    frame_id = FrameId.ROOT_FILESYSTEM
    length: int

    def __post_init__(self) -> None:
        require_int("rootfs length", self.length, 1, U64_MAX)

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        yield bytes((self.frame_id,)) + LENGTH.pack(self.length), b""


@dataclass(frozen=True)
class ExecPath(EnclaveArg):
    """The program's path; it is measured, what runs is argv[0].

    Attributes:
        path: without NUL.
    """

    frame_id = FrameId.EXEC_PATH
    path: bytes

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        yield bytes((self.frame_id,)) + LENGTH.pack(len(self.path) + 1), self.path + b"\0"


@dataclass(frozen=True)
class _Strings(EnclaveArg):
    strings: tuple[bytes, ...]

    def _chunks(self) -> Iterator[tuple[bytes, bytes]]:
        yield bytes((self.frame_id,)) + LENGTH.pack(len(self.strings)), b""
        for string in self.strings:
            yield LENGTH.pack(len(string) + 1), string + b"\0"


@dataclass(frozen=True)
class ExecArgv(_Strings):
    """The program's arguments; strings[0] is what is executed."""

    frame_id = FrameId.EXEC_ARGV


@dataclass(frozen=True)
class ExecEnvp(_Strings):
    """The program's environment, `NAME=value` each."""

    frame_id = FrameId.EXEC_ENVP


@dataclass(frozen=True)
class NetworkProxy(EnclaveArg):
    """Flag: the guest connects to the network service."""

    frame_id = FrameId.NETWORK_PROXY


@dataclass(frozen=True)
class AppOutput(EnclaveArg):
    """Flag: the guest sends the program's output to the output service."""

    frame_id = FrameId.APP_OUTPUT


@dataclass(frozen=True)
class Finished(EnclaveArg):
    """The last frame."""

    frame_id = FrameId.FINISHED


@dataclass(frozen=True)
class RootfsData:
    """A piece of the root file system, as it arrived: valid until the next feed.

    Attributes:
        data: the bytes.
    """

    data: memoryview


def encode_packets(args: Sequence[EnclaveArg]) -> list[bytes]:
    """Return the bytes of all frames given, cut into the sends that carry them.

    No send is over PACKET_LIMIT bytes and none cuts a length, because the guest reads a length
    with one read. None is under MIN_PACKET bytes unless it is the only one.

    Raises:
        InvalidArgumentError: more bytes in all than ARGUMENTS_LIMIT, the guest's receive window:
            beyond it not even small sends keep a length whole.
    """
    stream = bytearray()
    starts: list[int] = []
    ends: list[int] = []
    for arg in args:
        for header, payload in arg._chunks():
            starts.append(len(stream))
            stream += header
            ends.append(len(stream))
            stream += payload
    if len(stream) > ARGUMENTS_LIMIT:
        limit = f"must be at most {ARGUMENTS_LIMIT} bytes encoded (the guest's receive window)"
        raise InvalidArgumentError("arguments", len(stream), limit)

    def before_header(cut: int) -> int:
        index = bisect_left(ends, cut)
        inside = index < len(starts) and starts[index] < cut < ends[index]
        return starts[index] if inside else cut

    packets = []
    position = 0
    while len(stream) - position > PACKET_LIMIT:
        cut = min(position + PACKET_LIMIT, len(stream) - MIN_PACKET)
        cut = before_header(cut)
        packets.append(bytes(stream[position:cut]))
        position = cut
    packets.append(bytes(stream[position:]))
    return packets


@dataclass(frozen=True)
class Limits:
    """What a decoder accepts; checked before anything is allocated.

    Attributes:
        rootfs_bytes: longest root file system.
        string_bytes: longest string, NUL included (Linux's MAX_ARG_STRLEN by default).
        strings: most entries of argv, and of envp.
        arguments_bytes: all strings together.
    """

    rootfs_bytes: int = 1 << 40
    string_bytes: int = 128 << 10
    strings: int = 1 << 16
    arguments_bytes: int = 16 << 20


DEFAULT_LIMITS: Final = Limits()

MANDATORY: Final = (
    FrameId.ROOT_FILESYSTEM,
    FrameId.EXEC_PATH,
    FrameId.EXEC_ARGV,
    FrameId.EXEC_ENVP,
)

Event = Union[EnclaveArg, RootfsData]


@dataclass
class _List:
    """A string list under construction."""

    frame: FrameId
    count: int
    strings: list[bytes] = field(default_factory=list)


class FrameDecoder:
    """Turns received bytes into events, however they are cut.

    A `RootFilesystem` event comes when its length is known, then `RootfsData` pieces. After
    `Finished` nothing more is taken; what follows it is counted in `trailing`, what came up to the
    last event in `taken`.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._seen: list[FrameId] = []
        self._field = bytearray()
        self._need = 1
        self._state = self._on_id
        self._rootfs_left = 0
        self._list: _List | None = None
        self._string_bytes = 0
        self.finished = False
        self.taken = 0
        self.trailing = 0

    @property
    def seen(self) -> tuple[FrameId, ...]:
        """Frame ids in the order they came."""
        return tuple(self._seen)

    @property
    def need(self) -> int:
        """Bytes that complete the field at hand; 0 at the end."""
        if self.finished:
            return 0
        return self._rootfs_left or self._need - len(self._field)

    @property
    def in_length(self) -> bool:
        """True where a length or count comes next: the guest takes it with one read."""
        return self._state in (self._on_path_length, self._on_count, self._on_string_length) or (
            self._state == self._on_rootfs_length
        )

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """Yield the events that complete with `data`; iterate to the end before feeding more.

        Raises:
            UnknownFrameError, DuplicateFrameError, MissingFrameError, LimitExceededError,
            BadStringError: as their names say; the decoder is of no use afterwards.
        """
        view = memoryview(data)
        while view and not self.finished:
            if self._rootfs_left:
                piece, view = view[: self._rootfs_left], view[self._rootfs_left :]
                self._rootfs_left -= len(piece)
                self.taken += len(piece)
                yield RootfsData(piece)
                continue
            missing = self._need - len(self._field)
            self.taken += min(missing, len(view))
            self._field += view[:missing]
            view = view[missing:]
            if len(self._field) == self._need:
                whole = bytes(self._field)
                self._field.clear()
                event = self._state(whole)
                if event is not None:
                    yield event
        self.trailing += len(view)

    def end(self) -> None:
        """Say that the stream has ended.

        Raises:
            EarlyEndError: Finished has not come.
        """
        if self.finished:
            return
        if self._rootfs_left:
            where = f"{self._rootfs_left} bytes short of the rootfs's end"
        elif self._state == self._on_id:
            where = "where a frame id was due"
        else:
            where = f"in {self._seen[-1].name}, {self.need} bytes short of a field's end"
        raise EarlyEndError(f"the stream ended before Finished, {where}")

    def _expect(self, size: int, state: object) -> None:
        self._need = size
        self._state = state  # type: ignore[assignment]

    def _on_id(self, data: bytes) -> Event | None:
        try:
            frame = FrameId(data[0])
        except ValueError:
            raise UnknownFrameError(f"frame id {data[0]} is not one of the protocol's") from None
        if frame in self._seen:
            raise DuplicateFrameError(f"frame {frame.name} came twice")
        if frame is FrameId.FINISHED:
            missing = [wanted.name for wanted in MANDATORY if wanted not in self._seen]
            if missing:
                raise MissingFrameError(f"Finished came without {', '.join(missing)}")
            self.finished = True
        self._seen.append(frame)
        if frame is FrameId.ROOT_FILESYSTEM:
            self._expect(LENGTH.size, self._on_rootfs_length)
        elif frame is FrameId.EXEC_PATH:
            self._expect(LENGTH.size, self._on_path_length)
        elif frame in (FrameId.EXEC_ARGV, FrameId.EXEC_ENVP):
            self._expect(LENGTH.size, self._on_count)
        else:
            return _FLAGS[frame]()
        return None

    def _bounded(self, data: bytes, what: str, least: int, most: int) -> int:
        value: int = LENGTH.unpack(data)[0]
        if not least <= value <= most:
            raise LimitExceededError(f"{what} is {value}, must be {least} to {most}")
        return value

    def _on_rootfs_length(self, data: bytes) -> Event:
        length = self._bounded(data, "rootfs length", 1, self._limits.rootfs_bytes)
        self._rootfs_left = length
        self._expect(1, self._on_id)
        return RootFilesystem(length)

    def _string_length(self, data: bytes, what: str) -> int:
        length = self._bounded(data, f"{what} length", 1, self._limits.string_bytes)
        self._string_bytes += length
        if self._string_bytes > self._limits.arguments_bytes:
            raise LimitExceededError(
                f"strings are over {self._limits.arguments_bytes} bytes together"
            )
        return length

    def _on_path_length(self, data: bytes) -> None:
        self._expect(self._string_length(data, "ExecPath"), self._on_path)

    def _on_path(self, data: bytes) -> Event:
        self._expect(1, self._on_id)
        return ExecPath(_strip_nul(data, "ExecPath"))

    def _on_count(self, data: bytes) -> None:
        frame = self._seen[-1]
        count = self._bounded(data, f"{frame.name} count", 1, self._limits.strings)
        self._list = _List(frame, count)
        self._expect(LENGTH.size, self._on_string_length)

    def _current(self) -> _List:
        assert self._list is not None  # noqa: S101 - _on_count always comes first
        return self._list

    def _on_string_length(self, data: bytes) -> None:
        current = self._current()
        what = f"{current.frame.name}[{len(current.strings)}]"
        self._expect(self._string_length(data, what), self._on_string)

    def _on_string(self, data: bytes) -> Event | None:
        current = self._current()
        what = f"{current.frame.name}[{len(current.strings)}]"
        current.strings.append(_strip_nul(data, what))
        if len(current.strings) < current.count:
            self._expect(LENGTH.size, self._on_string_length)
            return None
        self._expect(1, self._on_id)
        strings = tuple(current.strings)
        return ExecArgv(strings) if current.frame is FrameId.EXEC_ARGV else ExecEnvp(strings)


_FLAGS: Final = {
    FrameId.NETWORK_PROXY: NetworkProxy,
    FrameId.APP_OUTPUT: AppOutput,
    FrameId.FINISHED: Finished,
}


def _strip_nul(data: bytes, what: str) -> bytes:
    if data[-1]:
        raise BadStringError(f"{what} has no trailing NUL")
    if data.index(0) != len(data) - 1:
        raise BadStringError(f"{what} has a NUL inside, at byte {data.index(0)}")
    return data[:-1]
