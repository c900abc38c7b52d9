"""What the guest would fail on is told before it boots."""

import gzip
import io
import logging
import os
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from archives import make_tar
from command import PROJECT
from hypothesis import given
from hypothesis import strategies as st
from machine import CID
from tar_strategies import broken_archives
from vectors.tars import BAD_TARS, GOOD_TARS, tar_of

from nitro_vsock import (
    DeviceProxyList,
    EnclaveArgsWriter,
    InvalidArgumentError,
    PreflightError,
    Rootfs,
    Severity,
)
from nitro_vsock.check.findings import CODES, MAX_FINDINGS
from nitro_vsock.check.preflight import preflight

MACHINE = os.uname().machine
NUMBERS = {"x86_64": 62, "aarch64": 183}
OTHER = "aarch64" if MACHINE == "x86_64" else "x86_64"
STATIC = struct.pack("<4s12xHH", b"\x7fELF\2\1\1", 2, NUMBERS.get(MACHINE, 62))
STATIC = bytearray(STATIC.ljust(64, b"\0"))
STATIC[:7] = b"\x7fELF\2\1\1"
STATIC[54:56] = struct.pack("<H", 56)
STATIC = bytes(STATIC)
"""An ELF header of a program for this machine that needs no loader."""


def elf(*, machine=None, wide=True, kind=2, interpreter=None, at=200, segments=1):
    """Return the head of an ELF program."""
    head = bytearray(STATIC)
    head[4] = 2 if wide else 1
    head[16:20] = struct.pack("<HH", kind, NUMBERS.get(MACHINE, 62) if machine is None else machine)
    if interpreter is not None:
        head[32:40] = struct.pack("<Q", 64)
        head[56:58] = struct.pack("<H", segments)
        head += struct.pack("<I4xQ16xQ16x", 3, at, len(interpreter) + 1)
        head = head.ljust(at, b"\0") + interpreter + b"\0"
    return bytes(head)


class Tree:
    """Makes an archive, member by member."""

    def __init__(self):
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.GNU_FORMAT)

    def add(self, name, data=b"", mode=0o755, **changes):
        """Add a file, or what `type` says; return the tree."""
        member = tarfile.TarInfo(f"rootfs/{name}")
        member.mode = mode
        member.size = len(data)
        for attribute, value in changes.items():
            setattr(member, attribute, value)
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def link(self, name, target):
        """Add a symbolic link."""
        return self.add(name, type=tarfile.SYMTYPE, linkname=target)

    def hard(self, name, target):
        """Add a hard link."""
        return self.add(name, type=tarfile.LNKTYPE, linkname=f"rootfs/{target}")

    def folder(self, name):
        """Add a directory."""
        return self.add(name, type=tarfile.DIRTYPE)

    def unfinished(self):
        """Return the archive so far, without its end."""
        return self._buffer.getvalue()

    def bytes(self):
        """Return the archive."""
        self._tar.close()
        return self._buffer.getvalue()


def check(archive, *argv, envp=("PATH=/bin:/usr/bin",), path=None, memory=None, machine=None):
    """Return {code: subject} of what is found; every finding is whole."""
    rootfs = archive if isinstance(archive, Rootfs) else Rootfs.from_bytes(archive)
    argv = list(argv or ["/app"])
    writer = EnclaveArgsWriter(rootfs, path or argv[0], argv, list(envp))
    found = preflight(writer.args, writer.rootfs, memory, machine=machine)
    for finding in found:
        assert finding.severity is CODES[finding.code].severity
        assert finding.subject
        assert finding.reason
        assert finding.remedy == CODES[finding.code].remedy
    return {finding.code: finding.subject for finding in found}


# The program


