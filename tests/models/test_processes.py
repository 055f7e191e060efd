"""Two processes do what one does, bit for bit; one that fails or is killed takes the others with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dmquant.host import processes
from dmquant.host.processes import Processes
from dmquant.pipelines.models.loading import resolve_device
from tests.forked import Forked, wait_until
from tests.tiny import tiny_pixart

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds for two processes to start and do a small thing on a busy machine
PROMPTS = ["red apple, food", "blue cat", "a green house", "boat on the tree", "a face"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
CLIP = ROOT / "pipelines" / "assets" / "emoji-clip"
RECIPE = {
    "name": "small",
    "weights": "fp4",
    "activations": "fp6",
    "granularity": "group:16",
    "rounding": {"method": "adaround"},
    "calibration": {"prompts": 5, "steps_per_prompt": 2, "sampler": "importance"},
    "learning": {"iterations": 4, "batch_size": 2},
    "rules": [{"match": ["pos_embed*", "adaln_single*", "caption_projection*", "proj_out"], "keep": True}],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What each of several processes sees: without a launcher, given the variables that one sets.


def started(arguments: list, count: int = 2) -> list[Forked]:
    """Several processes that are to join, by rank."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Forked(arguments, shared | {"RANK": str(rank)}) for rank in range(count)]


def together(script: str, tmp_path: Path, count: int = 2) -> list:
    """Run the body of `script` in several processes that joined; returns what each left in `result`."""
    head = "import json, sys\nfrom dmquant.host import processes\nfrom dmquant.errors import UsageError, UserError\n"
    body = textwrap.indent(textwrap.dedent(script), "    ")
    tail = "\n    open(f'{sys.argv[1]}/{everyone.rank}.json', 'w').write(json.dumps(result))\n"
    running = started(["-c", f"{head}with processes.joined() as everyone:\n{body}{tail}", tmp_path], count)
    assert [process.wait(PATIENCE) for process in running] == [0] * count, [one.communicate(0)[1] for one in running]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]


def test_every_item_belongs_to_one_process_and_all_get_what_each_passed(tmp_path):
    results = together(
        """
        items = list(range(7))
        result = {"share": everyone.share(items), "gathered": everyone.gather(10 * everyone.rank)}
        everyone.wait()
        result["main"] = everyone.on_main(lambda: f"{everyone.rank} of {everyone.count}")
        result["alone"] = everyone.on_main(lambda: processes.current().gather("nobody else is asked"))
        assert processes.current() == everyone
        """,
        tmp_path,
        count=3,
    )
    assert [result["share"] for result in results] == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(result["gathered"] == [0, 10, 20] for result in results)
    assert all(result["main"] == "0 of 3" for result in results)
    assert all(result["alone"] == ["nobody else is asked"] for result in results)


def test_a_failure_of_one_is_raised_in_all_wherever_they_are_and_they_are_in_step_afterwards(tmp_path):
    results = together(
        """
        def work():
            if everyone.rank == 1:
                raise UsageError("one of them cannot")
            for _ in range(3):  # the others are deep in work of their own, which exchanges something too
                everyone.together(lambda: everyone.gather(0))

        result = {}
        try:
            everyone.together(lambda: everyone.together(work))
        except UserError as error:
            result["caught"] = [type(error).__name__, str(error)]
        try:
            everyone.on_main(lambda: (_ for _ in ()).throw(UserError("the main one cannot")))
        except UserError as error:
            result["then"] = str(error)
        result["after"] = everyone.gather(everyone.rank)
        """,
        tmp_path,
    )
    assert results == 2 * [
        {"caught": ["UsageError", "one of them cannot"], "then": "the main one cannot", "after": [0, 1]}
    ]


def test_calibration_data_that_lacks_shards_is_completed_by_several_processes_as_by_one(tmp_path):
    script = f"""
        from pathlib import Path
        from dmquant.calib.data.capture import capture
        from dmquant.calib.data.sampling import Sampling
        from dmquant.diffusers.arguments import Calls
        from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart

        size = {{"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 3, "guidance_scale": 3.0}}
        store = capture(
            tiny_pixart(),
            "transformer",
            Calls(["red apple", "blue cat", "green house", "a tree", "a boat", "a face"], 0, size | PIXART_CALL),
            sampling=Sampling("stratified", 2, 0.25, 0),
            batch_size=1,
            folder=Path({str(tmp_path / "data")!r}),
            made_for={{}},
        )
        result = [[sample.prompt, sample.step] for sample in store.samples]
    """
    (alone,) = together(script, tmp_path, count=1)
    made = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for start in (0, 2, 3, 5):
        (tmp_path / "data" / f"prompts-{start:05d}-{start + 1:05d}.safetensors").unlink()
    (tmp_path / "data" / "prompts-00001-00002.safetensors").write_bytes(b"damaged")
    assert together(script, tmp_path, count=2) == [alone, alone]
    again = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert again.keys() == made.keys()
    assert all(again[name] == content for name, content in made.items() if name != "index.json")
    index, before = json.loads(again["index.json"]), json.loads(made["index.json"])
    assert index["shards"] == before["shards"]


