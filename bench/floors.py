"""Owns: the ratios below which a benchmark fails, by figure. Must not know: how a figure is made.

Well under the targets of docs/performance.md, so that noise does not fail a run and a broken fast
path does. A figure is a ratio of medians or a median of ratios of one run; greater is better.
"""

FLOORS = {
    "unix: against the ceiling": 0.75,
    "unix: against socket.sendfile": 1.8,
    "unix: against read+sendall": 1.8,
    "unix: against socat": 1.8,
    "unix: against the reference way": 4.0,
    "unix: processor time, reference way over ours": 3.5,
    "vsock: against the best peer": 0.8,
    "vsock: automatic strategy against the best forced one": 0.8,
    "small launch: plain socket script over ours": 0.8,
    "8 launches at once against one": 0.7,
    "import: socket and cffi, 1.5 times, over ours": 0.7,
}
"""Ratio by figure."""

GROWTH_LIMIT = 2 << 20
"""Bytes that the sender's peak may grow from 1 MiB to the largest archive."""
