"""Owns: the commands with standard streams that are closed, full, unread or narrow."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from command import COMMAND, ENVIRONMENT, LIMIT, await_line, run, send_args, started

VSOCK_CODES = (0, 9)
"""Of `doctor`, with and without AF_VSOCK."""


@pytest.fixture
def tree(tmp_path):
    """A directory with one file."""
    (tmp_path / "tree" / "bin").mkdir(parents=True)
    (tmp_path / "tree" / "bin" / "app").write_text("#!/bin/none\n")
    return tmp_path / "tree"


@pytest.fixture(
    params=[
        ("host --help", (0,)),
        ("--json bogus", (2,)),
        ("doctor", VSOCK_CODES),
        ("check --rootfs TREE --env A=1 -- /bin/none", (10,)),
        ("pack TREE -o TREE.tar", (0,)),
        ("receive --cid 16 --uds-path TREE --timeout 0", (3, 4)),
        ("host --cid 16 --uds-path TREE --rootfs TREE --env A=1 --timeout 0 -- /bin/app", (125,)),
    ],
    ids=["help", "json", "doctor", "check", "pack", "receive", "host"],
)
def command(request, tree):
    """A command line, and the exit codes it may have."""
    line, codes = request.param
    return [word.replace("TREE", str(tree)) for word in line.split()], codes


def unread_pipe():
    """Return a pipe that nobody reads any more."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def test_pipes_nobody_reads_change_no_exit_code(command):
    """As with `| head -1`: the exit code says what became of the command."""
    args, codes = command
    pipe = unread_pipe()
    try:
        done = subprocess.run(
            [*COMMAND, *args], stdout=pipe, stderr=pipe, env=ENVIRONMENT, timeout=LIMIT, check=False
        )
    finally:
        os.close(pipe)
    assert done.returncode in codes


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)], ids=str)
def test_closed_descriptors_change_no_exit_code(command, closed):
    """As with `>&-`: nothing is said, nothing fails, and nobody else gets the number."""
    args, codes = command
    done = run(*args, preexec_fn=lambda: list(map(os.close, closed)))
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    if 1 in closed:
        assert done.stdout == ""


def test_demo_needs_no_standard_descriptors():
    """Nor do its guest and the descriptors between the two get their numbers."""
    done = run("demo", "--size", "1MiB", preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 0


def test_full_stdout_is_one_line_and_exit_code_1(command):
    """A result that cannot be written is no success, and the failure is never a traceback."""
    args, codes = command
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            timeout=LIMIT,
            check=False,
        )
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1
    assert done.stderr.splitlines()[-1] == said[0]
    if done.returncode == 1:
        assert said == ["nitro-vsock: error: stdout cannot be written to: No space left on device"]
    else:
        assert done.returncode in codes
        assert done.returncode > 1


def test_full_stderr_ends_nothing(command):
    """Notes that cannot be written are dropped."""
    args, codes = command
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *args],
            stdout=subprocess.DEVNULL,
            stderr=full,
            env=ENVIRONMENT,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode in codes


def test_pack_refuses_a_closed_stdout(tree):
    """An archive that goes nowhere is not packed."""
    done = run("pack", str(tree), "-o", "-", preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert "error: stdout is closed: give a file or a pipe" in done.stderr


def test_non_blocking_stdout_is_waited_for():
    """A pipe that another process has made non-blocking takes all of the output in the end."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    filling = b"x" * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    assert os.write(write_end, filling) == len(filling)
    with (
        open(read_end, "rb") as pipe,
        subprocess.Popen(
            [*COMMAND, "--help"], stdout=write_end, stderr=subprocess.PIPE, env=ENVIRONMENT
        ) as process,
    ):
        os.close(write_end)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        got = pipe.read()
        assert process.communicate(timeout=LIMIT)[1] == b""
    assert process.returncode == 0
    assert got.removeprefix(filling).endswith(b"(SIGTERM)\n")


def on_terminal(columns, *args, env=ENVIRONMENT):
    """Run a command on a terminal of this width; return its exit code and what was shown."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}
    with open(terminal, "rb", buffering=0) as file:
        with subprocess.Popen(
            [*COMMAND, *args], stdin=end, stdout=end, stderr=end, env=env
        ) as process:
            os.close(end)
            shown = b""
            try:
                while piece := file.read(1 << 16):
                    shown += piece
            except OSError:  # EIO: the last holder of the other end is gone
                pass
    return process.returncode, shown.decode(errors="backslashreplace")


@pytest.mark.parametrize("columns", [1, 20, 60, 80])
def test_findings_are_shown_whole_on_a_narrow_terminal(tree, columns):
    """No word of a finding is cut off, however little room there is."""
    program = "/bin/a-program-with-quite-a-long-name"
    code, shown = on_terminal(columns, "check", f"--rootfs={tree}", "--env=A=1", "--", program)
    assert code == 10
    assert "…" not in shown
    shown = re.sub(r"\x1b\[[\d;]*m", "", shown)
    flat = "".join(char for char in shown if char.isalnum() or char in "-/")
    for word in ("program-missing", "correct"):
        assert word in flat


def test_terminal_that_goes_away_ends_no_launch(tree):
    """Its window was closed: the bar and the result have nowhere to go, and the demo succeeds."""
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "demo", "--size", "256MiB"],
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        os.close(end)
        assert os.read(terminal, 1 << 16)
        os.close(terminal)
        process.wait(LIMIT)
    assert process.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_encoding_lacks_is_escaped(tree, encoding):
    """The name of a file that no encoding has is shown all the same."""
    env = {**ENVIRONMENT, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    program = b"/bin/\xff\xd0\x96"
    done = subprocess.run(
        [*COMMAND, "check", "--rootfs", tree, "--env", "A=1", "--", program],
        capture_output=True,
        env=env,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (10, b"")
    assert b"program-missing" in done.stdout


def test_second_signal_while_an_error_is_told_is_no_traceback(archive, uds):
    """The command is about to end with the first one's exit code, or ends with the second."""
    read_end, write_end = os.pipe()
    with started(*send_args(archive.path, uds), stdin=read_end) as process:
        os.close(read_end)
        await_line(process, "listening at")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=LIMIT)[1]
    os.close(write_end)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in err


def test_package_that_cannot_be_loaded_is_one_line():
    """A broken installation is said in a line; --debug has the traceback."""
    program = (
        "import sys; sys.modules['nitro_vsock._core'] = None; sys.argv[0] = 'nitro-vsock';"
        "from nitro_vsock.cli import main; sys.exit(main())"
    )
    done = run("doctor", command=[sys.executable, "-c", program])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nitro-vsock: error: the package cannot be loaded: ")
    assert len(done.stderr.splitlines()) == 1
    debugged = run("--debug", "doctor", command=[sys.executable, "-c", program])
    assert "Traceback" in debugged.stderr
