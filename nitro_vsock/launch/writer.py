"""Owns: the configuration of a launch: validation and encoding of the arguments.

Must not know: how bytes move, what errno values mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Union

from nitro_vsock import protocol
from nitro_vsock.check import Finding, Measurement, Severity, quick_preflight
from nitro_vsock.check import measure as measure_launch
from nitro_vsock.check import preflight as full_preflight
from nitro_vsock.deadline import DEFAULT_TIMEOUT, Deadline, Timeout
from nitro_vsock.errors import InvalidArgumentError, PreflightError
from nitro_vsock.launch.launch import Launch
from nitro_vsock.launch.ports import check_peer_cid, service_address
from nitro_vsock.launch.proxies import DeviceProxy, DeviceProxyList
from nitro_vsock.launch.report import LaunchReport
from nitro_vsock.progress import Progress
from nitro_vsock.rootfs import OpenRootfs, Rootfs
from nitro_vsock.transport import PathLike, Strategy
from nitro_vsock.wire import (
    DEFAULT_GUEST,
    AppOutput,
    EnclaveArg,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Guest,
    NetworkProxy,
    RootFilesystem,
    Text,
    check_guest,
    encode_packets,
    encode_text,
    encode_texts,
)

logger = logging.getLogger("nitro_vsock")

logger.addHandler(logging.NullHandler())

Environment = Union[Mapping[str, str], Mapping[bytes, bytes], Iterable[Text]]

_PATH: Final = b"PATH="


class EnclaveArgsWriter:
    """The configuration of a launch, checked; hands it to enclaves any number of times.

    Attributes:
        rootfs: the root file system.
        args: the other frames, in the order they are sent.
        proxies: those given, for an `EnclaveSession`.
        guest: the guest this launch is for.
        network_proxy: whether the guest is asked to connect to the network service.
        app_output: whether the guest is asked to send the program's output.
    """

    def __init__(
        self,
        rootfs: Rootfs,
        exec_path: Text,
        argv: Iterable[Text],
        envp: Environment,
        *,
        proxies: Iterable[DeviceProxy] | None = None,
        network_proxy: bool = False,
        app_output: bool = False,
        guest: Guest | str = DEFAULT_GUEST,
    ) -> None:
        """Check and encode the arguments.

        Args:
            rootfs: see `Rootfs`.
            exec_path: the program's path, measured into PCR17. Up to 4000 bytes.
            argv: at least one string of up to 4000 bytes; argv[0] is what is executed.
            envp: at least one variable: a mapping, or a list of `NAME=value`. Where argv[0] has no
                slash, PATH is put first, because the guest looks nowhere else for it.
            proxies: their frames are added.
            network_proxy: the guest is to connect to the network service.
            app_output: the guest is to send the program's output.
            guest: the guest in the enclave's image, or its name. See `Guest`.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        self.guest = check_guest(guest)
        self.proxies = DeviceProxyList(proxies or ())
        argv_bytes = encode_texts("argv", argv)
        envp_bytes = encode_texts("envp", _environment(envp))
        if b"/" not in argv_bytes[0]:
            envp_bytes = _path_first(envp_bytes)
        self._setup(
            rootfs,
            encode_text("exec_path", exec_path),
            argv_bytes,
            envp_bytes,
            [
                *([NetworkProxy()] if network_proxy else []),
                *([AppOutput()] if app_output else []),
                *self.proxies.args(),
            ],
        )

    @classmethod
    def from_reference(
        cls,
        rootfs: Rootfs | bytes,
        exec_path: str,
        argv_str: str,
        envp_str: str,
        proxies: DeviceProxyList,
        *,
        guest: Guest | str = DEFAULT_GUEST,
    ) -> EnclaveArgsWriter:
        """Build what the reference's `EnclaveArgsWriter::new` builds from the same arguments.

        Double quotes are deleted and the strings split at every single space; empty strings stay,
        and the order of envp too, so that PCR17 is the same.

        Args:
            rootfs: a Rootfs, or the archive in memory as the reference takes it.
            exec_path: the program's path.
            argv_str: the arguments in one string.
            envp_str: the environment in one string.
            proxies: their frames are added.
            guest: see `EnclaveArgsWriter`.

        Raises:
            InvalidArgumentError: names the field, the value and the limit.
        """
        for name, value in (("argv_str", argv_str), ("envp_str", envp_str)):
            if not isinstance(value, str):
                raise InvalidArgumentError(name, value, "must be str")
        writer = cls.__new__(cls)
        writer.guest = check_guest(guest)
        writer.proxies = DeviceProxyList(proxies)
        writer._setup(
            rootfs if isinstance(rootfs, Rootfs) else Rootfs.from_bytes(rootfs),
            encode_text("exec_path", exec_path, allow_empty=True),
            encode_texts("argv", argv_str.replace('"', "").split(" "), allow_empty=True),
            encode_texts("envp", envp_str.replace('"', "").split(" "), allow_empty=True),
            writer.proxies.args(),
        )
        return writer

    def _setup(
        self,
        rootfs: Rootfs,
        path: bytes,
        argv: tuple[bytes, ...],
        envp: tuple[bytes, ...],
        flags: list[EnclaveArg],
    ) -> None:
        if not isinstance(rootfs, Rootfs):
            raise InvalidArgumentError("rootfs", rootfs, "must be a Rootfs (Rootfs.from_file, ...)")
        self.rootfs = rootfs
        self.network_proxy = NetworkProxy() in flags
        self.app_output = AppOutput() in flags
        sent = dict.fromkeys(flags)
        if self.guest.frame_5_silences:
            sent.pop(AppOutput(), None)
            if not self.app_output:
                sent[AppOutput()] = None
        # Flags first: the guest spins for ever on a stream that ends after one.
        self.args: tuple[EnclaveArg, ...] = (
            *sent,
            ExecPath(path),
            ExecArgv(argv),
            ExecEnvp(envp),
        )
        # To see that they fit. The archive's length takes the same room whatever it is.
        encode_packets([*self.args, RootFilesystem(1)])

    def listen(
        self,
        cid: int,
        *,
        uds_path: PathLike | None = None,
        peer_cid: int | None = None,
        strict_peer: bool = False,
        strategy: Strategy | str = Strategy.AUTO,
        preflight: bool = True,
    ) -> Launch:
        """Bind the arguments port now, before the enclave boots: a guest tries once.

        Args:
            cid: of the enclave that is going to boot; the port is CID + 1. Enclaves need CIDs at
                least 5 apart, and CIDs below 1023 need CAP_NET_BIND_SERVICE.
            uds_path: base path of a hybrid vsock, in place of AF_VSOCK.
            peer_cid: the CID the guest's connection shows; `cid` by default. 1 over vsock loopback,
                VMADDR_CID_ANY for whoever comes.
            strict_peer: fail at the first stranger, as the reference does, instead of refusing it
                and waiting on.
            strategy: how to send the root file system; AUTO takes the fastest.
            preflight: make the quick ones of the checks of `preflight`: the strings, and the first
                header of an archive in a file. Errors are raised, warnings logged.

        Returns:
            A Launch; use it as a context manager.

        Raises:
            InvalidArgumentError: before anything is bound.
            PreflightError: the guest would fail on this launch; before anything is bound.
            SourceReadError: the rootfs cannot be opened.
            VsockBindError: the port is taken or not permitted.
            UnsupportedError: this kernel has no AF_VSOCK.
        """
        address = service_address(cid, protocol.VsockPortOffset.ARGS_READER, uds_path)
        wanted = check_peer_cid(cid if peer_cid is None else peer_cid)
        source = self.rootfs.open()
        try:
            way = _check_strategy(strategy, source)
            if preflight:
                _refuse_errors(quick_preflight(self.args, source))
            return Launch(self.args, source, cid, address, wanted, strict_peer, way)
        except BaseException:
            source.close()
            raise

    def preflight(self, memory_bytes: int | None = None) -> tuple[Finding, ...]:
        """Return everything that the guest would fail on, or may, without launching anything.

        The archive is read once, from its start to its end; a pipe is not. docs/rootfs.md has the
        table of codes.

        Args:
            memory_bytes: the enclave's memory; not checked where it is left out.

        Raises:
            InvalidArgumentError: a memory_bytes that is no number of bytes.
        """
        return full_preflight(self.args, self.rootfs, memory_bytes)

    def measure(self) -> Measurement:
        """Predict PCR16 and PCR17 of an enclave that takes this launch.

        The archive is read once, from its start to its end; memory does not grow with it. Names,
        modes, links, directories, owners and times are not measured, but the order of the members
        is.

        Raises:
            InvalidArgumentError: the rootfs is a pipe, which would be empty afterwards.
            ArchiveError: it is no tar that the guest reads to its end.
            SourceError: it could not be read.
        """
        return measure_launch(self.args, self.rootfs)

    def write_args(
        self,
        cid: int,
        timeout: Timeout = DEFAULT_TIMEOUT,
        *,
        progress: Callable[[Progress], object] | None = None,
        enclave_fd: int | None = None,
        **listen: Any,
    ) -> LaunchReport:
        """Listen, send and close in one call, as the reference does.

        The port is bound only now; where the enclave may boot earlier, use `listen` before it does.

        Args:
            cid: of the enclave.
            timeout: see `Launch.send`.
            progress: see `Launch.send`.
            enclave_fd: see `Launch.send`.
            listen: keyword arguments of `listen`.

        Raises:
            NitroVsockError: as `listen` and `Launch.send` do.
        """
        Deadline.after(timeout)
        with self.listen(cid, **listen) as launch:
            return launch.send(timeout, progress, enclave_fd=enclave_fd)

    def __repr__(self) -> str:
        return f"<EnclaveArgsWriter {self.rootfs!r}>"


