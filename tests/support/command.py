"""Owns: the command line in a process of its own, and what its failures look like."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from machine import CID

PROJECT = Path(__file__).resolve().parents[2]


COMMAND = [sys.executable, "-m", "nitro_vsock"]


ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "TERM": "xterm", "COLUMNS": "100"}


LIMIT = 60


def run(*args, command=COMMAND, **options):
    """Run the command line to its end."""
    options.setdefault("env", ENVIRONMENT)
    return subprocess.run(
        [*command, *args], capture_output=True, text=True, timeout=LIMIT, check=False, **options
    )


@contextlib.contextmanager
def started(*args, command=COMMAND, **options):
    """Start the command line; it is gone, its pipes too, when the context ends."""
    options.setdefault("env", ENVIRONMENT)
    process = subprocess.Popen(
        [*command, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def await_line(process, text):
    """Read stderr up to a line that contains the text; return that line."""
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not said")


def send_args(archive, uds, *extra, program=("/bin/app",), env=("PATH=/bin",)):
    """Return the arguments of an ordinary `send`."""
    variables = [part for variable in env for part in ("--env", variable)]
    where = ["--cid", str(CID), "--uds-path", uds, "--rootfs", str(archive)]
    return ["send", *where, *variables, *extra, "--", *program]


def receive_args(uds, *extra):
    """Return the arguments of an ordinary `receive`."""
    return ["receive", "--cid", str(CID), "--uds-path", uds, *extra]


def assert_failed(done, code, kind, stage=None):
    """Check the exit code, the one line for people and the one object for machines."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("nitro-vsock: error: ")]
    assert len(said) == 1
    assert done.stderr.splitlines()[-1] == said[0]
    error = json.loads(done.stdout)["error"]
    assert set(error) == {
        "class",
        "message",
        "stage",
        "errno",
        "bytes_sent",
        "total",
        "must_terminate_enclave",
    }
    assert (error["class"], error["stage"]) == (kind, stage)
    assert said[0] == f"nitro-vsock: error: {error['message']}"
    return error
