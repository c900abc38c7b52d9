"""The command line, run in processes of its own as a user runs it."""

import contextlib
import ctypes
import hashlib
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from command import (
    COMMAND,
    ENVIRONMENT,
    LIMIT,
    PROJECT,
    assert_failed,
    await_line,
    receive_args,
    run,
    send_args,
    started,
)
from left_out import needs_root, needs_tool
from machine import CID, HAS_LOOPBACK
from peer import Guest, connect, handshake, wait_until
from vectors.tars import tar_of

from nitro_vsock.cli.compare import samples
from nitro_vsock.cli.ui.failures import MEANING
from nitro_vsock.cli.ui.params import parse_size


@pytest.fixture
def big(tmp_path):
    """A source of 1 GiB that takes no space; for peers that look at nothing."""
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    return path


@pytest.fixture
def stalled(big, uds, guest_path):
    """A `send` in the middle of its transfer, to a guest that has stopped reading."""
    with started(*send_args(big, uds, "--json")) as process:
        await_line(process, "listening at")
        with connect(guest_path) as guest:
            handshake(guest)
            left = 1 << 20
            while left:
                left -= len(guest.recv(left))
            yield process


# send and receive


def test_receive_gets_every_byte_that_send_sends(archive, uds, tmp_path):
    """Archive, strings and flags arrive; both results and the stored file have the digest."""
    out = tmp_path / "got.tar"
    program = ["/bin/app", "--json", "a b", 'say "x"', "--", b"\xff\xfe"]
    extra = ["--network-proxy", "--app-output", "--exec-path", "/bin/measured", "--json"]
    env = ["PATH=/bin", "A=old", "EMPTY=", "A=b=c"]
    with started(*send_args(archive.path, uds, *extra, program=program, env=env)) as sender:
        await_line(sender, f"listening at unix:{uds}_{CID + 1}")
        got = run(*receive_args(uds, "--strict", "--json", "--rootfs-out", str(out)))
        sent, _ = sender.communicate(timeout=LIMIT)
    assert (got.returncode, sender.returncode) == (0, 0), got.stderr
    received, report = json.loads(got.stdout), json.loads(sent)
    assert received["rootfs_sha256"] == archive.sha256
    assert out.read_bytes() == archive.data
    assert received["exec_path"] == "/bin/measured"
    assert received["argv"] == ["/bin/app", "--json", "a b", 'say "x"', "--", "\udcff\udcfe"]
    assert received["envp"] == ["PATH=/bin", "A=b=c", "EMPTY="]
    assert received["network_proxy"]
    assert received["app_output"]
    assert report["rootfs_bytes"] == received["rootfs_length"] == len(archive.data)
    assert report["bytes_sent"] == received["bytes_received"]
    assert report["strategy"] == "sendfile"


def test_independent_guest_takes_what_the_installed_command_sends(archive, uds, guest_path):
    """The console script sends a launch that the parser of peer.py takes whole."""
    script = Path(sys.executable).with_name("nitro-vsock")
    args = send_args(archive.path, uds, "--strategy", "read")
    with started(*args, command=[script]) as sender:
        await_line(sender, "listening at")
        taken = Guest(guest_path).result()
        said, _ = sender.communicate(timeout=LIMIT)
    assert sender.returncode == 0
    assert taken.rootfs_sha256 == archive.sha256
    assert (taken.path, taken.argv, taken.envp) == (b"/bin/app", [b"/bin/app"], [b"PATH=/bin"])
    assert f"{len(archive.data):,} bytes" in said
    assert "by read" in said


def test_receive_waits_for_a_listener(archive, uds):
    """With --wait the guest may come first."""
    with started(*receive_args(uds, "--wait", "--json")) as receiver:
        await_line(receiver, "waiting for a listener")
        sent = run(*send_args(archive.path, uds))
        got, _ = receiver.communicate(timeout=LIMIT)
    assert (sent.returncode, receiver.returncode) == (0, 0), sent.stderr
    assert json.loads(got)["rootfs_sha256"] == archive.sha256


def test_receive_quotes_what_the_host_chose(archive, uds):
    """An argument that would steer a terminal is shown escaped."""
    with started(*send_args(archive.path, uds, program=["/bin/app", "\x1b[31m"])) as sender:
        await_line(sender, "listening at")
        got = run(*receive_args(uds))
        sender.communicate(timeout=LIMIT)
    assert r"'/bin/app' '\x1b[31m'" in got.stdout
    assert archive.sha256 in got.stdout


