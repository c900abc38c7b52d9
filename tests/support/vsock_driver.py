"""Owns: one launch over AF_VSOCK in a process of its own, for tests that watch it from outside.

usage: vsock_driver.py CID ROOTFS STRATEGY [BYTES]; BYTES makes one more variable, of that size.
Prints the outcome as JSON. SIGPIPE is at its default.
"""

import json
import signal
import sys

from nitro_vsock import EnclaveArgsWriter, NitroVsockError, Rootfs

signal.signal(signal.SIGPIPE, signal.SIG_DFL)

cid, path, strategy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
large = {"LARGE": "x" * int(sys.argv[4])} if sys.argv[4:] else {}
writer = EnclaveArgsWriter(
    Rootfs.from_file(path),
    "/bin/app",
    ["/bin/app", "--listen", "a name with spaces"],
    {"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "MODE": "production", **large},
    network_proxy=True,
    app_output=True,
)
try:
    report = writer.write_args(cid, timeout=60, peer_cid=1, strategy=strategy)
    print(json.dumps({"sent": report.bytes_sent, "strategy": report.strategy.value}))
except NitroVsockError as error:
    pending = signal.SIGPIPE in signal.sigpending()
    print(json.dumps({"error": type(error).__name__, "sent": error.bytes_sent, "pending": pending}))
