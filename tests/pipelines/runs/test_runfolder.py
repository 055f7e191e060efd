"""The run folder: who may write it, what counts as done, and that a stop at any moment leaves it usable."""

import errno
import itertools
import multiprocessing
import shutil

import pytest

from dmquant.errors import UserError
from dmquant.host.files import append_line, fingerprint, write_text
from dmquant.pipelines.runs.runfolder import RunFolder, claim, is_full_disk


def test_fingerprint_depends_on_every_setting_and_not_on_their_order():
    assert fingerprint(steps=20, seed=0) == fingerprint(seed=0, steps=20)
    assert len({fingerprint(steps=20, seed=0), fingerprint(steps=21, seed=0), fingerprint(steps=20, seed=1)}) == 3
    assert fingerprint(prompts=["ab", "c"]) != fingerprint(prompts=["a", "bc"])


def test_a_finished_stage_is_remembered_under_its_own_settings_only(tmp_path):
    with claim(tmp_path / "run", "model") as folder:
        folder.finish("score", "settings-a", seconds=1.5)
    reopened = RunFolder(tmp_path / "run")
    assert reopened.finished("score", "settings-a") == {"fingerprint": "settings-a", "seconds": 1.5}
    assert reopened.finished("score", "settings-b") is None
    assert reopened.finished("model", "settings-a") is None


def test_forgetting_a_stage_survives_reopening(tmp_path):
    with claim(tmp_path / "run", "model") as folder:
        folder.finish("model", "settings")
        folder.forget("model")
    assert RunFolder(tmp_path / "run").record("model") is None


def test_another_models_run_is_refused_and_kept(tmp_path):
    with claim(tmp_path / "run", "pixart") as folder:
        folder.finish("model", "settings")
    with pytest.raises(UserError, match="holds a run of pixart, not of emoji"), claim(tmp_path / "run", "emoji"):
        pass
    assert RunFolder(tmp_path / "run").finished("model", "settings")


def test_overwrite_replaces_a_run_and_keeps_files_no_run_writes(tmp_path):
    path = tmp_path / "run"
    with claim(path, "pixart") as folder:
        folder.finish("model", "settings")
        folder.images("fp").mkdir(parents=True)
        write_text(folder.images("fp") / "00000.png", "old")
        (folder.images("fp") / "mine.png").write_bytes(b"photo")
        write_text(path / "report.md", "ours")
        (path / "report.md").write_text("ours, with remarks of mine")
        (path / "notes of mine.txt").write_text("keep")
    with claim(path, "emoji", overwrite=True) as folder:
        assert folder.model == "emoji"
        assert folder.record("model") is None
        assert [image.name for image in folder.images("fp").iterdir()] == ["mine.png"]
        write_text(path / "report.md", "new")
    assert (path / "notes of mine.txt").read_text() == "keep"
    assert (path / "report.md.replaced").read_text() == "ours, with remarks of mine"


def test_foreign_files_are_refused_and_survive_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_bytes(b"photo")
    with pytest.raises(UserError, match=r"not of a run \(images, thesis.tex\)"), claim(tmp_path, "emoji"):
        pass
    with pytest.raises(UserError, match=r"not of a run \(images\)"), claim(tmp_path, "emoji", overwrite=True):
        pass
    (tmp_path / "images").rename(tmp_path / "photos")
    with claim(tmp_path, "emoji", overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "photos" / "holiday.png").read_bytes() == b"photo"


@pytest.mark.parametrize("below_a_file", [False, True])
def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path, below_a_file):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" if below_a_file else tmp_path / "file"
    with pytest.raises(UserError, match="--out"), claim(path, "emoji"):
        pass


def test_failing_before_anything_is_done_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="broken weights"), claim(tmp_path / "runs" / "new", "emoji"):
        raise UserError("broken weights")
    assert list(tmp_path.iterdir()) == []


def test_failing_after_something_is_done_keeps_it(tmp_path):
    def stopped_after_a_stage():
        with claim(tmp_path / "run", "emoji") as folder:
            folder.finish("images_fp", "settings")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_after_a_stage()
    assert RunFolder(tmp_path / "run").finished("images_fp", "settings")


def test_failing_never_removes_a_folder_that_was_there(tmp_path):
    with pytest.raises(UserError), claim(tmp_path, "emoji"):
        raise UserError("broken weights")
    assert tmp_path.exists()


def _hold(path, ready, release):
    with claim(path, "emoji"):
        ready.set()
        release.wait(30)


def test_a_second_writer_is_refused_and_a_killed_one_frees_the_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, release = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "run", ready, release))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another dmquant is writing"), claim(tmp_path / "run", "emoji"):
        pass
    other.kill()
    other.join()
    with claim(tmp_path / "run", "emoji") as folder:
        assert folder.model == "emoji"


def test_the_state_of_another_version_is_one_clear_error(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji"):
        write_text(path / "state.json", '{"version": 99}')
    with (
        pytest.raises(UserError, match="another version of dmquant; start anew with --overwrite"),
        claim(path, "emoji"),
    ):
        pass
    with claim(path, "emoji", overwrite=True) as folder:
        assert folder.model == "emoji"


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("1.5", "9.5"), lambda text: "[]"])
def test_a_state_that_is_not_what_was_written_is_no_memory(tmp_path, damage, caplog):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.finish("scores", "settings", seconds=1.5)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(damage(text))
    with pytest.raises(UserError, match=r"state.json is damaged"):
        RunFolder(path)
    with pytest.raises(UserError, match="holds a run of emoji"), claim(path, "pixart"):
        pass
    with claim(path, "emoji") as folder:
        assert folder.record("scores") is None
    assert "damaged" in caplog.text
    assert RunFolder(path).model == "emoji"


