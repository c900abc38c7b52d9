"""An enclave's life after the launch: its services, phases and deadlines.

Knows nothing of how an enclave is booted.
"""

from nitro_vsock.session.services.console import Console
from nitro_vsock.session.services.exit_status import ReturnCode, WaitStatus
from nitro_vsock.session.services.network import NetProxy
from nitro_vsock.session.services.output import OutputProxy
from nitro_vsock.session.services.signal import SignalHandler
from nitro_vsock.session.session import EnclaveSession, ExitStatus
from nitro_vsock.session.timeouts import SessionTimeouts

__all__ = [
    "WaitStatus",
    "ReturnCode",
    "Console",
    "EnclaveSession",
    "ExitStatus",
    "NetProxy",
    "OutputProxy",
    "SessionTimeouts",
    "SignalHandler",
]
