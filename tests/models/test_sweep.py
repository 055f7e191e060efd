"""A sweep on a small pipeline: what it leaves, that it resumes, and that workers and engines change no number."""

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dmquant.errors import UserError
from dmquant.pipelines.commands import stages
from dmquant.pipelines.runs import image_stage, model_stage, runfolder, sides
from dmquant.pipelines.runs.settings import Options, resolve_all
from dmquant.pipelines.sweep import engines
from dmquant.pipelines.sweep import sweep as sweep_module
from dmquant.pipelines.sweep.space import Choice, design_space
from dmquant.pipelines.sweep.trial import Failure
from tests.forked import Forked, wait_until
from tests.models.test_processes import RECIPE
from tests.tiny import tiny_pixart

PATIENCE = 300  # seconds for processes to start and do small things on a busy machine
PROMPTS = ["red apple, food", "blue cat", "a green house"]
BITS = "4,8"
FORMATS = "fp4,fp8,int8"
NAMES = {
    "rtn-fp4_e2m1-fp4_e2m1",
    "rtn-fp4_e2m1-fp8_e4m3",
    "rtn-fp8_e4m3-fp8_e4m3",
    "rtn-int8-int8",
}


def here(work, items, crew):
    """An engine that does one item after another in this process."""
    return ((item, work(item)) for item in items)


@pytest.fixture(autouse=True)
def _engine(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "here", here)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    tiny_pixart(folder / "tiny", blocks=2)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE | {"calibration": {"prompts": 3, "steps_per_prompt": 2}}))
    prompts = str(folder / "prompts.txt")
    return Options(
        model=str(folder / "tiny"),
        prompts=prompts,
        calibration_prompts=prompts,
        steps=2,
        dtype="fp32",
        device="cpu",
        metrics="psnr,latent_mse",
    )


def sweep(options, out, engine="here", workers=None, keep_images=False, **choice):
    space = design_space(options, Choice(**{"bits": BITS, "formats": FORMATS} | choice))
    stages.sweep(space, out, False, engine, workers, 1, keep_images)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    engines.ENGINES["here"] = here
    out = tmp_path_factory.mktemp("runs") / "sweep"
    sweep(options, out)
    del engines.ENGINES["here"]
    return out


@pytest.fixture
def again(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def data(folder):
    return json.loads((folder / "sweep.json").read_text())


def trials(folder):
    return {trial["name"]: trial for trial in data(folder)["trials"]}


def numbers(folder):
    """Of every trial, what must not depend on how it was done."""
    same = ("bits_per_quantized_weight", "bits_per_weight", "size_bytes", "bit_operations", "area", "metrics", "pareto")
    return {name: {key: trial[key] for key in same} for name, trial in trials(folder).items()}


def when_written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("trials/*.json")}


def test_it_leaves_tables_a_picture_and_a_record_a_trial_and_no_model_or_image_of_one(finished):
    entries = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    files = {"run.yaml", "state.json", "log.txt", "sweep.csv", "sweep.json", "sweep.md", "sweep.png"}
    assert entries == files | {"images", "trials"}
    assert {path.name for path in (finished / "trials").iterdir()} == {f"{name}.json" for name in NAMES}
    assert [path.name for path in (finished / "images").iterdir()] == ["fp"]
    with Image.open(finished / "sweep.png") as picture:
        picture.load()
        assert picture.width > 1000


def test_a_trial_has_its_costs_and_metrics(finished):
    found = trials(finished)
    assert found.keys() == NAMES
    low, high = found["rtn-fp4_e2m1-fp4_e2m1"], found["rtn-fp8_e4m3-fp8_e4m3"]
    assert high["metrics"]["psnr"]["value"] > low["metrics"]["psnr"]["value"] + 6
    assert high["metrics"]["latent_mse"]["value"] < low["metrics"]["latent_mse"]["value"] / 4
    assert low["metrics"]["psnr"]["low"] < low["metrics"]["psnr"]["value"] < low["metrics"]["psnr"]["high"]
    assert high["bits_per_quantized_weight"] == pytest.approx(low["bits_per_quantized_weight"] + 4)
    assert high["bit_operations"] == 4 * low["bit_operations"] == 64 * high["multiply_accumulates"]
    assert (low["multiplier_cells"], high["multiplier_cells"]) == (2 * 2 + 2, 4 * 4 + 4)
    assert all(trial["error"] is None and trial["peak_memory_bytes"] > 1e6 for trial in found.values())


def test_a_trial_gives_what_its_recipe_gives_in_a_run(options, finished, tmp_path):
    (settings,) = resolve_all(options, "rtn:fp4_e2m1:fp8_e4m3").values()
    stages.run(settings, tmp_path / "alone", False)
    (alone,) = json.loads((tmp_path / "alone" / "report.json").read_text())["recipes"].values()
    trial = trials(finished)["rtn-fp4_e2m1-fp8_e4m3"]
    assert alone["metrics"]["psnr"].pop("note").startswith("the first image alone")  # which sweeps do not look at
    assert trial["metrics"] == alone["metrics"]
    assert (trial["size_bytes"], trial["bits_per_weight"]) == (alone["size_bytes"], alone["bits_per_weight"])


