"""Owns: the package beside itself with one thing changed: what was tried, and whether it pays.

No floor holds these figures: they say why a constant is what it is.

Must not know: what a change is.
"""

import os
from functools import partial

import pytest
from arena import GIB, MIB, OURS, drop_cache
from variants import VARIANTS, build

from nitro_vsock.cli.compare.contest import Entrant

ROUNDS = {"unix": 9, "vsock": 3}


def over(transport):
    """Return the variants that are measured over a transport."""
    return [name for name, variant in VARIANTS.items() if transport in variant.transports]


def compare_with_variant(benchmark, compare, arena, folder, name, size):
    """Let the package launch in turn with its variant."""
    variant = VARIANTS[name]
    (folder / name).mkdir()
    prefix = build(name, folder / name)
    archive = arena.archive(size)
    ours = Entrant(OURS, arena.ours(archive, variant.strategy).command)
    changed = Entrant(variant.name, [*prefix, *ours.command])
    before = None
    if variant.is_cold:
        os.sync()  # what earlier benchmarks wrote must not be written meanwhile
        before = partial(drop_cache, archive.path)
    compare(arena, archive, [ours, changed], ROUNDS[arena.transport], before=before)
    benchmark.extra_info["variant"] = {
        "name": variant.name,
        "strategy": variant.strategy,
        "cold": variant.is_cold,
    }


@pytest.mark.full
@pytest.mark.parametrize("name", over("unix"))
def test_variant(benchmark, compare, unix, folder, name):
    """Over a Unix socket."""
    compare_with_variant(benchmark, compare, unix, folder, name, GIB)


@pytest.mark.vsock
@pytest.mark.full
@pytest.mark.parametrize("name", over("vsock"))
def test_vsock_variant(benchmark, compare, vsock, folder, name):
    """Over AF_VSOCK."""
    compare_with_variant(benchmark, compare, vsock, folder, name, 64 * MIB)
