"""Files that are not ours are never lost: what is removed, what is moved aside, and what a kill leaves."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import UserError
from dmquant.host import files, owned, room
from dmquant.host.files import replacing, write_text
from dmquant.host.owned import Owned

NAMES = ("a", "b", "sub/a", "sub/b")


def contents(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and owned.ROOM not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_what_was_written_is_ours_as_long_as_nobody_changes_it(tmp_path):
    with owned.claimed(tmp_path) as ours:
        write_text(tmp_path / "report.md", "ours")
        (tmp_path / "thesis.tex").write_text("mine")
        assert ours.holds(tmp_path / "report.md")
        assert not ours.holds(tmp_path / "thesis.tex")
        os.utime(tmp_path / "report.md", (1, 1))
        assert ours.holds(tmp_path / "report.md")  # a copy has another time
        (tmp_path / "report.md").write_text("mine")
        assert not ours.holds(tmp_path / "report.md")


def test_the_next_command_knows_what_an_earlier_one_wrote_also_where_the_folder_moved(tmp_path):
    with owned.claimed(tmp_path / "run"):
        write_text(tmp_path / "run" / "images" / "00000.png", "ours")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    with owned.claimed(tmp_path / "moved") as ours:
        ours.clear()
    assert contents(tmp_path) == {"run/images/00000.png": "ours"}
    assert not (tmp_path / "moved" / "images").exists()


def test_a_file_in_the_way_is_moved_aside_and_told(tmp_path, caplog):
    with owned.claimed(tmp_path):
        for number in range(3):
            (tmp_path / "grid.png").write_text(f"mine {number}")
            write_text(tmp_path / "grid.png", "ours")
        write_text(tmp_path / "grid.png", "ours, anew")
    assert contents(tmp_path) == {
        "grid.png": "ours, anew",
        "grid.png.replaced": "mine 0",
        "grid.png.replaced-2": "mine 1",
        "grid.png.replaced-3": "mine 2",
    }
    assert caplog.text.count("was not written by dmquant, or changed since: it is now") == 3


def test_a_link_in_the_way_is_moved_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "photo").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grid.png").symlink_to(tmp_path / "photo")
    with owned.claimed(tmp_path / "run"):
        write_text(tmp_path / "run" / "grid.png", "ours")
    assert (tmp_path / "photo").read_text() == "mine"
    assert (tmp_path / "run" / "grid.png.replaced").is_symlink()


@given(
    st.lists(st.tuples(st.sampled_from(["we write", "they write", "remove", "clear", "anew"]), st.sampled_from(NAMES)))
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_no_text_of_theirs_is_lost(tmp_path_factory, steps):
    root, theirs = tmp_path_factory.mktemp("any"), set()
    held = owned.claimed(root)
    ours = held.__enter__()
    for number, (step, name) in enumerate(steps):
        path, text = root / name, f"{step} {number}"
        if step == "we write":
            write_text(path, text)
        elif step == "they write":
            path.parent.mkdir(exist_ok=True)
            theirs -= {path.read_text()} if path.exists() else set()  # they replaced it themselves
            path.write_text(text)
            theirs.add(text)
        elif step == "remove":
            owned.remove(path)
        elif step == "clear":
            ours.clear()
        else:
            held.__exit__(None, None, None)
            held = owned.claimed(root)
            ours = held.__enter__()
        assert theirs <= set(contents(root).values())
    ours.clear()
    held.__exit__(None, None, None)
    assert set(contents(root).values()) == theirs


def test_a_killed_command_leaves_no_unfinished_file(tmp_path):
    def killed():
        with owned.claimed(tmp_path), replacing(tmp_path / "sub" / "00000.png") as partial:
            partial.write_text("half")
            os.link(partial, tmp_path / ".dmquant" / "unfinished" / "left")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert (tmp_path / ".dmquant" / "unfinished" / "left").exists()
    assert contents(tmp_path) == {}
    with owned.claimed(tmp_path):
        assert not any((tmp_path / ".dmquant" / "unfinished").iterdir())


def test_a_file_that_was_noted_and_never_came_to_its_place_changes_nothing(tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    with owned.claimed(tmp_path):
        write_text(tmp_path / "state.json", "first")
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                write_text(tmp_path / "state.json", "second")
    with owned.claimed(tmp_path) as ours:
        assert ours.holds(tmp_path / "state.json")
        write_text(tmp_path / "state.json", "third")
    assert contents(tmp_path) == {"state.json": "third"}


def test_half_a_line_of_the_manifest_costs_that_line(tmp_path):
    with owned.claimed(tmp_path):
        write_text(tmp_path / "a", "ours")
        write_text(tmp_path / "b", "ours too")
    manifest = tmp_path / ".dmquant" / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with owned.claimed(tmp_path) as ours:
        ours.clear()
    assert contents(tmp_path) == {"b": "ours too"}


def test_clearing_goes_through_the_folders_of_recipes_and_leaves_what_is_theirs(tmp_path):
    recipe = tmp_path / "recipes" / "rtn"
    with owned.claimed(tmp_path) as ours:
        with owned.claimed(recipe):
            write_text(recipe / "state.json", "ours")
            (recipe / "notes.txt").write_text("mine")
        ours.clear()
    assert contents(tmp_path) == {"recipes/rtn/notes.txt": "mine"}
    assert not (recipe / ".dmquant").exists()


def test_a_kill_at_any_moment_of_clearing_leaves_what_the_next_clearing_removes(tmp_path, monkeypatch):
    def made(root):
        with owned.claimed(root) as ours:
            for name in ("state.json", "images/quantized/0.png", "images/quantized/1.png", "model/unet/x.json"):
                write_text(root / name, name)
            with owned.claimed(root / "recipes" / "rtn"):
                write_text(root / "recipes" / "rtn" / "report" / "index.html", "ours")
        (root / "model" / "notes.txt").write_text("mine")
        return ours

    def cleared(root):
        ours = Owned(root)
        ours.clear()
        ours.leave()

    def counted(name, left):
        whole = getattr(os, name)

        def step(*given, **named):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return whole(*given, **named)

        return step

    steps, done = 0, False
    while not done:
        root = tmp_path / str(steps)
        made(root)
        left = [steps]
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace"):
                patch.setattr(os, name, counted(name, left))
            try:
                cleared(root)
                done = True
            except KeyboardInterrupt:
                steps += 1
        cleared(root)
        assert [path.relative_to(root).as_posix() for path in sorted(root.rglob("*"))] == ["model", "model/notes.txt"]
    assert steps > 15


def test_clearing_leaves_folders_of_other_commands_that_lie_below(tmp_path):
    for other in ("runs/a", "backup/monday", "recipes/copied"):
        with owned.claimed(tmp_path / other):
            write_text(tmp_path / other / "report.md", "another run")
    with owned.claimed(tmp_path) as ours:
        write_text(tmp_path / "report.md", "ours")
        with owned.claimed(tmp_path / "recipes" / "rtn"):
            write_text(tmp_path / "recipes" / "rtn" / "report.md", "ours")
    with owned.claimed(tmp_path) as ours:
        ours.clear()
    assert contents(tmp_path) == {
        "runs/a/report.md": "another run",
        "backup/monday/report.md": "another run",
        "recipes/copied/report.md": "another run",
    }


def test_an_edit_of_equal_size_and_time_is_an_edit(tmp_path):
    with owned.claimed(tmp_path):
        write_text(tmp_path / "report.md", "FIX")
    when = (tmp_path / "report.md").stat()
    (tmp_path / "report.md").write_text("MYX")
    os.utime(tmp_path / "report.md", ns=(when.st_atime_ns, when.st_mtime_ns))
    with owned.claimed(tmp_path):
        write_text(tmp_path / "report.md", "new")
    assert (tmp_path / "report.md.replaced").read_text() == "MYX"


def test_a_room_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / ".dmquant").mkdir()
    (tmp_path / ".dmquant" / "diary").write_text("mine")
    with pytest.raises(UserError, match="is in the way"), owned.claimed(tmp_path):
        pass
    assert (tmp_path / ".dmquant" / "diary").read_text() == "mine"


def test_a_workspace_goes_when_its_work_is_done_and_stays_with_what_was_done_when_not(tmp_path):
    room = tmp_path / ".model.dmquant"
    with owned.workspace(tmp_path / "model") as first, owned.workspace(tmp_path / "model") as second:
        assert first == second == room
    assert not room.exists()
    with pytest.raises(KeyboardInterrupt), owned.workspace(tmp_path / "model"):
        raise KeyboardInterrupt
    assert not room.exists()

    def stopped():
        with owned.workspace(tmp_path / "model"):
            write_text(room / "calibration" / "index.json", "{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (room / "calibration" / "index.json").exists()


def test_without_a_folder_that_is_held_what_dead_processes_left_beside_a_file_is_removed(tmp_path):
    (tmp_path / ".scores.999999999.dmquant.csv").write_text("half")
    (tmp_path / f".scores.{os.getppid()}.dmquant.csv").write_text("of a command that runs")
    (tmp_path / ".scores.csv").write_text("mine")
    write_text(tmp_path / "scores.csv", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".scores.csv",
        f".scores.{os.getppid()}.dmquant.csv",
        "scores.csv",
    }


@pytest.mark.parametrize(
    "name", ["../thesis.tex", "/thesis.tex", "sub/../../thesis.tex", "", ".", "a\0", 7, ["a"], None]
)
def test_a_damaged_manifest_makes_nothing_outside_of_its_folder_ours(tmp_path, name):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine")
    with owned.claimed(tmp_path / "run"):
        write_text(tmp_path / "run" / "a", "ours")
    deep = "[" * 100_000
    line = f"{deep}\n" + json.dumps([name, 4, thesis.stat().st_mtime_ns, files.sha256(thesis)])
    with (tmp_path / "run" / owned.ROOM / owned.MANIFEST).open("a") as manifest:
        manifest.write(f"{line}\n")
    with owned.claimed(tmp_path / "run") as ours:
        ours.clear()
    assert contents(tmp_path) == {"thesis.tex": "mine"}


@pytest.mark.parametrize("name", [room.MARKER, room.LOCK, "notes.txt"])
def test_a_folder_of_the_name_of_the_room_that_holds_something_of_the_users_is_refused(tmp_path, name):
    (tmp_path / owned.ROOM).mkdir()
    (tmp_path / owned.ROOM / name).write_text("mine")
    with pytest.raises(UserError, match=f"{owned.ROOM} is in the way"), owned.claimed(tmp_path):
        pass
    assert (tmp_path / owned.ROOM / name).read_text() == "mine"


def test_a_room_that_a_killed_command_had_begun_is_taken(tmp_path):
    (tmp_path / owned.ROOM).mkdir()
    (tmp_path / owned.ROOM / room.LOCK).touch()
    (tmp_path / owned.ROOM / room.MARKER).write_text(room.ABOUT[:9])
    with owned.claimed(tmp_path):
        assert owned.is_room(tmp_path / owned.ROOM)
