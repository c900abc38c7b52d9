"""Owns: what surrounds a guest's program, its network, and that nothing outlives the guest."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

import pytest
from left_out import leave_out, needs_root, needs_tun
from machine import CID
from peer import wait_until
from scripted_host import NET, OUTPUT, SIGNAL, ScriptedHost, exactly, until_end

from nitro_vsock import errors
from nitro_vsock.testing import GuestEmulator, Point, sandbox, tap

NOBODY = 65534
USERS = {
    # As in a container. Without that one, root may not map itself into a namespace.
    "root without capabilities": ["--inh-caps=-all", "--bounding-set=-all,+setfcap"],
    "nobody": [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"],
}


def become(user):
    """Return the beginning of a command line that another user runs."""
    return ["setpriv", *USERS[user]] if os.geteuid() == 0 else []


def can(user, *command):
    """Whether a user's command succeeds."""
    try:
        return subprocess.run([*become(user), *command], stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def need_user_namespaces(user):
    """Skip, and say so, where a user gets none or cannot run this very Python."""
    if not can(user, "unshare", "-Urmpf", "--mount-proc", "true"):
        leave_out(f"user namespaces for {user}", "sysctl kernel.unprivileged_userns_clone=1")
    code = "import nitro_vsock.testing.emulator as e, subprocess as s, sys; "
    code += "s.run([sys.executable, '-c', 'import cffi'], check=True)"
    if not can(user, sys.executable, "-c", code):
        leave_out(f"a Python that {user} may run", OPEN_PYTHON)


OPEN_PYTHON = "make clean, then make test PYTHON=/usr/bin/python3, in a folder that all may enter"


LIBC_SIGNALS = 0b11 << 31
"""32 and 33 are the C library's own: who starts a program by posix_spawn, as make does, leaves them
ignored, and no program can change them."""


def signals(seen, name):
    """Return a set of signals that /proc/self/status shows."""
    (line,) = (key for key in seen if key.startswith(name))
    return int(line.partition(":")[2], 16)


@pytest.fixture
def host(uds):
    """A host that listens on every port of the enclave."""
    with ScriptedHost(uds, CID) as host:
        yield host


def look(host, uds, programs, *, flags=b"\5", **options):
    """Run `look` in a guest; return what it saw, by key, and the report."""
    with GuestEmulator(CID, uds_path=uds, **options) as guest:
        guest.start()
        argv = [b"/bin/look", b"a b", b"", b"\xff"]
        envp = [b"PATH=/bin", b"A=1", b"A=2", b"odd"]
        host.hand_over(programs.tar("look"), argv, envp, flags=flags)
        seen = parse(until_end(host.accept(OUTPUT)))
        assert host.status() == 0
        return seen, guest.result()


def parse(text):
    """Return lists by the first word of a line."""
    seen = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        key, _, value = line.partition(" ")
        seen.setdefault(key, []).append(value)
    return seen


@needs_root
def test_what_a_program_sees_in_namespaces(host, uds, programs):
    """Its own root, processes and devices; it is not process 1, and inherits nothing."""
    seen, report = look(host, uds, programs, strict=False, isolation="namespaces")
    assert report.isolation == "namespaces"
    check_surroundings(seen)
    assert seen["uid"] == ["0"]


def check_surroundings(seen):
    """What is true of every namespaced guest."""
    assert seen["pid"] != ["1"]
    assert seen["sid"] == seen["pid"]
    assert seen["cwd"] == ["/"]
    assert seen["argv"] == ["/bin/look", "a b", "", "\udcff"]
    assert seen["env"] == ["PATH=/bin", "A=1", "A=2", "odd"]
    assert set(seen["root"]) == {"bin", "dev", "proc", "run", "sys", "tmp"}
    assert "1" in seen["process"]
    assert len(seen["process"]) <= 3
    # 3 and 4 are the directories it has open itself.
    assert seen["fd"] == ["0", "1", "2", "3", "4"]
    assert seen["net"] == ["lo"]
    assert signals(seen, "SigBlk") == 0
    assert signals(seen, "SigIgn") & ~LIBC_SIGNALS == 0
    assert (seen["stdin"], seen["null"]) == (["1"], ["1"])


def test_what_a_program_sees_without(host, uds, programs):
    """Its tree is the working directory; arguments, environment and descriptors are the same."""
    seen, report = look(host, uds, programs, strict=False, isolation="plain")
    assert report.isolation == "plain"
    assert seen["cwd"] == [report.root]
    assert seen["sid"] == seen["pid"]
    assert seen["argv"] == ["/bin/look", "a b", "", "\udcff"]
    assert seen["env"] == ["PATH=/bin", "A=1", "A=2", "odd"]
    assert seen["fd"] == ["0", "1", "2", "3", "4"]
    assert signals(seen, "SigBlk") == 0
    assert signals(seen, "SigIgn") & ~LIBC_SIGNALS == 0


EMULATOR = """
import json, sys
from nitro_vsock.testing import GuestEmulator
uds, cid, folder = sys.argv[1:]
with GuestEmulator(int(cid), uds_path=uds, isolation="namespaces", folder=folder) as guest:
    print(json.dumps(guest.run().as_dict()))
"""


@pytest.fixture(params=list(USERS))
def user(request, uds, host):
    """Somebody who is no root with capabilities, and may connect to the host."""
    need_user_namespaces(request.param)
    folder = os.path.dirname(uds)
    for path in (folder, *(entry.path for entry in os.scandir(folder))):
        os.chmod(path, 0o777)
    return request.param


@contextlib.contextmanager
def guest_of(user, uds):
    """A guest in a process of another user."""
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        os.chmod(folder, 0o777)
        command = [*become(user), sys.executable, "-c", EMULATOR, uds, str(CID), folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def test_user_namespaces(host, uds, programs, user):
    """Other users get the same surroundings, and are root in them."""
    with guest_of(user, uds) as process:
        # An empty argument is what the strict reader refuses.
        argv = [b"/bin/look", b"a b", b"-", b"\xff"]
        host.hand_over(
            programs.tar("look"), argv, [b"PATH=/bin", b"A=1", b"A=2", b"odd"], flags=b"\5"
        )
        seen = parse(until_end(host.accept(OUTPUT)))
        assert host.status() == 0
        said, _ = process.communicate(timeout=20)
    assert seen["argv"].pop(2) == "-"
    seen["argv"].insert(2, "")
    check_surroundings(seen)
    assert seen["uid"] == ["0"]
    assert json.loads(said)["isolation"] == "user namespaces"


@needs_tun
def test_a_tap_device_in_user_namespaces(host, uds, programs, user):
    """The network needs no root either."""
    with guest_of(user, uds) as process:
        host.hand_over(programs.tar("look"), [b"/bin/look"], flags=b"\4\5")
        seen = parse(until_end(host.accept(OUTPUT)))
        assert host.status() == 0
        said, _ = process.communicate(timeout=20)
    assert set(seen["net"]) == {"lo", "tap0"}
    assert json.loads(said)["notes"] == []


# The network.

BROADCAST = b"\xff" * 6
HOST_MAC = bytes.fromhex("020000000001")


def arp_request(ip):
    """Return a frame that asks who has an address of the guest's network."""
    sender = HOST_MAC + socket.inet_aton("172.31.10.1")
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sender + bytes(6) + socket.inet_aton(ip)
    return (BROADCAST + HOST_MAC + b"\x08\x06" + body).ljust(60, b"\0")


def frames(sock):
    """Yield the guest's frames."""
    while head := exactly(sock, 4):
        yield exactly(sock, struct.unpack(">I", head)[0])


@needs_root
@needs_tun
@pytest.mark.parametrize("mtu", [1500, 65520])
def test_the_guest_answers_arp(host, uds, programs, mtu):
    """It has the real guest's address and MAC, and the MTU is announced."""
    with GuestEmulator(CID, uds_path=uds, isolation="namespaces", mtu=mtu) as guest:
        guest.start()
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=b"\4")
        net = host.accept(NET)
        assert exactly(net, 4) == struct.pack(">I", mtu + 14)
        request = arp_request(tap.ADDRESS)
        # Cut in the middle: the guest puts it together.
        net.sendall(struct.pack(">I", len(request)) + request[:20])
        net.sendall(request[20:])
        for frame in frames(net):
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
                break
        assert frame[:6] == HOST_MAC
        assert frame[22:28] == tap.MAC
        assert frame[28:32] == socket.inet_aton(tap.ADDRESS)
        host.accept(SIGNAL)


@needs_root
@needs_tun
def test_a_frame_that_is_too_long_ends_the_network(host, uds, programs):
    """The guest closes the connection, and its program goes on."""
    with GuestEmulator(CID, uds_path=uds, isolation="namespaces") as guest:
        guest.start()
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=b"\4")
        net = host.accept(NET)
        guest.wait_for(Point.RUNNING)
        net.sendall(struct.pack(">I", 1515))
        until_end(net)
        host.accept(SIGNAL).sendall(struct.pack("=i", signal.SIGTERM))
        assert host.status() == 0


