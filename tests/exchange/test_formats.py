"""Written for torchao, ModelOpt, bfl and compressed-tensors and read back by ourselves; what cannot be, in a line."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmquant import quantize_pipeline
from dmquant.activations import ActivationSpec
from dmquant.errors import UserError
from dmquant.exchange.formats import formats, writable
from dmquant.exchange.formats.compressed_tensors.layouts import is_exact, reciprocal
from dmquant.exchange.layers import HIGH
from dmquant.formats import get_format
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.qtensor import WeightSpec, quantize_tensor
from dmquant.recipe import Recipe
from tests.tiny import PIXART_CALL, tiny_pixart, tiny_sd

CALL = {"num_inference_steps": 2, "height": 32, "width": 32, **PIXART_CALL}
ROW = {"granularity": "channel", "store": "fp32"}
TENSOR = {"granularity": "tensor", "store": "fp32"}
BLOCKS = {
    "nvfp4": {"weights": "nvfp4"},
    "nvfp4 x nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "mxfp4": {"weights": "mxfp4"},
    "mxfp4 x mxfp4": {"weights": "mxfp4", "activations": "mxfp4"},
    "mxfp8": {"weights": "mxfp8"},
    "mxfp8 x mxfp8": {"weights": "mxfp8", "activations": "mxfp8"},
    "fp8": {"weights": "fp8_e4m3", **ROW},
    "fp8 x fp8": {"weights": "fp8_e4m3", "activations": "fp8_e4m3", **ROW},
    "fp8 a tensor x fp8": {
        "weights": "fp8_e4m3",
        "activations": "fp8_e4m3",
        "activation_granularity": "tensor",
        **TENSOR,
    },
    "e5m2": {"weights": "fp8_e5m2", "granularity": "group:32"},
    "int8 x int8": {"weights": "int8", "activations": "int8", **ROW},
    "int8": {"weights": "int8", **ROW},
    "int3": {"weights": "int3", "granularity": "group:32", "store": "bf16"},
    "int4": {"weights": "int4", "granularity": "group:16", "store": "fp32"},
    "int4 in whole scales x int8": {
        "weights": "int4",
        "granularity": "group:16",
        "store": "int",
        "activations": "int8",
    },
}
TAKEN = {
    "torchao": [name for name in BLOCKS if name != "mxfp4"],
    "modelopt": ["nvfp4", "mxfp8 x mxfp8", "fp8 x fp8", "int8"],
    "bfl": ["fp8", "fp8 x fp8"],
    "compressed-tensors": [
        *(
            "nvfp4",
            "mxfp4",
            "mxfp4 x mxfp4",
            "mxfp8",
            "mxfp8 x mxfp8",
            "fp8 x fp8",
            "int8 x int8",
            "int8",
            "int3",
            "int4",
        )
    ],
}
"""Which of BLOCKS each target holds."""


def opened(saved, name, **options):
    return open_source(saved(Recipe(name="tried", **BLOCKS[name]), width=64, **options))


def exported(source, target, out):
    return writable(target).export(source, out, lambda done, total: None)


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    """`written(target, name)`: the source, what its export told, and the export opened; each is made once."""
    made = {}

    def write(target, name):
        if (target, name) not in made:
            source, out = opened(saved, name), tmp_path_factory.mktemp("exported") / "model"
            made[target, name] = source, exported(source, target, out), open_foreign(out)
        return made[target, name]

    return write


@pytest.mark.parametrize(("target", "name"), [(target, name) for target, names in TAKEN.items() for name in names])
def test_weights_are_read_back_bit_for_bit(written, target, name):
    source, told, foreign = written(target, name)
    assert foreign.format.name == target
    assert foreign.layers.keys() == source.layers.keys()
    for module, layer in foreign.layers.items():
        ours = source.layer(module).dequantize(torch.float32)
        assert layer.shape == tuple(ours.shape)
        if told.exact:
            assert torch.equal(layer.weight(), ours)
        assert torch.allclose(layer.weight(), ours, rtol=2.0**-22, atol=0)
    assert told.exact or (target, name) == ("compressed-tensors", "nvfp4")
    kinds = {kind: count for kind, count in told.formats.items() if kind != HIGH}
    assert sum(kinds.values()) == len(source.layers)


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, held in TAKEN.items() for name in BLOCKS if name not in held]
)
def test_what_a_target_cannot_hold_is_refused_by_layer_and_reason(saved, tmp_path, target, name):
    source = opened(saved, name)
    with pytest.raises(UserError) as refused:
        exported(source, target, tmp_path / "out")
    assert next(iter(source.layers)) in str(refused.value)
    assert f"--for {target}" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "weights", "inputs", "says"),
    [
        ("bfl", "nvfp4", "nvfp4", "has inputs in nvfp4, and weights in nvfp4 go there with inputs in static nvfp4"),
        ("modelopt", "nvfp4", "nvfp4", "in nvfp4 go there with inputs in static nvfp4 or 16 bits"),
        ("compressed-tensors", "mxfp8", "nvfp4", "in mxfp8 go there with inputs in 16 bits or mxfp8"),
        ("modelopt", "mxfp4", "mxfp4", "has weights in mxfp4"),
    ],
)
def test_inputs_that_do_not_go_with_the_weights_are_named_with_those_that_do(target, weights, inputs, says):
    refuses = formats()[target].refuses
    assert says in refuses(nn.Linear(64, 64), WeightSpec.parse(weights), ActivationSpec.parse(inputs))


@pytest.mark.parametrize("target", TAKEN)
def test_biases_and_what_is_not_quantized_are_as_stored(written, target):
    name = TAKEN[target][0]
    source, _, foreign = written(target, name)
    for tensor in foreign.rest:
        assert torch.equal(foreign.found.tensor(tensor), source.tensor(tensor))
    biases = {f"{module}.bias" for module, layer in source.layers.items() if layer.bias is not None}
    assert set(foreign.rest) == {*source.rest, *biases}


@pytest.mark.parametrize("target", TAKEN)
@pytest.mark.parametrize(
    ("layer", "says"),
    [(nn.Conv2d(32, 32, 3), "Conv2d"), (nn.Linear(40, 32), "40 inputs, no multiple of")],
)
def test_layers_of_another_class_or_shape_are_refused(target, layer, says):
    spec, rows = WeightSpec.parse("nvfp4"), WeightSpec.parse("fp8_e4m3", "channel", store="fp32")
    if target == "bfl":  # whose NVFP4 has static inputs
        assert "Conv2d" in formats()[target].refuses(nn.Conv2d(32, 32, 3), rows, None)
        assert formats()[target].refuses(nn.Linear(40, 32), rows, None) is None
        return
    assert says in formats()[target].refuses(layer, spec, None)


def test_torchao_asks_for_whole_tiles_where_inputs_are_rounded():
    layer, spec, refuses = nn.Linear(32, 24), WeightSpec.parse("nvfp4"), formats()["torchao"].refuses
    assert refuses(layer, spec, None) is None
    assert "24 outputs" in refuses(layer, spec, ActivationSpec.parse("nvfp4"))


@pytest.mark.parametrize("target", TAKEN)
def test_a_transform_without_a_place_is_named(saved, tmp_path, target):
    settings = {"weights": "fp8_e4m3", "activations": "fp8_e4m3", **ROW}
    source = open_source(saved(Recipe(name="svd", transforms=[{"method": "lowrank", "rank": 2}], **settings), width=64))
    with pytest.raises(UserError, match="has the transform lowrank:2"):
        exported(source, target, tmp_path / "out")


def test_mixed_formats_go_into_one_folder(saved, tmp_path):
    rules = [{"match": "*ff*", "weights": "int8", "granularity": "channel", "store": "fp32"}]
    source = open_source(saved(Recipe(name="mixed", weights="nvfp4", rules=rules), width=64))
    for target in ("torchao", "modelopt", "compressed-tensors"):
        told = exported(source, target, tmp_path / target)
        foreign = open_foreign(tmp_path / target)
        assert len({layer.format for layer in foreign.layers.values()}) == 2
        assert len(told.formats) == 3
        for module, layer in foreign.layers.items():
            assert torch.allclose(layer.weight(), source.layer(module).dequantize(torch.float32), rtol=2.0**-22, atol=0)


class TestDamaged:
    """Files that are not as they say: one line that names the tensor."""

    @pytest.fixture
    def broken(self, written, tmp_path):
        """`broken(target, name, change)`: the backbone's folder, with tensors and header changed."""

        def write(target, name, change):
            foreign = written(target, name)[2]
            (file,) = foreign.found.files
            with safe_open(file, "pt") as opened_file:
                metadata = opened_file.metadata()
            tensors = load_file(file)
            change(tensors, metadata)
            (tmp_path / "config.json").write_text(json.dumps(dict(foreign.found.config)))
            save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata)
            return tmp_path

        return write

    LAYER = "transformer_blocks.0.attn1.to_q"

    @pytest.mark.parametrize(
        ("target", "name", "tensor"),
        [
            ("torchao", "nvfp4", "_weight_scale"),
            ("torchao", "nvfp4 x nvfp4", "_weight_scale"),
            ("torchao", "mxfp8 x mxfp8", "_weight_scale"),
            ("torchao", "int8", "_weight_scale"),
            ("modelopt", "nvfp4", "weight_scale"),
            ("modelopt", "nvfp4", "weight_scale_2"),
            ("modelopt", "fp8 x fp8", "weight_scale"),
            ("compressed-tensors", "nvfp4", "weight_scale"),
            ("compressed-tensors", "int3", "weight_shape"),
            ("compressed-tensors", "int8 x int8", "weight_scale"),
        ],
    )
    def test_a_part_of_another_shape(self, broken, target, name, tensor):
        def change(tensors, metadata):
            key = f"{self.LAYER}.{tensor}"
            tensors[key] = tensors[key].reshape(-1).repeat(7)[: tensors[key].numel() + 5].clone()

        with pytest.raises(UserError, match=rf"{self.LAYER}\.{tensor}"):
            open_foreign(broken(target, name, change))

    @pytest.mark.parametrize(
        ("target", "tensor"),
        [("torchao", "_weight_qdata"), ("modelopt", "weight_scale_2"), ("compressed-tensors", "weight_packed")],
    )
    def test_a_part_that_is_missing(self, broken, target, tensor):
        with pytest.raises(UserError, match=r"lacks the tensor|is U8|no scale|is F8"):
            open_foreign(broken(target, "nvfp4", lambda tensors, _: tensors.pop(f"{self.LAYER}.{tensor}")))

    def test_a_header_that_names_what_torchao_does_not(self, broken):
        def rename(tensors, metadata):
            metadata[f"{self.LAYER}.weight"] = metadata[f"{self.LAYER}.weight"].replace("NVFP4Tensor", "NF4Tensor")

        with pytest.raises(UserError, match=f"{self.LAYER}.weight .* NF4Tensor, which is not read here"):
            open_foreign(broken("torchao", "nvfp4", rename))

    @pytest.mark.parametrize("name", ["nvfp4 x nvfp4", "mxfp8 x mxfp8", "fp8 x fp8", "int8 x int8"])
    def test_odd_attributes_are_read_or_refused(self, written, name):
        """Whatever stands in place of an attribute."""
        foreign = written("torchao", name)[2]
        key, found = f"{self.LAYER}.weight", foreign.found
        whole = json.loads(found.metadata[key])
        for odd in (None, 7, "x", [[]], {"_data": {"a": 1}}, {"_type": "PerRow", "_data": [7]}):
            changed = [{**whole, part: odd} for part in whole]
            changed += [{**whole, "_data": {**whole["_data"], part: odd}} for part in whole["_data"]]
            for header in changed:
                metadata = {**found.metadata, key: json.dumps(header)}
                with suppress(UserError):
                    layers = foreign.format.read(replace(found, metadata=metadata)).layers
                    assert torch.equal(layers[self.LAYER].weight(), foreign.layers[self.LAYER].weight())

    @pytest.mark.parametrize(
        "odd", [None, [], {"group_0": 3}, {"group_0": {"targets": 3}}, {"a": {"targets": ["re:("]}}]
    )
    @pytest.mark.parametrize("name", ["nvfp4", "int3"])
    def test_odd_groups_are_read_or_refused(self, written, name, odd):
        """Of compressed-tensors, whose bits of integers stand in the configuration alone."""
        foreign = written("compressed-tensors", name)[2]
        config = {"quantization_config": {**foreign.found.config["quantization_config"], "config_groups": odd}}
        found = replace(foreign.found, config=config)
        if name == "nvfp4":
            layers = foreign.format.read(found).layers
            assert torch.equal(layers[self.LAYER].weight(), foreign.layers[self.LAYER].weight())
        else:
            with pytest.raises(UserError, match="is no weight"):
                foreign.format.read(found)

    def test_a_header_that_is_no_json(self, broken):
        def spoil(tensors, metadata):
            metadata[f"{self.LAYER}.weight"] = "{"

        with pytest.raises(UserError, match="says nothing of torchao"):
            open_foreign(broken("torchao", "nvfp4", spoil))