def test_a_line_of_the_journal_that_was_changed_is_no_fact(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.add_notes("seconds", {"first": 1.0})
        folder.add_notes("seconds", {"second": 2.0})
        journal = path / ".dmquant" / "state.journal"
        journal.write_text(journal.read_text().replace("1.0", "9.0") + "[" * 100_000 + "\n")
        assert notes_of(path) == {"second": 2.0}


def test_a_run_of_an_earlier_version_or_copied_without_its_notes_goes_on(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.finish("model", "settings")
        write_text(path / "report.md", "old")
        (path / "compare.txt").write_text("mine")
    shutil.rmtree(path / ".dmquant")
    with claim(path, "emoji") as folder:
        assert folder.finished("model", "settings")
        write_text(path / "report.md", "new")
    assert {each.name for each in path.iterdir()} == {".dmquant", "compare.txt", "log.txt", "report.md", "state.json"}


def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_recognised_through_other_errors():
    def save():
        try:
            _full_disk()
        except OSError as error:
            raise RuntimeError("could not save") from error

    with pytest.raises(RuntimeError, match="could not save") as raised:
        save()
    assert is_full_disk(raised.value)
    assert is_full_disk(ValueError("I/O error: No space left on device (os error 28)"))
    assert not is_full_disk(OSError(errno.EACCES, "Permission denied"))
    assert not is_full_disk(None)


def notes_of(path):
    return RunFolder(path).notes("seconds")


def test_what_is_noted_image_by_image_survives_a_kill_and_costs_one_line_each(tmp_path):
    path, sizes = tmp_path / "run", []
    with claim(path, "emoji") as folder:
        folder.finish("model", "settings", layers=[1.0] * 1000)
        state = (path / "state.json").read_bytes()
        for index in range(100):
            folder.add_notes("seconds", {f"image {index}": index / 2})
            sizes.append((path / ".dmquant" / "state.journal").stat().st_size)
        assert (path / "state.json").read_bytes() == state  # not written again
        assert max(after - before for before, after in itertools.pairwise(sizes)) < 80
        expected = {f"image {index}": index / 2 for index in range(100)}
        assert notes_of(path) == expected == folder.notes("seconds")
        folder.finish("images_fp", "settings")
    assert not (path / ".dmquant" / "state.journal").exists()
    assert notes_of(path) == expected


def test_half_a_line_of_a_full_disk_loses_that_line_only(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.add_notes("seconds", {"first": 1.0})
        folder.add_notes("seconds", {"second": 2.0})
        journal = path / ".dmquant" / "state.journal"
        journal.write_bytes(journal.read_bytes()[:-4])
        folder.add_notes("seconds", {"third": 3.0})
        assert notes_of(path) == {"first": 1.0, "third": 3.0}


def test_a_journal_read_twice_and_one_of_a_run_that_was_overwritten_do_no_harm(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.add_notes("seconds", {"first": 1.0})
        journal = (path / ".dmquant" / "state.journal").read_bytes()
        folder.finish("images_fp", "settings")
        (path / ".dmquant" / "state.journal").write_bytes(journal)  # killed between the two
    assert notes_of(path) == {"first": 1.0}
    with claim(path, "emoji", overwrite=True):
        assert notes_of(path) == {}


def test_a_stage_holds_under_its_own_fingerprint_only(tmp_path):
    with claim(tmp_path / "run", "emoji") as folder:
        folder.finish("model", "settings")
        assert folder.holds("model", {"model": "settings"})
        assert not folder.holds("model", {"model": "others"})
        assert folder.holds("model", None)  # an earlier version wrote none
        assert not folder.holds("scores", None)


@pytest.mark.parametrize("name", ["../../../x", "/abs", "C:\\x", "..", ".", "x/y", "Mine", "con", "x" * 300])
def test_the_folder_of_a_recipe_lies_in_the_run_and_is_no_other_recipes(tmp_path, name):
    with claim(tmp_path / "run", "model") as folder:
        own = folder.recipe(name)
        assert own.parent == tmp_path / "run" / "recipes"
        own.mkdir(parents=True)
        others = ("x_y", "mine", "abs", "x", "C_x", "con_")
        assert not {folder.recipe(other).name.lower() for other in others} & {own.name.lower()}


def test_the_folder_of_a_recipe_with_capitals_of_an_earlier_version_is_found(tmp_path):
    with claim(tmp_path / "run", "model") as folder:
        (tmp_path / "run" / "recipes" / "Mine").mkdir(parents=True)
        assert folder.recipe("Mine").name == "Mine"
        assert folder.recipe("mine").name == "mine"
        assert folder.recipe("MINE").name not in ("Mine", "MINE")


def test_a_log_of_ones_own_is_not_added_to_and_that_of_a_killed_run_is(tmp_path):
    path = tmp_path / "run"
    with claim(path, "emoji") as folder:
        folder.finish("model", "settings")
        append_line(path / "log.txt", "killed here")
        shutil.copytree(path, tmp_path / "killed")
    with claim(tmp_path / "killed", "emoji"):
        assert (tmp_path / "killed" / "log.txt").read_text() == "times are UTC\nkilled here\n"
    (path / "log.txt").write_text("dear diary\n")
    with claim(path, "emoji"):
        append_line(path / "log.txt", "again")
    assert (path / "log.txt").read_text() == "times are UTC\nagain\n"
    assert (path / "log.txt.replaced").read_text() == "dear diary\n"