def test_real_program_with_its_loader_is_found_well(tmp_path):
    """The host's /bin/true in a tree with everything it needs; a link leads to it."""
    loader = Path("/lib64/ld-linux-x86-64.so.2" if MACHINE == "x86_64" else "")
    if not loader.is_file():
        loader = next(Path("/lib").glob("ld-linux-*.so.*"))
    program = Path("/bin/true").resolve().read_bytes()
    tree = Tree().add("usr/bin/true", program).link("bin", "usr/bin").link("opt/run", "/bin/true")
    without = tree.bytes()
    assert check(without, "/bin/true") == {"interpreter-missing": "argv[0]"}
    tree = Tree().add("usr/bin/true", program).link("bin", "usr/bin").link("opt/run", "/bin/true")
    tree.add(str(loader)[1:], loader.read_bytes())
    whole = tree.bytes()
    for name in ("/bin/true", "true", "/opt/run", "bin/true", "/usr/../usr/./bin//true"):
        assert check(whole, name) == {}, name
    assert check(whole, "/bin/true", machine=OTHER) == {"wrong-machine": "argv[0]"}
    assert check(whole, "/bin/true", machine="riscv64") == {}


def test_directory_is_checked_as_it_is_sent(tmp_path):
    """No archive has to be made first."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "app").write_bytes(STATIC)
    rootfs = Rootfs.from_directory(tmp_path)
    assert check(rootfs, "/bin/app") == {"program-not-executable": "argv[0]"}
    (tmp_path / "bin" / "app").chmod(0o711)
    assert check(rootfs, "/bin/app") == {}


PROGRAMS = {
    "absent": (Tree(), "/app", {"program-missing"}),
    "absent, any name": (Tree(), "app", {"program-missing"}),
    "a directory": (Tree().folder("app"), "/app", {"program-not-executable"}),
    "a fifo": (Tree().add("app", type=tarfile.FIFOTYPE), "/app", {"program-not-executable"}),
    "no x": (Tree().add("app", STATIC, 0o644), "/app", {"program-not-executable"}),
    "x for others only": (Tree().add("app", STATIC, 0o001), "/app", set()),
    "setuid": (Tree().add("app", STATIC, 0o4755), "/app", set()),
    "text": (Tree().add("app", b"echo"), "/app", {"exec-format"}),
    "empty": (Tree().add("app"), "/app", {"exec-format"}),
    "text without x": (
        Tree().add("app", b"echo", 0o600),
        "/app",
        {"exec-format", "program-not-executable"},
    ),
    "ELF cut short": (Tree().add("app", STATIC[:40]), "/app", {"exec-format"}),
    "ELF library of objects": (Tree().add("app", elf(kind=1)), "/app", {"exec-format"}),
    "ELF with no size of its segments": (
        Tree().add("app", STATIC[:54] + bytes(10)),
        "/app",
        {"exec-format"},
    ),
    "32 bits": (Tree().add("app", elf(machine=3, wide=False)), "/app", {"wrong-machine"}),
    "x32": (Tree().add("app", elf(wide=False)), "/app", {"wrong-machine"}),
    "another machine": (Tree().add("app", elf(machine=243)), "/app", {"wrong-machine"}),
    "loader": (Tree().add("app", elf(interpreter=b"/ld")).add("ld", STATIC), "/app", set()),
    "no loader": (Tree().add("app", elf(interpreter=b"/ld")), "/app", {"interpreter-missing"}),
    "loader without x": (
        Tree().add("app", elf(interpreter=b"/ld")).add("ld", STATIC, 0o600),
        "/app",
        {"interpreter-not-executable"},
    ),
    "loader of its own kind": (
        Tree().add("app", elf(interpreter=b"/app")),
        "/app",
        set(),
    ),
    "loader for another machine": (
        Tree().add("app", elf(interpreter=b"/ld")).add("ld", elf(machine=243)),
        "/app",
        {"wrong-machine"},
    ),
    "loader named at the end": (
        Tree().add("app", elf(interpreter=b"/ld", at=5000)),
        "/app",
        {"interpreter-unknown"},
    ),
    "script": (Tree().add("app", b"#!/sh\n").add("sh", STATIC), "/app", set()),
    "script with an argument": (
        Tree().add("app", b"#! \t/sh -e\n").add("sh", STATIC),
        "/app",
        set(),
    ),
    "script without end of line": (Tree().add("app", b"#!/sh").add("sh", STATIC), "/app", set()),
    "script of DOS": (
        Tree().add("app", b"#!/sh\r\n").add("sh", STATIC),
        "/app",
        {"interpreter-missing"},
    ),
    "script of nothing": (Tree().add("app", b"#!\n"), "/app", {"exec-format"}),
    "script with too long a name": (
        Tree().add("app", b"#!/" + b"s" * 300),
        "/app",
        {"exec-format"},
    ),
    "script without interpreter": (
        Tree().add("app", b"#!/usr/bin/env sh\n"),
        "/app",
        {"interpreter-missing"},
    ),
    "interpreter without x": (
        Tree().add("app", b"#!/sh\n").add("sh", STATIC, 0o644),
        "/app",
        {"interpreter-not-executable"},
    ),
    "script of a script": (
        Tree().add("app", b"#!/b\n").add("b", b"#!/sh\n").add("sh", STATIC),
        "/app",
        set(),
    ),
    "script of itself": (Tree().add("app", b"#!/app\n"), "/app", {"too-many-interpreters"}),
    "link": (Tree().link("app", "a/../b").folder("a").add("b", STATIC), "/app", set()),
    "absolute link": (Tree().link("x/app", "/b").add("b", STATIC), "/x/app", set()),
    "link above the root": (
        Tree().link("x/app", "../../../../b").add("b", STATIC),
        "/x/app",
        set(),
    ),
    "link to nothing": (Tree().link("app", "/b"), "/app", {"program-missing"}),
    "link to itself": (Tree().link("app", "app"), "/app", {"program-missing"}),
    "links to each other": (
        Tree().link("app", "b").link("b", "/app"),
        "/app",
        {"program-missing"},
    ),
    "through a file": (Tree().add("b", STATIC), "/b/app", {"program-missing"}),
    "a file and a slash": (Tree().add("app", STATIC), "/app/", {"program-missing"}),
    "hard link": (Tree().add("b", STATIC).hard("app", "b"), "/app", set()),
    "first of PATH without x": (
        Tree().add("bin/app", STATIC, 0o600).add("usr/bin/app", STATIC),
        "app",
        set(),
    ),
    "all of PATH without x": (
        Tree().add("bin/app", STATIC, 0o600).add("usr/bin/app", STATIC, 0o600),
        "app",
        {"program-not-executable"},
    ),
    "relative": (Tree().add("opt/app", STATIC), "opt/app", set()),
}


@pytest.mark.parametrize(
    ("archive", "name", "codes"),
    [(tree.folder("z").bytes(), name, codes) for tree, name, codes in PROGRAMS.values()],
    ids=PROGRAMS,
)
def test_program_is_looked_at_as_the_kernel_does(archive, name, codes):
    """Links, PATH, #!, the loader and the machine; the guest's working directory is /."""
    assert set(check(archive, name)) == codes


