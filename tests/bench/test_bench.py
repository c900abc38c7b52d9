"""`nitro-vsock bench`, its senders and contest, and what bench/ stands on: floors and peers."""

import ast
import contextlib
import errno
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from archives import Archive
from command import (
    ENVIRONMENT,
    LIMIT,
    PROJECT,
    assert_failed,
    run,
    started,
)
from left_out import install, leave_out, needs_tool
from machine import CID, HAS_LOOPBACK
from peer import READY, U64, Parser, handshake, wait_until

from nitro_vsock.cli.compare import contest, senders
from nitro_vsock.cli.compare.contest import Entrant
from nitro_vsock.cli.ui.failures import ContestError
from nitro_vsock.testing import child

BENCH = PROJECT / "bench"
STRATEGIES = ("auto", "sendfile", "mmap", "read")
STANDARD = ("socket.sendfile", "read+sendall")
SOCAT = shutil.which("socat")
RUSTC = shutil.which("rustc")
FORGING = (errno.ENOENT, errno.ECONNREFUSED)


def reach(path):
    """Connect to a Unix socket as soon as somebody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(LIMIT)
    try:
        wait_until(lambda: answers(sock, path), what=f"a listener at {path}")
    except BaseException:
        sock.close()
        raise
    return sock


def answers(sock, path):
    """Whether this connect was the one that succeeded."""
    error = sock.connect_ex(path)
    assert error in (0, *FORGING), os.strerror(error)
    return error == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """TMPDIR of what the test starts: no file in it, and no process that has it, is left."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    assert not list(path.iterdir())
    assert not of_folder(path)


def of_folder(path):
    """Return the command lines of the processes whose TMPDIR is this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={path}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes())
    return found


def bench_env(folder, **more):
    """Return the environment of a command line whose temporary files go to this folder."""
    return {**ENVIRONMENT, "TMPDIR": str(folder), **more}


def bench_args(uds, *extra):
    """Return the arguments of a bench that waits for somebody else's reader."""
    return ["bench", "--cid", str(CID), "--uds-path", uds, "--rounds", "1", "--json", *extra]


def ended(process):
    """Wait for a process; return it as `run` does."""
    out, err = process.communicate(timeout=LIMIT)
    return subprocess.CompletedProcess((), process.returncode, out, err)


# the command


def test_bench_measures_every_sender(folder):
    """One object has the place, the sizes and a row for each sender; a note is said a round."""
    args = ["bench", "--size", "1MiB", "--rounds", "2", "--json"]
    done = run(*args, env=bench_env(folder))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"transport", "kernel", "rootfs_bytes", "rounds", "senders"}
    assert (found["rootfs_bytes"], found["rounds"]) == (1 << 20, 2)
    assert found["kernel"] == os.uname().release
    assert (found["transport"] == "AF_VSOCK, through loopback") == HAS_LOOPBACK
    ours = [f"nitro_vsock: {strategy}" for strategy in STRATEGIES]
    names = [row["sender"] for row in found["senders"]]
    assert names == [*ours, *STANDARD, *(["socat"] if SOCAT else [])]
    for row in found["senders"]:
        assert row["bytes_per_second"] > 0
        assert row["cpu_seconds_per_gib"] >= 0
        assert row["auto_over_this"] > 0
        assert (row["peak_bytes"] is None) == (row["sender"] == "socat")
    assert found["senders"][0]["auto_over_this"] == 1
    transport, *rounds = done.stderr.splitlines()
    assert transport == f"nitro-vsock: transport: {found['transport']}"
    assert rounds == ["nitro-vsock: round 1 of 2", "nitro-vsock: round 2 of 2"]


