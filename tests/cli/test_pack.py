"""`pack`, and directories given to `send` and `demo`, run as a user runs them."""

import hashlib
import json
import os
import pty
import resource
import signal
import subprocess
import tarfile

import pytest
import trees
from command import COMMAND, ENVIRONMENT, assert_failed, await_line, run, started
from left_out import AS_ROOT, leave_out
from machine import CID
from peer import Guest, wait_until
from trees import build, file, link, symlink

from nitro_vsock import EnclaveArgsWriter, Rootfs

TREE = {
    b"bin/app": file(b"#!/bin/sh\n", 0o755),
    b"bin/other": link(b"bin/app"),
    b"lib/libbig.so": file(bytes(range(256)) * 4000),
    b"lib/x.pyc": file(b"cache"),
    b"sbin": symlink(b"bin"),
    b"tmp/gone": file(),
    b"usr/doc/a": file(),
}


@pytest.fixture
def tree(tmp_path):
    """A tree with something of everything."""
    return build(tmp_path / "tree", TREE)


def test_packed_file_is_byte_for_byte_what_is_sent(tree, tmp_path, uds, guest_path):
    """By the library's launch and by the command's."""
    out = tmp_path / "out.tar"
    done = run("pack", tree, "-o", str(out))
    assert done.returncode == 0, done.stderr
    data = out.read_bytes()
    assert done.stdout == f"packed {len(data):,} bytes into {out}\n"
    assert data == trees.model(tree)
    with EnclaveArgsWriter(
        Rootfs.from_directory(tree), "/bin/app", ["/bin/app"], {"A": "1"}
    ).listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.send(30)
    assert guest.result().rootfs_sha256 == hashlib.sha256(data).hexdigest()
    where = ["--cid", str(CID), "--uds-path", uds, "--rootfs", tree, "--exclude", "*.pyc"]
    with started("send", *where, "--env", "A=1", "--", "/bin/app") as sender:
        await_line(sender, "listening at")
        guest = Guest(guest_path)
        sent = guest.result().rootfs_sha256
        assert sender.wait(30) == 0
    run("pack", tree, "-o", str(out), "--exclude", "*.pyc")
    assert sent == hashlib.sha256(out.read_bytes()).hexdigest()
    with tarfile.open(out) as tar:
        assert "rootfs/lib/x.pyc" not in tar.getnames()


def test_pack_to_stdout_writes_the_archive_alone(tree):
    """Into a pipe; what there is to say goes to stderr."""
    done = subprocess.run(
        [*COMMAND, "--json", "pack", tree, "-o", "-"],
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert done.stdout == trees.model(tree)
    assert b"into stdout" in done.stderr


def test_archive_is_packed_as_it_is(archive, tmp_path):
    """A tar that is sent as it is comes out as it is."""
    done = run("--json", "pack", str(archive.path), "-o", str(tmp_path / "out.tar"))
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "out.tar"),
        "bytes": len(archive.data),
    }
    assert (tmp_path / "out.tar").read_bytes() == archive.data


def test_archive_is_not_written_to_a_terminal(tree):
    """It would only harm."""
    master, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, "pack", tree, "-o", "-"],
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            check=False,
        )
    finally:
        os.close(master)
        os.close(terminal)
    assert done.returncode == 2
    assert "terminal" in done.stderr


