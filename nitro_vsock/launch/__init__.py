"""Both sides of the launch protocol: the writer, the reader, and what a device proxy is.

Knows nothing of sessions.
"""

from nitro_vsock.launch.launch import Launch
from nitro_vsock.launch.ports import bind_hint, check_enclave_fd, check_peer_cid, service_address
from nitro_vsock.launch.proxies import DeviceProxy, DeviceProxyList, DeviceService, SessionProxy
from nitro_vsock.launch.reader import EnclaveArgs, EnclaveArgsReader
from nitro_vsock.launch.report import LaunchReport
from nitro_vsock.launch.writer import EnclaveArgsWriter, measure

__all__ = [
    "measure",
    "DeviceProxy",
    "DeviceProxyList",
    "DeviceService",
    "EnclaveArgs",
    "EnclaveArgsReader",
    "EnclaveArgsWriter",
    "Launch",
    "LaunchReport",
    "SessionProxy",
    "bind_hint",
    "check_enclave_fd",
    "check_peer_cid",
    "service_address",
]
