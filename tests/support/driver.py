"""Owns: scenarios that need a process of their own, and how a test runs one.

The child does one scenario on real sockets and prints what happened as JSON; the test judges.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from archives import make_tar
from faults import Faults
from peer import READY, U64, Guest, connect, wait_until
from relaying import Relayed
from session_guest import SessionGuest
from stages import ARGUMENT_BYTES, RawGuest, long_launch, open_descriptors
from trees import build as make_tree
from trees import file, model, symlink

from nitro_vsock import (
    DeviceProxyList,
    EnclaveArgsReader,
    EnclaveArgsWriter,
    EnclaveSession,
    NetProxy,
    NitroVsockError,
    OutputProxy,
    Rootfs,
    SessionTimeouts,
)

CID = 16


def run(scenario, *, shim=None, limit=60, **arguments):
    """Run a scenario in a child of its own, `shim` preloaded; return what it printed."""
    environment = {**os.environ, "LD_PRELOAD": str(shim)} if shim else None
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, scenario.__name__],
        input=json.dumps(arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def sigpipe_blocked():
    """For the start of helper threads: they inherit the mask, and no SIGPIPE of theirs kills us."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


class Feeder(threading.Thread):
    """Writes `data` into a pipe and closes it."""

    def __init__(self, data):
        super().__init__(daemon=True)
        self.read_end, self._write_end = os.pipe()
        self._data = data
        self.start()

    def run(self):
        """Feed."""
        left = memoryview(self._data)
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self._write_end, left) :]
        os.close(self._write_end)

    def close(self):
        """Close the reading end and wait for the thread."""
        os.close(self.read_end)
        self.join(10)


def describe(error):
    """Return an exception as plain data."""
    if error is None:
        return {"error": None}
    number = getattr(error, "errno", None)
    return {
        "error": type(error).__name__,
        "typed": isinstance(error, NitroVsockError),
        "text": str(error),
        "errno": errno.errorcode.get(number, number),
        "stage": getattr(error, "stage", None),
        "bytes_sent": getattr(error, "bytes_sent", None),
        "total": getattr(error, "total", None),
        "refused": getattr(error, "refused", None),
        "terminate": getattr(error, "must_terminate_enclave", None),
        "expected": getattr(error, "expected", None),
        "actual": getattr(error, "actual", None),
    }


class Bench:
    """A folder, an archive and a kind of source: what one launch after another needs."""

    def __init__(self, folder, size, source):
        self.sockets = Path(folder) / "s"
        self.sockets.mkdir()
        self._tree = Path(folder) / "tree"
        if source == "tree":
            # Every way through the core, with as few calls as there can be.
            make_tree(
                self._tree,
                {
                    b"d/f": file(bytes(size)),
                    b"l": symlink(b"d"),
                    b"s": file(b"", 0o600),
                    b"z": file(bytes(300_000)),
                },
            )
            self.data = model(self._tree)
        else:
            self.data = make_tar(size)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self._source = source
        self._path = Path(folder) / "rootfs.tar"
        self._path.write_bytes(self.data)

    @contextlib.contextmanager
    def rootfs(self):
        """Yield the archive as a Rootfs."""
        if self._source == "file":
            yield Rootfs.from_file(self._path)
        elif self._source == "tree":
            yield Rootfs.from_directory(self._tree)
        elif self._source == "memory":
            yield Rootfs.from_bytes(self.data)
        else:
            with sigpipe_blocked():
                feeder = Feeder(self.data)
            try:
                yield Rootfs.from_fd(feeder.read_end, length=len(self.data))
            finally:
                feeder.close()

    @contextlib.contextmanager
    def listening(self, vsock=False, **options):
        """Yield a listening launch, and where its guest connects."""
        uds = None if vsock else f"{self.sockets}/v"
        with (
            self.rootfs() as rootfs,
            EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], {"A": "1"}).listen(
                CID, uds_path=uds, **options
            ) as launch,
        ):
            yield launch, _name(launch.fileno()) if vsock else f"{uds}_{CID + 1}"

    def launch(self, before, timeout, **options):
        """Launch against peer.Guest, `before` silent strangers waiting already.

        Return the report, the error and the guest.
        """
        guest = None
        try:
            with self.listening(**options) as (launch, path), contextlib.ExitStack() as strangers:
                for _ in range(before):
                    strangers.enter_context(connect(path))
                with sigpipe_blocked():
                    guest = Guest(path)
                return launch.send(timeout), None, guest
        except Exception as error:
            return None, error, guest


