"""What a writer sends to each published guest."""

import pytest

from nitro_vsock import (
    AppOutput,
    DeviceProxyList,
    EnclaveArgsWriter,
    Guest,
    InvalidArgumentError,
    NetworkProxy,
    OutputProxy,
    Rootfs,
)

LAUNCH = (Rootfs.from_bytes(b"t"), "/bin/app", ["/bin/app"], {"A": "1"})


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("guest", Guest.published(), ids=str)
def test_frame_5_says_what_the_guest_takes_it_for(guest, wanted):
    """In libkrun 1.17 it silences the program; in every other guest it asks for its output."""
    writer = EnclaveArgsWriter(*LAUNCH, app_output=wanted, network_proxy=True, guest=guest.name)
    assert (writer.guest, writer.app_output, writer.network_proxy) == (guest, wanted, True)
    assert (AppOutput() in writer.args) == (wanted != guest.frame_5_silences)
    assert NetworkProxy() in writer.args


@pytest.mark.parametrize("guest", Guest.published(), ids=str)
def test_proxy_for_the_output_asks_for_it_in_the_guest_s_way(guest):
    """Also through the reference's constructor."""
    proxies = DeviceProxyList([OutputProxy(print)])
    for writer in (
        EnclaveArgsWriter(*LAUNCH, proxies=proxies, guest=guest),
        EnclaveArgsWriter.from_reference(b"t", "/a", "/a", "A=1", proxies, guest=guest),
    ):
        assert writer.app_output
        assert (AppOutput() in writer.args) != guest.frame_5_silences


def test_what_names_no_guest_is_refused():
    """The error names the choices."""
    with pytest.raises(InvalidArgumentError, match="msb-krun, krun"):
        EnclaveArgsWriter(*LAUNCH, guest="krun-0.1")