def test_rows_are_sorted_by_cost_and_the_front_is_what_no_other_beats(finished):
    rows = data(finished)["trials"]
    costs = [(row["bits_per_quantized_weight"], row["bit_operations"]) for row in rows]
    assert costs == sorted(costs)
    fields = {"bits": "bits_per_quantized_weight", "ops": "bit_operations", "area": "area"}
    for word, field in fields.items():
        points = {row["name"]: (row[field], row["metrics"]["psnr"]["value"]) for row in rows}
        best = {
            name
            for name, (cost, psnr) in points.items()
            if not any(c <= cost and p >= psnr and (c, p) != (cost, psnr) for c, p in points.values())
        }
        assert {row["name"] for row in rows if word in row["pareto"]} == best


def test_the_csv_says_the_same(finished):
    with (finished / "sweep.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    for name, trial in trials(finished).items():
        assert float(rows[name]["psnr_high"]) == trial["metrics"]["psnr"]["high"]
        assert float(rows[name]["seconds_trial"]) == trial["seconds"]["trial"]
        assert rows[name]["pareto"].split() == trial["pareto"]
        assert rows[name]["error"] == ""


def test_the_page_has_a_line_a_trial(finished):
    page = (finished / "sweep.md").read_text()
    assert "gate-count model" in page
    every = page.partition("## All trials")[2]
    assert every.count("| rtn |") == len(NAMES)


def refuse(*args, **kwargs):
    raise AssertionError("work was done again")


def test_the_same_sweep_again_does_nothing_again(options, again, monkeypatch, capsys):
    before, content = when_written(again), data(again)
    monkeypatch.setitem(engines.ENGINES, "here", refuse)
    monkeypatch.setattr(sides, "load_source", refuse)
    sweep(options, again)
    assert when_written(again) == before
    assert data(again) == content
    assert "all are done" in capsys.readouterr().out


def test_a_wider_sweep_does_only_what_is_new(options, again, capsys):
    before = when_written(again)
    sweep(options, again, formats="fp4,fp8,int4,int8")
    after = when_written(again)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"rtn-int4-int4.json", "rtn-int4-int8.json"}
    assert "4 are done, 2 to do" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 7}, {"steps": 1}, {"metrics": "psnr,latent_mse,ssim"}])
def test_what_the_results_depend_on_redoes_them(options, again, change):
    before = when_written(again)
    sweep(replace(options, **change), again, formats="int8")
    after = when_written(again)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"rtn-int8-int8.json"}
    assert data(again)["trials"][0]["metrics"].keys() == set(change.get("metrics", "psnr,latent_mse").split(","))


def test_fewer_metrics_need_no_work(options, again, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "here", refuse)
    sweep(replace(options, metrics="latent_mse"), again)
    assert data(again)["metrics"] == ["latent_mse"]
    assert "latent_mse_low" in (again / "sweep.csv").read_text()


def test_images_are_kept_where_they_are_asked_for(options, again):
    before = when_written(again)
    sweep(options, again, formats="int8", keep_images=True)
    kept = again / "trials" / "rtn-int8-int8"
    assert sorted(path.name for path in kept.iterdir()) == [".dmquant", "images"]
    assert len(list(kept.rglob("*.png"))) == len(PROMPTS)
    assert {name for name, time in when_written(again).items() if time != before[name]} == {"rtn-int8-int8.json"}
    sweep(options, again, formats="int8")
    assert not kept.exists()


