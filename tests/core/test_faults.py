"""Every system call of the core fails, is interrupted or does less, at every one of its turns.

The shim of faults.c strikes at the n-th call of each, for n = 1, 2, ... until no call is left.
"""

import hashlib
import re

import driver
import faults
import pytest
from command import PROJECT
from faults import check_clean, plans
from peer import Guest

from nitro_vsock import EnclaveArgsWriter, Rootfs

ROUTES = {
    "sendfile": {"source": "file", "strategy": "sendfile"},
    "mmap": {"source": "file", "strategy": "mmap"},
    "read": {"source": "file", "strategy": "read"},
    "splice": {"source": "pipe", "strategy": "splice"},
    "read-pipe": {"source": "pipe", "strategy": "read"},
    "memory": {"source": "memory", "strategy": "send"},
    "tree": {"source": "tree", "strategy": "sendfile"},
    "vsock": {"source": "file", "strategy": "auto", "vsock_cid": driver.CID},
}
"""Ways through the core; "vsock" is AF_VSOCK as far as the core can see."""

CAP = 1 << 15
"""Bytes of a transfer, so that the archive takes several."""

MINE = {
    "sendfile": {"sendfile"},
    "mmap": {"mmap", "munmap", "fstat"},
    "read": {"pread"},
    "splice": {"splice"},
    "read-pipe": {"read"},
    "memory": set(),
    "tree": {"fstat", "fstatat", "openat", "read", "readlinkat", "sendfile", "syscall"},
    "vsock": {"sendfile"},
}
"""Calls only this route makes, beyond those every launch makes."""

MAY_BLOCK = ("accept4", "ppoll", *faults.TRANSFERS)

ALWAYS = {"socket", "bind", "listen", "accept4", "ppoll", "send", "recv"}


def launches(shim, route, plans, timeout=20.0, **more):
    """Launch over a route until no plan strikes any more."""
    options = {**ROUTES[route], "cap": CAP, "timeout": timeout, **more}
    return driver.run(driver.launches, shim=shim, plans=plans, **options)


def check_success(result):
    """The guest got the right bytes."""
    assert result["error"] is None, result
    assert result["right"], result


def check_typed_or_success(result):
    """Success with the right bytes, or one of our exceptions that says what to do."""
    if result["error"] is None:
        check_success(result)
    else:
        assert result["typed"], result
        assert result["total"] is None or result["bytes_sent"] <= result["total"], result
        assert result["terminate"] or not result["bytes_sent"], result


@pytest.mark.parametrize("route", ROUTES)
def test_nth_call_failing_ends_in_a_typed_error_or_the_right_bytes(shim, route):
    """No call's failure hangs, leaks, corrupts or escapes as something else."""
    results = launches(shim, route, plans("fail", value="EIO"), timeout=0.4)
    assert {result["call"] for result in results} >= ALWAYS | MINE[route]
    for result in results:
        check_clean(result, 0.4)
        check_typed_or_success(result)


@pytest.mark.parametrize("route", ROUTES)
def test_interrupted_calls_are_repeated(shim, route):
    """EINTR at any call, of any system call, changes nothing."""
    results = launches(shim, route, plans("fail", value="EINTR"))
    assert {result["call"] for result in results} >= ALWAYS | MINE[route]
    for result in results:
        check_clean(result, 20)
        check_success(result)


@pytest.mark.parametrize("route", ROUTES)
def test_transfers_of_one_byte_are_continued(shim, route):
    """A count of 1 at any transfer changes nothing."""
    results = launches(shim, route, plans("short", faults.TRANSFERS))
    assert {result["call"] for result in results} >= {"send", "recv"}
    for result in results:
        check_clean(result, 20)
        check_success(result)
        assert result["received"] == result["report"]["bytes_sent"], result


@pytest.mark.parametrize("route", ROUTES)
def test_spurious_eagain_is_waited_out(shim, route):
    """EAGAIN at any call that may block changes nothing.

    Only the answer to the ready byte never blocks: a fresh socket without room is a stranger's.
    """
    for result in launches(shim, route, plans("fail", MAY_BLOCK, "EAGAIN", send={"first": 2})):
        check_clean(result, 20)
        check_success(result)


@pytest.mark.parametrize(
    ("route", "call", "code"),
    [
        *(
            (route, route, code)
            for route in ("sendfile", "splice")
            for code in ("EINVAL", "ENOSYS", "EOPNOTSUPP")
        ),
        *(("mmap", "mmap", code) for code in ("ENODEV", "EACCES", "ENOMEM", "EAGAIN")),
    ],
)
def test_refused_strategy_goes_on_by_reading_at_the_same_offset(shim, route, call, code):
    """At the first call and in the middle of the file; the report says what was used."""
    size = (9 << 20) if route == "mmap" else (1 << 17)  # a mapping's window is 4 MiB
    results = launches(shim, route, plans("fail", [call], code), size=size)
    assert len(results) >= 3
    for result in results:
        check_clean(result, 20)
        check_success(result)
        assert result["report"]["strategy"] == "read", result
        assert result["received"] == result["report"]["bytes_sent"], result


