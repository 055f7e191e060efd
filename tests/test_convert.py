"""quantize_ swaps exactly the layers that the recipe says, and the books balance."""

import pytest
import torch
from torch import nn

from dmquant.convert import plan, quantize_, unmatched
from dmquant.errors import UsageError
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.models import completed
from dmquant.pipelines.runs.footprint import footprint, remainder
from dmquant.recipe import Recipe, Rule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3), "ff": nn.Linear(96, 32)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(32)
        self.proj_out = nn.Linear(32, 4)

    def block(self):
        return nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3), "ff": nn.Linear(96, 32)})


def kinds(net):
    return {name for name, layer in net.named_modules() if isinstance(layer, (QuantLinear, QuantConv2d))}


def test_what_no_family_knows_keeps_its_first_and_last_layers_by_their_usual_names():
    net = Net()
    reports = quantize_(net, "rtn")
    assert kinds(net) == {"blocks.0.conv", "blocks.0.ff", "blocks.1.conv", "blocks.1.ff"}
    assert [report.plan.name for report in reports] == sorted(kinds(net))


def test_rules_choose_format_and_granularity_by_name():
    net = Net()
    rules = [Rule(match="*conv*", weights="int8", granularity="channel"), Rule(match="blocks.1.*", keep=True)]
    quantize_(net, Recipe(name="x", keep="none", rules=rules))
    assert kinds(net) == {"conv_in", "blocks.0.conv", "blocks.0.ff", "proj_out"}
    conv, ff = net.blocks[0]["conv"].weight_spec, net.blocks[0]["ff"].weight_spec
    assert (conv.fmt.name, str(conv.granularity)) == ("int8", "channel")
    assert (ff.fmt.name, str(ff.granularity)) == ("fp4_e2m1", "group:64")


def test_what_one_product_allows_is_a_scale_a_token_and_under_a_kernel_of_several_positions_one_an_image():
    net = Net()
    net.blocks[0]["pixelwise"] = nn.Conv2d(8, 8, 1)
    quantize_(net, Recipe(name="x", keep="none", activations="int8", activation_granularity="product"))
    found = {name: str(layer.activations.granularity) for name, layer in net.named_modules() if name in kinds(net)}
    assert found["blocks.0.ff"] == found["blocks.0.pixelwise"] == "token"
    assert found["blocks.0.conv"] == found["conv_in"] == "image"


def test_a_group_size_that_does_not_divide_is_handled_and_said():
    net = Net()
    reports = quantize_(net, Recipe(name="x", granularity="group:64"))
    notes = {report.plan.name: remainder(net.get_submodule(report.plan.name)) for report in reports}
    assert "96 weights a channel do not divide into groups of 64; the last group has 32" in notes.values()
    assert notes["blocks.0.conv"] == "144 weights a channel do not divide into groups of 64; the last group has 16"
    assert net.blocks[0]["ff"](torch.randn(2, 96)).isfinite().all()


def test_groups_of_a_convolution_may_end_within_a_position_of_its_kernel():
    net = Net()
    quantize_(net, Recipe(name="x", granularity="group:24"))
    assert net.blocks[0]["conv"].scale.shape == (16, 144 // 24 * 2)  # bytes
    assert net.blocks[0]["conv"](torch.randn(2, 16, 5, 5)).isfinite().all()


def test_the_same_plan_on_meta():
    with torch.device("meta"):
        empty = Net()
    assert plan(empty, Recipe.load("rtn")) == plan(Net(), Recipe.load("rtn"))


def test_a_pattern_of_ones_own_that_matches_no_layer_is_named_in_a_warning(caplog):
    rules = [Rule(match=["block.*", "blocks.0.*"], weights="fp6"), Rule(match="proj_uot", keep=True)]
    quantize_(Net(), Recipe(name="mine", rules=rules))
    assert caplog.messages == [
        "recipe 'mine': no layer of Net matches 'block.*', 'proj_uot', so that changes nothing",
    ]


@pytest.mark.parametrize("name", ["rtn", "fp4dit"])
def test_patterns_that_come_with_dmquant_may_match_nothing(name):
    assert unmatched(Net(), Recipe.load(name)) is None
    assert unmatched(Net(), completed(Recipe.load(name), Net())) is None


def test_a_recipe_that_quantizes_nothing_is_an_error():
    with pytest.raises(UsageError, match="quantizes none of the layers of Net"):
        quantize_(Net(), Recipe(name="idle", rules=[Rule(match="*", keep=True)]))


@pytest.mark.parametrize("target", [nn.Linear(64, 64), object()])
def test_what_holds_no_layers_to_replace_is_refused(target):
    with pytest.raises(UsageError, match="is no module that holds layers: give one, such as pipe"):
        quantize_(target, "rtn")


def test_a_layer_with_nan_weights_is_named():
    net = Net()
    net.blocks[1]["ff"].weight.data[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"layer blocks\.1\.ff: the weights hold NaN"):
        quantize_(net, "rtn")


def test_a_model_whose_weights_are_elsewhere_is_refused_in_one_line():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(UsageError, match=r"layer blocks\.0\.conv: the weights hold .* or none \(device meta\)"):
        quantize_(net, "rtn")


def test_progress_counts_every_layer():
    seen = []
    quantize_(Net(), "rtn", progress=lambda *step: seen.append(step))
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_reported_errors_are_those_of_the_weights():
    net = Net()
    exact = net.blocks[0]["ff"].weight.detach().clone()
    error = {report.plan.name: report.error for report in quantize_(net, "rtn")}["blocks.0.ff"]
    back = net.blocks[0]["ff"].dequantize(torch.float32)
    assert error == pytest.approx(((back - exact).square().sum() / exact.square().sum()).item())
    assert 0.003 < error < 0.03


def test_footprint_counts_scales_biases_and_kept_layers():
    net = Net()
    before = footprint(net)
    assert before.bits_per_weight is None
    assert before.bytes == 4 * sum(p.numel() for p in net.parameters())
    quantize_(net, Recipe.load("w4a16").with_settings(granularity="group:16", store="bf16"))
    after = footprint(net)
    weights = 2 * (16 * 144 + 32 * 96)
    assert after.quantized_weights == weights
    assert after.bits_per_weight == 5.0  # four bits, and sixteen of scale for every sixteen
    assert after.kept_bytes == before.bytes - 4 * weights
    assert after.bytes == sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
