"""Owns: the entry point, and what it says where the `cli` extra is missing.

Must not know: the commands. Imports without click and rich.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; return the exit code."""
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
        from nitro_vsock.cli.main import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        # Ctrl-C while the modules above load; `run` reports its own.
        return 130
