"""Owns: docs/performance.md, performance.json and the pictures, made from the JSON of a run.

    report.py RESULTS DOCS

Must not know: how anything was measured. What it writes is in RESULTS or counted from it.
"""

import json
import os
import string
import sys
from pathlib import Path

from floors import FLOORS, GROWTH_LIMIT, GROWTH_TARGET, TARGETS
from floors import TREE_PEAK_LIMIT as PEAK

TEMPLATE = Path(__file__).with_name("performance.md.in")
MIB = 1 << 20
GIB = 1 << 30
OURS = "nitro_vsock"
TAR_LIBRARIES = {"Rust": "the Rust crate `tar`", "Python": "Python's tarfile, for want of Rust"}


def size_name(size):
    """Return a size as people write it."""
    return f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"


def gib_per_second(mib):
    """Return a rate."""
    return f"{mib / 1024:.2f} GiB/s"


def load(results):
    """Return the benchmarks of all runs, reduced to what is shown, and the machine.

    Where a benchmark was run again, the later run counts.
    """
    runs = [json.loads(path.read_text()) for path in results.glob("*.json")]
    runs.sort(key=lambda run: run["datetime"])
    if not runs:
        sys.exit(f"no results in {results}: run `make bench`")
    machine = runs[0]["machine_info"]
    return {
        "machine": {
            "processor": machine["cpu"].get("brand_raw", machine["machine"]),
            "cores": machine["cpu"].get("count", os.cpu_count()),
            "kernel": machine["release"],
            "python": machine["python_version"],
        },
        "runs": sorted({run["datetime"][:16] for run in runs}),
        "commits": sorted({run["commit_info"].get("id", "")[:10] for run in runs}),
        "benchmarks": {
            label(bench): bench["extra_info"]
            for run in runs
            for bench in run["benchmarks"]
            if bench["extra_info"]  # else it failed before it had measured anything
        },
    }


def label(bench):
    """Return the name of a benchmark, with the kernel where that is what it is about."""
    name = bench["name"].removeprefix("test_")
    if name.startswith("vsock"):
        name += f" on Linux {'.'.join(bench['extra_info']['kernel'].split('.')[:2])}"
    return name


