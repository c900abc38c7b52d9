"""Owns: the cffi API-mode builder of nitro_vsock._core; setup.py names it.

Knows nothing of: the package it is built for, beyond the module's name.
"""

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wstrict-prototypes"]
# What cffi generates is not ours to mend; `make lint` checks our own files with every warning.
GENERATED = ["-Wno-conversion", "-Wno-unused-parameter", "-Wno-cast-function-type"]

SYSTEM_TYPES = """
typedef int... nfds_t;
struct pollfd { int fd; short events; short revents; ...; };
"""


def declarations() -> str:
    """Return what cffi is to know: the headers that nv_core.h includes, as cffi reads C.

    The values of macros are the compiler's, but for plain numbers, which may be array lengths.
    """
    core = (HERE / "nv_core.h").read_text()
    parts = [(HERE / name).read_text() for name in re.findall(r'#include "(.+)"', core)]
    text = re.sub(r"/\*.*?\*/", "", "\n".join(parts), flags=re.DOTALL)
    text = re.sub(r"^# *(include|ifndef|endif|define \w+$).*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^(#define \w+) (?!\d+ *$).*", r"\1 ...", text, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(SYSTEM_TYPES + declarations())
ffibuilder.set_source(
    "nitro_vsock._core",
    '#include "nv_core.h"',
    sources=[f"csrc/{path.name}" for path in sorted(HERE.glob("nv_*.c"))],
    depends=[f"csrc/{path.name}" for path in sorted(HERE.glob("nv_*.h"))],
    include_dirs=["csrc"],
    define_macros=[("_GNU_SOURCE", "1")],
    extra_compile_args=[
        "-std=c11",
        "-O2",
        *WARNINGS,
        *GENERATED,
        *(["-Werror"] if os.environ.get("NITRO_VSOCK_WERROR") else []),
    ],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
