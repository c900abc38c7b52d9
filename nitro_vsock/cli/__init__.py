"""Owns: the entry point, and what it says where the command line cannot be loaded.

Knows nothing of: the commands. Imports without click and rich.
"""

from __future__ import annotations

import sys

from nitro_vsock.cli.ui import streams

__all__ = ["main"]


def main() -> int:
    """Run the command line; return the exit code."""
    streams.take_over()
    try:
        try:
            import click  # noqa: F401
            import rich  # noqa: F401
        except ModuleNotFoundError as error:
            sys.stderr.write(
                f"nitro-vsock: error: {error.name} is not installed: "
                "pip install 'nitro_vsock[cli]'\n"
            )
            return 2
        try:
            from nitro_vsock.cli.main import run
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            sys.stderr.write(
                f"nitro-vsock: error: the package cannot be loaded: {error}; install it again\n"
            )
            return 1
        return run(sys.argv[1:])
    except KeyboardInterrupt:
        # Ctrl-C while the modules above load; `run` reports its own.
        return 130