def table(header, rows):
    """Return a table in Markdown; numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = ([str(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def ratios(found):
    """Return every figure that has a target or a floor: what, where, target, measured, met."""
    rows = []
    for info in found["benchmarks"].values():
        where = [size_name(info["size"])] if "size" in info else []
        if info.get("transport") == "vsock":
            where.append(f"Linux {info['kernel']}")
        for figure, ratio in info.get("ratios", {}).items():
            target = TARGETS[figure]
            met = "" if target is None else "yes" if ratio >= target else "**no**"
            wanted = "" if target is None else f">= {target}"
            rows.append([figure, ", ".join(where), wanted, f"{ratio:.2f}", met, FLOORS[figure]])
        if "peak_by_size" in info:
            sizes = [size_name(int(size)) for size in info["peak_by_size"]]
            rows.append(growth("growth of peak memory", sizes, info["peak_by_size"]))
        if "peak_by_size_of_files" in info:
            found_peaks = info["peak_by_size_of_files"]
            sizes = [f"{int(size) / GIB:.1f} GiB" for size in found_peaks]
            where = f"{info['files']:,} files"
            rows.append(bounded("tree: peak memory", where, max(found_peaks.values()), PEAK, PEAK))
            rows.append(growth("tree: growth of peak memory with files", sizes, found_peaks))
    return rows


def bounded(figure, where, measured, target, limit):
    """Return the row of a figure in bytes that is to stay below a target."""
    met = "yes" if measured <= target else "**no**"
    in_mib = [f"{value / MIB:.2f} MiB" for value in (target, measured, limit)]
    return [figure, where, f"<= {in_mib[0]}", in_mib[1], met, f"<= {in_mib[2]}"]


def growth(figure, sizes, peaks):
    """Return the row of how much a peak grows from the smallest size to the largest."""
    first, *_, last = peaks.values()
    where = f"{sizes[0]} to {sizes[-1]}"
    return bounded(figure, where, last - first, GROWTH_TARGET, GROWTH_LIMIT)


def drained(found):
    """Return the runs to a draining reader over Unix sockets, by size."""
    runs = {
        info["size"]: info
        for name, info in found["benchmarks"].items()
        if name.startswith("page_cache_to_a_draining_reader")
    }
    return dict(sorted(runs.items()))


def throughput(found):
    """Return GiB/s by entrant and size."""
    runs = drained(found)
    names = list(next(iter(runs.values()))["entrants"])
    rows = [
        [name, *(f"{run['entrants'][name]['mib_per_second'] / 1024:.2f}" for run in runs.values())]
        for name in names
    ]
    return table(["GiB/s", *map(size_name, runs)], rows)


def costs(found):
    """Return what an entrant costs at 1 GiB."""
    run = drained(found)[GIB]
    calls = found["benchmarks"]["system_calls_by_gibibyte"]["calls_per_gib"]
    rows = [
        [
            name,
            f"{of['mib_per_second'] / 1024:.2f}",
            f"{of['ours_over_theirs']:.2f}",
            f"{of['cpu_per_gib']:.3f}",
            f"{calls[name]:,}",
            f"{of['peak'] / MIB:,.1f}",
        ]
        for name, of in run["entrants"].items()
    ]
    header = ["1 GiB", "GiB/s", "we are", "CPU s/GiB", "system calls/GiB", "peak MiB"]
    return table(header, rows)


def elsewhere(found):
    """Return throughput where the reader stores the bytes, and from a cold file."""
    columns = {
        "discarded uncopied": "page_cache_to_a_discarding_reader",
        "into fresh memory": "page_cache_to_a_storing_reader[fresh memory]",
        "into a file": "page_cache_to_a_storing_reader[a file]",
        "cold file": "cold_file_to_a_draining_reader",
    }
    runs = {
        title: found["benchmarks"][name]["entrants"]
        for title, name in columns.items()
        if name in found["benchmarks"]
    }
    names = runs["into fresh memory"]
    rows = [
        [
            name,
            *(
                f"{run[name]['mib_per_second'] / 1024:.2f}" if name in run else ""
                for run in runs.values()
            ),
        ]
        for name in names
    ]
    return table(["GiB/s, 1 GiB", *runs], rows)


def vsock(found):
    """Return the rows of each kernel and reader."""
    parts = []
    for name, info in found["benchmarks"].items():
        if name.startswith("vsock_to"):
            rows = [
                [
                    entrant,
                    f"{of['mib_per_second']:.0f}",
                    f"{of['ours_over_theirs']:.2f}",
                    f"{of['cpu_per_gib']:.2f}",
                    f"{of['peak'] / MIB:,.1f}",
                ]
                for entrant, of in info["entrants"].items()
            ]
            reader = "into fresh memory" if "storing" in name else "drained"
            title = f"Linux {info['kernel']}, {size_name(info['size'])} {reader}"
            parts.append(table([title, "MiB/s", "we are", "CPU s/GiB", "peak MiB"], rows))
    return "\n\n".join(parts)


def place(info):
    """Return what a benchmark of launches ran over."""
    return "Unix" if info["transport"] == "unix" else f"AF_VSOCK, Linux {info['kernel']}"


def latency(found):
    """Return the latency of small launches."""
    rows = [
        [name, place(info), f"{of['launches']:,}", of["median_us"], of["p99_us"]]
        for info in found["benchmarks"].values()
        for name, of in info.get("latency", {}).items()
    ]
    return table(["10 KiB archive", "over", "launches", "median us", "p99 us"], rows)


def at_once(found):
    """Return launches at once."""
    rows = [
        [
            place(info),
            size_name(info["at_once"]["size"]),
            gib_per_second(info["at_once"]["one_mib_per_second"]),
            gib_per_second(info["at_once"]["eight_mib_per_second"]),
        ]
        for info in found["benchmarks"].values()
        if "at_once" in info
    ]
    return table(["launches over", "archive", "one", "eight at once, the sum"], rows)


def imports(found):
    """Return what an import takes."""
    of = found["benchmarks"]["import_time"]["import_ms"]
    rows = [[f"a new interpreter, and import {name}", f"{ms} ms"] for name, ms in of.items()]
    return table(["what", "median"], rows)


def tried(found):
    """Return the package beside itself with one thing changed."""
    rows = []
    for info in found["benchmarks"].values():
        if "variant" in info:
            ours, changed = info["entrants"].values()
            way = info["variant"]["strategy"] + (", cold file" if info["variant"]["cold"] else "")
            rows.append(
                [
                    info["variant"]["name"],
                    place(info),
                    way,
                    f"{ours['mib_per_second']:,.0f}",
                    f"{changed['mib_per_second']:,.0f}",
                    f"{changed['ours_over_theirs']:.2f}",
                ]
            )
    header = ["changed", "over", "strategy", "MiB/s as it is", "changed", "we are"]
    return table(header, rows)


def member_cost(found):
    """Return the microseconds that a member of a foreign tar takes beyond its bytes."""
    info = found["benchmarks"]["foreign_tar_of_small_members"]
    ours, ready, *_ = info["entrants"].values()
    return f"{(ours['seconds'] - ready['seconds']) / info['members'] * 1e6:.1f} us"


def limits(found):
    """Return how far the ceiling is from two peers, and we are where the reader copies nothing."""
    drain, discard = (
        run["entrants"]
        for run in (
            drained(found)[4 * GIB],
            found["benchmarks"]["page_cache_to_a_discarding_reader"],
        )
    )
    ceiling = drain["ceiling: sendfile"]["mib_per_second"]
    return {
        "ceiling_over_sendfile": f"{ceiling / drain['socket.sendfile']['mib_per_second']:.1f}",
        "ceiling_over_socat": f"{ceiling / drain['socat']['mib_per_second']:.1f}",
        "discard_sendfile": f"{discard['socket.sendfile']['ours_over_theirs']:.1f}",
        "discard_socat": f"{discard['socat']['ours_over_theirs']:.1f}",
    }


def memory(found):
    """Return the sender's peak by size."""
    peaks = found["benchmarks"]["peak_memory_by_size"]["peak_by_size"]
    sizes = [size_name(int(size)) for size in peaks]
    return table(
        ["archive", *sizes], [["our peak, MiB", *(f"{peak / MIB:.2f}" for peak in peaks.values())]]
    )


