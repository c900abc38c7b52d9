"""Owns: decoding CBOR (RFC 8949), as far as a signed image needs it, within bounds.

Knows nothing of: signatures.

The certificate inside is needed for PCR8, which must not depend on an extra; and a decoder that
knows five kinds of values, none of which can ask for more memory than the input has bytes, is
shorter than the bounds that a general one would need.
"""

from __future__ import annotations

from typing import Final, Union

Value = Union[int, bytes, str, "list[Value]", "dict[int | str, Value]"]

_DEPTH: Final = 8

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG = range(7)


class CborError(Exception):
    """What cannot be decoded; the text says why.

    Attributes:
        offset: of the item in the input.
    """

    def __init__(self, text: str, offset: int) -> None:
        super().__init__(text)
        self.offset = offset


def decode(data: bytes, *, tag: int | None = None) -> Value:
    """Return the one item that these bytes are.

    Memory is bounded by the input: a length or count that the rest of it cannot hold is refused
    before anything is allocated. Integers, strings, arrays and maps of definite length are known.

    Args:
        data: the whole item.
        tag: a tag that may stand before it.

    Raises:
        CborError: the bytes are something else, or more than one item.
    """
    decoder = _Decoder(data)
    if tag is not None and data and data[0] >> 5 == _TAG:
        _, number = decoder.head()
        if number != tag:
            raise CborError(f"has tag {number}", 0)
    value = decoder.item(0)
    if decoder.at != len(data):
        raise CborError(f"has {len(data) - decoder.at} bytes after its end", decoder.at)
    return value


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def head(self) -> tuple[int, int]:
        """Return the major type and the number of the next item, and step over them."""
        start = self.at
        if start >= len(self._data):
            raise CborError("ends early", start)
        kind, low = divmod(self._data[start], 32)
        self.at += 1
        if low < 24:
            return kind, low
        if low > 27:
            raise CborError("has an indefinite length or a reserved value", start)
        size = 1 << (low - 24)
        number = self._take(size, start)
        return kind, int.from_bytes(number, "big")

    def item(self, depth: int) -> Value:
        """Return the next item."""
        start = self.at
        if depth > _DEPTH:
            raise CborError("is nested too deeply", start)
        kind, number = self.head()
        if kind == _UINT:
            return number
        if kind == _NEGATIVE:
            return -1 - number
        if kind == _BYTES:
            return self._take(number, start)
        if kind == _TEXT:
            try:
                return self._take(number, start).decode()
            except UnicodeDecodeError:
                raise CborError("has text that is not UTF-8", start) from None
        if kind not in (_ARRAY, _MAP):
            raise CborError("has a tag, a float or a simple value", start)
        # Each item has a byte at least.
        if number * (1 if kind == _ARRAY else 2) > len(self._data) - self.at:
            raise CborError(f"has a count of {number}, more than there are bytes", start)
        if kind == _ARRAY:
            return [self.item(depth + 1) for _ in range(number)]
        found: dict[int | str, Value] = {}
        for _ in range(number):
            where = self.at
            key = self.item(depth + 1)
            if not isinstance(key, (int, str)):
                raise CborError("has a map's key that is no number and no text", where)
            if key in found:
                raise CborError("has a map's key twice", where)
            found[key] = self.item(depth + 1)
        return found

    def _take(self, size: int, start: int) -> bytes:
        data = self._data[self.at : self.at + size]
        if len(data) < size:
            raise CborError("ends early", start)
        self.at += size
        return data


def encode_head(kind: int, number: int) -> bytes:
    """Return the start of an item in its shortest form, as canonical CBOR has it."""
    if number < 24:
        return bytes([kind << 5 | number])
    size = next(size for size in (1, 2, 4, 8) if number < 1 << 8 * size)
    return bytes([kind << 5 | 23 + size.bit_length()]) + number.to_bytes(size, "big")


def encode_bytes(data: bytes) -> bytes:
    """Return a byte string."""
    return encode_head(_BYTES, len(data)) + data


def encode_text(text: str) -> bytes:
    """Return a text string."""
    return encode_head(_TEXT, len(text.encode())) + text.encode()


def encode_numbers(data: bytes) -> bytes:
    """Return an array with a number for each byte."""
    numbers = b"".join(encode_head(_UINT, number) for number in data)
    return encode_head(_ARRAY, len(data)) + numbers
