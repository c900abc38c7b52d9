"""Owns: the cffi API-mode builder of nitro_vsock._core; setup.py names it.

Must not know: the package it is built for beyond the module's name.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wstrict-prototypes"]
# What cffi generates is not ours to mend; `make lint` checks our own files with every warning.
GENERATED = ["-Wno-conversion", "-Wno-unused-parameter", "-Wno-cast-function-type"]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "nv_core.cdef").read_text())
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
