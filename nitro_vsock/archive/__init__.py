"""What a tar is: one parser, that of the guest's libarchive, and the guest's rules. Sans-IO.

Knows nothing of descriptors or sockets.
"""

from nitro_vsock.archive.header import DROPPED_TOP, MODE_BITS, PREFIX, RECORD, TEMPLATES
from nitro_vsock.archive.magic import MAGIC_BYTES, compression
from nitro_vsock.archive.members import (
    BLOCK,
    BrokenTarError,
    Data,
    Flaw,
    Kind,
    Member,
    MemberReader,
)
from nitro_vsock.archive.rules import TarChecker, name_flaw, name_parts
from nitro_vsock.archive.tree import Node, Tree

__all__ = [
    "BLOCK",
    "BrokenTarError",
    "DROPPED_TOP",
    "Data",
    "Flaw",
    "Kind",
    "MAGIC_BYTES",
    "MODE_BITS",
    "Member",
    "MemberReader",
    "Node",
    "PREFIX",
    "RECORD",
    "TEMPLATES",
    "TarChecker",
    "Tree",
    "compression",
    "name_flaw",
    "name_parts",
]
