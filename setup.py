"""Owns: what pyproject.toml cannot say: the C extension, and the wheel's ABI tag."""

import sysconfig

from setuptools import setup

# Free-threaded interpreters have no stable ABI before abi3t; cffi leaves the limited API there too.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["csrc/build_core.py:ffibuilder"],
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