def test_failed_pack_leaves_what_was_there(tree, tmp_path):
    """A disk that is full in the middle: no file that looks whole, nor a half-made one."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "app.tar").write_bytes(b"before")
    done = run(
        *("--json", "pack", tree, "-o", str(out / "app.tar")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )
    assert_failed(done, 1, "OSError")
    assert os.listdir(out) == ["app.tar"]
    assert (out / "app.tar").read_bytes() == b"before"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_pack_leaves_nothing_that_looks_whole(tree, tmp_path, number):
    """What was there keeps its name; what is half-made has another one, or is gone."""
    os.truncate(f"{tree}/lib/libbig.so", 16 << 30)
    out = tmp_path / "out"
    out.mkdir()
    (out / "app.tar").write_bytes(b"before")
    with started("pack", tree, "-o", str(out / "app.tar")) as packer:
        wait_until(lambda: sum(entry.stat().st_size for entry in os.scandir(out)) > 1 << 20)
        packer.send_signal(number)
        assert packer.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    assert (out / "app.tar").read_bytes() == b"before"
    left = [name for name in os.listdir(out) if name != "app.tar"]
    assert all(name.startswith(".app.tar.") for name in left)
    assert len(left) == (number == signal.SIGKILL)


MOUNT = """
mount -t tmpfs none "$1/mnt" && echo mounted >"$1/mnt/file" && mkdir "$1/mnt/deep" &&
mount --bind /etc/passwd "$1/passwd" || exit 77
shift && exec "$@"
"""


def test_what_is_mounted_in_the_tree_is_part_of_it(tmp_path):
    """A file system on a directory and a file on a file, in a mount namespace of its own."""
    items = {b"mnt/hidden": file(), b"passwd": file(b"hidden"), b"z": file()}
    path = build(tmp_path / "tree", items)
    out = tmp_path / "out.tar"
    command = [*COMMAND, "pack", path, "-o", str(out)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", MOUNT, "sh", path, *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    if done.returncode in (1, 77) and not out.exists():
        leave_out(f"root, to mount ({done.stderr.strip()})", AS_ROOT)
    assert done.returncode == 0, done.stderr
    with tarfile.open(out) as tar:
        assert [name.removeprefix("rootfs") for name in tar.getnames()] == [
            *("", "/mnt", "/mnt/deep", "/mnt/file", "/passwd", "/z")
        ]
        assert tar.extractfile("rootfs/mnt/file").read() == b"mounted\n"
        with open("/etc/passwd", "rb") as passwd:
            assert tar.extractfile("rootfs/passwd").read() == passwd.read()


def test_file_that_changes_while_it_is_packed_exits_6(tree):
    """It is named; no enclave is spoken of, since there is none."""
    os.truncate(f"{tree}/lib/libbig.so", 64 << 20)
    with subprocess.Popen(
        [*COMMAND, "pack", tree, "-o", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as packer:
        assert len(packer.stdout.read(1 << 20)) == 1 << 20
        os.truncate(f"{tree}/lib/libbig.so", 1000)
        _, said = packer.communicate()
    assert packer.returncode == 6
    assert f"{tree}/lib/libbig.so" in said.decode()
    assert "enclave" not in said.decode()


def test_source_that_cannot_be_packed_is_named(tmp_path):
    """Nothing is written for it."""
    done = run("--json", "pack", str(tmp_path / "none"), "-o", str(tmp_path / "out.tar"))
    error = assert_failed(done, 6, "SourceReadError", "validate")
    assert str(tmp_path / "none") in error["message"]
    assert os.listdir(tmp_path) == []


def test_exclude_is_for_directories(archive, tmp_path):
    """An archive is sent as it is; a glob for it would be dropped silently."""
    done = run(
        *("--json", "pack", str(archive.path), "--exclude", "*.pyc"),
        *("-o", str(tmp_path / "out.tar")),
    )
    assert_failed(done, 2, "UsageError")


def test_demo_sends_a_directory(tree):
    """A reader in strict mode gets what the directory packs to."""
    done = run("--json", "demo", "--rootfs", tree)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["sha256"] == hashlib.sha256(trees.model(tree)).hexdigest()
    assert said["received"]["rootfs_sha256"] == said["sha256"]


def test_demo_sends_a_tree_without_a_program(tmp_path):
    """No enclave would boot from it, as `check` says; what is shown is how it gets there."""
    path = build(tmp_path / "tree", {b"share/file": file(b"data")})
    program = ["--env", "A=1", "--", "/usr/bin/python3"]
    assert run("check", "--rootfs", path, *program).returncode == 10
    done = run("--json", "demo", "--rootfs", path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digests_agree"]


def test_relative_path_that_looks_like_an_option_is_packed(tree, tmp_path):
    """Behind `--`, as everywhere."""
    os.rename(tree, tmp_path / "-tree")
    done = run("pack", "-o", "out.tar", "--", "-tree", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.tar").read_bytes() == trees.model(tmp_path / "-tree")
