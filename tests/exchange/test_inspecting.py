"""What a weight file is, from its headers alone; and one line for what it cannot be."""

import json
import struct

import pytest
import torch

from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.architectures import guessed
from dmquant.exchange.keys import original
from dmquant.pipelines.commands import listing
from dmquant.pipelines.models import opening
from tests.exchange import labelled
from tests.exchange.test_dialects import backbone
from tests.tiny import TINY

TITLES = {
    "flux2": "Flux.2",
    "flux": "Flux.1",
    "chroma": "Chroma",
    "sd3": "Stable Diffusion 3",
    "sdxl": "Stable Diffusion XL",
    "sd15": "Stable Diffusion 1",
}
TITLES |= {"pixart": "PixArt", "sana": "Sana", "hunyuanimage": "HunyuanImage", "hunyuan": "HunyuanDiT", "dit": "DiT"}
TITLES |= {"qwenimage": "Qwen-Image", "cogview4": "CogView4", "auraflow": "AuraFlow", "wan": "Wan"}
FAMILIES = {name: next((TITLES[key] for key in TITLES if name.startswith(key)), None) for name in TINY}


@pytest.fixture(autouse=True)
def _known_format(monkeypatch):
    monkeypatch.setattr(opening, "formats", lambda: {"labelled": labelled.FORMAT})


def shown(capsys, *args):
    listing.inspect(*args)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", [name for name, title in FAMILIES.items() if title])
def test_models_are_told_by_their_names_and_by_their_original_names(name):
    pipeline = TINY[name].build()
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    own = list(model.state_dict())
    assert guessed(own).startswith(FAMILIES[name])
    if originals := original(type(model).__name__, model.config, own):
        title = guessed([target.name for target in originals])
        assert title.startswith(FAMILIES[name])
        assert title.endswith("(original names)")


def test_a_file_is_told_by_format_dialect_bits_and_layers(tmp_path, capsys):
    path = labelled.write(tmp_path / "file.safetensors", backbone(), ["0", "1"], activations="fp6")
    text = shown(capsys, path, False)
    assert "file.safetensors: labelled NVFP4, for tests, no model that is known here" in text
    assert "dialect: nibbles: low first; block scales: linear; scales: multiplied" in text
    assert "2 layers: nvfp4 in 2; inputs: fp6_e2m3 a token in 2; 4.502 bits a quantized weight; 23.0 kB packed" in text
    assert "in high precision 4 tensors of 67.3 kB (F32 in 4)" in text
    assert "256x128" in shown(capsys, path, True)


def test_full_precision_is_told_as_such(tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    tensor_file.write(path, [tensor_file.stored("a.weight", torch.zeros(4, 4, dtype=torch.bfloat16))], {})
    assert "full precision, no model that is known here (a.weight); 1 tensors of 32 B (BF16 in 1)" in shown(
        capsys, path, False
    )
    with pytest.raises(UserError, match="is in full precision: give what is quantized"):
        opening.open_foreign(path)


def _header(path, entries, data=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_it_cannot_be_is_one_line(tmp_path):
    path = tmp_path / "file.safetensors"
    whole = labelled.write(path, backbone(), ["0"]).read_bytes()
    tensor = {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]}
    huge = {"dtype": "U8", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 60]}
    broken = {
        "truncated or damaged": lambda: path.write_bytes(whole[:-1]),
        "is truncated or damaged": lambda: _header(path, {"a.weight": huge}, b"0" * 16),
        "in no format that is known here: 1 tensors of": lambda: _header(path, {"a.weight": tensor}, b"0" * 16),
        "Git LFS pointer": lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a PNG image, no safetensors file": lambda: path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole),
        "is a JPEG image, no safetensors file": lambda: path.write_bytes(b"\xff\xd8\xff\xe0" + whole),
    }
    for line, damage in broken.items():
        damage()
        with pytest.raises(UserError, match=line) as raised:
            listing.inspect(path, False)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"there is no .*none$"):
        listing.inspect(tmp_path / "none", False)


def test_files_that_no_index_makes_one_model_are_not_read_as_one(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        labelled.write(tmp_path / name, backbone(), ["0"])
    with pytest.raises(UserError, match="holds 2 safetensors files and no index of one model: name one of them"):
        opening.open_foreign(tmp_path)
