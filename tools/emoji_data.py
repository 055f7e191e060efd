"""The captioned images that the embedded emoji models learn from, and their tokenizer.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/emoji_data.py package > tests/tools/emoji_captions.txt

writes the captions, one a line and sorted: the list that prompts to measure with are checked against.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IMAGE_SIZE = 64
TEXT_LENGTH = 24


def captioned(package: Path) -> Iterator[tuple[str, Path]]:
    """Captions like 'red apple, food & drink, food fruit', each with the file of its image."""
    for entry in json.loads((package / "emoji.json").read_text()):
        path = package / "img/google/64" / entry["image"]
        if not entry.get("has_img_google") or not path.exists():
            continue
        name = (entry["name"] or entry["short_name"].replace("_", " ").replace("-", " ")).lower()
        group = (entry.get("subcategory") or "").replace("-", " ")
        yield f"{name}, {entry['category'].lower()}, {group}", path


def load_emoji(package: Path) -> tuple[Tensor, list[str]]:
    """Images (N, 3, 64, 64), float32 in [-1, 1] on white, and their captions."""
    images, captions = [], []
    for caption, path in captioned(package):
        icon = Image.open(path).convert("RGBA").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", icon.size, "white")
        canvas.alpha_composite(icon)
        images.append(np.asarray(canvas.convert("RGB")))
        captions.append(caption)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def learnt(count: int, held_out: int) -> list[int]:
    """Numbers of the images to learn from, of `count`: all but `held_out`, a seeded choice, in their order."""
    left = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:held_out].tolist()
    return [index for index in range(count) if index not in left]


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=2048, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


if __name__ == "__main__":
    print(*sorted(caption for caption, _ in captioned(Path(sys.argv[1]))), sep="\n")
