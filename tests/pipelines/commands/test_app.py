"""The command line: instant help, and one clear line with the right exit code for everything that can be wrong."""

import errno
import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmquant.pipelines.commands import app as cli
from dmquant.pipelines.runs import file_recipe
from dmquant.pipelines.runs.bounds import parse_size
from dmquant.pipelines.runs.defaults import DEFAULT_RECIPE, PURPOSES, named_recipe
from dmquant.recipe import recipe_names
from tests.tiny import tiny_dit, tiny_pixart, tiny_sd

COMMANDS = [command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands]
HEAVY = ("torch", "diffusers", "transformers", "torchmetrics", "pydantic", "rich", "yaml")
HELP_COST = 1.5  # times what typer and rich take to be imported, as typer uses rich for help


def dmquant(capsys, *arguments):
    """Run the command in this process: exit code, standard output, standard error."""
    sys.argv = ["dmquant", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pixart(folder)
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments):
    typer_alone = "import time, typer.rich_utils, rich.table; print(time.process_time())"
    alone = subprocess.run([sys.executable, "-c", typer_alone], capture_output=True, text=True, check=True)
    script = (
        "import sys, time\n"
        f"sys.argv = ['dmquant', *{arguments}]\n"
        "from dmquant.pipelines.commands.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('imported', [name for name in {HEAVY} if name in sys.modules], time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    imported, seconds = done.stderr.removeprefix("imported ").rsplit(" ", 1)
    assert imported == "[]"
    assert float(seconds) < HELP_COST * float(alone.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, command):
    code, out, _ = dmquant(capsys, command, "--help")
    assert code == 0
    assert f"dmquant {command}" in out.partition("Examples")[2]


@pytest.mark.parametrize("command", ["models", "formats", "recipes"])
def test_the_lists_name_what_there_is(capsys, command):
    code, out, _ = dmquant(capsys, command)
    assert code == 0
    expected = {"models": "emoji-pixart", "formats": "fp6_e2m3", "recipes": "w4a6"}
    assert expected[command] in out


RECIPES = {
    "group.yaml": b"name: x\ngranularity: group:99999999999999999999999\n",
    "name.yaml": b'name: "a\\nb"\n',
    "empty.yaml": b"",
    "latin.yaml": b"name: \xff\n",
}
WRONG_USAGE = {
    "unknown model": (["emoji-pixar"], "did you mean 'emoji-pixart'?"),
    "unknown weight format": (["MODEL", "--w", "fp44"], "did you mean 'fp4'?"),
    "unknown activation format": (["MODEL", "--a", "e2m3"], "unknown format"),
    "unknown recipe": (["MODEL", "--recipe", "rtm"], "did you mean 'rtn'?"),
    "unknown purpose": (["MODEL", "--for", "sped"], "did you mean 'speed'?"),
    "formats that an engine does not run": (["MODEL", "--for", "torchao", "--w", "fp6"], "torchao runs no weights"),
    "recipe and purpose": (["MODEL", "--for", "speed", "--recipe", "rtn"], "leave out --recipe rtn, or --for"),
    "unknown metric": (["MODEL", "--metrics", "psnr,sim"], "did you mean 'ssim'?"),
    "unknown CLIP model": (["MODEL", "--metrics", "clip_score", "--clip", "ViT-B-33"], "unknown CLIP model 'ViT-B-33'"),
    "a long name for a CLIP model": (["MODEL", "--metrics", "clip_score", "--clip", "x" * 300], "unknown CLIP model"),
    "no metric": (["MODEL", "--metrics", ","], "--metrics is empty"),
    "unknown prompt set": (["MODEL", "--prompts", "emojo"], "did you mean 'emoji'?"),
    "too many prompts": (["MODEL", "--num-prompts", "1000000"], "1000000 prompts asked for"),
    "unknown device": (["MODEL", "--device", "gpu"], "unknown device 'gpu'"),
    "unknown dtype": (["MODEL", "--dtype", "fp64"], "unknown dtype 'fp64'"),
    "odd size": (["MODEL", "--height", "33"], "not a multiple of 8"),
    "height of a million": (["MODEL", "--height", "1000000"], "--height 1000000 is more than this takes: 16384"),
    "a hundred million pixels": (["MODEL", "--height", "16000", "--width", "8000"], "more than 67 million pixels"),
    "a billion steps": (["MODEL", "--steps", "1000000000"], "--steps 1000000000 is more"),
    "a billion prompts": (["MODEL", "--num-prompts", "1000000000"], "--num-prompts 1000000000 is more"),
    "a seed of 65 bits": (["MODEL", "--seed", str(2**64)], "--seed 18446744073709551616 is more"),
    "guidance of infinity": (["MODEL", "--guidance", "inf"], "--guidance inf is more"),
    "guidance that is no number": (["MODEL", "--guidance", "nan"], "--guidance"),
    "no such option": (["MODEL", "--stepz", "3"], "--steps"),
    "an endless format": (["MODEL", "--w", "int" + "9" * 5000], "unknown format"),
    "an endless group": (["MODEL", "--recipe", "group.yaml"], "unknown granularity 'group:99999999999999999999999'"),
    "an endless budget": (["MODEL", "--memory-budget", "9" * 400 + "GB"], "write it as 8GB"),
    "a recipe of a name with a line break": (["MODEL", "--recipe", "name.yaml"], "a name is one line"),
    "an empty recipe": (["MODEL", "--recipe", "empty.yaml"], "empty.yaml holds no settings"),
    "a recipe that is not UTF-8": (["MODEL", "--recipe", "latin.yaml"], "it is not UTF-8 text"),
    "no size": (["MODEL", "--memory-budget", "8 apples"], "write it as 8GB"),
    "no memory": (["MODEL", "--memory-budget", "0GB"], "write it as 8GB"),
    "unknown family": (["MODEL", "--family", "pixarts"], "did you mean 'pixart'?"),
    "family of another backbone": (["MODEL", "--family", "unet"], "has no unet"),
    "calibration of an unknown backbone": (["MODEL", "--family", "generic", "--recipe", "fp4dit"], "use --recipe rtn"),
    "unknown calibration prompts": (["MODEL", "--calibration-prompts", "emojo"], "did you mean 'emoji'?"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG_USAGE.values(), ids=WRONG_USAGE)
def test_wrong_usage_is_one_line_exits_with_2_and_writes_nothing(capsys, model, tmp_path, arguments, says):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    for name, content in RECIPES.items():
        Path(name).write_bytes(content)
    _fails(dmquant(capsys, "run", *arguments, "--out", "run"), 2, says)
    assert {path.name for path in tmp_path.iterdir()} == RECIPES.keys()


@pytest.mark.parametrize(
    ("command", "variable", "word"),
    [
        ("run", "KERNEL", "reference"),
        ("generate", "KERNEL", "reference"),
        ("quantize", "WEIGHTS", "memory"),
        ("tune", "KERNEL", "reference"),
        ("compare", "MAX_CPU_ISA", "portable"),
    ],
)
def test_an_unknown_word_for_kernels_is_said_before_any_work(capsys, model, monkeypatch, command, variable, word):
    monkeypatch.setenv(f"DMQUANT_{variable}", word[:-1])
    recipes = ["--recipes", "rtn"] if command == "compare" else []
    _fails(dmquant(capsys, command, model, *recipes, "--out", "made"), 2, f"did you mean '{word}'?")
    assert not Path("made").exists()


def test_images_do_not_go_into_a_file(capsys, model):
    Path("made").write_text("mine")
    _fails(dmquant(capsys, "generate", model, "--out", "made"), 1, "made is a file; choose another folder with --out")


WRONG_RECIPES = {
    "none": (",", "--recipes is empty"),
    "unknown": ("rtn,rtm", "did you mean 'rtn'?"),
    "unknown format": ("rtn:fp44", "did you mean 'fp4'?"),
    "too many parts": ("rtn:fp4:fp6:fp8", "RECIPE:WEIGHTS:ACTIVATIONS"),
    "two of one name": ("rtn,./mine.yaml", "two of the recipes are called 'rtn'"),
}


@pytest.mark.parametrize(("recipes", "says"), WRONG_RECIPES.values(), ids=WRONG_RECIPES)
def test_a_wrong_list_of_recipes_is_one_line_exits_with_2_and_writes_nothing(capsys, model, recipes, says):
    Path("mine.yaml").write_text("name: rtn\nweights: fp4\n")
    _fails(dmquant(capsys, "compare", model, "--recipes", recipes, "--out", "run"), 2, says)
    assert not Path("run").exists()


WRONG_SWEEPS = {
    "bits": (["--bits", "3-9"], 2, "write bits from 2 to 8"),
    "16 bits of weights": (["--w-bits", "16"], 2, "write bits from 2 to 8"),
    "no bits": (["--a-bits", ","], 2, "--a-bits is empty"),
    "no pair": (["--w-bits", "8", "--a-bits", "4"], 2, "no pair of formats is left"),
    "no formats": (["--formats", ","], 2, "--formats is empty"),
    "unknown format": (["--formats", "fp44"], 2, "did you mean 'fp4'?"),
    "unknown technique": (["--techniques", "rtn,defalt"], 2, "did you mean 'default'?"),
    "no technique": (["--techniques", ","], 2, "--techniques is empty"),
    "two of one name": (["--techniques", "rtn,./mine.yaml"], 2, "two of the techniques are called 'rtn'"),
    "unknown metric": (["--metrics", "pnsr"], 2, "did you mean 'psnr'?"),
    "unknown engine": (["--engine", "dask"], 2, "the engines are local, ray"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), WRONG_SWEEPS.values(), ids=WRONG_SWEEPS)
def test_a_wrong_sweep_is_one_line_and_writes_nothing(capsys, model, arguments, code, says):
    Path("mine.yaml").write_text("name: rtn\nweights: fp4\n")
    _fails(dmquant(capsys, "sweep", model, *arguments, "--out", "run"), code, says)
    assert not Path("run").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_a_sweep_on_ray_where_it_is_missing(capsys, model):
    _fails(dmquant(capsys, "sweep", model, "--engine", "ray", "--out", "run"), 1, "pip install 'dmquant[ray]'")
    assert not Path("run").exists()


def test_the_trials_of_a_sweep_can_be_listed_before(capsys, model):
    code, out, err = dmquant(capsys, "sweep", model, "--bits", "4", "--a-bits", "8,16", "--formats", "int", "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["rtn  int4  int8", "rtn  int4  none", "2 trials (2 INT) with rtn"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8_000_000_000), ("512MB", 512_000_000), ("1.5GiB", 3 << 29), ("2 gib", 2 << 30), ("64k", 64_000)],
)
def test_a_memory_budget_is_read_in_decimal_or_binary_units(text, count):
    assert parse_size(text, "--memory-budget") == count


def test_the_recipes_say_whether_they_need_data_and_how_they_round(capsys):
    out = dmquant(capsys, "recipes")[1]
    row = next(line for line in out.splitlines() if line.startswith("│ rtn "))
    assert [cell.strip() for cell in row.split("│")[1:7]] == [
        *("rtn", "data-free", "nearest", "nl4", "fp6_e2m3", "group:32")
    ]
    assert f"--recipe is {DEFAULT_RECIPE}" in out


@pytest.mark.parametrize("purpose", PURPOSES)
def test_what_a_recipe_is_for_names_one_that_there_is(purpose):
    assert named_recipe(None, purpose) in recipe_names()


@pytest.mark.parametrize("command", ["run", "quantize"])
def test_help_names_the_recipe_that_is_the_default(capsys, command):
    assert f"default: {DEFAULT_RECIPE}]" in dmquant(capsys, command, "--help")[1]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: mine\nweights: fp4\nwieghts: fp6\n", 3, "did you mean 'weights'?"),
        ("name: mine\nrules:\n  - match: 'a*'\n    keep: [1]\n", 4, "keep"),
        ("name: mine\nweights: fp99\n", 2, "fp99"),
        ("name: [mine\n", 2, "not valid YAML"),
    ],
)
def test_a_bad_recipe_file_is_named_with_its_line(capsys, model, tmp_path, text, line, says):
    (tmp_path / "mine.yaml").write_text(text)
    result = dmquant(capsys, "run", model, "--recipe", "mine.yaml", "--out", "run")
    _fails(result, 2, says)
    assert f"mine.yaml, line {line}" in result[2]
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file(capsys, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n# nothing yet\n")
    _fails(dmquant(capsys, "run", model, "--prompts", "prompts.txt", "--out", "run"), 1, "holds no prompts")
    assert not (tmp_path / "run").exists()


def test_a_recipe_file_that_is_not_there(capsys, model):
    _fails(dmquant(capsys, "run", model, "--recipe", "mine.yaml", "--out", "run"), 1, "no recipe file mine.yaml")
    assert not Path("run").exists()


def test_a_folder_of_real_images_without_any(capsys, model, tmp_path):
    (tmp_path / "photos").mkdir()
    _fails(dmquant(capsys, "run", model, "--real", "photos", "--out", "run"), 1, "no image in photos")
    assert not (tmp_path / "run").exists()


def test_a_home_that_nobody_has_is_no_folder(capsys):
    _fails(dmquant(capsys, "run", "~nobody-here/model"), 1, "there is no folder ~nobody-here/model")
    _fails(dmquant(capsys, "run", "emoji-pixart", "--prompts", "~nobody-here/p.txt"), 1, "there is no file")


def test_a_folder_that_is_no_pipeline(capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    for command in (["run", "folder", "--out", "out"], ["inspect", "folder"], ["quantize", "folder", "--out", "out"]):
        _fails(dmquant(capsys, *command), 1, "no diffusers pipeline")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_truncated(capsys, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for command in (["run", "broken", "--out", "out"], ["inspect", "broken"], ["generate", "broken", "--out", "out"]):
        _fails(dmquant(capsys, *command), 1, "truncated or damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(capsys, model, tmp_path):
    _fails(dmquant(capsys, "run", model, "--device", "cuda", "--out", "run"), 1, "use --device cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "model", "--num-prompts", "0"], ["fly"], ["run", "m", "--stepz"]]
)
def test_what_the_parser_refuses_exits_with_2(capsys, arguments):
    code, out, err = dmquant(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(" --help\n")
    assert err.count("\n") == 1


def test_an_unexpected_error_is_one_line_and_debug_shows_the_traceback(capsys, monkeypatch):
    from dmquant.pipelines.commands import listing

    def broken():
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(listing, "formats", broken)
    _fails(dmquant(capsys, "formats"), 1, "ZeroDivisionError: division by zero (rerun with --debug for the traceback)")
    code, _, err = dmquant(capsys, "formats", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in broken" in err


FORESEEN = {
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "w.bin"),
        "w.bin: Permission denied; change its",
    ),
    "a read-only disk": (
        OSError(errno.EROFS, "Read-only file system", "out"),
        "out: Read-only file system; name one on",
    ),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x: File name too long; give it a shorter"),
    "no memory": (MemoryError(), "there is not enough memory: take a smaller --batch-size"),
    "no memory in torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
}


@pytest.mark.parametrize(("error", "says"), FORESEEN.values(), ids=FORESEEN)
def test_what_an_operating_system_refuses_is_one_line_that_says_what_to_do(capsys, monkeypatch, error, says):
    from dmquant.pipelines.commands import listing

    def broken():
        raise error

    monkeypatch.setattr(listing, "formats", broken)
    _fails(dmquant(capsys, "formats"), 1, says)


def test_ctrl_c_inside_a_library_that_puts_its_own_error_in_its_place(capsys, monkeypatch):
    from dmquant.pipelines.commands import listing

    def broken():
        raise ValueError("could not serialize: KeyboardInterrupt: ")

    monkeypatch.setattr(listing, "formats", broken)
    assert dmquant(capsys, "formats") == (130, "", "stopped; run the same command to resume\n")


def test_an_error_shows_no_escape_sequences_and_is_bounded(capsys, model):
    _fails(dmquant(capsys, "run", model, "--recipe", "\x1b[31m/x\n"), 1, "no recipe file \\u001b[31m/x")
    code, _, err = dmquant(capsys, "run", "m" * 100_000)
    assert (code, len(err) < 2100) == (2, True)


def test_a_recipe_that_compiles_needs_a_compiler(capsys, model, monkeypatch):
    monkeypatch.setattr(file_recipe, "missing_to_compile", lambda: "a C++ compiler: install g++ or clang")
    Path("mine.yaml").write_text("name: x\nrounding: adaround\nlearning: {compile: true}\n")
    _fails(dmquant(capsys, "run", model, "--recipe", "mine.yaml"), 1, "learning: compile, for which this machine lacks")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_one_line_and_exit_with_130(capsys, monkeypatch, number):
    from dmquant.pipelines.commands import listing

    given = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
    before = signal.signal(number, given)  # what starts the tests may have SIGINT ignored
    try:
        monkeypatch.setattr(listing, "formats", lambda: signal.raise_signal(number))
        assert dmquant(capsys, "formats") == (130, "", "stopped; run the same command to resume\n")
        assert signal.getsignal(number) == given
    finally:
        signal.signal(number, before)


def test_score_and_grid_work_on_any_two_folders_that_pair_up(capsys, tmp_path):
    for side, grey in (("fp", 100), ("quantized", 110)):
        (tmp_path / side).mkdir()
        for name in ("00000.png", "00001.png"):
            Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / side / name)
    code, out, _ = dmquant(capsys, "score", "fp", "quantized", "--metrics", "psnr")
    assert code == 0
    assert "28.13 dB" in out  # 20 log10(255 / 10)
    _fails(
        dmquant(capsys, "grid", "fp", "quantized", "--out", f"{'x' * 300}.png"), 1, "too long; give it a shorter name"
    )
    code, _, _ = dmquant(capsys, "grid", "fp", "quantized", "--out", "pairs.png", "--rows", "2")
    assert code == 0
    assert Image.open("pairs.png").width > 3 * 32
    assert dmquant(capsys, "grid", "fp", "quantized", "--out", "pairs.png")[0] == 0
    _fails(dmquant(capsys, "grid", "fp", "quantized", "--out", "fp/00000.png"), 1, "dmquant did not draw it")
    Path("book.csv").write_text("a,b\n")
    score = ("score", "fp", "quantized", "--metrics", "psnr", "--csv")
    _fails(dmquant(capsys, *score, "book.csv"), 1, "book.csv is there, and is no table of scores")
    assert [dmquant(capsys, *score, "scores.csv")[0] for _ in range(2)] == [0, 0]
    assert Path("book.csv").read_text() == "a,b\n"
    (tmp_path / "quantized" / "00001.png").unlink()
    _fails(dmquant(capsys, "score", "fp", "quantized"), 1, "lacks 1 of 2 images")


@pytest.mark.parametrize("command", ["score", "grid"])
def test_images_are_not_compared_with_themselves(capsys, tmp_path, command):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "0.png")
    (tmp_path / "b").symlink_to("a")
    for other in ("a", "b"):
        _fails(dmquant(capsys, command, "a", other), 2, f"a and {other} are one folder")


def test_the_report_of_a_folder_without_a_run(capsys, tmp_path):
    _fails(dmquant(capsys, "report", tmp_path), 1, "holds no run")


def test_quantize_writes_a_model_that_inspect_describes_and_generate_uses(capsys, model, tmp_path):
    code, _, err = dmquant(capsys, "quantize", model, "--recipe", "rtn", "--w", "fp4", "--a", "none", "--out", "q")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path().iterdir()) == ["q"]
    code, out, _ = dmquant(capsys, "inspect", "q", "--layers")
    assert code == 0
    assert "fp4_e2m1" in out
    assert "transformer_blocks.0.attn1.to_q" in out
    code, out, err = dmquant(
        capsys, "generate", "q", "--prompts", "emoji", "--num-prompts", 2, "--steps", 1, "--out", "images"
    )
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path("images").glob("*.png")) == ["00000.png", "00001.png"]
    _fails(dmquant(capsys, "quantize", model, "--out", "q"), 1, "--overwrite")
    _fails(dmquant(capsys, "quantize", model, "--out", "images", "--overwrite"), 1, "something else than a pipeline")
    _fails(dmquant(capsys, "run", "q", "--out", "run"), 1, "already quantized")
    assert dmquant(capsys, "quantize", model, "--recipe", "rtn", "--w", "int8", "--out", "q", "--overwrite")[0] == 0
    assert "int8" in dmquant(capsys, "inspect", "q")[1]


