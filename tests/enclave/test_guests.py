"""The guests of other versions, where they differ from the deployed one."""

import pytest
from enclave.trees import launch, writer_of

from nitro_vsock import EnclaveSession, NitroVsockError, Rootfs


def test_rust_init_reports_a_bare_exit_code(real_enclave, tree):
    """7, not the wait status of 7."""
    status = launch(real_enclave, writer_of(Rootfs.from_directory(tree), "exit", "7"), RUST)
    assert status.status == 7


RUST, OLD = "guest.flavour=rust-init", "guest.flavour=1.17"


def test_rust_init_waits_for_the_program_after_sigterm(real_enclave, tree):
    """It reports when the program has ended; 0, since a signal ended it."""
    output = []

    def line(_text):
        output.append(1)
        session.terminate()

    writer = writer_of(Rootfs.from_directory(tree), "wait", output=line)
    with EnclaveSession(writer, real_enclave.cid, **real_enclave.host_options) as session:
        real_enclave.boot(RUST)
        status = session.run_sync(enclave_fd=real_enclave.fileno())
    assert (status.status, status.terminated) == (0, True)
    real_enclave.wait_for(r"exited status=15")


def test_rust_init_refuses_strings_that_are_not_utf8(real_enclave, tree):
    """The deployed guest takes any bytes."""
    writer = writer_of(Rootfs.from_directory(tree), b"\xff")
    with pytest.raises(NitroVsockError):
        launch(real_enclave, writer, RUST)
    real_enclave.wait_for("stops: a string is not UTF-8")


def test_1_17_sends_output_where_frame_5_is_missing(real_enclave, tree):
    """There the frame is DEBUG: without it the guest calls for the output, and goes on alone."""
    assert (
        launch(real_enclave, writer_of(Rootfs.from_directory(tree), "exit", "6"), OLD).returncode
        == 6
    )
    real_enclave.wait_for(r"nobody at CID\+3")


def test_1_17_sends_no_output_where_frame_5_is_set(real_enclave, tree):
    """It runs the program and never calls for the output; the exit code ends the session."""
    lines = []
    writer = writer_of(Rootfs.from_directory(tree), "hello", output=lines.append)
    assert launch(real_enclave, writer, OLD).returncode == 0
    assert lines == []
    assert "hello from the enclave" in real_enclave.console.text