def test_forty_links_are_followed_and_no_more():
    """As many as the kernel follows."""
    tree = Tree().add("l0", STATIC)
    for index in range(1, 42):
        tree.link(f"l{index}", f"l{index - 1}")
    archive = tree.bytes()
    assert check(archive, "/l40") == {}
    assert set(check(archive, "/l41")) == {"program-missing"}


def test_exec_path_that_is_absent_is_a_warning():
    """It is only measured."""
    archive = Tree().add("app", STATIC).bytes()
    assert check(archive, path="/other") == {"exec-path-missing": "exec_path"}
    assert CODES["exec-path-missing"].severity is Severity.WARNING
    assert check(archive, path="app") == {}


# Strings


def test_path_that_is_missing_or_not_first_is_an_error(caplog):
    """At construction only the log says so, as ever."""
    archive = Tree().add("bin/app", STATIC).bytes()
    with caplog.at_level(logging.WARNING, "nitro_vsock"):
        assert check(archive, "app", envp=["A=1"]) == {"path-not-first": "envp"}
    assert "PATH" in caplog.text
    writer = EnclaveArgsWriter.from_reference(
        archive, "app", "app", "A=1 PATH=/bin", DeviceProxyList()
    )
    assert [finding.code for finding in writer.preflight()] == ["path-not-first"]


def test_empty_string_is_a_warning():
    """The reference lets it through."""
    archive = Tree().add("app", STATIC).bytes()
    writer = EnclaveArgsWriter.from_reference(archive, "/app", "/app  x", "A=1", DeviceProxyList())
    (finding,) = writer.preflight()
    assert (finding.code, finding.subject) == ("string-empty", "argv[1]")
    assert finding.severity is Severity.WARNING


