"""Owns: network namespaces that lead nowhere, for tests with a real passt.

Knows nothing of the tests.
"""

import contextlib
import subprocess

from left_out import AS_ROOT, leave_out

GATEWAY = "10.9.8.1"


def ip(*arguments):
    """Run `ip`, which must succeed."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def namespace(name, address=None):
    """Yield the name of a network namespace, made for the context.

    Args:
        name: of the namespace.
        address: if given, the namespace has it, and a default route to nobody.
    """
    with contextlib.ExitStack() as stack:
        try:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
            if address is not None:
                ip("-n", name, "link", "add", "uplink", "type", "veth", "peer", "name", "far")
        except subprocess.CalledProcessError as error:
            leave_out(f"network namespaces ({error.stderr.strip()})", AS_ROOT)
        if address is not None:
            for link in ("uplink", "far"):
                ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "uplink")
            ip("-n", name, "route", "add", "default", "via", GATEWAY, "dev", "uplink")
        yield name