@needs_root
@needs_tun
def test_the_network_goes_with_the_host(host, uds, programs):
    """A host that closes the network does not end the program."""
    with GuestEmulator(CID, uds_path=uds, isolation="namespaces") as guest:
        guest.start()
        host.hand_over(programs.tar("wait"), [b"/bin/wait"], flags=b"\4")
        host.accept(NET).close()
        guest.wait_for(Point.RUNNING)
        host.accept(SIGNAL).sendall(struct.pack("=i", signal.SIGTERM))
        assert host.status() == 0


@pytest.fixture
def relay():
    """A relay between a stand-in for a tap device and a host."""
    device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host, theirs = socket.socketpair()
    with device, kernel, host, theirs:
        device.setblocking(False)
        for sock in (kernel, host):
            sock.settimeout(20)
        thread = threading.Thread(target=tap.relay, args=(device.fileno(), theirs, 9014))
        thread.start()
        yield kernel, host
        with contextlib.suppress(OSError):
            host.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


FRAMES = [os.urandom(14 + index * 7919 % 9001) for index in range(3000)]


def test_frames_to_the_host(relay):
    """Every size passes, in order, in a flood that the host takes late."""
    kernel, host = relay
    sender = threading.Thread(target=lambda: [kernel.send(frame) for frame in FRAMES])
    sender.start()
    coming = frames(host)
    assert [next(coming) for _ in FRAMES] == FRAMES
    sender.join()


