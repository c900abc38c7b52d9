"""The launcher of docs/launcher.md, and the proxy of one's own, work as the page says."""

import re
import runpy
import shutil

import pytest
from command import PROJECT

from nitro_vsock import EnclaveArgsWriter, EnclaveDiedError, EnclaveSession, Rootfs

DOCS = PROJECT / "docs"
PAGE = (DOCS / "launcher.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
EXAMPLE = DOCS / "launcher_example.py"
LAUNCHER = runpy.run_path(str(EXAMPLE))


class StandIn:
    """What the example's NitroEnclave is to its launcher."""

    def __init__(self, enclave, **options):
        self._enclave, self._options = enclave, options

    def start(self, cid):
        """Boot a guest of the stand-in."""
        assert cid == self._enclave.cid
        return self._enclave.boot(**self._options).fileno()

    def close(self):
        """End it."""
        self._enclave.close()


@pytest.fixture
def rootfs(tmp_path, programs):
    """A tree with a static program."""
    folder = tmp_path / "tree" / "bin"
    folder.mkdir(parents=True)
    shutil.copy(programs["hello"], folder)
    return tmp_path / "tree"


def test_page_shows_the_launcher_as_it_is():
    """The page's first block is the file the tests run."""
    assert BLOCKS[0] == EXAMPLE.read_text()


@pytest.mark.parametrize("status", [0, 3])
def test_launcher_returns_the_program_s_status(enclave, rootfs, status, capfd):
    """A whole launch: booted, sent, run, its output on our stdout."""
    argv = ["/bin/hello", str(status)]
    options = enclave.host_options
    ended = LAUNCHER["launch"](StandIn(enclave), enclave.cid, rootfs, argv, **options)
    assert ended.returncode == status
    assert ended.output_complete
    assert "hello" in capfd.readouterr().out


def test_launcher_says_what_a_dead_enclave_said_last(enclave, rootfs, capfd):
    """The error has the output's last lines, and the enclave is ended."""
    with pytest.raises(EnclaveDiedError) as caught:
        LAUNCHER["launch"](
            *(StandIn(enclave, die_at="exited"), enclave.cid, rootfs, ["/bin/hello"]),
            **enclave.host_options,
        )
    assert caught.value.must_terminate_enclave
    assert "hello" in caught.value.last_output
    assert "launch failed: the enclave died" in capfd.readouterr().err


def test_proxy_of_the_page_counts_the_output(enclave, rootfs, capsys):
    """The page's example of a proxy of one's own."""
    own = {}
    exec(compile(BLOCKS[2], "launcher.md", "exec"), own)
    writer = EnclaveArgsWriter(
        *(Rootfs.from_directory(rootfs), "/bin/hello", ["/bin/hello"], {"PATH": "/bin"}),
        proxies=[own["CountingOutput"]()],
    )
    with EnclaveSession(writer, enclave.cid, **enclave.host_options) as session:
        guest = enclave.boot()
        status = session.run_sync(enclave_fd=guest.fileno())
    assert status.returncode == 0
    assert (
        capsys.readouterr().out == f"the program wrote {len('hello') + len('trouble') + 2} bytes\n"
    )


def test_ioctl_numbers_are_those_of_the_kernel():
    """Made as linux/nitro_enclaves.h makes them."""

    def number(direction, size, command):
        return direction << 30 | size << 16 | 0xAE << 8 | command

    assert LAUNCHER["NE_CREATE_VM"] == number(2, 8, 0x20)
    assert LAUNCHER["NE_ADD_VCPU"] == number(3, 4, 0x21)
    assert LAUNCHER["NE_SET_USER_MEMORY_REGION"] == number(1, 24, 0x23)
    assert LAUNCHER["NE_START_ENCLAVE"] == number(3, 16, 0x24)
