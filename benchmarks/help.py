"""How long `--help` takes beside importing what a command line is made of: processor time, runs in turn.

    python benchmarks/help.py

Prints for each the median seconds of a process, and that over `import typer, rich`. `typer.rich_utils` is what typer
itself would import to print help with rich.
"""

import argparse
import os
import statistics
import subprocess
import sys

BARE = "import typer, rich"
HELP = "import sys; sys.argv = ['dmquant', *{arguments}]; from dmquant.pipelines.commands.app import main; main()"
RUNS = {
    BARE: BARE,
    "import typer.rich_utils, rich.table": "import typer.rich_utils, rich.table",
    "dmquant --help": HELP.format(arguments=["--help"]),
    "dmquant run --help": HELP.format(arguments=["run", "--help"]),
}


def seconds(script: str) -> float:
    """Processor time of a new Python that runs `script`."""
    before = os.times()
    subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=31)
    repeats = parser.parse_args().repeats
    taken = {name: [] for name in RUNS}
    for _ in range(repeats + 1):
        for name, script in RUNS.items():
            taken[name].append(seconds(script))
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first fills the disk cache
    for name, median in medians.items():
        print(f"{name:38} {median:6.3f} s  {median / medians[BARE]:5.2f}")


if __name__ == "__main__":
    main()
