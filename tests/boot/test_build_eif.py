"""Images that are built: the bytes of AWS's tool, the same every time, nothing half-made."""

import json
import os

import pytest
from eif_images import VECTORS

from nitro_vsock import Eif, EifError, EifReadError, InvalidArgumentError, build_eif, measure_image

METADATA = (VECTORS / "metadata.json").read_bytes()


@pytest.fixture
def inputs(tmp_path):
    """The inputs of the vectors: a kernel, three ramdisks."""
    contents = (bytes(range(256)), b"first ramdisk\n" * 9, b"second\n" * 7, b"third\n")
    paths = [tmp_path / name for name in ("kernel", "ramdisk0", "ramdisk1", "ramdisk2")]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_image_has_the_bytes_that_aws_s_tool_writes(inputs, tmp_path):
    """From the same inputs; and its registers are what is returned."""
    out = tmp_path / "out.eif"
    kernel, *ramdisks = inputs
    found = build_eif(out, kernel, "console=ttyS0 reboot=k", ramdisks, metadata=METADATA)
    assert out.read_bytes() == (VECTORS / "unsigned.eif").read_bytes()
    assert found == measure_image(out)


def test_same_inputs_give_the_same_bytes(inputs, tmp_path):
    """Whatever their names, times and folder, and wherever the image goes."""
    kernel, *ramdisks = inputs
    first, pieces = tmp_path / "first.eif", []
    build_eif(first, kernel, "a", ramdisks)
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(inputs):
        (moved / str(number)).write_bytes(path.read_bytes())
        os.utime(moved / str(number), (number, number))
    again = [moved / str(number) for number in range(len(inputs))]
    build_eif(lambda piece: pieces.append(bytes(piece)), again[0], b"a", again[1:])
    assert b"".join(pieces) == first.read_bytes()


def test_what_the_image_asks_for_is_in_its_header(inputs, tmp_path):
    """Architecture, memory and CPUs; none of them is measured."""
    kernel, *ramdisks = inputs
    plain = build_eif(tmp_path / "plain.eif", kernel, "a", ramdisks)
    wanted = {"architecture": "aarch64", "default_memory": 5 << 30, "default_cpus": 4}
    assert build_eif(tmp_path / "other.eif", kernel, "a", ramdisks, **wanted) == plain
    with Eif.open(tmp_path / "other.eif") as image:
        assert {name: getattr(image, name) for name in wanted} == wanted
        assert image.metadata()["BuildMetadata"]["BuildTool"] == "nitro_vsock"
        assert image.warnings == ()


def lacking(*path):
    """Return the metadata without one key."""
    data = json.loads(METADATA)
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"architecture": "riscv"}, "architecture"),
        ({"default_memory": -1}, "default_memory"),
        ({"default_memory": 1 << 64}, "default_memory"),
        ({"default_cpus": True}, "default_cpus"),
        ({"cmdline": "a\0b"}, "cmdline"),
        ({"cmdline": 3}, "cmdline"),
        ({"ramdisks": []}, "ramdisks"),
        ({"ramdisks": ["x"] * 29}, "ramdisks"),
        ({"ramdisks": "path"}, "ramdisks"),
        ({"ramdisks": ["/dev/null"]}, "ramdisk"),
        ({"kernel": "/"}, "kernel"),
        ({"kernel": None}, "kernel"),
        ({"metadata": "{}"}, "metadata"),
        ({"metadata": b" " * (1 << 20) + b"{}"}, "metadata"),
        ({"metadata": lacking("DockerInfo")}, "metadata"),
        ({"metadata": lacking("BuildMetadata", "KernelVersion")}, "metadata"),
    ],
)
def test_argument_that_cannot_be_used_is_named(inputs, tmp_path, options, field):
    """Before anything is written."""
    kernel, *ramdisks = inputs
    arguments = {"kernel": kernel, "cmdline": "a", "ramdisks": ramdisks, **options}
    with pytest.raises(InvalidArgumentError) as caught:
        build_eif(tmp_path / "out.eif", **arguments)
    assert caught.value.field == field
    assert not (tmp_path / "out.eif").exists()


@pytest.mark.parametrize("metadata", [b"", b"[]", b"{", b"\xff"])
def test_metadata_that_is_no_json_object_is_refused(inputs, tmp_path, metadata):
    """It would stop AWS's tools."""
    kernel, *ramdisks = inputs
    with pytest.raises(EifError, match="JSON"):
        build_eif(tmp_path / "out.eif", kernel, "a", ramdisks, metadata=metadata)


def test_missing_input_is_named(inputs, tmp_path):
    """With errno; no output appears."""
    kernel, *ramdisks = inputs
    with pytest.raises(EifReadError, match=r"ramdisk .*gone cannot be opened") as caught:
        build_eif(tmp_path / "out.eif", kernel, "a", [*ramdisks, tmp_path / "gone"])
    assert (caught.value.errno, caught.value.field) == (2, "ramdisk")
    assert not (tmp_path / "out.eif").exists()


@pytest.mark.parametrize("size", [256, 255, 257])
def test_input_that_changes_meanwhile_leaves_no_image(inputs, tmp_path, size):
    """Rewritten between its two readings; what was there before stays."""
    kernel, *ramdisks = inputs
    out = tmp_path / "out.eif"
    out.write_bytes(b"before")
    pieces = []

    def change(piece):
        if not pieces:
            kernel.write_bytes(b"x" * size)
        pieces.append(bytes(piece))

    with pytest.raises(EifError, match=r"kernel .* (changed|became shorter)"):
        build_eif(change, kernel, "a", ramdisks)

    class Output:
        """A path that is asked for once the first reading is over."""

        def __fspath__(self):
            ramdisks[-1].write_bytes(b"y" * size)
            return str(out)

    with pytest.raises(EifError, match=r"ramdisk .* (changed|became shorter)"):
        build_eif(Output(), kernel, "a", ramdisks)
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_image_may_replace_one_of_its_inputs(inputs):
    """It is complete before it gets its name."""
    kernel, *ramdisks = inputs
    found = build_eif(kernel, kernel, "a", ramdisks)
    assert measure_image(kernel) == found