def raced(found, name, key):
    """Return the entrants of a race of root file systems, or None where it was not run."""
    info = found["benchmarks"].get(name)
    if info is None:
        return None
    rows = [
        [
            entrant,
            f"{of['seconds']:.2f}",
            f"{of['mib_per_second'] / 1024:.2f}",
            f"{of['ours_over_theirs']:.2f}",
            f"{of['cpu_per_gib']:.2f}",
            f"{of['peak'] / MIB:,.1f}",
        ]
        for entrant, of in info["entrants"].items()
    ]
    title = f"{key}, {size_name(info['size'])}"
    return table([title, "s", "GiB/s", "we are", "CPU s/GiB", "peak MiB"], rows)


def tree(found):
    """Return in words what the tree has, and who packs it for the reference way."""
    info = found["benchmarks"]["tree_to_a_draining_reader"]
    of = info["tree"]
    return (
        f"{of['files']:,} files of {of['size'] / GIB:.2f} GiB, {of['directories']:,} directories, "
        f"{of['symlinks']:,} symbolic and {of['hard_links']:,} hard links. The reference way packs "
        f"it with {TAR_LIBRARIES[info['reference']]}"
    )


def rootfs(found):
    """Return directories, foreign tars and PCR16; what was not run is left out."""
    races = {
        "tree_to_a_draining_reader": "a tree",
        "one_large_file_in_a_directory": "one file in a directory",
        "foreign_tar_of_large_members": "foreign tar, large members",
        "foreign_tar_of_small_members": "foreign tar of the tree",
    }
    parts = [raced(found, name, key) for name, key in races.items()]
    peaks = found["benchmarks"].get("peak_memory_by_size_of_files")
    if peaks:
        of = peaks["peak_by_size_of_files"]
        sizes = [f"{int(size) / MIB:,.0f} MiB" for size in of]
        values = [f"{peak / MIB:.2f}" for peak in of.values()]
        parts.append(table([f"{peaks['files']:,} files of", *sizes], [["our peak, MiB", *values]]))
    pcr = found["benchmarks"].get("pcr16_against_a_bare_loop")
    if pcr:
        of = pcr["pcr16"]
        rows = [[name, f"{rate:.0f}"] for name, rate in of["mib_per_second"].items()]
        parts.append(table([f"PCR16, {size_name(of['size'])}", "MiB/s"], rows))
    return "\n\n".join(part for part in parts if part)