def test_frames_from_the_host(relay):
    """Every size passes, in order, however the stream is cut.

    One at a time: a device loses what it has no room for.
    """
    kernel, host = relay
    for index, frame in enumerate(FRAMES[:300]):
        data = struct.pack(">I", len(frame)) + frame
        cut = index % len(data)
        host.sendall(data[:cut])
        host.sendall(data[cut:])
        assert kernel.recv(1 << 16) == frame
    several = b"".join(struct.pack(">I", len(frame)) + frame for frame in FRAMES[:5])
    host.sendall(several)
    assert [kernel.recv(1 << 16) for _ in range(5)] == FRAMES[:5]


# Nothing is left.

DOOMED = """
import sys
from nitro_vsock.testing import GuestEmulator
guest = GuestEmulator(int(sys.argv[2]), uds_path=sys.argv[1], isolation=sys.argv[3])
guest.start()
guest.wait_for("running")
print("running", flush=True)
guest.result()
"""


@pytest.mark.parametrize("isolation", ["namespaces", "plain"])
@pytest.mark.parametrize("program", ["wait", "orphans"])
def test_killing_the_emulator_leaves_nothing(host, uds, programs, isolation, program, monkeypatch):
    """SIGKILL of its process ends program, helper and orphans; tree and mounts are gone."""
    folder = os.path.dirname(uds)
    monkeypatch.setenv("TMPDIR", folder)
    command = [sys.executable, "-c", DOOMED, uds, str(CID), isolation]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        argv = [f"/bin/{program}".encode()]
        host.hand_over(programs.tar(program), argv, flags=b"\4\5")
        output = host.accept(OUTPUT)
        assert exactly(output, 5) in (b"ready", b"gone\n")
        assert process.stdout.readline() == b"running\n"
        helpers = descendants(process.pid)
        assert len(helpers) >= 2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    until_end(output)
    gone = [select.poll() for _ in helpers]
    for poller, fd in zip(gone, helpers.values(), strict=True):
        poller.register(fd, select.POLLIN)
        assert poller.poll(10_000), "a process is left"
        os.close(fd)
    wait_until(lambda: not [n for n in os.listdir(folder) if "guest" in n], what="the clearing")
    with open("/proc/self/mountinfo") as mounts:
        assert folder not in mounts.read()


