"""What owns what, and for how long: one launch, its descriptors, its path, its callbacks."""

import contextlib
import itertools
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import driver
import pytest
from machine import CID
from peer import Guest, connect
from stages import TOTAL, long_launch, open_descriptors, stuck

from nitro_vsock import (
    BusyError,
    ClosedError,
    EnclaveArgsReader,
    PollNoEventsError,
    Stage,
    UnsupportedError,
    VsockAddress,
    VsockBindError,
)
from nitro_vsock.transport.holder import Holder
from nitro_vsock.transport.wakeup import WakeUp


def test_second_sender_is_refused_and_the_first_goes_on(uds, guest_path):
    """BusyError at once; the guest gets the first one's stream, whole."""
    reports = []
    with long_launch(CID, uds) as launch, stuck(guest_path, "rootfs") as (reached, guest):
        thread = threading.Thread(target=lambda: reports.append(launch.send(timeout=30)))
        thread.start()
        reached()
        for _ in range(3):
            with pytest.raises(BusyError):
                launch.send(timeout=30)
        guest.flow(until=TOTAL)
        thread.join()
        guest.end()
    assert guest.received == reports[0].bytes_sent == TOTAL


def test_launch_is_for_one_guest(writer, uds, guest_path):
    """A second send says so; so does one after a failure."""
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.send(timeout=30)
        guest.result()
        with pytest.raises(ClosedError, match="listen again"):
            launch.send(timeout=30)
    with writer.listen(CID, uds_path=uds) as launch:
        with pytest.raises(PollNoEventsError):
            launch.send(timeout=0)
        with pytest.raises(ClosedError, match="listen again"):
            launch.send(timeout=30)


def test_closed_launch_does_nothing(writer, uds, guest_path):
    """Closing twice and cancelling are harmless, sending is refused, the path is gone."""
    launch = writer.listen(CID, uds_path=uds)
    assert (launch.closed, os.path.exists(guest_path)) == (False, True)
    launch.close()
    launch.close()
    launch.cancel()
    assert (launch.closed, launch.fileno(), os.path.exists(guest_path)) == (True, -1, False)
    with pytest.raises(ClosedError):
        launch.send(timeout=30)


def test_closed_reader_does_nothing(uds):
    """The same for a reader."""
    reader = EnclaveArgsReader(CID, uds_path=uds)
    reader.close()
    reader.close()
    reader.cancel()
    with pytest.raises(ClosedError):
        reader.read_args(timeout=30)


def test_leaving_the_context_closes_whatever_happened(writer, uds, guest_path):
    """An exception of the block passes, and nothing is left."""
    with pytest.raises(ZeroDivisionError), writer.listen(CID, uds_path=uds):
        raise ZeroDivisionError
    assert not os.path.exists(guest_path)


def test_forgotten_launch_warns_and_closes(writer, uds, guest_path):
    """As files and sockets do."""
    launch = writer.listen(CID, uds_path=uds)
    before = len(open_descriptors())
    holder = [launch]
    del launch
    with pytest.warns(ResourceWarning, match="unclosed <Launch for CID 16"):
        holder.clear()
    assert not os.path.exists(guest_path)
    assert len(open_descriptors()) == before - 3  # listening socket, wake-up, rootfs


def test_forgotten_reader_warns_and_closes(uds):
    """The same for a reader."""
    reader = EnclaveArgsReader(CID, uds_path=uds)
    holder = [reader]
    del reader
    with pytest.warns(ResourceWarning, match="unclosed <EnclaveArgsReader"):
        holder.clear()


@pytest.mark.parametrize("does", ["exit", "close", "cancel", "collect"])
@pytest.mark.parametrize("while_sending", [False, True])
def test_forked_child_takes_nothing_from_its_parent(does, while_sending):
    """The child ends or closes its copy: path, guest and stream are still the parent's."""
    result = driver.run(driver.forks, does=does, while_sending=while_sending)
    assert result["statuses"]
    assert not any(result["statuses"])
    assert result["there"]
    assert result["right"]
    assert (result["leaked"], result["left"]) == ([], [])