@pytest.mark.parametrize(("route", "call"), [("sendfile", "sendfile"), ("splice", "splice")])
def test_sigpipe_of_a_call_that_moved_bytes_does_not_get_out(shim, route, call):
    """The kernel raises it and returns the count; a tick right behind must not let it loose."""
    results = launches(shim, route, plans("broken", [call]))
    assert len(results) >= 4
    for result in results:
        check_clean(result, 20)
        check_success(result)


@pytest.mark.parametrize("strategy", ["sendfile", "mmap", "read"])
def test_device_without_a_size_is_sent_by_each_strategy(uds, guest_path, strategy):
    """A mapping's check against the size of the file must not ask a device."""
    size = 5 << 20
    with open("/dev/zero", "rb") as device:
        rootfs = Rootfs.from_fd(device.fileno(), offset=0, length=size)
        writer = EnclaveArgsWriter(rootfs, "/bin/app", ["/bin/app"], ["A=1"])
        with writer.listen(driver.CID, uds_path=uds, strategy=strategy) as launch:
            guest = Guest(guest_path)
            launch.send(timeout=20)
    assert guest.result().rootfs_sha256 == hashlib.sha256(bytes(size)).hexdigest()


@pytest.mark.parametrize(
    ("route", "call"), [("sendfile", "eventfd"), ("read", "mmap"), ("read-pipe", "mmap")]
)
def test_calls_python_makes_for_the_launch_fail_typed(shim, route, call):
    """A wake-up descriptor or a staging buffer that cannot be had is one of our exceptions."""
    plan = {"call": call, "action": "fail", "value": "EMFILE", "origin": "python"}
    (result,) = launches(shim, route, [plan])
    check_clean(result, 20)
    assert (result["typed"], result["errno"]) == (True, "EMFILE"), result


def test_socket_file_that_cannot_be_looked_at_fails_typed(shim):
    """The descriptor is closed again; the file stays, since whose it is cannot be told."""
    plan = {"call": "lstat", "action": "fail", "value": "ENOENT", "origin": "python"}
    (result,) = launches(shim, "memory", [plan], nth=1)
    assert (result["error"], result["errno"], result["leaked"]) == ("VsockBindError", "ENOENT", [])


def test_socket_file_that_cannot_be_removed_ends_nothing(shim):
    """As after a change of user: the launch has succeeded, and its descriptor is closed."""
    plan = {"call": "unlink", "action": "fail", "value": "EPERM", "origin": "python"}
    (result,) = launches(shim, "memory", [plan], nth=1)
    check_success(result)
    assert (result["leaked"], len(result["left"])) == ([], 1)


@pytest.mark.parametrize("route", ["sendfile", "splice"])
def test_source_that_cannot_be_looked_at_fails_typed(shim, route):
    """ESTALE from a file server, when it is opened or before Finished, is a SourceReadError."""
    plan = {"call": "fstat", "action": "fail", "value": "ESTALE", "origin": "python"}
    results = launches(shim, route, [plan])
    assert len(results) >= 2
    for result in results:
        check_clean(result, 20)
        assert (result["error"], result["errno"]) == ("SourceReadError", "ESTALE"), result


@pytest.mark.parametrize(
    ("action", "value"), [("fail", "EIO"), ("fail", "EINTR"), ("fail", "EAGAIN"), ("short", 0)]
)
def test_reader_survives_faults_as_the_writer_does(shim, action, value):
    """Harmless ones change nothing; failures are typed."""
    calls = {
        "EIO": ("socket", "connect", "ppoll", "send", "recv"),
        "EINTR": ("ppoll", "send", "recv"),
        "EAGAIN": ("connect", "ppoll", "send", "recv"),
        0: ("send", "recv"),
    }[value]
    results = driver.run(
        driver.reads, shim=shim, plans=plans(action, calls, value), cap=CAP, timeout=5.0
    )
    assert {result["call"] for result in results} >= {"send", "recv"}
    for result in results:
        check_clean(result, 5)
        if value == "EIO":
            assert result["typed"], result
        else:
            check_success(result)


def test_every_system_call_of_the_core_can_be_made_to_fail():
    """A wrapper added to nv_sys.h needs its shim, or a reason why it cannot fail."""
    source = (PROJECT / "csrc" / "nv_sys.h").read_text()
    made = set(re.findall(r"(?:= |\(void\)|return -)(\w+)\(", source)) - {"sizeof"}
    assert made == {*faults.CALLS, *faults.UNFAILING}
