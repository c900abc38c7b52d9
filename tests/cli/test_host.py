"""`nitro-vsock host` as a process, with the guest stand-in or a scripted one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from command import COMMAND, ENVIRONMENT, LIMIT, await_line
from left_out import needs_tool
from machine import CID
from session_guest import SessionGuest

from nitro_vsock.testing import GuestEmulator

FRAME = (60).to_bytes(4, "big") + bytes(range(60))


@contextlib.contextmanager
def host(uds, archive, *argv, options=(), **more):
    """Run the command; Ctrl-C reaches it, whatever started this."""
    more.setdefault("env", ENVIRONMENT)
    process = subprocess.Popen(
        [
            *(*COMMAND, "host", f"--cid={CID}", f"--uds-path={uds}", f"--rootfs={archive}"),
            *("--env=PATH=/bin", *options, "--", *argv),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **more,
    )
    with process:
        try:
            await_line(process, "listening for CID")
            yield process
        finally:
            process.kill()


@pytest.fixture
def archive_of(tmp_path, programs):
    """Return an archive with programs in /bin."""

    def make(*names):
        path = tmp_path / "programs.tar"
        path.write_bytes(programs.tar(*names))
        return path

    return make


def boot(uds, **options):
    """Boot a guest."""
    return GuestEmulator(CID, uds_path=uds, **options).start()


@pytest.mark.parametrize("status", [0, 3, 125])
def test_exits_with_the_program_s_code(uds, archive_of, status):
    """And its output, standard error too, is all that stdout has."""
    archive = archive_of("hello")
    with host(uds, archive, "/bin/hello", str(status)) as process, boot(uds) as guest:
        out, err = process.communicate(timeout=LIMIT)
        assert guest.result().answered
    assert (process.returncode, out) == (status, "hello\ntrouble\n")
    assert err.splitlines() == [f"nitro-vsock: the program: exit code {status}"]


@pytest.mark.parametrize("number", [9, 15])
def test_exits_with_128_and_the_signal_that_ended_the_program(uds, archive_of, number):
    """As a shell does."""
    archive = archive_of("kill-me")
    with host(uds, archive, "/bin/kill-me", str(number)) as process, boot(uds):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number
    assert f"the program: ended by signal {number}" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_end_the_program(uds, archive_of, number):
    """It gets a SIGTERM, may say something, and its guest reports 0."""
    archive = archive_of("polite")
    with host(uds, archive, "/bin/polite") as process, boot(uds) as guest:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        report = guest.result()
    assert (process.returncode, out) == (0, "bye\n")
    assert report.signals == (signal.SIGTERM,)
    assert "SIGTERM was passed on" in err


def test_second_ctrl_c_ends_the_command(uds, archive_of):
    """A program that will not end keeps nobody."""
    archive = archive_of("stubborn")
    options = {"misbehave": "ignore-sigterm"}
    with host(uds, archive, "/bin/stubborn") as process, boot(uds, **options):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        await_line(process, "Ctrl-C once more")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_the_launch_ends_the_command(uds, archive_of, number):
    """There is no program to end; no socket file stays."""
    with host(uds, archive_of("hello"), "/bin/hello") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (128 + number, "")
    assert "error: cancelled" in err
    assert os.listdir(os.path.dirname(uds)) == []


def test_failure_of_the_host_exits_125(uds, archive_of):
    """A guest that vanishes is no exit code of a program."""
    with host(uds, archive_of("hello"), "/bin/hello") as process:
        with boot(uds, die_at="exited"):
            out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (125, "hello\ntrouble\n")
    assert "error: " in err
    assert "end it" in err


def test_deadline_of_the_program_exits_125(uds, archive_of):
    """--run-timeout."""
    options = ["--run-timeout=0.2"]
    with host(uds, archive_of("wait"), "/bin/wait", options=options) as process, boot(uds):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 125
    assert "the program has not ended" in err


def test_deadline_after_a_signal_exits_125(uds, archive_of):
    """--stop-timeout, for a program that does not obey."""
    archive, options = archive_of("stubborn"), ["--stop-timeout=0.2"]
    with host(uds, archive, "/bin/stubborn", options=options) as process:
        with boot(uds, misbehave="ignore-sigterm"):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
    assert process.returncode == 125
    assert "the program has not ended after SIGTERM" in err


def test_console_is_shown_on_stderr(uds, archive_of):
    """--console: what the enclave's kernel prints, beside the program's output on stdout."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.bind(f"{uds}_{CID + 10000}")
        console.listen()
        console.settimeout(LIMIT)
        archive = archive_of("hello")
        with host(uds, archive, "/bin/hello", options=["--console"]) as process:
            with console.accept()[0] as sock:
                sock.sendall(b"Linux version\n")
                await_line(process, "Linux version")
                with boot(uds):
                    out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, "hello\ntrouble\n")


def test_output_on_stdout_is_the_program_s_alone(uds, archive_of):
    """Even with --json: what the command has to say goes to stderr."""
    options = ["--json"]
    with host(uds, archive_of("hello"), "/bin/hello", options=options) as process:
        with boot(uds, die_at="exited"):
            out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (125, "hello\ntrouble\n")
    assert "error: " in err


def test_enclave_fd_is_watched(uds, archive_of):
    """An enclave that is gone ends the command at once."""
    archive = archive_of("wait")
    theirs, ours = os.pipe()
    options = [f"--enclave-fd={theirs}"]
    with host(uds, archive, "/bin/wait", options=options, pass_fds=[theirs]) as process:
        os.close(theirs)
        with boot(uds):
            assert process.stdout.readline() == "ready\n"
            os.close(ours)
            _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 125
    assert "the enclave died" in err