def network(found):
    """Return the network proxy beside its peers; what was not run is left out."""
    parts = []
    for name, info in found["benchmarks"].items():
        kernel = name.rpartition(" on ")[2] if " on " in name else ""
        over = f", AF_VSOCK, {kernel}" if kernel else ", Unix sockets"
        if "network_throughput" in info:
            title = f"frames {info['direction']}, {size_name(info['size'])}{over}"
            rows = [
                [
                    entrant,
                    f"{of['mib_per_second']:,.0f}",
                    f"{of['ours_over_theirs']:.2f}",
                    f"{of['cpu_per_gib']:.2f}" if of["cpu_per_gib"] else "",
                ]
                for entrant, of in info["network_throughput"].items()
            ]
            parts.append(table([title, "MiB/s", "we are", "relay's CPU s/GiB"], rows))
        if "network_latency" in info:
            title = f"frame there and back, {info['way']} writes{over}"
            rows = [
                [
                    entrant,
                    f"{of['median_us']:.1f}",
                    f"{of['p99_us']:.1f}",
                    f"{of['theirs_over_ours']:.2f}",
                ]
                for entrant, of in info["network_latency"].items()
            ]
            parts.append(table([title, "median, us", "p99, us", "theirs over ours"], rows))
    idle = [
        of for info in found["benchmarks"].values() if (of := info.get("network_idle")) is not None
    ]
    if idle:
        rows = [
            [of["sessions"], of["seconds"], of["calls"], of["times_on_a_processor"]] for of in idle
        ]
        header = ["idle sessions", "seconds", "system calls", "times on a processor"]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def draw(found, docs):
    """Draw throughput and peak memory by size."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "nitro_vsock"  # the same figures give the same file
    runs = drained(found)
    labels = [size_name(size) for size in runs]
    for path, key, scale, title in (
        ("throughput.svg", "mib_per_second", 1024, "Unix socket, draining reader: GiB/s"),
        ("memory.svg", "peak", MIB, "Peak memory of the sender: MiB"),
    ):
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        for name in next(iter(runs.values()))["entrants"]:
            values = [run["entrants"][name][key] / scale for run in runs.values()]
            style = "--" if name.startswith("ceiling") else "-"
            ours = {"lw": 3, "zorder": 3} if name == OURS else {"lw": 1.5}
            axes.plot(labels, values, style, marker="o", label=name, **ours)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(docs / path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def write(found, docs):
    """Write the document and what it is made of; print the one table."""
    machine = found["machine"]
    language = drained(found)[GIB]["reference"]
    (docs / "performance.json").write_text(json.dumps(found, indent=1) + "\n")
    figures = table(["figure", "where", "target", "measured", "met", "floor"], ratios(found))
    text = string.Template(TEMPLATE.read_text()).substitute(
        machine=f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}; the reference way is written in {language}",
        runs=f"{found['runs'][0]} to {found['runs'][-1]} UTC",
        commits=", ".join(found["commits"]),
        figures=figures,
        throughput=throughput(found),
        costs=costs(found),
        elsewhere=elsewhere(found),
        vsock=vsock(found),
        latency=latency(found),
        at_once=at_once(found),
        imports=imports(found),
        memory=memory(found),
        rootfs=rootfs(found),
        tree=tree(found),
        member_cost=member_cost(found),
        tried=tried(found),
        network=network(found),
        **limits(found),
    )
    (docs / "performance.md").write_text(text)
    print(figures)


def main(results, docs):
    """Write everything."""
    found = load(Path(results))
    draw(found, Path(docs))
    write(found, Path(docs))


if __name__ == "__main__":
    main(*sys.argv[1:])
