"""What preflight says of an archive is what a real guest does with it."""

import io
import tarfile

import pytest
from enclave.odd_archives import kinds
from enclave.trees import Tar, launch, writer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitro_vsock import NitroVsockError, Rootfs, Severity

DISAGREEMENTS = {
    "name of 256": "a part of a name over 255 bytes: the guest's kernel makes no such file",
    "link of 4,096": "a symbolic link of 4,096 bytes or more: the guest's kernel makes none",
    "hard link to itself": "libarchive 3.6 stops at it",
    "full directory, then file": "libarchive does not replace a directory that has something in it",
    "full directory, then link": "libarchive does not replace a directory that has something in it",
    "GNU dump directory": "type D with data: libarchive makes a directory and cannot write into it",
    "ACL entry": "type A is a Solaris ACL, which libarchive reads and refuses",
    "PAX header twice": "libarchive 3.6 takes the second in a row for malformed",
    "long name of 0 bytes": "an L header without data leaves the next member without a name",
    "dev through a link": "a directory is made through a symbolic link, at a forbidden place",
    "through a link to a file": "preflight refuses it, libarchive replaces the link",
}
"""Archive: why the guest does otherwise than preflight says. Each is a fault of preflight's."""

CAUTIOUS = {"no-prefix"}
"""Refused on purpose, though the guest boots: such members land outside the program's root."""


def refused(writer):
    """Return the codes of the errors that preflight finds."""
    return [finding.code for finding in writer.preflight() if finding.severity is Severity.ERROR]


def held_against(judge, data):
    """Return what preflight says, and what the guest does."""
    writer = writer_of(Rootfs.from_bytes(data))
    return refused(writer), judge.try_out(writer)


NAMES = list(kinds(b""))


@pytest.fixture(scope="session")
def all_kinds(probe):
    """The archives by name."""
    return kinds(probe)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(strict=True, reason=DISAGREEMENTS[name])]
            if name in DISAGREEMENTS
            else [],
        )
        for name in NAMES
    ],
)
def test_guest_does_as_preflight_says(judge, all_kinds, name):
    """It stops where an error was found, and runs the program where none was."""
    errors, outcome = held_against(judge, all_kinds[name])
    if set(errors) != CAUTIOUS:
        assert bool(errors) != outcome.ran, (errors, outcome.verdict)
    if not outcome.ran:
        assert isinstance(outcome.error, NitroVsockError)


def test_there_are_enough_of_both(judge, all_kinds):
    """At least 40 kinds that are refused, and 40 odd ones that boot."""
    found = [bool(refused(writer_of(Rootfs.from_bytes(data)))) for data in all_kinds.values()]
    assert min(found.count(True), found.count(False)) >= 40


@pytest.mark.parametrize("name", ["PAX, UTF-8 name", "a directory dev", "cut in data"])
def test_refused_archive_stops_a_whole_enclave(real_enclave, all_kinds, name):
    """What the guest that judges says holds for one that is process 1, with a security module."""
    writer = writer_of(Rootfs.from_bytes(all_kinds[name]))
    assert refused(writer)
    with pytest.raises(NitroVsockError):
        launch(real_enclave, writer, preflight=False)
    real_enclave.wait()
    assert "GUEST stops:" in real_enclave.console.text


NAME = st.sampled_from(["a", "b", "d/a", "d", "d/e/f", "l/x", "é", "dev", "bin", "n" * 120, "./a"])
TARGET = st.sampled_from(["a", "d", "..", "/d", "bin/probe", "nowhere", "d/e"])
MEMBER = st.tuples(st.sampled_from(["file", "dir", "link", "hard", "fifo"]), NAME, TARGET)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(members=st.lists(MEMBER, max_size=6), form=st.sampled_from([0, 1, 2]))
def test_generated_archives(judge, probe, members, form):
    """Members of all kinds on each other's places: the guest does as preflight says."""
    tar = Tar(probe, form)
    for kind, name, target in members:
        if kind == "file":
            tar.add(name, b"x" * 600)
        elif kind == "dir":
            tar.folder(name)
        elif kind == "link":
            tar.link(name, target)
        elif kind == "hard":
            tar.hard(name, target)
        else:
            tar.add(name, type=tarfile.FIFOTYPE)
    errors, outcome = held_against(judge, tar.bytes())
    assert bool(errors) != outcome.ran, (errors, outcome.verdict)


def test_archive_from_tar_boots_whatever_was_in_it(judge, probe, tmp_path):
    """`Rootfs.from_tar` leaves out and renames until the guest takes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {"bin/probe": probe, "dev/null": b"", "tmp/x": b"x", "é": b"y"}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            tar.addfile(member, io.BytesIO(data))
    path = tmp_path / "foreign.tar"
    path.write_bytes(buffer.getvalue())
    outcome = judge.try_out(writer_of(Rootfs.from_tar(path)))
    assert outcome.ran, outcome.verdict
