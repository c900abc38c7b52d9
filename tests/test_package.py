"""The package as it is shipped: sdist and wheel build, install and import elsewhere."""

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv
from pyproject_hooks import quiet_subprocess_runner

import nitro_vsock

PROJECT = Path(__file__).resolve().parent.parent
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def run(*command, cwd):
    """Run a command; show what it said when it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel made from that sdist (not from the work tree).

    Both are made in one environment that has what pyproject.toml asks for and nothing else.
    """
    folder = tmp_path_factory.mktemp("dist")
    with DefaultIsolatedEnv() as environment:

        def builder(source):
            return ProjectBuilder.from_isolated_env(
                environment, source, runner=quiet_subprocess_runner
            )

        project = builder(PROJECT)
        environment.install(project.build_system_requires)
        environment.install(project.get_requires_for_build("sdist"))
        (folder / "source").mkdir()
        run("tar", "-xf", project.build("sdist", folder), cwd=folder / "source")
        (source,) = (folder / "source").iterdir()
        environment.install(builder(source).get_requires_for_build("wheel"))
        builder(source).build("wheel", folder)
    return folder


def test_wheel_made_from_the_sdist_is_abi3_and_has_all_it_needs(built):
    """The wheel fits every CPython from 3.10 on and carries py.typed, the core and no sources."""
    (wheel,) = built.glob("*.whl")
    if not FREE_THREADED:
        assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "nitro_vsock/py.typed" in names
    assert "nitro_vsock/cli/__init__.py" in names
    assert [name for name in names if name.startswith("nitro_vsock/_core.") and name[-3:] == ".so"]
    sources = [name for name in names if name.endswith((".c", ".h", ".cdef"))]
    assert sources == ["nitro_vsock/cli/compare/hello.c"]  # the demonstration's program
    assert not [name for name in names if name.startswith(("csrc", "tests", "bench"))]


def test_sdist_has_sources_tests_and_documentation(built):
    """What is needed to build, test and read is in the sdist, and nothing that was built."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = ("csrc/nv_core.h", "csrc/nv_socket.h", "tests/support/peer.py")
    for wanted in (*sources, "LICENSE", "Makefile"):
        assert wanted in names
    assert not [name for name in names if name.endswith((".so", ".o", "_core.c", ".pyc"))]


def test_sdist_installs_and_imports_in_an_environment_of_its_own(built, tmp_path):
    """Its wheel installs, the library imports with cffi alone, and knows its version."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", wheel, cwd=tmp_path)
    code = (
        "import nitro_vsock, sys, importlib.metadata as m;"
        "print(nitro_vsock.__file__, m.version('nitro_vsock'), 'click' in sys.modules)"
    )
    said = run(python, "-W", "error", "-c", code, cwd=tmp_path)
    path, version, clicked = said.split()
    assert Path(path).is_relative_to(tmp_path)
    assert version == "0.1.0"
    assert clicked == "False"
    listed = run(*pip, "list", "--format=freeze", cwd=tmp_path)
    installed = {line.partition("==")[0].lower() for line in listed.split()}
    assert installed == {"nitro_vsock", "cffi", "pycparser"}


def imports(path):
    """Return the full names a Python file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_errno_is_read_by_the_system_call_wrappers_only():
    """Outside nv_sys.h no C code mentions errno, comments and the include aside."""
    for path in PROJECT.glob("csrc/*.[ch]"):
        if path.name != "nv_sys.h":
            code = re.sub(r"/\*.*?\*/|#include <errno.h>", "", path.read_text(), flags=re.DOTALL)
            assert not re.search(r"\berrno\b", code), path


def test_compiled_core_is_imported_in_one_room_only():
    """The room core/ has all importers of the compiled module."""
    importers = {
        path.parent.name
        for path in PROJECT.glob("nitro_vsock/**/*.py")
        if any(name.startswith("nitro_vsock._core") for name in imports(path))
    }
    assert importers == {"core"}


def test_frames_do_no_io():
    """What turns bytes into frames or members, and judges them, imports nothing that does I/O."""
    for room in ("wire", "archive"):
        for path in (PROJECT / "nitro_vsock" / room).glob("*.py"):
            for found in imports(path):
                top = found.split(".")
                assert top[0] not in {"os", "socket", "time", "select", "io"}, path


def test_no_module_hides_a_public_name():
    """A name that is a module's too would be the module, once somebody has imported that."""
    modules = {path.stem for path in Path(nitro_vsock.__file__).parent.iterdir()}
    assert not modules & set(nitro_vsock.__all__)
