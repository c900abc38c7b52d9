"""Owns: what else was tried: the package with one thing changed, built beside the real one.

Must not know: what is measured with it.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "nitro_vsock")
STREAM = "csrc/nv_stream.c"
TRANSPORT = "nitro_vsock/transport/stream.py"
SOURCES = "nitro_vsock/rootfs/opened.py"


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        name: what was tried, for people.
        file: where.
        old: text there, once.
        new: what stands in its place.
        strategy: with which it shows.
        transports: over which it is measured; in a VM every launch takes seconds.
        is_cold: whether it is about files that are not in page cache.
    """

    name: str
    file: str
    old: str
    new: str
    strategy: str = "auto"
    transports: tuple[str, ...] = ("unix",)
    is_cold: bool = False


SLICE = "#define SLICE (1u << 20)"
WINDOW = "#define WINDOW (4u << 20)"
HINT = "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)"
STAGE = "mmap.mmap(-1, STAGE_BYTES)"
BOTH = ("unix", "vsock")
VARIANTS = {
    "slice-256k": Variant(
        "slices of 256 KiB for sendfile", STREAM, SLICE, SLICE.replace("1u << 20", "256u << 10")
    ),
    "slice-8m": Variant("slices of 8 MiB for sendfile", STREAM, SLICE, SLICE.replace("1u", "8u")),
    "sndbuf-default": Variant(
        "the kernel's own SO_SNDBUF",
        TRANSPORT,
        "sockets.enlarge_sndbuf(self._fd, SEND_BUFFER)",
        "pass",
    ),
    "sndbuf-16m": Variant(
        "SO_SNDBUF of 16 MiB", TRANSPORT, "SEND_BUFFER: Final = 4 <<", "SEND_BUFFER: Final = 16 <<"
    ),
    "wait-in-kernel": Variant(
        "waiting for room in the kernel on Unix sockets too",
        TRANSPORT,
        "if family == socket.AF_VSOCK:",
        "if True:",
    ),
    "poll": Variant(
        "poll for room in place of waiting in the kernel",
        TRANSPORT,
        "sockets.block_briefly(fd, WAIT_IN_KERNEL)",
        "pass",
        transports=("vsock",),
    ),
    "window-1m": Variant("mappings of 1 MiB", STREAM, WINDOW, WINDOW.replace("4u", "1u"), "mmap"),
    "window-32m": Variant(
        "mappings of 32 MiB", STREAM, WINDOW, WINDOW.replace("4u", "32u"), "mmap", BOTH
    ),
    "no-populate": Variant(
        "mappings without MAP_POPULATE",
        "csrc/nv_sys.h",
        "MAP_SHARED | MAP_POPULATE",
        "MAP_SHARED",
        "mmap",
        BOTH,
    ),
    "huge-pages": Variant(
        "huge pages for the staging buffer",
        "nitro_vsock/core/streams.py",
        f"stage = stack.enter_context({STAGE})",
        f"stage = stack.enter_context({STAGE.replace('STAGE', '4 * STAGE')}); "
        "stage.madvise(mmap.MADV_HUGEPAGE)",
        "read",
    ),
    "no-hint": Variant("no readahead hint", SOURCES, HINT, "pass", is_cold=True),
    "willneed": Variant(
        "POSIX_FADV_WILLNEED for the whole file",
        SOURCES,
        HINT,
        HINT.replace("SEQUENTIAL", "WILLNEED"),
        is_cold=True,
    ),
}


def build(name, folder):
    """Build the package with a change in a folder of its own.

    Returns:
        What to put in front of a Python command, so that it imports that package.
    """
    variant = VARIANTS[name]
    for part in PARTS:
        shutil.copytree(PROJECT / part, folder / part)
    changed = folder / variant.file
    text = changed.read_text()
    assert text.count(variant.old) == 1, f"{variant.file} does not have {variant.old!r} once"
    changed.write_text(text.replace(variant.old, variant.new))
    if variant.file.startswith("csrc"):
        for core in (folder / "nitro_vsock").glob("_core*.so"):
            core.unlink()
        subprocess.run([sys.executable, "csrc/build_core.py"], cwd=folder, check=True)
    return ["env", f"PYTHONPATH={folder}"]
