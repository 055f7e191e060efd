"""FID, KID and CLIP score by several implementations; run by metric_peers.py."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from metric_peers import Pairs, Row, each, textures
from PIL import Image
from torch import Tensor

from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.networks.inception import find_weights
from dmquant.pipelines.models.registry import embedded_folder
from dmquant.pipelines.prompts.lists import load_prompts

PROMPTS = "emoji-held-out"


def fid(drawn: Pairs, _: Pairs) -> Iterator[Row]:
    with both_sets(drawn) as sets:
        rows = [
            Row("**dmquant**", each(sets, lambda s: s.ours("fid_fp"))),
            Row("torchmetrics", each(sets, Sets.torchmetrics), "nothing"),
            Row("torchmetrics, `antialias=False`", each(sets, lambda s: s.torchmetrics(antialias=False)), TENSORFLOW),
            Row("torch-fidelity", each(sets, lambda s: s.torch_fidelity(fid=True)), TENSORFLOW),
            Row("pytorch-fid", each(sets, Sets.pytorch_fid), f"{ALIASED}; x / 127.5 - 1, not (x - 128) / 128"),
            Row('clean-fid, `mode="clean"`', each(sets, lambda s: s.clean_fid("clean")), BICUBIC),
            Row('clean-fid, `mode="legacy_pytorch"`', each(sets, lambda s: s.clean_fid("legacy_pytorch")), ALIASED),
        ]
    yield from rows


LARGE = 512
TENSORFLOW = "bilinear as TensorFlow 1 did it: no antialiasing, pixels half a step off"
ALIASED = "bilinear, no antialiasing"
BICUBIC = "bicubic by Pillow, antialiased"


def kid(drawn: Pairs, _: Pairs) -> Iterator[Row]:
    with both_sets(drawn) as sets:
        rows = [
            Row("**dmquant**, `kid_real`: unpaired sets", each(sets, lambda s: s.ours("kid_real", real=s.learnt))),
            Row("torchmetrics, one subset of all images", each(sets, lambda s: s.torchmetrics_kid(1)), "nothing"),
            Row(
                "torchmetrics, 100 subsets of half of them", each(sets, lambda s: s.torchmetrics_kid(100, 2)), "chance"
            ),
            Row(
                "torch-fidelity, one subset of all images", each(sets, lambda s: s.torch_fidelity(kid=True)), TENSORFLOW
            ),
            Row('clean-fid, `mode="clean"`', each(sets, Sets.clean_kid), BICUBIC),
            Row("**dmquant**, `kid_fp`: pairs", each(sets, lambda s: s.ours("kid_fp")), "kernel of each pair left out"),
        ]
    yield from rows


@contextlib.contextmanager
def both_sets(drawn: Pairs) -> Iterator[list["Sets"]]:
    """The emoji pairs and large textures; what peers print is swallowed."""
    said = io.StringIO()
    with (
        Sets(drawn) as small,
        Sets(textures(LARGE)) as large,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        yield [small, large]


def clip_score(drawn: Pairs, _: Pairs) -> Iterator[Row]:
    """Of pictures with captions of others, so that some cosines are negative."""
    from torchmetrics.functional.multimodal import clip_score as torchmetrics

    clip = str(embedded_folder("embedded:emoji-clip"))
    captions = load_prompts(PROMPTS, len(drawn.images))
    with Sets(drawn) as sets:
        networks = Networks(clip=clip)
        ours = score_pairs(sets.learnt, sets.drawn, ["clip_score"], networks=networks, prompts=captions)["clip_score"]
        model = networks.clip
        images = torch.stack([model.prepare(path) for path in sorted(sets.drawn.iterdir())])
    cosines = (model(images) * model.encode_texts(captions)).sum(1)
    stand_in = SimpleNamespace(
        config=SimpleNamespace(),
        to=lambda device: stand_in,
        get_image_features=lambda pixels: model(images),
        get_text_features=lambda tokens, mask: model.encode_texts(captions),
    )
    processor = {key: torch.zeros(1) for key in ("pixel_values", "input_ids", "attention_mask")}
    theirs = torchmetrics(list(drawn.images), captions, lambda: (stand_in, lambda **_: processor))
    yield Row("**dmquant**, emoji-clip, captions of other pictures", (ours.value,))
    yield Row("torchmetrics", (float(theirs),), "negative cosines count, the mean alone is cut off at 0")
    yield Row("Hessel et al. 2021", (float(2.5 * cosines.clamp(min=0).mean()),), "2.5 in place of 100 (formula)")


class Sets:
    """The drawn and the learnt pictures in folders, and what each implementation makes of them."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __enter__(self) -> "Sets":
        self.temporary = tempfile.TemporaryDirectory()
        root = Path(self.temporary.name)
        self.drawn, self.learnt, self.weights = root / "drawn", root / "learnt", root / "inception.pth"
        for folder, images in ((self.drawn, self.pairs.images), (self.learnt, self.pairs.references)):
            folder.mkdir()
            for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                Image.fromarray(image).save(folder / f"{index:05d}.png")
        torch.save(inception_state(), self.weights)
        return self

    def __exit__(self, *_: object) -> None:
        self.temporary.cleanup()

    def ours(self, name: str, real: Path | None = None) -> float:
        return score_pairs(self.learnt, self.drawn, [name], real=real)[name].value

    def torchmetrics(self, **options: bool) -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(self.weights), **options)
        return self._updated(metric.set_dtype(torch.float64))

    def torchmetrics_kid(self, subsets: int, share: int = 1) -> float:
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.image.kid import KernelInceptionDistance

        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(self.weights))
        metric = KernelInceptionDistance(network, subsets=subsets, subset_size=len(self.pairs.images) // share)
        return self._updated(metric)[0]

    def _updated(self, metric):
        metric.update(self.pairs.references, real=True)
        metric.update(self.pairs.images, real=False)
        return metric.compute()

    def torch_fidelity(self, **which: bool) -> float:
        from torch_fidelity import calculate_metrics

        [value, *_] = calculate_metrics(
            input1=str(self.drawn),
            input2=str(self.learnt),
            feature_extractor_weights_path=str(self.weights),
            cuda=False,
            cache=False,
            verbose=False,
            kid_subsets=1,
            kid_subset_size=len(self.pairs.images),
            **which,
        ).values()
        return value

    def pytorch_fid(self) -> float:
        import pytorch_fid.inception
        from pytorch_fid.fid_score import calculate_fid_given_paths

        with patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(self.weights)):
            return calculate_fid_given_paths([str(self.learnt), str(self.drawn)], 16, "cpu", 2048, num_workers=0)

    def clean_fid(self, mode: str) -> float:
        from cleanfid.fid import fid_from_feats

        return fid_from_feats(*self._clean_features(mode))

    def clean_kid(self) -> float:
        from cleanfid.fid import kernel_distance

        return kernel_distance(*self._clean_features("clean"), num_subsets=1)

    def _clean_features(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        from cleanfid.fid import get_folder_features
        from cleanfid.inception_torchscript import InceptionV3W

        network = InceptionV3W.__new__(InceptionV3W)
        torch.nn.Module.__init__(network)
        network.layers, network.resize_inside = torch.jit.load(find_weights().path).net.layers, False
        options = {"model": network, "num_workers": 0, "device": torch.device("cpu"), "mode": mode, "verbose": False}
        return tuple(get_folder_features(str(folder), **options) for folder in (self.learnt, self.drawn))


def inception_state() -> dict[str, Tensor]:
    """Our Inception-v3's weights by the names of torch-fidelity and pytorch-fid, whose layers are in the same order."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = iter(torch.jit.load(find_weights().path, map_location="cpu").state_dict().values())
    downloads = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with (
        patch(downloads, lambda *_, **__: {}),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
    ):
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for layer in [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]:
        for part in ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
            state[f"{layer}.{part}"] = next(ours)
        state[f"{layer}.bn.weight"] = torch.ones_like(state[f"{layer}.bn.bias"])
    return state


METRICS = {"fid": fid, "kid": kid, "clip_score": clip_score}
