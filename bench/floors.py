"""Owns: by figure, the target, and the floor below which a benchmark fails.

Must not know: how a figure is made.

A figure is a ratio of medians or a median of ratios of one run; greater is better. Floors lie well
under the targets, so that noise does not fail a run and a broken fast path does. Where both cores
are busy with other work, sender and reader share one: the ratios to peers shrink to a third, the
one to the ceiling stays, and so it is the sharp one.
"""

TARGETS = {
    "unix: against the ceiling": 0.97,
    "unix: against socket.sendfile": 3.0,
    "unix: against read+sendall": None,
    "unix: against socat": 3.0,
    "unix: against the reference way": 6.0,
    "unix: processor time, reference way over ours": 5.0,
    "vsock: against the best peer": 1.0,
    "vsock: automatic strategy against the best forced one": 0.95,
    "small launch: plain socket script over ours": 1.0,
    "8 launches at once against one": 0.95,
    "vsock, small launch: plain socket script over ours": 1.0,
    "vsock, 8 launches at once against one": 0.95,
    "import: socket and cffi, 1.5 times, over ours": 1.0,
    "tree: against tar | socat": 2.0,
    "tree: against tarfile": 5.0,
    "tree: against the reference way": 4.0,
    "tree: one large file, ready tar over ours": 0.95,
    "from_tar: large members, ready tar over ours": 0.9,
    "from_tar: small members, ready tar over ours": None,
    "from_tar: small members, a call for each over ours": None,
    "PCR16: hashlib over ours, from memory": 1.0,
    "PCR16: hashlib over ours, from a file": 1.0,
    "network, to the guest: against reference way": 3.0,
    "network, to the guest: against socat": 2.0,
    "network, to the guest: against ceiling: no relay": None,
    "network, to the guest: processor time, socat over ours": None,
    "network, from the guest: against reference way": 3.0,
    "network, from the guest: against socat": 2.0,
    "network, from the guest: against ceiling: no relay": None,
    "network, from the guest: processor time, socat over ours": None,
    "network, latency, gathered writes: reference way over ours": None,
    "network, latency, gathered writes: socat over ours": 2.0,
    "network, latency, gathered writes: ceiling: no relay over ours": None,
    "network, latency, single writes: reference way over ours": None,
    "network, latency, single writes: socat over ours": 2.0,
    "network, latency, single writes: ceiling: no relay over ours": None,
    "vsock network, to the guest: against reference way": 3.0,
    "vsock network, to the guest: against socat": 2.0,
    "vsock network, to the guest: against ceiling: no relay": None,
    "vsock network, to the guest: processor time, socat over ours": None,
    "vsock network, from the guest: against reference way": 3.0,
    "vsock network, from the guest: against socat": 2.0,
    "vsock network, from the guest: against ceiling: no relay": None,
    "vsock network, from the guest: processor time, socat over ours": None,
    "vsock network, latency, gathered writes: reference way over ours": None,
    "vsock network, latency, gathered writes: socat over ours": 2.0,
    "vsock network, latency, gathered writes: ceiling: no relay over ours": None,
}
"""Wanted ratio by figure; None where nobody asked for one."""

FLOORS = {
    "unix: against the ceiling": 0.75,
    "unix: against socket.sendfile": 0.9,
    "unix: against read+sendall": 1.2,
    "unix: against socat": 1.2,
    "unix: against the reference way": 3.0,
    "unix: processor time, reference way over ours": 2.5,
    "vsock: against the best peer": 0.8,
    "vsock: automatic strategy against the best forced one": 0.8,
    "small launch: plain socket script over ours": 0.8,
    "8 launches at once against one": 0.7,
    "vsock, small launch: plain socket script over ours": 0.7,
    "vsock, 8 launches at once against one": 0.7,
    "import: socket and cffi, 1.5 times, over ours": 0.7,
    "tree: against tar | socat": 1.4,
    "tree: against tarfile": 2.5,
    "tree: against the reference way": 2.0,
    "tree: one large file, ready tar over ours": 0.7,
    "from_tar: large members, ready tar over ours": 0.7,
    "from_tar: small members, ready tar over ours": 0.05,
    "from_tar: small members, a call for each over ours": 0.15,
    "PCR16: hashlib over ours, from memory": 0.75,
    "PCR16: hashlib over ours, from a file": 0.75,
    "network, to the guest: against reference way": 2.0,
    "network, to the guest: against socat": 0.9,
    "network, to the guest: against ceiling: no relay": 0.15,
    "network, to the guest: processor time, socat over ours": 1.2,
    "network, from the guest: against reference way": 0.9,
    "network, from the guest: against socat": 0.45,
    "network, from the guest: against ceiling: no relay": 0.3,
    "network, from the guest: processor time, socat over ours": 0.45,
    "network, latency, gathered writes: reference way over ours": 0.7,
    "network, latency, gathered writes: socat over ours": 0.8,
    "network, latency, gathered writes: ceiling: no relay over ours": 0.2,
    "network, latency, single writes: reference way over ours": 0.7,
    "network, latency, single writes: socat over ours": 0.8,
    "network, latency, single writes: ceiling: no relay over ours": 0.2,
    "vsock network, to the guest: against reference way": 0.5,
    "vsock network, to the guest: against socat": 0.3,
    "vsock network, to the guest: against ceiling: no relay": 0.05,
    "vsock network, to the guest: processor time, socat over ours": 0.4,
    "vsock network, from the guest: against reference way": 0.5,
    "vsock network, from the guest: against socat": 0.3,
    "vsock network, from the guest: against ceiling: no relay": 0.05,
    "vsock network, from the guest: processor time, socat over ours": 0.4,
    "vsock network, latency, gathered writes: reference way over ours": 0.3,
    "vsock network, latency, gathered writes: socat over ours": 0.3,
    "vsock network, latency, gathered writes: ceiling: no relay over ours": 0.05,
}
"""Ratio by figure."""

GROWTH_TARGET = 1 << 20
"""Bytes that the sender's peak may grow from 1 MiB to the largest archive."""

GROWTH_LIMIT = 2 << 20
"""The same as a floor: growth above it fails a run."""

TREE_PEAK_LIMIT = 100 << 20
"""Bytes that the sender's peak may take for a tree of 100,000 files."""
