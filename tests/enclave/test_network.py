"""A real passt behind a real enclave's network, in a namespace that leads nowhere."""

import contextlib
import os
import subprocess
import sys

import pytest
from enclave.trees import launch, writer_of
from left_out import needs_tool
from network_spaces import namespace

from nitro_vsock import NetProxy, Rootfs

pytestmark = [needs_tool("passt"), needs_tool("ip", "iproute2")]

SIZE = 20 << 20
ADDRESS, PORT = "10.9.8.7", 4000

SERVER = """
import socket, sys, zlib
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
server = socket.create_server((address, port))
server.settimeout(120)
print("ready", flush=True)
sock = server.accept()[0]
sock.settimeout(60)
got, count = 0, 0
while count < size:
    data = sock.recv(1 << 16)
    if not data:
        raise SystemExit("ended early")
    got, count = zlib.crc32(data, got), count + len(data)
block, sent = bytes(range(256)) * 256, 0
for number in range(size >> 16):
    piece = number.to_bytes(8, "big") + block[8:]
    sent = zlib.crc32(piece, sent)
    sock.sendall(piece)
sock.recv(1)
print(f"sent {got:08x} got {sent:08x}")
"""


@pytest.fixture
def space():
    """A network namespace with an address and a default route to nobody."""
    with namespace(f"nve{os.getpid()}", ADDRESS) as name:
        yield name


@contextlib.contextmanager
def process(*command, **options):
    """A process that is ended in the end."""
    with subprocess.Popen(command, **options) as started:
        try:
            yield started
        finally:
            started.kill()


def test_tcp_through_passt(real_enclave, tree, space, tmp_path):
    """20 MiB each way, in frames of the guest's MTU; both ends have the same digests."""
    inside = ("ip", "netns", "exec", space)
    server = (*inside, sys.executable, "-c", SERVER, ADDRESS, str(PORT), str(SIZE))
    path, output = tmp_path / "passt.sock", tmp_path / "output"
    passt = ("passt", "-f", "-a", "172.31.10.83", "-n", "24", "-g", "172.31.10.1", "--runas", "0")
    noise = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with (
        process(*server, stdout=subprocess.PIPE, text=True) as far,
        process(*inside, *passt, "-s", str(path), **noise) as backend,
    ):
        assert far.stdout.readline() == "ready\n"
        while "You can now start qemu" not in (line := backend.stderr.readline()):
            assert line, "passt ended"
        talk = ("talk", ADDRESS, str(PORT), str(SIZE), "0")
        proxies = [NetProxy(path)]
        writer = writer_of(Rootfs.from_directory(tree), *talk, output=str(output), proxies=proxies)
        status = launch(real_enclave, writer)
        assert status.returncode == 0, output.read_text()
        assert far.stdout.read() == output.read_text()
