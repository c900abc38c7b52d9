"""Owns: the emulated enclave machine: its image, its processes, its console, its end.

Must not know: the package under test. `scripts/enclave-bed` makes the programs that it needs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enclave import eif

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "scripts" / "enclave-bed"
MODULES = (
    "virtio_mmio",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "tun",
    "nsm",
)
CMDLINE = (
    "console=ttyS0 reboot=t panic=-1 quiet rootfstype=ramfs nomodeset random.trust_cpu=on "
    # Without these three the boot hangs in calibration now and then, on a loaded machine always.
    "tsc_early_khz=2000000 lpj=4000000 no_timer_check"
)
CFLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror")
BOOT_TIME = 90.0
"""Seconds that a boot may take on a loaded machine; it takes 2 or 3."""
JUDGE_PORT = 9000
CID = 16


def where() -> Path | None:
    """Return the bed's folder; None where it was not made."""
    found = subprocess.run([SCRIPT, "--where"], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()) if found.returncode == 0 else None


class Bed:
    """What every machine of a run is made of: the bed, and the guest compiled."""

    def __init__(self, folder: Path, work: Path) -> None:
        """`folder`: made by scripts/enclave-bed. `work`: for what this run makes of it."""
        self.folder, self.work = folder, work
        guest = [HERE / "guest" / name for name in ("init.c", "nsm.c", "network.c")]
        self._compile("init", *guest, libraries=("-larchive", "-lacl"))
        self._compile("probe", HERE / "guest" / "probe.c")
        self.kernel = (folder / "kernel" / "vmlinuz").read_bytes()

    @property
    def probe(self) -> bytes:
        """The program that runs in the enclave."""
        return (self.work / "probe").read_bytes()

    def _compile(self, name: str, *sources: Path, libraries: tuple[str, ...] = ()) -> None:
        command = ["gcc", *CFLAGS, "-static", "-s", "-o", self.work / name, *sources, *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the guest does not compile:\n{done.stderr}")

    @functools.cache  # noqa: B019 - one bed a run
    def _ramdisks(self, nsm: bool) -> tuple[bytes, bytes]:
        modules = [name for name in MODULES if nsm or name != "nsm"]
        files = {
            f"modules/{name}.ko": eif.File(
                (self.folder / "kernel" / "modules" / f"{name}.ko").read_bytes()
            )
            for name in modules
        }
        order = "".join(f"{name}.ko\n" for name in modules)
        files["modules/order"] = eif.File(order.encode())
        init = eif.File((self.work / "init").read_bytes(), 0o755)
        return eif.cpio(files), eif.cpio({"init": init})

    @functools.cache  # noqa: B019
    def image(self, options: str = "", *, nsm: bool = True) -> Image:
        """Pack an image whose guest is told `options` on the kernel's command line."""
        line = f"{CMDLINE} {options}".strip().encode()
        disks = self._ramdisks(nsm)
        path = self.work / f"{abs(hash((line, nsm))):x}.eif"
        path.write_bytes(eif.pack(self.kernel, line, disks))
        return Image(path, eif.registers(self.kernel, line, disks))


@dataclass(frozen=True)
class Image:
    """An enclave image in a file, and what its registers will be."""

    path: Path
    registers: dict[str, str]


class Console:
    """What a machine says, line by line."""

    def __init__(self, stream: Any) -> None:
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(stream,), name="console")
        self._thread.start()

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                with self._more:
                    self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def text(self) -> str:
        """All of it so far."""
        with self._more:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, timeout: float = BOOT_TIME) -> re.Match[str]:
        """Return the first line that matches.

        Raises:
            AssertionError: the machine ended without it, or the time was over.
        """
        seen, deadline = 0, time.monotonic() + timeout
        with self._more:
            while True:
                for line in self._lines[seen:]:
                    found = re.search(pattern, line)
                    if found:
                        return found
                seen = len(self._lines)
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "the machine ended" if self._ended else "the time is over"
                    tail = "\n".join(self._lines[-20:])
                    raise AssertionError(f"{why} before {pattern!r} was said; it said:\n{tail}")
                self._more.wait(left)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()