def _name(fd):
    """Return the name a Unix socket is bound to."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return os.fsdecode(sock.getsockname())


class Watch:
    """What a launch must leave as it was."""

    def __init__(self, folder):
        self._folder = folder
        gc.collect()
        self._descriptors = open_descriptors()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._began = time.monotonic()

    def seconds(self):
        """Return how long it took so far."""
        return time.monotonic() - self._began

    def changes(self):
        """Return what is there now and was not before."""
        gc.collect()
        before, after = self._descriptors, open_descriptors()
        return {
            "leaked": sorted(what for fd, what in after.items() if before.get(fd) != what),
            "left": sorted(os.listdir(self._folder)),
            "sigpipe_pending": signal.SIGPIPE in signal.sigpending(),
            "mask_kept": signal.pthread_sigmask(signal.SIG_BLOCK, ()) == self._mask,
        }


def _repeat(faults, plans, nth, attempt):
    """Arm each plan for its n-th call, n = 1, 2, ... until it strikes no more; yield the results.

    With `nth`, for this n only.
    """
    for plan in plans:
        first = plan.pop("first", 1)
        for n in [nth] if nth else range(first, 1000):
            faults.arm(**plan, nth=n)
            result = attempt()
            strikes = result["strikes"]
            if strikes or nth:
                yield {"call": plan["call"], "n": n, **result}
            if not strikes:
                break


def launches(
    plans, nth=None, cap=0, vsock_cid=-1, size=1 << 17, source="file", before=0, **options
):
    """Launch while the plans strike; SIGPIPE is at its default, so one that gets out kills us."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    faults = Faults()
    faults.cap(cap)
    faults.pretend_vsock(vsock_cid)
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        bench = Bench(folder, size, source)

        def attempt():
            watch = Watch(bench.sockets)
            report, error, guest = bench.launch(before, vsock=vsock_cid >= 0, **options)
            strikes, seconds = faults.disarm(), watch.seconds()
            failure = guest and guest.failure()
            taken = guest.result() if guest and failure is None else None
            return {
                "strikes": strikes,
                "seconds": seconds,
                "report": report and report.as_dict(),
                "right": bool(taken) and taken.rootfs_sha256 == bench.sha256,
                "received": taken and taken.received,
                **describe(error),
                **watch.changes(),
            }

        return list(_repeat(faults, plans, nth, attempt))


class Echo(threading.Thread):
    """A network backend that sends back what it gets."""

    def __init__(self):
        super().__init__(daemon=True)
        self.theirs, self._ours = socket.socketpair()
        self.start()

    def run(self):
        """Echo until the other side ends."""
        with contextlib.suppress(OSError), self._ours:
            while data := self._ours.recv(1 << 16):
                self._ours.sendall(data, socket.MSG_NOSIGNAL)

    def close(self):
        """Close the session's end too and wait for the thread."""
        self.theirs.close()
        self.join(10)


FRAMES = b"".join(
    length.to_bytes(4, "big") + bytes([length % 251]) * length
    for length in (60, 1514, 65534, 9000, 1, 1514) * 4
)
"""What the guest of `sessions` sends through its network, more than a flow holds at once."""


def _talk(guest):
    """The guest's program: its frames come back through the backend; then it says so."""

    def send():
        with contextlib.suppress(OSError):  # what comes back tells
            guest.net.sendall(FRAMES, socket.MSG_NOSIGNAL)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        back = bytearray()
        while len(back) < len(FRAMES) and (piece := guest.net.recv(1 << 16)):
            back += piece
    finally:
        sender.join()
    if back != FRAMES:
        raise ConnectionError("other bytes came back")
    guest.output.sendall(b"hello\n", socket.MSG_NOSIGNAL)


