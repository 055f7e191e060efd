"""Break dmquant on purpose. The exit status is 1 if any trial failed."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A command that is killed cannot give back its semaphores; the process that tracks them does, and says so.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")

from tests.faults import flip, full_disk, kill, overwrite
from tests.faults.fuzz.cases import fuzz
from tests.faults.fuzz.targets import TARGETS
from tests.faults.given import COMMANDS, prepare
from tests.faults.trials import Mode, perform

TRIALS = {
    "kill": (kill.kills, "SIGKILL at random moments of a command, which is then given again"),
    "writes": (kill.write_points, "SIGKILL right before, right after or within a change of files"),
    "disk-full": (
        full_disk.full_disks,
        "a disk that is full from a write on, and small disks where one may be mounted",
    ),
    "flip": (flip.flips, "single bits of the files of a finished run, and of a saved model"),
    "overwrite": (overwrite.overwrites, "files of users in every place that a command may write to"),
}


def main() -> int:
    given = _arguments()
    scratch = (given.scratch or Path(tempfile.mkdtemp(prefix="dmquant-faults-"))).resolve()
    prepare(scratch)
    if given.trial == "fuzz":
        return min(1, fuzz(scratch, given.kind or list(TARGETS), given.cases, given.seed, given.only, given.jobs))
    commands = given.command or list(COMMANDS)
    trials = TRIALS[given.trial][0](scratch, commands, given.runs, given.seed)
    wanted = [trial for trial in trials if given.only is None or trial.number in given.only]
    chosen = "".join(f" --command {name}" for name in given.command or ())
    repeat = f"python -m tests.faults {given.trial}{chosen} --runs {given.runs} --seed {given.seed}"
    return min(1, perform(wanted, Mode(given.jobs, scratch, repeat)))


def _arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="from which everything is drawn (default: 0)")
    common.add_argument("--only", type=int, action="append", metavar="NUMBER", help="do the trial of this number alone")
    common.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="trials at once (default: one a processor)"
    )
    common.add_argument("--scratch", type=Path, metavar="DIR", help="work there and leave it (default: a new folder)")
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    kinds = parser.add_subparsers(dest="trial", required=True, metavar="TRIAL")
    for name, (_, about) in TRIALS.items():
        kind = kinds.add_parser(name, help=about, description=about, parents=[common])
        kind.add_argument(
            "--runs", type=int, default=50, help="trials of a command, or of a kind of file (default: 50)"
        )
        kind.add_argument("--command", choices=COMMANDS, action="append", help="default: each of them")
    about = "damaged recipes, records, configurations, headers and prompts: a line of error, in time, in little memory"
    kind = kinds.add_parser("fuzz", help=about, description=about, parents=[common])
    kind.add_argument("--cases", type=int, default=100_000, help="of all kinds together (default: 100000)")
    kind.add_argument("--kind", choices=TARGETS, action="append", help="default: each of them")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
