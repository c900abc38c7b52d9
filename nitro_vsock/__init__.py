"""Hand a booting AWS Nitro enclave its root file system, program and environment over vsock.

Owns: the public names. Must not know: anything else.

A name is imported when it is first asked for, so that a launcher pays for what it uses.
"""

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nitro_vsock.check import Finding, Measurement, Severity
    from nitro_vsock.deadline import DEFAULT_TIMEOUT, PollTimeout, poll_timeout
    from nitro_vsock.enclave import (
        Eif,
        EifSection,
        EnclaveMeasurement,
        SectionType,
        SigningCertificate,
        build_eif,
        measure_image,
    )
    from nitro_vsock.errors import (
        ERRNO_TABLE,
        ArchiveError,
        BadStringError,
        BusyError,
        ClosedError,
        ConnectTimeoutError,
        DeadlineError,
        DuplicateFrameError,
        EarlyEndError,
        EifError,
        EifReadError,
        EnclaveDiedError,
        GuestRuleError,
        HandshakeTimeoutError,
        InvalidArgumentError,
        LaunchCancelledError,
        LimitExceededError,
        MissingFrameError,
        NitroVsockError,
        PeerClosedError,
        PollNoEventsError,
        PreflightError,
        ProtocolError,
        ProxyError,
        ReadySignalNotDetectedError,
        ReturnCodeError,
        SessionTimeoutError,
        SourceChangedError,
        SourceError,
        SourceReadError,
        SourceTruncatedError,
        Stage,
        StreamTimeoutError,
        UnknownFrameError,
        UnsupportedError,
        VsockAcceptError,
        VsockBindError,
        VsockCidMismatchError,
        VsockConnectError,
        VsockReadError,
        VsockWriteError,
    )
    from nitro_vsock.launch import (
        DeviceProxy,
        DeviceProxyList,
        DeviceService,
        EnclaveArgs,
        EnclaveArgsReader,
        EnclaveArgsWriter,
        Launch,
        LaunchReport,
        SessionProxy,
        measure,
    )
    from nitro_vsock.progress import Progress
    from nitro_vsock.protocol import VMADDR_CID_ANY, FrameId, VsockPortOffset
    from nitro_vsock.rootfs import Rootfs
    from nitro_vsock.session import (
        Console,
        EnclaveSession,
        ExitStatus,
        NetProxy,
        OutputProxy,
        ReturnCode,
        SessionTimeouts,
        SignalHandler,
        WaitStatus,
    )
    from nitro_vsock.transport import EventLoop, Peer, Relay, Strategy, UnixAddress, VsockAddress
    from nitro_vsock.wire import (
        AppOutput,
        EnclaveArg,
        ExecArgv,
        ExecEnvp,
        ExecPath,
        Finished,
        FrameDecoder,
        Guest,
        Limits,
        NetworkProxy,
        RootFilesystem,
        RootfsData,
    )

__all__ = [
    # the host's side
    "EnclaveArgsWriter",
    "Rootfs",
    "Launch",
    "LaunchReport",
    "Progress",
    "Strategy",
    "Peer",
    "VsockAddress",
    "UnixAddress",
    "DeviceProxy",
    "DeviceProxyList",
    "Guest",
    # an enclave's life
    "EnclaveSession",
    "SessionTimeouts",
    "ExitStatus",
    "WaitStatus",
    "OutputProxy",
    "NetProxy",
    "SignalHandler",
    "ReturnCode",
    "Console",
    "SessionProxy",
    "DeviceService",
    "EventLoop",
    "Relay",
    # before a launch
    "Finding",
    "Severity",
    "measure",
    "Measurement",
    # enclave images
    "Eif",
    "EifSection",
    "SectionType",
    "SigningCertificate",
    "EnclaveMeasurement",
    "measure_image",
    "build_eif",
    # time
    "PollTimeout",
    "poll_timeout",
    "DEFAULT_TIMEOUT",
    # the guest's side
    "EnclaveArgsReader",
    "EnclaveArgs",
    "Limits",
    # protocol
    "EnclaveArg",
    "RootFilesystem",
    "RootfsData",
    "ExecPath",
    "ExecArgv",
    "ExecEnvp",
    "NetworkProxy",
    "AppOutput",
    "Finished",
    "FrameDecoder",
    "FrameId",
    "VsockPortOffset",
    "VMADDR_CID_ANY",
    # errors
    "ERRNO_TABLE",
    "Stage",
    "NitroVsockError",
    "InvalidArgumentError",
    "PreflightError",
    "UnsupportedError",
    "VsockBindError",
    "VsockAcceptError",
    "VsockConnectError",
    "DeadlineError",
    "PollNoEventsError",
    "ConnectTimeoutError",
    "HandshakeTimeoutError",
    "StreamTimeoutError",
    "ReadySignalNotDetectedError",
    "VsockCidMismatchError",
    "VsockReadError",
    "VsockWriteError",
    "PeerClosedError",
    "SourceError",
    "SourceReadError",
    "SourceTruncatedError",
    "SourceChangedError",
    "ArchiveError",
    "EifError",
    "EifReadError",
    "LaunchCancelledError",
    "EnclaveDiedError",
    "SessionTimeoutError",
    "ReturnCodeError",
    "ProxyError",
    "BusyError",
    "ClosedError",
    "ProtocolError",
    "UnknownFrameError",
    "DuplicateFrameError",
    "MissingFrameError",
    "LimitExceededError",
    "BadStringError",
    "EarlyEndError",
    "GuestRuleError",
]

_ROOMS = (
    "errors",
    "protocol",
    "deadline",
    "progress",
    "wire",
    "transport",
    "rootfs",
    "launch",
    "check",
    "session",
    "enclave",
)
"""Where the names are; the cheaper to import, the earlier."""


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _ROOMS:
            found = vars(import_module(f"{__name__}.{module}")).get(name)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