def sessions(plans, nth=None, cap=0, timeout=5.0):
    """Live through whole sessions while the plans strike."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    faults = Faults()
    faults.cap(cap)
    timeouts = SessionTimeouts(launch=timeout, services=timeout, run=timeout, drain=1)
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        base = f"{folder}/v"
        rootfs = Rootfs.from_bytes(make_tar(1))

        def attempt():
            watch = Watch(folder)
            lines, status, error, guest = [], None, None, None
            with sigpipe_blocked():
                backend = Echo()
            try:
                proxies = [OutputProxy(lines.append), NetProxy(backend.theirs)]
                writer = EnclaveArgsWriter(
                    rootfs, "/bin/app", ["/bin/app"], {"A": "1"}, proxies=proxies
                )
                with EnclaveSession(writer, CID, uds_path=base, timeouts=timeouts) as session:
                    with sigpipe_blocked():
                        guest = SessionGuest(base, CID, program=_talk, status=768)
                    status = session.run_sync()
            except Exception as caught:
                error = caught
            strikes, seconds = faults.disarm(), watch.seconds()
            backend.close()
            failure = guest and guest.finish()
            return {
                "strikes": strikes,
                "seconds": seconds,
                "status": status and status.status,
                "complete": status and status.output_complete,
                "lines": lines,
                "guest": repr(failure) if failure else None,
                **describe(error),
                **watch.changes(),
            }

        return list(_repeat(faults, plans, nth, attempt))


def _string(text):
    return U64.pack(len(text) + 1) + text + b"\0"


class Host(threading.Thread):
    """A host for one reader: plain sockets and bytes made without the library."""

    def __init__(self, path, data):
        super().__init__(daemon=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        one, program, variable = U64.pack(1), _string(b"/bin/app"), _string(b"A=1")
        strings = b"\1" + program + b"\2" + one + program + b"\3" + one + variable
        self._stream = strings + b"\0" + U64.pack(len(data)) + data + b"\xff"
        self.start()

    def run(self):
        """Serve."""
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            with sock:
                sock.settimeout(10)
                if sock.recv(1) == READY:
                    sock.sendall(READY + self._stream)

    def close(self):
        """Wake it where it waits in vain, and wait for its end."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join(20)


def reads(plans, nth=None, cap=0, size=1 << 17, timeout=20.0, path=None):
    """Read a launch as the guest does while the plans strike."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    faults = Faults()
    faults.cap(cap)
    data = make_tar(size)
    sha256 = hashlib.sha256(data).hexdigest()
    with tempfile.TemporaryDirectory(prefix="nv") as folder:

        def attempt():
            watch, result, error = Watch(folder), None, None
            with sigpipe_blocked():
                host = Host(f"{folder}/v_{CID + 1}", data)
            reader = None
            try:
                reader = EnclaveArgsReader(CID, uds_path=f"{folder}/v")
                result = reader.read_args(timeout=timeout)
            except Exception as caught:
                error = caught
            finally:
                if reader:
                    reader.close()
            strikes, seconds = faults.disarm(), watch.seconds()
            host.close()
            Path(f"{folder}/v_{CID + 1}").unlink()
            del host
            return {
                "strikes": strikes,
                "seconds": seconds,
                "right": bool(result) and result.rootfs_sha256 == sha256,
                **describe(error),
                **watch.changes(),
            }

        return list(_repeat(faults, plans, nth, attempt))


def relays(plans, nth=None, size=400_000):
    """Relay between two ends while the plans strike: little, then much, both ways."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    faults = Faults()
    data = [random.Random(seed).randbytes(size) for seed in range(2)]
    with tempfile.TemporaryDirectory(prefix="nv") as folder:

        def attempt():
            watch = Watch(folder)
            with Relayed() as relayed:
                ends = relayed.one, relayed.other
                flows = relayed.relay.there, relayed.relay.back
                for end, bytes_due in zip(ends, data, strict=True):
                    end.send(bytes_due[:1000])
                relayed.pump(2)
                for end, bytes_due in zip(ends, data, strict=True):
                    end.send(bytes_due[1000:])

                def shut():
                    for end in ends:
                        if not end.unsent and not end.shut:
                            end.shut = True
                            with contextlib.suppress(OSError):
                                end.sock.shutdown(socket.SHUT_WR)
                    return all(flow.state for flow in flows)

                relayed.settle(shut)
                for end in ends:
                    end.receive()
                strikes = faults.disarm()
                states = [flow.state.name for flow in flows]
                errors = [errno.errorcode[flow.error] for flow in flows if flow.error]
                right = [bytes(end.got) for end in ends] == data[::-1]
            return {
                "strikes": strikes,
                "right": right and states == ["ENDED", "ENDED"],
                "states": states,
                "errors": errors,
                **watch.changes(),
            }

        return list(_repeat(faults, plans, nth, attempt))


