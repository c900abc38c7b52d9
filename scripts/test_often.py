"""Owns: running the suite many times, every second time beside a load that keeps all cores busy.

    test_often.py COUNT COMMAND ARG...

Prints which test failed when, and exits with 1 if any did. The output of each run stays in
build/test-often. Knows nothing of the tests.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

OUTPUT = Path("build/test-often")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+(?: .*?\])?)(?: - .*)?$", re.MULTILINE)
BUSY = (sys.executable, "-c", "while True: pass")


@contextlib.contextmanager
def load():
    """Keep every core busy."""
    running = [subprocess.Popen(BUSY) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(count, *command):
    """Run; tell."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    failed = defaultdict(list)
    for number in range(1, int(count) + 1):
        loaded = number % 2 == 0
        path = OUTPUT / f"run-{number}.txt"
        began = time.monotonic()
        with path.open("w") as out, load() if loaded else contextlib.nullcontext():
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
        tests = FAILURE.findall(path.read_text())
        if status and not tests:
            tests = [f"no test by name: exit status {status}, see {path}"]
        beside = " beside a load" if loaded else ""
        seconds = time.monotonic() - began
        print(f"run {number} of {count}{beside}: {seconds:.0f} s, {len(tests)} failed", flush=True)
        for test in tests:
            print(f"  {time.strftime('%H:%M:%S')} {test}", flush=True)
            failed[test].append(number)
    for test, runs in failed.items():
        print(f"failed in {len(runs)} of {count} runs ({', '.join(map(str, runs))}): {test}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
