"""A real passt behind a NetProxy: TCP through a tap device in a network namespace, both ways."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest
from command import PROJECT
from left_out import needs_tool, needs_tun
from network_spaces import namespace

from nitro_vsock import NetProxy

pytestmark = [needs_tool("passt"), needs_tool("ip", "iproute2"), needs_tun]

GUEST_ADDRESS = "172.31.10.83"
GUEST_MAC = "5a:94:ef:e4:0c:ee"
HOST_ADDRESS = "10.9.8.7"
MTU = 9000
"""With more, or with both directions busy at once, the passt of Debian 12 (2023-03-09) stands still
by itself, without us between."""
SIZE = 1 << 30

PUMP = PROJECT / "tests" / "support" / "tap_pump.c"

PARTS = 8
"""Connections one after another. The passt of Debian 12 stalls and resets one now and then, whoever
is at its other end; such a one is made again, a few times at most."""

TALKER = """
import contextlib, socket, sys, zlib
role, address, port, size, parts = *sys.argv[1:3], *map(int, sys.argv[3:])
block = bytearray((role * (1 << 20))[: 1 << 20].encode())
room = memoryview(bytearray(1 << 20))
listener = None

def send(sock):
    digest = 0
    for number in range(size >> 20):
        block[:8] = number.to_bytes(8, "big")
        digest = zlib.crc32(block, digest)
        sock.sendall(block)
    return digest

def receive(sock):
    digest = count = 0
    while count < size:
        n = sock.recv_into(room, min(len(room), size - count))
        if not n:
            raise ConnectionError("ended early")
        digest, count = zlib.crc32(room[:n], digest), count + n
    return digest

def talk(sock):
    sock.settimeout(15)
    if role == "client":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        sock.connect((address, port))
        sent, got = send(sock), receive(sock)
        sock.sendall(b"k")
    else:
        got, sent = receive(sock), send(sock)
        if not sock.recv(1):
            raise ConnectionError("the client has not got everything")
    return sent, got

if role == "server":
    listener = socket.create_server((address, port))
    listener.settimeout(60)
print("ready", flush=True)
done = failed = 0
while done < parts and failed < 4:
    try:
        with listener.accept()[0] if listener else socket.socket() as sock:
            print(*talk(sock), flush=True)
        done += 1
    except OSError as error:
        failed += 1
        print(role, repr(error), file=sys.stderr)
"""


def run(*command, **options):
    """Run a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def pump_binary(tmp_path_factory):
    """The frame pump, compiled."""
    binary = tmp_path_factory.mktemp("pump") / "tap_pump"
    run("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", str(PUMP), "-o", str(binary))
    return binary


@pytest.fixture
def namespaces():
    """Two network namespaces: the host's with an address and a default route, and the guest's."""
    pid = os.getpid()
    with namespace(f"nvh{pid}", HOST_ADDRESS) as host, namespace(f"nvg{pid}") as guest:
        yield host, guest


@contextlib.contextmanager
def process(*command, **options):
    """A process that is ended in the end."""
    with subprocess.Popen(command, **options) as started:
        try:
            yield started
        finally:
            started.kill()


def within(namespace, *command):
    """Return a command that runs in a network namespace."""
    return ("ip", "netns", "exec", namespace, *command)


@contextlib.contextmanager
def guest_network(namespace, pump_binary, sock):
    """The guest's device, set up as the deployed guest has it, its frames through a socket."""
    fd = sock.fileno()
    sock.setblocking(True)
    command = within(namespace, str(pump_binary), "tap0", str(fd))
    with process(*command, stdout=subprocess.PIPE, pass_fds=[fd]) as pump:
        assert pump.stdout.readline() == b"ready\n"
        for line in (
            f"link set tap0 address {GUEST_MAC} mtu {MTU}",
            f"addr add {GUEST_ADDRESS}/24 dev tap0",
            "link set tap0 up",
            "route add default dev tap0",
        ):
            run("ip", "-n", namespace, *line.split())
        yield


@pytest.mark.parametrize("backend", ["descriptor", "path"])
def test_tcp_through_a_real_passt_is_unchanged(place, namespaces, pump_binary, tmp_path, backend):
    """1 GiB each way, digests equal; passt by an inherited descriptor, and by its path."""
    host, guest_space = namespaces
    part = str((SIZE if backend == "descriptor" else 16 << 20) // PARTS)
    outcome = {}

    def program(guest):
        with guest_network(guest_space, pump_binary, guest.net):
            client = (
                sys.executable,
                "-c",
                TALKER,
                "client",
                HOST_ADDRESS,
                "4000",
                part,
                str(PARTS),
            )
            said = subprocess.check_output(within(guest_space, *client), timeout=150, text=True)
            outcome["client"] = said.splitlines()

    with contextlib.ExitStack() as stack:
        options = ["-f", "-a", GUEST_ADDRESS, "-n", "24", "-g", "172.31.10.1", "--runas", "0"]
        if backend == "descriptor":
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs:
                stack.enter_context(
                    process(
                        *within(host, "passt", *options, "-F", str(theirs.fileno())),
                        pass_fds=[theirs.fileno()],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
            proxy = NetProxy(ours)
        else:
            path = tmp_path / "passt.sock"
            passt = stack.enter_context(
                process(
                    *within(host, "passt", *options, "-s", str(path)),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            listening = threading.Event()
            while not path.exists() and passt.poll() is None:
                listening.wait(0.01)
            proxy = NetProxy(path)
        server = stack.enter_context(
            process(
                *within(
                    host,
                    sys.executable,
                    "-c",
                    TALKER,
                    "server",
                    "0.0.0.0",
                    "4000",
                    part,
                    str(PARTS),
                ),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert server.stdout.readline() == "ready\n"
        ended, _ = place.run(proxy, guest={"program": program, "mtu": MTU})
        outcome["server"] = [server.stdout.readline() for _ in range(PARTS)]
    assert ended.exit_code == 0
    digests = {tuple(line.split()) for line in outcome["client"][1:]}
    assert len(outcome["client"]) == 1 + PARTS
    assert len(digests) == 1
    ((sent, got),) = digests
    assert {tuple(line.split()) for line in outcome["server"]} == {(got, sent)}
    assert len({sent, got, "0"}) == 3