# exit codes


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["--json"], "UsageError"),
        (["nonsense", "--json"], "NoSuchCommand"),
        (["send", "--bogus", "--json"], "NoSuchOption"),
        (["send", "--json"], "MissingParameter"),
        (["demo", "--size", "12 parsecs", "--json"], "BadParameter"),
        (["demo", "--size", "1K", "--rootfs", "x", "--json"], "UsageError"),
        (["demo", "--json", "/bin/program"], "UsageError"),
        (["receive", "--cid", "16", "--timeout", "-1", "--json"], "BadParameter"),
    ],
)
def test_wrong_usage_exits_2(args, kind):
    """A mistake on the command line is one line and, where --json is, one object."""
    done = run(*args)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2
    assert done.stderr == f"nitro-vsock: error: {error['message']}\n"
    # click 8.1 has fewer classes.
    assert error["class"] in (kind, "UsageError")


@pytest.mark.parametrize("variable", ["NAME", "=x"])
def test_malformed_variable_exits_2(archive, uds, variable):
    """--env wants NAME=VALUE."""
    done = run(*send_args(archive.path, uds, "--json", env=[variable]))
    error = assert_failed(done, 2, "BadParameter")
    assert "NAME=VALUE" in error["message"]


def test_argument_the_library_refuses_exits_2(archive, uds):
    """A CID that is no enclave's is refused before anything is bound."""
    done = run(*send_args(archive.path, uds, "--json", "--cid", "2"))
    assert_failed(done, 2, "InvalidArgumentError", "validate")
    assert not list(Path(uds).parent.iterdir())


def test_output_that_cannot_be_stored_exits_1(uds, guest_path, tmp_path):
    """A folder that is not there is one line, not a traceback."""
    out = str(tmp_path / "missing" / "out.tar")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest_path)
        listener.listen()
        done = run(*receive_args(uds, "--json", "--rootfs-out", out))
    error = assert_failed(done, 1, "FileNotFoundError")
    assert error["errno"] == 2


def test_address_in_use_exits_3(archive, uds, guest_path):
    """Another listener at the address is a connection failure, and stays there."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest_path)
        listener.listen()
        done = run(*send_args(archive.path, uds, "--json"))
    assert_failed(done, 3, "VsockBindError", "bind")
    assert Path(guest_path).exists()


def test_nobody_listening_exits_3(uds):
    """Without --wait the guest's one attempt decides."""
    done = run(*receive_args(uds, "--json"))
    assert_failed(done, 3, "VsockConnectError", "connect")


def test_no_guest_before_the_deadline_exits_4(archive, uds):
    """A guest that never comes ends with the deadline, and the socket file is removed."""
    done = run(*send_args(archive.path, uds, "--json", "--timeout", "0.1"))
    assert_failed(done, 4, "PollNoEventsError", "accept")
    assert not list(Path(uds).parent.iterdir())


def test_no_listener_before_the_deadline_exits_4(uds):
    """--wait waits until the deadline and no longer."""
    done = run(*receive_args(uds, "--json", "--wait", "--timeout", "0.1"))
    error = assert_failed(done, 4, "ConnectTimeoutError", "connect")
    assert "No such file" in error["message"]


def test_guest_that_goes_away_exits_5(big, uds, guest_path):
    """A guest that closes in the middle is reported with the bytes that were through."""
    with started(*send_args(big, uds, "--json")) as sender:
        await_line(sender, "listening at")
        with connect(guest_path) as guest:
            handshake(guest)
            guest.recv(1 << 20)
        out, err = sender.communicate(timeout=LIMIT)
    done = subprocess.CompletedProcess((), sender.returncode, out, err)
    error = assert_failed(done, 5, "PeerClosedError", "rootfs")
    assert 0 < error["bytes_sent"] < error["total"]
    assert error["must_terminate_enclave"]
    assert "the enclave holds part of the launch: end it" in err


def test_source_that_cannot_be_read_exits_6(uds, tmp_path):
    """A missing archive is the source's failure."""
    done = run(*send_args(tmp_path / "missing.tar", uds, "--json"))
    error = assert_failed(done, 6, "SourceReadError", "validate")
    assert error["errno"] == 2