def test_a_saved_model_of_which_a_bit_has_flipped_is_refused_and_the_tensor_named(capsys, model):
    dmquant(capsys, "quantize", model, "--recipe", "rtn", "--out", "q")
    code, out, _ = dmquant(capsys, "inspect", "q", "--verify")
    assert code == 0
    assert "q is what was saved: " in out
    weights = Path("q/text_encoder/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    generate = ["generate", "q", "--num-prompts", 1, "--steps", 1, "--out", "images"]
    _fails(dmquant(capsys, *generate), 1, "q: text_encoder/model.safetensors is not what was saved: tensor 'shared.w")
    code, out, err = dmquant(capsys, "inspect", "q", "--verify")
    assert code == 1
    assert "text_encoder/model.safetensors is not what was saved: tensor 'shared.weight'" in " ".join(out.split())
    assert err.startswith("error: q is not what was saved, in 1 place")
    Path("q/checksums.json").unlink()
    _fails(dmquant(capsys, "inspect", "q", "--verify"), 1, "q has no checksums.json to verify it by")
    assert dmquant(capsys, *generate)[0] == 0


def test_a_pipeline_of_no_family_goes_through_the_generic_one(capsys, tmp_path):
    tiny_sd(tmp_path / "strange")
    index = tmp_path / "strange" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionPAGPipeline"'))
    rtn = ["--recipe", "rtn", "--out", "q"]
    _fails(dmquant(capsys, "quantize", "strange", *rtn), 1, "--family generic --recipe rtn")
    _fails(dmquant(capsys, "quantize", "strange", "--family", "generic", "--out", "q"), 2, "use --recipe rtn")
    assert "no family knows" not in dmquant(capsys, "inspect", "strange")[1]  # the UNet itself is known
    code, _, err = dmquant(capsys, "quantize", "strange", "--family", "generic", *rtn)
    assert (code, err) == (0, "")
    out = dmquant(capsys, "inspect", "q", "--layers")[1]
    assert "unet: recipe rtn" in out
    assert "down_blocks.0.resnets.0.conv1" in out
    assert "conv_in" not in out
    images = ["--num-prompts", 1, "--steps", 1, "--out", "images"]
    _fails(dmquant(capsys, "generate", "q", *images), 1, "no model family knows")
    assert dmquant(capsys, "generate", "q", "--family", "generic", *images)[0] == 0
    assert Path("images/00000.png").is_file()


def test_options_that_a_pipelines_call_does_not_take(capsys, tmp_path):
    tiny_dit(tmp_path / "dit")
    for height, code in ((64, 2), (32, 0)):
        result = dmquant(capsys, "quantize", "dit", "--recipe", "rtn", "--height", height, "--out", "q")
        assert result[0] == code
        if code:
            _fails(result, code, "a DiTPipeline takes no height; dit makes images of 32x32")
    of_videos = dmquant(capsys, "quantize", "dit", "--recipe", "rtn", "--frames", 5, "--out", "q")
    _fails(of_videos, 2, "--frames 5: a DiTPipeline takes no frames")


def test_inspect_asks_which_model_of_a_comparison(capsys, model):
    Path("both/recipes/rtn").mkdir(parents=True)
    Path("both/state.json").write_text("{}")
    _fails(dmquant(capsys, "inspect", "both"), 1, "compares several models: name one, both/recipes/NAME/model")


def test_inspect_says_what_a_family_keeps_and_why(capsys, model):
    out = dmquant(capsys, "inspect", model)[1]
    assert "PixArtTransformer2DModel, family pixart" in out
    assert "adaln_single.*" in out
    assert "scale and shift of every block" in " ".join(out.split())


def test_a_run_goes_to_a_folder_named_after_it_and_its_report_can_be_written_again(capsys, model):
    arguments = ["--recipe", "rtn", "--num-prompts", 2, "--steps", 1, "--metrics", "psnr"]
    code, out, err = dmquant(capsys, "run", model, "--w", "int8", "--a", "none", *arguments)
    assert (code, err) == (0, "")
    assert "PSNR" in out
    folder = Path("runs/tiny-rtn-int8-none")
    before = (folder / "report.json").read_text()
    (folder / "report.json").unlink()
    assert dmquant(capsys, "report", folder)[0] == 0
    assert (folder / "report.json").read_text() == before
    assert "int8" in dmquant(capsys, "inspect", folder)[1]


def _fails(result, exit_code, says):
    """One line on standard error, nothing on standard output."""
    code, out, err = result
    assert code == exit_code
    assert says in err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert out == ""