def test_a_process_alone_needs_no_torch():
    script = "import sys; from dmquant.host import processes as p; e = p.current(); "
    script += "print(e.together(lambda: e.gather(5))); "
    script += "print(e.on_main(lambda: 1), e.share([1, 2]), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:2] == ["[[5]]", "1 [1, 2] False"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Processes(0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Processes(5, 8, 1)),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4"}, Processes(0, 1)),
    ],
)
def test_what_a_launcher_says(environment, expected):
    assert processes.started(environment) == expected


def test_a_program_of_someone_elses_uses_dmquant_alone_in_each_of_its_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.current() == Processes(0, 1)
    with processes.joined() as everyone:
        assert processes.current() == everyone == Processes(1, 2, everyone.local_rank)
    assert processes.current() == Processes(0, 1)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    from dmquant.errors import UserError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    monkeypatch.setattr(processes, "_current", Processes(5, 8, local_rank=1))
    assert resolve_device("auto") == resolve_device("cuda") == "cuda:1"
    assert (resolve_device("cuda:0"), resolve_device("cpu")) == ("cuda:0", "cpu")
    monkeypatch.setattr(processes, "_current", Processes(6, 8, local_rank=2))
    with pytest.raises(UserError, match="has 2 CUDA device"):
        resolve_device("auto")


# Whole commands, as a launcher starts them.


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model whose weights are in 16 bits, prompts, and a calibrated recipe."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pixart(folder / "tiny", blocks=2)
    weights = folder / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def options(given: Path) -> list[str]:
    """Batches of two prompts: three of them for two processes, the last with one prompt."""
    options = ["--prompts", str(given / "prompts.txt"), "--calibration-prompts", str(given / "prompts.txt")]
    return [*options, "--steps", "2", "--guidance", "3", "--batch-size", "2", "--dtype", "fp32"]


def run_options(given: Path, out: Path) -> list[str]:
    chosen = ["run", str(given / "tiny"), "--recipe", str(given / "small.yaml"), *options(given)]
    return [*chosen, "--metrics", "psnr,ssim,latent_mse,clip_score", "--clip", str(CLIP), "--out", str(out)]


def finish(running: list[Forked]) -> tuple[int, str, str]:
    """Wait for all; as a launcher does, end all when one fails. Its status, and what all wrote to either stream."""
    while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
        time.sleep(0.01)
    status = next((process.poll() for process in running if process.poll()), 0)
    for process in running:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(PATIENCE) for process in running]
    return status, *map("".join, zip(*said, strict=True))


