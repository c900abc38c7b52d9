"""Senders raced against each other; `nitro-vsock bench` and the project's benchmarks use it.

Knows nothing of how results are shown.
"""
