"""The kinds of files that are damaged, and what then reads them."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.fuzz.mutations import PIECES, damaged_bytes, damaged_value

LAYERS = ("transformer_blocks.0.attn1.to_q", "proj_out", "pos_embed.proj")
SEALED_AGAIN = 0.3  # share of damaged records that carry the hash that belongs to them


@dataclass(frozen=True)
class Target:
    """A kind of file; `weight` is its share of all cases, and `case` damages one and reads it."""

    name: str
    weight: int
    case: Callable[[random.Random, Path, Path], None]
    """Called with the numbers to draw from, a folder to work in and the folder with what is damaged, unchanged."""


def recipe(drawn: random.Random, folder: Path, given: Path) -> None:
    """A recipe file."""
    from dmquant.recipe import Recipe

    seeds = sorted((given / "recipes").glob("*.yaml"))
    text = drawn.choice(seeds).read_bytes()
    if drawn.random() < 0.5:
        text = _written(damaged_value(yaml.safe_load(text), drawn), drawn)
    if drawn.random() < 0.5:
        text = damaged_bytes(text, drawn)
    if drawn.random() < 0.05:
        text = _bomb(drawn)
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    loaded = Recipe.load(path)
    loaded.settings_by_layer(LAYERS)
    loaded.to_dict()


def prompts(drawn: random.Random, folder: Path, given: Path) -> None:
    """A list of prompts."""
    from dmquant.pipelines.prompts.lists import read_prompts

    seed = drawn.choice(sorted((given / "prompts").iterdir()))
    data = seed.read_bytes()
    if seed.suffix in (".json",) and drawn.random() < 0.6:
        data = json.dumps(damaged_value(json.loads(data), drawn)).encode("utf-8", "surrogatepass")
    elif drawn.random() < 0.1:
        data = b"".join(drawn.choice((*PIECES, b"a red apple", b"prompt")) for _ in range(drawn.randrange(40)))
    if drawn.random() < 0.6:
        data = damaged_bytes(data, drawn)
    path = folder / f"prompts{seed.suffix}"
    path.write_bytes(data)
    column = drawn.choice(("", "", ":prompt", ":id", ":nothing"))
    read_prompts(f"{path}{column}").describe()


def state(drawn: random.Random, folder: Path, given: Path) -> None:
    """The memory of a run, state.json."""
    from dmquant.host.files import json_sha256

    original = json.loads((given / "out" / "state.json").read_text("utf-8"))
    value = damaged_value(original, drawn)
    if isinstance(value, dict) and drawn.random() < SEALED_AGAIN:
        value.pop("sha256", None)
        with contextlib.suppress(ValueError, TypeError):
            value["sha256"] = json_sha256(value)
    data = json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
    _report(drawn, folder, given, "state.json", data)


def run_yaml(drawn: random.Random, folder: Path, given: Path) -> None:
    """The settings of a run, run.yaml."""
    data = (given / "out" / "run.yaml").read_bytes()
    if drawn.random() < 0.6:
        data = _written(damaged_value(yaml.safe_load(data), drawn), drawn)
    _report(drawn, folder, given, "run.yaml", data)


def scores(drawn: random.Random, folder: Path, given: Path) -> None:
    """The scores of the images of a run, scores.csv."""
    from dmquant.evaluation.scores_csv import read_scores

    data = (given / "out" / "scores.csv").read_bytes()
    if drawn.random() < 0.8:
        path = folder / "scores.csv"
        path.write_bytes(damaged_bytes(data, drawn))
        read_scores(path)
        return
    _report(drawn, folder, given, "scores.csv", damaged_bytes(data, drawn))


def config(drawn: random.Random, folder: Path, given: Path) -> None:
    """A configuration of a quantized model."""
    names = sorted(path.relative_to(given / "model") for path in (given / "model").rglob("*.json"))
    name = drawn.choice([*names, *[Path("transformer/config.json")] * len(names)])
    data = (given / "model" / name).read_bytes()
    if drawn.random() < 0.75:
        data = json.dumps(damaged_value(json.loads(data), drawn)).encode("utf-8", "surrogatepass")
    else:
        data = damaged_bytes(data, drawn)
    _model(drawn, folder, given, name, data)


def header(drawn: random.Random, folder: Path, given: Path) -> None:
    """The header of a safetensors file of a quantized model."""
    names = sorted(path.relative_to(given / "model") for path in (given / "model").rglob("*.safetensors"))
    name = drawn.choice([*names, *[Path("transformer/diffusion_pytorch_model.safetensors")] * len(names)])
    whole = (given / "model" / name).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    text = whole[8:end]
    text = (
        json.dumps(damaged_value(json.loads(text), drawn)).encode()
        if drawn.random() < 0.7
        else damaged_bytes(text, drawn)
    )
    length = len(text) if drawn.random() < 0.9 else drawn.choice((0, 1, end, 2**31, 2**63 - 1, 10**9))
    data = length.to_bytes(8, "little") + text + whole[end:]
    _model(drawn, folder, given, name, data)


def checksums(drawn: random.Random, folder: Path, given: Path) -> None:
    """The checksums of a saved model."""
    from dmquant.pipelines.commands import listing

    data = (given / "out" / "model" / "checksums.json").read_bytes()
    if drawn.random() < 0.6:
        data = json.dumps(damaged_value(json.loads(data), drawn)).encode("utf-8", "surrogatepass")
    if drawn.random() < 0.5:
        data = damaged_bytes(data, drawn)
    model = folder / "verified"
    if not model.exists():
        shutil.copytree(given / "out" / "model", model)
    (model / "checksums.json").write_bytes(data)
    listing.verify(model)


def manifest(drawn: random.Random, folder: Path, given: Path) -> None:
    """The manifest of the files of a run."""
    from dmquant.host import owned

    out = folder / "owned"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(given / "out" / ".dmquant", out / ".dmquant")
    (out / "run.yaml").write_text("a user's")
    path = out / ".dmquant" / "manifest.jsonl"
    lines = path.read_text("utf-8").splitlines()[:20]
    value = damaged_value([json.loads(line) for line in lines], drawn)
    data = "".join(json.dumps(one) + "\n" for one in (value if isinstance(value, list) else [value])).encode()
    path.write_bytes(damaged_bytes(data, drawn) if drawn.random() < 0.5 else data)
    with owned.claimed(out) as ours:
        ours.clear()
    if (out / "run.yaml").read_text() != "a user's":
        raise AssertionError("a file of the user's is gone")


def sealed(drawn: random.Random, folder: Path, given: Path) -> None:
    """Tensors that carry a hash of themselves: latents, trajectories, a probe, codes."""
    from dmquant.host.sealed import load_sealed

    seeds = sorted((given / "out").rglob("*.safetensors"))
    path = folder / "sealed.safetensors"
    path.write_bytes(damaged_bytes(drawn.choice(seeds).read_bytes()[: 1 << 16], drawn))
    load_sealed(path)


def picture(drawn: random.Random, folder: Path, given: Path) -> None:
    """An image of a run."""
    from dmquant.evaluation.images import load_image
    from dmquant.evaluation.png import read_key, read_prompt

    path = folder / "picture.png"
    path.write_bytes(damaged_bytes((given / "out" / "images" / "fp" / "00000.png").read_bytes(), drawn))
    read_key(path)
    read_prompt(path)
    load_image(path)


TARGETS = {
    target.name: target
    for target in (
        Target("recipe", 30, recipe),
        Target("prompts", 28, prompts),
        Target("state", 8, state),
        Target("run.yaml", 6, run_yaml),
        Target("scores", 8, scores),
        Target("config", 4, config),
        Target("header", 4, header),
        Target("checksums", 3, checksums),
        Target("manifest", 3, manifest),
        Target("sealed", 3, sealed),
        Target("picture", 3, picture),
    )
}


def prepare(given: Path, run: Path, recipes: Path) -> None:
    """Fill the folder `given` with what is damaged: a finished run, its model, recipes and lists of prompts."""
    shutil.copytree(run / "out", given / "out")
    shutil.copytree(run / "out" / "model", given / "model")
    for name in ("checksums.json", "README.md"):  # with them every change is noticed at once, which other trials hold
        (given / "model" / name).unlink(missing_ok=True)
    (given / "recipes").mkdir()
    for path in recipes.glob("*.yaml"):
        shutil.copy(path, given / "recipes")
    lists = given / "prompts"
    lists.mkdir()
    table = [{"id": index, "prompt": f"a red apple {index}", "style": "photo"} for index in range(4)]
    (lists / "plain.txt").write_text("a red apple\n# 1 fan\n\na; blue cat\n")
    (lists / "table.csv").write_text('id,prompt\n1,a red apple\n2,"a cat, blue"\n')
    (lists / "table.tsv").write_text("id\tprompt\n1\ta red apple\n2\ta blue cat\n")
    (lists / "list.json").write_text(json.dumps([row["prompt"] for row in table]))
    (lists / "rows.json").write_text(json.dumps(table))
    (lists / "captions.json").write_text(json.dumps({"1": "a red apple", "2": "a blue cat"}))
    coco = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 7, "caption": "a red apple"}]}
    (lists / "coco.json").write_text(json.dumps(coco))
    (lists / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def _written(value: Any, drawn: random.Random) -> bytes:
    """A value as YAML, or as the JSON that YAML takes too."""
    text = json.dumps(value)
    if drawn.random() < 0.5:
        with contextlib.suppress(RecursionError):
            text = yaml.safe_dump(value, sort_keys=False)
    return text.encode("utf-8", "surrogatepass")


def _report(drawn: random.Random, folder: Path, given: Path, name: str, data: bytes) -> None:
    """Write the reports of a run again, one of whose files is damaged."""
    from dmquant.pipelines.commands import stages

    out = folder / "out"
    if not out.exists():
        shutil.copytree(given / "out", out)
    if drawn.random() < 0.4:
        data = damaged_bytes(data, drawn)
    try:
        (out / name).write_bytes(data)
        stages.report(out)
    finally:
        shutil.copy(given / "out" / name, out / name)


def _model(drawn: random.Random, folder: Path, given: Path, name: Path, data: bytes) -> None:
    """Look at a model, one of whose files is damaged, or make an image with it."""
    from dmquant.pipelines.commands import listing, stages
    from dmquant.pipelines.runs.settings import Options, resolve

    model = folder / "model"
    if not model.exists():
        shutil.copytree(given / "model", model)
    try:
        (model / name).write_bytes(data)
        if drawn.random() < 0.7:
            listing.inspect(model, layers=True)
            return
        options: dict[str, Any] = {"prompts": str(given / "prompts" / "plain.txt"), "steps": 1, "num_prompts": 1}
        resolved = resolve(Options(model=str(model), recipe="rtn", height=16, width=16, device="cpu", **options))
        stages.generate(resolved, folder / "images", overwrite=True)
    finally:
        shutil.copy(given / "model" / name, model / name)


def _bomb(drawn: random.Random) -> bytes:
    """YAML whose anchors stand for a hundred times what they say, or that is deep."""
    text = io.StringIO()
    if drawn.random() < 0.5:
        text.write("name: " + "[" * drawn.choice((10, 1000, 100000)))
    else:
        text.write("a0: &a0 [x, x, x]\n")
        for level in range(1, drawn.randint(2, 4)):
            text.write(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n")
        text.write(f"{drawn.choice(('weights', 'rules', 'name', 'transforms'))}: *a{level}\n")
    return text.getvalue().encode()
