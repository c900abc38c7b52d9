"""`eif info`, `eif verify`, `eif build` and `measure --eif`, run as a user runs them."""

import json
import os
import pty
import subprocess

import pytest
from command import COMMAND, ENVIRONMENT, assert_failed, run
from eif_images import METADATA, ORDINARY, VECTORS, pack, pack_signed, pcr0_of, sign

from nitro_vsock import measure_image

ROLE = "arn:aws:iam::123456789012:role/enclave"
INSTANCE = "i-0123456789abcdef0"
SIGNED = str(VECTORS / "signed.eif")
EXPECTED = json.loads((VECTORS / "expected.json").read_text())


@pytest.fixture
def image(tmp_path):
    """Writes an image's bytes to a file; gives its path."""

    def write(data):
        path = tmp_path / "image.eif"
        path.write_bytes(data)
        return str(path)

    return write


@pytest.fixture
def launch(archive):
    """The options of an ordinary launch."""
    return ["--rootfs", str(archive.path), "--env", "A=1", "--", "/bin/app"]


@pytest.mark.parametrize("name", EXPECTED)
def test_info_shows_what_an_image_holds(name):
    """For people and for machines, the same registers."""
    done = run("eif", "info", str(VECTORS / name))
    assert done.returncode == 0, done.stderr
    shown = json.loads(run("--json", "eif", "info", str(VECTORS / name)).stdout)
    registers = EXPECTED[name]["registers"]
    assert shown["measurements"] == registers
    assert shown["checksum"] == EXPECTED[name]["checksum"]
    assert shown["cmdline"] == "console=ttyS0 reboot=k"
    assert shown["metadata"]["ImageName"] == "test"
    assert [section["type"] for section in shown["sections"]][:2] == ["kernel", "cmdline"]
    lines = done.stdout.splitlines()
    for number, value in registers.items():
        assert f"{number.upper():<12} {value}" in lines


def test_verify_says_who_signed():
    """And that an unsigned image is not signed."""
    done = run("eif", "verify", SIGNED)
    assert done.returncode == 0, done.stderr
    assert "signed       right, by 'CN=nitro_vsock test P-384'" in done.stdout
    shown = json.loads(run("eif", "verify", SIGNED, "--json").stdout)
    assert shown["ok"]
    assert shown["certificate"]["not_after"] == "2120-01-01T00:00:00+00:00"
    done = run("eif", "verify", str(VECTORS / "unsigned.eif"))
    assert done.returncode == 0
    assert "signed       no" in done.stdout


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (pack(crc=1), "EifError"),
        (pack()[:600], "EifError"),
        (pack_signed(sign(pcr0_of(), signature=bytes(96))), "EifError"),
        (None, "EifReadError"),
    ],
)
def test_bad_image_fails_with_the_source_s_code(image, tmp_path, data, kind):
    """Malformed, damaged, wrongly signed, missing."""
    path = str(tmp_path / "gone.eif") if data is None else image(data)
    assert_failed(run("--json", "eif", "verify", path), 6, kind, "validate")


def test_text_from_an_image_cannot_act_on_the_terminal(image):
    """Control characters of command line and metadata are escaped."""
    about = json.dumps({"ImageName": "\x1b[2J"}).encode()
    done = run("eif", "info", image(pack((ORDINARY[0], (2, b"\x1b[2J\n"), (METADATA, about)))))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


def build_args(folder):
    """Write the vectors' inputs; return the options that build `unsigned.eif` of them."""
    contents = (bytes(range(256)), b"first ramdisk\n" * 9, b"second\n" * 7, b"third\n")
    names = [str(folder / name) for name in ("kernel", "disk0", "disk1", "disk2")]
    for name, content in zip(names, contents, strict=True):
        with open(name, "wb") as file:
            file.write(content)
    disks = [part for name in names[1:] for part in ("--ramdisk", name)]
    line = ["--cmdline", "console=ttyS0 reboot=k", "--metadata", str(VECTORS / "metadata.json")]
    return ["eif", "build", "--kernel", names[0], *line, *disks]


def test_build_writes_the_image_of_aws_s_tool(tmp_path):
    """Into a file and into a pipe; the registers are said."""
    out = tmp_path / "out.eif"
    done = run("--json", *build_args(tmp_path), "-o", str(out))
    assert done.returncode == 0, done.stderr
    wanted = (VECTORS / "unsigned.eif").read_bytes()
    assert out.read_bytes() == wanted
    registers = EXPECTED["unsigned.eif"]["registers"]
    assert json.loads(done.stdout) == {"output": str(out), "measurements": registers}
    piped = subprocess.run(
        [*COMMAND, *build_args(tmp_path), "-o", "-"],
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert piped.stdout == wanted
    assert registers["pcr0"].encode() in piped.stderr


def test_build_writes_no_image_to_a_terminal(tmp_path):
    """Before it reads anything."""
    main, other = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, *build_args(tmp_path), "-o", "-"],
            stdout=other,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )
    finally:
        os.close(other)
        os.close(main)
    assert done.returncode == 2
    assert b"not for a terminal" in done.stderr


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_build_takes_metadata_from_a_file_only(tmp_path, path):
    """A device would never end."""
    done = run("--json", *build_args(tmp_path), "--metadata", path, "-o", str(tmp_path / "x"))
    assert_failed(done, 2, "InvalidArgumentError", "validate")


def test_measure_with_an_image_gives_every_register_and_the_condition(launch):
    """Image, parent instance and launch in one."""
    identity = ["--role-arn", ROLE, "--instance-id", INSTANCE]
    done = run("--json", "measure", "--eif", SIGNED, *identity, *launch)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    alone = json.loads(run("--json", "measure", *launch).stdout)
    image = measure_image(SIGNED, role_arn=ROLE, instance_id=INSTANCE).as_dict()
    registers = {**image, "pcr16": alone["pcr16"], "pcr17": alone["pcr17"]}
    assert {name: shown[name] for name in registers} == registers
    assert shown["Condition"] == {
        "StringEqualsIgnoreCase": {
            f"kms:RecipientAttestation:{name.upper()}": value for name, value in registers.items()
        }
    }
    assert "debug mode attests zeros" in shown["warnings"][0]
    assert "eif verify" in shown["warnings"][1]
    done = run("measure", "--eif", SIGNED, *identity, *launch)
    lines = done.stdout.splitlines()
    for name, value in registers.items():
        assert f"{name.upper():<12} {value}" in lines
    assert json.loads(done.stdout[done.stdout.index("{") :]) == {"Condition": shown["Condition"]}
    done = run("measure", "--kms-policy", "--eif", SIGNED, *identity, *launch)
    assert json.loads(done.stdout) == {"Condition": shown["Condition"]}
    assert "debug mode attests zeros" in done.stderr


@pytest.mark.parametrize("option", [["--role-arn", ROLE], ["--instance-id", INSTANCE]])
def test_parent_instance_without_an_image_is_refused(option, launch):
    """A policy without the image's registers would be fulfilled by any image."""
    done = run("measure", *option, *launch)
    assert done.returncode == 2
    assert "need --eif" in done.stderr


def test_measure_without_an_image_is_as_before(launch):
    """Two registers, no condition."""
    shown = json.loads(run("--json", "measure", *launch).stdout)
    assert set(shown) == {"pcr16", "pcr17", "not_measured"}
