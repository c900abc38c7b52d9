"""Owns: the pytest plugin: the fixture `enclave` and its option.

Must not know: what an enclave is. pytest loads this in every run, so the rest is imported when the
fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nitro_vsock.testing.enclave import Enclave

_HELP = "how the fixture enclave connects guest and host: AF_VSOCK loopback or Unix sockets"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --enclave-transport, and enclave_transport for the configuration file."""
    group = parser.getgroup("nitro_vsock")
    choices = ["auto", "vsock", "unix"]
    group.addoption("--enclave-transport", choices=choices, default=None, help=_HELP)
    parser.addini("enclave_transport", f"{_HELP} ({', '.join(choices)})", default="auto")


@pytest.fixture
def enclave(request: pytest.FixtureRequest) -> Iterator[Enclave]:
    """Return a stand-in for one enclave: `cid`, `host_options`, and `boot()` for its guest."""
    from nitro_vsock.testing.enclave import Enclave

    transport = request.config.getoption("--enclave-transport")
    with Enclave(transport or request.config.getini("enclave_transport")) as place:
        yield place
