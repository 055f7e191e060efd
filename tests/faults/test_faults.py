"""The trials in short, and that they would fail: a difference, a leftover and a lost file are seen."""

import errno
import hashlib
import json
import os
import random
import signal
import sys

import pytest

from tests.faults import flip, full_disk, kill, overwrite
from tests.faults.child import Said
from tests.faults.fuzz.cases import fuzz
from tests.faults.fuzz.targets import TARGETS
from tests.faults.given import COMMANDS, prepare
from tests.faults.likeness import contents, differences
from tests.faults.points import AFTER, BEFORE, FULL, WITHIN, Points
from tests.faults.trials import Mode, Trial, Verdict, perform
from tests.forked import started


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return folder


def failures(trials, scratch, capsys):
    """What `perform` prints where a trial fails; "" where none does."""
    failed = perform(trials, Mode(2, scratch, "again"))
    return capsys.readouterr().out if failed else ""


def drawn(trials, count):
    """Some of the trials, one of every kind first."""
    shuffled = random.Random(1).sample(trials, len(trials))
    first = {trial.kind: trial for trial in shuffled}
    return [*first.values(), *(trial for trial in shuffled if trial not in first.values())][:count]


# --- what the trials look at


def test_two_runs_are_alike_but_for_times_and_memory_and_what_holds_hashes_of_these(tmp_path):
    for name, seconds in (("a", 0.25), ("b", 1.5)):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        card = f"| rtn | quantize {seconds} s, generate {10 * seconds} s | {seconds + 100} MB |"
        (folder / "README.md").write_text(card)
        digest = {"sha256": hashlib.sha256(card.encode()).hexdigest(), "size": len(card)}
        (folder / "checksums.json").write_text(json.dumps({"README.md": digest}))
        state = {"seconds": seconds, "notes": {"seconds_fp": {"x": seconds}}, "sha256": name}
        (tmp_path / name / "state.json").write_text(json.dumps(state))
        (tmp_path / name / "log.txt").write_text(name)
    assert differences(contents(tmp_path / "a"), contents(tmp_path / "b")) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "x.json").write_text('{"seconds": 0, "psnr": 1}'), ["another: x.json"]),
        (lambda folder: (folder / "x.json").write_text('{"seconds": 2, "psnr": 1.5}'), ["another: x.json"]),
        (lambda folder: (folder / "x.json").unlink(), ["missing: x.json"]),
        (lambda folder: (folder / ".x.1.json").touch(), ["left over: .x.1.json"]),
        (lambda folder: (folder / "empty").mkdir(), ["left over: empty"]),
        (lambda folder: (folder / "x.json").write_text("damaged"), ["another: x.json"]),
    ],
)
def test_a_lost_fact_a_damaged_file_and_a_leftover_are_differences(tmp_path, change, told):
    (tmp_path / "x.json").write_text('{"seconds": 2, "psnr": 1}')
    before = contents(tmp_path)
    change(tmp_path)
    assert differences(before, contents(tmp_path)) == told


def test_a_trial_that_finds_something_fails_and_says_how_to_repeat_it(tmp_path, capsys):
    wrong = Trial(3, "kill run", lambda folder: Verdict("not the same", ("another: state.json",)))
    broken = Trial(4, "kill run", lambda folder: 1 / 0)
    assert perform([Trial(0, "kill run", lambda folder: Verdict()), wrong, broken], Mode(1, tmp_path, "do it")) == 2
    said = capsys.readouterr().out
    assert "another: state.json" in said
    assert "do it --only 3" in said
    assert "ZeroDivisionError" in said
    assert (tmp_path / "3").is_dir()
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize(
    "err", ["Traceback (most recent call last):", "error: KeyError: 'x' (rerun with --debug for the traceback)", ""]
)
def test_only_a_line_of_error_is_a_refusal(err):
    assert Said(1, "", err, 1.0).unlike_a_refusal()
    assert not Said(1, "", "error: the disk is full: make room", 1.0).unlike_a_refusal()


def written(folder, when):
    """Write two files, of which the second meets a fault; the exit status is 1 where that is a full disk."""
    Points(folder, at=1, when=when)()
    (folder / "first").write_text("whole")
    for name in ("second", "third"):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (folder / name).write_text("whole")
    sys.exit(1)


@pytest.mark.parametrize(
    ("when", "status", "left"),
    [
        (BEFORE, -signal.SIGKILL, {"first": "whole"}),
        (AFTER, -signal.SIGKILL, {"first": "whole", "second": ""}),
        (WITHIN, -signal.SIGKILL, {"first": "whole", "second": "wh"}),
        (FULL, 1, {"first": "whole", "second": "", "third": ""}),
    ],
)
def test_a_fault_strikes_at_its_point(tmp_path, when, status, left):
    process = started(written, tmp_path, when)
    process.join()
    assert process.exitcode == status
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == left


def test_points_are_listed_in_order_and_elsewhere_is_none(scratch):
    points = kill.listed_points(scratch, "run")
    assert "open out/state.json" not in points  # it is written under another name, and renamed
    assert any(point.startswith("safetensors out/") for point in points)
    assert not any("given" in point for point in points)
    picked = kill.chosen(points, 50, random.Random(0))
    assert len(set(picked)) == 50
    assert all(at < len(points) for at, _, _ in picked)


# --- the trials


def test_killed_runs_end_as_ones_that_nothing_disturbed(scratch, capsys):
    assert not failures(kill.kills(scratch, ["run"], 2, seed=1), scratch, capsys)


def test_runs_killed_at_a_change_of_files_leave_nothing_behind(scratch, capsys):
    trials = kill.write_points(scratch, ["run"], 40, seed=1)
    assert not failures(drawn(trials, 3), scratch, capsys)


def test_a_full_disk_is_a_line_and_the_run_goes_on_when_there_is_room(scratch, capsys):
    assert not failures(full_disk.full_disks(scratch, ["run"], 1, seed=1), scratch, capsys)


def test_flipped_bits_are_noticed(scratch, capsys):
    assert not failures(drawn(flip.flips(scratch, [], 1, seed=1), 3), scratch, capsys)


def test_no_file_of_a_user_is_lost(scratch, capsys):
    assert not failures(drawn(overwrite.overwrites(scratch, [], 1, seed=1), 4), scratch, capsys)


def test_damaged_input_is_a_line_of_error(scratch, capsys):
    failed = fuzz(scratch, list(TARGETS), cases=300, seed=1, only=None, jobs=2)
    assert not failed, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_many_killed_runs(scratch, capsys, command):
    assert not failures(kill.kills(scratch, [command], 8, seed=2), scratch, capsys)


@pytest.mark.slow
def test_many_damaged_inputs(scratch, capsys):
    failed = fuzz(scratch, list(TARGETS), cases=5_000, seed=2, only=None, jobs=2)
    assert not failed, capsys.readouterr().out