def test_bench_prints_a_table_about_the_given_archive(folder, archive):
    """--rootfs, relative too, is what is sent, and is as it was; a row a sender is printed."""
    args = ["bench", "--rootfs", archive.path.name, "--rounds", "1"]
    done = run(*args, env=bench_env(folder), cwd=archive.path.parent)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["sender", "rate", "cpu", "s/GiB", "peak", "memory", "auto", "is"]
    assert len(rows) == len(STRATEGIES) + len(STANDARD) + bool(SOCAT)
    assert rows[0].startswith("nitro_vsock: auto ")
    assert rows[0].endswith(" 1.00x")
    assert all("B/s " in row and row.endswith("x") for row in rows)
    assert archive.path.read_bytes() == archive.data


def test_bench_sends_to_a_real_reader_once_for_every_launch(folder, archive, uds):
    """With --cid a `receive --wait` a launch gets the whole archive; a relative base path will do.

    socat is left out: to a reader that is not ours it cannot say how long it took.
    """
    base = Path(uds)
    args = bench_args(f"./{base.name}", "--rootfs", str(archive.path))
    with started(*args, env=bench_env(folder), cwd=base.parent) as bench:
        for _ in (*STRATEGIES, *STANDARD):
            got = run("receive", "--cid", str(CID), "--uds-path", uds, "--wait", "--json")
            assert got.returncode == 0, got.stderr
            received = json.loads(got.stdout)
            assert received["rootfs_sha256"] == archive.sha256
            assert received["argv"] == [arg.decode() for arg in senders.ARGV]
        done = ended(bench)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["transport"] == f"the reader of CID {CID}"
    assert len(found["senders"]) == len(STRATEGIES) + len(STANDARD)
    assert not list(base.parent.iterdir())


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["--size", "12 parsecs"], "BadParameter"),
        (["--rounds", "0"], "BadParameter"),
        (["--rootfs", "/nonexistent.tar"], "BadParameter"),
        (["--rootfs", "/"], "BadParameter"),
        (["--uds-path", "v.sock"], "UsageError"),
        (["--cid", "2"], "InvalidArgumentError"),
        (["--cid", "16", "--uds-path", "v" * 108], "InvalidArgumentError"),
    ],
)
def test_bad_options_of_bench_exit_2(folder, args, kind):
    """What cannot be run is refused before any sender starts."""
    done = run("bench", "--json", *args, env=bench_env(folder))
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["class"]) == (2, kind)
    assert done.stderr == f"nitro-vsock: error: {error['message']}\n"


def test_bench_does_not_wait_for_a_sender_whose_reader_died(folder, tmp_path):
    """Our reader dies before it connects: one line says so, and the sender is ended."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'reader' in sys.orig_argv:\n"
        "    os.write(2, b'the reader dies')\n"
        "    os._exit(3)\n"
    )
    env = bench_env(folder, PYTHONPATH=str(tmp_path))
    done = run("bench", "--size", "1MiB", "--json", env=env)
    error = assert_failed(done, 1, "ContestError")
    assert error["message"].endswith("exit code 3: the reader dies")


def test_bench_tells_the_sender_s_words_where_a_real_reader_goes_away(folder, uds, guest_path):
    """A reader of the user's that closes in the middle ends it with one line, not a traceback."""
    with started(*bench_args(uds, "--size", "32MiB"), env=bench_env(folder)) as bench:
        with reach(guest_path) as sock:
            handshake(sock)
            sock.recv(1 << 20)
        done = ended(bench)
    error = assert_failed(done, 1, "ContestError")
    assert "senders auto unix:" in error["message"]
    assert "exit code 1: PeerClosedError: " in error["message"]
    assert not list(Path(uds).parent.iterdir())


