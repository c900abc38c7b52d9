"""Owns: `nitro-vsock guest` as a process, against a scripted host."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from machine import CID
from scripted_host import OUTPUT, SIGNAL, ScriptedHost, exactly, until_end

GUEST = [sys.executable, "-m", "nitro_vsock", "guest"]


@contextlib.contextmanager
def command(uds, *options):
    """Run the command; Ctrl-C reaches it, whatever started this."""
    process = subprocess.Popen(
        [*GUEST, f"--cid={CID}", f"--uds-path={uds}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_life(uds, programs):
    """What it got, how it was isolated, how the program ended; its points are notes."""
    with ScriptedHost(uds, CID) as host, command(uds, "--isolation=plain") as guest:
        host.hand_over(programs.tar("hello"), [b"/bin/hello", b"3"], flags=b"\5")
        assert until_end(host.accept(OUTPUT)) == b"hello\ntrouble\n"
        assert host.status() == 768
        said, notes = guest.communicate(timeout=20)
    assert guest.returncode == 0
    assert "argv         '/bin/hello' '3'" in said
    assert "isolation    plain, root " in said
    assert "program      exit code 3" in said
    assert "reported     768, answered by the host" in said
    assert notes.startswith("nitro-vsock: guest: handshake\n")


def test_json(uds, programs):
    """One object, the report."""
    with ScriptedHost(uds, CID) as host, command(uds, "--json", "--misbehave=no-return-code") as it:
        host.hand_over(programs.tar("kill-me"), [b"/bin/kill-me", b"9"])
        said, _ = it.communicate(timeout=20)
    report = json.loads(said)
    assert report["exit_code"] == -9
    assert report["status"] is None
    assert report["args"]["argv"] == ["/bin/kill-me", "9"]


def test_output_without_the_flag_goes_to_stderr(uds, programs):
    """As to the real guest's console."""
    with ScriptedHost(uds, CID) as host, command(uds) as guest:
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        assert host.status() == 0
        said, notes = guest.communicate(timeout=20)
    assert "hello\ntrouble\n" in notes
    assert "hello\ntrouble" not in said


def test_wait(uds, programs):
    """The host may come later."""
    with command(uds, "--wait", "--die-at=unpacked") as guest:
        assert "waiting for a listener" in guest.stderr.readline()
        with ScriptedHost(uds, CID) as host:
            host.hand_over(programs.tar("hello"), [b"/bin/hello"])
            said, _ = guest.communicate(timeout=20)
    assert "died         at unpacked, as told" in said
    assert guest.returncode == 0


def test_nobody_there(uds):
    """Without --wait a guest tries once; with it to the deadline."""
    with command(uds, "--json") as guest:
        said, _ = guest.communicate(timeout=20)
    assert guest.returncode == 3
    assert json.loads(said)["error"]["class"] == "VsockConnectError"
    with command(uds, "--wait", "--timeout=0.3") as guest:
        guest.communicate(timeout=20)
    assert guest.returncode == 4


def test_a_missing_proxy_is_not_waited_for(uds, programs):
    """--wait is for the first connection; what fails later is an error at once."""
    with ScriptedHost(uds, CID, (1, 4)) as host, command(uds, "--wait") as guest:
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        _, notes = guest.communicate(timeout=20)
    assert guest.returncode == 3
    assert "signal_handler" in notes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it(uds, programs, number, code):
    """Ctrl-C and SIGTERM end the guest and its program at once."""
    with ScriptedHost(uds, CID) as host, command(uds) as guest:
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=b"\5")
        output = host.accept(OUTPUT)
        assert exactly(output, 6) == b"ready\n"
        os.kill(guest.pid, number)
        guest.communicate(timeout=20)
        assert guest.returncode == code
        assert until_end(output) == b""
        assert until_end(host.accept(SIGNAL)) == b""


def test_wrong_usage():
    """A point that is none."""
    done = subprocess.run([*GUEST, "--cid=16", "--die-at=x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "return-code" in done.stderr
