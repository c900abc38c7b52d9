"""Whole launches over AF_VSOCK: EnclaveSession, and the guest stand-in that runs the program."""

import signal

import pytest

from nitro_vsock import EnclaveArgsWriter, EnclaveDiedError, EnclaveSession, OutputProxy, Rootfs
from nitro_vsock.testing import Enclave


@pytest.fixture
def loopback():
    """An enclave's place over loopback; a machine without it is no reason to pass."""
    with Enclave("vsock") as place:
        yield place


def session_of(loopback, programs, argv, lines):
    """Return a session whose program's output goes to `lines`."""
    writer = EnclaveArgsWriter(
        Rootfs.from_bytes(programs.tar(argv[0].rpartition("/")[2])),
        argv[0],
        argv,
        {"PATH": "/bin"},
        proxies=[OutputProxy(lines.append)],
    )
    return EnclaveSession(writer, loopback.cid, **loopback.host_options)


@pytest.mark.parametrize("status", [0, 3])
def test_program_s_output_and_status_arrive(loopback, programs, status):
    """Unpacked, run in namespaces of its own, reported, answered."""
    lines = []
    with session_of(loopback, programs, ["/bin/hello", str(status)], lines) as session:
        guest = loopback.boot()
        ended = session.run_sync(enclave_fd=guest.fileno())
        report = guest.result()
    assert (ended.returncode, lines, ended.output_complete) == (status, ["hello", "trouble"], True)
    assert (report.status, report.answered) == (status << 8, True)


def test_sigterm_reaches_the_program(loopback, programs):
    """It says so on its way out; the guest reports 0."""
    lines = []

    class Seen(list):
        def append(self, line):
            lines.append(line)
            if line == "ready":
                session.terminate()

    with session_of(loopback, programs, ["/bin/polite"], Seen()) as session:
        guest = loopback.boot()
        ended = session.run_sync(enclave_fd=guest.fileno())
        report = guest.result()
    assert (ended.returncode, ended.terminated, lines) == (0, True, ["ready", "bye"])
    assert report.signals == (signal.SIGTERM,)


def test_guest_that_dies_is_an_error_with_its_last_words(loopback, programs):
    """Its descriptor hangs up."""
    lines = []
    with session_of(loopback, programs, ["/bin/hello"], lines) as session:
        guest = loopback.boot(die_at="exited")
        with pytest.raises(EnclaveDiedError) as caught:
            session.run_sync(enclave_fd=guest.fileno())
    assert caught.value.last_output == ("hello", "trouble")