def test_bytes_that_break_the_protocol_exit_7(uds, guest_path):
    """An unknown frame id ends `receive`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest_path)
        listener.listen()
        with started(*receive_args(uds, "--json")) as receiver:
            with listener.accept()[0] as host:
                handshake(host)
                host.sendall(b"\x09")
                out, err = receiver.communicate(timeout=LIMIT)
    done = subprocess.CompletedProcess((), receiver.returncode, out, err)
    assert_failed(done, 7, "UnknownFrameError", "read")


def test_enclave_that_dies_exits_8(archive, uds):
    """A hang-up of --enclave-fd ends the wait for the guest."""
    read_end, write_end = os.pipe()
    args = send_args(archive.path, uds, "--json", "--enclave-fd", str(read_end))
    try:
        with started(*args, pass_fds=[read_end]) as sender:
            await_line(sender, "listening at")
            os.close(write_end)
            out, err = sender.communicate(timeout=LIMIT)
    finally:
        os.close(read_end)
    done = subprocess.CompletedProcess((), sender.returncode, out, err)
    assert_failed(done, 8, "EnclaveDiedError", "accept")


def without_vsock():
    """For preexec_fn: make socket(AF_VSOCK) fail in this process as where the kernel lacks it."""
    system_call = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    load, equal, ret = 0x20, 0x15, 0x06
    rules = [
        (load, 0, 0, 0),  # the number of the system call
        (equal, 0, 3, system_call),
        (load, 0, 0, 16),  # its first argument
        (equal, 0, 1, socket.AF_VSOCK),
        (ret, 0, 0, 0x00050000 | 97),  # SECCOMP_RET_ERRNO, EAFNOSUPPORT
        (ret, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_no_new_privs, pr_set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) == 0
    assert libc.prctl(pr_set_seccomp, filter_mode, program, 0, 0) == 0


def test_kernel_without_vsock_exits_9(archive):
    """Where AF_VSOCK is missing, `send` says so."""
    args = ["send", "--cid", str(CID), "--rootfs", str(archive.path), "--env", "A=1", "--json"]
    done = run(*args, "/x", preexec_fn=without_vsock)
    assert_failed(done, 9, "UnsupportedError", "bind")


def test_doctor_exits_9_without_vsock():
    """`doctor` prints what it found all the same."""
    done = run("doctor", "--json", preexec_fn=without_vsock)
    assert done.returncode == 9, done.stderr
    found = json.loads(done.stdout)
    assert not found["af_vsock"]
    assert found["loopback_problem"]


@pytest.mark.parametrize(
    ("number", "code", "kind"),
    [(signal.SIGINT, 130, "KeyboardInterrupt"), (signal.SIGTERM, 143, "TerminatedError")],
)
def test_signal_in_the_middle_of_a_transfer_ends_it_cleanly(stalled, uds, number, code, kind):
    """The process ends at once with the signal's exit code and leaves no socket file."""
    began = time.monotonic()
    stalled.send_signal(number)
    out, err = stalled.communicate(timeout=LIMIT)
    assert time.monotonic() - began < 2
    done = subprocess.CompletedProcess((), stalled.returncode, out, err)
    assert_failed(done, code, kind)
    assert not list(Path(uds).parent.iterdir())


def test_signal_ends_a_waiting_receive():
    """Ctrl-C while there is no listener yet exits with 130."""
    with started(*receive_args("/nonexistent/v.sock", "--wait", "--json")) as receiver:
        await_line(receiver, "waiting for a listener")
        receiver.send_signal(signal.SIGINT)
        out, err = receiver.communicate(timeout=LIMIT)
    assert_failed(
        subprocess.CompletedProcess((), receiver.returncode, out, err), 130, "KeyboardInterrupt"
    )


def test_documentation_and_help_have_every_exit_code():
    """docs/cli.md and --help list the codes as the program has them."""
    page = (PROJECT / "docs" / "cli.md").read_text()
    shown = run("send", "--help").stdout
    for code, meaning in MEANING.items():
        assert f"| {code.value} | {meaning} |" in page
        assert f"{code.value}  {meaning}" in shown


# what is shown


def test_debug_shows_traceback_and_log(archive, uds):
    """--debug, before or after the command, adds what a developer wants to see."""
    args = send_args(archive.path, uds, "--timeout", "0.1")
    for debugged in (["--debug", *args], [args[0], "--debug", *args[1:]]):
        done = run(*debugged)
        assert done.returncode == 4
        assert "Traceback" in done.stderr
        assert "DEBUG: listening at" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("nitro-vsock: error: no guest connected")


def test_warning_of_the_library_is_shown(archive, uds):
    """A program that the guest will not find is warned of."""
    done = run(*send_args(archive.path, uds, "--timeout", "0.1", program=["app"], env=["A=1"]))
    assert "nitro-vsock: WARNING: argv[0] has no slash" in done.stderr


def test_progress_without_a_terminal_is_a_line_a_second(stalled):
    """A log gets whole lines with rate and share, not more than about one a second."""
    times = []
    for _ in range(3):
        line = await_line(stalled, "MiB of 1.0 GiB")
        times.append(time.monotonic())
        assert re.fullmatch(
            r"nitro-vsock: [\d.]+ MiB of 1\.0 GiB, \d+ %, [\d.]+ .?i?B/s, [\d:]+ left\n", line
        )
    assert times[2] - times[1] > 0.9