def succeed(running: list[Forked]) -> str:
    """What they wrote to standard output."""
    status, out, err = finish(running)
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory):
    """The same run by one process and by two, and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    succeed([Forked(["-m", "dmquant", *run_options(given, folder / "alone")])])
    command = [*LAUNCH, "-m", "dmquant", *run_options(given, folder / "both")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert both.returncode == 0, both.stderr
    return folder / "alone", folder / "both", both


def same_images(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(names) == len(PROMPTS)
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def tensors(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.glob(pattern))
        for name, tensor in load_file(path).items()
    }


def same_tensors(one: Path, other: Path, pattern: str) -> None:
    ours, theirs = tensors(one, pattern), tensors(other, pattern)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_two_processes_make_the_images_of_one(runs):
    alone, both, _ = runs
    for side in ("fp", "quantized"):
        same_images(alone / "images" / side, both / "images" / side)
        same_tensors(alone, both, f"images/{side}/*.latent.safetensors")


def test_two_processes_capture_the_calibration_data_of_one(runs):
    alone, both, _ = runs
    (data,) = (alone / "calibration" / "data").iterdir()
    twin = both / data.relative_to(alone)
    shards = sorted(path.name for path in data.glob("*.safetensors"))
    assert len(shards) == 3
    assert [path.name for path in sorted(twin.iterdir())] == [path.name for path in sorted(data.iterdir())]
    assert (data / "index.json").read_text() == (twin / "index.json").read_text()
    assert all((data / name).read_bytes() == (twin / name).read_bytes() for name in shards)


def test_two_processes_learn_the_codes_of_one(runs):
    alone, both, _ = runs
    same_tensors(alone, both, "model/transformer/*.safetensors")


def test_two_processes_report_the_scores_of_one(runs):
    alone, both, _ = runs
    reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, both)]
    metrics = [report["recipes"]["small"]["metrics"] for report in reports]
    assert metrics[0] == metrics[1]
    assert 10 < metrics[0]["psnr"]["value"] < 100
    assert metrics[0]["clip_score"]["images"] == len(PROMPTS)


def test_only_the_main_process_talks_and_keeps_records(runs):
    _, both, printed = runs
    assert printed.stdout.count("full-precision images: 5 in") == 1
    assert printed.stdout.count("calibration data: 5 prompts") == 1
    assert "process 1" not in printed.stderr
    log = (both / "log.txt").read_text()
    assert log.count("scores:") == 1
    seconds = json.loads((both / "state.json").read_text())["notes"]
    assert len(seconds["seconds_fp"]) == len(seconds["seconds_quantized"]) == len(PROMPTS)


def test_two_processes_find_done_what_one_did(runs, given):
    alone, *_ = runs
    before = {path: path.stat().st_mtime_ns for path in alone.glob("images/*/*.png")}
    said = succeed(started(["-m", "dmquant", *run_options(given, alone)]))
    assert "model: already there" in said
    assert "scores: already there" in said
    assert {path: path.stat().st_mtime_ns for path in alone.glob("images/*/*.png")} == before


def test_wrong_usage_is_said_once(given, tmp_path):
    status, _, err = finish(started(["-m", "dmquant", *run_options(given, tmp_path / "out"), "--metrics", "pnsr"]))
    said = [line for line in err.splitlines() if "unknown metric" in line]
    assert len(said) == 1
    assert said[0].startswith("error: unknown metric 'pnsr'")
    assert status == 2
    assert not (tmp_path / "out").exists()


def test_a_failure_of_one_process_alone_names_it_and_ends_all(tmp_path):
    script = """
        import sys
        from dmquant.host import processes
        processes.GRACE = 1.0
        with processes.joined() as everyone:
            print("said by", everyone.rank)
            if everyone.rank == 1:
                print("error: no memory left", file=sys.stderr)
                sys.exit(1)
            everyone.wait()
            print("never said")
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    began = time.monotonic()
    ended = subprocess.run(
        [*LAUNCH, str(tmp_path / "script.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert time.monotonic() - began < PATIENCE / 2
    assert ended.returncode != 0
    assert ended.stdout.split("\n") == ["said by 0", ""]
    assert ended.stderr.count("process 1 of 2: error: no memory left") == 1
    assert "Connection closed" not in ended.stderr


@pytest.mark.slow
def test_a_killed_run_of_two_is_finished_by_either_number(runs, given, tmp_path):
    whole, *_ = runs
    out = tmp_path / "out"
    running = started(["-m", "tests.models.paused", 1, *run_options(given, out)])
    try:
        wait_until(lambda: list(out.glob("images/fp/*.png")), running[0], PATIENCE)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # as a batch system does; the launcher passes it on
            process.wait(PATIENCE)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("images/fp/*.png")}
    assert 0 < len(kept) < len(PROMPTS)
    succeed(started(["-m", "dmquant", *run_options(given, out)]))
    assert {name: (out / "images" / "fp" / name).stat().st_mtime_ns for name in kept} == kept
    for side in ("fp", "quantized"):
        same_images(out / "images" / side, whole / "images" / side)


@pytest.mark.slow
def test_in_a_comparison_of_two_processes_a_recipe_that_fails_does_not_stop_the_others(given, tmp_path):
    broken = RECIPE | {"name": "broken", "rules": [{"match": "*", "keep": True}]}  # found when nothing is left to learn
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    arguments = ["compare", str(given / "tiny"), "--recipes", f"{tmp_path / 'broken.yaml'},{given / 'small.yaml'},rtn"]
    arguments += [*options(given), "--metrics", "psnr", "--out", str(tmp_path / "out")]
    status, out, err = finish(started(["-m", "dmquant", *arguments]))
    assert status == 1
    assert out.count("recipe broken failed") == 1
    assert err.count("error: 1 of 3 recipes failed (broken)") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(report["recipes"]) == ["rtn", "small"]