def test_bench_leaves_a_foreign_socket_alone(folder, uds, guest_path):
    """An address in use is an error with the sender's words, and whoever has it keeps it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest_path)
        listener.listen()
        done = run(*bench_args(uds, "--size", "1MiB"), env=bench_env(folder))
    error = assert_failed(done, 1, "ContestError")
    assert "VsockBindError" in error["message"]
    assert Path(guest_path).exists()


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [(signal.SIGINT, 130, "KeyboardInterrupt"), (signal.SIGTERM, 143, "TerminatedError")],
)
def test_signal_ends_a_bench_and_its_sender(folder, uds, guest_path, number, code, kind):
    """While a sender listens: no process, temporary file or socket file is left."""
    with started(*bench_args(uds, "--size", "1MiB"), env=bench_env(folder)) as bench:
        wait_until(Path(guest_path).exists, what="a sender that listens")
        assert len(of_folder(folder)) == 2
        bench.send_signal(number)
        done = ended(bench)
    assert_failed(done, code, kind)
    assert not of_folder(folder)
    assert not list(Path(uds).parent.iterdir())


def test_signal_ends_what_a_sender_has_started(folder, tmp_path):
    """SIGTERM while a socat that hangs is a child of the sender's: it is not left either."""
    here = tmp_path / "here"
    (tmp_path / "socat").write_text(f"#!/bin/sh\n: >{here}\nexec sleep 1000\n")
    (tmp_path / "socat").chmod(0o755)
    env = bench_env(folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
    with started("bench", "--size", "1MiB", "--rounds", "1", "--json", env=env) as bench:
        wait_until(here.exists, what="the start of socat")
        bench.send_signal(signal.SIGTERM)
        done = ended(bench)
    assert_failed(done, 143, "TerminatedError")
    assert not of_folder(folder)


# the contest


def shell(script):
    """Return the command of a process of a contest."""
    return ["sh", "-c", script]


GOOD_SENDER = shell('echo ready; read go; echo \'{"cpu": 0.5, "peak": 7, "seconds": 2}\'')
GOOD_READER = shell('read go; echo \'{"connected_ns": 1000, "finished_ns": 3000, "received": 10}\'')


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no file >&2; exit 3", "no file"),
        ("echo steady; echo I was asked >&2; sleep 1000", "steady I was asked"),
        ("sleep 1000", "never ready"),
        ("echo ready; read go; echo broken >&2; exit 4", "exit code 4: broken"),
        ("echo ready; read go; kill -9 $$", "exit code -9"),
        ("echo ready; read go", "exit code 0"),
        ("echo ready; read go; echo nonsense", "exit code 0: nonsense"),
        ("echo ready; exec 0<&-; echo gone >&2; exit 5", "exit code 5: gone"),
        ("echo ready; read go; sleep 1000 & sleep 1000", "stuck"),
    ],
)
def test_sender_that_fails_is_an_error_with_its_words(folder, script, words):
    """Whatever a sender does wrong, there is one error that names it, and nothing of it is left."""
    with pytest.raises(ContestError) as caught:
        contest.launch(shell(script), GOOD_READER, {}, 0.3)
    assert words in " ".join(str(caught.value).split())
    assert str(caught.value).startswith(f"sh -c {script}: ")
    assert not of_folder(folder)


def test_reader_that_fails_ends_the_sender_that_waits_for_it(folder, tmp_path):
    """The error is the reader's; the sender and what it has started are gone."""
    here = tmp_path / "here"
    sender = shell(f"echo ready; read go; sleep 1000 & : >{here}; wait")
    reader = shell(f"read go; until [ -e {here} ]; do :; done; echo blind >&2; exit 6")
    with pytest.raises(ContestError, match="exit code 6: blind"):
        contest.launch(sender, reader, {})
    assert not of_folder(folder)


def test_both_sides_words_are_told(folder):
    """Where a sender breaks off, its reader fails too: the cause is in the error all the same."""
    sender = shell("echo ready; read go; echo the cause >&2; exit 1")
    reader = shell("read go; echo the effect >&2; exit 1")
    with pytest.raises(ContestError, match=r"(?s)the cause.*the effect|the effect.*the cause"):
        contest.launch(sender, reader, {})


@pytest.mark.parametrize("expect", [{"received": 11}, {"rootfs_crc": 10}])
def test_other_bytes_than_expected_are_an_error(folder, expect):
    """A count or a digest that is not as it should be, or not there, is no result."""
    with pytest.raises(ContestError, match=r"'received': 10.* arrived in place of"):
        contest.launch(GOOD_SENDER, GOOD_READER, expect)