def _environment(envp: Environment) -> Iterable[Text]:
    if not isinstance(envp, Mapping):
        return envp
    entries: list[Text] = []
    for name, value in envp.items():
        key = encode_text("envp name", name)
        if b"=" in key:
            raise InvalidArgumentError("envp name", name, "must not contain '='")
        entries.append(key + b"=" + encode_text(f"envp[{name!r}]", value, allow_empty=True))
    return entries


def _path_first(envp: tuple[bytes, ...]) -> tuple[bytes, ...]:
    for index, entry in enumerate(envp):
        if entry.startswith(_PATH):
            return (entry, *envp[:index], *envp[index + 1 :])
    logger.warning("argv[0] has no slash and envp no PATH: the guest will not find the program")
    return envp


def _refuse_errors(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        if finding.severity is Severity.ERROR:
            limit = f"{finding.reason}; {finding.remedy}"
            raise PreflightError(finding.subject, finding.code, limit, findings)
        logger.warning("%s", finding)


def _check_strategy(strategy: Strategy | str, source: OpenRootfs) -> Strategy:
    try:
        wanted = Strategy(strategy)
    except ValueError:
        names = ", ".join(item.value for item in Strategy)
        raise InvalidArgumentError("strategy", strategy, f"must be one of {names}") from None
    in_memory = isinstance(source.payload, memoryview)
    if wanted is not Strategy.AUTO and in_memory != (wanted is Strategy.SEND):
        fitting = "send" if in_memory else "sendfile, splice, mmap or read"
        limit = f"must be auto, {fitting} for this rootfs"
        raise InvalidArgumentError("strategy", wanted.value, limit)
    return wanted


def measure(writer: EnclaveArgsWriter) -> Measurement:
    """Return `writer.measure()`."""
    return writer.measure()
