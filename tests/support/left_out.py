"""Owns: what a run leaves out: what a test needs, how to get it, and a line on it at the end.

Knows nothing of the tests.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from machine import HAS_LOOPBACK


def leave_out(need, how):
    """Skip this test: it needs something that is not here.

    Args:
        need: what it needs, after "needs ".
        how: what to do to have it tested.
    """
    pytest.skip(_reason(need, how))


def needs(condition, need, how):
    """Return the mark of a test that runs only where the condition holds; see `leave_out`."""
    return pytest.mark.skipif(not condition, reason=_reason(need, how))


def install(package):
    """Return how to get a package of Debian's."""
    return f"apt-get install {package}"


def needs_tool(name, package=None):
    """Return the mark of a test that runs another program."""
    return needs(shutil.which(name), name, install(package or name))


def _reason(need, how):
    return f"needs {need}: {how}"


AS_ROOT = "run the tests as root"
needs_root = needs(os.geteuid() == 0, "root", AS_ROOT)

TUN = "/dev/net/tun"
TUN_HOW = "modprobe tun; for a container, --device=/dev/net/tun"
needs_tun = needs(os.access(TUN, os.W_OK), TUN, TUN_HOW)


class Summary:
    """Counts what is skipped; says it at the end."""

    def __init__(self):
        self._counts = Counter()

    def pytest_runtest_logreport(self, report):
        """Count a test."""
        self._count(report)

    def pytest_collectreport(self, report):
        """Count a file."""
        self._count(report)

    def _count(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self._counts[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_terminal_summary(self, terminalreporter):
        """Say what this run did not show, a line for each need."""
        lines = [
            f"{count} {'test' if count == 1 else 'tests'} left out, {reason}"
            for reason, count in self._counts.most_common()
        ]
        if not HAS_LOOPBACK:
            lines.insert(0, "tests/vsock left out, needs AF_VSOCK loopback: make test-vsock")
        for path in terminalreporter.config.getoption("ignore") or ():
            lines.insert(
                0, f"{path} left out, has a command of its own: make test-{Path(path).name}"
            )
        for line in lines:
            terminalreporter.write_line(line, yellow=True)


def pytest_configure(config):
    """Count and tell where the terminal is: with workers, that is not where tests run."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary())