def test_stream_that_is_too_short_is_an_error(folder, peers, archive, guest_path):
    """Our reader says how many bytes it got, and of how many."""
    command = ("ceiling", "sendfile", f"unix:{guest_path}", archive.path, archive.path)
    sender = [str(peers / "meter"), str(peers / command[0]), *map(str, command[1:])]
    reader = sender_command(senders.READER, guest_path, 1 << 30)
    with pytest.raises(ContestError, match=rf"EOFError: the stream ended .* of {1 << 30} bytes"):
        contest.launch(sender, reader, {})


def test_entrants_launch_in_turn(folder):
    """Each launches once a round; the reader's clock counts, or the sender's for another reader."""
    field = [Entrant("one", GOOD_SENDER), Entrant("other", GOOD_SENDER)]
    found = list(contest.race(field, 2, GOOD_READER, {"received": 10}))
    assert [name for name, _ in found] == ["one", "other", "one", "other"]
    assert {(one.seconds, one.cpu, one.peak) for _, one in found} == {(2e-6, 0.5, 7)}
    assert contest.launch(GOOD_SENDER, None, {}).seconds == 2


def test_ratio_is_the_median_of_pairwise_ratios():
    """It is not the ratio of the medians, which would be 4 here."""
    assert contest.ratio([1, 10, 2], [3, 10, 8]) == 3
    with pytest.raises(ValueError):
        contest.ratio([1, 2], [1])


# the senders


class Tape:
    """A socket that keeps what was received from it."""

    def __init__(self, sock):
        self._sock = sock
        self.data = bytearray()
        self.sendall = sock.sendall

    def recv(self, size):
        """Receive once."""
        data = self._sock.recv(size)
        self.data += data
        return data


def string(value):
    """Return a string as it travels."""
    return U64.pack(len(value) + 1) + value + b"\0"


def strings(values):
    """Return a list of strings as it travels."""
    return U64.pack(len(values)) + b"".join(map(string, values))


def whole_stream(data):
    """Return every byte that a sender of this archive has to send."""
    return b"".join(
        [
            *(READY, b"\x04", b"\x05"),
            *(b"\x01", string(senders.EXEC_PATH)),
            *(b"\x02", strings(senders.ARGV)),
            *(b"\x03", strings(senders.ENVP)),
            *(b"\x00", U64.pack(len(data)), data),
            b"\xff",
        ]
    )


def sender_command(name, path, what):
    """Return the command of a sender of senders.py."""
    return child.python_command("nitro_vsock.cli.compare.senders", name, f"unix:{path}", str(what))


