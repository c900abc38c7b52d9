"""Owns: the group of commands, and the one place where a failure ends the process.

Must not know: how anything is done or shown.
"""

from __future__ import annotations

import logging
import signal
from itertools import takewhile
from typing import Final, NoReturn

import click

from nitro_vsock.cli.bench import bench
from nitro_vsock.cli.check import check
from nitro_vsock.cli.demo import demo
from nitro_vsock.cli.doctor import doctor
from nitro_vsock.cli.eif import eif
from nitro_vsock.cli.guest import guest
from nitro_vsock.cli.host import host
from nitro_vsock.cli.measure import measure
from nitro_vsock.cli.pack import pack
from nitro_vsock.cli.receive import receive
from nitro_vsock.cli.send import send
from nitro_vsock.cli.ui import failures, output
from nitro_vsock.cli.ui.failures import ExitCode, TerminatedError
from nitro_vsock.cli.ui.options import EPILOG, global_options
from nitro_vsock.cli.ui.output import Settings

PROGRAM: Final = "nitro-vsock"


@click.group(
    epilog=EPILOG,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="nitro_vsock", prog_name=PROGRAM)
@global_options
def cli() -> None:
    """Hand a booting Nitro enclave its root file system, program and environment over vsock."""


for _command in (send, receive, pack, demo, bench, doctor, check, measure, eif, host, guest):
    cli.add_command(_command)


def run(args: list[str]) -> int:
    """Run the command line with these arguments; return the exit code."""
    settings = Settings()
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(format=f"{PROGRAM}: %(levelname)s: %(message)s")
    try:
        # Not cli.main(): that takes every OSError with EPIPE, a PeerClosedError too, for a closed
        # stdout and exits with 1 at once.
        with cli.make_context(PROGRAM, args, obj=settings) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        # The mistake may stand before --json, so that click never came to it.
        settings.json = settings.json or "--json" in takewhile(lambda arg: arg != "--", args)
        return _fail(settings, error)
    except BaseException as error:
        return _fail(settings, error)
    else:
        return ExitCode.OK


def _fail(settings: Settings, error: BaseException) -> int:
    # A second signal ends the process, and is no error on top of this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output.print_failure(settings, error)
    return failures.exit_code(error)


def _terminate(*_: object) -> NoReturn:
    raise TerminatedError