def test_output_to_a_file_leaves_stdout_to_the_report(uds, archive_of, tmp_path):
    """--output and --json."""
    target = tmp_path / "out"
    options = [f"--output={target}", "--json"]
    with host(uds, archive_of("hello"), "/bin/hello", "3", options=options) as process, boot(uds):
        out, _ = process.communicate(timeout=LIMIT)
    report = json.loads(out)
    assert (process.returncode, report["exit_code"], report["signal"]) == (3, 3, None)
    assert report["output_complete"]
    assert report["launch"]["peer_closed"]
    assert target.read_text() == "hello\ntrouble\n"


def test_closed_stdout_is_an_error_that_says_so(uds, archive_of):
    """As with `| head`: the output cannot be delivered."""
    with host(uds, archive_of("flood"), "/bin/flood", str(1 << 30)) as process, boot(uds):
        process.stdout.close()
        process.wait(LIMIT)
        err = process.stderr.read()
    assert process.returncode == 125
    assert "the output cannot be written: descriptor 1: Broken pipe" in err


@pytest.mark.parametrize("kind", ["--net-fd", "--net-socket"])
def test_network_goes_to_the_given_backend(uds, archive_of, kind, tmp_path):
    """Frames of the guest arrive, unchanged, after the MTU."""
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        fds, value = [theirs.fileno()], theirs.fileno()
        if kind == "--net-socket":
            value = f"{uds}_backend"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(value)
            listener.listen()
        options = [f"{kind}={value}"]
        archive = archive_of("hello")
        process = stack.enter_context(
            host(uds, archive, "/bin/hello", options=options, pass_fds=fds)
        )
        theirs.close()
        if kind == "--net-socket":
            ours = stack.enter_context(listener.accept()[0])
        guest = SessionGuest(uds, CID, program=lambda guest: guest.net.sendall(FRAME))
        assert ours.recv(len(FRAME), socket.MSG_WAITALL) == FRAME
        process.communicate(timeout=LIMIT)
        guest.result()
    assert process.returncode == 0


def test_frame_that_is_longer_than_the_guest_s_mtu_ends_the_session(uds, archive_of):
    """What claims 2 GiB is no frame."""
    ours, theirs = socket.socketpair()
    options = [f"--net-fd={theirs.fileno()}"]
    archive = archive_of("wait")
    with (
        ours,
        theirs,
        host(uds, archive, "/bin/wait", options=options, pass_fds=[theirs.fileno()]) as process,
        boot(uds, misbehave="long-frame"),
    ):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 125
    assert "the guest's network connection broke off: Message too long" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--net-fd=0", "--passt"], "exclude each other"),
        (["--passt-arg=-t80"], "needs --passt"),
        (["--bogus"], "No such option"),
    ],
)
def test_wrong_usage_exits_2(uds, options, said):
    """Before anything is bound."""
    arguments = [f"--cid={CID}", f"--uds-path={uds}", "--rootfs=x", "--env=A=1", *options]
    done = subprocess.run(
        [*COMMAND, "host", *arguments, "--", "/bin/app"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@needs_tool("passt")
def test_passt_is_started_and_ends_with_the_command(uds, archive_of):
    """It runs while the program does, and no longer."""
    with host(uds, archive_of("polite"), "/bin/polite", options=["--passt"]) as process:
        with boot(uds):
            assert process.stdout.readline() == "ready\n"
            (child,) = children(process.pid)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert not os.path.exists(f"/proc/{child}")


@needs_tool("passt")
def test_passt_that_fails_says_why(uds, archive_of):
    """An option it does not know."""
    options = ["--passt", "--passt-arg=--bogus"]
    with host(uds, archive_of("wait"), "/bin/wait", options=options) as process, boot(uds):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 125
    assert "the connection to the network backend broke off" in err
    assert "passt ended with exit code 1: " in err
    assert "unrecognized option '--bogus'" in err


@needs_tool("passt")
def test_ctrl_c_at_the_terminal_leaves_passt_running(uds, archive_of):
    """It goes to all processes there: the program ends with its network, not for want of it."""
    with host(uds, archive_of("polite"), "/bin/polite", options=["--passt"]) as process, boot(uds):
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, "bye\n")


def test_passt_that_does_not_end_is_killed(uds, archive_of, tmp_path):
    """After a moment; a stand-in that keeps its socket and ignores everything."""
    (tmp_path / "passt").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "passt").chmod(0o755)
    env = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    archive, options = archive_of("hello"), ["--passt"]
    with host(uds, archive, "/bin/hello", options=options, env=env) as process, boot(uds):
        (child,) = children(process.pid)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert not os.path.exists(f"/proc/{child}")


def children(pid):
    """Return the children of a process."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_missing_passt_is_named(uds, archive_of, tmp_path):
    """With the package to install."""
    env = {**ENVIRONMENT, "PATH": str(tmp_path)}
    arguments = [f"--cid={CID}", f"--uds-path={uds}", f"--rootfs={archive_of('hello')}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nitro_vsock",
            "host",
            *arguments,
            "--env=A=1",
            "--passt",
            "--",
            "/x",
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=env,
        check=False,
    )
    assert done.returncode == 2
    assert "apt-get install passt" in done.stderr


@pytest.mark.parametrize(("guest", "code"), [("krun-rust-init", 3), ("krun-1.18", 128 + 3)])
def test_return_code_means_what_the_named_guest_means(uds, archive_of, guest, code):
    """The number 3 is an exit code of one guest, and a signal of another."""
    with host(uds, archive_of("hello"), "/bin/hello", options=("--guest", guest)) as process:
        started = SessionGuest(uds, CID, status=3)
        try:
            process.communicate(timeout=LIMIT)
        finally:
            started.finish()
    assert process.returncode == code
