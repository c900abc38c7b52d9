"""Owns: making directory trees for tests, a naive model of their archive, and comparing two trees.

Must not know: the package under test.
"""

import io
import os
import random
import stat
import tarfile

DROPPED = {b"dev", b"proc", b"run", b"sys", b"tmp", b"krun-awsnitro"}


def build(root, items, *, order=None, umask=0o022, mtime=None):
    """Make a tree below `root`, which must not exist.

    `items` maps relative bytes paths to (kind, value): "dir" and "file" with (mode, ...), as
    `file(data, mode)` and the functions below it make them. Folders in between are made too.
    `order` shuffles the order of creation.
    """
    old = os.umask(umask)
    try:
        root = os.fsencode(root)
        os.mkdir(root)
        os.chmod(root, 0o755)
        names = list(items)
        random.Random(order).shuffle(names)
        # A link's file comes before it.
        names.sort(key=lambda name: items[name][0] == "link")
        for name in names:
            _make(root, name, items[name])
        for name in items:
            if items[name][0] in ("dir", "file"):
                os.chmod(os.path.join(root, name), items[name][1])
        if mtime is not None:
            for name in items:
                os.utime(os.path.join(root, name), ns=(mtime, mtime), follow_symlinks=False)
    finally:
        os.umask(old)
    return os.fsdecode(root)


def folder(mode=0o755):
    """A directory."""
    return "dir", mode, None


def file(data=b"", mode=0o644):
    """A regular file."""
    return "file", mode, data


def symlink(target):
    """A symbolic link."""
    return "symlink", None, target


def link(name):
    """A hard link to another path of the tree."""
    return "link", None, name


def fifo(mode=0o644):
    """A FIFO."""
    return "fifo", mode, None


def _make(root, name, item):
    kind, mode, value = item
    path = os.path.join(root, name)
    parent = os.path.dirname(path)
    missing = []
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for each in reversed(missing):
        os.mkdir(each)
        os.chmod(each, 0o755)
    if kind == "dir":
        os.makedirs(path, exist_ok=True)
    elif kind == "file":
        with open(path, "wb") as out:
            out.write(value)
    elif kind == "symlink":
        os.symlink(value, path)
    elif kind == "link":
        os.link(os.path.join(root, value), path)
    elif kind == "fifo":
        os.mkfifo(path)
        os.chmod(path, mode)


def _names(root, prefix=b""):
    """Yield every path below root as it stands in an archive: a directory's with its slash."""
    for name in os.listdir(os.path.join(root, prefix)):
        path = prefix + name
        if not prefix and name in DROPPED:
            continue
        info = os.lstat(os.path.join(root, path))
        if stat.S_ISDIR(info.st_mode):
            yield path + b"/"
            yield from _names(root, path + b"/")
        elif not stat.S_ISSOCK(info.st_mode):
            yield path


def model(root):
    """Return the archive of a tree, made by Python's tarfile in the simplest way there is."""
    root = os.fsencode(root)
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out,
        mode="w",
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for name in [b"", *sorted(_names(root))]:
            path = os.fsdecode(os.path.join(root, name.rstrip(b"/")))
            member = tar.gettarinfo(path, (b"rootfs/" + name).decode("utf-8", "surrogateescape"))
            member.uid = member.gid = member.mtime = 0
            member.uname = member.gname = ""
            if member.isreg():
                with open(path, "rb") as data:
                    tar.addfile(member, data)
            else:
                tar.addfile(member)
    return out.getvalue()


def describe(root):
    """Return what a tree is: {path: (type, mode, content, first path of the same file)}."""
    root = os.fsencode(root)
    first, found = {}, {}
    for name in [b"", *sorted(_names(root))]:
        path = os.path.join(root, name.rstrip(b"/"))
        info = os.lstat(path)
        content = None
        if stat.S_ISREG(info.st_mode):
            with open(path, "rb") as data:
                content = data.read()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        key = (info.st_dev, info.st_ino) if stat.S_ISREG(info.st_mode) else name
        found[name] = (
            stat.S_IFMT(info.st_mode),
            stat.S_IMODE(info.st_mode),
            content,
            first.setdefault(key, name),
        )
    return found
