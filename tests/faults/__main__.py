"""`python -m tests.faults TRIAL [OPTIONS]`: the exit status is 1 if any trial failed."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults import full_disk, kill
from tests.faults.given import COMMANDS, prepare
from tests.faults.trials import Mode, perform

TRIALS = {
    "kill": (
        "SIGKILL at random moments",
        lambda scratch, given: kill.kills(scratch, given.command, given.runs, given.seed),
    ),
    "writes": (
        "SIGKILL right before, after or within a change of files",
        lambda scratch, given: kill.write_points(scratch, given.command, given.runs, given.seed),
    ),
    "disk-full": (
        "a disk that is full from a write on, and small disks where one may be mounted",
        lambda scratch, given: full_disk.full_disks(scratch, given.command, given.runs, given.seed),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    kinds = parser.add_subparsers(dest="trial", required=True)
    for name, (about, _) in TRIALS.items():
        kind = kinds.add_parser(name, help=about, description=about)
        kind.add_argument("--runs", type=int, default=50, help="trials of each command (default: 50)")
        kind.add_argument("--command", choices=COMMANDS, action="append", help="default: each of them")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--only", type=int, action="append", metavar="NUMBER", help="the trial of this number alone")
        kind.add_argument(
            "--jobs", type=int, default=os.cpu_count() or 1, help="trials at once (default: all processors)"
        )
        kind.add_argument("--scratch", type=Path, help="folder to work in, kept (default: a temporary one)")
    given = parser.parse_args()
    given.command = given.command or list(COMMANDS)
    scratch = (given.scratch or Path(tempfile.mkdtemp(prefix="dmquant-faults-"))).resolve()
    prepare(scratch)
    trials = TRIALS[given.trial][1](scratch, given)
    chosen = [trial for trial in trials if given.only is None or trial.number in given.only]
    repeat = " ".join(["python -m tests.faults", given.trial, f"--runs {given.runs} --seed {given.seed}"])
    return min(1, perform(chosen, Mode(given.jobs, scratch, repeat)))


if __name__ == "__main__":
    sys.exit(main())
