"""Owns: the pytest plugin, as a launcher's author meets it: pytest runs of their own."""

import itertools
import os
import subprocess
import sys
import textwrap

import pytest
from machine import HAS_LOOPBACK

from nitro_vsock import EnclaveArgsWriter, Rootfs, errors
from nitro_vsock.testing import Enclave


@pytest.fixture
def run_pytest(tmp_path):
    """Run pytest on one file; return what it printed and its exit code."""

    def run(code, *options, ini=""):
        (tmp_path / "test_theirs.py").write_text(textwrap.dedent(code))
        (tmp_path / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{ini}")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr, done.returncode

    return run


THEIRS = """
    from nitro_vsock import EnclaveArgsWriter, Rootfs

    def test_launch(enclave, request):
        rootfs = Rootfs.from_file(r"{archive}")
        writer = EnclaveArgsWriter(rootfs, "/bin/hello", ["/bin/hello"], {{"PATH": "/bin"}})
        with writer.listen(enclave.cid, **enclave.host_options) as launch:
            guest = enclave.boot(die_at="finished")
            report = launch.send(10, enclave_fd=guest.fileno())
        assert guest.result().args.rootfs_length == report.rootfs_bytes
        assert enclave.transport == "{transport}"

    def test_left_running(enclave):
        enclave.boot(stall_at="connect")

    def test_cids_differ(enclave, request):
        pass
"""


@pytest.fixture
def hello(programs, tmp_path):
    """An archive with a program."""
    path = tmp_path / "hello.tar"
    path.write_bytes(programs.tar("hello"))
    return path


def test_a_launchers_own_tests(run_pytest, hello):
    """The fixture gives an address, boots guests and ends them."""
    said, code = run_pytest(
        THEIRS.format(archive=hello, transport="unix"), "--enclave-transport=unix"
    )
    assert code == 0, said
    assert "3 passed" in said


def test_the_transport_by_itself(run_pytest, hello):
    """AF_VSOCK where loopback answers, else Unix sockets."""
    transport = "vsock" if HAS_LOOPBACK else "unix"
    said, code = run_pytest(THEIRS.format(archive=hello, transport=transport))
    assert code == 0, said


def test_the_transport_from_the_configuration(run_pytest, hello):
    """An option of pytest.ini; the command line's counts before it."""
    code = THEIRS.format(archive=hello, transport="unix")
    said, status = run_pytest(code, ini="enclave_transport = unix\n")
    assert status == 0, said
    said, status = run_pytest(
        code, "--enclave-transport=unix", ini="enclave_transport = nonsense\n"
    )
    assert status == 0, said
    said, status = run_pytest(code, ini="enclave_transport = nonsense\n")
    assert "must be one of auto, vsock, unix" in said
    assert status == 1


def test_those_who_do_not_use_it_pay_nothing(run_pytest):
    """The plugin imports neither the core nor the emulator."""
    said, code = run_pytest(
        """
        import sys

        def test_modules():
            loaded = {name for name in sys.modules if name.startswith("nitro_vsock")}
            assert loaded == {
                "nitro_vsock", "nitro_vsock.testing", "nitro_vsock.testing.plugin"
            }
        """
    )
    assert code == 0, said


def test_the_library_needs_no_pytest():
    """Nor does the emulator."""
    code = "import sys; import nitro_vsock.testing.enclave; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fixture_here(enclave, programs):
    """Within this run, too: a whole launch of the arguments, and the address of its own."""
    rootfs = Rootfs.from_bytes(programs.tar("hello"))
    writer = EnclaveArgsWriter(rootfs, "/bin/hello", ["/bin/hello"], {"PATH": "/bin"})
    with writer.listen(enclave.cid, **enclave.host_options) as launch:
        guest = enclave.boot(die_at="unpacked")
        launch.send(10, enclave_fd=guest.fileno())
    assert guest.result().args.argv == ("/bin/hello",)


def test_every_enclave_has_an_address_of_its_own():
    """Ten at once do not share a port."""
    places = [Enclave("unix") for _ in range(10)]
    cids = sorted(place.cid for place in places)
    assert all(b - a >= 5 for a, b in itertools.pairwise(cids))
    assert len({place.uds_path for place in places}) == 10
    for place in places:
        place.close()
        place.close()
        assert not os.path.exists(os.path.dirname(place.uds_path))


def test_vsock_where_there_is_none():
    """Asking for it is an error that says what to do."""
    if HAS_LOOPBACK:
        with Enclave("vsock") as place:
            assert place.uds_path is None
    else:
        with pytest.raises(errors.UnsupportedError, match="vsock_loopback"):
            Enclave("vsock")