class Machine:
    """One emulated enclave: QEMU's nitro-enclave machine and its vsock device.

    Attributes:
        cid: the enclave's.
        uds_path: where its connections to the host arrive, with _PORT behind it.
    """

    def __init__(self, bed: Bed, folder: Path, cid: int = CID) -> None:
        self._bed, self._folder, self.cid = bed, folder, cid
        self.uds_path = str(folder / f"{cid}.vsock")
        self._socket = folder / f"{cid}.device"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._hangup = -1
        self._console: Console | None = None
        self.image: Image | None = None
        self.booted_at = 0.0

    @property
    def host_options(self) -> dict[str, Any]:
        """What is to be passed on to whatever listens."""
        return {"uds_path": self.uds_path}

    def boot(
        self, options: str = "", *, nsm: bool = True, memory: str = "1G", image: Image | None = None
    ) -> Machine:
        """Start it, in place of the ioctls of a launcher. Everything must be bound already."""
        # One word would not do for exactly 2 GiB: such a machine finds no ACPI tables.
        assert memory not in ("2G", "2048M"), "exactly 2 GiB does not boot"
        self.image = image or self._bed.image(options, nsm=nsm)
        self.booted_at = time.monotonic()
        vm = f"guest-cid={self.cid},socket={self._socket},uds-path={self.uds_path}"
        log = self._folder / f"{self.cid}.log"
        with log.open("wb") as out:
            device = self._start("vhost-device-vsock", "--vm", vm, stdout=out, stderr=out)
        _await_listener(self._socket, device, log)
        self._hangup, theirs = os.pipe()
        try:
            qemu = self._start(
                "qemu-system-x86_64",
                *("-L", str(self._bed.folder / "firmware"), "-nographic", "-no-reboot"),
                # Emulated even where there is KVM: some virtual machines' own is not whole.
                *("-m", memory, "-accel", "tcg", "-cpu", "max", "-kernel", str(self.image.path)),
                *("-M", "nitro-enclave,vsock=c,id=nv,acpi=on,pit=on,pic=on,rtc=on"),
                *("-chardev", f"socket,id=c,path={self._socket}"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
            )
        finally:
            os.close(theirs)
        self._console = Console(qemu.stdout)
        return self

    def _start(self, name: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        # Children do not outlive the tests, however these end.
        command = ["setpriv", "--pdeathsig", "KILL", str(self._bed.folder / "bin" / name)]
        process = subprocess.Popen([*command, *arguments], **options)
        self._processes.append(process)
        return process

    def fileno(self) -> int:
        """Hangs up when the machine is gone, as an enclave's descriptor does."""
        return self._hangup

    @property
    def console(self) -> Console:
        """What it says."""
        assert self._console is not None, "it was not booted"
        return self._console

    def wait_for(self, pattern: str, timeout: float = BOOT_TIME) -> re.Match[str]:
        """Wait for a line of the guest's; `GUEST ` stands before it."""
        return self.console.wait_for(rf"GUEST {pattern}", timeout)

    def registers(self) -> dict[str, str]:
        """Return what the security module holds, as the guest has read it, once it has."""
        self.wait_for("PCR17=")
        return dict(re.findall(r"GUEST (PCR\d+)=([0-9a-f]{96})", self.console.text))

    def wait(self, timeout: float = BOOT_TIME) -> float:
        """Wait for its end; return the seconds since it was booted."""
        self._processes[1].wait(timeout)
        return time.monotonic() - self.booted_at

    def kill(self) -> None:
        """End it at once, as a hypervisor does, and wait until it is gone."""
        self._processes[1].send_signal(signal.SIGKILL)
        self._processes[1].wait()

    def poke(self) -> socket.socket:
        """Ask a guest that judges to take a launch; its verdict comes over what is returned."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(BOOT_TIME)
        sock.connect(self.uds_path)
        sock.sendall(b"CONNECT %d\n" % JUDGE_PORT)
        answer = b""
        while not answer.endswith(b"\n"):
            got = sock.recv(1)
            if not got:
                raise AssertionError(f"the guest does not judge: {answer!r}")
            answer += got
        assert answer.startswith(b"OK "), answer
        return sock

    def close(self) -> None:
        """End whatever of it there is, and its files."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        if self._console is not None:
            self._console.join()
        if self._hangup >= 0:
            os.close(self._hangup)
            self._hangup = -1
        self._processes = []
        for path in self._folder.glob(f"{self.cid}.*"):
            path.unlink()


def _await_listener(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process listens at a path. Connecting would use up the one that it takes."""
    listening = re.compile(rf"^\S+ \S+ \S+ 00010000 .* {re.escape(str(path))}$", re.MULTILINE)
    pidfd = os.pidfd_open(process.pid)
    try:
        deadline = time.monotonic() + BOOT_TIME
        while not listening.search(Path("/proc/net/unix").read_text()):
            ended, _, _ = select.select([pidfd], [], [], 0.005)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"the vsock device does not start: {log.read_text()}")
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a Unix socket's."""
    with tempfile.TemporaryDirectory(prefix="nve") as folder:
        yield Path(folder)


@contextlib.contextmanager
def on_line(console: Console, pattern: str, action: Callable[[], None]) -> Iterator[list[float]]:
    """Do something, on a thread, when the guest says a line; gives when, once it was done."""
    done: list[float] = []

    def watch() -> None:
        console.wait_for(pattern)
        action()
        done.append(time.monotonic())

    thread = threading.Thread(target=watch, name="on_line")
    thread.start()
    try:
        yield done
    finally:
        thread.join()