def descendants(pid):
    """Return {pid: pidfd} of every process below one."""
    found = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        with contextlib.suppress(OSError):
            for child in children(parent):
                found[child] = os.pidfd_open(child)
                todo.append(child)
    return found


def children(pid):
    """Return a process's children."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found


@pytest.mark.parametrize("isolation", ["namespaces", "plain"])
def test_orphans_end_with_the_guest(host, uds, programs, isolation):
    """A daemon that ignores SIGTERM and has a session of its own is killed when it goes down."""
    with GuestEmulator(CID, uds_path=uds, isolation=isolation, stall_at="reported") as guest:
        guest.start()
        host.hand_over(programs.tar("orphans"), [b"/bin/orphans"], flags=b"\5")
        until_end(host.accept(OUTPUT))
        guest.wait_for(Point.REPORTED)
        below = descendants(os.getpid())
        assert len(below) >= 3
        guest.close()
    for fd in below.values():
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(0), "a process is left"
        os.close(fd)


# In a user namespace that may have none below it, and without rights in the one above.
CONFINED = """
import ctypes, os, sys
ctypes.CDLL(None).unshare(0x10000000)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
os.execv(sys.argv[1], sys.argv[1:])
"""


@needs_root
def test_namespaces_that_cannot_be_had(host, uds, programs, monkeypatch):
    """`namespaces` is an error then, with the reason; `auto` goes on plainly and says so."""
    start = sandbox.start
    monkeypatch.setattr(
        sandbox,
        "start",
        lambda command, **options: start([sys.executable, "-c", CONFINED, *command], **options),
    )
    with GuestEmulator(CID, uds_path=uds, isolation="namespaces") as guest:
        guest.start()
        host.hand_over(programs.tar("hello"), [b"/bin/hello"])
        with pytest.raises(errors.UnsupportedError, match="namespaces"):
            guest.result()
    with GuestEmulator(CID, uds_path=uds) as guest:
        guest.start()
        host.hand_over(programs.tar("hello"), [b"/bin/hello", b"3"])
        assert host.status() == 768
        assert guest.result().isolation == "plain"


def test_a_helper_that_dies(host, uds, programs):
    """The guest ends with what the helper said, and nothing is left."""
    with GuestEmulator(CID, uds_path=uds) as guest:
        guest.start()
        host.hand_over(programs.tar("wait"), [b"/bin/wait"])
        guest.wait_for(Point.RUNNING)
        (helper,) = children(os.getpid())
        os.kill(helper, signal.SIGKILL)
        with pytest.raises(errors.NitroVsockError, match="helper process ended"):
            guest.result()