def test_progress_on_a_terminal_is_a_bar():
    """A terminal gets a bar that is drawn over, with rate and share."""
    terminal, end = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "demo", "--size", "64MiB"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=end,
            env=ENVIRONMENT,
        ) as process:
            os.close(end)
            shown = b""
            # Once the last holder of the other end is gone, a terminal gives EIO.
            with contextlib.suppress(OSError):
                while piece := os.read(terminal, 1 << 16):
                    shown += piece
    finally:
        os.close(terminal)
    assert process.returncode == 0
    text = shown.decode()
    assert "━" in text
    assert "\x1b[2K" in text
    assert "64.0 MiB of 64.0 MiB, 100 %" in text


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_nobody_reads_ends_nothing(archive, uds, stream):
    """A launch succeeds although the pipe its output goes to is closed."""
    with started(*receive_args(uds, "--wait", "--json")) as receiver:
        await_line(receiver, "waiting for a listener")
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, stream: write_end}
            sent = subprocess.run(
                [*COMMAND, *send_args(archive.path, uds)],
                env=ENVIRONMENT,
                timeout=LIMIT,
                check=False,
                **streams,
            )
        finally:
            os.close(write_end)
        receiver.communicate(timeout=LIMIT)
    assert (sent.returncode, receiver.returncode) == (0, 0)
    assert b"Broken pipe" not in (sent.stderr or b"")


@pytest.mark.parametrize("module", ["click", "rich"])
def test_missing_extra_says_what_to_install(module):
    """Without click or rich there is one line, and exit code 2."""
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['nitro-vsock', 'doctor'];"
        "from nitro_vsock.cli import main; sys.exit(main())"
    )
    done = run(command=[sys.executable, "-c", program])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"nitro-vsock: error: {module} is not installed: pip install 'nitro_vsock[cli]'\n"
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("7B", 7),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("4G", 4 << 30),
        ("4GiB", 4 << 30),
        ("1.5GB", 1_500_000_000),
        ("2tb", 2 * 10**12),
        ("0.5k", 512),
    ],
)
def test_size_is_read_as_gnu_tools_read_it(text, size):
    """Units of 1024 and of 1000, in any case, with fractions."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5.2", "1e3", "12 parsecs", "0", "0.1", "1ib"])
def test_what_is_no_size_is_refused(text):
    """The error quotes the text."""
    with pytest.raises(click.BadParameter, match=re.escape(repr(text))):
        parse_size(text)


# doctor


def test_doctor_says_what_the_machine_can_do():
    """The object and the lines name kernel, loopback, strategies and buffers."""
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["af_vsock"] else 9)
    assert found["kernel"] == os.uname().release
    assert found["strategies"]["unix"] == {"file": "sendfile", "pipe": "splice"}
    assert found["unix_sndbuf"] > 0
    assert found["nitro_enclaves"] == Path("/dev/nitro_enclaves").exists()
    plain = run("doctor")
    assert plain.returncode == done.returncode
    assert plain.stderr == ""
    for word in ("AF_VSOCK", "vsock loopback", "local CID", "wmem_max", "ports up to 1023"):
        assert word in plain.stdout


@needs_root
@needs_tool("setpriv", "util-linux")
def test_doctor_tells_where_ports_are_reserved():
    """Without the capability, ports up to 1023 are refused."""
    drop = ["setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"]
    found = json.loads(run("doctor", "--json", command=[*drop, *COMMAND]).stdout)
    assert found["reserved_ports_problem"] == "Permission denied"


# demo


def test_demo_launches_a_real_root_file_system():
    """With no options: a real program runs in what arrived."""
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "the standard library of python3" in done.stderr
    assert "  hello from the enclave: process " in done.stdout
    assert re.search(r"  /usr/lib/python3\.\d+ has \d{3} entries\n  exit code 42\n", done.stdout)
    digests = re.findall(r"sha256 +([0-9a-f]{64})\n", done.stdout)
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert done.stdout.endswith("The digests agree.\n")
    for shown in ("throughput", "peak memory"):
        assert shown in done.stdout


def test_demo_runs_a_program_of_the_given_tree(tmp_path):
    """What follows the options is run in --rootfs; its output and its end are shown."""
    (tmp_path / "bin").mkdir()
    source = Path(samples.__file__).with_name("hello.c")
    subprocess.run(["gcc", "-static", "-o", tmp_path / "bin" / "hi", source], check=True)
    done = run("demo", "--json", "--rootfs", str(tmp_path), "--", "/bin/hi", "7", "/bin")
    assert done.returncode == 0, done.stderr
    program = json.loads(done.stdout)["program"]
    assert (program["exit_code"], program["signal"]) == (7, None)
    assert program["output"][1:] == ["GREETING is héllo", "/bin has 1 entries"]


def test_demo_sends_the_given_archive(archive, uds):
    """--rootfs is what arrives; what the demo made for itself is removed."""
    folder = Path(uds).parent / "work"  # short: the demo's socket lies in it
    folder.mkdir()
    env = {**ENVIRONMENT, "TMPDIR": str(folder)}
    done = run("demo", "--rootfs", str(archive.path), "--json", env=env)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["received"]["rootfs_sha256"] == outcome["sha256"] == archive.sha256
    assert outcome["digests_agree"]
    assert outcome["transport"] == ("vsock" if HAS_LOOPBACK else "unix")
    assert not list(folder.iterdir())


def test_demo_memory_does_not_depend_on_the_size():
    """The sender's peak for 1 GiB is that for 1 MiB, and the transfer hardly adds to it."""
    memory = {}
    for size in ("1MiB", "1GiB"):
        done = run("demo", "--size", size, "--json")
        assert done.returncode == 0, done.stderr
        outcome = json.loads(done.stdout)
        assert outcome["sent"]["rootfs_bytes"] == parse_size(size)
        memory[size] = outcome["sender_memory"]
    assert memory["1GiB"]["grown"] < 8 << 20
    assert abs(memory["1GiB"]["peak"] - memory["1MiB"]["peak"]) < 8 << 20


