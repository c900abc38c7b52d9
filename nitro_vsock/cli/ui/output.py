"""Owns: how results, notes, progress and failures look, on a terminal, in a log and as JSON.

Must not know: what the commands do. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import click

from nitro_vsock.check import Finding
from nitro_vsock.cli.ui import failures
from nitro_vsock.launch import EnclaveArgs
from nitro_vsock.progress import Progress

LINE_INTERVAL: Final = 1.0
"""Seconds between two lines of progress where there is no terminal."""

TABLE_COLUMNS: Final = 60
"""A terminal that has fewer gets lines in place of a table."""

Show = Callable[[Progress], None]


@dataclass
class Settings:
    """What the global options say.

    Attributes:
        json: print one JSON object, also for an error.
        debug: show tracebacks and the library's log.
    """

    json: bool = False
    debug: bool = False


def print_result(settings: Settings, data: dict[str, Any], lines: Iterable[str]) -> None:
    """Print a command's one result: for machines, or for people."""
    click.echo(json.dumps(data) if settings.json else "\n".join(lines))


def print_failure(settings: Settings, error: BaseException) -> None:
    """Print what went wrong: a line on stderr, and the JSON object where that is wanted."""
    if settings.debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    print_note(f"error: {failures.message(error)}")
    if settings.json:
        with suppress(OSError):  # the line above says what matters more
            click.echo(json.dumps(failures.as_object(error)))


def print_note(text: str) -> None:
    """Print a line beside the result."""
    click.echo(f"nitro-vsock: {text}", err=True)


def format_bytes(count: float) -> str:
    """Return a count of bytes for people, in powers of 1024."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def describe_args(args: EnclaveArgs) -> list[str]:
    """Return lines on what a guest was given. Strings are quoted: the host chose them."""
    flags = [name for name in ("network_proxy", "app_output") if getattr(args, name)]
    return [
        f"exec_path    {args.exec_path!r}",
        f"argv         {' '.join(map(repr, args.argv))}",
        f"envp         {' '.join(map(repr, args.envp))}",
        f"flags        {' '.join(flags) or 'none'}",
        f"rootfs       {args.rootfs_length:,} bytes",
        f"sha256       {args.rootfs_sha256}",
    ]


def print_findings(settings: Settings, findings: Sequence[Finding], data: dict[str, Any]) -> None:
    """Print what a check has found: as JSON, as a table on a terminal, else a line for each."""
    total = f"{_count(data['errors'], 'error')}, {_count(data['warnings'], 'warning')}"
    columns = shutil.get_terminal_size().columns
    if settings.json or not sys.stdout.isatty() or not findings or columns < TABLE_COLUMNS:
        lines = [
            f"{found.severity}: {found.code}: {_visible(found.subject)}: {_visible(found.reason)}; "
            f"{found.remedy}"
            for found in findings
        ]
        print_result(settings, data, [*lines, total])
        return
    # Here, because a log file needs none of it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=total)
    for heading in ("finding", "where", "why, and what to do"):
        table.add_column(heading, overflow="fold")  # nothing of a name is left out
    for found in findings:
        what = Text(str(found.severity), "red" if found.severity == "error" else "yellow")
        why = f"{_visible(found.reason)}\n{found.remedy}"
        table.add_row(what.append(f"\n{found.code}"), *map(Text, (_visible(found.subject), why)))
    Console().print(table)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _visible(text: str) -> str:
    """Return text without what a terminal would act on: an archive's names may be anything."""
    return text if text.isprintable() else repr(text)


def describe_progress(progress: Progress) -> str:
    """Return how far it is, how fast it goes and how long it will take."""
    parts = [format_bytes(progress.bytes_done)]
    done = progress.bytes_done == progress.bytes_total
    if progress.bytes_total:
        parts[0] += f" of {format_bytes(progress.bytes_total)}"
        parts.append(f"{100 * progress.bytes_done // progress.bytes_total} %")
    # At the end the rate since the report before says nothing: it may be microseconds old.
    parts.append(f"{format_bytes(progress.average_rate if done else progress.rate)}/s")
    if not done and progress.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(progress.seconds_left))} left")
    return ", ".join(parts)


def show_progress(waiting_for: str) -> AbstractContextManager[Show]:
    """Show a stream's progress: a bar on a terminal, about a line a second elsewhere.

    Args:
        waiting_for: what to say until the stream begins.

    Returns:
        A context manager that gives the progress callback.
    """
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _bar(waiting_for)
    return _lines()


@contextmanager
def _lines() -> Iterator[Show]:
    latest: Progress | None = None
    shown: Progress | None = None
    shown_at = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal latest, shown, shown_at
        latest = progress
        if time.monotonic() - shown_at >= LINE_INTERVAL:
            shown, shown_at = progress, time.monotonic()
            print_note(describe_progress(progress))

    yield show
    if latest is not None and (shown is None or shown.bytes_done != latest.bytes_done):
        print_note(describe_progress(latest))


@contextmanager
def _bar(waiting_for: str) -> Iterator[Show]:
    # Here, because a log file needs none of it.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    with Bars(
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        # The callback comes ten times a second, also while nothing moves: no thread is needed.
        auto_refresh=False,
        redirect_stdout=False,
    ) as bars:
        task = bars.add_task(waiting_for, total=None)
        bars.refresh()

        def show(progress: Progress) -> None:
            bars.update(
                task,
                completed=progress.bytes_done,
                total=progress.bytes_total,
                description=describe_progress(progress),
                refresh=True,
            )

        yield show
