"""Which settings of cuDNN networks see while they look at images."""

import pytest
import torch
from torch import nn
from torch.backends import cudnn

from dmquant.evaluation.networks.clip import ClipModel
from dmquant.evaluation.networks.inception import Inception
from dmquant.evaluation.networks.perceptual_distance import LPIPS, NETWORKS
from dmquant.evaluation.result import Backbone

BACKBONE = Backbone("none", "0" * 64)


class Watching(nn.Module):
    """Remembers the settings of cuDNN that it is called under."""

    seen = None

    def forward(self, batch, **options):
        Watching.seen = cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark
        return batch.flatten(1)

    encode_image = encode_text = forward


def inception(batch):
    Inception(Watching(), BACKBONE)(batch)


def clip(batch):
    ClipModel(Watching(), None, None, BACKBONE, "none")(batch)


def lpips(batch):
    stages = [(torch.zeros(out, channels, kernel, kernel), torch.zeros(out)) for channels, out, kernel in ALEX]
    network = LPIPS(NETWORKS["alex"], stages, [torch.zeros(1, out, 1, 1) for _, out, _ in ALEX], BACKBONE)
    network.stages[0].register_forward_hook(lambda module, given, made: made + 0 * Watching()(made).mean())
    network(batch, batch)


ALEX = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))


@pytest.mark.parametrize("look", [inception, clip, lpips])
def test_convolutions_are_cudnns_and_not_in_tf32(look, monkeypatch):
    monkeypatch.setattr(cudnn, "benchmark", True)
    look(torch.rand(2, 3, 64, 64))
    assert Watching.seen == (True, False, True)
    with cudnn.flags(enabled=False):
        look(torch.rand(2, 3, 64, 64))
    assert Watching.seen == (False, False, False)