def test_demo_tells_why_the_reader_refused(tmp_path):
    """An archive the guest could not unpack ends with the reader's own error and exit code."""
    path = tmp_path / "bad.tar"
    path.write_bytes(tar_of("rootfs/data", "elsewhere/a"))
    done = run("demo", "--rootfs", str(path), "--json")
    error = assert_failed(done, 7, "GuestRuleError", "read")
    assert error["message"].startswith("the reader: ")


def test_demo_fails_where_the_digests_differ(archive, tmp_path):
    """A reader that got other bytes than were sent is a failure."""
    (tmp_path / "sitecustomize.py").write_text(
        "import hashlib, sys\n"
        "if 'receive' in sys.orig_argv:\n"
        "    true = hashlib.sha256\n"
        "    hashlib.sha256 = lambda: true(b'one byte too many')\n"
    )
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = run("demo", "--rootfs", str(archive.path), "--json", env=env)
    error = assert_failed(done, 1, "DemoError")
    assert hashlib.sha256(archive.data).hexdigest() in error["message"]


def test_demo_does_not_hang_where_the_reader_cannot_start(archive, tmp_path):
    """A reader that dies before it connects ends the demonstration at once."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'receive' in sys.orig_argv:\n    os._exit(3)\n"
    )
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = run("demo", "--rootfs", str(archive.path), "--json", env=env)
    error = assert_failed(done, 1, "DemoError")
    assert "ended with exit code 3 and said nothing" in error["message"]


def test_demo_ignores_a_folder_of_the_package_s_name(archive, tmp_path):
    """Run inside a source tree that is not built, the installed package is used."""
    package = tmp_path / "nitro_vsock"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    script = Path(sys.executable).with_name("nitro-vsock")
    done = run("demo", "--rootfs", str(archive.path), command=[script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_interrupted_demo_leaves_nothing(uds):
    """Ctrl-C at a terminal, which reaches the reader too, leaves no process and no file."""
    folder = Path(uds).parent  # short: the demo's socket lies in it
    with started(
        "demo",
        "--size",
        "1TiB",
        "--json",
        env={**ENVIRONMENT, "TMPDIR": str(folder)},
        start_new_session=True,
    ) as process:
        await_line(process, "of 1.0 TiB")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    done = subprocess.CompletedProcess((), process.returncode, out, err)
    assert_failed(done, 130, "KeyboardInterrupt")
    assert not list(folder.iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_interrupted_demo_ends_a_reader_that_hangs(archive, tmp_path):
    """The signal reaches the demo alone, while its reader has not connected: both end at once."""
    here = tmp_path / "reader"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'receive' in sys.orig_argv:\n"
        f"    open({str(here)!r}, 'x').close()\n"
        "    signal.pause()\n"
    )
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    args = ["demo", "--rootfs", str(archive.path), "--json"]
    with started(*args, env=env, start_new_session=True) as process:
        wait_until(here.exists, what="the reader's start")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    done = subprocess.CompletedProcess((), process.returncode, out, err)
    assert_failed(done, 130, "KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