def check_stream(command, path, archive):
    """Let a sender do its launch; check every byte and what its guest makes of them.

    Returns:
        What the sender said at its end.
    """
    pipe = subprocess.PIPE
    with child.start(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            with reach(path) as sock:
                tape = Tape(sock)
                handshake(tape)
                taken = Parser(tape).run()
                sock.shutdown(socket.SHUT_WR)
                # Who did not read our ready byte resets the connection.
                with contextlib.suppress(ConnectionResetError):
                    assert tape.recv(1) == b""
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert (taken.path, taken.argv) == (senders.EXEC_PATH, list(senders.ARGV))
    assert taken.envp == list(senders.ENVP)
    assert taken.order == [4, 5, 1, 2, 3, 0, 255]
    assert (taken.rootfs_bytes, taken.rootfs_sha256) == (len(archive.data), archive.sha256)
    assert tape.data == whole_stream(archive.data)
    assert not Path(path).exists()
    return json.loads(said)


@pytest.mark.parametrize("name", [*STRATEGIES, *(n for n in senders.SENDERS if n != "socat")])
def test_sender_delivers_the_one_stream(name, archive, guest_path):
    """Path, argv, envp, order and archive are the same bytes from each, ours by each strategy."""
    said = check_stream(sender_command(name, guest_path, archive.path), guest_path, archive)
    assert set(said) == {"seconds", "cpu", "peak"}
    assert 0 < said["seconds"] < LIMIT
    assert said["peak"] > 1 << 20


@needs_tool("socat")
def test_socat_delivers_the_one_stream(archive, guest_path, tmp_path):
    """It sends a file that holds the whole stream; its peak would be that of its starter."""
    wire = tmp_path / "wire"
    wire.write_bytes(senders.head(len(archive.data)) + archive.data + senders.TAIL)
    said = check_stream(sender_command("socat", guest_path, wire), guest_path, archive)
    assert said["cpu"] > 0
    assert said["peak"] is None


def test_sender_launches_nothing_where_its_starter_is_gone(archive, guest_path):
    """The end of standard input is not the word to begin."""
    done = run(command=sender_command("auto", guest_path, archive.path), stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


# bench/: the floors


def quick_benchmark(*options):
    """Run the draining-reader test as `make bench-quick` does; `pretended_launches` says how fast.

    How fast they really are is for `make bench-quick` to find.
    """
    make = ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/.bench"]
    only = ("-p", "pretended_launches", "-k", "page_cache_to_a_draining_reader")
    recipe = subprocess.run(
        [
            *make,
            "bench-quick",
            f"BIN={Path(sys.executable).parent}",
            f"ARGS={shlex.join([*only, *options])}",
        ],
        env={key: value for key, value in os.environ.items() if not key.startswith("M")},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = os.pathsep.join([str(BENCH), str(Path(__file__).parents[1] / "support")])
    env = {**os.environ, "PYTHONPATH": paths}
    return run(command=shlex.split(recipe.stdout), env=env, cwd=PROJECT)


def test_slow_strategy_fails_the_quick_benchmark():
    """With read forced, as if the fast path were broken, the floor of the ceiling is not met."""
    done = quick_benchmark("--strategy=read")
    assert done.returncode == 1, done.stdout
    assert "AssertionError: unix: against the ceiling: 0.25 is under the floor of" in done.stdout


def test_automatic_strategy_passes_the_quick_benchmark():
    """Every floor of the draining reader is met by what the package chooses itself."""
    done = quick_benchmark()
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def constants(node):
    """Return the texts that an expression's values are."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


def figure_names(path):
    """Return patterns of the names that a file's calls of `figure` give.

    A name is a constant, out of a dict, or a constant with values in it, which may be anything.
    """
    tree = ast.parse(path.read_text())
    dicts = {
        target.id: set().union(*map(constants, node.value.values))
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "figure":
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):
                parts = [next(iter(constants(part)), None) for part in name.values]
                found.add("".join(".+" if part is None else re.escape(part) for part in parts))
            else:
                names = dicts[name.value.id] if isinstance(name, ast.Subscript) else constants(name)
                found |= set(map(re.escape, names))
    return found


def test_every_figure_has_a_floor_and_every_floor_a_figure():
    """A figure that nothing holds, or a floor that holds nothing, is a mistake."""
    patterns = set().union(*map(figure_names, BENCH.glob("test_*.py")))
    floors = set(runpy.run_path(str(BENCH / "floors.py"))["FLOORS"])
    held = {floor: {p for p in patterns if re.fullmatch(p, floor)} for floor in floors}
    assert [floor for floor, figures in held.items() if not figures] == []
    assert patterns - set().union(*held.values()) == set()


@pytest.mark.parametrize("name", runpy.run_path(str(BENCH / "variants.py"))["VARIANTS"])
def test_variant_is_the_package_with_one_thing_changed(tmp_path, name):
    """It builds, is what Python imports, and differs from the package in one place."""
    variants = runpy.run_path(str(BENCH / "variants.py"))
    changed = variants["VARIANTS"][name]
    command = [*variants["build"](name, tmp_path), sys.executable, "-c"]
    told = "import nitro_vsock._core as core; print(core.__file__)"
    done = subprocess.run([*command, told], cwd=os.sep, stdout=subprocess.PIPE, check=True)
    assert Path(os.fsdecode(done.stdout.rstrip())).parent == tmp_path / "nitro_vsock"
    lines = (PROJECT / changed.file).read_text().splitlines()
    others = (tmp_path / changed.file).read_text().splitlines()
    assert sum(a != b for a, b in zip(lines, others, strict=True)) == 1


# bench/: the compiled peers


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The folder of the compiled peers; a warning is an error."""
    out = tmp_path_factory.mktemp("peers")
    for name in ("ceiling", "meter", "reference"):
        source = BENCH / "peers" / f"{name}.c"
        compiler = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*compiler, source, "-o", out / name], check=True)
    if RUSTC:
        source = BENCH / "peers" / "reference.rs"
        rustc = [RUSTC, "--edition=2021", "-Dwarnings", "-o", out / "reference-rust"]
        subprocess.run([*rustc, source], check=True)
    return out


def check_peer(peers, archive, path, *command):
    """Check the stream of a compiled peer, under the meter."""
    metered = [str(peers / "meter"), *map(str, command)]
    said = check_stream(metered, path, archive)
    assert set(said) == {"cpu", "peak"}
    assert said["peak"] > 0


@pytest.mark.parametrize("mode", ["sendfile", "resident"])
def test_ceiling_delivers_the_one_stream(peers, archive, guest_path, tmp_path, mode):
    """What shows the most that the kernel gives sends no byte less."""
    head = tmp_path / "head"
    head.write_bytes(senders.head(len(archive.data)))
    command = (peers / "ceiling", mode, f"unix:{guest_path}", head, archive.path)
    check_peer(peers, archive, guest_path, *command)


@pytest.mark.parametrize(
    "program",
    [
        "reference",
        pytest.param("reference-rust", marks=needs_tool("rustc")),
    ],
)
def test_reference_delivers_the_one_stream(peers, archive, guest_path, program):
    """The stand-in in C and that in Rust send what the package sends."""
    texts = [text.decode() for text in (*senders.ARGV, *senders.ENVP)]
    where = (f"unix:{guest_path}", senders.EXEC_PATH.decode(), archive.path)
    command = (peers / program, *where, len(senders.ARGV), *texts)
    check_peer(peers, archive, guest_path, *command)


def test_tree_reference_delivers_the_archive_it_packs(peers, guest_path, tmp_path):
    """The stand-in that packs a directory sends that archive whole, under rootfs/."""
    program = runpy.run_path(str(BENCH / "arena.py"))["compile_tree_reference"](tmp_path)
    if program is None:
        leave_out("cargo and the crate tar", install("cargo"))
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "name").write_bytes(os.urandom(5000))
    (tree / "link").symlink_to("etc/name")
    pack = subprocess.run([program, "pack", tree], stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(pack.stdout)) as tar:
        names = {"rootfs", "rootfs/etc", "rootfs/etc/name", "rootfs/link"}
        assert {member.name.rstrip("/") for member in tar} == names
        assert tar.extractfile("rootfs/etc/name").read() == (tree / "etc" / "name").read_bytes()
    texts = [text.decode() for text in (*senders.ARGV, *senders.ENVP)]
    where = (f"unix:{guest_path}", senders.EXEC_PATH.decode(), tree)
    command = (program, *where, len(senders.ARGV), *texts)
    check_peer(peers, Archive(tree, pack.stdout), guest_path, *command)


def test_meter_tells_of_a_program_that_fails(peers):
    """A peer that did not send is no result, and its own words are there."""
    with pytest.raises(ContestError, match=r"(?s)alas.*wait status 768"):
        contest.launch([str(peers / "meter"), *shell("echo alas >&2; exit 3")], None, {})


def test_empty_file_is_sent_as_an_empty_archive(peers, tmp_path, guest_path):
    """The smallest stream there is comes whole from a peer that reads all of it before."""
    path = tmp_path / "empty"
    path.touch()
    where = (f"unix:{guest_path}", senders.EXEC_PATH.decode(), path)
    texts = [text.decode() for text in (*senders.ARGV, *senders.ENVP)]
    command = (peers / "reference", *where, len(senders.ARGV), *texts)
    check_peer(peers, Archive(path, b""), guest_path, *command)
