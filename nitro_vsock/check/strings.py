"""Owns: what the guest needs of the strings of a launch.

Must not know: archives.
"""

from __future__ import annotations

from collections.abc import Iterator

from nitro_vsock.archive import Flaw
from nitro_vsock.errors import GuestRuleError
from nitro_vsock.protocol import MAX_STRING_BYTES
from nitro_vsock.wire import ExecArgv, ExecEnvp, ExecPath


def string_flaws(path: ExecPath, argv: ExecArgv, envp: ExecEnvp) -> Iterator[tuple[str, Flaw]]:
    """Yield each string the guest cannot take, by the field's name, and what is wrong with it."""
    named = [("exec_path", path.path)]
    named += [(f"argv[{index}]", string) for index, string in enumerate(argv.strings)]
    named += [(f"envp[{index}]", string) for index, string in enumerate(envp.strings)]
    for name, string in named:
        if not 0 < len(string) <= MAX_STRING_BYTES:
            code = "string-too-long" if string else "string-empty"
            text = f"{name} is {len(string)} bytes, must be 1 to {MAX_STRING_BYTES}"
            yield name, Flaw(code, text)
    if b"/" not in argv.strings[0] and not envp.strings[0].startswith(b"PATH="):
        text = "argv[0] has no slash, and envp[0] is not PATH=: it is not found"
        yield "envp", Flaw("path-not-first", text)


def check_strings(path: ExecPath, argv: ExecArgv, envp: ExecEnvp) -> None:
    """Check the strings together.

    Raises:
        GuestRuleError: an empty string, one the NSM does not take, or a PATH that is not envp[0]
            while argv[0] has no slash.
    """
    for _, flaw in string_flaws(path, argv, envp):
        raise GuestRuleError(flaw.text)
