"""What `dmquant register` adds to the start of Python: milliseconds of starts with and without its file, in turns.

    python benchmarks/startup.py [--starts 300]

The file lies in a folder that is added as Python adds its own packages' (`site.addsitedir`); the other is empty.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dmquant.pipelines.commands import startup


def start(folder: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", f"import site; site.addsitedir({folder!r})"], check=True)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=300)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as registered, tempfile.TemporaryDirectory() as empty:
        (Path(registered) / startup.NAME).write_text(startup.LINE, "utf-8")
        turns = [(start(registered), start(empty)) for _ in range(given.starts)]
    with_it, without = (statistics.median(times) for times in zip(*turns, strict=True))
    added = statistics.median(one - other for one, other in turns)
    print(
        f"registered {with_it:.2f} ms, not {without:.2f} ms; difference {added:+.2f} ms, median of {len(turns)} turns"
    )


if __name__ == "__main__":
    main()
