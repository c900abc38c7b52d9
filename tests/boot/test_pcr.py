"""The registers of a whole enclave: image, parent instance and launch; and the room's place."""

import ast
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from eif_images import VECTORS

import nitro_vsock
from nitro_vsock import EnclaveMeasurement, InvalidArgumentError, Measurement, measure_image

IMAGE = EnclaveMeasurement(b"0" * 48, b"1" * 48, b"2" * 48)
LAUNCH = Measurement(b"a" * 48, b"b" * 48)
ROLE = "arn:aws:iam::123456789012:role/enclave"
INSTANCE = "i-0123456789abcdef0"


def extended(text):
    """Return what AWS's user guide computes for a role's ARN or an instance's id."""
    return hashlib.sha384(b"\0" * 48 + text.encode()).digest()


def test_image_is_joined_with_launch_and_parent_instance():
    """All registers in the order of their numbers; the image's own measurement stays as it was."""
    found = IMAGE.joined(LAUNCH, role_arn=ROLE, instance_id=INSTANCE)
    assert list(found.registers) == [0, 1, 2, 3, 4, 16, 17]
    assert found.registers[3] == extended(ROLE)
    assert found.registers[4] == extended(INSTANCE)
    assert found.as_dict() == {f"pcr{n}": value.hex() for n, value in found.registers.items()}
    assert IMAGE.registers == {0: b"0" * 48, 1: b"1" * 48, 2: b"2" * 48}
    assert found.joined() == found


def test_condition_of_a_key_policy_names_every_known_register():
    """In the form that AWS KMS documents."""
    found = IMAGE.joined(LAUNCH)
    assert found.kms_condition() == {
        "StringEqualsIgnoreCase": {
            f"kms:RecipientAttestation:PCR{number}": value.hex()
            for number, value in found.registers.items()
        }
    }


def test_image_is_measured_with_the_rest_in_one_call():
    """`measure_image` takes what `joined` takes."""
    path = VECTORS / "signed.eif"
    found = measure_image(path, LAUNCH, role_arn=ROLE, instance_id=INSTANCE)
    assert found == measure_image(path).joined(LAUNCH, role_arn=ROLE, instance_id=INSTANCE)
    assert list(found.registers) == [0, 1, 2, 3, 4, 8, 16, 17]
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    "arn",
    [
        ROLE,
        "arn:aws-cn:iam::123456789012:role/a/path/name_+=,.@-",
        "arn:aws-us-gov:iam::123456789012:role/x",
    ],
)
def test_arn_of_a_role_is_taken(arn):
    """In every partition, with a path."""
    assert IMAGE.joined(role_arn=arn).pcr3 == extended(arn)


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "enclave",
        ROLE + "\n",
        " " + ROLE,
        "arn:aws:iam::123456789012:instance-profile/enclave",
        "arn:aws:sts::123456789012:assumed-role/enclave/session",
        "arn:aws:iam::12345678901:role/enclave",
        "arn:aws:iam::123456789012:role/",
        ROLE.encode(),
        3,
    ],
)
def test_what_is_no_role_s_arn_is_refused(arn):
    """An instance profile's gives a register that no enclave has."""
    with pytest.raises(InvalidArgumentError) as caught:
        IMAGE.joined(role_arn=arn)
    assert caught.value.field == "role_arn"


@pytest.mark.parametrize("instance", ["i-01234567", INSTANCE])
def test_instance_id_is_taken(instance):
    """The old short form too."""
    assert IMAGE.joined(instance_id=instance).pcr4 == extended(instance)


@pytest.mark.parametrize(
    "instance", ["", "i-", "i-0123456789ABCDEF0", INSTANCE + "\n", INSTANCE + "-enc1", b"i-1", 1]
)
def test_what_is_no_instance_id_is_refused(instance):
    """An enclave's id begins with one."""
    with pytest.raises(InvalidArgumentError) as caught:
        IMAGE.joined(instance_id=instance)
    assert caught.value.field == "instance_id"


def test_launcher_that_boots_nothing_does_not_import_the_room():
    """Nor does what needs a name of another room."""
    code = (
        "import sys, nitro_vsock; from nitro_vsock import EnclaveArgsWriter, EnclaveSession;"
        "assert 'nitro_vsock.enclave' not in sys.modules;"
        "from nitro_vsock import Eif, EifError;"
        "assert 'nitro_vsock.enclave' in sys.modules;"
        "assert 'cryptography' not in sys.modules and 'click' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_lower_room_points_into_this_one():
    """Only the command line and the tests' room may; typing-only imports count."""
    package = Path(nitro_vsock.__file__).parent
    importers = set()
    for path in package.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "nitro_vsock.enclave"
            ):
                importers.add(path.relative_to(package).parts[0])
    assert importers <= {"__init__.py", "enclave", "cli", "testing"}
