"""What the bytes of a launch are, and what each published guest expects. Sans-IO.

Knows nothing of descriptors.
"""

from nitro_vsock.wire.frames import (
    DEFAULT_LIMITS,
    AppOutput,
    EnclaveArg,
    Event,
    ExecArgv,
    ExecEnvp,
    ExecPath,
    Finished,
    FrameDecoder,
    Limits,
    NetworkProxy,
    RootFilesystem,
    RootfsData,
    Text,
    encode_packets,
    encode_text,
    encode_texts,
)
from nitro_vsock.wire.guests import DEFAULT_GUEST, Guest, check_guest

__all__ = [
    "AppOutput",
    "DEFAULT_GUEST",
    "DEFAULT_LIMITS",
    "EnclaveArg",
    "Event",
    "ExecArgv",
    "ExecEnvp",
    "ExecPath",
    "Finished",
    "FrameDecoder",
    "Guest",
    "Limits",
    "NetworkProxy",
    "RootFilesystem",
    "RootfsData",
    "Text",
    "check_guest",
    "encode_packets",
    "encode_text",
    "encode_texts",
]
