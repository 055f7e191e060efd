"""What `dmquant register` adds to the start of Python: milliseconds of `python -c pass` with and without, in turns.

python benchmarks/startup.py [--turns 10] [--starts 30]
"""

import argparse
import statistics
import subprocess
import sys
import time

from dmquant.pipelines.commands import startup


def start() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--starts", type=int, default=30)
    given = parser.parse_args()
    before, seconds = startup.is_registered(), {True: [], False: []}
    try:
        for _ in range(given.turns):
            for registered, times in seconds.items():
                startup.register() if registered else startup.unregister()
                start()
                times += [start() for _ in range(given.starts)]
    finally:
        startup.register() if before else startup.unregister()
    with_it, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    print(f"registered {with_it:.2f} ms, not {without:.2f} ms: {with_it - without:+.2f} ms")


if __name__ == "__main__":
    main()
