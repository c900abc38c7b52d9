"""Owns: the golden bytes of the launch protocol, written by hand, and how their files are read.

A `.hex` file holds hex bytes; `61*300` repeats a byte; `#` begins a comment; a line of `--` ends a
send. Numbers are little-endian, as on every machine a Nitro enclave runs on. Must not know: the
package under test.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def sends(name):
    """Return the sends of a vector, in order."""
    parts = [b""]
    for line in (_FOLDER / f"{name}.hex").read_text().splitlines():
        content = line.partition("#")[0].strip()
        if content == "--":
            parts.append(b"")
            continue
        for word in content.split():
            digits, _, count = word.partition("*")
            parts[-1] += bytes.fromhex(digits) * int(count or 1)
    return parts


def golden(name):
    """Return the bytes of a vector, whatever sends they are in."""
    return b"".join(sends(name))
