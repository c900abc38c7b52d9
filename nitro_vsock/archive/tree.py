"""Owns: the tree as the guest has it once unpacked. Sans-IO.

Must not know: where the archive comes from, what is in the files.
"""

from __future__ import annotations

from typing import Final

from nitro_vsock.archive.members import Flaw, Kind, Member
from nitro_vsock.archive.rules import name_flaw, name_parts


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_MAX_LINKS: Final = 40
"""Symbolic links the kernel follows in one path (MAXSYMLINKS)."""


class Node:
    """A file of the unpacked tree; hard links share one."""

    __slots__ = ("kind", "link", "mode")

    def __init__(self, kind: Kind, mode: int, link: bytes = b"") -> None:
        self.kind = kind
        self.mode = mode
        self.link = link


class Tree:
    """The tree as it is when the archive has been unpacked. Paths have no slash at either end."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {b"": Node(Kind.DIRECTORY, 0o755)}

    def add(self, member: Member, parts: list[bytes]) -> tuple[Node, Flaw | None]:
        """Add a member whose name below rootfs/ has these parts; return why it is not as it was."""
        node = Node(member.kind, member.mode, member.link)
        if not parts:
            if member.kind is Kind.DIRECTORY:
                return node, None
            text = f"the member rootfs is a {member.kind.value}"
            return node, Flaw("root-not-a-directory", text)
        folder = self._folder(parts[:-1])
        if folder is None:
            text = "the directory it is in is a symbolic link out of the rootfs, or to nothing"
            return node, Flaw("through-symlink", text)
        path = folder + b"/" + parts[-1] if folder else parts[-1]
        if member.kind is Kind.HARD_LINK:
            target = self._linked(member.link)
            if target is None:
                text = f"its target {_text(member.link)!r} is no file before it in the archive"
                return node, Flaw("link-target-missing", text)
            node = target
        earlier = self._nodes.get(path)
        self._nodes[path] = node
        if earlier is None or (earlier.kind is node.kind is Kind.DIRECTORY):
            return node, None
        return node, Flaw("duplicate-member", "the name was there before; the later replaces it")

    def _linked(self, name: bytes) -> Node | None:
        """Return what a hard link leads to."""
        if name_flaw(name) is not None:
            return None
        *folders, last = name_parts(name)[1:] or [b""]
        folder = self._folder(folders, make=False)
        if folder is None:
            return None
        node = self._nodes.get(folder + b"/" + last if folder else last)
        return None if node is None or node.kind is Kind.DIRECTORY else node

    def _folder(self, parts: list[bytes], *, make: bool = True) -> bytes | None:
        """Return the directory of this name while the archive is unpacked, made where it is not.

        None: it leads out of the rootfs or nowhere.
        """
        path = b"/".join(parts)
        node = self._nodes.get(path)
        if node is not None and node.kind is Kind.DIRECTORY:
            return path
        at: list[bytes] = []
        todo = parts[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if not at:
                    return None
                at.pop()
                continue
            here = b"/".join((*at, part))
            node = self._nodes.get(here)
            if node is not None and node.kind is Kind.SYMLINK:
                links += 1
                if links > _MAX_LINKS or node.link.startswith(b"/"):
                    return None
                todo += node.link.split(b"/")[::-1]
                continue
            if node is None or node.kind is not Kind.DIRECTORY:
                # Past a link libarchive makes nothing.
                if links or not make:
                    return None
                self._nodes[here] = Node(Kind.DIRECTORY, 0o755)
            at.append(part)
        return b"/".join(at)

    def find(self, path: bytes) -> Node | None:
        """Return what a path leads to once the tree is the guest's root, where it starts too."""
        at: list[bytes] = []
        todo = path.split(b"/")[::-1]
        links = 0
        node: Node | None = self._nodes[b""]
        while todo:
            part = todo.pop()
            if node is None or node.kind is not Kind.DIRECTORY:
                return None
            if part == b"..":
                del at[-1:]
            elif part not in (b"", b"."):
                at.append(part)
            node = self._nodes.get(b"/".join(at))
            if node is not None and node.kind is Kind.SYMLINK:
                links += 1
                if links > _MAX_LINKS:
                    return None
                at = [] if node.link.startswith(b"/") else at[:-1]
                todo += node.link.split(b"/")[::-1]
                node = self._nodes.get(b"/".join(at))
        return node
