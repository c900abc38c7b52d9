"""A stand-in for the enclave's guest, to test launchers without Nitro hardware.

Owns: the public names. Must not know: anything else.

A name is imported when it is first asked for: pytest loads the plugin beside this in every run.
"""

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nitro_vsock.testing.emulator import GuestEmulator
    from nitro_vsock.testing.enclave import Enclave
    from nitro_vsock.testing.script import GuestReport, Isolation, Misbehaviour, Point

__all__ = ["GuestEmulator", "GuestReport", "Point", "Misbehaviour", "Isolation", "Enclave"]

_MODULES = ("script", "emulator", "enclave")


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"{__name__}.{module}")).get(name)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