# The archive

EXPECTED = {
    "gzip": "not-a-tar",
    "is not under": "no-prefix",
    "makes ": "forbidden-directory",
    "middle of a member": "truncated",
    "non-ASCII": "pax-non-ascii",
    "no member": "no-member",
}


@pytest.mark.parametrize("name", [name for name in BAD_TARS if name != "gzip"])
def test_archive_the_guest_stops_on_has_a_finding(name):
    """What the strict reader refuses, preflight tells too."""
    archive, message = BAD_TARS[name]
    codes = check(archive)
    wanted = next((code for part, code in EXPECTED.items() if part in message), None)
    if wanted is None:
        wanted = "not-a-tar" if "no plain tar" in message else "bad-header"
        if name == "size below zero":  # the first byte of its mode is that of no tar
            wanted = next(iter(codes))
    if name == "truncated header":
        wanted = "truncated"
    assert wanted in codes


@pytest.mark.parametrize("name", GOOD_TARS)
def test_archive_the_guest_unpacks_has_no_finding_but_the_program(name):
    """Every kind of tar; hard links whose target is there."""
    archive = GOOD_TARS[name]
    assert set(check(archive)) - {"program-missing"} <= (
        {"root-not-a-directory"} if name == "GNU" else set()
    )


def test_all_findings_come_at_once():
    """Strings, members and program of one launch."""
    tree = Tree().add("dev/null").add("a").add("a").hard("b", "nowhere")
    tree.link("l", "/usr").add("l/x")
    archive = tree.unfinished() + tar_of("etc/passwd")
    assert check(archive, "app", "x", envp=["A=1"], memory=1) == {
        "path-not-first": "envp",
        "too-little-memory": "memory_bytes",
        "forbidden-directory": "rootfs/dev/null",
        "duplicate-member": "rootfs/a",
        "link-target-missing": "rootfs/b",
        "through-symlink": "rootfs/l/x",
        "no-prefix": "etc/passwd",
    }


def test_what_came_before_a_broken_member_is_still_told():
    """And what is missing may be in the rest, so that is not claimed."""
    archive = Tree().add("bin/app", STATIC, 0o600).unfinished() + b"junk" * 128
    assert set(check(archive, "/bin/app")) == {"bad-header", "program-not-executable"}
    assert set(check(archive, "/bin/other", path="/bin/third")) == {"bad-header"}


@pytest.mark.parametrize(
    ("tree", "codes"),
    [
        (Tree().hard("a", "b").add("b"), {"link-target-missing"}),
        (Tree().hard("a", "a"), {"link-target-missing"}),
        (Tree().hard("a", "b").hard("b", "a"), {"link-target-missing"}),
        (Tree().folder("d").hard("a", "d"), {"link-target-missing"}),
        (Tree().add("a", type=tarfile.LNKTYPE, linkname="../a"), {"link-target-missing"}),
        (Tree().link("lib", "usr/lib").folder("usr/lib").add("lib/x"), set()),
        (Tree().link("lib", "usr/lib").add("lib/x"), {"through-symlink"}),
        (Tree().link("lib", "/usr/lib").folder("usr/lib").add("lib/x"), {"through-symlink"}),
        (Tree().link("lib", "../../lib").add("lib/x"), {"through-symlink"}),
        (Tree().link("a", "b").link("b", "a").add("a/x"), {"through-symlink"}),
        (Tree().folder("d").folder("d"), set()),
        (Tree().folder("d").link("d", "e"), {"duplicate-member"}),
        (Tree().add(""), {"root-not-a-directory"}),
    ],
)
def test_links_and_duplicates_are_looked_at_in_the_order_of_unpacking(tree, codes):
    """A target must be there already; a directory must be one of the rootfs."""
    archive = tree.add("app", STATIC).bytes()
    if codes == {"root-not-a-directory"}:
        archive = archive.replace(b"rootfs/\0", b"rootfs\0\0", 1)
        archive = tar_of("rootfs", data=b"")[:512] + archive[512:]
    assert set(check(archive)) == codes


