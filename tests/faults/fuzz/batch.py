"""Some hundreds of cases in one process, which may take as much time a case and memory as is allowed and no more."""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

from tests.faults.fuzz.targets import TARGETS
from tests.forked import ROOT

SECONDS, BYTES, LINE = 10, 1 << 30, 2000
"""The most processor time that a case may take, memory that it may add, and characters of an error."""


class Hang(BaseException):
    """A case takes too long; no `except Exception` stops it."""


def batch(name: str, seed: int, numbers: list[int], folder: str, given: str, found: str) -> None:
    """Do the cases `numbers` of a target; a line of JSON for each goes to the file `found`, whatever becomes of it."""
    signal.signal(signal.SIGPROF, _hangs)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.environ["DMQUANT_CACHE"] = f"{given}/cache"
    from tests.faults import loaded  # noqa: F401

    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + BYTES, base + BYTES))
    with open(found, "a", encoding="utf-8", buffering=1) as lines:
        for number in numbers:
            lines.write(json.dumps({"began": number}) + "\n")
            lines.write(json.dumps(outcome(name, seed, number, Path(folder), Path(given))) + "\n")


def outcome(name: str, seed: int, number: int, folder: Path, given: Path) -> dict:
    """What becomes of one case: its word, and what and where for one that is wrong."""
    from dmquant.errors import UserError

    drawn = random.Random(f"{seed} {name} {number}")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        TARGETS[name].case(drawn, folder, given)
        return {"number": number, "word": "accepted"}
    except UserError as error:
        message = str(error)
        wrong = ["several lines"] if len(message.splitlines()) != 1 else []
        wrong += ["a long line"] if len(message) > LINE else []
        if not wrong:
            return {"number": number, "word": "refused"}
        return {"number": number, "word": "no good line", "what": message[:200], "where": ", ".join(wrong)}
    except Hang as error:
        return {"number": number, "word": "hang", "what": f"over {SECONDS} s", "where": _where(error)}
    except MemoryError as error:
        return {"number": number, "word": "memory", "what": "over 1 GB", "where": _where(error)}
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return {"number": number, "word": "other exception", "what": what, "where": _where(error)}
    finally:
        with contextlib.suppress(Hang):
            signal.setitimer(signal.ITIMER_PROF, 0)


def _where(error: BaseException) -> str:
    """The last line of dmquant's that the error passed, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if ROOT in Path(frame.filename).parents and "site-packages" not in frame.filename]
    places = [*ours[-1:], *frames[-1:]]
    return " < ".join(dict.fromkeys(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in places))


def _hangs(*_) -> None:
    raise Hang


def show(name: str, seed: int, number: int, folder: Path, given: Path) -> int:
    """One case in this process, its error with the traceback."""
    drawn = random.Random(f"{seed} {name} {number}")
    try:
        TARGETS[name].case(drawn, folder, given)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1
    print("accepted")
    return 0
