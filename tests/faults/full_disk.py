"""Commands on a disk that is full from some moment on: refused in one line, and resumed when there is room again."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.child import dmquant
from tests.faults.given import COMMANDS, environment, finished
from tests.faults.kill import listed_points, resumed
from tests.faults.points import FULL, Points
from tests.faults.trials import Trial, Verdict

ROOM = 64 << 20  # bytes: more than a command needs
BLOCK = 4096


def full_disks(scratch: Path, commands: Sequence[str], runs: int, seed: int) -> list[Trial]:
    """`runs` trials of each command, where every write fails from one on, and as many on small disks if one mounts."""
    trials = []
    small = _mounts(scratch)
    for name in commands:
        expected = finished(scratch, name).contents
        points = len(listed_points(scratch, name))
        size = sum(path.stat().st_size for path in finished(scratch, name).folder.rglob("*") if path.is_file())
        for index in range(runs):
            drawn = random.Random(f"{seed} {name} {index}")
            at, room = drawn.randrange(points), drawn.randint(BLOCK, size)

            def from_one_on(folder: Path, name=name, expected=expected, at=at) -> Verdict:
                return _refused_and_resumed(name, folder, scratch, expected, Points(folder, at, FULL), lambda: None)

            def on_a_small_one(folder: Path, name=name, expected=expected, room=room) -> Verdict:
                with _mounted(folder, room):
                    return _refused_and_resumed(
                        name, folder, scratch, expected, None, lambda: _mount(folder, ROOM, "remount,")
                    )

            trials.append(Trial(len(trials), f"full from a write on, {name}", from_one_on))
            if small:
                trials.append(Trial(len(trials), f"a small disk, {name}", on_a_small_one))
    return trials


def _refused_and_resumed(name, folder, scratch, expected, fault, make_room) -> Verdict:
    said = dmquant(COMMANDS[name], folder, environment(scratch), fault)
    make_room()
    wrong = said.unlike_a_refusal() if said.code else []
    if said.code and "is full" not in said.err and "No space left" not in said.err:
        wrong.append(f"it does not say that the disk is full: {said.err}")
    if wrong:
        return Verdict("no good refusal", tuple(wrong))
    return resumed(name, folder, scratch, expected, "refused" if said.code else "nothing written after")


def _mounts(scratch: Path) -> bool:
    """Whether a file system may be mounted here."""
    folder = scratch / "mounts"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(OSError, subprocess.CalledProcessError), _mounted(folder, ROOM):
        return True
    return False


@contextlib.contextmanager
def _mounted(folder: Path, room: int) -> Iterator[None]:
    _mount(folder, room)
    try:
        yield
    finally:
        kept = folder.with_name(f"{folder.name}-kept")
        shutil.copytree(folder, kept)
        subprocess.run(["umount", "-l", folder], check=True)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)


def _mount(folder: Path, room: int, options: str = "") -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={room}", "none", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