def test_compressed_archive_names_the_command():
    """Memory that was filled after the Rootfs was made."""
    memory = bytearray(make_tar(20_000))
    rootfs = Rootfs.from_bytes(memory)
    packed = gzip.compress(bytes(memory))
    memory[: len(packed)] = packed[: len(memory)]
    writer = EnclaveArgsWriter(rootfs, "/app", ["/app"], ["A=1"])
    (finding,) = writer.preflight()
    assert finding.code == "compressed"
    assert "`gzip -d`" in finding.reason


class _Shrinking(Rootfs):
    """A file that has shrunk whenever it is open."""

    def open(self):
        source = super().open()
        os.truncate(source.name, source.length - 512)
        return source


def test_source_that_fails_is_a_finding(tmp_path):
    """Gone, or shorter than it was said to be."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(make_tar(1 << 20))
    rootfs = Rootfs.from_file(path)
    path.unlink()
    assert check(rootfs) == {"unreadable": "rootfs"}
    path.write_bytes(make_tar(1 << 20))
    rootfs = _Shrinking.from_file(path)
    assert check(rootfs) == {"unreadable": "rootfs"}


def test_pipe_is_not_read():
    """What is in it is for the guest; the strings are checked."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"x" * 600)
        rootfs = Rootfs.from_fd(reading, length=600)
        found = check(rootfs, "app", envp=["A=1"], memory=1199)
        assert set(found) == {"read-once", "path-not-first", "too-little-memory"}
        assert "too-little-memory" not in check(rootfs, memory=1200)
        assert len(os.read(reading, 600)) == 600
    finally:
        os.close(reading)
        os.close(writing)


def test_memory_is_that_of_archive_and_tree():
    """Data in whole pages, a kilobyte for each member, and the archive itself."""
    archive = Tree().add("app", STATIC + bytes(5000)).add("b", b"x").folder("c").bytes()
    needed = len(archive) + 2 * 4096 + 4096 + 3 * 1024
    assert check(archive, memory=needed) == {}
    writer = EnclaveArgsWriter(Rootfs.from_bytes(archive), "/app", ["/app"], ["A=1"])
    (finding,) = writer.preflight(needed - 1)
    assert finding.code == "too-little-memory"
    assert f"{needed:,} bytes" in finding.reason
    for wrong in (0, -1, True, "1G"):
        with pytest.raises(InvalidArgumentError, match="memory_bytes"):
            writer.preflight(wrong)