def test_program_that_is_executed_inherits_nothing(uds, guest_path):
    """Listening, accepted and wake-up descriptors are close-on-exec, rootfs and staging too."""

    def descriptors():
        code = "import os; [print(os.readlink(f'/proc/self/fd/{n}')) for n in range(3, 1024)"
        code += " if os.path.lexists(f'/proc/self/fd/{n}')]"
        done = subprocess.run(
            [sys.executable, "-c", code],
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
        return sorted(done.stdout.split())

    before = descriptors()
    with long_launch(CID, uds) as launch, stuck(guest_path, "rootfs") as (reached, guest):
        listening = descriptors()
        thread = threading.Thread(target=launch.send, args=(30,))
        thread.start()
        reached()
        sending = descriptors()
        guest.flow(until=TOTAL)
        thread.join()
    assert listening == before
    assert sending == before


def test_two_hundred_launches_on_one_path(writer, uds, guest_path):
    """Bind, listen and close leave nothing that disturbs the next."""
    before = open_descriptors()
    for _ in range(200):
        with writer.listen(CID, uds_path=uds) as launch:
            assert launch.fileno() >= 0
        assert not os.path.exists(guest_path)
    assert open_descriptors() == before


def test_path_in_use_is_refused_with_a_hint(writer, archive, uds, guest_path):
    """The one that listens there is not disturbed."""
    with writer.listen(CID, uds_path=uds) as launch:
        hint = rf"in use.*{re.escape(guest_path)}.*CID 16.*a process listens"
        with pytest.raises(VsockBindError, match=hint) as caught:
            writer.listen(CID, uds_path=uds)
        assert caught.value.stage is Stage.BIND
        guest = Guest(guest_path)
        launch.send(timeout=30)
    assert guest.result().rootfs_sha256 == archive.sha256


def test_socket_file_of_a_killed_process_is_replaced(writer, archive, uds, guest_path):
    """Nobody listens there, so nobody loses anything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(guest_path)
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.send(timeout=30)
    assert guest.result().rootfs_sha256 == archive.sha256


def test_file_that_is_no_socket_is_never_replaced(writer, uds, guest_path):
    """It is somebody's."""
    Path(guest_path).write_text("mine")
    with pytest.raises(VsockBindError, match="in use"):
        writer.listen(CID, uds_path=uds)
    assert Path(guest_path).read_text() == "mine"


def test_busy_listener_is_never_replaced(writer, uds, guest_path):
    """A full backlog is no refusal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy, contextlib.ExitStack() as stack:
        busy.bind(guest_path)
        busy.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.setblocking(False)
            client.connect_ex(guest_path)
        with pytest.raises(VsockBindError, match="in use"):
            writer.listen(CID, uds_path=uds)
        assert os.path.exists(guest_path)


@pytest.mark.parametrize("kind", ["file", "socket"])
def test_path_that_is_somebody_elses_by_now_is_left(writer, uds, guest_path, kind):
    """Closing removes the socket file that was made, and no other."""
    with writer.listen(CID, uds_path=uds), contextlib.ExitStack() as stack:
        os.rename(guest_path, guest_path + "-old")
        if kind == "file":
            Path(guest_path).write_text("mine")
        else:
            other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            other.bind(guest_path)
    assert os.path.exists(guest_path)


def test_path_that_is_gone_already_is_no_error(writer, uds, guest_path):
    """Somebody cleaned up before us."""
    with writer.listen(CID, uds_path=uds):
        os.unlink(guest_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_exception_of_the_progress_callback_ends_the_launch(uds, guest_path, error):
    """It comes through as it is, and nothing is left."""

    def progress(_):
        raise error

    with long_launch(CID, uds) as launch, stuck(guest_path, "rootfs") as (_, guest):
        with pytest.raises(error):
            launch.send(timeout=30, progress=progress)
        guest.end()
    assert guest.received < TOTAL


def test_progress_comes_at_a_bounded_rate_and_ends_at_the_end(uds, guest_path):
    """At most ten a second, never backwards, and the last one says 100 %."""
    pause = threading.Event()
    reports = []
    with long_launch(CID, uds, rootfs_bytes=24 << 20) as launch:
        guest = Guest(guest_path, before_read=lambda got: got > 1 << 20 and pause.wait(0.01))
        moments = []

        def progress(report):
            moments.append(time.monotonic())
            reports.append(report)

        report = launch.send(timeout=60, progress=progress)
    guest.result()
    assert len(reports) >= 3
    assert all(b - a >= 0.09 for a, b in itertools.pairwise(moments[:-1]))
    done = [moment.bytes_done for moment in reports]
    assert done == sorted(done)
    assert {moment.bytes_total for moment in reports} == {report.bytes_sent}
    last = reports[-1]
    assert (last.bytes_done, last.stage) == (report.bytes_sent, "close")
    assert (last.seconds_left, last.average_rate > 0) == (0, True)


def test_progress_of_a_short_launch_is_its_end(writer, uds, guest_path):
    """A launch that is over before the first report is due still reports once."""
    reports = []
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        report = launch.send(timeout=30, progress=reports.append)
    guest.result()
    assert reports[-1].bytes_done == reports[-1].bytes_total == report.bytes_sent


def test_guests_end_need_not_be_waited_for(writer, archive, uds, guest_path):
    """wait_closed=False returns while the guest holds on; it still gets everything."""
    with writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path, hold_open=True)
        report = launch.send(timeout=30, wait_closed=False)
    assert not report.peer_closed
    assert guest.result().rootfs_sha256 == archive.sha256


def test_launch_says_nothing_unless_asked():
    """No output, no root handler, and the package's own loggers."""
    result = driver.run(driver.quiet)
    assert result == {
        "outcomes": [True, "PollNoEventsError"],
        "loggers": ["nitro_vsock", "nitro_vsock.output"],
        "handlers": 0,
    }


def test_logger_tells_a_launch_and_no_argument(writer, uds, guest_path, caplog):
    """At DEBUG: where, who, how it ended; never what argv and envp hold."""
    with caplog.at_level(logging.DEBUG, "nitro_vsock"), writer.listen(CID, uds_path=uds) as launch:
        guest = Guest(guest_path)
        launch.send(timeout=30)
    guest.result()
    assert {record.name for record in caplog.records} == {"nitro_vsock"}
    assert re.search(f"listening at unix:{guest_path} for CID 16", caplog.text)
    assert re.search(r"pid \d+ uid \d+ connected", caplog.text)
    assert "done: LaunchReport(" in caplog.text
    assert "a b" not in caplog.text
    assert "PATH=" not in caplog.text


@pytest.mark.parametrize("what", ["send", "receive"])
def test_error_that_is_kept_can_be_collected(what):
    """CPython crashes on a buffer that is still lent out in a cycle; ours are given back."""
    result = driver.run(driver.collected, what=what)
    assert result["collected"]
    assert result["error"] == {"send": "PeerClosedError", "receive": "StreamTimeoutError"}[what]


def has_vsock():
    """Whether this kernel has AF_VSOCK sockets."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def test_launch_listens_on_af_vsock(writer):
    """It binds the arguments port and waits to the deadline; without AF_VSOCK it says so."""
    cid = 20_000 + secrets.randbelow(1 << 20)
    if not has_vsock():
        with pytest.raises(UnsupportedError) as caught:
            writer.listen(cid)
        assert caught.value.stage == "bind"
        return
    with writer.listen(cid) as launch:
        assert launch.address == VsockAddress(0xFFFFFFFF, cid + 1)
        with pytest.raises(PollNoEventsError):
            launch.send(timeout=0.1)
        with pytest.raises(VsockBindError, match="CID") as caught:
            writer.listen(cid)
        assert caught.value.stage == "bind"
    with writer.listen(cid):
        pass


def test_guest_that_waits_when_the_launch_closes_is_let_go(writer, uds, guest_path):
    """It sees its connection end, and does not wait for a byte that nobody will send."""
    with writer.listen(CID, uds_path=uds):
        guest = connect(guest_path)
    with guest, contextlib.suppress(ConnectionResetError):
        assert guest.recv(1) == b""


class Held(Holder):
    """Something that is held until it is closed."""

    def __init__(self, wake_up):
        super().__init__(wake_up)
        self.held = True

    def _release(self):
        self.held = False

    def use(self):
        """Use it."""
        with self._in_use():
            return len("used")


def interrupted(act, after):
    """Do it, and press Ctrl-C after so many calls; return whether there were so many.

    The interpreter looks for signals where a call begins and where one of C returns.
    """
    left = iter(range(after))

    def tell(_frame, event, _arg):
        if event in ("call", "c_return") and next(left, None) is None:
            raise KeyboardInterrupt

    sys.setprofile(tell)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("name", ["use", "close", "close_quietly"])
def test_ctrl_c_at_any_moment_leaves_what_can_still_be_closed(name):
    """Wherever it comes, in use or in closing: the next close lets go."""
    with contextlib.closing(WakeUp()) as wake_up:
        for after in itertools.count():
            held = Held(wake_up)
            struck = interrupted(getattr(held, name), after)
            held.close()
            assert not held.held, after
            if not struck:
                break
    assert after > 3
