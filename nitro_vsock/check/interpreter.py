"""Owns: what of a tree the kernel would execute.

Must not know: where the archive comes from, how findings are shown.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from nitro_vsock.archive import Flaw, Kind, Node, Tree


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


HEAD: Final = 4096
"""Bytes of a file that are looked into for what it is."""

_SCRIPT_HEAD: Final = 256
"""Bytes the kernel looks into for a script's interpreter (BINPRM_BUF_SIZE)."""

MAX_SCRIPTS: Final = 4
"""Scripts that may be each other's interpreters (exec_binprm of the kernel)."""

_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
"""`os.uname().machine` to `e_machine` (elf.h)."""

_MACHINE_NAMES: Final = {3: "i386", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}

_ELF: Final = b"\x7fELF"

_SCRIPT: Final = b"#!"

_SEGMENT: Final = 56
"""Bytes of a program header; the kernel takes no other."""


class Format(NamedTuple):
    """What a file is to the kernel that is to execute it."""

    kind: str
    """`elf`, `script`, or empty: neither."""
    machine: int = 0
    wide: bool = False
    interpreter: bytes | None = b""
    """Of a script, or an ELF program's loader; empty: none; None: not found in the head."""


NEITHER: Final = Format("")


class Programs:
    """Says whether the kernel would execute a file of the tree."""

    def __init__(self, tree: Tree, formats: Mapping[Node, Format], machine: str) -> None:
        """`formats` has the files that may run; any other is neither program nor script."""
        self._tree = tree
        self._formats = formats
        self._machine_name = machine
        self._machine = _MACHINES.get(machine)

    def flaws(
        self, exec_path: bytes, program: bytes, variable: bytes
    ) -> Iterator[tuple[str, Flaw]]:
        """Yield what is wrong with argv[0] and exec_path; `variable` is envp[0]."""
        if program:
            yield from (("argv[0]", flaw) for flaw in self._of_program(program, variable))
        if exec_path and exec_path != program and self._tree.find(exec_path) is None:
            text = f"{_text(exec_path)!r} is not in the rootfs"
            yield "exec_path", Flaw("exec-path-missing", text)

    def _of_program(self, program: bytes, variable: bytes) -> list[Flaw]:
        """As execvpe does, take the first file of PATH that runs; else say what is wrong."""
        name, _, value = variable.partition(b"=")
        if b"/" in program:
            paths = [program]
        elif name == b"PATH":
            paths = [folder + b"/" + program for folder in value.split(b":")]
        else:
            return []  # path-not-first says so
        worst: list[Flaw] = []
        for path in paths:
            node = self._tree.find(path)
            if node is not None:
                flaws = self._of_file(path, node, "program")
                if not flaws:
                    return []
                worst = worst or flaws
        if worst:
            return worst
        where = "" if b"/" in program else f", in no directory of {_text(variable)}"
        return [Flaw("program-missing", f"{_text(program)!r} is not in the rootfs{where}")]

    def _of_file(
        self, path: bytes, node: Node, role: str, scripts: int = 0, *, is_loader: bool = False
    ) -> list[Flaw]:
        shown = repr(_text(path))
        if node.kind is not Kind.FILE:
            return [Flaw(f"{role}-not-executable", f"{shown} is a {node.kind.value}, not a file")]
        flaws = []
        if not node.mode & 0o111:
            text = f"{shown} has mode {node.mode:04o}: nobody may execute it"
            flaws.append(Flaw(f"{role}-not-executable", text))
        form = self._formats.get(node, NEITHER)
        if not form.kind:
            text = f"{shown} is neither an ELF program nor a script that begins with #!"
            flaws.append(Flaw("exec-format", text))
        of_host = form.machine == self._machine and form.wide
        if form.kind == "elf" and self._machine is not None and not of_host:
            built = _MACHINE_NAMES.get(form.machine, f"machine {form.machine}")
            bits = 64 if form.wide else 32
            text = f"{shown} is a {bits}-bit program for {built}, not for {self._machine_name}"
            flaws.append(Flaw("wrong-machine", text))
        if is_loader:  # the kernel asks it for no loader of its own
            return flaws
        if form.interpreter is None:
            text = f"the name of the program loader of {shown} is not in its first {HEAD} bytes"
            flaws.append(Flaw("interpreter-unknown", text))
        elif form.interpreter:
            flaws += self._of_interpreter(shown, form, scripts)
        return flaws

    def _of_interpreter(self, shown: str, form: Format, scripts: int) -> list[Flaw]:
        path = form.interpreter or b""
        if form.kind == "script":
            scripts += 1
            if scripts > MAX_SCRIPTS:
                text = f"{shown} is the interpreter of a script whose interpreter is a script ..."
                return [Flaw("too-many-interpreters", text)]
        node = self._tree.find(path)
        if node is None:
            text = f"{shown} needs {_text(path)!r}, which is not in the rootfs"
            return [Flaw("interpreter-missing", text)]
        return self._of_file(path, node, "interpreter", scripts, is_loader=form.kind == "elf")


def may_run(head: bytes) -> bool:
    """Whether a file that begins with `head`, however short, may turn out to be a program."""
    return _ELF.startswith(head[:4]) or _SCRIPT.startswith(head[:2])


def recognise(head: bytes) -> Format:
    """Return what a file is that begins with `head`."""
    if head.startswith(_SCRIPT):
        return _recognise_script(head[:_SCRIPT_HEAD])
    if head.startswith(_ELF):
        return _recognise_elf(head)
    return NEITHER


def _recognise_script(head: bytes) -> Format:
    """Take the interpreter's name as the kernel's load_script does."""
    line, newline, _ = head[len(_SCRIPT) :].partition(b"\n")
    line = line.lstrip(b" \t")
    name = re.split(rb"[ \t\0]", line, maxsplit=1)[0]
    cut_off = not newline and len(name) == len(line) and len(head) == _SCRIPT_HEAD
    if not name or cut_off:
        return NEITHER
    return Format("script", interpreter=name)


def _recognise_elf(head: bytes) -> Format:
    wide, order = head[4:5] == b"\2", ">" if head[5:6] == b"\2" else "<"
    try:
        kind, machine = struct.unpack_from(f"{order}HH", head, 16)
        if kind not in (2, 3):  # ET_EXEC, ET_DYN
            return NEITHER
        if not wide:
            return Format("elf", machine)
        (offset,) = struct.unpack_from(f"{order}Q", head, 32)
        size, count = struct.unpack_from(f"{order}HH", head, 54)
    except struct.error:  # shorter than its own header
        return NEITHER
    if size != _SEGMENT:
        return NEITHER
    try:
        for index in range(count):
            at = offset + index * size
            (segment,) = struct.unpack_from(f"{order}I", head, at)
            if segment == 3:  # PT_INTERP
                start, length = (
                    struct.unpack_from(f"{order}Q", head, at + field)[0] for field in (8, 32)
                )
                name = head[start : start + length]
                whole = len(name) == length
                name = name.partition(b"\0")[0]
                return Format("elf", machine, wide, name if whole else None)
    except (struct.error, OverflowError):
        return Format("elf", machine, wide, None)
    return Format("elf", machine, wide)