def _is_asleep(pid):
    """Whether a process's main thread waits for something."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "S"


def _interrupting_guest(path, place, go, say):
    """Take our parent's launch to `place`, send it SIGINT, say when, and stay till it ends."""
    parent, buffer, received = os.getppid(), bytearray(1 << 20), 0
    os.read(go, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        if place != "accept":
            sock.connect(path)
            sock.sendall(READY)
        wanted = {"accept": 0, "blocked": ARGUMENT_BYTES + (1 << 20), "transfer": 64 << 20}[place]
        while received < wanted:
            received += sock.recv_into(buffer)
        if place != "transfer":
            wait_until(lambda: _is_asleep(parent))
        os.write(say, U64.pack(time.monotonic_ns()))
        os.kill(parent, signal.SIGINT)
        while place == "transfer" and sock.recv_into(buffer):
            pass
        os.read(go, 1)


@contextlib.contextmanager
def _child(work, *arguments):
    """Fork a child that does `work`; kill and reap it in the end."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work(*arguments)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _interrupted(folder, place, taker):
    """Be interrupted by our guest; return what was raised and how late."""
    go, start = os.pipe()
    heard, say = os.pipe()
    release = threading.Event()
    other = threading.Thread(target=release.wait)
    with _child(_interrupting_guest, f"{folder}/v_{CID + 1}", place, go, say):
        if taker == "thread":
            other.start()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with long_launch(CID, f"{folder}/v", rootfs_bytes=1 << 42) as launch:
                os.write(start, b"!")
                launch.send(timeout=20)
        except BaseException as error:
            raised, ended = error, time.monotonic_ns()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            release.set()
    if taker == "thread":
        other.join()
    os.close(say)
    sent = U64.unpack(os.read(heard, U64.size))[0]
    for fd in (go, start, heard):
        os.close(fd)
    return {"raised": type(raised).__name__, "seconds": (ended - sent) / 1e9}


def interrupts(place, taker, runs=5):
    """Ctrl-C at `place`, several times; return what was raised, and after how many seconds.

    The taker is the thread the kernel gives the signal to: "main" or another "thread".
    """
    results = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="nv") as folder:
            watch = Watch(folder)
            results.append({**_interrupted(folder, place, taker), **watch.changes()})
    return results


def storm(source, strategy, size=32 << 20):
    """Launch under a thousand signals a second; the guest takes 256 KiB for each at most."""
    struck = []

    def keep_step(received):
        wait_until(lambda: len(struck) >= received >> 18, what="a signal")

    signal.signal(signal.SIGALRM, lambda *_: struck.append(1))
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        bench = Bench(folder, size, source)
        watch = Watch(bench.sockets)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        with bench.listening(strategy=strategy) as (launch, path):
            guest = Guest(path, before_read=keep_step)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            report = launch.send(timeout=30)
            signal.setitimer(signal.ITIMER_REAL, 0)
        right = guest.result().rootfs_sha256 == bench.sha256
        seconds = report.seconds
        return {"struck": len(struck), "right": right, "seconds": seconds, **watch.changes()}


def broken_pipes(source, strategy, pending=False, runs=8, size=16 << 20):
    """Launch again and again to guests that die; SIGPIPE at its default would kill us."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    results = []
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        bench = Bench(folder, size, source)
        if pending:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
            signal.pthread_kill(threading.get_ident(), signal.SIGPIPE)
        for run in range(runs):
            watch, error = Watch(bench.sockets), None
            with bench.listening(strategy=strategy) as (launch, path):
                with sigpipe_blocked():
                    guest = RawGuest(path, 4096 + run * 300_007)
                guest.die(socket.socket.close)
                try:
                    launch.send(timeout=20)
                except NitroVsockError as caught:
                    error = caught
                guest.end()
            results.append({**describe(error), **watch.changes()})
    return results


def forks(does, while_sending=False):
    """Fork while a launch listens (or sends); the child does what it does with its copy, and ends.

    Return what the parent's launch came to.
    """
    warnings.simplefilter("ignore")  # forking beside threads, and a copy that is not closed
    statuses, forked = [], threading.Event()
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        bench = Bench(folder, 16 << 20, "file")
        watch = Watch(bench.sockets)
        with bench.listening() as (launch, path):

            def fork(*_):
                child = os.fork()
                if child == 0:
                    try:
                        _in_child(launch, does)
                    finally:
                        os._exit(1)
                statuses.append(os.waitpid(child, 0)[1])
                forked.set()

            if not while_sending:
                fork()
            there = os.path.exists(path)
            # Sending is what the parent does until the child has ended: the guest holds it there.
            guest = Guest(path, before_read=lambda got: got < 1 << 20 or forked.wait(20))
            report = launch.send(timeout=20, progress=fork if while_sending else None)
        right = guest.result().rootfs_sha256 == bench.sha256
        return {
            "statuses": statuses,
            "there": there,
            "right": right and report.peer_closed,
            **watch.changes(),
        }


def _in_child(launch, does):
    if does == "close":
        launch.close()
    elif does == "cancel":
        launch.cancel()
    elif does == "collect":
        launch.__del__()
    os._exit(0)


def strange_services(service, crowd):
    """Let strangers of another CID connect to a session's service before its guest does."""
    faults = Faults()
    faults.pretend_vsock(99)
    got, refused, hung_up = bytearray(), 0, 0

    class Sink:
        def write(self, data):
            got.extend(data)

    ours, theirs = socket.socketpair()
    proxies = DeviceProxyList([OutputProxy(Sink()), NetProxy(ours)])
    with tempfile.TemporaryDirectory(prefix="nv") as folder, ours, theirs:
        watch = Watch(folder)
        writer = EnclaveArgsWriter(
            Rootfs.from_bytes(make_tar(1)), "/bin/app", ["/bin/app"], {"A": "1"}, proxies=proxies
        )
        with EnclaveSession(writer, CID) as session:
            names = {
                port.offset: _name(port.listener.fileno())
                for port in session._ports
                if port.listener
            }
            names[1] = _name(session._launch.fileno())

            class Routed(SessionGuest):
                def address(self, offset):
                    return names[offset]

            strangers = [connect(names[service]) for _ in range(crowd)]
            guests = []

            def come():
                try:
                    wait_until(lambda: session.strangers_refused >= crowd, what="refusals")
                    faults.pretend_vsock(CID)
                    guests.append(Routed(None, CID, says=b"hello", status=768))
                except BaseException:
                    session.cancel()
                    raise

            helper = threading.Thread(target=come)
            helper.start()
            ended = session.run_sync()
            helper.join()
            guests[0].result()
            refused = session.strangers_refused
        for stranger in strangers:
            with stranger, contextlib.suppress(ConnectionResetError):
                hung_up += stranger.recv(1) == b""
        return {
            "refused": refused,
            "hung_up": hung_up,
            "status": ended.exit_code,
            "output": got.decode(),
            **watch.changes(),
        }


def collected(what):
    """Keep an error in a reference cycle, as `except` clauses do that store it; collect it."""

    def fail(uds):
        rootfs = Rootfs.from_bytes(bytearray(16 << 20))
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        try:
            with (
                writer.listen(CID, uds_path=uds) as launch,
                RawGuest(f"{uds}_{CID + 1}", 1000) as guest,
            ):
                if what == "send":
                    guest.die(socket.socket.close)
                else:
                    guest.flow()  # and never closes
                launch.send(timeout=20 if what == "send" else 0.3)
        except NitroVsockError as error:
            kept = error  # noqa: F841 - the frame holds the error, whose traceback holds it
            return type(error).__name__

    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        gc.disable()
        name = fail(f"{folder}/v")
        return {"error": name, "collected": gc.collect() > 0}


def quiet():
    """Launch well and badly in a process that has configured no logging."""
    with tempfile.TemporaryDirectory(prefix="nv") as folder:
        bench = Bench(folder, 1 << 17, "file")
        outcomes = []
        for timeout in (20, 0.05):
            with bench.listening() as (launch, path):
                guest = Guest(path) if timeout > 1 else None
                try:
                    outcomes.append(launch.send(timeout).peer_closed)
                except NitroVsockError as error:
                    outcomes.append(type(error).__name__)
            if guest:
                guest.result()
        ours = [name for name in logging.root.manager.loggerDict if name.startswith("nitro")]
        return {"outcomes": outcomes, "loggers": ours, "handlers": len(logging.root.handlers)}


def main():
    """Be the child."""
    scenario = globals()[sys.argv[1]]
    print(json.dumps(scenario(**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