def test_findings_are_bounded():
    """The last says how many there are more, and whether an error is among them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for index in range(MAX_FINDINGS + 50):
            tar.addfile(tarfile.TarInfo(f"rootfs/{index // 2 * 0}"))
    writer = EnclaveArgsWriter(Rootfs.from_bytes(buffer.getvalue()), "/0", ["/0"], ["A=1"])
    found = writer.preflight()
    assert len(found) == MAX_FINDINGS + 1
    # The program is no program: two findings come before the members'.
    left_out = MAX_FINDINGS + 49 + 2 - MAX_FINDINGS
    assert (found[-1].code, found[-1].severity) == ("too-many-findings", Severity.WARNING)
    assert f"{left_out:,} findings more" in found[-1].reason


def test_many_members_take_moderate_memory():
    """Names, kinds and modes are kept, data is not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.members = _Forgetful()
        member = tarfile.TarInfo()
        member.mode = 0o755
        member.size = len(STATIC)
        for index in range(20_000):
            member.name = f"rootfs/usr/share/doc/package-{index // 50}/file-{index}.txt"
            tar.addfile(member, io.BytesIO(STATIC))
    writer = EnclaveArgsWriter(Rootfs.from_bytes(buffer.getvalue()), "/app", ["/app"], ["A=1"])
    tracemalloc.start()
    try:
        assert [finding.code for finding in writer.preflight()] == ["program-missing"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 60 MiB for 100,000.
    assert peak < 12 << 20, f"{peak >> 10} KiB"


class _Forgetful(list):
    """Keeps tarfile from holding every member."""

    def append(self, item):
        """Forget it."""


@given(broken_archives(), st.sampled_from(["/app", "app", "rootfs/a", "/a/b"]))
def test_any_archive_gives_findings_and_no_exception(archive, name):
    """Whatever its headers say."""
    if archive:
        check(archive, name, envp=["PATH=/:"], memory=1 << 20)


@given(
    st.binary(max_size=700),
    st.sampled_from([b"\x7fELF", b"\x7fELF\2\1\1", STATIC[:56], b"#!", b""]),
)
def test_any_program_gives_findings_and_no_exception(data, begin):
    """Whatever its first bytes say."""
    check(Tree().add("app", begin + data).bytes())


# Quick checks of listen


def listen(rootfs, uds, argv=("/app",), envp=("A=1",), **options):
    """Listen, and close at once."""
    EnclaveArgsWriter(rootfs, argv[0], list(argv), list(envp)).listen(
        CID, uds_path=uds, **options
    ).close()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"no tar" * 200, "not-a-tar"),
        (make_tar(2000).replace(b"rootfs", b"rOOtfs"), "not-a-tar"),
    ],
)
def test_file_that_is_no_tar_is_refused_before_anything_is_bound(tmp_path, uds, content, code):
    """The first header is looked at; the caller can say that it must not be."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(content)
    with pytest.raises(PreflightError, match=code) as caught:
        listen(Rootfs.from_file(path), uds)
    assert caught.value.field == "rootfs"
    assert [finding.code for finding in caught.value.findings] == [code]
    assert not os.listdir(os.path.dirname(uds))
    listen(Rootfs.from_file(path), uds, preflight=False)
    listen(Rootfs.from_bytes(content), uds)


def test_program_that_cannot_be_found_is_refused_before_anything_is_bound(uds):
    """The strings are looked at for every kind of rootfs."""
    with pytest.raises(PreflightError, match="path-not-first"):
        listen(Rootfs.from_bytes(make_tar(1)), uds, argv=["app"])
    listen(Rootfs.from_bytes(make_tar(1)), uds, argv=["app"], preflight=False)
    listen(Rootfs.from_bytes(make_tar(1)), uds, argv=["app"], envp=["A=1", "PATH=/bin"])


def test_warning_is_logged_and_the_launch_goes_on(uds, caplog):
    """An empty string, as the reference sends it."""
    writer = EnclaveArgsWriter.from_reference(make_tar(1), "/a", "/a ", "A=1", DeviceProxyList())
    with caplog.at_level(logging.WARNING, "nitro_vsock"):
        writer.listen(CID, uds_path=uds).close()
    assert "string-empty: argv[1]" in caplog.text


def test_quick_checks_do_not_read_a_pipe(uds):
    """Nor anything else that cannot be read twice."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"x" * 600)
        listen(Rootfs.from_fd(reading, length=600), uds)
        assert len(os.read(reading, 600)) == 600
    finally:
        os.close(reading)
        os.close(writing)


# The commands

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error"}


def run(*args):
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "nitro_vsock", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=ENVIRONMENT,
    )