def test_a_trial_that_stopped_goes_on_where_it_was(options, tmp_path, monkeypatch):
    made, real = [], image_stage.make_images

    def stop(pipeline, requests, folder, settings, console, title, note=None):
        if folder.name == "quantized":
            made.append(folder)
            raise KeyboardInterrupt
        return real(pipeline, requests, folder, settings, console, title, note)

    with monkeypatch.context() as patch:
        patch.setattr(image_stage, "make_images", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(options, tmp_path / "run", formats="int8")
    assert len(made) == 1
    assert (tmp_path / "run" / "trials" / "rtn-int8-int8" / "model" / "model_index.json").is_file()
    monkeypatch.setattr(model_stage, "make_model", refuse)
    sweep(options, tmp_path / "run", formats="int8")
    assert trials(tmp_path / "run")["rtn-int8-int8"]["error"] is None


def test_a_failing_trial_is_a_line_of_the_tables_and_the_others_are_there(options, tmp_path, monkeypatch, capsys):
    real = model_stage.make_model

    def failing(pipeline, settings, *args, **kwargs):
        if settings.recipe.name == "rtn-int8-int8":
            raise UserError("block 3 holds NaN")
        if settings.recipe.name == "rtn-fp4_e2m1-fp4_e2m1":
            raise ZeroDivisionError("by\nzero")
        return real(pipeline, settings, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model_stage, "make_model", failing)
        with pytest.raises(UserError, match=r"2 of 4 trials failed \(rtn-fp4_e2m1-fp4_e2m1, rtn-int8-int8\)") as raised:
            sweep(options, tmp_path / "run")
    assert raised.value.exit_code == 1
    assert "rtn-int8-int8 failed: block 3 holds NaN\n" in capsys.readouterr().out
    found = trials(tmp_path / "run")
    assert found["rtn-int8-int8"]["error"] == "block 3 holds NaN"
    assert found["rtn-fp4_e2m1-fp4_e2m1"]["error"] == "ZeroDivisionError: by zero"
    assert found["rtn-fp8_e4m3-fp8_e4m3"]["metrics"]["psnr"]["value"] > 30
    assert "- rtn-int8-int8: block 3 holds NaN" in (tmp_path / "run" / "sweep.md").read_text()
    sweep(options, tmp_path / "run")
    assert all(trial["error"] is None for trial in trials(tmp_path / "run").values())


def test_calibration_data_of_something_else_fails_only_the_trials_that_need_it(options, tmp_path):
    small = str(Path(options.prompts).with_name("small.yaml"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photo.png").write_bytes(b"")
    given = replace(options, calibration_data=tmp_path / "data")
    with pytest.raises(UserError, match="1 of 2 trials failed"):
        sweep(given, tmp_path / "run", formats="int8", techniques=f"rtn,{small}")
    found = trials(tmp_path / "run")
    assert "holds something else than calibration data" in found["small-int8-int8"]["error"]
    assert found["rtn-int8-int8"]["error"] is None
    assert [row["name"] for row in data(tmp_path / "run")["trials"]] == ["rtn-int8-int8", "small-int8-int8"]


def test_a_full_disk_stops_the_sweep(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "run_trial", lambda task: Failure("No space left on device", disk_is_full=True))
    with pytest.raises(UserError, match="is full: make room and run the same command"):
        sweep(options, tmp_path / "run")


def test_when_all_fail_no_table_of_an_earlier_sweep_passes_for_theirs(options, again, monkeypatch):
    monkeypatch.setattr(sweep_module, "run_trial", lambda task: Failure("no memory"))
    with pytest.raises(UserError, match="1 of 1 trials failed"):
        sweep(replace(options, seed=3), again, formats="int8")
    assert not list(again.glob("sweep.*"))


def test_the_report_of_a_sweep_is_its_own_command(finished):
    with pytest.raises(UserError, match="holds a sweep"):
        stages.report(finished)


@pytest.mark.slow
def test_one_process_and_two_give_the_same_bits(options, tmp_path):
    small = str(Path(options.prompts).with_name("small.yaml"))
    for folder, engine, count in (("1", "here", None), ("2", "local", 2)):
        sweep(options, tmp_path / folder, engine, count, techniques=f"rtn,{small}", formats="fp4,int8")
    one, two = numbers(tmp_path / "1"), numbers(tmp_path / "2")
    assert len(one) == 4
    assert one == two
    assert {trial["technique"] for trial in trials(tmp_path / "1").values()} == {"rtn", "small"}
    (shared,) = (tmp_path / "2" / "calibration").iterdir()  # captured once, for all trials
    assert (shared / "index.json").is_file()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(options, finished, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "dmquant", "sweep", options.model, "--bits", BITS, "--formats", FORMATS]
    command += ["--prompts", options.prompts, "--steps", "2", "--dtype", "fp32", "--device", "cpu", "--threads", "1"]
    command += ["--out", out]
    process = Forked(command)
    try:
        wait_until(lambda: when_written(out), process, PATIENCE)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    kept = when_written(out)
    assert len(kept) < len(NAMES)
    resumed = Forked(command)
    _, errors = resumed.communicate(PATIENCE)
    assert resumed.returncode == 0, errors
    assert kept.items() <= when_written(out).items()
    assert numbers(out) == numbers(finished)
    assert {path.name for path in (out / "trials").iterdir()} == {f"{name}.json" for name in NAMES}


def test_a_trial_is_done_only_when_all_its_files_are_known(options, tmp_path, monkeypatch):
    note = runfolder._note_log

    def killed(ours):
        if ours.root.parent.name == "trials":
            raise KeyboardInterrupt
        note(ours)

    with monkeypatch.context() as patch:
        patch.setattr(runfolder, "_note_log", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(options, tmp_path / "run", formats="int8")
    sweep(options, tmp_path / "run", formats="int8")
    assert {path.name for path in (tmp_path / "run" / "trials").iterdir()} == {"rtn-int8-int8.json"}


def test_after_every_trial_the_time_to_go_is_told(options, again, capsys):
    sweep(options, again, formats="fp4,fp8,int4,int8")
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 2: " in line]
    assert "to go, until " in lines[0]
    assert lines[1].endswith("none to go")