def test_reciprocals_bring_back_what_they_can():
    """Dividing by the number that is written is as exact as dividing by any float32 near it."""
    generator = torch.Generator().manual_seed(0)
    scales, exact = get_format("fp8_e4m3").values, 0
    for base in (torch.rand(200, 1, generator=generator) + 1) * 2.0**-12:
        inverse = reciprocal(base)
        products = scales / inverse
        assert torch.allclose(products, scales * base, rtol=2.0**-22, atol=0)
        exact += is_exact(base)
        assert is_exact(base) == torch.equal(products, scales * base)
    assert is_exact(torch.tensor([2.0**-9]))
    assert exact < 200


def test_nvfp4_of_all_dialects_is_the_same(written):
    """The codes, scales and base of ModelOpt and torchao are the same bytes."""
    ours, _, theirs = written("torchao", "nvfp4")
    other = written("modelopt", "nvfp4")[2]
    pairs = {"_weight_qdata": "weight", "_weight_scale": "weight_scale", "_weight_per_tensor_scale": "weight_scale_2"}
    for module in ours.layers:
        for one, two in pairs.items():
            a, b = theirs.found.tensor(f"{module}.{one}"), other.found.tensor(f"{module}.{two}")
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.float(), b.float())


STATIC = {"weights": "nvfp4", "activations": "nvfp4", "activation_scale": "static:1"}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """`calibrated(**settings)`: a tiny pipeline whose static inputs and transforms are fitted to a few prompts."""

    def make(name, **settings):
        folder = tmp_path_factory.mktemp("calibrated") / name
        recipe = Recipe(
            name=name, calibration={"prompts": 3, "steps_per_prompt": 1}, learning={"batch_size": 1}, **settings
        )
        quantize_pipeline(tiny_pixart(width=64), recipe, calibration=["apple", "cat", "boat"], out=folder, **CALL)
        return open_source(folder)

    return make


