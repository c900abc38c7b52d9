"""Owns: directory trees to measure with: as many files as asked for, with sizes as in a real /usr.

    python bench/tree_maker.py FOLDER FILES BYTES

Must not know: what is measured, nor anything of the package.
"""

import math
import os
import random
import sys
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

SEED = 20
MEDIAN = 1638
"""Bytes of a file in the middle: half of the files of a Debian system's /usr are smaller."""
SPREAD = 2.0
"""Of the logarithm of a size: a mean nine times the median."""
CAP = 4 * MIB
"""Bytes of the largest of the many; what is missing from the tree's size are larger ones."""
LARGE = (4 * MIB, 128 * MIB)
EMPTY = 0.01
FILES_OF_A_DIRECTORY = 9
SYMLINKS = 0.06
HARD_LINKS = 0.002
"""Links there are beside the files, by file."""
POOL = 8 * MIB
"""Random bytes that contents are cut from: nothing here compresses or deduplicates them."""


@dataclass(frozen=True)
class Made:
    """What a tree has; `size` is the bytes of its files."""

    files: int
    directories: int
    symlinks: int
    hard_links: int
    size: int
    largest: int


def sizes(files, total, rng):
    """Return so many sizes of so many bytes together, in random order."""
    found = [
        0 if rng.random() < EMPTY else min(int(rng.lognormvariate(math.log(MEDIAN), SPREAD)), CAP)
        for _ in range(files)
    ]
    left = total - sum(found)
    low, high = map(math.log, LARGE)
    while left > 0:
        size = min(int(math.exp(rng.uniform(low, high))), left)
        left -= size
        found.append(size)
    rng.shuffle(found)
    return found


def make(root, files, total, *, shrink=1, seed=SEED):
    """Make a tree below `root`, which must not exist, and wait until it is on disk.

    The same arguments make the same tree, on every machine.

    Args:
        root: of the tree.
        files: how many at least: those that fill the tree up to `total` come on top.
        total: bytes of all files.
        shrink: makes each file so many times smaller; all else stays as it is.
        seed: of everything random.
    """
    rng = random.Random(seed)
    pool = memoryview(rng.randbytes(POOL))
    found = sizes(files, total, rng)
    count = max(len(found) // FILES_OF_A_DIRECTORY, 1)
    folders = ["usr", "usr/lib", "usr/share"]
    while len(folders) < count:
        # Each below one that is there already: deep here, flat there.
        parent = folders[rng.randrange(1, len(folders))] if rng.random() < 0.6 else "usr/share"
        folders.append(f"{parent}/package-{len(folders)}")
    for folder in ("", *folders):
        os.mkdir(os.path.join(root, folder))
    symlinks = hard_links = 0
    for number, size in enumerate(found):
        folder = os.path.join(root, folders[rng.randrange(len(folders))])
        name = f"{folder}/file-{number}"
        fd = os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if number % 20 == 0 else 0o644
        )
        try:
            _fill(fd, pool, rng.randrange(POOL // 2), size // shrink)
        finally:
            os.close(fd)
        if rng.random() < SYMLINKS:
            os.symlink(f"file-{number}", f"{folder}/link-{number}")
            symlinks += 1
        if rng.random() < HARD_LINKS:
            os.link(name, f"{folder}/again-{number}")
            hard_links += 1
    os.sync()
    written = [size // shrink for size in found]
    return Made(len(found), len(folders) + 1, symlinks, hard_links, sum(written), max(written))


def _fill(fd, pool, begin, size):
    while size > 0:
        done = os.write(fd, pool[begin : begin + min(size, len(pool) - begin)])
        size -= done
        begin = 0


if __name__ == "__main__":
    print(make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
