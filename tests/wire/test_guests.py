"""What is said of each published guest, and how one is named."""

import copy
import dataclasses
import pickle

import pytest

import nitro_vsock
from nitro_vsock import Guest, InvalidArgumentError
from nitro_vsock.wire import DEFAULT_GUEST, check_guest

DIFFERENCES = {
    Guest.KRUN_1_17: {"frame_5_silences", "native_mtu"},
    Guest.MSB_KRUN: {"native_mtu"},
    Guest.KRUN_1_18: set(),
    Guest.KRUN_RUST_INIT: {
        *("bare_exit_code", "waits_after_sigterm", "strict_stream", "utf8_strings"),
        *("special_files", "expands_pax_sparse", "keeps_modes"),
    },
}


@pytest.mark.parametrize("guest", Guest.published(), ids=str)
def test_guest_departs_from_the_default_where_its_source_does(guest):
    """Each field that differs from the C init of libkrun 1.18 is one that the sources show."""
    default = dataclasses.asdict(DEFAULT_GUEST)
    differing = {
        name for name, value in dataclasses.asdict(guest).items() if value != default[name]
    }
    assert differing - {"name"} == DIFFERENCES[guest]


def test_default_guest_is_todays():
    """Whoever names no guest gets the C init of libkrun 1.18."""
    assert DEFAULT_GUEST is Guest.KRUN_1_18 is nitro_vsock.Guest.KRUN_1_18


@pytest.mark.parametrize("guest", Guest.published(), ids=str)
def test_guest_is_found_by_its_name(guest):
    """The name on the command line stands for the value, and is what str() gives."""
    assert Guest.named(str(guest)) is guest
    assert check_guest(guest.name) is guest
    assert check_guest(guest) is guest


@pytest.mark.parametrize("guest", ["krun-1.16", "", "KRUN_1_18", None, 3, b"krun-1.18"])
def test_what_names_no_guest_is_refused(guest):
    """An unknown name, or another type, is an InvalidArgumentError that names the choices."""
    with pytest.raises(InvalidArgumentError) as caught:
        check_guest(guest)
    assert caught.value.field == "guest"


def test_guest_is_a_value():
    """It cannot be changed; copies are equal and hash alike; another can be made of it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Guest.KRUN_1_18.native_mtu = True
    for other in (copy.deepcopy(Guest.MSB_KRUN), pickle.loads(pickle.dumps(Guest.MSB_KRUN))):
        assert other == Guest.MSB_KRUN
        assert hash(other) == hash(Guest.MSB_KRUN)
    assert dataclasses.replace(Guest.KRUN_1_18, native_mtu=True) != Guest.KRUN_1_18
