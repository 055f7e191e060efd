#!/usr/bin/env bash
# diffusers 0.42.1: from_single_file with a quantization_config (torchao 0.18.0, optimum-quanto 0.2.7, torch 2.13.0)
#
# Expected: what from_pretrained does with the same config: quantize the full-precision file while loading.
# Happens: with TorchAoConfig the model comes back NOT quantized: plain Linear layers, plain Parameters, no error and no warning, while
# model.quantization_method says torchao. With QuantoConfig it dies with "Cannot copy out of meta tensor". from_pretrained of the
# same weights quantizes with both.
# Where: FromOriginalModelMixin.from_single_file builds the quantizer without saying pre_quantized=False, whose default is True, so
# the quantizer takes the file for already quantized; torchao then keeps the tensors as they are, quanto waits for scales.
# Means: a "quantized" Flux from one file may take its full memory, and a comparison on it measures full precision against itself.
# Count the quantized layers after loading. A custom quantizer that looks at self.pre_quantized meets the same default.
#
# Guess before running: torchao and quanto quantize (they are in the tree), only a custom quantizer fails.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export HOME="$dir" CUDA_VISIBLE_DEVICES= TMPDIR="$dir" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchao==0.18.0 optimum-quanto==0.2.7 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import diffusers, torch, torchao
from importlib.metadata import version
from diffusers import FluxTransformer2DModel, QuantoConfig, TorchAoConfig
from safetensors.torch import save_file
from torchao.quantization import Int8WeightOnlyConfig

print("diffusers", diffusers.__version__, "torchao", torchao.__version__, "optimum-quanto", version("optimum-quanto"), "torch", torch.__version__)
torch.manual_seed(0)
model = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
                               joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8])
model.save_pretrained("folder")
save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, "one.safetensors")
linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())


def quantized(model):
    """Linear layers whose weight is not a plain Parameter."""
    return sum(type(module.weight) is not torch.nn.Parameter for module in model.modules() if isinstance(module, torch.nn.Linear))


counts = {}
for config in (TorchAoConfig(Int8WeightOnlyConfig()), QuantoConfig(weights_dtype="int8")):
    name = type(config).__name__
    options = dict(quantization_config=config, torch_dtype=torch.bfloat16)
    folder = FluxTransformer2DModel.from_pretrained("folder", **options)
    print(f"{name}, from_pretrained: {quantized(folder)} of {linear} Linear layers quantized")
    try:
        one = FluxTransformer2DModel.from_single_file("one.safetensors", config="folder", **options)
        seen = quantized(one)
        print(f"{name}, from_single_file: {seen} of {linear} Linear layers quantized; quantization_method: {getattr(one, 'quantization_method', None)}")
    except NotImplementedError as error:
        seen = str(error)
        print(f"{name}, from_single_file: NotImplementedError: {seen}")
    counts[name] = quantized(folder), seen
assert counts["TorchAoConfig"] == (linear, 0), counts
assert counts["QuantoConfig"][0] == linear and "Cannot copy out of meta tensor" in counts["QuantoConfig"][1], counts
EOF
