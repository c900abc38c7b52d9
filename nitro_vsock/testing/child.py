"""Owns: starting another Python process that runs this package. Must not know: what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def python_command(module: str, *args: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *args]


def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command so that a Python among its children finds this very package.

    A folder named nitro_vsock in the working directory must not be taken for it.
    """
    return subprocess.Popen(  # noqa: S603 - a command of our own, no shell
        command,
        cwd=Path(os.sep),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        **options,
    )
