"""Owns: archives of many kinds, each with a program in it: odd ones, and ones a guest may stop at.

Must not know: which is which; the guest is asked.
"""

from __future__ import annotations

import tarfile

from enclave.trees import Tar, block, padded, pax

GNU, PAX, USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT
LONG = "n" * 90
SECTIONS = ("dev", "proc", "run", "sys", "tmp")


def kinds(probe: bytes) -> dict[str, bytes]:
    """Return the archives by name."""

    def tar(form: int = GNU) -> Tar:
        return Tar(probe, form)

    def raw(*blocks: bytes) -> bytes:
        return tar().raw(b"".join(blocks)).bytes()

    def file(name: bytes, text: bytes = b"data", **fields: bytes) -> bytes:
        return block(name, size=len(text), **fields) + padded(text)

    whole = tar().bytes()
    bare = tar().unfinished()
    return {
        # as tools make them
        "GNU": whole,
        "PAX, ASCII": tar(PAX).bytes(),
        "ustar": tar(USTAR).bytes(),
        "directories with a slash": tar().folder("d").folder("d/e").bytes(),
        "rootfs itself": Tar()
        .add("rootfs", prefix="", type=tarfile.DIRTYPE, mode=0o755)
        .raw(bare)
        .bytes(),
        "a dot before": Tar().add("bin/probe", probe, 0o755, prefix="./rootfs/").bytes(),
        "double slashes": tar().add("/a//b", b"x").bytes(),
        "dots inside": tar().add("a/./b", b"x").bytes(),
        "names of dots": tar().add("...", b"x").add("..a", b"x").add("b..", b"x").bytes(),
        "GNU long names": tar().add(f"{LONG}/{LONG}/{LONG}", b"x").bytes(),
        "PAX long names": tar(PAX).add(f"{LONG}/{LONG}/{LONG}", b"x").bytes(),
        "ustar prefix": tar(USTAR).add(f"{LONG}/{LONG}", b"x").bytes(),
        "name of 255": tar().add("n" * 255, b"x").bytes(),
        "name of 256": tar().add("n" * 256, b"x").bytes(),
        "path of 4,000": tar().add("/".join([LONG] * 43), b"x").bytes(),
        "path of 5,000": tar().add("/".join([LONG] * 55), b"x").bytes(),
        "long link": tar().link("l", "x" * 300).bytes(),
        "link of 4,095": tar().link("l", "x" * 4095).bytes(),
        "link of 4,096": tar().link("l", "x" * 4096).bytes(),
        "GNU, UTF-8 names": tar().add("é/ünï", b"x").bytes(),
        "ustar, UTF-8 names": tar(USTAR).add("é", b"x").bytes(),
        "GNU, Latin-1 names": raw(file(b"rootfs/\xe9")),
        "PAX, UTF-8 name": tar(PAX).add("é", b"x").bytes(),
        "PAX, UTF-8 link": tar(PAX).link("l", "é").bytes(),
        "PAX, UTF-8 owner": tar(PAX).add("a", b"x", uname="é").bytes(),
        "PAX, UTF-8 group": tar(PAX).add("a", b"x", gname="é").bytes(),
        "GNU, UTF-8 owner": tar().add("a", b"x", uname="é").bytes(),
        "PAX, UTF-8 comment": raw(pax(b"comment", "é".encode()), file(b"rootfs/a")),
        "PAX, UTF-8 hardlink": tar(PAX)
        .add("a", b"x")
        .raw(pax(b"linkpath", "rootfs/é".encode()))
        .hard("b", "a")
        .bytes(),
        "PAX, control character": raw(pax(b"path", b"rootfs/a\tb"), file(b"rootfs/a")),
        "newline in a name": tar().add("a\nb", b"x").bytes(),
        "space in a name": tar().add(" a b ", b"x").bytes(),
        "backslash in a name": tar().add("a\\b", b"x").bytes(),
        # links
        "hard link": tar().add("a", b"x").hard("b", "a").bytes(),
        "hard link twice": tar().add("a", b"x").hard("b", "a").hard("c", "b").bytes(),
        "hard link before its target": tar().hard("b", "a").add("a", b"x").bytes(),
        "hard link to nothing": tar().hard("b", "nothing").bytes(),
        "hard link to itself": tar().add("a", b"x").hard("a", "a").bytes(),
        "hard link to a directory": tar().folder("d").hard("b", "d").bytes(),
        "hard link to a link": tar().link("l", "bin/probe").hard("b", "l").bytes(),
        "hard link out of rootfs": tar().add("b", type=tarfile.LNKTYPE, linkname="init").bytes(),
        "hard link to a dotted name": tar()
        .add("a", b"x")
        .add("b", type=tarfile.LNKTYPE, linkname="./rootfs/a")
        .bytes(),
        "hard link with data": raw(
            file(b"rootfs/a"), block(b"rootfs/b", b"1", 4, link=b"rootfs/a") + padded(b"data")
        ),
        "PAX hard link with data": tar(PAX)
        .add("a", b"xxxx")
        .raw(pax(b"size", b"4") + block(b"rootfs/b", b"1", 4, link=b"rootfs/a") + padded(b"data"))
        .bytes(),
        "symbolic link": tar().link("l", "bin/probe").bytes(),
        "dangling link": tar().link("l", "nowhere").bytes(),
        "link to itself": tar().link("l", "l").bytes(),
        "link out of the tree": tar().link("l", "../../../etc").bytes(),
        "empty link": tar().link("l", "").bytes(),
        "through a link to a directory": tar().folder("d").link("l", "d").add("l/a", b"x").bytes(),
        "through a link to nothing": tar().link("l", "d").add("l/a", b"x").bytes(),
        "through an absolute link": tar().folder("d").link("l", "/d").add("l/a", b"x").bytes(),
        "through a link to a file": tar().link("l", "bin/probe").add("l/a", b"x").bytes(),
        "through a link upwards": tar().folder("d").link("d/l", "..").add("d/l/a", b"x").bytes(),
        "through a file": tar().add("a", b"x").add("a/b", b"y").bytes(),
        "a link replaced by a file": tar().link("l", "nowhere").add("l", b"x").bytes(),
        "a link replaced by a directory": tar().link("l", "bin").folder("l").bytes(),
        "a link to a file replaced by a directory": tar()
        .link("l", "bin/probe")
        .folder("l")
        .bytes(),
        # twice
        "file twice": tar().add("a", b"x").add("a", b"y").bytes(),
        "directory twice": tar().folder("d").folder("d").bytes(),
        "file, then directory": tar().add("a", b"x").folder("a").bytes(),
        "empty directory, then file": tar().folder("d").add("d", b"x").bytes(),
        "full directory, then file": tar().folder("d").add("d/a", b"x").add("d", b"x").bytes(),
        "full directory, then link": tar().folder("d").add("d/a", b"x").link("d", "bin").bytes(),
        # kinds
        "FIFO": tar().add("f", type=tarfile.FIFOTYPE).bytes(),
        "character device": tar().add("n", type=tarfile.CHRTYPE, devmajor=1, devminor=3).bytes(),
        "block device": tar().add("n", type=tarfile.BLKTYPE, devmajor=7, devminor=0).bytes(),
        "device with a large number": tar()
        .add("n", type=tarfile.CHRTYPE, devmajor=4000, devminor=70000)
        .bytes(),
        "contiguous file": raw(
            file(b"rootfs/a").replace(b"", b"", 0), block(b"rootfs/c", b"7", 4) + padded(b"data")
        ),
        "old file type": raw(block(b"rootfs/a", b"\0", 4) + padded(b"data")),
        "old directory": raw(block(b"rootfs/d/", b"\0")),
        "unknown type Z": raw(block(b"rootfs/a", b"Z", 4) + padded(b"data")),
        "unknown type 8": raw(block(b"rootfs/a", b"8", 4) + padded(b"data")),
        "volume label": raw(block(b"label", b"V")),
        "multi-volume": raw(block(b"rootfs/a", b"M", 4) + padded(b"data")),
        "GNU dump directory": raw(block(b"rootfs/d/", b"D", 4) + padded(b"Ya\0\0")),
        "Solaris extended header": raw(
            block(b"x", b"X", 20) + padded(b"20 path=rootfs/solar\n"[:20]), file(b"rootfs/a")
        ),
        "ACL entry": raw(block(b"rootfs/a", b"A", 4) + padded(b"data"), file(b"rootfs/a")),
        "directory with data": raw(block(b"rootfs/d/", b"5", 4) + padded(b"data")),
        "link with a size": raw(block(b"rootfs/l", b"2", 4, link=b"bin")),
        # modes and owners
        "mode 0": tar().add("a", b"x", 0).bytes(),
        "mode 7777": tar().add("a", b"x", 0o7777).bytes(),
        "directory of mode 0, filled": tar().folder("d", 0).add("d/a", b"x").bytes(),
        "directory of mode 1777": tar().folder("d", 0o1777).bytes(),
        "mode not octal": raw(file(b"rootfs/a", mode=b"0000x44\0")),
        "mode of spaces": raw(file(b"rootfs/a", mode=b"        ")),
        "owner of eights": raw(file(b"rootfs/a", uid=b"8888888\0")),
        "owner in base 256": raw(file(b"rootfs/a", uid=b"\x80\0\0\0\x7f\xff\xff\xff")),
        "owner below zero": raw(file(b"rootfs/a", uid=b"\xff" * 8)),
        "time in base 256": raw(file(b"rootfs/a", mtime=b"\xff" * 12)),
        "PAX times": raw(pax(b"mtime", b"-1.5"), file(b"rootfs/a")),
        "PAX time of letters": raw(pax(b"mtime", b"soon"), file(b"rootfs/a")),
        "PAX uid of letters": raw(pax(b"uid", b"root"), file(b"rootfs/a")),
        "PAX xattr": raw(pax(b"SCHILY.xattr.user.a", b"b"), file(b"rootfs/a")),
        "PAX capability": raw(
            pax(b"SCHILY.xattr.security.capability", b"\1\0\0\2" + bytes(16)), file(b"rootfs/a")
        ),
        "PAX ACL": raw(
            pax(b"SCHILY.acl.access", b"user::rw-,group::r--,other::r--"), file(b"rootfs/a")
        ),
        "PAX ACL of letters": raw(pax(b"SCHILY.acl.access", b"nonsense"), file(b"rootfs/a")),
        "PAX file flags": raw(pax(b"SCHILY.fflags", b"immutable"), file(b"rootfs/a")),
        "PAX unknown key": raw(pax(b"VENDOR.key", b"v"), file(b"rootfs/a")),
        "PAX charset": raw(
            pax(b"hdrcharset", b"BINARY"), pax(b"path", b"rootfs/\xff"), file(b"rootfs/a")
        ),
        "PAX binary path": raw(pax(b"path", b"rootfs/\xff"), file(b"rootfs/a")),
        # PAX headers
        "PAX path": raw(pax(b"path", b"rootfs/b"), file(b"rootfs/a")),
        "PAX empty path": raw(pax(b"path", b""), file(b"rootfs/a")),
        "PAX path outside": raw(pax(b"path", b"etc/a"), file(b"rootfs/a")),
        "PAX size": raw(pax(b"size", b"4"), block(b"rootfs/a") + padded(b"data")),
        "PAX size 0": raw(pax(b"size", b"0"), file(b"rootfs/a", b"")),
        "PAX size of letters": raw(pax(b"size", b"abc"), file(b"rootfs/a")),
        "PAX size below zero": raw(pax(b"size", b"-5"), file(b"rootfs/a")),
        "PAX size past the end": raw(pax(b"size", b"99999999"), file(b"rootfs/a")),
        "PAX global": raw(pax(b"comment", b"c", b"g"), file(b"rootfs/a")),
        "PAX global path": raw(pax(b"path", b"etc/x", b"g"), file(b"rootfs/a")),
        "PAX header of 0 bytes": raw(block(b"x", b"x"), file(b"rootfs/a")),
        "PAX header twice": raw(pax(b"comment", b"1"), pax(b"comment", b"2"), file(b"rootfs/a")),
        "PAX record too long": raw(
            block(b"x", b"x", 17) + padded(b"99 path=rootfs/a\n"), file(b"rootfs/a")
        ),
        "PAX record without length": raw(
            block(b"x", b"x", 14) + padded(b"path=rootfs/a\n"), file(b"rootfs/a")
        ),
        "PAX record without newline": raw(
            block(b"x", b"x", 17) + padded(b"17 path=rootfs/ab"), file(b"rootfs/a")
        ),
        "PAX header without a member": tar().raw(pax(b"comment", b"c")).unfinished(),
        "PAX header at the end": raw(pax(b"comment", b"c")),
        "PAX header of 8 GiB": raw(
            block(b"x", b"x", size_field=b"77777777777\0"), file(b"rootfs/a")
        ),
        "PAX header of 2 MiB": raw(pax(b"comment", b"c" * (2 << 20)), file(b"rootfs/a")),
        # numbers
        "base-256 size": raw(file(b"rootfs/a", size_field=b"\x80" + bytes(10) + b"\4")),
        "size below zero": raw(file(b"rootfs/a", size_field=b"-0000001000\0")),
        "base-256 size below zero": raw(file(b"rootfs/a", size_field=b"\xff" * 12)),
        "size of letters": raw(file(b"rootfs/a", size_field=b"abcdefghijk\0")),
        "size of spaces": raw(block(b"rootfs/a", size_field=b" " * 12)),
        "size with leading spaces": raw(file(b"rootfs/a", size_field=b"          4\0")),
        "size past the end": raw(file(b"rootfs/a", size_field=b"00077777777\0")),
        "signed checksum": raw(file(b"rootfs/\xe9")),
        "wrong checksum": raw(file(b"rootfs/a", checksum=b"012345\0 ")),
        "empty checksum": raw(file(b"rootfs/a", checksum=b"\0" * 8)),
        # ends
        "no end-of-archive": bare,
        "one block at the end": bare + bytes(512),
        "junk behind the end": whole + b"junk" * 200,
        "a member behind the end": bare + bytes(1024) + Tar().add("dev/x", b"x").bytes(),
        "one zero block, then a member": raw(bytes(512), file(b"rootfs/late")),
        "not of whole blocks": bare + bytes(100),
        "cut in a header": bare + file(b"rootfs/a")[:300],
        "cut in data": bare + block(b"rootfs/a", size=4000) + b"data",
        "cut in a long name": bare + block(b"x", b"L", 300) + b"rootfs/a",
        "data not padded": bare + block(b"rootfs/a", size=4) + b"data",
        "two archives": whole + whole,
        # GNU extensions
        "long name without a member": bare + block(b"x", b"L", 9) + padded(b"rootfs/a\0"),
        "long name twice": raw(
            *(block(b"x", b"L", 9) + padded(b"rootfs/" + c + b"\0") for c in (b"a", b"b")),
            file(b"rootfs/c"),
        ),
        "long name without NUL": raw(block(b"x", b"L", 8) + padded(b"rootfs/a"), file(b"rootfs/c")),
        "long name of 0 bytes": raw(block(b"x", b"L"), file(b"rootfs/c")),
        "long name and PAX": raw(
            block(b"x", b"L", 9) + padded(b"rootfs/a\0"),
            pax(b"path", b"rootfs/b"),
            file(b"rootfs/c"),
        ),
        "long link name of a file": raw(
            block(b"x", b"K", 5) + padded(b"link\0"), file(b"rootfs/c")
        ),
        "long name of 2 MiB": raw(
            block(b"x", b"L", 2 << 20) + bytes(b"n" * (2 << 20)), file(b"rootfs/c")
        ),
        # names
        "outside rootfs": raw(file(b"etc/passwd")),
        "beside rootfs": raw(file(b"rootfs2/a")),
        "absolute": raw(file(b"/rootfs/a")),
        "dot dot": raw(file(b"rootfs/../etc")),
        "dot dot inside": raw(file(b"rootfs/a/../b")),
        "a dot alone": raw(block(b"./", b"5")),
        "an empty name": raw(block(b"", size=4) + padded(b"data")),
        "a slash alone": raw(block(b"/", b"5")),
        "rootfs is a file": raw(file(b"rootfs")),
        "rootfs is a link": Tar()
        .add("rootfs", prefix="", type=tarfile.SYMTYPE, linkname="x")
        .raw(bare)
        .bytes(),
        "a name with a slash behind": raw(file(b"rootfs/a/")),
        "capital letters": raw(file(b"ROOTFS/a")),
        **{f"a directory {name}": tar().folder(name).bytes() for name in SECTIONS},
        **{f"a file in {name}": tar().add(f"{name}/a", b"x").bytes() for name in SECTIONS},
        "a file tmp": tar().add("tmp", b"x").bytes(),
        "a link tmp": tar().link("tmp", "bin").bytes(),
        "dev by double slashes": raw(file(b"./rootfs//dev/null")),
        "dev by a PAX path": raw(pax(b"path", b"rootfs/dev/a"), file(b"rootfs/a")),
        "dev by a long name": raw(
            block(b"x", b"L", 13) + padded(b"rootfs/dev/a\0"), file(b"rootfs/a")
        ),
        "dev by a GNU sparse name": raw(
            pax(b"GNU.sparse.name", b"rootfs/dev/a"), file(b"rootfs/a")
        ),
        "dev through a link": tar().link("l", ".").add("l/dev", b"x").bytes(),
        "nearly forbidden": tar()
        .add("device", b"x")
        .add("tmp2/x", b"x")
        .add("a/dev", b"x")
        .bytes(),
        "etc/hosts": tar().add("etc/hosts", b"x").add("etc/hosts.allow", b"y").bytes(),
        # no tars
        "empty": bytes(10240),
        "noise": bytes(range(256)) * 40,
        "text": b"This is no archive.\n" * 100,
        "a zero block first": bytes(512) + whole,
    }