@pytest.fixture(scope="module")
def static(calibrated):
    return calibrated("static", **STATIC)


@pytest.mark.parametrize("target", TAKEN)
def test_static_bases_of_inputs_go_along(static, tmp_path, target):
    exported(static, target, tmp_path / "out")
    foreign = open_foreign(tmp_path / "out")
    for module, layer in foreign.layers.items():
        ours = static.layer(module)
        assert layer.activations == ActivationSpec.parse("nvfp4", scale="static:1", engine=target)
        assert torch.allclose(layer.input_scale(), ours.input_scale.view(torch.float32), rtol=2.0**-22, atol=0)
        assert torch.allclose(layer.weight(), ours.dequantize(torch.float32), rtol=2.0**-22, atol=0)


def test_a_low_rank_branch_goes_to_modelopt_and_computes_as_ours(calibrated, tmp_path):
    """NVFP4_SVD: smoothing, codes and branch, built again as a layer."""
    transforms = [{"method": "lowrank", "rank": 4}]
    source = calibrated("branch", transforms=transforms, **STATIC)
    told = exported(source, "modelopt", tmp_path / "out")
    assert told.formats["NVFP4_SVD"] == len(source.layers)
    foreign = open_foreign(tmp_path / "out")
    quantization = foreign.found.config["quantization_config"]
    assert (quantization["quant_algo"], quantization["config_groups"]["group_0"]["lora_rank"]) == ("NVFP4_SVD", 4)
    module = "transformer_blocks.0.ff.net.0.proj"
    plain, ours, layer = nn.Linear(64, 256), source.layer(module), foreign.layers[module]
    plain.bias = nn.Parameter(source.tensor(f"{module}.bias"))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = ours(x)
    assert torch.allclose(layer.build(plain)(x), expected, atol=0.05 * expected.abs().max().item())
    assert torch.allclose(layer.weight(), ours.float_weight(), atol=1e-6)


