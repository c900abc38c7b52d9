"""Owns: what the text of an option means: sizes, CIDs, environment entries.

Must not know: which command takes them.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import Final

import click

from nitro_vsock.protocol import VMADDR_CID_ANY

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)

_UNITS: Final = "kmgt"


def parse_size(text: str) -> int:
    """Return bytes: `1000`, `64MiB` or `4G` (powers of 1024), `1.5GB` (of 1000), as GNU tools.

    Raises:
        click.BadParameter: it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 1000, 64MiB, 4G or 1.5GB")
    number, unit, suffix = match.groups()
    base = 1000 if suffix and suffix.lower() == "b" else 1024
    power = _UNITS.index(unit.lower()) + 1 if unit else 0
    size = int(Decimal(number) * base**power)
    if size == 0:
        raise click.BadParameter(f"{text!r} is less than one byte")
    return size


def parse_peer_cid(text: str) -> int:
    """Return a CID; VMADDR_CID_ANY for `any`.

    Raises:
        click.BadParameter: it is neither.
    """
    if text == "any":
        return VMADDR_CID_ANY
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor 'any'") from None


def parse_variable(text: str) -> tuple[bytes, bytes]:
    """Return name and value of a `NAME=VALUE`, both as the bytes the shell gave.

    Raises:
        click.BadParameter: it is none.
    """
    name, equals, value = os.fsencode(text).partition(b"=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    return name, value