@pytest.fixture
def packed(tmp_path):
    """A file with a launch that has a warning and no error."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(Tree().add("app", STATIC).add("app", STATIC).bytes())
    return path


def test_check_tells_errors_from_warnings_by_its_exit_code(packed):
    """0, and 10 for errors, or for warnings where they count."""
    launch = ["--rootfs", packed, "--env", "A=1", "--", "/app"]
    done = run("check", *launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("warning: duplicate-member: rootfs/app: ")
    assert done.stdout.splitlines()[-1] == "0 errors, 1 warning"
    assert run("check", "--strict", *launch).returncode == 10
    done = run("check", "--memory", "10K", *launch)
    assert done.returncode == 10
    assert "error: too-little-memory: " in done.stdout


def test_check_prints_findings_as_json(packed):
    """The objects of the library."""
    import json

    done = run("check", "--json", "--rootfs", packed, "--env", "A=1", "/app")
    found = json.loads(done.stdout)
    writer = EnclaveArgsWriter(Rootfs.from_file(packed), "/app", ["/app"], ["A=1"])
    assert found == {
        "findings": [finding.as_dict() for finding in writer.preflight()],
        "errors": 0,
        "warnings": 1,
        "ok": True,
    }


def test_check_shows_a_table_on_a_terminal(packed, tmp_path):
    """Whole codes, and no control characters out of an archive."""
    path = tmp_path / "hostile.tar"
    path.write_bytes(Tree().add("\x1b[31mred").add("\x1b[31mred").add("app", STATIC).bytes())
    command = f"{sys.executable} -m nitro_vsock check --rootfs {path} --env A=1 /app"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "80"},
    )
    assert "duplicate-member" in done.stdout
    assert "warning: duplicate" not in done.stdout
    assert "\x1b[31mred" not in done.stdout
    assert done.returncode == 0


def test_measure_prints_registers_and_what_they_leave_out(packed):
    """For people, for programs, and for a key policy."""
    import json

    from nitro_vsock import measure

    launch = ["--rootfs", packed, "--env", "A=1", "--", "/app"]
    found = measure(EnclaveArgsWriter(Rootfs.from_file(packed), "/app", ["/app"], ["A=1"]))
    done = run("measure", *launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        f"PCR16        {found.pcr16.hex()}",
        f"PCR17        {found.pcr17.hex()}",
    ]
    assert "not measured names, modes" in done.stdout
    said = json.loads(run("measure", "--json", *launch).stdout)
    assert {"pcr16": said["pcr16"], "pcr17": said["pcr17"]} == found.as_dict()
    assert said["not_measured"]
    condition = json.loads(run("measure", "--kms-policy", *launch).stdout)
    assert condition == {"Condition": found.kms_condition()}


def test_send_refuses_and_can_be_told_not_to(tmp_path, uds):
    """Exit code 10; the deadline is the next thing that fails."""
    path = tmp_path / "rootfs.tar"
    path.write_bytes(b"no tar" * 200)
    launch = ["--cid", CID, "--uds-path", uds, "--timeout", "0.1", "--rootfs", path, "--env", "A=1"]
    done = run("send", *launch, "/app")
    assert done.returncode == 10, done.stderr
    assert "(preflight: not-a-tar)" in done.stderr
    assert run("send", "--no-preflight", *launch, "/app").returncode == 4


def test_send_lists_every_finding_as_json(tmp_path, uds):
    """The line names the first error only."""
    import json

    path = tmp_path / "rootfs.tar"
    path.write_bytes(b"no tar" * 200)
    where = ["--cid", CID, "--uds-path", uds, "--rootfs", path, "--env", "A=1"]
    done = run("--json", "send", *where, "--", "app")
    assert done.returncode == 10, done.stderr
    error = json.loads(done.stdout)["error"]
    writer = EnclaveArgsWriter(Rootfs.from_file(path), "app", ["app"], ["A=1"])
    assert error["class"] == "PreflightError"
    assert error["findings"] == [finding.as_dict() for finding in writer.preflight()]
    assert [finding["code"] for finding in error["findings"]] == ["path-not-first", "not-a-tar"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (gzip.compress(make_tar(1000)), "compressed"),
        (tar_of("app", data=STATIC)[:520], "bad-header"),
        (tar_of("a/../app", data=STATIC), "bad-header"),
    ],
    ids=["compressed", "cut short", "outside"],
)
def test_check_tells_all_of_an_archive_that_nothing_can_be_made_of(tmp_path, content, code):
    """Compressed, or a foreign tar that is broken: beside what is wrong with the strings."""
    import json

    path = tmp_path / "rootfs.tar"
    path.write_bytes(content)
    done = run("--json", "check", "--rootfs", path, "--env", "A=1", "--", "app")
    assert done.returncode == 10, done.stderr
    found = json.loads(done.stdout)["findings"]
    assert [finding["code"] for finding in found] == ["path-not-first", code]
    assert str(path) in found[1]["reason"]


# Documentation


def test_every_code_is_documented():
    """docs/rootfs.md has each code with its severity, and no other."""
    text = (PROJECT / "docs" / "rootfs.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (error|warning)", text, re.MULTILINE)
    assert dict(rows) == {code: str(rule.severity) for code, rule in CODES.items()}
    assert len(rows) == len(CODES)