def test_inputs_are_told(written):
    activations = {layer.activations for layer in written("torchao", "int8 x int8")[2].layers.values()}
    assert activations == {ActivationSpec.parse("int8", engine="torchao")}
    assert {layer.activations for layer in written("modelopt", "nvfp4")[2].layers.values()} == {None}


def test_the_smallest_weights_survive(tmp_path):
    """A layer of zeros and of the smallest numbers has a base that is no subnormal."""
    weight = torch.zeros(16, 32)
    weight[0, 0] = 1e-38
    base = quantize_tensor(weight, "nvfp4").scales.base.reshape(1)
    assert torch.isfinite(reciprocal(base)).all()


@pytest.mark.parametrize("target", ["torchao", "bfl"])
def test_what_is_made_for_a_target_goes_there(tmp_path, target):
    """`--for TARGET` of an UNet, whose convolutions stay in high precision."""
    recipe = Recipe.load(f"for-{target}")
    small = {"calibration": {"prompts": 3, "steps_per_prompt": 1}, "learning": {"batch_size": 1}}
    recipe = Recipe.model_validate({**recipe.model_dump(exclude_unset=True), **small})
    call = {"num_inference_steps": 2, "height": 32, "width": 32}
    quantize_pipeline(tiny_sd(), recipe, calibration=["apple", "cat", "boat"], out=tmp_path / "ours", **call)
    source = open_source(tmp_path / "ours")
    told = exported(source, target, tmp_path / "theirs")
    assert told.exact
    assert told.formats[HIGH] > 10
    assert not any("scored" in note for note in told.notes)
    inputs = ActivationSpec.parse("nvfp4", scale=recipe.activation_scale, engine=target)
    for module, layer in open_foreign(tmp_path / "theirs").layers.items():
        assert layer.activations == inputs
        assert torch.equal(layer.weight(), source.layer(module).dequantize(torch.float32))
