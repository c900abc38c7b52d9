"""Owns: what a test of the emulated enclave gets: a machine, a guest that judges, a check of leaks.

Must not know: what is tested. Where the bed is missing, the tests are skipped, and that is said.
"""

import gc
import os
import threading

import pytest
from enclave.bed import Bed, Machine, short_folder, where
from enclave.trees import Judge
from left_out import needs

from nitro_vsock import NitroVsockError

BED = where()
HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    """Without the bed there is nothing to run in."""
    if BED is None:
        for item in items:
            if str(item.path).startswith(HERE):
                item.add_marker(needs(BED, "the emulated enclave's bed", "make test-enclave"))


@pytest.fixture(scope="session")
def bed(tmp_path_factory):
    """The bed, and the guest compiled; a run's images are made once."""
    return Bed(BED, tmp_path_factory.mktemp("bed"))


@pytest.fixture
def machine_of(bed):
    """Makes machines, by CID; they are ended after the test."""
    machines = []
    with short_folder() as folder:

        def make(cid=16):
            machines.append(Machine(bed, folder, cid))
            return machines[-1]

        yield make
        for machine in machines:
            machine.close()


@pytest.fixture
def real_enclave(machine_of):
    """An emulated enclave with a real kernel and security module; `boot()` starts it."""
    return machine_of()


@pytest.fixture(scope="session")
def judge(bed):
    """A machine that has booted once and takes launch after launch, each as a guest of its own."""
    with short_folder() as folder:
        machine = Machine(bed, folder)
        try:
            machine.boot("guest.judge", nsm=False)
            machine.wait_for("judges")
            yield Judge(machine)
        finally:
            machine.close()


@pytest.fixture(scope="session")
def probe(bed):
    """The program that runs in the enclave, a static one."""
    return bed.probe


@pytest.fixture
def tree(tmp_path, probe):
    """A directory that is to be `/`, with the program in bin/."""
    root = tmp_path / "tree"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "probe").write_bytes(probe)
    (root / "bin" / "probe").chmod(0o755)
    return root


def _state():
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        children = set(file.read().split())
    return descriptors, children


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After each test: no descriptor, thread or child more. A machine that judges goes on."""
    if BED is not None and "judge" in request.fixturenames:
        request.getfixturevalue("judge")
    gc.collect()
    descriptors, children = _state()
    threads = set(threading.enumerate())
    yield
    gc.collect()
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not left, f"threads were left: {left}"
    after, alive = _state()
    leaked = {fd: what for fd, what in after.items() if descriptors.get(fd) != what}
    assert not leaked, f"descriptors were left: {leaked}"
    assert alive <= children, "a child was left"


@pytest.fixture
def typed():
    """The root of the package's errors."""
    return NitroVsockError
